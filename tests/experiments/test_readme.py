"""README.md says what the results say; and how markers are filled, on results that were made up."""

import json
import os
import re
import subprocess
import sys

import pytest
from absl import flags

from experiments import readme
from experiments.support.results import predictions, tables
from experiments.support.script import in_one_line
from experiments.support.traces import timeline

ROW = {"model": "opt-1.3b", "batch": 2, "prompt": 3, "new": 5, "link_bytes": 7_000_000_000, "link_efficiency": 0.5}
ROWS = [
    ROW | {"plan": "device:0.5", "median_ms": 4.0, "predicted_ms": 4.36},
    ROW | {"plan": "device", "median_ms": 2.0, "predicted_ms": 1.92, "link_bytes": 0, "link_efficiency": None},
]
FACTS = {"device": "Some GPU", "driver": "5.6", "jax": "0.1", "commit": "abc", "command": "python a.py"}
TEXT = """# Made up

<!-- benchmark: a*.json plan=device:* -->
| an | older |
<!-- end -->

A step takes <!-- median_ms: a.json plan!=device:* -->9 ms<!-- end -->
or <!-- median_ms: a.json -->?<!-- end --> and <!-- new: a.json --><!-- end --> words.

<!-- machine: a.json -->
<!-- end -->
"""
FILLED = """# Made up

<!-- benchmark: a*.json plan=device:* -->
| model | batch | prompt | plan | ms a step | GB over the link | efficiency |
|---|---|---|---|---|---|---|
| OPT-1.3B | 2 | 3 | `device:0.5` | 4.0 | 7.00 | 0.500 |
<!-- end -->

A step takes <!-- median_ms: a.json plan!=device:* -->2.0 ms<!-- end -->
or <!-- median_ms: a.json -->2.0 to 4.0 ms<!-- end --> and <!-- new: a.json -->5<!-- end --> words.

<!-- machine: a.json -->
Some GPU, driver 5.6, jax 0.1. Measured by `a.py` (`a.json` at `abc`).
<!-- end -->
"""
PICTURE = "<!-- predictions_plot: a.json -->\n<!-- end -->\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with one results file, as the command sees it."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    write_results(tmp_path, "a.json", ROWS)
    (tmp_path / "README.md").write_text(TEXT)
    return tmp_path


def write_results(root, name, rows):
    path = root / "experiments" / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(FACTS | {"rows": rows}))


def command(*arguments: str) -> None:
    """The script in this process."""
    values = flags.FlagValues()
    readme.define_flags(values)
    values(["readme", *arguments])
    with in_one_line():
        readme.main(values)


# --- ours -------------------------------------------------------------------------------------------------------------


def test_readme_says_what_the_results_say():
    text = (readme.ROOT / readme.README).read_text(encoding="utf-8")
    assert readme.filled(text) == text, "run: python experiments/readme.py"
    assert [str(path) for _, path, _ in readme.pictures(text)] == [], "run: python experiments/readme.py"
    assert readme.unused(text) == [], "README.md should use these files, or say why they are there"


def test_results_that_git_does_not_have_are_a_users_own(root):
    write_results(root, "known.json", ROWS)
    assert "known.json" in readme.unused("", root)  # outside of a repository
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    write_results(root, "mine.json", ROWS)
    assert "known.json" in readme.unused("", root) and "mine.json" not in readme.unused("", root)


# --- markers ----------------------------------------------------------------------------------------------------------


def test_markers_are_filled(root):
    assert readme.filled(TEXT, root) == FILLED
    assert readme.filled(FILLED, root) == FILLED


def test_files_by_pattern_come_once_and_in_order(root):
    for name in ("b.json", "a2.json"):
        write_results(root, name, [ROWS[0] | {"new": len(name)}])
    files = [path.name for path in readme.files_of("b.json plan=x a*.json a.json", root)]
    assert files == ["b.json", "a.json", "a2.json"]
    assert [row["new"] for row in readme.rows_of("b.json a?.json", root)] == [6, 7]


@pytest.mark.parametrize(
    ("conditions", "plans"),
    [
        ("plan=device", ["device"]),
        ("plan=device*", ["device:0.5", "device"]),
        ("plan!=device", ["device:0.5"]),
        ("plan=auto,device:*", ["device:0.5"]),
        ("batch=2 plan!=auto,device:*", ["device"]),
    ],
)
def test_filters(root, conditions, plans):
    assert [row["plan"] for row in readme.rows_of(f"a.json {conditions}", root)] == plans


def test_sentences_on_lines_of_their_own_are_broken_into_lines(root):
    write_results(root, "a-name-that-is-about-as-long-as-half-a-line.json", ROWS)
    lines = readme.filled("<!-- machine: *.json -->\n<!-- end -->\n", root).splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= readme.WIDTH
    assert " ".join(lines[1:3]) == tables.machine(readme.rows_of("*.json", root))


def test_sentences_on_lines_of_their_own_have_a_full_stop(root):
    said = tables.accuracy(readme.rows_of("a.json", root))
    alone = f"<!-- accuracy: a.json -->\n{said}.\n<!-- end -->\n"
    within = f"Here <!-- accuracy: a.json -->{said}<!-- end -->.\n"
    assert readme.filled(alone + within, root) == alone + within


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n<!-- benchmark: a.json -->\n", "README.md:2: <!-- benchmark: without the other half"),
        ("<!-- end -->", "README.md:1: <!-- end --> without the other half"),
        ("x <!-- new: a.json -->\nx <!-- new: a.json -->5<!-- end -->", "README.md:1: the marker 'new' has no end"),
        (
            "a\n<!-- new: a.json -->5<!-- end --> b",
            "README.md:2: the marker 'new' and its end need lines of their own, or",
        ),
        ("- <!-- new: a.json -->5<!-- end --> b", "need lines of their own, or a word before them"),
        ("1. > <!-- new: a.json -->5<!-- end -->", "need lines of their own, or a word before them"),
        ("a <!-- benchmark: a.json -->5<!-- end -->", "'benchmark' and its end need lines of their own"),
        ("<!-- benchmark: a.json -->\n<!-- end --> a", "'benchmark' and its end need lines of their own"),
        ("a <!-- new: b.json -->5<!-- end -->", "there is no file b.json in experiments/results"),
        ("a <!-- new: a.json plan=x -->5<!-- end -->", "no row is left by plan=x"),
        ("a <!-- new: a.json place=x -->5<!-- end -->", "a.json has no field 'place'"),
        ("a <!-- new: plan=x -->5<!-- end -->", "no file of 'plan=x' has a row"),
        ("a <!-- place: a.json -->5<!-- end -->", "'place' is none of benchmark, sweep, paper, predictions_plot"),
        ("<!-- benchmark: short.json -->\n<!-- end -->", "README.md:1: a row has no field 'model'"),
        ("a <!-- new: broken.json -->5<!-- end -->", "broken.json is not a results file"),
    ],
)
def test_mistakes_are_said_with_their_line(root, text, message):
    write_results(root, "short.json", [{"median_ms": 1.0}])
    (root / "experiments" / "results" / "broken.json").write_text("{")
    with pytest.raises(ValueError) as error:
        readme.filled(text, root)
    assert message in str(error.value) and str(error.value).startswith("README.md:")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_what_the_check_misses(root, capsys):
    with pytest.raises(SystemExit) as left:
        command("--check")
    assert left.value.code == 1 and (root / "README.md").read_text() == TEXT
    said = capsys.readouterr().out
    assert "-| an | older |\n" in said and "+| OPT-1.3B | 2 | 3 | `device:0.5` | 4.0 | 7.00 | 0.500 |\n" in said
    command()
    assert (root / "README.md").read_text() == FILLED
    assert [path.name for path in root.iterdir() if path.is_file()] == ["README.md"]
    with pytest.raises(SystemExit) as left:
        command("--check")
    assert left.value.code == 0
    write_results(root, "a.json", [row | {"median_ms": 8.0} for row in ROWS])
    command()
    assert "| 8.0 | 7.00 | 0.500 |" in (root / "README.md").read_text()


def test_files_that_are_not_used_are_said(root, capsys):
    (root / "README.md").write_text(FILLED)
    write_results(root, "b.json", ROWS)
    with pytest.raises(SystemExit) as left:
        command("--check")
    assert left.value.code == 1
    assert capsys.readouterr().out == "experiments/results/b.json: README.md neither uses nor names it\n"
    (root / "README.md").write_text(FILLED + "b.json is older.\n")
    with pytest.raises(SystemExit) as left:
        command("--check")
    assert left.value.code == 0


def test_a_picture_is_drawn_where_its_numbers_changed(root, capsys):
    pytest.importorskip("matplotlib")
    path = root / "experiments" / "results" / "predictions.png"
    (root / "README.md").write_text(PICTURE)
    command()
    rows = tables.predicted(readme.rows_of("a.json", root))
    assert (root / "README.md").read_text().splitlines()[1] == (
        "![1 of 2 predictions are within 5 %, 2 within 10 % (4 % short to 9 % over)]"
        "(experiments/results/predictions.png)"
    )
    assert predictions.digest(rows).encode() in path.read_bytes()
    before = path.stat().st_mtime_ns
    command()
    assert path.stat().st_mtime_ns == before
    write_results(root, "a.json", [row | {"batch": 3} for row in ROWS])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        command("--check")
    assert left.value.code == 1
    assert capsys.readouterr().out == "experiments/results/predictions.png: not drawn from these results\n"
    command()
    assert path.stat().st_mtime_ns != before


def test_a_timeline_is_drawn_from_a_traced_step(root):
    pytest.importorskip("matplotlib")
    path = root / "experiments" / "results" / "timeline.png"
    spans = [["to_device", 0, 0.0, 2.5], ["compute", None, 2.5, 1.0]]
    step = {"traced_ms": 4.5, "link_busy": 0.625, "gpu_busy": 0.25, "unknown": 0.2, "spans": spans}
    traced = ROW | {"plan": "activations", "median_ms": 4.0} | step
    write_results(root, "t.json", [traced])
    (root / "README.md").write_text("a.json\n\n<!-- timeline: t.json -->\n<!-- end -->\n")
    command()
    assert (root / "README.md").read_text().splitlines()[3] == (
        "![activations, 4.5 ms traced (4.0 ms not traced): link busy 62.5 %, GPU 25.0 %]"
        "(experiments/results/timeline.png)"
    )
    drawn = timeline.timelines([traced | {"file": "t.json"}])
    assert predictions.digest(drawn).encode() in path.read_bytes()
    write_results(root, "t.json", [traced | {"spans": spans[:1]}])
    assert [kind for kind, _, _ in readme.pictures((root / "README.md").read_text(), root)] == ["timeline"]
    with pytest.raises(ValueError, match=r"README.md:1: a.json has no traced_ms, so it is not of experiments/trace"):
        readme.filled("<!-- timeline: a.json -->\n<!-- end -->\n", root)


def test_a_picture_of_step_times_has_rows_without_a_prediction(root):
    pytest.importorskip("matplotlib")
    peer = {"plan": "huggingface", "predicted_ms": None, "median_ms": 9.0}
    write_results(root, "a.json", [*ROWS, ROW | peer, ROW | peer | {"batch": 7}])
    (root / "README.md").write_text("<!-- curves_plot: a.json batch=2 -->\n<!-- end -->\n")
    command()
    assert (root / "README.md").read_text().splitlines()[1] == (
        "![OPT-1.3B, batch 2, Some GPU: with 3 cached tokens a step takes huggingface (its cache on the GPU) 9.0 ms, "
        "device:0.5 4.0 ms and device (all on the GPU) 2.0 ms](experiments/results/curves.png)"
    )
    assert (root / "experiments" / "results" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit) as left:
        command("--check")
    assert left.value.code == 0


def test_program_needs_no_device_and_refuses_with_one_line(root):
    program = readme.__file__
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(program))}
    code = "import sys; from experiments import readme; from kvrecomp import memory; sys.exit(memory.backend_started())"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
    (root / "README.md").write_text("<!-- end -->")
    with pytest.raises(SystemExit, match=r"^error: README.md:1: <!-- end --> without the other half of the marker$"):
        command()


# --- its examples -----------------------------------------------------------------------------------------------------

CHECK = """
model, ids = Model(nnx.Rngs(0)), [[7, 2, 3]]
cached = kvrecomp.generate(model, ids, max_new_tokens=5, plan="activations", output_logits=True)
for new in range(5):
    before = cached.sequences[:, : 3 + new]
    whole = kvrecomp.generate(model, before, max_new_tokens=1, plan="device", output_logits=True)
    difference = abs(whole.logits[0] - cached.logits[new]).max()
    assert difference < 1e-5 * abs(whole.logits).max(), (new, difference)
"""


@pytest.mark.parametrize(("says", "check"), [("tokenizer.encode", ""), ("class Model(nnx.Module)", CHECK)])
def test_an_example_runs(says, check):
    """As it is pasted; a model of one's own gives the logits with a cache that it gives without."""
    examples = re.findall(r"```python\n(.*?)```", (readme.ROOT / readme.README).read_text(), re.DOTALL)
    (example,) = [each for each in examples if says in each]
    own = {**os.environ, "PYTHONPATH": str(readme.ROOT)}
    told = subprocess.run(
        [sys.executable, "-c", example + check], cwd=readme.ROOT, env=own, capture_output=True, text=True
    )
    assert told.returncode == 0 and told.stdout, told.stderr
