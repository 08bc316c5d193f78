"""berth-ckpt as people type it: what it prints, what it deletes, how it exits. In one process, except where the process is the point."""

import configparser
import errno
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from berth import ckpt
from berth.errors import CheckpointError, ConfigError
from berth.training import checkpoint_file
from berth.training.checkpoint import CheckpointStore, read_checkpoint
from berth.training.inspection import survey
from berth.training.manifest import size_text
from tests.support import ROOT, environment


def payload(step, optimizer="lamb"):
    weight = torch.full((20, 10), float(step))
    moments = {0: {"exp_avg": torch.zeros(20, 10), "exp_avg_sq": torch.zeros(20, 10)}, 1: {"exp_avg": torch.zeros(7)}}
    group = {"lr": 0.01, "params": [0, 1]}
    if optimizer == "lamb":
        group["step"] = step
    else:
        moments = {key: {**value, "step": torch.tensor(float(step))} for key, value in moments.items()}
    return {
        "model": {"embedding": weight, "decoder": weight, "bias": torch.zeros(7)},
        "optimizer": {"state": moments, "param_groups": [group]},
        "scaler": {"scale": 1024.0, "good_steps": 3},
        "config": {"hidden_size": 10},
        "identity": {"seed": 42, "global_batch": 64, "optimizer": optimizer, "data": "abc", "model_config": {"hidden_size": 10}},
        "skipped": 2,
    }


def write(folder, step, phase=1, final=False, **more):
    store = CheckpointStore(folder, keep=100)
    place = {"step": step, "phase": phase, "phase_step": step if phase == 1 else step - 20, "samples": step * 64}
    return store.save({**payload(step), **more}, **place, final=final)


@pytest.fixture
def run(tmp_path):
    """Phase 1 with its end, phase 2 with three checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step, phase, final in ((10, 1, False), (15, 1, False), (20, 1, True), (25, 2, False), (30, 2, False), (35, 2, False)):
        write(folder, step, phase, final)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_ls_is_a_table(run, capsys):
    hour_ago = time.time() - 3700
    os.utime(run / "ckpt_10.pt", (hour_ago, hour_ago))
    (run / "superseded_1_ckpt_40.pt").write_bytes(b"x" * 2000)
    (run / ".ckpt_40.pt.n1.77.partial").write_bytes(b"x" * 500)
    assert ckpt.main(["ls", str(run)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", "step", "phase", "phase", "step", "samples", "size", "age", "kept", "state"]
    size = size_text((run / "ckpt_10.pt").stat().st_size).split()
    assert lines[0].split() == ["ckpt_10.pt", "10", "1", "10", "640", *size, "1", "h", "listed"]
    assert [line.split()[0] for line in lines[:6]] == [f"ckpt_{step}.pt" for step in (10, 15, 20, 25, 30, 35)]
    assert "phase end" in lines[2] and lines[2].endswith("listed") and lines[5].endswith("listed, latest")
    assert lines[5].split()[:5] == ["ckpt_35.pt", "35", "2", "15", "2240"]
    assert lines[6:] == [
        "1 file(s), 2 kB, superseded: `prune --superseded` deletes",
        "1 file(s), 500 B, being written, or left by a killed run",
    ]


def test_ls_as_json_names_every_state(run, capsys):
    (run / "ckpt_10.pt").write_bytes((run / "ckpt_10.pt").read_bytes()[:-5])
    (run / "ckpt_15.pt").unlink()
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["checkpoints"] = [item for item in manifest["checkpoints"] if item["step"] != 25]
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "ckpt_99.pt").write_bytes(b"PK half a zip")
    assert ckpt.main(["ls", "--json", str(run)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["latest"] == "ckpt_35.pt" and said["superseded"] == said["unfinished"] == []
    assert [(row["file"], row["state"]) for row in said["checkpoints"]] == [
        ("ckpt_10.pt", "wrong size"), ("ckpt_15.pt", "missing"), ("ckpt_20.pt", "listed"), ("ckpt_25.pt", "unlisted"),
        ("ckpt_30.pt", "listed"), ("ckpt_35.pt", "listed"), ("ckpt_99.pt", "damaged"),
    ]  # fmt: skip
    unlisted, damaged = said["checkpoints"][3], said["checkpoints"][6]
    assert (unlisted["phase"], unlisted["phase_step"], unlisted["samples"]) == (2, 5, 1600) and damaged["step"] is None


def test_ls_of_a_file_and_of_nothing(run, tmp_path, capsys):
    assert ckpt.main(["ls", str(run / "ckpt_20.pt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("ckpt_20.pt")
    (tmp_path / "empty").mkdir()
    assert ckpt.main(["ls", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'empty'} holds no checkpoint\n"


def test_ls_needs_no_torch_and_is_a_command(run):
    """As a login node runs it: importing torch fails."""
    program = "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None; from berth.ckpt import main_console; main_console()"
    done = subprocess.run(
        [sys.executable, "-c", program, "ls", str(run)], capture_output=True, text=True, cwd=ROOT, env=environment()
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 7
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].split() == ["berth-ckpt", "=", "berth.ckpt:main_console"]


def test_exit_codes(run, tmp_path):
    def ended(*words):
        done = subprocess.run([sys.executable, "-m", "berth.ckpt", *words], capture_output=True, text=True, cwd=ROOT, env=environment())
        return done.returncode, done.stderr.splitlines()[-1]

    missing = tmp_path / "none"
    assert ended("ls", str(missing)) == (2, f"error: {missing} does not exist; name the --output_dir of a run or a ckpt_<step>.pt in it")
    assert ended("prune", str(run)) == (2, "berth-ckpt prune: error: the following arguments are required: --keep")
    flip(run / "ckpt_25.pt")
    assert ended("verify", str(run)) == (1, f"error: 1 of 6 checkpoints in {run} are damaged: ckpt_25.pt")


def test_verify_reads_everything_back(run, capsys):
    assert ckpt.main(["verify", "--finite", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ok       ckpt_10.pt  SHA-256 and 6 tensors, all finite" and len(lines) == 6
    (run / "ckpt_10.pt").write_bytes(b"")
    flip(run / "ckpt_20.pt")
    (run / "ckpt_30.pt").unlink()
    with pytest.raises(CheckpointError, match=r"3 of 6 checkpoints in .* are damaged: ckpt_10.pt, ckpt_20.pt, ckpt_30.pt$"):
        ckpt.main(["verify", str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["DAMAGED", "ok", "DAMAGED", "ok", "DAMAGED", "ok"]
    assert "truncated" in lines[0] and "does not match its checksum" in lines[2] and "does not exist" in lines[4]


def test_verify_finds_nan_and_unlisted_damage(run, capsys):
    weights = {"a": torch.tensor([1.0, float("nan")]), "b": torch.tensor([float("-inf")]), "c": torch.ones(3)}
    write(run, 40, 2, model=weights)
    assert ckpt.main(["verify", str(run / "ckpt_40.pt")]) == 0
    with pytest.raises(CheckpointError, match="ckpt_40.pt"):
        ckpt.main(["verify", "--finite", str(run / "ckpt_40.pt")])
    assert "holds nan or inf in model.a, model.b\n" in capsys.readouterr().out
    (run / "manifest.json").unlink()
    path = run / "ckpt_35.pt"
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((20, 10), 35.0).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="1 of 7 .*: ckpt_35.pt$"):
        ckpt.main(["verify", str(run)])
    said = capsys.readouterr().out
    assert "does not match its CRC" in said and "ok       ckpt_30.pt  no checksum in manifest.json, CRCs and 6 tensors" in said


def test_prune_keeps_phase_ends_and_the_newest(run, capsys):
    before = names(run)
    assert ckpt.main(["prune", "--keep", "2", "--dry-run", str(run)]) == 0
    assert names(run) == before and not (run / ".lock").exists()
    planned = capsys.readouterr().out
    freed = sum((run / f"ckpt_{step}.pt").stat().st_size for step in (10, 15, 25))
    assert planned.splitlines()[-1] == f"{size_text(freed)} would be free; 3 checkpoint(s) stay"
    (run / "superseded_1_ckpt_40.pt").write_bytes(b"x")
    assert ckpt.main(["prune", "--keep", "2", str(run)]) == 0
    assert names(run) == ["ckpt_20.pt", "ckpt_30.pt", "ckpt_35.pt", "latest", "manifest.json", "superseded_1_ckpt_40.pt"]
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines()[:3]] == [["deleted", f"ckpt_{step}.pt"] for step in (10, 15, 25)]
    manifest = json.loads((run / "manifest.json").read_text())
    assert [item["step"] for item in manifest["checkpoints"]] == [20, 30, 35] and manifest["config"] == {"hidden_size": 10}
    assert (run / "latest").read_text() == "ckpt_35.pt\n"
    assert ckpt.main(["prune", "--keep", "1", "--superseded", str(run)]) == 0
    assert names(run) == ["ckpt_20.pt", "ckpt_35.pt", "latest", "manifest.json"]
    assert read_checkpoint(run / "ckpt_35.pt")["step"] == 35


def test_prune_never_takes_the_newest_good_one(run, capsys):
    for step in (30, 35):
        flip(run / f"ckpt_{step}.pt")
    assert ckpt.main(["prune", "--keep", "1", str(run)]) == 0
    assert [name for name in names(run) if name.endswith(".pt")] == ["ckpt_20.pt", "ckpt_25.pt", "ckpt_30.pt", "ckpt_35.pt"]
    assert "left alone: ckpt_35.pt, which is damaged or cannot be read" in capsys.readouterr().out
    assert (run / "latest").read_text() == "ckpt_25.pt\n"
    for name in ("ckpt_20.pt", "ckpt_25.pt"):
        flip(run / name)
    before = names(run)
    with pytest.raises(CheckpointError, match="no checkpoint in .* is good .*nothing was deleted"):
        ckpt.main(["prune", "--keep", "1", str(run)])
    assert names(run) == before


def test_prune_stays_away_from_a_running_run_and_from_mistakes(run):
    running = CheckpointStore(run)
    running.lock()
    before = names(run)
    with pytest.raises(CheckpointError, match="a run is writing to"):
        ckpt.main(["prune", "--keep", "1", str(run)])
    assert names(run) == before
    with pytest.raises(ConfigError, match="--keep 0: must be at least 1"):
        ckpt.main(["prune", "--keep", "0", str(run)])
    with pytest.raises(ConfigError, match="is a file; prune works on the output folder"):
        ckpt.main(["prune", "--keep", "1", str(run / "ckpt_10.pt")])


@pytest.mark.parametrize("happens", ["a run waits", "a run saves", "a run is still there"])
def test_prune_reads_back_without_the_lock(run, monkeypatch, happens):
    """Reading the newest may take minutes: a run that starts meanwhile goes ahead, and prune takes nothing from it."""
    real = ckpt.sound
    starting = CheckpointStore(run)
    monkeypatch.setattr("berth.training.checkpoint.LOCK_WAIT_SECONDS", 0.0)

    def meanwhile(path):
        found = real(path)
        starting.lock()
        if happens == "a run saves":
            starting.save({"model": {}}, step=40, phase=2, phase_step=20, samples=2560, final=False)
        if happens != "a run is still there":
            starting._lock.release()
        return found

    monkeypatch.setattr(ckpt, "sound", meanwhile)
    before = names(run)
    if happens == "a run waits":
        assert ckpt.main(["prune", "--keep", "1", str(run)]) == 0
        assert [name for name in names(run) if name.endswith(".pt")] == ["ckpt_20.pt", "ckpt_35.pt"]
        return
    why = "was changed while its newest" if happens == "a run saves" else "a run is writing to"
    with pytest.raises(CheckpointError, match=why):
        ckpt.main(["prune", "--keep", "1", str(run)])
    if happens == "a run is still there":
        assert names(run) == before
    assert (run / "ckpt_35.pt").exists() and (happens != "a run saves" or (run / "ckpt_40.pt").exists())


def test_ls_of_what_cannot_be_read(run, monkeypatch):
    (run / "manifest.json").unlink()
    real = checkpoint_file.torch.load

    def load(path, **options):
        if path.name == "ckpt_35.pt":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, **options)

    monkeypatch.setattr(checkpoint_file.torch, "load", load)
    assert {row.file: row.state for row in survey(run)}["ckpt_35.pt"] == "unreadable"


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_info_says_what_wrote_it(run, capsys, optimizer):
    more = {**payload(40, optimizer), "world_size": 4, "sharding": "zero1"}
    write(run, 40, 2, **more)
    assert ckpt.main(["info", "--json", str(run)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["file"].endswith("ckpt_40.pt") and said["identity"] == more["identity"]
    assert (said["step"], said["phase"], said["phase_step"], said["samples"], said["final"]) == (40, 2, 20, 2560, False)
    assert (said["world_size"], said["sharding"], said["rollbacks"], said["skipped"]) == (4, "zero1", None, 2)
    assert (said["model_tensors"], said["parameters"]) == (3, 207) and said["optimizer_step"] == [40]
    assert said["optimizer_tensors"] == {"lamb": 3, "adamw": 5}[optimizer] and said["scaler"] == {"scale": 1024.0, "good_steps": 3}
    assert ckpt.main(["info", str(run / "ckpt_20.pt")]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert (lines["world_size"], lines["optimizer_step"], lines["global_batch"]) == (["unknown"], ["20"], ["64"])
    assert lines["step"] == ["20"] and lines["final"] == ["True"] and lines["model_config"] == ['{"hidden_size":', "10}"]


def test_info_of_what_is_no_checkpoint(run, tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights.pt is not a berth checkpoint"):
        ckpt.main(["info", str(tmp_path / "weights.pt")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint that can be read"):
        ckpt.main(["info", str(tmp_path / "empty")])


def test_help_has_examples(capsys):
    for words in (["--help"], ["ls", "--help"], ["verify", "--help"], ["prune", "--help"], ["info", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            ckpt.main(words)
        assert "berth-ckpt " + (words[0] if len(words) > 1 else "ls") in capsys.readouterr().out.split("usage:")[1].partition("\n")[2]
