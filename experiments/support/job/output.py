"""The output of a job: records in the order of the input, which a kill at any moment leaves fit to be continued.

    out.jsonl                 a record a line, appended when all before it are there
    out.jsonl.waiting.jsonl   [index, record] a line: those that are done before earlier ones; there while a job runs
    out.jsonl.job.json        what the records depend on: written in one piece before the first of them, and kept

A line that a kill has cut short is dropped when the files are opened again.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any

from kvrecomp.files import write_json

FORMAT = 5  # of the description and the plans in it; 2 had other blocks of sliding windows, others other names in plans

Record = dict[str, Any]


class Output:
    """The records of one job, open for more of them; one process at a time has them open.

        with Output(path) as output:
            if output.description is None:
                output.begin(description)
            output.add({index: record})

    `description` is what `begin` was given, maybe by an earlier process; None where there is no output yet. `written`
    counts the records in the output, of which `last` is the last one; `waiting` has those that are done after these.
    """

    _written_file: FileIO  # from `begin` on, or where there was an output
    _waiting_file: FileIO

    def __init__(self, path: Path):
        self.path = path
        self.description_path = path.with_name(f"{path.name}.job.json")
        self.waiting_path = path.with_name(f"{path.name}.waiting.jsonl")
        self.description: dict[str, Any] | None = None
        self.written = 0
        self.waiting: dict[int, Record] = {}
        self.last: Record = {}
        self._files = ExitStack()

    def __enter__(self) -> "Output":
        """Opens the files, and repairs what a kill has left.

        Raises:
            ValueError: the output is not a job's, or another process has it open.
            OSError: a file or directory that is missing or cannot be written.
        """
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"there is no directory {self.path.parent}: make it, or give another --output")
        if os.path.lexists(self.path) and not self.description_path.exists():
            raise ValueError(
                f"{self.path} is there and {self.description_path.name} is not, so it is not the output of a job: give "
                "another --output"
            )
        with self._files as files:
            self._waiting_file = files.enter_context(self.waiting_path.open("a+b", buffering=0))
            try:
                fcntl.flock(self._waiting_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kill lets go of it
            except BlockingIOError:
                raise ValueError(f"another process is writing {self.path}: let it end first") from None
            if os.path.lexists(self.path):
                self._continue()
            self._files = files.pop_all()  # left open
        return self

    def __exit__(self, *_: object) -> None:
        if not self._waiting_file.seek(0, os.SEEK_END):
            self.waiting_path.unlink(missing_ok=True)
        self._files.close()

    def begin(self, description: Mapping[str, Any]) -> None:
        """Starts a job anew, with nothing written. Raises OSError as files do."""
        write_json(self.description_path, {"format": FORMAT, **description})
        os.ftruncate(self._waiting_file.fileno(), 0)
        self._written_file = self._files.enter_context(self.path.open("xb", buffering=0))
        self.description = dict(description)

    def add(self, records: Mapping[int, Record]) -> None:
        """Records by index, counted from 0: those whose turn it is are written, the others wait.

        Raises OSError where the disk is full; nothing that was written is lost, and the job can be continued.
        """
        self.waiting |= records
        while (record := self.waiting.pop(self.written, None)) is not None:
            self._append(self._written_file, self.path, record)
            self.written += 1
        for index in sorted(records):
            if index in self.waiting:
                self._append(self._waiting_file, self.waiting_path, [index, records[index]])

    def has(self, index: int) -> bool:
        """Whether that record is done, written or not."""
        return index < self.written or index in self.waiting

    def settle(self) -> None:
        """Forgets what has waited, once all of it is written."""
        os.fsync(self._written_file.fileno())  # or a crash of the machine could lose both
        os.ftruncate(self._waiting_file.fileno(), 0)

    def _continue(self) -> None:
        try:
            description = json.loads(self.description_path.read_text(encoding="utf-8"))
            if description.pop("format") != FORMAT:
                raise ValueError("it is of another version")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.description_path} does not describe a job ({error}): give another --output, or remove both"
            ) from error
        self._written_file = self._files.enter_context(self.path.open("r+b", buffering=0))
        last = b"{}"
        try:
            for line in _whole_lines(self.path, self._written_file):
                self.written, last = self.written + 1, line
            self.last = dict(json.loads(last))
            done = dict(map(json.loads, _whole_lines(self.waiting_path, self._waiting_file)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path} or {self.waiting_path.name} was changed: {error}") from error
        self.waiting = {index: record for index, record in done.items() if index >= self.written}
        self.description = description

    def _append(self, file: FileIO, path: Path, document: Any) -> None:
        """Writes a line at the end; in pieces where the system takes no more at once."""
        line = memoryview(json.dumps(document).encode() + b"\n")
        try:
            while line:
                line = line[file.write(line) :]
        except OSError as error:
            told = f"{error.strerror}; all lines before are kept, and the same command goes on from there"
            raise OSError(error.errno, told, str(path)) from error


def _whole_lines(path: Path, file: FileIO) -> Iterator[bytes]:
    """The lines at `path`, but for one that a kill has cut short: `file`, open there too, goes on in its place."""
    end = 0
    with path.open("rb") as opened:
        for line in opened:
            if line.endswith(b"\n"):
                end += len(line)
                yield line
    if end < file.seek(0, os.SEEK_END):
        file.truncate(end)
        file.seek(end)
