"""Measures single steps under many plans, to check what the cost function predicts and what the scheduler chooses.

    python experiments/sweep.py --model=opt-1.3b,opt-6.7b --batch=1,8,32 --prompt=512,1024 --out=predictions.json
    python experiments/sweep.py --rooms=0,25,50,100 --out=choices.json
    python experiments/sweep.py --from=predictions.json --plot=predictions.png

Caches are of random numbers: a step's time does not depend on them. Without `--rooms`, every workload is measured under
the six plans of PLANS, predicted and measured side by side. With `--rooms`, the device may hold so many per cent of the
workload's keys and values, and the scheduler's choice is compared with the best of the plans by hand that fit. Times
are medians of up to 31 steps; of steps below 20 ms, of the choices, and of what is near the best of a room, the least
of three such.

A position table shorter than the cached tokens is made longer. `--layers` cuts the models: all layers of a step are
alike, so plans compare as in the whole model, and less memory is needed. Leave enough for a step to take some
milliseconds, longer than the host takes to launch it. The results are written after every workload: killed, the same
command goes on, and another one at the same commit adds to them. With `--from`, nothing is measured: results are read,
and said and drawn together.
"""

import dataclasses
import gc
import itertools
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.support import script
from experiments.support.plots import png
from experiments.support.results import predictions, tables, terminal
from experiments.support.results.predictions import Measured
from experiments.support.results.report import run_info
from experiments.support.suite import machine_lock
from experiments.support.suite.step_timing import NEW, device_bytes_with_room, step_seconds, with_positions

from absl import flags
from rich.console import Console
from rich.progress import track

import kvrecomp
import models
from kvrecomp.files import check_writable, write_json
from kvrecomp.plan import (
    DEFAULT_WINDOW,
    FORMS,
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
from kvrecomp.plan.footprint import check_weights
from kvrecomp.plan.named import named_plan, named_weights
from kvrecomp.predict.cost import plan_costs
from kvrecomp.predict.hardware import HardwareProfile
from kvrecomp.predict.tasks import Part, make_tasks
from kvrecomp.run import memory
from kvrecomp.run.limits import limits
from kvrecomp.run.programs import side_by_side

# The most host memory first: pinning it takes long, and what is pinned for one plan serves the next.
PLANS = ("keys_values", "split:0.5", "kvpr:0.75", "activations", "recompute", "device:0.5")
COMPARED = (*PLANS, "split:0.25", "split:0.75", "kvpr:0.25", "kvpr:0.5", "kvpr:1", "device")
# A machine's processor is slow for seconds at times, and launches short steps no faster than that; and so is its link.
# Of the medians of several rounds, all such plans in each, the least counts.
SHORT, AGAIN = 0.02, 2  # seconds; rounds after the first
NEAR = 1.15  # times as long as the best of a room: it may be as good
AND = " && "  # between the commands that a file is of


# --- plans ------------------------------------------------------------------------------------------------------------


def budget_with_room(shape: ModelShape, workload: kvrecomp.Workload, percent: float, host: float | None) -> Budget:
    """Device memory with room for so many per cent of the workload's keys and values."""
    hosted, cached = (named_plan(name, shape, workload, tail=NEW) for name in ("keys_values", "device"))
    return Budget(device_bytes_with_room(hosted, cached, percent), host)


def rivals_within(model: Any, workload: kvrecomp.Workload, budget: Budget) -> list[Plan]:
    """Plans by hand that keep to the budget's device memory: those of COMPARED, and four that use it in full."""
    allowed = budget.device or 0
    plans = [named_plan(name, model.shape, workload, tail=NEW) for name in COMPARED]
    for device_form, host_form in itertools.product(FORMS, repeat=2):
        room = allowed - _device_bytes(_two_forms(model, workload, device_form, host_form, 0.0))
        plans.append(_two_forms(model, workload, device_form, host_form, max(0.0, room)))
    distinct: dict[Hashable, Plan] = {}
    for plan in plans:  # without room two forms are one
        distinct.setdefault(_program_key(plan), plan)
    return [plan for plan in distinct.values() if _device_bytes(plan) <= allowed]


def _device_bytes(plan: Plan) -> int:
    return sum(kvrecomp.memory_needed(plan)["device"].values())


def _two_forms(model: Any, workload: kvrecomp.Workload, device_form: Form, host_form: Form, room: float) -> Plan:
    """As many tokens in one form as `room` bytes hold on the device, the others in the other form in host memory."""
    layers = []
    for layer in model.shape.layers:
        token_bytes = workload.batch * layer.width(device_form) * model.shape.itemsize
        tokens = layer.cached(workload.prompt)
        on_device = min(tokens, int(room / len(model.shape.layers) / token_bytes))
        on_host = tokens - on_device
        runs: list[tuple[Form, Memory, int]] = [(device_form, "device", on_device), (host_form, "host", on_host)]
        blocks = cut_runs(runs, layer, model.shape, workload, DEFAULT_WINDOW // BLOCKS_PER_WINDOW)
        tail_form, _, _ = runs[1] if on_host else runs[0]
        layers.append(LayerPlan(blocks, tail_form, ("host" if on_host else "device",)))
    return Plan(f"{device_form} here, {host_form} there", model.shape, workload, tuple(layers), tail=NEW)


def _program_key(plan: Plan) -> Hashable:
    """Equal for plans that are the same program. Of a window it has the copies that it holds, and until when."""
    return plan.layers, plan.tail, plan.schedule, make_tasks(Part(1, plan)).hold.tobytes()


# --- the sweep --------------------------------------------------------------------------------------------------------


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
        model = None
        for batch in sorted(batches, reverse=True):
            machine = None
            for prompt in sorted(cached, reverse=True):
                sizes = (config.shape.name, layers, batch, prompt)
                done = {row.room for row in before if (row.model, row.layers, row.batch, row.prompt) == sizes}
                if not {*(rooms or [None])} - done:
                    continue
                if model is None:
                    on_device = named_weights("device", len(config.shape.layers))
                    check_weights(config.shape, on_device, limits(kvrecomp.Budget()))
                    with machine_lock.shared():
                        model = models.create(config)
                if machine is None:
                    with machine_lock.exclusive():
                        machine = kvrecomp.profile(model, batch=batch)
                workload, left = kvrecomp.Workload(batch, prompt, NEW), [room for room in rooms if room not in done]
                rows = measure_workload(model, workload, machine, left, host, console)
                yield machine, [dataclasses.replace(row, layers=layers) for row in rows]
        del model
        gc.collect()


def measure_workload(
    model: Any, workload: kvrecomp.Workload, machine: HardwareProfile, rooms: list[float], host: float, console: Console
) -> list[Measured]:
    """All plans of one workload, each distinct one measured once."""
    wanted: list[tuple[float | None, bool, Plan]] = []  # room, whether chosen, plan
    if not rooms:
        wanted = [(None, False, named_plan(name, model.shape, workload, tail=NEW)) for name in PLANS]
    weights = kvrecomp.weight_memories(model)
    for room in rooms:
        budget = budget_with_room(model.shape, workload, room, host)
        chosen = kvrecomp.make_plan(model.shape, workload, machine, budget, weights=weights, tail=NEW)
        wanted += [(room, True, chosen), *((room, False, plan) for plan in rivals_within(model, workload, budget))]
    distinct: dict[Hashable, Plan] = {}
    for _, _, plan in wanted:
        distinct.setdefault(_program_key(plan), plan)
    decoders: dict[Hashable, kvrecomp.Decoder] = {}
    for key, plan in distinct.items():
        needed = kvrecomp.memory_needed(plan)["host"]["blocks"]
        try:
            if needed > host:
                raise PlanError(f"{format_bytes(needed)} of host memory")
            decoders[key] = kvrecomp.Decoder(model, plan, budget=Budget(None, host * 1.01))
        except PlanError as error:
            console.print(f"left out: {plan.name}, {model.shape.name}, {workload}: {error}")
    with machine_lock.shared():
        side_by_side(lambda decoder: decoder.compile(prefill=False), decoders.values())
    title = f"{model.shape.name}, {workload}: {len(decoders)} programs"
    with machine_lock.exclusive():
        seconds = {key: step_seconds(decoder) for key, decoder in track(decoders.items(), title, console=console)}
        again = measured_again(seconds, [(room, chosen, _program_key(plan)) for room, chosen, plan in wanted])
        for _ in range(AGAIN):
            for key in again:
                seconds[key] = min(seconds[key], step_seconds(decoders[key]))
    rows = []
    for room, chosen, plan in wanted:
        if (median := seconds.get(_program_key(plan))) is not None:
            predicted = float(plan_costs(machine, [plan], write_outs=0).seconds[0])
            sizes = (model.shape.name, workload.batch, workload.prompt, workload.new)
            link_bytes = plan.bytes_in("host")
            rows.append(Measured(*sizes, plan.name, room, 1e3 * median, 1e3 * predicted, link_bytes, chosen))
    return rows


def measured_again(
    seconds: Mapping[Hashable, float], wanted: Sequence[tuple[float | None, bool, Hashable]]
) -> list[Hashable]:
    """Which programs, of those that took so many seconds, are measured in further rounds; `wanted` has the rooms that
    each is for, and whether it is chosen there."""
    again = {key for key, median in seconds.items() if median < SHORT}
    for room in {room for room, _, _ in wanted if room is not None}:
        in_room = [(chosen, key) for wanted_room, chosen, key in wanted if wanted_room == room and key in seconds]
        best = min((seconds[key] for _, key in in_room), default=0.0)  # none, where nothing for this room fits the host
        again |= {key for chosen, key in in_room if chosen or seconds[key] < NEAR * best}
    return [key for key in seconds if key in again]


def measured_before(path: str | None, about: dict[str, Any]) -> tuple[list[Measured], list[str]]:
    """What the file has already, which is to be added to, and the commands that measured it.

    Raises ValueError where it is no results file, or of another machine, version of jax or commit.
    """
    if path is None or not Path(path).exists():
        return [], []
    tables.check_out(path, "chosen")
    rows = tables.read_file(path)
    for name in ("device", "driver", "jax", "commit"):
        if differing := {row.get(name) for row in rows} - {about[name]}:
            raise ValueError(
                f"--out: {path} was measured with {name} {differing.pop()}, and this is {about[name]}: "
                "give another file, or remove that one"
            )
    return tables.predicted(rows), [command for row in rows[:1] for command in row["command"].split(AND)]


# --- what is printed --------------------------------------------------------------------------------------------------


def summary(rows: list[Measured]) -> str:
    """How far predictions are off, or how far choices are from the best rival, which are not shown themselves."""
    against = {id(choice.chosen): f"{choice.ratio:.3f} of {choice.rivals}" for choice in predictions.choices(rows)}
    return tables.table(
        [row for row in rows if row.room is None or row.chosen],
        ("model", predictions.model_of),
        ("batch", "{0.batch}".format),
        ("cached", "{0.prompt}".format),
        ("room %", lambda row: "" if row.room is None else f"{row.room:.0f}"),
        ("plan", "{0.plan}".format),
        ("measured ms", "{0.median_ms:.2f}".format),
        ("predicted ms", "{0.predicted_ms:.2f}".format),
        ("off %", lambda row: f"{100 * row.off:+.1f}"),
        ("against best", lambda row: against.get(id(row), "")),
    )


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.list("model", ["opt-1.3b", "opt-6.7b", "opt-13b"], "Presets.")
    define.list("batch", ["1", "8", "32"], "Rows decoded together.")
    define.list("prompt", ["512", "1024", "4096"], "Cached tokens of a row.")
    define.list("rooms", [], "Per cent of the keys and values that the device may hold.")
    define.integer("layers", None, "Cut the models to so many layers.", lower_bound=1)
    define.number("host_memory_gib", 72, "Most pinned memory of a plan.", lower_bound=2**-10)
    define.list("from", [], "Results of this script, read instead of measuring.")
    define.string("plot", None, "Write a PNG: how far predictions are off.")
    define.string("plot_choices", None, "Write a PNG: chosen plans against the best by hand.")
    define.string("out", None, "Also write the JSON document to this file.")
    define.string("commit", "", "Recorded as the commit, where git cannot be asked.")


# --- the command ------------------------------------------------------------------------------------------------------


def read_rows(paths: Sequence[str], console: Console) -> list[Measured]:
    """The rows of results files, which are said."""
    rows = [row for path in paths for row in tables.predicted(tables.read_file(path))]
    terminal.show(console, summary(rows))
    return rows


def measure_rows(given: flags.FlagValues, console: Console) -> tuple[list[Measured], dict[str, Any]]:
    """Measures what the flags say, and writes it after every workload; the rows, and the document of a results file.

    What was measured is not lost with what comes after. The profile in the document says what predictions came of.
    """
    batches, cached = (script.whole_numbers(name, getattr(given, name)) for name in ("batch", "prompt"))
    rooms = script.percentages("rooms", given.rooms)
    configs = [models.preset(name) for name in script.names("model", given.model)]  # a mistake is said first
    configs = [with_positions(config, max(cached) + NEW) for config in configs]
    if given.out:
        check_writable(given.out)
    host = given.host_memory_gib * GIB
    memory.limit_pinned(host)
    about = run_info(given.commit)
    rows, commands = measured_before(given.out, about)
    about["command"] = AND.join(dict.fromkeys([*commands, about["command"]]))
    if rows:
        terminal.show(console, summary(rows))
    document = about | {"profile": None, "rows": [dataclasses.asdict(row) for row in rows]}
    for machine, measured in run(configs, batches, cached, rooms, given.layers, host, console, list(rows)):
        rows += measured
        document = about | {"profile": machine.to_json(), "rows": [dataclasses.asdict(row) for row in rows]}
        if given.out:
            write_json(given.out, document)
        terminal.show(console, summary(measured))
    return rows, document


def main(given: flags.FlagValues) -> None:
    console = terminal.standard_output()
    old = given["from"].value
    if old and given.out:
        raise ValueError("--out is for what is measured, and with --from nothing is: give one of them")
    for path in (given.plot, given.plot_choices):
        if path is not None:
            png.check_path(path)
    rows, document = (read_rows(old, console), None) if old else measure_rows(given, console)
    if rows:
        console.print(predictions.accuracy(rows))
    if predictions.choices(rows):
        console.print(predictions.regret(rows))
    if document is not None:
        print(json.dumps(document))
    if given.plot is not None:
        predictions.draw_predictions(rows, given.plot)
    if given.plot_choices is not None:
        predictions.draw_choices(rows, given.plot_choices)


if __name__ == "__main__":
    script.run(main, define_flags)
