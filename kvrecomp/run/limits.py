"""How much of each memory this machine has for a plan, and whether the plan fits in that."""

from collections.abc import Mapping

from kvrecomp.plan import Budget, Memory, Plan, PlanError
from kvrecomp.plan.footprint import MARGIN, check_within, weights_in
from kvrecomp.plan.pinned import pinned_limit
from kvrecomp.run import memory


def limits(budget: Budget, loaded: Mapping[Memory, int] | None = None) -> dict[Memory, float]:
    """Bytes that may be used of each memory; what the budget leaves open is what is free now, less a margin.

    What is `loaded` already, of the weights, counts as available.
    """
    if not isinstance(budget, Budget):
        raise PlanError(f"the budget is {budget!r}; expected a Budget, as kvrecomp.Budget.of_gib(20) is one")
    there: Mapping[Memory, int] = loaded or {"device": 0, "host": 0}
    device, host = budget.device, budget.host
    if device is None:
        device = memory.free_device_bytes() * (1 - MARGIN) + there["device"]
    if host is None:
        host = memory.free_host_bytes() * (1 - MARGIN) + there["host"]
    return {"device": device, "host": min(host, pinned_limit())}


def check_memory(plan: Plan, budget: Budget | None = None) -> None:
    """Raises `PlanError` if the plan, whose weights are loaded, needs more than the budget has or, where that leaves it
    open, this machine; see `check_within`."""
    loaded = weights_in(plan.shape, [layer.weights for layer in plan.layers])
    check_within(plan, limits(budget or Budget(), loaded))
