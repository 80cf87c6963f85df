"""Where the paper KVPR's numbers disagree with its own formula and text, beside its table 1 (`report.layers`).

Every number is worked out from paper.json and the formula at the rates that the paper counts with.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from experiments.support.paper.costs import formula_gain
from experiments.support.paper.numbers import Paper, PaperRow, PaperTable, Setting, records
from experiments.support.results import tables
from experiments.support.results.predictions import title
from kvrecomp.predict.kvpr import kvpr_seconds, kvpr_split


class Disagreement(NamedTuple):
    """What the paper says at a place of something, and what its formula or another part of it says."""

    place: str
    of: str
    said: str
    against: str


def disagreements(paper: Paper) -> list[Disagreement]:
    """All of them."""
    parts = (_headlines, _row_order, _small_batches, _links, _shares, _splits)
    return [found for part in parts for found in part(paper)]


def _headlines(paper: Paper) -> Iterator[Disagreement]:
    """The abstract's gains against their tables, and against what the formula allows: of each model, for any batch."""
    for claim in paper.data["claims"].values():
        table = paper.table(claim["table"])
        machine = paper.machine(table.machine)
        limits = {row.setting.model: formula_gain(machine, table, row.setting) for row in table.rows}
        against = _listed(limits.values(), ".0f") + (" %, of the cache alone" if table.weights == "host" else " %")
        if table.most_percent:
            said = f"{_listed(table.most_percent.values(), '.1f')} {table.gained}"
            against += "; less for larger models"
        else:
            gains = [table.gain(row.times["baseline"], row.times["kvpr"]) or 0.0 for row in table.rows]
            said = f"{claim['percent']:g} {table.gained}; {min(gains):.1f} to {max(gains):.1f} in {table.name}"
        models = tables.listed(map(title, limits))
        yield Disagreement(claim["source"], f"largest gain, {models}", said, against)


def _row_order(paper: Paper) -> Iterator[Disagreement]:
    """Whether activations are sent in row order."""
    table = paper.table("Table 3")
    machine, setting = paper.machine(table.machine), table.rows[0].setting
    split = kvpr_split(machine, setting.shape, setting.middle)
    nothing, best = (kvpr_seconds(machine, setting.shape, setting.middle, tokens) for tokens in (0, split))
    sent = setting.batch * split * setting.shape.itemsize * sum(layer.hidden for layer in setting.shape.layers)
    saved, with_copy = (100 * (1 - time / nothing) for time in (best - sent / machine.beside_compute, best))
    of = f"time saved in row order, without the first term of equation 10, {title(setting.model)}"
    against = f"{with_copy:.0f} % with it; Figure 3 sends the activations, and here they are counted"
    yield Disagreement(paper.data["row_order"]["source"], of, f"{saved:.0f} %", against)


def _small_batches(paper: Paper) -> Iterator[Disagreement]:
    """Table 2: what its numbers are."""
    table = paper.table("Table 2")
    first, last = table.rows[0], table.rows[-1]
    growth, growth_of_bytes = last.data["baseline"] / first.data["baseline"], _sent(table, last) / _sent(table, first)
    of = f"growth of its latencies, batch {first.setting.batch} to {last.setting.batch}"
    against = f"{growth_of_bytes:.1f} times the bytes; KVPR's are the larger: they are read as tokens/s here"
    yield Disagreement(table.name, of, f"{growth:.1f} times", against)


def _links(paper: Paper) -> Iterator[Disagreement]:
    """What the baselines' times make of the link."""
    for table in paper.tables:
        rates = [_sent(table, row) / row.times["baseline"] / 1e6 for row in table.rows if row.times]
        if rates:
            of = f"the link; what is sent over {table.against}'s time"
            said = f"{paper.machine(table.machine).beside_compute / 1e9:.0f} GB/s"
            yield Disagreement(table.name, of, said, f"{min(rates):.1f} to {max(rates):.1f} GB/s")


def _sent(table: PaperTable, row: PaperRow) -> int:
    """Bytes of all keys and values in the middle of the generation, and of the weights where these are sent."""
    shape, setting = row.setting.shape, row.setting
    width = sum(layer.width("keys_values") for layer in shape.layers)
    weights = sum(layer.parameters for layer in shape.layers) if table.weights == "host" else 0
    return (setting.groups * setting.batch * setting.cached * width + weights) * shape.itemsize


def _shares(paper: Paper) -> Iterator[Disagreement]:
    """Figure 10: the times of activations, h numbers a token, and of keys and values, 2 h, give the split."""
    data = paper.data["shares"]
    activations, cache = (data[name]["KVPR"] for name in ("activations_percent", "cache_percent"))
    ratio = 2 * activations / cache  # l / (s - l)
    models = [row["model"] for row in records(paper.data["layers"])]
    splits = [_split(paper, Setting(model, 32, 1, 1024, 1)) / 1024 for model in models]
    of = f"split l/s: {activations} % of the time are activations, {cache} % the cache"
    against = f"{_listed(splits, '.2f')} for {tables.listed(map(title, models))}"
    yield Disagreement(data["source"], of, f"{ratio / (1 + ratio):.2f}", against)


def _splits(paper: Paper) -> Iterator[Disagreement]:
    """Figure 12: split points that are beyond the prompt."""
    data = paper.data["splits"]
    first, last = records(data)[0], records(data)[-1]

    def formula(prompt: int) -> str:
        lengths = [prompt + row["new"] for row in (first, last)]
        return _listed((_split(paper, Setting(data["model"], data["batch"], 1, cached, 1)) for cached in lengths), "d")

    of = f"split of a prompt of {data['prompt']}, {first['new']} and {last['new']} new tokens"
    said = f"{first['split']}, and increases to {last['split']}; the axis is {data['axis'][0]} to {data['axis'][1]}"
    against = f"{formula(data['prompt'])}, at most the prompt (equation 11); {formula(256)} for a prompt of 256"
    yield Disagreement(data["source"], of, said, against)


def _split(paper: Paper, setting: Setting) -> int:
    """By the formula at the A100's peak, in tokens."""
    return kvpr_split(paper.machine("a100"), setting.shape, setting.middle)


def _listed(values: Iterable[float], form: str) -> str:
    return tables.listed(f"{value:{form}}" for value in values)
