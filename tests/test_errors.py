"""Bad input is refused where it is given, in one line that says what was given, what was expected and what to do."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

import kvrecomp
import models
from kvrecomp.generate import TokenLoop
from kvrecomp.plan import GIB, BlockSpec, PlanError, Workload
from kvrecomp.run import memory
from kvrecomp.run.limits import check_memory
from kvrecomp.run.prompt import PromptError, check_prompt
from kvrecomp.run.sampling import Sampling


@contextlib.contextmanager
def one_line(kind, *parts):
    """Expects an error of that kind whose message is one line and has all the parts."""
    with pytest.raises(kind) as raised:
        yield
    message = str(raised.value)
    assert "\n" not in message and len(message) < 400
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


def plan_of(name="activations", *, batch=2, prompt=5, new=3, **options):
    return kvrecomp.named_plan(name, toy.model().shape, Workload(batch, prompt, new), **options)


IDS = np.arange(10, dtype=np.int32).reshape(2, 5)


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "mask", "parts"),
    [
        (IDS.astype(np.float32), None, ["integers [batch, prompt]", "float32[2, 5]"]),
        (IDS.astype(bool), None, ["integers [batch, prompt]", "bool[2, 5]"]),
        (IDS.astype(jnp.bfloat16), None, ["integers [batch, prompt]", "bfloat16[2, 5]"]),
        (IDS[0], None, ["integers [batch, prompt]", "int32[5]"]),
        (IDS[:, :0], None, ["empty", "[2, 0]", "at least one token"]),
        (IDS[:, :4], None, ["[2, 4]", "[2, 5]", "pad the prompts on the left"]),
        (IDS[:1], None, ["[1, 5]", "[2, 5]", "make a plan for this one"]),
        (IDS, [[1, 1, 1], [1, 1]], ["the rows of attention_mask differ in length"]),
        (IDS, np.ones((2, 4)), ["attention_mask is [2, 4]", "input_ids [2, 5]", "must be the same"]),
        (IDS, [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], ["row 1 is empty", "at least one"]),
        (IDS, [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]], ["row 1 is not left-padded", "move the padding to the left"]),
        (IDS, [[0, 1, 0, 1, 1], [1, 1, 1, 1, 1]], ["row 0 is not left-padded", "0 after a 1"]),
        (np.where(IDS == 7, 61, IDS), None, ["token id 61 in row 1", "vocabulary of 61 tokens"]),
        (np.where(IDS == 3, -2, IDS), None, ["token id -2 in row 0", "vocabulary of 61 tokens"]),
        (np.where(IDS == 3, np.int64(2**40 + 5), IDS), None, ["token id 1099511627781 in row 0", "vocabulary of 61"]),
    ],
)
def test_prompts(ids, mask, parts):
    with one_line(PromptError, *parts):
        check_prompt(ids, mask, plan_of())


def test_prompts_are_refused_by_the_decoder_before_anything_is_compiled():
    decoder = kvrecomp.Decoder(toy.model(), plan_of())
    with one_line(PromptError, "token id 61 in row 1"):
        decoder.prefill(np.where(IDS == 7, 61, IDS))
    assert not decoder.compiled


def test_what_is_padding_may_be_any_id():
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    ids, padding = check_prompt(np.where(mask, IDS, -100), mask, plan_of())
    assert padding.tolist() == [0, 3] and ids.min() >= 0 and (ids[mask == 1] == IDS[mask == 1]).all()
    assert ids.dtype == padding.dtype == np.int32


@pytest.mark.parametrize("ids", [IDS[:, :0], IDS[:0], IDS[0], [[]], 7])
def test_generate_wants_rows_of_tokens(ids):
    with one_line(PromptError, "input_ids must be integers [batch, prompt] with at least one token a row", "got "):
        kvrecomp.generate(toy.model(), ids)


@pytest.mark.parametrize(
    ("row_ids", "found"),
    [([0], "is "), ([[0, 1]], "is "), ([0.0, 1.0], "is "), ([0, -1], "has -1;"), ([0, 2**32], "has 4294967296;")],
)
def test_row_ids(row_ids, found):
    with one_line(PromptError, f"row_ids {found}", "integers [2] from 0 to 2**32 - 1"):
        kvrecomp.generate(toy.model(), IDS, max_new_tokens=3, plan="device", row_ids=row_ids)
    with one_line(PromptError, "the rows of row_ids differ in length"):
        kvrecomp.generate(toy.model(), IDS, max_new_tokens=3, plan="device", row_ids=[row_ids, [1, 2, 3]])


def test_a_streamer_gets_no_prompts_that_are_refused():
    class Streamer:
        def put(self, value):
            raise AssertionError("it got them")

    loop = TokenLoop(kvrecomp.Decoder(toy.model(), plan_of(prompt=4)), Sampling(), eos=(), pad=0, streamer=Streamer())
    with one_line(PromptError, "is [2, 5]", "of at most 4 tokens"):
        loop.run(IDS, None, 2)


def test_prompt_longer_than_the_positions():
    with one_line(PlanError, "prompt of 39", "3 new tokens", "need 42 positions", "toy has 41", "shorten"):
        plan_of(prompt=39)
    with one_line(PlanError, "need 42 positions", "shorten"):
        kvrecomp.generate(toy.model(), np.zeros((1, 39), np.int32), max_new_tokens=3)
    assert plan_of(prompt=38).workload.prompt == 38


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("", "activation", "keys", "split", "split:", "device:", "activations:0.5", "keys_values:1", "recompute:0"),
        *("split:1.5", "split:-0.1", "kvpr:x", "split:nan", "device:2"),
    ],
)
def test_unknown_plans(name):
    with one_line(PlanError, repr(name), "from 0 to 1"):
        plan_of(name)


def test_auto_is_not_made_by_its_name():
    with one_line(PlanError, "goes by the machine", "plan_for or make_plan"):
        plan_of("auto")


def test_unknown_plans_are_listed_by_generate():
    with one_line(PlanError, "'best'", "activations, recompute, keys_values, split:F, kvpr:F, device[:F]"):
        kvrecomp.generate(toy.model(), IDS, plan="best")


def test_window_smaller_than_a_block():
    token = 2 * 21 * 4  # batch, hidden, float32
    sizes = f"window of {token - 1} B", "a block of 1 tokens", f"{token} B"
    with one_line(PlanError, "layer 0", *sizes, "use a larger window"):
        plan_of(window=token - 1, tail=1)
    assert plan_of(window=token, tail=1).blocks()[0] == (BlockSpec("activations", "host", 1),) * 5
    with one_line(PlanError, "a block of 3 tokens", f"{3 * token} B", "smaller blocks"):
        plan_of(window=2 * token, new=4, tail=3)  # the tail, once written out


def test_plan_for_another_model():
    plan = plan_of()
    with one_line(PlanError, "plan is for toy in float32", "model is toy-350m in float32", "from model.shape"):
        kvrecomp.Decoder(toy.model("350m"), plan)
    other = dataclasses.replace(plan, shape=dataclasses.replace(plan.shape, dtype="bfloat16"))
    with one_line(PlanError, "plan is for toy in bfloat16", "model is toy in float32"):
        kvrecomp.Decoder(toy.model(), other)


@pytest.mark.parametrize(("batch", "prompt", "new"), [(0, 5, 3), (2, -1, 3), (2, 5, 0)])
def test_workloads(batch, prompt, new):
    with one_line(PlanError, "Workload", "must be greater than zero"):
        Workload(batch, prompt, new)


def test_stepping_past_the_workload():
    decoder = kvrecomp.Decoder(toy.model(), plan_of(new=3, tail=2))
    cache, _ = decoder.prefill(IDS)
    token_ids = toy.put(IDS[:, 0])
    for _ in range(3):
        cache, logits = decoder.step(cache, token_ids)
    with one_line(PlanError, "3 new tokens", "all of them are cached", "larger Workload.new"):
        decoder.step(cache, token_ids)
    assert np.isfinite(toy.get(logits)).all()  # and what is there is still there
    assert all(np.isfinite(toy.get(array)).all() for tail in cache.recent.tails for array in tail)


def test_a_model_on_another_device_is_refused():
    """Of two that a CPU pretends to be, in a process of its own."""
    code = """
import jax, numpy as np, kvrecomp, toy, models
with jax.default_device(jax.devices()[1]):
    model = models.create(toy.OPT, dtype="float32")
    kvrecomp.generate(model, np.ones((2, 5), np.int32), max_new_tokens=2, plan="device")
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert run.stderr.strip().endswith("jax's first device: load the model there"), run.stderr


# --- memory -----------------------------------------------------------------------------------------------------------


def large(name="activations", batch=32):
    """OPT-6.7B with 1024 tokens: 8 GiB of activations, as many of keys and as many of values, at batch 32."""
    shape = models.PRESETS["opt-6.7b"].shape
    return kvrecomp.named_plan(name, shape, Workload(batch, 1024, 32), tail=32)


def test_host_memory_too_small_says_the_sizes_and_what_fits():
    plan = large()
    with one_line(PlanError, "plan activations needs 8.00 GiB of host memory", "5.10 GiB may be used", "a batch of 20"):
        check_memory(plan, kvrecomp.Budget.of_gib(device=100, host=5.1))
    check_memory(large(batch=20), kvrecomp.Budget.of_gib(device=100, host=5.1))
    with one_line(PlanError, "of host memory"):
        check_memory(large(batch=21), kvrecomp.Budget.of_gib(device=100, host=5.1))
    with one_line(PlanError, "not even a batch of 1 fits", "more memory"):
        check_memory(plan, kvrecomp.Budget.of_gib(device=100, host=0.2))


def test_device_memory_too_small_says_the_sizes():
    weights = large().shape.parameters * 2 / GIB
    sizes = f"weights {weights:.2f} GiB", "blocks 16.00 GiB", "tail 512.0 MiB", "20.00 GiB may be used"
    with one_line(PlanError, "plan device needs", "of device memory", *sizes):
        check_memory(large("device"), kvrecomp.Budget.of_gib(device=20))
    with one_line(PlanError, "not even a batch of 1 fits"):
        check_memory(large("device"), kvrecomp.Budget.of_gib(device=weights))


def test_memory_is_checked_before_anything_is_allocated():
    small = kvrecomp.Budget(device=4 * GIB, host=100)
    with one_line(PlanError, "of host memory", "100 B may be used", "not even a batch of 1"):
        kvrecomp.Decoder(toy.model(), plan_of(), budget=small)
    with one_line(PlanError, "of host memory"):
        kvrecomp.generate(toy.model(), IDS, max_new_tokens=3, plan="activations", budget=small)


def test_what_is_free_bounds_a_plan_without_a_budget(monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 100)
    monkeypatch.setattr(memory, "free_device_bytes", lambda: 4 * GIB)
    with one_line(PlanError, "of host memory", "95 B may be used"):
        kvrecomp.Decoder(toy.model(), plan_of())
    kvrecomp.Decoder(toy.model(), plan_of(), budget=kvrecomp.Budget(host=10**6))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"device": 0}, "device is 0 bytes; it must be greater than zero"),
        ({"device": -1.0, "host": 1}, "device is -1.0 bytes; it must be greater than zero"),
        ({"device": 1, "host": -1}, "host is -1 bytes; it must not be negative"),
        ({"device": "20"}, "device is '20'; it must be a number, or None"),
        ({"host": "20"}, "host is '20'; it must be a number, or None"),
    ],
)
def test_budgets(sizes, message):
    with one_line(PlanError, f"Budget: {message}"):
        kvrecomp.Budget(**sizes)
    with one_line(PlanError, f"Budget: {message.split()[0]} is"):
        kvrecomp.Budget.of_gib(**sizes)


@pytest.mark.parametrize("budget", [20, "20"])
def test_what_is_no_budget(budget):
    with one_line(PlanError, f"the budget is {budget!r}", "Budget.of_gib(20)"):
        kvrecomp.generate(toy.model(), IDS, max_new_tokens=3, plan="device", budget=budget)


def test_the_pinned_pool_is_named_where_it_is_the_limit(monkeypatch):
    monkeypatch.setenv(memory.LIMIT_VARIABLE, "6")
    plenty = kvrecomp.Budget.of_gib(device=100, host=100)
    with one_line(PlanError, "of host memory", "capped at 6 GiB", "set XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB before jax"):
        check_memory(large(), plenty)
    monkeypatch.setenv(memory.LIMIT_VARIABLE, "9")
    check_memory(large(), plenty)
    with pytest.raises(PlanError) as raised:
        check_memory(large(), kvrecomp.Budget.of_gib(device=100, host=1))
    assert memory.LIMIT_VARIABLE not in str(raised.value)  # raising it would not help


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds(seed):
    with one_line(ValueError, f"seed is {seed}", "from 0 to 2**32 - 1"):
        kvrecomp.generate(toy.model(), IDS, max_new_tokens=3, plan="device", seed=seed)


def with_nan_at(position):
    """A toy OPT whose embedding of one position is not a number."""
    broken = toy.randomised(toy.OPT.build(dtype="float32", rngs=None))
    graph, state = nnx.split(broken)
    table = toy.get(state["positions"]["embedding"].get_value()).copy()
    table[position + 2] = np.nan
    state["positions"]["embedding"].set_value(toy.put(table))
    return nnx.merge(graph, state)


@pytest.mark.parametrize(("position", "row", "token"), [(4, 1, 0), (6, 1, 2), (5, 1, 1)])
def test_nan_logits_name_the_row_and_the_token(position, row, token):
    """Row 1 has 5 tokens, the others 2 and 3, so it is the first to reach a position."""
    ids, padding = np.arange(15).reshape(3, 5), np.array([[3], [0], [2]])
    with one_line(FloatingPointError, f"row {row} are NaN or infinite at new token {token}", "check the weights"):
        kvrecomp.generate(with_nan_at(position), ids, np.arange(5) >= padding, max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be above zero"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf; it must be above zero and finite"),
        ({"temperature": 10**400}, "expected a number"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": "hot"}, "temperature is 'hot'; expected a number"),
        ({"top_p": None}, "top_p is None; expected a number"),
        ({"top_k": 2.5}, "top_k is 2.5; expected a whole number"),
        ({"seed": None}, "seed is None; expected a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: ask for at least one"),
        ({"max_new_tokens": 4.0}, "max_new_tokens is 4.0: ask for at least one, a whole number"),
        ({"eos_token_id": [[5, 6]]}, "eos_token_id is [[5, 6]]; expected a token id, or a list of them"),
        ({"eos_token_id": [[5], [6, 7]]}, "eos_token_id is [[5], [6, 7]]; expected a token id"),
        ({"eos_token_id": 5.5}, "eos_token_id is 5.5; expected a token id"),
        ({"pad_token_id": 2**40}, "pad_token_id is 1099511627776; expected a token id"),
        ({"plan": None}, "the plan is None; expected a Plan, or the name of one"),
    ],
)
def test_options_out_of_range(options, part):
    with one_line(ValueError, part):
        kvrecomp.generate(toy.model(), IDS, **options)


# --- drafts -----------------------------------------------------------------------------------------------------------


class Mute:
    """A model that nothing is asked of."""


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"prompt_lookup_num_tokens": 0}, ["prompt_lookup_num_tokens is 0", "a whole number from 1 to 256"]),
        ({"prompt_lookup_num_tokens": 2.0}, ["prompt_lookup_num_tokens is 2.0", "a whole number from 1 to 256"]),
        ({"num_assistant_tokens": -3}, ["num_assistant_tokens is -3", "a whole number from 1 to 256"]),
        ({"num_assistant_tokens": 3}, ["num_assistant_tokens is given and assistant_model is not"]),
        ({"drafts": -1}, ["drafts is -1", "a whole number from 0 to 256"]),
        ({"drafts": 257}, ["drafts is 257", "a whole number from 0 to 256"]),
        ({"drafts": "many"}, ["drafts is 'many'", "a whole number from 0 to 256"]),
        (
            {"prompt_lookup_num_tokens": 2, "assistant_model": Mute()},
            ["prompt_lookup_num_tokens and assistant_model both draft", "give one of them"],
        ),
        (
            {"prompt_lookup_num_tokens": 2, "drafts": 3},
            ["drafts is 3, more than prompt_lookup_num_tokens, 2", "give a smaller one"],
        ),
        (
            {"assistant_model": Mute(), "num_assistant_tokens": 2, "drafts": 5},
            ["drafts is 5, more than num_assistant_tokens, 2"],
        ),
    ],
)
def test_drafts_out_of_range(options, parts):
    with one_line(PlanError, *parts):
        kvrecomp.generate(toy.model(), IDS, plan="device", **options)


def drafted(drafter="prompt_lookup", most=3, **options):
    return dataclasses.replace(plan_of(), drafting=kvrecomp.Drafting(drafter, most, **options))


@pytest.mark.parametrize(
    ("plan", "options", "parts"),
    [
        (plan_of(), {"prompt_lookup_num_tokens": 2}, ["has no drafts", "prompt_lookup is asked for", "Drafting("]),
        (plan_of(), {"drafts": 2}, ["has no drafts", "sketch is asked for", "'sketch', 2, codec='fp8'"]),
        (drafted(), {"prompt_lookup_num_tokens": 5}, ["has room for 3 drafts", "5 are asked for", "Drafting.most"]),
        (drafted("sketch", codec="int4"), {"drafts": 4}, ["has room for 3 drafts", "4 are asked for"]),
        (drafted(), {"drafts": 4}, ["has room for 3 drafts", "4 are asked for"]),
        (
            drafted("sketch", codec="int4"),
            {"prompt_lookup_num_tokens": 2},
            ["has drafts by sketch, and prompt_lookup is asked for"],
        ),
        (drafted("assistant"), {}, ["has drafts by an assistant model", "give assistant_model"]),
    ],
)
def test_drafts_that_a_plan_has_no_room_for(plan, options, parts):
    with one_line(PlanError, f"plan {plan.name}", *parts):
        kvrecomp.generate(toy.model(), IDS, max_new_tokens=3, plan=plan, **options)


@pytest.mark.parametrize(
    ("plan", "loss", "parts"),
    [
        ("auto", "int2", ["loss is 'int2'", "none, int8, int4"]),
        ("auto", None, ["loss is None", "none, int8, int4"]),
        ("activations", "int4", ["loss=int4 is for plan auto", "activations+int4"]),
        (plan_of(), "int8", ["loss is 'int8'", f"plan {plan_of().name} is given", "leave loss out"]),
    ],
)
def test_losses_that_cannot_be(plan, loss, parts):
    with one_line(PlanError, *parts):
        kvrecomp.generate(toy.model(), IDS, max_new_tokens=3, plan=plan, loss=loss)


def test_assistants_that_cannot_draft():
    other = toy.randomised(dataclasses.replace(toy.OPT, name="other", vocab=67).build(dtype="float32", rngs=None))
    options = {"max_new_tokens": 3, "plan": "activations"}
    with one_line(PlanError, "assistant other has a vocabulary of 67", "toy one of 61", "tokens are the same"):
        kvrecomp.generate(toy.model(), IDS, assistant_model=other, **options)
    short = toy.randomised(dataclasses.replace(toy.OPT, name="short", positions=5).build(dtype="float32", rngs=None))
    with one_line(PlanError, "assistant short has 5 positions, the prompt 5 tokens", "take one with more"):
        kvrecomp.generate(toy.model(), IDS, assistant_model=short, **options)
    with one_line(ValueError, "Mute"):
        kvrecomp.generate(toy.model(), IDS, assistant_model=Mute(), **options)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"drafter": "prompt_lookup", "most": 0}, ["Drafting", "most", "greater than zero"]),
        ({"drafter": "prompt_lookup", "most": 3, "ahead": -1}, ["Drafting", "ahead", "greater than zero"]),
        ({"drafter": "sketch", "most": 3}, ["Drafting", "None", "fp8"]),
        ({"drafter": "sketch", "most": 3, "codec": "packed"}, ["Drafting", "packed", "fp8", "int4"]),
        (
            {"drafter": "assistant", "most": 3, "codec": "fp8"},
            ["the codec 'fp8' is given for assistant", "only a sketch has one"],
        ),
        ({"drafter": "prompt_lookup", "most": 3, "draft_cost": -1.0}, ["a draft costs -1.0", "expected numbers"]),
        ({"drafter": "prompt_lookup", "most": 3, "check_cost": 0.0}, ["checks 0.0 times a step"]),
        ({"drafter": "oracle", "most": 3}, ["Drafting", "oracle", "sketch", "prompt_lookup", "assistant"]),
    ],
)
def test_draftings(given, parts):
    with one_line(PlanError, *parts):
        kvrecomp.Drafting(**given)


def test_a_sketch_is_counted_before_anything_is_allocated():
    """OPT-6.7B's 8 GiB of activations fit in host memory, and half of that on no device of 20 GiB with the weights."""
    plan = large(batch=32)
    budget = kvrecomp.Budget.of_gib(19, 20)
    check_memory(plan, budget)
    sketched = dataclasses.replace(plan, drafting=kvrecomp.Drafting("sketch", 4, codec="fp8"))
    with one_line(PlanError, "of device memory", "sketch 4.", "may be used", "a batch of"):
        check_memory(sketched, budget)
