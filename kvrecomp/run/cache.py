"""What is cached: pure pytrees, passed in and returned, never hidden in a module.

    Cache -> blocks, a tuple of Block a layer, in token order
          -> Recent: the tails, and where each row is

A block's arrays, tokens first, are copied whole: a slice of a host array would be read by a kernel over the link
instead of by the copy engine. Its form, memory and codec are static, so they select the program.

    activations              x [s, b, hidden]
    keys_values on device    K [s, b, kv_heads, head_dim] and V alike
    keys_values on host      both in one, [s, 2, b, kv_heads, head_dim]
    packed                   bytes, uint8[n]; see `plan.codecs`
    fp8, int8, int4          one array or three of each tensor; on host the bytes of all of them, uint8[n]

A host block is one array because XLA keeps two copies under way: as two arrays, one block would be both, and the next
block's copy would make XLA await one of them before its time. On the device K and V are two arrays because scores over
a part of an array take longer.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvrecomp.plan import LOSSLESS, BlockSpec, Codec, Form, LayerShape, Memory, Plan
from kvrecomp.plan.codecs import steps_of
from kvrecomp.plan.shapes import TENSORS
from kvrecomp.run import memory
from kvrecomp.run.codecs import InSteps, from_bytes, from_steps, pack, to_bytes, to_fp8, to_steps, unpack

STATIC: dict = {"static": True}  # part of the tree's structure, so it selects the program


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block:
    """Consecutive cached tokens of one layer, the first of them in slot `start`, int32[] on the device.

    `shape` and `dtype` are those of x, or of K and V each.
    """

    arrays: tuple[Array, ...]
    start: Array
    shape: tuple[int, ...] = field(metadata=STATIC)
    form: Form = field(metadata=STATIC)
    memory: Memory = field(metadata=STATIC)
    codec: Codec = field(default="plain", metadata=STATIC)
    dtype: Any = field(default=None, metadata=STATIC)

    @property
    def tokens(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(array.size * array.dtype.itemsize for array in self.arrays)

    @property
    def slots(self) -> Array:
        """int32[s]."""
        return self.start + jnp.arange(self.tokens)

    @property
    def tensors(self) -> tuple[Array, ...]:
        """x [s, b, h], or K and V [s, b, k, d]."""
        if self.codec == "packed":
            (data,) = self.arrays
            return unpack(data, self.shape, TENSORS[self.form])
        if self.codec not in LOSSLESS:
            return self._with_loss
        if self.form == "keys_values" and self.memory == "host":
            (both,) = self.arrays
            return both[:, 0], both[:, 1]
        return self.arrays

    @property
    def _with_loss(self) -> tuple[Array, ...]:
        """The tensors that `_written` has written."""
        arrays = self.arrays
        if self.memory == "host":
            tensors = [jax.ShapeDtypeStruct(self.shape, self.dtype)] * TENSORS[self.form]
            arrays = from_bytes(arrays[0], jax.eval_shape(functools.partial(_written, self.codec, self.form), tensors))
        if self.codec == "fp8":
            return tuple(array.astype(self.dtype) for array in arrays)
        each = zip(steps_of(self.codec, self.form), arrays[::3], arrays[1::3], arrays[2::3], strict=True)
        return tuple(from_steps(InSteps(*of_tensor), steps, self.shape) for steps, *of_tensor in each)

    def as_plain(self) -> "Block":
        """The block, on the device, with its numbers as they are."""
        return self if self.codec == "plain" else replace(self, arrays=self.tensors, memory="device", codec="plain")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recent:
    """What a step changes; all of it on the device.

    `tails` has each layer's arrays, of which each row's first tokens are in use, and `forms` what they hold. `start`
    int32[] is the slot of a tail's first token, `lengths` int32[b] the number of slots that each row uses, padding
    included, and `padding` int32[b] counts its padding on the left.
    """

    tails: tuple[tuple[Array, ...], ...]
    start: Array
    lengths: Array
    padding: Array
    forms: tuple[Form, ...] = field(metadata=STATIC)

    def tail(self, layer: int) -> Block:
        """The tail of a layer, as a block."""
        tail = self.tails[layer]
        return Block(tail, self.start, tail[0].shape, self.forms[layer], "device")

    def slots(self, tokens: int) -> Array:
        """int32[b, q]: those of so many new tokens of each row."""
        return self.lengths[:, None] + jnp.arange(tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """All that decoding remembers: each layer's blocks, and what is recent.

    `sketches` are copies with loss of each layer's host blocks, in order, where drafts are made over them. `in_tail` is
    how many tokens of every row that goes on are in a tail at least, as the host knows without asking the
    device.
    """

    blocks: tuple[tuple[Block, ...], ...]
    recent: Recent
    in_tail: int = field(metadata=STATIC)
    sketches: tuple[tuple[Block, ...], ...] = ()


def tensors_of(form: Form, x: Array, key: Array, value: Array) -> tuple[Array, ...]:
    """What the form has of tokens: x, or K and V."""
    return (x,) if form == "activations" else (key, value)


def make_block(spec: BlockSpec, tensors: Sequence[Array], start: Array) -> tuple[Block, Array]:
    """Of x [s, b, h], or K and V [s, b, k, d], arranged as in that memory; and bool[]: whether they cannot be packed as
    they should be, and the block is of no use."""
    shape, dtype, overflowed = tensors[0].shape, tensors[0].dtype, jnp.bool_(False)
    if spec.codec == "packed":
        data, overflowed = pack(tensors)
        tensors = (data,)
    elif spec.codec not in LOSSLESS:
        tensors = _written(spec.codec, spec.form, tensors)
        tensors = [to_bytes(tensors)] if spec.memory == "host" else tensors
    elif spec.form == "keys_values" and spec.memory == "host":
        tensors = (jnp.stack(tensors, axis=1),)
    return Block(tuple(tensors), start, shape, spec.form, spec.memory, spec.codec, dtype), overflowed


def _written(codec: Codec, form: Form, tensors: Sequence[Array]) -> list[Array]:
    """Arrays that have the tensors of a block with loss."""
    if codec == "fp8":
        return list(map(to_fp8, tensors))
    each = zip(tensors, steps_of(codec, form), strict=True)
    return [array for tensor, steps in each for array in to_steps(tensor, steps)]


def cut(specs: Sequence[BlockSpec], x: Array, key: Array, value: Array) -> tuple[tuple[Block, ...], Array]:
    """The newest tokens of a layer's prompt, x [s, b, h] and K and V [s, b, k, d], as the blocks that a plan lists; and
    bool[]: whether one of them cannot be packed."""
    blocks: list[Block] = []
    overflowed, start = jnp.bool_(False), len(x) - sum(spec.tokens for spec in specs)
    for spec in specs:
        tensors = [tensor[start : start + spec.tokens] for tensor in tensors_of(spec.form, x, key, value)]
        block, too_many = make_block(spec, tensors, jnp.int32(start))
        blocks.append(block)
        overflowed |= too_many
        start += spec.tokens
    return tuple(blocks), overflowed


def sketched(blocks: Sequence[Block], sketches: Sequence[Block]) -> tuple[Block, ...]:
    """A layer's blocks with the sketches of those in host memory in their place."""
    copies = iter(sketches)
    return tuple(next(copies) if block.memory == "host" else block for block in blocks)


def append(tail: Block, slots: Array, x: Array, key: Array, value: Array) -> Block:
    """The tail with new tokens, x [b, q, h], K and V [b, q, k, d], in slots int32[b, q], but for those that it has no
    room for; written in place where it is donated."""
    rows, places = jnp.arange(len(slots))[:, None], slots - tail.start
    written = [
        array.at[places, rows].set(
            tensor.astype(array.dtype), mode="drop", unique_indices=True, wrap_negative_indices=False
        )
        for array, tensor in zip(tail.arrays, tensors_of(tail.form, x, key, value), strict=True)
    ]
    return replace(tail, arrays=tuple(written))


# --- abstract arrays, to lower programs with --------------------------------------------------------------------------


def describe_blocks(plan: Plan, write_outs: int) -> tuple[tuple[Block, ...], ...]:
    """The blocks of every layer after that many write-outs."""
    return tuple(
        tuple(_describe(spec, shape, plan.workload.batch, plan.shape.dtype) for spec in specs)
        for specs, shape in zip(plan.blocks(write_outs), plan.shape.layers, strict=True)
    )


def describe_sketches(plan: Plan, write_outs: int) -> tuple[tuple[Block, ...], ...]:
    """Those of every layer after that many write-outs; none where the plan has no sketch."""
    if plan.sketched is None:
        return ()
    every = describe_blocks(plan.sketched, write_outs)
    return tuple(
        tuple(block for block, spec in zip(blocks, specs, strict=True) if spec.memory == "host")
        for blocks, specs in zip(every, plan.blocks(write_outs), strict=True)
    )


@functools.lru_cache(maxsize=1024)
def _describe(spec: BlockSpec, layer: LayerShape, batch: int, dtype: str) -> Block:
    of_token = (layer.hidden,) if spec.form == "activations" else (layer.kv_heads, layer.head_dim)
    tensors = [jax.ShapeDtypeStruct((spec.tokens, batch, *of_token), dtype)] * TENSORS[spec.form]
    block, _ = jax.eval_shape(lambda tensors: make_block(spec, tensors, jnp.int32(0)), tensors)
    arrays = tuple(memory.describe(array.shape, array.dtype, spec.memory) for array in block.arrays)
    return replace(block, arrays=arrays, start=describe_ints())


def describe_recent(plan: Plan) -> Recent:
    """What is recent, at any step."""
    tails = [
        _describe(layer.tail_block(plan.room), shape, plan.workload.batch, plan.shape.dtype)
        for layer, shape in zip(plan.layers, plan.shape.layers, strict=True)
    ]
    forms: tuple[Form, ...] = tuple(layer.tail_form for layer in plan.layers)
    arrays = tuple(tail.arrays for tail in tails)
    batch = plan.workload.batch
    return Recent(arrays, describe_ints(), describe_ints(batch), describe_ints(batch), forms)


def describe_ints(*shape: int) -> Any:
    """int32 on the device."""
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=memory.sharding("device"))


def describe_like(arrays: Any) -> Any:
    """A tree of arrays on the device."""
    device = memory.sharding("device")
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device), arrays)


def shardings(blocks: Any) -> Any:
    """The sharding of every array in a tree of blocks and arrays, those that are in no block being on the device."""

    def sharding(node: Any) -> Any:
        device = memory.sharding("device")
        if not isinstance(node, Block):
            return device
        return replace(node, arrays=(memory.sharding(node.memory),) * len(node.arrays), start=device)

    return jax.tree.map(sharding, blocks, is_leaf=lambda node: isinstance(node, Block))


# --- what is recent before the first step -----------------------------------------------------------------------------


def after_prompt(plan: Plan, padding: Array) -> Recent:
    """What is recent when a prompt is cached, its rows padded by int32[b]; within a program."""
    like, prompt = describe_recent(plan), jnp.int32(plan.workload.prompt)
    # Unused slots are masked, and must be finite for that.
    tails = jax.tree.map(lambda tail: jnp.zeros(tail.shape, tail.dtype), like.tails)
    return replace(like, tails=tails, start=prompt, lengths=jnp.full_like(padding, prompt), padding=padding)


def allocate_recent(plan: Plan) -> Recent:
    """The same outside of a program, with rows that are not padded."""
    empty = jax.tree.map(lambda like: memory.zeros(like.shape, like.dtype, "device"), describe_recent(plan))
    prompt, batch = np.int32(plan.workload.prompt), plan.workload.batch
    start, lengths = jax.device_put((prompt, np.full(batch, prompt)), memory.sharding("device"))
    return replace(empty, start=start, lengths=lengths)
