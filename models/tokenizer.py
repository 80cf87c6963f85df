"""Tokenizers: the one that lies beside a checkpoint, and one of plain bytes that needs no training."""

import os
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kvrecomp.plan import ModelShape
from models.checkpoint import CheckpointError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, from its tokenizer.json; None where there is none.

    Raises:
        ValueError: a tokenizer.json that cannot be read.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers package raises plain Exception
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: not a readable tokenizer ({reason}); copy it again from its source") from error


def check_tokenizer(tokenizer: Tokenizer, shape: ModelShape) -> None:
    """Raise CheckpointError where a tokenizer has ids that the model has not. The model may well have more."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= shape.vocab:
        raise CheckpointError(
            f"the tokenizer has ids up to {largest}, {shape.name} a vocabulary of {shape.vocab}; expected ids below "
            "that: take the tokenizer.json that was published with the weights"
        )


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8 text, 256 is "<|endoftext|>" (begin and end), 257 is "<|pad|>".

    Any text survives encoding and decoding. As with other tokenizers, the two special tokens are recognised in text,
    and `decode` leaves them out unless told `skip_special_tokens=False`.
    """
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_characters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # normalized=False and no stripping: a special token must not swallow spaces beside it.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (END_OF_TEXT, PAD)])
    return tokenizer


def _byte_characters() -> list[str]:
    """The character that the ByteLevel format writes for each byte.

    A printable Latin-1 character stands for its own byte; the other bytes, in order, are the characters from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
