"""Peers: what their rows say, and that Hugging Face's models are those that we measure. No time is asserted."""

import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import pytest
import scripts

import models
from experiments import peers
from experiments.support.peers import PEERS, huggingface
from experiments.support.peers.huggingface import HuggingFace
from experiments.support.peers.peer import Steps
from experiments.support.suite.cases import CASES
from kvrecomp.plan import GIB, Workload
from kvrecomp.plan.footprint import memory_needed
from kvrecomp.plan.named import named_plan
from models.checkpoint import Skeleton

WORKLOAD = Workload(batch=3, prompt=7, new=11)
# Prime and distinct sizes where the architectures allow.
TINY = {
    "opt": models.OPTConfig("tiny", 2, 21, 3, 37, vocab=61, positions=41),
    "opt, normalised after": models.OPTConfig(
        "tiny", 2, 21, 3, 37, 61, 41, embedding=13, pre_norm=False, final_norm=False
    ),
    "llama": models.LlamaConfig("tiny", 2, 28, 4, 37, vocab=61, positions=41, kv_heads=2, head_dim=6),
    "llama, tied": models.LlamaConfig("tiny", 3, 30, 5, 37, vocab=61, positions=41, tied=True),
}


@pytest.fixture
def torch():
    found = pytest.importorskip("torch", reason="the peer needs torch")
    pytest.importorskip("transformers", reason="the peer is transformers")
    found.set_num_threads(1)  # its threads wait for one another busily
    return found


@pytest.fixture
def preset(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "tiny", TINY["opt"])


command = functools.partial(scripts.call, peers)


SIZES = ("--model=tiny", "--batch=3", "--prompt=7", "--new=11")


def test_a_row_has_null_where_a_field_of_ours_has_no_meaning():
    seconds = [9.0, 8.0, 7.0, 0.1, 0.3, 0.2, 0.4]  # the first three warm up
    row = peers.row_of("huggingface", "tiny", "float32", WORKLOAD, Steps("Some GPU", 0.5, seconds, 123))
    known = {name: value for name, value in dataclasses.asdict(row).items() if value is not None}
    assert known == {
        "model": "tiny",
        "batch": 3,
        "prompt": 7,
        "new": 11,
        "asked": "huggingface",
        "plan": "huggingface",
        "dtype": "float32",
        "median_ms": 250.0,
        "p95_ms": pytest.approx(385.0),
        "worst_ms": 400.0,
        "link_bytes": 0,
        "tokens_per_second": 12.0,
        "peak_device_bytes": 123,
        "prefill_s": 0.5,
        "step_ms": [9000.0, 8000.0, 7000.0, 100.0, 300.0, 200.0, 400.0],
    }
    offloaded = peers.row_of("huggingface_offloaded", "tiny", "float32", WORKLOAD, Steps("", 0.5, seconds, None))
    assert offloaded.link_bytes is None


def test_the_command_measures(torch, preset, tmp_path, capsys):
    command(*SIZES, "--dtype=float32", "--commit=abc", f"--out={tmp_path}/a.json")
    document = json.loads((tmp_path / "a.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document
    assert document["commit"] == "abc" and document["versions"]["torch"] == torch.__version__
    (row,) = document["rows"]
    assert (row["model"], row["plan"]) == ("tiny", "huggingface")
    assert len(row["step_ms"]) == WORKLOAD.new - 1 and 0 < row["median_ms"] <= row["p95_ms"] <= row["worst_ms"]


def test_another_program_joins_by_a_function(preset, monkeypatch, capsys):
    def run(config, dtype, workloads, seed):
        assert (config.name, dtype, workloads, seed) == ("tiny", "float16", [WORKLOAD], 5)
        yield Steps("Some GPU", 1.0, [0.25] * (WORKLOAD.new - 1), None)

    monkeypatch.setitem(PEERS, "huggingface", SimpleNamespace(run=run, unavailable=lambda gpu: None, link_bytes=0))
    command(*SIZES, "--dtype=float16", "--seed=5")
    document = json.loads(capsys.readouterr().out)
    assert document["device"] == "Some GPU" and document["rows"][0]["median_ms"] == 250.0


def test_what_was_measured_is_not_lost_with_what_comes_after(preset, monkeypatch, tmp_path):
    def run(config, dtype, workloads, seed):
        yield Steps("Some GPU", 1.0, [0.25] * 10, None)
        raise RuntimeError(f"no memory for {workloads[1]}")

    monkeypatch.setitem(PEERS, "huggingface", SimpleNamespace(run=run, unavailable=lambda gpu: None, link_bytes=0))
    with pytest.raises(RuntimeError, match="no memory for"):
        command("--model=tiny", "--batch=3", "--prompt=7,5", f"--out={tmp_path}/a.json")
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert (row["batch"], row["prompt"]) == (3, 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_step_is_timed(torch, dtype):
    workloads = [WORKLOAD, Workload(batch=2, prompt=5, new=3)]
    made = list(HuggingFace(False).run(TINY["llama"], dtype, workloads, 0))
    assert [len(steps.seconds) for steps in made] == [10, 2]
    assert all(min(steps.seconds) > 0 and steps.prefill_seconds > 0 for steps in made)


def test_texts_that_end_early_are_an_error(torch, monkeypatch):
    make = huggingface.make_model

    def ending(*given):
        model = make(*given)
        model.generation_config.eos_token_id = list(range(61))
        return model

    monkeypatch.setattr(huggingface, "make_model", ending)
    with pytest.raises(RuntimeError, match="generate gave 1 tokens where 11 were asked for"):
        list(HuggingFace(False).run(TINY["opt"], "float32", [WORKLOAD], 0))


@pytest.mark.parametrize("name", TINY)
def test_models_are_of_our_shape(torch, name):
    """Every parameter counted, and matrices alone as the planner counts them; and what comes out."""
    config = TINY[name]
    model = huggingface.make_model(config, "float32", seed=1)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours = Skeleton(config, "float32").shapes
    assert sum(map(math.prod, theirs.values())) == sum(map(math.prod, ours.values()))
    narrow = config.shape.layers[0].hidden * config.shape.embedding if "after" in name else 0
    counted = [shape for name, shape in theirs.items() if len(shape) > 1 and "positions" not in name]
    assert sum(map(math.prod, counted)) == config.shape.parameters + 2 * narrow  # into the hidden size, and out of it
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = model(torch.ones((2, 5), dtype=torch.int64)).logits
    assert logits.shape == (2, 5, 61) and not model.training


@pytest.mark.parametrize("name", sorted({case.model for case in CASES if case.peers} | {"opt-350m", "llama-3.1-8b"}))
def test_configurations_are_ours(torch, name):
    """Through the way back, which reads config.json files."""
    config = models.preset(name)
    written = json.loads(huggingface.configuration(config).to_json_string(use_diff=False))
    assert type(config).from_huggingface(written, name) == config


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen3-4b", "mistral-7b", "gemma-2b"])
def test_models_that_are_not_written_down_are_said(name):
    with pytest.raises(ValueError, match=rf"{name}: there is no configuration .* expected an OPT or a Llama"):
        huggingface.configuration(models.preset(name))


def test_where_it_cannot_be_run(torch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert PEERS["huggingface"].unavailable(False) is None
    assert "finds no GPU, and what it is compared with has one" in PEERS["huggingface"].unavailable(True)
    assert "finds no GPU, and the cache is offloaded from one" in PEERS["huggingface_offloaded"].unavailable(False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert PEERS["huggingface_offloaded"].unavailable(True) is None
    monkeypatch.setattr(huggingface, "PACKAGES", ("no_such_package",))
    assert PEERS["huggingface"].unavailable(False) == "no_such_package is not installed: pip install no_such_package"


def test_memory_that_is_needed():
    """OPT-6.7B with 32 rows of 1024 and 32: K and V are 16.5 GiB, of a layer 0.52, and the rest is what we need."""
    shape, workload = models.preset("opt-6.7b").shape, Workload(32, 1024, 32)
    ours = memory_needed(named_plan("device", shape, workload))["device"]
    rest = ours["weights"] + ours["prefill or step"]
    here, away = (PEERS[name].memory_needed(shape, workload) for name in ("huggingface", "huggingface_offloaded"))
    assert here == {"device": rest + 16.5 * GIB * 33 / 32, "host": 0}
    assert away == {"device": rest + 16.5 * GIB * 3 / 32, "host": 2.4 * 64 * GIB / 2}
