"""The problem that a plan solves, and the space of candidates for it: what is asked for, and what is decided before the
blocks are."""

import functools
from dataclasses import dataclass

from kvrecomp.plan import (
    ALIGNED,
    DEFAULT_WINDOW,
    FORMS,
    GIB,
    MEMORIES,
    Budget,
    LayerShape,
    Memory,
    ModelShape,
    Order,
    Plan,
    PlanError,
    Workload,
    format_bytes,
)
from kvrecomp.plan.cutting import default_tail
from kvrecomp.plan.footprint import MARGIN, memory_needed, prefill_bytes, weights_in
from kvrecomp.predict.estimate import layer_times, slow_if_uneven
from kvrecomp.predict.hardware import LARGEST_DEVICE, LEAST_DEVICE, HardwareProfile

WINDOWS = tuple(DEFAULT_WINDOW >> shift for shift in (0, 2, 4, 6))
WINDOW_SHARE = 1 / 8  # of the device memory beside the weights, at most, is window
TAIL_SHARE = 1 / 8  # of the device memory beside the weights, at most, is tail
MOST_TAIL_BYTES = 4 * GIB


@dataclass(frozen=True)
class Problem:
    """What a plan is to be found for; what is None is left open, to be chosen.

    `workload` is that of one of the `groups`. `weights` has the memory of each layer's. `tail` is in tokens, `window`
    and the budget, which leaves nothing open (`resolve_budget`), in bytes.
    """

    shape: ModelShape
    workload: Workload
    profile: HardwareProfile
    budget: Budget
    groups: int = 1
    order: Order | None = None
    weights: tuple[Memory, ...] | None = None
    tail: int | None = None
    window: int | None = None


@dataclass(frozen=True)
class Space:
    """What all candidates for a problem's plan share, and the device memory that they have, in bytes.

    A candidate has one of the `windows`, the first of which is the largest. `beside_weights` is what the weights on the
    device leave, and `prefill` what a prompt takes of it for a while. Of the weights that cross the link `hosted_layer`
    is the largest layer and `hosted_matrix` the largest matrix; 0 where none do.
    """

    problem: Problem
    weights: tuple[Memory, ...]
    order: Order
    windows: tuple[int, ...]
    tail: int
    beside_weights: float
    prefill: int
    hosted_layer: int
    hosted_matrix: int

    @property
    def write_outs(self) -> int:
        """How often the tail is written out."""
        return max(0, (self.problem.workload.new - 1) // self.tail)

    @functools.cached_property
    def unit(self) -> int:
        """What parts of a prompt are multiples of at first: ALIGNED if one of the layers is slow for other numbers."""
        shape, batch = self.problem.shape, self.problem.workload.batch
        times = (layer_times(self.problem.profile, layer, shape, batch) for layer in self.layer_shapes)
        return ALIGNED if any(map(slow_if_uneven, times)) else 1

    @functools.cached_property
    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """The distinct shapes of layers, in the order in which they occur."""
        return tuple(self.problem.shape.distinct_layers)

    @functools.cached_property
    def layer_numbers(self) -> tuple[int, ...]:
        """For each layer, which of `layer_shapes` it has; cached, as comparing those of many layers takes long."""
        return tuple(map(self.layer_shapes.index, self.problem.shape.layers))


def make_space(problem: Problem) -> Space:
    """The space of a problem: on the device are weights that it leaves open, and a tail that it leaves open takes a
    small share of the memory.

    Raises `PlanError` if there are not as many `weights` as layers.
    """
    shape, workload = problem.shape, problem.workload
    weights = ("device",) * len(shape.layers) if problem.weights is None else problem.weights
    beside_weights = max(0.0, (problem.budget.device or 0.0) - weights_in(shape, weights)["device"])
    hosted = {layer for layer, memory in zip(shape.layers, weights) if memory == "host"}
    hosted_layer = max((layer.parameters * shape.itemsize for layer in hosted), default=0)
    hosted_matrix = max((max(map(max, layer.matrices)) * shape.itemsize for layer in hosted), default=0)
    prefill = prefill_bytes(shape, workload) + 2 * hosted_layer

    windows = (problem.window,) if problem.window else _windows(problem, beside_weights, prefill)
    if problem.tail is None:
        tail_bytes = min(MOST_TAIL_BYTES, beside_weights * TAIL_SHARE) / problem.groups
        tail = default_tail(shape, workload, windows[-1], tail_bytes)
    else:
        tail = min(problem.tail, workload.new)
    order = problem.order or default_order(bool(hosted), problem.groups)
    return Space(problem, weights, order, windows, tail, beside_weights, prefill, hosted_layer, hosted_matrix)


def _windows(problem: Problem, beside_weights: float, prefill: int) -> tuple[int, ...]:
    """The two largest of WINDOWS that there is room for, of at least a token's bytes: a smaller window leaves more room
    for blocks, and cuts what is sent into more copies. A prefill is over when a step needs its window."""
    fitting = [size for size in WINDOWS if size <= max(beside_weights * WINDOW_SHARE, prefill)]
    widest = max(layer.width(form) for layer in problem.shape.distinct_layers for form in FORMS)
    token_bytes = widest * problem.workload.batch * problem.shape.itemsize
    return tuple(max(size, token_bytes) for size in fitting[:2] or WINDOWS[-1:])


def default_order(hosted: bool, groups: int) -> Order:
    """The order of groups where none is asked for; `hosted` says whether there are weights in host memory.

    Column order sends these once for all groups. Without them row order has the smaller program, and is as fast where
    the link is the whole cost.
    """
    return "column" if hosted and groups > 1 else "row"


def resolve_budget(budget: Budget, profile: HardwareProfile) -> Budget:
    """The budget with what it leaves open taken from the profile, less a margin.

    Raises:
        PlanError: more or less device memory than any device has: it is in the wrong unit.
    """
    device, host = budget.device, budget.host
    if device is None:
        device = profile.device_bytes * (1 - MARGIN)
    if host is None:
        host = float("inf") if profile.host_bytes is None else profile.host_bytes * (1 - MARGIN)
    if not LEAST_DEVICE <= device <= LARGEST_DEVICE:
        raise PlanError(
            f"the budget is {device:.0f} bytes ({format_bytes(device)}) of device memory, "
            f"{'less' if device < LEAST_DEVICE else 'more'} than any device has: a Budget is in bytes, Budget.of_gib "
            "takes GiB"
        )
    return Budget(device, host)


def excess_bytes(plan: Plan, budget: Budget) -> float:
    """How many bytes the plan needs over a budget that leaves nothing open, in both memories together."""
    needed = memory_needed(plan)
    return sum(max(0.0, sum(needed[memory].values()) - getattr(budget, memory)) for memory in MEMORIES)
