"""The fuzz: what is a fault and what is none, and that cases are the same again."""

import os
import time

import pytest
import scripts

import models
from experiments import fuzz
from kvrecomp.plan import PlanError, Workload


def raising(error):
    def work(*given):
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "outcome"),
    [
        (lambda: None, "done"),
        (lambda: Workload(0, 1, 1), "refused"),
        (lambda: models.preset("no such model"), "refused"),
        (raising(SystemExit("error: it does not fit")), "refused"),
        (raising(SystemExit("error: ")), "wrong"),
        (raising(SystemExit("error: two\nlines")), "wrong"),
        (raising(SystemExit(1)), "wrong"),
        (raising(fuzz.Wrong("other text")), "wrong"),
        (raising(PlanError("")), "traceback"),
        (raising(ValueError("of others")), "traceback"),  # it comes from here, not from the library
        (lambda: int("x"), "traceback"),
        (raising(MemoryError()), "traceback"),
    ],
)
def test_what_is_a_fault(work, outcome):
    assert fuzz.judge(work)[0] == outcome


def test_cases_are_the_same_again():
    chosen = fuzz.cases(200, list(fuzz.KINDS), 3)
    assert chosen == fuzz.cases(200, list(fuzz.KINDS), 3) != fuzz.cases(200, list(fuzz.KINDS), 4)
    assert {kind for kind, _ in chosen} == fuzz.KINDS.keys() and len(set(chosen)) == 200
    tried = [fuzz.attempt("sizes", number, 3, lambda text: None) for number in (5, 6, 5)]
    assert tried[0] == tried[2] != tried[1] and tried[0].outcome in ("done", "refused")


def hanging(case):
    case.say("it hangs")
    time.sleep(600)


def ending(case):
    case.say("it ends")
    os._exit(3)


def serve(connection, seed):
    """In the place of a process: kinds of this file, which a process started anew would not know."""
    connection.send("ready")
    for kind, number in iter(connection.recv, None):
        fuzz.KINDS = {"hanging": (hanging, 1), "ending": (ending, 1), "good": (lambda case: case.say("it works"), 1)}
        connection.send(fuzz.attempt(kind, number, seed, connection.send))


def test_what_never_ends_or_takes_the_process_with_it_is_a_fault(monkeypatch):
    monkeypatch.setattr(fuzz, "serve", serve)
    server = fuzz.Server(0, 1.0)
    try:
        found = [server.try_case(kind, 7) for kind in ("good", "hanging", "ending", "good")]
    finally:
        server.stop()
    assert [result.outcome for result in found] == ["done", "hang", "killed", "done"]
    assert [result.tried for result in found] == ["it works", "it hangs", "it ends", "it works"]


@pytest.mark.parametrize("words", [["--kinds=none"], ["--only=sizes"], ["--only=none:3"], ["--only=sizes:x"]])
def test_kinds_and_cases_that_there_are_not(words):
    with pytest.raises(SystemExit, match="error: --kinds or --only is not of sizes, plan"):
        scripts.call(fuzz, *words)
