"""Chosen plans against brute force and against every budget: as fast as any other, and never too large."""

import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from planning import (
    LAYERS,
    LEARNED,
    WORKLOAD,
    acts,
    assert_as_fast,
    cache_bytes,
    device_bytes,
    fits,
    kv,
    least,
    machine,
    make_plan,
    mean_seconds,
    model,
    with_room,
)

import models
from kvrecomp.plan import GIB, MIB, BlockSpec, Budget, LayerPlan, LayerShape, Plan, PlanError, Workload
from kvrecomp.plan.cutting import BLOCKS_PER_WINDOW
from kvrecomp.plan.footprint import prefill_bytes
from kvrecomp.plan.named import named_plan
from kvrecomp.predict import cost, scheduler, search
from kvrecomp.predict.hardware import LEAST_DEVICE, Line

# --- brute force ------------------------------------------------------------------------------------------------------


def pieces(form, count, layer, workload, window):
    """Blocks on the host, as few and as equal as a quarter of the window lets them be; bfloat16."""
    most = max(1, window // BLOCKS_PER_WINDOW // (workload.batch * layer.width(form) * 2))
    blocks = -(-count // most)
    return [BlockSpec(form, "host", count // blocks + (number < count % blocks)) for number in range(blocks)]


def every_plan(shape, workload, tail, window, parts):
    """Layers alike: each eighth or so of the prompt in either form and memory, tails in either form, the first of them
    written to the device or none, activations absorbed or recomputed."""
    (layer,) = set(shape.layers)
    times = max(0, (workload.new - 1) // tail)
    share = workload.prompt // parts
    assert share * parts == workload.prompt
    for counts in itertools.product(range(parts + 1), repeat=4):
        if sum(counts) != parts:
            continue
        pairs_here, acts_here, acts_sent, pairs_sent = (share * count for count in counts)
        blocks = [BlockSpec(form, "device", count) for form, count in ((kv, pairs_here), (acts, acts_here)) if count]
        blocks += pieces(acts, acts_sent, layer, workload, window) + pieces(kv, pairs_sent, layer, workload, window)
        for form in (kv, acts):
            for method in ("absorb", "recompute") if acts_here or acts_sent or form == acts else ("absorb",):
                for stay in sorted({round(times * part / 4) for part in range(5)}):
                    memories = ("device",) * stay + (() if stay == times and times else ("host",))
                    layer_plan = LayerPlan(tuple(blocks), form, memories, method)
                    yield Plan("any", shape, workload, (layer_plan,) * len(shape.layers), tail, window)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("name", "kernel_seconds", "layers", "workload", "rooms", "parts"),
    [
        ("t4", 0.0, 3, Workload(8, 1024, 13), (0, 0.2, 0.6, 1.05), 8),  # one tail holds all new tokens
        ("h200", 0.0, 3, Workload(8, 1024, 13), (0, 0.2, 0.6, 1.05), 8),
        ("t4", 0.0, 2, Workload(16, 512, 1201), (0.05, 0.4, 1.05), 4),  # more new tokens than the prompt has
        ("a100", 0.0, 2, Workload(16, 512, 1201), (0.05, 0.4, 1.05), 4),
        ("a100", 0.0, 1, Workload(67, 6, 1), (0, 0.5, 1.5), 6),
        ("a100", 3e-6, 1, Workload(67, 6, 1), (0, 0.5, 1.5), 6),
    ],
)
def test_as_good_as_brute_force(name, kernel_seconds, layers, workload, rooms, parts, kind):
    """With room for these parts of the cache, by the mean of all steps."""
    shape, profile = model(*[LAYERS[kind]] * layers), machine(name, kernel_seconds=kernel_seconds)
    for room in rooms:
        budget = with_room(shape, room, workload)
        chosen = make_plan(shape, workload, profile, budget)
        others = every_plan(shape, workload, chosen.tail, chosen.window, parts)
        _, found = assert_as_fast(profile, chosen, others, budget, seconds=mean_seconds)
        assert len(found) > 6


def test_few_candidates_are_predicted_and_programs_compiled(monkeypatch):
    """Of those that are surely worse it is not asked how much. A few sizes of candidates' lists; a second budget of the
    same model compiles nothing more."""
    asked, bounded, compiled = [], [], []
    monkeypatch.setattr(search, "mean_costs", lambda *given: asked.extend(given[1]) or cost.mean_costs(*given))
    monkeypatch.setattr(search, "mean_bounds", lambda *given: bounded.extend(given[1]) or cost.mean_bounds(*given))
    cost._step_seconds.clear_cache()
    shape = model(*[LEARNED] * 5)
    for part in (0.3, 0.31):
        make_plan(shape, WORKLOAD, machine(), with_room(shape, part))
        compiled.append(cost._step_seconds._cache_size())
    assert 0 < 2 * len(asked) < len(bounded)
    assert compiled[0] == compiled[1] <= 5


# --- budgets ----------------------------------------------------------------------------------------------------------

NAMES = ["activations", "recompute", "keys_values", "device"]
NAMES += [f"{kind}:{part}" for kind in ("split", "kvpr", "device") for part in (0.25, 0.5, 0.75)]
OPT = models.PRESETS["opt-6.7b"].shape


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
    workload = Workload(*map(draw, sizes))
    name = draw(st.sampled_from(["t4", "a100", "h200", "gh200"]))
    profile = machine(name, kernel_seconds=draw(st.sampled_from([0.0, 5e-6])), to_device=Line(1e-5, 0.0))
    room = draw(st.sampled_from([-1.0, 0.0, 1.0, 1e6]) | st.floats(0, 1.5).map(lambda part: part * 1e10))
    room = min(room, 1.5 * cache_bytes(shape, workload))
    host = draw(st.sampled_from([None, None, None, 0.0, 1e6, 1e9]))
    return shape, workload, profile, Budget(max(LEAST_DEVICE, least(shape, workload) + room), host)


@settings(max_examples=30, phases=(Phase.explicit, Phase.generate))
@given(problems())
def test_no_plan_is_over_its_budget_or_slower_than_one_by_name(problem):
    shape, workload, profile, budget = problem
    try:
        plan = make_plan(shape, workload, profile, budget)
    except PlanError as error:
        assert "may be used" in str(error)
        for name in NAMES:
            assert not any(fits(named_plan(name, shape, workload, tail=tail), budget) for tail in (16, None))
        return
    assert plan.shape == shape and plan.workload == workload
    for write_outs in range(plan.write_outs):
        assert device_bytes(plan, write_outs) <= budget.device
    named = [named_plan(name, shape, workload, tail=plan.tail) for name in NAMES]  # shorter tails compile more
    assert_as_fast(profile, plan, named, budget)


@settings(max_examples=12, phases=(Phase.explicit, Phase.generate))
@given(st.data())
def test_weights_and_groups_keep_to_the_budget(data):
    layers = data.draw(st.lists(st.sampled_from(list(LAYERS.values())), min_size=1, max_size=5))
    shape, workload = model(*layers), Workload(data.draw(st.integers(1, 64)), data.draw(st.integers(1, 900)), 33)
    layer = max(layer.parameters for layer in layers) * 2
    tail = 16 * workload.batch * 8192 * 2 * len(layers)
    groups = data.draw(st.sampled_from([1, 2, 7, None]))
    enough = prefill_bytes(shape, workload) + 5 * layer + (groups or 1) * tail
    budget = Budget(enough + data.draw(st.floats(0, 1)) * shape.parameters * 2, 1e15)
    plan = scheduler.make_plan(shape, workload, machine("a100"), budget, groups=groups)
    assert fits(plan, budget) and plan.rows == workload.batch * (groups or 1)


def test_one_byte_less_is_not_enough():
    """There is nothing smaller than everything in host memory, with the shortest tail that there is."""
    shape, workload = model(*[LEARNED] * 2), Workload(batch=8, prompt=512, new=16)
    enough = device_bytes(named_plan("activations", shape, workload, tail=1, window=16 * MIB))
    assert device_bytes(make_plan(shape, workload, machine(), Budget(enough))) == enough
    with pytest.raises(PlanError, match="of device memory"):
        make_plan(shape, workload, machine(), Budget(enough - 1))


@pytest.mark.parametrize(
    ("name", "batch", "prompt", "gib"),
    [("opt-6.7b", 128, 1024, 16), ("llama-3-8b", 64, 1024, 18)],
)
def test_what_is_said_to_fit_fits(name, batch, prompt, gib):
    shape, workload, budget = models.PRESETS[name].shape, Workload(batch, prompt, 256), Budget.of_gib(gib)
    with pytest.raises(PlanError) as raised:
        make_plan(shape, workload, machine(), budget)
    said = re.search(r": a batch of (\d+) fits where (\d+) were asked for", str(raised.value))
    assert said and int(said[2]) == batch and 1 <= int(said[1]) < batch
    assert fits(make_plan(shape, replace(workload, batch=int(said[1])), machine(), budget), budget)


WRONG_UNIT = r"than any device has: a Budget is in bytes, Budget\.of_gib takes GiB"


@pytest.mark.parametrize(
    ("workload", "given", "message"),
    [
        ((8, 512, 32), {"budget": (5,), "weights": 32}, r"memory \(weights 12.* GiB.*not even a batch of 1 fits"),
        ((8, 512, 32), {"budget": (14, 1e6 / GIB), "weights": 32}, r"MiB of host memory .*; 976\.6 KiB may be used"),
        ((32, 512, 32), {"budget": (1,)}, r"needs [\d.]+ GiB of device memory .*; 1\.00 GiB may be used"),
        ((8, 64, 32), {"budget": (4, 2)}, r"needs 9[\d.]+ GiB of host memory \(weights .*; 2\.00 GiB may be used"),
        *(((1, 11, 3), {"budget": (size / GIB,)}, WRONG_UNIT) for size in (80, 65_535, 1e18, 80 * 2**40)),
        ((8, 64, 32), {"tail": 0}, "tail is 0; it must be greater than zero, or None to be chosen"),
        ((8, 64, 32), {"window": -1}, "window is -1; it must be greater than zero, or None to be chosen"),
        ((8, 64, 32), {"groups": 0}, "groups is 0; it must be greater than zero, or None to split the rows"),
        ((8, 64, 32), {"weights": 3}, r"weights are said to be in 3 memories; opt-6\.7b has 32 layers"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(workload, given, message):
    """Budgets are in GiB, and weights of so many layers are on the device."""
    given = {**given, "budget": Budget.of_gib(*given.get("budget", ()))}
    if "weights" in given:
        given["weights"] = ["device"] * given["weights"]
    with pytest.raises(PlanError) as raised:
        scheduler.make_plan(OPT, Workload(*workload), machine(), **given)
    assert re.search(message, str(raised.value)) and "\n" not in str(raised.value)


def test_an_open_budget_is_the_profiles():
    """Less a margin."""
    shape, workload = model(*[LEARNED] * 2), Workload(32, 512, 32)
    profile = machine(device_bytes=3.2e9, host_bytes=1e9)
    plan = make_plan(shape, workload, profile)
    assert 0.9 * 3.2e9 < device_bytes(plan) <= 0.95 * 3.2e9 and plan.bytes_in("host") > 0
    with pytest.raises(PlanError, match="of host memory"):
        make_plan(shape, workload, replace(profile, host_bytes=1e6))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 2), (1, 2, 1), (3, 1, 37), (10_000, 2, 3), (20_000, 2, 3)])
def test_the_smallest_prompts_and_tokens_larger_than_a_window(sizes, kind):
    """Of 20000 rows: 312 MiB of keys and values, where 1.3 GiB are left beside the weights for all there is."""
    shape, workload = model(LAYERS[kind]), Workload(*sizes)
    for room in (0, 1, 10**6):
        budget = Budget(least(shape, workload, tail=1) + room)
        assert fits(named_plan("activations", shape, workload, tail=1), budget)
        assert fits(make_plan(shape, workload, machine(), budget), budget)


def test_a_tail_that_only_one_form_has_a_window_for():
    """256 tokens of 32 rows of OPT-6.7B are 64 MiB as activations and 128 as keys and values."""
    given = OPT, Workload(32, 1024, 512), machine("h100"), Budget.of_gib(22, 400)
    plan = make_plan(*given, tail=256, window=64 * MIB)
    assert {layer.tail_form for layer in plan.layers} == {acts} and fits(plan, given[-1])
    with pytest.raises(PlanError, match=r"the window of 63\.0 MiB is smaller than a block of"):
        make_plan(*given, tail=256, window=63 * MIB)
