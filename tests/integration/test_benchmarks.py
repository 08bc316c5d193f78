"""The benchmarks of a GPU session run, compare before they time, and say what went wrong; sizes are tiny, times are not looked at."""

import importlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

from berth.errors import ConfigError, LaunchError, TrainingError
from berth.launch.matrix import load_matrix
from berth.records.reader import SampleStream, open_index
from tests.support import ROOT, environment, run_script, write_records

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_common
import gpu_pretrain
import gpu_suite
import tune

TINY = {
    "vocab_size": 96,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    return path


# -- data ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fill", "length"), [("1.0", 32), ("real", 128), ("real", 24)])
def test_made_rows_are_pretraining_data(fill, length):
    """Lengths as the fill says; masked tokens are real, not special, at most 15 %, and their ids are what stood there."""
    rows = gpu_common.make_rows(400, length, fill, 1000, seed=1)
    lengths = rows.lengths()
    if fill == "1.0":
        assert (lengths == length).all()
    else:
        assert 0.4 < (lengths == length).mean() < 0.6 and lengths.min() >= int(0.52 * length)
        assert lengths.mean() / length == pytest.approx(0.88, abs=0.02)
    for row in range(len(rows)):
        masked = rows.masked_lm_positions[row][rows.masked_lm_positions[row] > 0]
        assert len(masked) == min(gpu_common.predictions_of(length), round(int(lengths[row]) * 0.15))
        assert (np.diff(masked) > 0).all() and masked.max() < lengths[row]
        assert (rows.input_ids[row, masked] == gpu_common.MASK).all() and (rows.masked_lm_ids[row, : len(masked)] >= 500).all()
        assert (rows.input_ids[row] == gpu_common.MASK).sum() == len(masked)
        assert rows.input_ids[row, lengths[row] - 1] == gpu_common.SEP and not rows.input_ids[row, lengths[row] :].any()
    assert gpu_common.predictions_of(128) == 20 and gpu_common.predictions_of(512) == 80


def test_made_rows_can_be_read_back(tmp_path):
    """What is written is what a stream reads, whatever its order."""
    rows = gpu_common.make_rows(50, 32, "real", 96, seed=0)
    gpu_common.write_records(tmp_path / "records", rows)
    index = open_index(tmp_path / "records", "training")
    read = SampleStream(index, 3, 96, shuffle=False).rows(0, 50)
    for name, value in vars(rows).items():
        assert np.array_equal(getattr(read, name), value), name


def test_padded_batches_are_what_the_rows_say():
    """Every label stands at its position, nothing is trimmed, cuts keep the order."""
    rows = gpu_common.make_rows(6, 24, "real", 96, seed=2)
    batches = gpu_common.padded_batches(rows, 4, pin=False)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 2]
    labels = torch.cat([batch["labels"] for batch in batches])
    for row in range(6):
        expected = [-100] * 24
        for at, label in zip(rows.masked_lm_positions[row], rows.masked_lm_ids[row], strict=True):
            if at:
                expected[at] = int(label)
        assert labels[row].tolist() == expected
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for batch in batches for tensor in batch.values())
    assert torch.equal(torch.cat([batch["attention_mask"] for batch in batches]).sum(1), torch.from_numpy(rows.lengths()))


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopA_TNN", "matrix products"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", "attention"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("Memcpy HtoD (Pinned -> Device)", "copies between host and device"),
        ("Memset (Device)", "memory on the device"),
        ("triton_red_fused_native_layer_norm_3", "compiled kernels"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "element by element"),
        ("aten::addmm", "matrix products"),
        ("something new", "other"),
    ],
)
def test_kernels_are_grouped_by_what_they_do(kernel, group):
    assert gpu_common.group_of(kernel) == group


# -- whole steps -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seq", "8"], "--seq 8: must be at least 16"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--dropout", "1"], "--dropout 1.0"),
        (["--peer", "none", "hf"], "--peer none: excludes other peers"),
        (["--records", "nowhere"], "--records nowhere: does not exist"),
        (["--fill", "0.5"], "invalid choice"),
        (["--precision", "int8"], "invalid choice"),
    ],
)
def test_wrong_arguments_of_gpu_pretrain_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit) as left:
        gpu_pretrain.parse_args(arguments)
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_models_that_do_not_fit_are_refused(config):
    with pytest.raises(ConfigError, match="neither one of tiny"):
        gpu_common.load_sizes("huge", 128, dropout=0.1)
    with pytest.raises(ConfigError, match="has 64 positions"):
        gpu_common.load_sizes(str(config), 128, dropout=0.1)
    sizes = gpu_common.load_sizes("large", 128, dropout=0.1, layers=3)
    assert (sizes["num_hidden_layers"], sizes["vocab_size"], sizes["hidden_dropout_prob"]) == (3, 30528, 0.1)


def arguments(config, output, *more):
    words = [
        "--model",
        config,
        "--seq",
        32,
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--threads",
        1,
        "--micro_batch",
        4,
        "--output",
        output,
    ]
    return [str(word) for word in (*words, *more)]


@pytest.mark.slow
def test_whole_steps_are_compared_timed_and_written(config, tmp_path):
    """Two fills, two of berth's sides and a peer: the table, and the JSON that the suite and the tuner read."""
    output = tmp_path / "found.json"
    words = arguments(
        config, output, "--fill", "1.0", "real", "--peer", "hf", "--sides", "berth", "berth-plain", "--rounds", 2, "--steps", 2,
        "--accumulation", 2, "--profile",
    )  # fmt: skip
    done = run_script("benchmarks/gpu_pretrain.py", *words)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["complete"] and report["failed"] == {} and report["parameters"] > 0
    assert report["batch"] == {"micro_batch": 4, "accumulation": 2, "sequences": 8}
    assert {"torch", "transformers", "cpu", "date"} <= report["machine"].keys()
    ours, theirs = report["check"]["sides"]["berth"], report["check"]["sides"]["hf"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5) and ours["losses"][-1] < ours["losses"][0]
    assert set(report["results"]) == {"1.0", "real"}
    for fill, result in report["results"].items():
        assert list(result["sides"]) == ["berth", "berth-plain", "hf"] and result["speedup_to"] == "hf" and result["rounds"] == 2
        assert result["fill"] == 1 if fill == "1.0" else 0.7 < result["fill"] < 1
        for side in result["sides"].values():
            assert len(side["seconds_per_step"]) == 2 and side["skipped_steps"] == 0
            middle = statistics.median(side["seconds_per_step"])
            assert side["sequences_per_second"] == pytest.approx(8 / middle)
            assert side["tokens_per_second"] == pytest.approx(side["sequences_per_second"] * 32 * result["fill"])
            assert side["share_of_ceiling"] == pytest.approx(side["tflops"] / result["ceiling_tflops"])
            full = side["full_length_sequences_per_second"]
            assert full == pytest.approx(side["sequences_per_second"], rel=0.02) if fill == "1.0" else full < side["sequences_per_second"]
        assert result["sides"]["hf"]["speedup"] == 1
    assert "--unpad off" in " ".join(report["commands"]["berth-plain"]) and "--unpad off" not in " ".join(report["commands"]["berth"])
    assert "<work>/timed.json" in report["commands"]["berth"] and str(tmp_path) not in json.dumps(report)
    assert report["profile"]["groups"] and report["profile"]["busy_us"] > 0
    assert "berth-plain" in done.stdout and "of them idle" in done.stdout


def test_records_are_read_while_training(config, tmp_path, monkeypatch):
    """The samples of a step are those of the run's stream on both sides, also where records are read by the thread."""
    write_records(tmp_path / "records" / "a_training_0.hdf5", 40, seed=1)
    args = gpu_pretrain.parse_args(
        arguments(config, tmp_path / "o.json", "--records", str(tmp_path / "records"), "--peer", "hf", "--rounds", "1")
    )
    plan = gpu_pretrain.make_plan(args, tmp_path)
    path, sizes = gpu_pretrain.write_sizes(plan, "timed", dropout=0.0)
    side = gpu_common.BerthSide("berth", plan.command("berth", path, plan.folders["records"], micro_batch=4, accumulation=2), plan.pool)
    peer = gpu_common.PeerSide("hf", side, sizes, compiled=False)
    try:
        assert plan.pool == 0
        for _ in range(6):  # more than an epoch
            peer.prepare(1)
            (batches,) = peer.ready.values()
            batch, _ = side.step()
            peer.step()
            assert sum(int(each["attention_mask"].sum()) for each in batches) == batch.tokens
            assert sum(int((each["labels"] != -100).sum()) for each in batches) == batch.masked
    finally:
        side.close()


def test_sides_that_differ_are_not_timed(config, tmp_path, monkeypatch):
    """One bias of one layer is enough: the comparison before the timing refuses, and names the side and the numbers."""

    class Other(gpu_common.PeerSide):
        def __init__(self, *positional, **named):
            super().__init__(*positional, **named)
            with torch.no_grad():
                self.model.bert.encoder.layer[1].output.LayerNorm.bias += 0.05

    args = gpu_pretrain.parse_args(arguments(config, tmp_path / "o.json", "--peer", "hf", "--steps", "1"))
    plan = gpu_pretrain.make_plan(args, tmp_path)
    gpu_pretrain.check_sides(plan)
    monkeypatch.setattr(gpu_pretrain, "PeerSide", Other)
    with pytest.raises(TrainingError, match="berth and transformers do not compute the same: .* of step 1 are"):
        gpu_pretrain.check_sides(plan)


def test_gradients_that_differ_or_are_not_finite_are_seen():
    """Equal losses do not excuse a gradient norm; NaN is never within a tolerance."""
    good = {"losses": [2.0, 1.5], "grad_norms": [1.0, 1.0]}
    found = {"sides": {"hf": good, "berth": good}, "tolerances": (1e-3, 1e-2)}
    gpu_pretrain.compare(found, "berth")
    for wrong in ({**good, "grad_norms": [1.0, 1.02]}, {**good, "losses": [2.0, float("nan")]}):
        with pytest.raises(TrainingError, match="step 2"):
            gpu_pretrain.compare({**found, "sides": {"hf": good, "berth": wrong}}, "berth")


@pytest.mark.parametrize(
    ("graphs", "said"),
    [(None, None), ((2, False), {"recorded": 2, "failed": False}), ((0, False), "nothing was recorded"), ((0, True), "recording failed")],
)
def test_a_side_that_was_to_be_recorded_and_was_not_is_not_timed(graphs, said):
    class Graphs:
        def __init__(self, count, failed):
            self.count, self.failed = count, failed

        def __len__(self):
            return self.count

    side = types.SimpleNamespace(name="berth", run=types.SimpleNamespace(step=types.SimpleNamespace(graphs=graphs and Graphs(*graphs))))
    if not isinstance(said, str):
        assert gpu_pretrain.recorded(side) == said
        return
    with pytest.raises(TrainingError, match=f"berth --cuda_graphs: {said}"):
        gpu_pretrain.recorded(side)


def test_ceilings_are_numbers_of_the_device():
    device = torch.device("cpu")
    before = torch.get_float32_matmul_precision()
    assert gpu_common.matmul_tflops(device, "tf32", 64, repeats=2) > 0 and gpu_common.matmul_tflops(device, "bf16", 64, repeats=2) > 0
    assert torch.get_float32_matmul_precision() == before
    assert gpu_common.copy_gbps(device, 1, repeats=2) > 0


# -- parts by themselves ----------------------------------------------------------------------------------------------------------------

ALONE = ("attention", "cross_entropy", "gpu_lamb", "cpu_step", "fp8_curve", "data_wait")


def usage_error(script, arguments, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(script).parse_args([str(word) for word in arguments])
    assert left.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("scripts", "arguments", "said"),
    [
        (ALONE[:3], ["--device", "foo"], "argument --device: invalid choice"),
        (ALONE[:4], ["--rounds", "0"], "--rounds 0: must be at least 1"),
        (ALONE[:5], ["--threads", "0"], "--threads 0: must be at least 1"),
        (["cross_entropy"], ["--rows", "16", "0"], "--rows 0: must be at least 1"),
        (["cpu_step"], ["--seed", "-1"], "--seed -1: must be at least 0"),
        (["data_wait"], ["--records", "nowhere"], "--records nowhere: does not exist; give a folder"),
        (["data_wait"], ["--records", ROOT, "--num_workers", "-1"], "--num_workers -1: must be at least 0"),
        (["data_wait"], ["--records", ROOT, "--rates", "0"], "--rates and --seconds must be positive"),
    ],
)
def test_wrong_arguments_of_the_others_are_named(scripts, arguments, said, capsys):
    for script in scripts:
        assert said in usage_error(script, arguments, capsys), script


def test_a_gpu_that_is_not_there_is_a_usage_error(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for script in ALONE[:3]:
        assert "--device cuda: torch finds no GPU here; use --device cpu" in usage_error(script, ["--device", "cuda"], capsys)


def test_defaults_in_the_help_are_no_paths_of_a_machine(capsys, monkeypatch):
    """As seen from the folder where the user is; and they are where the results of the project lie."""
    monkeypatch.chdir(ROOT)
    for script in ALONE:
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse_args(["--help"])
        shown = re.sub(r"\s+", "", capsys.readouterr().out)
        assert str(ROOT) not in shown and "benchmarks/results/" in shown, script


# -- the tuner -------------------------------------------------------------------------------------------------------------------------


def fake(rate, log=None):
    """A measurement by a formula; 0 means out of memory."""

    def measure(candidate):
        if log is not None:
            log.append(candidate)
        found = rate(candidate.micro_batch, dict(candidate.options))
        details = {"sequences_per_second": found / 100, "tflops": 1.0, "peak_gib": None}
        return tune.Outcome(candidate, found, "" if found else "out of memory", details if found else {})

    return measure


def search_with(rate, sizes=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 192), first=4, switches=None, time_left=lambda: True):
    log = []
    switches = tune.SWITCHES["cuda"] if switches is None else switches
    return tune.Search(fake(rate, log), list(sizes), first, switches, time_left), log


def test_the_search_finds_the_best_and_tries_nothing_twice():
    """Throughput rises to 48 and falls; memory ends at 96; graphs help, layers help less; packing off would hurt."""

    def rate(size, options):
        if size >= 96:
            return 0.0
        gain = {"layers": 1.1, "off": 0.7, None: 1.0}[options.get("compile")]
        gain *= 1.2 if options.get("cuda_graphs") else 1.0
        gain *= 0.8 if options.get("unpad") == "off" else 1.0
        return gain * (1000 - abs(size - 48))

    search, log = search_with(rate)
    assert search.run()
    assert search.best.candidate == tune.Candidate(48, (("compile", "layers"), ("cuda_graphs", True)))
    assert len(log) == len(set(log))
    assert [candidate.micro_batch for candidate in log[:5]] == [4, 8, 16, 32, 64]


def test_a_bump_in_noise_does_not_become_a_switch():
    """A switch must gain more than half a per cent, in the search and in the play-off."""
    search, _ = search_with(lambda size, options: 1000.0 + (4 if options.get("fused_loss") else 0) - abs(size - 8))
    assert search.run()
    assert search.best.candidate == tune.Candidate(8)
    assert not [one for one in search.outcomes if one.options and one.micro_batch != 8]
    rates = tune.play_off(search, search.measure, 1)
    assert [str(candidate) for candidate in rates] == ["micro-batch 8", "micro-batch 8 --fused_loss off"]
    assert tune.winner(rates) == tune.Candidate(8)
    assert tune.winner({tune.Candidate(4): [10.0, 9.0, 11.0], tune.Candidate(8): [10.5, 10.1, 99.0]}) == tune.Candidate(8)


@pytest.mark.parametrize("rate", [lambda size, options: 0.0, lambda size, options: 1.0 if size == 4 else 0.0])
def test_memory_that_ends_at_once_ends_the_search(rate):
    """No candidate, or a single size that runs, is an outcome and no crash."""
    search, _ = search_with(rate)
    assert search.run()
    assert search.best is None or search.best.candidate.micro_batch == 4


def test_growing_stops_after_two_falls():
    search, _ = search_with(lambda size, options: 100.0 / size, switches={})
    list(search.grow())
    assert [candidate.micro_batch for candidate in search.outcomes] == [4, 8, 16]


def test_no_candidate_begins_when_time_is_up():
    ticks = iter([True, True, False])
    search, log = search_with(lambda size, options: float(size), time_left=lambda: next(ticks, False))
    assert not search.run() and len(log) == 2
    assert tune.play_off(search, search.measure, 3).keys() == {tune.Candidate(4), tune.Candidate(8)}


def test_the_play_off_lets_the_best_two_take_turns():
    rates = {4: 10.0, 8: 12.0, 16: 11.0}
    search, log = search_with(lambda size, options: rates[size], sizes=(4, 8, 16), switches={})
    search.run()
    log.clear()
    found = tune.play_off(search, search.measure, 2)
    assert [candidate.micro_batch for candidate in log] == [8, 16, 8, 16]
    assert {candidate.micro_batch: len(listed) for candidate, listed in found.items()} == {8: 3, 16: 3}


def test_sizes_are_divisors_and_double():
    assert tune.divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36] and tune.divisors(1) == [1]
    assert tune.doublings([1, 2, 3, 4, 6, 9, 12, 18, 36], 3) == [3, 6, 12, 36]
    assert tune.doublings([1, 2], 8) == [2]


def tune_arguments(output, *more):
    return tune.parse_args([str(word) for word in ("--platform", "dgx-h200", "--output", output, *more)])


@pytest.mark.parametrize(("phase", "recipe"), [(1, "lamb"), (2, "lamb"), (1, "adamw")])
def test_the_row_is_one_the_launcher_reads(phase, recipe, tmp_path):
    """The printed group, put into a matrix file, gives the micro-batch and the switches that were found, ``off`` as a word and not as a truth value."""
    matrix = load_matrix()
    args = tune_arguments(tmp_path / "t.json", "--phase", phase, "--recipe", recipe)
    known = {row.micro_batch for row in matrix.rows if row.platform.name == "dgx-h200" and row.phase == phase}
    most = tune.base_row(args, matrix).train_batch_size // 2  # with one micro-batch a step nothing is recorded
    size = next(size for size in (32, 16, 8, 4, 2) if size not in known and size <= most)
    best = (("compile", "off"), ("cuda_graphs", True))
    report = tune.tune(
        args,
        matrix,
        fake(lambda each, options: 100.0 + 50 * (each == size) + 40 * sum((name, value) in best for name, value in options.items())),
    )
    assert report["complete"] and report["replaces"] == ""
    (tmp_path / "more.yml").write_text("rows:\n" + report["entry"], encoding="utf-8")
    (row,) = [row for row in load_matrix(extra=[tmp_path / "more.yml"]).rows if row not in matrix.rows]
    assert (row.platform.name, row.phase, row.micro_batch, row.recipe.name) == ("dgx-h200", phase, size, recipe)
    assert dict(row.options) == dict(best)
    written = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert written["best"]["micro_batch"] == size and len(written["candidates"]) >= 5


def test_several_processes_are_tuned_with_what_they_can_use(tmp_path):
    """Layer by layer is how they compile, so that only off is tried; no graphs with one micro-batch a step, or with padded batches."""
    row = tune.base_row(tune_arguments(tmp_path / "t.json"), load_matrix())
    alone = tune.base_row(tune_arguments(tmp_path / "t.json", "--ranks_per_node", 1), load_matrix())
    assert row.world_size > 1 == alone.world_size
    assert tune.switches_of(row)["compile"] == ("off",) and tune.switches_of(alone) == tune.SWITCHES["cuda"]
    graphs, whole = (("cuda_graphs", True),), row.train_batch_size
    assert tune.possible(row, tune.Candidate(whole // 2, graphs)) and tune.possible(row, tune.Candidate(whole))
    assert not tune.possible(row, tune.Candidate(whole, graphs)) and tune.possible(alone, tune.Candidate(alone.train_batch_size, graphs))
    assert not tune.possible(row, tune.Candidate(1, (*graphs, ("unpad", "off"))))
    search, log = search_with(lambda size, options: size + bool(options), sizes=(4, 8), switches={"cuda_graphs": (True,)})
    search.possible = lambda candidate: candidate.micro_batch < 8 or not candidate.options
    assert search.run() and log == [tune.Candidate(4), tune.Candidate(8)]


@pytest.mark.parametrize(("ranks", "told"), [(None, ["--compile layers", "--compile off"]), (1, ["", "--compile off"])])
def test_a_candidate_of_several_processes_is_compiled_as_they_are(ranks, told, tmp_path):
    args = tune_arguments(tmp_path / "t.json", *([] if ranks is None else ["--ranks_per_node", ranks]))
    args.sequences, row = 64, tune.base_row(args, load_matrix())
    program = [sys.executable, "-c", "import sys; print(sys.argv[-1]); raise SystemExit(3)"]
    for options, said in zip(((), (("compile", "off"),)), told, strict=True):
        outcome = tune.measure_in_process(tune.Candidate(8, options), args, row, program, 60)
        assert outcome.note == f"exit code 3: --run_options={said}"


def test_the_report_of_the_tuner_names_no_folder(tmp_path):
    (tmp_path / "more.yml").write_text("rows: []\n", encoding="utf-8")
    args = tune_arguments(tmp_path / "t.json", "--matrix", tmp_path / "more.yml", "--model", tmp_path / "sizes.json")
    report = tune.tune(args, load_matrix(), fake(lambda size, options: 1.0))
    assert report["options"]["matrix"] == ["more.yml"] and report["options"]["model"] == "sizes.json"
    assert str(tmp_path) not in (tmp_path / "t.json").read_text(encoding="utf-8")


def test_a_row_that_is_there_already_is_named(tmp_path):
    matrix = load_matrix()
    there = next(
        row for row in matrix.rows if row.platform.name == "dgx-a100-80g" and row.nodes == 1 and row.phase == 1 and row.precision == "fp16"
    )
    args = tune.parse_args(["--platform", "dgx-a100-80g", "--precision", "fp16", "--output", str(tmp_path / "t.json"), "--finals", "0"])
    report = tune.tune(args, matrix, fake(lambda size, options: 1000.0 - abs(size - there.micro_batch) if not options else 1.0))
    assert report["replaces"] == there.name and f"micro_batch: {there.micro_batch}" in report["entry"]


def test_the_tuner_says_what_is_wrong(tmp_path, capsys):
    matrix = load_matrix()
    with pytest.raises(ConfigError, match="platform 'dgx-h2000' is not known"):
        tune.tune(tune.parse_args(["--platform", "dgx-h2000"]), matrix)
    with pytest.raises(ConfigError, match="has no precision"):
        tune.tune(tune.parse_args(["--platform", "dgx1-16g", "--precision", "bf16"]), matrix)
    with pytest.raises(LaunchError, match=r"no candidate ran \(micro-batch 8: out of memory\)"):
        tune.tune(tune_arguments(tmp_path / "t.json"), matrix, fake(lambda size, options: 0.0))
    for words, said in (["--minutes", "0"], "--minutes 0.0: must be positive"), (["--first", "0"], "--first 0: must be at least 1"):
        with pytest.raises(SystemExit) as left:
            tune.parse_args(["--platform", "local", *words])
        assert left.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "note"),
    [
        ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", "out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal SIGKILL"),
        ("import time; time.sleep(60)", "longer than 2 s"),
        ("print('broken'); raise SystemExit(3)", "exit code 3: broken"),
        ("raise SystemExit(4)", "exit code 4"),
    ],
)
def test_a_candidate_that_fails_is_an_outcome(body, note, tmp_path):
    """Whatever ends the process, the search goes on with a line that says so."""
    args = tune_arguments(tmp_path / "t.json", "--sequences", 16)
    row = tune.base_row(args, load_matrix())
    outcome = tune.measure_in_process(tune.Candidate(8), args, row, [sys.executable, "-c", body], 2.0)
    assert (outcome.tokens_per_second, outcome.note) == (0.0, note)


@pytest.mark.slow
def test_a_candidate_is_measured_by_whole_steps(config, tmp_path):
    """The command as a user types it, on a CPU, with one size and no switch."""
    extra = tmp_path / "recipe.yml"
    extra.write_text(
        "recipes:\n  short:\n    based_on: lamb\n    title: short\n    source: test\n    phases:\n      1: {max_seq_length: 32, "
        "max_predictions_per_seq: 5, global_batch: 2}\n",
        encoding="utf-8",
    )
    words = ("--platform", "local", "--recipe", "short", "--matrix", extra, "--model", config, "--first", 2, "--switches", "--finals", 0)
    more = ("--sequences", 2, "--rounds", 1, "--steps", 1, "--threads", 1, "--output", tmp_path / "t.json")
    done = run_script("benchmarks/tune.py", *words, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert [candidate["micro_batch"] for candidate in report["candidates"]] == [2, 1]
    assert all(candidate["tokens_per_second"] > 0 and candidate["fast_path"] for candidate in report["candidates"])
    assert "recipe: short" in report["entry"] and report["complete"] and "platform: local" in done.stdout


# -- the suite -------------------------------------------------------------------------------------------------------------------------


def part(name, body, limit=30.0, output=""):
    return gpu_suite.Part(name, (sys.executable, "-c", body), limit, output)


def test_the_suite_goes_on_after_a_failure_and_keeps_what_is_there(tmp_path):
    """A part that fails, one that is too slow (its JSON so far is kept), and one for which no time is left, are told apart."""
    wrote = f"import json, time; json.dump({{'x': 1}}, open({str(tmp_path / 'slow.json')!r}, 'w')); time.sleep(60)"
    wanted = [
        part("good", "print('fine')"),
        part("bad", "print('the reason'); raise SystemExit(3)"),
        part("slow", wrote, limit=3.0, output="slow.json"),
    ]
    report = gpu_suite.run_all(wanted, tmp_path, minutes=1)
    ended = {name: entry["status"] for name, entry in report["parts"].items()}
    assert ended == {"good": "done", "bad": "exit code 3", "slow": "stopped after 3 s"}
    assert report["parts"]["slow"]["json"] == {"x": 1} and report["complete"]
    assert json.loads((tmp_path / "suite.json").read_text(encoding="utf-8")) == report
    page = (tmp_path / "suite.md").read_text(encoding="utf-8")
    assert "the reason" in page and "| slow | stopped after 3 s |" in page
    late = gpu_suite.run_all(wanted[:1], tmp_path, minutes=1e-6)
    assert late["parts"]["good"]["status"] == "no time left"


def test_what_a_part_says_names_no_folder_of_this_machine(tmp_path):
    found = gpu_suite.run_part(part("says", f"print({str(tmp_path / 'x')!r}, {str(ROOT / 'modeling.py')!r})"), tmp_path, 30)
    assert found["said"] == ["<out>/x ./modeling.py"]


def test_a_part_whose_time_is_up_says_what_it_has_found(tmp_path, monkeypatch):
    """Interrupted first, as pytest wants it to print failures; killed when it takes no notice."""
    monkeypatch.setattr(gpu_suite, "GRACE", 1.0)
    says = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('three failures')"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    for body, said in ((says, "three failures"), (deaf, "deaf")):
        found = gpu_suite.run_part(
            part("late", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{body}"), tmp_path, 2
        )
        assert found["status"] == "stopped after 2 s" and found["said"][-1] == said and found["seconds"] < 30


def test_a_suite_that_is_stopped_ends_its_part_and_keeps_the_others(tmp_path):
    """SIGTERM (a job's time limit): no process is left behind, suite.json holds what was done."""
    program = f"""
import sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT)!r}]
import gpu_suite
def part(name, body):
    return gpu_suite.Part(name, (sys.executable, "-c", body), 120.0)
gpu_suite.parts = lambda out, **_: [part("first", ""), part("long", "import os, time; print(os.getpid(), flush=True); time.sleep(120)")]
gpu_suite.run_main(gpu_suite.main)
"""
    running = subprocess.Popen([sys.executable, "-c", program, "--out", str(tmp_path)], env=environment(), stdout=subprocess.DEVNULL)
    end, log = time.monotonic() + 60, tmp_path / "long.log"
    while time.monotonic() < end and not (log.exists() and log.read_text(encoding="utf-8").strip()):
        time.sleep(0.05)
    process = int(log.read_text(encoding="utf-8"))
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    report = json.loads((tmp_path / "suite.json").read_text(encoding="utf-8"))
    assert report["parts"]["first"]["status"] == "done" and not report["complete"]


def test_the_suite_describes_the_machine_and_its_ceilings(tmp_path):
    """Two real parts at tiny sizes; fp8 may be missing on a device, the others are numbers."""
    done = run_script("benchmarks/gpu_suite.py", "--out", tmp_path, "--smoke", "--device", "cpu", "--only", "machine", "ceilings")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "suite.json").read_text(encoding="utf-8"))["parts"]
    assert parts["machine"]["json"]["torch"] == torch.__version__
    found = parts["ceilings"]["json"]
    assert {"bf16", "fp16", "tf32", "fp32"} <= found["matmul_tflops"].keys() and found["copy_gbps"] > 0
    assert "| copy |" in (tmp_path / "suite.md").read_text(encoding="utf-8")


def test_the_page_shows_whole_steps_and_kernel_groups():
    """What a session is run for stands on the page: rates, share of the ceiling, speed-up, where the time goes."""
    side = {
        "sequences_per_second": 1500.0, "tokens_per_second": 192000.0, "tflops": 400.0, "share_of_ceiling": 0.5,
        "full_length_sequences_per_second": 1490.0, "peak_gib": {"tensors": 20.0, "reserved": 24.0}, "speedup": 1.7,
    }  # fmt: skip
    found = {
        "options": {"model": "large", "seq": 128, "precision": "bf16"},
        "results": {"1.0": {"fill": 1.0, "sides": {"berth": side}}},
        "profile": {
            "side": "berth",
            "wall_us": 1000.0,
            "idle_us": 20.0,
            "groups": {"attention": {"us": 300.0, "share": 0.3, "calls": 24.0}},
        },
    }
    page = gpu_suite.page({"parts": {"pretrain_128": {"status": "done", "seconds": 1.0, "said": [], "json": found}}})
    assert "| 1.000 | berth | 1500.0 | 192000 | 400 | 50.0% | 1490.0 | 24.0 | 1.70 |" in page
    assert "| attention | 300 | 30.0% | 24 |" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cpu"], "add --smoke"),
        (["--minutes", "0"], "must be positive"),
        (["--only", "nothing"], "no such part; there are machine"),
    ],
)
def test_wrong_arguments_of_the_suite_are_named(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        gpu_suite.main(["--out", str(tmp_path), *words])
    assert left.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_every_part_of_the_suite_is_a_command_that_exists(tmp_path):
    """Scripts exist and know the options they are given, at a GPU's sizes and at those of the smoke run."""
    commands = [
        each.argv
        for smoke in (False, True)
        for each in gpu_suite.parts(tmp_path, smoke=smoke, model="large", precision="bf16", device="cuda")
        if each.argv[1].endswith(".py")
    ]
    helps = {script: run_script(os.path.relpath(script, ROOT), "--help").stdout for script in {argv[1] for argv in commands}}
    for argv in commands:
        for flag in (word for word in argv if word.startswith("--") and word != "--part"):
            assert flag in helps[argv[1]], f"{argv[1]} has no {flag}"


def test_commands_of_the_readme_name_scripts_and_options_that_exist():
    """Every line of its bash blocks; options stand in the scripts as strings."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"), re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert len(lines) >= 6
    for line in lines:
        script, *words = [word for word in line.split() if word.endswith(".py") or word.startswith("--")]
        text = (ROOT / script).read_text(encoding="utf-8")
        for flag in words:
            assert f'"{flag.partition("=")[0]}"' in text, f"{script} has no {flag}"
