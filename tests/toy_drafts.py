"""Rounds of toy models: plans with drafts, drafts that are right where a test says so, and decoding with them."""

from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np
import toy

import kvrecomp
from kvrecomp.generate import TokenLoop
from kvrecomp.plan import Workload
from kvrecomp.run.programs import KeptPrograms
from kvrecomp.run.sampling import Sampling

BATCH, PROMPT, NEW, TAIL = 3, 11, 14, 4
TEXTS = toy.texts(BATCH, PROMPT, longest_padding=PROMPT - 1)
SAMPLED = Sampling(True, 0.9, top_k=30, top_p=0.95, seed=5)
KEPT = KeptPrograms(50)  # of plans that several tests have


@dataclass(frozen=True, eq=False)
class Known:
    """Drafts that are right where `right` [rows, new] says so: of the texts, new tokens int32[rows, new], that will be
    written, one more or less."""

    texts: np.ndarray = field(repr=False)  # data, in no program
    right: np.ndarray = field(repr=False)

    def start(self, plan, input_ids, mask):
        wrong = (self.texts + 1) % plan.shape.vocab
        room = ((0, 0), (0, plan.tokens_per_step))
        return None, np.pad(np.where(self.right, self.texts, wrong), room).astype(np.int32)

    def draft(self, model, plan, sampling, groups, count, most):
        drafted = []
        for group in groups:
            places = group.recent.slots(most) - plan.workload.prompt + 1
            drafts = jnp.take_along_axis(group.given, places, axis=1, mode="clip")
            drafted.append(jnp.concatenate([group.turn.newest[:, None], drafts], axis=1))
        return [group.recent for group in groups], drafted, [None] * len(groups)

    def learn(self, turn, recent, taken):
        return turn


def make_plan(name="split:0.5", kind="opt", drafting=None, new=NEW, batch=BATCH, **changes):
    plan = kvrecomp.named_plan(name, toy.model(kind).shape, Workload(batch, PROMPT, new), tail=TAIL)
    return replace(plan, drafting=drafting, **changes)


def make_loop(plan, drafter=None, sampling=None, model=None, eos=(), **options):
    """As many drafts in each round as the plan has, or what `drafts` says."""
    options = {"drafts": plan.drafting and plan.drafting.most} | options
    decoder = kvrecomp.Decoder(model or toy.model(), plan, kept=KEPT)
    return TokenLoop(decoder, sampling or Sampling(), list(eos), 0, drafter=drafter, **options)


def run(plan, drafter=None, sampling=None, kind="opt", texts=TEXTS, new=None, **options):
    loop = make_loop(plan, drafter, sampling, **{"model": toy.model(kind)} | options)
    return loop.run(texts.ids, texts.mask, new or plan.workload.new)


def written(result, new=NEW):
    """The new tokens, padded to so many."""
    tokens = result.sequences[:, PROMPT:]
    return np.pad(tokens, ((0, 0), (0, new - tokens.shape[1])))


def assert_alike(found, expected):
    np.testing.assert_array_equal(found.sequences, expected.sequences)
    np.testing.assert_array_equal(found.new_tokens, expected.new_tokens)
