"""Continues a file of prompts: batches of similar length, records in the order of the file, going on after a kill.

    run(Path("prompts.jsonl"), Path("out.jsonl"), Settings(max_new_tokens=100), "pydoc", Source())

The input is read twice: surveyed, whereupon plans are made for a few shapes, and decoded in stretches. The prompts of a
stretch are sorted by length and cut into batches; what is done early waits (`output`). A stretch bounds memory, and a
kill loses the batch that is decoded.

A record depends on its line, on that line's place among the lines, which keys the sampling, on model and settings, and,
as far as numbers are rounded, on the batch and its plan. Plans are kept beside the output and batches follow from the
input, so on one machine a job that was killed ends with the bytes of one that was not. On a GPU, XLA chooses kernels by
timing them, anew in every process, unless JAX_COMPILATION_CACHE_DIR keeps what it compiled.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments.support.job.batches import batches, largest_plan, padded_lengths, plan_document, plan_from
from experiments.support.job.decoding import Decoding, error_record, report
from experiments.support.job.meter import Meter
from experiments.support.job.output import Output
from experiments.support.job.reader import Line, Reader, file_hash, survey
from experiments.support.script import window_bytes
from experiments.support.source import Source

import jax
from rich.console import Console

import kvrecomp
from kvrecomp.drafts import as_drafting
from kvrecomp.plan import AUTO, Loss, Memory, Plan
from kvrecomp.plan.footprint import check_within
from kvrecomp.run.limits import limits
from kvrecomp.run.sampling import Sampling

BATCH = 32  # rows at once, at most, unless a flag says otherwise
SHAPES = 6  # at most
BATCHES_PER_SHAPE = 4  # at least, on average, or compiling takes longer than padding would
STRETCH = 64  # batches that are sorted together: one of them is not full, and some are of two shapes


@dataclass(frozen=True)
class Settings:
    """What records depend on beside the input and the model; named as the flags are."""

    max_new_tokens: int
    batch: int = BATCH
    plan: str = AUTO
    loss: Loss = "none"
    tail: int | None = None
    window_mib: float | None = None
    device_memory_gib: float | None = None
    host_memory_gib: float | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False
    drafts: int | None = None
    prompt_lookup_num_tokens: int | None = None

    @property
    def sampling(self) -> Sampling:
        """Raises ValueError where a value is out of range."""
        return Sampling(self.do_sample, self.temperature, self.top_k, self.top_p, self.seed)

    @property
    def window(self) -> int | None:
        """Bytes. Raises ValueError where it is no size."""
        return window_bytes(self.window_mib)


@dataclass(frozen=True)
class Summary:
    """What a run did: of `records`, `errors` among them, `earlier` were written before it began; it decoded `prompts`.

    `shapes` are [batch, prompt length] of the plans; `tokens` and `seconds` are this run's, compiling included.
    """

    output: str
    records: int
    errors: int
    earlier: int
    shapes: list[list[int]]
    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.earlier == self.records and not self.prompts:
            return f"{self.output} is complete: {self._counted()}; nothing was left to do"
        shapes = ", ".join(f"{batch} x {prompt}" for batch, prompt in self.shapes)
        before = f", {self.earlier} of them written earlier" if self.earlier else ""
        speed = self.tokens / max(self.seconds, 1e-9)
        return (
            f"{self.output}: {self._counted()}{before}\n{self.prompts} prompts decoded in {self.seconds:.1f} s: "
            f"{self.tokens} tokens, {speed:.0f} a second; rows x prompt length: {shapes}"
        )

    def _counted(self) -> str:
        return f"{self.records} records, {self.errors} of them errors" if self.errors else f"{self.records} records"


def run(
    source: Path,
    target: Path,
    settings: Settings,
    model_hash: str,
    model_source: Source,
    *,
    any_text: bool = False,
    budget: kvrecomp.Budget | None = None,
) -> Summary:
    """Continues the prompts of `source` into `target`, or goes on with it.

    `model_hash` says which model `model_source` is, whose weights are read only where something is left to do.
    `budget` is what `settings` say of memory, completed. `any_text` is for random weights; see `Reader`.

    Raises:
        ValueError: the output is not this job's, or two lines have the same id.
        PlanError: not even one row of the longest prompts fits in the budget.
        OSError: a file cannot be read or written.
    """
    kvrecomp.Workload(settings.batch, 1, settings.max_new_tokens)  # raises where these are none
    sampling, state = settings.sampling, _state(source)
    given = {"input": file_hash(source), "model": model_hash, "dtype": model_source.read_dtype}
    given |= dataclasses.asdict(settings)
    with Output(target) as output:
        known = output.description
        if known is not None:
            check_same(target, known, given)
            if output.written == known["records"]:
                return _summary(output, known, output.written)
            warn_of_another_machine(target, known)
        shape, text = model_source.describe()
        reader = Reader(source, shape, text, settings.max_new_tokens, any_text, settings.chat)
        if known is None:
            known = describe(reader, settings, given, budget)
            output.begin(known)
        else:
            _check_last(output, reader, known)
        plans = [plan_from(plan, shape) for plan in known["plans"]]
        model = model_source.load(plans[0] if plans else None)
        already, earlier = output.written, output.written + len(output.waiting)
        with Meter(known["records"], settings.max_new_tokens, earlier) as meter:
            decoding = Decoding(model, text, sampling, meter, budget)
            for stretch in _stretches(reader, output.written, known["stretch"]):
                if _state(source) != state:
                    raise _changed(source)
                _continue_stretch(stretch, plans, output, decoding)
        summary = _summary(output, known, already)
        return dataclasses.replace(summary, prompts=meter.prompts, tokens=meter.tokens, seconds=meter.seconds)


def _state(source: Path) -> tuple[int, int]:
    """What changes when somebody writes into a file."""
    stat = source.stat()
    return stat.st_size, stat.st_mtime_ns


def _changed(source: Path) -> ValueError:
    return ValueError(f"{source} was changed since it was begun with: put back what it was")


# --- the description --------------------------------------------------------------------------------------------------


def describe(
    reader: Reader, settings: Settings, given: dict[str, Any], budget: kvrecomp.Budget | None
) -> dict[str, Any]:
    """Surveys the input and makes the plans: all that a restart must not decide again.

    Raises ValueError where the input is not the one that was `given`.
    """
    shape, new = reader.shape, settings.max_new_tokens
    kvrecomp.named_plan("device", shape, kvrecomp.Workload(1, 1, new))  # raises where no prompt has the positions
    with Console(stderr=True).status(f"reading {reader.path}"):
        found = survey(reader, report)
    if found.sha256 != given["input"]:
        raise _changed(reader.path)
    prompts = found.lengths.total()
    most = min(settings.batch, prompts)

    allowed = limits(budget or kvrecomp.Budget())  # no weights are there yet
    options = {"budget": kvrecomp.Budget(**allowed), "groups": None, "tail": settings.tail, "window": settings.window}
    drafting = as_drafting(settings.prompt_lookup_num_tokens, None, None, settings.drafts)
    plans: list[Plan] = []
    weights: list[Memory] | None = None  # where the first plan has them, the others have them too

    def make(length: int, batch: int) -> Plan:
        workload = kvrecomp.Workload(batch, length, new)
        plan = kvrecomp.plan_for(
            settings.plan, shape, workload, weights=weights, drafting=drafting, loss=settings.loss, **options
        )
        check_within(plan, allowed)
        return plan

    shapes = max(1, min(SHAPES, prompts // (BATCHES_PER_SHAPE * max(1, most))))
    for length in reversed(padded_lengths(found.lengths, shapes)):  # the longest needs the most room
        plans.append(largest_plan(partial(make, length), most))
        weights = [layer.weights for layer in plans[0].layers]
    return {
        "settings": given,
        "machine": machine(),
        "records": found.records,
        "stretch": STRETCH * max(1, most),
        "plans": [plan_document(plan) for plan in reversed(plans)],
    }


def machine() -> dict[str, str]:
    """What numbers are rounded by."""
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def check_same(target: Path, known: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises ValueError where the output was begun with other settings."""
    began = known["settings"]
    differing = [name for name in given if began.get(name) != given[name]]
    if differing:
        said = [
            f"another {name}" if name in ("input", "model") else f"{name} {began.get(name)}, not {given[name]}"
            for name in differing
        ]
        raise ValueError(f"{target} was begun with {', '.join(said)}: give what it was begun with, or another --output")


def warn_of_another_machine(target: Path, known: dict[str, Any]) -> None:
    """Says so on standard error: the rest is worth having, but not what it would have been."""
    if known["machine"] != machine():
        print(
            f"warning: {target} was begun on {known['machine']}, this is {machine()}: what is left may be rounded, and "
            "so continued, differently",
            file=sys.stderr,
        )


def _check_last(output: Output, reader: Reader, known: dict[str, Any]) -> None:
    """Raises ValueError unless the last record written is the one of its line."""
    if output.written:
        line = next(reader.lines(skip=output.written - 1), None)
        if output.written > known["records"] or line is None or output.last.get("id") != line.id:
            raise ValueError(f"{output.path} was changed: its record {output.written} is not the one of its line")
    if max(output.waiting, default=0) >= known["records"]:
        raise ValueError(f"{output.waiting_path} was changed: the input has no line {max(output.waiting)}")


def _summary(output: Output, known: dict[str, Any], already: int) -> Summary:
    """Of an output in which `already` so many records were written before this run."""
    shapes = [[plan["groups"] * plan["workload"]["batch"], plan["workload"]["prompt"]] for plan in known["plans"]]
    return Summary(str(output.path), known["records"], output.errors, already, shapes)


# --- stretches --------------------------------------------------------------------------------------------------------


def _stretches(reader: Reader, written: int, size: int) -> Iterator[list[Line]]:
    """The lines of each stretch of which not all is written; the same stretches whatever is."""
    lines = reader.lines(skip=written - written % size)
    while stretch := list(itertools.islice(lines, size)):
        yield stretch


def _continue_stretch(stretch: Sequence[Line], plans: Sequence[Plan], output: Output, decoding: Decoding) -> None:
    """Decodes the batches of a stretch that are not done, and writes its records.

    Raises ValueError where one that waits is not of its line.
    """
    for line in stretch:
        record = output.waiting.get(line.index)
        if record is not None and (record.get("id") != line.id or "finish_reason" not in record):
            raise ValueError(f"{output.waiting_path} was changed: its record {line.index} is not the one of its line")
    wrong = {line.index: error_record(line, line.error) for line in stretch if line.error}
    output.add({index: record for index, record in wrong.items() if not output.has(index)})
    good = [line for line in stretch if not line.error]
    for plan, members in batches([len(line.ids) for line in good], plans):
        lines = [good[member] for member in members]
        left = {line.index for line in lines if not output.has(line.index)}
        decoding.meter.done(output.written + len(output.waiting))
        if left:
            # All of them, even where a kill left a part: what a row is rounded to depends on its batch.
            records = zip(lines, decoding.records(plan, lines), strict=True)
            output.add({line.index: record for line, record in records if line.index in left})
    output.settle()
