"""The token loop: prompts in, continuations out.

Steps are dispatched in a thread of their own, before the tokens of earlier ones have reached the host, so the device
never waits for Python. Stopping is therefore seen late; the results of steps dispatched by then are dropped.
"""

import collections
import numbers
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import Array

from kvrecomp.acceptance import keep, with_acceptance
from kvrecomp.auto import plan_for
from kvrecomp.background import BackgroundIterator
from kvrecomp.drafts import Pace, as_drafting, check_drafting, make_drafter, without_assistant
from kvrecomp.plan import AUTO, Budget, Drafting, Loss, Plan, PlanError, Workload
from kvrecomp.plan.footprint import weights_in
from kvrecomp.predict.hardware import HardwareProfile
from kvrecomp.progress import StepBar
from kvrecomp.run import memory
from kvrecomp.run.cache import Cache, describe_like
from kvrecomp.run.decoder import Decoder
from kvrecomp.run.drafters import Drafter, Turn
from kvrecomp.run.limits import limits
from kvrecomp.run.model import Model, check_parts
from kvrecomp.run.programs import KeptPrograms, as_by_default
from kvrecomp.run.prompt import as_ids, as_mask, as_row_ids, as_token_ids, check_tokens, split_groups
from kvrecomp.run.round import Rounds
from kvrecomp.run.sampling import Rows, Sampling, choose, start_rows
from kvrecomp.run.weights import weight_memories
from kvrecomp.texts import Texts

LEAD = 2  # unread steps: one that runs and one that waits
_KEPT = KeptPrograms(4)  # of calls with so many plans


class Streamer(Protocol):
    """Gets tokens as they come, as Hugging Face's streamers do: first the prompt, then int32[batch], the next token of
    every row once all rows have theirs. Rows that have ended are padded."""

    def put(self, value: np.ndarray) -> None: ...

    def end(self) -> None: ...


@dataclass
class Generated:
    """What `generate` returns.

    `sequences` int32[batch, prompt + new] are prompts and continuations, padded where a row ended before others;
    `new_tokens` int32[batch] counts each row's, its end token included. The `plan`'s prompts may be longer than these.
    `logits` float32[new, batch, vocab] if asked for; they mean nothing where a row had ended. `prefill_seconds`
    includes compiling; `step_seconds` are the times of the steps, or of the rounds, and `link_bytes` the bytes that
    each of them copied from the host, of blocks and of weights. `passes` int32[batch] counts those that each row took
    part in, `drafted` int32[batch] the drafts that these checked of it, and `tried` int32[batch] those up to the first
    wrong one of each; `taken` int32[passes, batch] are the tokens that each row took in each, 0 once it had ended.
    """

    sequences: np.ndarray
    new_tokens: np.ndarray
    plan: Plan
    passes: np.ndarray
    drafted: np.ndarray
    tried: np.ndarray
    taken: np.ndarray
    logits: np.ndarray | None = None
    prefill_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    link_bytes: list[int] = field(default_factory=list)

    @property
    def tokens_per_pass(self) -> np.ndarray:
        """float64[batch]: tokens that each row took in a pass, in the mean, after the first token."""
        return (self.new_tokens - 1) / np.maximum(self.passes, 1)

    @property
    def accepted(self) -> np.ndarray:
        """int64[batch]: how many drafts of each row were taken."""
        return np.maximum(self.taken - 1, 0).sum(axis=0)

    @property
    def acceptance(self) -> np.ndarray:
        """float64[batch]: the share of each row's drafts that were taken; NaN where there were none."""
        return np.where(self.drafted > 0, self.accepted / np.maximum(self.drafted, 1), np.nan)


def generate(
    model: Model,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int = 128,
    plan: Plan | str = AUTO,
    budget: Budget | None = None,
    profile: HardwareProfile | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    row_ids: Any = None,
    streamer: Streamer | None = None,
    output_logits: bool = False,
    prompt_lookup_num_tokens: int | None = None,
    assistant_model: Model | None = None,
    num_assistant_tokens: int | None = None,
    drafts: int | None = None,
    loss: Loss = "none",
) -> Generated:
    """Continues prompts int[batch, prompt], left-padded where `attention_mask` is 0, by up to `max_new_tokens`.

    `plan` is a `Plan` or the name of one: `auto`, the fastest on this machine within `budget`, which may decode the
    rows in groups, or one of `kvrecomp.named_plan`. Prompts shorter than a `Plan` is for are padded on the left.
    `profile` describes this machine, which is measured if it never was. `row_ids` int[batch] name the rows when
    sampling, by default 0, 1, ...: a row that keeps its id keeps its text in any batch. What is compiled is kept for
    later calls with the same plan, the weights that the model has then being used.

    Several tokens are checked in a step where some are drafted: `prompt_lookup_num_tokens` that followed the newest
    ones before in the row's text, or `num_assistant_tokens` (default 8) by an `assistant_model` of the same vocabulary,
    which is on the device. Or the model itself drafts over a smaller copy of its cache, where `auto` predicts that to
    pay, by how often they were right in earlier calls. `drafts` fixes their number in a round, 0 for none; by default
    it goes by how often they are right. The text is the one without drafts.

    `loss` lets `auto` write blocks in 8 or 4 bits a number, `int8` or `int4`, which changes logits: see
    experiments/quality.py for how much. New tokens are as they are until their tail is written out; `drafts` that are
    asked for change when that is, and the text with it.

    Raises `PromptError` for prompts that cannot be decoded, `PlanError` for a plan that does not fit or a profile of
    another machine, ValueError for sampling options out of range, and FloatingPointError where logits are NaN or
    infinite.
    """
    sampling = Sampling(do_sample, temperature, top_k, top_p, seed)
    if not isinstance(max_new_tokens, numbers.Integral) or max_new_tokens < 1:
        raise PlanError(f"max_new_tokens is {max_new_tokens!r}: ask for at least one, a whole number")
    if not isinstance(plan, (str, Plan)):
        raise PlanError(f"the plan is {plan!r}; expected a Plan, or the name of one")
    eos, pads = as_token_ids("eos_token_id", eos_token_id), as_token_ids("pad_token_id", pad_token_id)
    check_parts(model)
    drafting = as_drafting(prompt_lookup_num_tokens, assistant_model, num_assistant_tokens, drafts, plan)
    ids = as_ids(input_ids)
    check_tokens(ids, as_mask(attention_mask, ids), model.shape.vocab)  # before anything that takes long
    batch, prompt = ids.shape
    if isinstance(plan, str):
        work, placed = Workload(batch, prompt, max_new_tokens), weight_memories(model)
        if assistant_model is not None and isinstance(drafting, Drafting):
            allowed = Budget(**limits(budget or Budget(), weights_in(model.shape, placed)))
            shapes = model.shape, assistant_model.shape
            budget = without_assistant(allowed, *shapes, work, drafting.most, loaded=True)
        known = with_acceptance(model.shape, drafting)
        options = {"budget": budget, "profile": profile, "weights": placed, "groups": None, "drafting": known}
        plan = plan_for(plan, model.shape, work, loss=loss, **options)
    elif loss != "none":
        raise PlanError(f"loss is {loss!r} and plan {plan.name} is given, whose blocks have codecs: leave loss out")
    else:
        check_drafting(plan, drafting)
    decoder = Decoder(model, plan, budget=budget, kept=_KEPT)
    drafter = make_drafter(plan, assistant_model) if drafts != 0 else None
    loop = TokenLoop(
        decoder, sampling, eos, (*pads, *eos, 0)[0], streamer, output_logits, drafter=drafter, drafts=drafts
    )
    result = loop.run(input_ids, attention_mask, max_new_tokens, row_ids)
    keep(model.shape, plan.drafting, int(result.accepted.sum()), int(result.tried.sum()))
    return result


class _Dispatched(NamedTuple):
    """Tokens on their way, by group: ids int32[b, q], of which rows take `counts` int32[b], or all where there are
    none; logits float32[b, q, vocab] if asked for. And the bytes that their step copies, and how many drafts, int32[],
    it checks of each row.
    """

    tokens: list[Array]
    logits: list[Array]
    counts: list[Array] | None = None
    link_bytes: int = 0
    drafts: list[Array] | None = None


@dataclass
class TokenLoop:
    """Prefill, then steps until every row has ended or has `max_new_tokens`; `eos` ids end a row, `pad` fills it.

    `drafter` proposes tokens where the plan has drafts, `drafts` of them in a round, or as many as it has. `progress`
    shows the steps on a terminal.
    """

    decoder: Decoder
    sampling: Sampling
    eos: Sequence[int]
    pad: int
    streamer: Streamer | None = None
    output_logits: bool = False
    progress: bool = True
    drafter: Drafter | None = None
    drafts: int | None = None

    def run(self, input_ids: Any, attention_mask: Any, max_new_tokens: int, row_ids: Any = None) -> Generated:
        """See `generate`. Raises `PlanError` if the decoder's plan is for fewer new tokens."""
        if not 0 < max_new_tokens <= self.decoder.plan.workload.new:
            raise PlanError(
                f"max_new_tokens is {max_new_tokens}, the plan is for {self.decoder.plan.workload.new} new tokens: "
                "ask for at least one, or make a plan with a larger Workload.new"
            )
        ids = as_ids(input_ids)
        parts, rows = split_groups(ids, attention_mask, self.decoder.plan), as_row_ids(row_ids, len(ids))
        prompt = ids.astype(np.int32)
        texts = Texts(len(prompt), max_new_tokens, self.eos, self.pad)
        link_bytes, arrivals = [], [time.perf_counter()]
        if self.streamer is not None:
            self.streamer.put(prompt)
        dispatched = BackgroundIterator(self._dispatch(parts, max_new_tokens, rows), LEAD)
        try:
            with StepBar("decoding", max_new_tokens, self.progress) as advance, dispatched.reading, dispatched as steps:
                for step in steps:
                    tokens = _of_groups(step.tokens)
                    arrivals.append(time.perf_counter())
                    counts = _of_groups(step.counts) if step.counts else np.ones(len(tokens), int)
                    logits = _of_groups(step.logits) if step.logits else None
                    drafts = _of_rows(step.drafts, len(tokens)) if step.drafts else np.zeros(len(tokens), int)
                    new = texts.add(tokens, counts, logits, drafts)
                    link_bytes.append(step.link_bytes)
                    for column in new:
                        if self.streamer is not None:
                            self.streamer.put(column)
                        advance()
                    if texts.complete:
                        break
        finally:
            self.decoder.finish()  # what was to be compiled ahead would delay others, and the exit
        if self.streamer is not None:
            self.streamer.end()
        seconds = np.diff(arrivals)
        return Generated(
            sequences=np.concatenate([prompt, texts.tokens[:, : texts.longest]], axis=1),
            new_tokens=texts.counts.astype(np.int32),
            plan=self.decoder.plan,
            passes=texts.passes,
            drafted=texts.drafted,
            tried=texts.tried,
            taken=np.array(texts.taken[1:], np.int32).reshape(-1, len(prompt)),
            logits=texts.logits[: texts.longest] if texts.logits is not None else None,
            prefill_seconds=float(seconds[0]),
            step_seconds=seconds[1:].tolist(),
            link_bytes=link_bytes[1:],
        )

    def compile(self, input_ids: Any, attention_mask: Any = None) -> None:
        """Compiles what a run with such prompts starts with."""
        parts = split_groups(input_ids, attention_mask, self.decoder.plan)
        names, eos = np.zeros(self.decoder.plan.workload.batch, np.uint32), np.asarray(self.eos, np.int32)
        given = jax.device_put((eos, names), memory.sharding("device"))
        self.decoder.compile(rounds=self._start_rounds(self.drafter, parts, *given)[0] if self.drafter else None)

    def _dispatch(
        self, parts: Sequence[tuple[np.ndarray, np.ndarray]], max_new_tokens: int, row_ids: np.ndarray
    ) -> Generator[_Dispatched, None, None]:
        """Prefill, then steps or rounds, as they are dispatched. Nothing here waits for the device, but for what a
        packed prompt or tail says of itself, and for what was taken in a round before the last one."""
        decoder = self.decoder
        given = np.asarray(self.eos, np.int32), np.int32(self.pad), np.uint32(self.sampling.seed)
        eos, pad, seed, names = jax.device_put((*given, np.split(row_ids, len(parts))), memory.sharding("device"))
        rounds, kept = self._start_rounds(self.drafter, parts, eos, names[0]) if self.drafter else (None, [])
        decoder.compile(rounds=rounds)
        prefilled: list[tuple[Cache, Array]] = []
        while len(prefilled) < len(parts):
            plan = decoder.plan
            prefilled.append(decoder.prefill(*parts[len(prefilled)]))
            if decoder.plan is not plan and len(prefilled) > 1:  # blocks could not be packed; those before were
                prefilled.clear()
        caches, logits = map(list, zip(*prefilled))
        del prefilled  # and the logits with it, once they are used
        recents = [cache.recent for cache in caches]
        with as_by_default():
            rows = [start_rows(seed, row, recent.lengths, recent.padding) for row, recent in zip(names, recents)]
        rows, tokens, first = self._choose(eos, pad, rows, logits, 0)
        del logits  # or a step's own would be beside them
        yield first
        left = max_new_tokens - 1
        if rounds is None:
            yield from self._steps(caches, rows, tokens, left, eos, pad)
        else:
            yield from self._rounds(caches, rows, tokens, left, rounds, kept)

    def _choose(
        self, eos: Array, pad: Array, rows: Sequence[Rows], logits: Sequence[Array], sent: int
    ) -> tuple[list[Rows], list[Array], _Dispatched]:
        """The next token of every row, on the device and on its way to the host."""
        with as_by_default():
            chosen = [choose(self.sampling, eos, pad, *group) for group in zip(rows, logits)]
        rows, tokens, reports = map(list, zip(*chosen))
        arriving = (reports, list(logits) if self.output_logits else [])
        jax.tree.map(lambda array: array.copy_to_host_async(), arriving)
        return rows, tokens, _Dispatched(*arriving, link_bytes=sent)

    def _steps(
        self,
        caches: Sequence[Cache],
        rows: Sequence[Rows],
        tokens: Sequence[Array],
        left: int,
        eos: Array,
        pad: Array,
    ) -> Generator[_Dispatched, None, None]:
        """So many steps, of one token each."""
        for number in range(left):
            caches, logits = self.decoder.step_groups(caches, tokens)
            sent = self.decoder.plan.link_bytes(number // self.decoder.plan.tail)
            rows, tokens, dispatched = self._choose(eos, pad, rows, logits, sent)
            del logits
            yield dispatched

    def _start_rounds(
        self, drafter: Drafter, parts: Sequence[tuple[np.ndarray, np.ndarray]], eos: Array, names: Array
    ) -> tuple[Rounds, list[Any]]:
        """How rounds are carried out, and what the drafter keeps of each group."""
        started = [drafter.start(self.decoder.plan, *part) for part in parts]
        kept, given = jax.block_until_ready(jax.device_put(tuple(map(list, zip(*started))), memory.sharding("device")))
        ints = jax.ShapeDtypeStruct(names.shape, np.int32)
        rows = jax.eval_shape(start_rows, jax.ShapeDtypeStruct((), np.uint32), names, ints, ints)
        turn = Turn(*describe_like((rows, ints, ints, kept[0], *self._no_drafts())))
        sampling = replace(self.sampling, seed=0)  # it is in the rows' keys, and in no program
        return Rounds(drafter, sampling, len(eos), self.output_logits, given, eos, turn), kept

    def _no_drafts(self) -> tuple[Array, Array]:
        """What a group's turn has of drafts before the first round."""
        plan = self.decoder.plan
        most = plan.tokens_per_step - 1 if plan.drafts_under_copies else 0
        drafts = np.zeros((plan.workload.batch, most), np.int32)
        return jax.device_put((drafts, np.int32(0)), memory.sharding("device"))

    def _rounds(
        self,
        caches: Sequence[Cache],
        rows: Sequence[Rows],
        newest: Sequence[Array],
        left: int,
        rounds: Rounds,
        kept: Sequence[Any],
    ) -> Generator[_Dispatched, None, None]:
        """Rounds, until every row has ended or has taken `left` tokens. What rows took is read once the device has LEAD
        rounds to do; where the first of these may be the last, before the second is begun."""
        decoder, plan = self.decoder, self.decoder.plan
        pace = Pace(plan)
        remaining, cached = (np.full(sum(map(len, newest)), start) for start in (left, 0))
        lefts = [jax.device_put(np.full(len(tokens), left, np.int32), memory.sharding("device")) for tokens in newest]
        turns: Sequence[Turn] = [Turn(*of_group, *self._no_drafts()) for of_group in zip(rows, newest, lefts, kept)]
        del rows, newest, lefts, kept  # they are used up
        unread: collections.deque[tuple[list[Array], list[Array], list[Array], int, int]] = collections.deque()
        while (remaining > 0).any():
            if not unread or (len(unread) < LEAD and remaining.max() > sum(1 + drafts for *_, drafts, _ in unread)):
                drafts = pace.drafts() if self.drafts is None else self.drafts
                drafts = min((count for count in plan.draft_counts if count >= drafts), default=plan.draft_counts[-1])
                caches, turns, taken = decoder.round_groups(caches, turns, rounds, drafts)
                write_outs = decoder.write_outs(caches[0])
                sent = decoder.plan.link_bytes(write_outs)
                if decoder.plan.sketched:  # weights in host memory are copied for each draft too
                    sent += drafts * decoder.plan.sketched.link_bytes(write_outs)
                tokens, counts, lefts, logits, checked = map(list, zip(*taken))
                dispatched = _Dispatched(tokens, logits if self.output_logits else [], counts, sent, checked)
                jax.tree.map(lambda array: array.copy_to_host_async(), (dispatched[:3], lefts, checked))
                unread.append((counts, lefts, checked, drafts, write_outs))
                del taken, logits
                yield dispatched
                continue
            counts, remaining, checked, _, write_outs = unread.popleft()
            counts, remaining = map(_of_groups, (counts, remaining))
            cached += counts
            had_room = cached - write_outs * plan.tail < plan.room  # in that round; the tail may be another by now
            checked = _of_rows(checked, len(counts))
            told = (remaining > 0) & had_room & (checked > 0)
            pace.learn(checked[told], counts[told])
            in_tail = cached - decoder.write_outs(caches[0]) * plan.tail
            in_tail = np.split(np.where(remaining > 0, in_tail, plan.room), len(caches))
            caches = [replace(cache, in_tail=int(each.min())) for cache, each in zip(caches, in_tail)]


def _of_groups(arrays: Sequence[Array]) -> np.ndarray:
    """The arrays of all groups as one, on the host."""
    return np.concatenate(jax.device_get(arrays))


def _of_rows(numbers: Sequence[Array], rows: int) -> np.ndarray:
    """The number of each group for each of so many rows, on the host."""
    return np.repeat(jax.device_get(numbers), rows // len(numbers))
