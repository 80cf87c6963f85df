"""Compiled programs by name: each compiled once, now or in the background."""

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple


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
        self._background = ThreadPoolExecutor(1, thread_name_prefix="compile")

    def __contains__(self, name: Hashable) -> bool:
        """Whether compiling it was begun."""
        return name in self._futures

    def start(self, name: Hashable, trace: Callable[[], Any]) -> None:
        """Compiles in the background, unless that was begun before."""
        with self._lock:
            if name not in self._futures:
                self._futures[name] = self._background.submit(self._compile, name, trace)

    def get(self, name: Hashable, trace: Callable[[], Any]) -> Any:
        """The compiled program; compiles it now, or waits for it, if it is not there yet."""
        self.start(name, trace)
        return self._futures[name].result()

    def _compile(self, name: Hashable, trace: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        program = trace().lower().compile()
        analysis = program.memory_analysis()
        self.compiled[name] = Compiled(time.perf_counter() - start, getattr(analysis, "temp_size_in_bytes", 0))
        return program
