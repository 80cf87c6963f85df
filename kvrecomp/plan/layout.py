"""Plain data: the sizes of a model, the work, the memory to do it in, and the plan that says what is cached where.

A layer caches either of two forms of a token, in numbers per token and row:

    activations    hidden                      what K and V are projected from
    keys_values    2 * kv_heads * head_dim     K and V themselves

in either of two memories: `device` or `host` (pinned, behind the link). A `Plan` lists the blocks of every layer:

    Plan -> LayerPlan (one a layer) -> BlockSpec(form, memory, tokens) (consecutive tokens, in order)

A prompt becomes the layer's `prompt` blocks. Generated tokens collect in the `tail`; each time it is full it becomes a
block, in the memory that the layer's `write_out_memories` says.

Nothing here imports jax: a plan can be made, printed and compared anywhere.
"""

import collections
import dataclasses
import functools
import io
import itertools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args

from rich import box
from rich.console import Console
from rich.table import Table

Form = Literal["activations", "keys_values"]
Memory = Literal["device", "host"]
Method = Literal["absorb", "recompute"]
Schedule = Literal["pipelined", "layerwise"]
Order = Literal["row", "column"]


class _Sized(Protocol):
    @property
    def tokens(self) -> int: ...


AnyBlock = TypeVar("AnyBlock", bound=_Sized)
"""A block, or what a plan says of one."""

FORMS: tuple[Form, ...] = get_args(Form)
MEMORIES: tuple[Memory, ...] = get_args(Memory)
METHODS: tuple[Method, ...] = get_args(Method)

AUTO = "auto"  # the name of the plan that the scheduler makes

MIB = 2**20
GIB = 2**30
DEFAULT_WINDOW = GIB
# Kernels over a block are fastest where its tokens are a multiple of this. On an H100 layers of Llama-2-7B with 32 rows
# take 1.2 ms with 480 activations, absorbed, 2.4 with 481, 1.3 with 512; keys and values a tenth longer.
ALIGNED = 32
LEAST_ALIGNED = 8 * ALIGNED  # tokens: for fewer that is too coarse, and kernels are short
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


class PlanError(ValueError):
    """A plan, workload or budget that cannot be carried out; the message says what would work."""


def _check_positive(thing: object, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral):
            raise PlanError(f"{type(thing).__name__}: {name} is {size!r}; it must be a whole number")
        if size <= 0:
            raise PlanError(f"{type(thing).__name__}: {name} is {size}; it must be greater than zero")


def _check_choice(thing: object, choices: Any, *values: str) -> None:
    for value in values:
        if value not in choices:
            raise PlanError(f"{type(thing).__name__}: {value!r} is not one of {', '.join(choices)}")


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one transformer layer.

    `gated` feed-forwards have three matrices (gate, up, down) where others have two. `absorbs_keys` says that K is a
    plain projection of the activations, so that it can be absorbed into the query; a rotation or a normalisation of K
    forbids it. `sliding_window` is how many tokens, itself included, a token sees; None: all.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool = False
    absorbs_keys: bool = True
    sliding_window: int | None = None

    def __post_init__(self):
        _check_positive(self, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)[:5]})
        if self.sliding_window is not None:
            _check_positive(self, sliding_window=self.sliding_window)
        if self.heads % self.kv_heads:
            raise PlanError(f"LayerShape: {self.heads} heads do not divide into {self.kv_heads} key-value heads")

    def width(self, form: Form) -> int:
        """Numbers cached for one token of one row."""
        return self.hidden if form == "activations" else 2 * self.kv_heads * self.head_dim

    def cached(self, prompt: int) -> int:
        """How many of a prompt's tokens are cached: the newest, which the next token sees, at least one, and a few more
        where that makes a multiple of ALIGNED."""
        if self.sliding_window is None:
            return prompt
        seen = max(1, self.sliding_window - 1)
        return min(prompt, seen + -seen % ALIGNED if uneven(seen) else seen)

    def in_sight(self, blocks: Sequence[AnyBlock]) -> tuple[AnyBlock, ...]:
        """Of the layer's blocks, in order and up to the newest cached token, those of which the next token sees any."""
        if self.sliding_window is None:
            return tuple(blocks)
        seen: list[AnyBlock] = []
        newer = 0
        for block in reversed(blocks):
            if newer < self.sliding_window - 1:
                seen.append(block)
            newer += block.tokens
        return tuple(reversed(seen))

    @property
    def matrices(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Weights of each matrix in the order of use: K's, V's and Q's projection, then those after the attention."""
        key, query = self.hidden * self.kv_heads * self.head_dim, self.hidden * self.heads * self.head_dim
        return (key, key, query), (query, *(self.hidden * self.intermediate,) * (3 if self.gated else 2))

    @property
    def projecting(self) -> int:
        """Weights of the projections that make Q, K and V."""
        return sum(self.matrices[0])

    @property
    def absorbed(self) -> int:
        """Those of them that are absorbed by attention over activations: of V and, where it may be, of K."""
        key, value, _ = self.matrices[0]
        return value + key * self.absorbs_keys

    @property
    def parameters(self) -> int:
        """Weights of the layer, biases and norms left out."""
        return sum(map(sum, self.matrices))


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model: `embedding` is the width of its token table, `positions` the most tokens a row may have."""

    name: str
    layers: tuple[LayerShape, ...]
    vocab: int
    embedding: int
    positions: int
    dtype: str = "bfloat16"
    tied: bool = True

    def __post_init__(self):
        _check_positive(self, layers=len(self.layers), vocab=self.vocab, positions=self.positions)
        if self.dtype not in _ITEMSIZE:
            raise PlanError(f"ModelShape: dtype is {self.dtype!r}; it must be one of {', '.join(_ITEMSIZE)}")

    @property
    def itemsize(self) -> int:
        """Bytes of one number, weights and cache alike."""
        return _ITEMSIZE[self.dtype]

    @property
    def parameters(self) -> int:
        """Weights of the layers, the token table and the head; biases, norms and OPT's positions, 1.3 % of OPT-125M and
        less of larger models, are left out."""
        layers = sum(count * layer.parameters for layer, count in self.distinct_layers.items())
        return layers + self.vocab * self.embedding * (1 if self.tied else 2)

    @functools.cached_property
    def distinct_layers(self) -> dict[LayerShape, int]:
        """How many layers there are of each shape, in the order in which they occur."""
        return dict(collections.Counter(self.layers))


@dataclass(frozen=True)
class Workload:
    """`batch` rows with prompts of `prompt` tokens (padding included), continued by `new` tokens."""

    batch: int
    prompt: int
    new: int

    def __post_init__(self):
        _check_positive(self, batch=self.batch, prompt=self.prompt, new=self.new)

    def __str__(self) -> str:
        return f"batch {self.batch}, prompt {self.prompt}, {self.new} new"


@dataclass(frozen=True)
class Budget:
    """Bytes that a plan may use, weights included, on the device and of pinned host memory; None: what is free."""

    device: float | None = None
    host: float | None = None

    def __post_init__(self):
        for name, size in (("device", self.device), ("host", self.host)):
            if size is not None and not isinstance(size, numbers.Real):
                raise PlanError(f"Budget: {name} is {size!r}; it must be a number, or None for what is free")
        if self.device is not None and not self.device > 0:
            raise PlanError(f"Budget: device is {self.device} bytes; it must be greater than zero")
        if self.host is not None and not self.host >= 0:
            raise PlanError(f"Budget: host is {self.host} bytes; it must not be negative")

    @classmethod
    def of_gib(cls, device: float | None = None, host: float | None = None) -> "Budget":
        """From GiB, as flags give them."""
        return cls(*(size * GIB if isinstance(size, numbers.Real) else size for size in (device, host)))


@dataclass(frozen=True)
class BlockSpec:
    """Consecutive cached tokens of one layer: one array per tensor, copied whole."""

    form: Form
    memory: Memory
    tokens: int

    def __post_init__(self):
        _check_choice(self, FORMS, self.form)
        _check_choice(self, MEMORIES, self.memory)
        _check_positive(self, tokens=self.tokens)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer caches: the prompt's blocks in order, the tail's form, and where its written-out blocks go.

    `write_out_memories[i]` is the memory of the i-th block written out; the last entry holds for all after it. `method`
    says how activations are used: `absorb` attends over them directly where the model allows, `recompute` projects K
    and V.
    `weights` is the memory of the layer's matrices; those in `host` cross the link once a step.
    """

    prompt: tuple[BlockSpec, ...]
    tail_form: Form = "activations"
    write_out_memories: tuple[Memory, ...] = ("host",)
    method: Method = "absorb"
    weights: Memory = "device"

    def __post_init__(self):
        _check_choice(self, FORMS, self.tail_form)
        _check_choice(self, METHODS, self.method)
        _check_choice(self, MEMORIES, self.weights, *self.write_out_memories)
        if not self.write_out_memories:
            raise PlanError("LayerPlan: write_out_memories is empty; it must say where written-out blocks go")

    def blocks(self, write_outs: int, tail_tokens: int) -> tuple[BlockSpec, ...]:
        """The layer's blocks after that many write-outs of the tail."""
        written_out = {memory: BlockSpec(self.tail_form, memory, tail_tokens) for memory in MEMORIES}
        return self.prompt + tuple(written_out[self.written_to(number)] for number in range(write_outs))

    def written_to(self, write_outs: int) -> Memory:
        """Where the tail goes when it is written out the given time, counted from 0."""
        return self.write_out_memories[min(write_outs, len(self.write_out_memories) - 1)]


@dataclass(frozen=True)
class Plan:
    """What is cached in which form and memory, for one model shape and workload.

    `tail` is in tokens; `window` is how many bytes of blocks from the host may be in flight or in use at once, beside
    the weights of two layers where those are in host memory. `schedule` is `pipelined`, where copies run ahead across
    layers as far as the window allows, or `layerwise`, KVPR's own, where a layer's first copy starts when the
    layer before is done, and another when the one before it has arrived.

    There may be several `groups` of the workload's rows, each with blocks of its own like the others'. In `row` order a
    step is done for one group after the other; in `column` order all groups go through a layer before the next layer
    begins, and weights in host memory are copied once for all of them.
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
    reason: str = ""

    def __post_init__(self):
        _check_positive(self, tail=self.tail, window=self.window, groups=self.groups)
        _check_choice(self, get_args(Order), self.order)
        _check_choice(self, get_args(Schedule), self.schedule)
        if len(self.layers) != len(self.shape.layers):
            raise PlanError(f"Plan: {len(self.layers)} layer plans for a model of {len(self.shape.layers)} layers")
        total = self.workload.prompt + self.workload.new
        if total > self.shape.positions:
            raise PlanError(
                f"a prompt of {self.workload.prompt} and {self.workload.new} new tokens need {total} positions; "
                f"{self.shape.name} has {self.shape.positions}: shorten one of them"
            )
        for kind, (layer, layer_shape) in enumerate(self.distinct_layers):
            number = self.distinct_numbers.index(kind)
            tokens = sum(block.tokens for block in layer.prompt)
            if tokens != (cached := layer_shape.cached(self.workload.prompt)):
                raise PlanError(f"layer {number}: its blocks hold {tokens} tokens; of the prompt {cached} are cached")
            for block in layer.blocks(self.write_outs, self.tail):
                size = self.bytes_of(layer_shape, block)
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
        return block.tokens * self.workload.batch * layer_shape.width(block.form) * self.shape.itemsize

    @property
    def write_outs(self) -> int:
        """How often the tail is written out: when full, and only if another token follows."""
        return max(0, (self.workload.new - 1) // self.tail)

    def written_to(self, write_outs: int) -> tuple[Memory, ...]:
        """Where each layer's tail goes when it is written out the given time, counted from 0."""
        return tuple(layer.written_to(write_outs) for layer in self.layers)

    def blocks(self, write_outs: int = 0) -> tuple[tuple[BlockSpec, ...], ...]:
        """The blocks of every layer after that many write-outs."""
        return tuple(layer.blocks(write_outs, self.tail) for layer in self.layers)

    def bytes_in(self, memory: Memory, write_outs: int = 0, in_sight: bool = False) -> int:
        """Bytes of the blocks of all groups in that memory: of all, or of those that a step attends to."""
        total = 0
        for (layer, layer_shape), count in self.distinct_layers.items():
            blocks = layer.blocks(write_outs, self.tail)
            own = layer_shape.in_sight(blocks) if in_sight else blocks
            total += count * sum(self.bytes_of(layer_shape, block) for block in own if block.memory == memory)
        return self.groups * total

    def weight_bytes(self, layer: LayerPlan, layer_shape: LayerShape) -> int:
        """Bytes of the layer's weights in host memory."""
        return layer_shape.parameters * self.shape.itemsize if layer.weights == "host" else 0

    @property
    def host_weight_bytes(self) -> int:
        """Bytes of all weights in host memory."""
        return sum(count * self.weight_bytes(*kind) for kind, count in self.distinct_layers.items())

    @property
    def whole_window(self) -> int:
        """Bytes from the host that may be in flight or in use at once."""
        return self.window + 2 * max(self.weight_bytes(*kind) for kind in self.distinct_layers)

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
            count * self.bytes_of(layer_shape, BlockSpec(layer.tail_form, "device", self.tail))
            for (layer, layer_shape), count in self.distinct_layers.items()
        )

    def table(self) -> Table:
        """A table for a terminal: tokens and bytes per layer in each form and memory, layers alike in one line."""
        title = f"Plan {self.name}: {self.shape.name}, {self.workload}"
        table = Table(title=title, box=box.SIMPLE, title_justify="left")
        table.add_column("layers", no_wrap=True)
        columns = [(form, memory) for memory in MEMORIES for form in FORMS]
        for form, memory in columns:
            table.add_column(f"{form.replace('_', ' and ')}\non the {memory}", justify="right")
        table.add_column("tail", justify="right")
        table.add_column("method")
        hosted = sum(layer.weights == "host" for layer in self.layers)
        if hosted:
            table.add_column("weights")
        for kind, (layer, layer_shape) in enumerate(self.distinct_layers):
            numbers = [number for number, own in enumerate(self.distinct_numbers) if own == kind]
            cells = []
            for form, memory in columns:
                blocks = [b for b in layer.prompt if (b.form, b.memory) == (form, memory)]
                tokens, size = sum(b.tokens for b in blocks), sum(self.bytes_of(layer_shape, b) for b in blocks)
                cells.append(f"{tokens} ({format_bytes(size)})" if blocks else "-")
            tail_size = self.bytes_of(layer_shape, BlockSpec(layer.tail_form, "device", self.tail))
            cells += [f"{self.tail} ({format_bytes(tail_size)})", layer.method, *([layer.weights] if hosted else [])]
            table.add_row(_spans(numbers), *cells)
        total = [f"{format_bytes(self.bytes_in(memory))} in blocks on the {memory}" for memory in MEMORIES]
        if hosted:
            own = f"{hosted} layer{'s' if hosted > 1 else ''} ({format_bytes(self.host_weight_bytes)})"
            total.append(f"weights of {own} in host memory")
        if self.groups > 1:
            total.append(f"{self.groups} groups in {self.order} order")
        caption = f"{', '.join(total)}; window {format_bytes(self.window)}; {self.schedule}"
        table.caption = f"{caption}\n{self.reason}" if self.reason else caption
        table.caption_justify = "left"
        return table

    def __str__(self) -> str:
        console = Console(width=120, record=True, file=io.StringIO(), force_jupyter=False)
        console.print(self.table())
        return console.export_text().rstrip()


def uneven(tokens: int) -> bool:
    """Whether kernels over a block of so many tokens may be slow for want of a few."""
    return tokens >= LEAST_ALIGNED and tokens % ALIGNED > 0


def _spans(numbers: Sequence[int]) -> str:
    """Numbers as spans, and as their count where those are many: "0-3, 7", "16 of 0-31"."""
    runs = [
        [number for _, number in run]
        for _, run in itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0])
    ]
    if len(runs) > 3:
        return f"{len(numbers)} of {numbers[0]}-{numbers[-1]}"
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def format_bytes(size: float) -> str:
    """Bytes for people, in powers of 1024: `format_bytes(3 * 2**20) == "3.0 MiB"`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:.2f} GiB"
