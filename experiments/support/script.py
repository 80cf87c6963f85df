"""How a script is started: mistakes, words that are no flags, and Ctrl-C are said in a line."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import app

# The user's: a plan that does not fit, a file that is not there, a package that is not installed, sizes or losses
# beyond floating point. PlanError, PromptError and CheckpointError are ValueErrors.
MISTAKES = (ValueError, OSError, ImportError, ArithmeticError)
INTERRUPTED = 130  # the exit status that shells give to Ctrl-C


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """A context that ends the program with a mistake's message as one line."""
    try:
        yield
    except MISTAKES as error:
        sys.exit("error: " + " ".join(str(error).split()))


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Reads the flags, calls `main` and ends the program."""

    def checked(words: Sequence[str]) -> None:
        if words[1:]:
            raise ValueError(f"{words[1]!r} is no flag: flags begin with --, and --help lists them")
        main(words)

    try:
        with in_one_line():
            app.run(checked)
    except KeyboardInterrupt as interruption:
        print(f"interrupted{interruption}", file=sys.stderr)  # it may say how to go on
        sys.exit(INTERRUPTED)
