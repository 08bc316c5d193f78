"""The words of scripts/run_pretraining.sh: three documented orders, names, and everything that is refused."""

from __future__ import annotations

import pytest

from berth.launch.arguments import ARGUMENTS, ORDERS, REFUSED, help_text, read_words

# usage line and defaults of the documentation, and of the later public script: word for word but for the numbers that users change
FIRST = "8192 6e-3 fp16 8 0.2843 900 200 false true true 128 42 my_job true true"
DOCUMENTED = f"{FIRST} true 4096 4e-3 0.128 90 512"
LATER = f"{FIRST} 4096 4e-3 0.128 90 512"
VALUES = {
    "train_batch_size": 8192, "learning_rate": 6e-3, "precision": "fp16", "num_gpus": 8, "warmup_proportion": 0.2843, "train_steps": 900,
    "save_checkpoint_steps": 200, "resume_training": False, "create_logfile": True, "accumulate_gradients": True,
    "gradient_accumulation_steps": 128, "seed": 42, "job_name": "my_job", "allreduce_post_accumulation": True,
    "allreduce_post_accumulation_fp16": True, "train_batch_size_phase2": 4096, "learning_rate_phase2": 4e-3,
    "warmup_proportion_phase2": 0.128, "train_steps_phase2": 90, "gradient_accumulation_steps_phase2": 512,
}  # fmt: skip


def read(*words: str) -> tuple[dict[str, object], list[str], list[str]]:
    wrong: list[str] = []
    notices: list[str] = []
    return read_words(words, wrong, notices), wrong, notices


def test_documented_order():
    values, wrong, notices = read(*DOCUMENTED.split(), "d1", "d2", "code", "start.pt")
    assert not wrong
    assert notices == ["argument 16 is true: the documented order of arguments, in which it is accumulate_into_fp16"]
    assert values == VALUES | {
        "accumulate_into_fp16": True, "data_dir_phase1": "d1", "data_dir_phase2": "d2", "codedir": "code", "init_checkpoint": "start.pt",
    }  # fmt: skip


def test_later_order():
    nothing = ["none", "", "None", "none", "none", "none", "none"]  # of the preparation that this script no longer does
    values, wrong, notices = read(*LATER.split(), "d1", "d2", "code", "None", *nothing, "base")
    assert not wrong
    assert notices == ["argument 16 is 4096: the later order of arguments, in which it is train_batch_size_phase2"]
    assert values == VALUES | {"data_dir_phase1": "d1", "data_dir_phase2": "d2", "codedir": "code", "bert_config": "base"}


def test_fifteen_arguments_are_the_same_in_both():
    values, wrong, notices = read(*FIRST.split())
    assert not wrong and not notices
    assert values == {name: VALUES[name] for name in ORDERS["documented"][:15]}


@pytest.mark.parametrize("order", ["documented", "later"])
def test_names_are_positions(order):
    line = DOCUMENTED if order == "documented" else LATER
    positional, _, _ = read(*line.split())
    separate = [part for name, word in zip(ORDERS[order], line.split(), strict=False) for part in (f"--{name}", word)]
    joined = [f"--{name}={word}" for name, word in zip(ORDERS[order], line.split(), strict=False)]
    assert read(*separate) == read(*joined) == (positional, [], [])
    assert read(*line.split()[:4], *separate[8:])[0] == positional


def test_hostile_texts_pass_unchanged():
    path = "/a b/$HOME;'\"\n`x`ü=--y"
    values, wrong, _ = read("--data_dir_phase1", path, f"--results={path}", "--job_name", "$(x) ü'\";")
    assert not wrong
    assert values == {"data_dir_phase1": path, "results": path, "job_name": "$(x) ü'\";"}


@pytest.mark.parametrize("tells", ["True", "4096.0", "", "none", "４０９６", "yes"])
def test_an_undecidable_order_is_refused(tells):
    values, wrong, notices = read(*FIRST.split(), tells, "4096", "4e-3")
    assert wrong == [
        f"argument 16 is {tells!r}: it must be true or false (accumulate_into_fp16, the documented order) or a number "
        "(train_batch_size_phase2, the later order); from there on the orders differ, so nothing after it was read"
    ]
    assert not notices and "learning_rate_phase2" not in values


def test_an_order_cannot_pass_for_the_other():
    """A number in the place of true: what follows falls on values its own rules refuse."""
    _, wrong, _ = read(*FIRST.split(), "1", "4096", "4e-3", "0.128", "90", "512")
    assert wrong == [
        "argument 17, learning_rate_phase2 '4096' must be a number above 0 and below 1",
        "argument 19, train_steps_phase2 '0.128' must be a whole number, 1 or more",
    ]


def test_every_mistake_at_once():
    words = "0 6 fp16 8.0 28.43 -5 1e3 yes TRUE 1 ８ -1 a/b".split()
    _, wrong, _ = read(
        *words,
        "--train_bath_size_phase2",
        "4",
        "--seed",
        "7",
        "--seed",
        "8",
        "--num_workers=4",
        "--learning_rate_phase2",
        "nan",
        "--codedir",
    )
    assert wrong == [
        f"unknown option --train_bath_size_phase2; did you mean train_batch_size_phase2 or train_batch_size? valid: {', '.join(ARGUMENTS)}",
        "--codedir needs a value",
        "argument 1, train_batch_size '0' must be a whole number, 1 or more",
        "argument 2, learning_rate '6' must be a number above 0 and below 1",
        "argument 4, num_gpus '8.0' must be a whole number, 1 or more",
        "argument 5, warmup_proportion '28.43' must be a share of the steps: 0 or more and below 1, not per cent",
        "argument 6, train_steps '-5' must be a whole number, 1 or more",
        "argument 7, save_checkpoint_steps '1e3' must be a whole number, 1 or more",
        "argument 8, resume_training 'yes' must be true or false",
        "argument 9, create_logfile 'TRUE' must be true or false",
        "argument 10, accumulate_gradients '1' must be true or false",
        "argument 11, gradient_accumulation_steps '８' must be a whole number, 1 or more",
        "argument 12, seed '-1' must be a whole number, 0 or more and below 2**63",
        "argument 13, job_name 'a/b' must be part of a file's name: without slash and line break",
        "--seed '7' was given before; give it once, by position or by name",
        "--seed '8' was given before; give it once, by position or by name",
        f"--num_workers '4' is not taken here: {REFUSED['num_workers']}; leave it out, or give none",
        "--learning_rate_phase2 'nan' must be a number above 0 and below 1",
    ]  # fmt: skip


def test_arguments_of_the_old_preparation_are_refused_with_the_reason():
    _, wrong, _ = read(*LATER.split(), "d1", "d2", "code", "None", "wiki/source", "64", "128", "4", "0.9", "64", "static", "large", "more")
    assert wrong[0] == "33 arguments by position, the later order has 32; the first too many: 'more'"
    assert [line.split(" is not taken")[0] for line in wrong[1:]] == [
        "argument 25, wikipedia_source 'wiki/source'", "argument 26, num_dask_workers '64'", "argument 27, num_shards_per_worker '128'",
        "argument 28, num_workers '4'", "argument 29, sample_ratio '0.9'", "argument 30, phase2_bin_size '64'", "argument 31, masking 'static'",
    ]  # fmt: skip
    assert all("python -m data.prepare" in line for line in wrong[1:] if "num_workers" not in line)


def test_help_lists_every_argument_with_its_positions():
    rows = {line.split()[2]: line.split()[:2] for line in help_text().splitlines() if line[:1] in "0123456789-" and len(line.split()) > 3}
    del rows["the"]  # the closing sentence about --dry_run
    assert rows.keys() == {*ARGUMENTS, *REFUSED}
    for column, order in enumerate(ORDERS.values()):
        assert {name: int(place[column]) for name, place in rows.items() if place[column] != "-"} == {
            name: at for at, name in enumerate(order, 1)
        }
