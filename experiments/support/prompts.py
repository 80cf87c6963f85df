"""Prompts as token ids: those given, built in or in a file, encoded and padded on the left."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import kvrecomp
from models import TextProcessor

LARGEST_ID = 2**31 - 1

PROMPTS = (
    "Return the ",
    "Open the file and read ",
    'The "with" statement\n********************\n\nThe "with" statement is used to ',
    "Create a new thread.\n\nThe first argument is the function that ",
    "Raised when a sequence subscript is out of range. If an index is not an integer, ",
)


def read_prompts(given: Sequence[str], file: str | Path | None) -> list[str]:
    """The prompts given, then those of a file, one a line; the built-in ones if there are neither.

    Raises:
        PromptError: a prompt without a character, a file without a prompt or not in UTF-8.
        OSError: a file that cannot be read.
    """
    if "" in given:
        raise kvrecomp.PromptError(f"prompt {list(given).index('') + 1} is empty: give it at least one character")
    lines = []
    if file is not None:
        try:
            lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise kvrecomp.PromptError(f"{file} is not text in UTF-8 (byte {error.start}): convert it") from error
        if not lines:
            raise kvrecomp.PromptError(f"{file} has no prompt: write one a line")
    return [*given, *lines] or list(PROMPTS)


def is_ids(prompt: str) -> bool:
    """Whether a prompt can be read as ids: digits and spaces."""
    return bool(prompt.split()) and all(part.isascii() and part.isdigit() for part in prompt.split())


def encode_one(text: TextProcessor, prompt: str | Sequence[Mapping[str, Any]], chat: bool = False) -> list[int]:
    """The ids of a prompt, or of the messages of a chat; with `chat` a prompt is a user's only message.

    Without a tokenizer a prompt is ids in digits, "5 17 2"; of any other text ids are its UTF-8 bytes, which stand for
    nothing to random weights, but for different lengths.

    Raises:
        ValueError: the chat template does not take the messages; UnicodeEncodeError where a prompt is not text.
    """
    if not isinstance(prompt, str):
        return text.encode_chat(prompt)
    if chat:
        return text.encode_chat([{"role": "user", "content": prompt}])
    if text.tokenizer is not None:
        return text.encode(prompt)
    return [int(part) for part in prompt.split()] if is_ids(prompt) else list(prompt.encode())


def encode(text: TextProcessor, prompts: Sequence[str], chat: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded ids int32[batch, longest] of prompts, and bool of their mask; see `encode_one`."""
    rows = []
    for number, prompt in enumerate(prompts, 1):
        try:
            row = encode_one(text, prompt, chat)
        except UnicodeEncodeError as error:
            raise kvrecomp.PromptError(f"prompt {number} is not text in UTF-8: convert it") from error
        except ValueError as error:  # digits without end are no number
            raise kvrecomp.PromptError(f"prompt {number} cannot be read: {error}") from error
        if (largest := max(row, default=0)) > LARGEST_ID:
            raise kvrecomp.PromptError(f"prompt {number} has the token id {largest:.3g}, which no vocabulary has")
        if not row:
            raise kvrecomp.PromptError(f"prompt {number} is no token to this tokenizer: give it more than that")
        rows.append(row)
    return pad_left(rows, max(map(len, rows)))


def pad_left(rows: Sequence[Sequence[int] | np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as int32[batch, length], zeros on their left, and bool of the mask."""
    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = row
        mask[number, length - len(row) :] = True
    return ids, mask
