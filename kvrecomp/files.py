"""Files that are written in one piece: a reader sees the old one or the new one, never half of it.

So does who reads after a power failure: what is written is on the disk before it gets its name.
"""

import contextlib
import errno
import glob
import json
import os
import pathlib
import time
import uuid
from collections.abc import Iterator
from typing import Any


def cache_folder() -> pathlib.Path:
    """Where files for later runs are kept: under XDG_CACHE_HOME or ~/.cache. Raises OSError where there is neither."""
    try:
        return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "kvrecomp"
    except RuntimeError:  # of a user that the machine does not know
        raise OSError("there is no home directory") from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A context that gives a file to write, which takes the place of `path` at its end, and is gone after an error.

    Raises OSError, which names `path`, where it cannot be written.
    """
    path = _target(path)
    remove_partial(path)
    with _beside(path) as beside:
        yield beside
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)


@contextlib.contextmanager
def _beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file for `path`, removed at the end; errors of it are of `path`."""
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # nobody else's, on any machine
    try:
        yield beside
    except OSError as error:
        if error.filename not in (None, str(beside)):
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def check_writable(path: str | os.PathLike) -> None:
    """Makes the directories above, and raises OSError where `write_text` could not write: before there is a text."""
    path = _target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as beside:
        beside.touch()


def _target(path: str | os.PathLike) -> pathlib.Path:
    """What is replaced: where `path` is a link, what it leads to. Raises OSError where that is a directory, a device or
    a pipe, which would be none any more."""
    target = pathlib.Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it is there, and no file that can be replaced", str(path))
    return target


def remove_partial(path: str | os.PathLike, seconds: float = 3600) -> None:
    """Removes what processes that were killed have left of writing `path`, so many seconds ago at least."""
    path = pathlib.Path(path)
    for left in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 32}.partial"):
        with contextlib.suppress(OSError):  # somebody else's, or gone
            if left.stat().st_mtime <= time.time() - seconds:
                left.unlink()


def sync(path: str | os.PathLike) -> None:
    """Waits until a file, or which names a directory has, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # there are file systems that cannot
            raise
    finally:
        os.close(opened)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes the text, and the directories above it where they are missing."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Writes the document, as `write_text` does."""
    write_text(path, json.dumps(document, indent=1) + "\n")
