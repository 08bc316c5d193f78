"""Byte-level BPE: what Hugging Face's trainer learns, in files that transformers loads."""

import json

import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from berth.errors import ConfigError
from berth.text.bytelevel import FILES, SPECIALS, learn_bytelevel, roberta_tokenizer, write_bytelevel
from berth.text.counting import count_text

TEXT = "The cat sat on the mat, didn't it?  The cats' mats:\tKét kétéltű két 汉字 and 123 numbers 1234 🙂.\n"


def learn(folder, size=400):
    path = folder / "t.txt"
    path.write_text(TEXT * 30 + "the end of the cat\n" * 5, encoding="utf-8")
    return path, learn_bytelevel(sorted(count_text([path], "bytes", False).words.items()), size, 2)


def test_equals_the_library_trainer(tmp_path):
    path, learnt = learn(tmp_path)
    theirs = ByteLevelBPETokenizer()
    lines = path.read_text(encoding="utf-8").splitlines()
    theirs.train_from_iterator(lines, vocab_size=400, min_frequency=2, special_tokens=list(SPECIALS), show_progress=False)
    assert {piece: number for number, piece in enumerate(learnt.pieces)} == theirs.get_vocab()
    theirs.save_model(str(tmp_path), "theirs")
    write_bytelevel(tmp_path / "ours", learnt)
    assert (tmp_path / "ours" / "merges.txt").read_bytes() == (tmp_path / "theirs-merges.txt").read_bytes()
    assert json.loads((tmp_path / "ours" / "vocab.json").read_text(encoding="utf-8")) == theirs.get_vocab()


def test_transformers_loads_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    _, learnt = learn(tmp_path)
    assert sorted(path.name for path in write_bytelevel(tmp_path / "r", learnt)) == sorted(FILES)
    loaded = transformers.RobertaTokenizerFast.from_pretrained(str(tmp_path / "r"))
    own = Tokenizer.from_file(str(tmp_path / "r" / "tokenizer.json"))
    for text in (TEXT.strip(), " the cat", "árvíztűrő <mask> tükör", "日本語 🙂🙂"):
        assert loaded(text)["input_ids"] == own.encode(text).ids == roberta_tokenizer(learnt).encode(text).ids
    own_ids = roberta_tokenizer(learnt).encode("cat <mask>").ids
    assert own_ids == roberta_tokenizer(learnt).encode("cat<mask>").ids, "the space before <mask> belongs to it"
    ids = loaded("the cat", "mat")["input_ids"]
    assert loaded.convert_ids_to_tokens(ids)[0] == "<s>" and ids.count(loaded.sep_token_id) == 3
    assert (loaded.bos_token_id, loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id, loaded.mask_token_id) == (0, 1, 2, 3, 4)
    assert loaded.decode(loaded(TEXT.strip())["input_ids"], skip_special_tokens=True) == TEXT.strip()


def test_limits():
    with pytest.raises(ConfigError, match="need 261"):
        learn_bytelevel([("a", 1)], 260, 2)
    with pytest.raises(ConfigError, match="--min_frequency 0"):
        learn_bytelevel([("a", 1)], 300, 0)
    assert learn_bytelevel([("ab", 1)], 300, 2).pieces[:5] == list(SPECIALS)
