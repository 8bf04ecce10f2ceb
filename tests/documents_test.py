"""A folder of documents of all kinds is read at the first try; the rest is counted."""

import collections
import pathlib
import tomllib

import document_folder
import fields_test
import pypdf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import (
    corpus,
    documents,
    files,
    inspection,
    pipeline,
    readers,
    sources,
)
from mixcpt_jax.jobs import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("documents")
    return root, document_folder.make(root)


def _words(text):
    return " ".join(text.split())


def _by_file(root, records):
    found = collections.defaultdict(list)
    for record in records:
        place = record.place.partition(": row")[0].removesuffix(":1")
        found[str(pathlib.Path(place).relative_to(root))].append(record)
    return found


def test_each_document_is_read_and_every_other_file_is_counted(folder):
    root, texts = folder
    source = config_lib.source(path=str(root))
    read = corpus.Corpus(config_lib.default(), source)
    found = _by_file(root, read.train_split())
    assert found.keys() == texts.keys()
    for name, text in texts.items():
        [record] = found[name]
        [said] = [
            v for k, v in record.fields.items() if k in ("text", "content", "body")
        ]
        assert _words(text) in _words(said), name
        assert "never" not in said
        assert "Home" not in said
        assert "All rights" not in said
    expected = {
        reason: len(names) for reason, names in document_folder.LEFT_OUT.items()
    }
    assert read.left_out == expected
    for reason, names in document_folder.LEFT_OUT.items():
        assert any(str(root / name) in read.examples[reason] for name in names)
        assert "\n" not in read.examples[reason]
    not_read = sources.not_read(str(root))
    assert {
        reason: sorted(pathlib.Path(file).name for file in found)
        for reason, found in not_read.items()
    } == document_folder.NOT_READ


def test_pages_and_documents_keep_their_structure(folder):
    root, _ = folder
    [page] = sources.read(str(root / "pages" / "utf-8_pumps.html"))
    assert "pump --start\n  --fast" in page.fields["text"]
    assert _words(page.fields["text"]).startswith("Chapter The pumps moves")
    assert "rotor  3 kg" in page.fields["text"]
    [report] = sources.read(str(root / "reports" / "pumps.docx"))
    assert report.fields["text"].endswith("\n\nrotor\t3 kg")
    [pages] = sources.read(str(root / "reports" / "pumps.pdf"))
    assert pages.fields["text"] == "The pumps are checked.\n\nYearly."


@pytest.mark.parametrize("name", ["secret.pdf", "program.txt", "ragged.csv"])
def test_refuse_ends_the_run_at_the_first_bad_document(folder, name):
    root, _ = folder
    source = config_lib.source(path=str(root / name), on_bad_record="refuse")
    read = corpus.Corpus(config_lib.default(), source)
    with pytest.raises(InputError, match=name):
        list(read.train_split())
    source.on_bad_record = "by_kind"
    read = corpus.Corpus(config_lib.default(), source)
    if name == "ragged.csv":
        assert len(list(read.train_split())) == 1
    else:
        with pytest.raises(InputError, match=f"no record is left.*{name}"):
            list(read.train_split())


def test_a_bad_line_of_a_data_set_ends_the_run_unless_it_is_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"words": "two"}\n[]\n')
    source = config_lib.source(path=str(tmp_path))
    with pytest.raises(InputError, match=r"b.jsonl:3"):
        list(corpus.Corpus(config_lib.default(), source).train_split())
    source.on_bad_record = "skip"
    read = corpus.Corpus(config_lib.default(), source)
    assert len(list(read.train_split())) == 2
    assert read.left_out == {"bad_record": 2}


def test_fields_are_of_the_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.csv").write_text("summary,notes\nfrom a table,x\n")
    (tmp_path / "c.jsonl").write_text('{"abstract": "from a line"}\n')

    def read(fields):
        source = config_lib.source(path=str(tmp_path), fields=fields)
        found = inspection.of_source(source, 60.0)
        return found.num_records, found.num_characters, len(found.refused)

    assert read({"csv": {"text": "summary"}, "jsonl": {"text": "abstract"}}) == (
        3,
        29,
        0,
    )
    # A map for all does not apply to files that are one text.
    assert read({"text": "abstract", "csv": {"text": "notes"}}) == (3, 18, 0)
    assert read({"csv": {"text": "summary"}}) == (2, 18, 1)
    with pytest.raises(
        InputError, match="'pdf' is no kind of file whose records have f"
    ):
        read({"pdf": {"text": "body"}})
    with pytest.raises(InputError, match="'words' is not a field of format 'document'"):
        read({"csv": {"words": "body"}})


def test_a_document_is_parsed_once_until_it_changes(folder, monkeypatch, tmp_path):
    root, _ = folder
    parsed = []

    class Reader(pypdf.PdfReader):
        def __init__(self, *args):
            parsed.append(args)
            super().__init__(*args)

    monkeypatch.setattr(pypdf, "PdfReader", Reader)
    file = tmp_path / "a.pdf"
    for content, text in ((b"one", "one"), (b"other", "other")):
        file.write_bytes(document_folder.pdf(content.decode()))
        for _ in range(3):
            [record] = sources.read(str(file))
            assert record.fields == {"id": str(file), "text": text}
    assert len(parsed) == 2
    for _ in range(2):
        problems = []
        assert not list(sources.read(str(root / "secret.pdf"), on_bad=problems.append))
        assert [problem.reason for problem in problems] == ["encrypted"]


def test_inspection_shows_what_would_be_read(folder):
    root, texts = folder
    config = config_lib.default()
    config.sources.domain = config_lib.source(path=str(root))
    shown = list(inspection.inspect(config, 60.0))
    text = "\n".join(shown)
    assert shown[0] == f"sources.domain: {root} as document"
    assert f"records: {len(texts)}, " in text
    num_pages = len([name for name in texts if name.endswith(".html")])
    assert f"html ({num_pages + 1})" in text
    for encoding in ("utf-16", "cp1252", "gb18030", "cp932", "cp1251"):
        assert f"{encoding} (" in text
    assert "first: " in text
    assert "read as content (text=content) (3)" in text
    for reason, names in (document_folder.LEFT_OUT | document_folder.NOT_READ).items():
        assert f"{reason} ({len(names)}), such as {root}/" in text
    assert "ends a run" not in text
    assert not any("\n" in line for line in shown)


def test_inspection_says_that_time_was_short_and_what_ends_a_run(folder, tmp_path):
    root, _ = folder
    source = config_lib.source(path=str(root))
    assert "so far, there are more" in "".join(
        inspection.of_source(source, 0.0).lines()
    )
    (tmp_path / "a.jsonl").write_text('{"text": "\\u001b[31m"}\n{"words": "two"}\n')
    config = config_lib.default()
    config.sources.domain = config_lib.source(path=str(tmp_path))
    config.sources.other = config_lib.source(path=str(tmp_path / "none"))
    shown = []
    with pytest.raises(
        InputError, match=r"sources\.domain, sources\.other: a run would"
    ):
        shown.extend(inspection.inspect(config, 60.0))
    text = "\n".join(shown)
    assert "refused, which ends a run: 1, such as " in text
    assert "--config.sources.domain.fields=" in text
    assert "\\x1b[31m" in text
    assert "refused: " in text.partition("sources.other")[2]


def test_inspection_names_several_files_per_reason(tmp_path):
    for number in range(7):
        (tmp_path / f"{number}.csv").write_text("day,mass\n1,2\n3,4\n")
    config = config_lib.default()
    config.sources.domain = config_lib.source(path=str(tmp_path))
    text = "\n".join(inspection.inspect(config, 60.0))
    assert "bad_record (14), such as " in text
    for number in range(7):
        assert text.count(f"{tmp_path}/{number}.csv: ") == (number < 5)


def test_an_error_names_its_source_and_what_helps(tmp_path):
    """A table without the text, and a line that is no JSON."""
    for name, content, told in (
        (
            "a.csv",
            "day,mass\n1,2\n3,4\n",
            r"the 0 distinct .*: bad_record \(2\), such as .*a\.csv: row 1: no field "
            r"'text' \(found: day, mass\); map it, .*--config\.sources\.domain\.fields=",
        ),
        (
            "b.jsonl",
            '{"text": "one"}\n{"text": \n',
            r"b\.jsonl:2: not JSON .*--config\.sources\.domain\.on_bad_record=skip",
        ),
    ):
        (tmp_path / name).write_text(content)
        config = config_lib.default()
        config.sources.domain = config_lib.source(path=str(tmp_path / name), holdout=1)
        with pytest.raises(InputError, match=told):
            corpus.measure(config)


def test_the_table_before_the_first_step_says_what_was_read(folder):
    root, texts = folder
    config = config_lib.default()
    config.sources.domain = config_lib.source(path=str(root))
    config.data.row_length, config.data.batch_size = 256, 2
    config.train.num_steps = 1
    data = pipeline.load(config, fields_test.Letters())
    [row] = data.report
    assert row["documents"] == len(texts)
    table = train._mixture_table(data.report)
    assert "domain: read as content (text=content) (3), body (text=body) (1)" in table
    assert "domain: decoded from cp1252 (" in table
    for kind, files_of in (
        ("left_out", document_folder.LEFT_OUT),
        ("files", document_folder.NOT_READ),
    ):
        assert row[kind] == {reason: len(names) for reason, names in files_of.items()}
        for reason, names in files_of.items():
            assert f"{reason} ({len(names)}), such as {root}/" in table


@pytest.mark.slow
def test_the_command_needs_no_model(folder, launcher):
    root, _ = folder
    done = launcher.start(
        "--inspect",
        "--config=configs/mixcpt.py",
        f"--config.sources.domain.path={root}",
        module="mixcpt_jax.cli.prepare",
    )
    assert done.wait() == 0, done.output
    assert f"sources.domain: {root} as document" in done.output
    assert "sources.instructions: no path is given as instruction" in done.output


def test_a_missing_library_is_named_before_anything_is_read(tmp_path, monkeypatch):
    for kind, (module, packages) in documents.LIBRARIES.items():
        file = tmp_path / f"a.{kind}"
        file.write_bytes(b"")
        missing = f"no_{module}", packages
        monkeypatch.setitem(documents.LIBRARIES, kind, missing)
        with pytest.raises(InputError) as error:
            sources.read(str(file))
        line = f"reader '{kind}': the package no_{module} is not installed; run "
        assert str(error.value).startswith(line)
        assert f"`pip install {packages}`" in str(error.value)


def test_the_commands_that_install_a_library_are_of_the_extra():
    file = pathlib.Path(__file__).parent.with_name("pyproject.toml")
    project = tomllib.loads(file.read_text())
    extra = project["project"]["optional-dependencies"]["documents"]
    packages = " ".join(packages for _, packages in documents.LIBRARIES.values())
    assert [part.partition(">=")[0] for part in extra] == packages.split()


def test_an_inspection_without_a_library_shows_the_other_files(tmp_path, monkeypatch):
    (tmp_path / "a.html").write_text("<p>One.</p>")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    (tmp_path / "c.txt").write_text("three")
    monkeypatch.setitem(documents.LIBRARIES, "html", ("no_library", "library"))
    config = config_lib.default()
    config.sources.domain = config_lib.source(path=str(tmp_path))
    lines = []
    with pytest.raises(InputError, match="refused or not read above; correct it$"):
        lines.extend(inspection.inspect(config, 60.0))
    assert "  records: 2, 8 characters" in lines
    assert any("not read: reader 'html': the package no_library" in x for x in lines)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])),
       st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))  # fmt: skip
def test_a_text_with_a_mark_or_in_utf_8_is_decoded_exactly(text, encoding):
    text = text.replace("\ufeff", "")
    found, _ = documents.decode(text.encode(encoding), pathlib.Path("a.txt"))
    assert found.removeprefix("\ufeff") == text


def test_a_zero_in_a_text_in_utf_8_does_not_make_it_utf_16():
    text = "\0" + "größer\n" * 9
    assert len(text.encode()) % 2 == 0
    assert documents.decode(text.encode(), pathlib.Path("a.txt")) == (text, "utf-8")


@given(st.binary(max_size=400))
def test_any_bytes_are_a_text_or_a_reason(content):
    problem = None
    try:
        text, encoding = documents.decode(content, pathlib.Path("a.txt"))
    except readers.DocumentError as error:
        problem = error
    if problem is None:
        assert text == content.decode(encoding)
    else:
        assert problem.reason in readers.REASONS
        assert "\n" not in str(problem)


@pytest.mark.parametrize("suffix", ["html", "pdf", "docx", "csv", "txt"])
@given(data=st.data())
def test_a_damaged_document_is_read_or_counted(folder, tmp_path_factory, suffix, data):
    root, texts = folder
    name = next(name for name in texts if name.endswith(suffix))
    content = bytearray((root / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(
            st.integers(0, 255)
        )
    content = content[: data.draw(st.integers(0, len(content)))]
    file = tmp_path_factory.mktemp("damage") / f"a.{suffix}"
    file.write_bytes(content)
    problems = []
    records = list(sources.read(str(file), on_bad=problems.append))
    assert all("\n" not in str(problem) for problem in problems)
    assert all(isinstance(error, InputError) for error in problems)
    assert records or problems or not content.strip()


def test_a_table_is_read_in_flat_memory_and_in_the_encoding_of_a_late_row(tmp_path):
    file = tmp_path / "a.csv"
    with file.open("wb") as content:
        content.write(b"text,n\n")
        for number in range(40_000):
            content.write(b"plain text of a row that is long enough,%d\n" % number)
        content.write("die größte Brücke über den Fluß,1\n".encode("cp1252"))
    *_, last = sources.read(str(file))
    assert last.fields["text"] == "die größte Brücke über den Fluß"
    assert last.encoding == "cp1252"


def test_every_kind_has_a_reader_and_a_suffix():
    assert set(readers.READER_OF_SUFFIX.values()) | {"tfds", "json"} == set(
        files.READERS
    )
    assert set(documents.LIBRARIES) < set(readers.TEXTS)
