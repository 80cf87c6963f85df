"""What the cost function predicts for the settings of the paper KVPR, and what was measured of them.

paper = read()
table = predict(paper.table("Table 3"), "a100", paper.machine("a100"))    # takes a second a row; or, as it was kept,
table = kept(paper.table("Table 3"))
table = measured(table, tables.read_file("experiments/results/h100_suite.json"))
table.gains("opt-6.7b", "measured", "activations")

A prediction is of the step in the middle of the generation, when the prompt and half of the new tokens are cached: what
the paper gives are averages over all steps.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.support.paper.numbers import Row, Setting, Source, Table, Times
from experiments.support.results import tables

from kvrecomp.plan import AUTO, GIB, Memory, Plan, PlanError, Workload
from kvrecomp.plan.named import named_plan, with_host_weights
from kvrecomp.predict import scheduler
from kvrecomp.predict.cost import mean_costs, plan_costs
from kvrecomp.predict.hardware import HardwareProfile
from kvrecomp.predict.kvpr import kvpr_seconds, kvpr_split

KEPT = Path(__file__).parent.parent.parent / "results" / "paper.json"  # predictions for the paper's own machines

# The splits that KVPR's schedule is predicted at: evenly spaced, and at and below that of its formula, which leaves
# attention out. With the other plans of a setting they are 16, one compilation.
EVEN, NEAR = 8, (0.92, 0.94, 0.96, 0.98, 1.0)
WHOLE = 64 * GIB  # a window in which each run of tokens is one block, as the paper copies them

SETTING_FIELDS = [field.name for field in dataclasses.fields(Setting)]


# --- predictions ------------------------------------------------------------------------------------------------------


def predict(table: Table, machine: str, profile: HardwareProfile) -> Table:
    """The table with its rows predicted for the machine."""
    rows = tuple(_predict(row, table.weights, profile) for row in table.rows)
    return dataclasses.replace(table, machine=machine, profile=profile, rows=rows)


def _predict(row: Row, weights: Memory, profile: HardwareProfile) -> Row:
    times, split = by_name(row.setting, weights, profile)
    plan, ours = best_plan(row.setting, weights, profile), None
    if plan is not None:
        times[AUTO] = 1e3 * float(mean_costs(profile, [plan]).seconds[0])
        hosted = sum(layer.weights == "host" for layer in plan.layers) / len(plan.layers)
        ours = {"plan": plan.name, "weights_in_host": hosted, "link_bytes": plan.link_bytes()}
    return Row(row.setting, {**row.times, "predicted": times}, split, ours)


def by_name(setting: Setting, weights: Memory, profile: HardwareProfile) -> tuple[Times, float]:
    """Of the plans by name, all of whose cache is in host memory, whether they fit or not; and KVPR's best split."""
    shape, workload = setting.shape, setting.middle
    by_formula = kvpr_split(profile, shape, workload) / workload.prompt
    splits = sorted({*(step / EVEN for step in range(EVEN + 1)), *(part * by_formula for part in NEAR)})
    named = [named_plan(name, shape, workload) for name in ("keys_values", "activations")]
    kvpr = [named_plan(f"kvpr:{split!r}", shape, workload, window=WHOLE) for split in splits]
    costs = plan_costs(profile, [_in_groups(plan, setting, weights) for plan in (*named, *kvpr)], 0)
    keys_values, activations, *at_splits = (1e3 * float(seconds) for seconds in costs.seconds)
    best, unoverlapped = min(at_splits), 1e3 * float(costs.copying[0] + costs.computing[0])
    times = {"sum": unoverlapped, "keys_values": keys_values, "kvpr": best, "activations": activations}
    return times, splits[at_splits.index(best)]


def _in_groups(plan: Plan, setting: Setting, weights: Memory) -> Plan:
    """The plan in the setting's groups, with all of its weights in that memory."""
    plan = with_host_weights(plan, 1.0) if weights == "host" else plan
    return dataclasses.replace(plan, groups=setting.groups, order="column" if setting.groups > 1 else "row")


def best_plan(setting: Setting, weights: Memory, profile: HardwareProfile) -> Plan | None:
    """The scheduler's plan for the setting within the machine's memory; None where nothing fits.

    Where the paper has the weights in host memory, the plan has as many there as it takes.
    """
    workload = Workload(setting.batch, setting.prompt, setting.new)
    on_device: list[Memory] = ["device"] * len(setting.shape.layers)
    memories = on_device if weights == "device" else None
    try:
        return scheduler.make_plan(setting.shape, workload, profile, weights=memories, groups=setting.groups)
    except PlanError:
        return None


def formula_gain(table: Table, setting: Setting) -> float:
    """What KVPR's formula gains over sending all keys and values at its own best split, in percent."""
    best = kvpr_split(table.profile, setting.shape, setting.middle)
    nothing, split = (kvpr_seconds(table.profile, setting.shape, setting.middle, tokens) for tokens in (0, best))
    gain = table.gain(nothing, split)
    assert gain is not None
    return gain


# --- predictions in a file --------------------------------------------------------------------------------------------


def record(table: Table) -> dict[str, Any]:
    """A table as JSON has it; times are milliseconds a step."""
    rows = []
    for row in table.rows:
        times = {f"{source}_ms": times for source, times in row.times.items()}
        rows.append({**dataclasses.asdict(row.setting), **times, "split": row.split, "ours": row.ours})
    about = {name: getattr(table, name) for name in ("name", "source", "weights", "against")}
    return {**about, "hardware": table.profile.device, "measured_on": list(table.devices), "rows": rows}


def kept(table: Table) -> Table:
    """The table with the predictions for the paper's own machine that are in KEPT."""
    records = {table["name"]: table["rows"] for table in json.loads(KEPT.read_text(encoding="utf-8"))["tables"]}
    found = {Setting(**{field: row[field] for field in SETTING_FIELDS}): row for row in records[table.name]}
    rows = []
    for row in table.rows:
        then = found[row.setting]
        times: dict[Source, Times] = {**row.times, "predicted": then["predicted_ms"]}
        rows.append(Row(row.setting, times, then["split"], then["ours"]))
    return dataclasses.replace(table, rows=tuple(rows))


# --- what was measured ------------------------------------------------------------------------------------------------


def measured(table: Table, results: Iterable[tables.Row]) -> Table:
    """The table with the times of these rows of results files (`tables.read_file`) that are of its settings.

    Of several rows of a plan the fastest counts, and the best split of KVPR's schedule.
    """
    results, devices, rows = list(results), [], []
    for row in table.rows:
        times: Times = {}
        for result in results:
            if is_of(result, row.setting, table):
                plan = str(result.get("plan"))
                plan = "kvpr" if plan.startswith("kvpr:") else plan
                times[plan] = min(times.get(plan, math.inf), result["median_ms"])
                devices.append(str(result.get("device")))
        rows.append(dataclasses.replace(row, times=row.times | {"measured": times}))
    return dataclasses.replace(table, rows=tuple(rows), devices=tuple(dict.fromkeys(devices)))


def is_of(result: tables.Row, setting: Setting, table: Table) -> bool:
    """Whether a result is of that setting of the table.

    What chooses for itself, and peers, may have the weights anywhere; but what chooses must have had as much device
    memory to choose with, within a tenth, as the machine of the table.
    """
    groups, sizes = result.get("groups") or 1, ("model", "batch", "prompt", "new")
    if any(result.get(name) != getattr(setting, name) for name in sizes) or groups != setting.groups:
        return False
    if result.get("plan") == table.peer:
        return True
    if result.get("plan") == AUTO:
        return abs((result.get("device_budget") or 0.0) / table.profile.device_bytes - 1) <= 0.1
    in_order = groups == 1 or result.get("order") == "column"
    return in_order and (result.get("weights") or "device") == table.weights
