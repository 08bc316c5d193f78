"""Wikitext to prose, and dumps to pages: what is dropped, where files are cut, damaged files, pathological pages."""

import bz2
import gzip
import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.corpus import mediawiki
from berth.corpus.mediawiki import Batch, DumpReader, Site, cut_dump, file_batches, raw_pages, read_site
from berth.corpus.parts import Span
from berth.corpus.wikitext import Wikitext, hidden_names
from berth.errors import DataError

HU = hidden_names([(-2, "Média"), (6, "Fájl"), (14, "Kategória"), (0, "")])
WIKI = Wikitext(HU)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("'''Bold''' and ''it'' and '''''both'''''.", ["Bold and it and both."]),
        ("A [[link]], a [[target|label]], [[word]]s, [[:Kategória:X|seen]], [[#Part]].", ["A link, a label, words, seen, #Part."]),
        ("[[Fájl:a.jpg|thumb|Caption with [[a link]] and [http://x y].]]Text.", ["Text."]),
        ("[[File:b.png|right]] [[Kategória:Városok]] [[Category:Cities]] [[Kép:c.svg|régi név]] Text.", ["Text."]),
        ("Text.\n[[de:Stadt]]\n[[zh-min-nan:X]]", ["Text."]),
        ("Before{{infobox|a={{nested|{{deep}}}}|b=[[x]]}} after.", ["Before after."]),
        ("One.\n\n{| class=x\n! head\n|-\n| cell {{t}}\n{| \n| inner\n|}\n|}\nTwo.", ["One.", "Two."]),
        ('Fact.<ref name="a">{{cite|x}}</ref> More.<ref name="a" /> End.<ref>unclosed', ["Fact. More. End.unclosed"]),
        ("A<ref>never closed B<ref>x</ref> C<ref>y</ref>.", ["Anever closed B C."]),
        ("-{zh-hans:计算机;zh-hant:電腦;}-和-{原文}-。-{H|zh-cn:a;zh-tw:b}--{T|题}--{zh-cn|不变}-", ["计算机和原文。不变"]),
        ("A {{nowrap|{{convert|5|km}} or {{lang|fr|''x''{{sfn|y}}}}}} b {{infobox|{{nowrap|z}}}}.", ["A 5 km or x b."]),
        ("A <!-- secret {{ --> b <math>\\frac{a}{b}</math> c <gallery>\nFile:x.jpg|y\n</gallery> d", ["A b c d"]),
        ("== Title ==\nProse.\n* item\n# item\n: indented\n; term\n----\nMore.", ["Prose.", "More."]),
        ("wrapped\nline\n\nnext", ["wrapped line", "next"]),
        ("a<br />b <small>c</small> H<sub>2</sub>O<nowiki>[[raw]] ''x''</nowiki>", ["a b c H2O[[raw]] ''x''"]),
        ("Tom&nbsp;&amp;&lt;i&gt; &#9731;", ["Tom &<i> ☃"]),
        ("It is {{convert|5|km|mi}} or {{lang|fr|''mot''}}, {{nowrap|1 2}}{{sfn|x}}.", ["It is 5 km or mot, 1 2."]),
        ("Name ({{IPA|x}}; {{lang-hu|Név}}) is. Other ({{x}}, {{y}}) too.", ["Name (Név) is. Other too."]),
        ("See [http://example.org the site] or [http://example.org].", ["See the site or."]),
        ("__NOTOC__ __KEINTOC__ Árvíztűrő tükörfúrógép.", ["Árvíztűrő tükörfúrógép."]),
        ("|stray cell\n! stray head\n{{unclosed | x\nText stays.", ["{{unclosed | x Text stays.".replace("{{", "")]),
        ("", []),
        ("{{only}}\n[[Kategória:X]]", []),
    ],
)
def test_wikitext(source, expected):
    assert WIKI.paragraphs(source) == expected


def test_lists_and_headings_can_be_kept():
    source = "== Title ==\nProse.\n* first [[item]]\n** second\n"
    assert Wikitext(HU, keep_lists=True, keep_headings=True).paragraphs(source) == ["Title", "Prose.", "first item", "second"]


def test_what_the_fast_path_does_not_understand_goes_to_the_library():
    assert WIKI.paragraphs("A [[link|with [brackets] inside]] <foo>here</foo>.") == ["A with [brackets] inside here."]


def test_same_words_as_the_parser_library():
    parser = pytest.importorskip("mwparserfromhell")
    source = (
        "'''Pest''' is [[city|a city]] in [[Hungary]] &ndash; see [http://x.hu its page], ''old'' &amp; <b>new</b>, at the [[Danube]]s."
    )
    assert WIKI.paragraphs(source) == [" ".join(parser.parse(source).strip_code().split())]


@pytest.mark.parametrize(
    "piece",
    ["[[", "{{", "<ref>", "<ref ", "''a'''b", "<b>", "<foo>", "[[a|", "{|\n", "[[a [b ", "[http://a ", "<!--", "{{nowrap|[[a|", "(,", "= ", "<nowiki>", "\n|}"]
    + ["[http://a" + " " * 50, "]]", "}}", "( , ; ", "{{lang|a|", "<ref></ref", "<table><ref>"],
)  # fmt: skip
def test_pathological_pages_do_not_hang(piece):
    start = time.process_time()
    WIKI.paragraphs("x " + piece * (100_000 // len(piece)))
    WIKI.paragraphs("x " + piece * (4_000 // len(piece)))
    assert time.process_time() - start < 5


MARKUP = [
    "[[",
    "]]",
    "{{",
    "}}",
    "{|",
    "|}",
    "|",
    "\n",
    "<ref>",
    "</ref>",
    "<ref/>",
    "<!--",
    "-->",
    "[http://x ",
    "]",
    "=",
    "*",
    "<b>",
    "<x>",
]


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.sampled_from([*MARKUP, "''", "word", " ", "é", "Fájl:a.jpg", "lang|hu|", "(", ")", ",", "&lt;"]), max_size=60).map("".join)
)
def test_whatever_comes_is_prose_in_the_end(source):
    for paragraph in WIKI.paragraphs(source):
        assert paragraph.strip() == paragraph != ""
        assert not any(mark in paragraph for mark in ("[[", "]]", "{{", "}}", "<ref", "\n", "  "))


# ----------------------------------------------------------------------------------------------------------------- dumps


def page(number: int, text: str = "Text.", title: str | None = None, ns: int = 0, extra: str = "") -> str:
    return (
        f"  <page>\n    <title>{title or f'Page {number}'}</title>\n    <ns>{ns}</ns>\n    <id>{number}</id>\n{extra}    <revision>\n"
        f'      <id>9{number}</id>\n      <model>wikitext</model>\n      <text bytes="1" xml:space="preserve">{text}</text>\n    </revision>\n  </page>\n'
    )


HEAD = (
    '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="hu">\n  <siteinfo>\n    <dbname>huwiki</dbname>\n'
    '    <namespaces>\n      <namespace key="6" case="first-letter">Fájl</namespace>\n      <namespace key="0" case="first-letter" />\n'
    "    </namespaces>\n  </siteinfo>\n"
)
TAIL = "</mediawiki>\n"


def reader(site: Site | None = None) -> DumpReader:
    return DumpReader(site or Site("huwiki", ((6, "Fájl"),)), WIKI)


def whole(path):
    return Span(path, 0, path.stat().st_size)


def multistream(pages: list[str], a_stream: int) -> bytes:
    groups = ["".join(pages[at : at + a_stream]) for at in range(0, len(pages), a_stream)]
    return b"".join(bz2.compress(part.encode()) for part in (HEAD, *groups, TAIL))


def test_site(tmp_path):
    path = tmp_path / "d.xml.bz2"
    path.write_bytes(multistream([page(1)], 1))
    assert read_site(path) == Site("huwiki", ((6, "Fájl"), (0, "")))


def test_what_becomes_of_pages(tmp_path):
    path = tmp_path / "d.xml"
    pages = [
        page(1, "First &amp; [[Fájl:x.jpg|thumb]] best."),
        page(2, "#REDIRECT [[Page 1]]", extra='    <redirect title="Page 1" />\n'),
        page(3, "#redirect [[Page 1]]"),
        page(4, ns=1),
        page(5, "{{stub}}"),
        page(6, '{"a": 1}').replace("wikitext", "json"),
        "<page><title>Fájl:old.jpg</title><id>7</id><revision><text>Old dump without ns.</text></revision></page>",
        "<page><title>Deleted</title><ns>0</ns><id>8</id><revision><text deleted='deleted' /></revision></page>",
        page(9, "Old.</text></revision><revision><model>wikitext</model><text>New."),
    ]
    path.write_text(HEAD + "".join(pages) + TAIL, encoding="utf-8")
    found = [(item.name, item.paragraphs, item.reason) for item in reader().items(whole(path))]
    assert found == [
        ("1", ["First & best."], ""), ("2", [], "redirect"), ("3", [], "redirect"), ("4", [], "namespace"), ("5", [], ""),
        ("6", [], "no_wikitext"), ("7", [], "namespace"), ("8", [], ""), ("9", ["New."], ""),
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
def test_pages_are_found_whatever_the_size_of_the_pieces(size):
    data = (HEAD + page(1) + page(2, "b" * 50) + TAIL).encode()
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    found = list(raw_pages(pieces, "x", complete=True))
    assert [data[offset : offset + len(raw)] for offset, raw in found] == [raw for _, raw in found]
    assert [raw.decode() for _, raw in found] == [page(1).strip(), page(2, "b" * 50).strip()]


def test_a_page_that_is_too_long_is_counted_and_not_held(monkeypatch):
    monkeypatch.setattr(mediawiki, "MAX_PAGE_BYTES", 5000)
    data = (HEAD + page(1) + page(2, "b" * 6000) + page(3, "c" * 30_000) + page(4) + TAIL).encode()
    pieces = [data[at : at + 700] for at in range(0, len(data), 700)]
    found = [len(raw) > 0 for _, raw in raw_pages(pieces, "x", complete=True)]
    assert found == [True, False, False, True]
    assert [len(raw) > 0 for _, raw in raw_pages([data], "x", complete=True)] == found
    assert reader()._item(b"", "x").reason == "too_long"


@pytest.mark.parametrize("a_stream", [1, 10])
def test_multistream_is_cut_where_pages_begin(tmp_path, a_stream):
    pages = [page(number, f"Text {number} " + "x" * (number % 17)) for number in range(60)]
    path = tmp_path / "d.xml.bz2"
    path.write_bytes(multistream(pages, a_stream))
    spans = cut_dump(path, compressed_part_bytes=600)
    assert spans is not None and len(spans) > 2
    assert [spans[0].start, spans[-1].stop] == [0, path.stat().st_size]
    assert all(one.stop == other.start for one, other in itertools.pairwise(spans))
    assert [item.name for span in spans for item in reader().items(span)] == [str(number) for number in range(60)]


def test_plain_xml_is_cut_where_pages_begin(tmp_path):
    path = tmp_path / "d.xml"
    path.write_text(HEAD + "".join(page(number) for number in range(60)) + TAIL, encoding="utf-8")
    spans = cut_dump(path, part_bytes=1000)
    assert spans is not None and len(spans) > 5
    assert [item.name for span in spans for item in reader().items(span)] == [str(number) for number in range(60)]


def test_files_that_cannot_be_cut_are_read_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(mediawiki, "BATCH_BYTES", 1000)
    text = (HEAD + "".join(page(number, "Szöveg.") for number in range(60)) + TAIL).encode()
    parallel = b"".join(
        bz2.compress(text[at : at + 997]) for at in range(0, len(text), 997)
    )  # as pbzip2 writes: streams begin inside pages
    for name, data in (("a.xml.bz2", bz2.compress(text)), ("b.xml.gz", gzip.compress(text)), ("c.xml.bz2", parallel)):
        path = tmp_path / name
        path.write_bytes(data)
        assert cut_dump(path, part_bytes=100, compressed_part_bytes=100) is None, name
        batches = list(file_batches(path))
        assert len(batches) > 5
        assert all(isinstance(batch, Batch) for batch in batches)
        items = [item for batch in batches for item in reader().items(batch)]
        assert [(item.name, item.paragraphs) for item in items] == [(str(number), ["Szöveg."]) for number in range(60)]
        assert list(reader().items(whole(path))) == items


@pytest.mark.parametrize("kind", ["xml", "xml.bz2", "multi.xml.bz2", "xml.gz"])
@pytest.mark.parametrize("cut", [0.5, 0.98])
def test_a_file_that_was_cut_off_is_an_error(tmp_path, kind, cut):
    pages = [page(number, "Text " * (number % 9)) for number in range(300)]
    text = (HEAD + "".join(pages) + TAIL).encode()
    data = {"xml": text, "xml.bz2": bz2.compress(text), "multi.xml.bz2": multistream(pages, 20), "xml.gz": gzip.compress(text)}[kind]
    path = tmp_path / f"d.{kind}"
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(DataError, match=rf"d\.{kind}.* at byte \d+ .*cut off"):
        list(reader().items(whole(path)))


def test_a_multistream_file_cut_between_streams_is_an_error(tmp_path):
    path = tmp_path / "d.xml.bz2"
    path.write_bytes(multistream([page(number) for number in range(40)], 10)[: -len(bz2.compress(TAIL.encode()))])
    with pytest.raises(DataError, match="without </mediawiki>"):
        list(reader().items(whole(path)))


def test_damage_and_other_files_are_errors(tmp_path):
    path = tmp_path / "d.xml.bz2"
    path.write_bytes(multistream([page(1)], 1) + b"garbage behind")
    with pytest.raises(DataError, match=r"d\.xml\.bz2: bytes \d+ to \d+ are no valid bz2 data"):
        list(reader().items(whole(path)))
    path.write_bytes(multistream([page(1)], 1) + bytes(512))
    assert [item.name for item in reader().items(whole(path))] == ["1"], "padding is no damage"
    for data, message in (
        (b"plain text", "does not begin with <mediawiki>"),
        ((HEAD + TAIL).encode("utf-16"), "UTF-16; convert it first"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            read_site(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        cut_dump(path)


def test_invalid_utf8_and_xml_name_the_page(tmp_path):
    path = tmp_path / "d.xml"
    path.write_bytes((HEAD + page(1)).encode() + page(2, "árvíz").encode("iso8859-2") + TAIL.encode())
    with pytest.raises(DataError, match=r"d\.xml: the page at byte \d+ of the XML.* 0xe1 at offset \d+ that is not UTF-8"):
        list(reader().items(whole(path)))
    path.write_text(HEAD + page(1, "a < b") + TAIL, encoding="utf-8")
    with pytest.raises(DataError, match="damaged XML"):
        list(reader().items(whole(path)))


def test_entities_cannot_be_declared(tmp_path):
    path = tmp_path / "d.xml"
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY f SYSTEM "file:///x">]>\n'
    path.write_text(bomb + HEAD + page(1, "&a;&f;") + TAIL, encoding="utf-8")
    with pytest.raises(DataError, match="damaged XML"):
        list(reader().items(whole(path)))
