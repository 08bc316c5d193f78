"""Vocabulary training: the same bytes in every process, the promised order, honest limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from berth.errors import ConfigError, DataError
from berth.text.tokenizer import load_tokenizer
from berth.text.training import choose_alphabet, count_words, train_wordpiece
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


def test_config_gets_the_real_size(tmp_path):
    path = text(tmp_path, 30)
    (tmp_path / "base.json").write_text(json.dumps({"hidden_size": 64, "vocab_size": 30522}))
    done = run(
        "--input", path, "--vocab_size", 5000, "--output", "v.txt", "--cased",
        "--bert_config", "base.json", "--output_config", "out/config.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    size = Vocabulary.load(tmp_path / "v.txt").size
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"hidden_size": 64, "vocab_size": size}
    assert size < 5000 and "no more pairs" in done.stdout


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
