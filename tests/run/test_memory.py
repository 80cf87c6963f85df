"""How much memory is free: of the machine, of its control groups, and in the pinned pool, which may grow so far."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvrecomp
from kvrecomp.run import memory


def test_on_a_cpu_both_memories_are_the_same(monkeypatch):
    monkeypatch.setattr(memory, "_proc_meminfo", lambda field: 1000)
    monkeypatch.setattr(memory, "_control_groups", lambda: [])
    assert memory.free_host_bytes() == memory.free_device_bytes() == 500
    monkeypatch.setattr(memory, "_device_limits", lambda: {"bytes_limit": 70, "bytes_in_use": 11})
    monkeypatch.setattr(memory, "_pool_bytes", 0)
    assert (memory.free_host_bytes(), memory.free_device_bytes()) == (1000, 59)


def test_what_the_pinned_pool_has_left_over_is_free(monkeypatch):
    """XLA keeps it for later arrays; the system has it no more."""
    monkeypatch.setattr(memory, "_device_limits", lambda: {"bytes_limit": 70, "bytes_in_use": 11})
    monkeypatch.setattr(memory, "_control_groups", lambda: [])
    monkeypatch.setattr(memory, "_pool_bytes", 0)
    monkeypatch.setattr(memory, "_proc_meminfo", lambda field: 10**6)
    assert memory.free_host_bytes() == 10**6
    kept = memory.zeros((3, 7, 1001), np.dtype("int16"), "host")
    memory.reserve("host", [((5, 1009), np.dtype("int8"))] * 2)
    monkeypatch.setattr(memory, "_proc_meminfo", lambda field: 10**6 - kept.nbytes - 2 * 5 * 1009)
    assert memory.free_host_bytes() == 10**6 - kept.nbytes
    kept.delete()
    assert memory.free_host_bytes() == 10**6


@pytest.mark.parametrize(
    ("before", "given", "expected"),
    [
        ("", None, ["85", "7"]),
        ("tiny", None, ["1", "1"]),
        ("", "17", ["17", "7"]),
        ("", "5", ["5", "5"]),
        ("import jax; jax.devices()", None, ["None", "None"]),
    ],
    ids=["what is free", "hardly anything is", "the user's own", "less than what is needed", "too late"],
)
def test_the_pinned_pool_may_grow_to_what_is_free_and_then_to_what_is_needed(before, given, expected):
    """Unless the backend has started: then it is what XLA took it to be, and plans are held to that."""
    available = 2**20 if before == "tiny" else 100 * 2**30
    program = f"""
{before.replace("tiny", "")}
import os, pathlib
read = pathlib.Path.read_text
mine = "MemTotal: 300000000 kB\\nMemAvailable: {available // 1024} kB"
files = {{"/proc/meminfo": mine, "/proc/self/cgroup": ""}}
def read_text(self, *given, **options):
    return files[str(self)] if str(self) in files else read(self, *given, **options)
pathlib.Path.read_text = read_text
import kvrecomp
from kvrecomp.run import memory
for step in range(2):
    limit = os.environ.get(memory.LIMIT_VARIABLE)
    assert memory.pinned_limit() == int(limit or 64) * 2**30
    print(limit)
    memory.limit_pinned(3 * 2**30 - 5)  # and 4 GiB
"""
    environment = {name: value for name, value in os.environ.items() if name != memory.LIMIT_VARIABLE}
    environment |= {"PYTHONPATH": str(Path(kvrecomp.__file__).parent.parent), "JAX_PLATFORMS": "cpu"}
    environment |= {memory.LIMIT_VARIABLE: given} if given else {}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == expected, done.stderr


def control_group(folder: Path, version: int, limit: object, used: int, dropped: int) -> None:
    """Files as the kernel has them."""
    folder.mkdir(exist_ok=True, parents=True)
    names = (
        ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("max", "current", "inactive_file")
    )
    (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
    (folder / f"memory.{names[1]}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 150\n{names[2]} {dropped}\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("seen", [True, False], ids=["of the machine", "of a container"])
def test_a_process_has_the_memory_of_its_control_groups(monkeypatch, tmp_path, version, seen):
    """Where it has less than the machine; a container sees its own group as the root. What the system may drop from its
    cache is not used."""
    own = tmp_path / "own"
    own.write_text("5:cpu:/\n" + ("4:memory,blkio:/a/b\n" if version == 1 else "0::/a/b\n"))
    base = tmp_path / "memory" if version == 1 else tmp_path
    if seen:
        control_group(base / "a", version, 700, 300, 110)
        control_group(base / "a" / "b", version, 900, 290, 0)
        control_group(base, version, 2**63 - 4096 if version == 1 else "max", 5000, 0)
    else:
        control_group(base, version, 700, 300, 110)
    found = memory._control_groups(tmp_path, own)
    assert sorted(found) == [(700, 190), (900, 290)][: 1 + seen]
    monkeypatch.setattr(memory, "_control_groups", lambda: found)
    monkeypatch.setattr(memory, "_proc_meminfo", {"MemTotal": 1000, "MemAvailable": 600}.get)
    monkeypatch.setattr(memory, "_device_limits", lambda: {"bytes_limit": 70, "bytes_in_use": 11})
    monkeypatch.setattr(memory, "_pool_bytes", 0)
    assert (memory.total_host_bytes(), memory.free_host_bytes()) == (700, 510)


def test_a_machine_without_control_groups(tmp_path):
    assert memory._control_groups(tmp_path, tmp_path / "missing") == []
