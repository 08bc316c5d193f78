"""The stage sentences: nothing lost, no document split, no network, the same every time."""

import json

import nltk
import pytest

from berth.corpus import sentences
from berth.corpus.documents import read_documents
from berth.corpus.sentences import SentenceWorker, make_sentences, output_of
from berth.errors import ConfigError, DataError

TEXT = [
    "The ship left port at dawn. It carried grain and 3.5 tons of salt! Did Mr. Smith see it? He did.",
    "Nobody knew\u00a0why.  The\tharbour was empty. \u201cWait,\u201d he said. Then nothing.",
]


def corpus(folder, count=6):
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.txt").write_text(f"{TEXT[0]}\n\n{TEXT[1]} Number {number} ends here.\n", encoding="utf-8")
    return folder


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_every_character_survives_and_documents_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk, "download", lambda *a, **k: pytest.fail("nltk.download was called"))
    source = corpus(tmp_path / "raw")
    counts = make_sentences(source, tmp_path / "out" / "sentences.txt").counts
    written = (tmp_path / "out" / "sentences.txt").read_text(encoding="utf-8")
    documents = written.split("\n\n")
    assert len(documents) == counts["documents_out"] == counts["documents_in"] == 6
    for found, raw in zip(documents, read_documents(source), strict=True):
        assert squeezed(found) == squeezed(" ".join(raw.paragraphs))
    assert counts["characters"] == len(squeezed(written))
    lines = [line for line in written.splitlines() if line]
    assert counts["sentences"] == len(lines) >= 6 * 6
    assert all(line == " ".join(line.split()) for line in lines)
    assert "He did." in lines


@pytest.mark.parametrize(
    "paragraph", ["x", "...", "a. b", "No end", "? ! ?", "e.g. this.And that.", "\u7b2c\u4e00\u53e5\u3002\u7b2c\u4e8c\u53e5\u3002"]
)
@pytest.mark.parametrize("segmenter", ["nltk", "rules"])
def test_odd_paragraphs_are_kept(tmp_path, paragraph, segmenter):
    path = tmp_path / "t.txt"
    path.write_text(paragraph, encoding="utf-8")
    make_sentences(path, tmp_path / "s.txt", segmenter=segmenter)
    assert squeezed((tmp_path / "s.txt").read_text(encoding="utf-8")) == squeezed(paragraph)


def test_parts_of_a_folder_are_the_single_file(tmp_path):
    text = "\n\n".join(f"{TEXT[0]}\n{TEXT[1]} Number {number}." for number in range(200)) + "\n"
    source = tmp_path / "raw.txt"
    source.write_bytes(text.replace("\n", "\r\n").encode())
    one = make_sentences(source, tmp_path / "one.txt", part_bytes=5000)
    many = make_sentences(source, tmp_path / "parts", part_bytes=5000)
    parts = sorted((tmp_path / "parts").glob("sentences_*.txt"))
    assert len(parts) > 5 and one.counts == many.counts and one.counts["documents_out"] == 200
    assert "\n".join(part.read_text(encoding="utf-8") for part in parts) == (tmp_path / "one.txt").read_text(encoding="utf-8")
    again = make_sentences(source, tmp_path / "parts", part_bytes=5000)
    assert (again.made, again.kept) == (0, len(parts))


def test_empty_documents_are_counted(tmp_path):
    source = corpus(tmp_path / "raw", 2)
    (source / "empty.txt").write_text("")
    (source / "blank.txt").write_text(" \n\n\t\n")
    (source / "one.txt").write_text("One sentence")
    counts = make_sentences(source, tmp_path / "s.txt").counts
    assert (counts["documents_in"], counts["documents_out"], counts["rejected_empty"], counts["one_sentence_documents"]) == (5, 3, 2, 1)
    assert (tmp_path / "s.txt").read_text(encoding="utf-8").count("\n\n") == 2


def test_hard_wrapped_text(tmp_path):
    (tmp_path / "w.txt").write_text("A line that\nis wrapped. Another\nsentence.\n\nNext document\nhere.\n")
    make_sentences(tmp_path / "w.txt", tmp_path / "s.txt", join_lines=True)
    assert (tmp_path / "s.txt").read_text() == "A line that is wrapped.\nAnother sentence.\n\nNext document here.\n"


def test_json_lines(tmp_path):
    lines = [{"id": "1", "text": "One here. Two here.\nThree."}, {"id": "2", "text": " "}, {"id": "3", "text": "Four."}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    counts = make_sentences(tmp_path / "x.jsonl", tmp_path / "s.txt").counts
    assert (tmp_path / "s.txt").read_text() == "One here.\nTwo here.\nThree.\n\nFour.\n"
    assert counts["rejected_empty"] == 1


def test_the_model_is_saved_and_serves_again(tmp_path):
    source = corpus(tmp_path / "raw")
    make_sentences(source, tmp_path / "a.txt")
    saved = tmp_path / "a.txt.punkt.json"
    make_sentences(source, tmp_path / "b.txt", model=str(saved))
    assert (tmp_path / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes()
    options = [json.loads((tmp_path / f"{name}.txt.sentences.json").read_text())["options"] for name in "ab"]
    assert options[0] == options[1] and len(options[0]["model"]) == 64


def test_a_long_line_is_split_through_a_window(tmp_path):
    line = " ".join(f"Sentence {number} of a long line ends." for number in range(60_000))
    (tmp_path / "long.txt").write_text(line)
    counts = make_sentences(tmp_path / "long.txt", tmp_path / "s.txt", segmenter="rules").counts
    assert counts["sentences"] == 60_000 and counts["paragraphs"] == 1


def test_a_segmenter_that_loses_text_stops_the_run(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("One. Two.")
    monkeypatch.setattr(sentences, "sentence_blocks", lambda starts, text: [[text[:4]]])
    with pytest.raises(AssertionError, match="lost text"):
        make_sentences(tmp_path / "t.txt", tmp_path / "s.txt")
    assert not (tmp_path / "s.txt").exists()


@pytest.mark.parametrize("segmenter", ["nltk", "rules"])
def test_no_output_when_the_input_is_bad(tmp_path, segmenter):
    (tmp_path / "bad.txt").write_bytes(b"fine. \xff")
    with pytest.raises(DataError, match="offset 6"):
        make_sentences(tmp_path / "bad.txt", tmp_path / "out.txt", segmenter=segmenter)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]
    (tmp_path / "bad.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="no text"):
        make_sentences(tmp_path / "bad.txt", tmp_path / "out.txt", segmenter=segmenter)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_worker_is_plain_data(tmp_path):
    import pickle

    from berth.corpus.segmenters import choose_segmenter

    worker = SentenceWorker(choose_segmenter("nltk", "en", None, [TEXT[0]]), "file", False)
    assert pickle.loads(pickle.dumps(worker)) == worker


@pytest.mark.parametrize(
    ("output", "output_dir", "message"),
    [
        (None, None, "one of the two"),
        ("a.txt", "b", "one of the two"),
        ("a", None, "suffix"),
        (None, "a.d", "no suffix"),
        (None, "raw/inside", "lie in each other"),
        ("raw/new.txt", None, "input folder"),
    ],
)
def test_outputs_that_cannot_be(tmp_path, monkeypatch, output, output_dir, message):
    monkeypatch.chdir(tmp_path)
    corpus(tmp_path / "raw")
    with pytest.raises(ConfigError, match=message):
        output_of(output, output_dir, "raw")
