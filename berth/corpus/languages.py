"""Languages: codes, names, alphabets, and what is peculiar to them.

An alphabet holds the lower-case letters that running text of the language uses; upper case follows. Latin alphabets include
a-z (foreign names and loan words), others only their own script: with the classic limits a Russian document with many Latin
words is rejected as foreign. Written down from the orthographies; change one for a run with ``--word_chars``.

Codes are ISO 639-1, or 639-2/3 where there is none. ``xx`` is any other language: no alphabet, no detection.
"""

from __future__ import annotations

import dataclasses
import functools

from berth.errors import ConfigError

_LATIN = "a-z"
_CYRILLIC = "а-я"
_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = "\u3041-\u3096\u309d\u309e\u30a1-\u30fa\u30fc-\u30fe\uff66-\uff9f"
_HANGUL = "\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e"
_VIETNAMESE = "àáảãạăằắẳẵặâầấẩẫậđèéẻẽẹêềếểễệìíỉĩịòóỏõọôồốổỗộơờớởỡợùúủũụưừứửữựỳýỷỹỵ"
_ARABIC = "\u0621-\u063a\u0641-\u0652\u0670"

_TABLE: tuple[tuple[str, str, str], ...] = (  # code, English name, alphabet
    ("af", "Afrikaans", _LATIN + "áäèéêëíîïóôöúûüý"),
    ("ar", "Arabic", _ARABIC),
    ("az", "Azerbaijani", _LATIN + "çəğıöşü"),
    ("be", "Belarusian", _CYRILLIC + "ёіў"),
    ("bg", "Bulgarian", _CYRILLIC),
    ("bn", "Bengali", "\u0980-\u09e3\u09f0\u09f1\u200c\u200d"),
    ("bs", "Bosnian", _LATIN + "čćđšž"),
    ("ca", "Catalan", _LATIN + "àáçèéíïòóúü"),
    ("ckb", "Sorani Kurdish", _ARABIC + "پچژکگڤڕڵۆێیەھ\u200c"),
    ("cs", "Czech", _LATIN + "áčďéěíňóřšťúůýž"),
    ("cu", "Church Slavonic", _CYRILLIC + "ѐёђіїѡѣѥѧѩѫѭѯѱѳѵѷѹѻѿҁꙁꙃꙋꙑꙗ\u0483-\u0487"),
    ("cy", "Welsh", _LATIN + "àáâäèéêëìíîïòóôöùúûüýŵŷẁẃẅỳÿ"),
    ("da", "Danish", _LATIN + "æøåáéíóú"),
    ("de", "German", _LATIN + "äöüßéàè"),
    ("el", "Greek", "α-ωςάέήίόύώϊϋΐΰ"),
    ("en", "English", _LATIN + "é"),
    ("eo", "Esperanto", _LATIN + "ĉĝĥĵŝŭ"),
    ("es", "Spanish", _LATIN + "áéíñóúü"),
    ("et", "Estonian", _LATIN + "äõöüšž"),
    ("eu", "Basque", _LATIN + "çñü"),
    ("fa", "Persian", _ARABIC + "پچژکگیۀ\u200c"),
    ("fi", "Finnish", _LATIN + "åäöšž"),
    ("fo", "Faroese", _LATIN + "áðíóúýæø"),
    ("fr", "French", _LATIN + "àâäæçèéêëîïôöœùûüÿ"),
    ("ga", "Irish", _LATIN + "áéíóú"),
    ("gd", "Scottish Gaelic", _LATIN + "àáèéìòóù"),
    ("gl", "Galician", _LATIN + "áéíïñóúü"),
    ("gu", "Gujarati", "\u0a80-\u0ae3\u200c\u200d"),
    ("he", "Hebrew", "\u05d0-\u05ea\u05b0-\u05bd\u05bf\u05c1\u05c2\u05f0-\u05f2"),
    ("hi", "Hindi", "\u0900-\u0963\u0971-\u097f\u200c\u200d"),
    ("hr", "Croatian", _LATIN + "čćđšž"),
    ("hu", "Hungarian", _LATIN + "áéíóöőúüű"),
    ("hy", "Armenian", "\u0561-\u0587"),
    ("id", "Indonesian", _LATIN + "é"),
    ("is", "Icelandic", _LATIN + "áðéíóúýþæö"),
    ("it", "Italian", _LATIN + "àèéìíîòóùú"),
    ("ja", "Japanese", _HAN + _KANA),
    ("ka", "Georgian", "\u10d0-\u10ff"),
    ("kk", "Kazakh", _CYRILLIC + "ёәғқңөұүһі"),
    ("km", "Khmer", "\u1780-\u17d3\u17dd"),
    ("kn", "Kannada", "\u0c80-\u0ce3\u200c\u200d"),
    ("ko", "Korean", _HANGUL),
    ("la", "Latin", _LATIN + "æœāēīōūăĕĭŏŭ"),
    ("lb", "Luxembourgish", _LATIN + "äâéèëîôöûüß"),
    ("lo", "Lao", "\u0e81-\u0ebd\u0ec0-\u0ecd\u0edc-\u0edf"),
    ("lt", "Lithuanian", _LATIN + "ąčęėįšųūž"),
    ("lv", "Latvian", _LATIN + "āčēģīķļņōŗšūž"),
    ("mk", "Macedonian", _CYRILLIC + "ѓѕјљњќџѐѝ"),
    ("ml", "Malayalam", "\u0d00-\u0d63\u0d7a-\u0d7f\u200c\u200d"),
    ("mn", "Mongolian", _CYRILLIC + "ёөү"),
    ("mr", "Marathi", "\u0900-\u0963\u0971-\u097f\u200c\u200d"),
    ("ms", "Malay", _LATIN + "é"),
    ("mt", "Maltese", _LATIN + "àċèéġħìîòùż"),
    ("my", "Burmese", "\u1000-\u1049\u104c-\u109f"),
    ("nb", "Norwegian Bokmål", _LATIN + "æøåàéèêóòôü"),
    ("ne", "Nepali", "\u0900-\u0963\u0971-\u097f\u200c\u200d"),
    ("nl", "Dutch", _LATIN + "áäèéêëíïóöúüĳ"),
    ("nn", "Norwegian Nynorsk", _LATIN + "æøåàéèêóòôü"),
    ("no", "Norwegian", _LATIN + "æøåàéèêóòôü"),
    ("pa", "Punjabi", "\u0a00-\u0a65\u0a70-\u0a75\u200c\u200d"),
    ("pl", "Polish", _LATIN + "ąćęłńóśźż"),
    ("pt", "Portuguese", _LATIN + "áâãàçéêíóôõúü"),
    ("ro", "Romanian", _LATIN + "ăâîșțşţ"),
    ("ru", "Russian", _CYRILLIC + "ё"),
    ("si", "Sinhala", "\u0d80-\u0ddf\u0df2\u0df3\u200c\u200d"),
    ("sk", "Slovak", _LATIN + "áäčďéíĺľňóôŕšťúýž"),
    ("sl", "Slovene", _LATIN + "čćđšž"),
    ("sq", "Albanian", _LATIN + "çë"),
    ("sr", "Serbian", _LATIN + "čćđšž" + _CYRILLIC + "ђјљњћџ"),
    ("sv", "Swedish", _LATIN + "åäöéàü"),
    ("sw", "Swahili", _LATIN),
    ("ta", "Tamil", "\u0b80-\u0be3\u200c"),
    ("te", "Telugu", "\u0c00-\u0c63\u200c\u200d"),
    ("th", "Thai", "\u0e01-\u0e3a\u0e40-\u0e4e"),
    ("tl", "Tagalog", _LATIN + "ñ"),
    ("tr", "Turkish", _LATIN + "âçğıîöşüû"),
    ("ug", "Uyghur", _ARABIC + "پچژگڭۇۆۈۋېەھىیک"),
    ("uk", "Ukrainian", _CYRILLIC + "ґєії"),
    ("ur", "Urdu", _ARABIC + "ٹپچڈڑژکگںھہۃیےۓۂ\u200c"),
    ("uz", "Uzbek", _LATIN + "\u02bb\u02bc"),
    ("vi", "Vietnamese", _LATIN + _VIETNAMESE),
    ("zh", "Chinese", _HAN),
)

ANY = "xx"
WITHOUT_SPACES = frozenset({"ja", "km", "lo", "my", "th", "zh"})  # a letter counts as a word
SHORT_WORDS = WITHOUT_SPACES | {"ko"}  # a word may have one letter, elsewhere two
ORDINAL_DOT = frozenset(  # "3. März" is one sentence
    {"bs", "cs", "da", "de", "et", "fi", "fo", "hr", "hu", "is", "lb", "lt", "lv", "nb", "nn", "no", "pl", "sk", "sl", "sr", "sv", "tr"}
)
UNDETECTED = frozenset(
    {"sr", "eu", "hy", "be", "ga", "gl", "la", "gd", "ug", "cu", "mt"}
)  # the classic script does not run langdetect for them


@dataclasses.dataclass(frozen=True)
class Language:
    """One row of the table; ``alphabet`` lower-case letters with ranges (``a-z``), "" when none is known."""

    code: str
    name: str
    alphabet: str


LANGUAGES = {code: Language(code, name, alphabet) for code, name, alphabet in _TABLE} | {ANY: Language(ANY, "any other", "")}


def check_language(code: str, option: str) -> Language:
    """The language of ``code``; :class:`ConfigError` that names ``option`` and lists the codes when there is none."""
    found = LANGUAGES.get(code)
    if found is None:
        raise ConfigError(f"{option} {code} is not a language berth knows; take one of {', '.join(LANGUAGES)} (xx: any other language)")
    return found


def language_name(code: str) -> str:
    """English name as NLTK's models use it (``norwegian`` for all of Norwegian)."""
    return "norwegian" if code in ("nb", "nn", "no") else LANGUAGES[code].name


@functools.lru_cache(maxsize=32)
def letters_of(alphabet: str) -> tuple[frozenset[str], frozenset[str]]:
    """The lower-case and the upper-case letters of an alphabet such as ``a-záé``; letters without case are in both.

    A hyphen between two characters is a range. Raises :class:`ConfigError` for a range that runs backwards.
    """
    lower: set[str] = set()
    at = 0
    while at < len(alphabet):
        first = alphabet[at]
        if at + 2 < len(alphabet) and alphabet[at + 1] == "-":
            last = alphabet[at + 2]
            if last < first:
                raise ConfigError(f"--word_chars: the range {first}-{last} runs backwards")
            lower.update(map(chr, range(ord(first), ord(last) + 1)))
            at += 3
        else:
            lower.add(first)
            at += 1
    upper = {big for small in lower if len(big := small.upper()) == 1}
    if "ß" in lower:
        upper.add("ẞ")
    if {"i", "ı"} <= lower:
        upper.add("İ")
    lower = {small for letter in lower if len(small := letter.lower()) == 1}
    return frozenset(lower), frozenset(upper)
