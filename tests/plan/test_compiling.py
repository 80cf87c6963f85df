"""Seconds of compiling step programs and of waiting for them, by hand."""

from dataclasses import replace

import pytest
from toy_plans import PLAIN, SHAPE, WORKLOAD

from kvrecomp.plan import Drafting
from kvrecomp.plan.compiling import compile_seconds, decode_seconds, program_seconds
from kvrecomp.plan.named import named_plan

WORK = replace(WORKLOAD, new=29)
PLAN = named_plan("activations", replace(SHAPE, layers=(PLAIN, PLAIN)), WORK, tail=3, window=3000)


def test_compiling_takes_as_long_as_there_are_blocks():
    """Of every program: those of the prompt, of each write-out before it one a layer, and the tail; of all groups."""
    blocks = sum(len(layer) for write_outs in range(10) for layer in PLAN.blocks(write_outs))
    assert PLAN.write_outs == 9 and blocks == 10 * 2 * 4 + 2 * 45  # blocks of at most 3 of 11 tokens, by the window
    dense, attending = 0.13 * 2 * 10, 0.085 * (blocks + 2 * 10)
    assert compile_seconds(PLAN) == pytest.approx(dense + attending)
    grouped = replace(PLAN, groups=3, order="column")
    assert compile_seconds(grouped) == pytest.approx(dense + 3 * attending)
    assert compile_seconds(replace(grouped, order="row")) == compile_seconds(PLAN)


def test_drafts_are_compiled_too():
    """Once, or as often as a step has parts of them."""
    alone = program_seconds(PLAN, 0)
    drafted = replace(PLAN, drafting=Drafting("sketch", 2, codec="fp8"))
    assert program_seconds(replace(PLAN, drafting=Drafting("prompt_lookup", 2)), 0) == alone
    assert program_seconds(drafted, 0) == pytest.approx(2 * alone)
    assert program_seconds(replace(drafted, groups=2), 0) == pytest.approx(4 * alone)


def test_programs_that_are_not_ready_in_time_are_waited_for():
    """28 steps fill nine tails of three tokens; a step so short is waited for at each, and a long one at none."""
    longest = program_seconds(PLAN, 9)
    assert decode_seconds(PLAN, longest) == 28 * longest
    compiling = sum(program_seconds(PLAN, write_outs) for write_outs in range(1, 10))
    assert decode_seconds(PLAN, 1e-3) == pytest.approx(28e-3 + compiling - 9 * 3e-3)
    assert decode_seconds(replace(PLAN, workload=replace(WORK, new=1)), 1.0) == 0
