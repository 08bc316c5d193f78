"""A private Slurm cluster on this machine, for tests: one controller, several nodes, nothing outside one temporary folder.

In: how many nodes, CPUs and pretended GPUs; whether jobs are accounted for and preempted. Out: :class:`LocalSlurm`, whose
:attr:`environment` makes srun, sbatch and squeue talk to it. The daemons run in the foreground as children of this process: they end
when it ends, however it ends. Where the kernel allows it every node has namespaces of its own: host name ``n1``, ``n2``, ...,
processes (ending the node ends its jobs), and a ``/etc/hosts`` that knows all nodes. Without that right (some containers) nodes are
plain processes that share the host name. Ports are taken from the free ones, so clusters run side by side. Works for root and for
ordinary users.

Slurm 22.05 and later. Settings whose reason is not plain are explained in :meth:`LocalSlurm._configuration`. What became of a job is
asked of the controller, which remembers it for ten minutes. ``accounting`` adds slurmdbd and a database of its own (MariaDB, 120 MB
and a second more to start), so that sacct and sacctmgr work: submitit needs sacct to notice a cancelled job. Memory is not enforced.

    python tests/cluster/localslurm.py --nodes 4 --gpus 8 --accounting        a cluster to try things by hand, until Ctrl-C
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "unshare", "setpriv")
PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libpmi2-0 libpmi0 libpmix-dev"
ACCOUNTING_PROGRAMS = ("slurmdbd", "sacct", "sacctmgr", "mariadbd", "mariadb-install-db")
ACCOUNTING_PLUGIN = "accounting_storage_mysql.so"
ACCOUNTING_PACKAGES = "slurmdbd slurm-wlm-mysql-plugin mariadb-server"
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
START_SECONDS = 60.0
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "SIGNALING", "STOPPED", "RESIZING")
_PRIVATE = "unshare --mount --uts --pid --fork --kill-child --mount-proc --propagation private"
# so much of a line of scontrol that a user's name of a job, which may hold anything, is not taken for it
_JOB = re.compile(
    r"^JobId=\d+(?: ArrayJobId=\d+ ArrayTaskId=(\S+))?.*? JobState=(\w+) Reason=[^\n]*? "
    r"Restarts=(\d+) BatchFlag=\d Reboot=\d ExitCode=(\d+):(\d+) ",
    re.DOTALL | re.MULTILINE,
)
# the shell stays as process 1 of the node and reaps what slurmd's children leave
_NODE = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && { "$@"; exit $?; }'


def missing_programs(accounting: bool = False) -> list[str]:
    """Which of the needed programs (for accounting: of all, and the plugin of slurmdbd) are not installed."""
    missing = [name for name in PROGRAMS + (ACCOUNTING_PROGRAMS if accounting else ()) if shutil.which(name, path=PATH) is None]
    folders = ("lib/*/slurm*", "lib*/slurm*", "local/lib*/slurm*")
    if accounting and not any(path for folder in folders for path in Path("/usr").glob(f"{folder}/{ACCOUNTING_PLUGIN}")):
        missing.append(ACCOUNTING_PLUGIN)
    return missing


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
    restarts: int = 0


class SlurmError(RuntimeError):
    """The cluster did not start, or a command to it failed."""


class LocalSlurm:
    """A cluster; ``with LocalSlurm(nodes=2) as slurm`` starts and stops it."""

    def __init__(
        self, nodes: int = 2, cpus: int = 8, memory_mb: int = 16000, gpus: int = 0, *, accounting: bool = False,
        grace_seconds: int | None = None, plugstack: Sequence[str] = (), extra: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """``cpus``, ``memory_mb`` and ``gpus`` of every node may be more than there are (GPUs are only counted, not there).

        ``accounting``: sacct and sacctmgr work. ``grace_seconds``: beside ``batch`` there is a partition ``high`` whose jobs requeue
        those of ``batch``, which get the signal of their ``--signal`` (without: SIGTERM) that long before they are ended, or up to
        half a minute longer: the controller does not look more often. What ends by itself in that time is not queued again.
        ``plugstack``: lines of plugstack.conf (SPANK plugins); ``extra``: more lines of slurm.conf.
        """
        self.nodes, self.cpus, self.memory_mb, self.gpus = nodes, cpus, memory_mb, gpus
        self.accounting, self.grace_seconds, self.plugstack, self.extra = accounting, grace_seconds, plugstack, extra
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
        (self.folder / "state").chmod(0o700)
        if self.accounting:
            self._spawn("mariadbd", self._mariadbd())  # takes longest, so it is first
        self.private = self._namespaces()
        self.ports = dict(zip(["slurmctld", "slurmdbd", *self.names], free_ports(2 + self.nodes), strict=True))
        self._write_configuration()
        key = self.folder / "run" / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        self._spawn("munged", self._munged(key))
        self._wait("munged", self._socket.exists)
        if self.accounting:
            self._start_accounting()
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", str(self._slurm_conf)])
        for name in self.names:
            self.start_node(name)
        self.wait_idle()

    def _start_accounting(self) -> None:
        self._wait("mariadbd", self._database.exists)
        self._spawn("slurmdbd", ["slurmdbd", "-D"])
        self._wait("slurmdbd", lambda: self._listens(self.ports["slurmdbd"]))
        self.run("sacctmgr", "--quiet", "--immediate", "add", "cluster", "local")

    def _mariadbd(self) -> list[str]:
        """The command that makes a database and then is its server. Only its user reaches its socket: no passwords."""
        common = ["--no-defaults", f"--user={self._user}", f"--datadir={self.folder / 'state' / 'database'}"]
        small = ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin"]
        wanted = ["--innodb-lock-wait-timeout=900", "--performance-schema=0"]  # the first by slurmdbd
        closed = ["--skip-networking", "--skip-grant-tables", f"--socket={self._database}", f"--pid-file={self._database}.pid"]
        make = ["mariadb-install-db", *common, "--skip-test-db", "--skip-name-resolve"]
        return ["sh", "-c", f"{shlex.join(make)} && exec {shlex.join(['mariadbd', *common, *small, *wanted, *closed])}"]

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

    def node_down(self, name: str, reason: str = "test") -> None:
        """Have the controller take a node for dead: its jobs end as NODE_FAIL, at once, or are queued again.

        It takes no jobs until :meth:`node_up`.
        """
        for state in ("drain", "down"):  # its daemon lives, and by "down" alone it is back as soon as that says so
            self.run("scontrol", "update", f"nodename={name}", f"state={state}", f"reason={reason}")

    def node_up(self, name: str) -> None:
        """Bring a node back that :meth:`node_down` took away; returns when it takes jobs."""
        self.run("scontrol", "update", f"nodename={name}", "state=resume")
        self._wait(name, lambda: self.node_state(name) in ("idle", "mixed", "allocated"))

    def node_state(self, name: str) -> str:
        """``idle``, ``mixed``, ``allocated``, ``completing``, ``down``, ...; with ``*`` the node does not answer."""
        return self.run("sinfo", "--noheader", "--Node", f"--nodes={name}", "--partition=batch", "--format=%T").strip()

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
        done = self.attempt("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%T")
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
    def _database(self) -> Path:
        return self.folder / "state" / "database.socket"

    @property
    def _user(self) -> str:
        try:
            return pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            raise SlurmError(f"user id {os.getuid()} has no name in /etc/passwd, which Slurm needs") from None

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
        # where slurmdbd's database library looks for a database of this machine
        database = {"MYSQL_UNIX_PORT": str(self._database)} if self.accounting else {}
        return {**clean_environment(), **openmpi, **database, "SLURM_CONF": str(self._slurm_conf)}

    def _write_configuration(self) -> None:
        etc = self.folder / "etc"
        (etc / "slurm.conf").write_text(self._configuration())
        (etc / "cgroup.conf").write_text("CgroupPlugin=disabled\n" if self._newer else "CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
        if self.plugstack:
            (etc / "plugstack.conf").write_text("".join(f"{line}\n" for line in self.plugstack))
        if self.accounting:
            (etc / "slurmdbd.conf").touch(0o600)  # slurmdbd refuses one that others can read
            (etc / "slurmdbd.conf").write_text("".join(f"{name}={value}\n" for name, value in self._accounting_settings().items()))
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

    def _accounting_settings(self) -> dict[str, object]:
        """slurmdbd.conf."""
        return {
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self._socket}",
            "DbdHost": "localhost",
            "DbdAddr": "127.0.0.1",
            "DbdPort": self.ports["slurmdbd"],
            "SlurmUser": self._user,
            "LogFile": self.folder / "log" / "slurmdbd.log",
            "PidFile": self.folder / "run" / "slurmdbd.pid",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "localhost",
            "StorageUser": self._user,
            "StorageLoc": "slurm_accounting",
            "CommitDelay": 0,
        }

    def _options(self) -> dict[str, object]:
        """The settings that the arguments of the constructor switch on."""
        settings: dict[str, object] = {}
        if self.gpus:
            settings["GresTypes"] = "gpu"
        if self.accounting:
            settings["AccountingStorageType"] = "accounting_storage/slurmdbd"
            settings["AccountingStorageHost"] = "127.0.0.1"
            settings["AccountingStoragePort"] = self.ports["slurmdbd"]
            settings["AccountingStoragePass"] = self._socket
            if self.gpus:
                settings["AccountingStorageTRES"] = "gres/gpu"
        if self.grace_seconds is not None:
            settings["PreemptType"] = "preempt/partition_prio"
            settings["PreemptMode"] = "REQUEUE"
            settings["JobRequeue"] = 1
            # look every two seconds, not every minute, whether a job that was queued again can start
            settings["SchedulerParameters"] = "batch_sched_delay=0,sched_interval=2,bf_interval=2"
            # later versions have PreemptParameters=send_user_signal, but still know this name
            settings["SlurmctldParameters"] = "preempt_send_user_signal"
        if self.plugstack:
            settings["PlugStackConfig"] = self.folder / "etc" / "plugstack.conf"
        return settings

    def _configuration(self) -> str:
        settings = {
            "ClusterName": "local",
            "SlurmctldHost": f"{self._host}(127.0.0.1)",
            "SlurmctldPort": self.ports["slurmctld"],
            # a job that is queued again waits for as long as credentials live: 120 s by default, 5 is the least that is taken
            "AuthInfo": f"socket={self._socket},cred_expire=5",
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            "SlurmUser": self._user,
            "SlurmdUser": self._user,
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
            **self._options(),
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
        batch = "PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
        if self.grace_seconds is None:
            lines.append(batch)
        else:
            lines.append(f"{batch} PriorityTier=10 GraceTime={self.grace_seconds}")
            lines.append("PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=20 PreemptMode=OFF")
        return "\n".join([*lines, *self.extra]) + "\n"

    # ------------------------------------------------------------------------------------------------------ commands

    def attempt(
        self, *command: object, timeout: float = 60, cwd: Path | None = None, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm to its end, whatever that is; with more environment ``variables``, if any."""
        words = [str(word) for word in command]
        environment = {**self.environment, **(variables or {})}
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment, stdin=subprocess.DEVNULL, cwd=cwd)

    def run(self, *command: object, timeout: float = 60, cwd: Path | None = None, variables: Mapping[str, str] | None = None) -> str:
        """What a command of Slurm prints. Raises :class:`SlurmError` when it fails."""
        done = self.attempt(*command, timeout=timeout, cwd=cwd, variables=variables)
        if done.returncode:
            raise SlurmError(f"{command} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def submit(self, *arguments: object, cwd: Path | None = None, variables: Mapping[str, str] | None = None) -> str:
        """Submit with sbatch (options, script and its arguments, or ``--wrap``); the number of the job.

        Raises :class:`SlurmError` when sbatch refuses.
        """
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, variables=variables).strip().split(";")[0]

    def preempt(self, *names: str, seconds: float = 1) -> str:
        """Submit a job of the partition ``high`` that takes these nodes whole for so long; its number."""
        where = ("--partition=high", "--exclusive", f"--nodes={len(names)}", f"--nodelist={','.join(names)}")
        return self.submit(*where, "--job-name=high", "--output=/dev/null", "--wrap", f"exec sleep {seconds}")

    def jobs(self, job: str) -> list[Job]:
        """A job, or all tasks of an array, now; in the order of the tasks."""
        found: dict[int, Job] = {}
        for task, state, restarts, code, number in _JOB.findall(self.run("scontrol", "--oneliner", "show", "job", job)):
            # tasks of an array that wait together are one line with a range of numbers
            found[int(task) if task.isdigit() else -1] = Job(state, int(code), int(number), int(restarts))
        return [found[task] for task in sorted(found)]

    def state(self, job: str) -> str:
        """The state of a job now, by the controller: ``PENDING``, ``RUNNING``, ``COMPLETED``, ..."""
        return self.jobs(job)[0].state

    def requeues(self, job: str) -> int:
        """How often a job was queued again."""
        return self.jobs(job)[0].restarts

    def sacct(self, job: str, *fields: str) -> list[dict[str, str]]:
        """What the accounting knows now: a row for each run of the job, its batch script and its steps, in time.

        ``fields``: by default JobID, State, ExitCode and NodeList. A row changes about a second after what it tells of.
        """
        names = fields or ("JobID", "State", "ExitCode", "NodeList")
        said = self.run("sacct", f"--jobs={job}", "--duplicates", "--noheader", "--parsable2", f"--format={','.join(names)}")
        return [dict(zip(names, line.split("|"), strict=True)) for line in said.splitlines()]

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

    def wait_state(self, job: str, states: str | Sequence[str], timeout: float = 60) -> str:
        """Wait until a job is in one of the states, which is returned. Raises :class:`SlurmError` when it takes too long."""
        wanted = (states,) if isinstance(states, str) else tuple(states)
        end = time.monotonic() + timeout
        while (now := self.state(job)) not in wanted:
            if time.monotonic() > end:
                raise SlurmError(f"job {job} is {now}, not {' or '.join(wanted)}, after {timeout} s\n{self.logs()}")
            time.sleep(0.1)
        return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, default, text in (("nodes", 2, "nodes"), ("cpus", 8, "CPUs of each node"), ("gpus", 0, "pretended GPUs of each node")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--accounting", action="store_true", help="sacct and sacctmgr work")
    parser.add_argument("--grace", type=int, metavar="SECONDS", help="add a partition 'high' that preempts after SECONDS (default: none)")
    arguments = parser.parse_args()
    if missing := missing_programs(arguments.accounting):
        packages = f"{PACKAGES} {ACCOUNTING_PACKAGES}" if arguments.accounting else PACKAGES
        parser.exit(1, f"not installed: {', '.join(missing)}; apt-get install {packages}\n")
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    options = {"accounting": arguments.accounting, "grace_seconds": arguments.grace}
    with LocalSlurm(arguments.nodes, arguments.cpus, gpus=arguments.gpus, **options) as slurm:
        print(f"export SLURM_CONF={slurm.environment['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
