"""How the numbers of a block are written, and in how many bytes; `run.codecs` writes and reads them.

plain     as they are
packed    in 12 bits a number, losslessly, of bfloat16: a sign, 8 bits of exponent and 7 of mantissa
fp8       in 8 bits a number, with loss: float8_e4m3fn
int8      in 8 bits a number and int4 in 4, with loss: whole steps above the least number of a group
int4

Packed numbers keep sign and mantissa as a byte. Of the exponent 4 bits are kept: how far below the largest of its
channel it is, a channel being a place in `hidden`, or in [kv_heads, head_dim] of K or of V. What that cannot say is
listed apart, as a place and a value, in a list of fixed room, and its code is that of a zero: sums that cancel make
many zeros, and these need no list. A block that needs more room cannot be packed.

Activations and K have channels that are far larger than others, token after token, so a group of these is a channel of
consecutive tokens; of V it is some channels of a token (Liu et al. 2024, "KIVI", arXiv 2402.02750). A step and a least
number of each group, in the dtype of the model, make them 4.25 or 4.5 bits a number of bfloat16, and 8.125 or 8.25
(cpu_quality.json has what is lost by that). A group with a number that is not finite becomes NaN.
"""

import math
from typing import Literal, NamedTuple, get_args

from kvrecomp.plan.shapes import TENSORS, Form, PlanError

Codec = Literal["plain", "packed", "fp8", "int8", "int4"]
CODECS: tuple[Codec, ...] = get_args(Codec)
LOSSLESS: tuple[Codec, ...] = ("plain", "packed")
LOSSY: tuple[Codec, ...] = ("int8", "int4")  # of blocks that texts depend on, where loss is allowed
Loss = Literal["none", "int8", "int4"]
"""Which loss is allowed: of `none`, or of that codec."""
SKETCHES: tuple[Codec, ...] = ("fp8", "int4")  # of copies that drafts are made over, which no text depends on


PACKED_DTYPE = "bfloat16"
NUMBERS_PER_ESCAPE = 1024  # the list has room for one in so many
ESCAPE = 15  # the code of zeros, and of what is listed apart
_ALIGNED = 128  # bytes; a tensor begins at a multiple


class Packed(NamedTuple):
    """Where the parts of a packed tensor end, in bytes from its start, and how many numbers can be listed apart.

    One after the other: `rest`, a byte of each number; `codes`, of the first half of the numbers in the low 4 bits and
    of the second in the high ones; `tops`, the largest exponent of each channel; `places`, int32, and `values` of those
    listed apart. `nbytes` is where the next tensor begins.
    """

    rest: int
    codes: int
    tops: int
    places: int
    values: int
    nbytes: int
    escapes: int


def check_loss(loss: str) -> None:
    """Raises `PlanError` if this is no `Loss`."""
    if loss not in get_args(Loss):
        raise PlanError(f"loss is {loss!r}; expected one of {', '.join(get_args(Loss))}")


def packed(numbers: int, channels: int) -> Packed:
    """The parts of a packed tensor of so many numbers, in so many channels."""
    escapes = -(-numbers // NUMBERS_PER_ESCAPE)
    codes = numbers + -(-numbers // 2)
    tops = codes + channels
    places = tops + 4 * escapes
    values = places + 2 * escapes
    return Packed(numbers, codes, tops, places, values, values + -values % _ALIGNED, escapes)


class Steps(NamedTuple):
    """How a codec writes a tensor in whole steps: `bits` of each number, and in groups of so many `tokens` of a channel
    or `channels` of a token, one of them 1."""

    bits: int
    tokens: int
    channels: int

    @property
    def most(self) -> int:
        """The largest number of steps."""
        return (1 << self.bits) - 1

    def shapes(self, tokens: int, batch: int, channels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of the codes, uint8, and of each of the steps and the least numbers, of a tensor [tokens, batch,
        channels]. Where two codes are in a byte they are of the two halves of the channels."""
        groups = -(-tokens // self.tokens), batch, -(-channels // self.channels)
        return (tokens, batch, -(-channels * self.bits // 8)), groups

    def nbytes(self, tokens: int, batch: int, channels: int, itemsize: int) -> int:
        """Bytes of all of that."""
        codes, groups = self.shapes(tokens, batch, channels)
        return math.prod(codes) + 2 * itemsize * math.prod(groups)


def steps_of(codec: Codec, form: Form) -> list[Steps]:
    """How each tensor of that form is written, by one of LOSSY: x, or K and V. KeyError for other codecs."""
    bits, tokens, channels = {"int8": (8, 256, 128), "int4": (4, 128, 64)}[codec]
    by_channel, by_token = Steps(bits, tokens, 1), Steps(bits, 1, channels)
    return [by_channel] if form == "activations" else [by_channel, by_token]


def token_bytes(codec: Codec, form: Form, batch: int, channels: int, itemsize: int) -> tuple[float, int]:
    """What a block takes at most: bytes for each token of its tensors [batch, channels], and for the block."""
    if codec == "packed":
        parts, tensors = packed(batch * channels * NUMBERS_PER_ESCAPE, channels), TENSORS[form]
        return tensors * (parts.values - channels) / NUMBERS_PER_ESCAPE, tensors * (channels + 1 + 6 + _ALIGNED)
    if codec not in LOSSY:
        return float(codec_bytes(codec, form, 1, batch, channels, itemsize)), 0
    each = steps_of(codec, form)
    a_token = sum(steps.nbytes(steps.tokens, batch, channels, itemsize) / steps.tokens for steps in each)
    return a_token, sum(2 * itemsize * batch * channels for steps in each if steps.tokens > 1)


def codec_bytes(codec: Codec, form: Form, tokens: int, batch: int, channels: int, itemsize: int) -> int:
    """Bytes of a block whose tensors are [tokens, batch, channels], of numbers of `itemsize` bytes."""
    numbers = tokens * batch * channels
    match codec:
        case "plain":
            return TENSORS[form] * numbers * itemsize
        case "packed":
            return TENSORS[form] * packed(numbers, channels).nbytes
        case "fp8":
            return TENSORS[form] * numbers
        case "int8" | "int4":
            return sum(steps.nbytes(tokens, batch, channels, itemsize) for steps in steps_of(codec, form))
