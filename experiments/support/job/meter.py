"""How far a job is: prompts, tokens and seconds counted, and said: on a terminal in one place, elsewhere as lines."""

import datetime
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console

SHOWN_EVERY = 0.5  # seconds, on a terminal
SAID_EVERY = 60.0  # seconds, where there is none, as in the log of a batch system


class Meter:
    """Counts prompts, tokens and seconds, and says on standard error how far they are; a context.

    It is the streamer of the batch being decoded: between `begin` and `done` it gets a batch's tokens.
    """

    def __init__(self, records: int, new: int, earlier: int):
        """Of so many records, each of at most `new` tokens; those that are there `earlier` took no time."""
        self.prompts = self.tokens = 0
        self._records, self._new, self._earlier, self._done = records, new, earlier, earlier
        self._open, self._steps, self._ends = np.zeros(0, bool), 0, ()
        self._start, self._said = time.perf_counter(), 0.0
        self._console = Console(stderr=True)
        self._status = self._console.status("decoding")

    def __enter__(self) -> "Meter":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.perf_counter() - self._start

    def done(self, records: int) -> None:
        """So many records are done, of this run or earlier."""
        self._done = records

    def begin(self, rows: int, ends: Sequence[int]) -> None:
        """A batch begins; of its rows the first ones count, each until one of `ends` is put."""
        self._open, self._steps, self._ends = np.ones(rows, bool), 0, ends

    def put(self, value: np.ndarray) -> None:
        """See `kvrecomp.generate.Streamer`."""
        if value.ndim > 1:  # the prompt
            return
        self._steps += 1
        self.tokens += int(self._open.sum())
        self._open &= ~np.isin(value[: len(self._open)], self._ends)
        if self.seconds < self._said + (SHOWN_EVERY if self._console.is_terminal else SAID_EVERY):
            return
        self._said = self.seconds
        # Of a batch that a kill has cut short, all are decoded again.
        records = min(self._records, self._done + len(self._open) * self._steps / self._new)
        left = self._said * (self._records - records) / (records - self._earlier)
        said = f"decoding: {records:.0f} of {self._records} records, {self.tokens / self._said:.0f} tokens a second"
        if self._console.is_terminal:
            self._status.update(f"{said}, {datetime.timedelta(seconds=round(left))} left")
        else:
            self._console.print(said, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """See `kvrecomp.generate.Streamer`."""
