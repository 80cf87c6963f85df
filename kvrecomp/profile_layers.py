"""Measures the layers of a model at work, in the program that decoding runs.

That is `runtime.decode_step`, cut to a few layers, with blocks that are on the device already, so that nothing but
compute is timed.
"""

import dataclasses
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvrecomp import memory
from kvrecomp.cache import Block, allocate_tails, describe_blocks, describe_tails, make_cache
from kvrecomp.hardware import ATTENTION, Attention, LayerTimes, Line, Work, attention_work
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
    Plan,
    Workload,
)
from kvrecomp.programs import side_by_side
from kvrecomp.runtime import Model, decode_step
from kvrecomp.timing import fit_line, median_seconds, random

FEW_LAYERS, MORE_LAYERS = 2, 6
STEPS = 10  # at most, dispatched without waiting, as decoding does
ENOUGH_SECONDS = 0.1  # for a run: slow steps, as a CPU's, are fewer


def measure_layer(model: Model, layer: LayerShape, batch: int) -> LayerTimes:
    """Seconds of the layers of that shape in a step: without cached tokens; with a block of three sizes in each form
    and memory; and with two from the host that together are as long as the longest, which tells what one more costs."""
    own_numbers = [number for number, own in enumerate(model.shape.layers) if own == layer]
    numbers = list(itertools.islice(itertools.cycle(own_numbers), MORE_LAYERS))  # again where there are fewer
    few, more = FEW_LAYERS, MORE_LAYERS
    sizes: dict[Attention, list[int]] = {}
    for kind in ATTENTION:
        form: Form = "keys_values" if kind == "keys_values" else "activations"
        row_bytes = batch * layer.width(form) * model.shape.itemsize
        most = max(1, min(model.shape.positions - 1, DEFAULT_WINDOW // BLOCKS_PER_WINDOW // row_bytes))
        sizes[kind] = sorted({max(1, most // part) for part in (8, 2, 1)})
    bench = _LayerBench(model, numbers, batch)
    halves = {kind: (max(1, own[-1] // 2), max(1, own[-1] - own[-1] // 2)) for kind, own in sizes.items()}
    runs: list[tuple[int, Attention | None, Memory, tuple[int, ...]]] = [
        (few, None, "host", ()),
        (more, None, "host", ()),
        *((more, kind, place, (size,)) for kind in ATTENTION for place in MEMORIES for size in sizes[kind]),
        *((more, kind, "host", halves[kind]) for kind in ATTENTION),
    ]
    timers = side_by_side(lambda run: bench.timer(*run), runs)
    seconds = {run: timer() for run, timer in zip(runs, timers, strict=True)}
    without = seconds[more, None, "host", ()]
    dense = max(0.0, (without - seconds[few, None, "host", ()]) / (more - few))
    projecting = layer.projecting / layer.parameters
    work: dict[Work, Line] = {
        "project": Line(projecting * dense, 0.0),
        "finish": Line((1 - projecting) * dense, 0.0),
    }

    def line_of(kind: Attention, place: Memory) -> Line:
        taken = [seconds[more, kind, place, (size,)] for size in sizes[kind]]
        return fit_line(sizes[kind], [(own - without) / more for own in taken], taken)

    for kind in ATTENTION:
        line, here = line_of(kind, "host"), line_of(kind, "device")
        longest = seconds[more, kind, "host", (sizes[kind][-1],)]
        base = min(max(0.0, (seconds[more, kind, "host", halves[kind]] - longest) / more), line.base)
        if kind == "absorb":
            work["prepare"] = Line(line.base - base, 0.0)
            here = Line(max(0.0, here.base - work["prepare"].base), here.each)
        work[attention_work(kind, "host")] = Line(base, line.each)
        work[attention_work(kind, "device")] = here
    outside = max(0.0, without - more * dense)
    return LayerTimes(layer, model.shape.dtype, batch, work, outside, model.shape.vocab)


class _LayerBench:
    """Times a step of layers of a model; blocks from the host are on the device, but used as if they were copied."""

    def __init__(self, model: Model, numbers: Sequence[int], batch: int):
        """`numbers` are those of the layers; what they have in host memory is copied to the device."""
        self._model, self._numbers, self._batch = model, numbers, batch
        self._graph, state = nnx.split(model)
        weights, self._structure = jax.tree.flatten(state)
        paths, here = [path for path, _ in nnx.to_flat_state(state)], memory.sharding("device")
        used = [path[0] == "layers" and path[1] in numbers for path in paths]
        self._weights = [jax.device_put(own, here) if needed else own for own, needed in zip(weights, used)]

    def timer(self, count: int, kind: Attention | None, place: Memory, tokens: Sequence[int]) -> Callable[[], float]:
        """Compiles a step of so many layers, each with blocks of that many tokens in that memory, used in that way;
        gives what measures its seconds."""
        numbers = self._numbers[:count]
        plan = self._plan(numbers, kind, place, tokens or (1,))

        def step(weights, blocks, tails, padding, length, token_ids):
            model = nnx.merge(self._graph, jax.tree.unflatten(self._structure, weights))
            layers = [model.layers[number] for number in numbers]
            part: Any = types.SimpleNamespace(embed=model.embed, unembed=model.unembed, layers=layers)
            cache = make_cache(blocks, tails, padding, length, 0)
            (tails,), (logits,) = decode_step(part, plan, [cache], [token_ids])
            return tails, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        kinds = [[] if kind is None else list(own) for own in describe_blocks(plan, 0)]
        described = [[_as_if_copied(block) for block in own] for own in kinds]
        padding, length, token_ids = jax.device_put(
            (np.zeros(self._batch, np.int32), np.int32(plan.workload.prompt), np.zeros(self._batch, np.int32)),
            memory.sharding("device"),
        )
        inputs = (self._weights, described, describe_tails(plan), padding, length, token_ids)
        program = jax.jit(step, donate_argnames=("tails",)).lower(*inputs).compile()

        def seconds() -> float:
            blocks = jax.tree.map(lambda like: random(like.shape, like.dtype), described)
            rest = allocate_tails(plan), token_ids

            def run(steps: int):
                nonlocal rest
                for _ in range(steps):
                    rest = program(self._weights, blocks, rest[0], padding, length, rest[1])
                return rest[1]

            alone = median_seconds(lambda: run(1), 1)
            steps = max(1, min(STEPS, int(ENOUGH_SECONDS / alone)))
            return median_seconds(lambda: run(steps), 3) / steps

        return seconds

    def _plan(self, numbers: Sequence[int], kind: Attention | None, place: Memory, tokens: Sequence[int]) -> Plan:
        shape = self._model.shape
        form: Form = "activations" if kind in ("absorb", "recompute") else "keys_values"
        method: Method = "recompute" if kind == "recompute" else "absorb"
        # A window may be shorter than the blocks that are to be timed.
        layers = tuple(dataclasses.replace(shape.layers[number], sliding_window=None) for number in numbers)
        own = LayerPlan(tuple(BlockSpec(form, place, each) for each in tokens), form, (place,), method)
        part = dataclasses.replace(shape, layers=layers)
        return Plan("bench", part, Workload(self._batch, sum(tokens), 1), (own,) * len(layers), tail=1, window=2**62)


def _as_if_copied(block: Block) -> Block:
    """The block with its arrays described as on the device: copying one from the host there copies nothing."""
    here = memory.sharding("device")
    arrays = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here) for array in block.arrays)
    return dataclasses.replace(block, arrays=arrays)
