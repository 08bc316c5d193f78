"""linear_cross_entropy against float64: torch's F.cross_entropy of F.linear, loss, hits and the gradients of all three inputs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters

from berth.kernels import cross_entropy
from berth.kernels.cross_entropy import linear_cross_entropy, rows_at_once, unsupported

REPO = Path(__file__).resolve().parents[3]
OP = torch.ops.berth.linear_cross_entropy.default


def make(rows, vocabulary=1000, size=16, dtype=torch.float32, seed=0, device="cpu"):
    """Leaf tensors hidden, weight, bias and labels, a third of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, size), (vocabulary, size), (vocabulary,))
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 1 / 3] = -100
    return *inputs, labels.to(device)


def reference(hidden, weight, bias, labels, ignored=-100, upstream=1.0):
    """Loss, hits and gradients in float64 of the values as given."""
    inputs = [x.detach().cpu().double().requires_grad_() for x in (hidden, weight, bias)]
    labels = labels.cpu()
    logits = F.linear(*inputs)
    loss = F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
    (loss * upstream).backward()
    counted = labels != ignored
    hits = int((logits.argmax(1) == labels)[counted].sum()) if logits.numel() else 0
    return loss.detach(), hits, [x.grad for x in inputs]


def relative(actual, expected):
    """Largest difference, relative to the largest number expected."""
    if not expected.numel():
        return 0.0
    return float((actual.detach().cpu().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def check(inputs, tolerance, loss_tolerance=1e-6, upstream=1.0, hits=True, **options):
    """Loss, hits and all gradients are within ``tolerance`` (relative) of the reference."""
    expected_loss, expected_hits, expected_gradients = reference(
        *inputs, upstream=upstream, **{k: v for k, v in options.items() if k == "ignored"}
    )
    loss, correct = linear_cross_entropy(*inputs, **options)
    (loss * upstream).backward()
    assert relative(loss, expected_loss) <= loss_tolerance
    assert loss.shape == correct.shape == () and correct.dtype == torch.int64
    if hits:
        assert int(correct) == expected_hits
    for x, expected in zip(inputs[:3], expected_gradients, strict=True):
        assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
        assert relative(x.grad, expected) <= tolerance


# ---------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("rows", [1, 3, 100, 1000])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_fp32_equals_float64_whatever_the_chunk(count, rows):
    check(make(count), 1e-5, rows=rows, upstream=0.37)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 70), vocabulary=st.integers(1, 300), size=st.integers(1, 20), rows=st.integers(1, 80), seed=st.integers(0, 99))
def test_any_shape_equals_float64(count, vocabulary, size, rows, seed):
    check(make(count, vocabulary, size, seed=seed), 1e-5, rows=rows, upstream=2.5)


def test_default_chunks_cover_all_rows():
    """More rows than a chunk has, not a multiple of it."""
    check(make(2 * rows_at_once("cpu") + 37, vocabulary=61), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_sixteen_bit_inputs_are_near_float64_of_the_rounded_values(dtype, tolerance):
    """Hits are not compared: logits rounded to 16 bits tie."""
    check(make(90, dtype=dtype), tolerance, loss_tolerance=tolerance / 10, upstream=0.5, rows=40, hits=False)


def test_fp16_keeps_gradients_smaller_than_fp16_has():
    """Probabilities of 1e-7, where fp16 has one digit at most, are right to three in the weight's gradient."""
    hidden, weight, bias, labels = make(64, vocabulary=2000, size=8, dtype=torch.float16)
    with torch.no_grad():
        hidden.abs_()
        weight.mul_(1e-3)
        bias.zero_()[0] = 16
        labels.clamp_(min=0, max=7)
    _, _, (_, expected, _) = reference(hidden, weight, bias, labels)
    d_weight = OP(hidden, weight, bias, labels, -100, 64, torch.float16, [False, True, False])[3] / cross_entropy._scale(torch.float16)
    assert relative(d_weight[8:], expected[8:]) < 2e-3


def test_fp16_weight_gradient_of_a_frequent_label_does_not_overflow():
    """A thousand rows with one label: the sum, times the scale of fp16 gradients, is above 65504."""
    hidden = torch.full((1000, 4), 2.0, dtype=torch.float16).requires_grad_()
    weight, bias = torch.zeros(50, 4, dtype=torch.float16, requires_grad=True), torch.zeros(50, dtype=torch.float16, requires_grad=True)
    check((hidden, weight, bias, torch.full((1000,), 3)), 2e-3, loss_tolerance=1e-3, hits=False)
    assert float(weight.grad[3, 0]) == pytest.approx(-1960, rel=1e-3)


def test_gradients_pass_a_numerical_check():
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (7, 4), (7,))]
    labels = torch.tensor([1, -100, 3, 6, 0])
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, labels, rows=2)[0] * 1.7, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_logits_stay_finite_and_exact(dtype):
    """Logits of 1e4: the loss of a wrong row is about 2e4, of a right one 0; gradients are 0 or 1."""
    hidden = torch.tensor([[100.0], [100.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[100.0], [-100.0], [0.0]], dtype=dtype, requires_grad=True)
    bias = torch.zeros(3, dtype=dtype, requires_grad=True)
    loss, correct = linear_cross_entropy(hidden, weight, bias, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4, rel=5e-3) and int(correct) == 1
    assert bias.grad.tolist() == [1.0, -1.0, 0.0]
    assert all(x.grad.isfinite().all() for x in (hidden, weight))


# ------------------------------------------------------------------------------------------------------- labels and hits


@pytest.mark.parametrize("count", [0, 1, 40])
def test_nothing_to_predict_is_zero_with_zero_gradients(count):
    hidden, weight, bias, labels = make(count)
    loss, correct = linear_cross_entropy(hidden, weight, bias, torch.full_like(labels, -100), rows=7)
    loss.backward()
    assert loss.item() == 0 and correct.item() == 0
    assert all(x.grad is not None and not x.grad.any() for x in (hidden, weight, bias))


def test_a_row_that_is_ignored_has_no_influence_even_if_it_is_not_finite():
    hidden, weight, bias, labels = make(6)
    labels[:] = torch.tensor([5, -100, 7, 8, -100, 9])
    loss, correct = linear_cross_entropy(hidden, weight, bias, labels)
    with torch.no_grad():
        hidden[1] = torch.inf
    other, other_correct = linear_cross_entropy(hidden, weight, bias, labels)
    other.backward()
    assert other.item() == loss.item() and other_correct.item() == correct.item()
    assert not hidden.grad[1].any() and hidden.grad[0].any()


def test_another_label_can_be_the_ignored_one():
    hidden, weight, bias, labels = make(50)
    check((hidden, weight, bias, labels.masked_fill(labels == -100, 7)), 1e-5, ignored=7, rows=13)


def test_of_equal_logits_the_first_counts():
    """Rows of equal logits: only label 0 is their argmax. A tie of 2 and 3 goes to 2, wherever the row is in its chunk."""
    weight = torch.zeros(5, 2)
    weight[2:4, 1] = 1.0
    hidden = torch.zeros(40, 2)
    hidden[:, 1] = torch.arange(40) % 2
    even, odd = torch.tensor([0, 1, 4, 0]), torch.tensor([2, 3, 0, 2])
    labels = torch.stack([even, odd], 1).flatten().repeat(5)
    assert int(linear_cross_entropy(hidden, weight, torch.zeros(5), labels, rows=9)[1]) == 20
    assert int((F.linear(hidden, weight).argmax(1) == labels).sum()) == 20


def test_hits_of_an_easy_problem():
    """Labels taken from the argmax but every fourth: exactly the others count."""
    hidden, weight, bias, _ = make(101)
    labels = F.linear(hidden, weight, bias).argmax(1)
    labels[::4] = (labels[::4] + 1) % 1000
    assert int(linear_cross_entropy(hidden, weight, bias, labels)[1]) == 101 - 26


# -------------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)])
def test_only_the_gradients_that_are_wanted_are_computed(wanted):
    inputs = make(30)
    _, _, expected = reference(*inputs)
    for x, want in zip(inputs[:3], wanted, strict=True):
        x.requires_grad_(want)
    loss, _ = linear_cross_entropy(*inputs, rows=11)
    loss.backward()
    for x, want, gradient in zip(inputs[:3], wanted, expected, strict=True):
        assert (x.grad is not None) == want
        assert not want or relative(x.grad, gradient) <= 1e-5
    outputs = OP(*inputs, -100, 11, torch.float32, list(wanted))
    assert [output.numel() > 0 for output in outputs[2:]] == list(wanted)


def test_without_gradients_only_the_loss_is_computed():
    inputs = make(30)
    with torch.no_grad():
        loss, correct = linear_cross_entropy(*inputs)
    expected, hits, _ = reference(*inputs)
    assert not loss.requires_grad and relative(loss, expected) <= 1e-6 and int(correct) == hits


def test_a_second_derivative_is_refused():
    hidden, weight, bias, labels = make(5)
    loss, _ = linear_cross_entropy(hidden, weight, bias, labels)
    (gradient,) = torch.autograd.grad(loss**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_backward_twice_gives_the_same():
    """The finished gradients are not changed by a backward pass."""
    hidden, weight, bias, labels = make(20, dtype=torch.float16)
    loss, _ = linear_cross_entropy(hidden, weight, bias, labels)
    first, second = (torch.autograd.grad(loss * 2, (hidden, weight, bias), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_tied_table_gets_both_gradients():
    table, ids = nn.Embedding(50, 8), torch.arange(12) % 5
    bias, labels = torch.zeros(50), torch.arange(12) + 20
    loss, _ = linear_cross_entropy(table(ids), table.weight, bias, labels)
    loss.backward()
    weight = table.weight.detach().double().requires_grad_()
    F.cross_entropy(F.linear(F.embedding(ids, weight), weight, bias.double()), labels, reduction="sum").backward()
    assert relative(table.weight.grad, weight.grad) <= 1e-5


def test_autocast_computes_in_16_bits_and_returns_fp32_gradients():
    """Against float64 of the inputs rounded to bf16, in which an fp32 bias stays as it is."""
    hidden, weight, bias, labels = make(60)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, bias, labels, rows=25)
    loss.backward()
    rounded = hidden.detach().bfloat16(), weight.detach().bfloat16(), bias
    expected_loss, _, expected = reference(*rounded, labels)
    assert loss.dtype == torch.float32 and relative(loss, expected_loss) <= 1e-3
    assert relative(loss, reference(hidden, weight, bias, labels)[0]) > 1e-6, "nothing was rounded"
    for x, gradient in zip((hidden, weight, bias), expected, strict=True):
        assert x.grad.dtype == torch.float32 and relative(x.grad, gradient) <= 2e-2


def test_autocast_leaves_float64_alone():
    inputs = make(10, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        check(inputs, 1e-12, loss_tolerance=1e-12)


def test_views_that_are_not_contiguous():
    hidden, weight, bias, labels = make(30)
    check(
        (hidden.detach().T.contiguous().T.requires_grad_(), weight.detach().T.contiguous().T.requires_grad_(), bias, labels), 1e-5, rows=8
    )


def test_mistakes_are_named():
    hidden, weight, bias, labels = make(4)
    with pytest.raises(ValueError, match="need \\[M, H\\], \\[V, H\\], \\[V\\]"):
        linear_cross_entropy(hidden, weight[:, :3], bias, labels)
    with pytest.raises(ValueError, match=r"need torch.int64 \[4\]"):
        linear_cross_entropy(hidden, weight, bias, labels.int())
    with pytest.raises(ValueError, match="one type outside of autocast"):
        linear_cross_entropy(hidden.bfloat16(), weight, bias, labels)
    with pytest.raises(ValueError, match="rows=0"):
        linear_cross_entropy(hidden, weight, bias, labels, rows=0)


# --------------------------------------------------------------------------------------------------- torch.library and compile


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False]])
def test_the_operation_is_registered_as_torch_wants_it(wanted):
    """Schema, fake implementation (also with symbolic sizes) and autograd."""
    inputs = make(9)
    for x, want in zip(inputs[:3], wanted, strict=True):
        x.requires_grad_(want)
    torch.library.opcheck(OP, (*inputs, -100, 4, torch.float32, wanted))


@pytest.mark.parametrize("autocast", [False, True])
def test_one_graph_serves_any_number_of_rows(autocast):
    """Compiled results equal eager ones; nothing breaks the graph, and M = 2, 9, 33, 300 need no second one."""
    torch._dynamo.reset()
    counters.clear()

    def step(hidden, weight, bias, labels):
        loss, correct = linear_cross_entropy(hidden * 2, weight, bias, labels)
        return loss / 3, correct

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    _, weight, bias, _ = make(1)
    for count in (9, 2, 33, 300):
        hidden, *_, labels = make(count)
        results = []
        for function in (step, compiled):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss, correct = function(hidden, weight, bias, labels)
            results.append((loss, correct, *torch.autograd.grad(loss, (hidden, weight, bias))))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-6, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


# ----------------------------------------------------------------------------------------------------------------- devices


def test_a_cpu_has_nothing_to_report_and_takes_no_kernel():
    assert unsupported(torch.device("cpu"), torch.bfloat16) is None
    assert all(cross_entropy._reasons(torch.device("cpu"), torch.bfloat16))


def test_a_trial_that_fails_gives_its_reason_in_a_line():
    """A CPU has no 16-bit product with an fp32 result: the trials raise, and what they raise is the reason."""
    for trial in (cross_entropy._try_product, cross_entropy._try_sum):
        reason = cross_entropy._reason(trial, torch.device("cpu"), torch.bfloat16)
        assert reason.startswith("NotImplementedError: ") and "\n" not in reason
    assert cross_entropy._reason(lambda *_: None, torch.device("cpu"), torch.bfloat16) is None


def test_a_kernel_that_is_wrong_fails_its_trial(monkeypatch):
    """The trial accepts the plain form in place of the kernel, and none that is wrong in loss, hits or gradients."""

    def wrong(index, amount):
        def reduce(*arguments):
            cross_entropy._reduce(*arguments)
            arguments[index].copy_(arguments[index] + amount)

        return reduce

    here = torch.device("cpu")
    monkeypatch.setattr(cross_entropy, "_reduce_triton", cross_entropy._reduce)
    cross_entropy._try_kernel(here, torch.bfloat16)
    for index, amount in ((0, 0.1), (4, 0.01), (5, True), (7, 0.1)):
        monkeypatch.setattr(cross_entropy, "_reduce_triton", wrong(index, amount))
        with pytest.raises(AssertionError):
            cross_entropy._try_kernel(here, torch.bfloat16)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton")
def test_the_kernel_passes_its_trial_in_tritons_interpreter():
    """The trial a GPU makes, for every type, on the CPU: in a process of its own, as Triton reads the switch when it is imported."""
    script = (
        "import torch; from berth.kernels import cross_entropy as c\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16): c._try_kernel(torch.device('cpu'), dtype)\n"
        "x = torch.randn(3, 50); kept = x.clone(); losses, hits = torch.empty(3), torch.empty(3, dtype=torch.bool)\n"
        "c._reduce_triton(x, torch.zeros(50), torch.tensor([1, -100, 3]), -100, losses, hits, False, torch.empty(0))\n"
        "assert torch.equal(x, kept) and losses[1] == 0 and losses[0] > 0\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), environment.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton")
def test_the_kernel_compiles_for_an_h200(tmp_path):
    """Triton's own compiler, for compute capability 9.0; logits are read and written 16 bytes at a time."""
    script = (
        "import triton\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource\n"
        "from berth.kernels.cross_entropy_triton import _rows_kernel\n"
        "types = dict(logits='*bf16', bias='*fp32', labels='*i64', losses='*fp32', hits='*u8', ignored='i32', scale='fp32')\n"
        "types.update(V='constexpr', GRADIENTS='constexpr', BLOCK='constexpr')\n"
        "aligned = {(index,): [['tt.divisibility', 16]] for index in range(5)}\n"
        "source = ASTSource(_rows_kernel, types, constexprs=dict(V=30528, GRADIENTS=True, BLOCK=4096), attrs=aligned)\n"
        "assembly = triton.compile(source, target=GPUTarget('cuda', 90, 32), options={'num_warps': 16}).asm['ptx']\n"
        "assert 'ld.global.v4' in assembly and 'st.global.v4' in assembly\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), environment.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("plain", [False, True], ids=["as probed", "plain"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_a_gpu_equals_float64(dtype, tolerance, plain, monkeypatch):
    """With whatever passed its trial, and with the plain form of everything."""
    if plain:
        monkeypatch.setattr(cross_entropy, "_reasons", lambda *_: cross_entropy._Reasons("test", "test", "test"))
    check(make(300, vocabulary=5003, dtype=dtype, device="cuda"), tolerance, loss_tolerance=tolerance / 10, rows=128, hits=False)
