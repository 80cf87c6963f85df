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
)


# --- corpus -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed() -> list[str]:
    return corpus.documents()


def test_corpus_of_this_python_is_large_deterministic_and_clean(installed):
    assert sum(len(document.encode()) for document in installed) > 1_000_000
    assert len(set(installed)) == len(installed) and not any(map(str.isspace, installed))
    assert any("Walk" in document or "Directory tree generator" in document for document in installed)
    email = Path(sysconfig.get_paths()["stdlib"]) / "email"
    strings = list(corpus.documentation_strings(email))
    assert strings == list(corpus.documentation_strings(email)) and set(strings) <= set(installed)


def test_split_is_deterministic_and_shares_no_paragraph(installed):
    """What is left out repeats the others."""
    parts = corpus.split(installed)
    assert parts == corpus.split(installed[::-1])
    train, validation, heldout = ({*itertools.chain(*map(corpus.paragraphs, part))} for part in parts)
    assert train.isdisjoint(validation | heldout) and validation.isdisjoint(heldout)
    kept = {*itertools.chain(*parts)}
    assert sum(map(len, kept)) > 0.9 * sum(map(len, installed)) and len(kept) == sum(map(len, parts))
    assert all({*corpus.paragraphs(text)} & (train | validation | heldout) for text in {*installed} - kept)
    for part in (parts.validation, parts.heldout):
        assert 0.01 < sum(map(len, part)) / sum(map(len, installed)) < 0.08


def test_documents_that_share_paragraphs_are_on_one_side():
    """That of the largest. What lies between two sides, or says nothing new, is left out."""

    def shared(number):
        return f"Paragraph {number} {'y' * 70}"

    large = [f"Document {number} {'x' * 200}\n\n{shared(number)}" for number in range(99)]
    rest = ["z" * 10**6]
    train, validation, heldout = corpus.split([*large, *rest])
    assert train[0] == rest[0] and len(train) > 80 and validation and heldout
    one, two = large.index(validation[0]), large.index(heldout[0])
    small = [f"{shared(one)}\n\n{number} {'x' * 70}" for number in range(9)]
    parts = corpus.split([*small, shared(two), f"{shared(one)}\n\n{shared(two)}", large[one], large[two], *rest])
    assert parts == ([*rest], [large[one], *small], [large[two]])


def test_documents_are_read_not_run(tmp_path, monkeypatch):
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
    assert list(corpus.documentation_strings(tmp_path)) == [
        "The module, which must never be executed by anybody.",
        "A thing\n\nindented less than it was, and long enough to be kept.",
    ]
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "test")})
    (tmp_path / "test" / "test_it.py").unlink()
    with pytest.raises(FileNotFoundError, match="no documentation strings"):
        corpus.documents()


def test_encoding_agrees_with_the_tokenizer():
    tokenizer = models.byte_tokenizer()
    texts = ["Grüße, “quoted”\n", "x" * 50]
    ids = [token for text in texts for token in tokenizer.encode(text).ids]  # each begins with what ends texts
    assert corpus.encode(texts).tolist() == [*ids, tokenizer.token_to_id("<|endoftext|>")]
    assert tokenizer.token_to_id("<|pad|>") == corpus.PADDING
    assert tokenizer.get_vocab_size() == corpus.VOCABULARY


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[models.CausalLM, dict, Path]:
    """A run that nothing interrupts, and where its checkpoint is."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    return *train(TINY, folder, documents=DOCUMENTS), folder


def test_loss_falls_and_the_report_is_true(trained):
    _, summary, folder = trained
    losses = [point["train_loss_bits_per_byte"] for point in summary["curve"]]
    assert [point["step"] for point in summary["curve"]] == [8, 16, 24]
    assert losses[-1] < losses[0] - 1
    assert summary["curve"][-1]["heldout_bits_per_byte"] < 5
    assert json.loads((folder / "training.json").read_text()) == summary
    assert summary["corpus"]["sha256"] == corpus.fingerprint(DOCUMENTS)

    # Held-out bits per byte once more: the loaded model's logits, window by window, scored in float64 by NumPy.
    model = models.load(folder)
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
    model, summary, _ = trained
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
    resumed_model, resumed = train(TINY, *paths, documents=DOCUMENTS)
    assert resumed["resumed_at_step"] == 16
    assert resumed["curve"] == summary["curve"]
    assert resumed["heldout_bits_per_byte"] == summary["heldout_bits_per_byte"]
    pairs = zip(*(jax.tree.leaves(nnx.state(one)) for one in (model, resumed_model)))
    assert all(np.array_equal(*jax.device_get(pair)) for pair in pairs)

    with pytest.raises(ValueError, match=r"state of another run: its learning_rate is 0\.01"):
        train(replace(TINY, learning_rate=1e-3), *paths, documents=DOCUMENTS)
    with pytest.raises(ValueError, match="state of another run: its corpus"):
        train(TINY, *paths, documents=DOCUMENTS[1:])


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: b"text", lambda whole: whole[:-99], "record"])
def test_a_state_that_is_damaged_is_said(tmp_path, damage):
    tree = {"a": np.arange(997.0)}
    train_lm.save(tmp_path, {"seed": 1}, [{"step": 5}], tree)
    path = tmp_path / train_lm.STATE
    if damage == "record":
        np.savez(path, arr_0=tree["a"])
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"state.npz cannot be read \(.*\): remove it, to begin anew"):
        train_lm.restore(tmp_path, {"seed": 1}, tree)


def test_calls_of_any_length_are_one_program_and_change_nothing(trained, tmp_path, monkeypatch):
    compiled = train_lm.train_steps._cache_size()
    monkeypatch.setattr(train_lm, "STEPS_PER_CALL", 3)
    _, cut = train(TINY, tmp_path / "out", documents=DOCUMENTS)
    assert train_lm.train_steps._cache_size() == compiled
    assert cut["curve"][-1]["heldout_bits_per_byte"] == trained[1]["curve"][-1]["heldout_bits_per_byte"]


def test_all_positions_are_trained(trained):
    before = models.create(TINY.model, dtype="float32", seed=TINY.seed).positions.embedding[...]
    after = trained[0].positions.embedding[...]
    moved = np.abs(np.subtract(*jax.device_get((after, before)))).max(axis=1) > 0
    assert moved.tolist() == [False, False] + [True] * TINY.positions  # OPT never uses the first two


def test_layers_without_dropout_are_the_plain_forward_pass():
    model = models.create(TINY.model, dtype="float32")
    ids = jax.device_put(np.arange(24, dtype=np.int32).reshape(2, 12))
    ours = jax.jit(train_lm.forward)(model, ids, jax.device_put(np.zeros(2, np.int32)))
    np.testing.assert_allclose(*jax.device_get((ours.transpose(1, 0, 2), model(ids))), atol=1e-5)


def test_corpus_too_short(tmp_path):
    with pytest.raises(ValueError, match=r"train documents are .* tokens; at least 33 are needed"):
        train(TINY, tmp_path / "out", documents=["A single document."])


def test_every_setting_is_a_flag(tmp_path, monkeypatch):
    """And they come to what they say."""
    seen = []
    monkeypatch.setattr(train_lm, "train", lambda *given: seen.append(given) or (None, {}))
    settings = [f"--{name}={value}" for name, value in vars(TINY).items()]
    scripts.call(train_lm, *settings, "--output=a", "--work_dir=b")
    scripts.call(train_lm, "--output=a")
    assert seen == [(TINY, "a", "b"), (Config(), "a", None)]
