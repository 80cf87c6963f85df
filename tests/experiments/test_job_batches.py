"""A job's batches: lengths to pad to, the largest batch that fits, who is decoded with whom, plans kept as JSON."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import toy

import kvrecomp
from experiments.support.job.batches import batches, largest_plan, padded_lengths, plan_document, plan_from
from kvrecomp.plan import PlanError, Workload

SHAPE = toy.model().shape


def padding(lengths, levels):
    """Tokens of padding where every prompt is padded to the next of these lengths."""
    return sum(min(level for level in levels if level >= length) - length for length in lengths)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("seed", range(4))
def test_lengths_are_those_with_the_least_padding(most, seed):
    """Of all sets of so many lengths that there are, tried one by one."""
    rng = np.random.default_rng(seed)
    lengths = np.round(rng.lognormal(3, 1, 40)).astype(int).clip(1, 200).tolist()
    levels = padded_lengths(Counter(lengths), most)
    there = sorted(set(lengths))
    assert levels == sorted(set(levels)) and len(levels) == min(most, len(there)) and levels[-1] == max(lengths)
    if most < 5:
        subsets = itertools.combinations(there[:-1], min(most, len(there)) - 1)
        assert padding(lengths, levels) == min(padding(lengths, [*subset, there[-1]]) for subset in subsets)
    else:
        assert padding(lengths, levels) == 0 or len(there) > most


def test_long_prompts_are_told_apart_roughly():
    """Up to 100,003 tokens, in steps of 196."""
    lengths = [*range(1, 40_000, 7), *[39_999] * 100, *range(90_001, 100_004, 3)]
    levels = padded_lengths(Counter(lengths), 2)
    assert levels[1] == 100_003 and 39_999 <= levels[0] < 39_999 + 196
    assert padded_lengths({5: 3}, 6) == [5] and padded_lengths({}, 6) == []


@pytest.mark.parametrize("fitting", range(1, 12))
def test_the_largest_batch_that_fits(fitting):
    """Found by halves: few plans are made."""
    tried = []

    def make(batch):
        tried.append(batch)
        if batch > fitting:
            raise PlanError(f"{batch} rows do not fit")
        return kvrecomp.named_plan("device", SHAPE, Workload(batch, 5, 3))

    assert largest_plan(make, 11).workload.batch == fitting
    assert len(tried) <= 6 and tried[0] == 11
    tried.clear()
    assert largest_plan(make, fitting).workload.batch == fitting and tried == [fitting]


@pytest.mark.parametrize(("fitting", "rows"), [(9, 9), (31, 16), (32, 32), (47, 32), (48, 48), (100, 47)])
def test_large_batches_can_be_split_into_groups(fitting, rows):
    """Of 47 prompts: 48 rows where 47 do not fit at once, but three groups of 16 do."""

    def make(batch):
        if batch > fitting or (batch == 47 and fitting < 100):
            raise PlanError(f"{batch} rows do not fit")
        return kvrecomp.named_plan("device", SHAPE, Workload(batch, 5, 3))

    assert largest_plan(make, 47).workload.batch == rows


def test_where_no_batch_fits_the_error_is_that_of_one_row():
    def make(batch):
        raise PlanError(f"{batch} rows do not fit")

    with pytest.raises(PlanError, match="1 rows do not fit"):
        largest_plan(make, 8)


def test_batches_hold_every_prompt_once_the_longest_first_and_are_full():
    rng = np.random.default_rng(0)
    plans = [
        kvrecomp.named_plan("device", SHAPE, Workload(batch, prompt, 3)) for batch, prompt in ((7, 6), (5, 17), (2, 37))
    ]
    lengths = rng.integers(1, 38, 101).tolist()
    made = batches(lengths, plans)
    assert sorted(member for _, members in made for member in members) == list(range(101))
    taken = [lengths[member] for _, members in made for member in members]
    assert taken == sorted(lengths, reverse=True) and batches([], []) == []
    for plan, members in made:
        longest = max(lengths[member] for member in members)
        assert plan is next(plan for plan in plans if plan.workload.prompt >= longest)
    assert all(len(members) == plan.workload.batch for plan, members in made[:-1])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("auto", "grouped"), ("split:0.4", "opt"), ("kvpr:0.5", "opt"), ("recompute", "opt"), ("device:0.3", "grouped")],
)
def test_a_plan_survives_json(name, kind):
    shape = toy.model(kind).shape
    budget = kvrecomp.Budget(device=2**30, host=2**30)
    plan = kvrecomp.plan_for(name, shape, Workload(3, 11, 17), budget=budget, tail=4)
    again = plan_from(json.loads(json.dumps(plan_document(plan))), shape)
    assert again == plan and hash(again) == hash(plan)


def test_a_prompt_that_no_plan_has_room_for():
    plans = [kvrecomp.named_plan("device", SHAPE, Workload(2, length, 3)) for length in (3, 5)]
    with pytest.raises(ValueError, match="a prompt is 7 tokens, more than any was when the output was begun"):
        batches([3, 7, 5], plans)
