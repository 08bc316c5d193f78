"""Everything that can be wrong with a plan, found before it is submitted and reported in one go.

In: a plan, its rows, the matrix, and a :class:`~berth.launch.slurm_limits.Probe` that may ask Slurm. Out: a :class:`Report`. Errors would end the
run; warnings may; notes say what was taken from where, and what could not be checked here. Nothing is written, no weights are loaded.

Rejected: letting ``run_pretraining.py`` check itself (it does, again, with torch at hand; but after hours in the queue, on every node).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from berth.errors import BerthError
from berth.launch import checkpoints, fitting, preparation, slurm_limits
from berth.launch.clusters import walltime
from berth.launch.estimate import bytes_a_parameter, memory_gb, walltime_estimate
from berth.launch.inputs import describe_records
from berth.launch.matrix import Matrix, Row
from berth.launch.plan import Job, Plan
from berth.launch.rows import row_problems
from berth.launch.this_machine import Gpu

FULL = 0.9  # of a GPU's memory: above it fragmentation and a longer batch may be too much
# what the row, the recipe and the run decide: said twice, job name and record would not be those of the run
DECIDED = (
    "input_dir", "eval_dir", "config_file", "vocab_file", "output_dir", "max_seq_length", "max_predictions_per_seq", "train_batch_size",
    "gradient_accumulation_steps", "precision", "device", "seed", "resume_from_checkpoint", "phase2", "init_checkpoint", "steps_this_run",
)  # fmt: skip
RECIPE = ("max_steps", "optimizer", "learning_rate", "lr_schedule", "warmup_proportion", "num_steps_per_checkpoint")


@dataclasses.dataclass
class Report:
    """What was found: ``errors`` keep the run from working, ``warnings`` may, ``notes`` inform."""

    errors: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def validate(
    plan: Plan, rows: Mapping[int, Row], matrix: Matrix, *, probe: slurm_limits.Probe, gpus: Sequence[Gpu] | None = None
) -> Report:
    """Check ``plan`` against everything this machine can see; never stops at the first mistake.

    Args:
        rows: ``{phase: row}``, as given to :func:`berth.launch.plan.make_plan`.
        probe: asks Slurm; :class:`~berth.launch.slurm_limits.NoProbe` asks nobody.
        gpus: those of this machine, where the plan runs as its processes; ``None`` for a plan that runs elsewhere.
    """
    checker = _Checker(plan, rows, matrix, gpus)
    for check in (checker.model, checker.vocabulary, checker.options, checker.preparation):
        checker.attempt(check)
    for job in plan.jobs:
        if job.stage.startswith("phase"):
            for of_phase in (checker.batch, checker.switches, checker.machine, checker.memory, checker.data, checker.time):
                checker.attempt(of_phase, job, rows[int(job.stage[-1])])
    for check in (checker.start, checker.weights, checker.folders, checker.site):
        checker.attempt(check)
    checker.attempt(checker.slurm, probe)
    return Report(*(list(dict.fromkeys(lines)) for lines in dataclasses.astuple(checker.report)))


class _Checker:
    """The checks, one a method; they add to ``report``. What one reads and others need (model, vocabulary) stays here."""

    def __init__(self, plan: Plan, rows: Mapping[int, Row], matrix: Matrix, gpus: Sequence[Gpu] | None) -> None:
        self.plan, self.run, self.rows, self.matrix, self.gpus = plan, plan.run, rows, matrix, gpus
        self.report = Report()
        self.cluster = plan.jobs[0].cluster
        stages = [job.stage for job in plan.jobs]
        self.phases = [int(stage[-1]) for stage in stages if stage.startswith("phase")]
        self.made = self.run.workdir if "prepare" in stages else None  # what lies in it is made by this very chain
        self.config: dict[str, Any] | None = None
        self.vocab_sha256 = ""

    def attempt(self, check: Callable[..., None], *arguments: Any) -> None:
        """Run one check; what it cannot read becomes an error of the report."""
        try:
            check(*arguments)
        except BerthError as error:
            self.report.errors.append(str(error))
        except OSError as error:
            self.report.errors.append(f"{error.filename}: {error.strerror}; make it readable, or name another")

    def error(self, message: str) -> None:
        self.report.errors.append(message)

    def later(self, path: str) -> bool:  # made by the stage prepare of this chain
        return self.made is not None and Path(path).is_relative_to(self.made)

    def model(self) -> None:
        """The model configuration."""
        if self.later(self.run.config_file):
            self.report.notes.append(f"config_file {self.run.config_file} is made by the stage prepare: model and memory are not checked")
        else:
            self.config = fitting.read_model(Path(self.run.config_file))

    def vocabulary(self) -> None:
        """The vocabulary, and its size against the model's."""
        path = self.run.vocab_file
        if path is not None and not self.later(path):
            self.vocab_sha256, entries = fitting.read_vocabulary(Path(path))
            self.fits_model(entries, f"vocab_file {path} has")

    def fits_model(self, entries: int, what: str) -> None:
        """A vocabulary's size against the model's."""
        if self.config is not None and not fitting.same_size(entries, self.config["vocab_size"]):
            self.error(
                f"{what} {entries} entries, but vocab_size in config_file {self.run.config_file} is {self.config['vocab_size']}; use the "
                "bert_config.json made with the vocabulary"
            )

    def options(self) -> None:
        """Further options of run_pretraining.py against those the plan sets."""
        for name in (word[2:].partition("=")[0] for word in self.run.extra if word.startswith("--")):
            if name in DECIDED:
                self.error(f"extra option --{name} is decided by the row, the recipe or the run; choose it there instead")
            elif name in RECIPE:
                self.report.warnings.append(
                    f"extra option --{name} overrides the recipe, and run.json will not know; better write a recipe"
                )

    def batch(self, job: Job, row: Row) -> None:
        """The batch algebra, on what the job will really be told."""
        self.report.errors += [f"{job.stage}: {problem}" for problem in row_problems(row)]
        world = job.nodes * job.ranks_per_node
        product = row.micro_batch * row.accumulation * world
        if product != row.global_batch:
            self.error(
                f"{job.stage}: micro-batch {row.micro_batch} x accumulation {row.accumulation} x {world} ranks is {product}, not the global "
                f"batch {row.global_batch} of recipe {row.recipe.name}; choose nodes and micro-batch whose product divides it"
            )
        if self.cluster.platform not in (None, row.platform.name):
            self.report.warnings.append(
                f"{job.stage}: the row is of platform {row.platform.name}, the nodes of {self.cluster.file} are {self.cluster.platform}"
            )

    def switches(self, job: Job, row: Row) -> None:
        """Options against each other, the precision, the hardware and the cut of the batch."""
        found = fitting.option_problems(row, fitting.given_options(row, self.run.extra))
        self.report.errors += [f"{job.stage}: {problem}" for problem in found]

    def machine(self, job: Job, row: Row) -> None:
        """The GPUs of this machine, where the processes run on it: of several nodes all do."""
        if self.gpus is not None and row.platform.device == "cuda" and row.world_size > len(self.gpus):
            self.error(
                f"{job.stage}: row {row.name} takes {row.world_size} GPUs, this machine has {len(self.gpus)}; choose a smaller row (list), or a "
                "backend that asks Slurm for nodes"
            )

    def memory(self, job: Job, row: Row) -> None:
        """The estimate of a GPU's memory, and the length against the model's positions."""
        length = row.phase_recipe.max_seq_length
        if self.config is None:
            return
        if length > self.config["max_position_embeddings"]:
            self.error(
                f"{job.stage}: sequences of {length} tokens, but max_position_embeddings in config_file {self.run.config_file} is "
                f"{self.config['max_position_embeddings']}; raise it there, or choose a recipe with shorter sequences"
            )
        have = row.platform.gpu_memory_gb
        if row.platform.device != "cuda":
            return
        if not have:
            self.report.notes.append(f"{job.stage}: platform {row.platform.name} has no gpu_memory_gb: memory is not checked")
            return
        options = {**row.phase_recipe.options, **row.options}
        saving = bool(options.get("checkpoint_activations")) or "--checkpoint_activations" in self.run.extra
        extra = dict(itertools.pairwise(self.run.extra))
        shard = extra.get("--shard") or str(options.get("shard", "none"))
        held = bytes_a_parameter(shard, row.world_size, row.accumulation)
        need = memory_gb(self.config, row.phase_recipe, row.micro_batch, row.precision, saving, held)
        message = f"{job.stage}: micro-batch {row.micro_batch} in {row.precision} needs about {need}, a GPU of {row.platform.name} has {have:g} GB"
        other = ", or --shard zero1" if shard == "none" and row.world_size > 1 else ""
        if need.total_gb > have:
            self.error(f"{message}; choose a smaller micro-batch" + ("" if saving else ", or --checkpoint_activations") + other)
        elif need.total_gb > FULL * have:
            self.report.warnings.append(f"{message}; it may just not fit: a smaller micro-batch is safe")

    def data(self, job: Job, row: Row) -> None:
        """The records of a phase against recipe, model, vocabulary and batch."""
        source = self.run.inputs[row.phase]
        if self.later(source):
            return
        options = {**row.phase_recipe.options, **row.options}
        dynamic = bool(options.get("dynamic_masking")) or "--dynamic_masking" in self.run.extra
        records = describe_records(source, dataclasses.replace(row.phase_recipe, options={**options, "dynamic_masking": dynamic}))
        self.report.errors += [f"{job.stage}: {problem}" for problem in records.problems]
        self.report.notes += records.notes
        self.report.errors += [f"{job.stage}: {problem}" for problem in fitting.record_problems(records, row, dynamic)]
        if records.rows and not self.run.steps_this_run:
            times = row.phase_recipe.sequences / records.rows
            self.report.notes.append(f"{job.stage}: {records.rows} rows in {records.files} files, each read {times:.2g} times")
        self.fits_model(records.vocab_size, f"{job.stage}: the records in {records.folder} were made with a vocabulary of")
        if self.vocab_sha256 and records.vocab_sha256 not in ("", self.vocab_sha256):
            self.error(
                f"{job.stage}: the records in {records.folder} were made with another vocabulary than vocab_file {self.run.vocab_file}; "
                "give theirs, or make them again"
            )
        if self.run.evaluate and (not records.test_files or records.test_rows == 0):
            self.error(
                f"{job.stage}: evaluation needs a held-out part, but {records.folder} has no rows in <prefix>_test_<i>; leave it out"
            )

    def preparation(self) -> None:
        """The configuration of data.prepare, and whether it makes what the phases read."""
        if self.made is None or self.run.prepare is None:
            return
        recipes = [self.rows[phase].phase_recipe for phase in self.phases]
        found, notes = preparation.problems(Path(self.run.prepare), Path(self.made), recipes)
        self.report.errors += found
        self.report.notes += notes
        for phase in self.phases:
            if not self.later(self.run.inputs[phase]):
                self.report.warnings.append(f"phase{phase} reads {self.run.inputs[phase]}, not what the stage prepare makes in {self.made}")

    def time(self, job: Job, row: Row) -> None:
        """Walltime and requeues against the estimate."""
        limit = job.walltime_s if self.gpus is None else None  # processes of this machine have no limit
        warning, restarts = self.cluster.warning_s, self.cluster.max_restarts
        if limit is not None and warning >= limit:
            self.error(f"{job.stage}: warning_s {warning} of {self.cluster.file} must be shorter than the walltime {walltime(limit)}")
            return
        longest = self.cluster.walltime_limit_s
        if limit is not None and longest is not None and limit > longest:
            self.error(
                f"{job.stage}: walltime {walltime(limit)} is above the site's limit {walltime(longest)} ({self.cluster.file}); ask for less"
            )
        estimate = walltime_estimate(row, self.matrix)
        if estimate is None:
            self.report.notes.append(f"{job.stage}: nothing was published for this hardware and length; the walltime is not checked")
            return
        steps = row.phase_recipe.max_steps
        seconds = estimate.hours * 3600 * min(self.run.steps_this_run or steps, steps) / steps
        attempts = 1 if limit is None else max(1, math.ceil(seconds / (limit - warning)))
        text = f"{job.stage}: about {walltime(seconds)} ({estimate.basis})"
        if limit is None or attempts == 1:
            self.report.notes.append(text)
        elif attempts - 1 > restarts:
            self.error(
                f"{text}, but {restarts} requeues of {walltime(limit)} reach only {walltime((restarts + 1) * (limit - warning))}; take more "
                f"nodes, more time, or raise max_restarts in {self.cluster.file}"
            )
        else:
            self.report.notes.append(f"{text}: {attempts} times {walltime(limit)}, it will requeue itself {attempts - 1} times")

    def start(self) -> None:
        """What lies in the run's folder already, and where the first phase starts from it."""
        if not self.phases or self.run.study:
            return
        folder = Path(self.run.folder)
        listed, trained = checkpoints.read_manifest(folder)
        damaged = {entry.file: why for entry in listed if (why := checkpoints.damage(folder / entry.file)) is not None}
        entries = tuple(entry for entry in listed if entry.file not in damaged)
        self.report.warnings += [f"{folder / file} {why}; the training will leave it out" for file, why in damaged.items()]
        loose = checkpoints.unlisted(folder, listed)
        if loose:
            self.report.notes.append(f"{folder}: the manifest does not know {', '.join(loose)}; the training will look into them")
        elif damaged and not entries:
            self.error(f"{folder} holds damaged checkpoints only; restore one, or choose another name for the run")
        else:
            self.report.notes.append(checkpoints.start(folder, entries, self.phases[0], self.run.init_checkpoint))
        differing = [key for key in fitting.SIZES if entries and self.config and trained.get(key) not in (None, self.config[key])]
        if differing:
            assert self.config is not None
            pairs = ", ".join(f"{key} {trained[key]} there, {self.config[key]} here" for key in differing)
            self.error(f"{folder} holds a run of another model ({pairs}); use its config_file, or choose another name for the run")

    def weights(self) -> None:
        """The initial checkpoint."""
        path = self.run.init_checkpoint
        wrong = None if path is None else checkpoints.damage(Path(path))
        if wrong is not None:
            self.error(f"init_checkpoint {path} {wrong}")

    def folders(self) -> None:
        """Whether the output can be written where it belongs."""
        made = [("work folder", self.made)] if self.made is not None else []
        for what, path in (("results folder", self.run.folder), *made):
            there = next(place for place in (Path(path), *Path(path).parents) if place.exists())
            if not there.is_dir():
                self.error(f"{what} {path}: {there} is a file; choose another place")
            elif not os.access(there, os.W_OK | os.X_OK):
                self.error(f"{what} {path}: {there} is not writable by you; choose another place, or ask for the right to write there")

    def site(self) -> None:
        """Image, mounts and Python of the site profile."""
        container, python = self.cluster.container, self.cluster.python
        if container is None:
            if Path(python).is_absolute() and not os.access(python, os.X_OK):
                self.error(f"python {python} of {self.cluster.file} is not there or not executable; name the Python of an environment")
            return
        if container.image.startswith("/"):
            self.place("container.image", container.image, "make it with scripts/docker/build.sh and import.sh")
        if container.squashfs_dir is not None and container.import_to == "shared":
            self.place("container.squashfs_dir", container.squashfs_dir)
        for mount in self.cluster.mounts:  # the job's own folders are looked at where they are used
            self.place("mount", mount.split(":")[0])

    def place(self, what: str, path: str, remedy: str = "make it") -> None:
        """A path that must be there, on this host unless it is on the nodes' own disks."""
        local = self.cluster.local
        if Path(path).exists():
            return
        if local is not None and Path(path).is_relative_to(local):
            self.report.notes.append(f"{what} {path} is on the nodes' own disks: not checked")
        else:
            self.error(f"{what} {path} does not exist on this host; correct {self.cluster.file}, or {remedy}")

    def slurm(self, probe: slurm_limits.Probe) -> None:
        """Partition, nodes, limits and account, where Slurm answers."""
        if isinstance(probe, slurm_limits.NoProbe):
            self.report.notes.append("Slurm was not asked: partition, limits and account are not checked")
            return
        partitions = probe.sinfo()
        accounts = None if partitions is None else probe.associations()
        if partitions is None:
            self.report.notes.append("sinfo does not answer here: partition, limits and account are not checked")
        elif accounts is None:
            self.report.notes.append("sacctmgr does not answer here: account and qos are not checked")
        for job in self.plan.jobs:
            errors, warnings = slurm_limits.job_problems(job, partitions, accounts)
            self.report.errors += errors
            self.report.warnings += warnings
