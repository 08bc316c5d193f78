"""A small vocabulary and a text in which every sentence can be recognised by its words."""

from pathlib import Path

import pytest

from berth.text.vocabulary import SPECIAL_TOKENS, Vocabulary

DOCUMENTS, SENTENCES, WORDS = 14, 25, 9


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with ``vocab.txt`` and ``text.txt``: word ``w<n>`` is the n-th word of the text, ``[unusedN]`` between."""
    folder = tmp_path_factory.mktemp("records")
    words = [f"w{number}" for number in range(DOCUMENTS * SENTENCES * WORDS)]
    pieces = [*SPECIAL_TOKENS, *(f"[unused{n}]" for n in range(200)), *words, "##x", "##y", "Big", "big", "."]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    lines = [" ".join(words[start : start + WORDS]) for start in range(0, len(words), WORDS)]
    documents = ["\n".join(lines[start : start + SENTENCES]) for start in range(0, len(lines), SENTENCES)]
    (folder / "text.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def vocabulary(data: Path) -> Vocabulary:
    return Vocabulary.load(data / "vocab.txt")
