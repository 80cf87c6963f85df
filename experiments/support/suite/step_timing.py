"""Timing single steps, on caches of random numbers: a step's time does not depend on what is cached."""

import dataclasses
import functools
import itertools
import statistics
import time
from typing import Any

import jax
import numpy as np

import kvrecomp
from kvrecomp.measure.timing import draw
from kvrecomp.plan import Memory, Plan
from kvrecomp.run.cache import Block, Cache, allocate_recent, describe_blocks
from kvrecomp.run.memory import sharding

NEW = 32  # tokens of tail: no step of a measurement writes it out
WARM_UP, LEAST_STEPS, STEPS, MOST_SECONDS = 2, 5, NEW - 1, 1.5  # short steps vary more


def with_positions(config: Any, positions: int) -> Any:
    """The configuration with at least so many positions."""
    return dataclasses.replace(config, positions=max(config.positions, positions))


def device_bytes_with_room(hosted: Plan, cached: Plan, percent: float) -> float:
    """Bytes of device memory with room for `percent` of the blocks of `cached`, which has them all there, beside what
    `hosted`, a plan of the same workload with its cache in host memory, needs of it."""
    return sum(kvrecomp.memory_needed(hosted)["device"].values()) + percent / 100 * cached.bytes_in("device")


def filled_cache(plan: Plan) -> Cache:
    """A cache as after the prompt, of random numbers."""
    blocks = []
    for layer, shape in zip(describe_blocks(plan, 0), plan.shape.layers, strict=True):
        slots = itertools.accumulate((block.tokens for block in layer), initial=0)
        oldest = plan.workload.prompt - shape.cached(plan.workload.prompt)
        blocks.append(tuple(_random_block(block, oldest + slot) for block, slot in zip(layer, slots)))
    return Cache(tuple(blocks), allocate_recent(plan), 0)


def _random_block(block: Block, start: int) -> Block:
    arrays = tuple(_random_array(array.shape, np.dtype(array.dtype), block.memory)() for array in block.arrays)
    return dataclasses.replace(block, arrays=arrays, start=jax.device_put(np.int32(start), sharding("device")))


@functools.cache
def _random_array(shape: tuple[int, ...], dtype: np.dtype, memory: Memory):
    return jax.jit(functools.partial(draw, shape, dtype), out_shardings=sharding(memory))


def step_seconds(decoder: kvrecomp.Decoder) -> float:
    """Median seconds of a step, dispatched one ahead as `generate` does; compiles it first if it is not."""
    decoder.compile(prefill=False)
    cache = jax.block_until_ready(filled_cache(decoder.plan))
    tokens = jax.device_put(np.full(decoder.plan.workload.batch, 5, np.int32), sharding("device"))
    times, waiting = [time.perf_counter()], None
    while len(times) <= STEPS and (len(times) <= LEAST_STEPS or times[-1] - times[0] < MOST_SECONDS):
        cache, logits = decoder.step(cache, tokens)
        if waiting is not None:
            jax.block_until_ready(waiting)
            times.append(time.perf_counter())
        waiting = logits
    jax.block_until_ready(waiting)
    return statistics.median(np.diff(times)[WARM_UP:])
