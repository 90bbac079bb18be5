"""Every cell of the notebooks runs, at tiny sizes in place of those of the cell tagged `parameters`."""

import ast
import json
import os

import nbformat
import pytest
from documents import ROOT
from nbclient import NotebookClient

TEXT = {"name": "text", "paths": [str(ROOT / "docs/*.md")], "heldout_fraction": 0.5}
SMALL = (
    "model.d_model=16",
    "model.num_layers=4",
    "model.depth.num_recursions=2",
    "data.seq_len=32",
)
PLAN = ["--config=configs/mor.py", *(f"--config.{field}" for field in SMALL)]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DEMO, TOUR = (ROOT / "notebooks" / name for name in ("tpu_demo.ipynb", "library_tour.ipynb"))


@pytest.fixture
def executed(monkeypatch):
    """Runs a notebook: `(path, sizes, names) -> (notebook, values of the names at its end)`."""
    flags = os.environ["XLA_FLAGS"].split()  # one device is enough, and compiles faster
    flags = [flag for flag in flags if "device_count" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))

    def run(path, sizes, names):
        notebook = nbformat.read(path, as_version=4)
        at = [tagged(cell) for cell in notebook.cells].index(True)
        assert sizes.keys() <= assigned(notebook.cells[at].source)
        given = "\n".join(f"{name} = {value!r}" for name, value in sizes.items())
        notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(given))
        asked = ", ".join(f"{name!r}: {value}" for name, value in names.items())
        question = f"import json\nprint(json.dumps({{{asked}}}, default=float))"
        notebook.cells.append(nbformat.v4.new_code_cell(question))
        where = {"metadata": {"path": str(path.parent)}}
        NotebookClient(notebook, timeout=300, resources=where).execute()  # raises what a cell does
        return notebook, json.loads(printed(notebook.cells[-1]))

    return run


def tagged(cell):
    return "parameters" in cell.metadata.get("tags", ())


def assigned(source):
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def printed(cell):
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def pictures(notebook):
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    return [out for out in outputs if "image/png" in out.get("data", {})]


@pytest.mark.parametrize(
    "topology", ["cpu", pytest.param("v5e:2x2", marks=pytest.mark.slow)], ids=str
)
def test_the_demo_trains_plans_and_searches(topology, executed, tmp_path):
    sizes = {
        "RUNS": str(tmp_path),
        "SOURCE": TEXT,
        "WIDTH": 16,
        "LAYERS": 4,
        "RECURSIONS": 2,
        "ROWS": 4,
        "LENGTH": 32,
        "STEPS": 10,
        "PLAN": [*PLAN, f"--plan.topology={topology}"],
        "SEARCH_WIDTH": 16,
        "SEARCH_ROWS": 16,
        "SEARCH_STEPS": 5,
    }
    names = {
        "bits": "json.loads(Path(f'{RUNS}/mor/summary.json').read_text())['heldout_bits_per_byte']",
        "means": "means",
        "found": "found.tolist()",
        "functions": "len(functions)",
    }
    notebook, values = executed(DEMO, sizes, names)
    assert 3 < values["bits"] < 8  # it has begun to learn: no model costs 8 bits a byte
    assert all(1 <= mean <= 2 for mean in values["means"].values())
    assert values["means"].keys() >= {"punctuation", "white space", "inside a word"}
    assert all(len(set(hits)) == 3 for hits in values["found"])
    assert max(max(hits) for hits in values["found"]) < values["functions"]
    assert len(pictures(notebook)) == 5
    (plan,) = tmp_path.glob("plan/*.json")
    assert json.loads(plan.read_text())["topology"] == topology
    coloured = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert any("background:#" in out.get("data", {}).get("text/html", "") for out in coloured)


@pytest.mark.parametrize("lengths", [(), pytest.param((4096,), marks=pytest.mark.slow)], ids=str)
def test_the_tour_goes_through_the_rooms(lengths, executed):
    sizes = {
        "WIDTH": 32,
        "LAYERS": 4,
        "RECURSIONS": 2,
        "LENGTH": 32,
        "SOURCE": TEXT,
        "STEPS": 12,
        "BATCH": 4,
        "OPTIMIZERS": ("adamw",),
        "NEW_TOKENS": 4,
        "KERNEL_LENGTHS": lengths,
    }
    names = {
        "spent": "spent",
        "full": "full",
        "losses": "runs['adamw'][1]",
        "lengths": "found.lengths.tolist()",
        "temporaries": "sizes",
        "round_trip": "round_trip",
        "nnx": "abs(bridged - logits).max()",
        "parameters": "[count(again), count(recursive)]",
    }
    notebook, values = executed(TOUR, sizes, names)
    assert 0 < values["spent"] < values["full"]
    assert len(values["losses"]) == 12 and values["losses"][-1] < values["losses"][0]
    assert values["lengths"] == [4, 4]
    if lengths:  # compiled for a TPU
        kernel, written_out = values["temporaries"]
        assert kernel < written_out / 4  # linear and quadratic in the length
    assert values["round_trip"] < 1e-4 and values["nnx"] < 1e-4
    dense, recursive = values["parameters"]
    assert recursive < dense
    assert len(pictures(notebook)) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_clean(path):
    text = path.read_text("utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert sum(map(tagged, notebook.cells)) == 1
    for home in (str(ROOT), os.path.expanduser("~"), "/tmp/", "site-packages"):
        assert home not in text
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert not [out for out in outputs if out.output_type == "error"]
    assert len(text) < 1_000_000
