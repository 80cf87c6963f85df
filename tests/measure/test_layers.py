"""Timing layers: what steps are made of is found again from the seconds that they take."""

import threading

import jax
import numpy as np
import pytest
import toy

import models
from kvrecomp.measure import layer_bench, timing
from kvrecomp.measure import layers as measure_layers
from kvrecomp.measure.layers import block_sizes, choose_runs, curve_through, longest_block, measure_layer
from kvrecomp.plan import GIB, MEMORIES
from kvrecomp.predict.hardware import ATTENTION, WORKS, Curve, attention_work, project_work
from kvrecomp.run import step


def test_a_layer_is_timed(monkeypatch):
    """On this machine, with few and short programs; no time is negative, and there is one for every kind of work."""
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(layer_bench, "STEPS", 2)
    for size, fewer in {"SIZES": 1, "SHORTER": 0, "MORE_RECOMPUTED": 0, "MORE_LAYERS": 3}.items():
        monkeypatch.setattr(measure_layers, size, fewer)
    model = toy.model("350m")
    times = measure_layer(model, model.shape.layers[0], batch=3)
    assert (times.layer, times.dtype, times.batch) == (model.shape.layers[0], "float32", 3)
    assert set(times.work) == set(WORKS) and (times.vocab, times.positions) == (toy.VOCAB, toy.POSITIONS)
    assert any(curve(7) > 0 for curve in times.work.values())


@pytest.mark.parametrize(
    ("number", "slower", "found_slower"),
    [(0, (1.3, 2.9), (1.3, 2.9)), (1, (1.2, 2.1), (1.0, 2.1)), (2, (19.0, 5.8), (10.0, 5.8))],
)
def test_a_layer_is_found_again(monkeypatch, number, slower, found_slower):
    """Steps that take what the cost function adds up: what was measured of them is what they were made of.

    Two measurements of three are far off, of every step. Uneven blocks are slower, by what may be noise and by more.
    """
    rng = np.random.default_rng(number)
    model = toy.model("350m")
    layer = model.shape.layers[0]

    def longest(kind, memory):
        return 2**14 if (kind, memory) == ("keys_values", "host") else 2**16

    monkeypatch.setattr(measure_layers, "longest_block", longest)
    monkeypatch.setattr(measure_layers, "uneven", lambda tokens: tokens % 2)  # of blocks so short, too

    def curve(kind, memory):
        sizes = block_sizes(kind, model.shape, layer, 3, longest(kind, memory), memory)
        assert len(sizes) == 3 + 2 * (kind == "recompute") + (memory == "device")
        steps = rng.uniform(1e-6, 9e-6, len(sizes))
        base, second = 1e-5, 1e-5 + steps[0]  # no tokens are on the line through the first two sizes
        first = base + steps[0] * sizes[0] / sizes[1]
        return Curve((0, *sizes), (base, first, second, *(second + steps[2:].cumsum())))

    curves = {(kind, memory): curve(kind, memory) for kind in ATTENTION for memory in MEMORIES}
    curves["recompute", "device"] = curves["recompute", "host"].plus(rng.uniform(1e-6, 9e-6))
    project = dict(zip(ATTENTION, rng.uniform(1e-4, 3e-4, 3)))
    prepare, finish, outside = rng.uniform(1e-4, 9e-4, 3)
    awaiting = rng.uniform(2e-6, 9e-6)
    slower, found_slower = (dict(zip(MEMORIES, factors)) for factors in (slower, found_slower))

    def step_seconds(run):
        tail, block = curves[run.tail, "device"], curves[run.kind, run.memory]
        attention = block(run.tokens)
        if run.kind == "absorb" and run.tokens == block.sizes[-1] - 1:
            attention *= slower[run.memory]
        seconds = project[run.tail] + ("absorb" in (run.tail, run.kind)) * prepare + finish
        seconds += tail(layer_bench.TAIL) - tail(0) + run.blocks * (attention + run.copied * awaiting)
        first_copy = run.copied * 1e-5  # for which nothing is computed meanwhile
        return outside + first_copy + run.layers * seconds

    class Bench:
        def __init__(self, *_):
            pass

        def timer(self, run):
            is_step, factors = isinstance(run, layer_bench.Run), iter((9, 1, 5))
            seconds = step_seconds(run) if is_step else outside / 2 + run.layers * finish
            return lambda: next(factors) * seconds

    monkeypatch.setattr(measure_layers, "LayerBench", Bench)
    times = measure_layer(model, layer, batch=3)

    def found(work):
        return times.work[work](0)

    for (kind, memory), expected in curves.items():
        measured = times.work[attention_work(kind, memory)]
        assert measured.sizes == expected.sizes and measured.seconds == pytest.approx(expected.seconds, rel=1e-6)
        if kind == "absorb":
            uneven, expected = times.work[attention_work(kind, memory, 257)], expected.times(found_slower[memory])
            assert uneven.sizes == expected.sizes and uneven.seconds == pytest.approx(expected.seconds, rel=1e-6)
    for kind in ATTENTION:
        assert found(project_work(kind)) == pytest.approx(project[kind], rel=1e-6)
    assert found("prepare") == pytest.approx(prepare, rel=1e-6)
    assert found("finish") == pytest.approx(finish, rel=1e-6)
    assert found("await") == pytest.approx(awaiting, rel=1e-6)
    assert times.outside == pytest.approx(outside, rel=1e-6)


def test_what_programs_have_in_common_is_compiled_before_they_are(monkeypatch):
    """One, then one of each kind of attention: the others have the kernels that were chosen for these."""
    begun, ended = [], []
    model, barrier = toy.model(), threading.Barrier(3, timeout=60)
    runs = choose_runs(model.shape, model.shape.layers[0], 3)
    of_kinds = [runs.one_block[kind, "host"][0] for kind in ATTENTION]

    class Compiling:
        def __init__(self, *_):
            pass

        def timer(self, what):
            begun.append((len(ended), what))
            if what in of_kinds:
                barrier.wait()  # for the others of them
            ended.append(what)
            return lambda: 1.0

    monkeypatch.setattr(measure_layers, "LayerBench", Compiling)
    monkeypatch.setattr("kvrecomp.run.programs.os.cpu_count", lambda: 8)
    measure_layer(model, model.shape.layers[0], batch=3)
    assert begun[0] == (0, runs.layers[0]) and [before for before, _ in begun[1:4]] == [1] * 3
    kinds = [what for _, what in begun[1:4]]
    assert sorted(run.kind for run in kinds) == sorted(run.tail for run in kinds) == sorted(ATTENTION)
    assert all(before >= 4 for before, _ in begun[4:]) and len(begun) == len(set(ended)) > 20


@pytest.mark.parametrize("copied", [True, False])
def test_blocks_are_copied_in_the_step_where_they_are_said_to_be(monkeypatch, copied):
    spaces = []

    def decode_step(model, plan, blocks, recents, token_ids):
        spaces.extend(jax.typeof(block.arrays[0]).memory_space for layer in blocks[0] for block in layer)
        return step.decode_step(model, plan, blocks, recents, token_ids)

    monkeypatch.setattr(layer_bench, "decode_step", decode_step)
    bench = layer_bench.LayerBench(toy.model(), [0, 1], 3)
    seconds = bench.timer(layer_bench.Run(2, "keys_values", "keys_values", 5, blocks=2, copied=copied))
    assert spaces == [jax.memory.Space.Host if copied else jax.memory.Space.Device] * 4
    assert seconds() > 0


def test_sizes_are_powers_of_two_as_far_as_they_fit(monkeypatch):
    """OPT-6.7B's rows of 8 KiB, or of 16 as keys and values, in 256 MiB, or 2 GiB on the device; 2048 positions."""
    shape = models.preset("opt-6.7b").shape
    monkeypatch.setattr(measure_layers, "free_device_bytes", lambda: 60 * GIB)
    found = {
        (kind, batch, memory): block_sizes(kind, shape, shape.layers[0], batch, longest_block(kind, memory), memory)
        for memory in MEMORIES
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
    monkeypatch.setattr(measure_layers, "free_device_bytes", lambda: 5 * GIB)
    assert longest_block("absorb", "device") == 5 * GIB // 8
    monkeypatch.setattr(measure_layers, "free_device_bytes", lambda: GIB)
    assert longest_block("absorb", "device") == GIB // 4


def test_a_curve_has_no_negative_parts():
    """What noise made less than nothing is nothing, and no tokens take no more than the fewest."""
    assert curve_through((2, 4, 8), (-1.0, 5.0, 9.0)) == Curve((0, 2, 4, 8), (0.0, 0.0, 5.0, 9.0))
    assert curve_through((2, 4), (3.0, 4.0)) == Curve((0, 2, 4), (2.0, 3.0, 4.0))
    assert curve_through((2, 4), (3.0, 1.0)) == Curve((0, 2, 4), (3.0, 3.0, 1.0))
    assert curve_through((2,), (3.0,)) == Curve((0, 2), (3.0, 3.0))
