"""What if: the scheduler's plan for a model, a workload and a machine, and what others are predicted to take.

found = what_if(models.preset("opt-6.7b").shape, Workload(32, 1024, 32), HardwareProfile.from_datasheet("a100"))
"""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from experiments.support.results import tables

from kvrecomp.plan import (
    AUTO,
    MEMORIES,
    Budget,
    Drafting,
    Loss,
    Memory,
    Method,
    ModelShape,
    Plan,
    Workload,
    format_bytes,
)
from kvrecomp.plan.cutting import default_tail
from kvrecomp.plan.footprint import memory_needed
from kvrecomp.plan.named import named_plan, named_weights, with_weights
from kvrecomp.predict import cost
from kvrecomp.predict.hardware import HardwareProfile
from kvrecomp.predict.kvpr import kvpr_seconds, kvpr_split
from kvrecomp.predict.problem import resolve_budget
from kvrecomp.predict.scheduler import make_plan, token_seconds

STEPS = 80  # of the fraction
FRACTIONS = tuple(step / STEPS for step in range(STEPS + 1))
CURVES = ("absorb", "recompute", "kvpr", "kvpr_formula")


@dataclass(frozen=True)
class Alternative:
    """A plan and the predicted mean time of a token; `link_bytes` cross the link in a step, `needed` is memory at the
    end of the workload.

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


def what_if(
    shape: ModelShape,
    workload: Workload,
    profile: HardwareProfile,
    budget: Budget | None = None,
    *,
    weights: Sequence[Memory] | None = None,
    groups: int = 1,
    window: int | None = None,
    drafting: Drafting | Literal["auto"] | None = None,
    loss: Loss = "none",
) -> WhatIf:
    """The plan that the scheduler makes for so many groups of the workload's rows, and the predicted steps of others
    with as many, and with weights where it has them; `window` in bytes is theirs. Where layers' `weights` are is chosen
    too, unless it is given. `drafting` and `loss` are of the chosen one. Raises PlanError where the model has
    too few positions, or nothing fits in the budget.
    """
    named_plan("device", shape, workload)  # its one block costs nothing to make, however long a prompt is asked for
    budget = resolve_budget(budget or Budget(), profile)
    options = {"weights": weights, "groups": groups, "drafting": drafting, "loss": loss}
    chosen = make_plan(shape, workload, profile, budget, **options)
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
    named = [make("keys_values"), make("activations"), make("device")]
    plans = [chosen, *named, *itertools.chain(*curves.values())]
    predicted = {plan: float(seconds) for plan, seconds in zip(plans, cost.mean_costs(profile, plans).seconds)}
    if chosen.drafting is not None:
        predicted[chosen] = token_seconds(profile, chosen)
    curve_seconds = {name: tuple(predicted[plan] for plan in curve) for name, curve in curves.items()}
    best = min(curves["kvpr"], key=predicted.__getitem__)
    keys_values, activations, device = named

    def formula(recomputed: float) -> float:
        return groups * kvpr_seconds(profile, shape, workload, recomputed)

    tokens = kvpr_split(profile, shape, workload)
    formula_curve = tuple(formula(fraction * workload.prompt) for fraction in FRACTIONS)
    compared = (chosen, keys_values, activations, best, device)
    return WhatIf(
        profile=profile,
        budget=budget,
        alternatives=tuple(judged(plan, predicted[plan], budget) for plan in compared),
        curves=curve_seconds | {"kvpr_formula": formula_curve},
        kvpr_tokens=tokens,
        kvpr_seconds=formula(tokens),
    )


def with_method(plan: Plan, method: Method) -> Plan:
    """The plan with its activations used that way in every layer."""
    layers = tuple(dataclasses.replace(layer, method=method) for layer in plan.layers)
    return dataclasses.replace(plan, layers=layers)


def judged(plan: Plan, seconds: float, budget: Budget) -> Alternative:
    """The plan with what it sends and needs, and whether that is within the budget."""
    needed: dict[Memory, int] = {memory: sum(items.values()) for memory, items in memory_needed(plan).items()}
    excess = {memory: needed[memory] - getattr(budget, memory) for memory in MEMORIES}
    misfit = " and ".join(f"{memory} lacks {format_bytes(size)}" for memory, size in excess.items() if size > 0)
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


def measured_as(plan: Plan, rows: Sequence[tables.Row]) -> list[tables.Row]:
    """Those rows of a results file that are of this plan's model, dtype, workload and groups, with the same weights in
    host memory. Rows that do not say one of these are as benchmark.py has it by default.

    Those of plan `auto` are left out: chosen for another machine or budget, it is another plan of the same name.
    """
    wanted = {"model": plan.shape.name, "dtype": plan.shape.dtype, **dataclasses.asdict(plan.workload)}
    wanted |= {"groups": plan.groups, "order": plan.order if plan.groups > 1 else "row"}
    weights = tuple(layer.weights for layer in plan.layers)
    default = {"dtype": "bfloat16", "groups": 1, "order": "row", "weights": "device"}
    found = []
    for row in rows:
        full = default | {name: value for name, value in row.items() if value is not None}
        same = all(full.get(name) == value for name, value in wanted.items())
        if same and row["plan"] != AUTO and named_weights(full["weights"], len(weights)) == weights:
            found.append(row)
    return found


def median_ms(measured: Sequence[tables.Row], plan: str) -> float | None:
    """The plan's time in these rows, the median where it was measured more than once."""
    times = [row["median_ms"] for row in measured if row["plan"] == plan]
    return statistics.median(times) if times else None
