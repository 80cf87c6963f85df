"""How a script is started: mistakes, words that are no flags, and Ctrl-C are said in a line."""

import contextlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags
from absl import logging as absl_logging

from kvrecomp.plan import MIB, Workload

# The user's: flags that there are not, a plan that does not fit, a file that is not there, a package that is not
# installed, sizes or losses beyond floating point. PlanError, PromptError and CheckpointError are ValueErrors.
MISTAKES = (flags.Error, ValueError, OSError, ImportError, ArithmeticError)
INTERRUPTED = 130  # the exit status that shells give to Ctrl-C


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """A context that ends the program with a mistake's message as one line."""
    try:
        yield
    except MISTAKES as error:
        text = str(error)
        if isinstance(error, flags.Error):
            text += "; --help lists the flags"
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"  # Python's own begins with a number
        sys.exit("error: " + " ".join(text.split()))


def whole_numbers(flag: str, words: Sequence[str]) -> list[int]:
    """What a flag that takes several numbers was given, all from one on, and at least one of them.

    Raises:
        ValueError: it was given none, or something else.
    """
    wrong = [word for word in words or [""] if not word.strip().isdecimal() or int(word) < 1]
    if wrong:
        raise ValueError(f"--{flag} has {wrong[0]!r}; expected whole numbers from 1 on, with commas between them")
    return [int(word) for word in words]


def names(flag: str, words: Sequence[str]) -> Sequence[str]:
    """What a flag that takes several names was given.

    Raises:
        ValueError: it was given none.
    """
    if not words:
        raise ValueError(f"--{flag} is empty: give one name or more, with commas between them")
    return words


def workloads(batches: Sequence[str], prompts: Sequence[str], new: int) -> list[Workload]:
    """What is measured: every batch of --batch with every prompt of --prompt, and --new tokens.

    Raises:
        ValueError: no whole numbers, or fewer new tokens than it takes to time a step.
    """
    if new < 2:
        raise ValueError(f"--new is {new}: the first token comes with the prompt; give at least 2 to time a step")
    sizes = itertools.product(whole_numbers("batch", batches), whole_numbers("prompt", prompts))
    return [Workload(batch, prompt, new) for batch, prompt in sizes]


def window_bytes(mib: float | None) -> int | None:
    """Bytes of the MiB that --window_mib was given, None where it was not.

    Raises:
        ValueError: it is no size.
    """
    if mib is not None and not 1 <= mib * MIB < float("inf"):
        raise ValueError(f"--window_mib is {mib:g}; it must be a size in MiB")
    return None if mib is None else int(mib * MIB)


def percentages(flag: str, words: Sequence[str]) -> list[float]:
    """The same of numbers from 0 on, or none."""
    try:
        if all(0 <= float(word) < float("inf") for word in words):
            return [float(word) for word in words]
    except ValueError:
        pass  # it is said below
    raise ValueError(f"--{flag} has {','.join(words)!r}; expected percentages from 0 on, with commas between them")


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Reads the flags, calls `main` and ends the program."""

    def checked(words: Sequence[str]) -> None:
        if words[1:]:
            raise ValueError(f"{words[1]!r} is no flag: flags begin with --, and --help lists them")
        # Others' are not for the user: Orbax warns of what it does not find, matplotlib tells of its fonts.
        absl_logging.set_verbosity(absl_logging.ERROR)
        logging.getLogger("kvrecomp").setLevel(logging.WARNING)
        main(words)

    try:
        with in_one_line():
            app.run(checked, flags_parser=flags.FLAGS)  # not absl's own, which says more than a line
    except KeyboardInterrupt as interruption:
        print(f"interrupted{interruption}", file=sys.stderr)  # it may say how to go on
        sys.exit(INTERRUPTED)
