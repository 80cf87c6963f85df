"""The window: copies from host memory to the device within a step, in the order of use, held so that they overlap."""

import collections
import itertools
import operator
from collections.abc import Sequence
from typing import TypeVar

import jax
from jax import Array

from kvrecomp.plan import Copy, Schedule, events_before

Result = TypeVar("Result")  # arrays in any structure; a hold goes through all of them


class Window:
    """Copies host arrays to the device in the order of use, with at most `size` bytes on their way or in use; layer by
    layer with one on its way, and a layer's own bytes at most.

    XLA starts a copy as early as its operands allow, so it is held: an optimization barrier ties it to the array
    that makes room for it, one that has arrived or the result of one that was used. The barrier's other output,
    that array, is what the step goes on with; XLA drops an operand of a barrier whose output nobody reads, and the hold
    with it.
    Without holds all copies of the step start at once and the whole cache is on the device. Blocks that would all fit
    are held too, `COPIES_AHEAD` at a time, because XLA's scheduler puts compute after all copies that could go first,
    and a step of small blocks then takes the sum of copies and compute.
    """

    def __init__(self, layers: Sequence[Sequence[tuple[Array, Copy]]], size: int, schedule: Schedule):
        """`layers` lists what every layer needs from the host, in the order of use."""
        self._schedule = schedule
        self._waiting = collections.deque(array for layer in layers for array, _ in layer)
        # Where a layer keeps something, its last array is used when the layer is done.
        self._lasts = collections.deque(
            number == len(layer) and any(copy.kept for _, copy in layer)
            for layer in layers
            for number in range(1, len(layer) + 1)
        )
        self._until_done = False  # whether that holds for the array that was taken last
        if schedule == "pipelined":
            copies = [[copy for _, copy in layer] for layer in layers]
            self._before = collections.deque(events_before(copies, size))
        else:
            # The first of a layer when the layer before is done, another when the one before it has arrived: of two
            # copies that may start, the link takes either, and K and V would come before what is recomputed from.
            done = [number for number, layer in enumerate(layers) for _ in layer]
            self._before = collections.deque(map(operator.add, itertools.count(), done))
        self._events = 0  # arrays that arrived and, in the pipeline, arrays used or, layer by layer, layers done
        self._copied: collections.deque[Array] = collections.deque()
        self._start(None)

    def take(self, result: Result) -> tuple[Result, Array]:
        """The next array, on the device, and `result`; whatever comes of the array waits for `result`.

        In this order, because XLA would await the array before it has finished `result`, and the link would rest.
        """
        self._until_done = self._lasts.popleft()
        result, array = jax.lax.optimization_barrier((result, self._copied.popleft()))
        return result, self._event(array)

    def fetch(self) -> Array:
        """The next array, on the device; nothing waits for it but what uses it."""
        self._until_done = self._lasts.popleft()
        return self._event(self._copied.popleft())

    def used(self, result: Result) -> Result:
        """Says that the array taken last is not needed once `result` is computed, or that it is kept until the layer is
        done; go on with what this returns."""
        return result if self._until_done else self._event(result, "pipelined")

    def layer_done(self, hidden: Result) -> Result:
        """Ends a layer; KVPR's own schedule starts the next layer's copies here. Go on with what this returns."""
        if self._until_done:
            self._until_done = False
            hidden = self._event(hidden, "pipelined")
        return self._event(hidden, "layerwise")

    def _event(self, result: Result, only: Schedule | None = None) -> Result:
        if only not in (None, self._schedule):
            return result
        self._events += 1
        return self._start(result)

    def _start(self, result: Result) -> Result:
        """Starts, once `result` is there, the copies that may start now."""
        while self._before and self._before[0] <= self._events:
            self._before.popleft()
            array = self._waiting.popleft()
            if result is not None:
                result, array = jax.lax.optimization_barrier((result, array))
            self._copied.append(jax.device_put(array, jax.memory.Space.Device))
        return result
