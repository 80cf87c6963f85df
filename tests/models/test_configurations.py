"""Llama and its relatives: rotation by hand, and configurations of Hugging Face, old and new.

That their logits are those of transformers is in `test_reference.py`.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import models
from models.llama import PRESETS, LlamaConfig
from models.rotary import Rotary

TINY = LlamaConfig("tiny", layers=2, hidden=30, heads=3, intermediate=53, vocab=97, positions=41)

# --- rotation ---------------------------------------------------------------------------------------------------------


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


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 31}, "31 does not divide into 3 heads"),
        ({"hidden": 31, "head_dim": 7}, "head_dim is 7; expected an even number"),
        ({"kv_heads": 2}, "3 heads do not divide into 2 key-value heads"),
        ({"kv_heads": -1}, "kv_heads is -1"),
        ({"layers": 2.0}, "layers is 2.0; expected a positive integer"),
        ({"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=f"Llama: .*{message}"):
        dataclasses.replace(TINY, **{"kv_heads": 0, "head_dim": 0} | change)


def test_create():
    config = dataclasses.replace(TINY, head_norms=True, qkv_bias=True)
    model = models.create(config, dtype="float32", seed=3)
    logits = model(toy.put(toy.texts(2, 5).ids))
    assert logits.shape == (2, 5, 97) and np.isfinite(toy.get(logits)).all()
    state = models.checkpoint.parameters_of(model)
    assert (toy.get(state["layers.1.attention.key_norm.scale"]) == 1).all()
    assert (toy.get(state["layers.1.attention.key.bias"]) == 0).all()
    assert 0.01 < toy.get(state["head.embedding"]).std() < 0.03


# --- configurations of Hugging Face -----------------------------------------------------------------------------------

# What published files say, as written before transformers 5, without what says nothing about sizes.


def file(model_type, vocab, hidden, layers, heads, kv_heads, intermediate, positions, epsilon, **fields):
    return {
        "model_type": model_type,
        "hidden_act": "silu",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
        "rms_norm_eps": epsilon,
        "tie_word_embeddings": False,
    } | fields


SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
FILES = {
    "llama-2-7b": file("llama", 32000, 4096, 32, 32, 32, 11008, 4096, 1e-5, pretraining_tp=1, rope_scaling=None),
    "llama-3.1-8b": file(
        *("llama", 128256, 4096, 32, 32, 8, 14336, 131072, 1e-5),
        attention_bias=False,
        mlp_bias=False,
        rope_theta=500000.0,
        rope_scaling=SCALING,
    ),
    "mistral-7b": file(
        *("mistral", 32000, 4096, 32, 32, 8, 14336, 32768, 1e-5), rope_theta=10000.0, sliding_window=4096
    ),
    "qwen2.5-0.5b": file(
        *("qwen2", 151936, 896, 24, 14, 2, 4864, 32768, 1e-6),
        rope_theta=1000000.0,
        max_window_layers=24,
        sliding_window=32768,
        use_sliding_window=False,
        tie_word_embeddings=True,
        use_mrope=False,
    ),
    "qwen3-8b": file(
        *("qwen3", 151936, 4096, 36, 32, 8, 12288, 40960, 1e-6),
        head_dim=128,
        attention_bias=False,
        rope_theta=1000000,
        rope_scaling=None,
        max_window_layers=36,
        sliding_window=None,
        use_sliding_window=False,
    ),
    "phi-3-mini": file(
        *("phi3", 32064, 3072, 32, 32, 32, 8192, 4096, 1e-5),
        attention_bias=False,
        original_max_position_embeddings=4096,
        rope_theta=10000.0,
        rope_scaling=None,
        sliding_window=2047,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_published_files_read_as_presets(name):
    assert LlamaConfig.from_huggingface(FILES[name], name) == PRESETS[name]


@pytest.mark.parametrize("name", FILES)
def test_files_of_transformers_5_read_alike(name, tmp_path):
    """It writes `rope_parameters` for `rope_scaling` and `rope_theta`, and `layer_types` for `max_window_layers`."""
    transformers = pytest.importorskip("transformers", reason="writes the file")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("writes older files")
    given = json.loads(json.dumps(FILES[name]))
    transformers.AutoConfig.for_model(**given).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_scaling" not in written
    assert LlamaConfig.from_huggingface(written, name) == PRESETS[name]


QWEN = FILES["qwen2.5-0.5b"] | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7}


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"max_window_layers": 1}, [None, 7, 7]),
        ({"max_window_layers": 3}, [None, None, None]),
        ({"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, [7, None, 7]),
        ({"max_window_layers": 0, "use_sliding_window": False}, [None, None, None]),
        ({"max_window_layers": 0, "sliding_window": None}, [None, None, None]),
    ],
)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_layers_that_slide(model_type, change, windows):
    config = LlamaConfig.from_huggingface(QWEN | {"model_type": model_type} | change)
    assert [config.window(layer) for layer in range(3)] == windows


@pytest.mark.parametrize(
    ("given", "window"), [({"sliding_window": None}, None), ({}, 4096), ({"sliding_window": 5}, 5)]
)
def test_mistral_slides_in_all_layers_or_none(given, window):
    file = {field: value for field, value in FILES["mistral-7b"].items() if field != "sliding_window"}
    config = LlamaConfig.from_huggingface(file | given)
    assert [config.window(layer) for layer in (0, 31)] == [window, window]


LLAMA_3 = FILES["llama-3.1-8b"]
LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (LLAMA_3, {"hidden_size": ...}, "llama: hidden_size missing"),
        (LLAMA_3, {"rms_norm_eps": ...}, "rms_norm_eps missing"),
        (LLAMA_3, {"hidden_size": "4096"}, "hidden is '4096'"),
        (LLAMA_3, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu is supported"),
        (LLAMA_3, {"attention_bias": True}, "attention_bias is True"),
        (LLAMA_3, {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA_3, {"quantization_config": {"bits": 4}}, "quantization_config is present"),
        (
            LLAMA_3,
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "'dynamic'; supported are default, linear",
        ),
        (LLAMA_3, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope scaling is 'yarn'"),
        (LLAMA_3, {"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' has no factor"),
        (LLAMA_3, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "has no low_freq_factor, high_freq_factor"),
        (LLAMA_3, {"rope_scaling": None, "rope_parameters": {"full_attention": {}}}, "rope scaling has full_attention"),
        (LLAMA_3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (FILES["phi-3-mini"], {"rope_scaling": LONG}, "phi3: rope scaling is 'longrope'; supported are default"),
        (FILES["phi-3-mini"], {"rope_scaling": None, "rope_parameters": LONG}, "rope scaling is 'longrope'"),
        (QWEN, {"layer_types": ["chunked_attention"] * 3}, "qwen2: layer_types has chunked_attention; expected full"),
    ],
)
def test_unsupported_configurations_are_named(file, change, message):
    config = {field: value for field, value in (file | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message) as raised:
        LlamaConfig.from_huggingface(config)
    assert "\n" not in str(raised.value)
