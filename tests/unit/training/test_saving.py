"""Saving beside the loop: what is copied, what waits, what a failure costs, and kill -9 at every moment of a write."""

import errno
import json
import logging
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from berth.errors import CheckpointError
from berth.training.checkpoint import CheckpointStore, read_checkpoint
from berth.training.manifest import read_latest
from berth.training.saving import AsyncSaver, snapshot
from tests.support import ROOT, environment


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "out")
    store.prepare()
    return store


@pytest.fixture
def saver(store):
    saver = AsyncSaver(store)
    yield saver
    saver.close()


def save(saver, step, final=False, tensor=None):
    payload = {"model": {"w": torch.full((50,), float(step)) if tensor is None else tensor}}
    saver.save(payload, step=step, phase=1, phase_step=step, samples=step * 8, final=final)


class Gate:
    """Holds every write of a store until it is opened; fails those whose step is in ``full``."""

    def __init__(self, store, monkeypatch, full=()):
        self.open, self.begun, self.running, self.most = threading.Event(), threading.Semaphore(0), 0, 0
        write = store.save

        def gated(payload, **place):
            self.running += 1
            self.most = max(self.most, self.running)
            self.begun.release()
            assert self.open.wait(20)
            self.running -= 1
            if place["step"] in full:
                raise CheckpointError(f"checkpoint {place['step']} could not be written (full)")
            return write(payload, **place)

        monkeypatch.setattr(store, "save", gated)


def test_snapshot_copies_and_keeps_what_is_shared(tmp_path):
    tied = torch.nn.Parameter(torch.arange(4000.0).view(40, 100))
    flat = torch.arange(1000.0)
    tree = {
        "model": {"embedding": tied, "decoder": tied, "turned": tied.t()},
        "pieces": [flat[:300].view(3, 100), (flat[300:],)],
        "half": torch.arange(5).to(torch.bfloat16)[::2],
        "empty": torch.empty(0, 3, dtype=torch.int64),
        "plain": [1, "x", None, 2.5, True],
    }
    expected = {"tied": tied.detach().clone(), "flat": flat.clone()}
    copy = snapshot(tree)
    with torch.no_grad():
        tied.zero_()
        flat.zero_()
        tree["half"].zero_()
    assert torch.equal(copy["model"]["embedding"], expected["tied"]) and torch.equal(copy["model"]["turned"], expected["tied"].t())
    assert torch.equal(copy["pieces"][0].flatten(), expected["flat"][:300]) and torch.equal(copy["pieces"][1][0], expected["flat"][300:])
    assert copy["half"].tolist() == [0.0, 2.0, 4.0] and copy["half"].dtype == torch.bfloat16
    assert copy["empty"].shape == (0, 3) and copy["empty"].dtype == torch.int64
    assert copy["plain"] == tree["plain"]
    assert type(copy["model"]["embedding"]) is torch.Tensor and not copy["model"]["embedding"].requires_grad
    copy["model"]["decoder"][0, 0] = -1.0
    assert copy["model"]["embedding"][0, 0] == copy["model"]["turned"][0, 0] == -1.0
    torch.save(copy, tmp_path / "copy.pt")
    assert 4 * 5000 < (tmp_path / "copy.pt").stat().st_size < 4 * 5000 + 4000  # each storage once
    assert all(len({id(snapshot(copy)[key]), id(copy[key])}) == 2 for key in ("model", "pieces"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_snapshot_of_a_gpu():
    flat = torch.arange(10**6, device="cuda", dtype=torch.float32)
    copy = snapshot({"a": flat, "b": flat[10:20], "step": torch.tensor(3.0)})
    flat.zero_()
    assert torch.equal(copy["a"], torch.arange(10**6, dtype=torch.float32)) and copy["b"].tolist() == [float(i) for i in range(10, 20)]
    assert copy["a"].device.type == "cpu" and copy["a"].is_pinned()
    assert copy["a"].untyped_storage().data_ptr() == copy["b"].untyped_storage().data_ptr()


def test_a_save_returns_before_it_is_written_and_the_next_one_waits(store, monkeypatch):
    gate, said = Gate(store, monkeypatch), []
    saver = AsyncSaver(store, on_saved=lambda path, seconds: said.append((path.name, seconds, threading.current_thread())))
    save(saver, 5)
    assert gate.begun.acquire(timeout=20)
    assert saver.poll() == [] and store.entries() == []  # the loop reads while the thread writes
    threading.Timer(0.3, gate.open.set).start()
    save(saver, 10)
    saver.wait()
    first, second = saver.poll()
    assert (first.step, first.path, first.error, second.step) == (5, store.folder / "ckpt_5.pt", None, 10)
    assert first.stalled < 0.1 and second.stalled >= 0.2 and first.seconds >= 0.2 and gate.most == 1
    assert said == [(outcome.path.name, outcome.seconds, threading.main_thread()) for outcome in (first, second)]
    assert saver.poll() == [] and [entry.step for entry in store.entries()] == [5, 10]
    assert torch.equal(read_checkpoint(store.folder / "ckpt_10.pt")["model"]["w"], torch.full((50,), 10.0))
    saver.close()


@pytest.mark.parametrize("full", [False, True])
def test_the_copy_is_freed_once_it_is_written_or_has_failed(saver, monkeypatch, full):
    if full:
        monkeypatch.setattr("berth.training.checkpoint.torch.save", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    tensor = torch.zeros(50)
    gone = weakref.ref(tensor)
    save(saver, 5, tensor=tensor)
    del tensor
    saver._join()
    assert bool(saver.poll()[0].error) == full and gone() is None


def test_a_failure_costs_one_checkpoint_and_the_third_in_a_row_the_run(store, saver, monkeypatch, caplog):
    Gate(store, monkeypatch, full=(10, 15, 25, 30, 35)).open.set()
    for step in (5, 10, 15, 20, 25, 30, 35):
        save(saver, step)
    assert [line.getMessage().partition(" could")[0] for line in caplog.records] == [
        "WARNING: checkpoint 10", "WARNING: checkpoint 15", "WARNING: checkpoint 25", "WARNING: checkpoint 30",
    ]  # fmt: skip
    assert "TRAINING GOES ON WITHOUT THIS CHECKPOINT (failure 2 in a row; number 3 ends the run)" in caplog.records[3].getMessage()
    assert all(line.levelno == logging.WARNING for line in caplog.records)
    with pytest.raises(CheckpointError, match="checkpoint 35 could not be written.*Then run again with --resume_from_checkpoint") as raised:
        save(saver, 40)
    assert raised.value.exit_code == 1 and [entry.step for entry in store.entries()] == [5, 20]


def test_a_checkpoint_that_is_only_not_listed_is_not_said_to_be_missing(store, saver, monkeypatch, caplog):
    def refuse(*_arguments):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr("berth.training.checkpoint.write_manifest", refuse)
        save(saver, 5)
        saver.join()
    (line,) = caplog.messages
    assert "ckpt_5.pt is complete but not listed" in line and "TRAINING GOES ON (failure 1 in a row; number 3 ends the run)" in line


@pytest.mark.parametrize("final", [True, False])
def test_the_last_checkpoint_of_a_phase_or_a_run_must_not_fail(store, saver, monkeypatch, final):
    Gate(store, monkeypatch, full=(10,)).open.set()
    save(saver, 5)
    save(saver, 10, final=final)
    if final:  # known before the run's end, too
        saver._join()
        with pytest.raises(CheckpointError, match="checkpoint 10"):
            saver.poll()
    with pytest.raises(CheckpointError, match="checkpoint 10"):
        saver.wait()
    assert [outcome.path is None for outcome in saver.poll()] == [False, True]
    save(saver, 15)
    saver.wait()  # put right


def test_a_full_disk_is_noticed_before_it_is_filled(store, saver, monkeypatch, caplog):
    save(saver, 5)
    saver.wait()
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 150}))
    save(saver, 10)
    saver._join()
    _, failed = saver.poll()
    assert failed.path is None and "200 B are needed, 150 B are free); ckpt_5.pt is intact" in str(failed.error)
    assert "No space left on device" in caplog.text and sorted(path.name for path in store.folder.iterdir()) == [
        ".lock", "ckpt_5.pt", "latest", "manifest.json",
    ]  # fmt: skip


def test_a_bug_in_the_thread_is_the_loops(store, saver, monkeypatch):
    monkeypatch.setattr(store, "save", lambda *_, **__: {}["missing"])
    save(saver, 5)
    with pytest.raises(KeyError, match="missing"):
        saver.wait()


def test_leaving_waits_for_the_write_but_not_for_ever(store, monkeypatch, caplog):
    gate = Gate(store, monkeypatch, full=(10,))
    saver = AsyncSaver(store)
    save(saver, 5)
    saver.close(0.1)
    assert "ckpt_5 is still being written after 0 s and is given up" in caplog.text
    gate.open.set()
    save(saver, 10)
    watchdog = threading.Thread(target=saver.close)
    watchdog.start()
    watchdog.join()
    assert "checkpoint 10 could not be written (full)" in caplog.text and [entry.step for entry in store.entries()] == [5]
    with pytest.raises(CheckpointError, match="checkpoint 10"):
        saver.wait()  # what the loop would be told is still there


# One process that has loaded torch forks one for every kill; it writes nothing but the list of what it killed.
KILLS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from berth.training.checkpoint import CheckpointStore
from berth.training.checkpoint_file import HashingWriter
from berth.training.manifest import read_latest
from berth.training.saving import AsyncSaver

root = Path(sys.argv[1])

def save(saver, step, size=1000):
    payload = {"model": {"w": torch.full((size,), float(step)), "b": torch.full((size,), float(step))}}
    saver.save(payload, step=step, phase=1, phase_step=step, samples=step * 8, final=False)

def opened(folder):
    store = CheckpointStore(folder)
    store.prepare()
    return store

def dies_at(call_number):
    seen = [0]
    def counted(function):
        def call(*arguments, **options):
            seen[0] += 1
            if seen[0] == call_number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call
    for name in ("replace", "rename", "fsync", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    HashingWriter.write = counted(HashingWriter.write)

def forked(work):
    process = os.fork()
    if process == 0:
        work()
        os._exit(0)
    return process

base = root / "base"
def make_base():
    saver = AsyncSaver(opened(base))
    for step in (5, 10, 15):
        save(saver, step)
    saver.wait()
os.waitpid(forked(make_base), 0)

done = []
for scenario, step in (("on", 20), ("back", 7), ("again", 15)):
    for call_number in range(1, 200):
        folder = root / f"{scenario}_{call_number}"
        shutil.copytree(base, folder)
        def work():
            saver = AsyncSaver(opened(folder))
            dies_at(call_number)
            save(saver, step)
            saver.wait()
        _, status = os.waitpid(forked(work), 0)
        done.append({"scenario": scenario, "folder": str(folder), "killed": os.WIFSIGNALED(status), "acknowledged": 0})
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            break
random.seed(5)
for number in range(20):
    folder = root / f"random_{number}"
    reading, writing = os.pipe()
    def work():
        saver = AsyncSaver(opened(folder), on_saved=lambda path, seconds: os.write(writing, f"{path.stem[5:]}\\n".encode()))
        for step in range(1, 10**6):
            save(saver, step, size=30_000)
            saver.poll()
    process = forked(work)
    os.close(writing)
    first = os.read(reading, 100).decode() if number >= 5 else ""  # the others may die before anything is saved
    time.sleep(random.uniform(0.0, 0.15))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with open(reading) as handle:
        steps = (first + handle.read()).split()
    done.append({"scenario": "random", "folder": str(folder), "killed": True, "acknowledged": int(steps[-1]) if steps else 0})
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path_factory.mktemp("kills"))],
        capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


AFTER = {"on": {15, 20}, "back": {15, 5, 7}, "again": {15}}
"""What a run goes on from, depending on the moment: the newest as it was, the one that was gone back to, or the new one."""


@pytest.mark.parametrize("scenario", ["on", "back", "again", "random"])
def test_killed_at_any_moment_a_folder_resumes(killed, scenario):
    cases = [case for case in killed if case["scenario"] == scenario]
    assert len([case for case in cases if case["killed"]]) >= 15
    assert scenario != "random" or len([case for case in cases if case["acknowledged"]]) >= 15
    resumed = set()
    for case in cases:
        store = CheckpointStore(case["folder"])
        left = read_latest(store.folder)
        assert left is None or (store.folder / left).exists()  # as the kill left it, perhaps one behind, never of a file that is gone
        store.prepare()
        entries = store.entries()
        if not entries:
            assert scenario == "random" and case["acknowledged"] == 0
            continue
        payload = store.load(entries[-1])  # the newest is whole, and no checkpoint of the three before is lost
        step = payload["step"]
        assert torch.equal(payload["model"]["w"], torch.full_like(payload["model"]["w"], float(step)))
        assert (store.folder / "latest").read_text() == f"ckpt_{step}.pt\n"
        assert not list(store.folder.glob("*.partial")) and not list(store.folder.glob(".*.partial"))
        assert len(entries) >= (min(step, 3) if scenario == "random" else 1 if scenario == "back" else 3)
        assert step >= case["acknowledged"]
        if case["killed"]:
            resumed.add(step)
        store.save({"model": {}}, step=step + 1, phase=1, phase_step=1, samples=8, final=False)
        assert store.entries()[-1].step == step + 1
        store._lock.release()
    assert scenario == "random" or resumed == AFTER[scenario]
