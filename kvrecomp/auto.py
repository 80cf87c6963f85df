"""Plans for this machine: `auto` asks the scheduler, any other name is `named_plan`'s."""

from kvrecomp.budget import limits
from kvrecomp.hardware import HardwareProfile
from kvrecomp.named import named_plan
from kvrecomp.plan import AUTO, DEFAULT_WINDOW, Budget, ModelShape, Plan, Workload
from kvrecomp.profiler import check_profile, profile
from kvrecomp.scheduler import make_plan


def plan_for(
    name: str,
    shape: ModelShape,
    workload: Workload,
    *,
    budget: Budget | None = None,
    machine: HardwareProfile | None = None,
    loaded: bool = True,
    tail: int | None = None,
    window: int | None = None,
) -> Plan:
    """The plan of that name for this machine.

    `auto` is the fastest that fits in the budget, by default what is free; `loaded` says that the weights are on the
    device already. `machine` is its profile, measured if not given. `tail`, in tokens, and `window`, in bytes, are
    chosen where they are not given.

    Raises:
        PlanError: there is no such plan, nothing fits, or the profile is of another machine.
    """
    if name != AUTO:
        return named_plan(name, shape, workload, tail=tail, window=window or DEFAULT_WINDOW)
    if machine is None:
        machine = profile()
    else:
        check_profile(machine)
    weights = shape.parameters * shape.itemsize if loaded else 0
    own = Budget(**limits(budget or Budget(), weights))
    return make_plan(shape, workload, machine, own, tail=tail, window=window)
