"""Candidates for a plan: a window and a few settings for each layer shape, and the plan that they make."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvrecomp.plan import (
    AUTO,
    FORMS,
    LEAST_ALIGNED,
    BlockSpec,
    Codec,
    Form,
    LayerPlan,
    LayerShape,
    Memory,
    Method,
    Plan,
)
from kvrecomp.plan.codecs import token_bytes
from kvrecomp.plan.cutting import BLOCKS_PER_WINDOW, cut_runs, first_block, first_tokens
from kvrecomp.plan.drafting import tail_room
from kvrecomp.plan.footprint import memory_needed
from kvrecomp.plan.shapes import TENSORS
from kvrecomp.plan.step_order import high_water, in_flight_bytes
from kvrecomp.predict.problem import Problem, default_order


@dataclass(frozen=True)
class Settings:
    """What the plan of layers of one shape is made from.

    `on_device` is the fraction of the free device memory that holds keys and values (None: as much as leaves no token
    behind the link); the rest holds the smaller form. `activations` is the fraction of the prompt behind the link that
    is activations. `tail_form` is the form of generated tokens, and `growth` the fraction of the written-out tails that
    could stay on the device for which room is kept before any of the prompt gets some. Parts of a prompt of
    LEAST_ALIGNED tokens or more are multiples of `unit`, but for the last, the rest of which is a block of its own.
    `codecs` are those of blocks on the device and on the host.
    """

    on_device: float | None
    activations: float
    method: Method
    tail_form: Form
    growth: float
    unit: int = 1
    codecs: tuple[Codec, Codec] = ("plain", "plain")

    def codec(self, memory: Memory) -> Codec:
        device, host = self.codecs
        return device if memory == "device" else host


@dataclass(frozen=True)
class Candidate:
    """A window in bytes, and the settings of each layer shape."""

    window: int
    settings: Mapping[LayerShape, Settings]


Split = Mapping[tuple[Form, Memory], int]
"""Tokens of a layer's prompt in each form and memory."""


def smaller_form(layer: LayerShape) -> Form:
    """The form with fewer bytes; keys and values where both have as many."""
    return "activations" if layer.width("activations") < layer.width("keys_values") else "keys_values"


def least_candidate(problem: Problem, codec: Codec = "plain") -> Candidate:
    """The candidate that needs the least memory of those with that codec: each layer shape in its smaller form. One of
    these fits if any does."""
    settings = {}
    for layer in problem.layer_shapes:
        form = smaller_form(layer)
        settings[layer] = Settings(None, float(form == "activations"), "absorb", form, 0.0, codecs=(codec, codec))
    return Candidate(problem.windows[-1], settings)


def candidate_plan(problem: Problem, candidate: Candidate) -> Plan:
    """The candidate's plan, which may be over the budget.

    Raises `PlanError` if a block or a tail is larger than the window.
    """
    plan, reserved = _whole_plan(problem, candidate.window, layer_plans(problem, candidate)), 0.0
    widths = [layer.width(smaller_form(layer)) * count for layer, count in problem.shape.distinct_layers.items()]
    a_token = sum(widths) * problem.workload.batch * problem.shape.itemsize
    # What is computed, packed or unpacked goes by the blocks, and no room was left for it; nor for that of blocks that
    # leave the device for it. In the end there is room for all of it.
    for rounding, all_of_it in ((0, False), (a_token, False), (a_token, True)):
        needed = memory_needed(plan)["device"]
        excess = sum(needed.values()) - (problem.budget.device or 0.0)
        computed = needed["prefill or step"] - max(problem.prefill, high_water(plan, plan.write_outs))
        if excess <= 0 or computed <= 0:
            break
        reserved += rounding + (computed if all_of_it else excess)
        plan = _whole_plan(problem, candidate.window, layer_plans(problem, candidate, reserved))
    return plan


def layer_plans(problem: Problem, candidate: Candidate, reserved: float = 0.0) -> tuple[LayerPlan, ...]:
    """The plans of layers of each of the problem's shapes, which share the room so that each can hold as many tokens as
    the others; `reserved` bytes of device memory are left free."""
    window = candidate.window
    hosted_layer, hosted_matrix = problem.largest_hosted
    for_cache = (problem.for_cache - reserved) / problem.groups
    largest_copy = max(window // BLOCKS_PER_WINDOW, hosted_matrix)
    in_flight = in_flight_bytes(window + 2 * hosted_layer, largest_copy, hosted_layer)
    beside_window = for_cache - max(0, in_flight - problem.prefill) / problem.groups

    widths = [layer.width(smaller_form(layer)) for layer in problem.layer_shapes]
    total_width = sum(widths[number] for number in problem.layer_numbers)
    plans: list[LayerPlan] = []
    for layer, width in zip(problem.layer_shapes, widths):
        settings, share = candidate.settings[layer], width / total_width
        plans.append(_layer_plan(problem, layer, settings, window, for_cache * share, beside_window * share))
    return tuple(plans)


def _whole_plan(problem: Problem, window: int, plans: Sequence[LayerPlan]) -> Plan:
    """The plan of all layers from those of each layer shape."""
    in_memory: dict[Memory, Sequence[LayerPlan]] = {"device": plans}
    if "host" in problem.weight_memories:
        in_memory["host"] = [dataclasses.replace(plan, weights="host") for plan in plans]
    return Plan(
        AUTO,
        problem.shape,
        problem.workload,
        tuple(in_memory[memory][number] for number, memory in zip(problem.layer_numbers, problem.weight_memories)),
        problem.tail_tokens,
        window,
        groups=problem.groups,
        order=problem.order or default_order("host" in problem.weight_memories, problem.groups),
        drafting=problem.drafting,
    )


def _layer_plan(
    problem: Problem, layer: LayerShape, settings: Settings, window: int, room: float, beside_window: float
) -> LayerPlan:
    """The plan of one layer with these settings, what is over its room in host memory.

    It has `room` bytes for its tail and blocks, and those `beside_window` where it needs a window too.
    """
    workload = problem.workload
    first = first_tokens(layer, workload.prompt, settings.codecs)
    prompt = layer.cached(workload.prompt) - first
    write_outs = problem.write_outs
    sizes = {
        (form, codec): token_bytes(
            codec, form, workload.batch, layer.width(form) // TENSORS[form], problem.shape.itemsize
        )
        for form in FORMS
        for codec in problem.codecs
    }
    on_device: dict[Form, float] = {form: sizes[form, settings.codec("device")][0] for form in FORMS}
    of_block = sum(sizes[form, settings.codec("device")][1] for form in FORMS)
    room_tokens = tail_room(problem.drafting, problem.tail_tokens, workload.new)
    tail_bytes = (room_tokens + first) * sizes[settings.tail_form, "plain"][0]
    written_bytes = problem.tail_tokens * on_device[settings.tail_form] + of_block

    all_fits = prompt * on_device[smaller_form(layer)] + tail_bytes + write_outs * written_bytes + of_block <= room
    free = max(0.0, (room if all_fits else beside_window) - tail_bytes - 2 * of_block)
    if not all_fits and (copied := _sketched_bytes(problem, layer, settings)):
        # What stays on the device needs no sketch.
        free = max(0.0, free - copied * (prompt + write_outs * problem.tail_tokens))
        on_device = {form: max(1.0, size - copied) for form, size in on_device.items()}
        written_bytes = problem.tail_tokens * on_device[settings.tail_form] + of_block
    could_stay = min(write_outs, int(free / written_bytes))
    reserved = could_stay if all_fits else int(settings.growth * could_stay)
    split = _split_prompt(layer, settings, prompt, on_device, free - reserved * written_bytes)
    free -= sum(split[form, "device"] * on_device[form] for form in FORMS)
    stay = min(write_outs, int(free / written_bytes))

    some_leave = stay < write_outs or any(split[form, "host"] for form in FORMS)
    memories: list[Memory] = ["device"] * stay
    memories.append("host" if some_leave else "device")
    blocks = (*first_block(settings.tail_form, first), *_cut(problem, layer, settings, window, split))
    codecs: list[Codec] = [settings.codec(memory) for memory in memories]
    return LayerPlan(blocks, settings.tail_form, tuple(memories), settings.method, write_out_codecs=tuple(codecs))


def _sketched_bytes(problem: Problem, layer: LayerShape, settings: Settings) -> float:
    """Bytes of the sketch of a token behind the link; 0 where there is none."""
    if problem.drafting is None or problem.drafting.codec is None:
        return 0.0
    shares: dict[Form, float] = {"activations": settings.activations, "keys_values": 1 - settings.activations}
    total = 0.0
    for form, share in shares.items():
        copied = form if layer.absorbs_keys else "keys_values"
        channels = layer.width(copied) // TENSORS[copied]
        batch, itemsize = problem.workload.batch, problem.shape.itemsize
        total += share * token_bytes(problem.drafting.codec, copied, batch, channels, itemsize)[0]
    return total


def _split_prompt(
    layer: LayerShape, settings: Settings, prompt: int, token_bytes: Mapping[Form, float], free: float
) -> Split:
    """Where the prompt's tokens go: as many to the device as fit in `free` bytes, first those as keys and values."""
    smaller = smaller_form(layer)
    small, pair = token_bytes[smaller], token_bytes["keys_values"]
    unit = settings.unit if prompt >= LEAST_ALIGNED else 1

    def in_units(tokens: int, available: int) -> int:
        """So many of the tokens available, or a few less in a multiple of the unit; all of them as they are."""
        return available if tokens >= available else tokens - tokens % unit

    if settings.on_device is not None:
        pairs = int(settings.on_device * free / pair)
    elif prompt * pair <= free:
        pairs = prompt
    else:  # as many as leave room for the others in the smaller form
        pairs = max(0, int((free - prompt * small) / (pair - small))) if pair > small else 0
    pairs = in_units(pairs, prompt)
    smaller_ones = in_units(int((free - pairs * pair) / small), prompt - pairs)
    hosted = prompt - pairs - smaller_ones
    activations = in_units(round(settings.activations * hosted), hosted)

    split: dict[tuple[Form, Memory], int] = {
        ("keys_values", "device"): pairs,
        ("activations", "device"): 0,
        ("activations", "host"): activations,
        ("keys_values", "host"): hosted - activations,
    }
    split[smaller, "device"] += smaller_ones
    return split


def _cut(problem: Problem, layer: LayerShape, settings: Settings, window: int, split: Split) -> tuple[BlockSpec, ...]:
    """A split prompt as blocks. Where activations are no multiple of the unit, the rest is a block of its own."""

    def cut(form: Form, memory: Memory) -> tuple[BlockSpec, ...]:
        tokens = split[form, memory]
        rest = tokens % settings.unit if form == "activations" and tokens >= LEAST_ALIGNED else 0
        runs: list[tuple[Form, Memory, int]] = [(form, memory, tokens - rest), (form, memory, rest)]
        most_bytes = window // BLOCKS_PER_WINDOW
        return cut_runs(runs, layer, problem.shape, problem.workload, most_bytes, settings.codec(memory))

    from_host = _interleave(cut("activations", "host"), cut("keys_values", "host"))
    return (*cut("keys_values", "device"), *cut("activations", "device"), *from_host)


def _interleave(first: Sequence[BlockSpec], second: Sequence[BlockSpec]) -> list[BlockSpec]:
    """Both in turns, evenly, beginning with one of the `first`.

    Activations take long to attend to, keys and values to copy: so each of them runs while the other does.
    """
    turns: list[tuple[float, BlockSpec]] = []
    for blocks in (first, second):
        turns += [(number / len(blocks), block) for number, block in enumerate(blocks)]
    return [block for _, block in sorted(turns, key=lambda turn: turn[0])]
