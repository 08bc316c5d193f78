"""A run that diverges: it names the tensors and stops, or goes back to a checkpoint and leaves the samples out."""

import os
import subprocess
import sys

import pytest
import torch

from berth.runlog import read_records, read_steps
from tests.support import ROOT, environment, free_port, make_project, pretraining_arguments

# run_pretraining.py with two gradients that are not numbers while the stream stands in a window of samples (rank 0's share only)
CODE = """
import os, sys
sys.path.insert(0, os.environ["BERTH_ROOT"])
import run_pretraining
import torch
from berth.errors import run_main
from berth.training.step import TrainingStep
first, last = map(int, os.environ["POISON"].split(","))
plain = TrainingStep.__call__
def poisoned(self, batch, *arguments):
    handles = []
    if batch.first_sample >= first and os.environ.get("BREAK"):
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\\nand advice")
    if batch.first_sample >= first and os.environ.get("DAMAGE"):
        path = os.environ.pop("DAMAGE")
        data = bytearray(open(path, "rb").read())
        data[len(data) // 2] ^= 1
        open(path, "wb").write(data)
    if first <= batch.first_sample < last and os.environ.get("RANK", "0") == "0":
        named = dict(self.parallel.module.named_parameters())
        for name in ("bert.encoder.layer.1.output.dense.weight", "cls.predictions.bias"):
            handles.append(named[name].register_hook(lambda gradient: gradient * float("nan")))
    result = plain(self, batch, *arguments)
    for handle in handles:
        handle.remove()
    return result
TrainingStep.__call__ = poisoned
run_main(run_pretraining.main)
"""
COMMON = {"max_consecutive_skips": 3, "on_divergence": "rollback"}


def start_poisoned(project, window, damage, **changes):
    """One process; ``damage`` names a checkpoint in which a bit is flipped when the window begins."""
    os.environ["DAMAGE"] = str(project / "out" / damage)
    try:
        (ended,) = poisoned(project, window, **changes)
    finally:
        del os.environ["DAMAGE"]
    return ended


def poisoned(project, window, processes=1, **changes):
    """All processes' (exit code, standard error)."""
    arguments, port = pretraining_arguments(project, **{**COMMON, **changes}), free_port()
    running = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {**environment(), "POISON": f"{window[0]},{window[1]}", "BERTH_ROOT": str(ROOT)}
        if processes > 1:
            variables.update({name: str(value) for name, value in place.items()})
        running.append(subprocess.Popen([sys.executable, "-c", CODE, *arguments], stderr=subprocess.PIPE, text=True, env=variables))
    errors = [process.communicate(timeout=120)[1] for process in running]
    return [(process.returncode, text) for process, text in zip(running, errors, strict=True)]


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path)


def facts(project, key):
    return [record["data"] for record in read_records(project / "out" / "dllogger.json") if key in record.get("data", {})]


@pytest.mark.parametrize("processes", [1, 2])
def test_rollback_leaves_the_bad_window_out(project, processes):
    """Checkpoints at 5 and 10; steps 12 to 14 (samples 176 to 223) are poisoned: back to 10, on with sample 224."""
    batch = {"train_batch_size": 16 // processes}
    ended = poisoned(project, (176, 224), processes, **batch)
    assert [code for code, _ in ended] == [0] * processes, ended
    said = ended[0][1]
    assert "rollback 1 of 3 to ckpt_10.pt, samples 160 to 223 are left out" in said
    for name in ("bert.encoder.layer.1.output.dense.weight", "cls.predictions.bias"):
        assert name in said
    steps = read_steps(project / "out" / "dllogger.json")
    assert list(steps) == list(range(1, 25))
    assert [steps[step]["first_sample"] for step in (10, 11, 12, 24)] == [144, 224, 240, 432]
    assert steps[24]["skipped_steps"] == 3 and facts(project, "rollback")[0]["skipped_samples"] == [160, 224]
    payload = torch.load(project / "out" / "ckpt_24.pt", weights_only=True)
    assert (payload["rollbacks"], payload["samples"], payload["phase_step"]) == (1, 448, 24)
    early = torch.load(project / "out" / "ckpt_15.pt", weights_only=True)
    assert (early["rollbacks"], early["samples"]) == (1, 304)
    assert all(torch.isfinite(tensor).all() for tensor in payload["model"].values())


def test_rollback_passes_over_what_is_ahead_or_damaged(project):
    """After --resume_step 10 checkpoints 15 and 20 are another branch's, and 10 itself is damaged meanwhile: back to 5."""
    ((code, said),) = poisoned(project, (10**8, 10**9), num_steps_per_checkpoint=5, keep_checkpoints=5, steps_this_run=20)
    assert code == 0, said
    done = start_poisoned(
        project,
        (176, 224),
        resume_from_checkpoint=True,
        resume_step=10,
        num_steps_per_checkpoint=100,
        keep_checkpoints=5,
        steps_this_run=8,
        damage="ckpt_10.pt",
    )
    assert done[0] == 0, done[1]
    assert "ckpt_10.pt" in done[1] and "falling back to the checkpoint before it" in done[1]
    assert "rollback 1 of 3 to ckpt_5.pt, samples 80 to 223 are left out" in done[1]
    steps = read_steps(project / "out" / "dllogger.json")
    assert steps[6]["first_sample"] == 224 and max(steps) < 15


def test_too_many_rollbacks_end_the_run(project):
    ((code, said),) = poisoned(project, (176, 10**9), max_rollbacks=2)
    assert code == 1 and "Traceback" not in said
    assert "rollback 2 of 2" in said and "after 2 rollback(s)" in said
    assert sorted(os.listdir(project / "out"))  # nothing of the good part is lost
    assert (project / "out" / "ckpt_10.pt").exists()


def test_nothing_to_roll_back_to(project):
    ((code, said),) = poisoned(project, (0, 10**9))
    assert code == 1 and "no checkpoint of this phase yet to roll back to" in said


def test_stop_names_the_tensors(project):
    ((code, said),) = poisoned(project, (32, 10**9), on_divergence="stop", precision="fp16", init_loss_scale=1024.0)
    assert code == 1 and "3 steps in a row had a non-finite gradient" in said and "loss scale" in said
    assert said.count("cls.predictions.bias") >= 4 and "nan" in said
    assert [data["skipped_step"] for data in facts(project, "skipped_step")] == [3, 3, 3]


def test_a_skipped_first_step_of_phase_2_writes_nothing_over_phase_1(project):
    """fp16 begins by skipping: a stop before the first update has nothing to keep, and phase 1's end bears that number."""
    ((code, said),) = poisoned(project, (10**8, 10**9), max_steps=4)
    assert code == 0, said
    before = (project / "out" / "ckpt_4.pt").read_bytes()
    phase2 = {"phase2": True, "resume_from_checkpoint": True, "max_steps": 4, "learning_rate": 4e-3}
    ((code, said),) = poisoned(project, (0, 16), steps_this_run=1, **phase2)
    assert code == 0 and "Traceback" not in said and "skipped" in said
    assert (project / "out" / "ckpt_4.pt").read_bytes() == before and not (project / "out" / "ckpt_5.pt").exists()
    ((code, said),) = poisoned(project, (10**8, 10**9), **phase2)
    assert code == 0 and (project / "out" / "ckpt_8.pt").exists(), said


def test_a_broken_device_is_worth_another_try(project, monkeypatch):
    monkeypatch.setenv("BREAK", "1")
    monkeypatch.setenv("BERTH_FAILURES", str(project / "failures"))
    ended = poisoned(project, (176, 224), processes=2, train_batch_size=8)
    assert [code for code, _ in ended] == [76, 76], ended
    assert any("lost its device: CUDA error: uncorrectable ECC error encountered; go on" in said for _, said in ended)
    assert (project / "out" / "ckpt_10.pt").exists() and not (project / "failures").exists()
