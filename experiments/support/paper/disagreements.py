"""Where the paper KVPR's numbers disagree with its own formula and text.

Every number is worked out from paper.json and the formula at the rates that the paper counts with.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from experiments.support.paper.costs import formula_gain
from experiments.support.paper.numbers import Paper, PaperRow, PaperTable, Setting, records
from experiments.support.results import tables
from experiments.support.results.predictions import title
from kvrecomp.plan import GIB, MIB
from kvrecomp.predict.cost import kvpr_seconds, kvpr_split


class Disagreement(NamedTuple):
    """What the paper says at a place of something, and what its formula or another part of it says."""

    place: str
    of: str
    said: str
    against: str


def disagreements(paper: Paper) -> list[Disagreement]:
    """All of them."""
    parts = (_headlines, _row_order, _layers, _small_batches, _links, _order, _shares, _splits)
    return [found for part in parts for found in part(paper)]


def markdown(paper: Paper) -> str:
    """As a table."""
    return tables.table(
        disagreements(paper),
        ("place", lambda found: found.place),
        ("of", lambda found: found.of),
        ("the paper says", lambda found: found.said),
        ("its formula or another part says", lambda found: found.against),
    )


def _headlines(paper: Paper) -> Iterator[Disagreement]:
    """The abstract's gains against their tables, and against what the formula allows: of each model, for any batch."""
    for claim in paper.data["claims"].values():
        steps = paper.table(claim["table"])
        machine = paper.machine(steps.machine)
        limits = {row.setting.model: formula_gain(machine, steps, row.setting) for row in steps.rows}
        against = _listed(limits.values(), ".0f") + (" %, of the cache alone" if steps.weights == "host" else " %")
        if steps.most_percent:
            said = f"{_listed(steps.most_percent.values(), '.1f')} {steps.gained}"
            against += "; less for larger models"
        else:
            gains = [steps.gain(row.baseline, row.kvpr) or 0.0 for row in steps.rows]
            said = f"{claim['percent']:g} {steps.gained}; {min(gains):.1f} to {max(gains):.1f} in {steps.name}"
        yield Disagreement(claim["source"], f"largest gain, {_titles(limits)}", said, against)


def _row_order(paper: Paper) -> Iterator[Disagreement]:
    """Whether activations are sent in row order."""
    steps = paper.table("Table 3")
    machine, setting = paper.machine(steps.machine), steps.rows[0].setting
    split = kvpr_split(machine, setting.shape, setting.middle)
    nothing, best = (kvpr_seconds(machine, setting.shape, setting.middle, tokens) for tokens in (0, split))
    sent = setting.batch * split * setting.shape.itemsize * sum(layer.hidden for layer in setting.shape.layers)
    saved, with_copy = (100 * (1 - time / nothing) for time in (best - sent / machine.beside_compute, best))
    of = f"time saved in row order, without the first term of equation 10, {title(setting.model)}"
    against = f"{with_copy:.0f} % with it; Figure 3 sends the activations, and here they are counted"
    yield Disagreement(paper.data["row_order"]["source"], of, f"{saved:.0f} %", against)


def _layers(paper: Paper) -> Iterator[Disagreement]:
    """Table 1: a layer's copy, and its K and V recomputed."""
    data = paper.data["layers"]
    machine, rows = paper.machine(data["machine"]), records(data)
    tokens, rate = data["batch"] * data["tokens"], machine.beside_compute / 1e9
    said = [row["compute_ms"] for row in rows]
    computed = [4e3 * tokens * row["hidden"] ** 2 / machine.matmul_rate for row in rows]  # equations 8 and 9
    ratios = [formula / table for formula, table in zip(computed, said)]
    against = f"{_listed(computed)} ms by equations 8 and 9, {min(ratios):.0f} to {max(ratios):.0f} times as long"
    models = _titles(row["model"] for row in rows)
    yield Disagreement(data["source"], f"recomputing a layer, {models}", f"{_listed(said)} ms", against)
    copied = [4e3 * tokens * row["hidden"] / machine.beside_compute for row in rows]  # 2 b s h p, p = 2
    binary = [1e3 * row["cache_mb"] * MIB / (rate * GIB) for row in rows]
    said = [row["link_ms"] for row in rows]
    against = f"{_listed(copied)} ms at {rate:.0f} GB/s; {_listed(binary)} at {rate:.0f} GiB/s"
    yield Disagreement(data["source"], f"copying a layer, {models}", f"{_listed(said)} ms", against)


def _small_batches(paper: Paper) -> Iterator[Disagreement]:
    """Table 2: what its numbers are, and its sizes."""
    steps = paper.table("Table 2")
    first, last = steps.rows[0], steps.rows[-1]
    growth, growth_of_bytes = last.data["baseline"] / first.data["baseline"], _sent(steps, last) / _sent(steps, first)
    of = f"growth of its latencies, batch {first.setting.batch} to {last.setting.batch}"
    against = f"{growth_of_bytes:.1f} times the bytes; KVPR's are the larger: they are read as tokens/s here"
    yield Disagreement(steps.name, of, f"{growth:.1f} times", against)
    token = 2 * first.setting.shape.layers[0].hidden * first.setting.shape.itemsize
    caches = [row.setting.batch * row.setting.prompt * token / MIB for row in steps.rows]
    said, against = _listed(row.data["cache_mb"] for row in steps.rows), f"{_listed(caches)} MiB of the prompt alone"
    yield Disagreement(steps.name, "a layer's cache", f"{said} MB", against)


def _links(paper: Paper) -> Iterator[Disagreement]:
    """What the baselines' times make of the link."""
    for steps in paper.tables:
        rates = [_sent(steps, row) / row.baseline / 1e6 for row in steps.rows if row.baseline]
        if rates:
            said = f"{paper.machine(steps.machine).beside_compute / 1e9:.0f} GB/s"
            of = f"the link, and bytes over {steps.against}'s time"
            yield Disagreement(steps.name, of, said, f"{min(rates):.1f} to {max(rates):.1f} GB/s")


def _sent(steps: PaperTable, row: PaperRow) -> int:
    """Bytes of all keys and values in the middle of the generation, and of the weights where these are sent."""
    shape, setting = row.setting.shape, row.setting
    width = sum(layer.width("keys_values") for layer in shape.layers)
    weights = sum(layer.parameters for layer in shape.layers) if steps.weights == "host" else 0
    return (setting.groups * setting.batch * setting.cached * width + weights) * shape.itemsize


def _order(paper: Paper) -> Iterator[Disagreement]:
    """A time that is longer than that of a longer prompt, or of a larger model."""
    timed = [(steps, row) for steps in paper.tables if steps.unit == "s" for row in steps.rows if row.baseline]
    for steps, row in timed:
        larger = [
            f"{other.data['baseline']:.1f} s for {title(other.setting.model)}, {other.setting}"
            for _, other in timed
            if other.baseline < row.baseline and _sends_more(other.setting, row.setting)
        ]
        if larger:
            of = f"{steps.against}'s time, {title(row.setting.model)}, {row.setting}"
            against = f"{tables.listed(larger)}, which send more"
            yield Disagreement(steps.name, of, f"{row.data['baseline']:.1f} s", against)


def _sends_more(larger: Setting, setting: Setting) -> bool:
    longer = larger.new == setting.new and larger.prompt >= setting.prompt
    return longer and larger.shape.parameters >= setting.shape.parameters


def _shares(paper: Paper) -> Iterator[Disagreement]:
    """Figure 10: the times of activations, h numbers a token, and of keys and values, 2 h, give the split."""
    data = paper.data["shares"]
    activations, cache = (data[name]["KVPR"] for name in ("activations_percent", "cache_percent"))
    ratio = 2 * activations / cache  # l / (s - l)
    models = [row["model"] for row in records(paper.data["layers"])]
    splits = [_split(paper, Setting(model, 32, 1, 1024, 1)) / 1024 for model in models]
    of = f"split l/s: {activations} % of the time are activations, {cache} % the cache"
    against = f"{_listed(splits, '.2f')} for {_titles(models)}"
    yield Disagreement(data["source"], of, f"{ratio / (1 + ratio):.2f}", against)


def _splits(paper: Paper) -> Iterator[Disagreement]:
    """Figure 12: split points that are beyond the prompt."""
    data = paper.data["splits"]
    first, last = records(data)[0], records(data)[-1]

    def formula(prompt: int) -> str:
        lengths = [prompt + row["new"] for row in (first, last)]
        splits = [_split(paper, Setting(data["model"], data["batch"], 1, tokens, 1)) for tokens in lengths]
        return _listed(splits, "d")

    said = f"{first['split']}, and increases to {last['split']}; the axis is {data['axis'][0]} to {data['axis'][1]}"
    of = f"split of a prompt of {data['prompt']}, {first['new']} and {last['new']} new tokens"
    against = f"{formula(data['prompt'])}, at most the prompt (equation 11); {formula(256)} for a prompt of 256"
    yield Disagreement(data["source"], of, said, against)


def _split(paper: Paper, setting: Setting) -> int:
    """By the formula at the A100's peak, in tokens."""
    return kvpr_split(paper.machine("a100"), setting.shape, setting.middle)


def _titles(models: Iterable[str]) -> str:
    return tables.listed(map(title, models))


def _listed(values: Iterable[float], form: str = ".3g") -> str:
    return tables.listed(f"{value:{form}}" for value in values)
