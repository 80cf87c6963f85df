"""The paper KVPR: its numbers, each with its place in the paper, from paper.json.

paper = read()
paper.table("Table 3").rows[0].times["kvpr"]  # milliseconds a step

What the paper says of steps, seconds of decoding or tokens/s, is made milliseconds of a step of all groups together.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import models
from kvrecomp.plan import Memory, ModelShape, Workload
from kvrecomp.predict.hardware import HardwareProfile, Line

DATA = Path(__file__).with_name("paper.json")

Unit = Literal["s", "tokens/s"]


@dataclass(frozen=True)
class Setting:
    """What a row of a table is measured on: `groups` batches that go through a layer together."""

    model: str
    batch: int
    groups: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{f'{self.groups} x ' if self.groups > 1 else ''}{self.batch} x {self.prompt} + {self.new}"

    @property
    def shape(self) -> ModelShape:
        """Of the model."""
        return models.preset(self.model).shape

    @property
    def cached(self) -> int:
        """Tokens of a row that are cached in the middle of the generation."""
        return self.prompt + self.new // 2

    @property
    def middle(self) -> Workload:
        """One group's step in the middle of the generation, as a workload of one new token."""
        return Workload(self.batch, self.cached, 1)

    def milliseconds(self, value: float, unit: Unit) -> float:
        """A step's, from seconds of decoding new - 1 tokens or from tokens/s of all groups together."""
        return 1e3 * (value / (self.new - 1) if unit == "s" else self.groups * self.batch / value)


@dataclass(frozen=True)
class PaperRow:
    """A setting and the paper's milliseconds a step of `baseline` and `kvpr`, none where it only draws them."""

    setting: Setting
    times: dict[str, float]


@dataclass(frozen=True)
class PaperTable:
    """A table or figure, of steps.

    `against` is the baseline, `peer` its name in results files. `most_percent` has the largest gain by model, where
    the paper says no more.
    """

    name: str
    title: str
    source: str
    machine: str
    weights: Memory
    unit: Unit
    against: str
    rows: tuple[PaperRow, ...]
    peer: str = ""
    most_percent: dict[str, float] = dataclasses.field(default_factory=dict)

    def gain(self, base: float | None, faster: float | None) -> float | None:
        """What is won, in percent, from milliseconds a step: time saved, or more tokens/s. None without both."""
        if base is None or faster is None:
            return None
        return 100 * (1 - faster / base if self.unit == "s" else base / faster - 1)

    @property
    def gained(self) -> str:
        """The unit of a gain."""
        return "% less time" if self.unit == "s" else "% more tokens/s"


@dataclass(frozen=True)
class Paper:
    """All of paper.json: the tables of steps, and the rest as it is there."""

    tables: tuple[PaperTable, ...]
    data: dict[str, Any]

    def table(self, name: str) -> PaperTable:
        """The table of that name. Raises KeyError."""
        return {table.name: table for table in self.tables}[name]

    def machine(self, name: str) -> HardwareProfile:
        """The paper's machine: a data sheet, at the rates that the paper counts with where it says them."""
        said = self.data["machines"][name]
        sheet, link = HardwareProfile.from_datasheet(name), Line(0.0, 1 / (1e9 * said["link_gbps"]))
        return dataclasses.replace(
            sheet,
            to_device=link,
            to_host=link,
            beside_compute=1e9 * said["link_gbps"],
            matmul_rate=1e12 * said["matmul_tflops"] if "matmul_tflops" in said else sheet.matmul_rate,
            source=f"{sheet.source.partition('; link')[0]}; link: {said['link']} as KVPR counts it ({said['source']})",
        )


def records(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that are lists under `columns`, as dictionaries."""
    return [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]


def read() -> Paper:
    """The paper's numbers."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    return Paper(tuple(map(_table, data["tables"])), data)


def _table(data: dict[str, Any]) -> PaperTable:
    rows = []
    for record in records(data):
        setting = Setting(**{field.name: record[field.name] for field in dataclasses.fields(Setting)})
        said = {name: record[name] for name in ("baseline", "kvpr") if record[name] is not None}
        times = {name: setting.milliseconds(value, data["unit"]) for name, value in said.items()}
        rows.append(PaperRow(setting, times))
    fields = {key: value for key, value in data.items() if key not in ("columns", "rows")}
    return PaperTable(**fields, rows=tuple(rows))
