"""Continuing a file: what records say, what they depend on, and that a job goes on where it was killed.

The last test kills the program itself, with SIGKILL. With JOB_PROMPTS=2000 JOB_KILLS=20 in the environment it does so
twenty times while 2,000 prompts are decoded.
"""

import dataclasses
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scripts
import toy
from flax import nnx

import kvrecomp
import models
from experiments import generate
from experiments.support.job import decoding, meter, runner
from experiments.support.job.runner import Settings
from experiments.support.source import Source
from kvrecomp.generate import TokenLoop
from kvrecomp.plan import GIB, PlanError
from kvrecomp.run.limits import check_memory

CONFIG = models.OPTConfig("opt-tiny", layers=1, hidden=24, heads=3, intermediate=40, vocab=258, positions=67)
NEW = 7
SETTINGS = Settings(NEW, batch=3, plan="activations", do_sample=True, temperature=0.9, seed=5)
PROMPTS = ["Return the", "é", 'The "with" statement', [5, 17, 2, 99], "x", "Open the file", "a b c d e f g h", [0]]
LINES = [{"id": f"p{index}", "prompt": prompt} for index, prompt in enumerate(PROMPTS)]
LONGEST = 21


@functools.cache
def model():
    return models.create(CONFIG, dtype="float32", seed=3)


@functools.cache
def decoder(model, plan):
    """Compiled once for all tests."""
    return kvrecomp.run.decoder.Decoder(model, plan)


@pytest.fixture(autouse=True)
def decoders_are_shared(monkeypatch):
    def shared(model, plan, budget=None):
        check_memory(plan, budget)
        return decoder(model, plan)

    monkeypatch.setattr(kvrecomp, "Decoder", shared)


@dataclasses.dataclass
class Given:
    """A `Source` of the toy model, which counts how often its weights are read."""

    model: models.CausalLM
    read_dtype: str = "float32"
    loads: int = 0
    ends: tuple[int, ...] = (256,)

    def describe(self):
        return self.model.shape, models.TextProcessor(models.byte_tokenizer(), self.ends)

    def load(self, plan):
        assert plan is None or all(layer.weights == "device" for layer in plan.layers)
        self.loads += 1
        return self.model


class Files:
    """An input and what becomes of it, in a directory of its own."""

    def __init__(self, path):
        self.path, self.source, self.target = path, path / "in.jsonl", path / "out.jsonl"
        self.given = Given(model())

    def write(self, *lines):
        self.source.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))

    def run(self, model_hash="tiny", dtype="float32", budget=None, **settings):
        settings, self.given.read_dtype = dataclasses.replace(SETTINGS, **settings), dtype
        return runner.run(self.source, self.target, settings, model_hash, self.given, budget=budget)

    def killed(self, batches, **options):
        """A run that ends like a kill when so many batches are decoded."""
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_after(patch, batches)
            self.run(**options)

    def records(self):
        return [json.loads(line) for line in self.target.read_text().splitlines()]

    def tokens(self):
        return [record.get("tokens") for record in self.records()]

    def anew(self, **options):
        """The records of a job from the beginning."""
        for file in self.path.glob("out.jsonl*"):
            file.unlink()
        self.summary = self.run(**options)
        return self.records()


@pytest.fixture
def files(tmp_path):
    files = Files(tmp_path)
    files.write(*LINES)
    return files


# --- what records say -------------------------------------------------------------------------------------------------


def alone(prompt, index):
    """What a prompt is continued with when nothing is beside it, under another plan."""
    ids = prompt if isinstance(prompt, list) else [256, *prompt.encode()]
    plan = kvrecomp.named_plan("device", model().shape, kvrecomp.Workload(1, LONGEST, NEW))
    padded = [[0] * (LONGEST - len(ids)) + ids]
    mask = np.arange(LONGEST) >= LONGEST - len(ids)
    result = TokenLoop(decoder(model(), plan), SETTINGS.sampling, [256], 0).run(padded, mask[None], NEW, [index])
    return result.sequences[0, LONGEST:][: result.new_tokens[0]].tolist()


def test_records_are_those_of_each_prompt_alone(files):
    """In the order of the input, whatever they were decoded beside; texts are their bytes without other tokens."""
    summary = files.run()
    for index, (prompt, record) in enumerate(zip(PROMPTS, files.records(), strict=True)):
        new = alone(prompt, index)
        assert record == {
            "id": f"p{index}",
            "prompt": prompt,
            "text": bytes(token for token in new if token < 256).decode(errors="replace"),
            "tokens": new,
            "finish_reason": "stop" if new[-1] == 256 else "length",
        }
        assert list(record) == ["id", "prompt", "text", "tokens", "finish_reason"]
    assert (summary.records, summary.prompts, summary.earlier) == (8, 8, 0)
    assert summary.tokens == sum(map(len, files.tokens())) and summary.seconds > 0
    assert summary.shapes == [[3, LONGEST]]
    assert sorted(file.name for file in files.path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.job.json"]


def test_the_seed_and_the_place_change_texts(files):
    first = files.anew()
    assert all(one != other for one, other in zip(files.anew(seed=6), first))
    files.write(*LINES[1:], LINES[0])
    assert all(record["tokens"] != first[(index + 1) % 8]["tokens"] for index, record in enumerate(files.anew()))
    files.write("", *LINES[:3], "\n", *LINES[3:])
    assert files.anew() == first  # blank lines take no place


def test_texts_that_end_say_so(files):
    """With a token that comes often in the place of the end."""
    files.given.ends = ()
    free = [record["tokens"] for record in files.anew()]
    often = int(np.bincount(np.concatenate(free)).argmax())
    files.given.ends = (often,)
    records = files.anew()
    for before, record in zip(free, records):
        ended = often in before
        assert record["tokens"] == before[: before.index(often) + 1 if ended else NEW]
        assert record["finish_reason"] == ("stop" if ended else "length")
    assert {record["finish_reason"] for record in records} == {"stop", "length"}
    assert files.summary.tokens == sum(map(len, files.tokens()))  # of those that fill up a batch, none


def test_rows_that_fill_a_batch_end_when_its_prompts_do(files, monkeypatch):
    """A batch of one prompt, which ends with its first token, takes the steps at most that were dispatched ahead."""
    first = alone("Return the", 0)[0]
    files.write(LINES[0], *({"prompt": 'The "with" statement'} for _ in range(3)))
    files.given.ends = (first,)
    steps, step = [], kvrecomp.run.decoder.Decoder.step_groups
    monkeypatch.setattr(kvrecomp.run.decoder.Decoder, "step_groups", lambda *args: steps.append(1) or step(*args))
    records = files.anew()
    assert records[0]["tokens"] == [first] and {len(record["tokens"]) for record in records[1:]} == {NEW}
    assert NEW - 1 <= len(steps) <= NEW - 1 + 3


def test_lines_with_errors_are_reported_and_have_their_place(files, capsys):
    files.write(LINES[0], "", "nonsense", {"id": 7, "prompt": ""}, {"prompt": [0]}, LINES[2])
    summary = files.run()
    told = ["it is not JSON (Expecting value, column 1)", "its prompt is empty"]
    first, *wrong, last, _ = files.records()
    assert wrong == [
        {"id": None, "line": 3, "error": told[0], "finish_reason": "error"},
        {"id": 7, "line": 4, "error": told[1], "finish_reason": "error"},
    ]
    assert first["tokens"] == alone("Return the", 0) and last["tokens"] == alone([0], 3) and last["id"] == 5
    assert (summary.records, summary.errors, summary.prompts) == (5, 2, 3)
    assert capsys.readouterr().err.splitlines() == [f"line 3: {told[0]}", f"line 4: {told[1]}"]


@pytest.mark.parametrize(("lines", "records"), [([], 0), (["", "x", "{}"], 2)])
def test_files_without_a_prompt(files, lines, records):
    files.write(*lines)
    assert files.run().records == records == len(files.records())
    assert str(files.run()).endswith("nothing was left to do")


def test_a_prompt_whose_logits_are_nan_is_an_error_and_the_others_are_not(files, capsys):
    """Only the longest prompt comes to a position whose embedding is not a number."""
    expected = files.anew()
    graph, state = nnx.split(models.create(CONFIG, dtype="float32", seed=3))
    table = toy.get(state["positions"]["embedding"].get_value()).copy()
    table[LONGEST + 1 + 2] = np.nan  # OPT's table begins with two that are not used
    state["positions"]["embedding"].set_value(toy.put(table))
    files.given.model = nnx.merge(graph, state)
    records = files.anew()
    told = "its logits are NaN: check the weights, or use a dtype with a larger range"
    assert records.pop(2) == {"id": "p2", "line": 3, "error": told, "finish_reason": "error"}
    assert records == expected[:2] + expected[3:]
    assert capsys.readouterr().err == f"line 3: {told}\n"
    assert (files.summary.errors, files.run().errors) == (1, 1)


def test_weights_that_do_not_fit_are_in_host_memory(files):
    """Of five layers, which a plan of one shape puts there for all; records are those with everything on the device."""
    config = dataclasses.replace(CONFIG, layers=5)
    shape = dataclasses.replace(config.shape, dtype="float32")
    loaded = []

    class Five(Given):
        def load(self, plan):
            loaded.append([layer.weights for layer in plan.layers].count("host"))
            return models.create(config, dtype="float32", seed=3, sharding=kvrecomp.placement(plan))

    files.given = Five(models.create(config, dtype="float32", seed=3))
    files.write(*({"prompt": [5, 17, 2, 99][: 1 + index % 4]} for index in range(29)), *LINES)
    expected = files.anew(plan="auto")
    least = kvrecomp.named_plan("activations", shape, kvrecomp.Workload(3, LONGEST, NEW))
    least = sum(kvrecomp.memory_needed(kvrecomp.with_host_weights(least, 1.0))["device"].values())
    budget = kvrecomp.Budget(least + 2.5 * shape.layers[0].parameters * 4, GIB)
    assert files.anew(plan="auto", budget=budget) == expected
    assert loaded == [0, 3]


# --- batches ----------------------------------------------------------------------------------------------------------


def test_similar_lengths_share_a_program_and_stretches_change_nothing(files, monkeypatch):
    """Two shapes for 40 prompts of two lengths, however they are mixed; each line alone gets the same text."""
    made = []
    monkeypatch.setattr(kvrecomp, "Decoder", lambda model, plan, budget: made.append(plan) or decoder(model, plan))
    lengths = [3, 9] * 20
    files.write(*({"prompt": [index] * length} for index, length in enumerate(lengths)))
    records = files.anew(batch=5)
    assert [[plan.workload.batch, plan.workload.prompt] for plan in made] == [[5, 9], [5, 3]]
    assert [record["tokens"] for record in records[:2]] == [alone([0] * 3, 0), alone([1] * 9, 1)]
    monkeypatch.setattr(runner, "STRETCH", 2)
    assert files.anew(batch=5) == records


def test_the_budget_decides_how_many_rows(files, monkeypatch):
    """Activations are 24 numbers of 4 bytes, for 21 tokens of the prompt."""
    row, device, sizes = LONGEST * 24 * 4, 2 * GIB, []
    monkeypatch.setattr(
        decoding.Decoding, "records", lambda _, plan, lines: sizes.append(len(lines)) or [{}] * len(lines)
    )
    for rows, cut in ((1, [1] * 8), (2, [2] * 4), (3, [3, 3, 2])):
        sizes.clear()
        files.anew(budget=kvrecomp.Budget(device, row * rows + row - 1))
        assert sizes == cut
    with pytest.raises(PlanError, match="not even a batch of 1 fits"):
        files.anew(budget=kvrecomp.Budget(device, row - 1))
    assert not files.target.exists()


# --- going on ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What nothing is done about."""


def kill_after(monkeypatch, batches):
    """Ends a run like a kill, when so many batches are decoded."""
    decode, left = decoding.Decoding.records, batches

    def records(*args):
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        return decode(*args)

    monkeypatch.setattr(decoding.Decoding, "records", records)


@pytest.mark.parametrize("stretch", [1, 64])
@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_run_goes_on_with_what_was_decided(files, monkeypatch, stretch, batches):
    """Prompts of finished batches are not decoded again, and plans and stretches are those of the beginning."""
    monkeypatch.setattr(runner, "STRETCH", stretch)
    files.anew()
    expected = files.target.read_bytes()
    files.target.unlink()
    files.killed(batches)
    assert files.target.read_bytes() == expected[: files.target.stat().st_size] != expected
    with monkeypatch.context() as patch:
        patch.setattr(kvrecomp, "plan_for", None)
        patch.setattr(runner, "survey", None)
        patch.setattr(runner, "STRETCH", 7)
        kill_after(patch, 3 - batches)
        summary = files.run()
    assert files.target.read_bytes() == expected
    assert summary.prompts == 8 - 3 * batches and summary.records == 8


def test_a_batch_of_which_a_part_was_written_is_decoded_whole(files, monkeypatch):
    """Or its rows might be rounded differently."""
    monkeypatch.setattr(runner, "STRETCH", 1)
    files.anew()
    expected, decoded, decode = files.target.read_bytes(), [], decoding.Decoding.records
    files.target.write_bytes(b"".join(expected.splitlines(keepends=True)[:5]))  # three, and two of the second batch

    def records(self, plan, lines):
        decoded.append([line.index for line in lines])
        return decode(self, plan, lines)

    monkeypatch.setattr(decoding.Decoding, "records", records)
    files.run()
    assert decoded == [[5, 3, 4], [6, 7]] and files.target.read_bytes() == expected


def test_what_has_become_too_large_is_an_error_and_can_be_gone_on_with(files):
    files.killed(2)
    with pytest.raises(PlanError, match=r"needs .* of device memory"):
        files.run(budget=kvrecomp.Budget(2**17, GIB))
    assert files.run().prompts == 2


def test_what_is_complete_is_left_as_it_is(files):
    files.run()
    before, loads = (files.target.read_bytes(), files.target.stat().st_mtime_ns), files.given.loads
    summary = files.run()
    assert (summary.prompts, summary.earlier, files.given.loads) == (0, 8, loads)
    assert str(summary) == f"{files.target} is complete: 8 records; nothing was left to do"
    assert (files.target.read_bytes(), files.target.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seed": 6}, "begun with seed 5, not 6: "),
        ({"batch": 4, "plan": "device"}, "begun with batch 3, not 4, plan activations, not device: "),
        ({"model_hash": "other"}, "begun with another model: "),
        ({"dtype": None}, "begun with dtype float32, not None: "),
        ({"host_memory_gib": 2.0}, "begun with host_memory_gib None, not 2.0: "),
        ({"lines": LINES[:-1]}, "begun with another input: "),
    ],
)
def test_an_output_of_other_settings_is_left_alone(files, options, told):
    files.killed(2)
    files.write(*options.pop("lines", LINES))
    before = {file.name: file.read_bytes() for file in files.path.iterdir()}
    with pytest.raises(ValueError, match="give what it was begun with, or another --output") as refusal:
        files.run(**options)
    assert told in str(refusal.value)
    assert {file.name: file.read_bytes() for file in files.path.iterdir()} == before


def test_an_output_that_lost_a_record_is_not_gone_on_with(files, monkeypatch):
    """The place of the next line would be another's."""
    monkeypatch.setattr(runner, "STRETCH", 1)
    files.killed(2)
    lines = files.target.read_bytes().splitlines(keepends=True)
    files.target.write_bytes(b"".join(lines[1:]))
    with pytest.raises(ValueError, match="its record 5 is not the one of its line"):
        files.run()


def test_an_input_that_changes_meanwhile_is_an_error(files, monkeypatch):
    monkeypatch.setattr(runner, "STRETCH", 1)
    decode = decoding.Decoding.records

    def records(*args):
        files.source.write_bytes(files.source.read_bytes() + b"\n")
        return decode(*args)

    monkeypatch.setattr(decoding.Decoding, "records", records)
    with pytest.raises(ValueError, match="was changed since"):
        files.run()
    assert len(files.records()) == 3


@pytest.mark.parametrize("lines", [[{"prompt": [1, 2]}] * 3, LINES[:-1], [{"prompt": [7] * 40}]])
def test_an_input_that_changes_while_it_is_surveyed_leaves_no_job(files, monkeypatch, lines):
    """And is put back then, with its times: what was surveyed is what counts."""
    surveyed, whole, stat = runner.survey, files.source.read_bytes(), files.source.stat()

    def survey(*given):
        files.write(*lines)
        found = surveyed(*given)
        files.source.write_bytes(whole)
        os.utime(files.source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return found

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="was changed since"):
        patch.setattr(runner, "survey", survey)
        files.run()
    assert list(files.path.iterdir()) == [files.source]
    assert files.run().prompts == 8


@pytest.mark.parametrize(
    "waits", ["[150, {}]", "[7, {}]", '[7, {"id": "p6", "finish_reason": "stop"}]', '[7, {"id": "p7"}]']
)
def test_what_somebody_wrote_into_the_waiting_file_is_not_believed(files, waits):
    files.killed(1)
    with files.target.with_name("out.jsonl.waiting.jsonl").open("a") as file:
        file.write(f"{waits}\n")
    with pytest.raises(ValueError, match=r"waiting.jsonl was changed: (its record 7 is|the input has no line 150)"):
        files.run()


def test_another_machine_is_warned_of(files, monkeypatch, capsys):
    files.killed(1)
    monkeypatch.setattr(runner, "machine", lambda: {"device": "another", "jax": "0.0"})
    files.run()
    error = capsys.readouterr().err
    assert error.startswith("warning: ") and "another" in error and error.count("\n") == 1
    assert len(files.records()) == 8


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_progress_is_in_one_place_on_a_terminal_and_a_line_now_and_then_elsewhere(files, capfd, monkeypatch):
    files.anew()
    assert capfd.readouterr() == ("", "")  # it is done within a minute
    monkeypatch.setattr(meter, "SAID_EVERY", 0)
    files.anew()
    out, error = capfd.readouterr()
    said = re.findall(r"^decoding: (\d) of 8 records, [1-9]\d* tokens a second$", error, re.M)
    assert not out and len(said) == error.count("\n") >= NEW  # one a step
    assert said == sorted(said) and said[0] == "0" and said[-1] == "8"
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setattr(meter, "SHOWN_EVERY", 0)
    files.anew()
    error = capfd.readouterr().err
    assert re.search(r"decoding: [1-8] of 8 records, [1-9]\d* tokens a second, 0:00:0\d left", error)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    models.save(model(), path, tokenizer=models.byte_tokenizer(), eos_token_id=256)
    return path


command = functools.partial(scripts.call, generate)


def test_the_command_runs_the_job_and_prints_a_summary(files, checkpoint, capsys):
    expected = files.anew()
    files.target.unlink()
    given = [f"--checkpoint={checkpoint}", f"--input={files.source}", f"--output={files.target}", "--json"]
    options = ["--max_new_tokens=7", "--batch=3", "--plan=activations", "--temperature=0.9", "--top_p=1", "--seed=5"]
    command(*given, *options)
    *lines, last = capsys.readouterr().out.splitlines()
    assert files.records() == expected
    assert lines[0] == f"{files.target}: 8 records" and lines[1].startswith("8 prompts decoded in ")
    document = json.loads(last)
    assert {"output", "records", "errors", "tokens", "seconds", "shapes", "device", "jax"} <= set(document)
    assert document["records"] == document["prompts"] == 8 and document["shapes"] == [[3, LONGEST]]
    command(*given, *options)
    assert "is complete: 8 records" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=r"error: .* was begun with dtype float32, not float16, top_p 1\.0, not 0\.9: "
    ):
        command(*given, *options[:4], *options[5:], "--dtype=float16")


@pytest.mark.parametrize("lines", [["nonsense", "{}"], [{"prompt": "x" * 90}]])
def test_a_job_of_errors_alone_fails(files, checkpoint, lines):
    """When it is run, and when it is complete."""
    files.write(*lines)
    given = [f"--checkpoint={checkpoint}", f"--input={files.source}", f"--output={files.target}"]
    for _ in range(2):
        with pytest.raises(SystemExit, match=rf"^error: {files.target}: all {len(lines)} records are errors$"):
            command(*given, "--max_new_tokens=7")


def test_random_weights_take_any_text(files, monkeypatch):
    monkeypatch.setitem(models.PRESETS, CONFIG.name, CONFIG)
    files.write(*({"prompt": prompt} for prompt in (*PROMPTS, "x" * LONGEST)))
    given = ["--model=opt-tiny", f"--input={files.source}", f"--output={files.target}", "--batch=3"]
    command(*given, "--max_new_tokens=7", "--plan=activations", "--seed=3")
    assert {record["text"] for record in files.records()} == {None}
    assert {(len(record["tokens"]), record["finish_reason"]) for record in files.records()} == {(7, "length")}


def test_an_interrupt_says_how_to_go_on(files, checkpoint, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    with pytest.raises(SystemExit):
        command(f"--checkpoint={checkpoint}", f"--input={files.source}", f"--output={files.target}")
    assert capsys.readouterr().err == f"interrupted; the same command goes on with {files.target}\n"


# --- kills ------------------------------------------------------------------------------------------------------------


def start(*words):
    """The program in a process of its own."""
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "experiments/generate.py", *words],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def done(target):
    """How many records there are, those that wait included."""
    files = (target, target.with_name(f"{target.name}.waiting.jsonl"))
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


def random_prompts(count, dice):
    """Pieces of this file, many of them short, and a line with an error."""
    text, lines = Path(__file__).read_text(), []
    for number in range(count):
        at, length = dice.randrange(len(text) - 100), dice.randrange(5, dice.choice([20, 100]))
        lines.append(json.dumps({"id": f"r{number}", "prompt": text[at : at + length]}))
    lines.insert(count // 3, "not JSON")
    return "\n".join(lines)


def test_a_job_that_is_killed_ends_with_the_bytes_of_one_that_is_not(tmp_path, monkeypatch, capsys):
    """Of the shipped checkpoint, sampling; killed after random numbers of records and, in turns, while it starts. The
    last process is this one."""
    count, kills = int(os.environ.get("JOB_PROMPTS", "30")), int(os.environ.get("JOB_KILLS", "1"))
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    dice = random.Random(seed)
    source, target, whole = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    source.write_text(random_prompts(count, dice))
    options = [f"--input={source}", "--json", "--max_new_tokens=20"]
    if count < 100:  # where compiling would take most of the time
        options += ["--max_new_tokens=8", "--batch=4", "--plan=split:0.5"]
    for kill in range(kills):
        process = start(f"--output={target}", *options)
        if kill % 2:
            time.sleep(dice.random() * 2)
        else:
            share = (count - 16 - done(target)) // ((kills - kill + 1) // 2)
            after = done(target) + dice.randrange(2, max(3, share))  # one is the error's, without a batch
            while done(target) < after and process.poll() is None:
                time.sleep(0.001)
            time.sleep(dice.random() * 0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        print(f"killed after {done(target)} records")
    shipped = Source().load()
    monkeypatch.setattr(Source, "load", lambda *_: shipped)
    summaries = []
    for output in (target, whole):
        command(f"--output={output}", *options)
        summaries.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert target.read_bytes() == whole.read_bytes()
    assert summaries[0]["prompts"] < summaries[1]["prompts"] == count
    records = [json.loads(line) for line in whole.read_text().splitlines()]
    assert records.pop(count // 3)["line"] == count // 3 + 1
    assert [record["id"] for record in records] == [f"r{number}" for number in range(count)]
    assert len({record["text"] for record in records}) > count / 2
