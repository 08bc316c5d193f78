"""vocab.txt: what is accepted, and that every defect is named."""

import hashlib

import numpy as np
import pytest

from berth.errors import DataError
from berth.text.vocabulary import SPECIAL_TOKENS, Vocabulary

GOOD = [*SPECIAL_TOKENS, "[unused0]", "[unused12]", "a", "##b", "##", "[x]"]


def save(path, pieces, end="\n"):
    path.write_bytes((end.join(pieces) + end).encode())
    return path


def test_load(tmp_path):
    path = save(tmp_path / "v.txt", GOOD)
    vocabulary = Vocabulary.load(path)
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.unk_id) == (11, 0, 1)
    assert (vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id) == (2, 3, 4)
    assert vocabulary.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert np.flatnonzero(~vocabulary.is_special_or_unused).tolist() == [7, 8, 9, 10]
    assert np.flatnonzero(vocabulary.is_continuation).tolist() == [8]


def test_windows_line_ends_and_no_final_line_end(tmp_path):
    assert Vocabulary.load(save(tmp_path / "v.txt", GOOD, "\r\n")).pieces == tuple(GOOD)
    (tmp_path / "w.txt").write_text("\n".join(GOOD))
    assert Vocabulary.load(tmp_path / "w.txt").pieces == tuple(GOOD)


def test_white_space_can_be_a_piece(tmp_path):
    """Some multilingual vocabularies hold U+2028 and the like; only the line feed ends a line."""
    assert Vocabulary.load(save(tmp_path / "v.txt", [*GOOD, "\u2028", "\u00a0"])).size == 13


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([*GOOD, "a"], r"'a' stands on line 8 and again on line 12"),
        ([*GOOD[:6], "", "a"], "line 7 is empty"),
        ([piece for piece in GOOD if piece not in ("[MASK]", "[CLS]")], r"\[CLS\], \[MASK\] are missing"),
        (["a", *SPECIAL_TOKENS], r"\[PAD\] stands on line 2 but must be line 1"),
        ([*SPECIAL_TOKENS, "[unused1]"], "no ordinary piece"),
    ],
)
def test_defects_are_named(tmp_path, pieces, message):
    with pytest.raises(DataError, match=message):
        Vocabulary.load(save(tmp_path / "v.txt", pieces))


def test_missing_and_not_utf8(tmp_path):
    with pytest.raises(DataError, match="no such vocabulary file"):
        Vocabulary.load(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("[PAD]\nő".encode("iso-8859-2"))
    with pytest.raises(DataError, match="offset 6"):
        Vocabulary.load(tmp_path / "latin.txt")
