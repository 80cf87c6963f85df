"""Drafts that are right as often as is said, for models whose own drafts say nothing: those with random weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvrecomp.plan import Plan
from kvrecomp.run.cache import Recent
from kvrecomp.run.drafters import Drafted, Drafter, Group, Turn
from kvrecomp.run.sampling import Sampling


@dataclass(frozen=True)
class MadeUp:
    """Drafts of the `texts` that will be written, new tokens int32[rows, new], where `right` bool[rows, new] says so,
    and others elsewhere. The drafts of `drafter`, if there is one, are made and not used."""

    drafter: Drafter | None
    texts: np.ndarray = field(compare=False)
    right: np.ndarray = field(compare=False)

    def start(self, plan: Plan, input_ids: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
        wrong = (self.texts + 1) % plan.shape.vocab
        drafts = np.pad(np.where(self.right, self.texts, wrong), ((0, 0), (0, plan.tokens_per_step)))
        kept, given = self.drafter.start(plan, input_ids, mask) if self.drafter else (None, None)
        return kept, (drafts.astype(np.int32), given)

    def draft(
        self, model: Any, plan: Plan, sampling: Sampling, groups: Sequence[Group], count: Array, most: int
    ) -> Drafted:
        recents, kept = [group.recent for group in groups], [group.turn.kept for group in groups]
        made = [group.turn.newest[:, None] for group in groups]
        if self.drafter:
            inner = [group._replace(given=group.given[1]) for group in groups]
            recents, made, kept = self.drafter.draft(model, plan, sampling, inner, count, most)
        drafted = []
        for group, drafts in zip(groups, made, strict=True):
            texts, _ = jax.lax.optimization_barrier((group.given[0], drafts))  # or they would not be made
            places = group.recent.slots(most) - plan.workload.prompt + 1
            known = jnp.take_along_axis(texts, places, axis=1, mode="clip")
            drafted.append(jnp.concatenate([group.turn.newest[:, None], known], axis=1))
        return recents, drafted, kept

    def learn(self, turn: Turn, recent: Recent, taken: Any) -> Turn:
        return self.drafter.learn(turn, recent, taken) if self.drafter else turn

    def with_acceptance(self, acceptance: float, seed: int) -> "MadeUp":
        """The same, right with that probability at each token."""
        return replace(self, right=np.random.default_rng(seed).random(self.texts.shape) < acceptance)
