"""Configurations of Hugging Face, old and new, are read as presets or refused, and so are sizes that cannot be."""

import dataclasses
import json

import pytest

import models
from models.tables import MODEL_TYPES


def without_missing(config):
    """Without the fields that are `...`."""
    return {field: value for field, value in config.items() if value is not ...}


def file(model_type, vocab, hidden, layers, heads, kv_heads, intermediate, positions, epsilon, **fields):
    return without_missing(
        {
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
        }
        | fields
    )


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
    "gemma-7b": file(
        *("gemma", 256000, 3072, 28, 16, 16, 24576, 8192, 1e-6),
        head_dim=256,
        attention_bias=False,
        hidden_act="gelu",
        hidden_activation=None,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=...,
    ),
}


def read(file, name="read"):
    """The configuration of the file's family."""
    family, _ = MODEL_TYPES[file["model_type"]]
    return family.from_huggingface(file, name)


@pytest.mark.parametrize("name", FILES)
def test_published_files_read_as_presets(name):
    assert read(FILES[name], name) == models.PRESETS[name]


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
    assert read(written, name) == models.PRESETS[name]


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
    config = read(QWEN | {"model_type": model_type} | change)
    assert [config.window(layer) for layer in range(3)] == windows


@pytest.mark.parametrize(
    ("given", "window"), [({"sliding_window": None}, None), ({}, 4096), ({"sliding_window": 5}, 5)]
)
def test_mistral_slides_in_all_layers_or_none(given, window):
    file = {field: value for field, value in FILES["mistral-7b"].items() if field != "sliding_window"}
    config = read(file | given)
    assert [config.window(layer) for layer in (0, 31)] == [window, window]


# --- what is refused --------------------------------------------------------------------------------------------------

OPT = {
    "model_type": "opt",
    "vocab_size": 97,
    "hidden_size": 35,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "ffn_dim": 53,
    "max_position_embeddings": 41,
    "word_embed_proj_dim": 35,
}
LLAMA_3, PHI, GEMMA = FILES["llama-3.1-8b"], FILES["phi-3-mini"], FILES["gemma-7b"]
LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (OPT, {"hidden_size": ...}, "hidden_size missing"),
        (OPT, {"ffn_dim": "53"}, "ffn_dim is '53'; expected a positive integer"),
        (OPT, {"num_attention_heads": 4}, "35 does not divide into 4 heads"),
        (OPT, {"activation_function": "silu"}, "activation is 'silu'; expected relu or gelu"),
        (OPT, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
        (OPT, {"enable_bias": False}, "enable_bias is False"),
        (OPT, {"tie_word_embeddings": "x"}, "tie_word_embeddings is 'x'; expected true or false"),
        (OPT, {"do_layer_norm_before": 1}, "do_layer_norm_before is 1; expected true or false"),
        (OPT, {"word_embed_proj_dim": "35"}, "word_embed_proj_dim is '35'"),
        (OPT, {"activation_function": ["relu"]}, r"activation is \['relu'\]; expected text"),
        (OPT, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected a positive integer up to 1000"),
        (OPT, {"hidden_size": 10**30}, "hidden_size is 1000000.*; expected a positive integer up to 2147483647"),
        (OPT, {"quantization_config": {"bits": 4}}, "quantization_config is present; .* save them dequantized"),
        (LLAMA_3, {"hidden_size": ...}, "llama: hidden_size missing"),
        (LLAMA_3, {"rms_norm_eps": ...}, "rms_norm_eps missing"),
        (LLAMA_3, {"hidden_size": "4096"}, "hidden_size is '4096'"),
        (LLAMA_3, {"num_key_value_heads": 0}, "num_key_value_heads is 0; expected a positive integer"),
        (LLAMA_3, {"head_dim": []}, r"head_dim is \[\]"),
        (LLAMA_3, {"vocab_size": True}, "vocab_size is True"),
        (LLAMA_3, {"rms_norm_eps": 1e15}, "rms_norm_eps is 10+.0; expected a number between 0 and 1"),
        (LLAMA_3, {"tie_word_embeddings": "x"}, "tie_word_embeddings is 'x'; expected true or false"),
        (LLAMA_3, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu is supported"),
        (LLAMA_3, {"attention_bias": 1}, "attention_bias is 1; expected true or false"),
        (LLAMA_3, {"mlp_bias": "no"}, "mlp_bias is 'no'; expected true or false"),
        (LLAMA_3, {"quantization_config": {"bits": 4}}, "quantization_config is present"),
        (
            LLAMA_3,
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "'dynamic'; supported are default, lin",
        ),
        (LLAMA_3, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'; supported are default, linear, llama3$"),
        (LLAMA_3, {"rope_scaling": {"type": ["yarn"]}}, r"rope scaling is \['yarn'\]"),
        (LLAMA_3, {"rope_scaling": "yarn"}, "rope scaling is 'yarn'; expected an object"),
        (
            LLAMA_3,
            {"rope_scaling": None, "rope_theta": 10**400},
            "llama: rope_theta is 1000.*; expected a positive num",
        ),
        (LLAMA_3, {"rope_scaling": None, "rope_theta": 1e-300}, "rope_theta is 1e-300"),
        (
            LLAMA_3,
            {"rope_scaling": SCALING | {"low_freq_factor": None}},
            "low_freq_factor is None; expected a positive",
        ),
        (LLAMA_3, {"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' has no factor"),
        (LLAMA_3, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "has no low_freq_factor, high_freq_factor"),
        (LLAMA_3, {"rope_scaling": None, "rope_parameters": {"full_attention": {}}}, "rope scaling has full_attention"),
        (LLAMA_3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (PHI, {"rope_scaling": LONG}, "phi3: rope scaling is 'longrope'; supported are default"),
        (PHI, {"rope_scaling": None, "rope_parameters": LONG}, "rope scaling is 'longrope'"),
        (
            QWEN,
            {"layer_types": ["chunked_attention"] * 3},
            "qwen2: layer_types is .'chunked_attention', .* expected full",
        ),
        (QWEN, {"layer_types": []}, r"layer_types is \[\]; expected full_attention or .* for each of the 3 layers"),
        (QWEN, {"layer_types": [["full_attention"]] * 3}, "layer_types is "),
        (QWEN, {"use_sliding_window": "x"}, "use_sliding_window is 'x'"),
        (QWEN, {"max_window_layers": "1"}, "qwen2: max_window_layers is '1'; expected a positive integer"),
        (QWEN, {"max_window_layers": -1}, "max_window_layers is -1"),
        (QWEN, {"sliding_window": "7"}, "sliding_window is '7'"),
        (GEMMA, {"head_dim": ...}, "gemma: head_dim missing"),
        (GEMMA, {"hidden_act": "silu"}, "hidden_act is 'silu'; only gelu_pytorch_tanh or gelu is supported"),
        (GEMMA, {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        (GEMMA, {"tie_word_embeddings": []}, r"tie_word_embeddings is \[\]"),
        (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (GEMMA, {"rope_scaling": {"type": "yarn"}}, "gemma: rope scaling is 'yarn'; supported are default, linear"),
        (GEMMA, {"head_dim": 7}, "head_dim is 7; expected an even number"),
        (GEMMA, {"num_key_value_heads": 5}, "16 heads do not divide into 5"),
    ],
)
def test_unsupported_configurations_are_named(file, change, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(without_missing(file | change))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 31}, "31 does not divide into 3 heads"),
        ({"hidden": 31, "head_dim": 7}, "head_dim is 7; expected an even number"),
        ({"kv_heads": 2}, "3 heads do not divide into 2 key-value heads"),
        ({"kv_heads": -1}, "kv_heads is -1"),
        ({"layers": 2.0}, "layers is 2.0; expected a positive integer"),
        ({"layers": 10**9}, "layers is 1000000000; expected a positive integer up to 1000"),
        ({"epsilon": 1e15}, "epsilon is 10+.0; expected a number between 0 and 1"),
        ({"tied": "x"}, "tied is 'x'; expected true or false"),
        ({"name": 3}, "name is 3; expected text"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        (
            {"sliding_window": 5, "sliding_layers": (0, "x")},
            r"sliding_layers is \(0, 'x'\); expected numbers of layers",
        ),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    tiny = models.LlamaConfig("tiny", layers=2, hidden=30, heads=3, intermediate=53, vocab=97, positions=41)
    with pytest.raises(ValueError, match=f"Llama: .*{message}"):
        dataclasses.replace(tiny, **{"kv_heads": 0, "head_dim": 0} | change)
