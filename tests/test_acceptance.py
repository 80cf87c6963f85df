"""How often drafts were right is counted, kept, and told to who chooses among drafts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import toy
from toy_drafts import BATCH, NEW, PROMPT, TAIL, TEXTS, known, make_plan, run, written

import kvrecomp
from kvrecomp import acceptance
from kvrecomp.acceptance import FEWEST_TRIED, MOST_TRIED, acceptance_path, keep, with_acceptance
from kvrecomp.plan import Drafting, PlanError
from kvrecomp.predict.scheduler import DRAFTINGS

SHAPE = toy.model().shape
FP8 = Drafting("sketch", 3, codec="fp8")


def tried_in(text, right, most, end):
    """Of one row, by passes in plain Python: drafts up to the first wrong one, each pass taking those before it and one
    token more, up to one that ends the text; the first token is the prompt's."""
    tried, place = 0, 1
    while place < len(right) and end not in text[:place]:
        drafts = right[place : min(place + most, len(right) - 1)]
        taken = drafts.index(False) if False in drafts else len(drafts)
        ended = end in text[place : place + taken + 1]
        tried += text.index(end, place) - place if ended else min(taken + 1, len(drafts))
        place += taken + 1
    return tried


@pytest.mark.parametrize("most", [1, 4])
def test_what_was_tried_is_counted(most):
    texts = written(run(make_plan()))
    right = np.random.default_rng(most).random((BATCH, NEW)) < 0.7
    plan = make_plan(drafting=Drafting("prompt_lookup", most, ahead=NEW))
    for end in (-1, int(texts[0, 1]), int(texts[1, 6]), int(texts[2, 5])):
        found = run(plan, known(texts, right), eos=[end])
        expected = [tried_in(*row, most, end) for row in zip(texts.tolist(), right.tolist())]
        assert found.tried.tolist() == expected
    assert (found.accepted <= found.tried).all() and (found.tried <= found.drafted).all()


def test_generate_keeps_it_and_goes_by_it():
    plan = kvrecomp.named_plan("split:0.5", SHAPE, kvrecomp.Workload(BATCH, PROMPT, NEW), tail=TAIL)
    plan = replace(plan, drafting=FP8)
    counts = np.zeros(2, int)
    for _ in range(2):
        found = kvrecomp.generate(toy.model(), TEXTS.ids, TEXTS.mask, max_new_tokens=NEW, plan=plan, drafts=3)
        counts += int(found.accepted.sum()), int(found.tried.sum())
    (of_model,) = json.loads(acceptance_path().read_text()).values()
    assert of_model == {"fp8 sketch": counts.tolist()} and counts[1] > 10
    keep(SHAPE, FP8, 0, FEWEST_TRIED)
    told = with_acceptance(SHAPE, FP8)
    assert told.acceptance == pytest.approx(counts[0] / (counts[1] + FEWEST_TRIED))
    assert told == FP8  # programs are the same
    fp8, *others = with_acceptance(SHAPE, "auto")
    assert fp8.acceptance == told.acceptance and others == list(DRAFTINGS[1:])
    assert [each.acceptance for each in others] == [each.acceptance for each in DRAFTINGS[1:]]
    assert with_acceptance(SHAPE, None) is None
    assert with_acceptance(replace(SHAPE, name="another"), FP8).acceptance == FP8.acceptance


def test_few_drafts_say_nothing_and_old_ones_count_less():
    keep(SHAPE, FP8, 0, FEWEST_TRIED - 1)
    assert with_acceptance(SHAPE, FP8).acceptance == FP8.acceptance
    keep(SHAPE, FP8, 0, 2 * MOST_TRIED)
    assert with_acceptance(SHAPE, FP8).acceptance == 0
    keep(SHAPE, FP8, MOST_TRIED, MOST_TRIED)
    assert with_acceptance(SHAPE, FP8).acceptance == pytest.approx(0.5)  # the first ones weigh half by now
    keep(SHAPE, None, 1, 1)
    keep(SHAPE, Drafting("prompt_lookup", 2), 0, 0)
    assert list(*json.loads(acceptance_path().read_text()).values()) == ["fp8 sketch"]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": {"fp8 sketch": [3, 2]}}', '{"a": {"fp8 sketch": 5}}', '{"a": 1}'])
def test_a_file_that_is_none_of_these_is_said_and_made_anew(text, caplog):
    acceptance_path().write_text(text)
    assert with_acceptance(SHAPE, FP8).acceptance == FP8.acceptance
    (record,) = caplog.records
    assert "counted anew" in record.message and "\n" not in record.message
    keep(SHAPE, FP8, FEWEST_TRIED, FEWEST_TRIED)
    assert with_acceptance(SHAPE, FP8).acceptance == 1


def test_where_it_cannot_be_kept_decoding_goes_on(monkeypatch, tmp_path, caplog):
    (tmp_path / "kvrecomp").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep(SHAPE, FP8, 1, 2)
    assert "set XDG_CACHE_HOME" in caplog.records[-1].message
    assert acceptance.LOG.name == "kvrecomp"


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_an_acceptance_is_a_probability(share):
    with pytest.raises(PlanError, match=r"acceptance is .*; expected a probability, from 0 to 1"):
        Drafting("prompt_lookup", 2, acceptance=share)
