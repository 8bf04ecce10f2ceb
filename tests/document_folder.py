"""A folder such as people have: documents of all kinds and encodings, and other files."""

import io
import json
import pathlib
import zipfile

TOPICS = ("pumps", "valves", "motors")
ENGLISH = (
    "The {} moves 20 °C water from the lower tank to the upper tank, at 5 £ an hour."
)
GERMAN = (
    "Über die größte Brücke führt seit 1887 eine schmale Straße zum Maschinenhaus: {}."
)
CHINESE = "本文介绍水泵的基本原理，包括进水口、出水口和电动机的维护方法。编号 {}。"
JAPANESE = "この章では、ポンプの仕組みと保守の手順について説明する。番号は {} である。"
RUSSIAN = (
    "В этой главе рассматриваются устройство насоса и порядок его обслуживания: {}."
)
# Encoding -> what is written in it.
TEXTS = {
    "utf-8": ENGLISH,
    "utf-8-sig": ENGLISH,
    "utf-16": GERMAN,
    "utf-16-le": ENGLISH,  # Python writes no mark in these two
    "utf-16-be": RUSSIAN,
    "cp1252": GERMAN,
    "latin-1": ENGLISH,
    "gb18030": CHINESE,
    "shift_jis": JAPANESE,
    "cp1251": RUSSIAN,
}
PAGE = """<?xml version="1.0" encoding="{encoding}"?>
<!DOCTYPE html><html><head><title>Manual</title><meta charset="{encoding}">
<style>p {{ color: red }}</style><script>alert("never")</script></head>
<body><nav><a href="/">Home</a></nav><main><h1>Chapter</h1><p>{text}</p>
<pre>pump --start\n  --fast</pre><table><tr><th>part</th><th>mass</th></tr>
<tr><td>rotor</td><td>3 kg</td></tr></table></main><footer>All rights</footer></body></html>
"""
# Reason -> the files that are left out for it.
LEFT_OUT = {
    "no_text": ["blank.txt", "scan.pdf", "frame.html", "empty.csv"],
    "binary": ["program.txt"],
    "encrypted": ["secret.pdf"],
    "too_large": ["bomb.docx"],
    "damaged": ["cut.pdf", "cut.docx"],
    "no_header": ["twice.csv"],
    "bad_row": ["ragged.csv"],
    "bad_record": ["numbers.csv"],
}
NOT_READ = {
    "hidden": [".DS_Store", ".cache"],
    "archive": ["old.zip"],
    "media": ["photo.png"],
    "office": ["sheet.xlsx"],
    "no_reader": ["Makefile"],
    "about_the_data": ["README.md"],
}


def pdf(*pages: str) -> bytes:
    """A PDF with one line of text per page, written by hand."""
    streams = [
        f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET" if text else "" for text in pages
    ]
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, stream in enumerate(streams):
        objects += [
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 200] /Resources << /Font "
            f"<< /F1 3 0 R >> >> /Contents {5 + 2 * number} 0 R >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\n"
    end += f"startxref\n{len(out)}\n%%EOF"
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n"
    return out + (head + table + end).encode()


def encrypted_pdf() -> bytes:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf("a secret")))
    writer.encrypt("password", algorithm="RC4-128")
    content = io.BytesIO()
    writer.write(content)
    return content.getvalue()


def docx(*paragraphs: str) -> bytes:
    """A docx with these paragraphs and a table."""
    import docx

    document = docx.Document()
    for text in paragraphs:
        document.add_paragraph(text)
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "rotor", "3 kg"
    content = io.BytesIO()
    document.save(content)
    return content.getvalue()


def bomb(size: int) -> bytes:
    """A docx whose document has `size` bytes of blanks."""
    content = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(docx("small"))) as parts,
        zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as to,
    ):
        for part in parts.infolist():
            blanks = b" " * size if part.filename == "word/document.xml" else b""
            to.writestr(part.filename, parts.read(part) + blanks)
    return content.getvalue()


def make(root: pathlib.Path) -> dict[str, str]:
    """Writes the folder; the text of each document is in the result, by its name.

    Sources leave out the files of `LEFT_OUT`, and do not read those of `NOT_READ`.
    """
    texts, contents = {}, {}
    for number, (encoding, form) in enumerate(TEXTS.items()):
        for topic in TOPICS:
            name = f"text/{encoding}_{topic}{('.txt', '.md', '.rst')[number % 3]}"
            texts[name] = "\n".join(form.format(f"{topic} {line}") for line in range(4))
            contents[name] = texts[name].encode(encoding)
            name = f"pages/{encoding}_{topic}.html"
            texts[name] = form.format(topic)
            page = PAGE.format(encoding=encoding.removesuffix("-sig"), text=texts[name])
            contents[name] = page.encode(encoding)
    for topic in TOPICS:
        texts[f"reports/{topic}.pdf"] = f"The {topic} are checked."
        contents[f"reports/{topic}.pdf"] = pdf(f"The {topic} are checked.", "Yearly.")
        texts[f"reports/{topic}.docx"] = ENGLISH.format(topic)
        contents[f"reports/{topic}.docx"] = docx("Chapter", ENGLISH.format(topic))
    tables = {"comma.csv": (",", "utf-8"), "semicolon.csv": (";", "cp1252"),
              "tabs.tsv": ("\t", "utf-16")}  # fmt: skip
    for name, (delimiter, encoding) in tables.items():
        texts[name] = f'the "größte" part{delimiter} of all\nparts'
        quoted = texts[name].replace('"', '""')
        row = f'1{delimiter}"{quoted}"\n'
        contents[name] = f"number{delimiter}content\n{row}".encode(encoding)
    texts["notes.jsonl"] = "a note on pumps"
    contents["notes.jsonl"] = json.dumps({"body": "a note on pumps"}).encode()
    contents |= {
        "blank.txt": b"\n \n", "scan.pdf": pdf(""), "empty.csv": b"a,b\n",
        "frame.html": b"<html><body><nav>Home</nav></body></html>",
        "program.txt": bytes(range(256)) * 4, "secret.pdf": encrypted_pdf(),
        "bomb.docx": bomb(80 << 20), "cut.pdf": pdf("text")[:40],
        "cut.docx": docx("text")[:200], "twice.csv": b"a,a\n1,2\n",
        "ragged.csv": b"text,n\nfirst row,1\nsecond row,2,3\n",
        "numbers.csv": b"day,mass\n1,2\n", "old.zip": b"PK\x05\x06" + bytes(18),
        "photo.png": b"\x89PNG", "sheet.xlsx": b"PK", "Makefile": b"all:\n",
        "README.md": b"About this folder.", ".DS_Store": b"\0\1",
        ".cache/page.html": b"<p>cached</p>",
    }  # fmt: skip
    texts["ragged.csv"] = "first row"
    for name, content in contents.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return texts
