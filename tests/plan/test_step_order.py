"""A step's order: against rules spelled out operation by operation, and closed forms."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_plans import plans

import models
from kvrecomp.plan import Workload
from kvrecomp.plan.named import named_plan, with_host_weights
from kvrecomp.plan.step_order import (
    COPIES_IN_FLIGHT,
    DRAFT_PARTS,
    GROUPS_AT_ONCE,
    START,
    TAIL,
    Op,
    high_water,
    order_layers,
    step_order,
)

OPT = models.OPTConfig("toy", layers=3, hidden=28, heads=4, intermediate=44, vocab=61, positions=1200)
WORKLOAD = Workload(batch=5, prompt=101, new=11)
TOKEN = 5 * 28 * 4  # bytes of a token's activations, float32
many = settings(max_examples=200)


def copy(nbytes):
    return Op("copy", blocks=(0,), nbytes=nbytes), Op("attend", blocks=(0,), frees=nbytes)


@st.composite
def layers(draw):
    """Any layers: matrices before the attention, blocks, matrices after it."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        sizes = [draw(st.lists(st.integers(1, 20), max_size=3)) for _ in range(3)]
        before, after = ([Op("copy", nbytes=size) for size in part] for part in (sizes[0], sizes[2]))
        blocks = [op for size in sizes[1] for op in copy(size)]
        last = Op("finish", frees=sum(sizes[0]) + sum(sizes[2]))
        found.append((*before, Op("project"), Op("append"), Op("attend", blocks=(TAIL,)), *blocks, *after, last))
    return tuple(found)


def largest_need(found):
    """Bytes of the layer with the most weights: a window that holds less can't be kept."""
    return max(layer[-1].frees for layer in found)


def test_the_operations_of_a_layer():
    """Weights up to the attention, the device's tokens as one, blocks as they arrive, the other weights."""
    shape = dataclasses.replace(OPT.shape, dtype="float32")
    plan = with_host_weights(named_plan("device:0.5", shape, WORKLOAD, window=4 * 11 * TOKEN, tail=4), 1.0)
    order = step_order(dataclasses.replace(plan, groups=2, order="column"))
    key, output, large = 4 * 28 * 28, 4 * 28 * 28, 4 * 28 * 44
    host = [(1, 11), (2, 10), (3, 10), (4, 10), (5, 10)]  # of 101 tokens 50 are on the device
    group = lambda number: [  # noqa: E731
        Op("append", number),
        Op("attend", number, (0, TAIL)),
        *(
            op
            for block, tokens in host
            for op in (
                Op("copy", number, (block,), tokens * TOKEN),
                Op("attend", number, (block,), frees=tokens * TOKEN),
            )
        ),
    ]
    assert list(order.layers[0]) == [
        *[Op("copy", nbytes=key)] * 3,
        Op("project"),
        *group(0),
        *group(1),
        Op("copy", nbytes=output),
        *[Op("copy", nbytes=large)] * 2,
        Op("finish", frees=4 * key + 2 * large),
    ]
    assert len(order.layers) == 1 and order.numbers == (0, 0, 0)
    numbered = list(order)
    assert numbered == [(number, op) for number, (_, op) in enumerate(numbered)]
    first = len(order.layers[0])
    assert [(layer.first, layer.ops) for layer in order.of_layers()] == [(n * first, order.layers[0]) for n in range(3)]


def test_matrices_of_a_model_count_instead_of_its_shape():
    """Layers alike are planned once, and apart where their matrices are not."""
    shape = dataclasses.replace(OPT.shape, dtype="float32")
    plan = with_host_weights(named_plan("device", shape, WORKLOAD), 1.0)
    order = step_order(plan, 0, [((3, 5), (7,)), ((3, 5), (7,)), ((2,), ())])
    assert order.numbers == (0, 0, 1)
    assert [op.nbytes for _, op in order if op.kind == "copy"] == [3, 5, 7, 3, 5, 7, 2]


@many
@given(
    layers(),
    st.integers(1, 50),
    st.sampled_from([("pipelined", 2), ("pipelined", None), ("layerwise", COPIES_IN_FLIGHT)]),
)
def test_copies_start_as_early_as_the_rules_allow_and_never_earlier(found, more, how):
    """Step by step: what has ended, what is on its way, what is in use."""
    window, (schedule, in_flight) = 20 + largest_need(found) + more, how
    order = order_layers(found, range(len(found)), window, schedule, in_flight)
    ops = [op for layer in found for op in layer]
    layer_of = [number for number, layer in enumerate(found) for _ in layer]
    copies = [number for number, op in enumerate(ops) if op.kind == "copy"]
    assert order.copies.tolist() == copies

    def allowed(place, ended):
        """Whether a copy may start when operations up to `ended` have, the copies before it having started."""
        number, before = copies[place], copies[:place]
        on_their_way = sum(earlier > ended for earlier in before)
        if schedule == "layerwise":
            first = not before or layer_of[before[-1]] != layer_of[number]
            layer_before = max((n for n, op in enumerate(ops) if op.kind == "finish" and n < number), default=START)
            return on_their_way == 0 and (not first or layer_before <= ended)
        in_use = sum(ops[earlier].nbytes for earlier in before) - sum(op.frees for op in ops[: ended + 1])
        few = in_flight is None or on_their_way < in_flight
        return few and (in_use <= 0 or in_use + ops[number].nbytes <= window)

    most, earliest = 0, START
    for place, waits_for in enumerate(order.waits_for.tolist()):
        assert waits_for < copies[place] and allowed(place, waits_for)
        assert waits_for == earliest or not allowed(place, waits_for - 1)
        earliest = waits_for
        sent = sum(ops[copy].nbytes for copy in copies[: place + 1])
        most = max(most, sent - sum(op.frees for op in ops[: waits_for + 1]))
    assert order.high_water == most
    if schedule == "pipelined":
        assert most <= window


@many
@given(layers(), st.integers(1, 50))
def test_what_a_copy_is_tied_to_has_computed_all_before_it(found, more):
    """That weights have arrived says nothing of compute; anything else that copies wait for comes after it."""
    order = order_layers(found, range(len(found)), 20 + largest_need(found) + more, "pipelined")
    ops = [op for layer in found for op in layer]
    for waits_for, computed in zip(order.waits_for.tolist(), order.computed.tolist(), strict=True):
        assert computed <= waits_for
        assert computed == START or not ops[computed].copies_weights
        for op in ops[computed + 1 : waits_for + 1]:
            assert op.copies_weights or op.blocks == (TAIL,) or op.kind in ("project", "append")


@pytest.mark.parametrize(("order", "groups"), [("row", 29), ("column", 29), ("row", 1)])
def test_kvprs_schedule_has_two_blocks_in_flight(order, groups):
    """Activations and then keys and values of a layer, one on its way while the other is used, beside the weights that
    the layer has had so far: those of K, V and Q."""
    shape, workload = dataclasses.replace(OPT.shape, dtype="float32"), Workload(199, 1009, 6)
    plan = with_host_weights(named_plan("kvpr:0.4", shape, workload, tail=2, window=2**28), 1.0)
    sent = 4 * 199 * (404 * 28 + 605 * 56)  # bytes of a layer and group: activations, then keys and values
    found = step_order(dataclasses.replace(plan, groups=groups, order=order))
    assert found.high_water == sent + 3 * 4 * 28 * 28


@many
@given(plans(), st.integers(1, 9))
def test_many_groups_hold_no_more_at_once_than_a_few(plan, groups):
    """By the order of all of them."""
    plan = dataclasses.replace(plan, groups=groups, order="column")
    for write_outs in (0, plan.write_outs):
        assert high_water(plan, write_outs) == step_order(plan, write_outs).high_water
    few = step_order(plan, 0, groups=min(groups, GROUPS_AT_ONCE))
    assert sum(op.kind == "append" for op in few.layers[0]) == min(groups, GROUPS_AT_ONCE)


@pytest.mark.parametrize(("layers", "before"), [(8, [0, 2, 5]), (2, [0, 0, 1]), (1, [0, 0, 0])])
def test_drafts_come_between_layers(layers, before):
    """In three parts, as far apart as they can be, the first before all layers; the rest of the step is as without."""
    kind = OPT.shape.layers[0]
    plan = named_plan("activations", dataclasses.replace(OPT.shape, layers=(kind,) * layers), WORKLOAD, tail=4)
    without, order = step_order(plan), step_order(plan, drafts=True)
    assert DRAFT_PARTS == len(before)
    found = [layer.drafts for layer in order.of_layers()]
    assert [number for number, parts in enumerate(found) for _ in range(parts)] == before
    assert [op for _, op in order if op.kind != "draft"] == [op for _, op in without]
    assert without.high_water <= order.high_water
    waits_for = order.waits_for[order.waits_for >= 0].tolist()
    assert all(op.kind != "draft" for number, op in order if number in waits_for)
