"""Rotary positions, by hand and against transformers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from models.llama import PRESETS
from models.rotary import Rotary


def rotate(rotary, heads, positions):
    """As numpy, heads [..., n, d] at positions int [...]."""
    return toy.get(jax.jit(rotary.rotate)(toy.put(heads), toy.put(np.asarray(positions, np.int32))))


def test_rotation_by_hand():
    """One position turns the first plane (numbers 0 and 2) by one radian and the second by 1/sqrt(theta)."""
    heads = np.array([[1, 2, 0, 0]], np.float32)
    at = {p: rotate(Rotary(theta=100.0), heads, p)[0] for p in (0, 1, 3)}
    np.testing.assert_allclose(at[0], [1, 2, 0, 0])
    np.testing.assert_allclose(at[1], [math.cos(1), 2 * math.cos(0.1), math.sin(1), 2 * math.sin(0.1)], rtol=1e-6)
    np.testing.assert_allclose(at[3], [math.cos(3), 2 * math.cos(0.3), math.sin(3), 2 * math.sin(0.3)], rtol=1e-6)


def test_products_depend_on_the_distance_only():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 1, 10)).astype(np.float32)
    pairs = [(5, 2), (103, 100), (3, 0)]
    products = [np.sum(rotate(Rotary(), query, [p]) * rotate(Rotary(), key, [r])) for p, r in pairs]
    np.testing.assert_allclose(products, products[0], rtol=1e-4)
    assert abs(np.sum(rotate(Rotary(), query, [6]) * rotate(Rotary(), key, [2])) - products[0]) > 0.01


def test_linear_scaling_is_a_slower_clock():
    heads = np.random.default_rng(0).normal(size=(7, 3, 10)).astype(np.float32)
    positions = np.arange(7)
    slow = rotate(Rotary(theta=50.0, scaling="linear", factor=4.0), heads, 4 * positions)
    np.testing.assert_allclose(slow, rotate(Rotary(theta=50.0), heads, positions), atol=1e-5)


def test_llama3_scaling_by_hand():
    """Planes that turn 16, 2 and 1/4 times within the original positions: left, between, slowed down."""
    original = 16 * 2 * math.pi  # the first plane turns by one radian a position, the others by 1/8 and 1/64
    rotary = Rotary(512.0, "llama3", factor=8.0, low_turns=1.0, high_turns=4.0, original_positions=original)
    kept = (2 - 1) / (4 - 1)
    np.testing.assert_allclose(Rotary(512.0).frequencies(6), [1, 1 / 8, 1 / 64], rtol=1e-6)
    np.testing.assert_allclose(rotary.frequencies(6), [1, (kept + (1 - kept) / 8) / 8, 1 / 64 / 8], rtol=1e-6)


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.1-8b", "qwen3-8b", "phi-3-mini"])
def test_frequencies_equal_transformers(name):
    """To the last place or two: at the last position more would be a hundredth of a radian."""
    pytest.importorskip("torch", reason="the reference needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config, rotary = PRESETS[name], PRESETS[name].rotary
    theirs = {"rope_theta": rotary.theta, "rope_type": rotary.scaling}
    if rotary.scaling == "llama3":
        theirs |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        theirs |= {"original_max_position_embeddings": 8192}
    expected = LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            head_dim=config.head_dim, max_position_embeddings=config.positions, rope_parameters=theirs
        )
    )
    frequencies = rotary.frequencies(config.head_dim)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, expected.inv_freq.numpy(), rtol=3e-7, atol=0)


def test_angles_are_float32_whatever_the_heads_are():
    """In bfloat16 position 30,001 would be 30,080; the result is rounded once."""
    heads = np.random.default_rng(0).normal(size=(1, 3, 8)).astype(jnp.bfloat16)
    narrow = rotate(Rotary(), heads, [30_001])
    wide = rotate(Rotary(), heads.astype(np.float32), [30_001])
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(np.float32), wide, rtol=2**-8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling": "yarn"}, "rope scaling is 'yarn'; supported are default, linear, llama3"),
        ({"theta": 0}, "theta is 0; expected a positive number"),
        ({"factor": "8"}, "factor is '8'"),
        ({"low_turns": 4.0}, "low_turns is 4.0 and high_turns 4.0"),
    ],
)
def test_rotations_that_are_none(fields, message):
    with pytest.raises(ValueError, match=message):
        Rotary(**fields)
