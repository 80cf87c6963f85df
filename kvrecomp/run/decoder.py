"""The decoder: XLA programs over an explicit cache.

    prefill     the prompt -> its blocks, streamed to where the plan wants them under the next layer's compute
    step        one token per row: copies of host blocks under the compute of earlier ones
    round       drafts, and a step that checks several tokens per row: those drafts, or under copies earlier ones
    write-out   full tails -> new blocks

A program is fixed by the plan and the layout (the blocks of every layer). A written-out tail makes a new layout and so
a new step program; COMPILED_AHEAD of them are compiled in the background while the tail fills. Token ids, padding and
the number of tokens in the tail are data: changing them compiles nothing.

Where a layer's numbers cannot be packed as the plan has it, the decoder goes on with plain blocks in that layer.
"""

import functools
import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from kvrecomp.plan import BlockSpec, Budget, Codec, Memory, Plan, PlanError
from kvrecomp.plan.compiling import compile_seconds
from kvrecomp.run import memory
from kvrecomp.run.cache import (
    Block,
    Cache,
    describe_blocks,
    describe_ints,
    describe_like,
    describe_recent,
    describe_sketches,
    make_block,
    shardings,
)
from kvrecomp.run.drafters import Group, Turn
from kvrecomp.run.limits import check_memory
from kvrecomp.run.model import Model, check_model
from kvrecomp.run.prefill import prefill
from kvrecomp.run.programs import Compiled, KeptPrograms, Programs, side_by_side
from kvrecomp.run.prompt import PromptError, check_prompt, check_step
from kvrecomp.run.round import Rounds, Taken, decode_round
from kvrecomp.run.schedule import MANY_COPIES, OVERLAPPING
from kvrecomp.run.step import decode_step, written_out
from kvrecomp.run.weights import check_placement, on_device

LOG = logging.getLogger("kvrecomp")

COMPILED_AHEAD = 2  # steps' programs made while the tail fills: a later one takes longer, it has more blocks
# XLA makes a program's CUDA graphs when it is first executed, with the device idle: some 40 ms of an H200's machine,
# which a step after a write-out would wait for in the middle of decoding. Launched one by one, kernels take the host
# several ms a step; so many bytes take 20 ms on PCIe 5.0 x16.
NO_GRAPHS, NO_GRAPHS_FROM = {"xla_gpu_enable_command_buffer": ""}, 2**30
PRECISION = "jax_default_matmul_precision"  # a context of one thread: programs are traced in others
LONG_SECONDS = 300  # of compiling: more is said beforehand


class Decoder:
    """Decodes one model under one plan.

        decoder = Decoder(model, plan)
        cache, logits = decoder.prefill(input_ids, attention_mask)
        cache, logits = decoder.step(cache, token_ids)

    A cache given to `step` is used up: its tail is written in place. A decoder has the weights that the model has when
    it is made: after training, make another. Programs have the `jax.default_matmul_precision` that holds where the
    decoder is made.
    """

    def __init__(self, model: Model, plan: Plan, *, budget: Budget | None = None, kept: KeptPrograms | None = None):
        """Programs that `kept` has are not compiled again, and those that are made are put into it.

        Raises `PlanError` if the plan is for another model, or does not fit in `budget` (default: what is free), or
        the model is not what its shape says.
        """
        check_model(model)
        if model.shape != plan.shape:
            raise PlanError(
                f"the plan is for {plan.shape.name} in {plan.shape.dtype}, the model is {model.shape.name} in "
                f"{model.shape.dtype}: make the plan from model.shape"
            )
        check_placement(model, plan)
        check_memory(plan, budget)
        if (seconds := compile_seconds(plan)) > LONG_SECONDS:
            LOG.warning(
                "plan %s: its %d programs of steps take some %.0f minutes to compile; a longer tail or a larger window "
                "makes fewer and smaller ones",
                *(plan.name, plan.write_outs + 1, seconds / 60),
            )
        self._kept, self._budget, self._reserved = kept, budget, False
        self._rounds: Rounds | None = None
        self._take_plan(plan)
        self._graph, state = nnx.split(model)
        weights, self._structure = jax.tree.flatten(state)  # a plain list: jax flattens a State in Python
        self._weights = [on_device(array) for array in weights]
        self._precision = getattr(jax.config, PRECISION)

    def _take_plan(self, plan: Plan) -> None:
        self.plan = plan
        kept = self._kept and self._kept.of(replace(plan, name="", reason=""))  # words are in no program
        self._programs, self._compiled = Programs(kept), False

    @property
    def compiled(self) -> dict[Hashable, Compiled]:
        """The programs so far: ("prefill",), ("step", write-outs before it), ("round", write-outs before it, drafts at
        most, how rounds are done), ("write-out", each layer's memory and codec), ("shift",)."""
        return self._programs.compiled

    def compile(self, *, prefill: bool = True, step: bool = True, rounds: Rounds | None = None) -> None:
        """Compiles what decoding starts with, side by side; `prefill` and `step` do so themselves. Of `rounds` it is
        the first one, in place of a step."""
        names: list[tuple[Any, ...]] = [("prefill",)] if prefill else []
        if rounds is not None:
            names.append(("round", 0, self.plan.tokens_per_step - 1, rounds))
        elif step:
            names.append(("step", 0))
        side_by_side(lambda name: self._program(*name), names)
        self._compiled, self._rounds = True, rounds

    def text(self, *name: Hashable) -> str:
        """A program as XLA compiled it, by its name in `compiled`: each instruction of a step says the scope that it
        comes from, `layer_0` and so on."""
        return self._program(*name).as_text()

    def finish(self) -> None:
        """Gives up programs that were to be compiled ahead: no more steps come now. They are made if they come."""
        self._programs.cancel()

    def prefill(self, input_ids: Any, attention_mask: Any = None) -> tuple[Cache, Array]:
        """int[batch, prompt], left-padded where `attention_mask` is 0 -> cache, logits float32[batch, vocab].

        `plan` is another then where blocks of the prompt could not be packed. Caches from before are of no use.

        Raises `PromptError` where the shapes are not the plan's, the mask is not left-padded, a row is empty or a token
        id is outside the vocabulary; `PlanError` where plain blocks do not fit in the budget.
        """
        token_ids, padding = check_prompt(input_ids, attention_mask, self.plan)
        if not self._compiled:
            # Before anything runs: XLA chooses kernels by timing them, and beside other work wrongly.
            self.compile(rounds=self._rounds)
        inputs = jax.device_put((np.ascontiguousarray(token_ids.T), padding), memory.sharding("device"))
        cache, logits, overflowed = self._program("prefill")(self._weights, *inputs)
        if layers := self._layers_where(overflowed):
            del cache
            self._go_on_plain(layers)
            check_memory(self.plan, self._budget)
            return self.prefill(input_ids, attention_mask)
        self._reserved = False
        return cache, logits

    def step(self, cache: Cache, token_ids: Array) -> tuple[Cache, Array]:
        """One more token of every row, int32[batch] on the device -> cache, logits float32[batch, vocab].

        Returns before the step has run, but waits for a tail that is written out packed. Raises `PlanError` if the
        plan's workload is exceeded or is in several groups, and `PromptError` if `token_ids` are not one per row or the
        cache was given to a step before.
        """
        (cache,), (logits,) = self.step_groups([cache], [token_ids])
        return cache, logits

    def step_groups(self, caches: Sequence[Cache], token_ids: Sequence[Array]) -> tuple[list[Cache], list[Array]]:
        """`step` for the caches of all groups of the plan, which are at the same step, in the plan's order.

        `token_ids` int32[batch] each -> caches, logits float32[batch, vocab] of each group. In row order each group
        takes a step after the other, in column order they go through the layers together.

        Raises as `step` does, and `PlanError` if there are not as many caches and tokens as groups, `PromptError` if
        the caches are at different steps; all caches are as they were then.
        """
        self._check_step(caches, token_ids)  # of all groups, before one of them is used up
        caches = self._before_step(caches)
        if self.plan.groups_per_pass == 1:
            steps = [self._step([cache], [ids]) for cache, ids in zip(caches, token_ids)]
            return [cache for (cache,), _ in steps], [logits for _, (logits,) in steps]
        return self._step(caches, token_ids)

    def round_groups(
        self, caches: Sequence[Cache], turns: Sequence[Turn], rounds: Rounds, count: int
    ) -> tuple[Sequence[Cache], Sequence[Turn], list[Taken]]:
        """A round of all groups of the plan, in its order, with `count` drafts of each row, one of the plan's
        `draft_counts` -> caches, turns, and what was taken. Under copies, the first group checks the drafts of the
        round before.

        The tail is written out where `in_tail` of the caches says that it is full, which is for who calls this to keep,
        since what rows take is known on the device alone. Turns are used up as the caches are.
        """
        caches = self._before_step(caches)
        if self.plan.groups_per_pass > 1:
            return self._round(caches, turns, rounds, count)
        caches, turns, taken = list(caches), list(turns), []
        for number in range(len(caches)):
            # Of those in a program the first is checked; drafts are made for the last, which is itself or comes next.
            those = [number, (number + 1) % len(caches)] if self.plan.drafts_under_copies else [number]
            own = replace(rounds, given=[rounds.given[each] for each in those])
            found = self._round([caches[each] for each in those], [turns[each] for each in those], own, count)
            for each, cache, turn in zip(those, *found[:2], strict=True):
                caches[each], turns[each] = cache, turn
            taken += found[2]
        return caches, turns, taken

    def _before_step(self, caches: Sequence[Cache]) -> Sequence[Cache]:
        """The caches, with their tails written out where those of all groups are full."""
        if not self._reserved:  # it is the first step: the blocks of all groups' prompts are there
            self._reserve_growth()
        full = min(cache.in_tail for cache in caches) >= self.plan.tail
        return self._write_out(caches, self.write_outs(caches[0])) if full else caches

    def _check_step(self, caches: Sequence[Cache], token_ids: Sequence[Array]) -> None:
        """Raises `PlanError` or `PromptError` unless each group has tokens and a cache, all at one step, with room."""
        plan = self.plan
        if len(caches) != plan.groups or len(token_ids) != plan.groups:
            raise PlanError(
                f"plan {plan.name} has {plan.groups} groups; got {len(caches)} caches and tokens of {len(token_ids)}: "
                "give step_groups as many"
            )
        for cache, ids in zip(caches, token_ids):
            check_step(cache.recent.lengths, ids, plan)
            if cache.in_tail == 0 and _codecs(cache.blocks) != _codecs(plan.blocks(self.write_outs(cache))):
                raise PromptError(
                    "the cache has packed blocks where the plan has plain ones, since others could not be packed: "
                    "prefill again"
                )
        cached = [self.write_outs(cache) * plan.tail + cache.in_tail for cache in caches]
        if len(set(cached)) > 1:
            raise PromptError(f"the groups' caches have {cached} new tokens: give step_groups those of the same step")
        if cached[0] >= plan.workload.new:
            raise PlanError(
                f"the plan is for {plan.workload.new} new tokens and all of them are cached: make a plan with a larger "
                "Workload.new"
            )

    def write_outs(self, cache: Cache) -> int:
        """How often the cache's tail was written out."""
        return written_out(self.plan, cache.blocks)

    def _step(self, caches: Sequence[Cache], token_ids: Sequence[Array]) -> tuple[list[Cache], list[Array]]:
        blocks, recents = tuple(cache.blocks for cache in caches), tuple(cache.recent for cache in caches)
        write_outs = self.write_outs(caches[0])
        recents, logits = self._program("step", write_outs)(self._weights, blocks, recents, tuple(token_ids))
        self._prepare_next(write_outs, "step")
        after = zip(caches, recents, strict=True)
        return [replace(cache, recent=recent, in_tail=cache.in_tail + 1) for cache, recent in after], logits

    def _round(
        self, caches: Sequence[Cache], turns: Sequence[Turn], rounds: Rounds, count: int
    ) -> tuple[list[Cache], list[Turn], list[Taken]]:
        write_outs, every = self.write_outs(caches[0]), self.plan.tokens_per_step - 1
        smaller, most = ("round", write_outs, 0, rounds), every
        if count == 0 and (self.plan.drafts_under_copies or (self.plan.drafting and self.plan.drafting.two_programs)):
            self._prepare(*smaller)
            most = 0 if self._programs.has(smaller) else every  # taken once it is there
        columns = ([getattr(cache, name) for cache in caches] for name in ("blocks", "sketches", "recent"))
        program = self._program("round", write_outs, most, rounds)
        count_on_device = jax.device_put(np.int32(count), memory.sharding("device"))
        found = program(self._weights, *columns, list(turns), rounds.given, rounds.eos, count_on_device)
        self._prepare_next(write_outs, "round", every, rounds)
        return [replace(cache, recent=recent) for cache, recent in zip(caches, found[0], strict=True)], *found[1:]

    def _prepare_next(self, write_outs: int, kind: str, *which: Any) -> None:
        """Begins to compile what comes when the tail is full.

        After a step has been called: a program's first execution loads its kernels, which takes longer beside a
        compilation.
        """
        plan = self.plan
        if write_outs < plan.write_outs:
            self._prepare("write-out", plan.written_to(write_outs))
            self._prepare("shift")
            for ahead in range(1, min(COMPILED_AHEAD, plan.write_outs - write_outs) + 1):
                self._prepare(kind, write_outs + ahead, *which)

    def _write_out(self, caches: Sequence[Cache], write_outs: int) -> list[Cache]:
        """The caches with their full tails as blocks, and what was ahead in tails that are empty but for that."""
        written: list[Cache] = []
        made: list[Any] = []
        for cache in caches:
            new, copies, overflowed = self._program("write-out", self.plan.written_to(write_outs))(cache.recent)
            made.append((new, copies))
            if layers := self._layers_where(overflowed):
                self._go_on_plain(layers, write_outs)
                return self._write_out(caches, write_outs)
        for cache, (new, copies) in zip(caches, made):
            blocks = tuple((*layer, block) for layer, block in zip(cache.blocks, new, strict=True))
            sketches = tuple((*layer, *copy) for layer, copy in zip(cache.sketches, copies))
            recent = self._program("shift")(cache.recent)
            written.append(Cache(blocks, recent, cache.in_tail - self.plan.tail, sketches))
        return written

    def _layers_where(self, overflowed: Array) -> list[int]:
        """The numbers of the layers for which bool[layers] is true. Asks the device only where blocks are packed."""
        return np.flatnonzero(jax.device_get(overflowed)).tolist() if "packed" in self.plan.codecs else []

    def _go_on_plain(self, layers: Sequence[int], write_outs: int | None = None) -> None:
        """Changes the plan to one with plain blocks in these layers, from that write-out on, or all of them."""
        plan = self.plan.plain_from(layers, write_outs)
        why = (
            f"blocks of {len(layers)} of {len(plan.layers)} layers are plain from here on: more of their numbers are "
            "far below the largest of their channel than a packed block lists"
        )
        LOG.warning("plan %s: %s", plan.name, why)
        self._programs.cancel()
        self._take_plan(replace(plan, reason=f"{plan.reason}; {why}" if plan.reason else why))

    def _reserve_growth(self) -> None:
        """Pins host memory for the blocks to come, of all groups."""
        arrays = []
        for layer, blocks in zip(self.plan.layers, describe_blocks(self.plan, self.plan.write_outs)):
            for block in blocks[len(layer.prompt) :]:
                arrays += block.arrays if block.memory == "host" else ()
        memory.reserve("host", [(array.shape, array.dtype) for array in arrays] * self.plan.groups)
        self._reserved = True

    # --- the jit boundary: static are the plan and what names the program, all else is data ---

    def _program(self, *name: Any) -> Any:
        return self._programs.get(name, functools.partial(self._trace, *name), self._options(*name))

    def _prepare(self, *name: Any) -> None:
        """Compiles a program in the background."""
        self._programs.start(name, functools.partial(self._trace, *name), self._options(*name))

    def _options(self, kind: str, *which: Any) -> Mapping[str, Any]:
        """XLA's, of a program."""
        if kind not in ("step", "round"):
            return OVERLAPPING
        options = {**OVERLAPPING, **(MANY_COPIES if kind == "round" and self.plan.drafts_under_copies else {})}
        sent = self.plan.link_bytes(which[0]) * self.plan.groups_per_pass // self.plan.groups
        return {**options, **NO_GRAPHS} if which[0] and sent >= NO_GRAPHS_FROM else options

    def _trace(self, kind: str, *which: Any) -> Any:
        trace = {
            "prefill": self._trace_prefill,
            "step": self._trace_step,
            "round": self._trace_round,
            "write-out": self._trace_write_out,
            "shift": self._trace_shift,
        }
        with jax.default_matmul_precision(self._precision):
            return trace[kind](*which)

    def _model(self, weights: Sequence[Array]) -> Any:
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, weights))

    def _trace_prefill(self) -> Any:
        def program(weights, token_ids, padding):
            return prefill(self._model(weights), self.plan, token_ids, padding)

        workload = self.plan.workload
        inputs = self._weights, describe_ints(workload.prompt, workload.batch), describe_ints(workload.batch)
        return jax.jit(program, out_shardings=shardings(jax.eval_shape(program, *inputs))).trace(*inputs)

    def _trace_step(self, write_outs: int) -> Any:
        def step(weights, blocks, recent, token_ids):
            ids = [ids[:, None] for ids in token_ids]
            after, logits, _ = decode_step(self._model(weights), self.plan, blocks, recent, ids)
            after = [replace(recent, lengths=recent.lengths + 1) for recent in after]
            return after, [logits[:, 0] for logits in logits]

        blocks, groups = describe_blocks(self.plan, write_outs), self.plan.groups_per_pass
        of_group = blocks, describe_recent(self.plan), describe_ints(self.plan.workload.batch)
        inputs = self._weights, *((described,) * groups for described in of_group)
        placed = [array.sharding for array in self._weights]
        in_shardings = placed, (shardings(blocks),) * groups, None, None
        return jax.jit(step, in_shardings=in_shardings, donate_argnames="recent").trace(*inputs)

    def _trace_round(self, write_outs: int, most: int, rounds: Rounds) -> Any:
        plan = self.plan
        together = 2 if plan.drafts_under_copies else plan.groups_per_pass

        def program(weights, blocks, sketches, recents, turns, given, eos, count):
            groups = list(map(Group, blocks, sketches, recents, turns, given))
            return decode_round(self._model(weights), plan, rounds, groups, eos, count, most)

        blocks, sketches = describe_blocks(plan, write_outs), describe_sketches(plan, write_outs)
        of_group = blocks, sketches, describe_recent(plan), rounds.turn
        described = ([each] * together for each in of_group)
        inputs = (
            self._weights,
            *described,
            *map(describe_like, (rounds.given[:together], rounds.eos)),
            describe_ints(),
        )
        placed = [array.sharding for array in self._weights]
        in_shardings = placed, [shardings(blocks)] * together, *[None] * 6
        return jax.jit(program, in_shardings=in_shardings, donate_argnames=("recents", "turns")).trace(*inputs)

    def _trace_write_out(self, written_to: Sequence[tuple[Memory, Codec]]) -> Any:
        plan = self.plan

        def program(recent):
            blocks, sketches, overflowed = [], [], []
            for number, (where, codec) in enumerate(written_to):
                tail = recent.tail(number)
                tensors = [jnp.copy(tensor[: plan.tail]) for tensor in tail.tensors]
                block, too_many = make_block(BlockSpec(tail.form, where, plan.tail, codec), tensors, tail.start)
                blocks.append(block)
                overflowed.append(too_many)
                codec = plan.drafting.codec if plan.drafting and where == "host" else None
                copies = (
                    [make_block(BlockSpec(tail.form, "device", plan.tail, codec), tensors, tail.start)] if codec else []
                )
                sketches.append(tuple(block for block, _ in copies))
            return tuple(blocks), tuple(sketches), jnp.stack(overflowed)

        recent = describe_recent(plan)
        return jax.jit(program, out_shardings=shardings(jax.eval_shape(program, recent))).trace(recent)

    def _trace_shift(self) -> Any:
        """What is recent once the tail's first tokens are a block: those ahead come first in it."""
        plan = self.plan

        def program(recent):
            tails = jax.tree.map(lambda tail: jnp.roll(tail, -plan.tail, axis=0), recent.tails)
            return replace(recent, tails=tails if plan.drafting else recent.tails, start=recent.start + plan.tail)

        return jax.jit(program, donate_argnames="recent").trace(describe_recent(plan))


def _codecs(layers: Sequence[Sequence[Block | BlockSpec]]) -> list[list[Codec]]:
    """Those of every layer's blocks."""
    return [[block.codec for block in blocks] for blocks in layers]
