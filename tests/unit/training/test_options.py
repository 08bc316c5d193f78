"""The command line of run_pretraining.py: one frozen object, all mistakes at once."""

import dataclasses
import re

import pytest

from berth.errors import ConfigError
from berth.training.options import OBSOLETE_HARMLESS, build_parser, parse_options


@pytest.fixture
def required(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return ["--input_dir", "data", "--config_file", str(tmp_path / "config.json"), "--output_dir", "out"]


def test_batch_algebra_and_derived_paths(required):
    options = parse_options([*required, "--train_batch_size", "8192", "--gradient_accumulation_steps", "512"])
    assert options.micro_batch == 16 and options.phase == 1
    assert options.json_summary == "out/dllogger.json" and options.tensorboard_dir == "out/tensorboard"
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 1


def test_the_published_command_line_is_understood(required):
    """The flags that the public run.sub and run_pretraining.sh pass for phase 2."""
    words = (
        "--bert_model bert-large-uncased --max_seq_length 512 --max_predictions_per_seq 80 --max_steps 1563 --warmup_proportion 0.128 "
        "--num_steps_per_checkpoint 200 --learning_rate 4e-3 --seed 42 --fp16 --gradient_accumulation_steps 512 --train_batch_size 4096 "
        "--allreduce_post_accumulation --allreduce_post_accumulation_fp16 --phase2 --resume_from_checkpoint --phase1_end_step 7038 "
        "--do_train --log_freq 1.0 --local_rank 0 --json-summary out.json --disable_progress_bar --use_env --steps_this_run -1 --resume_step -1"
    )
    options = parse_options([*required, *words.split()])
    assert options.precision == "fp16" and options.phase2 and options.max_steps == 1563 and options.micro_batch == 8
    assert options.steps_this_run is None and options.resume_step is None
    assert any("--bert_model" in notice for notice in options.notices)


def test_all_mistakes_at_once(required):
    with pytest.raises(ConfigError) as caught:
        parse_options(
            [*required, "--train_batch_size", "100", "--gradient_accumulation_steps", "8", "--warmup_proportion", "3", "--fp16", "--precision",
             "bf16", "--phase1_end_step", "5", "--eval_freq", "10", "--masking", "x", "--max_steps", "0"]
        )  # fmt: skip
    text = str(caught.value)
    for words in ("96 or 104", "--warmup_proportion is 3.0", "--fp16 contradicts --precision bf16", "--phase1_end_step", "--eval_freq needs",
                  "--masking", "--max_steps is 0"):  # fmt: skip
        assert words in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--max_steps", "10.5"],
        ["--max_steps", "inf"],
        ["--max_steps", "many"],
        ["--unknown", "1"],
        ["--optimizer", "sgd"],
        ["--learning_rat", "1"],
    ],
)
def test_usage_errors(required, words):
    with pytest.raises(ConfigError, match="--help"):
        parse_options([*required, *words])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--config_file .*none.json does not exist"):
        parse_options(["--input_dir", "d", "--config_file", str(tmp_path / "none.json"), "--output_dir", "o"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", "-1"), ("loss_scale", "-1"), ("seed", "-1"), ("num_workers", "-1"), ("weight_decay", "inf"), ("max_grad_norm", "nan"),
     ("loss_scale", "inf"), ("dead_rank_s", "0.1"), ("peak_tflops", "0"), ("max_rollbacks", "-1"), ("scale_growth_interval", "0"), ("seed", str(2**70)), ("timeout_min", "1e300"), ("lr_decay_rate", "1.5"), ("lr_offset", "-1")],
)  # fmt: skip
def test_numbers_out_of_range(required, name, value):
    with pytest.raises(ConfigError, match=f"--{name} is "):
        parse_options([*required, f"--{name}", value])


def test_help_explains_every_option():
    text = build_parser().format_help()
    shown = [action for action in build_parser()._actions if action.help != "==SUPPRESS=="]
    for action in shown:
        assert action.help, action.option_strings
        assert action.option_strings[0] in text
    assert len(shown) > 45 and "130 after Ctrl-C" in re.sub(r"\s+", " ", text)
    assert not any(flag in text for flag in OBSOLETE_HARMLESS if flag != "--allreduce_post_accumulation")


def test_dynamic_masking_needs_the_vocabulary(required, tmp_path):
    with pytest.raises(ConfigError, match="--dynamic_masking needs --vocab_file"):
        parse_options([*required, "--dynamic_masking"])
    with pytest.raises(ConfigError, match="--masked_lm_prob is 1.0"):
        parse_options([*required, "--masked_lm_prob", "1"])
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.touch()
    options = parse_options([*required, "--dynamic_masking", "--vocab_file", str(vocabulary), "--masked_lm_prob", "0.3"])
    assert options.dynamic_masking and options.masked_lm_prob == 0.3 and not options.whole_word_mask


def test_sharding_and_reduction(required, tmp_path):
    options = parse_options(required)
    assert (options.sharding, options.reduce_dtype, options.uses_deepspeed) == ("none", "fp32", False)
    assert parse_options([*required, "--allreduce_post_accumulation_fp16"]).reduce_dtype == "fp16"
    assert parse_options([*required, "--reduce_dtype", "bf16", "--shard", "zero2"]).sharding == "zero2"
    for words in (["--deepspeed"], ["--deepspeed_zero_stage", "3"], ["--deepspeed_zero_stage"]):  # alone it means 1, as in ORT's script
        options = parse_options([*required, *words])
        assert (options.sharding, options.uses_deepspeed) == ("deepspeed", True)
    assert options.deepspeed_zero_stage == 1
    with pytest.raises(ConfigError) as caught:
        parse_options(
            [
                *required,
                "--shard",
                "zero1",
                "--deepspeed",
                str(tmp_path / "no.json"),
                "--reduce_dtype",
                "bf16",
                "--allreduce_post_accumulation_fp16",
            ]
        )
    for words in ("--shard zero1 and --deepspeed exclude", "no.json does not exist", "contradicts --reduce_dtype bf16"):
        assert words in str(caught.value)


def test_help_says_a_default_once_and_only_where_there_is_one():
    parser = build_parser()
    for action in parser._actions:
        if action.help == "==SUPPRESS==":
            continue
        text = parser._get_formatter()._expand_help(action)
        said = text.count("(default:")
        assert said <= 1 and (not said or re.search(r"\(default: [^()]+\)$", text)), text
        assert "(default: None)" not in text and "(default: False)" not in text
    texts = {action.dest: parser._get_formatter()._expand_help(action) for action in parser._actions}
    for name, default in (("precision", "fp32"), ("reduce_dtype", "fp32"), ("unpad", "auto"), ("seed", "42"), ("weight_decay", "0.01")):
        assert texts[name].endswith(f"(default: {default})")
