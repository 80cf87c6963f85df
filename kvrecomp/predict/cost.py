"""The cost of a step: seconds predicted from a profile, by the recurrence of the pipeline that the runtime executes.

A step is a list of tasks in the order of compute, each of which computes or awaits a copy. Copies are carried out one
after the other, each held until an earlier task has ended (`hold`). With c seconds of a copy and g of compute,

    awaiting:   copied_i = max(copied_{i-1}, ended_{hold_i} + d) + c_i
                ended_i = max(computed_{i-1}, copied_i)       computed_i = max(computed_{i-1} + g_i, copied_i + d)
    computing:  ended_i = computed_i = computed_{i-1} + g_i

where d is the time of a handoff: from link or compute to the link, and from the link to compute that waits for it.
Seconds of compute are those measured on the machine for the layer, dtype and batch at hand or, where there are none,
of `estimate`; awaiting takes the end of a CUDA graph. What further tokens of a row add is estimated (`further_tokens`).

A round is its drafts, one after the other, and the step that checks them; or that step with drafts among its tasks.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvrecomp.plan import ModelShape, Plan, PlanError, Workload
from kvrecomp.predict.estimate import further_logits, further_tokens, layer_times
from kvrecomp.predict.hardware import ATTENTION, WORKS, Curve, HardwareProfile, project_work
from kvrecomp.predict.tasks import FURTHER, PLANS, Part, Tasks, distinct_tasks, make_tasks, parts_of, stack_tasks

MOST_LENGTHS = 4  # of a cache that grows, for which a step is predicted


class WorkTable(NamedTuple):
    """Seconds of compute: WORKS of each distinct layer shape, then outside layers, then FURTHER of each layer shape.

    `base` float64[rows] is what no tokens take; `sizes` and `added` float64[rows, KNOTS] are the knots of what tokens
    add, of work on weights other groups.
    """

    base: np.ndarray
    sizes: np.ndarray
    added: np.ndarray


class StepCost(NamedTuple):
    """Predicted seconds of a step, of its copies alone and of its compute alone."""

    seconds: Any  # arrays of jax's or of NumPy's, or a number of one plan
    copying: Any
    computing: Any


# --- seconds of compute -----------------------------------------------------------------------------------------------


def work_table(profile: HardwareProfile, shape: ModelShape, workload: Workload) -> WorkTable:
    """The table of that model and workload; layers that were not timed are estimated."""
    curves: list[Curve] = []
    further: list[Curve] = []
    outside = None
    for layer in shape.distinct_layers:
        times = layer_times(profile, layer, shape, workload.batch)
        if times.dtype and times.vocab in (None, shape.vocab):
            outside = times.outside
        # Rows of another group read no weights again; they add, at most, their arithmetic at the rate of products.
        products = {project_work(kind): layer.projecting for kind in ATTENTION}
        products |= {"project_absorb": layer.projecting - layer.absorbed, "finish": layer.parameters - layer.projecting}
        for work in WORKS:
            curve = times.work[work]
            if work in products:
                curve = Curve.line(curve(0), 2 * workload.batch * products[work] / profile.matmul_rate)
            curves.append(curve)
        more = further_tokens(profile, layer, shape.itemsize, workload.batch)
        further += [more[work] for work in FURTHER]
    if outside is None:
        table_bytes = shape.vocab * shape.embedding * shape.itemsize
        outside = table_bytes / profile.memory_rate + 10 * profile.kernel_seconds
    each = further_logits(profile, shape, workload.batch)
    sizes, seconds = np.array([curve.knots for curve in (*curves, Curve.line(outside, each), *further)]).swapaxes(0, 1)
    base = seconds[:, :1]
    return WorkTable(base[:, 0], sizes, seconds - base)


# --- seconds of a step ------------------------------------------------------------------------------------------------


def step_seconds(profile: HardwareProfile, shape: ModelShape, workload: Workload, plan_arrays: Tasks) -> StepCost:
    """Predicted seconds of a step for each of the plans in `plan_arrays` (`stack_tasks`): float32[plans] each.

    A copy takes the link's latency and its bytes at the rate measured beside compute. Computed on the CPU, PLANS at a
    time; compiled once per number of tasks and of their kinds.
    """
    computing, copying = _seconds_of_kinds(profile, work_table(profile, shape, workload), *plan_arrays[:6])
    arrays = computing, copying, plan_arrays.copies > 0, plan_arrays.kind, plan_arrays.hold
    found: list[StepCost] = []
    with jax.default_device(_cpu()), jax.disable_jit(False):  # step by step it takes for ever
        handoff = jax.device_put(np.float32(profile.handoff_seconds))
        for start in range(0, len(computing), PLANS):
            part = jax.device_put([column[start : start + PLANS] for column in arrays])
            found.append(_step_seconds(handoff, *part))
        return StepCost(*map(np.concatenate, zip(*jax.device_get(found))))


def _cpu() -> Any:
    """A scan of small numbers is slow on a GPU, and would wait for the model there."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # jax was told to use the GPU alone
        return None


@jax.jit
def _step_seconds(handoff: Array, *plans: Array) -> StepCost:
    return jax.vmap(functools.partial(_pipeline, handoff))(*plans)


def _pipeline(
    handoff: Array, computing: Array, copying: Array, has_copy: Array, kinds: Array, holds: Array
) -> StepCost:
    """The recurrence over one plan's tasks."""

    def advance(carry, task):
        copied, computed, ends = carry
        number, compute, copy, awaits, hold = task
        held = jnp.where(hold < 0, 0.0, ends[hold] + handoff)
        copied = jnp.where(awaits, jnp.maximum(copied, held) + copy, copied)
        ended = jnp.where(awaits, jnp.maximum(computed, copied), computed + compute)
        computed = jnp.where(awaits, jnp.maximum(computed + compute, copied + handoff), ended)
        return (copied, computed, ends.at[number].set(ended)), None

    computing, copying, has_copy = (column[kinds] for column in (computing, copying, has_copy))
    count, zero = kinds.shape[0], jnp.zeros(())
    tasks = jnp.arange(count), computing, copying, has_copy, holds
    (_, seconds, _), _ = jax.lax.scan(advance, (zero, zero, jnp.zeros(count)), tasks)
    return StepCost(seconds, copying.sum(), computing.sum())


def _seconds_of_kinds(
    profile: HardwareProfile,
    table: WorkTable,
    work: np.ndarray,
    tokens: np.ndarray,
    blocks: np.ndarray,
    copies: np.ndarray,
    copy_bytes: np.ndarray,
    times: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """What each kind of task computes, and what the copy that it awaits takes, float32[..., kinds]; see `Tasks`."""
    sizes, added = table.sizes[work], table.added[work]
    after = np.clip(np.sum(sizes < tokens[..., None], axis=-1, keepdims=True), 1, sizes.shape[-1] - 1)
    (x0, y0), (x1, y1) = (
        [np.take_along_axis(knots, end, -1)[..., 0] for knots in (sizes, added)] for end in (after - 1, after)
    )
    computing = table.base[work] * blocks + y0 + (tokens - x0) * (y1 - y0) / (x1 - x0)
    copying = profile.to_device.base * copies + copy_bytes / profile.beside_compute
    return (times * np.maximum(0, computing)).astype(np.float32), (times * copying).astype(np.float32)


def plan_costs(profile: HardwareProfile, plans: Sequence[Plan], write_outs: int | None = None) -> StepCost:
    """Predicted seconds of a step of all groups of each plan, all for one model and workload, float32[plans].

    `write_outs` None: half way through the new tokens, as the median step of a run.
    """
    lengths = [median_write_outs(plan) if write_outs is None else write_outs for plan in plans]
    return _costs(profile, list(zip(plans, lengths)))


def mean_costs(profile: HardwareProfile, plans: Sequence[Plan]) -> StepCost:
    """Predicted seconds of the mean of all of the workload's steps, of all groups of each plan, float32[plans].

    A cache that grows out of the device makes later steps longer, which the step half way does not show.
    """
    costs = _costs(profile, [(plan, write_outs) for plan in plans for write_outs in step_shares(plan)])
    return StepCost(*(_means(plans, seconds) for seconds in costs))


def mean_bounds(profile: HardwareProfile, plans: Sequence[Plan]) -> np.ndarray:
    """Seconds that the mean of `mean_costs` is no shorter than, float[plans]: all copies, or all compute, of each step.

    Takes a fraction of the time that `mean_costs` does.
    """
    shape, workload = _one_work(plans)
    columns: list[np.ndarray] = []
    often: list[np.ndarray] = []  # how many layers have each kind of task, and for how many groups in turn
    for plan in plans:
        for write_outs in step_shares(plan):
            for part in parts_of(plan):
                order = part.order(write_outs)
                tasks, counts = distinct_tasks(part, order, write_outs)
                columns.append(tasks)
                counts = np.repeat([*np.bincount(order.numbers), 1], [*map(sum, counts), 1])
                often.append(counts * part.times * (plan.groups // plan.groups_per_pass))
    work, *others = np.concatenate(columns, axis=1)
    seconds = _seconds_of_kinds(profile, work_table(profile, shape, workload), work.astype(int), *others)
    starts = list(itertools.accumulate(map(len, often[:-1]), initial=0))
    sums = np.add.reduceat(np.array(seconds, float) * np.concatenate(often), starts, axis=1)
    return _means(plans, _of_rounds([plan for plan in plans for _ in step_shares(plan)], sums.max(axis=0)))


def _of_rounds(plans: Sequence[Plan], seconds: np.ndarray) -> np.ndarray:
    """Sums over the parts of each plan's round, of seconds of these."""
    counts = [len(parts_of(plan)) for plan in plans]
    return np.add.reduceat(seconds, list(itertools.accumulate(counts[:-1], initial=0)))


def _means(plans: Sequence[Plan], seconds: np.ndarray) -> np.ndarray:
    """The mean of each plan's steps, whose seconds are those of its `step_shares`, plan by plan."""
    shares = [step_shares(plan) for plan in plans]
    weights = np.array([share for plan in shares for share in plan.values()], seconds.dtype)
    return np.add.reduceat(weights * seconds, list(itertools.accumulate(map(len, shares[:-1]), initial=0)))


def _costs(profile: HardwareProfile, steps: Sequence[tuple[Plan, int]]) -> StepCost:
    """Predicted seconds of a step, or a round, of all groups of each plan, after so many write-outs."""
    shape, workload = _one_work([plan for plan, _ in steps])
    parts = [(part, write_outs) for plan, write_outs in steps for part in parts_of(plan)]
    costs = step_seconds(profile, shape, workload, stack_tasks([make_tasks(*each) for each in parts]))
    often = np.array([part.times * (part.plan.groups // part.plan.groups_per_pass) for part, _ in parts])
    plans = [plan for plan, _ in steps]
    return StepCost(*(_of_rounds(plans, seconds[: len(parts)] * often) for seconds in costs))


class RoundCost(NamedTuple):
    """Predicted seconds of a step that checks nothing, of one that checks as many drafts as there may be, and what a
    draft adds: under copies, in the mean of as many."""

    step: float
    check: float
    draft: float


def round_cost(profile: HardwareProfile, plan: Plan) -> RoundCost:
    """Of the plan, which has drafts, half way through the new tokens; see `plan_costs`."""
    most = plan.tokens_per_step - 1
    parts = [Part(1, plan), Part(1, plan, 1 + most), *parts_of(plan)]
    tasks = stack_tasks([make_tasks(part, median_write_outs(plan)) for part in parts])
    seconds = step_seconds(profile, plan.shape, plan.workload, tasks).seconds[: len(parts)].tolist()
    passes = plan.groups // plan.groups_per_pass
    step, check, *of_round = (passes * part.times * each for part, each in zip(parts, seconds, strict=True))
    return RoundCost(step, check, max(0.0, sum(of_round) - check) / most)


def _one_work(plans: Sequence[Plan]) -> tuple[ModelShape, Workload]:
    """The model and workload of all these plans."""
    shape, workload = plans[0].shape, plans[0].workload
    if any((plan.shape, plan.workload) != (shape, workload) for plan in plans):
        raise PlanError("the plans are for different models or workloads; predict them one by one")
    return shape, workload


def median_write_outs(plan: Plan, new: int | None = None) -> int:
    """How often the tail was written out when half of the new tokens are there, the plan's or so many."""
    return min(plan.write_outs, (plan.workload.new if new is None else new) // 2 // plan.tail)


def step_shares(plan: Plan) -> Mapping[int, float]:
    """Which share of the workload's steps is taken after so many write-outs.

    Of up to MOST_LENGTHS, at even distances: where there are more, a step between two counts for both, the more for the
    nearer one, as if its seconds were on the line between theirs.
    """
    return _step_shares(max(1, plan.workload.new - 1), plan.tail)


@functools.cache
def _step_shares(steps: int, tail: int) -> Mapping[int, float]:
    counts = np.array([min(tail, steps - start) for start in range(0, steps, tail)])
    every = np.arange(len(counts))
    chosen = np.unique(np.linspace(0, every[-1], min(MOST_LENGTHS, len(every))).round().astype(int))
    near = [counts @ np.interp(every, chosen, unit) for unit in np.eye(len(chosen))]
    return {int(write_outs): float(count) / steps for write_outs, count in zip(chosen, near)}
