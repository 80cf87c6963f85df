"""What plans with loss change in a model's text, against the bytes that they leave.

draw(lost(rows), "losses.png")
"""

import os
from collections.abc import Sequence

from experiments.support.plots import png
from experiments.support.results import predictions
from experiments.support.results.tables import Row

# Colour and marker by what a plan's name begins with.
STYLES = {
    "activations": ("#0072b2", "o", "activations"),
    "keys_values": ("#e69f00", "s", "keys and values"),
    "flexgen": ("0.45", "x", "keys and values, as FlexGen has them"),
}
OF_ALL = ("model", "prompt", "new")  # the same in all rows


def lost(rows: Sequence[Row]) -> list[Row]:
    """Of rows of experiments/quality.py, what is drawn. Raises ValueError where they differ in one of OF_ALL."""
    for name in OF_ALL:
        if len(values := sorted({str(row[name]) for row in rows})) > 1:
            raise ValueError(f"the rows have {name} {' and '.join(values)}; expected one of them: add {name}=...")
    fields = (*OF_ALL, "plan", "bytes_of_plain", "divergence")
    return [{name: row[name] for name in fields} for row in rows]


def said(found: Sequence[Row]) -> str:
    """Every plan's divergence, in a sentence without its full stop."""
    each = ", ".join(f"{row['plan']} {row['divergence']:.2g}" for row in found)
    return f"{_title(found[0])}, divergence in bits a token: {each}"


def _title(row: Row) -> str:
    return f"{predictions.title(row['model'])} with loss and without, {row['new']} tokens after {row['prompt']}"


def draw(found: Sequence[Row], path: str | os.PathLike) -> None:
    """Writes a PNG. Raises ModuleNotFoundError, ValueError and OSError as `png.check_path` does."""
    png.check_path(path)
    figure = png.figure(height=3.6)
    axes = png.grid(
        figure, _title(found[0]), "bytes of blocks, of those of plain keys and values", "divergence, bits a token"
    )
    for begins, (colour, marker, label) in STYLES.items():
        points = [row for row in found if row["plan"].startswith(begins)]
        places = [[row[name] for row in points] for name in ("bytes_of_plain", "divergence")]
        axes.plot(*places, marker, color=colour, label=label)
        for row in points:
            codec = row["plan"].partition("+")[2] or f"{row['plan'].partition(':')[2]} bits"
            spot = row["bytes_of_plain"], row["divergence"]
            axes.annotate(codec, spot, (6, 0), textcoords="offset points", va="center", fontsize="small")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = (0.125, 0.25, 0.5, 1)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(0.1, 1.2)
    figure.legend(ncols=len(STYLES), **png.LEGEND)
    png.save(figure, path, predictions.digest(found))
