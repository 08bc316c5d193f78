"""berth.runlog: DLLogger's format, appended over restarts, last word wins."""

import json

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


def test_ranks_without_a_path_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None)
    log.log((0, 1), {"average_loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []
