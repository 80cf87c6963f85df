"""The output of a job: records in the order of the input, which a kill at any moment leaves fit to be continued.

    out.jsonl                 a record a line, appended when all before it are there
    out.jsonl.waiting.jsonl   [index, record] a line: those that are done before earlier ones; there while a job runs
    out.jsonl.job.json        what the records depend on: written in one piece before the first of them, and kept

A line that a kill, or a crash of the machine, has cut short is dropped when the files are opened again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any

from kvrecomp.files import remove_partial, sync, write_json

FORMAT = 5  # of the description and the plans in it; 2 had other blocks of sliding windows, others other names in plans

ERROR = b'"finish_reason": "error"}\n'  # the end of a record that says what is wrong with its line

Record = dict[str, Any]


class Output:
    """The records of one job, open for more of them; one process at a time has them open.

        with Output(path) as output:
            if output.description is None:
                output.begin(description)
            output.add({index: record})

    `description` is what `begin` was given, maybe by an earlier process; None where there is no output yet. `written`
    counts the records in the output, of which `last` is the last one and `errors` say what is wrong with their lines;
    `waiting` has those that are done after these.
    """

    _written_file: FileIO  # from `begin` on, or where there was an output
    _waiting_file: FileIO

    def __init__(self, path: Path):
        self.path = path
        self.description_path = path.with_name(f"{path.name}.job.json")
        self.waiting_path = path.with_name(f"{path.name}.waiting.jsonl")
        self.description: dict[str, Any] | None = None
        self.written = self.errors = 0
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
            self._waiting_file = self._locked()
            if os.path.lexists(self.path):
                self._continue()
            self._files = files.pop_all()  # left open
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _locked(self) -> FileIO:
        """The waiting file, which is locked until it is closed, as a kill does; closing removes it where it is empty.

        Whoever opens it when another process is about to remove it locks a file without a name, which excludes nobody.
        """
        while True:
            file = self._files.enter_context(self.waiting_path.open("a+b", buffering=0))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is writing {self.path}: let it end first") from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.waiting_path.stat()):
                    self._files.callback(self._remove_empty)
                    return file
            file.close()

    def _remove_empty(self) -> None:
        if not self._waiting_file.seek(0, os.SEEK_END):
            self.waiting_path.unlink(missing_ok=True)

    def begin(self, description: Mapping[str, Any]) -> None:
        """Starts a job anew, with nothing written. Raises OSError as files do."""
        description = dict(description)
        remove_partial(self.description_path, 0)  # nobody else writes it now
        write_json(self.description_path, {"format": FORMAT, "sha256": _hash(description), **description})
        os.ftruncate(self._waiting_file.fileno(), 0)
        self._written_file = self._files.enter_context(self.path.open("xb", buffering=0))
        sync(self.path.parent)  # or a crash of the machine could lose it, with all that is written
        self.description = description

    def add(self, records: Mapping[int, Record]) -> None:
        """Records by index, counted from 0: those whose turn it is are written, the others wait.

        Raises OSError where the disk is full; nothing that was written is lost, and the job can be continued.
        """
        self.waiting |= records
        while (record := self.waiting.get(self.written)) is not None:
            line = self._append(self._written_file, self.path, record)
            del self.waiting[self.written]
            self._count(line)
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
            if description.pop("sha256") != _hash(description):
                raise ValueError("it was changed")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.description_path} does not describe a job ({error}): give another --output, or remove both"
            ) from error
        self._written_file = self._files.enter_context(self.path.open("r+b", buffering=0))
        last = b"{}"
        try:
            for line in _whole_lines(self.path, self._written_file):
                self._count(line)
                last = line
            self.last = dict(json.loads(last))
            done = dict(map(_waiting, _whole_lines(self.waiting_path, self._waiting_file)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path} or {self.waiting_path.name} was changed: {error}") from error
        self.waiting = {index: record for index, record in done.items() if index >= self.written}
        self.description = description
        if not self.waiting:
            self.settle()

    def _count(self, line: bytes) -> None:
        """A line is in the output."""
        self.written += 1
        self.errors += line.endswith(ERROR)

    def _append(self, file: FileIO, path: Path, document: Any) -> bytes:
        """Writes a line at the end, in pieces where the system takes no more at once, and returns it."""
        line = json.dumps(document).encode() + b"\n"
        left = memoryview(line)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            told = f"{error.strerror}; all lines before are kept, and the same command goes on from there"
            raise OSError(error.errno, told, str(path)) from error
        return line


def _hash(description: Mapping[str, Any]) -> str:
    """Of a description, which nobody has changed by hand where it is still the same."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _waiting(line: bytes) -> tuple[int, Record]:
    """Index and record of a line of the waiting file."""
    index, record = json.loads(line)
    if type(index) is not int or not isinstance(record, dict):
        raise ValueError(f"{line[:60]!r} is no record with its index")
    return index, record


def _whole_lines(path: Path, file: FileIO) -> Iterator[bytes]:
    """The lines at `path`, but for one that a kill has cut short: `file`, open there too, goes on in its place.

    So it does where there are zeros, which a file system can have in place of what it had not written when it crashed.
    """
    end = 0
    with path.open("rb") as opened:
        for line in opened:
            if not line.endswith(b"\n") or b"\0" in line:
                break
            end += len(line)
            yield line
    if end < file.seek(0, os.SEEK_END):
        file.truncate(end)
        file.seek(end)
