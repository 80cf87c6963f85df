"""Logits and greedy continuations equal those of transformers, through a directory that it wrote."""

import numpy as np
import pytest
import toy

import kvrecomp
import models

torch = pytest.importorskip("torch", reason="the reference needs torch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers' OPT")

VARIANTS = {
    "ordinary": {"word_embed_proj_dim": 35},
    "350m": {"word_embed_proj_dim": 17, "do_layer_norm_before": False},
}
PROMPT, NEW, TAIL = 7, 17, 4


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Transformers' models by variant, random in every parameter, and the directories they were written to."""
    saved = {}
    for variant, sizes in VARIANTS.items():
        torch.manual_seed(1)  # with which greedy texts are varied
        config = transformers.OPTConfig(
            vocab_size=97,
            hidden_size=35,
            num_hidden_layers=2,
            num_attention_heads=5,
            ffn_dim=53,
            max_position_embeddings=41,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
            **sizes,
        )
        reference = transformers.OPTForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
        path = tmp_path_factory.mktemp(variant)
        reference.save_pretrained(path)
        saved[variant] = reference, path
    return saved


@pytest.mark.parametrize("name", ["activations", "keys_values", "split:0.5"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_continuations_and_logits(directories, variant, name):
    reference, path = directories[variant]
    given = toy.texts(3, PROMPT, longest_padding=PROMPT - 1, seed=7)
    expected = reference.generate(
        torch.tensor(given.ids),
        attention_mask=torch.tensor(given.mask),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(expected.logits).numpy()
    assert logits.shape == (NEW, 3, 97) and np.abs(logits).max() > 1
    new = expected.sequences.numpy()[:, PROMPT:]
    assert len(np.unique(new)) > 2  # or equal continuations say little
    model = models.load(path)
    plan = kvrecomp.named_plan(name, model.shape, kvrecomp.Workload(3, PROMPT, NEW), tail=TAIL)
    assert plan.write_outs == 4
    ours = kvrecomp.generate(model, given.ids, given.mask, max_new_tokens=NEW, plan=plan, output_logits=True)
    np.testing.assert_array_equal(ours.sequences, expected.sequences.numpy())
    np.testing.assert_allclose(ours.logits, logits, atol=1e-4, rtol=1e-4)
    assert ours.new_tokens.tolist() == [NEW] * 3


def test_stops_where_transformers_does(directories):
    """The end token of one row comes early: that row is padded, the others go on."""
    reference, path = directories["ordinary"]
    given = toy.texts(3, PROMPT, longest_padding=PROMPT - 1, seed=7)
    inputs = {"input_ids": torch.tensor(given.ids), "attention_mask": torch.tensor(given.mask)}
    free = reference.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    end = int(free[0, PROMPT + 2])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": end, "pad_token_id": 1}
    expected = reference.generate(**inputs, **options).numpy()
    ours = kvrecomp.generate(models.load(path), given.ids, given.mask, plan="activations", **options)
    np.testing.assert_array_equal(ours.sequences, expected)
    assert ours.new_tokens[0] <= 3 and ours.new_tokens.max() == NEW
