"""jax's own switches: a user's setting of any of them leaves texts as they are, or is refused in one line."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

import kvrecomp
from kvrecomp.plan import PlanError

GIVEN = toy.texts(3, 5, longest_padding=2)


@contextlib.contextmanager
def switched(name, value):
    """The switch for all threads, and nothing traced before that would be used again."""
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update(name, before)
        jax.clear_caches()


def sampled():
    """Of a model with all that attention offers, made anew."""
    model = toy.randomised(toy.Grouped(), seed=1)
    plan = kvrecomp.named_plan("split:0.5", model.shape, kvrecomp.Workload(3, 5, 4), tail=2)
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 4, "eos_token_id": [3, 5]}
    return kvrecomp.generate(model, GIVEN.ids, GIVEN.mask, plan=plan, row_ids=[4, 2, 9], **options).sequences


@pytest.fixture(scope="module")
def expected():
    return sampled()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_enable_x64", True),
        ("jax_debug_nans", True),
        ("jax_default_matmul_precision", "highest"),
        ("jax_default_prng_impl", "rbg"),
        ("jax_threefry_partitionable", False),
        ("jax_debug_key_reuse", True),
        ("jax_check_tracer_leaks", True),
        ("jax_default_device", "cpu"),
    ],
)
def test_texts_are_the_same(expected, name, value):
    with switched(name, value):
        np.testing.assert_array_equal(sampled(), expected)


def test_without_compiling_there_is_no_decoding():
    for plan in ("device", "auto"):
        with switched("jax_disable_jit", True), pytest.raises(PlanError, match=r"jax_disable_jit is on.*turn it off"):
            kvrecomp.generate(toy.model(), GIVEN.ids, max_new_tokens=2, plan=plan)
    with switched("jax_disable_jit", True), pytest.raises(PlanError, match=r"jax_disable_jit is on.*turn it off"):
        kvrecomp.profile(refresh=True)


@pytest.mark.parametrize("platform", ["cuda", "gpu", "foo"])
def test_a_platform_without_a_device_is_told_in_one_line(platform):
    """By the library, from what asks for a device first; plans for other machines need none of it."""
    if platform != "foo" and jax.default_backend() == "gpu":
        pytest.skip("there is one")
    code = """
import jax
import kvrecomp
shape = kvrecomp.ModelShape("one", (kvrecomp.LayerShape(8, 2, 2, 4, 8),), vocab=7, embedding=8, positions=99)
for use in (
    kvrecomp.profile,
    lambda: kvrecomp.plan_for("auto", shape, kvrecomp.Workload(1, 2, 3)),
    lambda: kvrecomp.placement(kvrecomp.named_plan("device", shape, kvrecomp.Workload(1, 2, 3)))("tokens", (7, 8)),
):
    try:
        use()
    except OSError as error:
        print(error)
jax.config.update("jax_platforms", "cpu")
print(kvrecomp.make_plan(shape, kvrecomp.Workload(1, 2, 3), kvrecomp.HardwareProfile.from_datasheet("h100")).name)
"""
    paths = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": platform, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    *told, name = run.stdout.splitlines()
    assert len(told) == 3 and name.startswith("auto"), run.stderr
    for line in told:
        assert line.startswith(f"jax has no device where JAX_PLATFORMS is {platform!r}") and "set it to cpu" in line


def test_texts_are_the_same_on_the_first_of_two_devices():
    """That a CPU pretends to be, in a process of its own; also where another is jax's default, or a mesh is set."""
    code = """
import jax, numpy as np, kvrecomp, toy
given, model = toy.texts(3, 5), toy.model()
def text():
    result = kvrecomp.generate(model, given.ids, max_new_tokens=3, plan="split:0.5", do_sample=True)
    return result.sequences.tolist()
print(len(jax.devices()), text())
with jax.set_mesh(jax.make_mesh((2,), ("rows",))):
    print(2, text())
jax.config.update("jax_default_device", jax.devices()[1])
print(2, text())
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    result = kvrecomp.generate(
        toy.model(), toy.texts(3, 5).ids, max_new_tokens=3, plan="split:0.5", do_sample=True
    ).sequences
    assert run.stdout.splitlines() == [f"2 {result.tolist()}"] * 3
