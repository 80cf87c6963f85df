"""What XLA's profiler recorded on a GPU, as plain data: when the link and when the GPU was busy, and for which layer.

    layers = layers_of(decoder.text("step", 0))
    spans, seconds = last_step(read_spans(ProfileData.from_file("vm.xplane.pb"), layers), steps=2)
    print(busy_seconds(spans, "to_device") / seconds)

An XSpace has planes, a plane lines, a line events. The plane of a GPU is named `/device:GPU:0`; its lines are streams,
such as `Stream #14(MemcpyH2D)`, and their events kernels and copies. The statistic `hlo_op` of an event is the
instruction that launched it (in XLA: backends/profiler/gpu/cupti_collector.cc, backends/gpu/runtime/annotation.cc). The
statistic `name` would not do: it has the scope that all operations of a fusion share, and XLA lets layers share
constants, so a quarter of a layer's kernels have no layer there.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["to_device", "to_host", "compute"]
KINDS = get_args(Kind)

GPU = "/device:GPU:0"
COPIES: dict[str, Kind] = {"MemcpyH2D": "to_device", "MemcpyD2H": "to_host"}
NO_WORK = ("MemoryAlloc", "MemoryFree", "MemoryResidency")  # events of streams that keep nothing busy
OUTSIDE = -1  # the layer of what is in none: embedding, unembedding

INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = .*? ([a-z][a-z\-]*)\((.*?)\)")  # name, kind, operands
LAYER = re.compile(r'op_name="[^"]*\blayer_(\d+)/')  # kvrecomp.run.step.decode_step names the scopes


@dataclass(frozen=True)
class Span:
    """Something that ran: `name` is the instruction, or the event's own name where the trace does not say it.

    `layer` is OUTSIDE where the instruction is in no layer, and None where it is not known.
    """

    kind: Kind
    name: str
    start: float
    seconds: float
    layer: int | None

    @property
    def end(self) -> float:
        return self.start + self.seconds


def layers_of(text: str) -> dict[str, int]:
    """The layer of every instruction in the text of a compiled step (`Decoder.text`).

    That of a kernel is the scope its operation was traced in; of a fusion, the scope of its result. A copy from host
    memory has no scope; its layer is the one that uses it first.
    """
    layers: dict[str, int] = {}
    copies: dict[str, str] = {}  # the end of a copy -> its start
    for line in text.splitlines():
        instruction = INSTRUCTION.match(line)
        if instruction is None:
            continue
        name, kind, arguments = instruction.groups()
        operands = re.findall(r"%([\w.\-]+)", arguments)
        scope = LAYER.search(line)
        layers[name] = int(scope[1]) if scope else OUTSIDE
        if kind == "copy-done":
            copies[name] = operands[0]
        for copied in copies.keys() & set(operands):
            if scope:
                layers[copied] = layers[copies.pop(copied)] = layers[name]
    return layers


def read_spans(profile: Any, layers: Mapping[str, int]) -> list[Span]:
    """What the first GPU did in a `jax.profiler.ProfileData`, by its start; seconds from the first start.

    Raises ValueError where the trace has no GPU, or nothing ran on it.
    """
    planes = {plane.name: plane for plane in profile.planes}
    if GPU not in planes:
        raise ValueError(f"the trace has no plane {GPU}, only {', '.join(planes) or 'none'}: trace a step on a GPU")
    found = []
    for line in planes[GPU].lines:
        if not line.name.startswith("Stream #"):
            continue  # counters, the profiler's own work, or what a viewer derived from the streams
        for event in line.events:
            if event.name not in NO_WORK:
                name = str(dict(event.stats).get("hlo_op", event.name))
                kind = COPIES.get(event.name, "compute")
                found.append(Span(kind, name, event.start_ns / 1e9, event.duration_ns / 1e9, layers.get(name)))
    if not found:
        raise ValueError(
            f"nothing ran on {GPU} in the trace: XLA's profiler reads CUPTI, which this user may not be allowed to use "
            "or another profiler holds"
        )
    first = min(span.start for span in found)
    found = [dataclasses.replace(span, start=span.start - first) for span in found]
    return sorted(found, key=lambda span: (span.start, span.end))


def last_step(spans: Sequence[Span], steps: int) -> tuple[list[Span], float]:
    """The spans of the last of so many equal steps, and its seconds; it begins where the one before ends.

    Of each kind and name it has the last ones, as many as a step has: the copies that a step begins with start in any
    order. What did not run as often in every step is left out; of what began under the step before, that part is cut.
    Raises ValueError where nothing ran that often, or the last step does not end last.
    """
    by_name: dict[tuple[Kind, str], list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.start):
        by_name.setdefault((span.kind, span.name), []).append(span)
    before: list[Span] = []
    last: list[Span] = []
    for named in by_name.values():
        if len(named) % steps == 0:
            first = len(named) - len(named) // steps
            before += named[:first]
            last += named[first:]
    zero = max((span.end for span in before), default=0.0)
    end = max((span.end for span in last), default=0.0)
    if end <= zero:
        raise ValueError(f"nothing in the trace ran {steps} times, so its {steps} steps cannot be told apart")
    cut = []
    for span in sorted(last, key=lambda span: (span.start, span.end)):
        if span.end > zero:
            start = max(span.start, zero)
            cut.append(dataclasses.replace(span, start=start - zero, seconds=span.end - start))
    return cut, end - zero


def busy_seconds(spans: Iterable[Span], *kinds: Kind) -> float:
    """Seconds in which at least one span of these kinds runs."""
    alike = [dataclasses.replace(span, kind="compute", layer=None) for span in spans if span.kind in kinds]
    return sum(span.seconds for span in merged(alike, 0))


def unknown_share(spans: Iterable[Span]) -> float:
    """The part of the seconds of compute of which no layer is known."""
    computed = [(span.layer, span.seconds) for span in spans if span.kind == "compute"]
    total = sum(seconds for _, seconds in computed)
    return sum(seconds for layer, seconds in computed if layer is None) / total if total else 0.0


def merged(spans: Iterable[Span], gap: float) -> list[Span]:
    """Spans of one kind and layer as one, where at most `gap` seconds lie between them; by their start."""
    done: list[Span] = []
    growing: dict[tuple[Kind, int | None], Span] = {}
    for span in sorted(spans, key=lambda span: span.start):
        key = span.kind, span.layer
        last = growing.get(key)
        if last is not None and span.start - last.end <= gap:
            growing[key] = dataclasses.replace(last, seconds=max(last.end, span.end) - last.start)
        else:
            if last is not None:
                done.append(last)
            growing[key] = dataclasses.replace(span, name="")
    return sorted([*done, *growing.values()], key=lambda span: (span.start, KINDS.index(span.kind)))
