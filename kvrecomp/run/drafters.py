"""Who proposes tokens. A drafter gives tokens, and nothing else depends on it: what is taken is checked in a step.

Sketch          the model itself, over a copy of its host blocks on the device that is smaller, and not exact
PromptLookup    what followed where the newest tokens stood before
Assistant       a smaller model of the same vocabulary, with a cache of its own on the device
"""

from collections.abc import Sequence
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
    is what the drafter keeps.
    """

    rows: Rows
    newest: Array
    left: Array
    kept: Any


class Group(NamedTuple):
    """What a round works on of a group; `given` is what its drafter needs that stays as it is."""

    blocks: Blocks
    sketches: Blocks
    recent: Recent
    turn: Turn
    given: Any


Drafted = tuple[list[Recent], list[Array], list[Any]]
"""Of every group: what is recent, whose tails may have been written into where no row has tokens yet; the newest token
of each row and drafts, int32[b, 1 + most]; and what the drafter keeps."""


class Drafter(Protocol):
    """Traced in the program of a round; of drafters that are equal, programs are the same."""

    def start(self, plan: Plan, input_ids: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
        """What the drafter keeps of a group with prompts int[b, prompt], and what it is given: arrays, of NumPy's or on
        the device."""
        ...

    def draft(
        self, model: Any, plan: Plan, sampling: Sampling, groups: Sequence[Group], count: Array, most: int
    ) -> Drafted:
        """Drafts of every group, of which the first `count` int32[] are used."""
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

    def draft(
        self, model: Any, plan: Plan, sampling: Sampling, groups: Sequence[Group], count: Array, most: int
    ) -> Drafted:
        kept, drafted = [], []
        for _, _, recent, turn, _ in groups:
            texts, newest = _written(turn.kept, recent.slots(1), turn.newest[:, None]), turn.newest[:, None]
            kept.append(texts)
            drafted.append(jnp.concatenate([newest, self._following(texts, recent.lengths, most)], axis=1))
        return [group.recent for group in groups], drafted, kept

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


@dataclass(frozen=True)
class Sketch:
    """The model itself, over what `plan.sketched` has in place of its host blocks. The pass that follows writes over
    what it wrote into the tails."""

    def start(self, plan: Plan, input_ids: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
        return None, None

    def draft(
        self, model: Any, plan: Plan, sampling: Sampling, groups: Sequence[Group], count: Array, most: int
    ) -> Drafted:
        blocks = [[sketched(*layer) for layer in zip(group.blocks, group.sketches, strict=True)] for group in groups]
        recents, turns = [group.recent for group in groups], [group.turn for group in groups]
        recents, drafted = _one_by_one(model, plan.sketched or plan, sampling, blocks, recents, turns, count, most)
        return recents, drafted, [None] * len(groups)

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

    def draft(
        self, model: Any, plan: Plan, sampling: Sampling, groups: Sequence[Group], count: Array, most: int
    ) -> Drafted:
        weights, _ = groups[0].given
        own = nnx.merge(self.graph, jax.tree.unflatten(self.structure, weights))
        blocks, turns = [group.given[1] for group in groups], [group.turn for group in groups]
        # What rows took, it has cached, and what they did not take, it writes over.
        recents = [replace(group.turn.kept, lengths=group.recent.lengths) for group in groups]
        # One step more: where all drafts are right, the last one is to be cached as well.
        kept, drafted = _one_by_one(own, self.plan, sampling, blocks, recents, turns, count + 1, most + 1)
        return [group.recent for group in groups], [tokens[:, :-1] for tokens in drafted], kept

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
    count: Array,
    most: int,
) -> tuple[list[Recent], list[Array]]:
    """`count` steps of one token each of every row -> what is recent with these in the tails, and int32[b, 1 + most],
    each row's newest token and those that the sampler takes after it."""
    starts = [turn.newest for turn in turns]
    # What is not drafted goes through the pass as well: a token that the row has, or what is no number may come of it.
    drafted = [jnp.broadcast_to(newest[:, None], (len(newest), 1 + most)) for newest in starts]
    if not most:
        return list(recents), drafted

    def step(number: Array, state: tuple[list[Recent], list[Array]]) -> tuple[list[Recent], list[Array]]:
        recents, drafted = state
        # Within a loop XLA would have them in other layouts, and copy all layers' before it.
        own = jax.tree.map(_as_laid_out, blocks)
        ahead = [replace(recent, lengths=recent.lengths + number) for recent in recents]
        newest = [jax.lax.dynamic_slice_in_dim(tokens, number, 1, axis=1) for tokens in drafted]
        after, logits = decode_step(model, plan, own, ahead, newest)
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

    with jax.named_scope("draft"):
        return jax.lax.fori_loop(0, count, step, (list(recents), drafted))
