"""What is known of a machine: plain data, measured by `kvrecomp.measure.profiler` or taken from data sheets.

Times are seconds, sizes bytes, rates per second. A `Line` is a time that grows with a size, a `Curve` one by pieces.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from kvrecomp.plan import GIB, LayerShape, Memory, PlanError, uneven

Attention = Literal["keys_values", "absorb", "recompute"]
"""Attention over cached tokens: over keys and values, or over activations by one of the methods."""

Work = Literal[
    "project", "project_absorb", "project_recompute",
    "finish", "prepare", "await",
    Attention, "device_keys_values", "device_absorb", "device_recompute", "uneven_absorb", "uneven_device_absorb",
]  # fmt: skip
"""What a layer does in a step. `project` makes Q, and K and V of the new token; where the tail has activations, these
are not made (`project_absorb`), or with those of the tail (`project_recompute`). `finish` is the output projection and
the feed-forward; `prepare` absorbs the projections of K and V, once where activations are attended to so; `await` is
what awaiting a copy takes that has arrived: it ends a CUDA graph. The others are attention over cached tokens. Those of
a block from the host have a partial result of their own, and K and V are cut out of it; those on the device (`device_`)
are attended to as one with the tail. Where the tail is attended to in a different way, they have a partial result of
their own too, which counts as that of no tokens from the host. `uneven_` is attention over a block of which
`plan.uneven` is true."""

KNOTS = 7  # of a curve, at most
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
    """The work before attention in a layer that attends to its tail so."""
    works: dict[Attention, Work] = {
        "keys_values": "project",
        "absorb": "project_absorb",
        "recompute": "project_recompute",
    }
    return works[kind]


def _check_number(of: str, name: str, value: Any, above: bool = False) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value < float("inf") or (above and value == 0):
        expected = "greater than zero" if above else "not negative"
        raise PlanError(f"{of}: {name} is {value!r}; it must be a finite number, {expected}")


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
    """Seconds at two to KNOTS sizes that grow from zero: straight between them, and on as between the last two.

    Kernels are others for other sizes, so that no one line is near all of them.
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
        for value in self.seconds:
            _check_number("Curve", "seconds", value)

    @classmethod
    def line(cls, base: float, each: float = 0.0) -> "Curve":
        """`base + each * size` seconds."""
        return cls((0.0, 1.0), (base, base + each))

    def times(self, factor: float) -> "Curve":
        """So many times as long."""
        return Curve(self.sizes, tuple(factor * own for own in self.seconds))

    def plus(self, seconds: float) -> "Curve":
        """So much longer, or shorter; never less than nothing."""
        return Curve(self.sizes, tuple(max(0.0, own + seconds) for own in self.seconds))

    @property
    def knots(self) -> np.ndarray:
        """float64[2, KNOTS]: sizes and seconds, filled up with points further on."""
        sizes, seconds = self.sizes, self.seconds
        further = np.arange(1, KNOTS + 1 - len(sizes))
        last = [values[-1] + further * (values[-1] - values[-2]) for values in (sizes, seconds)]
        return np.array([[*sizes, *last[0]], [*seconds, *last[1]]])

    def __call__(self, size: float) -> float:
        """Seconds at that size; not less than none where a falling end would lead there."""
        end = max(1, min(len(self.sizes) - 1, bisect.bisect_left(self.sizes, size)))
        (before, after), (first, second) = self.sizes[end - 1 : end + 1], self.seconds[end - 1 : end + 1]
        return max(0.0, first + (size - before) * (second - first) / (after - before))


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer's work in a step, by kind, in cached tokens, for one layer shape, dtype and batch.

    `outside` is a step's work outside its layers, of a model with that `vocab`; None: of any. No more tokens were timed
    than `positions`, where that is not None.
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


@dataclass(frozen=True)
class HardwareProfile:
    """A machine: rates and latencies, and the layers that were timed on it.

    `to_device` and `to_host` are copies of one array over the link, by bytes, one after the other. `beside_compute` is
    the rate of those to the device while it computes; `handoff_seconds` pass before a copy starts that waited for
    compute or another copy, and before compute starts that waited for a copy. `kernel_seconds` is what one more small
    kernel adds to a program. `host_bytes` None: as much as is asked for. `source` says where the numbers are from.
    """

    device: str
    device_bytes: float
    to_device: Line
    to_host: Line
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
        for name in ("handoff_seconds", "kernel_seconds", "host_bytes"):
            if name != "host_bytes" or self.host_bytes is not None:
                _check_number("HardwareProfile", name, getattr(self, name))

    def times(self, layer: LayerShape, dtype: str, batch: int) -> LayerTimes | None:
        """The times measured for that layer, dtype and batch, if they were."""
        wanted = (layer, dtype, batch)
        return next((own for own in self.layers if (own.layer, own.dtype, own.batch) == wanted), None)

    def with_times(self, times: LayerTimes) -> "HardwareProfile":
        """The profile with these times, in place of older ones of the same layer, dtype and batch."""
        key = (times.layer, times.dtype, times.batch)
        others = tuple(own for own in self.layers if (own.layer, own.dtype, own.batch) != key)
        return dataclasses.replace(self, layers=(*others, times))

    def to_json(self) -> dict[str, Any]:
        """As plain data; `from_json` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "HardwareProfile":
        """Raises `PlanError`, TypeError, KeyError or ValueError for data that are no profile."""
        layers = tuple(
            LayerTimes(
                LayerShape(**own["layer"]),
                own["dtype"],
                own["batch"],
                {work: Curve(*(tuple(own["work"][work][name]) for name in ("sizes", "seconds"))) for work in WORKS},
                own["outside"],
                own["vocab"],
                own["positions"],
            )
            for own in data["layers"]
        )
        lines = {name: Line(**data[name]) for name in ("to_device", "to_host")}
        fields = {name: value for name, value in data.items() if name != "measured_in"}  # which older ones have
        return cls(**{**fields, **lines, "layers": layers})

    @classmethod
    def from_datasheet(cls, name: str) -> "HardwareProfile":
        """A machine that one does not have, at its peak rates; names are those of `DATASHEETS`.

        Real machines reach less of them: an H200 measured here copies at 55 of 63 GB/s. Raises `PlanError` for a name
        that is not there.
        """
        if name not in DATASHEETS:
            raise PlanError(f"there is no data sheet {name!r}; there are {', '.join(DATASHEETS)}")
        sheet = DATASHEETS[name]
        return cls(
            device=sheet.device,
            device_bytes=sheet.memory_gb * 1e9,
            to_device=Line(0.0, 1 / sheet.link),
            to_host=Line(0.0, 1 / sheet.link),
            beside_compute=sheet.link,
            matmul_rate=sheet.matmul,
            memory_rate=sheet.memory_rate,
            source=sheet.source,
        )


@dataclass(frozen=True)
class Datasheet:
    """Peak rates: link bytes a second in one direction, dense 16-bit floating-point operations with 32-bit sums, device
    memory bytes a second."""

    device: str
    memory_gb: float
    link: float
    matmul: float
    memory_rate: float
    source: str


# PCIe: 16 lanes of 8, 16 and 32 GT/s (generations 3, 4, 5) with 128b/130b coding carry 15.75, 31.5 and 63.0 GB/s each
# way (PCI Express Base Specification). KVPR counts 32 GB/s for generation 4, and so does its row here.
DATASHEETS = {
    "a100": Datasheet(
        "NVIDIA A100-PCIE-40GB", 40, 32e9, 312e12, 1555e9,
        "NVIDIA A100 Tensor Core GPU data sheet (40 GB PCIe); link: PCIe 4.0 x16 as KVPR counts it",
    ),
    "rtx5000": Datasheet(
        "Quadro RTX 5000", 16, 15.75e9, 89.2e12, 448e9,
        "NVIDIA Quadro RTX 5000 data sheet; link: PCIe 3.0 x16, the rate of the PCIe 4.0 x8 that KVPR says it has",
    ),
    "rtx4090": Datasheet(
        "NVIDIA GeForce RTX 4090", 24, 31.5e9, 165.2e12, 1008e9,
        "NVIDIA Ada GPU Architecture white paper, table of GeForce RTX 4090; link: PCIe 4.0 x16",
    ),
    "t4": Datasheet(
        "Tesla T4", 16, 15.75e9, 65e12, 320e9,
        "NVIDIA T4 Tensor Core GPU data sheet; link: PCIe 3.0 x16",
    ),
    "h100": Datasheet(
        "NVIDIA H100 80GB HBM3", 80, 63e9, 989.4e12, 3350e9,
        "NVIDIA H100 Tensor Core GPU data sheet (SXM, without sparsity); link: PCIe 5.0 x16",
    ),
    "h200": Datasheet(
        "NVIDIA H200", 141, 63e9, 989.4e12, 4800e9,
        "NVIDIA H200 Tensor Core GPU data sheet (SXM, without sparsity); link: PCIe 5.0 x16",
    ),
    "gh200": Datasheet(
        "NVIDIA GH200 480GB", 96, 450e9, 989.4e12, 4000e9,
        "NVIDIA GH200 Grace Hopper Superchip data sheet (96 GB HBM3); link: NVLink-C2C, 900 GB/s in both directions",
    ),
}  # fmt: skip

# A budget outside of these is in the wrong unit. A toy model needs little more than the least.
LEAST_DEVICE, LARGEST_DEVICE = 2.0**16, 1024.0 * GIB
