"""Copies within a step, driven operation by operation: what each depends on, and nothing more."""

from dataclasses import dataclass, replace
from unittest import mock

import jax
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_plans import plans

from kvrecomp.plan.step_order import START, step_order
from kvrecomp.run.copies import Copies


@dataclass
class Tied:
    """An array, and the operations that it cannot be there before."""

    number: int = START
    after: frozenset[int] = frozenset()


def tie(operands):
    """What an optimization barrier does: every output depends on all operands."""
    after = frozenset().union(*(operand.after for operand in operands))
    return tuple(replace(operand, after=after) for operand in operands)


@settings(max_examples=100)
@given(plans(), st.integers(0, 3))
def test_copies_are_held_as_the_order_says(plan, write_outs):
    """Each copy depends on the operation that it waits for and on all compute that made room before that, but on
    nothing later. Compute depends on all operations before it; an array of weights on its copy alone."""
    order = step_order(plan, write_outs)
    ops = dict(order)
    started = []

    def device_put(array, space):
        started.append(array)
        return replace(array, after=array.after | {array.number})

    with (
        mock.patch.object(jax.lax, "optimization_barrier", tie),
        mock.patch.object(jax, "device_put", device_put),
    ):
        copies = Copies.begin(order, {number: Tied(number) for number in order.copies.tolist()})
        for number, op in ops.items():
            before, through = (Tied(after=frozenset(range(end))) for end in (number, number + 1))
            if op.copies_weights:
                copies, array = copies.fetch(number)
                assert array.number == number
            elif op.kind == "copy":
                copies, result, array = copies.take(number, before)
                assert array.number == number and number in array.after and result.after >= before.after
            else:
                copies, _ = copies.ended(number, through)
    assert [array.number for array in started] == order.copies.tolist()
    assert not copies.waiting and not copies.started
    for array, waits_for in zip(started, order.waits_for.tolist(), strict=True):
        assert max(array.after, default=START) == waits_for
        assert array.after >= {number for number, op in ops.items() if op.frees and number <= waits_for}
