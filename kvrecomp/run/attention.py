"""Attention of the newest tokens over a list of cached blocks, and of a whole prompt over itself.

A block is read in the form it is cached in. With x the activations of a cached token, W_K and W_V its projections and
q a query, absorption moves the projections to the other side (Slim attention, arXiv 2503.05840; DeepSeek-V2's MLA):

    scores    q . (x W_K + b_K)            = (W_K q) . x + q . b_K
    output    sum_s p_s (x_s W_V + b_V)    = (sum_s p_s x_s) W_V + b_V        since the weights p sum to one

so that nothing is recomputed. `q . b_K` is the same for all tokens and would drop out of one softmax; it is kept
because blocks of different forms share one. Where K is normalised or rotated after its projection, K is recomputed
from x and only V is absorbed. Blocks give a `Partial` each as they arrive, sums that are joined, so the result does
not depend on how tokens were cut into blocks.

Axes: b batch row, s cached token, t prompt token, q new token, n heads, k kv_heads, g queries of each of these (those
of the new tokens, one after the other), d head_dim, h hidden. Tokens come first in arrays, since the blocks are
token-major.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from kvrecomp.plan import LOSSLESS, Method
from kvrecomp.plan.cutting import chunk_of_queries
from kvrecomp.run.cache import Block

MASKED = -1e30  # finite: a block that is masked whole must not give NaN, its weight vanishes when merged


class Projection(NamedTuple):
    """x [..., h] -> x kernel + bias [..., n, d]; kernel [h, n, d], bias [n, d] or None."""

    kernel: Array
    bias: Array | None = None

    def __call__(self, x: Array) -> Array:
        out = jnp.einsum("...h,hnd->...nd", x, self.kernel)
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True)
class Projections:
    """What one layer's attention computes with; a model's layer makes it from its parameters at each call.

    `encode_query` and `encode_key` are applied to heads [..., n, d] at positions [...] after the projection (rotation,
    normalisation). `sliding_window` is how many tokens, itself included, a token sees; `soft_cap` c bounds scores to
    c tanh(score / c).
    """

    query: Projection
    key: Projection
    value: Projection
    scale: float
    encode_query: Callable[[Array, Array], Array] | None = None
    encode_key: Callable[[Array, Array], Array] | None = None
    sliding_window: int | None = None
    soft_cap: float | None = None

    def queries(self, x: Array, positions: Array) -> Array:
        """x [..., h], positions [...] -> [..., n, d]."""
        query = self.query(x)
        return query if self.encode_query is None else self.encode_query(query, positions)

    def keys(self, x: Array, positions: Array) -> Array:
        """x [..., h], positions [...] -> [..., k, d]."""
        key = self.key(x)
        return key if self.encode_key is None else self.encode_key(key, positions)

    def values(self, x: Array) -> Array:
        """x [..., h] -> [..., k, d]."""
        return self.value(x)

    def bound(self, scores: Array) -> Array:
        """Scaled, and soft-capped, scores in float32."""
        scores = scores.astype(jnp.float32) * self.scale
        return scores if self.soft_cap is None else self.soft_cap * jnp.tanh(scores / self.soft_cap)


Attend = Callable[[Array, Projections], Array]
"""What a model's layer is given: x [..., h], what K and V come from, and projections -> [..., n * d]."""


def positions_of(slots: Array, padding: Array) -> Array:
    """Positions int32[s, b] of slots int32[s] in rows left-padded by int32[b]; padding itself gets position 0."""
    return jnp.maximum(slots[:, None] - padding, 0)


def visible(slots: Array, padding: Array, query_slots: Array, sliding_window: int | None) -> Array:
    """bool[b, q, s]: whether the queries in slots int32[b, q] or int32[1, q] see slots int32[s] of rows left-padded by
    int32[b]: not padding, not later, not too long ago."""
    query_slots = query_slots[:, :, None]
    seen = (slots >= padding[:, None, None]) & (slots <= query_slots)
    return seen if sliding_window is None else seen & (slots > query_slots - sliding_window)


# --- a whole prompt over itself ---------------------------------------------------------------------------------------


def attend_causal(projections: Projections, x: Array, padding: Array) -> tuple[Array, Array, Array]:
    """x [t, b, h], rows left-padded by int32[b] -> outputs [t, b, n * d], K and V [t, b, k, d].

    Queries are taken in chunks, so memory grows with the prompt, not with its square. Rows of padding attend to
    nothing; their outputs are finite and mean nothing.
    """
    tokens, batch, _ = x.shape
    slots = jnp.arange(tokens)
    positions = positions_of(slots, padding)
    query = projections.queries(x, positions)
    key, value = projections.keys(x, positions), projections.values(x)
    kv_heads = key.shape[-2]
    heads, head_dim = query.shape[-2:]
    query = query.reshape(tokens, batch, kv_heads, heads // kv_heads, head_dim)

    def attend_chunk(query: Array, query_slots: Array) -> Array:
        scores = jnp.einsum("tbkgd,sbkd->bkgts", query, key, preferred_element_type=jnp.float32)
        seen = visible(slots, padding, query_slots[None], projections.sliding_window)
        scores = jnp.where(seen[:, None, None], projections.bound(scores), MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("bkgts,sbkd->tbkgd", weights, value)

    chunk = chunk_of_queries(batch, heads, tokens)
    chunks = -(-tokens // chunk)
    if chunks == 1:
        mixed = attend_chunk(query, slots)
    else:

        def attend_next(number: Array, pieces: Array) -> Array:
            """In place of the queries: XLA would make other room for the results of all layers at the start."""
            piece = jax.lax.dynamic_slice_in_dim(pieces, number * chunk, chunk)
            piece = attend_chunk(piece, number * chunk + jnp.arange(chunk)).astype(pieces.dtype)
            return jax.lax.dynamic_update_slice_in_dim(pieces, piece, number * chunk, axis=0)

        padded = jnp.pad(query, [(0, chunks * chunk - tokens)] + [(0, 0)] * 4)
        mixed = jax.lax.fori_loop(0, chunks, attend_next, padded)[:tokens]
    return mixed.reshape(tokens, batch, heads * head_dim), key, value


def causal(padding: Array) -> Attend:
    """The `Attend` of a plain forward pass over whole, left-padded rows."""
    return lambda x, projections: attend_causal(projections, x, padding)[0]


# --- the newest tokens over blocks ------------------------------------------------------------------------------------


Mixes = Literal["values", "activations"]
MIXES: tuple[Mixes, ...] = get_args(Mixes)


class Partial(NamedTuple):
    """Softmax attention over some of the tokens.

    With weights exp(score - most), where `most` float32[b, k, g] is the largest score, `total` float32[b, k, g] is
    their sum, and `mixed` float32[b, k, g, w] that of the tokens' values (w = d) or, where V is absorbed, activations
    (w = h), times their weights. It is divided by the total at the very end, since a pass over it takes a while.
    """

    most: Array
    total: Array
    mixed: Array

    def scaled(self, most: Array) -> "Partial":
        """The same, with weights that are relative to another score."""
        by = jnp.exp(self.most - most)
        return Partial(most, by * self.total, by[..., None] * self.mixed)


@dataclass(frozen=True)
class Query:
    """The newest tokens of each row, in slots int32[b, q] of rows left-padded by int32[b]; `queries` [b, q, n, d] are
    those that the projections give them."""

    projections: Projections
    queries: Array
    slots: Array
    padding: Array

    @functools.cached_property
    def heads(self) -> Array:
        """[b, k, g, d]."""
        batch, tokens, _, head_dim = self.queries.shape
        of_tokens = self.queries.reshape(batch, tokens, self.projections.key.kernel.shape[1], -1, head_dim)
        return of_tokens.swapaxes(1, 2).reshape(batch, of_tokens.shape[2], -1, head_dim)

    def sees(self, block: Block) -> Array:
        """bool[b, 1, g, s]: which of the block's tokens each of the heads' queries sees."""
        seen = visible(block.slots, self.padding, self.slots, self.projections.sliding_window)
        each = self.heads.shape[2] // seen.shape[1]
        return jnp.repeat(seen, each, axis=1)[:, None]

    def by_token(self, mixed: Array) -> Array:
        """[b, k, g, d] -> [b, q, n * d]."""
        batch, tokens = self.slots.shape
        of_tokens = mixed.reshape(batch, mixed.shape[1], tokens, -1, mixed.shape[-1])
        return of_tokens.swapaxes(1, 2).reshape(batch, tokens, -1)

    @functools.cached_property
    def absorbed(self) -> tuple[Array, Array | None]:
        """W_K q [b, k, g, h], to be multiplied by activations, and q . b_K float32[b, k, g]."""
        kernel, bias = self.projections.key
        by_head = _as_written(jnp.einsum("bkgd,hkd->kbgh", self.heads, kernel))
        absorbed = _as_written(by_head.swapaxes(0, 1))
        if bias is None:
            return absorbed, None
        return absorbed, jnp.einsum("bkgd,kd->bkg", self.heads, bias, preferred_element_type=jnp.float32)


def attend(query: Query, blocks: Sequence[Block], method: Method) -> dict[Mixes, Partial]:
    """Attention over all tokens of the given blocks, on the device: a partial for each of what is mixed.

    `method` says how activations are used: "absorb" what can be, or "recompute" K and V from them.
    """
    scored = [_score(query, block, method, shared=len(blocks) > 1) for block in blocks]
    partials: dict[Mixes, Partial] = {}
    for mixes in MIXES:
        pieces = [(scores, mixable) for scores, mixable, mixed in scored if mixed == mixes]
        if pieces:
            partials[mixes] = _mix(pieces, mixes)
    return partials


def _score(query: Query, block: Block, method: Method, shared: bool) -> tuple[Array, Array, Mixes]:
    """float32[b, k, g, s] scores, and what is to be mixed with their weights: V [s, b, k, d] or x [s, b, h].

    Where the query is `shared` with other blocks, it is made an operand of this product alone. XLA would make one
    product of two that share an operand, where one is small, and copy their other operands together for that: with the
    tail, at every step, all that is cached on the device.
    """

    # With loss, numbers on the device are made within the products that read them; a barrier would have them written.
    written, block = block, block.as_plain()
    read = (block if written.codec in LOSSLESS else written).arrays[0]

    def operand(query_side: Array) -> Array:
        return jax.lax.optimization_barrier((query_side, read))[0] if shared else query_side

    projections, heads = query.projections, query.heads
    mixes: Mixes = "values"
    if block.form == "keys_values":
        key, mixable = block.tensors
    else:
        (x,) = block.tensors
        recompute = method == "recompute"
        if projections.encode_key is not None:
            # XLA would compute what positions are encoded with for the blocks of all layers at the start of the step.
            heads, x, start = jax.lax.optimization_barrier((heads, x, block.start))
            block = replace(block, start=start)
        positions = positions_of(block.slots, query.padding)
        key = projections.keys(x, positions) if recompute or projections.encode_key is not None else None
        mixable, mixes = (projections.values(x), "values") if recompute else (x, "activations")
    if key is None:
        absorbed, constant = query.absorbed
        scores = jnp.einsum("bkgh,sbh->bkgs", operand(absorbed), mixable, preferred_element_type=jnp.float32)
        scores = scores if constant is None else scores + constant[..., None]
    else:
        # Of one query a head XLA makes no product, and there is nothing to share.
        heads = operand(heads) if heads.shape[2] > 1 else heads
        scores = jnp.einsum("bkgd,sbkd->bkgs", heads, key, preferred_element_type=jnp.float32)
    return jnp.where(query.sees(block), projections.bound(scores), MASKED), mixable, mixes


def _mix(scored: Sequence[tuple[Array, Array]], mixes: Mixes) -> Partial:
    """One softmax over several pieces of scores, each with what it weighs."""
    scores = jnp.concatenate([piece for piece, _ in scored], axis=-1)
    most = scores.max(axis=-1, keepdims=True)
    # Rounded before they are summed, so that they sum to one: activations have means that cancel in V, and of a mean
    # that is weighed with a little more than one the little would be left.
    weights = jnp.exp(scores - most).astype(scored[0][1].dtype)
    total = weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)
    mixed, start = [], 0
    for piece, mixable in scored:
        piece_weights = weights[..., start : start + piece.shape[-1]]
        if mixes == "values":
            mixed.append(_by_head("bkgs,sbkd->bkgd", piece_weights, mixable))
        else:
            of_piece = jnp.einsum("bkgs,sbh->bkgh", piece_weights, mixable, preferred_element_type=jnp.float32)
            mixed.append(_as_written(of_piece))
        start += piece.shape[-1]
    return Partial(most[..., 0], total[..., 0], functools.reduce(jnp.add, mixed))


def _as_written(rows: Array) -> Array:
    """The rows [..., w] laid out as they are given. XLA would put the channels of few rows outside of these, since that
    is how it multiplies them; what else reads or makes the rows has them one by one, and would be slow at it."""
    return with_layout_constraint(rows, Layout(major_to_minor=tuple(range(rows.ndim))))


def _by_head(subscripts: str, rows: Array, matrices: Array) -> Array:
    """The einsum, in float32, of rows [b, k, g, w] with a matrix for each head, or for each head of each batch row.

    XLA makes no matrix product of a single row a head, but a reduction over the matrix's first axis, which on a GPU
    takes twice as long. So the row is multiplied twice.
    """
    if rows.shape[0] * rows.shape[2] > 1:
        return jnp.einsum(subscripts, rows, matrices, preferred_element_type=jnp.float32)
    twice = jax.lax.optimization_barrier(jnp.concatenate([rows, rows], axis=2))
    return jnp.einsum(subscripts, twice, matrices, preferred_element_type=jnp.float32)[:, :, :1]


def _parts(x: Array, dtype: jnp.dtype) -> list[Array]:
    """Numbers of that dtype whose sum is x, in float32, to twice the bits that the dtype has or to float32's."""
    rounded = x.astype(dtype)
    return [rounded] if dtype == x.dtype else [rounded, (x - rounded).astype(dtype)]


def join(partials: Mapping[Mixes, Partial], found: Mapping[Mixes, Partial]) -> dict[Mixes, Partial]:
    """The partials with those found over other tokens, joined where they mix the same; the ones found come last.

    One after the other rather than all at the end: XLA times each kernel that it has not seen before, and a program for
    one more block, compiled while steps run, should have none.
    """
    joined = dict(partials)
    for mixes, new in found.items():
        old = joined.pop(mixes, None)
        if old is not None:
            most = jnp.maximum(old.most, new.most)
            old, new = old.scaled(most), new.scaled(most)
            new = Partial(most, old.total + new.total, _as_written(old.mixed + new.mixed))
        joined[mixes] = new
    return joined


def merge(query: Query, partials: Mapping[Mixes, Partial], lossless: bool = True) -> Array:
    """Partial results over disjoint tokens -> [b, q, n * d], in the dtype of the query.

    Mixed activations are multiplied in float32 where all tokens were `lossless`; where some were not, rounding them
    adds nothing to speak of.
    """
    most = functools.reduce(jnp.maximum, [partial.most for partial in partials.values()])
    scaled = {mixes: partial.scaled(most) for mixes, partial in partials.items()}
    total = functools.reduce(jnp.add, [partial.total for partial in scaled.values()])[..., None]
    dtype, out = query.queries.dtype, jnp.zeros((), jnp.float32)
    for mixes, partial in scaled.items():
        values = partial.mixed / total
        if mixes == "activations":
            kernel, bias = query.projections.value
            parts = _parts(values, dtype) if lossless else [values.astype(dtype)]
            rows = _as_written(jnp.concatenate(parts, axis=2).swapaxes(0, 1)).swapaxes(0, 1)  # head by head
            projected = _by_head("bkgh,hkd->bkgd", rows, kernel)
            values = sum(jnp.split(projected, len(parts), axis=2))
            values += 0 if bias is None else bias[:, None] * (partial.total[..., None] / total)
        out += values
    return query.by_token(out.astype(dtype))
