"""Sharding: whole documents, balance, determinism, stale shards, odd blank lines."""

import os
import subprocess
import tracemalloc
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth import files
from berth.corpus.shards import _Copier, index_documents, make_shards, plan_shards
from berth.corpus.shardset import select_shards
from berth.errors import ConfigError, DataError


def documents_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n\n")


def sentences_file(path: Path, count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    documents = ["\n".join(f"document {number} sentence {line}." for line in range(rng.integers(1, 30))) for number in range(count)]
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return documents


def test_every_document_once_and_shards_balanced(tmp_path):
    documents = sentences_file(tmp_path / "s.txt", 400)
    counts = make_shards(tmp_path / "s.txt", tmp_path / "out", "text", 8, 2, 0.1, 1)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.txt"))
    assert names == sorted([f"text_training_{i}.txt" for i in range(8)] + [f"text_test_{i}.txt" for i in range(2)])
    found = [document for name in names for document in documents_of(tmp_path / "out" / name)]
    assert sorted(found) == sorted(documents)
    assert counts.documents == 400 == counts.training_documents + counts.test_documents
    assert counts.largest_shard <= 1.02 * counts.smallest_shard
    assert counts.test_bytes / (counts.test_bytes + counts.training_bytes) == pytest.approx(0.1, abs=0.01)
    assert counts.sentences == sum(document.count("\n") + 1 for document in documents)


def test_same_seed_same_bytes_other_seed_other_test_set(tmp_path):
    sentences_file(tmp_path / "s.txt", 60)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_shards(tmp_path / "s.txt", tmp_path / name, "t", 3, 1, 0.2, seed)
    read = {name: (tmp_path / name / "t_test_0.txt").read_bytes() for name in "abc"}
    assert read["a"] == read["b"] != read["c"]


def test_blank_lines_line_ends_and_missing_end(tmp_path):
    path = tmp_path / "s.txt"
    path.write_bytes(b"\xef\xbb\xbfa1\r\na2\r\n\r\n  \r\n\r\nb1\n\n\n\nc1\n\nd1")
    index = index_documents([path])
    assert index.sentences.tolist() == [2, 1, 1, 1]
    make_shards(path, tmp_path, "t", 2, 0, 0.1, 0)
    found = documents_of(tmp_path / "t_training_0.txt") + documents_of(tmp_path / "t_training_1.txt")
    assert sorted(found) == ["a1\na2", "b1", "c1", "d1"]


def test_stale_shards_are_replaced_and_other_files_kept(tmp_path):
    sentences_file(tmp_path / "s.txt", 40)
    out = tmp_path / "out"
    make_shards(tmp_path / "s.txt", out, "text", 5, 2, 0.2, 0)
    for name in ("text_training_x.txt", "notes.txt"):
        (out / name).write_text("keep")
    counts = make_shards(tmp_path / "s.txt", out, "text", 3, 0, 0.2, 0)
    assert counts.stale_removed == 4
    assert sorted(path.name for path in out.iterdir()) == [
        ".shards.lock", "notes.txt", "shards.json", "text_shards.json", "text_training_0.txt", "text_training_1.txt", "text_training_2.txt",
        "text_training_x.txt",
    ]  # fmt: skip


def test_shards_of_another_prefix_are_refused(tmp_path):
    sentences_file(tmp_path / "s.txt", 40)
    (tmp_path / "old_training_9.txt").write_text("old")
    with pytest.raises(DataError, match=r"another prefix \(old_training_9\.txt\)"):
        make_shards(tmp_path / "s.txt", tmp_path, "text", 3, 0, 0.2, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old_training_9.txt", "s.txt"]


@pytest.mark.parametrize("renames", [0, 1, 3])
def test_a_crash_between_renames_is_noticed(tmp_path, monkeypatch, renames):
    """Killed after some renames: the folder is refused until sharding is run again."""
    sentences_file(tmp_path / "s.txt", 40)
    out = tmp_path / "out"
    make_shards(tmp_path / "s.txt", out, "text", 3, 1, 0.2, 0)
    select_shards(out)
    real, done = os.replace, []

    def crash(source, target):
        if str(target).endswith(".txt"):
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        make_shards(tmp_path / "s.txt", out, "text", 2, 2, 0.2, 1)
    monkeypatch.undo()
    for path in (out, *out.glob("text_test_*.txt")):
        with pytest.raises(DataError, match="interrupted"):
            select_shards(path)
    make_shards(tmp_path / "s.txt", out, "text", 2, 2, 0.2, 1)
    assert len(select_shards(out)[0]) == 4


def test_temporaries_of_a_killed_run_are_removed(tmp_path):
    sentences_file(tmp_path / "s.txt", 40)
    dead = subprocess.Popen(["true"])
    dead.wait()
    leftover = files._temporary_name(tmp_path / "out" / "text_training_7.txt", dead.pid)
    alive = files._temporary_name(tmp_path / "out" / "text_training_8.txt", os.getppid())
    leftover.parent.mkdir()
    leftover.write_text("half")
    alive.write_text("half")
    make_shards(tmp_path / "s.txt", tmp_path / "out", "text", 2, 0, 0.2, 1)
    assert not leftover.exists() and alive.exists()


def test_one_document_says_how_documents_are_parted(tmp_path):
    (tmp_path / "s.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"one single document.*Blank lines.*folder.*--documents"):
        make_shards(tmp_path / "s.txt", tmp_path / "out", "t", 1, 0, 0.1, 0)


def test_a_failure_leaves_the_old_shards_and_refuses_them(tmp_path, monkeypatch):
    sentences_file(tmp_path / "s.txt", 40)
    out = tmp_path / "out"
    make_shards(tmp_path / "s.txt", out, "text", 2, 0, 0.2, 0)
    before = {path.name: path.read_bytes() for path in out.glob("*.txt")}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("berth.corpus.shards._copy_document", full)
    with pytest.raises(OSError, match="No space"):
        make_shards(tmp_path / "s.txt", out, "text", 4, 1, 0.2, 0)
    assert {path.name: path.read_bytes() for path in out.glob("*.txt")} == before
    with pytest.raises(DataError, match="interrupted"):
        select_shards(out)


def test_finished_shards_are_kept_and_a_folder_of_parts_gives_the_same(tmp_path):
    sentences_file(tmp_path / "s.txt", 40)
    out = tmp_path / "out"
    arguments = ("text", 3, 1, 0.2, 0)
    assert make_shards(tmp_path / "s.txt", out, *arguments).shards_kept == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.txt")}
    (out / "text_training_1.txt").unlink()
    assert make_shards(tmp_path / "s.txt", out, *arguments, processes=2).shards_kept == 3
    assert {path.name: path.read_bytes() for path in out.glob("*.txt")} == before
    parts = tmp_path / "parts"
    parts.mkdir()
    documents = (tmp_path / "s.txt").read_text().split("\n\n")
    (parts / "p_0.txt").write_text("\n\n".join(documents[:17]) + "\n")
    (parts / "p_1.txt").write_text("\n\n".join(documents[17:]))
    make_shards(parts, tmp_path / "again", *arguments)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.txt")} == before
    (tmp_path / "s.txt").write_text("Z" + "\n\n".join(documents)[1:])
    assert make_shards(tmp_path / "s.txt", out, *arguments).shards_kept == 0


def test_too_few_documents_names_the_numbers(tmp_path):
    sentences_file(tmp_path / "s.txt", 5)
    with pytest.raises(DataError, match=r"5 documents are too few for 2 training and 1 test shards.*together 6"):
        make_shards(tmp_path / "s.txt", tmp_path / "out", "t", 2, 1, 0.1, 0)


@pytest.mark.parametrize("numbers", [(0, 1, 0.1, 0), (1, -1, 0.1, 0), (1, 1, 0.0, 0), (1, 1, 1.0, 0), (1, 0, 0.1, -1)])
def test_wrong_numbers(numbers):
    with pytest.raises(ConfigError):
        plan_shards(np.ones(50, np.int64), *numbers)


def test_wrong_files(tmp_path):
    with pytest.raises(DataError, match=r"data/sentences\.py"):
        make_shards(tmp_path / "none.txt", tmp_path / "out", "t", 1, 0, 0.1, 0)
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(DataError, match="no sentence"):
        index_documents([tmp_path / "blank.txt"])
    (tmp_path / "bad.txt").write_bytes(b"good\n\xe1\n")
    with pytest.raises(DataError, match="offset 5"):
        index_documents([tmp_path / "bad.txt"])
    sentences_file(tmp_path / "t_training_0.txt", 9)
    with pytest.raises(ConfigError, match="among the shards"):
        make_shards(tmp_path / "t_training_0.txt", tmp_path, "t", 1, 0, 0.1, 0)
    with pytest.raises(ConfigError, match="prefix"):
        make_shards(tmp_path / "t_training_0.txt", tmp_path, "../t", 1, 0, 0.1, 0)


@given(
    sizes=st.lists(st.integers(1, 10_000), min_size=2, max_size=80),
    training=st.integers(1, 6),
    test=st.integers(0, 4),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
)
def test_plans_are_partitions_with_two_documents_a_shard(sizes, training, test, fraction, seed):
    array = np.array(sizes, np.int64)
    if len(sizes) < 2 * (training + test):
        with pytest.raises(DataError):
            plan_shards(array, training, test, fraction, seed)
        return
    plans = plan_shards(array, training, test, fraction, seed)
    assert [len(plan) for plan in plans] == [training, test]
    shards = [shard for plan in plans for shard in plan]
    assert sorted(number for shard in shards for number in shard) == list(range(len(sizes)))
    assert min(map(len, shards)) >= 2


def test_the_plan_of_many_documents_needs_little_memory():
    """Dealing out holds no object a document; it was 100 bytes each."""
    sizes = np.random.default_rng(0).integers(100, 20_000, 200_000)
    tracemalloc.start()
    training, test = plan_shards(sizes, 64, 4, 0.05, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * len(sizes)
    loads = [int(sizes[shard].sum()) for shard in training]
    assert sum(map(len, [*training, *test])) == len(sizes) and max(loads) - min(loads) <= 20_000


def test_a_file_is_opened_once_for_all_its_documents_of_a_shard(tmp_path, monkeypatch):
    files = [tmp_path / f"s_{number}.txt" for number in range(2)]
    for file in files:
        sentences_file(file, 20)
    opened: list[Path] = []

    def counting(file: Path, mode: str) -> IO[bytes]:
        opened.append(file)
        return open(file, mode)

    monkeypatch.setattr("berth.corpus.shards.open", counting, raising=False)
    payload = np.array([[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]])
    with open(tmp_path / "out", "w", encoding="utf-8") as output:
        assert _Copier(tuple(files))(payload, output) == {"documents": 4}
    assert opened == files
    data = [file.read_bytes()[:2] for file in files]
    assert (tmp_path / "out").read_bytes() == b"\n".join(bytes([byte]) + b"\n" for pair in data for byte in pair)
