"""Measures this machine: the link, matrix products, device memory."""

import functools
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kvrecomp import memory
from kvrecomp.hardware import HardwareProfile
from kvrecomp.holds import Copy
from kvrecomp.plan import GIB, MIB
from kvrecomp.timing import device_timer, measured_line, median_seconds, random, seconds_longer
from kvrecomp.window import Window

HANDOFF_BYTES = 2 * MIB  # so long to copy that the host, which starts copies and kernels, is ahead
COPY_PASSES = (2, 8)  # how often each block is copied when the rate of copies is measured


def this_machine() -> dict[str, Any]:
    """What a profile holds for."""
    device = jax.devices()[0]
    driver = pathlib.Path("/proc/driver/nvidia/version")
    if device.platform == "gpu" and driver.exists():
        version = re.search(r"\d+\.\d+(\.\d+)?", driver.read_text())
        version = version[0] if version else "unknown"
    else:
        version = device.platform
    return {"device": device.device_kind, "count": len(jax.devices()), "jax": jax.__version__, "driver": version}


def measure_machine() -> HardwareProfile:
    """The profile of this machine, with no layers timed."""
    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    dtype = _rate_dtype()
    sizes = [2**16, 2**19, 2**22, 2**25, 2**29] if gpu else [2**16, 2**19, 2**22, 2**24]
    stats = device.memory_stats() or {}
    to_device = measured_line(
        "copies to the device", sizes, functools.partial(_to_device_seconds, timed=device_timer())
    )
    kernel = _kernel_seconds(dtype)
    beside = copy_rate(min(sizes[-1], 256 * MIB), 4, repeats=3, computing=True)
    return HardwareProfile(
        **this_machine(),
        device_bytes=float(stats.get("bytes_limit", memory.total_host_bytes())),
        host_bytes=float(memory.total_host_bytes()),
        to_device=to_device,
        to_host=measured_line("copies to the host", sizes, _to_host_seconds),
        beside_compute=beside,
        handoff_seconds=_handoff_seconds(to_device.base + HANDOFF_BYTES / beside, kernel),
        matmul_rate=_matmul_rate(dtype),
        memory_rate=_memory_rate(min(2 * sizes[-1], GIB)),
        kernel_seconds=kernel,
        source=f"measured, {jnp.dtype(dtype).name}",
    )


def _rate_dtype() -> Any:
    """What models are computed in here: 16 bits on a GPU, as it has them, 32 elsewhere."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return jnp.float32
    old = float(getattr(device, "compute_capability", "8.0")) < 8  # bfloat16 began with Ampere
    return jnp.float16 if old else jnp.bfloat16


def copy_rate(block_bytes: int, blocks: int, repeats: int = 5, computing: bool = False) -> float:
    """Bytes a second from pinned host memory to the device, of copies of whole blocks in one program.

    The copies, of `block_bytes` each, go through the window of a step: the rate is about what a step can reach.
    `computing` attends to every block when it is there.
    """
    return block_bytes / _copy_seconds(_host_arrays(block_bytes, blocks), repeats, computing, 4)


def _host_arrays(block_bytes: int, blocks: int) -> list[jax.Array]:
    dtype = jnp.dtype(_rate_dtype())
    numbers = block_bytes // dtype.itemsize
    width = min(4096, numbers)
    return [memory.zeros((numbers // width, 1, width), dtype, "host") for _ in range(blocks)]


def _copy_seconds(arrays: Sequence[jax.Array], repeats: int, computing: bool, room: int) -> float:
    """Seconds of a copy of one array, through the window of a step with room for so many: the slope between programs of
    few and of many."""
    few, many = (_held_copies(arrays, passes, computing, room) for passes in COPY_PASSES)
    return seconds_longer(few, many, repeats) / (COPY_PASSES[1] - COPY_PASSES[0]) / len(arrays)


def _held_copies(arrays: Sequence[jax.Array], passes: int, computing: bool, room: int) -> Callable[[], Any]:
    """A program that copies every array so often."""

    @jax.jit
    def copy_all(arrays):
        own = [(array, Copy(array.size * array.dtype.itemsize)) for array in arrays] * passes
        window, result = Window([own], room * own[0][1].nbytes, "pipelined"), jnp.zeros((), arrays[0].dtype)
        ends = []
        for _ in own:
            before, x = window.take(result)
            ends.append(before)  # read, or XLA would drop the order with it
            result = x[0, 0, -1]
            if computing:
                queries = jnp.broadcast_to(x[0, 0], (32, x.shape[-1]))
                scores = jnp.einsum("nh,sbh->nsb", queries, x)
                result = jnp.einsum("nsb,sbh->nh", scores, x)
            result = window.used(result)
        return *ends, result

    return functools.partial(copy_all.lower(arrays).compile(), arrays)


def _to_device_seconds(size: float, repeats: int, timed: Callable[[Callable[[], Any], int], float]) -> float:
    """Of one copy among many in a program, none of which waits for anything but the link.

    `timed` has the host ahead: launching a small copy takes it longer than the link.
    """
    count = int(max(2, min(32, 2**25 // size)))
    arrays = _host_arrays(int(size), 2 * count)

    def copy_all(arrays):
        return [jax.device_put(array, jax.memory.Space.Device)[0, 0, -1] for array in arrays]

    few, many = (functools.partial(jax.jit(copy_all).lower(own).compile(), own) for own in (arrays[:count], arrays))
    return seconds_longer(few, many, repeats, timed) / count


def _handoff_seconds(copy_seconds: float, kernel_seconds: float) -> float:
    """To compute and to the link. With room for one copy in the window, each waits until the one before was used: in
    the time of one there are the copy, of HANDOFF_BYTES, a kernel and both handoffs."""
    each = _copy_seconds(_host_arrays(HANDOFF_BYTES, 4), 9, False, 1)
    return max(0.0, (each - copy_seconds - kernel_seconds) / 2)


def _to_host_seconds(size: float, repeats: int) -> float:
    """Of one copy among several in a program."""
    count = int(max(1, min(16, 2**28 // size)))
    array = memory.zeros((int(size) // 4,), jnp.dtype(jnp.float32), "device")

    def copy_out(array):
        return [array + number for number in range(count)]

    program = jax.jit(copy_out, out_shardings=memory.sharding("host")).lower(array).compile()
    return median_seconds(lambda: program(array), repeats) / count


def _matmul_rate(dtype: Any) -> float:
    """Floating-point operations a second of the products that recomputing K and V is made of, tokens by hidden size.

    The size grows until a product takes long enough to be timed; on a GPU no smaller one does.
    """
    rate = 0.0
    for size in (4096, 8192) if jax.default_backend() == "gpu" else (512, 1024, 2048, 4096):
        tokens, kernel = random((size, size), dtype), random((size, size), dtype)
        program = jax.jit(_chain_of_products, static_argnums=2).lower(tokens, kernel, 4).compile()
        seconds = median_seconds(functools.partial(program, tokens, kernel)) / 4
        rate = 2 * size**3 / seconds
        if seconds > 1e-3:
            break
    return rate


def _chain_of_products(x: jax.Array, kernel: jax.Array, count: int) -> jax.Array:
    for _ in range(count):
        x = x @ kernel
    return x


def _memory_rate(size: int) -> float:
    """Bytes a second between the device and its own memory: the slope from a quarter of the size to all of it."""
    quarter, whole = (memory.zeros((size // part // 4,), jnp.dtype(jnp.float32), "device") for part in (4, 1))
    more = jax.jit(lambda array: array + 1)
    few, many = (functools.partial(more.lower(own).compile(), own) for own in (quarter, whole))
    return 2 * 0.75 * size / seconds_longer(few, many, 9)  # read and written


def _kernel_seconds(dtype: Any) -> float:
    """What one more kernel adds to a program: the slope of chains of products too small to take time."""
    small = memory.zeros((64, 64), jnp.dtype(dtype), "device")
    chain = jax.jit(_chain_of_products, static_argnums=2)
    few, many = (functools.partial(chain.lower(small, small, count).compile(), small, small) for count in (32, 160))
    return seconds_longer(few, many, 9) / 128
