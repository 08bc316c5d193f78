"""Checkpoints: complete or absent, checked, rotated over restarts, and never lost to a damaged one."""

import contextlib
import errno
import json
import logging
import os
import resource
import threading

import pytest
import torch

from berth import files
from berth.errors import CheckpointError
from berth.training.checkpoint import CheckpointStore, Entry, UnlistedError, read_checkpoint
from berth.training.checkpoint_file import UnreadableError, check_bytes


def save(store, step, phase=1, final=False, value=None):
    payload = {"model": {"w": torch.full((50,), float(step if value is None else value))}, "optimizer": {"state": {}, "param_groups": []}}
    return store.save(payload, step=step, phase=phase, phase_step=step, samples=step * 8, final=final)


def steps(store):
    return [entry.step for entry in store.entries()]


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "out")
    store.prepare()
    return store


def newest(store):
    while True:
        entry = store.entries()[-1]
        try:
            return store.load(entry), entry
        except CheckpointError as error:
            store.pass_over(entry, error)


def test_round_trip(store):
    path = save(store, 5)
    payload = read_checkpoint(path)
    assert (payload["step"], payload["phase"], payload["samples"], payload["final"]) == (5, 1, 40, False)
    assert torch.equal(payload["model"]["w"], torch.full((50,), 5.0))
    manifest = json.loads((store.folder / "manifest.json").read_text())
    item = manifest["checkpoints"][0]
    assert (
        "config" in manifest
        and item["file"] == "ckpt_5.pt"
        and item["sha256"] == files.sha256_file(path)
        and item["bytes"] == path.stat().st_size
    )


def test_three_newest_stay_over_restarts_and_phase_ends_for_ever(store):
    for step in (5, 10, 15):
        save(store, step)
    save(store, 20, final=True)
    again = CheckpointStore(store.folder)  # a new process
    for step in (25, 30, 35, 40):
        save(again, step, phase=2)
    assert steps(again) == [20, 30, 35, 40]
    assert sorted(p.name for p in store.folder.glob("*.pt")) == ["ckpt_20.pt", "ckpt_30.pt", "ckpt_35.pt", "ckpt_40.pt"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_newest_checkpoint_is_passed_over(store, damage):
    save(store, 5)
    path = save(store, 10)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes({"truncate": bytes(data[:-100]), "flip": bytes(data), "empty": b""}[damage])
    with pytest.raises(CheckpointError, match="ckpt_10.pt"):
        store.load(store.entries()[-1])
    payload, entry = newest(CheckpointStore(store.folder))
    assert entry.step == 5 and payload["step"] == 5


def test_all_damaged_is_an_error_not_a_fresh_start(store):
    save(store, 5).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="every checkpoint .* is damaged"):
        newest(store)


def test_the_window_between_rename_and_manifest(store):
    save(store, 5)
    manifest = (store.folder / "manifest.json").read_bytes()
    save(store, 10)
    (store.folder / "manifest.json").write_bytes(manifest)  # killed before the manifest was written
    again = CheckpointStore(store.folder)
    payload, entry = newest(again)
    assert entry.step == 10 and entry.sha256 == "" and entry.samples == 80 and payload["step"] == 10
    (store.folder / "manifest.json").write_text("{ half")
    assert steps(CheckpointStore(store.folder)) == [5, 10]


def test_unlisted_damaged_and_foreign_files_do_not_disturb(store, caplog):
    save(store, 5)
    (store.folder / "ckpt_99.pt").write_bytes(b"PK half a zip")
    (store.folder / "best.pt").write_bytes(b"something else")
    torch.save({"model": {}}, store.folder / "ckpt_7.pt")
    with caplog.at_level(logging.WARNING):
        assert steps(CheckpointStore(store.folder)) == [5]
    assert "ckpt_99.pt" in caplog.text and "ckpt_7.pt" in caplog.text


def test_full_disk_keeps_what_was_there(store, monkeypatch):
    save(store, 5)
    before = sorted(os.listdir(store.folder))

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"ckpt_10.pt could not be written.*No space left.*ckpt_5.pt is intact"):
        save(store, 10)
    assert sorted(os.listdir(store.folder)) == before
    assert newest(store)[1].step == 5


def latest(store):
    path = store.folder / "latest"
    return path.read_text() if path.exists() else None


def test_latest_names_the_newest_good_checkpoint(store):
    assert latest(store) is None
    for step in (5, 10, 15):
        save(store, step)
        assert latest(store) == f"ckpt_{step}.pt\n"
    again = CheckpointStore(store.folder, keep=1)
    again.pass_over(again.entries()[-1], CheckpointError("damaged"))
    assert latest(again) == "ckpt_10.pt\n"
    save(again, 7, value=-1)  # sets 10 and the damaged 15 aside, rotates 5 out
    assert latest(again) == "ckpt_7.pt\n" and [path.name for path in store.folder.glob("ckpt*.pt")] == ["ckpt_7.pt"]
    with pytest.raises(CheckpointError, match="every checkpoint"):
        again.pass_over(again.entries()[-1], CheckpointError("damaged"))
    assert latest(again) is None
    store._lock.release()
    CheckpointStore(store.folder).prepare()  # somebody put things right
    assert latest(store) == "ckpt_7.pt\n"


def test_latest_that_cannot_be_written_costs_a_warning_only(store, caplog, monkeypatch):
    save(store, 5)
    replace = os.replace

    def refuse(source, target):
        if str(target).endswith("latest"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refuse)
    save(store, 10)
    assert steps(store) == [5, 10] and latest(store) is None and "latest could not be brought up to date" in caplog.text


def test_what_cannot_fit_is_not_begun(store, monkeypatch):
    save(store, 5)
    before = {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 201}))  # 50 floats are 200 bytes, 202 with the rest
    monkeypatch.setattr("berth.training.checkpoint.torch.save", None)
    with pytest.raises(CheckpointError, match=r"No space left on device: 200 B are needed, 201 B are free\); ckpt_5.pt is intact"):
        save(store, 10)
    assert {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before


def test_tied_weights_count_and_are_stored_once(store, monkeypatch):
    weight = torch.arange(1000.0)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 4040}))
    path = store.save(
        {"model": {"a": weight, "b": weight[:10], "c": [weight]}}, step=1, phase=1, phase_step=1, samples=8, final=False
    )  # fmt: skip
    assert path.stat().st_size < 6500


def test_a_write_that_breaks_off_says_what_the_disk_said(store):
    """A real refusal in the middle of the file: torch itself reports a position in a zip."""
    save(store, 5)
    before = sorted(os.listdir(store.folder))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"ckpt_10.pt could not be written \(\[Errno 27\] File too large\); ckpt_5.pt is intact"):
            store.save({"model": {"w": torch.zeros(10**6)}}, step=10, phase=1, phase_step=10, samples=80, final=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(store.folder)) == before and newest(store)[1].step == 5


def test_an_unlisted_file_is_held_against_its_own_crcs(store):
    path = save(store, 5)
    (store.folder / "manifest.json").unlink()
    data = bytearray(path.read_bytes())
    at = data.index(torch.full((50,), 5.0).numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    again = CheckpointStore(store.folder)
    with pytest.raises(CheckpointError, match=r"ckpt_5.pt is damaged: .*data/0 in it does not match its CRC"):
        again.load(again.entries()[0])


@pytest.mark.parametrize("lost", ["the newest entry", "the manifest", "latest"])
def test_a_start_brings_the_lists_up_to_date(store, lost):
    """Also the start of a run that finds everything done and saves nothing more."""
    for step in (1, 2, 3, 4):
        save(store, step, final=step == 4)
    manifest = store.folder / "manifest.json"
    before = json.loads(manifest.read_text())
    if lost == "the newest entry":
        manifest.write_text(json.dumps({**before, "checkpoints": before["checkpoints"][:-1]}))
    elif lost == "the manifest":
        manifest.unlink()
    (store.folder / "latest").write_text("ckpt_3.pt\n")
    store.prepare()
    assert json.loads(manifest.read_text())["checkpoints"] == before["checkpoints"]
    assert (store.folder / "latest").read_text() == "ckpt_4.pt\n"


def test_a_start_does_not_list_what_is_damaged(store):
    save(store, 1)
    path = save(store, 2)
    (store.folder / "manifest.json").unlink()
    path.write_bytes(path.read_bytes()[:-40])
    store.prepare()
    assert [item["file"] for item in json.loads((store.folder / "manifest.json").read_text())["checkpoints"]] == ["ckpt_1.pt"]
    assert steps(store) == [1] and (store.folder / "latest").read_text() == "ckpt_1.pt\n"


def test_no_flipped_bit_in_an_unlisted_file_escapes_as_another_error(store):
    """Found by the soak test: names, versions and flags inside the archive have errors of their own in Python's zip reader."""
    path = save(store, 5)
    whole = path.read_bytes()
    for at in range(0, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with contextlib.suppress(CheckpointError):
            check_bytes(path, None)


def test_a_manifest_with_values_of_the_wrong_type_is_no_manifest(store, caplog):
    save(store, 5)
    path = store.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["checkpoints"][0]["phase"] = "1"
    path.write_text(json.dumps(manifest))
    assert [entry.sha256 for entry in CheckpointStore(store.folder).entries()] == [""]
    assert "phase of the wrong type" in caplog.text


def test_going_back_keeps_the_configuration(store, monkeypatch):
    for step in (5, 10):
        store.save({"model": {}, "config": {"hidden_size": 8}}, step=step, phase=1, phase_step=step, samples=step, final=False)
    again = CheckpointStore(store.folder)
    monkeypatch.setattr(again, "_enter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(again, 5)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest["config"] == {"hidden_size": 8} and manifest["checkpoints"] == []


def test_a_file_that_has_gone_is_a_checkpoint_error(store):
    save(store, 5).unlink()
    entry = Entry("ckpt_5.pt", 5, 1, 5, 40, "0" * 64, 10, False, False)
    with pytest.raises(CheckpointError, match="ckpt_5.pt does not exist"):
        store.load(entry)


def test_leftovers_are_removed_at_the_start(store):
    ours = [".ckpt_3.pt.1.partial", ".manifest.json.n01.7.partial", ".latest.n01.7.partial"]
    other = ".pytorch_model.bin.n01.7.partial"  # convert_checkpoint.py at work
    for name in [*ours, other]:
        (store.folder / name).write_bytes(b"half")
    store.prepare()
    assert sorted(os.listdir(store.folder)) == [".lock", other]


def test_going_back_sets_the_abandoned_branch_aside(store):
    for step in (5, 10, 15):
        save(store, step)
    save(store, 7, value=-1)  # resumed from 5 with --resume_step
    assert steps(store) == [5, 7]
    assert sorted(p.name for p in store.folder.glob("*.pt")) == [
        "ckpt_5.pt",
        "ckpt_7.pt",
        "superseded_1_ckpt_10.pt",
        "superseded_1_ckpt_15.pt",
    ]


@pytest.mark.parametrize("kill_at", ["replace", "manifest"])
def test_killed_while_writing_after_going_back(store, monkeypatch, kill_at):
    """The window between rename and manifest must not bring the abandoned branch back."""
    for step in (5, 10, 15):
        save(store, step)
    again = CheckpointStore(store.folder)

    def killed(*_arguments):
        raise KeyboardInterrupt

    if kill_at == "manifest":
        monkeypatch.setattr(again, "_enter", killed)
    else:
        monkeypatch.setattr("berth.training.checkpoint.torch.save", killed)
    with pytest.raises(KeyboardInterrupt):
        save(again, 7, value=-7)
    monkeypatch.undo()
    payload, entry = newest(CheckpointStore(store.folder))
    assert (entry.step, float(payload["model"]["w"][0])) == ((7, -7.0) if kill_at == "manifest" else (5, 5.0))


def test_killed_while_writing_over_a_damaged_one(store, monkeypatch):
    save(store, 5)
    path = save(store, 10)
    path.write_bytes(path.read_bytes()[:-9])
    again = CheckpointStore(store.folder)
    assert newest(again)[1].step == 5
    monkeypatch.setattr(again, "_enter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(again, 10)
    assert newest(CheckpointStore(store.folder))[1].step == 10


def test_a_phase_end_is_never_overwritten(store):
    save(store, 10, final=True)
    with pytest.raises(CheckpointError, match="is the end of phase 1"):
        save(CheckpointStore(store.folder), 10, phase=2)
    assert newest(store)[1].phase == 1


def test_only_foreign_or_damaged_files(store):
    (store.folder / "ckpt_7038.pt").write_bytes(b"PK of another program")
    assert store.entries() == [] and store.unusable == ["ckpt_7038.pt"]


def test_one_writer_a_folder(store, monkeypatch):
    monkeypatch.setattr("berth.training.checkpoint.LOCK_WAIT_SECONDS", 0.0)
    with pytest.raises(CheckpointError, match="another run is writing"):
        CheckpointStore(store.folder).prepare()
    store._lock.release()
    store.prepare()


def test_a_wait_for_the_lock_says_for_whom(store, monkeypatch, caplog):
    monkeypatch.setattr("berth.training.checkpoint.LOCK_WAIT_SECONDS", 20.0)
    monkeypatch.setattr(files, "WORD_SECONDS", 0.2)
    threading.Timer(0.5, store._lock.release).start()
    again = CheckpointStore(store.folder)
    again.prepare()
    (line,) = [message for message in caplog.messages if "waiting" in message]
    assert line.startswith(f"waiting up to 20 s for the lock of {store.folder}, last taken by process {os.getpid()} on ")


def listed(store):
    return [item["file"] for item in json.loads((store.folder / "manifest.json").read_text())["checkpoints"]]


def other_bytes(path):
    """The same archive in other bytes: its CRCs hold, its checksum does not."""
    payload = torch.load(path, weights_only=True)
    payload["model"]["w"] += 1
    torch.save(payload, path)


@pytest.mark.parametrize("killed", ["before the next save", "while it sets aside", "never"])
def test_what_its_checksum_convicts_stays_convicted(store, monkeypatch, killed):
    save(store, 5)
    other_bytes(save(store, 10))
    check_bytes(store.folder / "ckpt_10.pt", None)  # its own CRCs say nothing
    store._lock.release()
    first = CheckpointStore(store.folder)
    assert newest(first)[1].step == 5
    first.prepare()
    assert listed(first) == ["ckpt_5.pt", "ckpt_10.pt"] and latest(first) == "ckpt_5.pt\n"
    if killed != "before the next save":
        if killed == "while it sets aside":
            monkeypatch.setattr(first, "_write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with contextlib.suppress(KeyboardInterrupt):
            save(first, 7)
        monkeypatch.undo()
        assert (store.folder / "superseded_1_ckpt_10.pt").exists()
    first._lock.release()
    again = CheckpointStore(store.folder)
    assert newest(again)[1].step == (7 if killed == "never" else 5)
    again.prepare()
    assert listed(again) == {"before the next save": ["ckpt_5.pt", "ckpt_10.pt"], "never": ["ckpt_5.pt", "ckpt_7.pt"]}.get(
        killed, ["ckpt_5.pt"]
    )


class Disk:
    """Refuses to open ``name`` for reading, ``times`` times."""

    def __init__(self, monkeypatch, name, times, number=errno.EIO):
        import builtins

        self.times, real = times, builtins.open

        def opened(file, mode="r", *more, **options):
            if str(file).endswith(name) and "r" in mode and self.times > 0:
                self.times -= 1
                raise OSError(number, os.strerror(number), str(file))
            return real(file, mode, *more, **options)

        monkeypatch.setattr(builtins, "open", opened)


def unlist(store):
    (store.folder / "manifest.json").unlink()
    store._lock.release()
    return CheckpointStore(store.folder, pauses=(0.0, 0.0))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("known", [True, False])
def test_a_read_that_fails_for_a_moment_is_tried_again(store, monkeypatch, number, known):
    save(store, 5)
    save(store, 10)
    store._lock.release()
    again = CheckpointStore(store.folder, pauses=(0.0, 0.0)) if known else unlist(store)
    Disk(monkeypatch, "ckpt_10.pt", 2, number)
    assert newest(again)[1].step == 10 and not again.unusable
    again.prepare()
    assert listed(again) == ["ckpt_5.pt", "ckpt_10.pt"]


def test_the_pauses_are_slept(store, monkeypatch):
    save(store, 5)
    slept = []
    monkeypatch.setattr("berth.training.checkpoint_file.time.sleep", slept.append)
    Disk(monkeypatch, "ckpt_5.pt", 99)
    with pytest.raises(UnreadableError, match=r"ckpt_5.pt cannot be read \(Input/output error\); that says nothing about what is in it"):
        store.load(store.entries()[0])
    assert slept == [1.0, 3.0, 6.0]


@pytest.mark.parametrize("known", [True, False])
def test_what_cannot_be_read_is_passed_over_and_left_alone(store, monkeypatch, known, caplog):
    """The run goes on from the one before it; the next process, with the disk well again, from what is newest."""
    save(store, 5)
    save(store, 10)
    store._lock.release()
    again = CheckpointStore(store.folder, pauses=(0.0, 0.0)) if known else unlist(store)
    with monkeypatch.context() as patch:
        Disk(patch, "ckpt_10.pt", 99)
        assert newest(again)[1].step == 5 and again.unusable == ["ckpt_10.pt"]
        again.prepare()
    save(again, 7)
    assert steps(again) == [5, 7] and not list(store.folder.glob("superseded*"))
    assert listed(again) == ["ckpt_5.pt", "ckpt_7.pt", *(["ckpt_10.pt"] if known else [])]
    assert steps(CheckpointStore(store.folder)) == [5, 7, 10]
    save(again, 10, value=-10)  # what was passed over is written anew
    assert steps(again) == [5, 7, 10] and listed(again)[2] == "ckpt_10.pt"
    assert float(newest(CheckpointStore(store.folder))[0]["model"]["w"][0]) == -10


def test_nothing_readable_is_no_fresh_start_and_no_damage(store, monkeypatch):
    save(store, 5)
    again = CheckpointStore(store.folder, pauses=())
    Disk(monkeypatch, "ckpt_5.pt", 99)
    with pytest.raises(
        CheckpointError, match=r"can be used now; ckpt_5.pt may be good, but cannot be read .*Input/output error.*run again"
    ):
        newest(again)


def test_an_unreadable_end_of_a_phase_is_not_overwritten(store, monkeypatch):
    save(store, 5)
    save(store, 10, final=True)
    again = CheckpointStore(store.folder, pauses=())
    with monkeypatch.context() as patch:
        Disk(patch, "ckpt_10.pt", 99)
        newest(again)
    with pytest.raises(CheckpointError, match="is the end of phase 1"):
        save(again, 10, phase=2)


def test_an_unreadable_manifest_is_not_an_empty_one(store, monkeypatch):
    save(store, 5)
    again = CheckpointStore(store.folder, pauses=(0.0,))
    Disk(monkeypatch, "manifest.json", 3)
    with pytest.raises(UnreadableError, match=r"output folder .* cannot be read \(Input/output error\)"):
        again.entries()
    assert [entry.sha256 == "" for entry in again.entries()] == [False]


def test_a_folder_that_is_gone_is_a_checkpoint_error_of_the_save(store, monkeypatch):
    """A lasting ESTALE: also looking for what is intact fails."""
    save(store, 5)
    store.pauses = ()

    def stale(*_arguments):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", stale)
        patch.setattr("berth.training.checkpoint.torch.save", stale)
        patch.setattr(store, "_make_way", lambda *_: [])
        with pytest.raises(CheckpointError, match=r"ckpt_10.pt could not be written \(.*Stale file handle.*\)\. Free"):
            save(store, 10)
    save(store, 10)
    assert steps(store) == [5, 10]


def test_a_manifest_that_is_refused_after_the_rename(store, monkeypatch):
    save(store, 5)
    replace = os.replace

    def refuse(source, target):
        if str(target).endswith("manifest.json"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", refuse)
        with pytest.raises(
            UnlistedError, match=r"ckpt_10.pt is complete but not listed, because manifest.json could not be written .*quota"
        ) as e:
            save(store, 10)
        assert "intact" not in str(e.value) and listed(store) == ["ckpt_5.pt"]
    assert newest(CheckpointStore(store.folder))[1].step == 10
    store.keep = 2
    save(store, 15)
    assert listed(store) == ["ckpt_10.pt", "ckpt_15.pt"] and all(entry.sha256 for entry in CheckpointStore(store.folder).entries())


def test_a_full_disk_at_the_start_costs_the_lists_a_warning(store, monkeypatch, caplog):
    save(store, 5)
    again = unlist(store)
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    again.prepare()
    assert steps(again) == [5] and "manifest.json could not be brought up to date" in caplog.text


def test_pickles_are_not_executed(store):
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch " + str(store.folder / "pwned"),))

    torch.save({"format": "berth-checkpoint", "x": Evil()}, store.folder / "ckpt_1.pt")
    with pytest.raises(CheckpointError):
        read_checkpoint(store.folder / "ckpt_1.pt")
    assert not (store.folder / "pwned").exists()


def test_errors_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used"):
        CheckpointStore(tmp_path / "file" / "out").prepare()
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pt")
