"""How the numbers of a block are written, and in how many bytes; `run.codecs` writes and reads them.

plain     as they are
packed    in 12 bits a number, losslessly, of bfloat16: a sign, 8 bits of exponent and 7 of mantissa
fp8       in 8 bits a number, with loss: float8_e4m3fn
int4      in 4 bits a number, with loss: whole steps above the least of GROUP channels of a token and row

Packed numbers keep sign and mantissa as a byte. Of the exponent 4 bits are kept: how far below the largest of its
channel it is, a channel being a place in `hidden`, or in [kv_heads, head_dim] of K or of V. What that cannot say is
listed apart, as a place and a value, in a list of fixed room, and its code is that of a zero: sums that cancel make
many zeros, and these need no list. A block that needs more room cannot be packed. Codecs with loss are for sketches
(`plan.drafting`), which no text depends on.
"""

from typing import Literal, NamedTuple, get_args

Codec = Literal["plain", "packed", "fp8", "int4"]
CODECS: tuple[Codec, ...] = get_args(Codec)
LOSSLESS: tuple[Codec, ...] = ("plain", "packed")

PACKED_DTYPE = "bfloat16"
NUMBERS_PER_ESCAPE = 1024  # the list has room for one in so many
ESCAPE = 15  # the code of zeros, and of what is listed apart
_ALIGNED = 128  # bytes; a tensor begins at a multiple
GROUP = 32  # channels; a step and a least, of 16 bits each, make them 5 bits a number


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


def packed(numbers: int, channels: int) -> Packed:
    """The parts of a packed tensor of so many numbers, in so many channels."""
    escapes = -(-numbers // NUMBERS_PER_ESCAPE)
    codes = numbers + -(-numbers // 2)
    tops = codes + channels
    places = tops + 4 * escapes
    values = places + 2 * escapes
    return Packed(numbers, codes, tops, places, values, values + -values % _ALIGNED, escapes)


def token_bytes(codec: Codec, tensors: int, batch: int, channels: int, itemsize: int) -> tuple[float, int]:
    """What a block takes at most: bytes for each token of so many tensors [batch, channels], and for the block."""
    numbers = batch * channels
    if codec != "packed":
        return float(codec_bytes(codec, tensors, batch, channels, itemsize)), 0
    parts = packed(numbers * NUMBERS_PER_ESCAPE, channels)
    return tensors * (parts.values - channels) / NUMBERS_PER_ESCAPE, tensors * (channels + 1 + 6 + _ALIGNED)


def codec_bytes(codec: Codec, tensors: int, rows: int, channels: int, itemsize: int) -> int:
    """Bytes of a block of so many tensors [rows, channels] of numbers of `itemsize` bytes."""
    match codec:
        case "plain":
            return tensors * rows * channels * itemsize
        case "packed":
            return tensors * packed(rows * channels, channels).nbytes
        case "fp8":
            return tensors * rows * channels
        case "int4":
            groups = -(-channels // GROUP)
            return tensors * rows * groups * (GROUP // 2 + 2 * 2)
