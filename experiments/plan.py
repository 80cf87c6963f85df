"""What if: the plan for a model, a workload and a machine, what it is predicted to take, and what others would take.

    python experiments/plan.py --model=opt-6.7b --batch=32 --prompt=1024 --new=32
    python experiments/plan.py --hardware=a100 --device_memory_gib=20 --plot=split.png
    python experiments/plan.py --hardware=h200 --plot=split.png --measured=experiments/results/h200_suite.json --new=32

Without --hardware the machine at hand is measured; with it, a machine's data sheet is taken and no device is needed.
Nothing is generated and no weights are made. From a notebook:

    found = what_if(models.preset("opt-6.7b").shape, Workload(32, 1024, 32), HardwareProfile.from_datasheet("a100"))
    show(found)
    split_plot.draw(found, "split.png")

with `what_if` and `split_plot` of `experiments.support`.
"""

import dataclasses
import difflib
import functools
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

import models
from experiments.support import script
from experiments.support.plots import figure as plots
from experiments.support.plots import split as split_plot
from experiments.support.results import tables
from experiments.support.results.report import run_info
from experiments.support.what_if import FRACTIONS, Measured, WhatIf, measured_as, what_if
from kvrecomp.plan import GIB, MEMORIES, Budget, PlanError, Workload, format_bytes
from kvrecomp.predict.datasheets import DATASHEETS
from kvrecomp.predict.hardware import LARGEST_DEVICE, LEAST_DEVICE, HardwareProfile
from kvrecomp.run.limits import limits

THIS = "this"
WIDTH = 120  # of what is printed into a file or a pipe


def define_flags(into: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the script only: notebooks and tests import without them."""
    defining = (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_bool)
    string, integer, number, boolean = (functools.partial(define, flag_values=into) for define in defining)
    string("model", "opt-6.7b", "Preset: a model by its published sizes.")
    integer("batch", 32, "Rows decoded together, in a group.", lower_bound=1)
    integer("prompt", 1024, "Tokens in each prompt.", lower_bound=1)
    integer("new", 32, "New tokens per row.", lower_bound=1)
    integer("groups", 1, "Groups of so many rows each.", lower_bound=1)
    string("dtype", "bfloat16", "Of weights and cache.")
    string("hardware", THIS, f"The machine: {THIS}, which is measured, or a data sheet: {', '.join(DATASHEETS)}.")
    number(
        "device_memory_gib", None, "Device memory to use, weights included; default: what is free, or the data sheet's."
    )
    number("host_memory_gib", None, "Pinned host memory to use; default: what is free, or as much as is asked for.")
    number("window_mib", None, "Bytes in flight or in use, in MiB, of the plans by name; default: as the chosen plan.")
    string("plot", None, "Write a PNG: predicted step time against the split.")
    string("measured", None, "Results of experiments/benchmark.py, to show those of the same workload beside.")
    boolean("json", False, "Print a JSON document as the last line of standard output.")


# --- what is asked for ------------------------------------------------------------------------------------------------


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


def read_budget(device_gib: float | None, host_gib: float | None) -> Budget:
    """The budget from flags. Raises `PlanError` for what is no size, or not one in GiB."""
    for flag, size in (("device_memory_gib", device_gib), ("host_memory_gib", host_gib)):
        if size is not None and not (math.isfinite(size) and size >= 0):
            raise PlanError(f"--{flag} is {size:g}; it must be a size in GiB")
    if device_gib is not None and not LEAST_DEVICE <= device_gib * GIB <= LARGEST_DEVICE:
        than = "more" if device_gib > 1 else "less"
        raise PlanError(f"--device_memory_gib is {device_gib:g}, {than} than any device has: it is in GiB")
    return Budget.of_gib(device_gib, host_gib)


# --- what is printed --------------------------------------------------------------------------------------------------


def show(found: WhatIf, measured: Measured | None = None, console: Console | None = None) -> None:
    """Prints the plan with its reason, the alternatives, and the split of KVPR's own formula."""
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(f"{found.profile.device}: {_budget_text(found.budget)}")
    if found.profile.source:
        say(found.profile.source)
    console.print(found.chosen.plan.table())
    console.print(table(found, measured))
    prompt = found.chosen.plan.workload.prompt
    say(
        f"KVPR's own formula, attention alone: best at {found.kvpr_tokens} of {prompt} tokens recomputed "
        f"({found.kvpr_tokens / prompt:.3f}), {1e3 * found.kvpr_seconds:.2f} ms"
    )
    if measured is not None:
        count = len(measured.points)
        own = f"{count} row{'' if count == 1 else 's'}" if count else "no row"
        say(f"{measured.file}: {own} of this model, workload and placement of weights, measured on {measured.device}")


def _budget_text(budget: Budget) -> str:
    host = "any amount" if budget.host == math.inf else format_bytes(budget.host or 0)
    return f"{format_bytes(budget.device or 0)} of device memory and {host} of host memory may be used"


def table(found: WhatIf, measured: Measured | None = None) -> Table:
    """The alternatives for a terminal."""
    out = Table(title="Alternatives, predicted", box=box.SIMPLE, title_justify="left")
    out.add_column("plan", no_wrap=True)
    headings = ["ms a step", "tokens/s", "GB over\nthe link", "GiB on\nthe device", "GiB on\nthe host"]
    for heading in [*headings, *(["measured\nms"] if measured else [])]:
        out.add_column(heading, justify="right")
    out.add_column("fits")
    for each in found.alternatives:
        cells = [
            f"{each.plan.name} (chosen)" if each is found.chosen else each.plan.name,
            f"{1e3 * each.seconds:.2f}",
            f"{each.tokens_per_second:.1f}",
            f"{each.link_bytes / 1e9:.2f}",
            *(f"{each.needed[place] / GIB:.2f}" for place in MEMORIES),
        ]
        if measured is not None:
            time = measured.of(each.plan.name)
            cells.append("-" if time is None else f"{time:.2f}")
        style = "bold" if each is found.chosen else "dim" if each.misfit else None
        out.add_row(*cells, f"no: {each.misfit}" if each.misfit else "yes", style=style)
    return out


def document(found: WhatIf, measured: Measured | None = None) -> dict[str, Any]:
    """All of it as plain data; what is not limited is None."""
    plan = found.chosen.plan
    result = run_info() | {
        "model": plan.shape.name,
        "dtype": plan.shape.dtype,
        **dataclasses.asdict(plan.workload),
        "groups": plan.groups,
        "order": plan.order,
        "hardware": found.profile.device,
        "source": found.profile.source,
        "budget": {
            place: None if size == math.inf else size for place, size in dataclasses.asdict(found.budget).items()
        },
        "plan": {
            "name": plan.name,
            "schedule": plan.schedule,
            "tail": plan.tail,
            "window": plan.window,
            "reason": plan.reason,
            "layers": [dataclasses.asdict(layer) for layer in plan.layers],
        },
        "alternatives": [
            {
                "plan": each.plan.name,
                "schedule": each.plan.schedule,
                "predicted_ms": 1e3 * each.seconds,
                "tokens_per_second": each.tokens_per_second,
                "link_bytes": each.link_bytes,
                **{f"{place}_bytes": each.needed[place] for place in MEMORIES},
                "fits": not each.misfit,
                "misfit": each.misfit,
                "measured_ms": measured.of(each.plan.name) if measured else None,
            }
            for each in found.alternatives
        ],
        "kvpr_formula": {"recomputed": found.kvpr_tokens, "ms": 1e3 * found.kvpr_seconds},
        "fractions": FRACTIONS,
        "curves_ms": {name: [1e3 * seconds for seconds in curve] for name, curve in found.curves.items()},
    }
    points = [] if measured is None else [{"plan": name, "median_ms": own} for name, own in measured.points]
    return result | {"measured": points, "measured_on": measured.device if measured else None}


# --- the command ------------------------------------------------------------------------------------------------------


def main(_: Sequence[str], given: flags.FlagValues = flags.FLAGS) -> None:
    """Unpacks the flags."""
    if given.plot is not None:
        plots.check_path(given.plot)
    shape = dataclasses.replace(models.preset(given.model).shape, dtype=given.dtype)
    workload = Workload(given.batch, given.prompt, given.new)
    budget, window = read_budget(given.device_memory_gib, given.host_memory_gib), script.window_bytes(given.window_mib)
    rows = None if given.measured is None else tables.read_file(given.measured)
    profile = read_hardware(given.hardware)
    if given.hardware == THIS:
        budget = Budget(**limits(budget))  # what is free, as no weights are there
    found = what_if(shape, workload, profile, budget, groups=given.groups, window=window)
    measured = None if rows is None else measured_as(found.chosen.plan, rows, given.measured)
    show(found, measured)
    if given.plot is not None:
        split_plot.draw(found, given.plot, measured)
        print(f"drawn to {given.plot}")
    if given.json:
        print(json.dumps(document(found, measured)))


if __name__ == "__main__":
    define_flags()
    script.run(main)
