"""scripts/run_pretraining.sh: from words to the plan of both phases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from berth.errors import ConfigError
from berth.launch.arguments import ORDERS
from berth.launch.clusters import ROOT
from berth.launch.matrix import load_matrix
from berth.launch.positional import Chain, copied_to, decide
from berth.launch.this_machine import Gpu

MATRIX = load_matrix()
DGX1 = [Gpu("Tesla V100-SXM2-32GB", 31.7)] * 8
# the defaults of the documentation and of the two public scripts, word for word
FIRST = "8192 6e-3 fp16 8 0.2843 7038 200 false true true 128 42 bert_lamb_pretraining true true"
DOCUMENTED = f"{FIRST} true 4096 4e-3 0.128 1563 512"
LATER = f"{FIRST} 4096 4e-3 0.128 1563 512"


def chain(line: str | list[str], folder: Path, gpus: list[Gpu] = DGX1, **environment: str) -> Chain:
    (folder / "data").mkdir(exist_ok=True)
    words = line.split() if isinstance(line, str) else line
    environment = {"BERT_PREP_WORKING_DIR": "data", **environment}
    return decide([*words, "--from", str(folder), "--results", "out"], MATRIX, gpus, environment)


def refused(line: str | list[str], folder: Path, gpus: list[Gpu] = DGX1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        chain(line, folder, gpus)
    lines = str(caught.value).split("\n  ")
    return lines[1:] if lines[0] == "several arguments are wrong:" else lines


def facts(made: Chain) -> dict[int, tuple[object, ...]]:
    return {
        phase: (row.name, row.global_batch, row.learning_rate, row.phase_recipe.warmup_proportion, row.phase_recipe.max_steps)
        for phase, row in made.rows.items()
    }


def test_documented_and_later_order_give_the_same_plan(tmp_path):
    documented, later = chain(DOCUMENTED, tmp_path), chain(LATER, tmp_path)
    assert documented.plan == later.plan and documented.rows == later.rows and documented.logs == later.logs
    assert documented.notices[0] == "argument 16 is true: the documented order of arguments, in which it is accumulate_into_fp16"
    assert later.notices[0] == "argument 16 is 4096: the later order of arguments, in which it is train_batch_size_phase2"
    assert facts(later) == {
        1: ("dgx1-32g_1x8x64x128_fp16", 65536, 6e-3, 0.2843, 7038),
        2: ("dgx1-32g_1x8x8x512_fp16", 32768, 4e-3, 0.128, 1563),
    }
    assert {phase: row.name for phase, row in later.rows.items()} == {phase: MATRIX.row("ngc_default", phase).name for phase in (1, 2)}


def test_every_word_of_both_trainings(tmp_path):
    made = chain(DOCUMENTED, tmp_path)
    shared = (
        f"--input_dir {tmp_path}/data --config_file {ROOT}/bert_configs/large.json --output_dir {tmp_path}/out/checkpoints "
        "--max_seq_length {} --max_predictions_per_seq {} --train_batch_size {} --gradient_accumulation_steps {} --max_steps {} "
        "--optimizer lamb --learning_rate {} --lr_schedule poly --warmup_proportion {} --precision fp16 --device cuda "
        "--allreduce_post_accumulation_fp16 --seed 42 --num_steps_per_checkpoint 200 --resume_from_checkpoint"
    )
    ends = [step.program[step.program.index("run_pretraining.py") + 1 :] for job in made.plan.jobs for step in job.steps]
    assert [" ".join(words) for words in ends] == [
        shared.format(128, 20, 8192, 128, 7038, 0.006, 0.2843),
        shared.format(512, 80, 4096, 512, 1563, 0.004, 0.128) + " --phase2",
    ]
    assert [(job.stage, job.nodes, job.ranks_per_node, job.after) for job in made.plan.jobs] == [
        ("phase1", 1, 8, None),
        ("phase2", 1, 8, "phase1"),
    ]
    assert {step.program[0] for job in made.plan.jobs for step in job.steps} == {sys.executable}
    begin = f"{tmp_path}/out/bert_lamb_pretraining.pyt_bert_pretraining_phase"
    assert made.logs == {"phase1": f"{begin}1_fp16_gbs65536", "phase2": f"{begin}2_fp16_gbs32768"}


def test_names_give_the_plan_of_positions(tmp_path):
    named = [part for name, word in zip(ORDERS["later"], LATER.split(), strict=False) for part in (f"--{name}", word)]
    assert chain(named, tmp_path).plan == chain(LATER, tmp_path).plan


def test_nothing_given_is_the_row_of_the_matrix(tmp_path):
    made = chain("", tmp_path)
    rows = [MATRIX.default_row("dgx1-32g", 1, phase) for phase in (1, 2)]
    assert [row.name for row in made.rows.values()] == [row.name for row in rows]
    assert [row.phase_recipe for row in made.rows.values()] == [row.phase_recipe for row in rows]
    assert made.notices == ("platform dgx1-32g (DGX-1, 8 V100 32 GB); --platform chooses another",)
    assert made.plan.run.seed == 42


@pytest.mark.parametrize("name", [name for name, one in MATRIX.platforms.items() if one.device == "cuda"])
def test_every_platform_has_defaults_for_one_gpu_and_for_all(name, tmp_path):
    """The micro-batch is a GPU's, so half a machine makes the recipe's batch with twice the accumulation."""
    full, single = (chain(f"--platform {name}{more}", tmp_path, []).rows for more in ("", " --num_gpus 1"))
    ranks = MATRIX.platforms[name].ranks_per_node
    for phase, row in full.items():
        assert (row.ranks, single[phase].ranks) == (ranks, 1)
        assert (single[phase].micro_batch, single[phase].global_batch) == (row.micro_batch, row.global_batch)
        assert single[phase].accumulation == row.accumulation * ranks


def test_another_global_batch_is_said(tmp_path):
    made = chain("4096 --train_batch_size_phase2 4096", tmp_path)
    assert made.rows[1].global_batch == 32768
    assert made.notices[1:] == ("phase 1: the global batch is 32768 (train_batch_size 4096 x num_gpus 8); recipe lamb has 65536",)


def test_arguments_of_the_documentation_for_other_machines(tmp_path):
    """Its advice for DGX-1 16G (accumulation 512 and 1024) and DGX-2 32G (4096 and 2048 on 16 GPUs, accumulation 64 and 256)."""
    small = chain("--platform dgx1-16g --gradient_accumulation_steps 512 --gradient_accumulation_steps_phase2 1024", tmp_path, [])
    large = chain(
        "--train_batch_size 4096 --train_batch_size_phase2 2048 --num_gpus 16 --gradient_accumulation_steps 64 "
        "--gradient_accumulation_steps_phase2 256",
        tmp_path,
        [Gpu("Tesla V100-SXM3-32GB", 31.7)] * 16,
    )
    assert [row.name for row in small.rows.values()] == ["dgx1-16g_1x8x16x512_fp16", "dgx1-16g_1x8x4x1024_fp16"]
    assert [row.name for row in large.rows.values()] == ["dgx2_1x16x64x64_fp16", "dgx2_1x16x8x256_fp16"]


def test_without_accumulation_and_reduction_in_fp16(tmp_path):
    made = chain("--accumulate_gradients false --gradient_accumulation_steps 128 --allreduce_post_accumulation_fp16 false", tmp_path)
    assert [(row.micro_batch, row.accumulation) for row in made.rows.values()] == [(8192, 1), (4096, 1)]
    assert "gradient_accumulation_steps is not used: accumulate_gradients is false" in made.notices
    assert not any("--allreduce_post_accumulation_fp16" in step.program for job in made.plan.jobs for step in job.steps)


def test_arguments_without_effect_are_said(tmp_path):
    assert chain("--accumulate_into_fp16 true --allreduce_post_accumulation false", tmp_path).notices[1:] == (
        "allreduce_post_accumulation false has no effect: gradients are always reduced once, after accumulation",
        "accumulate_into_fp16 true has no effect: gradients are always accumulated in fp32",
    )


def test_paths(tmp_path):
    for name in ("one ü$;", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "start.pt").touch()
    made = chain(
        ["--data_dir_phase1", "one ü$;", "--data_dir_phase2", "two/../two", "--init_checkpoint", "start.pt", "--codedir", f"{ROOT}/berth/..",
         "--bert_config", "base", "--vocab_file", "v.txt", "--create_logfile", "false"],
        tmp_path,
    )  # fmt: skip
    run = made.plan.run
    assert run.inputs == {1: f"{tmp_path}/one ü$;", 2: f"{tmp_path}/two"}
    assert (run.init_checkpoint, run.vocab_file) == (f"{tmp_path}/start.pt", f"{tmp_path}/v.txt")
    assert run.config_file == f"{ROOT}/bert_configs/base.json"
    assert made.logs == {}
    first, second = (step.program for job in made.plan.jobs for step in job.steps)
    assert "--init_checkpoint" in first and "--init_checkpoint" not in second


def test_wrong_combinations_are_told_together(tmp_path):
    assert refused(
        "--num_gpus 3 --precision tf32 --platform dgx-a100-80g --allreduce_post_accumulation_fp16 true --learning_rate 2 "
        "--train_batch_size_phase2 100 --gradient_accumulation_steps_phase2 3 --data_dir_phase2 gone --init_checkpoint lost.pt --codedir .. "
        "--bert_config larg",
        tmp_path,
        [Gpu("NVIDIA A100-SXM4-80GB", 80.0)] * 2,
    ) == [
        "--learning_rate '2' must be a number above 0 and below 1",
        "num_gpus 3 is more than the 2 GPUs of this machine",
        "allreduce_post_accumulation_fp16 must be false in tf32: fp16 would lose of the gradients what tf32 keeps",
        "num_gpus 3 cannot share the global batch 65536 of recipe lamb; give train_batch_size",
        "train_batch_size_phase2 100 is not divisible by gradient_accumulation_steps_phase2 3; change one of them",
        f"data_dir_phase2 {tmp_path}/gone does not exist",
        f"init_checkpoint {tmp_path}/lost.pt does not exist",
        f"codedir {tmp_path.parent} must be this project, {ROOT}; run the script of the other one",
        "larg is no model in bert_configs; did you mean large? valid: " + ", ".join(path.stem for path in (ROOT / "bert_configs").glob("*.json")),
    ]  # fmt: skip


def test_batches_that_do_not_come_out(tmp_path):
    assert refused("--train_batch_size 1000 --recipe azureml-adam --train_steps_phase2 5", tmp_path)[0] == (
        "recipe azureml-adam has no phase 2; leave its arguments out"
    )
    (line,) = refused("--train_batch_size 1000", tmp_path)
    assert (
        line
        == "train_batch_size 1000 is no multiple of the micro-batch 128 of row dgx1-32g_1x8x128x64_fp16; give gradient_accumulation_steps as well"
    )
    (line, _) = refused("--recipe tiny", tmp_path)
    assert line.startswith(
        "gradient_accumulation_steps must be given: no row of platform dgx1-32g tells a micro-batch for sequence length 16"
    )
    made = chain("--recipe tiny --gradient_accumulation_steps 1 --gradient_accumulation_steps_phase2 2", tmp_path)
    assert [row.micro_batch for row in made.rows.values()] == [2, 1]


def test_where_the_records_are_must_be_said(tmp_path):
    with pytest.raises(ConfigError, match="where are the records.*data_dir_phase1.*BERT_PREP_WORKING_DIR"):
        decide([], MATRIX, DGX1, {})


def test_an_existing_run_is_not_touched_without_resume_training(tmp_path):
    run = tmp_path / "out" / "checkpoints"
    run.mkdir(parents=True)
    (run / "ckpt_7238.pt").touch()
    message = f"{run} holds a run already (ckpt_7238.pt); give resume_training true to go on with it, or other --results for a new one"
    assert refused("", tmp_path) == [message]
    entry = '{"file": "ckpt_7238.pt", "step": 7238, "phase": 2, "final": false, "bytes": 0, "sha256": "", "phase_step": 200}'
    (run / "manifest.json").write_text(f'{{"checkpoints": [{entry}], "config": {{}}}}')
    assert refused("--resume_training false", tmp_path) == [message]
    assert chain("--resume_training true", tmp_path).plan == chain("8192 6e-3 --resume_training true", tmp_path).plan
    (run / "manifest.json").write_text("{")
    (line,) = refused("--resume_training true", tmp_path)
    assert line.startswith(f"{run}/manifest.json is damaged")


def test_copied_output_keeps_both_streams_and_earlier_lines(tmp_path):
    log = tmp_path / "a b" / "$x.log"
    code = (
        "import os, pathlib, subprocess, sys; from berth.launch.positional import copied_to\n"
        "with copied_to(pathlib.Path(sys.argv[1])):\n"
        "    print('one'); os.write(2, b'two\\n'); subprocess.run(['echo', 'three'])\n"
        "print('outside')"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, str(log)], capture_output=True, text=True, cwd=ROOT, check=True)
        assert sorted(done.stdout.split()) == ["one", "outside", "three", "two"] and done.stderr == ""
    assert sorted(log.read_text().split()) == ["one", "one", "three", "three", "two", "two"]


def test_a_log_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), copied_to(tmp_path / "file" / "x.log"):
        pytest.fail("must not get here")
