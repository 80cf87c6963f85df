"""How a job's prompts are put into batches: few shapes of batch and prompt length, each with a plan of its own.

A shape costs its programs' compilation, so there are few; what a prompt is padded by is sent at every step, so their
lengths are chosen such that the fewest tokens are padding. All of it follows from the input and the settings.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kvrecomp.plan import BlockSpec, Drafting, LayerPlan, ModelShape, Plan, PlanError, Workload

STEPS = 512  # that lengths are told apart in
ROWS = 16  # which divide into all the numbers of groups that rows are split into


def padded_lengths(lengths: Mapping[int, int], most: int) -> list[int]:
    """At most so many lengths, ascending, to pad prompts up to, so that the fewest tokens are padding.

    `lengths` counts the prompts of each length. They are rounded up to a 512th of the longest, which is the last.
    """
    if not lengths:
        return []
    longest = max(lengths)
    step = -(-longest // STEPS)
    counts: dict[int, int] = {}
    for length, count in lengths.items():
        rounded = -(-length // step)
        counts[rounded] = counts.get(rounded, 0) + count
    sizes = sorted(counts)
    before = np.cumsum([0, *(counts[size] for size in sizes)])
    # cost[i, j]: tokens of the prompts of sizes i to j - 1, all padded to the last of these.
    cost = (before[None, :] - before[:, None]) * np.array([0.0, *sizes])
    cost[np.tril_indices(len(cost))] = np.inf
    best, chosen = cost[0], []
    for _ in range(min(most, len(sizes)) - 1):
        totals = best[:, None] + cost
        chosen.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    ends = [len(sizes)]
    for previous in reversed(chosen):
        ends.append(int(previous[ends[-1]]))
    return [min(longest, sizes[end - 1] * step) for end in reversed(ends)]


def largest_plan(make: Callable[[int], Plan], most: int) -> Plan:
    """The plan for the largest batch, up to `most` rows, for which `make` raises no `PlanError`.

    Sizes from ROWS on are multiples of it, which the scheduler can split into groups: the last may be more than `most`,
    as a batch is filled up with copies. Raises `PlanError` if one row does not fit.
    """

    def attempt(batch: int) -> Plan | None:
        try:
            return make(batch)
        except PlanError:
            return None

    if plan := attempt(most):
        return plan
    sizes = [*range(1, min(ROWS, most)), *range(ROWS, most + ROWS, ROWS)]
    best, fitting, failing = make(1), 0, len(sizes)
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if plan := attempt(sizes[middle]):
            best, fitting = plan, middle
        else:
            failing = middle
    return best


def batches(lengths: Sequence[int], plans: Sequence[Plan]) -> list[tuple[Plan, list[int]]]:
    """Prompts of these lengths in batches, by index: the longest first, each under the plan that its longest needs.

    `plans` ascend in prompt length. A batch is filled up with prompts that need less, so only the last is not full.
    Raises ValueError for a prompt that no plan has room for.
    """
    left = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    made = []
    while left:
        longest = lengths[left[0]]
        plan = next((plan for plan in plans if plan.workload.prompt >= longest), None)
        if plan is None:
            raise ValueError(
                f"a prompt is {longest} tokens, more than any was when the output was begun: the tokenizer, or what "
                "reads it, has changed; give another --output"
            )
        made.append((plan, left[: plan.rows]))
        left = left[plan.rows :]
    return made


def plan_document(plan: Plan) -> dict[str, Any]:
    """A plan as JSON has it, but for its model's shape."""
    document = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan) if field.name != "shape"}
    layers = [dataclasses.asdict(layer) for layer in plan.layers]
    drafting = dataclasses.asdict(plan.drafting) if plan.drafting else None
    return document | {"workload": dataclasses.asdict(plan.workload), "layers": layers, "drafting": drafting}


def plan_from(document: Mapping[str, Any], shape: ModelShape) -> Plan:
    """The plan that `plan_document` made it of."""
    layers = []
    for fields in document["layers"]:
        blocks: Any = tuple(BlockSpec(**block) for block in fields["prompt"])
        layers.append(LayerPlan(**_with_tuples(fields) | {"prompt": blocks}))
    drafting = Drafting(**document["drafting"]) if document["drafting"] else None
    rest: dict[str, Any] = {"workload": Workload(**document["workload"]), "layers": tuple(layers), "drafting": drafting}
    return Plan(shape=shape, **_with_tuples(document) | rest)


def _with_tuples(document: Mapping[str, Any]) -> dict[str, Any]:
    """With tuples for JSON's lists: plans are hashable."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}
