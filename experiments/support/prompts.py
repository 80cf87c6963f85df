"""Prompts as token ids: those given, built in or in a file, encoded and padded on the left."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import kvrecomp

PROMPTS = (
    "Return the ",
    "Open the file and read ",
    'The "with" statement\n********************\n\nThe "with" statement is used to ',
    "Create a new thread.\n\nThe first argument is the function that ",
    "Raised when a sequence subscript is out of range. If an index is not an integer, ",
)
# A text ends with any of those that the tokenizer has: ours and Qwen's, OPT's and Llama 2's, Gemma's, Llama 3's, ...
ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
PADS = ("<|pad|>", "<pad>")


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


def special_tokens(tokenizer: Tokenizer | None, names: Sequence[str]) -> list[int]:
    """The ids of those of these tokens that there are."""
    ids = [] if tokenizer is None else [tokenizer.token_to_id(name) for name in names]
    return [number for number in ids if number is not None]


def encode_one(tokenizer: Tokenizer | None, prompt: str) -> list[int]:
    """The ids of a prompt, beginning with the token that texts begin with.

    Without a tokenizer a prompt is ids in digits, "5 17 2"; of any other text ids are its UTF-8 bytes, which stand for
    nothing to random weights, but for different lengths. Raises UnicodeEncodeError where it is not text.
    """
    # A tokenizer without a post-processor adds nothing: ours, whose texts begin with what ends them.
    begin = [] if tokenizer is None or tokenizer.post_processor is not None else special_tokens(tokenizer, ENDS)[:1]
    text = prompt.encode()  # before the tokenizer, which says less of what is not text
    if tokenizer is not None:
        ids = tokenizer.encode(prompt).ids
    else:
        ids = [int(part) for part in prompt.split()] if is_ids(prompt) else list(text)
    return ids if ids[:1] == begin else [*begin, *ids]


def encode(tokenizer: Tokenizer | None, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded ids int32[batch, longest] of prompts, and bool of their mask; see `encode_one`."""
    rows = []
    for number, prompt in enumerate(prompts, 1):
        try:
            rows.append(encode_one(tokenizer, prompt))
        except UnicodeEncodeError as error:
            raise kvrecomp.PromptError(f"prompt {number} is not text in UTF-8: convert it") from error
    return pad_left(rows, max(map(len, rows)))


def pad_left(rows: Sequence[Sequence[int] | np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as int32[batch, length], zeros on their left, and bool of the mask."""
    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = row
        mask[number, length - len(row) :] = True
    return ids, mask
