"""Sharding in worlds of 2, 3 and 4 processes (run by sharded_ranks.py) against one process in float64, and against the unsharded world."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import optimization
from berth.training.parallel import Update
from tests.support import ROOT, environment

SCRIPT = Path(__file__).with_name("sharded_ranks.py")
_spec = importlib.util.spec_from_file_location("sharded_ranks", SCRIPT)
ranks = importlib.util.module_from_spec(_spec)
sys.modules["sharded_ranks"] = ranks  # its dataclasses look their module up there
_spec.loader.exec_module(ranks)

pytestmark = pytest.mark.slow

CASES = [(world, case) for world, cases in ranks.CASES.items() for case in cases]
EXACT = [(world, case) for world, case in CASES if case.wire == "fp32"]
NARROW = [(world, case) for world, case in CASES if case.wire != "fp32"]
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """``results(world, case, rank)``: what a rank left."""
    folder = tmp_path_factory.mktemp("ranks")
    variables = {**environment(), "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(folder)], stderr=subprocess.PIPE, text=True, env=variables)
        for rank in range(max(ranks.CASES))
    ]
    try:
        errors = [process.communicate(timeout=400)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(errors)

    def read(world, case, rank=0, suffix=""):
        path = folder / "-".join(map(str, (world, *case)))
        with torch.serialization.safe_globals([Update]):
            return torch.load(f"{path}.{suffix or rank}", weights_only=True)

    read.folder = folder
    return read


@pytest.fixture(scope="module")
def references():
    """Norms and weights of the run in one process in float64, by optimizer."""
    return {optimizer: float64_run(optimizer) for optimizer in ("lamb", "adamw")}


def float64_run(optimizer):
    model = ranks.make_model(dtype=torch.float64)
    groups = optimization.parameter_groups(model, 0.01)
    if optimizer == "lamb":
        made = optimization.Lamb(groups, lr=ranks.LEARNING_RATE[optimizer], max_grad_norm=ranks.CLIP)
    else:
        made = optimization.adamw(groups, lr=ranks.LEARNING_RATE[optimizer])
    norms = []
    for step in range(1, ranks.STEPS + 1):
        data = ranks.batch(step)
        masked = int((data["labels"] != -100).sum())
        model(**data, mlm_denominator=masked, nsp_denominator=ranks.SEQUENCES).loss.backward()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))
        if optimizer == "adamw":
            torch._foreach_div_([p.grad for p in model.parameters()], max(1.0, norms[-1] / ranks.CLIP))
        made.step()
        made.zero_grad()
    return norms, model.state_dict()


def distance(ours, theirs):
    """Largest difference of two models' tensors. Not of the keys' biases: softmax cancels them, so their gradient is rounding alone."""
    assert list(ours) == list(theirs)
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours if not name.endswith("key.bias"))


def equal(ours, theirs):
    """Whether two nested states are the same, bit by bit, in keys and their order too."""
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return type(ours) is type(theirs) and ours == theirs


def name_of(value):
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("world", "case"), EXACT, ids=name_of)
def test_five_steps_equal_one_process_in_float64(results, references, world, case):
    norms, weights = references[case.optimizer]
    found = results(world, case)
    assert min(norms) > ranks.CLIP, "clipping is to be active"
    assert found["norms"] == pytest.approx(norms, rel=2e-6)
    assert distance(weights, found["end"]["model"]) < TOLERANCE
    assert distance(weights, ranks.make_model().state_dict()) > 5e-3  # the steps did something


@pytest.mark.parametrize(("world", "case"), CASES, ids=name_of)
def test_ranks_agree_and_only_rank_0_holds_the_state(results, world, case):
    mains, *others = [results(world, case, rank) for rank in range(world)]
    for other in others:
        assert other["norms"] == mains["norms"]
        assert other["end"] == {"model": None, "optimizer": None}


@pytest.mark.parametrize(("world", "case"), [(w, c) for w, c in EXACT if c.stage != "none"], ids=name_of)
def test_state_is_that_of_an_unsharded_run(results, world, case):
    """Names, order, shapes, types and groups; the moments within rounding; tied tensors share memory, no others do."""
    ours = results(world, case)["end"]
    theirs = results(2, ranks.Case("none", case.optimizer, 3 if case.optimizer == "lamb" else 1))["end"]
    assert distance(ours["model"], theirs["model"]) < TOLERANCE
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    assert list(ours["optimizer"]["state"]) == list(theirs["optimizer"]["state"])
    for mine, other in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True):
        assert list(mine) == list(other)
        for key, value in mine.items():
            assert (value.dtype, value.shape, value.device) == (other[key].dtype, other[key].shape, other[key].device)
            assert (value - other[key]).abs().max() < 1e-7
    storages = [tensor.untyped_storage() for tensor in ours["model"].values()]
    assert len({storage.data_ptr() for storage in storages}) == len(list(ranks.make_model().parameters()))
    assert sum(t.numel() for t in ours["model"].values()) * 4 == sum(storage.nbytes() for storage in storages)


@pytest.mark.parametrize(("world", "case"), EXACT, ids=name_of)
def test_a_run_goes_on_bit_by_bit_from_its_checkpoint(results, world, case):
    """In a model of other weights that has been evaluated (gathered) before it loads; what evaluation sees is the same, too."""
    found = results(world, case)
    assert not equal(found["saved"], found["end"])
    assert equal(found["again"], found["end"])
    assert found["seen"][0] == found["seen"][1]


@pytest.mark.parametrize(("world", "case"), [(w, c) for w, c in EXACT if w in ranks.CONTINUED], ids=name_of)
def test_a_run_goes_on_from_another_worlds_and_stages_checkpoint(results, references, world, case):
    continued = results(world, case, suffix="continued")
    assert distance(references[case.optimizer][1], continued["model"]) < TOLERANCE
    assert continued["optimizer"]["param_groups"] == results(world, case)["end"]["optimizer"]["param_groups"]


@pytest.mark.parametrize(("world", "case"), [(w, c) for w, c in EXACT if c.optimizer == "lamb"], ids=name_of)
def test_a_bad_gradient_stops_all_ranks_and_is_named(results, world, case):
    everything = [(name, "nan") for name, _ in ranks.make_model().named_parameters()]
    for rank in range(world):
        spoilt, poisoned = results(world, case, rank)["bad"]
        assert math.isnan(spoilt.norm) and spoilt.nonfinite == everything
        assert poisoned.norm == math.inf and poisoned.nonfinite == [(ranks.POISONED, "inf")]
    found = results(world, case)
    assert equal(found["after_bad"], found["again"])


@pytest.mark.parametrize(("world", "case"), NARROW, ids=name_of)
def test_sixteen_bits_between_ranks(results, references, world, case):
    """Close to float32, not equal to it, and the same whatever the stage: each rank rounds its sum over micro-batches once."""
    norms, weights = references["lamb"]
    found, plain = results(world, case), results(world, case._replace(stage="none"))
    closeness = {"fp16": 1e-4, "bf16": 1e-3}[case.wire]
    assert found["norms"] == pytest.approx(norms, rel=closeness)
    assert found["norms"] != pytest.approx(norms, rel=closeness / 100)
    assert closeness / 100 < distance(weights, found["end"]["model"]) < closeness
    assert found["norms"][0] == pytest.approx(plain["norms"][0], rel=closeness / 10)
    assert distance(plain["end"]["model"], found["end"]["model"]) < closeness / 5


def test_layers_that_run_again_in_the_backward_pass(results, references):
    for rank in range(2):
        for stage, norms in torch.load(results.folder / f"passes.{rank}")["checkpointing"].items():
            assert norms == pytest.approx(references["lamb"][0][:2], rel=2e-6), stage


def test_autocast_around_all_micro_batches(results, references):
    for rank in range(2):
        found = torch.load(results.folder / f"passes.{rank}")["autocast"]
        assert 1e-4 < abs(found["none"] / references["lamb"][0][0] - 1) < 1e-2  # it is bf16
        assert found == pytest.approx(dict.fromkeys(ranks.STAGES, found["none"]), rel=1e-6)


def test_states_that_do_not_fit_are_refused_and_tied_tensors_need_one_name(results):
    """``refused.<rank>``: by stage and trial the error's type and text, or the weights' agreement."""
    name = "bert.encoder.layer.0.output.dense.weight"
    for rank in range(2):
        for stage, found in torch.load(results.folder / f"refused.{rank}").items():
            assert found.pop("tied once") == found.pop("tied, two copies") == "taken", stage
            assert {trial: kind for trial, (kind, _) in found.items()} == {
                "missing": "RuntimeError", "shape": "RuntimeError", "moment": "ValueError", "other optimizer": "ValueError", "groups": "ValueError",
            }  # fmt: skip
            assert all(name in found[trial][1] for trial in ("missing", "shape", "moment")), found
