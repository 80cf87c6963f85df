"""The text that every Python installation carries, as documents to train a small language model on.

    documents()  ->  split()  ->  encode()
    list[str]        Split        uint16 token ids, every document followed by end-of-text

Documents are the topics of the reference manual (`pydoc_data.topics`) and the documentation strings of the standard
library's modules, classes and functions. These are read with `ast`, so nothing is executed. The text depends on the
Python version, and on whether a distribution left modules out: `fingerprint` tells two apart.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

END_OF_TEXT = 256
PADDING = 257
VOCABULARY = 258

SHORTEST = 40  # characters; shorter strings say little more than a name
LONGEST_SHARED = 60  # characters of a paragraph; documents that share a longer one are kept on one side of the split
VALIDATION, HELDOUT = 0.04, 0.04  # of the documents
# Tests, programs with strings for their own users, generated tables, and what is not the standard library's own.
EXCLUDED = frozenset(
    "test tests idlelib turtledemo lib2to3 encodings pydoc_data ensurepip site-packages dist-packages "
    "__pycache__".split()
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Split(NamedTuple):
    """Documents to train on, to choose among trained weights with, and to report on. They share no long paragraph."""

    train: list[str]
    validation: list[str]
    heldout: list[str]


def documents() -> list[str]:
    """All documents of the running Python, each once: topics first, then strings in order of path.

    Raises FileNotFoundError where there is no string, as in an installation without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = list(documentation_strings(root))
    if not found:
        raise FileNotFoundError(f"{root} holds no documentation strings; a Python with its library's sources is needed")
    return list(dict.fromkeys([*(text.strip() for text in topics.values()), *found]))


def documentation_strings(root: Path) -> Iterator[str]:
    """Those of the Python files below a directory that are long enough, dedented, in order of path and appearance."""
    for path in sorted(root.rglob("*.py")):
        if EXCLUDED.intersection(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of old escapes in the library's strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # no file of this Python's
            continue
        nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
        for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
            text = ast.get_docstring(node) or ""
            text = text.encode(errors="ignore").decode().strip()  # a lone surrogate of an escape has no UTF-8
            if len(text) >= SHORTEST:
                yield text


def split(documents: Sequence[str]) -> Split:
    """Split by hash, the largest first: a document that shares a paragraph with larger ones goes where they are.

    It is left out where these are on several sides, or have all of its long paragraphs. Documents that are a large part
    of the corpus, as some of the manual's chapters are, are trained on.
    """
    parts, large = Split([], [], []), sum(map(len, documents)) / 100
    sides: dict[str, list[str]] = {}  # of the paragraphs of larger documents
    for document in sorted(documents, key=lambda document: (-len(document), document)):
        draw = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") / 2**64
        draw = 1.0 if len(document) > large else draw
        by_hash = parts.heldout if draw < HELDOUT else parts.validation if draw < HELDOUT + VALIDATION else parts.train
        own = paragraphs(document)
        shared = [sides[paragraph] for paragraph in own if paragraph in sides]
        side = shared[0] if shared else by_hash
        if (own and len(shared) == len(own)) or any(other is not side for other in shared):
            continue
        side.append(document)
        sides |= dict.fromkeys(own, side)
    return parts


def encode(documents: Sequence[str]) -> np.ndarray:
    """uint16[tokens]: an end-of-text, then each document's UTF-8 bytes and an end-of-text."""
    end = np.array([END_OF_TEXT], np.uint16)
    encoded = [np.frombuffer(document.encode(), np.uint8) for document in documents]
    return np.concatenate([end, *(part for document in encoded for part in (document, end))], dtype=np.uint16)


def fingerprint(documents: Sequence[str]) -> str:
    """SHA-256, in hexadecimal, of the encoded documents."""
    return hashlib.sha256(encode(documents).astype("<u2").tobytes()).hexdigest()


def paragraphs(document: str) -> list[str]:
    """Paragraphs longer than `LONGEST_SHARED`, white space made alike."""
    found = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", document))
    return [paragraph for paragraph in found if len(paragraph) > LONGEST_SHARED]
