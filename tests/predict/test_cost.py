"""The cost function: against an event simulation of the same pipeline, in closed forms, and against the runtime."""

import heapq
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import LEARNED, model
from toy_plans import GROUPED, MIXED, PLAIN, SHAPE, WORKLOAD, acts, kv, plans

from kvrecomp.plan import GIB, MIB, BlockSpec, LayerPlan, Plan, PlanError, Workload
from kvrecomp.plan.named import named_plan, with_host_weights
from kvrecomp.plan.step_order import COPIES_IN_FLIGHT, START, TAIL, step_order
from kvrecomp.predict import cost
from kvrecomp.predict.cost import mean_bounds, mean_costs, plan_costs, step_seconds, work_table
from kvrecomp.predict.hardware import KNOTS, WORKS, Curve, HardwareProfile, LayerTimes, Line, project_work
from kvrecomp.predict.tasks import Part, Tasks, make_tasks, stack_tasks

LATENCY = 1e-7  # longer than some of the copies below, shorter than others
MACHINE = HardwareProfile("none", GIB, Line(LATENCY, 1e-10), beside_compute=9e9, matmul_rate=1e14, memory_rate=1e12)

many = settings(max_examples=100)


def times(layer, curves=(), dtype="bfloat16", batch=3, outside=0.0):
    """Times of a layer that takes none but for the curves given, by work."""
    work = {name: dict(curves).get(name, Curve.line(0.0)) for name in WORKS}
    return LayerTimes(layer, dtype, batch, work, outside)


# --- against an event simulation --------------------------------------------------------------------------------------


def simulate(computing, copying, hold, handoff=0.0):
    """Seconds of a step by events. `copying` is None for a task that computes; the others await a copy of their own,
    and what they compute is the awaiting of one that is there.

    Two units: the link takes copies in order, each once the task that holds it has ended; the device takes tasks in
    order, and goes on from one that awaits a copy when that has arrived. Either learns of the other's end, and the link
    of its own, a handoff later. A task that awaits a copy has ended when that is there and the tasks before are done.
    """
    copies = [task for task, seconds in enumerate(copying) if seconds is not None]
    copied, arrived, over, done, told, ended = set(), set(), set(), {-1}, set(), {-1}  # `ended`: the link knows of it
    waiting = {"link": copies, "device": list(range(len(computing)))}
    events, now, last = [], 0.0, 0.0  # (time, what happens, task)
    busy = set()
    while True:
        if "link" not in busy and waiting["link"] and hold[waiting["link"][0]] in ended:
            task = waiting["link"].pop(0)
            busy.add("link")
            heapq.heappush(events, (now + copying[task], "copied", task))
        if "device" not in busy and waiting["device"]:
            task = waiting["device"].pop(0)
            busy.add("device")
            heapq.heappush(events, (now + computing[task], "over", task))
        for task in range(len(computing)):
            if task not in done and task in over and (copying[task] is None or task in arrived):
                busy.remove("device")
                done.add(task)
                last = now
                break
            if task not in told and task - 1 in done and task in (done if copying[task] is None else copied):
                told.add(task)
                heapq.heappush(events, (now + handoff, "ended", task))
                break
        else:
            if not events:
                return last
            now, what, task = heapq.heappop(events)
            if what == "copied":
                busy.remove("link")
                heapq.heappush(events, (now + handoff, "arrived", task))
            {"copied": copied, "arrived": arrived, "over": over, "ended": ended}[what].add(task)


def each_task(plan, write_outs=0):
    """The plan's tasks, each of a kind of its own."""
    *columns, kind, hold = make_tasks(Part(1, plan), write_outs)
    return Tasks(*(column[kind] for column in columns), np.arange(len(kind), dtype=np.int32), hold)


def written_out(tasks):
    """(work, tokens, blocks, copies, bytes, hold) of every task, in the order of compute."""
    return np.stack([*tasks[:5], tasks.hold], axis=1)


seconds_of = st.sampled_from([0.0, 1e-5, 3e-4, 7e-3]) | st.floats(1e-6, 1e-2)


@st.composite
def task_lists(draw):
    """Any tasks: that compute, or that await copies held by whichever task before."""
    count = draw(st.integers(1, 15))
    rows = []
    for number in range(count):
        copies = draw(st.integers(0, 1))
        rows.append(
            (
                draw(st.integers(0, len(WORKS))),  # of one layer shape, and outside
                draw(st.integers(0, 1000)),
                draw(st.integers(0, 2)),
                copies,
                draw(st.integers(1, 10**8)) if copies else 0,
                draw(st.sampled_from([1, 1, 2.5])),
                draw(st.integers(-1, number - 1)),
            )
        )
    work, *columns, hold = map(np.array, zip(*rows))
    floats = (column.astype(float) for column in columns)
    return Tasks(work.astype(np.int32), *floats, np.arange(count, dtype=np.int32), hold.astype(np.int32))


ONE = replace(SHAPE, layers=(PLAIN,))


@st.composite
def curves(draw):
    """Of any shape, but rising at its end."""
    sizes = sorted(draw(st.sets(st.integers(1, 900), min_size=1, max_size=KNOTS - 1)))
    seconds = [draw(seconds_of) for _ in sizes]
    return Curve((0, *sizes), (*seconds, seconds[-1] + draw(seconds_of)))


@st.composite
def machines(draw):
    """A machine on which `PLAIN` was timed."""
    layer_times = times(PLAIN, {work: draw(curves()) for work in WORKS}, outside=draw(seconds_of))
    rate, latency = draw(st.floats(1e8, 1e12)), draw(seconds_of)
    link = {"to_device": Line(latency, 1 / rate), "beside_compute": rate, "handoff_seconds": draw(seconds_of)}
    return replace(MACHINE, **link).with_times(layer_times)


def seconds_at(curve, size):
    """Between the nearest measured sizes, or on from the last two, by NumPy."""
    (*_, a, b), (*_, c, d) = curve.sizes, curve.seconds
    return np.interp(size, curve.sizes, curve.seconds) if size <= b else d + (size - b) * (d - c) / (b - a)


@many
@given(machines(), st.lists(task_lists(), min_size=1, max_size=3))
def test_as_an_event_simulation(machine, tasks):
    predicted = step_seconds(machine, ONE, WORKLOAD, stack_tasks(tasks))
    layer_times = machine.layers[0]
    # Tokens outside of layers are others of a row, whose logits are made, and read eight times.
    others = 3 * ONE.vocab * (2 * ONE.embedding / machine.matmul_rate + 8 * 4 / machine.memory_rate)
    curves = [*(layer_times.work[work] for work in WORKS), Curve.line(layer_times.outside, others)]
    # Three rows of another group, through Q, K and V, the last two of which can be absorbed, and through the output
    # projection and the feed-forward.
    one, others = 35 * 35, 35 * 35 + 2 * 35 * 53
    projected = ("project", 3 * one), ("project_absorb", one), ("project_recompute", 3 * one)
    for work, weights in (*projected, ("finish", others)):
        number = WORKS.index(work)
        curves[number] = Curve.line(curves[number](0), 2 * 3 * weights / machine.matmul_rate)
    for number, plan in enumerate(tasks):
        computing = [
            often * max(0.0, seconds_at(curves[work], tokens) + (blocks - 1) * curves[work].seconds[0])
            for work, tokens, blocks, often in zip(plan.work, plan.tokens, plan.blocks, plan.times)
        ]
        copying = [
            often * (machine.to_device.base + size / machine.beside_compute) if count else None
            for count, size, often in zip(plan.copies, plan.copy_bytes, plan.times)
        ]
        assert predicted.seconds[number] == pytest.approx(
            simulate(computing, copying, plan.hold, machine.handoff_seconds), rel=1e-5
        )
        assert predicted.computing[number] == pytest.approx(sum(computing), rel=1e-5)
        assert predicted.copying[number] == pytest.approx(sum(each for each in copying if each), rel=1e-5)


# --- closed forms -----------------------------------------------------------------------------------------------------

NAMES = ["activations", "recompute", "keys_values", "split:0.5", "kvpr:0.7", "device:0.3", "device"]
LINK = ["link", "latency", "handoff_seconds"]


def slower(machine, what, factor):
    """The machine with one of its rates divided, or one of its latencies multiplied, by the factor."""
    if what == "latency":
        return replace(machine, to_device=replace(machine.to_device, base=machine.to_device.base * factor))
    name = "beside_compute" if what == "link" else what
    return replace(machine, **{name: getattr(machine, name) * (factor if name.endswith("seconds") else 1 / factor)})


@pytest.mark.parametrize("what", [*LINK, "matmul_rate", "memory_rate", "kernel_seconds"])
def test_every_rate_counts(what):
    """For some plan: the link and its latency for those that send, the others for all. None gets faster."""
    machine = replace(MACHINE, handoff_seconds=1e-5, kernel_seconds=1e-6, to_device=Line(1e-5, 0.0))
    plans = [named_plan(name, SHAPE, replace(WORKLOAD, batch=1000)) for name in NAMES]
    costs = [plan_costs(slower(machine, what, factor), plans).seconds for factor in (1, 1.001, 100, 1e4)]
    assert (np.diff(costs, axis=0) >= 0).all() and (costs[2] > 1.1 * costs[0]).any()
    if what in LINK:
        assert costs[2][NAMES.index("device")] == costs[0][NAMES.index("device")]


@pytest.mark.parametrize("name", ["activations", "keys_values", "split:0.5", "kvpr:0.7", "device:0.3", "device"])
@pytest.mark.parametrize("hosted", [0.0, 0.5, 1.0])
def test_many_groups_alike_are_predicted_as_if_one_by_one(monkeypatch, name, hosted):
    """Copies and compute to the byte; the step within a few percent; and as fast to predict as few."""
    shape = model(*[LEARNED] * 5)
    plan = with_host_weights(named_plan(name, shape, Workload(5, 301, 3), window=64 * MIB), hosted)
    plan = replace(plan, groups=101, order="column")
    profile = HardwareProfile.from_datasheet("a100")
    found, bound, tasks = plan_costs(profile, [plan], 0), mean_bounds(profile, [plan]), make_tasks(Part(1, plan))
    assert len(tasks.kind) == len(make_tasks(Part(1, replace(plan, groups=10**6))).kind)
    monkeypatch.setattr("kvrecomp.predict.tasks.SHARED_GROUPS", 101)
    expected, expected_bound = plan_costs(profile, [plan], 0), mean_bounds(profile, [plan])
    assert len(make_tasks(Part(1, plan)).kind) > 5 * len(tasks.kind)
    assert found.seconds == pytest.approx(expected.seconds, rel=0.04)
    assert found.copying == pytest.approx(expected.copying, rel=1e-5)
    assert found.computing == pytest.approx(expected.computing, rel=1e-5)
    assert bound == pytest.approx(expected_bound, rel=1e-5)


def uniform(layers, blocks, ahead, schedule="pipelined"):
    """Blocks of one token each, `ahead` of which fit in the window, in layers that do nothing but attend to them."""
    shape = replace(SHAPE, layers=(PLAIN,) * layers)
    layer = LayerPlan((BlockSpec(kv, "host", 1),) * blocks, kv)
    work = Workload(batch=3, prompt=blocks, new=1)
    return Plan("uniform", shape, work, (layer,) * layers, tail=1, window=ahead * 3 * 70 * 2, schedule=schedule)


C, G = LATENCY + 3 * 70 * 2 / 9e9, 5e-5  # seconds of such a copy and of attention to such a block


@pytest.mark.parametrize("g", [G, C, 0.3 * C, 7 * C])
@pytest.mark.parametrize(("layers", "blocks"), [(1, 7), (7, 1), (3, 5), (1, 1), (1, 2)])
def test_the_uniform_pipeline(layers, blocks, g):
    """Two copies ahead are enough: the slower of link and device never rests.

    With c >= g copy k arrives at (k + 1) c, since the task two before ended at (k - 1) c + g <= k c; what remains is
    the last g. With g > c task k ends at c + (k + 1) g, since its copy arrived at c + (k - 1) g + c <= c + k g.
    """
    n = layers * blocks
    machine = MACHINE.with_times(times(PLAIN, {kv: Curve.line(g)}))
    two = uniform(layers, blocks, 2)
    assert COPIES_IN_FLIGHT == 2
    assert plan_costs(machine, [two]).seconds[0] == pytest.approx(C + (n - 1) * max(C, g) + g, rel=1e-5)
    # More room changes nothing, room for one block leaves no overlap.
    more, one = uniform(layers, blocks, 9), uniform(layers, blocks, 1)
    assert plan_costs(machine, [more]).seconds[0] == pytest.approx(C + (n - 1) * max(C, g) + g, rel=1e-5)
    assert plan_costs(machine, [one]).seconds[0] == pytest.approx(n * (C + g), rel=1e-5)
    # With handoffs: before every task, and before every copy but the first.
    slower = replace(machine, handoff_seconds=0.7e-5)
    assert plan_costs(slower, [one]).seconds[0] == pytest.approx(n * (C + g) + (2 * n - 1) * 0.7e-5, rel=1e-5)
    alone = uniform(1, 1, 1)
    assert plan_costs(slower, [alone]).seconds[0] == pytest.approx(C + g + 0.7e-5, rel=1e-5)


@pytest.mark.parametrize("g", [G, 0.3 * C, 7 * C])
def test_layer_by_layer(g):
    """A layer's copies start when the layer before is done; within the layer each is held until the one before it has
    arrived, which is no later than it would start anyway."""
    taken = {kv: g, "project": 0.1 * C, "finish": 0.2 * C}
    machine = MACHINE.with_times(times(PLAIN, {work: Curve.line(seconds) for work, seconds in taken.items()}))
    layer = C + 4 * max(C, g) + g + 0.2 * C  # the projection is done while the first copy is on its way
    plan = uniform(3, 5, 1, "layerwise")
    assert plan_costs(machine, [plan]).seconds[0] == pytest.approx(3 * layer, rel=1e-5)


# --- a plan as tasks --------------------------------------------------------------------------------------------------


def row(layer, work):
    return layer * len(WORKS) + WORKS.index(work)


def test_tasks_by_hand():
    """A token of three rows: 210 bytes of activations, 420 of keys and values in the first layer.

    What is on the device, the tail included, comes first, then the host's blocks as they come. Of the tails that were
    written out, the first layer's became a block on the device, then one on the host; the second's are on the host.
    """
    expected = [  # work, tokens, blocks, copies, bytes, hold
        (row(0, "project"), 0, 1, 0, 0, -1),
        (row(0, "prepare"), 0, 1, 0, 0, -1),
        (row(0, "device_keys_values"), 2, 1, 0, 0, -1),
        (row(0, "device_keys_values"), 3, 1, 0, 0, -1),
        (row(0, "device_keys_values"), 3, 0, 0, 0, -1),  # the tail
        (row(0, "await"), 0, 1, 1, 840, -1),
        (row(0, "absorb"), 4, 1, 0, 0, -1),
        (row(0, "await"), 0, 1, 1, 2100, -1),
        (row(0, kv), 5, 1, 0, 0, -1),
        (row(0, "await"), 0, 1, 1, 1260, 5),  # two copies on their way: when the first block has arrived
        (row(0, kv), 3, 1, 0, 0, -1),
        (row(0, "finish"), 0, 1, 0, 0, -1),
        (row(1, "project_recompute"), 0, 1, 0, 0, -1),
        (row(1, "device_recompute"), 5, 1, 0, 0, -1),
        (row(1, "device_recompute"), 3, 0, 0, 0, -1),
        (row(1, "await"), 0, 1, 1, 1260, 7),
        (row(1, "recompute"), 6, 1, 0, 0, -1),
        (row(1, "await"), 0, 1, 1, 630, 9),
        (row(1, "recompute"), 3, 1, 0, 0, -1),
        (row(1, "await"), 0, 1, 1, 630, 15),
        (row(1, "recompute"), 3, 1, 0, 0, -1),
        (row(1, "finish"), 0, 1, 0, 0, -1),
        (2 * len(WORKS), 0, 1, 0, 0, -1),
    ]
    np.testing.assert_array_equal(written_out(each_task(MIXED, 2)), expected)
    # Each copy after the one before, and the first of a layer after the layer before.
    layerwise = {7: 5, 9: 7, 15: 11, 17: 15, 19: 17}
    expected = [(*task[:5], layerwise.get(number, START)) for number, task in enumerate(expected)]
    np.testing.assert_array_equal(written_out(each_task(replace(MIXED, schedule="layerwise"), 2)), expected)


HERE = [(kv, "device", 6), (acts, "device", 5)]
SENT = [(acts, "host", 6), (acts, "host", 5)]
UNEVEN = [(acts, "device", 257), (acts, "host", 259), (kv, "host", 263)]


@pytest.mark.parametrize(
    ("blocks", "tail", "method", "expected"),
    [
        # Of another form than the tail, what is on the device has a partial result of its own: what no tokens from the
        # host take, and what those here add.
        (HERE, (acts, 3), "absorb", "prepare/0 keys_values/0 +device_keys_values/6 device_absorb/5 +device_absorb/3"),
        (HERE, (kv, 3), "absorb", "prepare/0 device_keys_values/6 absorb/0 +device_absorb/5 +device_keys_values/3"),
        # Absorption is prepared once a layer, wherever the activations are, and not where K and V are recomputed.
        (SENT, (kv, 3), "absorb", "prepare/0 +device_keys_values/3 absorb/6 absorb/5"),
        (HERE[:1], (acts, 3), "recompute", "keys_values/0 +device_keys_values/6 +device_recompute/3"),
        ([(kv, "host", 11)], (kv, 3), "absorb", "+device_keys_values/3 keys_values/11"),
        # Of a tail with an odd number of tokens it is not known how long they take, and it matters to absorbing only.
        (
            *(UNEVEN, (acts, 300), "absorb"),
            "prepare/0 uneven_device_absorb/257 +device_absorb/300 uneven_absorb/259 keys_values/263",
        ),
        (UNEVEN[:2], (acts, 300), "recompute", "device_recompute/257 +device_recompute/300 recompute/259"),
    ],
)
def test_attention_of_a_layer_by_hand(blocks, tail, method, expected):
    """Work and tokens, in order; with a plus, where they are added to a partial result."""
    shape = replace(SHAPE, layers=(PLAIN,), positions=2000)
    work = replace(WORKLOAD, prompt=sum(tokens for *_, tokens in blocks), new=300)
    layer = LayerPlan(tuple(BlockSpec(*block) for block in blocks), tail[0], method=method)
    tasks = each_task(Plan("some", shape, work, (layer,), tail[1], 10**6))
    rows = list(zip(tasks.work, tasks.tokens, tasks.blocks))[1:-2]  # between the projections and the feed-forward
    found = [f"{'+' if blocks == 0 else ''}{WORKS[number]}/{tokens:.0f}" for number, tokens, blocks in rows]
    assert " ".join(task for task in found if task != "await/0") == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("write_outs", [0, 1, 2])
def test_every_token_and_byte_is_there(name, write_outs):
    plan = named_plan(name, SHAPE, WORKLOAD, tail=3, window=5000)
    tasks = each_task(plan, write_outs)
    assert tasks.copy_bytes.sum() == plan.bytes_in("host", write_outs) == plan.link_bytes(write_outs)
    hosted = each_task(with_host_weights(plan, 0.5), write_outs)
    assert hosted.copy_bytes.sum() == tasks.copy_bytes.sum() + 2 * GROUPED.parameters
    assert tasks.tokens.sum() == 2 * (11 + 3 * write_outs + 3)
    kinds = [kv if layer.tail_form == kv else layer.method for layer in plan.layers]
    expected = [row(layer, work) for layer, kind in enumerate(kinds) for work in (project_work(kind), "finish")]
    done = list(tasks.work[tasks.blocks > 0])  # not what awaits a copy
    assert [done.count(number) for number in (*expected, 2 * len(WORKS))] == [1] * 5


@pytest.mark.parametrize("name", [kv, "activations", "device"])
def test_what_is_out_of_sight_is_neither_sent_nor_attended_to(name):
    """Of 4 cached tokens of the prompt and three tails of 3, those in the last two, and the present one."""
    shape = replace(SHAPE, layers=(replace(PLAIN, sliding_window=5),))
    plan = named_plan(name, shape, replace(WORKLOAD, new=11), tail=3)
    tasks = each_task(plan, 3)
    assert tasks.tokens.sum() == 3 + 3 + 3
    sent = plan.bytes_in("host", 3) * 6 / 13
    assert tasks.copy_bytes.sum() == plan.link_bytes(3) == sent


def test_packed_blocks_are_unpacked_and_send_fewer_bytes():
    """By the numbers that they have: of the first layer's keys and values twice as many a token as of activations, of
    the second's 16 for 35."""
    plan = replace(MIXED, layers=tuple(replace(layer, prompt=in_12_bits(layer.prompt)) for layer in MIXED.layers))
    tasks, plain = each_task(plan), each_task(MIXED)
    unpacking = np.isin(tasks.work, [row(0, "unpack"), row(1, "unpack")])
    assert tasks.tokens[unpacking].tolist() == [2 * 2, 4, 2 * 5, 5, 6]
    for column, expected in zip(tasks[:3], plain[:3]):
        np.testing.assert_array_equal(column[~unpacking], expected)
    assert tasks.copy_bytes.sum() == plan.link_bytes() < MIXED.link_bytes() + 5 * 512


def in_12_bits(blocks):
    return tuple(replace(block, codec="packed") for block in blocks)


@many
@given(plans(), st.integers(0, 3))
def test_a_copy_is_held_until_the_last_task_of_what_it_waits_for(plan, write_outs):
    """Operations have one task, but for those of attention, which may unpack and may have partial results of their own,
    and for absorbing, which some layers need not do."""
    tasks, order = each_task(plan, write_outs), step_order(plan, write_outs)
    counts = []
    for layer, shape, layer_order in zip(plan.layers, plan.shape.layers, order.of_layers()):
        blocks = shape.in_sight(layer.blocks(write_outs, plan.tail))
        forms = {block.form for block in blocks} | {layer.tail_form}
        for op in layer_order.ops:
            apart = [
                place != TAIL and blocks[place].memory == "device" and blocks[place].form != layer.tail_form
                for place in op.blocks
            ]
            packed = [place != TAIL and blocks[place].codec == "packed" for place in op.blocks]
            attended = len(apart) + sum(apart) + sum(packed)
            counts.append(
                {"append": int(acts in forms and layer.method == "absorb"), "attend": attended}.get(op.kind, 1)
            )
    last = np.cumsum(counts) - 1
    assert last[-1] + 1 == len(tasks.work) - 1  # what is outside of layers comes last
    copied = np.flatnonzero(tasks.copies)
    assert copied.tolist() == last[order.copies].tolist()
    expected = [START if waits_for == START else last[waits_for] for waits_for in order.waits_for]
    assert tasks.hold[copied].tolist() == expected
    assert set(np.delete(tasks.hold, copied).tolist()) == {START}


# --- seconds of compute -----------------------------------------------------------------------------------------------


def test_measured_times_count_where_they_were_measured():
    """For their layer, dtype and batch only; the others are estimated."""
    curves = [Curve((0, 3, 8), (number, 5.0, 9.0)) for number in range(len(WORKS))]
    measured = times(GROUPED, dict(zip(WORKS, curves)), outside=7.0)
    machine = MACHINE.with_times(measured)
    estimated = work_table(MACHINE, SHAPE, WORKLOAD)
    table = work_table(machine, SHAPE, WORKLOAD)
    first, second, outside = slice(0, len(WORKS)), slice(len(WORKS), 2 * len(WORKS)), 2 * len(WORKS)
    for column, before in zip(table, estimated):
        np.testing.assert_array_equal(column[first], before[first])
    np.testing.assert_array_equal(table.base[second], range(len(WORKS)))
    for number, work in enumerate(WORKS):
        if work.startswith(("project", "finish")):  # of another group: next to nothing
            assert 0 < table.added[second][number, 1] < 1e-6
        else:
            np.testing.assert_array_equal(table.sizes[second][number], [0, 3, 8, 13, 18, 23, 28])
            np.testing.assert_array_equal(table.added[second][number] + number, [number, 5, 9, 13, 17, 21, 25])
    assert table.base[outside] == 7.0
    assert estimated.base[second].max() < 1e-3 and 0 < estimated.base[outside] < 1e-3
    for shape, work in [(SHAPE, replace(WORKLOAD, batch=5)), (replace(SHAPE, dtype="float16"), WORKLOAD)]:
        for column, before in zip(work_table(machine, shape, work), work_table(MACHINE, shape, work)):
            np.testing.assert_array_equal(column, before)


def test_later_times_replace_earlier_ones():
    machine = MACHINE.with_times(times(PLAIN, outside=1.0)).with_times(times(PLAIN, batch=2, outside=2.0))
    machine = machine.with_times(times(PLAIN, outside=3.0))
    assert len(machine.layers) == 2
    assert machine.times(PLAIN, "bfloat16", 3).outside == 3.0 and machine.times(PLAIN, "bfloat16", 2).outside == 2.0
    assert machine.times(PLAIN, "float32", 3) is None and machine.times(GROUPED, "bfloat16", 3) is None


# --- predictions of plans ---------------------------------------------------------------------------------------------


def test_half_way_through_the_new_tokens():
    plan = named_plan("activations", SHAPE, replace(WORKLOAD, new=29), tail=3)
    middle = plan_costs(MACHINE, [plan]).seconds[0]
    assert middle == plan_costs(MACHINE, [plan], 4).seconds[0]  # 14 tokens: four tails of 3, and 2 in the tail
    assert plan_costs(MACHINE, [plan], 0).seconds[0] < middle < plan_costs(MACHINE, [plan], 9).seconds[0]


@pytest.mark.parametrize("new", [1, 2, 4, 5, 13, 16, 17, 29])
def test_the_mean_of_all_steps(new):
    """Of up to four lengths exactly; of more, four stand for all."""
    plans = [named_plan(name, SHAPE, replace(WORKLOAD, new=new), tail=3) for name in ("activations", "keys_values")]
    steps = [step // 3 for step in range(max(1, new - 1))]
    assert sum(cost.step_shares(plans[0]).values()) == pytest.approx(1)
    assert len(cost.step_shares(plans[0])) == min(4, len(set(steps)))
    means = mean_costs(MACHINE, plans)
    for field, mean in zip(("seconds", "copying", "computing"), means):
        every = np.array([getattr(plan_costs(MACHINE, plans, write_outs), field) for write_outs in steps])
        assert mean == pytest.approx(every.mean(axis=0), rel=1e-5 if len(set(steps)) <= 4 else 0.02)


@many
@given(plans(), st.sampled_from([1, 2, 8]), machines())
def test_no_mean_step_is_shorter_than_its_copies_or_its_compute(plan, groups, machine):
    """Of each step the longer of both, with those of all layers and groups."""
    some = [plan, replace(plan, groups=groups, order="row")]
    bounds = cost.mean_bounds(machine, some)
    assert (bounds <= mean_costs(machine, some).seconds * (1 + 1e-5)).all()
    for plan, bound in zip(some, bounds, strict=True):
        shares = cost.step_shares(plan)
        tasks = stack_tasks([make_tasks(Part(1, plan), write_outs) for write_outs in shares])
        _, copying, computing = step_seconds(machine, plan.shape, plan.workload, tasks)
        longer = np.maximum(copying, computing)[: len(shares)] @ list(shares.values())
        assert bound == pytest.approx(longer * plan.groups / plan.groups_per_pass, rel=1e-5)


def test_plans_for_different_work_are_refused():
    one, other = (named_plan("activations", SHAPE, replace(WORKLOAD, batch=batch)) for batch in (3, 5))
    with pytest.raises(PlanError, match="different models or workloads"):
        plan_costs(MACHINE, [one, other])


def test_one_compilation_whatever_the_candidates():
    """Splits, windows' worth of holds, machines, batches and times are data."""
    cost._step_seconds.clear_cache()
    for machine in (MACHINE, HardwareProfile.from_datasheet("t4"), MACHINE.with_times(times(PLAIN))):
        for batch in (3, 500):
            work = replace(WORKLOAD, batch=batch)
            plan_costs(machine, [named_plan(f"split:{part / 11}", SHAPE, work) for part in range(12)])
            plan_costs(machine, [named_plan(f"split:{part / 11}", SHAPE, work, window=9**9) for part in range(1, 4)])
    assert cost._step_seconds._cache_size() == 1
