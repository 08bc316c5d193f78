"""The fast path on a real GPU: every kernel against a reference that shares no code with it, whole steps against ``transformers``.

On a machine without one all of it is skipped; the same parts are tested on a CPU in tests/unit. Nothing here is timed.
"""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

import optimization
from berth.kernels import attention, cross_entropy, fp8
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

DEVICE = torch.device("cuda")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
}


def packed(lengths, heads, size, dtype, seed):
    """Query, key, value and an incoming gradient [T, N, D] as float64 of ``dtype``'s values, and the bounds of the sequences."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(sum(lengths), heads, size, generator=generator).to(dtype).double() for _ in range(4)]
    return tensors, torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "size"), [(2, 64), (3, 32), (16, 64)])
@pytest.mark.parametrize("together", [False, True], ids=["contiguous", "parts of one projection"])
def test_attention_agrees_with_a_softmax_in_float64(dtype, heads, size, together):
    """Ragged lengths of one and of several blocks, one of 1 and empty ones behind; result and all three gradients within the type's rounding."""
    assert attention.unsupported(DEVICE, dtype, size) is None
    lengths = [300, 257, 128, 97, 64, 33, 8, 1, 0, 0]
    (*values, grad), bounds = packed(lengths, heads, size, dtype, seed=1)
    reference = [value.clone().requires_grad_() for value in values]
    pieces = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        query, key, value = (tensor[start:end].transpose(0, 1) for tensor in reference)
        pieces.append((query @ key.transpose(1, 2) * size**-0.5).softmax(2) @ value)
    expected = torch.cat(pieces, 1).transpose(0, 1)
    wanted = [expected.detach(), *torch.autograd.grad(expected, reference, grad)]
    there = [value.to(DEVICE, dtype) for value in values]
    if together:
        there = [part.unflatten(1, (heads, size)) for part in torch.cat([part.flatten(1) for part in there], 1).chunk(3, 1)]
        assert not there[0].is_contiguous()
    there = [value.detach().requires_grad_() for value in there]
    result = attention.varlen_attention(*there, bounds.to(DEVICE), 300, 0.0)
    found = [result.detach(), *torch.autograd.grad(result, there, grad.to(DEVICE, dtype))]
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for name, one, other in zip(("result", "query", "key", "value"), found, wanted, strict=True):
        error = (one.double().cpu() - other).norm() / other.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


def test_dropout_of_attention_follows_the_seed_and_keeps_the_mean():
    """With equal scores and values of one the result of a row is the kept share over 1 - p, spread as a binomial's. Draws of 8 bits keep
    230 / 256 of p = 0.1, and 0.9983 is the mean; 1 would be twice as far away as is allowed."""
    heads, size, length, p = 16, 64, 128, 0.1
    query = torch.zeros(64 * length, heads, size, device=DEVICE, dtype=torch.bfloat16)
    value = torch.ones_like(query)
    bounds = torch.arange(0, 64 * length + 1, length, dtype=torch.int32, device=DEVICE)

    def run(seed):
        torch.manual_seed(seed)
        return attention.varlen_attention(query, query, value, bounds, length, p)[..., 0].double()

    first = run(5)
    assert torch.equal(first, run(5)) and not torch.equal(first, run(6))
    kept = (int((1 - p) * 255) + 1) / 256
    spread = (kept * (1 - kept) / length) ** 0.5 / (1 - p)
    assert abs(first.mean().item() - kept / (1 - p)) < 5 * spread / first.numel() ** 0.5 + 4e-4  # and the rounding to bfloat16
    assert first.std().item() == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loss_agrees_with_cross_entropy_in_float64(dtype):
    """More rows than one chunk would need, ignored labels among them: loss, hits and all gradients, by the kernels and no plain form."""
    assert cross_entropy.unsupported(DEVICE, dtype) is None
    generator = torch.Generator().manual_seed(0)
    rows, hidden, vocabulary = 5000, 128, 3001
    exact = [
        torch.randn(*shape, generator=generator) * scale
        for shape, scale in (((rows, hidden), 1.0), ((vocabulary, hidden), 0.1), ((vocabulary,), 0.1))
    ]
    exact = [value.to(dtype).double().requires_grad_() for value in exact]
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[::7] = -100
    logits = F.linear(*exact)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    wanted = torch.autograd.grad(expected, exact)
    there = [value.detach().to(DEVICE, dtype).requires_grad_() for value in exact]
    loss, correct = cross_entropy.linear_cross_entropy(*there, labels.to(DEVICE))
    found = torch.autograd.grad(loss, there)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-3}[dtype]  # fp32 products may be rounded to TF32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance / 10)
    assert abs(correct.item() - int((logits.argmax(1) == labels).sum())) <= 0.01 * rows
    for one, other in zip(found, wanted, strict=True):
        assert ((one.double().cpu() - other).norm() / other.norm()).item() < tolerance


def lambs():
    """Berth's Triton LAMB, and the one that torch's own kernels compute, over the same tensors of odd sizes."""
    triton_lamb = pytest.importorskip("berth.kernels.lamb", reason="Triton is not installed").TritonLamb
    generator = torch.Generator().manual_seed(3)
    shapes = [(513, 257), (1000,), (1,), (64, 64), (3, 5, 7)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    made = []
    for kind, options in ((triton_lamb, {}), (optimization.Lamb, {"foreach": True})):
        parameters = [torch.nn.Parameter(value.clone().to(DEVICE)) for value in values]
        groups = [{"params": parameters[:2], "weight_decay": 0.01}, {"params": parameters[2:], "weight_decay": 0.0}]
        made.append((parameters, kind(groups, lr=0.02, max_grad_norm=1.0, **options)))
    return made


def test_triton_lamb_takes_the_steps_of_the_plain_one():
    """Four clipped steps; then one whose gradient is not finite changes nothing and is taken back."""
    (ours, fast), (theirs, plain) = lambs()
    generator = torch.Generator().manual_seed(4)
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn(one.shape, generator=generator).to(DEVICE)
            one.grad = other.grad.clone()
        fast.step()
        plain.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=2e-6, atol=2e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(fast.state[one][key], plain.state[other][key], rtol=2e-5, atol=1e-9)
    before = [parameter.detach().clone() for parameter in ours]
    ours[0].grad[3, 4] = float("inf")
    fast.step()
    fast.undo_step()
    assert all(torch.equal(one, other) for one, other in zip(ours, before, strict=True))
    assert [group["step"] for group in fast.param_groups] == [4, 4]


def test_fp8_layers_work_where_the_hardware_has_them():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(f"{torch.cuda.get_device_name()} has no fp8 products (compute capability below 8.9)")
    assert fp8.unsupported(DEVICE) is None


@pytest.mark.parametrize(
    ("precision", "options", "used"),
    [
        ("bf16", "", ("unpad=True", "compiled=model", "fused_cross_entropy=True", "copies_ahead=1")),
        ("bf16", "--compile layers", ("compiled=layers",)),
        ("bf16", "--compile off --cuda_graphs", ("compiled=off", "cuda_graphs=True")),
        ("bf16", "--cuda_graphs", ("compiled=model", "cuda_graphs=True")),
        ("bf16", "--compile off --unpad off --fused_loss off --fused_qkv off --no_copy_ahead --optimizer_backend berth", ("unpad=False",)),
        ("fp16", "--compile off", ("unpad=True",)),
        ("tf32", "--compile off", ("unpad=False",)),
        ("fp8", "", ("fp8=True", "unpad=True", "compiled=model")),
    ],
)
def test_whole_steps_are_those_of_transformers(precision, options, used, tmp_path):
    """Losses and gradient norms of four LAMB steps without dropout, against the eager peer; and nothing has silently fallen back.

    With CUDA graphs the first steps run as written and the others are replays.
    """
    import gpu_pretrain

    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(f"{torch.cuda.get_device_name()} has no fp8 products (compute capability below 8.9)")
    pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES), encoding="utf-8")
    words = ["--model", tmp_path / "sizes.json", "--seq", 128, "--precision", precision, "--peer", "hf", f"--run_options={options}"]
    args = gpu_pretrain.parse_args([str(word) for word in (*words, "--device", DEVICE.type, "--micro_batch", 16, "--steps", 1)])
    found = gpu_pretrain.check_sides(gpu_pretrain.make_plan(args, tmp_path))
    ours = found["sides"]["berth"]
    assert all(part in ours["fast_path"] for part in used), ours["fast_path"]
    assert ours["optimizer"] == ("Lamb" if "--optimizer_backend berth" in options else "TritonLamb")
    assert ours["fp8_layers"] == (12 if precision == "fp8" else 0)
    if "--cuda_graphs" in options:
        assert ours["graphs"]["recorded"] > 0 and not ours["graphs"]["failed"]
    assert ours["losses"][-1] < ours["losses"][0] - 1e-3
