"""The data scripts as a user runs them: raw text to records, exit codes, one-line errors, nothing half-written."""

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest

import create_pretraining_data
from berth.errors import DataError
from berth.records.create import read_attributes
from berth.records.validate import validate_records
from berth.text.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--max_seq_length", "48", "--max_predictions_per_seq", "7", "--dupe_factor", "2")


def run(script, *arguments, cwd, **options):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


def succeed(script, *arguments, cwd):
    done = run(script, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.suffix != ".json"}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder in which sentences, shards and vocabulary were made from raw text by the scripts."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "raw").mkdir()
    for number in range(24):
        text = "\n\n".join(
            f"Section {part} of report {number} begins. The crew counted {part * number} crates of Árvíztűrő pipes! "
            f"Was it enough? Captain {chr(65 + number)} said so. The {part}th log entry ends here."
            for part in range(6)
        )
        (folder / "raw" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    succeed("data/sentences.py", "--input", "raw", "--output", "sentences.txt", cwd=folder)
    succeed(
        "data/shard.py", "--input", "sentences.txt", "--output_dir", "shards", "--prefix", "text",
        "--n_training_shards", 3, "--n_test_shards", 1, "--fraction_test_set", 0.2, "--seed", 1, cwd=folder,
    )  # fmt: skip
    succeed("data/vocab.py", "--input", "sentences.txt", "--vocab_size", 300, "--output", "vocab.txt", cwd=folder)
    succeed("data/vocab.py", "--input", "sentences.txt", "--vocab_size", 300, "--cased", "--output", "cased.txt", cwd=folder)
    return folder


def create(work, *arguments):
    return succeed("create_pretraining_data.py", "--vocab_file", "vocab.txt", *SMALL, *arguments, cwd=work)


def test_one_file_a_shard_whatever_the_number_of_processes(work):
    said = create(work, "--input_file", "shards", "--output_dir", "one")
    create(work, "--input_file", "shards", "--output_dir", "two", "--processes", 2)
    assert digests(work / "one") == digests(work / "two")
    assert sorted(digests(work / "one")) == [
        "text_test_0.hdf5", "text_training_0.hdf5", "text_training_1.hdf5", "text_training_2.hdf5",
    ]  # fmt: skip
    vocabulary = Vocabulary.load(work / "vocab.txt")
    rows = sum(validate_records(path, vocabulary).rows for path in (work / "one").glob("*.hdf5"))
    assert f"{rows} instances from 24 documents" in said and "4 file(s) made, 0 up to date" in said
    again = create(work, "--input_file", "shards", "--output_dir", "one")
    assert "0 file(s) made, 4 up to date" in again and again.count("up to date\n") == 4


def test_one_file_of_everything(work):
    said = create(work, "--input_file", "shards", "--output_file", "all/all.hdf5", "--bert_model", "bert-large-uncased")
    assert "--bert_model bert-large-uncased has no effect" in said
    assert read_attributes(work / "all/all.hdf5")["count_documents"] == 24
    create(work, "--input_file", "shards/text_test_0.txt", "--output_dir", "alone")
    create(work, "--input_file", "shards/text_test_0.txt", "--output_file", "all/same.hdf5")
    assert (work / "all/same.hdf5").read_bytes() == (work / "alone/text_test_0.hdf5").read_bytes()
    create(work, "--input_file", "shards/text_test_0.txt", "--output_file", "all/test.hdf5", "--do_whole_word_mask")
    assert read_attributes(work / "all/test.hdf5")["whole_word_mask"] is True


@pytest.mark.parametrize(
    ("options", "lowercase"),
    [((), True), (("--do_lower_case",), True), (("--do_lower_case", "1"), True), (("--do_lower_case=true",), True),
     (("--do_lower_case", "0"), False), (("--cased",), False)],
)  # fmt: skip
def test_case_options(work, tmp_path, options, lowercase):
    vocab = work / ("vocab.txt" if lowercase else "cased.txt")
    output = tmp_path / "a.hdf5"
    said = succeed(
        "create_pretraining_data.py", "--vocab_file", vocab, "--input_file", "shards/text_test_0.txt",
        "--output_file", output, *SMALL, *options, cwd=work,
    )  # fmt: skip
    assert read_attributes(output)["do_lower_case"] is lowercase
    assert "(0.000 % [UNK])" in said, "the vocabulary of the same case covers the text"


def test_notice_when_predictions_are_capped(work, tmp_path):
    said = create(
        work, "--input_file", "shards/text_test_0.txt", "--output_file", tmp_path / "a.hdf5",
        "--max_seq_length", 512, "--max_predictions_per_seq", 20,
    )  # fmt: skip
    assert "caps full rows, which would have 77 masked" in said


def test_records_of_other_shards_are_refused_or_removed(work):
    create(work, "--input_file", "shards", "--output_dir", "mixed")
    stale = work / "mixed" / "text_training_7.hdf5"
    stale.write_bytes((work / "mixed" / "text_training_0.hdf5").read_bytes())
    arguments = ("--vocab_file", "vocab.txt", *SMALL, "--input_file", "shards", "--output_dir", "mixed")
    done = run("create_pretraining_data.py", *arguments, cwd=work)
    assert done.returncode == 1 and "text_training_7.hdf5" in done.stderr and "--overwrite" in done.stderr
    said = succeed("create_pretraining_data.py", *arguments, "--overwrite", cwd=work)
    assert not stale.exists() and "4 file(s) made" in said


def test_a_record_file_that_vanishes_meanwhile_is_in_nobodys_way(tmp_path, monkeypatch):
    """Another rank that replaces records of another layout removes them while this one looks."""
    (tmp_path / "text_training_7.hdf5").write_bytes(b"")
    there = [tmp_path / "text_training_7.hdf5", tmp_path / "gone.hdf5"]
    monkeypatch.setattr(create_pretraining_data, "strangers", lambda folder, jobs: list(there))
    arguments = argparse.Namespace(overwrite=True, remove_stale=False)
    with pytest.raises(DataError, match="text_training_7.hdf5 *; training"):
        create_pretraining_data.superseded(tmp_path, [], arguments)
    there.pop(0)
    assert create_pretraining_data.superseded(tmp_path, [], arguments) == []


def test_one_of_several_tasks_says_what_is_left_to_do(work):
    succeed("create_pretraining_data.py", "--vocab_file", "vocab.txt", *SMALL, "--input_file", "shards", "--output_dir", "tasks", cwd=work)
    (work / "tasks" / "text_training_0.hdf5").rename(work / "tasks" / "text_training_9.hdf5")
    with h5py.File(work / "tasks" / "text_training_9.hdf5", "r+") as file:
        file.attrs["input_name"] = "text_training_9.txt"
    variables = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1"}
    arguments = ("--vocab_file", "vocab.txt", *SMALL, "--input_file", "shards", "--output_dir", "tasks", "--remove_stale")
    done = run("create_pretraining_data.py", *arguments, cwd=work, env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr
    assert "--distributed none" in done.stdout and "warning: text_training_9.hdf5" in done.stdout
    assert (work / "tasks" / "text_training_9.hdf5").exists()


def test_overwrite_removes_nothing_before_the_input_is_known_to_be_good(work, tmp_path):
    shutil.copytree(work / "shards", tmp_path / "shards")
    arguments = ("--vocab_file", work / "vocab.txt", *SMALL, "--input_file", "shards", "--output_dir", "out")
    succeed("create_pretraining_data.py", *arguments, cwd=tmp_path)
    (tmp_path / "shards" / "text_shards.json").unlink()
    (tmp_path / "shards" / "text_training_2.txt").unlink()
    (tmp_path / "shards" / "text_training_1.txt").write_bytes(b"caf\xe9\n")
    done = run("create_pretraining_data.py", *arguments, "--overwrite", cwd=tmp_path)
    assert done.returncode == 1 and "not UTF-8" in done.stderr
    assert len(list((tmp_path / "out").glob("*.hdf5"))) == 4


def test_the_manifest_of_shards_made_one_by_one_names_them_all(work, tmp_path):
    for name in ("text_training_0", "text_test_0"):
        create(work, "--input_file", f"shards/{name}.txt", "--output_dir", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "records.json").read_text())
    assert list(manifest["parts"]) == ["text_test_0.hdf5", "text_training_0.hdf5"]
    assert manifest["counts"]["instances"] == sum(part["counts"]["instances"] for part in manifest["parts"].values())


def test_records_of_earlier_shards_go_when_asked(work, tmp_path):
    shutil.copytree(work / "shards", tmp_path / "shards")
    arguments = ("--vocab_file", work / "vocab.txt", *SMALL, "--input_file", "shards", "--output_dir", "out")
    succeed("create_pretraining_data.py", *arguments, cwd=tmp_path)
    (tmp_path / "shards" / "text_shards.json").unlink()
    (tmp_path / "shards" / "text_training_2.txt").unlink()
    done = run("create_pretraining_data.py", *arguments, cwd=tmp_path)
    assert done.returncode == 1 and "text_training_2.hdf5" in done.stderr and "--remove_stale" in done.stderr
    shutil.copy(tmp_path / "out" / "text_test_0.hdf5", tmp_path / "out" / "other.hdf5")  # of a shard that is there: not stale
    assert run("create_pretraining_data.py", *arguments, "--remove_stale", cwd=tmp_path).returncode == 1
    (tmp_path / "out" / "other.hdf5").unlink()
    said = succeed("create_pretraining_data.py", *arguments, "--remove_stale", cwd=tmp_path)
    assert "removed out/text_training_2.hdf5" in said and "0 file(s) made, 3 up to date" in said
    assert len(list((tmp_path / "out").glob("*.hdf5"))) == 3


def test_other_options_do_not_replace_finished_records(work):
    create(work, "--input_file", "shards", "--output_dir", "kept")
    before = digests(work / "kept")
    arguments = ("--vocab_file", "vocab.txt", *SMALL, "--input_file", "shards", "--output_dir", "kept", "--random_seed", 7)
    done = run("create_pretraining_data.py", *arguments, cwd=work)
    assert done.returncode == 2 and "random_seed 12345 (now 7)" in done.stderr and digests(work / "kept") == before


def test_texts_next_to_shards_are_named_and_wrong_case_is_warned_of(work, tmp_path):
    shutil.copytree(work / "shards", tmp_path / "shards")
    shutil.copy(work / "sentences.txt", tmp_path / "shards" / "sentences.txt")
    said = create(work, "--input_file", tmp_path / "shards", "--output_file", tmp_path / "a.hdf5", "--cased")
    assert "left out: sentences.txt" in said and "from 24 documents" in said
    assert "are [UNK]" in said and "--cased" in said


def stop_midway(work, tmp_path, number):
    """Start two slow workers, send ``number`` to the parent once they write; the folder and the exit code."""
    (tmp_path / "in").mkdir()
    text = (work / "sentences.txt").read_text(encoding="utf-8") + "\n"
    for shard in range(4):
        (tmp_path / "in" / f"{shard}.txt").write_text(text * 300, encoding="utf-8")
    command = [sys.executable, str(ROOT / "create_pretraining_data.py"), "--vocab_file", str(work / "vocab.txt"),
               "--input_file", "in", "--output_dir", "out", "--processes", "2", "--dupe_factor", "20"]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (partial := list(tmp_path.glob("out/.*.partial"))) and time.monotonic() < end:
        time.sleep(0.02)
    workers = [int(path.name.split(".")[-2]) for path in partial]
    process.send_signal(number)
    process.wait(30)
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{worker}/exe") for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert workers and not any(os.path.exists(f"/proc/{worker}/exe") for worker in workers), "workers went on"
    return process.returncode, list((tmp_path / "out").glob(".*"))


def test_sigterm_ends_workers_and_leaves_nothing(work, tmp_path):
    assert stop_midway(work, tmp_path, signal.SIGTERM) == (143, [])


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_workers_of_a_killed_parent_end_and_the_next_run_cleans_up(work, tmp_path):
    code, left = stop_midway(work, tmp_path, signal.SIGKILL)
    assert code == -9 and left
    for path in (tmp_path / "in").iterdir():
        path.write_text((work / "sentences.txt").read_text(encoding="utf-8"), encoding="utf-8")
    create(work, "--input_file", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*(f"{n}.hdf5" for n in range(4)), "records.json"]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("data/sentences.py", ("--input", "in", "--output", "in/new.txt")),
        ("data/sentences.py", ("--input", "in/a.txt", "--output", "in/a.txt")),
        ("data/vocab.py", ("--input", "in/a.txt", "--vocab_size", "200", "--output", "in/a.txt")),
        ("create_pretraining_data.py", ("--vocab_file", "v.txt", "--input_file", "in/a.txt", "--output_file", "in/a.txt")),
        ("create_pretraining_data.py", ("--vocab_file", "v.txt", "--input_file", "in/a.txt", "--output_file", "v.txt")),
    ],
)
def test_inputs_are_never_overwritten(work, tmp_path, script, arguments):
    (tmp_path / "in").mkdir()
    shutil.copy(work / "sentences.txt", tmp_path / "in" / "a.txt")
    shutil.copy(work / "vocab.txt", tmp_path / "v.txt")
    before = digests(tmp_path / "in")
    done = run(script, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and "error: --output" in done.stderr, done.stderr
    assert digests(tmp_path / "in") == before


def test_vocabulary_says_that_the_alphabet_is_too_small(work, tmp_path):
    arguments = ("--input", "sentences.txt", "--vocab_size", 200, "--output", tmp_path / "v.txt")
    assert "raise --limit_alphabet" in succeed("data/vocab.py", *arguments, "--limit_alphabet", 20, cwd=work)
    assert "raise --limit_alphabet" not in succeed("data/vocab.py", *arguments, cwd=work)


VOCAB = ("--vocab_file", "vocab.txt")
INPUT = ("--input_file", "shards")
FAILURES = [
    ((*VOCAB, *INPUT), 2, "--output_file --output_dir is required"),
    ((*VOCAB, *INPUT, "--output_file", "x", "--output_dir", "y"), 2, "not allowed with"),
    ((*VOCAB, *INPUT, "--output_file", "x", "--cased", "--do_lower_case"), 2, "not allowed with"),
    ((*VOCAB, *INPUT, "--output_file", "x", "--dupe_factor", "0"), 2, "--dupe_factor 0 must be"),
    ((*VOCAB, *INPUT, "--output_file", "x", "--processes", "2"), 2, "--processes needs --output_dir"),
    ((*VOCAB, *INPUT, "--output_dir", "x", "--processes", "0"), 2, "--processes 0 must be"),
    ((*VOCAB, *INPUT, "--output_file", "x", "--dupe", "3"), 2, "unrecognized arguments"),
    ((*VOCAB, "--input_file", "none", "--output_file", "x"), 1, "none: no such file or folder"),
    (("--vocab_file", "none", *INPUT, "--output_file", "x"), 1, "none: no such vocabulary file"),
    (("--vocab_file", "no_mask.txt", *INPUT, "--output_file", "x"), 1, "[MASK] are missing"),
    ((*VOCAB, "--input_file", "latin.txt", "--output_file", "x"), 1, "latin.txt: byte 0xe9 at offset 3 is not UTF-8"),
    ((*VOCAB, "--input_file", "blank.txt", "--output_file", "x"), 1, "blank.txt: no text"),
    ((*VOCAB, "--input_file", "one.txt", "--output_file", "x"), 1, "one.txt: only one document"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), FAILURES)
def test_exit_codes_and_messages(work, arguments, code, message):
    (work / "latin.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    (work / "blank.txt").write_text("\n \n")
    (work / "one.txt").write_text("only one\ndocument here\n")
    (work / "no_mask.txt").write_text((work / "vocab.txt").read_text().replace("[MASK]\n", ""))
    done = run("create_pretraining_data.py", *arguments, cwd=work)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert code == 2 or done.stderr.count("\n") == 1, "one line"
    assert not (work / "x").exists()


def test_real_write_failure_leaves_nothing(work, tmp_path):
    """The kernel refuses to let the file grow, as a full disk would."""
    done = run(
        "create_pretraining_data.py", *VOCAB, *SMALL, *INPUT, "--output_file", tmp_path / "out" / "a.hdf5", cwd=work,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr == f"error: File too large ({tmp_path / 'out' / 'a.hdf5'})\n"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("script", ["create_pretraining_data.py", "data/sentences.py", "data/shard.py", "data/vocab.py"])
def test_help_from_anywhere_without_torch(script, tmp_path):
    said = succeed(script, "--help", cwd=tmp_path)
    assert "default" in said and "python" in said
    probe = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
    probe += "except SystemExit: pass\nassert 'torch' not in sys.modules, 'torch was imported'"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("script", "arguments", "code"),
    [
        ("data/sentences.py", ("--input", "none", "--output", "x"), 1),
        ("data/sentences.py", ("--input", "raw", "--output", "x", "--documents", "page"), 2),
        ("data/sentences.py", ("--output", "x"), 2),
        ("data/shard.py", ("--input", "sentences.txt", "--output_dir", "x", "--n_training_shards", "100"), 1),
        ("data/shard.py", ("--input", "sentences.txt", "--output_dir", "x", "--n_training_shards", "0"), 2),
        ("data/vocab.py", ("--input", "sentences.txt", "--vocab_size", "20", "--output", "x"), 2),
        ("data/vocab.py", ("--input", "none.txt", "--vocab_size", "200", "--output", "x"), 1),
    ],
)
def test_exit_codes_of_the_other_scripts(work, script, arguments, code):
    done = run(script, *arguments, cwd=work)
    assert done.returncode == code, done.stderr
    assert "error: " in done.stderr and "Traceback" not in done.stderr
    assert not (work / "x").exists()
