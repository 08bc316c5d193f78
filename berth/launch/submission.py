"""Handing jobs over: to ``sbatch``, to ``sbatch`` through submitit, or to this machine; and asking what became of them.

In: a :class:`~berth.launch.plan.Plan`. Out: a :class:`Submission`. What was handed over stands in ``<run>/slurm/submission.json``, from which
:func:`status` and :func:`cancel` work later. Each job waits for the one before (``afterok``) and is cancelled when that one fails.

submitit: its executor writes, submits and follows; the script is ours (:mod:`berth.launch.render`), with submitit's own reporter as its last
line, so that ``result()`` gives what :func:`outcome` returns, or raises for a job that failed.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from berth.errors import ConfigError, LaunchError
from berth.files import atomic_open, read_json, write_json
from berth.launch import render
from berth.launch.clusters import ROOT
from berth.launch.plan import Job, Plan
from berth.launch.provenance import git_state
from berth.launch.slurm_commands import LIVE, NO_SLURM, ask, attempt, command, one_line, outside_of_jobs, state_of
from berth.processes import raise_for, run_command
from berth.runlog import read_records

BACKENDS = ("sbatch", "submitit", "local")
SUBMISSION = "submission.json"


@dataclasses.dataclass(frozen=True)
class SubmittedJob:
    """One job that was handed over. ``handle``: a ``submitit.SlurmJob`` of the backend submitit, else ``None``."""

    stage: str
    name: str
    job_id: str
    script: str
    handle: Any = None


@dataclasses.dataclass(frozen=True)
class Submission:
    """A chain that was handed over. ``skipped``: stages that were complete already."""

    folder: Path
    backend: str
    jobs: tuple[SubmittedJob, ...]
    skipped: tuple[str, ...] = ()


def submit(plan: Plan, backend: str = "sbatch", *, after: str | None = None, after_kind: str = "afterok") -> Submission:
    """Hand the jobs of a plan over, in order, each after the one before.

    Args:
        backend: ``sbatch``; ``submitit``, whose jobs come with handles; ``local``, which runs them here, one after the other, and returns
            when all have ended.
        after: a job the first one waits for, under ``after_kind`` (``afterok``, ``afterany``).

    Raises:
        ConfigError: for an unknown backend, or when jobs of this run are still in the queue.
        LaunchError: when a job is refused, or one that ran here failed. Jobs submitted before it are cancelled again.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    folder = Path(plan.run.folder)
    live = [job for job in _known(folder) if state_of(job["job_id"]) in LIVE]
    if live:
        ids = ", ".join(f"{job['stage']} {job['job_id']}" for job in live)
        raise ConfigError(f"jobs of the run {folder} are still in the queue ({ids}); cancel them first, or wait")
    skipped = tuple(job.stage for job in plan.jobs if complete(job))
    jobs = [job for job in plan.jobs if job.stage not in skipped]
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    send = {"sbatch": _sbatch, "submitit": _submitit, "local": _local}[backend]
    done: list[SubmittedJob] = []
    earlier = _submissions(folder)
    try:
        _remember(Submission(folder, backend, (), skipped), earlier)
        for job in jobs:
            done.append(send(job, render.sbatch_options(after, after_kind)))
            after, after_kind = done[-1].job_id, "afterok"
            _remember(Submission(folder, backend, tuple(done), skipped), earlier)  # at once: what is in the queue must be known
    except BaseException:
        if done and backend != "local":
            attempt(["scancel", *(job.job_id for job in reversed(done))])
        raise
    return Submission(folder, backend, tuple(done), skipped)


def complete(job: Job) -> bool:
    """Whether the manifest in the run's folder says that this phase has ended already. Scaling runs never are."""
    if not job.stage.startswith("phase"):
        return False
    try:
        entries = read_json(Path(job.folder) / "manifest.json")["checkpoints"]
        phase, steps = job.record["row"]["phase"], job.record["recipe"]["max_steps"]
        return any(entry["final"] and (entry["phase"], entry["phase_step"]) == (phase, steps) for entry in entries)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(path: Path, text: str) -> Path:
    with atomic_open(path) as handle:
        handle.write(text)
    return path


def with_revision(job: Job) -> Job:
    """The job with the revision of the project in its record."""
    return dataclasses.replace(job, record={**job.record, "git": git_state(ROOT)})


def _sbatch(job: Job, options: Sequence[str]) -> SubmittedJob:
    script = _write(Path(job.state) / f"{job.stage}.sbatch", render.sbatch_text(with_revision(job)))
    with outside_of_jobs():
        answer = command(["sbatch", "--parsable", *options, str(script)])
    return SubmittedJob(job.stage, job.name, answer.strip().partition(";")[0], str(script))


def _local(job: Job, options: Sequence[str]) -> SubmittedJob:
    code = run_local(job)
    if code:
        raise_for(job.stage, code)
    return SubmittedJob(job.stage, job.name, "local", str(_local_script(job)))


def run_local(job: Job) -> int:
    """Run a job on this machine, now, with this terminal; its exit code (128 + signal after Ctrl-C or SIGTERM)."""
    script = _local_script(job)
    script.parent.mkdir(parents=True, exist_ok=True)
    return run_command(("bash", str(_write(script, render.local_text(with_revision(job))))))


def _local_script(job: Job) -> Path:
    return Path(job.state) / f"{job.stage}.sh"


def _submitit(job: Job, options: Sequence[str]) -> SubmittedJob:
    if shutil.which("sbatch") is None or shutil.which("srun") is None:  # submitit asks for srun when it is made
        raise LaunchError(NO_SLURM.format("sbatch or srun"))
    executor = _executor(with_revision(job), options)
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with outside_of_jobs():
            handle = executor.submit(outcome, job.stage, job.folder)
    except (FailedJobError, FailedSubmissionError) as error:  # sbatch failed, in its own words; or its answer has no number
        raise LaunchError(f"sbatch through submitit: {one_line(str(error))}") from error
    return SubmittedJob(job.stage, job.name, handle.job_id, str(handle.paths.submission_file), handle)


def _executor(job: Job, options: Sequence[str]) -> Any:
    """submitit's Slurm executor with our script in the place of its own. Raises :class:`ConfigError` where submitit is missing."""
    try:
        from submitit.slurm.slurm import SlurmExecutor
    except ImportError as error:
        raise ConfigError("the backend submitit needs the package submitit: pip install submitit, or use --backend sbatch") from error

    class Executor(SlurmExecutor):
        def _make_submission_file_text(self, command: str, uid: str) -> str:
            log = f"{str(self.folder).replace('%', '%%')}/%j_0_log.out"
            return render.sbatch_text(job, log=log, epilogue=["env", "SUBMITIT_EXECUTOR=slurm", *shlex.split(command)])

        def _num_tasks(self) -> int:
            return 1  # the batch shell reports, once

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            return ["sbatch", *options, str(submission_file_path)]

    folder = Path(job.state) / "submitit"
    folder.mkdir(parents=True, exist_ok=True)
    return Executor(folder, max_num_timeout=0, python=shlex.quote(job.cluster.host_python or sys.executable))


def outcome(stage: str, folder: str) -> dict[str, Any]:
    """What ``submitit.Job.result()`` gives: stage, exit code, newest checkpoint, final loss. Called by the batch shell when a job has ended.

    Raises :class:`LaunchError` for a job that failed.
    """
    code, how = int(os.environ.get("BERTH_EXIT_CODE", "0")), os.environ.get("BERTH_OUTCOME", "done")
    if code:
        raise LaunchError(f"stage {stage} of {folder} {how} with exit code {code}; its log says why")
    newest, loss = progress(Path(folder))
    return {"stage": stage, "folder": folder, "exit_code": code, "checkpoint": newest, "final_loss": loss}


def progress(folder: Path) -> tuple[str | None, float | None]:
    """Newest checkpoint and last logged loss of a run; ``None`` where there is none yet."""
    try:
        newest = read_json(folder / "manifest.json")["checkpoints"][-1]["file"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        newest = None
    loss = None
    if (folder / "dllogger.json").is_file():
        losses = [
            record["data"]["average_loss"] for record in read_records(folder / "dllogger.json") if "average_loss" in record.get("data", {})
        ]
        loss = losses[-1] if losses else None
    return newest, loss


# ------------------------------------------------------------------------------------------------------------- afterwards


def _remember(submission: Submission, earlier: Sequence[dict[str, Any]]) -> None:
    """Write ``submission.json``: the ``earlier`` ones and this."""
    path = submission.folder / "slurm" / SUBMISSION
    jobs = [{"stage": job.stage, "name": job.name, "job_id": job.job_id, "script": job.script} for job in submission.jobs]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    entry = {"time": now, "backend": submission.backend, "jobs": jobs, "skipped": list(submission.skipped)}
    write_json(path, {"submissions": [*earlier, entry]})


def _submissions(folder: Path) -> list[dict[str, Any]]:
    try:
        return list(read_json(folder / "slurm" / SUBMISSION)["submissions"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LaunchError(f"{folder / 'slurm' / SUBMISSION} cannot be read ({error}); move it away to go on") from error


def _known(folder: Path) -> list[dict[str, Any]]:
    """The jobs of the newest submission that went to Slurm."""
    sent = [entry for entry in _submissions(folder) if entry["backend"] != "local" and entry["jobs"]]
    return list(sent[-1]["jobs"]) if sent else []


@dataclasses.dataclass(frozen=True)
class JobStatus:
    """What Slurm says of a job. ``reason``: why it waits, or the exit code of one that ended."""

    stage: str
    job_id: str
    state: str
    reason: str
    elapsed: str
    nodes: str


def status(folder: Path) -> list[JobStatus]:
    """The jobs of a run's newest submission, now. Raises :class:`LaunchError` when nothing was submitted from this folder."""
    jobs = _known(folder)
    if not jobs:
        raise LaunchError(f"{folder} holds no submission to Slurm (slurm/{SUBMISSION}); give the folder of a run")
    found = []
    for job in jobs:
        state, reason, elapsed, nodes = ask(job["job_id"])
        found.append(JobStatus(job["stage"], job["job_id"], state, reason, elapsed, nodes))
    return found


def cancel(folder: Path) -> list[str]:
    """Cancel what is still in the queue, last of the chain first; the numbers of the jobs. A cancelled job is not requeued."""
    live = [job["job_id"] for job in reversed(_known(folder)) if state_of(job["job_id"]) in LIVE]
    if live:
        command(["scancel", *live])
    return live
