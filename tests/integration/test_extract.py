"""Stages extract and format as a user runs them: a dump in every form, processes, kill -9, damage, other sources."""

import bz2
import functools
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from berth.corpus import extract as extract_module
from berth.corpus import mediawiki
from berth.corpus.extract import ExtractOptions, extract
from berth.errors import DataError
from tests.support import ROOT, environment, run_script

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
 xsi:schemaLocation="http://www.mediawiki.org/xml/export-0.11/ http://www.mediawiki.org/xml/export-0.11.xsd" version="0.11" xml:lang="hu">
  <siteinfo>
    <sitename>Wikipédia</sitename>
    <dbname>huwiki</dbname>
    <base>https://hu.wikipedia.org/wiki/Kezd%C5%91lap</base>
    <generator>MediaWiki 1.45.0-wmf.24</generator>
    <case>first-letter</case>
    <namespaces>
      <namespace key="-2" case="first-letter">Média</namespace>
      <namespace key="-1" case="first-letter">Speciális</namespace>
      <namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Vita</namespace>
      <namespace key="6" case="first-letter">Fájl</namespace>
      <namespace key="10" case="first-letter">Sablon</namespace>
      <namespace key="14" case="first-letter">Kategória</namespace>
    </namespaces>
  </siteinfo>
"""
TAIL = "</mediawiki>\n"
ARTICLE = """{{Település infobox
| név = Pécs
| kép = [[Fájl:Pecs.jpg|250px]]
| népesség = {{Népesség|{{PAGENAME}}|{{#if: 1 | {{{x|y}}} }} }}
}}
[[Fájl:Széchenyi tér.jpg|bélyegkép|jobbra|A [[Széchenyi tér (Pécs)|Széchenyi tér]] [http://x.hu képe]]]
'''Pécs''' ({{Hang|pecs.ogg}}; [[német nyelv|németül]] ''Fünfkirchen'') [[Magyarország]] egyik városa.<ref name="ksh">{{Cite web |url=http://ksh.hu
|title=x}}</ref> Lakossága&amp;nbsp;140&amp;nbsp;000 fő.<ref name="ksh" /><!-- régi
adat -->

== Története ==
{| class="wikitable"
! Év !! Fő
|-
| 1900 || {|
| belső
|}
|}
A várost a [[rómaiak]]
alapították.<ref>Nincs {{lezárva</ref> Neve ''Sopianae'' volt.

* lista
== Források ==
{{források}}
[[Kategória:Pécs| ]]
[[de:Pécs]]
"""
TEXT = (
    "Pécs (németül Fünfkirchen) Magyarország egyik városa. Lakossága 140 000 fő.\n"
    "A várost a rómaiak alapították. Neve Sopianae volt."
)  # fmt: skip


def escaped(text: str) -> str:
    return text.replace("&amp;", "&").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def page(number: int, title: str, text: str, ns: int = 0, redirect: str = "") -> str:
    extra = f'    <redirect title="{redirect}" />\n' if redirect else ""
    return f"""  <page>
    <title>{title}</title>
    <ns>{ns}</ns>
    <id>{number}</id>
{extra}    <revision>
      <id>{number + 10**6}</id>
      <parentid>{number + 10**5}</parentid>
      <timestamp>2026-10-30T08:00:00Z</timestamp>
      <contributor><username>Szerkesztő</username><id>5</id></contributor>
      <comment>/* Története */ &lt;page&gt;</comment>
      <origin>{number + 10**6}</origin>
      <model>wikitext</model>
      <format>text/x-wiki</format>
      <text bytes="{len(text.encode())}" sha1="x" xml:space="preserve">{escaped(text)}</text>
      <sha1>x</sha1>
    </revision>
  </page>
"""


def prose(number: int, words: int) -> str:
    draw = random.Random(number)
    return " ".join("".join(draw.choices("aábcdeéfghiíjklmnoóöőprstuúüűvz", k=draw.randint(2, 9))) for _ in range(words)) + "."


def pages(count: int, words: int = 30) -> list[str]:
    found = []
    for number in range(1, count + 1):
        if number % 10 == 3:
            found.append(page(number, f"Átirányítás {number}", "#ÁTIRÁNYÍTÁS [[Pécs]]", redirect="Pécs"))
        elif number % 10 == 5:
            found.append(page(number, f"Vita:Lap {number}", "Vita.", ns=1))
        elif number % 10 == 7:
            found.append(page(number, f"Üres {number}", "{{törlés}}\n[[Kategória:X]]"))
        elif number % 10 == 9:
            found.append(page(number, "Pécs", ARTICLE))
        else:
            found.append(page(number, f"Lap {number}", f"{prose(number, words)}\n\n{{{{sablon}}}}'''{prose(-number, words)}'''"))
    return found


def expected(count: int, words: int = 30) -> list[dict]:
    rows = []
    for number in range(1, count + 1):
        if number % 10 == 9:
            rows.append({"id": f"huwiki/{number}", "text": TEXT, "title": "Pécs", "source": "huwiki"})
        elif number % 10 not in (3, 5, 7):
            text = f"{prose(number, words)}\n{prose(-number, words)}"
            rows.append({"id": f"huwiki/{number}", "text": text, "title": f"Lap {number}", "source": "huwiki"})
    return rows


def write_dumps(folder: Path, count: int, words: int = 30) -> dict[str, Path]:
    """The same dump as plain XML, one bz2 stream, many (header, 100 pages each, footer: as Wikipedia's), and gzip."""
    folder.mkdir(parents=True, exist_ok=True)
    found = pages(count, words)
    text = (HEAD + "".join(found) + TAIL).encode()
    streams = [HEAD, *("".join(found[at : at + 100]) for at in range(0, count, 100)), TAIL]
    forms = {
        "plain": ("huwiki-20261101-pages-articles.xml", text),
        "bz2": ("one.xml.bz2", bz2.compress(text, 1)),  # several blocks in one stream
        "multistream": ("huwiki-20261101-pages-articles-multistream.xml.bz2", b"".join(bz2.compress(part.encode()) for part in streams)),
        "gzip": ("one.xml.gz", gzip.compress(text)),
    }
    for name, data in forms.values():
        (folder / name).write_bytes(data)
    return {form: folder / name for form, (name, _) in forms.items()}


def output(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.jsonl")))


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}


def test_every_form_gives_the_same_documents(tmp_path, monkeypatch):
    dumps = write_dumps(tmp_path / "dumps", 700)
    monkeypatch.setattr(extract_module, "cut_dump", functools.partial(mediawiki.cut_dump, part_bytes=100_000, compressed_part_bytes=30_000))
    monkeypatch.setattr(mediawiki, "BATCH_BYTES", 100_000)
    first = b""
    for form, path in dumps.items():
        for processes in (1, 2):
            out = tmp_path / f"{form}{processes}"
            result = extract(ExtractOptions((str(path),), str(out), processes=processes))
            assert len(parts(out)) > 2, form
            assert output(out) == (first or output(out)), form
            first = output(out)
            counts = {name: value for name, value in result.counts.items() if name.startswith(("documents", "rejected"))}
            assert counts == {
                "documents_in": 700,
                "documents_out": 490,
                "rejected_redirect": 70,
                "rejected_namespace": 70,
                "rejected_empty": 70,
            }
        assert parts(tmp_path / f"{form}1") == parts(tmp_path / f"{form}2")
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
        extract(ExtractOptions(("-",), str(tmp_path / f"{form}-")))
        assert parts(tmp_path / f"{form}-") == parts(tmp_path / "plain-")
    assert parts(tmp_path / "plain-") == parts(tmp_path / "bz21"), "standard input is cut as a stream is"
    assert [json.loads(line) for line in first.decode().splitlines()] == expected(700)


def test_the_script_and_its_counts(tmp_path):
    dumps = write_dumps(tmp_path / "dumps", 20)
    done = run_script("data/extract.py", "--input", dumps["multistream"], "--output_dir", "out", "--processes", 1, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("out: 20 documents in = 14 out + 6 rejected (2 empty, 2 namespace, 2 redirect)\n")
    assert [json.loads(line) for line in output(tmp_path / "out").decode().splitlines()] == expected(20)
    with open(dumps["bz2"], "rb") as handle:
        piped = subprocess.run(
            [sys.executable, ROOT / "data" / "extract.py", "--input", "-", "--output_dir", "piped"],
            stdin=handle, capture_output=True, env=environment(), cwd=tmp_path, timeout=60, check=True,
        )  # fmt: skip
    assert output(tmp_path / "piped") == output(tmp_path / "out"), piped
    talk = run_script(
        "data/extract.py", "--input", dumps["plain"], "--output_dir", "talk", "--namespaces", 0, 1, "--keep_headings", cwd=tmp_path
    )
    assert "20 documents in = 16 out" in talk.stdout
    assert "\\nTörténete\\n" in output(tmp_path / "talk").decode()
    formatted = run_script("data/formatting.py", "--input_folder", "out", "--output_file", "one.txt", cwd=tmp_path)
    assert "14 articles in = 14 out" in formatted.stdout
    assert (tmp_path / "one.txt").read_text(encoding="utf-8") == "".join(row["text"].replace("\n", " ") + "\n\n" for row in expected(20))


def test_killed_and_run_again(tmp_path):
    folder = tmp_path / "dumps"
    folder.mkdir()
    for number in range(8):
        text = HEAD + "".join(page(number * 1000 + n, f"Lap {n}", prose(number * 1000 + n, 900)) for n in range(60)) + TAIL
        (folder / f"huwiki-20261101-pages-articles{number}.xml-p{number}p{number + 1}.bz2").write_bytes(bz2.compress(text.encode()))
    words = ["--input", str(folder), "--output_dir", "out", "--processes", "2"]
    assert run_script("data/extract.py", *words[:2], "--output_dir", "whole", "--processes", 1, cwd=tmp_path).returncode == 0
    for wanted in (1, 4):
        run = subprocess.Popen(
            [sys.executable, ROOT / "data" / "extract.py", *words],
            env=environment(),
            cwd=tmp_path,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        while run.poll() is None and len(list((tmp_path / "out").glob("*.jsonl"))) < wanted and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    done = run_script("data/extract.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "480 documents in = 480 out" in done.stdout
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".jsonl") == [".extract.lock", "extract.json"]


def test_a_cut_off_dump_is_an_error_and_finished_parts_stay(tmp_path, monkeypatch):
    dumps = write_dumps(tmp_path / "dumps", 700)
    monkeypatch.setattr(extract_module, "cut_dump", functools.partial(mediawiki.cut_dump, part_bytes=100_000, compressed_part_bytes=30_000))
    monkeypatch.setattr(mediawiki, "BATCH_BYTES", 100_000)
    for form in ("bz2", "multistream"):
        data = dumps[form].read_bytes()
        dumps[form].write_bytes(data[: len(data) * 4 // 5])
        options = ExtractOptions((str(dumps[form]),), str(tmp_path / form))
        with pytest.raises(DataError, match=rf"{dumps[form].name}: ends at byte {len(data) * 4 // 5} in the middle of compressed data"):
            extract(options)
        finished = parts(tmp_path / form)
        assert finished
        assert not (tmp_path / form / "extract.json").exists()
        dumps[form].write_bytes(data)
        result = extract(options)
        assert result.kept >= len(finished) - 1
        assert result.counts["documents_in"] == 700


def test_bad_input_is_one_line_and_nothing_half_written(tmp_path):
    (tmp_path / "bad.txt").write_bytes("jó\n\n".encode() + "rossz ékezet".encode("iso8859-2"))
    done = run_script("data/extract.py", "--input", "bad.txt", "--output_dir", "out", "--processes", 2, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "bad.txt: byte 0xe9 at offset 11 is not UTF-8" in done.stderr
    assert parts(tmp_path / "out") == {}
    for words, code, message in (
        (["--input", "bad.txt", "--output_dir", "out", "--weight", "0"], 2, "--weight must be above 0"),
        (["--input", "missing.xml", "--output_dir", "out"], 1, "missing.xml: no such file"),
        (["--input", "bad.txt", "--format", "mediawiki", "--output_dir", "out"], 1, "does not begin with <mediawiki>"),
        (["--inp", "bad.txt", "--output_dir", "out"], 2, "--input"),
    ):
        done = run_script("data/extract.py", *words, cwd=tmp_path)
        assert (done.returncode, message in done.stderr) == (code, True), done.stderr


def test_several_sources_from_another_folder(tmp_path):
    dumps = write_dumps(tmp_path / "dumps", 10)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("Egy könyv\nsora.\r\n\r\nMásodik bekezdés.", encoding="utf-8")
    (tmp_path / "long.txt").write_text("szó " * 2_000_000, encoding="utf-8")  # one line
    words = ["--input", dumps["plain"], "books", "long.txt", "--weight", "1", "2", "1", "--output_dir", "out", "--processes", 2]
    done = run_script("data/extract.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 documents in + 1 copies = 10 out + 3 rejected" in done.stdout
    rows = [json.loads(line) for line in output(tmp_path / "out").decode().splitlines()]
    book = {"text": "Egy könyv sora.\nMásodik bekezdés.", "source": "books"}
    assert [row for row in rows if row["source"] == "books"] == [{"id": "books/a.txt", **book}, {"id": "books/a.txt#copy2", **book}]
    assert len(next(row["text"] for row in rows if row["source"] == "long")) == 8_000_000 - 1
