"""What a run says of itself: whole records of two ranks recomputed by hand, the line for people, TensorBoard, and the summary."""

import logging
import re
import types
import zlib

import pytest
import torch

import modeling
from berth.flops import step_flops
from berth.runlog import UNITS, read_records
from berth.training.evaluate import Baselines, Evaluation
from berth.training.metrics import PARTS
from berth.training.options import parse_options
from berth.training.report import Reporter, peak_of
from tests.support import ROOT, TINY, make_project, pretraining_arguments

CONFIG = modeling.BertConfig.from_dict(TINY)
SECONDS = {"data": 0.5, "forward": 2.0, "backward": 4.0, "communication": 1.0, "optimizer": 0.25, "other": 0.25}  # 8 s
FACTS = {"learning_rate": 1e-3, "grad_norm": 2.5, "skipped_steps": 0, "loss_scale": 1.0, "first_sample": 32}


class Clock:
    """Hands out the same seconds for every step since it was asked last."""

    def __init__(self, seconds):
        self.seconds, self.steps = seconds, 0

    def take(self):
        steps, self.steps = self.steps, 0
        return {part: steps * value for part, value in self.seconds.items()}


class Rank:
    """One of two ranks; ``gather_floats`` adds what the other one, which goes first, has left behind."""

    device, hosts, world_size = torch.device("cpu"), ["n01", "n02"], 2

    def __init__(self, rank, left):
        self.rank, self.is_main, self.left, self.calls = rank, rank == 0, left, 0

    def gather_floats(self, values):
        self.calls += 1
        if self.rank == 1:
            self.left.append(list(values))
            return [[0.0] * len(values), list(values)]
        return [list(values), self.left.pop(0)]


class Alone(Rank):
    hosts, world_size = ["n01"], 1

    def gather_floats(self, values):
        return [list(values)]


class Board:
    def __init__(self):
        self.scalars = {}

    def add(self, values, step):
        self.scalars.update({name: (value, step) for name, value in values.items()})

    def close(self):
        pass


@pytest.fixture
def options(tmp_path):
    make_project(tmp_path)

    def make(**changes):
        return parse_options(pretraining_arguments(tmp_path, **{"peak_tflops": 0.001, "json_summary": tmp_path / "log.json", **changes}))

    return make


def batch(ids, **numbers):
    plain = {"sequences": 4, "tokens": 80, "squares": 1700, "masked": 10}
    return types.SimpleNamespace(**{**plain, **numbers}, checksum=zlib.crc32(ids), bytes=len(ids))


def result(mlm, nsp, correct, skipped=False):
    losses = [torch.tensor(value) for value in (mlm, nsp)]
    return types.SimpleNamespace(mlm_loss=losses[0], nsp_loss=losses[1], mlm_correct=torch.tensor(correct), skipped=skipped)


def reporter(options, communicator, seconds=SECONDS):
    made = Reporter(options, CONFIG, communicator, Clock(seconds))
    made.open(0, 24, 0)
    return made


def do(reporter, *numbers):
    reporter.clock.steps += 1
    reporter.step_done(*numbers)


def records(path):
    return [record["data"] for record in read_records(path) if record["type"] == "LOG"]


def two_ranks(options):
    """(reporter of rank 0, its window, the communicators) of two steps, of which rank 1 is the slower part."""
    left = []
    ranks = [Rank(rank, left) for rank in range(2)]
    slow = {**SECONDS, "backward": 7.0, "communication": 0.0, "data": 0.0}  # 9.5 s, all its own
    reporters = [reporter(options, ranks[0]), reporter(options, ranks[1], slow)]
    for number, one in ((1, reporters[1]), (0, reporters[0])):
        for _ in range(2):
            do(one, batch(b"half" if number else b"this", tokens=80 + number, masked=10 - number), result(1.0 + number, 0.25, 2 + number))
        window = one.exchange()
    return reporters[0], window, ranks


def test_a_record_of_two_ranks(options, tmp_path, caplog):
    first, window, ranks = two_ranks(options())
    first.board = Board()
    with caplog.at_level(logging.INFO):
        first.log_step(window, epoch=0, step=2, phase_step=24, facts=FACTS)
    first.close()
    (data,) = records(tmp_path / "log.json")
    flops = 2 * sum(step_flops(CONFIG, tokens=80 + rank, squares=1700, masked=10 - rank, pairs=4) for rank in range(2))
    rate = flops / 19 / 2
    own = [2 * 7.0, 2 * 9.5]
    expected = {
        "average_loss": 3.5,
        "mlm_loss": 3.0,
        "nsp_loss": 0.5,
        "mlm_accuracy": (2 * 2 + 2 * 3) / (2 * 10 + 2 * 9),
        "steps_averaged": 2,
        **FACTS,
        "batch_crc32": zlib.crc32(b"thishalf"),
        "training_sequences_per_second": 16 / 19,
        "tokens_per_second": 2 * 161 / 19,
        "tflops_per_device": rate / 1e12,
        "mfu": rate / 1e9,
        "data_wait_share": (0.5 / 8 + 0) / 2,
        "share_data": (0.5 / 8 + 0) / 2,
        "share_forward": (2 / 8 + 2 / 9.5) / 2,
        "share_backward": (4 / 8 + 7 / 9.5) / 2,
        "share_communication": (1 / 8 + 0) / 2,
        "share_optimizer": (0.25 / 8 + 0.25 / 9.5) / 2,
        "share_other": (0.25 / 8 + 0.25 / 9.5) / 2,
        "memory_gib": data["memory_gib"],
        "slowest_rank": 1,
        "slowest_rank_ratio": own[1] / own[0],
    }
    assert data == {key: value if isinstance(value, int) else pytest.approx(value) for key, value in expected.items()}
    assert sum(data[f"share_{part}"] for part in PARTS) == pytest.approx(1) and 0.05 < data["memory_gib"] < 64
    (line,) = caplog.messages
    assert line == (
        "step 2 (24 of 24)  loss 3.5000 (mlm 3.0000, nsp 0.5000)  accuracy 26.32 %  lr 1.000e-03  grad norm 2.50  0.8 seq/s"
        "  slowest: rank 1 on n02 (1.4x)"
    )
    curves = expected.keys() - {"steps_averaged", "first_sample", "batch_crc32", "slowest_rank"}
    assert first.board.scalars == {f"train/{name}": (data[name], 2) for name in curves}
    assert [rank.calls for rank in ranks] == [1, 1], "one collective a record"


def test_a_rank_that_is_a_little_slower_is_not_named(options, caplog):
    one = reporter(options(), Rank(1, left := []), {**SECONDS, "forward": 3.0})
    do(one, batch(b"b"), result(1.0, 0.0, 1))
    one.exchange()
    first = reporter(options(), Rank(0, left))
    do(first, batch(b"a"), result(1.0, 0.0, 1))
    with caplog.at_level(logging.INFO):
        first.log_step(first.exchange(), epoch=0, step=1, phase_step=1, facts=FACTS)
    assert caplog.messages and "slowest" not in caplog.text


def test_windows_begin_anew(options, tmp_path):
    alone = reporter(options(), Alone(0, []))
    for number in range(1, 4):
        do(alone, batch(b"a"), result(float(number), 0.0, number))
        alone.log_step(alone.exchange(), epoch=0, step=number, phase_step=number, facts=FACTS)
    alone.close()
    found = records(tmp_path / "log.json")
    assert [data["mlm_loss"] for data in found] == [1.0, 2.0, 3.0] and [data["mlm_accuracy"] for data in found] == [0.1, 0.2, 0.3]
    assert [data["training_sequences_per_second"] for data in found] == [0.5] * 3
    assert not any("slowest_rank" in data or "slowest_rank_ratio" in data for data in found)


def test_a_window_that_is_undone(options, tmp_path):
    """Of a rollback neither losses nor seconds get into the next record; the summary is of all work."""
    alone = reporter(options(), Alone(0, []))
    for number in range(1, 6):
        do(alone, batch(b"a"), result(99.0, 0.0, 9, skipped=number == 5))
    assert alone.window_steps == 4
    alone.drop_window()
    assert alone.window_steps == 0
    do(alone, batch(b"b"), result(2.0, 0.0, 5))
    alone.log_step(alone.exchange(), epoch=0, step=1, phase_step=1, facts=FACTS)
    assert alone.window_steps == 0
    alone.summary({"outcome": "stopped", "global_step": 1})
    alone.close()
    record, summary = records(tmp_path / "log.json")
    assert (record["mlm_loss"], record["steps_averaged"], record["training_sequences_per_second"]) == (2.0, 1, 0.5)
    assert summary["raw_train_time"] == pytest.approx(24) and summary["final_loss"] == 2.0


@pytest.mark.parametrize("log_freq", [1, 3, 7])
def test_the_summary_leaves_out_the_warm_up(options, tmp_path, log_freq, caplog):
    """Three slow steps, then seven of 8 s, one of them skipped; however often it is logged."""
    alone = reporter(options(), Alone(0, []))
    for number in range(1, 11):
        alone.clock.seconds = {**SECONDS, "other": 100.0} if number <= 3 else SECONDS
        do(alone, batch(b"a"), result(2.0, 1.0, 5, skipped=number == 6))
        if number % log_freq == 0:
            alone.log_step(alone.exchange(), epoch=0, step=number, phase_step=number, facts=FACTS)
    with caplog.at_level(logging.INFO):
        alone.summary({"outcome": "phase 1 complete", "global_step": 10})
    alone.close()
    data = records(tmp_path / "log.json")[-1]
    flops = 7 * step_flops(CONFIG, tokens=80, squares=1700, masked=10, pairs=4)
    assert data["raw_train_time"] == pytest.approx(56) and data["training_sequences_per_second"] == pytest.approx(0.5)
    assert data["tokens_per_second"] == pytest.approx(10) and data["mfu"] == pytest.approx(flops / 56 / 1e9)
    assert {part: data[f"share_{part}"] for part in PARTS} == {part: pytest.approx(value / 8) for part, value in SECONDS.items()}
    assert (data["outcome"], data["global_step"], data["final_loss"]) == ("phase 1 complete", 10, 3.0) and data["e2e_train_time"] > 0
    assert "phase 1 complete at step 10, final loss 3.0000, 0.5 sequences/s" in caplog.text and "over 6 measured steps" in caplog.text


def test_the_summary_of_a_run_that_did_nothing(options, tmp_path):
    alone = reporter(options(), Alone(0, []))
    alone.summary({"outcome": "phase 1 was already complete", "global_step": 10})
    alone.close()
    (data,) = records(tmp_path / "log.json")
    assert data.keys() == {"outcome", "global_step", "e2e_train_time"}


def test_other_ranks_write_nothing(options, tmp_path, caplog):
    one = reporter(options(), Rank(1, []))
    do(one, batch(b"a"), result(1.0, 0.5, 1))
    with caplog.at_level(logging.INFO):
        one.log_step(one.exchange(), epoch=0, step=1, phase_step=1, facts=FACTS)
        one.summary({"outcome": "stopped", "global_step": 1})
    one.close()
    assert not (tmp_path / "log.json").exists() and not caplog.messages


def test_masked_language_modelling_has_no_pairs(options, tmp_path, caplog):
    alone = reporter(options(objective="mlm"), Alone(0, []))
    do(alone, batch(b"a"), result(2.0, 0.0, 5))
    with caplog.at_level(logging.INFO):
        alone.log_step(alone.exchange(), epoch=0, step=1, phase_step=1, facts=FACTS)
    base = Baselines(3.0, 0.1, 0.5)
    alone.log_evaluation("end", 1, Evaluation(2.0, 0.3, 0.0, 0.0, 40, 100), base)
    alone.close()
    step, evaluation = records(tmp_path / "log.json")
    assert "nsp_loss" not in step and not {"nsp_loss", "nsp_accuracy"} & evaluation.keys()
    assert step["tflops_per_device"] * 1e12 == pytest.approx(step_flops(CONFIG, tokens=80, squares=1700, masked=10, pairs=0) / 8)
    assert "(mlm 2.0000)" in caplog.text


def test_the_peak_of_an_unknown_device(options, tmp_path, monkeypatch):
    alone = reporter(options(peak_tflops=None), Alone(0, []))
    do(alone, batch(b"a"), result(2.0, 0.0, 5))
    alone.log_step(alone.exchange(), epoch=0, step=1, phase_step=1, facts=FACTS)
    alone.close()
    assert "mfu" not in records(tmp_path / "log.json")[0]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    cuda = torch.device("cuda", 0)
    assert peak_of(options(peak_tflops=None, precision="bf16"), cuda) == pytest.approx(989.5e12)
    assert peak_of(options(peak_tflops=123.0), cuda) == pytest.approx(123e12)


def test_every_measure_of_a_record_has_a_unit(options, tmp_path):
    first, window, _ = two_ranks(options())
    first.log_step(window, epoch=0, step=2, phase_step=2, facts=FACTS)
    first.close()
    counted = {"steps_averaged", "skipped_steps", "loss_scale", "first_sample", "batch_crc32", "slowest_rank"}
    assert records(tmp_path / "log.json")[0].keys() - counted <= UNITS.keys()


def test_the_tables_of_the_document_are_the_records(options, tmp_path):
    first, window, _ = two_ranks(options())
    first.log_step(window, epoch=0, step=2, phase_step=2, facts=FACTS)
    first.log_evaluation("end", 2, Evaluation(2.0, 0.3, 0.1, 0.6, 40, 100), Baselines(3.0, 0.1, 0.5))
    first.communicator = Alone(0, [])
    for _ in range(4):
        do(first, batch(b"a"), result(2.0, 0.0, 5))
    first.summary({"outcome": "stopped", "global_step": 2, "skipped_steps": 0})
    first.close()
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    step, evaluation, summary = (
        {key for cell in re.findall(r"^\| (`.*?) \|", chapter, re.M) for key in re.findall(r"`(\w+)`", cell)}
        for chapter in text.split("\n## ")[1:]
    )
    found = records(tmp_path / "log.json")
    assert step == found[0].keys() and evaluation == found[1].keys()
    keys = list(found[0])
    speed = set(keys[keys.index("training_sequences_per_second") :])
    assert summary == found[2].keys() - speed and found[2].keys() - summary == speed - {"slowest_rank", "slowest_rank_ratio"}
