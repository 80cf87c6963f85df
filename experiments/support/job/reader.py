"""The input of a job: a file with one JSON object a line, read twice and never held.

    {"id": "a", "prompt": "Return the "}
    {"prompt": [5, 17, 2]}
    {"messages": [{"role": "user", "content": "Hello"}]}

A prompt is text, a list of token ids or, of a chat, its messages. An id is a string or a whole number; a prompt without
one gets the number of its line, counted from 1. Other keys are ignored, blank lines skipped. A line that cannot be
continued is a `Line` with an `error`.
"""

import codecs
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.support.prompts import encode_one, is_ids

import numpy as np

from kvrecomp.plan import MIB, ModelShape
from models import TextProcessor

NO_IDS = np.zeros(0, np.int32)
PIECES = 64  # of a MiB, of each file of a checkpoint, that its fingerprint reads


class LineError(ValueError):
    """A line that cannot be continued; the message says why."""


@dataclass(frozen=True)
class Line:
    """A line that is not blank.

    `index` counts these lines from 0, `number` all lines from 1. `ids` int32[tokens] are the prompt's, none where there
    is an `error`; `id` is None where a line with an error has none.
    """

    index: int
    number: int
    id: str | int | None
    prompt: str | list[int] | list[dict[str, Any]] | None = None
    ids: np.ndarray = field(default_factory=lambda: NO_IDS)
    error: str = ""


@dataclass(frozen=True)
class Reader:
    """Reads a file as prompts of one model that `new` tokens are to follow.

    Without a tokenizer text is an error, but for ids in digits; `any_text` takes its bytes for random weights. With
    `chat` text is a user's message, and there may be `messages` instead.
    """

    path: Path
    shape: ModelShape
    text: TextProcessor
    new: int
    any_text: bool = False
    chat: bool = False

    def lines(self, skip: int = 0, digest: Any = None) -> Iterator[Line]:
        """The lines of the file but for the first `skip`; `digest`, of hashlib, is updated with what is read.

        Raises OSError where the file cannot be read.
        """
        index = -1
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if digest is not None:
                    digest.update(raw)
                if number == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                raw = raw.rstrip()
                if not raw:
                    continue
                index += 1
                if index >= skip:
                    yield self._line(index, number, raw)

    def _line(self, index: int, number: int, raw: bytes) -> Line:
        name = None
        try:
            given = _object(raw)
            name = _id(given)
            ids = self._ids(given)
        except LineError as error:
            return Line(index, number, name, error=str(error))
        prompt = given["messages"] if given.get("prompt") is None else given["prompt"]
        return Line(index, number, number if name is None else name, prompt, ids)

    def _ids(self, given: dict[str, Any]) -> np.ndarray:
        prompt, messages, vocab = given.get("prompt"), given.get("messages"), self.shape.vocab
        if self.chat and messages is not None:
            if prompt is not None:
                raise LineError("it has both a prompt and messages")
            if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
                raise LineError('its messages are not a list such as [{"role": "user", "content": "Hello"}]')
            ids = self._encoded(messages)
        elif prompt is None:
            raise LineError("it has no prompt" if messages is None else "it has messages, which --chat is for")
        elif isinstance(prompt, str):
            ids = self._encoded(prompt)
        elif isinstance(prompt, list) and all(type(token) is int for token in prompt):
            ids = prompt
        else:
            raise LineError("its prompt is neither text nor a list of token ids")
        if not ids:
            raise LineError("its prompt is empty")
        outside = next((token for token in ids if not 0 <= token < vocab), None)
        if outside is not None:
            raise LineError(f"token id {_short(outside)} is outside the vocabulary of {vocab} tokens")
        if len(ids) + self.new > self.shape.positions:
            raise LineError(
                f"a prompt of {len(ids)} and {self.new} new tokens need {len(ids) + self.new} positions; "
                f"{self.shape.name} has {self.shape.positions}"
            )
        return np.array(ids, np.int32)

    def _encoded(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        needs_tokenizer = isinstance(prompt, str) and bool(prompt) and not is_ids(prompt)
        if self.text.tokenizer is None and not self.any_text and needs_tokenizer:
            raise LineError("the checkpoint has no tokenizer.json, so its prompt must be ids, such as [5, 17, 2]")
        try:
            return encode_one(self.text, prompt, self.chat) if prompt else []
        except UnicodeEncodeError:
            raise LineError("its prompt has half a surrogate pair, which is not text") from None
        except ValueError as error:  # digits without end
            raise LineError(f"its prompt cannot be read: {error}") from None


def _object(raw: bytes) -> dict[str, Any]:
    try:
        given = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise LineError(f"it is not text in UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise LineError(f"it is not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # numbers and brackets without end
        raise LineError(f"it is not JSON ({error})") from None
    if not isinstance(given, dict):
        raise LineError('it is not an object such as {"id": 1, "prompt": "text"}')
    return given


def _id(given: dict[str, Any]) -> str | int | None:
    name = given.get("id")
    if name is not None and type(name) not in (str, int):
        raise LineError("its id is neither a string nor a whole number")
    return name


def _short(value: Any) -> str:
    """A value as JSON, of a length that a message can bear."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


@dataclass(frozen=True)
class Survey:
    """How many lines there are that are not blank, how many prompts of each length, and the SHA-256 of all that."""

    records: int
    lengths: Counter[int]
    sha256: str


def survey(reader: Reader, report: Callable[[Line], None]) -> Survey:
    """Reads all lines, and reports those with errors. Raises ValueError where two have the same id, and OSError."""
    records, lengths, digest = 0, Counter[int](), hashlib.sha256()
    numbers: dict[bytes, int] = {}  # of the line that an id, kept as its hash, was last seen in
    doubled = ""
    for line in reader.lines(digest=digest):
        records += 1
        if line.error:
            report(line)
        else:
            lengths[len(line.ids)] += 1
        if line.id is not None:
            name = hashlib.blake2b(json.dumps(line.id).encode(), digest_size=16).digest()  # 1 is not "1"
            if name in numbers and not doubled:
                doubled = f"lines {numbers[name]} and {line.number} have the same id, {_short(line.id)}"
            numbers[name] = line.number
    if doubled:
        raise ValueError(f"{reader.path}: {doubled} (a line without an id has its number): give every line its own")
    return Survey(records, lengths, digest.hexdigest())


def file_hash(path: Path) -> str:
    """SHA-256 of a file. Raises OSError where it cannot be read, as a pipe cannot that is to be read twice."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file, which is to be read twice: write the prompts into one")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_hash(path: Path) -> str:
    """SHA-256 of a directory: names, sizes and contents, of large files PIECES at even distances.

    Reading all of the weights once more would take as long as loading them.
    """
    whole = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        size = file.stat().st_size
        whole.update(json.dumps([file.relative_to(path).as_posix(), size]).encode())
        distance = max(MIB, (size - MIB) // (PIECES - 1))
        with file.open("rb") as opened:
            for piece in range(PIECES):
                opened.seek(piece * distance)
                whole.update(opened.read(MIB))
    return whole.hexdigest()
