"""A bar for every plan and peer of one workload: the time of a decode step, and what it sends.

draw(steps(rows), "bars.png")
"""

import fnmatch
import os
from collections.abc import Sequence

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


FIELDS = ("device", "model", "batch", "prompt", "plan", "room", "median_ms", "link_bytes")  # what is drawn of a row


def steps(rows: Sequence[Row]) -> list[Row]:
    """Of rows of experiments/suite.py, the slowest first. Raises ValueError where they are of several workloads."""
    found = [{name: row[name] for name in FIELDS} for row in rows]
    if len(set(map(_title, found))) > 1:
        raise ValueError("the rows are of several workloads: expected one")
    return sorted(found, key=lambda step: -step["median_ms"])


def _style(step: Row) -> tuple[str, str, str]:
    """What its bar is called, its colour and hatch."""
    for pattern, (label, colour, hatch) in STYLES.items():
        if fnmatch.fnmatchcase(step["plan"], pattern):
            return label + ("" if step["room"] is None else f" for {step['room']:g} %"), colour, hatch
    raise ValueError(f"there is no bar for the plan {step['plan']!r}; there are {', '.join(STYLES)}")


def said(found: Sequence[Row]) -> str:
    """All of it, in a sentence without its full stop."""
    times = [f"{_style(step)[0]} {step['median_ms']:.1f} ms" for step in found]
    return f"{_title(found[0])}: {tables.listed(times)}"


def _title(step: Row) -> str:
    model = predictions.title(step["model"])
    return f"A decode step of {model}, {step['batch']} rows of {step['prompt']} tokens, {step['device']}"


def draw(found: Sequence[Row], path: str | os.PathLike) -> None:
    """Writes a PNG. Raises ModuleNotFoundError, ValueError and OSError as `png.check_path` does."""
    png.check_path(path)
    figure = png.figure(_title(found[0]), height=0.8 + 0.36 * len(found))
    axes = figure.add_subplot()
    for place, step in enumerate(found):
        _, colour, hatch = _style(step)
        milliseconds, sent = step["median_ms"], step["link_bytes"]
        edge = "0.35" if hatch else colour
        axes.barh(place, milliseconds, 0.68, color=colour, hatch=hatch, edgecolor=edge, linewidth=0.8)
        gigabytes = f", {sent / 1e9:.1f} GB over the link" if sent else ""
        axes.text(milliseconds, place, f"  {milliseconds:.1f} ms{gigabytes}", va="center", fontsize="small")
    axes.set_yticks(range(len(found)), [_style(step)[0] for step in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.12 * found[0]["median_ms"])
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    png.save(figure, path, predictions.digest(found))
