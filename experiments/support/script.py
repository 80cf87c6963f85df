"""How a script starts: mistakes, words that are not flags, and Ctrl-C end it with one line.

    def define_flags(into: flags.FlagValues) -> None:
        define = script.Define(into)
        define.integer("batch", 32, "Rows decoded together.", lower_bound=1)

    def main(given: flags.FlagValues) -> None:
        print(given.batch)

    if __name__ == "__main__":
        script.run(main, define_flags)

Notebooks and tests import scripts without their flags.
"""

import contextlib
import functools
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags
from absl import logging as absl_logging

from kvrecomp.plan import MIB, Workload
from kvrecomp.run import memory

# The user's: unknown flags, a plan that does not fit, a missing file or package, sizes or losses beyond floating point.
# PlanError, PromptError and CheckpointError are ValueErrors.
MISTAKES = (flags.Error, ValueError, OSError, ImportError, ArithmeticError)
INTERRUPTED = 130  # the exit status that shells give to Ctrl-C


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """A context that ends the program with a mistake's message, or word of an interruption, as one line."""
    try:
        yield
    except (RuntimeError, AssertionError):  # of jax's where it has no device
        try:
            memory.device()
        except OSError as error:
            sys.exit(f"error: {error}")
        raise
    except MISTAKES as error:
        text = str(error)
        if isinstance(error, flags.Error):
            text += "; --help lists the flags"
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"  # Python's own begins with a number
        sys.exit("error: " + " ".join(text.split()))
    except KeyboardInterrupt as interruption:
        print(f"interrupted{interruption}", file=sys.stderr)  # it may say how to go on
        sys.exit(INTERRUPTED)


def call(main: Callable[[flags.FlagValues], None], given: flags.FlagValues, words: Sequence[str]) -> None:
    """Calls `main` with flags that were read; `words` are the program's name and what was no flag."""
    if words[1:]:
        raise ValueError(f"{words[1]!r} is no flag: flags begin with --, and --help lists them")
    # Others' are not for the user: Orbax warns of what it does not find, matplotlib tells of its fonts.
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("kvrecomp").setLevel(logging.WARNING)
    main(given)


def run(main: Callable[[flags.FlagValues], None], define_flags: Callable[[flags.FlagValues], None]) -> None:
    """Reads the flags, calls `main` with them and ends the program."""
    define_flags(flags.FLAGS)
    with in_one_line():  # flags_parser: absl's own says more than a line
        app.run(lambda words: call(main, flags.FLAGS, words), flags_parser=flags.FLAGS)


class Define:
    """absl's functions that define flags, for the flags of one script: `define.string(name, default, help)`."""

    def __init__(self, into: flags.FlagValues):
        self.string = functools.partial(flags.DEFINE_string, flag_values=into)
        self.integer = functools.partial(flags.DEFINE_integer, flag_values=into)
        self.number = functools.partial(flags.DEFINE_float, flag_values=into)
        self.boolean = functools.partial(flags.DEFINE_bool, flag_values=into)
        self.list = functools.partial(flags.DEFINE_list, flag_values=into)
        self.strings = functools.partial(flags.DEFINE_multi_string, flag_values=into)
        self.enum = functools.partial(flags.DEFINE_enum, flag_values=into)


def whole_numbers(flag: str, words: Sequence[str]) -> list[int]:
    """The values of a flag that takes several numbers. Raises ValueError unless all are whole, from 1 on, and any."""
    wrong = [word for word in words or [""] if not word.strip().isdecimal() or int(word) < 1]
    if wrong:
        raise ValueError(f"--{flag} has {wrong[0]!r}; expected whole numbers from 1 on, with commas between them")
    return [int(word) for word in words]


def percentages(flag: str, words: Sequence[str]) -> list[float]:
    """The values of a flag that takes several percentages, or none. Raises ValueError unless all are from 0 on."""
    try:
        if all(0 <= float(word) < float("inf") for word in words):
            return [float(word) for word in words]
    except ValueError:
        pass  # it is said below
    raise ValueError(f"--{flag} has {','.join(words)!r}; expected percentages from 0 on, with commas between them")


def names(flag: str, words: Sequence[str]) -> Sequence[str]:
    """The values of a flag that takes several names. Raises ValueError where there is none."""
    if not words:
        raise ValueError(f"--{flag} is empty: give one name or more, with commas between them")
    return words


def workloads(batches: Sequence[str], prompts: Sequence[str], new: int) -> list[Workload]:
    """Every batch of --batch with every prompt of --prompt, and --new tokens.

    Raises ValueError for what is no whole number, or fewer new tokens than it takes to time a step.
    """
    if new < 2:
        raise ValueError(f"--new is {new}: the first token comes with the prompt; give at least 2 to time a step")
    sizes = itertools.product(whole_numbers("batch", batches), whole_numbers("prompt", prompts))
    return [Workload(batch, prompt, new) for batch, prompt in sizes]


def window_bytes(mib: float | None) -> int | None:
    """Bytes of --window_mib, None where it was not given. Raises ValueError for what is no size."""
    if mib is not None and not 1 <= mib * MIB < float("inf"):
        raise ValueError(f"--window_mib is {mib:g}; it must be a size in MiB")
    return None if mib is None else int(mib * MIB)
