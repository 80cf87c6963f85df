"""The paper KVPR, recomputed: a table for each of its tables, and where its numbers and its formula disagree.

    python experiments/reproduce_paper.py
    python experiments/reproduce_paper.py --results=experiments/results/h200_suite.json,other.json
    python experiments/reproduce_paper.py --tables="Table 3,Table 4" --hardware=h200

A row has the paper's numbers, the cost function's for the paper's machine by its data sheet, and those that were
measured, each with its gain below it. Nothing is generated, and no device is needed. The paper's numbers are in
experiments/support/paper/paper.json.
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.plan import read_hardware
from experiments.support import script
from experiments.support.paper import costs as paper_costs
from experiments.support.paper import notes as paper_notes
from experiments.support.paper.numbers.costs import BASELINE, PLACES, Found, Place, Row
from experiments.support.paper.numbers.notes import Note
from experiments.support.paper.numbers.numbers import Paper, PaperTable, Setting, read, records
from experiments.support.results import tables
from experiments.support.results.predictions import title
from experiments.support.results.report import run_info
from kvrecomp.plan import AUTO
from kvrecomp.predict.datasheets import DATASHEETS
from kvrecomp.predict.kvpr import kvpr_split

WIDTH = 160
COLUMNS = {BASELINE: "K and V", "kvpr": "KVPR", "activations": "activ.", AUTO: "ours"}
LEGEND = (
    "Below a number is its gain: the paper's over its baseline, others over K and V. K and V: all keys and values from "
    "host memory, copied under compute; sum: the same without overlap; KVPR: the paper's schedule at its best split "
    "(l/s); activ.: all activations, absorbed; ours: what is chosen within the machine's device memory; here: measured."
)
Column = tuple[str, Callable[[Row], str]]  # a heading, and a row's cell


def define_flags(into: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the script only: tests import without them."""
    flags.DEFINE_list("results", [], "Results files of experiments/benchmark.py, to show beside.", flag_values=into)
    flags.DEFINE_list("tables", [], "The paper's tables of steps, by name; default: all.", flag_values=into)
    flags.DEFINE_string(
        "hardware",
        None,
        f"Predict for another machine: this, which is measured, or a data sheet: {', '.join(DATASHEETS)}.",
        flag_values=into,
    )
    flags.DEFINE_bool("json", False, "Print a JSON document as the last line of standard output.", flag_values=into)


# --- what is asked for ------------------------------------------------------------------------------------------------


def chosen(paper: Paper, names: Sequence[str]) -> tuple[PaperTable, ...]:
    """The tables of these names, all of them where there is none. Raises ValueError for others."""
    there = {own.name.lower(): own for own in paper.tables}
    for name in names:
        if name.strip().lower() not in there:
            raise ValueError(
                f"--tables has {name!r}; the paper's tables of steps are {', '.join(own.name for own in paper.tables)}"
            )
    return tuple(dict.fromkeys(there[name.strip().lower()] for name in names)) or paper.tables


def about(path: str, rows: Sequence[tables.Row], found: Sequence[Found]) -> str:
    """How many results of a file are of a setting of these tables; how to measure one, if none is."""
    settings = [(row.paper.setting, own.table, own.profile.device_bytes) for own in found for row in own.rows]
    count = sum(any(paper_costs.is_of(row, *each) for each in settings) for row in rows)
    line = f"{path}: {count} of {len(rows)} rows are of these tables' settings"
    if count:
        return line
    setting, table, _ = settings[0]
    sizes = " ".join(f"--{name}={getattr(setting, name)}" for name in ("model", "batch", "prompt", "new"))
    more = f" --weights=host --groups={setting.groups}" if table.weights == "host" else ""
    return (
        f"{line}; measure some: python experiments/benchmark.py {sizes}{more} --plans=keys_values,kvpr:0.7,activations"
    )


# --- what is printed --------------------------------------------------------------------------------------------------


def steps(found: Found) -> Table:
    """A table of steps, for a terminal: milliseconds a step, or tokens/s of all groups."""
    table = found.table
    many = len(found.models) > 1
    what = "ms a step" if table.unit == "s" else "tokens/s"
    model = "" if many else f"{title(found.models[0])}, "
    out = _table(f"{table.name}: {model}{table.title}, weights on the {table.weights}; {what}")
    out.caption, out.caption_justify = f"from {table.source}", "left"
    if many:
        out.add_column("model", no_wrap=True)
    out.add_column("rows x\nprompt + new", no_wrap=True)
    columns = [column for column in _columns(found) if any(column[1](row) != "-" for row in found.rows)]
    for heading, _ in columns:
        out.add_column(heading, justify="right")
    for row in found.rows:
        setting = row.paper.setting
        names = [title(setting.model), str(setting)] if many else [str(setting)]
        out.add_row(*names, *(cell(row) for _, cell in columns))
    return out


def _columns(found: Found) -> list[Column]:
    """All that there may be: what the paper says, what is predicted, and what was measured."""
    table = found.table

    def of(place: Place, plan: str, row: Row) -> str:
        times = row.predicted.times if place == "predicted" else row.measured
        return _cell(table, row.paper.setting, times.get(plan), None if plan == BASELINE else times.get(BASELINE))

    def baseline(row: Row) -> str:
        return _cell(table, row.paper.setting, row.paper.baseline)

    def kvpr(row: Row) -> str:
        return _cell(table, row.paper.setting, row.paper.kvpr, row.paper.baseline)

    def unoverlapped(row: Row) -> str:
        return _cell(table, row.paper.setting, row.predicted.times["sum"])

    columns: list[Column] = [(f"paper\n{table.against}", baseline), ("paper\nKVPR", kvpr)]
    columns += [(f"{found.machine}\nsum", unoverlapped)]
    for place in PLACES:
        where = found.machine if place == "predicted" else "here"
        if place == "measured" and table.peer:
            columns.append((f"{where}\n{table.against}", functools.partial(of, place, table.peer)))
        columns += [(f"{where}\n{name}", functools.partial(of, place, plan)) for plan, name in COLUMNS.items()]
        if place == "predicted":
            columns.append((f"{where}\nl/s", lambda row: f"{row.predicted.split:.2f}"))
    return columns


def _cell(table: PaperTable, setting: Setting, milliseconds: float | None, base: float | None = None) -> str:
    """A number of three digits, and its gain below it."""
    if milliseconds is None:
        return "-"
    value = milliseconds if table.unit == "s" else 1e3 * setting.groups * setting.batch / milliseconds
    number, gain = f"{value:.0f}" if value >= 100 else f"{value:#.3g}", table.gain(base, milliseconds)
    if gain is None:
        return number
    change = round(-gain if table.unit == "s" else gain)
    return f"{number}\n{change:+d} %"


def layers(paper: Paper) -> Table:
    """Table 1: a layer's keys and values, by the paper and by its formula; and the formula's split."""
    data = paper.data["layers"]
    machine, tokens = paper.machine(data["machine"]), data["batch"] * data["tokens"]
    sizes = f"{data['batch']} x {data['tokens']}"
    out = _table(
        f"{data['source']}: a layer, {sizes} cached tokens; formula: equations 6 to 11 at {data['machine']}'s rates"
    )
    out.add_column("model")
    for heading in ("MiB", "copy, ms", "recompute, ms"):
        out.add_column(f"paper\n{heading}", justify="right")
        out.add_column(f"formula\n{heading}", justify="right")
    out.add_column("formula\nl/s", justify="right")
    for row in records(data):
        setting = Setting(row["model"], data["batch"], 1, data["tokens"], 1)
        size = 2 * tokens * row["hidden"] * setting.shape.itemsize
        computing = 4 * tokens * row["hidden"] ** 2 / machine.matmul_rate
        split = kvpr_split(machine, setting.shape, setting.work) / setting.cached
        pairs = [
            (f"{row['cache_mb']}", f"{size / 2**20:.0f}"),
            (f"{row['link_ms']}", f"{1e3 * size / machine.beside_compute:.1f}"),
            (f"{row['compute_ms']:.3f}", f"{1e3 * computing:.2f}"),
        ]
        out.add_row(title(row["model"]), *(cell for pair in pairs for cell in pair), f"{split:.2f}")
    return out


def summed_up(found: Sequence[Found]) -> Table:
    """The gains of all tables."""
    out = _table("Gains")
    lines = paper_costs.summary(found)
    for key in (shown := [key for key in lines[0] if any(line[key] != "-" for line in lines)]):
        out.add_column(key.replace(", ", "\n").replace("`", ""), overflow="fold")
    for line in lines:
        out.add_row(*(line[key] for key in shown))
    return out


def _table(name: str) -> Table:
    return Table(title=name, box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)


def show(paper: Paper, found: Sequence[Found], said: Sequence[Note], results: Sequence[str]) -> None:
    """Prints all of it."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    say = functools.partial(console.print, highlight=False, markup=False)
    say(paper.data["paper"])
    for name, own in {each.machine: each.profile for each in found}.items():
        rates = f"link {own.beside_compute / 1e9:.3g} GB/s, {own.matmul_rate / 1e12:.3g} TFLOP/s"
        say(f"{name}: {own.device}, {rates}; {own.source}")
    devices = dict.fromkeys(device for each in found for device in each.devices)
    if devices:
        say(f"here: {tables.listed(devices)}")
    for line in results:
        say(line, soft_wrap=True)
    say(LEGEND)
    console.print(layers(paper))
    for each in found:
        console.print(steps(each))
    console.print(summed_up(found))
    say("Where the paper's numbers, its formula and the predictions disagree:")
    for note in said:
        say(f"- {note.place[0].upper()}{note.place[1:]}: {note.text}")
    drawn = ", ".join(paper.data["only_drawn"])
    say(f"Only drawn in the paper, so not here: {drawn}. Numbers read off a figure go into paper.json.")


def document(paper: Paper, found: Sequence[Found], said: Sequence[Note]) -> dict[str, Any]:
    """All of it as plain data; times are milliseconds a step."""
    return run_info() | {
        "paper": paper.data["paper"],
        "layers": records(paper.data["layers"]),
        "tables": [
            {
                "name": own.table.name,
                "source": own.table.source,
                "weights": own.table.weights,
                "against": own.table.against,
                "hardware": own.profile.device,
                "measured_on": list(own.devices),
                "rows": [_record(row) for row in own.rows],
            }
            for own in found
        ],
        "gains": paper_costs.summary(found),
        "notes": [{"place": note.place, "text": note.text} for note in said],
        "only_drawn": paper.data["only_drawn"],
    }


def _record(row: Row) -> dict[str, Any]:
    plan = row.predicted.ours
    return {
        **{name: getattr(row.paper.setting, name) for name in ("model", "batch", "groups", "prompt", "new")},
        "paper_ms": {"baseline": row.paper.baseline, "kvpr": row.paper.kvpr},
        "predicted_ms": row.predicted.times,
        "measured_ms": row.measured,
        "split": row.predicted.split,
        "formula_split": row.predicted.formula,
        "ours": plan and {
            "plan": plan.name,
            "weights_in_host": sum(layer.weights == "host" for layer in plan.layers) / len(plan.layers),
            "link_bytes": plan.link_bytes(),
        },
    }  # fmt: skip


# --- the command ------------------------------------------------------------------------------------------------------


def main(_: Sequence[str], given: flags.FlagValues = flags.FLAGS) -> None:
    """Unpacks the flags."""
    paper = read()
    asked = chosen(paper, given.tables)
    files = {path: tables.read_file(path) for path in given.results}
    profile = None if given.hardware is None else read_hardware(given.hardware)
    found = [paper_costs.predict(paper, own, given.hardware, profile) for own in asked]
    lines = [about(path, rows, found) for path, rows in files.items()]
    found = [paper_costs.measured(own, [row for rows in files.values() for row in rows]) for own in found]
    said = paper_notes.notes(paper, found)
    show(paper, found, said, lines)
    if given.json:
        print(json.dumps(document(paper, found, said)))


if __name__ == "__main__":
    define_flags()
    script.run(main)
