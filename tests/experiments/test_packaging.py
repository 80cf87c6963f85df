"""What is installed: a wheel has all that the scripts need, and what else has our packages' names is not in the way."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", "77", reason="wheels are built by setuptools, which the extra `test` brings")

ROOT = Path(__file__).parents[2]
OURS = ("kvrecomp", "models", "experiments")


def python(*words: str, folder: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    """What a Python that is started in the folder says; what is at `path` comes before what is installed."""
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a clone named kvrecomp, and in `wheel` and `editable` what installing it puts on the path."""
    folder = tmp_path_factory.mktemp("built")
    for name in OURS:
        shutil.copytree(ROOT / name, folder / "kvrecomp" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "kvrecomp")
    for name in ("wheel", "editable"):
        build = f"from setuptools import build_meta; build_meta.build_{name}({str(folder / name)!r})"
        done = python("-c", build, folder=folder / "kvrecomp")
        assert done.returncode == 0, done.stderr
        (wheel,) = (folder / name).glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(folder / name)
        wheel.unlink()
    return folder


def test_a_wheel_has_the_packages_and_what_the_scripts_read(built):
    clone, wheel = built / "kvrecomp", built / "wheel"
    patterns = [*(f"{name}/**/*.py" for name in OURS), "experiments/checkpoints/**/*", "experiments/support/**/*.json"]
    read = [{path.relative_to(clone) for path in clone.glob(pattern) if path.is_file()} for pattern in patterns]
    installed = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file()}
    assert all(read) and {path for path in installed if ".dist-info" not in path.parts[0]} == set.union(*read)


def test_scripts_of_a_wheel_run_where_others_have_our_names(built, tmp_path):
    """In a folder with a file of models of its own, and with a clone."""
    (tmp_path / "models.py").write_text("raise SystemExit('these are others')\n")
    (tmp_path / "kvrecomp").mkdir()
    words = ["--plan=device", "--prompt=Return the", "--max_new_tokens=2", "--nocheck", "--temperature=0.5"]
    done = python("-m", "experiments.generate", *words, folder=tmp_path, path=built / "wheel")
    assert done.returncode == 0 and "prompt 1: 11 tokens, 2 new" in done.stdout, done.stderr


def test_a_clone_does_not_hide_the_package_that_is_installed_from_it(built):
    """In the folder above it, where Python takes its name for a namespace's, unless a package is on the path."""
    (line,) = (built / "editable" / "__editable__.kvrecomp-0.1.0.pth").read_text().splitlines()
    assert Path(line).resolve() == built / "kvrecomp"
    code = f"import site; site.addsitedir({str(built / 'editable')!r}); from importlib.util import find_spec; "
    code += f"print(*(find_spec(name).origin for name in {OURS}), sep='\\n')"
    done = python("-S", "-c", code, folder=built)
    assert done.stdout.splitlines() == [str(built / "kvrecomp" / name / "__init__.py") for name in OURS], done.stderr
