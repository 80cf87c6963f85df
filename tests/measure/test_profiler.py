"""Measuring the machine: what is measured is plausible, kept, and measured anew only when it must be."""

import dataclasses
import functools
import json
import logging
import threading
import time
import types

import jax
import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

import kvrecomp
import models
from kvrecomp.measure import layer_bench, profiler, timing
from kvrecomp.measure import layers as profile_layers
from kvrecomp.measure import machine as profile_machine
from kvrecomp.measure.timing import fit_line, measured_line
from kvrecomp.plan import GIB, MEMORIES
from kvrecomp.predict.estimate import estimate
from kvrecomp.predict.hardware import ATTENTION, WORKS, Curve, HardwareProfile, attention_work, project_work
from kvrecomp.run import forward


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def counted(monkeypatch, known_machine):
    """The machine's measurement replaced by the profile that tests use; a list with an entry for each."""
    calls = []

    def measure():
        calls.append("measured")
        return known_machine

    monkeypatch.setattr(profiler, "measure_machine", measure)
    return calls


def test_a_machine_is_measured(cache, monkeypatch):
    monkeypatch.setattr(profile_machine, "median_seconds", lambda run, repeats=1: profiled(run))
    measured = profiler.profile()
    assert {name: getattr(measured, name) for name in profiler.this_machine()} == profiler.this_machine()
    assert 1e8 < measured.matmul_rate < 1e16 and 1e8 < measured.memory_rate < 1e14
    assert 0 < measured.to_host(2**20) < 1 and 0 <= measured.kernel_seconds < 1e-2
    assert profiler.profile() == measured  # read from the file


def profiled(run):
    """One timed call after one that is not."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def test_measured_once(cache, counted):
    first = profiler.profile()
    assert profiler.profile() == first and counted == ["measured"]
    assert list(cache.rglob("*.json")) == [profiler.profile_path()]
    profiler.profile(refresh=True)
    assert counted == ["measured"] * 2


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        json.dumps({"format": 0}),
        json.dumps({"format": profiler.FORMAT, "device": "cpu"}),
        "\0" * 50,
    ],
)
def test_a_corrupt_file_is_measured_anew_and_said(cache, counted, caplog, content):
    path = profiler.profile_path()
    path.parent.mkdir()
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        profiler.profile()
    assert counted == ["measured"]
    (record,) = caplog.records
    assert str(path) in record.message and "measuring it anew" in record.message and "\n" not in record.message
    assert profiler.profile() and counted == ["measured"]


def test_a_profile_that_cannot_be_kept_is_used_and_said(cache, counted, caplog, known_machine):
    (cache / "kvrecomp").write_text("no directory")
    with caplog.at_level(logging.WARNING):
        assert profiler.profile() == known_machine
    record = caplog.records[-1]
    assert "cannot be kept" in record.message and "set XDG_CACHE_HOME" in record.message


def test_a_profile_of_another_machine_is_not_used(cache, counted, caplog):
    other = dataclasses.replace(profiler.profile(), driver="another")
    profiler.profile_path().write_text(json.dumps({"format": profiler.FORMAT, **other.to_json()}))
    profiler.profile()
    assert counted == ["measured"] * 2 and "driver another" in caplog.text


def test_generate_refuses_a_profile_of_another_machine():
    with pytest.raises(kvrecomp.PlanError, match=r"the profile is of Tesla T4 x1.*this machine is cpu"):
        kvrecomp.generate(
            toy.model(), np.ones((2, 5), np.int32), max_new_tokens=3, profile=HardwareProfile.from_datasheet("t4")
        )


def test_layers_are_timed_once_a_batch(cache, counted, monkeypatch):
    for module in (layer_bench, timing):
        monkeypatch.setattr(module, "median_seconds", lambda run, repeats=1: profiled(run))
    monkeypatch.setattr(layer_bench, "STEPS", 2)
    monkeypatch.setattr(profile_layers, "MORE_LAYERS", 3)
    model = toy.model("350m")
    first = profiler.profile(model, batch=3)
    assert len(first.layers) == len(set(model.shape.layers))
    for layer in model.shape.layers:
        times = first.times(layer, "float32", 3)
        assert times is not None and set(times.work) == set(WORKS)
        assert first.times(layer, "float32", 2) is None
    assert profiler.profile(model, batch=3) == first
    assert profiler.profile() == first  # kept with the machine


def test_what_others_timed_meanwhile_is_kept(cache, counted, known_machine, monkeypatch):
    """Another process times the same layers for another batch, while they are timed here."""
    model, batches = toy.model(), [5, 3]

    def measure(model, layer, batch):
        if batches:
            profiler.profile(model, batch=batches.pop())
        found = estimate(known_machine, layer, 4, batch)
        return dataclasses.replace(found, dtype=model.shape.dtype, vocab=model.shape.vocab, batch=batch)

    profiler.profile()
    monkeypatch.setattr(profiler, "measure_layer", measure)
    profiler.profile(model, batch=2)
    kept = profiler.profile()
    assert {times.batch for times in kept.layers} == {2, 3, 5} and counted == ["measured"]


def test_layers_are_timed_again_for_more_positions(cache, counted, known_machine, monkeypatch):
    """As a longer cache has more tokens than were timed; fewer are covered."""
    model, asked = toy.model(), []

    def measure(model, layer, batch):
        asked.append(model.shape.positions)
        return estimated(known_machine, model.shape, layer, batch)

    def estimated(machine, shape, layer, batch):
        found = estimate(machine, layer, 4, batch)
        return dataclasses.replace(found, dtype=shape.dtype, vocab=shape.vocab, positions=shape.positions)

    def with_positions(count):
        return types.SimpleNamespace(shape=dataclasses.replace(model.shape, positions=count))

    monkeypatch.setattr(profiler, "measure_layer", measure)
    for positions in (101, 57, 101, 211, 101):
        profiler.profile(with_positions(positions), batch=3)
    kinds = len(set(model.shape.layers))
    assert asked == [101] * kinds + [211] * kinds


@pytest.mark.parametrize("number", range(3))
def test_a_layer_is_found_again(monkeypatch, number):
    """Steps that take what the cost function adds up: what was measured of them is what they were made of.

    Two measurements of three are far off, of every step.
    """
    rng = np.random.default_rng(number)
    model = toy.model("350m")
    layer = model.shape.layers[0]

    def longest(kind, place):
        return 2**14 if (kind, place) == ("keys_values", "host") else 2**16

    monkeypatch.setattr(profile_layers, "longest_block", longest)
    monkeypatch.setattr(profile_layers, "uneven", lambda tokens: tokens % 2)  # of blocks so short, too

    def attention(kind, place):
        sizes = profile_layers.block_sizes(kind, model.shape, layer, 3, longest(kind, place), place)
        assert len(sizes) == 3 + 2 * (kind == "recompute") + (place == "device")
        steps = rng.uniform(1e-6, 9e-6, len(sizes))
        line = 1e-5 + steps[0] * np.array([0, 1])  # no tokens are on the line through the first two sizes
        first = line[0] + steps[0] * sizes[0] / sizes[1], line[1]
        return Curve((0, *sizes), (line[0], *first, *(line[1] + steps[2:].cumsum())))

    attending = {(kind, place): attention(kind, place) for kind in ATTENTION for place in MEMORIES}
    attending["recompute", "device"] = attending["recompute", "host"].plus(rng.uniform(1e-6, 9e-6))
    dense, outside, prepare = rng.uniform(1e-4, 9e-4, 3)
    finish = rng.uniform(0.3, 0.7) * dense
    awaiting = rng.uniform(2e-6, 9e-6)
    slower = dict(zip(MEMORIES, ((1.3, 2.9), (1.2, 2.1), (19.0, 5.8))[number]))
    found_slower = {own: min(10.0, factor) if factor > 1.25 else 1.0 for own, factor in slower.items()}
    tails = {kind: rng.uniform(1e-5, 3e-5) * (kind != "keys_values") for kind in ATTENTION}

    class Steps:
        def __init__(self, *_):
            pass

        def timer(self, run):
            if isinstance(run, layer_bench.Finish):
                return self.slow_twice(outside / 2 + run.layers * finish)
            seconds = dense + tails[run.tail] + ("absorb" in (run.tail, run.kind)) * prepare
            tail = attending[run.tail, "device"]
            seconds += tail(layer_bench.TAIL) - tail(0) if run.tail != "keys_values" else 0
            attention = attending[run.kind, run.memory](run.tokens)
            if run.kind == "absorb" and run.tokens == attending[run.kind, run.memory].sizes[-1] - 1:
                attention *= slower[run.memory]
            seconds += run.blocks * (attention + run.copied * awaiting)
            first_copy = run.copied * 1e-5  # for which nothing is computed meanwhile
            return self.slow_twice(outside + first_copy + run.layers * seconds)

        def slow_twice(self, seconds):
            factors = iter((9, 1, 5))
            return lambda: next(factors) * seconds

    monkeypatch.setattr(profile_layers, "LayerBench", Steps)
    times = profile_layers.measure_layer(model, layer, batch=3)
    for (kind, place), curve in attending.items():
        found = times.work[attention_work(kind, place)]
        assert found.sizes == curve.sizes and found.seconds == pytest.approx(curve.seconds, rel=1e-6), (kind, place)
        if kind == "absorb":
            uneven = times.work[attention_work(kind, place, 257)]
            assert uneven.sizes == curve.sizes
            assert uneven.seconds == pytest.approx([found_slower[place] * own for own in curve.seconds], rel=1e-6)
    tail = attending["keys_values", "device"]
    of_tail = tail(layer_bench.TAIL) - tail(0)
    assert times.work["prepare"](0) == pytest.approx(prepare, rel=1e-6)
    assert times.work["finish"](0) == pytest.approx(finish, rel=1e-6)
    assert times.work["await"](0) == pytest.approx(awaiting, rel=1e-6)
    assert times.work["project"](0) + finish + of_tail == pytest.approx(dense, rel=1e-6)
    for kind in ATTENTION:
        more = times.work[project_work(kind)](0) - times.work["project"](0)
        assert more == pytest.approx(tails[kind] + (of_tail if kind != "keys_values" else 0), rel=1e-6)
    assert times.outside == pytest.approx(outside, rel=1e-6)


def test_what_programs_have_in_common_is_compiled_before_they_are(monkeypatch):
    """One, then one of each kind of attention: the others have the kernels that were chosen for these."""
    begun, ended = [], []
    model, together = toy.model(), threading.Barrier(3, timeout=60)
    runs = profile_layers.choose_runs(model.shape, model.shape.layers[0], 3)
    of_kinds = [runs.one_block[kind, "host"][0] for kind in ATTENTION]

    class Compiling:
        def __init__(self, *_):
            pass

        def timer(self, what):
            begun.append((len(ended), what))
            if what in of_kinds:
                together.wait()  # for the others of them
            ended.append(what)
            return lambda: 1.0

    monkeypatch.setattr(profile_layers, "LayerBench", Compiling)
    monkeypatch.setattr("kvrecomp.run.programs.os.cpu_count", lambda: 8)
    profile_layers.measure_layer(model, model.shape.layers[0], batch=3)
    assert begun[0] == (0, runs.layers[0]) and [before for before, _ in begun[1:4]] == [1] * 3
    kinds = [what for _, what in begun[1:4]]
    assert sorted(run.kind for run in kinds) == sorted(run.tail for run in kinds) == sorted(ATTENTION)
    assert all(before >= 4 for before, _ in begun[4:]) and len(begun) == len(set(ended)) > 20


def test_a_profile_is_made_of_what_was_timed(monkeypatch):
    """Each program's seconds are in the field that they are of, by the sizes that it is given."""

    def copies(size):
        return lambda repeats, timed: 3e-6 + size / 5e9

    def held(block_bytes, blocks, computing, room):
        waiting = 3e-6 + block_bytes / 4e9 + 2e-6 + 2 * 7e-6  # copy, kernel and two handoffs
        return lambda repeats: waiting if room == 1 else block_bytes / 4e9

    made = {
        "_to_device_timer": copies,
        "_to_host_timer": lambda size: lambda repeats: 11e-6 + size / 2e9,
        "_copy_timer": held,
        "_product_timer": lambda size, dtype: lambda repeats: 2 * size**3 / 9e12,
        "_memory_timer": lambda size: lambda repeats: 1 / 7e11,
        "_kernel_timer": lambda dtype: lambda repeats: 2e-6,
    }
    for name, timer in made.items():
        monkeypatch.setattr(profile_machine, name, timer)
    found = profile_machine.measure_machine()
    assert (found.to_device.base, 1 / found.to_device.each) == pytest.approx((3e-6, 5e9))
    assert (found.to_host.base, 1 / found.to_host.each) == pytest.approx((11e-6, 2e9))
    assert (found.beside_compute, found.matmul_rate, found.memory_rate) == pytest.approx((4e9, 9e12, 7e11))
    assert (found.handoff_seconds, found.kernel_seconds) == pytest.approx((7e-6, 2e-6))


@pytest.mark.parametrize("copied", [True, False])
def test_blocks_are_copied_in_the_step_where_they_are_said_to_be(monkeypatch, copied):
    spaces = []

    def decode_step(model, plan, caches, token_ids):
        spaces.extend(jax.typeof(block.arrays[0]).memory_space for own in caches[0].blocks for block in own)
        return forward.decode_step(model, plan, caches, token_ids)

    monkeypatch.setattr(layer_bench, "decode_step", decode_step)
    bench = layer_bench.LayerBench(toy.model(), [0, 1], 3)
    seconds = bench.timer(layer_bench.Run(2, "keys_values", "keys_values", 5, blocks=2, copied=copied))
    assert spaces == [jax.memory.Space.Host if copied else jax.memory.Space.Device] * 4
    assert seconds() > 0


def test_a_program_is_timed_with_the_host_ahead(monkeypatch):
    """One that takes the host 2 s and the device 3 s, behind the 4 s that the device is kept busy: the clock is that of
    a simulated machine."""
    machine = Simulated()
    monkeypatch.setattr(timing, "time", machine)
    monkeypatch.setattr(jax, "block_until_ready", machine.wait)
    ahead = object.__new__(timing.HostAhead)
    ahead._busy_seconds, ahead._busy = 4.0, lambda: machine.dispatch(0.0, 4.0)
    assert ahead.median_seconds(lambda: machine.dispatch(2.0, 3.0), 3) == 3.0
    assert timing.median_seconds(lambda: machine.dispatch(2.0, 3.0), 3) == 5.0


class Simulated:
    """A host that dispatches to a device, which executes one thing after the other."""

    def __init__(self):
        self.now = self.free = 0.0

    def perf_counter(self):
        return self.now

    def dispatch(self, host, device):
        self.now += host
        self.free = max(self.free, self.now) + device
        return self.free

    def wait(self, end):
        self.now = max(self.now, end)


def test_the_device_is_kept_busy():
    """For one addition, as 1 ns is asked for: what takes no time is found to take none, or little."""
    ahead = timing.HostAhead(1e-9)
    assert ahead._busy_seconds > 0
    assert 0 <= ahead.median_seconds(lambda: np.zeros(3), 2) < 1


def test_sizes_are_powers_of_two_as_far_as_they_fit(monkeypatch):
    """OPT-6.7B's rows of 8 KiB, or of 16 as keys and values, in 256 MiB, or 2 GiB on the device; 2048 positions."""
    shape = models.preset("opt-6.7b").shape
    monkeypatch.setattr(profile_layers, "free_device_bytes", lambda: 60 * GIB)
    found = {
        (kind, batch, place): profile_layers.block_sizes(
            kind, shape, shape.layers[0], batch, profile_layers.longest_block(kind, place), place
        )
        for place in MEMORIES
        for kind in ATTENTION
        for batch in (1, 32, 64, 10**7)
    }
    assert found["keys_values", 1, "host"] == [128, 512, 2048]
    assert found["absorb", 1, "device"] == [32, 128, 512, 2048]
    assert found["absorb", 32, "host"] == [64, 256, 1024]
    assert found["keys_values", 32, "host"] == [32, 128, 512]
    assert found["keys_values", 64, "device"] == [32, 128, 512, 2048]
    assert found["recompute", 64, "host"] == [128, 256, 512, 1024, 2048]
    assert found["absorb", 10**7, "host"] == [1]
    monkeypatch.setattr(profile_layers, "free_device_bytes", lambda: 5 * GIB)
    assert profile_layers.longest_block("absorb", "device") == 5 * GIB // 8
    monkeypatch.setattr(profile_layers, "free_device_bytes", lambda: GIB)
    assert profile_layers.longest_block("absorb", "device") == GIB // 4


@given(
    base=st.floats(0, 1e-3),
    each=st.floats(0, 1e-6),
    sizes=st.lists(st.integers(1, 10**6), min_size=3, max_size=5, unique=True),
)
def test_a_line_is_found_again(base, each, sizes):
    seconds = [1e-6 + base + each * size for size in sizes]
    line = fit_line(sizes, seconds)
    assert np.allclose([line(size) for size in sizes], seconds, rtol=1e-6, atol=1e-12)


def test_a_curve_has_no_negative_parts():
    """What noise made less than nothing is nothing, and no tokens take no more than the fewest."""
    assert profile_layers.curve_through((2, 4, 8), (-1.0, 5.0, 9.0)) == Curve((0, 2, 4, 8), (0.0, 0.0, 5.0, 9.0))
    assert profile_layers.curve_through((2, 4), (3.0, 4.0)) == Curve((0, 2, 4), (2.0, 3.0, 4.0))
    assert profile_layers.curve_through((2, 4), (3.0, 1.0)) == Curve((0, 2, 4), (3.0, 3.0, 1.0))
    assert profile_layers.curve_through((2,), (3.0,)) == Curve((0, 2), (3.0, 3.0))


@pytest.mark.parametrize("seconds", [(3.0, 2.0, 1.0), (1.0, 4.0, 9.0), (-3.0, -2.0, -1.0)])
def test_no_part_of_a_line_is_negative(seconds):
    line = fit_line((1, 2, 3), seconds)
    assert line.base >= 0 and line.each >= 0


@pytest.mark.parametrize(("slow_few", "slow_many"), [((9, 1, 9), (1, 5, 5)), ((1, 9, 1), (9, 9, 1))])
def test_what_slows_a_program_for_a_while_is_not_in_a_slope(monkeypatch, slow_few, slow_many):
    """Programs of 3 and 8 s, each of them fast in one round of three: neither a median of rounds nor the best of their
    differences, -19 to 69 s, is 5 s."""
    slow = {few: iter(slow_few), many: iter(slow_many)}
    monkeypatch.setattr(timing, "median_seconds", lambda run, repeats: run() * next(slow[run]))
    assert timing.seconds_longer(few, many) == 5


def few():
    return 3.0


def many():
    return 8.0


def test_noise_is_not_less_than_nothing(monkeypatch):
    monkeypatch.setattr(timing, "median_seconds", lambda run, repeats: run())
    assert timing.seconds_longer(many, few) == timing.LEAST_SLOPE * 3


def test_a_handoff_is_found_again(monkeypatch):
    """Of copies of 2 MiB at 5 GB/s that wait for each other, a kernel of 3 us and two handoffs of 7 us between them."""
    nbytes = profile_machine.HANDOFF_BYTES

    def program(block_bytes, blocks, passes, computing, room):
        assert (block_bytes, room) == (nbytes, 1)
        return lambda arrays: 1e-3 + passes * blocks * (sum(array.nbytes for array in arrays) / blocks / 5e9 + 17e-6)

    monkeypatch.setattr(profile_machine, "_held_copies", program)
    monkeypatch.setattr(timing, "median_seconds", lambda run, repeats: run())
    each = profile_machine._copy_timer(nbytes, 4, False, 1)(9)
    assert profile_machine._handoff_seconds(each, nbytes / 5e9, 3e-6) == pytest.approx(7e-6)
    assert profile_machine._handoff_seconds(each, nbytes / 1e9, 3e-6) == 0  # noise: it is less than the copy alone


def test_a_poor_fit_is_measured_again_and_said(caplog):
    """What was slow at one of the two times does not count."""

    def line(*of_sizes):
        caplog.clear()
        timers = [functools.partial(lambda left, repeats: left.pop(0), list(own)) for own in of_sizes]
        with caplog.at_level(logging.INFO, logger="kvrecomp"):
            found = measured_line("copies", (1, 2, 3), timers)
        return found(0), found(10)

    assert line([1.0], [2.0], [3.0]) == pytest.approx((0.0, 10.0)) and not caplog.text
    assert line([1.0, 9.0], [5.0, 2.0], [3.0, 3.0]) == pytest.approx((0.0, 10.0))
    assert "at 2; measuring it again" in caplog.text and "predictions" not in caplog.text
    line([1.0, 1.0], [5.0, 5.0], [1.0, 1.0])
    assert "at 2; measuring it again" in caplog.text and "predictions may be as far off" in caplog.text
