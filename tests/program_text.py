"""The text of a program of XLA's without what does not matter to what it executes, so that two can be compared."""

import collections
import hashlib
import re
from dataclasses import dataclass

NAME = re.compile(r"%[\w.\-]+")
INSTRUCTION = re.compile(r"  (ROOT )?(%[\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)")  # name, shape, kind, operands and more
# Where it comes from, what jax says of its arguments, and comments that count operands.
UNIMPORTANT = re.compile(r', (metadata|frontend_attributes)=\{("[^"]*"|[^"{}])*\}|, sharding=\{replicated\}|/\*.*?\*/')
UNEXECUTED = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")
ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\}, ([\w-]+)\)")  # result, argument, kind


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    kind: str
    operands: str
    attributes: str
    is_root: bool


def normalised(text: str) -> str:
    """A program of XLA's whose values have names by their kind and order, and kernels names by what they compute.

    What executes nothing (arguments, parts of tuples, bitcasts, constants) is written where it is used. Arguments are
    numbered by their first use among those of their shape, and the results of the entry are sorted.
    """
    head, *blocks = re.split(r"\n\n+", text.strip())
    computations = {}
    for block in blocks:
        title, *lines = block.splitlines()
        if match := re.match(r"(ENTRY )?(%[\w.\-]+) \(", title):
            computations["ENTRY" if match[1] else match[2]] = [parsed(line) for line in lines if line != "}"]
    written: dict[str, str] = {}  # computations by what they are called here
    entry = Writer(computations, written).write("ENTRY", head)
    return "\n\n".join([*(f"{name}\n{written[name]}" for name in sorted(written)), f"ENTRY\n{entry}"])


def parsed(line: str) -> Instruction:
    match = INSTRUCTION.match(UNIMPORTANT.sub("", line))
    assert match is not None, f"no instruction of XLA's: {line}"
    root, name, shape, kind, rest = match.groups()
    depth = 1
    for end, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return Instruction(name, shape, kind, rest[:end], rest[end + 1 :], root is not None)
    raise AssertionError(f"no closing bracket: {line}")


class Writer:
    """Writes one computation."""

    def __init__(self, computations: dict[str, list[Instruction]], written: dict[str, str]):
        self._computations, self._written = computations, written
        self._instructions: dict[str, Instruction] = {}
        self._values: dict[str, str] = {}  # how each value is written where it is used
        self._counts: collections.Counter[str] = collections.Counter()
        self._is_entry = False

    def write(self, name: str, head: str = "") -> str:
        """The computation's text; `head` is the entry's, which says what results are written in place of arguments."""
        instructions = self._computations[name]
        self._instructions = {instruction.name: instruction for instruction in instructions}
        self._is_entry = name == "ENTRY"
        lines = []
        for instruction in instructions:
            if instruction.kind not in UNEXECUTED:
                written = self._executed(instruction)
                self._values[instruction.name] = f"{instruction.kind}.{self._number(instruction.kind)}"
                lines.append(f"  {self._values[instruction.name]} = {written}")
        (root,) = (instruction for instruction in instructions if instruction.is_root)
        results = NAME.findall(root.operands) if root.kind == "tuple" else [root.name]
        results = [f"  result {self._value(result)}" for result in results]
        arguments = {i.operands: i.name for i in instructions if i.kind == "parameter"}
        for result, argument, kind in ALIAS.findall(head):
            results[int(result or 0)] += f" {kind} {self._value(arguments[argument])}"
        return "\n".join(lines + (sorted(results) if self._is_entry else results))

    def _number(self, kind: str) -> int:
        self._counts[kind] += 1
        return self._counts[kind] - 1

    def _executed(self, instruction: Instruction) -> str:
        operands = NAME.sub(lambda match: self._value(match[0]), instruction.operands)
        attributes = NAME.sub(lambda match: self._called(match[0]), instruction.attributes)
        return f"{instruction.shape} {instruction.kind}({operands}){attributes}"

    def _called(self, name: str) -> str:
        """A computation, or a value, that an attribute names."""
        if name not in self._computations:
            return self._value(name)
        text = Writer(self._computations, self._written).write(name)
        called = f"computation-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self._written[called] = text
        return called

    def _value(self, name: str) -> str:
        if name not in self._values:
            self._values[name] = self._unexecuted(self._instructions[name])
        return self._values[name]

    def _unexecuted(self, instruction: Instruction) -> str:
        """A value that costs nothing, in terms of others."""
        shape, kind, operands = instruction.shape, instruction.kind, NAME.findall(instruction.operands)
        if kind == "parameter":
            number = self._number(shape) if self._is_entry else instruction.operands
            return f"argument.{number}:{shape}"
        if kind == "constant":
            return f"{shape} {instruction.operands}"
        if kind == "get-tuple-element":
            index = int(instruction.attributes.removeprefix(", index="))
            whole = self._instructions[operands[0]]
            if whole.kind == "tuple":
                return self._value(NAME.findall(whole.operands)[index])
            return f"{self._value(whole.name)}[{index}]"
        return f"{shape} {kind}({', '.join(map(self._value, operands))})"
