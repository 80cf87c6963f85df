"""Writes the numbers of README.md, and draws its pictures, from the files in experiments/results.

    python experiments/readme.py            rewrites README.md, and the pictures whose numbers changed
    python experiments/readme.py --check    changes nothing; says what differs, and exits with 1 if anything does

What stands between a marker and its end is generated. A marker has a kind, files, whose names may be patterns as in a
shell, and filters: of the files' rows those are taken whose field is like one of the patterns, or like none (`!=`).

    <!-- benchmark: h200_w[1-6].json plan=keys_values,split:* -->
    | model | ...
    <!-- end -->
    The plan takes <!-- median_ms: h200_suite.json workload=w1 plan=device -->9.7 ms<!-- end --> a step, and ...

benchmark           table of rows of experiments/benchmark.py
sweep               table of rows of experiments/sweep.py
paper               table of the paper's gains, and of those predicted and measured (experiments/reproduce_paper.py)
paper_rates         tokens a second that are predicted for the paper's machine, in the setting of the rows
predictions_plot    picture of how far predictions are off
choices_plot        picture of the scheduler's choices against the best plans by hand
curves_plot         picture of step times against cached tokens, of one model and batch
timeline            picture of copies and compute in the steps that experiments/trace.py traced
machine             what the rows were measured on, by which scripts at which commits
accuracy            how many predictions are within 5 and 10 %
choices             how far the scheduler's choices are from the best plans by hand
off                 how far predictions are off
median_ms, ...      any field of the rows or of their files, with its unit

A marker stands on a line of its own, as does its end then, or within a line. It does not begin one that goes on: in
Markdown such a line is HTML. Tables and pictures need lines of their own; there is one picture of each kind.
"""

import difflib
import fnmatch
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from experiments.support import script
from experiments.support.paper import costs as paper_costs
from experiments.support.plots import curves
from experiments.support.results import predictions, tables
from experiments.support.results.tables import Row
from experiments.support.traces import timeline
from kvrecomp.files import write_text

ROOT = Path(__file__).parent.parent
README, RESULTS = "README.md", "experiments/results"
WIDTH = 120  # of sentences that stand on lines of their own

MARKER = re.compile(r"<!-- (\w+): (.*?) -->(.*?)<!-- end -->", re.DOTALL)
HALF = re.compile(r"<!-- (\w+:|end -->)")
LINE_START = re.compile(r"(\s|[-*+>]\s|\d+[.)]\s)*")  # what may stand before the text of a line in Markdown
TABLES = {"benchmark": tables.benchmark, "sweep": tables.sweep, "paper": paper_costs.markdown}
SENTENCES = {
    "machine": tables.machine,
    "accuracy": tables.accuracy,
    "choices": tables.choices,
    "paper_rates": paper_costs.rates,
}


class Picture(NamedTuple):
    """A kind of picture: its file, what of the rows is drawn, how, and what is said of it."""

    file: str
    of: Callable[[Sequence[Row]], list[Any]]
    draw: Callable[[list[Any], Path], None]
    say: Callable[[list[Any]], str]


PICTURES = {
    "predictions_plot": Picture(
        "predictions.png", tables.predicted, predictions.draw_predictions, predictions.accuracy
    ),
    "choices_plot": Picture("choices.png", tables.predicted, predictions.draw_choices, predictions.regret),
    "curves_plot": Picture("curves.png", curves.points, curves.draw_curves, curves.said),
    "timeline": Picture("timeline.png", timeline.timelines, timeline.draw, timeline.said),
}


def define_flags(into: flags.FlagValues) -> None:
    """Called by the script only."""
    flags.DEFINE_bool("check", False, "Change nothing; say what differs.", flag_values=into)


# --- markers ----------------------------------------------------------------------------------------------------------


def filled(text: str, root: Path = ROOT) -> str:
    """The text with what stands between markers and their ends made anew; `root` has `RESULTS`.

    Raises:
        OSError: a results file cannot be read.
        ValueError: a marker is wrong; the message has its line.
    """
    pieces, position = [], 0
    for found in MARKER.finditer(text):
        try:
            body = _body(found, text, root)
        except KeyError as error:
            raise ValueError(f"{_place(text, found)}: a row has no field {error}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{_place(text, found)}: {error}") from error
        pieces += [text[position : found.start(3)], body]
        position = found.end(3)
    rest = MARKER.sub(lambda found: "\n" * found.group().count("\n"), text)
    for half in HALF.finditer(rest):
        raise ValueError(f"{_place(rest, half)}: {half.group()} without the other half of the marker")
    return "".join([*pieces, text[position:]])


def _place(text: str, found: re.Match) -> str:
    line = text.count("\n", 0, found.start()) + 1
    return f"{README}:{line}"


def _body(found: re.Match, text: str, root: Path) -> str:
    """What is to stand in one marker."""
    kind, arguments, old = found.groups()
    if HALF.search(old):
        raise ValueError(f"the marker {kind!r} has no end")
    body, flows = made(kind, rows_of(arguments, root)), kind not in (*TABLES, *PICTURES)
    before = text[text.rfind("\n", 0, found.start()) + 1 : found.start()]
    after = text[found.end() :].partition("\n")[0]
    if flows and not LINE_START.fullmatch(before):
        return body
    if before or after or "\n" not in old:
        hint = ", or a word before them" if flows else ""
        raise ValueError(f"the marker {kind!r} and its end need lines of their own{hint}")
    if flows:
        body = textwrap.fill(body.removesuffix(".") + ".", WIDTH, break_long_words=False, break_on_hyphens=False)
    return f"\n{body}\n"


def made(kind: str, rows: Sequence[Row]) -> str:
    """The text of that kind."""
    if kind in PICTURES:
        picture = PICTURES[kind]
        return f"![{picture.say(picture.of(rows))}]({RESULTS}/{picture.file})"
    make = TABLES.get(kind) or SENTENCES.get(kind)
    if make:
        return make(rows)
    if all(kind not in row for row in rows):
        kinds = ", ".join([*TABLES, *PICTURES, *SENTENCES])
        raise ValueError(f"{kind!r} is none of {kinds}, and no field of {rows[0]['file']}")
    return tables.span(kind, rows)


def rows_of(arguments: str, root: Path) -> list[Row]:
    """The rows of a marker's files that its filters leave, in their order."""
    rows = [row for path in files_of(arguments, root) for row in tables.read_file(path)]
    if not rows:
        raise ValueError(f"no file of {arguments!r} has a row")
    for condition in (word for word in arguments.split() if "=" in word):
        rows = [row for row in rows if _passes(row, condition)]
        if not rows:
            raise ValueError(f"no row is left by {condition}")
    return rows


def files_of(arguments: str, root: Path) -> list[Path]:
    """The files that a marker names, each once."""
    found: list[Path] = []
    for name in (word for word in arguments.split() if "=" not in word):
        own = sorted((root / RESULTS).glob(name))
        if not own:
            raise ValueError(f"there is no file {name} in {RESULTS}")
        found += own
    return list(dict.fromkeys(found))


def _passes(row: Row, condition: str) -> bool:
    """Of `field=pattern,pattern` or `field!=pattern,pattern`."""
    field, _, patterns = condition.partition("=")
    name = field.removesuffix("!")
    if name not in row:
        raise ValueError(f"{row['file']} has no field {name!r}")
    like = any(fnmatch.fnmatchcase(str(row[name]), pattern) for pattern in patterns.split(","))
    return like != field.endswith("!")


# --- what else belongs to it ------------------------------------------------------------------------------------------


def pictures(text: str, root: Path = ROOT) -> Iterator[tuple[str, Path, list[Any]]]:
    """Kind, file and what is drawn of each picture that is missing or shows other numbers."""
    for kind, arguments, _ in MARKER.findall(text):
        if kind in PICTURES:
            path = root / RESULTS / PICTURES[kind].file
            rows = PICTURES[kind].of(rows_of(arguments, root))
            if not path.exists() or predictions.digest(rows).encode() not in path.read_bytes():
                yield kind, path, rows


def unused(text: str, root: Path = ROOT) -> list[str]:
    """Results files that no marker takes and the text does not name; not a user's own, which git does not have."""
    taken = {path for _, arguments, _ in MARKER.findall(text) for path in files_of(arguments, root)}
    git = ("git", "-C", str(root), "ls-files", "--others", "-z", RESULTS)
    others = subprocess.run(git, capture_output=True, text=True).stdout.split("\0") if shutil.which("git") else []
    every = sorted(set((root / RESULTS).glob("*.json")) - {root / name for name in others})
    return [path.name for path in every if path not in taken and path.name not in text]


# --- the command ------------------------------------------------------------------------------------------------------


def main(given: flags.FlagValues) -> None:
    """Unpacks the flags."""
    old = (ROOT / README).read_text(encoding="utf-8")
    new = filled(old, ROOT)
    different, stale = old != new, list(pictures(new, ROOT))
    for name in (forgotten := unused(new, ROOT)):
        print(f"{RESULTS}/{name}: {README} neither uses nor names it")
    if given.check:
        for line in difflib.unified_diff(old.splitlines(), new.splitlines(), README, RESULTS, lineterm=""):
            print(line)
        for picture in stale:
            print(f"{picture[1].relative_to(ROOT)}: not drawn from these results")
        sys.exit(1 if different or stale or forgotten else 0)
    if different:
        write_text(ROOT / README, new)
    print(f"{README}: {'written' if different else 'as the results say'}")
    for kind, path, rows in stale:
        PICTURES[kind].draw(rows, path)
        print(f"{path.relative_to(ROOT)}: drawn")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # where predictions are made: no other device is started for them
    script.run(main, define_flags)
