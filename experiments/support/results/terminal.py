"""Tables on a terminal: words and numbers are whole, however narrow it is."""

import dataclasses
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement, measure_renderables
from rich.table import Table
from rich.text import Text

WIDTH = 120  # of text in a file or a pipe
PADDING = 2  # of every cell, and one between cells and on both sides


def standard_output() -> Console:
    """As wide as the terminal, or of WIDTH where there is none."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def show(console: Console, table: Table | str) -> None:
    """Prints a table, of rich with `box.SIMPLE` or in Markdown.

    Where there is no terminal, it is as wide as it needs to be. On one, cells are broken between words; where it is too
    narrow for that, each row is a paragraph, with a cell a line.
    """
    table = from_markdown(table) if isinstance(table, str) else table
    spans = _measured(console, table)
    widths = [span.maximum for span in spans]
    room = console.width - (1 + PADDING) * len(spans) - 1
    if console.is_terminal:
        for number in sorted(range(len(spans)), key=lambda number: spans[number].minimum - spans[number].maximum):
            widths[number] = max(spans[number].minimum, widths[number] - max(0, sum(widths) - room))
        if sum(widths) > room:
            return _show_paragraphs(console, table)
    else:
        console = Console(file=console.file, width=console.width + max(0, sum(widths) - room))
    table.columns = [dataclasses.replace(column, width=width) for column, width in zip(table.columns, widths)]
    console.print(table)


def _measured(console: Console, table: Table) -> Sequence[Measurement]:
    """The least width of each column, with lines broken between words where they may be, and the most."""
    wide = console.options.update(width=10**6)
    spans = []
    for column in table.columns:
        span = measure_renderables(console, wide, [column.header, *column.cells])
        spans.append(span.with_minimum(span.maximum) if column.no_wrap else span)
    return spans


def _show_paragraphs(console: Console, table: Table) -> None:
    if table.title:
        console.print(table.title)
    for row in zip(*(column.cells for column in table.columns)):
        for column, cell in zip(table.columns, row):
            console.print(Text.assemble(f"{column.header}: ".replace("\n", " "), (str(cell), "bold")))
        console.print()
    if table.caption:
        console.print(table.caption)


def from_markdown(text: str) -> Table:
    """The table that the text is in Markdown."""
    heading, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
    table = Table(box=box.SIMPLE)
    for name in heading:
        table.add_column(name)
    for row in rows:
        table.add_row(*(Text(cell.strip("*").replace("`", ""), "bold" if "**" in cell else "") for cell in row))
    return table
