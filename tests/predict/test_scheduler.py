"""The scheduler: against brute force, within every budget, and the choices that one would make by hand."""

import collections
import functools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import models
from kvrecomp.plan import GIB, MIB, BlockSpec, Budget, LayerPlan, LayerShape, ModelShape, Plan, PlanError, Workload
from kvrecomp.plan.compiling import decode_seconds
from kvrecomp.plan.cutting import BLOCKS_PER_WINDOW
from kvrecomp.plan.footprint import memory_needed, prefill_bytes
from kvrecomp.plan.named import named_plan, spread
from kvrecomp.predict import cost, scheduler, search
from kvrecomp.predict.cost import plan_costs
from kvrecomp.predict.estimate import estimate
from kvrecomp.predict.hardware import LEAST_DEVICE, WORKS, Curve, HardwareProfile, LayerTimes, Line, attention_work

kv, acts = "keys_values", "activations"
LEARNED = LayerShape(4096, 32, 32, 128, 16384)  # OPT-6.7B's layer
ROTARY = LayerShape(4096, 32, 32, 128, 11008, gated=True, absorbs_keys=False)  # Llama-2-7B's
GROUPED = LayerShape(4096, 32, 8, 128, 14336, gated=True, absorbs_keys=False)  # Llama-3-8B's
LAYERS = {"learned": LEARNED, "rotary": ROTARY, "grouped": GROUPED}

few = settings(max_examples=50, phases=(Phase.explicit, Phase.generate))


def model(*layers, **options):
    return ModelShape("some", layers, vocab=1009, embedding=61, positions=10**6, **options)


def make_plan(shape, *given, **options):
    """With all weights on the device, as most of these tests are about the cache."""
    return scheduler.make_plan(shape, *given, weights=["device"] * len(shape.layers), **options)


def machine(name, **changes):
    return replace(HardwareProfile.from_datasheet(name), **changes)


def device_bytes(plan, write_outs=None):
    return sum(memory_needed(plan, write_outs)["device"].values())


def fits(plan, budget):
    needed = {place: sum(items.values()) for place, items in memory_needed(plan).items()}
    limits = {place: math.inf if given is None else given for place, given in vars(budget).items()}
    return all(needed[place] <= limits[place] for place in needed)


def seconds(profile, *plans):
    return [float(own) for own in plan_costs(profile, plans).seconds]


def mean_seconds(profile, *plans):
    """Of every step of the workload."""
    totals = np.zeros(len(plans))
    counts = collections.Counter(step // plans[0].tail for step in range(max(1, plans[0].workload.new - 1)))
    for write_outs, count in counts.items():
        totals += count * plan_costs(profile, plans, write_outs).seconds
    return [float(total) / sum(counts.values()) for total in totals]


def tokens(layer):
    """Of a layer's prompt by (form, memory)."""
    counts = collections.Counter()
    for block in layer.prompt:
        counts[block.form, block.memory] += block.tokens
    return counts


def least(shape, work, tail=16):
    """Device bytes of weights, prefill and tails of that many tokens in the form that takes more, and no blocks."""
    needed = memory_needed(named_plan("device", shape, work))["device"]
    widest = sum(max(layer.width(form) for form in (kv, acts)) for layer in shape.layers)
    tails = min(tail, work.new) * work.batch * widest * shape.itemsize
    return needed["weights"] + needed["prefill or step"] + tails


def cache_bytes(shape, work, form=kv):
    """Of everything that the workload caches, in one form."""
    widths = sum(layer.width(form) for layer in shape.layers)
    return (work.prompt + work.new) * work.batch * widths * shape.itemsize


# --- brute force ------------------------------------------------------------------------------------------------------


def compositions(total, parts):
    """All ways to write a number as that many numbers from zero on."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield first, *rest


def pieces(form, count, layer, work, window):
    """Blocks on the host, as few and as equal as a quarter of the window lets them be; bfloat16."""
    most = max(1, window // BLOCKS_PER_WINDOW // (work.batch * layer.width(form) * 2))
    blocks = -(-count // most)
    return [BlockSpec(form, "host", count // blocks + (number < count % blocks)) for number in range(blocks)]


def every_plan(shape, work, tail, window, parts):
    """Layers alike: each eighth or so of the prompt in either form and memory, tails in either form, the first of them
    written to the device or none, activations absorbed or recomputed."""
    (layer,) = set(shape.layers)
    times = max(0, (work.new - 1) // tail)
    share = work.prompt // parts
    assert share * parts == work.prompt
    for counts in compositions(parts, 4):
        pairs_here, acts_here, acts_sent, pairs_sent = (share * count for count in counts)
        blocks = [BlockSpec(form, "device", count) for form, count in ((kv, pairs_here), (acts, acts_here)) if count]
        blocks += pieces(acts, acts_sent, layer, work, window) + pieces(kv, pairs_sent, layer, work, window)
        for form in (kv, acts):
            for method in ("absorb", "recompute") if acts_here or acts_sent or form == acts else ("absorb",):
                for kept in sorted({round(times * part / 4) for part in range(5)}):
                    grown = ("device",) * kept + (() if kept == times and times else ("host",))
                    own = LayerPlan(tuple(blocks), form, grown, method)
                    yield Plan("any", shape, work, (own,) * len(shape.layers), tail, window)


@pytest.mark.parametrize("part", [0.0, 0.2, 0.6, 1.05])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["t4", "h200"])
def test_as_good_as_brute_force(name, kind, part):
    """With room for part of the cache. One tail holds all new tokens."""
    shape, work = model(*[LAYERS[kind]] * 3), Workload(batch=8, prompt=1024, new=13)
    budget = Budget(least(shape, work) + part * cache_bytes(shape, work))
    compare_with_brute_force(machine(name), shape, work, budget, 8)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("kernel_seconds", [0.0, 3e-6])
def test_as_good_as_brute_force_with_few_tokens(kind, kernel_seconds):
    shape, work = model(LAYERS[kind]), Workload(batch=67, prompt=6, new=1)
    profile = machine("a100", kernel_seconds=kernel_seconds)
    for part in (0, 0.5, 1.5):
        compare_with_brute_force(profile, shape, work, Budget(least(shape, work) + part * cache_bytes(shape, work)), 6)


@pytest.mark.parametrize("part", [0.05, 0.4, 1.05])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["t4", "a100"])
def test_as_good_as_brute_force_when_the_cache_grows(name, kind, part):
    """More new tokens than the prompt has; by the mean of all steps."""
    shape, work = model(*[LAYERS[kind]] * 2), Workload(batch=16, prompt=512, new=1201)
    budget = Budget(least(shape, work) + part * cache_bytes(shape, work))
    compare_with_brute_force(machine(name), shape, work, budget, 4)


def compare_with_brute_force(profile, shape, work, budget, parts):
    chosen = make_plan(shape, work, profile, budget)
    assert fits(chosen, budget)
    others = [plan for plan in every_plan(shape, work, chosen.tail, chosen.window, parts) if fits(plan, budget)]
    assert len(others) > 6
    own, *found = mean_seconds(profile, chosen, *others)
    best = min(zip(found, others), key=lambda pair: pair[0])
    assert own <= 1.01 * best[0], f"{own / best[0]:.3f} times as long as\n{best[1]}\nchosen\n{chosen}"


# --- budgets ----------------------------------------------------------------------------------------------------------

NAMES = [
    "activations",
    "recompute",
    "keys_values",
    *(f"{kind}:{part}" for kind in ("split", "kvpr", "device") for part in (0.25, 0.5, 0.75)),
    "device",
]


@st.composite
def problems(draw):
    """Shapes, workloads, machines and budgets, some of them barely enough or not enough."""

    def layer():
        head_dim, kv_heads = draw(st.sampled_from([7, 64, 128])), draw(st.sampled_from([1, 2, 8]))
        heads = kv_heads * draw(st.sampled_from([1, 4]))
        hidden = draw(st.sampled_from([35, 1024, 4096]))
        return LayerShape(hidden, heads, kv_heads, head_dim, 2 * hidden, absorbs_keys=draw(st.booleans()))

    shapes = [layer() for _ in range(draw(st.integers(1, 2)))]
    layers = draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=4))
    shape = model(*layers, dtype=draw(st.sampled_from(["bfloat16", "float32"])))
    sizes = st.sampled_from([1, 3, 32, 1000]), st.sampled_from([1, 11, 500]), st.sampled_from([1, 2, 17, 300])
    work = Workload(*map(draw, sizes))
    name = draw(st.sampled_from(["t4", "a100", "h200", "gh200"]))
    profile = machine(name, kernel_seconds=draw(st.sampled_from([0.0, 5e-6])), to_device=Line(1e-5, 0.0))
    room = draw(st.sampled_from([-1.0, 0.0, 1.0, 1e6]) | st.floats(0, 1.5).map(lambda part: part * 1e10))
    room = min(room, 1.5 * cache_bytes(shape, work))
    host = draw(st.sampled_from([None, None, None, 0.0, 1e6, 1e9]))
    return shape, work, profile, Budget(max(LEAST_DEVICE, least(shape, work) + room), host)


@settings(few, max_examples=30)
@given(problems())
def test_no_plan_is_over_its_budget_or_slower_than_one_by_name(problem):
    shape, work, profile, budget = problem
    try:
        plan = make_plan(shape, work, profile, budget)
    except PlanError as error:
        assert "may be used" in str(error)
        plan = None
    named = {(name, tail): named_plan(name, shape, work, tail=tail) for name in NAMES for tail in (16, None)}
    if plan:
        named |= {(name, plan.tail): named_plan(name, shape, work, tail=plan.tail) for name in NAMES}
    others = {name: other for name, other in named.items() if fits(other, budget)}
    if plan is None:
        assert not others
        return
    assert fits(plan, budget) and plan.shape == shape and plan.workload == work
    for write_outs in range(plan.write_outs):
        assert device_bytes(plan, write_outs) <= budget.device
    alike = {name: other for name, other in others.items() if other.tail == plan.tail}  # shorter ones compile more
    if alike:
        own, *found = seconds(profile, plan, *alike.values())
        best = min(zip(found, alike), key=lambda pair: pair[0])
        assert own <= 1.01 * best[0], f"{best[1]} takes {best[0]}, and {own}\n{plan}"


def test_one_byte_less_is_not_enough():
    shape, work = model(*[LEARNED] * 2), Workload(batch=8, prompt=512, new=16)
    refused, enough = 1.0 * MIB, 64.0 * GIB
    while enough - refused > 1:
        middle = (refused + enough) // 2
        try:
            plan = make_plan(shape, work, machine("h200"), Budget(middle))
            enough = middle
        except PlanError:
            refused = middle
    assert device_bytes(plan) <= enough
    # There is nothing smaller than everything in host memory, with the shortest tail that there is.
    assert enough == device_bytes(named_plan("activations", shape, work, tail=1, window=16 * MIB))


@pytest.mark.parametrize(
    ("name", "batch", "prompt", "gib"),
    [("opt-6.7b", 128, 1024, 16), ("llama-2-7b", 128, 512, 15), ("llama-3-8b", 64, 1024, 18)],
)
def test_what_is_said_to_fit_fits(name, batch, prompt, gib):
    shape, work, budget = models.PRESETS[name].shape, Workload(batch, prompt, 256), Budget.of_gib(gib)
    with pytest.raises(PlanError) as raised:
        make_plan(shape, work, machine("h200"), budget)
    said = re.search(r": a batch of (\d+) fits where (\d+) were asked for", str(raised.value))
    assert said and int(said[2]) == batch and 1 <= int(said[1]) < batch
    assert fits(make_plan(shape, replace(work, batch=int(said[1])), machine("h200"), budget), budget)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(device=5 * GIB), r"device memory \(weights 12\.\d* GiB.*not even a batch of 1 fits"),
        (Budget(device=14 * GIB, host=1e6), r"needs [\d.]+ MiB of host memory .*; 976\.6 KiB may be used"),
    ],
)
def test_what_cannot_fit_is_said(budget, message):
    with pytest.raises(PlanError) as raised:
        make_plan(models.PRESETS["opt-6.7b"].shape, Workload(8, 512, 32), machine("h200"), budget)
    assert re.search(message, str(raised.value)) and "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [80, 65_535, 1e18, 80 * 2**40])
def test_budgets_in_the_wrong_unit(size):
    """80 for 80 GiB, and bytes for GiB."""
    with pytest.raises(PlanError, match=r"than any device has: a Budget is in bytes, Budget\.of_gib takes GiB"):
        make_plan(model(LEARNED), Workload(1, 11, 3), machine("h200"), Budget(size))


@pytest.mark.parametrize("device", [0, -1, -1e9, math.nan])
def test_budgets_that_are_none(device):
    with pytest.raises(PlanError, match="must be greater than zero"):
        Budget(device)
    with pytest.raises(PlanError, match="must not be negative"):
        Budget(host=-1)


@pytest.mark.parametrize("batch", [10_000, 20_000])
def test_a_token_larger_than_a_window(batch):
    """Of 20000 rows: 312 MiB of keys and values, where 1.3 GiB are left beside the weights for all there is."""
    shape, work = model(LEARNED), Workload(batch, 2, 3)
    budget = Budget(least(shape, replace(work, batch=batch), tail=1))
    assert fits(named_plan("activations", shape, work, tail=1), budget)
    assert fits(make_plan(shape, work, machine("h200"), budget), budget)


@pytest.mark.parametrize("name", ["t4", "h200"])
@pytest.mark.parametrize("work", [Workload(1, 1, 1), Workload(1, 1, 2), Workload(1, 2, 1), Workload(3, 1, 37)], ids=str)
def test_the_smallest_workloads(name, work):
    for layer in LAYERS.values():
        shape = model(layer)
        for room in (0, 1, 10**6):
            budget = Budget(least(shape, work) + room)
            assert fits(make_plan(shape, work, machine(name), budget), budget)


# --- choices that one would make by hand ------------------------------------------------------------------------------

WORK = Workload(batch=32, prompt=1024, new=16)


def no_room(shape, form=None):
    """Not a token of `WORK`'s cache fits on the device beside tails of 16 tokens, in that form or the smaller one."""
    widths = sum(layer.width(form) if form else min(map(layer.width, (kv, acts))) for layer in shape.layers)
    return Budget(least(shape, WORK, tail=0) + WORK.new * WORK.batch * widths * 2 + 1000)


@pytest.mark.parametrize("name", ["a100", "h200", "rtx5000"])
def test_learned_positions_make_activations(name):
    """Half the bytes, and absorbed, so that the link is the cost."""
    shape = model(*[LEARNED] * 3)
    plan = make_plan(shape, WORK, machine(name), no_room(shape))
    for layer in plan.layers:
        assert tokens(layer) == {(acts, "host"): 1024} and layer.tail_form == acts and layer.method == "absorb"
    assert plan.bytes_in("host") == 3 * 1024 * 32 * 4096 * 2
    assert "bound by the link" in plan.reason


@pytest.mark.parametrize("name", ["t4", "h200"])
def test_grouped_queries_make_keys_and_values(name):
    """2 * 1024 numbers a token against 4096."""
    shape = model(*[GROUPED] * 3)
    plan = make_plan(shape, WORK, machine(name), no_room(shape))
    for layer in plan.layers:
        assert tokens(layer) == {(kv, "host"): 1024} and layer.tail_form == kv


def test_rotary_positions_on_a_slow_device_make_a_split():
    """Where K is recomputed from all activations, a T4 takes longer than its link."""
    shape = model(*[ROTARY] * 3)
    profile = machine("t4", matmul_rate=30e12)  # a T4 sustains about half of its peak
    plan = make_plan(shape, WORK, profile, no_room(shape, kv))
    own, ends = seconds(profile, plan)[0], [named_plan(name, shape, WORK) for name in ("activations", kv)]
    for layer in plan.layers:
        counts = tokens(layer)
        assert 0 < counts[acts, "host"] < 1024 and counts[kv, "host"] > 0 and sum(counts.values()) == 1024
        assert layer.method == "absorb"  # V at least
    assert own < 0.9 * min(seconds(profile, *ends))
    splits = [named_plan(f"split:{part / 32}", shape, WORK, tail=plan.tail, window=plan.window) for part in range(33)]
    assert own <= 1.005 * min(seconds(profile, *splits))


@pytest.mark.parametrize("name", ["t4"])
def test_rotary_positions_at_a_data_sheets_rates(name):
    shape = model(*[ROTARY] * 3)
    for layer in make_plan(shape, WORK, machine(name), no_room(shape, kv)).layers:
        assert 0 < tokens(layer)[acts, "host"] < 1024


@pytest.mark.parametrize("kind", LAYERS)
def test_half_of_the_cache_fits(kind):
    """Then at most half of the bytes cross the link, and the step is hardly longer than half.

    Where keys are rotated a few more bytes may be worth it, since fewer of them have to be recomputed.
    """
    shape, profile = model(*[LAYERS[kind]] * 4), machine("h200")
    everything = make_plan(shape, WORK, profile, no_room(shape, kv if kind == "rotary" else None))
    sent = everything.bytes_in("host")
    budget = Budget(least(shape, WORK) + sent / 2)
    half = make_plan(shape, WORK, profile, budget)
    most = 0.55 if kind == "rotary" else 0.5 * (1 + 2 / 1024)  # a token a layer may be left over
    assert 0 < half.bytes_in("host") <= most * sent
    before, after = seconds(profile, everything, half)
    assert after <= 0.55 * before


@pytest.mark.parametrize("part", [0.13, 0.21, 0.37])
def test_blocks_are_even_where_kernels_would_be_slow_and_fill_the_room_where_not(part):
    """Of rotary layers activations, whose K is recomputed, take twice as long in uneven blocks, which the device cannot
    afford; the others keep as many tokens as fit."""
    for kind, unit in (("rotary", 32), ("learned", 1)):
        shape, slow = model(*[LAYERS[kind]] * 3), machine("h200", matmul_rate=2e14)
        budget = Budget(least(shape, WORK) + part * cache_bytes(shape, WORK))
        plan = make_plan(shape, WORK, slow, budget)
        blocks = [block for layer in plan.layers for block in layer.prompt]
        assert not any(block.tokens % 32 for block in blocks if block.form == acts and kind == "rotary")
        token_bytes = 3 * WORK.batch * 4096 * 2
        left = budget.device - sum(memory_needed(plan)["device"].values())
        assert left < (unit + 1) * token_bytes, kind


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["t4", "h200"])
@pytest.mark.parametrize("new", [32, 2000])
def test_everything_fits(kind, name, new):
    """Nothing crosses the link, not even what is generated; keys and values, which cost nothing to use."""
    shape, work = model(*[LAYERS[kind]] * 2), replace(WORK, new=new)
    budget = Budget(least(shape, work, tail=1024) + 1.2 * cache_bytes(shape, work))
    plan = make_plan(shape, work, machine(name), budget)
    for write_outs in range(plan.write_outs + 1):
        assert plan.bytes_in("host", write_outs) == 0
    assert all(tokens(layer) == {(kv, "device"): 1024} and layer.tail_form == kv for layer in plan.layers)
    assert seconds(machine(name), plan)[0] <= 1.00001 * seconds(machine(name), named_plan("device", shape, work))[0]


def attending(kv_seconds, absorb_seconds, work=WORK, slower=(1, 1)):
    """A machine whose layers do nothing but attend, in so many seconds a token; `slower` is how many times as long
    uneven blocks of activations take, on the host and on the device."""
    each = {kv: kv_seconds, "absorb": absorb_seconds, "recompute": 1e-5}
    curves = {kind: Curve.line(0.0, seconds) for kind, seconds in each.items()}
    here = {attention_work(kind, "device"): curve for kind, curve in curves.items()}
    places = zip(("host", "device"), slower)
    here |= {attention_work("absorb", place, 257): curves["absorb"].times(factor) for place, factor in places}
    times = LayerTimes(LEARNED, "bfloat16", work.batch, dict.fromkeys(WORKS, Curve.line(0.0)) | curves | here)
    return machine("h200").with_times(times)


@pytest.mark.parametrize("slower", [(2, 1), (1, 2), (2, 2)])
def test_uneven_blocks_that_are_slow_in_either_memory_are_avoided(slower):
    """Compute takes about as long as copies: with 543 tokens on the device and 481 behind the link, which fit, a step
    would take longer."""
    shape = model(*[LEARNED] * 3)
    profile = attending(1e-8, 2.2e-6, slower=slower)
    budget = Budget(least(shape, WORK) + 0.28 * cache_bytes(shape, WORK))
    plan = make_plan(shape, WORK, profile, budget)
    blocks = BlockSpec(acts, "device", 512), BlockSpec(acts, "host", 512)
    even = replace(plan, layers=(LayerPlan(blocks, acts, ("host",)),) * 3, window=GIB)
    assert fits(even, budget)
    took, best = seconds(profile, plan)[0], seconds(profile, even)[0]
    assert took <= 1.01 * best


@pytest.mark.parametrize("prompt", [1023, 2040])
@pytest.mark.parametrize("slower", [(2, 2), (1, 2)])
def test_what_is_left_of_an_odd_prompt_is_a_block_of_its_own(prompt, slower):
    """All fits on the device as activations; in one block they would take twice as long."""
    work = replace(WORK, prompt=prompt)
    shape, profile = model(*[LEARNED] * 3), attending(1e-6, 1e-6, work, slower)
    budget = Budget(least(shape, work) + 0.6 * cache_bytes(shape, work))
    plan = make_plan(shape, work, profile, budget)
    assert plan.link_bytes() == 0
    even = BlockSpec(acts, "device", prompt // 32 * 32), BlockSpec(acts, "device", prompt % 32)
    by_hand = replace(plan, layers=(LayerPlan(even, acts, ("device",)),) * 3)
    assert fits(by_hand, budget)
    took, best = seconds(profile, plan, by_hand)
    assert took <= 1.001 * best


def test_a_mix_on_the_device_is_found_between_the_steps_of_the_grid():
    """Of Llama-2-7B's 768 tokens less than half of the room as keys and values, a few of them behind the link: with all
    in the smaller form on the device attention takes longer, and with more of the larger the link does."""
    shape = replace(models.preset("llama-2-7b").shape, dtype="bfloat16", positions=10**4)
    work = Workload(32, 768, 500)
    budget = Budget(least(shape, work) + 0.8 * cache_bytes(shape, work))
    plan = make_plan(shape, work, machine("h100"), budget)
    blocks = BlockSpec(kv, "device", 352), BlockSpec(acts, "device", 352), BlockSpec(kv, "host", 64)
    by_hand = replace(plan, layers=(LayerPlan(blocks, kv, ("host",)),) * len(shape.layers))
    assert fits(by_hand, budget)
    took, best = seconds(machine("h100"), plan, by_hand)
    assert took <= 1.01 * best


@pytest.mark.parametrize("slower", [1.005, 1.2])
def test_the_smaller_form_fits_where_the_larger_does_not(slower):
    """As activations all tokens stay on the device; where those are surely slower, no more are than must be."""
    shape = model(*[LEARNED] * 2)
    budget = Budget(least(shape, WORK) + 0.75 * cache_bytes(shape, WORK))
    plan = make_plan(shape, WORK, attending(1e-8, slower * 1e-8), budget)
    assert plan.bytes_in("host", plan.write_outs) == 0
    for layer in plan.layers:
        counts = tokens(layer)
        if slower == 1.2:
            assert counts[kv, "device"] > 0.4 * 1024 and counts[acts, "device"] > 0.4 * 1024
            assert device_bytes(plan) > 0.98 * budget.device
        else:
            assert counts == {(acts, "device"): 1024} and layer.tail_form == acts


@pytest.mark.parametrize("order", [1, -1])
def test_a_wider_layer_gets_settings_of_its_own(order):
    """Grouped queries beside a layer twice as wide without: each in the form that is smaller for it."""
    wide = replace(LEARNED, hidden=8192, heads=64, kv_heads=64)
    shape = model(*[GROUPED, GROUPED, wide, wide][::order])
    nothing = make_plan(shape, WORK, machine("h200"), Budget(least(shape, WORK)))
    for layer, own in zip(shape.layers, nothing.layers):
        assert {block.form for block in own.prompt} == {kv if layer == GROUPED else acts}
        assert tokens(own)[own.prompt[-1].form, "host"] >= 1024 - 32
    half = make_plan(shape, WORK, machine("h200"), Budget(least(shape, WORK) + nothing.bytes_in("host") / 2))
    assert half.bytes_in("host") <= 0.51 * nothing.bytes_in("host")
    # Sizes are each layer's own: blocks of at most a quarter of the window.
    for layer, own in zip(shape.layers, nothing.layers):
        assert max(nothing.bytes_of(layer, block) for block in own.prompt) <= nothing.window / BLOCKS_PER_WINDOW


def test_what_a_sliding_window_hides_is_not_sent():
    """Mistral sees 4096 tokens: of 16384 a quarter is in host memory, with one more than the next token sees."""
    shape, work = models.preset("mistral-7b").shape, Workload(4, 16384, 32)
    plan = make_plan(shape, work, machine("h200"), Budget(least(shape, work)))
    assert {sum(block.tokens for block in layer.prompt) for layer in plan.layers} == {4096}
    assert plan.bytes_in("host") <= 4096 * 4 * 2 * 8 * 128 * 2 * 32


@pytest.mark.parametrize("given", [{"tail": 0}, {"window": -1}])
def test_sizes_that_are_none(given):
    ((name, size),) = given.items()
    with pytest.raises(PlanError, match=f"{name} is {size}; it must be greater than zero, or None to be chosen"):
        make_plan(model(LEARNED), WORK, machine("h200"), **given)


def test_a_layer_twice_as_wide_keeps_as_many_tokens():
    """The same kind of layer in two widths: of room for half, the wider takes two thirds."""
    wide = replace(LEARNED, hidden=8192, heads=64, kv_heads=64)
    shape = model(LEARNED, wide)
    budget = Budget(least(shape, WORK) + cache_bytes(shape, WORK, acts) / 2)
    plan = make_plan(shape, WORK, machine("h200"), budget)
    narrow, wider = (tokens(layer)[acts, "device"] for layer in plan.layers)
    assert narrow == pytest.approx(wider, abs=2) and narrow > 0.45 * 1024
    one, other = (
        sum(plan.bytes_of(layer, block) for block in own.prompt) for layer, own in zip(shape.layers, plan.layers)
    )
    assert other == pytest.approx(2 * one, rel=0.01)  # two tokens of 512 more or less


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_generated_stays_on_the_device_while_there_is_room(kind):
    """And goes to the host from then on; at the end the budget still holds."""
    shape, work = model(*[LAYERS[kind]] * 2), Workload(batch=64, prompt=512, new=3001)
    form = kv if kind == "grouped" else acts
    room = cache_bytes(shape, work, form) * (512 + 1000) / 3513
    budget = Budget(least(shape, work, tail=64) + room)
    plan = make_plan(shape, work, machine("h200"), budget)
    assert plan.write_outs > 4 and device_bytes(plan) <= budget.device
    for layer in plan.layers:
        changes = sum(one != other for one, other in zip(layer.write_out_memories, layer.write_out_memories[1:]))
        assert layer.write_out_memories[0] == "device" and layer.write_out_memories[-1] == "host" and changes == 1
    # Room for one more tail in every layer is not left over.
    assert budget.device - device_bytes(plan) < plan.tail_bytes + 100 * MIB
    assert plan.bytes_in("host", 1) < plan.bytes_in("host", plan.write_outs)


def test_a_long_run_counts_with_all_of_its_steps():
    """Half way everything is on the device in either form of the tail; keys and values leave it soon after, activations
    late."""
    shape, work, budget = models.preset("llama-2-7b").shape, Workload(32, 64, 3000), Budget.of_gib(40, 400)
    profile = machine("h100")
    chosen = make_plan(shape, work, profile, budget)

    def grown(form, kept):
        layer = LayerPlan((BlockSpec(form, "device", 64),), form, ("device",) * kept + ("host",))
        return replace(chosen, layers=(layer,) * 32)

    found = [grown(form, kept) for form in (kv, acts) for kept in range(1, chosen.write_outs + 1)]
    others = [plan for plan in found if fits(plan, budget)]
    halves = seconds(profile, chosen, *others)
    totals = mean_seconds(profile, chosen, *others)
    assert totals[0] <= 1.01 * min(totals) and max(totals) > 1.8 * totals[0] and min(halves) < 0.8 * halves[0]
    first, last = (1e3 * float(plan_costs(profile, [chosen], own).seconds[0]) for own in (0, 2998 // chosen.tail))
    assert f"a step predicted ({first:.2f} the first, {last:.2f} the last), bound" in chosen.reason


def test_a_tail_that_only_one_form_has_a_window_for():
    """256 tokens of 32 rows of OPT-6.7B are 64 MiB as activations and 128 as keys and values."""
    budget, own = Budget.of_gib(22, 400), {"tail": 256, "weights": ("device",) * 32}
    plan = scheduler.make_plan(OPT, Workload(32, 1024, 512), machine("h100"), budget, window=64 * MIB, **own)
    assert {layer.tail_form for layer in plan.layers} == {acts} and fits(plan, budget)
    with pytest.raises(PlanError, match=r"the window of 63\.0 MiB is smaller than a block of"):
        scheduler.make_plan(OPT, Workload(32, 1024, 512), machine("h100"), budget, window=63 * MIB, **own)


# --- what a plan says -------------------------------------------------------------------------------------------------


def test_the_reason_is_a_sentence():
    shape = model(*[LEARNED] * 3)
    profile = machine("h200")
    plan = make_plan(shape, WORK, profile, Budget(least(shape, WORK) + 0.1 * cache_bytes(shape, WORK)))
    said = re.fullmatch(
        r"([\d.]+) ms a step predicted, bound by the (link|device): copies take ([\d.]+) ms, compute ([\d.]+) ms; next "
        r"best is (\S+), ([\d.]+) ms",
        plan.reason,
    )
    predicted = plan_costs(profile, [plan])
    for text, value in zip(said.group(1, 3, 4), (predicted.seconds, predicted.copying, predicted.computing)):
        assert float(text) == pytest.approx(1e3 * float(value[0]), abs=0.006)
    assert said[2] == "link" and float(said[3]) > float(said[4])
    rival = named_plan(said[5], shape, WORK, tail=plan.tail, window=plan.window)
    assert float(said[6]) == pytest.approx(1e3 * seconds(profile, rival)[0], abs=0.006)
    assert rival.layers != plan.layers
    printed = " ".join(str(plan).split())
    assert plan.name == "auto" and printed.startswith("Plan auto: some, batch 32, prompt 1024, 16 new")
    assert plan.reason in printed


def test_the_next_best_fits_too():
    """No plan by name that would not fit is held against the choice."""
    shape = model(*[LEARNED] * 3)
    room = Budget(least(shape, WORK) + 1.2 * cache_bytes(shape, WORK))
    assert "bound by the device" in make_plan(shape, WORK, machine("h200"), room).reason
    device_only = replace(room, host=0)
    plan = make_plan(shape, WORK, machine("h200"), device_only)
    assert plan.reason.endswith("; no plan by name fits beside it") and "copies take 0.00 ms" in plan.reason


def test_few_candidates_are_predicted(monkeypatch):
    """Of those that are surely worse it is not asked how much."""
    asked = []
    monkeypatch.setattr(search, "mean_costs", lambda *given: asked.extend(given[1]) or cost.mean_costs(*given))
    bounded = []
    monkeypatch.setattr(search, "mean_bounds", lambda *given: bounded.extend(given[1]) or cost.mean_bounds(*given))
    shape = model(*[LEARNED] * 5)
    make_plan(shape, WORK, machine("h200"), Budget(least(shape, WORK) + 0.3 * cache_bytes(shape, WORK)))
    assert 0 < 2 * len(asked) < len(bounded)


def test_few_compilations():
    """A few sizes of candidates' lists; a second budget of the same model compiles nothing more."""
    cost._step_seconds.clear_cache()
    shape = model(*[LEARNED] * 5)
    counts = []
    for part in (0.3, 0.31):
        make_plan(shape, WORK, machine("h200"), Budget(least(shape, WORK) + part * cache_bytes(shape, WORK)))
        counts.append(cost._step_seconds._cache_size())
    assert counts[0] == counts[1] <= 5


def test_an_open_budget_is_the_profiles():
    """Less a margin."""
    shape = model(*[LEARNED] * 2)
    profile = machine("h200", device_bytes=3.2e9, host_bytes=1e9)
    plan = make_plan(shape, Workload(32, 512, 32), profile)
    assert 0.9 * 3.2e9 < device_bytes(plan) <= 0.95 * 3.2e9 and plan.bytes_in("host") > 0
    with pytest.raises(PlanError, match="of host memory"):
        make_plan(shape, Workload(32, 512, 32), replace(profile, host_bytes=1e6))


# --- weights in host memory, groups -----------------------------------------------------------------------------------

OPT = models.PRESETS["opt-6.7b"].shape
RESIDENT = 2 * (OPT.vocab * OPT.embedding + 32 * 12 * 4096**2)  # bytes of weights, 12 h^2 a layer


def hosted(plan):
    return sum(layer.weights == "host" for layer in plan.layers)


@pytest.mark.parametrize(
    ("name", "groups", "new", "gib"),
    [("opt-30b", 8, 32, 40), ("opt-30b", 8, 128, 40), ("opt-6.7b", 1, 128, 20.6), ("opt-6.7b", 1, 600, 60)],
)
def test_tails_hold_the_tokens_of_the_time_that_a_program_takes_to_compile(name, groups, new, gib):
    """The whole workload takes no longer than with any tail that is a power of two; and much less than with 16."""
    shape, work, budget = models.preset(name).shape, Workload(32, 256, new), Budget.of_gib(gib, 1000)
    machine_plan = functools.partial(scheduler.make_plan, shape, work, machine("h200"), budget, groups=groups)

    def whole(plan):
        return decode_seconds(plan, *mean_seconds(machine("h200"), plan))

    tails = [tail for tail in (16, 32, 64, 128, 256, 512) if tail <= new]
    taken = {tail: whole(machine_plan(tail=tail)) for tail in tails}
    chosen = whole(machine_plan())
    assert chosen <= 1.01 * min(taken.values())
    assert chosen < 0.8 * taken[16]


@pytest.mark.parametrize("gib", [4, 6, 9, 13, 16, 40])
def test_no_more_weights_leave_the_device_than_have_to(gib):
    """By hand: a layer takes 24 h^2 bytes, and a prefill has two that are on their way."""
    work, budget, layer = Workload(32, 512, 32), Budget.of_gib(gib, 1000), 2 * 12 * 4096**2
    plan = scheduler.make_plan(OPT, work, machine("h200"), budget)
    assert fits(plan, budget) and plan.tail >= 16
    tail = plan.tail * 32 * 2 * 4096 * 32  # as activations
    needed = prefill_bytes(OPT, work) + tail
    fewest = max(0, math.ceil((RESIDENT + 2 * layer + needed - budget.device) / layer))
    assert hosted(plan) == (0 if RESIDENT + needed <= budget.device else min(fewest, 32))
    if gib == 4:
        assert hosted(plan) > 28
    if gib >= 16:
        assert hosted(plan) == 0


def test_no_weights_leave_where_they_just_fit():
    """A third of a layer is left over. One layer in host memory would not fit: two have room on their way to it."""
    work, layer = Workload(32, 512, 32), 2 * 12 * 4096**2
    tail = 16 * 32 * 2 * 4096 * 32  # of 16 tokens, as activations
    budget = Budget(RESIDENT + prefill_bytes(OPT, work) + tail + layer // 3, 1e12)
    assert hosted(scheduler.make_plan(OPT, work, machine("h200"), budget)) == 0
    with pytest.raises(PlanError, match="of device memory"):
        scheduler.make_plan(OPT, work, machine("h200"), budget, weights=spread(1, 32))


def test_hosting_more_weights_is_no_faster():
    work, budget, profile = Workload(7, 300, 30), Budget.of_gib(9, 1000), machine("h200")
    plan = scheduler.make_plan(OPT, work, profile, budget, groups=3)
    others = [
        scheduler.make_plan(OPT, work, profile, budget, groups=3, weights=spread(count, 32))
        for count in range(hosted(plan), 33, 4)
    ]
    (chosen, *times) = seconds(profile, plan, *others)
    assert len(times) > 2 and chosen <= 1.01 * min(times)


@pytest.mark.parametrize("gib", [6, 24])
def test_the_order_is_the_faster_one(gib):
    work, budget, profile = Workload(8, 512, 32), Budget.of_gib(gib, 1000), machine("h200")
    plan = scheduler.make_plan(OPT, work, profile, budget, groups=5)
    assert plan.groups == 5 and plan.rows == 40
    assert plan.order == "column" and bool(hosted(plan)) == (gib == 6)
    other = scheduler.make_plan(OPT, work, profile, budget, groups=5, order="row")
    assert other.order == "row"
    chosen, rejected = seconds(profile, plan, other)
    assert chosen < rejected / 1.03
    if gib == 6:  # five times the weights, and the same cache
        cache = plan.bytes_in("host") / 63e9
        assert rejected / chosen == pytest.approx((cache + 5 * weights(plan)) / (cache + weights(plan)), rel=0.05)


def test_row_order_where_the_link_is_the_whole_cost():
    """The program of column order is five times as large, and its step as long."""
    work, profile = Workload(8, 512, 32), machine("h200", beside_compute=1e9)
    plan = make_plan(OPT, work, profile, Budget(least(OPT, work) + 2 * GIB, 1e15), groups=5)
    assert plan.order == "row" and plan.bytes_in("host") > 0
    assert seconds(profile, replace(plan, order="column"))[0] > seconds(profile, plan)[0] / 1.03


def weights(plan):
    """Seconds that those in host memory take to cross the link."""
    return hosted(plan) * 2 * 12 * 4096**2 / 63e9


def test_rows_are_split_where_their_prefill_is_large():
    """256 rows of 512 tokens: 16 GiB beside the weights, of which a third would leave."""
    work, profile = Workload(256, 512, 32), machine("h200")
    budget = Budget.of_gib(24, 1000)
    plan, whole = (scheduler.make_plan(OPT, work, profile, budget, groups=groups) for groups in (None, 1))
    assert plan.groups > 1 and plan.rows == 256 and hosted(plan) == 0
    assert hosted(whole) > 10
    assert seconds(profile, plan) < seconds(profile, whole)
    for small in (Workload(7, 512, 32), Workload(13, 40, 3)):
        assert scheduler.make_plan(OPT, small, profile, budget, groups=None).groups == 1


def test_times_measured_for_one_batch_split_no_rows():
    """Measured, a layer takes twice what is estimated: of 32 rows, but nobody has timed 16."""
    work, budget, estimated = Workload(32, 1024, 32), Budget.of_gib(35, 1000), machine("h200")
    times = estimate(estimated, OPT.layers[0], 2, 32)
    curves = {kind: Curve.line(2 * own(0), 2 * (own(1) - own(0))) for kind, own in times.work.items()}
    measured = estimated.with_times(replace(times, dtype="bfloat16", work=curves))
    plan, other = (scheduler.make_plan(OPT, work, own, budget, groups=None) for own in (measured, estimated))
    assert plan.groups == other.groups == 1
    assert seconds(measured, plan)[0] > 1.5 * seconds(estimated, other)[0]


@pytest.mark.parametrize(("faster", "form"), [(0.995, kv), (0.8, acts)])
def test_where_all_fits_activations_are_kept_only_if_that_is_surely_faster(faster, form):
    """Layers that do nothing but attend, in so many times the seconds where they absorb."""
    shape, work = model(*[LEARNED] * 3), Workload(8, 1000, 16)
    profile = attending(1e-6, faster * 1e-6, work)
    plan = make_plan(shape, work, profile)
    assert all(tokens(layer) == {(form, "device"): 1000} for layer in plan.layers)


@settings(few, max_examples=12)
@given(st.data())
def test_weights_and_groups_keep_to_the_budget(data):
    layers = data.draw(st.lists(st.sampled_from(list(LAYERS.values())), min_size=1, max_size=5))
    shape, work = model(*layers), Workload(data.draw(st.integers(1, 64)), data.draw(st.integers(1, 900)), 33)
    layer = max(own.parameters for own in layers) * 2
    tail = 16 * work.batch * 8192 * 2 * len(layers)
    groups = data.draw(st.sampled_from([1, 2, 7, None]))
    enough = prefill_bytes(shape, work) + 5 * layer + (groups or 1) * tail
    budget = Budget(enough + data.draw(st.floats(0, 1)) * shape.parameters * 2, 1e15)
    plan = scheduler.make_plan(shape, work, machine("a100"), budget, groups=groups)
    assert fits(plan, budget) and plan.rows == work.batch * (groups or 1)


def test_what_fits_nowhere_is_said():
    with pytest.raises(PlanError, match=r"needs [\d.]+ GiB of device memory .*; 1\.00 GiB may be used"):
        scheduler.make_plan(OPT, Workload(32, 512, 32), machine("h200"), Budget.of_gib(1))
    with pytest.raises(PlanError, match=r"needs 9[\d.]+ GiB of host memory \(weights .*; 2\.00 GiB may be used"):
        scheduler.make_plan(OPT, Workload(8, 64, 32), machine("h200"), Budget.of_gib(4, 2))
    with pytest.raises(PlanError, match=r"weights are said to be in 3 memories; opt-6\.7b has 32 layers"):
        scheduler.make_plan(OPT, Workload(8, 64, 32), machine("h200"), weights=["device"] * 3)
