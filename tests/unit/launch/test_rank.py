"""A rank's place, the checked world, and the program that takes over."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from berth.errors import ConfigError, LaunchError
from berth.launch.binding import Binding
from berth.launch.rank import Place, bound_by_slurm, check_world, discover, split_command, tasks_per_node, variables
from berth.training import distributed
from tests.support import ROOT

SLURM = {
    "SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "dgx[01-04]", "SLURMD_NODENAME": "dgx03",
}  # fmt: skip
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "2"}
MASTER = {"MASTER_ADDR": "dgx01", "MASTER_PORT": "29500"}


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM", "RANK", "WORLD", "LOCAL_", "MASTER", "OMP_NUM", "NODE_RANK"))
    }
    return subprocess.run(
        [sys.executable, "-m", "berth.launch.rank", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**clean, **(environment or {})},
    )


def test_places():
    assert discover(SLURM) == Place(5, 7, 1, 2, 2, "Slurm")
    assert discover(TORCHRUN) == Place(5, 7, 1, 2, 2, "the launcher")
    assert discover({**SLURM, **TORCHRUN}) == Place(5, 7, 1, 2, 2, "Slurm")
    assert discover({}) == Place(0, 1, 0, 1, 0, "single process")
    # a shell inside an allocation is no step; a step of one task may start a world below itself
    assert discover({key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}) == Place(0, 1, 0, 1, 0, "single process")
    one = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert discover({**one, **TORCHRUN}) == Place(5, 7, 1, 2, 2, "the launcher")


@pytest.mark.parametrize("environment", [SLURM, TORCHRUN, {**SLURM, **TORCHRUN}, {}, {**SLURM, "SLURM_STEP_ID": "x"}])
def test_training_finds_the_same_place_before_and_after(environment):
    place = discover(environment)
    for seen in (environment, {**environment, **variables(place, environment, Binding(), 8)}):
        found = distributed.discover_rank(seen)
        assert (found.rank, found.world_size, found.local_rank) == (place.rank, place.world_size, place.local_rank)


def test_wrong_places_name_all_that_is_wrong():
    with pytest.raises(LaunchError) as caught:
        discover({**SLURM, "SLURM_PROCID": "7", "SLURM_LOCALID": "2"})
    assert str(caught.value) == "SLURM_PROCID=7 is outside 0..6, in a world of 7\nSLURM_LOCALID=2 is outside 0..1, in a world of 2"
    with pytest.raises(LaunchError) as caught:
        discover({"RANK": "-1", "WORLD_SIZE": "two", "LOCAL_RANK": "0"})
    assert str(caught.value).splitlines() == [
        "LOCAL_WORLD_SIZE is not set, though the launcher set others of its family",
        "RANK='-1' is not a whole number",
        "WORLD_SIZE='two' is not a whole number",
    ]
    with pytest.raises(LaunchError, match="SLURM_STEP_TASKS_PER_NODE=None does not say how many tasks run on node 2"):
        discover({key: value for key, value in SLURM.items() if key != "SLURM_STEP_TASKS_PER_NODE"})
    with pytest.raises(LaunchError, match="Slurm says rank 5 of 7, RANK and WORLD_SIZE say rank 4 of 7; unset RANK and WORLD_SIZE"):
        discover({**SLURM, **TORCHRUN, "RANK": "4"})
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with pytest.raises(LaunchError, match="Slurm says rank 5 of 7, RANK and WORLD_SIZE say rank 0 of 1"):
        discover({**SLURM, **alone})


def test_what_enroots_hook_for_pytorch_images_sets():
    """RANK, WORLD_SIZE and LOCAL_RANK from Slurm's variables; no LOCAL_WORLD_SIZE."""
    hook = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1"}
    assert discover({**SLURM, **hook}) == discover(SLURM)
    with pytest.raises(LaunchError, match="LOCAL_RANK=2 is outside 0..1"):
        discover({**SLURM, **hook, "LOCAL_RANK": "2"})
    with pytest.raises(LaunchError, match="LOCAL_WORLD_SIZE is not set"):
        discover(hook)


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]
    for wrong in ("", "8(x", "a", "2(x3", "8;", "2,"):
        with pytest.raises(ValueError):
            tasks_per_node(wrong)


def test_a_world_of_another_size():
    place = discover(SLURM)
    check_world(place, 7, {**SLURM, **MASTER})
    with pytest.raises(LaunchError) as caught:
        check_world(place, 8, {**SLURM, **MASTER})
    assert str(caught.value) == (
        "Slurm started 7 rank(s) on dgx[01-04] (seen by rank 5 on dgx03), but the job was planned for 8 (--ranks); "
        "give srun nodes x tasks per node = 8, or choose the row that fits this allocation"
    )
    with pytest.raises(LaunchError, match="planned for 8.*\nMASTER_PORT='99999' must be a port"):
        check_world(place, 8, {**SLURM, "MASTER_ADDR": "dgx01", "MASTER_PORT": "99999"})
    with pytest.raises(LaunchError, match="MASTER_ADDR and MASTER_PORT must be exported before the launch"):
        check_world(place, 7, SLURM)
    check_world(Place(0, 1, 0, 1, 0, "single process"), 1, {})


def test_variables():
    place = discover(SLURM)
    ranks = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "2"}
    assert variables(place, {}, Binding(), 9) == {**ranks, "OMP_NUM_THREADS": "4"}
    assert variables(place, {}, Binding(), 1) == {**ranks, "OMP_NUM_THREADS": "1"}
    bound = variables(place, {}, Binding(tuple(range(12)), 0, "mlx5_1", 4), 99)
    assert bound == {**ranks, "OMP_NUM_THREADS": "3", "UCX_NET_DEVICES": "mlx5_1:1"}  # NCCL_IB_HCA must be the same for all ranks of a host
    own = {"OMP_NUM_THREADS": "7", "UCX_NET_DEVICES": "eth0"}
    assert variables(place, own, Binding((0,), 0, "mlx5_1"), 9) == ranks


def test_bound_by_slurm():
    assert bound_by_slurm({"SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_CPU_BIND_LIST": "0x1,0x2"})
    assert not bound_by_slurm({"SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_CPU_BIND_LIST": "0x3,0x3"})
    assert not bound_by_slurm({"SLURM_CPU_BIND_TYPE": "none", "SLURM_CPU_BIND_LIST": ""})
    assert not bound_by_slurm({})


def test_the_program_behind_two_dashes():
    assert split_command(["--ranks", "2", "--", "a", "--", "b"]) == (["--ranks", "2"], ["a", "--", "b"])
    assert split_command(["--help"]) == (["--help"], [])
    for argv in ([], ["--ranks", "2"], ["--ranks", "2", "--"]):
        with pytest.raises(ConfigError, match="no program was given"):
            split_command(argv)


SHOW = "import json, os, sys; names = sys.argv[1].split(); print(json.dumps([{n: os.environ.get(n) for n in names}, sys.argv[2:], sorted(os.sched_getaffinity(0))]))"


def test_the_program_gets_its_arguments_and_variables(tmp_path):
    hostile = ["two words", "$HOME", "a;b", "'\"", "new\nline", "ő", ""]
    done = run(
        "--ranks",
        "7",
        "--",
        sys.executable,
        "-c",
        SHOW,
        "RANK NODE_RANK MASTER_ADDR SLURM_PROCID",
        *hostile,
        environment={**SLURM, **MASTER},
    )
    assert done.stderr == "" and done.returncode == 0
    assert json.loads(done.stdout)[:2] == [{"RANK": "5", "NODE_RANK": "2", "MASTER_ADDR": "dgx01", "SLURM_PROCID": "5"}, hostile]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs this process may use")
def test_the_program_is_bound(tmp_path):
    cpus = sorted(os.sched_getaffinity(0))
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **MASTER}
    found = []
    for rank in "01":
        done = run("--ranks", "2", "--bind", "exclusive", "--", sys.executable, "-c", SHOW, "OMP_NUM_THREADS",
                   environment={**place, "RANK": rank, "LOCAL_RANK": rank})  # fmt: skip
        assert done.returncode == 0, done.stderr
        if done.stderr:
            pytest.skip(f"one physical core: {done.stderr}")
        found.append(json.loads(done.stdout)[2])
    assert found[0] and found[1] and not set(found[0]) & set(found[1]) and set(found[0] + found[1]) <= set(cpus)
    bound = {**place, "RANK": "0", "LOCAL_RANK": "0", "SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_CPU_BIND_LIST": "0x1,0x2"}
    done = run("--ranks", "2", "--bind", "exclusive", "--", sys.executable, "-c", SHOW, "RANK", environment=bound)
    assert "srun has bound its tasks, --bind exclusive is left out" in done.stderr and json.loads(done.stdout)[2] == cpus


def test_mistakes_end_with_one_line_and_their_code():
    wrong_world = run("--ranks", "8", "--", "true", environment={**SLURM, **MASTER})
    assert wrong_world.returncode == 1 and wrong_world.stderr.startswith("error: Slurm started 7 rank(s) on dgx[01-04]")
    missing = run("--ranks", "1", "--", "no such program")
    assert missing.returncode == 1
    assert (
        missing.stderr
        == "error: 'no such program' cannot be started: No such file or directory; is it in the container, and on PATH there?\n"
    )
    assert run("--ranks", "1").returncode == 2
    assert run("--ranks", "1", "--record", "x", "--", "true").returncode == 2
    assert run("--ranks", "1", "--bind", "all", "--", "true").returncode == 2


def test_rank_0_records_and_a_failure_to_record_is_a_warning(tmp_path):
    (tmp_path / "job.json").write_text('{"row": "a row"}')
    record = ["--record", str(tmp_path / "run.json"), "--job", str(tmp_path / "job.json")]
    others = {**SLURM, **MASTER}
    assert run("--ranks", "7", *record, "--", "true", environment=others).returncode == 0
    assert not (tmp_path / "run.json").exists()
    first = {**others, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    for _ in range(2):
        assert run("--ranks", "7", *record, "--", "true", "an argument", environment=first).returncode == 0
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["row"] == "a row" and [attempt["argv"] for attempt in written["attempts"]] == [["true", "an argument"]] * 2
    (tmp_path / "job.json").write_text("[]")
    done = run("--ranks", "7", *record, "--", "echo", "trained", environment=first)
    assert (done.returncode, done.stdout) == (0, "trained\n")
    assert done.stderr.startswith(f"warning: the provenance {tmp_path / 'run.json'} was not written: ")


def test_nothing_heavy_is_imported():
    code = "import sys, berth.launch.rank, berth.launch.spawn, berth.launch.preflight, berth.launch.provenance; print([m for m in ('torch', 'numpy', 'h5py', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr
