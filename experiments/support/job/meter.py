"""How far a job is: prompts, tokens and seconds counted, and shown: on a terminal as a bar, elsewhere as lines."""

import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SPEED_PERIOD = 500  # seconds that the time left is estimated from: batches of several shapes
SHOWN_EVERY = 0.5  # seconds, as rich estimates from the last thousand times
SAID_EVERY = 60.0  # seconds, where there is no terminal, as in the log of a batch system


class Meter:
    """Counts prompts, tokens and seconds, and shows them on standard error; the streamer of the batch being decoded.

    Between `begin` and `done` it gets a batch's tokens.
    """

    def __init__(self, records: int, new: int):
        self.prompts = self.tokens = 0
        self._records, self._new, self._done, self._start = records, new, 0, time.perf_counter()
        self._open, self._steps, self._ends = np.zeros(0, bool), 0, ()
        self._shown = 0.0
        self._console = console = Console(stderr=True)
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
        if self.seconds >= self._shown + (SHOWN_EVERY if self._console.is_terminal else SAID_EVERY):
            self._shown = self.seconds
            self._show(self._done + len(self._open) * self._steps / self._new, self.tokens / self._shown)

    def _show(self, records: float, speed: float) -> None:
        self._bar.update(self._task, completed=records, speed=speed)
        if not self._console.is_terminal:
            line = f"decoding: {records:.0f} of {self._records} records, {speed:.0f} tokens a second"
            self._console.print(line, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """See `kvrecomp.generate.Streamer`."""
