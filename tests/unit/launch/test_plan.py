"""Rows, a site and a run as a chain of jobs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from berth.errors import ConfigError
from berth.launch import plan
from berth.launch.clusters import Cluster, Container
from berth.launch.matrix import load_matrix
from berth.launch.plan import Raw, Run, Step, describe, image_path, job_walltime, make_plan, mounts, training_options

MATRIX = load_matrix()
ROWS = {phase: MATRIX.default_row("dgx-a100-80g", 4, phase, "fp16") for phase in (1, 2)}
RUN = Run(name="run", results="/r", inputs={1: "/d", 2: "/d"}, config_file="/m/large.json", vocab_file="/m/vocab.txt")
BARE = Cluster("bare", "bare.yaml")
IMAGE = Container("/images/berth.sqsh")
WHOLE = dataclasses.replace(RUN, prepare="/p/wikipedia.yaml", workdir="/w")


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ROOT", Path("/opt/berth"))


def site(**values: object) -> Cluster:
    return dataclasses.replace(BARE, container=IMAGE, **values)


def test_the_chain() -> None:
    cluster = Cluster("c", "c.yaml", cpus_per_task=16, walltime_limit="08:00:00")
    chain = make_plan(WHOLE, cluster, ROWS, ["export", "phase2", "prepare", "phase1"], hours={1: 2.0, 2: 30.0})
    assert [
        (job.stage, job.name, job.nodes, job.ranks_per_node, job.gpus_per_node, job.cpus_per_task, job.walltime_s, job.after)
        for job in chain.jobs
    ] == [
        ("prepare", "berth-prepare", 1, 1, 0, None, 28800, None),
        ("phase1", "dgx-a100-80g_4x8x256x8", 4, 8, 8, 16, 9000, "prepare"),
        ("phase2", "dgx-a100-80g_4x8x32x32", 4, 8, 8, 16, 28800, "phase1"),
        ("export", "berth-export", 1, 1, 0, None, 28800, "phase2"),
    ]
    assert [job.makes for job in chain.jobs] == [("/w",), (), (), ()]  # before Pyxis is to mount it
    assert {job.folder for job in chain.jobs} == {"/r/run"} and {job.state for job in chain.jobs} == {"/r/run/slurm"}
    assert describe(chain) == (
        "run run in /r/run\n"
        "  prepare: berth-prepare, 1 x 1 tasks, 08:00:00\n"
        "  phase1: dgx-a100-80g_4x8x256x8, 4 x 8 tasks, 02:30:00, after prepare; global batch 65536 = 256 x 8 x 32 "
        "(micro batch x accumulation x ranks), fp16, 7038 steps\n"
        "  phase2: dgx-a100-80g_4x8x32x32, 4 x 8 tasks, 08:00:00, after phase1; global batch 32768 = 32 x 32 x 32 "
        "(micro batch x accumulation x ranks), fp16, 1563 steps\n"
        "  export: berth-export, 1 x 1 tasks, 08:00:00, after phase2"
    )


def test_a_chain_without_a_limit_of_time() -> None:
    (job,) = make_plan(RUN, BARE, ROWS, ["phase1"]).jobs
    assert (job.walltime_s, job.after, job.image, job.mounts) == (None, None, None, ())
    assert "4 x 8 tasks, no time limit; global" in describe(make_plan(RUN, BARE, ROWS, ["phase1"]))


def test_programs_of_the_serial_jobs() -> None:
    prepare, export = make_plan(WHOLE, BARE, ROWS, ["prepare", "export"]).jobs
    words = ("python3", "-u", "-m", "data.prepare", "--config", "/p/wikipedia.yaml", "--workdir", "/w", "--processes", "128")
    assert prepare.steps == (Step("prepare", words, 1, 1),)  # of a whole node all CPUs are there
    words = (
        "python3", "-u", "convert_checkpoint.py", "to_huggingface", "--checkpoint", "/r/run", "--vocab_file", "/m/vocab.txt",
        "--output_dir", "/r/run/huggingface",
    )  # fmt: skip
    assert export.steps == (Step("export", words, 1, 1),)
    (shared,) = make_plan(WHOLE, dataclasses.replace(BARE, exclusive=False), ROWS, ["prepare"]).jobs
    assert shared.cpus_per_task == shared.steps[0].cpus_per_task == 128
    (prepare,) = make_plan(WHOLE, BARE, {}, ["prepare"]).jobs  # on a machine the matrix does not know
    assert prepare.steps[0].program[-2:] == ("--workdir", "/w") and prepare.cpus_per_task is None


OPTIONS = (
    "--input_dir /d --config_file /m/large.json --vocab_file /m/vocab.txt --output_dir /r/run --max_seq_length {} --max_predictions_per_seq {} "
    "--train_batch_size {} --gradient_accumulation_steps {} --max_steps {} --optimizer lamb --learning_rate {} --lr_schedule poly "
    "--warmup_proportion {} --precision fp16 --device cuda --allreduce_post_accumulation_fp16 --seed 42 --num_steps_per_checkpoint 200 "
    "--resume_from_checkpoint"
)
PHASE1 = OPTIONS.format(128, 20, 2048, 8, 7038, 0.006, 0.2843)
PHASE2 = OPTIONS.format(512, 80, 1024, 32, 1563, 0.004, 0.128) + " --phase2"


def test_options_of_both_phases_in_order() -> None:
    assert " ".join(training_options(RUN, ROWS[1], first=True)) == PHASE1
    assert " ".join(training_options(RUN, ROWS[2], first=False)) == PHASE2


def test_options_of_the_recipe_come_before_those_of_the_row_and_the_user_s_last() -> None:
    row = MATRIX.row("dgx2_16x16x64x4_fp16_deepspeed-p1")
    words = " ".join(training_options(dataclasses.replace(RUN, extra=("--log_freq", "5")), row, first=True))
    assert (
        "--lr_schedule exponential --warmup_proportion 0.06 --lr_warmup_degree 2 --lr_decay_rate 0.9 --lr_decay_steps 250 --lr_offset 0.001 "
        in words
    )
    assert words.endswith(" --resume_from_checkpoint --log_freq 5")


def test_a_learning_rate_keeps_all_its_digits() -> None:
    row = ROWS[1]
    exact = dataclasses.replace(row.phase_recipe, learning_rate=0.00123456789, warmup_proportion=1 / 3)
    row = dataclasses.replace(row, recipe=dataclasses.replace(row.recipe, phases={1: exact}))
    words = training_options(RUN, row, first=True)
    assert float(words[words.index("--learning_rate") + 1]) == 0.00123456789
    assert float(words[words.index("--warmup_proportion") + 1]) == 1 / 3


def test_only_the_first_training_job_starts_from_given_weights() -> None:
    run = dataclasses.replace(RUN, init_checkpoint="/c/start.pt")

    def given(stages: list[str]) -> list[bool]:
        return ["--init_checkpoint" in job.steps[-1].program for job in make_plan(run, BARE, ROWS, stages).jobs]

    assert given(["phase1", "phase2"]) == [True, False]
    assert given(["phase2"]) == [True]
    assert " --phase2 --init_checkpoint /c/start.pt" in " ".join(training_options(run, ROWS[2], first=True))


def test_a_study_measures_and_writes_no_checkpoint() -> None:
    run = dataclasses.replace(RUN, study=True, steps_this_run=50)
    words = " ".join(training_options(run, ROWS[2], first=True))
    assert words == PHASE2.replace("1563 ", "1563 --steps_this_run 50 ").replace("--phase2", "--skip_checkpoint")


def test_scoring_reads_the_data_of_its_phase() -> None:
    run = dataclasses.replace(RUN, evaluate=True, inputs={1: "/d1", 2: "/d2"})
    assert [training_options(run, ROWS[phase], True)[-2:] for phase in (1, 2)] == [("--eval_dir", "/d1"), ("--eval_dir", "/d2")]


def test_steps_of_a_training_job() -> None:
    cluster = Cluster(
        "c", "c.yaml", bind="exclusive", nic="nearest", mpi="pmix", cpus_per_task=16, preflight=True, min_free_gb=2.5, python="py"
    )
    (job,) = make_plan(RUN, cluster, ROWS, ["phase1"]).jobs
    check, train = job.steps
    wrapper = ("py", "-m", "berth.launch.rank", "--ranks", "32", "--bind", "exclusive", "--nic", "nearest")
    assert train == Step(
        "train",
        (*wrapper, "--record", '"$BERTH_RECORD"', "--job", '"$BERTH_JOB"', "--", "py", "-u", "run_pretraining.py", *PHASE1.split()),
        4, 32, cpus_per_task=16, mpi="pmix",
    )  # fmt: skip
    words = (
        "py", "-u", "-m", "berth.launch.preflight", "--backend", "nccl", "--device", "cuda", "--expect_gpus", "8", "--data", "/d",
        "--output", "/r/run", "--min_free_gb", "2.5", "--report", '"$BERTH_PREFLIGHT"',
    )  # fmt: skip
    assert check == Step("preflight", (*wrapper, "--", *words), 4, 32, cpus_per_task=16, mpi="pmix")
    assert [word for step in job.steps for word in step.program if isinstance(word, Raw)] == [
        '"$BERTH_PREFLIGHT"', '"$BERTH_RECORD"', '"$BERTH_JOB"',
    ]  # fmt: skip
    assert (train.ranks_per_node, check.ranks_per_node) == (8, 8)


def test_the_run_overrides_the_site_s_preflight() -> None:
    def names(of_site: bool, of_run: bool | None) -> list[str]:
        run, cluster = dataclasses.replace(RUN, preflight=of_run), dataclasses.replace(BARE, preflight=of_site)
        return [step.name for step in make_plan(run, cluster, ROWS, ["phase1"]).jobs[0].steps]

    assert [names(True, None), names(True, False)] == [["preflight", "train"], ["train"]]
    assert [names(False, None), names(False, True)] == [["train"], ["preflight", "train"]]


def test_a_machine_without_gpus_asks_for_none() -> None:
    row = MATRIX.row("local_2x2x2x2_fp32_tiny-p1")
    (job,) = make_plan(dataclasses.replace(RUN, preflight=True), BARE, {1: row}, ["phase1"]).jobs
    check = job.steps[0].program
    assert (job.gpus_per_node, check[check.index("--backend") + 1], check[check.index("--expect_gpus") + 1]) == (0, "gloo", "0")


def test_what_a_plan_lacks_is_said_at_once() -> None:
    run = dataclasses.replace(RUN, inputs={}, vocab_file=None)
    with pytest.raises(ConfigError) as raised:
        make_plan(run, BARE, {1: ROWS[1]}, ["prepare", "phase1", "phase2", "finetune", "export"])
    assert str(raised.value).split("\n  ") == [
        "stage 'finetune' is not one of prepare, phase1, phase2, export",
        "phase 2 has no row",
        "phase 1 has no input folder",
        "phase 2 has no input folder",
        "the stage prepare needs a configuration of data.prepare and its work folder",
        "the stage export needs a vocabulary",
    ]
    with pytest.raises(ConfigError, match="^no stage was asked for$"):
        make_plan(RUN, BARE, ROWS, [])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", "a\rb", "a\0b"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must be the name of a folder"):
        dataclasses.replace(RUN, name=name)


def test_paths_of_a_run_are_absolute_and_straight() -> None:
    with pytest.raises(ConfigError) as raised:
        Run("..", "r", {1: "d", 2: "/a/../b"}, "m.json", "v.txt", prepare="p", workdir="w", init_checkpoint="c")
    wrong = [
        ("results", "r"), ("config_file", "m.json"), ("vocab_file", "v.txt"), ("prepare", "p"), ("workdir", "w"), ("init_checkpoint", "c"),
        ("inputs of phase 1", "d"), ("inputs of phase 2", "/a/../b"),
    ]  # fmt: skip
    assert str(raised.value).split("\n  ") == [
        "the run's name '..' must be the name of a folder: no slash, no line break",
        *(f"{what} {path!r} must be an absolute path without '..'" for what, path in wrong),
    ]


def test_mounts_of_a_training_job() -> None:
    run = dataclasses.replace(RUN, init_checkpoint="/c/start.pt")
    cluster = site(local="/scratch", mounts=("/site:/inside:ro",))
    assert mounts(run, cluster, "/d") == (
        "/c:/c", "/d:/d:ro", "/site:/inside:ro", "/m:/m:ro", "/opt/berth:/opt/berth", "/r:/r", "/scratch:/scratch",
    )  # fmt: skip
    assert mounts(run, BARE, "/d") == ()


def test_mounts_of_the_stages() -> None:
    jobs = make_plan(WHOLE, site(), ROWS, ["prepare", "phase1", "export"]).jobs
    assert [job.mounts for job in jobs] == [
        ("/m:/m:ro", "/opt/berth:/opt/berth", "/p:/p:ro", "/r:/r", "/w:/w"),
        ("/d:/d:ro", "/m:/m:ro", "/opt/berth:/opt/berth", "/p:/p:ro", "/r:/r"),
        ("/m:/m:ro", "/opt/berth:/opt/berth", "/p:/p:ro", "/r:/r"),
    ]


def test_folders_inside_others_are_mounted_once_and_after_what_they_lie_in() -> None:
    # data and model below what is mounted anyway: nothing of their own
    inside = dataclasses.replace(RUN, config_file="/opt/berth/bert_configs/large.json", vocab_file="/r/x/vocab.txt")
    assert mounts(inside, site(), "/r/data") == ("/opt/berth:/opt/berth", "/r:/r")
    # results below read-only data: the writable mount must come last, else it would be hidden
    around = dataclasses.replace(RUN, results="/d/out", config_file="/d/large.json", vocab_file=None)
    assert mounts(around, site(), "/d") == ("/d:/d:ro", "/d/out:/d/out", "/opt/berth:/opt/berth")
    # a name that only begins alike is another folder
    alike = dataclasses.replace(RUN, results="/d-out", config_file="/opt/berth/m.json", vocab_file=None)
    assert mounts(alike, site(), "/d") == ("/d:/d:ro", "/d-out:/d-out", "/opt/berth:/opt/berth")
    # the site's mounts around and inside the job's
    of_site = site(mounts=("/r/run/special:/r/run/special", "/:/:ro", "/r:/r"))
    assert mounts(dataclasses.replace(alike, results="/r"), of_site, "/r/d") == (
        "/:/:ro", "/opt/berth:/opt/berth", "/r:/r", "/r/run/special:/r/run/special",
    )  # fmt: skip


def test_the_job_s_mount_comes_after_the_site_s_of_the_same_place() -> None:
    assert mounts(RUN, site(mounts=("/r:/r:ro",)), "/d")[-2:] == ("/r:/r:ro", "/r:/r")


@pytest.mark.parametrize("mark", [",", ":", "\n", "\r"])
def test_paths_that_pyxis_cannot_be_told_are_refused_together(mark: str) -> None:
    run = dataclasses.replace(RUN, results=f"/r{mark}x")
    with pytest.raises(ConfigError) as raised:
        mounts(run, site(), f"/d{mark}")
    rule = "cannot be mounted into a container: Pyxis takes no comma, colon or line break"
    assert str(raised.value) == f"{f'/r{mark}x'!r} {rule}\n  {f'/d{mark}'!r} {rule}"
    assert make_plan(run, BARE, ROWS, ["phase1"]).jobs[0].folder == f"/r{mark}x/run"  # without containers there is nothing to mount


def test_images_are_imported_before_anything_needs_them() -> None:
    def of(import_to: str) -> tuple[str | None, tuple[Step, ...]]:
        cluster = dataclasses.replace(BARE, container=Container("nvcr.io#nvidia/pytorch:26.03-py3", import_to, "/images dir"))
        job = make_plan(RUN, cluster, ROWS, ["phase1"]).jobs[0]
        assert job.image == image_path(cluster) and job.steps[-1].name == "train"
        return job.image, job.steps[:-1]

    path = "/images dir/nvcr.io_nvidia_pytorch_26.03-py3.sqsh"
    program = ("bash", "/opt/berth/scripts/docker/import.sh", "--if-missing", "nvcr.io#nvidia/pytorch:26.03-py3", path)
    assert of("none") == ("nvcr.io#nvidia/pytorch:26.03-py3", ())
    assert of("shared") == (path, (Step("import", program, 1, 1, host=True),))
    assert of("node") == (path, (Step("import", program, 4, 4, host=True),))
    assert image_path(BARE) is None


@pytest.mark.parametrize(
    ("hours", "limit", "asked", "expected"),
    [
        (2.0, None, None, 9000),  # a quarter more
        (2.01, None, None, 10800),  # whole half hours, upwards
        (0.01, None, None, 1800),
        (2.0, "02:00:00", None, 7200),
        (2.0, "08:00:00", None, 9000),
        (None, "08:00:00", None, 28800),
        (None, None, None, None),
        (2.0, "08:00:00", "00:10:00", 600),
        (2.0, "08:00:00", "1-00:00:00", 86400),  # validation says that it is too much
    ],
)
def test_walltime(hours: float | None, limit: str | None, asked: str | None, expected: int | None) -> None:
    run, cluster = dataclasses.replace(RUN, time=asked), dataclasses.replace(BARE, walltime_limit=limit)
    assert job_walltime(run, cluster, hours) == expected


def test_the_record_says_what_was_decided() -> None:
    (job,) = make_plan(RUN, site(), ROWS, ["phase1"]).jobs
    assert json.loads(json.dumps(job.record)) == {
        "run": {
            "name": "run", "results": "/r", "inputs": {"1": "/d", "2": "/d"}, "config_file": "/m/large.json", "vocab_file": "/m/vocab.txt",
            "seed": 42, "prepare": None, "workdir": None, "init_checkpoint": None, "steps_this_run": None, "study": False, "evaluate": False,
            "extra": [], "time": None, "preflight": None,
        },
        "cluster": {"name": "bare", "file": "bare.yaml"},
        "image": "/images/berth.sqsh",
        "row": {
            "name": "dgx-a100-80g_4x8x256x8_fp16", "job_name": "dgx-a100-80g_4x8x256x8", "platform": "dgx-a100-80g", "nodes": 4,
            "ranks_per_node": 8, "phase": 1, "precision": "fp16", "micro_batch": 256, "accumulation": 8, "train_batch_size": 2048,
            "global_batch": 65536, "recipe": "lamb", "source": ROWS[1].source, "options": {"allreduce_post_accumulation_fp16": True},
        },
        "recipe": {
            "phase": 1, "max_seq_length": 128, "max_predictions_per_seq": 20, "max_steps": 7038, "global_batch": 65536, "learning_rate": 0.006,
            "warmup_proportion": 0.2843, "optimizer": "lamb", "lr_schedule": "poly", "num_steps_per_checkpoint": 200, "options": {},
        },
    }  # fmt: skip


def test_the_record_of_every_row_is_json() -> None:
    for row in MATRIX.rows:
        (job,) = make_plan(RUN, BARE, {row.phase: row}, [f"phase{row.phase}"]).jobs
        read = json.loads(json.dumps(job.record))
        assert read == {**job.record, "run": {**job.record["run"], "extra": []}}
        assert read["recipe"]["options"] == dict(row.phase_recipe.options) and read["row"]["name"] == row.name
