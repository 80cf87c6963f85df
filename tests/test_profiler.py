"""Measuring the machine: what is measured is plausible, kept, and measured anew only when it must be."""

import dataclasses
import json
import logging
import time
from typing import Any

import jax
import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

import kvrecomp
from kvrecomp import profile_layers, profile_machine, profiler
from kvrecomp.hardware import ATTENTION, WORKS, HardwareProfile, Line, attention_work
from kvrecomp.plan import MEMORIES
from kvrecomp.timing import fit_line, measured_line


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
    monkeypatch.setattr(profile_layers, "median_seconds", lambda run, repeats=1: profiled(run))
    monkeypatch.setattr(profile_layers, "STEPS", 2)
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


@pytest.mark.parametrize("number", range(3))
def test_a_layer_is_found_again(monkeypatch, number):
    """Steps that take what the cost function adds up: what was measured of them is what they were made of."""
    rng = np.random.default_rng(number)
    attending: dict[Any, Line] = {
        (kind, place): Line(*rng.uniform(1e-6, 9e-6, 1), *rng.uniform(1e-8, 9e-8, 1))
        for kind in ATTENTION
        for place in MEMORIES
    }
    dense, outside, prepare = rng.uniform(1e-4, 9e-4, 3)

    class Steps:
        def __init__(self, *_):
            pass

        def timer(self, count, kind, place, tokens):
            of_blocks = sum(attending[kind, place](own) for own in tokens)
            return lambda: outside + count * (dense + (kind == "absorb") * prepare + of_blocks)

    monkeypatch.setattr(profile_layers, "_LayerBench", Steps)
    model = toy.model("350m")
    times = profile_layers.measure_layer(model, model.shape.layers[0], batch=3)
    found = {
        "prepare": Line(prepare, 0.0),
        **{attention_work(kind, place): line for (kind, place), line in attending.items()},
    }
    for work, line in found.items():
        assert (times.work[work].base, times.work[work].each) == pytest.approx((line.base, line.each), rel=1e-6), work
    assert times.work["project"].base + times.work["finish"].base == pytest.approx(dense, rel=1e-9)
    assert times.outside == pytest.approx(outside, rel=1e-6)


@given(
    base=st.floats(0, 1e-3),
    each=st.floats(0, 1e-6),
    sizes=st.lists(st.integers(1, 10**6), min_size=3, max_size=5, unique=True),
)
def test_a_line_is_found_again(base, each, sizes):
    seconds = [1e-6 + base + each * size for size in sizes]
    line = fit_line(sizes, seconds)
    assert np.allclose([line(size) for size in sizes], seconds, rtol=1e-6, atol=1e-12)


def test_a_difference_that_noise_made_nothing_does_not_decide():
    """One, four and eight more seconds of twenty, each measured a second short or long."""
    line = fit_line((1, 4, 8), (1e-9, 5.0, 8.0), timed=(20.0, 25.0, 28.0))
    assert line(8) == pytest.approx(8, abs=1) and line(4) == pytest.approx(4, abs=1)
    below = fit_line((1, 4, 8), (-1.0, 5.0, 8.0), timed=(20.0, 25.0, 28.0))
    assert below.base == 0 and below(8) == pytest.approx(8, abs=1)


@pytest.mark.parametrize("seconds", [(3.0, 2.0, 1.0), (1.0, 4.0, 9.0), (-3.0, -2.0, -1.0)])
def test_no_part_of_a_line_is_negative(seconds):
    line = fit_line((1, 2, 3), seconds)
    assert line.base >= 0 and line.each >= 0


def test_a_poor_fit_is_measured_again_and_said(caplog):
    asked = []

    def measure(size, repeats):
        asked.append(repeats)
        return {1: 1.0, 2: 5.0, 3: 1.0}[size]

    with caplog.at_level(logging.INFO, logger="kvrecomp"):
        measured_line("copies", (1, 2, 3), measure)
    assert asked == [5] * 3 + [15] * 3
    assert "measuring it again" in caplog.text and "predictions may be as far off" in caplog.text
