"""Our own checkpoints: round trips, saving over others, damage; and random weights."""

import dataclasses
import json
import logging
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, equal, fails

import models
from models.checkpoint import parameters_of
from models.rotary import Rotary

NARROW = models.OPTConfig("narrow", 3, 35, 5, 53, 97, 41, embedding=17, pre_norm=False, final_norm=False)
LLAMA = models.LlamaConfig(
    *("tiny-llama", 3, 32, 4, 53, 97, 41),
    kv_heads=2,
    head_dim=6,
    rotary=Rotary(1e5, "llama3", factor=8.0),
    qkv_bias=True,
    head_norms=True,
    sliding_window=5,
    sliding_layers=(0, 2),
)
GEMMA = models.GemmaConfig("tiny-gemma", 2, 32, 4, 2, 53, head_dim=14, vocab=97, positions=41)
IDS = np.arange(21, dtype=np.int32).reshape(3, 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [CONFIG, NARROW, LLAMA, GEMMA], ids=lambda config: config.name)
def test_save_and_load(config, dtype, tmp_path):
    model = models.create(config, dtype=dtype, seed=5)
    models.save(model, tmp_path / "model")
    loaded = models.load(tmp_path / "model")
    assert equal(model, loaded) and loaded.shape == model.shape and loaded.config == config
    np.testing.assert_array_equal(loaded(jax.device_put(IDS)), model(jax.device_put(IDS)))


def test_load_in_another_dtype(tmp_path):
    model = models.create(CONFIG, dtype="float32")
    models.save(model, tmp_path / "model")
    loaded = models.load(tmp_path / "model", dtype=jnp.bfloat16)
    assert loaded.shape.dtype == "bfloat16" and equal(loaded, models.load(tmp_path / "model", dtype="bfloat16"))
    np.testing.assert_allclose(loaded(jax.device_put(IDS)), model(jax.device_put(IDS)), atol=1e-2)


def test_save_replaces_only_what_is_ours(tmp_path):
    model = models.create(CONFIG)
    target = tmp_path / "model"
    target.mkdir()
    models.save(model, target)  # an empty directory may be taken
    models.save(models.create(CONFIG, seed=1), target, tokenizer=models.byte_tokenizer())
    assert equal(models.load(target), models.create(CONFIG, seed=1))
    assert models.load_tokenizer(target).get_vocab_size() == 258
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(models.CheckpointError, match="not a checkpoint of ours"):
        models.save(model, tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other"]


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = models.create(CONFIG)
    models.save(model, tmp_path / "model")
    monkeypatch.setattr(models.checkpoint.ocp.StandardCheckpointer, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.save(models.create(CONFIG, seed=1), tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and equal(models.load(tmp_path / "model"), model)


SAVE_AND_DIE = """
import os, sys, models
folder = os.path.dirname(sys.argv[1])
def dying(rename):
    return lambda *paths: (rename(*paths), os.path.dirname(paths[1]) == folder and os._exit(137))
os.replace, os.rename = dying(os.replace), dying(os.rename)
models.save(models.create(models.OPTConfig("new", 1, 16, 2, 16, 64, 41)), sys.argv[1])
os._exit(137)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="directories are exchanged by Linux")
def test_a_save_that_is_killed_leaves_a_whole_checkpoint(tmp_path):
    """After its first renaming, the one at the end included."""
    models.save(models.create(CONFIG), tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, tmp_path / "model"], capture_output=True, text=True)
    assert done.returncode == 137, done.stderr
    assert models.load(tmp_path / "model").config.name in ("new", CONFIG.name)


def test_a_save_where_directories_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(models.checkpoint.ctypes, "CDLL", lambda *_, **__: None)
    for seed in (0, 1):
        models.save(models.create(CONFIG, seed=seed), tmp_path / "model")
    assert equal(models.load(tmp_path / "model"), models.create(CONFIG, seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_ours_damaged_or_mismatched(tmp_path):
    models.save(models.create(CONFIG), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    original = json.loads(file.read_text())
    for change, message in [
        ({"hidden": 45, "embedding": 45}, r"has shape \[.*; the configuration expects \[.*45"),
        ({"hidden": 45}, r"missing project_in\.kernel and 1 more"),
        ({"layers": 1}, r"unknown layers\.1\.attention"),
        ({"layers": 3}, r"missing layers\.2\.attention"),
        ({"family": "mamba"}, "family is 'mamba'; expected one of opt, llama, gemma"),
        ({"family": ["opt"]}, r"family is \['opt'\]; expected one of opt, llama, gemma"),
        ({"colour": "red"}, "colour"),
        ({"dtype": "int8"}, "dtype is int8"),
        ({"dtype": ...}, "dtype is missing; expected one of float32"),
    ]:
        file.write_text(json.dumps({name: value for name, value in (original | change).items() if value is not ...}))
        fails(tmp_path / "model", message)
    file.write_text(json.dumps(original))
    longest = max((tmp_path / "model" / "params").rglob("?" * 32), key=lambda part: part.stat().st_size)
    longest.write_bytes(longest.read_bytes()[: longest.stat().st_size // 2])
    fails(tmp_path / "model", r'params cannot be read \(\w+: Error reading "[a-z]\w+\.')  # as its cause says
    metadata = tmp_path / "model" / "params" / "_METADATA"
    for text in ("", "{}", "[1]", "[" * 100_000):
        metadata.write_text(text)
        fails(tmp_path / "model", r"params cannot be read \(its metadata are missing or damaged\)")
    for part in (tmp_path / "model" / "params").rglob("*"):
        if part.is_file() and part.stat().st_size > 1000:
            part.write_bytes(part.read_bytes()[:100])
    fails(tmp_path / "model", "params cannot be read")


def test_a_damaged_file_is_one_line_and_no_tracebacks(tmp_path):
    """In a process of its own, as other arrays may still be read when the error is raised, and until the end."""
    wide = models.OPTConfig("wide", layers=7, hidden=192, heads=6, intermediate=769, vocab=257, positions=1024)
    models.save(models.create(wide, dtype="float32"), tmp_path / "model")
    longest = max((tmp_path / "model" / "params").rglob("?" * 32), key=lambda part: part.stat().st_size)
    longest.write_bytes(longest.read_bytes()[:1000])
    program = (
        "import sys, time, models\n"
        "try: models.load(sys.argv[1])\n"
        "except models.CheckpointError as error: print(error)\n"
        "time.sleep(1)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "model"], capture_output=True, text=True)
    assert "params cannot be read" in done.stdout and done.returncode == 0
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_what_python_says_of_other_errors_is_still_said(monkeypatch, caplog):
    """Dropped are a closed loop, coroutines of Orbax, and results that nobody asked for; after an error, too, until
    something is read."""
    late = [f"{kind} exception was never retrieved\nfuture: ..." for kind in ("Future", "Task", "_GatheringFuture")]
    late.append("Task was destroyed but it is pending!")
    said, log = [], logging.getLogger("asyncio")
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    monkeypatch.setattr(log, "filters", [])
    hook = sys.unraisablehook

    def say():
        for text, file in (("Event loop is closed", "a.py"), ("orbax", "/b/orbax/c.py"), ("another", "d.py")):
            coroutine = types.SimpleNamespace(cr_code=types.SimpleNamespace(co_filename=file))
            sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text), object=coroutine))
        for text in (*late, "another"):
            log.error(text)
        told = [str(error.exc_value) for error in said], [record.getMessage() for record in caplog.records]
        said.clear()
        caplog.clear()
        return told

    everything, wanted = (["Event loop is closed", "orbax", "another"], [*late, "another"]), (["another"], ["another"])
    assert say() == everything
    with models.checkpoint._late_reads_dropped():
        assert say() == wanted
    assert say() == everything
    for _ in range(3):
        with pytest.raises(ValueError), models.checkpoint._late_reads_dropped():
            raise ValueError
        assert say() == wanted and len(log.filters) == 1
    with models.checkpoint._late_reads_dropped():
        assert say() == wanted
    assert say() == everything and sys.unraisablehook == hook and not log.filters


def test_a_rotation_of_ours_that_is_damaged(tmp_path):
    models.save(models.create(dataclasses.replace(LLAMA, layers=1)), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    original = json.loads(file.read_text())
    for rotary, message in [
        (original["rotary"] | {"scaling": "yarn"}, "rope scaling is 'yarn'; supported are default, linear, llama3"),
        (original["rotary"] | {"factor": None}, "factor is None; expected a positive number"),
        (original["rotary"] | {"colour": "red"}, "colour"),
        ("default", "rotary is 'default'; expected"),
    ]:
        file.write_text(json.dumps(original | {"rotary": rotary}))
        fails(tmp_path / "model", message)


# --- random weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, hidden=350, embedding=350, intermediate=530, vocab=997),
        dataclasses.replace(LLAMA, layers=2, hidden=320, head_dim=80, intermediate=530, vocab=997, sliding_layers=(0,)),
    ],
    ids=lambda config: config.name,
)
def test_create(config):
    values = parameters_of(models.create(config))
    assert all(value.dtype == jnp.bfloat16 for value in values.values())
    for name, value in values.items():
        kind = name.rpartition(".")[2]
        mean, std = {"kernel": (0, 0.02), "embedding": (0, 0.02), "scale": (1, 0), "bias": (0, 0)}[kind]
        value = np.asarray(value, np.float32)
        assert abs(value.mean() - mean) < 1e-3 and abs(value.std() - std) < 1e-3, name
    first, second = values["layers.0.attention.query.kernel"], values["layers.1.attention.query.kernel"]
    assert (np.asarray(first) != np.asarray(second)).mean() > 0.9


def test_create_depends_on_the_seed_only():
    assert equal(models.create(CONFIG, seed=3), models.create(CONFIG, seed=3))
    assert not equal(models.create(CONFIG, seed=3), models.create(CONFIG, seed=4))


def test_unknown_presets_and_dtypes_are_named():
    with pytest.raises(models.CheckpointError, match=r"'opt-13'; expected one of opt-125m, .* did you mean 'opt-13b'"):
        models.create("opt-13")
    with pytest.raises(models.CheckpointError, match="dtype is int8; expected one of float32, bfloat16, float16"):
        models.create(CONFIG, dtype="int8")
    with pytest.raises(models.CheckpointError, match="dtype is half-ish"):
        models.create(CONFIG, dtype="half-ish")
