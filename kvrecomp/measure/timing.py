"""Timing programs, and lines through what they took."""

import functools
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvrecomp.predict.hardware import Line
from kvrecomp.run import memory

LOG = logging.getLogger("kvrecomp")
POOR_FIT = 0.1  # a line further than this fraction from what it was fitted to is measured again
ROUNDS, REPEATS = 3, 5
LEAST_SLOPE = 0.01
BUSY_BYTES, FEW_ADDITIONS = 2**28, 8  # more than a GPU caches; as many as can be timed
AHEAD_SECONDS = 0.01  # that the device is kept busy while the host launches what is timed


def median_seconds(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median wall-clock seconds of `run`, its arrays awaited, after one call that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def least_seconds(timers: Sequence[Callable[[], float]]) -> list[float]:
    """The least that each of these measured in ROUNDS rounds of all: what else a machine does slows programs, for a
    while at times, and nothing speeds them."""
    rounds = [[timer() for timer in timers] for _ in range(ROUNDS)]
    return [min(seconds) for seconds in zip(*rounds)]


def seconds_longer(
    few: Callable[[], Any],
    many: Callable[[], Any],
    repeats: int = REPEATS,
    timed: Callable[[Callable[[], Any], int], float] | None = None,
) -> float:
    """How much longer `many` takes than `few`, which does the same less often: what both take once does not count.

    No less than LEAST_SLOPE of what `many` takes: noise can make a difference of two nothing, or less. `timed` is given
    what to run and how often; by default it is `median_seconds`.
    """
    less, more = least_seconds([functools.partial(timed or median_seconds, run, repeats) for run in (few, many)])
    return max(LEAST_SLOPE * more, more - less)


class HostAhead:
    """Times what the device executes, with the host ahead of it: launching a short program can take the host longer.

    The device is kept busy first, for about the seconds given, with additions to an array of BUSY_BYTES.
    """

    def __init__(self, busy_seconds: float = AHEAD_SECONDS):
        self._array = memory.zeros((BUSY_BYTES // 4,), jnp.dtype(jnp.float32), "device")
        self._keep_busy = self._additions(FEW_ADDITIONS)
        addition_seconds = median_seconds(self._busy) / FEW_ADDITIONS
        self._keep_busy = self._additions(1 + int(busy_seconds / addition_seconds))
        (self._busy_seconds,) = least_seconds([functools.partial(median_seconds, self._busy)])

    def _additions(self, count: int) -> Callable[[jax.Array], jax.Array]:
        def add(array: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, count, lambda _, added: added + 1, array)

        return jax.jit(add, donate_argnums=0).lower(self._array).compile()

    def _busy(self) -> jax.Array:
        self._array = self._keep_busy(self._array)
        return self._array

    def median_seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """Median seconds that the device takes for `run`, after one call that is not counted."""

        def both() -> Any:
            self._busy()
            return run()

        return max(0.0, median_seconds(both, repeats) - self._busy_seconds)


def device_timer() -> Callable[[Callable[[], Any], int], float]:
    """What gives the median seconds that the device takes for what it is given to run, so many times."""
    # On a CPU, what launches is what executes.
    return HostAhead().median_seconds if jax.default_backend() == "gpu" else median_seconds


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line with the least squared errors, each relative to what was measured; neither part is negative."""
    weights = 1 / np.asarray(seconds)
    columns = np.stack([np.ones(len(sizes)), np.asarray(sizes, float)], axis=1) * weights[:, None]
    target = np.asarray(seconds) * weights
    (base, slope), *_ = np.linalg.lstsq(columns, target, rcond=None)
    if base < 0:  # through zero
        base, slope = 0.0, _one_part(columns[:, 1], target)
    if slope < 0:
        base, slope = _one_part(columns[:, 0], target), 0.0
    return Line(float(base), float(slope))


def _one_part(column: np.ndarray, target: np.ndarray) -> float:
    return max(0.0, column @ target / np.square(column).sum())


def measured_line(what: str, sizes: Sequence[float], timers: Sequence[Callable[[int], float]]) -> Line:
    """A line through what each size's timer gives for REPEATS repeats. Where that is no line, all are measured again,
    and the line is through the less that each took."""
    seconds = [math.inf] * len(sizes)
    for outcome in ("measuring it again", "predictions may be as far off"):
        seconds = [min(before, timer(REPEATS)) for before, timer in zip(seconds, timers, strict=True)]
        line = fit_line(sizes, seconds)
        errors = [line(size) / measured - 1 for size, measured in zip(sizes, seconds)]
        worst = max(range(len(sizes)), key=lambda number: abs(errors[number]))
        if abs(errors[worst]) <= POOR_FIT:
            break
        LOG.info(
            "%s: a line is %+.0f %% off the %.3g ms measured at %d; %s",
            *(what, 100 * errors[worst], 1e3 * seconds[worst], sizes[worst], outcome),
        )
    return line


@functools.cache
def random_maker(shape: tuple[int, ...], dtype: Any) -> Callable[[], jax.Array]:
    """The program, compiled, that `random` executes."""

    def make():
        numbers = draw(shape, dtype)
        return numbers if jnp.issubdtype(dtype, jnp.integer) else numbers * shape[-1] ** -0.5

    return jax.jit(make, out_shardings=memory.sharding("device")).lower().compile()


def random(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random numbers that stay of order one in a product, or any bytes: a GPU multiplies zeros faster than data."""
    return random_maker(shape, dtype)()


def draw(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal random numbers, or any bytes, within a program."""
    make = jax.random.bits if jnp.issubdtype(dtype, jnp.integer) else jax.random.normal
    return make(jax.random.key(0), shape, dtype)
