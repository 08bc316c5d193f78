"""run_pretraining.py as its user runs it: resume, kill, Ctrl-C, several processes, and what bad input gets."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from berth.kernels import fp8
from berth.runlog import read_records, read_steps
from tests.support import ROOT, environment, finish, launch, make_project, pretraining_arguments, run_script, wait_for_step, write_records


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path)


def pretrain(project, output="out", expect=0, **changes):
    done = run_script("run_pretraining.py", *pretraining_arguments(project, output, **changes))
    assert done.returncode == expect, done.stderr
    return done


def start(project, output="out", **changes):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run_pretraining.py"), *pretraining_arguments(project, output, **changes)],
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same_weights(one, other):
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def curve(path):
    """What must be equal between an interrupted and an uninterrupted run, step by step."""
    keys = ("average_loss", "learning_rate", "grad_norm", "first_sample", "batch_crc32")
    return {step: tuple(data[key] for key in keys) for step, data in read_steps(path).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Phase 1 and phase 2 in one folder, uninterrupted."""
    project = make_project(tmp_path_factory.mktemp("whole"))
    pretrain(project, eval_dir=project / "records")
    pretrain(project, phase2=True, resume_from_checkpoint=True, max_steps=10, learning_rate=4e-3, eval_dir=project / "records")
    return project


def test_both_phases(whole):
    names = sorted(path.name for path in (whole / "out").glob("*.pt"))
    assert "ckpt_24.pt" in names and "ckpt_34.pt" in names  # pinned phase 1 end; phase 2 counts on from it
    steps = read_steps(whole / "out" / "dllogger.json")
    assert list(steps) == list(range(1, 35))
    assert steps[24]["learning_rate"] == 0.0 and steps[34]["learning_rate"] == 0.0
    assert steps[2]["learning_rate"] == pytest.approx(1e-2 * (2 / 24) / 0.1)
    assert steps[24]["average_loss"] < steps[1]["average_loss"]
    evaluations = [r["data"] for r in read_records(whole / "out" / "dllogger.json") if "evaluation" in r.get("data", {})]
    assert [e["evaluation"] for e in evaluations] == ["start", "end", "start", "end"]
    assert evaluations[1]["mlm_loss"] == pytest.approx(evaluations[2]["mlm_loss"])  # phase 2 starts with phase 1's weights
    payload = torch.load(whole / "out" / "ckpt_34.pt", weights_only=True)
    assert (payload["step"], payload["phase"], payload["phase_step"], payload["final"]) == (34, 2, 10, True)
    assert payload["optimizer"]["param_groups"][0]["step"] == 10  # bias correction starts again in phase 2


def test_a_finished_phase_is_left_alone(whole):
    before = (whole / "out" / "ckpt_34.pt").read_bytes()
    done = pretrain(whole, phase2=True, resume_from_checkpoint=True, max_steps=10, learning_rate=4e-3)
    assert "already complete" in done.stderr and "nan" not in done.stderr
    done = pretrain(whole, resume_from_checkpoint=True)
    assert "phase 1 was already complete" in done.stderr
    assert (whole / "out" / "ckpt_34.pt").read_bytes() == before


def test_stopping_and_resuming_is_bitwise_the_same(whole, project):
    pretrain(project, steps_this_run=7)
    assert (project / "out" / "ckpt_7.pt").exists()
    pretrain(project, steps_this_run=6, resume_from_checkpoint=True, num_workers=0)
    pretrain(project, resume_from_checkpoint=True)
    assert_same_weights(project / "out" / "ckpt_24.pt", whole / "out" / "ckpt_24.pt")
    expected = {step: row for step, row in curve(whole / "out" / "dllogger.json").items() if step <= 24}
    assert curve(project / "out" / "dllogger.json") == expected


@pytest.mark.slow
def test_kill_nine_at_random_moments_of_both_phases(whole, project):
    """Six kills, some while a checkpoint is being written; the end is bitwise the uninterrupted run's."""
    rng = random.Random(20261121)
    log = project / "out" / "dllogger.json"
    phases = ({"max_steps": 24}, {"max_steps": 10, "phase2": True, "learning_rate": 4e-3})
    for phase, (options, targets) in enumerate(zip(phases, ((2, 9, 17), (26, 28, 31)), strict=True), 1):
        for target in targets:
            process = start(project, resume_from_checkpoint=True, num_steps_per_checkpoint=2, **options)
            wait_for_step(log, target, process)
            time.sleep(rng.random() * 0.03)
            process.kill()
            process.wait()
            process.stderr.close()
        pretrain(project, resume_from_checkpoint=True, num_steps_per_checkpoint=2, **options)
        assert (project / "out" / f"ckpt_{24 if phase == 1 else 34}.pt").exists()
    assert_same_weights(project / "out" / "ckpt_34.pt", whole / "out" / "ckpt_34.pt")
    assert curve(log) == curve(whole / "out" / "dllogger.json")
    # within each attempt the global step goes up by one, and no attempt starts further on than one past a checkpoint
    attempts: dict[int, list[int]] = {}
    for record in read_records(log):
        if "average_loss" in record.get("data", {}):
            attempts.setdefault(record["attempt"], []).append(record["step"][1])
    assert len(attempts) >= 7
    for steps in attempts.values():
        assert steps == list(range(steps[0], steps[0] + len(steps)))
    starts = [steps[0] for steps in attempts.values()]
    reached = [steps[-1] for steps in attempts.values()]
    assert all(begin <= end + 1 and end + 1 - begin <= 2 for begin, end in zip(starts[1:], reached[:-1], strict=True))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_leave(whole, project, number, code):
    process = start(project, max_steps=24)
    wait_for_step(project / "out" / "dllogger.json", 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "stopped by a signal" in errors
    reached = max(read_steps(project / "out" / "dllogger.json"))
    assert (project / "out" / f"ckpt_{reached}.pt").exists()
    pretrain(project, resume_from_checkpoint=True)
    assert_same_weights(project / "out" / "ckpt_24.pt", whole / "out" / "ckpt_24.pt")


def test_a_damaged_checkpoint_costs_only_its_steps(whole, project):
    pretrain(project, steps_this_run=12)
    path = project / "out" / "ckpt_12.pt"
    path.write_bytes(path.read_bytes()[:-50])
    done = pretrain(project, resume_from_checkpoint=True)
    assert "WARNING" in done.stderr and "ckpt_12.pt" in done.stderr and "continuing phase 1 from ckpt_10.pt" in done.stderr
    assert_same_weights(project / "out" / "ckpt_24.pt", whole / "out" / "ckpt_24.pt")


def test_the_command_line_rules_on_entering_phase2(whole, project):
    """Moments come from phase 1, the recipe from this command line."""
    pretrain(project, max_steps=3)
    pretrain(project, max_steps=3, phase2=True, resume_from_checkpoint=True, weight_decay=0.2)
    groups = torch.load(project / "out" / "ckpt_6.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]


def test_phase2_never_starts_over_phase1(whole, project):
    pretrain(project, max_steps=4)
    before = (project / "out" / "ckpt_4.pt").read_bytes()
    done = pretrain(project, expect=2, max_steps=4, phase2=True, resume_from_checkpoint=True, init_checkpoint=whole / "out" / "ckpt_24.pt")
    assert "holds another phase" in done.stderr and (project / "out" / "ckpt_4.pt").read_bytes() == before


def test_checkpoints_of_other_programs_and_ruins_are_not_trained_over(project):
    (project / "out").mkdir()
    (project / "out" / "ckpt_7038.pt").write_bytes(b"PK something else")
    assert "already holds a run (ckpt_7038.pt)" in pretrain(project, expect=2).stderr
    assert "none of it can be resumed" in pretrain(project, expect=1, resume_from_checkpoint=True).stderr
    assert (project / "out" / "ckpt_7038.pt").read_bytes() == b"PK something else"


def test_two_runs_never_share_a_folder(project):
    """The second waits for the lock; when the first one dies it goes on from its checkpoint."""
    first = start(project, max_steps=4000, num_steps_per_checkpoint=50, learning_rate=1e-4)
    wait_for_step(project / "out" / "dllogger.json", 60, first)
    second = start(project, max_steps=4000, num_steps_per_checkpoint=50, learning_rate=1e-4, resume_from_checkpoint=True, steps_this_run=3)
    time.sleep(3)
    assert second.poll() is None
    first.kill()
    first.communicate()
    _, errors = second.communicate(timeout=90)
    assert second.returncode == 0 and "continuing phase 1 from ckpt_" in errors, errors
    attempts = [record["attempt"] for record in read_records(project / "out" / "dllogger.json")]
    assert attempts == sorted(attempts)


def test_skipped_steps_do_not_poison_the_log(project):
    done = pretrain(project, precision="fp16", init_loss_scale=2.0**40, max_steps=6, learning_rate=1e-4)
    steps = read_steps(project / "out" / "dllogger.json")
    assert "skipped" in done.stderr and list(steps) == [1, 2, 3, 4, 5, 6]
    assert all(data["average_loss"] == data["average_loss"] for data in steps.values()) and steps[6]["skipped_steps"] > 0
    assert "loss nan" not in done.stderr


def test_a_short_run_with_rare_logging_says_no_nan(project):
    done = pretrain(project, log_freq=10, steps_this_run=2)
    assert "nan" not in done.stderr and "final loss" in done.stderr
    assert list(read_steps(project / "out" / "dllogger.json")) == [2]


def test_phase2_from_another_folder(whole, project):
    done = pretrain(
        project,
        "from_folder",
        phase2=True,
        init_checkpoint=whole / "out",
        max_steps=10,
        learning_rate=4e-3,
        steps_this_run=1,
        phase1_end_step=34,
    )
    assert (project / "from_folder" / "ckpt_35.pt").exists()  # the newest of the folder is where phase 2 of `whole` ended
    done = pretrain(
        project,
        "second",
        phase2=True,
        init_checkpoint=whole / "out" / "ckpt_24.pt",
        max_steps=10,
        learning_rate=4e-3,
        resume_from_checkpoint=True,
    )
    assert "from the weights in" in done.stderr
    assert_same_weights(project / "second" / "ckpt_34.pt", whole / "out" / "ckpt_34.pt")


def test_init_checkpoint_takes_weights_and_reports(whole, project):
    done = pretrain(project, "new", init_checkpoint=whole / "out" / "ckpt_34.pt", steps_this_run=1, learning_rate=1e-9)
    assert "matched" in done.stderr
    a, b = weights(project / "new" / "ckpt_1.pt"), weights(whole / "out" / "ckpt_34.pt")
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    failed = pretrain(make_project(project / "big", hidden_size=32), init_checkpoint=whole / "out" / "ckpt_34.pt", expect=1)
    assert "does not fill this model" in failed.stderr or "shape" in failed.stderr


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """One process, no dropout: what every cut must reproduce."""
    project = make_project(tmp_path_factory.mktemp("exact"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    pretrain(project, "one", max_steps=8, train_batch_size=24, gradient_accumulation_steps=3, eval_dir=project / "records")
    return project


@pytest.mark.parametrize(("processes", "batch", "accumulation"), [(2, 12, 1), (2, 12, 4), (3, 8, 2)])
def test_processes_and_accumulation_give_the_same_run(exact, processes, batch, accumulation):
    output = f"ddp{processes}_{accumulation}"
    finish(
        launch(
            exact,
            processes,
            output,
            max_steps=8,
            train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            eval_dir=exact / "records",
        )
    )
    one, many = read_steps(exact / "one" / "dllogger.json"), read_steps(exact / output / "dllogger.json")
    for step in one:
        assert many[step]["average_loss"] == pytest.approx(one[step]["average_loss"], abs=5e-6)
        assert many[step]["grad_norm"] == pytest.approx(one[step]["grad_norm"], rel=1e-4)
        assert many[step]["first_sample"] == one[step]["first_sample"]
    a, b = weights(exact / "one" / "ckpt_8.pt"), weights(exact / output / "ckpt_8.pt")
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    ends = [
        [r["data"]["mlm_loss"] for r in read_records(exact / folder / "dllogger.json") if r.get("data", {}).get("evaluation") == "end"]
        for folder in ("one", output)
    ]
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)


# how the log calls what a switch turns on and off
FAST_PATH = {"unpad": "unpad", "fused_loss": "fused_cross_entropy", "fused_qkv": "fused_projections", "fast_dropout": "fast_dropout"}


@pytest.mark.parametrize(
    "switches",
    [
        {"unpad": "off", "fused_loss": "off"},
        {"unpad": "off"},
        {"fused_loss": "off", "fused_qkv": "on", "fast_dropout": "off"},
        {"checkpoint_activations": True},
    ],
)
def test_every_switch_of_the_fast_path_gives_the_same_run(exact, switches):
    """Losses of every step, gradient norms, accuracy, batches and the weights at the end; the log says what was used."""
    output = "_".join(f"{name}_{value}" for name, value in switches.items())
    pretrain(exact, output, max_steps=8, train_batch_size=24, gradient_accumulation_steps=3, eval_dir=exact / "records", **switches)
    plain, fast = read_steps(exact / output / "dllogger.json"), read_steps(exact / "one" / "dllogger.json")
    for step in range(1, 9):
        assert fast[step]["average_loss"] == pytest.approx(plain[step]["average_loss"], abs=5e-6)
        assert fast[step]["grad_norm"] == pytest.approx(plain[step]["grad_norm"], rel=1e-4)
        assert [fast[step][key] for key in ("batch_crc32", "mlm_accuracy")] == [plain[step][key] for key in ("batch_crc32", "mlm_accuracy")]
    a, b = weights(exact / "one" / "ckpt_8.pt"), weights(exact / output / "ckpt_8.pt")
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    used = [
        next(r["data"]["fast_path"] for r in read_records(exact / folder / "dllogger.json") if "fast_path" in r.get("data", {}))
        for folder in ("one", output)
    ]
    expected = used[0]
    for name, value in switches.items():
        if name in FAST_PATH:
            turned = value == "on"
            assert f"{FAST_PATH[name]}={not turned}" in expected
            expected = expected.replace(f"{FAST_PATH[name]}={not turned}", f"{FAST_PATH[name]}={turned}")
    assert used[1] == expected


def test_resume_on_another_number_of_processes(exact):
    finish(launch(exact, 2, "elastic", max_steps=8, train_batch_size=12, steps_this_run=3, gradient_accumulation_steps=1))
    pretrain(exact, "elastic", max_steps=8, train_batch_size=24, gradient_accumulation_steps=3, resume_from_checkpoint=True)
    a, b = weights(exact / "one" / "ckpt_8.pt"), weights(exact / "elastic" / "ckpt_8.pt")
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    samples = [data["first_sample"] for data in read_steps(exact / "elastic" / "dllogger.json").values()]
    assert samples == [24 * step for step in range(8)]


def test_resume_on_four_processes_is_bitwise(project):
    """With more than two ranks the order in which their gradients are added shows in the last bits; it must not depend on the restart."""
    cut = {"max_steps": 8, "train_batch_size": 4, "gradient_accumulation_steps": 2}
    finish(launch(project, 4, "through", **cut))
    finish(launch(project, 4, "stopped", steps_this_run=3, **cut))
    finish(launch(project, 4, "stopped", resume_from_checkpoint=True, **cut))
    a, b = weights(project / "through" / "ckpt_8.pt"), weights(project / "stopped" / "ckpt_8.pt")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_fp16_reduction_stays_close(exact):
    finish(launch(exact, 2, "half", max_steps=8, train_batch_size=12, gradient_accumulation_steps=1, allreduce_post_accumulation_fp16=True))
    one, half = read_steps(exact / "one" / "dllogger.json"), read_steps(exact / "half" / "dllogger.json")
    assert half[8]["average_loss"] == pytest.approx(one[8]["average_loss"], rel=1e-2)


def test_a_signal_to_one_rank_stops_all_on_the_same_step(exact):
    running = launch(exact, 2, "signal", max_steps=2000, train_batch_size=12, gradient_accumulation_steps=1)
    wait_for_step(exact / "signal" / "dllogger.json", 3, running[0])
    running[1].send_signal(signal.SIGTERM)
    finish(running, expect=143)
    reached = max(read_steps(exact / "signal" / "dllogger.json"))
    assert (exact / "signal" / f"ckpt_{reached}.pt").exists()


def test_a_refusal_is_said_once(exact):
    errors = finish_with(launch(exact, 2, "one", max_steps=8, train_batch_size=12, gradient_accumulation_steps=1), [2, 1])
    assert "already holds a run" in errors[0] and not any("Traceback" in text for text in errors)


def finish_with(running, codes):
    errors = [process.communicate(timeout=200)[1] for process in running]
    assert [process.returncode for process in running] == codes, "\n".join(errors)
    return errors


def test_different_signals_to_different_ranks(exact):
    running = launch(exact, 2, "signals", max_steps=2000, train_batch_size=12, gradient_accumulation_steps=1)
    wait_for_step(exact / "signals" / "dllogger.json", 3, running[0])
    running[0].send_signal(signal.SIGINT)
    running[1].send_signal(signal.SIGTERM)
    codes = {process.returncode for process in running if process.communicate(timeout=100)}
    assert len(codes) == 1 and codes <= {130, 143}


def test_torchrun(exact):
    command = [
        os.path.join(os.path.dirname(sys.executable), "torchrun"), "--standalone", "--nproc_per_node", "2", str(ROOT / "run_pretraining.py"),
        *pretraining_arguments(exact, "torchrun", max_steps=4, train_batch_size=12),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment())
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stderr and (exact / "torchrun" / "ckpt_4.pt").exists()


def test_other_modes_run(project):
    pretrain(project, "a", max_steps=3, objective="mlm", precision="bf16", eval_dir=project / "records")
    assert not any("pooler" in name for name in weights(project / "a" / "ckpt_3.pt"))
    pretrain(project, "b", max_steps=3, precision="fp16", optimizer="adamw", lr_schedule="cosine", checkpoint_activations=True)
    pretrain(
        project, "c", max_steps=3, no_dense_sequence_output=True, lr_schedule="exponential", skip_checkpoint=True, no_group_by_length=True
    )
    assert not list((project / "c").glob("*.pt"))


@pytest.mark.slow
@pytest.mark.skipif(fp8.unsupported(torch.device("cpu")) is not None, reason=str(fp8.unsupported(torch.device("cpu"))))
def test_fp8_trains_resumes_and_is_refused_in_pieces(project):
    """On a CPU it is slow but the same arithmetic; checkpoints are those of any precision."""
    config = json.loads((project / "config.json").read_text()) | {"hidden_size": 32, "num_attention_heads": 2}
    (project / "config.json").write_text(json.dumps(config))
    done = pretrain(project, max_steps=4, precision="fp8", steps_this_run=2)
    assert re.search(r"fp8: ([1-9]\d*) of \1 linear layers of the encoder", done.stderr), done.stderr
    pretrain(project, max_steps=4, precision="fp8", resume_from_checkpoint=True)
    losses = [data["average_loss"] for _, data in sorted(read_steps(project / "out" / "dllogger.json").items())]
    assert len(losses) == 4 and all(0 < loss < 7 for loss in losses)
    refused = run_script("run_pretraining.py", *pretraining_arguments(project, "none", precision="fp8", deepspeed=True))
    assert refused.returncode == 2 and "--precision fp8" in refused.stderr and not (project / "none").exists()


def test_cuda_graphs_without_a_gpu_are_refused_before_anything_is_written(project):
    refused = pretrain(project, expect=2, cuda_graphs=True)
    assert "--cuda_graphs: CUDA graphs need a GPU" in refused.stderr and not (project / "out").exists()


def test_no_dense_output_is_the_same_training(project):
    pretrain(project, "dense", max_steps=3)
    pretrain(project, "full", max_steps=3, no_dense_sequence_output=True)
    for step, data in read_steps(project / "dense" / "dllogger.json").items():
        other = read_steps(project / "full" / "dllogger.json")[step]
        assert data["average_loss"] == pytest.approx(other["average_loss"], abs=0.02)


def test_tensorboard_and_a_log_elsewhere(project):
    pretrain(project, max_steps=2, tensorboard_dir=project / "tb", **{"json-summary": project / "logs" / "x.json"})
    assert list((project / "tb").glob("events*")) and list(read_steps(project / "logs" / "x.json")) == [1, 2]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"train_batch_size": 15}, 2, "--train_batch_size 15 is not divisible by --gradient_accumulation_steps 2"),
        ({"input_dir": "/nonexistent"}, 1, "/nonexistent does not exist"),
        ({"max_seq_length": 64}, 1, "--max_seq_length is 64"),
        ({"max_predictions_per_seq": 6}, 1, "--max_predictions_per_seq is 6"),
        ({"nonsense": 1}, 2, "unrecognized arguments: --nonsense"),
        ({"shard": "zero1", "deepspeed": True}, 2, "--shard zero1 and --deepspeed exclude each other"),
        ({"phase2": True}, 2, "--phase2 needs weights"),
        ({"init_checkpoint": "/nonexistent.pt"}, 1, "/nonexistent.pt"),
    ],
)
def test_one_clear_error_and_nothing_written(project, changes, code, words):
    done = pretrain(project, expect=code, **changes)
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (project / "out").exists()


def test_ids_beyond_the_vocabulary(project):
    write_records(project / "records" / "b_training_0.hdf5", 30, 5, vocab_size=500)
    done = pretrain(project, expect=1)
    assert "b_training_0.hdf5, row" in done.stderr and "vocabulary has 96 entries" in done.stderr and "Traceback" not in done.stderr
    assert not (project / "out").exists()


def test_bad_configurations(project):
    (project / "config.json").write_text('{"vocab_size": 96, "hidden_size": 15, "num_attention_heads": 2}')
    done = pretrain(project, expect=2)
    assert "config.json" in done.stderr and "hidden_size" in done.stderr and "Traceback" not in done.stderr
    (project / "config.json").write_text("{ not json")
    assert "config.json" in pretrain(project, expect=2).stderr


def test_vocabulary_that_does_not_belong(project):
    vocab = project / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(91))]) + "\n")
    pretrain(project, "good", max_steps=1, vocab_file=vocab)
    small = make_project(project / "small", vocab_size=200)
    assert "vocabulary of 96 entries" in pretrain(small, expect=2, vocab_file=vocab).stderr
    write_records(project / "records" / "a_test_0.hdf5", 20, 0, vocab_sha256="2" * 64)
    assert "held-out records" in pretrain(project, expect=1, vocab_file=vocab, eval_dir=project / "records").stderr
    write_records(project / "records" / "a_training_0.hdf5", 20, 0, vocab_sha256="0" * 64)
    assert "another vocabulary" in pretrain(project, expect=1, vocab_file=vocab).stderr
    write_records(project / "records" / "a_training_1.hdf5", 20, 0, vocab_sha256="1" * 64)
    assert "different vocabularies" in pretrain(project, expect=1).stderr
    make_project(project)  # sound records again
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(91))]) + "\n")
    assert "[MASK]" in pretrain(project, expect=1, vocab_file=vocab).stderr


def test_another_run_in_the_folder(project):
    pretrain(project, steps_this_run=2)
    before = sorted(os.listdir(project / "out"))
    assert "already holds a run (ckpt_2.pt)" in pretrain(project, expect=2).stderr
    done = pretrain(project, expect=2, resume_from_checkpoint=True, seed=7, max_steps=30)
    assert "seed was 42, is 7" in done.stderr and "max_steps was 24, is 30" in done.stderr
    bigger = make_project(project / "bigger", hidden_size=32)
    done = pretrain(project, expect=1, resume_from_checkpoint=True, config_file=bigger / "config.json")
    assert "hidden_size was 16, is 32" in done.stderr
    assert sorted(os.listdir(project / "out")) == before
    pretrain(project, resume_from_checkpoint=True, seed=7, force_resume=True, steps_this_run=1)


def test_truncated_records(project):
    path = project / "records" / "a_training_1.hdf5"
    path.write_bytes(path.read_bytes()[:4000])
    done = pretrain(project, expect=1)
    assert "a_training_1.hdf5" in done.stderr and "truncated" in done.stderr and not (project / "out").exists()


def test_divergence_is_given_up_not_burned(project):
    done = pretrain(
        project, expect=1, precision="fp16", loss_scale=1e38, max_consecutive_skips=4, learning_rate=1e-3, resume_from_checkpoint=True
    )
    assert "4 steps in a row had a non-finite gradient" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_keeps_the_last_checkpoint(project):
    """A real file system that is full: the run ends with one error, the checkpoints before it are whole."""
    out = project / "out"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(out)], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        done = pretrain(project, expect=1, resume_from_checkpoint=True)
        assert "could not be written" in done.stderr and "Traceback" not in done.stderr
        kept = sorted(out.glob("ckpt_*.pt"))
        assert kept and all(torch.load(path, weights_only=True)["format"] == "berth-checkpoint" for path in kept)
        assert not list(out.glob(".*partial"))
    finally:
        subprocess.run(["umount", str(out)], check=True)
