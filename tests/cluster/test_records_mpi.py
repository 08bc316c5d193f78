"""Records made by several processes on several nodes are the bytes that one process makes, however they are started or killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest

from berth.text.vocabulary import SPECIAL_TOKENS
from tests.cluster.localslurm import LocalSlurm, clean_environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "create_pretraining_data.py")]
WORDS = 400
SHARDS = 5
OPTIONS = ("--vocab_file", "vocab.txt", "--input_file", "shards", "--max_seq_length", "32", "--max_predictions_per_seq", "5")

# a program that breaks in the middle of one shard, as a bug would
BROKEN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import create_pretraining_data as script
from berth.records import create
whole = create.tokenize_files
def tokenize(files, *rest):
    if files[0].name == "text_training_3.txt":
        raise ZeroDivisionError("a bug in shard 3")
    return whole(files, *rest)
create.tokenize_files = tokenize
script.run_main(script.main)
"""


def write_shards(folder: Path, documents: int) -> None:
    """Shards of very different sizes (``documents`` for the smallest) and their vocabulary."""
    (folder / "shards").mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *(f"w{number}" for number in range(WORDS))]) + "\n")
    for shard in range(SHARDS):
        lines: list[str] = []
        for document in range(documents * (1 + 3 * (shard % 3))):
            for sentence in range(4 + document % 5):
                start = 31 * shard + 17 * document + 7 * sentence
                lines.append(" ".join(f"w{(start + place * place) % WORDS}" for place in range(5 + (start % 9))))
            lines.append("")
        (folder / "shards" / f"text_training_{shard}.txt").write_text("\n".join(lines[:-1]) + "\n")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.hdf5"))}


def environment() -> dict[str, str]:
    return {**clean_environment(), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def arguments(output: str, *more: object) -> list[str]:
    return [*OPTIONS, "--output_dir", output, *map(str, more)]


def run(command: list[str], cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run to the end, which must come: a run that hangs fails the test."""
    env = {**(env or clean_environment()), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL)


def srun(*options: str) -> list[str]:
    return ["srun", "--mpi=pmix", "--kill-on-bad-exit=1", *options]


def array(slurm: LocalSlurm, work: Path, tasks: str, command: list[str], *options: str) -> tuple[str, str]:
    """Submit an array job; its number and the pattern of its output files."""
    script = work / "array.sub"
    script.write_text("#!/bin/sh\nexec " + " ".join(command) + "\n")
    said = slurm.attempt("sbatch", "--parsable", f"--array={tasks}", "--output=array-%A-%a.log", *options, script, cwd=work)
    assert said.returncode == 0, said.stderr
    job = said.stdout.strip()
    return job, f"array-{job}-*.log"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_shards(folder, documents=12)
    done = run([*SCRIPT, *arguments("one")], folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def expected(work: Path) -> dict[str, str]:
    found = digests(work / "one")
    assert len(found) == SHARDS
    return found


def check(done: subprocess.CompletedProcess[str], work: Path, output: str, expected: dict[str, str]) -> None:
    assert done.returncode == 0, done.stderr
    assert digests(work / output) == expected
    summaries = [line for line in done.stdout.splitlines() if "instances from" in line]
    assert len(summaries) == 1, done.stdout
    documents = re.search(r"from (\d+) documents", summaries[0])
    assert documents is not None
    with contextlib.ExitStack() as files:
        opened = [files.enter_context(h5py.File(path)) for path in (work / output).glob("*.hdf5")]
        assert int(documents[1]) == sum(int(file.attrs["count_documents"]) for file in opened), "the summary is of all ranks"
    assert f"{SHARDS} file(s) made" in done.stdout
    assert (work / output / "records.json").is_file()


def test_two_processes(work: Path, expected: dict[str, str]) -> None:
    check(run([*SCRIPT, *arguments("processes", "--processes", 2)], work), work, "processes", expected)


@pytest.mark.parametrize("ranks", [3, 6])
def test_mpirun(work: Path, expected: dict[str, str], mpirun: list[str], ranks: int) -> None:
    """Also with more ranks than shards."""
    check(run([*mpirun, "-n", str(ranks), *SCRIPT, *arguments(f"mpirun{ranks}")], work), work, f"mpirun{ranks}", expected)


def test_srun_with_pmix_on_two_nodes(work: Path, expected: dict[str, str], pmix: LocalSlurm) -> None:
    done = run([*srun("-N2", "-n3"), *SCRIPT, *arguments("srun")], work, pmix.environment)
    check(done, work, "srun", expected)


def test_srun_without_mpi(work: Path, expected: dict[str, str], slurm: LocalSlurm) -> None:
    done = run(["srun", "-N2", "-n3", "--kill-on-bad-exit=1", *SCRIPT, *arguments("tasks")], work, slurm.environment)
    assert done.returncode == 0, done.stderr
    assert digests(work / "tasks") == expected


def test_launched_but_told_to_work_alone(work: Path, expected: dict[str, str], mpirun: list[str]) -> None:
    done = run([*mpirun, "-n", "1", *SCRIPT, *arguments("alone", "--distributed", "none")], work)
    check(done, work, "alone", expected)


def test_array_job(work: Path, expected: dict[str, str], slurm: LocalSlurm) -> None:
    job, logs = array(slurm, work, "0-2", [*SCRIPT, *arguments("array")])
    ended = slurm.wait(job)
    said = "".join(path.read_text() for path in sorted(work.glob(logs)))
    assert [each.state for each in ended] == ["COMPLETED"] * 3, said
    assert digests(work / "array") == expected
    made = [int(number) for number in re.findall(r"(\d+) file\(s\) made, 0 up to date", said)]
    assert len(made) == 3 and sum(made) == SHARDS, said


def test_array_job_with_more_tasks_than_shards(work: Path, expected: dict[str, str], slurm: LocalSlurm) -> None:
    job, logs = array(slurm, work, "3-21:3", [*SCRIPT, *arguments("wide")])
    ended = slurm.wait(job)
    assert [each.state for each in ended] == ["COMPLETED"] * 7, "".join(path.read_text() for path in work.glob(logs))
    assert digests(work / "wide") == expected


def test_srun_steps_inside_an_array_job(work: Path, expected: dict[str, str], slurm: LocalSlurm) -> None:
    job, logs = array(slurm, work, "0-1", ["srun", "--kill-on-bad-exit=1", *SCRIPT, *arguments("steps")], "--ntasks=2")
    ended = slurm.wait(job)
    said = "".join(path.read_text() for path in work.glob(logs))
    assert [each.state for each in ended] == ["COMPLETED"] * 2, said
    assert digests(work / "steps") == expected
    assert len(re.findall(r": \d+ instances, made in", said)) == SHARDS, "nothing is made twice"


def test_a_batch_script_without_srun_does_everything(work: Path, expected: dict[str, str], slurm: LocalSlurm) -> None:
    """Slurm says that the job has three tasks, but only one was started."""
    command = " ".join([*SCRIPT, *arguments("batch")])
    said = slurm.attempt("sbatch", "--parsable", "--ntasks=3", "--output=batch.log", "--wrap", command, cwd=work)
    assert [each.state for each in slurm.wait(said.stdout.strip())] == ["COMPLETED"], (work / "batch.log").read_text()
    assert digests(work / "batch") == expected


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Work that takes some seconds, so that somebody can be killed in the middle of it, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("slow")
    write_shards(folder, documents=100)
    done = run([*SCRIPT, *arguments("one", *SLOW)], folder)
    assert done.returncode == 0, done.stderr
    return folder, digests(folder / "one")


SLOW = ("--dupe_factor", "50")


def rank_processes(output: str) -> list[int]:
    """The Python processes that write to ``output``, in every namespace."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if output.encode() in words and words[0] == sys.executable.encode():
                found.append(int(path.parent.name))
    return found


def kill_one_rank(folder: Path, output: str) -> None:
    """Wait until all three are there and one writes a file, then kill -9 one of them."""
    end = time.monotonic() + 60
    while len(victims := rank_processes(output)) != 3 or not list((folder / output).glob(".*.partial")):
        assert time.monotonic() < end, f"{len(victims)} of 3 processes are working"
        time.sleep(0.01)
    os.kill(victims[-1], signal.SIGKILL)


def start(command: list[str], folder: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    env = {**env, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish_after_kill(command: list[str], folder: Path, output: str, env: dict[str, str], expected: dict[str, str]) -> None:
    """Kill one rank of ``command``: it must end by itself, not with 0; run again, every byte must be there."""
    process = start(command, folder, env)
    kill_one_rank(folder, output)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0, said
    assert digests(folder / output).items() < expected.items(), "what is there is complete, and something is missing"
    again = run(command, folder, env)
    assert again.returncode == 0, again.stderr
    assert digests(folder / output) == expected
    assert not list((folder / output).glob(".*.partial")), "left-overs of the killed rank"


def test_a_killed_rank_of_mpirun(slow: tuple[Path, dict[str, str]], mpirun: list[str]) -> None:
    folder, expected = slow
    finish_after_kill([*mpirun, "-n", "3", *SCRIPT, *arguments("killed_mpirun", *SLOW)], folder, "killed_mpirun", environment(), expected)


def test_a_killed_rank_of_srun(slow: tuple[Path, dict[str, str]], pmix: LocalSlurm) -> None:
    folder, expected = slow
    command = [*srun("-N2", "-n3"), *SCRIPT, *arguments("killed_srun", *SLOW)]
    finish_after_kill(command, folder, "killed_srun", pmix.environment, expected)


def test_a_killed_task_of_an_array(slow: tuple[Path, dict[str, str]], slurm: LocalSlurm) -> None:
    folder, expected = slow
    command = [*SCRIPT, *arguments("killed_array", *SLOW)]
    job, _ = array(slurm, folder, "0-2", command)
    kill_one_rank(folder, "killed_array")
    states = sorted(each.state for each in slurm.wait(job))
    assert states == ["COMPLETED", "COMPLETED", "FAILED"]
    assert digests(folder / "killed_array").items() < expected.items()
    job, _ = array(slurm, folder, "0-2", command)
    assert [each.state for each in slurm.wait(job)] == ["COMPLETED"] * 3
    assert digests(folder / "killed_array") == expected


def broken(work: Path, output: str) -> list[str]:
    script = work / "broken.py"
    script.write_text(BROKEN)
    return [sys.executable, str(script), *arguments(output)]


def check_failure(said: str, code: int) -> None:
    assert code not in (0, -signal.SIGKILL), said
    assert "ZeroDivisionError: a bug in shard 3" in said and "Traceback" in said, "the traceback of the rank that failed"


def test_a_failing_rank_of_mpirun(work: Path, mpirun: list[str]) -> None:
    done = run([*mpirun, "-n", "3", *broken(work, "broken_mpirun")], work)
    check_failure(done.stdout + done.stderr, done.returncode)


@pytest.mark.parametrize("options", [(), ("--kill-on-bad-exit=1",)])
def test_a_failing_rank_of_srun(work: Path, pmix: LocalSlurm, options: tuple[str, ...]) -> None:
    """The other ranks wait for the one that failed: they must be ended by it."""
    done = run(["srun", "--mpi=pmix", "-N2", "-n3", *options, *broken(work, "broken_srun")], work, pmix.environment)
    check_failure(done.stdout + done.stderr, done.returncode)


def test_wrong_input_is_one_line_also_under_mpi(work: Path, tmp_path: Path, mpirun: list[str]) -> None:
    write_shards(tmp_path, documents=3)
    (tmp_path / "shards" / "text_training_1.txt").write_bytes(b"caf\xe9\n")
    done = run([*mpirun, "-n", "3", *SCRIPT, *arguments("out")], tmp_path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "text_training_1.txt: byte 0xe9" in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_a_failing_task_of_an_array(work: Path, slurm: LocalSlurm) -> None:
    job, logs = array(slurm, work, "0-2", broken(work, "broken_array"))
    ended = slurm.wait(job)
    assert sorted(each.state for each in ended) == ["COMPLETED", "COMPLETED", "FAILED"]
    assert "ZeroDivisionError: a bug in shard 3" in "".join(path.read_text() for path in work.glob(logs))


def test_an_array_with_holes_is_refused(work: Path, slurm: LocalSlurm) -> None:
    """Nobody would make the files of the missing task."""
    job, logs = array(slurm, work, "30,32,33", [*SCRIPT, *arguments("holes")])
    assert [(each.state, each.exit_code) for each in slurm.wait(job)] == [("FAILED", 2)] * 3
    said = [path.read_text() for path in work.glob(logs)]
    assert len(said) == 3 and all("run the whole array again" in each for each in said), said
    assert not (work / "holes").exists()


def test_one_output_file_cannot_be_shared(work: Path, mpirun: list[str]) -> None:
    command = [*mpirun, "-n", "2", *SCRIPT, *OPTIONS, "--output_file", "shared.hdf5"]
    done = run(command, work)
    assert done.returncode == 2 and "--output_dir" in done.stderr, done.stderr
    assert not (work / "shared.hdf5").exists()
