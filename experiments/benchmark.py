"""Measures decode steps of a model with random weights under several plans, on one workload or several.

    python experiments/benchmark.py --model=opt-6.7b --batch=32 --prompt=1024 --new=32 --plans=activations,keys_values
    python experiments/benchmark.py --model=opt-6.7b --batch=32,8 --prompt=1024,512,128 --plans=auto
    python experiments/benchmark.py --model=opt-6.7b --batch=32 --prompt=1024 --plans=activations+packed --drafts=0,8

Every batch is measured with every prompt, in their order. Give the largest first: host memory that is pinned for it
serves the others. Programs of all plans are compiled side by side before anything runs. Steps are those of
`kvrecomp.generate`: dispatched one ahead, each awaited; the first (`report.WARM_UP`) do not count. Link efficiency is
the bytes sent over the step's seconds, over the rate of whole-block copies alone in that process.

With --drafts a row is of rounds. Random weights say nothing of how often drafts are right: that is made up, so often as
--acceptance says, of the text that is written, while the drafts are made all the same. A draft is right if those before
it are, or it is not asked.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.support import script
from experiments.support.made_up import MadeUp
from experiments.support.results import tables, terminal
from experiments.support.results.report import after_warm_up, run_info
from experiments.support.suite import machine_lock
from experiments.support.suite.row import Row, step_times

import jax
import numpy as np
from absl import flags

import kvrecomp
import models
from kvrecomp.drafts import make_drafter
from kvrecomp.files import write_json
from kvrecomp.generate import TokenLoop
from kvrecomp.measure.machine import copy_rate
from kvrecomp.plan import AUTO, GIB, MIB, Codec, Memory, PlanError, format_bytes
from kvrecomp.plan.drafting import MOST_DRAFTS, Drafter, tokens_per_round
from kvrecomp.plan.footprint import check_weights, check_within
from kvrecomp.plan.named import named_weights
from kvrecomp.predict.cost import median_write_outs, plan_costs, round_cost
from kvrecomp.predict.hardware import LARGEST_DEVICE, LEAST_DEVICE, HardwareProfile
from kvrecomp.run import memory
from kvrecomp.run.limits import limits
from kvrecomp.run.programs import side_by_side
from kvrecomp.run.sampling import Sampling

# Who drafts, by the words of --drafters, and the codec of a sketch. Who is made up needs the room of drafts alone.
DRAFTERS: dict[str, tuple[Drafter, Codec | None]] = {
    "fp8": ("sketch", "fp8"),
    "int4": ("sketch", "int4"),
    "prompt_lookup": ("prompt_lookup", None),
    "made_up": ("prompt_lookup", None),
}


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.string("model", "opt-125m", "Preset whose random weights are decoded with.")
    define.list("batch", ["8"], "Rows decoded together, or several such numbers.")
    define.list("prompt", ["256"], "Tokens in each prompt, or several such numbers.")
    define.integer("new", 32, "New tokens per row.", lower_bound=1)
    define.integer("steps", None, "Most steps to run of a plan; default: all that --new has.", lower_bound=1)
    define.list(
        "plans",
        ["auto", "activations", "keys_values"],
        "Plans: auto, auto:F (within F GiB of device memory), or as named_plan has them.",
    )
    define.loss()
    where = "Where the layers' weights are: device, host, the fraction of layers on the host, or auto."
    define.string("weights", "device", where)
    define.integer("groups", 1, "Groups of so many rows each, decoded together.", lower_bound=1)
    order = "Groups one after the other, or all of them through a layer before the next; default: chosen."
    define.enum("order", None, ["row", "column"], order)
    define.string("dtype", "bfloat16", "Of weights and cache.")
    define.window("chosen")
    define.integer("tail", None, "Tokens in the tail; default: by their bytes.", lower_bound=1)
    define.list("drafts", ["0"], "Drafts of a round, or several such numbers; 0: steps of one token.")
    drafters = (
        "Who drafts: fp8 or int4, a sketch of host blocks; prompt_lookup; made_up, which takes no time; or several."
    )
    define.list("drafters", ["fp8"], drafters)
    adapt = "Let the number of drafts, up to --drafts, go by how often they are right and by what they cost."
    define.boolean("adapt", False, adapt)
    define.list("acceptance", ["0.9"], "How often a draft is right if those before it are, or several such numbers.")
    define.device_memory()
    define.host_memory()
    define.number("copy_gib", 2, "Pinned memory to measure the copies-only rate with, in GiB.", lower_bound=0.5)
    timed = "Time the model's layers first, to predict better: up to a minute on a GPU, minutes on a CPU."
    define.boolean("time_layers", True, timed)
    define.seed("Of weights and prompts.")
    define.string("out", None, "Also write the JSON document to this file.")
    define.string("commit", "", "Recorded as the commit, where git cannot be asked.")


# --- what is asked for ------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A word of --plans, the name of its plan, the budget that it is to keep to, and which drafts are made."""

    word: str
    plan: str
    budget: kvrecomp.Budget
    drafting: kvrecomp.Drafting | None = None
    drafter: str = ""


def read_plan(word: str, budget: kvrecomp.Budget) -> Asked:
    """What a word of --plans asks for, within the budget or, of auto:F, F GiB of device memory.

    Raises ValueError where F is no number of GiB that a device may have.
    """
    plan, _, gib = word.partition(":")
    if plan != AUTO or plan == word:
        return Asked(word, word, budget)
    try:
        device = float(gib) * GIB
    except ValueError:
        device = 0.0
    if not LEAST_DEVICE <= device <= LARGEST_DEVICE:
        raise ValueError(f"--plans has {word!r}; expected {AUTO}:F, with F GiB of device memory, more than 0")
    return Asked(word, plan, dataclasses.replace(budget, device=device))


def read_drafts(drafts: Sequence[str], drafters: Sequence[str]) -> list[tuple[kvrecomp.Drafting | None, str]]:
    """What --drafts and --drafters ask for. Raises ValueError where they are no numbers of drafts, or nobody drafts."""
    found: list[tuple[kvrecomp.Drafting | None, str]] = []
    for word in drafts:
        if not word.isascii() or not word.isdigit() or int(word) > MOST_DRAFTS:
            raise ValueError(f"--drafts has {word!r}; expected a whole number from 0 to {MOST_DRAFTS}")
        if int(word) == 0:
            found.append((None, ""))
            continue
        for drafter in drafters:
            if drafter not in DRAFTERS:
                raise ValueError(f"--drafters has {drafter!r}; expected some of {', '.join(DRAFTERS)}")
            kind, codec = DRAFTERS[drafter]
            found.append((kvrecomp.Drafting(kind, int(word), codec=codec), drafter))
    return found


def read_acceptance(words: Sequence[str]) -> list[float]:
    """Probabilities. Raises ValueError where they are none."""
    found = []
    for word in words:
        try:
            share = float(word)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise ValueError(f"--acceptance has {word!r}; expected a probability from 0 to 1")
        found.append(share)
    return found


# --- measuring --------------------------------------------------------------------------------------------------------


def make_decoder(
    model: Any, budget: kvrecomp.Budget, make_plan: Callable[[], kvrecomp.Plan]
) -> kvrecomp.Decoder | PlanError:
    """The decoder of a plan, or why there is none, which is said when its turn comes: others may have theirs before."""
    try:
        return kvrecomp.Decoder(model, make_plan(), budget=budget)
    except PlanError as error:
        return error


def prompts(plan: kvrecomp.Plan, seed: int) -> np.ndarray:
    """Random ones, of all rows."""
    return np.random.default_rng(seed).integers(3, plan.shape.vocab, (plan.rows, plan.workload.prompt), np.int32)


def made_up(plan: kvrecomp.Plan, drafter: str, ids: np.ndarray) -> MadeUp | None:
    """Drafts after these prompts that are never right; None where the plan has none."""
    if plan.drafting is None:
        return None
    nothing = np.zeros((plan.rows, plan.workload.new), np.int32)
    sequences = np.concatenate([ids, nothing], axis=1)
    return MadeUp(None if drafter == "made_up" else make_drafter(plan), sequences, nothing > 0)


def compile_first(given: tuple[kvrecomp.Decoder | PlanError, str]) -> None:
    """Compiles what decoding starts with; what fails is said when the plan's turn comes."""
    decoder, drafter = given
    if isinstance(decoder, kvrecomp.Decoder):
        with contextlib.suppress(Exception):
            ids = prompts(decoder.plan, 0)
            TokenLoop(decoder, Sampling(), [], 0, drafter=made_up(decoder.plan, drafter, ids)).compile(ids)


def measure(
    decoder: kvrecomp.Decoder,
    asked: str,
    device_budget: float | None,
    machine: HardwareProfile,
    copy_bytes_per_second: float,
    seed: int = 0,
    steps: int | None = None,
    drafter: str = "",
    acceptance: Sequence[float] = (),
    adapt: bool = False,
) -> list[Row]:
    """Runs the plan's workload, or as many `steps` of it, on random prompts, after a prefill and a step unmeasured: one
    row, or with drafts one for each acceptance."""
    plan, new = decoder.plan, decoder.plan.workload.new
    ids = prompts(plan, seed)
    drafts = made_up(plan, drafter, ids)
    loop = TokenLoop(decoder, Sampling(), [], 0, drafter=drafts, drafts=1)
    about = functools.partial(_row, decoder, asked, device_budget, machine, copy_bytes_per_second)
    if plan.drafting is None or drafts is None:
        new = min(new, 1 + (steps or new))
        with machine_lock.shared():
            loop.run(ids, None, 2)
        gc.collect()  # its cache is gone before the next one is made
        with machine_lock.exclusive():
            return [about(loop.run(ids, None, new))]
    with machine_lock.shared():
        sequences = loop.run(ids, None, new).sequences
    rows, drafts = [], dataclasses.replace(drafts, sequences=sequences)
    for share in acceptance:
        gc.collect()
        count = None if adapt else plan.drafting.most
        loop = dataclasses.replace(loop, drafter=drafts.with_acceptance(share, seed), drafts=count)
        with machine_lock.exclusive():
            result = loop.run(ids, None, new)
        if (result.sequences != sequences).any():
            raise RuntimeError(
                f"plan {plan.name} wrote another text with {plan.drafting.most} drafts right at {share:g}"
            )
        rows.append(about(result, drafter, share, adapt))
    return rows


def _row(
    decoder: kvrecomp.Decoder,
    asked: str,
    device_budget: float | None,
    machine: HardwareProfile,
    copy_bytes_per_second: float,
    result: kvrecomp.Generated,
    drafter: str = "",
    acceptance: float | None = None,
    adapt: bool = False,
) -> Row:
    plan, new = decoder.plan, result.sequences.shape[1] - decoder.plan.workload.prompt
    times = step_times(result.step_seconds, plan.rows)
    link_bytes = int(statistics.median(after_warm_up(result.link_bytes)))
    link_rate = link_bytes / times["median_ms"] * 1e3
    write_outs = median_write_outs(plan, new)
    hosted = sum(layer.weights == "host" for layer in plan.layers) / len(plan.layers)
    program = next(made for name, made in decoder.compiled.items() if str(name).startswith(("('step'", "('round'")))
    predicted, rounds = float(plan_costs(machine, [plan], write_outs).seconds[0]), {}
    if plan.drafting is not None and acceptance is not None:
        drafts, taken = plan.drafting.most, float(result.tokens_per_pass.mean())
        if drafter == "made_up":
            predicted = round_cost(machine, plan).check
        rounds = {
            "drafts": drafts,
            "drafter": f"{drafter}, adapting" if adapt else drafter,
            "acceptance": acceptance,
            "tokens_per_pass": taken,
            "ms_per_token": 1e3 * sum(result.step_seconds) / (new - 1) if adapt else times["median_ms"] / taken,
            "predicted_ms_per_token": predicted * 1e3 / tokens_per_round(drafts, acceptance),
        }
        times["tokens_per_second"] *= taken
    return Row(
        model=plan.shape.name,
        **dataclasses.asdict(plan.workload),
        asked=asked,
        plan=plan.name,
        codec=", ".join(plan.codecs),
        dtype=plan.shape.dtype,
        weights="device" if hosted == 0 else "host" if hosted == 1 else f"{hosted:.3g}",
        groups=plan.groups,
        order=plan.order,
        device_budget=device_budget,
        predicted_ms=predicted * 1e3,
        link_bytes=link_bytes,
        predicted_bytes=plan.link_bytes(write_outs),
        link_efficiency=link_rate / copy_bytes_per_second if link_bytes else None,
        peak_device_bytes=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        temp_bytes=program.temp_bytes,
        compile_s=program.seconds,
        prefill_s=result.prefill_seconds,
        programs=len(decoder.compiled),
        **times,
        **rounds,
    )


def table(rows: list[Row]) -> str:
    """The rows for a terminal, in Markdown."""
    return tables.table(
        rows,
        ("model", "{0.model}".format),
        ("batch", "{0.batch}".format),
        ("prompt", "{0.prompt}".format),
        ("plan", "{0.plan}".format),
        ("codec", "{0.codec}".format),
        ("median ms", "{0.median_ms:.2f}".format),
        ("predicted", "{0.predicted_ms:.2f}".format),
        ("p95", "{0.p95_ms:.2f}".format),
        ("worst", "{0.worst_ms:.2f}".format),
        ("link GB", lambda row: f"{(row.link_bytes or 0) / 1e9:.2f}"),
        ("efficiency", lambda row: "-" if row.link_efficiency is None else f"{row.link_efficiency:.3f}"),
        ("tokens/s", "{0.tokens_per_second:.0f}".format),
        ("temp GB", lambda row: f"{(row.temp_bytes or 0) / 1e9:.2f}"),
        ("compile s", "{0.compile_s:.1f}".format),
        ("prefill s", "{0.prefill_s:.2f}".format),
        ("drafts", lambda row: f"{row.drafts} {row.drafter}" if row.drafts else "-"),
        ("tokens a pass", lambda row: f"{row.tokens_per_pass:.2f} ({row.acceptance:g})" if row.drafts else "1"),
        ("ms a token", lambda row: f"{row.ms_per_token:.2f}" if row.drafts else f"{row.median_ms:.2f}"),
        ("predicted", lambda row: f"{row.predicted_ms_per_token:.2f}" if row.drafts else f"{row.predicted_ms:.2f}"),
    )


# --- the command ------------------------------------------------------------------------------------------------------


def main(given: flags.FlagValues) -> None:
    workloads = script.workloads(given.batch, given.prompt, given.new)
    window = script.window_bytes(given.window_mib)
    shape = dataclasses.replace(models.preset(given.model).shape, dtype=given.dtype)
    tables.check_out(given.out, "link_efficiency")
    if given.copy_gib * GIB > memory.total_host_bytes():
        there = format_bytes(memory.total_host_bytes())
        raise ValueError(f"--copy_gib is {given.copy_gib:g}: this machine has {there} of host memory, give less")
    budget = kvrecomp.Budget.of_gib(given.device_memory_gib, given.host_memory_gib)
    plan_for = functools.partial(
        kvrecomp.plan_for, budget=budget, groups=given.groups, order=given.order, tail=given.tail, window=window
    )
    # Mistakes are said before the weights are made, and what is pinned is limited before there is a backend.
    drafts, acceptance = read_drafts(given.drafts, given.drafters), read_acceptance(given.acceptance)
    asked = [
        read_plan(word, budget)._replace(drafting=drafting, drafter=drafter)
        for word in script.names("plans", given.plans)
        for drafting, drafter in drafts
    ]
    choose_weights = given.weights == AUTO  # once, for all plans
    if choose_weights and any(plan.word != plan.plan for plan in asked):
        raise ValueError(f"--weights={AUTO} goes by --device_memory_gib: leave the GiB of {AUTO}:F out")
    if choose_weights and len(workloads) > 1:
        raise ValueError(f"--weights={AUTO} chooses for one workload: give one --batch and one --prompt")
    weights: tuple[Memory, ...] = named_weights("host" if choose_weights else given.weights, len(shape.layers))
    names = {"device", *(plan.plan for plan in asked)}
    if AUTO in names:  # it may keep the cache in either form
        names = names - {AUTO} | {"keys_values", "activations"}
    plans = [plan_for(name, shape, workload, weights=weights) for workload in workloads for name in names]
    hosted = max(sum(kvrecomp.memory_needed(plan)["host"].values()) for plan in plans)
    memory.limit_pinned(max(given.copy_gib * GIB, min(hosted, budget.host or math.inf)))
    if choose_weights:
        with machine_lock.exclusive():  # for a machine that was never measured
            machine = kvrecomp.profile()
        weights = tuple(layer.weights for layer in plan_for(AUTO, shape, workloads[0], profile=machine).layers)
    for plan in asked:
        check_weights(shape, weights, limits(plan.budget))
    if asked[0].plan != AUTO:  # whether `auto` fits is known when the machine is
        first = plan_for(asked[0].plan, shape, workloads[0], weights=weights)
        check_within(first, limits(budget))
    sharding = kvrecomp.placement(plan_for("device", shape, workloads[0], weights=weights))  # the same for all plans
    with machine_lock.shared():
        model = models.create(given.model, dtype=given.dtype, seed=given.seed, sharding=sharding)
    with machine_lock.exclusive():
        rate = copy_rate(256 * MIB, max(2, int(given.copy_gib * 4)), repeats=3)
        timed = model if given.time_layers else None
        batches = sorted({workload.batch for workload in workloads})
        machines = {batch: kvrecomp.profile(timed, batch=batch) for batch in batches}

    waiting = []
    for workload in workloads:
        machine = machines[workload.batch]
        for plan in asked:
            loss = given.loss if plan.plan == AUTO else "none"
            options = {"profile": machine, "budget": plan.budget, "drafting": plan.drafting, "loss": loss}
            make_plan = functools.partial(plan_for, plan.plan, model.shape, workload, weights=weights, **options)
            waiting.append((make_decoder(model, plan.budget, make_plan), plan, machine))
    with machine_lock.shared():
        side_by_side(compile_first, [(decoder, plan.drafter) for decoder, plan, _ in waiting])
    rows, about, document = [], run_info(given.commit), {}
    while waiting:
        decoder, plan, machine = waiting.pop(0)
        if isinstance(decoder, PlanError):
            raise decoder
        options = {"drafter": plan.drafter, "acceptance": acceptance, "adapt": given.adapt}
        rows += measure(decoder, plan.word, plan.budget.device, machine, rate, given.seed, given.steps, **options)
        del decoder
        gc.collect()  # a decoder's cache is gone before the next one's is made
        document = about | {"copy_gbps": rate / 1e9, "rows": [dataclasses.asdict(row) for row in rows]}
        if given.out:
            write_json(given.out, document)  # what was measured is not lost with what comes after
    print(f"decode steps; copies alone reach {rate / 1e9:.1f} GB/s")
    terminal.show(terminal.standard_output(), table(rows))
    print(json.dumps(document))


if __name__ == "__main__":
    script.run(main, define_flags)
