"""Presets have the published sizes, and the planner sees them."""

import pytest
from flax import nnx

import models
from models.opt import PRESETS as OPT_PRESETS

# Parameters of the published checkpoints, norms and biases included, tied tables once, as Hugging Face counts them.
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
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "phi-3-mini": 3_821_079_552,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
}


@pytest.mark.parametrize("name", models.PRESETS)
def test_presets_have_the_published_sizes(name):
    config = models.preset(name)
    model = config.build(dtype="bfloat16", rngs=None)
    count = sum(variable.size for _, variable in nnx.to_flat_state(nnx.state(model)))
    assert count == PUBLISHED[name]
    # The planner's count leaves out norms and biases, and OPT's positions, which count in a small model.
    assert (0.97 if name in OPT_PRESETS else 0.999) * count < config.shape.parameters <= count


def test_what_the_planner_sees():
    shapes = {name: models.preset(name).shape for name in models.PRESETS}
    widths = {
        name: [shape.layers[0].width(form) for form in ("activations", "keys_values")] for name, shape in shapes.items()
    }
    assert widths["llama-2-7b"] == [4096, 8192] and widths["llama-3-8b"] == [4096, 2048]
    assert widths["gemma-7b"] == [3072, 8192]  # activations are three eighths
    for name, shape in shapes.items():
        assert shape.dtype == "bfloat16"
        assert {layer.absorbs_keys for layer in shape.layers} == {name in OPT_PRESETS}
        assert name not in OPT_PRESETS or (shape.positions, shape.vocab) == (2048, 50272)
    assert shapes["llama-3.1-8b"].positions == 131_072
    assert shapes["qwen2.5-0.5b"].tied and shapes["gemma-2b"].tied and not shapes["qwen3-8b"].tied


def test_published_sizes_are_counted_as_transformers_does():
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers' OPT")
    config = OPT_PRESETS["opt-350m"]
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
