"""The choices that one would make by hand, and what a plan says of itself."""

import functools
import math
import re
from dataclasses import replace

import pytest
from planning import (
    GROUPED,
    LAYERS,
    LEARNED,
    ROTARY,
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
    seconds,
    tokens,
    with_blocks,
    with_room,
)

import models
from kvrecomp.plan import GIB, MIB, Budget, PlanError, Workload, cutting, layout
from kvrecomp.plan.compiling import decode_seconds
from kvrecomp.plan.cutting import BLOCKS_PER_WINDOW
from kvrecomp.plan.footprint import logits_bytes, prefill_bytes
from kvrecomp.plan.named import named_plan, spread
from kvrecomp.predict import problem, scheduler, search
from kvrecomp.predict.cost import plan_costs
from kvrecomp.predict.estimate import estimate
from kvrecomp.predict.hardware import WORKS, Curve, LayerTimes, attention_work

WIDE = replace(LEARNED, hidden=8192, heads=64, kv_heads=64)


def no_room(shape, form=None):
    """Not a token of the cache fits on the device beside tails of 16 tokens, in that form or the smaller one."""
    widths = sum(layer.width(form) if form else min(map(layer.width, (kv, acts))) for layer in shape.layers)
    return Budget(least(shape, WORKLOAD, tail=0) + WORKLOAD.new * WORKLOAD.batch * widths * 2 + 1000)


# --- which form, and where --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a100", "h200", "rtx5000", "t4"])
@pytest.mark.parametrize(("kind", "form", "width"), [("learned", acts, 4096), ("grouped", kv, 2 * 1024)])
def test_the_smaller_form_is_sent(kind, form, width, name):
    """With learned positions activations, half the bytes, absorbed; with grouped queries keys and values."""
    shape = model(*[LAYERS[kind]] * 3)
    plan = make_plan(shape, WORKLOAD, machine(name), no_room(shape))
    for layer in plan.layers:
        assert tokens(layer) == {(form, "host"): 1024} and layer.tail_form == form and layer.method == "absorb"
    assert plan.bytes_in("host") == 3 * 1024 * 32 * width * 2
    assert "bound by the link" in plan.reason


def test_rotary_positions_on_a_slow_device_make_a_split():
    """Where K is recomputed from all activations, a T4 takes longer than its link."""
    shape = model(*[ROTARY] * 3)
    profile = machine("t4", matmul_rate=30e12)  # a T4 sustains about half of its peak
    plan = make_plan(shape, WORKLOAD, profile, no_room(shape, kv))
    for layer in plan.layers:
        counts = tokens(layer)
        assert 0 < counts[acts, "host"] < 1024 and counts[kv, "host"] > 0 and sum(counts.values()) == 1024
        assert layer.method == "absorb"  # V at least
    names = [f"split:{part / 32}" for part in range(33)]
    splits = [named_plan(name, shape, WORKLOAD, tail=plan.tail, window=plan.window) for name in names]
    taken, found = assert_as_fast(profile, plan, splits, Budget(), within=1.005)
    assert taken < 0.9 * min(found[0], found[-1])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["t4", "h200"])
@pytest.mark.parametrize("new", [32, 2000])
def test_everything_fits(kind, name, new):
    """Nothing crosses the link, not even what is generated; keys and values, which cost nothing to use."""
    shape, workload = model(*[LAYERS[kind]] * 2), replace(WORKLOAD, new=new)
    budget = Budget(least(shape, workload, tail=1024) + 1.2 * cache_bytes(shape, workload))
    plan = make_plan(shape, workload, machine(name), budget)
    assert not any(plan.bytes_in("host", write_outs) for write_outs in range(plan.write_outs + 1))
    assert all(tokens(layer) == {(kv, "device"): 1024} and layer.tail_form == kv for layer in plan.layers)
    taken, device = seconds(machine(name), plan), seconds(machine(name), named_plan("device", shape, workload))
    assert taken[0] <= 1.00001 * device[0]


def test_a_mix_on_the_device_is_found_between_the_steps_of_the_grid():
    """Of Llama-2-7B's 768 tokens less than half of the room as keys and values, a few of them behind the link: with all
    in the smaller form on the device attention takes longer, and with more of the larger the link does."""
    shape, workload = replace(models.preset("llama-2-7b").shape, positions=10**4), Workload(32, 768, 500)
    budget = with_room(shape, 0.8, workload)
    plan = make_plan(shape, workload, machine("h100"), budget)
    mixed = with_blocks(plan, (kv, "device", 352), (acts, "device", 352), (kv, "host", 64), tail_form=kv)
    assert fits(mixed, budget)
    assert_as_fast(machine("h100"), plan, [mixed], budget)


def test_what_a_sliding_window_hides_is_not_sent():
    """Mistral sees 4096 tokens: of 16384 a quarter is in host memory, with one more than the next token sees."""
    shape, workload = models.preset("mistral-7b").shape, Workload(4, 16384, 32)
    plan = make_plan(shape, workload, machine(), Budget(least(shape, workload)))
    assert {sum(block.tokens for block in layer.prompt) for layer in plan.layers} == {4096}
    assert plan.bytes_in("host") <= 4096 * 4 * 2 * 8 * 128 * 2 * 32


# --- layers that do nothing but attend, and blocks that kernels are slow for ------------------------------------------


def attending(kv_seconds, absorb_seconds, workload=WORKLOAD, slower=(1, 1)):
    """A machine whose layers do nothing but attend, in so many seconds a token; `slower` is how many times as long
    uneven blocks of activations take, on the host and on the device."""
    curves = {"recompute": Curve.line(0.0, 1e-5), kv: Curve.line(0.0, kv_seconds)}
    curves["absorb"] = Curve.line(0.0, absorb_seconds)
    curves |= {attention_work(kind, "device"): curve for kind, curve in curves.items()}
    for memory, factor in zip(("host", "device"), slower):
        curves[attention_work("absorb", memory, 257)] = curves["absorb"].times(factor)
    times = LayerTimes(LEARNED, "bfloat16", workload.batch, dict.fromkeys(WORKS, Curve.line(0.0)) | curves)
    return machine().with_times(times)


@pytest.mark.parametrize("part", [0.13, 0.21, 0.37])
def test_blocks_are_even_where_kernels_would_be_slow_and_fill_the_room_where_not(part):
    """Of rotary layers activations, whose K is recomputed, take twice as long in uneven blocks, which the device cannot
    afford; the others keep as many tokens as fit."""
    for kind, unit in (("rotary", 32), ("learned", 1)):
        shape = model(*[LAYERS[kind]] * 3)
        budget = with_room(shape, part)
        plan = make_plan(shape, WORKLOAD, machine(matmul_rate=2e14), budget)
        blocks = [block for layer in plan.layers for block in layer.prompt]
        assert not any(block.tokens % unit for block in blocks if block.form == acts)
        token_bytes = 3 * WORKLOAD.batch * 4096 * 2
        assert budget.device - device_bytes(plan) < (unit + 1) * token_bytes, kind


@pytest.mark.parametrize("slower", [(2, 1), (1, 2), (2, 2)])
def test_uneven_blocks_that_are_slow_in_either_memory_are_avoided(slower):
    """Compute takes about as long as copies: with 543 tokens on the device and 481 behind the link, which fit, a step
    would take longer."""
    shape, profile = model(*[LEARNED] * 3), attending(1e-8, 2.2e-6, slower=slower)
    budget = with_room(shape, 0.28)
    plan = make_plan(shape, WORKLOAD, profile, budget)
    even = with_blocks(plan, (acts, "device", 512), (acts, "host", 512), window=GIB)
    assert fits(even, budget)
    assert_as_fast(profile, plan, [even], budget)


@pytest.mark.parametrize("prompt", [1023, 2040])
@pytest.mark.parametrize("slower", [(2, 2), (1, 2)])
def test_what_is_left_of_an_odd_prompt_is_a_block_of_its_own(prompt, slower):
    """All fits on the device as activations; in one block they would take twice as long."""
    shape, workload = model(*[LEARNED] * 3), replace(WORKLOAD, prompt=prompt)
    profile, budget = attending(1e-6, 1e-6, workload, slower), with_room(shape, 0.6, workload)
    plan = make_plan(shape, workload, profile, budget)
    assert plan.link_bytes() == 0
    even = with_blocks(plan, (acts, "device", prompt // 32 * 32), (acts, "device", prompt % 32), memories=("device",))
    assert fits(even, budget)
    assert_as_fast(profile, plan, [even], budget, within=1.001)


@pytest.mark.parametrize("slower", [1.005, 1.2])
def test_the_smaller_form_fits_where_the_larger_does_not(slower):
    """As activations all tokens stay on the device; where those are surely slower, no more are than must be."""
    shape = model(*[LEARNED] * 2)
    budget = with_room(shape, 0.75)
    plan = make_plan(shape, WORKLOAD, attending(1e-8, slower * 1e-8), budget)
    assert plan.bytes_in("host", plan.write_outs) == 0
    for layer in plan.layers:
        counts = tokens(layer)
        if slower == 1.2:
            assert counts[kv, "device"] > 0.4 * 1024 and counts[acts, "device"] > 0.4 * 1024
            assert device_bytes(plan) > 0.98 * budget.device
        else:
            assert counts == {(acts, "device"): 1024} and layer.tail_form == acts


@pytest.mark.parametrize(("faster", "form"), [(0.995, kv), (0.8, acts)])
def test_where_all_fits_activations_are_kept_only_if_that_is_surely_faster(faster, form):
    """They take so many times the seconds of keys and values."""
    workload = Workload(8, 1000, 16)
    plan = make_plan(model(*[LEARNED] * 3), workload, attending(1e-6, faster * 1e-6, workload))
    assert all(tokens(layer) == {(form, "device"): 1000} for layer in plan.layers)


# --- layers of two shapes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_a_wider_layer_gets_settings_of_its_own(order):
    """Grouped queries beside a layer twice as wide without: each in the form that is smaller for it."""
    shape = model(*[GROUPED, GROUPED, WIDE, WIDE][::order])
    nothing = make_plan(shape, WORKLOAD, machine(), Budget(least(shape, WORKLOAD)))
    for layer_shape, layer in zip(shape.layers, nothing.layers):
        form = kv if layer_shape == GROUPED else acts
        assert {block.form for block in layer.prompt} == {form} and tokens(layer)[form, "host"] >= 1024 - 32
        # Sizes are each layer's: blocks of at most a quarter of the window.
        sizes = [nothing.bytes_of(layer_shape, block) for block in layer.prompt]
        assert max(sizes) <= nothing.window / BLOCKS_PER_WINDOW
    half = make_plan(shape, WORKLOAD, machine(), Budget(least(shape, WORKLOAD) + nothing.bytes_in("host") / 2))
    assert half.bytes_in("host") <= 0.51 * nothing.bytes_in("host")


def test_a_layer_twice_as_wide_keeps_as_many_tokens():
    """The same kind of layer in two widths, with room for half of the tokens."""
    shape = model(LEARNED, WIDE)
    plan = make_plan(shape, WORKLOAD, machine(), with_room(shape, 0.25))  # half of it as activations
    narrow, wide = (tokens(layer)[acts, "device"] for layer in plan.layers)
    assert narrow == pytest.approx(wide, abs=2) and narrow > 0.45 * 1024


# --- what is generated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_generated_stays_on_the_device_while_there_is_room(kind):
    """And goes to the host from then on; at the end the budget still holds."""
    shape, workload = model(*[LAYERS[kind]] * 2), Workload(batch=64, prompt=512, new=3001)
    room = cache_bytes(shape, workload, kv if kind == "grouped" else acts) * (512 + 1000) / 3513
    budget = Budget(least(shape, workload, tail=64) + room)
    plan = make_plan(shape, workload, machine(), budget)
    assert plan.write_outs > 4 and device_bytes(plan) <= budget.device
    for layer in plan.layers:
        stay = layer.write_out_memories.count("device")
        assert stay and layer.write_out_memories == ("device",) * stay + ("host",)
    # Room for one more tail in every layer is not left over.
    assert budget.device - device_bytes(plan) < plan.tail_bytes + 100 * MIB
    assert plan.bytes_in("host", 1) < plan.bytes_in("host", plan.write_outs)


def test_a_long_run_counts_with_all_of_its_steps():
    """Half way everything is on the device in either form of the tail; keys and values leave it soon after, activations
    late."""
    shape, workload, budget = models.preset("llama-2-7b").shape, Workload(32, 64, 3000), Budget.of_gib(40, 400)
    profile = machine("h100")
    chosen = make_plan(shape, workload, profile, budget)
    others = [
        with_blocks(chosen, (form, "device", 64), tail_form=form, memories=("device",) * stay + ("host",))
        for form in (kv, acts)
        for stay in range(1, chosen.write_outs + 1)
    ]
    taken, totals = assert_as_fast(profile, chosen, others, budget, seconds=mean_seconds)
    halves = seconds(profile, chosen, *(plan for plan in others if fits(plan, budget)))
    assert max(totals) > 1.8 * taken and min(halves) < 0.8 * halves[0]
    first, last = (1e3 * seconds(profile, chosen, write_outs=number)[0] for number in (0, 2998 // chosen.tail))
    assert f"a step predicted ({first:.2f} the first, {last:.2f} the last), bound" in chosen.reason


@pytest.mark.parametrize(
    ("name", "groups", "new", "gib"),
    [("opt-30b", 8, 128, 9), ("opt-6.7b", 1, 128, 3.6), ("opt-6.7b", 1, 600, 10)],
)
def test_tails_hold_the_tokens_of_the_time_that_a_program_takes_to_compile(name, groups, new, gib):
    """The whole workload of an eighth of the model takes no longer than with any tail that is a power of two; and much
    less than with 16."""
    preset = models.preset(name)
    shape = replace(preset, layers=preset.layers // 8).shape
    workload, budget = Workload(32, 256, new), Budget.of_gib(gib, 1000)
    plan_with = functools.partial(scheduler.make_plan, shape, workload, machine(), budget, groups=groups)

    def whole(plan):
        return decode_seconds(plan, *mean_seconds(machine(), plan))

    chosen = plan_with()
    others = [tail for tail in (16, 32, 64, 128, 256, 512) if tail <= new and tail != chosen.tail]
    taken = {tail: whole(plan_with(tail=tail)) for tail in others}
    assert whole(chosen) <= 1.01 * min(taken.values())
    assert whole(chosen) < 0.8 * taken[16]


# --- what a plan says -------------------------------------------------------------------------------------------------


def test_the_reason_is_a_sentence():
    shape, profile = model(*[LEARNED] * 3), machine()
    plan = make_plan(shape, WORKLOAD, profile, with_room(shape, 0.1))
    said = re.fullmatch(
        r"([\d.]+) ms a step predicted, bound by the (link|device): copies take ([\d.]+) ms, compute ([\d.]+) ms; next "
        r"best is (\S+), ([\d.]+) ms",
        plan.reason,
    )
    for text, predicted in zip(said.group(1, 3, 4), plan_costs(profile, [plan])):
        assert float(text) == pytest.approx(1e3 * float(predicted[0]), abs=0.006)
    assert said[2] == "link" and float(said[3]) > float(said[4])
    rival = named_plan(said[5], shape, WORKLOAD, tail=plan.tail, window=plan.window)
    assert float(said[6]) == pytest.approx(1e3 * seconds(profile, rival)[0], abs=0.006)
    assert rival.layers != plan.layers
    printed = " ".join(str(plan).split())
    assert plan.name == "auto" and printed.startswith("Plan auto: some, batch 32, prompt 1024, 16 new")
    assert plan.reason in printed


def test_the_next_best_fits_too():
    """No plan by name that would not fit is held against the choice."""
    shape = model(*[LEARNED] * 3)
    room = with_room(shape, 1.2)
    assert "bound by the device" in make_plan(shape, WORKLOAD, machine(), room).reason
    plan = make_plan(shape, WORKLOAD, machine(), replace(room, host=0))
    assert plan.reason.endswith("; no plan by name fits beside it") and "copies take 0.00 ms" in plan.reason


# --- weights in host memory, groups -----------------------------------------------------------------------------------

OPT = models.PRESETS["opt-6.7b"].shape
OPT_LAYER = 2 * 12 * 4096**2  # bytes of weights, 12 h^2 a layer
RESIDENT = 2 * OPT.vocab * OPT.embedding + 32 * OPT_LAYER


def hosted(plan):
    return sum(layer.weights == "host" for layer in plan.layers)


@pytest.mark.parametrize("gib", [4, 6, 9, 13, 16, 40])
def test_no_more_weights_leave_the_device_than_have_to(gib):
    """By hand: a prefill has two layers that are on their way."""
    workload, budget = Workload(32, 512, 32), Budget.of_gib(gib, 1000)
    plan = scheduler.make_plan(OPT, workload, machine(), budget)
    assert fits(plan, budget) and plan.tail >= 16
    needed = prefill_bytes(OPT, workload) + plan.tail * 32 * 2 * 4096 * 32  # the tail as activations
    fewest = max(0, math.ceil((RESIDENT + 2 * OPT_LAYER + needed - budget.device) / OPT_LAYER))
    assert hosted(plan) == (0 if RESIDENT + needed <= budget.device else min(fewest, 32))
    if gib == 4:
        assert hosted(plan) > 28
    if gib >= 16:
        assert hosted(plan) == 0


def test_no_weights_leave_where_they_just_fit():
    """A third of a layer is left over. One layer in host memory would not fit: two have room on their way to it."""
    workload = Workload(32, 512, 32)
    tail = 16 * 32 * 2 * 4096 * 32  # of 16 tokens, as activations
    needed = RESIDENT + prefill_bytes(OPT, workload) + logits_bytes(OPT, workload) + tail
    budget = Budget(needed + OPT_LAYER // 3, 1e12)
    assert hosted(scheduler.make_plan(OPT, workload, machine(), budget)) == 0
    with pytest.raises(PlanError, match="of device memory"):
        scheduler.make_plan(OPT, workload, machine(), budget, weights=spread(1, 32))


def test_hosting_more_weights_is_no_faster():
    workload, budget, profile = Workload(7, 300, 30), Budget.of_gib(9, 1000), machine()
    plan_with = functools.partial(scheduler.make_plan, OPT, workload, profile, budget, groups=3)
    plan = plan_with()
    others = [plan_with(weights=spread(count, 32)) for count in range(hosted(plan), 33, 4)]
    _, found = assert_as_fast(profile, plan, others, budget)
    assert len(found) > 2


@pytest.mark.parametrize("gib", [6, 24])
def test_the_order_is_the_faster_one(gib):
    workload, budget, profile = Workload(8, 512, 32), Budget.of_gib(gib, 1000), machine()
    plan = scheduler.make_plan(OPT, workload, profile, budget, groups=5)
    assert plan.groups == 5 and plan.rows == 40
    assert plan.order == "column" and bool(hosted(plan)) == (gib == 6)
    other = scheduler.make_plan(OPT, workload, profile, budget, groups=5, order="row")
    assert other.order == "row"
    chosen, rejected = seconds(profile, plan, other)
    assert chosen < rejected / 1.03
    if gib == 6:  # five times the weights, and the same cache
        cache, weights = plan.bytes_in("host") / 63e9, hosted(plan) * OPT_LAYER / 63e9
        assert rejected / chosen == pytest.approx((cache + 5 * weights) / (cache + weights), rel=0.05)


def test_row_order_where_the_link_is_the_whole_cost():
    """The program of column order is five times as large, and its step as long."""
    workload, profile = Workload(8, 512, 32), machine(beside_compute=1e9)
    plan = make_plan(OPT, workload, profile, Budget(least(OPT, workload) + 2 * GIB, 1e15), groups=5)
    assert plan.order == "row" and plan.bytes_in("host") > 0
    assert seconds(profile, replace(plan, order="column"))[0] > seconds(profile, plan)[0] / 1.03


def test_rows_are_split_where_their_prefill_is_large():
    """256 rows of 512 tokens: 16 GiB beside the weights, of which a third would leave."""
    workload, profile, budget = Workload(256, 512, 32), machine(), Budget.of_gib(24, 1000)
    plan, whole = (scheduler.make_plan(OPT, workload, profile, budget, groups=groups) for groups in (None, 1))
    assert plan.groups > 1 and plan.rows == 256 and hosted(plan) == 0
    assert hosted(whole) > 10
    assert seconds(profile, plan) < seconds(profile, whole)
    for small in (Workload(7, 512, 32), Workload(13, 40, 3)):
        assert scheduler.make_plan(OPT, small, profile, budget, groups=None).groups == 1


def test_times_measured_for_one_batch_split_no_rows():
    """Measured, a layer takes twice what is estimated: of 32 rows, but nobody has timed 16."""
    workload, budget, estimated = Workload(32, 1024, 32), Budget.of_gib(35, 1000), machine()
    times = estimate(estimated, OPT.layers[0], 2, 32)
    curves = {kind: curve.times(2.0) for kind, curve in times.work.items()}
    measured = estimated.with_times(replace(times, dtype="bfloat16", work=curves))
    plans = [scheduler.make_plan(OPT, workload, profile, budget, groups=None) for profile in (measured, estimated)]
    assert [plan.groups for plan in plans] == [1, 1]
    assert seconds(measured, plans[0])[0] > 1.5 * seconds(estimated, plans[1])[0]


@pytest.mark.parametrize("sizes", [(32, 10**6, 32), (1, 2**31 - 100, 2), (2**31 - 1, 3, 2)])
def test_what_cannot_fit_is_said_before_a_plan_is_searched_for(monkeypatch, sizes):
    """Of OPT-175B, whose prompt alone takes more memory than any device has."""
    monkeypatch.setattr(search, "choose", lambda *given: pytest.fail("candidates are compared"))
    shape = replace(models.preset("opt-175b").shape, positions=2**31)
    with pytest.raises(PlanError, match=r"GiB of device memory .* may be used: not even a batch of 1 fits|a batch of"):
        scheduler.make_plan(shape, Workload(*sizes), machine(), Budget.of_gib(100, 10**6))


def test_more_new_tokens_than_tails_may_be_written_out(monkeypatch):
    """The tail is as long as that takes."""
    for module in (layout, cutting, problem):
        monkeypatch.setattr(module, "MOST_BLOCKS", 97)  # of thousands it would be a long test
    shape = replace(models.preset("opt-125m").shape, positions=10**8)
    plan = scheduler.make_plan(shape, Workload(700, 3, 7_000), machine(), Budget.of_gib(60, 10**6), groups=3)
    assert plan.tail >= 7_000 / 97 and plan.write_outs <= 97


# --- what loss is allowed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.15, 0.25, 1.2])
@pytest.mark.parametrize("loss", ["int8", "int4"])
def test_loss_where_it_is_allowed_and_makes_steps_shorter(loss, part):
    """All that is sent is written so; where nothing has to be sent, nothing is lost."""
    shape = model(*[LEARNED] * 3)
    budget = with_room(shape, part)
    exact, plan = (make_plan(shape, WORKLOAD, machine(), budget, loss=each) for each in ("none", loss))
    assert exact.lossless and "loss" not in exact.reason and "with loss" not in str(exact)
    before, after = (mean_seconds(machine(), each)[0] for each in (exact, plan))
    assert fits(plan, budget) and after <= 1.001 * before
    if part > 1:
        assert plan.lossless
        return
    sent = {block.codec for layer in plan.layers for block in layer.prompt if block.memory == "host"}
    assert sent <= {loss} and not plan.lossless
    assert f"with loss, which is allowed ({loss})" in plan.reason and "with loss" in str(plan)
    assert after < before


def test_no_drafts_where_tails_are_written_out_with_loss():
    """A text is not to go by drafts; where nothing is written out, or without loss, they pay here."""
    shape = model(*[LEARNED] * 3)
    budget = with_room(shape, 0.1)
    for loss, tail, drafted in (("none", 4, True), ("int8", 4, False), ("int8", WORKLOAD.new, True)):
        plan = make_plan(shape, WORKLOAD, machine(), budget, loss=loss, tail=tail, drafting="auto")
        assert (plan.drafting is not None) == drafted and plan.lossless == (loss == "none"), (loss, tail)


def test_a_loss_that_there_is_not():
    with pytest.raises(PlanError, match="loss is 'int2'; expected one of none, int8, int4"):
        make_plan(model(LEARNED), WORKLOAD, machine(), loss="int2")
