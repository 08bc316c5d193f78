"""Counting words: what a word is, and that cuts, processes and limits change nothing they should not."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from berth.errors import ConfigError, DataError
from berth.text import counting
from berth.text.counting import WordSplitter, count_text, cut_spans, prune, sample_spans
from berth.text.tokenizer import bert_normalizer, drop_controls

LINES = [
    "Árvíztűrő tükörfúrógép, 2021-ben (mp3)!",
    "汉字 and kana かな; don't stop\u00a0here \u2028 x",
    "a\tb  c   d",
    "e\x1cf g\u200dh",
    "\U00020000x \u0130stanbul \u1e9e",
]


def counted(path, **options):
    return count_text([path], options.pop("rule", "bert"), options.pop("lowercase", True), **options)


def reference(text, lowercase):
    """BERT's cleaning and splitting of whole lines, without any of the short ways."""
    normalizer, splitter = bert_normalizer(lowercase), pre_tokenizers.BertPreTokenizer()
    return Counter(word for line in text.split("\n") for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(line)))


@pytest.mark.parametrize("lowercase", [True, False])
def test_words_are_those_of_bert(tmp_path, lowercase):
    path = tmp_path / "t.txt"
    path.write_text("\n".join(LINES * 3) + "\n", encoding="utf-8")
    assert counted(path, lowercase=lowercase).words == reference("\n".join(LINES * 3), lowercase)


@given(st.text(max_size=12), st.booleans())
@settings(max_examples=300, deadline=None)
def test_short_ways_change_nothing(text, lowercase):
    splitter = WordSplitter("bert", lowercase)
    words = [word for raw in splitter.raw(text) for word in splitter.words(raw)]
    normalized = bert_normalizer(lowercase).normalize_str(drop_controls(text))
    assert words == [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(normalized)]


@given(
    st.lists(st.sampled_from(["a", " ", "  ", "\t", "don't", "é", "12", "!?", "\u00a0", "汉字", "I'll", "_x"]), max_size=10).map("".join)
)
@settings(max_examples=300, deadline=None)
def test_byte_rule_is_gpt2(text):
    splitter = WordSplitter("bytes", False)
    words = [word for raw in splitter.raw(text) for word in splitter.words(raw)]
    assert words == [word for word, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)]


def test_spans_cover_every_byte_and_end_between_words(tmp_path):
    path = tmp_path / "t.txt"
    data = ("szó kettő\n" * 3000 + "egy hosszú sor " * 9000 + "\n" + "汉" * 60000 + "\n").encode()
    path.write_bytes(data)
    spans = list(cut_spans([path], 20000))
    assert b"".join(data[span.start : span.stop] for span in spans) == data and len(spans) > 5
    assert all(data[span.start : span.stop].decode() for span in spans), "no character is cut"
    assert all(data[span.stop - 1 : span.stop] in (b"\n", b" ") for span in spans if span.stop < 150_000)


def test_processes_and_small_parts_do_not_matter(tmp_path, monkeypatch):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("\n".join(LINES * (number + 1)) + " ", encoding="utf-8")
    files = sorted(tmp_path.glob("*.txt"))
    whole = count_text(files, "bert", True)
    assert count_text(files, "bert", True, processes=2) == whole
    monkeypatch.setattr(counting, "PART_BYTES", 100)
    monkeypatch.setattr(counting, "_EDGE_BYTES", 200)
    parts = count_text(files, "bert", True)
    assert parts.words == whole.words and parts.characters == whole.characters


def test_rare_words_are_dropped_and_counted(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    common, rare = ("alpha beta gamma\n" * 200), "\n".join(f"w{number}" for number in range(5000))
    path.write_text(common + rare + "\n" + common, encoding="utf-8")
    monkeypatch.setattr(counting, "cut_spans", lambda files: cut_spans(files, 8192))
    monkeypatch.setattr(counting, "PART_BYTES", 8192)
    monkeypatch.setattr(counting, "_EDGE_BYTES", 64)
    counts = counted(path, max_words=1500)
    assert len(counts.words) <= 1500 and counts.dropped_words >= 3000
    assert counts.words["alpha"] == counts.words["gamma"] == 400
    assert counts.running_words == 1200 + 5000
    assert counts.characters["w"] == 5000, "characters of dropped words count, too"
    assert counted(path, max_words=1500) == counts == counted(path, max_words=1500, processes=2)


def test_prune_keeps_whole_frequencies():
    words = Counter({"a": 5, "b": 3, "c": 3, "d": 1})
    assert prune(words, 2) == (Counter({"a": 5}), 7)
    assert prune(words, 3) == (Counter({"a": 5, "b": 3, "c": 3}), 1)
    assert prune(Counter({"a": 1, "b": 1, "c": 1}), 2)[0] == Counter({"a": 1, "b": 1, "c": 1}), "nothing to choose by"


def test_samples_are_spread_and_repeatable(tmp_path):
    path, other = tmp_path / "t.txt", tmp_path / "u.txt"
    path.write_text("".join(f"line {number}\n" for number in range(100_000)))
    other.write_text("other\n" * 100_000)
    spans = list(sample_spans([path, other], 300_000, 1))
    size = sum(span.stop - span.start for span in spans)
    assert 250_000 < size < 350_000 and {span.file for span in spans} == {path, other}
    assert spans == sorted(spans, key=lambda span: (span.file != path, span.start))
    assert all(one.stop <= two.start for one, two in itertools.pairwise(spans) if one.file == two.file)
    assert spans == list(sample_spans([path, other], 300_000, 1)) != list(sample_spans([path, other], 300_000, 2))
    everything = count_text([path, other], "bert", True, sample_bytes=10**9)
    assert everything == count_text([path, other], "bert", True)
    assert set(count_text([path], "bert", True, sample_bytes=50_000).words) < set(everything.words), "no word is cut"


def test_long_words_are_counted_apart(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("ok " + "x" * 101 + " " + "y" * 100 + " " + "z" * 3_000_000)
    counts = counted(path)
    assert counts.words == Counter({"ok": 1, "y" * 100: 1}) and counts.running_words - 2 == counts.long_words <= 5


def test_bad_input(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"ok\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"empty\.txt: no word"):
        counted(tmp_path / "empty.txt")
    with pytest.raises(DataError, match=r"latin\.txt: byte 0xe9 at offset 6"):
        counted(tmp_path / "latin.txt")
    with pytest.raises(DataError, match="no such text file"):
        counted(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="--max_words 5"):
        counted(tmp_path / "latin.txt", max_words=5)
