"""Choosing tokens at the edges: numbers beyond float32's range, infinite logits, ties, any generator of jax's."""

import jax
import numpy as np
import pytest
import toy

from kvrecomp.run.sampling import NO_TOKEN, Sampling, choose, start_rows, truncate

INF = np.inf
SHARP = [0.0, 1.0, 9.0, 2.0, 8.5]  # in float32 9 and 8.5 have 0.61 and 0.37 of the probability


def choices(logits, row_ids=None, steps=1, **options):
    """Token ids and what is reported, int32[rows, steps], of the same logits [rows, vocab] at every step."""
    rows = len(logits)
    names = np.arange(rows) if row_ids is None else np.asarray(row_ids)
    sampling = Sampling(do_sample=True, **options)
    state = start_rows(*map(toy.put, (np.uint32(0), names.astype(np.uint32), np.int32(5), np.zeros(rows, np.int32))))
    eos, pad, logits = map(toy.put, (np.zeros(0, np.int32), np.int32(0), np.asarray(logits, np.float32)))
    tokens, reports = [], []
    for _ in range(steps):
        state, token, report = choose(sampling, eos, pad, state, logits)
        tokens.append(toy.get(token))
        reports.append(toy.get(report))
    return np.stack(tokens, axis=1), np.stack(reports, axis=1)


def kept(logits, **options):
    """The ids of one row that may be chosen."""
    truncated = jax.jit(lambda logits: truncate(Sampling(do_sample=True, **options), logits))
    return np.flatnonzero(toy.get(truncated(toy.put(np.asarray([logits], np.float32))))[0] > -INF).tolist()


@pytest.mark.parametrize("top_p", [1e-46, 1e-39, 1e-30])
def test_the_least_top_p_is_greedy(top_p):
    assert kept(SHARP, top_p=top_p) == [2]
    assert set(choices([SHARP], steps=20, top_p=top_p)[0].flat) == {2}


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 3}, {"top_k": 3, "top_p": 0.5}])
@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-39, 1e-38, 1e-30])
def test_the_least_temperature_is_greedy(temperature, options):
    assert set(choices([SHARP], steps=20, temperature=temperature, **options)[0].flat) == {2}


def test_the_largest_temperature_leaves_out_what_is_masked():
    tokens, reports = choices([[0.0, -INF, 9.0, -INF, 3.0]], steps=60, temperature=1e308)
    assert set(tokens.flat) == {0, 2, 4} and (tokens == reports).all()


def test_masked_tokens_are_never_chosen():
    logits = [[-INF, 1.0, -INF, 2.0, -INF]]
    for options in ({}, {"top_k": 4}, {"top_p": 0.99}):
        tokens, reports = choices(logits, steps=60, **options)
        assert set(tokens.flat) == {1, 3} and (tokens == reports).all()


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("row", [[0, INF, 2], [INF, INF, INF], [-INF, -INF, -INF], [0, np.nan, 2]])
def test_logits_without_a_finite_largest_are_reported(row, do_sample):
    """With the rows beside them as they are, and unless they have ended."""
    logits = toy.put(np.array([[1, 2, 9], row, row], np.float32))
    rows = start_rows(*map(toy.put, (np.uint32(0), np.arange(3, dtype=np.uint32), np.int32(5), np.zeros(3, np.int32))))
    rows = rows._replace(finished=toy.put(np.array([False, False, True])))
    sampling = Sampling(do_sample, top_k=1)
    _, tokens, reports = choose(sampling, toy.put(np.zeros(0, np.int32)), toy.put(np.int32(1)), rows, logits)
    assert toy.get(reports).tolist() == [2, NO_TOKEN, 1] and toy.get(tokens)[[0, 2]].tolist() == [2, 1]


def test_numbers_as_large_as_there_are():
    assert set(choices([[3e38, -3e38, 0.0]], steps=9, temperature=0.5, top_p=0.9)[0].flat) == {0}


@pytest.mark.parametrize("top_k", [5, 99_999_999_999])
def test_a_top_k_beyond_the_vocabulary_is_all_of_it(top_k):
    assert kept(SHARP, top_k=top_k) == [0, 1, 2, 3, 4]
    assert kept(SHARP, top_k=top_k, top_p=0.7) == [2, 4]


def test_what_ties_with_the_last_one_kept_is_kept():
    tied = [5.0, 0.0, 5.0, 5.0, 1.0]
    assert kept(tied, top_k=1) == kept(tied, top_k=2) == kept(tied, top_p=0.2) == [0, 2, 3]


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_a_rows_text_does_not_depend_on_its_batch_whatever_jaxs_generator_is(generator):
    flat = np.zeros((1, 61))
    expected = choices(flat, [7], steps=12)[0][0]
    before = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", generator)
    try:
        jax.clear_caches()
        beside = choices(np.repeat(flat, 3, axis=0), [3, 7, 7], steps=12)[0]
    finally:
        jax.config.update("jax_default_prng_impl", before)
        jax.clear_caches()
    np.testing.assert_array_equal(beside[1:], [expected, expected])
    assert (beside[0] != expected).any()
