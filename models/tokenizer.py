"""Tokenizers: the one that lies beside a checkpoint, and one of plain bytes that needs no training."""

import os
import reprlib
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from kvrecomp.plan import ModelShape
from models.checkpoint import CheckpointError, first_line, read_object

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, from its tokenizer.json; None where there is none.

    It neither cuts nor pads, whatever it did when it was saved. Tokens that tokenizer_config.json names are special.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise CheckpointError(
            f"{file}: not a readable tokenizer ({first_line(error)}); copy it again from its source"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named = [token for token in special_tokens(path).values() if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in named])
    return tokenizer


def read_tokenizer_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a checkpoint directory's tokenizer_config.json. Raises CheckpointError where it is damaged."""
    file = Path(path) / "tokenizer_config.json"
    return read_object(file) if file.is_file() else {}


def special_tokens(path: str | os.PathLike[str]) -> dict[str, str]:
    """{"bos_token": "<s>", ...} of a checkpoint directory. Raises CheckpointError where its files are damaged."""
    fields, older = read_tokenizer_config(path), Path(path) / "special_tokens_map.json"
    if "added_tokens_decoder" not in fields and older.is_file():
        fields |= read_object(older)
    tokens = {}
    for name in SPECIAL_TOKENS:
        token = fields.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not _is_text(token):
            raise CheckpointError(f"{path}/tokenizer_config.json: {name} is {reprlib.repr(token)}; expected text")
        if token is not None:
            tokens[name] = token
    return tokens


def _is_text(value: Any) -> bool:
    """Whether it is a string, without the halves of surrogate pairs that JSON may have."""
    return isinstance(value, str) and not any(0xD800 <= ord(char) < 0xE000 for char in value)


def check_tokenizer(tokenizer: Tokenizer, shape: ModelShape) -> None:
    """Raise CheckpointError where a tokenizer has ids that the model has not. The model may well have more."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= shape.vocab:
        raise CheckpointError(
            f"the tokenizer has ids up to {largest}, {shape.name} a vocabulary of {shape.vocab}; expected ids below "
            "that: take the tokenizer.json that was published with the weights"
        )


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8 text, 256 is "<|endoftext|>", which begins and ends it, 257 is "<|pad|>".

    Any text survives encoding and decoding. As with other tokenizers, the two special tokens are recognised in text,
    and `decode` leaves them out unless told `skip_special_tokens=False`.
    """
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_characters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # normalized=False and no stripping: a special token must not swallow spaces beside it.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (END_OF_TEXT, PAD)])
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, end)])
    return tokenizer


def _byte_characters() -> list[str]:
    """The character that the ByteLevel format writes for each byte.

    A printable Latin-1 character stands for its own byte; the other bytes, in order, are the characters from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
