"""Gemma: configurations of Hugging Face, and what it rounds. Its logits are in `test_reference.py`."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import models
from models.gemma import PRESETS, GemmaConfig

TINY = GemmaConfig("tiny", 2, 26, 3, 1, 53, head_dim=14, vocab=97, positions=41)
FILE = {
    "model_type": "gemma",
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}


def test_published_files_read_as_presets(tmp_path):
    assert GemmaConfig.from_huggingface(FILE, "gemma-7b") == PRESETS["gemma-7b"]
    transformers = pytest.importorskip("transformers", reason="writes the file as of now")
    transformers.AutoConfig.for_model(**FILE).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert GemmaConfig.from_huggingface(written, "gemma-7b") == PRESETS["gemma-7b"]


def test_embeddings_and_norms_round_as_in_transformers():
    """In bfloat16, exactly: the embeddings' factor is rounded to it, a norm's 1 + weight is not."""
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers' Gemma")
    sizes = {"vocab_size": 97, "hidden_size": 26, "num_hidden_layers": 1, "intermediate_size": 53, "head_dim": 14}
    config = transformers.GemmaConfig(**sizes, num_attention_heads=3, num_key_value_heads=1)
    theirs = transformers.GemmaForCausalLM(config).to(torch.bfloat16).model
    ours = models.create(dataclasses.replace(TINY, layers=1))
    assert (toy.get(ours.final_norm.offset[...]) == 0).all()

    def numbers(tensor):
        return tensor.detach().float().numpy().astype(jnp.bfloat16)

    with torch.no_grad():
        torch.nn.init.normal_(theirs.norm.weight, std=0.2)
    ours.tokens.embedding.set_value(toy.put(numbers(theirs.embed_tokens.weight)))
    ours.final_norm.offset.set_value(toy.put(numbers(theirs.norm.weight)))
    ids = np.arange(97, dtype=np.int32)
    with jax.transfer_guard("allow"):  # operation by operation: within a program XLA may leave out a rounding
        hidden = ours.embed(toy.put(ids), toy.put(ids))
        normed = ours.final_norm(hidden)
    expected = theirs.embed_tokens(torch.tensor(ids))
    np.testing.assert_array_equal(toy.get(hidden), numbers(expected))
    normed, expected = toy.get(normed).astype(np.float32), numbers(theirs.norm(expected)).astype(np.float32)
    # A mean is summed in another order, which may round a number to its neighbour now and then.
    assert (normed == expected).mean() > 0.99
    np.testing.assert_allclose(normed, expected, rtol=2**-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": ...}, "gemma: head_dim missing"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'; only gelu_pytorch_tanh or gelu is supported"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"rope_scaling": {"type": "yarn"}}, "gemma: rope scaling is 'yarn'; supported are default, linear, llama3"),
        ({"head_dim": 7}, "head_dim is 7; expected an even number"),
        ({"num_key_value_heads": 5}, "16 heads do not divide into 5"),
    ],
)
def test_unsupported_configurations_are_named(change, message):
    config = {field: value for field, value in (FILE | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        GemmaConfig.from_huggingface(config)
