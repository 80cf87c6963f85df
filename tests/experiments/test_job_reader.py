"""Reading a job's input: lines as prompts, what is wrong with others, doubled ids, what tells files apart."""

import json

import numpy as np
import pytest

import models
from experiments.support.job import reader
from experiments.support.job.reader import Reader, checkpoint_hash, survey
from kvrecomp.plan import MIB

BYTES = models.TextProcessor(models.byte_tokenizer())
SHAPE = models.OPTConfig("tiny", layers=1, hidden=8, heads=2, intermediate=8, vocab=258, positions=40).shape


@pytest.fixture
def reader_of(tmp_path):
    """Makes a reader of a file with these lines, or this content."""

    def make(*lines, text=BYTES, **options):
        content = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
        (tmp_path / "in.jsonl").write_bytes(content)
        return Reader(tmp_path / "in.jsonl", options.pop("shape", SHAPE), text, 9, **options)

    return make


def test_prompts_are_text_or_ids(reader_of):
    made = reader_of(
        '{"id": "a", "prompt": "hé"}',
        '{"id": -3, "prompt": [257, 0, 5], "more": [1]}',
        '{"prompt": "<|endoftext|>b"}',
        '{"id": "1", "prompt": "5 7"}',
    )
    lines = list(made.lines())
    assert [line.id for line in lines] == ["a", -3, 3, "1"]
    assert [line.prompt for line in lines] == ["hé", [257, 0, 5], "<|endoftext|>b", "5 7"]
    # Text begins with what ends texts; ids are taken as they are.
    assert [line.ids.tolist() for line in lines] == [
        [256, 104, 195, 169],
        [257, 0, 5],
        [256, 256, 98],
        [256, 53, 32, 55],
    ]
    assert all(line.ids.dtype == np.int32 and not line.error for line in lines)


def test_chats_are_messages_or_text_of_a_user(reader_of):
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    text = models.TextProcessor(models.byte_tokenizer(), chat_template=template)
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "é"}]
    given = [{"messages": messages}, {"prompt": "hi"}, {"prompt": [5, 7]}, {"prompt": None, "messages": messages[:1]}]
    given += [{"prompt": "a", "messages": messages}, {"messages": "hi"}, {"messages": [5]}, {"messages": []}]
    lines = list(reader_of(*map(json.dumps, given), text=text, chat=True).lines())
    assert [line.ids.tolist() for line in lines[:4]] == [
        list("s:be;u:é;".encode()),
        list(b"u:hi;"),
        [5, 7],
        list(b"s:be;"),
    ]
    assert [line.prompt for line in lines[:4]] == [messages, "hi", [5, 7], messages[:1]]
    assert "both a prompt and messages" in lines[4].error and "is empty" in lines[7].error
    assert all("its messages are not a list such as" in line.error for line in lines[5:7])
    (line,) = reader_of(json.dumps(given[0]), text=text).lines()
    assert line.error == "it has messages, which --chat is for"
    refusing = models.TextProcessor(models.byte_tokenizer(), chat_template="{{ raise_exception('no system') }}")
    (line,) = reader_of(json.dumps(given[0]), text=refusing, chat=True).lines()
    assert line.error == "its prompt cannot be read: the chat template does not take the messages (no system)"


def test_lines_end_with_newlines_only_and_blank_ones_are_skipped(reader_of):
    """The mark that Windows puts first and its returns are no part of a line; other separators of Unicode are."""
    given = b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \r\n{"prompt": "b\xe2\x80\xa8\xc2\x85c"}\n\n{"prompt": "d"}'
    lines = list(reader_of(given).lines())
    assert [(line.index, line.number, line.id, line.prompt) for line in lines] == [
        (0, 1, 1, "a"),
        (1, 4, 4, "b\u2028\x85c"),
        (2, 6, 6, "d"),
    ]
    assert [line.number for line in reader_of(given).lines(skip=1)] == [4, 6]
    assert list(reader_of(b"\n \n").lines()) == list(reader_of(b"").lines()) == []


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (b"{", "it is not JSON (Expecting property name enclosed in double quotes, column 2)"),
        (b"text", "it is not JSON (Expecting value, column 1)"),
        (b'{"prompt": "a"} {', "it is not JSON (Extra data, column 17)"),
        (b"[" * 100_000, "it is not JSON (maximum recursion depth"),
        (b"1" * 5000, "it is not JSON (Exceeds the limit"),
        (b'{"prompt": "\xff"}', "it is not text in UTF-8 (byte 12)"),
        (b'"a"', "it is not an object such as"),
        (b"{}", "it has no prompt"),
        (b'{"promt": "a"}', "it has no prompt"),
        (b'{"prompt": null}', "it has no prompt"),
        (b'{"prompt": ""}', "its prompt is empty"),
        (b'{"prompt": []}', "its prompt is empty"),
        (b'{"prompt": 5}', "its prompt is neither text nor a list of token ids"),
        (b'{"prompt": [1, 2.0]}', "its prompt is neither text nor a list of token ids"),
        (b'{"prompt": [1, true]}', "its prompt is neither text nor a list of token ids"),
        (b'{"prompt": ["a"]}', "its prompt is neither text nor a list of token ids"),
        (b'{"prompt": [1, 258]}', "token id 258 is outside the vocabulary of 258 tokens"),
        (b'{"prompt": [1, -1]}', "token id -1 is outside the vocabulary of 258 tokens"),
        (b'{"prompt": [1' + b"0" * 99 + b"]}", "token id 1" + "0" * 59 + "... is outside the vocabulary"),
        (b'{"prompt": "\\ud800"}', "its prompt has half a surrogate pair, which is not text"),
        (b'{"id": 1.5, "prompt": "a"}', "its id is neither a string nor a whole number"),
        (b'{"id": true, "prompt": "a"}', "its id is neither a string nor a whole number"),
        (b'{"prompt": "' + b"a" * 31 + b'"}', "a prompt of 32 and 9 new tokens need 41 positions; tiny has 40"),
    ],
)
def test_what_is_wrong_with_a_line(reader_of, given, error):
    before, line, after = reader_of('{"prompt": "a"}', given + b"\n", '{"prompt": "b"}').lines()
    assert line.error.startswith(error) and len(line.error) < 200 and "\n" not in line.error
    assert (line.index, line.number, line.id, line.prompt, line.ids.tolist()) == (1, 2, None, None, [])
    assert [before.prompt, after.prompt] == ["a", "b"] and not before.error and not after.error


def test_a_line_with_an_error_keeps_its_id_and_the_longest_prompt_fits(reader_of):
    wrong, right = reader_of('{"id": "a", "prompt": ""}', json.dumps({"prompt": "a" * 30})).lines()
    assert wrong.id == "a" and wrong.error
    assert not right.error and len(right.ids) == 31


def test_without_a_tokenizer_prompts_are_ids(reader_of):
    given = ['{"prompt": "5 17 2"}', '{"prompt": [5, 17]}', '{"prompt": "ab"}', '{"prompt": "5 999"}']
    lines = list(reader_of(*given, text=models.TextProcessor()).lines())
    assert [line.ids.tolist() for line in lines] == [[5, 17, 2], [5, 17], [], []]
    assert "no tokenizer.json" in lines[2].error and "999 is outside" in lines[3].error
    lines = list(reader_of(*given, text=models.TextProcessor(), any_text=True).lines())
    assert lines[2].ids.tolist() == [97, 98] and not lines[2].error
    (line,) = reader_of('{"prompt": "' + "1" * 5000 + '"}', text=models.TextProcessor()).lines()
    assert line.error.startswith("its prompt cannot be read")


def test_a_survey_counts_lines_errors_and_lengths(reader_of):
    seen = []
    found = survey(
        reader_of('{"prompt": "ab"}', "", "x", '{"prompt": [1, 2, 3]}', '{"prompt": [7]}', "{}"), seen.append
    )
    assert (found.records, dict(found.lengths)) == (5, {3: 2, 1: 1})
    assert [line.number for line in seen] == [3, 6]
    assert survey(reader_of(b""), seen.append).records == 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (['"a"', '"b"', '"a"'], 'lines 1 and 3 have the same id, "a"'),
        (["5", '"5"', "6", "7", "6", "6", "5"], "lines 3 and 5 have the same id, 6"),
        (["2", "null"], "lines 1 and 2 have the same id, 2 (a line without an id has its number)"),
        (['"é"', "1", '"\\u00e9"'], "lines 1 and 3 have the same id"),
        (['"' + "x" * 999 + '"'] * 2, "x...,"),
    ],
)
def test_doubled_ids_are_refused(reader_of, ids, message):
    made = reader_of(*(f'{{"id": {name}, "prompt": "a"}}' for name in ids))
    with pytest.raises(ValueError) as refusal:
        survey(made, lambda line: None)
    assert message.replace("x...,", "xxx...") in str(refusal.value) and len(str(refusal.value)) < 300


def test_ids_that_are_not_doubled(reader_of):
    """Numbers are not strings, and a line without an id that has an error has no name."""
    made = reader_of('{"id": 1, "prompt": "a"}', '{"id": "1", "prompt": "a"}', '{"id": 4, "prompt": "a"}', "x", "x")
    assert survey(made, lambda line: None).records == 5


def test_a_doubled_id_of_a_line_with_an_error_is_one_too(reader_of):
    with pytest.raises(ValueError, match="lines 1 and 2"):
        survey(reader_of('{"id": 1, "prompt": "a"}', '{"id": 1, "prompt": ""}'), lambda line: None)


def test_a_checkpoint_is_told_apart_by_contents_names_and_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PIECES", 3)

    def made(name, **files):
        (tmp_path / name / "deep").mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / name / "deep" / file).write_bytes(content)
        return checkpoint_hash(tmp_path / name)

    first = made("a", x=b"abc", y=b"")
    assert made("b", x=b"abc", y=b"") == first
    others = [made("c", x=b"abd", y=b""), made("d", x=b"ab", y=b"c"), made("e", z=b"abc", y=b""), made("f", x=b"abc")]
    assert len({first, *others}) == 5
    # Of 5 MiB, three pieces: the first, the third and the last. Of 3 MiB, all.
    large = bytearray(5 * MIB)
    plain, seen = made("g", x=bytes(large)), []
    for piece in range(5):
        large[piece * MIB + 9] = 1
        seen.append(made(f"h{piece}", x=bytes(large)) != plain)
        large[piece * MIB + 9] = 0
    assert seen == [True, False, True, False, True]
    assert made("k", x=bytes(6 * MIB)) != plain
    assert made("i", x=bytes(3 * MIB)) != made("j", x=bytes(2 * MIB) + b"\1" + bytes(MIB - 1))
