"""Packed blocks have the bits of plain ones, or say that they could not be packed."""

import dataclasses
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import toy_plans
from hypothesis import given, settings
from hypothesis import strategies as st

import kvrecomp
from kvrecomp.generate import TokenLoop
from kvrecomp.plan import BlockSpec, Drafting, LayerPlan, Plan, PlanError, Workload
from kvrecomp.plan.codecs import ESCAPE, NUMBERS_PER_ESCAPE
from kvrecomp.run.cache import describe_blocks
from kvrecomp.run.codecs import escapes, pack, unpack
from kvrecomp.run.drafters import PromptLookup, Sketch
from kvrecomp.run.sampling import Sampling

SPECIAL = [
    0x0000,
    0x8000,
    0x0001,
    0x807F,
    0x7F80,
    0xFF80,
    0x7FC1,
    0x7F7F,
]  # zeros, subnormals, infinities, NaN, largest


packing, counting = jax.jit(pack), jax.jit(escapes)
unpacking = jax.jit(unpack, static_argnums=(1, 2))


def packed(*tensors):
    """What `pack` gives, on the host."""
    return jax.device_get(packing(toy.put(tensors)))


def unpacked(data, shape, count):
    """The bits of what `unpack` gives."""
    tensors = unpacking(toy.put(data), shape, count)
    return [toy.get(tensor).view(np.uint16) for tensor in tensors]


def count_apart(bits):
    """How many numbers of uint16[s, b, channels] 4 bits cannot say: more than 14 below the largest finite exponent of
    their channel, or above it, but for zeros."""
    exponents = (bits.astype(int) >> 7) & 255
    finite = np.where(exponents == 255, 0, exponents)
    tops = finite.max(axis=(0, 1))
    return int((((exponents > tops) | (exponents <= tops - ESCAPE)) & (bits % 2**15 > 0)).sum())


# A program is compiled for each: odd and even numbers, less than a list's one in 1024 and more, one channel and many.
SHAPES = [
    (1, 1, 1),
    (2, 1, 3),
    (41, 3, 7),
    (32, 2, 5),
    (29, 1, 7, 5),
    (40, 3, 2, 7),
    (23, 2, 6, 6),
    (7, 3, 1),
    (33, 3, 4, 3),
]


@st.composite
def bit_patterns(draw):
    """uint16[s, b, ...]: normal numbers of channels of any size, some of them replaced by any bits at all."""
    shape = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scales = 2.0 ** rng.integers(-100, 100, size=shape[2:])
    x = np.asarray((scales * rng.normal(size=shape)).astype(jnp.bfloat16)).view(np.uint16)
    flat = x.reshape(-1)
    for _ in range(draw(st.integers(0, 3))):
        flat[rng.integers(flat.size)] = draw(st.sampled_from(SPECIAL) | st.integers(0, 2**16 - 1))
    return x


@settings(max_examples=300)
@given(patterns=st.lists(bit_patterns(), min_size=1, max_size=1), twice=st.booleans())
def test_bit_for_bit_or_overflow(patterns, twice):
    """What is no number stays so: which one it is, XLA's scatter on a CPU does not keep."""
    (bits,) = patterns
    tensors = [bits, bits[::-1].copy()] if twice else [bits]
    data, overflowed = packed(*(tensor.view(jnp.bfloat16) for tensor in tensors))
    room = math.ceil(bits.size / NUMBERS_PER_ESCAPE)
    apart = count_apart(bits.reshape(*bits.shape[:2], -1))
    assert bool(overflowed) == (apart > room)
    assert int(toy.get(counting(toy.put(bits.view(jnp.bfloat16))))) == apart
    if not overflowed:
        for tensor, found in zip(tensors, unpacked(data, bits.shape, len(tensors)), strict=True):
            numbers = ~np.isnan(tensor.view(jnp.bfloat16))
            np.testing.assert_array_equal(found[numbers], tensor[numbers])
            assert np.isnan(found[~numbers].view(jnp.bfloat16)).all()


@pytest.mark.parametrize("count", [0, 1, 31, 32])
def test_a_list_that_is_full_holds_every_place(count):
    """32 of 32,768 numbers may be apart; anywhere, the first and the last too."""
    rng = np.random.default_rng(count)
    x = rng.uniform(1, 2, size=(64, 2, 256)).astype(jnp.bfloat16)
    places = np.concatenate([[0, x.size - 1], rng.choice(np.arange(1, x.size - 1), 30, replace=False)])[:count]
    x.reshape(-1)[places] = 2.0**-20
    data, overflowed = packed(x)
    assert not overflowed
    np.testing.assert_array_equal(unpacked(data, x.shape, 1)[0], x.view(np.uint16))
    x.reshape(-1)[np.setdiff1d(np.arange(x.size), places)[: 33 - count]] = -(2.0**-20)
    assert packed(x)[1]


def test_zeros_are_not_listed():
    """Of either sign, as many as there are."""
    rng = np.random.default_rng(2)
    x = (rng.normal(size=(40, 3, 16)) * rng.integers(0, 2, size=(40, 3, 16))).astype(jnp.bfloat16)
    data, overflowed = packed(x)
    assert not overflowed and (x.view(np.uint16) == 0x8000).any() and (x.view(np.uint16) == 0).any()
    np.testing.assert_array_equal(unpacked(data, x.shape, 1)[0], x.view(np.uint16))


def test_uniform_exponents_overflow():
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**16, size=(40, 3, 16), dtype=np.uint16)
    assert packed(bits.view(jnp.bfloat16))[1]


def test_bytes_are_those_of_the_arrays():
    """12 bits a number, and less than 1 % more of a large block."""
    for spec in (
        BlockSpec(form, memory, 7, "packed") for form in ("activations", "keys_values") for memory in ("host", "device")
    ):
        layer = LayerPlan(
            (spec, dataclasses.replace(spec, tokens=4)), spec.form, ("host",), write_out_codecs=("packed",)
        )
        plan = Plan("packed", toy_plans.SHAPE, toy_plans.WORKLOAD, (layer,) * 2, tail=3)
        for shape, specs, blocks in zip(plan.shape.layers, plan.blocks(2), describe_blocks(plan, 2), strict=True):
            assert [plan.bytes_of(shape, spec) for spec in specs] == [block.nbytes for block in blocks]
    wide = dataclasses.replace(toy_plans.PLAIN, hidden=4096)
    numbers = 1024 * plan.workload.batch * 4096
    assert 1.5 * numbers < plan.bytes_of(wide, BlockSpec("activations", "host", 1024, "packed")) < 1.515 * numbers


ROUNDS = {
    "lookup": (PromptLookup(), Drafting("prompt_lookup", 2, ahead=4)),
    "sketch": (Sketch(), Drafting("sketch", 2, ahead=4, codec="int4")),
}

# --- through the decoder ----------------------------------------------------------------------------------------------


def narrow(config, seed=3):
    return toy.randomised(config.build(dtype="bfloat16", rngs=None), seed)


@pytest.mark.parametrize("config", [toy.OPT, toy.LLAMA], ids=lambda config: config.name)
@settings(max_examples=3)
@given(data=st.data())
def test_logits_are_those_of_plain_blocks(config, data):
    """Of any plan: to the bit, as the products are the same."""
    model = narrow(config)
    plan = data.draw(toy_plans.plans(model.shape, 2))
    every = range(len(plan.layers))
    texts = toy.texts(plan.workload.batch, plan.workload.prompt + plan.workload.new)
    decoders = [kvrecomp.Decoder(model, plan) for plan in (plan, plan.plain_from(every))]
    packed, plain = (toy.decoded_logits(decoder, texts) for decoder in decoders)
    np.testing.assert_array_equal(packed, plain)
    assert decoders[0].plan is plan  # nothing overflowed, whatever is packed


def spread_out(model):
    """The model with a huge first channel in the embedding of every other token: normalised, the other channels of
    these tokens are 2**-20 of those of the rest."""
    table = np.array(toy.get(model.tokens.embedding.get_value()))
    table[::2, 0] = 2.0**20
    model.tokens.embedding.set_value(toy.put(table))
    return model


def odd(ids):
    """Token ids that are embedded like one another."""
    return np.minimum(ids | 1, 59)


@pytest.mark.parametrize("name", ["activations+packed", "device:0.3+packed"])
def test_what_cannot_be_packed_is_kept_plain(name, caplog):
    """In the prompt, from the start; and said once."""
    model = spread_out(narrow(toy.LLAMA))
    texts, work = toy.texts(5, 21), Workload(5, 14, 7)
    decoder = kvrecomp.Decoder(model, kvrecomp.named_plan(name, model.shape, work, tail=3))
    with caplog.at_level(logging.WARNING, "kvrecomp"):
        found = toy.decoded_logits(decoder, texts)
    plain = kvrecomp.Decoder(model, kvrecomp.named_plan(name.removesuffix("+packed"), model.shape, work, tail=3))
    np.testing.assert_array_equal(found, toy.decoded_logits(plain, texts))
    assert decoder.plan.layers[0].prompt[0].codec == "plain"
    assert len([record for record in caplog.records if "plain from here on" in record.message]) == 1
    assert "plain from here on" in str(decoder.plan)


def test_a_tail_that_cannot_be_packed_is_written_out_plain():
    """The prompt has tokens of one kind only, and stays packed."""
    model = spread_out(narrow(toy.LLAMA))
    texts = toy.texts(5, 21)
    texts.ids[:, :14] = odd(texts.ids[:, :14])
    texts.ids[:, 14::2] &= ~1
    texts.ids[:, 15::2] = odd(texts.ids[:, 15::2])
    work = Workload(5, 14, 7)
    decoder = kvrecomp.Decoder(model, kvrecomp.named_plan("activations+packed", model.shape, work, tail=3))
    found = toy.decoded_logits(decoder, texts)
    plain = kvrecomp.Decoder(model, kvrecomp.named_plan("activations", model.shape, work, tail=3))
    np.testing.assert_array_equal(found, toy.decoded_logits(plain, texts))
    first = decoder.plan.layers[0]
    assert first.prompt[0].codec == "packed" and first.written_to(0)[1] == "plain"


@pytest.mark.parametrize(("drafter", "drafting"), ROUNDS.values(), ids=ROUNDS)
def test_a_tail_that_cannot_be_packed_between_rounds(drafter, drafting):
    """What is decided for one tail holds for those after it; texts are those of plain blocks, with the same drafts."""
    model = spread_out(narrow(toy.LLAMA))
    ids, work = toy.texts(3, 14).ids, Workload(3, 14, 13)
    texts = []
    for name in ("activations+packed", "activations"):
        plan = dataclasses.replace(kvrecomp.named_plan(name, model.shape, work, tail=3), drafting=drafting)
        sampling = Sampling(do_sample=True, temperature=5.0, seed=4)  # or the token with the huge number is written
        loop = TokenLoop(kvrecomp.Decoder(model, plan), sampling, [], 0, drafter=drafter, drafts=drafting.most)
        texts.append(loop.run(odd(ids), None, work.new))
    packed, plain = texts
    np.testing.assert_array_equal(packed.sequences, plain.sequences)
    first = packed.plan.layers[0]
    assert first.prompt[0].codec == "packed" and first.written_to(packed.plan.write_outs)[1] == "plain"
    assert packed.link_bytes[-1] <= plain.link_bytes[-1] and packed.link_bytes[0] < plain.link_bytes[0]


def test_groups_are_packed_alike():
    """A group that cannot be packed makes all of them plain, those before it too."""
    model = spread_out(narrow(toy.LLAMA))
    plan = kvrecomp.named_plan("activations+packed", model.shape, Workload(2, 14, 5), tail=2)
    plan = dataclasses.replace(plan, groups=3)
    ids = toy.texts(6, 14).ids
    ids[:2] = odd(ids[:2])
    result = kvrecomp.generate(model, ids, plan=plan, max_new_tokens=5)
    plain = dataclasses.replace(kvrecomp.named_plan("activations", model.shape, Workload(2, 14, 5), tail=2), groups=3)
    np.testing.assert_array_equal(
        result.sequences, kvrecomp.generate(model, ids, plan=plain, max_new_tokens=5).sequences
    )
    assert result.plan.layers[0].prompt[0].codec == "plain"


def test_a_cache_from_before_is_refused():
    model = spread_out(narrow(toy.LLAMA))
    decoder = kvrecomp.Decoder(model, kvrecomp.named_plan("activations+packed", model.shape, Workload(2, 14, 3)))
    ids = toy.texts(2, 14).ids
    before, _ = decoder.prefill(odd(ids))
    decoder.prefill(ids)
    with pytest.raises(kvrecomp.PromptError, match="prefill again"):
        decoder.step(before, toy.put(ids[:, -1]))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_are_refused(dtype):
    shape = dataclasses.replace(toy_plans.SHAPE, dtype=dtype)
    with pytest.raises(PlanError, match=f"packed blocks, which are of bfloat16 numbers; two is in {dtype}"):
        kvrecomp.named_plan("activations+packed", shape, toy_plans.WORKLOAD)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("activations+zip", "there is no codec 'zip'; the codecs are plain, packed, int8, int4"),
        ("activations+fp8", "there is no codec 'fp8'"),
        ("auto+packed", r"auto chooses codecs, without loss unless that is allowed: leave \+packed out"),
        ("auto+int4", "unless that is allowed: say loss=int4"),
    ],
)
def test_codecs_that_names_cannot_have(name, message):
    with pytest.raises(PlanError, match=message):
        kvrecomp.named_plan(name, toy_plans.SHAPE, toy_plans.WORKLOAD)
