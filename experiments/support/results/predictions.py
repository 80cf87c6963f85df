"""Predicted, chosen and measured: what single steps say of the cost function and of the scheduler.

rows = tables.predicted(tables.read_file("experiments/results/h200_sweep.json"))
print(accuracy(rows))
draw_predictions(rows, "predictions.png")
"""

import dataclasses
import hashlib
import json
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from experiments.support.plots import png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A kind of plan: its label, marker and colour. Markers tell the kinds apart without the colours (Okabe and Ito's).
KINDS = {
    "activations": ("activations", "o", "#0072b2"),
    "recompute": ("recompute", "s", "#e69f00"),
    "keys_values": ("keys_values", "D", "#000000"),
    "split": ("split", "+", "#009e73"),
    "kvpr": ("kvpr", "^", "#8c2d04"),
    "device": ("device", "v", "#56b4e9"),
    "auto": ("auto", "x", "#cc79a7"),
    "": ("two forms, by room", "p", "#707070"),  # "activations here, keys_values there", and whatever comes later
}
WIDTH_OF_A_TITLE = 70  # characters
ROOMS = (("o", "#000000"), ("s", "#0072b2"), ("^", "#e69f00"), ("D", "#56b4e9"), ("v", "#8c2d04"), ("P", "#009e73"))


@dataclasses.dataclass
class Measured:
    """One plan on one workload; `room` is the percentage of its keys and values that the device may hold, `layers` how
    many the model was cut to, if it was."""

    model: str
    batch: int
    prompt: int
    new: int
    plan: str
    room: float | None
    median_ms: float
    predicted_ms: float
    link_bytes: int
    chosen: bool = False
    layers: int | None = None

    @property
    def off(self) -> float:
        """How far the prediction is off, as a fraction of the measured time; below zero it is short."""
        return self.predicted_ms / self.median_ms - 1

    @property
    def workload(self) -> tuple[Any, ...]:
        """What choices are made for: model, its layers, batch, cached and new tokens, and the room."""
        return self.model, self.layers, self.batch, self.prompt, self.new, self.room


@dataclasses.dataclass
class Choice:
    """The scheduler's plan for a workload, and the best of so many plans by hand that fit as well."""

    chosen: Measured
    best: Measured
    rivals: int

    @property
    def ratio(self) -> float:
        """Of the measured times; above one, a plan by hand was faster."""
        return self.chosen.median_ms / self.best.median_ms


# --- what there is ----------------------------------------------------------------------------------------------------


def distinct(rows: Sequence[Measured]) -> list[Measured]:
    """Every measurement once: a plan that fits several rooms is measured once and has a row for each."""
    found: dict[Any, Measured] = {}
    for row in sorted(rows, key=lambda row: row.chosen):  # of one program, the name by hand says more than auto
        found.setdefault((row.workload[:-1], row.median_ms), row)
    return list(found.values())


def choices(rows: Sequence[Measured]) -> list[Choice]:
    """The scheduler's plans that have a rival."""
    by_hand: dict[Any, list[Measured]] = {}
    for row in rows:
        if not row.chosen:
            by_hand.setdefault(row.workload, []).append(row)
    found = []
    for row in rows:
        rivals = by_hand.get(row.workload, [])
        if row.chosen and rivals:
            found.append(Choice(row, min(rivals, key=lambda rival: rival.median_ms), len(rivals)))
    return found


# --- what is said -----------------------------------------------------------------------------------------------------


def accuracy(rows: Sequence[Measured]) -> str:
    """How far predictions are off, in a sentence without its full stop."""
    off = [row.off for row in distinct(rows)]
    if not off:
        raise ValueError("there is no prediction")
    near, good = (sum(abs(fraction) <= margin for fraction in off) for margin in (0.05, 0.1))
    return f"{near} of {len(off)} predictions are within 5 %, {good} within 10 % ({ends(off, percent)})"


def percent(off: float) -> tuple[str, str]:
    """A prediction's error as an amount and its unit, as in 15 % short and 6 % over."""
    rounded = round(100 * off)
    return str(abs(rounded)), "% short" if rounded < 0 else "% over"


def ends(values: Sequence[Any], amount: Callable[[Any], tuple[str, str]]) -> str:
    """From the least to the greatest, as `between` has it; `amount` gives a value and its unit in text."""
    return between(amount(min(values)), amount(max(values)))


def between(low: tuple[str, str], high: tuple[str, str]) -> str:
    """From one amount to another: 4 to 15 % short, 15 % short to 6 % over, 9.7 ms."""
    if low[1] != high[1]:
        return " to ".join(" ".join(amount) for amount in (low, high))
    return f"{' to '.join(sorted({low[0], high[0]}, key=float))} {low[1]}".strip()


def regret(rows: Sequence[Measured]) -> str:
    """How far choices are from the best plan by hand, in a sentence without its full stop."""
    found = choices(rows)
    if not found:
        raise ValueError("no plan was chosen: measure with --rooms")
    near, good = (sum(choice.ratio <= 1 + margin for choice in found) for margin in (0.03, 0.05))
    rivals = ends([choice.rivals for choice in found], lambda count: (str(count), ""))
    worst = max(found, key=lambda choice: choice.ratio)
    of_worst = f"{described(worst.chosen)}, room for {worst.chosen.room:g} %"
    return (
        f"{near} of {len(found)} choices take at most 3 % longer than the best of {rivals} plans by hand, {good} at "
        f"most 5 %; the worst takes {worst.ratio:.2f} times as long ({of_worst})"
    )


def described(row: Measured) -> str:
    """The workload in a few words."""
    return f"{model_of(row)}, batch {row.batch}, {row.prompt} cached"


def model_of(row: Measured) -> str:
    """Its title, and how many layers it was cut to."""
    return title(row.model) + (f" of {row.layers} layers" if row.layers else "")


def title(model: str) -> str:
    """A preset's name as it is written in text: opt-6.7b is OPT-6.7B, llama-2-7b is Llama-2-7B."""
    family, *rest = model.split("-")
    sizes = [part.upper() if re.fullmatch(r"[\d.]+[bm]", part) else part for part in rest]
    return "-".join([family.upper() if family == "opt" else family[:1].upper() + family[1:], *sizes])


# --- what is drawn ----------------------------------------------------------------------------------------------------


def draw_predictions(rows: Sequence[Measured], path: str | os.PathLike) -> None:
    """Writes a PNG: how far every prediction is off, over the measured time of the step.

    Raises ValueError where there is no row, and what `png.check_path` does.
    """
    png.check_path(path)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    said, points = accuracy(rows), distinct(rows)
    models = ", ".join(dict.fromkeys(model_of(row) for row in points))
    batches = ", ".join(map(str, sorted({row.batch for row in points})))
    figure = png.figure(f"Predicted steps: {models}, batch {batches}\n{said}")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    _bands(axes.axhspan, axes.axhline)
    for kind, (label, marker, colour) in KINDS.items():
        of_kind = [row for row in points if kind_of(row.plan) == kind]
        if of_kind:
            names = {row.plan for row in of_kind}
            label = names.pop() if len(names) == 1 else label
            xs, ys = [row.median_ms for row in of_kind], [100 * row.off for row in of_kind]
            _points(axes, xs, ys, marker, colour, label, size=8 if len(points) <= 100 else 6)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -12), max(high, 12))
    axes.set_xlabel("measured time of a step (ms)")
    axes.set_ylabel("predicted over measured time, less 1 (%)")
    figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize="small", columnspacing=1.5)
    png.save(figure, path, digest(rows))


def draw_choices(rows: Sequence[Measured], path: str | os.PathLike) -> None:
    """Writes a PNG: for every workload and room, how much longer the chosen plan takes than the best one by hand.

    Raises ValueError where no plan was chosen, and what `png.check_path` does.
    """
    png.check_path(path)
    from matplotlib.ticker import MaxNLocator

    said = textwrap.fill(regret(rows).partition(";")[0], WIDTH_OF_A_TITLE)
    found = choices(rows)
    names = list(dict.fromkeys(described(choice.chosen) for choice in found))
    rooms = sorted({choice.chosen.room or 0.0 for choice in found})
    title = f"Chosen plans, by the keys and values that the device may hold\n{said}"
    figure = png.figure(title, height=1.8 + 0.3 * len(names))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    _bands(axes.axvspan, axes.axvline)
    axes.hlines([index - 0.5 for index in range(1, len(names))], 0, 1, "white", transform=axes.get_yaxis_transform())
    for index, room in enumerate(rooms):
        in_room = [choice for choice in found if choice.chosen.room == room]
        aside = 0.6 * ((index + 0.5) / len(rooms) - 0.5)  # rooms of one workload lie one below the other
        xs = [100 * (choice.ratio - 1) for choice in in_room]
        ys = [names.index(described(choice.chosen)) + aside for choice in in_room]
        _points(axes, xs, ys, *ROOMS[index % len(ROOMS)], f"room for {room:g} %", size=6)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(len(names) - 0.5, -0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -6), max(high, 11))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=(1, 2, 5, 10)))
    axes.set_xlabel("time of the chosen plan over the best by hand, less 1 (%)")
    figure.legend(loc="outside lower left", ncols=len(rooms), frameon=False, fontsize="small")
    png.save(figure, path, digest(rows))


def kind_of(plan: str) -> str:
    """The key of KINDS for a plan's name."""
    kind = plan.partition(":")[0]
    return kind if kind in KINDS else ""


def digest(rows: Sequence[Any]) -> str:
    """Says in a picture's file what was drawn, so that a picture of older numbers is found out."""
    return hashlib.sha256(json.dumps(rows, default=dataclasses.asdict).encode()).hexdigest()


def _points(axes: "Axes", xs: list[float], ys: list[float], marker: str, colour: str, label: str, size: float) -> None:
    """Open markers: what lies below another shows through."""
    style = {"color": colour, "markerfacecolor": "none", "markeredgewidth": 1.7, "markersize": size}
    axes.plot(xs, ys, marker, label=label, clip_on=False, zorder=3, **style)


def _bands(span: Any, line: Any) -> None:
    """10 % and 5 % to both sides, and zero."""
    span(-10, 10, color="0.95", zorder=0)
    span(-5, 5, color="0.89", zorder=0)
    line(0, color="0.4", linewidth=1, zorder=1)
