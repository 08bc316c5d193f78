"""The run log: JSON lines in DLLogger's format, appended across restarts. Reports read only this.

Every line is ``DLLL {json}``. A ``LOG`` record has ``step`` (``"PARAMETER"``, ``[epoch, global_step]`` or ``[]`` for the
summary) and ``data``; a ``METADATA`` record declares a metric's unit (FEATURES 1.2.7). berth adds one top-level key,
``attempt``: 1 for the first process that wrote to the file, one more for each restart. After a crash the steps since the
last checkpoint appear again under a higher attempt; :func:`read_steps` keeps the last word on every step.

A disk that is full, or gone for a while, costs records and a warning, not the run. Nothing is buffered: what was refused is lost.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from berth.errors import DataError

logger = logging.getLogger(__name__)

PREFIX = "DLLL "

UNITS: dict[str, str] = {
    "e2e_train_time": "s",
    "raw_train_time": "s",
    "training_sequences_per_second": "sequences/s",
    "tokens_per_second": "tokens/s",
    "final_loss": "nat",
    "average_loss": "nat",
    "step_loss": "nat",
    "mlm_loss": "nat",
    "nsp_loss": "nat",
    "mlm_accuracy": "",
    "learning_rate": "",
    "grad_norm": "",
    "share_data": "",
    "share_forward": "",
    "share_backward": "",
    "share_communication": "",
    "share_optimizer": "",
    "share_other": "",
    "data_wait_share": "",
    "mfu": "",
    "tflops_per_device": "TFLOP/s",
    "memory_gib": "GiB",
    "slowest_rank_ratio": "",
}


class RunLog:
    """Appends records to one JSON-lines file; with ``path=None`` (ranks other than 0) it does nothing.

    Args:
        path: the file; its folder is made. A half-written last line of a killed process is closed with a newline.
        start_time: ``time.monotonic()`` that ``elapsedtime`` counts from; now by default.

    Raises :class:`DataError` when the file cannot be opened, or is something else. Writing raises nothing.
    """

    def __init__(self, path: str | os.PathLike[str] | None, start_time: float | None = None) -> None:
        self.start_time = time.monotonic() if start_time is None else start_time
        self.path = None if path is None else Path(path)
        self.attempt = 1
        self._descriptor: int | None = None
        self._torn = False  # the file does not end with a newline
        self._lost = 0  # records since writing worked last
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            size = os.fstat(self._descriptor).st_size
            self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        except OSError as error:
            raise DataError(f"run log {self.path} cannot be opened ({error.strerror}); choose another --json-summary") from error
        if size:
            self.attempt = last_attempt(self.path) + 1
        if self.attempt == 1:
            for metric, unit in UNITS.items():
                self._write({"type": "METADATA", "metric": metric, "metadata": {"unit": unit}})

    def log(self, step: str | tuple[int, ...], data: dict[str, Any]) -> None:
        """Write one record and hand it to the operating system at once; a warning when that refuses."""
        self._write({"type": "LOG", "step": step, "data": data})

    def parameters(self, **data: Any) -> None:
        """Write facts about the run (``step="PARAMETER"``)."""
        self.log("PARAMETER", data)

    def _write(self, record: dict[str, Any]) -> None:
        if self._descriptor is None:
            return
        now = time.time()
        stamp = {
            "timestamp": f"{now * 1000:.0f}",
            "datetime": datetime.datetime.fromtimestamp(now).isoformat(sep=" ", timespec="milliseconds"),
            "elapsedtime": f"{time.monotonic() - self.start_time:.6f}",
            "attempt": self.attempt,
        }
        line = PREFIX + json.dumps({**stamp, **record}, allow_nan=True)
        try:
            self._put(self._descriptor, (b"\n" if self._torn else b"") + line.encode() + b"\n")
        except OSError as error:
            if not self._lost:
                logger.warning(
                    "WARNING: run log %s cannot be written (%s). TRAINING GOES ON WITHOUT ITS RECORDS", self.path, error.strerror
                )
            self._lost += 1
            return
        if self._lost:
            logger.warning("run log %s can be written again; %d record(s) are lost", self.path, self._lost)
            self._lost = 0

    def _put(self, descriptor: int, data: bytes) -> None:
        """All of ``data``; remembers how the file ends when the disk takes only a part."""
        while data:
            written = os.write(descriptor, data)
            if written:
                self._torn = data[written - 1 : written] != b"\n"
            data = data[written:]

    def close(self) -> None:
        """Close; later records are dropped."""
        if self._descriptor is None:
            return
        if self._lost:
            logger.warning("WARNING: the last %d record(s) of run log %s are lost", self._lost, self.path)
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.close(descriptor)
        except OSError as error:  # file servers say at the end what they could not keep
            logger.warning("WARNING: the last records of run log %s may be lost (%s)", self.path, error.strerror)


def read_records(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of a run log in file order.

    What a crash or a power cut leaves (a line cut short, zero bytes) is passed over. Raises :class:`DataError` when the file is
    missing, or holds something but no record at all.
    """
    good = bad = 0
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            for line in handle:
                record = _parse(line)
                if record is not None:
                    good += 1
                    yield record
                elif line.strip("\0 \t\r\n"):
                    bad += 1
    except OSError as error:
        raise DataError(f"run log {path} cannot be read: {error.strerror}") from error
    if bad and not good:
        raise DataError(f"{path} is not a run log: none of its lines starts with {PREFIX!r}; choose another --json-summary")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line[len(PREFIX) :]) if line.startswith(PREFIX) else None
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def last_attempt(path: str | os.PathLike[str]) -> int:
    """Highest attempt number in a run log, 0 when it holds no record."""
    return max((int(record.get("attempt", 1)) for record in read_records(path)), default=0)


def read_steps(path: str | os.PathLike[str]) -> dict[int, dict[str, Any]]:
    """``{global_step: data}`` of all training-step records, sorted by step.

    An attempt that started at step ``g`` voids what earlier attempts logged after ``g``.
    """
    steps: dict[int, dict[str, Any]] = {}
    for record in read_records(path):
        step = record.get("step")
        if step == "PARAMETER" and record["data"].get("train_start") and "global_step" in record["data"]:
            start = int(record["data"]["global_step"])
            steps = {number: data for number, data in steps.items() if number <= start}
        if record.get("type") == "LOG" and isinstance(step, list) and len(step) == 2 and "average_loss" in record["data"]:
            steps[int(step[1])] = {**record["data"], "attempt": record.get("attempt", 1)}
    return dict(sorted(steps.items()))
