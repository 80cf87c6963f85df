"""What is cached: pure pytrees, passed in and returned, never hidden in a module.

    Cache -> LayerCache (one a layer) -> Block... in token order, then the tail

A block's arrays, tokens first, are copied whole: a slice of a host array would be read by a kernel over the link
instead of by the copy engine. Its form and memory are static, so they select the program.

    activations              x [s, b, hidden]
    keys_values on device    K [s, b, kv_heads, head_dim] and V alike
    keys_values on host      both in one, [s, 2, b, kv_heads, head_dim]

A host block is one array because XLA keeps two copies under way: as two arrays, one block would be both, and the next
block's copy would make XLA await one of them before its time. On the device K and V are apart because scores over a
part of an array take longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array

from kvrecomp.plan import BlockSpec, Form, LayerShape, Memory, Plan
from kvrecomp.run import memory

STATIC: dict = {"static": True}  # part of the tree's structure, so it selects the program


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block:
    """Consecutive cached tokens of one layer."""

    arrays: tuple[Array, ...]
    form: Form = field(metadata=STATIC)
    memory: Memory = field(metadata=STATIC)

    @property
    def tokens(self) -> int:
        return self.arrays[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(array.size * array.dtype.itemsize for array in self.arrays)

    @property
    def tensors(self) -> tuple[Array, ...]:
        """x [s, b, h], or K and V [s, b, k, d]."""
        if self.form == "keys_values" and self.memory == "host":
            (both,) = self.arrays
            return both[:, 0], both[:, 1]
        return self.arrays

    @property
    def spec(self) -> BlockSpec:
        return BlockSpec(self.form, self.memory, self.tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's blocks in token order, and its tail: a block on the device of which the first tokens are in use."""

    blocks: tuple[Block, ...]
    tail: Block


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """All that decoding remembers.

    `padding` int32[b] counts each row's padding on the left. `length` int32[] is the number of slots in use, padding
    included, on the device; `in_tail` is how many of them are in the tail, known to the host without asking the device.
    """

    layers: tuple[LayerCache, ...]
    padding: Array
    length: Array
    in_tail: int = field(metadata=STATIC)

    @property
    def blocks(self) -> tuple[tuple[Block, ...], ...]:
        return tuple(layer.blocks for layer in self.layers)

    @property
    def tails(self) -> tuple[Block, ...]:
        return tuple(layer.tail for layer in self.layers)

    @property
    def layout(self) -> tuple[tuple[BlockSpec, ...], ...]:
        """The blocks of every layer, as a plan lists them."""
        return tuple(tuple(block.spec for block in blocks) for blocks in self.blocks)


def make_cache(
    blocks: Sequence[Sequence[Block]], tails: Sequence[Block], padding: Array, length: Array, in_tail: int
) -> Cache:
    """A cache from its blocks and tails, both one entry a layer."""
    layers = tuple(LayerCache(tuple(own), tail) for own, tail in zip(blocks, tails, strict=True))
    return Cache(layers, padding, length, in_tail)


def in_sight(cache: Cache, plan: Plan) -> Cache:
    """The cache without the blocks that have left the sliding windows of their layers."""
    layers = zip(cache.layers, plan.shape.layers, strict=True)
    return replace(cache, layers=tuple(replace(own, blocks=shape.in_sight(own.blocks)) for own, shape in layers))


def kept(form: Form, x: Array, key: Array, value: Array) -> tuple[Array, ...]:
    """The tensors that the form keeps."""
    return (x,) if form == "activations" else (key, value)


def make_block(form: Form, place: Memory, tensors: Sequence[Array]) -> Block:
    """Of x [s, b, h], or K and V [s, b, k, d], arranged as in that memory."""
    if form == "keys_values" and place == "host":
        return Block((jnp.stack(tensors, axis=1),), form, place)
    return Block(tuple(tensors), form, place)


def cut(specs: Sequence[BlockSpec], x: Array, key: Array, value: Array) -> tuple[Block, ...]:
    """The newest tokens of a layer's prompt, x [s, b, h] and K and V [s, b, k, d], as the blocks that a plan lists."""
    blocks, start = [], len(x) - sum(spec.tokens for spec in specs)
    for spec in specs:
        own = slice(start, start + spec.tokens)
        tensors = [tensor[own] for tensor in kept(spec.form, x, key, value)]
        blocks.append(make_block(spec.form, spec.memory, tensors))
        start += spec.tokens
    return tuple(blocks)


def block_shapes(spec: BlockSpec, layer: LayerShape, batch: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of a block's arrays."""
    if spec.form == "activations":
        return ((spec.tokens, batch, layer.hidden),)
    heads = (batch, layer.kv_heads, layer.head_dim)
    return ((spec.tokens, 2, *heads),) if spec.memory == "host" else ((spec.tokens, *heads),) * 2


def describe_blocks(plan: Plan, write_outs: int) -> tuple[tuple[Block, ...], ...]:
    """The blocks of every layer after that many write-outs, as abstract arrays to lower a program with."""
    return tuple(
        tuple(_describe(spec, layer, plan) for spec in own)
        for own, layer in zip(plan.blocks(write_outs), plan.shape.layers, strict=True)
    )


def describe_tails(plan: Plan) -> tuple[Block, ...]:
    """The tails of every layer, as abstract arrays."""
    return tuple(
        _describe(BlockSpec(own.tail_form, "device", plan.tail), layer, plan)
        for own, layer in zip(plan.layers, plan.shape.layers, strict=True)
    )


def _describe(spec: BlockSpec, layer: LayerShape, plan: Plan) -> Block:
    shapes = block_shapes(spec, layer, plan.workload.batch)
    arrays = tuple(memory.describe(shape, plan.shape.dtype, spec.memory) for shape in shapes)
    return Block(arrays, spec.form, spec.memory)


def empty_tails(plan: Plan) -> tuple[Block, ...]:
    """Tails of zeros, within a program: unused slots are masked, and must be finite for that."""
    return jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), describe_tails(plan))


def allocate_tails(plan: Plan) -> tuple[Block, ...]:
    """The same outside of a program."""
    return jax.tree.map(lambda like: memory.zeros(like.shape, like.dtype, "device"), describe_tails(plan))


def append(tail: Block, slot: Array, x: Array, key: Array, value: Array) -> Block:
    """The tail with a token, x [b, h], K and V [b, k, d], written at int32[] slot; in place where it is donated."""
    written = [
        jax.lax.dynamic_update_index_in_dim(array, own.astype(array.dtype), slot, 0)
        for array, own in zip(tail.arrays, kept(tail.form, x, key, value), strict=True)
    ]
    return replace(tail, arrays=tuple(written))
