"""The paper KVPR, recomputed: a table for each of its tables, and where its numbers and its formula disagree.

    python experiments/reproduce_paper.py
    python experiments/reproduce_paper.py --measured=experiments/results/h100_suite.json,other.json
    python experiments/reproduce_paper.py --tables="Table 3,Table 4" --hardware=h200
    python experiments/reproduce_paper.py --out=experiments/results/paper.json      what experiments/readme.py takes

A row has the paper's numbers, the cost function's for the paper's machine by its data sheet, and those that were
measured, each with its gain. Nothing is generated, and no device is needed; all tables take a minute. The paper's
numbers are in experiments/support/paper/paper.json.
"""

import functools
from collections.abc import Sequence

from experiments.plan import THIS, read_hardware
from experiments.support import script
from experiments.support.paper import costs, report
from experiments.support.paper.numbers import Paper, Table, read
from experiments.support.results import tables, terminal
from experiments.support.results.report import run_info

from absl import flags

from kvrecomp.files import check_writable, write_json
from kvrecomp.predict.datasheets import DATASHEETS

LEGEND = (
    "In brackets are gains: the paper's over its baseline, others over keys_values. keys_values: all keys and values "
    "from host memory, copied under compute, or without overlap; KVPR: the paper's schedule at its best split (l/s); "
    "activations: all of them, absorbed; ours: what is chosen within the device memory, packed where that is faster."
)


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.list("measured", [], "Results files of experiments/benchmark.py, to show rows of the same settings beside.")
    define.list("tables", [], "The paper's tables of steps, by name; default: all.")
    sheets = ", ".join(DATASHEETS)
    define.string("hardware", None, f"Predict for another machine: this, which is measured, or a data sheet: {sheets}.")
    define.string("out", None, "Write the JSON document to this file.")


def chosen(paper: Paper, names: Sequence[str]) -> list[Table]:
    """The tables of these names, all of them where there is none. Raises ValueError for others."""
    known = {table.name.lower(): table for table in paper.tables}
    for name in names:
        if name.strip().lower() not in known:
            there = ", ".join(table.name for table in paper.tables)
            raise ValueError(f"--tables has {name!r}; the paper's tables of steps are {there}")
    return [known[name] for name in dict.fromkeys(name.strip().lower() for name in names) or known]


def show(paper: Paper, compared: Sequence[Table], results: Sequence[tables.Row]) -> None:
    """Prints all of it."""
    console = terminal.standard_output()
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(paper.data["paper"])
    for name, profile in {table.machine: table.profile for table in compared}.items():
        rates = f"link {profile.beside_compute / 1e9:.3g} GB/s, {profile.matmul_rate / 1e12:.3g} TFLOP/s"
        say(f"{name}: {profile.device}, {rates}; {profile.source}")
    devices = dict.fromkeys(device for table in compared for device in table.devices)
    if devices:
        say(f"measured on: {tables.listed(devices)}")
    elif results:
        say("no result is of these tables' settings: experiments/suite.py --only=kvpr,batches,weights measures some")
    machine = paper.data["layers"]["machine"]
    shown = {f"Table 1: a layer; formula: equations 6 to 11 at {machine}'s rates": report.layers(paper)}
    shown |= {report.heading(table): report.steps(table) for table in compared}
    shown |= {"Gains": report.gains(compared)}
    shown |= {"Where the paper's numbers and its formula disagree": report.disagreeing(paper)}
    say(LEGEND)
    for title, table in shown.items():
        say(f"\n{title}")
        terminal.show(console, table)
    drawn = ", ".join(paper.data["only_drawn"])
    say(f"Only drawn in the paper, so not here: {drawn}. Numbers read off a figure go into paper.json.")


def main(given: flags.FlagValues) -> None:
    paper = read()
    asked = chosen(paper, given.tables)
    if given.out:
        check_writable(given.out)
    if given.hardware != THIS:
        script.use_no_device()
    profile = None if given.hardware is None else read_hardware(given.hardware)
    compared = [costs.predict(table, given.hardware or table.machine, profile or table.profile) for table in asked]
    results = [row for path in given.measured for row in tables.read_file(path)]
    compared = [costs.measured(table, results) for table in compared]
    show(paper, compared, results)
    if given.out:
        write_json(given.out, run_info() | {"tables": [costs.record(table) for table in compared]})


if __name__ == "__main__":
    script.run(main, define_flags)
