"""Plans as data: bytes, write-outs, how runs are cut into blocks, what a plan says of itself."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_plans import GROUPED, MIXED, PLAIN, SHAPE, WORKLOAD, acts, kv

import kvrecomp
import models
from kvrecomp.plan import (
    GIB,
    MIB,
    BlockSpec,
    Budget,
    Drafting,
    LayerPlan,
    Plan,
    PlanError,
    Workload,
    format_bytes,
    uneven,
)
from kvrecomp.plan.cutting import cut_runs
from kvrecomp.plan.footprint import attention_bytes, logits_bytes, rows_bytes, sampling_bytes
from kvrecomp.plan.named import named_plan
from kvrecomp.run.limits import check_memory

# --- sizes ------------------------------------------------------------------------------------------------------------


def test_widths_and_parameters():
    assert PLAIN.width("activations") == 35 and PLAIN.width("keys_values") == 70
    assert GROUPED.width("activations") == 35 and GROUPED.width("keys_values") == 16
    assert PLAIN.parameters == 4 * 35 * 35 + 2 * 35 * 53
    assert GROUPED.parameters == 2 * 35 * 24 + 2 * 35 * 8 + 3 * 35 * 59
    assert PLAIN.matrices == ((35 * 35,) * 3, (35 * 35, 35 * 53, 35 * 53))
    assert GROUPED.matrices == ((35 * 8, 35 * 8, 35 * 24), (35 * 24, 35 * 59, 35 * 59, 35 * 59))
    assert SHAPE.parameters == PLAIN.parameters + GROUPED.parameters + 97 * 17
    assert replace(SHAPE, tied=False).parameters == SHAPE.parameters + 97 * 17
    assert SHAPE.itemsize == 2 and replace(SHAPE, dtype="float32").itemsize == 4


def test_bytes_by_hand():
    """A token of three rows in bfloat16: 210 bytes of activations; 420 of keys and values, and 96 where grouped."""
    assert MIXED.bytes_of(PLAIN, BlockSpec(acts, "host", 4)) == 840
    assert MIXED.bytes_of(GROUPED, BlockSpec(kv, "host", 4)) == 4 * 96
    host, device = 4 * 210 + 5 * 420 + 6 * 210, 2 * 420 + 5 * 210
    assert (MIXED.bytes_in("host"), MIXED.bytes_in("device")) == (host, device)
    assert MIXED.tail_bytes == 3 * (420 + 210)
    # The first layer's tail goes to the device, then to the host; the second's, of activations, to the host.
    assert MIXED.bytes_in("device", 1) == MIXED.bytes_in("device", 2) == device + 3 * 420
    assert MIXED.bytes_in("host", 1) == host + 3 * 210
    assert MIXED.bytes_in("host", 2) == host + 2 * 3 * 210 + 3 * 420


def test_a_layer_with_a_sliding_window_caches_what_the_next_token_sees():
    """Itself, and as many before it as are left of the window."""
    sliding = replace(GROUPED, sliding_window=5)
    assert [sliding.cached(prompt) for prompt in (1, 3, 4, 5, 11)] == [1, 3, 4, 4, 4]
    assert replace(GROUPED, sliding_window=1).cached(11) == 1 and GROUPED.cached(11) == 11
    # Long windows have a multiple of 32 tokens, if the prompt has as many.
    long = replace(GROUPED, sliding_window=270)
    assert [long.cached(prompt) for prompt in (263, 287, 288, 999)] == [263, 287, 288, 288]
    assert [replace(GROUPED, sliding_window=size).cached(999) for size in (256, 257, 258)] == [255, 256, 288]
    shape = replace(SHAPE, layers=(PLAIN, sliding))
    for name, tokens in (("keys_values", [11, 4]), ("split:0.5", [11, 4]), ("device:0.5", [11, 4])):
        plan = kvrecomp.named_plan(name, shape, WORKLOAD)
        assert [sum(block.tokens for block in layer.prompt) for layer in plan.layers] == tokens
    sent = kvrecomp.named_plan("keys_values", shape, WORKLOAD).bytes_in("host")
    assert sent == 3 * 2 * (11 * PLAIN.width("keys_values") + 4 * sliding.width("keys_values"))


@given(sizes=st.lists(st.integers(1, 5), max_size=7), window=st.integers(1, 20))
def test_blocks_in_sight_hold_a_token_that_the_next_one_sees(sizes, window):
    """By the slots themselves: a token in slot t sees those after t - window."""
    blocks = [BlockSpec("keys_values", "host", tokens) for tokens in sizes]
    next_slot, slots, seen = sum(sizes), itertools.count(), []
    for block in blocks:
        block_slots = list(itertools.islice(slots, block.tokens))
        if any(slot > next_slot - window for slot in block_slots):
            seen.append(block)
    found = replace(GROUPED, sliding_window=window).in_sight(blocks)
    assert list(map(id, found)) == list(map(id, seen))
    assert GROUPED.in_sight(blocks) == tuple(blocks)


def test_blocks_by_hand():
    assert MIXED.blocks() == (MIXED.layers[0].prompt, MIXED.layers[1].prompt)
    written_out = BlockSpec(kv, "device", 3), BlockSpec(kv, "host", 3), BlockSpec(kv, "host", 3)
    assert MIXED.blocks(3)[0] == MIXED.layers[0].prompt + written_out
    assert MIXED.blocks(1)[1] == (*MIXED.layers[1].prompt, BlockSpec(acts, "host", 3))
    plain = [[(memory, "plain") for memory in memories] for memories in (("device", "host"), ("host", "host"))]
    assert [list(MIXED.written_to(time)) for time in range(3)] == [*plain, plain[-1]]


@pytest.mark.parametrize(("new", "tail", "times"), [(1, 3, 0), (3, 3, 0), (4, 3, 1), (6, 3, 1), (7, 3, 2), (8, 1, 7)])
def test_the_tail_is_written_out_when_another_token_follows(new, tail, times):
    plan = replace(MIXED, workload=replace(WORKLOAD, new=new), tail=tail)
    assert plan.write_outs == times
    assert sum(spec.tokens for spec in plan.blocks(times)[0]) + tail >= WORKLOAD.prompt + new


def test_memory_needed_by_hand():
    needed = kvrecomp.memory_needed(MIXED)
    assert MIXED.write_outs == 2
    assert needed["host"] == {"weights": 0, "blocks": MIXED.bytes_in("host", 2)}
    device = needed["device"]
    assert device["weights"] == 2 * SHAPE.parameters
    assert device["blocks"] == MIXED.bytes_in("device", 2) and device["tail"] == MIXED.tail_bytes
    assert kvrecomp.memory_needed(MIXED, 0)["host"] == {"weights": 0, "blocks": MIXED.bytes_in("host")}
    # At a long prompt, hidden states, Q, K, V and a feed-forward of it count; at a large window, the window.
    long = named_plan("activations", replace(SHAPE, positions=10**6), Workload(3, 10**5, 8), window=2 * GIB)
    prefill = kvrecomp.memory_needed(long)["device"]["prefill or step"]
    assert prefill > 3 * 10**5 * 2 * (4 * 35 + 59) and prefill < 2 * GIB
    more = named_plan("keys_values", replace(SHAPE, positions=10**8), Workload(3, 10**7, 8), window=GIB)
    assert kvrecomp.memory_needed(more)["device"]["prefill or step"] >= GIB


def attention_by_hand(form, memory, method="absorb", layer=PLAIN, tail=kv):
    """What attention computes for a token, in bytes of one row: of one block of 5 tokens, a tail of 3, and 3 rows."""
    layer_plan = LayerPlan((BlockSpec(form, memory, 5),), tail, ("device",), method)
    shape, workload = replace(SHAPE, layers=(layer,)), Workload(3, 5, 3)
    return attention_bytes(Plan("some", shape, workload, (layer_plan,), tail=3), 0) / 3


def test_what_attention_computes_by_hand():
    """Scores of five heads, or of six that share two of keys, in 12 bytes; K of 35 or 8 numbers in bfloat16, V alike,
    rotated ones and what they are rotated with in float32; activations of 35."""
    rotated = replace(PLAIN, absorbs_keys=False)
    assert attention_by_hand(kv, "device") == attention_by_hand(acts, "device") == (5 + 3) * 60
    assert attention_by_hand(kv, "host") == attention_by_hand(acts, "host") == 5 * 60
    assert attention_by_hand(kv, "host", layer=GROUPED) == 5 * (72 + 2 * 8)
    assert attention_by_hand(acts, "host", "recompute") == 5 * (60 + 2 * 70)
    assert attention_by_hand(acts, "device", "recompute") == 5 * (60 + 2 * (70 + 35)) + 3 * 60
    assert attention_by_hand(acts, "device", "recompute", tail=acts) == (5 + 3) * (60 + 2 * (70 + 35))
    assert attention_by_hand(acts, "host", layer=rotated) == 5 * (60 + 2 * 35 + 4 * (35 + 7))
    assert attention_by_hand(acts, "host", layer=GROUPED) == 5 * (72 + 2 * 8 + 4 * (8 + 4))
    assert attention_by_hand(acts, "device", layer=GROUPED) == 5 * (72 + 2 * 8 + 4 * (8 + 4) + 2 * 35) + 3 * 72


def test_logits_of_all_groups_and_sampling_of_one_are_counted():
    """Where a vocabulary is large, and little else: Gemma-2B with 512 rows has 500 MiB of them, and sorts them."""
    shape, workload = models.PRESETS["gemma-2b"].shape, Workload(512, 3, 5)
    plan = named_plan("device", shape, workload)
    assert logits_bytes(shape, workload) == 4 * 512 * 256_000 == 500 * MIB
    for groups in (1, 7):
        needed = kvrecomp.memory_needed(replace(plan, groups=groups))["device"]
        assert needed["logits"] == groups * 500 * MIB
        assert needed["prefill or step"] == sampling_bytes(shape, workload) > 1700 * MIB


def test_groups_alike_take_no_longer():
    """As many bytes with ever so many groups; each has its tails, blocks and logits."""
    plan = replace(kvrecomp.with_host_weights(named_plan("split:0.5", SHAPE, WORKLOAD), 1.0), order="column")
    few, many = (kvrecomp.memory_needed(replace(plan, groups=groups)) for groups in (10, 10**9))
    for item in ("tail", "logits"):
        assert many["device"][item] == 10**8 * few["device"][item]
    assert many["host"]["weights"] == few["host"]["weights"]
    rows = rows_bytes(replace(plan, groups=10**9)) - rows_bytes(replace(plan, groups=10))
    assert many["device"]["prefill or step"] - few["device"]["prefill or step"] <= rows


@pytest.mark.parametrize("name", ["device", "activations", "device:0.5"])
@pytest.mark.parametrize("gib", [14, 15])
def test_the_batch_that_is_said_to_fit_fits(name, gib):
    """And one more does not."""

    def refused(batch):
        plan = named_plan(name, models.PRESETS["opt-6.7b"].shape, Workload(batch, 1024, 32), tail=32)
        try:
            check_memory(plan, Budget.of_gib(device=gib, host=100))
        except PlanError as error:
            return str(error)
        return None

    said = int(refused(32).partition("a batch of ")[2].split()[0])
    assert refused(said) is None and refused(said + 1) is not None


def test_budgets_in_gib():
    assert Budget.of_gib(2, 0.5) == Budget(2 * 2**30, 2**29)
    assert Budget.of_gib(host=3) == Budget(None, 3 * GIB) and Budget.of_gib() == Budget()


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * MIB, "3.0 MiB"), (1.25 * GIB, "1.25 GiB")],
)
def test_format_bytes(size, text):
    assert format_bytes(size) == text


# --- plans by name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "runs", "tail_form", "memory", "method", "schedule"),
    [
        ("activations", [(acts, "host", 11)], acts, "host", "absorb", "pipelined"),
        ("recompute", [(acts, "host", 11)], acts, "host", "recompute", "pipelined"),
        ("keys_values", [(kv, "host", 11)], kv, "host", "absorb", "pipelined"),
        ("split:0.3", [(acts, "host", 3), (kv, "host", 8)], kv, "host", "absorb", "pipelined"),
        ("split:0", [(kv, "host", 11)], kv, "host", "absorb", "pipelined"),
        ("split:1", [(acts, "host", 11)], acts, "host", "absorb", "pipelined"),
        ("kvpr:0.75", [(acts, "host", 8), (kv, "host", 3)], kv, "host", "recompute", "layerwise"),
        ("device", [(kv, "device", 11)], kv, "device", "absorb", "pipelined"),
        ("device:0.25", [(kv, "device", 3), (acts, "host", 8)], acts, "host", "absorb", "pipelined"),
        ("device:0", [(acts, "host", 11)], acts, "host", "absorb", "pipelined"),
    ],
)
def test_named_plans(name, runs, tail_form, memory, method, schedule):
    plan = named_plan(name, SHAPE, WORKLOAD)
    assert plan.name == name and plan.schedule == schedule
    for layer in plan.layers:
        assert layer.prompt == tuple(BlockSpec(*run) for run in runs)  # the window is large enough for one block a run
        assert (layer.tail_form, layer.write_out_memories, layer.method) == (tail_form, (memory,), method)


@pytest.mark.parametrize(
    ("name", "blocks", "tail_form", "codec"),
    [
        ("activations+int4", [(acts, "device", 32), (acts, "host", 45, "int4")], acts, "int4"),
        ("split:0.3+int8", [(kv, "device", 32), (kv, "host", 45, "int8")], kv, "int8"),
        ("split:0.8+int4", [(kv, "device", 32), (acts, "host", 30, "int4"), (kv, "host", 15, "int4")], kv, "int4"),
        ("device+int8", [(kv, "device", 32), (kv, "device", 45, "int8")], kv, "int8"),
        ("activations+packed", [(acts, "host", 77, "packed")], acts, "packed"),
    ],
)
def test_first_tokens_are_plain_where_others_have_loss(name, blocks, tail_form, codec):
    """Of 77, of the form that the tail has."""
    shape = replace(SHAPE, positions=90, dtype="bfloat16")
    plan = named_plan(name, shape, Workload(3, 77, 8))
    for layer in plan.layers:
        assert layer.prompt == tuple(BlockSpec(*block) for block in blocks)
        assert (layer.tail_form, layer.write_out_codecs) == (tail_form, (codec,))
    assert plan.lossless == (codec == "packed")
    assert ("with loss" in str(plan)) is not plan.lossless


def test_what_cannot_be_packed_is_plain_and_what_has_loss_stays():
    """Of the prompt and of what is written out, or from a write-out on."""
    blocks = (BlockSpec(acts, "device", 5, "packed"), BlockSpec(acts, "host", 6, "int4"))
    layer = LayerPlan(blocks, acts, ("device", "host"), write_out_codecs=("packed", "int4"))
    found = layer.plain_from(None)
    assert [block.codec for block in found.prompt] == ["plain", "int4"] and found.write_out_codecs == ("plain", "int4")
    assert layer.plain_from(1) == layer
    packed = replace(layer, write_out_codecs=("packed",)).plain_from(2)
    assert packed.prompt == blocks and packed.write_out_codecs == ("packed", "packed", "plain")


def test_short_prompts_are_plain_and_what_is_written_out_is_not():
    plan = named_plan("activations+int4", SHAPE, WORKLOAD, tail=3)
    assert all(layer.prompt == (BlockSpec(acts, "device", 11),) for layer in plan.layers)
    assert not plan.lossless and plan.codecs == ("plain", "int4")
    assert named_plan("activations+int4", SHAPE, WORKLOAD, tail=8).lossless  # nothing is written out


def test_first_tokens_that_a_layer_does_not_see_are_in_no_block():
    seen = replace(PLAIN, sliding_window=41)
    plan = named_plan("keys_values+int4", replace(SHAPE, layers=(seen, PLAIN), positions=90), Workload(3, 77, 8))
    assert [[(block.memory, block.tokens) for block in layer.prompt] for layer in plan.layers] == [
        [("host", seen.cached(77))],
        [("device", 32), ("host", 45)],
    ]


@pytest.mark.parametrize(
    ("batch", "new", "asked", "tail"),
    [
        (1, 3, None, 3),
        (1, 5000, None, 1024),
        (10_000, 5000, None, 512),
        (10**6, 5000, None, 16),
        (3, 8, 5, 5),
        (3, 8, 9, 8),
    ],
)
def test_a_tail_is_about_as_many_bytes_whatever_the_batch_and_not_longer_than_the_new_tokens(batch, new, asked, tail):
    """A token of a row is at most 2 * (70 + 35) bytes here; 10000 rows of 512 tokens are 1 GiB."""
    shape, workload = replace(SHAPE, positions=10_000), Workload(batch, 3, new)
    assert named_plan("activations", shape, workload, tail=asked, window=10 * GIB).tail == tail


@given(
    st.lists(st.integers(1, 200) | st.integers(200, 3000), min_size=1, max_size=3),
    st.sampled_from([acts, kv]),
    st.sampled_from([PLAIN, GROUPED]),
    st.integers(1, 25_000) | st.integers(25_000, 500_000),
)
def test_runs_are_cut_evenly_into_as_few_blocks_as_the_largest_allows(tokens, form, layer, largest):
    runs = [(form, "host", count) for count in tokens]
    blocks = cut_runs(runs, layer, SHAPE, WORKLOAD, largest)
    token_bytes = WORKLOAD.batch * layer.width(form) * 2
    rest = [block.tokens for block in blocks]
    for count in tokens:
        sizes = []
        while sum(sizes) < count:
            sizes.append(rest.pop(0))
        unit = 32 if 256 * token_bytes <= largest < count * token_bytes else 1
        whole = [*sizes[:-1], sizes[-1] + -sizes[-1] % unit]  # but for what the last one lacks
        assert sum(sizes) == count and max(whole) - min(whole) <= unit
        assert not any(size % unit for size in whole)
        assert max(sizes) == 1 or max(sizes) * token_bytes <= largest
        # No more blocks than it takes: with one less, the largest would be too large.
        fewer = len(sizes) - 1
        assert not fewer or -(-sum(whole) // unit // fewer) * unit * token_bytes > largest
    assert not rest and {(block.form, block.memory) for block in blocks} == {(form, "host")}


@pytest.mark.parametrize(
    ("tokens", "most", "sizes"),
    [
        (11, 4, [4, 4, 3]),
        (1000, 500, [352, 352, 296]),  # 480 in multiples of 32: 32 of these in three blocks, but for 24 tokens
        *((whole, whole, [whole]) for whole in (1, 31, 33, 255, 481, 1000, 1024)),
    ],
)
def test_cutting_by_hand(tokens, most, sizes):
    """One token of three rows is 420 bytes. On the device a run is one block."""
    blocks = cut_runs([(kv, "host", tokens)], PLAIN, SHAPE, WORKLOAD, most * 420)
    assert blocks == tuple(BlockSpec(kv, "host", size) for size in sizes)
    assert cut_runs([(kv, "device", tokens)], PLAIN, SHAPE, WORKLOAD, 1) == (BlockSpec(kv, "device", tokens),)


@pytest.mark.parametrize(("tokens", "expected"), [(255, False), (256, False), (257, True), (287, True), (288, False)])
def test_blocks_that_kernels_may_be_slow_for(tokens, expected):
    assert uneven(tokens) is expected


# --- what a plan says -------------------------------------------------------------------------------------------------


def test_a_plan_in_words():
    text = str(replace(MIXED, reason="because it is by hand"))
    title, *lines = (line.rstrip() for line in text.splitlines())
    assert title == "Plan mixed: two, batch 3, prompt 11, 8 new"
    (first,) = (line for line in lines if line.lstrip().startswith("0 "))
    (second,) = (line for line in lines if line.lstrip().startswith("1 "))
    assert first.split() == "0 - 2 (840 B) 4 (840 B) 5 (2.1 KiB) 3 (1.2 KiB) absorb".split()
    assert second.split() == "1 5 (1.0 KiB) - 6 (1.2 KiB) - 3 (630 B) recompute".split()
    assert "1.8 KiB in blocks on the device, 4.1 KiB in blocks on the host; window 9.8 KiB; pipelined" in lines[-2]
    assert lines[-1].strip() == "because it is by hand"
    assert max(map(len, text.splitlines())) <= 120 and "\x1b" not in text


def test_layers_alike_share_a_line():
    shape = replace(SHAPE, layers=(PLAIN,) * 31)
    lines = str(named_plan("split:0.5", shape, WORKLOAD)).splitlines()
    assert sum(line.lstrip().startswith("0-30 ") for line in lines) == 1
    layers = named_plan("split:0.5", shape, WORKLOAD).layers
    other = named_plan("activations", shape, WORKLOAD).layers[0]
    mixed = Plan("mixed", shape, WORKLOAD, (*layers[:5], other, *layers[6:]), tail=8)
    lines = [line.strip() for line in str(mixed).splitlines()]
    assert [line.partition("  ")[0] for line in lines if line[:1].isdigit()][:2] == ["0-4, 6-30", "5"]
    alternating = Plan("mixed", shape, WORKLOAD, tuple(other if i % 2 else layers[0] for i in range(31)), tail=8)
    assert "16 of 0-30" in str(alternating) and "15 of 1-29" in str(alternating)


def test_plans_are_compared_by_what_is_in_them():
    assert MIXED == replace(MIXED) and hash(MIXED) == hash(replace(MIXED)) and replace(MIXED, tail=2) != MIXED


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(PLAIN, kv_heads=3), "5 heads do not divide into 3 key-value heads"),
        (lambda: replace(PLAIN, hidden=0), "LayerShape: hidden is 0; it must be greater than zero"),
        (lambda: replace(SHAPE, dtype="float64"), "'float64'; it must be one of float32, bfloat16, float16"),
        (lambda: replace(SHAPE, layers=()), "layers is 0"),
        (lambda: BlockSpec("values", "host", 3), "'values' is not one of activations, keys_values"),
        (lambda: BlockSpec("activations", "disk", 3), "'disk' is not one of device, host"),
        (lambda: BlockSpec("activations", "host", 0), "tokens is 0; it must be greater than zero"),
        (lambda: replace(MIXED, tail=0), "tail is 0"),
        (lambda: replace(MIXED, tail=2.0), "tail is 2.0; it must be a whole number"),
        (
            lambda: Workload(1, 10**12, 8),
            "Workload: prompt is 1000000000000; it may be 2147483647, as many as int32 counts",
        ),
        (lambda: Workload(2**31, 3, 8), "Workload: batch is 2147483648; it may be 2147483647"),
        (lambda: replace(WORKLOAD, new=int("1" * 30)), "Workload: new is 111111111111111111111111111111; it may be"),
        (lambda: replace(WORKLOAD, batch="2"), "batch is '2'; it must be a whole number"),
        (lambda: replace(MIXED, window=-1), "window is -1"),
        (lambda: replace(MIXED, layers=MIXED.layers[:1]), "1 layer plans for a model of 2 layers"),
        (
            lambda: replace(MIXED, workload=replace(WORKLOAD, prompt=12)),
            "layer 0: its blocks hold 11 tokens; of the prompt 12 are cached",
        ),
        (
            lambda: replace(MIXED, shape=replace(SHAPE, layers=(PLAIN, replace(GROUPED, sliding_window=5)))),
            "layer 1: its blocks hold 11 tokens; of the prompt 4 are cached",
        ),
        (lambda: replace(GROUPED, sliding_window=0), "sliding_window is 0; it must be greater than zero"),
        (lambda: replace(MIXED, workload=replace(WORKLOAD, new=91)), "need 102 positions; two has 101: shorten"),
        (lambda: Budget(0), "device is 0 bytes; it must be greater than zero"),
        (lambda: Budget(math.nan), "device is nan bytes; it must be greater than zero"),
        (lambda: Budget(host=-1), "host is -1 bytes; it must not be negative"),
        (lambda: named_plan("split", SHAPE, WORKLOAD), "there is no plan 'split'; the plans are auto, activations, re"),
        (lambda: named_plan("device:", SHAPE, WORKLOAD), "there is no plan 'device:'"),
        (lambda: named_plan("activations:0.5", SHAPE, WORKLOAD), "there is no plan 'activations:0.5'"),
        (lambda: named_plan("split:nan", SHAPE, WORKLOAD), "plan 'split:nan': 'nan' is not a fraction from 0 to 1"),
        (lambda: named_plan("auto", SHAPE, WORKLOAD), "auto is goes by the machine: use plan_for or make_plan"),
        (
            lambda: named_plan("keys_values", replace(SHAPE, positions=10**8), Workload(3, 10**6, 8), window=4200),
            "1000000 tokens of 420 B in host memory are 500000 blocks of a layer, of at most 1.0 KiB each; 4096",
        ),
        (
            lambda: named_plan("device", replace(SHAPE, positions=10**9), Workload(3, 7, 10**6), tail=100),
            "plan device: 1000000 new tokens fill a tail of 100 9999 times; 4096 may be written out: use a longer tail",
        ),
        (
            lambda: replace(MIXED, groups=10**30),
            f"layer 0: a block of 4 tokens in {10**30} groups of 3 rows takes more bytes than",
        ),
        (
            lambda: replace(SHAPE, vocab=10**15),
            "ModelShape: its weights are more than 1000000000000000, which no machine",
        ),
        (lambda: replace(SHAPE, embedding=0), "ModelShape: embedding is 0; it must be greater than zero"),
        (lambda: replace(MIXED, window=2099), "layer 0: the window of 2.0 KiB is smaller than a block of 5 tokens, "),
    ],
)
def test_what_cannot_be_is_one_clear_line(make, message):
    with pytest.raises(PlanError) as raised:
        make()
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_the_table_says_which_drafts_are_checked():
    """A byte a number of three rows. Of the first layer x of four tokens, K and V of five and of the three that are
    written out to the host; of the second, which cannot absorb keys, K and V of six, and x of the six written out."""
    first, second = 4 * 35 + 5 * 70 + 3 * 70, 6 * 16 + 6 * 35
    plan = replace(MIXED, drafting=Drafting("sketch", 2, codec="fp8"))
    assert plan.sketch_bytes(plan.write_outs) == 3 * (first + second) == 3018
    assert {layer.method for layer in plan.sketched.layers} == {"absorb"}
    assert "up to 2 drafts a step (fp8 sketch, 2.9 KiB)" in " ".join(str(plan).split())
    looked_up = replace(MIXED, drafting=Drafting("prompt_lookup", 5))
    under_copies = replace(plan, groups=2)
    assert "up to 2 drafts a step made under copies (fp8 sketch, 5.9 KiB)" in " ".join(str(under_copies).split())
    assert "up to 5 drafts a step (prompt lookup)" in " ".join(str(looked_up).split())
