"""Chooses the plan: of many candidates that fit the budget, the one whose predicted step is shortest.

A candidate is made from a few numbers (`Settings`): how much of the device memory that is left over holds keys and
values (the rest holds what is smaller), which fraction of the tokens behind the link are activations, how activations
are used, and the window. Whatever fits stays on the device, the prompt first, because its tokens are read most often.
All candidates are predicted in one call of the cost function, on a coarse grid and then on a finer one around the best.
Layers of different shapes get settings of their own, one shape after the other.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvrecomp.budget import MARGIN, check_memory, memory_needed
from kvrecomp.cost import StepCost, plan_costs
from kvrecomp.hardware import LARGEST_DEVICE, HardwareProfile
from kvrecomp.named import named_plan
from kvrecomp.plan import (
    AUTO,
    DEFAULT_WINDOW,
    FORMS,
    MEMORIES,
    METHODS,
    MIB,
    TAIL_BYTES,
    Budget,
    Form,
    LayerPlan,
    LayerShape,
    Memory,
    Method,
    ModelShape,
    Plan,
    PlanError,
    Workload,
    cut_runs,
    default_tail,
)

WINDOWS = tuple(DEFAULT_WINDOW >> shift for shift in (0, 2, 4, 6))
WINDOW_SHARE = 1 / 8  # of the device memory beside the weights, at most, is window
GRID = 8  # steps of the coarse grid of fractions; the finer one has as many within one of them
TAIL_SHARE = 1 / 8  # of the device memory beside the weights, at most, is tail
RIVALS = ("activations", "recompute", "keys_values", "split:0.5", "device")  # what the choice is compared with


@dataclass(frozen=True)
class Settings:
    """What the plan of layers of one shape is made from.

    `on_device` is the fraction of the device memory left over that holds keys and values, None for as much as leaves no
    token behind the link; `activations` the fraction of the other tokens that are activations.
    """

    on_device: float | None
    activations: float
    method: Method


def make_plan(
    shape: ModelShape,
    workload: Workload,
    profile: HardwareProfile,
    budget: Budget | None = None,
    *,
    tail: int | None = None,
    window: int | None = None,
) -> Plan:
    """The plan with the shortest predicted step that fits in the budget.

    What the budget leaves open is the profile's: its device memory and its host memory, less a margin. `tail`, in
    tokens, and `window`, in bytes, are chosen too where they are not given.

    Raises:
        PlanError: nothing fits; the message says what is needed and what would fit. A budget in the wrong unit.
    """
    search = _Search(shape, workload, profile, resolve_budget(budget or Budget(), profile), tail, window)
    plan = search.best()
    return dataclasses.replace(plan, reason=_reason(plan, search))


def resolve_budget(budget: Budget, profile: HardwareProfile) -> Budget:
    """The budget with what it leaves open taken from the profile.

    Raises:
        PlanError: more or less device memory than any device has: it is in the wrong unit.
    """
    device, host = budget.device, budget.host
    if device is None:
        device = profile.device_bytes * (1 - MARGIN)
    if host is None:
        host = float("inf") if profile.host_bytes is None else profile.host_bytes * (1 - MARGIN)
    if device > LARGEST_DEVICE or device < MIB:
        raise PlanError(
            f"the budget is {device:.0f} bytes of device memory, {'more' if device > MIB else 'less'} than any device "
            "has: a Budget is in bytes, Budget.of_gib takes GiB"
        )
    return Budget(device, host)


class _Search:
    """Candidates for one model, workload, profile and budget, each predicted once."""

    def __init__(
        self,
        shape: ModelShape,
        workload: Workload,
        profile: HardwareProfile,
        budget: Budget,
        tail: int | None,
        window: int | None,
    ):
        self.shape, self.workload, self.profile, self.budget = shape, workload, profile, budget
        self.shapes = list(dict.fromkeys(shape.layers))
        spare = max(0.0, (budget.device or 0.0) - shape.parameters * shape.itemsize)
        # A smaller window leaves more room for blocks, and cuts what is sent into more copies.
        self.windows = [own for own in WINDOWS if own <= spare * WINDOW_SHARE][:2] or [WINDOWS[-1]]
        if window is not None:
            self.windows = [window]
        self.tail = default_tail(shape, workload, self.windows[-1], min(TAIL_BYTES, spare * TAIL_SHARE))
        if tail is not None:
            self.tail = min(tail, workload.new)
        self._costs: dict[Plan, StepCost] = {}

    def best(self) -> Plan:
        """The plan to use."""
        grid = [step / GRID for step in range(GRID + 1)]
        settings = [Settings(*each) for each in itertools.product((None, 0.0, 0.5, 1.0), grid, METHODS)]
        best = self._choose((window, dict.fromkeys(self.shapes, each)) for window in self.windows for each in settings)
        for layer in self.shapes:
            if len(self.shapes) > 1:
                best = self._vary(best, layer, settings)
            centre = best[1][layer]
            fine = [centre.activations + step / GRID**2 for step in range(-GRID, GRID + 1)]
            near = [dataclasses.replace(centre, activations=each) for each in fine if 0 <= each <= 1]
            best = self._vary(best, layer, near)
        return self._plan(*best)

    def costs(self, plans: Sequence[Plan]) -> list[StepCost]:
        """What a step costs under each of the plans."""
        if new := [plan for plan in dict.fromkeys(plans) if plan not in self._costs]:
            self._costs.update(zip(new, itertools.starmap(StepCost, zip(*plan_costs(self.profile, new)))))
        return [self._costs[plan] for plan in plans]

    def fits(self, plan: Plan) -> bool:
        """Whether the plan keeps to the budget."""
        return self._excess(plan) == 0

    def _excess(self, plan: Plan) -> float:
        """Bytes over the budget, of both memories."""
        needed = memory_needed(plan)
        return sum(max(0.0, sum(needed[place].values()) - getattr(self.budget, place)) for place in MEMORIES)

    def _vary(self, best, layer: LayerShape, settings: Iterable[Settings]):
        """The best of these settings for one shape, the others' being as they are."""
        window, others = best
        return self._choose([best, *((window, others | {layer: each}) for each in settings)])

    def _choose(self, candidates: Iterable[tuple[int, dict[LayerShape, Settings]]]):
        """The candidate with the shortest step; of those alike within a thousandth, the one that sends least."""
        plans = {}
        for window, settings in candidates:
            plans.setdefault(self._plan(window, settings), (window, settings))
        fitting = [plan for plan in plans if self.fits(plan)]
        if not fitting:
            check_memory(min(plans, key=self._excess), self.budget)
        seconds = {plan: float(cost.seconds) for plan, cost in zip(fitting, self.costs(fitting))}
        least = min(seconds.values())
        alike = [plan for plan in fitting if seconds[plan] <= 1.001 * least]
        return plans[min(alike, key=lambda plan: plan.bytes_in("host"))]

    def _plan(self, window: int, settings: dict[LayerShape, Settings]) -> Plan:
        room = self._room(window)
        return self._assemble(window, settings, room)

    @functools.cache  # noqa: B019 - lives as long as the search
    def _room(self, window: int) -> float:
        """Bytes left of the device when everything is in host memory and the tails are as wide as they can be."""
        all_host = self._assemble(window, {layer: _widest(layer) for layer in self.shapes}, 0.0)
        return max(0.0, (self.budget.device or 0.0) - sum(memory_needed(all_host)["device"].values()))

    def _assemble(self, window: int, settings: dict[LayerShape, Settings], room: float) -> Plan:
        """The plan with these settings; layers share the room so that each keeps as many tokens as the others."""
        widths = {layer: min(layer.width(form) for form in FORMS) for layer in self.shapes}
        share = room / sum(widths[layer] for layer in self.shape.layers)
        own = {}
        for layer in self.shapes:
            builder = _Builder(layer, self.shape, self.workload, window, self.tail, share * widths[layer])
            own[layer] = iter(builder.plans(settings[layer], self.shape.layers.count(layer)))
        layers = tuple(next(own[layer]) for layer in self.shape.layers)
        return Plan(AUTO, self.shape, self.workload, layers, self.tail, window)


def _widest(layer: LayerShape) -> Settings:
    return Settings(0.0, float(layer.width("activations") > layer.width("keys_values")), "absorb")


@dataclass(frozen=True)
class _Builder:
    """Makes the plans of layers of one shape; `room` is how many bytes of blocks each may keep on the device."""

    layer: LayerShape
    shape: ModelShape
    workload: Workload
    window: int
    tail: int
    room: float

    def plans(self, settings: Settings, count: int) -> list[LayerPlan]:
        """The plans of `count` layers, alike but for their tails: a tail has one form, so forms alternate."""
        prompt = self.workload.prompt
        write_outs = max(0, (self.workload.new - 1) // self.tail)
        smaller: Form = "activations" if self._bytes("activations") < self._bytes("keys_values") else "keys_values"
        as_pairs, as_smaller = self._on_device(settings.on_device, prompt + write_outs * self.tail, smaller)
        pairs_here = min(as_pairs, prompt)
        smaller_here = min(as_smaller, prompt - pairs_here)
        behind = prompt - pairs_here - smaller_here
        sent = round(settings.activations * behind)
        here = {"keys_values": pairs_here, "activations": 0}
        here[smaller] += smaller_here
        runs: list[tuple[Form, Memory, int]] = [
            ("keys_values", "device", here["keys_values"]),
            ("activations", "device", here["activations"]),
            ("activations", "host", sent),
            ("keys_values", "host", behind - sent),
        ]
        kept = (as_pairs + as_smaller - pairs_here - smaller_here) // self.tail  # tails that stay when written out
        if behind or kept < write_outs:
            pairs = 1 - settings.activations
        elif smaller == "keys_values" or not write_outs:
            pairs = float(smaller == "keys_values" or not here["activations"])
        else:
            pairs = (as_pairs - pairs_here) // self.tail / write_outs
        stays: Memory = "host" if behind or kept < write_outs else "device"
        here_first: list[Memory] = ["device"] * min(kept, write_outs) if stays == "host" else []
        grown = (*here_first, stays)
        blocks = cut_runs(runs, self.layer, self.shape, self.workload, self.window)
        of_form = {form: LayerPlan(blocks, form, grown, settings.method) for form in FORMS}
        turns = [int((number + 1) * pairs) > int(number * pairs) for number in range(count)]
        return [of_form["keys_values" if turn else "activations"] for turn in turns]

    def _on_device(self, fraction: float | None, tokens: int, smaller: Form) -> tuple[int, int]:
        """How many tokens stay on the device as keys and values, and how many in the smaller form."""
        pair, small = self._bytes("keys_values"), self._bytes(smaller)
        if fraction is not None:
            pairs = min(tokens, int(fraction * self.room / pair))
        elif tokens * small > self.room:
            pairs = 0
        else:
            pairs = tokens if tokens * pair <= self.room else int((self.room - tokens * small) / (pair - small))
        return pairs, min(tokens - pairs, int((self.room - pairs * pair) / small))

    def _bytes(self, form: Form) -> int:
        """Of one token."""
        return self.workload.batch * self.layer.width(form) * self.shape.itemsize


def _reason(plan: Plan, search: _Search) -> str:
    """What bounds the step, and what the next best of the plans by name would cost."""
    (cost,) = search.costs([plan])
    copying, computing = float(cost.copying), float(cost.computing)
    bound = "link" if copying > computing else "device"
    text = (
        f"{1e3 * float(cost.seconds):.2f} ms a step predicted, bound by the {bound}: copies take "
        f"{1e3 * copying:.2f} ms, compute {1e3 * computing:.2f} ms"
    )
    rivals = []
    for name in RIVALS:
        try:
            rival = named_plan(name, search.shape, search.workload, tail=plan.tail, window=plan.window)
        except PlanError:
            continue
        if rival.layers != plan.layers and search.fits(rival):
            rivals.append(rival)
    if not rivals:
        return f"{text}; no plan by name fits beside it"
    seconds, name = min((float(cost.seconds), rival.name) for cost, rival in zip(search.costs(rivals), rivals))
    return f"{text}; next best is {name}, {1e3 * seconds:.2f} ms"
