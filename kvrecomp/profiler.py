"""Measures the machine: how fast whole blocks cross the link."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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


COPY_PASSES = 4


def copy_rate(block_bytes: int, blocks: int, repeats: int = 5) -> float:
    """Bytes a second from pinned host memory to the device: copies of whole blocks, and nothing else, in one program.

    Every block is copied COPY_PASSES times, through the window of a step: the rate is what a step could reach at best.
    """
    arrays = [memory.zeros((1, 1, block_bytes // 4), jnp.dtype(jnp.int32), "host") for _ in range(blocks)]

    @jax.jit
    def copy_all(arrays):
        own = [Block((array,), "activations", "host") for array in arrays] * COPY_PASSES
        window, ends = Window([own], 2 * block_bytes, "pipelined"), []
        for _ in own:
            arrived = jax.lax.optimization_barrier(window.take().arrays[0])
            ends.append(window.used(arrived[0, 0, -1]))
        return ends

    program = copy_all.lower(arrays).compile()
    return COPY_PASSES * blocks * block_bytes / median_seconds(lambda: program(arrays), repeats)
