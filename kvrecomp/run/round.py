"""A round: tokens are drafted, one step checks them, and each row takes those that are right and the one after them.

A draft is right where it is the token that the sampler takes there, from the logits of the step and with the random
numbers of that row and position. So texts are those of decoding without drafts, token for token, whoever drafts and
however tokens are chosen; but logits of several tokens a step are rounded a little differently. (Daliri et al. 2024,
"Coupling without communication and drafter-invariant speculative decoding".)
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from kvrecomp.plan import Plan
from kvrecomp.plan.step_order import DRAFT_PARTS
from kvrecomp.run.cache import Recent
from kvrecomp.run.drafters import Drafter, Group, Turn
from kvrecomp.run.model import Model
from kvrecomp.run.sampling import Rows, Sampling, draw
from kvrecomp.run.step import UnderCopies, decode_step


@dataclass(frozen=True)
class Rounds:
    """How rounds are carried out: who drafts, how tokens are chosen, `ends`, the number of tokens that end a row, and
    whether logits are wanted.

    The arrays that all of them use: what is `given` to the drafter of each group, and those `eos` int32[ends]. `turn`
    describes a group's `Turn`. All three are data: programs are known by the rest.
    """

    drafter: Drafter
    sampling: Sampling
    ends: int
    output_logits: bool
    given: Sequence[Any] = field(compare=False, repr=False)
    eos: Array = field(compare=False, repr=False)
    turn: Turn = field(compare=False, repr=False)


class Taken(NamedTuple):
    """What a round found of a group: tokens int32[b, q], NO_TOKEN where logits were NaN or infinite, of which each row
    takes the first `counts` int32[b]; how many it may take after that, `left` int32[b], none if it has ended; and, if
    asked for, the logits float32[b, q, vocab] that tokens are chosen by. Of each row `drafts` int32[] were checked."""

    tokens: Array
    counts: Array
    left: Array
    logits: Array | None
    drafts: Array


def decode_round(
    model: Model, plan: Plan, rounds: Rounds, groups: Sequence[Group], eos: Array, count: Array, most: int
) -> tuple[list[Recent], list[Turn], list[Taken]]:
    """One round of every group, with `count` int32[] drafts of each row, `most` at most.

    A row ends with any token of int32[ends] `eos`, or when it may take no more; a row that has ended takes none.

    With drafts under copies there are two groups: the first has its drafts and is checked, and meanwhile as many as may
    be are made of the second.
    """
    if plan.drafts_under_copies:
        return _under_copies(model, plan, rounds, groups, eos, most)
    proposal = rounds.drafter.propose(model, plan, rounds.sampling, groups, most)
    recents, drafts, kept = proposal.drafted(proposal.made(count))
    turns = [replace(group.turn, kept=own) for group, own in zip(groups, kept, strict=True)]
    blocks = [group.blocks for group in groups]
    recents, logits, _ = decode_step(model, plan, blocks, recents, list(map(_tokens, turns, drafts)))
    each_group = zip(recents, turns, drafts, logits, strict=True)
    after = [_take(plan, rounds, *group, count, eos) for group in each_group]
    recents, turns, taken = map(list, zip(*after))
    return recents, turns, taken


def _under_copies(
    model: Model, plan: Plan, rounds: Rounds, groups: Sequence[Group], eos: Array, count: int
) -> tuple[list[Recent], list[Turn], list[Taken]]:
    checked, drafted = groups
    proposal = rounds.drafter.propose(model, plan, rounds.sampling, [drafted], count)
    under_copies = UnderCopies(functools.partial(proposal.part, count, DRAFT_PARTS), proposal.state)
    drafts = checked.turn.drafts[:, :count]
    tokens = _tokens(checked.turn, drafts)
    (recent,), (logits,), state = decode_step(model, plan, [checked.blocks], [checked.recent], [tokens], under_copies)
    recent, turn, taken = _take(plan, rounds, recent, checked.turn, drafts, logits, checked.turn.count, eos)
    (ahead,), (drafts,), (kept,) = proposal.drafted(state)
    drafts = drafted.turn.drafts.at[:, :count].set(drafts)
    return [recent, ahead], [turn, replace(drafted.turn, kept=kept, drafts=drafts, count=jnp.int32(count))], [taken]


def _tokens(turn: Turn, drafts: Array) -> Array:
    """Those that a pass checks, int32[b, q], the first of them each row's newest."""
    return jnp.concatenate([turn.newest[:, None], drafts], axis=1)


def _take(
    plan: Plan,
    rounds: Rounds,
    recent: Recent,
    turn: Turn,
    drafts: Array,
    logits: Array,
    count: Array,
    eos: Array,
) -> tuple[Recent, Turn, Taken]:
    """What each row takes of the first `count` of its drafts, int32[b, q - 1], by the logits [b, q, vocab]."""
    (batch, tokens, _), rows = logits.shape, turn.rows
    positions = rows.positions[:, None] + jnp.arange(tokens)
    every = jnp.repeat(rows.keys, tokens), positions.reshape(-1), logits.reshape(batch * tokens, -1)
    found, reports = (each.reshape(batch, tokens) for each in draw(rounds.sampling, *every))
    right = (drafts == found[:, :-1]) & (jnp.arange(tokens - 1) < count)
    counts = 1 + jnp.cumprod(right, axis=1, dtype=jnp.int32).sum(axis=1)
    ends = jnp.isin(found, eos)
    to_end = 1 + jnp.where(ends.any(axis=1), ends.argmax(axis=1), tokens).astype(jnp.int32)
    fitting = recent.start + plan.room - recent.lengths  # of those further on, K and V were not in the tail
    counts = jnp.minimum(jnp.minimum(counts, to_end), jnp.minimum(turn.left, fitting))
    counts = jnp.where(rows.finished, 0, jnp.maximum(counts, 0))
    last = jnp.take_along_axis(found, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
    left = turn.left - counts
    after = Rows(rows.keys, rows.positions + counts, rows.finished | (counts == to_end) | (left <= 0))
    turn = replace(turn, rows=after, newest=jnp.where(counts > 0, last, turn.newest), left=left)
    left = jnp.where(turn.rows.finished, 0, left)
    checked = jnp.minimum(count, tokens - 1)
    taken = Taken(reports, counts, left, logits if rounds.output_logits else None, checked)
    recent = replace(recent, lengths=recent.lengths + counts)
    return recent, rounds.drafter.learn(turn, recent, taken), taken
