"""Chooses the plan: of many candidates that fit the budget, the one whose predicted steps are shortest in the mean.

`search` finds the best candidate with a given tail, order and number of groups. Here these are compared with one
another, by the seconds of the whole workload, in which steps may have to wait for programs, and the plans of RIVALS,
with the same tail and window, are candidates too.

Weights that do not fit go to host memory: a byte of them saves as much of the link on the device as a byte of the cache
does, and more where groups follow each other, so no more of them leave than have to beside the tail.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from kvrecomp.plan import AUTO, FORMS, Budget, Drafting, Loss, Memory, ModelShape, Order, Plan, PlanError, Workload
from kvrecomp.plan.codecs import check_loss
from kvrecomp.plan.compiling import decode_seconds
from kvrecomp.plan.cutting import default_tail
from kvrecomp.plan.drafting import tokens_per_round
from kvrecomp.plan.footprint import memory_needed, prefill_bytes
from kvrecomp.plan.named import named_plan, spread, with_weights
from kvrecomp.predict.candidates import candidate_plan, least_candidate
from kvrecomp.predict.cost import mean_costs, plan_costs, round_cost
from kvrecomp.predict.hardware import LARGEST_DEVICE, HardwareProfile
from kvrecomp.predict.problem import Problem, excess_bytes, resolve_budget
from kvrecomp.predict.search import SURE, fast_ones, search

SPLITS = (1, 2, 4, 8, 16)  # groups that rows are split into: a program of column order has the attention of each
DRAFTINGS = (Drafting("sketch", 8, codec="fp8"), Drafting("sketch", 8, codec="int4"), Drafting("prompt_lookup", 8))
PAYING = 1.05  # times as fast, at least, with drafts as without
ALIKE = 1.03  # times the shortest workload, with fewer groups or in row order, whose program is smaller, is as good
SMALL_PREFILL = 1 / 16  # of the device memory
# What the choice is compared with.
RIVALS = ("activations", "recompute", "keys_values", "split:0.5", "device", "activations+packed", "keys_values+packed")


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
    drafting: Drafting | Sequence[Drafting] | Literal["auto"] | None = None,
    loss: Loss = "none",
) -> Plan:
    """The plan that fits in the budget with the shortest predicted steps, in the mean of the workload's; with the
    shortest workload, where steps wait.

    What the budget leaves open is the profile's: its device memory and its host memory, less a margin. Chosen where
    they are not given: the memory of each layer's `weights`, the `order` of the groups, the `tail`, in tokens, by its
    bytes, or longer where steps would wait for programs, and the `window`, in bytes. There are `groups` of the
    workload's rows each; None splits its rows into as few groups as are fastest, and the plan's workload is one of
    them. `drafting` says which drafts steps check; of several, or with `auto` of DRAFTINGS, they check none, or those
    with which tokens come soonest, if as many are right as they say, and sooner by the factor PAYING than without. With
    none where a tail is written out with loss: the text would go by how many are right.
    `loss` is the codec whose loss is allowed.

    Raises:
        PlanError: nothing fits; the message says what is needed and what would fit. A budget in the wrong unit.
    """
    check_loss(loss)
    if groups is not None and groups < 1:
        raise PlanError(f"groups is {groups}; it must be greater than zero, or None to split the rows")
    for name, given in (("tail", tail), ("window", window)):
        if given is not None and given < 1:
            raise PlanError(f"{name} is {given}; it must be greater than zero, or None to be chosen")
    if drafting == AUTO:
        drafting = DRAFTINGS
    if isinstance(drafting, Sequence):
        options: Any = {
            "weights": weights,
            "groups": groups,
            "order": order,
            "tail": tail,
            "window": window,
            "loss": loss,
        }
        return _with_drafts_that_pay(
            drafting,
            profile,
            resolve_budget(budget or Budget(), profile),
            lambda drafting: make_plan(shape, workload, profile, budget, drafting=drafting, **options),
        )
    budget = resolve_budget(budget or Budget(), profile)
    memories = None if weights is None else tuple(weights)
    count = 1 if groups is None else groups
    problem = Problem(shape, workload, profile, budget, count, order, memories, tail, window, drafting, loss)
    problems = _splits(problem) if groups is None else [problem]
    # Times are measured for one batch: those of another, estimated from the machine's rates, do not compare.
    clock = profile if len(problems) == 1 else dataclasses.replace(profile, layers=())
    solutions: list[_Solution] = []
    misfits: list[PlanError] = []
    for problem in problems:
        try:
            solutions.append(_solve(problem, clock))
        except PlanError as misfit:
            misfits.append(misfit)
    if not solutions:
        raise misfits[0]
    most = ALIKE * min(solution.seconds for solution in solutions)
    plan = next(solution.plan for solution in solutions if solution.seconds <= most)
    plan = dataclasses.replace(plan, reason=_reason(plan, profile, budget, loss))
    return with_costs(plan, plan.drafting, profile) if plan.drafting else plan


def with_costs(plan: Plan, drafting: Drafting, profile: HardwareProfile) -> Plan:
    """The plan with these drafts, and with what they are predicted to cost."""
    step, check, draft = round_cost(profile, dataclasses.replace(plan, drafting=drafting))
    costs = dataclasses.replace(drafting, draft_cost=draft / step, check_cost=check / step)
    return dataclasses.replace(plan, drafting=costs)


def token_seconds(profile: HardwareProfile, plan: Plan) -> float:
    """Predicted seconds of a token, of all groups, if as many drafts as pay are made and as many right as assumed."""
    if plan.drafting is None:
        return float(plan_costs(profile, [plan]).seconds[0])
    acceptance = plan.drafting.acceptance
    return round_cost(profile, plan).step / plan.drafting.pace(
        plan.drafting.best_count(acceptance, plan.draft_counts), acceptance
    )


def _with_drafts_that_pay(
    draftings: Sequence[Drafting],
    profile: HardwareProfile,
    budget: Budget,
    make: Callable[[Drafting | None], Plan],
) -> Plan:
    """What is made without drafts, or with those that are predicted to be fastest, by the factor PAYING or more."""
    chosen = plan = make(None)
    alone = best = token_seconds(profile, plan)
    for drafting in draftings if plan.link_bytes(plan.write_outs) else ():  # or nothing is waited for
        if drafting.codec and chosen.sketched:
            continue  # over more bits, drafts are faster and more of them right
        drafted = dataclasses.replace(plan, drafting=drafting)
        try:
            if drafting.codec or excess_bytes(drafted, budget):
                drafted = make(drafting)
        except PlanError:  # there is no room for it
            continue
        if drafted.write_outs and not drafted.lossless:
            continue  # when a tail is written out goes by what rows took, and what is lost with it by that
        costs = with_costs(drafted, drafting, profile)
        seconds, acceptance = token_seconds(profile, costs), drafting.acceptance
        if PAYING * seconds < alone and seconds < best:
            count = (
                drafting.most if costs.drafting is None else costs.drafting.best_count(acceptance, costs.draft_counts)
            )
            words = (
                f"{1e3 * seconds:.2f} ms a token with {count} drafts ({drafting.name}), if {acceptance:.0%} are right, "
                f"{1e3 * alone:.2f} ms without any"
            )
            best, chosen = seconds, dataclasses.replace(costs, reason=f"{drafted.reason}; {words}")
    return chosen


class _Solution(NamedTuple):
    """The best plan for a problem, and the predicted seconds of the whole workload."""

    plan: Plan
    seconds: float


def _solve(problem: Problem, clock: HardwareProfile) -> _Solution:
    """The best plan, timed by the rates of `clock`. A tail that is open is doubled while the whole workload takes less.

    A tail has to hold the tokens of the time that the next program takes to compile, and takes room from blocks. Where
    a longer one does not fit, the shorter one is kept. Raises `PlanError` where nothing fits.
    """
    best = _solve_with_tail(problem, clock)
    if problem.tail is not None:
        return best
    longest = default_tail(problem.shape, problem.workload, best.plan.window, LARGEST_DEVICE)
    while best.plan.write_outs and best.plan.tail < longest:
        tail = min(longest, 2 * best.plan.tail)
        try:
            longer = _solve_with_tail(dataclasses.replace(problem, tail=tail), clock)
        except PlanError:
            break
        if longer.seconds >= best.seconds:
            break
        best = longer
    return best


def _solve_with_tail(problem: Problem, clock: HardwareProfile) -> _Solution:
    """The best plan with the tail that is asked for, or the longest that is a small share of the memory and fits."""
    weights = _fewest_hosted(problem) if problem.weights is None else problem.weights
    _, plan, seconds = search(_with_tail_that_fits(dataclasses.replace(problem, weights=weights)))
    plan, seconds = _rival_if_faster(plan, seconds, problem)
    if problem.order is None:
        plan, seconds = _in_faster_order(plan, seconds, problem)
    if clock is not problem.profile:
        seconds = _mean_seconds(clock, plan)
    if plan.drafting is not None:  # it is that of a round
        seconds /= tokens_per_round(plan.drafting.most, plan.drafting.acceptance)
    return _Solution(plan, decode_seconds(plan, seconds))


def _splits(problem: Problem) -> list[Problem]:
    """The problem with its rows split into groups, as few as they can be first, down to where a prefill is small.

    All that more groups save is the memory of a prefill, which is one group's; but with a sketch, whose drafts are made
    under copies, two are faster.
    """
    splits: list[Problem] = []
    batch = problem.workload.batch
    least = 2 if problem.drafting and problem.drafting.codec else 1
    for groups in SPLITS:
        if batch % groups == 0:
            workload = dataclasses.replace(problem.workload, batch=batch // groups)
            splits.append(dataclasses.replace(problem, workload=workload, groups=groups))
            small = prefill_bytes(problem.shape, workload) <= SMALL_PREFILL * (problem.budget.device or 0.0)
            if small and groups >= least:
                break
    return splits


def _fewest_hosted(problem: Problem) -> tuple[Memory, ...]:
    """The memory of each layer's weights: as few layers', evenly spread, in host memory as let the rest fit on the
    device; of all layers where none do."""
    layers = len(problem.shape.layers)

    def fits(hosted: int) -> bool:
        hosting = dataclasses.replace(problem, weights=spread(hosted, layers))
        needed = memory_needed(candidate_plan(hosting, least_candidate(hosting)))["device"]
        return sum(needed.values()) <= (problem.budget.device or 0.0)

    # The first to leave needs room for two that are on their way, so all may fit where all but one do not.
    hosted = 0 if fits(0) else 1 + bisect.bisect_left(range(1, layers), True, key=fits)
    return spread(hosted, layers)


def _with_tail_that_fits(problem: Problem) -> Problem:
    """The problem with a tail, halved, unless it was asked for, until the candidate that needs the least memory fits.

    Raises `PlanError` where a tail that was asked for is larger than the window even in the smaller form.
    """
    least = candidate_plan(problem, least_candidate(problem))
    if problem.tail is not None:
        return problem
    fitting = dataclasses.replace(problem, tail=problem.tail_tokens)
    while least.tail > 1 and excess_bytes(least, problem.budget) > 0:
        fitting = dataclasses.replace(problem, tail=least.tail // 2)
        least = candidate_plan(fitting, least_candidate(fitting))
    return fitting


def _in_faster_order(plan: Plan, seconds: float, problem: Problem) -> tuple[Plan, float]:
    """The plan, in column order where that is surely faster, with its mean step's seconds."""
    if plan.groups == 1 or plan.order == "column":
        return plan, seconds
    column = dataclasses.replace(plan, order="column")
    column_seconds = _mean_seconds(problem.profile, column)
    if ALIKE * decode_seconds(column, column_seconds) < decode_seconds(plan, seconds):
        return column, column_seconds
    return plan, seconds


def _rivals(plan: Plan, budget: Budget, loss: Loss) -> list[Plan]:
    """The plans by name that fit, with the tail, window, weights and groups of this one, and not the same blocks."""
    rivals: list[Plan] = []
    for name in RIVALS + tuple(f"{form}+{loss}" for form in FORMS if loss != "none"):
        try:
            rival = named_plan(name, plan.shape, plan.workload, tail=plan.tail, window=plan.window)
        except PlanError:  # a token larger than the window
            continue
        rival = with_weights(rival, [layer.weights for layer in plan.layers])
        rival = dataclasses.replace(rival, groups=plan.groups, order=plan.order, drafting=plan.drafting)
        last = plan.write_outs
        if rival.blocks(last) != plan.blocks(last) and excess_bytes(rival, budget) == 0:
            rivals.append(rival)
    return rivals


def _rival_if_faster(plan: Plan, seconds: float, problem: Problem) -> tuple[Plan, float]:
    """The plan, or its fastest rival where that is faster by more than a thousandth, with its mean step's seconds."""
    rivals = _rivals(plan, problem.budget, problem.loss)
    predicted = fast_ones(problem.profile, rivals, seconds)
    fastest = min(predicted, key=predicted.__getitem__, default=None)
    if fastest is None or 1.001 * predicted[fastest] >= seconds:
        return plan, seconds
    return dataclasses.replace(rivals[fastest], name=AUTO), predicted[fastest]


def _mean_seconds(profile: HardwareProfile, plan: Plan) -> float:
    """Predicted seconds of the plan's mean step."""
    return float(mean_costs(profile, [plan]).seconds[0])


def _reason(plan: Plan, profile: HardwareProfile, budget: Budget, loss: Loss) -> str:
    """What bounds the step, what is lost, and what the next best of the plans by name would cost."""
    rivals = _rivals(plan, budget, loss)
    costs = mean_costs(profile, [plan, *rivals])
    seconds, copying, computing = (float(values[0]) for values in costs)
    bound = "link" if copying > computing else "device"
    grows = ""
    if write_outs := max(0, plan.workload.new - 2) // plan.tail:  # before the last step
        first, last = (1e3 * float(plan_costs(profile, [plan], number).seconds[0]) for number in (0, write_outs))
        grows = f" ({first:.2f} the first, {last:.2f} the last)" if last > SURE * first else ""
    what = "step" if plan.drafting is None else f"round of {plan.drafting.most} drafts ({plan.drafting.name})"
    text = (
        f"{1e3 * seconds:.2f} ms a {what} predicted{grows}, bound by the {bound}: copies take {1e3 * copying:.2f} ms, "
        f"compute {1e3 * computing:.2f} ms"
    )
    if not plan.lossless:
        text = f"{text}; with loss, which is allowed ({loss})"
    if not rivals:
        return f"{text}; no plan by name fits beside it"
    seconds, name = min((float(seconds), rival.name) for seconds, rival in zip(costs.seconds[1:], rivals))
    return f"{text}; next best is {name}, {1e3 * seconds:.2f} ms"
