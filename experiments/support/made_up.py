"""Drafts that are right as often as is said, for models whose own drafts say nothing: those with random weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvrecomp.plan import Plan
from kvrecomp.run.cache import Recent
from kvrecomp.run.drafters import Drafted, Drafter, Group, Proposal, Turn
from kvrecomp.run.sampling import Sampling


@dataclass(frozen=True)
class MadeUp:
    """Drafts of what will be written, `sequences` int32[rows, prompt + new], where `right` bool[rows, new] says so, and
    others elsewhere. Rows are told by their prompts. The drafts of `drafter`, if there is one, are made and not used.
    """

    drafter: Drafter | None
    sequences: np.ndarray = field(compare=False, repr=False)
    right: np.ndarray = field(compare=False, repr=False)

    def start(self, plan: Plan, input_ids: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
        prompts, texts = np.split(self.sequences, [self.sequences.shape[1] - self.right.shape[1]], axis=1)
        alike = (input_ids[:, None, -prompts.shape[1] :] == prompts).all(axis=2)
        right = np.where(self.right, texts, (texts + 1) % plan.shape.vocab)[alike.argmax(axis=1)]
        drafts = np.pad(right, ((0, 0), (0, plan.tokens_per_step))).astype(np.int32)
        kept, given = self.drafter.start(plan, input_ids, mask) if self.drafter else (None, None)
        return kept, (drafts, given)

    def propose(self, model: Any, plan: Plan, sampling: Sampling, groups: Sequence[Group], most: int) -> Proposal:
        inner = [group._replace(given=group.given[1]) for group in groups]
        made = self.drafter.propose(model, plan, sampling, inner, most) if self.drafter else None

        def drafted(state: Any) -> Drafted:
            recents, kept = [group.recent for group in groups], [group.turn.kept for group in groups]
            known = []
            for group in groups:
                places = group.recent.slots(most) - plan.workload.prompt + 1
                known.append(jnp.take_along_axis(group.given[0], places, axis=1, mode="clip"))
            if made:
                recents, drafts, kept = made.drafted(state)
                known, _ = jax.lax.optimization_barrier((known, drafts))  # or they would not be made
            return Drafted(recents, known, kept)

        return made._replace(drafted=drafted) if made else Proposal(None, None, drafted)

    def learn(self, turn: Turn, recent: Recent, taken: Any) -> Turn:
        return self.drafter.learn(turn, recent, taken) if self.drafter else turn

    def with_acceptance(self, acceptance: float, seed: int) -> "MadeUp":
        """The same, right with that probability at each token."""
        return replace(self, right=np.random.default_rng(seed).random(self.right.shape) < acceptance)
