"""berth.files: complete or absent, whatever happens in between."""

import errno
import json
import os

import pytest

from berth.files import atomic_open, atomic_path, read_json, remove_leftovers, sampled_digest, sha256_file, sha256_json, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "value.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"), atomic_open(path) as handle:
        handle.write("new, but")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["value.txt"]


def test_the_name_appears_only_when_complete(tmp_path):
    path = tmp_path / "deep" / "value.bin"
    with atomic_open(path, "wb") as handle:
        handle.write(b"12")
        assert not path.exists()
    assert path.read_bytes() == b"12"


def test_atomic_path_for_writers_that_open_by_name(tmp_path):
    with atomic_path(tmp_path / "x") as temporary:
        temporary.write_bytes(b"abc")
    assert (tmp_path / "x").read_bytes() == b"abc"
    with pytest.raises(ValueError), atomic_open(tmp_path / "y", "a"):
        pass


def test_json_round_trip_and_digests(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, 2.5, None]}
    assert json.loads((tmp_path / "a.json").read_bytes().decode("utf-8"))
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 1, "b": 3})
    (tmp_path / "b").write_bytes(b"abc")
    assert sha256_file(tmp_path / "b") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / ".ckpt_3.pt.77.partial").write_bytes(b"half")
    (tmp_path / ".ckpt_4.pt.n-1.77.partial").write_bytes(b"half")
    others = [".ckpt_4.pt.n-1.x.partial", ".pytorch_model.bin.n-1.77.partial", "ckpt_2.pt"]
    for name in others:
        (tmp_path / name).write_bytes(b"whole, or of somebody who is still writing")
    assert remove_leftovers(tmp_path, lambda name: name.startswith("ckpt_")) == [".ckpt_3.pt.77.partial", ".ckpt_4.pt.n-1.77.partial"]
    assert sorted(os.listdir(tmp_path)) == others


def test_a_sampled_digest_sees_size_and_both_ends(tmp_path):
    """Equal files have equal digests wherever they lie; a change at an end, in the middle, or of the size shows."""
    path, data = tmp_path / "a", bytes(range(256)) * 2000
    path.write_bytes(data)
    (tmp_path / "copy").write_bytes(data)
    found = {sampled_digest(path), sampled_digest(tmp_path / "copy")}
    for at in (0, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:at] + b"\xff\x00" + data[at + 2 :] if at < len(data) - 1 else data[:-1] + b"\x00")
        found.add(sampled_digest(path))
    path.write_bytes(data + b"x")
    found.add(sampled_digest(path))
    assert len(found) == 5
    path.write_bytes(b"")
    assert sampled_digest(path) not in found
