"""The picture of `what_if`: predicted step time against the split, one curve per schedule."""

from collections.abc import Sequence
from pathlib import Path

from experiments.support.plots import png
from experiments.support.results.tables import Row
from experiments.support.what_if import CURVES, FRACTIONS, WhatIf, sent_fraction

from kvrecomp.plan import format_bytes
from kvrecomp.predict.datasheets import DATASHEETS


def draw_split(found: WhatIf, path: str | Path, measured: Sequence[Row] = ()) -> None:
    """Writes a PNG: predicted milliseconds a step against the split, one curve per schedule, and what was measured.

    Raises as `png.check_path`.
    """
    png.check_path(path)
    plan = found.chosen.plan
    absorbed = "absorbed" if all(layer.absorbs_keys for layer in plan.shape.layers) else "V absorbed, K recomputed"
    # Colours of different lightness (Okabe and Ito's), lines and markers: any one of them tells the curves apart. What
    # is drawn later is thinner, so that what is equal shows through.
    styles = {
        "absorb": (f"pipelined, {absorbed}", "#0072b2", "-", 4.0, "o", 13),
        "recompute": ("pipelined, K and V recomputed", "#e69f00", "-.", 2.5, "s", 10),
        "kvpr": ("KVPR's schedule", "#8c2d04", (0, (5, 1.5)), 1.8, "^", 8),
        "kvpr_formula": ("KVPR's formula, attention alone", "#606060", "--", 1.2, "D", 6),
    }
    sheet = " by its data sheet" if found.profile.source in {sheet.source for sheet in DATASHEETS.values()} else ""
    machine = f"{found.profile.device}{sheet}, {format_bytes(found.budget.device or 0)} of device memory"
    title = f"Predicted step: {plan.shape.name}, {plan.workload}\n{machine}"
    figure = png.figure()
    axes = png.grid(figure, title, "split: fraction of the prompt's tokens sent as activations", "step time (ms)")
    for name in CURVES:
        label, colour, line, width, marker, size = styles[name]
        times = [1e3 * seconds for seconds in found.curves[name]]
        least = min(range(len(times)), key=times.__getitem__)
        label = f"{label}: {_short(times[least])} ms at {FRACTIONS[least]:.2f}"
        marked = {"marker": marker, "markevery": [least], "markersize": size, "markeredgecolor": "white"}
        style = {"color": colour, "linestyle": line, "linewidth": width, **marked}
        axes.plot(FRACTIONS, times, label=label, clip_on=False, zorder=3, **style)
    chosen = 1e3 * found.chosen.seconds
    label = f"chosen plan: {_short(chosen)} ms"
    axes.axhline(chosen, color="black", linestyle=":", linewidth=2, zorder=2, label=label)
    placed = [(sent_fraction(row["plan"]), row["median_ms"]) for row in measured]
    crosses = [(fraction, time) for fraction, time in placed if fraction is not None]
    if crosses:
        label = f"measured on {measured[0]['device']}"
        axes.plot(*zip(*crosses), "x", color="black", ms=9, mew=2, clip_on=False, zorder=4, label=label)
    axes.set_xlim(-0.015, 1.015)
    axes.set_ylim(bottom=0)
    figure.legend(ncols=2, handlelength=3.6, columnspacing=1, **png.LEGEND)
    png.save(figure, path)


def _short(milliseconds: float) -> str:
    """Three digits, and never a power of ten."""
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"
