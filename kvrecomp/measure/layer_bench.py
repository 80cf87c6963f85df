"""Times a few layers of a model in the program that decoding runs, `step.decode_step`.

Blocks are on the device already, or short to copy, so that nothing but compute is timed.
"""

import dataclasses
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from kvrecomp.measure.timing import device_timer, median_seconds, random, random_maker
from kvrecomp.plan import BlockSpec, Codec, Form, LayerPlan, Memory, Method, Plan, Workload
from kvrecomp.predict.hardware import Attention
from kvrecomp.run import memory
from kvrecomp.run.cache import Block, allocate_recent, describe_blocks, describe_ints, describe_recent, shardings
from kvrecomp.run.model import Model
from kvrecomp.run.schedule import OVERLAPPING, compile_overlapping
from kvrecomp.run.step import decode_step

TAIL = 32  # tokens: XLA fuses the scores of very few with others', and computes them many times
STEPS = 10  # at most, dispatched one after the other
ENOUGH_SECONDS = 0.02  # for a run: slow steps, as a CPU's, are fewer
REPEATS = 1  # of a run, in each round


class Run(NamedTuple):
    """A step that is timed: of so many layers, their tails attended to as `tail` says, and `blocks` of so many `tokens`
    each as `kind` does, written as `codec` says; those of the host are on the device before the step, unless they are
    `copied` in it."""

    layers: int
    tail: Attention
    kind: Attention
    tokens: int
    memory: Memory = "host"
    blocks: int = 1
    copied: bool = False
    codec: Codec = "plain"


class Finish(NamedTuple):
    """What so many layers do after attention, whose result is given."""

    layers: int


class LayerBench:
    """Times steps of some layers of a model. Blocks of the host that are not copied are on the device, and used as if
    they had been."""

    def __init__(self, model: Model, numbers: Sequence[int], batch: int):
        """`numbers` are those of the layers; what they have in host memory is copied to the device."""
        self._model, self._numbers, self._batch = model, numbers, batch
        self._graph, state = nnx.split(model)
        weights, self._structure = jax.tree.flatten(state)
        paths, device = [path for path, _ in nnx.to_flat_state(state)], memory.sharding("device")
        self._needed = [path[0] != "layers" or path[1] in numbers for path in paths]
        self._weights = [jax.device_put(array, device) for array, needed in zip(weights, self._needed) if needed]
        self._timed = device_timer()

    def timer(self, run: Run | Finish) -> Callable[[], float]:
        """Compiles what is to be timed; gives what measures its seconds."""
        return self._step_timer(run) if isinstance(run, Run) else self._finish_timer(run.layers)

    def _step_timer(self, run: Run) -> Callable[[], float]:
        plan = self._plan(run)

        def step(weights, blocks, recent, token_ids):
            part = self._part(weights, run.layers)
            (recent,), (logits,), _ = decode_step(part, plan, [blocks], [recent], [token_ids])
            recent = dataclasses.replace(recent, lengths=recent.lengths + 1)
            return recent, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        as_used = (lambda block: block) if run.copied else _as_if_copied
        described = [list(map(as_used, layer)) for layer in describe_blocks(plan, 0)]
        inputs = (self._weights, described, describe_recent(plan), describe_ints(self._batch, 1))
        placed = (None, shardings(described) if run.copied else None, None, None)
        lowered = jax.jit(step, in_shardings=placed, donate_argnames=("recent",)).lower(*inputs)
        program = compile_overlapping(lowered, OVERLAPPING)
        for block in itertools.chain.from_iterable(described):
            for like in block.arrays:
                random_maker(like.shape, like.dtype)  # compiled here, too
        start = jax.device_put(np.int32(0), memory.sharding("device"))

        def filled(block: Block) -> Block:
            where = memory.sharding(block.memory if run.copied else "device")
            arrays = tuple(jax.device_put(random(like.shape, like.dtype), where) for like in block.arrays)
            return dataclasses.replace(block, arrays=arrays, start=start)

        def seconds() -> float:
            blocks = [[filled(block) for block in layer] for layer in described]
            token_ids = jax.device_put(np.zeros((self._batch, 1), np.int32), memory.sharding("device"))
            state = allocate_recent(plan), token_ids

            def take(steps: int) -> Array:
                nonlocal state
                for _ in range(steps):
                    state = program(self._weights, blocks, *state)
                return state[1]

            return self._seconds(take)

        return seconds

    def _finish_timer(self, count: int) -> Callable[[], float]:
        def finish(weights, mixed, token_ids):
            part = self._part(weights, count)
            hidden = part.embed(token_ids, jnp.zeros_like(token_ids))
            for layer in part.layers:
                hidden, given = jax.lax.optimization_barrier((hidden, mixed))  # or XLA projects it for all at once
                hidden = layer(hidden, lambda x, projections, given=given: given)
            return hidden

        shape, first = self._model.shape, self._model.shape.layers[self._numbers[0]]
        mixed = random((self._batch, first.heads * first.head_dim), jnp.dtype(shape.dtype))
        token_ids = jax.device_put(np.zeros(self._batch, np.int32), memory.sharding("device"))
        program = jax.jit(finish).lower(self._weights, mixed, token_ids).compile()

        def take(steps: int) -> Array:
            return [program(self._weights, mixed, token_ids) for _ in range(steps)][-1]

        return lambda: self._seconds(take)

    def _seconds(self, take: Callable[[int], Array]) -> float:
        """Of one of the steps that `take` takes as many of as it is told."""
        alone = median_seconds(lambda: take(1), REPEATS)
        if alone >= ENOUGH_SECONDS:  # what the host takes to launch it is nothing to that
            return alone
        steps = min(STEPS, int(ENOUGH_SECONDS / alone))
        return self._timed(lambda: take(steps), REPEATS) / steps

    def _part(self, weights: Sequence[Array], count: int) -> Any:
        """The model with so many of the layers."""
        given = iter(weights)
        leaves = [next(given) if needed else None for needed in self._needed]
        model = nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves))
        layers = [model.layers[number] for number in self._numbers[:count]]
        return types.SimpleNamespace(embed=model.embed, unembed=model.unembed, layers=layers)

    def _plan(self, run: Run) -> Plan:
        shape, numbers = self._model.shape, self._numbers[: run.layers]
        block = BlockSpec(_form_of(run.kind), run.memory, run.tokens, run.codec)
        method: Method = "recompute" if "recompute" in (run.tail, run.kind) else "absorb"
        layer = LayerPlan((block,) * run.blocks, _form_of(run.tail), (run.memory,), method)
        # Sliding windows may be shorter than the blocks that are to be timed; a step's time does not go by positions.
        layers = tuple(dataclasses.replace(shape.layers[number], sliding_window=None) for number in numbers)
        workload = Workload(self._batch, run.blocks * run.tokens, TAIL)
        part = dataclasses.replace(shape, layers=layers, positions=workload.prompt + workload.new)
        return Plan("bench", part, workload, (layer,) * len(layers), tail=TAIL, window=2**62)


def _form_of(kind: Attention) -> Form:
    return "keys_values" if kind == "keys_values" else "activations"


def _as_if_copied(block: Block) -> Block:
    """The block with its arrays described as on the device: copying one from the host there copies nothing."""
    device = memory.sharding("device")
    arrays = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device) for array in block.arrays)
    return dataclasses.replace(block, arrays=arrays)
