"""Choosing the next token of every row, on the device.

Randomness is keyed by (seed, row, position), position counting the row's own tokens, so that a row's text does not
depend on padding or on which rows were decoded beside it. Of jax's random number generators only Threefry keeps to
that: what the others draw for a row depends on its place in the batch.
"""

import functools
import math
import operator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

NO_TOKEN = -(2**31)  # reported in place of a token id where there is none to choose; -1 pads in some configurations
GENERATOR = "threefry2x32"  # whatever jax_default_prng_impl says
LEAST = 1e-37  # it and its inverse are numbers to a device, which takes less than 1.2e-38 for zero


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; names as in Hugging Face's `generate`.

    Without `do_sample` the likeliest token is taken, the first of several. With it, logits are divided by
    `temperature`, the `top_k` likeliest kept (0: all), and of those the smallest set whose probability reaches `top_p`,
    at least one. What is as likely as the last one kept is kept too: transformers does so for `top_k`, and for `top_p`
    drops some of them. Raises ValueError where a value is out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = field(default=0, compare=False)  # not part of the program

    def __post_init__(self):
        for name, number, kind in (
            ("temperature", float, "a number"),
            ("top_p", float, "a number"),
            ("top_k", operator.index, "a whole number"),
            ("seed", operator.index, "a whole number"),
        ):
            try:
                object.__setattr__(self, name, number(getattr(self, name)))  # of NumPy's and jax's, Python's own
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"{name} is {getattr(self, name)!r:.60}; expected {kind}") from None
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; it must be above zero and finite (greedy: do_sample=False)"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be zero (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be greater than 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2**32 - 1")


class Rows(NamedTuple):
    """The state of every row: its random key, the position of the token to come, and whether it has ended."""

    keys: Array
    positions: Array  # int32[b]
    finished: Array  # bool[b]


@jax.jit
def start_rows(seed: Array, row_ids: Array, lengths: Array, padding: Array) -> Rows:
    """Rows named by uint32[b] ids, after int32[b] slots of which int32[b] are padding."""
    positions = lengths - padding
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return Rows(fold(jax.random.key(seed, impl=GENERATOR), row_ids), positions, jnp.zeros(positions.shape, bool))


@functools.partial(jax.jit, static_argnums=0)
def choose(sampling: Sampling, eos: Array, pad: Array, rows: Rows, logits: Array) -> tuple[Rows, Array, Array]:
    """logits float32[b, vocab] -> rows, token ids int32[b], and the same with NO_TOKEN where the largest logit is NaN
    or infinite. Minus infinity is a token that is never chosen.

    Rows that have ended get `pad`; a row ends with any token of int32[e] `eos`.
    """
    tokens, reports = draw(sampling, rows.keys, rows.positions, logits)
    tokens, reports = (jnp.where(rows.finished, pad, each) for each in (tokens, reports))
    finished = rows.finished | jnp.isin(tokens, eos)
    return Rows(rows.keys, rows.positions + 1, finished), tokens, reports


def draw(sampling: Sampling, keys: Array, positions: Array, logits: Array) -> tuple[Array, Array]:
    """The tokens int32[n] that rows of these keys [n] take at positions int32[n], given logits float32[n, vocab], and
    the same with NO_TOKEN where the largest logit is NaN or infinite. What a row takes depends on nothing else."""
    largest = logits.max(axis=-1, keepdims=True)  # NaN if any is
    if sampling.do_sample:
        keys = jax.vmap(jax.random.fold_in)(keys, positions)
        below = logits - largest  # divided by very little, several would be infinite
        temperature = min(max(sampling.temperature, LEAST), 1 / LEAST)
        tokens = jax.vmap(jax.random.categorical)(keys, truncate(sampling, below / temperature))
    else:
        tokens = jnp.argmax(logits, axis=-1)
    tokens = tokens.astype(jnp.int32)
    return tokens, jnp.where(jnp.isfinite(largest[:, 0]), tokens, NO_TOKEN)


def truncate(sampling: Sampling, logits: Array) -> Array:
    """float32[b, vocab] with tokens outside top_k, then outside top_p of what is left, at minus infinity."""
    vocab = logits.shape[-1]
    top_k = min(sampling.top_k or vocab, vocab)
    if top_k == vocab and sampling.top_p == 1:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    kept = jnp.broadcast_to(jnp.arange(vocab) < top_k, logits.shape)
    if sampling.top_p < 1:  # rounded sums reach 1 early, which must not drop what top_k keeps
        probability = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
        kept &= jnp.cumsum(probability, axis=-1) - probability < max(sampling.top_p, LEAST)
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)
