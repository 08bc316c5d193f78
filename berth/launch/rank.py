"""The first program of every task: it finds its rank, checks the world, binds itself, and becomes the real program.

    python -m berth.launch.rank --ranks N [--bind numa] [--nic nearest] [--record run.json --job job.json] -- PROGRAM ARGS...

In go Slurm's variables (under ``srun``) or those of :mod:`berth.launch.spawn`; out come RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, NODE_RANK and OMP_NUM_THREADS in the environment of PROGRAM. A world of the wrong size stops here, in the first
second, instead of hanging or training with another batch. Standard library only: it runs in any container, once a task.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from berth.errors import ConfigError, LaunchError, run_main
from berth.launch.binding import NICS, POLICIES, Binding, bind, read_cpus
from berth.ranks import Numbers, in_slurm_step, tasks_per_node

MASTER = ("MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class Place:
    """Place of this task among all: ``rank`` of ``world_size``, ``local_rank`` of ``local_world_size`` on host number ``node_rank``."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    source: str


def discover(environment: Mapping[str, str]) -> Place:
    """Read the place of this task: Slurm's variables (in a step: SLURM_STEP_ID is a number), or RANK and its like.

    The rules are those of ``berth.ranks.discover``: two sources must agree, except that a step of one task may start a
    bigger world below itself. Without either it is a world of one. Raises :class:`LaunchError` with everything that is wrong.
    """
    slurm = _slurm_place(environment) if in_slurm_step(environment) else None
    given = _given_place(environment, slurm) if "RANK" in environment or "WORLD_SIZE" in environment else None
    if slurm is None or given is None:
        return slurm or given or Place(0, 1, 0, 1, 0, "single process")
    if slurm.world_size == 1 and given.world_size > 1:
        return given
    if (slurm.rank, slurm.world_size) != (given.rank, given.world_size):
        raise LaunchError(
            f"Slurm says rank {slurm.rank} of {slurm.world_size}, RANK and WORLD_SIZE say rank {given.rank} of {given.world_size}; "
            "unset RANK and WORLD_SIZE (they came from the shell that submitted the job, or from the container image)"
        )
    return slurm


def _place(numbers: Numbers, names: tuple[str, str, str], local_world_size: int, node_rank: int) -> Place:
    """The place made of the rank, the world and the local rank under ``names``; raises with all problems."""
    rank, world, local = (numbers.get(name) for name in names)
    numbers.within(names[0], rank, world)
    numbers.within(names[2], local, local_world_size)
    numbers.finish()
    return Place(rank, world, local, local_world_size, node_rank, numbers.source)


def _slurm_place(environment: Mapping[str, str]) -> Place:
    numbers = Numbers(environment, "Slurm")
    node = numbers.get("SLURM_NODEID", 0)
    try:
        local_world_size = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]
    except (KeyError, ValueError, IndexError):
        found = environment.get("SLURM_STEP_TASKS_PER_NODE")
        numbers.problems.append(
            f"SLURM_STEP_TASKS_PER_NODE={found!r} does not say how many tasks run on node {node}; start tasks with srun"
        )
        local_world_size = -1
    return _place(numbers, ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), local_world_size, node)


def _given_place(environment: Mapping[str, str], slurm: Place | None) -> Place:
    numbers = Numbers(environment, "the launcher")
    # Enroot's hook for PyTorch images sets the rank, the world and the local rank of a Slurm task, and not how many share the host
    local_world_size = numbers.get("LOCAL_WORLD_SIZE", None if slurm is None else slurm.local_world_size)
    node = numbers.get("GROUP_RANK", numbers.get("NODE_RANK", 0))  # torchrun's name, and everybody else's
    return _place(numbers, ("RANK", "WORLD_SIZE", "LOCAL_RANK"), local_world_size, node)


def check_world(place: Place, expected: int, environment: Mapping[str, str]) -> None:
    """Raises :class:`LaunchError` unless the world has ``expected`` ranks and the others can be found at MASTER_ADDR:MASTER_PORT."""
    host = environment.get("SLURMD_NODENAME") or socket.gethostname()
    problems = []
    if place.world_size != expected:
        hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or host
        problems.append(
            f"{place.source} started {place.world_size} rank(s) on {hosts} (seen by rank {place.rank} on {host}), but the job was planned for "
            f"{expected} (--ranks); give srun nodes x tasks per node = {expected}, or choose the row that fits this allocation"
        )
    if place.world_size > 1:
        missing = [name for name in MASTER if not environment.get(name)]
        if missing:
            problems.append(f"{' and '.join(missing)} must be exported before the launch: the first host's name and a free port there")
        port = environment.get("MASTER_PORT", "")
        if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            problems.append(f"MASTER_PORT={port!r} must be a port number, 1..65535")
    if problems:
        raise LaunchError("\n".join(problems))


def variables(place: Place, environment: Mapping[str, str], binding: Binding, unbound_cpus: int) -> dict[str, str]:
    """What PROGRAM gets on top of ``environment``: the place, and (unless set already) its threads and its NIC.

    ``unbound_cpus``: how many CPUs the ranks of this host share where ``binding`` names none.
    """
    new = {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "NODE_RANK": str(place.node_rank),
    }
    threads = len(binding.cpus) // binding.sharers if binding.cpus else unbound_cpus // place.local_world_size
    wishes = {"OMP_NUM_THREADS": str(max(1, threads))}
    if binding.nic is not None:
        # not NCCL_IB_HCA: NCCL finds the nearest card itself, and its rings break when the ranks of a host see different cards
        wishes["UCX_NET_DEVICES"] = f"{binding.nic}:1"
    return {**new, **{name: value for name, value in wishes.items() if not environment.get(name)}}


def bound_by_slurm(environment: Mapping[str, str]) -> bool:
    """Whether srun gave each task of this host CPUs of its own, of which another slice would be too thin."""
    masks = environment.get("SLURM_CPU_BIND_LIST", "").split(",")
    return environment.get("SLURM_CPU_BIND_TYPE", "").rstrip(":") in ("mask_cpu", "map_cpu") and len(set(masks)) > 1


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """``OPTIONS -- PROGRAM ARGS`` as two lists; raises :class:`ConfigError` when there is no program (unless help is asked for)."""
    at = argv.index("--") if "--" in argv else len(argv)
    own, command = list(argv[:at]), list(argv[at + 1 :])
    if not command and not {"-h", "--help"} & set(own):
        raise ConfigError("no program was given; write it behind two dashes: ... -- python run_pretraining.py --config_file ...")
    return own, command


def execute(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Become ``command``; comes back only with a :class:`LaunchError`."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], list(command), dict(environment))  # noqa: S606  argv, no shell
    except (OSError, ValueError) as error:  # ValueError: a zero byte in an argument
        why = error.strerror if isinstance(error, OSError) else error
        raise LaunchError(f"{command[0]!r} cannot be started: {why}; is it in the container, and on PATH there?") from error


def _record(path: str, job: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
    from berth.launch import provenance  # only rank 0 needs it

    try:
        provenance.record(path, job, command, environment)
    except Exception as error:
        print(f"warning: the provenance {path} was not written: {error}", file=sys.stderr)  # no reason to end a training


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m berth.launch.rank",
        usage="%(prog)s --ranks N [options] -- PROGRAM [ARGS ...]",
        description=(__doc__ or "").split("\n", 1)[0],
    )
    parser.add_argument(
        "--ranks", type=int, required=True, metavar="N", help="how many ranks the job was planned for; any other world is an error"
    )
    parser.add_argument(
        "--bind", choices=POLICIES, default="none", help="CPUs: all of the GPU's NUMA node, or an own part of them (default none)"
    )
    parser.add_argument(
        "--nic", choices=NICS, default="none", help="tell UCX the card nearest to the GPU; NCCL finds it itself (default none)"
    )
    parser.add_argument("--record", metavar="FILE", help="rank 0 adds this start to FILE (run.json)")
    parser.add_argument("--job", metavar="FILE", help="JSON: what the launcher knows of the job, for --record")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see the module."""
    own, command = split_command(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(own)
    if (options.record is None) != (options.job is None):
        parser.error("--record and --job belong together")
    place = discover(os.environ)
    check_world(place, options.ranks, os.environ)
    policy = options.bind
    if policy != "none" and bound_by_slurm(os.environ):
        print(
            f"rank {place.rank}: srun has bound its tasks, --bind {policy} is left out; srun --cpu-bind=none lets it act", file=sys.stderr
        )
        policy = "none"
    cpus = len(read_cpus())  # before binding: what the ranks of this host share
    if bound_by_slurm(os.environ):
        cpus *= place.local_world_size
    binding = bind(place.local_rank, place.local_world_size, policy, options.nic, os.environ)
    if binding.note:
        print(f"rank {place.rank}: {binding.note}", file=sys.stderr)
    environment = {**os.environ, **variables(place, os.environ, binding, cpus)}
    if options.record is not None and place.rank == 0:
        _record(options.record, options.job, command, environment)
    execute(command, environment)


if __name__ == "__main__":
    run_main(main)
