"""The notebook runs from top to bottom, and shows what it says: plans that differ in bytes and agree in logits."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import kvrecomp
import models
from experiments import generate
from experiments.support import what_if
from kvrecomp.plan import format_bytes
from kvrecomp.predict.cost import plan_costs
from kvrecomp.predict.hardware import HardwareProfile

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "experiments" / "decode.ipynb"
PLANS = ("auto", "activations", "keys_values", "device")
# What the test asks of the notebook when it has run.
FACTS = """
import json

print(json.dumps({
    "plans": list(measured),
    "milliseconds": {name: milliseconds for name, (milliseconds, _, _) in measured.items()},
    "sent": {name: sent for name, (_, sent, _) in measured.items()},
    "difference": difference,
    "largest": float(np.abs(reference).max()),
    "workload": [WORKLOAD.batch, WORKLOAD.prompt, WORKLOAD.new],
    "logits": list(reference.shape),
    "checked": written.check.passed,
    "curves": sorted(found.curves),
}))
"""


def read() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def sources() -> dict[str, str]:
    """The source of every cell by its id."""
    return {cell["id"]: "".join(cell["source"]) for cell in read()["cells"]}


def run(folder: Path):
    """The notebook's cells with outputs, and its facts; the kernel has this machine's made-up profile."""
    why = "the notebook is run by nbclient, ipykernel and nbformat, which the extra `test` brings"
    nbformat = pytest.importorskip("nbformat", reason=why)
    nbclient = pytest.importorskip("nbclient", reason=why)
    pytest.importorskip("ipykernel", reason=why)
    pytest.importorskip("matplotlib", reason="the notebook draws with matplotlib, the extra `plot`")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "IPYTHONDIR": str(folder),
        "JUPYTER_RUNTIME_DIR": str(folder),
    }
    notebook = nbformat.read(FILE, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(FACTS, id="facts"))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    # The kernel of this Python, not of one that the user has installed under the same name.
    client.create_kernel_manager()
    client.km.kernel_spec.argv = [sys.executable, *client.km.kernel_spec.argv[1:]]
    client.execute(env=env)  # raises where a cell does
    cells = {cell.id: cell for cell in notebook.cells}
    return cells, json.loads(text(cells["facts"]))


def text(cell) -> str:
    """What the cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(cell) -> list[str]:
    """Its pictures, in base64."""
    return [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]


def test_runs_from_top_to_bottom(tmp_path):
    """One test: pytest-xdist would give several to as many processes, and each would run the notebook."""
    cells, facts = run(tmp_path)
    check_facts(facts)
    check_outputs(cells, facts)


def check_facts(facts):
    """Plans agree, and send what their names say."""
    config = json.loads((generate.SHIPPED / "config.json").read_text(encoding="utf-8"))
    batch, prompt, new = facts["workload"]
    activations = config["layers"] * config["hidden"] * 4 * batch * prompt  # float32
    assert tuple(facts["plans"]) == PLANS
    assert facts["sent"]["activations"] == activations
    assert facts["sent"]["keys_values"] == 2 * activations
    assert facts["sent"]["device"] == 0
    assert 0 < facts["sent"]["auto"] < 2 * activations
    assert facts["logits"] == [new, batch, config["vocab"]]
    assert facts["largest"] > 1
    assert max(facts["difference"].values()) < 1e-4
    assert facts["difference"]["device"] == 0
    assert all(facts["milliseconds"][name] > 0 for name in PLANS)
    assert facts["checked"]
    assert facts["curves"] == sorted(what_if.CURVES)


def check_outputs(cells, facts):
    """What a reader sees."""
    assert "(cpu)" in text(cells["device"])
    assert text(cells["plan"]).count("Plan auto: opt-pydoc, batch 4, prompt 128, 9 new") == 1
    assert all(output.output_type == "stream" for output in cells["plan"].outputs)  # not shown once more as HTML
    heading, *rows = text(cells["table"]).splitlines()[: 1 + len(PLANS)]
    assert "ms a step" in heading and "MB over the link" in heading
    assert [row.split()[0] for row in rows] == list(PLANS)
    assert [float(row.split()[3]) for row in rows] == [round(facts["sent"][name] / 1e6, 2) for name in PLANS]
    assert len(pictures(cells["bars"])) == len(pictures(cells["split"])) == 1


def test_sizes_on_a_gpu_suit_a_t4(monkeypatch):
    """The cells that choose model and plans, as on a GPU, with a T4's data sheet and no weights."""
    t4 = HardwareProfile.from_datasheet("t4")

    def create(name, dtype):
        return SimpleNamespace(shape=dataclasses.replace(models.preset(name).shape, dtype=dtype))

    monkeypatch.setattr(kvrecomp, "profile", lambda: t4)
    monkeypatch.setattr(kvrecomp, "weight_memories", lambda model: ("device",) * len(model.shape.layers))
    names = {"kvrecomp": kvrecomp, "format_bytes": format_bytes, "ON_GPU": True}
    exec(sources()["model"], names | {"models": SimpleNamespace(create=create)}, names)
    assert names["model"].shape.dtype == "float16"
    exec(sources()["plan"], names)
    plans = names["plans"]
    for plan in plans.values():
        needed = {memory: sum(items.values()) for memory, items in kvrecomp.memory_needed(plan).items()}
        assert needed["device"] < 0.75 * t4.device_bytes / 2  # XLA takes three quarters; programs need some too
        assert needed["host"] < 4e9  # of the 12 GB that Colab gives
        assert plan.write_outs == 0  # no program is compiled while steps are timed
    auto, activations, keys_values, device = plan_costs(t4, [plans[name] for name in PLANS]).seconds
    assert device < auto < activations < keys_values
    assert keys_values < 0.2


def test_notebook_is_committed_without_outputs():
    for cell in read()["cells"]:
        assert not cell.get("outputs"), f"cell {cell['id']} has outputs: clear them"
        assert cell.get("execution_count") is None
