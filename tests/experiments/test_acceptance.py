"""Acceptance as the script counts it, against texts that are drafted and checked again in plain Python; its texts."""

import dataclasses
import json
import types

import numpy as np
import pytest
import scripts
import toy

import models
from experiments import acceptance
from experiments.support import texts
from experiments.support.plots import drafts
from experiments.support.source import SHIPPED

CONTEXT, NEW, DRAFTS, LONGEST = 61, 23, 3, 3
WORDS = (f"--contexts={CONTEXT}", f"--new={NEW}", f"--drafts={DRAFTS}", "--texts=code,list,dialogue", "--commit=abc")


@pytest.fixture(scope="module")
def loaded():
    return models.load(SHIPPED, dtype="float32"), models.load_text(SHIPPED)


def likeliest(model, row, new):
    """The text of a row and so many tokens more, by whole forward passes."""
    row = list(row)
    length = len(row) + new  # of one shape
    for place in range(len(row), length):
        padded = np.zeros((1, length), np.int32)
        padded[0, :place] = row
        row.append(int(toy.get(model(toy.put(padded)))[0, place - 1].argmax()))
    return row


def looked_up(text, count):
    """What followed the last tokens, as many of LONGEST as stand in the text before, where they stood last."""
    for size in range(LONGEST, 0, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                following = text[end:]
                return [following[place % len(following)] for place in range(count)]
    return [0] * count


def checked(text, prompt, draft):
    """Right and tried drafts of each round; the first new token comes with the prompt."""
    rounds, place = [], prompt + 1
    while place < len(text):
        proposed, left = draft(text[:place], DRAFTS), text[place:]
        right = 0
        while right < DRAFTS and right + 1 < len(left) and proposed[right] == left[right]:
            right += 1
        place += right + 1
        rounds.append((right, right + (right < DRAFTS and place < len(text))))
    return rounds


def test_drafts_are_counted(loaded, tmp_path, capsys):
    out = tmp_path / "out.json"
    scripts.call(acceptance, *WORDS, "--drafters=prompt_lookup", f"--assistant={SHIPPED}", f"--out={out}")
    document = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == document and "prompt lookup: 0 rows differ" in printed
    assert document["commit"] == "abc" and document["device"] == "cpu"
    lookup, itself = document["rows"]
    assert (lookup["drafter"], itself["drafter"]) == ("prompt lookup", "assistant")
    model, text = loaded
    for number, ids in enumerate(texts.make_texts(["code", "list", "dialogue"], model, text, CONTEXT)):
        rounds = checked(likeliest(model, ids, NEW), CONTEXT, looked_up)
        expected = {"kind": ["code", "list", "dialogue"][number], "passes": len(rounds)}
        expected |= {"tokens_per_pass": (NEW - 1) / len(rounds)}
        expected |= {"right": sum(right for right, _ in rounds), "tried": sum(tried for _, tried in rounds)}
        assert lookup["texts"][number] == expected
    assert len({each["passes"] for each in lookup["texts"]}) > 1  # texts differ
    for each in itself["texts"]:  # of 22 tokens five passes take four each, and one takes two
        assert (each["passes"], each["right"], each["tried"]) == (6, 16, 16)
    facts = {"model": "opt-pydoc", "batch": 3, "prompt": CONTEXT, "new": NEW, "temperature": 0.0, "drafts": DRAFTS}
    assert lookup | facts | {"plan": "activations", "rows_that_differ": 0, "commit": "abc"} == lookup


def test_texts_that_differ_are_counted(loaded, monkeypatch):
    """Here the last tokens of two rows of three, where there are drafts."""
    model, _ = loaded
    generate, ids = acceptance.kvrecomp.generate, np.arange(3 * 17).reshape(3, 17) % 7

    def another(*given, drafts=None, **options):
        found = generate(*given, drafts=drafts, **options)
        if drafts:
            found.sequences[1:, -1] += 1
        return found

    monkeypatch.setattr(acceptance.kvrecomp, "generate", another)
    drafting = acceptance.draftings(["prompt_lookup"], assistant=False, count=2)
    sampling = acceptance.Sampling(do_sample=True, temperature=0.5, seed=3)
    (row,) = acceptance.measure(model, ids, 5, drafting, sampling)
    assert row["rows_that_differ"] == 2 and row["temperature"] == 0.5


def test_rows_of_other_runs_are_kept(tmp_path):
    row = dict.fromkeys(acceptance.RUN, "a") | {"temperature": 0.0}
    other = row | {"temperature": 1.0}
    path = tmp_path / "out.json"
    assert acceptance.kept_rows(str(path), [row], acceptance.RUN) == []
    path.write_text(json.dumps({"rows": [row | {"median_ms": 3.0}, other]}))
    assert acceptance.kept_rows(str(path), [row], acceptance.RUN) == [other]
    path.write_text(json.dumps({"rows": [{"model": "a"}]}))
    with pytest.raises(ValueError, match=r"^--out: .*out.json is no file of this script, and would be lost"):
        acceptance.kept_rows(str(path), [], acceptance.RUN)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drafters=fp9"], "--drafters has 'fp9'; expected some of fp8, int4, prompt_lookup"),
        (["--drafters="], "--drafters is empty, and there is no --assistant: give one"),
        (["--texts=poem"], "there is no text of kind 'poem'; the kinds are documentation, code, licence, list"),
        (["--texts=code,story", "--contexts=2000"], "the story has .* tokens, fewer than 2000: ask for shorter"),
        (["--temperatures=-1"], "--temperatures has '-1'; expected numbers from 0 on"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        scripts.call(acceptance, *words)


def test_a_model_with_a_chat_template_writes_its_own_stories(loaded, monkeypatch):
    model, text = loaded
    template = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}<assistant>"
    chat = dataclasses.replace(text, chat_template=template)
    requests = {"story": ["Go", "Tell more"], "dialogue": ["Who?"]}  # as many as are needed, and one that is not
    monkeypatch.setattr(texts, "ASKED", {kind: [*of_kind, "No"] for kind, of_kind in requests.items()})
    monkeypatch.setattr(texts, "ANSWER", 13)
    monkeypatch.setattr(texts, "FEWEST", 29)
    found = texts.make_texts(["dialogue", "list", "story"], model, chat, 29)
    for kind, ids in (("dialogue", found[0]), ("story", found[2])):
        whole = ""
        for request in requests[kind]:
            asked = f"<user>{request}\n<assistant>"
            ids_asked = list(asked.encode())
            new = likeliest(model, ids_asked, 13)[len(ids_asked) :]
            new = new[: new.index(256)] if 256 in new else new
            whole += asked + bytes(new).decode(errors="replace").strip() + "\n"
        assert ids == list((whole + "<assistant>").encode())[:29]
    assert text.decode(found[1]).startswith("- cyclone\n- foggy\n")


def test_texts_are_long_enough(loaded):
    """For the shipped model's positions, and of a kind each."""
    model, text = loaded
    found = texts.make_texts(texts.KINDS, model, text, 896)
    assert [len(ids) for ids in found] == [896] * 6 and len({tuple(ids) for ids in found}) == 6


def test_rows_that_are_not_of_one_picture():
    row = {"model": "a", "batch": 2, "prompt": 5, "new": 7, "temperature": 0.0, "drafts": 8, "drafter": "fp8 sketch"}
    row |= {"texts": [{"kind": "list", "tokens_per_pass": 2.0}]}
    with pytest.raises(ValueError, match=r"the rows have temperature 0\.0 and 1\.0; expected one of them"):
        drafts.drafted([row, row | {"temperature": 1.0, "drafter": "assistant"}])
    with pytest.raises(ValueError, match="two rows are of one drafter, among fp8 sketch and fp8 sketch: leave one out"):
        drafts.drafted([row, row])


def test_gaps_by_hand():
    """Of three rows the second parts at its second token, where 0.75 is 0.5 above what was taken."""
    logits = np.zeros((2, 3, 4), np.float32)
    logits[1, 1] = [0.0, 0.75, 0.25, -1.0]
    expected = types.SimpleNamespace(logits=logits, sequences=np.array([[9, 1, 1], [9, 2, 1], [9, 3, 3]]))
    assert acceptance.gaps(expected, np.array([[1, 1], [2, 2], [3, 3]])) == [0.5]
    expected.logits = None
    assert acceptance.gaps(expected, np.array([[1, 1], [2, 2], [3, 3]])) == []
