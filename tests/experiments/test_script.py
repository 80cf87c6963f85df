"""How scripts start and end: one line and a status for a mistake or an interruption, values of flags."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripts
from absl import flags

from experiments.support import script

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")
WHOLE = "expected whole numbers from 1 on, with commas between them"
PER_CENT = "expected percentages from 0 on, with commas between them"
NAMES = "--plans is empty: give one name or more, with commas between them"


def program(main=lambda given: print(given.size)):
    """A script with one flag."""

    def define_flags(into):
        script.Define(into).integer("size", 3, "A size.")

    return SimpleNamespace(__name__="program", main=main, define_flags=define_flags)


def raising(error: BaseException):
    """A script that raises it."""

    def main(given):
        raise error

    return program(main)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_starts_with_its_flags(name, monkeypatch):
    started = []
    monkeypatch.setattr(script, "run", lambda *given: started.append(given))
    runpy.run_path(str(ROOT / "experiments" / f"{name}.py"), run_name="__main__")
    ((main, define_flags),) = started
    given = flags.FlagValues()
    define_flags(given)
    assert main.__name__ == "main" and len(given) > 0


def test_flags_are_what_main_is_given(capsys):
    scripts.call(program(), "--size=7")
    assert capsys.readouterr() == ("7\n", "")


@pytest.mark.parametrize(
    ("called", "words", "message"),
    [
        (program(), ["opt-13b"], "'opt-13b' is no flag: flags begin with --, and --help lists them"),
        (program(), ["--nothing"], "Unknown command line flag 'nothing'; --help lists the flags"),
        (raising(ValueError("it is 3;\n expected 2")), [], "it is 3; expected 2"),
        (
            raising(FileNotFoundError(2, "No such file or directory", "/nowhere")),
            [],
            "/nowhere: No such file or directory",
        ),
        (raising(OSError("no space")), [], "no space"),
        (raising(ModuleNotFoundError("install it")), [], "install it"),
        (raising(OverflowError("too large")), [], "too large"),
        (raising(MemoryError()), [], "MemoryError"),
        (
            raising(RuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nBuffers: ...")),
            [],
            "a memory is full (RESOURCE_EXHAUSTED: Out of memory.): ask for less, or let a plan use less",
        ),
    ],
)
def test_a_mistake_is_a_line_and_status_1(called, words, message):
    with pytest.raises(SystemExit) as end:
        scripts.call(called, *words)
    assert end.value.code == f"error: {message}"  # which Python prints, and exits with 1


def test_absl_says_no_more_of_a_wrong_value(monkeypatch):
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    monkeypatch.setattr("absl.logging.use_absl_handler", lambda: None)
    monkeypatch.setattr(sys, "argv", ["program", "--size=x"])
    with pytest.raises(SystemExit, match=r"^error: flag --size=x: [^\n]*; --help lists the flags$"):
        script.run(program().main, program().define_flags)


def test_what_is_no_mistake_of_the_user_is_not_hidden():
    with pytest.raises(RuntimeError):
        scripts.call(raising(RuntimeError("of the program")))


@pytest.mark.parametrize(("detail", "line"), [((), "interrupted"), (("; go on",), "interrupted; go on")])
def test_an_interruption_is_a_line_that_may_say_how_to_go_on(capsys, detail, line):
    with pytest.raises(SystemExit) as end:
        scripts.call(raising(KeyboardInterrupt(*detail)))
    assert end.value.code == 130 and capsys.readouterr() == ("", line + "\n")


def test_a_process_that_is_interrupted():
    """Warnings are those of kvrecomp: other libraries warn of what a user need not know."""
    code = """if True:
        import logging, signal, sys, time
        from experiments.support import script
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored in the background
        def main(given):
            for name in ("orbax", "kvrecomp", "absl"):
                logging.getLogger(name).warning(f"of {name}")
            print(given.size, flush=True)
            time.sleep(60)
        script.run(main, lambda into: script.Define(into).integer("size", 3, "A size."))
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code, "--size=7"], env=environment, **options)
    assert process.stdout.readline() == "7\n"
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=60)
    warning, interruption = told.splitlines()
    assert said == "" and warning.endswith("] of kvrecomp") and interruption == "interrupted"
    assert process.returncode == 130


# --- processes --------------------------------------------------------------------------------------------------------


def run(command, **environment):
    """What a command of a shell, in which `$PLAN` is the quickest script, ends with: status, and what it says."""
    words = "--hardware=t4 --model=opt-125m --batch=2 --prompt=64 --new=3"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PLAN": f"{sys.executable} experiments/plan.py {words}",
    } | environment
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_help_is_no_failure():
    status, said, told = run("$PLAN --help")
    assert status == 0 and "--device_memory_gib: Device memory to use" in said and not told


@pytest.mark.parametrize(
    ("command", "status", "told"),
    [
        ("$PLAN >&-", 0, ""),
        ("$PLAN >/dev/full", 1, "error: standard output: No space left on device\n"),
        ("set -o pipefail; $PLAN | true", 1, ""),
    ],
)
def test_an_output_that_cannot_be_written(command, status, told):
    assert run(command) == (status, "", told)


@pytest.mark.parametrize("platform", ["cuda", "foo"])
def test_a_machine_without_the_device_that_is_asked_for(platform):
    """Other machines are predicted without one."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is a GPU")
    status, said, told = run("$PLAN; $PLAN --hardware=this", JAX_PLATFORMS=platform)
    assert status == 1 and "NVIDIA T4" in said
    assert told.splitlines()[-1].startswith("error: jax has no device where JAX_PLATFORMS is ")
    assert "plan.py" not in told  # a traceback's; jax's plugins write their own


@pytest.mark.parametrize(
    ("raised", "status"), [("KeyboardInterrupt", -signal.SIGINT), ("ImportError from KeyboardInterrupt()", 1)]
)
def test_an_interruption_while_a_script_imports_is_a_line(tmp_path, raised, status):
    """Here by what it imports, which may make something else of it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'jax':\n"
        f"            raise {raised}\n"
        "sys.meta_path.insert(0, Interrupted())\n"
    )
    assert run("$PLAN", PYTHONPATH=f"{tmp_path}:{ROOT}") == (status, "", "interrupted\n")


@pytest.mark.parametrize(("given", "found"), [(None, "3"), ("0", "0")])
def test_what_xla_says_is_what_the_user_asks_for(tmp_path, given, found):
    (tmp_path / "kvrecomp").mkdir()
    (tmp_path / "kvrecomp" / "__init__.py").write_text(
        "import os; raise ValueError(os.environ['TF_CPP_MIN_LOG_LEVEL'])\n"
    )
    shutil.copytree(
        ROOT / "experiments", tmp_path / "experiments", ignore=shutil.ignore_patterns("checkpoints", "results")
    )
    environment = {} if given is None else {"TF_CPP_MIN_LOG_LEVEL": given}
    unset = "unset TF_CPP_MIN_LOG_LEVEL; " if given is None else ""
    _, _, told = run(f"cd {tmp_path}; {unset}$PLAN", PYTHONPATH=str(tmp_path), **environment)
    assert told.splitlines()[-1] == f"ValueError: {found}"


def test_values():
    assert script.whole_numbers("sizes", ["1", " 23"]) == [1, 23]
    assert script.percentages("rooms", ["0", "12.5"]) == [0.0, 12.5] and script.percentages("rooms", []) == []
    assert script.numbers("temperatures", ["0", "1e-1"]) == [0.0, 0.1]
    assert script.names("plans", ["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("read", "flag", "words", "message"),
    [
        (script.whole_numbers, "sizes", ["7", "0"], f"--sizes has '0'; {WHOLE}"),
        (script.whole_numbers, "sizes", ["7", "-1"], f"--sizes has '-1'; {WHOLE}"),
        (script.whole_numbers, "sizes", ["9" * 20], f"--sizes has '{'9' * 20}'; {WHOLE}"),
        (script.whole_numbers, "sizes", ["2.5"], f"--sizes has '2.5'; {WHOLE}"),
        (script.whole_numbers, "sizes", [], f"--sizes has ''; {WHOLE}"),
        (script.percentages, "rooms", ["5", "x"], f"--rooms has '5,x'; {PER_CENT}"),
        (script.percentages, "rooms", ["-5"], f"--rooms has '-5'; {PER_CENT}"),
        (script.percentages, "rooms", ["nan"], f"--rooms has 'nan'; {PER_CENT}"),
        (
            script.numbers,
            "temperatures",
            ["inf"],
            f"--temperatures has 'inf'; {PER_CENT.replace('percentages', 'numbers')}",
        ),
        (script.names, "plans", [], NAMES),
    ],
)
def test_what_is_no_value(read, flag, words, message):
    with pytest.raises(ValueError) as refusal:
        read(flag, words)
    assert str(refusal.value) == message
