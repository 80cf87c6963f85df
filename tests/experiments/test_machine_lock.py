"""Whoever measures is alone on the machine; those that prepare do not wait for each other."""

import contextlib
import fcntl

import pytest

from experiments.support.suite import machine_lock


def would_wait(kind: int) -> bool:
    """Whether another process would, which has opened the file for itself as this does."""
    with machine_lock.lock_path().open("w") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize(
    ("turn", "preparing_waits", "measuring_waits"),
    [(machine_lock.exclusive, True, True), (machine_lock.shared, False, True), (contextlib.nullcontext, False, False)],
)
def test_who_waits(turn, preparing_waits, measuring_waits):
    with turn():
        assert would_wait(fcntl.LOCK_SH) == preparing_waits
        assert would_wait(fcntl.LOCK_EX) == measuring_waits


def test_a_turn_ends_with_an_error():
    with pytest.raises(RuntimeError), machine_lock.exclusive():
        raise RuntimeError("out of memory")
    assert not would_wait(fcntl.LOCK_EX)
