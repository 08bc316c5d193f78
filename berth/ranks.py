"""Which rank is this process, of how many, and where do the ranks meet? From the variables that a launcher sets.

In: the environment. Out: a :class:`Place`, and the address of rank 0. Understood: torchrun and whoever sets its variables (``RANK``, ...;
Kubernetes, AzureML), a Slurm step, Open MPI, MPICH and what descends from it (Hydra, Intel MPI, Cray), MVAPICH, submitit's local executor
(on Slurm it is a Slurm step), Azure Batch. None of them is one process. Launchers that disagree are an error, never a silent world of one.
Standard library only: it runs before torch is imported, and where there is none. Rejected: asking MPI itself, which not every image has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

from berth.errors import LaunchError
from berth.launch.provenance import expand_nodes

UNKNOWN = -1
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # Slurm numbers the batch script and an interactive shell from here on; they are no launch of ranks
_AZURE_PORT, _DEFAULT_PORT = 6105, 29500
_LAUNCHERS = re.compile(r"hydra_pmi_proxy|pmi_proxy|orted|prted|prterun|orterun|mpirun|mpiexec(\.hydra)?|mpispawn")
_STEP = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
_MPI_JOBS = ("OMPI_MCA_ess_base_jobid", "PMI_JOBID", "PBS_JOBID", "LSB_JOBID")
_GENERATIONS = 12  # of ancestors looked at for the MPI daemon


@dataclasses.dataclass(frozen=True)
class Place:
    """Place of this process among all: ``rank`` in ``[0, world_size)``, ``local_rank`` of ``local_world_size`` on its host (or ``UNKNOWN``).

    ``source`` is the launcher that said so.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    source: str = "single process"
    local_world_size: int = UNKNOWN


@dataclasses.dataclass(frozen=True)
class _Family:
    name: str
    rank: str
    size: str
    local: tuple[str, ...]
    local_size: tuple[str, ...]


_FAMILIES = (
    _Family("torchrun", "RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",)),
    _Family("Slurm", "SLURM_PROCID", "SLURM_NTASKS", ("SLURM_LOCALID",), ()),
    _Family("submitit", "SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", ("SUBMITIT_LOCAL_LOCALID",), ("SUBMITIT_LOCAL_NTASKS",)),
    _Family("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",), ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    _Family("MPICH/PMI", "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")),
    _Family("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", ("MV2_COMM_WORLD_LOCAL_RANK",), ("MV2_COMM_WORLD_LOCAL_SIZE",)),
)
_BY_NAME = {family.name: family for family in _FAMILIES}
_MPI = ("Open MPI", "MPICH/PMI", "MVAPICH")


class Numbers:
    """Whole numbers from the environment; what is missing or no number is collected, for one message."""

    def __init__(self, environment: Mapping[str, str], source: str) -> None:
        self.environment, self.source = environment, source
        self.problems: list[str] = []

    def get(self, name: str, default: int | None = None) -> int:
        """The number under ``name``, or ``default`` where it is not set; -1 when it cannot be had, and a problem."""
        value = self.environment.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            self.problems.append(f"{name} is not set, though {self.source} set others of its family")
        elif not (value.isascii() and value.isdigit()):
            self.problems.append(f"{name}={value!r} is not a whole number")
        else:
            return int(value)
        return -1

    def within(self, name: str, number: int, size: int) -> None:
        """A problem unless ``number`` is below ``size``; unknown ones (-1) are passed over."""
        if number >= 0 and size >= 0 and number >= size:
            self.problems.append(f"{name}={number} is outside 0..{size - 1}, in a world of {size}")

    def finish(self, fix: str = "") -> None:
        """Raise :class:`LaunchError` with all problems, if there are any."""
        if self.problems:
            raise LaunchError("\n".join(self.problems) + fix)


def in_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process: a batch script or an interactive shell has Slurm's variables too, and is no launch."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isascii() and step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def tasks_per_node(text: str) -> list[int]:
    """Slurm's ``2(x3),1`` as ``[2, 2, 2, 1]``. Raises ``ValueError`` for anything else."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"{text!r} is not Slurm's list of tasks per node")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def discover(environment: Mapping[str, str]) -> Place:
    """The place of this process. Raises :class:`LaunchError` when a launcher's variables are incomplete or two launchers disagree.

    A launcher may start one process a host from which another starts the ranks (``srun -n1 torchrun``, ``srun -N2 torchrun --nnodes 2``,
    ``mpirun`` over its daemons in a Slurm step): then the inner one counts.
    """
    found: list[Place] = []
    for family in _FAMILIES:
        if (family.rank in environment or family.size in environment) and (family.name != "Slurm" or in_slurm_step(environment)):
            found.append(_read(family, environment))
    if not found:
        if "PMIX_RANK" in environment:
            raise LaunchError(
                f"PMIX_RANK={environment['PMIX_RANK']} says that a launcher started this process as one of several, but nothing says of how "
                "many; start it with mpirun, srun or torchrun, or export RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
            )
        return Place(local_world_size=1)
    chosen = found[0]
    for other in found[1:]:
        if (other.rank, other.world_size) == (chosen.rank, chosen.world_size) or _starts(other, chosen, environment):
            continue
        if not _starts(chosen, other, environment):
            raise LaunchError(_contradiction(chosen, other))
        chosen = other
    return chosen


def _read(family: _Family, environment: Mapping[str, str]) -> Place:
    numbers = Numbers(environment, family.name)
    rank, size = numbers.get(family.rank), numbers.get(family.size)
    local_key = next((key for key in family.local if key in environment), family.local[0])
    local = numbers.get(local_key, rank if size == 1 else UNKNOWN)
    if family.name == "Slurm":
        local_size = _slurm_local_size(environment)
    else:
        local_size = next((numbers.get(key) for key in family.local_size if key in environment), UNKNOWN)
    if size == 0:
        numbers.problems.append(f"{family.size}=0 is no world")
    numbers.within(family.rank, rank, size)
    numbers.within(local_key, local, local_size)
    numbers.finish(f"\n{family.name} sets {family.rank} and {family.size} together: start with it again, or unset its variables")
    return Place(rank, size, local, family.name, local_size)


def _slurm_local_size(environment: Mapping[str, str]) -> int:
    with contextlib.suppress(KeyError, ValueError, IndexError):
        return tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment.get("SLURM_NODEID", 0))]
    return UNKNOWN


def _starts(outer: Place, inner: Place, environment: Mapping[str, str]) -> bool:
    """Whether ``outer`` started the agents (one a host) that then started ``inner``'s ranks."""
    if outer.source == "torchrun" or inner.source == "Slurm" or (inner.source != "torchrun" and outer.source != "Slurm"):
        return False
    if outer.world_size == 1:
        return inner.world_size > 1
    if inner.source == "torchrun":
        return environment.get("GROUP_WORLD_SIZE") == str(outer.world_size)
    return outer.local_world_size == 1 and 0 < inner.local_world_size < inner.world_size  # mpirun's daemons; its world spans hosts


def _contradiction(one: Place, other: Place) -> str:
    def said(place: Place) -> str:
        family = _BY_NAME[place.source]
        return f"{place.source} says rank {place.rank} of {place.world_size} ({family.rank}, {family.size})"

    families = [_BY_NAME[place.source] for place in (one, other)]
    return (
        f"{said(one)}, {said(other)}; start the program with one launcher only, or unset the variables of the other: "
        f"{families[0].rank} and {families[0].size}, or {families[1].rank} and {families[1].size}"
    )


def master_address(environment: Mapping[str, str], place: Place) -> tuple[str, int]:
    """Host and port at which the ranks meet: MASTER_ADDR and MASTER_PORT, and what of them is not set is derived.

    From Slurm's list of the step's hosts, Azure's variables, or under MPI and submitit the fact that all ranks are on one host; the port from
    the job's number, so that two jobs on a host do not meet. Where MPI alone knows the hosts, mpi4py passes rank 0's on.
    Raises :class:`LaunchError` when there is no way to know, or MASTER_PORT is no port.
    """
    host, text = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if text and not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise LaunchError(f"MASTER_PORT={text!r} must be a port number, 1..65535")
    if host and text:
        return host, int(text)
    job = _job_id(environment, place)
    if host:
        return host, _port(job) if job else _DEFAULT_PORT
    known = _known_address(environment, place, job)
    if known is None and place.source in _MPI:
        known = _ask_mpi(place)
    if known is None:
        raise LaunchError(
            f"{place.source} started {place.world_size} ranks, but MASTER_ADDR and MASTER_PORT are not set and nothing else says where they meet; "
            "export the first host's name and a free port there before the launch" + (", or install mpi4py" if place.source in _MPI else "")
        )
    return known[0], int(text or known[1])


def _known_address(environment: Mapping[str, str], place: Place, job: str) -> tuple[str, int] | None:
    """Where the ranks meet, as the launcher's variables tell; ``None`` when they do not."""
    azure = environment.get("AZ_BATCH_MASTER_NODE") or environment.get("AZ_BATCHAI_MPI_MASTER_NODE")
    if azure:
        return _host_of(azure), _AZURE_PORT
    if place.source == "Slurm":
        hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        return (expand_nodes(hosts)[0], _port(job)) if hosts and job else None
    if place.source in (*_MPI, "submitit") and place.local_world_size == place.world_size and job:
        return "127.0.0.1", _port(job)
    return None


def _host_of(text: str) -> str:
    """The host in ``host``, ``host:port``, ``[IPv6]:port`` or a bare IPv6 address. The port is Azure Batch's own, never ours."""
    found = re.fullmatch(r"\[(.+)\](?::\d+)?|([^:]+):\d+", text)
    return (found[1] or found[2]) if found else text


def _job_id(environment: Mapping[str, str], place: Place) -> str:
    """What is the same for all ranks of this launch and differs between launches; empty when nothing is sure to be.

    A Slurm step counts only where srun started the ranks themselves: of mpirun's, those on its own host are in no step, the others in its daemons'.
    """
    srun = (environment.get("SLURM_PROCID"), environment.get("SLURM_NTASKS")) == (str(place.rank), str(place.world_size))
    if srun and place.source not in _MPI and in_slurm_step(environment) and environment.get("SLURM_JOB_ID"):
        return ".".join(environment.get(name, "0") for name in _STEP)
    if place.source == "submitit":
        return environment.get("SUBMITIT_LOCAL_JOB_ID", "")
    if place.source == "Open MPI" and environment.get("PMIX_NAMESPACE"):
        return environment["PMIX_NAMESPACE"]  # mpirun's own number, which its daemons give the ranks of all hosts
    if place.source in _MPI and place.local_world_size == place.world_size:  # one daemon, so all ranks have the same of these
        found = [*(environment.get(name, "") for name in (*_STEP, *_MPI_JOBS)), _launcher_above()]
        return ".".join(found) if any(found) else ""
    return ""


def _launcher_above() -> str:
    """Process number of the MPI daemon that started this host's ranks (Hydra tells them no job number); empty when it is not found."""
    process = "self"
    for _ in range(_GENERATIONS):
        try:
            name, _, rest = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").partition("(")[2].rpartition(")")
        except OSError:
            return ""
        parent = rest.split()[1]
        if process != "self" and _LAUNCHERS.fullmatch(name):
            return process
        process = parent
    return ""


def _port(job: str) -> int:
    """A port of the job's own, below those that systems hand out by themselves."""
    return 20000 + zlib.crc32(job.encode()) % 12000


def _ask_mpi(place: Place) -> tuple[str, int] | None:
    """Rank 0's host and a free port there, passed on by MPI itself; ``None`` without a working mpi4py. MPI is ended again at once."""
    import socket

    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # RuntimeError: no MPI library below mpi4py
        return None
    mine = not MPI.Is_initialized()
    if mine:
        MPI.Init()
    answer = None
    if place.rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            answer = (socket.gethostname(), free.getsockname()[1])
    size = MPI.COMM_WORLD.Get_size()
    if size == place.world_size:
        answer = MPI.COMM_WORLD.bcast(answer, root=0)
    if mine:
        MPI.Finalize()
    if size != place.world_size:
        raise LaunchError(
            f"{place.source}'s variables say {place.world_size} ranks, mpi4py sees {size}: it was built for another MPI than this launcher; export "
            "MASTER_ADDR and MASTER_PORT before the launch, or install an mpi4py for this MPI"
        )
    return answer
