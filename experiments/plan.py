"""What if: the plan for a model, a workload and a machine, what it is predicted to take, and what others would take.

    python experiments/plan.py --model=opt-6.7b --batch=32 --prompt=1024 --new=32
    python experiments/plan.py --hardware=a100 --device_memory_gib=20 --plot=split.png
    python experiments/plan.py --hardware=h200 --plot=split.png --measured=experiments/results/h200_suite.json --new=32

Without --hardware the machine at hand is measured; with it, a machine's data sheet is taken and no device is needed.
Nothing is generated and no weights are made. From a notebook:

    found = what_if(models.preset("opt-6.7b").shape, Workload(32, 1024, 32), HardwareProfile.from_datasheet("a100"))
    show(found)
    draw(found, "split.png")
"""

import dataclasses
import difflib
import functools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

import models
from experiments.support import plots, script, tables
from experiments.support.report import run_info
from kvrecomp import cost, scheduler
from kvrecomp.budget import limits, memory_needed
from kvrecomp.cutting import default_tail
from kvrecomp.hardware import DATASHEETS, LARGEST_DEVICE, LEAST_DEVICE, HardwareProfile
from kvrecomp.named import named_plan, named_weights, with_weights
from kvrecomp.plan import (
    AUTO,
    GIB,
    MEMORIES,
    MIB,
    Budget,
    Memory,
    Method,
    ModelShape,
    Plan,
    PlanError,
    Workload,
    format_bytes,
)

THIS = "this"
STEPS = 80  # of the fraction: three curves and the alternatives are then 256 plans at the most, one compilation
FRACTIONS = tuple(step / STEPS for step in range(STEPS + 1))
CURVES = ("absorb", "recompute", "kvpr", "kvpr_formula")
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


@dataclass(frozen=True)
class Alternative:
    """A plan and its predicted mean step; `link_bytes` cross the link in it, `needed` is memory at the end of the
    workload.

    `misfit` says which memory of the budget is too small for the plan, and by how much; empty where the plan fits.
    """

    plan: Plan
    seconds: float
    link_bytes: int
    needed: dict[Memory, int]
    misfit: str

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.plan.rows / self.seconds


@dataclass(frozen=True)
class WhatIf:
    """What `what_if` found. `alternatives` begin with the chosen plan.

    `curves` are the predicted seconds of a step at each of `FRACTIONS`, the fraction of the prompt's tokens that are
    sent as activations: `absorb` and `recompute` in the pipelined schedule, `kvpr` in KVPR's, and `kvpr_formula`.
    `kvpr_tokens` are recomputed at the optimum of that formula.
    """

    profile: HardwareProfile
    budget: Budget
    alternatives: tuple[Alternative, ...]
    curves: dict[str, tuple[float, ...]]
    kvpr_tokens: int
    kvpr_seconds: float

    @property
    def chosen(self) -> Alternative:
        """The scheduler's plan."""
        return self.alternatives[0]


@dataclass(frozen=True)
class Measured:
    """Median milliseconds of a step by plan, of one model and workload, and the device that they were measured on."""

    device: str
    points: tuple[tuple[str, float], ...]
    file: str = ""

    def of(self, plan: str) -> float | None:
        """The plan's time, the median where it was measured more than once."""
        own = [milliseconds for name, milliseconds in self.points if name == plan]
        return statistics.median(own) if own else None


# --- the work ---------------------------------------------------------------------------------------------------------


def what_if(
    shape: ModelShape,
    workload: Workload,
    profile: HardwareProfile,
    budget: Budget | None = None,
    *,
    weights: Sequence[Memory] | None = None,
    groups: int = 1,
    window: int | None = None,
) -> WhatIf:
    """The plan that the scheduler makes for so many groups of the workload's rows, and the predicted steps of others
    with as many, and with weights where it has them; `window` in bytes is theirs. Where layers' `weights` are is chosen
    too, unless it is given.

    Raises:
        PlanError: the model has too few positions, or nothing fits in the budget; the message says what would.
    """
    named_plan("device", shape, workload)  # its one block costs nothing to make, however long a prompt is asked for
    budget = scheduler.resolve_budget(budget or Budget(), profile)
    chosen = scheduler.make_plan(shape, workload, profile, budget, weights=weights, groups=groups)
    weights = [layer.weights for layer in chosen.layers]
    window = chosen.window if window is None else window
    tail = min(chosen.tail, default_tail(shape, workload, window))

    def make(name: str) -> Plan:
        plan = with_weights(named_plan(name, shape, workload, tail=tail, window=window), weights)
        return dataclasses.replace(plan, groups=chosen.groups, order=chosen.order)

    absorb = [make(f"split:{fraction:g}") for fraction in FRACTIONS]
    curves = {
        "absorb": absorb,
        "recompute": [with_method(plan, "recompute") for plan in absorb],
        "kvpr": [make(f"kvpr:{fraction:g}") for fraction in FRACTIONS],
    }
    others = [make("keys_values"), make("activations"), make("device")]
    plans = [chosen, *others, *(plan for curve in curves.values() for plan in curve)]
    first, *rest = [float(seconds) for seconds in cost.mean_costs(profile, plans).seconds]
    named, rest = rest[: len(others)], iter(rest[len(others) :])
    seconds = {name: tuple(next(rest) for _ in curve) for name, curve in curves.items()}

    best = min(range(len(FRACTIONS)), key=seconds["kvpr"].__getitem__)
    compared = [*zip(others, named)]
    compared.insert(2, (curves["kvpr"][best], seconds["kvpr"][best]))  # everything on the device comes last

    def formula(recomputed: float) -> float:
        return groups * cost.kvpr_seconds(profile, shape, workload, recomputed)

    tokens = cost.kvpr_split(profile, shape, workload)
    return WhatIf(
        profile=profile,
        budget=budget,
        alternatives=tuple(judged(plan, each, budget) for plan, each in [(chosen, first), *compared]),
        curves=seconds | {"kvpr_formula": tuple(formula(fraction * workload.prompt) for fraction in FRACTIONS)},
        kvpr_tokens=tokens,
        kvpr_seconds=formula(tokens),
    )


def with_method(plan: Plan, method: Method) -> Plan:
    """The plan with its activations used that way in every layer."""
    layers = tuple(dataclasses.replace(layer, method=method) for layer in plan.layers)
    return dataclasses.replace(plan, layers=layers)


def judged(plan: Plan, seconds: float, budget: Budget) -> Alternative:
    """The plan with what it sends and needs, and whether that is within the budget."""
    needed: dict[Memory, int] = {place: sum(items.values()) for place, items in memory_needed(plan).items()}
    excess = {place: needed[place] - getattr(budget, place) for place in MEMORIES}
    misfit = " and ".join(f"{place} lacks {format_bytes(size)}" for place, size in excess.items() if size > 0)
    sent = sum(share * plan.link_bytes(write_outs) for write_outs, share in cost.step_shares(plan).items())
    return Alternative(plan, seconds, round(sent), needed, misfit)


def sent_fraction(name: str) -> float | None:
    """Where on the axis of splits the plan of that name is: its fraction of the prompt sent as activations.

    None for plans that keep tokens on the device, and for names that are no plan's.
    """
    kind, _, argument = name.partition(":")
    if kind not in ("split", "kvpr"):
        return {"activations": 1.0, "recompute": 1.0, "keys_values": 0.0}.get(name)
    try:
        fraction = float(argument)
    except ValueError:
        return None
    return fraction if 0 <= fraction <= 1 else None


# --- what is asked for ------------------------------------------------------------------------------------------------


def read_hardware(name: str) -> HardwareProfile:
    """The profile of a machine by its name. Raises `PlanError`, with the names, if there is none."""
    if name == THIS:
        from kvrecomp.profiler import profile  # measures; a machine by its data sheet needs none of it

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


def read_window(mib: float | None) -> int | None:
    """Bytes from MiB. Raises `PlanError` for what is no size."""
    if mib is not None and not (math.isfinite(mib) and mib * MIB >= 1):
        raise PlanError(f"--window_mib is {mib:g}; it must be a size in MiB")
    return None if mib is None else int(mib * MIB)


def measured_as(plan: Plan, rows: Sequence[tables.Row], file: str) -> Measured:
    """Those rows of a results file that are of this plan's model, dtype, workload and groups, with the same weights in
    host memory. Rows that do not say one of these are as benchmark.py has it by default.

    Those of plan `auto` are left out: chosen for another machine or budget, it is another plan of the same name.
    """
    order = plan.order if plan.groups > 1 else "row"
    wanted = {"model": plan.shape.name, "dtype": plan.shape.dtype, **dataclasses.asdict(plan.workload)}
    wanted |= {"weights": tuple(layer.weights for layer in plan.layers), "groups": plan.groups, "order": order}

    def said(row: tables.Row) -> dict[str, Any]:
        given = {"dtype": "bfloat16", "weights": "device", "groups": 1, "order": "row"}
        given |= {key: row[key] for key in wanted if row.get(key) is not None}
        return given | {"weights": named_weights(given["weights"], len(plan.layers))}

    own = [row for row in rows if row.get("plan") != AUTO and said(row) == wanted]
    points = tuple((str(row.get("plan")), float(row["median_ms"])) for row in own)
    return Measured(str(rows[0].get("device", "unknown device")) if rows else "unknown device", points, file)


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


def draw(found: WhatIf, path: str | Path, measured: Measured | None = None) -> None:
    """Writes a PNG: predicted milliseconds a step against the split, one curve per schedule, and what was measured.

    Raises:
        ModuleNotFoundError, ValueError, OSError: as `plots.check_path`.
    """
    plots.check_path(path)
    plan = found.chosen.plan
    absorbed = "absorbed" if all(layer.absorbs_keys for layer in plan.shape.layers) else "V absorbed, K recomputed"
    # Colours of different lightness (Okabe and Ito's), lines and markers: any one of them tells the curves apart. What
    # is drawn later is thinner, so that what is equal shows through.
    styles = {
        "absorb": (f"pipelined, {absorbed}", "#0072b2", "-", 4.0, "o", 13),
        "recompute": ("pipelined, K and V recomputed", "#e69f00", "-.", 2.5, "s", 10),
        "kvpr": ("KVPR's schedule", "#8c2d04", (0, (5, 1.5)), 1.8, "^", 8),
        "kvpr_formula": ("KVPR's formula, attention alone", "#606060", "--", 1.2, "D", 6),
    }
    figure = plots.figure()
    axes = figure.add_subplot()
    for name in CURVES:
        label, colour, line, width, marker, size = styles[name]
        times = [1e3 * seconds for seconds in found.curves[name]]
        least = min(range(len(times)), key=times.__getitem__)
        axes.plot(
            FRACTIONS,
            times,
            color=colour,
            linestyle=line,
            linewidth=width,
            marker=marker,
            markevery=[least],
            markersize=size,
            markeredgecolor="white",
            clip_on=False,
            zorder=3,
            label=f"{label}: {_short(times[least])} ms at {FRACTIONS[least]:.2f}",
        )
    chosen = 1e3 * found.chosen.seconds
    label = f"chosen plan: {_short(chosen)} ms"
    axes.axhline(chosen, color="black", linestyle=":", linewidth=2, zorder=2, label=label)
    placed = [(sent_fraction(name), time) for name, time in (measured.points if measured else ())]
    crosses = [(fraction, time) for fraction, time in placed if fraction is not None]
    if measured and crosses:
        label = f"measured on {measured.device}"
        axes.plot(*zip(*crosses), "x", color="black", ms=9, mew=2, clip_on=False, zorder=4, label=label)
    axes.set_xlim(-0.015, 1.015)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("split: fraction of the prompt's tokens sent as activations")
    axes.set_ylabel("step time (ms)")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    sheet = " by its data sheet" if found.profile.source in {own.source for own in DATASHEETS.values()} else ""
    machine = f"{found.profile.device}{sheet}, {format_bytes(found.budget.device or 0)} of device memory"
    axes.set_title(f"Predicted step: {plan.shape.name}, {plan.workload}\n{machine}", loc="left", fontsize="medium")
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize="small", handlelength=3.6, columnspacing=1)
    plots.save(figure, path)


def _short(milliseconds: float) -> str:
    """Three digits, and never a power of ten."""
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"


# --- the command ------------------------------------------------------------------------------------------------------


def main(_: Sequence[str], given: flags.FlagValues = flags.FLAGS) -> None:
    """Unpacks the flags."""
    if given.plot is not None:
        plots.check_path(given.plot)
    shape = dataclasses.replace(models.preset(given.model).shape, dtype=given.dtype)
    workload = Workload(given.batch, given.prompt, given.new)
    budget, window = read_budget(given.device_memory_gib, given.host_memory_gib), read_window(given.window_mib)
    rows = None if given.measured is None else tables.read_file(given.measured)
    profile = read_hardware(given.hardware)
    if given.hardware == THIS:
        budget = Budget(**limits(budget))  # what is free, as no weights are there
    found = what_if(shape, workload, profile, budget, groups=given.groups, window=window)
    measured = None if rows is None else measured_as(found.chosen.plan, rows, given.measured)
    show(found, measured)
    if given.plot is not None:
        draw(found, given.plot, measured)
    if given.json:
        print(json.dumps(document(found, measured)))


if __name__ == "__main__":
    define_flags()
    script.run(main)
