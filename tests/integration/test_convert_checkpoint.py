"""convert_checkpoint.py against the real transformers: names, vocabulary, logits, tokenizer and the fill-mask pipeline."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convert_checkpoint
from berth.errors import CheckpointError, ConfigError, DataError
from berth.export import huggingface, load_weights, match_weights
from berth.export.layout import PADDING_MULTIPLES, resize_tied

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("modeling")

ROOT = Path(__file__).resolve().parents[2]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
UNCASED = [*SPECIALS, *"abcdefghij", *(f"##{letter}" for letter in "abcdefghij"), "kate", "uszo", ".", ",", "中"]  # 30
CASED = [*SPECIALS, *"ABCDEabcde", *(f"##{letter}" for letter in "abcdefghij"), "Kate", "Úszó", "úszó", ",", "中"]  # 30
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": 20}  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_vocabulary(folder, pieces=UNCASED):
    path = folder / "source_vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return path


def tiny_model(kind=transformers.BertForPreTraining, vocab_size=30, **changes):
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=vocab_size, **{**SIZES, "hidden_act": "gelu_pytorch_tanh", **changes})
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and LayerNorms too, so that a lost one shows
            if "bias" in name or "LayerNorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def berth_checkpoint(path, model=None, state=None, **changes):
    """As run_pretraining.py writes it: vocabulary padded to 8, its real size in the config, HF names, both tied names."""
    model = model or tiny_model()
    config = {**SIZES, "vocab_size": model.config.vocab_size, "hidden_act": "gelu_tanh", "num_labels": 2, "problem_type": None}
    state = state or {name: tensor.clone() for name, tensor in model.state_dict().items()}
    padded = {name: tensor.clone() for name, tensor in resize_tied(state, -(-model.config.vocab_size // 8) * 8).items()}
    payload = {"format": "berth-checkpoint", "format_version": 1, "model": padded, "config": config,
               "objective": "mlm+nsp", "optimizer": {"state": {}, "param_groups": []}, "step": 5, "phase": 1, **changes}  # fmt: skip
    torch.save(payload, path)
    return path


def inputs(vocab_size=30):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, vocab_size, (3, 12), generator=generator)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (torch.arange(12) > 5).long().expand(3, 12)}


def logits(model, **changes):
    with torch.no_grad():
        output = model(**{**inputs(), **changes})
    return output.prediction_logits, output.seq_relationship_logits


def convert(*words):
    return convert_checkpoint.main([str(word) for word in words])


def to_huggingface(checkpoint, vocabulary, out, *more):
    assert convert("to_huggingface", "--checkpoint", checkpoint, "--vocab_file", vocabulary, "--output_dir", out, *more) == 0


def load_exactly(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    left = {key: value for key, value in info.items() if value}
    assert not left, left
    return model.eval()


def test_a_round_trip_is_bitwise(tmp_path):
    original = tiny_model()
    original.save_pretrained(tmp_path / "theirs")
    assert convert("from_huggingface", "--input", tmp_path / "theirs", "--output", tmp_path / "init.pt") == 0
    saved = torch.load(tmp_path / "init.pt", weights_only=True)
    assert set(saved) == {"format", "format_version", "model", "config"} and saved["config"]["vocab_size"] == 30
    assert saved["model"]["cls.predictions.decoder.weight"].shape == (32, 16)
    assert saved["model"].keys() == original.state_dict().keys()
    to_huggingface(tmp_path / "init.pt", write_vocabulary(tmp_path), tmp_path / "ours", "--do_lower_case")
    again = load_exactly(transformers.BertForPreTraining, tmp_path / "ours")
    for name, tensor in original.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert all(torch.equal(a, b) for a, b in zip(logits(original), logits(again), strict=True))
    assert again.config.hidden_act == "gelu_pytorch_tanh" and again.config.vocab_size == 30


def test_a_checkpoint_of_berths_own_model_gives_equal_logits(tmp_path):
    torch.manual_seed(3)
    config = modeling.BertConfig.from_dict({**SIZES, "vocab_size": 30, "hidden_act": "gelu_tanh"})
    ours = modeling.BertForPreTraining(config.padded()).eval()
    torch.save({"format": "berth-checkpoint", "format_version": 1, "model": ours.state_dict(), "config": config.to_dict(),
                "objective": "mlm+nsp"}, tmp_path / "ckpt_5.pt")  # fmt: skip
    to_huggingface(tmp_path / "ckpt_5.pt", write_vocabulary(tmp_path), tmp_path / "out")
    theirs = load_exactly(transformers.BertForPreTraining, tmp_path / "out")
    with torch.no_grad():
        mine = ours(**inputs())
    predictions, relationship = logits(theirs)
    assert (mine.prediction_logits[..., :30] - predictions).abs().max() <= 1e-6
    assert (mine.seq_relationship_logits - relationship).abs().max() <= 1e-6
    weights, _, _ = load_weights(tmp_path / "out")  # and back into berth's model
    report = match_weights({name: tensor.shape for name, tensor in ours.state_dict().items()}, weights)
    assert report.complete and report.unexpected == ()
    back = modeling.BertForPreTraining(config.padded())
    back.load_state_dict(report.weights)
    trimmed = ours.state_dict()["cls.predictions.decoder.weight"][:30]
    assert torch.equal(back.state_dict()["cls.predictions.decoder.weight"][:30], trimmed)


def test_the_other_loaders_work_too(tmp_path):
    to_huggingface(berth_checkpoint(tmp_path / "ckpt_5.pt"), write_vocabulary(tmp_path), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertForPreTraining"]
    model, info = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all("pooler" in name or "seq_relationship" in name for name in info["unexpected_keys"])
    encoder, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(encoder.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


def test_masked_language_model_alone(tmp_path):
    original = tiny_model(transformers.BertForMaskedLM)
    to_huggingface(berth_checkpoint(tmp_path / "ckpt_5.pt", original, objective="mlm"), write_vocabulary(tmp_path),
                   tmp_path / "out")  # fmt: skip
    again = load_exactly(transformers.BertForMaskedLM, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(original(**inputs()).logits, again(**inputs()).logits)
    assert convert("from_huggingface", "--input", tmp_path / "out", "--output", tmp_path / "init.pt") == 0
    report = match_weights(_shapes(tiny_model(vocab_size=32)), load_weights(tmp_path / "init.pt").weights)
    assert not report.complete and len(report.missing) == 4  # the pooler and the next-sentence classifier


def _shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("option", [["--do_lower_case"], []], ids=["told", "seen"])
def test_the_uncased_tokenizer(tmp_path, option):
    to_huggingface(berth_checkpoint(tmp_path / "ckpt_5.pt"), write_vocabulary(tmp_path), tmp_path / "out", *option)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("KATE Úszó [MASK] Fad, 中a") == ["kate", "uszo", "[MASK]", "f", "##a", "##d", ",", "中", "a"]
    assert tokenizer.convert_tokens_to_ids(UNCASED) == list(range(30)) and len(tokenizer) == 30
    pair = tokenizer("kate", "a b")
    assert pair["input_ids"] == [2, 25, 3, 5, 6, 3] and pair["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    assert tokenizer.model_max_length == 20 and tokenizer.pad_token_id == 0
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (tmp_path / "source_vocab.txt").read_bytes()


@pytest.mark.parametrize("option", [["--cased"], []], ids=["told", "seen"])
def test_the_cased_tokenizer(tmp_path, option):
    vocabulary = write_vocabulary(tmp_path, CASED)
    to_huggingface(berth_checkpoint(tmp_path / "ckpt_5.pt"), vocabulary, tmp_path / "out", *option)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("Kate úszó Úszó KATE Bad") == ["Kate", "úszó", "Úszó", "[UNK]", "B", "##a", "##d"]
    assert tokenizer.do_lower_case is False


def test_fill_mask_runs_and_predicts_what_the_model_says(tmp_path):
    to_huggingface(berth_checkpoint(tmp_path / "ckpt_5.pt"), write_vocabulary(tmp_path), tmp_path / "out")
    fill = transformers.pipeline("fill-mask", model=str(tmp_path / "out"), device="cpu")
    guesses = fill("kate [MASK] .", top_k=30)
    assert {guess["token"] for guess in guesses} == set(range(30))
    assert sum(guess["score"] for guess in guesses) == pytest.approx(1.0, abs=1e-4)


def test_nvidia_weights_come_in(tmp_path):
    """Their names and padding, their gelu; the result computes what a Hugging Face model with these weights does."""
    original = tiny_model()
    state = resize_tied(original.state_dict(), 32)
    theirs = {
        name.replace("intermediate.dense.", "intermediate.dense_act.").replace("pooler.dense.", "pooler.dense_act.")
        .replace("transform.dense.", "transform.dense_act.").replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items() if name != "cls.predictions.decoder.bias"
    }  # fmt: skip
    torch.save({"model": theirs, "optimizer": {}, "epoch": 0}, tmp_path / "ckpt_8601.pt")
    config = tmp_path / "bert_config.json"
    config.write_text(json.dumps({**SIZES, "vocab_size": 30, "hidden_act": "gelu"}))
    arguments = ["from_huggingface", "--input", tmp_path / "ckpt_8601.pt", "--output", tmp_path / "init.pt"]
    with pytest.raises(ConfigError, match="come without a configuration; give --config_file"):
        convert(*arguments)
    assert convert(*arguments, "--config_file", config) == 0
    to_huggingface(tmp_path / "init.pt", write_vocabulary(tmp_path), tmp_path / "out")
    again = load_exactly(transformers.BertForPreTraining, tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(logits(original), logits(again), strict=True))


@pytest.mark.parametrize("multiple,rows", [(1, 30), (8, 32), (64, 64)])
def test_padding_of_the_vocabulary(tmp_path, multiple, rows):
    tiny_model().save_pretrained(tmp_path / "theirs")
    convert("from_huggingface", "--input", tmp_path / "theirs", "--output", tmp_path / "init.pt",
            "--pad_vocab_to_multiple", multiple)  # fmt: skip
    saved = torch.load(tmp_path / "init.pt", weights_only=True)
    embeddings, bias = (saved["model"][name] for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"))
    assert embeddings.shape == (rows, 16) and bias.shape == (rows,) and saved["config"]["vocab_size"] == 30
    assert all(torch.equal(row, embeddings[0]) for row in embeddings[30:]) and all(b == bias[0] for b in bias[30:])
    assert embeddings.data_ptr() == saved["model"]["cls.predictions.decoder.weight"].data_ptr()  # stored once


def test_a_padded_config_and_an_output_folder(tmp_path):
    """vocab_size rounded up by hand (as published configs have it) is still cut to the vocabulary's size."""
    run = tmp_path / "run"
    run.mkdir()
    path = berth_checkpoint(run / "ckpt_5.pt", tiny_model(vocab_size=32))
    (run / "manifest.json").write_text(json.dumps({"checkpoints": [{"file": path.name, "step": 5, "phase": 1}]}))
    to_huggingface(run, write_vocabulary(tmp_path), run / "export")
    assert load_exactly(transformers.BertForPreTraining, run / "export").config.vocab_size == 30


def test_wrong_vocabularies_are_refused(tmp_path):
    checkpoint = berth_checkpoint(tmp_path / "ckpt_5.pt")
    for pieces, message in [
        ([*UNCASED, "x", "y", "z"], "has 33 pieces, the model only 32 word embeddings"),
        (UNCASED[:-1], "has 29 pieces, the model's vocab_size is 30"),
    ]:
        with pytest.raises(DataError, match=message):
            to_huggingface(checkpoint, write_vocabulary(tmp_path, pieces), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_weights_are_refused_and_the_earlier_export_stays(tmp_path):
    vocabulary = write_vocabulary(tmp_path)
    good = berth_checkpoint(tmp_path / "good.pt")
    to_huggingface(good, vocabulary, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    incomplete = dict(torch.load(good, weights_only=True)["model"])
    del incomplete["bert.pooler.dense.bias"]
    diverged = tiny_model()
    with torch.no_grad():
        diverged.bert.embeddings.word_embeddings.weight[3, 3] = float("nan")
    cut = tmp_path / "cut.pt"
    cut.write_bytes(good.read_bytes()[:-100])
    for bad, message in [
        (berth_checkpoint(tmp_path / "a.pt", state=incomplete), r"do not fill .* 1 missing: bert\.pooler\.dense\.bias"),
        (berth_checkpoint(tmp_path / "b.pt", diverged), "holds NaN or infinity; the training diverged"),
        (cut, "is truncated"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            to_huggingface(bad, vocabulary, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    to_huggingface(good, vocabulary, tmp_path / "out")  # the same again: replaced, nothing left over
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


def test_wrong_options_are_refused(tmp_path):
    checkpoint, vocabulary = berth_checkpoint(tmp_path / "ckpt_5.pt"), write_vocabulary(tmp_path)
    config = tmp_path / "c.json"
    config.write_text(json.dumps({**SIZES, "vocab_size": 30, "hidden_size": 32, "hidden_act": "gelu_pytorch_tanh"}))
    with pytest.raises(ConfigError, match=r"contradicts the weights: hidden_size=32 \(weights: 16\); leave it out"):
        to_huggingface(checkpoint, vocabulary, tmp_path / "out", "--config_file", config)
    config.write_text("{")
    for file in (config, tmp_path / "absent.json"):
        with pytest.raises(ConfigError, match=r"--config_file: configuration .* cannot be read"):
            to_huggingface(checkpoint, vocabulary, tmp_path / "out", "--config_file", file)
    tiny_model().save_pretrained(tmp_path / "theirs")
    pad = ["from_huggingface", "--input", tmp_path / "theirs", "--pad_vocab_to_multiple"]
    for multiple in (0, 7, 24, 256):  # the export would not know the padding from another vocabulary
        with pytest.raises(SystemExit) as caught:
            convert(*pad, multiple, "--output", tmp_path / "init.pt")
        assert caught.value.code == 2
    with pytest.raises(ConfigError, match="--pad_vocab_to_multiple must be one of 1, 8, 16, 32, 64, 128, got 7"):
        huggingface.from_huggingface(tmp_path / "theirs", tmp_path / "init.pt", pad_vocab_to_multiple=7)
    assert (1, *PADDING_MULTIPLES) == convert_checkpoint.PADDING
    with pytest.raises(ConfigError, match=r"is a folder; name the \.pt file"):
        convert(*pad, 8, "--output", tmp_path)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**SIZES, "vocab_size": 25}))
    with pytest.raises(CheckpointError, match="30 word embeddings, but vocab_size is 25"):
        convert(*pad, 8, "--output", tmp_path / "init.pt")
    assert not (tmp_path / "init.pt").exists()


def test_the_command_line(tmp_path):
    checkpoint, vocabulary = berth_checkpoint(tmp_path / "ckpt_5.pt"), write_vocabulary(tmp_path)

    def run(*words):
        command = [sys.executable, str(ROOT / "convert_checkpoint.py"), *map(str, words)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    arguments = ["to_huggingface", "--checkpoint", checkpoint, "--vocab_file", vocabulary, "--output_dir"]
    done = run(*arguments, "out")
    assert done.returncode == 0, done.stderr
    assert "BertForPreTraining, vocabulary 30; uncased, judging by its capital letters" in done.stdout
    bad = run(*arguments, vocabulary)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == f"error: --output_dir {vocabulary} is a file; name a folder\n"
    bad = run(*arguments[:1], "--checkpoint", "absent.pt", *arguments[3:], "other")
    assert bad.returncode == 1 and bad.stderr.startswith("error: absent.pt does not exist")
    assert run("to_huggingface").returncode == 2 and run("--help").returncode == 0
    assert run(*arguments, "x", "--cased", "--do_lower_case").returncode == 2


def test_another_vocabulary_of_the_same_size(tmp_path):
    vocabulary = write_vocabulary(tmp_path)
    digest = hashlib.sha256(vocabulary.read_bytes()).hexdigest()
    for identity in ({"vocab_sha256": digest}, {"vocab_sha256": ""}, {}, None):
        to_huggingface(berth_checkpoint(tmp_path / "ckpt_5.pt", identity=identity), vocabulary, tmp_path / "out")
    vocabulary = write_vocabulary(tmp_path, [*SPECIALS, *reversed(UNCASED[5:])])
    checkpoint = berth_checkpoint(tmp_path / "ckpt_5.pt", identity={"vocab_sha256": digest})
    with pytest.raises(DataError, match=r"source_vocab\.txt is not the vocabulary that .*ckpt_5\.pt were trained with"):
        to_huggingface(checkpoint, vocabulary, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    to_huggingface(checkpoint, vocabulary, tmp_path / "new", "--allow_other_vocabulary")


CYRILLIC = [*SPECIALS, *"абвгдежзик", *(f"##{letter}" for letter in "абвгдежзик"), "мой", "мои", "Мой", ",", "."]
HINDI = [*SPECIALS, *"कखगघचछजझटठ", *(f"##{letter}" for letter in "कखगघचछजझटठ"), "हिन्दी", "हनद", "।", ",", "."]
ACCENTED = [*SPECIALS, *"abcdefghij", *(f"##{letter}" for letter in "abcdefghij"), "úszó", "uszo", ".", ",", "中"]


def exported_tokens(folder, text):
    return transformers.AutoTokenizer.from_pretrained(folder).tokenize(text)


def test_the_case_of_other_scripts(tmp_path):
    checkpoint = berth_checkpoint(tmp_path / "ckpt_5.pt")
    to_huggingface(checkpoint, write_vocabulary(tmp_path, CYRILLIC), tmp_path / "out")
    assert exported_tokens(tmp_path / "out", "Мой мой") == ["Мой", "мой"]
    small = [{"Мой": "же", "мой": "не"}.get(piece, piece) for piece in CYRILLIC]
    to_huggingface(checkpoint, write_vocabulary(tmp_path, small), tmp_path / "out")
    assert exported_tokens(tmp_path / "out", "Мои мой") == ["мои", "мои"]
    for pieces in (HINDI, ACCENTED):
        vocabulary = write_vocabulary(tmp_path, pieces)
        with pytest.raises(ConfigError, match=r"does not show whether the model is cased; give --cased .* or --do_lower_case"):
            to_huggingface(checkpoint, vocabulary, tmp_path / "other")
    vocabulary = write_vocabulary(tmp_path, HINDI)
    to_huggingface(checkpoint, vocabulary, tmp_path / "out", "--cased")
    assert exported_tokens(tmp_path / "out", "हिन्दी।") == ["हिन्दी", "।"]
    to_huggingface(berth_checkpoint(tmp_path / "ckpt_6.pt", do_lower_case=False), vocabulary, tmp_path / "out")
    assert exported_tokens(tmp_path / "out", "हिन्दी।") == ["हिन्दी", "।"]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("known,agrees,contradicts", [(True, "--do_lower_case", "--cased"), (False, "--cased", "--do_lower_case")])
def test_the_checkpoint_knows_its_case(tmp_path, known, agrees, contradicts):
    checkpoint, vocabulary = berth_checkpoint(tmp_path / "ckpt_5.pt", do_lower_case=known), write_vocabulary(tmp_path)
    for option in ([], [agrees]):
        to_huggingface(checkpoint, vocabulary, tmp_path / "out", *option)
        assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["do_lower_case"] is known
    with pytest.raises(ConfigError, match=rf"{contradicts} contradicts .*ckpt_5\.pt") as caught:
        to_huggingface(checkpoint, vocabulary, tmp_path / "out", contradicts)
    assert caught.value.exit_code == 2
    unknown = berth_checkpoint(tmp_path / "ckpt_6.pt", do_lower_case=None)
    to_huggingface(unknown, vocabulary, tmp_path / "out", contradicts)


def test_the_input_is_never_overwritten(tmp_path):
    theirs = tmp_path / "theirs"
    tiny_model().save_pretrained(theirs)
    torch.save(tiny_model().state_dict(), theirs / "pytorch_model.bin")
    (tmp_path / "link.pt").symlink_to(theirs / "pytorch_model.bin")
    before = {path: path.read_bytes() for path in theirs.iterdir()}
    for source, output, message in [
        (theirs, theirs / "config.json", "is the input file"),
        (theirs / "pytorch_model.bin", theirs / "pytorch_model.bin", "is the input file"),
        (theirs / "pytorch_model.bin", tmp_path / "link.pt", "is the input file"),
        (theirs, theirs / "model.safetensors", r"name a \.pt file"),
        (theirs, tmp_path / "new.safetensors", r"name a \.pt file"),
    ]:
        with pytest.raises(ConfigError, match=message):
            convert("from_huggingface", "--input", source, "--output", output)
    assert {path: path.read_bytes() for path in theirs.iterdir()} == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64 vs 0\nmore")])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    checkpoint, vocabulary = berth_checkpoint(tmp_path / "ckpt_5.pt"), write_vocabulary(tmp_path)
    tiny_model().save_pretrained(tmp_path / "theirs")
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=r"init\.pt cannot be written: (No space|unexpected pos 64 vs 0$)"):
            convert("from_huggingface", "--input", tmp_path / "theirs", "--output", tmp_path / "init.pt")
    for place in ("safetensors.torch.save", "load_tokenizer"):
        with monkeypatch.context() as patch:
            patch.setattr(f"berth.export.huggingface.{place}", full)
            with pytest.raises(CheckpointError, match=r"(model\.safetensors|tokenizer\.json) cannot be written"):
                to_huggingface(checkpoint, vocabulary, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_really_full_disk(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root and the right to mount a tmpfs")
    try:
        checkpoint, vocabulary = berth_checkpoint(tmp_path / "ckpt_5.pt"), write_vocabulary(tmp_path)
        tiny_model().save_pretrained(tmp_path / "theirs")
        with pytest.raises(CheckpointError, match=r"init\.pt cannot be written"):
            convert("from_huggingface", "--input", tmp_path / "theirs", "--output", small / "init.pt")
        with pytest.raises(CheckpointError, match="cannot be written"):
            to_huggingface(checkpoint, vocabulary, small)
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
