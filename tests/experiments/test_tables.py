"""Results as Markdown, against text written by hand."""

import json
import math

import pytest

from experiments.support.results import tables

FACTS = {"device": "Some GPU", "driver": "5.6", "jax": "0.1", "commit": 5 * "01234567", "copy_gbps": 50.04}
FACTS |= {"command": "python experiments/benchmark.py --plans='a b'"}
ROW = {"model": "opt-6.7b", "batch": 32, "prompt": 1024, "new": 32, "plan": "keys_values"}
ROW |= {"weights": "device", "groups": 1, "order": "row", "median_ms": 200.0, "predicted_ms": 192.0}
ROW |= {"link_bytes": 10_000_000_000, "link_efficiency": 0.9996}
FAST = ROW | {"plan": "activations", "median_ms": 100.04, "predicted_ms": 103.0, "link_bytes": 5_000_000_000}
DEVICE = ROW | {"plan": "device", "median_ms": 9.0, "predicted_ms": None, "link_bytes": 0, "link_efficiency": None}
UNKNOWN = ("predicted_ms", "link_bytes", "link_efficiency", "weights", "groups", "order")  # of peers
PEER = ROW | dict.fromkeys(UNKNOWN) | {"plan": "huggingface_offloaded", "median_ms": 400.0}
STEP = {"model": "opt-13b", "batch": 8, "prompt": 512, "new": 32, "plan": "kvpr:0.75", "room": None}
STEP |= {"median_ms": 20.0, "predicted_ms": 17.0, "link_bytes": 1, "chosen": False}


@pytest.fixture
def read(tmp_path):
    """Rows after they were in a file; keyword arguments are facts of the file."""

    def through_a_file(*rows, name="a.json", **facts):
        (tmp_path / name).write_text(json.dumps(FACTS | facts | {"rows": rows}))
        return tables.read_file(tmp_path / name)

    return through_a_file


def test_a_table_of_the_benchmark(read):
    """By workload, slowest first; bold is what is fastest of those that send something, a peer's included.

    What the device may hold is another workload; a peer whose cache is on the GPU sends nothing.
    """
    chosen = ROW | {"plan": "auto", "room": 50.0, "median_ms": 50.0}
    on_gpu = PEER | {"plan": "huggingface", "link_bytes": 0, "median_ms": 7.0}
    other = ROW | {"model": "llama-2-7b"}
    assert tables.benchmark(read(chosen, DEVICE, FAST, other, ROW, PEER, on_gpu)) == (
        "| model | batch | prompt | room % | plan | ms a step | GB over the link | efficiency |\n"
        "|---|---|---|---|---|---|---|---|\n"
        "| OPT-6.7B | 32 | 1024 | 50 | `auto` | 50.0 | 10.00 | 1.000 |\n"
        "| OPT-6.7B | 32 | 1024 | - | `huggingface_offloaded` (its cache in host memory) | 400.0 | - | - |\n"
        "| OPT-6.7B | 32 | 1024 | - | `keys_values` | 200.0 | 10.00 | 1.000 |\n"
        "| OPT-6.7B | 32 | 1024 | - | `activations` | **100.0** | 5.00 | 1.000 |\n"
        "| OPT-6.7B | 32 | 1024 | - | `device` (all on the GPU) | 9.0 | - | - |\n"
        "| OPT-6.7B | 32 | 1024 | - | `huggingface` (its cache on the GPU) | 7.0 | - | - |\n"
        "| Llama-2-7B | 32 | 1024 | - | `keys_values` | 200.0 | 10.00 | 1.000 |"
    )
    assert "**50.0**" in tables.benchmark(read(FAST, PEER | {"median_ms": 50.0}))
    assert "| `device` (all on the CPU) | 9.0 |" in tables.benchmark(read(DEVICE, device="cpu"))


def test_columns_of_what_is_not_as_usual(read):
    rows = read(ROW, FAST | {"weights": "host", "groups": 4, "order": "column", "new": 24}, PEER)
    assert tables.benchmark(rows) == (
        "| model | batch | prompt | new | weights | groups | order "
        "| plan | ms a step | GB over the link | efficiency |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|\n"
        "| OPT-6.7B | 32 | 1024 | 32 | - | - | - | `huggingface_offloaded` (its cache in host memory) "
        "| 400.0 | - | - |\n"
        "| OPT-6.7B | 32 | 1024 | 32 | device | 1 | row | `keys_values` | **200.0** | 10.00 | 1.000 |\n"
        "| OPT-6.7B | 32 | 1024 | 24 | host | 4 | column | `activations` | 100.0 | 5.00 | 1.000 |"
    )


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("median_ms", "9.0 to 200.0 ms"),
        ("predicted_ms", "103.0 to 192.0 ms"),
        ("off", "4 % short to 3 % over"),
        ("link_bytes", "0.0 to 10.0 GB"),
        ("link_efficiency", "1.000"),
        ("copy_gbps", "50.0 GB/s"),
        ("new", "32"),
        ("plan", "`device`, `activations` and `keys_values`"),
        ("commit", "`0123456`"),
        ("device", "Some GPU"),
        ("worst_ms", "10.7 s"),
        ("tokens_per_second", "3306.4"),
    ],
)
def test_a_field_in_text(read, field, text):
    assert tables.span(field, read(DEVICE | {"worst_ms": 10696.3, "tokens_per_second": 3306.41}, FAST, ROW)) == text


def test_a_field_that_nothing_is_known_of(read):
    with pytest.raises(ValueError, match=r"no row of a\.json says off"):
        tables.span("off", read(DEVICE, PEER))


def test_where_rows_come_from(read):
    first, second = read(ROW), read(ROW, FAST, name="b.json", copy_gbps=51.0)
    third = read(ROW, name="c.json", commit="unknown", copy_gbps=52.0)
    assert tables.machine([*first, *second, *third]) == (
        "Some GPU, driver 5.6, jax 0.1. Copies of whole blocks alone ran at 50.0 to 52.0 GB/s. Measured by "
        "`experiments/benchmark.py` (`a.json` at `0123456`; `b.json` at `0123456`; `c.json` at `unknown`)."
    )
    sweep = read(STEP, copy_gbps=None, command="python experiments/sweep.py", driver="5.7")
    assert tables.machine([*sweep, *second]) == (
        "Some GPU, driver 5.7 and 5.6, jax 0.1. Copies of whole blocks alone ran at 51.0 GB/s. Measured by "
        "`experiments/sweep.py` (`a.json` at `0123456`) and `experiments/benchmark.py` (`b.json` at `0123456`)."
    )
    assert "Copies" not in tables.machine(sweep)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"rows": [5]}', '{"rows": [{}]}', "[" * 99_999])
def test_what_is_no_results_file_is_said(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is not a results file"):
        tables.read_file(tmp_path / "a.json")


@pytest.mark.parametrize("field", ["model", "batch", "plan", "median_ms", "predicted_ms", "link_bytes", "driver"])
@pytest.mark.parametrize("value", [math.nan, math.inf, [1], {}])
def test_rows_of_which_a_field_is_none_are_said(read, field, value):
    """Nobody's measurement; rows that do not say what those of some scripts say are read."""
    with pytest.raises(ValueError, match=r"a\.json is not a results file"):
        read(ROW | {field: value})
    unsaid = {name: ROW[name] for name in ("model", "batch", "prompt", "new", "plan", "median_ms")}
    assert read(unsaid)[0]["link_bytes"] is None


def test_results_replace_results_only(tmp_path, read):
    path = tmp_path / "a.json"
    tables.check_out(None, "plan")
    tables.check_out(path, "plan")
    read(ROW)
    tables.check_out(path, "plan")
    with pytest.raises(ValueError, match=r"--out: .*a\.json has other results, without spans, that would be lost"):
        tables.check_out(path, "spans")
    read(ROW | {"workload": "w1"})
    with pytest.raises(ValueError, match=r"--out: .*a\.json has a suite's results, that would be lost"):
        tables.check_out(path, "plan")
    path.write_text("# notes\n")
    for wrong, message in (
        (path, r"--out: .*a\.json is not a results file .*lost; give another"),
        (tmp_path, "folder"),
    ):
        with pytest.raises(ValueError, match=message):
            tables.check_out(wrong, "plan")
    assert path.read_text() == "# notes\n"


def test_a_table_of_drafts(read):
    """Tokens a pass and the acceptance of each kind of text that a row has."""
    texts = [{"kind": "list", "tokens_per_pass": 4.25, "right": 13, "tried": 20}]
    code = {"kind": "code", "tokens_per_pass": 1.0, "right": 0, "tried": 0}
    row = ROW | {"temperature": 0.0, "drafter": "fp8 sketch", "drafts": 8, "texts": texts}
    assert tables.drafts(read(row | {"temperature": 0.5, "texts": [code, *texts]}, row)) == (
        "| model | prompt | temperature | drafts by | code | list |\n"
        "|---|---|---|---|---|---|\n"
        "| OPT-6.7B | 1024 | 0 | fp8 sketch | - | 4.2 (0.65) |\n"
        "| OPT-6.7B | 1024 | 0.5 | fp8 sketch | 1.0 | 4.2 (0.65) |"
    )
