"""Tables on a terminal and in a file, against their own words."""

import io

import pytest
from rich import box
from rich.console import Console
from rich.table import Table

import kvrecomp
import models
from experiments.support.results import tables, terminal

PLAN = kvrecomp.named_plan("split:0.5", models.preset("opt-6.7b").shape, kvrecomp.Workload(32, 1024, 32))
STEPS = tables.table(
    [("OPT-6.7B", "keys_values", 343.25), ("Llama-2-7B", "huggingface_offloaded", 81.5)],
    ("model", lambda row: row[0]),
    ("plan", lambda row: f"`{row[1]}` (its cache in host memory)"),
    ("median ms a step", lambda row: f"**{row[2]}**"),
    ("GB over the link", lambda row: str(row[2] / 8)),
    ("predicted", lambda row: "167.03"),
    ("efficiency", lambda row: "0.958"),
)


def named() -> Table:
    """Names that hold together, and are the widest."""
    table = Table(title="Alternatives", caption="none fits", box=box.SIMPLE)
    table.add_column("plan", no_wrap=True)
    table.add_column("GiB on\nthe device")
    table.add_column("fits")
    table.add_row("keys_values here, activations there (chosen)", "12.34", "no: device lacks 3.21 GiB and host 5 GiB")
    return table


def shown(table: Table | str, width: int, is_terminal: bool) -> list[str]:
    file = io.StringIO()
    terminal.show(Console(file=file, width=width, force_terminal=is_terminal, color_system=None), table)
    return file.getvalue().splitlines()


def words(table: Table | str) -> list[str]:
    table = terminal.from_markdown(table) if isinstance(table, str) else table
    cells = [str(cell) for column in table.columns for cell in (column.header, *column.cells)]
    return " ".join([*cells, str(table.title or ""), str(table.caption or "")]).split()


@pytest.mark.parametrize("make", [PLAN.table, lambda: STEPS, named])
@pytest.mark.parametrize("width", [50, 61, 80, 97, 120, 200])
def test_words_are_whole_on_a_terminal_of_any_width(make, width):
    lines = shown(make(), width, True)
    assert max(map(len, lines)) <= width
    said = " ".join(lines).replace(": ", " ").split()
    for word in words(make()):
        assert word.removesuffix(":") in said


def test_a_table_that_does_not_fit_is_paragraphs():
    assert len(shown(STEPS, 83, True)) == 11  # headings and cells are of several lines
    assert shown(STEPS, 82, True)[:3] == [
        "model: OPT-6.7B",
        "plan: keys_values (its cache in host memory)",
        "median ms a step: 343.25",
    ]


@pytest.mark.parametrize("make", [PLAN.table, lambda: STEPS, named])
def test_nothing_is_cut_or_broken_where_there_is_no_terminal(make):
    lines = shown(make(), 40, False)
    assert lines == shown(make(), max(map(len, lines)), False)
    table = terminal.from_markdown(make()) if isinstance(make(), str) else make()
    for row in zip(*(column.cells for column in table.columns)):
        assert any(all(str(cell) in line for cell in row) for line in lines)
