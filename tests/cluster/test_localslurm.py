"""The test cluster itself: it runs jobs, stands beside others, ends with its owner and leaves nothing."""

from __future__ import annotations

import os
import platform
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.localslurm import ACCOUNTING_PACKAGES, Job, LocalSlurm, SlurmError, missing_programs

SCRIPT = Path(__file__).with_name("localslurm.py")


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name the folder, there or in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = ((path / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(folder) in words + variables:
            found.append(words)
    return found


def wait_until(condition, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_jobs_run_on_two_nodes(slurm):
    hosts = slurm.run("srun", "-N2", "-n4", "hostname").split()
    assert len(hosts) == 4
    if slurm.private:
        assert set(hosts) == {"n1", "n2"}
        addresses = slurm.run("srun", "-N1", "-n1", sys.executable, "-c", "import socket; print(socket.gethostbyname('n2'))")
        assert addresses.split() == ["127.0.10.2"]


def test_ends_of_jobs_are_known(slurm, tmp_path):
    job = slurm.run("sbatch", "--parsable", "--array=0-2", f"--output={tmp_path}/%a", "--wrap", "exit $SLURM_ARRAY_TASK_ID").strip()
    assert [(task.state, task.exit_code) for task in slurm.wait(job)] == [("COMPLETED", 0), ("FAILED", 1), ("FAILED", 2)]
    with pytest.raises(SlurmError, match="ended with"):
        slurm.run("scontrol", "show", "job", "999999")


def test_a_second_cluster_stands_beside_and_leaves_nothing(slurm, tmp_path):
    with LocalSlurm(nodes=1, cpus=4, gpus=2) as other:
        folder = other.folder
        assert other.run("srun", "--gres=gpu:2", "printenv", "CUDA_VISIBLE_DEVICES").split() == ["0,1"]
        assert other.run("sinfo", "--noheader", "--format=%D").split() == ["1"]
        assert slurm.run("sinfo", "--noheader", "--format=%D").split() == ["2"]
        other.run("sbatch", f"--output={tmp_path}/log", "--wrap", f"exec sleep 600 # {folder}")
        assert wait_until(lambda: other.run("squeue", "--noheader", "--states=RUNNING", "--format=%i").split())
    assert not folder.exists()
    assert wait_until(lambda: not processes_of(folder), 5), processes_of(folder)
    assert slurm.run("srun", "-n1", "echo", "still here").split() == ["still", "here"]


def test_a_killed_node_comes_back(slurm):
    slurm.wait_idle()
    slurm.kill_node("n1")
    slurm.start_node("n1")
    assert slurm.run("srun", "-w", "n1", "-n1", "echo", "back", timeout=100).split() == ["back"]


@pytest.mark.parametrize("options", [(), ("--accounting", "--gpus=1", "--grace=1")])
def test_everything_ends_when_the_owner_is_killed(slurm, options):
    if missing := missing_programs(accounting="--accounting" in options):
        pytest.skip(f"{', '.join(missing)} not found; install with: apt-get install {ACCOUNTING_PACKAGES}")
    with subprocess.Popen([sys.executable, str(SCRIPT), "--nodes", "1", *options], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        line = owner.stdout.readline()
        folder = Path(line.strip().split("=", 1)[1]).parent.parent
        there = folder.is_dir(), len(processes_of(folder)) >= (5 if options else 3)
        os.kill(owner.pid, signal.SIGKILL)
    assert there == (True, True), line
    try:
        assert wait_until(lambda: not processes_of(folder), 10), processes_of(folder)
    finally:
        shutil.rmtree(folder)


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(slurm, monkeypatch):
    monkeypatch.setattr(LocalSlurm, "_configuration", lambda self: "ClusterName=local\nNoSuchKey=1\n")
    broken = LocalSlurm(nodes=1)
    with pytest.raises(SlurmError, match="did not start in .*(?s:.*)NoSuchKey"):
        broken.start()
    assert not broken.folder.exists() and not broken.daemons


# --------------------------------------------------------------------------------------- accounting, GPUs, preemption, failures

SLEEP = "while :; do sleep 0.1; done"


def test_names_of_jobs_are_not_taken_for_their_state(gpu_cluster):
    name = "a JobState=FAILED Reason=None ExitCode=9:0 Restarts=9\nJobId=1 $(false)'\"; ü"
    job = gpu_cluster.submit("--job-name", name, "--output=/dev/null", "--wrap", "exit 3")
    assert gpu_cluster.wait(job) == [Job("FAILED", exit_code=3, signal=0, restarts=0)]


def test_accounting_knows_a_job_that_ended(gpu_cluster, tmp_path):
    job = gpu_cluster.submit(
        "-N2", "--gpus-per-node=8", f"--output={tmp_path}/log", "--wrap", "srun -n2 hostname; exit $CODE", variables={"CODE": "3"}
    )
    gpu_cluster.wait(job)
    rows = [
        {"JobID": job, "State": "FAILED", "ExitCode": "3:0", "NodeList": "n[1-2]"},
        {"JobID": f"{job}.batch", "State": "FAILED", "ExitCode": "3:0", "NodeList": "n1"},
        {"JobID": f"{job}.0", "State": "COMPLETED", "ExitCode": "0:0", "NodeList": "n[1-2]"},
    ]
    assert wait_until(lambda: gpu_cluster.sacct(job) == rows), gpu_cluster.sacct(job)
    assert "gres/gpu=16" in gpu_cluster.sacct(job, "AllocTRES")[0]["AllocTRES"]
    assert gpu_cluster.run("sacctmgr", "--noheader", "--parsable2", "show", "cluster", "format=cluster").split() == ["local"]


def test_gpus_are_seen(gpu_cluster):
    seen = gpu_cluster.run("srun", "-N2", "-n2", "--gpus-per-node=8", "printenv", "CUDA_VISIBLE_DEVICES").split()
    assert seen == ["0,1,2,3,4,5,6,7"] * 2
    one = gpu_cluster.run("srun", "-N1", "-n2", "--gpus-per-task=1", "printenv", "CUDA_VISIBLE_DEVICES").split()
    assert sorted(one) == ["0", "1"]
    assert "not available" in gpu_cluster.attempt("srun", "--gres=gpu:9", "true").stderr


def test_a_preempted_job_is_queued_again_and_runs_again(gpu_cluster, tmp_path):
    """Without a time of grace: with one, the controller looks only every half minute whether it is over."""
    gpu_cluster.run("scontrol", "update", "partitionname=batch", "gracetime=0")
    try:
        script = f'echo "run $SLURM_RESTART_COUNT"; [ -n "$SLURM_RESTART_COUNT" ] || {SLEEP}'
        job = gpu_cluster.submit("--exclusive", "--nodelist=n2", "--open-mode=append", f"--output={tmp_path}/log", "--wrap", script)
        gpu_cluster.wait_state(job, "RUNNING")
        high = gpu_cluster.preempt("n2", seconds=0)
        assert gpu_cluster.wait(job) == [Job("COMPLETED", 0, 0, restarts=1)]
    finally:
        gpu_cluster.run("scontrol", "update", "partitionname=batch", f"gracetime={gpu_cluster.grace_seconds}")
    assert gpu_cluster.requeues(job) == 1 and gpu_cluster.state(high) == "COMPLETED"
    log = (tmp_path / "log").read_text()
    assert "DUE TO PREEMPTION" in log and log.startswith("run \n") and log.endswith("run 1\n"), log
    runs = wait_until(lambda: [row["State"] for row in gpu_cluster.sacct(job, "JobID", "State")][::2] == ["PREEMPTED", "COMPLETED"])
    assert runs, gpu_cluster.sacct(job)


def test_a_preempted_job_is_warned_by_its_own_signal(gpu_cluster, tmp_path):
    """It may end in the time of grace, in a way of its own: then it is not queued again, but for its own asking."""
    script = f"trap 'echo warned; exit 5' USR1; {SLEEP}"
    job = gpu_cluster.submit("--exclusive", "-wn3", "--signal=B:USR1@10", f"--output={tmp_path}/log", "--wrap", script)
    gpu_cluster.wait_state(job, "RUNNING")
    high = gpu_cluster.preempt("n3", seconds=0)
    assert gpu_cluster.wait(job) == [Job("FAILED", exit_code=5, signal=0, restarts=0)]
    assert (tmp_path / "log").read_text() == "warned\n"
    gpu_cluster.wait_state(high, "COMPLETED")


def test_a_node_that_fails_ends_its_jobs_or_queues_them_again(gpu_cluster):
    script = f'[ -n "$SLURM_RESTART_COUNT" ] || {SLEEP}'
    lost = gpu_cluster.submit("-wn4", "--no-requeue", "--output=/dev/null", "--wrap", SLEEP)
    kept = gpu_cluster.submit("-wn4", "--output=/dev/null", "--wrap", script)
    for job in (lost, kept):
        gpu_cluster.wait_state(job, "RUNNING")
    gpu_cluster.node_down("n4", reason="it's a test")
    assert gpu_cluster.wait_state(lost, ["NODE_FAIL", "COMPLETED"]) == "NODE_FAIL"
    gpu_cluster.wait_state(kept, "PENDING")
    time.sleep(1)
    assert gpu_cluster.node_state("n4").rstrip("*") in ("down", "drained", "draining"), "it stays away"
    gpu_cluster.node_up("n4")
    assert gpu_cluster.wait(kept) == [Job("COMPLETED", 0, 0, restarts=1)]


def test_waiting_for_a_state_that_does_not_come_fails(gpu_cluster):
    job = gpu_cluster.submit("--output=/dev/null", "--wrap", "true")
    gpu_cluster.wait(job)
    with pytest.raises(SlurmError, match=f"job {job} is COMPLETED, not RUNNING or PENDING"):
        gpu_cluster.wait_state(job, ["RUNNING", "PENDING"], timeout=0.2)


def test_submitit_runs_a_function(gpu_cluster, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed; install with: pip install submitit")
    for name, value in gpu_cluster.environment.items():
        monkeypatch.setenv(name, value)
    executor = submitit.SlurmExecutor(folder=tmp_path)
    executor.update_parameters(partition="batch", nodes=1, ntasks_per_node=2, gpus_per_node=2, time=2)
    job = executor.submit(platform.node)
    assert len(job.results()) == 2
    if gpu_cluster.private:
        assert set(job.results()) <= {"n1", "n2", "n3", "n4"}
    failing = executor.submit(int, "x")
    assert isinstance(failing.exception(), submitit.core.utils.FailedJobError)
    cancelled = executor.submit(time.sleep, 600)
    gpu_cluster.wait_state(cancelled.job_id, "RUNNING")
    cancelled.cancel(check=False)
    assert wait_until(lambda: cancelled.watcher.get_state(cancelled.job_id, mode="force").startswith("CANCELLED"))


# --------------------------------------------------------------------------------------------------------------- containers


@pytest.fixture
def in_container(gpu_cluster, container_image):
    """srun with a container, and what it did."""

    def run(*words: object, image: object = container_image, **variables: str) -> subprocess.CompletedProcess[str]:
        return gpu_cluster.attempt("srun", f"--container-image={image}", *words, variables=variables, cwd=Path("/"))

    return run


def test_a_container_is_entered_on_two_nodes(in_container, tmp_path):
    mounted = tmp_path / "with space"
    mounted.mkdir()
    program = 'echo "$(hostname) $SLURM_PROCID $(pwd) $(grep -c berth-test /etc/os-release)" > "part.$SLURM_PROCID"; touch /scratch'
    mounts = f"--container-mounts={mounted}:/data/deep,{Path(__file__).parent}:/source:ro+rprivate,{SCRIPT}"
    done = in_container("-N2", "--ntasks-per-node=2", mounts, "--container-workdir=/data/deep", "sh", "-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    parts = [(mounted / f"part.{rank}").read_text().split() for rank in range(4)]
    one, two = parts[0][0], parts[2][0]  # any two nodes: another test's job may still be ending on one
    assert one != two and parts == [[node, str(rank), "/data/deep", "1"] for rank, node in enumerate([one, one, two, two])]
    done = in_container(mounts, "sh", "-c", f"test -f /source/minibox.c && test -f {SCRIPT} && ls /scratch || touch /source/x")
    assert done.returncode == 1 and "/scratch" in done.stderr and "Read-only file system" in done.stderr, done.stderr
    assert not Path("/scratch").exists(), "what a task writes is in its own root"


def test_the_image_wins_over_the_environment_of_the_host(in_container):
    """As in Pyxis: but for the variables of --container-env that the host has."""
    host = {"BERTH_TEST_IMAGE": "outside", "BERTH_TEST_HOST": "outside"}
    show = ("sh", "-c", "echo $BERTH_TEST_IMAGE $BERTH_TEST_HOST $SLURM_NTASKS")
    assert in_container(*show, **host).stdout == "inside outside 1\n"
    assert in_container("--container-env=X,BERTH_TEST_IMAGE", *show, **host).stdout == "outside outside 1\n"
    assert in_container("--container-env=BERTH_TEST_IMAGE,BERTH_TEST_HOST", *show, BERTH_TEST_HOST="").stdout == "inside 1\n"
    assert in_container("--container-env=BERTH_TEST", *show, **host).stdout == "inside outside 1\n"


def test_an_image_has_python_but_nothing_of_slurm(in_container):
    commands = "*map(shutil.which, ['scontrol', 'sbatch', 'srun', 'sacct'])"
    program = f"import shutil, socket, torch; print({commands}, int(torch.ones(3).sum()), socket.gethostbyname('n2'))"
    done = in_container("python", "-c", program)
    assert done.stdout == "None None None None 3 127.0.10.2\n", done.stderr
    assert in_container("scontrol", "show", "nodes").returncode == 2


@pytest.mark.parametrize("code", [0, 1, 75, 138])
def test_exit_codes_come_out_of_a_container(in_container, code):
    assert in_container("sh", "-c", f"exit {code}").returncode == code


def test_signals_reach_a_container(gpu_cluster, container_image, tmp_path):
    script = f"trap 'echo caught; exit 7' USR1; echo ready; {SLEEP}"
    step = shlex.join(["srun", f"--container-image={container_image}", "sh", "-c", script])
    job = gpu_cluster.submit("-n1", f"--output={tmp_path}/log", "--wrap", step)
    assert wait_until(lambda: (tmp_path / "log").exists() and "ready" in (tmp_path / "log").read_text())
    gpu_cluster.run("scancel", "--signal=USR1", job)
    assert gpu_cluster.wait(job) == [Job("FAILED", exit_code=7, signal=0)]


def test_a_named_container_is_known_to_the_next_step_of_the_job(gpu_cluster, container_image, in_container, tmp_path):
    steps = f"srun --container-image={container_image} --container-name=box true && srun --container-name=box grep ^ID= /etc/os-release"
    # srun may say that it waits for the step before, which has ended just now
    job = gpu_cluster.submit("-N1", "-n2", f"--output={tmp_path}/log", f"--error={tmp_path}/errors", "--wrap", steps)
    assert gpu_cluster.wait(job) == [Job("COMPLETED", 0, 0)], (tmp_path / "errors").read_text()
    assert (tmp_path / "log").read_text() == "ID=berth-test\n" * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--container-mounts=/no/where:/data"], "cannot mount /no/where: No such file or directory"),
        (["--container-mounts=/etc:/data:rx"], "--container-mounts: unknown flag: rx"),
        (["--container-mounts=/etc:data"], "--container-mounts: both paths of a mount must begin with '/': data"),
        (["--container-workdir=/no/where"], "--container-workdir=/no/where: No such file or directory"),
        (["--container-name=a/b"], "--container-name: not a name: a/b"),
    ],
)
def test_wrong_options_of_containers_are_named(in_container, options, message):
    done = in_container(*options, "true")
    assert done.returncode == 1 and f"minibox: {message}\n" in done.stderr, done.stderr


def test_more_ways_to_enter_a_container(gpu_cluster, in_container):
    refused = gpu_cluster.attempt("srun", "--container-name=unknown", "true", cwd=Path("/"))
    assert refused.returncode == 1 and "add --container-image: unknown" in refused.stderr
    assert "/no/image: No such file" in in_container("true", image="/no/image").stderr
    assert "not the path of a folder: nvcr.io#x" in in_container("true", image="nvcr.io#x").stderr
    assert "Read-only file system" in in_container("--container-readonly", "touch", "/x").stderr
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    show = ("sh", "-c", f"id -u; ls -A {home} | wc -l")
    there = len(list(home.iterdir()))
    assert in_container("--container-mount-home", "--container-remap-root", "--container-writable", *show).stdout.split() == [
        "0",
        str(there),
    ]
    assert in_container("--no-container-mount-home", "--no-container-remap-root", "id", "-u").stdout == "0\n"
