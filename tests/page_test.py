"""The page in a headless Chromium, if there is one, without network.

`REPORT_RUN=RUN REPORT_PICTURE=FILE python -m pytest tests/page_test.py -k picture` makes
a picture of the page of a run, such as that of `experiments/README.md`.
"""

import csv
import io
import json
import os
import shutil
import urllib.request

import pytest
from PIL import Image as image

from mixcpt_jax import config as config_lib
from mixcpt_jax.cli import report
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.reporting import page, run_records

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
NAME = "<img src=x onerror=hacked=3>"  # a source's has neither dots nor slashes
SECTIONS = [
    "results", "tradeoff", "curves", "mixture", "swap", "change", "samples", "settings",
    "provenance",
]  # fmt: skip
CHROMIUM = shutil.which("chromium")
_PATIENCE = 600_000  # ms
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def evaluation(step, shift):
    return {
        "step": step, "domain/loss": 2.5 - shift, "domain/perplexity": 12.18 - shift,
        "domain/accuracy": 0.4 + shift / 10, "domain/exam": 0.25 + shift / 4,
        f"{NAME}/accuracy": 0.5 - shift / 20, "prose/exam": 0.7 - shift / 8,
    }  # fmt: skip


def write_phase(folder, name, shift, overrides):
    """Writes the files of a phase."""
    config = config_lib.default()
    config.model.path = "/models/small"
    config.sources.domain = config_lib.source(path="a.jsonl", weight=0.6)
    config.sources[NAME] = config_lib.source(path="b.jsonl", weight=0.4)
    config.update_from_flattened_dict(overrides)
    before, after = evaluation(0, 0.0), evaluation(9, shift)
    results = {
        "before": before if shift == 0.5 else None,
        "after": after,
        "tokens_per_second": 1234.5,
        "seconds": 75.0,
        "mixture": [
            {
                "name": source, "documents": 10, "loss_tokens": 1000, "epochs": 1.5,
                "share_asked": asked, "share_delivered": asked + 0.01 - asked / 50,
            }
            for source, asked in (("domain", 0.6), (NAME, 0.4))
        ],
    }  # fmt: skip
    rows = [
        {
            "step": step, "loss": 3.0 / step, "ntp": 3.0 / step, "correct": 0.4,
            "kd": 0.01 * step, "swapped": 0.5, "domain/swapped": 0.5 + step / 100,
            f"{NAME}/swapped": 0.6,
        }
        for step in range(1, 10)
    ]  # fmt: skip
    items = {"domain/exam": [0, 0, 0, 1] * 5, "domain/tokens": [30, 50, 20]}
    phase = folder / name
    phase.mkdir(parents=True)
    (phase / "config.json").write_text(config.to_json())
    (phase / "results.json").write_text(json.dumps(results))
    (phase / "provenance.json").write_text(
        json.dumps(
            {"start": {"weights": HOSTILE}, "files": {"domain": {HOSTILE: "ab"}}}
        )
    )
    lines = {
        "metrics.jsonl": rows,
        "samples.jsonl": [
            {"step": step, "messages": [{"role": "user", "content": HOSTILE}],
             "answer": f"{HOSTILE} {name} {step} {'long' * 200}"}
            for step in (0, 9)
        ],
        "items.jsonl": [
            {"step": 0, "items": items | {"domain/correct": [10, 20, 9]}},
            {"step": 9, "items": items | {"domain/correct": [11, 25, 9]}},
        ],
    }  # fmt: skip
    for file, content in lines.items():
        (phase / file).write_text("".join(json.dumps(row) + "\n" for row in content))
    return results


@pytest.fixture
def run(tmp_path):
    """A run of two arms, and its results."""
    folder = tmp_path / "mine"
    plain = {"objective.lssd_weight": 0.0, "objective.ntp_weight": 1.0}
    results = {
        "mixcpt": write_phase(folder, "mixcpt", 0.5, {}),
        "plain": write_phase(folder, "plain", 1.0, plain),
    }
    (folder / "report.json").write_text(json.dumps(results))
    return folder, results


@pytest.mark.parametrize("name", ["../other", "/etc", "..", "", "a/b", "a\0b", "a\nb"])
def test_a_report_names_no_folder_outside_of_its_run(run, name):
    folder, results = run
    write_phase(folder.parent, "other", 0.5, {})
    (folder / "report.json").write_text(json.dumps(results | {name: {}}))
    with pytest.raises(
        InputError, match=r"report\.json: phase: .* must be the name of"
    ):
        run_records.load([str(folder)])


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=FLAGS, timeout=_PATIENCE
        )
        yield browser
        browser.close()


def open_page(browser, file, width, scheme="light"):
    """The page in a new window, and the list of its errors and requests."""
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        offline=True,
        has_touch=True,
    )
    context.set_default_timeout(_PATIENCE)
    window, wrong = context.new_page(), []
    window.on("console", lambda message: wrong.append(message.text))
    window.on("pageerror", lambda error: wrong.append(str(error)))
    window.on("dialog", lambda dialog: wrong.append(dialog.message))
    window.on("request", lambda request: wrong.append(request.url))
    window.goto(file.as_uri())
    assert wrong.pop(0) == file.as_uri()  # itself
    return window, wrong


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_whole_and_fits(browser, run, width):
    folder, _ = run
    report.main([str(folder)])
    window, wrong = open_page(browser, folder / "report.html", width)
    for details in window.query_selector_all("summary"):
        details.click()
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    assert [s.get_attribute("id") for s in window.query_selector_all("section")] == (
        SECTIONS
    )
    assert not window.query_selector_all(".absent")
    for plot in window.query_selector_all("svg.plot"):
        box = plot.bounding_box()
        assert box["width"] > 250
        assert box["height"] > 50
    # The colors come from the style sheet, so the policy allows it.
    assert window.evaluate(
        "getComputedStyle(document.querySelector('.plot polyline')).fill"
    ) == "none"  # fmt: skip
    window.query_selector("#change circle.touch").scroll_into_view_if_needed()
    window.query_selector("#change circle.touch").tap()
    assert "domain" in window.inner_text("#tip")
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    assert not wrong


def test_content_from_files_is_escaped(browser, run):
    folder, _ = run
    report.main([str(folder)])
    window, wrong = open_page(browser, folder / "report.html", 390)
    assert window.evaluate("window.hacked") is None
    assert not window.query_selector_all("img, main script")
    assert HOSTILE in window.inner_text("#samples")
    assert NAME in window.inner_text("#results")
    assert not wrong


def test_every_number_equals_that_of_the_results(browser, run):
    folder, results = run
    report.main([str(folder)])
    window, _ = open_page(browser, folder / "report.html", 1280)
    forms = {suffix: forms for suffix, _, *forms in page.MEASURES}
    before = results["mixcpt"]["before"]
    cells = window.query_selector_all("#measures td")
    measured = {k for k in before if k.split("/")[-1] in forms}
    assert len(cells) == len(measured) * 5
    for cell in cells:
        key, arm, what = (
            cell.get_attribute(f"data-{name}") for name in ("measure", "arm", "what")
        )
        form, change_form = forms[key.split("/")[-1]]
        if what == "before":
            expected = form.format(before[key])
        elif what == "after":
            expected = form.format(results[arm]["after"][key])
        else:
            expected = change_form.format(results[arm]["after"][key] - before[key])
        expected = expected.replace("%", "").replace("-", "−")
        assert cell.inner_text() == expected
    for table in window.query_selector_all("table.mixture"):
        mixture = results[table.get_attribute("data-arm")]["mixture"]
        rows = [row.inner_text().split("\t") for row in table.query_selector_all("tr")]
        for (name, asked, delivered, *_), source in zip(rows[1:], mixture):
            assert name == source["name"]
            assert asked == f"{100 * source['share_asked']:.1f}"
            assert delivered == f"{100 * source['share_delivered']:.1f}"


def test_sections_without_files_say_why(browser, run, tmp_path):
    """For an old run without these files, and for a run in progress."""
    _, results = run
    old = tmp_path / "old.json"
    for result in results.values():
        del result["mixture"], result["seconds"]
    old.write_text(json.dumps(results))
    begun = tmp_path / "begun"
    write_phase(begun, "cpt", 0.5, {})
    for file in ("results.json", "items.jsonl", "samples.jsonl", "provenance.json"):
        (begun / "cpt" / file).unlink()
    for given, missing in ((old, 7), (begun, 6)):
        output = tmp_path / "page.html"
        report.main([str(given), f"--output={output}"])
        window, wrong = open_page(browser, output, 390)
        assert len(window.query_selector_all("section")) == len(SECTIONS)
        reasons = [e.inner_text() for e in window.query_selector_all(".absent")]
        assert len(reasons) == missing, reasons
        assert not wrong
    assert "not finished" in window.inner_text("#results")


def test_data_of_every_figure_can_be_downloaded_and_lies_beside_the_page(browser, run):
    folder, results = run
    curve = [
        {"share": share, "step": step, "domain/accuracy": 0.4 + share / 10}
        for step, share in enumerate((0.0, 0.6, 1.0))
    ]
    (folder / "mixcpt" / "results.json").write_text(
        json.dumps(results["mixcpt"] | {"curve": curve})
    )
    report.main([str(folder)])
    rows = list(csv.reader((folder / "report.csv").read_text("utf-8").splitlines()))
    window, wrong = open_page(browser, folder / "report.html", 390)
    plots = window.query_selector_all("svg.plot")
    links = window.query_selector_all("a[download]")
    assert len(links) == len(plots)
    downloaded = []
    for link in links:
        # The link holds the file: nothing waits for a browser that saves it.
        with urllib.request.urlopen(link.get_attribute("href")) as file:
            header, *found = csv.reader(file.read().decode().splitlines())
        assert found
        downloaded += found
    assert [header, *downloaded] == rows
    title = "mixcpt: top-1 token accuracy, %"
    shares = [[float(v) for v in row[2:4]] for row in rows if row[0] == title]
    assert shares == [[0.0, 40.0], [0.6, 46.0], [1.0, 50.0]]
    assert [
        row[2]
        for row in rows
        if row[0] == "Exams: change, points" and row[2] == "domain"
    ] == ["domain", "domain"]
    assert not wrong


@pytest.mark.parametrize("display", ["", ":0"])
def test_a_browser_opens_only_where_it_can_be_seen(run, display, monkeypatch, capsys):
    folder, _ = run
    opened = []
    monkeypatch.setattr(report.webbrowser, "open", opened.append)
    monkeypatch.setattr(report.sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", display)
    report.main([str(folder), "--open"])
    address = (folder / "report.html").as_uri()
    assert capsys.readouterr().out == f"Report: {address}\n"
    assert opened == [address] * bool(display)


def test_runs_are_compared_in_one_page(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = run
    write_phase(tmp_path / "alone", ".", 0.5, {})
    report.main([str(folder), str(tmp_path / "alone")])
    text = (tmp_path / "report.html").read_text()
    for name in ("mine/mixcpt", "mine/plain", ">alone<"):
        assert name in text


def test_a_change_has_the_interval_of_its_recorded_items(run):
    arms = run_records.load([str(run[0])])
    changes = page._changes(arms, {"domain"})
    assert [method.split(":")[0] for method in changes["methods"]] == (
        ["Exams and pairs", "Texts"]
    )


def test_only_a_change_beyond_its_interval_has_a_color(run):
    """The exam has the same answers before and after; no items of perplexity are kept."""
    arms = run_records.load([str(run[0])])
    kinds = {
        key: cells[2]["kind"]
        for key, _, _, cells in page._table(arms, {"domain"})["rows"]
    }
    assert kinds["domain/exam"] == ""
    assert kinds["domain/perplexity"] == "good"
    assert kinds["prose/exam"] == "bad"


def test_the_times_of_a_resumed_run_say_which_starts_they_cover(run):
    folder, _ = run

    def labels():
        arms = run_records.load([str(folder)])
        return [label for label, _ in page._facts(arms) if label.startswith(("T", "G"))]

    rows = [
        {"step": step, "began": began, "time": began + 60.0, "seconds": {"steps": 60.0}}
        for step, began in ((4, 1000.0), (9, 2000.0))
    ]
    file = folder / "plain" / "timing.jsonl"
    file.write_text(json.dumps(rows[0]) + "\n")
    assert labels() == ["Text", "Time", "Goodput"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert labels() == ["Text", "Time since the last start", "Goodput over all starts"]


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_without_a_run_is_an_input_error(tmp_path, content):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match=str(tmp_path)):
        report.main([str(tmp_path)])


@pytest.mark.skipif("REPORT_PICTURE" not in os.environ, reason="REPORT_PICTURE=FILE")
def test_picture(browser, tmp_path):
    output = tmp_path / "report.html"
    report.main([os.environ["REPORT_RUN"], f"--output={output}"])
    window, _ = open_page(browser, output, 1280)
    end = window.query_selector("#samples").bounding_box()["y"]
    clip = {"x": 0, "y": 0, "width": 1280, "height": end}
    picture = image.open(io.BytesIO(window.screenshot(full_page=True, clip=clip)))
    picture.quantize(256).save(os.environ["REPORT_PICTURE"], optimize=True)
