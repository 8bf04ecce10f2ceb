"""The documentation site: meanings of keys, places of pages, targets of links."""

import importlib.util

import pytest

from mixcpt_jax.config import defaults, settings


@pytest.fixture(scope="module")
def site(project):
    pytest.importorskip("mkdocs", reason="the site's packages are in the extra `dev`")
    spec = importlib.util.spec_from_file_location(
        "site", project / "docs" / "build_site.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_has_a_row_with_its_meaning(site):
    rows = {
        key: (default, meaning) for key, default, _, meaning in site.settings_rows()
    }
    for key, default in settings.leaves(defaults.default().to_dict()):
        assert str(rows[key][0]) == str(default) or list(rows[key][0]) == default, key
        assert rows[key][1], f"{key} has no comment in config/defaults.py"


def test_every_page_is_in_the_navigation(site, project):
    nav = (project / "mkdocs.yml").read_text()
    for page in (project / "docs").glob("*.md"):
        assert f"docs/{page.name}" in nav, page.name


@pytest.mark.slow
def test_site_is_built_and_a_dead_link_stops_it(site, project, tmp_path, monkeypatch):
    site.main(str(tmp_path / "site"))
    page = (tmp_path / "site/docs/keys/index.html").read_text()
    assert "objective.lssd_weight" in page
    page = (tmp_path / "site/docs/api/index.html").read_text()
    assert "Logit swap self-distillation" in page
    collect = site.collect

    def with_dead_link(folder):
        collect(folder)
        (folder / "docs/watch.md").write_text("[nothing](nowhere.md)")

    monkeypatch.setattr(site, "collect", with_dead_link)
    with pytest.raises(site.Abort):
        site.main(str(tmp_path / "other"))
