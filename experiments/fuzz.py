"""Tries what nobody should: flags, arguments and files that make no sense, on the CPU, at random but reproducibly.

    python experiments/fuzz.py --cases=2000 --out=fuzz.json

A case may do its work, or refuse it in one line; where it does its work, that is checked against something known: a
plan holds the whole prompt within the budget, greedy text is that of another plan, a job has a record for each line.
What else happens is a fault: a traceback, no end within the time limit, the end of the process, or a wrong answer.
`--only=KIND:NUMBER` tries one case again, with the same seed.

Cases run in this many processes of their own, in a temporary folder, on a machine of made-up speed.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.support import script
from experiments.support.source import SHIPPED

import numpy as np
from absl import flags

import kvrecomp
import models
from kvrecomp.files import write_json
from kvrecomp.measure import profiler
from kvrecomp.plan import MEMORIES, BlockSpec, Budget, LayerShape, ModelShape, Plan, Workload
from kvrecomp.plan.footprint import memory_needed
from kvrecomp.plan.named import named_plan, with_host_weights
from kvrecomp.predict.hardware import HardwareProfile, Line
from kvrecomp.predict.scheduler import make_plan

RESULTS = Path(__file__).parent / "results"
TOY = models.OPTConfig("toy", layers=2, hidden=24, heads=3, intermediate=40, vocab=61, positions=67)
PROMPT = "def "
MEMORY = 12 * 2**30  # bytes that a process may allocate
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

OUTCOMES = ("done", "refused", "traceback", "hang", "killed", "wrong")
FAULTS = OUTCOMES[2:]

# --- values -----------------------------------------------------------------------------------------------------------

INTEGERS = (*range(-2, 9), 13, 61, 67, 68, 1023, 2**31 - 1, 2**31, 2**32, 2**63, 10**12, 10**30)
FRACTIONS = (0.0, 1e-300, 1e-5, 0.3, 0.5, 1.0, 1.5, 2.0, 64.0, -1.0, 1e300, math.nan, math.inf, -math.inf)
WORDS = (
    "",
    " ",
    "x",
    "auto",
    "1,2",
    ",",
    "1.5",
    "0x10",
    "1_000",
    " 7 ",
    "٣",
    "é",
    "a" * 5000,
    "-1",
    "None",
    "{}",
    "a\nb",
)
PLANS = (
    *("auto", "activations", "recompute", "keys_values", "split:0.5", "kvpr:0.3", "device", "device:0.25"),
    *("activations+int4", "keys_values+int8", "device:0.25+int4"),
)
ODD_PLANS = (
    "device:",
    "split:2",
    "kvpr:nan",
    "device:-0",
    "split:1e-9",
    "keys_values+packed",
    "activations+",
    "auto:0",
)
ENDLESS = ("steps", "layers")  # flags of which a large number is no mistake, and takes as long as it says
JSONS = (None, True, 0, -1, 1e308, math.nan, math.inf, 10**40, "", "x", [], [0], {}, {"a": 1}, "1" * 999)


class Wrong(Exception):
    """An answer that is not the right one, given as if it were."""


def check(condition: bool, text: str) -> None:
    if not condition:
        raise Wrong(text)


class Case(NamedTuple):
    """A case's randomness, a folder of its own, and where it says what it tries."""

    rng: random.Random
    folder: Path
    say: Callable[[str], None]


def any_value(rng: random.Random, kind: str) -> Any:
    """A value for an argument, mostly of the kind that belongs there."""
    if rng.random() < 0.1:
        return rng.choice([None, "7", 3.0, math.nan, True, b"x", [], (2,), np.int32(5), np.float64(2), np.arange(2)])
    return rng.choice(INTEGERS if kind == "integer" else FRACTIONS)


def path(rng: random.Random, folder: Path) -> str:
    """A path that is not there, is a folder, is in no folder, or is below a file."""
    (folder / "file").write_text("{}")
    return rng.choice(["", ".", "new.png", "new.json", str(folder), "none/new.png", "file", "file/new.json", "new"])


def word_for(rng: random.Random, flag: flags.Flag, folder: Path) -> str:
    """A value of a flag as a user types it."""
    name, kind = flag.name, flag.parser.syntactic_help if flag.parser else ""
    if rng.random() < 0.15:
        return rng.choice(WORDS)
    if name in ("plan", "plans"):
        return rng.choice((*PLANS, *PLANS, *ODD_PLANS))
    if name in ("model", "models"):
        return rng.choice(["toy", "toy", "opt-125m", "opt-175b", "llama-2-7b", "gemma-2b", "opt"])
    if name == "dtype":
        return rng.choice(["float32", "bfloat16", "float16", "float64", "int8"])
    if name == "weights":
        return rng.choice(["device", "host", "auto", "0.5", "2", "nan"])
    if name == "hardware":
        return rng.choice(["h200", "t4", "a100", "H100", "abacus"])
    if isinstance(flag.parser, flags.EnumParser):
        return rng.choice(flag.parser.enum_values)
    if "true" in kind or flag.boolean:
        return rng.choice(["true", "false", "2", ""])
    if name in ENDLESS:
        return str(rng.choice(range(-1, 3)))
    if "integer" in kind or name in ("batch", "prompt", "batches", "cached", "rooms"):
        return str(rng.choice(INTEGERS))
    if "number" in kind:
        return str(rng.choice(FRACTIONS))
    return path(rng, folder)


# --- scripts ----------------------------------------------------------------------------------------------------------


def call(case: Case, name: str, base: Sequence[str], most: int = 3) -> tuple[str, list[str]]:
    """Runs a script with these words and a few more, at random: what it prints, and the words."""
    program = importlib.import_module(f"experiments.{name}")
    known = flags.FlagValues()
    program.define_flags(known)
    of_script = [known[key] for key in known if known[key].name == key and key not in ("commit", "json")]
    chosen = case.rng.sample(sorted(of_script, key=lambda flag: flag.name), case.rng.randint(0, most))
    words = [f"--{flag.name}={word_for(case.rng, flag, case.folder)}" for flag in chosen]
    if case.rng.random() < 0.05:
        words.append(case.rng.choice(["--no_such_flag=1", "word", "--", "-x", "--seed"]))
    return run_script(case, program, [*base, *words]), words


def run_script(case: Case, program: Any, words: Sequence[str]) -> str:
    """What a script prints with these words."""
    case.say(" ".join([program.__name__, *(word if len(word) < 300 else f"{word[:300]}..." for word in words)]))
    given, out = flags.FlagValues(), io.StringIO()
    program.define_flags(given)
    with contextlib.redirect_stdout(out), script.in_one_line():
        script.call(program.main, given, given([program.__name__, *words]))
    return out.getvalue()


def last_line(printed: str) -> dict[str, Any]:
    """The JSON document that a script prints last."""
    return json.loads(printed.strip().splitlines()[-1])


def try_plan(case: Case) -> None:
    """plan.py: what it chooses fits in what it says may be used."""
    printed, _ = call(case, "plan", ["--hardware=h200", "--model=toy", "--batch=3", "--prompt=20", "--new=7", "--json"])
    found = last_line(printed)
    chosen = found["alternatives"][0]
    check(chosen["fits"] and chosen["predicted_ms"] >= 0, f"the chosen plan: {chosen}")
    for memory in MEMORIES:
        limit = found["budget"][memory]
        check(limit is None or chosen[f"{memory}_bytes"] <= limit, f"{memory}: {chosen}, {found['budget']}")


def greedy(model: Any, ids: Sequence[int], new: int) -> list[int]:
    """The likeliest tokens after these, by the plain forward pass."""
    found = list(ids)
    for _ in range(new):
        found.append(int(np.argmax(model(np.array([found]))[0, -1])))
    return found[len(ids) :]


@functools.cache
def shipped() -> list[int]:
    """What the shipped checkpoint goes on with after PROMPT."""
    return greedy(models.load(SHIPPED, dtype="float32"), models.load_text(SHIPPED).encode(PROMPT), 9)


@functools.cache
def toy() -> Any:
    """A model in float32."""
    return models.create(TOY, dtype="float32", seed=3)


def check_text(ids: Sequence[int]) -> None:
    """Raises `Wrong` unless these follow PROMPT, as far as that is known."""
    check(list(ids[:9]) == shipped()[: len(ids)], f"{ids} where {shipped()} is right")


def try_generate(case: Case) -> None:
    """generate.py: with the likeliest tokens the same under any plan."""
    base = [f"--prompt={PROMPT}", "--max_new_tokens=5", "--nodo_sample", "--json", "--device_memory_gib=4"]
    printed, words = call(case, "generate", [*base, "--host_memory_gib=4", "--nocheck"])
    document = last_line(printed)
    for row in document["rows"]:
        check(all(isinstance(token, int) for token in row["ids"]), f"ids are {row['ids']}")
        changed = ("--checkpoint", "--model", "--dtype", "--chat", "--do_sample", "--temperature", "--top_")
        if row["prompt"] == PROMPT and not any(word.startswith(changed) for word in words):
            check_text(row["ids"])


LINES = (
    '{"prompt": "def "}',
    '{"id": "a", "prompt": "import "}',
    '{"id": 7, "prompt": [100, 101]}',
    "",
    "  ",
    "[]",
    "7",
    '"x"',
    "{}",
    "{",
    '{"prompt": 7}',
    '{"prompt": ""}',
    '{"prompt": [1e9]}',
    '{"prompt": [-1]}',
    '{"prompt": "x", "id": null}',
    '{"prompt": "x", "id": []}',
    '{"prompt": "x", "max_new_tokens": -1}',
    '{"messages": [{"role": "user", "content": "x"}]}',
    '{"prompt": "' + "ab" * 900 + '"}',
    '{"prompt": "\\ud800"}',
    "[" * 3000,
    '{"prompt": NaN}',
    "\x00",
    "é",
)


def try_job(case: Case) -> None:
    """generate.py --input: a record for each line that is not blank, whatever the line."""
    lines = [case.rng.choice(LINES) for _ in range(case.rng.randint(0, 7))]
    text = case.rng.choice(["\n", "\n", "\r\n"]).join(lines) + case.rng.choice(["", "\n"])
    (case.folder / "in.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    output = case.folder / "out.jsonl"
    base = ["--input=in.jsonl", "--output=out.jsonl", "--max_new_tokens=2", "--nodo_sample", "--device_memory_gib=4"]
    case.say(repr(text[:600]))
    _, words = call(case, "generate", [*base, "--host_memory_gib=4", "--nocheck"], most=1)
    if not any(word.startswith(("--input", "--output")) for word in words):
        records = [json.loads(line) for line in output.read_text().splitlines()]
        expected = sum(bool(line.strip()) for line in lines)
        check(len(records) == expected, f"{len(records)} records of {expected} lines: {text[:300]!r}")


def try_benchmark(case: Case) -> None:
    """benchmark.py: rows of what was asked for."""
    base = [
        "--model=toy",
        "--dtype=float32",
        "--batch=2",
        "--prompt=7",
        "--new=3",
        "--plans=activations",
        "--copy_gib=.5",
    ]
    budget = ["--device_memory_gib=4", "--host_memory_gib=4", "--notime_layers"]
    printed, _ = call(case, "benchmark", [*base, *budget])
    for row in last_line(printed)["rows"]:
        check(row["median_ms"] > 0 and 0 < len(row["step_ms"]) < row["new"], f"a row: {row}")


def try_train(case: Case) -> None:
    """train_lm.py: one step of a tiny model."""
    sizes = ["--steps=1", "--batch=2", "--context=128", "--positions=128", "--layers=1", "--hidden=8", "--heads=2"]
    printed, _ = call(case, "train_lm", [*sizes, "--dtype=float32", "--eval_every=1", "--output=model"], most=2)
    last_line(printed)


# --- files ------------------------------------------------------------------------------------------------------------


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def damaged(rng: random.Random, text: str) -> str:
    """A JSON file's text with other values, without some, cut, or no JSON at all."""
    how = rng.random()
    if how < 0.1:
        return text[: rng.randrange(len(text) + 1)]
    if how < 0.2:
        return rng.choice(
            ["", "null", "[]", "7", "{", "[" * 5000, '"x"', "\ufeff" + text, "NaN", '{"rows": 3}', "\x00"]
        )
    document = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        if not (found := list(places(document))):
            break
        node, key = rng.choice(found)
        if rng.random() < 0.3:
            del node[key]
        else:
            node[key] = rng.choice(JSONS)
    return json.dumps(document)


def try_results(case: Case) -> None:
    """Files of results, read by the scripts that show them."""
    source = case.rng.choice(["h100_suite.json", "h200_suite.json", "h100_choices.json"])
    (case.folder / "in.json").write_text(damaged(case.rng, (RESULTS / source).read_text(encoding="utf-8")))
    name, words = case.rng.choice(
        [
            ("plan", ["--hardware=h200", "--model=toy", "--batch=3", "--prompt=9", "--new=7", "--measured=in.json"]),
            ("reproduce_paper", ["--hardware=rtx5000", "--tables=Table 3", "--results=in.json"]),
            ("trace", ["--from=in.json", "--plot=out.png"]),
            ("sweep", ["--from=in.json", "--plot=out.png"]),
        ]
    )
    run_script(case, importlib.import_module(f"experiments.{name}"), words)


def try_profile(case: Case) -> None:
    """The file with this machine's profile: what cannot be read is measured anew, which here is refused."""
    good = profiler.profile_path().read_text()
    text = damaged(case.rng, good)
    case.say(f"profile {text[:900]}")
    try:
        read = HardwareProfile.from_json({key: value for key, value in json.loads(text).items() if key != "format"})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return  # what `profiler` takes for damage
    plan = make_plan(TOY.shape, Workload(3, 20, 7), read)
    check(plan.shape == TOY.shape, "another model")
    check(math.isfinite(float(plan.reason.split(" ms")[0])), f"predicted: {plan.reason}")


def try_checkpoint(case: Case) -> None:
    """A checkpoint with a damaged file: its configuration, its tokenizer, or whatever is beside."""
    folder = case.folder / "model"
    folder.mkdir()
    for file in SHIPPED.iterdir():
        (folder / file.name).symlink_to(file)
    target = folder / case.rng.choice(["config.json", "config.json", "tokenizer.json", "generation_config.json"])
    text = damaged(case.rng, target.read_text(encoding="utf-8"))
    target.unlink()
    target.write_text(text, encoding="utf-8")
    case.say(f"{target.name}: {text[:900]}")
    program = importlib.import_module("experiments.generate")
    base = ["--checkpoint=model", f"--prompt={PROMPT}", "--max_new_tokens=2", "--nodo_sample", "--nocheck", "--json"]
    printed = run_script(case, program, [*base, "--device_memory_gib=4", "--host_memory_gib=4"])
    (row,) = last_line(printed)["rows"]
    if target.name == "generation_config.json":  # it may end the text sooner, and no more
        check_text(row["ids"])


# --- the library ------------------------------------------------------------------------------------------------------


def try_sizes(case: Case) -> None:
    """Plans of models and workloads of any size: they hold the prompt, and what is chosen fits."""
    rng = case.rng

    def integer(*usual: int) -> Any:
        return (
            any_value(rng, "integer") if rng.random() < 0.03 else rng.choice(usual or (1, 2, 3, 7, 16, 61, 300, 4099))
        )

    kv_heads = integer(1, 2, 5, 8)
    heads = kv_heads * rng.choice([1, 4]) if isinstance(kv_heads, int) else integer()
    sizes = (integer(1, 35, 768, 4096, 12288), heads, kv_heads, integer(1, 6, 64, 128), integer())
    window = rng.choice([None, None, integer()])
    options = {"absorbs_keys": rng.random() < 0.5, "gated": rng.random() < 0.5, "sliding_window": window}
    vocab, width, positions = integer(61, 32000, 256_000), integer(), integer(1024, 2**20, 10**7)
    numbers = [integer(1, 3, 32, 1000), integer(1, 7, 300, 1024, 10**6), integer(1, 2, 33, 1000), integer(), integer()]
    name = rng.choice((*PLANS, *ODD_PLANS, *WORDS)) if rng.random() < 0.1 else rng.choice(("auto", *PLANS))
    device, host = (
        any_value(rng, "number") if rng.random() < 0.05 else rng.choice([None, 1e9, 1e11]) for _ in MEMORIES
    )
    sheet = rng.choice(["h200", "t4", "gh200"])
    case.say(
        f"LayerShape{sizes} {options} vocab {vocab!r} embedding {width!r} positions {positions!r}, batch, prompt, new, "
        f"tail, groups {numbers}, plan {name!r}, Budget({device!r}, {host!r}) {sheet}"
    )
    layer = LayerShape(*sizes, **options)
    layers = rng.choice([1, 2, 31, 96])
    shape = ModelShape("any", (layer,) * layers, vocab, width, positions, rng.choice(["bfloat16", "float32"]))
    workload, budget = Workload(*numbers[:3]), Budget(device, host)
    tail, groups = rng.choice([None, numbers[3]]), rng.choice([1, 1, numbers[4]])
    profile = HardwareProfile.from_datasheet(sheet)
    if name == "auto":
        plan = make_plan(shape, workload, profile, budget, groups=groups, tail=tail)
        for memory, limit in zip(MEMORIES, (device, host), strict=True):
            needed = sum(memory_needed(plan)[memory].values())
            check(limit is None or needed <= limit, f"{memory}: {needed} bytes of {limit}")
        check(not plan.reason.startswith(("nan", "inf", "-")), plan.reason)
    else:
        plan = dataclasses.replace(named_plan(name, shape, workload, tail=tail), groups=groups)
        plan = with_host_weights(plan, rng.choice([0.0, 0.5, 1.0]))
        memory_needed(plan)
    check_plan(plan)


def check_plan(plan: Plan) -> None:
    """The plan's blocks hold what is cached of the prompt, and its table can be shown."""
    for layer, shape in plan.distinct_layers:
        blocks: tuple[BlockSpec, ...] = layer.prompt
        check(sum(block.tokens for block in blocks) == shape.cached(plan.workload.prompt), f"blocks {blocks[:9]}")
    check(plan.workload.prompt + plan.workload.new <= plan.shape.positions, "more tokens than positions")
    check(len(str(plan)) > 100, "no table")


PROMPTS = (
    [[1, 2], [3]],
    [[60]],
    [[61]],
    [[-1]],
    [[1.0]],
    [],
    [[]],
    "text",
    None,
    np.zeros((2, 3, 1), int),
    np.full((1, 2), 2**40),
    [[True]],
    np.zeros((1, 66), int),
    np.zeros((1, 67), int),
    np.zeros((3, 2), object),
)


def try_arguments(case: Case) -> None:
    """kvrecomp.generate with any arguments: ids of the vocabulary, and the same text whatever the plan."""
    rng = case.rng
    odd, mask = rng.random() < 0.3, None
    ids: Any = rng.choice([np.arange(6).reshape(2, 3), np.arange(6, dtype=np.uint8).reshape(2, 3), [[1, 2], [3, 4]]])
    if odd:
        ids = rng.choice(PROMPTS)
        mask = rng.choice([None, [[0, 1, 1], [1, 1, 1]], [[1, 0], [1, 1]], [[0, 0, 0], [1, 1, 1]], "x", [[math.nan]]])
    named = {
        "max_new_tokens": rng.choice([1, 2, 3, any_value(rng, "integer") if odd else 5]),
        "plan": rng.choice((*PLANS, *ODD_PLANS, None, 7) if odd else PLANS),
        "budget": rng.choice([Budget(10.0, 10.0), Budget(1e6, 1e6), 7]) if odd else Budget(1e9, 1e9),
    }
    for name, values in {
        "temperature": FRACTIONS,
        "top_p": FRACTIONS,
        "top_k": INTEGERS,
        "seed": INTEGERS,
        "do_sample": (True, False, None, 2),
        "eos_token_id": (*INTEGERS, [], [3, 4], "x", [[1], [2, 3]]),
        "pad_token_id": (*INTEGERS, "x"),
        "row_ids": (None, [0, 1], [5], [-1, 2], ["a", "b"], [2**40, 0]),
        "output_logits": (True, False),
        "drafts": (*INTEGERS, None, 2.5, "x"),
        "prompt_lookup_num_tokens": (*INTEGERS, None, 2.5),
        "num_assistant_tokens": (None, 3, -1),
        "loss": ("none", "int8", "int4", "int2", None, 4),
    }.items():
        if rng.random() < 0.07:
            named[name] = rng.choice(values)
    case.say(f"generate({ids!r}, {mask!r}, {named})")
    found = kvrecomp.generate(toy(), ids, mask, **named)
    given = np.asarray(ids)
    check(found.sequences[:, : given.shape[1]].tolist() == given.tolist(), "the prompt has changed")
    new = found.sequences[:, given.shape[1] :]
    check(new.shape[1] <= named["max_new_tokens"], f"{new.shape[1]} new tokens")
    others = {"plan", "budget", "max_new_tokens", "output_logits", "drafts", "prompt_lookup_num_tokens"}
    if not set(named) - others and mask is None and "+" not in named["plan"]:
        for row, continued in zip(given.tolist(), new.tolist()):
            expected = greedy(toy(), row, len(continued))
            check(continued == expected, f"{continued} where {expected} is right")


KINDS: dict[str, tuple[Callable[[Case], None], int]] = {  # and how often each is tried
    "sizes": (try_sizes, 8),
    "plan": (try_plan, 4),
    "results": (try_results, 3),
    "profile": (try_profile, 2),
    "checkpoint": (try_checkpoint, 3),
    "generate": (try_generate, 3),
    "job": (try_job, 3),
    "benchmark": (try_benchmark, 2),
    "arguments": (try_arguments, 4),
    "train": (try_train, 2),
}

# --- one case ---------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What came of a case: one of OUTCOMES, what was tried, and what it said."""

    kind: str
    number: int
    outcome: str
    tried: str = ""
    said: str = ""


OURS = tuple(str(Path(module.__file__ or "").parent) for module in (kvrecomp, models))


def attempt(kind: str, number: int, seed: int, say: Callable[[str], None]) -> Result:
    """Tries a case in this process, and says what it tries before it does."""
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        say("\n".join(told))

    errors = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stderr(errors):
        case = Case(random.Random(f"{seed}/{kind}/{number}"), Path(folder), tell)
        outcome, said = judge(lambda: KINDS[kind][0](case))
    if outcome in ("done", "refused") and "Traceback (most recent call last)" in errors.getvalue():
        outcome, said = "traceback", errors.getvalue()[-2000:]
    return Result(kind, number, outcome, "\n".join(told), said)


def judge(work: Callable[[], None]) -> tuple[str, str]:
    """The outcome, and what was said."""
    try:
        work()
    except Wrong as wrong:
        return "wrong", str(wrong)
    except SystemExit as ended:
        said = str(ended.code)
        one_line = said.startswith("error: ") and len(said) > 8 and "\n" not in said
        return ("refused" if one_line else "wrong"), said
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        said = f"{type(error).__name__}: {error}"
        ours = isinstance(error, (ValueError, ArithmeticError)) and frames[-1].filename.startswith(OURS)
        if ours and str(error) and "\n" not in str(error):
            return "refused", said
        return "traceback", said[:800] + " | " + " < ".join(f"{f.filename}:{f.lineno}" for f in reversed(frames[-6:]))
    return "done", ""


# --- processes that try cases -----------------------------------------------------------------------------------------


def serve(connection: Any, seed: int) -> None:
    """Tries the cases that come, until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    models.PRESETS["toy"] = TOY
    profiler.keep(
        HardwareProfile(
            **profiler.this_machine(),
            device_bytes=2.0**34,
            host_bytes=2.0**34,
            to_device=Line(1e-5, 1e-10),
            beside_compute=1e10,
            matmul_rate=1e11,
            memory_rate=1e11,
            kernel_seconds=1e-6,
            source="made up",
        )
    )
    connection.send("ready")
    for kind, number in iter(connection.recv, None):
        connection.send(attempt(kind, number, seed, connection.send))


class Server:
    """A process that tries cases one after the other; another takes its place where it does not come to an end."""

    def __init__(self, seed: int, seconds: float):
        self._seed, self._seconds = seed, seconds
        self._process: Any = None
        self._connection: Any = None

    def try_case(self, kind: str, number: int) -> Result:
        if self._process is None:
            self._start()
        self._connection.send((kind, number))
        tried = ""
        try:
            while self._connection.poll(self._seconds):
                got = self._connection.recv()
                if isinstance(got, Result):
                    return got
                tried = got
        except EOFError:
            self.stop()
            return Result(kind, number, "killed", tried, "the process has ended")
        self.stop()
        return Result(kind, number, "hang", tried, f"no end after {self._seconds:g} s")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._seed), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def cases(count: int, kinds: Sequence[str], seed: int) -> list[tuple[str, int]]:
    """So many cases, of each kind by how often it is tried, in any order."""
    weights = [KINDS[kind][1] for kind in kinds]
    drawn = random.Random(seed).choices(kinds, weights, k=count)
    numbers: collections.Counter[str] = collections.Counter()
    found = []
    for kind in drawn:
        found.append((kind, numbers[kind]))
        numbers[kind] += 1
    return found


def try_all(waiting: list[tuple[str, int]], seed: int, seconds: float, processes: int) -> list[Result]:
    """The results of all cases, faults being printed as they are found."""
    results: list[Result] = []
    waiting = waiting[::-1]

    def work() -> None:
        server = Server(seed, seconds)
        try:
            while waiting:
                result = server.try_case(*waiting.pop())
                results.append(result)
                if result.outcome in FAULTS:
                    found = f"{result.outcome}: {result.kind}:{result.number}: {result.tried[:1500]}"
                    print(f"{found}\n    {result.said[:1500]}", flush=True)
        finally:
            server.stop()

    threads = [threading.Thread(target=work) for _ in range(processes)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        waiting.clear()
        raise
    return results


def table(results: Sequence[Result]) -> str:
    """Kinds and outcomes, in Markdown."""
    counts = collections.Counter((result.kind, result.outcome) for result in results)
    lines = [f"| kind | {' | '.join(OUTCOMES)} |", "|---" * (1 + len(OUTCOMES)) + "|"]
    for kind in KINDS:
        lines.append(f"| {kind} | {' | '.join(str(counts[kind, outcome]) for outcome in OUTCOMES)} |")
    totals = (sum(counts[kind, outcome] for kind in KINDS) for outcome in OUTCOMES)
    return "\n".join([*lines, f"| all | {' | '.join(map(str, totals))} |"])


# --- the command ------------------------------------------------------------------------------------------------------


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.integer("cases", 2000, "How many cases to try.", lower_bound=1)
    define.integer("seed", 0, "Of the cases.", lower_bound=0)
    define.list("kinds", list(KINDS), "Of which kinds.")
    define.string("only", None, "One case, KIND:NUMBER, as faults are printed.")
    define.number("seconds", 60, "Most seconds of a case.", lower_bound=1)
    define.integer("processes", 2, "Cases tried at once.", lower_bound=1)
    define.string("out", None, "Also write the results to this JSON file.")


def main(given: flags.FlagValues) -> None:
    kinds = script.names("kinds", given.kinds)
    chosen = cases(given.cases, kinds, given.seed) if set(kinds) <= KINDS.keys() else []
    if given.only is not None:
        kind, _, number = given.only.partition(":")
        kinds, chosen = [kind], [(kind, int(number))] if number.isdecimal() else []
    if not chosen or not set(kinds) <= KINDS.keys():
        raise ValueError(f"--kinds or --only is not of {', '.join(KINDS)}, with a number behind a colon for --only")
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(ENVIRONMENT, XDG_CACHE_HOME=cache, TMPDIR=cache)  # of the processes
        results = try_all(chosen, given.seed, given.seconds, given.processes)
    print(table(results))
    if given.out:
        write_json(given.out, {"seed": given.seed, "results": [result._asdict() for result in results]})
    if faults := sum(result.outcome in FAULTS for result in results):
        sys.exit(f"error: {faults} of {len(results)} cases went wrong")


if __name__ == "__main__":
    script.run(main, define_flags)
