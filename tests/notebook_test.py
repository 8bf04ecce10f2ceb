"""The notebook runs from its first cell to its last, with a tiny model on the CPU."""

import json
import os
import pathlib
import sys
from pydoc_data import topics

import hub_server
import pytest

pytestmark = pytest.mark.slow

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")


# Of nbclient's own event loop and sockets.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs(project, tmp_path, longer_model, monkeypatch):
    """Model and text come from a server on this machine that speaks the Hub's API."""
    (tmp_path / "configs").symlink_to(project / "configs")
    notebook = nbformat.read(project / "experiments" / "colab_tpu.ipynb", as_version=4)
    (given,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    given.source += (
        '\nMODEL, DOMAIN = "org/tiny", "hf://datasets/org/topics"\nMAX_RECORDS = 160\n'
        "CONFIG = 'configs/mixcpt.py:tiny'\n"
    )
    binaries = pathlib.Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(project))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    files = {
        file.name: file.read_bytes() for file in pathlib.Path(longer_model).iterdir()
    }
    texts = "\n".join(json.dumps({"text": text}) for text in topics.topics.values())
    with hub_server.serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.commit("models", "org/tiny", files)
        server.commit("datasets", "org/topics", {"train.jsonl": texts.encode()})
        client = nbclient.NotebookClient(
            notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
        )
        client.execute()
    shown = [
        output.data
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "execute_result"
    ]
    assert any("<iframe" in data.get("text/html", "") for data in shown)
    assert (tmp_path / "runs" / "colab" / "export" / "hf" / "config.json").exists()
