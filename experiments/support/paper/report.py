"""The paper KVPR beside what was predicted and measured, as Markdown tables."""

import functools
import operator
from collections.abc import Callable, Sequence

from experiments.support.paper.costs import BASELINE, SOURCES, Compared, Row, Times, formula_gain, kept, measured
from experiments.support.paper.disagreements import markdown
from experiments.support.paper.numbers import Paper, PaperTable, Setting, read, records
from experiments.support.results import tables
from experiments.support.results.predictions import between, title
from kvrecomp.plan import AUTO
from kvrecomp.predict.cost import kvpr_split

PLANS = {BASELINE: "`keys_values`", "kvpr": "KVPR", "activations": "`activations`", AUTO: "ours"}
SUMMED_UP = ("Table 3", "Table 4", "Table 5", "Figure 6 (sequences)")  # the paper's results


def steps(compared: Compared) -> str:
    """A table of steps: milliseconds a step, or tokens/s of all groups, each with its gain."""
    table = compared.table
    columns = [
        ("model", lambda row: title(row.setting.model)),
        ("rows x prompt + new", lambda row: str(row.setting)),
        (f"{table.against}, paper", lambda row: _cell(table, row.setting, row.paper.baseline)),
        ("KVPR, paper", lambda row: _cell(table, row.setting, row.paper.kvpr, row.paper.baseline)),
        ("no overlap, predicted", lambda row: _cell(table, row.setting, row.predicted.times["sum"])),
        *((f"{label}, predicted", functools.partial(_predicted, table, plan)) for plan, label in PLANS.items()),
        ("l/s", lambda row: f"{row.predicted.split:.2f}"),
        (f"{table.against}, measured", functools.partial(_measured, table, table.peer)),
        *((f"{label}, measured", functools.partial(_measured, table, plan)) for plan, label in PLANS.items()),
    ]
    return _without_empty(compared.rows, columns)


def _predicted(table: PaperTable, plan: str, row: Row) -> str:
    return _of_plan(table, row.setting, plan, row.predicted.times)


def _measured(table: PaperTable, plan: str, row: Row) -> str:
    return _of_plan(table, row.setting, plan, row.measured)


def _of_plan(table: PaperTable, setting: Setting, plan: str, times: Times) -> str:
    return _cell(table, setting, times.get(plan), None if plan == BASELINE else times.get(BASELINE))


def _cell(table: PaperTable, setting: Setting, milliseconds: float | None, base: float | None = None) -> str:
    """A number of three digits, and its gain."""
    if milliseconds is None:
        return "-"
    value = milliseconds if table.unit == "s" else 1e3 * setting.groups * setting.batch / milliseconds
    number, gain = f"{value:.0f}" if value >= 100 else f"{value:#.3g}", table.gain(base, milliseconds)
    return number if gain is None else f"{number} ({round(-gain if table.unit == 's' else gain):+d} %)"


def heading(compared: Compared) -> str:
    """What `steps` are of."""
    table = compared.table
    unit = "ms a step" if table.unit == "s" else "tokens/s"
    return f"{table.name}: {table.title}, weights on the {table.weights}, {unit}; predicted for {compared.machine}"


def summary(compared: Sequence[Compared]) -> list[dict[str, str]]:
    """A line a table and model: the paper's gains, what its formula allows, and the gains predicted and measured."""
    lines = []
    for found in compared:
        table = found.table
        for model in found.models:
            most = table.most_percent.get(model)
            line = {
                "paper": table.name,
                "model": title(model),
                "against": table.against,
                "gain": table.gained,
                "KVPR, paper": f"up to {most:.0f}" if most else _span(found.said(model)),
                "its formula": _span([formula_gain(found.profile, table, row.setting) for row in found.of(model)]),
            }
            for source in SOURCES:
                for plan in ("kvpr", "activations", AUTO):
                    line[f"{PLANS[plan]}, {source}"] = _span(found.gains(model, source, plan))
            lines.append(line)
    return lines


def gains(compared: Sequence[Compared]) -> str:
    """The summary as a table."""
    lines = summary(compared)
    return _without_empty(lines, [(key, operator.itemgetter(key)) for key in lines[0]])


def _span(values: Sequence[float]) -> str:
    """From the least to the greatest, in whole percents."""
    return between(*((str(round(end(values))), "") for end in (min, max))) if values else "-"


def _without_empty(rows: Sequence, columns: Sequence[tuple[str, Callable]]) -> str:
    """A table of those columns that have anything in them."""
    return tables.table(rows, *(column for column in columns if any(column[1](row) != "-" for row in rows)))


def layers(paper: Paper) -> str:
    """Table 1: a layer's keys and values, by the paper and by its formula, and the formula's split."""
    data = paper.data["layers"]
    machine, tokens = paper.machine(data["machine"]), data["batch"] * data["tokens"]

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


# --- for pages, of results and the predictions that are kept ----------------------------------------------------------


def _all(results: Sequence[tables.Row], names: Sequence[str]) -> list[Compared]:
    paper = read()
    return [measured(kept(paper, name), results) for name in names]


def page_gains(results: Sequence[tables.Row]) -> str:
    """The gains of SUMMED_UP."""
    return gains(_all(results, SUMMED_UP))


def page_steps(results: Sequence[tables.Row]) -> str:
    """The tables of steps that the paper gives in numbers."""
    given = [table.name for table in read().tables if any(row.kvpr for row in table.rows)]
    return "\n\n".join(f"{heading(table)}.\n\n{steps(table)}" for table in _all(results, given))


def page_layers(_: Sequence[tables.Row]) -> str:
    """Its table 1, of no results."""
    return layers(read())


def page_disagreements(_: Sequence[tables.Row]) -> str:
    """Of no results."""
    return markdown(read())


def page_rates(results: Sequence[tables.Row]) -> str:
    """The tokens a second that are predicted for the paper's machine in the setting of which these results are.

    Raises ValueError where they are of none, or of several.
    """
    found = [row for table in _all(results, SUMMED_UP) for row in table.rows if row.measured]
    if len(found) != 1:
        raise ValueError(f"the rows are of {len(found)} settings of {', '.join(SUMMED_UP)}; expected one")
    (row,) = found
    tokens = 1e3 * row.setting.batch * row.setting.groups
    pairs, kvpr, ours = (f"{tokens / row.predicted.times[plan]:.0f}" for plan in (BASELINE, "kvpr", AUTO))
    return f"{pairs} tokens a second for keys and values, {kvpr} for KVPR's schedule and {ours} for ours"
