"""Measures the layers of a model at work: steps of a few of them are timed, and what a layer does is their differences.

Steps of `layer_bench` take, where each of n layers has a tail and b blocks of t tokens,

    outside + n * (project + prepare + attention(tail) + b * (attention(t) + unpack(t) + await) + finish)

with `prepare` where activations are absorbed, in the tail or in a block, `unpack` where blocks are packed, and `await`
where they are copied in the step. `Runs` has the steps that are timed, `solve` what their differences tell.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kvrecomp.measure.layer_bench import TAIL, Finish, LayerBench, Run
from kvrecomp.measure.timing import least_seconds
from kvrecomp.plan import DEFAULT_WINDOW, LEAST_ALIGNED, MEMORIES, LayerShape, Memory, ModelShape, uneven
from kvrecomp.plan.codecs import PACKED_DTYPE
from kvrecomp.plan.cutting import BLOCKS_PER_WINDOW
from kvrecomp.predict.hardware import ATTENTION, Attention, Curve, LayerTimes, Work, attention_work, project_work
from kvrecomp.run.memory import free_device_bytes
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
NEVER = 1e9  # seconds a token, of what cannot be
SURELY_UNEVEN, MOST_UNEVEN = 1.25, 10.0  # times as long: less is noise, and so is more; 5.8 was seen


class Runs(NamedTuple):
    """What is timed of a layer. Pairs are of FEW_LAYERS and of MORE_LAYERS, alike otherwise; others of ATTENDING_LAYERS
    whose tail is attended to as the block is, where nothing else is said."""

    layers: tuple[Run, Run]  # with a block of keys and values
    finish: tuple[Finish, Finish]
    one_block: dict[tuple[Attention, Memory], list[Run]]  # of several sizes, from the shortest on
    two_blocks: dict[Attention, list[Run]]  # of the host, and each as long as one of `one_block`
    absorbed: Run  # a block that is absorbed, beside a tail of keys and values
    waiting: tuple[Run, Run]  # AWAITED blocks of keys and values, on the device before the step
    copied: tuple[Run, Run]  # the same, copied in the step
    uneven: dict[Memory, Run]  # the longest block that is absorbed, less one token, where that is uneven
    packed: tuple[Run, ...]  # the longest block of the host that is absorbed, packed, where it may be

    def every(self) -> list[Run | Finish]:
        lists = (*self.one_block.values(), *self.two_blocks.values())
        pairs = (*self.layers, *self.finish, *self.waiting, *self.copied)
        return [*pairs, self.absorbed, *self.uneven.values(), *self.packed, *itertools.chain(*lists)]


def measure_layer(model: Model, layer: LayerShape, batch: int) -> LayerTimes:
    """Seconds of the layers of that shape in a step of `batch` rows."""
    shape = model.shape
    numbers = [number for number, layer_shape in enumerate(shape.layers) if layer_shape == layer]
    numbers = list(itertools.islice(itertools.cycle(numbers), MORE_LAYERS))  # again where there are fewer
    runs = choose_runs(shape, layer, batch)  # by the memory that is free before the bench takes any
    bench = LayerBench(model, numbers, batch)
    timers: dict[Run | Finish, Callable[[], float]] = {}
    # XLA keeps the kernels that it chose for later programs, but programs compiled at once choose each for themselves.
    # Most of what programs have in common is compiled first, or differences between them would be of kernels, too.
    of_kinds = [runs.one_block[kind, "host"][0] for kind in ATTENTION]
    for stage in (runs.layers[:1], of_kinds, runs.every()):
        new = [run for run in stage if run not in timers]
        timers |= zip(new, side_by_side(bench.timer, new))
    seconds = dict(zip(timers, least_seconds(list(timers.values()))))
    work, outside = solve(runs, seconds)
    return LayerTimes(layer, shape.dtype, batch, work, outside, shape.vocab, shape.positions)


def choose_runs(shape: ModelShape, layer: LayerShape, batch: int) -> Runs:
    """What is to be timed of that layer, with the blocks that it may have."""
    one_block: dict[tuple[Attention, Memory], list[Run]] = {}
    two_blocks: dict[Attention, list[Run]] = {}
    for kind in ATTENTION:
        for memory in MEMORIES:
            sizes = block_sizes(kind, shape, layer, batch, longest_block(kind, memory), memory)
            one_block[kind, memory] = [Run(ATTENDING_LAYERS, kind, kind, tokens, memory) for tokens in sizes]
        # Of the shortest blocks differences are noise, most of all; recomputing differs most from size to size.
        shorter = one_block[kind, "host"][:2]
        two_blocks[kind] = [run._replace(blocks=2) for run in (shorter if kind == "recompute" else shorter[-1:])]
    # K and V of what is on the device are recomputed by the same kernels as of what was copied: one size tells.
    one_block["recompute", "device"] = [one_block["recompute", "host"][0]._replace(memory="device")]

    def few_and_more(tokens: int, blocks: int = 1, copied: bool = False) -> tuple[Run, Run]:
        run = Run(FEW_LAYERS, "keys_values", "keys_values", tokens, blocks=blocks, copied=copied)
        return run, run._replace(layers=MORE_LAYERS)

    short = block_sizes("keys_values", shape, layer, batch, AWAITED_BYTES)[-1]
    longest: dict[Memory, Run] = {memory: one_block["absorb", memory][-1] for memory in MEMORIES}
    less_one: dict[Memory, Run] = {memory: run._replace(tokens=run.tokens - 1) for memory, run in longest.items()}
    return Runs(
        layers=few_and_more(one_block["keys_values", "host"][0].tokens),
        finish=(Finish(FEW_LAYERS), Finish(MORE_LAYERS)),
        one_block=one_block,
        two_blocks=two_blocks,
        absorbed=one_block["absorb", "host"][:2][-1]._replace(tail="keys_values"),
        waiting=few_and_more(short, AWAITED),
        copied=few_and_more(short, AWAITED, copied=True),
        uneven={memory: run for memory, run in less_one.items() if uneven(run.tokens)},
        packed=(longest["host"]._replace(codec="packed"),) if shape.dtype == PACKED_DTYPE else (),
    )


def solve(runs: Runs, seconds: Mapping[Run | Finish, float]) -> tuple[dict[Work, Curve], float]:
    """What a layer's work takes, and a step outside its layers, by the seconds of every run."""
    # A step without a block takes twice what it takes with one, less that with two. Timed itself, it would be of other
    # kernels: XLA fuses more there.
    bare = {
        kind: statistics.mean(2 * seconds[run._replace(blocks=1)] - seconds[run] for run in two_blocks)
        for kind, two_blocks in runs.two_blocks.items()
    }

    def block_seconds(run: Run) -> float:
        """A layer's, for its block."""
        return (seconds[run] - bare[run.tail]) / ATTENDING_LAYERS

    def layer_seconds(few: Run | Finish, more: Run | Finish) -> float:
        """What one more layer takes."""
        return (seconds[more] - seconds[few]) / (MORE_LAYERS - FEW_LAYERS)

    work = _attention_curves(runs, block_seconds)
    # A layer with a tail of keys and values and no block, and what of that comes after attention.
    dense = max(0.0, layer_seconds(*runs.layers) - work["keys_values"](runs.layers[0].tokens))
    finish = min(dense, max(0.0, layer_seconds(*runs.finish)))
    prepare = max(0.0, block_seconds(runs.absorbed) - work["absorb"](runs.absorbed.tokens))
    awaiting = max(0.0, layer_seconds(*runs.copied) - layer_seconds(*runs.waiting)) / AWAITED
    for kind in ATTENTION:
        # What comes before attention to blocks: project, attention to the tail and, where that is absorbed, prepare.
        before = dense - finish + (bare[kind] - bare["keys_values"]) / ATTENDING_LAYERS
        tail = work[attention_work(kind, "device")]
        project = before - (tail(TAIL) - tail(0)) - (prepare if kind == "absorb" else 0)
        work[project_work(kind)] = Curve.line(max(0.0, project))
    # What is the same of a packed block and a plain one is not in the difference.
    unpacked = [(run, block_seconds(run) - block_seconds(run._replace(codec="plain"))) for run in runs.packed]
    unpack = max((seconds / run.tokens for run, seconds in unpacked), default=NEVER)
    work |= {"prepare": Curve.line(prepare), "finish": Curve.line(finish), "await": Curve.line(awaiting)}
    work["unpack"] = Curve.line(0.0, max(0.0, unpack))
    return work, max(0.0, bare["keys_values"] - ATTENDING_LAYERS * dense)


def _attention_curves(runs: Runs, block_seconds: Callable[[Run], float]) -> dict[Work, Curve]:
    """Attention to blocks, by their tokens."""
    curves: dict[Work, Curve] = {}
    for (kind, memory), one_block in runs.one_block.items():
        sizes, seconds = [run.tokens for run in one_block], [block_seconds(run) for run in one_block]
        curves[attention_work(kind, memory)] = curve_through(sizes, seconds)
    # Timed at one size: as much more or less than of the host at all.
    size, of_host = runs.one_block["recompute", "device"][0].tokens, curves["recompute"]
    curves["device_recompute"] = of_host.plus(curves["device_recompute"](size) - of_host(size))
    for memory in MEMORIES:
        even, factor = curves[attention_work("absorb", memory)], 1.0
        if memory in runs.uneven:
            run = runs.uneven[memory]
            factor = _times_as_long(block_seconds(run), even(run.tokens))
        curves[attention_work("absorb", memory, UNEVEN_TOKENS)] = even.times(factor)
    return curves


def _times_as_long(uneven_seconds: float, even_seconds: float) -> float:
    """How many times as long uneven blocks take; once where that is not sure."""
    factor = min(MOST_UNEVEN, uneven_seconds / even_seconds) if even_seconds > 0 else 1.0
    return factor if factor > SURELY_UNEVEN else 1.0


def longest_block(kind: Attention, memory: Memory) -> int:
    """Bytes of the longest block that is timed: a quarter of the window, as long as a pipeline has any.

    WHOLE times as many, if there is room, on the device, where a layer's tokens are attended to as one, and of what K
    and V are recomputed from: KVPR's schedule does so for all tokens of a layer at once.
    """
    copied = DEFAULT_WINDOW // BLOCKS_PER_WINDOW
    room = free_device_bytes() // (2 * ATTENDING_LAYERS)  # half for what is computed from them
    whole = memory == "device" or kind == "recompute"
    return max(copied, min(WHOLE * copied, room)) if whole else copied


def block_sizes(
    kind: Attention, shape: ModelShape, layer: LayerShape, batch: int, longest: int, memory: Memory = "host"
) -> list[int]:
    """Tokens of the blocks that are timed, powers of two, as kernels for odd ones take longer; the longest has no more
    than the positions and `longest` bytes."""
    row_bytes = batch * layer.width("keys_values" if kind == "keys_values" else "activations") * shape.itemsize
    most = 1 << max(1, min(shape.positions, longest // row_bytes)).bit_length() - 1
    sizes = [most // RATIO**part for part in range(SIZES + SHORTER * (memory == "device"))]
    if kind == "recompute":
        sizes += [most // 2 // RATIO**part for part in range(MORE_RECOMPUTED)]
    return sorted({max(1, size) for size in sizes})


def curve_through(sizes: Sequence[int], seconds: Sequence[float]) -> Curve:
    """The curve through what was measured. No tokens take what the line through the first two sizes says, from nothing
    to what the first takes. Noise can make a small difference of two times negative: that is nothing.
    """
    first, *rest = (max(0.0, size_seconds) for size_seconds in seconds)
    base = first
    if rest:
        slope = (rest[0] - first) / (sizes[1] - sizes[0])
        base = min(max(0.0, first - slope * sizes[0]), first)
    return Curve((0, *sizes), (base, first, *rest))
