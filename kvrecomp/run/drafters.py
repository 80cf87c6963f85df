"""Who proposes tokens. A drafter gives tokens, and nothing else depends on it: what is taken is checked in a step.

Sketch          the model itself, over a copy of its host blocks on the device that is smaller, and not exact
PromptLookup    what followed where the newest tokens stood before
Assistant       a smaller model of the same vocabulary, with a cache of its own on the device
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from kvrecomp.plan import Plan
from kvrecomp.run.cache import Recent, sketched
from kvrecomp.run.sampling import Rows, Sampling, draw
from kvrecomp.run.step import Blocks, decode_step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Turn:
    """Where the rows of a group are between rounds.

    `newest` int32[b] is each row's last token, not cached yet, and `left` int32[b] how many it may still take. `kept`
    is what the drafter keeps. Of `drafts` int32[b, most], made in the round before, the first `count` int32[] are to be
    checked; there are none where each round makes its own.
    """

    rows: Rows
    newest: Array
    left: Array
    kept: Any
    drafts: Array
    count: Array


class Group(NamedTuple):
    """What a round works on of a group; `given` is what its drafter needs that stays as it is."""

    blocks: Blocks
    sketches: Blocks
    recent: Recent
    turn: Turn
    given: Any


class Drafted(NamedTuple):
    """Of every group: what is recent, whose tails may have been written into where no row has tokens yet; drafts
    int32[b, most]; and what the drafter keeps."""

    recents: Sequence[Recent]
    drafts: Sequence[Array]
    kept: Sequence[Any]


class Proposal(NamedTuple):
    """Drafts on their way: a `state`, arrays in any structure, in which `step(number, state)` makes one draft more of
    every row, and what has been `drafted` in it in the end. So many steps `more` than drafts are to be done."""

    state: Any
    step: Callable[[Array, Any], Any] | None
    drafted: Callable[[Any], Drafted]
    more: int = 0

    def made(self, count: Array | int) -> Any:
        """The state after the steps of `count` int32[] drafts."""
        return self.part(count, 1, 0, self.state)

    def part(self, count: Array | int, parts: int, number: int, state: Any) -> Any:
        """The state after one part of these steps more, of so many parts."""
        if self.step is None:
            return state
        steps = count + self.more
        with jax.named_scope("draft"):
            first, end = (-(-each * steps // parts) for each in (number, number + 1))
            return jax.lax.fori_loop(first, end, self.step, state)


class Drafter(Protocol):
    """Traced in the program of a round; of drafters that are equal, programs are the same."""

    def start(self, plan: Plan, input_ids: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
        """What the drafter keeps of a group with prompts int[b, prompt], and what it is given: arrays, of NumPy's or on
        the device."""
        ...

    def propose(self, model: Any, plan: Plan, sampling: Sampling, groups: Sequence[Group], most: int) -> Proposal:
        """At most so many drafts of every group."""
        ...

    def learn(self, turn: Turn, recent: Recent, taken: Any) -> Turn:
        """A group's turn once each row has taken tokens, which `recent` and the turn count already."""
        ...


# --- the text itself --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptLookup:
    """Looks for the last tokens, as many of `longest` as stand in the row's text before, its prompt included, and
    drafts what followed them the last time. (Saxena 2023, "Prompt lookup decoding"; Hugging Face's
    `prompt_lookup_num_tokens`.)

    It keeps the texts, int32[b, slots].
    """

    longest: int = 3

    def start(self, plan: Plan, input_ids: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
        texts = np.full((len(input_ids), plan.workload.prompt + plan.workload.new), -1, np.int32)  # -1 is no token
        texts[:, : plan.workload.prompt] = np.where(mask, input_ids, -1)
        return texts, None

    def propose(self, model: Any, plan: Plan, sampling: Sampling, groups: Sequence[Group], most: int) -> Proposal:
        kept = [_written(turn.kept, recent.slots(1), turn.newest[:, None]) for _, _, recent, turn, _ in groups]
        recents = [group.recent for group in groups]
        drafts = [self._following(texts, recent.lengths, most) for texts, recent in zip(kept, recents, strict=True)]
        return Proposal(None, None, lambda _: Drafted(recents, drafts, kept))

    def _following(self, texts: Array, newest: Array, most: int) -> Array:
        """int32[b, most], for texts whose newest tokens are in slots int32[b]."""
        slots = jnp.arange(texts.shape[1])
        # How many of the last tokens stand in each slot and before it.
        alike, matched = jnp.zeros(texts.shape, jnp.int32), slots < newest[:, None]
        for back in range(self.longest):
            own = jnp.take_along_axis(texts, newest[:, None] - back, axis=1, mode="clip")
            matched &= (jnp.roll(texts, back, axis=1) == own) & (own >= 0) & (slots >= back)
            alike += matched
        found = jnp.argmax(alike * texts.shape[1] + slots, axis=1)  # the last one of the longest
        period = jnp.maximum(newest - found, 1)[:, None]  # a text that repeats itself goes on as it was
        following = jnp.take_along_axis(texts, found[:, None] + 1 + jnp.arange(most) % period, axis=1, mode="clip")
        own = jnp.take_along_axis(texts, newest[:, None], axis=1, mode="clip")
        return jnp.where((alike.max(axis=1) > 0)[:, None], jnp.maximum(following, 0), own)

    def learn(self, turn: Turn, recent: Recent, taken: Any) -> Turn:
        slots = recent.slots(taken.tokens.shape[1]) - taken.counts[:, None] + 1
        return replace(turn, kept=_written(turn.kept, slots, taken.tokens))


def _written(texts: Array, slots: Array, tokens: Array) -> Array:
    """Texts with tokens int32[b, q] in slots int32[b, q]; what is beyond their end is left out."""
    rows = jnp.arange(len(texts))[:, None]
    return texts.at[rows, slots].set(tokens, mode="drop", wrap_negative_indices=False)


# --- models -----------------------------------------------------------------------------------------------------------


Written = tuple[list[Recent], list[Array]]
"""Of every group: what is recent, with the tokens so far in the tails, and int32[b, 1 + most], each row's newest token
and those drafted after it."""


@dataclass(frozen=True)
class Sketch:
    """The model itself, over what `plan.sketched` has in place of its host blocks. The pass that follows writes over
    what it wrote into the tails."""

    def start(self, plan: Plan, input_ids: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
        return None, None

    def propose(self, model: Any, plan: Plan, sampling: Sampling, groups: Sequence[Group], most: int) -> Proposal:
        blocks = [[sketched(*layer) for layer in zip(group.blocks, group.sketches, strict=True)] for group in groups]
        recents, turns = [group.recent for group in groups], [group.turn for group in groups]
        state, step = _one_by_one(model, plan.sketched or plan, sampling, blocks, recents, turns, most)

        def drafted(state: Written) -> Drafted:
            return Drafted(state[0], [tokens[:, 1:] for tokens in state[1]], [None] * len(groups))

        return Proposal(state, step, drafted)

    def learn(self, turn: Turn, recent: Recent, taken: Any) -> Turn:
        return turn


@dataclass(frozen=True, eq=False)
class Assistant:
    """Another model, whose `prefilled` gives the cache of a group's prompts, under a plan that has all of it on the
    device and a tail for all new tokens. It keeps what is recent; its weights and blocks are given."""

    graph: Any = field(repr=False)
    structure: Any = field(repr=False)
    weights: Sequence[Array] = field(repr=False)
    plan: Plan
    prefilled: Any = field(repr=False)

    def start(self, plan: Plan, input_ids: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
        cache = self.prefilled(input_ids, mask)
        return cache.recent, (self.weights, cache.blocks)

    def propose(self, model: Any, plan: Plan, sampling: Sampling, groups: Sequence[Group], most: int) -> Proposal:
        weights, _ = groups[0].given
        own = nnx.merge(self.graph, jax.tree.unflatten(self.structure, weights))
        blocks, turns = [group.given[1] for group in groups], [group.turn for group in groups]
        # What rows took, it has cached, and what they did not take, it writes over.
        recents = [replace(group.turn.kept, lengths=group.recent.lengths) for group in groups]
        state, step = _one_by_one(own, self.plan, sampling, blocks, recents, turns, most + 1)

        def drafted(state: Written) -> Drafted:
            return Drafted([group.recent for group in groups], [tokens[:, 1:-1] for tokens in state[1]], state[0])

        # One step more: where all drafts are right, the last one is to be cached as well.
        return Proposal(state, step, drafted, more=1)

    def learn(self, turn: Turn, recent: Recent, taken: Any) -> Turn:
        return turn


def _as_laid_out(array: Array) -> Array:
    return with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))


def _one_by_one(
    model: Any,
    plan: Plan,
    sampling: Sampling,
    blocks: Sequence[Blocks],
    recents: Sequence[Recent],
    turns: Sequence[Turn],
    most: int,
) -> tuple[Written, Callable[[Array, Written], Written] | None]:
    """What at most so many steps of one token of every row begin with, and the step, which drafts the token that the
    sampler takes."""
    # What is not drafted goes through the pass as well: a token that the row has, or what is no number may come of it.
    begun = [jnp.broadcast_to(turn.newest[:, None], (len(turn.newest), 1 + most)) for turn in turns]

    def step(number: Array, state: Written) -> Written:
        recents, drafted = state
        # Within a loop XLA would have them in other layouts, and copy all layers' before it.
        own = jax.tree.map(_as_laid_out, blocks)
        ahead = [replace(recent, lengths=recent.lengths + number) for recent in recents]
        newest = [jax.lax.dynamic_slice_in_dim(tokens, number, 1, axis=1) for tokens in drafted]
        after, logits, _ = decode_step(model, plan, own, ahead, newest)
        found = [
            draw(sampling, turn.rows.keys, turn.rows.positions + number, of_group[:, 0])[0]
            for turn, of_group in zip(turns, logits, strict=True)
        ]
        recents = [replace(own, lengths=recent.lengths) for own, recent in zip(after, recents, strict=True)]
        drafted = [
            jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], number + 1, axis=1)
            for tokens, token in zip(drafted, found, strict=True)
        ]
        return recents, drafted

    return (list(recents), begun), step if most else None
