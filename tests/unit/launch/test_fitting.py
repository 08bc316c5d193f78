"""Model, vocabulary and records against each other; the rest of fitting is tested through validation."""

from __future__ import annotations

from pathlib import Path

import pytest

import modeling
from berth.errors import ConfigError
from berth.launch import fitting
from berth.text.vocabulary import Vocabulary
from tests.support import ROOT, TINY


def test_the_models_of_the_project_can_be_read() -> None:
    for path in sorted((ROOT / "bert_configs").glob("*.json")):
        config = modeling.BertConfig.from_json_file(path)
        read = fitting.read_model(path)
        assert {key: read[key] for key in (*fitting.SIZES, fitting.POSITIONS)} == {
            key: getattr(config, key) for key in (*fitting.SIZES, fitting.POSITIONS)
        }


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"vocab_size": true}'])
def test_what_is_no_model(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config_file .*c\.json"):
        fitting.read_model(tmp_path / "c.json")


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_vocabulary_is_counted_as_training_counts_it(tmp_path: Path, end: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "naïve", "\u2028x"]) + end, encoding="utf-8")
    vocabulary = Vocabulary.load(path)
    assert fitting.read_vocabulary(path) == (vocabulary.sha256, vocabulary.size)


@pytest.mark.parametrize(
    ("entries", "size", "same"), [(0, 96, True), (96, 96, True), (90, 96, True), (96, 90, True), (88, 96, False), (97, 96, False)]
)
def test_sizes_are_padded_first(entries: int, size: int, same: bool) -> None:
    padded = modeling.BertConfig(**{**TINY, "vocab_size": size}).padded(8).vocab_size  # type: ignore[arg-type]
    assert fitting.same_size(entries, size) is same
    assert not entries or ((-(-entries // 8) * 8 == padded) is same)  # the rule of run_pretraining.py
