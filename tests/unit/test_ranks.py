"""A process's place from every launcher's variables, no silent world of one, and the address where the ranks meet."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from berth import ranks
from berth.errors import LaunchError
from berth.ranks import UNKNOWN, Place, discover, in_slurm_step, master_address, tasks_per_node
from tests.support import ROOT, environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_STEP_NODELIST": "dgx[03-05,7]", "SLURM_JOB_ID": "77",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3", "PMIX_NAMESPACE": "12345",
}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
CRAY = {"PMI_RANK": "3", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
SUBMITIT = {
    "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_JOB_ID": "4711",
}  # fmt: skip
AZURE = {**OPEN_MPI, "AZ_BATCH_MASTER_NODE": "10.0.0.4:6000"}
ONE_TASK = {**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
ONE_A_NODE = {**SLURM, "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "source"),
    [(TORCHRUN, "torchrun"), (SLURM, "Slurm"), (OPEN_MPI, "Open MPI"), (HYDRA, "MPICH/PMI"), (CRAY, "MPICH/PMI"), (MVAPICH, "MVAPICH"),
     (AZURE, "Open MPI")],
)  # fmt: skip
def test_each_launcher(variables, source):
    assert discover(variables) == Place(3, 8, 1, source, 2)


def test_submitits_tasks_on_one_machine_and_no_launcher():
    assert discover(SUBMITIT) == Place(1, 2, 1, "submitit", 2)
    assert discover({"PATH": "/bin"}) == Place(0, 1, 0, "single process", 1)
    assert discover({"RANK": "0", "WORLD_SIZE": "1"}) == Place(0, 1, 0, "torchrun", UNKNOWN)


def test_what_is_not_known_is_unknown():
    assert discover({"RANK": "3", "WORLD_SIZE": "8"}) == Place(3, 8, UNKNOWN, "torchrun", UNKNOWN)
    assert discover(without(SLURM, "SLURM_STEP_TASKS_PER_NODE")).local_world_size == UNKNOWN


@pytest.mark.parametrize("step", [None, "", "batch", "4294967291", "4294967290"])
def test_slurms_variables_without_srun_are_no_launch(step):
    shell = {**without(SLURM, "SLURM_STEP_ID"), **({} if step is None else {"SLURM_STEP_ID": step})}
    assert not in_slurm_step(shell) and discover(shell).world_size == 1
    assert discover({**shell, **TORCHRUN}) == Place(3, 8, 1, "torchrun", 2)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({**SLURM, **HYDRA, **TORCHRUN}, Place(3, 8, 1, "torchrun", 2)),  # all agree
        ({**ONE_TASK, **TORCHRUN}, Place(3, 8, 1, "torchrun", 2)),  # srun -n1 torchrun
        ({**ONE_A_NODE, **TORCHRUN, "GROUP_WORLD_SIZE": "4"}, Place(3, 8, 1, "torchrun", 2)),  # srun -N4 torchrun --nnodes 4
        ({**ONE_TASK, **OPEN_MPI}, Place(3, 8, 1, "Open MPI", 2)),  # mpirun in a batch script: its daemon on the second of two nodes
        ({**ONE_A_NODE, **OPEN_MPI}, Place(3, 8, 1, "Open MPI", 2)),  # its daemons on many
        ({**ONE_A_NODE, **HYDRA}, Place(3, 8, 1, "MPICH/PMI", 2)),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", **TORCHRUN},
         Place(3, 8, 1, "torchrun", 2)),
    ],
)  # fmt: skip
def test_a_launcher_below_another(variables, place):
    assert discover(variables) == place


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({**SLURM, **OPEN_MPI, "OMPI_COMM_WORLD_RANK": "4"}, r"Slurm says rank 3 of 8 \(SLURM_PROCID, SLURM_NTASKS\), Open MPI says rank 4 of 8"),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "1"}, "torchrun says rank 0 of 1 .*Slurm says rank 3 of 8.*one launcher only, or unset.*RANK and WORLD_SIZE"),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, "rank 0 of 1.*rank 3 of 8"),
        ({**HYDRA, **SUBMITIT}, "submitit says rank 1 of 2.*MPICH/PMI says rank 3 of 8"),
        ({**ONE_A_NODE, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "rank 3 of 8.*Slurm says rank 1 of 4"),  # four torchruns that know nothing of each other
        ({**ONE_A_NODE, **OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, "Slurm says rank 1 of 4.*Open MPI says rank 3 of 8"),  # four mpiruns
        ({"RANK": "1"}, "WORLD_SIZE is not set, though torchrun set others"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set.*\n.*start with it again"),
        (without(HYDRA, "PMI_SIZE"), "PMI_SIZE is not set"),
        (without(SLURM, "SLURM_PROCID"), "SLURM_PROCID is not set"),
        ({"PMIX_RANK": "2"}, "PMIX_RANK=2 .* nothing says of how many"),
        ({"RANK": "8", "WORLD_SIZE": "8"}, r"RANK=8 is outside 0\.\.7"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "one", "WORLD_SIZE": "8"}, "RANK='one' is not a whole number"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, r"LOCAL_RANK=2 is outside 0\.\.1"),
        ({**TORCHRUN, "LOCAL_RANK": ""}, "LOCAL_RANK='' is not a whole number"),
    ],
)  # fmt: skip
def test_contradictions_and_gaps_are_errors(variables, words):
    with pytest.raises(LaunchError, match=words):
        discover(variables)


def test_several_tasks_never_become_a_world_of_one():
    """Each launcher's variables with one missing: an error or the whole world, but not rank 0 of 1."""
    for variables in (TORCHRUN, SLURM, OPEN_MPI, HYDRA, CRAY, MVAPICH, SUBMITIT):
        for name in variables:
            if name != "SLURM_STEP_ID":  # without it there was no srun
                try:
                    place = discover(without(variables, name))
                except LaunchError:
                    continue
                assert place.world_size == (2 if variables is SUBMITIT else 8), (variables, name)


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_an_address_that_is_given_counts():
    given = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    for variables in (TORCHRUN, SLURM, AZURE, {}):
        assert master_address({**variables, **given}, Place(0, 2, 0, "torchrun")) == ("head", 1234)
    for wrong in ("0", "65536", "-1", "x"):
        with pytest.raises(LaunchError, match="MASTER_PORT=.* must be a port number"):
            master_address({**given, "MASTER_PORT": wrong}, Place(0, 2, 0, "torchrun"))


def test_half_an_address_is_completed():
    assert master_address({**TORCHRUN, "MASTER_ADDR": "head"}, discover(TORCHRUN)) == ("head", 29500)
    port = master_address(SLURM, discover(SLURM))[1]
    assert master_address({**SLURM, "MASTER_ADDR": "head"}, discover(SLURM)) == ("head", port)
    assert master_address({**SLURM, "MASTER_PORT": "99"}, discover(SLURM)) == ("dgx03", 99)


def test_in_a_slurm_step_it_is_the_first_host_and_a_port_of_the_steps_own():
    ports = set()
    for job, step, restart in (("77", "0", "0"), ("77", "1", "0"), ("78", "0", "0"), ("77", "0", "1")):
        seen = set()
        for rank in range(8):  # every rank finds the same
            variables = {**SLURM, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": restart, "SLURM_PROCID": str(rank)}
            seen.add(master_address(variables, discover(variables)))
        ((host, port),) = seen
        assert host == "dgx03" and 20000 <= port < 32000
        ports.add(port)
    assert len(ports) == 4


@pytest.mark.parametrize(
    ("node", "host"),
    [("10.0.0.4:6000", "10.0.0.4"), ("10.0.0.4", "10.0.0.4"), ("node-1:6000", "node-1"), ("fd00::4", "fd00::4"), ("[fd00::4]:6000", "fd00::4"),
     ("[fd00::4]", "fd00::4"), ("::1", "::1")],
)  # fmt: skip
def test_on_azure_it_is_the_master_node_but_never_the_batch_services_port(node, host):
    for name in ("AZ_BATCH_MASTER_NODE", "AZ_BATCHAI_MPI_MASTER_NODE"):
        variables = {**OPEN_MPI, name: node}
        assert master_address(variables, discover(variables)) == (host, 6105)
        assert master_address({**variables, "MASTER_PORT": "77"}, discover(variables)) == (host, 77)


def test_mpirun_over_slurm_nodes_is_one_launch_with_one_port():
    """Its ranks on its own host are in the batch script, the others in the step of its daemons; all have its number, or none counts."""
    daemons = {**ONE_A_NODE, "SLURM_PROCID": "0", "SLURM_NTASKS": "3"}
    script = without(SLURM, "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    for family, expected in ((OPEN_MPI, None), (without(OPEN_MPI, "PMIX_NAMESPACE"), 29500), (HYDRA, 29500), (MVAPICH, 29500)):
        own = {"OMPI_MCA_ess_base_jobid": "5", "PBS_JOBID": "9", "PMI_JOBID": "7"}  # what only some of the hosts have
        places = [{**script, **family, **own}, {**daemons, **family}, family]
        ports = {master_address({**variables, "MASTER_ADDR": "head"}, Place(3, 8, 1, discover(family).source, 2)) for variables in places}
        ((_, port),) = ports
        assert port == expected or (expected is None and 20000 <= port < 32000)
    other = {**OPEN_MPI, "PMIX_NAMESPACE": "9", "MASTER_ADDR": "head"}
    assert master_address(other, discover(other)) != master_address({**OPEN_MPI, "MASTER_ADDR": "head"}, discover(OPEN_MPI))


def test_two_launches_of_one_job_on_a_host_have_two_ports(monkeypatch):
    """Two mpiexec in one step or PBS job: what tells them apart is the process number of the launcher, where it has no number of its own."""
    for family in ({**HYDRA, "MPI_LOCALNRANKS": "8"}, {**MVAPICH, "MV2_COMM_WORLD_LOCAL_SIZE": "8"}):
        for job in ({**ONE_TASK}, {"PBS_JOBID": "77.server"}, {}):
            found = []
            for launcher in ("4711", "4712"):
                monkeypatch.setattr(ranks, "_launcher_above", lambda launcher=launcher: launcher)
                variables = {**job, **family}
                place = discover(variables)
                assert place.source in ranks._MPI
                found.append(master_address(variables, place))
            assert found[0] != found[1] and found[0][0] == found[1][0] == "127.0.0.1"
    monkeypatch.setattr(ranks, "_launcher_above", lambda: "")
    one_host = {**HYDRA, "MPI_LOCALNRANKS": "8"}
    steps = [{**ONE_TASK, **one_host, "SLURM_STEP_ID": step} for step in "01"]
    assert len({master_address(variables, discover(variables)) for variables in steps}) == 2
    assert ranks._job_id(one_host, discover(one_host)) == ""


def test_on_one_host_it_is_this_host():
    found = {master_address({**SUBMITIT, "SUBMITIT_LOCAL_GLOBALID": rank, "SUBMITIT_LOCAL_LOCALID": rank}, Place(int(rank), 2, int(rank), "submitit", 2)) for rank in "01"}  # fmt: skip
    ((host, port),) = found
    assert host == "127.0.0.1" and 20000 <= port < 32000
    one_host = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    host, other = master_address(one_host, discover(one_host))
    assert host == "127.0.0.1" and other != port != master_address({**one_host, "PMIX_NAMESPACE": "9"}, discover(one_host))[1]


def test_several_hosts_under_mpi_ask_mpi_or_say_what_to_do(monkeypatch):
    monkeypatch.setattr(ranks, "_ask_mpi", lambda place: ("n01", 4444))
    assert master_address(OPEN_MPI, discover(OPEN_MPI)) == ("n01", 4444)
    monkeypatch.setattr(ranks, "_ask_mpi", lambda place: None)
    with pytest.raises(LaunchError, match="Open MPI started 8 ranks.*export the first host's name and a free port.*or install mpi4py"):
        master_address(OPEN_MPI, discover(OPEN_MPI))
    with pytest.raises(LaunchError, match="torchrun started 8 ranks"):
        master_address(TORCHRUN, discover(TORCHRUN))


SHOW = (
    "import json, os, sys; from berth import ranks; p = ranks.discover(os.environ); from pathlib import Path; "
    "Path(sys.argv[1], str(p.rank)).write_text(json.dumps([p.rank, p.world_size, p.local_rank, p.local_world_size, "
    "ranks.master_address(os.environ, p), ranks._ask_mpi(p) if len(sys.argv) > 2 else None, 'torch' in sys.modules]))"
)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI (apt install openmpi-bin)")
@pytest.mark.parametrize("ask", [False, True])
def test_real_mpirun(tmp_path, ask):
    """Two ranks of Open MPI, each behind a shell, find their places and one address; with ``ask`` also through mpi4py."""
    if ask:
        pytest.importorskip("mpi4py.MPI", exc_type=ImportError)
    words = [sys.executable, "-c", SHOW, str(tmp_path), *(["ask"] if ask else [])]
    clean = without(environment(), "MASTER_ADDR", "MASTER_PORT")
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", "sh", "-c", '"$@"; exit $?', "sh", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=clean, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert [one[:4] for one in found] == [[0, 2, 0, 2], [1, 2, 1, 2]]
    assert found[0][4] == found[1][4] and found[0][4][0] == "127.0.0.1"
    assert found[0][5] == found[1][5] and (found[0][5] is not None) == ask
    assert not found[0][6]  # the standard library only
