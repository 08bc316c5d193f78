"""Dropout from 16 bits: its rate and scale, the same elements backward as forward, and nn.Dropout wherever it does not apply."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import modeling
from berth.kernels.dropout import DRAWS, FastDropout, replace


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_scale(kind, rate):
    torch.manual_seed(0)
    out = FastDropout(rate)(torch.ones(400, 1001, dtype=kind))
    dropped = round(rate * DRAWS) / DRAWS
    assert abs((out == 0).double().mean() - dropped) < 5 * (dropped * (1 - dropped) / out.numel()) ** 0.5
    assert out.dtype is kind and set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - dropped), dtype=kind).item()}


def test_every_element_is_drawn_by_itself():
    """Neighbours share a 64-bit draw; rows, columns and the four parts of a draw must not."""
    torch.manual_seed(1)
    kept = (FastDropout(0.3)(torch.ones(20000, 8)) != 0).double()
    assert (torch.corrcoef(kept.T) - torch.eye(8)).abs().max() < 0.04
    assert ((kept.mean(0) - 0.7).abs() < 0.02).all()
    assert abs(torch.corrcoef(torch.stack([kept[:-1].flatten(), kept[1:].flatten()]))[0, 1]) < 0.02


def test_the_backward_pass_drops_what_the_forward_pass_dropped():
    torch.manual_seed(2)
    x = torch.randn(7, 5, 3, dtype=torch.float64, requires_grad=True)
    out = FastDropout(0.4)(x)
    factor = torch.where(out == 0, 0.0, out / x).detach()
    slope = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, slope)
    torch.testing.assert_close(found, slope * factor)


def test_seeds_repeat_it_and_checkpointing_does():
    layer, x = FastDropout(0.2), torch.randn(64, 33, requires_grad=True)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(layer(x))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    grads = []
    for run in (lambda value: layer(value).square(), lambda value: checkpoint(lambda v: layer(v).square(), value, use_reentrant=False)):
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(run(x).sum(), x)[0])
    assert torch.equal(*grads)


def test_it_does_nothing_in_evaluation_or_at_rate_zero():
    x = torch.randn(9, 9)
    assert FastDropout(0.5).eval()(x) is x or torch.equal(FastDropout(0.5).eval()(x), x)
    assert torch.equal(FastDropout(0.0)(x), x)
    assert torch.equal(FastDropout(1.0)(x).ne(0), torch.zeros(9, 9).bool()) or FastDropout(1.0)(x).ne(0).double().mean() < 0.1


def test_what_is_not_finite_stays_so():
    """A NaN that is dropped must still be seen, or a step that has to be skipped would be taken."""
    torch.manual_seed(6)
    assert FastDropout(0.5)(torch.full((100,), torch.nan)).isnan().all()


def test_non_contiguous_and_empty_inputs():
    torch.manual_seed(7)
    x = torch.randn(6, 10).T
    out = FastDropout(0.5)(x)
    assert torch.equal(out[out != 0], (x * 2)[out != 0]) and FastDropout(0.5)(torch.empty(0, 4)).shape == (0, 4)


def test_inside_of_a_compiled_model_it_is_torchs():
    model = nn.Sequential(FastDropout(0.5))
    torch._dynamo.reset()
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(torch.ones(1000))
    assert set(out.unique().tolist()) == {0.0, 2.0}


def test_replacing_keeps_parameters_names_and_rates():
    config = modeling.BertConfig(vocab_size=96, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = modeling.BertForPreTraining(config).eval()
    before = dict(model.named_parameters())
    assert replace(model) == 1 + 2 * 2 and replace(model) == 0
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert {layer.p for layer in layers} == {config.hidden_dropout_prob} and not any(layer.training for layer in layers)
