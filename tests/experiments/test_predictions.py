"""What is said and drawn of predictions and choices, against numbers worked out by hand."""

import dataclasses
import struct

import pytest

from experiments.support.plots import png
from experiments.support.results import predictions
from experiments.support.results.predictions import Measured

ROW = Measured("opt-6.7b", 8, 512, 32, "activations", None, 100.0, 104.0, 7)
OFF = [4.0, -4.5, 11.0, -9.0]  # per cent


def rows_off() -> list[Measured]:
    """Four predictions that are off by OFF, of plans of different kinds."""
    plans = ("activations", "split:0.25", "split:0.5", "keys_values here, activations there")
    return [
        dataclasses.replace(ROW, plan=plan, median_ms=100.0 + index, predicted_ms=(100 + index) * (1 + off / 100))
        for index, (plan, off) in enumerate(zip(plans, OFF))
    ]


def rows_chosen() -> list[Measured]:
    """In two workloads and two rooms: as fast as the best by hand, 4 and 20 % slower, and without a rival."""
    auto = dataclasses.replace(ROW, plan="auto", chosen=True, room=0.0)
    split = dataclasses.replace(ROW, plan="split:0.5", room=0.0)
    long = {"prompt": 1024, "room": 50.0}
    return [
        auto,
        dataclasses.replace(ROW, room=0.0),  # the same program, measured once
        dataclasses.replace(split, median_ms=150.0),
        dataclasses.replace(auto, room=50.0, median_ms=52.0),
        dataclasses.replace(split, room=50.0, median_ms=50.0),
        dataclasses.replace(split, room=50.0, median_ms=150.0),  # as in the other room
        dataclasses.replace(auto, **long, median_ms=240.0),
        dataclasses.replace(split, **long, median_ms=200.0),
        dataclasses.replace(auto, prompt=2048),
    ]


def drawn(monkeypatch, tmp_path, draw, rows):
    """The figure, and the points of each line by label, of a picture that says in its file what it shows."""
    pytest.importorskip("matplotlib")
    figures, path, save = [], tmp_path / "picture.png", png.save
    monkeypatch.setattr(png, "save", lambda figure, *rest: figures.append(figure) or save(figure, *rest))
    draw(rows, path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and 800 <= struct.unpack(">I", data[16:20])[0] <= 1600
    assert predictions.digest(rows).encode() in data
    assert predictions.digest([*rows[:-1], dataclasses.replace(rows[-1], median_ms=1.0)]).encode() not in data
    (figure,) = figures
    (axes,) = figure.axes
    return figure, axes, {line.get_label(): line for line in axes.get_lines() if line.get_marker() != "None"}


def test_how_far_off():
    rows = rows_off()
    assert [100 * row.off for row in rows] == pytest.approx(OFF)
    assert predictions.accuracy(rows) == "2 of 4 predictions are within 5 %, 3 within 10 % (9 % short to 11 % over)"
    assert predictions.accuracy(rows[:1]) == "1 of 1 predictions are within 5 %, 1 within 10 % (4 % over)"
    with pytest.raises(ValueError, match="there is no prediction"):
        predictions.accuracy([])


def test_amounts_with_one_unit_say_it_once():
    assert predictions.between(("15", "% short"), ("4", "% short")) == "4 to 15 % short"
    assert predictions.between(("9.7", "ms"), ("10.7", "s")) == "9.7 ms to 10.7 s"
    assert predictions.between(("24", ""), ("32", "")) == "24 to 32"
    assert predictions.between(("9.7", "ms"), ("9.7", "ms")) == "9.7 ms"


def test_a_measurement_counts_once():
    """The chosen plan was also made by hand, and a plan fits two rooms."""
    names, times = zip(*((row.plan, row.median_ms) for row in predictions.distinct(rows_chosen())))
    assert names == ("activations", *["split:0.5"] * 3, *["auto"] * 3)
    assert times == (100.0, 150.0, 50.0, 200.0, 52.0, 240.0, 100.0)


def test_choices_against_the_best_by_hand():
    found = predictions.choices(rows_chosen())
    ratios = [(choice.ratio, choice.best.plan, choice.rivals) for choice in found]
    assert ratios == [(1.0, "activations", 2), (1.04, "split:0.5", 2), (1.2, "split:0.5", 1)]
    assert predictions.regret(rows_chosen()) == (
        "1 of 3 choices take at most 3 % longer than the best of 1 to 2 plans by hand, 2 at most 5 %; the worst takes "
        "1.20 times as long (OPT-6.7B, batch 8, 1024 cached, room for 50 %)"
    )
    with pytest.raises(ValueError, match="no plan was chosen"):
        predictions.regret([ROW])


def test_models_have_the_names_of_their_authors():
    for title in ("OPT-6.7B", "OPT-125M", "Llama-3.1-8B", "Qwen2.5-0.5B", "Phi-3-mini"):
        assert predictions.title(title.lower()) == title
    assert predictions.title("SmolLM2-135M-Instruct") == "SmolLM2-135M-Instruct"


def test_every_prediction_is_a_point(monkeypatch, tmp_path):
    rows = rows_off()
    figure, axes, lines = drawn(monkeypatch, tmp_path, predictions.draw_predictions, [*rows, rows[0]])
    assert list(lines) == ["activations", "split", "keys_values here, activations there"]
    points = sorted((x, y) for line in lines.values() for x, y in zip(*line.get_data()))
    assert [x for x, _ in points] == [100.0, 101.0, 102.0, 103.0]
    assert [y for _, y in points] == pytest.approx(OFF)
    assert len({line.get_marker() for line in lines.values()}) == 3
    assert axes.get_xscale() == "log" and "(ms)" in axes.get_xlabel() and "(%)" in axes.get_ylabel()
    assert figure.get_suptitle().startswith("Predicted steps: OPT-6.7B, batch 8\n2 of 4 predictions")


def test_every_choice_is_a_point(monkeypatch, tmp_path):
    figure, axes, lines = drawn(monkeypatch, tmp_path, predictions.draw_choices, rows_chosen())
    xs = {label: list(line.get_xdata()) for label, line in lines.items()}
    assert xs == {"room for 0 %": [0.0], "room for 50 %": pytest.approx([4.0, 20.0])}
    assert [round(y) for line in lines.values() for y in line.get_ydata()] == [0, 0, 1]
    named = [label.get_text() for label in axes.get_yticklabels()]
    assert named == ["OPT-6.7B, batch 8, 512 cached", "OPT-6.7B, batch 8, 1024 cached"]
    assert "1 of 3 choices" in figure.get_suptitle() and "(%)" in axes.get_xlabel()
