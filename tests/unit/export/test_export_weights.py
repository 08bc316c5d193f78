"""Reading weights from every kind of file, and one clear error for everything else: berth.export.weights and folder."""

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import convert_checkpoint
from berth.errors import CheckpointError, ConfigError
from berth.export import folder as folder_module
from berth.export import load_weights
from berth.export.folder import MARKER, UNFINISHED, export_folder
from berth.export.layout import pretraining_shapes
from berth.export.weights import newest_checkpoint

CONFIG = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
          "hidden_act": "gelu"}  # fmt: skip


def random_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = {n: torch.randn(shape, generator=generator) for n, shape in pretraining_shapes(CONFIG).items()}
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    return weights


def berth_checkpoint(**changes):
    return {"format": "berth-checkpoint", "format_version": 1, "model": random_weights(), "config": CONFIG,
            "objective": "mlm+nsp", "optimizer": {"state": {}, "param_groups": []}, "step": 5, "phase": 1, **changes}  # fmt: skip


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_berth_checkpoint(tmp_path):
    torch.save(berth_checkpoint(), tmp_path / "ckpt_5.pt")
    weights, config, source = load_weights(tmp_path / "ckpt_5.pt")
    assert same(weights, random_weights()) and config == CONFIG
    assert source == f"berth weights {tmp_path / 'ckpt_5.pt'}"


def test_an_output_folder_means_its_newest_good_checkpoint(tmp_path, caplog):
    entries = []
    for step in (5, 9):
        file = tmp_path / f"ckpt_{step}.pt"
        torch.save(berth_checkpoint(model=random_weights(step)), file)
        data = file.read_bytes()
        entries.append({"file": file.name, "step": step, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})
    (tmp_path / "manifest.json").write_text(json.dumps({"checkpoints": entries}))
    assert same(load_weights(tmp_path).weights, random_weights(9))
    damaged = bytearray((tmp_path / "ckpt_9.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "ckpt_9.pt").write_bytes(damaged)
    assert same(load_weights(tmp_path).weights, random_weights(5))
    assert "ckpt_9.pt does not match its checksum in manifest.json: it is truncated or damaged; the older ckpt_5.pt is used" in caplog.text
    (tmp_path / "ckpt_9.pt").write_bytes(damaged[:-50])
    assert newest_checkpoint(tmp_path).name == "ckpt_5.pt" and "ckpt_9.pt has " in caplog.text
    (tmp_path / "ckpt_9.pt").unlink()
    assert newest_checkpoint(tmp_path).name == "ckpt_5.pt" and "ckpt_9.pt is listed in manifest.json but does not exist" in caplog.text
    (tmp_path / "manifest.json").write_text(json.dumps({"checkpoints": [{"file": "ckpt_5.pt"}, {"file": "cut.pt"}, 7]}))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "ckpt_5.pt").read_bytes()[:-50])  # without a checksum: it must open
    assert newest_checkpoint(tmp_path).name == "ckpt_5.pt" and "cut.pt is truncated" in caplog.text
    (tmp_path / "ckpt_5.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*manifest\.json can be used \(.*cut\.pt is truncated.*ckpt_5"):
        load_weights(tmp_path)
    for content in ('{"checkpoints": []}', "{", "[]"):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"lists no checkpoint .* give the ckpt_\*\.pt itself"):
            load_weights(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", [None, "model", "module", "state_dict", "model_state_dict"])
def test_torch_files_of_others(tmp_path, wrapper, legacy):
    weights = random_weights()
    payload = weights if wrapper is None else {wrapper: weights, "optimizer": {"state": {}}, "epoch": 3}
    torch.save(payload, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    loaded = load_weights(tmp_path / "pytorch_model.bin")
    assert same(loaded.weights, weights) and loaded.config is None
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert load_weights(tmp_path).config == CONFIG


def test_nvidia_weights_half_precision_and_their_gelu(tmp_path):
    theirs = {
        "module." + name.replace("intermediate.dense", "intermediate.dense_act").replace("pooler.dense", "pooler.dense_act")
        .replace("transform.dense", "transform.dense_act"): tensor.half()
        for name, tensor in random_weights().items()
        if name != "cls.predictions.decoder.bias"
    }  # fmt: skip
    theirs["module.bert.embeddings.position_ids"] = torch.arange(4)
    torch.save({"model": theirs, "epoch": 1}, tmp_path / "ckpt_7038.pt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weights, config, source = load_weights(tmp_path / "ckpt_7038.pt")
    expected = random_weights()
    del expected["cls.predictions.decoder.bias"]
    assert same(weights, {name: tensor.half().float() for name, tensor in expected.items()})
    assert config["hidden_act"] == "gelu_pytorch_tanh" and source.startswith("NVIDIA")


def test_safetensors_whole_and_in_pieces(tmp_path):
    weights = {k: v for k, v in random_weights().items() if "decoder" not in k}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    assert same(load_weights(tmp_path).weights, weights)
    names = list(weights)
    (tmp_path / "model.safetensors").unlink()
    pieces = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in pieces.items():
        safetensors.torch.save_file({name: weights[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in pieces.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(load_weights(tmp_path).weights, weights)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        load_weights(tmp_path)


class Custom:
    pass


def _broken(tmp_path, kind):
    good = tmp_path / "good.pt"
    torch.save(berth_checkpoint(), good)
    data = good.read_bytes()
    safetensors.torch.save_file({"bert.encoder.layer.0.x": torch.zeros(4)}, tmp_path / "good.safetensors")
    files = {
        "empty.pt": b"",
        "cut.pt": data[: len(data) // 2],
        "barely_cut.pt": data[:-10],
        "mixed.pt": b"\x80\x02" + b"these are not the weights you are looking for",
        "text.pt": b"these are not the weights you are looking for",
        "pickle.pt": pickle.dumps({"model": Custom()}, protocol=2),
        "cut.safetensors": (tmp_path / "good.safetensors").read_bytes()[:-5],
        "noise.safetensors": b"\xff" * 100,
        "lfs.bin": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "lfs.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    (tmp_path / kind).write_bytes(files[kind])
    return tmp_path / kind


@pytest.mark.parametrize("kind,message", [
    ("empty.pt", "is empty"),
    ("cut.pt", "is truncated"),
    ("barely_cut.pt", "is truncated"),
    ("mixed.pt", "cannot be read .*: it is damaged"),
    ("text.pt", "is not a weights file"),
    ("pickle.pt", r"holds more than tensors and plain values and was not opened \(it could run code\)"),
    ("cut.safetensors", "truncated or damaged"),
    ("noise.safetensors", "truncated or damaged"),
    ("lfs.bin", "is a Git LFS pointer"),
    ("lfs.safetensors", "is a Git LFS pointer"),
])  # fmt: skip
def test_damaged_files_give_one_line(tmp_path, kind, message):
    file = _broken(tmp_path, kind)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_something_else(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match=r"neither manifest\.json .* nor model\.safetensors or pytorch_model\.bin"):
        load_weights(tmp_path)
    for payload, message in [
        ({"weight": torch.zeros(2)}, r"holds no BERT encoder \(it begins with weight\)"),
        ({"epoch": 3}, "holds no tensors by name"),
        ([torch.zeros(2)], "holds no tensors by name"),
        (berth_checkpoint(format_version=2), "format version 2, this berth reads 1"),
        (berth_checkpoint(config=None), "without its model or config"),
        (berth_checkpoint(model={}), "holds no BERT encoder .*no tensor at all"),
    ]:
        torch.save(payload, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=message):
            load_weights(tmp_path / "other.pt")
    torch.save(random_weights(), tmp_path / "other.pt")
    for config in ("{", "[1]"):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(CheckpointError, match=r"configuration .*config\.json"):
            load_weights(tmp_path / "other.pt")


def test_an_export_folder_is_complete_or_absent(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError, match="boom"), export_folder(target, {}) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []
    target.mkdir()  # an empty folder is taken over
    for version in ("first", "second"):
        with export_folder(target, {"source": version}) as folder:
            (folder / f"{version}.txt").write_text(version)
        assert {path.name for path in target.iterdir()} == {f"{version}.txt", MARKER}
        assert json.loads((target / MARKER).read_text()) == {"source": version, "files": [f"{version}.txt"]}
    with pytest.raises(RuntimeError), export_folder(target, {}):
        raise RuntimeError
    assert (target / "second.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_replaces_nothing_of_others(tmp_path):
    target = tmp_path / "out"
    with export_folder(target, {}) as folder:
        (folder / "a").write_text("a")
    (target / "README.md").write_text("my model card")
    with pytest.raises(ConfigError, match=r"holds README\.md, which no export wrote"), export_folder(target, {}):
        pass
    (target / MARKER).unlink()
    with pytest.raises(ConfigError, match="is not empty and not an earlier export"), export_folder(target, {}):
        pass
    assert (target / "README.md").read_text() == "my model card"
    with pytest.raises(ConfigError, match="is a file"), export_folder(target / "a", {}):
        pass


def write_export(target, **files):
    with export_folder(target, {}) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != MARKER}


def test_an_export_keeps_the_folder_itself(tmp_path):
    """A mount point cannot be renamed, and a link must stay one."""
    real, link = tmp_path / "disk", tmp_path / "link"
    real.mkdir()
    (real / "lost+found").mkdir()
    number = real.stat().st_ino
    link.symlink_to(real)
    for version in ("1", "2"):
        write_export(link, a=version)
        (real / "lost+found").rmdir() if version == "1" else None
        assert link.is_symlink() and real.stat().st_ino == number and (real / "a").read_text() == version
    assert contents(real) == {"a": "2"} and {path.name for path in tmp_path.iterdir()} == {"disk", "link"}


@pytest.mark.parametrize("moves", range(5))
def test_a_killed_export_is_recognised_and_replaced(tmp_path, moves):
    """Killed before each of the moves (marker, a, b, marker): the folder is the old export, or has no marker."""
    target = tmp_path / "out"
    write_export(target, a="old", gone="old")
    script = """
import os, sys
from pathlib import Path
from berth.export import folder
left, real = int(sys.argv[2]), os.replace
def replace(one, other):
    global left
    if Path(other).parent == Path(sys.argv[1]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
    real(one, other)
with folder.export_folder(Path(sys.argv[1]), {}) as to:
    (to / "a").write_text("new")
    (to / "b").write_text("new")
    os.replace = replace
"""
    root = os.path.dirname(convert_checkpoint.__file__)
    done = subprocess.run([sys.executable, "-c", script, target, str(moves)], cwd=root, check=False)
    assert done.returncode == (-9 if moves < 4 else 0)
    if moves == 0:
        assert (target / MARKER).exists() and (target / "a").read_text() == (target / "gone").read_text() == "old"
    elif moves < 4:
        assert (target / UNFINISHED).exists() and not (target / MARKER).exists()
    write_export(target, a="newest", c="newest")
    assert contents(target) == {"a": "newest", "c": "newest"}
    assert json.loads((target / MARKER).read_text()) == {"files": ["a", "c"]}


def test_a_failing_disk_at_publication(tmp_path, monkeypatch):
    target = tmp_path / "out"
    write_export(target, a="old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder_module, "_sync", full)
    with pytest.raises(CheckpointError, match=r"out cannot be written: No space left on device"):
        write_export(target, a="new")
    assert contents(target) == {"a": "old"} and (target / MARKER).exists()
