"""The token loop: prompts in, continuations out.

Steps are dispatched in a thread of their own, before the tokens of earlier ones have reached the host, so the device
never waits for Python. Stopping is therefore seen late; the results of steps dispatched by then are dropped.
"""

import numbers
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import Array

from kvrecomp.auto import plan_for
from kvrecomp.background import BackgroundIterator
from kvrecomp.plan import AUTO, Budget, Plan, PlanError, Workload
from kvrecomp.predict.hardware import HardwareProfile
from kvrecomp.progress import StepBar
from kvrecomp.run import memory
from kvrecomp.run.cache import Cache
from kvrecomp.run.decoder import Decoder
from kvrecomp.run.model import Model, check_parts
from kvrecomp.run.programs import KeptPrograms, as_by_default
from kvrecomp.run.prompt import as_ids, as_mask, as_row_ids, as_token_ids, check_tokens, split_groups
from kvrecomp.run.sampling import NO_TOKEN, Sampling, choose, start_rows
from kvrecomp.run.weights import weight_memories

LEAD = 2  # unread steps: one that runs and one that waits
_KEPT = KeptPrograms(4)  # of calls with so many plans


class Streamer(Protocol):
    """Gets tokens as they come, as Hugging Face's streamers do: first the prompt, then int32[batch] a step."""

    def put(self, value: np.ndarray) -> None: ...

    def end(self) -> None: ...


@dataclass
class Generated:
    """What `generate` returns.

    `sequences` int32[batch, prompt + new] are prompts and continuations, padded where a row ended before others;
    `new_tokens` int32[batch] counts each row's, its end token included. The `plan`'s prompts may be longer than these.
    `logits` float32[new, batch, vocab] if asked for. `prefill_seconds` includes compiling; `step_seconds` are the times
    between tokens after the first, and `link_bytes` the bytes that each of those steps copied from the host, of blocks
    and of weights.
    """

    sequences: np.ndarray
    new_tokens: np.ndarray
    plan: Plan
    logits: np.ndarray | None = None
    prefill_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    link_bytes: list[int] = field(default_factory=list)


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
) -> Generated:
    """Continues prompts int[batch, prompt], left-padded where `attention_mask` is 0, by up to `max_new_tokens`.

    `plan` is a `Plan` or the name of one: `auto`, the fastest on this machine within `budget`, which may decode the
    rows in groups, or one of `kvrecomp.named_plan`. Prompts shorter than a `Plan` is for are padded on the left.
    `profile` describes this machine, which is measured if it never was. `row_ids` int[batch] name the rows when
    sampling, by default 0, 1, ...: a row that keeps its id keeps its text in any batch. What is compiled is kept for
    later calls with the same plan, the weights that the model has then being used.

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
    ids = as_ids(input_ids)
    check_tokens(ids, as_mask(attention_mask, ids), model.shape.vocab)  # before anything that takes long
    batch, prompt = ids.shape
    if isinstance(plan, str):
        work, placed = Workload(batch, prompt, max_new_tokens), weight_memories(model)
        plan = plan_for(plan, model.shape, work, budget=budget, profile=profile, weights=placed, groups=None)
    decoder = Decoder(model, plan, budget=budget, kept=_KEPT)
    pad = (*pads, *eos, 0)[0]
    return TokenLoop(decoder, sampling, eos, pad, streamer, output_logits).run(
        input_ids, attention_mask, max_new_tokens, row_ids
    )


class _Dispatched(NamedTuple):
    """A token on its way, by group: ids int32[b], logits if asked for; and the bytes that its step copies."""

    tokens: list[Array]
    logits: list[Array]
    link_bytes: int


@dataclass
class TokenLoop:
    """Prefill, then steps until every row has ended or has `max_new_tokens`; `eos` ids end a row, `pad` fills it.

    `progress` shows the steps on a terminal.
    """

    decoder: Decoder
    sampling: Sampling
    eos: Sequence[int]
    pad: int
    streamer: Streamer | None = None
    output_logits: bool = False
    progress: bool = True

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
        new, logits, link_bytes, arrivals = [], [], [], [time.perf_counter()]
        ended = np.zeros(len(prompt), bool)
        if self.streamer is not None:
            self.streamer.put(prompt)
        dispatched = BackgroundIterator(self._dispatch(parts, max_new_tokens, rows), LEAD)
        try:
            with StepBar("decoding", max_new_tokens, self.progress) as advance, dispatched.reading, dispatched as steps:
                for step in steps:
                    tokens = np.concatenate(jax.device_get(step.tokens))
                    arrivals.append(time.perf_counter())
                    if (tokens == NO_TOKEN).any():
                        raise FloatingPointError(
                            f"the logits of row {int(np.argmax(tokens == NO_TOKEN))} are NaN or infinite at new token "
                            f"{len(new)}: check the weights, or use a dtype with a larger range"
                        )
                    new.append(tokens)
                    if step.logits:
                        logits.append(np.concatenate(jax.device_get(step.logits)))
                    link_bytes.append(step.link_bytes)
                    if self.streamer is not None:
                        self.streamer.put(tokens)
                    advance()
                    ended |= np.isin(tokens, self.eos)
                    if ended.all():
                        break
        finally:
            self.decoder.finish()  # what was to be compiled ahead would delay others, and the exit
        if self.streamer is not None:
            self.streamer.end()
        seconds = np.diff(arrivals)
        return Generated(
            sequences=np.concatenate([prompt, np.stack(new, axis=1)], axis=1),
            new_tokens=self._new_tokens(np.stack(new)),
            plan=self.decoder.plan,
            logits=np.stack(logits) if self.output_logits else None,
            prefill_seconds=float(seconds[0]),
            step_seconds=seconds[1:].tolist(),
            link_bytes=link_bytes[1:],
        )

    def _dispatch(
        self, parts: Sequence[tuple[np.ndarray, np.ndarray]], max_new_tokens: int, row_ids: np.ndarray
    ) -> Generator[_Dispatched, None, None]:
        """Prefill and steps, one item a token, as they are dispatched. Nothing here waits for the device, but for what
        a packed prompt or tail says of itself."""
        decoder = self.decoder
        prefilled: list[tuple[Cache, Array]] = []
        while len(prefilled) < len(parts):
            plan = decoder.plan
            prefilled.append(decoder.prefill(*parts[len(prefilled)]))
            if decoder.plan is not plan and len(prefilled) > 1:  # blocks could not be packed; those before were
                prefilled.clear()
        caches, logits = map(list, zip(*prefilled))
        del prefilled  # and the logits with it, once they are used
        eos, pad, seed, names = jax.device_put(
            (
                np.asarray(self.eos, np.int32),
                np.int32(self.pad),
                np.uint32(self.sampling.seed),
                np.split(row_ids, len(parts)),
            ),
            memory.sharding("device"),
        )
        recents = [cache.recent for cache in caches]
        with as_by_default():
            rows = [start_rows(seed, row, recent.length, recent.padding) for row, recent in zip(names, recents)]
        sent = 0
        for index in range(max_new_tokens):
            with as_by_default():
                chosen = [choose(self.sampling, eos, pad, *group) for group in zip(rows, logits)]
            rows, tokens, reports = map(list, zip(*chosen))
            arriving = (reports, logits if self.output_logits else [])
            jax.tree.map(lambda array: array.copy_to_host_async(), arriving)
            yield _Dispatched(*arriving, sent)
            if index + 1 < max_new_tokens:
                del logits, arriving  # or the step's own would be beside them
                caches, logits = decoder.step_groups(caches, tokens)
                sent = decoder.plan.link_bytes(index // decoder.plan.tail)

    def _new_tokens(self, new: np.ndarray) -> np.ndarray:
        """int32[new, batch] -> int32[batch]: how many of them are each row's own."""
        ends = np.isin(new, self.eos)
        return np.where(ends.any(axis=0), ends.argmax(axis=0) + 1, len(new)).astype(np.int32)
