"""What the decoder's programs are traced from: a model's prefill and step over an explicit cache, under a plan."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from kvrecomp.plan import LayerPlan, Method, ModelShape, Plan
from kvrecomp.run import attention
from kvrecomp.run.attention import Cached
from kvrecomp.run.cache import Block, Cache, LayerCache, append, cut, empty_tails, in_sight
from kvrecomp.run.weights import HostWeights, host_weights
from kvrecomp.run.window import Window


class Model(Protocol):
    """What the library asks of a `flax.nnx` module, so that anyone's model can join."""

    @property
    def shape(self) -> ModelShape: ...

    layers: Any  # a sequence of callables: layer(hidden [..., h], attend: attention.Attend) -> [..., h]

    def embed(self, token_ids: Array, positions: Array) -> Array:
        """int32[...], int32[...] -> [..., h]."""
        ...

    def unembed(self, hidden: Array) -> Array:
        """[..., h] -> float32 logits [..., vocab]."""
        ...


# --- the step ---------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a step of one group is: the new token's slot int32[], padding int32[b], the slots of the prompt, and those,
    int32[], at which the tails that were written out, and the present one, start."""

    slot: Array
    padding: Array
    prompt: int
    tail_starts: Sequence[Array]

    @property
    def positions(self) -> Array:
        """int32[b], of the new token in each row."""
        return self.slot - self.padding


@dataclass
class CachedAttention:
    """The `Attend` of one layer during a step: each group's new token joins its tail, and attends to blocks and tail.

    Rows of all groups go through the projections at once, and attend one group after the other, as blocks arrive.
    """

    caches: list[LayerCache]
    places: Sequence[Place]
    method: Method
    window: Window
    weights: HostWeights

    def __call__(self, x: Array, projections: attention.Projections) -> Array:
        """x [rows, h] -> [rows, n * d], group after group."""
        positions = jnp.concatenate([place.positions for place in self.places])
        new = x, projections.keys(x, positions), projections.values(x)  # not computed where not appended
        of_groups = [jnp.split(own, len(self.places)) for own in (*new, projections.queries(x, positions))]
        mixed = [self._attend(group, projections, *own) for group, own in enumerate(zip(*of_groups))]
        self.weights.bring_late(self.window)
        return jnp.concatenate(mixed)

    def _attend(
        self, group: int, projections: attention.Projections, x: Array, key: Array, value: Array, queries: Array
    ) -> Array:
        """One group's new tokens: x [b, h], K and V [b, k, d], queries [b, n, d] -> [b, n * d]."""
        (slot, padding, prompt, tail_starts), blocks = self.places[group], self.caches[group].blocks
        query = attention.Query(projections, queries, slot, padding)
        # Older tokens are out of the layer's sight: of the prompt, and then of tails that were written out.
        prompt_blocks = blocks[: max(0, len(blocks) + 1 - len(tail_starts))]
        first = prompt - sum(block.tokens for block in prompt_blocks)
        *prompt_starts, _ = itertools.accumulate((block.tokens for block in prompt_blocks), initial=first)
        starts = [*prompt_starts, *tail_starts[len(prompt_blocks) - len(blocks) - 1 :]]
        tail = append(self.caches[group].tail, slot - starts[-1], x, key, value)
        self.caches[group] = LayerCache(blocks, tail)
        # What is on the device is attended to as one, while the first copies are on their way.
        here = [Cached(b.form, b.tensors, at) for b, at in zip((*blocks, tail), starts) if b.memory == "device"]
        partials = attention.attend(query, here, self.method)
        for block, start in [(block, at) for block, at in zip(blocks, starts) if block.memory == "host"]:
            partials[-1], array = self.window.take(partials[-1])
            block = replace(block, arrays=(array,))
            (partial,) = attention.attend(query, [Cached(block.form, block.tensors, start)], self.method)
            partials = attention.join(partials, partial)
            partials[-1] = self.window.used(partials[-1])
        return attention.merge(query, partials)


def tail_starts(plan: Plan, cache: Cache) -> list[Array]:
    """The slots int32[] at which the tails that were written out, and the present one, start.

    As data, each behind a barrier: a number would be part of its program's kernels, and XLA times new kernels.
    """
    starts = [jax.lax.optimization_barrier(cache.length - (cache.length - plan.workload.prompt) % plan.tail)]
    for _ in cache.layers[0].blocks[len(plan.layers[0].prompt) :]:
        starts.append(jax.lax.optimization_barrier(starts[-1] - plan.tail))
    return starts[::-1]


def decode_step(
    model: Model, plan: Plan, caches: Sequence[Cache], token_ids: Sequence[Array]
) -> tuple[list[tuple[Block, ...]], list[Array]]:
    """One token of every row, int32[b] a group -> each group's tails with it written, and logits float32[b, vocab].

    Groups go through the layers together, so that weights are copied, and multiplied with, once for all of them.
    """
    prompt = plan.workload.prompt
    places = [Place(cache.length, cache.padding, prompt, tail_starts(plan, cache)) for cache in caches]
    caches = [in_sight(cache, plan) for cache in caches]
    hosted = host_weights(model, plan)
    needed = [own.copies(blocks) for own, *blocks in zip(hosted, *(cache.blocks for cache in caches), strict=True)]
    window = Window(needed, plan.whole_window, plan.schedule)
    hidden = model.embed(jnp.concatenate(token_ids), jnp.concatenate([place.positions for place in places]))
    tails: list[tuple[Block, ...]] = [() for _ in caches]
    for number, (layer, layer_plan, own) in enumerate(zip(model.layers, plan.layers, hosted, strict=True)):
        with jax.named_scope(f"layer_{number}"):  # metadata only: a trace tells by it which layer a kernel belongs to
            own.bring_early(window)
            of_layer = [cache.layers[number] for cache in caches]
            attend = CachedAttention(of_layer, places, layer_plan.method, window, own)
            hidden = window.layer_done(layer(hidden, attend))
            tails = [(*done, cache.tail) for done, cache in zip(tails, attend.caches)]
    return tails, jnp.split(model.unembed(hidden), len(caches))


# --- the prefill ------------------------------------------------------------------------------------------------------


def prefill(model: Model, plan: Plan, token_ids: Array, padding: Array) -> tuple[Any, tuple[Block, ...], Array]:
    """Prompts int32[t, b], left-padded by int32[b] -> blocks, empty tails, logits float32[b, vocab]."""
    hidden = model.embed(token_ids, attention.positions_of(jnp.arange(len(token_ids)), padding))
    blocks: list[tuple[Block, ...]] = []
    hosted = host_weights(model, plan)
    coming = jax.device_put(hosted[0].arrays, jax.memory.Space.Device)
    for layer, layer_plan, own, following in zip(model.layers, plan.layers, hosted, [*hosted[1:], None], strict=True):
        own.give(coming)
        coming = []
        if following is not None and following.arrays:  # they cross the link while this layer is computed
            hidden, held = jax.lax.optimization_barrier((hidden, following.arrays))
            coming = jax.device_put(held, jax.memory.Space.Device)

        def attend(x: Array, projections: attention.Projections, own: LayerPlan = layer_plan) -> Array:
            mixed, key, value = attention.attend_causal(projections, x, padding)
            kept = [each.astype(plan.shape.dtype) for each in (x, key, value)]  # rotated in float32, K may be wider
            blocks.append(tuple(_place(block) for block in cut(own.prompt, *kept)))
            return mixed

        hidden = layer(hidden, attend)
        if len(blocks) > 1:
            # The layer before has left the device when this one ends; XLA would copy all layers at the end. The barrier
            # ties its copies to a zero, not to `hidden` itself, which would then live as long as they do.
            zero, blocks[-2] = jax.lax.optimization_barrier((jnp.zeros((), hidden.dtype), blocks[-2]))
            hidden += zero
    return tuple(blocks), empty_tails(plan), model.unembed(hidden[-1])


def _place(block: Block) -> Block:
    """The block in the memory that it says it is in."""
    space = jax.memory.Space.Host if block.memory == "host" else jax.memory.Space.Device
    return replace(block, arrays=jax.device_put(block.arrays, space))
