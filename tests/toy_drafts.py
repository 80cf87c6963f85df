"""Rounds of toy models: plans with drafts, drafts that are right where a test says so, and decoding with them."""

from dataclasses import replace

import numpy as np
import toy

import kvrecomp
from experiments.support.made_up import MadeUp
from kvrecomp.generate import TokenLoop
from kvrecomp.plan import Workload
from kvrecomp.run.programs import KeptPrograms
from kvrecomp.run.sampling import Sampling

BATCH, PROMPT, NEW, TAIL = 3, 11, 14, 4
TEXTS = toy.texts(BATCH, PROMPT, longest_padding=PROMPT - 1)
SAMPLED = Sampling(True, 0.9, top_k=30, top_p=0.95, seed=5)
KEPT = KeptPrograms(50)  # of plans that several tests have


def known(texts, right, prompts=TEXTS.ids):
    """Drafts that are right where `right` [rows, new] says so: of the texts, new tokens int32[rows, new], that will be
    written, one more or less."""
    return MadeUp(None, np.concatenate([prompts, texts], axis=1), right)


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
