"""Measures single steps under many plans, to check what the cost function predicts and what the scheduler chooses.

    python experiments/sweep.py --models=opt-1.3b,opt-6.7b --batches=1,8,32 --cached=512,1024 --out=predictions.json
    python experiments/sweep.py --rooms=0,25,50,100 --out=choices.json
    python experiments/sweep.py --from=predictions.json --plot=predictions.png

Caches are filled with random numbers rather than by a prefill, since a step's time does not depend on them. Without
`--rooms`, every workload is measured under the six plans of PLANS, predicted and measured side by side. With `--rooms`,
the device may hold so many per cent of the workload's keys and values, and the scheduler's choice is compared with the
best of the plans by hand that fit. Times are medians of up to 31 steps; of steps below 20 ms, of the choices, and of
what is near the best of a room, the least of three such.

A position table shorter than the cached tokens is made longer. `--layers` cuts the models: a step has as many layers
alike, so that plans compare as in the whole model, and less memory is needed. Leave as many that a step takes some
milliseconds, longer than the host takes to launch it. The results are written after every workload: killed, the same
command goes on, and another one at the same commit adds to them. With `--from`, nothing is measured: results are read,
and said and drawn together.
"""

import dataclasses
import gc
import itertools
import json
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

import kvrecomp
import models
from experiments.support import script
from experiments.support.plots import png
from experiments.support.results import predictions, tables
from experiments.support.results.predictions import Measured
from experiments.support.results.report import run_info
from experiments.support.suite import machine_lock
from experiments.support.suite.rooms import device_bytes
from experiments.support.suite.step_timing import NEW, step_seconds, with_positions
from kvrecomp.files import write_json
from kvrecomp.plan import (
    DEFAULT_WINDOW,
    GIB,
    Budget,
    Form,
    LayerPlan,
    Memory,
    ModelShape,
    Plan,
    PlanError,
    format_bytes,
)
from kvrecomp.plan.cutting import BLOCKS_PER_WINDOW, cut_runs
from kvrecomp.plan.named import named_plan
from kvrecomp.predict.cost import make_tasks, plan_costs
from kvrecomp.predict.hardware import HardwareProfile
from kvrecomp.run import memory
from kvrecomp.run.programs import side_by_side

# The most host memory first: pinning it takes long, and what is pinned for one plan serves the next.
PLANS = ("keys_values", "split:0.5", "kvpr:0.75", "activations", "recompute", "device:0.5")
COMPARED = (*PLANS, "split:0.25", "split:0.75", "kvpr:0.25", "kvpr:0.5", "kvpr:1", "device")
# What the device holds as far as there is room, and what the rest is, in host memory.
SPLITS_OF_ROOM: tuple[tuple[Form, Form], ...] = (
    ("keys_values", "activations"),
    ("keys_values", "keys_values"),
    ("activations", "activations"),
    ("activations", "keys_values"),
)

# A machine's processor is slow for seconds at times, and launches short steps no faster than that; and so is its link.
# Of the medians of several rounds, all such plans in each, the least counts.
SHORT, AGAIN = 0.02, 2  # seconds; rounds after the first
NEAR = 1.15  # times as long as the best of a room: it may be as good
AND = " && "  # between the commands that a file is of


# --- the sweep --------------------------------------------------------------------------------------------------------


def rivals_within(model: Any, work: kvrecomp.Workload, budget: Budget) -> Iterator[Plan]:
    """Plans by hand that keep to the budget's device memory: those of COMPARED, and four that use it in full."""
    plans = [named_plan(name, model.shape, work, tail=NEW) for name in COMPARED]
    for here, there in SPLITS_OF_ROOM:
        room = max(0.0, (budget.device or 0) - _on_device(_two_forms(model, work, here, there, 0.0)))
        plans.append(_two_forms(model, work, here, there, room))
    distinct: dict[Any, Plan] = {}
    for plan in plans:  # without room two forms are one
        distinct.setdefault(_key(plan), plan)
    return (plan for plan in distinct.values() if _on_device(plan) <= (budget.device or 0))


def _on_device(plan: Plan) -> int:
    """Bytes of device memory that the plan needs."""
    return sum(kvrecomp.memory_needed(plan)["device"].values())


def _two_forms(model: Any, work: kvrecomp.Workload, here: Form, there: Form, room: float) -> Plan:
    """As many tokens in one form as `room` bytes hold on the device, the others in the other form in host memory."""
    own = []
    for layer in model.shape.layers:
        token_bytes = work.batch * layer.width(here) * model.shape.itemsize
        tokens = layer.cached(work.prompt)
        kept = min(tokens, int(room / len(model.shape.layers) / token_bytes))
        runs: list[tuple[Form, Memory, int]] = [(here, "device", kept), (there, "host", tokens - kept)]
        blocks = cut_runs(runs, layer, model.shape, work, DEFAULT_WINDOW // BLOCKS_PER_WINDOW)
        last: Memory = "host" if kept < tokens else "device"
        own.append(LayerPlan(blocks, there if last == "host" else here, (last,)))
    return Plan(f"{here} here, {there} there", model.shape, work, tuple(own), tail=NEW)


def budget_with_room(shape: ModelShape, work: kvrecomp.Workload, percent: float, host: float | None) -> Budget:
    """Device memory with room for so many per cent of the workload's keys and values."""
    hosted, kept = (named_plan(name, shape, work, tail=NEW) for name in ("keys_values", "device"))
    return Budget(device_bytes(hosted, kept, percent), host)


def run(
    configs: Sequence[Any],
    batches: list[int],
    cached: list[int],
    rooms: list[float],
    layers: int | None,
    host: float,
    console: Console,
    before: Sequence[Measured] = (),
) -> Iterator[tuple[HardwareProfile, list[Measured]]]:
    """Measures a workload after the other, but for what was measured `before`, and says by which profile it was
    predicted; what needs more than `host` bytes of pinned memory is left out, and said."""
    for config in configs:
        config = config if layers is None else dataclasses.replace(config, layers=layers)
        left: dict[int, dict[kvrecomp.Workload, list[float]]] = {}  # by batch: workloads and their rooms
        for batch, prompt in itertools.product(sorted(batches, reverse=True), sorted(cached, reverse=True)):
            of = (config.shape.name, layers, batch, prompt)
            there = {row.room for row in before if (row.model, row.layers, row.batch, row.prompt) == of}
            if {*(rooms or [None])} - there:
                work = kvrecomp.Workload(batch, prompt, NEW)
                left.setdefault(batch, {})[work] = [room for room in rooms if room not in there]
        if not left:
            continue
        with machine_lock.shared():
            model = models.create(config)
        for batch, works in left.items():
            started = time.perf_counter()
            with machine_lock.exclusive():
                machine = kvrecomp.profile(model, batch=batch)
            console.print(f"{config.shape.name}, batch {batch}: profile in {time.perf_counter() - started:.0f} s")
            for work, own in works.items():
                rows = measure_workload(model, work, machine, own, host, console)
                yield machine, [dataclasses.replace(row, layers=layers) for row in rows]
        del model
        gc.collect()


def measured_before(path: str | None, about: dict[str, Any]) -> tuple[list[Measured], list[str]]:
    """What the file has already, which is to be added to, and the commands that measured it.

    Raises:
        ValueError: it is no results file, or of another machine, version of jax or commit.
    """
    if path is None or not Path(path).exists():
        return [], []
    tables.check_out(path, "chosen")
    rows = tables.read_file(path)
    for name in ("device", "driver", "jax", "commit"):
        if others := {row.get(name) for row in rows} - {about[name]}:
            raise ValueError(
                f"--out: {path} was measured with {name} {others.pop()}, and this is {about[name]}: "
                "give another file, or remove that one"
            )
    return tables.predicted(rows), [command for row in rows[:1] for command in row["command"].split(AND)]


def measure_workload(
    model: Any, work: kvrecomp.Workload, machine: HardwareProfile, rooms: list[float], host: float, console: Console
) -> list[Measured]:
    """All plans of one workload, each distinct one measured once."""
    wanted: list[tuple[float | None, bool, Plan]] = []  # room, whether chosen, plan
    if not rooms:
        wanted = [(None, False, named_plan(name, model.shape, work, tail=NEW)) for name in PLANS]
    for percent in rooms:
        budget = budget_with_room(model.shape, work, percent, host)
        weights = kvrecomp.weight_memories(model)
        chosen = kvrecomp.make_plan(model.shape, work, machine, budget, weights=weights, tail=NEW)
        wanted.append((percent, True, chosen))
        wanted += [(percent, False, plan) for plan in rivals_within(model, work, budget)]
    decoders: dict[Any, kvrecomp.Decoder] = {}
    for _, _, plan in wanted:
        key = _key(plan)
        needed = kvrecomp.memory_needed(plan)["host"]["blocks"]
        if key not in decoders and needed > host:
            console.print(f"left out: {plan.name}, {plan.shape.name}, {work}: {format_bytes(needed)} of host memory")
        elif key not in decoders:
            try:
                decoders[key] = kvrecomp.Decoder(model, plan, budget=Budget(None, host * 1.01))
            except PlanError as error:
                console.print(f"left out: {plan.name}, {work}: {error}")
    title, started = f"{model.shape.name}, {work}", time.perf_counter()
    with machine_lock.shared():
        side_by_side(lambda decoder: decoder.compile(prefill=False), list(decoders.values()))
    compiled = time.perf_counter()
    with machine_lock.exclusive():
        began = time.perf_counter()
        seconds = {key: step_seconds(decoder) for key, decoder in track(decoders.items(), title, console=console)}
        again = measured_again(seconds, [(room, chosen, _key(plan)) for room, chosen, plan in wanted])
        for _ in range(AGAIN):
            for key in again:
                seconds[key] = min(seconds[key], step_seconds(decoders[key]))
    console.print(
        f"{title}: {len(seconds)} programs, {compiled - started:.0f} s compiling, {began - compiled:.0f} s waiting, "
        f"{time.perf_counter() - began:.0f} s measuring"
    )
    plans = [(percent, chosen, plan) for percent, chosen, plan in wanted if _key(plan) in seconds]
    return [
        Measured(
            model.shape.name,
            work.batch,
            work.prompt,
            work.new,
            plan.name,
            percent,
            1e3 * seconds[_key(plan)],
            1e3 * float(plan_costs(machine, [plan], write_outs=0).seconds[0]),
            plan.bytes_in("host"),
            chosen,
        )
        for percent, chosen, plan in plans
    ]


def measured_again(
    seconds: Mapping[Hashable, float], wanted: Sequence[tuple[float | None, bool, Hashable]]
) -> list[Hashable]:
    """Which programs, of those that took so many seconds, are measured in further rounds; `wanted` has the rooms that
    each is for, and whether it is chosen there."""
    again = {key for key, own in seconds.items() if own < SHORT}
    for room in {room for room, _, _ in wanted if room is not None}:
        own = {key: chosen for other, chosen, key in reversed(wanted) if other == room and key in seconds}
        best = min((seconds[key] for key in own), default=0.0)  # none, where nothing for this room fits the host
        again |= {key for key, chosen in own.items() if chosen or seconds[key] < NEAR * best}
    return [key for key in seconds if key in again]


def _key(plan: Plan) -> Any:
    """What makes two plans the same program. Of a window it is the copies that it holds, and until when."""
    return plan.layers, plan.tail, plan.schedule, make_tasks(plan).hold.tobytes()


# --- what is printed --------------------------------------------------------------------------------------------------


def summary(rows: list[Measured]) -> Table:
    """How far predictions are off, or how far choices are from the best rival, which are not shown themselves."""
    rivals = sum(row.room is not None and not row.chosen for row in rows)
    title = f"predicted against measured; not shown: {rivals} steps of plans by hand that choices are compared with"
    table = Table(title=title if rivals else title.partition(";")[0], title_justify="left")
    headings = ("model", "batch", "cached", "room %", "plan", "measured ms", "predicted ms", "off %", "against best")
    for heading in headings:
        table.add_column(heading)
    against = {id(choice.chosen): f"{choice.ratio:.3f} of {choice.rivals}" for choice in predictions.choices(rows)}
    for row in rows:
        if row.room is not None and not row.chosen:
            continue
        room = "" if row.room is None else f"{row.room:.0f}"
        table.add_row(
            predictions.model_of(row), str(row.batch), str(row.prompt), room, row.plan,
            f"{row.median_ms:.2f}", f"{row.predicted_ms:.2f}", f"{100 * row.off:+.1f}", against.get(id(row), ""),
        )  # fmt: skip
    return table


def define_flags(into: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the script only."""
    flags.DEFINE_list("models", ["opt-1.3b", "opt-6.7b", "opt-13b"], "Presets.", flag_values=into)
    flags.DEFINE_list("batches", ["1", "8", "32"], "Rows decoded together.", flag_values=into)
    flags.DEFINE_list("cached", ["512", "1024", "4096"], "Cached tokens of a row.", flag_values=into)
    flags.DEFINE_list("rooms", [], "Per cent of the keys and values that the device may hold.", flag_values=into)
    flags.DEFINE_integer("layers", None, "Cut the models to so many layers.", lower_bound=1, flag_values=into)
    flags.DEFINE_float("host_memory_gib", 72, "Most pinned memory of a plan.", flag_values=into)
    flags.DEFINE_list("from", [], "Results of this script, read instead of measuring.", flag_values=into)
    flags.DEFINE_string("plot", None, "Write a PNG: how far predictions are off.", flag_values=into)
    flags.DEFINE_string("plot_choices", None, "Write a PNG: chosen plans against the best by hand.", flag_values=into)
    flags.DEFINE_string("out", None, "Also write the JSON document to this file.", flag_values=into)
    flags.DEFINE_string("commit", "", "Recorded as the commit, where git cannot be asked.", flag_values=into)


def document_of(rows: list[Measured], machine: HardwareProfile | None, about: dict[str, Any]) -> dict[str, Any]:
    """What a results file has; the profile says what predictions came of."""
    profile = None if machine is None else machine.to_json()
    return about | {"profile": profile, "rows": [dataclasses.asdict(row) for row in rows]}


def main(_: list[str], given: flags.FlagValues = flags.FLAGS) -> None:
    """Unpacks the flags."""
    console = Console(width=150)
    old = given["from"].value
    if old and given.out:
        raise ValueError("--out is for what is measured, and with --from nothing is: give one of them")
    for path in (given.plot, given.plot_choices):
        if path is not None:
            png.check_path(path)
    if old:
        document, rows = {}, [row for path in old for row in tables.predicted(tables.read_file(path))]
        console.print(summary(rows))
    else:
        batches, cached = (script.whole_numbers(name, given[name].value) for name in ("batches", "cached"))
        rooms = script.percentages("rooms", given.rooms)
        configs = [models.preset(name) for name in script.names("models", given.models)]  # a mistake is said first
        configs = [with_positions(config, max(cached) + NEW) for config in configs]
        if not given.host_memory_gib > 0:
            raise ValueError(f"--host_memory_gib is {given.host_memory_gib:g}; it must be a size in GiB above zero")
        host = given.host_memory_gib * GIB
        memory.limit_pinned(host)
        about = run_info(given.commit)
        rows, commands = measured_before(given.out, about)
        about["command"] = AND.join(dict.fromkeys([*commands, about["command"]]))
        if rows:
            console.print(summary(rows))
        document = document_of(rows, None, about)
        for machine, own in run(configs, batches, cached, rooms, given.layers, host, console, list(rows)):
            rows += own
            document = document_of(rows, machine, about)
            if given.out:  # after every workload: what was measured is not lost with what comes after
                write_json(given.out, document)
            console.print(summary(own))
    if rows:
        console.print(predictions.accuracy(rows))
    if predictions.choices(rows):
        console.print(predictions.regret(rows))
    if not old:
        print(json.dumps(document))
    if given.plot is not None:
        predictions.draw_predictions(rows, given.plot)
    if given.plot_choices is not None:
        predictions.draw_choices(rows, given.plot_choices)


if __name__ == "__main__":
    define_flags()
    script.run(main)
