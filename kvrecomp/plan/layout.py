"""The plan: which blocks of which layer are cached in which form and memory.

    Plan -> LayerPlan (one a layer) -> BlockSpec(form, memory, tokens, codec) (consecutive tokens, in order)

A prompt becomes the layer's `prompt` blocks. Generated tokens collect in the `tail`; each time it is full it becomes a
block, in the memory that the layer's `write_out_memories` say, written as its `write_out_codecs` say.
"""

import dataclasses
import functools
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rich.console import Console
from rich.table import Table

from kvrecomp.plan.codecs import CODECS, LOSSLESS, PACKED_DTYPE, Codec, codec_bytes
from kvrecomp.plan.drafting import Drafting, tail_room
from kvrecomp.plan.shapes import (
    FORMS,
    GIB,
    MEMORIES,
    METHODS,
    MOST_NUMBERS,
    TENSORS,
    Form,
    LayerShape,
    Memory,
    Method,
    ModelShape,
    PlanError,
    check_choice,
    check_positive,
)
from kvrecomp.plan.table import format_bytes, plan_table
from kvrecomp.plan.workload import Workload

Schedule = Literal["pipelined", "layerwise"]
Order = Literal["row", "column"]

AUTO = "auto"  # the name of the plan that the scheduler makes
DEFAULT_WINDOW = GIB
MOST_BLOCKS = 4096  # of a layer's prompt, and as many written out: a program of so many takes hours to compile


@dataclass(frozen=True)
class BlockSpec:
    """Consecutive cached tokens of one layer, whose arrays are copied whole."""

    form: Form
    memory: Memory
    tokens: int
    codec: Codec = "plain"

    def __post_init__(self):
        check_choice(self, FORMS, self.form)
        check_choice(self, MEMORIES, self.memory)
        check_choice(self, CODECS, self.codec)
        check_positive(self, tokens=self.tokens)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer caches: the prompt's blocks in order, the tail's form, and where its written-out blocks go.

    `write_out_memories[i]` and `write_out_codecs[i]` are the memory and the codec of the i-th block written out; the
    last entries hold for all after it. `method` says how activations are used: `absorb` attends over them directly
    where the model allows, `recompute` projects K and V.
    `weights` is the memory of the layer's matrices; those in `host` cross the link once a step.
    """

    prompt: tuple[BlockSpec, ...]
    tail_form: Form = "activations"
    write_out_memories: tuple[Memory, ...] = ("host",)
    method: Method = "absorb"
    weights: Memory = "device"
    write_out_codecs: tuple[Codec, ...] = ("plain",)

    def __post_init__(self):
        check_choice(self, FORMS, self.tail_form)
        check_choice(self, METHODS, self.method)
        check_choice(self, MEMORIES, self.weights, *self.write_out_memories)
        check_choice(self, CODECS, *self.write_out_codecs)
        if not self.write_out_memories or not self.write_out_codecs:
            raise PlanError("LayerPlan: write_out_memories and write_out_codecs must say how blocks are written out")

    def blocks(self, write_outs: int, tail_tokens: int) -> tuple[BlockSpec, ...]:
        """The layer's blocks after that many write-outs of the tail."""
        written_out = {
            kind: BlockSpec(self.tail_form, kind[0], tail_tokens, kind[1])
            for kind in set(map(self.written_to, range(write_outs)))
        }
        return self.prompt + tuple(written_out[self.written_to(number)] for number in range(write_outs))

    def tail_block(self, tokens: int) -> BlockSpec:
        """The tail, of so many tokens, as a block."""
        return BlockSpec(self.tail_form, "device", tokens)

    def written_to(self, write_outs: int) -> tuple[Memory, Codec]:
        """Where the tail goes when it is written out the given time, counted from 0, and how it is written."""
        memories, codecs = self.write_out_memories, self.write_out_codecs
        return memories[min(write_outs, len(memories) - 1)], codecs[min(write_outs, len(codecs) - 1)]

    def sketched(self, codec: Codec, shape: LayerShape) -> "LayerPlan":
        """The layer with copies on the device, written as the codec says, in place of its blocks in host memory.

        Nothing is to be recomputed for each draft: what can be is absorbed, and where K cannot, a prompt's copies are K
        and V.
        """

        def copy(block: BlockSpec) -> BlockSpec:
            if block.memory == "device":
                return block
            form = block.form if shape.absorbs_keys else "keys_values"
            return BlockSpec(form, "device", block.tokens, codec)

        written = [
            self.written_to(number) for number in range(max(len(self.write_out_memories), len(self.write_out_codecs)))
        ]
        codecs = tuple(codec if memory == "host" else own for memory, own in written)
        return dataclasses.replace(
            self,
            prompt=tuple(map(copy, self.prompt)),
            write_out_memories=("device",),
            method="absorb",
            write_out_codecs=codecs,
        )

    def plain_from(self, write_outs: int | None) -> "LayerPlan":
        """The same with plain blocks in place of packed ones from that write-out on; None: of all."""
        first = write_outs or 0
        numbers = range(max(len(self.write_out_codecs), first + 1))
        written: list[Codec] = [self.written_to(number)[1] for number in numbers]
        codecs = (*written[:first], *map(_unpacked, written[first:]))
        prompt = self.prompt
        if write_outs is None:
            prompt = tuple(dataclasses.replace(block, codec=_unpacked(block.codec)) for block in prompt)
        return dataclasses.replace(self, prompt=prompt, write_out_codecs=codecs)


def _unpacked(codec: Codec) -> Codec:
    return "plain" if codec == "packed" else codec


@dataclass(frozen=True)
class Plan:
    """What is cached in which form and memory, for one model shape and workload.

    `tail` is in tokens; `window` is how many bytes of blocks from the host may be in flight or in use at once, beside
    the weights of two layers where those are in host memory. `schedule` is `pipelined`, where copies run ahead across
    layers as far as the window allows, or `layerwise`, KVPR's own, where a layer's first copy starts when the
    layer before is done, and another when the one before it has arrived.

    There may be several `groups` of the workload's rows, each with blocks of its own like the others'. In `row` order a
    step is done for one group after the other; in `column` order all groups go through a layer before the next layer
    begins, and weights in host memory are copied once for all of them. With `drafting` several tokens are checked in a
    step.
    """

    name: str
    shape: ModelShape
    workload: Workload
    layers: tuple[LayerPlan, ...]
    tail: int
    window: int = DEFAULT_WINDOW
    schedule: Schedule = "pipelined"
    groups: int = 1
    order: Order = "row"
    drafting: Drafting | None = None
    reason: str = ""

    def __post_init__(self):
        check_positive(self, tail=self.tail, window=self.window, groups=self.groups)
        check_choice(self, get_args(Order), self.order)
        check_choice(self, get_args(Schedule), self.schedule)
        if len(self.layers) != len(self.shape.layers):
            raise PlanError(f"Plan: {len(self.layers)} layer plans for a model of {len(self.shape.layers)} layers")
        total = self.workload.prompt + self.workload.new
        if total > self.shape.positions:
            raise PlanError(
                f"a prompt of {self.workload.prompt} and {self.workload.new} new tokens need {total} positions; "
                f"{self.shape.name} has {self.shape.positions}: shorten one of them"
            )
        if self.write_outs > MOST_BLOCKS:
            raise PlanError(
                f"plan {self.name}: {self.workload.new} new tokens fill a tail of {self.tail} {self.write_outs} times; "
                f"{MOST_BLOCKS} may be written out: use a longer tail"
            )
        if "packed" in self.codecs and self.shape.dtype != PACKED_DTYPE:
            raise PlanError(
                f"plan {self.name} has packed blocks, which are of {PACKED_DTYPE} numbers; {self.shape.name} is in "
                f"{self.shape.dtype}: use plain blocks"
            )
        for kind, (layer, layer_shape) in enumerate(self.distinct_layers):
            number = self.distinct_numbers.index(kind)
            tokens = sum(block.tokens for block in layer.prompt)
            if tokens != (cached := layer_shape.cached(self.workload.prompt)):
                raise PlanError(f"layer {number}: its blocks hold {tokens} tokens; of the prompt {cached} are cached")
            for block in layer.blocks(self.write_outs, self.tail):
                size = self.bytes_of(layer_shape, block)
                if self.groups * size > MOST_NUMBERS:
                    raise PlanError(
                        f"layer {number}: a block of {block.tokens} tokens in {self.groups} groups of "
                        f"{self.workload.batch} rows takes more bytes than any memory has: use less of one of these"
                    )
                if block.memory == "host" and size > self.window:
                    raise PlanError(
                        f"layer {number}: the window of {format_bytes(self.window)} is smaller than a block of "
                        f"{block.tokens} tokens, {format_bytes(size)}: use a larger window or smaller blocks"
                    )

    @functools.cached_property
    def distinct_layers(self) -> dict[tuple[LayerPlan, LayerShape], int]:
        """How many layers there are of each kind: planned alike and of the same shape."""
        return {kind: self.distinct_numbers.count(number) for number, kind in enumerate(self._numbered[0])}

    @property
    def distinct_numbers(self) -> tuple[int, ...]:
        """For each layer, which of `distinct_layers` it is."""
        return self._numbered[1]

    @functools.cached_property
    def _numbered(self) -> tuple[list[tuple[LayerPlan, LayerShape]], tuple[int, ...]]:
        """The kinds, in the order in which they occur, and `distinct_numbers`.

        Layers that are the very same objects are told to be alike by that: hashing all of many layers takes long.
        """
        numbers: dict[tuple[LayerPlan, LayerShape], int] = {}
        known: dict[tuple[int, int], int] = {}
        of_layers: list[int] = []
        for kind in zip(self.layers, self.shape.layers):
            objects = id(kind[0]), id(kind[1])
            if objects not in known:
                known[objects] = numbers.setdefault(kind, len(numbers))
            of_layers.append(known[objects])
        return list(numbers), tuple(of_layers)

    def bytes_of(self, layer_shape: LayerShape, block: BlockSpec) -> int:
        """Bytes of a block of that layer."""
        channels = layer_shape.width(block.form) // TENSORS[block.form]
        return codec_bytes(block.codec, block.form, block.tokens, self.workload.batch, channels, self.shape.itemsize)

    @functools.cached_property
    def codecs(self) -> tuple[Codec, ...]:
        """The codecs that blocks have, in the order of CODECS."""
        found = {block.codec for layer, _ in self.distinct_layers for block in layer.blocks(self.write_outs, self.tail)}
        return tuple(codec for codec in CODECS if codec in found)

    @property
    def lossless(self) -> bool:
        """Whether all blocks keep their numbers."""
        return all(codec in LOSSLESS for codec in self.codecs)

    def plain_from(self, layers: Collection[int], write_outs: int | None = None) -> "Plan":
        """The plan with plain blocks in place of packed ones in these layers, from that write-out on; None: of all."""
        kept = enumerate(self.layers)
        plans = (layer.plain_from(write_outs) if number in layers else layer for number, layer in kept)
        return dataclasses.replace(self, layers=tuple(plans))

    @functools.cached_property
    def sketched(self) -> "Plan | None":
        """The plan by which drafts are made over a sketch; None where they are not."""
        if self.drafting is None or self.drafting.codec is None:
            return None
        codec = self.drafting.codec
        copies = {kind: kind[0].sketched(codec, kind[1]) for kind in self.distinct_layers}
        kinds = list(self.distinct_layers)
        layers = tuple(copies[kinds[number]] for number in self.distinct_numbers)
        return dataclasses.replace(self, name=f"{self.name}, sketched", layers=layers, reason="")

    def sketch_bytes(self, write_outs: int = 0) -> int:
        """Bytes of the sketches of all groups."""
        if self.sketched is None:
            return 0
        return self.sketched.bytes_in("device", write_outs) - self.bytes_in("device", write_outs)

    @property
    def room(self) -> int:
        """Tokens that the tail has room for."""
        return tail_room(self.drafting, self.tail, self.workload.new)

    @property
    def tokens_per_step(self) -> int:
        """New tokens of a row that go through a step, at most."""
        return 1 + (self.drafting.most if self.drafting else 0)

    @functools.cached_property
    def drafts_under_copies(self) -> bool:
        """Whether a group's drafts are made in the step of the group before it, while that waits for copies.

        Those over a sketch, of groups in row order. Weights in host memory would be copied for them too; an assistant
        would have to see what the first group takes in its first round, which has no drafts yet.
        """
        in_turn = self.groups > self.groups_per_pass and self.schedule == "pipelined" and not self.host_weight_bytes
        return self.sketched is not None and in_turn and self.bytes_in("host", self.write_outs) > 0

    @property
    def draft_counts(self) -> Sequence[int]:
        """How many drafts a round may have. Under copies all or none: a GPU reads how often a loop goes round behind
        all copies that are on their way, so the loops are of a number that is known."""
        most = self.tokens_per_step - 1
        return (0, most) if self.drafts_under_copies else range(most + 1)

    @property
    def write_outs(self) -> int:
        """How often the tail is written out: when full, and only if another token follows."""
        return max(0, (self.workload.new - 1) // self.tail)

    def written_to(self, write_outs: int) -> tuple[tuple[Memory, Codec], ...]:
        """Where each layer's tail goes when it is written out the given time, counted from 0, and how it is written."""
        return tuple(layer.written_to(write_outs) for layer in self.layers)

    def blocks(self, write_outs: int = 0) -> tuple[tuple[BlockSpec, ...], ...]:
        """The blocks of every layer after that many write-outs."""
        return tuple(layer.blocks(write_outs, self.tail) for layer in self.layers)

    def bytes_in(self, memory: Memory, write_outs: int = 0, in_sight: bool = False) -> int:
        """Bytes of the blocks of all groups in that memory: of all, or of those that a step attends to."""
        total = 0
        for (layer, layer_shape), count in self.distinct_layers.items():
            blocks = layer.blocks(write_outs, self.tail)
            blocks = layer_shape.in_sight(blocks) if in_sight else blocks
            total += count * sum(self.bytes_of(layer_shape, block) for block in blocks if block.memory == memory)
        return self.groups * total

    def weight_bytes(self, layer: LayerPlan, layer_shape: LayerShape) -> int:
        """Bytes of the layer's weights in host memory."""
        return layer_shape.parameters * self.shape.itemsize if layer.weights == "host" else 0

    @property
    def most_weight_bytes(self) -> int:
        """The same of the layer that has most there."""
        return max(self.weight_bytes(*layer) for layer in self.distinct_layers)

    @property
    def host_weight_bytes(self) -> int:
        """Bytes of all weights in host memory."""
        return sum(count * self.weight_bytes(*kind) for kind, count in self.distinct_layers.items())

    @property
    def whole_window(self) -> int:
        """Bytes from the host that may be in flight or in use at once."""
        return self.window + 2 * self.most_weight_bytes

    @property
    def rows(self) -> int:
        """Rows of all groups."""
        return self.groups * self.workload.batch

    @property
    def groups_per_pass(self) -> int:
        """How many groups go through a layer together, using its weights."""
        return self.groups if self.order == "column" else 1

    def link_bytes(self, write_outs: int = 0) -> int:
        """Bytes that a step of all groups copies from the host: blocks in sight and weights."""
        blocks = self.bytes_in("host", write_outs, in_sight=True)
        return blocks + self.host_weight_bytes * (self.groups // self.groups_per_pass)

    @property
    def tail_bytes(self) -> int:
        """Bytes of the tails of all layers and groups."""
        return self.groups * sum(
            count * self.bytes_of(layer_shape, layer.tail_block(self.room))
            for (layer, layer_shape), count in self.distinct_layers.items()
        )

    def table(self) -> Table:
        """A table for a terminal: tokens and bytes per layer in each form and memory, layers alike in one line."""
        return plan_table(self)

    def __str__(self) -> str:
        console = Console(width=120, record=True, file=io.StringIO(), force_jupyter=False)
        console.print(self.table())
        return console.export_text().rstrip()
