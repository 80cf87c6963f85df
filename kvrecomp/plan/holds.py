"""Which copy from the host may start when: the rule that the runtime carries out and that the cost function predicts.

Plain numbers, as in `kvrecomp.plan`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from kvrecomp.plan.layout import Schedule

COPIES_IN_FLIGHT = 2  # copies on their way at once, which is as many as XLA keeps; see window.Window


class Copy(NamedTuple):
    """Bytes that a step copies from the host: a block, or weights, which are `kept` until their layer is done."""

    nbytes: int
    kept: bool = False


def events_before(copies: ArrayLike, counts: ArrayLike, window: float, schedule: Schedule) -> np.ndarray:
    """For each copy, layer by layer in the order of use, how many events come before it may start: int[copies].

    The events are, layer by layer: a copy has arrived; it has been used, unless it is kept; and, after those of all its
    copies, the layer is done, and what it kept no longer in use. In a pipeline at most COPIES_IN_FLIGHT copies are on
    their way, and at most `window` bytes on their way or in use. Layer by layer one copy is on its way, and a layer's
    first waits for the layer before.

    `copies` are `Copy`s, or an array of them, int[copies, 2], and `counts` says how many each layer has.
    """
    nbytes, kept, layer, arrives, done = _numbered(copies, counts)
    ahead = COPIES_IN_FLIGHT if schedule == "pipelined" else 1
    before = np.zeros(len(nbytes), np.int64)
    before[ahead:] = arrives[:-ahead] + 1
    if schedule == "pipelined":
        frees = np.zeros(np.sum(2 - kept) + len(done), np.int64)
        frees[(arrives + 1)[kept == 0]] = nbytes[kept == 0]
        frees[done] = _summed(nbytes * kept, layer, len(done))
        freed = np.concatenate([[0], np.cumsum(frees)])  # by so many events
        sent = np.cumsum(nbytes)
        # Enough that it fits beside what is still in use, or all of it: a copy may be larger than the window.
        before = np.maximum(before, np.searchsorted(freed, np.minimum(sent - window, sent - nbytes)))
    else:
        first = np.flatnonzero(np.diff(layer, prepend=0))
        before[first] = done[layer[first] - 1] + 1
    return np.maximum.accumulate(before)


def compute_before(copies: ArrayLike, counts: ArrayLike, before: np.ndarray) -> np.ndarray:
    """For each copy, how many events come up to the last one of compute among those `before` it: int[copies].

    That what is kept has arrived says nothing of compute: nothing waits for it but what uses it, later. Any other event
    comes after all compute before it. 0 where there is none.
    """
    _, kept, _, arrives, done = _numbered(copies, counts)
    computed = np.ones(np.sum(2 - kept) + len(done), bool)
    computed[arrives[kept == 1]] = False
    numbers = np.concatenate([[0], np.flatnonzero(computed) + 1])
    return numbers[np.searchsorted(numbers, before, side="right") - 1]


def _numbered(copies: ArrayLike, counts: ArrayLike) -> tuple[np.ndarray, ...]:
    """Of each copy its bytes, whether it is kept, its layer and its arrival's number among the events, int[copies],
    and the numbers of the layers' ends, int[layers]."""
    nbytes, kept = np.reshape(np.asarray(copies, np.int64), (-1, 2)).T
    counts = np.asarray(counts, np.int64)
    layer, events = np.repeat(np.arange(len(counts)), counts), 2 - kept
    done = np.cumsum(_summed(events, layer, len(counts)) + 1) - 1
    return nbytes, kept, layer, np.cumsum(events) - events + layer, done


def _summed(values: np.ndarray, layer: np.ndarray, layers: int) -> np.ndarray:
    """int[layers]: the values of each layer's copies."""
    return np.bincount(layer, values, layers).astype(np.int64)  # exact below 2**53


def in_flight_bytes(window: int, largest: int, kept: int) -> int:
    """Most bytes on their way or in use at once in a pipeline: of copies of at most `largest` bytes those ahead and one
    in use, and what a layer keeps, `kept`, as far as the window allows."""
    return min(window, (COPIES_IN_FLIGHT + 1) * largest + kept)
