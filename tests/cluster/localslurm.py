"""A private Slurm cluster on this machine, for tests: one controller, several nodes, nothing outside one temporary folder.

In: how many nodes, CPUs and pretended GPUs. Out: :class:`LocalSlurm`, whose :attr:`environment` makes srun, sbatch and squeue talk
to it. The daemons run in the foreground as children of this process: they end when it ends, however it ends. Where the kernel
allows it every node has namespaces of its own: host name ``n1``, ``n2``, ..., processes (ending the node ends its jobs), and a
``/etc/hosts`` that knows all nodes. Without that right (some containers) nodes are plain processes that share the host name.
Ports are taken from the free ones, so clusters run side by side. Works for root and for ordinary users.

Slurm 22.05 and later. Settings whose reason is not plain are explained in :meth:`LocalSlurm._configuration`. No accounting: what
became of a job is asked of the controller, which remembers it for ten minutes. A daemon more (slurmdbd) is one more call of
:meth:`LocalSlurm._spawn` before the controller.

    python tests/cluster/localslurm.py --nodes 4        a cluster to try things by hand, until Ctrl-C
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "unshare", "setpriv")
PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libpmi2-0 libpmi0 libpmix-dev"
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
START_SECONDS = 60.0
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")
_PRIVATE = "unshare --mount --uts --pid --fork --kill-child --mount-proc --propagation private"
# the shell stays as process 1 of the node and reaps what slurmd's children leave
_NODE = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && { "$@"; exit $?; }'


def missing_programs() -> list[str]:
    """Which of the needed programs are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def clean_environment() -> dict[str, str]:
    """The environment without what an outer job or launcher left in it."""
    foreign = ("SLURM", "SBATCH", "SRUN", "PMI", "OMPI", "MPI_")
    return {**{name: value for name, value in os.environ.items() if not name.startswith(foreign)}, "PATH": PATH}


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@dataclasses.dataclass(frozen=True)
class Job:
    """What the controller says of a job (of an array: one of its tasks)."""

    state: str
    exit_code: int
    signal: int


class SlurmError(RuntimeError):
    """The cluster did not start, or a command to it failed."""


class LocalSlurm:
    """A cluster; ``with LocalSlurm(nodes=2) as slurm`` starts and stops it."""

    def __init__(self, nodes: int = 2, cpus: int = 8, memory_mb: int = 16000, gpus: int = 0) -> None:
        """``cpus``, ``memory_mb`` and ``gpus`` of every node may be more than there are (GPUs are only counted, not there)."""
        self.nodes, self.cpus, self.memory_mb, self.gpus = nodes, cpus, memory_mb, gpus
        self.folder = Path()
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.private: list[str] = []
        self.ports: dict[str, int] = {}

    # ------------------------------------------------------------------------------------------------ start and stop

    def __enter__(self) -> LocalSlurm:
        self.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until every node is idle. Raises :class:`SlurmError` with the ends of the logs."""
        for last in (False, True):  # somebody may take a port between choosing and using it
            try:
                self._start()
                return
            except BaseException as error:
                self.stop()
                if last or not isinstance(error, SlurmError):
                    raise

    def _start(self) -> None:
        # a short path: munge's socket must fit into 107 bytes
        self.folder = Path(tempfile.mkdtemp(prefix="berth-slurm-"))
        self.folder.chmod(0o755)
        for name in ("etc", "log", "run", "state"):
            (self.folder / name).mkdir()
        self.private = self._namespaces()
        self.ports = dict(zip(["slurmctld", *self.names], free_ports(1 + self.nodes), strict=True))
        self._write_configuration()
        key = self.folder / "run" / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        self._spawn("munged", self._munged(key))
        self._wait("munged", self._socket.exists)
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", str(self._slurm_conf)])
        for name in self.names:
            self.start_node(name)
        self.wait_idle()

    def wait_idle(self) -> None:
        """Wait until no node has a job, not even one that is being cleaned up."""
        self._wait("nodes", self._all_idle)

    def start_node(self, name: str) -> None:
        """Start (again) the daemon of one node; returns when it listens: a job sent before would make it a dead node for a minute."""
        (self.folder / "nodes" / name / "tmp").mkdir(parents=True, exist_ok=True)
        command = ["slurmd", "-D", "-f", str(self._slurm_conf), "-N", name]
        if self.private:
            if os.getuid():  # only mounting needs the capabilities of the user namespace
                command = ["setpriv", "--inh-caps=-all", "--ambient-caps=-all", *command]
            command = [*self.private, "sh", "-c", _NODE, "node", name, str(self.folder / "etc" / "hosts"), *command]
        self._spawn(name, command)
        self._wait(name, lambda: self._listens(self.ports[name]))

    @staticmethod
    def _listens(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def kill_node(self, name: str) -> None:
        """End a node and, with namespaces, everything on it, at once.

        A job that was being cleaned up there keeps the node busy for a minute after it is back: :meth:`wait_idle` before.
        """
        self.daemons[name].kill()
        self.daemons.pop(name).wait()
        self._wait(name, lambda: not self._listens(self.ports[name]))

    def stop(self) -> None:
        """End every daemon and job, and remove the folder. Safe to call at any time, more than once."""
        if self.daemons and not self.private:  # jobs are not children of their node
            with contextlib.suppress(SlurmError, subprocess.TimeoutExpired):
                for state in ("PENDING", "RUNNING"):
                    self.run("scancel", "--quiet", f"--state={state}", timeout=10)
        for name in reversed(list(self.daemons)):
            self.daemons[name].kill()
            self.daemons.pop(name).wait()
        if self.folder != Path():
            for process in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _processes(self) -> Iterator[int]:
        """Processes of this cluster that are left: their environment names its configuration."""
        mark = f"SLURM_CONF={self._slurm_conf}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if int(path.parent.name) != os.getpid() and mark in path.read_bytes().split(b"\0"):
                    yield int(path.parent.name)

    def _namespaces(self) -> list[str]:
        """The command that gives a node namespaces of its own; [] where that is not allowed."""
        (self.folder / "etc" / "hosts").write_text(
            f"127.0.0.1 localhost {self._host}\n" + "".join(f"{self._address(name)} {name}\n" for name in self.names)
        )
        command = _PRIVATE.split()
        if os.getuid():
            command[1:1] = ["--map-current-user", "--keep-caps"]
        probe = [*command, "sh", "-c", _NODE, "node", "probe", str(self.folder / "etc" / "hosts"), "true"]
        done = subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True)
        return command if done.returncode == 0 else []

    def _munged(self, key: Path) -> list[str]:
        run = self.folder / "run"
        return [
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self._socket}", f"--pid-file={run / 'munged.pid'}",
            f"--seed-file={run / 'munge.seed'}", f"--log-file={self.folder / 'log' / 'munge.log'}",
        ]  # fmt: skip

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        """Start a daemon that ends when this process ends."""
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment,
                start_new_session=True,
            )  # fmt: skip

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + START_SECONDS
        while not ready():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                raise SlurmError(f"{', '.join(dead) or what} did not start in {self.folder}\n{self.logs()}")
            time.sleep(0.05)

    def _all_idle(self) -> bool:
        # "idle*": known from before, has not answered yet
        done = self.attempt("sinfo", "--noheader", "--Node", "--format=%T")
        return done.returncode == 0 and done.stdout.split() == ["idle"] * self.nodes

    def logs(self, lines: int = 15) -> str:
        """The last lines of every log."""
        parts = []
        for path in sorted((self.folder / "log").glob("*")):
            parts += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(parts)

    # ------------------------------------------------------------------------------------------------- configuration

    @property
    def names(self) -> list[str]:
        """The names of the nodes."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    @property
    def _slurm_conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    @property
    def _socket(self) -> Path:
        return self.folder / "run" / "munge.socket"

    @property
    def _host(self) -> str:
        return socket.gethostname().split(".")[0]

    @staticmethod
    def _address(name: str) -> str:
        """A loopback address for each node that has namespaces."""
        return f"127.0.10.{name[1:]}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which Slurm's commands use this cluster."""
        # sm and vader take tasks of one host name for neighbours in memory, which nodes without namespaces are not
        openmpi = {"OMPI_MCA_btl": "tcp,self", "OMPI_MCA_btl_tcp_if_include": "lo"}
        return {**clean_environment(), **openmpi, "SLURM_CONF": str(self._slurm_conf)}

    def _write_configuration(self) -> None:
        etc = self.folder / "etc"
        (etc / "slurm.conf").write_text(self._configuration())
        (etc / "cgroup.conf").write_text("CgroupPlugin=disabled\n" if self._newer else "CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
        if self.gpus:
            # slurmd wants a character device for each, but only looks at its type: links to /dev/null will do
            (self.folder / "gpus").mkdir()
            for number in range(self.gpus):
                (self.folder / "gpus" / f"gpu{number}").symlink_to("/dev/null")
            (etc / "gres.conf").write_text("".join(f"Name=gpu File={self.folder}/gpus/gpu{number}\n" for number in range(self.gpus)))

    @property
    def _newer(self) -> bool:
        """Whether this Slurm is 23.11 or later, which can do without cgroups by name."""
        words = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, env=clean_environment()).stdout.split()
        return tuple(int(part) for part in words[-1].split(".")[:2] if part.isdigit()) >= (23, 11) if words else False

    def _configuration(self) -> str:
        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            raise SlurmError(f"user id {os.getuid()} has no name in /etc/passwd, which Slurm needs") from None
        settings = {
            "ClusterName": "local",
            "SlurmctldHost": f"{self._host}(127.0.0.1)",
            "SlurmctldPort": self.ports["slurmctld"],
            # a job that is queued again waits for as long as credentials live: 120 s by default, 5 is the least that is taken
            "AuthInfo": f"socket={self._socket},cred_expire=5",
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            "SlurmUser": user,
            "SlurmdUser": user,
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "nodes" / "%n" / "spool",
            "SlurmctldPidFile": self.folder / "run" / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "run" / "slurmd.%n.pid",
            "SlurmctldLogFile": self.folder / "log" / "slurmctld.log",
            "SlurmdLogFile": self.folder / "log" / "slurmd.%n.log",
            # one for each node: two nodes of a PMIx step would both make the same spmix_appdir folder
            "TmpFS": self.folder / "nodes" / "%n" / "tmp",
            "ProctrackType": "proctrack/linuxproc",  # no cgroups
            "TaskPlugin": "task/none",  # no pinning to cores that are not there
            "JobAcctGatherType": "jobacct_gather/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "DefMemPerCPU": 100,
            "SlurmdParameters": "config_overrides",  # believe the number of CPUs below
            "MpiDefault": "none",
            "PropagateResourceLimits": "NONE",
            "ReturnToService": 2,
            "KillWait": 3,
            "MinJobAge": 600,
            # not shorter: a busy machine of two cores would be taken for a dead one
            "SlurmdTimeout": 60,
            "UnkillableStepTimeout": 60,
            "SchedulerParameters": "batch_sched_delay=0",  # default: batch jobs wait up to 3 s
            **({"GresTypes": "gpu"} if self.gpus else {}),
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        for name in self.names:
            where = (
                f"NodeHostname={name} NodeAddr={self._address(name)}" if self.private else f"NodeHostname={self._host} NodeAddr=127.0.0.1"
            )
            gpus = f" Gres=gpu:{self.gpus}" if self.gpus else ""
            lines.append(
                f"NodeName={name} {where} Port={self.ports[name]} CPUs={self.cpus} RealMemory={self.memory_mb}{gpus} State=UNKNOWN"
            )
        lines.append("PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        return "\n".join(lines) + "\n"

    # ------------------------------------------------------------------------------------------------------ commands

    def attempt(self, *command: object, timeout: float = 60, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm to its end, whatever that is."""
        words = [str(word) for word in command]
        return subprocess.run(
            words, capture_output=True, text=True, timeout=timeout, env=self.environment, stdin=subprocess.DEVNULL, cwd=cwd
        )

    def run(self, *command: object, timeout: float = 60) -> str:
        """What a command of Slurm prints. Raises :class:`SlurmError` when it fails."""
        done = self.attempt(*command, timeout=timeout)
        if done.returncode:
            raise SlurmError(f"{command} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def jobs(self, job: str) -> list[Job]:
        """A job, or all tasks of an array, now; in the order of the tasks."""
        found: dict[int, Job] = {}
        for line in self.run("scontrol", "--oneliner", "show", "job", job).splitlines():
            fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
            code, number = fields["ExitCode"].split(":")
            # tasks of an array that wait together are one line with a range of numbers
            task = fields.get("ArrayTaskId", "0")
            found[int(task) if task.isdigit() else -1] = Job(fields["JobState"], int(code), int(number))
        return [found[task] for task in sorted(found)]

    def wait(self, job: str, timeout: float = 120) -> list[Job]:
        """Wait for the end of a job and of every task of an array. Raises :class:`SlurmError` when it takes too long."""
        end = time.monotonic() + timeout
        while True:
            now = self.jobs(job)
            if not any(each.state in UNFINISHED for each in now):
                return now
            if time.monotonic() > end:
                raise SlurmError(f"job {job} did not end within {timeout} s: {now}\n{self.logs()}")
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, default, text in (("nodes", 2, "nodes"), ("cpus", 8, "CPUs of each node"), ("gpus", 0, "pretended GPUs of each node")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    arguments = parser.parse_args()
    if missing_programs():
        parser.exit(1, f"not installed: {', '.join(missing_programs())}; apt-get install {PACKAGES}\n")
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with LocalSlurm(arguments.nodes, arguments.cpus, gpus=arguments.gpus) as slurm:
        print(f"export SLURM_CONF={slurm.environment['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
