"""berth.runlog: DLLogger's format, appended over restarts, last word wins."""

import errno
import json
import logging
import os
import resource

import pytest

from berth.errors import DataError
from berth.runlog import RunLog, last_attempt, read_records, read_steps


def test_format_is_dllogger(tmp_path):
    log = RunLog(tmp_path / "log.json")
    log.parameters(train_start=True)
    log.log((0, 1), {"average_loss": 2.5})
    log.log((), {"final_loss": 2.5})
    log.close()
    lines = (tmp_path / "log.json").read_text().splitlines()
    assert all(line.startswith("DLLL {") for line in lines)
    records = [json.loads(line[5:]) for line in lines]
    units = {record["metric"]: record["metadata"]["unit"] for record in records if record["type"] == "METADATA"}
    assert units["training_sequences_per_second"] == "sequences/s" and units["e2e_train_time"] == "s"
    assert (units["tflops_per_device"], units["memory_gib"], units["mfu"]) == ("TFLOP/s", "GiB", "")
    logs = [record for record in records if record["type"] == "LOG"]
    assert [record["step"] for record in logs] == ["PARAMETER", [0, 1], []]
    assert all({"timestamp", "datetime", "elapsedtime"} <= record.keys() for record in records)


def test_restart_appends_and_the_later_attempt_wins(tmp_path):
    path = tmp_path / "log.json"
    first = RunLog(path)
    for step in (1, 2, 3):
        first.log((0, step), {"average_loss": float(step)})
    first.close()
    with open(path, "ab") as handle:
        handle.write(b'DLLL {"type": "LOG", "step": [0, 4], "da')  # killed while writing
    second = RunLog(path)
    assert second.attempt == 2
    second.log((0, 3), {"average_loss": 30.0})
    second.close()
    assert last_attempt(path) == 2
    steps = read_steps(path)
    assert list(steps) == [1, 2, 3]
    assert steps[3] == {"average_loss": 30.0, "attempt": 2} and steps[2]["attempt"] == 1
    assert sum(record["type"] == "METADATA" for record in read_records(path)) == len(
        [line for line in path.read_text().splitlines() if '"METADATA"' in line]
    )


def test_what_a_power_cut_leaves_is_passed_over(tmp_path):
    path = tmp_path / "log.json"
    log = RunLog(path)
    log.log((0, 1), {"average_loss": 1.0})
    log.close()
    for tail in (b"DL", b"\0" * 40, b"DLLL [1", b"\xff\xfe"):
        with open(path, "ab") as handle:
            handle.write(tail)
        attempt = last_attempt(path)
        log = RunLog(path)
        assert log.attempt == attempt + 1
        log.log((0, attempt + 1), {"average_loss": 1.0})
        log.close()
    assert list(read_steps(path)) == [1, 2, 3, 4, 5]


def test_going_back_voids_what_was_logged_after(tmp_path):
    path = tmp_path / "log.json"
    for start, last in ((0, 9), (4, 6)):
        log = RunLog(path)
        log.parameters(train_start=True, global_step=start)
        for step in range(start + 1, last + 1):
            log.log((0, step), {"average_loss": float(start)})
        log.close()
    steps = read_steps(path)
    assert list(steps) == [1, 2, 3, 4, 5, 6] and steps[5]["average_loss"] == 4.0


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x").write_text("step 1 loss 3\n")
    with pytest.raises(DataError, match=r"x is not a run log.*DLLL"):
        list(read_records(tmp_path / "x"))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(tmp_path / "absent"))


def test_a_full_disk_costs_records_and_two_warnings(tmp_path, caplog):
    """A real refusal: the system takes a part of a line, then nothing. Twice."""
    path = tmp_path / "log.json"
    log = RunLog(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for start in (0, 10):
        log.log((0, start + 1), {"average_loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, hard))
        try:
            for step in range(start + 2, start + 5):
                log.log((0, step), {"average_loss": 2.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not path.read_bytes().endswith(b"\n")
        log.log((0, start + 5), {"average_loss": 3.0})
    log.close()
    assert caplog.messages == [
        f"WARNING: run log {path} cannot be written (File too large). TRAINING GOES ON WITHOUT ITS RECORDS",
        f"run log {path} can be written again; 3 record(s) are lost",
    ] * 2  # fmt: skip
    assert list(read_steps(path)) == [1, 5, 11, 15] and path.read_bytes().endswith(b"\n")


def test_a_disk_that_stays_full_until_the_end(tmp_path, monkeypatch, caplog):
    path = tmp_path / "log.json"
    log = RunLog(path)
    log.log((0, 1), {"average_loss": 1.0})
    before, close = path.read_bytes(), os.close

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def late(descriptor):
        close(descriptor)
        full()

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(os, "close", late)
    with caplog.at_level(logging.WARNING):
        for step in (2, 3):
            log.log((0, step), {"average_loss": 1.0})
        log.close()
        log.close()
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [message.split(str(path))[0] for message in caplog.messages] == [
        "WARNING: run log ", "WARNING: the last 2 record(s) of run log ", "WARNING: the last records of run log ",
    ]  # fmt: skip


def test_a_log_that_cannot_be_opened(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "log.json", tmp_path):
        with pytest.raises(DataError, match=r"run log .* cannot be opened \(.*choose another --json-summary"):
            RunLog(path)


def test_ranks_without_a_path_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None)
    log.log((0, 1), {"average_loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []
