"""A Slurm cluster of two nodes and an MPI launcher, for every test that asks; what is not installed skips them and says so."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.localslurm import PACKAGES, PATH, LocalSlurm, clean_environment, missing_programs

MPI_PACKAGES = "openmpi-bin"


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
