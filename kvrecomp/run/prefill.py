"""The prefill: a whole prompt through a model, and its blocks on their way to where the plan wants them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from kvrecomp.plan import LayerPlan, Plan
from kvrecomp.run.attention import Projections, attend_causal, positions_of
from kvrecomp.run.cache import Block, Recent, after_prompt, cut
from kvrecomp.run.layer import call_layer
from kvrecomp.run.model import Model
from kvrecomp.run.weights import host_weights


def prefill(
    model: Model, plan: Plan, token_ids: Array, padding: Array
) -> tuple[tuple[tuple[Block, ...], ...], Recent, Array]:
    """Prompts int32[t, b], left-padded by int32[b] -> blocks, what is recent, logits float32[b, vocab]."""
    hidden = model.embed(token_ids, positions_of(jnp.arange(len(token_ids)), padding))
    blocks: list[tuple[Block, ...]] = []
    hosted = host_weights(model, plan)
    coming = _to_device(hosted[0].arrays)
    for layer_plan, layer, following in zip(plan.layers, hosted, [*hosted[1:], None], strict=True):
        weights, coming = coming, ()
        if following is not None and following.arrays:  # they cross the link while this layer is computed
            hidden, held = jax.lax.optimization_barrier((hidden, following.arrays))
            coming = _to_device(held)

        def attention(
            x: Array, projections: Projections, layer_plan: LayerPlan = layer_plan
        ) -> tuple[Array, tuple[Block, ...]]:
            mixed, key, value = attend_causal(projections, x, padding)
            # Rotated in float32, K may be wider than the model's numbers.
            tensors = [tensor.astype(plan.shape.dtype) for tensor in (x, key, value)]
            return mixed, tuple(_place(block) for block in cut(layer_plan.prompt, *tensors))

        hidden, of_layer = call_layer(layer.call, attention, hidden, weights, weights)
        blocks.append(of_layer)
        if len(blocks) > 1:
            # The layer before has left the device when this one ends; XLA would copy all layers at the end. The barrier
            # ties its copies to a zero, not to `hidden` itself, which would then live as long as they do.
            zero, blocks[-2] = jax.lax.optimization_barrier((jnp.zeros((), hidden.dtype), blocks[-2]))
            hidden += zero
    return tuple(blocks), after_prompt(plan, padding), model.unembed(hidden[-1])


def _to_device(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return jax.device_put(arrays, jax.memory.Space.Device)


def _place(block: Block) -> Block:
    """The block in the memory that it says it is in."""
    space = jax.memory.Space.Host if block.memory == "host" else jax.memory.Space.Device
    return replace(block, arrays=jax.device_put(block.arrays, space))
