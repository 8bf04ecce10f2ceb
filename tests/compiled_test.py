"""The folder of compiled programs."""

import jax
import pytest

from mixcpt_jax.runtime import compiled


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """No folder is set, and none is set afterwards that a test has chosen."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(
    ("setting", "workdir", "backend", "folder"),
    [
        ("auto", "runs/mine", "tpu", "{tmp}/cache/mixcpt_jax/compiled"),
        ("auto", "gs://bucket/run", "gpu", "gs://bucket/run/compiled"),
        ("auto", "runs/mine", "cpu", None),
        ("off", "runs/mine", "tpu", None),
        ("{tmp}/mine", "runs/mine", "cpu", "{tmp}/mine"),
    ],
)
def test_folder(monkeypatch, tmp_path, setting, workdir, backend, folder):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    compiled.keep(setting.format(tmp=tmp_path), workdir)
    expected = folder and folder.format(tmp=tmp_path)
    assert jax.config.jax_compilation_cache_dir == expected


@pytest.mark.usefixtures("unset")
def test_folder_that_the_user_has_set_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compiled.keep(str(tmp_path / "other"), "runs/mine")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
