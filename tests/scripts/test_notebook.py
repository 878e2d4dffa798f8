"""The notebook runs from its first cell to its last, with a model and without one, and is kept without outputs."""

import contextlib
import io
import json

import nbformat
import pytest
from nbclient import NotebookClient

from arc.models import manifests
from arc.puzzles.dataset import ArcDataset
from tests import tiny_models
from tests.helpers import ROOT

NOTEBOOK = ROOT / "notebooks" / "explore_arc.ipynb"


def execute(monkeypatch, dataset, model):
    monkeypatch.setenv("ARC_DATASET", str(dataset))
    monkeypatch.setenv("ARC_MODEL", str(model))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    return printed, shown


def test_without_a_model(monkeypatch, demo_dataset, tmp_path):
    printed, shown = execute(monkeypatch, demo_dataset, tmp_path / "none")
    assert "there is no model in" in printed and "views of one puzzle" in printed
    assert "ALL_CORRECT" in printed and printed.count("cant_decode") == 5
    pages = "".join(data.get("text/html", "") for data in shown)
    assert pages.count("<svg") > 10 and "ArcDataset(" in pages
    assert "learned: 100% of" in pages and "stage 2" in pages
    assert sum("image/png" in data for data in shown) == 1


def test_with_a_model(monkeypatch, demo_dataset, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = ArcDataset.load_from_local_json(demo_dataset, sizes=(3,))
        model = tiny_models.teach_format(tiny_models.prepared_base(tmp_path), dataset)
    # What a stage leaves beside its weights; the notebook shows puzzles that were held out of that training.
    split = {"sizes": [3], "holdout_examples": 30, "holdout_tasks": 1, "holdout_seed": 7}
    manifests.write_manifest(model, {"settings": {**split, "dataset_dir": "elsewhere", "learning_rate": 1e-4}})
    heldout = dataset.holdout(examples=30, tasks=1, seed=7).seen
    printed, shown = execute(monkeypatch, demo_dataset, model)
    assert printed.count(" candidates, ") == 4
    assert all(f"{key}: " in printed for key in heldout.keys[:4])
    assert sum("image/png" in data for data in shown) == 2


def test_it_is_kept_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
