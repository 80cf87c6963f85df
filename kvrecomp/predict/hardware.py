"""What is known of a machine: plain data, measured by `kvrecomp.measure.profiler` or taken from a data sheet.

    HardwareProfile -> LayerTimes (of each layer shape, dtype and batch that was timed) -> Curve (of each kind of work)

Times are seconds, sizes bytes, rates per second.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from kvrecomp.plan import GIB, LayerShape, Memory, PlanError, uneven
from kvrecomp.plan.shapes import check_positive
from kvrecomp.predict.datasheets import DATASHEETS

# Bytes of device memory: a budget of less or more is in the wrong unit. A toy model needs little more than the least.
LEAST_DEVICE, LARGEST_DEVICE = 2.0**16, 1024.0 * GIB
MOST = 1e24  # bytes, seconds, or either a second: predictions are float32, in which sums of more are infinite
KNOTS = 7  # of a curve, at most
FORMERLY = ("measured_in", "to_host")  # what older profiles say, too

Attention = Literal["keys_values", "absorb", "recompute"]
"""Attention over cached tokens: over keys and values, or over activations by one of the methods."""

Work = Literal[
    "project", "project_absorb", "project_recompute",
    "finish", "prepare", "await", "unpack",
    Attention, "device_keys_values", "device_absorb", "device_recompute", "uneven_absorb", "uneven_device_absorb",
]  # fmt: skip
"""A kind of work of a layer in a step.

`project` computes Q, and K and V of the new token. Where the tail holds activations these two are not computed
(`project_absorb`), or together with the tail's (`project_recompute`). `finish` is the output projection and the
feed-forward. `prepare` absorbs the projections of K and V, once a layer that absorbs. `await` is waiting for a copy
that has already arrived, which ends a CUDA graph. `unpack` reads a packed block, by its tokens where these are
activations; of keys and values, by as many as have as many numbers.

The others are attention over cached tokens. A block from the host has a partial result of its own, and K and V are cut
out of it. Blocks on the device (`device_`) are attended to together with the tail; where the tail is attended to in a
different way, it has a partial result of its own too, which counts as one of no tokens from the host. `uneven_` is
attention over a block for which `plan.uneven` is true."""

ATTENTION: tuple[Attention, ...] = get_args(Attention)
WORKS: tuple[Work, ...] = get_args(Work)


def attention_work(kind: Attention, memory: Memory, tokens: int = 0) -> Work:
    """The work of attending to a block of so many tokens in that memory."""
    works: dict[tuple[Attention, Memory], Work] = {
        ("keys_values", "device"): "device_keys_values",
        ("absorb", "device"): "uneven_device_absorb" if uneven(tokens) else "device_absorb",
        ("absorb", "host"): "uneven_absorb" if uneven(tokens) else "absorb",
        ("recompute", "device"): "device_recompute",
    }
    return works.get((kind, memory), kind)


def project_work(kind: Attention) -> Work:
    """The work before attention in a layer whose tail is attended to in that way."""
    works: dict[Attention, Work] = {
        "keys_values": "project",
        "absorb": "project_absorb",
        "recompute": "project_recompute",
    }
    return works[kind]


@dataclass(frozen=True)
class Line:
    """`base + each * size` seconds."""

    base: float
    each: float

    def __post_init__(self):
        _check_number("Line", "base", self.base)
        _check_number("Line", "each", self.each)

    def __call__(self, size: float) -> float:
        """Seconds at that size."""
        return self.base + self.each * size


@dataclass(frozen=True)
class Curve:
    """Seconds at two to KNOTS sizes that grow from zero: straight between these, and beyond as between the last two.

    Different kernels run at different sizes, so that no one line is close to all of them.
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self):
        rising = self.sizes[:1] == (0,) and all(a < b for a, b in itertools.pairwise(self.sizes))
        if not (rising and 2 <= len(self.sizes) == len(self.seconds) <= KNOTS):
            raise PlanError(
                f"Curve: sizes {self.sizes} and seconds {self.seconds}; expected as many of both, 2 to {KNOTS}, and "
                "sizes that grow from zero"
            )
        for size, value in zip(self.sizes, self.seconds, strict=True):
            _check_number("Curve", "sizes", size)
            _check_number("Curve", "seconds", value)

    @classmethod
    def line(cls, base: float, each: float = 0.0) -> "Curve":
        """`base + each * size` seconds."""
        return cls((0.0, 1.0), (base, base + each))

    def times(self, factor: float) -> "Curve":
        """The curve with its seconds multiplied by `factor`."""
        return Curve(self.sizes, tuple(factor * value for value in self.seconds))

    def plus(self, seconds: float) -> "Curve":
        """The curve moved up or down by `seconds`, but never below zero."""
        return Curve(self.sizes, tuple(max(0.0, value + seconds) for value in self.seconds))

    @property
    def knots(self) -> np.ndarray:
        """float64[2, KNOTS]: sizes and seconds, filled up with points on the line beyond the last two."""
        beyond = np.arange(1, KNOTS + 1 - len(self.sizes))
        rows = [[*values, *(values[-1] + beyond * (values[-1] - values[-2]))] for values in (self.sizes, self.seconds)]
        return np.array(rows)

    def __call__(self, size: float) -> float:
        """Seconds at that size; not below zero where a falling end would lead there."""
        end = max(1, min(len(self.sizes) - 1, bisect.bisect_left(self.sizes, size)))
        (x0, x1), (y0, y1) = self.sizes[end - 1 : end + 1], self.seconds[end - 1 : end + 1]
        return max(0.0, y0 + (size - x0) * (y1 - y0) / (x1 - x0))


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of a layer's work in a step, for one layer shape, dtype and batch: a curve over cached tokens for each
    kind of work.

    `outside` is a step's work outside its layers, of a model with `vocab` tokens (None: of any model). `positions` is
    the most tokens that were timed (None: no limit).
    """

    layer: LayerShape
    dtype: str
    batch: int
    work: Mapping[Work, Curve]
    outside: float = 0.0
    vocab: int | None = None
    positions: int | None = None

    def __post_init__(self):
        if set(self.work) != set(WORKS):
            raise PlanError(f"LayerTimes: {', '.join(self.work)}; expected {', '.join(WORKS)}")
        _check_number("LayerTimes", "outside", self.outside)
        given = {"vocab": self.vocab, "positions": self.positions}
        check_positive(self, batch=self.batch, **{name: size for name, size in given.items() if size is not None})

    @property
    def timed(self) -> tuple[LayerShape, str, int]:
        """What was timed: layer shape, dtype and batch."""
        return self.layer, self.dtype, self.batch

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "LayerTimes":
        """From plain data; raises as `HardwareProfile.from_json` does."""
        work: dict[Work, Curve] = {}
        for name in WORKS:
            curve = data["work"][name]
            work[name] = Curve(tuple(curve["sizes"]), tuple(curve["seconds"]))
        required: dict[str, Any] = {name: data[name] for name in ("dtype", "batch", "outside", "vocab", "positions")}
        return cls(LayerShape(**data["layer"]), work=work, **required)


@dataclass(frozen=True)
class HardwareProfile:
    """A machine: its rates and latencies, and the layers that were timed on it.

    `to_device` are copies of one array over the link, one after the other, by bytes. `beside_compute` is the rate of
    copies to the device while it computes. `handoff_seconds` pass before a copy starts that waited for compute or
    another copy, and before compute starts that waited for a copy. `kernel_seconds` is what one more small kernel adds
    to a program. `host_bytes` None: as much as is asked for. `source` says where the numbers come from.
    """

    device: str
    device_bytes: float
    to_device: Line
    beside_compute: float
    matmul_rate: float
    memory_rate: float
    handoff_seconds: float = 0.0
    kernel_seconds: float = 0.0
    host_bytes: float | None = None
    count: int = 1
    jax: str = ""
    driver: str = ""
    layers: tuple[LayerTimes, ...] = ()
    source: str = ""

    def __post_init__(self):
        for name in ("device_bytes", "beside_compute", "matmul_rate", "memory_rate"):
            _check_number("HardwareProfile", name, getattr(self, name), above=True)
        for name in ("handoff_seconds", "kernel_seconds"):
            _check_number("HardwareProfile", name, getattr(self, name))
        if self.host_bytes is not None:
            _check_number("HardwareProfile", "host_bytes", self.host_bytes)

    def times(self, layer: LayerShape, dtype: str, batch: int) -> LayerTimes | None:
        """The times measured for that layer, dtype and batch, if there are any."""
        return next((times for times in self.layers if times.timed == (layer, dtype, batch)), None)

    def with_times(self, times: LayerTimes) -> "HardwareProfile":
        """The profile with these times, in place of older ones of the same layer, dtype and batch."""
        others = (older for older in self.layers if older.timed != times.timed)
        return dataclasses.replace(self, layers=(*others, times))

    def to_json(self) -> dict[str, Any]:
        """As plain data; `from_json` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "HardwareProfile":
        """Raises `PlanError`, TypeError, KeyError or ValueError for data that are no profile."""
        layers = tuple(map(LayerTimes.from_json, data["layers"]))
        fields = {name: value for name, value in data.items() if name not in FORMERLY}
        return cls(**{**fields, "to_device": Line(**data["to_device"]), "layers": layers})

    @classmethod
    def from_datasheet(cls, name: str) -> "HardwareProfile":
        """A machine at the peak rates of its data sheet; names are those of `datasheets.DATASHEETS`.

        Real machines reach less: an H200 measured here copies at 55 of 63 GB/s. Raises `PlanError` for another name.
        """
        if name not in DATASHEETS:
            raise PlanError(f"there is no data sheet {name!r}; there are {', '.join(DATASHEETS)}")
        sheet = DATASHEETS[name]
        return cls(
            device=sheet.device,
            device_bytes=sheet.memory_gb * 1e9,
            to_device=Line(0.0, 1 / sheet.link),
            beside_compute=sheet.link,
            matmul_rate=sheet.matmul,
            memory_rate=sheet.memory_rate,
            source=sheet.source,
        )


def _check_number(thing: str, name: str, value: Any, above: bool = False) -> None:
    """Raises `PlanError` for what is no number from zero, or if `above` from one, to MOST."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not above <= value <= MOST:
        expected = f"from 1 to {MOST:g}" if above else f"not negative, and at most {MOST:g}"
        raise PlanError(f"{thing}: {name} is {value!r}; it must be a finite number, {expected}")
