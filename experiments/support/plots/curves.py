"""Step time against cached tokens: a line for every plan and peer of one model and batch, from a results file.

rows = [row for row in tables.read_file("experiments/results/h200_suite.json") if row["model"] == "opt-6.7b"]
draw_curves(points(rows), "curves.png")
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.support.plots import png
from experiments.support.results import predictions, tables
from experiments.support.results.tables import Row

# Marker and colour of others' programs; ours are in predictions.KINDS. Theirs are dotted, with filled markers, and what
# keeps the cache on the device is dashed: lines are told apart without colours.
PEERS = {"huggingface": ("X", "#606060"), "huggingface_offloaded": ("P", "#606060")}
OF_ALL = ("device", "model", "batch", "new", "weights", "groups", "order")  # the same in all points
USUAL = {"weights": "device", "groups": 1, "order": "row"}  # of peers, and of rows that do not say it


@dataclass(frozen=True)
class Point:
    """The median step of one plan or peer over `new` tokens, after `cached` of the prompt."""

    device: str
    model: str
    batch: int
    new: int
    weights: str
    groups: int
    order: str
    plan: str
    room: float | None
    cached: int
    median_ms: float

    @property
    def line(self) -> str:
        """What its line is called."""
        return tables.noted(self.plan) + ("" if self.room is None else f", room for {self.room:g} %")


def points(rows: Sequence[Row]) -> list[Point]:
    """Points of rows of experiments/suite.py or benchmark.py, by line and cached tokens.

    Raises ValueError where there is no row, they differ in one of OF_ALL, or two of a line have the same cached tokens.
    """
    if not rows:
        raise ValueError("there is no row to draw")
    found = []
    for row in rows:
        full = USUAL | {name: value for name, value in row.items() if value is not None}
        fields = {name: full[name] for name in (*OF_ALL, "plan", "median_ms")}
        found.append(Point(**fields, room=row.get("room"), cached=row["prompt"]))
    for name in OF_ALL:
        if len(values := sorted({str(getattr(point, name)) for point in found})) > 1:
            raise ValueError(f"the rows have {name} {' and '.join(values)}; expected one of them: add {name}=...")
    found.sort(key=lambda point: (point.line, point.cached))
    for one, two in itertools.pairwise(found):
        if (one.line, one.cached) == (two.line, two.cached):
            raise ValueError(f"two rows are of {one.line} with {one.cached} cached tokens: leave one out")
    return found


def lines(found: Sequence[Point]) -> list[list[Point]]:
    """The points of each line, the slowest first, by what is furthest to the right."""
    by_line: dict[str, list[Point]] = {}
    for point in found:
        by_line.setdefault(point.line, []).append(point)
    return sorted(by_line.values(), key=lambda line: -line[-1].median_ms)


def said(found: Sequence[Point]) -> str:
    """The times with the most cached tokens, in a sentence without its full stop."""
    most = max(point.cached for point in found)
    times = [f"{line[-1].line} {line[-1].median_ms:.1f} ms" for line in lines(found) if line[-1].cached == most]
    return f"{_title(found[0])}: with {most} cached tokens a step takes {tables.listed(times)}"


def _title(point: Point) -> str:
    return f"{predictions.title(point.model)}, batch {point.batch}, {point.device}"


def draw_curves(found: Sequence[Point], path: str | os.PathLike) -> None:
    """Writes a PNG: milliseconds of a step over cached tokens, on logarithmic scales. Raises as `png.check_path`."""
    png.check_path(path)
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    figure = png.figure()
    cached = f"cached tokens of a row, before {found[0].new} new ones"
    axes = png.grid(figure, f"Decode steps: {_title(found[0])}", cached, "time of a step (ms)")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for line in lines(found):
        xs, ys = [point.cached for point in line], [point.median_ms for point in line]
        axes.plot(xs, ys, label=line[0].line, linewidth=1.8, clip_on=False, zorder=3, **_style(line))
    axes.xaxis.set_major_locator(FixedLocator(sorted({point.cached for point in found})))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.legend(ncols=2, handlelength=3.6, columnspacing=1, **png.LEGEND)
    png.save(figure, path, predictions.digest(found))


def _style(line: Sequence[Point]) -> dict[str, Any]:
    """How a line and its markers are drawn."""
    plan = line[0].plan
    kind = predictions.kind_of(plan)
    marker, colour = PEERS.get(plan) or predictions.KINDS[kind][1:]
    style = ":" if plan in PEERS else "--" if kind == "device" else "-"
    face = colour if plan in PEERS else "white"
    marked = {"marker": marker, "markersize": 7.5, "markeredgewidth": 1.5, "markerfacecolor": face}
    return {"color": colour, "linestyle": style if len(line) > 1 else "none", **marked}
