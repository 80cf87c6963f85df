"""A plan as tasks: what a step does, in the order of compute, as arrays.

Each task computes or awaits a copy. What it takes is in a table of seconds by kind of work (`predict.cost`): WORKS of
each distinct layer shape, then what is outside layers, then FURTHER of each layer shape.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from kvrecomp.plan import BlockSpec, Codec, LayerPlan, LayerShape, Plan
from kvrecomp.plan.step_order import DRAFT_PARTS, START, TAIL, Op, StepOrder, step_order
from kvrecomp.predict.hardware import WORKS, Attention, Work, attention_work, project_work

PLANS, KINDS, TASKS = 64, 64, 1024  # of what is predicted in one call; of the last two at least
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
    (work, tokens, blocks, copies, copy_bytes, times), counts = distinct_tasks(part, order, write_outs)
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


def distinct_tasks(part: Part, order: StepOrder, write_outs: int) -> tuple[np.ndarray, list[np.ndarray]]:
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
    columns, counts = distinct_tasks(draft, order, write_outs)
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
