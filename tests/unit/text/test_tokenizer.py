"""The tokenizer: cased stays cased, text can never become a special token."""

import unicodedata

import pytest

from berth.text.counting import WordSplitter
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


TEXTS = {
    "chinese": "我爱北京天安门。自然语言处理2021年",
    "chinese and latin": "使用Python3的BERT模型，准确率92.5%！",
    "accents": "Árvíztűrő tükörfúrógép Crème brûlée naïve Ångström",
    "combining accents": "A\u0301rvi\u0301z cafe\u0301",
    "turkish i": "\u0130stanbul ISPARTA \u0131l\u0131k I\u011fd\u0131r",
    "persian with zero-width non-joiner": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u06a9\u062a\u0627\u0628\u200c\u0647\u0627",
    "arabic with vowels": "\u0627\u064e\u0644\u0652\u0639\u064e\u0631\u064e\u0628\u0650\u064a\u064e\u0651\u0629\u064f \u060c \u061f",
    "emoji": "I \u2764\ufe0f \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1ed\U0001f1fa\U0001f642!",
    "controls": "a\x00b\x07c\ufffdd\u200be\u00ade\tf\rg\x7fh",
    "cjk extensions": "\U00020000\U0002a6d6\U00020bb7\u91ce\u5bb6 \U0002f800 \u3400a\U0002b740b\U0002ceb0c \U00030000d",
    "japanese": "かなカナ漢字ｶﾅ",
    "korean": "한국어 형태소",
    "thai and hindi": "ภาษาไทย हिन्दी क्षत्रिय",
    "full width": "ＡＢＣ１２３，。！",
    "german": "Straße GRO\u1e9e \ufb01ne",
    "spaces": "a\u00a0b\u2003c\u3000d\u2028e\u1680f",
    "punctuation": "`a´ «b» “c” d—e … f·g ¿h? $5+3=8 ^~|<>",
}


@pytest.fixture(scope="module")
def legacy():
    """transformers' Python tokenizer, written after Google's."""
    return pytest.importorskip(
        "transformers.models.bert.tokenization_bert_legacy", reason="this transformers has no Python BERT tokenizer to compare with"
    )


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("name", TEXTS)
def test_equals_the_python_tokenizer_of_bert(legacy, name, lowercase):
    """Words and pieces; a cased text in NFC, which transformers (not Google) makes of it first."""
    text = TEXTS[name] if lowercase else unicodedata.normalize("NFC", TEXTS[name])
    words = legacy.BasicTokenizer(do_lower_case=lowercase).tokenize(text)
    assert [word for raw in WordSplitter("bert", lowercase).raw(text) for word in WordSplitter("bert", lowercase).words(raw)] == words
    characters = sorted({character for word in words for character in word})
    known = [*SPECIAL_TOKENS, *characters[::2], *("##" + c for c in characters[1::2]), *dict.fromkeys(w for w in words[::3] if len(w) > 1)]
    vocabulary = Vocabulary(tuple(dict.fromkeys(known)), "0" * 64)
    reference = legacy.WordpieceTokenizer(vocabulary.ids, "[UNK]")
    expected = [piece for word in words for piece in reference.tokenize(word)]
    assert load_tokenizer(vocabulary, lowercase, special_tokens=False).encode(text).tokens == expected


@pytest.mark.parametrize(
    ("text", "lowercase", "expected"),
    [
        ("ab汉字c", True, ["ab", "汉", "字", "c"]),
        ("BERT模型2021年", True, ["bert", "模", "型", "2021", "年"]),
        ("BERT模型2021年", False, ["BERT", "模", "型", "2021", "年"]),
        ("\U00020bb7\u91ce\u5bb6", False, ["\U00020bb7", "\u91ce", "\u5bb6"]),
        ("\u0130I\u0131", True, ["ii\u0131"]),
        ("\u0130I\u0131", False, ["\u0130I\u0131"]),
        ("\u0645\u06cc\u200c\u062e", True, ["\u0645\u06cc\u062e"]),
        ("a\x00b\u00adc\u200bd", True, ["abcd"]),
        ("かなカナ", False, ["かなカナ"]),
        # Python lower-cases a sigma at the end of a word to \u03c2, the Rust library to \u03c3; the same in training, records, inference
        ("\u039f\u0394\u03a5\u03a3\u03a3\u0395\u03a5\u03a3", True, ["\u03bf\u03b4\u03c5\u03c3\u03c3\u03b5\u03c5\u03c3"]),
        ("\u03c3\u03bf\u03c6\u03cc\u03c2", True, ["\u03c3\u03bf\u03c6\u03bf\u03c2"]),
    ],
)
def test_words_by_hand(text, lowercase, expected):
    splitter = WordSplitter("bert", lowercase)
    assert [word for raw in splitter.raw(text) for word in splitter.words(raw)] == expected
