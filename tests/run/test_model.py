"""A model of one's own is checked before anything is compiled: each mistake in one line that says where it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

import kvrecomp
from kvrecomp.plan import PlanError
from kvrecomp.run.attention import causal
from kvrecomp.run.model import check_model

LAYER = kvrecomp.LayerShape(23, heads=6, kv_heads=2, head_dim=4, intermediate=29, sliding_window=7)
SHAPE = kvrecomp.ModelShape("own", (LAYER,) * 3, vocab=61, embedding=23, positions=41, dtype="float32")


class Layer(nnx.Module):
    """hidden [..., h] -> [..., h], with sizes that may be other than its shape says."""

    def __init__(self, rngs, **sizes):
        shape = dataclasses.replace(LAYER, **sizes)
        heads = [(shape.heads, shape.head_dim)] + [(shape.kv_heads, shape.head_dim)] * 2
        self.query, self.key, self.value = (nnx.LinearGeneral(23, shape, rngs=rngs) for shape in heads)
        self.output = nnx.Linear(shape.heads * shape.head_dim, 23, rngs=rngs)
        self.window = shape.sliding_window

    @property
    def projections(self):
        heads = (kvrecomp.Projection(part.kernel[...], part.bias[...]) for part in (self.query, self.key, self.value))
        return kvrecomp.Projections(*heads, scale=0.5, sliding_window=self.window)

    def mixed(self, hidden, attend):
        return attend(hidden, self.projections)

    def __call__(self, hidden, attend):
        mixed = self.mixed(hidden, attend)
        return hidden + self.output(jnp.zeros((*hidden.shape[:-1], 24)) if mixed is None else mixed)


class Own(nnx.Module):
    def __init__(self, make=Layer, layers=3, shape=SHAPE, **sizes):
        rngs = nnx.Rngs(0)
        self.shape = shape
        self.tokens = nnx.Embed(61, 23, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(layers - 1)] + [make(rngs, **sizes)] * (layers > 0))

    def embed(self, token_ids, positions):
        return self.tokens(token_ids)

    def unembed(self, hidden):
        return self.tokens.attend(hidden)


def with_layer(function, name="mixed"):
    """A model whose last layer does something else."""
    return Own(type("Other", (Layer,), {name: function}))


def with_part(name, function):
    return type("Other", (Own,), {name: function})()


def projected(change):
    """A last layer with other projections."""
    return with_layer(lambda layer, hidden, attend: attend(hidden, change(layer.projections)))


class Dropout(Layer):
    def __init__(self, rngs, **sizes):
        super().__init__(rngs, **sizes)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def mixed(self, hidden, attend):
        return self.dropout(super().mixed(hidden, attend))


def drawing(hidden):
    return hidden * jax.random.uniform(jax.random.key(3), hidden.shape)


WRONG = {
    "twice": (
        lambda: with_layer(lambda layer, x, attend: attend(x, layer.projections) * 2 + attend(x, layer.projections)),
        "2 ",
    ),
    "never": (lambda: with_layer(lambda layer, x, attend: None), "layer 2: it calls attend 0 times; expected once"),
    "in a loop": (
        lambda: with_layer(lambda layer, x, attend: jax.lax.map(lambda x: attend(x, layer.projections), x[None])[0]),
        "layer 2: it calls attend inside scan",
    ),
    "heads": (lambda: Own(heads=4), "layer 2: the query's kernel is [23, 4, 4], and its LayerShape says [23, 6, 4]"),
    "kv_heads": (
        lambda: Own(kv_heads=3),
        "layer 2: the key's kernel is [23, 3, 4], and its LayerShape says [23, 2, 4]",
    ),
    "head_dim": (
        lambda: Own(head_dim=5),
        "layer 2: the query's kernel is [23, 6, 5], and its LayerShape says [23, 6, 4]",
    ),
    "window": (
        lambda: Own(sliding_window=5),
        "layer 2: Projections.sliding_window is 5, LayerShape.sliding_window 7: make them the same",
    ),
    "no window": (lambda: Own(sliding_window=None), "Projections.sliding_window is None, LayerShape.sliding_window 7"),
    "value": (
        lambda: projected(lambda given: dataclasses.replace(given, value=given.query)),
        "layer 2: the value's kernel is [23, 6, 4], and its LayerShape says [23, 2, 4]",
    ),
    "bias": (
        lambda: projected(lambda given: dataclasses.replace(given, key=given.key._replace(bias=given.query.bias))),
        "layer 2: the key's bias is [6, 4], and its LayerShape says [2, 4]",
    ),
    "encoding": (
        lambda: projected(lambda given: dataclasses.replace(given, encode_key=lambda heads, _: heads[..., :3])),
        "layer 2: what encode_key gives is [3, 2, 3], and its LayerShape says [3, 2, 4]",
    ),
    "attended to": (
        lambda: with_layer(lambda layer, x, attend: attend((x, x), layer.projections)),
        "layer 2: attend was given a tuple; expected an array",
    ),
    "no projections": (
        lambda: with_layer(lambda layer, x, attend: attend(x, layer.query)),
        "layer 2: attend was given a LinearGeneral; expected kvrecomp.Projections",
    ),
    "tuple": (
        lambda: with_layer(lambda layer, x, attend: (layer.mixed(x, attend), x), "__call__"),
        "layer 2: it returns a tuple; expected an array of hidden states [3, 23]",
    ),
    "None": (
        lambda: with_layer(lambda layer, x, attend: (layer.mixed(x, attend), None)[1], "__call__"),
        "layer 2: it returns a NoneType; expected an array of hidden states [3, 23]",
    ),
    "width": (
        lambda: with_layer(lambda layer, x, attend: layer.mixed(x, attend), "__call__"),
        "layer 2: it returns [3, 24]; expected hidden states [3, 23]",
    ),
    "dropout": (lambda: Own(Dropout), "layer 2: it draws random numbers, as active dropout does: call model.eval()"),
    "drawing": (
        lambda: with_part("embed", lambda model, ids, _: drawing(model.tokens(ids))),
        "embed: it draws random numbers",
    ),
    "fewer layers": (lambda: Own(layers=2), "the model has 2 layers, its shape says 3: make them the same"),
    "no layers": (lambda: Own(layers=0), "the model has 0 layers, its shape says 3"),
    "embed": (
        lambda: with_part("embed", lambda model, ids, _: model.tokens(ids)[..., :21]),
        "embed gives float32[3, 21]; expected [3, 23] [rows, hidden], as ModelShape says",
    ),
    "vocab": (
        lambda: Own(shape=dataclasses.replace(SHAPE, vocab=59)),
        "unembed gives float32[3, 61]; expected float32[3, 59] [rows, vocab]",
    ),
    "rank": (
        lambda: with_part("unembed", lambda model, x: model.tokens.attend(x)[None]),
        "unembed gives float32[1, 3, 61]",
    ),
    "dtype": (
        lambda: with_part("unembed", lambda model, x: model.tokens.attend(x).astype(jnp.bfloat16)),
        "unembed gives bfloat16[3, 61]; expected float32[3, 61]",
    ),
    "no logits": (lambda: with_part("unembed", lambda model, x: (x, x)), "unembed gives a tuple; expected an array"),
    "no shape": (lambda: Own(shape=(3, 4)), "the model's shape is (3, 4); expected a kvrecomp.ModelShape"),
    "none": (lambda: None, "the model is a NoneType without shape, layers, embed, unembed; expected a flax.nnx module"),
    "no module": (
        lambda: nnx.Linear(3, 5, rngs=nnx.Rngs(0)),
        "the model is a Linear without shape, layers, embed, unembed",
    ),
    "a name": (lambda: "opt-125m", "the model is a str without"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told_in_one_line(name):
    """As by generate, which may see them before."""
    make, message = WRONG[name]
    with jax.transfer_guard("allow"):
        model = make()
    for use in (check_model, lambda model: kvrecomp.generate(model, [[1, 2, 3]], max_new_tokens=2, plan="activations")):
        with pytest.raises(PlanError) as raised:
            use(model)
        assert message in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 250


@jax.transfer_guard("allow")
def greedy(model, ids, new):
    """The likeliest continuations by whole forward passes, of rows that are not padded."""
    for _ in range(new):
        hidden = model.embed(toy.put(ids.T), toy.put(np.arange(ids.shape[1])[:, None]))
        for layer in model.layers:
            hidden = layer(hidden, causal(toy.put(np.zeros(len(ids), np.int32))))
        ids = np.concatenate([ids, toy.get(model.unembed(hidden))[-1].argmax(axis=-1)[:, None]], axis=1)
    return ids


@pytest.mark.parametrize("plan", ["activations", "keys_values"])
def test_a_model_that_is_right_decodes(plan):
    """Past its window; dropout that is off draws nothing."""
    with jax.transfer_guard("allow"):
        model = Own(Dropout)
    model.eval()
    ids = toy.texts(2, 9).ids
    result = kvrecomp.generate(model, ids, max_new_tokens=6, plan=plan)
    np.testing.assert_array_equal(result.sequences, greedy(model, ids, 6))


def placed(model, plan):
    """The model with its variables where the plan has them."""
    where, (graph, state) = kvrecomp.placement(plan), nnx.split(model)
    moved = []
    for path, leaf in nnx.to_flat_state(state):
        if isinstance(leaf, nnx.Variable):
            leaf = leaf.replace(jax.device_put(leaf.get_value(), where(".".join(map(str, path)), leaf.shape)))
        moved.append((path, leaf))
    return nnx.merge(graph, nnx.from_flat_state(moved))


class Scaled(Layer):
    """With arrays that are no variables, one of NumPy's and one of jax's."""

    def __init__(self, rngs, **sizes):
        super().__init__(rngs, **sizes)
        self.scale = nnx.data(np.linspace(0.5, 2, 24, dtype=np.float32))
        self.shift = nnx.data(toy.put(np.linspace(-1, 1, 24, dtype=np.float32)))

    def mixed(self, hidden, attend):
        return super().mixed(hidden, attend) * self.scale + self.shift


@pytest.mark.parametrize("hosted", [0.0, 1.0])
def test_arrays_that_are_no_variables_are_weights_as_others(hosted):
    with jax.transfer_guard("allow"):
        model = Own(Scaled)
    ids, plan = toy.texts(2, 9).ids, kvrecomp.named_plan("activations", SHAPE, kvrecomp.Workload(2, 9, 6))
    plan = kvrecomp.with_host_weights(plan, hosted)
    result = kvrecomp.generate(placed(model, plan), ids, max_new_tokens=6, plan=plan)
    np.testing.assert_array_equal(result.sequences, greedy(model, ids, 6))


def test_a_jitted_function_named_attention_is_no_attention():
    """Neither with weights in host memory, whose order of use is read off the layer."""

    def attention(hidden):
        return jnp.tanh(hidden)

    helper = jax.jit(attention)
    with jax.transfer_guard("allow"):
        model = with_layer(lambda layer, hidden, attend: attend(helper(hidden), layer.projections))
    ids, plan = toy.texts(2, 9).ids, kvrecomp.named_plan("activations", SHAPE, kvrecomp.Workload(2, 9, 6))
    plan = kvrecomp.with_host_weights(plan, 1.0)
    result = kvrecomp.generate(placed(model, plan), ids, max_new_tokens=6, plan=plan)
    np.testing.assert_array_equal(result.sequences, greedy(model, ids, 6))
