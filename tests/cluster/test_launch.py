"""The launcher on a real Slurm: hand-run jobs, chains in containers, preemption, time limits, crashes, dead nodes. Tiny model, CPU, gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml

from berth.files import read_json
from berth.launch import clusters, plan, render
from berth.launch.matrix import load_matrix
from berth.runlog import read_steps
from tests.cluster.localslurm import LocalSlurm
from tests.support import ROOT

PHASE1, PHASE2 = "local_2x2x2x2_fp32_tiny-p1", "local_2x2x2x2_fp32_tiny-p2"
STEPS = 500  # of the long run, which ends; an endless one is cancelled
# every attempt takes the CPU of four processes that import torch
QUICK = {"OMP_NUM_THREADS": "1"}
TINY_MODEL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "vocab_size": 1,
}  # fmt: skip


def write_text(path: Path) -> None:
    words = "the ship sails on the open sea while a captain writes letters and reads old maps by the light of one lamp".split()
    lines = [" ".join(words[(start * 7 + at * 3) % len(words)] for at in range(5 + start % 9)) + "." for start in range(400)]
    path.write_text("\n\n".join("\n".join(lines[at : at + 8]) for at in range(0, len(lines), 8)) + "\n")


def write_profile(folder: Path, data: Path, name: str = "site", **changes: object) -> Path:
    profile: dict[str, object] = {
        "title": "a test", "platform": "local", "recipe": "tiny", "exclusive": False, "warning_s": 60, "environment": QUICK,
        "python": sys.executable, "host_python": sys.executable, "bind": "none",
        "paths": {"data": str(data), "results": str(folder / "results")}, **changes,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(profile))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a model shape, and a configuration of data.prepare whose work folder is ``data``."""
    folder = tmp_path_factory.mktemp("launch")
    write_text(folder / "text.txt")
    (folder / "model.json").write_text(json.dumps(TINY_MODEL))
    (folder / "prepare.yaml").write_text(
        yaml.safe_dump(
            {
                "workdir": str(folder / "data"), "input": str(folder / "text.txt"), "seed": 1,
                "shard": {"n_training_shards": 2, "n_test_shards": 1, "fraction_test_set": 0.1},
                "vocab": {"vocab_size": 120, "bert_config": str(folder / "model.json")},
                "records": [
                    {"max_seq_length": 16, "max_predictions_per_seq": 4, "dupe_factor": 2},
                    {"max_seq_length": 32, "max_predictions_per_seq": 4, "dupe_factor": 2},
                ],
            }
        )
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def data(work: Path) -> Path:
    """The data of that configuration, made here and now."""
    command = [sys.executable, "-m", "data.prepare", "--config", str(work / "prepare.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return work / "data"


def launch(cluster: LocalSlurm, *words: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """``python -m slurm.launch`` on the cluster's login node, which is here."""
    done = cluster.attempt(sys.executable, "-m", "slurm.launch", *words, cwd=ROOT)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def submitted(said: str) -> dict[str, str]:
    """``{stage: job id}`` of what submit printed."""
    return dict(re.findall(r"^(\w+): job (\d+)$", said, re.MULTILINE))


def logs(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted((folder / "slurm").rglob("*.log")))


def wait_done(cluster: LocalSlurm, job: str, folder: Path, timeout: float = 200) -> None:
    ended = cluster.wait(job, timeout)[0]
    assert ended.state == "COMPLETED", f"{ended}\n{logs(folder)}"


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 90) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {timeout} s"
        time.sleep(0.1)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["model"]


def same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------------- by hand


def test_the_verbatim_command_of_the_readme(gpu_cluster, work, data):
    """Scaled down: two nodes of two ranks, the batch of the recipe `tiny`; from the folder of run.sub, as its users type it."""
    profile = write_profile(work, data, "by-hand")
    common = {"SITE_PROFILE": str(profile), "RUN_NAME": "by hand"}
    sbatch = ("-N2", "--ntasks-per-node=2", "run.sub")
    first = {"BATCHSIZE": "4", "LR": "2e-2", "GRADIENT_STEPS": "2", "PHASE": "1", **common}
    folder = work / "results" / "by hand"
    log = f"--output={work}/by-hand-%j.log"
    job = gpu_cluster.submit(log, *sbatch, cwd=ROOT / "slurm", variables=first)
    ended = gpu_cluster.wait(job)[0]
    assert ended.state == "COMPLETED", (work / f"by-hand-{job}.log").read_text()
    said = (work / f"by-hand-{job}.log").read_text()
    assert "world size 4 = 2 nodes x 2 ranks" in said and "MASTER_ADDR=n" in said
    manifest = read_json(folder / "manifest.json")["checkpoints"]
    assert (manifest[-1]["step"], manifest[-1]["final"]) == (12, True)
    parameters = [line for line in (folder / "dllogger.json").read_text().splitlines() if '"options"' in line]
    options = json.loads(parameters[0][5:])["data"]["options"]
    assert (options["train_batch_size"], options["gradient_accumulation_steps"], options["learning_rate"]) == (4, 2, 0.02)
    record = read_json(folder / "slurm" / f"phase1-{job}.run.json")
    assert record["row"]["global_batch"] == 16 and record["attempts"][0]["slurm"]["job_id"] == job

    second = {"PHASE": "2", **common}  # the rest from the matrix
    job = gpu_cluster.submit(log, *sbatch, cwd=ROOT / "slurm", variables=second)
    ended = gpu_cluster.wait(job)[0]
    assert ended.state == "COMPLETED", (work / f"by-hand-{job}.log").read_text()
    assert read_json(folder / "manifest.json")["checkpoints"][-1]["step"] == 18

    wrong = {"BATCH_SIZE": "4", "DASK_TASKS_PER_NODE": "8", "LR": "1", "LEARNING_RATE": "2", **common}
    job = gpu_cluster.submit(log, *sbatch, cwd=ROOT / "slurm", variables=wrong)
    ended = gpu_cluster.wait(job)[0]
    said = (work / f"by-hand-{job}.log").read_text()
    assert (ended.state, ended.exit_code) == ("FAILED", 2)
    assert all(words in said for words in ("BATCH_SIZE", "DASK_TASKS_PER_NODE", "contradicts")) and "step train" not in said
    assert gpu_cluster.requeues(job) == 0


def test_whole_nodes_bring_their_gpus(gpu_cluster, work, data, tmp_path):
    """--exclusive without a word of GPUs, from a shell inside another job: each rank sees all GPUs, and the step has the memory of the nodes."""
    show = tmp_path / "show.sh"
    show.write_text('#!/bin/sh\nscontrol show step $SLURM_JOB_ID.$SLURM_STEP_ID | grep TRES=\necho "sees $CUDA_VISIBLE_DEVICES"\n')
    show.chmod(0o755)
    profile = write_profile(tmp_path, data, python=str(show))
    common = {"SITE_PROFILE": str(profile), "RUN_NAME": "whole nodes", "BERTH_PYTHON": sys.executable}
    left = {"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_PER_TASK": "3", "SLURM_GPUS_PER_TASK": "1", "SLURM_CPU_BIND": "quiet,mask_cpu:0x3"}
    job = gpu_cluster.submit(
        f"--output={tmp_path}/log", "-N2", "--ntasks-per-node=2", "run.sub", cwd=ROOT / "slurm", variables=common | left
    )
    said = gpu_cluster.wait(job)[0].state + (tmp_path / "log").read_text()
    assert said.count("sees " + ",".join(map(str, range(gpu_cluster.gpus))) + "\n") == 4, said
    assert f"gres/gpu={2 * gpu_cluster.gpus},mem={2 * gpu_cluster.memory_mb // 1024}G" in said, said


# ---------------------------------------------------------------------------------------------------- chains in containers


@pytest.mark.parametrize("backend", ["sbatch", "submitit"])
def test_the_whole_chain_in_a_container(gpu_cluster, container_image, work, tmp_path, backend):
    """prepare -> phase 1 -> phase 2 -> export on two nodes of two ranks, each step inside the image, which has no Slurm in it."""
    data = tmp_path / "data $(x) 'q'" if backend == "sbatch" else tmp_path / "data"
    configuration = yaml.safe_load((work / "prepare.yaml").read_text())
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump({**configuration, "workdir": str(data)}))
    mounts = [f"{work}:{work}:ro"]
    profile = write_profile(
        tmp_path, data, container={"image": str(container_image)}, mounts=mounts, preflight=True, min_free_gb=0.01, max_restarts=3
    )  # fmt: skip
    request = ("--cluster", profile, "--row", PHASE1, "--row_phase2", PHASE2, "--prepare", tmp_path / "prepare.yaml", "--name", "chain")
    folder = tmp_path / "results" / "chain"
    if backend == "sbatch":
        launch(gpu_cluster, "validate", *request)
        jobs = submitted(launch(gpu_cluster, "submit", *request).stdout)
        assert list(jobs) == ["prepare", "phase1", "phase2", "export"]
        refused = launch(gpu_cluster, "submit", *request, expect=2)
        assert "still in the queue" in refused.stderr
        wait_done(gpu_cluster, jobs["export"], folder)
        said = launch(gpu_cluster, "status", folder).stdout
        assert said.count("COMPLETED") == 4 and "ckpt_18.pt" in said
        again = launch(gpu_cluster, "submit", *request).stdout
        assert "phase1: complete already" in again and "phase2: complete already" in again
        for job in reversed(submitted(again).values()):
            gpu_cluster.run("scancel", job)
    else:
        program = (
            "import sys; from berth.launch import command_line, submission\n"
            "arguments = command_line.build_parser().parse_args(sys.argv[1:])\n"
            "made, _, _ = command_line.request(arguments)\n"
            "jobs = submission.submit(made, 'submitit').jobs\n"
            "print([job.handle.result() for job in jobs][2])\n"
            "print(jobs[1].handle.state, jobs[1].handle.done(), 'ended with 0' in jobs[1].handle.stdout())\n"
        )
        done = gpu_cluster.attempt(sys.executable, "-c", program, "submit", *request, cwd=ROOT, timeout=200)
        assert done.returncode == 0, done.stderr + logs(folder)
        assert "'stage': 'phase2'" in done.stdout and "'checkpoint': 'ckpt_18.pt'" in done.stdout
        assert "COMPLETED True True" in done.stdout, done.stdout
    record = read_json(next((folder / "slurm").glob("phase2-*.run.json")))
    attempt = record["attempts"][-1]
    assert record["image"] == str(container_image) and record["recipe"]["max_steps"] == 6
    assert len(attempt["slurm"]["nodes"]) == 2 and attempt["versions"]["torch"] == torch.__version__
    assert (folder / "huggingface" / "model.safetensors").is_file()
    steps = (folder / "slurm").glob("*.attempts")
    assert sum(line.count("exit=0 seconds") for path in steps for line in path.read_text().splitlines()) >= 6  # each srun's status


# ------------------------------------------------------------------------------------------------- interruptions of every kind


@pytest.fixture(scope="module")
def long_run(work: Path, data: Path) -> Callable[..., tuple[list[object], Path]]:
    """Options of a phase-1 run of :data:`STEPS` steps called ``name``, and its folder."""
    (work / "long.yml").write_text(
        yaml.safe_dump(
            {
                "recipes": {
                    name: {
                        "based_on": "tiny", "title": "long enough to be interrupted", "source": "this test",
                        "phases": {1: {"max_steps": steps, "num_steps_per_checkpoint": 10}},
                    }
                    for name, steps in (("long", STEPS), ("endless", 100_000))
                },
                "rows": [
                    {
                        "source": "this test", "recipe": name,
                        "rows": [{"platform": "local", "nodes": 2, "phase": 1, "precision": "fp32", "micro_batch": 2, "ranks_per_node": 2}],
                    }
                    for name in ("long", "endless")
                ],
            }
        )
    )  # fmt: skip

    def make(name: str, recipe: str = "long", **profile: object) -> tuple[list[object], Path]:
        path = write_profile(work, data, f"profile {name}", **profile)
        words = [
            "--cluster",
            path,
            "--matrix",
            work / "long.yml",
            "--row",
            f"local_2x2x2x2_fp32_{recipe}-p1",
            "--phase",
            "1",
            "--name",
            name,
        ]
        return words, work / "results" / name

    return make


@pytest.fixture(scope="module")
def uninterrupted(gpu_cluster, long_run) -> dict[str, torch.Tensor]:
    """The weights at the end of the long run that nothing happened to."""
    words, folder = long_run("uninterrupted")
    job = submitted(launch(gpu_cluster, "submit", *words).stdout)["phase1"]
    wait_done(gpu_cluster, job, folder)
    assert gpu_cluster.requeues(job) == 0
    return weights(folder / f"ckpt_{STEPS}.pt")


class Victim:
    """A long run that things are done to."""

    def __init__(self, cluster: LocalSlurm, words: list[object], folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.job = submitted(launch(cluster, "submit", *words).stdout)["phase1"]

    @property
    def log(self) -> Path:
        return self.folder / "dllogger.json"

    @property
    def step(self) -> int:
        return max(read_steps(self.log), default=0) if self.log.exists() else 0

    def trains_on(self) -> None:
        """Wait until the present attempt has made some steps."""
        attempts = self.cluster.requeues(self.job) + 1
        before = self.step
        wait_for(lambda: self.cluster.requeues(self.job) + 1 == attempts and self.step >= before + 3, f"a step in attempt {attempts}")

    def is_back(self, restarts: int, timeout: float = 60) -> None:
        """Wait until the job has been queued again and runs."""
        wait_for(
            lambda: self.cluster.requeues(self.job) >= restarts and self.cluster.state(self.job) == "RUNNING",
            f"restart {restarts}",
            timeout,
        )

    def expanded(self) -> list[str]:
        listed = self.cluster.run("squeue", "--noheader", f"--jobs={self.job}", "--format=%N").strip()
        return self.cluster.run("scontrol", "show", "hostnames", listed).split()

    def ranks(self) -> list[int]:
        """Processes of the training, not of what starts it."""
        mark = f"--output_dir\0{self.folder}\0".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes()
            except OSError:
                continue
            if mark in words and b"\0run_pretraining.py\0" in words and not words.startswith(b"srun") and b"berth.launch.rank" not in words:
                found.append(int(path.parent.name))
        return sorted(found)


def test_two_preemptions_and_the_same_weights(gpu_cluster, long_run, uninterrupted):
    """A rendered job, twice preempted by a higher partition, ends with the bits of the run nothing happened to."""
    victim = Victim(gpu_cluster, *long_run("preempted"))
    for restart in (1, 2):
        victim.trains_on()
        high = gpu_cluster.preempt(*gpu_cluster.names)
        victim.is_back(restart)
        assert gpu_cluster.state(high) == "COMPLETED"
    wait_done(gpu_cluster, victim.job, victim.folder)
    assert gpu_cluster.requeues(victim.job) == 2
    assert same_bits(weights(victim.folder / f"ckpt_{STEPS}.pt"), uninterrupted)


def test_everything_else_that_can_happen_to_a_job(gpu_cluster, long_run, uninterrupted):
    """Requeue by an administrator, a killed rank, a dead node, a warning; the same job, the same bits at its end."""
    victim = Victim(gpu_cluster, *long_run("unlucky", crash_limit=10))
    cluster, job = gpu_cluster, victim.job

    victim.trains_on()
    cluster.run("scontrol", "requeue", job)
    victim.is_back(1)

    victim.trains_on()
    began = time.monotonic()
    os.kill(victim.ranks()[1], signal.SIGKILL)
    wait_for(lambda: not victim.ranks(), "the end of the other ranks", 30)
    assert time.monotonic() - began < 20  # the whole step fails fast
    victim.is_back(2)

    victim.trains_on()
    down = victim.expanded()[1]
    cluster.node_down(down)
    victim.is_back(3)
    assert down not in victim.expanded()
    cluster.node_up(down)

    victim.trains_on()
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    victim.is_back(4)

    wait_done(cluster, job, victim.folder)
    assert same_bits(weights(victim.folder / f"ckpt_{STEPS}.pt"), uninterrupted)
    attempts = (victim.folder / "slurm" / f"phase1-{job}.attempts").read_text()
    assert "outcome=crashed" in attempts and "signal=USR1" in attempts and attempts.count(" begin ") >= 5
    assert len(read_json(victim.folder / "slurm" / f"phase1-{job}.run.json")["attempts"]) >= 5
    said = logs(victim.folder)
    assert said.count("attempt 1,") == 1 and "attempt 5," in said  # one log, appended


def test_a_time_limit(gpu_cluster, long_run):
    """Slurm warns before the limit; the job saves, is queued again under its number, and goes on."""
    words, folder = long_run("limited", "endless")
    victim = Victim(gpu_cluster, words, folder)
    victim.trains_on()
    # the warning, 60 s ahead, comes with Slurm's next look at the clock
    gpu_cluster.run("scontrol", "update", f"JobId={victim.job}", "TimeLimit=1")
    wait_for(lambda: gpu_cluster.requeues(victim.job) == 1, "the warning of the time limit", 90)
    gpu_cluster.run("scontrol", "update", f"JobId={victim.job}", "TimeLimit=UNLIMITED")
    victim.is_back(1)
    victim.trains_on()
    launch(gpu_cluster, "cancel", folder)
    gpu_cluster.wait(victim.job)
    attempts = (folder / "slurm" / f"phase1-{victim.job}.attempts").read_text().splitlines()
    ended = next(line for line in attempts if " end " in line)
    assert "outcome=stopped" in ended and "signal=USR1" in ended
    assert next(line for line in attempts if "restart=1 begin" in line).split()[3] == ended.split()[-1]  # newest=... as it was left
    assert not {1} & {step for step, data in read_steps(victim.log).items() if data["attempt"] == 2}


def test_a_cancelled_job_stays_cancelled(gpu_cluster, long_run):
    words, folder = long_run("cancelled", "endless")
    victim = Victim(gpu_cluster, words, folder)
    victim.trains_on()
    assert victim.job in launch(gpu_cluster, "cancel", folder).stdout
    assert gpu_cluster.wait(victim.job)[0].state == "CANCELLED"
    time.sleep(8)  # longer than a requeued job waits
    assert gpu_cluster.state(victim.job) == "CANCELLED" and gpu_cluster.requeues(victim.job) == 0
    assert read_json(folder / "manifest.json")["checkpoints"]  # and what it had is saved


def test_a_crash_loop_ends_with_a_diagnosis(gpu_cluster, work, long_run):
    """A program that dies by a signal each time, before any checkpoint, is tried crash_limit times."""
    crash = work / "crash.sh"
    crash.write_text("#!/bin/sh\nulimit -c 0\nkill -SEGV $$\n")
    crash.chmod(0o755)
    words, folder = long_run("crashing", crash_limit=2, python=str(crash))
    job = submitted(launch(gpu_cluster, "submit", *words).stdout)["phase1"]
    ended = gpu_cluster.wait(job, 90)[0]
    assert ended.state == "FAILED" and gpu_cluster.requeues(job) == 1
    assert "2 attempts in a row without a new checkpoint" in logs(folder) and "exit=139" in logs(folder)


def test_a_bad_node_is_left_out(gpu_cluster, work, long_run):
    """The pre-flight check fails on the first node it is tried on; the job goes on without that node."""
    fake = work / "python-of-a-bad-node.sh"
    fake.write_text(
        "#!/bin/sh\n"
        f"host=$(cat {work}/bad-node 2>/dev/null) || {{ (set -C; echo $SLURMD_NODENAME >{work}/bad-node) 2>/dev/null; host=$(cat {work}/bad-node); }}\n"
        'case "$*" in *berth.launch.preflight*) if [ "$host" = "$SLURMD_NODENAME" ]; then\n'
        '  echo "GPU 3 is gone" >"$BERTH_PREFLIGHT/$SLURMD_NODENAME.bad"; exit 75; fi ;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    fake.chmod(0o755)
    words, folder = long_run("preflight", "endless", preflight=True, min_free_gb=0.01, python=str(fake))
    victim = Victim(gpu_cluster, words, folder)
    victim.is_back(1)
    bad = (work / "bad-node").read_text().strip()
    assert bad not in victim.expanded() and f"left out from now on: {bad}" in logs(folder)
    victim.trains_on()
    launch(gpu_cluster, "cancel", folder)
    gpu_cluster.wait(victim.job)


def test_a_failed_phase_takes_the_chain_with_it(gpu_cluster, work, data):
    """Phase 1 fails for good (unknown option): not requeued, and phase 2 is cancelled by Slurm, not left waiting."""
    profile = write_profile(work, data, "failing")
    request = ("--cluster", profile, "--row", PHASE1, "--row_phase2", PHASE2, "--name", "failing", "--extra=--no_such_option")
    jobs = submitted(launch(gpu_cluster, "submit", *request).stdout)
    assert gpu_cluster.wait(jobs["phase1"])[0].state == "FAILED"
    assert gpu_cluster.wait(jobs["phase2"])[0].state == "CANCELLED"
    assert gpu_cluster.requeues(jobs["phase1"]) == 0 and "no_such_option" in logs(work / "results" / "failing")


def test_a_scaling_study(gpu_cluster, work, data):
    """`matrix run`: the selected rows as a chain, without checkpoints, then the report's table."""
    profile = write_profile(work, data, "study")
    words = ("--cluster", profile, "--select", "platform=local,recipe=tiny", "--nodes", "2..3", "--steps", "5", "--name", "study")
    said = launch(gpu_cluster, "matrix", "run", *words).stdout
    jobs = re.findall(r"^local_\S+: (\d+)$", said, re.MULTILINE)
    assert len(jobs) == 2
    for job in jobs:
        assert gpu_cluster.wait(job)[0].state == "COMPLETED", logs(work / "results" / "study")
    assert not list((work / "results" / "study").rglob("ckpt_*.pt"))
    report = launch(gpu_cluster, "report", work / "results" / "study").stdout
    assert report.count("local_") == 2, report


# ------------------------------------------------------------------------------------------------ every row, every profile


def test_every_row_is_accepted_by_sbatch(gpu_cluster, tmp_path):
    """`sbatch --test-only` takes the text of every row, for every profile, whose size the cluster has."""
    matrix = load_matrix()
    rows = [row for row in matrix.rows if row.nodes <= 4 and row.ranks <= 8]
    refused, tried = [], 0
    for name in clusters.names():
        cluster = clusters.load_cluster(name)
        texts = {}
        for row in rows:
            run = plan.Run(
                name=row.name, results=str(tmp_path), inputs={row.phase: str(tmp_path)}, config_file=str(tmp_path / "model.json")
            )
            job = plan.make_plan(run, cluster, {row.phase: row}, [f"phase{row.phase}"]).jobs[0]
            head = "\n".join(
                line for line in render.sbatch_text(job).splitlines() if line.startswith("#SBATCH") and row.job_name not in line
            )
            texts.setdefault(head.replace(row.name, ""), (row, render.sbatch_text(job)))
        for row, text in texts.values():  # rows that ask Slurm for the same are asked for once
            tried += 1
            script = tmp_path / "job.sbatch"
            script.write_text(text)
            done = gpu_cluster.attempt("sbatch", "--test-only", script)
            if done.returncode:
                refused.append(f"{name}, {row.name}: {done.stderr.strip()}")
    assert not refused, "\n".join(refused)
    assert tried >= 30, tried


@pytest.mark.parametrize("name", ["a b", "quote'\"q", "dollar$HOME", "semi;colon", "percent%j", "hash#tag", "tick`id`", "star*", "ünï"])
def test_hostile_names_reach_slurm_unharmed(gpu_cluster, work, data, tmp_path, name):
    """The log that Slurm opens and the folder the job writes to are the ones asked for, letter by letter."""
    folder = tmp_path / name
    profile = write_profile(tmp_path, data, python="/bin/echo", paths={"data": str(data), "results": str(folder)})
    words = ("--cluster", profile, "--row", PHASE1, "--phase", "1", "--name", name, "--no_validate")
    job = submitted(launch(gpu_cluster, "submit", *words).stdout)["phase1"]
    assert gpu_cluster.wait(job)[0].state == "COMPLETED"
    said = (folder / name / "slurm" / f"phase1-{job}.log").read_text()
    assert f"--output_dir {folder / name} " in said
