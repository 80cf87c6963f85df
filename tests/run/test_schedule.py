"""The schedule that XLA makes for an NVIDIA GPU, checked on a machine that has none.

jax's CUDA plugin compiles for a described GPU (extra `schedule`). The tests read the compiled step: every host block
is copied whole and asynchronously, with compute under the copy, and memory stays within the window.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described_gpu import A100, H200, Lowered, abstract_model, compile_traced

import kvrecomp
from experiments.support.traces import xplane
from kvrecomp.generate import TokenLoop
from kvrecomp.measure import machine as profile_machine
from kvrecomp.plan import BlockSpec, Drafting, LayerPlan, Plan, Workload
from kvrecomp.plan.footprint import (
    attention_bytes,
    memory_needed,
    packing_bytes,
    prefill_bytes,
    rows_bytes,
    sampling_bytes,
    unpacked_bytes,
)
from kvrecomp.plan.named import named_plan
from kvrecomp.plan.step_order import COPIES_IN_FLIGHT, DRAFT_PARTS, step_order
from kvrecomp.run.decoder import Decoder
from kvrecomp.run.drafters import Sketch
from kvrecomp.run.sampling import Sampling, choose, start_rows
from kvrecomp.run.schedule import OVERLAPPING
from models import Config, LlamaConfig, OPTConfig

pytest.importorskip("jax_plugins.xla_cuda13", reason="needs jax's CUDA 13 plugin: pip install '.[schedule]'")

MIB = 2**20
CONFIG = OPTConfig("guard", layers=4, hidden=1024, heads=8, intermediate=1024, vocab=512, positions=2048)
BLOCK = 16 * MIB  # 1024 tokens of 8 rows in bfloat16
LLAMA = LlamaConfig("grouped", layers=6, hidden=1024, heads=8, kv_heads=2, intermediate=2816, vocab=512, positions=8192)
WORKLOAD = Workload(batch=8, prompt=1024, new=512)
COMPUTE = {"fusion", "custom-call", "dot", "while"}


def plan_of(name: str, config: Config = CONFIG, window: int = 4 * BLOCK, workload: Workload = WORKLOAD) -> Plan:
    return named_plan(name, config.shape, workload, window=window, tail=64)


def make_decoder(config: Config, plan: Plan) -> Decoder:
    """A decoder that runs nothing, so it does not matter what memory this machine has."""
    model = abstract_model(config, kvrecomp.placement(plan))
    return Decoder(model, plan, budget=kvrecomp.Budget.of_gib(device=60, host=60))


def compile_plan(config: Config, plan: Plan, write_outs: int = 0) -> tuple[str, int]:
    """The program of a step compiled for an H200, as text, and its temporary device memory in bytes."""
    decoder = make_decoder(config, plan)
    return compile_traced(decoder._trace_step(write_outs), decoder._options("step", write_outs))


@functools.cache
def compile_step(
    name: str, window: int, write_outs: int = 0, config: Config = CONFIG, workload: Workload = WORKLOAD
) -> tuple[str, int]:
    """The same of a plan by name."""
    return compile_plan(config, plan_of(name, config, window, workload), write_outs)


INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*?) ([a-z\-]+)\((.*?)\)")  # name, shape, kind, operands


def instructions(text: str) -> list[str]:
    """The lines of the program's entry, in the order that they are executed in."""
    return text[text.index("\nENTRY") :].splitlines()[1:]


def check_copies(text: str) -> tuple[dict[str, tuple[int, int]], list[int]]:
    """Asserts that host arrays are copied whole and once; returns where each one's copy starts and ends, in this order,
    and where something is computed."""
    origin: dict[str, tuple] = {}  # instruction -> the host array it stands for, tuples as tuples of those
    started, ended, compute, host = {}, {}, [], set()
    for number, line in enumerate(instructions(text)):
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        name, shape, kind, arguments = match.groups()
        operands = re.findall(r"%([\w.\-]+)", arguments)
        sources = [origin.get(operand) for operand in operands]
        if kind == "parameter" and "S(5)" in shape:
            origin[name] = ("array", name, shape.split("{")[0])
            host.add(name)
        elif kind in ("tuple", "opt-barrier") and any(sources):
            origin[name] = sources[0] if kind == "opt-barrier" else ("tuple", sources)
        elif kind == "get-tuple-element" and sources[0] is not None and sources[0][0] == "tuple":
            element = sources[0][1][int(re.search(r"index=(\d+)", line).group(1))]
            if element is not None:
                origin[name] = element
        elif kind == "copy-start" and sources[0] is not None:
            _, array, whole = sources[0]
            assert array not in started, f"{array} is copied twice"
            assert shape.count(whole) == 2, f"{array} is not copied whole: {shape}"
            started[array] = number
            origin[name] = ("started", array, whole)
        elif kind == "copy-done" and sources[0] is not None:
            ended[sources[0][1]] = number
        else:
            assert not any(sources), f"host memory is read by {kind}: {line.strip()[:120]}"
            if kind in COMPUTE:
                compute.append(number)
    assert host == set(started) == set(ended), "a host array is not copied"
    return {array: (started[array], ended[array]) for array in sorted(started, key=started.get)}, compute


def check_schedule(text: str) -> int:
    """Asserts that, and that something is computed under every copy but the first; returns how many there are."""
    copies, compute = check_copies(text)
    for array, (start, end) in list(copies.items())[COPIES_IN_FLIGHT:]:
        assert any(start < at < end for at in compute), f"nothing is computed under {array}'s copy"
    return len(copies)


def computed_without_a_copy(text: str) -> list[int]:
    """What is computed while no copy is under way and some are yet to come."""
    copies, compute = check_copies(text)
    last = max(start for start, _ in copies.values())
    return [at for at in compute if at < last and not any(start < at < end for start, end in copies.values())]


@pytest.mark.parametrize(
    ("name", "window", "write_outs", "arrays"),
    [
        ("activations", 4 * BLOCK, 0, 4),
        ("activations", 2 * BLOCK, 0, 8),  # two blocks a layer
        ("activations", 4 * BLOCK, 3, 16),
        ("keys_values", 4 * BLOCK, 0, 8),
        ("split:0.5", 4 * BLOCK, 0, 8),
        ("device:0.5", 4 * BLOCK, 0, 4),
        ("activations+packed", 4 * BLOCK, 0, 4),
        ("split:0.5+packed", 4 * BLOCK, 2, 16),
    ],
)
def test_copies_are_whole_bounded_and_under_compute(name, window, write_outs, arrays):
    """Temporary memory: two blocks on their way and one in use, as the order says, and one unpacked; 24 MiB for scores
    and the like."""
    text, temporary = compile_step(name, window, write_outs)
    assert check_schedule(text) == arrays
    plan = plan_of(name, window=window)
    high_water = step_order(plan, write_outs).high_water
    assert temporary <= high_water + unpacked_bytes(plan, write_outs) + 24 * MIB
    assert high_water <= min(window, 3 * BLOCK)


@pytest.mark.parametrize(("write_outs", "arrays"), [(0, 1), (2, 3), (3, 3), (5, 3)])
def test_blocks_out_of_sight_are_not_copied(write_outs, arrays):
    """A token sees 193: of the prompt 192 are cached, and three tails of 64 take their place."""
    config = dataclasses.replace(LLAMA, layers=2, sliding_window=193)
    text, _ = compile_step("keys_values", 4 * BLOCK, write_outs, config)
    assert len(check_copies(text)[0]) == 2 * arrays


def test_kvpr_sends_activations_and_recomputes_from_them_under_the_copy_of_keys_and_values():
    """One copy at a time, and the link rests between two layers."""
    copies, compute = check_copies(compile_step("kvpr:0.75", 8 * BLOCK)[0])
    times = list(copies.values())
    assert len(times) == 2 * CONFIG.layers
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(times))
    for (_, arrived), (start, end) in zip(times[::2], times[1::2], strict=True):
        assert not any(arrived < at < start for at in compute)
        assert any(start < at < end for at in compute)
    for (_, end), (start, _) in zip(times[1::2], times[2::2]):
        assert any(end < at < start for at in compute)


def test_weights_are_copied_once_for_all_groups_and_under_compute():
    """Each layer's six matrices, and a block of each of two groups."""
    config = dataclasses.replace(CONFIG, layers=3)
    plan = kvrecomp.with_host_weights(plan_of("activations", config), 1.0)
    plan = dataclasses.replace(plan, groups=2, order="column")
    text, temporary = compile_plan(config, plan)
    assert len(check_copies(text)[0]) == 3 * (6 + 2)
    assert not computed_without_a_copy(text)
    assert temporary <= step_order(plan).high_water + 24 * MIB


@pytest.mark.parametrize(("groups", "order"), [(1, "row"), (3, "column")])
def test_weights_in_host_memory_are_on_the_device_a_few_at_a_time(groups, order):
    """As many as are said to be in flight, where nothing but weights is copied."""
    config = dataclasses.replace(CONFIG, layers=8, intermediate=4096)
    plan = kvrecomp.with_host_weights(plan_of("device", config, 2 * BLOCK), 1.0)
    plan = dataclasses.replace(plan, groups=groups, order=order)
    text, temporary = compile_plan(config, plan)
    assert len(check_copies(text)[0]) == 8 * 6
    assert temporary <= step_order(plan).high_water + 24 * MIB < plan.host_weight_bytes / 2


def test_a_trace_can_tell_the_layer_of_every_kernel_and_copy():
    """By the text of the program, which is all that says it: names in a trace are those of instructions."""
    config = dataclasses.replace(CONFIG, layers=3)
    text, _ = compile_step("activations", 2 * BLOCK, config=config)  # two blocks a layer
    layers = xplane.layers_of(text)
    found = [match for match in map(INSTRUCTION.match, instructions(text)) if match]
    assert [layers[match[1]] for match in found if match[3] == "copy-start"] == [0, 0, 1, 1, 2, 2]
    computed = [layers[match[1]] for match in found if match[3] in COMPUTE]
    inside = [layer for layer in computed if layer != xplane.OUTSIDE]
    assert inside == sorted(inside) and set(inside) == {0, 1, 2}
    assert len(computed) - len(inside) <= 8  # embedding, positions, unembedding


def test_without_holds_the_check_fails(monkeypatch):
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda operands: operands)
    config = dataclasses.replace(CONFIG, layers=6)
    text, temporary = compile_plan(config, plan_of("activations", config))
    assert temporary > 4 * BLOCK + 24 * MIB
    with pytest.raises(AssertionError, match="nothing is computed under"):
        check_schedule(text)


def test_a_sliced_block_fails_the_check(monkeypatch):
    put = jax.device_put

    def in_halves(array, where):
        if where != jax.memory.Space.Device or getattr(array, "ndim", 0) != 3:
            return put(array, where)
        half = array.shape[0] // 2
        return jax.numpy.concatenate([put(array[:half], where), put(array[half:], where)])

    monkeypatch.setattr(jax, "device_put", in_halves)
    with pytest.raises(AssertionError, match=r"host memory is read by|not copied whole"):
        check_schedule(compile_plan(CONFIG, plan_of("activations"))[0])


@pytest.mark.parametrize(
    ("hidden", "heads", "batch", "prompt"), [(4096, 32, 64, 512), (5120, 40, 32, 1024), (7168, 56, 16, 1024)]
)
def test_the_link_has_a_copy_to_carry_while_anything_is_computed(hidden, heads, batch, prompt):
    """At OPT's real shapes: XLA decides by its estimate of a layer's time how late it lets a copy start."""
    config = OPTConfig("wide", layers=3, hidden=hidden, heads=heads, intermediate=4 * hidden, vocab=512)
    text, _ = compile_step("activations", 1024 * MIB, config=config, workload=Workload(batch, prompt, 24))
    assert not computed_without_a_copy(text)


def kernels_before_starts(text: str) -> list[int]:
    """How many kernels of compute run before each copy starts that could have started before them: when the copy
    before the last one has arrived."""
    copies, compute = check_copies(text)
    times = list(copies.values())
    return [sum(end < at < start for at in compute) for (_, end), (start, _) in zip(times, times[2:])]


@pytest.mark.parametrize("name", ["activations", "device:0.5"])
def test_copies_start_before_the_compute_that_they_run_under(name):
    """All but a few at the ends of the step. XLA by itself starts them when it thinks that they have to."""
    config = OPTConfig("wide", layers=5, hidden=5120, heads=40, intermediate=4 * 5120, vocab=512)
    plan = named_plan(name, config.shape, Workload(64, 512, 24), tail=16)
    traced = make_decoder(config, plan)._trace_step(0)
    alone = kernels_before_starts(Lowered(traced, H200).compile(OVERLAPPING).as_text())
    told = kernels_before_starts(compile_traced(traced, OVERLAPPING)[0])
    assert min(alone) > 8
    assert max(told) <= 5 and told.count(0) >= len(told) // 3


@pytest.mark.parametrize(("name", "arrays"), [("activations", 4), ("kvpr:0.75", 8), ("device:0.5", 4)])
def test_older_gpus_compute_under_copies_too(name, arrays):
    decoder = make_decoder(CONFIG, plan_of(name))
    assert check_schedule(compile_traced(decoder._trace_step(0), decoder._options("step", 0), A100)[0]) == arrays


def test_xla_by_itself_computes_nothing_under_the_copies_of_older_gpus():
    lowered = Lowered(make_decoder(CONFIG, plan_of("activations"))._trace_step(0), A100)
    with pytest.raises(AssertionError, match="nothing is computed under"):
        check_schedule(lowered.compile({}).as_text())


@pytest.mark.parametrize(("config", "form"), [(LLAMA, "keys_values"), (CONFIG, "activations")])
def test_what_is_on_the_device_is_not_copied(config, form):
    """Scores of a block and of the tail are products of one query; as one product they would need one operand."""
    config = dataclasses.replace(config, layers=2)
    layer = LayerPlan((BlockSpec(form, "device", WORKLOAD.prompt),), form, ("device",))
    plan = dataclasses.replace(plan_of("device", config), layers=(layer,) * 2)
    _, temporary = compile_plan(config, plan)
    arrays = 2 if form == "keys_values" else 1
    assert temporary < WORKLOAD.batch * WORKLOAD.prompt * config.shape.layers[0].width(form) * 2 / arrays / 4


def products(text: str, einsum: str) -> list[str]:
    """The lines of the entry that compute this einsum."""
    return [line for line in instructions(text) if f"{einsum}/dot_general" in line and "fusion(" in line]


def test_the_rows_of_an_absorbed_query_are_not_scattered():
    """Attention reads a row at a time; XLA would leave the batch innermost."""
    rows = f"bf16[{WORKLOAD.batch},{CONFIG.heads},{CONFIG.hidden}]{{2,1,0}} fusion("
    found = products(compile_step("activations", 4 * BLOCK)[0], "bkgd,hkd->kbgh")
    assert len(found) == CONFIG.layers
    assert all(rows in line for line in found)


@pytest.mark.parametrize(
    ("name", "einsum"),
    [("activations", "bkgh,hkd->bkgd"), ("keys_values", "bkgs,sbkd->bkgd"), ("device", "bkgs,sbkd->bkgd")],
)
def test_a_single_row_is_multiplied_as_a_matrix(name, einsum):
    """Not summed over the first axis of the other operand, which a GPU reads slowly so."""
    config = dataclasses.replace(CONFIG, layers=2)
    text, _ = compile_step(name, 4 * BLOCK, config=config, workload=Workload(1, 1024, 512))
    found = products(text, einsum)
    assert len(found) >= config.layers
    assert all("__triton" in line for line in found)


def kernels(text: str) -> set[str]:
    """The computations that become kernels, values in them named by their order."""
    computations = [part for part in text.split("\n\n") if re.match(r"\s*%(fused|gemm_fusion|wrapped)", part)]
    return {_renamed(re.sub(r", (metadata|backend_config)=.*", "", computation)) for computation in computations}


def _renamed(computation: str) -> str:
    names: dict[str, str] = {}
    value = r"%[\w.\-]+|\bparam(eter)?_[\d.]+"
    return re.sub(value, lambda match: names.setdefault(match[0], f"%{len(names)}"), computation)


def test_a_program_for_one_more_block_has_no_new_kernels():
    """XLA times kernels that it has not seen, and while it does the tokens of running steps come late."""
    config = dataclasses.replace(CONFIG, layers=2)
    first, second, third = (
        kernels(compile_step("activations", 4 * BLOCK, write_outs, config)[0]) for write_outs in (0, 1, 2)
    )
    assert second - first, "a block of another length has new ones"
    assert len(third) > 20
    assert not third - second


@pytest.mark.parametrize(
    ("config", "name", "batch", "prompt"),
    [
        (LLAMA, "keys_values", 8, 4096),  # the feed-forward takes most
        (dataclasses.replace(CONFIG, layers=6, positions=4096), "activations", 2, 2048),  # scores take most
    ],
)
def test_a_prefill_has_the_intermediate_results_of_one_layer_on_the_device(config, name, batch, prompt):
    """Not of six: what is said is enough, and not much more than that."""
    for layout, least in ((name, 0.75), (f"{name}+packed", 0.6)):
        plan = named_plan(layout, config.shape, Workload(batch, prompt, 16))
        _, temporary = compile_traced(make_decoder(config, plan)._trace_prefill(), OVERLAPPING)
        estimate = prefill_bytes(plan.shape, plan.workload) + packing_bytes(plan)
        assert least * estimate < temporary <= estimate


@pytest.mark.parametrize("memory", ["device", "host"])
@pytest.mark.parametrize(
    ("config", "form", "method"),
    [
        (LLAMA, "activations", "absorb"),
        (LLAMA, "activations", "recompute"),
        (LLAMA, "keys_values", "absorb"),
        (CONFIG, "activations", "recompute"),
        (CONFIG, "keys_values", "absorb"),
    ],
)
def test_a_step_has_what_it_computes_of_one_layer_on_the_device(config, form, method, memory):
    """Not of eight: what is said, of many tokens written out, is enough."""
    config = dataclasses.replace(config, layers=8)
    layer = LayerPlan((BlockSpec(form, memory, 64),), form, (memory,), method)
    plan = Plan("some", config.shape, Workload(23, 64, 1400), (layer,) * 8, tail=509)
    _, temporary = compile_plan(config, plan, 2)
    computed = temporary - step_order(plan, 2).high_water
    attention = attention_bytes(plan, 2)
    assert 0.25 * attention < computed <= attention + rows_bytes(plan)
    assert temporary <= kvrecomp.memory_needed(plan, 2)["device"]["prefill or step"]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 7, "top_p": 0.5}]
)
@pytest.mark.parametrize(("rows", "vocab"), [(509, 32_003), (7, 1009)])
def test_choosing_tokens_takes_what_is_said_beside_the_logits(options, rows, vocab):
    shape = dataclasses.replace(CONFIG, vocab=vocab).shape
    abstract = jax.ShapeDtypeStruct
    row = jax.eval_shape(start_rows, *(abstract(axes, jnp.uint32) for axes in ((), (rows,), (), (rows,))))
    logits = abstract((rows, vocab), jnp.float32)
    given = Sampling(bool(options), **options), abstract((3,), jnp.int32), abstract((), jnp.int32), row, logits
    _, temporary = compile_traced(choose.trace(*given), {})
    estimate = sampling_bytes(shape, Workload(rows, 5, 3))
    assert temporary <= estimate
    assert temporary > 0.8 * estimate or "top_p" not in options


def test_what_the_profile_copies_is_copied_whole(monkeypatch):
    """And as often as its seconds are divided by."""
    traced, trace = [], profile_machine._traced
    monkeypatch.setattr(profile_machine, "_traced", lambda *given: traced.append(trace(*given)) or traced[-1])
    profile_machine._copy_timer(MIB, 3, True, 2)
    profile_machine._to_device_timer(2**24)
    texts = [compile_traced(program, OVERLAPPING)[0] for program in traced]
    assert [len(re.findall(r" copy-start\(", text)) for text in texts] == [3 * 2, 3 * 8, 2, 4]
    for text, blocks in zip(texts, (3, 3, 2, 4), strict=True):
        assert len(re.findall(r"S\(5\)\} parameter\(", text)) == blocks


def test_as_many_copies_as_the_window_allows_are_on_their_way_while_drafts_are_made():
    """In the program that checks one group and drafts for the other; a step has two on their way."""
    config = dataclasses.replace(CONFIG, layers=8)
    plan = plan_of("activations", config, window=6 * BLOCK)
    plan = dataclasses.replace(plan, groups=2, drafting=Drafting("sketch", 2 * DRAFT_PARTS, codec="fp8"))
    decoder = make_decoder(config, plan)
    loop = TokenLoop(decoder, Sampling(), [], 0, drafter=Sketch())
    work, names = plan.workload, np.zeros(plan.workload.batch, np.uint32)
    prompts = [(np.zeros((work.batch, work.prompt), np.int32), np.ones((work.batch, work.prompt), bool))] * 2
    rounds, _ = loop._start_rounds(Sketch(), prompts, np.zeros(0, np.int32), names)
    options = decoder._options("round", 0, 2 * DRAFT_PARTS, rounds)
    text, temporary = compile_traced(decoder._trace("round", 0, 2 * DRAFT_PARTS, rounds), options)
    on_their_way, while_drafting = 0, []
    for line in instructions(text):
        found = INSTRUCTION.match(line)
        kind = found[3] if found else ""
        on_their_way += (kind == "copy-start") - (kind == "copy-done")
        if kind == "while":
            assert "known_trip_count" in line  # or a GPU would read how often it goes round behind all copies
            while_drafting.append(on_their_way)
    # Of 8, with 2 and 5 layers attended to before the later drafts; XLA starts the last of the first six a little late.
    assert while_drafting == [5, 6, 3]
    order = step_order(plan, drafts=True)
    assert order.high_water == 6 * BLOCK
    needed = memory_needed(plan, 0)["device"]["prefill or step"]
    assert order.high_water < temporary <= needed
