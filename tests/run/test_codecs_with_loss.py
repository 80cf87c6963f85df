"""Codecs with loss, against NumPy and closed forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import toy_drafts
import toy_plans
from hypothesis import given, settings
from hypothesis import strategies as st

import kvrecomp
from kvrecomp.plan import FORMS, MEMORIES, BlockSpec, Drafting
from kvrecomp.plan.codecs import LOSSY, codec_bytes, steps_of, token_bytes
from kvrecomp.run import memory
from kvrecomp.run.cache import make_block
from kvrecomp.run.codecs import to_fp8, to_steps
from kvrecomp.run.drafters import Sketch

DTYPES = ("float32", "bfloat16", "float16")
LARGEST = 448.0  # of float8_e4m3fn: 1.75 * 2**8; the smallest steps are 2**-9


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_is_the_nearest_number(dtype):
    """Within half a step of 3 bits of mantissa, of any size; what is larger than the largest is that, never NaN."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(41, 7, 5)) * 2.0 ** rng.integers(-12, 12, size=(41, 7, 5))
    x.reshape(-1)[:8] = [0.0, -0.0, LARGEST, -LARGEST, 464.0, 65504.0, np.inf, -np.inf]
    x = x.astype(np.float32).astype(dtype)
    written = jax.jit(to_fp8)(toy.put(x))
    assert written.dtype == jnp.float8_e4m3fn and written.shape == x.shape
    found = toy.get(written).astype(np.float64)
    clipped = np.clip(x.astype(np.float64), -LARGEST, LARGEST)
    exponents = np.maximum(np.frexp(clipped)[1] - 1, -6)
    assert (np.abs(found - clipped) <= 2.0 ** (exponents - 4)).all()
    assert found.reshape(-1)[4:8].tolist() == [LARGEST, LARGEST, LARGEST, -LARGEST]


def written(codec, form, memory, tensors):
    """The block, and its tensors as they are read."""
    spec = BlockSpec(form, memory, len(tensors[0]), codec)

    def program(tensors):
        block, _ = make_block(spec, tensors, jnp.int32(11))
        return block, block.as_plain().tensors

    block, read = jax.jit(program)(toy.put(tensors))
    return block, [toy.get(tensor) for tensor in read]


def group_of(x, steps, s, b, c):
    """The numbers of one group, of x [s, b, c]."""
    tokens, channels = (
        slice(at - at % size, at - at % size + size) for at, size in ((s, steps.tokens), (c, steps.channels))
    )
    return x[tokens, b, channels]


def shape_of(form, tokens, batch, kv_heads, head_dim):
    return (tokens, batch, kv_heads * head_dim) if form == "activations" else (tokens, batch, kv_heads, head_dim)


# Tokens, rows, heads and their sizes: fewer than a group has, as many and more, odd and even.
SIZES = [(1, 1, 1, 1), (128, 1, 4, 16), (131, 3, 5, 7), (259, 2, 2, 65), (7, 3, 1, 31)]


@st.composite
def cached(draw):
    """A codec, a form, and tensors with channels of very different sizes, some of them constant."""
    codec, form = draw(st.sampled_from(LOSSY)), draw(st.sampled_from(FORMS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = shape_of(form, *draw(st.sampled_from(SIZES)))
    dtype = draw(st.sampled_from(DTYPES))
    tensors = []
    for _ in steps_of(codec, form):
        x = rng.normal(draw(st.floats(-9, 9)), 1, shape) * 3.0 ** rng.integers(-4, 4, shape[1:])
        x[:, rng.random(shape[1:]) < 0.2] = 7.25
        tensors.append(x.astype(np.float32).astype(dtype))
    return codec, form, tensors


@settings(max_examples=30)
@given(given=cached(), memory=st.sampled_from(MEMORIES))
def test_numbers_are_within_half_a_step_of_their_group(given, memory):
    """Of as many steps as the bits have, from the least to the largest; x and K by channel, V by token. And as many
    bytes as are planned."""
    codec, form, tensors = given
    block, read = written(codec, form, memory, tensors)
    shape, dtype = tensors[0].shape, tensors[0].dtype
    channels = int(np.prod(shape[2:]))
    assert block.nbytes == codec_bytes(codec, form, *shape[:2], channels, dtype.itemsize)
    assert len(block.arrays) == (1 if memory == "host" else 3 * len(tensors))
    assert int(toy.get(block.start)) == 11 and block.tokens == len(tensors[0])
    for x, found, steps in zip(tensors, read, steps_of(codec, form), strict=True):
        assert found.dtype == dtype and found.shape == shape
        x, found = (each.astype(np.float64).reshape(*shape[:2], channels) for each in (x, found))
        rng = np.random.default_rng(3)
        for s, b, c in zip(*(rng.integers(0, size, 40) for size in x.shape)):
            group = group_of(x, steps, s, b, c)
            step, rounding = (group.max() - group.min()) / steps.most, float(jnp.finfo(dtype).eps)
            # A step has the digits of its dtype, and so has what is read.
            assert abs(found[s, b, c] - x[s, b, c]) <= step * (0.5 + rounding) * (1 + rounding) + rounding * abs(
                x[s, b, c]
            )


@pytest.mark.parametrize("codec", LOSSY)
def test_groups(codec):
    """A channel of x and K is alike for all tokens, a token of V for all channels: what is alike loses nothing."""
    by_channel = np.random.default_rng(5).normal(size=(300, 2, 3, 65)).astype(np.float32)
    by_token = by_channel.copy()
    by_channel[:] = by_channel[0]
    by_token[:] = by_token[..., :1, :1]
    _, (x,) = written(codec, "activations", "host", [by_channel])
    np.testing.assert_array_equal(x, by_channel)
    _, (key, value) = written(codec, "keys_values", "host", [by_channel, by_token])
    np.testing.assert_array_equal(key, by_channel)
    np.testing.assert_array_equal(value, by_token)
    _, (key, value) = written(codec, "keys_values", "host", [by_token, by_channel])
    assert np.abs(key - by_token).max() > 1e-3 and np.abs(value - by_channel).max() > 1e-3


@pytest.mark.parametrize("codec", LOSSY)
def test_steps_reach_the_largest_number(codec):
    """A step is rounded up to the dtype, or the largest number of a group would have no code of its own."""
    (steps,) = steps_of(codec, "activations")
    x = np.random.default_rng(8).normal(size=(steps.tokens, 3, 65)).astype(jnp.bfloat16)
    _, step, least = (toy.get(array) for array in jax.jit(functools.partial(to_steps, steps=steps))(toy.put(x)))
    assert step.dtype == least.dtype == x.dtype
    reached = least[0].astype(np.float64) + steps.most * step[0].astype(np.float64)
    assert (reached >= x.max(axis=0)).all() and (
        reached <= x.max(axis=0) + 2**-7 * np.ptp(x.astype(float), axis=0)
    ).all()


@pytest.mark.parametrize("form", FORMS)
def test_two_codes_are_in_a_byte_of_int4(form):
    """Of the first and the second half of the channels, the first in the low 4 bits; against NumPy, in float32."""
    shape = shape_of(form, 131, 2, 3, 5)
    tensors = [np.random.default_rng(6).normal(size=shape).astype(np.float32) for _ in steps_of("int4", form)]
    for x, steps in zip(tensors, steps_of("int4", form), strict=True):
        codes, step, least = (toy.get(array) for array in jax.jit(functools.partial(to_steps, steps=steps))(toy.put(x)))
        rows, half = x.reshape(131, 2, 15), 8
        for s, b, c in np.ndindex(131, 2, 15):
            group = group_of(rows, steps, s, b, c)
            byte = int(codes[s, b, c % half])
            own = s // steps.tokens, b, c // steps.channels
            assert least[own] == group.min() and 0 <= 15 * float(step[own]) - float(np.ptp(group)) < 1e-5
            assert abs((byte >> 4 if c >= half else byte & 15) - (rows[s, b, c] - group.min()) / step[own]) <= 0.5001


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_become_so(codec, form, number):
    """Its group is NaN, or infinite; the others stay what they are."""
    shape = shape_of(form, 259, 2, 2, 67)
    clean = [np.random.default_rng(7).normal(size=shape).astype(np.float32) for _ in steps_of(codec, form)]
    _, expected = written(codec, form, "host", clean)
    for place, steps in enumerate(steps_of(codec, form)):
        tensors = [x.copy() for x in clean]
        spoiled = tensors[place].reshape(259, 2, 134)
        spoiled[257, 1, 5] = number
        _, read = written(codec, form, "host", tensors)
        group = np.zeros(spoiled.shape, bool)
        group_of(group, steps, 257, 1, 5)[:] = True
        found, unspoiled = (each[place].reshape(spoiled.shape) for each in (read, expected))
        assert not np.isfinite(found[group]).any()
        np.testing.assert_array_equal(found[~group], unspoiled[~group])


def test_bits_of_a_number():
    """Of long blocks of bfloat16: 4 and 8 bits, and a step and a least number for each group."""
    for codec, form, bits in (
        ("int4", "activations", 4 + 32 / 128),
        ("int8", "activations", 8 + 32 / 256),
        ("int4", "keys_values", 4 + (32 / 128 + 32 / 64) / 2),
        ("int8", "keys_values", 8 + (32 / 256 + 32 / 128) / 2),
    ):
        tensors, batch, channels = len(steps_of(codec, form)), 3, 1024
        assert token_bytes(codec, form, batch, channels, 2)[0] == tensors * batch * channels * bits / 8
        assert codec_bytes(codec, form, 512, batch, channels, 2) == 512 * tensors * batch * channels * bits / 8


@settings(max_examples=100)
@given(
    st.sampled_from(LOSSY),
    st.sampled_from(FORMS),
    *(st.integers(1, most) for most in (700, 5, 200)),
    st.sampled_from([2, 4]),
)
def test_room_is_enough(codec, form, tokens, batch, channels, itemsize):
    """That of a token for each of a block's, and what a block adds."""
    a_token, a_block = token_bytes(codec, form, batch, channels, itemsize)
    assert codec_bytes(codec, form, tokens, batch, channels, itemsize) <= tokens * a_token + a_block + 1e-6


# --- through the decoder ----------------------------------------------------------------------------------------------


def lossy(plan, codec):
    """The plan with all blocks in that codec."""
    layers = [
        dataclasses.replace(
            layer,
            prompt=tuple(dataclasses.replace(block, codec=codec) for block in layer.prompt),
            write_out_codecs=(codec,),
        )
        for layer in plan.layers
    ]
    return dataclasses.replace(plan, layers=tuple(layers), window=10 * plan.window)  # few tokens take more bytes


@functools.partial(jax.jit, static_argnames="codec")
def spoiled(block, codec):
    """The arrays of a plain block with what a codec leaves of its numbers."""
    written, _ = make_block(BlockSpec(block.form, "device", block.tokens, codec), block.tensors, block.start)
    plain = BlockSpec(block.form, block.memory, block.tokens)
    return make_block(plain, written.as_plain().tensors, block.start)[0].arrays


def as_read(block, codec):
    on_device = dataclasses.replace(block, arrays=jax.device_put(block.arrays, memory.sharding("device")))
    left = jax.device_put(spoiled(on_device, codec), memory.sharding(block.memory))
    return dataclasses.replace(block, arrays=left)


@pytest.mark.parametrize("kind", ["opt", "grouped"])
@settings(max_examples=3)
@given(data=st.data())
def test_logits_are_those_of_plain_blocks_with_what_is_left(kind, data):
    """Of any plan, of the prompt and of what is written out; the tail is as it was."""
    model, codec = toy.model(kind), data.draw(st.sampled_from(LOSSY))
    plan = data.draw(toy_plans.plans(model.shape, 2))
    work = plan.workload
    texts = toy.texts(work.batch, work.prompt + work.new)
    found = toy.decoded_logits(kvrecomp.Decoder(model, lossy(plan, codec)), texts)
    decoder = kvrecomp.Decoder(model, plan)
    cache, logits = decoder.prefill(texts.ids[:, : work.prompt], texts.mask[:, : work.prompt])
    expected, read = [toy.get(logits)], [()] * len(plan.layers)
    for slot in range(work.prompt, work.prompt + work.new):
        (cache,) = decoder._before_step([cache])  # what is written out is attended to as it is read
        read = [
            (*old, *(as_read(block, codec) for block in layer[len(old) :])) for old, layer in zip(read, cache.blocks)
        ]
        cache, logits = decoder.step(dataclasses.replace(cache, blocks=tuple(read)), toy.put(texts.ids[:, slot]))
        expected.append(toy.get(logits))
    np.testing.assert_allclose(found, np.stack(expected, axis=1), atol=2e-4)


@pytest.mark.parametrize("codec", LOSSY)
def test_drafts_leave_the_text_as_it_is(codec):
    """Over blocks with loss, whose sketch has more of it; nothing is written out."""
    plan = lossy(toy_drafts.make_plan("activations"), codec)
    plan = dataclasses.replace(plan, tail=plan.workload.new)
    expected = toy_drafts.run(plan)
    drafted = dataclasses.replace(plan, drafting=Drafting("sketch", 3, codec="fp8"))
    found = toy_drafts.run(drafted, Sketch())
    np.testing.assert_array_equal(found.sequences, expected.sequences)
    assert not plan.lossless and (found.passes < plan.workload.new - 1).all()
