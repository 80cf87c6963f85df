"""In numbers of 16 bits, attention over activations is as near to exact attention as ordinary cached attention is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import kvrecomp
from kvrecomp.plan import BlockSpec
from kvrecomp.run.attention import Projection, Projections, Query, attend, join, merge, positions_of
from kvrecomp.run.cache import cut
from models.rotary import Rotary

ALLOWED = 1.25  # times the error of attention over cached keys and values
TOKENS, FIRST, BATCH, HIDDEN, HEADS, HEAD_DIM = 257, 131, 3, 176, 11, 16


def drawn(rng, *shape, std, dtype=jnp.bfloat16):
    """Random numbers that the dtype holds exactly."""
    return np.asarray((std * rng.normal(size=shape)).astype(dtype))


def rotated(heads, positions):
    """Rotary positions in float64: heads [..., n, d] at positions [...]."""
    angles = positions[..., None, None] * Rotary().frequencies(HEAD_DIM).astype(np.float64)
    first, second = np.split(heads, 2, axis=-1)
    turned = (first + 1j * second) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def exact(x, weights, scale, encode=None):
    """Attention of the last token over all, in float64: x [s, b, h] -> [b, n * d]."""
    (wq, bq), (wk, bk), (wv, bv) = [[part.astype(np.float64) for part in pair] for pair in weights]
    x = x.astype(np.float64)
    query = np.einsum("bh,hnd->bnd", x[-1], wq) + bq
    key, value = np.einsum("sbh,hnd->sbnd", x, wk) + bk, np.einsum("sbh,hnd->sbnd", x, wv) + bv
    if encode is not None:
        positions = np.broadcast_to(np.arange(len(x))[:, None], x.shape[:2])
        query, key = encode(query, positions[-1]), encode(key, positions)
    scores = scale * np.einsum("bnd,sbnd->bns", query, key)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bns,sbnd->bnd", weights, value).reshape(x.shape[1], -1)


def attention(x, weights, forms, scale, encode=None, method="absorb"):
    """The same with the library, in the dtype of its inputs, over two blocks of these forms."""
    slot, padding = np.int32(len(x) - 1), np.zeros(x.shape[1], np.int32)

    @jax.jit
    def run(x, weights, slot, padding):
        projections = Projections(*[Projection(*pair) for pair in weights], scale, encode, encode)
        key, value = projections.keys(x, positions_of(jnp.arange(TOKENS), padding)), projections.values(x)
        specs = [BlockSpec(form, "device", size) for form, size in zip(forms, (FIRST, TOKENS - FIRST))]
        queries = projections.queries(x[-1], slot - padding)[:, None]
        query = Query(projections, queries, jnp.full((len(padding), 1), slot), padding)
        found = [attend(query, [block], method) for block in cut(specs, x, key, value)[0]]
        return merge(query, functools.reduce(join, found, {}))[:, 0]

    return toy.get(run(*jax.tree.map(toy.put, (x, weights, slot, padding)))).astype(np.float64)


def error(result, expected):
    """Root of the mean square."""
    return np.sqrt(np.mean((np.asarray(result, np.float64) - expected) ** 2))


def inputs(seed, kind):
    """Activations as after a norm, and weights: attended to evenly or sharply, with large channels as trained models
    have them, or far from zero."""
    rng = np.random.default_rng(seed)
    x = drawn(rng, TOKENS, BATCH, HIDDEN, std=1)
    x[..., :3] *= 16 if kind == "outliers" else 1
    x[..., ::29] += 6 if kind == "offset" else 0
    weights = [
        (drawn(rng, HIDDEN, HEADS, HEAD_DIM, std=width * HIDDEN**-0.5), drawn(rng, HEADS, HEAD_DIM, std=0.5))
        for width in (3 if kind == "sharp" else 1, 1, 1)
    ]
    return x, weights


def cancelled(x, weights, magnitude):
    """Six channels of x become large and all but constant, and cancel in V, which alone uses them."""
    rng, large = np.random.default_rng(7), np.arange(5, HIDDEN, 31)[:6]
    shares = magnitude * rng.uniform(0.5, 1.5, 6) * rng.choice([-1, 1], 6)
    x[..., large] = (shares * (1 + 0.01 * rng.normal(size=(TOKENS, BATCH, 1)))).astype(x.dtype)
    for kernel, _ in weights[:2]:
        kernel[large] = 0
    kernel = weights[2][0].astype(np.float64)
    weights[2][0][large[-1]] = -np.einsum("h,hnd->nd", shares[:-1], kernel[large[:-1]]) / shares[-1]


KINDS = ("even", "sharp", "outliers", "offset")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_attention(seed, kind):
    (x, weights), scale = inputs(seed, kind), HEAD_DIM**-0.5
    expected = exact(x, weights, scale)
    ordinary = error(attention(x, weights, ("keys_values", "keys_values"), scale), expected)
    absorbed = error(attention(x, weights, ("activations", "activations"), scale), expected)
    mixed = error(attention(x, weights, ("activations", "keys_values"), scale), expected)
    assert 1e-4 < ordinary < 0.1  # bfloat16 was at work
    assert absorbed <= ALLOWED * ordinary and mixed <= ALLOWED * ordinary


@pytest.mark.parametrize("magnitude", [10, 100, 1000])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_channels_that_cancel_in_values(dtype, magnitude):
    """Their mean, weighed and rounded before V is made of it, would leave much of itself in V."""
    x, weights = jax.tree.map(lambda array: array.astype(dtype), inputs(3, "even"))
    cancelled(x, weights, magnitude)
    expected = exact(x, weights, 0.25)
    assert np.abs(expected).max() < 10  # of numbers that are hundreds of times as large
    ordinary = error(attention(x, weights, ("keys_values", "keys_values"), 0.25), expected)
    for forms in (("activations", "activations"), ("activations", "keys_values")):
        assert error(attention(x, weights, forms, 0.25), expected) <= ALLOWED * ordinary


def test_the_error_does_not_grow_with_blocks():
    """They are mixed one after the other, on the device as one."""
    (x, weights), scale = inputs(5, "offset"), HEAD_DIM**-0.5
    expected = exact(x, weights, scale)
    ordinary = error(attention(x, weights, ("keys_values", "keys_values"), scale), expected)

    @jax.jit
    def run(x, weights, slot, padding):
        projections = Projections(*[Projection(*pair) for pair in weights], scale)
        queries = projections.queries(x[-1], slot - padding)[:, None]
        query = Query(projections, queries, jnp.full((len(padding), 1), slot), padding)
        specs = [BlockSpec("activations", "device", 1)] * TOKENS
        return merge(query, attend(query, cut(specs, x, x, x)[0], "absorb"))[:, 0]

    given = x, weights, np.int32(TOKENS - 1), np.zeros(BATCH, np.int32)
    of_single_tokens = toy.get(run(*jax.tree.map(toy.put, given))).astype(np.float64)
    assert error(of_single_tokens, expected) <= ALLOWED * ordinary


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_rotated_attention(seed, kind):
    """K recomputed from activations and rotated, V absorbed or recomputed."""
    (x, weights), scale, rotate = inputs(seed, kind), HEAD_DIM**-0.5, Rotary().rotate
    expected = exact(x, weights, scale, rotated)
    ordinary = error(attention(x, weights, ("keys_values", "keys_values"), scale, rotate), expected)
    assert 1e-4 < ordinary < 0.1  # bfloat16 was at work
    for method in ("absorb", "recompute"):
        recomputed = error(attention(x, weights, ("activations", "activations"), scale, rotate, method), expected)
        assert recomputed <= ALLOWED * ordinary


def test_what_errors_are_measured_from():
    """In float32 the same attention differs from the expected by no more than float32's rounding."""
    rng = np.random.default_rng(0)
    shapes = [((HIDDEN, HEADS, HEAD_DIM), (HEADS, HEAD_DIM))] * 3
    x = rng.normal(size=(TOKENS, BATCH, HIDDEN)).astype(np.float32)
    weights = [tuple((0.1 * rng.normal(size=shape)).astype(np.float32) for shape in pair) for pair in shapes]
    expected = exact(x, weights, 0.25)
    for forms in (("activations", "activations"), ("keys_values", "activations")):
        assert error(attention(x, weights, forms, 0.25), expected) < 1e-6
    expected = exact(x, weights, 0.25, rotated)
    assert error(attention(x, weights, ("activations", "keys_values"), 0.25, Rotary().rotate), expected) < 2e-6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", [toy.OPT, toy.LLAMA], ids=lambda config: config.name)
def test_logits_of_a_model(config, seed):
    """Through a whole model, prefill and steps: the same comparison for its logits."""
    narrow = toy.randomised(config.build(dtype="bfloat16", rngs=None), seed)
    given = toy.texts(5, 17, longest_padding=7, seed=seed)
    expected = toy.plain_logits(toy.widened(narrow), given)[:, 13:]
    errors = {}
    for name in ("keys_values", "activations"):
        plan = kvrecomp.named_plan(name, narrow.shape, kvrecomp.Workload(5, 14, 3))
        errors[name] = error(toy.decoded_logits(kvrecomp.Decoder(narrow, plan), given)[:, 1:], expected[:, 1:])
    assert errors["keys_values"] > 1e-3
    assert errors["activations"] <= ALLOWED * errors["keys_values"]
