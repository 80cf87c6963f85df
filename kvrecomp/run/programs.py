"""Compiled programs by name: each compiled once, now or in the background.

XLA chooses kernels by timing them. While it times one, no other program's kernels are timed or launched, so programs
are compiled side by side; but what was launched before may still be running, so those that are to be fast are compiled
before anything runs.
"""

import collections
import contextlib
import gc
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax

Item = TypeVar("Item")
Result = TypeVar("Result")

NO_OPTIONS: Mapping[str, Any] = types.MappingProxyType({})
MOST_SIDE_BY_SIDE = 8  # tracing and lowering need the interpreter, some 15 % of the time that a program takes
TURN_SECONDS = 0.0005  # Python's own is ten times as long
_BACKGROUND = ThreadPoolExecutor(1, thread_name_prefix="compile")  # more would keep the interpreter from the steps


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """A context for the background in which threads that wait for the interpreter get it sooner.

    A step dispatched beside tracing asks for the interpreter many times. Tracing makes so many objects that Python goes
    through all there are, and every other thread stands still meanwhile; that is left for later.
    """
    interval, collecting = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(TURN_SECONDS)
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if collecting:
            gc.enable()


@contextlib.contextmanager
def as_by_default() -> Iterator[None]:
    """A context in which jax traces as it does by default: switches of a user's that forbid what is implicit, or draw
    other random numbers, are for the user's own code. It holds for one thread."""
    with contextlib.ExitStack() as switches:
        switches.enter_context(jax.numpy_rank_promotion("allow"))
        switches.enter_context(jax.numpy_dtype_promotion("standard"))
        switches.enter_context(jax.threefry_partitionable(True))
        yield


def side_by_side(make: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`make` of each item, which compiles, in as many threads as the machine has processors for."""

    def make_one(item: Item) -> Result:
        with as_by_default():
            return make(item)

    with ThreadPoolExecutor(min(MOST_SIDE_BY_SIDE, os.cpu_count() or 1)) as pool:
        return list(pool.map(make_one, items))


class Compiled(NamedTuple):
    """What compiling a program took, tracing included, and the device memory it needs beside its arguments."""

    seconds: float
    temp_bytes: int


class Programs:
    """A table of ahead-of-time compiled programs; `compiled` has an entry for each that is ready.

    `trace` functions return what `jax.jit(f).trace(...)` does. Who compiles a program holds its lock meanwhile, which
    is let go whatever ends that, Ctrl-C too; who waits for it then compiles it in turn.
    """

    def __init__(self):
        self.compiled: dict[Hashable, Compiled] = {}
        self._made: dict[Hashable, Any] = {}
        self._locks: collections.defaultdict[Hashable, threading.Lock] = collections.defaultdict(threading.Lock)
        self._begun: dict[Hashable, Future] = {}

    def start(self, name: Hashable, trace: Callable[[], Any], options: Mapping[str, Any] = NO_OPTIONS) -> None:
        """Compiles in the background, with these options of XLA's, unless that was begun before or is done."""
        begun = self._begun.get(name)
        failed = begun is not None and begun.done() and (begun.cancelled() or begun.exception() is not None)
        if name not in self._made and (begun is None or failed):
            self._begun[name] = _BACKGROUND.submit(self._get_beside_steps, name, trace, options)

    def cancel(self) -> None:
        """Gives up the programs whose compilation was asked for and has not begun."""
        for begun in list(self._begun.values()):
            begun.cancel()

    def get(self, name: Hashable, trace: Callable[[], Any], options: Mapping[str, Any] = NO_OPTIONS) -> Any:
        """The compiled program; compiles it now, in this thread, or waits for who compiles it already.

        What still waits for others in the background is compiled here, so nobody waits for what `cancel` gives up. What
        failed is tried again: memory may be free by then.
        """
        with self._locks[name]:
            if name not in self._made:
                start = time.perf_counter()
                with as_by_default():
                    program = trace().lower().compile(compiler_options=dict(options))
                temp_bytes = getattr(program.memory_analysis(), "temp_size_in_bytes", 0)
                self.compiled[name] = Compiled(time.perf_counter() - start, temp_bytes)
                self._made[name] = program
            return self._made[name]

    def _get_beside_steps(self, name: Hashable, trace: Callable[[], Any], options: Mapping[str, Any]) -> None:
        with _short_turns():
            self.get(name, trace, options)
