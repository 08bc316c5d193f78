"""The tokenizer: cased stays cased, text can never become a special token."""

import pytest

from berth.text.tokenizer import drop_controls, load_tokenizer
from berth.text.vocabulary import SPECIAL_TOKENS, Vocabulary

PIECES = [*SPECIAL_TOKENS, "Árvíztűrő", "arvizturo", "a", "##b", "b", "[", "]", "sep", "SEP", "mask", "MASK", "汉", "字", ".", "x"]
VOCABULARY = Vocabulary(tuple(PIECES), "0" * 64)


def pieces(text, lowercase, special_tokens=False, **options):
    return load_tokenizer(VOCABULARY, lowercase, special_tokens).encode(text, **options).tokens


def test_case_and_accents_go_together():
    assert pieces("Árvíztűrő", lowercase=False) == ["Árvíztűrő"]
    assert pieces("Árvíztűrő", lowercase=True) == ["arvizturo"]


@pytest.mark.parametrize(("lowercase", "sep", "mask"), [(True, "sep", "mask"), (False, "SEP", "MASK")])
def test_literal_special_tokens_are_text(lowercase, sep, mask):
    assert pieces("[SEP]x [MASK].", lowercase) == ["[", sep, "]", "x", "[", mask, "]", "."]


def test_special_tokens_for_inference():
    assert pieces("a [MASK].", True, special_tokens=True) == ["[CLS]", "a", "[MASK]", ".", "[SEP]"]
    encoding = load_tokenizer(VOCABULARY, True).encode("a", "b")
    assert encoding.tokens == ["[CLS]", "a", "[SEP]", "b", "[SEP]"]
    assert encoding.type_ids == [0, 0, 0, 1, 1]


def test_cjk_characters_stand_alone_and_long_words_are_unknown():
    assert pieces("a汉字b", True) == ["a", "汉", "字", "b"]
    assert pieces("a" * 101, True) == ["[UNK]"]


@pytest.mark.parametrize("control", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x85"])
def test_controls_that_split_are_dropped_like_bert_does(control):
    line = f"a{control}b x"
    by_word = [piece for word in drop_controls(line).split() for piece in pieces(word, True)]
    assert by_word == pieces(line, True) == ["a", "##b", "x"]
