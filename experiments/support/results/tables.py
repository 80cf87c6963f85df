"""Results as Markdown: tables, sentences and single numbers from the JSON that measurements left.

rows = read_file("experiments/results/h200_suite.json")
print(benchmark(rows))
print(span("median_ms", rows))    # 9.7 to 309.9 ms
"""

import dataclasses
import fnmatch
import functools
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.support.results import predictions
from experiments.support.results.predictions import Measured
from experiments.support.suite import row as results_row

from kvrecomp.files import check_writable

Row = dict[str, Any]  # a row of a results file, with what the file says of all its rows, and `file` and `off`
Column = tuple[str, Callable[[Any], str]]  # a heading, and a row's cell

# Where a file does not say it.
ABOUT: Row = dict.fromkeys(("device", "driver", "jax", "commit", "command"), "unknown")
# Of what rows have, of any script, but for the list of steps.
FIELDS = (*dataclasses.fields(Measured), *dataclasses.fields(results_row.Row))
TYPES: dict[str, Any] = dict.fromkeys(ABOUT, str) | {of.name: of.type for of in FIELDS if of.name != "step_ms"}

NOTES = {  # what the name of a plan does not say
    "device": "all on the GPU",
    "kvpr:*": "KVPR's schedule",
    "huggingface": "its cache on the GPU",
    "huggingface_offloaded": "its cache in host memory",
}

OVERVIEW = {  # headings, by plan or peer
    "huggingface_offloaded": "Hugging Face, offloaded",
    "keys_values": "`keys_values`",
    "kvpr:*": "KVPR's schedule",
    "activations": "`activations`",
    "auto": "`auto` (room)",
    "huggingface": "Hugging Face, on the GPU",
    "device": "all on the GPU",
}


def read_file(path: str | os.PathLike) -> list[Row]:
    """The rows of a file of experiments/results; `off` is how far a row's prediction is off, None without one.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no results file.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        of_all = ABOUT | {key: value for key, value in document.items() if key != "rows"} | {"file": path.name}
        rows = [{"link_bytes": None} | of_all | row for row in document["rows"]]
        for row in rows:
            _check_types(row)
            if "loss" in row:  # of experiments/quality.py, which times nothing
                continue
            time, prediction = row["median_ms"], row.get("predicted_ms")
            if not (0 < time < math.inf and (prediction is None or 0 < prediction < math.inf)):
                raise ValueError(f"{time} ms measured, {prediction} ms predicted")
            row["off"] = None if prediction is None else prediction / time - 1
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} is not a results file ({type(error).__name__}: {error})") from error
    return rows


def _no_number(word: str) -> None:
    raise ValueError(f"it has {word}")


def _check_types(row: Row) -> None:
    """Raises KeyError for what all rows say and this one does not, and TypeError for a field of another type."""
    for name in ("model", "batch", "prompt", "new", "plan"):
        row[name]
    for name, expected in TYPES.items():
        value = row.get(name)
        value = float(value) if type(value) is int and expected in (float, float | None) else value
        if name in row and not isinstance(value, expected):
            raise TypeError(f"{name} is {value!r:.60}")


def check_out(path: str | os.PathLike | None, field: str) -> None:
    """Raises OSError where a file cannot be written, and ValueError where results would replace something else: before
    they are measured, and it is lost.

    What is alike has the `field` in its rows; those of other scripts do not. The suite's, which adds to its file, may
    have it, and say their workload.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise ValueError(f"--out: {path} is a folder; give the name of a file in it")
    check_writable(path)
    if not Path(path).exists():
        return
    try:
        rows = read_file(path)
    except ValueError as error:
        raise ValueError(f"--out: {error}, and would be lost; give another file") from error
    if any(field not in row for row in rows):
        raise ValueError(f"--out: {path} has other results, without {field}, that would be lost; give another file")
    if any("workload" in row for row in rows):
        raise ValueError(f"--out: {path} has a suite's results, that would be lost; give another file")


# --- words and numbers ------------------------------------------------------------------------------------------------


def span(field: str, rows: Sequence[Row]) -> str:
    """A field's value in all rows, or from the least to the greatest; of words, each that there is.

    Raises:
        ValueError: no row has a value.
    """
    values = [row[field] for row in rows if row.get(field) is not None]
    if not values:
        raise ValueError(f"no row of {listed({row['file'] for row in rows})} says {field}")
    if any(isinstance(value, str) for value in values):
        return listed(dict.fromkeys(word(field, value) for value in values))
    return predictions.ends(values, functools.partial(amount, field))


def word(field: str, value: Any) -> str:
    """As it is written in text: plans and commits as code, of a hash the first 7 digits."""
    if field == "commit":
        value = value[:7] if re.fullmatch(r"[0-9a-f]{8,40}", value) else value
    return f"`{value}`" if field in ("plan", "commit", "file") else str(value)


def amount(field: str, value: float) -> tuple[str, str]:
    """A number of a field as it is written in text, and its unit."""
    if field == "off":
        return predictions.percent(value)
    if field == "loss":
        return f"{100 * value:.1f}", "%"
    if field.endswith("_ms") or field.endswith("ms_per_token"):
        return (f"{value:.1f}", "ms") if value < 1e4 else (f"{value / 1e3:.1f}", "s")
    if field.endswith("_s"):
        return (f"{value:.2f}" if value < 1 else f"{value:.1f}"), "s"
    for ending, unit, scale in (("_bytes", "GB", 1e9), ("_gbps", "GB/s", 1), ("_second", "", 1)):
        if field.endswith(ending):
            return f"{value / scale:.1f}", unit
    return f"{value:.3f}" if isinstance(value, float) else str(value), ""


def listed(words: Iterable[str]) -> str:
    """a, b and c"""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def machine(rows: Sequence[Row]) -> str:
    """What the rows were measured on, and by which scripts at which commits; the rate of copies where it is known."""
    text = f"{span('device', rows)}, driver {span('driver', rows)}, jax {span('jax', rows)}."
    if any(row.get("copy_gbps") for row in rows):
        text += f" Copies of whole blocks alone ran at {span('copy_gbps', rows)}."
    commits: dict[str, dict[str, dict[str, None]]] = {}  # of each script its files, and of each file its commits
    for row in rows:
        files = commits.setdefault(script(row["command"]), {})
        files.setdefault(word("file", row["file"]), {})[word("commit", row["commit"])] = None
    made = []
    for name, files in commits.items():
        sources = [f"{file} at {listed(of_file)}" for file, of_file in files.items()]
        made.append(f"`{name}` ({'; '.join(sources)})")
    return f"{text} Measured by {listed(made)}."


def script(command: str) -> str:
    """The program that a command runs."""
    words = shlex.split(command)
    return next((argument for argument in words if argument.endswith(".py")), command)


def predicted(rows: Sequence[Row]) -> list[predictions.Measured]:
    """The rows that have a prediction; those of experiments/benchmark.py know of no room."""
    fields = [field.name for field in dataclasses.fields(predictions.Measured)]
    full: list[Row] = [{"room": None} | row for row in rows if row["off"] is not None]
    return [predictions.Measured(**{name: row[name] for name in fields if name in row}) for row in full]


# --- tables -----------------------------------------------------------------------------------------------------------


def benchmark(rows: Sequence[Row]) -> str:
    """Rows of experiments/benchmark.py by workload, the slowest first.

    Where several rows of a workload send something, the fastest of them is bold. A row of somebody else's program,
    whose bytes are not known, counts among them.
    """
    workloads: dict[Any, list[Row]] = {}
    for row in rows:
        workloads.setdefault(_workload(row), []).append(row)
    ordered, best = [], set()
    for of_workload in workloads.values():
        of_workload.sort(key=lambda row: -row["median_ms"])
        ordered += of_workload
        sending = [row for row in of_workload if row["link_bytes"] != 0]
        best |= {id(row) for row in sending[-1:] if len(sending) > 1}
    return table(
        ordered,
        ("model", lambda row: predictions.title(row["model"])),
        ("batch", lambda row: str(row["batch"])),
        ("prompt", lambda row: str(row["prompt"])),
        *_unusual(ordered),
        ("plan", _plan),
        ("ms a step", lambda row: f"**{row['median_ms']:.1f}**" if id(row) in best else f"{row['median_ms']:.1f}"),
        ("GB over the link", lambda row: f"{row['link_bytes'] / 1e9:.2f}" if row["link_bytes"] else "-"),
        ("efficiency", lambda row: f"{row['link_efficiency']:.3f}" if row["link_efficiency"] else "-"),
    )


def overview(rows: Sequence[Row]) -> str:
    """A row for each workload of one group, its plans beside each other, in ms a step; of auto with its room."""
    workloads: dict[Any, dict[str, str]] = {}
    for row in rows:
        workload = predictions.title(row["model"]), f"{row['batch']} x {row['prompt']}"
        heading = next(heading for plan, heading in OVERVIEW.items() if fnmatch.fnmatchcase(row["plan"], plan))
        room = "" if row.get("room") is None else f" ({row['room']:g} %)"
        workloads.setdefault(workload, {})[heading] = f"{row['median_ms']:.1f}{room}"
    return table(
        list(workloads.items()),
        ("model", lambda item: item[0][0]),
        ("rows x prompt", lambda item: item[0][1]),
        *((heading, lambda item, heading=heading: item[1].get(heading, "-")) for heading in OVERVIEW.values()),
    )


def _workload(row: Row) -> tuple[Any, ...]:
    """What must be the same in rows whose times are compared."""
    sizes = [row[field] for field in ("model", "batch", "prompt", "new")]
    return (*sizes, row.get("weights") or "device", row.get("groups") or 1, row.get("room"))  # None: of other programs


def sweep(rows: Sequence[Row]) -> str:
    """Rows of experiments/sweep.py, in their order."""
    return table(
        rows,
        ("model", lambda row: predictions.title(row["model"])),
        ("batch", lambda row: str(row["batch"])),
        ("cached", lambda row: str(row["prompt"])),
        *_unusual(rows),
        ("plan", _plan),
        ("ms a step", lambda row: f"{row['median_ms']:.1f}"),
        ("predicted", lambda row: "-" if row["off"] is None else f"{row['predicted_ms']:.1f}"),
    )


def rounds(rows: Sequence[Row]) -> str:
    """Rows of experiments/benchmark.py with drafts, and others to compare with, in their order."""

    def of_rounds(row: Row, field: str, form: str) -> str:
        return "-" if row.get(field) is None else form.format(row[field])

    def drafted(row: Row) -> str:
        under_copies = row["drafter"] in ("fp8", "int4") and row["groups"] > 1 and row["order"] == "row"
        return f"{row['drafts']}, {row['drafter'].replace('_', ' ')}{', under copies' * under_copies}"

    def per_token(row: Row) -> str:
        return f"{row['ms_per_token'] if row.get('drafts') else row['median_ms']:.1f}"

    def predicted_per_token(row: Row) -> str:
        time = row.get("predicted_ms_per_token") if row.get("drafts") else row.get("predicted_ms")
        return "-" if time is None else f"{time:.1f}"

    return table(
        rows,
        ("model", lambda row: predictions.title(row["model"])),
        ("rows x prompt", lambda row: f"{row['batch'] * (row['groups'] or 1)} x {row['prompt']}"),
        ("plan", _plan),
        ("drafts", lambda row: drafted(row) if row.get("drafts") else "-"),
        ("acceptance", lambda row: of_rounds(row, "acceptance", "{:g}")),
        ("ms a pass with its drafts", lambda row: f"{row['median_ms']:.1f}"),
        ("tokens a pass", lambda row: of_rounds(row, "tokens_per_pass", "{:.2f}")),
        ("ms a token", per_token),
        ("predicted", predicted_per_token),
    )


def drafts(rows: Sequence[Row]) -> str:
    """Rows of experiments/acceptance.py by model and sizes: tokens a pass of each kind of text, and the acceptance."""
    kinds = dict.fromkeys(text["kind"] for row in rows for text in row["texts"])
    return table(
        sorted(rows, key=lambda row: (row["model"], row["prompt"], row["temperature"])),
        ("model", lambda row: predictions.title(row["model"])),
        ("prompt", lambda row: str(row["prompt"])),
        ("temperature", lambda row: f"{row['temperature']:g}"),
        ("drafts by", lambda row: row["drafter"]),
        *((kind, functools.partial(_drafted, kind)) for kind in kinds),
    )


def _drafted(kind: str, row: Row) -> str:
    """Of the text of that kind."""
    text = next((text for text in row["texts"] if text["kind"] == kind), None)
    if text is None:
        return "-"
    share = f" ({text['right'] / text['tried']:.2f})" if text["tried"] else ""
    return f"{text['tokens_per_pass']:.1f}{share}"


def losses(rows: Sequence[Row]) -> str:
    """Rows of experiments/quality.py: what is lost by each plan, by model and sizes."""
    return table(
        rows,
        ("model", lambda row: predictions.title(row["model"])),
        ("tokens", lambda row: f"{row['prompt']} + {row['new']}"),
        ("plan", lambda row: noted(f"`{row['plan']}`")),
        ("bytes, of plain K and V", lambda row: f"{row['bytes_of_plain']:.3f}"),
        ("bits a token", lambda row: f"{row['bits']:.4f}"),
        ("without loss", lambda row: f"{row['bits_exact']:.4f}"),
        ("loss", lambda row: f"{row['loss']:+.3%}"),
        ("divergence", lambda row: f"{row['divergence']:.5f}"),
        ("chosen alike", lambda row: f"{row['agreement']:.1%}"),
    )


def _plan(row: Row) -> str:
    name = noted(row["plan"], word("plan", row["plan"])) + (" (chosen)" if row.get("chosen") else "")
    return name.replace("the GPU", "the CPU") if row.get("device") == "cpu" else name


def noted(plan: str, written: str = "") -> str:
    """A plan's or a peer's name, or what is written for it, and what it does not say."""
    notes = [note for pattern, note in NOTES.items() if fnmatch.fnmatchcase(plan, pattern)]
    return (written or plan) + "".join(f" ({note})" for note in notes)


def _unusual(rows: Sequence[Row]) -> list[Column]:
    """Columns of what is not as usual in any row, or not the same in all."""
    usual = {"new": rows[0].get("new"), "weights": "device", "groups": 1, "order": "row", "room": None}
    shown = [field for field in usual if any(row.get(field) not in (None, usual[field]) for row in rows)]
    return [("room %" if field == "room" else field, functools.partial(_plain, field)) for field in shown]


def _plain(field: str, row: Row) -> str:
    value = row.get(field)
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Any], *columns: Column) -> str:
    """In Markdown, as GitHub has it."""
    lines = [[heading for heading, _ in columns], *([cell(row) for _, cell in columns] for row in rows)]
    heading, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([heading, "|" + "---|" * len(columns), *body])
