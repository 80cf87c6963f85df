"""Device and host memory: shardings of each kind, the pinned pool, and how much is free.

Host blocks live in pinned memory, which the GPU's copy engines read at the link's full rate. XLA caps its pinned pool
at 64 GB unless XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB is set before the backend starts. Importing kvrecomp sets it to the
machine's memory when it still can.
"""

import functools
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from kvrecomp.plan import Memory

LIMIT_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_DEFAULT_LIMIT_GB = 64
_KINDS = {"device": "device", "host": "pinned_host"}


def sharding(memory: Memory) -> Sharding:
    """Where arrays of that memory live; `device` is the one that computes, by default jax's first."""
    return SingleDeviceSharding(jax.devices()[0], memory_kind=_KINDS[memory])


def backend_started() -> bool:
    """Whether jax has initialised its backends, after which environment variables for them come too late."""
    name = "jax_num_cpu_devices"  # jax refuses to change it once a backend has started
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, before + 2)
    except RuntimeError:
        return True
    jax.config.update(name, before)
    return False


def zeros(shape: tuple[int, ...], dtype: jnp.dtype, memory: Memory) -> jax.Array:
    """A new array of zeros in that memory."""
    return _make_zeros(shape, dtype, memory)()


@functools.cache
def _make_zeros(shape: tuple[int, ...], dtype: jnp.dtype, memory: Memory):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding(memory))


def reserve(memory: Memory, shapes: Sequence[tuple[tuple[int, ...], jnp.dtype]]) -> None:
    """Makes XLA's pool hold arrays of these shapes, so that making them later allocates nothing from the system.

    Pinning gigabytes takes seconds, and stalls every other use of the device meanwhile.
    """
    jax.block_until_ready([zeros(shape, dtype, memory) for shape, dtype in shapes])


@functools.cache
def one_number(memory: Memory, dtype: str) -> jax.Array:
    """The smallest array there is in that memory: its type says where it is."""
    return jax.device_put(np.zeros((), jnp.dtype(dtype)), sharding(memory))


def _proc_meminfo(field: str) -> int:
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {field}")


def raise_pinned_limit() -> None:
    """Lets the pinned pool grow to the machine's memory, unless the variable is set or the backend has started."""
    if LIMIT_VARIABLE not in os.environ and not backend_started():
        os.environ[LIMIT_VARIABLE] = str(max(_DEFAULT_LIMIT_GB, total_host_bytes() // 10**9))


def pinned_limit() -> int:
    """Bytes that the pinned pool may hold."""
    return int(os.environ.get(LIMIT_VARIABLE, _DEFAULT_LIMIT_GB)) * 10**9


def total_host_bytes() -> int:
    """Host memory of the machine, in bytes."""
    return _proc_meminfo("MemTotal")


def free_host_bytes() -> int:
    """Host memory that is available now, in bytes; half of it where the device is the CPU, which has the other half."""
    available = _proc_meminfo("MemAvailable")
    return available if _device_limits() else available // 2


def free_device_bytes() -> int:
    """Device memory that XLA may still allocate, in bytes; half of the host's where the device is the CPU."""
    limits = _device_limits()
    return limits["bytes_limit"] - limits["bytes_in_use"] if limits else free_host_bytes()


def _device_limits() -> dict[str, int]:
    """What XLA says of device memory; nothing for a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats if "bytes_limit" in stats else {}
