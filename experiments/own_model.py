"""A Flax model of one's own: trained, then decoded with its cache, and half of its weights, in host memory.

    python experiments/own_model.py

What the library asks of a model is `kvrecomp.run.model.Model`: `shape`, `layers`, `embed` and `unembed`. A layer is
called as `layer(hidden, attend)` and hands to `attend` what Q, K and V are projected from, and the projections. So one
layer trains, prefills and decodes: what is attended to is `attend`'s business.

This model is none of the families in models/: queries and keys are rotated, every second layer sees the last tokens
only, and the feed-forward is gated by a squared ReLU. It learns the bytes of this file.
"""

import dataclasses
import functools
from pathlib import Path

from experiments.support import script

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from jax import Array

import kvrecomp
from kvrecomp.run.attention import Attend, causal

PROMPT, NEW, CONTEXT = 24, 16, 64  # tokens, which are bytes: of a prompt, decoded, of a row in training


def rotate(heads: Array, positions: Array) -> Array:
    """Rotary positions: heads [..., n, d] at positions int32[...] -> [..., n, d], halves of d as the planes."""
    first, second = jnp.split(heads, 2, axis=-1)
    angles = positions[..., None, None] * 1e4 ** -jnp.linspace(0, 1, first.shape[-1], endpoint=False)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Layer(nnx.Module):
    """hidden [..., h] -> [..., h]: [tokens, rows, h] of whole texts, [rows, h] of a step's newest tokens."""

    def __init__(self, shape: kvrecomp.LayerShape, rngs: nnx.Rngs):
        self.shape = shape
        heads = functools.partial(nnx.LinearGeneral, shape.hidden, use_bias=False, rngs=rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm, self.feed_forward_norm = (nnx.RMSNorm(shape.hidden, rngs=rngs) for _ in range(2))
        self.query = heads((shape.heads, shape.head_dim))
        self.key, self.value = (heads((shape.kv_heads, shape.head_dim)) for _ in range(2))
        self.output = linear(shape.heads * shape.head_dim, shape.hidden)
        self.gate, self.up = (linear(shape.hidden, shape.intermediate) for _ in range(2))
        self.down = linear(shape.intermediate, shape.hidden)

    def __call__(self, hidden: Array, attend: Attend) -> Array:
        @jax.checkpoint  # computed again for its gradients
        def apply(hidden: Array) -> Array:
            projections = kvrecomp.Projections(
                *(kvrecomp.Projection(heads.kernel[...]) for heads in (self.query, self.key, self.value)),
                scale=self.shape.head_dim**-0.5,
                encode_query=rotate,
                encode_key=rotate,
                sliding_window=self.shape.sliding_window,
            )
            hidden = hidden + self.output(attend(self.norm(hidden), projections))
            x = self.feed_forward_norm(hidden)
            return hidden + self.down(jnp.square(nnx.relu(self.gate(x))) * self.up(x))

        return apply(hidden)


class Model(nnx.Module):
    """What `kvrecomp` decodes with; plans are made from `shape` alone, which has the sizes."""

    def __init__(self, layers: int, hidden: int, rngs: nnx.Rngs):
        sizes = {"heads": 4, "kv_heads": 2, "head_dim": hidden // 4, "intermediate": 2 * hidden, "gated": True}
        whole = kvrecomp.LayerShape(hidden, **sizes, absorbs_keys=False)  # a rotated K is not a projection of x
        sliding = dataclasses.replace(whole, sliding_window=16)
        shapes = tuple((whole, sliding)[number % 2] for number in range(layers))
        self.shape = kvrecomp.ModelShape("own", shapes, vocab=256, embedding=hidden, positions=4096, dtype="float32")
        self.tokens, self.norm = nnx.Embed(256, hidden, rngs=rngs), nnx.RMSNorm(hidden, rngs=rngs)
        self.layers = nnx.List([Layer(shape, rngs) for shape in shapes])

    def embed(self, token_ids: Array, positions: Array) -> Array:
        """int32[...], int32[...] -> [..., h]; positions come in with the rotation."""
        return self.tokens(token_ids)

    def unembed(self, hidden: Array) -> Array:
        """[..., h] -> logits [..., vocab]."""
        return self.tokens.attend(self.norm(hidden))


@nnx.jit
def forward(model: Model, token_ids: Array) -> Array:
    """token_ids int32[rows, tokens] -> logits [rows, tokens, vocab], without a cache."""
    attend = causal(jnp.zeros(len(token_ids), jnp.int32))  # no row is padded
    hidden = model.embed(token_ids.T, jnp.arange(token_ids.shape[1])[:, None])
    for layer in model.layers:
        hidden = layer(hidden, attend)
    return model.unembed(hidden).swapaxes(0, 1)


@nnx.jit
def train_step(model: Model, optimizer: nnx.Optimizer, token_ids: Array) -> Array:
    """One step on int32[rows, tokens + 1]; gives the loss before it, in nats a token."""

    def loss(model: Model) -> Array:
        logits = forward(model, token_ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, token_ids[:, 1:]).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def placed(model: Model, plan: kvrecomp.Plan) -> Model:
    """The model with every parameter in the memory that the plan has it in."""
    where = kvrecomp.placement(plan)
    graph, state = nnx.split(model)
    moved = []
    for path, variable in nnx.to_flat_state(state):
        sharding = where(".".join(map(str, path)), variable.shape)
        moved.append((path, variable.replace(jax.device_put(variable[...], sharding))))
    return nnx.merge(graph, nnx.from_flat_state(moved))


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.integer("steps", 200, "Training steps.", lower_bound=1)
    define.integer("layers", 4, "Layers of the model.", lower_bound=1)
    define.integer("hidden", 64, "Hidden size, a multiple of 8.", lower_bound=8)


def main(given: flags.FlagValues) -> None:
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    model = Model(given.layers, given.hidden, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    for step in range(given.steps):
        starts = rng.integers(0, len(text) - CONTEXT, 16)
        loss = train_step(model, optimizer, jax.device_put(text[starts[:, None] + np.arange(CONTEXT + 1)]))
        if step % max(1, given.steps // 5) == 0 or step == given.steps - 1:
            print(f"step {step}: {jax.device_get(loss):.2f} nats a byte")

    prompts = np.stack([text[start : start + PROMPT] for start in (1000, 2000, 3000)])
    workload = kvrecomp.Workload(len(prompts), PROMPT, NEW)
    for name, hosted in (("activations", 0.0), ("keys_values", 0.5)):
        plan = kvrecomp.with_host_weights(kvrecomp.named_plan(name, model.shape, workload), hosted)
        result = kvrecomp.generate(placed(model, plan), prompts, max_new_tokens=NEW, plan=plan, output_logits=True)
        whole = jax.device_get(forward(model, jax.device_put(result.sequences)))
        difference = abs(np.asarray(result.logits).swapaxes(0, 1) - whole[:, PROMPT - 1 : -1]).max()
        print(f"{name}, weights of {hosted:.0%} of the layers in host memory:")
        print(f"  {result.sequences[0, PROMPT:].tolist()}, {bytes(result.sequences[0].tolist())}")
        print(f"  logits differ from the forward pass's by {difference:.1e} at most")


if __name__ == "__main__":
    script.run(main, define_flags)
