"""Compiled training is plain training: padded and packed on one process, packed on two, and nothing is compiled twice.

Tests compile with ``aot_eager``, which traces forward and backward as inductor does and runs them with torch's own kernels; one uses inductor."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func

import modeling
import optimization
from berth.errors import TrainingError
from berth.records.reader import SampleStream, open_index
from berth.training import compiled
from berth.training.backends import choose
from berth.training.batches import BatchPlan
from berth.training.compiled import compile_model, compiling, effective, plain, probe, unsupported
from berth.training.graphs import Graphs
from berth.training.metrics import StepClock
from berth.training.parallel import Recipe, Replicated
from berth.training.precision import make_precision
from berth.training.step import MaskedLmTrainingStep, TrainingStep
from tests.support import ROOT, TINY, VOCAB_SIZE, environment, make_project
from tests.unit.training.fast_ranks import ALONE, COMPILED, GRAPHED, Pretended

CPU = torch.device("cpu")
OWN_PROCESS = "BERTH_TEST_OWN_PROCESS"
CONFIG = modeling.BertConfig.from_dict({**TINY, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
OURS = {"backend": "aot_eager"}
KINDS = [modeling.BertForPreTraining, modeling.BertForMaskedLM]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def stream(tmp_path):
    return SampleStream(open_index(make_project(tmp_path) / "records", "training"), 3, VOCAB_SIZE)


def build(how, *, kind=KINDS[0], precision="fp32", fused=False, checkpointing=False, options=OURS, graphs=False, layers=2):
    torch.manual_seed(0)
    model = kind(dataclasses.replace(CONFIG, num_hidden_layers=layers))
    model.fused_cross_entropy = fused
    model.set_activation_checkpointing(checkpointing)
    choice = choose("berth", device=CPU, optimizer="lamb", sharding="none", precision=precision)
    clock = StepClock(CPU)
    recipe = Recipe("lamb", 1e-2, 0.01, 1.0, choice)
    parallel = Replicated(model, ALONE, clock, recipe, compiled=how, compile_options=options, graphs=graphs)
    mode = make_precision(precision, "cpu", 0.0, 2.0**10, 1.0)
    schedule = optimization.make_schedule("poly", 1e-2, 0.1, 20)
    step = TrainingStep if kind is modeling.BertForPreTraining else MaskedLmTrainingStep
    return model, step(parallel, schedule, mode, clock, clip_norm=1.0)


def train(step, stream, *, unpad, steps=2, micro=6):
    plan = BatchPlan(24, micro, 24 // micro, 0, 1, group_by_length=False, unpad=unpad)  # unequal micro-batches
    results, shapes = [], set()
    for number in range(steps):
        batch = plan.build(stream, 24 * number)
        shapes |= {(micro.input_ids.shape, micro.masked_index.shape) for micro in batch.micro_batches}
        # counts that no micro-batch has, other ones in every step
        results.append(step(batch, number + 1, batch.masked + number, 24 + number))
    return results, shapes


def graphs_compiled():
    return counters["stats"]["unique_graphs"]


def close(ours, theirs, model, reference, loose=1.0):
    for one, other in zip(ours, theirs, strict=True):
        assert float(one.mlm_loss) == pytest.approx(float(other.mlm_loss), rel=2e-6 * loose)
        assert float(one.nsp_loss) == pytest.approx(float(other.nsp_loss), rel=2e-6 * loose)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5 * loose) and not one.skipped
        assert abs(int(one.mlm_correct) - int(other.mlm_correct)) <= (loose > 1)
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        if not name.endswith("key.bias"):  # softmax cancels it: its gradient is rounding alone
            assert torch.allclose(a, b, atol=5e-6 * loose), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "unpad", "fused", "kind", "precision", "graphs"),
    [
        ("model", True, True, KINDS[0], "bf16", 1),
        ("model", False, False, KINDS[1], "fp32", 1),
        ("layers", True, True, KINDS[0], "fp32", 5),
        ("layers", False, False, KINDS[1], "fp16", 4),
    ],
)
def test_training_is_the_same_and_compiles_once(stream, how, unpad, fused, kind, precision, graphs):
    """Losses, norms and weights of two steps of four micro-batches, of as many shapes as chance gives. *layers*: one graph of all layers but
    the last, one of the last (it finishes some rows only), embeddings, transform, and the pooler where there is one. (In fp32 packed as one
    graph: below, recorded.)"""
    layers = 3 if how == "layers" else 2
    model, ours = build(how, kind=kind, precision=precision, fused=fused, layers=layers)
    reference, eager = build("off", kind=kind, precision=precision, fused=fused, layers=layers)
    found, shapes = train(ours, stream, unpad=unpad)
    assert len(shapes) > 2 and graphs_compiled() == graphs
    expected, _ = train(eager, stream, unpad=unpad)
    close(found, expected, model, reference, loose=1.0 if precision == "fp32" else 2000.0)
    assert graphs_compiled() == graphs


@pytest.mark.parametrize("how", ["model", "layers"])
def test_evaluation_compiles_nothing_and_training_goes_on(stream, how):
    model, step = build(how)
    train(step, stream, unpad=True, steps=1)
    before = graphs_compiled()
    reference = copy.deepcopy(model) if how == "model" else None
    micro = BatchPlan(24, 24, 1, 0, 1).build(stream, 0).micro_batches[0].to(CPU)
    model.eval()
    with step.parallel.evaluating(), torch.no_grad():
        assert step.parallel.module is model
        seen = [step.parallel.module(input_ids=micro.input_ids[:rows]).prediction_logits for rows in range(1, 8)]
    assert graphs_compiled() == before
    if reference is not None:
        assert torch.equal(seen[2], reference.eval()(input_ids=micro.input_ids[:3]).prediction_logits)
    train(step, stream, unpad=True, steps=1)
    assert graphs_compiled() == before


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model", "layers"])
def test_layers_that_run_again_in_the_backward_pass(stream, how):
    model, ours = build(how, checkpointing=True)
    reference, eager = build("off")
    close(train(ours, stream, unpad=True, steps=1)[0], train(eager, stream, unpad=True, steps=1)[0], model, reference)


@pytest.mark.slow
def test_compiled_passes_can_be_recorded(stream):
    """On a device that pretends to: compiled once, though gradients then stay where they are, and the same training."""
    backend = Pretended()
    model, ours = build("model", fused=True, graphs=True)
    ours.graphs = Graphs(list(model.parameters()), CPU, backend=backend)
    reference, eager = build("off", fused=True)
    batch = BatchPlan(24, 8, 3, 0, 1, unpad=True).build(stream, 0)
    found, expected = ([step(batch, number, batch.masked, 24) for number in (1, 2, 3)] for step in (ours, eager))
    assert graphs_compiled() == 1 and backend.launched
    close(found, expected, model, reference)


def test_names_of_weights_and_module_stay(stream):
    """What a checkpoint sees knows nothing of compilation."""
    for how in ("model", "layers"):
        model, step = build(how)
        assert list(step.parallel.model_state()) == list(modeling.BertForPreTraining(CONFIG).state_dict())
        assert step.parallel.module is step.parallel.plain is model
        torch._dynamo.reset()


def test_sizes_equal_by_chance_stay_two_sizes():
    """Rows and columns alike at first, not later: torch alone would compile again."""
    for guarded, expected in ((True, 1), (False, 2)):
        torch._dynamo.reset()
        counters.clear()
        doubled = torch.compile(lambda x, y: (x * 2, y * 3), backend="eager", fullgraph=True, dynamic=True)
        for sizes in ((8, 8), (8, 9), (5, 7)):
            with compiling("model" if guarded else "off"):
                doubled(*(torch.ones(size) for size in sizes))
        assert graphs_compiled() == expected


def failing_backend(graph, inputs):
    raise RuntimeError("no such instruction\n" + "details " * 100)


@pytest.mark.parametrize("how", ["model", "layers"])
def test_a_compiler_that_fails_is_one_error_with_the_way_out(stream, how, caplog):
    _, step = build(how, options={"backend": failing_backend})
    with pytest.raises(TrainingError, match="--compile off") as error:
        train(step, stream, unpad=True, steps=1)
    assert "no such instruction" in str(error.value) and "\n" not in str(error.value)
    assert f"--compile {how}" in str(error.value) and "chosen by --compile auto" in str(error.value)
    assert caplog.text.count("Traceback") >= 1 and [record.message for record in caplog.records].count("torch.compile failed") == 1


def test_errors_of_the_model_stay_what_they_are():
    with pytest.raises(ZeroDivisionError), compiling("model"):
        1 / 0  # noqa: B018
    with pytest.raises(RuntimeError, match="^shape"), compiling("layers"):
        raise RuntimeError("shape")


def test_what_several_ranks_make_of_it():
    assert [effective(how, 1) for how in compiled.MODES] == ["off", "layers", "model"]
    assert [effective(how, 2) for how in compiled.MODES] == ["off", "layers", "layers"]


def test_off_and_plain_do_nothing():
    model = modeling.BertForPreTraining(CONFIG)
    assert compile_model(model, "off") is model
    with plain():
        assert torch.compile(lambda x: x + 1, backend=failing_backend)(torch.ones(1)) == 2


def test_without_a_compiler_the_reason_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    unsupported.cache_clear()
    assert "C++ compiler" in unsupported(CPU)
    monkeypatch.setenv("CXX", sys.executable)  # some program
    monkeypatch.setattr(compiled.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    unsupported.cache_clear()
    assert "python3-dev" in unsupported(CPU)
    (tmp_path / "Python.h").touch()
    unsupported.cache_clear()
    assert unsupported(CPU) is None
    assert "meta" in unsupported(torch.device("meta"))
    unsupported.cache_clear()


def test_the_trial_tells_good_compilers_from_bad_ones():
    def is_number(value):
        return torch.is_tensor(value) and value.is_floating_point()

    def wrong(graph, inputs):
        return make_boxed_func(lambda *arguments: [value * 1.01 if is_number(value) else value for value in graph(*arguments)])

    assert probe(CPU, backend="aot_eager") is None
    torch._dynamo.reset()
    assert "other numbers" in probe(CPU, backend=aot_autograd(fw_compiler=wrong))
    torch._dynamo.reset()
    assert "no such instruction" in probe(CPU, backend=failing_backend)


@pytest.mark.slow
@pytest.mark.skipif(unsupported(CPU) is not None, reason=str(unsupported(CPU)))
def test_inductor_too(stream, tmp_path, monkeypatch):
    """The backend of real runs, on one layer: embeddings, layer, transform and pooler, packed; two shapes and more. In a process of its own: what
    other tests import (distutils) can keep inductor from loading setuptools."""
    if OWN_PROCESS not in os.environ:
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::test_inductor_too"]
        done = subprocess.run(words, cwd=ROOT, env={**environment(), OWN_PROCESS: "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model, ours = build("layers", fused=True, options={}, layers=1)
    reference, eager = build("off", fused=True, layers=1)
    found, shapes = train(ours, stream, unpad=True, steps=1)
    assert graphs_compiled() == 4 and len(shapes) > 1
    close(found, train(eager, stream, unpad=True, steps=1)[0], model, reference, loose=2.0)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What fast_ranks.py found on each of two processes."""
    folder, script = tmp_path_factory.mktemp("ranks"), Path(__file__).with_name("fast_ranks.py")
    variables = {**environment(), "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(folder)], stderr=subprocess.PIPE, text=True, env=variables)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=400)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"found.{rank}") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", COMPILED)
def test_two_ranks_train_alike_with_compiled_layers(two_ranks, stage):
    """DistributedDataParallel and fully sharded; norms, packed; norms, weights after two steps, and what evaluation sees."""
    for found in two_ranks:
        ours, theirs = found[f"{stage} compiled"], found[f"{stage} plain"]
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
        assert ours["seen"] == pytest.approx(theirs["seen"], rel=1e-6)
    ours, theirs = (two_ranks[0][f"{stage} {kind}"]["weights"] for kind in ("compiled", "plain"))
    for name, weight in theirs.items():
        assert torch.allclose(ours[name], weight, atol=1e-6) or name.endswith("key.bias"), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", GRAPHED)
def test_two_ranks_train_alike_with_graphs(two_ranks, stage):
    """All micro-batches but the last of a step replayed, past DistributedDataParallel; then the same reduction: equal bit by bit."""
    for found in two_ranks:
        ours, theirs = found[f"{stage} graphs"], found[f"{stage} plain"]
        assert ours["launched"] >= 2
        assert (ours["norms"], ours["seen"]) == (theirs["norms"], theirs["seen"])
    ours, theirs = (two_ranks[0][f"{stage} {kind}"]["weights"] for kind in ("graphs", "plain"))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
