"""Bars for every kind of text, one for each drafter: the tokens that a row takes a pass.

draw(drafted(rows), "acceptance.png")
"""

import os
from collections.abc import Sequence

from experiments.support.plots import png
from experiments.support.results import predictions, tables
from experiments.support.results.tables import Row

# Colour and hatch by drafter: sketches are plain, dark where they are of more bits.
STYLES = {
    "fp8 sketch": ("#0072b2", ""),
    "int4 sketch": ("#a6cee3", ""),
    "prompt lookup": ("#e4e4e4", "////"),
    "assistant": ("#e69f00", ""),
}
OF_ALL = ("model", "batch", "prompt", "new", "temperature", "drafts")  # the same in all rows
WIDTH = 0.84  # of the bars of a kind, together


def drafted(rows: Sequence[Row]) -> list[Row]:
    """Of rows of experiments/acceptance.py, what is drawn; `taken` are tokens a pass by kind of text.

    Raises ValueError where they differ in one of OF_ALL, or two are of a drafter.
    """
    found = []
    for row in rows:
        taken = {text["kind"]: text["tokens_per_pass"] for text in row["texts"]}
        found.append({name: row[name] for name in (*OF_ALL, "drafter")} | {"taken": taken})
    for name in OF_ALL:
        if len(values := sorted({str(row[name]) for row in found})) > 1:
            raise ValueError(f"the rows have {name} {' and '.join(values)}; expected one of them: add {name}=...")
    drafters = [row["drafter"] for row in found]
    if len(set(drafters)) < len(drafters):
        raise ValueError(f"two rows are of one drafter, among {tables.listed(drafters)}: leave one out")
    return found


def said(found: Sequence[Row]) -> str:
    """The least and the most of each drafter, in a sentence without its full stop."""
    spans = []
    for row in found:
        least, most = min(row["taken"], key=row["taken"].__getitem__), max(row["taken"], key=row["taken"].__getitem__)
        spans.append(f"{row['drafter']} {row['taken'][least]:.1f} ({least}) to {row['taken'][most]:.1f} ({most})")
    return f"{_title(found[0])}: {tables.listed(spans)}"


def _title(row: Row) -> str:
    chosen = "greedy" if row["temperature"] == 0 else f"temperature {row['temperature']:g}"
    sizes = f"{row['prompt']} tokens of each text, {row['drafts']} drafts a round, {chosen}"
    return f"Tokens a pass of {predictions.title(row['model'])}, {sizes}"


def draw(found: Sequence[Row], path: str | os.PathLike) -> None:
    """Writes a PNG. Raises ModuleNotFoundError, ValueError and OSError as `png.check_path` does."""
    png.check_path(path)
    figure = png.figure(_title(found[0]), height=3.2)
    axes = figure.add_subplot()
    kinds, width = list(found[0]["taken"]), WIDTH / len(found)
    for number, row in enumerate(found):
        colour, hatch = STYLES[row["drafter"]]
        places = [place + (number + 0.5) * width - WIDTH / 2 for place in range(len(kinds))]
        heights = [row["taken"][kind] for kind in kinds]
        edge = "0.35" if hatch else colour
        style = {"color": colour, "hatch": hatch, "edgecolor": edge, "linewidth": 0.8}
        axes.bar(places, heights, 0.9 * width, label=row["drafter"], **style)
        for place, height in zip(places, heights):
            axes.text(place, height, f"{height:.1f}", ha="center", va="bottom", fontsize="x-small")
    most = found[0]["drafts"] + 1
    axes.axhline(1, color="0.35", linewidth=0.8, linestyle=":")  # without drafts
    axes.set_xticks(range(len(kinds)), kinds)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, most)
    axes.set_yticks([1, *range(3, most, 2), most])
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(ncols=len(found), **png.LEGEND)
    png.save(figure, path, predictions.digest(found))
