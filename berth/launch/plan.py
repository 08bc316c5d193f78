"""A run as a chain of jobs: prepare -> phase 1 -> phase 2 -> export. Pure: nothing is read, written or asked of the machine.

In: rows of the matrix (one a phase), a site profile, what belongs to the run (:class:`Run`). Out: :class:`Plan`. A :class:`Job` is one
allocation, a :class:`Step` one srun in it. What a program does is said by its own options, so that every line can be typed by hand.

Both phases write to one folder: ``run_pretraining.py`` finds there, by the manifest, the end of phase 1 or the checkpoint to go on from.
Every path is the same inside and outside the container: the job's own folders are mounted where they lie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from berth.errors import ConfigError
from berth.launch.clusters import ROOT, Cluster, seconds, walltime
from berth.launch.matrix import Row

STAGES = ("prepare", "phase1", "phase2", "export")
WALLTIME_MARGIN = 1.25
BAD_IN_MOUNT = ":,\n\r"


class Raw(str):
    """A word that is bash already (a quoted variable); every other word is quoted."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What belongs to one run, and to no site and no row.

    Attributes:
        name: folder below ``results``.
        results: parent of all runs, absolute, shared by all nodes.
        inputs: ``{phase: folder of records, or work folder of data.prepare}``.
        config_file, vocab_file: model and vocabulary.
        seed: of initial weights, order and dropout.
        prepare: configuration of data.prepare for the stage ``prepare``; its work folder is ``workdir``.
        init_checkpoint: weights that start the first phase.
        steps_this_run: steps each training job makes before it ends well (scaling studies).
        study: measure only: no checkpoint, and phase 2 from random weights (its speed is that of any others).
        evaluate: score the held-out shard (that the inputs must then have).
        extra: further options of run_pretraining.py.
        time: walltime of a training job, ``[days-]hh:mm:ss``; estimated if not given.
        preflight: override of the site's.
    """

    name: str
    results: str
    inputs: Mapping[int, str]
    config_file: str
    vocab_file: str | None = None
    seed: int = 42
    prepare: str | None = None
    workdir: str | None = None
    init_checkpoint: str | None = None
    steps_this_run: int | None = None
    study: bool = False
    evaluate: bool = False
    extra: tuple[str, ...] = ()
    time: str | None = None
    preflight: bool | None = None

    def __post_init__(self) -> None:
        wrong = []
        if not self.name or self.name in (".", "..") or any(mark in self.name for mark in "/\n\r\0"):
            wrong.append(f"the run's name {self.name!r} must be the name of a folder: no slash, no line break")
        paths = {name: getattr(self, name) for name in ("results", "config_file", "vocab_file", "prepare", "workdir", "init_checkpoint")}
        for what, path in (paths | {f"inputs of phase {phase}": path for phase, path in self.inputs.items()}).items():
            if path is not None and (not PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts):
                wrong.append(f"{what} {path!r} must be an absolute path without '..'")  # mounts are compared as text
        if wrong:
            raise ConfigError("\n  ".join(wrong))

    @property
    def folder(self) -> str:
        """``--output_dir`` of both phases."""
        return str(PurePosixPath(self.results) / self.name)


@dataclasses.dataclass(frozen=True)
class Step:
    """One program on some nodes of the job: a task a rank. ``host`` steps run outside the container."""

    name: str
    program: tuple[str, ...]
    nodes: int
    ranks: int
    host: bool = False
    cpus_per_task: int | None = None
    mpi: str = "none"

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes


@dataclasses.dataclass(frozen=True)
class Job:
    """One allocation.

    Attributes:
        stage: one of :data:`STAGES`.
        name: Slurm's job name.
        folder: where the run writes; logs and records of the jobs lie in ``<folder>/slurm``.
        ranks_per_node: tasks a node.
        gpus_per_node: 0 where none are needed.
        after: the stage that must have ended well before.
        makes: folders to make before the first step, which mounts them.
        record: what was decided, for run.json.
    """

    stage: str
    name: str
    cluster: Cluster
    folder: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_task: int | None
    walltime_s: int | None
    steps: tuple[Step, ...]
    mounts: tuple[str, ...]
    image: str | None
    after: str | None
    record: Mapping[str, Any]
    makes: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """Folder of logs, scripts and records."""
        return f"{self.folder}/slurm"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A chain of jobs; each waits for the one before."""

    run: Run
    jobs: tuple[Job, ...]


def make_plan(
    run: Run, cluster: Cluster, rows: Mapping[int, Row], stages: Sequence[str], *, hours: Mapping[int, float] | None = None
) -> Plan:
    """The chain of ``stages`` in order.

    Args:
        rows: ``{phase: row}`` for the training stages.
        hours: ``{phase: estimated hours}``, for walltimes; the site's limit where unknown.

    Raises:
        ConfigError: for stages that are not there, or lack what they need.
    """
    wrong = [f"stage {stage!r} is not one of {', '.join(STAGES)}" for stage in stages if stage not in STAGES]
    phases = [phase for phase in (1, 2) if f"phase{phase}" in stages]
    wrong += [f"phase {phase} has no row" for phase in phases if phase not in rows]
    wrong += [f"phase {phase} has no input folder" for phase in phases if phase not in run.inputs]
    if "prepare" in stages and (run.prepare is None or run.workdir is None):
        wrong.append("the stage prepare needs a configuration of data.prepare and its work folder")
    if "export" in stages and run.vocab_file is None:
        wrong.append("the stage export needs a vocabulary")
    if not stages:
        wrong.append("no stage was asked for")
    if wrong:
        raise ConfigError("\n  ".join(wrong))
    jobs: list[Job] = []
    for stage in (stage for stage in STAGES if stage in stages):
        after = jobs[-1].stage if jobs else None
        if stage in ("phase1", "phase2"):
            phase = int(stage[-1])
            first = not any(job.stage.startswith("phase") for job in jobs)
            jobs.append(training_job(run, cluster, rows[phase], first, after, (hours or {}).get(phase)))
        else:
            jobs.append(serial_job(stage, run, cluster, after, next(iter(rows.values()), None)))
    return Plan(run, tuple(jobs))


def training_job(run: Run, cluster: Cluster, row: Row, first: bool, after: str | None, hours: float | None) -> Job:
    """One phase on the row's nodes. ``first``: no earlier phase of this plan hands it weights."""
    steps = [*import_steps(cluster, row.nodes)]
    preflight = cluster.preflight if run.preflight is None else run.preflight
    if preflight:
        steps.append(rank_step("preflight", preflight_program(run, cluster, row), cluster, row))
    steps.append(rank_step("train", (cluster.python, "-u", "run_pretraining.py", *training_options(run, row, first)), cluster, row))
    return Job(
        stage=f"phase{row.phase}",
        name=row.job_name,
        cluster=cluster,
        folder=run.folder,
        nodes=row.nodes,
        ranks_per_node=row.ranks,
        gpus_per_node=row.ranks if row.platform.device == "cuda" else 0,
        cpus_per_task=cluster.cpus_per_task,
        walltime_s=job_walltime(run, cluster, hours),
        steps=tuple(steps),
        mounts=mounts(run, cluster, run.inputs[row.phase]),
        image=image_path(cluster),
        after=after,
        record=record(run, cluster, row),
    )


def training_options(run: Run, row: Row, first: bool) -> tuple[str, ...]:
    """Options of run_pretraining.py for one phase of a run.

    ``--resume_from_checkpoint`` always: a requeued job, a second submission and phase 2 all find their place by the manifest.
    """
    recipe = row.phase_recipe
    source = run.inputs[row.phase]
    options: dict[str, object] = {
        "input_dir": source,
        "config_file": run.config_file,
        "vocab_file": run.vocab_file,
        "output_dir": run.folder,
        "max_seq_length": recipe.max_seq_length,
        "max_predictions_per_seq": recipe.max_predictions_per_seq,
        "train_batch_size": row.train_batch_size,
        "gradient_accumulation_steps": row.accumulation,
        "max_steps": recipe.max_steps,
        "steps_this_run": run.steps_this_run,
        "optimizer": recipe.optimizer,
        "learning_rate": recipe.learning_rate,
        "lr_schedule": recipe.lr_schedule,
        "warmup_proportion": recipe.warmup_proportion,
        **recipe.options,
        "precision": row.precision,
        "device": row.platform.device,
        **row.options,
        "seed": run.seed,
        "num_steps_per_checkpoint": recipe.num_steps_per_checkpoint,
        "resume_from_checkpoint": True,
        "phase2": row.phase == 2 and not run.study,
        "init_checkpoint": run.init_checkpoint if first else None,
        "eval_dir": source if run.evaluate else None,
        "skip_checkpoint": run.study,
    }
    return (*option_words(options), *run.extra)


def option_words(options: Mapping[str, object]) -> list[str]:
    """``--name value`` of every option; ``True`` is a switch, ``None`` and ``False`` are left out."""
    words: list[str] = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return words


def rank_step(name: str, program: Sequence[str], cluster: Cluster, row: Row) -> Step:
    """A step with one task a rank, each behind :mod:`berth.launch.rank`."""
    wrapper = [cluster.python, "-m", "berth.launch.rank", "--ranks", str(row.world_size), "--bind", cluster.bind, "--nic", cluster.nic]
    if name == "train":
        wrapper += ["--record", Raw('"$BERTH_RECORD"'), "--job", Raw('"$BERTH_JOB"')]
    cpus = cluster.cpus_per_task
    return Step(name, (*wrapper, "--", *program), row.nodes, row.world_size, cpus_per_task=cpus, mpi=cluster.mpi)


def preflight_program(run: Run, cluster: Cluster, row: Row) -> tuple[str, ...]:
    cuda = row.platform.device == "cuda"
    return (
        cluster.python, "-u", "-m", "berth.launch.preflight", "--backend", "nccl" if cuda else "gloo", "--device", row.platform.device,
        "--expect_gpus", str(row.ranks if cuda else 0), "--data", run.inputs[row.phase], "--output", run.folder,
        "--min_free_gb", f"{cluster.min_free_gb:g}", "--report", Raw('"$BERTH_PREFLIGHT"'),
    )  # fmt: skip


def serial_job(stage: str, run: Run, cluster: Cluster, after: str | None, row: Row | None) -> Job:
    """Preparation or export: one task with all CPUs of one node."""
    cpus = None if row is None else row.platform.cpus_per_node
    if stage == "prepare":
        assert run.prepare is not None and run.workdir is not None
        program = [cluster.python, "-u", "-m", "data.prepare", "--config", run.prepare, "--workdir", run.workdir]
        if cpus is not None:
            program += ["--processes", str(cpus)]
    else:
        assert run.vocab_file is not None
        program = [cluster.python, "-u", "convert_checkpoint.py", "to_huggingface", "--checkpoint", run.folder]
        program += ["--vocab_file", run.vocab_file, "--output_dir", f"{run.folder}/huggingface"]
    cpus = None if cluster.exclusive else cpus  # a whole node has them all, however many the platform says
    step = Step(stage, tuple(program), 1, 1, cpus_per_task=cpus)
    data = [path for path in (run.workdir,) if path is not None] if stage == "prepare" else []
    return Job(
        stage=stage,
        name=f"berth-{stage}",
        cluster=cluster,
        folder=run.folder,
        nodes=1,
        ranks_per_node=1,
        gpus_per_node=0,
        cpus_per_task=cpus,
        walltime_s=cluster.walltime_limit_s,
        steps=(*import_steps(cluster, 1), step),
        mounts=mounts(run, cluster, None, writable=data),
        image=image_path(cluster),
        after=after,
        record=record(run, cluster, None),
        makes=tuple(data),
    )


def import_steps(cluster: Cluster, nodes: int) -> tuple[Step, ...]:
    """Make the squashfs image before anything needs it: once, or once on each node. Nothing is done where it lies already."""
    container = cluster.container
    if container is None or container.import_to == "none":
        return ()
    program = ("bash", str(ROOT / "scripts" / "docker" / "import.sh"), "--if-missing", container.image, str(image_path(cluster)))
    on = nodes if container.import_to == "node" else 1
    return (Step("import", program, on, on, host=True),)


def image_path(cluster: Cluster) -> str | None:
    """What ``--container-image`` gets: the image as the profile names it, or the squashfs file it is imported to."""
    container = cluster.container
    if container is None:
        return None
    if container.import_to == "none":
        return container.image
    plain = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in container.image)
    return f"{container.squashfs_dir}/{plain}.sqsh"


def mounts(run: Run, cluster: Cluster, source: str | None, writable: Sequence[str] = ()) -> tuple[str, ...]:
    """``SOURCE:DESTINATION[:FLAGS]`` of everything a job touches; () without containers.

    Folders that lie inside another mounted one are not named again. A folder comes after those it lies in, and the site's before the
    job's: a later mount hides what an earlier one put at or below its place. Raises :class:`ConfigError` for a path Pyxis cannot be
    told (its list is cut at commas and colons).
    """
    if cluster.container is None:
        return ()
    both = [str(ROOT), run.results, *writable]
    if run.init_checkpoint:
        both.append(str(PurePosixPath(run.init_checkpoint).parent))
    both += [path for path in (cluster.local,) if path]
    only_read = [str(PurePosixPath(path).parent) for path in (run.config_file, run.vocab_file, run.prepare) if path]
    only_read += [source] if source else []
    kept = _outermost(both)
    reading = [path for path in _outermost(only_read) if not any(_inside(path, other) for other in kept)]
    unusual = [path for path in (*kept, *reading) if any(mark in path for mark in BAD_IN_MOUNT)]
    if unusual:
        raise ConfigError(
            "\n  ".join(f"{path!r} cannot be mounted into a container: Pyxis takes no comma, colon or line break" for path in unusual)
        )
    own = [f"{path}:{path}" for path in kept] + [f"{path}:{path}:ro" for path in reading]
    every = [*(mount for mount in cluster.mounts if mount not in own), *own]
    return tuple(sorted(every, key=lambda mount: PurePosixPath(mount.split(":")[1]).parts))


def _inside(path: str, other: str) -> bool:
    return PurePosixPath(path).is_relative_to(PurePosixPath(other))


def _outermost(paths: Sequence[str]) -> list[str]:
    return sorted({path for path in paths if not any(_inside(path, other) and path != other for other in paths)})


def job_walltime(run: Run, cluster: Cluster, hours: float | None) -> int | None:
    """Seconds to ask for: what the user says, else the estimate with a margin, never more than the site allows."""
    limit = cluster.walltime_limit_s
    if run.time is not None:
        return seconds(run.time)
    if hours is None:
        return limit
    wanted = max(1800, int(-(-hours * 3600 * WALLTIME_MARGIN // 1800)) * 1800)
    return wanted if limit is None else min(wanted, limit)


def record(run: Run, cluster: Cluster, row: Row | None) -> dict[str, Any]:
    """What was decided, for run.json."""
    found: dict[str, Any] = {
        "run": dataclasses.asdict(run) | {"inputs": {str(phase): path for phase, path in run.inputs.items()}},
        "cluster": {"name": cluster.name, "file": cluster.file},
        "image": image_path(cluster),
    }
    if row is not None:
        found["row"] = {
            "name": row.name, "job_name": row.job_name, "platform": row.platform.name, "nodes": row.nodes, "ranks_per_node": row.ranks,
            "phase": row.phase, "precision": row.precision, "micro_batch": row.micro_batch, "accumulation": row.accumulation,
            "train_batch_size": row.train_batch_size, "global_batch": row.global_batch, "recipe": row.recipe.name, "source": row.source,
            "options": dict(row.options),
        }  # fmt: skip
        found["recipe"] = {**dataclasses.asdict(row.phase_recipe), "options": dict(row.phase_recipe.options)}
    return found


def describe(plan: Plan) -> str:
    """The chain in words, a line a job."""
    lines = [f"run {plan.run.name} in {plan.run.folder}"]
    for job in plan.jobs:
        time = "no time limit" if job.walltime_s is None else walltime(job.walltime_s)
        after = f", after {job.after}" if job.after else ""
        row = job.record.get("row")
        batch = ""
        if row:
            batch = (
                f"; global batch {row['global_batch']} = {row['micro_batch']} x {row['accumulation']} x {job.nodes * job.ranks_per_node} "
                f"(micro batch x accumulation x ranks), {row['precision']}, {job.record['recipe']['max_steps']} steps"
            )
        lines.append(f"  {job.stage}: {job.name}, {job.nodes} x {job.ranks_per_node} tasks, {time}{after}{batch}")
    return "\n".join(lines)
