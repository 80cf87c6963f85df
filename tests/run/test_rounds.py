"""Rounds: texts are those without drafts, token for token, whoever drafts and however far rows are apart."""

import dataclasses
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import toy
import toy_plans
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from toy_drafts import BATCH, KEPT, NEW, PROMPT, SAMPLED, TAIL, TEXTS, assert_alike, known, make_plan, run, written

import kvrecomp
import models
from kvrecomp.generate import TokenLoop
from kvrecomp.plan import Drafting, Workload
from kvrecomp.run.drafters import PromptLookup, Sketch
from kvrecomp.run.sampling import Sampling

# Shrinking would compile for hours; examples are small as they are.
few = settings(max_examples=4, phases=(Phase.explicit, Phase.generate), deadline=None)


DRAFTERS: dict[str, tuple[Drafting, Any]] = {
    "lookup": (Drafting("prompt_lookup", 3, ahead=5), PromptLookup(2)),
    "fp8": (Drafting("sketch", 3, ahead=7, codec="fp8"), Sketch()),
    "int4": (Drafting("sketch", 4, ahead=5, codec="int4"), Sketch()),
}


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("drafter", "kind"), [("lookup", "opt"), ("fp8", "grouped"), ("int4", "350m")])
def test_texts_and_logits_are_those_without_drafts(drafter, kind, sampling):
    """Over several write-outs, one row with one real token; of `grouped` a layer's window is crossed."""
    drafting, who = DRAFTERS[drafter]
    expected = run(make_plan(kind=kind), None, sampling, kind, output_logits=True)
    found = run(make_plan(kind=kind, drafting=drafting), who, sampling, kind, output_logits=True)
    assert_alike(found, expected)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)
    assert found.plan.write_outs > 2 and len(np.unique(expected.sequences[:, PROMPT:])) > 2
    if drafter != "lookup":  # a sketch of what is cached is nearly that
        assert (found.passes < NEW - 1).all() and (found.acceptance > 0.4).all()


# How tokens are chosen, how many drafts, and for how many tokens there is room: one set of programs each.
ROUNDS = [(Sampling(), 1, 1), (SAMPLED, 3, 5), (Sampling(), 6, 9)]


@settings(few, max_examples=12)
@given(data=st.data())
def test_any_drafts(data):
    """Right at random, for rows that are far apart then, with room for few tokens ahead, and rows that end anywhere."""
    sampling, most, ahead = data.draw(st.sampled_from(ROUNDS))
    new = data.draw(st.integers(1, NEW))
    eos = data.draw(st.lists(st.integers(0, toy.VOCAB - 1), min_size=2, max_size=2))
    expected = run(make_plan(), None, sampling, eos=eos, new=new)
    shares = data.draw(st.lists(st.sampled_from([0.0, 0.5, 0.9, 1.0]), min_size=BATCH, max_size=BATCH))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    right = rng.random((BATCH, NEW)) < np.array(shares)[:, None]
    drafts = data.draw(st.sampled_from([None, most]))
    plan = make_plan(drafting=Drafting("prompt_lookup", most, ahead))
    found = run(plan, known(written(expected), right), sampling, eos=eos, drafts=drafts, new=new)
    assert_alike(found, expected)
    taken = found.new_tokens - 1
    assert (found.accepted <= found.drafted).all() and (found.accepted <= taken).all()
    assert (taken - found.accepted <= found.passes).all()


def test_drafts_that_are_right_are_taken():
    """All of them: five tokens a pass. None: one."""
    texts = written(run(make_plan()))
    plan = make_plan(drafting=Drafting("prompt_lookup", 4, ahead=20))
    found = run(plan, known(texts, np.full(texts.shape, True)))
    assert found.passes.tolist() == [3] * BATCH and found.acceptance.tolist() == [1.0] * BATCH  # 13 tokens, 5 a pass
    found = run(plan, known(texts, np.full(texts.shape, False)))
    assert found.passes.tolist() == [NEW - 1] * BATCH and found.acceptance.tolist() == [0.0] * BATCH


def test_rows_that_are_ahead_do_not_wait_where_there_is_room():
    """A row all of whose drafts are right is done in three passes beside one with none."""
    texts = written(run(make_plan()))
    right = np.zeros(texts.shape, bool)
    right[1] = True
    found = run(make_plan(drafting=Drafting("prompt_lookup", 4, ahead=20)), known(texts, right))
    assert found.passes.tolist() == [13, 3, 13]
    held = run(make_plan(drafting=Drafting("prompt_lookup", 4, ahead=1)), known(texts, right))
    assert_alike(held, found)
    assert held.passes[1] > 6  # it may be a token ahead
    assert held.acceptance[0] == held.acceptance[2] == 0 and 0.5 < held.acceptance[1] <= 1


@pytest.mark.parametrize(("groups", "order"), [(3, "row"), (3, "column")])
def test_groups(groups, order):
    new = 7
    expected = run(make_plan(), None, SAMPLED, new=new)
    options = {"batch": 1, "groups": groups, "order": order, "new": new}
    assert_alike(run(make_plan(**options, drafting=DRAFTERS["int4"][0]), Sketch(), SAMPLED), expected)
    texts = written(expected, new)
    right = np.random.default_rng(3).random(texts.shape) < 0.7
    plan = make_plan(**options, drafting=DRAFTERS["lookup"][0])
    assert_alike(run(plan, known(texts, right), SAMPLED), expected)


@settings(few, max_examples=8)
@given(data=st.data())
def test_drafts_under_copies(data):
    """Each group's are made in the step of the group before it, and checked in the round after, wherever write-outs and
    ends of rows come between."""
    groups, batch, ahead = data.draw(st.sampled_from([(3, 1, 7), (2, 2, 1)]))
    texts = toy.texts(groups * batch, PROMPT, longest_padding=PROMPT - 1)
    eos = data.draw(st.lists(st.integers(0, toy.VOCAB - 1), min_size=2, max_size=2))
    expected = run(make_plan(batch=groups * batch), None, SAMPLED, texts=texts, eos=eos)
    plan = make_plan(batch=batch, groups=groups, drafting=Drafting("sketch", 3, ahead, "fp8"))
    assert plan.drafts_under_copies
    shares = data.draw(st.lists(st.sampled_from([0.0, 0.5, 0.9, 1.0]), min_size=plan.rows, max_size=plan.rows))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    right = rng.random((plan.rows, NEW)) < np.array(shares)[:, None]
    drafter = known(written(expected), right, texts.ids) if data.draw(st.booleans()) else Sketch()
    found = run(plan, drafter, SAMPLED, texts=texts, eos=eos, drafts=data.draw(st.sampled_from([None, 2, 3])))
    assert_alike(found, expected)
    assert (found.accepted <= found.drafted).all()


def test_drafts_that_are_right_are_taken_under_copies():
    """All of them, but for the first group's first round, which has none yet."""
    texts = toy.texts(2, PROMPT)
    expected = run(make_plan(batch=2), texts=texts)
    plan = make_plan(batch=1, groups=2, drafting=Drafting("sketch", 4, 20, "fp8"))
    found = run(plan, known(written(expected), np.full((2, NEW), True), texts.ids), texts=texts)
    assert_alike(found, expected)
    assert found.passes.tolist() == [4, 3] and found.acceptance.tolist() == [1.0, 1.0]  # 13 tokens: 1 and 5 each, or 5


def test_weights_in_host_memory():
    """They are copied once a round, for all of its tokens, and for each draft of the model's own."""
    shape, new = dataclasses.replace(toy.OPT.shape, dtype="float32"), 7
    plan = kvrecomp.named_plan("activations", shape, Workload(BATCH, PROMPT, new), tail=TAIL)
    plan = kvrecomp.with_host_weights(plan, 1.0)
    model = models.create(toy.OPT, dtype="float32", sharding=kvrecomp.placement(plan))
    assert toy.hosted_parameters(model)
    expected = TokenLoop(kvrecomp.Decoder(model, plan), SAMPLED, [], 0).run(TEXTS.ids, TEXTS.mask, new)
    for name in ("lookup", "fp8"):
        drafting, drafter = DRAFTERS[name]
        drafted = replace(plan, drafting=drafting)
        loop = TokenLoop(kvrecomp.Decoder(model, drafted), SAMPLED, [], 0, drafter=drafter, drafts=drafting.most)
        found = loop.run(TEXTS.ids, TEXTS.mask, new)
        assert_alike(found, expected)
        often = 1 + (drafting.most if name == "fp8" else 0)
        assert found.link_bytes[0] == plan.link_bytes() + (often - 1) * plan.host_weight_bytes


def test_packed_blocks_and_a_sketch_of_them():
    """In bfloat16, of the same numbers; texts may part at near ties, so logits of what is written tell."""
    model = toy.randomised(toy.OPT.build(dtype="bfloat16", rngs=None), 1)
    shape = model.shape
    plan = kvrecomp.named_plan("activations+packed", shape, Workload(BATCH, PROMPT, NEW), tail=TAIL)
    plan = replace(plan, drafting=Drafting("sketch", 3, ahead=7, codec="fp8"))
    loop = TokenLoop(kvrecomp.Decoder(model, plan), Sampling(), [], 0, output_logits=True, drafter=Sketch())
    found = loop.run(TEXTS.ids, TEXTS.mask, NEW)
    toy.assert_generated(found, model, TEXTS.mask, tolerance=0.15)
    assert found.plan.codecs == ("packed",) and (found.passes < NEW - 1).all()


@pytest.mark.parametrize("kind", ["opt", "grouped"])
@pytest.mark.parametrize("groups", [1, 2])
def test_most_drafts_over_a_sketch_are_right(kind, groups):
    """Texts are the same whatever is drafted: that it is the model's own is seen by how often it is right. Of tokens
    that repeat the newest one, half are."""
    drafting = Drafting("sketch", 4, 20, "fp8")
    plan = make_plan("activations", kind, drafting, batch=BATCH if groups == 1 else 1, groups=groups)
    found = run(plan, Sketch(), kind=kind, texts=toy.texts(plan.rows, PROMPT))
    assert found.accepted.sum() >= 0.8 * found.tried.sum() > 10


@settings(few, max_examples=3)
@given(data=st.data())
def test_any_plan(data):
    """Any blocks in any memory, of two layers of different shapes, drafted by what is known to be right at random."""
    kind = data.draw(st.sampled_from(["opt", "grouped"]))
    plan = data.draw(toy_plans.plans(toy.model(kind).shape, 2))
    texts = toy.texts(plan.workload.batch, plan.workload.prompt, longest_padding=plan.workload.prompt - 1)
    expected = run(plan, None, SAMPLED, kind, texts)
    codec = data.draw(st.sampled_from([None, "fp8", "int4"]))
    if codec is None:
        own = expected.sequences[:, plan.workload.prompt :]
        right = np.random.default_rng(data.draw(st.integers(0, 99))).random(own.shape) < 0.7
        drafter = known(own, right, texts.ids)
        drafting = Drafting("prompt_lookup", data.draw(st.integers(1, 4)), ahead=data.draw(st.integers(1, 7)))
    else:
        drafter, drafting = Sketch(), Drafting("sketch", 2, ahead=3, codec=codec)
    assert_alike(run(replace(plan, drafting=drafting), drafter, SAMPLED, kind, texts), expected)


def test_rows_never_mix():
    """Rows in another order, named as before, have the texts that they had."""
    drafting = DRAFTERS["int4"][0]
    order, names = [2, 0, 1], np.array([7, 8, 9])
    decoder = kvrecomp.Decoder(toy.model(), make_plan(drafting=drafting), kept=KEPT)
    loop = TokenLoop(decoder, SAMPLED, [3, 5], 0, drafter=Sketch())
    first = loop.run(TEXTS.ids, TEXTS.mask, NEW, names)
    again = loop.run(TEXTS.ids[order], TEXTS.mask[order], NEW, names[order])
    longest = max(first.sequences.shape[1], again.sequences.shape[1])
    padded = [np.pad(each.sequences, ((0, 0), (0, longest - each.sequences.shape[1]))) for each in (first, again)]
    np.testing.assert_array_equal(padded[1], padded[0][order])


def test_prompts_up_to_the_last_position():
    """What is drafted beyond it is not taken, and disturbs nothing."""
    model = toy.model()
    new = 5
    texts = toy.texts(BATCH, model.shape.positions - new, longest_padding=7)
    plan = kvrecomp.named_plan("activations", model.shape, Workload(BATCH, texts.ids.shape[1], new), tail=2)
    expected = run(plan, texts=texts)
    for drafting, drafter in DRAFTERS.values():
        assert_alike(run(dataclasses.replace(plan, drafting=drafting), drafter, texts=texts), expected)


def test_an_assistant():
    """The model itself is right every time, another one hardly ever."""
    expected = kvrecomp.generate(toy.model(), TEXTS.ids, TEXTS.mask, max_new_tokens=NEW, plan="split:0.5")
    options = {"max_new_tokens": NEW, "plan": "split:0.5", "num_assistant_tokens": 3}
    itself = kvrecomp.generate(toy.model(), TEXTS.ids, TEXTS.mask, assistant_model=toy.model(), **options)
    other = kvrecomp.generate(toy.model(), TEXTS.ids, TEXTS.mask, assistant_model=toy.model("350m"), **options)
    for found in (itself, other):
        assert_alike(found, expected)
    assert (itself.acceptance == 1).all() and itself.passes.tolist() == [4] * BATCH  # 13 tokens, 4 a pass
    assert (other.acceptance < 0.5).all()
    plan = make_plan(batch=1, groups=BATCH, drafting=Drafting("assistant", 3))  # groups take turns
    of_groups = kvrecomp.generate(
        toy.model(), TEXTS.ids, TEXTS.mask, max_new_tokens=NEW, plan=plan, assistant_model=toy.model(), drafts=3
    )
    assert_alike(of_groups, expected)
    assert (of_groups.acceptance == 1).all() and of_groups.passes.tolist() == [4] * BATCH


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_numbers(dtype):
    """Texts may part at near ties: logits are those of the forward pass over what is written, in float32."""
    model = toy.randomised(toy.OPT.build(dtype=dtype, rngs=None), 1)
    plan = kvrecomp.named_plan("split:0.5", model.shape, Workload(BATCH, PROMPT, 7), tail=TAIL)
    expected = np.finfo(np.float16).eps if dtype == "float16" else 2.0**-7
    for drafting, drafter in (DRAFTERS["lookup"], DRAFTERS["int4"]):
        decoder = kvrecomp.Decoder(model, replace(plan, drafting=drafting))
        loop = TokenLoop(decoder, SAMPLED, [], 0, output_logits=True, drafter=drafter, drafts=drafting.most)
        found = loop.run(TEXTS.ids, TEXTS.mask, 7)
        toy.assert_generated(found, toy.widened(model), TEXTS.mask, tolerance=20 * expected)
        assert found.drafted.any()
