"""Measures this machine: the link, matrix products, device memory."""

import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kvrecomp.measure.timing import device_timer, measured_line, median_seconds, random_maker, seconds_longer
from kvrecomp.plan import GIB, MIB
from kvrecomp.plan.step_order import Op, order_layers
from kvrecomp.predict.hardware import HardwareProfile
from kvrecomp.run import memory
from kvrecomp.run.copies import Copies
from kvrecomp.run.programs import side_by_side
from kvrecomp.run.schedule import OVERLAPPING

HANDOFF_BYTES = 2 * MIB  # so long to copy that the host, which starts copies and kernels, is ahead
COPY_PASSES = (2, 8)  # how often each block is copied when the rate of copies is measured

Timer = Callable[..., float]
"""Gives the seconds of what was compiled for it, measured so many times."""


def this_machine() -> dict[str, Any]:
    """What a profile holds for. Raises OSError where jax has no device."""
    device = memory.device()
    driver = pathlib.Path("/proc/driver/nvidia/version")
    if device.platform == "gpu" and driver.exists():
        version = re.search(r"\d+\.\d+(\.\d+)?", driver.read_text())
        version = version[0] if version else "unknown"
    else:
        version = device.platform
    return {"device": device.device_kind, "count": len(jax.devices()), "jax": jax.__version__, "driver": version}


def measure_machine() -> HardwareProfile:
    """The profile of this machine, with no layers timed. Programs are compiled side by side before one is timed."""
    device = memory.device()
    gpu = device.platform == "gpu"
    dtype = _rate_dtype()
    sizes = [2**16, 2**19, 2**22, 2**25, 2**29] if gpu else [2**16, 2**19, 2**22, 2**24]
    beside_bytes, memory_bytes = min(sizes[-1], 256 * MIB), min(2 * sizes[-1], GIB)
    makers: dict[Hashable, Callable[[], Timer]] = {
        **{("to device", size): functools.partial(_to_device_timer, size) for size in sizes},
        **{("product", size): functools.partial(_product_timer, size, dtype) for size in _product_sizes()},
        "copy": functools.partial(_copy_timer, beside_bytes, 4, True, 4),
        "handoff": functools.partial(_copy_timer, HANDOFF_BYTES, 4, False, 1),
        "kernel": functools.partial(_kernel_timer, dtype),
        "memory": functools.partial(_memory_timer, memory_bytes),
    }
    timers = dict(zip(makers, side_by_side(lambda name: makers[name](), list(makers))))
    timed = device_timer()
    to_device = [functools.partial(timers["to device", size], timed=timed) for size in sizes]
    line = measured_line("copies to the device", sizes, to_device)
    del timed, to_device  # a large array
    kernel_seconds = timers["kernel"](9)
    beside = beside_bytes / timers["copy"](1)  # a quarter of a second each time
    handoff_seconds = _handoff_seconds(timers["handoff"](9), line.base + HANDOFF_BYTES / beside, kernel_seconds)
    stats = device.memory_stats() or {}
    return HardwareProfile(
        **this_machine(),
        device_bytes=float(stats.get("bytes_limit", memory.total_host_bytes())),
        host_bytes=float(memory.total_host_bytes()),
        to_device=line,
        beside_compute=beside,
        handoff_seconds=handoff_seconds,
        matmul_rate=_matmul_rate([timers["product", size] for size in _product_sizes()]),
        memory_rate=1 / timers["memory"](9),
        kernel_seconds=kernel_seconds,
        source=f"measured, {jnp.dtype(dtype).name}",
    )


def _rate_dtype() -> Any:
    """What models are computed in here: 16 bits on a GPU, as it has them, 32 elsewhere."""
    device = memory.device()
    if device.platform != "gpu":
        return jnp.float32
    old = float(getattr(device, "compute_capability", "8.0")) < 8  # bfloat16 began with Ampere
    return jnp.float16 if old else jnp.bfloat16


def copy_rate(block_bytes: int, blocks: int, repeats: int = 5, computing: bool = False) -> float:
    """Bytes a second from pinned host memory to the device, of copies of whole blocks in one program.

    The copies, of `block_bytes` each, go through the window of a step: the rate is about what a step can reach.
    `computing` attends to every block when it is there.
    """
    return block_bytes / _copy_timer(block_bytes, blocks, computing, 4)(repeats)


def _host_shape(block_bytes: int) -> tuple[tuple[int, ...], jnp.dtype]:
    """Shape and dtype of a block of so many bytes."""
    dtype = jnp.dtype(_rate_dtype())
    numbers = block_bytes // dtype.itemsize
    width = min(4096, numbers)
    return (numbers // width, 1, width), dtype


def _host_arrays(block_bytes: int, blocks: int) -> list[jax.Array]:
    return [memory.zeros(*_host_shape(block_bytes), "host") for _ in range(blocks)]


def _traced(program: Callable[[list[jax.Array]], Any], block_bytes: int, blocks: int) -> Any:
    """The program traced for a list of so many blocks in host memory."""
    described = [memory.describe(*_host_shape(block_bytes), "host")] * blocks
    return jax.jit(program, in_shardings=memory.sharding("host")).trace(described)


def _copy_timer(block_bytes: int, blocks: int, computing: bool, room: int) -> Timer:
    """Times a copy of one block through the window of a step with room for so many: the slope between programs of few
    copies and of many."""
    few, many = (_held_copies(block_bytes, blocks, passes, computing, room) for passes in COPY_PASSES)

    def seconds(repeats: int) -> float:
        arrays = _host_arrays(block_bytes, blocks)
        longer = seconds_longer(functools.partial(few, arrays), functools.partial(many, arrays), repeats)
        return longer / (COPY_PASSES[1] - COPY_PASSES[0]) / blocks

    return seconds


def _held_copies(
    block_bytes: int, blocks: int, passes: int, computing: bool, room: int
) -> Callable[[Sequence[jax.Array]], Any]:
    """A program that copies every one of so many arrays so often."""
    count = blocks * passes

    def copy_all(arrays):
        ops = (Op("copy", blocks=(0,), nbytes=block_bytes), Op("attend", blocks=(0,), frees=block_bytes)) * count
        step = order_layers((ops,), (0,), room * block_bytes, "pipelined")
        (order,) = step.of_layers()
        copies = Copies.begin(dict(zip(range(0, 2 * count, 2), itertools.cycle(arrays))), step.at_start)
        ends, result = [], jnp.zeros((), arrays[0].dtype)
        for number in range(0, 2 * count, 2):
            copies, before, x = copies.take(order, number, result)
            ends.append(before)  # read, or XLA would drop the order with it
            result = x[0, 0, -1]
            if computing:
                queries = jnp.broadcast_to(x[0, 0], (32, x.shape[-1]))
                scores = jnp.einsum("nh,sbh->nsb", queries, x)
                result = jnp.einsum("nsb,sbh->nh", scores, x)
            copies, result = copies.ended(order, number + 1, result)
        return *ends, result

    return _traced(copy_all, block_bytes, blocks).lower().compile(compiler_options=dict(OVERLAPPING))


def _to_device_timer(size: int) -> Timer:
    """Times one copy among many in a program, none of which waits for anything but the link.

    The program is timed by `timed`, which has the host ahead: launching a small copy takes it longer than the link.
    """
    count = max(2, min(32, 2**25 // size))

    def copy_all(arrays):
        return [jax.device_put(array, jax.memory.Space.Device)[0, 0, -1] for array in arrays]

    few, many = (
        _traced(copy_all, size, copies).lower().compile(compiler_options=dict(OVERLAPPING))
        for copies in (count, 2 * count)
    )

    def seconds(repeats: int, timed: Callable[[Callable[[], Any], int], float]) -> float:
        arrays = _host_arrays(size, 2 * count)
        runs = functools.partial(few, arrays[:count]), functools.partial(many, arrays)
        return seconds_longer(runs[0], runs[1], repeats, timed) / count

    return seconds


def _handoff_seconds(waiting_seconds: float, copy_seconds: float, kernel_seconds: float) -> float:
    """A handoff to compute or to the link. With room for one copy in the window, each waits until the one before was
    used: its `waiting_seconds` are those of the copy, of HANDOFF_BYTES, of a kernel and of both handoffs."""
    return max(0.0, (waiting_seconds - copy_seconds - kernel_seconds) / 2)


def _product_sizes() -> Sequence[int]:
    """Of square matrices; on a GPU no smaller product takes long enough to be timed."""
    return (4096, 8192) if jax.default_backend() == "gpu" else (512, 1024, 2048, 4096)


def _matmul_rate(timers: Sequence[Timer]) -> float:
    """Floating-point operations a second of the products that recomputing K and V is made of, tokens by hidden size:
    the sizes of `_product_sizes` grow until a product takes long enough to be timed."""
    rate = 0.0
    for size, timer in zip(_product_sizes(), timers, strict=True):
        seconds = timer(5)
        rate = 2 * size**3 / seconds
        if seconds > 1e-3:
            break
    return rate


def _product_timer(size: int, dtype: Any) -> Timer:
    """Times one product of square matrices among several in a program."""
    like, count = memory.describe((size, size), dtype, "device"), 4
    program = jax.jit(_chain_of_products, static_argnums=2).lower(like, like, count).compile()
    make = random_maker(like.shape, dtype)

    def seconds(repeats: int) -> float:
        return median_seconds(functools.partial(program, make(), make()), repeats) / count

    return seconds


def _chain_of_products(x: jax.Array, kernel: jax.Array, count: int) -> jax.Array:
    for _ in range(count):
        x = x @ kernel
    return x


def _memory_timer(size: int) -> Timer:
    """Times a byte read or written in the device's own memory: the slope from a quarter of the size to all of it."""
    shapes = [memory.describe((size // part // 4,), jnp.float32, "device") for part in (4, 1)]
    programs = [jax.jit(lambda array: array + 1).lower(like).compile() for like in shapes]

    def seconds(repeats: int) -> float:
        arrays = [memory.zeros(like.shape, like.dtype, "device") for like in shapes]
        few, many = map(functools.partial, programs, arrays)
        moved = 2 * (arrays[1].nbytes - arrays[0].nbytes)  # read and written
        return seconds_longer(few, many, repeats) / moved

    return seconds


def _kernel_timer(dtype: Any) -> Timer:
    """Times what one more kernel adds to a program: the slope of chains of products too small to take time."""
    like, counts = memory.describe((64, 64), dtype, "device"), (32, 160)
    chain = jax.jit(_chain_of_products, static_argnums=2)
    programs = [chain.lower(like, like, count).compile() for count in counts]

    def seconds(repeats: int) -> float:
        small = memory.zeros(like.shape, like.dtype, "device")
        few, many = (functools.partial(program, small, small) for program in programs)
        return seconds_longer(few, many, repeats) / (counts[1] - counts[0])

    return seconds
