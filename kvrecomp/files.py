"""Files that are written in one piece: a reader sees the old one or the new one, never half of it."""

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A context that gives a file to write, which takes the place of `path` at its end, and is gone after an error."""
    path = pathlib.Path(path)
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # nobody else's, on any machine
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes the text, and the directories above it where they are missing."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Writes the document, as `write_text` does."""
    write_text(path, json.dumps(document, indent=1) + "\n")
