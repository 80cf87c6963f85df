"""Measures the layers of a model at work, in the program that decoding runs.

That is `forward.decode_step`, cut to a few layers, with blocks that are on the device already or short to copy, so that
nothing but compute is timed.
"""

import dataclasses
import functools
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
from kvrecomp.cache import Block, allocate_tails, describe_blocks, describe_tails, make_cache
from kvrecomp.forward import Model, decode_step
from kvrecomp.hardware import ATTENTION, Attention, Curve, LayerTimes, Work, attention_work, project_work
from kvrecomp.plan import (
    BLOCKS_PER_WINDOW,
    DEFAULT_WINDOW,
    LEAST_ALIGNED,
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
from kvrecomp.timing import device_timer, least_seconds, median_seconds, random, random_maker

FEW_LAYERS, MORE_LAYERS = 2, 6
ATTENDING_LAYERS = 4  # fewer are compiled sooner
SIZES, RATIO = 4, 4  # of blocks, each so many times as long as the one before
MORE_RECOMPUTED = 2  # half and an eighth of the longest: between the others kernels that recompute K and V differ most
WHOLE = 8  # quarters of the window: 2 GiB, which is 4096 tokens' activations of 32 rows of OPT-13B, and some
AWAITED, AWAITED_BYTES = 4, 2**17  # blocks of a layer that are copied: short, to be there before they are used
UNEVEN_TOKENS = LEAST_ALIGNED + 1
SURELY_UNEVEN, MOST_UNEVEN = 1.25, 4.0  # times as long: less is noise, and so is more
TAIL = 32  # tokens: XLA fuses the scores of very few with others', and computes them many times
STEPS = 10  # at most, dispatched one after the other
ENOUGH_SECONDS = 0.02  # for a run: slow steps, as a CPU's, are fewer
REPEATS = 2  # of a run, in each round


class _Run(NamedTuple):
    """What is timed: so many layers, their tails attended to as `tail` says, and `blocks` of so many `tokens` each as
    `kind` does; those of the host are on the device before the step, unless they are `copied` in it."""

    layers: int
    tail: Attention
    kind: Attention
    tokens: int
    place: Memory = "host"
    blocks: int = 1
    copied: bool = False


def measure_layer(model: Model, layer: LayerShape, batch: int) -> LayerTimes:
    """Seconds of the layers of that shape in a step: with a block of several sizes in each form and memory; with two
    from the host; with activations that are absorbed, of a number that is no multiple of ALIGNED, or beside a tail of
    keys and values; and with blocks that are copied. What layers do after attention is timed alone.

    What layers take without a block is twice what they take with one, less that with two. Timed themselves, they would
    be of other kernels: XLA fuses more there.
    """
    shape = model.shape
    own_numbers = [number for number, own in enumerate(shape.layers) if own == layer]
    numbers = list(itertools.islice(itertools.cycle(own_numbers), MORE_LAYERS))  # again where there are fewer
    sizes: dict[tuple[Attention, Memory], list[int]] = {
        (kind, place): block_sizes(kind, shape, layer, batch, longest_block(kind, place))
        for kind in ATTENTION
        for place in MEMORIES
    }
    inner = {kind: sizes[kind, "host"][1:3] or sizes[kind, "host"] for kind in ATTENTION}
    count, kv = ATTENDING_LAYERS, "keys_values"
    few, more = (_Run(layers, kv, kv, inner[kv][0]) for layers in (FEW_LAYERS, MORE_LAYERS))
    # K and V of what is on the device are recomputed by the same kernels as of what was copied: one size tells.
    sizes["recompute", "device"] = inner["recompute"][:1]
    alone: dict[tuple[Attention, Memory], list[_Run]] = {
        (kind, place): [_Run(count, kind, kind, size, place) for size in own] for (kind, place), own in sizes.items()
    }
    twice = {kind: [_Run(count, kind, kind, size, blocks=2) for size in inner[kind]] for kind in ATTENTION}
    beside = [_Run(count, kv, "absorb", size) for size in inner["absorb"]]
    short = block_sizes(kv, shape, layer, batch, AWAITED_BYTES)[-1]
    here = [_Run(layers, kv, kv, short, blocks=AWAITED) for layers in (FEW_LAYERS, MORE_LAYERS)]
    copied = [run._replace(copied=True) for run in here]
    odd: dict[Memory, _Run] = {
        place: _Run(count, "absorb", "absorb", max(1, sizes["absorb", place][-1] - 1), place) for place in MEMORIES
    }
    bench = _LayerBench(model, numbers, batch)
    runs = [few, more, *itertools.chain(*alone.values(), *twice.values()), *beside, *here, *copied, *odd.values()]
    makers = [functools.partial(bench.step_timer, run) for run in runs]
    makers += [functools.partial(bench.finish_timer, layers) for layers in (FEW_LAYERS, MORE_LAYERS)]
    *of_steps, few_finish, more_finish = least_seconds(side_by_side(lambda make: make(), makers))
    seconds = dict(zip(runs, of_steps, strict=True))

    bare = {
        kind: statistics.mean(2 * seconds[run._replace(blocks=1)] - seconds[run] for run in own)
        for kind, own in twice.items()
    }
    work: dict[Work, Curve] = {}
    for (kind, place), own in alone.items():
        added = [(seconds[run] - bare[kind]) / count for run in own]
        work[attention_work(kind, place)] = curve_through(sizes[kind, place], added)
    (size,), recomputed = sizes["recompute", "device"], work["recompute"]
    work["device_recompute"] = recomputed.plus(work["device_recompute"](size) - recomputed(size))
    dense = max(0.0, (seconds[more] - seconds[few]) / (MORE_LAYERS - FEW_LAYERS) - work[kv](more.tokens))
    finish = min(dense, max(0.0, more_finish - few_finish) / (MORE_LAYERS - FEW_LAYERS))
    # Absorbing is part of what a tail takes that is absorbed.
    absorbing = [(seconds[run] - bare[kv]) / count - work["absorb"](run.tokens) for run in beside]
    prepare = max(0.0, statistics.mean(absorbing))
    of_layers = [seconds[many] - seconds[less] for less, many in (here, copied)]
    awaiting = max(0.0, of_layers[1] - of_layers[0]) / (MORE_LAYERS - FEW_LAYERS) / AWAITED
    for place, run in odd.items():
        even = work[attention_work("absorb", place)]
        taken, own = even(run.tokens), (seconds[run] - bare["absorb"]) / count
        slower = min(MOST_UNEVEN, own / taken) if taken > 0 and run.tokens > LEAST_ALIGNED else 1.0
        work[attention_work("absorb", place, UNEVEN_TOKENS)] = even.times(slower if slower > SURELY_UNEVEN else 1.0)
    for kind in ATTENTION:
        tail = work[attention_work(kind, "device")]
        own = dense - finish + (bare[kind] - bare[kv]) / count - (tail(TAIL) - tail(0))
        work[project_work(kind)] = Curve.line(max(0.0, own - (prepare if kind == "absorb" else 0)))
    work |= {"prepare": Curve.line(prepare), "finish": Curve.line(finish), "await": Curve.line(awaiting)}
    outside = max(0.0, bare[kv] - count * dense)
    return LayerTimes(layer, shape.dtype, batch, work, outside, shape.vocab, shape.positions)


def longest_block(kind: Attention, place: Memory) -> int:
    """Bytes of the longest block that is timed: a quarter of the window, as long as a pipeline has any.

    WHOLE times as many, if there is room, on the device, where a layer's tokens are attended to as one, and of what K
    and V are recomputed from: KVPR's schedule does so for all tokens of a layer at once.
    """
    copied = DEFAULT_WINDOW // BLOCKS_PER_WINDOW
    room = memory.free_device_bytes() // (2 * ATTENDING_LAYERS)  # half for what is computed from them
    whole = place == "device" or kind == "recompute"
    return max(copied, min(WHOLE * copied, room)) if whole else copied


def block_sizes(kind: Attention, shape: ModelShape, layer: LayerShape, batch: int, longest: int) -> list[int]:
    """Tokens of the blocks that are timed, powers of two, as kernels for odd ones take longer; the longest has no more
    than the positions and `longest` bytes."""
    row_bytes = batch * layer.width("keys_values" if kind == "keys_values" else "activations") * shape.itemsize
    most = max(1, min(shape.positions, longest // row_bytes)).bit_length() - 1
    sizes = [2**most // RATIO**part for part in range(SIZES)]
    if kind == "recompute":
        sizes += [2**most // 2 // RATIO**part for part in range(MORE_RECOMPUTED)]
    return sorted({max(1, size) for size in sizes})


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
    """Times a step of layers of a model. Blocks of the host that are not copied are on the device, and used as if they
    had been."""

    def __init__(self, model: Model, numbers: Sequence[int], batch: int):
        """`numbers` are those of the layers; what they have in host memory is copied to the device."""
        self._model, self._numbers, self._batch = model, numbers, batch
        self._graph, state = nnx.split(model)
        weights, self._structure = jax.tree.flatten(state)
        paths, here = [path for path, _ in nnx.to_flat_state(state)], memory.sharding("device")
        self._needed = [path[0] != "layers" or path[1] in numbers for path in paths]
        self._weights = [jax.device_put(own, here) for own, needed in zip(weights, self._needed) if needed]
        self._timed = device_timer()

    def step_timer(self, run: _Run) -> Callable[[], float]:
        """Compiles such a step; gives what measures its seconds."""
        plan = self._plan(run)

        def step(weights, blocks, tails, padding, length, token_ids):
            cache = make_cache(blocks, tails, padding, length, 0)
            (tails,), (logits,) = decode_step(self._part(weights, run.layers), plan, [cache], [token_ids])
            return tails, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        described, place = describe_blocks(plan, 0), memory.sharding("host" if run.copied else "device")
        if not run.copied:
            described = [[_as_if_copied(block) for block in own] for own in described]
        padding, length, token_ids = jax.device_put(
            (np.zeros(self._batch, np.int32), np.int32(plan.workload.prompt), np.zeros(self._batch, np.int32)),
            memory.sharding("device"),
        )
        inputs = (self._weights, described, describe_tails(plan), padding, length, token_ids)
        placed = (None, jax.tree.map(lambda _: place, described), None, None, None, None)
        program = jax.jit(step, in_shardings=placed, donate_argnames=("tails",)).lower(*inputs).compile()
        jax.tree.map(lambda like: random_maker(like.shape, like.dtype), described)  # compiled here, too

        def seconds() -> float:
            blocks = jax.tree.map(lambda like: jax.device_put(random(like.shape, like.dtype), place), described)
            rest = allocate_tails(plan), token_ids

            def take(steps: int):
                nonlocal rest
                for _ in range(steps):
                    rest = program(self._weights, blocks, rest[0], padding, length, rest[1])
                return rest[1]

            return self._seconds(take)

        return seconds

    def finish_timer(self, count: int) -> Callable[[], float]:
        """Compiles what so many layers do after attention, whose result is given; gives what measures its seconds."""

        def finish(weights, mixed, token_ids):
            part = self._part(weights, count)
            hidden = part.embed(token_ids, jnp.zeros_like(token_ids))
            for layer in part.layers:
                hidden, own = jax.lax.optimization_barrier((hidden, mixed))  # or XLA projects it for all at once
                hidden = layer(hidden, lambda x, projections, own=own: own)
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
        alone = median_seconds(lambda: take(1), 1)
        steps = max(1, min(STEPS, int(ENOUGH_SECONDS / alone)))
        return self._timed(lambda: take(steps), REPEATS) / steps

    def _part(self, weights: Sequence[Array], count: int) -> Any:
        """The model with so many of the layers."""
        own = iter(weights)
        leaves = [next(own) if needed else None for needed in self._needed]
        model = nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves))
        layers = [model.layers[number] for number in self._numbers[:count]]
        return types.SimpleNamespace(embed=model.embed, unembed=model.unembed, layers=layers)

    def _plan(self, run: _Run) -> Plan:
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


def _as_if_copied(block: Block) -> Block:
    """The block with its arrays described as on the device: copying one from the host there copies nothing."""
    here = memory.sharding("device")
    arrays = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here) for array in block.arrays)
    return dataclasses.replace(block, arrays=arrays)
