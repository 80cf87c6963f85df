"""What a user sees of work that takes long: a line on a terminal or in a notebook, a record of the log elsewhere."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG = logging.getLogger("kvrecomp")


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A context for work of which nobody knows how long it takes; the seconds are counted on a terminal."""
    console = Console(stderr=True)
    if console.is_jupyter:
        console.print(what)
    elif not console.is_terminal:
        LOG.info(what)
    columns = SpinnerColumn(), TextColumn(what), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task("")
        yield


class StepBar:
    """A bar of steps on a terminal, nothing elsewhere: a context that gives the function to advance it."""

    def __init__(self, what: str, total: int, wanted: bool = True):
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal))
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Callable[[], None]:
        self._bar.start()
        return lambda: self._bar.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
