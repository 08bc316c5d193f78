"""Raw text to records of both phases with one command, run from another folder, then again after small changes."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from berth.records.reader import find_files
from tests.support import ROOT, environment

SYLLABLES = "ár víz tű rő fú ró gép kö szön öl mény ház ka pu em ber nagy ki csi szép jó és lát ír ol vas só hegy fe hér".split()
STAGES = ["sentences", "filter", "shard", "vocab", "records, length 128", "records, length 512"]


def hungarian(documents: int, seed: int) -> list[str]:
    """Documents of sentences that look Hungarian; every tenth document is one short line, which the filter rejects."""
    chance = random.Random(seed)
    words = ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(400)]

    def sentence() -> str:
        return " ".join(chance.choices(words, k=chance.randint(5, 16))).capitalize() + chance.choice(".?!")

    return [
        "Rövid." if number % 10 == 9 else "\n".join(" ".join(sentence() for _ in range(5)) for _ in range(chance.randint(2, 6)))
        for number in range(documents)
    ]


def run(folder: Path, *words: str, code: int = 0) -> str:
    """``python -m data.prepare`` from ``folder``."""
    done = subprocess.run(
        [sys.executable, "-m", "data.prepare", *words], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**environment(), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file that a stage makes: its bytes and when it was written."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in (".txt", ".hdf5", ".jsonl")]
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def changed(before: dict[str, tuple[bytes, int]], after: dict[str, tuple[bytes, int]]) -> set[str]:
    """The folders of the work folder in which a file was written, added or removed."""
    return {name.split("/")[0] for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


CONFIG = """
workdir: work
input: [texts]
language: hu
prefix: hu
filter: {langdetect: none, min_sents: 2, avg_len: 2, min_toks: 3, min_words: 3}
shard: {n_training_shards: 2, n_test_shards: 1, fraction_test_set: 0.1}
vocab: {vocab_size: 500}
records: {dupe_factor: 2}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with texts and a configuration, prepared once."""
    folder = tmp_path_factory.mktemp("prepare")
    (folder / "texts").mkdir()
    for number, text in enumerate(hungarian(120, 1)):
        (folder / "texts" / f"doc_{number:03d}.txt").write_text(text + "\n", encoding="utf-8")
    (folder / "prepare.yaml").write_text(CONFIG)
    printed = run(folder, "--config", "prepare.yaml", "--processes", "2")
    assert [line.split(": ")[0].removeprefix("== ") for line in printed.splitlines() if line.startswith("== ")] == [*STAGES, "verify"]
    return folder


def counts(project: Path) -> dict[str, dict[str, int]]:
    """What ``prepare.json`` says of each stage."""
    return {each["stage"]: each["counts"] for each in json.loads((project / "work" / "prepare.json").read_text())}


def test_no_document_is_lost(project):
    of = counts(project)
    assert of["sentences"]["documents_in"] == of["sentences"]["documents_out"] == 120
    assert of["filter"]["documents_in"] == 120 and of["filter"]["documents_out"] == 108
    for stage in ("sentences", "filter"):
        rejected = sum(value for name, value in of[stage].items() if name.startswith("rejected_"))
        assert of[stage]["documents_in"] == of[stage]["documents_out"] + rejected
    assert of["shard"]["documents"] == 108
    assert of["records"]["documents"] == 108 and of["records"]["empty_documents"] == 0


def test_what_is_made_can_be_trained_on(project):
    work = project / "work"
    folders = sorted((work / "records").iterdir())
    assert [folder.name.split("_max_pred")[0] for folder in folders] == ["hdf5_lower_case_1_seq_len_128", "hdf5_lower_case_1_seq_len_512"]
    for folder, length in zip(folders, (128, 512), strict=True):
        assert [path.name for path in find_files(folder, "training")] == ["hu_training_0.hdf5", "hu_training_1.hdf5"]
        assert [path.name for path in find_files(folder, "test")] == ["hu_test_0.hdf5"]
        with h5py.File(folder / "hu_training_0.hdf5") as file:
            assert file["input_ids"].shape[1] == length and file.attrs["do_lower_case"]
    pieces = (work / "vocab" / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(pieces) == 500 and json.loads((work / "vocab" / "bert_config.json").read_text())["vocab_size"] == 504
    assert (work / "verify.json").is_file()


def test_nothing_is_done_twice(project):
    before = snapshot(project / "work")
    printed = run(project, "--config", "prepare.yaml")
    assert snapshot(project / "work") == before
    assert printed.count("up to date") >= 2 + 6, "verify, and three files of two lengths"


def test_only_what_depends_on_a_change_is_made(project, tmp_path):
    """In a copy of the folder: where it lies does not matter."""
    copy = shutil.copytree(project, tmp_path / "copy")
    before = snapshot(copy / "work")
    run(copy, "--config", "prepare.yaml", "--set", "records.dupe_factor=1", "--stages", "sentences", "shard", "records")
    after = snapshot(copy / "work")
    assert changed(before, after) == {"records"} and before.items() <= after.items(), "another folder, the first stays"
    run(copy, "--config", "prepare.yaml", "--set", "filter.min_sents=12", "--stages", "sentences", "filter", "shard", "vocab")
    last = snapshot(copy / "work")
    assert changed(after, last) == {"filtered", "shards", "vocab"} and counts(copy)["filter"]["documents_out"] < 108
    with open(copy / "texts" / "doc_001.txt", "a", encoding="utf-8") as handle:
        handle.write("\nEz egy új mondat itt a végén.\n")
    run(copy, "--config", "prepare.yaml", "--stages", "sentences", "filter", "shard")
    new = snapshot(copy / "work")
    assert changed(last, new) == {"sentences", "filtered", "shards"}
    assert any("Ez egy új mondat itt a végén.".encode() in data for name, (data, _) in new.items() if name.startswith("shards/"))


def test_dry_run_prints_lines_that_can_be_typed(project, tmp_path):
    (tmp_path / "egy szöveg.txt").write_text("\n\n".join(hungarian(30, 2)) + "\n", encoding="utf-8")
    words = ["--workdir", "my work", "--input", "egy szöveg.txt", "--cased", "--vocab_size", "300"]
    sets = ["--set", "shard.n_training_shards=1", "records.dupe_factor=1"]
    printed = run(tmp_path, *words, *sets, "--dry_run")
    assert not (tmp_path / "my work").exists()
    lines = printed.splitlines()
    assert [Path(shlex.split(line)[1]).name for line in lines] == [
        "sentences.py", "shard.py", "vocab.py", "create_pretraining_data.py", "create_pretraining_data.py", "verify.py",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "\n".join(["set -e", *lines[:4]])
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, env={**environment(), "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "my work" / "records").rglob("text_training_0.hdf5"))


def test_several_inputs_and_json_lines(tmp_path):
    (tmp_path / "one").mkdir()
    first, second = hungarian(15, 3), hungarian(15, 4)
    for number, text in enumerate(first):
        (tmp_path / "one" / f"{number}.txt").write_text(text, encoding="utf-8")
    with open(tmp_path / "two.jsonl", "w", encoding="utf-8") as handle:
        for number, text in enumerate([*second, "", "  "]):
            handle.write(json.dumps({"id": f"n{number}", "text": text}, ensure_ascii=number % 2 == 0) + "\n")
    printed = run(tmp_path, "--workdir", "work", "--input", "one", "two.jsonl", "--processes", "1", "--stages", "extract", "sentences")
    assert "documents in" in printed
    of = counts(tmp_path)
    assert of["extract"]["documents_in"] == 32 and of["extract"]["documents_out"] == 30
    assert sum(value for name, value in of["extract"].items() if name.startswith("rejected_")) == 2
    assert of["sentences"]["documents_in"] == of["sentences"]["documents_out"] == 30
    sentences = "".join(path.read_text(encoding="utf-8") for path in sorted((tmp_path / "work" / "sentences").glob("*.txt")))
    for text in [*first, *second]:
        for word in text.split():
            assert word in sentences


def test_a_mistake_ends_before_anything_runs(project, tmp_path):
    (tmp_path / "c.yaml").write_text("workdir: w\ninput: x\nrecords: {dupe_facto: 1}\n")
    printed = run(tmp_path, "--config", "c.yaml", code=2)
    assert printed == "error: records has no option 'dupe_facto'; did you mean 'dupe_factor'?\n"
    (tmp_path / "c.yaml").write_text("workdir: w\ninput: x\n")
    printed = run(tmp_path, "--config", "c.yaml", code=1)
    assert "error: --input x: no such file or folder" in printed and "stage extract failed with exit code" in printed
