"""A bar for every plan and peer of one workload: the time of a decode step, and what it sends.

draw(steps(rows), "bars.png")
"""

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.support.plots import png
from experiments.support.results import predictions, tables
from experiments.support.results.tables import Row

# Label, colour and hatch by plan. Peers are hatched, and what keeps the whole cache on the GPU is pale.
STYLES = {
    "huggingface_offloaded": ("Hugging Face, cache in host memory", "#b0b0b0", "////"),
    "huggingface": ("Hugging Face, cache on the GPU", "#e4e4e4", "////"),
    "keys_values": ("keys_values, from host memory", "#606060", ""),
    "kvpr:*": ("KVPR's schedule", "#8c2d04", ""),
    "activations": ("activations, from host memory", "#0072b2", ""),
    "auto": ("auto, with room on the GPU", "#0072b2", ""),
    "device": ("all on the GPU", "#a6cee3", ""),
}


@dataclass(frozen=True)
class Step:
    """The median step of a plan or peer, and the bytes that it sends, None where they are not known."""

    device: str
    model: str
    batch: int
    prompt: int
    plan: str
    room: float | None
    median_ms: float
    link_bytes: int | None

    @property
    def pattern(self) -> str:
        """The key of STYLES."""
        for pattern in STYLES:
            if fnmatch.fnmatchcase(self.plan, pattern):
                return pattern
        raise ValueError(f"there is no bar for the plan {self.plan!r}; there are {', '.join(STYLES)}")

    @property
    def label(self) -> str:
        """What its bar is called."""
        return STYLES[self.pattern][0] + ("" if self.room is None else f" for {self.room:g} %")


def steps(rows: Sequence[Row]) -> list[Step]:
    """Of rows of experiments/suite.py, the slowest first.

    Raises:
        ValueError: the rows are not of one workload on one machine.
    """
    names = ("device", "model", "batch", "prompt", "plan", "room", "median_ms", "link_bytes")
    found = [Step(**{name: row[name] for name in names}) for row in rows]
    if len(set(map(_title, found))) > 1:
        raise ValueError("the rows are of several workloads: expected one")
    return sorted(found, key=lambda step: -step.median_ms)


def said(found: Sequence[Step]) -> str:
    """All of it, in a sentence without its full stop."""
    return f"{_title(found[0])}: {tables.listed(f'{step.label} {step.median_ms:.1f} ms' for step in found)}"


def _title(step: Step) -> str:
    return f"A decode step of {predictions.title(step.model)}, {step.batch} rows of {step.prompt} tokens, {step.device}"


def draw(found: Sequence[Step], path: str | os.PathLike) -> None:
    """Writes a PNG. Raises ModuleNotFoundError, ValueError and OSError as `png.check_path` does."""
    png.check_path(path)
    figure = png.figure()
    figure.set_figheight(0.8 + 0.36 * len(found))
    axes = figure.add_subplot()
    for place, step in enumerate(found):
        _, colour, hatch = STYLES[step.pattern]
        edge = "0.35" if hatch else colour
        axes.barh(place, step.median_ms, 0.68, color=colour, hatch=hatch, edgecolor=edge, linewidth=0.8)
        sent = f", {step.link_bytes / 1e9:.1f} GB over the link" if step.link_bytes else ""
        axes.text(step.median_ms, place, f"  {step.median_ms:.1f} ms{sent}", va="center", fontsize="small")
    axes.set_yticks(range(len(found)), [step.label for step in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.12 * found[0].median_ms)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(_title(found[0]), x=0.012, ha="left", fontsize="medium")
    png.save(figure, path, predictions.digest(found))
