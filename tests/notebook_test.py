"""The notebook runs from its first cell to its last, with a tiny model on the CPU."""

import os
import pathlib
import sys

import pytest

pytestmark = pytest.mark.slow

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")


# Of nbclient's own event loop and sockets.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs(project, tmp_path, longer_model, monkeypatch):
    (tmp_path / "configs").symlink_to(project / "configs")
    notebook = nbformat.read(project / "experiments" / "colab_tpu.ipynb", as_version=4)
    (given,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    given.source += f"\nMODEL = {longer_model!r}\nCONFIG = 'configs/mixcpt.py:tiny'\n"
    binaries = pathlib.Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(project))
    client = nbclient.NotebookClient(
        notebook,
        timeout=1200,
        startup_timeout=600,
        resources={"metadata": {"path": str(tmp_path)}},
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
