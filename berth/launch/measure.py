"""Throughput of runs, from their run logs alone (:mod:`berth.runlog`), never from a console.

A step record covers the time of training steps only, so evaluation and checkpoints are not in it; the first steps of every attempt, which
pay for warming up, are left out. The ``run.json`` beside a log tells the hardware.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from berth.errors import ConfigError, DataError
from berth.files import printable_name, read_json
from berth.launch.estimate import flops_per_sequence
from berth.launch.fitting import read_model
from berth.runlog import read_records

WARM_UP_STEPS = 3  # as berth.training.report, which a login node cannot import
LOG = "dllogger.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run log says about how it was made. Batches count sequences; ``seq_len`` is ``None`` where neither log nor recipe tell it."""

    phase: int
    precision: str
    seq_len: int | None
    world_size: int
    micro_batch: int
    accumulation: int
    global_batch: int


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Throughput of one run folder with one set of settings, over all attempts.

    Attributes:
        run: the folder.
        row: ``row`` of its run.json (platform, nodes, ranks_per_node, ...), ``None`` without one.
        settings: precision, batches and so on, as logged.
        steps: optimizer steps measured; 0 when only warm-up steps were logged.
        sequences_per_second: of all GPUs, harmonic mean over the steps (all sequences by all seconds); 0 without steps.
        median, low, high: 50th, 10th and 90th percentile of the logged windows.
        data_wait_share: share of the time spent waiting for data.
        flops_per_sequence: of the job's model, forward and backward; ``None`` where its configuration is no longer there.
    """

    run: str
    row: Mapping[str, Any] | None
    settings: Settings
    steps: int
    sequences_per_second: float
    median: float
    low: float
    high: float
    data_wait_share: float
    flops_per_sequence: float | None


@dataclasses.dataclass(frozen=True)
class Window:
    """One step record: ``steps`` optimizer steps at ``rate`` sequences/s."""

    steps: int
    rate: float
    data_wait_share: float


def measured(run_dirs: Iterable[str | os.PathLike[str]]) -> list[Measurement]:
    """The measurements of run folders, of all runs in a folder, or of run logs: one for every set of settings in a log, in its order.

    Raises :class:`DataError` naming every folder whose log is missing or is none.
    """
    found: list[Measurement] = []
    wrong: list[str] = []
    for log in (log for given in run_dirs for log in _logs(Path(given))):
        try:
            found += _measure(log)
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError("\n  ".join([*wrong, f"give folders of runs (with {LOG}), folders of such folders, or run logs"]))
    return found


def _logs(given: Path) -> list[Path]:
    """The logs meant by an argument; one that is not there stays in, to be reported."""
    if not given.is_dir():
        return [given]
    inside = sorted(given.glob(f"*/{LOG}"))
    return inside if inside and not (given / LOG).exists() else [given / LOG]


def _measure(log: Path) -> list[Measurement]:
    windows: dict[Settings, list[Window]] = {}
    for settings, window in _windows(log):
        windows.setdefault(settings, []).extend([window] if window else [])
    jobs = _jobs(log.parent)
    return [_measurement(printable_name(str(log.parent)), _job_of(settings, jobs), settings, each) for settings, each in windows.items()]


def _windows(log: Path) -> Iterator[tuple[Settings, Window | None]]:
    """Every measured window with its settings; ``None`` once for each attempt, so that one without any is not forgotten."""
    settings: Settings | None = None
    start = last = clean = 0
    for record in read_records(log):
        step, data = record.get("step"), record.get("data")
        if record.get("type") != "LOG" or not isinstance(data, dict):
            continue
        if step == "PARAMETER" and "world_size" in data:
            settings, start, last, clean = _settings(data), 0, 0, 0
            if settings is not None:
                yield settings, None
        elif step == "PARAMETER" and data.get("train_start"):
            start = last = int(data.get("global_step", 0))
        elif settings is None or not data.get("training_sequences_per_second"):
            continue
        elif isinstance(step, list) and len(step) == 2 and "average_loss" in data:
            if last - start >= WARM_UP_STEPS:
                clean += 1
                yield settings, Window(data["steps_averaged"], data["training_sequences_per_second"], data.get("data_wait_share", 0.0))
            last = int(step[1])
        elif step == [] and not clean and data.get("raw_train_time"):  # one long window: its sum at the end leaves the warm-up out
            rate = data["training_sequences_per_second"]
            yield settings, Window(round(rate * data["raw_train_time"] / settings.global_batch), rate, 0.0)


def _settings(data: Mapping[str, Any]) -> Settings | None:
    """``None`` for a log of another program, which lacks some of it."""
    try:
        return Settings(
            data["phase"], data["precision"], data["options"].get("max_seq_length"), data["world_size"], data["batch_size_per_gpu"],
            data["gradient_accumulation_steps"], data["global_batch"],
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError):
        return None


def _jobs(folder: Path) -> list[Mapping[str, Any]]:
    """What the launcher wrote about the jobs of a run folder, oldest first; files that cannot be read are no evidence."""
    files = [path for pattern in ("run.json", "slurm/*.job.json", "slurm/*.run.json") for path in folder.glob(pattern)]
    jobs: list[Mapping[str, Any]] = []
    for path in sorted(files, key=lambda path: (path.stat().st_mtime, path.name)):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            content = read_json(path)
            jobs += [one for one in (*content.get("earlier", {}).values(), content) if isinstance(one.get("row"), dict)]
    return jobs


def _job_of(settings: Settings, jobs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The newest job of this phase with as many ranks; one of the same precision and micro-batch before others."""
    fitting = [
        (job["row"].get("precision") == settings.precision, job["row"].get("micro_batch") == settings.micro_batch, at, job)
        for at, job in enumerate(jobs)
        if job["row"].get("phase") == settings.phase
        and job["row"].get("nodes", 0) * job["row"].get("ranks_per_node", 0) == settings.world_size
    ]
    return max(fitting, key=lambda each: each[:3])[-1] if fitting else None


def _measurement(run: str, job: Mapping[str, Any] | None, settings: Settings, windows: Sequence[Window]) -> Measurement:
    if settings.seq_len is None and job is not None:
        settings = dataclasses.replace(settings, seq_len=job.get("recipe", {}).get("max_seq_length"))
    row, flops = (None, None) if job is None else (job["row"], _flops(job))
    steps = sum(window.steps for window in windows)
    if not steps:
        return Measurement(run, row, settings, 0, 0.0, 0.0, 0.0, 0.0, 0.0, flops)
    seconds = sum(window.steps / window.rate for window in windows)  # by the global batch, which is the same in all
    waiting = sum(window.data_wait_share * window.steps / window.rate for window in windows)
    rates = [window.rate for window in windows]
    tenths = statistics.quantiles(rates, n=10, method="inclusive") if len(rates) > 1 else rates
    middle = statistics.median(rates)
    return Measurement(run, row, settings, steps, steps / seconds, middle, tenths[0], tenths[-1], waiting / seconds, flops)


def _flops(job: Mapping[str, Any]) -> float | None:
    try:
        model, recipe = read_model(Path(job["run"]["config_file"])), job["recipe"]
        return flops_per_sequence(model, recipe["max_seq_length"], recipe["max_predictions_per_seq"])
    except (OSError, ConfigError, KeyError, TypeError):
        return None
