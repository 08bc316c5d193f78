"""scripts/run_pretraining.sh as a user runs it: both phases with two processes, interrupted in phase 2 and resumed; what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from berth.launch.matrix import load_matrix
from berth.runlog import read_steps
from tests import support
from tests.support import ROOT, TINY, environment, write_records

SCRIPT = ROOT / "scripts" / "run_pretraining.sh"
RECIPE = load_matrix().recipes["tiny"]
STEPS1, STEPS2 = RECIPE.phases[1].max_steps, 150  # phase 2 lasts long enough to be interrupted
LINE = f"8 1e-2 fp32 2 0.1 {STEPS1} 10 false true true 2 42 job true false 8 1e-2 0.1 {STEPS2} 4".split()
FINAL = f"ckpt_{STEPS1 + STEPS2}.pt"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Records of the recipe's two lengths and a small model, in a folder whose name needs quoting."""
    folder = tmp_path_factory.mktemp("a b$")
    with pytest.MonkeyPatch.context() as patch:
        for phase, one in RECIPE.phases.items():
            patch.setattr(support, "PREDICTIONS", one.max_predictions_per_seq)
            write_records(folder / f"phase{phase}" / "x_training_0.hdf5", 80, phase, length=one.max_seq_length)
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def start(project: Path, results: str, *words: str) -> subprocess.Popen[str]:
    """The script, called from the project folder with relative paths."""
    named = ["--platform", "local", "--recipe", "tiny", "--data_dir_phase1", "phase1", "--data_dir_phase2", "phase2"]
    return subprocess.Popen(
        [str(SCRIPT), *words, *named, "--bert_config", "./config.json", "--results", results],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=project, env={**environment(), "BERTH_PYTHON": sys.executable},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(path: Path, text: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (path.is_file() and text in path.read_text(encoding="utf-8")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / FINAL, weights_only=True)["model"]


@pytest.mark.slow
def test_both_phases_and_an_interruption(project):
    code, out, err = finish(start(project, "whole", *LINE))
    assert code == 0, err + out
    assert "note: argument 16 is 8: the later order of arguments, in which it is train_batch_size_phase2" in err
    logs = sorted(path.name for path in (project / "whole").glob("*.log"))
    assert [re.sub(r"\d{12}", "STAMP", name) for name in logs] == [
        "job.pyt_bert_pretraining_phase1_fp32_gbs16.STAMP.log",
        "job.pyt_bert_pretraining_phase2_fp32_gbs16.STAMP.log",
    ]
    for name, phase in zip(logs, (1, 2), strict=True):
        text = (project / "whole" / name).read_text()
        assert f"Logs written to {project}/whole/{name}" in out
        assert f"global batch 16 = {'4 x 2 x 2' if phase == 1 else '2 x 4 x 2'} (micro batch x accumulation x processes)" in text
        assert text in out  # the terminal shows what the file holds
    assert list(read_steps(project / "whole" / "checkpoints" / "dllogger.json")) == list(range(1, STEPS1 + STEPS2 + 1))

    run = project / "cut" / "checkpoints"
    process = start(project, "cut", *LINE)
    wait_for(run / "manifest.json", '"phase": 2', process)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 143, err + out
    assert "phase2 stopped with exit code 143; the same command with resume_training true goes on" in err
    assert not (run / FINAL).exists()
    kept = {path.name: path.stat().st_mtime_ns for path in run.glob("ckpt_*.pt")}

    code, out, err = finish(start(project, "cut", *LINE))
    assert code == 2 and "holds a run already" in err and "resume_training true" in err
    assert {path.name: path.stat().st_mtime_ns for path in run.glob("ckpt_*.pt")} == kept

    code, out, err = finish(start(project, "cut", *LINE[:7], "true", *LINE[8:]))
    assert code == 0, err + out
    assert "phase1 is complete already" in out
    assert len(list((project / "cut").glob("*phase1*.log"))) == 1 and len(list((project / "cut").glob("*phase2*.log"))) == 2
    manifest = json.loads((run / "manifest.json").read_text())["checkpoints"]
    assert [entry["file"] for entry in manifest if entry["final"]] == [f"ckpt_{STEPS1}.pt", FINAL]
    whole, cut = weights(project / "whole"), weights(project / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


def test_exit_code_of_training_is_passed_on(project):
    (project / "config.json").rename(project / "good.json")
    try:
        (project / "config.json").write_text(json.dumps({**TINY, "hidden_act": "none such"}))
        code, _, err = finish(start(project, "bad", *LINE[:8], "false", *LINE[9:]))
    finally:
        (project / "good.json").replace(project / "config.json")
    assert code == 2
    assert "phase1 failed with exit code 2" in err and "hidden_act" in err
    assert not list((project / "bad").glob("*.log"))  # create_logfile false


def test_dry_run_shows_both_commands_and_makes_nothing(project):
    code, out, err = finish(start(project, "dry", *LINE, "--dry_run"))
    assert code == 0, err
    commands = [line for line in out.splitlines() if " run_pretraining.py " in line]
    assert len(commands) == 2 and f"--input_dir '{project}/phase1'" in commands[0] and "--phase2" in commands[1]
    assert not (project / "dry").exists()


def test_mistakes_stop_it_before_anything_is_made(project):
    code, out, err = finish(start(project, "wrong", "8", "6", "fp4", "--data_dir_phase1=gone", "--lr", "3"))
    assert (code, out) == (2, "")
    first, *lines = err.splitlines()
    assert first == "error: several arguments are wrong:"
    begins = (
        "unknown option --lr;", "argument 2, learning_rate '6'", "--data_dir_phase1 'phase1' was given before", "precision 'fp4' is not known;",
        f"data_dir_phase1 {project}/gone does not exist",
    )  # fmt: skip
    assert len(lines) == len(begins) and all(line.strip().startswith(begin) for line, begin in zip(lines, begins, strict=True))
    assert not (project / "wrong").exists()


def test_records_of_the_wrong_length_are_found_before_phase_1(project):
    words = [str(SCRIPT), *LINE, "phase1", "phase1", "--platform", "local", "--recipe", "tiny", "--bert_config", "./config.json"]
    done = subprocess.run([*words, "--results", "wrong"], capture_output=True, text=True, cwd=project, env=environment(), timeout=60)
    assert done.returncode == 2
    assert f"phase2: {project}/phase1 holds sequences of 16 tokens, recipe tiny has 32" in done.stderr
    assert not (project / "wrong").exists()


def test_help_and_python(tmp_path):
    done = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=60)
    assert done.returncode == 0 and "train_batch_size_phase2" in done.stdout
    python = {"BERTH_PYTHON": "/nowhere/python"}
    done = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **python}, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: no Python 3.10 or newer with PyYAML (tried: /nowhere/python); run make setup, or set BERTH_PYTHON\n")
