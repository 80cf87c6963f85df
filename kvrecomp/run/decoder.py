"""The decoder: three XLA programs over an explicit cache.

    prefill     the prompt -> its blocks, streamed to where the plan wants them under the next layer's compute
    step        one token per row: copies of host blocks under the compute of earlier ones
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
    describe_recent,
    make_block,
    shardings,
)
from kvrecomp.run.limits import check_memory
from kvrecomp.run.model import Model, check_model
from kvrecomp.run.prefill import prefill
from kvrecomp.run.programs import Compiled, KeptPrograms, Programs, side_by_side
from kvrecomp.run.prompt import PromptError, check_prompt, check_step
from kvrecomp.run.schedule import OVERLAPPING
from kvrecomp.run.step import decode_step
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
        self._kept, self._budget = kept, budget
        self._take_plan(plan)
        self._graph, state = nnx.split(model)
        weights, self._structure = jax.tree.flatten(state)  # a plain list: jax flattens a State in Python
        self._weights = [on_device(array) for array in weights]
        self._precision = getattr(jax.config, PRECISION)

    def _take_plan(self, plan: Plan) -> None:
        self.plan = plan
        kept = self._kept and self._kept.of(replace(plan, name="", reason=""))  # words are in no program
        self._programs = Programs(kept)

    @property
    def compiled(self) -> dict[Hashable, Compiled]:
        """The programs so far: ("prefill",), ("step", write-outs before it), ("write-out", each layer's memory and
        codec)."""
        return self._programs.compiled

    def compile(self, *, prefill: bool = True) -> None:
        """Compiles what decoding starts with, side by side; `prefill` and `step` do so themselves."""
        names = [("prefill",), ("step", 0)] if prefill else [("step", 0)]
        side_by_side(lambda name: self._program(*name), names)

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
        self.compile()  # before anything runs: XLA chooses kernels by timing them, and beside other work wrongly
        inputs = jax.device_put((np.ascontiguousarray(token_ids.T), padding), memory.sharding("device"))
        blocks, recent, logits, overflowed = self._program("prefill")(self._weights, *inputs)
        if layers := self._layers_where(overflowed):
            del blocks, recent
            self._go_on_plain(layers)
            check_memory(self.plan, self._budget)
            return self.prefill(input_ids, attention_mask)
        return Cache(blocks, recent, 0), logits

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
        write_outs = self._write_outs(caches[0])
        if caches[0].in_tail == 0:  # it is the first step: the blocks of all groups' prompts are there
            self._reserve_growth()
        if caches[0].in_tail == self.plan.tail:
            caches, write_outs = self._write_out(caches, write_outs), write_outs + 1
        if self.plan.groups_per_pass == 1:
            steps = [self._step([cache], [ids], write_outs) for cache, ids in zip(caches, token_ids)]
            return [cache for (cache,), _ in steps], [logits for _, (logits,) in steps]
        return self._step(caches, token_ids, write_outs)

    def _check_step(self, caches: Sequence[Cache], token_ids: Sequence[Array]) -> None:
        """Raises `PlanError` or `PromptError` unless each group has tokens and a cache, all at one step, with room."""
        plan = self.plan
        if len(caches) != plan.groups or len(token_ids) != plan.groups:
            raise PlanError(
                f"plan {plan.name} has {plan.groups} groups; got {len(caches)} caches and tokens of {len(token_ids)}: "
                "give step_groups as many"
            )
        for cache, ids in zip(caches, token_ids):
            check_step(cache.recent.length, ids, plan)
            if cache.in_tail == 0 and _codecs(cache.blocks) != _codecs(plan.blocks(self._write_outs(cache))):
                raise PromptError(
                    "the cache has packed blocks where the plan has plain ones, since others could not be packed: "
                    "prefill again"
                )
        cached = [self._write_outs(cache) * plan.tail + cache.in_tail for cache in caches]
        if len(set(cached)) > 1:
            raise PromptError(f"the groups' caches have {cached} new tokens: give step_groups those of the same step")
        if cached[0] >= plan.workload.new:
            raise PlanError(
                f"the plan is for {plan.workload.new} new tokens and all of them are cached: make a plan with a larger "
                "Workload.new"
            )

    def _write_outs(self, cache: Cache) -> int:
        """How often the cache's tail was written out."""
        return len(cache.blocks[0]) - len(self.plan.layers[0].prompt)

    def _step(
        self, caches: Sequence[Cache], token_ids: Sequence[Array], write_outs: int
    ) -> tuple[list[Cache], list[Array]]:
        plan = self.plan
        blocks, recents = tuple(cache.blocks for cache in caches), tuple(cache.recent for cache in caches)
        recents, logits = self._program("step", write_outs)(self._weights, blocks, recents, tuple(token_ids))
        if write_outs < plan.write_outs:
            # After the call: a program's first execution loads its kernels, which takes longer beside a compilation.
            self._prepare("write-out", plan.written_to(write_outs))
            for ahead in range(1, min(COMPILED_AHEAD, plan.write_outs - write_outs) + 1):
                self._prepare("step", write_outs + ahead)
        after = zip(caches, recents, strict=True)
        return [replace(cache, recent=recent, in_tail=cache.in_tail + 1) for cache, recent in after], logits

    def _write_out(self, caches: Sequence[Cache], write_outs: int) -> list[Cache]:
        """The caches with their full tails as blocks, and empty tails."""
        written: list[Cache] = []
        for cache in caches:
            new, start, overflowed = self._program("write-out", self.plan.written_to(write_outs))(cache.recent)
            if layers := self._layers_where(overflowed):
                self._go_on_plain(layers, write_outs)
                return self._write_out(caches, write_outs)
            blocks = tuple((*layer, block) for layer, block in zip(cache.blocks, new, strict=True))
            written.append(Cache(blocks, replace(cache.recent, start=start), 0))
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

    # --- the jit boundary: static are the plan and what names the program, all else is data ---

    def _program(self, *name: Any) -> Any:
        return self._programs.get(name, functools.partial(self._trace, *name), self._options(*name))

    def _prepare(self, *name: Any) -> None:
        """Compiles a program in the background."""
        self._programs.start(name, functools.partial(self._trace, *name), self._options(*name))

    def _options(self, kind: str, *which: Any) -> Mapping[str, Any]:
        """XLA's, of a program."""
        if kind != "step" or which[0] == 0:
            return OVERLAPPING
        sent = self.plan.link_bytes(which[0]) * self.plan.groups_per_pass // self.plan.groups
        return {**OVERLAPPING, **NO_GRAPHS} if sent >= NO_GRAPHS_FROM else OVERLAPPING

    def _trace(self, kind: str, *which: Any) -> Any:
        trace = {"prefill": self._trace_prefill, "step": self._trace_step, "write-out": self._trace_write_out}
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
            return decode_step(self._model(weights), self.plan, blocks, recent, token_ids)

        blocks, groups = describe_blocks(self.plan, write_outs), self.plan.groups_per_pass
        of_group = blocks, describe_recent(self.plan), describe_ints(self.plan.workload.batch)
        inputs = self._weights, *((described,) * groups for described in of_group)
        placed = [array.sharding for array in self._weights]
        in_shardings = placed, (shardings(blocks),) * groups, None, None
        return jax.jit(step, in_shardings=in_shardings, donate_argnames="recent").trace(*inputs)

    def _trace_write_out(self, written_to: Sequence[tuple[Memory, Codec]]) -> Any:
        def program(recent):
            blocks, overflowed = [], []
            for number, (where, codec) in enumerate(written_to):
                tail = recent.tail(number)
                spec = BlockSpec(tail.form, where, tail.tokens, codec)
                block, too_many = make_block(spec, [jnp.copy(tensor) for tensor in tail.tensors], tail.start)
                blocks.append(block)
                overflowed.append(too_many)
            return tuple(blocks), recent.start + self.plan.tail, jnp.stack(overflowed)

        recent = describe_recent(self.plan)
        return jax.jit(program, out_shardings=shardings(jax.eval_shape(program, recent))).trace(recent)


def _codecs(layers: Sequence[Sequence[Block | BlockSpec]]) -> list[list[Codec]]:
    """Those of every layer's blocks."""
    return [[block.codec for block in blocks] for blocks in layers]
