"""The heuristics: counts as the classic regular expression gives them, order of tests, language detection."""

import dataclasses
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.corpus import filters
from berth.corpus.filters import PASS, TESTS, Limits, count, judge
from berth.corpus.languages import LANGUAGES, UNDETECTED, letters_of
from berth.errors import ConfigError

ALPHABET = st.sampled_from(
    "aA\u00e1\u00c1\u0151\u0150zZ\u00f5\u00d5\u044f\u042f\u4f60 19\u0663_-.,!?'\"%\u201e\u200c\U0001f600\u00df\u01c5"
)
LINE = st.text(ALPHABET, min_size=1, max_size=40)


def by_hand(lines: list[str], language: str) -> tuple[int, ...]:
    """The counts by the regular expression and Python's own character tests."""
    lower, upper = letters_of(LANGUAGES[language].alphabet)
    small, big = ("".join(map(re.escape, sorted(letters))) for letters in (lower, upper))
    shortest = 1 if language == "ko" else 2
    word = re.compile(rf"\b[{big}]?[{small}]{{{shortest},}}\b")
    found = [len(word.findall(line)) for line in lines]
    text = "".join(lines)
    return (
        len(lines),
        sum(found),
        sum(len(line.split()) for line in lines),
        sum(not number for number in found),
        len(text),
        sum(char in string.punctuation for char in text),
        sum(char.isupper() for char in text),
        sum(char.isdigit() for char in text),
        sum(char.isalpha() and char not in lower | upper for char in text),
    )


@settings(deadline=None)
@given(st.lists(st.lists(LINE, min_size=1, max_size=5), min_size=1, max_size=6), st.sampled_from(["hu", "ru", "en"]))
def test_counts_are_those_of_the_regular_expression(documents, language):
    counted = count(documents, LANGUAGES[language].alphabet, language)
    columns = [getattr(counted, field.name).tolist() for field in dataclasses.fields(counted)]
    assert list(zip(*columns, strict=True)) == [by_hand(lines, language) for lines in documents]


def test_long_documents_and_lines_are_counted_in_pieces(monkeypatch):
    long = "A haj\u00f3 1990-ben kifutott, EU x2 \u0441\u043b\u043e\u0432\u043e " * 30
    documents = [[long.strip()], ["r\u00f6vid sor"] * 40, ["1 2 3", long.strip(), "9 " * 80 + "9"], ["egy"]]
    alphabet = LANGUAGES["hu"].alphabet
    whole = count(documents, alphabet, "hu")
    monkeypatch.setattr(filters, "_PIECE", 100)
    pieces = count(documents, alphabet, "hu")
    for field in dataclasses.fields(whole):
        assert getattr(whole, field.name).tolist() == getattr(pieces, field.name).tolist(), field.name
    assert whole.wordless.tolist() == [0, 0, 2, 0]


def test_words_are_letters_where_no_spaces_part_them():
    counted = count([["\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002", "OK \u597d"]], LANGUAGES["zh"].alphabet, "zh")
    assert (counted.words[0], counted.tokens[0], counted.wordless[0], counted.foreign[0]) == (7, 8, 0, 2)
    counted = count([["\ub098 \uc9d1\uc5d0"]], LANGUAGES["ko"].alphabet, "ko")
    assert counted.words[0] == 2


WORD = "sz\u00f3lal "
GOOD = [("A haj\u00f3 reggel kifutott a kik\u00f6t\u0151b\u0151l \u00e9s d\u00e9lre tartott " + "tov\u00e1bb " * 5).strip() + "."] * 4


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (GOOD, "pass"),
        (["Egy k\u00e9t"] * 30, "avg_len"),
        ([" ".join(["sz\u00f3"] * 40)] * 2, "min_sents"),
        (GOOD * 300, "max_sents"),
        (["Ez itt csak \u00f6t sz\u00f3"] * 3, "min_toks"),
        ([" ".join(["sz\u00f3"] * 200)] * 60, "max_toks"),
        (GOOD + ["1 2 3"] * 2, "no_word"),
        ([line.replace(" ", ", ") for line in GOOD], "punct"),
        ([line.title().replace("o", "O") for line in GOOD], "upper"),
        ([line + " 1234567890" for line in GOOD], "digit"),
        ([line + " \u0441\u043b\u043e\u0432\u043e" for line in GOOD], "foreign"),
        (["Ez itt csak hat sz\u00f3 a"] * 4, "min_words"),
    ],
)
def test_each_reason(lines, reason):
    verdict = judge(count([GOOD, lines], LANGUAGES["hu"].alphabet, "hu"), Limits())
    assert verdict[0] == PASS
    assert (*TESTS, "pass")[verdict[1]] == reason


def test_the_first_test_that_fails_counts():
    assert judge(count([["1 2 3"]], LANGUAGES["hu"].alphabet, "hu"), Limits())[0] == TESTS.index("avg_len")
    loose = Limits(avg_len=0)
    assert judge(count([["1 2 3"]], LANGUAGES["hu"].alphabet, "hu"), loose)[0] == TESTS.index("min_sents")


def test_limits_are_not_passed_by_what_is_equal_to_them():
    limits = Limits(
        avg_len=2,
        min_sents=1,
        max_sents=1,
        min_toks=2,
        max_toks=2,
        no_word_ratio=0,
        punct_ratio=0,
        upper_ratio=0,
        digit_ratio=0,
        foreign_ratio=0,
        min_words=2,
    )
    assert judge(count([["egy kett\u0151"]], LANGUAGES["hu"].alphabet, "hu"), limits)[0] == PASS


@pytest.mark.parametrize(
    "bad",
    [{"min_sents": -1}, {"punct_ratio": 1.5}, {"min_toks": 5, "max_toks": 4}, {"min_sents": 9, "max_sents": 3}, {"upper_ratio": -0.1}],
)
def test_limits_that_cannot_be(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Limits(**bad)


TEXTS = {
    "hu": [
        "A kormany tegnap este \u00falj javaslatot fogadott el a gyermekek oktat\u00e1s\u00e1r\u00f3l, amelyet a parlament j\u00f6v\u0151 h\u00e9ten t\u00e1rgyal majd meg."
    ],
    "en": ["The government accepted a new proposal about the education of children last night, which parliament will discuss next week."],
}


@pytest.mark.parametrize("detector", filters.DETECTORS)
def test_detection_is_right_and_repeatable(detector):
    pytest.importorskip(detector, reason=f"{detector} is not installed")
    detect = filters.make_detector(detector, "hu")
    assert [detect(TEXTS["hu"]) for _ in range(5)] == [True] * 5
    assert not detect(TEXTS["en"])
    assert not detect(["123 456"]) or detector == "py3langid"
    assert filters.detection_language("hu", detector) == ("hu", "")
    assert filters.detection_language("zh", detector)[0] == "zh"
    assert filters.detection_language("ckb", detector)[0] is None


def test_languages_without_detection():
    pytest.importorskip("langdetect", reason="langdetect is not installed")
    assert all(filters.detection_language(code, "langdetect")[0] is None for code in UNDETECTED)


def test_a_missing_detector_is_named(monkeypatch):
    import sys

    filters._library.cache_clear()
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(ConfigError, match=r"berth\[languages\].*--langdetect none"):
        filters.make_detector("langdetect", "hu")
    filters._library.cache_clear()
