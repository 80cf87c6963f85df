"""Compiled programs by name: each compiled once, now or in the background."""

import contextlib
import gc
import sys
import threading
import time
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

NO_OPTIONS: Mapping[str, str] = types.MappingProxyType({})
TURN_SECONDS = 0.0005  # Python's own is ten times as long
_WORKER = ThreadPoolExecutor(1, thread_name_prefix="compile")  # XLA times kernels: one program at a time


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """A context for the worker in which threads that wait for the interpreter get it sooner.

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

    def start(self, name: Hashable, trace: Callable[[], Any], options: Mapping[str, str] = NO_OPTIONS) -> None:
        """Compiles in the background, with these options of XLA's, unless that was begun before."""
        with self._lock:
            if name not in self._futures:
                self._futures[name] = _WORKER.submit(self._compile, name, trace, options)

    def cancel(self) -> None:
        """Gives up the programs whose compilation was asked for and has not begun."""
        with self._lock:
            self._futures = {name: future for name, future in self._futures.items() if not future.cancel()}

    def get(self, name: Hashable, trace: Callable[[], Any], options: Mapping[str, str] = NO_OPTIONS) -> Any:
        """The compiled program; compiles it now, or waits for it, if it is not there yet."""
        self.start(name, trace, options)
        return self._futures[name].result()

    def _compile(self, name: Hashable, trace: Callable[[], Any], options: Mapping[str, str]) -> Any:
        start = time.perf_counter()
        with _short_turns():
            program = trace().lower().compile(compiler_options=dict(options))
        analysis = program.memory_analysis()
        self.compiled[name] = Compiled(time.perf_counter() - start, getattr(analysis, "temp_size_in_bytes", 0))
        return program
