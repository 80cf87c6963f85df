"""The byte tokenizer, and tokenizers beside a checkpoint."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import CheckpointError, OPTConfig, byte_tokenizer, check_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(text):
    begin, *ids = TOKENIZER.encode(text).ids
    assert begin == 256 and TOKENIZER.decode(ids, skip_special_tokens=False) == text
    if "<|" not in text:
        assert ids == list(text.encode())


def test_ids_are_bytes_in_order():
    assert TOKENIZER.encode("A z\n\x00\x7f\t  é€😀").ids == [256, *"A z\n\x00\x7f\t  é€😀".encode()]
    assert TOKENIZER.get_vocab_size() == 258
    assert len({TOKENIZER.id_to_token(i) for i in range(258)}) == 258


def test_special_tokens():
    assert TOKENIZER.token_to_id("<|endoftext|>") == 256 and TOKENIZER.token_to_id("<|pad|>") == 257
    assert TOKENIZER.encode("a <|endoftext|> b").ids == [256, 97, 32, 256, 32, 98]
    assert TOKENIZER.decode([97, 256, 98, 257]) == "ab"


def test_through_a_file(tmp_path):
    assert load_tokenizer(tmp_path) is None
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None and loaded.encode("naïve <|pad|>").ids == TOKENIZER.encode("naïve <|pad|>").ids
    assert loaded.decode(list("naïve".encode())) == "naïve"


def test_a_damaged_file_is_one_clear_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_vocabulary_that_does_not_match():
    """A model may have more ids than its tokenizer, for sizes that suit its device, but not fewer."""
    sizes = {"layers": 1, "hidden": 8, "heads": 2, "intermediate": 8, "positions": 9}
    for vocab in (258, 259, 97_000):
        check_tokenizer(TOKENIZER, OPTConfig("fits", vocab=vocab, **sizes).shape)
    with pytest.raises(CheckpointError, match="has ids up to 257, short a vocabulary of 257; expected") as raised:
        check_tokenizer(TOKENIZER, OPTConfig("short", vocab=257, **sizes).shape)
    assert "\n" not in str(raised.value)
    added = byte_tokenizer()
    added.add_special_tokens(["<|one more|>"])
    with pytest.raises(CheckpointError, match="up to 258"):
        check_tokenizer(added, OPTConfig("short", vocab=258, **sizes).shape)
