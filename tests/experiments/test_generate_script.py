"""The main job: what it continues, what it prints, what it checks and how it refuses."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import scripts
from tokenizers import Tokenizer, decoders, processors
from tokenizers import models as tokenizer_models

import kvrecomp
import models
from experiments import generate

CONFIG = models.OPTConfig("opt-tiny", layers=2, hidden=24, heads=3, intermediate=40, vocab=258, positions=67)
BYTES = models.TextProcessor(models.byte_tokenizer())
PROMPTS = ["Return the", "é", 'The "with" statement']


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tokenizer = models.byte_tokenizer()
    models.save(models.create(CONFIG, dtype="float32", seed=3), path, tokenizer=tokenizer, eos_token_id=256)
    return path


command = functools.partial(scripts.call, generate)


def document_of(capsys) -> dict:
    """The last line of what was printed."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# --- what it does -----------------------------------------------------------------------------------------------------


def test_texts_are_those_of_generate(checkpoint):
    model, text = generate.load(checkpoint)
    plan = kvrecomp.named_plan("activations", model.shape, kvrecomp.Workload(3, 21, 9), tail=4)
    run = generate.continue_prompts(model, text, PROMPTS, plan=plan, max_new_tokens=9)

    # By hand: end-of-text, the bytes, zeros on the left; new ids are bytes again, until the next end-of-text.
    rows = [[256, *prompt.encode()] for prompt in PROMPTS]
    longest = max(map(len, rows))
    ids = np.array([[0] * (longest - len(row)) + row for row in rows], np.int32)
    mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows], np.int32)
    result = kvrecomp.generate(model, ids, mask, max_new_tokens=9, plan=plan, eos_token_id=256)
    np.testing.assert_array_equal(run.result.sequences, result.sequences)
    for written, new, row in zip(run.texts, run.continuations, result.sequences[:, longest:].tolist()):
        assert new == (row[: row.index(256) + 1] if 256 in row else row)
        assert written == bytes(token for token in new if token < 256).decode(errors="replace")
    assert run.prompt_tokens == [11, 3, 21]
    # All of the cache crosses the link: [tokens, batch, hidden] in float32 for 2 layers, and 4 tokens more a write-out.
    assert [sent // (3 * 24 * 4 * 2) for sent in run.result.link_bytes] == [21] * 4 + [25] * 4
    assert run.check.plan == "device" and run.check.difference < 1e-5 and run.check.passed


def test_sampling_and_plan_are_handed_on(checkpoint):
    model, text = generate.load(checkpoint)
    options = {"plan": "split:0.5", "max_new_tokens": 9, "check": False}
    runs = [
        generate.continue_prompts(model, text, PROMPTS, sampling=generate.Sampling(True, seed=seed), **options)
        for seed in (1, 2)
    ]
    assert runs[0].continuations != runs[1].continuations
    forms = {block.form for layer in runs[0].result.plan.layers for block in layer.prompt}
    assert forms == {"activations", "keys_values"}
    assert runs[0].check is None


def test_check_finds_wrong_logits_and_says_when_it_cannot_be_made(checkpoint):
    model, text = generate.load(checkpoint)
    run = generate.continue_prompts(model, text, PROMPTS, plan="device", max_new_tokens=3)
    assert run.check.plan == "keys_values" and run.check.passed
    mask = generate.encode(text, PROMPTS)[1]
    run.result.logits[1, 1, 100] += 1e-3
    wrong = generate.check_logits(model, run.result, mask)
    assert not wrong.passed and wrong.difference == pytest.approx(1e-3, rel=0.01) and "DIFFER" in str(wrong)
    assert not generate.Check("device", float("nan"), 1e-4).passed
    unmade = generate.check_logits(model, run.result, mask, kvrecomp.Budget(device=1e5))
    assert unmade.difference is None and unmade.passed and "needs" in str(unmade)


@pytest.mark.parametrize("drafts", [{}, {"prompt_lookup_num_tokens": 3}])
def test_rows_that_ended_are_checked_up_to_there(checkpoint, drafts):
    """With drafts they have no logits after that."""
    model, text = generate.load(checkpoint)
    ids, mask = generate.encode(text, PROMPTS)
    options = {"max_new_tokens": 9, "plan": "activations", "output_logits": True, **drafts}
    ends = kvrecomp.generate(model, ids, mask, **options).sequences[0, -5]
    result = kvrecomp.generate(model, ids, mask, eos_token_id=int(ends), **options)
    assert result.new_tokens[0] <= 5 < result.new_tokens.max()
    found = generate.check_logits(model, result, mask)
    assert found.passed and found.difference < 1e-5


def test_random_weights_have_prompts_of_bytes_and_print_ids(monkeypatch, capsys):
    monkeypatch.setitem(models.PRESETS, CONFIG.name, CONFIG)
    command("--model=opt-tiny", "--prompt=ab", "--max_new_tokens=3", "--json")
    out = capsys.readouterr().out
    row = json.loads(out.splitlines()[-1])["rows"][0]
    assert row["prompt_tokens"] == 2 and row["text"] is None and len(row["ids"]) == 3
    assert "ab " + " ".join(map(str, row["ids"])) in out


def test_weights_that_do_not_fit_are_in_host_memory(tmp_path, capsys):
    """Of five layers as many as leave room for the least that must be on the device; the logits are checked."""
    config = dataclasses.replace(CONFIG, layers=5, intermediate=160)
    models.save(models.create(config, dtype="float32", seed=3), tmp_path / "five", tokenizer=models.byte_tokenizer())
    shape = models.read_shape(tmp_path / "five", dtype="float32")
    plan = kvrecomp.named_plan("activations", shape, kvrecomp.Workload(3, 21, 6))
    least = sum(kvrecomp.memory_needed(kvrecomp.with_host_weights(plan, 1.0))["device"].values())
    budget = least + 2.9 * shape.layers[0].parameters * 4
    given = [f"--checkpoint={tmp_path / 'five'}", *(f"--prompt={prompt}" for prompt in PROMPTS), "--max_new_tokens=6"]
    command(*given, f"--device_memory_gib={budget / 2**30:.9f}", "--nodo_sample", "--json", "--drafts=0")
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert [layer["weights"] for layer in document["layers"]].count("host") == 3
    assert document["groups"] * document["batch"] == 3 and "weights of 3 layers" in out
    assert document["check"]["passed"] and document["check"]["difference"] is not None
    command(*given, "--nodo_sample", "--nocheck", "--json")
    assert [row["ids"] for row in document_of(capsys)["rows"]] == [row["ids"] for row in document["rows"]]


def test_weights_and_cache_are_float32_on_a_cpu_and_what_is_asked_for(checkpoint, tmp_path):
    models.save(models.create(CONFIG, dtype="bfloat16"), tmp_path / "half", tokenizer=models.byte_tokenizer())
    assert generate.load(tmp_path / "half")[0].shape.dtype == "float32"
    assert generate.load(checkpoint, dtype="float16")[0].shape.dtype == "float16"


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_of_a_file_follow_those_given_and_blank_lines_are_skipped(tmp_path):
    (tmp_path / "prompts").write_text("one\n\n  \ntwo three\r\nfour")
    assert generate.read_prompts(["zero"], tmp_path / "prompts") == ["zero", "one", "two three", "four"]
    assert generate.read_prompts([], None) == list(generate.PROMPTS)


def test_built_in_prompts_have_different_lengths():
    assert len(set(generate.encode(BYTES, generate.PROMPTS)[1].sum(axis=1))) == len(generate.PROMPTS) > 2


def test_prompts_begin_as_the_tokenizer_says():
    ids, mask = generate.encode(BYTES, ["<|endoftext|>a", "bcde"])
    assert ids.tolist() == [[0, 0, 256, 256, 97], [256, 98, 99, 100, 101]]
    assert mask.tolist() == [[False, False, True, True, True], [True] * 5]
    plain = models.byte_tokenizer()
    plain.post_processor = processors.Sequence([])
    assert generate.encode(models.TextProcessor(plain, eos_token_ids=(256,)), ["ab"])[0].tolist() == [[97, 98]]


def test_texts_of_the_shipped_checkpoint_begin_with_what_ends_them():
    text = models.load_text(generate.SHIPPED)
    assert text.encode("a") == [256, 97] and text.eos_token_ids == (256,)


def test_without_a_tokenizer_prompts_are_ids(tmp_path, capsys):
    models.save(models.create(CONFIG, dtype="float32", seed=3), tmp_path / "untold")
    command(f"--checkpoint={tmp_path / 'untold'}", "--prompt=5 17 2", "--prompt=201", "--max_new_tokens=3", "--json")
    rows = document_of(capsys)["rows"]
    assert [row["prompt_tokens"] for row in rows] == [3, 1] and [row["text"] for row in rows] == [None, None]
    ids, mask = generate.encode(models.TextProcessor(), ["5 17 2", "201"])
    assert ids.tolist() == [[5, 17, 2], [0, 0, 201]] and mask.sum() == 4
    assert not generate.is_ids("5 x") and not generate.is_ids(" ")
    for digits, message in (
        ("9" * 30, "2 has the token id 1e[+]30, which no"),
        ("9" * 5000, "2 cannot be read: Exceeds"),
    ):
        with pytest.raises(SystemExit, match=f"error: prompt {message}"):
            command(f"--checkpoint={tmp_path / 'untold'}", "--prompt=5", f"--prompt={digits}")


def test_control_characters_do_not_reach_the_terminal():
    assert generate.printable("a\x1b[31m\x07\tb\n") == "a\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}\tb\n"


# --- what the checkpoint says of text ---------------------------------------------------------------------------------


@pytest.fixture
def chatting(checkpoint, tmp_path):
    """The same checkpoint with more files beside it: a chat template, and sampling of the few likeliest."""
    path = tmp_path / "chatting"
    shutil.copytree(checkpoint, path)
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}>")
    sampling = {"eos_token_id": [256, 10], "do_sample": True, "top_k": 5, "temperature": 1.5, "repetition_penalty": 1.1}
    (path / "generation_config.json").write_text(json.dumps(sampling))
    return path


def test_sampling_is_the_checkpoints_where_flags_are_silent(chatting, capsys):
    model, text = generate.load(chatting)
    given = [f"--checkpoint={chatting}", "--prompt=ab", "--plan=device", "--max_new_tokens=9", "--nocheck", "--json"]
    for flags, chosen, said in [
        ([], {"temperature": 1.5, "top_k": 5}, "do_sample True, temperature 1.5, top_k 5, top_p 1.0"),
        (["--top_k=2", "--seed=7"], {"temperature": 1.5, "top_k": 2, "seed": 7}, "temperature 1.5, top_p 1.0"),
        (["--nodo_sample"], {"do_sample": False}, ""),
    ]:
        command(*given, *flags)
        out = capsys.readouterr().out.splitlines()
        assert [line for line in out if "as the checkpoint says" in line] == [
            f"sampling as the checkpoint says: {said}" for _ in range(bool(said))
        ]
        assert sum("not supported" in line and "repetition_penalty 1.1" in line for line in out) == 1
        sampling = generate.Sampling(**{"do_sample": True, **chosen})
        options = {"plan": "device", "max_new_tokens": 9, "check": False}
        run = generate.continue_prompts(model, text, ["ab"], sampling=sampling, **options)
        assert json.loads(out[-1])["rows"][0]["ids"] == run.continuations[0]


def test_a_flag_of_sampling_asks_for_it_where_the_checkpoint_is_greedy(checkpoint, chatting, capsys):
    (chatting / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, "do_sample": False}))
    given = ["--prompt=ab", "--max_new_tokens=9", "--nocheck", "--json"]

    def ids(path, *flags):
        command(f"--checkpoint={path}", *given, *flags)
        return document_of(capsys)["rows"][0]["ids"]

    assert ids(chatting) == ids(checkpoint, "--nodo_sample") != ids(chatting, "--temperature=2")
    assert ids(chatting, "--temperature=2") == ids(checkpoint, "--temperature=2", "--top_k=50", "--top_p=1")


def test_chats(checkpoint, chatting, tmp_path, capsys):
    """Prompts of flags and of files are what a user says, and messages are taken as they are."""
    greedy = ["--max_new_tokens=9", "--nodo_sample"]
    command(f"--checkpoint={chatting}", "--chat", "--prompt=ab", "--nocheck", "--json", *greedy)
    row = document_of(capsys)["rows"][0]
    command(f"--checkpoint={checkpoint}", "--prompt=user: ab\n>", "--nocheck", "--json", *greedy)
    plain = document_of(capsys)["rows"][0]  # but that this one begins with <|endoftext|>
    assert row["prompt"] == "ab" and row["prompt_tokens"] == len("user: ab\n>") == plain["prompt_tokens"] - 1
    lines = [{"prompt": "ab"}, {"messages": [{"role": "user", "content": "ab"}]}, {"prompt": [*b"user: ab\n>"]}]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    command(f"--checkpoint={chatting}", "--chat", *files, *greedy)
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["tokens"] for record in records] == [row["ids"]] * 3
    assert [record["text"] for record in records] == [row["text"]] * 3
    assert records[1]["prompt"] == lines[1]["messages"]
    with pytest.raises(SystemExit, match=r"error: .* was begun with chat True, not False"):
        command(f"--checkpoint={chatting}", *files, *greedy)
    with pytest.raises(SystemExit, match="has no chat template: leave out --chat"):
        command(f"--checkpoint={checkpoint}", "--chat", "--prompt=ab")


def test_texts_go_on_from_their_prompts(tmp_path, capsys):
    """With the decoder of Llama 2, which strips a text's first space."""
    words = ["<unk>", "▁Return", "▁the", "▁is"]
    tokenizer = Tokenizer(tokenizer_models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    model = models.create(dataclasses.replace(CONFIG, vocab=4), dtype="float32", seed=3)
    models.save(model, tmp_path / "words", tokenizer=tokenizer)
    (tmp_path / "in.jsonl").write_text('{"prompt": [1, 2]}\n')
    files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    command(f"--checkpoint={tmp_path / 'words'}", *files, "--max_new_tokens=5", "--seed=1")
    record = json.loads((tmp_path / "out.jsonl").read_text())
    whole = tokenizer.decode([1, 2, *record["tokens"]])
    assert whole.startswith("Return the ") and "Return the" + record["text"] == whole


# --- the command ------------------------------------------------------------------------------------------------------


def test_program_prints_all_and_json_last(checkpoint):
    """In a process of its own."""
    root = Path(__file__).parents[2]
    options = ["--prompt=Return the", "--prompt=é", "--max_new_tokens=6", "--tail=4", "--nodo_sample", "--json"]
    done = subprocess.run(
        [sys.executable, "experiments/generate.py", f"--checkpoint={checkpoint}", "--plan=activations", *options],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *human, last = done.stdout.splitlines()
    document = json.loads(last)
    model, text = generate.load(checkpoint)
    plan = kvrecomp.named_plan("activations", model.shape, kvrecomp.Workload(2, 11, 6), tail=4)
    run = generate.continue_prompts(model, text, ["Return the", "é"], plan=plan, max_new_tokens=6)
    assert [row["text"] for row in document["rows"]] == run.texts
    assert [row["ids"] for row in document["rows"]] == run.continuations
    assert document["check"]["passed"] and document["check"]["difference"] <= document["check"]["tolerance"] == 1e-4
    sizes = [tokens * 2 * 24 * 4 * 2 for tokens in (11, 15)]
    assert [document["link_bytes_first"], document["link_bytes_last"]] == sizes
    assert document["median_ms"] > 0 and document["plan"] == "activations" and document["tail"] == 4
    assert len(document["layers"]) == 2
    parts = ("prompt 2: 3 tokens, 6 new", "Plan activations: opt-tiny", "ms a step", "over the link", "logits equal")
    for part in parts:
        assert part in "\n".join(human)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan=split:2"], "plan 'split:2': '2' is not a fraction from 0 to 1"),
        (["--plan=nonsense"], "there is no plan 'nonsense'; the plans are auto, activations"),
        (["--prompt="], "prompt 2 is empty"),
        (["--prompts_file=/nowhere"], "/nowhere: No such file or directory"),
        (["--prompts_file={blank}"], "has no prompt: write one a line"),
        (["--prompts_file={bytes}"], "is not text in UTF-8 (byte 1)"),
        (["--prompt=\udcff"], "prompt 2 is not text in UTF-8"),
        (["--prompt=" + "x" * 70], "a prompt of 71 and 5 new tokens need 76 positions; opt-tiny has 67"),
        (["--max_new_tokens=0"], "flag --max_new_tokens=0: 0 is not a positive integer"),
        (["--temperature=0"], "temperature is 0.0; it must be above zero"),
        (["--plan=activations", "--window_mib=0.00005"], "is smaller than a block"),
        (["--plan=activations", "--window_mib=nan"], "flag --window_mib=nan: nan is not a finite number"),
        (["--prompt=" + "x" * 55, "--plan=device", "--device_memory_gib=0.000062"], "of device memory"),
        (["--dtype=int8"], "dtype is int8; expected one of float32"),
        (["--checkpoint=/nowhere"], "/nowhere is not a directory"),
        (["--checkpoint={untold}"], "has no tokenizer.json"),
        (["--checkpoint={truncated}"], "cannot be read"),
        (["--model=opt-125m", "--chat", "--plan=device"], "--model and --checkpoint exclude each other"),
        (["--model=opt-125m", "--chat"], "--chat is for a checkpoint"),
        (["--model=opt-125"], "unknown model 'opt-125'; expected one of opt-125m"),
        (["--model=opt-175b", "--device_memory_gib=80"], "GiB of host memory (weights"),
    ],
)
def test_refusals_are_one_line(checkpoint, tmp_path, arguments, message):
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "bytes").write_bytes(b"a\xff")
    places = {name: tmp_path / name for name in ("blank", "bytes", "untold", "truncated")}
    if "{untold}" in arguments[0]:
        models.save(models.create(CONFIG), places["untold"])
    if "{truncated}" in arguments[0]:
        models.save(models.create(CONFIG), places["truncated"], tokenizer=models.byte_tokenizer())
        largest = max((tmp_path / "truncated" / "params").rglob("*"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100])
    given = [argument.format(**places) for argument in arguments]
    with pytest.raises(SystemExit) as refusal:
        if not given[0].startswith("--model") or len(given) > 2:
            given.insert(0, f"--checkpoint={checkpoint}")
        command("--max_new_tokens=5", "--prompt=a", *given)
    line = str(refusal.value.code)
    assert line.startswith("error: ") and message in line and "\n" not in line


def test_differing_logits_are_an_error_after_all_is_printed(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(generate, "check_logits", lambda *_: generate.Check("device", 1.0, 1e-4))
    with pytest.raises(SystemExit, match="error: logits DIFFER FROM those of plan device"):
        command(f"--checkpoint={checkpoint}", "--prompt=a", "--max_new_tokens=2", "--json")
    assert document_of(capsys)["check"]["passed"] is False


def test_one_new_token_has_no_step(checkpoint, capsys):
    command(f"--checkpoint={checkpoint}", "--prompt=a", "--max_new_tokens=1", "--json")
    document = document_of(capsys)
    assert document["median_ms"] is None and document["link_bytes"] is None and document["check"]["passed"]
    assert jax.default_backend() == document["device"]
