"""Running an iterator in a thread of its own, a bounded number of items ahead of who reads it."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class BackgroundIterator(Generic[Item]):
    """Iterates over `items` in a thread; `with` ends the thread, however many items are left.

    The next item is made once fewer than `lead` are unread. What `items` raises is raised to the reader.
    """

    def __init__(self, items: Iterator[Item], lead: int):
        self._items = items
        self._made: queue.SimpleQueue[tuple[Item] | BaseException | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(lead)
        self._stopped = False
        self._thread = threading.Thread(target=self._make, name="dispatch", daemon=True)

    def __enter__(self) -> Iterator[Item]:
        self._thread.start()
        return self._read()

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._room.release()
        self._thread.join()

    def _make(self) -> None:
        try:
            while self._room.acquire() and not self._stopped:
                try:
                    item = next(self._items)
                except StopIteration:
                    self._made.put(None)
                    return
                self._made.put((item,))
        except BaseException as error:
            self._made.put(error)

    def _read(self) -> Iterator[Item]:
        while (made := self._made.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            yield made[0]
            self._room.release()
