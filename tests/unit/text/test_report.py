"""The report's figures, by hand."""

from collections import Counter

import pytest

from berth.errors import DataError
from berth.text.counting import count_text
from berth.text.report import evaluate_wordpiece, file_words
from berth.text.vocabulary import SPECIAL_TOKENS, Vocabulary

VOCABULARY = Vocabulary(("[PAD]", "[unused0]", *SPECIAL_TOKENS[1:], "a", "##b", "cat", "##s", ".", "never"), "0" * 64)
TEXT = "cats cat ab. \u00e9a cat " + "x" * 101 + "\n"  # cat ##s | cat | a ##b | . | [UNK] | cat | [UNK]


@pytest.mark.parametrize("from_file", [True, False])
def test_figures_by_hand(tmp_path, from_file):
    path = tmp_path / "t.txt"
    path.write_text(TEXT, encoding="utf-8")
    counts = None if from_file else count_text([path], "bert", False)
    report = evaluate_wordpiece(VOCABULARY, counts, file=path if from_file else None)
    assert (report.size, report.special, report.unused, report.alphabet, report.never_used) == (12, 5, 1, 2, 1)
    assert (report.words, report.tokens, report.unk_words) == (7, 9, 2)
    assert report.unk_word_share == pytest.approx(2 / 7) and report.unk_token_share == pytest.approx(2 / 9)
    assert report.fertility == pytest.approx(9 / 7) and report.whole_word_share == pytest.approx(3 / 7)
    # of c a t s c a t a b . \u00e9 a c a t the vocabulary holds a, ##b, ##s and the point
    assert report.characters == 15 and report.character_coverage == pytest.approx(8 / 15)
    assert report.longest_pieces[:2] == ("never", "cat")
    assert any("28.5714 %" in line for line in report.lines())


def test_white_space_words_are_split_before_they_are_measured(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(TEXT, encoding="utf-8")
    raw, split = (count_text([path], rule, False) for rule in ("whitespace", "bert"))
    assert raw.words != split.words
    assert evaluate_wordpiece(VOCABULARY, raw, rule="whitespace") == evaluate_wordpiece(VOCABULARY, split)


def test_lower_case_is_for_files_only(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("Cat CAT\n")
    assert evaluate_wordpiece(VOCABULARY, file=path, lowercase=True).unk_words == 0
    assert evaluate_wordpiece(VOCABULARY, file=path, lowercase=False).unk_words == 2


def test_text_without_a_word(tmp_path):
    (tmp_path / "t.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no word"):
        list(file_words(tmp_path / "t.txt", "bert", True))
    assert sum((words for words, _, _ in file_words_of(tmp_path, "a a b")), Counter()) == Counter({"a": 2, "b": 1})


def file_words_of(folder, text):
    (folder / "u.txt").write_text(text)
    return file_words(folder / "u.txt", "bert", True)
