"""How a script is started: mistakes, words that are no flags, and Ctrl-C are said in a line."""

import sys
from collections.abc import Callable, Sequence

from absl import app

INTERRUPTED = 130  # the exit status that shells give to Ctrl-C


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Reads the flags, calls `main` and ends the program; ValueError, OSError and ImportError are the user's."""

    def checked(words: Sequence[str]) -> None:
        if words[1:]:
            raise ValueError(f"{words[1]!r} is no flag: flags begin with --, and --help lists them")
        main(words)

    try:
        app.run(checked)
    except (ValueError, OSError, ImportError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
