"""Cleaning: what nobody can see goes, no letter does."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.corpus.cleaning import Cleaner, check_charset, encodable
from berth.corpus.languages import LANGUAGES, letters_of
from berth.errors import ConfigError


@pytest.mark.parametrize(
    ("line", "expected", "removed"),
    [
        ("plain text", "plain text", 0),
        ("a\u0301rvi\u0301ztu\u030bro\u030b", "\u00e1rv\u00edzt\u0171r\u0151", 0),
        ("sy\u00adlla\u00adble", "syllable", 2),
        ("a\u00ad\u0301", "\u00e1", 1),
        ("\ufeffx\u200by\u2060z", "xyz", 3),
        ("bell\x07 tab\tline\u2028nbsp\u00a0ideographic\u3000end", "bell tab line nbsp ideographic end", 1),
        ("lost \ufffd\ufffd letters", "lost letters", 2),
        ("private \ue000 \U000f0000 unassigned \u0378 tag \U000e0041", "private unassigned tag", 4),
        ("  \x00 ", "", 1),
        ("emoji \U0001f600 stays", "emoji \U0001f600 stays", 0),
    ],
)
def test_what_is_removed(line, expected, removed):
    assert Cleaner("hu")(line) == (expected, removed)


def test_joiners_stay_where_scripts_write_them():
    word = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    assert Cleaner("fa")(word) == (word, 0)
    assert Cleaner("zh")("\u4e2d\u200d\u6587") == ("\u4e2d\u6587", 1)
    assert Cleaner("km")("\u1780\u17b6\u200b\u1780\u17b6") == ("\u1780\u17b6 \u1780\u17b6", 0)


@given(st.text(max_size=80))
def test_clean_text_stays_as_it_is(text):
    once, _ = Cleaner("hu")(text)
    assert Cleaner("hu")(once) == (once, 0)
    assert unicodedata.is_normalized("NFC", once)
    assert [letter for letter in unicodedata.normalize("NFC", text) if letter.isalnum() and letter not in once] == []


@pytest.mark.parametrize("code", sorted(set(LANGUAGES) - {"xx"}))
def test_no_alphabet_is_touched(code):
    lower, upper = letters_of(LANGUAGES[code].alphabet)
    cleaner = Cleaner(code)
    for letter in sorted(lower | upper):
        left, removed = cleaner(f"x{letter}x")
        expected = f"x{letter}x" if unicodedata.category(letter) != "Cn" else "xx"
        assert left == unicodedata.normalize("NFC", expected) and removed == len(f"x{letter}x") - len(expected)


def test_a_set_of_characters():
    check_charset("latin2", "hu")
    cleaner = Cleaner("hu", "latin2")
    assert cleaner("\u00e1rv\u00edzt\u0171r\u0151 t\u00fck\u00f6rf\u00far\u00f3g\u00e9p") == (
        "\u00e1rv\u00edzt\u0171r\u0151 t\u00fck\u00f6rf\u00far\u00f3g\u00e9p",
        0,
    )
    assert cleaner("a\u0301r \u4f60\u597d \u03a9 r") == ("\u00e1r r", 3)
    assert "\u0151" in encodable("latin2") and "\u0151" not in encodable("latin1")


@pytest.mark.parametrize(
    ("charset", "language", "chars", "message"),
    [
        ("latin1", "hu", "", "no \u0150 \u0151 \u0170 \u0171.*Hungarian.*take latin2"),
        ("ascii", "de", "", "no .*\u00e4"),
        ("latin2", "ru", "", "cp1251"),
        ("klingon", "hu", "", "no text encoding"),
        ("base64", "hu", "", "no text encoding"),
        ("latin2", "xx", "", "needs --language"),
        ("latin2", "hu", "a-z\u00f5", "--word_chars"),
    ],
)
def test_a_set_that_would_destroy_letters_is_refused(charset, language, chars, message):
    with pytest.raises(ConfigError, match=message):
        check_charset(charset, language, chars)
