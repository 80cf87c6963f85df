"""Drafts in the token loop: how many there are, what is told of them, and what goes wrong."""

from dataclasses import replace

import numpy as np
import pytest
import toy
from toy_drafts import BATCH, NEW, PROMPT, SAMPLED, TEXTS, assert_alike, known, make_loop, make_plan, run, written

import kvrecomp
from kvrecomp.drafts import FEW_DRAFTS, UNPAID_ROUNDS, Pace, without_assistant
from kvrecomp.generate import LEAD
from kvrecomp.plan import Drafting, PlanError
from kvrecomp.run.drafters import PromptLookup

FOUR = make_plan(drafting=Drafting("prompt_lookup", 4, ahead=5))
NEVER = np.zeros((BATCH, NEW), bool)


@pytest.fixture(scope="module")
def plainly():
    """Texts without drafts, and their logits."""
    return run(make_plan(), None, SAMPLED, output_logits=True)


# --- how many ---------------------------------------------------------------------------------------------------------

COSTS = [
    Drafting("sketch", 8, codec="fp8", draft_cost=0.12, check_cost=1.6),
    Drafting("sketch", 5, codec="int4", draft_cost=0.2, check_cost=1.1),
    Drafting("prompt_lookup", 8, draft_cost=0.0, check_cost=1.3),
    Drafting("assistant", 7, draft_cost=0.05, check_cost=1.0),
]


def paced(drafting, rows, acceptances):
    """The drafts of each round, of which each is right with that probability if those before it are; what is taken is
    known LEAD rounds later."""
    pace, rng = Pace(replace(FOUR, drafting=drafting)), np.random.default_rng(rows)
    drafts, unread = [], []
    for acceptance in acceptances:
        drafts.append(pace.drafts())
        right = rng.random((rows, drafts[-1])) < acceptance
        had = np.full(rows, drafts[-1])[: rows if drafts[-1] else 0]
        unread.append((had, 1 + np.cumprod(right, axis=1).sum(axis=1)[: len(had)]))
        if len(unread) == LEAD:
            pace.learn(*unread.pop(0))
    return np.array(drafts)


@pytest.mark.parametrize("drafts", [1, 4, 9])
def test_under_copies_any_number_of_drafts_is_all_of_them(plainly, drafts):
    plan = make_plan(batch=1, groups=BATCH, drafting=Drafting("sketch", 4, ahead=20, codec="fp8"))
    found = run(plan, known(written(plainly), ~NEVER), SAMPLED, drafts=drafts)
    assert_alike(found, plainly)
    assert found.passes[1:].tolist() == [-(-(NEW - 1) // 5)] * 2  # a pass checks four and takes five tokens
    assert found.passes[0] == 1 + -(-(NEW - 2) // 5)  # the first group's first one checks none


def test_under_copies_all_drafts_are_made_or_none():
    drafting = Drafting("sketch", 8, codec="fp8", draft_cost=0.02)
    pace = Pace(replace(FOUR, drafting=drafting, groups=2))
    assert pace.drafts() == 8
    found = set()
    for _ in range(70):
        pace.learn(np.full(3, 8), np.ones(3, int))  # nothing is right
        found.add(pace.drafts())
    assert found == {0, 8}


@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize("drafting", COSTS, ids=lambda drafting: drafting.name)
def test_a_text_that_accepts_nothing_has_no_drafts(drafting, rows):
    """But for the first rounds, and for a few that look whether it is so still."""
    drafts = paced(drafting, rows, [0.0] * 256)
    first = int((drafts == 0).argmax())
    assert first <= (32 if rows == 1 else 24 if rows == 3 else 8)
    looking = first + np.flatnonzero(drafts[first:])
    assert np.diff(looking, prepend=first).tolist() == [UNPAID_ROUNDS - 1] + [UNPAID_ROUNDS] * (len(looking) - 1)
    assert len(looking) >= 3 and (drafts[looking] == FEW_DRAFTS).all()


@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize("drafting", COSTS, ids=lambda drafting: drafting.name)
def test_a_text_that_is_always_right_has_as_many_as_there_may_be(drafting, rows):
    drafts = paced(drafting, rows, [1.0] * 64)
    assert (drafts[16:] == drafting.most).all()
    assert (paced(drafting, rows, [0.99] * 64)[16:] == drafting.most).mean() > 0.9


@pytest.mark.parametrize("rows", [3, 32])
@pytest.mark.parametrize("drafting", COSTS, ids=lambda drafting: drafting.name)
def test_a_text_that_changes_is_followed(drafting, rows):
    """Within two rounds that look, and down again in some dozen."""
    drafts = paced(drafting, rows, [0.0] * 128 + [1.0] * 256 + [0.0] * 128)
    assert (drafts[32:128] > 0).sum() <= 2
    assert (drafts[128 + 2 * UNPAID_ROUNDS : 384] == drafting.most).all()
    assert (drafts[384 + 56 :] > 0).sum() <= 2


def test_rows_that_were_held_back_say_nothing_of_the_drafts(plainly, monkeypatch):
    """One row is right always, and may be a token ahead: it takes all drafts, or nothing is learned from it."""
    learned = []
    monkeypatch.setattr(Pace, "learn", lambda self, drafts, counts: learned.extend(counts.tolist()))
    right = NEVER.copy()
    right[1] = True
    run(replace(FOUR, drafting=Drafting("prompt_lookup", 2, ahead=1)), known(written(plainly), right), SAMPLED)
    assert set(learned) == {1, 3}


# --- what is told -----------------------------------------------------------------------------------------------------


class Columns:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, value):
        assert not self.ended and value.dtype == np.int32
        self.got.append(np.array(value))

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_a_streamer_gets_columns_in_order(plainly, share):
    """Of rows far apart, each column once, when all rows have it; the rest of a row that ended is padding."""
    texts = written(plainly)
    eos = texts[[0, 2], [4, 3]].tolist()
    streamer = Columns()
    right = np.random.default_rng(5).random((BATCH, NEW)) < share
    right[1] = True
    found = run(FOUR, known(texts, right), SAMPLED, eos=eos, streamer=streamer)
    np.testing.assert_array_equal(streamer.got[0], TEXTS.ids)
    np.testing.assert_array_equal(np.stack(streamer.got[1:], axis=1), found.sequences[:, PROMPT:])
    assert streamer.ended == 1
    assert found.new_tokens.tolist() == [5, NEW, 4]
    for row, count in enumerate(found.new_tokens):
        np.testing.assert_array_equal(found.sequences[row, PROMPT : PROMPT + count], texts[row, :count])
        assert (found.sequences[row, PROMPT + count :] == 0).all()


def test_a_streamer_of_one_row():
    """Several tokens of a step come one by one."""
    plan = make_plan(batch=1, drafting=Drafting("prompt_lookup", 4, ahead=5))
    texts = toy.Texts(TEXTS.ids[:1], TEXTS.padding[:1])
    alone = written(run(make_plan(batch=1), None, SAMPLED, texts=texts))
    streamer = Columns()
    found = run(plan, known(alone, np.full((1, NEW), True), texts.ids), SAMPLED, texts=texts, streamer=streamer)
    assert [value.shape for value in streamer.got] == [(1, PROMPT)] + [(1,)] * NEW
    np.testing.assert_array_equal(np.concatenate(streamer.got[1:]), alone[0])
    assert found.passes.tolist() == [3]


def test_what_was_copied_is_that_of_the_blocks_there_were(plainly, monkeypatch):
    """Also of the first round after a tail was written out."""
    loop, there = make_loop(FOUR, known(written(plainly), NEVER), SAMPLED), []
    rounds = loop.decoder.round_groups

    def recorded(*given):
        found = rounds(*given)
        there.append(loop.decoder.write_outs(found[0][0]))
        return found

    monkeypatch.setattr(loop.decoder, "round_groups", recorded)
    found = loop.run(TEXTS.ids, TEXTS.mask, NEW)
    assert found.link_bytes == [FOUR.link_bytes(write_outs) for write_outs in there[: len(found.link_bytes)]]
    assert len(found.link_bytes) == NEW - 1 and there[0] == 0 and there[NEW - 2] > 1


def test_logits_are_those_that_tokens_were_chosen_by(plainly):
    right = np.random.default_rng(2).random((BATCH, NEW)) < 0.7
    found = run(FOUR, known(written(plainly), right), SAMPLED, output_logits=True)
    assert_alike(found, plainly)
    np.testing.assert_allclose(found.logits, plainly.logits, atol=1e-4)


@pytest.mark.parametrize("new", [1, 2])
def test_hardly_any_tokens(plainly, new):
    for drafter in (PromptLookup(), known(written(plainly), ~NEVER)):
        found = run(FOUR, drafter, SAMPLED, new=new)
        np.testing.assert_array_equal(found.sequences[:, PROMPT:], written(plainly)[:, :new])
        assert found.passes.tolist() == [new - 1] * BATCH and found.drafted.tolist() == [0] * BATCH
        assert np.isnan(found.acceptance).all()


def test_rows_that_ended_stay_so_over_many_write_outs(plainly):
    """One with its first token, one within a run of tokens that were all right; the third goes on alone."""
    texts = written(plainly)
    for eos, counts in ((texts[[0, 2], [0, 3]], [1, NEW, 4]), (texts[[0, 2], [2, 3]], [3, NEW, 4])):
        expected = run(make_plan(), None, SAMPLED, eos=eos)
        for right in (NEVER, ~NEVER):
            found = run(FOUR, known(texts, right), SAMPLED, eos=eos)
            assert_alike(found, expected)
            assert found.new_tokens.tolist() == counts


# --- what goes wrong --------------------------------------------------------------------------------------------------


def with_nan_at(position):
    """A toy OPT whose embedding of one position is not a number."""
    broken = toy.randomised(toy.OPT.build(dtype="float32", rngs=None), seed=1)
    table = toy.get(broken.positions.embedding.get_value()).copy()
    table[position + 2] = np.nan
    broken.positions.embedding.set_value(toy.put(table))
    return broken


@pytest.mark.parametrize("name", ["activations", "keys_values", "recompute"])
@pytest.mark.parametrize("right", [False, True])
def test_nan_logits_name_the_token(plainly, right, name):
    """That of the position, though tokens beyond it are checked with those before, and taken where they are right."""
    plan = make_plan(name, drafting=FOUR.drafting)
    drafts = known(written(plainly), NEVER if not right else ~NEVER)
    for new in (2, 3, 4):  # row 0 has PROMPT tokens, so its new token of that number is at the position
        loop = make_loop(plan, drafts, SAMPLED, model=with_nan_at(PROMPT - 1 + new))
        with pytest.raises(FloatingPointError, match=f"row 0 are NaN or infinite at new token {new}: "):
            loop.run(TEXTS.ids, TEXTS.mask, NEW)


@pytest.mark.parametrize("right", [False, True])
def test_nan_of_what_is_not_taken_disturbs_nothing(plainly, right):
    """The last token of a text goes through no step, but drafts in its place do."""
    drafts = known(written(plainly), NEVER if not right else ~NEVER)
    assert_alike(run(FOUR, drafts, SAMPLED, model=with_nan_at(PROMPT + NEW - 1)), plainly)


# --- through generate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["prompt_lookup", "sketch", "assistant"])
def test_a_plan_that_has_drafts_needs_no_more_words(drafter):
    """Who drafts, and how many at most, it says itself; a number is of these, and none turns them off."""
    codec = "int4" if drafter == "sketch" else None
    plan = make_plan("activations", drafting=Drafting(drafter, 2, codec=codec), new=5)
    options = {"assistant_model": toy.model("350m")} if drafter == "assistant" else {}
    results = [
        kvrecomp.generate(toy.model(), TEXTS.ids, TEXTS.mask, max_new_tokens=5, plan=plan, drafts=drafts, **options)
        for drafts in (None, 1, 0)
    ]
    for found in results[:2]:
        assert_alike(found, results[2])
    assert (results[1].drafted <= results[1].passes).all()
    assert results[1].drafted.all() and not results[2].drafted.any()


def test_an_assistant_has_its_part_of_the_budget():
    """Of a budget for the plan alone it leaves too little, and of less than its own cache nothing."""
    shape, other = toy.model().shape, toy.model("350m").shape
    work, most = kvrecomp.Workload(BATCH, PROMPT, 5), 2
    own = kvrecomp.memory_needed(kvrecomp.named_plan("device", other, replace(work, new=8), tail=8))["device"]
    total = sum(own.values())
    left = [
        without_assistant(kvrecomp.Budget(total + 7.0, 3.0), shape, other, work, most, loaded=loaded).device
        for loaded in (False, True)
    ]
    assert left == [7.0, 7.0 + own["weights"]]
    with pytest.raises(
        PlanError, match=r"^the assistant toy-350m leaves nothing of .* of device memory: use a smaller"
    ):
        without_assistant(kvrecomp.Budget(total, 3.0), shape, other, work, most, loaded=False)
    plan = kvrecomp.named_plan("activations", shape, work)
    alone = sum(kvrecomp.memory_needed(replace(plan, drafting=Drafting("assistant", most)))["device"].values())
    options = {
        "max_new_tokens": 5,
        "plan": "activations",
        "assistant_model": toy.model("350m"),
        "num_assistant_tokens": 2,
    }
    with pytest.raises(PlanError, match="of device memory"):
        kvrecomp.generate(toy.model(), TEXTS.ids, TEXTS.mask, budget=kvrecomp.Budget(alone + 1.0, 1e9), **options)
