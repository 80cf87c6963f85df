"""Logits and greedy continuations equal those of transformers, through a directory that it wrote."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import kvrecomp
import models

torch = pytest.importorskip("torch", reason="the reference needs torch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")
torch.set_num_threads(1)  # its threads wait for one another busily, which takes longer than tiny models need

# Prime and distinct sizes where the architecture allows, so that a swapped axis fails. An epsilon that is seen.
OPT = {"hidden_size": 35, "num_attention_heads": 5, "ffn_dim": 53}
LLAMA = {"hidden_size": 30, "num_attention_heads": 3, "intermediate_size": 53, "rms_norm_eps": 1e-3}
GROUPED = LLAMA | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = {"rope_type": "linear", "rope_theta": 10.0, "factor": 3.0}
LLAMA_3 = {  # planes of a head of 10 that are left as they are, slowed down and in between
    "rope_type": "llama3",
    "rope_theta": 10.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 30,
}
FOUR_TO_ONE = GROUPED | {"hidden_size": 40, "num_attention_heads": 8, "head_dim": 10}
MULTI_QUERY = LLAMA | {"num_attention_heads": 5, "num_key_value_heads": 1, "tie_word_embeddings": True}
VARIANTS = {
    "opt": ("OPT", OPT | {"word_embed_proj_dim": 35}),
    "opt-350m": ("OPT", OPT | {"word_embed_proj_dim": 17, "do_layer_norm_before": False}),
    "opt, no final norm": ("OPT", OPT | {"word_embed_proj_dim": 35, "_remove_final_layer_norm": True}),
    "opt, gelu": ("OPT", OPT | {"word_embed_proj_dim": 35, "activation_function": "gelu"}),
    "multi-head": ("Llama", LLAMA),
    "grouped 4:1, llama3 scaling": ("Llama", FOUR_TO_ONE | {"rope_parameters": LLAMA_3}),
    "multi-query, linear scaling": ("Llama", MULTI_QUERY | {"rope_parameters": LINEAR}),
    "llama with biases": ("Llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", GROUPED | {"head_dim": 10, "sliding_window": 5}),
    "qwen2": ("Qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 14, "tie_word_embeddings": True}),
    "qwen3 with biases": ("Qwen3", GROUPED | {"head_dim": 14, "attention_bias": True}),
    "phi3": ("Phi3", GROUPED | {"num_attention_heads": 8, "sliding_window": 6}),
    "gemma": ("Gemma", LLAMA | {"num_key_value_heads": 1, "head_dim": 14}),
    "gemma with biases": ("Gemma", LLAMA | {"num_key_value_heads": 1, "head_dim": 14, "attention_bias": True}),
}
ALIKE = ("opt, no final norm", "opt, gelu", "qwen3 with biases", "gemma with biases")  # whose attention others have
DECODED = [variant for variant in VARIANTS if variant not in ALIKE]
# Both forms for each, K and V recomputed for those whose K and V are made in another way, each memory too for OPT.
RECOMPUTED = ("opt", "opt-350m", "multi-head", "llama with biases", "grouped 4:1, llama3 scaling", "qwen3", "gemma")
MORE_PLANS = ("activations", "keys_values", "device:0.5")
PROMPT, NEW, TAIL, VOCAB = 7, 14, 5, 97


class Reference:
    """A model of transformers, random in every parameter, and the same read by us from where it was written."""

    def __init__(self, variant, layers, path):
        torch.manual_seed(1)  # with which greedy texts are varied
        family, sizes = VARIANTS[variant]
        tokens = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
        config = getattr(transformers, f"{family}Config")(
            vocab_size=VOCAB, num_hidden_layers=layers, max_position_embeddings=41, **tokens, **sizes
        )
        self.theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in self.theirs.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
        self.theirs.save_pretrained(path)
        self.ours = models.load(path)
        self.prompts = toy.texts(3, PROMPT, longest_padding=PROMPT - 1, seed=7)

    def generate(self, **options):
        """What transformers makes of the prompts, greedily."""
        return self.theirs.generate(
            torch.tensor(self.prompts.ids),
            attention_mask=torch.tensor(self.prompts.mask),
            max_new_tokens=NEW,
            do_sample=False,
            **options,
        )

    @functools.cached_property
    def continued(self):
        """The prompts continued int[batch, PROMPT + NEW], and the logits [batch, NEW, VOCAB] they were chosen by."""
        result = self.generate(eos_token_id=None, output_logits=True, return_dict_in_generate=True)
        sequences, logits = result.sequences.numpy(), torch.stack(result.logits, dim=1).numpy()
        assert logits.shape == (3, NEW, VOCAB) and np.abs(logits).max() > 1
        assert len(np.unique(sequences[:, PROMPT:])) > 2  # or equal continuations say little
        return sequences.astype(np.int32), logits


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A function of a variant and a number of layers that gives the `Reference`, the same each time."""
    return functools.cache(lambda variant, layers=1: Reference(variant, layers, tmp_path_factory.mktemp("reference")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward(reference, variant):
    both, given = reference(variant, layers=3), toy.texts(7, 13, longest_padding=12)
    with torch.no_grad():
        expected = both.theirs(torch.tensor(given.ids), attention_mask=torch.tensor(given.mask)).logits.numpy()
    logits = toy.get(both.ours(toy.put(given.ids), toy.put(given.mask)))
    assert np.abs(expected).max() > 1  # or the comparison says little
    np.testing.assert_allclose(logits[given.mask == 1], expected[given.mask == 1], atol=1e-4, rtol=1e-4)


def test_forward_without_a_mask(reference):
    both, ids = reference("opt", layers=3), toy.texts(7, 13).ids
    with torch.no_grad():
        expected = both.theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(toy.get(both.ours(toy.put(ids))), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        *itertools.product(DECODED, ["split:0.5"]),
        *itertools.product(RECOMPUTED, ["recompute"]),
        *itertools.product(["opt"], MORE_PLANS),
    ],
)
def test_decoding(reference, variant, name):
    """Logits of prefill and of each step, across write-outs, given the tokens that transformers chose."""
    both = reference(variant)
    sequences, expected = both.continued
    plan = kvrecomp.named_plan(name, both.ours.shape, kvrecomp.Workload(3, PROMPT, NEW), tail=TAIL)
    assert plan.write_outs == 2
    given = toy.Texts(sequences[:, :-1], both.prompts.padding)
    logits = toy.decoded_logits(kvrecomp.Decoder(both.ours, plan), given)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(logits.argmax(axis=-1), sequences[:, PROMPT:])


@pytest.mark.parametrize("variant", ["opt", "mistral"])
def test_greedy_continuations(reference, variant):
    both = reference(variant, layers=2)
    sequences, logits = both.continued
    plan = kvrecomp.named_plan("split:0.5", both.ours.shape, kvrecomp.Workload(3, PROMPT, NEW), tail=TAIL)
    given, mask = both.prompts.ids, both.prompts.mask
    result = kvrecomp.generate(both.ours, given, mask, max_new_tokens=NEW, plan=plan, output_logits=True)
    np.testing.assert_array_equal(result.sequences, sequences)
    np.testing.assert_allclose(np.moveaxis(result.logits, 0, 1), logits, atol=1e-4, rtol=1e-4)
    assert result.new_tokens.tolist() == [NEW] * 3


def test_stops_where_transformers_does(reference):
    """The end token of one row comes early: that row is padded, the others go on."""
    both = reference("opt", layers=2)
    end = int(both.continued[0][0, PROMPT + 2])
    expected = both.generate(eos_token_id=end, pad_token_id=1).numpy()
    options = {"max_new_tokens": NEW, "eos_token_id": end, "pad_token_id": 1, "plan": "activations"}
    ours = kvrecomp.generate(both.ours, both.prompts.ids, both.prompts.mask, do_sample=False, **options)
    np.testing.assert_array_equal(ours.sequences, expected)
    assert ours.new_tokens[0] <= 3 and ours.new_tokens.max() == NEW


def test_gemmas_embeddings_and_norms_round_alike():
    """In bfloat16, exactly: the embeddings' factor is rounded to it, a norm's 1 + weight is not."""
    sizes = {"vocab_size": 97, "hidden_size": 26, "num_hidden_layers": 1, "intermediate_size": 53, "head_dim": 14}
    config = transformers.GemmaConfig(**sizes, num_attention_heads=3, num_key_value_heads=1)
    theirs = transformers.GemmaForCausalLM(config).to(torch.bfloat16).model
    ours = models.create(models.GemmaConfig("tiny", 1, 26, 3, 1, 53, head_dim=14, vocab=97, positions=41))
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


# --- drafts -----------------------------------------------------------------------------------------------------------

LLAMA_2_TO_1 = "llama with biases"


@pytest.fixture(scope="module", params=["opt", LLAMA_2_TO_1])
def undrafted(request, reference):
    """A model, and what transformers makes of the prompts without drafts."""
    both = reference(request.param, layers=2)
    return both, both.continued[0]


@pytest.mark.parametrize("name", ["split:0.5", "device:0.5"])
def test_text_with_prompt_lookup(undrafted, name):
    both, sequences = undrafted
    options = {"max_new_tokens": NEW, "plan": name, "prompt_lookup_num_tokens": 4}
    found = kvrecomp.generate(both.ours, both.prompts.ids, both.prompts.mask, **options)
    np.testing.assert_array_equal(found.sequences, sequences)
    assert (found.drafted > 0).any()


@pytest.mark.parametrize("itself", [True, False], ids=["by itself", "by another"])
def test_text_with_an_assistant(undrafted, reference, itself):
    """Of the same vocabulary; all of the model's own drafts are right."""
    both, sequences = undrafted
    assistant = both.ours if itself else reference("opt-350m", layers=2).ours
    options = {"max_new_tokens": NEW, "plan": "activations", "assistant_model": assistant, "num_assistant_tokens": 3}
    found = kvrecomp.generate(both.ours, both.prompts.ids, both.prompts.mask, **options)
    np.testing.assert_array_equal(found.sequences, sequences)
    assert (found.acceptance == 1).all() == itself and (found.drafted > 0).all()


@pytest.mark.parametrize("codec", ["fp8", "int4"])
def test_text_with_a_sketch(undrafted, codec):
    """Across write-outs, and where transformers stops."""
    both, sequences = undrafted
    end = int(sequences[0, PROMPT + 2])
    plan = kvrecomp.named_plan("split:0.5", both.ours.shape, kvrecomp.Workload(3, PROMPT, NEW), tail=TAIL)
    plan = dataclasses.replace(plan, drafting=kvrecomp.Drafting("sketch", 3, codec=codec))
    options = {"max_new_tokens": NEW, "plan": plan, "eos_token_id": end, "pad_token_id": 1}
    found = kvrecomp.generate(both.ours, both.prompts.ids, both.prompts.mask, **options)
    np.testing.assert_array_equal(found.sequences, both.generate(eos_token_id=end, pad_token_id=1).numpy())
    assert (found.acceptance > 0.3).any()
