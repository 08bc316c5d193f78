"""What befalls a run from outside: data and folders that go bad under it, clocks, late ranks, signals to one rank. Nothing may be lost.

Kills and damaged checkpoints at random moments: test_soak.py. Lost and hung ranks: test_lost_ranks.py.
"""

import json
import os
import shutil
import signal
import subprocess
import time

import h5py
import numpy as np
import pytest
import torch

from berth.runlog import read_records, read_steps
from tests.support import (
    ROOT,
    finish,
    free_port,
    launch,
    make_project,
    pretraining_arguments,
    run_script,
    start_rank,
    wait_for_step,
    write_records,
)  # fmt: skip

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(91))]
TWO = {"train_batch_size": 8, "gradient_accumulation_steps": 1}


def pretrain(project, output, expect=0, **changes):
    done = run_script("run_pretraining.py", *pretraining_arguments(project, output, **changes))
    assert done.returncode == expect and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def assert_same_run(project, output, reference):
    """The last checkpoint's tensors bitwise, and the log of every step."""
    last = max((project / reference).glob("ckpt_*.pt"), key=lambda path: int(path.stem[5:])).name
    one, other = (torch.load(project / folder / last, weights_only=True) for folder in (output, reference))
    assert one["model"].keys() == other["model"].keys() and one["samples"] == other["samples"]
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    for number, state in other["optimizer"]["state"].items():
        assert all(torch.equal(one["optimizer"]["state"][number][key], state[key]) for key in ("exp_avg", "exp_avg_sq"))
    keys = ("average_loss", "grad_norm", "learning_rate", "first_sample", "batch_crc32")
    curves = [
        {step: [data[key] for key in keys] for step, data in read_steps(project / folder / "dllogger.json").items()}
        for folder in (output, reference)
    ]
    assert curves[0] == curves[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The tiny project with two uninterrupted runs of 24 steps: ``one`` of one process, ``two`` of two."""
    project = make_project(tmp_path_factory.mktemp("faults"))
    (project / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    pretrain(project, "one", vocab_file=project / "vocab.txt")
    finish(launch(project, 2, "two", **TWO))
    return project


# -- signals, clocks, late ranks --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_signals_to_one_rank_wrong_clocks_and_a_late_rank(project, tmp_path):
    """USR1 to one rank, USR2 to the other one of the next attempt: all save the same step and leave with the signal's code.

    Meanwhile the clocks of the ranks are days apart and jump back between the attempts, times of files lie, and a rank comes 15 s late, which
    is longer than a silent one is given. The end is bitwise the uninterrupted run's.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nclock, ahead = time.time, float(os.environ['CLOCK_AHEAD'])\ntime.time = lambda: clock() + ahead\n"
    )
    out, day = project / "days", 86400

    def attempt(ahead, late):
        port, running = free_port(), []
        for rank, seconds in enumerate(ahead):
            time.sleep(late * rank)
            variables = {"PYTHONPATH": str(tmp_path), "CLOCK_AHEAD": str(seconds)}
            changes = {"resume_from_checkpoint": True, "dead_rank_s": 10, **TWO}
            running.append(start_rank(project, rank, 2, port, "days", variables=variables, **changes))
        return running

    reached = 0
    for number, rank, ahead, late in ((signal.SIGUSR1, 1, (day, -day), 0), (signal.SIGUSR2, 0, (-day, day), 15)):
        running = attempt(ahead, late)
        wait_for_step(out / "dllogger.json", reached + 2, running[0])
        running[rank].send_signal(number)
        errors = finish(running, expect=128 + number)
        before, reached = reached, max(read_steps(out / "dllogger.json"))
        assert before + 2 <= reached < 24 and "stopped by a signal" in errors[0] and "Traceback" not in "".join(errors), errors
        os.utime(out / f"ckpt_{reached}.pt", (0, 0))
    finish(launch(project, 2, "days", resume_from_checkpoint=True, **TWO))
    assert_same_run(project, "days", "two")
    records = list(read_records(out / "dllogger.json"))
    stamps, attempts = [int(record["timestamp"]) for record in records], [record["attempt"] for record in records]
    assert min(stamps) < stamps[0] - 1.9 * day * 1000  # the clocks were wrong indeed
    assert attempts == sorted(attempts) and set(attempts) == {1, 2, 3}
    kept = sorted(int(path.stem[5:]) for path in out.glob("ckpt_*.pt"))
    assert kept[-1] == 24 and kept[-3:-1] == [15, 20] and len(kept) == 4  # the three newest, and the end, whatever their times


def test_a_rank_with_other_code_and_records_is_named(project, tmp_path):
    """All ranks refuse before anything is written, and say which one is odd, and in what."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("run_pretraining.py", "modeling.py", "optimization.py"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "berth", root / "berth", ignore=shutil.ignore_patterns("__pycache__"))
    with open(root / "berth" / "training" / "step.py", "a", encoding="utf-8") as handle:
        handle.write("# one line more\n")
    other = make_project(tmp_path / "other")
    write_records(other / "records" / "a_training_1.hdf5", 70, seed=7, input_sha256="0" * 64)  # content goes by the attributes
    port = free_port()
    running = [
        start_rank(folder, rank, 2, port, "odd", root=where, **TWO) for rank, folder, where in ((0, project, ROOT), (1, other, root))
    ]
    errors = finish(running, expect=None)
    assert all(process.returncode in (1, 2) for process in running), errors
    for text in errors:
        assert "rank 1" in text and "code" in text and "records" in text and "Traceback" not in text, errors
    assert not list((project / "odd").glob("ckpt_*")) and not list((other / "odd").glob("ckpt_*"))


# -- data that goes bad -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Short sequences, and so many that a run reads a second window of records on its way (WINDOW_ROWS); ``through`` is uninterrupted."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "intermediate_size": 8}
    project = make_project(tmp_path_factory.mktemp("large"), **small)
    for number in range(2):
        path = project / "records" / f"a_training_{number}.hdf5"
        write_records(path, 1000, number, length=8)
        with h5py.File(path, "r") as small:
            arrays = {name: np.tile(small[name][:], (40, *[1] * (small[name].ndim - 1))) for name in small}
        with h5py.File(path, "w") as handle:
            for name, data in arrays.items():
                handle.create_dataset(name, data=data, chunks=(1000, *data.shape[1:]), compression="gzip")
    finish(launch(project, 2, "through", **LARGE))
    return project


LARGE = {"train_batch_size": 4096, "gradient_accumulation_steps": 2, "max_steps": 20, "num_steps_per_checkpoint": 2, "num_workers": 1}


@pytest.mark.slow
def test_records_that_vanish_or_shrink_while_they_are_read(large):
    """The run ends on every rank with an error that names the file, keeps a checkpoint, and goes on once the file is back."""
    path, log = large / "records" / "a_training_1.hdf5", large / "broken" / "dllogger.json"
    aside = path.with_suffix(".aside")

    def shrink():
        shutil.copy2(path, aside)
        with open(path, "r+b") as handle:
            handle.truncate(5000)

    reached = 0
    for spoil in (shrink, lambda: path.rename(aside)):
        running = launch(large, 2, "broken", resume_from_checkpoint=True, **LARGE)
        wait_for_step(log, reached + 1, running[0])
        spoil()
        errors = finish(running, expect=1)
        os.replace(aside, path)
        assert any("error:" in text and path.name in text for text in errors), errors
        assert not any("Traceback" in text for text in errors), errors
        before, reached = reached, max(read_steps(log))
        assert before < reached < 20
        saved = [int(file.stem[5:]) for file in (large / "broken").glob("ckpt_*.pt")]
        assert max(saved) == reached, errors  # nothing of what was trained is lost
    finish(launch(large, 2, "broken", resume_from_checkpoint=True, **LARGE))
    assert_same_run(large, "broken", "through")


# -- folders and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("chattr") is None, reason="making a folder immutable needs root and chattr")
def test_a_folder_that_becomes_read_only(project):
    """Checkpoints cannot be written any more: the run says so and fails, those before are whole, and it goes on from them."""
    out = project / "readonly"
    port = free_port()
    running = start_rank(project, 0, 1, port, "readonly")
    wait_for_step(out / "dllogger.json", 7, running)
    if subprocess.run(["chattr", "+i", str(out)], capture_output=True).returncode:
        running.kill()
        running.communicate()
        pytest.skip("this file system knows no immutable folders")
    try:
        (errors,) = finish([running], expect=1)
        assert "could not be written" in errors and str(out) in errors and "Traceback" not in errors
        assert [path.name for path in out.glob("ckpt_*")] == ["ckpt_5.pt"] and not list(out.glob(".*partial"))
    finally:
        subprocess.run(["chattr", "-i", str(out)], check=True)
    pretrain(project, "readonly", resume_from_checkpoint=True)
    assert_same_run(project, "readonly", "one")


def test_a_flipped_bit_is_found_without_the_manifest(project):
    """Neither manifest nor pointer, and the newest file has a wrong bit among its weights: the one before it is used."""
    out = project / "unlisted"
    shutil.copytree(project / "one", out)
    (out / "manifest.json").unlink()
    (out / "latest").unlink(missing_ok=True)
    path = out / "ckpt_24.pt"
    data = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["model"]["bert.embeddings.word_embeddings.weight"].numpy().tobytes()
    data[data.index(weights) + len(weights) // 2] ^= 0x10
    path.write_bytes(data)
    errors = pretrain(project, "unlisted", resume_from_checkpoint=True)
    assert "WARNING" in errors and "ckpt_24.pt" in errors and "continuing phase 1 from ckpt_20.pt" in errors
    assert_same_run(project, "unlisted", "one")
    manifest = json.loads((out / "manifest.json").read_text())
    assert [entry["file"] for entry in manifest["checkpoints"]][-1] == "ckpt_24.pt"


def test_another_run_is_refused_and_force_says_what_it_overrides(project, tmp_path):
    """Vocabulary, recipe, seed and records differ: all are named at once; --force_resume goes on and lists them."""
    out = project / "forced"
    shutil.copytree(project / "one", out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}
    (tmp_path / "other.txt").write_text("\n".join([*WORDS[:5], *reversed(WORDS[5:])]) + "\n")
    write_records(make_project(tmp_path / "other") / "records" / "a_training_0.hdf5", 90, seed=7)
    changes = {
        "vocab_file": tmp_path / "other.txt", "seed": 7, "learning_rate": 1e-3, "weight_decay": 0.1, "max_steps": 26,
        "input_dir": tmp_path / "other" / "records", "resume_from_checkpoint": True,
    }  # fmt: skip
    differences = (
        "seed was 42, is 7", "learning_rate was 0.01, is 0.001", "weight_decay was 0.01, is 0.1", "max_steps was 24, is 26",
        "the vocabulary changed", "training records changed",
    )  # fmt: skip
    refused = pretrain(project, "forced", expect=2, **changes)
    assert all(words in refused for words in differences) and "--force_resume" in refused
    # a refusal writes nothing, but for the name of the process that held the lock
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"} == before
    forced = [line for line in pretrain(project, "forced", force_resume=True, **changes).splitlines() if "--force_resume overrides" in line]
    assert all(any(words in line for line in forced) for words in differences), forced
    assert (out / "ckpt_26.pt").exists()
