"""A job's files: a kill at any byte leaves them fit to be continued, and nobody else's output is touched."""

import fcntl
import itertools
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.support.job import output as output_module
from experiments.support.job.output import FORMAT, Output

DESCRIPTION = {"records": 7, "settings": {"seed": 1}}
# As batches finish: longer prompts first, whose turn comes later.
BATCHES = [[4, 1], [0, 6], [5, 2], [3]]
RECORDS = [{"id": "é\n" + "x" * index} for index in range(7)]
EXPECTED = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)


class Killed(BaseException):
    """What nothing is done about."""


def write_all(output: Output) -> Iterator[list[int]]:
    """What a job does, but for decoding; gives what it had to make, batch by batch."""
    if output.description is None:
        output.begin(DESCRIPTION)
    assert output.description == DESCRIPTION
    for batch in BATCHES:
        left = [index for index in batch if not output.has(index)]
        yield left
        output.add({index: RECORDS[index] for index in left})
    output.settle()


def killed_after(path: Path, size: int) -> int | None:
    """Writes all, but for a kill when that many bytes are written: in which batch, None where there was no kill."""
    output, left, batch = Output(path), size, 0
    append = output._append

    def cut(file, name, document):
        nonlocal left
        line = json.dumps(document).encode() + b"\n"
        if len(line) > left:
            file.write(line[:left])
            raise Killed
        left -= len(line)
        return append(file, name, document)

    output._append = cut
    output.__enter__()
    try:
        for batch, _ in enumerate(write_all(output)):  # noqa: B007
            pass
    except Killed:
        return batch
    finally:
        output._files.close()  # and nothing else, as when a process ends
    return None


def forget(path: Path) -> None:
    path.unlink()
    path.with_name(f"{path.name}.job.json").unlink()


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir()}


def test_each_record_is_there_when_its_turn_has_come(tmp_path):
    with Output(tmp_path / "out") as output:
        output.begin(DESCRIPTION)
        counts = []
        for batch in BATCHES:
            output.add({index: RECORDS[index] for index in batch})
            counts.append((tmp_path / "out").read_bytes().count(b"\n"))
        assert counts == [0, 2, 3, 7]
        waiting = [json.loads(line) for line in (tmp_path / "out.waiting.jsonl").read_text().splitlines()]
        assert waiting == [[index, RECORDS[index]] for index in (1, 4, 6, 5)]
        output.settle()
        assert (tmp_path / "out.waiting.jsonl").read_bytes() == b""
    assert set(files(tmp_path / "out")) == {"out", "out.job.json"}
    with Output(tmp_path / "out") as output:
        assert output.written == 7 and output.last == RECORDS[6]


def test_a_kill_at_any_byte_loses_the_batch_at_work_at_most(tmp_path):
    path = tmp_path / "out"
    for size in itertools.count():
        batch = killed_after(path, size)
        with Output(path) as output:
            assert min(output.waiting, default=7) >= output.written
            made = list(write_all(output))
        assert path.read_bytes() == EXPECTED, f"killed after {size} bytes"
        forget(path)
        if batch is None:
            break
        assert made[:batch] == [[]] * batch and made[batch + 1 :] == BATCHES[batch + 1 :]
    assert size > len(EXPECTED) and made == [[]] * 4


def test_two_kills(tmp_path):
    """The second while what the first has left is being written."""
    path = tmp_path / "out"
    for first, second in itertools.product(range(0, 400, 19), range(0, 400, 23)):
        if first + second < 400:
            killed_after(path, first)
            killed_after(path, second)
            with Output(path) as output:
                list(write_all(output))
            assert path.read_bytes() == EXPECTED, f"killed after {first} bytes, and {second} more"
            forget(path)


def test_a_kill_before_the_output_is_there_begins_anew(tmp_path):
    (tmp_path / "out.job.json").write_text('{"format": 2, "of": "another job"}')
    (tmp_path / "out.waiting.jsonl").write_text('[0, {"id": "another"}]\n[1, {"i')
    with Output(tmp_path / "out") as output:
        assert output.description is None
        output.begin(DESCRIPTION)
    with Output(tmp_path / "out") as output:
        assert list(write_all(output)) == BATCHES
    assert (tmp_path / "out").read_bytes() == EXPECTED
    description = json.loads((tmp_path / "out.job.json").read_text())
    assert len(description.pop("sha256")) == 64 and description == {"format": FORMAT, **DESCRIPTION}


@pytest.mark.parametrize("limit", [1, 60, 90, len(EXPECTED) - 1])
def test_a_full_disk_is_one_error_and_the_job_goes_on_later(tmp_path, limit):
    """Files cannot grow beyond the limit; a write up to it succeeds in part."""
    with Output(tmp_path / "out") as output:
        output.begin(DESCRIPTION)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError) as refusal, Output(tmp_path / "out") as output:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            list(write_all(output))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(refusal.value)
    assert "File too large; all lines before are kept, and the same command goes on" in message
    assert str(tmp_path / "out") in message and "\n" not in message
    assert max(len(content) for name, content in files(tmp_path / "out").items() if "job" not in name) == limit
    with Output(tmp_path / "out") as output:
        list(write_all(output))
    assert (tmp_path / "out").read_bytes() == EXPECTED


@pytest.mark.parametrize("content", [b"", b"mine\n"])
def test_an_output_that_no_job_wrote_is_left_alone(tmp_path, content):
    (tmp_path / "out").write_bytes(content)
    with (
        pytest.raises(ValueError, match=r"out.job.json is not, so it is not the output of a job"),
        Output(tmp_path / "out"),
    ):
        pass
    assert files(tmp_path / "out") == {"out": content}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 4}', '{"format": 99}', "[" * 99_999])
def test_a_description_that_is_none(tmp_path, content):
    (tmp_path / "out").write_bytes(b'{"id": 1}\n{"id"')
    (tmp_path / "out.job.json").write_text(content)
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match="does not describe a job"), Output(tmp_path / "out"):
        pass
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("edit", [("7", "8"), ('"seed": 1', '"seed": 1.0'), ('"records": 7,\n', "")])
def test_a_description_that_somebody_edited(tmp_path, edit):
    killed_after(tmp_path / "out", 200)
    path = tmp_path / "out.job.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))  # other spaces change nothing
    with Output(tmp_path / "out"):
        pass
    assert edit[0] in path.read_text()
    path.write_text(path.read_text().replace(*edit))
    with pytest.raises(ValueError, match=r"does not describe a job \(it was changed\)"), Output(tmp_path / "out"):
        pass


@pytest.mark.parametrize("changed", ["out", "out.waiting.jsonl"])
def test_a_file_that_somebody_changed(tmp_path, changed):
    killed_after(tmp_path / "out", 200)
    with (tmp_path / changed).open("ab") as file:
        file.write(b"what is this\n")
    with pytest.raises(ValueError, match="was changed: "), Output(tmp_path / "out"):
        pass


def test_one_process_at_a_time(tmp_path):
    with Output(tmp_path / "out") as output:
        output.begin(DESCRIPTION)
        output.add({0: RECORDS[0], 3: RECORDS[3]})
        with pytest.raises(ValueError, match="another process is writing"), Output(tmp_path / "out"):
            pass
        output.add({1: RECORDS[1]})
    with Output(tmp_path / "out") as output:
        assert output.written == 2 and output.waiting == {3: RECORDS[3]}


def test_a_lock_on_a_file_that_is_removed_meanwhile_excludes_others(tmp_path, monkeypatch):
    """The second process has opened the file, and not locked it yet, when the first one removes it."""
    first, second = (Output(tmp_path / "out") for _ in range(2))
    first.__enter__().begin(DESCRIPTION)
    lock = fcntl.flock

    def late(*given):
        monkeypatch.setattr(output_module.fcntl, "flock", lock)
        first.__exit__()
        lock(*given)

    monkeypatch.setattr(output_module.fcntl, "flock", late)
    with second:
        with pytest.raises(ValueError, match="another process is writing"), Output(tmp_path / "out"):
            pass
        second.add({0: RECORDS[0]})
    assert set(files(tmp_path / "out")) == {"out", "out.job.json"}


# --- crashes of the machine -------------------------------------------------------------------------------------------


def test_what_a_crash_would_lose_is_on_the_disk_in_time(tmp_path, monkeypatch):
    """The description before it has its name, both names before the first record, records before what waits goes."""
    done, path = [], tmp_path / "out"

    def noted(name, call, of):
        def noting(*given):
            done.append((name, of(given[0]).name.partition(".job.json.")[0]))
            return call(*given)

        monkeypatch.setattr(os, name, noting)

    noted("fsync", os.fsync, lambda opened: Path(os.readlink(f"/proc/self/fd/{opened}")))
    noted("replace", os.replace, Path)
    noted("ftruncate", os.ftruncate, lambda opened: Path(os.readlink(f"/proc/self/fd/{opened}")))
    with Output(path) as output:
        output.begin(DESCRIPTION)
        folder, waiting = tmp_path.name, "out.waiting.jsonl"
        written = [("fsync", "out"), ("replace", "out"), ("fsync", folder), ("ftruncate", waiting), ("fsync", folder)]
        assert done == written
        done.clear()
        output.add(dict(enumerate(RECORDS)))
        output.settle()
        assert done == [("fsync", "out"), ("ftruncate", waiting)]


@pytest.mark.parametrize("name", ["out", "out.waiting.jsonl"])
def test_zeros_that_a_crash_has_left_are_a_line_cut_short(tmp_path, name):
    path = tmp_path / "out"
    killed_after(path, 200)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-9] + b"\0" * 9 + b"\n" + whole)
    with Output(path) as output:
        list(write_all(output))
    assert path.read_bytes() == EXPECTED


def test_nothing_is_left_of_a_kill_while_files_are_put_in_place(tmp_path):
    path, partial = tmp_path / "out", f"out.job.json.{'0' * 32}.partial"
    for name in (partial, partial.replace(".job", "")):
        (tmp_path / name).write_text("{")
    with Output(path) as output:
        list(write_all(output))
    (tmp_path / "out.waiting.jsonl").write_text('[3, {"id": "it is written already"}]\n')
    with Output(path) as output:
        assert output.written == 7 and not output.waiting
    assert set(files(path)) == {"out", "out.job.json", partial.replace(".job", "")}  # which is nobody's, here
