"""Measures the machine: how fast whole blocks cross the link."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kvrecomp import memory
from kvrecomp.cache import Block
from kvrecomp.runtime import Window


def median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall-clock seconds of `run`, its arrays awaited, after one call that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_rate(block_bytes: int, blocks: int, repeats: int = 5) -> float:
    """Bytes a second from pinned host memory to the device: copies of whole blocks, and nothing else, in one program.

    The same window as in a step is used, two blocks wide, so the rate is what a step could reach at best.
    """
    arrays = [
        jax.device_put(np.full((1, 1, block_bytes // 4), index, np.int32), memory.sharding("host"))
        for index in range(blocks)
    ]

    @jax.jit
    def copy_all(arrays):
        window, ends = Window(2 * block_bytes, "pipelined"), []
        for array in arrays:
            block = Block((array,), "activations", "host")
            copied = jax.lax.optimization_barrier(window.copy(block).arrays[0])
            ends.append(copied[0, 0, -1])
            window.used(block, ends[-1])
        return ends

    program = copy_all.lower(arrays).compile()
    return blocks * block_bytes / median_seconds(lambda: program(arrays), repeats)
