"""The stage: schema on disk, truth of labels in the file, same bytes, skip and rebuild, nothing half-written."""

import dataclasses
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from berth.errors import ConfigError, DataError
from berth.records import create, records_folder_name
from berth.records.create import plan_file, plan_folder, read_attributes, run_job, run_jobs, strangers
from berth.records.options import RecordOptions
from berth.records.validate import validate_records
from berth.records.writer import RecordsWriter

OPTIONS = RecordOptions(max_seq_length=64, max_predictions_per_seq=10, dupe_factor=3)
WORDS_A_SENTENCE, WORDS_A_DOCUMENT = 9, 9 * 25


def job(data: Path, output: Path, **changes):
    return plan_file(data / "text.txt", output, data / "vocab.txt", dataclasses.replace(OPTIONS, **changes))


@pytest.fixture
def shards(tmp_path, data) -> Path:
    """Three shards; the first two hold the same text."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        shutil.copy(data / "text.txt", folder / f"t_training_{number}.txt")
    text = (data / "text.txt").read_text().split("\n\n")
    (folder / "t_test_0.txt").write_text("\n\n".join(text[:4]))
    return folder


def test_schema_on_disk(tmp_path, data, vocabulary):
    result = run_job(job(data, tmp_path / "a.hdf5"))
    summary = validate_records(tmp_path / "a.hdf5", vocabulary)
    assert (summary.max_seq_length, summary.max_predictions_per_seq) == (64, 10)
    with h5py.File(tmp_path / "a.hdf5") as file:
        kinds = {name: (set_.dtype.str, set_.shape, set_.compression, set_.chunks) for name, set_ in file.items()}
        rows = summary.rows
        chunk = min(rows, 1024)
        assert kinds == {
            "input_ids": ("<i4", (rows, 64), "gzip", (chunk, 64)),
            "input_mask": ("|i1", (rows, 64), "gzip", (chunk, 64)),
            "segment_ids": ("|i1", (rows, 64), "gzip", (chunk, 64)),
            "masked_lm_positions": ("<i4", (rows, 10), "gzip", (chunk, 10)),
            "masked_lm_ids": ("<i4", (rows, 10), "gzip", (chunk, 10)),
            "next_sentence_labels": ("|i1", (rows,), "gzip", (chunk,)),
        }
    attributes = read_attributes(tmp_path / "a.hdf5")
    counts = result.counts
    assert attributes["vocab_sha256"] == vocabulary.sha256 and attributes["vocab_size"] == vocabulary.size
    assert attributes["input_name"] == "text.txt" and attributes["format_version"] == 2
    for name, value in dataclasses.asdict(OPTIONS).items():
        assert attributes["do_lower_case" if name == "lowercase" else name] == value
    assert attributes["count_instances"] == counts.instances == summary.rows
    assert (counts.used_tokens, counts.masked, counts.random_next) == (
        summary.used_tokens, summary.masked, summary.random_next,
    )  # fmt: skip
    assert (counts.documents, counts.sentences, counts.unknown_tokens) == (14, 350, 0)


def test_labels_in_the_file_are_true(tmp_path, data, vocabulary):
    run_job(job(data, tmp_path / "a.hdf5"))
    first_word = vocabulary.ids["w0"]
    with h5py.File(tmp_path / "a.hdf5") as file:
        columns = {name: values[:] for name, values in file.items()}
    checked = {0: 0, 1: 0}
    for row, ids in enumerate(columns["input_ids"]):
        masked = columns["masked_lm_positions"][row] > 0
        ids[columns["masked_lm_positions"][row][masked]] = columns["masked_lm_ids"][row][masked]
        used = columns["input_mask"][row].sum()
        a_stop = np.flatnonzero(ids == vocabulary.sep_id)[0]
        a, b = ids[1:a_stop] - first_word, ids[a_stop + 1 : used - 1] - first_word
        assert (np.diff(a) == 1).all() and (np.diff(b) == 1).all(), "a segment is running text"
        same = a[0] // WORDS_A_DOCUMENT == b[0] // WORDS_A_DOCUMENT
        label = int(columns["next_sentence_labels"][row])
        assert same == (label == 0)
        if label == 0:
            assert 0 <= b[0] - a[-1] - 1 <= WORDS_A_SENTENCE, "B follows A, up to what was cut to fit"
        checked[label] += 1
    assert min(checked.values()) > 50


def test_bytes_do_not_depend_on_processes_folder_or_time(tmp_path, data, shards):
    moved = shutil.copytree(shards, tmp_path / "elsewhere")
    outputs = {}
    for name, source, processes in (("one", shards, 1), ("two", moved, 2)):
        jobs = plan_folder(source, tmp_path / name, data / "vocab.txt", OPTIONS)
        results = list(run_jobs(jobs, processes))
        assert not any(result.skipped for result in results)
        outputs[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert outputs["one"] == outputs["two"]
    assert sorted(outputs["one"]) == ["t_test_0.hdf5", "t_training_0.hdf5", "t_training_1.hdf5"]


def test_shards_and_seeds_have_distinct_streams(tmp_path, data, shards):
    list(run_jobs(plan_folder(shards, tmp_path / "out", data / "vocab.txt", OPTIONS), 1))
    run_job(job(data, tmp_path / "seed.hdf5", random_seed=1))
    run_job(job(data, tmp_path / "same.hdf5"))
    paths = [tmp_path / "out" / f"t_training_{i}.hdf5" for i in range(2)] + [tmp_path / f"{n}.hdf5" for n in ("seed", "same")]
    rows = [read_rows(path) for path in paths]
    for one in range(4):
        for other in range(one):
            assert len(rows[one] & rows[other]) < 0.02 * len(rows[one])


def read_rows(path: Path) -> set[bytes]:
    with h5py.File(path) as file:
        return {row.tobytes() for row in file["input_ids"][:]}


def test_finished_files_are_skipped_and_others_rebuilt(tmp_path, data, shards):
    def run(overwrite=False, **changes):
        options = dataclasses.replace(OPTIONS, **changes)
        jobs = plan_folder(shards, tmp_path / "out", data / "vocab.txt", options)
        return {result.output.stem: result for result in run_jobs(jobs, 1, overwrite)}

    first = run()
    again = run()
    assert all(result.skipped for result in again.values())
    assert {name: result.counts for name, result in again.items()} == {name: result.counts for name, result in first.items()}
    text = (shards / "t_training_1.txt").read_text()
    (shards / "t_training_1.txt").write_text(text.replace("w5 ", "w6 ", 1))
    (tmp_path / "out" / "t_test_0.hdf5").unlink()
    assert {name for name, result in run().items() if not result.skipped} == {"t_training_1", "t_test_0"}
    for changes in ({"random_seed": 7}, {"lowercase": False}, {"short_seq_prob": 0.2}, {"whole_word_mask": True}):
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        name, value = next(iter(changes.items()))
        name = "do_lower_case" if name == "lowercase" else name
        with pytest.raises(ConfigError, match=rf"{name} .* \(now {value}\).*--overwrite"):
            run(**changes)
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
        assert not any(result.skipped for result in run(True, **changes).values()), changes
        run(True)


def test_another_vocabulary_rebuilds(tmp_path, data):
    run_job(job(data, tmp_path / "a.hdf5"))
    (tmp_path / "vocab.txt").write_text((data / "vocab.txt").read_text() + "more\n")
    again = run_job(plan_file(data / "text.txt", tmp_path / "a.hdf5", tmp_path / "vocab.txt", OPTIONS))
    assert not again.skipped
    assert run_job(dataclasses.replace(job(data, tmp_path / "a.hdf5"), vocab_file=tmp_path / "vocab.txt")).skipped


def test_foreign_files_are_not_replaced(tmp_path, data):
    output = tmp_path / "a.hdf5"
    with h5py.File(output, "w") as file:
        file["input_ids"] = np.zeros((2, 2))
    before = output.read_bytes()
    with pytest.raises(DataError, match=r"not made by berth.*--overwrite"):
        run_job(job(data, output))
    assert output.read_bytes() == before
    assert not run_job(job(data, output), overwrite=True).skipped


def test_each_kind_of_bad_output_has_its_message(tmp_path, data, monkeypatch):
    output = tmp_path / "a.hdf5"
    run_job(job(data, output))
    output.write_bytes(output.read_bytes()[:3000])
    with pytest.raises(DataError, match="truncated or damaged; delete this one file"):
        list(run_jobs([job(data, output)], 1))
    output.write_bytes(b"text, not hdf5")
    with pytest.raises(DataError, match=r"not an hdf5 file.*--overwrite"):
        list(run_jobs([job(data, output)], 1))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read_attributes(output)


def test_outputs_and_vocabulary_among_the_texts_are_refused(tmp_path, data, shards):
    text = tmp_path / "text.hdf5"
    shutil.copy(data / "text.txt", text)
    with pytest.raises(ConfigError, match="--output_file .*also an input"):
        plan_file(text, text, data / "vocab.txt", OPTIONS)
    with pytest.raises(ConfigError, match="--output_dir .*also an input"):
        plan_folder(text, tmp_path, data / "vocab.txt", OPTIONS)
    with pytest.raises(ConfigError, match="--vocab_file .*one of the texts"):
        plan_file(data, tmp_path / "a.hdf5", data / "vocab.txt", OPTIONS)


def test_the_name_of_the_folder_does_not_matter(tmp_path, data, shards):
    moved = shutil.copytree(shards, tmp_path / "elsewhere")
    for name, folder in (("a", shards), ("b", moved)):
        run_job(plan_file(folder, tmp_path / name, data / "vocab.txt", OPTIONS))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_text_name_that_is_not_utf_8(tmp_path, data):
    source = tmp_path / b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    shutil.copy(data / "text.txt", source)
    jobs = plan_folder(source, tmp_path / "out", data / "vocab.txt", OPTIONS)
    assert [result.skipped for result in run_jobs(jobs, 1)] == [False]
    assert [result.skipped for result in run_jobs(jobs, 1)] == [True]


def test_strangers_are_found(tmp_path, data, shards):
    (tmp_path / "t_training_9.hdf5").write_bytes(b"")
    jobs = plan_folder(shards, tmp_path, data / "vocab.txt", OPTIONS)
    assert [path.name for path in strangers(tmp_path, jobs)] == ["t_training_9.hdf5"]
    assert strangers(tmp_path / "none", jobs) == []


@pytest.mark.parametrize("old", [False, True])
def test_full_disk_leaves_no_partial_file(tmp_path, data, monkeypatch, old):
    output = tmp_path / "out" / "a.hdf5"
    if old:
        run_job(job(data, output))
    before = output.read_bytes() if old else None
    real = RecordsWriter.append

    def full(self, rows, forced):
        real(self, rows, forced)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordsWriter, "append", full)
    with pytest.raises(OSError, match="No space") as caught:
        run_job(job(data, output), overwrite=True)
    assert caught.value.filename == str(output)
    assert [path.name for path in (tmp_path / "out").iterdir()] == (["a.hdf5"] if old else [])
    assert not old or output.read_bytes() == before


def test_a_failing_worker_fails_the_run(tmp_path, data, shards):
    (shards / "t_training_0.txt").write_text("w1 w2\nw3\n")
    jobs = plan_folder(shards, tmp_path / "out", data / "vocab.txt", OPTIONS)
    with pytest.raises(DataError, match=r"t_training_0\.txt: only one document"):
        list(run_jobs(jobs, 2))
    assert not (tmp_path / "out" / "t_training_0.hdf5").exists()
    assert not list((tmp_path / "out").glob(".*"))


def test_two_inputs_of_one_name(tmp_path, data):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("w1")
    with pytest.raises(ConfigError, match="would both become"):
        plan_folder(tmp_path, tmp_path / "out", data / "vocab.txt", OPTIONS)


def test_a_folder_becomes_one_file(tmp_path, data, shards, vocabulary):
    output = tmp_path / "all.hdf5"
    result = run_job(plan_file(shards, output, data / "vocab.txt", OPTIONS))
    assert result.counts.documents == 14 + 14 + 4
    assert read_attributes(output)["input_files"] == 3
    assert validate_records(output, vocabulary).rows == result.counts.instances


def test_options_name_every_mistake():
    with pytest.raises(ConfigError) as caught:
        RecordOptions(max_seq_length=4, max_predictions_per_seq=0, masked_lm_prob=0, short_seq_prob=2, dupe_factor=0, random_seed=-1)
    for name in ("max_seq_length", "max_predictions", "masked_lm_prob", "short_seq_prob", "dupe_factor", "random_seed"):
        assert f"--{name}" in str(caught.value)


def test_folder_name():
    wanted = "hdf5_lower_case_1_seq_len_128_max_pred_20_masked_lm_prob_0.15_random_seed_12345_dupe_factor_5"
    assert records_folder_name(True, 128, 20, 0.15, 12345, 5) == wanted == RecordOptions().folder_name
    assert create.SUFFIX == ".hdf5"
