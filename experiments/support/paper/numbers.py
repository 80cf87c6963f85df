"""The paper KVPR: its numbers, each with its place in the paper, from paper.json.

paper = read()
paper.table("Table 3").rows[0].times["paper"]["kvpr"]  # milliseconds a step

What the paper says of steps, seconds of decoding or tokens/s, is made milliseconds of a step of all groups together.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import models
from kvrecomp.plan import Memory, ModelShape, Workload
from kvrecomp.predict.hardware import HardwareProfile, Line

DATA = Path(__file__).with_name("paper.json")

Unit = Literal["s", "tokens/s"]
Source = Literal["paper", "predicted", "measured"]
Times = dict[str, float]  # milliseconds a step by plan: those by name, `kvpr` at its best split, and AUTO for ours
BASELINES: dict[Source, str] = {"paper": "baseline", "predicted": "keys_values", "measured": "keys_values"}


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
class Row:
    """A setting's times by source: the paper's are `baseline` and `kvpr`, none where it only draws them.

    Predicted ones have `sum`, that of keys_values without any overlap. `split` is the fraction of the cached tokens
    that KVPR's schedule recomputes at its predicted best. `ours` says of the plan of AUTO its `link_bytes` a step, and
    the fraction of layers with `weights_in_host`; it is None where nothing fits in the machine's memory.
    """

    setting: Setting
    times: dict[Source, Times]
    split: float = math.nan
    ours: dict[str, Any] | None = None


@dataclass(frozen=True)
class Table:
    """A table or figure, of steps: the paper's, predicted for a machine, by its name and profile, and measured.

    `against` is the baseline, `peer` its name in results files. `most_percent` has the largest gain by model, where
    the paper says no more. `devices` are those that were measured.
    """

    name: str
    title: str
    source: str
    machine: str
    profile: HardwareProfile
    weights: Memory
    unit: Unit
    against: str
    rows: tuple[Row, ...]
    peer: str = ""
    most_percent: dict[str, float] = dataclasses.field(default_factory=dict)
    devices: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys(row.setting.model for row in self.rows))

    def gain(self, base: float | None, faster: float | None) -> float | None:
        """What is won, in percent, from milliseconds a step: time saved, or more tokens/s. None without both."""
        if base is None or faster is None:
            return None
        return 100 * (1 - faster / base if self.unit == "s" else base / faster - 1)

    def gain_of(self, row: Row, source: Source, plan: str) -> float | None:
        """A plan's gain over the source's baseline in percent, None without both."""
        times = row.times[source]
        return self.gain(times.get(BASELINES[source]), times.get(plan))

    def gains(self, model: str, source: Source, plan: str) -> list[float]:
        """Those of the model's rows that have both."""
        gains = [self.gain_of(row, source, plan) for row in self.rows if row.setting.model == model]
        return [gain for gain in gains if gain is not None]

    @property
    def gained(self) -> str:
        """The unit of a gain."""
        return "% less time" if self.unit == "s" else "% more tokens/s"


@dataclass(frozen=True)
class Paper:
    """All of paper.json: the tables of steps, the machines that it measures on, and the rest as it is there."""

    tables: tuple[Table, ...]
    machines: dict[str, HardwareProfile]
    data: dict[str, Any]

    def table(self, name: str) -> Table:
        """The table of that name. Raises KeyError."""
        return {table.name: table for table in self.tables}[name]


def records(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that are lists under `columns`, as dictionaries."""
    return [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]


def read() -> Paper:
    """The paper's numbers."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    machines = {name: _machine(name, said) for name, said in data["machines"].items()}
    return Paper(tuple(_table(table, machines) for table in data["tables"]), machines, data)


def _machine(name: str, said: dict[str, Any]) -> HardwareProfile:
    """A data sheet, at the rates that the paper counts with where it says them."""
    sheet, link = HardwareProfile.from_datasheet(name), Line(0.0, 1 / (1e9 * said["link_gbps"]))
    return dataclasses.replace(
        sheet,
        to_device=link,
        beside_compute=1e9 * said["link_gbps"],
        matmul_rate=1e12 * said["matmul_tflops"] if "matmul_tflops" in said else sheet.matmul_rate,
        source=f"{sheet.source.partition('; link')[0]}; link: {said['link']} as KVPR counts it ({said['source']})",
    )


def _table(data: dict[str, Any], machines: dict[str, HardwareProfile]) -> Table:
    rows = []
    for record in records(data):
        setting = Setting(**{field.name: record[field.name] for field in dataclasses.fields(Setting)})
        said = {name: record[name] for name in ("baseline", "kvpr") if record[name] is not None}
        times = {name: setting.milliseconds(value, data["unit"]) for name, value in said.items()}
        rows.append(Row(setting, {"paper": times, "predicted": {}, "measured": {}}))
    fields = {key: value for key, value in data.items() if key not in ("columns", "rows")}
    return Table(**fields, profile=machines[data["machine"]], rows=tuple(rows))
