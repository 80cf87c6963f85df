"""Measures decode steps of a model with random weights under several plans, on one workload or several.

    python experiments/benchmark.py --model=opt-6.7b --batch=32 --prompt=1024 --new=32 --plans=activations,keys_values
    python experiments/benchmark.py --model=opt-6.7b --batch=32,8 --prompt=1024,512,128 --plans=auto

Of several batches and prompts each is measured with each, in their order. Give the largest first: host memory that is
pinned for them serves the others. Programs of all plans are compiled side by side before anything runs. Steps are those
of `kvrecomp.generate`: dispatched one ahead, each awaited; the first (`report.WARM_UP`) do not count. Link efficiency
is the bytes sent over the step's seconds, over the rate of whole-block copies alone in that process.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

import kvrecomp
import models
from experiments.support import script
from experiments.support.results import tables
from experiments.support.results.report import after_warm_up, run_info
from experiments.support.suite import machine_lock
from kvrecomp.files import write_json
from kvrecomp.generate import TokenLoop
from kvrecomp.measure.machine import copy_rate
from kvrecomp.plan import AUTO, GIB, MIB, PlanError
from kvrecomp.plan.named import named_weights
from kvrecomp.predict.cost import median_write_outs, plan_costs
from kvrecomp.predict.hardware import LARGEST_DEVICE, LEAST_DEVICE, HardwareProfile
from kvrecomp.run import memory
from kvrecomp.run.programs import side_by_side
from kvrecomp.run.sampling import Sampling

_MODEL = flags.DEFINE_string("model", "opt-125m", "Preset whose random weights are decoded with.")
_BATCH = flags.DEFINE_list("batch", ["8"], "Rows decoded together, or several such numbers.")
_PROMPT = flags.DEFINE_list("prompt", ["256"], "Tokens in each prompt, or several such numbers.")
_NEW = flags.DEFINE_integer("new", 32, "New tokens per row.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", None, "Most steps to run of a plan; default: all that --new has.", lower_bound=1)
_PLANS = flags.DEFINE_list(
    "plans",
    ["auto", "activations", "keys_values"],
    "Plans: auto, auto:F (within F GiB of device memory), or as named_plan has them.",
)
_WEIGHTS = flags.DEFINE_string(
    "weights", "device", "Where the layers' weights are: device, host, the fraction of layers on the host, or auto."
)
_GROUPS = flags.DEFINE_integer("groups", 1, "Groups of so many rows each, decoded together.", lower_bound=1)
_ORDER = flags.DEFINE_enum(
    "order",
    None,
    ["row", "column"],
    "Groups one after the other, or all of them through a layer before the next; default: chosen.",
)
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of weights and cache.")
_WINDOW = flags.DEFINE_float("window_mib", None, "Bytes from the host in flight or in use, in MiB; default: chosen.")
_TAIL = flags.DEFINE_integer("tail", None, "Tokens in the tail; default: by their bytes.", lower_bound=1)
_DEVICE_GIB = flags.DEFINE_float("device_memory_gib", None, "Device memory to use, weights included; default: free.")
_HOST_GIB = flags.DEFINE_float("host_memory_gib", None, "Pinned host memory to use; default: what is free.")
_COPY_GIB = flags.DEFINE_float(
    "copy_gib", 2, "Pinned memory to measure the copies-only rate with, in GiB.", lower_bound=0.5
)
_LAYERS = flags.DEFINE_bool(
    "time_layers", True, "Time the model's layers first, to predict better: up to a minute on a GPU, minutes on a CPU."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of weights and prompts.")
_OUT = flags.DEFINE_string("out", None, "Also write the JSON document to this file.")
_COMMIT = flags.DEFINE_string("commit", "", "Recorded as the commit, where git cannot be asked.")


@dataclasses.dataclass
class Row:
    """One plan measured on one workload; milliseconds are per decode step, bytes are bytes.

    `asked` is the plan's name as it was given. `device_budget` is the device memory in bytes that the plan was to keep
    to; None: what was free. `compile_s` are the seconds that the step's program took, beside others, and `prefill_s`
    those until all rows have their first token. `peak_device_bytes` is the most that the process has used by then, by
    other plans before it too. `step_ms` has every step that was run.
    """

    model: str
    batch: int
    prompt: int
    new: int
    asked: str
    plan: str
    dtype: str
    weights: str
    groups: int
    order: str
    device_budget: float | None
    median_ms: float
    p95_ms: float
    worst_ms: float
    predicted_ms: float
    link_bytes: int
    predicted_bytes: int
    link_efficiency: float | None
    tokens_per_second: float
    peak_device_bytes: int | None
    temp_bytes: int
    compile_s: float
    prefill_s: float
    programs: int
    step_ms: list[float]


def within(asked: str, budget: kvrecomp.Budget) -> tuple[str, kvrecomp.Budget]:
    """The name of a plan that was asked for, and the budget that it is to keep to.

    Raises ValueError where F of auto:F is no number of GiB that a device may have.
    """
    name, _, gib = asked.partition(":")
    if name != AUTO or name == asked:
        return asked, budget
    try:
        device = float(gib) * GIB
    except ValueError:
        device = 0.0
    if not LEAST_DEVICE <= device <= LARGEST_DEVICE:
        raise ValueError(f"--plans has {asked!r}; expected {AUTO}:F, with F GiB of device memory, more than 0")
    return name, dataclasses.replace(budget, device=device)


def make_decoder(
    model: Any, budget: kvrecomp.Budget, plan_of: Callable[[], kvrecomp.Plan]
) -> kvrecomp.Decoder | PlanError:
    """The decoder of a plan, or why there is none, which is said when its turn comes: others may have theirs before."""
    try:
        return kvrecomp.Decoder(model, plan_of(), budget=budget)
    except PlanError as error:
        return error


def compile_first(decoder: kvrecomp.Decoder | PlanError) -> None:
    """Compiles what decoding starts with; what fails is said when the plan's turn comes."""
    if isinstance(decoder, kvrecomp.Decoder):
        with contextlib.suppress(Exception):
            decoder.compile()


def measure(
    decoder: kvrecomp.Decoder,
    asked: str,
    device_budget: float | None,
    machine: HardwareProfile,
    copy_bytes_per_second: float,
    seed: int = 0,
    steps: int | None = None,
) -> Row:
    """Runs the plan's workload on random prompts, or as many `steps` of it, when a prefill and a step were run once."""
    plan = decoder.plan
    work, new = plan.workload, min(plan.workload.new, 1 + (steps or plan.workload.new))
    hosted = sum(layer.weights == "host" for layer in plan.layers) / len(plan.layers)
    ids = np.random.default_rng(seed).integers(3, plan.shape.vocab, (plan.rows, work.prompt), np.int32)
    loop = TokenLoop(decoder, Sampling(), [], 0)
    with machine_lock.shared():
        loop.run(ids, None, 2)
    gc.collect()  # its cache is gone before the next one is made
    with machine_lock.exclusive():
        result = loop.run(ids, None, new)
    seconds, sent = after_warm_up(result.step_seconds), after_warm_up(result.link_bytes)
    median, write_outs = statistics.median(seconds), median_write_outs(plan, new)
    stats = jax.devices()[0].memory_stats() or {}
    link_bytes = int(statistics.median(sent))
    return Row(
        model=plan.shape.name,
        batch=work.batch,
        prompt=work.prompt,
        new=work.new,
        asked=asked,
        plan=plan.name,
        dtype=plan.shape.dtype,
        weights={0: "device", 1: "host"}.get(hosted, f"{hosted:.3g}"),
        groups=plan.groups,
        order=plan.order,
        device_budget=device_budget,
        median_ms=median * 1e3,
        p95_ms=float(np.percentile(seconds, 95)) * 1e3,
        worst_ms=max(seconds) * 1e3,
        predicted_ms=float(plan_costs(machine, [plan], write_outs).seconds[0]) * 1e3,
        link_bytes=link_bytes,
        predicted_bytes=plan.link_bytes(write_outs),
        link_efficiency=link_bytes / median / copy_bytes_per_second if link_bytes else None,
        tokens_per_second=plan.rows / median,
        peak_device_bytes=stats.get("peak_bytes_in_use"),
        temp_bytes=decoder.compiled["step", 0].temp_bytes,
        compile_s=decoder.compiled["step", 0].seconds,
        prefill_s=result.prefill_seconds,
        programs=len(decoder.compiled),
        step_ms=[round(1e3 * each, 2) for each in result.step_seconds],
    )


def table(rows: list[Row], copy_gbps: float) -> Table:
    """The rows for a terminal."""
    out = Table(title=f"decode steps; copies alone reach {copy_gbps:.1f} GB/s", title_justify="left")
    for heading in ("model", "batch", "prompt", "plan"):
        out.add_column(heading)
    for heading in (
        "median ms",
        "predicted",
        "p95",
        "worst",
        "link GB",
        "efficiency",
        "tokens/s",
        "temp GB",
        "compile s",
        "prefill s",
    ):
        out.add_column(heading, justify="right")
    for row in rows:
        efficiency = "-" if row.link_efficiency is None else f"{row.link_efficiency:.3f}"
        out.add_row(
            row.model, str(row.batch), str(row.prompt), row.plan, f"{row.median_ms:.2f}", f"{row.predicted_ms:.2f}",
            f"{row.p95_ms:.2f}",
            f"{row.worst_ms:.2f}", f"{row.link_bytes / 1e9:.2f}", efficiency, f"{row.tokens_per_second:.0f}",
            f"{row.temp_bytes / 1e9:.2f}", f"{row.compile_s:.1f}", f"{row.prefill_s:.2f}",
        )  # fmt: skip
    return out


def main(_: list[str]) -> None:
    works = script.workloads(_BATCH.value, _PROMPT.value, _NEW.value)
    window = script.window_bytes(_WINDOW.value)
    shape = dataclasses.replace(models.preset(_MODEL.value).shape, dtype=_DTYPE.value)
    tables.check_out(_OUT.value, "link_efficiency")
    budget = kvrecomp.Budget.of_gib(_DEVICE_GIB.value, _HOST_GIB.value)
    options = {"groups": _GROUPS.value, "order": _ORDER.value, "tail": _TAIL.value, "window": window, "budget": budget}
    plan_for = functools.partial(kvrecomp.plan_for, **options)
    # Mistakes are said before the weights are made, and what is pinned is limited before there is a backend.
    asked = [(each, *within(each, budget)) for each in script.names("plans", _PLANS.value)]
    names = {"device", *(name for _, name, _ in asked)}
    forms = {"keys_values", "activations"} if AUTO in names else set()  # in which AUTO may keep the cache
    chosen = _WEIGHTS.value == AUTO
    if chosen and any(each != name for each, name, _ in asked):
        raise ValueError(f"--weights={AUTO} goes by --device_memory_gib: leave the GiB of {AUTO}:F out")
    if chosen and len(works) > 1:
        raise ValueError(f"--weights={AUTO} chooses for one workload: give one --batch and one --prompt")
    weights = named_weights("host" if chosen else _WEIGHTS.value, len(shape.layers))
    named = [plan_for(name, shape, work, weights=weights) for work in works for name in (names | forms) - {AUTO}]
    hosted = [sum(kvrecomp.memory_needed(plan)["host"].values()) for plan in named]
    memory.limit_pinned(max(_COPY_GIB.value * GIB, min(max(hosted), budget.host or math.inf)))
    if chosen:
        with machine_lock.exclusive():  # where the machine never was
            machine = kvrecomp.profile()
        weights = tuple(layer.weights for layer in plan_for(AUTO, shape, works[0], profile=machine).layers)
    sharding = kvrecomp.placement(plan_for("device", shape, works[0], weights=weights))  # the same for all plans
    with machine_lock.shared():
        model = models.create(_MODEL.value, dtype=_DTYPE.value, seed=_SEED.value, sharding=sharding)
    with machine_lock.exclusive():
        rate = copy_rate(256 * MIB, max(2, int(_COPY_GIB.value * 4)), repeats=3)
        timed = model if _LAYERS.value else None
        machines = {batch: kvrecomp.profile(timed, batch=batch) for batch in sorted({work.batch for work in works})}
    decoders = []
    for work, (each, name, own) in itertools.product(works, asked):
        machine = machines[work.batch]
        plan_of = functools.partial(plan_for, name, model.shape, work, weights=weights, profile=machine, budget=own)
        decoders.append((make_decoder(model, own, plan_of), each, own.device, machine))
    with machine_lock.shared():
        side_by_side(compile_first, [decoder for decoder, *_ in decoders])
    rows, about, document = [], run_info(_COMMIT.value), {}
    while decoders:
        decoder, *given = decoders.pop(0)
        if isinstance(decoder, PlanError):
            raise decoder
        rows.append(measure(decoder, *given, rate, _SEED.value, _STEPS.value))
        del decoder
        gc.collect()  # a decoder's cache is gone before the next one's is made
        document = about | {"copy_gbps": rate / 1e9, "rows": [dataclasses.asdict(row) for row in rows]}
        if _OUT.value:
            write_json(_OUT.value, document)  # after every plan: what was measured is not lost with what comes after
    Console(width=150).print(table(rows, rate / 1e9))
    print(json.dumps(document))


if __name__ == "__main__":
    script.run(main)
