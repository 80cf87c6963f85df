"""Toy models, their plain forward pass, and decoding given texts. Sizes are prime or distinct wherever they can be."""

import dataclasses
import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kvrecomp
import models
from kvrecomp.plan import LayerShape, ModelShape
from models.layers import Attention, CausalLM, Embedding, FeedForward

VOCAB = 61
POSITIONS = 41

OPT = models.OPTConfig("toy", layers=2, hidden=21, heads=3, intermediate=37, vocab=VOCAB, positions=POSITIONS)
POST_NORM = dataclasses.replace(OPT, name="toy-350m", embedding=13, pre_norm=False, final_norm=False)
LLAMA = models.LlamaConfig("toy-llama", 2, 34, 4, 37, VOCAB, POSITIONS, kv_heads=2, head_dim=6, head_norms=True)


def put(array):
    """An explicit copy to the device."""
    return jax.device_put(array, jax.devices()[0])


def get(array):
    """An explicit copy from the device."""
    return np.asarray(jax.device_get(array))


def randomised(model, seed=0, std=0.3):
    """The model with every parameter drawn anew: biases and norms too, and large enough for logits of order one."""
    graph, state = nnx.split(model)
    rng = np.random.default_rng(seed)
    drawn = []
    for path, variable in nnx.to_flat_state(state):
        centre = 1 if path[-1] == "scale" else 0
        values = put((centre + std * rng.normal(size=variable.shape)).astype(np.float32))
        drawn.append((path, variable.replace(values.astype(variable.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(drawn))


def widened(model):
    """A model in float32 with the numbers of one in bfloat16."""
    graph, _ = nnx.split(model.config.build(dtype="float32", rngs=None))
    return nnx.merge(graph, jax.tree.map(lambda array: array.astype(jnp.float32), nnx.state(model)))


# --- a model that is not OPT: grouped queries, rotation, a sliding window, capped scores ------------------------------


def rotate(heads, positions):
    """Rotary positions: heads [..., n, d] at positions [...], halves of d rotated against each other."""
    half = heads.shape[-1] // 2
    angles = positions[..., None, None] * 3.0 ** -jnp.arange(half)
    first, second = heads[..., :half], heads[..., half:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class GroupedAttention(Attention):
    """Attention with whatever `Projections` offers."""

    def __init__(self, shape, **options):
        super().__init__(shape, bias=True, dtype="float32", rngs=None)
        self.options = tuple(options.items())  # hashable, as the structure of a module must be

    def projections(self):
        return dataclasses.replace(super().projections(), **dict(self.options))


class GroupedLayer(nnx.Module):
    def __init__(self, shape, **options):
        self.attention = GroupedAttention(shape, **options)
        self.feed_forward = FeedForward(
            shape.hidden, shape.intermediate, jax.nn.relu, bias=True, dtype="float32", rngs=None
        )

    def __call__(self, hidden, attend):
        hidden = jnp.tanh(hidden + self.attention(hidden, attend))
        return jnp.tanh(hidden + self.feed_forward(hidden))


class Grouped(CausalLM):
    """Two layers of different shapes: one rotated and sliding, one with capped scores that can absorb its keys."""

    def __init__(self):
        rotated = LayerShape(23, heads=6, kv_heads=2, head_dim=4, intermediate=19, absorbs_keys=False, sliding_window=7)
        capped = LayerShape(23, heads=3, kv_heads=1, head_dim=5, intermediate=29)
        self.sizes = ModelShape("grouped", (rotated, capped), VOCAB, embedding=23, positions=POSITIONS, dtype="float32")
        self.tokens = Embedding(VOCAB, 23, dtype="float32", rngs=None)
        self.layers = nnx.List(
            [
                GroupedLayer(rotated, encode_query=rotate, encode_key=rotate, sliding_window=7),
                GroupedLayer(capped, soft_cap=2.0),
            ]
        )

    @property
    def shape(self):
        return self.sizes

    def embed(self, token_ids, positions):
        return self.tokens(token_ids)

    def unembed(self, hidden):
        return self.tokens.scores(hidden)


@functools.cache
def model(kind="opt", seed=1):  # a seed with which greedy texts are varied
    """A toy model in float32: "opt", "350m" (post-normalised, narrow embedding) or "grouped"."""
    with jax.ensure_compile_time_eval():  # it is kept, also where a program that is traced asks for it first
        configs = {"opt": OPT, "350m": POST_NORM}
        built = Grouped() if kind == "grouped" else configs[kind].build(dtype="float32", rngs=None)
        return randomised(built, seed)


# --- texts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Rows of token ids int32[batch, tokens], left-padded by int32[batch] `padding`."""

    ids: np.ndarray
    padding: np.ndarray

    @property
    def mask(self):
        return (np.arange(self.ids.shape[1]) >= self.padding[:, None]).astype(np.int32)


def texts(batch, tokens, longest_padding=0, seed=0):
    """Random texts; the first row is not padded, the last as much as asked for, those between in between."""
    rng = np.random.default_rng(seed)
    padding = np.linspace(0, longest_padding, batch).round().astype(np.int32)
    return Texts(rng.integers(0, VOCAB, (batch, tokens), dtype=np.int32), padding)


def plain_logits(model, given):
    """The model's forward pass over texts that are not padded at all, so it knows no masks: [batch, tokens, vocab].

    Rows are moved to the left and filled up on the right, which a causal model does not see; logits are moved back.
    What stands in place of padding is NaN.
    """
    batch, tokens = given.ids.shape
    moved = np.zeros((batch, model.shape.positions), np.int32)
    for row, padding in enumerate(given.padding):
        moved[row, : tokens - padding] = given.ids[row, padding:]
    logits = get(model(put(moved)))
    result = np.full((batch, tokens, logits.shape[-1]), np.nan, np.float32)
    for row, padding in enumerate(given.padding):
        result[row, padding:] = logits[row, : tokens - padding]
    return result


def decoded_logits(decoder, given):
    """Logits [batch, 1 + new, vocab] of prefill and of each step over given texts; checks what is cached where."""
    plan = decoder.plan
    prompt = plan.workload.prompt
    cache, logits = decoder.prefill(given.ids[:, :prompt], given.mask[:, :prompt])
    result = [logits]
    for slot in range(prompt, given.ids.shape[1]):
        cache, logits = decoder.step(cache, put(given.ids[:, slot]))
        result.append(logits)
        assert_blocks(cache, plan, (slot - prompt) // plan.tail)
    kinds = {"host": "pinned_host", "device": "device"}
    for block in itertools.chain(*cache.blocks):
        assert all(array.sharding.memory_kind == kinds[block.memory] for array in block.arrays)
    return np.stack([get(logits) for logits in result], axis=1)


def assert_blocks(cache, plan, write_outs):
    """The cache has the blocks of the plan after that many write-outs, each in its slots, without a gap."""
    slots = plan.workload.prompt + write_outs * plan.tail
    for blocks, specs in zip(cache.blocks, plan.blocks(write_outs), strict=True):
        assert [(block.form, block.memory, block.tokens) for block in blocks] == [
            (spec.form, spec.memory, spec.tokens) for spec in specs
        ]
        end = slots
        for block in reversed(blocks):
            end -= block.tokens
            assert int(get(block.start)) == end
    assert int(get(cache.recent.start)) == slots


def assert_exact(decoder, model, given, tolerance=1e-4):
    """Prefill and every step give the logits of the plain forward pass over the whole texts."""
    expected = plain_logits(model, given)[:, decoder.plan.workload.prompt - 1 :]
    assert 0.5 < np.abs(expected).std() < 50  # or the tolerance says little
    np.testing.assert_allclose(decoded_logits(decoder, given), expected, atol=tolerance, rtol=0)


def hosted_parameters(model):
    """Those in host memory, by name."""
    parameters = models.checkpoint.parameters_of(model).items()
    return {name: array for name, array in parameters if array.sharding.memory_kind == "pinned_host"}


def assert_generated(result, model, mask, tolerance=1e-4):
    """The logits of `kvrecomp.generate` are the forward pass's over the text that it wrote; `mask` is the prompt's."""
    new, (rows, prompt) = len(result.logits), mask.shape
    whole_mask = np.concatenate([mask, np.ones((rows, new), bool)], axis=1)
    expected = np.moveaxis(get(model(put(result.sequences), put(whole_mask)))[:, prompt - 1 : -1], 1, 0)
    np.testing.assert_allclose(result.logits, expected, atol=tolerance)


def named_decoder(name, kind="opt", *, batch=3, prompt=11, new=13, **options):
    """A decoder of a toy model under a plan by name."""
    shape = model(kind).shape
    plan = kvrecomp.named_plan(name, shape, kvrecomp.Workload(batch, prompt, new), **options)
    return kvrecomp.Decoder(model(kind), plan)
