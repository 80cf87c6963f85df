"""Timelines of traced steps: what is read of a GPU's trace, on traces written by hand; what is said and drawn of it."""

import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripts
import toy
from hypothesis import given
from hypothesis import strategies as st

import kvrecomp
import models
from experiments import trace
from experiments.support.plots import png
from experiments.support.results import predictions
from experiments.support.suite import step_timing
from experiments.support.traces import timeline, xplane
from experiments.support.traces.xplane import OUTSIDE, Span
from kvrecomp.plan.named import named_plan

# A step of two layers as XLA compiles it for a GPU: a copy a layer, a fusion that has a constant of another layer, a
# kernel without a scope, a call without metadata.
PROGRAM = """
%fused_scores.1 (param_0.7: f32[3]) -> f32[3] {
  %param_0.7 = f32[3]{0} parameter(0)
  %constant_4 = f32[] constant(2), metadata={op_name="jit(program)/layer_0/mul"}
  ROOT %multiply.5 = f32[3]{0} multiply(%param_0.7, %constant_4), metadata={op_name="jit(program)/layer_1/mul"}
}

ENTRY %main.9 (blocks_0__0__0: bf16[5,3], blocks_0__1__0: bf16[5,3]) -> f32[3] {
  %blocks_0__0__0 = bf16[5,3]{1,0:S(5)} parameter(0), metadata={op_name="blocks[0][0][0].arrays[0]"}
  %copy-start.4 = (bf16[5,3]{1,0}, bf16[5,3]{1,0:S(5)}, u32[]) copy-start(%blocks_0__0__0)
  %blocks_0__1__0 = bf16[5,3]{1,0:S(5)} parameter(1), metadata={op_name="blocks[0][1][0].arrays[0]"}
  %copy-start.1.0 = (bf16[5,3]{1,0}, bf16[5,3]{1,0:S(5)}, u32[]) copy-start(%blocks_0__1__0)
  %embed_fusion = f32[3]{0} fusion(%tokens), kind=kLoop, metadata={op_name="jit(program)/add"}
  %copy-done.4 = bf16[5,3]{1,0} copy-done(%copy-start.4)
  %barrier.30 = (f32[3]{0}, bf16[5,3]{1,0}) tuple(%embed_fusion, %copy-done.4),
METADATA={op_name="jit(program)/layer_0/optimization_barrier"}
  %gemm.2 = f32[3]{0} custom-call(%barrier.30), metadata={op_name="jit(program)/layer_0/bkgh,sbh->bkgs/dot_general"}
  %copy-done.1.0 = bf16[5,3]{1,0} copy-done(%copy-start.1.0)
  %scores.1 = f32[3]{0} fusion(%gemm.2, %copy-done.1.0), calls=%fused_scores.1,
METADATA={op_name="jit(program)/layer_1/mul"}
  ROOT %unembed.6 = f32[3]{0} custom-call(%scores.1, %copy-done.4), metadata={op_name="jit(program)/dot_general"}
}
""".replace(",\nMETADATA", ", metadata")  # a line each
LAYERS = {"copy-start.4": 0, "copy-start.1.0": 1, "gemm.2": 0, "scores.1": 1, "multiply.5": 1}
LAYERS |= {"embed_fusion": OUTSIDE, "unembed.6": OUTSIDE}


# --- which layer ------------------------------------------------------------------------------------------------------


def test_layers_of_kernels_are_their_scopes_and_of_copies_their_first_use():
    found = xplane.layers_of(PROGRAM)
    assert {name: found[name] for name in LAYERS} == LAYERS
    assert "command_buffer_3" not in found


# --- reading ----------------------------------------------------------------------------------------------------------


def recorded(planes: dict[str, dict[str, list[tuple]]]) -> SimpleNamespace:
    """Planes of lines of events (name, start and length in ns, the instruction), with the names of `ProfileData`."""

    def event(name, start, length, instruction=None):
        stats = {"correlation_id": start, "name": "add"} | ({"hlo_op": instruction} if instruction else {})
        return SimpleNamespace(name=name, start_ns=start, duration_ns=length, stats=stats.items())

    return SimpleNamespace(
        planes=[
            SimpleNamespace(
                name=plane,
                lines=[
                    SimpleNamespace(name=line, events=[event(*one) for one in events]) for line, events in lines.items()
                ],
            )
            for plane, lines in planes.items()
        ]
    )


def test_spans_of_a_gpu():
    host = {"python": [("$runtime.py:227 step", 7000, 90000)]}
    gpu = {
        "Stream #13(Compute,Memset)": [
            ("loop_add_fusion_4", 8000, 500, "embed_fusion"),
            ("Memset", 8600, 20),
            ("void cutlass::Kernel2<128x64>(Params)", 12500, 300, "gemm.2"),
            ("gemm_fusion_dot_5", 16000, 250, "command_buffer_3"),
            ("MemoryAlloc", 16300, 9000),
        ],
        "Stream #14(MemcpyH2D)": [
            ("MemcpyH2D", 9000, 3000, "copy-start.4"),
            ("MemcpyH2D", 12000, 3500, "copy-start.1.0"),
        ],
        "Stream #15(MemcpyD2H)": [("MemcpyD2H", 17000, 100, "copy-start.9")],
        "Stream #16(MemcpyD2D)": [("MemcpyD2D", 17200, 40, "copy.2")],
        "CUPTI overhead": [("BUFFER_FLUSH", 10000, 5000)],
        "XLA Ops": [("gemm.2", 12500, 300)],
        "_counters_": [("power_mw", 9000, 0)],
    }
    other = {"Stream #13(Compute)": [("loop_add_fusion", 8000, 99, "embed_fusion")]}
    spans = xplane.read_spans(recorded({"/host:CPU": host, "/device:GPU:0": gpu, "/device:GPU:1": other}), LAYERS)
    found = [(span.kind, span.name, span.start, span.seconds, span.layer) for span in spans]
    assert found == [
        ("compute", "embed_fusion", 0, pytest.approx(500e-9), OUTSIDE),
        ("compute", "Memset", pytest.approx(600e-9), pytest.approx(20e-9), None),
        ("to_device", "copy-start.4", pytest.approx(1000e-9), pytest.approx(3000e-9), 0),
        ("to_device", "copy-start.1.0", pytest.approx(4000e-9), pytest.approx(3500e-9), 1),
        ("compute", "gemm.2", pytest.approx(4500e-9), pytest.approx(300e-9), 0),
        ("compute", "command_buffer_3", pytest.approx(8000e-9), pytest.approx(250e-9), None),
        ("to_host", "copy-start.9", pytest.approx(9000e-9), pytest.approx(100e-9), None),
        ("compute", "copy.2", pytest.approx(9200e-9), pytest.approx(40e-9), None),
    ]


@pytest.mark.parametrize(
    ("planes", "message"),
    [
        ({}, "no plane /device:GPU:0, only none: trace a step on a GPU"),
        ({"/host:CPU": {}, "/device:TPU:0": {}}, "no plane /device:GPU:0, only /host:CPU, /device:TPU:0: trace"),
        ({"/device:GPU:0": {}}, "nothing ran on /device:GPU:0"),
        ({"/device:GPU:0": {"XLA Ops": [("gemm.2", 12500, 300)]}}, "nothing ran on /device:GPU:0"),
    ],
)
def test_traces_without_a_gpu(planes, message):
    with pytest.raises(ValueError, match=message):
        xplane.read_spans(recorded(planes), LAYERS)


# --- the step ---------------------------------------------------------------------------------------------------------


def spans(*rows: tuple) -> list[Span]:
    """From kind's initial, name, start, seconds, and a layer."""
    kinds = {"d": "to_device", "h": "to_host", "c": "compute"}
    return [Span(kinds[kind], name, start, seconds, *layer or (None,)) for kind, name, start, seconds, *layer in rows]


BEGINS_LATE = [("c", "a", 0, 1), ("d", "x", 1, 5), ("c", "b", 2, 1), ("c", "b", 4, 1), ("c", "end", 6, 2)]
BEGINS_LATE += [("c", "a", 11, 1), ("d", "x", 12, 6), ("c", "b", 13, 1), ("c", "b", 15, 1), ("c", "end", 18, 2)]
BEGINS_LATE += [("c", "between", 9, 0.5), ("h", "after", 25, 3)]  # not part of every step
CUT = [("c", "a", 0, 4), ("d", "x", 4, 2), ("c", "a", 5, 4), ("c", "y", 5, 0.5), ("d", "x", 9, 3)]
ANY_ORDER = [("c", "a", 0, 2), ("d", "x", 0, 3), ("c", "b", 2, 2), ("d", "x", 4, 1)]
ANY_ORDER += [("c", "b", 5, 2), ("d", "x", 6, 3), ("c", "a", 7, 2), ("d", "x", 9, 1)]


@pytest.mark.parametrize(
    ("two_steps", "seconds", "last"),
    [
        (BEGINS_LATE, 12, [("a", 3, 1), ("x", 4, 6), ("b", 5, 1), ("b", 7, 1), ("end", 10, 2)]),
        (CUT, 6, [("a", 0, 3), ("x", 3, 3)]),
        (ANY_ORDER, 5, [("b", 0, 2), ("x", 1, 3), ("a", 2, 2), ("x", 4, 1)]),
    ],
)
def test_the_last_step(two_steps, seconds, last):
    """It begins where the one before ends: what began under that is cut. Copies that it begins with come in any
    order."""
    found, took = xplane.last_step(spans(*two_steps), steps=2)
    assert took == seconds and [(span.name, span.start, span.seconds) for span in found] == last


def test_steps_that_cannot_be_told_apart():
    with pytest.raises(ValueError, match="nothing in the trace ran 2 times"):
        xplane.last_step(spans(("c", "a", 0, 1), ("c", "a", 1, 1), ("c", "a", 2, 1), ("d", "x", 3, 1)), steps=2)


# --- shares -----------------------------------------------------------------------------------------------------------

some_spans = st.lists(
    st.builds(
        Span,
        kind=st.sampled_from(xplane.KINDS),
        name=st.just(""),
        start=st.integers(0, 30),
        seconds=st.integers(0, 9),
        layer=st.sampled_from([None, OUTSIDE]),
    ),
    max_size=20,
)


def instants(found: list[Span], **like) -> set[int]:
    """The units of time in which one of them runs."""
    chosen = [span for span in found if all(getattr(span, key) == value for key, value in like.items())]
    return {at for span in chosen for at in range(int(span.start), int(span.end))}


@given(some_spans)
def test_busy_seconds_are_the_instants_in_which_something_runs(found):
    assert xplane.busy_seconds(found, "compute") == len(instants(found, kind="compute"))
    both = instants(found, kind="to_device") | instants(found, kind="to_host")
    assert xplane.busy_seconds(found, "to_device", "to_host") == len(both)


@given(some_spans, st.integers(0, 5))
def test_merging_closes_short_gaps_and_nothing_else(found, gap):
    merged = xplane.merged(found, gap)
    assert [span.start for span in merged] == sorted(span.start for span in merged)
    for kind in xplane.KINDS:
        for layer in (None, OUTSIDE):
            alike = [span for span in merged if (span.kind, span.layer) == (kind, layer)]
            assert all(later.start - earlier.end > gap for earlier, later in itertools.pairwise(alike))
            before, after = instants(found, kind=kind, layer=layer), instants(alike)
            edges = [at for span in found if (span.kind, span.layer) == (kind, layer) for at in (span.start, span.end)]
            near = [(end, start) for end, start in itertools.product(edges, edges) if 0 < start - end <= gap]
            assert before <= after <= before.union(*(range(*gap) for gap in near))


def test_the_share_of_which_no_layer_is_known():
    """Of compute: copies say their layer always, and take most of the time."""
    found = spans(("c", "a", 0, 3), ("c", "b", 0, 4, 2), ("c", "c", 5, 5, OUTSIDE), ("d", "x", 0, 80, 1))
    assert xplane.unknown_share(found) == 3 / 12
    assert xplane.unknown_share(found[3:]) == 0


def test_what_is_kept_of_a_step():
    """Two copies of 40 ms and one back of 10 under it, 5 ms of kernels: in a step of 100 ms."""
    plan = named_plan("activations", toy.model().shape, kvrecomp.Workload(2, 5, 3))
    found = spans(
        ("c", "a", 0.0, 0.002, 0), ("c", "b", 0.00205, 0.00295, 0), ("d", "x", 0.01, 0.04, 0),
        ("d", "y", 0.05, 0.04, 1), ("h", "z", 0.085, 0.01, None), ("c", "u", 0.07, 0.001),
    )  # fmt: skip
    row = trace.timeline_of(plan, 0.096, found, 0.1)
    assert (row["model"], row["batch"], row["prompt"], row["new"], row["plan"]) == ("toy", 2, 5, 3, "activations")
    assert (row["median_ms"], row["traced_ms"], row["link_bytes"]) == (96, 100, 5 * 2 * 21 * 4 * 2)
    assert row["link_busy"] == pytest.approx(0.85) and row["gpu_busy"] == pytest.approx(0.0595)
    assert row["unknown"] == pytest.approx(0.001 / (0.005 - 0.00005 + 0.001))
    assert row["spans"] == [
        ["compute", 0, 0, 5], ["to_device", 0, 10, 40], ["to_device", 1, 50, 40], ["compute", None, 70, 1],
        ["to_host", None, 85, 10],
    ]  # fmt: skip


# --- tracing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoder(monkeypatch):
    monkeypatch.setattr(step_timing, "STEPS", 4)
    return toy.named_decoder("keys_values", batch=2, prompt=5, new=step_timing.NEW, tail=step_timing.NEW)


def test_a_step_on_a_cpu_is_recorded_and_refused(decoder):
    with pytest.raises(ValueError, match=r"no plane /device:GPU:0, only .*/host:CPU.*: trace a step on a GPU"):
        trace.traced(decoder)


def test_a_step_is_timed_and_traced(decoder, monkeypatch):
    """What a GPU would have recorded is made up of the program's own instructions, each run once a step."""

    def made_up(profile, layers):
        (host,) = (plane for plane in profile.planes if plane.name == "/host:CPU")
        events = [event for line in host.lines for event in line.events if event.duration_ns >= 0 <= event.start_ns]
        instructions = [dict(event.stats).get("hlo_op") for event in events]
        assert max(map(instructions.count, layers)) == trace.STEPS
        names = [name for name in layers if "fusion" in name]
        assert {layers[name] for name in names} >= {0, 1} and {*layers.values()} == {OUTSIDE, 0, 1}
        return [
            Span("compute", name, 100.0 * step + number, 0.5, layers[name])
            for step in range(trace.STEPS)
            for number, name in enumerate(names)
        ]

    monkeypatch.setattr(xplane, "read_spans", made_up)
    row = trace.measure(toy.model(), decoder.plan, kvrecomp.Budget())
    assert row["link_bytes"] == 2 * 5 * 2 * 21 * 4 * 2 and row["link_busy"] == 0
    assert row["median_ms"] > 0 and 0 < row["gpu_busy"] <= 0.5 and row["unknown"] == 0
    assert {layer for _, layer, _, _ in row["spans"]} >= {0, 1}


def test_every_plan_that_is_asked_for_is_traced(monkeypatch, known_machine):
    """`auto` too, with this machine's profile, and with room in the tail for all steps."""
    gpu = SimpleNamespace(devices=lambda: [SimpleNamespace(platform="gpu")])
    monkeypatch.setattr(trace, "jax", gpu)
    monkeypatch.setitem(models.PRESETS, "toy", toy.OPT)
    monkeypatch.setattr(kvrecomp, "profile", lambda model, batch: known_machine)
    monkeypatch.setattr(trace, "measure", lambda model, plan, budget: plan)
    words = ("--model=toy", "--batch=2", "--prompt=5", "--plans=auto,split:0.5", "--dtype=float32")
    plans = trace.run(scripts.read_flags(trace, *words))
    assert [plan.name for plan in plans] == ["auto", "split:0.5"]
    assert {(plan.workload.batch, plan.workload.prompt, plan.tail) for plan in plans} == {(2, 5, step_timing.NEW)}
    with pytest.raises(kvrecomp.PlanError, match="there is no plan 'splits'"):
        trace.run(scripts.read_flags(trace, "--model=toy", "--plans=splits"))


# --- the picture ------------------------------------------------------------------------------------------------------

SPANS = [
    ("compute", -1, 0.0, 0.5),
    ("to_device", 0, 0.5, 40.0),
    ("to_device", 1, 40.5, 39.5),
    ("compute", 0, 41.0, 1.0),
]
STEP = ("opt-6.7b", 32, 1024, 32, "activations", 98.0, 100.0, 5_000_000, 0.795, 0.065, 0.05, SPANS)
ROW = dict(zip(timeline.FIELDS, STEP, strict=True))
SLOWER = ROW | {"plan": "keys_values", "traced_ms": 200.0, "spans": [*SPANS, ("compute", None, 90.0, 5.0)]}


@pytest.mark.parametrize(
    "wrong",
    [{"link_busy": None}, {"unknown": "x"}, {"spans": 5}, {"spans": [5]}, {"spans": [["up", 0, 1.0, 2.0]]}]
    + [{"spans": [["compute", *rest]]} for rest in ([0, 1.0], ["x", 1.0, 2.0], [0, None, 2.0])],
)
def test_rows_that_cannot_be_drawn_are_said(wrong):
    row = json.loads(json.dumps(SLOWER)) | {"file": "a.json"}
    assert len(timeline.timelines([row])) == 1
    with pytest.raises(ValueError, match=rf"^a\.json: {next(iter(wrong))}"):
        timeline.timelines([row | wrong])


def write(path: Path, *rows: dict) -> Path:
    path.write_text(json.dumps({"device": "Some GPU", "rows": rows}))
    return path


def test_every_span_is_drawn_on_one_time_axis(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(png, "save", lambda figure, path, source: figures.append(figure))
    timeline.draw([SLOWER, ROW], tmp_path / "a.png")
    panels = figures[0].axes
    assert [panel.get_xlim() for panel in panels] == [pytest.approx((0, 201))] * 2
    for panel, row in zip(panels, (SLOWER, ROW), strict=True):
        lanes = [label.get_text() for label in panel.get_yticklabels()]
        assert lanes == ["host to device", "compute"]
        drawn = [(path.get_extents(), bars) for bars in panel.collections for path in bars.get_paths()]
        boxes = {(round(box.x0, 6), round(box.width, 6), round(box.y0 + box.height / 2)) for box, _ in drawn}
        assert boxes >= {
            (start, length, ["to_device", "compute"].index(kind)) for kind, _, start, length in row["spans"]
        }
        assert [text.get_text() for text in panel.texts] == ["0", "1"]
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["even layers", "odd layers", "outside of the layers", "layer not known"]


# --- the command ------------------------------------------------------------------------------------------------------


command = functools.partial(scripts.call, trace)


def test_a_picture_is_drawn_again_from_its_file(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(trace, "run", lambda given: [ROW, SLOWER])
    first, second, kept = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "a.json"
    command(f"--plot={first}", f"--out={kept}")
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1])["rows"] == json.loads(kept.read_text())["rows"]
    monkeypatch.setattr(trace, "run", None)
    command(f"--from={kept}", f"--plot={second}")
    again = capsys.readouterr().out
    assert again.replace(str(second), str(first)) == said[: len(again)] and "keys_values" in again
    assert f"drawn to {second}" in again
    assert first.read_bytes() == second.read_bytes()
    assert predictions.digest([ROW, SLOWER]).encode() in first.read_bytes()


def test_unknown_layers_are_said(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    kept = write(tmp_path / "a.json", ROW, SLOWER | {"unknown": 0.25})
    command(f"--from={kept}", f"--plot={tmp_path}/a.png")
    said = capsys.readouterr().out
    assert said.count("no layer is known") == 1
    assert "keys_values: no layer is known of 25% of the compute" in said and "--xla_gpu_enable_command_buffer=" in said
