"""Files in one piece, whoever else writes them."""

import json
import os
import threading
import time

import pytest

from kvrecomp.files import check_writable, replacing, write_json


def test_writers_at_once_leave_one_whole_file(tmp_path):
    """Of processes with one number too, as two containers' may be that share a folder: here of one process."""
    path, barrier = tmp_path / "a" / "b.json", threading.Barrier(7, timeout=60)

    def write(number: int) -> None:
        barrier.wait()
        for _ in range(13):
            write_json(path, [number] * 10_007)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    barrier.wait()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert len(set(json.loads(path.read_text()))) == 1
    for thread in threads:
        thread.join()
    assert list(path.parent.iterdir()) == [path] and len(json.loads(path.read_text())) == 10_007


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as beside:
        beside.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_named(tmp_path):
    """Not the file beside it."""
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'$"), replacing(tmp_path / "a") as beside:
        os.symlink("/dev/full", beside)
        beside.write_text("new")
    with pytest.raises(FileNotFoundError, match=r": '.*/b/c'$"), replacing(tmp_path / "b" / "c") as beside:
        beside.write_text("new")


def test_what_could_be_written_is_known_before(tmp_path):
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
    for wrong in ("/proc/a/b", "/proc/a", str(tmp_path / ("x" * 250))):
        with pytest.raises(OSError) as refusal:
            check_writable(wrong)
        assert wrong.startswith(refusal.value.filename)


def test_a_link_stays_and_what_is_no_file_too(tmp_path):
    (tmp_path / "link").symlink_to("file")
    for text in (1, 2):
        write_json(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "file").read_text()) == text
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        for attempt in (check_writable, lambda path: write_json(path, 1)):
            with pytest.raises(OSError, match=f"no file that can be replaced: '{path}'"):
                attempt(path)
    assert (tmp_path / "pipe").is_fifo()


def test_what_killed_writers_left_is_removed_when_none_can_be_at_it(tmp_path):
    long_ago, now = (tmp_path / f"a[1].{digit * 32}.partial" for digit in "0a")
    other = tmp_path / f"a1.{'0' * 32}.partial"
    for path in (long_ago, now, other):
        path.write_text("half")
    for path in (long_ago, other):
        os.utime(path, times=(time.time() - 7200,) * 2)
    write_json(tmp_path / "a[1]", 1)
    assert set(tmp_path.iterdir()) == {now, other, tmp_path / "a[1]"}
