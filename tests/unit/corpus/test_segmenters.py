"""Segmenters: boundaries of the rules, long lines, models and libraries that are missing, adapters of libraries."""

import json
import sys
import types
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.corpus import punkt
from berth.corpus.segmenters import (
    SEGMENTERS,
    PunktSegmenter,
    _open_stanza,
    _open_udpipe,
    choose_segmenter,
    cut,
    rule_starts,
    split_paragraph,
    training_sample,
)  # fmt: skip
from berth.errors import ConfigError, DataError


def rules(text: str, language: str = "en") -> list[str]:
    return cut(text, rule_starts(text, language))


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("One ends. Two ends! Three? Four", "en", ["One ends.", "Two ends!", "Three?", "Four"]),
        ("It cost 3.5 tons. J. S. Bach wrote it.", "en", ["It cost 3.5 tons.", "J. S. Bach wrote it."]),
        ("He said \u201cNo.\u201d Then he left.", "en", ["He said \u201cNo.\u201d", "Then he left."]),
        ("Wait... what? Yes.", "en", ["Wait... what?", "Yes."]),
        ("Was it I? It was I. He knew.", "en", ["Was it I?", "It was I.", "He knew."]),
        ("Am 3. M\u00e4rz kam er. Dann ging er.", "de", ["Am 3. M\u00e4rz kam er.", "Dann ging er."]),
        ("It was 3. March came.", "en", ["It was 3.", "March came."]),
        ("Did Mr. Smith and St. Paul come? (Dr. No did.) Good.", "en", ["Did Mr. Smith and St. Paul come?", "(Dr. No did.)", "Good."]),
        ("Add 1, ... Number or 2, \u2026 Range.", "en", ["Add 1, ... Number or 2, \u2026 Range."]),
        ("1. First point. 2. Second point.", "en", ["1. First point.", "2. Second point."]),
        ("\u7b2c\u4e00\u53e5\u3002\u7b2c\u4e8c\u53e5\uff01\u7b2c\u4e09\u53e5", "zh", ["\u7b2c\u4e00\u53e5\u3002", "\u7b2c\u4e8c\u53e5\uff01", "\u7b2c\u4e09\u53e5"]),
        ("\u300c\u884c\u3051\uff01\u300d\u3068\u8a00\u3063\u305f\u3002\u6b21\u3002", "ja", ["\u300c\u884c\u3051\uff01\u300d\u3068\u8a00\u3063\u305f\u3002", "\u6b21\u3002"]),
        ("\u06cc\u06c1 \u06a9\u06cc\u0627 \u06c1\u06d2\u061f \u06cc\u06c1 \u06a9\u062a\u0627\u0628 \u06c1\u06d2\u06d4 \u0628\u0633", "ur", ["\u06cc\u06c1 \u06a9\u06cc\u0627 \u06c1\u06d2\u061f", "\u06cc\u06c1 \u06a9\u062a\u0627\u0628 \u06c1\u06d2\u06d4", "\u0628\u0633"]),
        ("\u092f\u0939 \u0939\u0948\u0964 \u0935\u0939 \u0939\u0948\u0964", "hi", ["\u092f\u0939 \u0939\u0948\u0964", "\u0935\u0939 \u0939\u0948\u0964"]),
        ("\u03a4\u03b9 \u03ba\u03ac\u03bd\u03b5\u03b9\u03c2; \u039a\u03b1\u03bb\u03ac.", "el", ["\u03a4\u03b9 \u03ba\u03ac\u03bd\u03b5\u03b9\u03c2;", "\u039a\u03b1\u03bb\u03ac."]),
    ],
)  # fmt: skip
def test_rules(text, language, expected):
    assert rules(text, language) == expected


TEXTS = st.text(st.sampled_from("abAB1 .?!,\"')\u201d\u3002\uff01\u300d\u3068\u0964;"), max_size=200).map(
    lambda text: " ".join(text.split())
)


@given(TEXTS, st.integers(min_value=4, max_value=60), st.sampled_from(["rules", "nltk"]))
def test_no_character_is_lost_whatever_the_window(text, window, name):
    starts = choose_segmenter(name, "en", None, [text]).open()
    for pieces in (split_paragraph(starts, text), split_paragraph(starts, text, window)):
        assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
        assert all(piece == piece.strip() and piece for piece in pieces)


def test_a_window_changes_nothing_on_prose():
    text = " ".join(f"Sentence number {n} of Mr. Smith ends here{'.!?'[n % 3]}" for n in range(3000))
    starts = choose_segmenter("nltk", "en", None, [text]).open()
    whole = cut(text, starts(text))
    assert len(whole) >= 3000
    assert split_paragraph(starts, text, 500) == whole
    endless = "word " * 3000
    assert split_paragraph(starts, endless.strip(), 100) == [endless.strip()]


def test_punkt_also_knows_the_marks_of_other_scripts_and_is_plain_otherwise():
    segmenter = PunktSegmenter(punkt.PunktParameters(), "trained")
    assert cut(
        "\u7b2c\u4e00\u53e5\u3002\u7b2c\u4e8c\u53e5\u3002", segmenter.open()("\u7b2c\u4e00\u53e5\u3002\u7b2c\u4e8c\u53e5\u3002")
    ) == ["\u7b2c\u4e00\u53e5\u3002", "\u7b2c\u4e8c\u53e5\u3002"]
    assert segmenter.identity() == PunktSegmenter(punkt.PunktParameters(), "saved").identity()
    assert segmenter.identity() != PunktSegmenter(punkt.PunktParameters(frozenset({"mr"})), "trained").identity()


def test_the_sample_is_the_first_characters():
    assert training_sample(["abc", "def", "ghi"], 5) == ["abc", "de"]
    assert training_sample(iter(["abc"]), 5) == ["abc"]


@pytest.mark.parametrize(
    ("name", "language", "model", "message"),
    [
        ("moses", "en", None, "not one of nltk, rules"),
        ("nltk", "klingon", None, "--language klingon is not a language.*hu"),
        ("stanza", "en", None, "needs --segmenter_model: a folder of Stanza"),
        ("udpipe", "en", None, "needs --segmenter_model: a .udpipe file"),
        ("udpipe", "en", "nowhere.udpipe", "no such file"),
        ("rules", "en", "model", "has no models"),
        ("nltk", "en", "nowhere.json", "No such file.*installed"),
    ],
)
def test_what_cannot_be_is_said(name, language, model, message):
    with pytest.raises(ConfigError, match=message):
        choose_segmenter(name, language, model, ["Text."])


@pytest.mark.parametrize("name", ["sentencex", "spacy", "stanza", "udpipe"])
def test_a_missing_library_is_named_with_its_extra(name, tmp_path, monkeypatch):
    from berth.corpus import segmenters

    for opener in (segmenters._open_sentencex, segmenters._open_spacy, segmenters._open_stanza, segmenters._open_udpipe):
        opener.cache_clear()
    for module in ("sentencex", "spacy", "stanza", "ufal.udpipe"):
        monkeypatch.setitem(sys.modules, module, None)
    model = tmp_path / "model"
    model.write_text("x")
    with pytest.raises(ConfigError, match=rf"--segmenter {name} needs .*berth\[languages\]"):
        choose_segmenter(name, "en", None if name == "sentencex" else str(model), [])


def test_saved_models(tmp_path):
    parameters = punkt.train(["Mr. Smith came. Mr. Smith left. Dr. No stayed."] * 20)
    path = tmp_path / "punkt.json"
    path.write_text(json.dumps(parameters.to_json()))
    assert choose_segmenter("nltk", "en", str(path), []).parameters == parameters
    path.write_text("{")
    with pytest.raises(DataError, match=r"punkt\.json: not a sentence model"):
        choose_segmenter("nltk", "en", str(path), [])


def test_installed_models_are_found_and_never_fetched(tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *a, **k: pytest.fail("nltk.download was called"))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    folder = tmp_path / "tokenizers" / "punkt_tab" / "finnish"
    folder.mkdir(parents=True)
    (folder / "collocations.tab").write_text("##number##\tviikko\n", encoding="utf-8")
    (folder / "sent_starters.txt").write_text("kuitenkin\n", encoding="utf-8")
    (folder / "abbrev_types.txt").write_text("esim\nmm\n", encoding="utf-8")
    (folder / "ortho_context.tab").write_text("talo\t46\n", encoding="utf-8")
    found = choose_segmenter("nltk", "fi", "installed", []).parameters
    assert found == punkt.PunktParameters(
        frozenset({"esim", "mm"}), frozenset({("##number##", "viikko")}), frozenset({"kuitenkin"}), {"talo": 46}
    )
    with pytest.raises(ConfigError, match=r"no punkt_tab model for 'hungarian' \(installed are finnish\)"):
        choose_segmenter("nltk", "hu", "installed", [])


@pytest.mark.parametrize("name", ["sentencex", "spacy"])
def test_real_libraries(name):
    pytest.importorskip(name, reason=f"{name} is not installed")
    starts = choose_segmenter(name, "hu", None, []).open()
    text = "Szia, vil\u00e1g! Hogy vagy ma? A haj\u00f3 3.5 tonna."
    assert split_paragraph(starts, text) == ["Szia, vil\u00e1g!", "Hogy vagy ma?", "A haj\u00f3 3.5 tonna."]


def test_spacy_says_what_a_language_lacks():
    pytest.importorskip("spacy", reason="spaCy is not installed")
    with pytest.raises(ConfigError, match="--segmenter spacy --language ckb"):
        choose_segmenter("spacy", "ckb", None, [])


def test_udpipe_refuses_what_is_no_model(tmp_path):
    pytest.importorskip("ufal.udpipe", reason="ufal.udpipe is not installed")
    (tmp_path / "x.udpipe").write_text("no model")
    with pytest.raises(ConfigError, match="not a UDPipe 1 model"):
        choose_segmenter("udpipe", "hu", str(tmp_path / "x.udpipe"), [])


TEXT = "Erste hier. Zweite da! Dritte"
BEGINS = [0, 12, 23]


def test_stanza_adapter_asks_for_nothing_from_the_network(tmp_path, monkeypatch):
    """Stanza's models cannot be had here; a stand-in with its interface checks the calls."""
    asked = {}

    class Pipeline:
        def __init__(self, **options):
            asked.update(options)
            if not (tmp_path / options["lang"]).is_dir():
                raise FileNotFoundError("resources.json")

        def __call__(self, text):
            sentences = [types.SimpleNamespace(tokens=[types.SimpleNamespace(start_char=begin)]) for begin in BEGINS]
            return types.SimpleNamespace(sentences=sentences)

    monkeypatch.setitem(sys.modules, "stanza", types.SimpleNamespace(Pipeline=Pipeline))
    _open_stanza.cache_clear()
    (tmp_path / "de").mkdir()
    starts = choose_segmenter("stanza", "de", str(tmp_path), []).open()
    assert split_paragraph(starts, TEXT) == [TEXT[begin:end].strip() for begin, end in pairwise([*BEGINS, None])]
    assert asked["download_method"] is None and asked["dir"] == str(tmp_path) and asked["processors"] == "tokenize"
    with pytest.raises(ConfigError, match="finds no tokenizer for 'hu'"):
        choose_segmenter("stanza", "hu", str(tmp_path), [])
    _open_stanza.cache_clear()


def test_udpipe_adapter(tmp_path, monkeypatch):
    """No UDPipe model can be had here; a stand-in with its interface checks the calls."""

    class Sentence:
        def __init__(self):
            self.words = []

    class Tokenizer:
        def setText(self, text):
            self.left = list(BEGINS) if text == TEXT else [0]

        def nextSentence(self, sentence, error):
            if not self.left:
                return False
            begin = self.left.pop(0)
            sentence.words = [None, types.SimpleNamespace(getTokenRangeStart=lambda: begin)]
            return True

    def tokenizer(options):
        assert options == "ranges"
        return Tokenizer()

    loaded = types.SimpleNamespace(newTokenizer=tokenizer)
    library = types.SimpleNamespace(
        Model=types.SimpleNamespace(load=lambda path: loaded),
        Sentence=Sentence,
        ProcessingError=lambda: types.SimpleNamespace(occurred=lambda: False),
    )
    monkeypatch.setitem(sys.modules, "ufal", types.SimpleNamespace(udpipe=library))
    monkeypatch.setitem(sys.modules, "ufal.udpipe", library)
    _open_udpipe.cache_clear()
    (tmp_path / "de.udpipe").write_text("x")
    starts = choose_segmenter("udpipe", "de", str(tmp_path / "de.udpipe"), []).open()
    assert split_paragraph(starts, TEXT) == ["Erste hier.", "Zweite da!", "Dritte"]
    _open_udpipe.cache_clear()


def test_the_list_is_what_is_offered():
    assert SEGMENTERS == ("nltk", "rules", "sentencex", "spacy", "stanza", "udpipe")
