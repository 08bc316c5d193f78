"""A job as text: ``#SBATCH`` lines, a block of bash assignments, and the body. Pure functions; the same job gives the same bytes.

The block is the whole interface to ``slurm/run.sub``, the body that carries a job out: it holds every word the job will run, quoted for
bash by :mod:`shlex`. Launched jobs carry the block; a job submitted by hand has it made on its first node; the local backend runs the
same text with :mod:`berth.launch.spawn` in srun's place.

Values that reach an ``#SBATCH`` line are quoted for Slurm's own reader of such lines (:func:`quoted`); there is no way to write a line break,
which is refused.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence

from berth.errors import ConfigError
from berth.launch.clusters import ROOT, Cluster, walltime
from berth.launch.plan import Job, Raw, Step

PASSED = (
    "MASTER_ADDR", "MASTER_PORT", "BERTH_RECORD", "BERTH_JOB", "BERTH_PREFLIGHT", "BERTH_FAILURES", "BERTH_IMAGE_SHA256", "BERTH_NODES",
    "PYTHONUNBUFFERED",
)  # fmt: skip
_PLAIN = "_@%+=:,./[]-"


def word(text: str) -> str:
    """One word for bash; :class:`Raw` ones are bash already. Raises :class:`ConfigError` for a zero byte, which no program can be given."""
    if isinstance(text, Raw):
        return str(text)
    if "\0" in text:
        raise ConfigError(f"{text!r} holds a zero byte")
    return shlex.quote(text)


def line(words: Sequence[str]) -> str:
    """A command line for bash."""
    return " ".join(word(each) for each in words)


def directive(name: str, value: str | None = None) -> str:
    """One ``#SBATCH`` line. Raises :class:`ConfigError` for a value with a line break."""
    if value is None:
        return f"#SBATCH --{name}"
    if any(mark in value for mark in "\n\r\0"):
        raise ConfigError(f"{value!r} cannot stand in an #SBATCH line (--{name}): it holds a line break")
    return f"#SBATCH --{name}={quoted(value)}"


def quoted(text: str) -> str:
    """A text as one word of an ``#SBATCH`` line, in double quotes where it needs them.

    Slurm's reader is no shell: quotes group, and a backslash takes the next letter as it is, in quotes of either kind too; but outside of
    quotes a space ends the word even after a backslash.
    """
    if all(letter.isalnum() or letter in _PLAIN for letter in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def log_path(job: Job) -> str:
    """``--output`` of a job, with Slurm's ``%j``. Raises :class:`ConfigError` for a backslash, which would switch off Slurm's patterns."""
    if "\\" in job.state:
        raise ConfigError(f"{job.state!r} holds a backslash, which Slurm does not allow in the name of a log; choose another folder")
    return f"{job.state.replace('%', '%%')}/{job.stage}-%j.log"


def directives(job: Job, log: str | None = None) -> list[str]:
    """The ``#SBATCH`` lines of a job. ``log``: another ``--output``."""
    cluster = job.cluster
    pairs: list[tuple[str, str | None]] = [
        ("job-name", job.name),
        ("nodes", str(job.nodes)),
        ("ntasks-per-node", str(job.ranks_per_node)),
    ]
    if job.cpus_per_task is not None:
        pairs.append(("cpus-per-task", str(job.cpus_per_task)))
    if job.gpus_per_node and cluster.gpu_request != "none":
        count = str(job.gpus_per_node)
        pairs.append(("gres", f"gpu:{count}") if cluster.gpu_request == "gres" else ("gpus-per-node", count))
    if cluster.memory is not None:
        pairs.append(("mem", cluster.memory))
    if cluster.exclusive:
        pairs.append(("exclusive", None))
    for name in ("partition", "account", "qos", "constraint"):
        if getattr(cluster, name) is not None:
            pairs.append((name, getattr(cluster, name)))
    if job.walltime_s is not None:
        pairs.append(("time", walltime(job.walltime_s)))
    pairs += [
        ("output", log or log_path(job)),
        ("open-mode", "append"),
        ("requeue", None),
        ("signal", f"B:USR1@{cluster.warning_s}"),
    ]
    return [*(directive(name, value) for name, value in pairs), *(f"#SBATCH {quoted(option)}" for option in cluster.sbatch)]


def srun(step: Step, job: Job) -> tuple[str, ...]:
    """The words of one srun.

    ``--kill-on-bad-exit``: a dead rank ends its step at once instead of leaving the others in a collective. ``--cpu-bind=none``: the ranks bind
    themselves. A named container is unpacked once an attempt and node, not once a step; run.sub makes the name.
    """
    words = [
        "srun", f"--job-name={step.name}", f"--nodes={step.nodes}", f"--ntasks={step.ranks}", f"--ntasks-per-node={step.ranks_per_node}",
        "--kill-on-bad-exit=1", f"--mpi={step.mpi}",
    ]  # fmt: skip
    if step.cpus_per_task is not None:
        words.append(f"--cpus-per-task={step.cpus_per_task}")
    if step.ranks > 1 or step.cpus_per_task is None:
        words.append("--cpu-bind=none")
    if step.ranks > 1:
        words.append("--label")
    if step.host or job.image is None:
        words.append(f"--chdir={ROOT}")
    else:
        words += container_options(job)
    return (*words, *job.cluster.srun, *step.program)


def container_options(job: Job) -> list[str]:
    """Pyxis' options of srun."""
    container = job.cluster.container
    assert container is not None and job.image is not None
    passed = [*PASSED, *sorted(job.cluster.environment)]
    return [
        f"--container-image={job.image}",
        Raw('"--container-name=$BERTH_CONTAINER"'),
        f"--container-mounts={','.join(job.mounts)}",
        f"--container-workdir={ROOT}",
        f"--container-env={','.join(passed)}",
        "--container-mount-home" if container.mount_home else "--no-container-mount-home",
        *(["--container-writable"] if container.writable else []),
        *(["--container-remap-root"] if container.remap_root else []),
    ]


def spawned(step: Step) -> tuple[str, ...]:
    """The words that run a step as processes of this machine."""
    label = ["--label"] if step.ranks > 1 else []
    return (sys.executable, "-m", "berth.launch.spawn", "--ranks", str(step.ranks), *label, "--", *step.program)


def job_block(job: Job, *, backend: str = "slurm", epilogue: Sequence[str] = ()) -> str:
    """The assignments ``run.sub`` works from. ``epilogue``: a command the batch shell runs when the job has ended for good."""
    cluster = job.cluster
    local = backend == "local"
    plain: dict[str, str] = {
        "BERTH_BACKEND": backend,
        "BERTH_STAGE": job.stage,
        "BERTH_ROOT": str(ROOT),
        "BERTH_FOLDER": job.folder,
        "BERTH_NODE_COUNT": str(job.nodes),
        "BERTH_RANKS_PER_NODE": str(job.ranks_per_node),
        "BERTH_MAX_RESTARTS": str(cluster.max_restarts),
        "BERTH_CRASH_LIMIT": str(cluster.crash_limit),
        "BERTH_IMAGE": job.image or "",
        "BERTH_JOB_JSON": json.dumps(job.record, sort_keys=True),
    }
    lines = [f"{name}={word(value)}" for name, value in plain.items()]
    lines += [f"export {name}={word(value)}" for name, value in environment(cluster).items()]
    lines.append(f"BERTH_MAKES=({line(job.makes)})")
    lines.append(f"BERTH_EPILOGUE=({line(epilogue)})")
    lines.append("berth_setup() {")
    lines += [f"  {each}" for each in (cluster.setup if not local else ())] + ["  :", "}"]
    lines.append(f"BERTH_STEPS=({line([step.name for step in job.steps if not (local and step.host)])})")
    for step in job.steps:
        if local and step.host:
            continue
        # exec: the process that gets signals is srun itself
        lines += [f"berth_step_{step.name}() {{", f"  exec {line(spawned(step) if local else srun(step, job))}", "}"]
    return "\n".join(lines) + "\n"


def environment(cluster: Cluster) -> dict[str, str]:
    """Variables of every task. SLURM_EXPORT_ENV: a job that sbatch gave only some (``--export=PHASE=2``) would hand on only those."""
    return {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "SLURM_EXPORT_ENV": "ALL", **cluster.environment}


def sbatch_text(job: Job, *, log: str | None = None, epilogue: Sequence[str] = ()) -> str:
    """The whole batch script of a job."""
    head = ["#!/usr/bin/env bash", *directives(job, log), "", f"# {job.stage}; made by berth.launch, carried out by slurm/run.sub", ""]
    return "\n".join(head) + job_block(job, epilogue=epilogue) + f"\nsource {word(str(ROOT / 'slurm' / 'run.sub'))}\n"


def local_text(job: Job) -> str:
    """The same job as a script for this machine, without Slurm."""
    head = f"#!/usr/bin/env bash\n# {job.stage}; made by berth.launch, carried out by slurm/run.sub as processes of this machine\n\n"
    return head + job_block(job, backend="local") + f"\nsource {word(str(ROOT / 'slurm' / 'run.sub'))}\n"


def srun_lines(job: Job) -> list[str]:
    """Every srun of a job as bash sees it."""
    return [line(srun(step, job)) for step in job.steps]


def sbatch_options(dependency: str | None = None, kind: str = "afterok", extra: Mapping[str, str] | None = None) -> list[str]:
    """What is said on sbatch's command line: what is known only at submission."""
    options = [f"--{name}={value}" for name, value in (extra or {}).items()]
    if dependency is not None:
        options += [f"--dependency={kind}:{dependency}", "--kill-on-invalid-dep=yes"]
    return options
