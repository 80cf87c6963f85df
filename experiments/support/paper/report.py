"""The paper KVPR beside what was predicted and measured, as Markdown tables."""

import functools
import operator
from collections.abc import Callable, Sequence

from experiments.support.paper.costs import formula_gain, kept, measured
from experiments.support.paper.numbers import BASELINES, Paper, Row, Setting, Source, Table, read, records
from experiments.support.results import tables
from experiments.support.results.predictions import ends, title

from kvrecomp.plan import AUTO
from kvrecomp.predict.kvpr import kvpr_split

GAINING = {"kvpr": "KVPR", "activations": "`activations`", AUTO: "ours"}
PLANS = {"keys_values": "`keys_values`", **GAINING}
SUMMED_UP = ("Table 3", "Table 4", "Table 5", "Figure 6 (sequences)")  # the paper's results


def steps(table: Table) -> str:
    """A table of steps: milliseconds a step, or tokens/s of all groups, each with its gain."""
    against = table.against
    plans: dict[Source, dict[str, str]] = {
        "paper": {"baseline": against, "kvpr": "KVPR"},
        "predicted": {"sum": "no overlap", **PLANS},
        "measured": {table.peer: against, **PLANS},
    }
    columns = [
        ("model", lambda row: title(row.setting.model)),
        ("rows x prompt + new", lambda row: str(row.setting)),
        ("l/s", lambda row: f"{row.split:.2f}"),
    ]
    for source, labels in plans.items():
        for plan, label in labels.items():
            columns.append((f"{label}, {source}", functools.partial(_cell, table, source, plan)))
    return _without_empty(table.rows, columns)


def _cell(table: Table, source: Source, plan: str, row: Row) -> str:
    """A number of three digits, and its gain."""
    milliseconds = row.times[source].get(plan)
    if milliseconds is None:
        return "-"
    in_time = table.unit == "s"
    value = milliseconds if in_time else 1e3 * row.setting.groups * row.setting.batch / milliseconds
    number = f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
    gain = None if plan == BASELINES[source] else table.gain_of(row, source, plan)
    return number if gain is None else f"{number} ({round(-gain if in_time else gain):+d} %)"


def heading(table: Table) -> str:
    """What `steps` are of."""
    unit = "ms a step" if table.unit == "s" else "tokens/s"
    return f"{table.name}: {table.title}, weights on the {table.weights}, {unit}; predicted for {table.machine}"


def gains(compared: Sequence[Table]) -> str:
    """A line a table and model: the paper's gains, what its formula allows, and the gains predicted and measured."""

    def stated(table: Table, model: str) -> str:
        most = table.most_percent.get(model)
        return f"up to {most:.0f}" if most else _span(table.gains(model, "paper", "kvpr"))

    def allowed(table: Table, model: str) -> str:
        return _span([formula_gain(table, row.setting) for row in table.rows if row.setting.model == model])

    columns = [
        ("paper", lambda line: line[0].name),
        ("model", lambda line: title(line[1])),
        ("against", lambda line: line[0].against),
        ("gain", lambda line: line[0].gained),
        ("KVPR, paper", lambda line: stated(*line)),
        ("its formula", lambda line: allowed(*line)),
    ]
    for source in ("predicted", "measured"):
        for plan, name in GAINING.items():
            cell = functools.partial(_gains_of, source, plan)
            columns.append((f"{name}, {source}", cell))
    return _without_empty([(table, model) for table in compared for model in table.models], columns)


def _gains_of(source: Source, plan: str, line: tuple[Table, str]) -> str:
    table, model = line
    return _span(table.gains(model, source, plan))


def _span(values: Sequence[float]) -> str:
    """From the least to the greatest, in whole percents."""
    return ends(values, lambda value: (str(round(value)), "")) if values else "-"


def _without_empty(rows: Sequence, columns: Sequence[tuple[str, Callable]]) -> str:
    """A table of those columns that have anything in them."""
    return tables.table(rows, *(column for column in columns if any(column[1](row) != "-" for row in rows)))


def layers(paper: Paper) -> str:
    """Table 1: a layer's keys and values, by the paper and by its formula, and the formula's split."""
    data = paper.data["layers"]
    machine, tokens = paper.machines[data["machine"]], data["batch"] * data["tokens"]

    def split(row: dict) -> str:
        setting = Setting(row["model"], data["batch"], 1, data["tokens"], 1)
        return f"{kvpr_split(machine, setting.shape, setting.middle) / setting.cached:.2f}"

    return tables.table(
        records(data),
        ("model", lambda row: title(row["model"])),
        ("copy, paper, ms", lambda row: f"{row['link_ms']}"),
        ("copy, formula, ms", lambda row: f"{4e3 * tokens * row['hidden'] / machine.beside_compute:.1f}"),
        ("recompute, paper, ms", lambda row: f"{row['compute_ms']:.3f}"),
        ("recompute, formula, ms", lambda row: f"{4e3 * tokens * row['hidden'] ** 2 / machine.matmul_rate:.2f}"),
        ("l/s, formula", split),
    )


def disagreeing(paper: Paper) -> str:
    """Where the paper's numbers disagree with its own formula and text, beside its table 1."""
    data = paper.data["disagreements"]
    return tables.table(records(data), *((heading, operator.itemgetter(heading)) for heading in data["columns"]))


# --- for pages, of results and the predictions that are kept ----------------------------------------------------------


def all_gains(results: Sequence[tables.Row]) -> str:
    """The gains of SUMMED_UP."""
    return gains(_compare(results, SUMMED_UP))


def all_steps(results: Sequence[tables.Row]) -> str:
    """The tables of steps of SUMMED_UP, and of small batches."""
    compared = _compare(results, ("Table 2", *SUMMED_UP))
    return "\n\n".join(f"**{heading(table)}.**\n\n{steps(table)}" for table in compared)


def _compare(results: Sequence[tables.Row], names: Sequence[str]) -> list[Table]:
    paper = read()
    return [measured(kept(paper.table(name)), results) for name in names]
