"""Copies from host memory to the device within a step, held so that they overlap with compute."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
from jax import Array

from kvrecomp.plan.step_order import LayerOrder

Result = TypeVar("Result")  # arrays in any structure; a hold goes through all of them


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Copies:
    """The arrays that a step's copies bring, by the numbers of their operations: those in host memory that are
    `waiting`, and those that have `started`, on the device once they arrive.

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

    @classmethod
    def begin(cls, arrays: Mapping[int, Array], at_start: Sequence[int]) -> "Copies":
        """Those of a step, of which some start with it. `arrays` has the host array of every copy."""
        return cls(dict(arrays), {})._start(at_start)

    def of_layer(self, order: LayerOrder) -> "Copies":
        """Those that the layer awaits or that wait for it, by the layer's numbers."""
        concerned = {*range(len(order.ops)), *itertools.chain.from_iterable(order.ties)}
        waiting, started = (
            {copy - order.first: array for copy, array in arrays.items() if copy - order.first in concerned}
            for arrays in (self.waiting, self.started)
        )
        return Copies(waiting, started)

    def after_layer(self, order: LayerOrder, left: "Copies") -> "Copies":
        """Those of the step when the layer has left these of its own."""
        concerned = self.of_layer(order)
        waiting, started = (
            {copy: array for copy, array in arrays.items() if copy - order.first not in of_layer}
            | {copy + order.first: array for copy, array in remaining.items()}
            for arrays, of_layer, remaining in (
                (self.waiting, concerned.waiting, left.waiting),
                (self.started, concerned.started, left.started),
            )
        )
        return Copies(waiting, started)

    # What follows is by a layer's numbers.

    def take(self, order: LayerOrder, number: int, result: Result) -> tuple["Copies", Result, Array]:
        """A block's array, on the device, and `result`; whatever comes of the array waits for `result`.

        In this order, because XLA would await the array before it has finished `result`, and the link would rest.
        """
        result, array = jax.lax.optimization_barrier((result, self.started[number]))
        copies, array = self.ended(order, number, array)
        return copies, result, array

    def fetch(self, order: LayerOrder, number: int) -> tuple["Copies", Array]:
        """An array of weights, on the device; nothing waits for it but what uses it."""
        return self.ended(order, number, self.started[number])

    def ended(self, order: LayerOrder, number: int, result: Result) -> tuple["Copies", Result]:
        """Starts the copies that waited for this operation, whose result it is; go on with what this returns."""
        waiting = dict(self.waiting)
        for copy in order.ties[number]:
            result, waiting[copy] = jax.lax.optimization_barrier((result, waiting[copy]))
        started = {copy: array for copy, array in self.started.items() if copy != number}
        return Copies(waiting, started)._start(order.starts[number]), result

    def _start(self, copies: Sequence[int]) -> "Copies":
        waiting, started = dict(self.waiting), dict(self.started)
        for copy in copies:
            started[copy] = jax.device_put(waiting.pop(copy), jax.memory.Space.Device)
        return Copies(waiting, started)
