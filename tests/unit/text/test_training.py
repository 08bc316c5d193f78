"""Vocabulary training: the same bytes in every process, the promised order, honest limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from berth.errors import ConfigError, DataError
from berth.text.tokenizer import load_tokenizer
from berth.text.training import (
    alphabet_pieces,
    choose_alphabet,
    count_words,
    learn_merges,
    limit_characters,
    scale_counts,
    special_pieces,
    train_wordpiece,
    usable_words,
)
from berth.text.vocabulary import SPECIAL_TOKENS, Vocabulary

ROOT = Path(__file__).resolve().parents[3]
SYLLABLES = ["ka", "lo", "mi", "ren", "tos", "ű", "vil", "ost", "Én", "qu", "zza", "ph", "ör"]


def text(folder: Path, lines: int = 400) -> Path:
    """Words of pseudo-random syllables: many pairs of equal frequency, which is where determinism breaks."""
    path = folder / "text.txt"
    number, words = 1, []
    for _ in range(lines * 8):
        number = (number * 1103515245 + 12345) % (1 << 31)
        length = 1 + (number >> 8) % 4
        words.append("".join(SYLLABLES[(number >> (9 + 4 * part)) % len(SYLLABLES)] for part in range(length)))
    path.write_text("\n".join(" ".join(words[8 * i : 8 * i + 8]) + "." for i in range(lines)), encoding="utf-8")
    return path


def run(*arguments, cwd, **environment):
    command = [sys.executable, str(ROOT / "data/vocab.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def test_same_bytes_in_every_process(tmp_path):
    path = text(tmp_path)
    results = []
    for number, (seed, threads) in enumerate([("0", "1"), ("1", "2"), ("2", "4"), ("random", "2")]):
        output = tmp_path / f"{number}.txt"
        done = run(
            "--input", path, "--vocab_size", 700, "--output", output, cwd=tmp_path,
            PYTHONHASHSEED=seed, RAYON_NUM_THREADS=threads,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results.append(output.read_bytes())
    assert len(set(results)) == 1
    assert results[0].count(b"\n") > 300


@pytest.mark.parametrize("lowercase", [True, False])
def test_order_size_and_use(tmp_path, lowercase):
    path = text(tmp_path)
    counts = train_wordpiece([path], 200, tmp_path / "v.txt", lowercase=lowercase)
    vocabulary = Vocabulary.load(tmp_path / "v.txt")
    pieces = list(vocabulary.pieces)
    assert counts.size == vocabulary.size == 200
    assert pieces[:5] == list(SPECIAL_TOKENS)
    letters = pieces[5 : 5 + counts.alphabet]
    assert letters == sorted(letters) and all(len(letter) == 1 for letter in letters)
    assert counts.unk_share == 0
    assert ("É" in pieces) is not lowercase and ("ű" in pieces) is not lowercase
    assert "##." not in pieces, "punctuation never continues a word"
    tokenizer = load_tokenizer(vocabulary, lowercase, special_tokens=False)
    assert vocabulary.unk_id not in tokenizer.encode(path.read_text(encoding="utf-8")).ids


def test_rare_characters_become_unknown(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("aaaa bbbb aaaa bbbb ab ab ba c\n", encoding="utf-8")
    counts = train_wordpiece([path], 50, tmp_path / "v.txt", alphabet_limit=2)
    assert (counts.distinct_characters, counts.alphabet) == (3, 2)
    assert counts.unk_share == pytest.approx(1 / 8)
    assert choose_alphabet(count_words([path], True), 2) == (["a", "b"], 3)


def test_limits_are_explained(tmp_path):
    path = text(tmp_path, 5)
    with pytest.raises(ConfigError, match=r"--vocab_size 12 is too small: 5 special tokens.*--limit_alphabet"):
        train_wordpiece([path], 12, tmp_path / "v.txt")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match="no word"):
        train_wordpiece([tmp_path / "blank.txt"], 100, tmp_path / "v.txt")
    with pytest.raises(DataError, match="no such text file"):
        train_wordpiece([tmp_path / "none.txt"], 100, tmp_path / "v.txt")
    assert not (tmp_path / "v.txt").exists()


@pytest.mark.parametrize("multiple", [8, 1])
def test_config_gets_the_size_of_the_vocabulary(tmp_path, multiple):
    path = text(tmp_path, 30)
    (tmp_path / "base.json").write_text(json.dumps({"hidden_size": 64, "vocab_size": 30522}))
    done = run(
        "--input", path, "--vocab_size", 5000, "--output", "v.txt", "--cased",
        "--bert_config", "base.json", "--output_config", "out/config.json", "--pad_vocab_to_multiple", multiple, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    size = Vocabulary.load(tmp_path / "v.txt").size
    padded = -(-size // multiple) * multiple
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"hidden_size": 64, "vocab_size": padded}
    assert size % 8 and size < 5000 and "no more pairs" in done.stdout


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--cased", "--do_lower_case"], 2, "not allowed with"),
        (["--bert_config", "x.json"], 2, "go together"),
        (["--bert_config", "x.json", "--output_config", "y.json"], 1, "x.json: no such file"),
        (["--do_lower_case", "maybe"], 2, "maybe"),
    ],
)
def test_usage_errors(tmp_path, options, code, message):
    path = text(tmp_path, 5)
    done = run("--input", path, "--vocab_size", 500, "--output", "v.txt", *options, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_feeding_a_word_as_often_as_it_occurs_is_what_the_trainer_counts(tmp_path):
    """Merges depend on counts alone: the text itself through the trainer gives those of the counted words."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    path = text(tmp_path)
    words = count_words([path], False)
    alphabet, _ = choose_alphabet(words, 1000)
    initial = [*special_pieces(0), *alphabet_pieces(alphabet)]
    trainer = trainers.BpeTrainer(
        vocab_size=300, min_frequency=2, continuing_subword_prefix="##", show_progress=False,
        special_tokens=[AddedToken(piece, normalized=False, special=True) for piece in initial],
    )  # fmt: skip
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    learner.train([str(path)], trainer)
    direct = sorted(learner.get_vocab(), key=learner.get_vocab().get)
    assert learn_merges(usable_words(words, alphabet), initial, 300, 2) == direct
    many = [(word, 7 * count) for word, count in usable_words(words, alphabet)]
    scaled, least, divisor = scale_counts(many, 14, limit=sum(words.values()))
    assert (scaled, least, divisor) == (usable_words(words, alphabet), 2, 7)
    assert learn_merges(scaled, initial, 300, least) == direct, "a common factor of all counts changes nothing"


def test_alphabet_by_coverage_and_unused_entries():
    from collections import Counter

    characters = Counter({"a": 90, "b": 8, "c": 1, "d": 1})
    assert limit_characters(characters, 10, 0.98) == ["a", "b"]
    assert limit_characters(characters, 10, 0.985) == ["a", "b", "c"], "ties by code point"
    assert limit_characters(characters, 1, 1.0) == ["a"]
    assert special_pieces(2) == ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
