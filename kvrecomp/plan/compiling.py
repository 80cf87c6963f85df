"""Seconds that compiling a plan's step programs takes, and that decoding waits for them."""

from kvrecomp.plan.layout import Plan
from kvrecomp.plan.step_order import DRAFT_PARTS

# Measured on an H100's machine: a layer, and each block or tail that a group attends to in it.
# h100_compiling_ff14225.txt has 6 to 32 s for 32 layers of 1 to 16 blocks, and 48 s for eight groups in one pass. It is
# half as much again since steps are compiled twice (h200_schedule.txt).
COMPILE_LAYER_SECONDS, COMPILE_BLOCK_SECONDS = 0.13, 0.085


def program_seconds(plan: Plan, write_outs: int) -> float:
    """Seconds to compile the step program after that many write-outs, each of which adds a block to every layer."""
    layers = len(plan.layers)
    attended = sum(len(layer.prompt) for layer in plan.layers) + layers * (write_outs + 1)
    drafts = DRAFT_PARTS if plan.drafts_under_copies else 1  # a round's program has a draft in it, too, or several
    parts = 1 + drafts * (plan.sketched is not None)
    return parts * (COMPILE_LAYER_SECONDS * layers + COMPILE_BLOCK_SECONDS * plan.groups_per_pass * attended)


def compile_seconds(plan: Plan) -> float:
    """Seconds to compile all of the workload's step programs: one, and one more for each write-out."""
    return sum(program_seconds(plan, write_outs) for write_outs in range(plan.write_outs + 1))


def decode_seconds(plan: Plan, step: float) -> float:
    """Seconds of all of the workload's steps, of `step` seconds in the mean, and of waiting for their programs.

    Each write-out needs a new program. It is compiled while the tail fills, and waited for where that takes longer.
    A workload of one new token has no step and takes no time.
    """
    steps = plan.workload.new - 1
    write_outs = range(1, max(0, steps - 1) // plan.tail + 1)
    waiting = sum(max(0.0, program_seconds(plan, number) - plan.tail * step) for number in write_outs)
    return steps * step + waiting
