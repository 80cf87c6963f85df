"""What drafts cost and when they pay: closed forms, sums over all that may be taken, and plans that fit."""

from dataclasses import replace

import pytest
import toy_plans
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import LEARNED, WORKLOAD, cache_bytes, fits, least, machine, make_plan, model, with_room
from toy_plans import MIXED, PLAIN, SHAPE

from kvrecomp.plan import GIB, Budget, Drafting, PlanError, Workload
from kvrecomp.plan.drafting import NEARLY, tokens_per_round
from kvrecomp.plan.footprint import attention_bytes, memory_needed
from kvrecomp.plan.named import named_plan, with_host_weights
from kvrecomp.predict.cost import mean_bounds, mean_costs, plan_costs, round_cost, step_seconds
from kvrecomp.predict.hardware import HardwareProfile, Line
from kvrecomp.predict.scheduler import PAYING
from kvrecomp.predict.tasks import READ_TIMES, Part, make_tasks, stack_tasks

MACHINE = HardwareProfile("none", GIB, Line(1e-7, 1e-10), beside_compute=9e9, matmul_rate=3e11, memory_rate=7e10)
LOOKUP, FP8, INT4 = (
    Drafting("prompt_lookup", 4, ahead=5),
    Drafting("sketch", 3, ahead=7, codec="fp8"),
    Drafting("sketch", 5, ahead=2, codec="int4"),
)

# --- how many are taken -----------------------------------------------------------------------------------------------

shares = st.floats(0, 1)


@settings(max_examples=50)
@given(count=st.integers(0, 9), acceptance=shares)
def test_tokens_of_a_round(count, acceptance):
    """The mean over how many drafts are right before the first that is not; one token more is taken."""
    exactly = [acceptance**right * (1 - acceptance) for right in range(count)] + [acceptance**count]
    mean = sum((right + 1) * probability for right, probability in enumerate(exactly))
    assert tokens_per_round(count, acceptance) == pytest.approx(mean)


@settings(max_examples=100)
@given(most=st.integers(1, 12), acceptance=shares, draft=st.floats(0, 2), check=st.floats(0.5, 5))
def test_the_best_number_of_drafts(most, acceptance, draft, check):
    """That with most tokens in the time of a round, none being a round too."""
    drafting = Drafting("prompt_lookup", most, draft_cost=draft, check_cost=check)
    alone = check if check <= NEARLY else 1.0  # a step that checks drafts, if it is nearly one that checks none
    paces = [1 / alone] + [
        sum(acceptance**number for number in range(count + 1)) / (check + count * draft) for count in range(1, most + 1)
    ]
    assert [drafting.pace(count, acceptance) for count in range(most + 1)] == pytest.approx(paces)
    assert paces[drafting.best_count(acceptance)] == pytest.approx(max(paces))
    assert drafting.best_count(0.0) == 0 or check + draft <= 1 / paces[0]


# --- what a round takes -----------------------------------------------------------------------------------------------


def further_seconds(plan, layer, shape, write_outs=0):
    """What each token beside the first adds to a layer's compute."""
    b, n, d, h = plan.workload.batch, shape.heads, shape.head_dim, shape.hidden
    product, memory = plan.groups_per_pass / MACHINE.matmul_rate, plan.groups_per_pass / MACHINE.memory_rate
    kv_weights, query_weights = 2 * h * shape.kv_heads * d, h * n * d
    feed_forward = (3 if shape.gated else 2) * h * shape.intermediate
    absorbs = layer.method == "absorb" and "activations" in (
        layer.tail_form,
        *(block.form for block in layer.blocks(write_outs, plan.tail)),
    )
    projected = kv_weights + query_weights
    if layer.tail_form == "activations" and layer.method == "absorb":  # V is not made, nor K where it is absorbed
        projected -= kv_weights // 2 * (1 + shape.absorbs_keys)
    seconds = 2 * b * (projected + query_weights + feed_forward) * product
    if absorbs:
        seconds += (1 + shape.absorbs_keys) * (2 * b * h * n * d * product + 4 * b * n * h * memory)
    for form, tokens, apart in [
        *((block.form, block.tokens, block.memory == "host") for block in layer.blocks(write_outs, plan.tail)),
        (layer.tail_form, plan.room, True),
    ]:
        width = h if form == "activations" and layer.method == "absorb" else d
        seconds += tokens * (4 * b * n * width * product + 12 * b * n * memory)
        seconds += apart * 24 * b * n * width * memory  # one more partial result, joined with the others
    return seconds


@pytest.mark.parametrize("checked", [2, 5])
@pytest.mark.parametrize("write_outs", [0, 2])
@pytest.mark.parametrize("groups", [1, 3])
def test_further_tokens_of_a_step(checked, write_outs, groups):
    """Projections, feed-forward, attention to all that is cached, logits; and not a byte more."""
    plan = replace(MIXED, drafting=LOOKUP, groups=groups, order="column")
    tasks = [make_tasks(Part(1, plan, number), write_outs) for number in (1, checked)]
    alone, found = zip(*(each[:2] for each in step_seconds(MACHINE, SHAPE, plan.workload, stack_tasks(tasks))[1:]))
    work, vocab = plan.workload, SHAPE.vocab
    logits = 2 * vocab * SHAPE.embedding / MACHINE.matmul_rate + 32 * vocab / MACHINE.memory_rate
    each = work.batch * groups * logits
    each += sum(further_seconds(plan, *kind, write_outs) for kind in zip(plan.layers, SHAPE.layers))
    assert found[0] == pytest.approx(alone[0])  # what is copied
    assert found[1] - alone[1] == pytest.approx((checked - 1) * each, rel=1e-3)


@pytest.mark.parametrize("drafting", [LOOKUP, FP8, INT4], ids=lambda drafting: drafting.name)
@pytest.mark.parametrize("hosted", [0.0, 1.0])
@pytest.mark.parametrize("order", ["row", "column"])
def test_a_round_is_its_drafts_and_the_step_that_checks_them(drafting, hosted, order):
    plan = replace(with_host_weights(MIXED, hosted), groups=3, order=order, drafting=drafting)
    round_ = plan_costs(MACHINE, [plan], 1)
    step, check, draft = round_cost(MACHINE, plan)
    alone = plan_costs(MACHINE, [replace(plan, drafting=None)], 1)
    assert round_.seconds[0] == pytest.approx(check + drafting.most * draft, rel=1e-5)
    assert step < check and (draft == 0) == (drafting is LOOKUP)
    assert alone.seconds[0] <= step <= 1.1 * alone.seconds[0]  # beside a tail that is longer
    assert plan.drafts_under_copies == (order == "row" and not hosted and drafting is not LOOKUP)
    drafts = drafting.most if drafting.codec else 0
    passes = 3 if order == "row" else 1
    copied = passes * drafts * plan.host_weight_bytes / MACHINE.beside_compute  # drafts read the cache on the device
    more = float(round_.copying[0] - alone.copying[0])
    # Each copy has a latency too.
    assert more == pytest.approx(copied, rel=1e-3, abs=1e-5 * alone.copying[0] + 20 * passes * drafts * hosted * 1e-7)


@pytest.mark.parametrize("slower", [1.0, 300.0])
def test_drafts_under_copies_take_no_time_where_the_link_does(slower):
    """All of it is computed; the longer of that and of what is copied is what a round takes, but for its ends."""
    profile = replace(MACHINE, to_device=Line(1e-9, 1e-10 * slower), beside_compute=1e10 / slower)
    layers = replace(SHAPE, layers=(PLAIN,) * 24)
    plan = replace(named_plan("activations", layers, Workload(3, 90, 2), tail=2, window=2**16), groups=2)
    under_copies = replace(plan, drafting=FP8)
    in_turn = replace(under_copies, order="column")
    checked = replace(plan, drafting=Drafting("prompt_lookup", FP8.most, FP8.ahead))
    found, apart, check = (plan_costs(profile, [each]) for each in (under_copies, in_turn, checked))
    draft = round_cost(profile, replace(in_turn, groups=1)).draft
    assert found.copying[0] == pytest.approx(check.copying[0])
    assert found.computing[0] == pytest.approx(check.computing[0] + 2 * FP8.most * draft, rel=1e-3)
    longest = max(float(found.copying[0]), float(found.computing[0]))
    assert (found.copying[0] > found.computing[0]) == (slower > 1)
    assert longest <= found.seconds[0] * (1 + 1e-5) <= 1.1 * longest
    assert (found.seconds[0] < apart.seconds[0]) == (slower > 1)  # in column order weights are read once


def test_int4_takes_longer_to_read():
    """So much longer as it is said to, of attention to what is in the sketch alone."""
    plan = named_plan("keys_values", replace(SHAPE, layers=(PLAIN, PLAIN)), Workload(3, 90, 2), tail=2)
    written = (FP8, replace(FP8, codec="int4"))
    drafts = [round_cost(MACHINE, replace(plan, drafting=drafting)).draft for drafting in written]
    each = (2 * 3 * 35 * 2 + 12 * 3 * 5) / MACHINE.memory_rate  # K and V, and scores
    expected = (READ_TIMES["int4"] - READ_TIMES["fp8"]) * 2 * 90 * each
    assert drafts[1] - drafts[0] == pytest.approx(expected, rel=1e-3)


@settings(max_examples=40)
@given(data=st.data())
def test_no_round_is_faster_than_its_bound(data):
    """Of any plan, with sketches, weights anywhere, groups in any order."""
    plan = data.draw(toy_plans.plans())
    plans = [replace(plan, drafting=drafting) for drafting in (None, LOOKUP, FP8, INT4)]
    bounds, costs = mean_bounds(MACHINE, plans), mean_costs(MACHINE, plans).seconds
    assert (bounds <= costs * (1 + 1e-5)).all() and (bounds > 0).all()
    assert costs[1] > costs[0] and costs[2] > costs[0] and costs[3] > costs[0]  # a round is longer than a step


# --- plans with drafts ------------------------------------------------------------------------------------------------

OPEN = model(*[LEARNED] * 3)


def auto(budget, **options):
    return make_plan(OPEN, WORKLOAD, machine(), budget, drafting="auto", **options)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6])
def test_plans_with_drafts_fit_and_say_why(part):
    """Sketches and room in the tail included; no room is left for a sketch with the first."""
    budget = with_room(OPEN, part)
    plan, alone = auto(budget), make_plan(OPEN, WORKLOAD, machine(), budget)
    assert fits(plan, budget)
    if plan.drafting is None:
        assert plan == alone
        return
    drafting = plan.drafting
    assert memory_needed(plan)["device"]["sketch"] == plan.sketch_bytes(plan.write_outs)
    step, check, draft = round_cost(machine(), plan)
    assert (drafting.check_cost, drafting.draft_cost) == pytest.approx((check / step, draft / step))
    acceptance = drafting.acceptance
    count = drafting.best_count(acceptance)
    seconds = (check + count * draft) / tokens_per_round(count, acceptance)
    before = plan_costs(machine(), [alone]).seconds[0]
    assert count > 0 and PAYING * seconds < before
    assert plan.reason.endswith(
        f"{1e3 * seconds:.2f} ms a token with {count} drafts ({drafting.name}), if {acceptance:.0%} are right, "
        f"{1e3 * before:.2f} ms without any"
    )
    assert "\n" not in plan.reason


@pytest.mark.parametrize("part", [0.5, 0.7, 0.8])
def test_plans_with_drafts_under_copies_fit(part):
    """More copies are on their way, and have their room too; what is left is used."""
    budget = with_room(OPEN, part)
    plan = make_plan(OPEN, WORKLOAD, machine(), budget, groups=2, drafting=Drafting("sketch", 8, codec="int4"))
    assert plan.drafts_under_copies and fits(plan, budget)
    assert plan.bytes_in("device", plan.write_outs) + plan.sketch_bytes(plan.write_outs) > 0.2 * part * cache_bytes(
        OPEN, WORKLOAD
    )


def test_some_of_them_have_sketches_and_some_none():
    """A sketch where there is room for one and for few blocks; nothing where all activations are on the device."""
    found = [auto(with_room(OPEN, part)).drafting for part in (0.0, 0.3, 0.6)]
    assert [drafting and drafting.drafter for drafting in found] == ["prompt_lookup", "sketch", None]


def test_where_nothing_is_sent_there_is_nothing_to_draft_for():
    budget = Budget(least(OPEN, WORKLOAD, tail=1024) + 1.2 * cache_bytes(OPEN, WORKLOAD))
    plan = auto(budget)
    assert plan.drafting is None and plan.link_bytes(plan.write_outs) == 0
    assert "drafts" not in plan.reason and plan == make_plan(OPEN, WORKLOAD, machine(), budget)


@pytest.mark.parametrize("name", ["device", "activations"])
def test_what_is_checked_needs_room(name):
    """Logits and scores of five tokens for those of one, beside a tail that is longer."""
    plan = named_plan(name, OPEN, Workload(32, 4096, 32), tail=16)
    drafted = replace(plan, drafting=Drafting("prompt_lookup", 4, ahead=8))
    alone, needed = (memory_needed(each)["device"] for each in (plan, drafted))
    assert needed["logits"] == 5 * alone["logits"] == 5 * 4 * 32 * OPEN.vocab
    assert needed["tail"] == alone["tail"] * 24 // 16 and needed["blocks"] == alone["blocks"]
    block = max(block.tokens for block in plan.layers[0].prompt)
    scores = 4 * 32 * LEARNED.heads * block * 2  # float32, before and after the softmax
    step = attention_bytes(drafted, 1) - attention_bytes(plan, 1)
    assert step >= 4 * (scores + 32 * LEARNED.heads * block * 2)


@pytest.mark.parametrize("codec", ["fp8", "int4"])
def test_a_sketch_that_does_not_fit_is_refused(codec):
    """In one line, with sizes."""
    budget = with_room(OPEN, 0.0)
    with pytest.raises(PlanError) as raised:
        make_plan(OPEN, WORKLOAD, machine(), budget, drafting=Drafting("sketch", 8, codec=codec))
    message = str(raised.value)
    assert "\n" not in message and "sketch" in message and "GiB" in message and len(message) < 400


@pytest.mark.parametrize("part", [0.35, 0.8])
@pytest.mark.parametrize("drafting", [FP8, INT4, LOOKUP], ids=lambda drafting: drafting.name)
def test_drafts_that_are_asked_for_fit(drafting, part):
    """Or it is said that they do not."""
    budget = with_room(OPEN, part)
    try:
        plan = make_plan(OPEN, WORKLOAD, machine(), budget, drafting=drafting)
    except PlanError:
        smallest = OPEN.layers[0].width("activations") * (WORKLOAD.prompt + WORKLOAD.new) * WORKLOAD.batch * 3
        assert (
            drafting.codec and part * cache_bytes(OPEN, WORKLOAD) < smallest * {"fp8": 1, "int4": 0.7}[drafting.codec]
        )
        return
    assert fits(plan, budget) and plan.drafting.drafter == drafting.drafter and plan.drafting.most == drafting.most
    assert plan.sketch_bytes() > 0 if drafting.codec and plan.bytes_in("host") else plan.sketch_bytes() == 0
