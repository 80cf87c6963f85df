"""Writes and reads the numbers of blocks; `plan.codecs` says how, and in how many bytes.

A packed block is one array of bytes, so that it is one copy. All of this is elementwise but for the list of numbers
apart: those are found by counting, and put back by one small scatter. Blocks with loss are arrays with the axes of
their tensors, so that what reads them may read a number at a time; in host memory their bytes are one array.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvrecomp.plan.codecs import ESCAPE, Steps, packed

_EXPONENT = 255  # a mask; and the exponent of infinities and of what is no number
_MAGNITUDE = 0x7FFF  # a mask: all but the sign
_CHUNK = 32  # numbers, whose escapes are counted together; and so many chunks again


def pack(tensors: Sequence[Array]) -> tuple[Array, Array]:
    """bfloat16 tensors [s, b, ...], of one shape -> uint8[bytes], bool[]: whether the lists had no room for all.

    Numbers that the lists had no room for are lost.
    """
    written, overflowed = zip(*map(_pack, tensors))
    return jnp.concatenate(written), jnp.any(jnp.stack(overflowed))


def unpack(data: Array, shape: Sequence[int], tensors: int) -> tuple[Array, ...]:
    """The tensors that `pack` has written, each of that shape."""
    return tuple(_unpack(part, shape) for part in jnp.split(data, tensors))


def _pack(x: Array) -> tuple[Array, Array]:
    rows = x.reshape(*x.shape[:2], -1)
    parts = packed(rows.size, rows.shape[-1])
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint16)
    tops, codes = _code(bits)
    codes = codes.reshape(-1).astype(jnp.uint8)
    apart = (codes == ESCAPE) & (bits & _MAGNITUDE > 0).reshape(-1)
    half = parts.codes - parts.rest
    low, high = codes[:half], jnp.pad(codes[half:], (0, 2 * half - codes.size))
    count, places = _first_true(apart, parts.escapes)
    values = jnp.take(rows.reshape(-1), places, mode="clip")
    rest = ((bits >> 8) & 128) | (bits & 127)
    written = [
        rest.astype(jnp.uint8),
        low | (high << 4),
        tops.astype(jnp.uint8),
        jax.lax.bitcast_convert_type(places, jnp.uint8),
        jax.lax.bitcast_convert_type(values, jnp.uint8),
        jnp.zeros(parts.nbytes - parts.values, jnp.uint8),
    ]
    return jnp.concatenate([part.reshape(-1) for part in written]), count > parts.escapes


def escapes(x: Array) -> Array:
    """How many numbers of bfloat16 [s, b, ...] are listed apart where they are packed as one block, int32[]."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16)
    return ((_code(bits)[1] == ESCAPE) & (bits & _MAGNITUDE > 0)).sum()


def _code(bits: Array) -> tuple[Array, Array]:
    """The largest exponents of the channels of uint16[s, b, ...], uint16[...], and how far below them each number is;
    ESCAPE for what is further."""
    exponents = (bits >> 7) & _EXPONENT
    # Of what is finite: beside one infinity all other numbers of its channel would be listed apart.
    tops = jnp.where(exponents == _EXPONENT, 0, exponents).max(axis=(0, 1))
    return tops, jnp.where(exponents > tops, ESCAPE, jnp.minimum(tops - exponents, ESCAPE))


def _unpack(data: Array, shape: Sequence[int]) -> Array:
    numbers, channels = int(np.prod(shape)), int(np.prod(shape[2:]))
    parts = packed(numbers, channels)
    rest, pairs, tops, places, values = (data[start:end] for start, end in itertools.pairwise((0, *parts[:5])))
    codes = jnp.concatenate([pairs & ESCAPE, pairs >> 4])[:numbers].reshape(-1, channels)
    rest, codes, tops = (part.astype(jnp.uint16) for part in (rest.reshape(-1, channels), codes, tops))
    bits = ((rest & 128) << 8) | jnp.where(codes == ESCAPE, 0, ((tops - codes) << 7) | (rest & 127))
    x = jax.lax.bitcast_convert_type(bits, jnp.bfloat16).reshape(-1)
    places = jax.lax.bitcast_convert_type(places.reshape(-1, 4), jnp.int32)
    values = jax.lax.bitcast_convert_type(values.reshape(-1, 2), jnp.bfloat16)
    return x.at[places].set(values, mode="drop", unique_indices=True, indices_are_sorted=True).reshape(shape)


def _first_true(flags: Array, room: int) -> tuple[Array, Array]:
    """How many of bool[n] are true, int32[], and the places of the first of them, int32[room], in order; where there
    are fewer, places from n on.

    Found by counts of chunks, and of chunks of chunks: a running count of all flags takes longer than all else here.
    """
    padded = jnp.pad(flags, (0, -flags.size % _CHUNK**2)).reshape(-1, _CHUNK, _CHUNK).astype(jnp.int32)
    chunks = padded.sum(axis=2)
    ends = jnp.cumsum(chunks.sum(axis=1))
    wanted = jnp.arange(room, dtype=jnp.int32)
    outer = jnp.minimum(jnp.searchsorted(ends, wanted, side="right", method="scan_unrolled"), len(ends) - 1)
    left = wanted - (ends[outer] - chunks[outer].sum(axis=1))
    inner, left = _chunk_of(chunks[outer], left)
    place, _ = _chunk_of(padded[outer, inner], left)
    places = (outer * _CHUNK + inner) * _CHUNK + place
    return ends[-1], jnp.where(wanted < ends[-1], places, flags.size + wanted)


def _chunk_of(counts: Array, number: Array) -> tuple[Array, Array]:
    """Which of the chunks, by counts int32[n, chunks], has the true flag of that number, int32[n], and which it is
    there."""
    ends = jnp.cumsum(counts, axis=1)
    chunk = jnp.minimum((ends <= number[:, None]).sum(axis=1), counts.shape[1] - 1)
    found = jnp.take_along_axis(ends - counts, chunk[:, None], axis=1)[:, 0]
    return chunk, number - found


# --- with loss --------------------------------------------------------------------------------------------------------

_MOST_FP8 = float(jnp.finfo(jnp.float8_e4m3fn).max)  # what is larger would be no number


def to_fp8(x: Array) -> Array:
    """Numbers of any shape -> float8_e4m3fn."""
    return jnp.clip(x.astype(jnp.float32), -_MOST_FP8, _MOST_FP8).astype(jnp.float8_e4m3fn)


class InSteps(NamedTuple):
    """A tensor [s, b, ...], of c channels, as `Steps` says: the number of steps above the least of its group that each
    number is, uint8[s, b, c] or two in a byte, and each group's step and least number, in the tensor's dtype."""

    codes: Array
    step: Array
    least: Array


def to_steps(x: Array, steps: Steps) -> InSteps:
    """x [s, b, ...] in steps, of floating point; within half a step of each group."""
    rows = x.reshape(*x.shape[:2], -1)
    groups = _grouped(rows, steps).astype(jnp.float32)
    least, most = groups.min(axis=(1, 4)), groups.max(axis=(1, 4))
    exact = (most - least) / steps.most
    step = exact.astype(x.dtype)
    step = jnp.where(step.astype(jnp.float32) < exact, jnp.nextafter(step, jnp.asarray(jnp.inf, x.dtype)), step)
    finite = jnp.isfinite(groups).all(axis=(1, 4)) & jnp.isfinite(exact)  # XLA may find a least beside a NaN
    step = jnp.where(finite, step, jnp.nan)
    each = jnp.maximum(step.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)
    codes = jnp.round((groups - least[:, None, ..., None]) / each[:, None, ..., None])
    codes = jnp.clip(codes, 0, steps.most).astype(jnp.uint8)
    codes = codes.reshape(groups.shape[0] * steps.tokens, x.shape[1], -1)[: rows.shape[0], :, : rows.shape[2]]
    if steps.bits < 8:
        low, high = jnp.split(jnp.pad(codes, [(0, 0), (0, 0), (0, codes.shape[2] % 2)]), 2, axis=2)
        codes = low | (high << steps.bits)
    return InSteps(codes, step, least.astype(x.dtype))


def from_steps(written: InSteps, steps: Steps, shape: Sequence[int]) -> Array:
    """The tensor of that shape that `to_steps` has written."""
    codes, (tokens, _, *heads) = written.codes, shape
    channels = int(np.prod(heads))
    if steps.bits < 8:
        codes = jnp.concatenate([codes & steps.most, codes >> steps.bits], axis=2)[..., :channels]
    step, least = (_of_each(of_group, steps, tokens, channels) for of_group in (written.step, written.least))
    x = codes.astype(jnp.float32) * step.astype(jnp.float32) + least.astype(jnp.float32)
    return x.astype(written.least.dtype).reshape(shape)


def _grouped(rows: Array, steps: Steps) -> Array:
    """[s, b, c] -> [groups, tokens, b, groups, channels], filled up with what is there last."""
    fill = -rows.shape[0] % steps.tokens, -rows.shape[2] % steps.channels
    padded = jnp.pad(rows, [(0, fill[0]), (0, 0), (0, fill[1])], mode="edge")
    return padded.reshape(-1, steps.tokens, rows.shape[1], padded.shape[2] // steps.channels, steps.channels)


def _of_each(of_groups: Array, steps: Steps, tokens: int, channels: int) -> Array:
    """What each group has, for each of its numbers: [groups, b, groups] -> [s, b, c]."""
    if steps.tokens > 1:
        of_groups = jnp.broadcast_to(of_groups[:, None], (len(of_groups), steps.tokens, *of_groups.shape[1:]))
        return of_groups.reshape(-1, *of_groups.shape[2:])[:tokens]
    each = jnp.broadcast_to(of_groups[..., None], (*of_groups.shape, steps.channels))
    return each.reshape(*of_groups.shape[:2], -1)[..., :channels]


def to_bytes(arrays: Sequence[Array]) -> Array:
    """The arrays' bytes, one after the other, uint8[n]."""
    return jnp.concatenate([jax.lax.bitcast_convert_type(array, jnp.uint8).reshape(-1) for array in arrays])


def from_bytes(data: Array, like: Sequence[jax.ShapeDtypeStruct]) -> list[Array]:
    """The arrays that `to_bytes` was given, of these shapes and dtypes."""
    arrays, start = [], 0
    for each in like:
        itemsize = each.dtype.itemsize
        part = data[start : start + each.size * itemsize].reshape(*each.shape, *([itemsize] if itemsize > 1 else []))
        arrays.append(jax.lax.bitcast_convert_type(part, each.dtype))
        start += each.size * itemsize
    return arrays
