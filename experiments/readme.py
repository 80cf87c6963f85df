"""Writes the numbers of the pages below, and draws their pictures, from the files in experiments/results.

    python experiments/readme.py            rewrites the pages, and the pictures whose numbers changed
    python experiments/readme.py --check    changes nothing; says what differs, and exits with 1 if anything does

What stands between a marker and its end is generated. A marker has a kind, files, whose names may be patterns as in a
shell, and filters: of the files' rows those are taken whose field is like one of the patterns, or like none (`!=`).

    <!-- benchmark: h200_w[1-6].json plan=keys_values,split:* -->
    | model | ...
    <!-- end -->
    The plan takes <!-- median_ms: h200_suite.json workload=w1 plan=device -->9.7 ms<!-- end --> a step, and ...

benchmark           table of rows of experiments/benchmark.py
overview            table of the same, with a row for each workload and its plans beside each other
sweep               table of rows of experiments/sweep.py
drafts              table of rows of experiments/acceptance.py
rounds              table of rows of experiments/benchmark.py with drafts
losses              table of rows of experiments/quality.py
paper_gains         table of the gains of the paper KVPR, and of those predicted and measured
paper_steps         its tables of steps, with those predicted and measured
paper_layers        its table 1, beside its formula; of no results
paper_disagreements where it disagrees with itself; of no results
bars_plot           picture of the step times of one workload
curves_plot         picture of step times against cached tokens, of one model and batch
drafts_plot         picture of tokens a pass, by kind of text and drafter, of one model and context
losses_plot         picture of what plans with loss change, of one model
predictions_plot    picture of how far predictions are off
choices_plot        picture of the scheduler's choices against the best plans by hand
timeline            picture of copies and compute in the steps that experiments/trace.py traced
machine             what the rows were measured on, by which scripts at which commits
accuracy            how many predictions are within 5 and 10 %
off                 how far predictions are off
median_ms, ...      any field of the rows or of their files, with its unit

A marker stands on a line of its own, as does its end then, or within a line. It does not begin one that goes on: in
Markdown such a line is HTML. Tables and pictures need lines of their own; there is one picture of each kind.
"""

import difflib
import fnmatch
import functools
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.support import script
from experiments.support.paper import report as paper
from experiments.support.paper.numbers import read
from experiments.support.plots import bars, curves, drafts, losses
from experiments.support.results import predictions, tables
from experiments.support.results.tables import Row
from experiments.support.traces import timeline

from absl import flags

from kvrecomp.files import write_text

ROOT = Path(__file__).parent.parent
RESULTS = "experiments/results"
PAGES = ("README.md", "experiments/README.md", f"{RESULTS}/README.md", f"{RESULTS}/paper.md")
WIDTH = 120  # of sentences that stand on lines of their own

MARKER = re.compile(r"<!-- (\w+):(.*?) -->(.*?)<!-- end -->", re.DOTALL)
HALF = re.compile(r"<!-- (\w+:|end -->)")
LINE_START = re.compile(r"(\s|[-*+>]\s|\d+[.)]\s)*")  # what may stand before the text of a line in Markdown
TABLES = {
    "benchmark": tables.benchmark,
    "overview": tables.overview,
    "sweep": tables.sweep,
    "drafts": tables.drafts,
    "rounds": tables.rounds,
    "losses": tables.losses,
    "paper_gains": paper.all_gains,
    "paper_steps": paper.all_steps,
    "paper_layers": lambda _: paper.layers(read()),
    "paper_disagreements": lambda _: paper.disagreeing(read()),
}
OF_NO_RESULTS = ("paper_layers", "paper_disagreements")
SENTENCES = {"machine": tables.machine, "accuracy": lambda rows: predictions.accuracy(tables.predicted(rows))}


class Picture(NamedTuple):
    """A kind of picture: its file, what of the rows is drawn, how, and what is said of it."""

    file: str
    of: Callable[[Sequence[Row]], list[Any]]
    draw: Callable[[list[Any], Path], None]
    say: Callable[[list[Any]], str]


PICTURES = {
    "bars_plot": Picture("bars.png", bars.steps, bars.draw, bars.said),
    "curves_plot": Picture("curves.png", curves.points, curves.draw_curves, curves.said),
    "drafts_plot": Picture("acceptance.png", drafts.drafted, drafts.draw, drafts.said),
    "losses_plot": Picture("losses.png", losses.lost, losses.draw, losses.said),
    "predictions_plot": Picture(
        "predictions.png", tables.predicted, predictions.draw_predictions, predictions.accuracy
    ),
    "choices_plot": Picture("choices.png", tables.predicted, predictions.draw_choices, predictions.regret),
    "timeline": Picture("timeline.png", timeline.timelines, timeline.draw, timeline.said),
}
OWN_LINES = (*TABLES, *PICTURES)


def define_flags(into: flags.FlagValues) -> None:
    script.Define(into).boolean("check", False, "Change nothing; say what differs.")


# --- what markers stand for -------------------------------------------------------------------------------------------


class Results:
    """The results files of a repository: each is read once, and what a marker stands for is made once."""

    def __init__(self, root: Path):
        self.root = root
        self._read = functools.cache(tables.read_file)

    def files(self, arguments: str) -> list[Path]:
        """The files that a marker names, each once."""
        found: dict[Path, None] = {}
        for name in (word for word in arguments.split() if "=" not in word):
            matching = sorted((self.root / RESULTS).glob(name))
            if not matching:
                raise ValueError(f"there is no file {name} in {RESULTS}")
            found |= dict.fromkeys(matching)
        return list(found)

    def rows(self, arguments: str) -> list[Row]:
        """The rows of a marker's files that its filters leave, in their order."""
        rows: list[Row] = []
        for path in self.files(arguments):
            rows += self._read(path)
        if not rows:
            raise ValueError(f"no file of {arguments!r} has a row")
        for condition in (word for word in arguments.split() if "=" in word):
            rows = [row for row in rows if _passes(row, condition)]
            if not rows:
                raise ValueError(f"no row is left by {condition}")
        return rows

    @functools.cache  # noqa: B019
    def text(self, kind: str, arguments: str, folder: str) -> str:
        """What a marker of a page in that folder stands for."""
        rows = [] if kind in OF_NO_RESULTS else self.rows(arguments)
        if kind in PICTURES:
            picture = PICTURES[kind]
            return f"![{picture.say(picture.of(rows))}]({os.path.relpath(f'{RESULTS}/{picture.file}', folder)})"
        if make := TABLES.get(kind) or SENTENCES.get(kind):
            return make(rows)
        if all(kind not in row for row in rows):
            kinds = ", ".join([*OWN_LINES, *SENTENCES])
            raise ValueError(f"{kind!r} is none of {kinds}, and no field of {rows[0]['file']}")
        return tables.span(kind, rows)


def _passes(row: Row, condition: str) -> bool:
    """Of `field=pattern,pattern` or `field!=pattern,pattern`."""
    field, _, patterns = condition.partition("=")
    name = field.removesuffix("!")
    if name not in row:
        raise ValueError(f"{row['file']} has no field {name!r}")
    like = any(fnmatch.fnmatchcase(str(row[name]), pattern) for pattern in patterns.split(","))
    return like != field.endswith("!")


# --- pages ------------------------------------------------------------------------------------------------------------


def filled(page: str, text: str, results: Results) -> str:
    """The page's text with what stands between markers and their ends made anew.

    Raises:
        OSError: a results file cannot be read.
        ValueError: a marker is wrong; the message has its page and line.
    """
    pieces, position = [], 0
    for marker in MARKER.finditer(text):
        try:
            body = _body(page, marker, text, results)
        except KeyError as error:
            raise ValueError(f"{_place(page, text, marker)}: a row has no field {error}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{_place(page, text, marker)}: {error}") from error
        pieces += [text[position : marker.start(3)], body]
        position = marker.end(3)
    rest = MARKER.sub(lambda marker: "\n" * marker.group().count("\n"), text)
    for half in HALF.finditer(rest):
        raise ValueError(f"{_place(page, rest, half)}: {half.group()} without the other half of the marker")
    return "".join([*pieces, text[position:]])


def _place(page: str, text: str, marker: re.Match) -> str:
    line = text.count("\n", 0, marker.start()) + 1
    return f"{page}:{line}"


def _body(page: str, marker: re.Match, text: str, results: Results) -> str:
    """What is to stand in one marker."""
    kind, arguments, old = marker.groups()
    if HALF.search(old):
        raise ValueError(f"the marker {kind!r} has no end")
    body, flows = results.text(kind, arguments.strip(), str(Path(page).parent)), kind not in OWN_LINES
    before = text[text.rfind("\n", 0, marker.start()) + 1 : marker.start()]
    after = text[marker.end() :].partition("\n")[0]
    if flows and not LINE_START.fullmatch(before):
        return body
    if before or after or "\n" not in old:
        hint = ", or a word before them" if flows else ""
        raise ValueError(f"the marker {kind!r} and its end need lines of their own{hint}")
    if flows:
        body = textwrap.fill(body.removesuffix(".") + ".", WIDTH, break_long_words=False, break_on_hyphens=False)
    return f"\n{body}\n"


def stale_pictures(text: str, results: Results) -> Iterator[tuple[str, Path, list[Any]]]:
    """Kind, file and what is drawn of each picture that is missing or shows other numbers."""
    for kind, arguments, _ in MARKER.findall(text):
        if kind in PICTURES:
            path = results.root / RESULTS / PICTURES[kind].file
            drawn = PICTURES[kind].of(results.rows(arguments))
            if not path.exists() or predictions.digest(drawn).encode() not in path.read_bytes():
                yield kind, path, drawn


def unused(text: str, results: Results) -> list[str]:
    """Results files that no marker takes and the text does not name; not a user's own, which git does not have."""
    root = results.root
    used = {path for _, arguments, _ in MARKER.findall(text) for path in results.files(arguments)}
    git = ("git", "-C", str(root), "ls-files", "--others", "-z", RESULTS)
    others = subprocess.run(git, capture_output=True, text=True).stdout.split("\0") if shutil.which("git") else []
    every = sorted(set((root / RESULTS).glob("*.json")) - {root / name for name in others})
    return [path.name for path in every if path not in used and path.name not in text]


# --- the command ------------------------------------------------------------------------------------------------------


def main(given: flags.FlagValues) -> None:
    results = Results(ROOT)
    old = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    new = {page: filled(page, text, results) for page, text in old.items()}
    text = "".join(new.values())
    stale, forgotten = list(stale_pictures(text, results)), unused(text, results)
    for name in forgotten:
        print(f"{RESULTS}/{name}: no page uses or names it")
    if given.check:
        for page in PAGES:
            lines = old[page].splitlines(), new[page].splitlines()
            for line in difflib.unified_diff(*lines, page, RESULTS, lineterm=""):
                print(line)
        for _, path, _ in stale:
            print(f"{path.relative_to(ROOT)}: not drawn from these results")
        sys.exit(1 if old != new or stale or forgotten else 0)
    for page in PAGES:
        if old[page] != new[page]:
            write_text(ROOT / page, new[page])
        print(f"{page}: {'as the results say' if old[page] == new[page] else 'written'}")
    for kind, path, drawn in stale:
        PICTURES[kind].draw(drawn, path)
        print(f"{path.relative_to(ROOT)}: drawn")


if __name__ == "__main__":
    script.run(main, define_flags)
