"""Step times against cached tokens, as points, in a sentence and as a picture, from rows that were made up."""

import pytest

from experiments.support.plots import curves, png
from experiments.support.results import predictions

ROW = {"device": "Some GPU", "model": "opt-6.7b", "batch": 32, "new": 32, "room": None}
ROW |= {"weights": None, "groups": None, "order": None}  # as peers' rows have it
TIMES = {  # by plan, of 1024 and 128 cached tokens
    "device": (9.0, 8.0),
    "activations": (155.0, 20.0),
    "kvpr:0.75": (215.0, 30.0),
    "keys_values": (310.0, 40.0),
    "huggingface": (50.0, 45.0),
    "huggingface_offloaded": (500.0, 60.0),
}


def rows():
    """As a file has them, and what the scheduler chose for one workload."""
    found = [
        ROW | {"plan": plan, "prompt": prompt, "median_ms": time}
        for plan, times in TIMES.items()
        for prompt, time in zip((1024, 128), times, strict=True)
    ]
    ours = {"weights": "device", "groups": 1, "order": "row"}
    return [*found, ROW | ours | {"plan": "auto", "room": 50.0, "prompt": 1024, "median_ms": 78.0}]


def test_lines_are_in_the_order_of_their_ends():
    lines = curves.lines(curves.points(rows()))
    assert [line[0].line for line in lines] == [
        "huggingface_offloaded (its cache in host memory)",
        "keys_values",
        "kvpr:0.75 (KVPR's schedule)",
        "activations",
        "auto, room for 50 %",
        "huggingface (its cache on the GPU)",
        "device (all on the GPU)",
    ]
    assert [(point.cached, point.median_ms) for point in lines[1]] == [(128, 40.0), (1024, 310.0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "opt-13b"}, "the rows have model opt-13b and opt-6.7b; expected one of them: add model="),
        ({"batch": 8}, "have batch 32 and 8"),
        ({"device": "Another GPU"}, "have device Another GPU and Some GPU"),
        ({"new": 128}, "have new 128 and 32"),
        ({"weights": "host", "prompt": 256}, "have weights device and host"),
        ({"groups": 8, "prompt": 256}, "have groups 1 and 8"),
        ({}, "two rows are of auto, room for 50 % with 1024 cached tokens: leave one out"),
    ],
)
def test_rows_that_are_not_of_one_picture(change, message):
    with pytest.raises(ValueError, match=message):
        curves.points([*rows(), rows()[-1] | change])
    with pytest.raises(ValueError, match="there is no row to draw"):
        curves.points([])


def test_every_row_is_a_point(monkeypatch):
    pytest.importorskip("matplotlib")
    kept = []
    monkeypatch.setattr(png, "save", lambda figure, path, source: kept.append((figure, source)))
    points = curves.points(rows())
    curves.draw_curves(points, "unwritten.png")
    ((figure, source),) = kept
    assert source == predictions.digest(points)
    (axes,) = figure.axes
    drawn = {line.get_label(): [tuple(map(float, pair)) for pair in zip(*line.get_data())] for line in axes.get_lines()}
    assert sorted(pair for line in drawn.values() for pair in line) == sorted(
        (row["prompt"], row["median_ms"]) for row in rows()
    )
    assert drawn["keys_values"] == [(128, 40.0), (1024, 310.0)]
    markers = [line.get_marker() for line in axes.get_lines()]
    assert len(set(markers)) == len(markers) == 7
    styles = {line.get_label().split()[0]: line.get_linestyle() for line in axes.get_lines()}
    assert (styles["activations"], styles["device"], styles["huggingface"], styles["auto,"]) == ("-", "--", ":", "None")
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlabel() == "cached tokens of a row, before 32 new ones" and "(ms)" in axes.get_ylabel()
    assert [label.get_text() for label in figure.legends[0].get_texts()] == list(drawn)
