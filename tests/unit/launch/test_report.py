"""berth.launch.report and berth.launch.measure: run logs in, measured beside published out."""

import json
import re
import subprocess
import sys

import pytest

from berth.errors import ConfigError, DataError
from berth.files import write_json
from berth.launch import measure
from berth.launch.matrix import load_matrix
from berth.launch.report import as_json, as_table, check_published, compare, draw, measured
from berth.runlog import RunLog
from tests.support import ROOT

A100 = {"platform": "dgx-a100-80g", "nodes": 4, "ranks_per_node": 8, "phase": 1, "precision": "fp16", "micro_batch": 256}


@pytest.fixture(scope="module")
def matrix():
    return load_matrix()


def attempt(folder, rates, *, every=1, start=0, wait=0.1, summary=None, evaluate=False, **changes):
    """One process's part of a run log: a window of ``every`` steps for each of ``rates``."""
    facts = {
        "phase": 1,
        "precision": "fp16",
        "world_size": 32,
        "batch_size_per_gpu": 256,
        "gradient_accumulation_steps": 8,
        "global_batch": 65536,
    }
    log = RunLog(folder / "dllogger.json")
    log.parameters(**{**facts, **changes}, options={"max_seq_length": changes.get("max_seq_length", 128)})
    log.parameters(train_start=True, global_step=start)
    for at, rate in enumerate(rates, 1):
        step = start + at * every
        log.log((0, step), {"average_loss": 2.0, "steps_averaged": every, "training_sequences_per_second": rate, "data_wait_share": wait})
        if evaluate:
            log.log((0, step), {"evaluation": "during", "mlm_loss": 2.0, "training_sequences_per_second": 1.0})
    log.log((), {"e2e_train_time": 9.0, "final_loss": 2.0, **(summary or {})})
    log.close()


def run_json(folder, row=None, name="phase1-7.run.json", **more):
    (folder / "slurm").mkdir(exist_ok=True)
    recipe = {"max_seq_length": 128, "max_predictions_per_seq": 20}
    model = {"config_file": str(ROOT / "bert_configs" / "large.json")}
    write_json(folder / "slurm" / name, {"row": row or A100, "recipe": recipe, "run": model, "attempts": [], **more})


@pytest.fixture
def run(tmp_path):
    """A run of 4 DGX A100 nodes; warm-up at 10, then windows of 18000."""
    folder = tmp_path / "run"
    folder.mkdir()
    attempt(folder, [10.0] * 3 + [18000.0] * 5)
    run_json(folder)
    return folder


# -- measuring ------------------------------------------------------------------------------------------------------------


def test_warm_up_is_as_long_as_training_says():
    from berth.training.report import WARM_UP_STEPS

    assert measure.WARM_UP_STEPS == WARM_UP_STEPS


def test_the_mean_is_harmonic_over_steps_and_leaves_warm_up_and_evaluation_out(tmp_path):
    attempt(tmp_path, [5.0, 5.0, 5.0, 100.0, 300.0, 300.0], evaluate=True)
    attempt(tmp_path, [7.0, 7.0, 7.0, 150.0], start=6, wait=0.4)
    (one,) = measured([tmp_path])
    seconds = 1 / 100 + 1 / 300 + 1 / 300 + 1 / 150
    assert one.steps == 4 and one.run == str(tmp_path) and one.row is None
    assert one.sequences_per_second == pytest.approx(4 / seconds)
    assert one.median == 225.0
    assert (one.low, one.high) == pytest.approx((115.0, 300.0))  # 10th and 90th percentile of 100, 150, 300, 300
    assert one.data_wait_share == pytest.approx((0.1 * (1 / 100 + 2 / 300) + 0.4 / 150) / seconds)
    assert one.settings == measure.Settings(1, "fp16", 128, 32, 256, 8, 65536)


def test_windows_that_hold_warm_up_steps_are_left_out_whole(tmp_path):
    attempt(tmp_path, [1.0, 50.0, 200.0], every=2)  # steps 1-2 and 3-4 hold warm-up; 5-6 does not
    (one,) = measured([tmp_path])
    assert (one.steps, one.sequences_per_second, one.low, one.high) == (2, pytest.approx(200.0), 200.0, 200.0)


def test_a_single_long_window_is_read_from_the_sum_at_the_end(tmp_path):
    attempt(tmp_path, [900.0], every=13, summary={"training_sequences_per_second": 65536.0, "raw_train_time": 10.0})
    (one,) = measured([tmp_path])
    assert (one.steps, one.sequences_per_second) == (10, 65536.0)


def test_steps_after_a_resume_count_even_if_done_before(tmp_path):
    attempt(tmp_path, [1.0] * 3 + [100.0] * 4)
    attempt(tmp_path, [1.0] * 3 + [100.0] * 4, start=3)
    assert measured([tmp_path])[0].steps == 8


def test_nothing_but_warm_up_is_no_measurement(tmp_path, matrix):
    attempt(tmp_path, [5.0, 5.0])
    run_json(tmp_path)
    (line,) = compare(measured([tmp_path]), matrix)
    assert (line.measurement.steps, line.ratio, line.scaling) == (0, None, None)
    assert line.why == "no step after the first 3 of an attempt was logged"
    assert "no step after" in as_table([line])


def test_settings_are_kept_apart_and_find_their_own_job(tmp_path):
    attempt(tmp_path, [1.0] * 3 + [100.0])
    attempt(tmp_path, [1.0] * 3 + [60.0], start=4, world_size=16, gradient_accumulation_steps=16)
    attempt(tmp_path, [1.0] * 3 + [40.0], start=8, phase=2, batch_size_per_gpu=32, global_batch=32768, max_seq_length=None)
    run_json(tmp_path)
    run_json(tmp_path, {**A100, "nodes": 2}, "phase1-8.run.json")
    run_json(tmp_path, {**A100, "phase": 2, "micro_batch": 32}, "phase2-9.run.json", recipe={"max_seq_length": 512})
    found = measured([tmp_path])
    assert [(one.settings.phase, one.row["nodes"], one.row["micro_batch"], one.settings.seq_len, one.median) for one in found] == [
        (1, 4, 256, 128, 100.0),
        (1, 2, 256, 128, 60.0),
        (2, 4, 32, 512, 40.0),
    ]


def test_an_earlier_submission_and_damaged_records(tmp_path):
    attempt(tmp_path, [1.0] * 3 + [100.0])
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "phase1-1.run.json").write_text("{")
    (tmp_path / "slurm" / "phase1-2.run.json").write_text("[]")
    assert measured([tmp_path])[0].row is None
    run_json(tmp_path, {**A100, "nodes": 32}, earlier={"x": {"row": {**A100, "platform": "dgx-h100"}}})
    assert measured([tmp_path])[0].row["platform"] == "dgx-h100"


def test_folders_of_runs_and_logs_themselves(run):
    other = run.parent / "another $run"
    other.mkdir()
    attempt(other, [1.0] * 3 + [9.0])
    assert [one.run for one in measured([run.parent])] == [str(other), str(run)]
    assert [one.run for one in measured([run / "dllogger.json"])] == [str(run)]


def test_missing_and_foreign_logs_are_all_named(tmp_path, run):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("step 1\n")
    with pytest.raises(DataError) as caught:
        measured([tmp_path / "a", run, tmp_path / "b", tmp_path / "c"])
    lines = str(caught.value).splitlines()
    assert [re.search(r"/([abc])[/ ]", line)[1] for line in lines[:-1]] == ["a", "b", "c"]
    assert lines[-1].strip() == "give folders of runs (with dllogger.json), folders of such folders, or run logs"


# -- comparing ------------------------------------------------------------------------------------------------------------


def test_ratio_and_per_gpu(run, matrix):
    (line,) = compare(measured([run]), matrix)
    assert (line.platform, line.nodes, line.published, line.why) == ("dgx-a100-80g", 4, 18119.0, "")
    assert line.ratio == pytest.approx(18000 / 18119) and line.per_gpu == 18000 / 32
    assert line.source.startswith("nvidia-readme a07d20a1") and (line.scaling, line.efficiency) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("logged", "row", "why"),
    [
        ({"precision": "bf16"}, {}, "not comparable: precision bf16, published with tf32 or fp16"),
        ({"max_seq_length": 256}, {}, "not comparable: length 256, published with 128"),
        ({"batch_size_per_gpu": 128}, {}, "not comparable: micro-batch 128, published with 256"),
        ({"global_batch": 8192}, {}, "not comparable: global batch 8192, published with 65536"),
        ({}, {"platform": "dgx-h100"}, "nothing published for phase 1 on 4 x dgx-h100 with 8 GPUs each"),
        ({"world_size": 24}, {"nodes": 3}, "nothing published for phase 1 on 3 x dgx-a100-80g with 8 GPUs each"),
        ({}, {"platform": "abacus"}, "platform abacus is not in the matrix"),
        ({"world_size": 7}, {}, "hardware unknown: no run.json of a phase 1 job with 7 ranks beside the log"),
        ({"phase": 2}, {}, "hardware unknown: no run.json of a phase 2 job with 32 ranks beside the log"),
    ],
)
def test_what_differs_gets_a_reason_and_no_ratio(tmp_path, matrix, logged, row, why):
    attempt(tmp_path, [1.0] * 3 + [18000.0], **logged)
    run_json(tmp_path, {**A100, **row})
    (line,) = compare(measured([tmp_path]), matrix)
    assert (line.why, line.ratio, line.published, line.source) == (why, None, None, "")


def test_the_rule_is_that_of_the_matrix(matrix):
    """Whatever row of the matrix is measured as it stands: a ratio exactly where the matrix has a publication."""
    for row in matrix.rows:
        batch = row.global_batch
        settings = measure.Settings(
            row.phase, row.precision, row.phase_recipe.max_seq_length, row.world_size, row.micro_batch, row.accumulation, batch
        )  # fmt: skip
        facts = {"platform": row.platform.name, "nodes": row.nodes, "ranks_per_node": row.ranks}
        (line,) = compare([measure.Measurement("x", facts, settings, 5, 1.0, 1.0, 1.0, 1.0, 0.0, None)], matrix)
        fitting = [one for one in matrix.published_for(row) if one.global_batch in (None, batch)]
        assert (line.published, line.ratio is None) == (fitting[0].sequences_per_second if fitting else None, not fitting), row.name


def test_a_doubtful_publication_is_marked(tmp_path, matrix):
    attempt(tmp_path, [1.0] * 3 + [3089.76], batch_size_per_gpu=16, gradient_accumulation_steps=128)
    run_json(tmp_path, {**A100, "platform": "dgx1-16g", "micro_batch": 16})
    (line,) = compare(measured([tmp_path]), matrix)
    assert line.ratio == 1.0 and line.source.endswith("; contradicts the hours to train printed beside it")


def test_strong_scaling_is_over_the_fewest_gpus_of_the_same_kind(tmp_path, matrix):
    for nodes, rate, precision in ((4, 300.0, "fp16"), (1, 100.0, "fp16"), (2, 150.0, "fp16"), (2, 70.0, "tf32")):
        folder = tmp_path / f"{precision}-{nodes}"
        folder.mkdir()
        attempt(folder, [1.0] * 3 + [rate] * 2, world_size=8 * nodes, precision=precision)
        run_json(folder, {**A100, "nodes": nodes, "precision": precision})
    lines = compare(measured([tmp_path]), matrix)
    assert [(line.measurement.settings.precision, line.nodes, line.scaling, line.efficiency) for line in lines] == [
        ("fp16", 1, 1.0, 1.0),
        ("fp16", 2, pytest.approx(1.5), pytest.approx(0.75)),
        ("fp16", 4, pytest.approx(3.0), pytest.approx(0.75)),
        ("tf32", 2, 1.0, 1.0),
    ]


def test_published_numbers_are_checked_against_published_hours(matrix):
    """FEATURES 2.0: several-node DGX-1 throughput and the same README's hours differ by half."""
    found = {(one.hardware, one.nodes, one.precision, one.sequences_per_second[0]): one for one in check_published(matrix)}
    assert {key[:3] + (round(one.implied_hours, 2), round(one.ratio, 2)) for key, one in found.items() if not one.consistent} == {
        ("DGX-1 16G", 1, "fp16", 219.16, 0.7),
        ("DGX-1 16G", 4, "fp16", 61.79, 0.64),
        ("DGX-1 16G", 16, "fp16", 15.73, 0.66),
    }
    assert round(found["DGX-1 16G", 1, "fp16", 1236.0].ratio, 2) == 0.97  # the newer container's numbers of one node do agree
    agreeing = {key[:3]: round(one.ratio, 2) for key, one in found.items() if one.consistent and key[0] != "DGX-1 16G"}
    assert agreeing == {
        ("DGX-2H 32G", 1, "fp16"): 0.96,
        ("DGX-2H 32G", 4, "fp16"): 0.96,
        ("DGX-2H 32G", 16, "fp16"): 1.01,
        ("DGX-2H 32G", 64, "fp16"): 1.06,
        ("DGX-2H 32G", 64, "fp32"): 1.02,
        ("DGX A100 (8x A100 80GB)", 32, "fp16"): 0.99,
        ("DGX A100 (8x A100 80GB)", 32, "tf32"): 1.02,
    }


# -- showing --------------------------------------------------------------------------------------------------------------

TABLE = """\
| run       | platform     | phase | seq | nodes x GPUs | precision | micro x acc | global batch |   seq/s |       10 % - 90 % | seq/s/GPU | TFLOPS/GPU | published | ratio | scaling | efficiency | source, or why no ratio                                                     |
|:----------|:-------------|------:|----:|-------------:|:----------|------------:|-------------:|--------:|------------------:|----------:|-----------:|----------:|------:|--------:|-----------:|:----------------------------------------------------------------------------|
| a\\x7cb\\nc | ?            |     1 | 128 |       ? x 32 | fp16      |     256 x 8 |        65536 |    50.0 |       50.0 - 50.0 |      1.56 |            |           |       |         |            | hardware unknown: no run.json of a phase 1 job with 32 ranks beside the log |
| run       | dgx-a100-80g |     1 | 128 |        4 x 8 | fp16      |     256 x 8 |        65536 | 18000.0 | 18000.0 - 18000.0 |    562.50 |        135 |     18119 |  0.99 |    1.00 |      100 % | nvidia-readme a07d20a1 (2022-05-25, container 21.11)                        |"""


def test_table(run, matrix):
    hostile = run.parent / "a|b\nc"
    hostile.mkdir()
    attempt(hostile, [1.0] * 3 + [50.0])
    assert as_table(compare(measured([run.parent]), matrix)) == TABLE


def test_work_of_the_model(run, matrix):
    """562.5 sequences/s a GPU of 240.6 GFLOP each; nothing where the model is no longer known."""
    (line,) = compare(measured([run]), matrix)
    assert line.tflops_per_gpu == pytest.approx(562.5 * 0.2406, rel=1e-3)
    for model in ({"config_file": "/gone.json"}, {}, None):
        run_json(run, run=model)
        (line,) = compare(measured([run]), matrix)
        assert line.tflops_per_gpu is None and line.ratio is not None


def test_json_holds_every_field(run, matrix):
    lines = compare(measured([run]), matrix)
    (line,) = json.loads(as_json(lines))
    assert line["measurement"]["settings"] == {
        "phase": 1, "precision": "fp16", "seq_len": 128, "world_size": 32, "micro_batch": 256, "accumulation": 8, "global_batch": 65536,
    }  # fmt: skip
    assert line["measurement"]["row"] == A100 and line["ratio"] == lines[0].ratio and line["published"] == 18119.0


def test_picture(run, matrix, tmp_path):
    pytest.importorskip("matplotlib")
    attempt(run, [1.0] * 3 + [60.0], world_size=16)
    run_json(run, {**A100, "nodes": 2}, "phase1-8.run.json")
    lines = compare(measured([run]), matrix)
    for name, known in (("with.png", matrix), ("without.png", None)):
        draw(lines, tmp_path / name, known)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "with.png", "without.png"]
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw([], tmp_path / "none.png")


def test_a_login_node_needs_nothing_but_yaml():
    heavy = ("torch", "numpy", "h5py", "matplotlib", "tqdm")
    code = f"import sys, berth.launch.report; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
