"""The order of a step, as data: what is copied, what is computed, and what each copy waits for.

A step goes through the layers once. In a layer with weights and a block in host memory, under one group of rows:

    copy project's weights    to the device, one operation a matrix
    project                   Q, K and V of the new tokens
    append                    K and V, or the activations, of the new tokens to the group's tail
    attend (0, TAIL)          to the tail and the blocks on the device, as one
    copy (1,)                 a block in host memory
    attend (1,)               to that block; its memory is free then
    copy the others' weights
    finish                    output projection and feed-forward; the memory of the layer's weights is free then

With drafts of another group, made while blocks are on their way, there are DRAFT_PARTS operations `draft`, as far apart
as they can be, each before a layer's others.

The runtime carries the operations out, the cost function clocks them, the footprint takes their high-water mark.

Operations of compute follow one another. Copies do so on the link, in the order of their use, and each waits for
earlier operations to end. In a pipeline at most COPIES_IN_FLIGHT copies are on their way, and at most the plan's window
of bytes is on its way or in use; with drafts, which take longer than a few copies, the window alone counts. Layer by
layer (KVPR's schedule) one copy is on its way, and a layer's first waits for the layer before.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from kvrecomp.plan.layout import LayerPlan, Plan, Schedule
from kvrecomp.plan.shapes import LayerShape

COPIES_IN_FLIGHT = 2  # as many as XLA keeps where it is not told otherwise; see run/schedule.py
# More groups hold no more at once: a copy starts when that before the last one is in use, so there is something of so
# many groups at most.
GROUPS_AT_ONCE = COPIES_IN_FLIGHT + 1
DRAFT_PARTS = 3  # each is compiled; what is on its way, a window's bytes, is to last as long as the drafts of one
TAIL = -1  # among the blocks that an operation attends to
START = -1  # what a copy waits for that may start with the step

Kind = Literal["copy", "project", "append", "attend", "finish", "draft"]

Matrices = tuple[tuple[int, ...], tuple[int, ...]]
"""Bytes of a layer's matrices in host memory, in the order of use: those used up to its attention, and after it."""


class Op(NamedTuple):
    """One operation of a layer.

    `blocks` are places among the layer's blocks in sight: those attended to, or the one that is copied; none where
    weights are copied. `nbytes` is what is copied, and `frees` how many bytes of earlier copies nothing needs any more
    once this operation has ended.
    """

    kind: Kind
    group: int = 0
    blocks: tuple[int, ...] = ()
    nbytes: int = 0
    frees: int = 0

    @property
    def label(self) -> str:
        """What a trace calls it, within its layer."""
        return "_".join(map(str, (self.kind, self.group, *self.blocks))).replace("-1", "tail")

    @property
    def copies_weights(self) -> bool:
        return self.kind == "copy" and not self.blocks


@dataclass(frozen=True)
class LayerOrder:
    """A layer's operations, numbered from its first, which is number `first` of the step.

    When operation n has ended, with some result, the copies `ties[n]` are tied to that result, and those in `starts[n]`
    start. They may be of later layers. Layers that are equal do the same, wherever they are in the step.
    """

    ops: tuple[Op, ...]
    ties: tuple[tuple[int, ...], ...]
    starts: tuple[tuple[int, ...], ...]
    first: int = field(compare=False)

    @property
    def drafts(self) -> int:
        """How many parts of drafts come before the layer."""
        return sum(op.kind == "draft" for op in self.ops)


@dataclass(frozen=True, eq=False)
class StepOrder:
    """The operations of all layers, numbered in the order of compute; a copy comes where its array is used.

    `layers` has each distinct layer's operations, and `numbers` says which of these each layer of the model has. Of
    each copy, in order, int[copies]: `copies` is its number; `waits_for` that of the operation that has to end before
    it may start, or START; `computed` that of the last operation of compute up to there, since a copy of weights that
    has arrived depends on none. `high_water` is the most bytes on their way or in use at once.
    """

    layers: tuple[tuple[Op, ...], ...]
    numbers: tuple[int, ...]
    copies: np.ndarray
    waits_for: np.ndarray
    computed: np.ndarray
    high_water: int

    def __iter__(self) -> Iterator[tuple[int, Op]]:
        return enumerate(itertools.chain.from_iterable(self.layers[number] for number in self.numbers))

    @property
    def at_start(self) -> list[int]:
        """The copies that start with the step."""
        return self.copies[self.waits_for == START].tolist()

    def of_layers(self) -> list[LayerOrder]:
        """The operations of each layer, with the copies that wait for them."""
        ties: dict[int, list[int]] = collections.defaultdict(list)
        starts: dict[int, list[int]] = collections.defaultdict(list)
        for copy, waits_for, computed in zip(self.copies.tolist(), self.waits_for.tolist(), self.computed.tolist()):
            starts[waits_for].append(copy)
            for op in {waits_for, computed}:
                ties[op].append(copy)
        orders, first = [], 0
        for number in self.numbers:
            ops = self.layers[number]
            tied, started = (
                tuple(tuple(copy - first for copy in copies[op]) for op in range(first, first + len(ops)))
                for copies in (ties, starts)
            )
            orders.append(LayerOrder(ops, tied, started, first))
            first += len(ops)
        return orders


def step_order(
    plan: Plan,
    write_outs: int = 0,
    matrices: Sequence[Matrices] | None = None,
    groups: int | None = None,
    drafts: bool = False,
) -> StepOrder:
    """The order of a step of the groups that go through the layers together, after that many write-outs of the tail,
    with `drafts` between the layers or without.

    `matrices` has each layer's weights in host memory, by default what its shape says. `groups` None: as many as the
    plan has; the order grows with them.
    """
    groups = plan.groups_per_pass if groups is None else groups
    kinds = list(plan.distinct_layers)
    if matrices is None:
        of_kinds = [_matrices(plan, *kind) for kind in kinds]
        matrices = [of_kinds[number] for number in plan.distinct_numbers]
    parts = [0] * len(matrices)
    for part in range(DRAFT_PARTS if drafts else 0):
        parts[part * len(parts) // DRAFT_PARTS] += 1
    found: dict[tuple[int, Matrices, int], int] = {}
    numbers = [found.setdefault(kind, len(found)) for kind in zip(plan.distinct_numbers, matrices, parts, strict=True)]
    layers = tuple(
        (Op("draft"),) * parts + _layer_order(plan, *kinds[number], sizes, write_outs, groups)
        for number, sizes, parts in found
    )
    return order_layers(layers, numbers, plan.whole_window, plan.schedule, None if drafts else COPIES_IN_FLIGHT)


def high_water(plan: Plan, write_outs: int = 0) -> int:
    """That of the step's order, which takes no longer to find for many groups."""
    groups = min(plan.groups_per_pass, GROUPS_AT_ONCE)
    return step_order(plan, write_outs, groups=groups, drafts=plan.drafts_under_copies).high_water


def _matrices(plan: Plan, layer: LayerPlan, shape: LayerShape) -> Matrices:
    """What the layer's shape says of its weights in host memory."""
    if layer.weights == "device":
        return (), ()
    before, after = ([count * plan.shape.itemsize for count in counts] for counts in shape.matrices)
    return tuple(before), tuple(after)


def _layer_order(
    plan: Plan, layer: LayerPlan, shape: LayerShape, matrices: Matrices, write_outs: int, groups: int
) -> tuple[Op, ...]:
    """The operations of one layer, of so many groups."""
    blocks = shape.in_sight(layer.blocks(write_outs, plan.tail))
    on_device = tuple(number for number, block in enumerate(blocks) if block.memory == "device")
    in_host = [(number, plan.bytes_of(shape, block)) for number, block in enumerate(blocks) if block.memory == "host"]
    before, after = matrices
    ops = [Op("copy", nbytes=nbytes) for nbytes in before]
    ops.append(Op("project"))
    for group in range(groups):
        ops += Op("append", group), Op("attend", group, (*on_device, TAIL))
        for number, nbytes in in_host:
            ops += Op("copy", group, (number,), nbytes), Op("attend", group, (number,), frees=nbytes)
    ops += [Op("copy", nbytes=nbytes) for nbytes in after]
    ops.append(Op("finish", frees=sum(before) + sum(after)))
    return tuple(ops)


def order_layers(
    layers: tuple[tuple[Op, ...], ...],
    numbers: Sequence[int],
    window: float,
    schedule: Schedule,
    in_flight: int | None = COPIES_IN_FLIGHT,
) -> StepOrder:
    """The step of these layers, with what its copies wait for, of which so many are on their way in a pipeline at most;
    see the module."""
    columns = [
        np.array([(op.nbytes, op.frees, op.kind == "copy", op.copies_weights, op.kind == "finish") for op in layer])
        for layer in layers
    ]
    nbytes, frees, copy, of_weights, last = np.concatenate([columns[number] for number in numbers]).astype(np.int64).T
    copies, freed = np.flatnonzero(copy), np.cumsum(frees)
    own_bytes, sent = nbytes[copies], np.cumsum(nbytes)[copies]
    ahead = (in_flight or len(copies)) if schedule == "pipelined" else 1
    waits = np.full(len(copies), START)
    waits[ahead:] = copies[:-ahead]
    if schedule == "pipelined":
        # Until enough is free for it beside what is still in use; a copy may be larger than the window.
        needed = np.minimum(sent - window, sent - own_bytes)
        waits = np.maximum(waits, np.where(needed > 0, np.searchsorted(freed, needed), START))
    else:
        layer_of = np.cumsum(last) - last
        first = np.flatnonzero(np.diff(layer_of[copies], prepend=0))
        waits[first] = np.flatnonzero(last)[layer_of[copies[first]] - 1]
    waits = np.maximum.accumulate(waits)
    high_water = (sent - np.where(waits < 0, 0, freed[waits])).max(initial=0)  # when a copy starts
    # What a copy can be tied to that comes after all compute before it: a block that has arrived, and what ended a use.
    ends = np.flatnonzero((copy > of_weights) | (frees > 0) | (last > 0))
    computed = np.append(ends, START)[np.searchsorted(ends, waits, side="right") - 1]
    return StepOrder(layers, tuple(numbers), copies, waits, computed, int(high_water))


def in_flight_bytes(window: int, largest: int, weights: int) -> int:
    """An upper bound of a pipeline's high-water mark, but for one with drafts: of copies of at most `largest` bytes
    those on their way and one in use, and a layer's weights, as far as the window allows."""
    return min(window, (COPIES_IN_FLIGHT + 1) * largest + weights)
