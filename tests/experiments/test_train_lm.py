"""Training the small model: its corpus, its loss, resuming, what it reports and how it refuses."""

import itertools
import json
import math
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import models
from experiments import train_lm
from experiments.support import corpus
from experiments.train_lm import Config, train

ROOT = Path(__file__).parent.parent.parent
VERBS = "open close read write flush copy move remove create rename split join parse format".split()
THINGS = "file socket stream directory module window buffer message header queue".split()
DOCUMENTS = [
    f"Return the {thing} to {verb}. If the {thing} cannot {verb}, OSError is raised."
    for verb in VERBS
    for thing in THINGS
]


@pytest.fixture
def tiny(tmp_path) -> Config:
    return Config(
        output=str(tmp_path / "out"),
        steps=24,
        batch=4,
        context=32,
        positions=48,
        layers=2,
        hidden=32,
        heads=2,
        learning_rate=1e-2,
        dropout=0.1,
        eval_every=8,
        dtype="float32",
        compute_dtype="float32",
    )


# --- corpus -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed() -> list[str]:
    return corpus.documents()


def test_corpus_of_this_python_is_large_deterministic_and_clean(installed):
    assert sum(len(document.encode()) for document in installed) > 1_000_000
    some = Path(sysconfig.get_paths()["stdlib"]) / "email"
    assert corpus.fingerprint(corpus.documents(some)) == corpus.fingerprint(corpus.documents(some))
    assert set(corpus.documents(some)) <= set(installed)
    assert len(set(installed)) == len(installed)
    assert min(map(len, installed)) >= corpus.SHORTEST
    assert any("Walk" in document or "Directory tree generator" in document for document in installed)


def test_split_is_deterministic_whole_and_shares_no_paragraph(installed):
    parts = corpus.split(installed)
    assert parts == corpus.split(installed)
    assert sorted(itertools.chain(*parts)) == sorted(installed)
    sides = [{paragraph for document in part for paragraph in corpus.paragraphs(document)} for part in parts]
    assert sides[0].isdisjoint(sides[1]) and sides[0].isdisjoint(sides[2]) and sides[1].isdisjoint(sides[2])
    whole = sum(map(len, installed))
    for part in (parts.validation, parts.heldout):
        assert 0.01 < sum(map(len, part)) / whole < 0.08


def test_documents_are_read_not_run(tmp_path):
    (tmp_path / "pydoc_data").mkdir()
    quoted, own = "A paragraph that two topics have in common. " * 3, "What only the larger topic says of it. " * 3
    topics = {"part": quoted, "whole": f"{quoted}\n\n{own}"}
    (tmp_path / corpus.TOPICS).write_text(f"topics = {topics!r}\n")
    (tmp_path / "module.py").write_text(
        '"""The module, which must never be executed by anybody."""\n'
        "raise SystemExit\n"
        "class Thing:\n"
        '    """A thing\n\n        indented less than it was, and long enough to be kept.\n    """\n'
        "    async def act(self):\n"
        '        """Short."""\n'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_it.py").write_text('"""A test, which nobody reads as documentation of anything."""\n')
    assert corpus.documents(tmp_path) == [
        topics["whole"].strip(),
        "The module, which must never be executed by anybody.",
        "A thing\n\nindented less than it was, and long enough to be kept.",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no documentation strings"):
        corpus.documents(tmp_path / "empty")


def test_encoding_agrees_with_the_tokenizer():
    tokenizer = models.byte_tokenizer()
    texts = ["Grüße, “quoted”\n", "x" * 50]
    ids = [corpus.END_OF_TEXT]
    for text in texts:
        ids += [*tokenizer.encode(text).ids, tokenizer.token_to_id("<|endoftext|>")]
    assert corpus.encode(texts).tolist() == ids
    assert tokenizer.token_to_id("<|pad|>") == corpus.PADDING
    assert tokenizer.get_vocab_size() == corpus.VOCABULARY


# --- training ---------------------------------------------------------------------------------------------------------


def test_loss_falls_and_the_report_is_true(tiny, tmp_path):
    config = replace(tiny, log=str(tmp_path / "log.json"))
    result = train(config, DOCUMENTS)
    losses = [record["train_loss_bits_per_byte"] for record in result.log]
    assert [record["step"] for record in result.log] == [8, 16, 24]
    assert losses[-1] < losses[0] - 1
    assert result.log[-1]["heldout_bits_per_byte"] < 5
    assert json.loads(Path(config.log).read_text()) == result.log
    summary = json.loads((Path(config.output) / "training.json").read_text())
    assert summary == result.summary
    assert summary["corpus"]["sha256"] == corpus.fingerprint(DOCUMENTS)
    assert "--steps=24" in summary["command"] and "--seed=0" in summary["command"]

    # Held-out bits per byte once more: the loaded model's logits, window by window, scored in float64 by NumPy.
    model = models.load(config.output)
    heldout = corpus.split(DOCUMENTS).heldout
    stream = [256]
    for text in heldout:
        stream += [*text.encode(), 256]
    bits = 0.0
    for start in range(0, len(stream) - 1, config.context):
        window = stream[start : start + config.context + 1]
        ids = jax.device_put(np.array([window[:-1]], np.int32))
        logits = np.asarray(jax.device_get(model(ids)), np.float64)[0]
        normalizer = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        bits += (normalizer - logits[np.arange(len(window) - 1), window[1:]]).sum() / math.log(2)
    expected = bits / sum(len(text.encode()) for text in heldout)
    assert summary["heldout_bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert summary["parameters"] == sum(p.size for p in jax.tree.leaves(train_lm.nnx.state(model)))


def test_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path, monkeypatch):
    whole = train(tiny, DOCUMENTS)
    config = replace(tiny, output=str(tmp_path / "resumed"), work_dir=str(tmp_path / "work"))
    train_steps, calls = train_lm.train_steps, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_steps(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_lm, "train_steps", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, DOCUMENTS)
    resumed = train(config, DOCUMENTS)
    assert resumed.summary["resumed_at_step"] == 16
    assert resumed.log == whole.log
    assert resumed.summary["heldout_bits_per_byte"] == whole.summary["heldout_bits_per_byte"]
    pairs = zip(*(jax.tree.leaves(train_lm.nnx.state(result.model)) for result in (whole, resumed)))
    assert all(np.array_equal(*jax.device_get(pair)) for pair in pairs)

    with pytest.raises(ValueError, match=r"state of another run: its learning_rate is 0\.01"):
        train(replace(config, learning_rate=1e-3), DOCUMENTS)
    with pytest.raises(ValueError, match="state of another run: its corpus"):
        train(config, DOCUMENTS[1:])


def test_calls_of_any_length_are_one_program_and_change_nothing(tiny, tmp_path, monkeypatch):
    whole = train(tiny, DOCUMENTS)
    compiled = train_lm.train_steps._cache_size()
    monkeypatch.setattr(train_lm, "STEPS_PER_CALL", 3)
    cut = train(tiny, DOCUMENTS)
    assert train_lm.train_steps._cache_size() == compiled
    assert cut.log[-1]["heldout_bits_per_byte"] == whole.log[-1]["heldout_bits_per_byte"]


def test_all_positions_are_trained(tiny):
    before = models.create(tiny.model, dtype="float32", seed=tiny.seed).positions.embedding[...]
    after = train(tiny, DOCUMENTS).model.positions.embedding[...]
    moved = np.abs(np.subtract(*jax.device_get((after, before)))).max(axis=1) > 0
    assert moved.tolist() == [False, False] + [True] * tiny.positions  # OPT never uses the first two


def test_layers_without_dropout_are_the_plain_forward_pass(tiny):
    model = models.create(tiny.model, dtype="float32")
    ids = jax.device_put(np.arange(24, dtype=np.int32).reshape(2, 12))
    ours = jax.jit(train_lm.forward)(model, ids, jax.device_put(np.zeros(2, np.int32)))
    np.testing.assert_allclose(*jax.device_get((ours.transpose(1, 0, 2), model(ids))), atol=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of bfloat16"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'; expected one of bfloat16, float32"),
        ({"context": 64}, "context 64 is larger than the model's 48 positions"),
        ({"heads": 3}, "hidden size 32 does not divide into 3 heads"),
        ({"steps": 0}, "steps is 0; it must be greater than zero"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_be(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny, **changes)


def test_paths_that_cannot_be(tiny, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("do not replace")
    with pytest.raises(ValueError, match="not a checkpoint of ours"):
        replace(tiny, output=str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match=r"work_dir .* is inside output"):
        replace(tiny, work_dir=str(Path(tiny.output) / "state"))
    with pytest.raises(ValueError, match=r"work_dir .* is a file; give the name of a directory"):
        replace(tiny, work_dir=str(tmp_path / "theirs" / "thesis.txt"))
    with pytest.raises(ValueError, match=r"log .* is a directory; give the name of a file in it"):
        replace(tiny, log=str(tmp_path / "theirs"))


def test_corpus_too_short(tiny):
    with pytest.raises(ValueError, match=r"train documents are .* tokens; at least 33 are needed"):
        train(tiny, ["A single document."])


def test_the_command_says_one_clear_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "experiments/train_lm.py", f"--output={tmp_path / 'out'}", "--heads=5"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "error: hidden size 192 does not divide into 5 heads"
    assert not (tmp_path / "out").exists()
