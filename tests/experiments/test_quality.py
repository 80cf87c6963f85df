"""Losses as the script counts them, against whole forward passes and plain NumPy."""

import json

import numpy as np
import pytest
import scripts
import toy

import models
from experiments import quality
from experiments.support import texts
from experiments.support.plots import losses
from experiments.support.results import tables
from experiments.support.source import SHIPPED

PROMPT, NEW, TAIL = 73, 13, 5
WORDS = (f"--prompt={PROMPT}", f"--new={NEW}", f"--tail={TAIL}", "--texts=code,list", "--commit=abc")


def log2(logits):
    logits = logits.astype(np.float64)
    return (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)) / np.log(2)


def test_bits_without_loss_are_those_of_a_forward_pass(tmp_path, capsys):
    """And a codec that keeps everything loses nothing; what is lost by another is between what it may be."""
    out = tmp_path / "out.json"
    scripts.call(quality, *WORDS, "--plans=keys_values,activations+int4,flexgen:1", f"--out={out}")
    document = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == document and document["commit"] == "abc"
    same, lossy, worst = document["rows"]
    model, text = models.load(SHIPPED, dtype="float32"), models.load_text(SHIPPED)
    ids = np.array(texts.make_texts(["code", "list"], model, text, PROMPT + NEW + 1))
    found = log2(toy.get(model(toy.put(ids.astype(np.int32)))))[:, PROMPT:-1]
    bits = -np.take_along_axis(found, ids[:, PROMPT + 1 :, None], axis=-1)[..., 0].mean(axis=1)
    assert [row["kind"] for row in same["texts"]] == ["code", "list"]
    np.testing.assert_allclose([row["bits_exact"] for row in same["texts"]], bits, atol=1e-5)
    assert same["bits"] == pytest.approx(bits.mean(), abs=1e-5) and same["loss"] == pytest.approx(0, abs=1e-5)
    assert same["divergence"] == pytest.approx(0, abs=1e-6) and same["agreement"] == 1
    assert 1e-6 < lossy["divergence"] < worst["divergence"] and worst["agreement"] < 1
    assert worst["loss"] == pytest.approx(worst["bits"] / worst["bits_exact"] - 1)
    # Of bfloat16: 41 tokens are one group of a channel, the first 32 are plain; the baseline's groups have 64 channels.
    assert same["bytes_of_plain"] == 1
    assert lossy["bytes_of_plain"] == pytest.approx((0.5 + 4 / 41) / 4)
    assert worst["bytes_of_plain"] == pytest.approx((1 / 8 + 4 / 64) / 2)
    facts = {"model": "opt-pydoc", "batch": 2, "prompt": PROMPT, "new": NEW, "tail": TAIL, "plan": "activations+int4"}
    assert lossy | facts == lossy


def test_divergence_and_agreement(monkeypatch):
    """Of probabilities that are known."""
    sure, unsure = np.log([0.75, 0.25]), np.log([0.25, 0.75])
    given = iter([[[sure, unsure], [sure, sure]], [[sure, sure], [unsure, sure]]])
    monkeypatch.setattr(quality, "forced", lambda *_: iter(np.array(next(given), np.float32)))
    model = models.load(SHIPPED, dtype="float32")
    ((name, rows),) = quality.measure(model, np.array([[7, 7, 0, 0], [7, 7, 0, 1]]), 1, 1, ["activations+int8"])
    assert name == "activations+int8"
    gap = 0.5 * np.log2(3)  # of one from the other
    first, second = rows
    assert first == pytest.approx(
        {"bits": 1.2075, "bits_exact": 0.4150, "divergence": gap / 2, "agreement": 0.5}, abs=1e-3
    )
    assert second["divergence"] == pytest.approx(gap / 2) and second["agreement"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plans=flexgen:9"], "--plans has 'flexgen:9'; expected flexgen:B, with B bits from 1 to 8"),
        (["--plans=activations+zip"], "there is no codec 'zip'; the codecs are plain, packed, int8, int4"),
        (["--plans="], "--plans is empty"),
        (["--texts=poem"], "poem"),
        (["--prompt=1024"], "1024 and 13 new tokens need 1037 positions"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(SystemExit) as refused:
        scripts.call(quality, *WORDS, *words)
    assert message in str(refused.value) and "\n" not in str(refused.value)


ROW = {"model": "opt-6.7b", "prompt": 5, "new": 7, "bits": 2.02, "bits_exact": 2.0, "loss": 0.01, "agreement": 0.975}


def test_what_is_drawn_and_said(tmp_path):
    rows = [
        ROW | {"plan": "activations+int4", "bytes_of_plain": 0.133, "divergence": 0.00123},
        ROW | {"plan": "flexgen:4", "bytes_of_plain": 0.281, "divergence": 0.0345},
    ]
    found = losses.lost(rows)
    assert losses.said(found) == (
        "OPT-6.7B with loss and without, 7 tokens after 5, divergence in bits a token: "
        "activations+int4 0.0012, flexgen:4 0.035"
    )
    losses.draw(found, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="the rows have prompt 5 and 9; expected one of them"):
        losses.lost([*rows, rows[0] | {"prompt": 9}])
    assert tables.losses(rows[:1]).splitlines()[2] == (
        "| OPT-6.7B | 5 + 7 | `activations+int4` | 0.133 | 2.0200 | 2.0000 | +1.000% | 0.00123 | 97.5% |"
    )
