"""run.json: what is known of a run, one entry a start, complete or absent."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys

import pytest

from berth.files import sha256_json
from berth.launch import provenance
from berth.launch.provenance import collect, expand_nodes, git_state, record, write

ENVIRONMENT = {
    "SLURM_JOB_ID": "42", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "1", "SLURM_CLUSTER_NAME": "pod",
    "SLURM_JOB_PARTITION": "batch", "SLURM_JOB_NODELIST": "dgx[01-02,7]", "SLURMD_NODENAME": "dgx01", "NCCL_VERSION": "2.27.3",
    "CUDA_VERSION": "13.0", "NCCL_IB_HCA": "=mlx5_1", "WORLD_SIZE": "8", "BERTH_IMAGE_SHA256": "5eed", "NVIDIA_API_KEY": "secret", "HF_TOKEN": "secret", "HOME": "/home/a",
}  # fmt: skip


def test_facts_of_a_start(tmp_path, monkeypatch):
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "records.json").write_text('{"options": {"vocab_sha256": "abc"}}')
    monkeypatch.setattr(provenance, "_version", {"torch": "2.13.0+cu130", "berth": "0.3"}.get)
    monkeypatch.setattr(provenance, "_driver", lambda path: "580.65.06")
    static = {"input_dir": str(tmp_path / "data"), "vocab_file": str(tmp_path / "vocab.txt"), "row": "r"}
    facts = collect(static, ENVIRONMENT, ["python", "a b"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", facts.pop("start_utc"))
    assert facts == {
        "hostname": "dgx01",
        "argv": ["python", "a b"],
        "slurm": {
            "job_id": "42", "array_job_id": "40", "array_task_id": "2", "restart_count": "1", "cluster": "pod", "partition": "batch",
            "node_list": "dgx[01-02,7]", "nodes": ["dgx01", "dgx02", "dgx7"],
        },
        "versions": {"python": sys.version.split()[0], "berth": "0.3", "torch": "2.13.0+cu130", "nccl": "2.27.3", "cuda": "13.0", "driver": "580.65.06"},
        "environment": {"NCCL_IB_HCA": "=mlx5_1", "NCCL_VERSION": "2.27.3", "WORLD_SIZE": "8"},
        "inputs": {
            "records": {str(tmp_path / "data" / "records.json"): {
                "sha256": hashlib.sha256(b'{"options": {"vocab_sha256": "abc"}}').hexdigest(), "vocab_sha256": "abc",
            }},
            "vocab_sha256": hashlib.sha256(b"[PAD]\n").hexdigest(),
        },
        "image_sha256": "5eed",
        "job_sha256": sha256_json(static),
    }  # fmt: skip


def test_inputs_named_by_the_command(tmp_path):
    (tmp_path / "work dir" / "records" / "phase1").mkdir(parents=True)
    manifest = tmp_path / "work dir" / "records" / "phase1" / "records.json"
    manifest.write_text("{}")
    (tmp_path / "v=1").write_text("x")
    command = ["python", "run_pretraining.py", "--input_dir", str(tmp_path / "work dir"), f"--vocab_file={tmp_path / 'v=1'}", "--input_dir"]
    assert collect({}, {}, command)["inputs"] == {
        "records": {str(manifest): {"sha256": hashlib.sha256(b"{}").hexdigest()}},
        "vocab_sha256": hashlib.sha256(b"x").hexdigest(),
    }


def test_what_is_unknown_is_left_out(tmp_path):
    facts = collect({"input_dir": str(tmp_path / "none"), "vocab_file": str(tmp_path / "no")}, {})
    assert facts["slurm"] == facts["environment"] == {} and facts["inputs"] == {"records": {}}
    assert facts["versions"]["torch"].startswith("2.") and "cuda" not in facts["versions"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("dgx[01-03,7],login", ["dgx01", "dgx02", "dgx03", "dgx7", "login"]),
        ("n[098-101]-ib", ["n098-ib", "n099-ib", "n100-ib", "n101-ib"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("a[1,x]", ["a[1,x]"]),
        ("a[1", ["a[1"]),
        ("", [""]),
    ],
)
def test_node_lists(text, names):
    assert expand_nodes(text) == names


def test_the_driver_version(tmp_path):
    file = tmp_path / "version"
    for line, version in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 11.4.0", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("nothing", None),
    ):
        file.write_text(line)
        assert provenance._driver(file) == version
    assert provenance._driver(tmp_path / "none") is None


def test_every_start_is_appended(tmp_path):
    file = tmp_path / "out dir" / "run.json"
    write(file, {"row": "ő", "seeds": [1]}, {"argv": ["a"]})
    write(file, {"row": "ő", "seeds": [1]}, {"argv": ["b"]})
    assert json.loads(file.read_text()) == {"row": "ő", "seeds": [1], "attempts": [{"argv": ["a"]}, {"argv": ["b"]}]}
    write(file, {"row": "other"}, {"argv": ["c"]})
    write(file, {"row": "other"}, {"argv": ["d"]})
    first = {"row": "ő", "seeds": [1]}
    attempts = [{"argv": [letter]} for letter in "abcd"]
    assert json.loads(file.read_text()) == {"row": "other", "earlier": {sha256_json(first): first}, "attempts": attempts}
    assert [path.name for path in file.parent.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"attempts": 3}', '"text"'])
def test_a_damaged_file_is_kept_aside(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    write(tmp_path / "run.json", {"row": "r"}, {"argv": []})
    assert json.loads((tmp_path / "run.json").read_text()) == {"row": "r", "attempts": [{"argv": []}]}
    assert (tmp_path / "run.json.damaged").read_text() == content


def test_record_reads_the_job(tmp_path):
    (tmp_path / "job.json").write_text('{"row": "r"}')
    record(tmp_path / "run.json", tmp_path / "job.json", ["python"], ENVIRONMENT)
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["row"] == "r" and written["attempts"][0]["slurm"]["job_id"] == "42"
    assert "secret" not in (tmp_path / "run.json").read_text()
    (tmp_path / "job.json").write_text("[]")
    with pytest.raises(ValueError, match=r"job\.json must hold a JSON object, not list"):
        record(tmp_path / "run.json", tmp_path / "job.json", [], {})


def git(folder, *arguments):
    own = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *own, *arguments], check=True, capture_output=True).stdout


def test_git_state(tmp_path, monkeypatch):
    folder = tmp_path / "a repo"
    folder.mkdir()
    assert git_state(folder) is None
    git(folder, "init", "-q")
    assert git_state(folder) is None  # no commit yet
    (folder / "file").write_text("one\n")
    git(folder, "add", "file")
    git(folder, "commit", "-q", "-m", "first")
    revision = git(folder, "rev-parse", "HEAD").decode().strip()
    assert git_state(folder) == {"revision": revision, "dirty": False, "diff_sha256": None}
    (folder / "new").write_text("")
    assert git_state(folder) == {"revision": revision, "dirty": True, "diff_sha256": None}
    (folder / "file").write_text("two\n")
    diff = git(folder, "diff", "--no-ext-diff", "--no-textconv", "--binary", "HEAD")
    assert b"+two" in diff
    assert git_state(folder) == {"revision": revision, "dirty": True, "diff_sha256": hashlib.sha256(diff).hexdigest()}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(folder) is None
