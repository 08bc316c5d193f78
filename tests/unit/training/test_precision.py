"""The loss scale: backs off to its floor, grows, and stays put when static."""

import pytest
import torch

from berth.training.precision import LossScaler, make_precision


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
    [("fp32", torch.float32, 1), ("tf32", torch.float32, 1), ("bf16", torch.bfloat16, 1), ("fp16", torch.float16, 1024)],
)
def test_modes(name, dtype, scale):
    precision = make_precision(name, "cpu", loss_scale=0.0, init_loss_scale=1024.0, floor=1.0)
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert precision.scaler.scale == scale
    assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")
    make_precision("fp32", "cpu", 0.0, 1.0, 1.0)
