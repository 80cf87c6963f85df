"""Device and host memory: shardings of each kind, the pinned pool, and how much is free.

Host blocks live in pinned memory, which the GPU's copy engines read at the link's full rate. XLA caps its pinned pool
at 64 GiB unless XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB, which is in GiB too, is set before the backend starts. Importing
kvrecomp sets it to most of what is free when it still can.

The pool grows by as much again as it has, up to its cap: 34 GiB of blocks pin 64, and 66 pin 128, which a machine may
not have. Who knows what will be needed says so with `limit_pinned`. What the pool has it keeps, for later arrays.
"""

import contextlib
import functools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from kvrecomp.plan import GIB, Memory
from kvrecomp.plan.pinned import LIMIT_VARIABLE, pinned_limit

GIVEN_LIMIT = os.environ.get(LIMIT_VARIABLE)  # what a user set
_UNPINNED = 0.15  # of what is free is left: a process had 11 GiB more when compiling OPT-30B's groups, on 125 GiB
_WASTE = 4 * GIB  # of the pool: ends of its ten or so large pieces that are too short for a block of 256 MiB
_KINDS = {"device": "device", "host": "pinned_host"}


def sharding(memory: Memory) -> Sharding:
    """Where arrays of that memory live, those of `device` on the one that computes."""
    return SingleDeviceSharding(device(), memory_kind=_KINDS[memory])


def device() -> Any:
    """The device that computes: jax's first. Raises OSError where jax has none of the kind that it was told to use."""
    try:
        return jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # the second, which says nothing, where a plugin finds no GPU
        raise OSError(
            f"jax has no device where JAX_PLATFORMS is {jax.config.values['jax_platforms']!r}: set it to cpu, to cuda "
            "on a machine with an NVIDIA GPU, or unset it"
        ) from error


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
    made = [zeros(shape, dtype, memory) for shape, dtype in shapes]
    jax.block_until_ready(made)
    _note_pool()  # while they are there


_pool_bytes = 0  # the pinned pool has at least so many


def _note_pool() -> int:
    """Bytes of what is in the pinned pool now; more than ever before is noted."""
    global _pool_bytes
    arrays = [array for array in jax.live_arrays() if array.sharding.memory_kind == _KINDS["host"]]
    used = sum(array.nbytes for array in arrays if not array.is_deleted())
    _pool_bytes = max(_pool_bytes, used)
    return used


def describe(shape: tuple[int, ...], dtype: Any, memory: Memory) -> Any:
    """An abstract array in that memory, to lower a program with, which is to be told its sharding as well.

    jax takes a ShapeDtypeStruct for an array on the device whatever its sharding says; the type of a host array carries
    the memory it is in, and so do its variations.
    """
    return jax.typeof(_one_number(memory, jnp.dtype(dtype).name)).update(shape=shape)


@functools.cache
def _one_number(memory: Memory, dtype: str) -> jax.Array:
    """The smallest array there is in that memory."""
    return jax.device_put(np.zeros((), jnp.dtype(dtype)), sharding(memory))


def limit_pinned_to_free() -> None:
    """Lets the pinned pool grow to most of what is free, unless the variable is set or the backend has started."""
    if LIMIT_VARIABLE not in os.environ and not backend_started():
        os.environ[LIMIT_VARIABLE] = str(max(1, int(_available() * (1 - _UNPINNED) / GIB)))


def limit_pinned(needed: float) -> None:
    """Lets the pinned pool grow to so many bytes and little more, unless it may not anyway or the backend has started.

    What is pinned in excess takes seconds, and memory from others.
    """
    if not backend_started():
        os.environ[LIMIT_VARIABLE] = str(math.ceil(min(pinned_limit(), needed + _WASTE) / GIB))


def total_host_bytes() -> int:
    """Host memory of the machine, or of the control group (a container's) that this process is in, in bytes."""
    return min([_proc_meminfo("MemTotal"), *(limit for limit, _ in _control_groups())])


def free_host_bytes() -> int:
    """Host memory that is available now, in bytes, to this process, whose pinned pool may have some left over; half of
    it where the device is the CPU, which has the other half, and no such pool."""
    used = _note_pool()
    return _available() + _pool_bytes - used if _device_limits() else _available() // 2


def _available() -> int:
    return min([_proc_meminfo("MemAvailable"), *(max(0, limit - used) for limit, used in _control_groups())])


def _proc_meminfo(field: str) -> int:
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {field}")


def _control_groups(
    root: pathlib.Path = pathlib.Path("/sys/fs/cgroup"), listed: pathlib.Path = pathlib.Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """Limit and use, in bytes, of the memory of this process's control groups and of those that these are in.

    Either version of them is read. Groups without a limit are left out, and files that can be dropped from the cache do
    not count as used.
    """
    found = []
    with contextlib.suppress(OSError):
        for line in listed.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                version = _SECOND if controllers == "" else _FIRST
                group = root / version.folder / path.lstrip("/")  # a container does not see it: its own is at the root
                found += [_group_memory(folder, version) for folder in (group, *group.parents)]
    return [group for group in found if group is not None and group[0] < _NO_LIMIT]


class _Version(NamedTuple):
    """What files and fields are called in a version of control groups."""

    folder: str
    limit: str
    used: str
    dropped: str


_FIRST = _Version("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND = _Version("", "memory.max", "memory.current", "inactive_file")
_NO_LIMIT = 2**62  # what the first version has where there is none


def _group_memory(folder: pathlib.Path, version: _Version) -> tuple[int, int] | None:
    """Limit and use of one group; None where it has no limit, or the folder is none."""
    try:
        limit, used = (int((folder / name).read_text()) for name in (version.limit, version.used))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit, used - int(stat[version.dropped])
    except (OSError, ValueError, KeyError):  # ValueError: the limit is "max"
        return None


def free_device_bytes() -> int:
    """Device memory that XLA may still allocate, in bytes; half of the host's where the device is the CPU."""
    limits = _device_limits()
    return limits["bytes_limit"] - limits["bytes_in_use"] if limits else free_host_bytes()


def _device_limits() -> dict[str, int]:
    """What XLA says of device memory; nothing for a CPU."""
    stats = device().memory_stats() or {}
    return stats if "bytes_limit" in stats else {}
