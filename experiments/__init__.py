"""Scripts, and what they are made of. Importing it comes first in each, and prepares its process.

`kvrecomp` and `models` are those beside this package, whatever else has their names on Python's path. In a script,
Ctrl-C ends imports with a line, and XLA says nothing of its own unless the user has set how much: timing kernels on a
busy GPU it says so much that our lines are lost. Whoever imports jax before sets jax's own level.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import TracebackType
from typing import Any

_HERE = Path(__file__).resolve().parent


class _Beside(MetaPathFinder):
    """Finds packages that are beside this one."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(_HERE.parent)]) if name in ("kvrecomp", "models") else None


def _is_script() -> bool:
    """Whether this process is one of the scripts; with `python -m`, Python has not said which one yet."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    return sys.argv[:1] == ["-m"] or (program is not None and Path(program).resolve().parent == _HERE)


def _say_interrupted(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    cause: BaseException | None = error
    while cause is not None:  # a library that is interrupted may say that it cannot be imported
        if isinstance(cause, KeyboardInterrupt):
            return print("interrupted", file=sys.stderr)
        cause = cause.__cause__ or cause.__context__
    sys.__excepthook__(kind, error, traceback)


sys.meta_path.insert(0, _Beside())
if _is_script():
    for _name in ("stdout", "stderr"):
        if getattr(sys, _name) is None:  # it was closed, and files that are opened would get its number
            setattr(sys, _name, open(os.devnull, "w"))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.excepthook = _say_interrupted
