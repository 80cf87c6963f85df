"""Measures this machine: the link, matrix products, device memory, and the layers of a model at work.

A machine is measured once, and the profile kept as JSON under the user's cache directory. A model's layers are timed
in the program that decoding runs (`runtime.decode_step`), cut to a few layers, with blocks that are on the device
already, so that nothing but compute is timed.
"""

import dataclasses
import functools
import itertools
import json
import logging
import os
import pathlib
import re
import statistics
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvrecomp import memory
from kvrecomp.cache import Block, allocate_tails, describe_blocks, describe_tails, make_cache
from kvrecomp.files import write_json
from kvrecomp.hardware import ATTENTION, HardwareProfile, LayerTimes, Line, Work
from kvrecomp.plan import (
    BLOCKS_PER_WINDOW,
    DEFAULT_WINDOW,
    GIB,
    MIB,
    BlockSpec,
    Copy,
    Form,
    LayerPlan,
    LayerShape,
    Method,
    Plan,
    PlanError,
    Workload,
)
from kvrecomp.runtime import Model, decode_step
from kvrecomp.window import Window

LOG = logging.getLogger("kvrecomp")
FORMAT = 1  # of the file; another one is measured anew
POOR_FIT = 0.1  # a line further than this fraction from what it was fitted to is measured again
LEAST_SLOPE = 0.01  # of a measured time: noise can make a difference of two nothing, or less
COPY_PASSES = (2, 8)  # how often each block is copied when the rate of copies is measured


# --- the profile, kept on disk ----------------------------------------------------------------------------------------


def profile(model: Model | None = None, *, batch: int = 1, refresh: bool = False) -> HardwareProfile:
    """The profile of this machine, measured if it was not before or if `refresh` says so.

    With a `model`, its layers are timed too at that `batch`. What was measured is kept in `profile_path()` and holds
    for this kind and number of devices, jax version and driver; `refresh` forgets the layers timed before.
    """
    found = None if refresh else _read(profile_path())
    known = found or _measure_machine()
    if model is not None:
        for layer in dict.fromkeys(model.shape.layers):
            if refresh or known.times(layer, model.shape.dtype, batch) is None:
                known = known.with_times(_measure_layer(model, layer, batch))
    if known is not found:
        keep(known)
    return known


def keep(measured: HardwareProfile) -> None:
    """Writes the profile to where `profile` finds it."""
    write_json(profile_path(), {"format": FORMAT, **measured.to_json()})


def profile_path() -> pathlib.Path:
    """Where this machine's profile is kept: under XDG_CACHE_HOME or ~/.cache."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    name = "-".join(map(str, this_machine().values()))
    return cache / "kvrecomp" / f"profile-{re.sub(r'[^A-Za-z0-9.]+', '_', name).strip('_')}.json"


def check_profile(given: HardwareProfile) -> None:
    """Raises `PlanError` where the profile is of another machine than this."""
    here, of = this_machine(), {name: getattr(given, name) for name in this_machine()}
    if of != here:
        raise PlanError(
            f"the profile is of {_describe(of)}; this machine is {_describe(here)}: use kvrecomp.profile(), or "
            "make_plan to see what another machine would do"
        )


def _describe(machine: dict[str, Any]) -> str:
    return f"{machine['device']} x{machine['count']}, jax {machine['jax'] or '-'}, driver {machine['driver'] or '-'}"


def this_machine() -> dict[str, Any]:
    """What a profile holds for."""
    device = jax.devices()[0]
    driver = pathlib.Path("/proc/driver/nvidia/version")
    if device.platform == "gpu" and driver.exists():
        version = re.search(r"\d+\.\d+(\.\d+)?", driver.read_text())
        version = version[0] if version else "unknown"
    else:
        version = device.platform
    return {"device": device.device_kind, "count": len(jax.devices()), "jax": jax.__version__, "driver": version}


def _read(path: pathlib.Path) -> HardwareProfile | None:
    """The profile in the file, or None, with a line that says why where there is a file."""
    try:
        data = json.loads(path.read_text())
        if data.pop("format") != FORMAT:
            raise ValueError("it is of another version of kvrecomp")
        read = HardwareProfile.from_json(data)
        check_profile(read)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        LOG.warning("%s is no profile of this machine (%s); measuring it anew", path, error)
        return None
    return read


# --- timing -----------------------------------------------------------------------------------------------------------


def median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall-clock seconds of `run`, its arrays awaited, after one call that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line with the least squared relative errors; neither part is negative."""
    weights = 1 / np.asarray(seconds)
    columns = np.stack([np.ones(len(sizes)), np.asarray(sizes, float)], axis=1)
    (base, each), *_ = np.linalg.lstsq(columns * weights[:, None], np.ones(len(sizes)), rcond=None)
    if base < 0:  # through zero
        base, each = 0.0, _through_zero(columns[:, 1] * weights)
    if each < 0:
        base, each = _through_zero(weights), 0.0
    return Line(float(base), float(each))


def _through_zero(scaled: np.ndarray) -> float:
    return scaled.sum() / np.square(scaled).sum()


def _measured_line(what: str, sizes: Sequence[float], measure: Callable[[float, int], float]) -> Line:
    """A line through `measure(size, repeats)`; measured again, longer, where it is no line."""
    for repeats in (5, 15):
        seconds = [measure(size, repeats) for size in sizes]
        line = fit_line(sizes, seconds)
        worst = max(abs(line(size) / took - 1) for size, took in zip(sizes, seconds))
        if worst <= POOR_FIT:
            break
        again = "measuring it again" if repeats == 5 else "predictions may be as far off"
        say = LOG.info if repeats == 5 else LOG.warning
        say("%s: a line is up to %.0f %% off what was measured; %s", what, 100 * worst, again)
    return line


# --- the machine ------------------------------------------------------------------------------------------------------


def _measure_machine() -> HardwareProfile:
    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    dtype = _rate_dtype()
    sizes = [2**16, 2**19, 2**22, 2**25, 2**29] if gpu else [2**16, 2**19, 2**22, 2**24]
    stats = device.memory_stats() or {}
    to_device = _measured_line("copies to the device", sizes, _to_device_seconds)
    kernel = _kernel_seconds(dtype)
    return HardwareProfile(
        **this_machine(),
        device_bytes=float(stats.get("bytes_limit", memory.total_host_bytes())),
        host_bytes=float(memory.total_host_bytes()),
        to_device=to_device,
        to_host=_measured_line("copies to the host", sizes, _to_host_seconds),
        beside_compute=copy_rate(min(sizes[-1], 256 * MIB), 4, computing=True),
        handoff_seconds=_handoff_seconds(sizes[0], to_device, kernel),
        matmul_rate=_matmul_rate(dtype),
        memory_rate=_memory_rate(min(2 * sizes[-1], GIB)),
        kernel_seconds=kernel,
        source=f"measured, {jnp.dtype(dtype).name}",
    )


def _rate_dtype() -> Any:
    """What models are computed in here: 16 bits on a GPU, as it has them, 32 elsewhere."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return jnp.float32
    old = float(getattr(device, "compute_capability", "8.0")) < 8  # bfloat16 began with Ampere
    return jnp.float16 if old else jnp.bfloat16


def copy_rate(block_bytes: int, blocks: int, repeats: int = 5, computing: bool = False) -> float:
    """Bytes a second from pinned host memory to the device, of copies of whole blocks in one program.

    The copies, of `block_bytes` each, go through the window of a step: the rate is about what a step can reach. It is
    the slope between a few and many copies, so that what a program costs beside them does not count. `computing`
    attends to every block when it is there.
    """
    arrays = _host_arrays(block_bytes, blocks)
    few, many = (_held_copies(arrays, passes, repeats, computing) for passes in COPY_PASSES)
    if many <= few:  # a CPU's copies can cost nothing
        return COPY_PASSES[1] * blocks * block_bytes / many
    return (COPY_PASSES[1] - COPY_PASSES[0]) * blocks * block_bytes / (many - few)


def _host_arrays(block_bytes: int, blocks: int) -> list[jax.Array]:
    dtype = jnp.dtype(_rate_dtype())
    numbers = block_bytes // dtype.itemsize
    width = min(4096, numbers)
    return [memory.zeros((numbers // width, 1, width), dtype, "host") for _ in range(blocks)]


def _held_copies(arrays: Sequence[jax.Array], passes: int, repeats: int, computing: bool) -> float:
    """Seconds of a program that copies every array so often, through the window of a step."""

    @jax.jit
    def copy_all(arrays):
        own = [(array, Copy(array.size * array.dtype.itemsize)) for array in arrays] * passes
        window, result = Window([own], 4 * own[0][1].nbytes, "pipelined"), jnp.zeros((), arrays[0].dtype)
        ends = []
        for _ in own:
            before, x = window.take(result)
            ends.append(before)  # read, or XLA would drop the order with it
            result = x[0, 0, -1]
            if computing:
                queries = jnp.broadcast_to(x[0, 0], (32, x.shape[-1]))
                scores = jnp.einsum("nh,sbh->nsb", queries, x)
                result = jnp.einsum("nsb,sbh->nh", scores, x)
            result = window.used(result)
        return *ends, result

    program = copy_all.lower(arrays).compile()
    return median_seconds(lambda: program(arrays), repeats)


def _to_device_seconds(size: float, repeats: int) -> float:
    """Of one copy among many in a program, none of which waits for anything but the link."""
    arrays = _host_arrays(int(size), int(max(4, min(64, 2**26 // size))))

    def copy_all(arrays):
        return [jax.device_put(array, jax.memory.Space.Device)[0, 0, -1] for array in arrays]

    seconds = []
    for own in (arrays[: len(arrays) // 2], arrays):
        program = jax.jit(copy_all).lower(own).compile()
        seconds.append(median_seconds(functools.partial(program, own), repeats))
    return max(LEAST_SLOPE * seconds[1], seconds[1] - seconds[0]) / (len(arrays) - len(arrays) // 2)


def _handoff_seconds(size: int, to_device: Line, kernel_seconds: float) -> float:
    """Between compute and link. Of two copies under way, each waits for the arrival of the one before the last: in the
    time of two, there is one copy, one kernel and a handoff to and from the link."""
    arrays = _host_arrays(size, 4)
    few, many = (_held_copies(arrays, passes, 9, False) / len(arrays) for passes in COPY_PASSES)
    each = (many - few) / (COPY_PASSES[1] - COPY_PASSES[0])
    return max(0.0, (2 * each - to_device(size) - kernel_seconds) / 2)


def _to_host_seconds(size: float, repeats: int) -> float:
    """Of one copy among several in a program."""
    count = int(max(1, min(16, 2**28 // size)))
    array = memory.zeros((int(size) // 4,), jnp.dtype(jnp.float32), "device")

    def copy_out(array):
        return [array + number for number in range(count)]

    program = jax.jit(copy_out, out_shardings=memory.sharding("host")).lower(array).compile()
    return median_seconds(lambda: program(array), repeats) / count


def _matmul_rate(dtype: Any) -> float:
    """Floating-point operations a second of the products that recomputing K and V is made of, tokens by hidden size.

    The size grows until a product takes long enough to be timed.
    """
    rate = 0.0
    for size in (512, 1024, 2048, 4096, 8192):
        tokens, kernel = _random((size, size), dtype), _random((size, size), dtype)
        program = jax.jit(_chain_of_products, static_argnums=2).lower(tokens, kernel, 4).compile()
        seconds = median_seconds(functools.partial(program, tokens, kernel)) / 4
        rate = 2 * size**3 / seconds
        if seconds > 1e-3:
            break
    return rate


@functools.cache
def _random_maker(shape: tuple[int, ...], dtype: Any) -> Callable[[], jax.Array]:
    def make():
        return jax.random.normal(jax.random.key(0), shape, dtype) * shape[-1] ** -0.5

    return jax.jit(make, out_shardings=memory.sharding("device"))


def _random(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random numbers that stay of order one in a product: a GPU multiplies zeros faster than it does real data."""
    return _random_maker(shape, dtype)()


def _chain_of_products(x: jax.Array, kernel: jax.Array, count: int) -> jax.Array:
    for _ in range(count):
        x = x @ kernel
    return x


def _memory_rate(size: int) -> float:
    """Bytes a second between the device and its own memory: the slope from a quarter of the size to all of it."""
    seconds = []
    for part in (4, 1):
        array = memory.zeros((size // part // 4,), jnp.dtype(jnp.float32), "device")
        program = jax.jit(lambda array: array + 1).lower(array).compile()
        seconds.append(median_seconds(functools.partial(program, array), 9))
    return 2 * 0.75 * size / max(LEAST_SLOPE * seconds[1], seconds[1] - seconds[0])  # read and written


def _kernel_seconds(dtype: Any) -> float:
    """What one more kernel adds to a program: the slope of chains of products too small to take time."""
    small = memory.zeros((64, 64), jnp.dtype(dtype), "device")
    seconds = []
    for count in (32, 160):
        program = jax.jit(_chain_of_products, static_argnums=2).lower(small, small, count).compile()
        seconds.append(median_seconds(functools.partial(program, small, small), 9))
    return max(0.0, (seconds[1] - seconds[0]) / 128)


# --- the layers of a model --------------------------------------------------------------------------------------------

FEW_LAYERS, MORE_LAYERS = 2, 6
STEPS = 10  # dispatched without waiting, as decoding does


def _measure_layer(model: Model, layer: LayerShape, batch: int) -> LayerTimes:
    """Seconds of the layers of that shape in a step: without cached tokens, with a block of three sizes a form, and
    with two blocks that together are as long as the longest, which tells what one more block costs."""
    own_numbers = [number for number, own in enumerate(model.shape.layers) if own == layer]
    numbers = list(itertools.islice(itertools.cycle(own_numbers), MORE_LAYERS))  # again where there are fewer
    few, more = FEW_LAYERS, MORE_LAYERS
    sizes: dict[Work, list[int]] = {}
    for kind in ATTENTION:
        form: Form = "keys_values" if kind == "keys_values" else "activations"
        row_bytes = batch * layer.width(form) * model.shape.itemsize
        most = max(1, min(model.shape.positions - 1, DEFAULT_WINDOW // BLOCKS_PER_WINDOW // row_bytes))
        sizes[kind] = sorted({max(1, most // part) for part in (8, 2, 1)})
    bench = _LayerBench(model, batch)
    halves = {kind: (max(1, own[-1] // 2), max(1, own[-1] - own[-1] // 2)) for kind, own in sizes.items()}
    runs: set[tuple[int, Work | None, tuple[int, ...]]] = {(few, None, ()), (more, None, ())}
    for kind in ATTENTION:
        runs.update((more, kind, (size,)) for size in sizes[kind])
        runs.add((more, kind, halves[kind]))
    # One after the other: beside another compilation XLA times kernels wrongly, and chooses slow ones.
    seconds = {(count, kind, tokens): bench.seconds(numbers[:count], kind, tokens) for count, kind, tokens in runs}
    without = seconds[more, None, ()]
    dense = max(0.0, (without - seconds[few, None, ()]) / (more - few))
    projecting = layer.hidden * layer.head_dim * (layer.heads + 2 * layer.kv_heads) / layer.parameters
    work: dict[Work, Line] = {
        "project": Line(projecting * dense, 0.0),
        "finish": Line((1 - projecting) * dense, 0.0),
    }
    for kind in ATTENTION:
        taken = [seconds[more, kind, (size,)] for size in sizes[kind]]
        times = [max(LEAST_SLOPE * own, own - without) / more for own in taken]
        line = fit_line(sizes[kind], times)
        another = (seconds[more, kind, halves[kind]] - seconds[more, kind, (sizes[kind][-1],)]) / more
        base = min(max(0.0, another), line.base)
        if kind == "absorb":
            work["prepare"] = Line(line.base - base, 0.0)
        work[kind] = Line(base, line.each)
    outside = max(0.0, without - more * dense)
    return LayerTimes(layer, model.shape.dtype, batch, work, outside, model.shape.vocab)


class _LayerBench:
    """Times a step of some of a model's layers, with blocks that are on the device but used as if they were copied."""

    def __init__(self, model: Model, batch: int):
        self._model, self._batch = model, batch
        self._graph, state = nnx.split(model)
        self._weights, self._structure = jax.tree.flatten(state)
        self._paths = [path for path, _ in nnx.to_flat_state(state)]

    def seconds(self, numbers: Sequence[int], kind: Work | None, tokens: Sequence[int]) -> float:
        """Of a step of the layers with these numbers, each with blocks of that many tokens used in that way."""
        plan = self._plan(numbers, kind, tokens or (1,))
        self._bring(numbers)

        def step(weights, blocks, tails, padding, length, token_ids):
            model = nnx.merge(self._graph, jax.tree.unflatten(self._structure, weights))
            layers = [model.layers[number] for number in numbers]
            part: Any = types.SimpleNamespace(embed=model.embed, unembed=model.unembed, layers=layers)
            cache = make_cache(blocks, tails, padding, length, 0)
            (tails,), (logits,) = decode_step(part, plan, [cache], [token_ids])
            return tails, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        kinds = [[] if kind is None else list(own) for own in describe_blocks(plan, 0)]
        described = [[_as_if_copied(block) for block in own] for own in kinds]
        padding, length, token_ids = jax.device_put(
            (np.zeros(self._batch, np.int32), np.int32(plan.workload.prompt), np.zeros(self._batch, np.int32)),
            memory.sharding("device"),
        )
        inputs = (self._weights, described, describe_tails(plan), padding, length, token_ids)
        program = jax.jit(step, donate_argnames=("tails",)).lower(*inputs).compile()
        blocks = jax.tree.map(lambda like: _random(like.shape, like.dtype), described)
        tails = allocate_tails(plan)

        def run():
            nonlocal tails, token_ids
            for _ in range(STEPS):
                tails, token_ids = program(self._weights, blocks, tails, padding, length, token_ids)
            return token_ids

        return median_seconds(run, 3) / STEPS

    def _bring(self, numbers: Sequence[int]) -> None:
        """Copies what these layers have in host memory to the device: what is timed is compute."""
        here = memory.sharding("device")
        for place, path in enumerate(self._paths):
            if path[0] == "layers" and path[1] in numbers and self._weights[place].sharding != here:
                self._weights[place] = jax.device_put(self._weights[place], here)

    def _plan(self, numbers: Sequence[int], kind: Work | None, tokens: Sequence[int]) -> Plan:
        shape = self._model.shape
        form: Form = "activations" if kind in ("absorb", "recompute") else "keys_values"
        method: Method = "recompute" if kind == "recompute" else "absorb"
        layers = tuple(shape.layers[number] for number in numbers)
        own = LayerPlan(tuple(BlockSpec(form, "host", each) for each in tokens), form, ("host",), method)
        part = dataclasses.replace(shape, layers=layers)
        return Plan("bench", part, Workload(self._batch, sum(tokens), 1), (own,) * len(layers), tail=1, window=2**62)


def _as_if_copied(block: Block) -> Block:
    """A host block whose array is described as on the device: copying it there copies nothing."""
    here = memory.sharding("device")
    arrays = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here) for array in block.arrays)
    return dataclasses.replace(block, arrays=arrays)
