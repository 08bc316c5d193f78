"""The word cache equals tokenising line by line; edges are right; nothing becomes a special token."""

import numpy as np
import pytest

from berth.errors import DataError
from berth.records import tokens
from berth.records.tokens import tokenize_files
from berth.text.tokenizer import load_tokenizer
from berth.text.vocabulary import SPECIAL_TOKENS, Vocabulary

LETTERS = "abcdefghijklmnopqrstuvwxyzé汉.,[]ABC"
VOCABULARY = Vocabulary((*SPECIAL_TOKENS, *LETTERS, *("##" + letter for letter in LETTERS), "the", "##ing"), "0" * 64)
LINES = [
    "The king's thing, abc [SEP] [MASK].x",
    "tab\tand\u00a0space\u2003wide",
    "form\x0cfeed next\x85line \x1cunit a\x0bb",
    "zero\u200bwidth soft\u00adhyphen \ufffd nul\x00l",
    "Élan É e\u0301 汉字汉 a汉b",
    "x" * 150 + " ok",
    "\u2028line\u2029para",
]


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize(("block", "words", "batch"), [(400, 3, 2), (1 << 20, 300_000, 4000)])
def test_equals_line_by_line(tmp_path, monkeypatch, lowercase, block, words, batch):
    """Also when lines are read in pieces, words are forgotten and encoded a few at a time."""
    monkeypatch.setattr("berth.text.lines.BLOCK_BYTES", block)
    monkeypatch.setattr(tokens, "MOST_WORDS", words)
    monkeypatch.setattr(tokens, "_ENCODE_BATCH", batch)
    path = tmp_path / "t.txt"
    path.write_bytes("\n".join(LINES * 3).encode())
    text = tokenize_files([path], VOCABULARY, lowercase)
    tokenizer = load_tokenizer(VOCABULARY, lowercase, special_tokens=False)
    wanted = [tokenizer.encode(line).ids for line in LINES * 3]
    assert text.ids.tolist() == [piece for line in wanted for piece in line]
    assert np.diff(text.sentence_edges).tolist() == [len(line) for line in wanted]
    assert not np.isin(text.ids, [0, 2, 3, 4]).any(), "text became a special token"
    assert text.ids.dtype == np.uint16
    assert text.unknown == np.count_nonzero(text.ids == 1)


def test_edges_and_empty_documents(tmp_path):
    first, second = tmp_path / "1.txt", tmp_path / "2.txt"
    first.write_bytes(b"\n\na b\r\nc\r\n\r\n\r\n\xe2\x80\x8b\n\nd\n\xe2\x80\x8b\ne f")
    second.write_bytes(b"a\n\x0c\nb c d\n")
    text = tokenize_files([first, second], VOCABULARY, True)
    assert text.sentence_edges.tolist() == [0, 2, 3, 4, 6, 7, 10]
    assert text.document_edges.tolist() == [0, 2, 4, 5, 6]
    assert text.document_tokens.tolist() == [0, 3, 6, 7, 10]
    assert (text.empty_sentences, text.empty_documents) == (2, 1)


def test_blocks_do_not_make_documents(tmp_path, monkeypatch):
    """Text longer than a read block: a block edge is not a blank line."""
    monkeypatch.setattr("berth.text.lines.BLOCK_BYTES", 64)
    path = tmp_path / "t.txt"
    path.write_text("\n\n".join("\n".join(["é the king"] * 40) for _ in range(3)), encoding="utf-8")
    text = tokenize_files([path], VOCABULARY, True)
    assert text.document_edges.tolist() == [0, 40, 80, 120]


def test_no_text(tmp_path):
    path = tmp_path / "t.txt"
    for content in ("", "\n\n", "\u200b\n"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match="no text"):
            tokenize_files([path], VOCABULARY, True)
