"""What every results file says about where and how it was made."""

import pathlib
import shlex
import shutil
import subprocess
import sys
from typing import Any

import jax


def run_info(commit: str = "") -> dict[str, Any]:
    """Device, driver, jax version, commit and command of this process; "unknown" where a thing cannot be asked."""
    return {
        "device": jax.devices()[0].device_kind,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "jax": jax.__version__,
        "commit": commit or _output("git", "rev-parse", "HEAD"),
        "command": shlex.join(["python", *sys.argv]),
    }


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent)
    return done.stdout.strip().partition("\n")[0] or "unknown"
