"""Timing programs, and lines through what they took."""

import functools
import logging

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrecomp.measure import timing
from kvrecomp.measure.timing import fit_line, measured_line


def test_a_program_is_timed_with_the_host_ahead(monkeypatch):
    """One that takes the host 2 s and the device 3 s, behind the 4 s that the device is kept busy: the clock is that of
    a simulated machine."""
    machine = Simulated()
    monkeypatch.setattr(timing, "time", machine)
    monkeypatch.setattr(jax, "block_until_ready", machine.wait)
    ahead = object.__new__(timing.HostAhead)
    ahead._busy_seconds, ahead._busy = 4.0, lambda: machine.dispatch(0.0, 4.0)
    assert ahead.median_seconds(lambda: machine.dispatch(2.0, 3.0), 3) == 3.0
    assert timing.median_seconds(lambda: machine.dispatch(2.0, 3.0), 3) == 5.0


class Simulated:
    """A host that dispatches to a device, which executes one thing after the other."""

    def __init__(self):
        self.now = self.free = 0.0

    def perf_counter(self):
        return self.now

    def dispatch(self, host, device):
        self.now += host
        self.free = max(self.free, self.now) + device
        return self.free

    def wait(self, end):
        self.now = max(self.now, end)


def test_the_device_is_kept_busy(monkeypatch):
    """For one addition, as 1 ns is asked for: what takes no time is found to take none, or little."""
    monkeypatch.setattr(timing, "BUSY_BYTES", 2**20)
    ahead = timing.HostAhead(1e-9)
    assert ahead._busy_seconds > 0
    assert 0 <= ahead.median_seconds(lambda: np.zeros(3), 2) < 1


@given(
    base=st.floats(0, 1e-3),
    each=st.floats(0, 1e-6),
    sizes=st.lists(st.integers(1, 10**6), min_size=3, max_size=5, unique=True),
)
def test_a_line_is_found_again(base, each, sizes):
    seconds = [1e-6 + base + each * size for size in sizes]
    line = fit_line(sizes, seconds)
    assert np.allclose([line(size) for size in sizes], seconds, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("seconds", [(3.0, 2.0, 1.0), (1.0, 4.0, 9.0), (-3.0, -2.0, -1.0)])
def test_no_part_of_a_line_is_negative(seconds):
    line = fit_line((1, 2, 3), seconds)
    assert line.base >= 0 and line.each >= 0


@pytest.mark.parametrize(("slow_few", "slow_many"), [((9, 1, 9), (1, 5, 5)), ((1, 9, 1), (9, 9, 1))])
def test_what_slows_a_program_for_a_while_is_not_in_a_slope(monkeypatch, slow_few, slow_many):
    """Programs of 3 and 8 s, each of them fast in one round of three: neither a median of rounds nor the best of their
    differences, -19 to 69 s, is 5 s."""
    slow = {few: iter(slow_few), many: iter(slow_many)}
    monkeypatch.setattr(timing, "median_seconds", lambda run, repeats: run() * next(slow[run]))
    assert timing.seconds_longer(few, many) == 5


def few():
    return 3.0


def many():
    return 8.0


def test_noise_is_not_less_than_nothing(monkeypatch):
    monkeypatch.setattr(timing, "median_seconds", lambda run, repeats: run())
    assert timing.seconds_longer(many, few) == timing.LEAST_SLOPE * 3


def test_a_poor_fit_is_measured_again_and_said(caplog):
    """What was slow at one of the two times does not count."""

    def line(*of_sizes):
        caplog.clear()
        timers = [functools.partial(lambda left, repeats: left.pop(0), list(own)) for own in of_sizes]
        with caplog.at_level(logging.INFO, logger="kvrecomp"):
            found = measured_line("copies", (1, 2, 3), timers)
        return found(0), found(10)

    assert line([1.0], [2.0], [3.0]) == pytest.approx((0.0, 10.0)) and not caplog.text
    assert line([1.0, 9.0], [5.0, 2.0], [3.0, 3.0]) == pytest.approx((0.0, 10.0))
    assert "at 2; measuring it again" in caplog.text and "predictions" not in caplog.text
    line([1.0, 1.0], [5.0, 5.0], [1.0, 1.0])
    assert "at 2; measuring it again" in caplog.text and "predictions may be as far off" in caplog.text
