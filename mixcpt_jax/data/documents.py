"""Reads documents as people write them: text in any encoding, HTML, PDF, docx, CSV.

Each reader is a function `(file, on_bad)` as in `readers`. A document that cannot be read
goes to `on_bad` as a `DocumentError`, whose reason is counted. Libraries of the extra
`documents` parse HTML, PDF and docx.
"""

import atexit
import codecs
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import charset_normalizer
from etils import epath

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core import text as text_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import readers
from mixcpt_jax.data.readers import DocumentError, OnBad, Record

# Kind of file -> the module that parses it, and the packages that install it.
LIBRARIES = {
    "html": ("inscriptis", "inscriptis lxml"),
    "pdf": ("pypdf", "pypdf"),
    "docx": ("docx", "python-docx"),
}
# A parsed tree takes many times the memory of its text.
MAX_TREE_BYTES = 64 << 20

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Encodings without a mark. If several are equally likely, the first of these counts.
_ENCODINGS = (
    "cp1252", "gb18030", "cp932", "big5", "euc_jp", "cp949", "cp1251", "cp1250", "koi8_r",
    "cp1253", "iso8859_2",
)  # fmt: skip
# Encodings within this distance of the best coherence count as equally likely.
_COHERENCE_MARGIN = 0.05
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_DECLARED = re.compile(
    rb"""<(?:meta|\?xml)[^>]*?(?:charset|encoding)\s*=\s*["']?([\w.:-]+)"""
)
_HEAD_BYTES, _AROUND_BYTES, _CHUNK_BYTES = 4096, 2**18, 2**20
_PROLOG = re.compile(r"\s*<\?xml[^>]*\?>")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]")
_CONTROL_BYTES = re.compile(rb"[\x00-\x08\x0b\x0e-\x1f\x7f]")
# Encodings that pages declare, and the larger ones that browsers then use.
_AS_BROWSERS_DO = {
    "iso-8859-1": "cp1252",
    "latin-1": "cp1252",
    "latin1": "cp1252",
    "us-ascii": "cp1252",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc-kr": "cp949",
}
# Elements and roles that surround the text of a page and do not belong to it.
_AROUND = ("nav", "aside", "footer", "script", "style", "noscript", "template", "form")
_ROLES_AROUND = ("navigation", "search", "contentinfo", "complementary")
_DELIMITERS = ",;\t|"

csv.field_size_limit(readers.MAX_LINE_BYTES)


def missing_libraries(kinds: Iterable[str]) -> dict[str, InputError]:
    """Those of these kinds of files whose library is not installed.

    Returns:
      Kind -> an error that names the command that installs its library.
    """
    return {
        kind: InputError(
            f"reader {kind!r}: the package {module} is not installed; run "
            f"`pip install {packages}`, or name other files"
        )
        for kind, (module, packages) in LIBRARIES.items()
        if kind in kinds and not paths.package_folders(module)
    }


def require_libraries(kinds: Iterable[str]) -> None:
    """Checks that the libraries for these kinds of files are installed.

    Raises:
      InputError: see `missing_libraries`.
    """
    for error in missing_libraries(kinds).values():
        raise error


def decode(content: bytes, file: epath.Path) -> tuple[str, str]:
    """Decodes a text by its byte order mark, as UTF-8, or as what its bytes suggest.

    Returns:
      The text and its encoding.

    Raises:
      DocumentError: it is no text, or its encoding is not clear.
    """
    mark, encoding = _marked(content)
    try:
        return content.decode(encoding), encoding
    except UnicodeDecodeError as error:
        if not mark and (found := _guess(content, error.start)):
            with contextlib.suppress(UnicodeDecodeError):
                return content.decode(found), found
        line = content.count(b"\n", 0, error.start) + 1
        raise _unknown(content, f"{file}:{line}", encoding) from error


def _marked(content: bytes) -> tuple[bytes | None, str]:
    """The byte order mark at the beginning, and the encoding that the beginning shows."""
    mark = next(filter(content.startswith, _BYTE_ORDER_MARKS), None)
    return mark, _BYTE_ORDER_MARKS[mark] if mark else _unmarked(content[:_HEAD_BYTES])


def _unmarked(head: bytes) -> str:
    """UTF-16 if zeros are in one byte of the pairs only and all characters are text."""
    are_zero = 0 in head[::2], 0 in head[1::2]
    if len(head) % 2 == 0 and sum(are_zero) == 1 and not _is_text_in_utf_8(head):
        encoding = "utf-16-be" if are_zero[0] else "utf-16-le"
        # A pair of surrogates may be cut at the end of the head.
        text = head.decode(encoding, "ignore")
        if text and all(c.isprintable() or c.isspace() for c in text):
            return encoding
    return "utf-8"


def _unknown(content: bytes, place: str, encoding: str) -> DocumentError:
    if _BINARY.search(content[:_HEAD_BYTES]):
        return DocumentError(f"{place}: holds no text; name other files", "binary")
    return DocumentError(
        f"{place}: is neither {encoding.upper()} nor of another known encoding; convert it",
        "unknown_encoding",
    )


def _is_text_in_utf_8(head: bytes) -> bool:
    """Whether bytes are UTF-8, of which the last character may be cut, and mostly text.

    Latin and Cyrillic letters in UTF-16 may be UTF-8 as well, full of control characters.
    """
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return len(head) < 4 or 4 * len(_CONTROL_BYTES.findall(head)) <= len(head)


def _guess(content: bytes, place: int) -> str:
    """The most usual of the likely encodings of a text around a place in it, or ''."""
    begin = content.rfind(b"\n", 0, max(place - _AROUND_BYTES, 0)) + 1
    end = content.find(b"\n", place + _AROUND_BYTES)
    part = content[begin : end if end > 0 else None]
    if _BINARY.search(part):
        return ""
    matches = charset_normalizer.from_bytes(part, cp_isolation=list(_ENCODINGS))
    best = matches.best()
    likely = {
        encoding
        for match in matches
        if match.chaos <= best.chaos
        and match.coherence >= best.coherence - _COHERENCE_MARGIN
        for encoding in match.could_be_from_charset
    }
    return next(filter(likely.__contains__, _ENCODINGS), "")


def _once(read: Callable[..., Iterator[Record]]) -> Callable[..., Iterator[Record]]:
    """Parses each file once in a process; its text is kept on disk until the end.

    A phase reads its sources several times, and parsing takes longer than reading.
    """

    @functools.wraps(read)
    def read_once(file: epath.Path, on_bad: OnBad) -> Iterator[Record]:
        key = repr((read.__name__, str(file), paths.stamp(file)))
        kept = _kept() / hashlib.sha256(key.encode()).hexdigest()
        try:
            found, errors = small_files.read_json(
                kept, [[[object]]], most_bytes=readers.MAX_TEXT_BYTES
            )
        except (InputError, OSError):  # not parsed yet, or no space on the disk
            problems: list[DocumentError] = []
            found = [dataclasses.astuple(r) for r in read(file, problems.append)]
            errors = [(str(error), error.reason) for error in problems]
            with contextlib.suppress(OSError):
                paths.replace(kept, json.dumps([found, errors]))
        for problem, reason in errors:
            on_bad(DocumentError(problem, reason))
        yield from (Record(*values) for values in found)

    return read_once


@functools.cache
def _kept() -> epath.Path:
    """The folder of parsed texts."""
    folder = tempfile.mkdtemp(prefix="mixcpt-documents-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return epath.Path(folder)


def text(file: epath.Path, on_bad: OnBad) -> Iterator[Record]:
    """One record `{'id', 'text'}`."""
    with _reporting(file, on_bad, readers.MAX_TEXT_BYTES):
        with file.open("rb") as content:
            document, encoding = decode(content.read(), file)
        yield from _document(file, document, encoding)


@_once
def html(file: epath.Path, on_bad: OnBad) -> Iterator[Record]:
    """The text of a page without its navigation, `{'id', 'text'}`."""
    import inscriptis
    import lxml.html

    with _reporting(file, on_bad, MAX_TREE_BYTES):
        with file.open("rb") as content:
            page, encoding = _decode_page(content.read(), file)
        page = _PROLOG.sub("", page, count=1)
        if not page.strip():
            raise _empty(file)
        tree = lxml.html.document_fromstring(page)
        around = " | ".join(
            [*(f"//{tag}" for tag in _AROUND)]
            + [f"//*[@role='{role}']" for role in _ROLES_AROUND]
        )
        for element in tree.xpath(around):
            if element.getparent() is not None:
                element.drop_tree()
        main = tree.xpath("//main | //*[@role='main']") or tree.xpath("//article")
        part = main[0] if len(main) == 1 else tree
        found = inscriptis.Inscriptis(part).get_text()
        yield from _document(file, _cleaned(found), encoding)


def _decode_page(content: bytes, file: epath.Path) -> tuple[str, str]:
    """Decodes a page by its mark, its own declaration, or as `decode` does."""
    declared = _DECLARED.search(content[:_HEAD_BYTES])
    if declared and not _marked(content)[0]:
        name = declared[1].decode("ascii", "replace").lower()
        with contextlib.suppress(LookupError, ValueError):
            codec = codecs.lookup(_AS_BROWSERS_DO.get(name, name)).name
            return content.decode(codec), codec
    return decode(content, file)


@_once
def pdf(file: epath.Path, on_bad: OnBad) -> Iterator[Record]:
    """The text of all pages, `{'id', 'text'}`."""
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    with _reporting(file, on_bad, readers.MAX_TEXT_BYTES), file.open("rb") as content:
        document = pypdf.PdfReader(content)
        if document.is_encrypted and not document.decrypt(""):
            raise DocumentError(
                f"{file}: is encrypted; save it without a password", "encrypted"
            )
        pages, size = [], 0
        for page in document.pages:
            pages.append(page.extract_text().strip())
            size += len(pages[-1])
            if size > readers.MAX_EXPANDED_BYTES:
                raise _too_large(file, size, readers.MAX_EXPANDED_BYTES)
        yield from _document(file, _cleaned("\n\n".join(filter(None, pages))))


@_once
def docx(file: epath.Path, on_bad: OnBad) -> Iterator[Record]:
    """The paragraphs and tables of a document, `{'id', 'text'}`."""
    import docx

    with _reporting(file, on_bad, readers.MAX_TEXT_BYTES), file.open("rb") as content:
        with zipfile.ZipFile(content) as parts:
            sizes = [part.file_size for part in parts.infolist()]
            trees = [
                part.file_size
                for part in parts.infolist()
                if part.filename.endswith("xml")
            ]
            most = max(MAX_TREE_BYTES, readers.MAX_EXPANSION * file.stat().length)
        if sum(sizes) > most or sum(trees) > MAX_TREE_BYTES:
            raise _too_large(file, max(sum(sizes), sum(trees)), MAX_TREE_BYTES)
        content.seek(0)
        document = docx.Document(content)
        blocks = [_block(block) for block in document.iter_inner_content()]
        yield from _document(file, _cleaned("\n\n".join(filter(None, blocks))))


def _block(block: Any) -> str:
    """The text of a paragraph, or of a table, whose rows are lines of cells with tabs."""
    if hasattr(block, "rows"):
        rows = [[cell.text.strip() for cell in row.cells] for row in block.rows]
        return "\n".join("\t".join(row) for row in rows).strip()
    return block.text.strip()


def table(file: epath.Path, on_bad: OnBad) -> Iterator[Record]:
    """The rows of a CSV or TSV file, by the names in its first row."""
    with _reporting(file, on_bad):
        encoding = _encoding_of(file)
        with file.open("rb") as content:
            stream = io.TextIOWrapper(content, encoding, newline="")
            lines = iter(lambda: stream.readline(readers.MAX_LINE_BYTES), "")
            first = next(filter(str.strip, lines), "")
            delimiter = max(_DELIMITERS, key=first.count)
            rows = csv.reader(
                itertools.chain([first], lines), delimiter=delimiter, strict=True
            )
            names = [name.strip() for name in next(rows)]
            if len(set(names)) < len(names) or not all(names):
                raise DocumentError(
                    f"{file}: its first row must give each column a name of its own; "
                    f"found {text_lib.value(first.strip())}",
                    "no_header",
                )
            found = 0
            for found, row in enumerate(filter(any, rows), 1):
                place = f"{file}: row {found}"
                if len(row) == len(names):
                    fields = dict(zip(names, row, strict=True))
                    yield Record(fields, place, encoding=encoding)
                else:
                    on_bad(
                        DocumentError(
                            f"{place}: has {len(row)} values for {len(names)} columns; "
                            f"quote values that contain {delimiter!r}",
                            "bad_row",
                        )
                    )
            if not found:
                raise _empty(file)


def _encoding_of(file: epath.Path) -> str:
    """The encoding of a file of any size, see `decode`."""
    with file.open("rb") as content:
        chunk = content.read(_CHUNK_BYTES)
        if not chunk.strip():
            raise _empty(file)
        mark, encoding = _marked(chunk)
        decoder = codecs.getincrementaldecoder(encoding)()
        while chunk:
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                found = "" if mark else _guess(chunk, error.start)
                if not found:
                    raise _unknown(chunk, str(file), encoding) from error
                return found
            chunk = content.read(_CHUNK_BYTES)
    return encoding


@contextlib.contextmanager
def _reporting(
    file: epath.Path, on_bad: OnBad, most: float = math.inf
) -> Iterator[None]:
    """Reports what goes wrong inside, and a file above `most` bytes, to `on_bad`."""
    try:
        if (size := file.stat().length) > most:
            raise _too_large(file, size, most)
        yield
    except DocumentError as error:
        on_bad(error)
    except (InputError, OSError, MemoryError):
        raise
    except Exception as error:  # libraries share no class for damage
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        on_bad(
            DocumentError(
                f"{file}: cannot be parsed ({reason}); write or download it again",
                "damaged",
            )
        )


def _document(file: epath.Path, text: str, encoding: str = "") -> Iterator[Record]:
    """The record of a whole file."""
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise _empty(file)
    yield Record({"id": str(file), "text": text}, str(file), encoding=encoding)


def _cleaned(text: str) -> str:
    """What a library extracted, without control characters and halves of pairs."""
    return _CONTROLS.sub("", text).strip()


def _empty(file: epath.Path) -> DocumentError:
    return DocumentError(
        f"{file}: has no text; remove it, or read it by OCR", "no_text"
    )


def _too_large(file: epath.Path, size: int, most: int) -> DocumentError:
    return DocumentError(
        f"{file}: has {size >> 20:,} MiB, at most {most >> 20:,} are supported in one "
        "document; split the file",
        "too_large",
    )
