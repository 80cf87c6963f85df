"""How far a job is: prompts, tokens and seconds counted, and shown where there is a terminal."""

import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SPEED_PERIOD = 500  # seconds that the time left is estimated from: batches of several shapes
SHOWN_EVERY = 0.5  # seconds, as rich estimates from the last thousand times


class Meter:
    """Counts prompts, tokens and seconds, and shows them on a terminal; the streamer of the batch being decoded.

    Between `begin` and `done` it gets a batch's tokens.
    """

    def __init__(self, records: int, new: int):
        self.prompts = self.tokens = 0
        self._new, self._done, self._start = new, 0, time.perf_counter()
        self._open, self._steps, self._ends = np.zeros(0, bool), 0, ()
        self._shown = 0.0
        console = Console(stderr=True)
        columns = (TextColumn("decoding"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total} records"))
        speed = (TextColumn("{task.fields[speed]:.0f} tokens/s"), TimeRemainingColumn())
        options = {"console": console, "transient": True, "disable": not console.is_terminal}
        self._bar = Progress(*columns, *speed, speed_estimate_period=SPEED_PERIOD, **options)
        self._task = self._bar.add_task("", total=records, speed=0.0)

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.perf_counter() - self._start

    def done(self, records: int) -> None:
        """So many records are done, of this run or earlier."""
        self._done = records
        self._bar.update(self._task, completed=records)

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
        if self.seconds >= self._shown + SHOWN_EVERY:
            self._shown = self.seconds
            part = len(self._open) * self._steps / self._new
            self._bar.update(self._task, completed=self._done + part, speed=self.tokens / self._shown)

    def end(self) -> None:
        """See `kvrecomp.generate.Streamer`."""
