"""Scripts of experiments/ called in this process, as their programs call them."""

from types import ModuleType

from absl import flags

from experiments.support import script


def read_flags(program: ModuleType, *words: str) -> flags.FlagValues:
    """The script's flags with the values that these words give them."""
    given = flags.FlagValues()
    program.define_flags(given)
    given([program.__name__, *words])
    return given


def call(program: ModuleType, *words: str) -> None:
    """Runs the script with these words; what ends the program with a line is a SystemExit."""
    given = flags.FlagValues()
    program.define_flags(given)
    with script.in_one_line():
        script.call(program.main, given, given([program.__name__, *words]))
