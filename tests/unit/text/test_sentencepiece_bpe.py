"""SentencePiece as WordPiece: the rule of conversion, exact sizes, usable pieces, repeatable samples."""

import sys

import pytest

from berth.errors import ConfigError, DataError
from berth.text.counting import count_text
from berth.text.sentencepiece_bpe import (
    convert_pieces,
    convert_vocabulary,
    learn_sentencepiece,
    read_sentencepiece_vocabulary,
    take_evenly,
    train_model,
)
from berth.text.training import initial_pieces, usable_words
from berth.text.vocabulary import SPECIAL_TOKENS, Vocabulary

pytest.importorskip("sentencepiece", reason="the extra 'sentencepiece' is not installed")

LEARNT = ["<unk>", "<s>", "</s>", "\u2581th", "er", "\u2581the", "\u2581", "", "e", "h", "t", "\u2581##e", "."]
TEXT = (
    "The cat sat (on the mat). The catfish, the cattle; the catalogue: a concatenation!\n"
    "Két kétéltű kétkedett, és ketten kétszer két kecskét kértek.\n"
)


def counted(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(TEXT * 20, encoding="utf-8")
    return count_text([path], "bert", False)


def test_rule_of_conversion():
    assert list(convert_pieces(LEARNT)) == ["th", "##er", "the", "##e", "##h", "##t", "##."]
    assert list(convert_pieces(LEARNT, seen=["th"], keep_control=True))[:4] == ["<unk>", "<s>", "</s>", "##er"]


def test_classic_options():
    plain = convert_vocabulary(LEARNT)
    assert plain[:2] == ["[PAD]", "[unused0]"] and plain[100:105] == ["[unused99]", *SPECIAL_TOKENS[1:]]
    assert len(plain) == len(LEARNT) - 3 - 3 + 105, "controls, the lone start, the empty piece and the duplicate are gone"
    assert convert_vocabulary(LEARNT, specials=False) == plain[105:]
    assert convert_vocabulary(LEARNT, unused=1)[:3] == ["[PAD]", "[unused0]", "[UNK]"]
    assert convert_vocabulary(LEARNT, specials=False, add_characters=True)[7:] == [".", "e", "h", "t"]
    assert convert_vocabulary(LEARNT, unused=0, keep_control=True)[5:8] == ["<unk>", "<s>", "</s>"]


def test_exact_size_keeps_the_characters():
    assert convert_vocabulary(LEARNT, unused=0, size=10) == [*SPECIAL_TOKENS, "th", "##e", "##h", "##t", "##."]
    with pytest.raises(ConfigError, match="more than the 12 pieces"):
        convert_vocabulary(LEARNT, unused=0, size=13)
    with pytest.raises(ConfigError, match="specials and characters alone are 9"):
        convert_vocabulary(LEARNT, unused=0, size=8)
    with pytest.raises(ConfigError, match="--unused -1"):
        convert_vocabulary(LEARNT, unused=-1)


def test_learnt_vocabulary_has_the_size_asked_for_and_only_usable_pieces(tmp_path):
    counts = counted(tmp_path)
    alphabet, initial = initial_pieces(counts, 200, 1000, 1.0, 100)
    words = usable_words(counts.words, alphabet)
    for size in (len(initial), len(initial) + 1, 170, 185):
        pieces = learn_sentencepiece(words, initial, size)
        assert len(pieces) == size == len(set(pieces))
        assert pieces[: len(initial)] == initial
    assert learn_sentencepiece(words, initial, 170) == pieces[:170], "a longer vocabulary begins with the shorter one"
    assert {"##é", "é", "(", "két"} <= set(pieces)
    assert not any(len(piece) > 1 and any(sign in piece for sign in "().,;:!") for piece in pieces), "punctuation stands alone"


def test_too_large_names_the_largest(tmp_path):
    counts = counted(tmp_path)
    alphabet, initial = initial_pieces(counts, 5000, 1000, 1.0, 0)
    words = usable_words(counts.words, alphabet)
    with pytest.raises(ConfigError, match=r"--vocab_size 5000 .* the largest possible with these options is (\d+)") as caught:
        learn_sentencepiece(words, initial, 5000)
    largest = int(str(caught.value).split(" is ")[-1].split(";")[0])
    assert len(learn_sentencepiece(words, initial, largest)) == largest
    with pytest.raises(ConfigError):
        learn_sentencepiece(words, initial, largest + 1)


def test_samples_take_every_choice_equally_and_are_repeatable():
    taken = list(take_evenly(iter(map(str, range(1000))), 1000, 100, 5))
    assert len(taken) == 100 and taken == list(take_evenly(iter(map(str, range(1000))), 1000, 100, 5))
    assert taken != list(take_evenly(iter(map(str, range(1000))), 1000, 100, 6))
    assert 300 < sum(map(int, taken)) / 100 < 700


def options(tmp_path, prefix="m", **changes):
    path = tmp_path / "s.txt"
    if not path.exists():
        path.write_text("".join(f"{TEXT.split()[n % 19]} word{n % 97} line\n" for n in range(2000)), encoding="utf-8")
    return {"input": str(path), "model_prefix": str(tmp_path / prefix), "vocab_size": "100", "model_type": "bpe", **changes}


def test_models_are_repeatable_with_a_sample_and_any_threads(tmp_path):
    for changes in ({}, {"input_sentence_size": "300"}):
        first = train_model(options(tmp_path, "a", **changes))
        second = train_model(options(tmp_path, "b", **changes))
        assert first.vocabulary.read_bytes() == second.vocabulary.read_bytes()
        assert first.model.read_bytes() == second.model.read_bytes()
        threads = train_model(options(tmp_path, "c", **changes, num_threads="4"))
        assert first.vocabulary.read_bytes() == threads.vocabulary.read_bytes()
    assert (first.sentences, first.taken, first.too_long) == (2000, 300, 0)
    assert len(read_sentencepiece_vocabulary(first.vocabulary)) == 100
    assert not list(tmp_path.glob(".*")), "nothing temporary is left"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"vocab_size": "100000"}, ConfigError, r"--vocab_size=100000 .*largest possible is \d+"),
        ({"vocab_size": "5"}, ConfigError, r"--vocab_size=5 is too small.*\d+"),
        ({"vocab_size": ""}, ConfigError, "--vocab_size is required"),
        ({"nonsense": "1"}, ConfigError, "nonsense"),
        ({"input_sentence_size": "many"}, ConfigError, "--input_sentence_size=many"),
        ({"input": "none.txt"}, DataError, "none.txt: no such text file"),
    ],
)
def test_wrong_options_are_explained(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train_model(options(tmp_path, **changes))
    assert not list(tmp_path.glob("m.*"))


def test_vocab_files_of_something_else(tmp_path):
    (tmp_path / "v.txt").write_text("[PAD]\n[UNK]\n")
    (tmp_path / "empty").write_text("")
    with pytest.raises(DataError, match=r"v\.txt: line 1 is not"):
        read_sentencepiece_vocabulary(tmp_path / "v.txt")
    with pytest.raises(DataError, match="empty"):
        read_sentencepiece_vocabulary(tmp_path / "empty")


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r'pip install "berth\[sentencepiece\]"'):
        train_model({"input": "x", "model_prefix": "m", "vocab_size": "10"})


def test_converted_vocabulary_loads(tmp_path):
    trained = train_model(options(tmp_path))
    pieces = convert_vocabulary(read_sentencepiece_vocabulary(trained.vocabulary), add_characters=True, size=190)
    (tmp_path / "v.txt").write_text("".join(piece + "\n" for piece in pieces), encoding="utf-8")
    assert Vocabulary.load(tmp_path / "v.txt").size == 190
