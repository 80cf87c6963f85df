"""How scripts are started: in processes of their own, as users start them."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
CODE = """
import signal, sys, time
from experiments.support import script
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored in the background
def main(words):
    print("begun", flush=True)
    {body}
script.run(main)
"""


EXPECTED = "expected whole numbers from 1 on, with commas between them"
NAMES = "give one name or more, with commas between them"
PER_CENT = "expected percentages from 0 on, with commas between them"


def start(body: str, *words: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE.format(body=body), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("body", "words", "status", "said", "told"),
    [
        ("pass", [], 0, "begun\n", ""),
        ("pass", ["opt-13b"], 1, "", "error: 'opt-13b' is no flag: flags begin with --, and --help lists them\n"),
        ("pass", ["--nothing"], 1, "", "error: Unknown command line flag 'nothing'; --help lists the flags\n"),
        ("raise ValueError('it is 3;\\n expected 2')", [], 1, "begun\n", "error: it is 3; expected 2\n"),
        ("open('/nowhere')", [], 1, "begun\n", "error: /nowhere: No such file or directory\n"),
        ("raise OSError('no space')", [], 1, "begun\n", "error: no space\n"),
        ("print(script.whole_numbers('sizes', ['1', ' 23']))", [], 0, "begun\n[1, 23]\n", ""),
        ("script.whole_numbers('sizes', ['7', '0'])", [], 1, "begun\n", f"error: --sizes has '0'; {EXPECTED}\n"),
        ("script.whole_numbers('sizes', ['7', '-1'])", [], 1, "begun\n", f"error: --sizes has '-1'; {EXPECTED}\n"),
        ("script.whole_numbers('sizes', ['2.5'])", [], 1, "begun\n", f"error: --sizes has '2.5'; {EXPECTED}\n"),
        ("script.whole_numbers('sizes', [])", [], 1, "begun\n", f"error: --sizes has ''; {EXPECTED}\n"),
        (
            "print(script.percentages('rooms', ['0', '12.5']), script.percentages('rooms', []))",
            [],
            0,
            "begun\n[0.0, 12.5] []\n",
            "",
        ),
        ("script.percentages('rooms', ['5', 'x'])", [], 1, "begun\n", f"error: --rooms has '5,x'; {PER_CENT}\n"),
        ("print(script.names('plans', ['a', 'b']))", [], 0, "begun\n['a', 'b']\n", ""),
        ("script.names('plans', [])", [], 1, "begun\n", f"error: --plans is empty: {NAMES}\n"),
        ("script.percentages('rooms', ['-5'])", [], 1, "begun\n", f"error: --rooms has '-5'; {PER_CENT}\n"),
        ("script.percentages('rooms', ['nan'])", [], 1, "begun\n", f"error: --rooms has 'nan'; {PER_CENT}\n"),
        ("sys.exit(7)", [], 7, "begun\n", ""),
    ],
)
def test_a_line_and_a_status(body, words, status, said, told):
    process = start(body, *words)
    assert (*process.communicate(timeout=60), process.returncode) == (said, told, status)


def test_warnings_are_those_of_kvrecomp():
    """Other libraries warn of what a user need not know."""
    warn = "import logging; [logging.getLogger(name).warning(f'of {name}') for name in ('orbax', 'kvrecomp', 'absl')]"
    said, told = start(warn).communicate(timeout=60)
    assert said == "begun\n" and told.count("\n") == 1 and told.endswith("] of kvrecomp\n")


def test_an_interruption_may_say_how_to_go_on():
    process = start("raise KeyboardInterrupt('; the same command goes on')")
    told = "interrupted; the same command goes on\n"
    assert (*process.communicate(timeout=60), process.returncode) == ("begun\n", told, 130)


def test_an_interruption_is_a_line():
    process = start("time.sleep(60)")
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert (*process.communicate(timeout=60), process.returncode) == ("", "interrupted\n", 130)
