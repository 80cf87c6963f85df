"""Which copy from the host may start when: the rule that the runtime carries out and that the cost function predicts.

Plain numbers, as in `kvrecomp.plan`.
"""

import collections
import math
from collections.abc import Sequence
from typing import NamedTuple

from kvrecomp.plan import Schedule

COPIES_AHEAD = 2  # copies on their way at once, which is as many as XLA keeps; see window.Window


class Copy(NamedTuple):
    """Bytes that a step copies from the host: a block, or weights, which are `kept` until their layer is done."""

    nbytes: int
    kept: bool = False


def events_before(layers: Sequence[Sequence[Copy]], window: float, schedule: Schedule) -> list[int]:
    """For each copy, layer by layer in the order of use, how many events come before it may start.

    The events are, layer by layer: a copy has arrived; it has been used, unless it is kept; and, after those of all its
    copies, the layer is done, and what it kept no longer in use. In a pipeline at most COPIES_AHEAD copies are on their
    way, and at most `window` bytes on their way or in use. Layer by layer one copy is on its way, and a layer's first
    waits for the layer before.
    """
    pipelined = schedule == "pipelined"
    ahead, most = (COPIES_AHEAD, window) if pipelined else (1, math.inf)
    before: list[int] = []
    to_come: collections.deque[tuple[int, int]] = collections.deque()  # of each event: arrivals, bytes no longer in use
    on_the_way = in_use = events = 0
    for own in layers:
        for number, copy in enumerate(own):
            while (
                on_the_way == ahead
                or (in_use and in_use + copy.nbytes > most)
                or (to_come and number == 0 and not pipelined)
            ):
                arrived, freed = to_come.popleft()
                on_the_way, in_use, events = on_the_way - arrived, in_use - freed, events + 1
            before.append(events)
            on_the_way, in_use = on_the_way + 1, in_use + copy.nbytes
            to_come += [(1, 0)] if copy.kept else [(1, 0), (0, copy.nbytes)]
        to_come.append((0, sum(copy.nbytes for copy in own if copy.kept)))
    return before


def in_flight_bytes(window: int, largest: int, kept: int) -> int:
    """Most bytes on their way or in use at once in a pipeline: of copies of at most `largest` bytes those ahead and one
    in use, and what a layer keeps, `kept`, as far as the window allows."""
    return min(window, (COPIES_AHEAD + 1) * largest + kept)
