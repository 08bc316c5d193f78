"""Alphabets: complete enough for a sentence with every letter, codes, ranges."""

import re

import pytest

from berth.corpus.languages import LANGUAGES, ORDINAL_DOT, SHORT_WORDS, UNDETECTED, check_language, language_name, letters_of
from berth.errors import ConfigError

PANGRAMS = {  # sentences that need the letters peculiar to the language
    "hu": "\u00c1rv\u00edzt\u0171r\u0151 t\u00fck\u00f6rf\u00far\u00f3g\u00e9p, \u0150rs\u00e9g \u0170r\u00fcl\u00e9k",
    "fi": "T\u00f6rkylempi\u00e4voinen kuuluu my\u00f6s \u00c5landin s\u00e4\u00e4h\u00e4n",
    "de": "Zw\u00f6lf Boxk\u00e4mpfer jagen Viktor quer \u00fcber den gro\u00dfen Sylter Deich, STRA\u1e9eE",
    "cs": "P\u0159\u00edli\u0161 \u017elu\u0165ou\u010dk\u00fd k\u016f\u0148 \u00fap\u011bl \u010f\u00e1belsk\u00e9 \u00f3dy",
    "pl": "Za\u017c\u00f3\u0142\u0107 g\u0119\u015bl\u0105 ja\u017a\u0144",
    "tr": "Pijamal\u0131 hasta ya\u011f\u0131z \u015fof\u00f6re \u00e7abucak g\u00fcvendi, \u0130STANBUL",
    "el": "\u039e\u03b5\u03c3\u03ba\u03b5\u03c0\u03ac\u03b6\u03c9 \u03c4\u03b7\u03bd \u03c8\u03c5\u03c7\u03bf\u03c6\u03b8\u03cc\u03c1\u03b1 \u03b2\u03b4\u03b5\u03bb\u03c5\u03b3\u03bc\u03af\u03b1, \u03ac\u03bd\u03b8\u03c1\u03c9\u03c0\u03bf\u03c2",
    "ru": "\u0421\u044a\u0435\u0448\u044c \u0436\u0435 \u0435\u0449\u0451 \u044d\u0442\u0438\u0445 \u043c\u044f\u0433\u043a\u0438\u0445 \u0444\u0440\u0430\u043d\u0446\u0443\u0437\u0441\u043a\u0438\u0445 \u0431\u0443\u043b\u043e\u043a \u0434\u0430 \u0432\u044b\u043f\u0435\u0439 \u0447\u0430\u044e",
    "uk": "\u0407\u0434\u0436 \u0434\u0456\u0454\u043c \u0491\u0440\u0443\u043d\u0442\u0443 \u0449\u043e\u0434\u043d\u044f",
    "is": "K\u00e6mi n\u00fd \u00f6xi h\u00e9r, ykist \u00fej\u00f3fum n\u00fa b\u00e6\u00f0i v\u00edl og \u00e1drepa",
    "lv": "Gl\u0101\u017e\u0161\u0137\u016b\u0146a r\u016b\u0137\u012b\u0161i dz\u0113rum\u0101 \u010diepj Bau\u0123ir\u012bgu",
    "lt": "\u012elinkdama fechtuotojo \u0161paga sublyk\u010diojusi prag\u0119\u017e\u0117 apvalu \u0173j\u012f",
    "vi": "Ti\u1ebfng Vi\u1ec7t c\u00f3 nhi\u1ec1u d\u1ea5u, \u0111\u01b0\u1eddng ph\u1ed1 H\u00e0 N\u1ed9i",
    "fa": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u067e\u0627\u0631\u0633\u06cc \u0628\u06af\u0648\u06cc\u0645 \u0686\u0631\u0627 \u0698\u0627\u0644\u0647",
    "hi": "\u0939\u093f\u0928\u094d\u0926\u0940 \u0915\u094d\u0937\u0947\u0924\u094d\u0930",
    "ko": "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "ja": "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\u4eba\u3005\u30fc",
    "zh": "\u4e2d\u6587\u6c49\u5b57\u3007",
    "he": "\u05e2\u05d1\u05e8\u05d9\u05ea \u05e1\u05d5\u05e3 \u05d5\u05e5",
    "ar": "\u0627\u0644\u0644\u063a\u0629 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0645\u064f\u062f\u064e\u0631\u0651\u0650\u0633",
    "sr": "\u0409\u0443\u0431\u0438\u0447\u0430\u0441\u0442\u0438 \u0452\u0430\u0446\u0438 \u045f\u0435\u045f, \u017euti \u0111aci",
    "ro": "\u015etef\u0103n \u0219i \u021bara \u00een g\u00e2nd",
}


@pytest.mark.parametrize("code", PANGRAMS)
def test_no_letter_of_the_language_is_foreign(code):
    lower, upper = letters_of(LANGUAGES[code].alphabet)
    letters = re.sub(r"[\s,.\u3001]", "", PANGRAMS[code])
    assert [letter for letter in letters if letter not in lower | upper] == []


def test_the_table():
    assert len(LANGUAGES) >= 60
    assert {"en", "hu", "fi", "zh", "ja", "ko", "fa", "xx"} <= LANGUAGES.keys()
    assert {"sr", "eu", "hy", "be", "ga", "gl", "la", "gd", "ug", "cu", "mt"} == UNDETECTED
    for code, language in LANGUAGES.items():
        assert code == "xx" or (language.alphabet and letters_of(language.alphabet)[0]), code
        lower, upper = letters_of(language.alphabet)
        assert all(len(letter) == 1 for letter in lower | upper)
        assert not any(letter.isupper() for letter in lower), code
    assert set(LANGUAGES) >= ORDINAL_DOT | SHORT_WORDS | UNDETECTED


def test_ranges_and_case():
    assert letters_of("a-c\u00e9") == (frozenset("abc\u00e9"), frozenset("ABC\u00c9"))
    assert letters_of("ab-") == (frozenset("ab-"), frozenset("AB-"))
    assert "\u1e9e" in letters_of("a-z\u00df")[1]
    assert letters_of("\u05d0-\u05ea")[0] == letters_of("\u05d0-\u05ea")[1]  # no case
    with pytest.raises(ConfigError, match="z-a runs backwards"):
        letters_of("z-a")


def test_unknown_codes_are_refused_with_the_list():
    with pytest.raises(ConfigError, match=r"--language tlh is not a language.*hu, hy"):
        check_language("tlh", "--language")
    assert language_name("nb") == "norwegian" and language_name("hu") == "Hungarian"
