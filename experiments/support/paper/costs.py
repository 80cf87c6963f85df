"""What the cost function predicts for the settings of the paper KVPR, and what was measured of them.

paper = read()
found = predict(paper, paper.table("Table 3"))
found = measured(found, tables.read_file("experiments/results/h200_suite.json"))
print(summary([found]))

A prediction is of the step in the middle of the generation, when the prompt and half of the new tokens are cached: what
the paper gives are averages over all steps.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from experiments.support.paper.numbers.numbers import Paper, PaperRow, PaperTable, Setting, read
from experiments.support.results import predictions, tables
from kvrecomp.plan import AUTO, GIB, Memory, Plan, PlanError, Workload
from kvrecomp.plan.named import named_plan, with_host_weights
from kvrecomp.predict import scheduler
from kvrecomp.predict.cost import mean_costs, plan_costs
from kvrecomp.predict.hardware import HardwareProfile
from kvrecomp.predict.kvpr import kvpr_seconds, kvpr_split

# The splits that KVPR's schedule is predicted at: evenly spaced, and at and below that of its formula, which leaves
# attention out. With the other plans of a setting they are 16, one compilation.
EVEN, NEAR = 8, (0.92, 0.94, 0.96, 0.98, 1.0)
WHOLE = 64 * GIB  # a window in which each run of tokens is one block, as the paper copies them
BASELINE = "keys_values"  # what gains that are predicted or measured are counted from
SUMMED_UP = ("Table 3", "Table 4", "Table 5", "Figure 6 (sequences)")  # the paper's results, in the README

Place = Literal["predicted", "measured"]
PLACES: tuple[Place, ...] = get_args(Place)
Times = dict[str, float]  # milliseconds a step by plan: those by name, `kvpr` at its best split, and AUTO for ours


# --- predictions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicted:
    """Milliseconds a step by plan; `sum` is that of BASELINE without any overlap.

    `split` is the fraction of the cached tokens that KVPR's schedule recomputes at its best, `formula` the same by
    KVPR's own formula. `ours` is the plan of AUTO, None where nothing fits in the machine's memory.
    """

    times: Times
    split: float
    formula: float
    ours: Plan | None = None


@dataclass(frozen=True)
class Row:
    """A row of the paper with what was predicted for it, and what was measured, if it was."""

    paper: PaperRow
    predicted: Predicted
    measured: Times = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A table of the paper, recomputed for a machine, by its name and profile."""

    table: PaperTable
    machine: str
    profile: HardwareProfile
    rows: tuple[Row, ...]
    devices: tuple[str, ...] = ()  # that were measured

    @property
    def models(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys(row.paper.setting.model for row in self.rows))

    def of(self, model: str) -> list[Row]:
        """The model's rows."""
        return [row for row in self.rows if row.paper.setting.model == model]

    def said(self, model: str) -> list[float]:
        """The paper's gains in percent, of the rows that have both numbers."""
        gains = [self.table.gain(row.paper.baseline, row.paper.kvpr) for row in self.of(model)]
        return [gain for gain in gains if gain is not None]

    def gains(self, model: str, place: Place, plan: str) -> list[float]:
        """Gains of a plan over BASELINE in percent, of the rows that have both."""
        times = [row.predicted.times if place == "predicted" else row.measured for row in self.of(model)]
        gains = [self.table.gain(own.get(BASELINE), own.get(plan)) for own in times]
        return [gain for gain in gains if gain is not None]


def predict(
    paper: Paper, table: PaperTable, machine: str | None = None, profile: HardwareProfile | None = None
) -> Found:
    """The table's rows, each predicted for the machine; default: the paper's own."""
    profile = profile or paper.machine(table.machine)
    rows = []
    for row in table.rows:
        predicted = by_name(row.setting, table.weights, profile)
        plan, milliseconds = ours(row.setting, table.weights, profile)
        times = predicted.times if milliseconds is None else predicted.times | {AUTO: milliseconds}
        rows.append(Row(row, dataclasses.replace(predicted, times=times, ours=plan)))
    return Found(table, machine or table.machine, profile, tuple(rows))


def by_name(setting: Setting, weights: Memory, profile: HardwareProfile) -> Predicted:
    """The plans by name, all of whose cache is in host memory, whether they fit or not."""
    shape, work = setting.shape, setting.work
    by_formula = kvpr_split(profile, shape, work) / work.prompt
    splits = sorted({*(step / EVEN for step in range(EVEN + 1)), *(part * by_formula for part in NEAR)})
    named = [named_plan(name, shape, work) for name in (BASELINE, "activations")]
    kvpr = [named_plan(f"kvpr:{split!r}", shape, work, window=WHOLE) for split in splits]
    plans = [placed(plan, setting, 1.0 if weights == "host" else 0.0) for plan in (*named, *kvpr)]
    costs = plan_costs(profile, plans, 0)
    baseline, activations, *others = (1e3 * float(seconds) for seconds in costs.seconds)
    times = {
        "sum": 1e3 * float(costs.copying[0] + costs.computing[0]),
        BASELINE: baseline,
        "kvpr": min(others),
        "activations": activations,
    }
    return Predicted(times, splits[others.index(times["kvpr"])], by_formula)


def ours(setting: Setting, weights: Memory, profile: HardwareProfile) -> tuple[Plan | None, float | None]:
    """The scheduler's plan for the setting within the machine's memory, and its milliseconds a step; None where nothing
    fits. Where the paper has the weights in host memory, the plan has as many there as it takes."""
    work = Workload(setting.batch, setting.prompt, setting.new)
    there = ["device"] * len(setting.shape.layers) if weights == "device" else None
    try:
        plan = scheduler.make_plan(setting.shape, work, profile, weights=there, groups=setting.groups)
    except PlanError:
        return None, None
    return plan, 1e3 * float(mean_costs(profile, [plan]).seconds[0])


def placed(plan: Plan, setting: Setting, fraction: float) -> Plan:
    """The plan in the setting's groups, with the weights of that fraction of the layers in host memory."""
    plan = with_host_weights(plan, fraction) if fraction else plan
    return dataclasses.replace(plan, groups=setting.groups, order="column" if setting.groups > 1 else "row")


def formula_gain(profile: HardwareProfile, table: PaperTable, setting: Setting) -> float:
    """What KVPR's formula gains over sending all keys and values at its own best split, in percent."""
    tokens = kvpr_split(profile, setting.shape, setting.work)
    whole, best = (kvpr_seconds(profile, setting.shape, setting.work, recomputed) for recomputed in (0, tokens))
    gain = table.gain(whole, best)
    assert gain is not None
    return gain


# --- what was measured ------------------------------------------------------------------------------------------------


def measured(found: Found, rows: Iterable[tables.Row]) -> Found:
    """The table with the times of these rows of results files (`tables.read_file`) that are of its settings.

    Of several rows of a plan the fastest counts, and the best split of KVPR's schedule.
    """
    rows, devices, own = list(rows), [], []
    for row in found.rows:
        times: Times = {}
        for result in rows:
            if is_of(result, row.paper.setting, found.table, found.profile.device_bytes):
                plan = str(result.get("plan"))
                plan = "kvpr" if plan.startswith("kvpr:") else plan
                times[plan] = min(times.get(plan, math.inf), result["median_ms"])
                devices.append(str(result.get("device")))
        own.append(dataclasses.replace(row, measured=times))
    return dataclasses.replace(found, rows=tuple(own), devices=tuple(dict.fromkeys(devices)))


def is_of(result: tables.Row, setting: Setting, table: PaperTable, device_bytes: float) -> bool:
    """Whether a result is of that work. What chooses for itself, and peers, may have the weights anywhere; but what
    chooses must have had as much device memory to choose with, within a tenth, as the machine of the table."""
    sizes = all(result.get(name) == getattr(setting, name) for name in ("model", "batch", "prompt", "new"))
    if result.get("plan") in (AUTO, table.peer):
        given = result.get("device_budget") or 0.0
        fair = result.get("plan") == table.peer or abs(given / device_bytes - 1) <= 0.1
        return fair and sizes and (result.get("groups") or 1) == setting.groups
    groups, order = result.get("groups") or 1, result.get("order") or "row"
    same = groups == setting.groups and (groups == 1 or order == "column")
    return sizes and same and (result.get("weights") or "device") == table.weights


# --- in a few lines ---------------------------------------------------------------------------------------------------


def summary(found: Sequence[Found]) -> list[dict[str, str]]:
    """A line a table and model: the paper's gains, what its formula allows, and the gains predicted and measured."""
    lines = []
    for own in found:
        for model in own.models:
            most = own.table.most.get(model)
            limits = [formula_gain(own.profile, own.table, row.paper.setting) for row in own.of(model)]
            line = {
                "paper": own.table.name,
                "model": predictions.title(model),
                "against": own.table.against,
                "gain": own.table.gained,
                "KVPR, paper": f"up to {most:.0f}" if most else _span(own.said(model)),
                "its formula": _span(limits),
            }
            for place in PLACES:
                for plan, name in (("kvpr", "KVPR"), ("activations", "`activations`"), (AUTO, "ours")):
                    line[f"{name}, {place}"] = _span(own.gains(model, place, plan))
            lines.append(line)
    return lines


def _span(gains: Sequence[float]) -> str:
    """From the least to the greatest, in whole percents."""
    if not gains:
        return "-"
    return predictions.between(*((str(round(end(gains))), "") for end in (min, max)))


def markdown(rows: Sequence[tables.Row]) -> str:
    """The summary as a table for the README, on the paper's machines, with what these results say of its settings."""
    paper = read()
    lines = summary([measured(predict(paper, paper.table(name)), rows) for name in SUMMED_UP])
    shown = [key for key in lines[0] if any(line[key] != "-" for line in lines)]
    return tables.table(lines, *((key, lambda line, key=key: line[key]) for key in shown))


def rates(rows: Sequence[tables.Row]) -> str:
    """The tokens a second that are predicted for the paper's machine in the setting of which these results are.

    Raises ValueError where they are of none, or of several.
    """
    paper, found = read(), []
    for table in map(paper.table, SUMMED_UP):
        device_bytes = paper.machine(table.machine).device_bytes
        for row in table.rows:
            if any(is_of(result, row.setting, table, device_bytes) for result in rows):
                found.append(dataclasses.replace(table, rows=(row,)))
    if len(found) != 1:
        raise ValueError(f"the rows are of {len(found)} settings of {', '.join(SUMMED_UP)}; expected one")
    (row,) = predict(paper, found[0]).rows
    tokens = 1e3 * row.paper.setting.batch * row.paper.setting.groups
    pairs, kvpr, own = (f"{tokens / row.predicted.times[plan]:.0f}" for plan in (BASELINE, "kvpr", AUTO))
    return f"{pairs} tokens a second for keys and values, {kvpr} for KVPR's schedule and {own} for ours"
