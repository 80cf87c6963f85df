"""What families of decoder-only language models share, as plain `flax.nnx` modules.

A kernel is stored as it is used, so that no step transposes a weight:

    Linear            [in, out]
    HeadProjection    [hidden, heads, head_dim], bias [heads, head_dim]
    Embedding         [vocab, width]

Modules work on `[..., hidden]`: `[tokens, batch, hidden]` in a forward pass or a prefill, `[batch, hidden]` in a decode
step. What is attended to is given to a layer as `attend` (see `kvrecomp.run.attention`), so one layer does all three.
Every module takes `rngs`; with None it is made abstractly, its parameters being `jax.ShapeDtypeStruct`, to be filled
from a checkpoint. A family subclasses `CausalLM` and brings `shape`, `embed`, `layers` and `unembed`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.core import Tracer

from kvrecomp.plan import LayerShape, ModelShape
from kvrecomp.run.attention import Attend, Projection, Projections, causal, positions_of

INITIALIZERS = {
    "kernel": jax.nn.initializers.normal(0.02),
    "embedding": jax.nn.initializers.normal(0.02),
    "scale": jax.nn.initializers.ones,
    "offset": jax.nn.initializers.zeros,
    "bias": jax.nn.initializers.zeros,
}
"""How a parameter starts, by the last part of its path. 0.02 is what OPT and GPT-2 were trained from."""


def parameter(name: str, shape: tuple[int, ...], dtype: Any, rngs: nnx.Rngs | None) -> nnx.Param:
    """A new parameter, `name` being a key of `INITIALIZERS`; without `rngs` only its shape and dtype."""
    if rngs is None:
        # nnx.eval_shape over a module gives the same, but its time grows with the square of the layers: 40 s for 175B.
        return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
    return nnx.Param(INITIALIZERS[name](rngs.params(), shape, dtype))


class Linear(nnx.Module):
    """x [..., in] -> [..., out], in the dtype of x and the kernel."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: Any, rngs: nnx.Rngs | None):
        self.kernel = parameter("kernel", (inputs, outputs), dtype, rngs)
        self.bias = parameter("bias", (outputs,), dtype, rngs) if bias else None

    def __call__(self, x: Array) -> Array:
        out = jnp.matmul(x, self.kernel[...])
        return out if self.bias is None else out + self.bias[...]


class HeadProjection(nnx.Module):
    """Parameters of a projection to heads, used by attention rather than called: see `projection`."""

    def __init__(self, hidden: int, heads: int, head_dim: int, *, bias: bool, dtype: Any, rngs: nnx.Rngs | None):
        self.kernel = parameter("kernel", (hidden, heads, head_dim), dtype, rngs)
        self.bias = parameter("bias", (heads, head_dim), dtype, rngs) if bias else None

    @property
    def projection(self) -> Projection:
        """The arrays that `kvrecomp.run.attention` computes with."""
        return Projection(self.kernel[...], None if self.bias is None else self.bias[...])


class Attention(nnx.Module):
    """Query, key, value and output projections; `attend` decides what is attended to.

    A family that normalises or rotates its heads, or limits what a token sees, overrides `projections`. `bias` is that
    of queries, keys and values, and of the output unless `output_bias` says otherwise.
    """

    def __init__(
        self, shape: LayerShape, *, bias: bool, output_bias: bool | None = None, dtype: Any, rngs: nnx.Rngs | None
    ):
        def heads(count: int) -> HeadProjection:
            return HeadProjection(shape.hidden, count, shape.head_dim, bias=bias, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value = heads(shape.heads), heads(shape.kv_heads), heads(shape.kv_heads)
        output_bias = bias if output_bias is None else output_bias
        self.output = Linear(shape.heads * shape.head_dim, shape.hidden, bias=output_bias, dtype=dtype, rngs=rngs)
        self.scale = shape.head_dim**-0.5

    def projections(self) -> Projections:
        """What attention computes with, from the parameters."""
        return Projections(self.query.projection, self.key.projection, self.value.projection, self.scale)

    def __call__(self, x: Array, attend: Attend) -> Array:
        """x [..., hidden], what Q, K and V are projected from -> [..., hidden]."""
        return self.output(attend(x, self.projections()))


class FeedForward(nnx.Module):
    """x [..., hidden] -> activation(x up) down [..., hidden]."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        activation: Callable[[Array], Array],
        *,
        bias: bool,
        dtype: Any,
        rngs: nnx.Rngs | None,
    ):
        self.up = Linear(hidden, intermediate, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(intermediate, hidden, bias=bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return self.down(self.activation(self.up(x)))


class GatedFeedForward(nnx.Module):
    """x [..., hidden] -> (activation(x gate) * (x up)) down [..., hidden].

    (Shazeer 2020, arXiv 2002.05202)
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        activation: Callable[[Array], Array],
        *,
        bias: bool = False,
        dtype: Any,
        rngs: nnx.Rngs | None,
    ):
        self.gate = Linear(hidden, intermediate, bias=bias, dtype=dtype, rngs=rngs)
        self.up = Linear(hidden, intermediate, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(intermediate, hidden, bias=bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def divided_by_root_mean_square(x: Array, epsilon: float) -> Array:
    """float32 x [..., w] -> the same over the root of its mean square along the last axis."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + epsilon)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32, returned in the dtype of x."""

    def __init__(self, hidden: int, *, dtype: Any, rngs: nnx.Rngs | None, epsilon: float = 1e-5):
        self.scale = parameter("scale", (hidden,), dtype, rngs)
        self.bias = parameter("bias", (hidden,), dtype, rngs)
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = divided_by_root_mean_square(wide - wide.mean(axis=-1, keepdims=True), self.epsilon)
        return (wide * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Division by the root of the mean square over the last axis, computed in float32, returned in the dtype of x.

    (Zhang and Sennrich 2019, arXiv 1910.07467)
    """

    def __init__(self, width: int, *, epsilon: float, dtype: Any, rngs: nnx.Rngs | None):
        self.scale = parameter("scale", (width,), dtype, rngs)
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        wide = divided_by_root_mean_square(x.astype(jnp.float32), self.epsilon)
        return (wide * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def _rows(table: Array, ids: Array) -> Array:
    """Rows of table [rows, width] at ids int32[...]; NaN beyond it, and below zero."""
    ids = jnp.where(ids < 0, table.shape[0], ids)  # or they would count from the end
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)


def _look_up_forward(table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rows(table, ids), (table, ids)


def _look_up_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    # As a product with one-hot rows. A scatter adds to few rows from all tokens at once: slow, and in any order.
    table, ids = saved
    chosen = jax.nn.one_hot(ids, table.shape[0], dtype=gradient.dtype)
    return jnp.einsum("...r,...w->rw", chosen, gradient, preferred_element_type=jnp.float32).astype(table.dtype), None


_look_up = jax.custom_vjp(_rows)
_look_up.defvjp(_look_up_forward, _look_up_backward)


class Embedding(nnx.Module):
    """A table [rows, width]: rows of it, and scores against all of its rows."""

    def __init__(self, rows: int, width: int, *, dtype: Any, rngs: nnx.Rngs | None):
        self.embedding = parameter("embedding", (rows, width), dtype, rngs)

    def __call__(self, ids: Array) -> Array:
        """ids int32[...] -> [..., width]. An id beyond the table gives NaN, which is seen, not some other row."""
        return _look_up(self.embedding[...], ids)

    def scores(self, x: Array) -> Array:
        """x [..., width] -> float32[..., rows]."""
        return jnp.einsum("...w,rw->...r", x, self.embedding[...], preferred_element_type=jnp.float32)


class CausalLM(nnx.Module):
    """A decoder-only language model. A family brings `layers`, `shape`, `embed` and `unembed`.

    `config` is a `models.config.Config`, from which the model can be made again.
    """

    config: Any
    layers: nnx.List

    @property
    def shape(self) -> ModelShape:
        """The sizes, and the dtype that the parameters have."""
        raise NotImplementedError

    def embed(self, token_ids: Array, positions: Array) -> Array:
        """token_ids and positions int32[...] -> hidden [..., hidden]; position 0 is a row's first real token."""
        raise NotImplementedError

    def unembed(self, hidden: Array) -> Array:
        """hidden [..., hidden] -> logits float32[..., vocab]."""
        raise NotImplementedError

    def __call__(self, input_ids: Array, attention_mask: Array | None = None) -> Array:
        """The plain forward pass, compiled once per shape of its input.

        Args:
            input_ids: integers [batch, tokens].
            attention_mask: bool or integers [batch, tokens], zeros first in each row (left padding); all ones if None.

        Returns:
            float32 logits [batch, tokens, vocab]. Those of padding are finite and mean nothing.

        Raises:
            ValueError: shapes that do not agree, more tokens than the model has positions, a mask not left-padded.
        """
        if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise ValueError(
                f"input_ids are {input_ids.dtype}{list(input_ids.shape)}; expected integers [batch, tokens]"
            )
        if input_ids.shape[1] > self.shape.positions:
            raise ValueError(
                f"rows have {input_ids.shape[1]} tokens; {self.shape.name} has {self.shape.positions} positions: "
                "shorten them"
            )
        if attention_mask is not None:
            _check_left_padded(attention_mask, input_ids.shape)
        # Parameters are arguments of the compiled function: as constants they would be compiled in.
        return _forward(*nnx.split(self), input_ids, attention_mask)


def _check_left_padded(mask: Array, shape: tuple[int, ...]) -> None:
    if mask.shape != shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}; expected that of input_ids, {list(shape)}")
    if isinstance(mask, Tracer):
        return  # values are not known while tracing; who traces has checked
    values = np.asarray(jax.device_get(mask)) != 0
    wrong = np.flatnonzero((values[:, :-1] & ~values[:, 1:]).any(axis=1))
    if wrong.size:
        raise ValueError(f"attention_mask row {wrong[0]} has a zero after a one; pad rows on the left")


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph: nnx.GraphDef, state: nnx.State, input_ids: Array, attention_mask: Array | None) -> Array:
    model = nnx.merge(graph, state)
    batch, tokens = input_ids.shape
    if attention_mask is None:
        padding = jnp.zeros(batch, jnp.int32)
    else:
        padding = tokens - (attention_mask != 0).sum(axis=1, dtype=jnp.int32)
    hidden = model.embed(input_ids.T, positions_of(jnp.arange(tokens), padding))
    for layer in model.layers:
        hidden = layer(hidden, causal(padding))
    return model.unembed(hidden).transpose(1, 0, 2)
