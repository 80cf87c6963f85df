"""The file of experiments/suite.py: the rows so far, what was left out and what failed; written at each change."""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.support.suite.tasks import Task

from kvrecomp.files import write_json

SAME = ("device", "driver", "jax", "versions")  # all rows of a file have these in common

Key = tuple[str, str, float | None]  # workload, plan and room


class Results:
    """Rows by workload, plan and room; `about` is what the file says of this machine, its software and the commit.

    Raises ValueError where the file is another script's, or was measured elsewhere, and OSError.
    """

    def __init__(self, path: str | os.PathLike, about: Mapping[str, Any]):
        self.path, self.about = Path(path), dict(about)
        self._rows: dict[Key, dict[str, Any]] = {}
        self._notes: dict[str, dict[Key, dict[str, Any]]] = {"skipped": {}, "failed": {}}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            self._rows = {_key(row): dict(row) for row in document["rows"]}
            for name, notes in self._notes.items():
                notes.update((_key(note), note) for note in document[name])
            there, here = ({name: about[name] for name in SAME} for about in (document, self.about))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.path} is not a file of this suite ({type(error).__name__}: {error}): give another --out, or "
                "move it away"
            ) from error
        if there != here:
            name = next(name for name in SAME if there[name] != here[name])
            raise ValueError(
                f"{self.path} has rows of another machine: {name} is {there[name]} there and {here[name]} here; give "
                "another --out, or move it away"
            )

    def row(self, task: Task) -> dict[str, Any] | None:
        """The task's row, if it was measured by the same command at the same commit."""
        row = self._rows.get(task.key)
        same = row is not None and (row["command"], row["commit"]) == (task.command, self.about["commit"])
        return row if same else None

    def noted(self, kind: str, task: Task) -> str:
        """Why the task was `skipped`, or how it `failed`, when it was last tried; nothing where it was not."""
        return self._notes[kind].get(task.key, {}).get("reason", "")

    def take(self, tasks: Sequence[Task], document: Mapping[str, Any], seconds: float) -> dict[Task, dict[str, Any]]:
        """Keeps and returns the rows that a process has measured of these tasks, from the document that it wrote.

        They took so many `seconds` since the rows before them, or since the process started; each has an equal share.
        """
        measured = {(row["asked"], row["batch"], row["prompt"]): row for row in document["rows"]}
        rate = {name: document[name] for name in ("copy_gbps",) if name in document}  # of this process
        found = {task: row for task in tasks if (row := measured.get((task.asked, task.case.batch, task.case.prompt)))}
        new = {}
        for task, row in found.items():
            about = {"seconds": round(seconds / len(found), 1), "commit": self.about["commit"], "command": task.command}
            new[task] = {"workload": task.case.name, "room": task.room} | row | rate | about
            self._forget(task)
            self._rows[task.key] = new[task]
        if new:
            self.write()
        return new

    def note(self, kind: str, task: Task, reason: str) -> None:
        """Keeps why a task was `skipped`, or how it `failed`."""
        self._forget(task)
        about = {"workload": task.case.name, "plan": task.plan, "room": task.room, "reason": reason}
        self._notes[kind][task.key] = about
        self.write()

    def _forget(self, task: Task) -> None:
        for notes in self._notes.values():
            notes.pop(task.key, None)

    def document(self) -> dict[str, Any]:
        """What is in the file; the rate of copies is the median of the processes that measured it."""
        rates = [row["copy_gbps"] for row in self._rows.values() if row.get("copy_gbps")]
        return {
            **self.about,
            "copy_gbps": statistics.median(rates) if rates else None,
            "rows": list(self._rows.values()),
            **{kind: list(notes.values()) for kind, notes in self._notes.items()},
        }

    def write(self) -> None:
        """Writes the file, in one piece."""
        write_json(self.path, self.document())


def _key(row: Mapping[str, Any]) -> Key:
    return row["workload"], row["plan"], row["room"]
