"""Jobs as text: golden files of whole scripts, the scripts run by bash with a stand-in for srun, and what Slurm's reader makes of them.

``BERTH_UPDATE_GOLDENS=1 pytest tests/unit/launch/test_render.py`` writes the golden files anew; look at the difference before committing it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from berth.errors import ConfigError
from berth.launch import clusters, plan, render
from berth.launch.clusters import Cluster, Container, load_cluster, names
from berth.launch.matrix import load_matrix
from berth.launch.plan import Job, Run, make_plan
from berth.launch.render import (
    directive,
    directives,
    job_block,
    line,
    local_text,
    quoted,
    sbatch_options,
    sbatch_text,
    srun,
    srun_lines,
    word,
)
from tests.support import ROOT

GOLDEN = ROOT / "tests" / "golden" / "launch"
MATRIX = load_matrix()
HOME = "/opt/berth"  # where the project seems to lie
NASTY = """a b'c"d$HOME`id`;e&f#g%h\\i*?[j]!k~(l){m}<n>|o\té字 """
LINE_BREAK = "a\nb"

SHELLCHECK = str(Path(sys.executable).with_name("shellcheck"))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of the project and of Python are those of no machine."""
    for module in (plan, render):
        monkeypatch.setattr(module, "ROOT", Path(HOME))
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")


def site(name: str) -> Cluster:
    return dataclasses.replace(load_cluster(name), file=f"{HOME}/slurm/clusters/{name}.yaml")


def chain(
    cluster: Cluster, stages: Sequence[str], *, platform: str | None = None, nodes: int = 4, hours: float | None = None, **values: object
):
    """The jobs of a run of the platform's rows."""
    chosen = {phase: MATRIX.default_row(platform or str(cluster.platform), nodes, phase) for phase in (1, 2) if f"phase{phase}" in stages}
    given = {
        "name": "bert-large",
        "results": cluster.results or "/shared/results",
        "inputs": dict.fromkeys((1, 2), cluster.data or "/shared/wikipedia"),
        "config_file": f"{HOME}/bert_configs/large.json",
        "vocab_file": f"{cluster.data or '/shared/wikipedia'}/vocab/vocab.txt",
    }
    run = Run(**(given | values))
    return make_plan(run, cluster, chosen, stages, hours=None if hours is None else {1: hours, 2: hours}).jobs


def script(cluster: Cluster, **values: object) -> Job:
    return chain(cluster, ["phase1"], platform="dgx-a100-80g", **values)[0]


# ------------------------------------------------------------------------------------------------------------ golden files


def texts() -> dict[str, str]:
    """Every golden file: a chain with a container on shared storage, images on each node, no container, an odd batch, this machine."""
    superpod = chain(
        site("dgx-a100-superpod"), ["prepare", "phase1", "phase2", "export"], hours=1.4, name="bert large, seed 7", seed=7,
        prepare="/lustre/berth/wikipedia.yaml", workdir="/lustre/berth/wikipedia", evaluate=True,
    )  # fmt: skip
    scripts = {f"superpod-4nodes-{job.stage}.sbatch": sbatch_text(job) for job in superpod}
    (hopper,) = chain(site("dgx-h100"), ["phase2"], nodes=2, init_checkpoint="/home/shared/berth/start/ckpt_7038.pt", preflight=False)
    scripts["dgx-h100-2nodes-phase2.sbatch"] = sbatch_text(hopper)
    (bare,) = chain(site("bare"), ["phase1"], platform="dgx1-16g", extra=("--log_freq", "10"))
    scripts["bare-dgx1-4nodes-phase1.sbatch"] = sbatch_text(bare)
    (azure,) = chain(site("azure-cyclecloud"), ["phase1"], platform="nc24rs_v3", nodes=2, study=True, steps_this_run=50, time="1:00:00")
    epilogue = ["env", "SUBMITIT_EXECUTOR=slurm", "python", "-m", "submitit.core._submit", "/shared/berth results"]
    scripts["azure-nc24rs-2nodes-study.sbatch"] = sbatch_text(azure, log="/shared/berth/results/logs/%j_0_log.out", epilogue=epilogue)
    demo = chain(site("local"), ["phase1"], nodes=1, config_file=f"{HOME}/bert_configs/tiny.json")
    scripts["local-demo-phase1.sh"] = local_text(demo[0])
    ranks = MATRIX.row("local_2x2x2x2_fp32_tiny-p1")
    run = Run("tiny", "/shared/results", {1: "/shared/records"}, f"{HOME}/bert_configs/tiny.json")
    scripts["local-4ranks-phase1.sh"] = local_text(make_plan(run, site("local"), {1: ranks}, ["phase1"]).jobs[0])
    return scripts


@pytest.mark.usefixtures("elsewhere")
def test_scripts_are_those_of_the_golden_files() -> None:
    made = texts()
    if os.environ.get("BERTH_UPDATE_GOLDENS"):
        for path in GOLDEN.glob("*"):
            path.unlink()
        for name, text in made.items():
            (GOLDEN / name).write_text(text, encoding="utf-8")
    assert sorted(path.name for path in GOLDEN.glob("*")) == sorted(made)
    for name, text in made.items():
        assert text == (GOLDEN / name).read_text(encoding="utf-8"), name


@pytest.mark.usefixtures("elsewhere")
def test_the_same_job_gives_the_same_bytes() -> None:
    assert texts() == texts()


def test_golden_files_are_good_shell() -> None:
    for path in sorted(GOLDEN.glob("*")):
        subprocess.run(["bash", "-n", str(path)], check=True)
    # SC1091: the body lies elsewhere; SC2034: it reads the variables; SC2317, SC2329: it calls the functions; SC2209: a stage is called export
    command = [SHELLCHECK, "--shell=bash", "--exclude=SC1091,SC2034,SC2209,SC2317,SC2329", *map(str, sorted(GOLDEN.glob("*")))]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_every_row_renders_for_every_site() -> None:
    """Syntax of all at once: the blocks, each inside a function of its own, are read by one bash."""
    blocks = []
    for name in names():
        for row in MATRIX.rows:
            run = Run("n", "/r", {row.phase: "/d"}, "/m/large.json", "/m/vocab.txt")
            (job,) = make_plan(run, load_cluster(name), {row.phase: row}, [f"phase{row.phase}"]).jobs
            text = sbatch_text(job)
            assert text == sbatch_text(job) and f"#SBATCH --job-name={row.job_name}\n" in text
            head = read_directives(text)
            assert (head["--nodes"], head["--ntasks-per-node"]) == (str(row.nodes), str(row.ranks))
            blocks.append("wrapped() {\n" + job_block(job) + "}\n")
    assert len(blocks) == len(names()) * len(MATRIX.rows)
    checked = subprocess.run(["bash", "-n"], input="".join(blocks), capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


# ----------------------------------------------------------------------------------------------------------- #SBATCH lines


def read_directives(text: str) -> dict[str, str]:
    """Options of the #SBATCH lines, each one word, by :func:`read_words`."""
    options = {}
    for each in text.split("\n"):
        if each.startswith("#SBATCH "):
            (option,) = read_words(each.removeprefix("#SBATCH "))
            name, _, value = option.partition("=")
            options[name] = value
        elif each and not each.startswith("#"):
            break  # Slurm looks no further
    return options


def read_words(text: str) -> list[str]:
    """The words of an #SBATCH line as Slurm's reader takes them: a backslash takes the next letter as it is, also in quotes; quotes group,
    # begins a comment; a space outside of quotes ends the word, even after a backslash."""
    words, current, quote, escape = [], None, "", False
    for letter in text:
        if letter in " \t\v\f\r" and not quote:
            words += [] if current is None else [current]
            current, escape = None, False
        elif escape:
            current, escape = (current or "") + letter, False
        elif letter == "\\":
            current, escape = current or "", True
        elif letter == quote:
            quote = ""
        elif letter in "'\"" and not quote:
            current, quote = current or "", letter
        elif letter == "#" and not quote:
            break
        else:
            current = (current or "") + letter
    assert not quote and not escape, text
    return words + ([] if current is None else [current])


LINES = [
    ("--a=b\\ c", ["--a=b", "c"]),
    ("--a='b c' # d", ["--a=b c"]),
    ('"--a=b # c"', ["--a=b # c"]),
    ('--a="b\\"c\'d\\\\e"', ["--a=b\"c'd\\e"]),
    ("--a='b\"c\\'d'", ["--a=b\"c'd"]),
    ('--a=b"c d"e', ["--a=bc de"]),
    ('--a=""', ["--a="]),
    ("--a=b\\nc", ["--a=bnc"]),
]


def read_by_slurm(folder: Path, lines: Sequence[str]) -> list[str]:
    """The words sbatch finds in #SBATCH lines; it says so before it looks for the controller, which is not there."""
    (folder / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\nSlurmctldPort=1\nNodeName=localhost\nMessageTimeout=2\n")
    (folder / "job").write_text("\n".join(["#!/bin/bash", *lines, "true", ""]), encoding="utf-8")
    variables = {"PATH": os.environ["PATH"], "SLURM_CONF": str(folder / "slurm.conf")}
    said = subprocess.run(["sbatch", "-vvv", str(folder / "job")], env=variables, capture_output=True, text=True, timeout=60)
    return [each.partition('argument "')[2][:-1] for each in said.stderr.split("\n") if "Found in script, argument" in each]


def test_the_reader_of_this_test_can_tell() -> None:
    assert [read_words(text) for text, _ in LINES] == [words for _, words in LINES]
    assert read_directives("#SBATCH --a=b\n#SBATCH --c='d e' # f\n\nx\n#SBATCH --h=i") == {"--a": "b", "--c": "d e"}


VALUES = (NASTY, "plain", "a100&nvlink", "[rack1|rack2]", "é字", "x#y", " lead", "tail ", "\\", "\\\\", "a\\ b", "''", '"', "\t\v", "")


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is not installed")
def test_slurm_reads_directives_as_this_test_does(tmp_path: Path) -> None:
    assert read_by_slurm(tmp_path, [f"#SBATCH {text}" for text, _ in LINES[1:]]) == [words[0] for _, words in LINES[1:]]
    assert read_by_slurm(tmp_path, [f"#SBATCH {LINES[0][0]}"]) == LINES[0][1]
    found = read_by_slurm(tmp_path, [directive("comment", value) for value in VALUES] + [f"#SBATCH {quoted(f'--comment={NASTY}')}"])
    assert found == [f"--comment={value}" for value in (*VALUES, NASTY)]


def test_values_of_directives_arrive_as_they_were() -> None:
    for value in VALUES:
        assert read_directives(directive("comment", value)) == {"--comment": value}
    assert directive("mem", "0") == "#SBATCH --mem=0" and directive("requeue") == "#SBATCH --requeue"
    assert (quoted("gpu:8,é"), quoted("a b"), quoted('"\\')) == ("gpu:8,é", '"a b"', '"\\"\\\\"')


@pytest.mark.parametrize("mark", ["\n", "\r", "\0"])
def test_a_line_break_is_refused_in_a_directive(mark: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot stand in an #SBATCH line \(--output\): it holds a line break"):
        directive("output", f"/r{mark}#SBATCH --uid=root")


def test_directives_of_a_job() -> None:
    cluster = Cluster(
        "c", "c.yaml", gpu_request="gres", cpus_per_task=16, memory="500G", exclusive=True, partition="p", account="a", qos="q",
        constraint="x&(y|z)", walltime_limit="2-00:00:00", warning_s=90, sbatch=("--reservation=my nodes", "--comment=a # b"), slurm_names=("c",),
    )  # fmt: skip
    job = script(cluster, results="/r d")
    assert directives(job) == [
        "#SBATCH --job-name=dgx-a100-80g_4x8x256x8",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --gres=gpu:8",
        "#SBATCH --mem=500G",
        "#SBATCH --exclusive",
        "#SBATCH --partition=p",
        "#SBATCH --account=a",
        "#SBATCH --qos=q",
        '#SBATCH --constraint="x&(y|z)"',
        "#SBATCH --time=2-00:00:00",
        '#SBATCH --output="/r d/bert-large/slurm/phase1-%j.log"',
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@90",
        '#SBATCH "--reservation=my nodes"',
        '#SBATCH "--comment=a # b"',
    ]
    assert directives(job, log="/l/%j.out")[12] == "#SBATCH --output=/l/%j.out"
    assert len(read_directives("\n".join(directives(job)))) == 18


def test_gpus_are_asked_for_as_the_site_wants_it() -> None:
    def asked(way: str, platform: str) -> list[str]:
        job = chain(Cluster("c", "c.yaml", gpu_request=way), ["phase1"], platform=platform, nodes=1)[0]
        return [each for each in directives(job) if "gpu" in each.partition("=")[0] + each.partition("=")[2] and "name" not in each]

    assert asked("gres", "nc24rs_v3") == ["#SBATCH --gres=gpu:4"]
    assert asked("gpus-per-node", "nc24rs_v3") == ["#SBATCH --gpus-per-node=4"]
    assert asked("none", "nc24rs_v3") == asked("gres", "local") == []


def test_the_name_of_the_log() -> None:
    (job,) = chain(site("bare"), ["phase1"], platform="dgx1-16g", results="/r/100%j x")
    assert render.log_path(job) == "/r/100%%j x/bert-large/slurm/phase1-%j.log"  # the user's % is no pattern of Slurm
    (job,) = chain(site("bare"), ["phase1"], platform="dgx1-16g", name="a\\b")
    with pytest.raises(ConfigError, match="holds a backslash, which Slurm does not allow in the name of a log; choose another folder"):
        sbatch_text(job)


def test_options_that_are_known_at_submission() -> None:
    assert sbatch_options() == []
    assert sbatch_options("12:13", extra={"array": "0-3"}) == ["--array=0-3", "--dependency=afterok:12:13", "--kill-on-invalid-dep=yes"]
    assert sbatch_options("12", "afterany") == ["--dependency=afterany:12", "--kill-on-invalid-dep=yes"]


# ------------------------------------------------------------------------------------------------ the block, run by bash


def stand_in(folder: Path, name: str = "srun") -> Path:
    """A program called ``name`` that notes the words and environment it got; its folder, for PATH."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "with open(os.environ['NOTES'], 'a') as notes:\n"
        "    print(json.dumps([sys.argv[1:], dict(os.environ)]), file=notes)\n",
        encoding="utf-8",
    )
    program.chmod(0o755)
    return folder


def run_block(folder: Path, block: str, after: str) -> list[tuple[list[str], dict[str, str]]]:
    """``block`` and then ``after`` in bash; words and environment of every call of the stand-in."""
    notes = folder / "notes"
    notes.unlink(missing_ok=True)
    variables = {"PATH": f"{stand_in(folder / 'bin')}:{os.environ['PATH']}", "NOTES": str(notes), "SLURM_JOB_ID": "77", "HOME": "/nowhere"}
    variables |= {
        "BERTH_RECORD": "/a b/run.json",
        "BERTH_JOB": "/a b/job.json",
        "BERTH_PREFLIGHT": "/a b/pre",
        "BERTH_CONTAINER": "berth_77_0",
    }
    done = subprocess.run(["bash", "-u", "-c", block + after], env=variables, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [(words, environment) for words, environment in map(json.loads, notes.read_text().splitlines())] if notes.exists() else []


def expanded(words: Sequence[str]) -> list[str]:
    """The words with the variables that bash is to fill in."""
    values = {
        '"$BERTH_RECORD"': "/a b/run.json",
        '"$BERTH_JOB"': "/a b/job.json",
        '"$BERTH_PREFLIGHT"': "/a b/pre",
        '"--container-name=$BERTH_CONTAINER"': "--container-name=berth_77_0",
    }
    return [values[each] if isinstance(each, plan.Raw) else each for each in words]


STEPS = 'for step in "${BERTH_STEPS[@]}"; do ( "berth_step_$step" ); done\n'


def hostile(value: str, container: bool) -> Job:
    image = Container(f"/i{value}/x.sqsh", mount_home=True, writable=True, remap_root=True)
    # nothing with a comma, colon or line break can be mounted
    return script(
        Cluster(
            "c", f"/c{value}.yaml", container=image if container else None, environment={"A": value, "B": "$A"}, python=f"/p{value}/python",
            srun=(f"--comment={value}",), preflight=True, mounts=(f"/s{value}:/t{value}:ro",), setup=("export FROM_SETUP='x y'",),
        ),
        name="n" + value.replace("/", "").replace("\n", ""), results=f"/r{value}", inputs={1: f"/d{value}"}, config_file=f"/m{value}.json",
        vocab_file=f"/v{value}.txt", extra=(value, "", "-", "--x=" + value), init_checkpoint=f"/k{value}/ckpt_1.pt",
    )  # fmt: skip


@pytest.mark.parametrize("container", [True, False])
@pytest.mark.parametrize(
    "value", [NASTY, "'", '"', "\\", "$(touch x)", "`touch x`", "-x", "é\u00a0字", "*", "\x1b[0m", "~", "{a..b}", "!!", ""]
)
def test_hostile_words_reach_srun_unchanged(tmp_path: Path, value: str, container: bool) -> None:
    job = hostile(value, container)
    calls = run_block(tmp_path, job_block(job), "berth_setup\n" + STEPS)
    assert [words for words, _ in calls] == [expanded(srun(step, job))[1:] for step in job.steps]
    assert value in calls[-1][0] and f"--comment={value}" in calls[-1][0] and f"/d{value}" in calls[-1][0]
    for _, environment in calls:
        assert (environment["A"], environment["B"], environment["FROM_SETUP"]) == (value, "$A", "x y")
        assert [environment[name] for name in ("PYTHONUNBUFFERED", "HF_HUB_OFFLINE", "SLURM_EXPORT_ENV")] == ["1", "1", "ALL"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "notes"]  # nothing else was run


def test_a_line_break_reaches_a_program_without_container(tmp_path: Path) -> None:
    calls = run_block(tmp_path, job_block(hostile("\n;touch x\n", container=False)), STEPS)
    assert calls[-1][0][-1] == "--x=\n;touch x\n" and not (tmp_path / "x").exists()
    assert calls[-1][1]["A"] == "\n;touch x\n"


def test_variables_of_the_block_hold_what_they_should(tmp_path: Path) -> None:
    job = hostile(NASTY, container=True)
    block = job_block(job, epilogue=["env", f"X={NASTY}", LINE_BREAK])
    scalars = [
        "BERTH_BACKEND", "BERTH_STAGE", "BERTH_ROOT", "BERTH_FOLDER", "BERTH_NODE_COUNT", "BERTH_RANKS_PER_NODE", "BERTH_MAX_RESTARTS",
        "BERTH_CRASH_LIMIT", "BERTH_IMAGE", "BERTH_JOB_JSON",
    ]  # fmt: skip
    quoted = " ".join(f'"${name}"' for name in scalars)
    (words, _), (epilogue, _) = run_block(tmp_path, block, f'srun {quoted} "${{BERTH_STEPS[@]}}"\nsrun "${{BERTH_EPILOGUE[@]}}"\n')
    values = ["slurm", "phase1", str(clusters.ROOT), job.folder, "4", "8", "100", "3", f"/i{NASTY}/x.sqsh"]
    assert words[:9] == values and words[10:] == ["preflight", "train"]
    assert json.loads(words[9]) == json.loads(json.dumps(job.record))
    assert epilogue == ["env", f"X={NASTY}", LINE_BREAK]
    # the body reads all of these, and nothing else that it does not set itself
    body = (ROOT / "slurm" / "run.sub").read_text(encoding="utf-8")
    assert [
        name for name in (*scalars, "BERTH_STEPS", "BERTH_MAKES", "BERTH_EPILOGUE") if f"${name}" not in body and f"${{{name}" not in body
    ] == []


def test_shown_lines_are_those_that_run(tmp_path: Path) -> None:
    job = hostile(NASTY, container=True)
    by_block = run_block(tmp_path, job_block(job), STEPS)
    shown = run_block(tmp_path, "", "\n".join(srun_lines(job)))
    assert len(shown) == 2 and [words for words, _ in shown] == [words for words, _ in by_block]


def test_a_step_becomes_srun_itself(tmp_path: Path) -> None:
    """Signals go to the process of the step: no shell may stand between."""
    job = script(site("bare"))
    assert f"berth_step_train() {{\n  exec {line(srun(job.steps[0], job))}\n}}\n" in job_block(job)


def test_the_local_backend_runs_the_same_programs(tmp_path: Path) -> None:
    container = Container("registry.site#berth:1", "shared", "/images")
    cluster = dataclasses.replace(site("dgx-a100-superpod"), python="python3", setup=("exit 9",), container=container)
    (job,) = chain(cluster, ["phase1"], name=f"n{NASTY}".replace("/", ""))
    block = job_block(job, backend="local").replace(sys.executable, "srun")
    calls = run_block(tmp_path, block, "berth_setup\n" + STEPS)  # without the site's setup, and without an import of images
    spawn = ["-m", "berth.launch.spawn", "--ranks", "32", "--label", "--"]
    assert [words for words, _ in calls] == [[*spawn, *expanded(step.program)] for step in job.steps if not step.host]
    assert [step.name for step in job.steps] == ["import", "preflight", "train"]


# ------------------------------------------------------------------------------------------------------------ words of srun


def test_words_of_srun_with_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "ROOT", Path(HOME))
    job = script(
        Cluster(
            "c", "c.yaml", container=Container("img", writable=True, remap_root=True), environment={"Z": "1", "B": "2"}, mpi="pmix",
            cpus_per_task=4, srun=("--overlap",),
        ),
        results="/r",
    )  # fmt: skip
    words = srun(dataclasses.replace(job.steps[0], program=("true",)), dataclasses.replace(job, mounts=("/r:/r", "/d:/d:ro")))
    assert list(words) == [
        "srun", "--job-name=train", "--nodes=4", "--ntasks=32", "--ntasks-per-node=8", "--kill-on-bad-exit=1", "--mpi=pmix",
        "--cpus-per-task=4", "--cpu-bind=none", "--label", "--container-image=img", '"--container-name=$BERTH_CONTAINER"',
        "--container-mounts=/r:/r,/d:/d:ro", f"--container-workdir={HOME}",
        "--container-env=MASTER_ADDR,MASTER_PORT,BERTH_RECORD,BERTH_JOB,BERTH_PREFLIGHT,BERTH_FAILURES,BERTH_IMAGE_SHA256,BERTH_NODES,PYTHONUNBUFFERED,B,Z",
        "--no-container-mount-home", "--container-writable", "--container-remap-root", "--overlap", "true",
    ]  # fmt: skip


def test_words_of_srun_of_one_task_and_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "ROOT", Path(HOME))
    job = script(Cluster("c", "c.yaml", container=Container("img")), results="/r")
    alone = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--mpi=none"]
    step = plan.Step("import", ("true",), 1, 1, host=True)
    assert list(srun(step, job)) == ["srun", "--job-name=import", *alone, "--cpu-bind=none", f"--chdir={HOME}", "true"]
    without = dataclasses.replace(job, image=None)
    step = plan.Step("prepare", ("true",), 1, 1, cpus_per_task=8)  # bound to the eight it asked for
    assert list(srun(step, without)) == ["srun", "--job-name=prepare", *alone, "--cpus-per-task=8", f"--chdir={HOME}", "true"]


def test_words_for_bash() -> None:
    assert [word(text) for text in ("plain", "", "a b", "$x", plan.Raw('"$x"'))] == ["plain", "''", "'a b'", "'$x'", '"$x"']
    assert shlex.split(line(["a", NASTY, LINE_BREAK])) == ["a", NASTY, LINE_BREAK]
    with pytest.raises(ConfigError, match="holds a zero byte"):
        word("a\0b")


def test_shellcheck_is_there() -> None:
    assert shutil.which(SHELLCHECK), "the development requirements bring shellcheck"
