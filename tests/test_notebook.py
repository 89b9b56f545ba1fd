"""The notebook runs from the top on the bundled model, and is kept without outputs."""

import base64
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="no nbformat: pip install 'heterostep[dev]'")
PATH = Path(__file__).parent.parent / "notebooks" / "first-steps.ipynb"


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


def test_it_runs_and_ends_in_a_picture_and_the_report(monkeypatch, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install 'heterostep[dev]'")
    # Nothing of the user's own Jupyter.
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    notebook = nbformat.read(PATH, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "asked 0.5, spent 0.50" in text
    (db,) = re.findall(r"([\d.]+) dB", text)
    assert 30 < float(db) < 100
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3 and all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert any(output.get("data", {}).get("text/plain", "").startswith("Report(") for output in outputs)
    for number, picture in enumerate(pictures):
        (tmp_path / f"{number}.png").write_bytes(base64.b64decode(picture))
