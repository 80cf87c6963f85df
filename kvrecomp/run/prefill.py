"""The prefill: a whole prompt through a model, and its blocks on their way to where the plan wants them."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from kvrecomp.plan import BlockSpec, Plan
from kvrecomp.run.attention import Projections, attend_causal, positions_of
from kvrecomp.run.cache import Block, Cache, after_prompt, cut
from kvrecomp.run.layer import Layers
from kvrecomp.run.model import Model
from kvrecomp.run.weights import layer_weights


def prefill(model: Model, plan: Plan, token_ids: Array, padding: Array) -> tuple[Cache, Array, Array]:
    """Prompts int32[t, b], left-padded by int32[b] -> the cache, logits float32[b, vocab], bool[layers]: whether a
    layer's blocks cannot be packed as they should be."""
    hidden = model.embed(token_ids, positions_of(jnp.arange(len(token_ids)), padding))
    blocks: list[tuple[Block, ...]] = []
    sketches: list[tuple[Block, ...]] = []
    overflowed: list[Array] = []
    weights, layers = layer_weights(model, plan), Layers()
    coming = _to_device(weights[0].host_arrays)
    sketched = (plan.sketched or plan).layers
    for layer_plan, sketch, layer, following in zip(plan.layers, sketched, weights, [*weights[1:], None], strict=True):
        arrived, coming = dict(zip(layer.in_host, coming, strict=True)), []
        if following is not None and following.in_host:  # they cross the link while this layer is computed
            hidden, held = jax.lax.optimization_barrier((hidden, following.host_arrays))
            coming = _to_device(held)
        attention = PromptAttention(layer_plan.prompt, sketch.prompt, plan.shape.dtype)
        hidden, (of_layer, copies, too_many) = layers.call(
            layer.layer, attention, hidden, layer.parameters, padding, arrived
        )
        blocks.append(of_layer)
        sketches.append(copies)
        overflowed.append(too_many)
        if len(blocks) > 1:
            # The layer before has left the device when this one ends; XLA would copy all layers at the end. The barrier
            # ties its copies to a zero, not to `hidden` itself, which would then live as long as they do.
            zero, blocks[-2] = jax.lax.optimization_barrier((jnp.zeros((), hidden.dtype), blocks[-2]))
            hidden += zero
    cache = Cache(tuple(blocks), after_prompt(plan, padding), 0, tuple(sketches) if plan.sketched else ())
    return cache, model.unembed(hidden[-1]), jnp.stack(overflowed)


@dataclass(frozen=True)
class PromptAttention:
    """A prompt's attention to itself, which makes the layer's blocks of it, and sketches of those in host memory."""

    specs: tuple[BlockSpec, ...]
    sketched: tuple[BlockSpec, ...]
    dtype: str

    def __call__(
        self, padding: Array, x: Array, projections: Projections
    ) -> tuple[Array, tuple[tuple[Block, ...], tuple[Block, ...], Array]]:
        """x [t, b, h], rows left-padded by int32[b] -> [t, b, n * d], the blocks where the plan has them, the sketches,
        and whether one of the blocks cannot be packed."""
        mixed, key, value = attend_causal(projections, x, padding)
        # Rotated in float32, K may be wider than the model's numbers.
        tensors = [tensor.astype(self.dtype) for tensor in (x, key, value)]
        blocks, overflowed = cut(self.specs, *tensors)
        copies = cut(self.sketched, *tensors)[0] if self.sketched != self.specs else ()
        sketches = (copy for copy, block in zip(copies, blocks) if block.memory == "host")
        return mixed, (tuple(map(_place, blocks)), tuple(sketches), overflowed)


def _to_device(arrays: list[Array]) -> list[Array]:
    return jax.device_put(arrays, jax.memory.Space.Device)


def _place(block: Block) -> Block:
    """The block in the memory that it says it is in."""
    space = jax.memory.Space.Host if block.memory == "host" else jax.memory.Space.Device
    return replace(block, arrays=jax.device_put(block.arrays, space))
