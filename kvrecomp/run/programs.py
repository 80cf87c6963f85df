"""Compiled programs by name: each compiled once, now or in the background, and kept for those who need the same.

XLA chooses kernels by timing them. While it times one, no other program's kernels are timed or launched, so programs
are compiled side by side; but what was launched before may still be running, so those that are to be fast are compiled
before anything runs.
"""

import collections
import contextlib
import hashlib
import os
import threading
import time
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax

from kvrecomp.plan import PlanError
from kvrecomp.run.schedule import compile_overlapping

Item = TypeVar("Item")
Result = TypeVar("Result")

NO_OPTIONS: Mapping[str, Any] = types.MappingProxyType({})
UNCOMPILED = "jax_disable_jit"  # a switch of jax's
MOST_SIDE_BY_SIDE = 8  # tracing and lowering need the interpreter, some 15 % of the time that a program takes
# More would keep the interpreter from the steps. On an H200's machine tracing makes single steps of 165 ms up to 250
# longer; up to 50, with shorter turns and no garbage collection meanwhile, but these settings are the user's.
_BACKGROUND = ThreadPoolExecutor(1, thread_name_prefix="compile")


@contextlib.contextmanager
def as_by_default() -> Iterator[None]:
    """A context in which jax traces as it does by default: switches of a user's that forbid what is implicit, or draw
    other random numbers, are for the user's own code. It holds for one thread. Raises `PlanError` where jax was told to
    compile nothing."""
    if getattr(jax.config, UNCOMPILED):
        raise PlanError(f"{UNCOMPILED} is on, and what decodes are compiled programs: turn it off")
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


class KeptPrograms:
    """Compiled programs for later decoders, of so many sets of programs: of the plans used last.

    A program is found again by its name and by what XLA was given, its text, which has whatever of a model is in a
    program; weights are its arguments. So a model that was changed has other programs, and one that was trained the
    same; nothing of either is kept.
    """

    def __init__(self, sets: int):
        self._sets = sets
        self._kept: collections.OrderedDict[Hashable, dict[bytes, Any]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def of(self, name: Hashable) -> dict[bytes, Any]:
        """The set of that name, by the texts' hashes; what is put into it is kept. One has programs that take and give
        the same trees of arrays."""
        with self._lock:
            found = self._kept.setdefault(name, {})
            self._kept.move_to_end(name)
            while len(self._kept) > self._sets:
                self._kept.popitem(last=False)
            return found


class Compiled(NamedTuple):
    """What making a program took, tracing included, and the device memory it needs beside its arguments."""

    seconds: float
    temp_bytes: int


class Programs:
    """A table of ahead-of-time compiled programs; `compiled` has an entry for each that is ready. Programs that `kept`,
    a set of `KeptPrograms`, has are traced, but not compiled again.

    `trace` functions return what `jax.jit(f).trace(...)` does. Who compiles a program holds its lock meanwhile, which
    is let go whatever ends that, Ctrl-C too; who waits for it then compiles it in turn.
    """

    def __init__(self, kept: dict[bytes, Any] | None = None):
        self.compiled: dict[Hashable, Compiled] = {}
        self._kept = kept
        self._made: dict[Hashable, Any] = {}
        self._locks: collections.defaultdict[Hashable, threading.Lock] = collections.defaultdict(threading.Lock)
        self._begun: dict[Hashable, Future] = {}

    def start(self, name: Hashable, trace: Callable[[], Any], options: Mapping[str, Any] = NO_OPTIONS) -> None:
        """Compiles in the background, with these options of XLA's, unless that was begun before or is done."""
        begun = self._begun.get(name)
        failed = begun is not None and begun.done() and (begun.cancelled() or begun.exception() is not None)
        if name not in self._made and (begun is None or failed):
            self._begun[name] = _BACKGROUND.submit(self.get, name, trace, options)

    def has(self, name: Hashable) -> bool:
        """Whether the program is compiled."""
        return name in self._made

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
                    program = self._compile(name, trace().lower(), options)
                temp_bytes = getattr(program.memory_analysis(), "temp_size_in_bytes", 0)
                self.compiled[name] = Compiled(time.perf_counter() - start, temp_bytes)
                self._made[name] = program
            return self._made[name]

    def _compile(self, name: Hashable, lowered: Any, options: Mapping[str, Any]) -> Any:
        if self._kept is None:
            return compile_overlapping(lowered, options)
        # Arguments that are not used are in no text, and programs that differ in these alone, of blocks out of sight,
        # are not called alike.
        given = name, lowered.as_text(), sorted(options.items()), sorted(jax.config.values.items())
        text = hashlib.sha256(repr(given).encode()).digest()
        if text not in self._kept:
            self._kept[text] = compile_overlapping(lowered, options)
        return self._kept[text]
