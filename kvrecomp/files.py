"""Files that are written in one piece: a reader sees the old one or the new one, never half of it."""

import json
import os
import pathlib
from typing import Any


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Writes the document, and the directories above it where they are missing."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        beside.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
