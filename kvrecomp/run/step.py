"""A step: new tokens of every row through a model, over an explicit cache, in the order that `step_order` gives."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kvrecomp.plan import LOSSLESS, Form, Method, Plan
from kvrecomp.plan.step_order import TAIL, LayerOrder, step_order
from kvrecomp.run.attention import Mixes, Partial, Projections, Query, attend, join, merge
from kvrecomp.run.cache import Block, Recent, append, tensors_of
from kvrecomp.run.copies import Copies
from kvrecomp.run.layer import Layers
from kvrecomp.run.model import Model
from kvrecomp.run.weights import LayerWeights, layer_weights

Blocks = Sequence[Sequence[Block]]
"""Those of every layer, in token order."""


def written_out(plan: Plan, blocks: Blocks) -> int:
    """How often the tail of a group with these blocks was written out."""
    return len(blocks[0]) - len(plan.layers[0].prompt)


class UnderCopies(NamedTuple):
    """What else a step computes, part by part, between its layers: `part(number, state)`, with number from `done` on,
    and a state of arrays in any structure."""

    part: Callable[[int, Any], Any]
    state: Any
    done: int = 0

    def go_on(self, hidden: Array) -> tuple["UnderCopies", Array]:
        """One part more, after all that `hidden` comes of and before what comes of it."""
        hidden, state = jax.lax.optimization_barrier((hidden, self.state))
        hidden, state = jax.lax.optimization_barrier((hidden, self.part(self.done, state)))
        return self._replace(state=state, done=self.done + 1), hidden


def decode_step(
    model: Model,
    plan: Plan,
    blocks: Sequence[Blocks],
    recents: Sequence[Recent],
    token_ids: Sequence[Array],
    under_copies: UnderCopies | None = None,
) -> tuple[list[Recent], list[Array], Any]:
    """One pass: each group's blocks, what is recent of it, and its new tokens int32[b, q], as many of every row -> what
    is recent with these in the tails, and logits float32[b, q, vocab], of each group; and the state that is computed
    `under_copies`.

    How many slots each row uses stays as it was: who calls this says which of the tokens are kept. Groups go through
    the layers together, so that weights are copied, and multiplied with, once for all of them.
    """
    write_outs = written_out(plan, blocks[0])
    weights, layers = layer_weights(model, plan), Layers()
    order = step_order(plan, write_outs, [layer.matrices for layer in weights], drafts=under_copies is not None)
    tokens = token_ids[0].shape[1]
    steps = [
        LayerStep(
            layer_order, weights[number], plan.layers[number].method, _groups(plan, number, blocks, recents, tokens)
        )
        for number, layer_order in enumerate(order.of_layers())
    ]
    copies = Copies.begin({number: array for step in steps for number, array in step.host_arrays()}, order.at_start)
    ids = jnp.concatenate(token_ids)
    slots = jnp.concatenate([recent.slots(ids.shape[1]) - recent.padding[:, None] for recent in recents])
    positions = jnp.minimum(slots, plan.shape.positions - 1)  # of tokens that are not kept, some may be beyond
    hidden = model.embed(ids.reshape(-1), positions.reshape(-1))
    tails: list[list[Block]] = []
    for number, step in enumerate(steps):
        if under_copies is not None:
            for _ in range(step.order.drafts):
                under_copies, hidden = under_copies.go_on(hidden)
        with jax.named_scope(f"layer_{number}"):  # metadata only: a trace tells by it which layer a kernel belongs to
            hidden, tails_of_layer, copies = step.run(layers, hidden, copies)
        tails.append(tails_of_layer)
    after = [replace(recent, tails=tuple(tail.arrays for tail in group)) for recent, group in zip(recents, zip(*tails))]
    logits = jnp.split(model.unembed(hidden).reshape(*ids.shape, -1), len(recents))
    return after, logits, under_copies and under_copies.state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupStep:
    """What a layer works on of one group: its tail and its blocks in sight, the slots int32[b, q] of the new tokens,
    and the rows' padding int32[b]."""

    slots: Array
    padding: Array
    tail: Block
    blocks: tuple[Block, ...]


def _groups(
    plan: Plan, layer: int, blocks: Sequence[Blocks], recents: Sequence[Recent], tokens: int
) -> list[GroupStep]:
    in_sight = plan.shape.layers[layer].in_sight
    return [
        GroupStep(recent.slots(tokens), recent.padding, recent.tail(layer), in_sight(group[layer]))
        for group, recent in zip(blocks, recents, strict=True)
    ]


@dataclass(frozen=True)
class LayerStep:
    """A layer's part of a step, and what it works on."""

    order: LayerOrder
    weights: LayerWeights
    method: Method
    groups: list[GroupStep]

    def host_arrays(self) -> list[tuple[int, Array]]:
        """What its copies bring, with the numbers of their operations in the step."""
        matrices, arrays = iter(self.weights.host_arrays), []
        for number, op in enumerate(self.order.ops, self.order.first):
            if op.kind == "copy":
                blocks = [self.groups[op.group].blocks[place] for place in op.blocks]
                arrays.append((number, blocks[0].arrays[0] if blocks else next(matrices)))
        return arrays

    def run(self, layers: Layers, hidden: Array, copies: Copies) -> tuple[Array, list[Block], Copies]:
        """hidden [n, h], of n new tokens, group after group and row after row -> the same, each group's tail with its
        new tokens, the copies to come."""
        order, (layer, parameters, in_host, before) = self.order, self.weights
        of_weights = [number for number, op in enumerate(order.ops) if op.copies_weights]
        concerned = copies.of_layer(order)
        arrived: dict[int, Array] = {}
        for parameter, number in zip(in_host[:before], of_weights):
            concerned, arrived[parameter] = concerned.fetch(order, number)

        def attended(result: tuple[list[Block], Copies]) -> tuple[list[Block], Copies]:
            tails, concerned = result
            for parameter, number in zip(in_host[before:], of_weights[before:]):
                concerned, arrived[parameter] = concerned.fetch(order, number)
            return tails, concerned

        given = {parameter: lambda parameter=parameter: arrived[parameter] for parameter in in_host}
        attention, context = CachedAttention(order, self.method), (self.groups, concerned)
        hidden, (tails, concerned) = layers.call(layer, attention, hidden, parameters, context, given, attended)
        concerned, hidden = concerned.ended(order, len(order.ops) - 1, hidden)
        return hidden, tails, copies.after_layer(order, concerned)


@dataclass(frozen=True)
class CachedAttention:
    """The attention of a layer's new tokens, which makes the tails with them, and starts copies as its order says."""

    order: LayerOrder
    method: Method

    def __call__(
        self, context: tuple[list[GroupStep], Copies], x: Array, projections: Projections
    ) -> tuple[Array, tuple[list[Block], Copies]]:
        """x [n, h], of n new tokens -> [n, heads * head_dim], the tails and the copies to come.

        Tokens of all groups go through the projections at once, and attend one group after the other, as blocks arrive.
        """
        groups, copies = context
        slots = jnp.concatenate([group.slots - group.padding[:, None] for group in groups])
        positions = slots.reshape(-1)
        new = x, projections.keys(x, positions), projections.values(x)  # not computed where not appended
        by_row = (each.reshape(*slots.shape, *each.shape[1:]) for each in (*new, projections.queries(x, positions)))
        of_groups = zip(*(jnp.split(each, len(groups)) for each in by_row))
        mixed, tails = [], []
        for number, (group, (x, key, value, queries)) in enumerate(zip(groups, of_groups)):
            query = Query(projections, queries, group.slots, group.padding)
            finite, kept = _finite_alone(group.tail.form, x, key, value)
            tail = append(group.tail, group.slots, *kept)
            blocks = {TAIL: tail, **dict(enumerate(group.blocks))}
            partials: dict[Mixes, Partial] = {}
            for op_number, op in enumerate(self.order.ops):
                if op.group != number or not op.blocks:
                    continue
                with jax.named_scope(op.label):
                    if op.kind == "copy":
                        newest, partial = partials.popitem()
                        copies, partials[newest], array = copies.take(self.order, op_number, partial)
                        (place,) = op.blocks
                        blocks[place] = replace(blocks[place], arrays=(array,))
                    else:
                        partials = join(partials, attend(query, [blocks[place] for place in op.blocks], self.method))
                        newest, partial = partials.popitem()
                        copies, partials[newest] = copies.ended(self.order, op_number, partial)
            lossless = all(block.codec in LOSSLESS for block in group.blocks)
            of_group = merge(query, partials, lossless)
            mixed.append(of_group if finite is None else jnp.where(finite, of_group, jnp.nan))
            tails.append(tail)
        return jnp.concatenate(mixed).reshape(len(positions), -1), (tails, copies)


def _finite_alone(form: Form, *new: Array) -> tuple[Array | None, tuple[Array, ...]]:
    """Of new tokens, x [b, q, h], K and V [b, q, k, d]: whether all that a tail of that form gets of a token is finite,
    bool[b, q, 1], and the same with zeros for tokens of which it is not; None, and all as it is, of one token a row.

    A weight of zero does not hide what is infinite or NaN. In a later token, which may be a draft that is not taken, it
    would be in the mix of those before.
    """
    if new[0].shape[1] == 1:
        return None, new
    found = [jnp.isfinite(each).reshape(*each.shape[:2], -1).all(axis=-1) for each in tensors_of(form, *new)]
    finite = functools.reduce(jnp.logical_and, found)
    kept = (jnp.where(finite.reshape(*finite.shape, *(1,) * (each.ndim - 2)), each, 0) for each in new)
    return finite[..., None], tuple(kept)
