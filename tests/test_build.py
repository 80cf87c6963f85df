"""BUILD says what the code imports: every file is in one target, its dependencies are its imports, and they go down."""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kvrecomp", "models", "experiments", "tests")
BELOW = {
    "kvrecomp": {"kvrecomp"},
    "models": {"kvrecomp", "models"},
    "experiments/support": {"kvrecomp", "models", "experiments/support"},
    "experiments": {"kvrecomp", "models", "experiments/support", "experiments"},
}
# What a file reads beside the code that it imports.
READS = {
    "experiments/support/source.py": 'glob(["experiments/checkpoints/pydoc/**"])',
    "experiments/support/paper.py": '["experiments/support/paper.json"]',
    "tests/test_build.py": "ALL_SOURCES",
    "tests/test_job.py": 'glob(["experiments/checkpoints/pydoc/**"])',
    "tests/test_notebook.py": '["experiments/decode.ipynb"]',
    "tests/test_readme.py": '["README.md"] + glob(["experiments/results/*", "experiments/checkpoints/pydoc/**"])',
    "tests/test_results.py": 'glob(["experiments/results/*"])',
}
# What it runs in processes of their own.
RUNS = {
    "experiments/suite.py": {"experiments/benchmark.py", "experiments/peers.py"},
    "tests/test_notebook.py": {"experiments/support/split_plot.py"},
    "tests/test_readme.py": {"kvrecomp/__init__.py", "models/__init__.py"},
}
SOURCES = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def target_name(source: str) -> str:
    """kvrecomp/plan.py -> kvrecomp_plan, kvrecomp/__init__.py -> kvrecomp, tests/test_plan.py -> test_plan."""
    return source.removesuffix(".py").removesuffix("/__init__").removeprefix("tests/").replace("/", "_")


def kind(source: str) -> str:
    """The rule for a file: a test, a script (it runs something of its own), or a library."""
    if Path(source).name.startswith("test_"):
        return "py_test"
    return "py_binary" if "__name__" in names(source) else "py_library"


@functools.cache
def tree(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"))


def names(source: str) -> set[str]:
    """All names that the file reads."""
    return {node.id for node in ast.walk(tree(source)) if isinstance(node, ast.Name)}


def source_of(module: str) -> str | None:
    """The file of a module of ours, if it is one."""
    path = module.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py", f"tests/{path}.py"):
        if candidate in SOURCES:
            return candidate
    return None


def imports(source: str) -> set[str]:
    """The files of ours that a file imports, wherever in it, or runs. `from package import module` is the module's."""
    found: set[str | None] = set(RUNS.get(source, ()))
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Import):
            found |= {source_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{source}: imports are absolute here"
            found |= {source_of(f"{node.module}.{alias.name}") or source_of(str(node.module)) for alias in node.names}
    return {file for file in found if file is not None}


def expected_text(source: str) -> str:
    """The target of a file, as BUILD is to have it."""
    rule, name, data = kind(source), target_name(source), [READS[source]] if source in READS else []
    lines = [f'name = "{name}",', f'srcs = ["{source}"],']
    if rule == "py_test":
        given = ["pyproject.toml", *([":conftest"] if "tests/conftest.py" in SOURCES else [])]
        data = [listed(given), *data]
        lines[1] = f"srcs = {listed([source, ':run_pytest'])},"
        lines.append(f'args = ["$(rootpath {source})"],')
    if data:
        lines.append(f"data = {' + '.join(data)},")
    if rule != "py_library":
        lines.append(f'main = "{"run_pytest.py" if rule == "py_test" else source}",')
    deps = [f":{target_name(file)}" for file in sorted(imports(source))]
    if deps:
        lines.append(f"deps = {listed(deps)},")
    return "\n".join([f"{rule}(", *(f"    {line}" for line in lines), ")"])


def listed(items: list[str]) -> str:
    """A list as Bazel's formatter writes it within a target."""
    if len(items) == 1:
        return f'["{items[0]}"]'
    return "\n".join(["[", *(f'        "{item}",' for item in items), "    ]"])


@functools.cache
def targets() -> dict[str, dict]:
    """The Python targets of BUILD by name: rule, srcs and deps."""
    found = {}
    for statement in ast.parse((ROOT / "BUILD").read_text(encoding="utf-8")).body:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.startswith("py_"):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            name, srcs, deps = (ast.literal_eval(given.get(key, ast.List([]))) for key in ("name", "srcs", "deps"))
            assert name not in found, f"BUILD has two targets {name}"
            own = [source for source in srcs if source.endswith(".py")]
            found[name] = {"rule": call.func.id, "srcs": own, "deps": [dep.removeprefix(":") for dep in deps]}
    return found


def test_every_file_is_in_one_target_and_every_target_has_one():
    listed_sources = sorted(source for target in targets().values() for source in target["srcs"])
    missing = [source for source in SOURCES if source not in listed_sources]
    assert listed_sources == SOURCES, "BUILD lacks:\n\n" + "\n\n".join(map(expected_text, missing))


@pytest.mark.parametrize("source", SOURCES)
def test_target_says_what_the_file_imports(source):
    expected = {
        "rule": kind(source),
        "srcs": [source],
        "deps": [target_name(file) for file in sorted(imports(source))],
    }
    assert targets().get(target_name(source)) == expected, "BUILD should have:\n\n" + expected_text(source)
    assert expected_text(source) in (ROOT / "BUILD").read_text(encoding="utf-8"), expected_text(source)


def test_imports_go_downwards_only():
    folder = {name: Path(target["srcs"][0]).parent.as_posix() for name, target in targets().items()}
    for name, target in targets().items():
        upwards = [dep for dep in target["deps"] if folder[dep] not in BELOW.get(folder[name], folder.values())]
        assert not upwards, f"{name} is in {folder[name]} and imports {', '.join(upwards)}"


def test_no_imports_go_in_a_circle():
    order = graphlib.TopologicalSorter({name: target["deps"] for name, target in targets().items()})
    assert len(list(order.static_order())) == len(targets())
