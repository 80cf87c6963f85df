"""Layers that wrap themselves, or their attention, in transformations of jax's decode as they would without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import nnx

import kvrecomp
from kvrecomp.plan import PlanError
from kvrecomp.run.attention import Projection, Projections
from kvrecomp.run.layer import Layer, Layers

WORKLOAD = kvrecomp.Workload(batch=3, prompt=11, new=9)


class Wrapped(nnx.Module):
    """One of OPT's layers, called inside a transformation."""

    def __init__(self, layer, wrap):
        self.layer = layer
        self.wrap = wrap

    def __call__(self, hidden, attend):
        return self.wrap(lambda hidden: self.layer(hidden, attend))(hidden)


class LiftedRemat(Wrapped):
    """The same with Flax's own, which takes the layer's parameters out of it and puts them back."""

    def __call__(self, hidden, attend):
        return nnx.remat(lambda layer, hidden: layer(hidden, attend))(self.layer, hidden)


class WrappedAttention(Wrapped):
    """Only the attention of it is wrapped."""

    def __call__(self, hidden, attend):
        def wrapped(x, projections):
            return self.wrap(lambda x: attend(x, projections))(x)

        return self.layer(hidden, wrapped)


def configured(layer):
    """The layer with an attribute that cannot be hashed."""
    layer.options = {"names": ["a", "b"]}
    return layer


WRAPPERS = {
    "none": lambda layer: layer,
    "checkpoint": functools.partial(Wrapped, wrap=jax.checkpoint),
    "jit": functools.partial(Wrapped, wrap=jax.jit),
    "checkpoint in jit": functools.partial(Wrapped, wrap=lambda function: jax.jit(jax.checkpoint(function))),
    "nnx.remat": functools.partial(LiftedRemat, wrap=None),
    "checkpoint of attention": functools.partial(WrappedAttention, wrap=jax.checkpoint),
    "jit of attention": functools.partial(WrappedAttention, wrap=jax.jit),
}


def wrapped(name):
    """A toy model with every layer wrapped."""
    model = toy.randomised(toy.OPT.build(dtype="float32", rngs=None), seed=1)
    wrap = configured if name == "attributes" else WRAPPERS[name]
    model.layers = nnx.List(map(wrap, model.layers))
    return model


def placed(model, plan):
    """The model with its weights where the plan has them."""
    graph, state = nnx.split(model)
    where, moved = kvrecomp.placement(plan), []
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        moved.append((path, variable.replace(jax.device_put(variable.get_value(), where(name, variable.shape)))))
    return nnx.merge(graph, nnx.from_flat_state(moved))


@pytest.mark.parametrize("name", [*WRAPPERS, "attributes"])
def test_prefill_and_steps_are_exact_and_leak_no_tracers(name):
    """Over a cache in both forms and memories that grows by two tails, with one layer's weights in host memory."""
    plan = kvrecomp.named_plan("device:0.4", toy.model().shape, WORKLOAD, tail=4)
    plan = kvrecomp.with_host_weights(plan, 0.5)
    with jax.checking_leaks():
        decoder = kvrecomp.Decoder(placed(wrapped(name), plan), plan)
        toy.assert_exact(decoder, toy.model(), toy.texts(3, 11 + 9, 4))


def test_layers_with_equal_attributes_are_alike():
    """Also where these cannot be hashed."""
    layers = [Layer.split(layer)[0] for layer in wrapped("attributes").layers]
    assert layers[0] == layers[1] and hash(layers[0]) == hash(layers[1])


@functools.cache
def gradients(name):
    """Of the parameters of the wrapped model in a step of training."""
    given = toy.put(toy.texts(3, 7).ids)
    graph, state = nnx.split(wrapped(name))

    def loss(state):
        logits = nnx.merge(graph, state)(given[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, given[:, 1:]).mean()

    return list(map(toy.get, jax.tree.leaves(jax.jit(jax.grad(loss))(state))))


@pytest.mark.parametrize("name", WRAPPERS)
def test_gradients_of_the_training_pass_are_those_of_layers_that_are_not_wrapped(name):
    expected = gradients("none")
    assert max(np.abs(gradient).max() for gradient in expected) > 1e-2
    for one, other in zip(gradients(name), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


PROJECTIONS = Projections(*[Projection(np.ones((5, 2, 3), np.float32))] * 3, scale=1.0)


class Own(nnx.Module):
    """A layer with a scale, which it needs after its attention."""

    def __init__(self, run):
        self.scale = nnx.Param(toy.put(np.float32(3)))
        self.run = run

    def __call__(self, hidden, attend):
        return self.scale[...] * self.run(hidden, lambda x: attend(x, PROJECTIONS))


def attention(context, x, projections):
    return context * x, {"made": projections.key(x)}


@jax.jit
def hidden_state():
    return jnp.arange(5.0)


def test_what_attention_makes_comes_back_and_layers_alike_are_traced_once():
    events, traced = [], []

    def run(hidden, attend):
        traced.append(1)
        return attend(hidden)

    layers = [Layer.split(Own(run)) for _ in range(3)]

    @jax.jit
    def program(hidden, scale):
        def needed():
            events.append("scale is needed")
            return scale

        def attended(result):
            events.append("attention is done")
            return {"made": result["made"] + 1}

        results, calls = [], Layers()
        for layer, parameters in layers:
            hidden, result = calls.call(layer, attention, hidden, parameters, jnp.float32(2), {0: needed}, attended)
            results.append(result["made"])
        return hidden, results

    found, made = program(hidden_state(), toy.put(np.float32(5)))
    np.testing.assert_array_equal(toy.get(found), 10**3 * np.arange(5))
    for number, array in enumerate(made):
        np.testing.assert_array_equal(toy.get(array), np.full((2, 3), 10 * 10**number + 1))
    assert events == ["attention is done", "scale is needed"] * 3
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x, attend: x, "it calls attend 0 times"),
        (lambda x, attend: attend(x) + attend(x), "it calls attend 2 times"),
        (lambda x, attend: jax.lax.map(attend, x[None])[0], "attend inside scan"),
    ],
)
def test_a_layer_that_does_not_attend_once_is_refused(run, message):
    layer, parameters = Layer.split(Own(run))
    with pytest.raises(PlanError, match=message):
        Layers().call(layer, attention, hidden_state(), parameters, toy.put(np.float32(2)))
