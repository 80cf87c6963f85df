"""Products with blocks that are written with loss, as kernels that read them as they are.

XLA makes numbers of codes within its products, too, but slowly: of 4-bit codes in twice the time that the numbers
themselves would take to read, and with sums in parts that every kernel after it adds up again. Here a tile of codes is
read, made numbers of in registers, and multiplied. On other platforms, and of blocks that a kernel has no tiles for,
XLA does it.

Axes: r rows, each of a batch row and a KV head, g queries of it, s tokens, w numbers of a token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kvrecomp.plan.codecs import GROUP, Codec

LEAST_ROWS = 16  # of an operand of a tensor core
LEAST_PROGRAMS = 264  # two for each of an H200's multiprocessors: where there are fewer, tokens are split
CAPABILITY = 8.9  # from which on kernels read fp8


class Tiles(NamedTuple):
    """Tokens and numbers of a tile, warps of a program, and tiles that are on their way."""

    tokens: int
    numbers: int
    warps: int
    stages: int


SCORES, MIXES = Tiles(64, 128, 4, 4), Tiles(64, 128, 4, 4)


def scores(queries: Array, codec: Codec, arrays: Sequence[Array], fallback: Callable[[], Array]) -> Array:
    """queries [r, g, w] and the arrays of codes [s, r, w] -> float32[r, g, s]; `fallback` is the same by XLA."""
    if not _has_tiles(queries.shape[-1], codec, SCORES):
        return fallback()
    return _on_gpu(functools.partial(_scores, codec, SCORES), fallback, queries, *arrays)


def mixed(weights: Array, width: int, codec: Codec, arrays: Sequence[Array], fallback: Callable[[], Array]) -> Array:
    """weights [r, g, s] and the arrays of codes [s, r, w] -> float32[r, g, w]; `fallback` is the same by XLA."""
    if not _has_tiles(width, codec, MIXES):
        return fallback()
    return _on_gpu(functools.partial(_mixed, codec, MIXES, width), fallback, weights, *arrays)


def _on_gpu(kernel: Callable[..., Array], fallback: Callable[[], Array], *operands: Array) -> Array:
    return jax.lax.platform_dependent(*operands, cuda=kernel, default=lambda *_: fallback())


def _has_tiles(width: int, codec: Codec, tiles: Tiles) -> bool:
    devices = jax.devices()
    if devices[0].platform == "gpu" and float(devices[0].compute_capability) < CAPABILITY:
        return False
    return width % (_halves(codec) * tiles.numbers) == 0


def _halves(codec: Codec) -> int:
    """Numbers of a byte, which are so many parts of a token's numbers apart."""
    return 2 if codec == "int4" else 1


def _scores(codec: Codec, tiles: Tiles, queries: Array, *arrays: Array, interpret: bool = False) -> Array:
    rows, count, width = queries.shape
    tokens, halves = arrays[0].shape[0], _halves(codec)
    padded = max(LEAST_ROWS, pl.next_power_of_2(count))

    def kernel(query_ref, *refs):
        *code_refs, out_ref = refs
        row, first = pl.program_id(0), pl.program_id(1) * tiles.tokens
        there = jnp.arange(padded)[:, None] < count
        seen = first + jnp.arange(tiles.tokens) < tokens

        def add(number: Array, total: Array) -> Array:
            start = number * tiles.numbers
            for half, tile in enumerate(_tile(codec, tiles, code_refs, first, row, start, seen, queries.dtype)):
                place = pl.ds(half * (width // halves) + start, tiles.numbers)
                query = plt.load(query_ref.at[row, pl.ds(0, padded), place], mask=there, other=0.0)
                total += plt.dot(query, tile, trans_b=True)
            return total

        total = jnp.zeros((padded, tiles.tokens), jnp.float32)
        total = jax.lax.fori_loop(0, width // halves // tiles.numbers, add, total)
        place = out_ref.at[row, pl.ds(0, padded), pl.ds(first, tiles.tokens)]
        plt.store(place, total, mask=there & seen[None])

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, count, tokens), jnp.float32),
        grid=(rows, pl.cdiv(tokens, tiles.tokens)),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="scores",
    )(queries, *map(_as_bytes, arrays))


def _mixed(codec: Codec, tiles: Tiles, width: int, weights: Array, *arrays: Array, interpret: bool = False) -> Array:
    rows, count, tokens = weights.shape
    halves = _halves(codec)
    padded, chunks = max(LEAST_ROWS, pl.next_power_of_2(count)), pl.cdiv(tokens, tiles.tokens)
    across = width // halves // tiles.numbers
    splits = max(1, min(chunks // 2, -(-LEAST_PROGRAMS // (rows * across))))
    each = pl.cdiv(chunks, splits)

    def kernel(weight_ref, *refs):
        *code_refs, out_ref = refs
        row, start, split = pl.program_id(0), pl.program_id(1) * tiles.numbers, pl.program_id(2)
        there = jnp.arange(padded)[:, None] < count

        def add(number: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            first = (split * each + number) * tiles.tokens
            seen = first + jnp.arange(tiles.tokens) < tokens
            place = weight_ref.at[row, pl.ds(0, padded), pl.ds(first, tiles.tokens)]
            weight = plt.load(place, mask=there & seen[None], other=0.0)
            found = _tile(codec, tiles, code_refs, first, row, start, seen, weights.dtype)
            return tuple(total + plt.dot(weight, tile) for total, tile in zip(totals, found, strict=True))

        totals = (jnp.zeros((padded, tiles.numbers), jnp.float32),) * halves
        for half, total in enumerate(jax.lax.fori_loop(0, each, add, totals)):
            place = pl.ds(half * (width // halves) + start, tiles.numbers)
            plt.store(out_ref.at[split, row, pl.ds(0, padded), place], total, mask=there)

    found = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((splits, rows, count, width), jnp.float32),
        grid=(rows, across, splits),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="mixed",
    )(weights, *map(_as_bytes, arrays))
    return found.sum(axis=0)


def _as_bytes(array: Array) -> Array:
    """Numbers of one byte as bytes: a masked load has no zero of fp8."""
    return jax.lax.bitcast_convert_type(array, jnp.uint8) if array.dtype.itemsize == 1 else array


def _tile(
    codec: Codec, tiles: Tiles, refs: Sequence, first: Array, row: Array, start: Array, seen: Array, dtype: jnp.dtype
) -> list[Array]:
    """The numbers of a tile, [tokens, numbers] of each half of a token's, zeros of what is not `seen`."""
    where = pl.ds(first, tiles.tokens)
    codes = plt.load(refs[0].at[where, row, pl.ds(start, tiles.numbers)], mask=seen[:, None], other=0)
    if codec == "fp8":
        return [jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(dtype)]
    across, found = tiles.numbers // GROUP, []
    for half, of_half in enumerate((codes & 15, codes >> 4)):
        place = pl.ds(half * (refs[1].shape[2] // 2) + start // GROUP, across)
        step, least = (plt.load(ref.at[where, row, place], mask=seen[:, None], other=0.0) for ref in refs[1:])
        # A code in the lowest bits of 128, whose last bit counts 1, is 128 more than itself.
        numbers = jax.lax.bitcast_convert_type(of_half.astype(jnp.uint16) | 0x4300, jnp.bfloat16) - 128
        groups = numbers.reshape(tiles.tokens, across, GROUP).astype(jnp.float32)
        numbers = groups * step.astype(jnp.float32)[..., None] + least.astype(jnp.float32)[..., None]
        found.append(numbers.reshape(tiles.tokens, tiles.numbers).astype(dtype))
    return found
