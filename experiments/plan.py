"""What if: the plan for a model, a workload and a machine, what it is predicted to take, and what others would take.

    python experiments/plan.py --model=opt-6.7b --batch=32 --prompt=1024 --new=32
    python experiments/plan.py --hardware=a100 --device_memory_gib=20 --plot=split.png
    python experiments/plan.py --hardware=h200 --plot=split.png --measured=experiments/results/h200_suite.json --new=32

Without --hardware the machine at hand is measured; with it, a machine's data sheet is taken and no device is needed.
Nothing is generated and no weights are made. From a notebook:

    found = what_if(models.preset("opt-6.7b").shape, Workload(32, 1024, 32), HardwareProfile.from_datasheet("a100"))
    show(found)
    draw_split(found, "split.png")

with `what_if` and `plots.split` of `experiments.support`.
"""

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

from experiments.support import script
from experiments.support.plots import png
from experiments.support.plots.split import draw_split
from experiments.support.results import tables, terminal
from experiments.support.results.report import run_info
from experiments.support.results.tables import Row
from experiments.support.what_if import FRACTIONS, Alternative, WhatIf, measured_as, median_ms, what_if

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

import models
from kvrecomp.plan import AUTO, GIB, MEMORIES, Budget, PlanError, Workload, format_bytes
from kvrecomp.predict.datasheets import DATASHEETS
from kvrecomp.predict.hardware import HardwareProfile
from kvrecomp.run.limits import limits

THIS = "this"


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.string("model", "opt-6.7b", "Preset: a model by its published sizes.")
    define.integer("batch", 32, "Rows decoded together, in a group.", lower_bound=1)
    define.integer("prompt", 1024, "Tokens in each prompt.", lower_bound=1)
    define.integer("new", 32, "New tokens per row.", lower_bound=1)
    define.integer("groups", 1, "Groups of so many rows each.", lower_bound=1)
    define.string("dtype", "bfloat16", "Of weights and cache.")
    hardware = f"The machine: {THIS}, which is measured, or a data sheet: {', '.join(DATASHEETS)}."
    define.string("hardware", THIS, hardware)
    define.device_memory("what is free, or the data sheet's")
    define.host_memory("what is free, or as much as is asked for")
    define.window("as the chosen plan; of the plans by name")
    define.boolean("drafts", False, "Weigh drafts of a sketch or of the text too, several of which a step checks.")
    define.loss()
    define.string("plot", None, "Write a PNG: predicted step time against the split.")
    define.list("measured", [], "Results files of experiments/benchmark.py, to show rows of the same workload beside.")
    define.boolean("json", False, "Print a JSON document as the last line of standard output.")


def read_hardware(name: str) -> HardwareProfile:
    """The profile of a machine by its name. Raises `PlanError`, with the names, if there is none."""
    if name == THIS:
        from kvrecomp.measure.profiler import profile  # measures; a machine by its data sheet needs none of it

        return profile()
    if name not in DATASHEETS:
        names = (THIS, *DATASHEETS)
        close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        hint = f": did you mean {close[0]!r}?" if close else ""
        raise PlanError(f"unknown hardware {name!r}; expected one of {', '.join(names)}{hint}")
    return HardwareProfile.from_datasheet(name)


def show(found: WhatIf, measured: Sequence[Row] | None = None, console: Console | None = None) -> None:
    """Prints the plan with its reason, the alternatives, and the split of KVPR's formula; `measured` rows beside."""
    console = console or terminal.standard_output()
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(f"{found.profile.device}: {_budget_text(found.budget)}")
    if found.profile.source:
        say(found.profile.source)
    terminal.show(console, found.chosen.plan.table())
    terminal.show(console, table(found, measured))
    prompt = found.chosen.plan.workload.prompt
    say(
        f"KVPR's own formula, attention alone: best at {found.kvpr_tokens} of {prompt} tokens recomputed "
        f"({found.kvpr_tokens / prompt:.3f}), {1e3 * found.kvpr_seconds:.2f} ms"
    )
    if measured is not None:
        of = "of this model, workload and placement of weights"
        device = f", measured on {measured[0]['device']}" if measured else ""
        say(f"{len(measured) or 'no'} row{'' if len(measured) == 1 else 's'} {of}{device}")


def _budget_text(budget: Budget) -> str:
    host = "any amount" if budget.host == math.inf else format_bytes(budget.host or 0)
    return f"{format_bytes(budget.device or 0)} of device memory and {host} of host memory may be used"


def table(found: WhatIf, measured: Sequence[Row] | None = None) -> Table:
    """The alternatives for a terminal."""
    out = Table(title="Alternatives, predicted", box=box.SIMPLE, title_justify="left")
    out.add_column("plan", no_wrap=True)
    headings = ["ms a token", "tokens/s", "GB over\nthe link", "GiB on\nthe device", "GiB on\nthe host"]
    for heading in [*headings, *(["measured\nms"] if measured is not None else [])]:
        out.add_column(heading, justify="right")
    out.add_column("fits")
    for alternative in found.alternatives:
        name, misfit = alternative.plan.name, alternative.misfit
        chosen = alternative is found.chosen
        cells = [
            f"{name} (chosen)" if chosen else name,
            f"{1e3 * alternative.seconds:.2f}",
            f"{alternative.tokens_per_second:.1f}",
            f"{alternative.link_bytes / 1e9:.2f}",
            *(f"{alternative.needed[memory] / GIB:.2f}" for memory in MEMORIES),
        ]
        if measured is not None:
            time = median_ms(measured, name)
            cells.append("-" if time is None else f"{time:.2f}")
        style = "bold" if chosen else "dim" if misfit else None
        out.add_row(*cells, f"no: {misfit}" if misfit else "yes", style=style)
    return out


def document(found: WhatIf, measured: Sequence[Row] = ()) -> dict[str, Any]:
    """All of it as plain data; what is not limited is None."""
    plan, budget = found.chosen.plan, dataclasses.asdict(found.budget)
    return run_info() | {
        "model": plan.shape.name,
        "dtype": plan.shape.dtype,
        **dataclasses.asdict(plan.workload),
        "groups": plan.groups,
        "order": plan.order,
        "hardware": found.profile.device,
        "source": found.profile.source,
        "budget": {memory: None if size == math.inf else size for memory, size in budget.items()},
        "plan": {
            **{name: getattr(plan, name) for name in ("name", "schedule", "tail", "window", "reason")},
            "layers": [dataclasses.asdict(layer) for layer in plan.layers],
        },
        "alternatives": [_record(alternative, measured) for alternative in found.alternatives],
        "kvpr_formula": {"recomputed": found.kvpr_tokens, "ms": 1e3 * found.kvpr_seconds},
        "fractions": FRACTIONS,
        "curves_ms": {name: [1e3 * seconds for seconds in curve] for name, curve in found.curves.items()},
        "measured": [{"plan": row["plan"], "median_ms": row["median_ms"]} for row in measured],
        "measured_on": measured[0]["device"] if measured else None,
    }


def _record(alternative: Alternative, measured: Sequence[Row]) -> dict[str, Any]:
    return {
        "plan": alternative.plan.name,
        "schedule": alternative.plan.schedule,
        "predicted_ms": 1e3 * alternative.seconds,
        "tokens_per_second": alternative.tokens_per_second,
        "link_bytes": alternative.link_bytes,
        **{f"{memory}_bytes": alternative.needed[memory] for memory in MEMORIES},
        "fits": not alternative.misfit,
        "misfit": alternative.misfit,
        "measured_ms": median_ms(measured, alternative.plan.name),
    }


def main(given: flags.FlagValues) -> None:
    if given.plot is not None:
        png.check_path(given.plot)
    shape = dataclasses.replace(models.preset(given.model).shape, dtype=given.dtype)
    workload = Workload(given.batch, given.prompt, given.new)
    budget = Budget.of_gib(given.device_memory_gib, given.host_memory_gib)
    window = script.window_bytes(given.window_mib)
    rows = [row for path in given.measured for row in tables.read_file(path)] if given.measured else None
    if given.hardware != THIS:
        script.use_no_device()
    profile = read_hardware(given.hardware)
    if given.hardware == THIS:
        budget = Budget(**limits(budget))  # what is free, as no weights are there
    drafting = AUTO if given.drafts else None
    found = what_if(
        shape, workload, profile, budget, groups=given.groups, window=window, drafting=drafting, loss=given.loss
    )
    measured = None if rows is None else measured_as(found.chosen.plan, rows)
    show(found, measured)
    if given.plot is not None:
        draw_split(found, given.plot, measured or ())
        print(f"drawn to {given.plot}")
    if given.json:
        print(json.dumps(document(found, measured or ())))


if __name__ == "__main__":
    script.run(main, define_flags)
