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
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvrecomp.plan import BlockSpec, Codec, LayerPlan, LayerShape, ModelShape, Plan, PlanError, Workload
from kvrecomp.plan.step_order import DRAFT_PARTS, START, TAIL, Op, StepOrder, step_order
from kvrecomp.predict.estimate import further_logits, further_tokens, layer_times
from kvrecomp.predict.hardware import (
    ATTENTION,
    WORKS,
    Attention,
    Curve,
    HardwareProfile,
    Work,
    attention_work,
    project_work,
)

PLANS, KINDS, TASKS = 64, 64, 1024  # of what is predicted in one call; of the last two at least
MOST_LENGTHS = 4  # of a cache that grows, for which a step is predicted
OWN_GROUPS, SHARED_GROUPS = 2, 12  # see `_groups`

Further = Literal["keys_values", "absorb", "prepare"]
"""What tokens of a row beside the first add to that work, by cached tokens and by blocks from the host."""
FURTHER: tuple[Further, ...] = get_args(Further)

# Times as long as over plain blocks that attention over those with loss takes: of W1 a draft over fp8 took 8.7 ms on an
# H200, over int4 13.1, where one over plain activations would take 11.4. Of a layer with 16 x 1024 activations it took
# 90 us there plain, 57 in fp8, 130 in int4 and 164 in int8 (h200_with_loss.txt).
READ_TIMES: Mapping[Codec, float] = {"fp8": 0.5, "int8": 1.8, "int4": 1.4}


class Tasks(NamedTuple):
    """A plan as arrays: what a step does.

    Of each kind of task, [..., kinds]: `work` int32 is the row of the `WorkTable`, `tokens` the size there and `blocks`
    what its base is multiplied with; work on weights has other groups than the first in place of tokens. `copies`
    counts the blocks awaited, none or one, of `copy_bytes`. `times` is how often all of that is done, as one. Layers
    alike have tasks of the same kinds.

    Of each task, in the order of compute, int32[..., tasks]: its `kind`, and as `hold` the task whose end lets the copy
    start, -1 for the start of the step.
    """

    work: np.ndarray
    tokens: np.ndarray
    blocks: np.ndarray
    copies: np.ndarray
    copy_bytes: np.ndarray
    times: np.ndarray
    kind: np.ndarray
    hold: np.ndarray


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


# --- a plan as tasks --------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A step of a round: how often it is taken, its plan, how many tokens of a row go through it, and how many drafts
    of another group are made meanwhile."""

    times: int
    plan: Plan
    checked: int = 1
    drafts: int = 0

    def order(self, write_outs: int) -> StepOrder:
        """That of the step, after that many write-outs: of one group where each takes its own."""
        return step_order(self.plan, write_outs, groups=len(_groups(self.plan)), drafts=self.drafts > 0)


def parts_of(plan: Plan) -> list[Part]:
    """The steps of a round, or the step, of the plan."""
    most = plan.tokens_per_step - 1
    if plan.sketched is None:
        return [Part(1, plan, 1 + most)]
    if plan.drafts_under_copies:
        return [Part(1, plan, 1 + most, most)]
    return [Part(1, plan, 1 + most), Part(most, plan.sketched)]


def make_tasks(part: Part, write_outs: int = 0) -> Tasks:
    """The tasks of one such step, after that many write-outs."""
    order = part.order(write_outs)
    (work, tokens, blocks, copies, copy_bytes, times), counts = _distinct_tasks(part, order, write_outs)
    # What layers alike have in common is there once; `kind` lays it out for every layer.
    starts = np.cumsum([0, *map(sum, counts)])
    kinds = [np.arange(start, end) for start, end in itertools.pairwise(starts.tolist())]
    kind = np.concatenate([*(kinds[number] for number in order.numbers), starts[-1:]]).astype(np.int32)
    last = np.cumsum(np.concatenate([counts[number] for number in order.numbers])) - 1  # task of each operation
    hold = np.full(len(kind), START, np.int32)
    hold[last[order.copies]] = np.append(last, START)[order.waits_for]
    return Tasks(work.astype(np.int32), tokens, blocks, copies, copy_bytes, times, kind, hold)


class Task(NamedTuple):
    """A column of `Tasks` by kind of task."""

    work: int
    tokens: int = 0
    blocks: int = 1
    copies: int = 0
    copy_bytes: int = 0
    times: float = 1.0


def _groups(plan: Plan) -> list[float]:
    """Of the groups that go through a layer together, for how many each of those in the prediction stands.

    All are alike. Where they are many, the first and the last ones stand for themselves, since there copies of weights
    and of the layers before and after are under way; the others' tasks are few that take the longer.
    """
    groups, shared = plan.groups_per_pass, plan.groups_per_pass - 2 * OWN_GROUPS
    if shared <= SHARED_GROUPS:
        return [1.0] * groups
    own = [1.0] * OWN_GROUPS
    return [*own, *[shared / SHARED_GROUPS] * SHARED_GROUPS, *own]


def _distinct_tasks(part: Part, order: StepOrder, write_outs: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The tasks of each distinct layer in the order, and then what a step does outside of layers (embedding,
    unembedding and sampling), as columns float64[6, kinds]; and how many each operation of each layer has."""
    plan, shapes, kinds = part.plan, list(part.plan.shape.distinct_layers), list(part.plan.distinct_layers)
    drafts = _draft_tasks(part, write_outs) if part.drafts else []
    layers = []
    for number, ops in enumerate(order.layers):
        layer, shape = kinds[plan.distinct_numbers[order.numbers.index(number)]]
        layers.append(_layer_tasks(plan, layer, shape, shapes.index(shape), ops, write_outs, part.checked, drafts))
    # In tokens it counts those that are checked beside the first.
    outside = Task(len(shapes) * len(WORKS), (part.checked - 1) * plan.groups_per_pass, plan.groups_per_pass)
    columns = np.array([*(task for layer in layers for op in layer for task in op), outside], float).T
    return columns, [np.array(list(map(len, layer))) for layer in layers]


def _draft_tasks(part: Part, write_outs: int) -> list[Task]:
    """What one of the DRAFT_PARTS has of the drafts: the tasks of these, of all layers, as if they were fewer."""
    draft = Part(part.drafts, part.plan.sketched or part.plan)
    order = draft.order(write_outs)
    columns, counts = _distinct_tasks(draft, order, write_outs)
    often = np.repeat([*np.bincount(order.numbers), 1], [*map(sum, counts), 1]) * part.drafts / DRAFT_PARTS
    work, tokens, blocks, copies, copy_bytes, times = columns
    return [Task(*task) for task in zip(work, tokens, blocks, copies, copy_bytes, times * often)]


def _layer_tasks(
    plan: Plan,
    layer: LayerPlan,
    shape: LayerShape,
    shape_number: int,
    ops: Sequence[Op],
    write_outs: int,
    checked: int,
    drafts: list[Task],
) -> list[list[Task]]:
    """The tasks of each of a layer's operations."""
    tail = layer.tail_block(plan.room)
    blocks = shape.in_sight(layer.blocks(write_outs, plan.tail))
    # Tokens of a row that go through the projections and the feed-forward with the first, and groups alike.
    beside = plan.groups_per_pass * checked - 1

    groups = _groups(plan)

    def task(work: Work, *sizes: int) -> Task:
        return Task(shape_number * len(WORKS) + WORKS.index(work), *sizes)

    def further(work: Further, tokens: int, blocks: int = 1) -> list[Task]:
        after = 1 + len(plan.shape.distinct_layers) * len(WORKS) + shape_number * len(FURTHER)
        more = checked - 1
        return [Task(after + FURTHER.index(work), more * tokens, more * blocks)] if more else []

    def attention(block: BlockSpec) -> Attention:
        return "keys_values" if block.form == "keys_values" else layer.method

    def unpack(place: int) -> list[Task]:
        if place == TAIL or blocks[place].codec != "packed":
            return []
        numbers = blocks[place].tokens * shape.width(blocks[place].form)
        return [task("unpack", numbers // shape.width("activations"))]

    def attend(place: int) -> list[Task]:
        if place == TAIL:  # but for its tokens it is in the time of `project`; what an odd number costs is not known
            over = "absorb" if attention(tail) == "absorb" else "keys_values"
            return [task(attention_work(attention(tail), "device"), tail.tokens, 0), *further(over, tail.tokens)]
        block = blocks[place]
        work = attention_work(attention(block), block.memory, block.tokens)
        over = "absorb" if attention(block) == "absorb" else "keys_values"
        more = further(over, block.tokens, block.memory == "host")
        slower = READ_TIMES.get(block.codec, 1.0)
        if block.memory == "device" and attention(block) != attention(tail):
            # It has a partial result of its own, as a block from the host has.
            own = [task(attention_work(attention(block), "host"), 0, 1), task(work, block.tokens, 0)]
        else:
            own = [task(work, block.tokens, 1)]
        return [*(each._replace(times=slower) for each in own), *more]

    def tasks(op: Op) -> list[Task]:
        match op.kind:
            case "draft":
                return drafts
            case "copy":
                return [task("await", 0, 1, 1, op.nbytes)]
            case "project":
                return [task(project_work(attention(tail)), beside)]
            case "append":
                absorbs = "absorb" in map(attention, (*blocks, tail))
                return [task("prepare"), *further("prepare", 0)] if absorbs else []
            case "attend":
                return [found for place in op.blocks for found in (*unpack(place), *attend(place))]
            case "finish":
                return [task("finish", beside)]

    def of_all(op: Op) -> list[Task]:
        of_group = op.kind in ("append", "attend") or (op.kind == "copy" and not op.copies_weights)
        often = groups[op.group] if of_group else 1.0
        return [found._replace(times=often * found.times) for found in tasks(op)]

    return list(map(of_all, ops))


def stack_tasks(tasks: Sequence[Tasks]) -> Tasks:
    """Tasks of several plans as one, [plans, kinds] and [plans, tasks], filled up with what takes no time.

    Filled to multiples of PLANS, and to KINDS and TASKS, or a power of four times these, so that few shapes, and so few
    compilations, occur.
    """
    plans = -(-len(tasks) // PLANS) * PLANS
    kinds, longest = KINDS, TASKS
    while kinds < 1 + max(len(plan.work) for plan in tasks):  # the last one of each plan takes no time
        kinds *= 4
    while longest < max(len(plan.kind) for plan in tasks):
        longest *= 4

    def stack(name: str, *columns: np.ndarray) -> np.ndarray:
        dtype, size = (np.int32, longest) if name in ("kind", "hold") else (columns[0].dtype, kinds)
        filled = np.full((plans, size), kinds - 1 if name == "kind" else 0, dtype)
        for row, column in zip(filled, columns):
            row[: len(column)] = column
        return filled

    return Tasks(*map(stack, Tasks._fields, *tasks))


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
                tasks, counts = _distinct_tasks(part, order, write_outs)
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
