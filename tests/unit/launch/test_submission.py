"""Handing jobs over: sbatch and submitit with a Slurm that only writes down what it is told, and for real as processes of this machine."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from berth import launch
from berth.errors import ConfigError, LaunchError
from berth.launch import submission
from berth.launch.clusters import load_cluster
from berth.launch.matrix import load_matrix
from berth.launch.plan import Run, make_plan
from berth.launch.render import sbatch_text
from tests.support import ROOT, TINY, environment, write_records

HOSTILE = "two words; 'and\" $HOME ü"
FAKE = r"""
import json, os, pathlib, sys
here, name = pathlib.Path(__file__).resolve().parent, pathlib.Path(sys.argv[0]).name
with open(here / "calls.jsonl", "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\n")
plays = json.loads((here / "plays.json").read_text())
if name == "sbatch":
    (here / "inherited.json").write_text(json.dumps({key: value for key, value in os.environ.items() if key.startswith(("SLURM_", "SBATCH_"))}))
    counter = here / "submitted"
    number = int(counter.read_text()) + 1 if counter.exists() else 7
    counter.write_text(str(number))
    if number == plays.get("refused"):
        sys.exit("sbatch: error: Batch job submission failed:\n  Invalid account")
    print(f"{number};cluster" if "--parsable" in sys.argv else plays.get("answer", f"Submitted batch job {number}"))
elif name == "scancel":
    sys.exit(plays.get("scancel", 0))
else:
    job = next(word.removeprefix("--jobs=") for word in sys.argv if word.startswith("--jobs=")) if name != "sacct" or "--noheader" in sys.argv else ""
    print(plays.get(name, {}).get(job, ""))
"""


class Slurm:
    """Stand-ins for Slurm's commands, and what they were told."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("sbatch", "scancel", "squeue", "sacct", "srun"):
            (folder / name).write_text(f"#!{sys.executable} -SE\n{FAKE}")
            (folder / name).chmod(0o755)
        self.play()

    def play(self, **plays):
        (self.folder / "plays.json").write_text(json.dumps(plays))

    def calls(self, *tools):
        path = self.folder / "calls.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line[0] in tools]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return Slurm(tmp_path / "bin")


@pytest.fixture
def chain(tmp_path):
    """Phase 1, phase 2 and export of the recipe ``tiny`` in a folder with an unpleasant name."""
    matrix = load_matrix()
    rows = {phase: matrix.row(f"local_2x2x2x2_fp32_tiny-p{phase}") for phase in (1, 2)}
    run = Run(
        name=HOSTILE, results=str(tmp_path / "results"), inputs={1: "/d", 2: "/d"}, config_file="/c.json", vocab_file="/v.txt",
    )  # fmt: skip
    return make_plan(run, load_cluster("local"), rows, ["phase1", "phase2", "export"])


def history(plan):
    return json.loads((Path(plan.run.folder) / "slurm" / "submission.json").read_text())["submissions"]


def finish(plan, *entries):
    """A manifest: ``(file, phase, phase_step, final)`` of each checkpoint."""
    keys = ("file", "phase", "phase_step", "final")
    folder = Path(plan.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"checkpoints": [dict(zip(keys, entry, strict=True)) for entry in entries]}))


def test_a_chain_through_sbatch(slurm, chain):
    made = submission.submit(chain)
    state = f"{chain.run.folder}/slurm"
    assert slurm.calls("sbatch", "scancel") == [
        ["sbatch", "--parsable", f"{state}/phase1.sbatch"],
        ["sbatch", "--parsable", "--dependency=afterok:7", "--kill-on-invalid-dep=yes", f"{state}/phase2.sbatch"],
        ["sbatch", "--parsable", "--dependency=afterok:8", "--kill-on-invalid-dep=yes", f"{state}/export.sbatch"],
    ]
    assert [(job.stage, job.name, job.job_id, job.handle) for job in made.jobs] == [
        ("phase1", "local_2x2x2x2", "7", None), ("phase2", "local_2x2x2x2", "8", None), ("export", "berth-export", "9", None),
    ]  # fmt: skip
    assert (made.folder, made.backend, made.skipped) == (Path(chain.run.folder), "sbatch", ())
    for job, sent in zip(chain.jobs, made.jobs, strict=True):
        assert Path(sent.script).read_text() == sbatch_text(submission.with_revision(job))


def test_the_first_job_can_wait_for_another(slurm, chain):
    submission.submit(chain, after="5", after_kind="afterany")
    assert [call[2] for call in slurm.calls("sbatch")] == ["--dependency=afterany:5", "--dependency=afterok:7", "--dependency=afterok:8"]


def test_a_refused_job_takes_the_earlier_ones_with_it(slurm, chain):
    slurm.play(refused=9, scancel=1)  # that scancel fails too must not hide why
    with pytest.raises(LaunchError) as error:
        submission.submit(chain)
    assert str(error.value).startswith("sbatch --parsable --dependency=afterok:8 --kill-on-invalid-dep=yes ")
    assert str(error.value).endswith(": sbatch: error: Batch job submission failed: Invalid account")
    assert slurm.calls("scancel") == [["scancel", "8", "7"]]
    assert [job["job_id"] for job in history(chain)[0]["jobs"]] == ["7", "8"]  # known to status, whatever became of them
    slurm.play()
    submission.submit(chain)  # nothing is left in the way
    assert [job["job_id"] for job in history(chain)[1]["jobs"]] == ["10", "11", "12"]


def test_jobs_still_in_the_queue_are_in_the_way(slurm, chain):
    submission.submit(chain)
    slurm.play(squeue={"7": "COMPLETED|None|1:00|n1", "8": "RUNNING|None|0:10|n[1-2]", "9": "PENDING|Dependency|0:00|"})
    for backend in submission.BACKENDS:
        with pytest.raises(ConfigError) as error:
            submission.submit(chain, backend)
        assert str(error.value) == (
            f"jobs of the run {chain.run.folder} are still in the queue (phase2 8, export 9); cancel them first, or wait"
        )
    assert len(slurm.calls("sbatch")) == 3
    assert submission.cancel(Path(chain.run.folder)) == ["9", "8"]
    assert slurm.calls("scancel") == [["scancel", "9", "8"]]


def test_complete_phases_are_not_submitted_again(slurm, chain):
    finish(chain, ("ckpt_12.pt", 1, 12, True), ("ckpt_14.pt", 2, 2, False))
    made = submission.submit(chain)
    assert made.skipped == ("phase1",)
    assert [Path(call[-1]).name for call in slurm.calls("sbatch")] == ["phase2.sbatch", "export.sbatch"]
    assert slurm.calls("sbatch")[0][2:-1] == []  # it waits for nothing
    finish(chain, ("ckpt_12.pt", 1, 12, True), ("ckpt_18.pt", 2, 6, True))
    made = submission.submit(chain)
    assert made.skipped == ("phase1", "phase2") and [job.stage for job in made.jobs] == ["export"]


@pytest.mark.parametrize("entry", [("a", 1, 11, True), ("a", 1, 12, False), ("a", 2, 12, True)])
def test_what_is_not_the_end_of_a_phase(slurm, chain, entry):
    finish(chain, entry)
    assert not submission.complete(chain.jobs[0])
    for text in ("", "[]", "{}", '{"checkpoints": [1]}'):
        (Path(chain.run.folder) / "manifest.json").write_text(text)
        assert not submission.complete(chain.jobs[0])


def test_history(slurm, chain, tmp_path):
    submission.submit(chain)
    submission.submit(chain)
    first, second = history(chain)
    state = f"{chain.run.folder}/slurm"
    assert first.pop("time") <= second.pop("time")
    assert first == {
        "backend": "sbatch", "skipped": [],
        "jobs": [
            {"stage": job.stage, "name": job.name, "job_id": str(7 + at), "script": f"{state}/{job.stage}.sbatch"}
            for at, job in enumerate(chain.jobs)
        ],
    }  # fmt: skip
    assert [job["job_id"] for job in second["jobs"]] == ["10", "11", "12"]
    (Path(state) / "submission.json").write_text("{}")
    with pytest.raises(LaunchError, match="submission.json cannot be read .* move it away"):
        submission.submit(chain)


def test_status_asks_the_queue_then_the_accounting(slurm, chain):
    submission.submit(chain)
    slurm.play(
        squeue={"8": "PENDING|Dependency|0:00|"},
        sacct={"7": "CANCELLED by 1000|0:15|00:10:00|n[1-2]\n"},
    )
    rows = [(one.stage, one.job_id, one.state, one.reason, one.elapsed, one.nodes) for one in submission.status(Path(chain.run.folder))]
    assert rows == [
        ("phase1", "7", "CANCELLED", "exit 0:15", "00:10:00", "n[1-2]"), ("phase2", "8", "PENDING", "Dependency", "0:00", ""),
        ("export", "9", "UNKNOWN", "", "", ""),
    ]  # fmt: skip
    with pytest.raises(LaunchError, match=r"holds no submission to Slurm \(slurm/submission.json\); give the folder of a run"):
        submission.status(Path(chain.run.results))
    assert submission.cancel(Path(chain.run.results)) == []


@pytest.mark.parametrize("backend", ["sbatch", "submitit"])
def test_from_inside_another_job(slurm, chain, monkeypatch, backend):
    """An interactive job's variables would be options for every srun of the new one."""
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "nlp"}
    other = {"SLURM_JOB_ID": "3", "SLURM_MEM_PER_CPU": "100", "SLURM_CPU_BIND": "quiet,mask_cpu:0x3", "SLURM_RESTART_COUNT": "2"}
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    for name, value in (kept | other).items():
        monkeypatch.setenv(name, value)
    submission.submit(chain, backend)
    assert json.loads((slurm.folder / "inherited.json").read_text()) == kept
    assert {name: os.environ[name] for name in other} == other


def test_without_slurm(chain, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for backend in ("sbatch", "submitit"):
        with pytest.raises(LaunchError, match="is not on this machine: submit from a login node, or use --backend local"):
            submission.submit(chain, backend)
    with pytest.raises(ConfigError, match="backend 'pbs' is not one of sbatch, submitit, local"):
        submission.submit(chain, "pbs")


# --------------------------------------------------------------------------------------------------------------- submitit


@pytest.fixture
def through_submitit(slurm, chain):
    pytest.importorskip("submitit")
    return submission.submit(chain, "submitit")


def report(sent, **variables):
    """What the batch shell does when the job has ended: run the job's epilogue."""
    block = Path(sent.script).read_text().rpartition("\nsource ")[0]
    slurm = {"SLURM_JOB_ID": sent.job_id, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"}
    return subprocess.run(
        ["bash", "-c", block + '\n"${BERTH_EPILOGUE[@]}"'],
        env={**environment(), **slurm, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_submitit_hands_out_jobs(slurm, chain, through_submitit):
    assert [(job.handle.job_id, job.job_id) for job in through_submitit.jobs] == [("7", "7"), ("8", "8"), ("9", "9")]
    assert [call[1:-1] for call in slurm.calls("sbatch")] == [
        [], ["--dependency=afterok:7", "--kill-on-invalid-dep=yes"], ["--dependency=afterok:8", "--kill-on-invalid-dep=yes"],
    ]  # fmt: skip
    folder = Path(chain.run.folder) / "slurm" / "submitit"
    sent, job = through_submitit.jobs[0], chain.jobs[0]
    assert sent.script == str(folder / "7_submission.sh")
    assert Path(sent.script).read_text() == sbatch_text(
        submission.with_revision(job), log=f"{folder}/%j_0_log.out",
        epilogue=["env", "SUBMITIT_EXECUTOR=slurm", sys.executable, "-u", "-m", "submitit.core._submit", str(folder)],
    )  # fmt: skip
    assert str(sent.handle.paths.stdout) == f"{folder}/7_0_log.out"
    assert history(chain)[0]["backend"] == "submitit"


def test_submitit_gives_the_result(chain, through_submitit):
    finish(chain, ("ckpt_2.pt", 1, 2, False), ("ckpt_12.pt", 1, 12, True))
    lines = [{"type": "LOG", "step": [0, n], "data": {"average_loss": loss}} for n, loss in ((1, 9.5), (2, 7.25))]
    lines.append({"type": "LOG", "step": [], "data": {"e2e_train_time": 3}})
    (Path(chain.run.folder) / "dllogger.json").write_text("".join(f"DLLL {json.dumps(line)}\n" for line in lines))
    sent = through_submitit.jobs[0]
    done = report(sent, BERTH_EXIT_CODE="0", BERTH_OUTCOME="done")
    assert done.returncode == 0, done.stderr
    assert sent.handle.done()
    assert sent.handle.result() == {
        "stage": "phase1", "folder": chain.run.folder, "exit_code": 0, "checkpoint": "ckpt_12.pt", "final_loss": 7.25,
    }  # fmt: skip
    assert submission.progress(Path(chain.run.folder)) == ("ckpt_12.pt", 7.25)


def test_submitit_tells_of_a_failure(chain, through_submitit):
    from submitit.core.utils import FailedJobError

    sent = through_submitit.jobs[1]
    assert report(sent, BERTH_EXIT_CODE="137", BERTH_OUTCOME="crashed").returncode != 0
    with pytest.raises(FailedJobError, match="stage phase2 of .* crashed with exit code 137; its log says why"):
        sent.handle.result()


def test_submitit_cancels(slurm, through_submitit):
    through_submitit.jobs[0].handle.cancel()
    assert slurm.calls("scancel")[0][-1] == "7"


@pytest.mark.parametrize(
    ("plays", "said"), [({"refused": 8}, "sbatch: error: Batch job submission failed: Invalid account"), ({"answer": "??"}, "??")]
)
def test_submitit_refused(slurm, chain, plays, said):
    pytest.importorskip("submitit")
    slurm.play(**plays)
    with pytest.raises(LaunchError) as error:
        submission.submit(chain, "submitit")
    assert str(error.value).startswith("sbatch through submitit: ") and said in str(error.value) and "\n" not in str(error.value)
    assert slurm.calls("scancel") == ([["scancel", "7"]] if "refused" in plays else [])


def test_outcome_without_a_job(monkeypatch, tmp_path):
    monkeypatch.delenv("BERTH_EXIT_CODE", raising=False)
    assert submission.outcome("prepare", str(tmp_path)) == {
        "stage": "prepare", "folder": str(tmp_path), "exit_code": 0, "checkpoint": None, "final_loss": None,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- from Python


def test_the_public_names_are_light():
    code = "import sys; from berth import launch; before = 'yaml' in sys.modules; launch.submit; launch.load_matrix\n"
    code += (
        "print(before, sorted({'torch', 'numpy', 'h5py', 'submitit'} & set(sys.modules)), sorted(set(launch._PUBLIC) - set(dir(launch))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.stdout == "False [] []\n", done.stderr
    assert all(getattr(launch, name).__name__ == name for name in launch._PUBLIC)
    with pytest.raises(AttributeError, match=r"module 'berth.launch' has no attribute 'sbumit'"):
        launch.sbumit  # noqa: B018


def test_the_example_of_the_package(slurm, tmp_path, monkeypatch, capsys):
    """What the docstring of berth.launch shows, with folders of this machine."""
    pytest.importorskip("submitit")
    example = launch.__doc__.partition("From Python::\n\n")[2].partition("\n``launch.status")[0]
    code = "\n".join(line.removeprefix("    ") for line in example.splitlines())
    code, last = code.replace("/lustre", str(tmp_path / "lustre")).rsplit("submission.jobs", 1)
    assert last.startswith("[-1].handle.result()")
    names = {}
    exec(code, names)
    assert [job.stage for job in names["submission"].jobs] == ["phase1", "phase2", "export"]
    assert names["submission"].jobs[-1].handle.job_id == "9"
    assert capsys.readouterr().out == sbatch_text(names["plan"].jobs[0]) + "\n"
    assert [one.job_id for one in launch.status(names["submission"].folder)] == ["7", "8", "9"]


# ------------------------------------------------------------------------------------------------------ on this machine


@pytest.fixture
def machine(tmp_path):
    """Records of both phases, a model, and a matrix with two ranks on this machine, all in a folder with an unpleasant name."""
    folder = tmp_path / HOSTILE
    for phase, length in ((1, 16), (2, 32)):
        for part in range(2):
            write_records(folder / f"p{phase}" / f"a_training_{part}.hdf5", 80, part, length=length)
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "more.yml").write_text(
        yaml.safe_dump(
            {
                "recipes": {
                    name: {
                        "based_on": "tiny", "title": "t", "source": "tests",
                        "phases": {
                            1: {"max_predictions_per_seq": 5, "max_steps": steps, "num_steps_per_checkpoint": 1000},
                            2: {"max_predictions_per_seq": 5},
                        },
                    }
                    for name, steps in (("short", 4), ("long", 250))
                },
                "rows": [
                    {
                        "source": "tests", "recipe": name,
                        "rows": [
                            {
                                "platform": "local", "nodes": 1, "phase": phase, "precision": "fp32", "micro_batch": 4, "ranks_per_node": 2,
                                "alias": f"{name} {phase}",
                            }
                            for phase in (1, 2)
                        ],
                    }
                    for name in ("short", "long")
                ],
            }
        )
    )  # fmt: skip
    return folder


def command(folder, recipe, phase, *more):
    return [
        sys.executable, "-m", "slurm.launch", "submit", "--backend", "local", "--cluster", "local", "--matrix", str(folder / "more.yml"),
        "--row", f"{recipe} 1", "--phase", phase, "--data", str(folder / "p1"), "--data_phase2", str(folder / "p2"),
        "--config", str(folder / "config.json"), "--results", str(folder / "results"), "--name", "run", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_both_phases_on_this_machine(machine):
    done = subprocess.run(command(machine, "short", "all"), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["phase1: done", "phase2: done"]
    run = machine / "results" / "run"
    checkpoints = json.loads((run / "manifest.json").read_text())["checkpoints"]
    assert [(one["file"], one["phase"], one["phase_step"]) for one in checkpoints if one["final"]] == [
        ("ckpt_4.pt", 1, 4),
        ("ckpt_10.pt", 2, 6),
    ]
    for phase in (1, 2):
        notes = (run / "slurm" / f"phase{phase}-local.attempts").read_text().splitlines()
        assert [line.split()[2].partition("=")[0] for line in notes] == ["begin", "step", "end"] and "outcome=done exit=0" in notes[-1]
        record = json.loads((run / "slurm" / f"phase{phase}-local.run.json").read_text())
        assert record["row"]["phase"] == phase and record["row"]["ranks_per_node"] == 2
    again = subprocess.run(command(machine, "short", "all"), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and again.stdout.splitlines()[-2:] == [f"phase{n}: complete already, not submitted" for n in (1, 2)]
    assert [entry["skipped"] for entry in json.loads((run / "slurm" / "submission.json").read_text())["submissions"]] == [
        [], ["phase1", "phase2"],
    ]  # fmt: skip


@pytest.mark.slow
def test_termination_on_this_machine_is_polite(machine):
    words = command(machine, "long", "1")
    log = machine / "results" / "run" / "dllogger.json"
    first = subprocess.Popen(words, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (log.exists() and '"average_loss":' in log.read_text()) and first.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 143, errors
    assert "== phase1: interrupted; run the same command again to go on from here" in errors
    (saved,) = json.loads((machine / "results" / "run" / "manifest.json").read_text())["checkpoints"][-1:]
    assert 0 < saved["phase_step"] < 250
    second = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    notes = (machine / "results" / "run" / "slurm" / "phase1-local.attempts").read_text()
    assert f" begin newest={saved['phase_step']} " in notes and notes.count(" end outcome=terminated exit=138") == 1
    assert json.loads((machine / "results" / "run" / "manifest.json").read_text())["checkpoints"][-1]["phase_step"] == 250


def test_a_failure_on_this_machine(machine, tmp_path):
    (machine / "config.json").write_text(json.dumps({**TINY, "hidden_act": "no such"}))
    done = subprocess.run(command(machine, "short", "all"), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "error: stage phase1 failed with exit code 2; its message stands above" in done.stderr
    assert not (machine / "results" / "run" / "slurm" / "phase2.sh").exists()
    assert os.access(machine / "results" / "run" / "slurm" / "phase1.sh", os.R_OK)
    assert shlex.quote(str(machine / "results" / "run")) in (machine / "results" / "run" / "slurm" / "phase1.sh").read_text()
