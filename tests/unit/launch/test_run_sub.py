"""slurm/run.sub under a Slurm that only writes down what it is told: exit codes, signals, requeueing, crash loops, jobs submitted by hand."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from berth.launch.clusters import Cluster, Container
from berth.launch.plan import Job, Step
from berth.launch.render import local_text, sbatch_text
from tests.support import ROOT, environment

RUN_SUB = ROOT / "slurm" / "run.sub"
HOSTILE = "two words 'and\" $HOME; ü"

# every tool is this program under its own name; what it plays stands in plays.json
FAKE = r"""
import json, os, pathlib, signal, sys, time
WATCHED = "SLURM_GPUS_PER_NODE SLURM_MEM_PER_CPU SLURM_CPU_BIND SLURM_TRES_PER_TASK SLURM_GPUS_PER_TASK".split()
here, name = pathlib.Path(__file__).resolve().parent, pathlib.Path(sys.argv[0]).name
env = {key: value for key, value in os.environ.items() if key.startswith(("BERTH_", "MASTER_")) or key in ("RANK", "NCCL_X", *WATCHED)}
with open(here / "calls.jsonl", "a") as calls:
    calls.write(json.dumps({"tool": name, "argv": sys.argv[1:], "env": env, "cwd": os.getcwd()}) + "\n")
plays = json.loads((here / "plays.json").read_text())
def next_play(of):
    counter = here / f"{of}.count"
    at = int(counter.read_text()) if counter.exists() else 0
    counter.write_text(str(at + 1))
    return plays.get(of, [])[at] if at < len(plays.get(of, [])) else {}
if name == "srun":
    play = next_play("srun")
    if "listen" in play:
        def heard(number, frame):
            with open(here / "signals", "a") as handle:
                handle.write(signal.Signals(number).name + "\n")
            if len((here / "signals").read_text().split()) >= play["listen"]:
                sys.exit(play["exit"])
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, heard)
        (here / "ready").touch()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            time.sleep(0.02)
        sys.exit(99)
    for number in play.get("checkpoints", []):
        (pathlib.Path(plays["folder"]) / f"ckpt_{number}.pt").touch()
    if "imports" in play:
        (pathlib.Path(plays["folder"]) / "image.sqsh.sha256").write_text(f"{play['imports']}  image.sqsh\n")
    if "says" in play:
        pathlib.Path(os.environ["BERTH_FAILURES"]).write_text(play["says"])
    for node in play.get("bad", []):
        (pathlib.Path(os.environ["BERTH_PREFLIGHT"]) / f"{node}.bad").write_text("why")
    if "kill" in play:
        os.kill(os.getpid(), play["kill"])
    sys.exit(play.get("exit", 0))
if name == "scontrol":
    if sys.argv[1:3] == ["show", "hostnames"]:
        print("n1\nn2")
    elif sys.argv[1:3] == ["show", "job"]:
        print(plays["job"])
    elif sys.argv[1] in ("update", "requeue", "requeuehold", "release"):
        sys.exit(next_play(sys.argv[1]).get("exit", 0))
"""


class Slurm:
    """A folder of stand-ins, and one job that is started again and again as Slurm would."""

    def __init__(self, folder):
        self.bin, self.folder = folder / "bin", folder / HOSTILE
        self.bin.mkdir()
        self.folder.mkdir()
        for name in ("srun", "scontrol", "squeue", "sbatch", "scancel", "reporter"):
            (self.bin / name).write_text(f"#!{sys.executable} -SE\n" + FAKE)
            (self.bin / name).chmod(0o755)
        self.plays = {"folder": str(self.folder), "job": "JobId=7 ExcNodeList=(null) Command=/x/run.sub WorkDir=/x"}
        self.job = Job(
            stage="phase1", name="j", cluster=Cluster("c", "c.yaml", max_restarts=5, crash_limit=3, environment={"NCCL_X": HOSTILE}),
            folder=str(self.folder), nodes=2, ranks_per_node=2, gpus_per_node=0, cpus_per_task=None, walltime_s=None,
            steps=(Step("train", ("python", "run_pretraining.py", HOSTILE), 2, 4),), mounts=(), image=None, after=None, record={"a": HOSTILE},
        )  # fmt: skip

    def with_job(self, *, steps=(), **changes):
        self.job = dataclasses.replace(self.job, cluster=dataclasses.replace(self.job.cluster, **changes))
        if steps:
            self.job = dataclasses.replace(self.job, steps=tuple(Step(name, (name,), 2, 4) for name in steps))

    def environment(self, **variables):
        clean = {key: value for key, value in environment().items() if not key.startswith(("SLURM_", "BERTH_"))}
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
        return {**clean, **slurm, "PATH": f"{self.bin}:{clean['PATH']}", **{key: str(value) for key, value in variables.items()}}

    def start(self, text, **variables):
        (self.bin / "plays.json").write_text(json.dumps(self.plays))
        for path in self.bin.glob("*.count"):
            path.unlink()
        script = self.bin / "slurm_script"
        script.write_text(text)
        return subprocess.Popen(
            ["bash", str(script)], env=self.environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
        )

    def attempt(self, restart=0, *, srun=(), signals=(), **variables):
        """Run the job once; signals are sent to the batch shell when the step has come up. Gives the exit code and stderr."""
        self.plays["srun"] = list(srun)
        running = self.start(sbatch_text(self.job, epilogue=["reporter", HOSTILE]), SLURM_RESTART_COUNT=restart, **variables)
        for at, name in enumerate(signals, 1):
            wait_for(self.bin / "ready")
            running.send_signal(getattr(signal, name))
            if at < len(signals):
                end = time.monotonic() + 10
                while time.monotonic() < end and len(self.signals()) < at:
                    time.sleep(0.02)
        _, errors = running.communicate(timeout=60)
        return running.returncode, errors

    def signals(self):
        path = self.bin / "signals"
        return path.read_text().split() if path.exists() else []

    def calls(self, tool=None):
        path = self.bin / "calls.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if tool in (None, line["tool"])]

    def requeues(self):
        return [call["argv"] for call in self.calls("scontrol") if call["argv"][0] != "show"]

    def reports(self):
        return [(call["env"]["BERTH_EXIT_CODE"], call["env"]["BERTH_OUTCOME"], call["argv"]) for call in self.calls("reporter")]

    def attempts(self):
        """The attempts file without the time at the start of each line."""
        return [line.split(" ", 1)[1] for line in (self.folder / "slurm" / "phase1-7.attempts").read_text().splitlines()]


def wait_for(path):
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not appear"
        time.sleep(0.02)


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


REQUEUED = [["requeue", "7"]]


@pytest.mark.parametrize(
    ("code", "outcome", "requeued"),
    [
        (0, "done", False), (1, "failed", False), (2, "failed", False), (75, "crashed", True), (76, "crashed", True), (127, "crashed", True), (137, "crashed", True),
        (138, "crashed", True), (140, "crashed", True), (143, "crashed", True),  # nobody told the job to stop: srun ended the ranks that were left
    ],
)  # fmt: skip
def test_exit_codes(slurm, code, outcome, requeued):
    found, errors = slurm.attempt(srun=[{"exit": code}])
    assert found == code
    assert slurm.requeues() == (REQUEUED if requeued else [])
    steps = slurm.attempts()
    assert steps[0] == "restart=0 begin newest=none nodes=n[1-2]"
    assert steps[1].startswith(f"restart=0 step=train exit={code} seconds=")
    assert steps[2:] == [f"restart=0 end outcome={outcome} exit={code} signal=none newest=none"]
    assert f"phase1 {outcome} (exit {code}), newest checkpoint: none" in errors
    ended = outcome in ("done", "failed")
    assert slurm.reports() == ([(str(code), outcome, [HOSTILE])] if ended else [])


@pytest.mark.parametrize(("state", "outcome"), [("RUNNING", "crashed"), ("COMPLETING", "terminated"), ("CANCELLED", "terminated")])
def test_ranks_that_end_before_this_shell_hears_of_it(slurm, state, outcome):
    slurm.plays["job"] = f"JobId=7 JobState={state} ExcNodeList=(null) Command=/x WorkDir=/x"
    slurm.attempt(srun=[{"exit": 143}])
    assert f"outcome={outcome}" in slurm.attempts()[-1]
    assert slurm.requeues() == (REQUEUED if outcome == "crashed" else [])


@pytest.mark.parametrize("status", [1, 143, 137])
def test_a_rank_that_said_why_is_a_failure_whatever_srun_reports(slurm, status):
    code, errors = slurm.attempt(srun=[{"exit": status, "says": "2 --seed is -1, it must not be negative\n1 another\n"}])
    assert (code, slurm.requeues()) == (2, [])
    assert "because: 2 --seed is -1, it must not be negative" in errors
    assert slurm.reports() == [("2", "failed", [HOSTILE])]


def test_a_killed_step_is_a_crash(slurm):
    assert slurm.attempt(srun=[{"kill": signal.SIGKILL}])[0] == 137
    assert slurm.requeues() == REQUEUED


@pytest.mark.parametrize("code", [1, 2, 138, 143, 137])
def test_after_a_warning_every_failure_goes_on(slurm, code):
    found, errors = slurm.attempt(srun=[{"listen": 1, "exit": code}], signals=["SIGUSR1"])
    assert (found, slurm.signals(), slurm.requeues(), slurm.reports()) == (code, ["SIGUSR1"], REQUEUED, [])
    assert slurm.attempts()[-1] == f"restart=0 end outcome=stopped exit={code} signal=USR1 newest=none"
    assert "got SIGUSR1: the step is told to save and stop" in errors


def test_a_phase_that_ends_in_spite_of_the_warning_is_done(slurm):
    assert slurm.attempt(srun=[{"listen": 1, "exit": 0}], signals=["SIGUSR1"])[0] == 0
    assert (slurm.requeues(), slurm.reports()) == ([], [("0", "done", [HOSTILE])])


@pytest.mark.parametrize("code", [138, 143, 137])
def test_termination_alone_is_forwarded_and_left_to_slurm(slurm, code):
    assert slurm.attempt(srun=[{"listen": 1, "exit": code}], signals=["SIGTERM"])[0] == code
    assert (slurm.signals(), slurm.requeues(), slurm.reports()) == (["SIGUSR1"], [], [])
    assert slurm.attempts()[-1] == f"restart=0 end outcome=terminated exit={code} signal=TERM newest=none"


@pytest.mark.parametrize("order", [("SIGUSR1", "SIGTERM"), ("SIGTERM", "SIGUSR1")])
def test_a_warning_counts_with_a_termination_before_or_after(slurm, order):
    assert slurm.attempt(srun=[{"listen": 2, "exit": 138}], signals=order)[0] == 138
    assert (slurm.signals(), slurm.requeues()) == (["SIGUSR1", "SIGUSR1"], REQUEUED)


def test_no_step_begins_after_a_warning(slurm):
    slurm.with_job(steps=["import", "train"])
    assert slurm.attempt(srun=[{"listen": 1, "exit": 0}], signals=["SIGUSR1"])[0] == 138
    assert [call["argv"][0] for call in slurm.calls("srun")] == ["--job-name=import"]
    assert slurm.requeues() == REQUEUED


def test_every_step_is_noted_and_a_failed_one_is_the_last(slurm):
    slurm.with_job(steps=["import", "preflight", "train"])
    assert slurm.attempt(srun=[{}, {"exit": 3}])[0] == 3
    notes = [line.rpartition(" seconds=")[0] for line in slurm.attempts() if " step=" in line]
    assert notes == ["restart=0 step=import exit=0", "restart=0 step=preflight exit=3"]


def test_what_a_step_is_given(slurm):
    slurm.attempt(RANK="5", WORLD_SIZE="9")
    call = slurm.calls("srun")[0]
    state = f"{slurm.folder}/slurm/phase1-7"
    assert call["argv"] == [
        "--job-name=train", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--kill-on-bad-exit=1", "--mpi=none", "--cpu-bind=none", "--label",
        f"--chdir={ROOT}", "python", "run_pretraining.py", HOSTILE,
    ]  # fmt: skip
    assert call["env"] == {
        "BERTH_NODES": "n1 n2 ", "BERTH_CONTAINER": "berth_7_0", "BERTH_RECORD": f"{state}.run.json", "BERTH_JOB": f"{state}.job.json", "BERTH_PREFLIGHT": f"{state}.preflight.0",
        "BERTH_FAILURES": f"{state}.failures.0", "BERTH_IMAGE_SHA256": "", "MASTER_ADDR": "n1", "MASTER_PORT": "20049", "NCCL_X": HOSTILE,
    }  # fmt: skip
    assert call["cwd"] == str(ROOT)
    assert json.loads((slurm.folder / "slurm" / "phase1-7.job.json").read_text()) == {"a": HOSTILE}


def test_a_restart_takes_another_port_and_appends(slurm):
    slurm.attempt(srun=[{"exit": 137}])
    slurm.attempt(1)
    assert [call["env"]["MASTER_PORT"] for call in slurm.calls("srun")] == ["20049", "20050"]
    assert [line.split()[0] for line in slurm.attempts()] == ["restart=0"] * 3 + ["restart=1"] * 3


def test_a_crash_loop_gives_up_with_a_diagnosis(slurm):
    assert [slurm.attempt(restart, srun=[{"exit": 137}])[0] for restart in (0, 1)] == [137, 137]
    assert slurm.requeues() == REQUEUED * 2 and slurm.reports() == []
    code, errors = slurm.attempt(2, srun=[{"exit": 137}])
    assert code == 137 and slurm.requeues() == REQUEUED * 2
    assert "3 attempts in a row without a new checkpoint (newest: none). What they ended with" in errors
    assert errors.count("step=train exit=137") == 3
    assert slurm.reports() == [("137", "crashed", [HOSTILE])]


def test_progress_starts_the_count_again(slurm):
    plays = [{"exit": 137}, {"exit": 137, "checkpoints": [2]}, {"exit": 137}, {"exit": 137, "checkpoints": [9, 10]}, {"exit": 137}]
    for restart, play in enumerate(plays):
        slurm.attempt(restart, srun=[play])
    assert slurm.requeues() == REQUEUED * 5
    assert [line.split()[2] for line in slurm.attempts() if " begin " in line] == [f"newest={n}" for n in ("none", "none", 2, 2, 10)]


def test_only_attempts_in_a_row_count(slurm):
    """A damaged checkpoint was taken away between two attempts: the newest is again what it was before."""
    state = slurm.folder / "slurm"
    state.mkdir()
    lines = [f"2026-01-01T00:00:00 restart={at} begin newest={newest} nodes=n1" for at, newest in enumerate(("none", "none", "2"))]
    (state / "phase1-7.attempts").write_text("\n".join(lines) + "\n")
    slurm.attempt(3, srun=[{"exit": 137}])
    assert slurm.requeues() == REQUEUED


def test_attempts_without_an_end_count_as_crashes(slurm):
    """The node with the batch shell was lost: Slurm requeued the job, and nobody could write down how it ended."""
    state = slurm.folder / "slurm"
    state.mkdir()
    lines = [f"2026-01-01T00:00:00 restart={at} begin newest=none nodes=n[1-2]" for at in range(3)]
    (state / "phase1-7.attempts").write_text("\n".join(lines[:2]) + "\n")
    assert slurm.attempt(2)[0] == 0
    (state / "phase1-7.attempts").write_text("\n".join(lines) + "\n")
    code, errors = slurm.attempt(3)
    assert code == 1 and len(slurm.calls("srun")) == 1
    assert "3 attempts in a row without a new checkpoint (newest: none)" in errors and "error: it crashed 3 times" in errors
    assert slurm.reports() == [("0", "done", [HOSTILE]), ("1", "gave_up", [HOSTILE])]
    assert slurm.attempts()[-1] == "restart=3 end outcome=gave_up exit=1"


def test_preemption_is_no_crash(slurm):
    for restart in range(4):
        slurm.attempt(restart, srun=[{"listen": 1, "exit": 143}], signals=["SIGTERM"])
        for name in ("ready", "signals"):
            (slurm.bin / name).unlink()
    code, _ = slurm.attempt(4, srun=[{"exit": 137}])
    assert code == 137 and slurm.requeues() == REQUEUED


def test_max_restarts(slurm):
    slurm.with_job(max_restarts=1)
    slurm.attempt(0, srun=[{"exit": 137, "checkpoints": [1]}])
    code, errors = slurm.attempt(1, srun=[{"exit": 137, "checkpoints": [2]}])
    assert (code, slurm.requeues()) == (137, REQUEUED)
    assert "not requeued: max_restarts is 1; submit again to go on" in errors
    code, errors = slurm.attempt(2)  # Slurm itself took the job back
    assert code == 1 and "error: requeued 2 times, max_restarts is 1" in errors and len(slurm.calls("srun")) == 2


def test_requeueing_that_fails_is_said(slurm):
    slurm.plays["requeue"] = [{"exit": 1}]
    code, errors = slurm.attempt(srun=[{"exit": 137}])
    assert code == 137 and "the job could not be requeued; submit again" in errors
    assert slurm.reports() == [("137", "crashed", [HOSTILE])]


@pytest.mark.parametrize(("before", "after"), [("(null)", "n2"), ("n8,n[10-12]", "n8,n[10-12],n2")])
def test_bad_nodes_are_left_out(slurm, before, after):
    slurm.with_job(steps=["preflight", "train"])
    slurm.plays |= {"job": f"JobId=7 JobName=x ExcNodeList={before} Command=/x WorkDir=/x", "update": [{"exit": 1}, {"exit": 0}]}
    code, errors = slurm.attempt(srun=[{"exit": 143, "bad": ["n2", "collective"]}])
    assert code == 143
    update = ["update", "JobId=7", f"ExcNodeList={after}"]
    assert slurm.requeues() == [["requeuehold", "7"], update, update, ["release", "7"]]
    assert "nodes that failed the pre-flight check are left out from now on: n2" in errors and "why" in errors
    assert slurm.reports() == []


def test_where_most_nodes_are_bad_none_is_left_out(slurm):
    slurm.with_job(steps=["preflight", "train"])
    code, errors = slurm.attempt(srun=[{"exit": 75, "bad": ["n1", "n2"]}])
    assert (code, slurm.requeues(), slurm.reports()) == (75, [], [("75", "failed", [HOSTILE])])
    assert "n1.bad" in errors and "why" in errors


def test_bad_nodes_again_and_again_end_the_job(slurm):
    """What all nodes share (a full disk) is told by the first one that looks, each time another: leaving nodes out one by one never ends."""
    slurm.with_job(steps=["preflight", "train"])
    said = [slurm.attempt(restart, srun=[{"exit": 75, "bad": ["n2"]}]) for restart in range(3)]
    assert len([call for call in slurm.requeues() if call[0] == "requeuehold"]) == 2
    assert said[2][0] == 75 and "3 attempts in a row without a new checkpoint" in said[2][1]
    assert slurm.reports() == [("75", "bad_node", [HOSTILE])]


@pytest.mark.parametrize(("stage", "requeues"), [("prepare", 4), ("phase1", 2)])
def test_a_long_preparation_outlives_many_time_limits(slurm, stage, requeues):
    """It makes no checkpoint, by which training shows that it gets on."""
    slurm.job = dataclasses.replace(slurm.job, stage=stage)
    for restart in range(4):
        slurm.attempt(restart, srun=[{"listen": 1, "exit": 138}], signals=["SIGUSR1"] if len(slurm.requeues()) == restart else [])
        for name in ("ready", "signals"):
            (slurm.bin / name).unlink(missing_ok=True)
    assert slurm.requeues() == REQUEUED * requeues


def test_srun_gets_no_option_by_accident(slurm):
    """Left from an interactive job, or the form in which this job asked; and the GPUs of whole nodes that nobody asked for."""
    left = {"SLURM_MEM_PER_CPU": "100", "SLURM_CPU_BIND": "quiet,mask_cpu:0x3", "SLURM_TRES_PER_TASK": "cpu:3", "SLURM_GPUS_PER_TASK": "1"}
    slurm.attempt(**left, SLURM_GPUS_ON_NODE=8)
    slurm.attempt(**left)
    seen = [{name: value for name, value in call["env"].items() if name.startswith("SLURM_")} for call in slurm.calls("srun")]
    assert seen == [{"SLURM_GPUS_PER_NODE": "8"}, {}]


def test_what_an_earlier_local_run_said_is_forgotten(slurm):
    """Here every run has the same number; the reason of one that failed is not the reason of the next."""
    slurm.job = dataclasses.replace(slurm.job, steps=(Step("train", ("sh", "-c", "exit 137"), 1, 1),), nodes=1)
    state = slurm.folder / "slurm"
    (state / "phase1-7.preflight.0").mkdir(parents=True)
    (state / "phase1-7.preflight.0" / "here.bad").write_text("why")
    (state / "phase1-7.failures.0").write_text("2 an old reason\n")
    running = slurm.start(local_text(slurm.job))
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 137 and "an old reason" not in errors
    assert slurm.attempts()[-1].startswith("restart=0 end outcome=crashed exit=137")


def test_a_bad_collective_blames_no_node(slurm):
    slurm.with_job(steps=["preflight", "train"])
    slurm.attempt(srun=[{"exit": 75, "bad": ["collective"]}])
    assert slurm.requeues() == REQUEUED


def test_nodes_that_cannot_be_left_out(slurm):
    slurm.with_job(steps=["preflight", "train"])
    slurm.plays |= {"update": [{"exit": 1}] * 10}
    code, errors = slurm.attempt(srun=[{"exit": 75, "bad": ["n2"]}])
    assert code == 75 and "they could not be left out" in errors
    assert [call[0] for call in slurm.requeues()] == ["requeuehold", *["update"] * 10, "release"]  # requeued it is all the same
    slurm.plays |= {"update": [], "requeuehold": [{"exit": 1}]}
    slurm.attempt(1, srun=[{"exit": 75, "bad": ["n2"]}])
    assert slurm.requeues()[-2:] == [["requeuehold", "7"], ["requeue", "7"]]


def test_another_number_of_nodes_stops_at_once(slurm):
    code, errors = slurm.attempt(SLURM_JOB_NUM_NODES=3)
    assert (code, slurm.calls("srun"), slurm.requeues()) == (2, [], [])
    assert errors.splitlines()[-1] == "error: this job was made for 2 nodes, Slurm gave 3; submit it without -N, or make it again"
    assert slurm.reports() == [("2", "gave_up", [HOSTILE])]


def test_setup_lines_come_before_the_steps(slurm):
    slurm.with_job(setup=("export RANK=8", 'export NCCL_X="$NCCL_X+"'))
    slurm.attempt()
    env = slurm.calls("srun")[0]["env"]
    assert (env["RANK"], env["NCCL_X"]) == ("8", HOSTILE + "+")


def test_the_image_digest_is_handed_on(slurm):
    image = slurm.folder / "image.sqsh"
    slurm.with_job(steps=["import", "train"], container=Container("registry#image"))
    slurm.job = dataclasses.replace(slurm.job, image=str(image))
    assert slurm.attempt(srun=[{"imports": "abc123"}])[0] == 0
    assert slurm.attempt(1)[0] == 0  # it lies there already
    assert [call["env"]["BERTH_IMAGE_SHA256"] for call in slurm.calls("srun")] == ["", "abc123", "abc123", "abc123"]


def test_containers_are_not_left_on_the_nodes(slurm):
    slurm.with_job(container=Container("registry#image"))
    slurm.job = dataclasses.replace(slurm.job, image="registry#image")
    shutil.copy(slurm.bin / "squeue", slurm.bin / "enroot")  # the host has Enroot
    slurm.attempt(srun=[{"exit": 137}])
    slurm.attempt(1)
    tidied = [call["argv"] for call in slurm.calls("srun") if "enroot" in call["argv"]]
    assert [words[-4:] for words in tidied] == [["enroot", "remove", "--force", f"pyxis_berth_7_{restart}"] for restart in (0, 1)]
    assert tidied[0][1:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]


@pytest.mark.parametrize(("code", "name", "expected"), [(0, None, "done"), (3, None, "crashed"), (138, "SIGTERM", "terminated")])
def test_on_this_machine_nothing_is_asked_of_slurm(slurm, code, name, expected):
    program = f"import os, sys, time; open({str(slurm.bin / 'ready')!r}, 'w').close()\n" + (
        "time.sleep(30)" if name else f"sys.exit({code})"
    )
    slurm.job = dataclasses.replace(slurm.job, steps=(Step("train", (sys.executable, "-c", program), 1, 1),), nodes=1)
    running = slurm.start(local_text(slurm.job), SLURM_JOB_NUM_NODES=1)
    if name:
        wait_for(slurm.bin / "ready")
        running.send_signal(getattr(signal, name))
    running.communicate(timeout=30)
    assert running.returncode == code and slurm.calls() == []
    assert slurm.attempts()[-1].startswith(f"restart=0 end outcome={expected} exit={code}")


# ------------------------------------------------------------------------------------------------------- submitted by hand


def by_hand(slurm, folder, **variables):
    """``sbatch run.sub``: Slurm runs a copy of the file, from a folder of its own."""
    (folder / HOSTILE / "records").mkdir(parents=True, exist_ok=True)
    spool = folder / "spool"
    spool.mkdir(exist_ok=True)
    given = {
        "BERTH_PYTHON": sys.executable, "SITE_PROFILE": "local", "RECIPE": "tiny", "SLURM_NTASKS_PER_NODE": "2",
        "DATA_DIR": folder / HOSTILE / "records", "RESULTS_DIR": folder / HOSTILE, "RUN_NAME": "run", "CONFIG": "tiny", **variables,
    }  # fmt: skip
    (slurm.bin / "plays.json").write_text(json.dumps(slurm.plays))
    shutil.copy(RUN_SUB, spool / "slurm_script")
    env = {key: value for key, value in slurm.environment(**given).items() if value != "unset"}
    done = subprocess.run(["bash", str(spool / "slurm_script")], env=env, capture_output=True, text=True, cwd=folder, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("place", ["project", "its slurm folder", "Command", "BERTH_ROOT", "hostile"])
def test_by_hand_the_project_is_found(slurm, tmp_path, place):
    link = tmp_path / f"p {HOSTILE}"
    link.symlink_to(ROOT)
    where = {
        "project": {"SLURM_SUBMIT_DIR": ROOT},
        "its slurm folder": {"SLURM_SUBMIT_DIR": ROOT / "slurm"},
        "hostile": {"SLURM_SUBMIT_DIR": link},
    }
    if place == "Command":
        slurm.plays["job"] = f"JobId=7 Command={link}/slurm/run.sub WorkDir=/x y"
    code, errors = by_hand(slurm, tmp_path, **({"BERTH_ROOT": link} if place == "BERTH_ROOT" else {}), **where.get(place, {}))
    assert code == 0, errors
    (call,) = slurm.calls("srun")
    assert "--ntasks=4" in call["argv"] and call["cwd"] == str(ROOT)
    words = call["argv"][call["argv"].index("run_pretraining.py") :]
    assert words[words.index("--output_dir") + 1] == str(tmp_path / HOSTILE / "run")
    assert "global batch 16" in errors


def test_the_verbatim_command(slurm, tmp_path):
    """BATCHSIZE=2048 LR=6e-3 GRADIENT_STEPS=128 PHASE=1 sbatch -N4 --ntasks-per-node=8 run.sub"""
    code, errors = by_hand(
        slurm, tmp_path, SLURM_SUBMIT_DIR=ROOT, SITE_PROFILE="bare", RECIPE="", PLATFORM="dgx1-16g", BATCHSIZE=2048, LR="6e-3",
        GRADIENT_STEPS=128, PHASE=1, SLURM_JOB_NUM_NODES=4, SLURM_NTASKS_PER_NODE=8,
    )  # fmt: skip
    assert code == 0, errors
    (call,) = slurm.calls("srun")
    words = call["argv"][call["argv"].index("run_pretraining.py") :]
    wanted = {
        "train_batch_size": "2048",
        "gradient_accumulation_steps": "128",
        "learning_rate": "0.006",
        "max_steps": "7038",
        "precision": "fp16",
    }
    assert {name: words[words.index(f"--{name}") + 1] for name in wanted} == wanted
    assert "--ntasks=32" in call["argv"] and "--nodes=4" in call["argv"] and "--resume_from_checkpoint" in words


def test_what_sbatch_reads_in_the_file():
    lines = [line.removeprefix("#SBATCH ") for line in RUN_SUB.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert lines == [
        "--job-name=bert", "--exclusive", "--mem=0", "--output=%x-%j.log", "--open-mode=append", "--requeue", "--signal=B:USR1@300",
    ]  # fmt: skip


def test_by_hand_outside_the_project(slurm, tmp_path):
    code, errors = by_hand(slurm, tmp_path, SLURM_SUBMIT_DIR=tmp_path)
    assert (code, slurm.calls("srun")) == (2, [])
    expected = f"error: the project is not where this job was submitted ({tmp_path}): submit from its folder, or export BERTH_ROOT\n"
    assert errors == expected


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"GRADIENT_STEP": "8"}, "GRADIENT_STEP is set but nothing reads it; did you mean GRADIENT_STEPS"),
        ({"BATCHSIZE": "8", "TRAIN_BATCH_SIZE": "9"}, "contradicts"),
        ({"PHASE": "3"}, "PHASE=3 must be"),
        ({"SITE_PROFILE": "no where"}, "there is no site profile"),
    ],
)
def test_by_hand_mistakes_stop_before_any_step(slurm, tmp_path, variables, said):
    code, errors = by_hand(slurm, tmp_path, SLURM_SUBMIT_DIR=ROOT, **variables)
    assert code == 2 and errors.startswith("error: ") and said in errors
    assert (slurm.calls("srun"), slurm.requeues()) == ([], [])
    assert not (tmp_path / HOSTILE / "run").exists()


def test_by_hand_without_a_python_that_has_yaml(slurm, tmp_path):
    project = tmp_path / "copy"
    (project / "slurm").mkdir(parents=True)
    (project / "run_pretraining.py").touch()
    (project / "slurm" / "run.sub").touch()
    for name in ("python3", "python"):
        (slurm.bin / name).write_text("#!/bin/sh\nexit 1\n")
        (slurm.bin / name).chmod(0o755)
    code, errors = by_hand(slurm, tmp_path, BERTH_PYTHON=slurm.bin / "none", SLURM_SUBMIT_DIR=project)
    assert code == 2 and slurm.calls("srun") == []
    assert "no Python 3.10 or newer with PyYAML on " in errors and "export BERTH_PYTHON=/path/to/python" in errors


def test_by_hand_what_an_outer_launcher_exported_is_no_plan(slurm, tmp_path):
    code, errors = by_hand(slurm, tmp_path, SLURM_SUBMIT_DIR=ROOT, BERTH_STAGE="phase2", IGNORE_VARIABLES="BERTH_STAGE")
    assert code == 0 and " berth: phase1, job 7, attempt 1," in errors


def test_shellcheck():
    done = subprocess.run([str(Path(sys.executable).with_name("shellcheck")), str(RUN_SUB)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_bash_reads_it():
    assert subprocess.run(["bash", "-n", str(RUN_SUB)], capture_output=True).stderr == b""
    assert os.access(RUN_SUB, os.R_OK)
