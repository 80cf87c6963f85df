"""Measuring the machine: what is measured is plausible, and each program's seconds are in the field they are of."""

import pytest

from kvrecomp.measure import machine, timing
from kvrecomp.measure.machine import measure_machine, this_machine


def test_a_machine_is_measured(monkeypatch):
    median = timing.median_seconds
    for module in (machine, timing):
        monkeypatch.setattr(module, "median_seconds", lambda run, repeats: median(run, 1))
    measured = measure_machine()
    assert {name: getattr(measured, name) for name in this_machine()} == this_machine()
    assert 1e8 < measured.matmul_rate < 1e16 and 1e8 < measured.memory_rate < 1e14
    assert 0 < measured.to_device(2**20) < 1 and 0 <= measured.kernel_seconds < 1e-2


def test_a_profile_is_made_of_what_was_timed(monkeypatch):
    """Each program's seconds are in the field that they are of, by the sizes that it is given."""

    def copies(size):
        return lambda repeats, timed: 3e-6 + size / 5e9

    def held(block_bytes, blocks, computing, room):
        waiting = 3e-6 + block_bytes / 4e9 + 2e-6 + 2 * 7e-6  # copy, kernel and two handoffs
        return lambda repeats: waiting if room == 1 else block_bytes / 4e9

    made = {
        "_to_device_timer": copies,
        "_copy_timer": held,
        "_product_timer": lambda size, dtype: lambda repeats: 2 * size**3 / 9e12,
        "_memory_timer": lambda size: lambda repeats: 1 / 7e11,
        "_kernel_timer": lambda dtype: lambda repeats: 2e-6,
    }
    for name, timer in made.items():
        monkeypatch.setattr(machine, name, timer)
    found = measure_machine()
    assert (found.to_device.base, 1 / found.to_device.each) == pytest.approx((3e-6, 5e9))
    assert (found.beside_compute, found.matmul_rate, found.memory_rate) == pytest.approx((4e9, 9e12, 7e11))
    assert (found.handoff_seconds, found.kernel_seconds) == pytest.approx((7e-6, 2e-6))


def test_a_handoff_is_found_again(monkeypatch):
    """Of copies of 2 MiB at 5 GB/s that wait for each other, a kernel of 3 us and two handoffs of 7 us between them."""
    nbytes = machine.HANDOFF_BYTES

    def program(block_bytes, blocks, passes, computing, room):
        assert (block_bytes, room) == (nbytes, 1)
        return lambda arrays: 1e-3 + passes * blocks * (sum(array.nbytes for array in arrays) / blocks / 5e9 + 17e-6)

    monkeypatch.setattr(machine, "_held_copies", program)
    monkeypatch.setattr(timing, "median_seconds", lambda run, repeats: run())
    waiting = machine._copy_timer(nbytes, 4, False, 1)(9)
    assert machine._handoff_seconds(waiting, nbytes / 5e9, 3e-6) == pytest.approx(7e-6)
    assert machine._handoff_seconds(waiting, nbytes / 1e9, 3e-6) == 0  # noise: it is less than the copy alone
