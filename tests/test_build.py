"""Imports go downwards only, in no circle, and BUILD's packages depend on what they import."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__").replace("/", "."): path
    for folder in ("kvrecomp", "models", "experiments")
    for path in (ROOT / folder).rglob("*.py")
}
# Each package, and those that it may import: everything below it.
BELOW = {
    "kvrecomp.files": set(),
    "kvrecomp.progress": set(),
    "kvrecomp.plan": set(),
    "kvrecomp.predict": {"kvrecomp.plan"},
    "kvrecomp.run": {"kvrecomp.plan"},
    "kvrecomp.measure": {"kvrecomp.files", "kvrecomp.progress", "kvrecomp.plan", "kvrecomp.predict", "kvrecomp.run"},
    "models": {"kvrecomp.plan", "kvrecomp.run"},
}
BELOW["kvrecomp"] = {*BELOW} - {"models"}
BELOW["experiments.support"] = {*BELOW}
BELOW["experiments"] = {*BELOW}


def package_of(module: str) -> str:
    """The package of BELOW that a module is in."""
    return max((package for package in BELOW if f"{module}.".startswith(f"{package}.")), key=len)


def imported(module: str) -> set[str]:
    """The modules that a module imports, wherever in it; `from package import module` is the module's."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in SOURCES else str(node.module) for name in names}
    return found


def imports(module: str) -> set[str]:
    """Those of ours."""
    return imported(module) & SOURCES.keys()


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_go_downwards_only(module):
    package = package_of(module)
    upwards = {name for name in imports(module) if package_of(name) not in BELOW[package] | {package}}
    assert not upwards, f"{module} is in {package} and imports {', '.join(sorted(upwards))}"


@pytest.mark.parametrize("module", [module for module in SOURCES if package_of(module) == "kvrecomp.plan"])
def test_plans_are_plain_data_without_jax(module):
    packages = {name.partition(".")[0] for name in imported(module)}
    assert packages - sys.stdlib_module_names <= {"kvrecomp", "numpy", "rich"}


def test_no_imports_go_in_a_circle():
    order = graphlib.TopologicalSorter({module: imports(module) for module in SOURCES})
    assert len(list(order.static_order())) == len(SOURCES)


def test_dependencies_in_build_are_the_imports():
    libraries = {}
    for statement in ast.parse((ROOT / "BUILD").read_text(encoding="utf-8")).body:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "py_library":
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            deps = ast.literal_eval(given["deps"]) if "deps" in given else []
            libraries[ast.literal_eval(given["name"])] = {dep.removeprefix(":") for dep in deps}
    for package in BELOW:
        if package == "experiments":  # through experiments_support
            continue
        needed = {package_of(name) for module in SOURCES if package_of(module) == package for name in imports(module)}
        assert libraries[package.replace(".", "_")] == {name.replace(".", "_") for name in needed - {package}}
