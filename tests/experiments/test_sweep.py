"""The sweep: which plans are compared, how they are measured, and what is said of them. No time is asserted."""

import dataclasses
import functools
import io
import itertools
import json
import sys

import pytest
import scripts
import toy
from program_text import normalised
from rich.console import Console

import kvrecomp
from experiments import sweep
from experiments.support.suite import step_timing
from kvrecomp.plan import BlockSpec
from kvrecomp.plan.named import named_plan
from kvrecomp.predict.hardware import HardwareProfile

WORKLOAD = kvrecomp.Workload(batch=3, prompt=16, new=step_timing.NEW)
HOST = 2.0**30


@pytest.fixture
def model(monkeypatch):
    """A toy model with enough positions, measured briefly."""
    monkeypatch.setattr(step_timing, "STEPS", 4)
    config = step_timing.with_positions(toy.OPT, WORKLOAD.prompt + WORKLOAD.new)
    return toy.randomised(config.build(dtype="float32", rngs=None))


def quiet():
    return Console(file=io.StringIO(), width=150)


def test_position_tables_grow_and_do_not_shrink():
    assert step_timing.with_positions(toy.OPT, 99).positions == 99
    assert step_timing.with_positions(toy.OPT, 5).positions == toy.OPT.positions


@pytest.mark.parametrize("name", ["split:0.5", "device:0.5"])
def test_a_filled_cache_is_laid_out_as_the_plan_says(model, name):
    plan = named_plan(name, model.shape, WORKLOAD)
    cache = step_timing.filled_cache(plan)
    toy.assert_blocks(cache, plan, 0)
    assert toy.get(cache.recent.lengths).tolist() == [WORKLOAD.prompt] * WORKLOAD.batch
    kinds = {"host": "pinned_host", "device": "device"}
    for block in itertools.chain(*cache.blocks):
        for array in block.arrays:
            assert array.sharding.memory_kind == kinds[block.memory]
            assert 0.5 < toy.get(array).std() < 2


def test_of_short_steps_the_least_of_three_medians_counts(model, known_machine, monkeypatch):
    """All plans are measured before any is again; half a second is not short."""
    measured: dict[str, list[float]] = {}

    def seconds(decoder):
        times = measured.setdefault(decoder.plan.name, [])
        assert len(times) <= min(len(others) for plan, others in measured.items() if plan != "recompute")
        times.append(0.5 if decoder.plan.name == "recompute" else (0.015, 0.011, 0.013)[len(times)])
        return times[-1]

    monkeypatch.setattr(sweep, "side_by_side", lambda compile, decoders: None)
    monkeypatch.setattr(sweep, "step_seconds", seconds)
    rows = sweep.measure_workload(model, WORKLOAD, known_machine, [], HOST, quiet())
    assert measured.pop("recompute") == [0.5] and all(len(times) == 3 for times in measured.values())
    assert [row.median_ms for row in rows] == [500 if row.plan == "recompute" else 11 for row in rows]


def test_choices_and_what_is_near_the_best_are_measured_again():
    """In either room, and beside them what is short."""
    seconds = {"short": 0.9 * sweep.SHORT, "best": 2.0, "near": 2.2, "far": 2.4, "slow": 9.0, "other": 8.0}
    wanted = [(25.0, True, "far"), (25.0, False, "best"), (25.0, False, "near"), (25.0, False, "slow")]
    wanted += [(50.0, True, "other"), (50.0, False, "slow"), (50.0, False, "lost")]
    assert sweep.measured_again(seconds, wanted) == ["short", "best", "near", "far", "slow", "other"]
    assert sweep.measured_again(seconds, wanted[:4]) == ["short", "best", "near", "far"]
    assert sweep.measured_again(seconds, wanted[1:4]) == ["short", "best", "near"]
    assert sweep.measured_again(seconds, [(None, False, key) for key in seconds]) == ["short"]
    assert sweep.measured_again(seconds, [(75.0, True, "lost")]) == ["short"]  # nothing for that room fitted
    # Under two names in a room, once chosen.
    assert sweep.measured_again(seconds, [*wanted[:4], (25.0, False, "far")])[-1] == "far"


def test_plans_that_differ_in_a_window_that_holds_nothing_are_one_program(model):
    """In two layers of three blocks of 384 bytes; a window of one of them holds the others."""

    def plan(window):
        return dataclasses.replace(named, window=window)

    blocks = (BlockSpec("activations", "host", 2),) * 3
    named = named_plan("activations", model.shape, dataclasses.replace(WORKLOAD, prompt=6), tail=step_timing.NEW)
    layers = tuple(dataclasses.replace(layer, prompt=blocks) for layer in named.layers)
    named = dataclasses.replace(named, layers=layers)
    size = named.bytes_of(model.shape.layers[0], blocks[0])
    narrow, wide, wider = (plan(blocks * size) for blocks in (1, 100, 200))
    assert sweep._program_key(wide) == sweep._program_key(wider) != sweep._program_key(narrow)
    assert len({normalised(kvrecomp.Decoder(model, plan).text("step", 0)) for plan in (wide, wider)}) == 1


def test_predictions(model, known_machine):
    rows = sweep.measure_workload(model, WORKLOAD, known_machine, [], HOST, quiet())
    assert [row.plan for row in rows] == list(sweep.PLANS)
    for row in rows:
        plan = named_plan(row.plan, model.shape, WORKLOAD)
        assert row.link_bytes == plan.bytes_in("host") and row.room is None and not row.chosen
        assert row.median_ms > 0 and row.predicted_ms > 0


def test_choices_keep_to_the_room(model, known_machine, monkeypatch):
    """Half of the keys and values: each plan holds at most that on the device, and one of them is chosen."""
    monkeypatch.setattr(sweep, "side_by_side", lambda compile, decoders: None)
    monkeypatch.setattr(sweep, "step_seconds", lambda decoder: 0.5)
    budget = sweep.budget_with_room(model.shape, WORKLOAD, 50, HOST)
    rivals = sweep.rivals_within(model, WORKLOAD, budget)
    needed = [sum(kvrecomp.memory_needed(plan)["device"].values()) for plan in rivals]
    assert len(rivals) >= 10 and max(needed) <= budget.device < 1.01 * max(needed)
    rows = sweep.measure_workload(model, WORKLOAD, known_machine, [50.0], HOST, quiet())
    assert [row.plan for row in rows if row.chosen] == ["auto"] and len(rows) == len(rivals) + 1
    assert {row.room for row in rows} == {50.0}


def test_what_does_not_fit_is_left_out_and_said(model, known_machine, monkeypatch):
    monkeypatch.setattr(sweep, "side_by_side", lambda compile, decoders: None)
    monkeypatch.setattr(sweep, "step_seconds", lambda decoder: 0.5)
    console = quiet()
    limit = named_plan("activations", model.shape, WORKLOAD).bytes_in("host") + 1
    rows = sweep.measure_workload(model, WORKLOAD, known_machine, [], limit, console)
    names = [row.plan for row in rows]
    assert "activations" in names and "keys_values" not in names
    assert "left out: keys_values, toy" in console.file.getvalue()


def test_the_summary_has_a_line_for_each_prediction_or_choice():
    row = sweep.Measured("m", 1, 2, 3, "p", None, 100.0, 104.0, 0)
    chosen = dataclasses.replace(row, chosen=True, room=25.0, median_ms=103.0)
    rivals = [dataclasses.replace(row, room=25.0, median_ms=value) for value in (100.0, 200.0)]
    _, _, *lines = sweep.summary([row, chosen, *rivals]).splitlines()
    assert len(lines) == 2 and "+4.0" in lines[0] and "1.030 of 2" in lines[1]


command = functools.partial(scripts.call, sweep)


@pytest.fixture
def results(tmp_path) -> list[str]:
    """Two files: a prediction, and a choice with a rival."""
    row = dataclasses.asdict(sweep.Measured("m", 1, 2, 3, "activations", None, 100.0, 104.0, 0))
    choice = row | {"room": 25.0, "plan": "auto", "chosen": True}
    files = {"a.json": [row], "b.json": [choice, choice | {"plan": "split:0.5", "chosen": False, "median_ms": 90.0}]}
    for name, rows in files.items():
        (tmp_path / name).write_text(json.dumps({"device": "Some GPU", "rows": rows}))
    return [str(tmp_path / name) for name in files]


def test_results_are_read_said_and_drawn_without_measuring(results, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sweep, "run", None)
    pictures = [tmp_path / "predictions.png", tmp_path / "choices.png"]
    command(f"--from={','.join(results)}", f"--plot={pictures[0]}", f"--plot_choices={pictures[1]}")
    said = capsys.readouterr().out
    assert "1 of 2 predictions are within 5 %, 1 within 10 %" in said and "0 of 1 choices take at most 3 %" in said
    assert all(picture.stat().st_size > 1000 for picture in pictures)


def test_what_was_measured_before_a_failure_is_written(tmp_path, monkeypatch, known_machine):
    first, second = (sweep.Measured("m", batch, 2, 3, "activations", None, 9.0, 8.0, 0) for batch in (7, 5))

    def run(*_):
        yield known_machine, [first]
        yield known_machine, [second]
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sweep, "run", run)
    with pytest.raises(RuntimeError, match="out of memory"):
        command(f"--out={tmp_path}/rows.json")
    document = json.loads((tmp_path / "rows.json").read_text())
    assert HardwareProfile.from_json(document["profile"]) == known_machine
    rows = document["rows"]
    assert rows == [dataclasses.asdict(first), dataclasses.asdict(second)]


def test_a_sweep_goes_on_where_it_was(tmp_path, monkeypatch, known_machine):
    """What is in the file is not measured again, nor is a model made for nothing; another commit's is left alone."""
    made, asked = [], []

    def measure(model, workload, _, rooms, *__):
        asked.append((model, workload.batch, workload.prompt, rooms))
        if len(asked) == 3:
            raise RuntimeError("killed")
        return [
            sweep.Measured(model, workload.batch, workload.prompt, workload.new, "activations", room, 9.0, 8.0, 0)
            for room in rooms or [None]
        ]

    monkeypatch.setattr(sweep.models, "preset", lambda name: dataclasses.replace(toy.OPT, name=name))
    monkeypatch.setattr(sweep.models, "create", lambda config: made.append(config.name) or config.name)
    monkeypatch.setattr(sweep.kvrecomp, "profile", lambda *_, **__: known_machine)
    monkeypatch.setattr(sweep.memory, "limit_pinned", lambda _: None)
    monkeypatch.setattr(sweep, "measure_workload", measure)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--batch=3"])
    flags_given = ["--model=a,b", "--batch=3", "--prompt=5,7", f"--out={tmp_path}/rows.json", "--commit=1234567"]
    with pytest.raises(RuntimeError, match="killed"):
        command(*flags_given)
    command(*flags_given)
    command(*flags_given)
    assert made == ["a", "b", "b"]
    assert asked == [("a", 3, 7, []), ("a", 3, 5, []), ("b", 3, 7, []), ("b", 3, 7, []), ("b", 3, 5, [])]
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--rooms=0,50"])
    command(*flags_given, "--rooms=0,50", "--model=b", "--prompt=5")
    command(*flags_given, "--rooms=25,50", "--model=b", "--prompt=5")
    assert asked[5:] == [("b", 3, 5, [0.0, 50.0]), ("b", 3, 5, [25.0])]
    path = tmp_path / "rows.json"
    document = json.loads(path.read_text())
    assert document["command"] == "python sweep.py --batch=3 && python sweep.py --rooms=0,50"
    rows = [(row["model"], row["prompt"], row["room"]) for row in document["rows"]]
    assert rows == [*((m, p, None) for m in "ab" for p in (7, 5)), *(("b", 5, room) for room in (0.0, 50.0, 25.0))]
    written = path.read_text()
    with pytest.raises(SystemExit, match="was measured with commit 1234567, and this is 7654321: give another"):
        command(*flags_given, "--commit=7654321")
    assert path.read_text() == written
