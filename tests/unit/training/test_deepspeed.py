"""DeepSpeed's engine against the unsharded optimizer: real processes over gloo, all stages, LAMB and AdamW; and its configuration.

Run as a program, this file is one rank of such a world: it trains a small model in every way and rank 0 saves what came out.
"""

import copy
import dataclasses
import datetime
import gc
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import optimization
from berth.errors import ConfigError
from berth.training import ds_engine
from berth.training.backends import Choice
from berth.training.distributed import Communicator, discover_rank
from berth.training.ds_config import Run, check_config
from berth.training.ds_engine import DeepSpeedParallel
from berth.training.ds_layout import equal_shares, find_partitions
from berth.training.metrics import StepClock
from berth.training.parallel import Recipe
from tests.support import ROOT, environment, free_port

SAMPLES, WIDTH, STEPS, CLIP = 12, 7, 5, 0.05
RATES = [0.05, 0.04, 0.03, 0.02, 0.01]
WIRES = ("bf16", "fp16", "fp16", "bf16")  # by stage
FOUR = ((1, "adamw"), (2, "lamb"), (3, "lamb"))
WAYS = list(itertools.product((0, 1, 2, 3), ("lamb", "adamw")))


class Output(NamedTuple):
    loss: torch.Tensor


class Model(nn.Module):
    """Tied weights, tensors smaller than a world of four, sizes that no world divides, an unused buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.inner = nn.Linear(WIDTH, 5)
        self.LayerNorm = nn.LayerNorm(5)
        self.outer = nn.Linear(5, WIDTH, bias=False)
        self.tiny = nn.Linear(1, 1)
        self.decoder = nn.Linear(WIDTH, 11, bias=True)
        self.decoder.weight = self.embedding.weight
        self.register_buffer("positions", torch.arange(3))
        self.seen = None

    def forward(self, ids_B, labels_B, poison=0.0):
        hidden = torch.tanh(self.inner(self.embedding(ids_B)))
        self.seen = hidden.dtype
        hidden = self.outer(self.LayerNorm(hidden)) * self.tiny.weight.sum()
        shift = self.tiny.bias.sum()
        if poison:
            shift.register_hook(lambda gradient: gradient * poison)  # of this tensor only
        hidden = hidden + shift
        return Output(nn.functional.cross_entropy(self.decoder(hidden).float(), labels_B, reduction="sum") / SAMPLES)


def make_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Model().to(dtype)


def batch(step):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, 11, (2, SAMPLES), generator=generator)


def recipe(optimizer):
    return Recipe(optimizer, 0.05, 0.01, 0.0 if optimizer == "adamw" else CLIP, Choice(None, None, ""))


def options(stage, config=None, accumulation=1, world=1, wire="fp32", clip=CLIP):
    return types.SimpleNamespace(
        deepspeed=config, deepspeed_zero_stage=stage, gradient_accumulation_steps=accumulation, max_grad_norm=clip, reduce_dtype=wire,
        micro_batch=SAMPLES // world // accumulation,
    )  # fmt: skip


def train_step(parallel, step, rank, world, accumulation, scale=1.0, poison=0.0, autocast=None, clip=CLIP):
    """One step on this rank's cut of the global batch, as :class:`TrainingStep` does it; ``poison`` multiplies one gradient of the last rank."""
    ids, labels = (values.chunk(world)[rank].chunk(accumulation) for values in batch(step))
    for group in parallel.optimizer.param_groups:
        group["lr"] = RATES[step]
    for micro in range(accumulation):
        with parallel.micro_batch(micro == accumulation - 1):
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = parallel.module(ids[micro], labels[micro], poison=poison if rank == world - 1 else 0.0).loss
            parallel.backward(loss * scale * world)
    return parallel.update(scale, clip)


# -- the unsharded reference, in the pytest process ------------------------------------------------------------------------------------


class Reference:
    """One process, the whole batch, the optimizer of whole tensors."""

    def __init__(self, optimizer, dtype=torch.float32):
        self.model = make_model(dtype=dtype)
        self.optimizer = recipe(optimizer).build(optimization.parameter_groups(self.model, weight_decay=0.01))

    def step(self, step, cut=1, autocast=None):
        ids, labels = (values.chunk(cut) for values in batch(step))
        self.optimizer.zero_grad()
        for part in range(cut):
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = self.model(ids[part], labels[part]).loss
            loss.backward()
        gradients = [parameter.grad for parameter in self.model.parameters()]
        norm = float(optimization.global_norm(gradients))
        for group in self.optimizer.param_groups:
            group["lr"] = RATES[step]
        if isinstance(self.optimizer, optimization.Lamb):
            self.optimizer.step(grad_norm=norm)
        else:
            torch._foreach_mul_(gradients, min(1.0, CLIP / norm))
            self.optimizer.step()
        return norm

    def run(self, steps=range(STEPS), **how):
        return [self.step(step, **how) for step in steps]


def distance(state, other):
    assert list(state) == list(other)
    return max(float((state[key].double() - other[key].double()).abs().max()) for key in state)


# -- one rank --------------------------------------------------------------------------------------------------------------------------


class Rank:
    """Trains in this process and keeps what rank 0 saves."""

    def __init__(self, folder):
        self.folder, place = folder, discover_rank(os.environ)
        self.communicator = Communicator(place, torch.device("cpu"), datetime.timedelta(seconds=60))
        self.rank, self.world = place.rank, place.world_size
        self.results = {}

    def build(self, stage, optimizer="lamb", config=None, accumulation=1, wire="fp32", seed=0):
        run = options(stage, config, accumulation, self.world, wire)
        return DeepSpeedParallel(make_model(seed), self.communicator, StepClock(torch.device("cpu")), recipe(optimizer), run)

    def train(self, parallel, steps=range(STEPS), accumulation=1, **how):
        return [train_step(parallel, step, self.rank, self.world, accumulation, **how) for step in steps]

    def states(self, parallel):
        return parallel.model_state(), parallel.optimizer_state()

    def check_equal(self, stage, optimizer):
        """Five steps with and without accumulation; the state after three goes on in a fresh engine."""
        parallel = self.build(stage, optimizer)
        start = self.states(parallel)
        norms = [update.norm for update in self.train(parallel, range(3))]
        middle = self.states(parallel)
        norms += [update.norm for update in self.train(parallel, range(3, STEPS))]
        whole = self.states(parallel)
        resumed = self.build(stage, optimizer, seed=9)
        shared = self.share(middle)
        resumed.load_model(shared[0])
        resumed.load_optimizer(shared[1])
        loaded = self.states(resumed)
        self.train(resumed, range(3, STEPS))
        self.results[f"{stage} {optimizer}"] = {
            "start": start, "middle": middle, "end": whole, "norms": norms, "loaded": loaded, "resumed": self.states(resumed),
        }  # fmt: skip

    def check_accumulation(self, stage):
        parallel = self.build(stage, accumulation=3)
        norms = [update.norm for update in self.train(parallel, accumulation=3, scale=2.0**12)]
        self.results[f"{stage} accumulation"] = {"norms": norms, "end": self.states(parallel)}

    def check_bad_step(self, stage):
        """Steps 0 and 1, bad ones, 2: as if the bad ones had not been."""
        parallel = self.build(stage)
        self.train(parallel, range(2))
        bad = [self.train(parallel, [3], poison=poison)[0] for poison in (float("nan"), float("inf"))]
        last = self.train(parallel, [2])[0]
        self.results[f"{stage} bad"] = {"bad": [tuple(update) for update in bad], "last": tuple(last), "end": self.states(parallel)}

    def check_huge_step(self, stage):
        """Every gradient is finite, their squares leave fp32's range."""
        parallel = self.build(stage)
        self.train(parallel, range(2))
        before = self.states(parallel)
        update = self.train(parallel, [2], poison=1e25, clip=0.0)[0]
        self.results[f"{stage} huge"] = {"update": tuple(update), "states": [before, self.states(parallel)]}

    def check_precision(self, stage):
        parallel = self.build(stage)
        self.train(parallel, range(3), autocast=torch.bfloat16)
        seen = [parallel.plain.seen]
        asked = torch.is_autocast_enabled
        torch.is_autocast_enabled = lambda *device: asked(*device) if device else True  # as it answers where CUDA's autocast is on
        try:
            self.train(parallel, [3], autocast=torch.bfloat16)
            seen.append(parallel.plain.seen)
        finally:
            torch.is_autocast_enabled = asked
        self.results[f"{stage} autocast"] = {"seen": seen, "end": self.states(parallel)}

    def check_refusals(self, stage):
        """What a state that does not fit is told; the good one loads afterwards."""
        parallel = self.build(stage)
        self.train(parallel, [0])
        model, optimizer = self.states(parallel)
        missing = {key: value for key, value in model.items() if key != "inner.bias"}
        bad = [
            (parallel.load_model, missing | {"extra": torch.zeros(1), "outer.weight": torch.zeros(5, WIDTH)}),
            (parallel.load_optimizer, {**optimizer, "param_groups": optimizer["param_groups"][:1]}),
            (parallel.load_optimizer, {**optimizer, "state": {n: {**m, "step": torch.tensor(1.0)} for n, m in optimizer["state"].items()}}),
            (parallel.load_optimizer, {**optimizer, "state": {n: {k: v[:1] for k, v in m.items()} for n, m in optimizer["state"].items()}}),
        ]
        said = []
        for load, state in bad:
            try:
                load(state)
            except (RuntimeError, ValueError) as error:
                said.append(f"{type(error).__name__}: {error}")
        before = self.states(parallel)
        adamw = self.build(stage, "adamw")
        try:
            adamw.load_optimizer(optimizer)
        except (KeyError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
        self.results[f"{stage} refusals"] = {"said": said, "states": [(model, optimizer), before]}

    def check_wire(self, stage, wire):
        parallel = self.build(stage, wire=wire)
        self.train(parallel, range(3))
        self.results[f"{stage} {wire}"] = {"end": self.states(parallel)}

    def check_config(self, name, stage, zero):
        path = self.folder / f"{name}.json"
        if self.rank == 0:
            path.write_text(json.dumps({"zero_optimization": {"stage": stage, **zero}, "steps_per_print": 1}), encoding="utf-8")
        self.communicator.barrier()
        parallel = self.build(None, config=str(path), accumulation=3)
        self.train(parallel, accumulation=3)
        middle = self.share(self.states(parallel))
        again = self.build(None, config=str(path), accumulation=3, seed=5)
        again.load_model(middle[0])
        again.load_optimizer(middle[1])
        self.results[name] = {"end": self.states(parallel), "loaded": self.states(again)}

    def continue_from(self, name, stage, optimizer, state, steps):
        parallel = self.build(stage, optimizer, seed=7)
        parallel.load_model(state[0])
        parallel.load_optimizer(state[1])
        norms = [update.norm for update in self.train(parallel, steps)]
        parallel.module.eval()
        with torch.no_grad():  # rank 0's share alone, on all ranks: a sharded model communicates
            evaluated = float(parallel.module(*batch(0)).loss)
        parallel.module.train()
        self.results[name] = {"norms": norms, "end": self.states(parallel), "evaluated": evaluated}

    def share(self, states):
        """Rank 0's states on all ranks, through a file, as a checkpoint goes."""
        path = self.folder / f"shared_{self.world}.pt"
        if self.rank == 0:
            torch.save(states, path)
        self.communicator.barrier()
        loaded = torch.load(path, weights_only=True)
        self.communicator.barrier()
        return loaded


VARIANTS = {
    "small buckets": (2, {"reduce_bucket_size": 40, "allgather_bucket_size": 40, "overlap_comm": True}),
    "other order": (1, {"round_robin_gradients": True, "parameter_alignment": True, "overlap_comm": True}),
    "not contiguous": (2, {"contiguous_gradients": False, "reduce_scatter": False, "round_robin_gradients": True}),
    "nothing whole": (3, {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 40, "stage3_prefetch_bucket_size": 0}),
    "one by one": (3, {"contiguous_gradients": False, "overlap_comm": False, "reduce_scatter": False}),
}


def world_of_two(rank):
    for stage, optimizer in WAYS:
        rank.check_equal(stage, optimizer)
    for stage in (0, 1, 2, 3):
        rank.check_accumulation(stage)
        rank.check_bad_step(stage)
        rank.check_wire(stage, WIRES[stage])
    for stage in (0, 3):
        rank.check_precision(stage)
    for name, (stage, zero) in VARIANTS.items():
        rank.check_config(name, stage, zero)


def world_of_four(rank):
    """From the unsharded state after three steps; and at stage 3 once more from the middle, to the last bit."""
    states = torch.load(rank.folder / "unsharded.pt", weights_only=True)
    for stage, optimizer in FOUR:
        rank.continue_from(f"{stage} {optimizer}", stage, optimizer, states[optimizer], range(3, STEPS))
    rank.continue_from("half", 3, "lamb", states["lamb"], [3])
    rank.continue_from("halves", 3, "lamb", rank.share(rank.results["half"]["end"]), [4])


def world_of_one(rank):
    for stage in (0, 2, 3):
        rank.check_accumulation(stage)
        rank.check_refusals(stage)
    rank.check_huge_step(2)


def main(folder):
    torch.set_num_threads(1)
    gc.freeze()  # stage 3 collects garbage at every start, among all that was imported
    rank = Rank(Path(folder))
    {1: world_of_one, 2: world_of_two, 4: world_of_four}[rank.world](rank)
    if rank.rank == 0:
        torch.save(rank.results, rank.folder / f"world_{rank.world}.pt")
    rank.communicator.barrier()
    os._exit(0)  # without gloo's teardown, as berth's own ranks leave


def start_world(folder, size):
    port = free_port()
    variables = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**environment(), **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(outputs)
    return torch.load(folder / f"world_{size}.pt", weights_only=True), "".join(outputs)


# -- what the ranks found --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the ranks have: 16-bit products round differently when they are cut up for several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def references():
    """By optimizer: five steps in fp32 and in float64, with their gradient norms."""
    found = {}
    for optimizer in ("lamb", "adamw"):
        both = [Reference(optimizer, dtype) for dtype in (torch.float32, torch.float64)]
        found[optimizer] = [(reference, reference.run()) for reference in both]
    return found


def world(size, folder):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (pip install berth[deepspeed])")
    return start_world(folder, size)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return world(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return world(1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Continues from what unsharded optimizers wrote after three steps."""
    folder = tmp_path_factory.mktemp("four")
    states = {}
    for optimizer in ("lamb", "adamw"):
        reference = Reference(optimizer)
        reference.run(range(3))
        states[optimizer] = (reference.model.state_dict(), reference.optimizer.state_dict())
    torch.save(states, folder / "unsharded.pt")
    return world(4, folder)


def same_state(first, second):
    """Bitwise, with the same keys in the same order and the same types."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert list(first) == list(second)
        return all(same_state(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_state, first, second))
    return torch.equal(first, second) and first.dtype == second.dtype if isinstance(first, torch.Tensor) else first == second


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "optimizer"), WAYS)
def test_equals_the_unsharded_optimizer(two, references, stage, optimizer):
    found = two[0][f"{stage} {optimizer}"]
    (single, norms), (exact, exact_norms) = references[optimizer]
    model, state = found["end"]
    assert distance(model, single.model.state_dict()) < 2e-6
    assert distance(model, exact.model.state_dict()) < 2e-6
    assert found["norms"] == pytest.approx(norms, rel=1e-6) and found["norms"] == pytest.approx(exact_norms, rel=1e-6)
    assert min(norms) > CLIP, "clipping was meant to be active"
    whole = single.optimizer.state_dict()
    assert state["param_groups"] == whole["param_groups"]
    assert [list(moments) for moments in state["state"].values()] == [list(moments) for moments in whole["state"].values()]
    for number, moments in whole["state"].items():
        for key, value in moments.items():
            torch.testing.assert_close(state["state"][number][key], value, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "optimizer"), WAYS)
def test_state_is_that_of_one_process(two, stage, optimizer):
    """The format of a run without sharding, tied keys sharing their storage; before the first step, too."""
    found, fresh = two[0][f"{stage} {optimizer}"], Reference(optimizer)
    assert same_state(found["start"], (dict(fresh.model.state_dict()), fresh.optimizer.state_dict()))
    model = found["end"][0]
    assert model["decoder.weight"].data_ptr() == model["embedding.weight"].data_ptr()
    fresh.model.load_state_dict(found["middle"][0])
    fresh.optimizer.load_state_dict(copy.deepcopy(found["middle"][1]))  # torch's AdamW would go on in the tensors it is given
    assert fresh.run(range(3, STEPS)) == pytest.approx(found["norms"][3:], rel=1e-6)
    assert distance(model, fresh.model.state_dict()) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "optimizer"), WAYS)
def test_goes_on_to_the_last_bit(two, stage, optimizer):
    found = two[0][f"{stage} {optimizer}"]
    assert same_state(found["loaded"], found["middle"])
    assert same_state(found["resumed"], found["end"])
    assert not same_state(found["middle"], found["end"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_accumulation_and_loss_scale(two, references, stage):
    found = two[0][f"{stage} accumulation"]
    single, norms = references["lamb"][0]
    assert distance(found["end"][0], single.model.state_dict()) < 2e-6
    assert found["norms"] == pytest.approx(norms, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_a_gradient_that_is_not_finite_changes_nothing(two, stage):
    found = two[0][f"{stage} bad"]
    (nan, named), (infinite, also) = found["bad"]
    assert nan != nan and infinite == float("inf")
    assert (named, also) == ([("tiny.bias", "nan")], [("tiny.bias", "inf")])
    reference = Reference("lamb")
    norm = reference.run(range(3))[-1]
    assert found["last"] == (pytest.approx(norm, rel=1e-6), [])
    assert distance(found["end"][0], reference.model.state_dict()) < 2e-6
    assert [group["step"] for group in found["end"][1]["param_groups"]] == [3, 3]


@pytest.mark.slow
def test_a_gradient_too_large_for_deepspeeds_norm_changes_nothing(one):
    """Stages 1 and 2 add squares up in fp32; stage 3 on the CPU does not."""
    found = one[0]["2 huge"]
    assert found["update"] == (float("inf"), [])
    (model, optimizer), (model_after, optimizer_after) = found["states"]
    assert same_state(model, model_after) and same_state(optimizer["state"], optimizer_after["state"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", (0, 3))
def test_autocast_is_berths(two, stage):
    """DeepSpeed switches a caller's CUDA autocast off; the second entry of ``seen`` is under an answer as CUDA's would be."""
    found = two[0][f"{stage} autocast"]
    assert found["seen"] == [torch.bfloat16, torch.bfloat16]
    reference = Reference("lamb")
    reference.run(range(4), cut=2, autocast=torch.bfloat16)
    assert distance(found["end"][0], reference.model.state_dict()) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_sixteen_bits_on_the_wire(two, stage):
    reference = Reference("lamb")
    reference.run(range(3))
    error = distance(two[0][f"{stage} {WIRES[stage]}"]["end"][0], reference.model.state_dict())
    assert 1e-5 < error < {"fp16": 2e-3, "bf16": 2e-2}[WIRES[stage]]


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_settings_that_pass_change_nothing(two, references, name):
    found = two[0][name]
    assert distance(found["end"][0], references["lamb"][0][0].model.state_dict()) < 2e-6
    assert same_state(found["loaded"], found["end"])


@pytest.mark.slow
def test_deepspeed_is_quiet(two):
    assert [line for line in two[1].splitlines() if line.strip()] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", (0, 2, 3))
def test_one_process(one, references, stage):
    found = one[0][f"{stage} accumulation"]
    single, norms = references["lamb"][0]
    assert distance(found["end"][0], single.model.state_dict()) < 2e-6
    assert found["norms"] == pytest.approx(norms, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", (0, 2, 3))
def test_a_state_that_does_not_fit(one, stage):
    found = one[0][f"{stage} refusals"]
    model, groups, step, shape, other = found["said"]
    assert model.startswith("RuntimeError: ") and all(
        part in model for part in ("inner.bias is missing", "extra does not", "[5, 7], not [7, 5]")
    )
    assert "groups" in groups and all("embedding.weight is {" in said for said in (step, shape))
    assert other.startswith("ValueError: the saved optimizer state of embedding.weight")
    assert same_state(*found["states"])


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "optimizer"), FOUR)
def test_goes_on_with_more_processes(four, references, stage, optimizer):
    """One unsharded process's checkpoint, then four processes: some hold nothing of some tensors."""
    found = four[0][f"{stage} {optimizer}"]
    single, norms = references[optimizer][0]
    assert distance(found["end"][0], single.model.state_dict()) < 2e-6
    assert found["norms"] == pytest.approx(norms[3:], rel=1e-6)
    with torch.no_grad():
        assert found["evaluated"] == pytest.approx(float(single.model(*batch(0)).loss), rel=1e-5)


@pytest.mark.slow
def test_four_processes_go_on_to_the_last_bit(four):
    assert same_state(four[0]["halves"]["end"], four[0]["3 lamb"]["end"])


# -- pieces, without DeepSpeed ---------------------------------------------------------------------------------------------------------


def test_equal_shares():
    layout, starts = equal_shares([torch.Size([2, 3]), torch.Size([1]), torch.Size([5])], [2, 1, 2], 3)
    assert layout.ranges == [[(0, 2), (0, 1), (0, 2)], [(2, 4), (1, 1), (2, 4)], [(4, 6), (1, 1), (4, 5)]]
    assert starts == [0, 2, 3]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_pieces_cover_every_element_once(world_size, stage):
    """Against a stand-in with ZeRO's names: another order than the numbers', gaps between tensors, padding at the end."""
    sizes = {"a": 31, "b": 5, "c": 1, "d": 64, "e": 2}
    tensors = [torch.arange(size, dtype=torch.float32) + 100 * number for number, size in enumerate(sizes.values())]
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in zip(sizes, tensors, strict=True)}
    for name, parameter in parameters.items():
        parameter.partition_numel = lambda name=name: -(-sizes[name] // world_size)
    held = [[parameters[name] for name in "db"], [parameters[name] for name in "cae"]]
    offsets = [[0, 64], [0, 8, 40]]
    lengths = [-(-69 // world_size), -(-42 // world_size)]
    if stage == 3:
        lengths = [sum(parameter.partition_numel() for parameter in group) for group in held]
    back = [torch.full_like(tensor, -1.0) for tensor in tensors]
    filled = 0
    for rank in range(world_size):
        flats = [torch.full((length,), -1.0) for length in lengths]
        zero = types.SimpleNamespace(
            fp32_partitioned_groups_flat=flats, single_partition_of_fp32_groups=flats, fp16_groups=held, round_robin_bit16_groups=held,
            round_robin_bit16_offsets=offsets, optimizer=types.SimpleNamespace(param_groups=[{}, {}]),
        )  # fmt: skip
        place = types.SimpleNamespace(rank=rank, world_size=world_size)
        found = find_partitions(zero, stage, list(parameters.values()), [tensor.shape for tensor in tensors], place)
        found.take(tensors, flats)
        for number, (piece, (low, high)) in enumerate(zip(found.pieces(flats), found.held, strict=True)):
            assert piece.numel() == high - low and bool((back[number][low:high] == -1).all())
            back[number][low:high] = piece
        filled += sum(int((flat != -1).sum()) for flat in flats)
        listed = [(index, *segment) for index, flat in enumerate(flats) for segment in found.segments()[flat]]
        assert sorted((number, index, length) for index, _, length, number in listed) == [
            (number, found.places[number][0], high - low) for number, (low, high) in enumerate(found.held)
        ]
        assert all(
            torch.equal(flats[index][start : start + length], found.pieces(flats)[number]) for index, start, length, number in listed
        )
    assert all(torch.equal(first, second) for first, second in zip(back, tensors, strict=True))
    assert filled == sum(sizes.values())


# -- configuration, without DeepSpeed --------------------------------------------------------------------------------------------------

RUN = Run(stage=None, micro_batch=4, accumulation=2, world_size=3, max_grad_norm=1.0, wire="fp32", parameters=1000)


def test_berths_own_configuration():
    assert check_config("", RUN) == check_config(None, RUN) == {
        "train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 0.0,
        "communication_data_type": "fp32", "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "prescale_gradients": False, "zero_optimization": {"reduce_bucket_size": 50_000_000, "stage": 1},
    }  # fmt: skip
    assert check_config(None, dataclasses.replace(RUN, stage=2))["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("stage", range(4))
def test_sixteen_bits_are_divided_before_they_are_added(stage):
    config = check_config(None, dataclasses.replace(RUN, stage=stage, wire="fp16"))
    assert config["communication_data_type"] == "fp16" and config["prescale_gradients"] is (stage < 3)
    assert config["zero_optimization"].get("reduce_scatter", True) is (stage != 2)


def test_what_agrees_or_is_harmless_passes(tmp_path):
    given = {
        "train_batch_size": 24, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
        "steps_per_print": 50, "wall_clock_breakdown": True, "fp16": {"enabled": False, "loss_scale": 0}, "bf16": {"enabled": "auto"},
        "prescale_gradients": False, "optimizer": "auto",
        "zero_optimization": {
            "stage": 3, "overlap_comm": True, "reduce_bucket_size": 5e6, "stage3_prefetch_bucket_size": "auto", "sub_group_size": 1e9,
            "offload_optimizer": {"device": "none"}, "zero_hpz_partition_size": 1, "contiguous_gradients": True,
        },
    }  # fmt: skip
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    config = check_config(str(path), dataclasses.replace(RUN, stage=3))
    assert config == check_config(given, RUN)
    assert config["zero_optimization"] == {
        "reduce_bucket_size": 5e6,
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "contiguous_gradients": True,
        "stage": 3,
    }
    assert config["steps_per_print"] == 50 and config["wall_clock_breakdown"] is True
    assert not {"fp16", "bf16", "optimizer"} & set(config)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimizer": {"type": "Lamb"}}, "use --optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "--lr_schedule"),
        ({"fp16": {"enabled": True}}, "--precision fp16"),
        ({"bf16": {"enabled": True}}, "--precision bf16"),
        ({"amp": {"enabled": True}}, "--precision fp16"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "--reduce_dtype"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "summed in fp32"),
        ({"activation_checkpointing": {"partition_activations": True}}, "--checkpoint_activations"),
        ({"tensor_parallel": {"autotp_size": 2}}, "splits the model"),
        ({"progressive_layer_drop": {"enabled": True}}, "changes what is trained"),
        ({"train_batch_size": 8}, "contradicts 24 (--train_batch_size 8 a process on 3 processes)"),
        ({"train_micro_batch_size_per_gpu": True}, "contradicts 4"),
        ({"gradient_accumulation_steps": 4}, "contradicts 2 (--gradient_accumulation_steps)"),
        ({"gradient_clipping": 0.5}, "--max_grad_norm"),
        ({"communication_data_type": "bf16"}, "--reduce_dtype"),
        ({"prescale_gradients": True}, "averages gradients itself"),
        ({"gradient_clippping": 1.0}, "did you mean gradient_clipping?"),
        ({"something": 1}, "something is not known"),
        ({"zero_optimization": 2}, "must be an object"),
        ({"zero_optimization": {"stage": 4}}, "one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, "one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": [1]}}, "one of 0, 1, 2, 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "do not reach"),
        ({"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/x"}}}, "do not reach"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "ZeRO++"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "a few bits"),
        ({"zero_optimization": {"mics_shard_size": 4}}, "MiCS"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "not finite"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 999}}, "below the model's 1000 parameters"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean zero_optimization.overlap_comm?"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, "true or false"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "number of elements"),
        ({"zero_optimization": {"allgather_bucket_size": "5e8"}}, "number of elements"),
    ],
)
def test_what_is_refused(given, said):
    with pytest.raises(ConfigError) as error:
        check_config(given, RUN)
    assert said in str(error.value) and error.value.exit_code == 2
    assert next(iter(given)) in str(error.value)


def test_all_that_is_wrong_is_said_at_once():
    given = {"optimizer": {}, "scheduler": {"type": "x"}, "fp16": {"enabled": True}, "zero_optimization": {"stage": 1, "zenflow": {"a": 1}}}
    with pytest.raises(ConfigError) as error:
        check_config(given, dataclasses.replace(RUN, stage=2))
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "zero_optimization.stage 1 contradicts --deepspeed_zero_stage 2; make them equal or drop one", "scheduler", "fp16", "zero_optimization.zenflow",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "a is there twice"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage is there twice"),
        ("{'a': 1}", "is not JSON"),
        ("[1]", "holds a list"),
        (None, "No such file"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, said):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as error:
        check_config(path, RUN)
    assert str(path) in str(error.value)


def test_the_page_is_about_keys_that_exist():
    """Every key of docs/deepspeed.md's table of refusals is refused."""
    rows = [
        line.split("|")[1:3] for line in (ROOT / "docs" / "deepspeed.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    keys = [(cell, key) for cell, _ in rows for key in re.findall(r"`([\w.]+)`", cell)]
    assert len(keys) > 25
    for cell, key in keys:
        nested = "zero_optimization." in cell and key != "aio"
        value = {"optimizer_stays": 1} if key not in ("zero_optimization.sub_group_size",) else 5
        inner = {key.removeprefix("zero_optimization."): value}
        with pytest.raises(ConfigError, match=key) as error:
            check_config({"zero_optimization": inner} if nested else inner, dataclasses.replace(RUN, stage=3))
        assert "not known" not in str(error.value)


def fake_deepspeed(version="0.19.8", accelerator="cpu"):
    device = types.SimpleNamespace(device_name=lambda: accelerator)
    return types.SimpleNamespace(
        __version__=version,
        accelerator=types.SimpleNamespace(get_accelerator=lambda: device),
        ops=types.SimpleNamespace(__compatible_ops__={}),
    )


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (ModuleNotFoundError("No module named 'deepspeed'"), r"pip install berth\[deepspeed\].*--shard zero1"),
        (RuntimeError("CUDA_HOME does not exist"), "CUDA_HOME"),
        (fake_deepspeed("0.18.9"), "0.18.9"),
        (fake_deepspeed("0.20.0+abc"), "0.20.0"),
        (fake_deepspeed(accelerator="cuda"), "imported for cuda"),
    ],
)
def test_deepspeed_that_cannot_be_used(monkeypatch, found, said):
    def load(name):
        assert (name, os.environ["DS_ACCELERATOR"]) == ("deepspeed", "cpu")
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.setattr(ds_engine, "importlib", types.SimpleNamespace(import_module=load))
    with pytest.raises(ConfigError, match=said):
        ds_engine.import_deepspeed(torch.device("cpu"))


def test_a_usable_deepspeed_compiles_nothing(monkeypatch):
    module = fake_deepspeed("0.19.12+gabc")
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.setattr(ds_engine, "importlib", types.SimpleNamespace(import_module=lambda name: module))
    assert ds_engine.import_deepspeed(torch.device("cpu")) is module
    assert module.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}


if __name__ == "__main__":
    main(sys.argv[1])
