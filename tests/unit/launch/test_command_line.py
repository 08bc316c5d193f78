"""python -m slurm.launch: help, filters, errors, dry runs and studies, without a Slurm."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys

import pytest
import yaml

from berth.errors import ConfigError
from berth.launch import command_line, slurm_limits
from berth.launch.matrix import load_matrix
from berth.launch.parser import build_parser
from tests.support import ROOT, environment, make_project, write_records

SUBCOMMANDS = ("list", "plan", "validate", "render", "submit", "status", "cancel", "report", "matrix", "job")
LOCAL = ("--cluster", "local", "--data", "/d")
ROW1, ROW2 = "local_2x2x2x2_fp32_tiny-p1", "local_2x2x2x2_fp32_tiny-p2"


def run(capsys, *words):
    """Standard output of a command that ends well."""
    assert command_line.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def mistake(*words):
    with pytest.raises(ConfigError) as error:
        command_line.main([str(word) for word in words])
    return str(error.value)


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("words", [(), *((name,) for name in SUBCOMMANDS), ("matrix", "run")])
def test_help(capsys, words):
    with pytest.raises(SystemExit) as end:
        command_line.main([*words, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m slurm.launch {' '.join(words)}".rstrip())


def test_every_subcommand_is_listed_and_carried_out():
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert set(commands.choices) == set(SUBCOMMANDS)


def test_the_variables_of_run_sub_are_in_the_help_of_job(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["job", "--help"])
    assert "TRAIN_BATCH_SIZE or BATCHSIZE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "the following arguments are required: COMMAND"), (("lst",), "invalid choice: 'lst'"), (("list", "--nods", "1"), "--nods 1"),
        (("status",), "required: RUN_FOLDER"), (("matrix",), "required: run"), (("submit", "--backend", "pbs"), "invalid choice: 'pbs'"),
        (("plan", "--nodes", "four"), "invalid int value: 'four'"), (("job", "now"), "unrecognized arguments: now"),
    ],
)  # fmt: skip
def test_usage(words, said):
    message = mistake(*words)
    assert said in message and re.search(r"; see python -m slurm\.launch.* --help$", message)


@pytest.mark.parametrize("start", [("slurm/launch.py",), ("-m", "slurm.launch")])
def test_both_ways_to_start_it(start):
    def launch(*words):
        return subprocess.run([sys.executable, *start, *words], cwd=ROOT, env=environment(), capture_output=True, text=True)

    listed = launch("list", "--select", "platform=local,recipe=tiny")
    assert (listed.returncode, listed.stderr) == (0, "") and ROW1 in listed.stdout
    wrong = launch("plan", "--row", ROW1)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == (
        "error: --cluster NAME is missing: a profile in slurm/clusters, or the path of one; there are: azure-cyclecloud, bare, "
        "dgx-a100-superpod, dgx-h100, local\n"
    )


def test_list_needs_nothing_heavy():
    code = "import sys; from berth.launch.command_line import main; main(['list']); print(sorted({'torch', 'numpy', 'h5py', 'submitit'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


# ------------------------------------------------------------------------------------------------------------------ list


def test_list_shows_the_whole_matrix(capsys):
    lines = run(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines[2:]] == [row.name for row in load_matrix().rows]
    assert set(lines[1]) == {"-", " "}


def test_list_filters(capsys):
    facts = json.loads(run(capsys, "list", "--select", "platform=dgx-a100-80g,precision=fp16,phase=1", "--nodes", "2..4", "--json"))
    assert [(one["nodes"], one["gpus"], one["micro"], one["accum"], one["batch/gpu"], one["global"]) for one in facts] == [
        (2, 16, 256, 16, 4096, 65536), (4, 32, 256, 8, 2048, 65536),
    ]  # fmt: skip
    assert facts[1] == {
        "row": "dgx-a100-80g_4x8x256x8_fp16", "phase": 1, "seq": 128, "nodes": 4, "gpus": 32, "precision": "fp16", "micro": 256, "accum": 8,
        "batch/gpu": 2048, "global": 65536, "lr": "0.006", "recipe": "lamb",
        "published seq/s": load_matrix().published_for(load_matrix().row("dgx-a100-80g_4x8x256x8_fp16"))[0].sequences_per_second,
    }  # fmt: skip
    assert run(capsys, "list", "--select", "platform=dgx2,nodes=3") == "row\n---\n"
    assert json.loads(run(capsys, "list", "--select", "platform=dgx2,nodes=3", "--json")) == []


def test_list_aligns_numbers_to_the_right(capsys):
    assert run(capsys, "list", "--select", "recipe=tiny,nodes=2").splitlines() == [
        "row                         phase  seq  nodes  gpus  precision  micro  accum  batch/gpu  global  lr    recipe  published seq/s",
        "--------------------------  -----  ---  -----  ----  ---------  -----  -----  ---------  ------  ----  ------  ---------------",
        "local_2x2x2x2_fp32_tiny-p1      1   16      2     4  fp32           2      2          4      16  0.01  tiny",
        "local_2x2x2x2_fp32_tiny-p2      2   32      2     4  fp32           2      2          4      16  0.01  tiny",
    ]


def test_platforms_and_recipes(capsys):
    out = run(capsys, "list", "--platforms")
    matrix = load_matrix()
    assert [line.split()[0] for line in out.splitlines()] == [*matrix.platforms, *matrix.recipes]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--select", "platform=dgx-a100"), "'dgx-a100' is not known"), (("--select", "plattform=dgx2"), "must be <key>=<value>"),
        (("--nodes", "4..1"), "'4..1' is no list of node counts"), (("--nodes", "1", "--select", "nodes=2"), "say the same"),
        (("--matrix", "nowhere.yml"), "nowhere.yml"),
    ],
)  # fmt: skip
def test_filters_that_are_wrong(words, said):
    assert said in mistake("list", *words)


# -------------------------------------------------------------------------------------------------- what to run, and where


def stages(capsys, *words):
    return [line.split(":")[0].strip() for line in run(capsys, "plan", *words).splitlines()[1:]]


def test_plan(capsys, tmp_path):
    assert run(capsys, "plan", *LOCAL, "--row", ROW1, "--results", "a/../b") == (
        f"run bert-local in {tmp_path}/b/bert-local\n"
        "  phase1: local_2x2x2x2, 2 x 2 tasks, no time limit; global batch 16 = 2 x 2 x 4 (micro batch x accumulation x ranks), fp32, 12 steps\n"
        "  phase2: local_2x2x2x2, 2 x 2 tasks, no time limit, after phase1; global batch 16 = 2 x 2 x 4 (micro batch x accumulation x ranks), "
        "fp32, 6 steps\n"
    )


def test_which_stages(capsys, tmp_path):
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump({"workdir": "w", "input": "x"}))
    assert stages(capsys, *LOCAL, "--row", ROW1, "--phase", "1") == ["phase1"]
    assert stages(capsys, *LOCAL, "--row", ROW2, "--phase", "2") == ["phase2"]
    assert stages(capsys, *LOCAL, "--row", ROW1, "--vocab_file", "v.txt") == ["phase1", "phase2", "export"]
    assert stages(capsys, *LOCAL, "--row", ROW1, "--phase", "1", "--vocab_file", "v.txt", "--export") == ["phase1", "export"]
    prepared = ("--cluster", "local", "--row", ROW1, "--prepare", "prepare.yaml")
    assert stages(capsys, *prepared) == ["prepare", "phase1", "phase2", "export"]
    text = run(capsys, "render", *prepared, "--srun_only")
    assert f"--input_dir {tmp_path}/w " in text and f"--config_file {tmp_path}/w/vocab/bert_config.json" in text


@pytest.mark.parametrize(
    ("words", "first", "second"),
    [
        (("--row", ROW1), (2, 2, 2, "fp32"), (2, 2, 2, "fp32")),
        (("--row", ROW1, "--micro_batch", "4"), (2, 2, 4, "fp32"), (2, 2, 2, "fp32")),
        (("--row", ROW1, "--nodes", "1", "--row_phase2", ROW2), (1, 2, 2, "fp32"), (1, 2, 2, "fp32")),
        (("--nodes", "1", "--recipe", "tiny"), (1, 1, 8, "fp32"), (1, 1, 8, "fp32")),
        (("--nodes", "1", "--recipe", "tiny", "--micro_batch", "16", "--precision", "bf16"), (1, 1, 16, "bf16"), None),
        (("--platform", "dgx2", "--nodes", "4"), (4, 16, 64, "fp16"), (4, 16, 8, "fp16")),
        (("--row", "bert--DGX2_4x16x64x16"), (4, 16, 64, "fp16"), (4, 16, 8, "fp16")),
        (("--row", "dgxa100-80g_8gpu_fp16"), (1, 8, 256, "fp16"), (1, 8, 32, "fp16")),
        (("--row", "bert--DGX2", "--recipe", "deepspeed"), (1, 16, 64, "fp16"), (1, 16, 16, "fp16")),
        (("--row", "dgx-a100-80g_4x8x256x8", "--nodes", "8"), (8, 8, 256, "fp16"), (8, 8, 32, "fp16")),
        # presets name both phases, also where the platform has an earlier row of the same nodes
        (("--row", "dgx2_16gpu_fp16"), (1, 16, 64, "fp16"), (1, 16, 16, "fp16")),
        (("--row", "ngc_default"), (1, 8, 64, "fp16"), (1, 8, 8, "fp16")),
        # another precision has its own micro-batch
        (("--row", "dgx-a100-80g_4x8x256x8_fp16", "--precision", "tf32"), (4, 8, 128, "tf32"), (4, 8, 16, "tf32")),
        (("--row", "dgx-a100-80g_4x8x256x8_fp16", "--precision", "tf32", "--micro_batch", "64"), (4, 8, 64, "tf32"), (4, 8, 16, "tf32")),
    ],
)  # fmt: skip
def test_rows(words, first, second):
    arguments = build_parser().parse_args(["plan", *LOCAL, *words, *([] if second else ["--phase", "1"])])
    _, rows, _ = command_line.request(arguments)
    facts = {phase: (row.nodes, row.ranks, row.micro_batch, row.precision) for phase, row in rows.items()}
    assert facts == ({1: first, 2: second} if second else {1: first})
    if "--recipe" in words:
        assert all(row.recipe.name == words[words.index("--recipe") + 1] for row in rows.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--row", ROW1), "--cluster NAME is missing"), (("--cluster", "no"), "there is no site profile"),
        (("--cluster", "local", "--row", ROW1), "where is the data? --data DIR"),
        (LOCAL, "say what to run: --row NAME (see list), or --platform and --nodes"),
        ((*LOCAL, "--row", "locl_2x2x2x2_fp32_tiny-p1"), "no row 'locl_2x2x2x2_fp32_tiny-p1' in the matrix"),
        ((*LOCAL, "--row", ROW2), f"--row {ROW2} is a row of phase 2, here one of phase 1 is needed"),
        ((*LOCAL, "--row", ROW1, "--row_phase2", ROW1), f"--row_phase2 {ROW1} is a row of phase 1"),
        ((*LOCAL, "--row", ROW1, "--platform", "dgx2", "--row_phase2", ROW2, "--phase", "1"), "--row says the platform already"),
        ((*LOCAL, "--row", ROW1, "--row_phase2", ROW2, "--phase", "1"), "--row_phase2 is for --phase all"),
        ((*LOCAL, "--platform", "dgx3", "--nodes", "1"), "'dgx3' is not known"),
        ((*LOCAL, "--platform", "dgx3", "--nodes", "1", "--micro_batch", "2"), "'dgx3' is not known"),
        ((*LOCAL, "--row", ROW1, "--nodes", "3"), "do not divide the global batch 16"),
        ((*LOCAL, "--row", ROW1, "--precision", "fp8"), "fp8"),
        ((*LOCAL, "--row", ROW1, "--name", "a/b"), "must be the name of a folder"),
        ((*LOCAL, "--row", ROW1, "--time", "soon"), "'soon' is not [days-]hours:minutes:seconds"),
        ((*LOCAL, "--row", ROW1, "--config", "larg"), "larg is no model in bert_configs"),
        ((*LOCAL, "--row", ROW1, "--export"), "the stage export needs a vocabulary"),
        ((*LOCAL, "--row", ROW1, "--prepare", "no.yaml"), "no.yaml"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["plan", "render", "validate", "submit"])
def test_mistakes(command, words, said):
    assert said in mistake(command, *words)


def test_a_row_in_another_precision_leaves_fp16_reduction_behind():
    for more in ((), ("--micro_batch", "64")):
        words = ["plan", *LOCAL, "--row", "dgx-a100-80g_4x8x256x8_fp16", "--precision", "tf32", *more]
        _, rows, _ = command_line.request(build_parser().parse_args(words))
        assert [row.options for row in rows.values()] == [{}, {}]


def test_a_recipe_of_one_phase(capsys):
    assert stages(capsys, *LOCAL, "--row", "nd40rs_v2_1x8x4x128_fp16_azureml-adam-p1") == ["phase1"]


def test_all_mistakes_of_a_request_at_once():
    words = ("--cluster", "local", "--row", "nope", "--time", "99", "--steps", "0", "--seed", "-1")
    assert [line.strip().split(" ")[:2] for line in mistake("plan", *words).splitlines()] == [
        ["2", "mistakes:"], ["no", "row"], ["'99'", "is"], ["--steps", "0"], ["--seed", "-1"], ["where", "is"],
    ]  # fmt: skip
    message = mistake("plan", "--cluster", "nowhere", "--row", "nope")
    assert "there is no site profile" in message and "no row 'nope'" in message


def test_some_steps_ask_for_the_time_of_some_steps(capsys):
    words = ("--cluster", "dgx-a100-superpod", "--row", "dgx-a100-80g_1x8x256x32_fp16", "--data", "/d", "--config", "large")
    # published: 4591 and 1657 sequences/s on one node
    for steps, times in (("50", ["00:30:00", "00:30:00"]), ("1000", ["05:00:00", "07:00:00"]), ("7038", ["08:00:00", "08:00:00"])):
        text = run(capsys, "render", *words, "--steps", steps)
        assert [line.partition("=")[2] for line in text.splitlines() if line.startswith("#SBATCH --time")] == times


def test_what_would_run_here(capsys, tmp_path):
    words = ("--backend", "local", "--cluster", "dgx-a100-superpod", "--results", tmp_path, "--data", "/d", "--config", "large")
    text = run(capsys, "render", *words, "--row", ROW1, "--phase", "1")
    assert "sbatch" not in text.lower() and "exec " + sys.executable + " -m berth.launch.spawn --ranks 4" in text
    for command in ("validate", "submit"):
        message = mistake(command, *words, "--row", "dgx-a100-80g_2x8x256x16_fp16", "--phase", "1")
        assert "phase1: row dgx-a100-80g_2x8x256x16_fp16 takes 16 GPUs, this machine has 0; choose a smaller row" in message
        assert "partition" not in message and "container" not in message


def test_validation_reports_everything_before_submission(capsys, tmp_path):
    words = ("--cluster", "local", "--row", ROW1, "--data", tmp_path / "none", "--config", tmp_path / "no.json", "--results", tmp_path)
    for command in (("validate", "--offline"), ("submit",)):
        message = mistake(*command, *words)
        assert re.match(r"wrong, found before submission \([2-9]\):\n  ", message)
        assert f"{tmp_path}/no.json" in message and f"data folder {tmp_path}/none does not exist" in message
    assert not (tmp_path / "bert-local").exists()


def test_render(capsys):
    text = run(capsys, "render", *LOCAL, "--row", ROW1)
    assert "# ===== phase1\n#!/usr/bin/env bash\n#SBATCH --job-name=local_2x2x2x2\n" in text
    assert "# ===== phase2, submitted with --dependency=afterok:<phase1> --kill-on-invalid-dep=yes\n" in text
    only = run(capsys, "render", *LOCAL, "--row", ROW1, "--srun_only").splitlines()
    assert [line.split()[0] for line in only if line] == ["#", "srun", "#", "srun"]
    assert all(line in text.splitlines() for line in only)


def test_a_local_run_takes_this_python_and_no_container():
    words = ["--backend", "local", "--data", "/d", "--row", ROW1, "--cluster", str(ROOT / "slurm" / "clusters" / "dgx-a100-superpod.yaml")]
    made, _, _ = command_line.request(build_parser().parse_args(["submit", *words]))
    assert [(job.image, job.mounts, [step.program[0] for step in job.steps if step.name == "train"]) for job in made.jobs] == [
        (None, (), [sys.executable])
    ] * 2


# --------------------------------------------------------------------------------------------------------------- studies


def test_a_study_as_a_dry_run(capsys):
    words = ("--select", "platform=dgx-a100-80g,precision=fp16,phase=2", "--nodes", "2..32", "--steps", "7")
    text = run(capsys, "matrix", "run", "--cluster", "local", "--data", "/d", "--results", "/r", "--dry_run", *words)
    names = re.findall(r"^# ===== (.*)$", text, re.MULTILINE)
    assert names == [f"dgx-a100-80g_{nodes}x8x32x{128 // nodes}_fp16" for nodes in (2, 4, 8, 16, 32)]
    lines = [line for line in text.splitlines() if "run_pretraining.py" in line]
    assert len(lines) == 5
    for name, line in zip(names, lines, strict=True):
        words = line.split()
        assert words[words.index("--steps_this_run") + 1] == "7" and "--skip_checkpoint" in words and "--phase2" not in words
        assert words[words.index("--output_dir") + 1] == f"/r/matrix/{name}"


def test_a_study_of_nothing():
    assert mistake("matrix", "run", *LOCAL, "--select", "platform=dgx2,nodes=3") == "no row of the matrix has all of that; see list"


def test_a_study_checks_every_row_before_it_submits_one(tmp_path):
    message = mistake("matrix", "run", *LOCAL, "--select", "recipe=tiny,nodes=2", "--config", "tiny")
    for phase in (1, 2):
        assert f"\n  local_2x2x2x2_fp32_tiny-p{phase}: data folder /d does not exist" in message


def study_fakes(folder, monkeypatch):
    (folder / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\nwc -l < {folder}/calls\n')
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize("parallel", [False, True])
def test_a_study_is_a_chain_or_side_by_side(capsys, tmp_path, monkeypatch, parallel):
    study_fakes(tmp_path, monkeypatch)
    words = ["matrix", "run", *LOCAL, "--results", tmp_path / "r", "--select", "recipe=tiny", "--name", "s t", "--no_validate"]
    out = run(capsys, *words, *(["--parallel"] if parallel else []))
    names = [row.name for row in load_matrix().select(recipe="tiny")]
    assert out.splitlines() == [
        *(f"{name}: {at}" for at, name in enumerate(names, 1)), f"report: python -m slurm.launch report '{tmp_path}/r/s t'",
    ]  # fmt: skip
    calls = (tmp_path / "calls").read_text().splitlines()
    waiting = [" ".join(word for word in line.split() if word.startswith("--dep")) for line in calls]
    assert waiting == (["", "", "", ""] if parallel else ["", *(f"--dependency=afterany:{at}" for at in (1, 2, 3))])


@pytest.mark.slow
def test_a_study_on_this_machine_and_its_report(capsys, tmp_path):
    make_project(tmp_path)
    for part in range(2):
        write_records(tmp_path / "short" / f"a_training_{part}.hdf5", 80, part, length=16)
    (tmp_path / "more.yml").write_text(
        yaml.safe_dump(
            {
                "recipes": {"short": {"based_on": "tiny", "title": "t", "source": "tests", "phases": {1: {"max_predictions_per_seq": 5, "max_steps": 40}}}},
                "rows": [
                    {
                        "source": "tests", "recipe": "short",
                        "rows": [{"platform": "local", "nodes": nodes, "phase": 1, "precision": "fp32", "micro_batch": 4} for nodes in (1, 2)],
                    }
                ],
            }
        )
    )  # fmt: skip
    words = [
        "matrix", "run", "--backend", "local", "--cluster", "local", "--matrix", tmp_path / "more.yml", "--select", "recipe=short", "--steps", "30",
        "--data", tmp_path / "short", "--config", tmp_path / "config.json", "--results", tmp_path / "r",
    ]  # fmt: skip
    assert run(capsys, *words).splitlines()[-1] == f"report: python -m slurm.launch report {tmp_path}/r/matrix"
    runs = sorted(path.name for path in (tmp_path / "r" / "matrix").iterdir())
    assert runs == ["local_1x1x4x4_fp32_short-p1", "local_2x1x4x2_fp32_short-p1"]
    assert not list((tmp_path / "r").rglob("ckpt_*"))
    found = json.loads(run(capsys, "report", tmp_path / "r" / "matrix", "--json"))
    assert len(found) == 2
    table = run(capsys, "report", tmp_path / "r" / "matrix", "--matrix", tmp_path / "more.yml")
    assert "local" in table and len(table.splitlines()) >= 3


def test_table():
    rows = [{"a": "x", "n": 5}, {"a": "long", "n": ""}]
    assert command_line.table(rows, ("a", "n")) == "a     n\n----  -\nx     5\nlong"
    assert command_line.table([], ("a",)) == "a\n-"


def test_validation_asks_sbatch_itself_where_slurm_answers(monkeypatch, capsys):
    asked = []
    answers = {"phase1": None, "phase2": "sbatch: error: invalid account"}

    def refuse(text):
        stage = re.search(r"^BERTH_STAGE=(\w+)$", text, re.MULTILINE)[1]
        asked.append(stage)
        return answers[stage]

    monkeypatch.setattr(command_line, "check", lambda *words, **more: None)
    monkeypatch.setattr(command_line.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(slurm_limits.SlurmProbe, "sinfo", lambda self: [])
    monkeypatch.setattr(slurm_limits, "test_only", refuse)
    words = ("validate", *LOCAL, "--row", ROW1, "--row_phase2", ROW2)
    assert mistake(*words) == "refused by sbatch --test-only:\n  phase2: sbatch: error: invalid account"
    assert asked == ["phase1", "phase2"]
    assert run(capsys, *words, "--offline") == "" and run(capsys, *words, "--backend", "local") == "" and len(asked) == 2
    monkeypatch.setattr(slurm_limits.SlurmProbe, "sinfo", lambda self: None)
    assert run(capsys, *words) == "" and len(asked) == 2
