"""Which drafts are asked for, who makes them, and how many."""

import dataclasses
import numbers
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from kvrecomp.plan import AUTO, Budget, Drafting, ModelShape, Plan, PlanError, Workload, format_bytes
from kvrecomp.plan.drafting import MOST_DRAFTS
from kvrecomp.plan.footprint import memory_needed
from kvrecomp.plan.named import named_plan
from kvrecomp.run.cache import Cache
from kvrecomp.run.decoder import Decoder
from kvrecomp.run.drafters import Assistant, Drafter, PromptLookup, Sketch
from kvrecomp.run.model import Model, check_parts
from kvrecomp.run.programs import KeptPrograms
from kvrecomp.run.weights import on_device

DRAFTS = 8  # of an assistant, in a round
FEW_TRIED = 16  # drafts, for how many of which the assumed acceptance counts
FORGETTING = 0.9  # a round, of what was right in those before
FEW_DRAFTS, UNPAID_ROUNDS = 4, 64  # where drafts do not pay: how many are made, and how seldom
_KEPT = KeptPrograms(2)  # prefills of assistants


def as_drafting(
    prompt_lookup_num_tokens: Any,
    assistant_model: Any,
    num_assistant_tokens: Any,
    drafts: Any,
    plan: Plan | str = AUTO,
) -> Drafting | Literal["auto"] | None:
    """What the arguments of `generate` ask for: no drafts, those of a drafter, or those that pay. A number alone asks
    for a sketch, or for so many by whoever drafts in a `plan` that is given.

    Raises `PlanError` where they are no whole numbers up to MOST_DRAFTS, ask for two drafters, or for more drafts than
    one has.
    """
    for name, given, least in (
        ("prompt_lookup_num_tokens", prompt_lookup_num_tokens, 1),
        ("num_assistant_tokens", num_assistant_tokens, 1),
        ("drafts", drafts, 0),
    ):
        if given is not None and (not isinstance(given, numbers.Integral) or not least <= int(given) <= MOST_DRAFTS):
            raise PlanError(f"{name} is {given!r}; expected a whole number from {least} to {MOST_DRAFTS}")
    if prompt_lookup_num_tokens is not None and assistant_model is not None:
        raise PlanError("prompt_lookup_num_tokens and assistant_model both draft: give one of them")
    if num_assistant_tokens is not None and assistant_model is None:
        raise PlanError("num_assistant_tokens is given and assistant_model is not: give both")
    for name, most in (
        ("prompt_lookup_num_tokens", prompt_lookup_num_tokens),
        ("num_assistant_tokens", num_assistant_tokens),
    ):
        if most is not None and drafts is not None and drafts > most:
            raise PlanError(f"drafts is {drafts}, more than {name}, {most}: give a smaller one, or {name} alone")
    if drafts == 0:
        return None
    own = plan.drafting if isinstance(plan, Plan) else None
    if prompt_lookup_num_tokens is not None:
        return Drafting("prompt_lookup", int(prompt_lookup_num_tokens), draft_cost=0.0)
    if assistant_model is not None:
        check_parts(assistant_model)
        return Drafting("assistant", int(num_assistant_tokens or drafts or (own.most if own else DRAFTS)))
    if drafts is None:
        return AUTO
    return dataclasses.replace(own, most=int(drafts)) if own else Drafting("sketch", int(drafts), codec="fp8")


def check_drafting(plan: Plan, drafting: Drafting | Literal["auto"] | None) -> None:
    """Raises `PlanError` where drafts are asked for that the plan has no room for."""
    if drafting is None or drafting == AUTO:
        return
    most = plan.drafting.most if plan.drafting else 0
    if plan.drafting is None or plan.drafting.drafter != drafting.drafter:
        codec = f", codec={drafting.codec!r}" if drafting.codec else ""
        there = "no drafts" if plan.drafting is None else f"drafts by {plan.drafting.drafter}"
        raise PlanError(
            f"plan {plan.name} has {there}, and {drafting.drafter} is asked for: give the plan's name, or "
            f"dataclasses.replace(plan, drafting=kvrecomp.Drafting({drafting.drafter!r}, {drafting.most}{codec}))"
        )
    if drafting.most > most:
        raise PlanError(
            f"plan {plan.name} has room for {most} drafts in a round; {drafting.most} are asked for: make a plan with "
            "a larger Drafting.most"
        )


def make_drafter(plan: Plan, assistant: Model | None = None) -> Drafter | None:
    """Who drafts under this plan; `assistant` is the model that does where it says so.

    Raises `PlanError` where that is missing, or has another vocabulary or too few positions.
    """
    if plan.drafting is None:
        return None
    match plan.drafting.drafter:
        case "sketch":
            return Sketch()
        case "prompt_lookup":
            return PromptLookup()
        case "assistant":
            if assistant is None:
                raise PlanError(f"plan {plan.name} has drafts by an assistant model: give assistant_model")
            return _assistant(plan, assistant)


def without_assistant(
    budget: Budget, shape: ModelShape, assistant: ModelShape, work: Workload, most: int, *, loaded: bool
) -> Budget:
    """What a budget of so many bytes of device memory leaves beside an assistant of all these rows: its cache, and its
    weights unless they are `loaded`.

    Raises `PlanError` where that is nothing, or the assistant cannot be one of the model.
    """
    _check_vocabulary(shape, assistant)
    needed = memory_needed(_plan_of_assistant(assistant, work, most))["device"]
    device = (budget.device or 0.0) - sum(needed.values()) + (needed["weights"] if loaded else 0)
    if device <= 0:
        raise PlanError(
            f"the assistant {assistant.name} leaves nothing of {format_bytes(budget.device or 0)} of device memory: "
            "use a smaller one, or fewer rows"
        )
    return Budget(device, budget.host)


def _check_vocabulary(shape: ModelShape, assistant: ModelShape) -> None:
    if assistant.vocab != shape.vocab:
        raise PlanError(
            f"the assistant {assistant.name} has a vocabulary of {assistant.vocab}, {shape.name} one of {shape.vocab}: "
            "take one whose tokens are the same"
        )


def _plan_of_assistant(shape: ModelShape, work: Workload, most: int) -> Plan:
    """All of the assistant's cache on the device, with a tail for all new tokens, and those that are drafted."""
    new = min(work.new + most + 1, shape.positions - work.prompt)
    if new < 1:
        raise PlanError(
            f"the assistant {shape.name} has {shape.positions} positions, the prompt {work.prompt} tokens: take one "
            "with more, or a shorter prompt"
        )
    return named_plan("device", shape, Workload(work.batch, work.prompt, new), tail=new)


def _assistant(plan: Plan, model: Model) -> Assistant:
    _check_vocabulary(plan.shape, model.shape)
    own = _plan_of_assistant(model.shape, plan.workload, plan.tokens_per_step - 1)
    decoder = Decoder(model, own, kept=_KEPT)
    graph, state = nnx.split(model)
    weights, structure = jax.tree.flatten(state)

    def prefilled(input_ids: np.ndarray, mask: np.ndarray) -> Cache:
        decoder.compile(step=False)
        return decoder.prefill(input_ids, mask)[0]

    return Assistant(graph, structure, [on_device(array) for array in weights], own, prefilled)


# --- how many ---------------------------------------------------------------------------------------------------------


class Pace:
    """How many drafts a round has: as many as pay, by what they cost and by how often they were right."""

    def __init__(self, plan: Plan):
        self._drafting, self._unpaid = plan.drafting or Drafting("prompt_lookup", 1), 0
        self._counts = plan.draft_counts
        assumed = self._drafting.acceptance
        self._right, self._tried = assumed * FEW_TRIED, float(FEW_TRIED)

    def drafts(self) -> int:
        """Those of the next round."""
        count = self._drafting.best_count(self._right / self._tried, self._counts)
        self._unpaid = 0 if count else self._unpaid + 1
        # The text may change.
        few = min(count for count in self._counts if count >= min(FEW_DRAFTS, self._drafting.most))
        return count or (few if self._unpaid % UNPAID_ROUNDS == 0 else 0)

    def learn(self, drafts: np.ndarray, counts: np.ndarray) -> None:
        """Of rows that were held back by nothing else, what each took where it had so many drafts."""
        if len(drafts):
            right = counts - 1
            self._right = FORGETTING * self._right + right.sum()
            self._tried = FORGETTING * self._tried + (right + (right < drafts)).sum()
