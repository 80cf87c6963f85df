"""Measures the layers of a model at work: which runs of `layer_bench` tell, and what."""

import functools
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kvrecomp.measure.layer_bench import TAIL, LayerBench, Run
from kvrecomp.measure.timing import least_seconds
from kvrecomp.plan import DEFAULT_WINDOW, LEAST_ALIGNED, MEMORIES, LayerShape, Memory, ModelShape, uneven
from kvrecomp.plan.cutting import BLOCKS_PER_WINDOW
from kvrecomp.predict.hardware import ATTENTION, Attention, Curve, LayerTimes, Work, attention_work, project_work
from kvrecomp.run import memory
from kvrecomp.run.model import Model
from kvrecomp.run.programs import side_by_side

FEW_LAYERS, MORE_LAYERS = 2, 6
ATTENDING_LAYERS = 4  # fewer are compiled sooner
SIZES, RATIO = 3, 4  # of blocks, each so many times as long as the one before
SHORTER = 1  # sizes more on the device, for what a tail takes
MORE_RECOMPUTED = 2  # half and an eighth of the longest: between the others kernels that recompute K and V differ most
WHOLE = 8  # quarters of the window: 2 GiB, which is 4096 tokens' activations of 32 rows of OPT-13B, and some
AWAITED, AWAITED_BYTES = 4, 2**17  # blocks of a layer that are copied: short, to be there before they are used
UNEVEN_TOKENS = LEAST_ALIGNED + 1
SURELY_UNEVEN, MOST_UNEVEN = 1.25, 10.0  # times as long: less is noise, and so is more; 5.8 was seen


class _Runs(NamedTuple):
    """What is timed of a layer, by what it tells."""

    fewer: Run
    more: Run  # of layers, which are alike otherwise
    alone: dict[tuple[Attention, Memory], list[Run]]  # a block, of several sizes
    twice: dict[Attention, list[Run]]  # two blocks of the host, some of which are alone above
    beside: Run  # a block that is absorbed, beside a tail of keys and values
    here: list[Run]  # AWAITED blocks, of fewer and of more layers
    copied: list[Run]  # the same, copied in the step
    odd: dict[Memory, Run]  # the longest block that is absorbed, less one token, where that is uneven

    def every(self) -> list[Run]:
        several = (*self.alone.values(), *self.twice.values(), self.here, self.copied, self.odd.values())
        return [self.fewer, self.more, self.beside, *itertools.chain(*several)]


def measure_layer(model: Model, layer: LayerShape, batch: int) -> LayerTimes:
    """Seconds of the layers of that shape in a step: with a block of several sizes in each form and memory; with two
    from the host; with activations that are absorbed, of a number that is no multiple of ALIGNED, or beside a tail of
    keys and values; and with blocks that are copied. What layers do after attention is timed alone.
    """
    shape = model.shape
    own_numbers = [number for number, own in enumerate(shape.layers) if own == layer]
    numbers = list(itertools.islice(itertools.cycle(own_numbers), MORE_LAYERS))  # again where there are fewer
    runs = _runs_of(shape, layer, batch)  # by the memory that is free before the bench takes any
    bench = LayerBench(model, numbers, batch)
    makers: dict[Run | int, Callable] = {run: functools.partial(bench.step_timer, run) for run in runs.every()}
    makers |= {layers: functools.partial(bench.finish_timer, layers) for layers in (FEW_LAYERS, MORE_LAYERS)}
    timers: dict[Run | int, Callable[[], float]] = {}
    # XLA keeps the kernels that it chose for later programs, but programs compiled at once choose each for themselves.
    # Most of what programs have in common is compiled first, or differences between them would be of kernels, too.
    of_kinds = [runs.alone[kind, "host"][0] for kind in ATTENTION]
    for stage in ([runs.fewer], of_kinds, makers):
        new = [what for what in stage if what not in timers]
        timers |= zip(new, side_by_side(lambda what: makers[what](), new))
    seconds = dict(zip(timers, least_seconds(list(timers.values()))))
    work, outside = _solved(runs, seconds)
    return LayerTimes(layer, shape.dtype, batch, work, outside, shape.vocab, shape.positions)


def _runs_of(shape: ModelShape, layer: LayerShape, batch: int) -> _Runs:
    """What is to be timed of that layer."""
    sizes: dict[tuple[Attention, Memory], list[int]] = {
        (kind, place): block_sizes(kind, shape, layer, batch, longest_block(kind, place), place)
        for kind in ATTENTION
        for place in MEMORIES
    }
    shorter = {kind: sizes[kind, "host"][:2] for kind in ATTENTION}
    # K and V of what is on the device are recomputed by the same kernels as of what was copied: one size tells.
    sizes["recompute", "device"] = shorter["recompute"][:1]
    # Of the shortest blocks differences are noise, most of all; recomputing differs most from size to size.
    doubled = {kind: shorter[kind] if kind == "recompute" else shorter[kind][-1:] for kind in ATTENTION}
    kv, count = "keys_values", ATTENDING_LAYERS
    fewer, more = (Run(layers, kv, kv, shorter[kv][0]) for layers in (FEW_LAYERS, MORE_LAYERS))
    short = block_sizes(kv, shape, layer, batch, AWAITED_BYTES)[-1]
    odd: dict[Memory, int] = {place: sizes["absorb", place][-1] - 1 for place in MEMORIES}
    here = [Run(layers, kv, kv, short, blocks=AWAITED) for layers in (FEW_LAYERS, MORE_LAYERS)]
    return _Runs(
        fewer=fewer,
        more=more,
        alone={key: [Run(count, key[0], key[0], size, key[1]) for size in own] for key, own in sizes.items()},
        twice={kind: [Run(count, kind, kind, size, blocks=2) for size in doubled[kind]] for kind in ATTENTION},
        beside=Run(count, kv, "absorb", shorter["absorb"][-1]),
        here=here,
        copied=[run._replace(copied=True) for run in here],
        odd={place: Run(count, "absorb", "absorb", size, place) for place, size in odd.items() if uneven(size)},
    )


def _solved(runs: _Runs, seconds: Mapping[Run | int, float]) -> tuple[dict[Work, Curve], float]:
    """What a layer's work takes, and a step outside its layers. `seconds` are those of every run, and those that so
    many layers take after attention.

    What layers take without a block is twice what they take with one, less that with two. Timed themselves, they would
    be of other kernels: XLA fuses more there.
    """
    kv, count, further = "keys_values", ATTENDING_LAYERS, MORE_LAYERS - FEW_LAYERS
    bare = {
        kind: statistics.mean(2 * seconds[run._replace(blocks=1)] - seconds[run] for run in own)
        for kind, own in runs.twice.items()
    }

    def added(run: Run) -> float:
        """A layer's seconds for the block, beside its tail."""
        return (seconds[run] - bare[run.tail]) / count

    work: dict[Work, Curve] = {}
    for (kind, place), own in runs.alone.items():
        curve = curve_through([run.tokens for run in own], [added(run) for run in own])
        work[attention_work(kind, place)] = curve
    size, recomputed = runs.alone["recompute", "device"][0].tokens, work["recompute"]
    work["device_recompute"] = recomputed.plus(work["device_recompute"](size) - recomputed(size))
    for place in MEMORIES:
        even, slower = work[attention_work("absorb", place)], 1.0
        if place in runs.odd:
            slower = _times_as_long(added(runs.odd[place]), even(runs.odd[place].tokens))
        work[attention_work("absorb", place, UNEVEN_TOKENS)] = even.times(slower)

    dense = max(0.0, (seconds[runs.more] - seconds[runs.fewer]) / further - work[kv](runs.more.tokens))
    finish = min(dense, max(0.0, seconds[MORE_LAYERS] - seconds[FEW_LAYERS]) / further)
    # Absorbing is part of what a tail takes that is absorbed.
    prepare = max(0.0, added(runs.beside) - work["absorb"](runs.beside.tokens))
    here, copied = (seconds[more] - seconds[fewer] for fewer, more in (runs.here, runs.copied))
    awaiting = max(0.0, copied - here) / further / AWAITED
    for kind in ATTENTION:
        tail = work[attention_work(kind, "device")]
        own = dense - finish + (bare[kind] - bare[kv]) / count - (tail(TAIL) - tail(0))
        work[project_work(kind)] = Curve.line(max(0.0, own - (prepare if kind == "absorb" else 0)))
    work |= {"prepare": Curve.line(prepare), "finish": Curve.line(finish), "await": Curve.line(awaiting)}
    return work, max(0.0, bare[kv] - count * dense)


def _times_as_long(uneven_seconds: float, even_seconds: float) -> float:
    """How many times as long uneven blocks take; once where that is not sure."""
    slower = min(MOST_UNEVEN, uneven_seconds / even_seconds) if even_seconds > 0 else 1.0
    return slower if slower > SURELY_UNEVEN else 1.0


def longest_block(kind: Attention, place: Memory) -> int:
    """Bytes of the longest block that is timed: a quarter of the window, as long as a pipeline has any.

    WHOLE times as many, if there is room, on the device, where a layer's tokens are attended to as one, and of what K
    and V are recomputed from: KVPR's schedule does so for all tokens of a layer at once.
    """
    copied = DEFAULT_WINDOW // BLOCKS_PER_WINDOW
    room = memory.free_device_bytes() // (2 * ATTENDING_LAYERS)  # half for what is computed from them
    whole = place == "device" or kind == "recompute"
    return max(copied, min(WHOLE * copied, room)) if whole else copied


def block_sizes(
    kind: Attention, shape: ModelShape, layer: LayerShape, batch: int, longest: int, place: Memory = "host"
) -> list[int]:
    """Tokens of the blocks that are timed, powers of two, as kernels for odd ones take longer; the longest has no more
    than the positions and `longest` bytes."""
    row_bytes = batch * layer.width("keys_values" if kind == "keys_values" else "activations") * shape.itemsize
    most = max(1, min(shape.positions, longest // row_bytes)).bit_length() - 1
    sizes = [2**most // RATIO**part for part in range(SIZES + SHORTER * (place == "device"))]
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
