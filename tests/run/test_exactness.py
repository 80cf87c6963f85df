"""Every plan gives the logits of the plain forward pass: for the prompt, and for each step across write-outs."""

import dataclasses

import numpy as np
import pytest
import toy
import toy_plans
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import kvrecomp
import models
from kvrecomp.plan import Plan, Workload, cutting

WRITE_OUTS = 2

# Shrinking would compile for hours; examples are small as they are.
few = settings(max_examples=3, phases=(Phase.explicit, Phase.generate))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("keys_values", "opt"), ("kvpr:0.6", "opt"), ("device:0.3", "opt")),
        *(("recompute", "350m"), ("split:0.4", "350m")),
        *(("activations", "grouped"), ("split:0.4", "grouped"), ("device", "grouped")),
    ],
)
def test_named_plans(name, kind):
    """Of the first grouped layer, which sees seven tokens, in the end two tails are seen, and the prompt is not."""
    prompt, tail = 11, 3
    new = WRITE_OUTS * tail + 2
    decoder = toy.named_decoder(name, kind, prompt=prompt, new=new, tail=tail, window=8000)
    assert decoder.plan.write_outs == WRITE_OUTS
    if kind == "grouped":
        blocks = decoder.plan.blocks(WRITE_OUTS)[0]
        assert decoder.plan.shape.layers[0].in_sight(blocks) == blocks[-WRITE_OUTS:]
    toy.assert_exact(decoder, toy.model(kind), toy.texts(3, prompt + new, longest_padding=prompt - 1))


@pytest.mark.parametrize("name", ["device", "keys_values"])
def test_keys_of_another_dtype_than_the_models(name):
    """As where K is rotated in float32 and the model is narrower; here it is the other way round."""

    def half(heads, positions):
        return toy.rotate(heads, positions).astype("float16")

    model = toy.randomised(toy.Grouped(), 1)
    attention = model.layers[0].attention
    attention.options = tuple((dict(attention.options) | {"encode_key": half}).items())
    plan = kvrecomp.named_plan(name, model.shape, Workload(3, 11, 7), tail=3)
    toy.assert_exact(kvrecomp.Decoder(model, plan), model, toy.texts(3, 18, longest_padding=10))


@pytest.mark.parametrize("kind", ["opt", "grouped"])
@few
@given(data=st.data())
def test_any_plan(kind, data):
    model = toy.model(kind)
    plan = data.draw(toy_plans.plans(model.shape, WRITE_OUTS))
    work = plan.workload
    padding = data.draw(st.lists(st.integers(0, work.prompt - 1), min_size=work.batch, max_size=work.batch))
    texts = toy.texts(work.batch, work.prompt + work.new, seed=data.draw(st.integers(0, 9)))
    texts = toy.Texts(texts.ids, np.array(padding, np.int32))
    assert plan.write_outs == WRITE_OUTS
    toy.assert_exact(kvrecomp.Decoder(model, plan), model, texts)


@pytest.mark.parametrize(("kind", "schedule"), [("opt", "pipelined"), ("grouped", "layerwise")])
def test_a_plan_of_everything(kind, schedule):
    """Both forms and memories within a layer, and a window as large as the largest block."""
    model, mixed = toy.model(kind), toy_plans.MIXED.layers
    if kind == "grouped":  # whose first layer sees seven tokens
        seen = [dataclasses.replace(block, tokens=tokens) for block, tokens in zip(mixed[0].prompt, (1, 2, 3))]
        mixed = (dataclasses.replace(mixed[0], prompt=tuple(seen)), mixed[1])
    plan = Plan("mixed", model.shape, Workload(3, 11, WRITE_OUTS * 2 + 1), mixed, tail=2, schedule=schedule)
    plan = dataclasses.replace(plan, window=toy_plans.largest_block(plan))
    toy.assert_exact(kvrecomp.Decoder(model, plan), model, toy.texts(3, 16, longest_padding=10))


@pytest.mark.parametrize("kind", ["opt", "grouped"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_prefill_in_chunks_of_queries(kind, chunk, monkeypatch):
    """A prompt whose length the chunk does not divide, and padding that fills whole chunks; in a loop over these."""

    def prompt_decoder():
        decoder = toy.named_decoder("keys_values", kind, prompt=11, new=1)
        return decoder, "scan" in str(decoder._trace("prefill").jaxpr)

    _, loops_at_once = prompt_decoder()
    heads = max(layer.heads for layer in toy.model(kind).shape.layers)
    monkeypatch.setattr(cutting, "SCORE_BYTES", chunk * 4 * 3 * heads * 11)
    decoder, loops = prompt_decoder()
    assert loops and not loops_at_once
    toy.assert_exact(decoder, toy.model(kind), toy.texts(3, 12, longest_padding=10))


def test_two_caches_of_one_decoder():
    """A cache is data: stepped in turns, two do not disturb one another."""
    decoder, model = toy.named_decoder("split:0.5", new=4, tail=2), toy.model()
    both = [toy.texts(3, 15, longest_padding=padding, seed=padding) for padding in (10, 3)]
    caches, results = [], []
    for texts in both:
        cache, logits = decoder.prefill(texts.ids[:, :11], texts.mask[:, :11])
        caches.append(cache)
        results.append([logits])
    for slot in range(11, 15):
        for index, texts in enumerate(both):
            caches[index], logits = decoder.step(caches[index], toy.put(texts.ids[:, slot]))
            results[index].append(logits)
    for texts, logits in zip(both, results):
        expected = toy.plain_logits(model, texts)[:, 10:]
        np.testing.assert_allclose(np.stack([toy.get(each) for each in logits], axis=1), expected, atol=1e-4)


def test_a_long_sliding_window():
    """Of 301 tokens 288 are cached, of which the next token sees 269."""
    config = dataclasses.replace(toy.LLAMA, sliding_window=270, positions=331)
    model = toy.randomised(models.create(config, dtype="float32"))
    plan = kvrecomp.named_plan("split:0.3", model.shape, Workload(2, 301, 7), tail=5)
    assert sum(block.tokens for block in plan.layers[0].prompt) == 288
    toy.assert_exact(kvrecomp.Decoder(model, plan), model, toy.texts(2, 301 + 7, longest_padding=7))
