"""How scripts start and end: one line and a status for a mistake or an interruption, values of flags."""

import os
import runpy
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


def test_values():
    assert script.whole_numbers("sizes", ["1", " 23"]) == [1, 23]
    assert script.percentages("rooms", ["0", "12.5"]) == [0.0, 12.5] and script.percentages("rooms", []) == []
    assert script.names("plans", ["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("read", "flag", "words", "message"),
    [
        (script.whole_numbers, "sizes", ["7", "0"], f"--sizes has '0'; {WHOLE}"),
        (script.whole_numbers, "sizes", ["7", "-1"], f"--sizes has '-1'; {WHOLE}"),
        (script.whole_numbers, "sizes", ["2.5"], f"--sizes has '2.5'; {WHOLE}"),
        (script.whole_numbers, "sizes", [], f"--sizes has ''; {WHOLE}"),
        (script.percentages, "rooms", ["5", "x"], f"--rooms has '5,x'; {PER_CENT}"),
        (script.percentages, "rooms", ["-5"], f"--rooms has '-5'; {PER_CENT}"),
        (script.percentages, "rooms", ["nan"], f"--rooms has 'nan'; {PER_CENT}"),
        (script.names, "plans", [], NAMES),
    ],
)
def test_what_is_no_value(read, flag, words, message):
    with pytest.raises(ValueError) as refusal:
        read(flag, words)
    assert str(refusal.value) == message
