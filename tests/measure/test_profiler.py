"""The profile of this machine is kept, and measured anew only when it must be."""

import dataclasses
import json
import logging
import types

import numpy as np
import pytest
import toy

import kvrecomp
from kvrecomp.measure import profiler
from kvrecomp.predict.estimate import estimate
from kvrecomp.predict.hardware import HardwareProfile


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


def test_measured_once(cache, counted):
    first = profiler.profile()
    assert profiler.profile() == first and counted == ["measured"]
    assert list(cache.rglob("*.json")) == [profiler.profile_path()]
    profiler.profile(refresh=True)
    assert counted == ["measured"] * 2


@pytest.mark.parametrize(
    ("content", "why"),
    [
        *((content, "no profile") for content in ("{", "[]", "{}", "\0" * 50)),
        (json.dumps({"format": 0}), "another version"),
        (json.dumps({"format": profiler.FORMAT, "device": "cpu"}), "layers"),
        ({"driver": "another"}, "driver another"),
    ],
)
def test_a_file_that_is_no_profile_of_this_machine_is_measured_anew_and_said(
    cache, counted, caplog, known_machine, content, why
):
    path = profiler.profile_path()
    path.parent.mkdir()
    if isinstance(content, dict):  # what another machine's has that is different
        content = json.dumps({"format": profiler.FORMAT, **known_machine.to_json(), **content})
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        profiler.profile()
    assert counted == ["measured"]
    (record,) = caplog.records
    assert (
        str(path) in record.message
        and "measuring it anew" in record.message
        and why in record.message
        and "\n" not in record.message
    )
    assert profiler.profile() and counted == ["measured"]


def test_a_profile_that_cannot_be_kept_is_used_and_said(cache, counted, caplog, known_machine):
    (cache / "kvrecomp").write_text("no directory")
    with caplog.at_level(logging.WARNING):
        assert profiler.profile() == known_machine
    record = caplog.records[-1]
    assert "cannot be kept" in record.message and "set XDG_CACHE_HOME" in record.message


def test_generate_refuses_a_profile_of_another_machine():
    with pytest.raises(kvrecomp.PlanError, match=r"the profile is of Tesla T4 x1.*this machine is cpu"):
        kvrecomp.generate(
            toy.model(), np.ones((2, 5), np.int32), max_new_tokens=3, profile=HardwareProfile.from_datasheet("t4")
        )


@pytest.fixture
def timed(monkeypatch, known_machine):
    """Layers' times are estimated; a list with the positions and the batch of each that was asked for."""
    asked = []

    def measure(model, layer, batch):
        asked.append((model.shape.positions, batch))
        found, shape = estimate(known_machine, layer, 4, batch), model.shape
        return dataclasses.replace(found, dtype=shape.dtype, vocab=shape.vocab, positions=shape.positions)

    monkeypatch.setattr(profiler, "measure_layer", measure)
    return asked


def test_layers_are_timed_once_a_batch(cache, counted, timed):
    model = toy.model("350m")
    layers = len(set(model.shape.layers))
    first = profiler.profile(model, batch=3)
    assert len(first.layers) == layers and timed == [(toy.POSITIONS, 3)] * layers
    for layer in model.shape.layers:
        assert first.times(layer, "float32", 3) is not None and first.times(layer, "float32", 2) is None
    assert profiler.profile(model, batch=3) == first
    assert profiler.profile() == first  # kept with the machine
    assert timed == [(toy.POSITIONS, 3)] * layers and counted == ["measured"]


def test_what_others_timed_meanwhile_is_kept(cache, counted, timed, monkeypatch):
    """Another process times the same layers for another batch, while they are timed here."""
    model, batches, measure = toy.model(), [5, 3], profiler.measure_layer

    def measure_beside_others(model, layer, batch):
        if batches:
            profiler.profile(model, batch=batches.pop())
        return measure(model, layer, batch)

    profiler.profile()
    monkeypatch.setattr(profiler, "measure_layer", measure_beside_others)
    profiler.profile(model, batch=2)
    assert {times.batch for times in profiler.profile().layers} == {2, 3, 5} and counted == ["measured"]


def test_layers_are_timed_again_for_more_positions(cache, counted, timed):
    """As a longer cache has more tokens than were timed; fewer are covered."""
    shape = toy.model().shape
    for positions in (101, 57, 101, 211, 101):
        profiler.profile(types.SimpleNamespace(shape=dataclasses.replace(shape, positions=positions)), batch=3)
    layers = len(set(shape.layers))
    assert timed == [(101, 3)] * layers + [(211, 3)] * layers
