"""Checkpoints without torch: the start of a phase is what the training would decide, and damaged files are told from good ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from berth.errors import BerthError, CheckpointError
from berth.files import sha256_file
from berth.launch import checkpoints
from berth.training.checkpoint import Entry
from berth.training.phases import decide_start

KINDS = {"p1": (10, 1, False), "p1 end": (20, 1, True), "p2": (25, 2, False), "p2 end": (30, 2, True)}


def manifest(folder: Path, *kinds: str, config: dict[str, int] | None = None) -> None:
    """A run's folder with checkpoints of these ``KINDS``."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for step, phase, final in (KINDS[kind] for kind in kinds):
        path = folder / f"ckpt_{step}.pt"
        torch.save({"weights": torch.zeros(3)}, path)
        entries.append(
            {"file": path.name, "step": step, "phase": phase, "phase_step": step, "samples": 0, "sha256": sha256_file(path),
             "bytes": path.stat().st_size, "pinned": final, "final": final}
        )  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({"checkpoints": entries, "config": config}))


@pytest.mark.parametrize("init", [None, "/weights.pt"])
@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("kinds", [kinds for count in range(5) for kinds in itertools.combinations(KINDS, count)])
def test_the_start_is_what_training_decides(tmp_path: Path, kinds: tuple[str, ...], phase: int, init: str | None) -> None:
    """Against :func:`decide_start`, for every set of checkpoints a folder may hold."""
    if kinds:
        manifest(tmp_path, *kinds)
    known = [Entry(f"ckpt_{step}.pt", step, number, step, 0, "", 1, final, final) for step, number, final in map(KINDS.get, kinds)]  # type: ignore[misc]
    try:
        real = decide_start(known, output_dir=tmp_path, phase=phase, resume=True, init_checkpoint=init)
    except BerthError:
        with pytest.raises(CheckpointError):
            checkpoints.start(tmp_path, checkpoints.read_manifest(tmp_path)[0], phase, init)
        return
    said = checkpoints.start(tmp_path, checkpoints.read_manifest(tmp_path)[0], phase, init)
    if real.entry is not None:
        assert real.entry.file in said
    elif init is not None:
        assert said == f"phase {phase} starts from the weights in {init}"
    else:
        assert said == f"phase 1 starts from random weights in {tmp_path}"


def test_a_manifest_lists_what_is_there(tmp_path: Path) -> None:
    assert checkpoints.read_manifest(tmp_path / "none") == ((), {})
    manifest(tmp_path, "p1", "p1 end", config={"hidden_size": 8})
    (tmp_path / "ckpt_20.pt").unlink()
    entries, config = checkpoints.read_manifest(tmp_path)
    assert [entry.file for entry in entries] == ["ckpt_10.pt"] and config == {"hidden_size": 8}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"checkpoints": [{"file": "ckpt_1.pt"}]}', '{"checkpoints": [3]}'])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        checkpoints.read_manifest(tmp_path)


def test_files_a_killed_run_did_not_enter(tmp_path: Path) -> None:
    manifest(tmp_path, "p1")
    (tmp_path / "ckpt_20.pt").write_bytes(b"")
    (tmp_path / "superseded_1_ckpt_9.pt").write_bytes(b"")
    entries, _ = checkpoints.read_manifest(tmp_path)
    assert checkpoints.unlisted(tmp_path, entries) == ["ckpt_20.pt"]
    assert checkpoints.unlisted(tmp_path / "none", ()) == []


def test_good_files(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "new.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    for name in ("new.pt", "old.bin", "model.safetensors", "model.safetensors.index.json", "."):
        assert checkpoints.damage(tmp_path / name) is None, name


def test_bad_files(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2000)}, tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    safe = len(b"{}").to_bytes(8, "little")
    header = json.dumps({"a": {"data_offsets": [0, 8]}}).encode()
    (tmp_path / "empty").mkdir()
    cases = {
        "missing.pt": (None, "does not exist"),
        "empty": (None, "holds no weights (ckpt_<n>.pt, model.safetensors, pytorch_model.bin)"),
        "cut.pt": (whole[:-100], "is a zip without its end: it is truncated"),
        "text.pt": (b"<html>not found</html>", "is of no known format (torch.save, safetensors)"),
        "nothing.pt": (b"", "is of no known format (torch.save, safetensors)"),
        "x.safetensors": (safe + b"{", "has no safetensors header: it is damaged"),
        "y.safetensors": (len(header).to_bytes(8, "little") + header + b"1234567", f"has {len(header) + 15} bytes, its header describes "
                          f"{len(header) + 16}: it is truncated"),
        "z.index.json": (b"[", "is no JSON: it is damaged"),
    }  # fmt: skip
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert checkpoints.damage(tmp_path / name) == message, name


def test_files_a_manifest_knows(tmp_path: Path) -> None:
    manifest(tmp_path, "p1", "p1 end")
    assert checkpoints.damage(tmp_path / "ckpt_10.pt") is None
    content = bytearray((tmp_path / "ckpt_10.pt").read_bytes())
    content[-30] ^= 1
    (tmp_path / "ckpt_10.pt").write_bytes(content)
    assert checkpoints.damage(tmp_path / "ckpt_10.pt") == f"does not match its checksum in {tmp_path / 'manifest.json'}: it is damaged"
    (tmp_path / "ckpt_10.pt").write_bytes(content[:-1])
    assert checkpoints.damage(tmp_path / "ckpt_10.pt") == f"has {len(content) - 1} bytes, {len(content)} were written: it is truncated"
