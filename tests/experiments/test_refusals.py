"""What scripts say of mistakes: one line, which names what to change, and nothing is written."""

import dataclasses
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripts

import models
from experiments import benchmark, generate, peers, plan, suite, sweep, trace, train_lm
from experiments.support.peers import PEERS
from experiments.support.results.predictions import Measured

TINY = models.OPTConfig("tiny", layers=1, hidden=24, heads=3, intermediate=40, vocab=258, positions=67)
JOB = "--input={tmp}/prompts.jsonl --output={tmp}/out"
# Of each script, what it is always given, and mistakes: flags, and what is said of them.
MISTAKES = {
    plan: (
        "--model=opt-125m --batch=16 --prompt=500 --new=24 --hardware=a100",
        ("--model=opt-67b", "did you mean 'opt-6.7b'?"),
        ("--hardware=A10", "unknown hardware 'A10'; expected one of this, a100, rtx5000, rtx4090, t4, "),
        ("--hardware=A10", "did you mean 'a100'?"),
        ("--batch=0", "flag --batch=0: 0 is not a positive integer"),
        ("--prompt=2030", "a prompt of 2030 and 24 new tokens need 2054 positions; opt-125m has 2048"),
        ("--prompt=1000000000000", "it may be 2147483647, as many as int32 counts"),
        ("--dtype=int8", "dtype is 'int8'; it must be one of float32"),
        ("--device_memory_gib=40000", "--device_memory_gib=40000: 40000.0 is not a number in the range [6.10"),
        ("--device_memory_gib=0", "--device_memory_gib=0: 0.0 is not a number in the range [6.103515625e-05, 1024.0]"),
        ("--device_memory_gib=nan", "--device_memory_gib=nan: nan is not a finite number"),
        ("--host_memory_gib=-1", "--host_memory_gib=-1: -1.0 is not a non-negative number"),
        ("--device_memory_gib=0.1", "102.4 MiB may be used"),
        ("--device_memory_gib=0.8 --host_memory_gib=0.001", "of host memory"),
        ("--batch=1000000", "fits where 1000000 were asked for"),
        ("--window_mib=inf", "--window_mib=inf: inf is not a finite number"),
        ("--window_mib=1e300", "--window_mib=1e300: 1e+300 is not a number in the range ["),
        ("--window_mib=0", "--window_mib=0: 0.0 is not a number in the range ["),
        ("--window_mib=0.001", "the window of 1.0 KiB is smaller than a block"),
        ("--plot={tmp}/missing/a.png", "there is no directory"),
        ("--plot={tmp}/a.jpg", "does not end in .png"),
        ("--plot={tmp}/folder.png", "is a directory"),
        ("--plot=/proc/a.png", "/proc/a.png: "),
        ("--measured={tmp}/folder.png", "Is a directory"),
        ("--measured={tmp}/list.json", "is not a results file (AttributeError"),
    ),
    train_lm: (
        "--output={tmp}/out",
        ("--dtype=int8", "dtype is 'int8'; expected one of bfloat16, float32"),
        ("--context=64 --positions=48", "context 64 is larger than the model's 48 positions"),
        ("--heads=5", "OPT: hidden size 192 does not divide into 5 heads"),
        ("--layers=0", "OPT: layers is 0; expected a positive integer"),
        ("--steps=0", "training: steps is 0; expected a positive integer"),
        ("--dropout=1", "dropout 1.0; expected a positive rate"),
        ("--seed=-1", "seed is -1"),
        ("--output={tmp}/theirs", "theirs' is not a checkpoint of ours; choose another directory or remove it"),
        ("--work_dir={tmp}/out/state", "out/state is inside output, which is replaced when saving"),
        ("--work_dir={tmp}/theirs", "theirs is not a training run's: it has thesis.txt; choose an empty or a new"),
        ("--work_dir={tmp}/theirs/thesis.txt", "thesis.txt: File exists"),
        ("--output=/proc/a", "/proc/a: "),
    ),
    generate: (
        "--checkpoint={checkpoint} --max_new_tokens=7",
        ("--input={tmp}/prompts.jsonl", "--input and --output go together"),
        ("--output={tmp}/out", "--input and --output go together"),
        ("--batch=3", "--batch is for --input"),
        (f"{JOB} --prompt=a", "--prompt and --input exclude each other"),
        (f"{JOB} --prompts_file=a", "--prompts_file and --input exclude each"),
        (f"{JOB} --check", "--check and --input exclude each other"),
        (f"{JOB} --input=/nowhere", "/nowhere: No such file or directory"),
        (f"{JOB} --input={{tmp}}", "is not a file, which is to be read twice"),
        (f"{JOB} --output=/nowhere/out", "there is no directory /nowhere: make it"),
        (f"{JOB} --output={{tmp}}/list.json", "is not the output of a job"),
        (f"{JOB} --batch=0", "flag --batch=0: 0 is not a positive integer"),
        (f"{JOB} --max_new_tokens=0", "--max_new_tokens=0: 0 is not a positive"),
        (f"{JOB} --max_new_tokens=67", "need 68 positions; tiny has 67"),
        (f"{JOB} --temperature=0", "temperature is 0.0; it must be above zero"),
        (f"{JOB} --temperature=inf", "flag --temperature=inf: inf is not a finite number"),
        (f"{JOB} --top_p=nan", "flag --top_p=nan: nan is not a finite number"),
        (
            f"{JOB} --top_k=99999999999",
            "99999999999 is not an integer in the range [0, 2147483647]",
        ),
        (f"{JOB} --seed=-1", "flag --seed=-1: -1 is not an integer in the range [0, 4294967295]"),
        (f"{JOB} --device_memory_gib=1e9", "flag --device_memory_gib=1e9: 1000000000.0 is not a number in the range"),
        (f"{JOB} --plan=nonsense", "there is no plan 'nonsense'"),
        (f"{JOB} --device_memory_gib=0.000062", "not even a batch of 1 fits"),
        (f"{JOB} --checkpoint=/nowhere", "/nowhere is not a directory"),
    ),
    suite: (
        "",
        ("--only=w9", "there is no workload 'w9'"),
        ("--peers=somebody", "--peers: there is no peer 'somebody'; there are huggingface, huggingface_offloaded"),
        ("--only=w3 --quick", "--quick leaves nothing of --only"),
        ("--workloads=missing.json", "missing.json: No such file or directory"),
        ("--dtype=int8", "flag --dtype=int8: value should be one of"),
        ("--timeout_s=0", "flag --timeout_s=0: 0.0 is not number >= 1"),
        ("--timeout_s=nan", "flag --timeout_s=nan: nan is not a finite number"),
        ("--out=/proc/a.json", "/proc/a.json: "),
        ("--quick=maybe", "flag --quick=maybe"),
    ),
    benchmark: (
        "--model=tiny --prompt=7 --new=3",
        *(
            (f"--plans=auto:{wrong}", f"--plans has 'auto:{wrong}'; expected auto:F, with F GiB of device memory, more")
            for wrong in ("half", "", "0", "-1", "nan", "inf", "1e9")
        ),
        ("--weights=auto --plans=auto:2", "--weights=auto goes by --device_memory_gib: leave the GiB"),
        ("--weights=auto --batch=3,5", "--weights=auto chooses for one workload: give one --batch"),
        ("--weights=gpu", "weights 'gpu': expected device, host"),
        ("--plans=", "--plans is empty: give one name or more"),
        ("--plans=nonsense", "there is no plan 'nonsense'"),
        ("--order=rows", "flag --order=rows: value should be one of <row|column>"),
        ("--new=1", "--new is 1: the first token comes with the prompt"),
        ("--copy_gib=1e9", "--copy_gib is 1e+09: this machine has "),
        ("--copy_gib=nan", "flag --copy_gib=nan: nan is not a finite number"),
        ("--seed=-1", "flag --seed=-1: -1 is not an integer in the range"),
        ("--out=/proc/a.json", "/proc/a.json: "),
        ("--out={tmp}", "is a folder; give the name of a file in it"),
        ("--out=/dev/zero", "/dev/zero: it is there, and no file that can be replaced"),
    ),
    peers: (
        "--model=tiny --batch=3 --prompt=7 --new=11",
        ("--new=1", "--new is 1"),
        ("--batch=3,0", "--batch has '0'; expected whole numbers from 1 on"),
        ("--prompt=3,0", "--prompt has '0'; expected whole numbers from 1 on"),
        ("--model=small", "unknown model 'small'"),
        ("--peer=somebody", "flag --peer=somebody: value should be one of"),
        ("--dtype=x", "flag --dtype=x: value should be one of"),
        ("--prompt=9990 --new=9", "need 9999 positions; tiny has"),
        ("--seed=-1", "flag --seed=-1: -1 is not an integer in the range"),
        ("", "huggingface: not today"),
    ),
    sweep: (
        "",
        ("--from={tmp}/steps.json --out={tmp}/x.json", "nothing is: give one of them"),
        ("--from={tmp}/steps.json --plot_choices={tmp}/x.png", "no plan was chosen"),
        ("--from={tmp}/missing.json", "missing.json"),
        ("--model=", "--model is empty: give one name or more"),
        ("--model=opt-125m,opt-126m", "unknown model 'opt-126m'"),
        ("--host_memory_gib=0", "flag --host_memory_gib=0: 0.0 is not number >= "),
        ("--out=/proc/a/b.json", "/proc/a: No such file or directory"),
    ),
    trace: (
        "--plot={tmp}/a.png",
        ("", "a trace of copies and compute needs a GPU, and jax runs on cpu: run it on one"),
        ("--from={tmp}/steps.json --out={tmp}/x.json", "nothing is: give one of them"),
        ("--from={tmp}/steps.json --plot={tmp}/a.jpg", "does not end in .png"),
        ("--from={tmp}/empty.json", "no step to draw"),
        ("--from={tmp}/steps.json", "steps.json has no traced_ms, so it is not of experiments/trace.py"),
        ("--from={tmp}/missing.json", "missing.json"),
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    models.save(models.create(TINY, dtype="float32"), path, tokenizer=models.byte_tokenizer())
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files that are there already."""
    for name in ("theirs", "folder.png"):
        (tmp_path / name).mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("do not replace")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Return the number of bytes that were read"}\n')
    (tmp_path / "list.json").write_text("[{}]")
    row = dataclasses.asdict(Measured("tiny", 1, 2, 3, "activations", None, 100.0, 104.0, 0))
    for name, rows in (("steps", [row]), ("empty", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"device": "Some GPU", "rows": rows}))
    return tmp_path


@pytest.fixture
def machine(monkeypatch):
    """One on which nothing is measured, nor prepared for it."""
    monkeypatch.setitem(models.PRESETS, "tiny", TINY)
    monkeypatch.setattr(benchmark.memory, "limit_pinned", lambda needed: pytest.fail("it went on"))
    monkeypatch.setitem(PEERS, "huggingface", SimpleNamespace(unavailable=lambda gpu: "not today"))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("program", "always", "flags", "message"),
    [
        pytest.param(program, always, *mistake, id=f"{program.__name__.rpartition('.')[2]} {mistake[0]}")
        for program, (always, *mistakes) in MISTAKES.items()
        for mistake in mistakes
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(machine, folder, checkpoint, program, always, flags, message):
    if "plot" in always + flags:
        pytest.importorskip("matplotlib")
    before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    with pytest.raises(SystemExit) as refusal:
        scripts.call(program, *f"{always} {flags}".format(tmp=folder, checkpoint=checkpoint).split())
    line = str(refusal.value.code)
    assert line.startswith("error: ") and message in line and "\n" not in line
    assert {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")} == before
