"""data/verify.py: what was made is in order, and every kind of damage is named with its file and place."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import pytest

from berth.corpus.parts import Task, run_stage
from berth.corpus.shardset import write_manifest as write_shard_manifest
from berth.errors import ConfigError, DataError
from berth.files import read_json, sha256_file, write_json
from berth.records.create import plan_folder, run_job, write_manifest
from berth.records.options import RecordOptions
from berth.records.verify import as_json, find_units, problem_lines, split_of, table, verify
from tests.support import run_script

OPTIONS = RecordOptions(max_seq_length=32, max_predictions_per_seq=6, dupe_factor=2)


def make_records(folder: Path, output: str, **changes: Any) -> None:
    options = dataclasses.replace(OPTIONS, **changes)
    results = [run_job(job) for job in plan_folder(folder / "shards", folder / output, folder / "vocab.txt", options)]
    write_manifest(folder / output, folder / "vocab.txt", options, results)


@dataclasses.dataclass(frozen=True)
class Sentences:
    def __call__(self, payload: Any, output: IO[str]) -> dict[str, int]:
        output.write(payload)
        return {"documents_in": 3, "documents_out": 2, "rejected_empty": 1, "sentences": 3}


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training shards, a test shard, their records in two layouts, and a sentence file put together from three parts."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(data / "vocab.txt", folder / "vocab.txt")
    documents = (data / "text.txt").read_text().split("\n\n")
    (folder / "shards").mkdir()
    shards = {}
    for name, part in (("text_training_0.txt", documents[:5]), ("text_training_1.txt", documents[5:9]), ("text_test_0.txt", documents[9:])):
        (folder / "shards" / name).write_text("\n\n".join(part).rstrip("\n") + "\n")
        shards[name] = {"bytes": (folder / "shards" / name).stat().st_size, "documents": len(part)}
    write_shard_manifest(folder / "shards", "text", shards)
    make_records(folder, "records")
    make_records(folder, "binned", layout="binned", bin_size=24)
    tasks = [Task(f"s_{number:05d}.txt", f"one {number}\n\ntwo\nthree\n", str(number)) for number in range(3)]
    run_stage("sentences", folder / "sentences.txt", tasks, Sentences(), {}, separator="\n")
    run_stage("sentences", folder / "parts", tasks, Sentences(), {})
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


def verified(folder: Path, *texts: str, processes: int = 1, vocabulary: Any = None) -> Any:
    return verify(find_units([folder], [folder / text for text in texts]), vocabulary, processes)


def only_problem(report: Any) -> str:
    lines = problem_lines(report, 20)
    assert len(lines) == 1, lines
    return lines[0]


def test_everything_in_order(made, vocabulary):
    report = verified(made, "sentences.txt", "parts", processes=2, vocabulary=vocabulary)
    assert problem_lines(report, 20) == [] and report.wrong == 0
    kinds = [file.kind for file in report.files]
    bins = len(list((made / "binned").glob("*.hdf5")))
    assert {kind: kinds.count(kind) for kind in kinds} == {"stage": 4, "shards": 1, "text": 7, "records": 3 + bins}
    said = table(report)
    assert "everything is in order" in said and "different test rows" in said
    assert [path for path in made.rglob("*.hdf5") if str(path) not in said] == []
    found = json.loads(json.dumps(as_json(report)))
    assert found["ok"] and found["totals"]["rows"] == sum(len(h5py.File(path)["input_ids"]) for path in made.rglob("*.hdf5"))


def test_reports_do_not_depend_on_the_number_of_processes(made):
    one, two = (as_json(verified(made, processes=processes)) for processes in (1, 2))
    one["totals"]["seconds"] = two["totals"]["seconds"] = 0
    assert one == two


def edit(name, change):
    def damage(folder: Path) -> None:
        value = read_json(folder / name)
        change(value)
        write_json(folder / name, value)

    return damage


def write(name, content):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def cut(name, size):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return damage


def flip(name, place):
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)

    return damage


def incomplete(manifest):
    manifest["complete"] = False


def lose_documents(manifest):
    for counts in (manifest["counts"], *(part["counts"] for part in manifest["parts"].values())):
        counts["rejected_empty"] = 0


def wrong_sum(manifest):
    manifest["counts"]["sentences"] += 1


def remove(name):
    return lambda folder: (folder / name).unlink()


def copy(name, other):
    return lambda folder: shutil.copy(folder / name, folder / other)


DAMAGES = [
    (remove("records/text_test_0.hdf5"), "records.json: text_test_0.hdf5 is missing"),
    (cut("records/text_test_0.hdf5", 5000), "text_test_0.hdf5: not a readable hdf5 file"),
    (cut("records/text_test_0.hdf5", 5000), "records.json: text_test_0.hdf5 has 5000 bytes instead of"),
    (copy("records/text_test_0.hdf5", "records/old_3.hdf5"), "records.json: old_3.hdf5 is not of this set"),
    (edit("records/records.json", incomplete), "records.json: the stage did not finish"),
    (write("records/records.json", b'{"format": '), "records.json: not readable as JSON"),
    (flip("sentences.txt", 4), "sentences.txt: the part s_00000.txt has not the SHA-256"),
    (cut("sentences.txt", 30), "sentences.txt has 30 bytes instead of"),
    (flip("parts/s_00001.txt", 4), "sentences.json: s_00001.txt has not the SHA-256"),
    (remove("parts/s_00001.txt"), "sentences.json: s_00001.txt is missing"),
    (edit("parts/sentences.json", lose_documents), "documents are lost: 9 in, 6 out, 0 rejected"),
    (edit("parts/sentences.json", wrong_sum), "counts are not the sums over the parts: sentences 10 instead of 9"),
    (remove("binned/text_test_0_bin_24.hdf5"), r"the shard text_test_0 was written to 2 file(s), but there are 1"),
    (edit("shards/text_shards.json", incomplete), "text_shards.json: the stage did not finish"),
    (copy("shards/text_test_0.txt", "shards/text_test_7.txt"), "text_test_7.txt is not of this set"),
    (write("shards/text_test_0.txt", b"one\nonly\n"), "text_test_0.txt: 1 document(s)"),
    (write("shards/text_test_0.txt", b"caf\xe9\n\nb\n"), "text_test_0.txt: byte 0xe9 at offset 3 is not UTF-8"),
    (write("shards/text_test_0.txt", b"a\n\n\nb\n"), "text_test_0.txt: line 3: an empty document"),
    (write("shards/text_test_0.txt", b"\na\n\nb\n"), "text_test_0.txt: line 1: an empty document"),
    (write("shards/text_test_0.txt", b"a\n\nb\n\n"), "text_test_0.txt: line 4: an empty document: a blank line at the end"),
    (write("shards/text_test_0.txt", b"a\r\n\r\nb\r\n"), "text_test_0.txt: line 1: the line ends with CR LF"),
    (write("shards/text_test_0.txt", b"a\n \xc2\xa0\nb\n"), "text_test_0.txt: line 2: a line of white space only"),
    (write("shards/text_test_0.txt", b"a\n\nb"), "text_test_0.txt: line 3: the last line has no line end"),
    (write("shards/text_test_0.txt", b"\xef\xbb\xbfa\n\nb\n"), "text_test_0.txt: line 1: a byte order mark"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_named(work, damage, message):
    damage(work)
    lines = problem_lines(verified(work), 20)
    assert any(message in line for line in lines), lines
    assert all(line.startswith((str(work), "... and")) for line in lines)


def test_counts_of_a_manifest_are_held_against_the_files(work):
    edit("shards/text_shards.json", lambda manifest: manifest["shards"]["text_test_0.txt"].update(documents=9))(work)
    line = only_problem(verified(work))
    assert line.endswith("text_test_0.txt: text_shards.json says otherwise: documents 5 instead of 9")


def test_a_wrong_row_is_named_and_everything_else_still_read(work, vocabulary):
    with h5py.File(work / "records" / "text_training_1.hdf5", "r+") as file:
        file["input_ids"][17, 0] = 9
    for name in ("records.json",):
        manifest = read_json(work / "records" / name)
        entry = manifest["parts"]["text_training_1.hdf5"]
        path = work / "records" / "text_training_1.hdf5"
        entry.update(bytes=path.stat().st_size, sha256=sha256_file(path))
        write_json(work / "records" / name, manifest)
    report = verified(work, vocabulary=vocabulary)
    assert only_problem(report) == f"{path}: row 17: position 0 is not [CLS]"
    assert sum(file.summary is not None for file in report.files) == len(list(work.rglob("*.hdf5")))


def test_files_of_other_options_in_one_folder(work):
    make_records(work, "other", random_seed=7)
    shutil.copy(work / "other" / "text_test_0.hdf5", work / "records" / "text_test_0.hdf5")
    (work / "records" / "records.json").unlink()
    assert (
        "made with other options than text_test_0.hdf5 in the same folder: random_seed 12345 (there 7)"
        in problem_lines(verified(work), 9)[0]
    )


def test_another_vocabulary(work, tmp_path):
    from berth.text.vocabulary import Vocabulary

    (tmp_path / "v.txt").write_text((work / "vocab.txt").read_text() + "more\n")
    lines = problem_lines(verified(work, vocabulary=Vocabulary.load(tmp_path / "v.txt")), 20)
    assert any("made with another vocabulary" in line for line in lines)


def test_test_rows_in_the_training_files_are_counted(work):
    shutil.rmtree(work / "binned")
    before = verified(work)
    assert before.repeated is not None and before.repeated < before.test_rows / 10
    shutil.copy(work / "records" / "text_test_0.hdf5", work / "records" / "text_training_2.hdf5")
    (work / "records" / "records.json").unlink()
    after = verified(work)
    assert after.repeated == after.test_rows == before.test_rows and not after.sampled
    assert "(100.00 %) are in the training files" in table(after)


def test_rows_are_sampled_when_there_are_many(work, monkeypatch):
    from berth.records import verify as module

    shutil.copy(work / "records" / "text_test_0.hdf5", work / "records" / "text_training_2.hdf5")
    (work / "records" / "records.json").unlink()
    whole = verified(work)
    monkeypatch.setattr(module, "MOST_HASHES", 150)
    sample = verified(work)
    assert sample.sampled and "about" in table(sample)
    assert sample.repeated == sample.test_rows and sample.test_rows == pytest.approx(whole.test_rows, rel=0.6)


@pytest.mark.parametrize(
    ("path", "split"),
    [("a_training_3.hdf5", "training"), ("a_test_0_bin_64.hdf5", "test"), ("test/part_3.hdf5", "test"), ("contest_3.hdf5", ""),
     ("training/x.hdf5", "training"), ("lot_test_training_1.hdf5", "training"), ("all.hdf5", "")],
)  # fmt: skip
def test_split_of_a_name(path, split):
    assert split_of(Path("records") / path) == split


def test_wrong_arguments(tmp_path, made):
    with pytest.raises(DataError, match="no such file"):
        find_units([tmp_path / "none"], [])
    with pytest.raises(DataError, match="nothing to verify"):
        find_units([tmp_path], [])
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.bin: neither records"):
        find_units([tmp_path / "x.bin"], [])
    units = find_units([made], [])
    with pytest.raises(ConfigError, match="--processes 0"):
        verify(units, None, 0)
    with pytest.raises(ConfigError, match="--max_errors 0"):
        verify(units, None, 1, 0)


def test_a_very_long_line_and_block_edges(tmp_path):
    text = "ő" * 700_000 + " x" * 1_000_000 + "\nb\n\n" + "c\n\n" * 3
    (tmp_path / "a_test_0.txt").write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    report = verify(find_units([tmp_path], []), None)
    assert problem_lines(report, 9) == [] and report.files[0].counts == {"documents": 4, "sentences": 5}


def test_the_script(work, tmp_path):
    done = run_script("data/verify.py", "--input", "work", "--vocab_file", "work/vocab.txt", "--output_json", "v.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "everything is in order" in done.stdout and read_json(tmp_path / "v.json")["ok"] is True
    with h5py.File(work / "records" / "text_test_0.hdf5", "r+") as file:
        file["next_sentence_labels"][5] = np.int8(4)
    done = run_script("data/verify.py", "--input", "work/records", "--max_errors", 1, "--output_json", "v.json", cwd=tmp_path)
    assert done.returncode == 1 and read_json(tmp_path / "v.json")["ok"] is False
    lines = done.stderr.splitlines()
    assert "more (--max_errors)" in lines[1] and lines[-1].startswith("error: ") and "problem(s) in 2 of 4 file(s)" in lines[-1]
    done = run_script("data/verify.py", "--input", "none", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == "error: none: no such file or folder\n"


def test_shards_that_are_called_like_bins(made, tmp_path):
    (tmp_path / "shards").mkdir()
    shutil.copy(made / "vocab.txt", tmp_path)
    for number in (1, 2):
        shutil.copy(made / "shards" / "text_training_0.txt", tmp_path / "shards" / f"text_bin_{number}.txt")
    make_records(tmp_path, "records")
    assert problem_lines(verified(tmp_path / "records"), 20) == []


def test_the_manifest_forgets_what_an_array_has_made_again(made, tmp_path):
    """Tasks of an array write no manifest; the next process that sees all files must not repeat what was true before."""
    shutil.copytree(made / "shards", tmp_path / "shards")
    shutil.copy(made / "vocab.txt", tmp_path)
    make_records(tmp_path, "records")
    manifest = tmp_path / "records" / "records.json"
    old = read_json(manifest)
    text = tmp_path / "shards" / "text_training_0.txt"
    words = text.read_text().split(" ")
    words[1], words[2] = words[2], words[1]
    text.write_text(" ".join(words))
    (tmp_path / "shards" / "text_shards.json").unlink()
    again = [run_job(job) for job in plan_folder(tmp_path / "shards", tmp_path / "records", tmp_path / "vocab.txt", OPTIONS)]
    name = next(result.output.name for result in again if not result.skipped)
    old["parts"][name]["bytes"] = (tmp_path / "records" / name).stat().st_size  # as long as before, by chance
    write_json(manifest, old)
    make_records(tmp_path, "records")
    assert read_json(manifest)["parts"][name]["sha256"] == sha256_file(tmp_path / "records" / name) != old["parts"][name]["sha256"]
