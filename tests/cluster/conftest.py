"""Slurm clusters, a container image and an MPI launcher, for every test that asks; what is not installed skips them and says so.

``slurm``: two nodes, for what only needs jobs. ``gpu_cluster``: what a site has: four nodes of 8 (pretended) GPUs, accounting, a partition
that preempts, containers. Each is started by the first test that wants it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import container
from tests.cluster.localslurm import ACCOUNTING_PACKAGES, PACKAGES, PATH, LocalSlurm, clean_environment, missing_programs

MPI_PACKAGES = "openmpi-bin"
# the second as many images do: what the host says of it does not reach the task
IMAGE_VARIABLES = {"BERTH_TEST_IMAGE": "inside", "OMP_NUM_THREADS": "1"}
GRACE_SECONDS = 15  # between the warning of a preempted job and its end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def slurm() -> Iterator[LocalSlurm]:
    """A running cluster ``n1``, ``n2`` of 8 CPUs each; started by the first test that wants it."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; install with: apt-get install {PACKAGES}")
    with LocalSlurm(nodes=2, cpus=8) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def gpu_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    """A running cluster ``n1`` to ``n4`` of 16 CPUs, 64000 MB and 8 pretended GPUs each, with sacct and the partitions batch and high.

    Where containers can be tested its srun has the options of Pyxis: see :func:`container_image`.
    """
    missing = missing_programs(accounting=True)
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; install with: apt-get install {PACKAGES} {ACCOUNTING_PACKAGES}")
    plugins = [] if container.missing() else [container.build_plugin(tmp_path_factory.mktemp("minibox"))]
    # the partitions that the sample profiles ask for
    partitions = [f"PartitionName={name} Nodes=ALL MaxTime=INFINITE State=UP" for name in ("defq", "hpc")]
    with LocalSlurm(4, 16, 64000, 8, accounting=True, grace_seconds=GRACE_SECONDS, plugstack=plugins, extra=partitions) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def container_image(gpu_cluster: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image for ``srun --container-image`` on :func:`gpu_cluster`: this Python and its packages, nothing of Slurm."""
    if reason := container.missing():
        pytest.skip(reason)
    if not gpu_cluster.private:
        pytest.skip("no right to make namespaces here (a container without SYS_ADMIN?); run the tests where unshare --mount works")
    return container.make_image(tmp_path_factory.mktemp("images") / "berth", IMAGE_VARIABLES)


@pytest.fixture(scope="session")
def mpi4py() -> None:
    """mpi4py can be loaded, with the MPI library it needs."""
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed; install with: pip install 'berth[mpi]'")
    program = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; MPI.Get_library_version()"
    probe = subprocess.run([sys.executable, "-c", program], env=clean_environment(), capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"mpi4py finds no MPI library ({probe.stderr.strip().splitlines()[-1]}); install with: apt-get install {MPI_PACKAGES}")


@pytest.fixture(scope="session")
def pmix(slurm: LocalSlurm, mpi4py: None) -> LocalSlurm:
    """The cluster, able to start MPI programs with ``srun --mpi=pmix``."""
    probe = slurm.attempt("srun", "--mpi=pmix", "-N2", "-n2", sys.executable, "-c", "from mpi4py import MPI; print(MPI.COMM_WORLD.size)")
    if "PMIx library" in probe.stderr or "Invalid MPI type" in probe.stderr:
        pytest.skip("this Slurm cannot start MPI programs through PMIx; install with: apt-get install libpmix-dev")
    assert probe.stdout.split() == ["2", "2"], probe.stderr
    return slurm


@pytest.fixture(scope="session")
def mpirun(mpi4py: None) -> list[str]:
    """``mpirun`` of Open MPI as an argv to which ``-n`` and the program are added."""
    found = shutil.which("mpirun", path=PATH)
    if found is None:
        pytest.skip(f"mpirun not found; install with: apt-get install {MPI_PACKAGES}")
    said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    if "Open MPI" not in said:
        return [found]
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    return [found, *root, "--oversubscribe", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo"]
