"""The forward pass: what the library asks of a model, and bad input. `test_reference.py` has its numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

import models
from kvrecomp.run.attention import causal
from models.opt import OPTConfig

TINY = OPTConfig("tiny", layers=2, hidden=35, heads=5, intermediate=53, vocab=97, positions=41)


def test_split_merge_and_jit_give_the_same_logits():
    model = models.create(dataclasses.replace(TINY, layers=1), dtype="float32")
    given = toy.texts(7, 13, longest_padding=12)
    ids, mask = toy.put(given.ids), toy.put(given.mask)
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

    ids = toy.texts(7, 1).ids
    hidden, logits = step(state, toy.put(ids[:, 0]))
    assert hidden.shape == (7, 35) and logits.shape == (7, 97) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, toy.get(model(toy.put(ids)))[:, 0], atol=1e-5)


def test_ids_beyond_the_tables_are_seen():
    model = models.create(TINY, dtype="float32")
    for beyond in (97, -1):
        assert np.isnan(model(toy.put(np.full((1, 2), beyond, np.int32)))).any()


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
