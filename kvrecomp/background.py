"""Running a generator in a thread of its own, a bounded number of items ahead of who reads it."""

import _thread
import contextlib
import queue
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

LOOK_SECONDS = 0.1  # how often a thread that has no room looks whether anybody still reads


class BackgroundIterator(Generic[Item]):
    """Iterates over `items` in a thread, which ends with the context that reads, however many items are left:

        with background.reading, background as items:
            for item in items: ...

    The next item is made once fewer than `lead` are unread. What `items` raises is raised to the reader.

    Ctrl-C may come wherever a function is called, in the midst of leaving the context too. What Python has built in is
    called in one piece: entering and leaving a lock, starting a thread, what a SimpleQueue is asked for. What
    `threading` has in Python is not, and can be left half done. So the thread is one without a `Thread`, starts within
    the context, and ends by itself when `reading` is let go.
    """

    def __init__(self, items: Generator[Item, None, None], lead: int):
        self.reading = _thread.allocate_lock()
        self._items = items
        self._made: queue.SimpleQueue[tuple[Item] | BaseException | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(lead):
            self._room.put(None)
        self._stopped = self._runs = False
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __enter__(self) -> Iterator[Item]:
        return self._read()

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._room.put(None)
        if self._runs:
            self._ended.get()

    def _make(self) -> None:
        self._runs = True
        try:
            with contextlib.closing(self._items):  # with all that it holds, whoever still has this object
                while self._is_wanted():
                    try:
                        item = next(self._items)
                    except StopIteration:
                        self._made.put(None)
                        return
                    self._made.put((item,))
        except BaseException as error:
            self._made.put(error)
        finally:
            self._ended.put(None)

    def _is_wanted(self) -> bool:
        """Waits for room for one more item; whether anybody reads it."""
        while self.reading.locked() and not self._stopped:
            with contextlib.suppress(queue.Empty):
                self._room.get(timeout=LOOK_SECONDS)
                return self.reading.locked() and not self._stopped
        return False

    def _read(self) -> Iterator[Item]:
        _thread.start_new_thread(self._make, ())
        while (made := self._made.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            yield made[0]
            self._room.put(None)
