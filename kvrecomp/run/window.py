"""The window: copies from host memory to the device within a step, in the order of use, held so that they overlap; and
the option without which XLA overlaps none of them on some GPUs."""

import collections
import itertools
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax import Array

from kvrecomp.plan import Schedule
from kvrecomp.plan.holds import Copy, compute_before, events_before

Result = TypeVar("Result")  # arrays in any structure; a hold goes through all of them

# Options of XLA's for programs that copy from or to host memory. What puts compute between a copy's start and its end
# is the latency hiding scheduler, which XLA has on by itself from Hopper on, and off on older GPUs.
OVERLAPPING: Mapping[str, Any] = types.MappingProxyType({"xla_gpu_enable_latency_hiding_scheduler": True})


@dataclass
class _Waiting:
    """A host array whose copy waits for so many events, the last of compute among them being number `compute`."""

    array: Array
    before: int
    compute: int


class Window:
    """Copies host arrays to the device in the order of use, with at most `size` bytes on their way or in use; layer by
    layer with one on its way, and a layer's own bytes at most.

    XLA may start a copy as early as its operands allow, so it is held: an optimization barrier ties it to the array
    that makes room for it, one that has arrived or the result of one that was used. The barrier's other output,
    that array, is what the step goes on with; XLA drops an operand of a barrier whose output nobody reads, and the hold
    with it. A kept array that has arrived depends on no compute: a copy that waits for one is tied to the compute
    before it, too, or copies of weights alone would all start at once.
    Without holds all copies of the step start at once and the whole cache is on the device. Blocks that would all fit
    are held too, COPIES_IN_FLIGHT at a time, because XLA's scheduler puts compute after all copies that could go first,
    and a step of small blocks then takes the sum of copies and compute. Layer by layer, KVPR's own schedule, one copy
    follows the other: of two that may start, the link takes either, and K and V would come before what is recomputed
    from. `holds.events_before` has the rule.
    """

    def __init__(self, layers: Sequence[Sequence[tuple[Array, Copy]]], size: int, schedule: Schedule):
        """`layers` lists what every layer needs from the host, in the order of use."""
        pairs = list(itertools.chain(*layers))
        copies, counts = [copy for _, copy in pairs], list(map(len, layers))
        before = events_before(copies, counts, size, schedule)
        holds = zip(before.tolist(), compute_before(copies, counts, before).tolist(), strict=True)
        self._waiting = collections.deque(_Waiting(array, *hold) for (array, _), hold in zip(pairs, holds, strict=True))
        self._events = 0
        self._copied: collections.deque[Array] = collections.deque()
        self._start(None)

    def take(self, result: Result) -> tuple[Result, Array]:
        """The next array, on the device, and `result`; whatever comes of the array waits for `result`.

        In this order, because XLA would await the array before it has finished `result`, and the link would rest.
        """
        result, array = jax.lax.optimization_barrier((result, self._copied.popleft()))
        return result, self._event(array)

    def fetch(self) -> Array:
        """The next array, which its layer keeps, on the device; nothing waits for it but what uses it."""
        return self._event(self._copied.popleft())

    def used(self, result: Result) -> Result:
        """Says that the array taken last is not needed once `result` is computed; go on with what this returns."""
        return self._event(result)

    def layer_done(self, hidden: Result) -> Result:
        """Ends a layer; go on with what this returns."""
        return self._event(hidden)

    def _event(self, result: Result) -> Result:
        self._events += 1
        return self._start(result)

    def _start(self, result: Result) -> Result:
        """Starts the copies that may start now; ties those to `result` that wait for no later compute."""
        for waiting in itertools.takewhile(lambda each: each.compute <= self._events, self._waiting):
            if result is not None and self._events in (waiting.compute, waiting.before):
                result, waiting.array = jax.lax.optimization_barrier((result, waiting.array))
        while self._waiting and self._waiting[0].before <= self._events:
            array = self._waiting.popleft().array
            self._copied.append(jax.device_put(array, jax.memory.Space.Device))
        return result
