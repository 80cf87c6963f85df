"""Attention over blocks, in any form and however they are cut, against softmax attention written out in NumPy."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvrecomp.plan import cutting
from kvrecomp.run import attention
from kvrecomp.run.attention import Projection, Projections, Query, attend, attend_causal, merge
from kvrecomp.run.cache import Block

few = settings(max_examples=6, phases=(Phase.explicit, Phase.generate))

# Prime and distinct where they may be: batch, tokens, hidden, head_dim (even, to be rotated).
BATCH, TOKENS, HIDDEN, HEAD_DIM = 3, 13, 17, 4


@dataclass(frozen=True)
class Case:
    """One layer's attention; `rotated` applies `toy.rotate` to queries and keys."""

    heads: int = 6
    kv_heads: int = 2
    bias: bool = True
    rotated: bool = False
    sliding_window: int | None = None
    soft_cap: float | None = None
    seed: int = 0

    @property
    def scale(self):
        return 0.6

    @property
    def weights(self):
        """(kernel, bias) of query, key and value."""
        rng = np.random.default_rng(self.seed)
        return [
            (
                0.3 * rng.normal(size=(HIDDEN, count, HEAD_DIM)).astype(np.float32),
                rng.normal(size=(count, HEAD_DIM)).astype(np.float32) if self.bias else None,
            )
            for count in (self.heads, self.kv_heads, self.kv_heads)
        ]

    def projections(self, weights):
        encode = toy.rotate if self.rotated else None
        return Projections(
            *[Projection(*pair) for pair in weights],
            scale=self.scale,
            encode_query=encode,
            encode_key=encode,
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
        )


CASES = {
    "one head each": Case(heads=5, kv_heads=5),
    "grouped": Case(),
    "one key for all": Case(heads=3, kv_heads=1, bias=False),
    "rotated": Case(rotated=True),
    "sliding": Case(sliding_window=4),
    "capped": Case(soft_cap=1.5),
    "everything": Case(rotated=True, sliding_window=5, soft_cap=2.0, bias=False),
}


def numpy_rotate(head, position):
    """One head [d] at one position."""
    half = len(head) // 2
    angles = position * 3.0 ** -np.arange(half)
    return np.concatenate(
        [
            head[:half] * np.cos(angles) - head[half:] * np.sin(angles),
            head[half:] * np.cos(angles) + head[:half] * np.sin(angles),
        ]
    )


def numpy_attention(case, x, padding, slot):
    """The query in that slot over what it sees, one row and one head at a time, in float64: [b, n * d].

    NaN for rows in which that slot is padding.
    """
    weights = [(kernel.astype(float), 0 if bias is None else bias.astype(float)) for kernel, bias in case.weights]

    def project(which, vector, head, position):
        kernel, bias = weights[which]
        projected = vector @ kernel[:, head] + (bias if np.isscalar(bias) else bias[head])
        return numpy_rotate(projected, position) if case.rotated and which < 2 else projected

    result = np.zeros((x.shape[1], case.heads, HEAD_DIM))
    for row in range(x.shape[1]):
        first = padding[row]
        if first > slot:
            result[row] = np.nan
            continue
        if case.sliding_window is not None:
            first = max(first, slot + 1 - case.sliding_window)
        for head in range(case.heads):
            kv_head = head * case.kv_heads // case.heads
            query = project(0, x[slot, row], head, slot - padding[row])
            scores, values = [], []
            for seen in range(first, slot + 1):
                score = case.scale * query @ project(1, x[seen, row], kv_head, seen - padding[row])
                scores.append(score if case.soft_cap is None else case.soft_cap * np.tanh(score / case.soft_cap))
                values.append(project(2, x[seen, row], kv_head, 0))
            likely = np.exp(np.array(scores) - max(scores))
            result[row, head] = likely @ np.array(values) / likely.sum()
    return result.reshape(x.shape[1], -1)


def activations(seed=1, tokens=TOKENS):
    return np.random.default_rng(seed).normal(size=(tokens, BATCH, HIDDEN)).astype(np.float32)


def blockwise(case, x, padding, slot, sizes, forms, groups, method):
    """The library's: tokens cut into blocks of `sizes` and `forms`; blocks of one of `groups` share a softmax."""

    @jax.jit
    def run(x, weights, padding, slot):
        projections = case.projections(weights)
        positions = attention.positions_of(jnp.arange(len(x)), padding)
        key, value = projections.keys(x, positions), projections.values(x)
        newest = jax.lax.dynamic_index_in_dim(x, slot, keepdims=False)
        queries = projections.queries(newest, slot - padding)[:, None]
        query = Query(projections, queries, jnp.full((BATCH, 1), slot), padding)
        cached, start = {}, 0
        for size, form, group in zip(sizes, forms, groups, strict=True):
            whole = [x] if form == "activations" else [key, value]
            tensors = tuple(tensor[start : start + size] for tensor in whole)
            cached.setdefault(group, []).append(Block(tensors, jnp.int32(start), tensors[0].shape, form, "device"))
            start += size
        found = [attend(query, blocks, method) for blocks in cached.values()]
        return merge(query, functools.reduce(attention.join, found, {}))[:, 0]

    arrays = jax.tree.map(toy.put, (x, case.weights, np.asarray(padding, np.int32), np.int32(slot)))
    return toy.get(run(*arrays))


@pytest.mark.parametrize("name", CASES)
@few
@given(data=st.data())
def test_any_cut_into_blocks(name, data):
    """Slots after the query's hold numbers too, as an unfilled tail does, and are not seen."""
    case, blocks = CASES[name], data.draw(st.integers(1, 5))
    ends = sorted(data.draw(st.sets(st.integers(1, TOKENS - 1), min_size=blocks - 1, max_size=blocks - 1)))
    sizes = np.diff([0, *ends, TOKENS]).tolist()
    forms = [data.draw(st.sampled_from(["activations", "keys_values"])) for _ in sizes]
    groups = [data.draw(st.integers(0, 2)) for _ in sizes]
    method = data.draw(st.sampled_from(["absorb", "recompute"]))
    slot = data.draw(st.integers(5, TOKENS - 1))
    padding = data.draw(st.lists(st.integers(0, slot), min_size=BATCH, max_size=BATCH))
    x = activations()
    expected = numpy_attention(case, x, padding, slot)
    result = blockwise(case, x, padding, slot, sizes, forms, groups, method)
    np.testing.assert_allclose(result, expected, atol=2e-5)


@pytest.mark.parametrize("method", ["absorb", "recompute"])
@pytest.mark.parametrize("form", ["activations", "keys_values"])
def test_blocks_that_are_not_seen_at_all(form, method):
    """Blocks of padding only, of the future only, or out of the sliding window: no NaN, and no weight."""
    case, x = CASES["sliding"], activations()
    x[10:] *= 1e4  # the future is unlike anything
    result = blockwise(case, x, [0, 5, 9], 9, [2, 3, 5, 3], [form] * 4, [0, 1, 2, 3], method)
    np.testing.assert_allclose(result, numpy_attention(case, x, [0, 5, 9], 9), atol=2e-5)


def test_all_alone():
    """A query that sees only itself gets its own value, whatever the scores."""
    case, x = CASES["grouped"], activations()
    kernel, bias = case.weights[2]
    expected = np.repeat(np.einsum("bh,hkd->bkd", x[6], kernel) + bias, 3, axis=1).reshape(BATCH, -1)
    result = blockwise(case, x, [6, 6, 6], 6, [6, 4, 3], ["activations"] * 3, [0, 1, 0], "absorb")
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("form", ["activations", "keys_values"])
def test_large_scores_do_not_overflow(form):
    """Scores of some thousands in one block, of minus some thousands in another."""
    case, x = CASES["grouped"], activations()
    x[:4] *= 100
    x[-1] *= 30
    expected = numpy_attention(case, x, [0, 2, 3], 12)
    assert np.isfinite(expected).all()
    result = blockwise(case, x, [0, 2, 3], 12, [4, 4, 5], [form] * 3, [0, 1, 2], "absorb")
    np.testing.assert_allclose(result, expected, atol=1e-3 * np.abs(expected).max())


def test_absorption_computes_no_keys_or_values():
    """The point of it: no intermediate result has the size of K or V, [s, b, k, d]; when recomputed, two have."""
    case, sizes = CASES["one head each"], {}
    for method in ("absorb", "recompute"):

        def run(x, weights, method=method):
            projections = case.projections(weights)
            slot, padding = jnp.int32(12), jnp.zeros(BATCH, jnp.int32)
            queries = projections.queries(x[-1], slot - padding)[:, None]
            query = Query(projections, queries, jnp.full((BATCH, 1), slot), padding)
            block = Block((x,), jnp.int32(0), x.shape, "activations", "device")
            return merge(query, attend(query, [block], method))

        jaxpr = jax.make_jaxpr(run)(*jax.tree.map(toy.put, (activations(), case.weights)))
        products = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
        sizes[method] = [out.aval.size for equation in products for out in equation.outvars]
    assert max(sizes["absorb"]) < TOKENS * BATCH * case.kv_heads * HEAD_DIM
    assert sizes["recompute"].count(TOKENS * BATCH * case.kv_heads * HEAD_DIM) == 2


# --- a whole prompt over itself ---------------------------------------------------------------------------------------


def causal(case, x, padding):
    """Outputs, K and V of the library's."""

    @jax.jit
    def run(x, weights, padding):
        return attend_causal(case.projections(weights), x, padding)

    arrays = jax.tree.map(toy.put, (x, case.weights, np.array(padding, np.int32)))
    return [toy.get(out) for out in run(*arrays)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_causal(name, chunk, monkeypatch):
    """Whole, query by query, and in chunks that do not divide the prompt."""
    case, x, padding = CASES[name], activations(), [0, 4, 12]
    if chunk is not None:
        monkeypatch.setattr(cutting, "SCORE_BYTES", chunk * 4 * BATCH * case.heads * TOKENS)
    mixed, key, value = causal(case, x, padding)
    assert mixed.shape == (TOKENS, BATCH, case.heads * HEAD_DIM) and np.isfinite(mixed).all()
    for slot in range(TOKENS):
        rows = [row for row in range(BATCH) if slot >= padding[row]]
        np.testing.assert_allclose(mixed[slot][rows], numpy_attention(case, x, padding, slot)[rows], atol=2e-5)
    kernel, bias = case.weights[2]
    np.testing.assert_allclose(value, np.einsum("sbh,hkd->sbkd", x, kernel) + (0 if bias is None else bias), atol=1e-5)
    kernel, bias = case.weights[1]
    expected = np.einsum("sbh,hkd->sbkd", x, kernel) + (0 if bias is None else bias)
    if case.rotated:
        for slot, row, head in np.ndindex(*expected.shape[:3]):
            expected[slot, row, head] = numpy_rotate(expected[slot, row, head], max(0, slot - padding[row]))
    np.testing.assert_allclose(key, expected, atol=1e-5)


@given(st.integers(1, 600), st.integers(1, 128), st.integers(1, 5000))
def test_chunks_of_queries_are_equal_and_no_more_than_it_takes(batch, heads, tokens):
    """Hence next to nothing is padded: work is that of the prompt, and less than one query a chunk."""
    chunk = cutting.chunk_of_queries(batch, heads, tokens)
    chunks = -(-tokens // chunk)
    row = 4 * batch * heads * tokens  # bytes of one query's scores
    assert chunk == 1 or chunk * row <= cutting.SCORE_BYTES
    assert chunks * chunk - tokens < chunks
    assert chunks == 1 or -(-tokens // (chunks - 1)) * row > cutting.SCORE_BYTES


def test_a_chunk_of_queries_bounds_memory(monkeypatch):
    """Temporary memory with 8 times the prompt is about 8 times as large, not 64 times."""
    monkeypatch.setattr(cutting, "SCORE_BYTES", 2**16)

    def temporary(tokens):
        case = CASES["one head each"]
        shapes = jax.ShapeDtypeStruct((tokens, BATCH, HIDDEN), np.float32), jax.ShapeDtypeStruct((BATCH,), np.int32)
        weights = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), case.weights)
        program = jax.jit(lambda x, weights, padding: attend_causal(case.projections(weights), x, padding))
        return program.lower(shapes[0], weights, shapes[1]).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1024) < 12 * temporary(128)


def test_visible_by_hand():
    """Slots 0 to 4 of one row without padding and one with two tokens of it; queries in slots 2 and 3, or 2 and 4."""
    slots, padding, alike, apart = (
        toy.put(np.array(each, np.int32)) for each in (range(5), (0, 2), [(2, 3)], [(2, 3), (2, 4)])
    )
    seen = jax.jit(attention.visible, static_argnums=3)
    expected = [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]]
    np.testing.assert_array_equal(seen(slots, padding, alike, None), np.array(expected) == 1)
    expected = [[[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]], [[0, 0, 1, 0, 0], [0, 0, 0, 1, 1]]]
    np.testing.assert_array_equal(seen(slots, padding, apart, 2), np.array(expected) == 1)
