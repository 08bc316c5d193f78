"""The loss scale: backs off to its floor, grows, stays put when static, and is the same on all ranks."""

import json
import subprocess
import sys

import pytest
import torch

from berth.training.precision import LossScaler, make_precision
from tests.support import ROOT, environment


def test_dynamic_scale_has_a_floor_and_a_ceiling():
    scaler = LossScaler(scale=8.0, floor=2.0, ceiling=16.0, growth_interval=3)
    for expected in (4.0, 2.0, 2.0, 2.0):
        scaler.update(overflow=True)
        assert scaler.scale == expected
    seen = []
    for _ in range(12):
        scaler.update(overflow=False)
        seen.append(scaler.scale)
    assert seen == [2, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16, 16]


def test_growth_starts_again_after_an_overflow():
    scaler = LossScaler(scale=8.0, growth_interval=3)
    for overflow in (False, False, True, False, False):
        scaler.update(overflow)
    assert scaler.scale == 4.0
    scaler.update(False)
    assert scaler.scale == 8.0


def test_state_round_trip_and_static():
    scaler = LossScaler(scale=8.0)
    scaler.update(False)
    other = LossScaler()
    other.load_state_dict(scaler.state_dict())
    assert other == scaler
    static = LossScaler(scale=128.0, dynamic=False)
    static.update(True)
    static.load_state_dict({"scale": 2.0, "good_steps": 5})
    assert static.scale == 128.0


@pytest.mark.parametrize(
    ("name", "dtype", "scale"),
    [
        ("fp32", torch.float32, 1),
        ("tf32", torch.float32, 1),
        ("bf16", torch.bfloat16, 1),
        ("fp16", torch.float16, 1024),
        ("fp8", torch.bfloat16, 1),
    ],
)
def test_modes(name, dtype, scale):
    precision = make_precision(name, "cpu", loss_scale=0.0, init_loss_scale=1024.0, floor=1.0)
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert precision.scaler.scale == scale
    assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")
    make_precision("fp32", "cpu", 0.0, 1.0, 1.0)


def test_the_count_of_good_steps_begins_again_at_growth_and_survives_a_restart():
    scaler = make_precision("fp16", "cpu", 0.0, 64.0, 1.0, growth_interval=4).scaler
    seen = []
    for _ in range(10):
        scaler.update(overflow=False)
        seen.append((scaler.scale, scaler.good_steps))
        resumed = make_precision("fp16", "cpu", 0.0, 1.0, 1.0, growth_interval=4).scaler
        resumed.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
        assert resumed == scaler
        scaler = resumed
    assert seen == [(64, 1), (64, 2), (64, 3), (128, 0), (128, 1), (128, 2), (128, 3), (256, 0), (256, 1), (256, 2)]


def test_counts_beyond_the_interval_do_not_grow_the_scale_at_once():
    """Older checkpoints counted on at growth: 4100 good steps at an interval of 2000 mean 100 since the last growth."""
    scaler = make_precision("fp16", "cpu", 0.0, 1.0, 1.0).scaler
    scaler.load_state_dict({"scale": 64.0, "good_steps": 4100})
    for _ in range(1899):
        scaler.update(overflow=False)
    assert (scaler.scale, scaler.good_steps) == (64.0, 1999)
    scaler.update(overflow=False)
    assert (scaler.scale, scaler.good_steps) == (128.0, 0)


def test_a_static_scale_in_a_checkpoint():
    static = make_precision("fp16", "cpu", 512.0, 2.0**20, 1.0).scaler
    for overflow in (True, False):
        static.update(overflow)
    assert static.state_dict() == {"scale": 512.0, "good_steps": 0}
    dynamic = make_precision("fp16", "cpu", 0.0, 2.0**20, 1.0).scaler
    dynamic.load_state_dict(static.state_dict())
    dynamic.update(overflow=True)
    assert (dynamic.scale, dynamic.dynamic) == (256.0, True)


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp8"])
def test_modes_without_a_scale_keep_one(name):
    scaler = make_precision(name, "cpu", 0.0, 2.0**20, 1.0, growth_interval=1).scaler
    for overflow in (False, True, False):
        scaler.update(overflow)
    assert scaler.state_dict() == {"scale": 1.0, "good_steps": 0}
    make_precision("fp32", "cpu", 0.0, 1.0, 1.0)


RANK = """
import json, math, sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import optimization
from berth.training.nonfinite import nonfinite_names
from berth.training.precision import make_precision

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
model = DistributedDataParallel(nn.Linear(3, 1))
optimizer = optimization.Lamb(model.parameters(), lr=0.1)
scaler = make_precision("fp16", "cpu", 0.0, 1024.0, 1.0, growth_interval=3).scaler
bad_inputs = {(1, 2): math.inf, (0, 5): math.nan}
seen = []
for step in range(9):
    x = torch.full((2, 3), 1.0 + rank + step)
    x[0, 0] = bad_inputs.get((rank, step), 1.0)
    optimizer.zero_grad()
    (model(x).sum() * scaler.scale).backward()
    named = [(name, parameter.grad) for name, parameter in model.module.named_parameters()]
    norm = optimization.global_norm([gradient for _, gradient in named]) / scaler.scale
    overflow = not math.isfinite(norm)
    optimizer.step(grad_scale=scaler.scale, found_inf=overflow, grad_norm=norm)
    scaler.update(overflow)
    seen.append([scaler.scale, scaler.good_steps, optimizer.param_groups[0]["step"], nonfinite_names(named, lambda counts: counts)])

def all_reduce(counts):
    dist.all_reduce(counts)
    return counts

shards = [
    [("a", torch.tensor([math.nan])), ("b", None), ("c", torch.empty(0)), ("d", torch.ones(4))],
    [("a", torch.ones(2)), ("b", torch.tensor([math.inf, 0.0])), ("c", torch.empty(0)), ("d", None)],
][rank]
weights = [parameter.tolist() for parameter in model.parameters()]
print(json.dumps({"seen": seen, "shards": nonfinite_names(shards, all_reduce), "weights": weights}), flush=True)
dist.barrier()
"""


def test_one_ranks_infinity_is_skipped_by_all(tmp_path):
    """Rank 1 overflows at step 2, rank 0 at step 5: scale, counts, weights and names of bad tensors stay equal on both."""
    command = [sys.executable, "-c", RANK]
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment()}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], **options) for rank in range(2)]
    try:
        results = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert results[0] == results[1]
    scales = [(scale, good, steps) for scale, good, steps, _ in results[0]["seen"]]
    assert scales == [
        (1024, 1, 1), (1024, 2, 2), (512, 0, 2), (512, 1, 3), (512, 2, 4), (256, 0, 4), (256, 1, 5), (256, 2, 6), (512, 0, 7),
    ]  # fmt: skip
    names = [found for *_, found in results[0]["seen"]]
    assert names[2] == [["weight", "inf"]] and names[5] == [["weight", "nan"]]
    assert not any(found for step, found in enumerate(names) if step not in (2, 5))
    assert results[0]["shards"] == [["a", "nan"], ["b", "inf"]]
