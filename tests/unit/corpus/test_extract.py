"""Stage extract: finding sources, weights, counts, options."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from berth.corpus.documents import document_tasks
from berth.corpus.extract import ExtractOptions, copies_of, detect_format, dump_files, extract, find_sources
from berth.errors import ConfigError, DataError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def run(tmp_path: Path, *inputs, **options) -> tuple[list[dict], dict[str, int]]:
    out = tmp_path / "out"
    result = extract(ExtractOptions(tuple(map(str, inputs)), str(out), **options))
    return [
        json.loads(line) for part in sorted(out.glob("*.jsonl")) for line in part.read_text(encoding="utf-8").splitlines()
    ], result.counts


def texts(tmp_path: Path, name: str, number: int) -> Path:
    return write(
        tmp_path / f"{name}.jsonl", "".join(json.dumps({"id": f"d{n}", "text": f"Text {n} of {name}."}) + "\n" for n in range(number))
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.txt", "b/c.txt"], "txt"),
        (["b/A.TXT"], "txt"),
        (["a.jsonl", "extract.json"], "jsonl"),
        (["a.parquet"], "parquet"),
        (["AA/wiki_00", "AB/wiki_01"], "wikiextractor"),
        (["huwiki-20261101-pages-articles1.xml-p1p100.bz2", "huwiki-20261101-pages-articles2.xml-p101p200.bz2"], "mediawiki"),
        (["state.json", "data-00000-of-00001.arrow"], "datasets"),
    ],
)
def test_formats_of_folders(tmp_path, names, expected):
    for name in names:
        write(tmp_path / "in" / name, "x")
    assert detect_format(tmp_path / "in") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("d.xml", "mediawiki"), ("d.xml.bz2", "mediawiki"), ("d.xml.gz", "mediawiki"), ("d.xml-p1p9.bz2", "mediawiki"), ("wiki_07", "wikiextractor")]
    + [("x.TXT", "txt"), ("x.jsonl", "jsonl"), ("x.parquet", "parquet")],
)  # fmt: skip
def test_formats_of_files(tmp_path, name, expected):
    assert detect_format(write(tmp_path / name, "x")) == expected


def test_what_cannot_be_told_apart(tmp_path):
    write(tmp_path / "both" / "a.txt", "x")
    write(tmp_path / "both" / "a.jsonl", "{}")
    with pytest.raises(ConfigError, match="holds txt and jsonl files; give --format"):
        detect_format(tmp_path / "both")
    with pytest.raises(ConfigError, match="its name does not say"):
        detect_format(write(tmp_path / "data", "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds nothing that can be read"):
        detect_format(tmp_path / "empty")
    with pytest.raises(DataError, match="no such file or folder"):
        detect_format(tmp_path / "missing")
    write(tmp_path / "dumps" / "a.xml", "x")
    write(tmp_path / "dumps" / "a.xml.bz2", "x")
    with pytest.raises(ConfigError, match="are the same dump"):
        find_sources(ExtractOptions((str(tmp_path / "dumps"),), str(tmp_path / "out")))


def test_documents_keep_their_letters_and_lose_control_characters(tmp_path):
    write(tmp_path / "in" / "a.txt", "\ufeffe\u0301 \x00a\x07b\u00a0c \u200d\u200c\n\nszo\u0308 \x85 ok\n\n\x01\x02")
    write(tmp_path / "in" / "b.txt", "\x00\n")
    rows, counts = run(tmp_path, tmp_path / "in")
    assert rows == [{"id": "in/a.txt", "text": "e\u0301 ab c \u200d\u200c\nszo\u0308 ok", "source": "in"}]
    assert (counts["documents_in"], counts["documents_out"], counts["rejected_empty"], counts["control_characters_removed"]) == (2, 1, 1, 5)


def test_copies_depend_on_the_identifier_only():
    names = [f"s/{number}" for number in range(4000)]
    some = [copies_of(name, 2.25, 7) for name in names]
    assert set(some) == {2, 3}
    assert abs(sum(some) / len(some) - 2.25) < 0.03
    assert some == [copies_of(name, 2.25, 7) for name in names]
    assert some != [copies_of(name, 2.25, 8) for name in names]
    assert {copies_of(name, 3, 7) for name in names} == {3}
    assert abs(sum(copies_of(name, 0.1, 7) for name in names) / 4000 - 0.1) < 0.02


DUMP = "<mediawiki><siteinfo><dbname>{0}</dbname></siteinfo><page><title>A</title><ns>0</ns><id>1</id></page></mediawiki>"


@pytest.mark.parametrize(
    "names",
    [
        ("w-pages-articles.xml", "w-pages-articles-multistream.xml.bz2"),
        ("w-pages-articles.xml", "w-pages-articles1.xml-p1p9"),
        ("w-pages-articles-multistream1.xml-p1p9.bz2", "w-pages-articles.xml.bz2"),
        ("w-pages-articles1.xml-p1p9", "w-pages-articles-multistream1.xml-p1p9"),
    ],
)
def test_one_dump_in_two_forms_is_refused(tmp_path, names):
    for name in names:
        write(tmp_path / "in" / name, DUMP.format("w"))
    with pytest.raises(ConfigError, match="are the same dump|is a piece of"):
        dump_files(tmp_path / "in")
    write(tmp_path / "in" / names[0].replace("articles", "articles7"), DUMP.format("w"))
    (tmp_path / "in" / names[1]).unlink()
    assert len(dump_files(tmp_path / "in")) == 2


def test_dumps_of_two_wikis_in_one_folder_are_refused(tmp_path):
    for wiki in ("fiwiki", "huwiki"):
        write(tmp_path / "in" / f"{wiki}.xml", DUMP.format(wiki))
    with pytest.raises(ConfigError, match=r"fiwiki.xml is of fiwiki, huwiki.xml of huwiki; give the files one by one"):
        find_sources(ExtractOptions((str(tmp_path / "in"),), str(tmp_path / "out")))


def test_identifiers_are_those_of_a_first_run(tmp_path, monkeypatch):
    """Parts whose bytes moved, within their file or to another name, have other identifiers."""
    monkeypatch.setattr(document_tasks, "__defaults__", (".txt", 100))
    lines = [f"Document {number} of the file.\n\n" for number in range(20)]
    source = write(tmp_path / "in" / "a" / "x.txt", "".join(lines))
    rows, _ = run(tmp_path, tmp_path / "in", documents="blank_line")
    write(source, "".join(["More " + lines[0], *lines[1:]]))
    again, _ = run(tmp_path, tmp_path / "in", documents="blank_line")
    shutil.rmtree(tmp_path / "out")
    fresh, _ = run(tmp_path, tmp_path / "in", documents="blank_line")
    assert again == fresh and {row["id"] for row in again} != {row["id"] for row in rows}
    (tmp_path / "in" / "a").rename(tmp_path / "in" / "b")
    moved, _ = run(tmp_path, tmp_path / "in", documents="blank_line")
    assert moved and all(row["id"].startswith("in/b/x.txt") for row in moved)


def test_names_that_are_not_utf_8(tmp_path):
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "in") + b"/\xe1rv.txt")).write_text("Text.", encoding="utf-8")
    rows, _ = run(tmp_path, tmp_path / "in")
    assert [row["id"] for row in rows] == ["in/\\xe1rv.txt"]


@pytest.mark.parametrize("name", ["text", "title", "id"])
@pytest.mark.parametrize("file", ["a.jsonl", "wiki_00"])
def test_half_a_surrogate_pair_is_named(tmp_path, file, name):
    write(tmp_path / "in" / file, json.dumps({"id": "1", "title": "A", "text": "Text.", name: "x \ud83d"}) + "\n")
    with pytest.raises(DataError, match=rf"line 1: its {name} has half a surrogate pair"):
        run(tmp_path, tmp_path / "in")


def test_weights(tmp_path):
    rows, counts = run(tmp_path, texts(tmp_path, "a", 200), texts(tmp_path, "b", 200), weight=(2.0, 0.25))
    names = [row["id"] for row in rows]
    assert len(set(names)) == len(names)
    assert sorted(name for name in names if name.startswith("a/")) == sorted(f"a/d{n}{copy}" for n in range(200) for copy in ("", "#copy2"))
    chosen = {name for name in names if name.startswith("b/")}
    assert 25 < len(chosen) < 80
    assert counts["documents_in"] + counts["copies"] == counts["documents_out"] + counts["rejected_weight"] == 600
    lines = (tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    write(tmp_path / "b.jsonl", "".join(reversed(lines)))
    again, _ = run(tmp_path, tmp_path / "b.jsonl", weight=(0.25,))
    assert {row["id"] for row in again} == chosen, "the choice must not depend on the order"


def test_sources_of_one_name_stay_apart(tmp_path):
    one, other = write(tmp_path / "x" / "part.txt", "one"), write(tmp_path / "y" / "part.txt", "two")
    rows, _ = run(tmp_path, one, other)
    assert [(row["id"], row["source"]) for row in rows] == [("part/part.txt#0", "part"), ("part_2/part.txt#0", "part_2")]


def test_changed_options_and_inputs_make_parts_again(tmp_path):
    source = texts(tmp_path, "a", 5)
    options = ExtractOptions((str(source),), str(tmp_path / "out"))
    assert [extract(options).made for _ in range(2)] == [1, 0]
    assert extract(ExtractOptions((str(source),), str(tmp_path / "out"), weight=(2.0,))).made == 1
    write(source, source.read_text(encoding="utf-8").replace("Text 3", "Text three"))
    assert extract(ExtractOptions((str(source),), str(tmp_path / "out"), weight=(2.0,))).made == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": (1.0, 2.0)}, "--weight has 2 values for 1 inputs"),
        ({"weight": (0.0,)}, "--weight must be above 0"),
        ({"weight": (float("nan"),)}, "--weight must be above 0"),
        ({"format": "pdf"}, "--format pdf is not one of"),
        ({"processes": 0}, "--processes 0"),
        ({"output_dir": "out.v1"}, "--output_dir out.v1 must name a folder"),
        ({"inputs": ("-", "-")}, "--input - can be given once"),
        ({"namespaces": ()}, "--namespaces needs"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        ExtractOptions(**{"inputs": ("x",), "output_dir": "out", **options})


def test_inputs_that_would_come_twice_are_refused(tmp_path):
    write(tmp_path / "in" / "a.txt", "x")
    with pytest.raises(ConfigError, match="overlap: documents would come twice"):
        run(tmp_path, tmp_path / "in", tmp_path / "in" / "a.txt")
    with pytest.raises(ConfigError, match="lies in the input folder"):
        ExtractOptions((str(tmp_path / "in"),), str(tmp_path / "in" / "out"))


def test_nothing_with_text_is_an_error(tmp_path):
    write(tmp_path / "in" / "a.txt", " \n")
    with pytest.raises(DataError, match=r"no document with text .1 empty"):
        run(tmp_path, tmp_path / "in")


def test_missing_libraries_are_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("berth.corpus.extract.parser_installed", lambda: False)
    write(tmp_path / "a.parquet", "x")
    write(tmp_path / "saved" / "state.json", "{}")
    write(tmp_path / "d.xml", "<mediawiki></mediawiki>")
    for name, extra in (("a.parquet", "parquet"), ("saved", "datasets"), ("d.xml", "mediawiki")):
        with pytest.raises(ConfigError, match=rf"{name}.* pip install \"berth\[{extra}\]\""):
            run(tmp_path, tmp_path / name)
