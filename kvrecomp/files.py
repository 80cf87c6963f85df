"""Files that are written in one piece: a reader sees the old one or the new one, never half of it."""

import json
import os
import pathlib
import uuid
from typing import Any


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes the text, and the directories above it where they are missing."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # nobody else's, on any machine
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Writes the document, as `write_text` does."""
    write_text(path, json.dumps(document, indent=1) + "\n")
