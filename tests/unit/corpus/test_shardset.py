"""Which files of a folder are shards, and whether they are the complete set."""

import json

import pytest

from berth.corpus.shardset import select_shards, write_manifest
from berth.errors import DataError


def names(paths):
    return [path.name for path in paths]


def write(folder, *found):
    folder.mkdir(exist_ok=True)
    for name in found:
        (folder / name).write_text("one\n\ntwo\n")


def test_only_shards_of_a_folder_with_shards(tmp_path):
    write(tmp_path, "a.txt", "vocab.txt")
    assert names(select_shards(tmp_path)[0]) == ["a.txt", "vocab.txt"]
    write(tmp_path, "x_training_0.txt", "x_test_0.txt")
    chosen, ignored = select_shards(tmp_path)
    assert names(chosen) == ["x_test_0.txt", "x_training_0.txt"] and names(ignored) == ["a.txt", "vocab.txt"]
    assert select_shards(tmp_path / "a.txt") == ([tmp_path / "a.txt"], [])
    write(tmp_path, "y_training_0.txt")
    with pytest.raises(DataError, match=r"2 prefixes: x_test_0\.txt, y_training_0\.txt"):
        select_shards(tmp_path)


def test_shards_must_match_their_manifest(tmp_path):
    tmp_path = tmp_path / "sub"
    write(tmp_path, "x_training_0.txt", "x_test_0.txt")
    shards = {name: {"bytes": 9, "documents": 2} for name in ("x_training_0.txt", "x_test_0.txt")}
    write_manifest(tmp_path, "x", shards)
    assert len(select_shards(tmp_path)[0]) == 2
    (tmp_path / "x_test_0.txt").write_text("longer than before")
    with pytest.raises(DataError, match=r"x_test_0\.txt has 18 bytes instead of 9.*delete x_shards\.json"):
        select_shards(tmp_path)
    (tmp_path / "x_test_0.txt").unlink()
    with pytest.raises(DataError, match=r"x_test_0\.txt is missing"):
        select_shards(tmp_path)
    write(tmp_path, "x_test_0.txt", "x_test_1.txt")
    with pytest.raises(DataError, match=r"x_test_1\.txt is not of this set"):
        select_shards(tmp_path.parent / tmp_path.name)
    with pytest.raises(DataError, match="not of this set"):
        select_shards(tmp_path.parent)
    write_manifest(tmp_path, "x", None)
    with pytest.raises(DataError, match="interrupted"):
        select_shards(tmp_path)


def test_damaged_and_foreign_manifests(tmp_path):
    write(tmp_path, "x_training_0.txt")
    (tmp_path / "x_shards.json").write_text("{")
    with pytest.raises(DataError, match="damaged shard manifest"):
        select_shards(tmp_path)
    (tmp_path / "x_shards.json").write_text(json.dumps(["mine"]))
    assert len(select_shards(tmp_path)[0]) == 1
