"""The environment of a job submitted by hand -> a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from berth.errors import ConfigError
from berth.launch import variables
from berth.launch.clusters import load_cluster
from berth.launch.matrix import Row, load_matrix
from berth.launch.plan import Plan, training_options
from berth.launch.render import PASSED, job_block
from berth.launch.variables import VARIABLES, given, help_text, job_plan
from tests.support import ROOT

MATRIX = load_matrix()
DGX1 = {"SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS_PER_NODE": "8", "PLATFORM": "dgx1-16g", "DATA_DIR": "/d", "SLURM_SUBMIT_DIR": "/home/me"}


def planned(**changes: str | None) -> Plan:
    """The plan of ``DGX1`` with other variables; ``None`` takes one away."""
    return job_plan({name: value for name, value in (DGX1 | changes).items() if value is not None}, MATRIX)


def words(plan: Plan) -> list[str]:
    """Options of run_pretraining.py."""
    program = list(plan.jobs[0].steps[-1].program)
    return program[program.index("run_pretraining.py") + 1 :]


def option(plan: Plan, name: str) -> str:
    found = words(plan)
    return found[found.index(f"--{name}") + 1]


def row_of(plan: Plan) -> dict[str, object]:
    return plan.jobs[0].record["row"]


def problems(**changes: str | None) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        planned(**changes)
    return str(raised.value).split("\n  ")


# ---------------------------------------------------------------------------------------------------------------- names


def test_both_vocabularies_say_the_same() -> None:
    old = {"BATCHSIZE": "16", "LR": "6e-3", "GRADIENT_STEPS": "2", "WARMUP_UPDATES": "0.2", "TRAIN_STEPS": "9"}
    new = {
        "TRAIN_BATCH_SIZE": "16", "LEARNING_RATE": "6e-3", "GRADIENT_ACCUMULATION_STEPS": "2", "WARMUP_PROPORTION": "0.2", "MAX_STEPS": "9",
    }  # fmt: skip
    wrong: list[str] = []
    assert given(old, wrong) == given(new, wrong) == given(old | new, wrong) == new and wrong == []


def test_two_names_may_agree_as_numbers_but_not_contradict() -> None:
    wrong: list[str] = []
    assert given({"LR": "6e-3", "LEARNING_RATE": "0.006", "BATCHSIZE": "8", "TRAIN_BATCH_SIZE": "16"}, wrong) == {
        "LEARNING_RATE": "0.006", "TRAIN_BATCH_SIZE": "8",
    }  # fmt: skip
    assert wrong == ["TRAIN_BATCH_SIZE=16 contradicts BATCHSIZE=8, which means the same; set one of them"]


def test_empty_values_and_none_are_not_set() -> None:
    wrong: list[str] = []
    assert given({"PHASE": "", "INIT_CHECKPOINT": "none", "STEPS_THIS_RUN": "None", "NNODES": "", "MASKING": "none"}, wrong) == {}
    assert wrong == []


def test_names_of_the_public_scripts_that_mean_nothing_here_are_refused_with_advice() -> None:
    wrong: list[str] = []
    assert given(dict.fromkeys(variables.REFUSED, "1"), wrong) == {}
    assert wrong == [f"{name} is not a variable of this run.sub: {advice}" for name, advice in sorted(variables.REFUSED.items())]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("BATCH_SIZE", "BATCHSIZE"), ("TRAIN_BATCHSIZE", "TRAIN_BATCH_SIZE"), ("GRADIENT_STEP", "GRADIENT_STEPS"), ("PRECISON", "PRECISION"),
        ("GRADIENT_ACCUMULATION_STEP", "GRADIENT_ACCUMULATION_STEPS"), ("MAX_STEP", "MAX_STEPS"), ("LEARNINGRATE", "LEARNING_RATE"),
        ("INIT_CHECKPOINTS", "INIT_CHECKPOINT"), ("DATADIR", "DATA_DIR"), ("DATADIR_PHASE2", "DATA_DIR_PHASE2"), ("WARMUP_UPDATE", "WARMUP_UPDATES"),
    ],
)  # fmt: skip
def test_misspelt_names_are_caught(name: str, meant: str) -> None:
    wrong: list[str] = []
    assert given({name: "x"}, wrong) == {} and len(wrong) == 1
    assert wrong[0].startswith(f"{name} is set but nothing reads it; did you mean {meant}")
    assert wrong[0].endswith(f" If it belongs to something else: IGNORE_VARIABLES={name}")
    assert given({name: "x", "IGNORE_VARIABLES": f"OTHER {name}"}, wrong) == {"IGNORE_VARIABLES": f"OTHER {name}"} and len(wrong) == 1


def test_a_variable_in_our_name_must_be_ours() -> None:
    wrong: list[str] = []
    given({"BERTH_SPEED": "11"}, wrong)
    assert wrong == [
        "BERTH_SPEED is set but nothing reads it; see python -m slurm.launch job --help. If it belongs to something else: "
        "IGNORE_VARIABLES=BERTH_SPEED"
    ]


def test_what_is_usually_in_an_environment_is_nobody_s_mistake() -> None:
    usual = (
        "HOME USER LOGNAME SHELL PATH PWD OLDPWD SHLVL TERM LANG LC_ALL TZ TMPDIR EDITOR VISUAL PAGER MAIL HISTSIZE HOSTNAME HOSTTYPE LS_COLORS _ "
        "MANPATH INFOPATH CPATH LIBRARY_PATH LD_LIBRARY_PATH LD_PRELOAD PKG_CONFIG_PATH MODULEPATH MODULESHOME MODULE_VERSION LOADEDMODULES _LMFILES_ "
        "LMOD_CMD LMOD_DIR BASH_ENV ENV XDG_RUNTIME_DIR XDG_SESSION_ID XDG_DATA_DIRS SSH_CLIENT SSH_CONNECTION SSH_TTY DISPLAY SESSION TMUX STY "
        "CONDA_PREFIX CONDA_DEFAULT_ENV CONDA_EXE VIRTUAL_ENV PYTHONPATH PYTHONUNBUFFERED PS1 SCRATCH WORK WORKDIR PROJECT STORE ARCHIVE "
        "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT GPU_DEVICE_ORDINAL ROCR_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES "
        "ENROOT_CACHE_PATH ENROOT_DATA_PATH PYXIS_VERSION KMP_AFFINITY MKL_NUM_THREADS OMP_NUM_THREADS TOKENIZERS_PARALLELISM WANDB_API_KEY "
        "SLURM_JOB_ID SLURM_GPUS SBATCH_ACCOUNT SLURM_CLUSTER_NAME NCCL_DEBUG UCX_TLS HF_HOME http_proxy batch_size DATA RESULTS MODEL ARGS"
    ).split()
    wrong: list[str] = []
    assert given(dict.fromkeys(usual, "1"), wrong) == {} and wrong == []
    # of the job from which this one was submitted
    assert given(dict.fromkeys([*PASSED, "BERTH_ROOT", "BERTH_PYTHON"], "1"), wrong) == {} and wrong == []


def test_every_variable_is_explained_and_every_one_read() -> None:
    text = help_text()
    assert len(text.split("\n")) == len(VARIABLES)
    assert "\n  TRAIN_BATCH_SIZE or BATCHSIZE" in text
    source = Path(variables.__file__).read_text(encoding="utf-8")
    assert [name for name in VARIABLES if f'("{name}"' not in source and f'.get("{name}"' not in source] == []


# ------------------------------------------------------------------------------------------------------------ the matrix


@pytest.mark.parametrize(
    ("variables", "phase", "row"),
    [
        ("BATCHSIZE=2048 LR=6e-3 GRADIENT_STEPS=128 PHASE=1", 1, "dgx1-16g_4x8x16x128_fp16"),
        ("BATCHSIZE=1024 LR=4e-3 GRADIENT_STEPS=256 PHASE=2", 2, "dgx1-16g_4x8x4x256_fp16"),
    ],
)
def test_the_documented_commands_are_the_rows_of_the_matrix(variables: str, phase: int, row: str) -> None:
    plan = planned(**dict(each.split("=") for each in variables.split()))
    known = MATRIX.row(row)
    assert tuple(words(plan)) == training_options(plan.run, known, first=True)
    assert row_of(plan)["name"] == row and row_of(plan)["source"] == known.source
    assert plan.jobs[0].stage == f"phase{phase}" and plan.jobs[0].name == known.job_name
    assert "--allreduce_post_accumulation_fp16" in words(plan)
    # and what is not said is just that
    assert planned(PHASE=str(phase)) == plan
    assert job_block(plan.jobs[0]).count("exec srun ") == 1


def rows_by_default() -> list[Row]:
    """The first row of the matrix for each allocation, phase, precision and recipe."""
    first: dict[tuple[object, ...], Row] = {}
    for row in MATRIX.rows:
        first.setdefault((row.platform.name, row.nodes, row.ranks, row.phase, row.precision, row.recipe.name), row)
    return list(first.values())


def test_defaults_of_every_allocation_are_the_rows_of_the_matrix() -> None:
    assert len(rows_by_default()) > 100
    for row in rows_by_default():
        allocation = {"SLURM_JOB_NUM_NODES": str(row.nodes), "SLURM_NTASKS_PER_NODE": str(row.ranks), "PLATFORM": row.platform.name}
        plan = planned(**allocation, PHASE=str(row.phase), PRECISION=row.precision, RECIPE=row.recipe.name)
        assert tuple(words(plan)) == training_options(plan.run, row, first=True), row.name
        assert (plan.jobs[0].nodes, plan.jobs[0].ranks_per_node, row_of(plan)["name"]) == (row.nodes, row.ranks, row.name)


def test_the_batch_of_every_row_said_by_hand_is_the_row() -> None:
    for row in MATRIX.rows:
        plan = planned(
            SLURM_JOB_NUM_NODES=str(row.nodes), SLURM_NTASKS_PER_NODE=str(row.ranks), PLATFORM=row.platform.name, PHASE=str(row.phase),
            PRECISION=row.precision, RECIPE=row.recipe.name, BATCHSIZE=str(row.train_batch_size), GRADIENT_STEPS=str(row.accumulation),
        )  # fmt: skip
        assert tuple(words(plan)) == training_options(plan.run, row, first=True), row.name


def test_precision_and_recipe_are_the_platform_s_and_the_site_s() -> None:
    assert row_of(planned(PLATFORM="dgx-h100"))["name"] == "dgx-h100_4x8x256x8_bf16"
    assert row_of(planned(PLATFORM="nc24rs_v3", SLURM_NTASKS_PER_NODE=None))["recipe"] == "lamb-65280"
    # also where the batch is said: the recipe is the one of the platform's rows
    assert row_of(planned(PLATFORM="nc24rs_v3", SLURM_NTASKS_PER_NODE="4", BATCHSIZE="4080"))["micro_batch"] == 48


def test_part_of_the_gpus_has_the_micro_batch_of_a_gpu() -> None:
    row = row_of(planned(SLURM_NTASKS_PER_NODE="2"))  # no row of the matrix
    assert (row["ranks_per_node"], row["micro_batch"], row["accumulation"], row["train_batch_size"]) == (2, 16, 512, 8192)
    row = row_of(planned(PLATFORM="dgx-a100-80g", SLURM_NTASKS_PER_NODE=None, GPUS="2", PRECISION="fp32"))
    assert (row["ranks_per_node"], row["micro_batch"]) == (2, 128)  # that of 32 bits, tf32's
    assert row_of(planned(SLURM_NTASKS_PER_NODE="2(x4)"))["ranks_per_node"] == 2
    half = {"PLATFORM": "dgx2", "PHASE": "2", "SLURM_NTASKS_PER_NODE": "8"}
    assert [row_of(planned(**half, RECIPE=name))["micro_batch"] for name in ("lamb", "deepspeed")] == [8, 16]  # its own recipe's rows first


def test_some_of_the_batch_is_enough() -> None:
    assert row_of(planned(BATCHSIZE="2048"))["accumulation"] == 128
    assert row_of(planned(GRADIENT_STEPS="64"))["micro_batch"] == 32
    row = row_of(planned(GLOBAL_BATCH="32768"))
    assert (row["global_batch"], row["train_batch_size"], row["micro_batch"], row["accumulation"]) == (32768, 1024, 16, 64)
    row = row_of(planned(GLOBAL_BATCH="96", BATCHSIZE="3", GRADIENT_STEPS="3"))
    assert (row["global_batch"], row["micro_batch"], row["accumulation"], row["source"]) == (96, 1, 3, "variables of the job")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"BATCHSIZE": "1024"},
            "TRAIN_BATCH_SIZE=1024 on 4 nodes x 8 ranks is a global batch of 32768, but recipe lamb has 65536 in phase 1; "
            "set TRAIN_BATCH_SIZE=2048, or GLOBAL_BATCH=32768 to mean it",
        ),
        (
            {"BATCHSIZE": "1000", "SLURM_JOB_NUM_NODES": "3"},
            "TRAIN_BATCH_SIZE=1000 on 3 nodes x 8 ranks is a global batch of 24000, but recipe lamb has 65536 in phase 1; "
            "set GLOBAL_BATCH=24000 to mean it",
        ),
        (
            {"BATCHSIZE": "16", "GLOBAL_BATCH": "1024"},
            "TRAIN_BATCH_SIZE=16 on 4 nodes x 8 ranks is a global batch of 512, but GLOBAL_BATCH=1024; "
            "set TRAIN_BATCH_SIZE=32, or GLOBAL_BATCH=512 to mean it",
        ),
        (
            {"GLOBAL_BATCH": "100"},
            "GLOBAL_BATCH=100, which 4 nodes x 8 ranks cannot share evenly; set GLOBAL_BATCH=96 or GLOBAL_BATCH=128",
        ),
        (
            {"SLURM_JOB_NUM_NODES": "3", "GRADIENT_STEPS": "2"},
            "recipe lamb has 65536 in phase 1, which 3 nodes x 8 ranks cannot share evenly; set GLOBAL_BATCH=65520 or GLOBAL_BATCH=65544",
        ),
        ({"GRADIENT_STEPS": "100"}, "TRAIN_BATCH_SIZE=2048 is not divisible by GRADIENT_ACCUMULATION_STEPS=100"),
        (
            {"BATCHSIZE": "3", "GLOBAL_BATCH": "96"},
            "no row of platform dgx1-16g tells a micro-batch for length 128 in fp16 that divides TRAIN_BATCH_SIZE=3; "
            "set GRADIENT_ACCUMULATION_STEPS",
        ),
        ({"BATCHSIZE": "2048", "RECIPE": "azureml-adam", "PHASE": "2"}, "recipe azureml-adam has no phase 2"),
        (
            {"SLURM_JOB_NUM_NODES": "4", "PLATFORM": "dgx1"},
            "platform 'dgx1' is not in configurations.yml; did you mean dgx2 or dgx2h? valid: ",
        ),
        ({"RECIPE": "lambs"}, "recipe 'lambs' is not known; did you mean lamb?"),
        ({"RECIPE": "lambs", "BATCHSIZE": "2"}, "recipe 'lambs' is not known; did you mean lamb?"),
        ({"PRECISION": "fp15"}, "precision 'fp15' is not known; did you mean fp16?"),
        ({"PRECISION": "fp15", "BATCHSIZE": "2"}, "precision 'fp15' is not known; did you mean fp16?"),
    ],
)
def test_a_batch_that_does_not_come_out_names_the_values_that_do(changes: dict[str, str], message: str) -> None:
    found = problems(**changes)
    assert len(found) == 1 and found[0].startswith(message)
    assert message.endswith(("valid: ", "?")) or found[0] == message


def test_nodes_for_which_the_matrix_has_no_batch() -> None:
    (found,) = problems(SLURM_JOB_NUM_NODES="3")
    assert "which do not divide the global batch 65536 of recipe lamb; nearest that do: " in found


# ---------------------------------------------------------------------------------------------------- the rest of the plan


def test_the_recipe_s_values_can_be_changed() -> None:
    plan = planned(LR="1.23456789e-3", WARMUP_UPDATES="0.5", TRAIN_STEPS="100", SAVE_CHECKPOINT_STEPS="7")
    assert [option(plan, name) for name in ("learning_rate", "warmup_proportion", "max_steps", "num_steps_per_checkpoint")] == [
        "0.00123456789", "0.5", "100", "7",
    ]  # fmt: skip
    assert row_of(plan)["source"] == "variables of the job" and row_of(plan)["name"] == "dgx1-16g_4x8x16x128_fp16"
    assert "--allreduce_post_accumulation_fp16" in words(plan)  # the options of the row stay


def test_what_belongs_to_the_run() -> None:
    plan = planned(
        RUN_NAME="mine", RESULTS_DIR="out", CONFIG="base", VOCAB_FILE="../v.txt", SEED="0", STEPS_THIS_RUN="5", EVALUATE="true", NUM_WORKERS="0",
        INIT_CHECKPOINT="/c/start.pt", EXTRA_ARGS="--log_freq  10 --json-summary x", PREFLIGHT="true",
    )  # fmt: skip
    assert dataclasses.asdict(plan.run) == {
        "name": "mine", "results": "/home/me/out", "inputs": {1: "/d"}, "config_file": str(ROOT / "bert_configs" / "base.json"),
        "vocab_file": "/home/v.txt", "seed": 0, "prepare": None, "workdir": None, "init_checkpoint": "/c/start.pt", "steps_this_run": 5,
        "study": False, "evaluate": True, "extra": ("--num_workers", "0", "--log_freq", "10", "--json-summary", "x"), "time": None,
        "preflight": True,
    }  # fmt: skip
    assert [step.name for step in plan.jobs[0].steps] == ["preflight", "train"]


def test_what_is_not_said_of_the_run() -> None:
    run = planned().run
    assert (run.name, run.results, run.inputs) == ("bert-dgx1-16g", str(ROOT / "results"), {1: "/d"})
    assert (run.config_file, run.vocab_file, run.seed, run.preflight) == (str(ROOT / "bert_configs" / "large.json"), None, 42, None)


def test_model_and_vocabulary_beside_the_data(tmp_path: Path) -> None:
    (tmp_path / "vocab").mkdir()
    for name in ("vocab.txt", "bert_config.json"):
        (tmp_path / "vocab" / name).write_text("{}", encoding="utf-8")
    run = planned(DATA_DIR=str(tmp_path)).run
    assert (run.config_file, run.vocab_file) == (f"{tmp_path}/vocab/bert_config.json", f"{tmp_path}/vocab/vocab.txt")
    run = planned(DATA_DIR=str(tmp_path), CONFIG="large", VOCAB_FILE="/v").run
    assert (run.config_file, run.vocab_file) == (str(ROOT / "bert_configs" / "large.json"), "/v")


def test_relative_paths_are_seen_from_where_the_job_was_submitted() -> None:
    run = planned(DATA_DIR="data/wiki", RESULTS_DIR="../x y", CONFIG="./my.json", INIT_CHECKPOINT="c.pt").run
    assert (run.inputs, run.results, run.config_file, run.init_checkpoint) == (
        {1: "/home/me/data/wiki"}, "/home/x y", "/home/me/my.json", "/home/me/c.pt",
    )  # fmt: skip


def test_records_of_phase_2_may_lie_elsewhere() -> None:
    assert planned(DATA_DIR_PHASE2="/d2").run.inputs == {1: "/d"}
    assert planned(DATA_DIR_PHASE2="/d2", PHASE="2").run.inputs == {2: "/d2"}
    assert planned(PHASE="2").run.inputs == {2: "/d"}


def test_the_site_profile(tmp_path: Path) -> None:
    def cluster(**changes: str | None) -> str:
        return planned(**changes).jobs[0].cluster.file

    of_dgx = load_cluster("dgx-a100-superpod")
    assert cluster() == load_cluster("bare").file
    assert cluster(SLURM_CLUSTER_NAME="superpod-a100") == of_dgx.file
    assert cluster(SLURM_CLUSTER_NAME="unheard-of") == load_cluster("bare").file
    assert cluster(SITE_PROFILE="dgx-a100-superpod", SLURM_CLUSTER_NAME="local") == of_dgx.file
    (tmp_path / "mine.yaml").write_text("platform: dgx2\nrecipe: deepspeed\n", encoding="utf-8")
    mine = planned(SITE_PROFILE="mine.yaml", SLURM_SUBMIT_DIR=str(tmp_path), PLATFORM=None, SLURM_NTASKS_PER_NODE=None)
    assert mine.jobs[0].cluster.file == str(tmp_path / "mine.yaml") and row_of(mine)["name"] == "dgx2_4x16x64x16_fp16_deepspeed-p1"
    # what the site says, and the variables do not
    plan = planned(SITE_PROFILE="dgx-a100-superpod", PLATFORM=None, DATA_DIR=None)
    assert row_of(plan)["platform"] == "dgx-a100-80g"
    assert (plan.run.inputs, plan.run.results) == ({1: of_dgx.data}, of_dgx.results)


def test_hostile_values_stay_words() -> None:
    nasty = "a b'c\"$HOME`id`;&#\\é"
    plan = planned(RUN_NAME=nasty, DATA_DIR=f"/d {nasty}", RESULTS_DIR=nasty)
    assert option(plan, "output_dir") == f"/home/me/{nasty}/{nasty}" and option(plan, "input_dir") == f"/d {nasty}"


# -------------------------------------------------------------------------------------------------------------- mistakes


def test_many_mistakes_at_once() -> None:
    assert problems(
        PHASE="3", BATCHSIZE="x", GRADIENT_STEPS="0", LR="nan", WARMUP_UPDATES="2000", MAX_STEPS="-1", SAVE_CHECKPOINT_STEPS="1.5", SEED="-1",
        NUM_WORKERS="y", STEPS_THIS_RUN="0", EVALUATE="yes", PREFLIGHT="1", GLOBAL_BATCH="0", GPUS="4", MASKING="static", PRECISON="fp16",
        LEARNING_RATE="0.1", CONFIG="larg",
    ) == [
        "LR=nan contradicts LEARNING_RATE=0.1, which means the same; set one of them",
        "MASKING is not a variable of this run.sub: dynamic masks: EXTRA_ARGS=--dynamic_masking",
        "PRECISON is set but nothing reads it; did you mean PRECISION? If it belongs to something else: IGNORE_VARIABLES=PRECISON",
        "GPUS=4 contradicts --ntasks-per-node=8; there is one task a GPU",
        "PHASE=3 must be a whole number, from 1 to 2",
        "NUM_WORKERS=y must be a whole number, 0 or more",
        "SEED=-1 must be a whole number, 0 or more",
        "STEPS_THIS_RUN=0 must be a whole number, 1 or more",
        "EVALUATE=yes must be true or false",
        "PREFLIGHT=1 must be true or false",
        "larg is no model in bert_configs; did you mean large? valid: " + problems(CONFIG="larg")[0].partition("valid: ")[2],
        "WARMUP_PROPORTION=2000 must be a number, from 0 to below 1",
        "MAX_STEPS=-1 must be a whole number, 1 or more",
        "SAVE_CHECKPOINT_STEPS=1.5 must be a whole number, 1 or more",
        "TRAIN_BATCH_SIZE=x must be a whole number, 1 or more",
        "GRADIENT_ACCUMULATION_STEPS=0 must be a whole number, 1 or more",
        "GLOBAL_BATCH=0 must be a whole number, 1 or more",
    ]  # fmt: skip


@pytest.mark.parametrize("rate", ["nan", "inf", "0", "-1", "fast"])
def test_a_learning_rate_is_a_number_above_zero(rate: str) -> None:
    assert problems(LR=rate) == [f"LEARNING_RATE={rate} must be a number, 1e-12 or more"]


def test_what_nobody_said() -> None:
    bare = load_cluster("bare").file
    assert problems(PLATFORM=None, DATA_DIR=None) == [
        f"which platform of the matrix are these nodes? Set PLATFORM, or `platform` in {bare}",
        f"where is the data? Set DATA_DIR (records, or the work folder of data.prepare), or paths.data in {bare}",
    ]
    assert problems(SITE_PROFILE="nowhere", SLURM_JOB_NUM_NODES=None)[1:] == [
        "SLURM_JOB_NUM_NODES is not set: this runs inside a job (sbatch run.sub); to look before, use render or plan"
    ]


def test_a_name_that_is_no_folder() -> None:
    assert problems(RUN_NAME="a/b", SEED="x") == [
        "SEED=x must be a whole number, 0 or more",
        "the run's name 'a/b' must be the name of a folder: no slash, no line break",
    ]
