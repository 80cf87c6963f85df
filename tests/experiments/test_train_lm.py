"""Training the small model: its corpus, its loss, resuming, what it reports and how it refuses."""

import itertools
import json
import math
import sysconfig
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import scripts
from flax import nnx

import models
from experiments import train_lm
from experiments.support import corpus
from experiments.train_lm import Config, train

VERBS = "open close read write flush copy move remove create rename split join parse format".split()
THINGS = "file socket stream directory module window buffer message header queue".split()
DOCUMENTS = [
    f"Return the {thing} to {verb}. If the {thing} cannot {verb}, OSError is raised."
    for verb in VERBS
    for thing in THINGS
]
TINY = Config(
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
    email = Path(sysconfig.get_paths()["stdlib"]) / "email"
    assert corpus.fingerprint(corpus.documents(email)) == corpus.fingerprint(corpus.documents(email))
    assert set(corpus.documents(email)) <= set(installed)
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
    shared, larger = "A paragraph that two topics have in common. " * 3, "What only the larger topic says of it. " * 3
    topics = {"part": shared, "whole": f"{shared}\n\n{larger}"}
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
    ids = [token for text in texts for token in tokenizer.encode(text).ids]  # each begins with what ends texts
    assert corpus.encode(texts).tolist() == [*ids, tokenizer.token_to_id("<|endoftext|>")]
    assert tokenizer.token_to_id("<|pad|>") == corpus.PADDING
    assert tokenizer.get_vocab_size() == corpus.VOCABULARY


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[train_lm.Result, Path]:
    """A run that nothing interrupts, and where its checkpoint and its log are."""
    folder = tmp_path_factory.mktemp("trained")
    return train(TINY, folder / "out", log=folder / "log.json", documents=DOCUMENTS), folder


def test_loss_falls_and_the_report_is_true(trained):
    result, folder = trained
    losses = [point["train_loss_bits_per_byte"] for point in result.curve]
    assert [point["step"] for point in result.curve] == [8, 16, 24]
    assert losses[-1] < losses[0] - 1
    assert result.curve[-1]["heldout_bits_per_byte"] < 5
    assert json.loads((folder / "log.json").read_text()) == result.curve
    summary = json.loads((folder / "out" / "training.json").read_text())
    assert summary == result.summary
    assert summary["corpus"]["sha256"] == corpus.fingerprint(DOCUMENTS)

    # Held-out bits per byte once more: the loaded model's logits, window by window, scored in float64 by NumPy.
    model = models.load(folder / "out")
    heldout = corpus.split(DOCUMENTS).heldout
    stream = [256]
    for text in heldout:
        stream += [*text.encode(), 256]
    bits = 0.0
    for start in range(0, len(stream) - 1, TINY.context):
        window = stream[start : start + TINY.context + 1]
        ids = jax.device_put(np.array([window[:-1]], np.int32))
        logits = np.asarray(jax.device_get(model(ids)), np.float64)[0]
        normalizer = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        bits += (normalizer - logits[np.arange(len(window) - 1), window[1:]]).sum() / math.log(2)
    expected = bits / sum(len(text.encode()) for text in heldout)
    assert summary["heldout_bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert summary["parameters"] == sum(p.size for p in jax.tree.leaves(nnx.state(model)))


def test_resumed_run_equals_an_uninterrupted_one(trained, tmp_path, monkeypatch):
    whole, _ = trained
    paths = tmp_path / "resumed", tmp_path / "work"
    train_steps, calls = train_lm.train_steps, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_steps(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_lm, "train_steps", killed)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, *paths, documents=DOCUMENTS)
    resumed = train(TINY, *paths, documents=DOCUMENTS)
    assert resumed.summary["resumed_at_step"] == 16
    assert resumed.curve == whole.curve
    assert resumed.summary["heldout_bits_per_byte"] == whole.summary["heldout_bits_per_byte"]
    pairs = zip(*(jax.tree.leaves(nnx.state(result.model)) for result in (whole, resumed)))
    assert all(np.array_equal(*jax.device_get(pair)) for pair in pairs)

    with pytest.raises(ValueError, match=r"state of another run: its learning_rate is 0\.01"):
        train(replace(TINY, learning_rate=1e-3), *paths, documents=DOCUMENTS)
    with pytest.raises(ValueError, match="state of another run: its corpus"):
        train(TINY, *paths, documents=DOCUMENTS[1:])


def test_calls_of_any_length_are_one_program_and_change_nothing(trained, tmp_path, monkeypatch):
    compiled = train_lm.train_steps._cache_size()
    monkeypatch.setattr(train_lm, "STEPS_PER_CALL", 3)
    cut = train(TINY, tmp_path / "out", documents=DOCUMENTS)
    assert train_lm.train_steps._cache_size() == compiled
    assert cut.curve[-1]["heldout_bits_per_byte"] == trained[0].curve[-1]["heldout_bits_per_byte"]


def test_all_positions_are_trained(trained):
    before = models.create(TINY.model, dtype="float32", seed=TINY.seed).positions.embedding[...]
    after = trained[0].model.positions.embedding[...]
    moved = np.abs(np.subtract(*jax.device_get((after, before)))).max(axis=1) > 0
    assert moved.tolist() == [False, False] + [True] * TINY.positions  # OPT never uses the first two


def test_layers_without_dropout_are_the_plain_forward_pass():
    model = models.create(TINY.model, dtype="float32")
    ids = jax.device_put(np.arange(24, dtype=np.int32).reshape(2, 12))
    ours = jax.jit(train_lm.forward)(model, ids, jax.device_put(np.zeros(2, np.int32)))
    np.testing.assert_allclose(*jax.device_get((ours.transpose(1, 0, 2), model(ids))), atol=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype=int8"], "dtype is 'int8'; expected one of bfloat16"),
        (["--compute_dtype=float16"], "compute_dtype is 'float16'; expected one of bfloat16, float32"),
        (["--context=64", "--positions=48"], "context 64 is larger than the model's 48 positions"),
        (["--heads=5"], "OPT: hidden size 192 does not divide into 5 heads"),
        (["--layers=0"], "OPT: layers is 0; expected a positive integer"),
        (["--steps=0"], "training: steps is 0; expected a positive integer"),
        (["--dropout=1"], "dropout 1.0; expected a positive rate"),
        (["--seed=-1"], "seed is -1"),
        (["--output={theirs}"], "theirs' is not a checkpoint of ours; choose another directory or remove it"),
        (["--work_dir={tmp}/out/state"], "out/state is inside output, which is replaced when saving"),
        (["--work_dir={theirs}/thesis.txt"], "thesis.txt: File exists"),
        (["--log={tmp}/out/log.json"], "out/log.json is inside output, which is replaced when saving"),
    ],
)
def test_refusals_are_one_line_and_nothing_is_written(tmp_path, flags, message):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("do not replace")
    with pytest.raises(SystemExit) as refusal:
        scripts.call(
            train_lm, f"--output={tmp_path}/out", *(flag.format(tmp=tmp_path, theirs=theirs) for flag in flags)
        )
    line = str(refusal.value.code)
    assert line.startswith("error: ") and message in line and "\n" not in line
    assert [path.name for path in tmp_path.rglob("*")] == ["theirs", "thesis.txt"]


def test_a_log_that_is_a_directory(tmp_path):
    with pytest.raises(IsADirectoryError):
        train(TINY, tmp_path / "out", log=tmp_path, documents=DOCUMENTS)


def test_corpus_too_short(tmp_path):
    with pytest.raises(ValueError, match=r"train documents are .* tokens; at least 33 are needed"):
        train(TINY, tmp_path / "out", documents=["A single document."])


def test_every_setting_is_a_flag(tmp_path, monkeypatch):
    """And they come to what they say."""
    seen = []
    monkeypatch.setattr(train_lm, "train", lambda *given: seen.append(given) or train_lm.Result(None, [], {}))
    settings = [f"--{name}={value}" for name, value in vars(TINY).items()]
    scripts.call(train_lm, *settings, "--output=a", "--work_dir=b", "--log=c")
    scripts.call(train_lm, "--output=a")
    assert seen == [(TINY, "a", "b", "c"), (Config(), "a", None, None)]
