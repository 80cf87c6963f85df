"""A Flax model of one's own: trained, then decoded with its cache, and half of its weights, in host memory.

    python experiments/own_model.py

What the library asks of a model is `kvrecomp.run.forward.Model`: `shape`, `layers`, `embed` and `unembed`. A layer is
called as `layer(hidden, attend)` and hands to `attend` what Q, K and V are projected from, and the projections. So one
layer trains, prefills and decodes: what is attended to is `attend`'s business.

This one is none of the families in models/: queries and keys are rotated, every second layer sees the last tokens only,
and the feed-forward is gated by a squared ReLU. It learns the bytes of this file.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

import kvrecomp
from experiments.support import script
from kvrecomp.run.attention import Attend, causal

PROMPT, NEW = 24, 16  # tokens, which are bytes


def define_flags(into: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the script only."""
    flags.DEFINE_integer("steps", 200, "Training steps.", lower_bound=1, flag_values=into)
    flags.DEFINE_integer("layers", 4, "Layers of the model.", lower_bound=1, flag_values=into)
    flags.DEFINE_integer("hidden", 64, "Hidden size, a multiple of 8.", lower_bound=8, flag_values=into)


# --- the model --------------------------------------------------------------------------------------------------------


def rotate(heads: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary positions: heads [..., n, d] at positions int32[...] -> [..., n, d], halves of d as the planes."""
    first, second = jnp.split(heads, 2, axis=-1)
    angles = positions[..., None, None] * 1e4 ** -jnp.linspace(0, 1, first.shape[-1], endpoint=False)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Layer(nnx.Module):
    """hidden [..., h] -> [..., h]: [tokens, rows, h] of whole texts, [rows, h] of a step's newest tokens."""

    def __init__(self, shape: kvrecomp.LayerShape, rngs: nnx.Rngs):
        self.sliding_window, self.scale = shape.sliding_window, shape.head_dim**-0.5
        self.norm, self.feed_forward_norm = nnx.RMSNorm(shape.hidden, rngs=rngs), nnx.RMSNorm(shape.hidden, rngs=rngs)
        heads = functools.partial(nnx.LinearGeneral, shape.hidden, use_bias=False, rngs=rngs)
        self.query = heads((shape.heads, shape.head_dim))
        self.key, self.value = (heads((shape.kv_heads, shape.head_dim)) for _ in range(2))
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.output = linear(shape.heads * shape.head_dim, shape.hidden)
        self.gate, self.up = (linear(shape.hidden, shape.intermediate) for _ in range(2))
        self.down = linear(shape.intermediate, shape.hidden)

    def __call__(self, hidden: jax.Array, attend: Attend) -> jax.Array:
        @jax.checkpoint  # recomputed for its gradients
        def apply(hidden):
            projections = kvrecomp.Projections(
                *(kvrecomp.Projection(heads.kernel[...]) for heads in (self.query, self.key, self.value)),
                scale=self.scale,
                encode_query=rotate,
                encode_key=rotate,
                sliding_window=self.sliding_window,
            )
            hidden = hidden + self.output(attend(self.norm(hidden), projections))
            x = self.feed_forward_norm(hidden)
            return hidden + self.down(jnp.square(nnx.relu(self.gate(x))) * self.up(x))

        return apply(hidden)


class Model(nnx.Module):
    """What `kvrecomp` decodes with: `shape` is what plans are made from, sizes alone."""

    def __init__(self, layers: int, hidden: int, rngs: nnx.Rngs):
        whole = kvrecomp.LayerShape(
            hidden, heads=4, kv_heads=2, head_dim=hidden // 4, intermediate=2 * hidden, gated=True, absorbs_keys=False
        )  # K is rotated, so that it cannot be absorbed into the query; V is
        sliding = dataclasses.replace(whole, sliding_window=16)
        shapes = tuple((whole, sliding)[number % 2] for number in range(layers))
        self.shape = kvrecomp.ModelShape("own", shapes, vocab=256, embedding=hidden, positions=4096, dtype="float32")
        self.tokens = nnx.Embed(256, hidden, rngs=rngs)
        self.layers = nnx.List([Layer(shape, rngs) for shape in shapes])

    def embed(self, token_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """int32[...] -> [..., h]; positions come in with the rotation."""
        return self.tokens(token_ids)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """[..., h] -> logits [..., vocab]."""
        return self.tokens.attend(hidden)


@nnx.jit
def forward(model: Model, token_ids: jax.Array) -> jax.Array:
    """token_ids int32[rows, tokens] -> logits [rows, tokens, vocab], without a cache."""
    attend = causal(jnp.zeros(len(token_ids), jnp.int32))  # no row is padded
    hidden = model.embed(token_ids.T, jnp.arange(token_ids.shape[1])[:, None])
    for layer in model.layers:
        hidden = layer(hidden, attend)
    return model.unembed(hidden).swapaxes(0, 1)


# --- training and decoding --------------------------------------------------------------------------------------------


@nnx.jit
def train_step(model: Model, optimizer: nnx.Optimizer, token_ids: jax.Array) -> jax.Array:
    """One step on int32[rows, tokens + 1]; gives the loss before it, in nats a token."""

    def loss(model: Model) -> jax.Array:
        logits = forward(model, token_ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, token_ids[:, 1:]).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def train(model: Model, text: np.ndarray, steps: int) -> None:
    """Trains the model on random pieces of the text, uint8[n], and prints the loss now and then."""
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    for step in range(steps):
        starts = rng.integers(0, len(text) - 65, 16)
        loss = train_step(model, optimizer, jax.device_put(text[starts[:, None] + np.arange(65)].astype(np.int32)))
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            print(f"step {step}: {float(loss):.2f} nats a byte")


def placed(model: Model, plan: kvrecomp.Plan) -> Model:
    """The model with every parameter in the memory that the plan has it in."""
    where = kvrecomp.placement(plan)
    graph, state = nnx.split(model)
    flat = [
        (path, variable.replace(jax.device_put(variable[...], where(".".join(map(str, path)), variable.shape))))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def main(_: Sequence[str], given: flags.FlagValues = flags.FLAGS) -> None:
    """Unpacks the flags."""
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8)
    model = Model(given.layers, given.hidden, nnx.Rngs(0))
    train(model, text, given.steps)
    prompts = np.stack([text[start : start + PROMPT] for start in (1000, 2000, 3000)]).astype(np.int32)
    workload = kvrecomp.Workload(*prompts.shape, NEW)
    plans = [kvrecomp.named_plan(name, model.shape, workload) for name in ("activations", "keys_values")]
    plans[1] = kvrecomp.with_host_weights(plans[1], 0.5)
    for plan in plans:
        result = kvrecomp.generate(placed(model, plan), prompts, max_new_tokens=NEW, plan=plan, output_logits=True)
        expected = np.asarray(forward(model, jax.device_put(result.sequences)))[:, PROMPT - 1 : -1]
        hosted = sum(layer.weights == "host" for layer in plan.layers)
        print(f"plan {plan.name}, weights of {hosted} of {given.layers} layers in host memory:")
        print(result.sequences[0, PROMPT:].tolist(), repr(bytes(result.sequences[0].astype(np.uint8))))
        difference = np.abs(result.logits.swapaxes(0, 1) - expected).max()
        print(f"logits differ from the forward pass's by {difference:.1e} at most")


if __name__ == "__main__":
    define_flags()
    script.run(main)
