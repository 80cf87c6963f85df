"""Drafters, against plain Python."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import toy_plans
from hypothesis import given, settings
from hypothesis import strategies as st

import kvrecomp
from kvrecomp.plan import Drafting, Workload
from kvrecomp.run.cache import Recent, describe_sketches
from kvrecomp.run.drafters import Group, PromptLookup, Proposal, Turn, _written

# --- what followed before ---------------------------------------------------------------------------------------------

ROWS, PROMPT, NEW, MOST = 3, 11, 13, 5
FEW = 4  # tokens that texts are made of, so that they repeat themselves
PLAN = kvrecomp.named_plan("device", toy.model().shape, Workload(ROWS, PROMPT, NEW))


def as_group(texts, lengths, newest):
    """Rows that use so many slots, whose newest tokens are not cached yet."""
    nobody: Any = None
    recent = Recent((), jnp.int32(PROMPT), lengths, jnp.zeros_like(lengths), ())
    return Group((), (), recent, Turn(nobody, newest, nobody, texts, nobody, nobody), None)


@functools.cache
def drafts_of(longest):
    """A program: texts, lengths and newest tokens -> texts with these, drafts after them."""

    def program(*arrays):
        nobody: Any = None
        drafter, group = PromptLookup(longest), as_group(*arrays)
        proposal = drafter.propose(nobody, nobody, nobody, [group], MOST)
        _, (drafts,), (texts,) = proposal.drafted(proposal.made(jnp.int32(MOST)))
        return texts, drafts

    return jax.jit(program)


def followed(text, longest):
    """What followed the last tokens of a list, as many of `longest` as stand in it before, where they stood last, over
    and over; None where the last one is new."""
    last = len(text) - 1
    for size in range(min(longest, last), 0, -1):
        for end in range(last - 1, size - 2, -1):
            if text[end + 1 - size : end + 1] == text[-size:]:
                return [text[end + 1 + number % (last - end)] for number in range(MOST)]
    return None


@st.composite
def partly_written(draw):
    """Texts int32[ROWS, slots] of few tokens, padded on the left, and how many slots each row uses but for its newest
    token; what stands behind is left over from drafts that were wrong."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    texts = rng.integers(0, draw(st.integers(1, FEW)), (ROWS, PROMPT + NEW), dtype=np.int32)
    padding = rng.integers(0, PROMPT, ROWS)
    lengths = rng.integers(PROMPT, PROMPT + NEW, ROWS, dtype=np.int32)
    return texts, padding, lengths


@settings(max_examples=150)
@given(given=partly_written(), longest=st.sampled_from([1, 2, 3, 7]))
def test_what_followed_before(given, longest):
    texts, padding, lengths = given
    real = [row[start : length + 1].tolist() for row, start, length in zip(texts, padding, lengths)]
    newest = texts[np.arange(ROWS), lengths]
    kept = np.where(np.arange(PROMPT + NEW) < padding[:, None], -1, texts)
    kept[np.arange(ROWS), lengths] = toy.VOCAB - 1  # the newest is to be written there
    after, drafts = jax.device_get(drafts_of(longest)(*toy.put((kept, lengths, newest))))
    for row, text in enumerate(real):
        expected = followed(text, longest)
        if expected is None:
            assert (drafts[row] >= 0).all() and (drafts[row] < toy.VOCAB).all()
        else:
            assert drafts[row].tolist() == expected
        assert after[row, padding[row] : lengths[row] + 1].tolist() == text
        assert (after[row, : padding[row]] == -1).all()


def test_what_repeats_itself_goes_on():
    """Longer than what there is: over and over. Of two places that are as long the later one, of any a longer one."""
    assert followed([3, 0, 1, 2, 0, 1, 2], 3) == [0, 1, 2, 0, 1]
    assert followed([1, 2, 0, 3, 2, 1, 2], 1) == [1, 2, 1, 2, 1]
    assert followed([1, 2, 0, 3, 2, 1, 2], 2) == [0, 3, 2, 1, 2]
    assert followed([1, 2, 3], 3) is None


@settings(max_examples=50)
@given(starts=st.lists(st.integers(-7, PROMPT + NEW + 3), min_size=ROWS, max_size=ROWS))
def test_tokens_beyond_a_text_are_left_out(starts):
    """On both sides."""
    texts = np.arange(ROWS * (PROMPT + NEW), dtype=np.int32).reshape(ROWS, -1)
    slots = (np.array(starts)[:, None] + np.arange(MOST)).astype(np.int32)
    tokens = -1 - np.arange(ROWS * MOST, dtype=np.int32).reshape(ROWS, MOST)
    expected = texts.copy()
    for row, column in np.ndindex(slots.shape):
        if 0 <= slots[row, column] < PROMPT + NEW:
            expected[row, slots[row, column]] = tokens[row, column]
    np.testing.assert_array_equal(toy.get(jax.jit(_written)(*toy.put((texts, slots, tokens)))), expected)


class Some(NamedTuple):
    """What is learned from of a round."""

    tokens: Any
    counts: Any


@jax.jit
def learnt(texts, lengths, newest, tokens, counts):
    """Texts after a round, with which rows use so many slots."""
    _, _, recent, turn, _ = as_group(texts, lengths, newest)
    return PromptLookup().learn(turn, recent, Some(tokens, counts)).kept


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_learns_what_rows_took(seed):
    """Of each round some tokens, or none of a row; what was not taken is not in the text."""
    rng = np.random.default_rng(seed)
    texts = rng.integers(0, FEW, (ROWS, PROMPT + NEW + MOST + 1), dtype=np.int32)
    padding = rng.integers(0, PROMPT, ROWS)
    mask = np.arange(PROMPT) >= padding[:, None]
    kept, given = PromptLookup().start(PLAN, texts[:, :PROMPT], mask)
    assert given is None and kept.shape == (ROWS, PROMPT + NEW) and kept.dtype == np.int32
    lengths = np.full(ROWS, PROMPT, np.int32)
    for _ in range(5):
        newest = texts[np.arange(ROWS), lengths]
        kept, drafts = drafts_of(3)(*toy.put((kept, lengths, newest)))
        for row, length in enumerate(lengths):
            expected = followed(texts[row, padding[row] : length + 1].tolist(), 3)
            assert expected is None or jax.device_get(drafts)[row].tolist() == expected
        counts = np.minimum(rng.integers(0, MOST + 2, ROWS), PROMPT + NEW - 1 - lengths).astype(np.int32)
        places = lengths[:, None] + 1 + np.arange(MOST + 1)
        right = np.take_along_axis(texts, np.minimum(places, texts.shape[1] - 1), axis=1)
        tokens = np.where(np.arange(MOST + 1) < counts[:, None], right, (right + 1) % FEW).astype(np.int32)
        lengths = lengths + counts
        kept = learnt(kept, *toy.put((lengths, newest, tokens, counts)))


# --- steps in parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("more", [0, 1])
def test_parts_make_every_draft_once(parts, more):
    """In order, whatever their number, and as near to equal as they can be; as one, and of a number that is data."""
    nobody: Any = None

    def step(number, state):
        log, count = state
        return log.at[count].set(number), count + 1

    proposal = Proposal(toy.put((np.full(12, -1, np.int32), np.int32(0))), step, nobody, more)
    for count in range(9):
        state, sizes = proposal.state, []
        for number in range(parts):
            state = jax.jit(functools.partial(proposal.part, count, parts, number))(state)
            sizes.append(int(toy.get(state[1])) - sum(sizes))
        for log, made in (state, jax.jit(proposal.made)(toy.put(np.int32(count)))):
            assert int(toy.get(made)) == count + more
            assert toy.get(log).tolist() == [*range(count + more), *[-1] * (12 - count - more)]
        assert max(sizes) - min(sizes) <= 1


# --- sketches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["fp8", "int4"])
@pytest.mark.parametrize("write_outs", [0, 2])
def test_bytes_of_sketches_are_those_of_their_arrays(codec, write_outs):
    """Of the host blocks alone, in both layers; where K cannot be absorbed a prompt's are K and V."""
    plan = replace(toy_plans.MIXED, drafting=Drafting("sketch", 2, codec=codec))
    sketches = describe_sketches(plan, write_outs)
    for blocks, specs in zip(sketches, plan.blocks(write_outs), strict=True):
        assert [block.tokens for block in blocks] == [spec.tokens for spec in specs if spec.memory == "host"]
        assert all(block.codec == codec and block.memory == "device" for block in blocks)
    assert plan.sketch_bytes(write_outs) == sum(block.nbytes for blocks in sketches for block in blocks)
    assert sketches[1][0].form == "keys_values" and sketches[0][0].form == "activations"
