"""Where sentences end: the segmenters of ``data/sentences.py``, all offline.

In: the paragraphs of a document (single spaces between words). Out: their sentences, in order, nothing lost: every
segmenter only says where sentences begin, the text is cut here.

=========  =====================================================  ================================================
nltk       Punkt (:mod:`berth.corpus.punkt`), trained on the      any language that ends sentences with . ? or !;
           corpus itself, or a model                              ends of other scripts (。 । ؟ ...) end one as well
rules      marks, case of the next letter, initials, ordinals     any language, needs nothing
sentencex  ``pip install "berth[languages]"`` (Rust)              244 languages, the fastest
spacy      a pipeline, or its sentencizer without a model         languages of spaCy
stanza     a folder of Stanza models                              languages of Stanza
udpipe     a ``.udpipe`` file                                     languages of UDPipe
=========  =====================================================  ================================================

A :class:`Segmenter` is plain data that travels to worker processes and is opened there. Nothing is ever downloaded.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from berth.corpus import punkt
from berth.corpus.languages import ORDINAL_DOT, check_language, language_name
from berth.errors import ConfigError
from berth.files import read_json, sha256_file, sha256_json

SEGMENTERS = ("nltk", "rules", "sentencex", "spacy", "stanza", "udpipe")
NEEDS_MODEL = ("stanza", "udpipe")
TRAINING_CHARACTERS = 2_000_000  # training on everything takes longer than splitting and agrees no better (2026-11-21)
WINDOW = 1 << 20  # characters of a paragraph that are looked at together

Starts = Callable[[str], list[int]]  # where the sentences of a paragraph begin, in characters


class Segmenter(Protocol):
    """Plain data that says how to split; a frozen dataclass."""

    def identity(self) -> dict[str, Any]:
        """JSON values that decide the boundaries (for the manifest)."""

    def open(self) -> Starts:
        """Load what is needed, in the process that uses it."""


# ------------------------------------------------------------------------------------------------------- cutting the text


def cut(text: str, starts: Sequence[int]) -> list[str]:
    """``text`` cut at ``starts`` (ascending; what lies before the first belongs to it), pieces stripped, none empty."""
    edges = [0, *starts[1:], len(text)]
    return [piece for piece in (text[begin:end].strip() for begin, end in itertools.pairwise(edges)) if piece]


def sentence_blocks(starts: Starts, text: str, window: int = WINDOW) -> Iterator[list[str]]:
    """The sentences of one paragraph, some at a time; a long one is read through a window that moves from sentence to sentence.

    The window ends between words, its last sentence is read again with what follows, and it doubles when it holds one
    sentence only: memory stays near the window's, whatever the length of the line.
    """
    begin, size = 0, window
    while len(text) - begin > size:
        end = begin + size
        space = text.rfind(" ", begin + 1, end)
        piece = text[begin : space if space > 0 else end]
        found = starts(piece)
        if len(found) < 2:
            size *= 2
            continue
        yield cut(piece[: found[-1]], found[:-1])
        begin, size = begin + found[-1], window
    piece = text[begin:]
    yield cut(piece, starts(piece))


def split_paragraph(starts: Starts, text: str, window: int = WINDOW) -> list[str]:
    """:func:`sentence_blocks` as one list."""
    return [sentence for block in sentence_blocks(starts, text, window) for sentence in block]


# ----------------------------------------------------------------------------------------------------------------- rules

_OTHER_ENDS = "\u3002\uff01\uff1f\uff61\u0964\u0965\u06d4\u061f\u0589\u1362\u1367\u104b\u17d4\u0f0d\u2cf9\u1803\u1809"
_CLOSERS = "\"'\u2019\u201d\u00bb\u203a)\\]}\u300d\u300f\uff09\u3011\u3009\u300b\uff63"
_OPENERS = "\"'\u2018\u201c\u201e\u201a\u00ab\u2039(\\[{\u00bf\u00a1\u2014\u2013-"
_ASCII_END = re.compile(rf"([.!?\u2026]+)[{_CLOSERS}]*\s+(?=[{_OPENERS}]*(\S))")
_OTHER_END = re.compile(rf"[{_OTHER_ENDS}]+([{_CLOSERS}]*)\s*(?=(\S))")
_SHORT = re.compile(r"(?:^|[\s.(\[\"'\u201c\u201e\u00ab])([^\W\d_]|\d+|[B-DF-HJ-NP-TV-XZ][b-df-hj-np-tv-xz]{1,3})\.$")
_NOT_AFTER_QUOTE = "\u3068\u3063\u3001\uff0c\u306e"  # Japanese: the quoted sentence is part of another


def other_starts(text: str) -> list[int]:
    """Where sentences begin behind the marks of scripts other than Latin, Greek and Cyrillic."""
    if text.isascii():
        return []
    return [found.end() for found in _OTHER_END.finditer(text) if not (found[1] and found[2] in _NOT_AFTER_QUOTE)]


def rule_starts(text: str, language: str = "") -> list[int]:
    """Boundaries by rules: an end mark, closing quotes, white space, and a next character that is not lower case.

    A full stop behind a single letter is an initial, behind a short capitalised word without vowels a title (Mr., St.); behind
    a number it is an ordinal where the language writes them so (day of a date in German, Hungarian, Finnish...), and
    elsewhere when the number begins the sentence ("1. First"). Dots behind a space stand for something left out.
    """
    starts = [0]
    greek = language == "el"
    for found in _ASCII_END.finditer(text):
        if found[2].islower() or (
            found.start() and text[found.start() - 1] == " " and found[1][-1] in ".\u2026"
        ):  # dots for something left out
            continue
        if found[1] == ".":
            before = _SHORT.search(text, max(starts[-1] - 1, found.start() - 8, 0), found.start() + 1)
            if before and ((before[1].isalpha() and before[1] != "I") or _is_ordinal(before, language, starts[-1])):
                continue
        starts.append(found.end())
    if greek:
        starts += [found.end() for found in re.finditer(r"[;\u037e]\s+(?=\S)", text) if not text[found.end()].islower()]
    starts += other_starts(text)
    return sorted(set(starts))


def _is_ordinal(found: re.Match[str], language: str, begin: int) -> bool:
    digits = found[1]
    return digits.isdecimal() and ((language in ORDINAL_DOT and len(digits) <= 2) or found.start(1) == begin)


@dataclasses.dataclass(frozen=True)
class RuleSegmenter:
    """See :func:`rule_starts`."""

    language: str

    def identity(self) -> dict[str, Any]:
        return {"segmenter": "rules", "version": 2, "language": self.language}

    def open(self) -> Starts:
        return functools.partial(rule_starts, language=self.language)


# ----------------------------------------------------------------------------------------------------------------- punkt


@dataclasses.dataclass(frozen=True)
class PunktSegmenter:
    """Punkt, and the end marks of other scripts, which it does not know."""

    parameters: punkt.PunktParameters
    origin: str

    def identity(self) -> dict[str, Any]:
        return {"segmenter": "nltk", "version": 1, "model": sha256_json(self.parameters.to_json())}

    def open(self) -> Starts:
        splitter = punkt.PunktSplitter(self.parameters)

        def starts(text: str) -> list[int]:
            found = [begin for begin, _ in splitter.spans(text)]
            others = other_starts(text)
            return sorted({*found, *others}) if others else found

        return starts


def training_sample(paragraphs: Iterable[str], limit: int = TRAINING_CHARACTERS) -> list[str]:
    """The first ``limit`` characters of ``paragraphs``."""
    sample: list[str] = []
    size = 0
    for paragraph in paragraphs:
        sample.append(paragraph[: limit - size])
        size += len(sample[-1])
        if size >= limit:
            break
    return sample


def installed_punkt(language: str) -> punkt.PunktParameters:
    """The published model of ``language`` (``punkt_tab``) from NLTK's data folders; nothing is downloaded.

    Raises :class:`ConfigError` when NLTK or the model is not installed.
    """
    try:
        import nltk.data
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError as error:
        raise ConfigError(f"--segmenter_model installed needs NLTK >= 3.8.2 ({error}): pip install nltk") from error
    name = language_name(language).lower()
    try:
        found = PunktTokenizer(name)._params
    except (LookupError, ValueError):
        there: set[str] = set()
        for folder in nltk.data.path:
            there.update(path.name for path in Path(folder).glob("tokenizers/punkt_tab/*/"))
        listed = f"installed are {', '.join(sorted(there))}" if there else f"none is in {', '.join(map(str, nltk.data.path[:3]))}"
        raise ConfigError(
            f"--segmenter_model installed: NLTK's data folders hold no punkt_tab model for {name!r} ({listed}); leave the option "
            "out to train on the corpus, or set NLTK_DATA to the folder that holds tokenizers/punkt_tab"
        ) from None
    contexts = {str(word): int(flags) for word, flags in found.ortho_context.items() if flags}
    return punkt.PunktParameters(
        frozenset(found.abbrev_types),
        frozenset((first, second) for first, second in found.collocations),
        frozenset(found.sent_starters),
        contexts,
    )


def saved_punkt(path: Path) -> punkt.PunktParameters:
    """A model that an earlier run saved; :class:`ConfigError` when there is no such file, ``DataError`` when it is none."""
    try:
        value = read_json(path)
    except OSError as error:
        raise ConfigError(
            f"--segmenter_model {path}: {error.strerror or error}; for nltk give a punkt.json of an earlier run, 'installed', or nothing"
        ) from error
    except ValueError:
        value = None
    return punkt.PunktParameters.from_json(value, str(path))


# ------------------------------------------------------------------------------------------------------- other libraries


def _missing(segmenter: str, package: str, error: Exception) -> ConfigError:
    return ConfigError(
        f'--segmenter {segmenter} needs {package} ({error}): pip install "berth[languages]", or take --segmenter nltk or rules, which need nothing'
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _digest_of(path: Path) -> str:
    """SHA-256 of a model: a file, or names and contents of all files of a folder."""
    if path.is_file():
        return sha256_file(path)
    files = sorted((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.as_posix())
    return sha256_json([[file.relative_to(path).as_posix(), sha256_file(file)] for file in files])


@functools.lru_cache(maxsize=2)
def _open_sentencex(language: str) -> Starts:
    try:
        sentencex = importlib.import_module("sentencex")
    except ImportError as error:
        raise _missing("sentencex", "sentencex", error) from error

    def starts(text: str) -> list[int]:
        pieces = list(sentencex.segment(language, text))
        if sum(map(len, pieces)) != len(text):  # it must only cut
            found, at = [0], 0
            for piece in pieces[:-1]:
                at = text.find(piece.strip(), at) + len(piece.strip())
                found.append(at)
            return found
        return [0, *itertools.accumulate(len(piece) for piece in pieces[:-1])]

    return starts


@functools.lru_cache(maxsize=2)
def _open_spacy(language: str, model: str | None) -> Starts:
    try:
        spacy = importlib.import_module("spacy")
    except ImportError as error:
        raise _missing("spacy", "spaCy", error) from error
    try:
        nlp = spacy.load(model) if model else spacy.blank("nb" if language == "no" else language)
    except OSError as error:
        raise ConfigError(
            f"--segmenter_model {model}: spaCy cannot load it ({str(error).splitlines()[0]}); give the folder of a pipeline"
        ) from error
    except ImportError as error:
        raise ConfigError(
            f"--segmenter spacy --language {language}: {str(error).splitlines()[0]}; take another language, --language xx (any), or another segmenter"
        ) from error
    nlp.max_length = 1 << 40  # texts are cut to a window already
    if not any(name in nlp.pipe_names for name in ("parser", "senter", "sentencizer")):
        nlp.add_pipe("sentencizer")
    unused = [name for name in nlp.pipe_names if name in ("ner", "lemmatizer", "attribute_ruler", "textcat")]
    if unused:
        nlp.disable_pipes(*unused)
    return lambda text: [sentence.start_char for sentence in nlp(text).sents]


@functools.lru_cache(maxsize=2)
def _open_stanza(language: str, model: str) -> Starts:
    try:
        stanza = importlib.import_module("stanza")
    except ImportError as error:
        raise _missing("stanza", "Stanza", error) from error
    try:
        pipeline = stanza.Pipeline(
            lang=language, dir=model, processors="tokenize", download_method=None, use_gpu=False, verbose=False, logging_level="ERROR"
        )
    except Exception as error:  # its own and the file system's, in several versions
        raise ConfigError(
            f"--segmenter_model {model}: Stanza finds no tokenizer for {language!r} there ({str(error).splitlines()[0] if str(error) else error!r}); "
            f"on a machine with network run stanza.download({language!r}, model_dir=..., processors='tokenize') and copy the folder here"
        ) from error
    return lambda text: [sentence.tokens[0].start_char for sentence in pipeline(text).sentences if sentence.tokens]


@functools.lru_cache(maxsize=2)
def _open_udpipe(model: str) -> Starts:
    try:
        library = importlib.import_module("ufal.udpipe")
    except ImportError as error:
        raise _missing("udpipe", "ufal.udpipe", error) from error
    loaded = library.Model.load(model) if Path(model).is_file() else None
    if loaded is None:
        raise ConfigError(f"--segmenter_model {model}: not a UDPipe 1 model; give a .udpipe file for the language")

    def starts(text: str) -> list[int]:
        tokenizer = loaded.newTokenizer("ranges")
        if tokenizer is None:
            raise ConfigError(f"--segmenter_model {model}: this UDPipe model has no tokenizer; take one that was trained with it")
        tokenizer.setText(text)
        sentence, error, found = library.Sentence(), library.ProcessingError(), []
        while tokenizer.nextSentence(sentence, error):
            if len(sentence.words) > 1:
                found.append(sentence.words[1].getTokenRangeStart())
            sentence = library.Sentence()
        if error.occurred():
            raise ConfigError(f"--segmenter_model {model}: UDPipe failed: {error.message}")
        return found

    return starts


@dataclasses.dataclass(frozen=True)
class LibrarySegmenter:
    """One of the libraries, with its version and the digest of its model."""

    name: str
    language: str
    model: str | None
    model_digest: str | None
    version: str

    def identity(self) -> dict[str, Any]:
        return {"segmenter": self.name, "version": self.version, "language": self.language, "model": self.model_digest}

    def open(self) -> Starts:
        if self.name == "sentencex":
            return _open_sentencex(self.language)
        if self.name == "spacy":
            return _open_spacy(self.language, self.model)
        assert self.model is not None
        return _open_stanza(self.language, self.model) if self.name == "stanza" else _open_udpipe(self.model)


_PACKAGES = {"sentencex": "sentencex", "spacy": "spacy", "stanza": "stanza", "udpipe": "ufal.udpipe"}


def choose_segmenter(name: str, language: str, model: str | None, paragraphs: Iterable[str]) -> Segmenter:
    """The segmenter of the options; opens it once, so that what is missing is said before any work.

    Args:
        name: one of :data:`SEGMENTERS`.
        language: an ISO 639-1 code of :mod:`berth.corpus.languages`.
        model: ``nltk``: None (train on ``paragraphs``), ``installed`` or a saved model; others: their model, or None.
        paragraphs: the corpus; read as far as training needs.

    Raises :class:`ConfigError` for an unknown language, a missing model or library.
    """
    if name not in SEGMENTERS:
        raise ConfigError(f"--segmenter {name} is not one of {', '.join(SEGMENTERS)}")
    check_language(language, "--language")
    segmenter: Segmenter
    if name == "nltk":
        if model == "installed":
            segmenter = PunktSegmenter(installed_punkt(language), "installed")
        elif model is not None:
            segmenter = PunktSegmenter(saved_punkt(Path(model)), "saved")
        else:
            segmenter = PunktSegmenter(punkt.train(training_sample(paragraphs)), "trained")
        return segmenter
    if model is not None and name in ("rules", "sentencex"):
        raise ConfigError(f"--segmenter_model has no meaning with --segmenter {name}, which has no models; leave it out")
    if name == "rules":
        return RuleSegmenter(language)
    if model is None and name in NEEDS_MODEL:
        kind = "a folder of Stanza models" if name == "stanza" else "a .udpipe file"
        raise ConfigError(f"--segmenter {name} needs --segmenter_model: {kind} (berth downloads nothing)")
    if model is not None and not Path(model).exists():
        raise ConfigError(f"--segmenter_model {model}: no such file or folder")
    digest = None if model is None else _digest_of(Path(model))
    segmenter = LibrarySegmenter(name, language, model, digest, _version(_PACKAGES[name]))
    segmenter.open()
    return segmenter
