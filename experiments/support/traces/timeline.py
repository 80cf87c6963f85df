"""A picture of decode steps as they ran: copies and compute over time, layer by layer, one plan below the other.

    rows = timelines(tables.read_file("trace.json"))
    draw(rows, "trace.png")

A row of experiments/trace.py has beside the usual fields

    traced_ms    the step that was traced, in ms; profiling slows it down, `median_ms` is without
    link_busy    the part of it in which something crossed the link; gpu_busy: in which a kernel ran
    unknown      the part of the compute, by time, of which no layer is known
    spans        [kind, layer, start, length] in ms from the start of the step, one for each time that a layer's copies
                 or kernels ran without a gap; kind as xplane.Kind; layer -1 outside of the layers, null if not known
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.support.plots import png
from experiments.support.results import predictions
from experiments.support.results.tables import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Bar = tuple[str, int | None, float, float]  # kind, layer, start and length in ms
LANES = {"to_device": "host to device", "to_host": "device to host", "compute": "compute"}
# Of even and odd layers, and where there is none or none is known: label, face, hatch. Told apart in grey too.
STYLES = {
    0: ("even layers", "#0072b2", ""),
    1: ("odd layers", "#6cbcf0", ""),
    -1: ("outside of the layers", "#000000", ""),
    None: ("layer not known", "#e0e0e0", "////"),
}
NUMBER_WIDTH = 0.016  # of the time axis, which a layer's number in small print needs


FIELDS = (  # of a row, what is kept and drawn
    *("model", "batch", "prompt", "new", "plan", "median_ms", "traced_ms"),
    *("link_bytes", "link_busy", "gpu_busy", "unknown", "spans"),
)
NUMBERS = ("traced_ms", "link_bytes", "link_busy", "gpu_busy", "unknown")


def timelines(rows: Sequence[Row]) -> list[Row]:
    """The rows of a results file. Raises `ValueError` where they are of another script."""
    for row in rows:
        if missing := [name for name in FIELDS if name not in row]:
            raise ValueError(f"{row['file']} has no {missing[0]}, so it is not of experiments/trace.py --out")
        if wrong := [name for name in NUMBERS if type(row[name]) not in (int, float)]:
            raise ValueError(f"{row['file']}: {wrong[0]} is {row[wrong[0]]!r:.60}; expected a number")
        if not (isinstance(row["spans"], list) and all(map(_is_bar, row["spans"]))):
            raise ValueError(f"{row['file']}: spans are no list of kind, layer, start and length")
    return [{name: row[name] for name in FIELDS} for row in rows]


def _is_bar(bar: Any) -> bool:
    """Of JSON, which has a list where a `Bar` is a tuple."""
    if not (isinstance(bar, list) and len(bar) == 4 and bar[0] in LANES):
        return False
    layer, *times = bar[1:]
    return (layer is None or type(layer) is int) and all(type(time) in (int, float) for time in times)


def said(rows: Sequence[Row]) -> str:
    """How busy link and GPU are, in a sentence without its full stop."""
    if not rows:
        raise ValueError("there is no step to say anything of")
    return "; ".join(map(_described, rows))


def _described(row: Row) -> str:
    link, gpu = (f"{100 * row[name]:.1f} %" for name in ("link_busy", "gpu_busy"))
    times = f"{row['traced_ms']:.1f} ms traced ({row['median_ms']:.1f} ms not traced)"
    return f"{row['plan']}, {times}: link busy {link}, GPU {gpu}"


def _workload(row: Row) -> str:
    return f"{predictions.title(row['model'])}, batch {row['batch']}, {row['prompt']} cached"


def draw(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Writes a PNG: a panel for every row, all on one time axis. Raises ValueError without rows, or as `check_path`."""
    png.check_path(path)
    if not rows:
        raise ValueError("there is no step to draw")
    from matplotlib.patches import Patch

    lanes = [lane for lane in LANES if any(bar[0] == lane for row in rows for bar in row["spans"])]
    workloads = dict.fromkeys(
        f"{predictions.title(row['model'])}, batch {row['batch']}, {row['prompt']} cached" for row in rows
    )
    title = f"A decode step, traced: {'; '.join(workloads)}"
    figure = png.figure(title, height=1.05 + (0.55 + 0.33 * len(lanes)) * len(rows))
    panels = figure.subplots(len(rows), sharex=True, squeeze=False)[:, 0]
    longest = max(row["traced_ms"] for row in rows)
    for panel, row in zip(panels, rows):
        _panel(panel, row, lanes, longest)
    panels[-1].set_xlim(0, longest * 1.005)
    panels[-1].set_xlabel("time since the start of the step (ms)")
    drawn = {_style(layer) for row in rows for _, layer, _, _ in row["spans"]}
    patches = [
        Patch(facecolor=face, hatch=hatch, edgecolor="0.4" if hatch else face, label=label)
        for key, (label, face, hatch) in STYLES.items()
        if key in drawn
    ]
    figure.legend(handles=patches, ncols=4, **png.LEGEND)
    png.save(figure, path, predictions.digest(rows))


def _style(layer: int | None) -> int | None:
    """The key of STYLES for a layer."""
    return layer % 2 if layer is not None and layer >= 0 else layer


def _panel(axes: "Axes", row: Row, lanes: Sequence[str], longest: float) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(_described(row), loc="left", fontsize="small")
    axes.set_yticks(range(len(lanes)), [LANES[lane] for lane in lanes], fontsize="small")
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.hlines(range(len(lanes)), 0, row["traced_ms"], "0.8", linewidth=0.8, zorder=1)  # where a lane rests
    axes.axvline(row["traced_ms"], color="0.4", linewidth=1, linestyle="--", zorder=1)
    for number, lane in enumerate(lanes):
        for key, (_, face, hatch) in STYLES.items():
            bars = [bar for bar in row["spans"] if bar[0] == lane and _style(bar[1]) == key]
            if bars:
                extents = [(start, length) for _, _, start, length in bars]
                edge = "0.4" if hatch else face
                axes.broken_barh(extents, (number - 0.4, 0.8), color=face, edgecolor=edge, hatch=hatch, linewidth=0.5)
            for _, layer, start, length in bars:
                if key in (0, 1) and length > NUMBER_WIDTH * longest:
                    placed: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": 6}
                    axes.text(start + length / 2, number, str(layer), color="white" if key == 0 else "black", **placed)
