"""The paper, recomputed: its numbers against each other, predictions against closed forms, what is said and shown."""

import dataclasses
import io
import json
import math
import re

import pytest
from absl import flags
from experiments.support.paper.numbers.numbers import Setting
from rich.console import Console

import models
from experiments import reproduce_paper as script
from experiments.support.paper import costs as paper_costs
from experiments.support.paper import notes as paper_notes
from experiments.support.paper import numbers as paper
from experiments.support.script import in_one_line
from kvrecomp.plan import GIB, MIB
from kvrecomp.predict.datasheets import DATASHEETS
from kvrecomp.predict.hardware import HardwareProfile

PAPER = paper.read()
LINK, MATMUL = 32e9, 312e12  # of the A100, as KVPR counts them (section 4; its data sheet)
HIDDEN = {"opt-6.7b": 4096, "opt-13b": 5120, "opt-30b": 7168}  # OPT, arXiv 2205.01068, table 1
LAYERS = {"opt-6.7b": 32, "opt-13b": 40, "opt-30b": 48}
# The split l / s where recomputing l tokens takes as long as sending the rest, 4 b l h^2 / v_gpu = 2 b (s - l) h p /
# v_link (KVPR, equations 6 to 11). The paper does not print them.
SPLITS = {"opt-6.7b": 0.70, "opt-13b": 0.66, "opt-30b": 0.58}
# Two rows of a table in either order: what is quick to predict.
SMALL = dataclasses.replace(
    PAPER,
    tables=tuple(
        dataclasses.replace(own, rows=own.rows[:2]) if own.name in ("Table 3", "Table 5") else own
        for own in PAPER.tables
    ),
)


def split_of(model: str, link: float = LINK, matmul: float = MATMUL) -> float:
    """In closed form."""
    return 1 / (1 + 2 * HIDDEN[model] * link / (2 * matmul))


@pytest.fixture(scope="module")
def rows() -> paper_costs.Found:
    """Of Table 3: 64 x 128 + 32 and + 128."""
    return paper_costs.predict(SMALL, SMALL.table("Table 3"))


@pytest.fixture(scope="module")
def columns() -> paper_costs.Found:
    """Of Table 5: 8 x 32 x 256 + 32 and + 128, on the RTX 5000."""
    return paper_costs.predict(SMALL, SMALL.table("Table 5"))


@pytest.fixture
def command(monkeypatch, rows, columns):
    """The script in this process, with what was predicted already for the paper's own machines."""
    found = {"Table 3": rows, "Table 5": columns}
    predict = paper_costs.predict

    def known(of, table, machine=None, profile=None):
        return found[table.name] if profile is None else predict(of, table, machine, profile)

    def run(*arguments: str) -> None:
        values = flags.FlagValues()
        script.define_flags(values)
        values(["reproduce_paper", "--tables=table 3,Table 5", *arguments])
        with in_one_line():
            script.main([], values)

    monkeypatch.setattr(paper_costs, "predict", known)
    monkeypatch.setattr(script, "read", lambda: SMALL)
    return run


def result(setting: Setting, plan: str, median_ms: float, **changes) -> dict:
    """A row of a results file."""
    sizes = {name: getattr(setting, name) for name in ("model", "batch", "prompt", "new")}
    return sizes | {"plan": plan, "median_ms": median_ms, "device": "Some GPU"} | changes


def results_file(path, rows: list[dict]) -> str:
    path.write_text(json.dumps({"device": "Some GPU", "command": "python a.py", "rows": rows}))
    return str(path)


def rendered(table) -> list[str]:
    console = Console(width=script.WIDTH, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().splitlines()


# --- the paper's numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Table 3", "Table 4"])
def test_latencies_and_sizes_are_the_tables_own_throughputs_and_caches(name):
    """The tables have both, so that a digit that was copied wrong is found."""
    for row in PAPER.table(name).rows:
        setting, data = row.setting, row.data
        for which in ("baseline", "kvpr"):
            tokens = setting.batch * (setting.new - 1)
            assert tokens / data[which] == pytest.approx(data[f"{which}_tokens_per_second"], rel=2e-4)
        token = 2 * HIDDEN[setting.model] * 2 * LAYERS[setting.model]
        size = setting.batch * (setting.prompt + setting.new) * token / GIB
        assert data["cache_gb"] == pytest.approx(size, abs=1e-3)
        # Most of the device's memory beside the weights would hold the cache, which is in host memory.
        assert setting.shape.parameters * 2 / GIB < data["kvpr_memory_gb"] < 40


def test_every_table_has_its_place_and_only_figures_lack_numbers():
    assert [own.name for own in PAPER.tables] == [
        "Table 2", "Table 3", "Table 4", "Table 5", "Figure 6 (sequences)", "Figure 6 (batches)"
    ]  # fmt: skip
    assert [len(own.rows) for own in PAPER.tables] == [6, 6, 6, 6, 18, 21]
    for own in PAPER.tables:
        assert own.source.startswith(own.name.partition(" (")[0]) and own.machine in DATASHEETS
        drawn = own.name.startswith("Figure")
        assert all((row.baseline is None) == drawn and (row.kvpr is None) == drawn for row in own.rows)
        assert len({row.setting for row in own.rows}) == len(own.rows)
    assert all(claim["source"] and claim["table"] for claim in PAPER.data["claims"].values())
    for row in paper.records(PAPER.data["layers"]):
        layer = models.preset(row["model"]).shape.layers[0]
        assert row["hidden"] == layer.hidden == HIDDEN[row["model"]]
        assert row["cache_mb"] == 2 * 32 * 1024 * layer.hidden * 2 / MIB


def test_milliseconds_a_step_by_hand():
    assert Setting("opt-6.7b", 64, 1, 128, 32).milliseconds(8.905, "s") == pytest.approx(8905 / 31)
    assert Setting("opt-6.7b", 32, 8, 256, 32).milliseconds(50.0, "tokens/s") == pytest.approx(256 / 50 * 1e3)
    assert str(Setting("opt-6.7b", 32, 8, 256, 32)) == "8 x 32 x 256 + 32"
    assert Setting("opt-6.7b", 7, 1, 128, 33).cached == 144


def test_the_papers_machines_have_the_rates_that_it_counts_with():
    a100, low = PAPER.machine("a100"), PAPER.machine("rtx5000")
    sheet = HardwareProfile.from_datasheet("a100")
    assert dataclasses.replace(a100, source=sheet.source) == sheet
    assert (a100.beside_compute, a100.matmul_rate) == (LINK, MATMUL)
    assert (low.beside_compute, low.matmul_rate) == (16e9, 89.2e12)
    assert 1 / low.to_device.each == pytest.approx(16e9) and "PCIe 4.0 x8 as KVPR counts it" in low.source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["tables"][0].update(unit="ms"), "Table 2: the unit is 'ms'; expected s or tokens/s"),
        (lambda data: data["tables"][0]["rows"][0].pop(), "zip"),
        (lambda data: data["tables"][0].pop("source"), "KeyError: 'source'"),
        (lambda data: data["tables"][0]["columns"].__setitem__(0, "name"), "KeyError: 'model'"),
    ],
)
def test_a_table_that_is_not_as_the_others_is_said(tmp_path, change, message):
    data = json.loads(paper.DATA.read_text())
    change(data)
    (tmp_path / "paper.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        paper.read(tmp_path / "paper.json")
    assert "a table is to be as the others are" in str(error.value)


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", SPLITS)
def test_splits_and_gains_of_the_formula_in_closed_form(model):
    split = split_of(model)
    assert split == pytest.approx(SPLITS[model], abs=0.005)
    shown = rendered(script.layers(PAPER))
    (line,) = [line.split() for line in shown if line.strip().startswith(model.upper())]
    assert line[-1] == f"{SPLITS[model]:.2f}"
    computing = 4 * 32 * 1024 * HIDDEN[model] ** 2 / MATMUL * 1e3
    assert float(line[-2]) == pytest.approx(computing, abs=0.005)
    assert float(line[4]) == pytest.approx(2 * 32 * 1024 * HIDDEN[model] * 2 / LINK * 1e3, abs=0.05)
    # b l h p + 2 b (s - l) h p of 2 b s h p: l / 2 s is saved.
    setting = Setting(model, 32, 8, 1024, 32)
    machine = PAPER.machine("a100")
    saved = paper_costs.formula_gain(machine, PAPER.table("Table 3"), setting)
    assert saved == pytest.approx(100 * split / 2, abs=0.1)
    more = paper_costs.formula_gain(machine, PAPER.table("Table 5"), setting)
    assert more == pytest.approx(100 * (2 / (2 - split) - 1), abs=0.2)


def test_row_order_in_closed_form(rows):
    for row in rows.rows:
        setting, times = row.paper.setting, row.predicted.times
        cached = setting.prompt + setting.new / 2
        pairs = 1e3 * 32 * 2 * 64 * cached * 4096 * 2 / LINK
        # The link is the bound, and what is computed before the first copy is there and after the last one is little.
        assert pairs < times["keys_values"] < pairs + 5 < times["sum"] < 1.12 * pairs
        assert pairs / 2 < times["activations"] < pairs / 2 + 5
        split = split_of("opt-6.7b")
        assert row.predicted.formula == pytest.approx(split, abs=1 / cached)
        assert row.predicted.split == pytest.approx(split, abs=0.03)
        # A layer's copies by the formula, and attention and the other products that it leaves out.
        assert pairs * (1 - split / 2) < times["kvpr"] < 1.15 * pairs * (1 - split / 2)
        # Beside 13 GB of weights in 40 GB: nothing is sent, and memory is read once.
        assert row.predicted.ours is not None and row.predicted.ours.link_bytes() == 0
        weights = 2 * setting.shape.parameters / 1555e9
        assert 1e3 * weights < times["auto"] < times["activations"] / 4


def test_column_order_in_closed_form(columns):
    layer = 4 * 4096**2 + 2 * 4096 * 16384
    for row in columns.rows:
        setting, times = row.paper.setting, row.predicted.times
        pairs = 32 * 2 * 8 * 32 * (256 + setting.new / 2) * 4096 * 2
        weights = 32 * layer * 2  # once for all groups
        assert 1e3 * (pairs + weights) / 16e9 < times["keys_values"] < 1.02e3 * (pairs + weights) / 16e9
        assert 1e3 * (pairs / 2 + weights) / 16e9 < times["activations"] < 1.02e3 * (pairs / 2 + weights) / 16e9
        assert times["activations"] < times["kvpr"] < times["keys_values"] < times["sum"]
        ours = row.predicted.ours
        assert ours is not None and (ours.groups, ours.order) == (8, "column")
        assert times["auto"] < times["activations"]
        assert sum(ours.shape.layers[0].parameters * 2 for own in ours.layers if own.weights == "device") < 16e9


def test_nothing_of_ours_where_nothing_fits():
    small = HardwareProfile.from_datasheet("t4")
    assert paper_costs.ours(Setting("opt-30b", 64, 1, 128, 32), "device", small) == (None, None)
    tiny = dataclasses.replace(small, device_bytes=1e9)
    assert paper_costs.ours(Setting("opt-30b", 32, 8, 256, 32), "host", tiny) == (None, None)
    plan, _ = paper_costs.ours(Setting("opt-30b", 2, 1, 64, 32), "host", small)
    assert plan is not None and any(layer.weights == "host" for layer in plan.layers)


def test_gains_by_hand():
    latency, throughput = PAPER.table("Table 3"), PAPER.table("Table 5")
    assert latency.gain(200.0, 150.0) == 25 and throughput.gain(200.0, 160.0) == 25
    assert latency.gain(None, 1.0) is None and latency.gain(1.0, None) is None


# --- what was measured ------------------------------------------------------------------------------------------------


def test_results_of_a_setting_are_shown_and_no_others(rows, columns):
    first, second = (row.paper.setting for row in rows.rows)
    results = [
        result(first, "keys_values", 80.0),
        result(first, "keys_values", 90.0, weights="device", groups=1, order="row"),
        result(first, "kvpr:0.5", 64.0),
        result(first, "kvpr:0.75", 60.0),
        result(first, "huggingface_offloaded", 160.0, weights=None, groups=None, order=None),
        result(first, "auto", 8.0, device_budget=39e9),
        result(first, "auto", 2.0),  # with all of a larger device
        result(first, "auto", 3.0, device_budget=141e9),
        result(first, "activations", 1.0, weights="host"),
        result(first, "activations", 1.0, groups=2, order="column"),
        *(result(first, "activations", 1.0, **{name: 1}) for name in ("batch", "prompt", "new")),
        result(first, "activations", 1.0, model="opt-13b"),
        result(second, "activations", 44.0, device="Another GPU"),
    ]
    found = paper_costs.measured(rows, results)
    times = {"keys_values": 80.0, "kvpr": 60.0, "huggingface_offloaded": 160.0, "auto": 8.0}
    assert [row.measured for row in found.rows] == [times, {"activations": 44.0}]
    assert found.devices == ("Some GPU", "Another GPU")
    assert found.gains("opt-6.7b", "measured", "kvpr") == [25] and found.gains("opt-6.7b", "measured", "auto") == [90]
    assert found.gains("opt-6.7b", "measured", "activations") == []  # there is no row that has both

    setting = columns.rows[0].paper.setting
    places = {"weights": "host", "groups": 8, "order": "column"}
    others = [places | {"order": "row"}, places | {"groups": 4}, places | {"weights": "0.5"}, {}]
    results = [result(setting, "keys_values", 1.0, **other) for other in others]
    results.append(result(setting, "auto", 1.0, device_budget=columns.profile.device_bytes))  # a step of one group
    results.append(result(setting, "keys_values", 5.0, **places))
    assert paper_costs.measured(columns, results).rows[0].measured == {"keys_values": 5.0}
    assert all(not row.measured for row in paper_costs.measured(columns, results[:-1]).rows)


def test_the_summary_has_measured_columns_where_there_are_any(rows, monkeypatch):
    monkeypatch.setattr(paper_costs, "SUMMED_UP", ("Table 3",))
    monkeypatch.setattr(paper_costs, "predict", lambda *_: rows)
    heading, _, line = paper_costs.markdown([]).splitlines()
    assert heading.count("measured") == 0 and heading.count("predicted") == 3
    said = ["Table 3", "OPT-6.7B", "Accelerate", "% less time", "25 to 36", "35"]
    assert [cell.strip() for cell in line.strip("|").split("|")][:6] == said
    setting = rows.rows[1].paper.setting
    results = [result(setting, "keys_values", 40.0), result(setting, "activations", 30.0)]
    heading, _, line = paper_costs.markdown(results).splitlines()
    cells = dict(zip(*([cell.strip() for cell in own.strip("|").split("|")] for own in (heading, line))))
    assert cells["`activations`, measured"] == "25" and "KVPR, measured" not in cells


# --- what is printed --------------------------------------------------------------------------------------------------


def test_tables_fit_a_terminal_with_all_that_there_may_be(rows, columns):
    for found in (rows, columns):
        every = dict.fromkeys((*script.COLUMNS, found.table.peer), 123.4)
        full = dataclasses.replace(found, rows=tuple(dataclasses.replace(row, measured=every) for row in found.rows))
        bare, table = script.steps(found), script.steps(full)
        assert table.row_count == len(found.rows) and len(bare.columns) == 9
        assert len(table.columns) == 9 + len(script.COLUMNS) + bool(found.table.peer)
        lines = rendered(table)
        assert max(map(len, lines)) <= script.WIDTH and not any("…" in line for line in lines)
        (line,) = [line for line in lines if line.strip().startswith(str(found.rows[0].paper.setting))]
        assert len(line.replace(str(found.rows[0].paper.setting), "").split()) == len(table.columns) - 1


def test_a_cell_is_a_number_and_its_gain(rows):
    lines = rendered(script.steps(rows))
    (at,) = [number for number, line in enumerate(lines) if "64 x 128 + 128" in line]
    assert lines[at].split()[5:7] == ["562", "360"]  # 71.327 and 45.766 s of 127 steps
    times = rows.rows[1].predicted.times
    predicted = [round(100 * (times[plan] / times["keys_values"] - 1)) for plan in ("kvpr", "activations", "auto")]
    assert [int(cell) for cell in lines[at + 1].replace("%", "").split()] == [-36, *predicted]


def test_notes_by_hand():
    found = {}
    for note in paper_notes.notes(PAPER, []):
        found.setdefault(note.place.partition(",")[0].partition(" on ")[0], []).append(note.text)
    layers, copies = found["Table 1"]
    for model, said in zip(HIDDEN, (0.3509, 0.4388, 0.6143)):
        computing = 4 * 32 * 1024 * HIDDEN[model] ** 2 / MATMUL * 1e3
        assert f"{computing:.3g}" in layers and f"{said:.3g}" in layers
    assert "20 to 35 times as long" in layers and "44 times" in layers
    assert "15.6, 19.5 and 27.3 ms are 32 GiB/s (15.6, 19.5 and 27.3 ms)" in copies
    headlines = [
        text for place, texts in found.items() if place.startswith(("abstract", "appendix A.5")) for text in texts
    ]
    assert "14.8 to 35.8 %. By the formula it is 35 %" in headlines[0]
    assert "by the formula 54, 49 and 40 %" in headlines[1] and "6.6 to 15.9 %" in headlines[2]
    (late,) = [text for text in found["Table 3"] if "longer" in text]
    assert "26.8 s" in late and "24.4 s of OPT-6.7B, 64 x 512 + 32" in late and "19.4 s of OPT-13B" in late
    (rates,) = [text for text in found["Table 3"] if "GB/s" in text]
    slowest = 64 * 272 * 2 * 4096 * 2 * 32 / (26.825 / 31) / 1e9
    fastest = 64 * 528 * 2 * 4096 * 2 * 32 / (24.390 / 31) / 1e9
    assert f"{slowest:.1f} to {fastest:.1f} GB/s, of the 32" in rates
    fastest = 64 * 528 * 2 * 5120 * 2 * 40 / (35.066 / 31) / 1e9
    assert f"to {fastest:.1f} GB/s" in found["Table 4"][0]
    (shares,) = found["section 4.5"]
    assert f"{2 * 8 / 38 / (1 + 2 * 8 / 38):.2f}, where" in shares and "0.70, 0.66 and 0.58" in shares
    (splits,) = found["appendix A.4"]
    assert "182 of 129 cached tokens" in splits
    ends = [math.floor(split_of("opt-6.7b") * cached + 0.5) for cached in (129, 160, 257, 288)]
    assert (
        f"says {ends[0]} and {ends[1]}; it says 182 for a prompt of 257 to 258, and for 256 {ends[2]} and {ends[3]}"
        in splits
    )
    assert "23.4 times, what is sent 1.4 times" in found["Table 2"][1]
    assert all(row.kvpr < row.baseline for row in PAPER.table("Table 2").rows)  # milliseconds: more tokens/s


def test_notes_of_predictions_are_for_the_papers_own_machines(rows, columns):
    texts = [note.text for note in paper_notes.notes(PAPER, [rows, columns])]
    assert any("2 of 2 caches fit beside the weights in the 40 GB" in text for text in texts)
    assert any("in column order the best split is predicted at" in text for text in texts)
    other = dataclasses.replace(rows, profile=HardwareProfile.from_datasheet("h200"))
    assert len(paper_notes.notes(PAPER, [other])) == len(paper_notes.notes(PAPER, []))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_notes_and_json(command, capsys, tmp_path, rows):
    setting = rows.rows[0].paper.setting
    fitting = results_file(tmp_path / "a.json", [result(setting, "keys_values", 77.0), result(setting, "device", 9.0)])
    other = results_file(tmp_path / "b.json", [result(setting, "keys_values", 77.0, batch=63)])
    command(f"--results={fitting},{other}", "--json")
    *human, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert [own["name"] for own in document["tables"]] == ["Table 3", "Table 5"]
    first, _ = document["tables"][0]["rows"]
    assert (first["model"], first["batch"], first["prompt"], first["new"]) == ("opt-6.7b", 64, 128, 32)
    assert first["paper_ms"] == pytest.approx({"baseline": 8905 / 31, "kvpr": 6651 / 31})
    assert first["predicted_ms"] == rows.rows[0].predicted.times and first["measured_ms"]["keys_values"] == 77.0
    assert first["ours"] == {"plan": "auto", "weights_in_host": 0.0, "link_bytes": 0}
    assert document["tables"][0]["measured_on"] == ["Some GPU"] and len(document["gains"]) == 2
    assert document["notes"] and document["only_drawn"] and len(document["layers"]) == 3
    assert f"{fitting}: 2 of 2 rows are of these tables' settings" in human
    (line,) = [line for line in human if line.startswith(f"{other}: 0 of 1 rows")]
    assert line.endswith("--model=opt-6.7b --batch=64 --prompt=128 --new=32 --plans=keys_values,kvpr:0.7,activations")
    assert "here: Some GPU" in human and max(map(len, human[:2])) <= script.WIDTH
    assert sum(line.startswith(("Table 1:", "Table 3:", "Table 5:", "Gains")) for line in human) == 4
    assert any(line.startswith("Only drawn in the paper, so not here: Figure 6") for line in human)


def test_another_machine(command, capsys, columns):
    command("--hardware=h200", "--tables=Table 5", "--json")
    *human, last = capsys.readouterr().out.splitlines()
    (table,) = json.loads(last)["tables"]
    assert table["hardware"] == "NVIDIA H200" and any(
        line.startswith("h200: NVIDIA H200, link 63 GB/s") for line in human
    )
    # The link is the bound on both: 63 GB/s against 16.
    ratio = columns.rows[0].predicted.times["activations"] / table["rows"][0]["predicted_ms"]["activations"]
    assert ratio == pytest.approx(63 / 16, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables=Table 9"], "--tables has 'Table 9'; the paper's tables of steps are Table 2, Table 3, "),
        (["--hardware=h2000"], "unknown hardware 'h2000'; expected one of this, a100, .*: did you mean 'h200'"),
        (["--results=nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_flags_are_said_in_one_line(command, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as left:
        command(*arguments)
    assert "\n" not in str(left.value)


def test_a_file_that_is_no_results_file(command, tmp_path):
    (tmp_path / "a.json").write_text('{"rows": [{"plan": "auto"}]}')
    with pytest.raises(SystemExit, match=r"^error: .*a\.json is not a results file"):
        command(f"--results={tmp_path / 'a.json'}")


def test_results_without_fields_are_of_no_setting(rows):
    assert not any(row.measured for row in paper_costs.measured(rows, [{"median_ms": 1.0}]).rows)


def test_rates_in_closed_form():
    """OPT-30B, 8 x 32 rows of 256 tokens and half of 32 new ones, weights of 48 layers: the link is the bound."""
    result = {"model": "opt-30b", "batch": 32, "prompt": 256, "new": 32, "plan": "activations", "weights": "host"}
    row = {**result, "groups": 8, "order": "column"}
    said = paper_costs.rates([row])
    pairs, kvpr, own = map(int, re.findall(r"\d+", said))
    sent = LAYERS["opt-30b"] * 2 * (12 * HIDDEN["opt-30b"] ** 2 + 8 * 32 * 272 * 2 * HIDDEN["opt-30b"])
    assert pairs == pytest.approx(8 * 32 * LINK / sent, abs=0.6)
    assert pairs < kvpr < own
    assert said == f"{pairs} tokens a second for keys and values, {kvpr} for KVPR's schedule and {own} for ours"
    for rows in ([row | {"batch": 31}], [row, row | {"new": 128}]):
        with pytest.raises(ValueError, match=r"of [02] settings of Table 3, .*; expected one"):
            paper_costs.rates(rows)
