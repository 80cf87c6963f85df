"""OPT against transformers' own, and against the published sizes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from kvrecomp.run.attention import causal
from models.opt import PRESETS, OPTConfig

# Prime and distinct sizes where the architecture allows, so that a swapped axis fails.
PRE_NORM = {
    "vocab_size": 97,
    "hidden_size": 35,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "ffn_dim": 53,
    "max_position_embeddings": 41,
    "word_embed_proj_dim": 35,
}
VARIANTS = {
    "pre-norm": PRE_NORM,
    "350m": PRE_NORM | {"word_embed_proj_dim": 17, "do_layer_norm_before": False},
    "no final norm": PRE_NORM | {"_remove_final_layer_norm": True},
    "gelu": PRE_NORM | {"activation_function": "gelu"},
}
TINY = OPTConfig("tiny", layers=2, hidden=35, heads=5, intermediate=53, vocab=97, positions=41)


def reference(config, seed=0):
    """A torch OPT whose norms and biases are random too, so that leaving one out is seen."""
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers' OPT")
    torch.manual_seed(seed)
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(**config, pad_token_id=1, bos_token_id=2, eos_token_id=2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def ragged(batch=7, tokens=13, seed=0):
    rng = np.random.default_rng(seed)
    padding = rng.integers(0, tokens - 1, batch)
    padding[0] = 0
    return rng.integers(3, 97, (batch, tokens), dtype=np.int32), (np.arange(tokens) >= padding[:, None]).astype(
        np.int32
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, tmp_path):
    theirs = reference(VARIANTS[variant])
    import torch

    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    ids, mask = ragged()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
        unmasked = theirs(torch.tensor(ids)).logits.numpy()
    logits = ours(jax.device_put(ids), jax.device_put(mask))
    assert logits.dtype == jnp.float32
    assert np.abs(expected).max() > 1  # or the comparison says little
    np.testing.assert_allclose(np.asarray(logits)[mask == 1], expected[mask == 1], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(ours(jax.device_put(ids)), unmasked, atol=1e-4, rtol=1e-4)
    assert ours.shape.dtype == "float32"


def test_greedy_continuation_equals_transformers(tmp_path):
    theirs = reference(PRE_NORM, seed=3)
    import torch

    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    ids, mask = ragged(batch=3, tokens=7, seed=3)
    expected = theirs.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=11, do_sample=False, eos_token_id=None
    )
    # As much padding as there will be new tokens, so that one compiled length serves every step.
    ids, mask = (np.pad(array, [(0, 0), (11, 0)]) for array in (ids, mask))
    for _ in range(11):
        token = np.asarray(ours(jax.device_put(ids), jax.device_put(mask)))[:, -1].argmax(axis=-1).astype(np.int32)
        ids = np.concatenate([ids[:, 1:], token[:, None]], axis=1)
        mask = np.concatenate([mask[:, 1:], np.ones_like(mask[:, :1])], axis=1)
    np.testing.assert_array_equal(ids, expected.numpy())


# Parameters of the published checkpoints, norms and biases included, as Hugging Face counts them.
PUBLISHED = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name):
    config = PRESETS[name]
    model = config.build(dtype="bfloat16", rngs=None)
    count = sum(variable.size for _, variable in nnx.to_flat_state(nnx.state(model)))
    assert count == PUBLISHED[name]
    assert 0.97 * count < config.shape.parameters <= count  # the planner's count leaves out positions, norms and biases
    assert config.shape.dtype == "bfloat16" and config.shape.positions == 2048 and config.shape.vocab == 50272


def test_presets_equal_transformers_count():
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers' OPT")
    config = PRESETS["opt-350m"]
    with torch.device("meta"):
        theirs = transformers.OPTForCausalLM(
            transformers.OPTConfig(
                hidden_size=config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                ffn_dim=config.intermediate,
                word_embed_proj_dim=config.embedding,
                do_layer_norm_before=False,
            )
        )
    assert theirs.num_parameters() == PUBLISHED["opt-350m"]


def test_no_copy_that_nobody_asked_for():
    model = models.create(TINY, dtype="float32")
    ids, mask = (jax.device_put(array) for array in ragged())
    with jax.transfer_guard("disallow"):
        logits = model(ids, mask)
    assert logits.shape == (7, 13, 97) and logits.dtype == jnp.float32


def test_split_merge_and_jit_give_the_same_logits():
    model = models.create(dataclasses.replace(TINY, layers=1), dtype="float32")
    ids, mask = (jax.device_put(array) for array in ragged())
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, ids, mask: nnx.merge(graph, state)(ids, mask))
    np.testing.assert_allclose(forward(state, ids, mask), model(ids, mask), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda state: nnx.merge(graph, state)(ids, mask).sum()))(state)
    norms = [np.linalg.norm(leaf) for leaf in jax.tree.leaves(gradient)]
    assert np.isfinite(norms).all() and max(norms) > 0


def test_what_the_library_asks_of_a_model():
    """embed, layers and unembed work on [batch, hidden] as on [tokens, batch, hidden], and make up the forward pass."""
    model = models.create(OPTConfig("narrow", 2, 35, 5, 53, 97, 41, embedding=17), dtype="float32")
    assert model.shape.layers[0].head_dim == 7 and model.shape.embedding == 17 and model.shape.dtype == "float32"
    graph, state = nnx.split(model)

    @jax.jit
    def step(state, token_ids):
        model, padding = nnx.merge(graph, state), jnp.zeros(7, jnp.int32)
        hidden = model.embed(token_ids, padding)
        for layer in model.layers:
            # A first token attends to itself only.
            hidden = layer(hidden, lambda x, projections: causal(padding)(x[None], projections)[0])
        return hidden, model.unembed(hidden)

    ids = ragged()[0][:, :1]
    hidden, logits = step(state, jax.device_put(ids[:, 0]))
    assert hidden.shape == (7, 35) and logits.shape == (7, 97) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.asarray(model(jax.device_put(ids)))[:, 0], atol=1e-5)


def test_ids_beyond_the_tables_are_seen():
    model = models.create(TINY, dtype="float32")
    for beyond in (97, -1):
        assert np.isnan(model(jax.device_put(np.full((1, 2), beyond, np.int32)))).any()


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.zeros((2, 42), np.int32), None, "42 tokens; tiny has 41 positions"),
        (np.zeros(5, np.int32), None, r"expected integers \[batch, tokens\]"),
        (np.zeros((2, 5)), None, "expected integers"),
        (np.zeros((2, 5), np.int32), np.ones((2, 4)), r"shape \[2, 4\]"),
        (np.zeros((2, 3), np.int32), np.array([[0, 1, 1], [1, 1, 0]]), "row 1 .* left"),
    ],
)
def test_bad_input_is_one_clear_line(ids, mask, message):
    with pytest.raises(ValueError, match=message) as raised:
        models.create(TINY, dtype="float32")(ids, mask)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size missing"),
        ({"ffn_dim": "53"}, "intermediate is '53'"),
        ({"num_attention_heads": 4}, "35 does not divide into 4 heads"),
        ({"activation_function": "silu"}, "activation is 'silu'; expected relu or gelu"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
        ({"enable_bias": False}, "enable_bias is False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is present"),
    ],
)
def test_unsupported_configurations_are_named(change, message):
    config = {field: value for field, value in (PRE_NORM | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        OPTConfig.from_huggingface(json.loads(json.dumps(config)))
