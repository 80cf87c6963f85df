"""Plans for this machine: `auto` asks the scheduler, any other name is `named_plan`'s."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from kvrecomp.measure import profiler
from kvrecomp.plan import (
    AUTO,
    DEFAULT_WINDOW,
    Budget,
    Drafting,
    Loss,
    Memory,
    ModelShape,
    Order,
    Plan,
    PlanError,
    Workload,
)
from kvrecomp.plan.codecs import check_loss
from kvrecomp.plan.footprint import weights_in
from kvrecomp.plan.named import named_plan, with_weights
from kvrecomp.predict.hardware import HardwareProfile
from kvrecomp.predict.problem import default_order
from kvrecomp.predict.scheduler import make_plan
from kvrecomp.run.limits import limits


def plan_for(
    name: str,
    shape: ModelShape,
    workload: Workload,
    *,
    budget: Budget | None = None,
    profile: HardwareProfile | None = None,
    weights: Sequence[Memory] | None = None,
    groups: int | None = 1,
    order: Order | None = None,
    tail: int | None = None,
    window: int | None = None,
    drafting: Drafting | Sequence[Drafting] | Literal["auto"] | None = None,
    loss: Loss = "none",
) -> Plan:
    """The plan of that name for this machine.

    `auto` is the fastest that fits in the budget, by default what is free; see `make_plan`. `weights` is where a loaded
    model has those of each layer (`kvrecomp.weight_memories`), None if none is loaded: then `auto` chooses, and others
    have them on the device. `groups` None lets `auto` split the rows. `profile` is measured if not given. `drafting`
    says which drafts steps check; of several, or with `auto`, those that are predicted to pay: plans by name have none.
    `loss` is what `auto` may write blocks with; other names say it themselves, as activations+int4 does.

    Raises:
        PlanError: there is no such plan, nothing fits, or the profile is of another machine. A loss for a plan that is
            not `auto`.
    """
    check_loss(loss)
    loaded = None if weights is None else weights_in(shape, weights)  # raises where these are not one a layer
    if name == AUTO:
        if profile is None:
            profile = profiler.profile()
        else:
            profiler.check_profile(profile)
        budget = Budget(**limits(budget or Budget(), loaded))
        return make_plan(
            shape,
            workload,
            profile,
            budget,
            weights=weights,
            groups=groups,
            order=order,
            tail=tail,
            window=window,
            drafting=drafting,
            loss=loss,
        )
    if loss != "none":
        raise PlanError(f"loss={loss} is for plan {AUTO}; {name} has a codec behind its name, as {name}+{loss} does")
    plan = named_plan(name, shape, workload, tail=tail, window=DEFAULT_WINDOW if window is None else window)
    if weights is not None:
        plan = with_weights(plan, weights)
    groups = 1 if groups is None else groups
    order = order or default_order(plan.host_weight_bytes > 0, groups)
    return dataclasses.replace(
        plan, groups=groups, order=order, drafting=drafting if isinstance(drafting, Drafting) else None
    )
