"""TensorBoard on a disk that refuses: warnings, gaps, never an error."""

import resource
import threading
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from berth.errors import DataError
from berth.training import board
from berth.training.board import Board


def curve(folder, name):
    found = EventAccumulator(str(folder))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_curves_stop_and_go_on(tmp_path, monkeypatch, caplog):
    """A real refusal in TensorBoard's thread."""
    curves = Board(str(tmp_path), 0)
    curves.add({"train/loss": 1.0, "train/rate": 5.0}, 1)
    curves._writer.flush()
    (file,) = tmp_path.iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, hard))
    try:
        end = time.monotonic() + 10
        while curves._writer is not None and time.monotonic() < end:
            curves.add({"train/loss": 2.0}, 2)
            time.sleep(0.01)
        monkeypatch.setattr(board, "RETRY_SECONDS", 0.0)
        curves._next_try = 0.0
        curves.add({"train/loss": 3.0}, 3)
        assert curves._writer is None and list(tmp_path.iterdir()) == [file], "no empty files"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    curves.add({"train/loss": 4.0}, 4)
    curves.close()
    curves.close()
    first, second = caplog.messages
    assert first == (
        f"WARNING: TensorBoard's file in {tmp_path} cannot be written ([Errno 27] File too large). TRAINING GOES ON WITHOUT CURVES"
    )
    assert second == f"TensorBoard's files in {tmp_path} can be written again; 2 or more points of every curve are lost"
    assert curve(tmp_path, "train/loss") == [(1, 1.0), (4, 4.0)] and curve(tmp_path, "train/rate") == [(1, 5.0)]


def test_a_refusal_at_the_end(tmp_path, caplog, monkeypatch):
    """No traceback of TensorBoard's thread; other threads have theirs."""
    told = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: told.append(failure.thread.name))
    before = threading.excepthook
    curves = Board(str(tmp_path), 0)
    (file,) = tmp_path.iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, hard))
    try:
        curves.add({"train/loss": 1.0}, 1)
        worker = threading.Thread(target=lambda: 1 / 0, name="other")
        worker.start()
        worker.join()
        curves.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in caplog.text and told == ["other"] and threading.excepthook is before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--tensorboard_dir .*file/tb cannot be written"):
        Board(str(tmp_path / "file" / "tb"), 0)
