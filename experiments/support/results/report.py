"""What every results file says about where and how it was made, and which steps of a run are counted."""

import importlib.metadata
import json
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import jax

WARM_UP = 3  # steps at the start of a run that are not counted
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")

Item = TypeVar("Item")


def after_warm_up(of_steps: Sequence[Item]) -> list[Item]:
    """What is counted of a run's steps: all but the first WARM_UP, or the last one of a run that short."""
    return list(of_steps[min(WARM_UP, len(of_steps) - 1) :])


def run_info(commit: str = "", device: str | None = None) -> dict[str, Any]:
    """Device, driver, jax version, commit and command of this process; "unknown" where a thing cannot be asked.

    The device is jax's, which starts its backend, unless it is given.
    """
    return {
        "device": device or jax.devices()[0].device_kind,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "jax": jax.__version__,
        "commit": commit or output("git", "rev-parse", "HEAD"),
        "command": command(),
    }


def kept_rows(path: str, rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a results file, if it is there, that differ from all of these in some of the fields.

    Raises ValueError where it has rows of another kind, which would be lost.
    """
    if not pathlib.Path(path).exists():
        return []
    try:
        old = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["rows"]
        found = [[row[name] for name in fields] for row in old]
        own = [[row[name] for name in fields] for row in rows]
        return [row for row, facts in zip(old, found) if facts not in own]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--out: {path} is no file of this script, and would be lost: give another") from error


def command() -> str:
    """What this process was started with."""
    return shlex.join(["python", *sys.argv])


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that measurements depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def output(*command: str) -> str:
    """The first line that a command prints; "unknown" where it is not there, or prints nothing."""
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent)
    return done.stdout.strip().partition("\n")[0] or "unknown"
