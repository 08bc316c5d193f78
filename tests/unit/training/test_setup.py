"""What a run is made of: how it is spread, and whether all ranks begin with the same."""

import types

import pytest
import torch

from berth.training.setup import effective_sharding, weights_digest


def test_the_digest_of_weights_sees_every_bit_and_name():
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    same = {"b": torch.zeros(2, dtype=torch.bfloat16), "a": torch.arange(6.0).reshape(3, 2).reshape(2, 3)}
    assert weights_digest(weights) == weights_digest(same)
    turned = torch.arange(6.0).reshape(3, 2).t()  # not contiguous
    others = [
        {**weights, "b": torch.tensor([0.0, -0.0], dtype=torch.bfloat16)},
        {"a": weights["a"], "c": weights["b"]},
        {**weights, "a": turned},
    ]
    assert len({weights_digest(found) for found in (weights, *others)}) == 4


@pytest.mark.parametrize(("world", "deepspeed", "expected"), [(1, False, "none"), (2, False, "zero2"), (1, True, "deepspeed")])
def test_one_process_has_nothing_to_split(world, deepspeed, expected):
    options = types.SimpleNamespace(uses_deepspeed=deepspeed, sharding="deepspeed" if deepspeed else "zero2")
    assert effective_sharding(options, world) == expected
