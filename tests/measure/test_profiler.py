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
from kvrecomp.predict.hardware import WORKS, Curve, HardwareProfile, LayerTimes


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


ABSURD = {
    **{f"rate {value!s:.9}": {"beside_compute": value} for value in (0, -1, True, "1", None, float("inf"), 10**400)},
    "nan": {"matmul_rate": float("nan")},
    "line": {"to_device": {"base": 1e-5, "each": 10**400}},
    "host": {"host_bytes": False},
    "layers": {"layers": None},
    "more": {"unknown": 1},
    "format": {"format": 0},
}


def layer_with(**absurd):
    """A profile's one layer, with something that nobody measured."""
    times = LayerTimes(toy.OPT.shape.layers[0], "float32", 3, dict.fromkeys(WORKS, Curve.line(1e-3, 1e-6)))
    return {"layers": [{**dataclasses.asdict(times), **absurd}]}


ABSURD |= {
    "a layer's batch": layer_with(batch="3"),
    "a layer's vocabulary": layer_with(vocab=-5),
    "a layer's positions": layer_with(positions="all"),
    "a layer's curve": layer_with(work={kind: {"sizes": [0, 10**400], "seconds": [1, 2]} for kind in WORKS}),
    "no curve": layer_with(work=[]),
}


DAMAGED = {
    **{content: content for content in ("", "{", "[]", "{}", "3")},
    "zeros": "\0" * 50,
    "nested": "[" * 100_000,
    "digits": "1" * 5000,
    "no text": b"\xff\xfe",
}


@pytest.mark.parametrize("name", [*DAMAGED, *ABSURD])
def test_a_corrupt_file_is_measured_anew_and_said(cache, counted, caplog, known_machine, name):
    path = profiler.profile_path()
    path.parent.mkdir()
    absurd = {"format": profiler.FORMAT, **known_machine.to_json(), **ABSURD.get(name, {})}
    content = DAMAGED.get(name, json.dumps(absurd))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
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


def test_what_is_not_absurd_is_read(cache, counted, known_machine):
    profiler.profile_path().parent.mkdir()
    document = {"format": profiler.FORMAT, **known_machine.to_json(), **layer_with()}
    profiler.profile_path().write_text(json.dumps(document))
    assert len(profiler.profile().layers) == 1 and not counted


def test_a_folder_in_place_of_the_profile(cache, counted, caplog, known_machine):
    profiler.profile_path().mkdir(parents=True)
    assert profiler.profile() == known_machine
    assert "cannot be kept" in caplog.records[-1].message


def test_without_a_home_the_machine_is_measured_and_it_is_said(monkeypatch, counted, caplog, known_machine):
    """As in a container whose user has no entry."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(profiler.pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert profiler.profile() == known_machine and counted == ["measured"]
    (record,) = caplog.records
    assert "cannot be kept (there is no home directory)" in record.message and "set XDG_CACHE_HOME" in record.message


def test_that_the_machine_is_measured_is_said(cache, counted, caplog, capfd, monkeypatch):
    """In the log, or on a terminal; nothing is where it was measured."""
    with caplog.at_level(logging.INFO, logger="kvrecomp"):
        profiler.profile()
        profiler.profile()
    assert [record.message for record in caplog.records] == ["measuring this machine, which is done once"]
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    profiler.profile(refresh=True)
    out, err = capfd.readouterr()
    assert "measuring this machine, which is done once" in err and not out


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
