"""How a script starts, and ends: mistakes, words that are not flags, and Ctrl-C end it with one line.

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
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import jax
from absl import app, flags
from absl import logging as absl_logging

from kvrecomp.plan import GIB, MIB, Loss, Workload
from kvrecomp.predict.hardware import LARGEST_DEVICE, LEAST_DEVICE
from kvrecomp.run import memory

flags.disclaim_key_flags()  # flags are those of the script that defines them here, and --help lists them

# The user's: unknown flags, a plan that does not fit, a missing file or package, sizes or losses beyond floating point.
# PlanError, PromptError and CheckpointError are ValueErrors.
MISTAKES = (flags.Error, ValueError, OSError, ImportError, ArithmeticError, MemoryError)
INTERRUPTED = 130  # the exit status that shells give to Ctrl-C


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """A context that ends the program with a mistake's message, or word of an interruption, as one line."""
    try:
        yield
        sys.stdout.flush()
    except MISTAKES as error:
        if isinstance(error, BrokenPipeError):  # whoever reads has read enough
            sys.exit(1)
        text = str(error) or type(error).__name__
        if isinstance(error, flags.Error):
            text += "; --help lists the flags"
        if isinstance(error, OSError) and error.strerror:  # Python's own begins with a number
            text = f"{error.filename or 'standard output'}: {error.strerror}"  # files that are written have names
        sys.exit("error: " + " ".join(text.split()))
    except (RuntimeError, AssertionError) as error:  # of jax's, where a memory is full or there is no device
        if "RESOURCE_EXHAUSTED" in str(error):
            sys.exit(f"error: a memory is full ({str(error).splitlines()[0]}): ask for less, or let a plan use less")
        try:
            memory.device()
        except OSError as missing:
            sys.exit(f"error: {missing}")
        raise
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
        app.run(lambda words: call(main, flags.FLAGS, words), flags_parser=_parse)


def _parse(words: Sequence[str]) -> list[str]:
    """What is no flag of these words; the only one that ends the program is --help."""
    try:
        return flags.FLAGS(words)
    except SystemExit:  # with a status that says that it failed
        sys.exit(0)


def use_no_device() -> None:
    """For scripts that only predict: the CPU does that, whatever devices jax would look for."""
    jax.config.update("jax_platforms", "cpu")


class FiniteParser(flags.FloatParser):
    """Reads numbers, but for NaN, which is outside of no bounds, and infinities."""

    def convert(self, argument: str | float) -> float:
        number = super().convert(argument)
        if not math.isfinite(number):
            raise ValueError(f"{number} is not a finite number")
        return number


class Define:
    """absl's functions that define flags, for the flags of one script: `define.string(name, default, help)`.

    Flags that several scripts have are defined here, and so are the same in all.
    """

    def __init__(self, into: flags.FlagValues):
        self._into = into
        self.string = functools.partial(flags.DEFINE_string, flag_values=into)
        self.integer = functools.partial(flags.DEFINE_integer, flag_values=into)
        self.boolean = functools.partial(flags.DEFINE_bool, flag_values=into)
        self.list = functools.partial(flags.DEFINE_list, flag_values=into)
        self.strings = functools.partial(flags.DEFINE_multi_string, flag_values=into)
        self.enum = functools.partial(flags.DEFINE_enum, flag_values=into)

    def number(
        self,
        name: str,
        default: float | None,
        help: str,
        lower_bound: float | None = None,
        upper_bound: float | None = None,
    ) -> None:
        """A finite number within the bounds."""
        parser = FiniteParser(lower_bound, upper_bound)
        flags.DEFINE(parser, name, default, help, self._into, flags.ArgumentSerializer())

    def device_memory(self, otherwise: str = "what is free") -> None:
        """--device_memory_gib, of a size that a device may have."""
        help = f"Device memory to use, weights included; default: {otherwise}."
        self.number("device_memory_gib", None, help, LEAST_DEVICE / GIB, LARGEST_DEVICE / GIB)

    def host_memory(self, otherwise: str = "what is free") -> None:
        """--host_memory_gib."""
        self.number("host_memory_gib", None, f"Pinned host memory to use; default: {otherwise}.", 0)

    def window(self, otherwise: str) -> None:
        """--window_mib, of a size that a device may have."""
        help = f"Bytes from the host in flight or in use, in MiB; default: {otherwise}."
        self.number("window_mib", None, help, 1 / MIB, LARGEST_DEVICE / MIB)

    def loss(self) -> None:
        """--loss, of what plan auto may use."""
        help = "What plan auto may write blocks with: none but what is lossless, or 8 or 4 bits a number too."
        self.enum("loss", "none", get_args(Loss), help)

    def seed(self, help: str) -> None:
        """--seed, as jax and numpy take it."""
        self.integer("seed", 0, help, lower_bound=0, upper_bound=2**32 - 1)


def whole_numbers(flag: str, words: Sequence[str]) -> list[int]:
    """The values of a flag that takes several numbers. Raises ValueError unless all are whole, from 1 on, and any, and
    of a size that arrays can have."""
    wrong = [word for word in words or [""] if not (word.strip().isdecimal() and 1 <= int(word) < 2**31)]
    if wrong:
        raise ValueError(f"--{flag} has {wrong[0]!r}; expected whole numbers from 1 on, with commas between them")
    return [int(word) for word in words]


def percentages(flag: str, words: Sequence[str]) -> list[float]:
    """The values of a flag that takes several percentages, or none. Raises ValueError unless all are from 0 on."""
    return numbers(flag, words, "percentages")


def numbers(flag: str, words: Sequence[str], of: str = "numbers") -> list[float]:
    """The values of a flag that takes several numbers, or none. Raises ValueError unless all are finite, from 0 on."""
    try:
        if all(0 <= float(word) < float("inf") for word in words):
            return [float(word) for word in words]
    except ValueError:
        pass  # it is said below
    raise ValueError(f"--{flag} has {','.join(words)!r}; expected {of} from 0 on, with commas between them")


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
    """Bytes of --window_mib, None where it was not given."""
    return None if mib is None else int(mib * MIB)
