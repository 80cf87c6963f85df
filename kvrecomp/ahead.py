"""Running an iterator in a thread of its own, a bounded number of items ahead of who reads it."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Paced(Protocol):
    """An item that says how many items may be made before it is read."""

    @property
    def lead(self) -> int: ...


Item = TypeVar("Item", bound=Paced)


class Ahead(Generic[Item]):
    """Iterates over `items` in a thread; `with` ends the thread, however many items are left.

    After an item with `lead` n, the next is made once fewer than n items are unread. What `items` raises is raised to
    the reader.
    """

    def __init__(self, items: Iterator[Item]):
        self._items = items
        self._made: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()
        self._unread = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._make, name="dispatch", daemon=True)

    def __enter__(self) -> Iterator[Item]:
        self._thread.start()
        return self._read()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _make(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._unread += 1
                self._made.put(item)
                with self._changed:
                    self._changed.wait_for(lambda lead=item.lead: self._stopped or self._unread < lead)
                    if self._stopped:
                        return
            self._made.put(None)
        except BaseException as error:
            self._made.put(error)

    def _read(self) -> Iterator[Item]:
        while (item := self._made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            with self._changed:
                self._unread -= 1
                self._changed.notify()
