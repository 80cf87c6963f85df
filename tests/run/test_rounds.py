"""Rounds: texts are those without drafts, token for token, whoever drafts and however far rows are apart."""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import toy
import toy_plans
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import kvrecomp
import models
from kvrecomp.generate import TokenLoop
from kvrecomp.plan import Drafting, Workload
from kvrecomp.run.drafters import PromptLookup, Sketch
from kvrecomp.run.sampling import Sampling

BATCH, PROMPT, NEW, TAIL = 3, 11, 17, 4
TEXTS = toy.texts(BATCH, PROMPT, longest_padding=PROMPT - 1)
SAMPLED = Sampling(True, 0.9, top_k=30, top_p=0.95, seed=5)

# Shrinking would compile for hours; examples are small as they are.
few = settings(max_examples=4, phases=(Phase.explicit, Phase.generate), deadline=None)


@dataclass(frozen=True, eq=False)
class Known:
    """Drafts that are right where `right` [rows, new] says so: of the texts, new tokens int32[rows, new], that will be
    written, one more or less."""

    texts: np.ndarray
    right: np.ndarray

    def start(self, plan, input_ids, mask):
        wrong = (self.texts + 1) % plan.shape.vocab
        room = ((0, 0), (0, plan.tokens_per_step))
        return None, np.pad(np.where(self.right, self.texts, wrong), room).astype(np.int32)

    def draft(self, model, plan, sampling, groups, count, most):
        drafted = []
        for group in groups:
            places = group.recent.slots(most) - plan.workload.prompt + 1
            drafts = jnp.take_along_axis(group.given, places, axis=1, mode="clip")
            drafted.append(jnp.concatenate([group.turn.newest[:, None], drafts], axis=1))
        return [group.recent for group in groups], drafted, [None] * len(groups)

    def learn(self, turn, recent, taken):
        return turn


def run(plan, drafter=None, sampling=None, kind="opt", texts=TEXTS, eos=(), new=None, **options):
    """As many drafts in each round as the plan has, or what `drafts` says."""
    options = {"drafts": plan.drafting and plan.drafting.most} | options
    loop = TokenLoop(
        kvrecomp.Decoder(toy.model(kind), plan), sampling or Sampling(), list(eos), 0, drafter=drafter, **options
    )
    return loop.run(texts.ids, texts.mask, new or plan.workload.new)


def make_plan(name="split:0.5", kind="opt", drafting=None, new=NEW, batch=BATCH, **changes):
    plan = kvrecomp.named_plan(name, toy.model(kind).shape, Workload(batch, PROMPT, new), tail=TAIL)
    return replace(plan, drafting=drafting, **changes)


def assert_alike(found, expected):
    np.testing.assert_array_equal(found.sequences, expected.sequences)
    np.testing.assert_array_equal(found.new_tokens, expected.new_tokens)
    np.testing.assert_array_equal(found.taken.sum(axis=0), expected.new_tokens - 1)
    np.testing.assert_array_equal(expected.taken.sum(axis=0), expected.new_tokens - 1)


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


@few
@given(data=st.data())
def test_any_drafts(data):
    """Right at random, for rows that are far apart then, with room for few tokens ahead, and rows that end anywhere."""
    sampling = data.draw(st.sampled_from([Sampling(), SAMPLED]))
    new = data.draw(st.integers(2, NEW))
    eos = data.draw(st.lists(st.integers(0, toy.VOCAB - 1), max_size=4))
    expected = run(make_plan(new=new), None, sampling, eos=eos)
    written = np.zeros((BATCH, new), np.int32)
    written[:, : expected.sequences.shape[1] - PROMPT] = expected.sequences[:, PROMPT:]
    shares = data.draw(st.lists(st.sampled_from([0.0, 0.5, 0.9, 1.0]), min_size=BATCH, max_size=BATCH))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    right = rng.random((BATCH, new)) < np.array(shares)[:, None]
    most = data.draw(st.integers(1, 6))
    drafting = Drafting("prompt_lookup", most, ahead=data.draw(st.integers(1, 12)))
    drafts = data.draw(st.sampled_from([None, most]))
    found = run(make_plan(new=new, drafting=drafting), Known(written, right), sampling, eos=eos, drafts=drafts)
    assert_alike(found, expected)


def test_drafts_that_are_right_are_taken():
    """All of them: five tokens a pass. None: one."""
    written = run(make_plan()).sequences[:, PROMPT:]
    drafting = Drafting("prompt_lookup", 4, ahead=20)
    found = run(make_plan(drafting=drafting), Known(written, np.full(written.shape, True)))
    assert found.passes.tolist() == [4] * BATCH and found.acceptance.tolist() == [1.0] * BATCH  # 16 tokens, 5 a pass
    assert found.taken.tolist() == [[taken] * BATCH for taken in (5, 5, 5, 1)]
    found = run(make_plan(drafting=drafting), Known(written, np.full(written.shape, False)))
    assert found.passes.tolist() == [NEW - 1] * BATCH and found.acceptance.tolist() == [0.0] * BATCH


def test_rows_that_are_ahead_do_not_wait_where_there_is_room():
    """A row all of whose drafts are right is done in four passes beside one with none."""
    written = run(make_plan()).sequences[:, PROMPT:]
    right = np.zeros(written.shape, bool)
    right[1] = True
    found = run(make_plan(drafting=Drafting("prompt_lookup", 4, ahead=NEW)), Known(written, right))
    assert found.passes.tolist() == [16, 4, 16]
    assert found.taken.tolist() == [[1, taken, 1] for taken in [5, 5, 5, 1, *[0] * 12]]
    held = run(make_plan(drafting=Drafting("prompt_lookup", 4, ahead=1)), Known(written, right))
    assert_alike(held, found)
    assert held.passes[1] > 8  # it may be a token ahead


@pytest.mark.parametrize(("groups", "order"), [(3, "row"), (3, "column")])
def test_groups(groups, order):
    expected = run(make_plan(), None, SAMPLED)
    plan = make_plan(batch=1, groups=groups, order=order, drafting=DRAFTERS["int4"][0])
    assert_alike(run(plan, Sketch(), SAMPLED), expected)
    plan = make_plan(batch=1, groups=groups, order=order, drafting=DRAFTERS["lookup"][0])
    written = expected.sequences[:, PROMPT:]
    right = np.random.default_rng(3).random(written.shape) < 0.7
    # Each group has its own rows of what is known.
    parts = iter(zip(written[:, None], right[:, None]))

    @dataclass(frozen=True, eq=False)
    class OfGroups(Known):
        def start(self, plan, input_ids, mask):
            return Known(*next(parts)).start(plan, input_ids, mask)

    assert_alike(run(plan, OfGroups(written, right), SAMPLED), expected)


def test_weights_in_host_memory():
    """They are copied once a round, for all of its tokens."""
    shape = dataclasses.replace(toy.OPT.shape, dtype="float32")
    plan = kvrecomp.named_plan("activations", shape, Workload(BATCH, PROMPT, NEW), tail=TAIL)
    plan = kvrecomp.with_host_weights(plan, 1.0)
    model = models.create(toy.OPT, dtype="float32", sharding=kvrecomp.placement(plan))
    assert toy.hosted_parameters(model)
    expected = TokenLoop(kvrecomp.Decoder(model, plan), SAMPLED, [], 0).run(TEXTS.ids, TEXTS.mask, NEW)
    for name in ("lookup", "fp8"):
        drafting, drafter = DRAFTERS[name]
        drafted = replace(plan, drafting=drafting)
        loop = TokenLoop(kvrecomp.Decoder(model, drafted), SAMPLED, [], 0, drafter=drafter)
        assert_alike(loop.run(TEXTS.ids, TEXTS.mask, NEW), expected)


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


@few
@given(data=st.data())
def test_any_plan(data):
    """Any blocks in any memory, of two layers of different shapes, drafted by what is known to be right at random."""
    kind = data.draw(st.sampled_from(["opt", "grouped"]))
    plan = data.draw(toy_plans.plans(toy.model(kind).shape, 2))
    texts = toy.texts(plan.workload.batch, plan.workload.prompt, longest_padding=plan.workload.prompt - 1)
    expected = run(plan, None, SAMPLED, kind, texts)
    written = expected.sequences[:, plan.workload.prompt :]
    right = np.random.default_rng(data.draw(st.integers(0, 99))).random(written.shape) < 0.7
    drafting = Drafting("prompt_lookup", data.draw(st.integers(1, 4)), ahead=data.draw(st.integers(1, 7)))
    assert_alike(run(replace(plan, drafting=drafting), Known(written, right), SAMPLED, kind, texts), expected)
    drafting = Drafting("sketch", 2, ahead=3, codec=data.draw(st.sampled_from(["fp8", "int4"])))
    assert_alike(run(replace(plan, drafting=drafting), Sketch(), SAMPLED, kind, texts), expected)


def test_rows_never_mix():
    """Rows in another order, named as before, have the texts that they had."""
    drafting = DRAFTERS["int4"][0]
    order, names = [2, 0, 1], np.array([7, 8, 9])
    decoder = kvrecomp.Decoder(toy.model(), make_plan(drafting=drafting))
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
    assert (itself.acceptance == 1).all() and itself.passes.tolist() == [4] * BATCH
    assert (other.acceptance < 0.5).all()
