"""The what-if tool: what it predicts against values worked out by hand, what it draws, and how it refuses."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import scripts

import models
from experiments import plan
from experiments.support import what_if
from experiments.support.plots import png
from experiments.support.plots.split import draw_split
from experiments.support.results import tables
from kvrecomp.measure import profiler
from kvrecomp.plan import GIB, Budget, Workload
from kvrecomp.plan.named import named_plan, with_weights
from kvrecomp.predict.cost import plan_costs
from kvrecomp.predict.hardware import HardwareProfile

ROOT = Path(__file__).parents[2]
SMALL = ["--model=opt-125m", "--batch=16", "--prompt=500", "--new=24", "--hardware=a100"]
WORKLOAD = Workload(16, 500, 24)  # of SMALL
# OPT-6.7B, 32 x 1024, in bfloat16.
LAYERS, HIDDEN, BATCH, PROMPT, NEW = 32, 4096, 32, 1024, 32
LARGE = ["--model=opt-6.7b", f"--batch={BATCH}", f"--prompt={PROMPT}", f"--new={NEW}", "--hardware=a100"]
PAIR_BYTES = 2 * HIDDEN * 2 * BATCH * PROMPT * LAYERS  # all keys and values
LINK, MATMUL = 32e9, 312e12  # of the A100


command = functools.partial(scripts.call, plan)


def small(budget: Budget) -> what_if.WhatIf:
    return what_if.what_if(models.preset("opt-125m").shape, WORKLOAD, HardwareProfile.from_datasheet("a100"), budget)


@pytest.fixture(scope="module")
def found() -> what_if.WhatIf:
    """With room for some of the cache: with all of it in host memory a plan needs 1.09 GiB, on the device 1.37."""
    return small(Budget.of_gib(0.85))


@pytest.fixture
def results(tmp_path) -> Path:
    """A results file of which three rows, one plan twice, are of SMALL."""
    row = {"model": "opt-125m", "batch": 16, "prompt": 500, "new": 24, "plan": "split:0.5", "median_ms": 11.0}
    rows = [
        row,
        row | {"plan": "keys_values", "median_ms": 20.0},
        row | {"plan": "keys_values", "median_ms": 22.0, "dtype": "bfloat16"},
        row | {"plan": "device", "median_ms": 3.0, "weights": "device", "groups": 1, "order": "row"},
        *(row | {key: 1} for key in ("batch", "prompt", "new")),
        row | {"model": "opt-1.3b"},
        row | {"dtype": "float32"},
        row | {"groups": 8, "order": "column"},
        row | {"weights": "host"},
        row | {"plan": "auto"},
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"device": "Some GPU", "rows": rows}))
    return path


# --- what it predicts -------------------------------------------------------------------------------------------------


def test_bytes_and_rates_by_hand(capsys):
    command(*LARGE, "--device_memory_gib=20", "--json")
    *human, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    auto, pairs, activations, kvpr, device = document["alternatives"]

    assert [row["plan"] for row in document["alternatives"]][1:3] == ["keys_values", "activations"]
    assert [row["link_bytes"] for row in (pairs, activations, device)] == [PAIR_BYTES, PAIR_BYTES // 2, 0]
    assert [row["host_bytes"] for row in (pairs, activations, device)] == [PAIR_BYTES, PAIR_BYTES // 2, 0]
    assert device["device_bytes"] - pairs["device_bytes"] == PAIR_BYTES
    fraction = float(kvpr["plan"].removeprefix("kvpr:"))
    assert kvpr["schedule"] == "layerwise"
    assert kvpr["link_bytes"] == PAIR_BYTES * (1 - round(fraction * PROMPT) / PROMPT / 2)
    assert kvpr["predicted_ms"] == min(document["curves_ms"]["kvpr"])
    assert fraction == document["fractions"][document["curves_ms"]["kvpr"].index(kvpr["predicted_ms"])]

    # The link is the bound: bytes over its rate, and the little that is computed before the first copy is there.
    for row in (pairs, activations):
        assert 1 <= row["predicted_ms"] / 1e3 * LINK / row["link_bytes"] < 1.02
    for row in document["alternatives"]:
        assert row["tokens_per_second"] == pytest.approx(BATCH / row["predicted_ms"] * 1e3)
    assert auto["predicted_ms"] <= 1.002 * min(row["predicted_ms"] for row in (pairs, activations, kvpr))
    assert auto["link_bytes"] < PAIR_BYTES / 2 and auto["fits"] and auto["device_bytes"] <= 20 * GIB

    missing = (device["device_bytes"] - 20 * GIB) / GIB
    assert not device["fits"] and device["misfit"] == f"device lacks {missing:.2f} GiB"
    assert all(row["fits"] and not row["misfit"] for row in (pairs, activations, kvpr))
    shown = "\n".join(human)
    parts = ("NVIDIA A100-PCIE-40GB: 20.00 GiB of device memory and any amount of host memory", "Plan auto: opt-6.7b")
    for part in (*parts, "ms a step predicted, bound by the link", "auto (chosen)", f"no: {device['misfit']}"):
        assert part in shown
    assert document["budget"] == {"device": 20 * GIB, "host": None}
    assert document["measured"] == [] and document["measured_on"] is None

    # KVPR's formula is least where recomputing takes as long as sending the rest: 4 l h^2 / v = 2 (s - l) h p / link.
    recompute, send = 4 * HIDDEN**2 / MATMUL, 2 * HIDDEN * 2 / LINK
    split = PROMPT * send / (recompute + send)
    assert abs(document["kvpr_formula"]["recomputed"] - split) <= 1
    assert f"{document['kvpr_formula']['recomputed']} of 1024 tokens recomputed (0.70" in shown
    formula = document["curves_ms"]["kvpr_formula"]
    assert formula[0] == pytest.approx(1e3 * PAIR_BYTES / LINK)
    whole = PAIR_BYTES / 2 / LINK + LAYERS * 4 * BATCH * PROMPT * HIDDEN**2 / MATMUL
    assert formula[-1] == pytest.approx(1e3 * whole)


def test_curves_are_the_plans_by_name(found):
    chosen = found.chosen.plan
    profile = HardwareProfile.from_datasheet("a100")

    def predicted(name: str) -> float:
        plan = named_plan(name, chosen.shape, WORKLOAD, tail=chosen.tail, window=chosen.window)
        return float(plan_costs(profile, [plan]).seconds[0])

    for curve, position, name in (
        *(("absorb", 0, "keys_values"), ("absorb", 0.25, "split:0.25"), ("absorb", 1, "activations")),
        *(("recompute", 0, "keys_values"), ("recompute", 1, "recompute")),
        *(("kvpr", 0, "kvpr:0"), ("kvpr", 0.25, "kvpr:0.25"), ("kvpr", 1, "kvpr:1")),
    ):
        seconds = found.curves[curve][what_if.FRACTIONS.index(position)]
        assert seconds == pytest.approx(predicted(name), rel=1e-5)
    assert all(len(curve) == len(what_if.FRACTIONS) for curve in found.curves.values())
    assert set(found.curves) == set(what_if.CURVES)
    # Recomputing is work that absorbing does not have.
    assert all(less <= more * 1.0001 for less, more in zip(found.curves["absorb"], found.curves["recompute"]))


def test_host_memory_that_is_too_small_is_said(found):
    limited = small(Budget.of_gib(0.85, 0.2))
    pairs = limited.alternatives[1]
    # 16 x 500 tokens in 12 layers of 768: 0.14 GiB of activations, twice that of keys and values.
    assert pairs.needed["host"] == 2 * 768 * 2 * 16 * 500 * 12
    assert pairs.misfit == f"host lacks {(pairs.needed['host'] - 0.2 * GIB) / 2**20:.1f} MiB"
    assert not limited.chosen.misfit and not limited.alternatives[2].misfit
    assert not found.alternatives[1].misfit


def test_window_is_that_of_the_plans_by_name(capsys):
    command(*SMALL, "--window_mib=64", "--json")
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    windowed = what_if.what_if(
        models.preset("opt-125m").shape, WORKLOAD, HardwareProfile.from_datasheet("a100"), window=64 * 2**20
    )
    assert {alternative.plan.window for alternative in windowed.alternatives[1:]} == {64 * 2**20}
    expected = [1e3 * alternative.seconds for alternative in windowed.alternatives]
    assert [row["predicted_ms"] for row in document["alternatives"]] == expected


def test_this_machine_is_measured_and_what_is_free_is_its_budget(monkeypatch, capsys):
    machine = dataclasses.replace(HardwareProfile.from_datasheet("t4"), device="This one", source="")
    monkeypatch.setattr(profiler, "profile", lambda: machine)
    monkeypatch.setattr(plan, "limits", lambda budget: {"device": budget.device, "host": 7.0 * GIB})
    arguments = [word for word in SMALL if "hardware" not in word]
    command(*arguments, "--device_memory_gib=2.2", "--json")
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["budget"] == {"device": 2.2 * GIB, "host": 7 * GIB}
    assert out.startswith("This one: 2.20 GiB of device memory and 7.00 GiB of host memory may be used\n")


# --- what was measured ------------------------------------------------------------------------------------------------


def test_measured_rows_of_the_same_workload_are_shown(results, capsys):
    command(*SMALL, f"--measured={results}", "--json")
    *human, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    measured = {row["plan"]: row["measured_ms"] for row in document["alternatives"]}
    assert measured["keys_values"] == 21.0 and measured["device"] == 3.0 and measured["auto"] is None
    assert document["measured_on"] == "Some GPU"
    assert [row["plan"] for row in document["measured"]] == ["split:0.5", "keys_values", "keys_values", "device"]
    assert any("keys_values" in line and "21.00" in line for line in human)
    assert human[-1] == "4 rows of this model, workload and placement of weights, measured on Some GPU"


def test_rows_of_the_groups_and_weights_that_a_plan_has():
    """In the committed file 32 x 256 of OPT-6.7B is there in one group, and in eight with weights in host memory."""
    rows = tables.read_file(ROOT / "experiments/results/h200_suite.json")
    plan = named_plan("keys_values", models.preset("opt-6.7b").shape, Workload(32, 256, 32))
    eight = dataclasses.replace(with_weights(plan, ("host",) * 32), groups=8, order="column")
    columns = what_if.median_ms(what_if.measured_as(eight, rows), "keys_values")
    assert columns is not None and 800 < columns < 900
    for other in (plan, dataclasses.replace(eight, order="row"), dataclasses.replace(eight, groups=4)):
        assert what_if.measured_as(other, rows) == []


def test_no_row_of_the_workload_is_said_and_the_picture_is_drawn(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command(*SMALL[:-1], "--hardware=t4", "--batch=17", f"--measured={results}", f"--plot={tmp_path}/a.png")
    said = capsys.readouterr().out
    assert "no rows of this model, workload and" in said and f"drawn to {tmp_path}/a.png" in said
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_where_plans_are_on_the_axis():
    names = ("activations", "recompute", "keys_values", "split:0.25", "kvpr:1")
    assert [what_if.sent_fraction(name) for name in names] == [1, 1, 0, 0.25, 1]
    for name in ("device", "device:0.5", "split:x", "kvpr:", "split:2", "split:nan", "auto"):
        assert what_if.sent_fraction(name) is None


# --- the plot ---------------------------------------------------------------------------------------------------------


def test_plot_has_a_curve_for_each_schedule_and_the_measured_points(found, results, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(png, "save", lambda figure, _: drawn.append(figure))
    measured = what_if.measured_as(found.chosen.plan, tables.read_file(results))
    draw_split(found, "unwritten.png", measured)
    (axes,) = drawn[0].axes
    *curves, chosen, crosses = axes.get_lines()
    for name, line in zip(what_if.CURVES, curves, strict=True):
        assert list(line.get_xdata()) == list(what_if.FRACTIONS)
        assert list(line.get_ydata()) == [1e3 * seconds for seconds in found.curves[name]]
        (marked,) = line.get_markevery()
        assert found.curves[name][marked] == min(found.curves[name])
    assert len({(str(line.get_linestyle()), line.get_marker()) for line in curves}) == len(curves)
    assert set(chosen.get_ydata()) == {1e3 * found.chosen.seconds}
    assert crosses.get_marker() == "x" and "Some GPU" in crosses.get_label()
    assert list(zip(*crosses.get_data())) == [(0.5, 11.0), (0.0, 20.0), (0.0, 22.0)]  # the device's has no split
    assert "ms" in axes.get_ylabel() and "fraction" in axes.get_xlabel()
    title = axes.get_title(loc="left")
    for part in ("opt-125m", "batch 16, prompt 500, 24 new", "NVIDIA A100-PCIE-40GB by its data sheet", "870.4 MiB"):
        assert part in title
    assert axes.get_ylim()[0] == 0


# --- the command ------------------------------------------------------------------------------------------------------


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(png.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"error: plots need matplotlib, the extra `plot`: pip install"):
        command(*SMALL, f"--plot={tmp_path}/a.png")
