"""The stage engine: cuts lose nothing, bytes depend on input and options only, interruptions at any moment cost work but no truth."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.corpus import parts
from berth.corpus.parts import Task, cut_parts, manifest_path, part_name, run_stage, span_lines
from berth.errors import DataError, LaunchError
from berth.files import FolderLock
from berth.text.lines import read_lines
from tests.support import ROOT, environment

# ------------------------------------------------------------------------------------------------------------ cutting

LINES = st.sampled_from(["a", "b c", "", "", " ", "\t", "\u00a0", "őű", "a\rb", "\x0c", "x" * 30, "\u2028", "\x85"])
ENDS = st.sampled_from(["\n", "\n", "\n", "\r\n"])


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    text = "".join(draw(LINES) + draw(ENDS) for _ in range(draw(st.integers(0, 25))))
    text = draw(st.sampled_from(["", "\ufeff"])) + text
    return (text if draw(st.booleans()) else text.rstrip("\r\n")).encode()


def documents(lines: list[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [document for document in found if document]


@settings(max_examples=300, deadline=None)
@given(files=st.lists(texts(), min_size=1, max_size=4), boundary=st.sampled_from(["line", "blank_line", "file"]), size=st.integers(1, 60))
def test_cuts_lose_and_break_nothing(tmp_path_factory, files, boundary, size):
    folder = tmp_path_factory.mktemp("cut")
    paths = [folder / f"{number}.txt" for number in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    tasks = cut_parts(paths, boundary, "x", part_bytes=size)
    assert [task.name for task in tasks] == [part_name("x", number) for number in range(len(tasks))]
    spans = [span for task in tasks for span in task.payload]
    for path, data in zip(paths, files, strict=True):
        own = [span for span in spans if span.file == path]
        assert b"".join(data[span.start : span.stop] for span in own) == data
        assert [line for span in own for line in span_lines(span)] == list(read_lines(path))
        if boundary == "blank_line":
            assert [each for span in own for each in documents(list(span_lines(span)))] == documents(list(read_lines(path)))
        if boundary == "file":
            assert len(own) == 1
        for span in own[1:]:
            assert data[: span.start].endswith(b"\n")
    for task in tasks:
        first, rest = task.payload[0], task.payload[1:]
        assert sum(span.stop - span.start for span in rest) + first.stop - first.start <= size or not rest, (
            "several share a part if they fit"
        )
    assert cut_parts(paths, boundary, "x", part_bytes=size) == tasks


def test_a_cut_does_not_depend_on_the_search_buffer(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"".join(b"w" * (number % 90) + b"\n" + b" " * (number % 40) + b"\n" * (number % 3) for number in range(500)))
    for boundary in ("line", "blank_line"):
        cuts = cut_parts([path], boundary, "x", part_bytes=700)
        assert len(cuts) > 10
        for buffer in (1, 7, 64):
            monkeypatch.setattr(parts, "_SEARCH_BYTES", buffer)
            assert cut_parts([path], boundary, "x", part_bytes=700) == cuts
        monkeypatch.undo()


def test_parts_are_about_as_large_as_asked(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one line of words\n\n" * 5000)
    sizes = [span.stop - span.start for task in cut_parts([path], "blank_line", "x", part_bytes=1000) for span in task.payload]
    assert max(sizes) < 1100 and min(sizes[:-1]) >= 1000


def test_nothing_to_cut(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    assert cut_parts([], "line", "x") == []
    assert [span[1:] for task in cut_parts([tmp_path / "empty.txt"], "line", "x") for span in task.payload] == [(0, 0)]


# ------------------------------------------------------------------------------------------------------------ running


@dataclasses.dataclass(frozen=True)
class Shout:
    """Copies lines with a mark; notes its work in ``log``; fails at a line "boom"; nothing is written for parts of "skip" lines."""

    mark: str = "!"
    log: Path | None = None
    seconds: float = 0.0

    def __call__(self, payload: Any, output: IO[str]) -> Mapping[str, int]:
        count = 0
        for span in payload:
            for line in span_lines(span):
                if line == "boom":
                    raise DataError("boom was found")
                if line and line != "skip":
                    output.write(f"{line}{self.mark}\n")
                    count += 1
        time.sleep(self.seconds)
        if self.log is not None:
            with open(self.log, "a", encoding="utf-8") as handle:
                handle.write(f"{payload[0].file.name}\n")
        return {"lines": count}


def write_inputs(folder: Path, values: list[str]) -> list[Path]:
    """One file (so one part) for each of ``values``."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"in_{number:03d}.txt" for number in range(len(values))]
    for path, value in zip(paths, values, strict=True):
        path.write_text("".join(f"{word}\n" for word in value.split()), encoding="utf-8")
    return paths


def tasks_of(paths: list[Path]) -> list[Task]:
    return cut_parts(paths, "file", "part", part_bytes=1)


VALUES = ["one two", "three", "skip", "four five six", "skip", "seven"]


def run(tmp_path: Path, output: str, values: list[str] = VALUES, processes: int = 1, separator: str = "--\n", **worker: Any):
    paths = write_inputs(tmp_path / "input", values)
    made = Shout(**worker)
    return run_stage("shout", tmp_path / output, tasks_of(paths), made, {"mark": made.mark}, processes, separator=separator)


def content(output: Path) -> dict[str, bytes] | bytes:
    if output.is_file():
        return output.read_bytes()
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.name.startswith("part_")}


def expected(values: list[str], single: bool, mark: str = "!", separator: str = "--\n") -> dict[str, bytes] | bytes:
    made = ["".join(f"{word}{mark}\n" for word in value.split() if word != "skip") for value in values]
    if single:
        return separator.join(text for text in made if text).encode()
    return {part_name("part", number): text.encode() for number, text in enumerate(made)}


def assert_clean(output: Path) -> None:
    """No journal, lock of another name, temporary file or folder is left beside or in ``output``."""
    left = [path.name for path in output.parent.iterdir() if path.name.startswith(f".{output.name}")]
    assert not left
    if output.is_dir():
        assert {path.name for path in output.iterdir() if path.name.startswith(".")} <= {".shout.lock"}


OUTPUTS = pytest.mark.parametrize("output", ["out", "out.txt"])


@OUTPUTS
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_same_bytes_for_any_number_of_processes(tmp_path, output, processes):
    result = run(tmp_path, output, processes=processes)
    assert content(tmp_path / output) == expected(VALUES, output == "out.txt")
    assert (result.made, result.kept, result.counts) == (6, 0, {"lines": 7})
    manifest = json.loads(manifest_path(tmp_path / output, "shout").read_text())
    assert manifest["complete"] and list(manifest["parts"]) == [part_name("part", number) for number in range(6)]
    assert_clean(tmp_path / output)


@OUTPUTS
def test_what_did_not_change_is_kept(tmp_path, output):
    log, single = tmp_path / "log", output == "out.txt"
    run(tmp_path, output, log=log)
    manifest = manifest_path(tmp_path / output, "shout").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in [tmp_path / output]}
    again = run(tmp_path, output, log=log)
    assert (again.made, again.kept) == (0, 6) and again.counts == {"lines": 7}
    assert manifest_path(tmp_path / output, "shout").read_bytes() == manifest
    assert not single or {path: path.stat().st_mtime_ns for path in times} == times
    log.unlink()
    for changed in (
        ["one two", "THREE", "skip", "four five six", "now", "seven"],  # changed, and an empty part that is none now
        ["one two", "THREE", "skip", "skip", "now", "skip"],  # parts that become empty
        ["skip", "skip", "skip", "skip", "skip", "skip"],
        ["one", "skip", "two", "skip", "skip", "three"],
    ):
        before = [path.read_text() for path in sorted((tmp_path / "input").iterdir())]
        result = run(tmp_path, output, changed, log=log)
        after = [path.read_text() for path in sorted((tmp_path / "input").iterdir())]
        wanted = [f"in_{number:03d}.txt" for number in range(6) if before[number] != after[number]]
        assert log.read_text().split() == wanted and result.made == len(wanted)
        assert content(tmp_path / output) == expected(changed, single)
        log.unlink()
    assert run(tmp_path, output, changed, mark="?").made == 6, "other options: everything"
    assert content(tmp_path / output) == expected(changed, single, "?")
    assert_clean(tmp_path / output)


@OUTPUTS
def test_less_and_more_input(tmp_path, output):
    run(tmp_path, output)
    if output == "out":
        for name in ("part_99999.txt", "notes.txt", ".hidden"):
            (tmp_path / "out" / name).write_text("mine")
    for values, made in ((VALUES[:2], 0), ([*VALUES[:2], "new"], 1), (VALUES, 4), (VALUES[:1], 0)):
        result = run(tmp_path, output, values)
        assert result.made == made
        found = content(tmp_path / output)
        if isinstance(found, dict):
            assert found.pop("part_99999.txt") == b"mine", "a file of the user stays, whatever it is called"
        assert found == expected(values, output == "out.txt")
    if output == "out":
        assert (tmp_path / "out" / "notes.txt").read_text() == (tmp_path / "out" / ".hidden").read_text() == "mine"


@OUTPUTS
def test_no_tasks_at_all(tmp_path, output):
    for _ in range(2):
        result = run(tmp_path, output, [])
        assert (result.made, result.kept, result.counts) == (0, 0, {})
        assert content(tmp_path / output) == expected([], output == "out.txt")
    run(tmp_path, output)
    run(tmp_path, output, [])
    assert content(tmp_path / output) == expected([], output == "out.txt")


def test_another_separator_joins_again(tmp_path):
    run(tmp_path, "out.txt")
    assert run(tmp_path, "out.txt", separator="\n").made == 0
    assert content(tmp_path / "out.txt") == expected(VALUES, True, separator="\n")


def test_a_folder_whose_name_has_a_dot(tmp_path):
    (tmp_path / "out.v1").mkdir()
    run(tmp_path, "out.v1")
    assert content(tmp_path / "out.v1") == expected(VALUES, False)
    assert manifest_path(tmp_path / "out.v1", "shout") == tmp_path / "out.v1" / "shout.json"


@OUTPUTS
@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_worker_is_raised_and_finished_parts_stay(tmp_path, output, processes):
    log = tmp_path / "log"
    before = None
    for _ in range(2):  # without and with an earlier complete output
        with pytest.raises(DataError, match="boom was found"):
            run(tmp_path, output, ["a", "b", "boom", "c"], processes, log=log, seconds=0.05)
        assert not (tmp_path / "out.txt").exists() or (tmp_path / "out.txt").read_bytes() == before
        assert not list(tmp_path.rglob("*.partial"))
        made = len(log.read_text().split())
        result = run(tmp_path, output, ["a", "b", "d", "c"], log=log)
        assert made >= 2 and result.made == 4 - made, "what was finished is not made again"
        assert content(tmp_path / output) == expected(["a", "b", "d", "c"], output == "out.txt")
        before = (tmp_path / "out.txt").read_bytes() if output == "out.txt" else None
        run(tmp_path, output, ["x", "y", "z", "v"])
        before = (tmp_path / "out.txt").read_bytes() if output == "out.txt" else None
        log.unlink()


@OUTPUTS
@pytest.mark.parametrize("damage", ["cut", "garbage", "wrong types", "gone", "list"])
def test_damaged_manifests_are_survived(tmp_path, output, damage):
    run(tmp_path, output)
    path = manifest_path(tmp_path / output, "shout")
    text = path.read_text()
    changed = json.loads(text)
    changed["parts"] = {"part_00000.txt": 3, "../input/in_000.txt": changed["parts"]["part_00000.txt"], "part_00001.txt": {}}
    new = {"cut": text[: len(text) // 2], "garbage": "\x00\xff", "wrong types": json.dumps(changed), "gone": "", "list": "[1]"}[damage]
    path.write_text(new)
    if damage == "gone":
        path.unlink()
    assert run(tmp_path, output).made == 6
    assert content(tmp_path / output) == expected(VALUES, output == "out.txt")
    assert (tmp_path / "input" / "in_000.txt").is_file()


@OUTPUTS
def test_damaged_parts_are_made_again(tmp_path, output):
    run(tmp_path, output)
    target = tmp_path / output if output == "out.txt" else tmp_path / "out" / "part_00003.txt"
    target.write_bytes(target.read_bytes()[:-3])
    assert run(tmp_path, output).made == (6 if output == "out.txt" else 1)
    assert content(tmp_path / output) == expected(VALUES, output == "out.txt")
    target.unlink()
    run(tmp_path, output)
    assert content(tmp_path / output) == expected(VALUES, output == "out.txt")


class Killed(BaseException):
    """Stands for a kill at this place: nothing behind it is done."""


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, before: bool) -> None:
    real = getattr(parts, name)

    def stopped(*words: Any, **more: Any) -> Any:
        if name == "write_json" and not words[1]["complete"]:
            return real(*words, **more)
        if not before:
            real(*words, **more)
        raise Killed

    monkeypatch.setattr(parts, name, stopped)


@OUTPUTS
@pytest.mark.parametrize("place", ["_join", "write_json"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("then", ["!", "?"])
def test_a_kill_around_the_end_of_a_run_with_other_options_of_equal_size(tmp_path, monkeypatch, output, place, before, then):
    """Sizes say nothing here: the run with "?" makes parts as long as the run with "!"."""
    run(tmp_path, output)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, place, before)
        run(tmp_path, output, mark="?")
        raise Killed  # a folder is not joined
    run(tmp_path, output, mark=then)
    assert content(tmp_path / output) == expected(VALUES, output == "out.txt", then)
    assert run(tmp_path, output, mark=then).made == 0
    assert_clean(tmp_path / output)


@OUTPUTS
@pytest.mark.parametrize("then", ["!", "?"])
def test_parts_that_were_renamed_but_not_noted(tmp_path, output, then):
    """A kill between the two: what the manifest says of the part is not true any more, though its size is."""
    run(tmp_path, output)
    folder = parts_folder(tmp_path, output)
    folder.mkdir(exist_ok=True)
    (folder / ".shout.journal").write_text('["part_00003.txt", null]\n["part_00006.txt", null]\n["part_00')
    (folder / "part_00003.txt").write_text("four?\nfive?\nsix?\n")
    (folder / "part_00006.txt").write_text("of an input that is gone\n")
    run(tmp_path, output, mark=then)
    assert content(tmp_path / output) == expected(VALUES, output == "out.txt", then)


def parts_folder(tmp_path: Path, output: str) -> Path:
    return tmp_path / "out" if output == "out" else tmp_path / ".out.txt.parts"


@OUTPUTS
def test_a_damaged_journal_is_survived(tmp_path, output):
    with pytest.raises(DataError):
        run(tmp_path, output, ["a", "b", "c", "boom"])
    journal = parts_folder(tmp_path, output) / ".shout.journal"
    lines = journal.read_text().split("\n")
    noted = [line for line in lines if line and json.loads(line)[1] is not None]
    assert len(noted) == 3
    journal.write_bytes("\n".join(["3", "[]", '"x"', '["../x", {}]', '["part_00001.txt", 7]', noted[0], noted[2][:-9]]).encode() + b"\xff")
    assert run(tmp_path, output, ["a", "b", "c", "d"]).made == 3
    assert content(tmp_path / output) == expected(["a", "b", "c", "d"], output == "out.txt")


# ------------------------------------------------------------------------------------------------- in real processes

PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {here!r}]
import test_parts as tests
if __name__ == "__main__":
    base, output, processes, mark = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    tasks = tests.tasks_of(sorted((base / "input").iterdir()))
    worker = tests.Shout(mark, base / "log", 0.02)
    print(tests.run_stage("shout", base / output, tasks, worker, {{"mark": mark}}, processes, separator="--\\n"), flush=True)
"""


def start(tmp_path: Path, output: str, processes: int, mark: str = "!", limit: int | None = None) -> subprocess.Popen[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), here=str(Path(__file__).parent)))

    def limited() -> None:
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does: writes then fail with EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, str(program), str(tmp_path), output, str(processes), mark],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=limited,
    )  # fmt: skip


@pytest.mark.parametrize(("output", "processes"), [("out", 2), ("out.txt", 1)])
def test_kill_9_at_random_moments(tmp_path, output, processes):
    values = [f"w{number} v{number}" if number % 5 else "skip" for number in range(30)]
    write_inputs(tmp_path / "input", values)
    chance = random.Random(output)
    kills = 0
    for _ in range(3):
        child = start(tmp_path, output, processes)
        end = time.monotonic() + 30
        done = len((tmp_path / "log").read_text().split()) if (tmp_path / "log").exists() else 0
        wanted = done + chance.randint(1, 7)
        while time.monotonic() < end and child.poll() is None:
            if (tmp_path / "log").exists() and len((tmp_path / "log").read_text().split()) >= wanted:
                break
            time.sleep(0.003)
        time.sleep(chance.random() * 0.02)
        kills += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.communicate()
    time.sleep(0.2)  # workers end with their parent
    child = start(tmp_path, output, processes)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert kills >= 2
    assert content(tmp_path / output) == expected(values, output == "out.txt")
    worked = len((tmp_path / "log").read_text().split())
    assert worked <= 30 + 3 * 3 * processes, "only what was in hand at a kill is made again"
    assert_clean(tmp_path / output)
    assert not list(tmp_path.rglob("*.partial"))


@OUTPUTS
def test_a_full_disk(tmp_path, output):
    values = ["a", "b", "c " * 3000, "d"]
    write_inputs(tmp_path / "input", values)
    child = start(tmp_path, output, 1, limit=4096)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1 and "File too large" in err and output in err
    assert not (tmp_path / "out.txt").exists() and not list(tmp_path.rglob("*.partial"))
    assert run(tmp_path, output, values).made == 2
    assert content(tmp_path / output) == expected(values, output == "out.txt")


def test_a_disk_that_is_full_when_the_parts_are_put_together(tmp_path):
    """Every part is finished and fits, the joined file does not; the earlier output stays and is not taken for the new one."""
    values = ["a " * 800, "b " * 800, "c " * 800]
    run(tmp_path, "out.txt", values)
    write_inputs(tmp_path / "input", [value.upper() for value in values])
    child = start(tmp_path, "out.txt", 1, limit=4096)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1 and "File too large" in err
    assert content(tmp_path / "out.txt") == expected(values, True)
    assert run(tmp_path, "out.txt", [value.upper() for value in values]).made == 0
    assert content(tmp_path / "out.txt") == expected([value.upper() for value in values], True)


@OUTPUTS
def test_two_runs_at_once(tmp_path, monkeypatch, output):
    real = FolderLock.acquire
    monkeypatch.setattr(FolderLock, "acquire", lambda self, wait_seconds: real(self, 0))
    folder = parts_folder(tmp_path, output)
    folder.mkdir()
    other = FolderLock(folder, ".shout.lock")
    assert other.acquire(0)
    with pytest.raises(LaunchError, match=f"another run of the stage shout is writing to .*{output}"):
        run(tmp_path, output)
    other.release()
    run(tmp_path, output)
    assert content(tmp_path / output) == expected(VALUES, output == "out.txt")


def test_waiting_for_a_run_that_then_removes_its_folder(tmp_path, monkeypatch):
    """The lock that was waited for is that of a folder that is gone."""
    real, calls = FolderLock.acquire, []

    def acquire(self: FolderLock, wait_seconds: float) -> bool:
        taken = real(self, wait_seconds)
        calls.append(self.path)
        if len(calls) == 1:
            shutil.rmtree(self.path.parent)
        return taken

    monkeypatch.setattr(FolderLock, "acquire", acquire)
    run(tmp_path, "out.txt")
    assert content(tmp_path / "out.txt") == expected(VALUES, True) and len(calls) == 2
    assert_clean(tmp_path / "out.txt")


def test_tasks_may_be_a_stream_that_is_read_a_few_ahead(tmp_path):
    taken: list[int] = []
    done: list[int] = []

    def stream():
        for number in range(60):
            taken.append(number)
            yield Task(part_name("part", number), number, str(number))

    class Count:
        def __call__(self, payload: int, output: IO[str]) -> Mapping[str, int]:
            done.append(payload)
            assert len(taken) - len(done) <= 1
            output.write(f"{payload}\n")
            return {"parts": 1}

    assert run_stage("count", tmp_path / "a.txt", stream(), Count(), {}).counts == {"parts": 60}
    assert (tmp_path / "a.txt").read_text().split() == [str(number) for number in range(60)]


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\n" * 100)
    tasks = cut_parts([path], "line", "part", part_bytes=50)
    os.truncate(path, 60)
    with pytest.raises(DataError, match=r"a\.txt became shorter"):
        run_stage("shout", tmp_path / "out", tasks, Shout(), {})
