"""What Slurm itself would say against a job: partitions by ``sinfo``, accounts and QOS by ``sacctmgr``, everything by ``sbatch --test-only``.

In: a planned job and what a :class:`Probe` could find out (``None`` where Slurm does not answer: that is no error, a login node may hide it).
Out: errors and warnings. The parsers are pure; :class:`SlurmProbe` is the only one that runs commands.
"""

from __future__ import annotations

import dataclasses
import getpass
import os
import re
import subprocess
from collections.abc import Sequence
from typing import Protocol

from berth.errors import LaunchError
from berth.launch.clusters import walltime
from berth.launch.plan import Job
from berth.launch.yamlfile import suggestion

SINFO_FORMAT = "%P|%a|%D|%T|%l|%s|%c|%m|%G"
ASSOCIATION_FORMAT = "account,partition,qos,maxnodes,maxwall"
SECONDS = 10.0
_BROKEN_STATES = ("down", "drain", "draining", "drained", "drng", "fail", "failing", "error", "inval", "unknown")
_MEGABYTES = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


@dataclasses.dataclass(frozen=True)
class PartitionInfo:
    """Nodes of one kind and state in a partition. ``memory_mb`` and ``cpus`` (threads, as Slurm counts) are of a node.

    ``time_limit_s`` and ``max_nodes`` are ``None`` where the partition has no limit; ``available`` is ``up``, ``down``, ``drain`` or ``inact``.
    """

    name: str
    default: bool
    available: str
    nodes: int
    state: str
    time_limit_s: int | None
    max_nodes: int | None
    cpus: int
    memory_mb: int
    gpus: int

    @property
    def working(self) -> bool:
        """Whether the nodes can run jobs, now or when they are free."""
        return not self.state.endswith("*") and self.state.rstrip("*~#!%$@^-+") not in _BROKEN_STATES


@dataclasses.dataclass(frozen=True)
class Association:
    """One account the user may use; ``partition`` '' for all, ``qos`` those allowed, limits ``None`` where there are none."""

    account: str
    partition: str
    qos: tuple[str, ...]
    max_nodes: int | None
    max_wall_s: int | None


@dataclasses.dataclass(frozen=True)
class Associations:
    """All of a user. ``enforced`` is AccountingStorageEnforce: without ``associations`` Slurm takes any account."""

    user: str
    enforced: tuple[str, ...]
    entries: tuple[Association, ...]


class Probe(Protocol):
    """What validation asks of Slurm; ``None`` where it cannot be asked."""

    def sinfo(self) -> list[PartitionInfo] | None: ...
    def associations(self) -> Associations | None: ...


class NoProbe:
    """Where no Slurm is to be asked: processes on this machine, or a plan for another place."""

    def sinfo(self) -> None: ...
    def associations(self) -> None: ...


class SlurmProbe:
    """Asks the Slurm of this machine. Every command has ``seconds`` to answer."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds

    def sinfo(self) -> list[PartitionInfo] | None:
        """All partitions, hidden ones as well."""
        text = self._ask("sinfo", "--noheader", "--all", "--exact", "--format", SINFO_FORMAT)
        return None if text is None else parse_sinfo(text)

    def associations(self) -> Associations | None:
        """The accounts of the user this runs as."""
        user = getpass.getuser()
        text = self._ask("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}", f"format={ASSOCIATION_FORMAT}")
        settings = None if text is None else self._ask("scontrol", "show", "config")
        return None if text is None or settings is None else Associations(user, parse_enforced(settings), parse_associations(text))

    def _ask(self, *command: str) -> str | None:
        # SINFO_PARTITION and its like in the user's environment would narrow the answer
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SINFO_", "SACCTMGR_", "SCONTROL_"))}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=self.seconds, env=environment, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None


def test_only(text: str, options: Sequence[str] = (), seconds: float = 3 * SECONDS) -> str | None:
    """What ``sbatch --test-only`` says against a rendered job; ``None`` when it would be accepted.

    Raises :class:`LaunchError` when there is no sbatch, or it does not answer.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--test-only", *options], input=text, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except OSError as error:
        raise LaunchError(f"sbatch cannot be run ({error.strerror}); work on a login node, or use --backend local") from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"sbatch --test-only did not answer within {seconds:g} s; is the Slurm controller reachable?") from error
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return "; ".join(lines) or f"sbatch --test-only ended with exit code {done.returncode}"


test_only.__test__ = False  # type: ignore[attr-defined]  # a name that pytest would collect


def parse_sinfo(text: str) -> list[PartitionInfo]:
    """Lines of ``sinfo --format SINFO_FORMAT``. Raises :class:`LaunchError` for a line of another form."""
    found = []
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) < 9:
            raise LaunchError(f"sinfo answered {line!r}, not {SINFO_FORMAT}; report this with `sinfo --version`")
        name, available, nodes, state, limit, job_size, cpus, memory, *gres = fields
        found.append(
            PartitionInfo(
                name=name.removesuffix("*"),
                default=name.endswith("*"),
                available=available,
                nodes=_count(nodes) or 0,
                state=state.lower(),
                time_limit_s=slurm_seconds(limit),
                max_nodes=_count(job_size.rpartition("-")[2]),
                cpus=_count(cpus) or 0,
                memory_mb=_count(memory) or 0,
                gpus=gpu_count("|".join(gres)),
            )
        )
    return found


def parse_associations(text: str) -> tuple[Association, ...]:
    """Lines of ``sacctmgr --parsable2 show associations format=ASSOCIATION_FORMAT``."""
    found = []
    for line in filter(None, text.splitlines()):
        account, partition, qos, nodes, wall, *_ = (*line.split("|"), "", "", "", "")
        found.append(Association(account, partition, tuple(filter(None, qos.split(","))), _count(nodes), slurm_seconds(wall)))
    return tuple(found)


def parse_enforced(text: str) -> tuple[str, ...]:
    """``AccountingStorageEnforce`` of ``scontrol show config``; () for none."""
    match = re.search(r"^AccountingStorageEnforce\s*=\s*(\S+)", text, re.MULTILINE)
    return () if match is None or match.group(1) == "none" else tuple(match.group(1).split(","))


def slurm_seconds(text: str) -> int | None:
    """Seconds of ``[days-][hours:]minutes:seconds`` as Slurm prints it; ``None`` for ``infinite`` and anything else without a limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def gpu_count(gres: str) -> int:
    """GPUs of a node by its ``Gres``: ``gpu:8``, ``gpu:a100:8(S:0-3)``, several parted by commas; 0 for ``(null)``."""
    total = 0
    for item in re.sub(r"\([^)]*\)", "", gres).split(","):
        kind, *rest = item.strip().split(":")
        if kind == "gpu":
            total += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return total


def memory_mb(text: str) -> float:
    """Megabytes of what ``sbatch --mem`` takes: ``64000``, ``500G``."""
    unit = text[-1:].upper()
    return float(text[:-1]) * _MEGABYTES[unit] if unit in _MEGABYTES else float(text)


def _count(text: str) -> int | None:
    digits = text.strip().rstrip("+")
    return int(digits) if digits.isdigit() else None


def job_problems(job: Job, partitions: Sequence[PartitionInfo] | None, accounts: Associations | None) -> tuple[list[str], list[str]]:
    """Errors and warnings of ``job`` by all that Slurm told; ``None`` for what it did not."""
    found = [partition_problems(job, partitions)] if partitions is not None else []
    found += [account_problems(job, accounts)] if accounts is not None else []
    return [line for errors, _ in found for line in errors], [line for _, warnings in found for line in warnings]


def partition_problems(job: Job, partitions: Sequence[PartitionInfo]) -> tuple[list[str], list[str]]:
    """Errors and warnings of ``job`` against the partitions of ``sinfo``."""
    cluster, who = job.cluster, job.stage
    names = list(dict.fromkeys(info.name for info in partitions))
    wanted = cluster.partition
    mine = [info for info in partitions if (info.default if wanted is None else info.name == wanted)]
    if not mine and wanted is None:
        return [f"{who}: {cluster.file} names no partition and Slurm has no default one; set partition to one of {', '.join(names)}"], []
    if not mine:
        return [f"{who}: partition {wanted!r} of {cluster.file} is not known to Slurm{suggestion(wanted, names)}"], []
    name, errors, warnings = mine[0].name, [], []
    if mine[0].available in ("drain", "inact"):
        errors.append(f"{who}: partition {name} takes no jobs ({mine[0].available}); choose another, or ask the site")
    elif mine[0].available != "up":
        warnings.append(f"{who}: partition {name} is {mine[0].available}: the job will wait until it is up")
    limit, most = mine[0].time_limit_s, mine[0].max_nodes
    if limit is not None and job.walltime_s is not None and job.walltime_s > limit:
        errors.append(
            f"{who}: walltime {walltime(job.walltime_s)} is above the limit {walltime(limit)} of partition {name}; set walltime_limit in "
            f"{cluster.file} (a phase that needs longer requeues itself), or ask for less"
        )
    if most is not None and job.nodes > most:
        errors.append(f"{who}: {job.nodes} nodes, but partition {name} gives a job at most {most}; choose a row with fewer nodes")
    error, warning = _room(job, name, mine)
    return errors + error, warnings + warning


def _room(job: Job, name: str, mine: Sequence[PartitionInfo]) -> tuple[list[str], list[str]]:
    """Whether enough nodes of the partition are big enough, and how many of them work."""
    memory = job.cluster.memory
    needs = {
        "GPUs": (job.gpus_per_node if job.cluster.gpu_request != "none" else 0, [info.gpus for info in mine]),
        "CPUs": (job.ranks_per_node * (job.cpus_per_task or 1), [info.cpus for info in mine]),
        "MB of memory": (0 if memory is None else memory_mb(memory), [info.memory_mb for info in mine]),
    }
    total = sum(info.nodes for info in mine)
    if total < job.nodes:
        return [f"{job.stage}: {job.nodes} nodes, but partition {name} has {total}; choose a row with fewer nodes or another partition"], []
    errors = [
        f"{job.stage}: {wanted:g} {what} a node, but nodes of partition {name} have at most {max(have)} ({_enough(mine, have, wanted)} nodes "
        f"have enough, {job.nodes} are needed); change the row, or {_key(what)} in {job.cluster.file}"
        for what, (wanted, have) in needs.items()
        if _enough(mine, have, wanted) < job.nodes
    ]
    fit = [info for at, info in enumerate(mine) if all(have[at] >= wanted for wanted, have in needs.values())]
    count = sum(info.nodes for info in fit)
    if not errors and count < job.nodes:
        errors.append(f"{job.stage}: {job.nodes} nodes, but only {count} of partition {name} have GPUs, CPUs and memory enough at once")
    working = sum(info.nodes for info in fit if info.working)
    waits = not errors and working < job.nodes
    return errors, [f"{job.stage}: {job.nodes} nodes, but only {working} of partition {name} work now: it will wait"] if waits else []


def _enough(mine: Sequence[PartitionInfo], have: Sequence[int], wanted: float) -> int:
    return sum(info.nodes for info, value in zip(mine, have, strict=True) if value >= wanted)


def _key(what: str) -> str:
    return {"GPUs": "gpu_request", "CPUs": "cpus_per_task"}.get(what, "memory")


def account_problems(job: Job, found: Associations) -> tuple[list[str], list[str]]:
    """Errors and warnings of a job's account and QOS; all are warnings where Slurm does not enforce them."""
    cluster, problems = job.cluster, []
    entries = [one for one in found.entries if cluster.partition is None or one.partition in ("", cluster.partition)]
    accounts = list(dict.fromkeys(one.account for one in entries))
    if not entries:
        problems.append(f"user {found.user} has no account in Slurm's accounting; ask the site for one")
    elif cluster.account is not None and cluster.account not in accounts:
        problems.append(f"account {cluster.account!r} is none of user {found.user}{suggestion(cluster.account, accounts)}")
    mine = [one for one in entries if cluster.account in (None, one.account)]
    allowed = list(dict.fromkeys(qos for one in mine for qos in one.qos))
    if cluster.qos is not None and mine and cluster.qos not in allowed:
        problems.append(f"qos {cluster.qos!r} is not allowed to user {found.user}{suggestion(cluster.qos, allowed)}")
    if mine and all(one.max_nodes is not None and one.max_nodes < job.nodes for one in mine):
        problems.append(f"{job.nodes} nodes, but the account allows a job {max(one.max_nodes or 0 for one in mine)}; choose a smaller row")
    asked = job.walltime_s
    if mine and asked is not None and all(one.max_wall_s is not None and one.max_wall_s < asked for one in mine):
        allowed_s = max(one.max_wall_s or 0 for one in mine)
        problems.append(f"walltime {walltime(asked)}, but the account allows a job {walltime(allowed_s)}; set walltime_limit lower")
    messages = [f"{job.stage}: {problem} ({cluster.file})" for problem in problems]
    strict = any(word in ("associations", "limits", "qos", "safe") for word in found.enforced)
    return (messages, []) if strict else ([], [f"{message}; Slurm does not enforce accounts here" for message in messages])
