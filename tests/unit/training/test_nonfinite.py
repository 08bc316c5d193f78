"""Gradients that are not finite: found in any rank's piece, named alike on all ranks, told in few words."""

import math

import pytest
import torch

from berth.training.nonfinite import describe, nonfinite_names

INF, NAN = math.inf, math.nan


def alone(counts):
    return counts


def test_nan_wins_over_infinity_and_order_is_kept():
    named = [
        ("good", torch.ones(3, 2)),
        ("minus", torch.tensor([1.0, -INF])),
        ("both", torch.tensor([[INF], [NAN]])),
        ("huge", torch.full((1000,), 3e38)),  # its 2-norm overflows, its values do not
        ("nan", torch.tensor(NAN)),
        ("empty", torch.empty(0, 4)),
        ("nothing", None),
        ("half", torch.tensor([60000.0, INF], dtype=torch.float16)),
        ("bfloat", torch.tensor([3e38], dtype=torch.bfloat16)),
    ]
    assert nonfinite_names(named, alone) == [("minus", "inf"), ("both", "nan"), ("nan", "nan"), ("half", "inf")]


def test_nothing_to_look_at():
    assert nonfinite_names([], lambda counts: pytest.fail("there is nothing to add up")) == []
    assert nonfinite_names([("a", None), ("b", torch.empty(0))], alone) == []


def test_ranks_with_different_pieces_agree():
    """Three ranks hold pieces of four tensors; what each would send is caught, and each is answered with the sum."""
    pieces = [
        [("a", torch.tensor([1.0])), ("b", None), ("c", torch.tensor([INF, 1.0])), ("d", torch.empty(0))],
        [("a", torch.empty(0)), ("b", torch.tensor([INF])), ("c", torch.tensor([NAN])), ("d", torch.tensor([0.0]))],
        [("a", None), ("b", torch.tensor([-INF])), ("c", None), ("d", None)],
    ]
    sent = []
    for own in pieces:
        nonfinite_names(own, lambda counts: sent.append(counts.clone()) or counts)
    assert [tuple(counts.shape) for counts in sent] == [(4, 2)] * 3 and {counts.dtype for counts in sent} == {torch.float32}
    total = torch.stack(sent).sum(0)
    for own in pieces:
        assert nonfinite_names(iter(own), lambda counts: total) == [("b", "inf"), ("c", "nan")]


def model_names(layers=24):
    inside = [
        f"bert.encoder.layer.{n}.{part}.{kind}" for n in range(layers) for part in ("attention", "output") for kind in ("weight", "bias")
    ]
    return ["bert.embeddings.word.weight", *inside, "bert.pooler.bias", "cls.bias"]


def test_consecutive_layers_are_folded():
    names = model_names()
    found = [(f"bert.encoder.layer.{n}.attention.weight", "nan") for n in (3, 4, 5, 6, 9, 11, 12, 23)]
    assert describe(found, names) == "bert.encoder.layer.{3-6,9,11-12,23}.attention.weight (8 of 99 tensors), all nan"


def test_the_limit_counts_groups_and_the_rest_is_counted():
    names = model_names()
    found = [(name, "nan") for name in names if ".layer." in name]
    assert describe(found, names, limit=1) == "bert.encoder.layer.{0-23}.attention.weight and 72 more of 99 tensors, all nan"
    assert describe(found, limit=1) == "bert.encoder.layer.{0-23}.attention.weight and 72 more, all nan"


def test_kinds_are_told_apart_where_they_differ():
    found = [("bert.encoder.layer.0.a.weight", "nan"), ("bert.encoder.layer.1.a.weight", "inf"), ("bert.encoder.layer.2.a.weight", "inf")]
    assert describe(found) == "bert.encoder.layer.0.a.weight (nan), bert.encoder.layer.{1-2}.a.weight (inf)"
    assert describe([("cls.bias", "inf")], ["cls.bias", "x"]) == "cls.bias (1 of 2 tensors), inf"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda name: True, "; every gradient is bad, so the loss or the forward pass was"),
        (lambda name: any(f".layer.{n}." in name for n in range(8)), "; layers 8-23 are finite, and the backward pass reaches what comes last first: it began in layer 7"),
        (lambda name: ".layer." in name and ".layer.23." not in name, "; layer 23 is finite, and the backward pass reaches what comes last first: it began in layer 22"),
        (lambda name: ".layer.23." in name or ".layer.2." in name, "all inf"),
        (lambda name: name.startswith("cls"), "inf"),
    ],
)  # fmt: skip
def test_where_it_began(bad, words):
    names = model_names()
    text = describe([(name, "inf") for name in names if bad(name)], names)
    assert text.endswith(words), text


def test_a_norm_that_overflows_alone_is_said_so():
    assert "norm is too large" in describe([])
