"""Sentence splitting: nothing lost, no document split, no network, the same every time."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import nltk
import pytest

from berth.corpus.documents import read_documents
from berth.corpus.sentences import make_sentences, split_paragraph, train_splitter
from berth.errors import DataError

ROOT = Path(__file__).resolve().parents[3]
TEXT = [
    "The ship left port at dawn. It carried grain and 3.5 tons of salt! Did Mr. Smith see it? He did.",
    "Nobody knew\u00a0why.  The\tharbour was empty. \u201cWait,\u201d he said. Then nothing.",
]


def corpus(folder: Path) -> Path:
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"{TEXT[0]}\n\n{TEXT[1]} Number {number} ends here.\n", encoding="utf-8")
    return folder


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_every_character_survives_and_documents_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk, "download", lambda *a, **k: pytest.fail("nltk.download was called"))
    source = corpus(tmp_path / "raw")
    counts = make_sentences(source, tmp_path / "out" / "sentences.txt")
    written = (tmp_path / "out" / "sentences.txt").read_text(encoding="utf-8")
    documents = written.split("\n\n")
    assert len(documents) == counts.documents == 6
    for found, raw in zip(documents, read_documents(source), strict=True):
        assert squeezed(found) == squeezed(" ".join(raw.paragraphs))
    assert counts.characters == len(squeezed(written))
    lines = [line for line in written.splitlines() if line]
    assert counts.sentences == len(lines) >= 6 * 6
    assert all(line == " ".join(line.split()) for line in lines)
    assert "He did." in lines


@pytest.mark.parametrize("paragraph", ["x", "...", "a. b", "No end", "? ! ?", "e.g. this.And that.", "第一句。第二句。"])
def test_odd_paragraphs_are_kept(tmp_path, paragraph):
    path = tmp_path / "t.txt"
    path.write_text(paragraph, encoding="utf-8")
    documents = list(read_documents(path))
    splitter = train_splitter(documents)
    assert " ".join(split_paragraph(splitter, paragraph)).split() == paragraph.split()
    make_sentences(path, tmp_path / "s.txt")
    assert squeezed((tmp_path / "s.txt").read_text(encoding="utf-8")) == squeezed(paragraph)


def test_same_bytes_in_every_process(tmp_path):
    source = corpus(tmp_path / "raw")
    digests = set()
    for seed in ("0", "1", "2"):
        output = tmp_path / f"{seed}.txt"
        command = [sys.executable, str(ROOT / "data/sentences.py"), "--input", str(source), "--output", str(output)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, cwd=tmp_path)
        digests.add(hashlib.sha256(output.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_no_output_when_the_input_is_bad(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"fine. \xff")
    with pytest.raises(DataError, match="offset 6"):
        make_sentences(tmp_path / "bad.txt", tmp_path / "out.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]
