"""Where the paper KVPR's numbers disagree with its own formula and text, and with the predictions: in sentences.

Every number in them is worked out here, from paper.json and the formula at the rates that the paper counts with.
"""

import bisect
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from experiments.support.paper.numbers.costs import Found, formula_gain
from experiments.support.paper.numbers.numbers import Paper, PaperRow, PaperTable, Setting, records
from experiments.support.results.predictions import between, title
from experiments.support.results.tables import listed
from kvrecomp.plan import GIB, MIB
from kvrecomp.predict.kvpr import kvpr_seconds, kvpr_split


@dataclass(frozen=True)
class Note:
    """A sentence, and the place in the paper that it is about."""

    place: str
    text: str


def notes(paper: Paper, found: Sequence[Found]) -> list[Note]:
    """Of the paper alone, then of those tables that were predicted for the paper's own machines."""
    alone = (_layers, _headlines, _order, _rates, _row_order, _shares, _splits, _small)
    own = [each for each in found if each.profile == paper.machine(each.table.machine)]
    predicted = [note for say in (_room, _gains, _column) for each in own for note in say(each)]
    return [*(note for say in alone for note in say(paper)), *predicted]


# --- the paper alone --------------------------------------------------------------------------------------------------


def _layers(paper: Paper) -> Iterator[Note]:
    """Table 1: a layer's copy, and its K and V recomputed."""
    data = paper.data["layers"]
    machine, rows = paper.machine(data["machine"]), records(data)
    numbers = data["batch"] * data["tokens"]
    computed = [4e3 * numbers * row["hidden"] ** 2 / machine.matmul_rate for row in rows]  # equations 8 and 9
    copied = [4e3 * numbers * row["hidden"] / machine.beside_compute for row in rows]  # 2 b s h p, p = 2
    said = [row["compute_ms"] for row in rows]
    yield Note(
        data["source"],
        f"recomputing a layer's K and V takes {_all(said)} ms there. Its equations 8 and 9 give {_all(computed)} ms at "
        f"{machine.matmul_rate / 1e12:.0f} TFLOP/s, {_ends(computed, said)} times as long: the table's times grow with "
        f"the hidden size (x {said[-1] / said[0]:.2f}), the formula's with its square "
        f"(x {computed[-1] / computed[0]:.2f}). So copying takes {_ends([row['link_ms'] for row in rows], said)} times "
        f"as long as recomputing by the table, {_ends(copied, computed)} times by the formula.",
    )
    binary = [row["cache_mb"] * MIB / (machine.beside_compute / 1e9 * GIB) * 1e3 for row in rows]
    yield Note(
        data["source"],
        f"the copies' {_all([row['link_ms'] for row in rows])} ms are {machine.beside_compute / 1e9:.0f} GiB/s "
        f"({_all(binary)} ms); at the text's {machine.beside_compute / 1e9:.0f} GB/s they take {_all(copied)} ms.",
    )


def _headlines(paper: Paper) -> Iterator[Note]:
    """The abstract's numbers against the tables that they are from, and against what the formula allows."""
    for claim in paper.data["claims"].values():
        table, machine = paper.table(claim["table"]), paper.machine(paper.table(claim["table"]).machine)
        limits = {row.setting.model: formula_gain(machine, table, row.setting) for row in table.rows}
        own = [row for row in table.rows if row.setting.model == claim["model"]]
        gains = [gain for gain in (table.gain(row.baseline, row.kvpr) for row in own) if gain is not None]
        text = f"{claim['percent']:g} {table.gained} for {title(claim['model'])}"
        text += f"; in {table.name} it is {min(gains):.1f} to {max(gains):.1f} %" if gains else ""
        alone = ", which is of the cache alone," if table.weights == "host" else ""
        text += f". By the formula{alone} it is {limits[claim['model']]:.0f} %, whatever the batch and the lengths."
        others = [f"{gain:g} % for {title(model)}" for model, gain in table.most.items() if model != claim["model"]]
        if others:
            text += f" It is {listed(others)}; by the formula {_all([*limits.values()], '.0f')} %, from small to large."
        yield Note(claim["source"], text)


def _order(paper: Paper) -> Iterator[Note]:
    """Times that fall with a longer prompt or a larger model."""
    seen = [(own, row, row.baseline) for own in paper.tables if own.unit == "s" for row in own.rows if row.baseline]
    for table, row, time in seen:
        setting = row.setting
        longer = [
            f"{other.data['baseline']:.1f} s of {title(other.setting.model)}, {other.setting}"
            for _, other, less in seen
            if time / less > 1
            and other.setting.new == setting.new
            and other.setting.prompt >= setting.prompt
            and other.setting.shape.parameters >= setting.shape.parameters
        ]
        if longer:
            yield Note(
                table.name,
                f"{table.against} takes {row.data['baseline']:.1f} s for {title(setting.model)}, {setting}, longer "
                f"than the {listed(longer)}, which send more.",
            )


def _rates(paper: Paper) -> Iterator[Note]:
    """What the baselines' times make of the link."""
    for table in paper.tables:
        rates = [_sent(table, row) / row.baseline / 1e6 for row in table.rows if row.baseline]
        if not rates:
            continue
        link = paper.machine(table.machine).beside_compute / 1e9
        yield Note(
            table.name,
            f"keys and values{' and weights' if table.weights == 'host' else ''} over {table.against}'s time are "
            f"{min(rates):.1f} to {max(rates):.1f} GB/s, of the {link:.0f} that the paper counts.",
        )


def _sent(table: PaperTable, row: PaperRow) -> int:
    """Bytes of all keys and values in the middle of the generation, and of the weights where these are sent."""
    shape, setting = row.setting.shape, row.setting
    pairs = setting.groups * setting.batch * setting.cached * sum(own.width("keys_values") for own in shape.layers)
    weights = sum(own.parameters for own in shape.layers) if table.weights == "host" else 0
    return (pairs + weights) * shape.itemsize


def _row_order(paper: Paper) -> Iterator[Note]:
    """Whether activations are sent in row order."""
    table = paper.table("Table 3")
    machine, setting = paper.machine(table.machine), table.rows[0].setting
    split = kvpr_split(machine, setting.shape, setting.work)
    whole = kvpr_seconds(machine, setting.shape, setting.work, 0)
    both = kvpr_seconds(machine, setting.shape, setting.work, split)
    sizes = sum(own.hidden for own in setting.shape.layers) * setting.shape.itemsize
    alone = both - setting.batch * split * sizes / machine.beside_compute
    most = max(table.gain(row.baseline, row.kvpr) or 0.0 for row in table.rows)
    yield Note(
        paper.data["row_order"]["source"],
        "in row order the first term of equation 10 is left out. Without that copy of activations the formula would "
        f"save {100 * (1 - alone / whole):.0f} % for {title(setting.model)}, with it "
        f"{100 * (1 - both / whole):.0f} %. Figure 3 sends them, and {table.name} saves at most {most:.1f} %: the "
        "formula here has the term in both orders.",
    )


def _shares(paper: Paper) -> Iterator[Note]:
    """Figure 10: activations h a token against 2 h of keys and values give the split."""
    data = paper.data["shares"]
    ratio = 2 * data["activations_percent"]["KVPR"] / data["cache_percent"]["KVPR"]  # l / (s - l)
    machine = paper.machine("a100")
    splits = []
    for row in paper.data["layers"]["rows"]:
        setting = Setting(row[0], 32, 1, 1024, 32)
        splits.append(kvpr_split(machine, setting.shape, setting.work) / setting.cached)
    yield Note(
        data["source"],
        f"activations are {data['activations_percent']['KVPR']} % of the time and the cache "
        f"{data['cache_percent']['KVPR']} %: a split l/s of {ratio / (1 + ratio):.2f}, where the formula at peak rates "
        f"says {_all(splits, '.2f')} for {listed(title(row[0]) for row in paper.data['layers']['rows'])}.",
    )


def _splits(paper: Paper) -> Iterator[Note]:
    """Figure 12: split points, and of which prompt they could be."""
    data = paper.data["splits"]
    machine, rows = paper.machine(data["machine"]), records(data)
    first, last = rows[0], rows[-1]

    def formula(prompt: int, new: int) -> int:
        setting = Setting(data["model"], data["batch"], 1, prompt + new, 1)
        return kvpr_split(machine, setting.shape, setting.work)

    # The prompts that have this split by the formula: it grows with the prompt.
    splits = functools.partial(formula, new=first["new"])
    low, high = (bisect.bisect_left(range(2**12), first["split"] + more, key=splits) for more in (0, 1))
    verb = "increases" if last["split"] < first["split"] else "is"
    yield Note(
        data["source"],
        f"for a prompt of {data['prompt']} the split is {first['split']} of {data['prompt'] + first['new']} cached "
        f"tokens and {verb} to {last['split']} with {last['new']} new, on an axis of {data['axis'][0]} to "
        f"{data['axis'][1]}. It can't be more than the prompt (equation 11). The formula says "
        f"{formula(data['prompt'], first['new'])} and {formula(data['prompt'], last['new'])}; it says {first['split']} "
        f"for a prompt of {between((str(low), ''), (str(high - 1), ''))}, and for 256 "
        f"{formula(256, first['new'])} and {formula(256, last['new'])}.",
    )


def _small(paper: Paper) -> Iterator[Note]:
    """Table 2: what its numbers are, and its sizes."""
    table = paper.table("Table 2")
    first, last = table.rows[0], table.rows[-1]
    growth = last.data["baseline"] / first.data["baseline"]
    yield Note(
        table.name,
        f"it calls its numbers latencies. From batch {first.setting.batch} to {last.setting.batch} they grow "
        f"{growth:.1f} times, what is sent {_sent(table, last) / _sent(table, first):.1f} times, and KVPR's are the "
        "larger ones: they are read as tokens/s here.",
    )
    prompts = []
    for row in table.rows:
        layer, itemsize = row.setting.shape.layers[0], row.setting.shape.itemsize
        prompts.append(row.setting.batch * row.setting.prompt * layer.width("keys_values") * itemsize / MIB)
    yield Note(
        table.name,
        f"a layer's cache is {_all([row.data['cache_mb'] for row in table.rows])} MB there; a prompt of "
        f"{first.setting.prompt} alone has {_all(prompts)} MiB.",
    )


# --- the predictions --------------------------------------------------------------------------------------------------


def _room(found: Found) -> Iterator[Note]:
    """Caches that would have fitted on the device."""
    if found.table.weights == "device":
        inside = sum(bool(row.predicted.ours) and row.predicted.ours.link_bytes() == 0 for row in found.rows)
        if inside:
            yield Note(
                found.table.name,
                f"{inside} of {len(found.rows)} caches fit beside the weights in the "
                f"{found.profile.device_bytes / 1e9:.0f} GB of the paper's own card: ours keeps them there and sends "
                "nothing.",
            )


def _gains(found: Found) -> Iterator[Note]:
    """The gains of KVPR's schedule, where what is predicted and what is said have nothing in common."""
    for model in found.models:
        said, gains = found.said(model), found.gains(model, "predicted", "kvpr")
        most = max(said, default=found.table.most.get(model))
        if most is not None and (min(gains) > most or max(gains) < min(said, default=0.0)):
            yield Note(
                found.table.name,
                f"KVPR's schedule gains at most {most:.0f} % for {title(model)} there; predicted are {min(gains):.0f} "
                f"to {max(gains):.0f} %.",
            )


def _column(found: Found) -> Iterator[Note]:
    """In column order, recomputing runs under the copies of the next group."""
    if any(row.paper.setting.groups > 1 for row in found.rows):
        splits = []
        for model in found.models:
            best = sorted(f"{row.predicted.split:.2f}" for row in found.of(model))
            formula = found.of(model)[-1].predicted.formula
            ends = between((best[0], ""), (best[-1], ""))
            splits.append(f"{ends} for {title(model)} (formula: {formula:.2f})")
        yield Note(
            found.table.name,
            f"in column order the best split is predicted at {listed(splits)}: the formula adds up each batch's copies "
            "and recomputing, which run under each other across batches.",
        )


def _all(values: Sequence[float], form: str = ".3g") -> str:
    return listed(f"{value:{form}}" for value in values)


def _ends(upper: Sequence[float], lower: Sequence[float]) -> str:
    """From the least to the greatest of the ratios."""
    ratios = [one / other for one, other in zip(upper, lower)]
    ends = [f"{own:.1f}" if own < 10 else f"{own:.0f}" for own in (min(ratios), max(ratios))]
    return " to ".join(dict.fromkeys(ends))
