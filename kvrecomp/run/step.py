"""A step: one more token of every row through a model, over an explicit cache, in the order that `step_order` gives."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from kvrecomp.plan import Method, Plan
from kvrecomp.plan.step_order import TAIL, Op, StepOrder, step_order
from kvrecomp.run.attention import Mixes, Partial, Projections, Query, attend, join, merge
from kvrecomp.run.cache import Block, Recent, append
from kvrecomp.run.copies import Copies
from kvrecomp.run.layer import call_layer
from kvrecomp.run.model import Model
from kvrecomp.run.weights import HostWeights, host_weights

Blocks = Sequence[Sequence[Block]]
"""Those of every layer, in token order."""


def decode_step(
    model: Model, plan: Plan, blocks: Sequence[Blocks], recents: Sequence[Recent], token_ids: Sequence[Array]
) -> tuple[list[Recent], list[Array]]:
    """One token of every row: each group's blocks, what is recent of it, and its new tokens int32[b] -> what is recent
    with them, and logits float32[b, vocab], of each group.

    Groups go through the layers together, so that weights are copied, and multiplied with, once for all of them.
    """
    order, layers = layer_steps(model, plan, blocks, recents)
    copies = Copies.begin(order, {number: array for layer in layers for number, array in layer.host_arrays().items()})
    hidden = model.embed(jnp.concatenate(token_ids), jnp.concatenate([recent.positions for recent in recents]))
    tails: list[list[Block]] = []
    for number, layer in enumerate(layers):
        with jax.named_scope(f"layer_{number}"):  # metadata only: a trace tells by it which layer a kernel belongs to
            hidden, tails_of_layer, copies = layer.run(hidden, copies)
        tails.append(tails_of_layer)
    after = [
        replace(recent, tails=tuple(tail.arrays for tail in group), length=recent.length + 1)
        for recent, group in zip(recents, zip(*tails))
    ]
    return after, jnp.split(model.unembed(hidden), len(recents))


def layer_steps(
    model: Model, plan: Plan, blocks: Sequence[Blocks], recents: Sequence[Recent]
) -> tuple[StepOrder, list["LayerStep"]]:
    """The order of the step that these caches are at, and what each layer does in it."""
    write_outs = len(blocks[0][0]) - len(plan.layers[0].prompt)
    weights = host_weights(model, plan)
    order = step_order(plan, write_outs, [layer.matrices for layer in weights])
    layers = []
    for number, (layer_plan, shape) in enumerate(zip(plan.layers, plan.shape.layers)):
        groups = [
            GroupStep(recent, recent.tail(number), shape.in_sight(of_layers[number]))
            for of_layers, recent in zip(blocks, recents)
        ]
        layers.append(LayerStep(dict(order.of_layer(number)), weights[number], layer_plan.method, groups))
    return order, layers


@dataclass(frozen=True)
class GroupStep:
    """What a layer works on of one group: its tail, and its blocks in sight."""

    recent: Recent
    tail: Block
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class LayerStep:
    """A layer's operations in a step, by number, and what they work on."""

    ops: dict[int, Op]
    weights: HostWeights
    method: Method
    groups: list[GroupStep]

    def host_arrays(self) -> dict[int, Array]:
        """What its copies bring, by the numbers of their operations."""
        matrices = iter(self.weights.arrays)
        return {
            number: next(matrices) if op.copies_weights else self.groups[op.group].blocks[op.blocks[0]].arrays[0]
            for number, op in self.ops.items()
            if op.kind == "copy"
        }

    def run(self, hidden: Array, copies: Copies) -> tuple[Array, list[Block], Copies]:
        """hidden [rows, h], group after group -> the same, the groups' tails with the new tokens, what is to come."""
        numbers = [number for number, op in self.ops.items() if op.copies_weights]
        arrived: dict[int, Array] = {}
        for number in numbers[: self.weights.before]:
            copies, arrived[number] = copies.fetch(number)

        def attended(result: tuple[list[Block], Copies]) -> tuple[list[Block], Copies]:
            tails, copies = result
            for number in numbers[self.weights.before :]:
                copies, arrived[number] = copies.fetch(number)
            return tails, copies

        hidden, (tails, copies) = call_layer(
            self.weights.call,
            functools.partial(self.attend, copies),
            hidden,
            [functools.partial(arrived.__getitem__, number) for number in numbers],
            self.weights.arrays,
            attended,
        )
        copies, hidden = copies.ended(max(self.ops), hidden)
        return hidden, tails, copies

    def attend(self, copies: Copies, x: Array, projections: Projections) -> tuple[Array, tuple[list[Block], Copies]]:
        """x [rows, h] -> [rows, n * d], the tails and the copies to come.

        Rows of all groups go through the projections at once, and attend one group after the other, as blocks arrive.
        """
        positions = jnp.concatenate([group.recent.positions for group in self.groups])
        new = x, projections.keys(x, positions), projections.values(x)  # not computed where not appended
        of_groups = zip(*(jnp.split(rows, len(self.groups)) for rows in (*new, projections.queries(x, positions))))
        mixed, tails = [], []
        for number, (group, (x, key, value, queries)) in enumerate(zip(self.groups, of_groups)):
            query = Query(projections, queries, group.recent.length, group.recent.padding)
            tail = append(group.tail, group.recent.length, x, key, value)
            blocks = {TAIL: tail, **dict(enumerate(group.blocks))}
            partials: dict[Mixes, Partial] = {}
            for op_number, op in self.ops.items():
                if op.group != number or not op.blocks:
                    continue
                with jax.named_scope(op.label):
                    if op.kind == "copy":
                        newest, partial = partials.popitem()
                        copies, partials[newest], array = copies.take(op_number, partial)
                        (place,) = op.blocks
                        blocks[place] = replace(blocks[place], arrays=(array,))
                    else:
                        partials = join(partials, attend(query, [blocks[place] for place in op.blocks], self.method))
                        newest, partial = partials.popitem()
                        copies, partials[newest] = copies.ended(op_number, partial)
            mixed.append(merge(query, partials))
            tails.append(tail)
        return jnp.concatenate(mixed), (tails, copies)
