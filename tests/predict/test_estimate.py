"""Seconds of compute from a machine's rates, for layers that were not timed: by hand."""

from dataclasses import replace

import pytest

from kvrecomp.plan import GIB, LayerShape
from kvrecomp.predict.estimate import estimate
from kvrecomp.predict.hardware import ATTENTION, HardwareProfile, Line, attention_work

MACHINE = HardwareProfile("none", GIB, Line(0.0, 1e-10), beside_compute=9e9, matmul_rate=1e14, memory_rate=1e12)
kv = "keys_values"


def base(times, work):
    return times.work[work](0)


def slope(times, work):
    return times.work[work](1) - times.work[work](0)


def test_an_estimate_by_hand():
    """Llama-2-7B's layer in bfloat16, batch 2, at 1e14 operations and 1e12 bytes a second, 1e-6 s a kernel.

    Weights, read once, take longer than their operations: 2 bytes at 1e12 a second against 2 * 2 operations at 1e14.
    """
    layer = LayerShape(4096, 32, 32, 128, 11008, gated=True, absorbs_keys=False)
    times = estimate(replace(MACHINE, kernel_seconds=1e-6), layer, 2, 2)
    for work, kernels, matrices in (("project", 3, 3), ("project_recompute", 3, 3), ("project_absorb", 2, 2)):
        expected = 2 * matrices * 4096**2 / 1e12 + kernels * 1e-6  # Q, K, V; absorbed: Q, and K, as it is rotated
        assert slope(times, work) == 0 and base(times, work) == pytest.approx(expected, rel=1e-6, abs=0)
    others = 2 * (4096**2 + 3 * 4096 * 11008) / 1e12 + 5e-6
    assert slope(times, "finish") == 0 and base(times, "finish") == pytest.approx(others, rel=1e-6, abs=0)
    # Keys and values: both are read, 2 * 4096 numbers of each of 2 rows, and scores of 32 heads three times, float32.
    scores = 2 * 32 * 4 * 3 / 1e12
    pairs = 2 * 2 * 4096 * 2 / 1e12 + scores
    assert slope(times, kv) == pytest.approx(pairs, rel=1e-6, abs=0)
    assert base(times, kv) == pytest.approx(4e-6, rel=1e-6, abs=0)
    # Recomputed: two projections of 2 * 4096^2 operations for each of 2 rows, and then attention as over pairs.
    project = 2 * 2 * 4096**2 / 1e14
    assert project > 2 * (4096 + 4096) * 2 / 1e12
    assert slope(times, "recompute") == pytest.approx(2 * project + pairs, rel=1e-6, abs=0)
    # Absorbed, but for the rotated keys: one projection, the keys, and a mix of activations.
    assert slope(times, "absorb") == pytest.approx(project + pairs, rel=1e-6, abs=0)
    assert base(times, "prepare") == pytest.approx(2 * 4096**2 / 1e12 + 1e-6, rel=1e-6, abs=0)  # V's projection, once
    for kind in ATTENTION:
        assert times.work[attention_work(kind, "device")] == times.work[kind]


def test_absorbing_keys_spares_their_projection():
    layer = LayerShape(4096, 32, 32, 128, 16384)
    free, rotated = (estimate(MACHINE, replace(layer, absorbs_keys=absorbs), 2, 2) for absorbs in (True, False))
    assert slope(free, "absorb") < 0.2 * slope(rotated, "absorb") < 0.2 * slope(rotated, "recompute")
    assert all(free.work[work] == rotated.work[work] for work in (kv, "recompute", "project", "finish"))


def test_scores_are_float32_whatever_the_dtype():
    """Between two dtypes only the bytes of weights and of cached numbers differ, not those of scores."""
    heads = LayerShape(64, 64, 1, 1, 64)  # many scores, few numbers
    half, full = (slope(estimate(MACHINE, heads, itemsize, 1), kv) for itemsize in (2, 4))
    assert full - half == pytest.approx(2 * 2 / 1e12, rel=1e-6, abs=0)  # one number of K, one of V
