"""The paper, recomputed: its numbers against each other, predictions against closed forms, and what is shown."""

import dataclasses
import json

import pytest
import scripts

import models
from experiments import reproduce_paper as script
from experiments.support.paper import costs, numbers, report
from kvrecomp.plan import GIB, MIB
from kvrecomp.predict.datasheets import DATASHEETS
from kvrecomp.predict.hardware import HardwareProfile

PAPER = numbers.read()
LINK, MATMUL = 32e9, 312e12  # of the A100, as KVPR counts them (section 4; its data sheet)
HIDDEN = {"opt-6.7b": 4096, "opt-13b": 5120, "opt-30b": 7168}  # OPT, arXiv 2205.01068, table 1
LAYERS = {"opt-6.7b": 32, "opt-13b": 40, "opt-30b": 48}
# The split l / s where recomputing l tokens takes as long as sending the rest, 4 b l h^2 / v_gpu = 2 b (s - l) h p /
# v_link (KVPR, equations 6 to 11). The paper does not print them.
SPLITS = {"opt-6.7b": 0.70, "opt-13b": 0.66, "opt-30b": 0.58}


def split_of(model: str) -> float:
    """In closed form."""
    return 1 / (1 + 2 * HIDDEN[model] * LINK / (2 * MATMUL))


def time_saved(model: str) -> float:
    """In percent, by the formula: b l h p + 2 b (s - l) h p of 2 b s h p are left."""
    return 100 * split_of(model) / 2


def tokens_gained(model: str) -> float:
    """In percent, by the same."""
    return 100 * (2 / (2 - split_of(model)) - 1)


def predicted(name: str, rows: slice) -> numbers.Table:
    """Some rows of a table, predicted for the paper's machine."""
    table = PAPER.table(name)
    return costs.predict(dataclasses.replace(table, rows=table.rows[rows]), table.machine, table.profile)


@pytest.fixture(scope="module")
def latency() -> numbers.Table:
    """Of Table 3: 64 x 128 + 32 and + 128."""
    return predicted("Table 3", slice(2))


@pytest.fixture(scope="module")
def throughput() -> numbers.Table:
    """Of Table 5: 8 x 32 x 256 + 32 and + 128, on the RTX 5000."""
    return predicted("Table 5", slice(2))


@pytest.fixture
def command(monkeypatch, latency, throughput):
    """The script in this process, with what was predicted already for the paper's own machines."""
    known = {"Table 3": latency, "Table 5": throughput}
    tables = tuple(known.get(table.name, table) for table in PAPER.tables)
    predict = costs.predict

    def predict_unless_known(table, machine, profile):
        return known[table.name] if machine == table.machine else predict(table, machine, profile)

    monkeypatch.setattr(costs, "predict", predict_unless_known)
    monkeypatch.setattr(script, "read", lambda: dataclasses.replace(PAPER, tables=tables))
    return lambda *words: scripts.call(script, "--tables=table 3,Table 5", *words)


def result(setting: numbers.Setting, plan: str, median_ms: float, **changes) -> dict:
    """A row of a results file."""
    sizes = {name: getattr(setting, name) for name in ("model", "batch", "prompt", "new")}
    return sizes | {"plan": plan, "median_ms": median_ms, "device": "Some GPU"} | changes


def cells(table: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, by heading."""
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [dict(zip(heading, row, strict=True)) for row in rows]


# --- the paper's numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Table 3", "Table 4"])
def test_latencies_and_sizes_are_the_tables_own_throughputs_and_caches(name):
    """The tables have both, so that a digit that was copied wrong is found."""
    (table,) = [table for table in PAPER.data["tables"] if table["name"] == name]
    for row, data in zip(PAPER.table(name).rows, numbers.records(table), strict=True):
        setting = row.setting
        for which in ("baseline", "kvpr"):
            tokens = setting.batch * (setting.new - 1)
            assert tokens / data[which] == pytest.approx(data[f"{which}_tokens_per_second"], rel=2e-4)
        token = 2 * HIDDEN[setting.model] * 2 * LAYERS[setting.model]
        size = setting.batch * (setting.prompt + setting.new) * token / GIB
        assert data["cache_gb"] == pytest.approx(size, abs=1e-3)
        # Most of the device's memory beside the weights would hold the cache, which is in host memory.
        assert setting.shape.parameters * 2 / GIB < data["kvpr_memory_gb"] < 40


def test_every_table_has_its_place_and_only_figures_lack_numbers():
    counts = {table.name: len(table.rows) for table in PAPER.tables}
    tables = {"Table 2": 6, "Table 3": 6, "Table 4": 6, "Table 5": 6}
    assert counts == {**tables, "Figure 6 (sequences)": 18, "Figure 6 (batches)": 21}
    for table in PAPER.tables:
        assert table.source.startswith(table.name.partition(" (")[0]) and table.machine in DATASHEETS
        drawn = table.name.startswith("Figure")
        assert all(set(row.times["paper"]) == (set() if drawn else {"baseline", "kvpr"}) for row in table.rows)
        assert len({row.setting for row in table.rows}) == len(table.rows)
    for row in numbers.records(PAPER.data["layers"]):
        assert row["hidden"] == models.preset(row["model"]).shape.layers[0].hidden == HIDDEN[row["model"]]
        assert row["cache_mb"] == 2 * 32 * 1024 * row["hidden"] * 2 / MIB


def test_milliseconds_a_step_and_gains_by_hand():
    setting = numbers.Setting("opt-6.7b", 32, 8, 256, 33)
    assert setting.milliseconds(8.905, "s") == pytest.approx(8905 / 32)
    assert setting.milliseconds(50.0, "tokens/s") == pytest.approx(256 / 50 * 1e3)
    assert str(setting) == "8 x 32 x 256 + 33" and setting.cached == 272
    latency, throughput = PAPER.table("Table 3"), PAPER.table("Table 5")
    assert latency.gain(200.0, 150.0) == 25 and throughput.gain(200.0, 160.0) == 25
    assert latency.gain(None, 1.0) is None and latency.gain(1.0, None) is None


def test_the_papers_machines_have_the_rates_that_it_counts_with():
    a100, low = PAPER.machines["a100"], PAPER.machines["rtx5000"]
    sheet = HardwareProfile.from_datasheet("a100")
    assert dataclasses.replace(a100, source=sheet.source) == sheet
    assert (a100.beside_compute, a100.matmul_rate) == (LINK, MATMUL)
    assert (low.beside_compute, low.matmul_rate) == (16e9, 89.2e12)
    assert 1 / low.to_device.each == pytest.approx(16e9) and "PCIe 4.0 x8 as KVPR counts it" in low.source


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", SPLITS)
def test_splits_and_gains_of_the_formula_in_closed_form(model):
    split = split_of(model)
    assert split == pytest.approx(SPLITS[model], abs=0.005)
    (row,) = [row for row in cells(report.layers(PAPER)) if row["model"] == model.upper()]
    assert row["l/s, formula"] == f"{SPLITS[model]:.2f}"
    computing, copying = 4 * 32 * 1024 * HIDDEN[model] ** 2 / MATMUL, 2 * 32 * 1024 * HIDDEN[model] * 2 / LINK
    assert float(row["recompute, formula, ms"]) == pytest.approx(1e3 * computing, abs=0.005)
    assert float(row["copy, formula, ms"]) == pytest.approx(1e3 * copying, abs=0.05)
    setting = numbers.Setting(model, 32, 8, 1024, 32)
    saved = costs.formula_gain(PAPER.table("Table 3"), setting)
    assert saved == pytest.approx(time_saved(model), abs=0.1)
    more = costs.formula_gain(dataclasses.replace(PAPER.table("Table 5"), profile=PAPER.machines["a100"]), setting)
    assert more == pytest.approx(tokens_gained(model), abs=0.2)


def test_row_order_in_closed_form(latency):
    for row in latency.rows:
        setting, times = row.setting, row.times["predicted"]
        cached = setting.prompt + setting.new / 2
        pairs = 1e3 * 32 * 2 * 64 * cached * 4096 * 2 / LINK
        # The link is the bound, and what is computed before the first copy is there and after the last one is little.
        assert pairs < times["keys_values"] < pairs + 5 < times["sum"] < 1.12 * pairs
        assert pairs / 2 < times["activations"] < pairs / 2 + 5
        split = split_of("opt-6.7b")
        assert row.split == pytest.approx(split, abs=0.03)
        # A layer's copies by the formula, and attention and the other products that it leaves out.
        assert pairs * (1 - split / 2) < times["kvpr"] < 1.15 * pairs * (1 - split / 2)
        # Beside 13 GB of weights in 40 GB: nothing is sent, and memory is read once.
        assert row.ours == {"plan": "auto", "weights_in_host": 0.0, "link_bytes": 0}
        weights = 2 * setting.shape.parameters / 1555e9
        assert 1e3 * weights < times["auto"] < times["activations"] / 4


def test_column_order_in_closed_form(throughput):
    layer = 4 * 4096**2 + 2 * 4096 * 16384
    for row in throughput.rows:
        setting, times = row.setting, row.times["predicted"]
        pairs = 32 * 2 * 8 * 32 * (256 + setting.new / 2) * 4096 * 2
        weights = 32 * layer * 2  # once for all groups
        assert 1e3 * (pairs + weights) / 16e9 < times["keys_values"] < 1.02e3 * (pairs + weights) / 16e9
        assert 1e3 * (pairs / 2 + weights) / 16e9 < times["activations"] < 1.02e3 * (pairs / 2 + weights) / 16e9
        assert times["auto"] < times["activations"] < times["kvpr"] < times["keys_values"] < times["sum"]
        # What is left on the device fits in the card's memory.
        assert (1 - row.ours["weights_in_host"]) * weights < 16e9


def test_figure_6_in_closed_form():
    """OPT-30B, 8 x 32 rows of 256 tokens and half of 32 new ones, weights of 48 layers: the link is the bound."""
    row = costs.kept(PAPER.table("Figure 6 (sequences)")).rows[12]
    assert str(row.setting) == "8 x 32 x 256 + 32" and row.setting.model == "opt-30b"
    sent = LAYERS["opt-30b"] * 2 * (12 * HIDDEN["opt-30b"] ** 2 + 8 * 32 * 272 * 2 * HIDDEN["opt-30b"])
    assert row.times["predicted"]["keys_values"] == pytest.approx(1e3 * sent / LINK, rel=0.01)


def test_nothing_of_ours_where_nothing_fits():
    small = HardwareProfile.from_datasheet("t4")
    assert costs.best_plan(numbers.Setting("opt-30b", 64, 1, 128, 32), "device", small) is None
    tiny = dataclasses.replace(small, device_bytes=1e9)
    assert costs.best_plan(numbers.Setting("opt-30b", 32, 8, 256, 32), "host", tiny) is None
    plan = costs.best_plan(numbers.Setting("opt-30b", 8, 2, 64, 32), "host", small)
    assert plan is not None and any(layer.weights == "host" for layer in plan.layers)
    assert (plan.groups, plan.order) == (2, "column")


def test_predictions_that_are_kept_are_those_of_the_code(latency, throughput):
    """Some of them: all take a minute. `python experiments/reproduce_paper.py --out=experiments/results/paper.json`"""
    for compared in (latency, throughput, predicted("Figure 6 (sequences)", slice(12, 13))):
        kept = {row.setting: row for row in costs.kept(PAPER.table(compared.name)).rows}
        for row in compared.rows:
            then = kept[row.setting]
            assert row.times["predicted"] == pytest.approx(then.times["predicted"], rel=1e-4)
            assert (row.split, row.ours, row.times["paper"]) == (then.split, then.ours, then.times["paper"])
    # As the page says: so many caches fit on the card.
    for name, count in (("Table 3", 6), ("Table 4", 3)):
        assert sum(row.ours["link_bytes"] == 0 for row in costs.kept(PAPER.table(name)).rows) == count


# --- what was measured ------------------------------------------------------------------------------------------------


def test_results_of_a_setting_are_shown_and_no_others(latency, throughput):
    first, second = (row.setting for row in latency.rows)
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
        {"median_ms": 1.0},
    ]
    found = costs.measured(latency, results)
    times = {"keys_values": 80.0, "kvpr": 60.0, "huggingface_offloaded": 160.0, "auto": 8.0}
    assert [row.times["measured"] for row in found.rows] == [times, {"activations": 44.0}]
    assert found.devices == ("Some GPU", "Another GPU")
    assert found.gains("opt-6.7b", "measured", "kvpr") == [25] and found.gains("opt-6.7b", "measured", "auto") == [90]
    assert found.gains("opt-6.7b", "measured", "activations") == []  # there is no row that has both

    setting = throughput.rows[0].setting
    places = {"weights": "host", "groups": 8, "order": "column"}
    others = [places | {"order": "row"}, places | {"groups": 4}, places | {"weights": "0.5"}, {}]
    results = [result(setting, "keys_values", 1.0, **other) for other in others]
    results.append(result(setting, "auto", 1.0, device_budget=throughput.profile.device_bytes))  # a step of one group
    results.append(result(setting, "keys_values", 5.0, **places))
    assert costs.measured(throughput, results).rows[0].times["measured"] == {"keys_values": 5.0}
    assert not any(row.times["measured"] for row in costs.measured(throughput, results[:-1]).rows)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_step_is_a_number_and_its_gain(latency):
    setting, times = latency.rows[1].setting, latency.rows[1].times["predicted"]
    (_, bare) = cells(report.steps(latency))
    assert bare["Accelerate, paper"] == "562" and bare["KVPR, paper"] == "360 (-36 %)"  # 71.327, 45.766 s: 127 steps
    gains = [round(100 * (times[plan] / times["keys_values"] - 1)) for plan in ("kvpr", "activations", "auto")]
    shown = [bare[f"{plan}, predicted"].partition(" ")[2] for plan in ("KVPR", "`activations`", "ours")]
    assert shown == [f"({gain} %)" for gain in gains]
    assert not any("measured" in heading for heading in bare)
    results = [result(setting, "huggingface_offloaded", 150.0), result(setting, "keys_values", 100.0)]
    (_, full) = cells(report.steps(costs.measured(latency, results)))
    assert full.items() - bare.items() == {("Accelerate, measured", "150 (+50 %)"), ("`keys_values`, measured", "100")}
    assert float(bare["no overlap, predicted"].partition(" ")[0]) == pytest.approx(times["sum"], abs=0.5)


def test_gains_have_measured_columns_where_there_are_any(latency):
    (bare,) = cells(report.gains([latency]))
    assert list(bare.values())[:6] == ["Table 3", "OPT-6.7B", "Accelerate", "% less time", "25 to 36", "35"]
    assert sum("measured" in heading for heading in bare) == 0 and sum("predicted" in heading for heading in bare) == 3
    setting = latency.rows[1].setting
    results = [result(setting, "keys_values", 40.0), result(setting, "activations", 30.0)]
    (full,) = cells(report.gains([costs.measured(latency, results)]))
    assert full.items() - bare.items() == {("`activations`, measured", "25")}


def test_disagreements_by_hand():
    """What the formula says is in closed form, and what a table says in its rows."""
    rows = numbers.records(PAPER.data["disagreements"])
    found = {(row["place"], row["of"].partition(",")[0]): tuple(row.values())[2:] for row in rows}
    assert cells(report.disagreeing(PAPER)) == rows and len(found) == len(rows)
    saved, more = ([f"{gain:.0f}" for gain in map(of_split, SPLITS)] for of_split in (time_saved, tokens_gained))
    latency, throughput, low_end = (tuple(row.values())[2:] for row in rows if row["of"].startswith("largest gain"))
    assert latency == ("35.8 % less time; 14.8 to 35.8 in Table 3", f"{saved[0]} %")
    assert throughput[1].startswith(f"{more[0]}, {more[1]} and {more[2]} %")
    assert low_end == ("15 % more tokens/s; 6.6 to 15.9 in Table 5", "40 %, of the cache alone")
    slowest = 64 * 272 * 2 * 4096 * 2 * 32 / (26.825 / 31) / 1e9
    fastest = 64 * 528 * 2 * 4096 * 2 * 32 / (24.390 / 31) / 1e9
    link = found["Table 3", "the link; what is sent over Accelerate's time"]
    assert link[1] == f"{slowest:.1f} to {fastest:.1f} GB/s"
    shares = found["section 4.5 on Figure 10, without its workload", "split l/s: 8 % of the time are activations"]
    assert shares[0] == f"{2 * 8 / 38 / (1 + 2 * 8 / 38):.2f}" and shares[1].startswith("0.70, 0.66 and 0.58")
    first, last, longer, longest = (round(split_of("opt-6.7b") * cached) for cached in (129, 160, 257, 288))
    points = f"{first} and {last}, at most the prompt (equation 11); {longer} and {longest} for a prompt of 256"
    assert found["appendix A.4 on Figure 12", "split of a prompt of 128"][1] == points
    assert found["Table 2", "growth of its latencies"][0] == "23.4 times"
    small = PAPER.table("Table 2").rows
    assert all(row.times["paper"]["kvpr"] < row.times["paper"]["baseline"] for row in small)  # ms: more tokens/s


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_and_keeps_a_document(command, capsys, tmp_path, latency):
    setting = latency.rows[0].setting
    for name, batch in (("a", 63), ("b", 64)):
        rows = [result(setting, "keys_values", 77.0, batch=batch)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"command": "python a.py", "rows": rows}))
    command(f"--measured={tmp_path / 'a.json'}")
    assert "no result is of these tables' settings" in capsys.readouterr().out
    command(f"--measured={tmp_path / 'a.json'},{tmp_path / 'b.json'}", f"--out={tmp_path / 'out.json'}")
    human = capsys.readouterr().out.splitlines()
    document = json.loads((tmp_path / "out.json").read_text())
    assert [table["name"] for table in document["tables"]] == ["Table 3", "Table 5"]
    first, _ = document["tables"][0]["rows"]
    assert (first["model"], first["batch"], first["prompt"], first["new"]) == ("opt-6.7b", 64, 128, 32)
    assert first["paper_ms"] == pytest.approx({"baseline": 8905 / 31, "kvpr": 6651 / 31})
    assert first["predicted_ms"] == latency.rows[0].times["predicted"] and first["measured_ms"]["keys_values"] == 77.0
    assert document["tables"][0]["measured_on"] == ["Some GPU"]
    assert "measured on: Some GPU" in human and any(line.startswith("Only drawn in the paper") for line in human)
    assert sum(line.startswith(("Table 1:", "Table 3:", "Table 5:", "Gains", "Where")) for line in human) == 5
    tables = [line for line in human if line.startswith(" ")]
    assert tables and not any("…" in line for line in tables)


def test_another_machine(command, capsys, tmp_path, throughput):
    command("--hardware=h200", "--tables=Table 5", f"--out={tmp_path}/out.json")
    human = capsys.readouterr().out.splitlines()
    (table,) = json.loads((tmp_path / "out.json").read_text())["tables"]
    assert table["hardware"] == "NVIDIA H200"
    assert any(line.startswith("h200: NVIDIA H200, link 63 GB/s") for line in human)
    # The link is the bound on both: 63 GB/s against 16.
    ratio = throughput.rows[0].times["predicted"]["activations"] / table["rows"][0]["predicted_ms"]["activations"]
    assert ratio == pytest.approx(63 / 16, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables=Table 9"], "--tables has 'Table 9'; the paper's tables of steps are Table 2, Table 3, "),
        (["--hardware=h2000"], "unknown hardware 'h2000'; expected one of this, a100, .*: did you mean 'h200'"),
        (["--measured=nowhere.json"], "nowhere.json"),
        (["--measured={}"], r".*a\.json is not a results file"),
    ],
)
def test_wrong_flags_are_said_in_one_line(command, tmp_path, arguments, message):
    broken = tmp_path / "a.json"
    broken.write_text('{"rows": [{"plan": "auto"}]}')
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as left:
        command(*(argument.format(broken) for argument in arguments))
    assert "\n" not in str(left.value)
