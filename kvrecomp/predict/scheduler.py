"""Chooses the plan: of many candidates that fit the budget, the one whose predicted steps are shortest in the mean.

Tails, orders and numbers of groups are compared by the whole workload, in which steps may have to wait for programs.

A candidate is made from a few numbers for all layers of one shape (`Settings`): how much of the device memory that is
left over holds keys and values (the rest holds what is smaller), which fraction of the prompt behind the link are
activations, how activations are used, the form of the tail and of the blocks it becomes, how many of these blocks stay
on the device before any of the prompt does, and whether parts of the prompt are multiples of ALIGNED. All candidates
are predicted in one call of the cost function, on a coarse grid and then on finer ones around the best. Layers of
different shapes get settings of their own, one shape after the other. The plans of RIVALS, with the same tail and
window, are candidates too.

Weights that do not fit go to host memory: a byte of them saves as much of the link on the device as a byte of the cache
does, and more where groups follow each other, so no more of them leave than have to beside the tail.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from kvrecomp.plan import (
    ALIGNED,
    AUTO,
    DEFAULT_WINDOW,
    FORMS,
    GIB,
    MEMORIES,
    BlockSpec,
    Budget,
    LayerPlan,
    LayerShape,
    Memory,
    ModelShape,
    Order,
    Plan,
    PlanError,
    Workload,
    format_bytes,
)
from kvrecomp.plan.compiling import decode_seconds
from kvrecomp.plan.cutting import BLOCKS_PER_WINDOW, default_tail
from kvrecomp.plan.footprint import MARGIN, check_within, memory_needed, prefill_bytes, recomputed_bytes, weights_in
from kvrecomp.plan.named import named_plan, spread, with_weights
from kvrecomp.plan.step_order import in_flight_bytes
from kvrecomp.predict.candidates import Builder, Settings, smaller_form
from kvrecomp.predict.cost import MOST_LENGTHS, PLANS, StepCost, mean_bounds, mean_costs, plan_costs
from kvrecomp.predict.estimate import layer_times, slow_if_uneven
from kvrecomp.predict.hardware import LARGEST_DEVICE, LEAST_DEVICE, HardwareProfile

WINDOWS = tuple(DEFAULT_WINDOW >> shift for shift in (0, 2, 4, 6))
WINDOW_SHARE = 1 / 8  # of the device memory beside the weights, at most, is window
GRID = 8  # steps of the coarse grid of fractions; the finer one has as many within one of them
ON_DEVICE_STEPS = (0, 1, 2, 3, 4, 6, 8)  # of these, for what the device holds: each makes the search longer
TAIL_SHARE = 1 / 8  # of the device memory beside the weights, at most, is tail
MOST_TAIL_BYTES = 4 * GIB
SPLITS = (1, 2, 4, 8, 16)  # groups that rows are split into: a program of column order has the attention of each
ALIKE = 1.03  # times the shortest workload, with fewer groups or in row order, whose program is smaller, is as good
SURE = 1.01  # times the shortest step: predictions that differ by less do not tell which is shorter
PLANS_AT_ONCE = PLANS // MOST_LENGTHS  # of a search, predicted in one call of the cost function
SMALL_PREFILL = 1 / 16  # of the device memory
RIVALS = ("activations", "recompute", "keys_values", "split:0.5", "device")  # what the choice is compared with


Candidate = tuple[int, dict[LayerShape, Settings]]
"""A window, and the settings of each layer shape."""

Key = tuple[int, Order, frozenset[tuple[LayerPlan, LayerShape]]]


def make_plan(
    shape: ModelShape,
    workload: Workload,
    profile: HardwareProfile,
    budget: Budget | None = None,
    *,
    weights: Sequence[Memory] | None = None,
    groups: int | None = 1,
    order: Order | None = None,
    tail: int | None = None,
    window: int | None = None,
) -> Plan:
    """The plan that fits in the budget with the shortest predicted steps, in the mean of the workload's; with the
    shortest workload, where steps wait.

    What the budget leaves open is the profile's: its device memory and its host memory, less a margin. Chosen where
    they are not given: the memory of each layer's `weights`, the `order` of the groups, the `tail`, in tokens, by its
    bytes, or longer where steps would wait for programs, and the `window`, in bytes. There are `groups` of the
    workload's rows each; None splits its rows into as few groups as are fastest, and the plan's workload is one of
    them.

    Raises:
        PlanError: nothing fits; the message says what is needed and what would fit. A budget in the wrong unit.
    """
    if groups is not None and groups < 1:
        raise PlanError(f"groups is {groups}; it must be greater than zero, or None to split the rows")
    for name, given in (("tail", tail), ("window", window)):
        if given is not None and given < 1:
            raise PlanError(f"{name} is {given}; it must be greater than zero, or None to be chosen")
    budget = resolve_budget(budget or Budget(), profile)
    splits = _splits(shape, workload, budget) if groups is None else [(groups, workload)]
    # Times are measured for one batch: those of another, estimated from the machine's rates, are not to be compared.
    comparable = profile if len(splits) == 1 else dataclasses.replace(profile, layers=())

    def search(count: int, work: Workload, tail: int | None) -> _Found:
        make = functools.partial(_Search, shape, work, profile, budget, tail, window, count, order)
        own = _with_fewest_hosted(make, len(shape.layers)) if weights is None else make(tuple(weights))
        plan = own.best()
        return _Found(decode_seconds(plan, float(mean_costs(comparable, [plan]).seconds[0])), own, plan)

    found: list[_Found] = []
    misfits: list[PlanError] = []
    for count, work in splits:
        try:
            found.append(search(count, work, tail))
        except PlanError as misfit:
            misfits.append(misfit)
        else:
            if tail is None:
                found[-1] = _with_longer_tail(found[-1], functools.partial(search, count, work))
    if not found:
        raise misfits[0]
    most = ALIKE * min(own.seconds for own in found)
    _, chosen, plan = next(own for own in found if own.seconds <= most)
    return dataclasses.replace(plan, reason=_reason(plan, chosen))


class _Found(NamedTuple):
    """A plan, the seconds of its whole workload, and the search that it is the best of."""

    seconds: float
    search: "_Search"
    plan: Plan


def _with_longer_tail(found: _Found, search: Callable[[int], _Found]) -> _Found:
    """What a tail twice as long gives, again and again while the whole workload takes less with it.

    A tail has to hold the tokens of the time that the next program takes to compile, and takes room from blocks. Where
    one does not fit, the shorter one is kept.
    """
    plan = found.plan
    longest = default_tail(plan.shape, plan.workload, plan.window, LARGEST_DEVICE)
    while found.plan.write_outs and found.plan.tail < longest:
        try:
            longer = search(min(longest, 2 * found.plan.tail))
        except PlanError:
            break
        if longer.seconds >= found.seconds:
            break
        found = longer
    return found


def default_order(hosted: bool, groups: int) -> Order:
    """Column order sends weights in host memory once for all groups; without, row order has the smaller program, and is
    as fast where the link is the whole cost."""
    return "column" if hosted and groups > 1 else "row"


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
    if not LEAST_DEVICE <= device <= LARGEST_DEVICE:
        raise PlanError(
            f"the budget is {device:.0f} bytes ({format_bytes(device)}) of device memory, "
            f"{'less' if device < LEAST_DEVICE else 'more'} than any device has: a Budget is in bytes, Budget.of_gib "
            "takes GiB"
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
        groups: int,
        order: Order | None,
        weights: tuple[Memory, ...],
    ):
        self.shape, self.workload, self.profile, self.budget = shape, workload, profile, budget
        self.weights, self.groups = weights, groups
        self.order: Order = order or default_order("host" in weights, groups)
        self.any_order = order is None
        self.shapes = list(shape.distinct_layers)
        self.shape_numbers = [self.shapes.index(layer) for layer in shape.layers]  # hashing each again takes long
        self.smaller_widths = sum(layer.width(smaller_form(layer)) for layer in shape.layers)
        sent = [own for own, place in zip(shape.layers, weights) if place == "host"]
        self.sent_layer = max((own.parameters * shape.itemsize for own in sent), default=0)  # bytes
        self.sent_matrix = max((max(map(max, own.matrices)) * shape.itemsize for own in sent), default=0)
        # A prefill has gone when a step needs its window.
        self.prefill = prefill_bytes(shape, workload) + 2 * self.sent_layer
        self.spare = max(0.0, (budget.device or 0.0) - weights_in(shape, weights)["device"])
        # A smaller window leaves more room for blocks, and cuts what is sent into more copies.
        widest = max(layer.width(form) for layer in self.shapes for form in FORMS) * workload.batch * shape.itemsize
        beside = max(self.spare * WINDOW_SHARE, self.prefill)
        windows = [own for own in WINDOWS if own <= beside][:2] or [WINDOWS[-1]]
        self.windows = [max(own, widest) for own in windows] if window is None else [window]
        most = min(MOST_TAIL_BYTES, self.spare * TAIL_SHARE) / groups
        self.tail = default_tail(shape, workload, self.windows[-1], most) if tail is None else min(tail, workload.new)
        self._costs: dict[Key, StepCost] = {}
        self.least = {}  # each shape in its own smaller form: what fits if anything does
        for layer in self.shapes:
            form = smaller_form(layer)
            self.least[layer] = Settings(None, float(form == "activations"), "absorb", form, 0.0)
        least = self._plan(self.windows[-1], self.least)
        self.fits_on_device = sum(memory_needed(least)["device"].values()) <= (budget.device or 0.0)
        while tail is None and self.tail > 1 and self._excess(least):
            self.tail //= 2
            least = self._plan(self.windows[-1], self.least)

    def best(self) -> Plan:
        """The plan to use. Raises `PlanError` where none fits."""
        window, grid = self.windows[0], [step / GRID for step in range(GRID + 1)]
        growth = (0.0, 0.5, 1.0) if self.workload.new > self.tail else (0.0,)
        here = (None, *(step / GRID for step in ON_DEVICE_STEPS))
        choices = itertools.product(here, grid, ("absorb",), FORMS, growth)
        times = (layer_times(self.profile, layer, self.shape, self.workload.batch) for layer in self.shapes)
        unit = ALIGNED if any(map(slow_if_uneven, times)) else 1
        settings = [Settings(*choice, unit) for choice in choices]
        uniform = [(window, dict.fromkeys(self.shapes, own)) for own in settings]
        even = {layer: dataclasses.replace(own, unit=unit) for layer, own in self.least.items()}
        best = self._choose([*uniform, *itertools.product(self.windows, (self.least, even))])
        for layer in self.shapes:
            if len(self.shapes) > 1:
                best = self._vary(best, layer, settings)
            for name, step in (("activations", 1), ("on_device", 4), ("growth", 4)):
                best = self._refine(best, layer, name, step / GRID**2)
            others = itertools.product(here, grid, ("recompute",), FORMS, (best[1][layer].growth,))
            best = self._vary(best, layer, [Settings(*other, unit) for other in others])
            best = self._refine(best, layer, "activations", 1 / GRID**2)
            best = self._vary(best, layer, [dataclasses.replace(best[1][layer], unit=own) for own in (1, ALIGNED)])
        best = self._choose([best, *((window, best[1]) for window in self.windows[1:])])
        found = self._plan(*best)
        (cost,) = self.costs([found])
        better = [(rival, own) for rival, own in self.rivals(found) if 1.001 * own.seconds < cost.seconds]
        if better:
            found = dataclasses.replace(min(better, key=lambda item: item[1].seconds)[0], name=AUTO)
        return self._in_faster_order(found) if self.any_order and self.groups > 1 else found

    def _in_faster_order(self, plan: Plan) -> Plan:
        """The plan in column order where that is surely faster than its own."""
        column = dataclasses.replace(plan, order="column")
        costs = self.costs([plan, column])
        own, other = (decode_seconds(each, float(cost.seconds)) for each, cost in zip((plan, column), costs))
        if ALIKE * other < own:
            self.order = "column"  # its rivals' too
        return dataclasses.replace(plan, order=self.order)

    def costs(self, plans: Sequence[Plan]) -> list[StepCost]:
        """What the mean step costs under each of the plans."""
        if new := {key: plan for plan in plans if (key := _key(plan)) not in self._costs}:
            costs = mean_costs(self.profile, list(new.values()))
            self._costs.update(zip(new, itertools.starmap(StepCost, zip(*costs))))
        return [self._costs[_key(plan)] for plan in plans]

    def _seconds(self, plans: Sequence[Plan]) -> tuple[list[float], float]:
        """Of each plan's mean step, or infinite where it is surely longer than SURE times the shortest; and of that."""
        bounds = mean_bounds(self.profile, plans)
        seconds, shortest = [math.inf] * len(plans), math.inf
        waiting = sorted(range(len(plans)), key=lambda number: float(bounds[number]))
        while waiting and bounds[waiting[0]] <= SURE * shortest:
            some, waiting = waiting[:PLANS_AT_ONCE], waiting[PLANS_AT_ONCE:]
            for number, cost in zip(some, self.costs([plans[number] for number in some])):
                seconds[number] = float(cost.seconds)
                shortest = min(shortest, seconds[number])
        return seconds, shortest

    def rivals(self, plan: Plan) -> list[tuple[Plan, StepCost]]:
        """The plans by name that fit, with the tail and window of this one."""
        named = []
        for name in RIVALS:
            try:
                rival = named_plan(name, self.shape, self.workload, tail=plan.tail, window=plan.window)
            except PlanError:  # a token larger than the window
                continue
            rival = with_weights(rival, self.weights)
            named.append(dataclasses.replace(rival, groups=self.groups, order=self.order))
        last = plan.write_outs
        fitting = [rival for rival in named if rival.blocks(last) != plan.blocks(last) and self._excess(rival) == 0]
        return list(zip(fitting, self.costs(fitting)))

    def _excess(self, plan: Plan) -> float:
        """Bytes over the budget, of both memories."""
        needed = memory_needed(plan)
        return sum(max(0.0, sum(needed[place].values()) - getattr(self.budget, place)) for place in MEMORIES)

    def _vary(self, best: Candidate, layer: LayerShape, settings: Iterable[Settings]) -> Candidate:
        """The best of these settings for one shape, the others' being as they are."""
        window, others = best
        return self._choose([best, *((window, others | {layer: own}) for own in settings)])

    def _refine(self, best: Candidate, layer: LayerShape, name: str, step: float) -> Candidate:
        """The best of one fraction on a finer grid around what it is."""
        centre = best[1][layer]
        value = getattr(centre, name)
        if value is None:
            return best
        near = [value + number * step for number in range(-GRID, GRID + 1)]
        return self._vary(best, layer, [dataclasses.replace(centre, **{name: own}) for own in near if 0 <= own <= 1])

    def _choose(self, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate with the shortest mean step; of those alike within a thousandth, the one that sends least; of
        those within `SURE` that send no more, the one with one form on the device, and with the fewest activations.

        Two forms have more kernels, and attention over activations does `hidden / head_dim` times the arithmetic of
        that over keys and values, in kernels that XLA chooses by timing them: both are predicted less surely. Raises
        `PlanError` where none fits.
        """
        made: dict[Key, tuple[Plan, Candidate]] = {}
        misfits: list[PlanError] = []
        for candidate in candidates:
            try:
                plan = self._plan(*candidate)
            except PlanError as misfit:  # a tail that was asked for, and is longer than the window in one of the forms
                misfits.append(misfit)
            else:
                made.setdefault(_key(plan), (plan, candidate))
        if not made:
            raise misfits[0]
        fitting = [own for own in made.values() if self._excess(own[0]) == 0]
        if not fitting:
            closest = min((plan for plan, _ in made.values()), key=self._excess)
            check_within(closest, {place: getattr(self.budget, place) for place in MEMORIES})
        seconds, shortest = self._seconds([plan for plan, _ in fitting])
        sent = min(own[0].bytes_in("host") for own, each in zip(fitting, seconds) if each <= 1.001 * shortest)
        near = [own for own, each in zip(fitting, seconds) if each <= SURE * shortest]
        return min((own for own in near if own[0].bytes_in("host") <= sent), key=lambda own: _unsure(own[0]))[1]

    def _plan(self, window: int, settings: dict[LayerShape, Settings]) -> Plan:
        """The plan with these settings, which leaves room for what it recomputes."""
        plan = self._fill(window, settings, self.spare)
        if recomputed_bytes(plan, plan.write_outs):
            over = sum(memory_needed(plan)["device"].values()) - (self.budget.device or 0.0)
            plan = self._fill(window, settings, self.spare - over) if over > 0 else plan
        return plan

    def _fill(self, window: int, settings: dict[LayerShape, Settings], spare: float) -> Plan:
        """The plan with these settings in so many bytes beside the weights; layers share the room so that each keeps as
        many tokens as the others."""
        room = (spare - self.prefill) / self.groups
        largest = max(window // BLOCKS_PER_WINDOW, self.sent_matrix)
        in_flight = in_flight_bytes(window + 2 * self.sent_layer, largest, self.sent_layer)
        window_room = room - max(0, in_flight - self.prefill) / self.groups
        made: list[dict[Memory, LayerPlan]] = []
        for layer in self.shapes:
            share = layer.width(smaller_form(layer)) / self.smaller_widths
            builder = Builder(layer, self.shape, self.workload, window, self.tail, room * share, window_room * share)
            own = builder.plan(settings[layer])
            made.append({place: dataclasses.replace(own, weights=place) for place in MEMORIES})
        layers = tuple(made[number][place] for number, place in zip(self.shape_numbers, self.weights))
        groups, order = self.groups, self.order
        return Plan(AUTO, self.shape, self.workload, layers, self.tail, window, groups=groups, order=order)


def _key(plan: Plan) -> Key:
    """What tells a search's plans apart. Hashing a plan itself takes a hash of every layer."""
    return plan.window, plan.order, frozenset(plan.distinct_layers)


def _unsure(plan: Plan) -> tuple[int, int]:
    """Layers that have two forms on the device, and tokens that are held as activations when the tail is full, over all
    layers."""
    mixed = activations = 0
    for (layer, _), count in plan.distinct_layers.items():
        blocks = *layer.prompt, BlockSpec(layer.tail_form, "device", plan.tail)
        mixed += count * (len({block.form for block in blocks if block.memory == "device"}) > 1)
        activations += count * sum(block.tokens for block in blocks if block.form == "activations")
    return mixed, activations


def _splits(shape: ModelShape, workload: Workload, budget: Budget) -> list[tuple[int, Workload]]:
    """Groups that the rows could be split into, and the work of one, down to where a prefill is small.

    All that more groups save is the memory of a prefill, which is one group's.
    """
    splits: list[tuple[int, Workload]] = []
    for count in SPLITS:
        if workload.batch % count == 0:
            splits.append((count, dataclasses.replace(workload, batch=workload.batch // count)))
            if prefill_bytes(shape, splits[-1][1]) <= SMALL_PREFILL * (budget.device or 0.0):
                break
    return splits


def _with_fewest_hosted(make: Callable[[tuple[Memory, ...]], _Search], layers: int) -> _Search:
    """The search with weights of as few layers in host memory, evenly spread, as let the rest fit on the device."""

    def fits(count: int) -> bool:
        return make(spread(count, layers)).fits_on_device

    # The first to leave needs room for two that are on their way, so all may fit where all but one do not.
    hosted = 0 if fits(0) else 1 + bisect.bisect_left(range(1, layers), True, key=fits)
    return make(spread(hosted, layers))


def _reason(plan: Plan, search: _Search) -> str:
    """What bounds the step, and what the next best of the plans by name would cost."""
    (cost,) = search.costs([plan])
    copying, computing = float(cost.copying), float(cost.computing)
    bound = "link" if copying > computing else "device"
    ends = 0, max(0, plan.workload.new - 2) // plan.tail  # write-outs before the first step and before the last
    first, last = (1e3 * float(plan_costs(search.profile, [plan], own).seconds[0]) for own in ends)
    grows = f" ({first:.2f} the first, {last:.2f} the last)" if last > SURE * first else ""
    text = (
        f"{1e3 * float(cost.seconds):.2f} ms a step predicted{grows}, bound by the {bound}: copies take "
        f"{1e3 * copying:.2f} ms, compute {1e3 * computing:.2f} ms"
    )
    rivals = [(float(rival.seconds), plan.name) for plan, rival in search.rivals(plan)]
    if not rivals:
        return f"{text}; no plan by name fits beside it"
    seconds, name = min(rivals)
    return f"{text}; next best is {name}, {1e3 * seconds:.2f} ms"
