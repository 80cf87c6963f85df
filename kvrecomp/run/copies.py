"""Copies from host memory to the device within a step, held so that they overlap with compute; and the option without
which XLA overlaps none of them on some GPUs."""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
from jax import Array

from kvrecomp.plan.step_order import START, StepOrder

Result = TypeVar("Result")  # arrays in any structure; a hold goes through all of them

# Options of XLA's for programs that copy from or to host memory. What puts compute between a copy's start and its end
# is the latency hiding scheduler, which XLA has on by itself from Hopper on, and off on older GPUs.
OVERLAPPING: Mapping[str, Any] = types.MappingProxyType({"xla_gpu_enable_latency_hiding_scheduler": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Copies:
    """The arrays that a step's copies bring, by the numbers of their operations in `order`: those in host memory that
    are `waiting`, and those that have `started`, on the device once they arrive.

    XLA may start a copy as early as its operands allow, so it is held: an optimization barrier ties it to the result of
    the operation that it waits for. The barrier's other output, that result, is what the step goes on with; XLA drops
    an operand of a barrier whose output nobody reads, and the hold with it. An array of weights that has arrived
    depends on no compute: a copy that waits for one is tied to the compute before it, too, or copies of weights alone
    would all start at once.

    Without holds all copies of the step start at once and the whole cache is on the device. Blocks that would all fit
    are held too, because XLA's scheduler puts compute after all copies that could go first, and a step of small blocks
    then takes the sum of copies and compute. In KVPR's schedule one copy follows the other: of two that may start, the
    link takes either, and K and V would come before what is recomputed from.
    """

    waiting: dict[int, Array]
    started: dict[int, Array]
    order: StepOrder = field(metadata={"static": True})

    @classmethod
    def begin(cls, order: StepOrder, arrays: Mapping[int, Array]) -> "Copies":
        """Those of a step, of which some start with it. `arrays` has the host array of every copy."""
        return cls(dict(arrays), {}, order)._start(START)

    def take(self, number: int, result: Result) -> tuple["Copies", Result, Array]:
        """A block's array, on the device, and `result`; whatever comes of the array waits for `result`.

        In this order, because XLA would await the array before it has finished `result`, and the link would rest.
        """
        result, array = jax.lax.optimization_barrier((result, self.started[number]))
        copies, array = self.ended(number, array)
        return copies, result, array

    def fetch(self, number: int) -> tuple["Copies", Array]:
        """An array of weights, on the device; nothing waits for it but what uses it."""
        return self.ended(number, self.started[number])

    def ended(self, number: int, result: Result) -> tuple["Copies", Result]:
        """Starts the copies that waited for this operation, whose result it is; go on with what this returns."""
        order, waiting = self.order, dict(self.waiting)
        for copy in order.copies[(order.waits_for == number) | (order.computed == number)].tolist():
            result, waiting[copy] = jax.lax.optimization_barrier((result, waiting[copy]))
        started = {copy: array for copy, array in self.started.items() if copy != number}
        return replace(self, waiting=waiting, started=started)._start(number), result

    def _start(self, number: int) -> "Copies":
        """Starts the copies that wait for this operation."""
        waiting, started = dict(self.waiting), dict(self.started)
        for copy in self.order.copies[self.order.waits_for == number].tolist():
            started[copy] = jax.device_put(waiting.pop(copy), jax.memory.Space.Device)
        return replace(self, waiting=waiting, started=started)
