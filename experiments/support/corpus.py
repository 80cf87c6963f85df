"""The text that every Python installation carries, as documents to train a small language model on.

Two sources, both read with `ast`, so nothing of them is imported or executed:

    the reference manual     `pydoc_data/topics.py`, one document a topic
    documentation strings    of the modules, classes and functions of the standard library, one document each

    documents()  ->  split()  ->  encode()
    list[str]        Split        uint16 token ids, every document followed by end-of-text

The text depends on the Python version, and on whether a distribution left modules out: `fingerprint` tells two apart.
"""

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

END_OF_TEXT = 256
PADDING = 257
VOCABULARY = 258

SHORTEST = 40  # characters; shorter strings say little more than a name
LONGEST_SHARED = 60  # characters of a paragraph; documents that share a longer one are kept on one side of the split
VALIDATION, HELDOUT = 0.04, 0.04  # of the documents
TOPICS = "pydoc_data/topics.py"
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


def documents(root: str | os.PathLike | None = None) -> list[str]:
    """All documents below a standard library (default: the running Python's), topics first, then in order of path.

    Documents are dedented and at least `SHORTEST` characters long; exact repetitions and topics that another topic
    contains are left out. Raises FileNotFoundError if there is no text, as in an installation without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if root is None else root)
    found = _without_contained(_topics(root / TOPICS))
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - EXCLUDED)
        for name in sorted(files):
            if name.endswith(".py"):
                found += _documentation_strings(Path(folder, name))
    found = [document for document in dict.fromkeys(found) if len(document) >= SHORTEST]
    if not found:
        raise FileNotFoundError(f"{root} holds no documentation strings; a Python with its library's sources is needed")
    return found


def split(documents: Sequence[str]) -> Split:
    """Split by hash, so that a document stays on its side whatever others are there.

    Documents that repeat a paragraph of another are split as one, by the hash of the first of them. Groups that are
    a large part of the corpus, as the manual's cross-quoting chapters are, are always trained on.
    """
    groups = _groups(documents)
    sizes = Counter[int]()
    for document, group in zip(documents, groups):
        sizes[group] += len(document)
    large = sizes.total() / 100
    parts = Split([], [], [])
    for document, group in zip(documents, groups):
        digest = hashlib.sha256(documents[group].encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        if sizes[group] > large or draw >= VALIDATION + HELDOUT:
            parts.train.append(document)
        elif draw < HELDOUT:
            parts.heldout.append(document)
        else:
            parts.validation.append(document)
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


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's strings are not our reader's concern
        return ast.parse(path.read_bytes())


def _topics(path: Path) -> list[str]:
    """The values of the dictionary that the file assigns to `topics`; none if the file is not there."""
    if not path.exists():
        return []
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return [text.strip() for text in ast.literal_eval(node.value).values()]
    return []


def _documentation_strings(path: Path) -> Iterator[str]:
    """Those of one file in order of appearance; none if this Python cannot parse it."""
    try:
        tree = _parse(path)
    except (SyntaxError, ValueError):
        return
    nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if text := ast.get_docstring(node):
            yield text.encode(errors="ignore").decode().strip()  # a lone surrogate of an escape has no UTF-8


def _without_contained(topics: Sequence[str]) -> list[str]:
    """Leaves out topics all of whose long paragraphs another, larger one has: "with" is a part of "compound"."""
    kept, seen = set(), set()
    for topic in sorted(topics, key=lambda topic: (-len(topic), topic)):
        found = set(paragraphs(topic))
        if found - seen or not found:
            kept.add(topic)
            seen |= found
    return [topic for topic in topics if topic in kept]


def _groups(documents: Sequence[str]) -> list[int]:
    """For each document the number of the first one it is connected to by shared paragraphs (union-find)."""
    parents = list(range(len(documents)))

    def first(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    owners: dict[str, int] = {}
    for number, document in enumerate(documents):
        for paragraph in paragraphs(document):
            one, two = first(owners.setdefault(paragraph, number)), first(number)
            parents[max(one, two)] = min(one, two)
    return [first(number) for number in range(len(documents))]
