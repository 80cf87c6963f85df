"""The sizes of a model, and the words for what is cached of it and where.

A layer caches either of two forms of a token, in numbers per token and row:

    activations    hidden                      what K and V are projected from
    keys_values    2 * kv_heads * head_dim     K and V themselves

in either of two memories: `device` or `host` (pinned, behind the link).
"""

import collections
import dataclasses
import functools
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args

Form = Literal["activations", "keys_values"]
Memory = Literal["device", "host"]
Method = Literal["absorb", "recompute"]

FORMS: tuple[Form, ...] = get_args(Form)
MEMORIES: tuple[Memory, ...] = get_args(Memory)
METHODS: tuple[Method, ...] = get_args(Method)

TENSORS: Mapping[Form, int] = {"activations": 1, "keys_values": 2}  # of a block: x, or K and V

MIB = 2**20
GIB = 2**30
# Kernels over a block are fastest where its tokens are a multiple of this. On an H100 layers of Llama-2-7B with 32 rows
# take 1.2 ms with 480 activations, absorbed, 2.4 with 481, 1.3 with 512; keys and values a tenth longer.
ALIGNED = 32
LEAST_ALIGNED = 8 * ALIGNED  # tokens: for fewer that is too coarse, and kernels are short
MOST_NUMBERS = 10**15  # of a model, or of a block: their bytes are counted in 64 bits
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


class _Sized(Protocol):
    @property
    def tokens(self) -> int: ...


AnyBlock = TypeVar("AnyBlock", bound=_Sized)
"""A block, or what a plan says of one."""


class PlanError(ValueError):
    """A plan, workload or budget that cannot be carried out; the message says what would work."""


def check_positive(thing: object, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral):
            raise PlanError(f"{type(thing).__name__}: {name} is {size!r}; it must be a whole number")
        if size <= 0:
            raise PlanError(f"{type(thing).__name__}: {name} is {size}; it must be greater than zero")


def check_choice(thing: object, choices: Any, *values: str) -> None:
    for value in values:
        if value not in choices:
            raise PlanError(f"{type(thing).__name__}: {value!r} is not one of {', '.join(choices)}")


def uneven(tokens: int) -> bool:
    """Whether kernels over a block of so many tokens may be slow for want of a few."""
    return tokens >= LEAST_ALIGNED and tokens % ALIGNED > 0


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
        check_positive(self, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)[:5]})
        if self.sliding_window is not None:
            check_positive(self, sliding_window=self.sliding_window)
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
        sizes = {"layers": len(self.layers), "vocab": self.vocab, "embedding": self.embedding}
        check_positive(self, **sizes, positions=self.positions)
        if self.parameters > MOST_NUMBERS:
            raise PlanError(f"ModelShape: its weights are more than {MOST_NUMBERS}, which no machine holds: use less")
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
