"""Compiled programs by name: each compiled once, now or in the background.

XLA chooses kernels by timing them. While it times one, no other program's kernels are timed or launched, so programs
are compiled side by side; but what was launched before may still be running, so those that are to be fast are compiled
before anything runs.
"""

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

from kvrecomp.run.schedule import compile_overlapping

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


def side_by_side(make: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`make` of each item, which compiles, in as many threads as the machine has processors for."""
    with ThreadPoolExecutor(min(MOST_SIDE_BY_SIDE, os.cpu_count() or 1)) as pool:
        return list(pool.map(make, items))


class Compiled(NamedTuple):
    """What compiling a program took, tracing included, and the device memory it needs beside its arguments."""

    seconds: float
    temp_bytes: int


class Programs:
    """A table of ahead-of-time compiled programs; `compiled` has an entry for each that is ready.

    `trace` functions return what `jax.jit(f).trace(...)` does.
    """

    def __init__(self):
        self.compiled: dict[Hashable, Compiled] = {}
        self._futures: dict[Hashable, Future] = {}
        self._lock = threading.Lock()

    def start(self, name: Hashable, trace: Callable[[], Any], options: Mapping[str, Any] = NO_OPTIONS) -> None:
        """Compiles in the background, with these options of XLA's, unless that was begun before."""
        with self._lock:
            if not self._is_begun(name):
                self._futures[name] = _BACKGROUND.submit(self._compile_beside_steps, name, trace, options)

    def cancel(self) -> None:
        """Gives up the programs whose compilation was asked for and has not begun."""
        with self._lock:
            self._futures = {name: future for name, future in self._futures.items() if not future.cancel()}

    def get(self, name: Hashable, trace: Callable[[], Any], options: Mapping[str, Any] = NO_OPTIONS) -> Any:
        """The compiled program; compiles it now, in this thread, or waits for it, where that was begun.

        What still waits for others in the background is compiled here, so nobody waits for what `cancel` gives up.
        """
        with self._lock:
            mine = not self._is_begun(name) or self._futures[name].cancel()
            if mine:
                self._futures[name] = Future()
                self._futures[name].set_running_or_notify_cancel()
            future = self._futures[name]
        if mine:
            try:
                future.set_result(self._compile(name, trace, options))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _is_begun(self, name: Hashable) -> bool:
        """Whether the program is made or is being made. What failed is tried again: memory may be free by then."""
        future = self._futures.get(name)
        return future is not None and not (future.done() and future.exception() is not None)

    def _compile_beside_steps(self, name: Hashable, trace: Callable[[], Any], options: Mapping[str, Any]) -> Any:
        with _short_turns():
            return self._compile(name, trace, options)

    def _compile(self, name: Hashable, trace: Callable[[], Any], options: Mapping[str, Any]) -> Any:
        start = time.perf_counter()
        program = compile_overlapping(trace().lower(), options)
        analysis = program.memory_analysis()
        self.compiled[name] = Compiled(time.perf_counter() - start, getattr(analysis, "temp_size_in_bytes", 0))
        return program
