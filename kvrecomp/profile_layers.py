"""Measures the layers of a model at work, in the program that decoding runs.

That is `runtime.decode_step`, cut to a few layers, with blocks that are on the device already, so that nothing but
compute is timed.
"""

import dataclasses
import itertools
import statistics
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from kvrecomp import memory
from kvrecomp.cache import allocate_tails, describe_blocks, describe_tails, make_cache
from kvrecomp.hardware import ATTENTION, Attention, Curve, LayerTimes, Work, attention_work, project_work
from kvrecomp.plan import (
    BLOCKS_PER_WINDOW,
    DEFAULT_WINDOW,
    MEMORIES,
    BlockSpec,
    Form,
    LayerPlan,
    LayerShape,
    Memory,
    Method,
    ModelShape,
    Plan,
    Workload,
)
from kvrecomp.programs import side_by_side
from kvrecomp.runtime import Model, decode_step
from kvrecomp.timing import least_seconds, median_seconds, random

FEW_LAYERS, MORE_LAYERS = 2, 6
ATTENDING_LAYERS = 4  # fewer are compiled sooner
SIZES, RATIO = 4, 4  # of blocks, each so many times as long as the one before
TAIL = 32  # tokens: XLA fuses the scores of very few with others', and computes them many times
STEPS = 8  # in a program, on a GPU: launching one takes longer than a step of few layers
CALLS = 8  # of a program, at most, dispatched without waiting, as decoding does
ENOUGH_SECONDS = 0.03  # for a run: slow steps, as a CPU's, are fewer
REPEATS = 3  # of a run


class _Run(NamedTuple):
    """What is timed: so many layers, their tails attended to as `tail` says, and `blocks` of so many `tokens` each as
    `kind` does."""

    layers: int
    tail: Attention
    kind: Attention
    tokens: int
    place: Memory = "host"
    blocks: int = 1


def measure_layer(model: Model, layer: LayerShape, batch: int) -> LayerTimes:
    """Seconds of the layers of that shape in a step: with a block of four sizes in each form and memory; with two from
    the host; and with activations that are absorbed beside a tail of keys and values.

    What layers take without a block is twice what they take with one, less that with two. Timed themselves, they would
    be of other kernels: XLA fuses more there.
    """
    own_numbers = [number for number, own in enumerate(model.shape.layers) if own == layer]
    numbers = list(itertools.islice(itertools.cycle(own_numbers), MORE_LAYERS))  # again where there are fewer
    sizes = {kind: block_sizes(kind, model.shape, layer, batch) for kind in ATTENTION}
    inner = {kind: own[1:-1] or own for kind, own in sizes.items()}
    count, kv = ATTENDING_LAYERS, "keys_values"
    few, more = (_Run(layers, kv, kv, inner[kv][0]) for layers in (FEW_LAYERS, MORE_LAYERS))
    alone: dict[tuple[Attention, Memory], list[_Run]] = {
        (kind, place): [_Run(count, kind, kind, size, place) for size in sizes[kind]]
        for kind in ATTENTION
        for place in MEMORIES
    }
    twice = {kind: [_Run(count, kind, kind, size, blocks=2) for size in inner[kind]] for kind in ATTENTION}
    beside = [_Run(count, kv, "absorb", size) for size in inner["absorb"]]
    bench = _LayerBench(model, numbers, batch)
    runs = [few, more, *itertools.chain(*alone.values(), *twice.values()), *beside]
    timers = side_by_side(bench.timer, runs)
    seconds = dict(zip(runs, least_seconds(timers), strict=True))

    bare = {
        kind: statistics.mean(2 * seconds[run._replace(blocks=1)] - seconds[run] for run in own)
        for kind, own in twice.items()
    }
    work: dict[Work, Curve] = {
        attention_work(kind, place): curve_through(sizes[kind], [(seconds[run] - bare[kind]) / count for run in own])
        for (kind, place), own in alone.items()
    }
    dense = max(0.0, (seconds[more] - seconds[few]) / (MORE_LAYERS - FEW_LAYERS) - work[kv](more.tokens))
    # Absorbing is part of what a tail takes that is absorbed.
    absorbing = [(seconds[run] - bare[kv]) / count - work["absorb"](run.tokens) for run in beside]
    prepare = max(0.0, statistics.mean(absorbing))
    projecting = layer.projecting / layer.parameters
    for kind in ATTENTION:
        tail = work[attention_work(kind, "device")]
        own = projecting * dense + (bare[kind] - bare[kv]) / count - (tail(TAIL) - tail(0))
        work[project_work(kind)] = Curve.line(max(0.0, own - (prepare if kind == "absorb" else 0)))
    work |= {"prepare": Curve.line(prepare), "finish": Curve.line((1 - projecting) * dense)}
    outside = max(0.0, bare[kv] - count * dense)
    return LayerTimes(layer, model.shape.dtype, batch, work, outside, model.shape.vocab)


def block_sizes(kind: Attention, shape: ModelShape, layer: LayerShape, batch: int) -> list[int]:
    """Tokens of the blocks that are timed, powers of two, as kernels for odd ones take longer; the longest has no more
    than the positions and a quarter of the window."""
    row_bytes = batch * layer.width("keys_values" if kind == "keys_values" else "activations") * shape.itemsize
    most = max(1, min(shape.positions, DEFAULT_WINDOW // BLOCKS_PER_WINDOW // row_bytes)).bit_length() - 1
    return sorted({max(1, 2**most // RATIO**part) for part in range(SIZES)})


def curve_through(sizes: Sequence[int], seconds: Sequence[float]) -> Curve:
    """The curve through what was measured. No tokens take what the line through the first two sizes says, from nothing
    to what the first takes. Noise can make a small difference of two times negative: that is nothing.
    """
    own = [max(0.0, each) for each in seconds]
    base = own[0]
    if len(own) > 1:
        base = min(max(0.0, own[0] - (own[1] - own[0]) * sizes[0] / (sizes[1] - sizes[0])), own[0])
    return Curve((0, *sizes), (base, *own))


class _LayerBench:
    """Times a step of layers of a model; blocks from the host are on the device, but used as if they were copied."""

    def __init__(self, model: Model, numbers: Sequence[int], batch: int):
        """`numbers` are those of the layers; what they have in host memory is copied to the device.

        A program has `steps`, one where there is nothing to launch.
        """
        self._model, self._numbers, self._batch = model, numbers, batch
        self.steps = STEPS if jax.default_backend() == "gpu" else 1
        self._graph, state = nnx.split(model)
        weights, self._structure = jax.tree.flatten(state)
        paths, here = [path for path, _ in nnx.to_flat_state(state)], memory.sharding("device")
        self._needed = [path[0] != "layers" or path[1] in numbers for path in paths]
        self._weights = [jax.device_put(own, here) for own, needed in zip(weights, self._needed) if needed]

    def timer(self, run: _Run) -> Callable[[], float]:
        """Compiles a program of such steps; gives what measures the seconds of one."""
        plan = self.plan(run)
        program = self.trace(plan).lower().compile()
        zeros, here = np.zeros(self._batch, np.int32), memory.sharding("device")

        def seconds() -> float:
            blocks = jax.tree.map(lambda like: random(like.shape, like.dtype), describe_blocks(plan, 0))
            held = self._weights, blocks, *jax.device_put((zeros, np.int32(plan.workload.prompt)), here)
            carried = allocate_tails(plan), jax.device_put(zeros, here)

            def call(times: int):
                nonlocal carried
                for _ in range(times):
                    carried = program(held, carried)
                return carried[1]

            alone = median_seconds(lambda: call(1), 1)
            calls = max(1, min(CALLS, int(ENOUGH_SECONDS / alone)))
            return median_seconds(lambda: call(calls), REPEATS) / calls / self.steps

        return seconds

    def trace(self, plan: Plan) -> Any:
        """As `jax.jit(...).trace(...)` gives it: steps under the plan, one after the other in a loop of XLA's, which
        the host launches once."""

        def step(held: Any, carried: Any) -> Any:
            # Behind a barrier, so that XLA cannot do once, before the loop, what is the same in all steps.
            (weights, blocks, padding, length), (tails, token_ids) = jax.lax.optimization_barrier((held, carried))
            cache = make_cache(blocks, tails, padding, length, 0)
            (tails,), (logits,) = decode_step(self._part(weights, plan), plan, [cache], [token_ids])
            return tails, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def take_steps(held: Any, carried: Any) -> Any:
            return jax.lax.fori_loop(0, self.steps, lambda _, carried: step(held, carried), carried)

        ids = jax.ShapeDtypeStruct((self._batch,), np.int32, sharding=memory.sharding("device"))
        length = jax.ShapeDtypeStruct((), np.int32, sharding=memory.sharding("device"))
        held = self._weights, _described(plan), ids, length
        return jax.jit(take_steps, donate_argnames=("carried",)).trace(held, (describe_tails(plan), ids))

    def _part(self, weights: Sequence[Array], plan: Plan) -> Any:
        """The model with as many layers as the plan has."""
        own = iter(weights)
        leaves = [next(own) if needed else None for needed in self._needed]
        model = nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves))
        layers = [model.layers[number] for number in self._numbers[: len(plan.layers)]]
        return types.SimpleNamespace(embed=model.embed, unembed=model.unembed, layers=layers)

    def plan(self, run: _Run) -> Plan:
        """What such a step is decoded under."""
        shape, numbers = self._model.shape, self._numbers[: run.layers]
        block = BlockSpec(_form_of(run.kind), run.place, run.tokens)
        method: Method = "recompute" if "recompute" in (run.tail, run.kind) else "absorb"
        # A window may be shorter than the blocks that are to be timed; positions do not matter to the time of a step.
        layers = tuple(dataclasses.replace(shape.layers[number], sliding_window=None) for number in numbers)
        own = LayerPlan((block,) * run.blocks, _form_of(run.tail), (run.place,), method)
        work = Workload(self._batch, run.blocks * run.tokens, TAIL)
        part = dataclasses.replace(shape, layers=layers, positions=work.prompt + work.new)
        return Plan("bench", part, work, (own,) * len(layers), tail=TAIL, window=2**62)


def _form_of(kind: Attention) -> Form:
    return "keys_values" if kind == "keys_values" else "activations"


def _described(plan: Plan) -> Any:
    """The plan's blocks, their arrays described as on the device: copying one from the host there copies nothing."""

    def on_device(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=memory.sharding("device"))

    return jax.tree.map(on_device, describe_blocks(plan, 0))
