"""The pages say what the results say, and their links lead somewhere; how markers are filled, on made-up results."""

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout

import jax
import pytest
import scripts

from experiments import readme
from experiments.support.results import predictions, tables

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
PAGES = ("README.md", "experiments/results/README.md")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with one results file and two pages, as the command sees it."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PAGES", PAGES)
    write_results(tmp_path, "a.json", ROWS)
    write_page(tmp_path, TEXT)
    (tmp_path / PAGES[1]).write_text("# Results\n")
    return tmp_path


def write_results(root, name, rows):
    path = root / readme.RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(FACTS | {"rows": rows}))


def write_page(root, text, page="README.md"):
    (root / page).write_text(text)


def filled(text, root, page="README.md"):
    return readme.filled(page, text, readme.Results(root))


def command(*words: str) -> int:
    """The exit status of the script in this process."""
    try:
        scripts.call(readme, *words)
    except SystemExit as left:
        if isinstance(left.code, int):
            return left.code
        raise
    return 0


# --- ours -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages():
    return {page: (readme.ROOT / page).read_text(encoding="utf-8") for page in readme.PAGES}


def test_pages_say_what_the_results_say(pages):
    results, text = readme.Results(readme.ROOT), "".join(pages.values())
    for page, old in pages.items():
        assert readme.filled(page, old, results) == old, "run: python experiments/readme.py"
    assert [str(path) for _, path, _ in readme.stale_pictures(text, results)] == [], "run: python experiments/readme.py"
    assert readme.unused(text, results) == [], "a page should use these files, or say why they are there"
    assert pages["README.md"].count("\n") <= 200


def anchors(text):
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere(pages):
    for page, text in pages.items():
        folder = (readme.ROOT / page).parent
        links = re.findall(r"\]\(([^)]*)\)", text)
        assert links
        for link in links:
            path, _, anchor = link.partition("#")
            target = (folder / path).resolve() if path else readme.ROOT / page
            assert target.exists(), f"{page} links to {link}"
            if anchor:
                assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page} links to {link}"


def test_files_that_pages_name_are_there(pages):
    for page, text in pages.items():
        named = re.findall(r"`((?:experiments|kvrecomp|models|tests)/[\w./-]*)`", text)
        named += re.findall(r"python ((?:experiments|tests)/[\w./-]*\.py)", text)
        results = re.findall(r"`((?:h100|h200|cpu)_[\w.]*\.(?:json|txt))`", text)
        scripts = re.findall(r"`(\w+\.(?:py|ipynb))`", text)
        paths = [
            *named,
            *(f"{readme.RESULTS}/{name}" for name in results),
            *(f"experiments/{name}" for name in scripts),
        ]
        assert [path for path in paths if not (readme.ROOT / path).exists()] == [], page


def test_the_example_runs(pages, monkeypatch):
    """The first one, as it is pasted."""
    example = re.findall(r"```python\n(.*?)```", pages["README.md"], re.DOTALL)[0]
    monkeypatch.chdir(readme.ROOT)
    printed = io.StringIO()
    with redirect_stdout(printed), jax.transfer_guard("allow"):
        exec(example, names := {})
    assert "Return the " in printed.getvalue() and names["result"].sequences.shape[1] > 128
    assert names["logits"].shape == (1, names["model"].shape.vocab)


def test_pages_need_no_device():
    code = (
        "from experiments import readme; from kvrecomp.run import memory; results = readme.Results(readme.ROOT)\n"
        "for page in readme.PAGES: readme.filled(page, (readme.ROOT / page).read_text(), results)\n"
        "raise SystemExit(memory.backend_started())"
    )
    environment = {**os.environ, "PYTHONPATH": str(readme.ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=readme.ROOT).returncode == 0


def test_results_that_git_does_not_have_are_a_users_own(root):
    write_results(root, "known.json", ROWS)
    assert "known.json" in readme.unused("", readme.Results(root))  # outside of a repository
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    write_results(root, "mine.json", ROWS)
    unused = readme.unused("", readme.Results(root))
    assert "known.json" in unused and "mine.json" not in unused


# --- markers ----------------------------------------------------------------------------------------------------------


def test_markers_are_filled(root):
    assert filled(TEXT, root) == FILLED
    assert filled(FILLED, root) == FILLED


@pytest.mark.parametrize(
    ("arguments", "plans"),
    [
        ("a.json plan=device", ["device"]),
        ("a.json plan=device*", ["device:0.5", "device"]),
        ("a.json plan!=device", ["device:0.5"]),
        ("a.json plan=auto,device:*", ["device:0.5"]),
        ("a.json batch=2 plan!=auto,device:*", ["device"]),
        ("b.json a*.json a.json", ["b", "device:0.5", "device", "a2"]),  # each file once, in order
        ("b.json a?.json", ["b", "a2"]),
    ],
)
def test_files_and_filters(root, arguments, plans):
    for name in ("b", "a2"):
        write_results(root, f"{name}.json", [ROWS[0] | {"plan": name}])
    assert [row["plan"] for row in readme.Results(root).rows(arguments)] == plans


def test_sentences_on_lines_of_their_own_are_broken_into_lines_and_end_in_a_full_stop(root):
    write_results(root, "a-name-that-is-about-as-long-as-half-a-line.json", ROWS)
    lines = filled("<!-- machine: *.json -->\n<!-- end -->\n", root).splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= readme.WIDTH
    assert " ".join(lines[1:3]) == tables.machine(readme.Results(root).rows("*.json"))
    said = predictions.accuracy(tables.predicted(readme.Results(root).rows("a.json")))  # of those that have one
    alone = f"<!-- accuracy: a.json -->\n{said}.\n<!-- end -->\n"
    within = f"Here <!-- accuracy: a.json -->{said}<!-- end -->.\n"
    assert filled(alone + within, root) == alone + within


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
        ("a <!-- place: a.json -->5<!-- end -->", "'place' is none of benchmark, overview, sweep, drafts"),
        ("<!-- benchmark: short.json -->\n<!-- end -->", "README.md:1: a row has no field 'link_efficiency'"),
        ("a <!-- new: broken.json -->5<!-- end -->", "broken.json is not a results file"),
    ],
)
def test_mistakes_are_said_with_their_line(root, text, message):
    left_out = ("link_efficiency",)
    write_results(root, "short.json", [{name: value for name, value in ROWS[0].items() if name not in left_out}])
    (root / readme.RESULTS / "broken.json").write_text("{")
    with pytest.raises(ValueError) as error:
        filled(text, root)
    assert message in str(error.value) and str(error.value).startswith("README.md:")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_what_the_check_misses(root, capsys):
    write_page(root, "A step takes <!-- new: a.json -->4<!-- end --> words.\n", PAGES[1])
    assert command("--check") == 1 and (root / "README.md").read_text() == TEXT
    said = capsys.readouterr().out
    assert "-| an | older |\n" in said and "+| OPT-1.3B | 2 | 3 | `device:0.5` | 4.0 | 7.00 | 0.500 |\n" in said
    assert "+A step takes <!-- new: a.json -->5<!-- end --> words.\n" in said
    assert command() == 0
    assert (root / "README.md").read_text() == FILLED
    assert [path.name for path in root.iterdir() if path.is_file()] == ["README.md"]
    assert command("--check") == 0
    write_results(root, "a.json", [row | {"median_ms": 8.0} for row in ROWS])
    command()
    assert "| 8.0 | 7.00 | 0.500 |" in (root / "README.md").read_text()
    write_page(root, "<!-- end -->")
    with pytest.raises(SystemExit, match=r"^error: README.md:1: <!-- end --> without the other half of the marker$"):
        command()


def test_files_that_are_not_used_are_said(root, capsys):
    write_page(root, FILLED)
    write_results(root, "b.json", ROWS)
    assert command("--check") == 1
    assert capsys.readouterr().out == "experiments/results/b.json: no page uses or names it\n"
    write_page(root, "b.json is older.\n", PAGES[1])
    assert command("--check") == 0


def test_a_picture_is_drawn_where_its_numbers_changed(root, capsys):
    """And its path is one from the page's folder."""
    pytest.importorskip("matplotlib")
    path = root / readme.RESULTS / "predictions.png"
    picture = "<!-- predictions_plot: a.json -->\n<!-- end -->\n"
    write_page(root, picture)
    command()
    said = "![1 of 2 predictions are within 5 %, 2 within 10 % (4 % short to 9 % over)]"
    assert (root / PAGES[0]).read_text().splitlines()[1] == f"{said}(experiments/results/predictions.png)"
    assert filled(picture, root, PAGES[1]).splitlines()[1] == f"{said}(predictions.png)"
    assert predictions.digest(tables.predicted(readme.Results(root).rows("a.json"))).encode() in path.read_bytes()
    before = path.stat().st_mtime_ns
    command()
    assert path.stat().st_mtime_ns == before
    write_results(root, "a.json", [row | {"batch": 3} for row in ROWS])
    capsys.readouterr()
    assert command("--check") == 1
    assert capsys.readouterr().out == "experiments/results/predictions.png: not drawn from these results\n"
    command()
    assert path.stat().st_mtime_ns != before


STEP = {"traced_ms": 4.5, "link_busy": 0.625, "gpu_busy": 0.25, "unknown": 0.2, "spans": [["to_device", 0, 0.0, 2.5]]}
PEER = ROW | {"plan": "huggingface", "predicted_ms": None, "median_ms": 9.0}
DRAFTED = ROW | {"plan": "activations", "median_ms": 1.0, "temperature": 0.5, "drafter": "int4 sketch", "drafts": 4}
DRAFTED["texts"] = [{"kind": "code", "tokens_per_pass": 2.5}, {"kind": "list", "tokens_per_pass": 1.5}]


@pytest.mark.parametrize(
    ("kind", "rows", "said"),
    [
        (
            "timeline",
            [ROW | STEP | {"plan": "activations", "median_ms": 4.0}],
            "![activations, 4.5 ms traced (4.0 ms not traced): link busy 62.5 %, GPU 25.0 %]"
            "(experiments/results/timeline.png)",
        ),
        (
            "curves_plot",
            [*ROWS, PEER],
            "![OPT-1.3B, batch 2, Some GPU: with 3 cached tokens a step takes huggingface (its cache on the GPU) "
            "9.0 ms, device:0.5 4.0 ms and device (all on the GPU) 2.0 ms](experiments/results/curves.png)",
        ),
        (
            "bars_plot",
            [ROWS[1] | {"room": None}, PEER | {"room": None}, ROWS[0] | {"plan": "auto", "room": 25.0}],
            "![A decode step of OPT-1.3B, 2 rows of 3 tokens, Some GPU: Hugging Face, cache on the GPU 9.0 ms, auto, "
            "with room on the GPU for 25 % 4.0 ms and all on the GPU 2.0 ms](experiments/results/bars.png)",
        ),
        (
            "drafts_plot",
            [DRAFTED, DRAFTED | {"drafter": "prompt lookup"}],
            "![Tokens a pass of OPT-1.3B, 3 tokens of each text, 4 drafts a round, temperature 0.5: int4 sketch 1.5 "
            "(list) to 2.5 (code) and prompt lookup 1.5 (list) to 2.5 (code)](experiments/results/acceptance.png)",
        ),
    ],
)
def test_pictures_of_steps(root, kind, rows, said):
    pytest.importorskip("matplotlib")
    write_results(root, "t.json", rows)
    write_page(root, f"a.json\n\n<!-- {kind}: t.json -->\n<!-- end -->\n")
    command()
    assert (root / "README.md").read_text().splitlines()[3] == said
    path = root / readme.RESULTS / readme.PICTURES[kind].file
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert command("--check") == 0
    texts = [{"kind": "code", "tokens_per_pass": 2.0}]
    write_results(root, "t.json", [rows[0] | {"median_ms": 8.0, "texts": texts}, *rows[1:]])
    text = (root / "README.md").read_text()
    assert [found for found, _, _ in readme.stale_pictures(text, readme.Results(root))] == [kind]


def test_pictures_of_other_results_are_refused(root):
    write_results(root, "b.json", [ROWS[0] | {"room": None}, ROWS[1] | {"room": None, "batch": 7}])
    for kind, name, message in (
        ("timeline", "a", f"a.json has no {next(iter(STEP))}, so it is not of experiments/trace"),
        ("bars_plot", "b", "the rows are of several workloads"),
    ):
        with pytest.raises(ValueError, match=f"README.md:1: {message}"):
            filled(f"<!-- {kind}: {name}.json -->\n<!-- end -->\n", root)
