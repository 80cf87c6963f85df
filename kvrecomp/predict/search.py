"""Searches for the best candidate: from the best of a coarse grid to the best of its neighbours, move by move.

First all layer shapes have the same settings; then those of each are varied on finer grids, one shape after the other.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from kvrecomp.plan import ALIGNED, FORMS, MEMORIES, BlockSpec, Codec, Method, Plan, PlanError
from kvrecomp.plan.footprint import check_within
from kvrecomp.predict.candidates import Candidate, Settings, candidate_plan, layer_plans, least_candidate
from kvrecomp.predict.cost import MOST_LENGTHS, mean_bounds, mean_costs
from kvrecomp.predict.estimate import layer_times, slow_if_uneven
from kvrecomp.predict.hardware import HardwareProfile
from kvrecomp.predict.problem import Problem, excess_bytes
from kvrecomp.predict.tasks import PLANS

GRID = 8  # steps of the coarse grid of fractions; a finer one has as many within one of them
FRACTIONS = tuple(step / GRID for step in range(GRID + 1))
ON_DEVICE = (None, *(step / GRID for step in (0, 1, 2, 3, 4, 6, 8)))  # not all: each makes the search longer
SURE = 1.01  # times the shortest step: predictions that differ by less do not tell which is shorter
PLANS_AT_ONCE = PLANS // MOST_LENGTHS  # predicted in one call of the cost function

Move = Callable[[Settings], list[Settings]]
"""From the best settings so far of a layer shape to their neighbours."""


class Prediction(NamedTuple):
    """A candidate, its plan, and the predicted seconds of the plan's mean step."""

    candidate: Candidate
    plan: Plan
    seconds: float


def search(problem: Problem) -> Prediction:
    """The best candidate that fits the budget. Raises `PlanError` where none does; the message says what would."""
    if problem.for_cache <= 0:
        _check_within(problem, candidate_plan(problem, least_candidate(problem)))  # raises
    best = choose(problem, _first_candidates(problem))
    for layer, move in itertools.product(problem.layer_shapes, _moves(problem)):
        settings = best.candidate.settings
        neighbours = [{**settings, layer: neighbour} for neighbour in move(settings[layer])]
        best = choose(problem, [replace(best.candidate, settings=neighbour) for neighbour in neighbours], best)
    return choose(problem, [replace(best.candidate, window=window) for window in problem.windows[1:]], best)


def _first_candidates(problem: Problem) -> list[Candidate]:
    """A coarse grid in which all layer shapes have the same settings, and the candidates of the least memory."""
    coarse = [dict.fromkeys(problem.layer_shapes, settings) for settings in _absorbing(problem)]
    candidates = [Candidate(problem.windows[0], settings) for settings in coarse]
    for window, codec in itertools.product(problem.windows, problem.codecs):
        least = least_candidate(problem, codec).settings
        even = {layer: replace(settings, unit=_unit(problem)) for layer, settings in least.items()}
        candidates += Candidate(window, least), Candidate(window, even)
    return candidates


def _moves(problem: Problem) -> list[Move]:
    """The moves for each layer shape, in order."""
    return [
        *([lambda _: _absorbing(problem)] if len(problem.layer_shapes) > 1 else []),
        lambda best: [replace(best, codecs=codecs) for codecs in itertools.product(problem.codecs, repeat=2)],
        partial(_near, "activations", 1 / GRID**2),
        partial(_near, "on_device", 4 / GRID**2),
        *([partial(_near, "growth", 4 / GRID**2)] if problem.write_outs else []),
        lambda best: _settings_grid("recompute", (best.growth,), _unit(problem), [best.codecs]),
        partial(_near, "activations", 1 / GRID**2),
        lambda best: [replace(best, unit=unit) for unit in (1, ALIGNED)],
    ]


def _absorbing(problem: Problem) -> list[Settings]:
    alike: list[tuple[Codec, Codec]] = [(codec, codec) for codec in problem.codecs]
    return _settings_grid("absorb", (0.0, 0.5, 1.0) if problem.write_outs else (0.0,), _unit(problem), alike)


def _unit(problem: Problem) -> int:
    """What parts of a prompt are multiples of at first: ALIGNED if one of the layers is slow for other numbers."""
    shape, batch = problem.shape, problem.workload.batch
    times = (layer_times(problem.profile, layer, shape, batch) for layer in problem.layer_shapes)
    return ALIGNED if any(map(slow_if_uneven, times)) else 1


def _settings_grid(
    method: Method, growths: Sequence[float], unit: int, codecs: Sequence[tuple[Codec, Codec]]
) -> list[Settings]:
    """The coarse grid of settings."""
    choices = itertools.product(ON_DEVICE, FRACTIONS, (method,), FORMS, growths, (unit,), codecs)
    return [Settings(*choice) for choice in choices]


def _near(name: str, step: float, best: Settings) -> list[Settings]:
    """The settings with one of their fractions on a finer grid around what it is."""
    centre = getattr(best, name)
    if centre is None:
        return []
    fractions = [centre + number * step for number in range(-GRID, GRID + 1)]
    return [replace(best, **{name: fraction}) for fraction in fractions if 0 <= fraction <= 1]


def choose(problem: Problem, candidates: Sequence[Candidate], best: Prediction | None = None) -> Prediction:
    """The best of the candidates that fit and of the `best` so far, by `_surest_of_fastest`.

    Raises `PlanError` where no candidate fits and there is no `best`.
    """
    # Many candidates make the same plan; it is made once.
    distinct: dict[Hashable, Candidate] = {}
    for candidate in candidates:
        distinct.setdefault((candidate.window, layer_plans(problem, candidate)), candidate)
    if best is not None:
        distinct.pop((best.candidate.window, layer_plans(problem, best.candidate)), None)
    plans: list[tuple[Candidate, Plan]] = []
    misfits: list[PlanError] = []
    for candidate in distinct.values():
        try:
            plans.append((candidate, candidate_plan(problem, candidate)))
        except PlanError as misfit:  # a tail that was asked for is larger than the window in one of the forms
            misfits.append(misfit)
    if best is None and not plans:
        raise misfits[0]

    budget = problem.budget
    fitting = [(candidate, plan) for candidate, plan in plans if excess_bytes(plan, budget) == 0]
    if best is None and not fitting:
        closest = min((plan for _, plan in plans), key=lambda plan: excess_bytes(plan, budget))
        _check_within(problem, closest)  # raises
    predictions = [] if best is None else [best]
    seconds = fast_ones(problem.profile, [plan for _, plan in fitting], best.seconds if best else math.inf)
    predictions += [Prediction(*fitting[number], taken) for number, taken in seconds.items()]
    return _surest_of_fastest(predictions)


def _check_within(problem: Problem, plan: Plan) -> None:
    """Raises `PlanError` if the plan is over the budget."""
    check_within(plan, {memory: getattr(problem.budget, memory) for memory in MEMORIES})


def fast_ones(profile: HardwareProfile, plans: Sequence[Plan], shortest: float) -> dict[int, float]:
    """The predicted seconds of plans' mean steps, by the plans' numbers, in order; without those of which copies or
    compute alone take longer than SURE times the shortest step, of these or the one given."""
    bounds = mean_bounds(profile, plans) if plans else []
    waiting = sorted(range(len(plans)), key=lambda number: float(bounds[number]))
    seconds: dict[int, float] = {}
    while waiting and bounds[waiting[0]] <= SURE * shortest:
        batch, waiting = waiting[:PLANS_AT_ONCE], waiting[PLANS_AT_ONCE:]
        costs = mean_costs(profile, [plans[number] for number in batch])
        seconds |= zip(batch, map(float, costs.seconds))
        shortest = min(shortest, *seconds.values())
    return dict(sorted(seconds.items()))


def _surest_of_fastest(predictions: Sequence[Prediction]) -> Prediction:
    """The one with the shortest mean step; of those alike within a thousandth, the one that sends least; of those
    within SURE that send no more, the one with one form on the device, and with the fewest activations.

    Two forms have more kernels, and attention over activations does `hidden / head_dim` times the arithmetic of that
    over keys and values, in kernels that XLA chooses by timing them: both are predicted less surely.
    """
    shortest = min(prediction.seconds for prediction in predictions)
    near = [prediction for prediction in predictions if prediction.seconds <= SURE * shortest]
    sent = [prediction.plan.bytes_in("host") for prediction in near]
    least = min(size for prediction, size in zip(near, sent) if prediction.seconds <= 1.001 * shortest)
    sending_least = [prediction for prediction, size in zip(near, sent) if size <= least]
    return min(sending_least, key=lambda prediction: _unsure(prediction.plan))


def _unsure(plan: Plan) -> tuple[int, int]:
    """Layers that have two forms on the device, and tokens that are held as activations when the tail is full, over all
    layers."""
    mixed = activations = 0
    for (layer, _), count in plan.distinct_layers.items():
        blocks = *layer.prompt, BlockSpec(layer.tail_form, "device", plan.tail)
        mixed += count * (len({block.form for block in blocks if block.memory == "device"}) > 1)
        activations += count * sum(block.tokens for block in blocks if block.form == "activations")
    return mixed, activations
