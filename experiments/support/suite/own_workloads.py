"""Workloads of one's own, from a JSON file, in place of those of `workloads`."""

import dataclasses
import json
import os
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from experiments.support.suite.cases import Case


def read_cases(path: str | os.PathLike) -> tuple[Case, ...]:
    """Workloads of one's own: a JSON list of objects with the fields of `Case`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such list, or has a name twice.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(given, list) or not given:
            raise ValueError(f"it is {'an empty list' if given == [] else type(given).__name__}")
        cases = tuple(_case(each) for each in given)
    except ValueError as error:
        fields = ", ".join(field.name for field in dataclasses.fields(Case))
        raise ValueError(f"{path}: {error}; expected a JSON list of objects with {fields}") from error
    names = [case.name for case in cases]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path} has two workloads {doubled[0]!r}: each needs a name of its own")
    return cases


def _case(given: Any) -> Case:
    """The workload of an object of JSON. Raises ValueError for fields that are missing, unknown or of another type."""
    if not isinstance(given, dict):
        raise ValueError(f"{given!r} is no object")
    hints = get_type_hints(Case)
    if unknown := given.keys() - hints.keys():
        raise ValueError(f"{sorted(unknown)[0]!r} is no field")
    for field in dataclasses.fields(Case):
        if field.name not in given and field.default is dataclasses.MISSING:
            raise ValueError(f"{given.get('name', 'a workload')} has no {field.name}")
    for name, value in given.items():
        if not _is_a(hints[name], value):
            raise ValueError(f"{name} is {value!r}; expected {_described(hints[name])}")
    return Case(**given)


UNIONS = (types.UnionType, Union)  # which of them a hint is depends on what it is made of
KINDS = {str: "a text", int: "a whole number", float: "a number", type(None): "null"}


def _is_a(hint: Any, value: Any) -> bool:
    """Whether a value of JSON is of the type of a field."""
    if get_origin(hint) in UNIONS:
        return any(_is_a(each, value) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_is_a(get_args(hint)[0], each) for each in value)
    return isinstance(value, (int, float) if hint is float else hint) and not isinstance(value, bool)


def _described(hint: Any) -> str:
    if get_origin(hint) in UNIONS:
        return " or ".join(map(_described, get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list, each {_described(get_args(hint)[0])}"
    return KINDS[hint]
