"""Pictures for the pages: one size, and written in one piece. Needs matplotlib, the extra `plot`."""

import importlib.util
import os
import pathlib
from typing import TYPE_CHECKING, Any

from kvrecomp.files import check_writable, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# At 800 pixels, the width of a README, the default font of 10 points is 15 pixels high; drawn finer for sharp screens.
INCHES = (7.2, 5.0)
DPI = 150
LEGEND: dict[str, Any] = {"loc": "outside lower left", "frameon": False, "fontsize": "small"}


def check_path(path: str | os.PathLike) -> None:
    """Raises what `figure` and `save` would raise, before any work is done.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the name does not end in .png.
        OSError: there is no such directory, the path is one, or a file cannot be written there.
    """
    path = pathlib.Path(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("plots need matplotlib, the extra `plot`: pip install -e '.[plot]'")
    if path.suffix.lower() != ".png":
        raise ValueError(f"a plot is written as PNG; {str(path)!r} does not end in .png")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory; a plot is a file in one")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {str(path.parent)!r} to write the plot into: make it first")
    check_writable(path)


def figure(title: str = "", height: float = INCHES[1]) -> "Figure":
    """An empty figure of that size, with room made for legends outside of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES[0], height), dpi=DPI, layout="constrained")
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize="medium")
    return figure


def grid(figure: "Figure", title: str, x: str, y: str) -> "Axes":
    """Axes with a grid below what is drawn, and these labels."""
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def save(figure: "Figure", path: str | os.PathLike, source: str | None = None) -> None:
    """Writes a PNG in one piece: a reader sees the old file or the new one, never half of it.

    `source` says in the file, as plain text, what the picture was drawn from.
    """
    path = pathlib.Path(path)
    check_path(path)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", metadata={"Source": source})
