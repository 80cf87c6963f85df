"""Weights in host memory and several groups of rows, in both orders: the same logits, and what is copied how often."""

import dataclasses

import jax
import numpy as np
import pytest
import toy

import kvrecomp
import models
from kvrecomp.plan import PlanError
from kvrecomp.predict.cost import plan_costs
from kvrecomp.run.prompt import PromptError

OPT = models.OPTConfig("opt", layers=2, hidden=28, heads=7, intermediate=44, vocab=97, positions=61)
WORK = kvrecomp.Workload(batch=2, prompt=11, new=6)
GROUPS = 3
MATRICES = 4 * (4 * 28 * 28 + 2 * 28 * 44)  # bytes of a layer's


def planned(name, order, fraction=1.0, config=OPT, groups=GROUPS):
    shape = dataclasses.replace(config.shape, dtype="float32")
    plan = kvrecomp.named_plan(name, shape, WORK, tail=2, window=2**20)
    return dataclasses.replace(kvrecomp.with_host_weights(plan, fraction), groups=groups, order=order)


def prompts(rows=6):
    """Of so many rows, left-padded by as many tokens as the row's number."""
    ids = np.random.default_rng(7).integers(3, toy.VOCAB, (rows, WORK.prompt))
    return ids, np.arange(WORK.prompt) >= np.arange(rows)[:, None]


@pytest.mark.parametrize(
    ("config", "name", "groups", "order", "fraction"),
    [
        (OPT, "activations", GROUPS, "column", 1.0),
        (OPT, "split:0.4", GROUPS, "column", 0.5),
        (OPT, "kvpr:0.4", GROUPS, "column", 1.0),
        (toy.LLAMA, "keys_values", GROUPS, "column", 0.0),
        (OPT, "activations", GROUPS, "row", 1.0),
        (dataclasses.replace(OPT, layers=3), "device:0.6", 1, "row", 0.67),
        (toy.LLAMA, "recompute", 1, "row", 1.0),
        (toy.LLAMA, "keys_values", 1, "row", 0.5),
    ],
)
def test_logits_are_those_of_the_forward_pass(config, name, groups, order, fraction):
    """At every step of a run that writes the tails out twice; weights in host memory cross the link as often as the
    order says."""
    plan = planned(name, order, fraction, config, groups)
    model = models.create(config, dtype="float32", sharding=kvrecomp.placement(plan))
    ids, mask = prompts(plan.rows)
    result = kvrecomp.generate(model, ids, mask, max_new_tokens=WORK.new, plan=plan, output_logits=True)
    toy.assert_generated(result, models.create(config, dtype="float32"), mask)
    hosted = sum(array.nbytes for array in toy.hosted_parameters(model).values())
    assert bool(hosted) == bool(fraction)
    weights = hosted * (1 if order == "column" else groups)
    one = dataclasses.replace(plan, groups=1)
    assert result.link_bytes == [groups * one.bytes_in("host", step // 2) + weights for step in range(WORK.new - 1)]


@pytest.mark.parametrize(("order", "rows"), [("column", GROUPS * WORK.batch), ("row", WORK.batch)])
def test_weights_are_multiplied_with_once_in_column_order(order, rows):
    """The feed-forward's first matrix, 28 by 44: once a layer, with the rows of all groups or of one."""
    plan = planned("activations", order, 0.0)
    decoder = kvrecomp.Decoder(models.create(OPT, dtype="float32"), plan)
    jaxpr = decoder._trace_step(0).jaxpr
    products = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    made = [product.outvars[0].aval.shape for product in products if product.invars[1].aval.shape == (28, 44)]
    assert made == [(rows, 44)] * OPT.layers


def test_rows_are_sampled_as_they_are_in_one_group():
    ids, mask = prompts()
    model = models.create(OPT, dtype="float32")
    sampled = {"do_sample": True, "seed": 11, "max_new_tokens": WORK.new}
    apart = kvrecomp.generate(model, ids, mask, plan=planned("activations", "column", 0.0), **sampled)
    one = kvrecomp.generate(model, ids, mask, plan="activations", **sampled)
    np.testing.assert_array_equal(apart.sequences, one.sequences)


def test_memory_is_counted_for_every_group():
    plan = planned("device:0.4", "column")
    one = dataclasses.replace(plan, groups=1)
    needed, of_one = kvrecomp.memory_needed(plan), kvrecomp.memory_needed(one)
    assert needed["device"]["blocks"] == 3 * of_one["device"]["blocks"] > 0
    assert needed["device"]["tail"] == 3 * of_one["device"]["tail"] > 0
    assert needed["host"]["blocks"] == 3 * of_one["host"]["blocks"] > 0
    assert needed["host"]["weights"] == of_one["host"]["weights"] == 2 * MATRICES
    assert "3 groups in column order" in str(plan)


@pytest.mark.parametrize(("order", "times"), [("row", GROUPS), ("column", 1)])
def test_the_cost_of_weights_is_that_of_as_many_copies(known_machine, order, times):
    """Where the link is all that counts, groups take the time of their blocks and of the weights."""
    slow = dataclasses.replace(known_machine, beside_compute=1e4, handoff_seconds=0.0)
    (cost,) = plan_costs(slow, [planned("activations", order)], write_outs=0).seconds
    blocks = GROUPS * WORK.prompt * WORK.batch * 28 * 4 * OPT.layers
    assert cost == pytest.approx((blocks + times * 2 * MATRICES) / 1e4, rel=0.01)


def test_wrong_groups_are_said(known_machine):
    plan = planned("activations", "column", 0.0)
    model = models.create(OPT, dtype="float32")
    ids, mask = prompts()
    with pytest.raises(PromptError, match=r"is \[5, \d+\]; plan activations is for 6 rows in 3 groups of"):
        kvrecomp.generate(model, ids[:5], mask[:5], max_new_tokens=2, plan=plan)
    with pytest.raises(PlanError, match="has 3 groups; got 1 caches and tokens of 1"):
        kvrecomp.Decoder(model, plan).step(None, np.zeros(2, np.int32))
    with pytest.raises(PlanError, match="groups is 0"):
        dataclasses.replace(plan, groups=0)
    for name in ("activations", "auto"):
        with pytest.raises(PlanError, match="groups is 0"):
            kvrecomp.plan_for(name, plan.shape, WORK, groups=0)
        with pytest.raises(PlanError, match="window is 0"):
            kvrecomp.plan_for(name, plan.shape, WORK, window=0)
    with pytest.raises(PlanError, match="'diagonal' is not one of row, column"):
        dataclasses.replace(plan, order="diagonal")


@pytest.mark.parametrize("order", ["row", "column"])
def test_groups_that_cannot_take_a_step_together_are_left_as_they_were(order):
    """One has no tokens of its own, or is a step ahead: nobody's cache is used up, and decoding goes on."""
    decoder = kvrecomp.Decoder(models.create(OPT, dtype="float32"), planned("activations", order, 0.0))
    ids, mask = prompts()
    size = WORK.batch

    def prefilled():
        return [decoder.prefill(ids[at : at + size], mask[at : at + size])[0] for at in range(0, len(ids), size)]

    tokens = [jax.device_put(np.full(size, number, np.int32)) for number in range(GROUPS)]
    caches = prefilled()
    with pytest.raises(PromptError, match=rf"token_ids is int32\[{size + 1}\]"):
        decoder.step_groups(caches, [*tokens[:-1], np.zeros(size + 1, np.int32)])
    after, logits = decoder.step_groups(caches, tokens)
    again = prefilled()
    with pytest.raises(PromptError, match=r"caches have \[1, 0, 0\] new tokens: give step_groups those of the same"):
        decoder.step_groups([after[0], *again[1:]], tokens)
    _, expected = decoder.step_groups(again, tokens)
    for one, other in zip(logits, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(decoder.step_groups(after, tokens)[0]) == GROUPS


def test_auto_goes_by_where_the_weights_are(known_machine):
    """There is room for one and a half of five layers beside what must be there: four are loaded into host memory."""
    config = dataclasses.replace(OPT, layers=5, hidden=140, intermediate=220)  # a prefill takes less than a layer
    matrices = 4 * (4 * 140 * 140 + 2 * 140 * 220)
    shape, work = dataclasses.replace(config.shape, dtype="float32"), kvrecomp.Workload(6, 11, 6)
    least = kvrecomp.named_plan("activations", shape, work, window=2**20)
    least = kvrecomp.memory_needed(kvrecomp.with_host_weights(least, 1.0))["device"]
    budget = kvrecomp.Budget(sum(least.values()) + 3 * matrices // 2, 2**30)
    plan = kvrecomp.plan_for("auto", shape, work, budget=budget, groups=None)
    assert [layer.weights for layer in plan.layers] == ["device", "host", "host", "host", "host"]
    model = models.create(config, dtype="float32", sharding=kvrecomp.placement(plan))
    assert kvrecomp.weight_memories(model) == tuple(layer.weights for layer in plan.layers)

    ids, mask = prompts()
    result = kvrecomp.generate(model, ids, mask, max_new_tokens=6, budget=budget, output_logits=True)
    plan = result.plan  # which may be in groups
    assert [layer.weights for layer in plan.layers] == ["device", "host", "host", "host", "host"]
    assert plan.rows == 6 and result.link_bytes[0] == 4 * matrices + plan.bytes_in("host")
    toy.assert_generated(result, models.create(config, dtype="float32"), mask)
