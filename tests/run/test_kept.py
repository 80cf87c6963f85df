"""Programs are kept between calls of generate: nothing is compiled twice, nothing of a model is kept or used stale."""

import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

import kvrecomp
from kvrecomp.run.programs import KeptPrograms, Programs

COMPILED = []
GIVEN = toy.texts(3, 7, longest_padding=2)
NEW = 6


def listen(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(seconds)


jax.monitoring.register_event_duration_secs_listener(listen)


@pytest.fixture(scope="module")
def model():
    return toy.randomised(toy.Grouped(), seed=1)


def plan_of(model, **options):
    return kvrecomp.named_plan("split:0.5", model.shape, kvrecomp.Workload(3, 7, NEW), tail=2, **options)


def run(model, plan=None):
    """Texts, and how many programs were compiled for them."""
    before = len(COMPILED)
    result = kvrecomp.generate(model, GIVEN.ids, GIVEN.mask, max_new_tokens=NEW, plan=plan or plan_of(model))
    return result.sequences, len(COMPILED) - before


def greedy(model):
    """The likeliest continuations by whole forward passes."""
    ids = GIVEN.ids
    for _ in range(NEW):
        logits = toy.plain_logits(model, toy.Texts(ids, GIVEN.padding))
        ids = np.concatenate([ids, logits[:, -1].argmax(axis=-1)[:, None].astype(np.int32)], axis=1)
    return ids


def test_nothing_is_compiled_again(model):
    """Neither for a plan in other words."""
    first, some = run(model)
    again, none = run(model)
    renamed, also_none = run(model, dataclasses.replace(plan_of(model), name="renamed", reason="because"))
    assert some >= 4 and none == also_none == 0
    for texts in (first, again, renamed):
        np.testing.assert_array_equal(texts, greedy(model))


def test_a_trained_model_has_its_new_weights_and_needs_no_program(model):
    run(model)
    trained = toy.randomised(toy.Grouped(), seed=5)
    before = nnx.state(model)
    old = greedy(model)
    nnx.update(model, nnx.state(trained))
    try:
        texts, compiled = run(model)
        np.testing.assert_array_equal(texts, greedy(trained))
        assert compiled == 0 and (texts != old).any()
    finally:
        nnx.update(model, before)


def test_a_changed_model_has_programs_of_its_own(model):
    run(model)
    options = model.layers[1].attention.options
    model.layers[1].attention.options = (("soft_cap", 0.1),)
    try:
        texts, compiled = run(model)
        np.testing.assert_array_equal(texts, greedy(model))
        assert compiled > 0
    finally:
        model.layers[1].attention.options = options
    assert run(model)[1] == 0  # the ones before are still there


def test_arrays_that_a_model_sees_from_outside_are_part_of_a_program():
    """As a table that is no attribute: it is a constant of the program."""
    table = np.ones(23, np.float32)

    class Own(toy.Grouped):
        def unembed(self, hidden):
            return super().unembed(hidden * jnp.asarray(table))

    with jax.transfer_guard("allow"):
        model = toy.randomised(Own(), seed=1)
        run(model)
        table = np.linspace(-2, 2, 23, dtype=np.float32)
        np.testing.assert_array_equal(run(model)[0], greedy(model))


def test_other_settings_of_jaxs_have_programs_of_their_own(model):
    run(model)
    with jax.default_matmul_precision("highest"):
        assert run(model)[1] > 0
        assert run(model)[1] == 0


def test_models_and_caches_are_not_kept():
    def arrays():
        gc.collect()
        return sum(not array.is_deleted() for array in jax.live_arrays())

    model = toy.randomised(toy.Grouped(), seed=2)
    model.layers[0].attention.own = functools.partial(print, model)  # the structure of a model may have the model
    plan = plan_of(model)
    run(model, plan)  # what else there is once, such as an array of each memory
    dead, there = weakref.ref(model), arrays()
    run(model, plan)
    assert arrays() == there
    weights = len(jax.tree.leaves(nnx.state(model)))
    del model
    assert arrays() == there - weights and dead() is None


def test_so_many_sets_are_kept_those_used_last():
    kept = KeptPrograms(2)
    for name in "abacb":
        kept.of(name)[name.encode()] = name
    assert kept.of("c") == {b"c": "c"} and kept.of("b") == {b"b": "b"} and kept.of("a") == {}


def test_who_does_not_ask_for_kept_programs_compiles_its_own():
    def trace():
        return jax.jit(lambda x: x + x).trace(jax.ShapeDtypeStruct((5,), np.float32))

    before, kept = len(COMPILED), KeptPrograms(1).of("sum")
    programs = [Programs(), Programs(), Programs(kept), Programs(kept)]
    made = [each.get("sum", trace) for each in programs]
    assert len(COMPILED) == before + 3 and made[2] is made[3] and len(set(map(id, made))) == 3


@pytest.mark.parametrize("drafter", ["prompt_lookup", "sketch", "assistant"])
def test_rounds_are_found_again(model, drafter):
    """With other seeds and other ends, which are data; of an assistant too, whose weights are in no name."""
    codec = "fp8" if drafter == "sketch" else None
    plan = dataclasses.replace(plan_of(model), tail=NEW, drafting=kvrecomp.Drafting(drafter, 2, codec=codec))
    options = {"assistant_model": toy.model("350m")} if drafter == "assistant" else {}
    counts = []
    for seed, eos in ((1, 60), (2, 59), (2**31, 58)):
        before = len(COMPILED)
        kvrecomp.generate(
            model,
            GIVEN.ids,
            GIVEN.mask,
            max_new_tokens=NEW,
            plan=plan,
            do_sample=True,
            seed=seed,
            eos_token_id=eos,
            drafts=2,
            **options,
        )
        counts.append(len(COMPILED) - before)
    assert counts[0] >= 2 and counts[1:] == [0, 0]


def test_nothing_of_an_assistant_is_kept(model):
    assistant = toy.randomised(toy.POST_NORM.build(dtype="float32", rngs=None), seed=3)
    arrays = [weakref.ref(array) for array in jax.tree.leaves(nnx.state(assistant))]
    plan = dataclasses.replace(plan_of(model), drafting=kvrecomp.Drafting("assistant", 2))
    kvrecomp.generate(model, GIVEN.ids, GIVEN.mask, max_new_tokens=NEW, plan=plan, assistant_model=assistant)
    del assistant
    gc.collect()
    assert not any(array() is not None for array in arrays)
