"""berth/kernels/attention.py: attention of packed sequences against float64 and against torch's own, its dropout, and its life inside of torch.compile."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from berth.kernels import attention
from berth.kernels.attention import DRAWS, Block, probe, split, unsupported, varlen_attention

CPU = torch.device("cpu")
HEADS, SIZE = 3, 16
LENGTHS = (
    (7,),
    (1,),
    (16, 16, 16),
    (16, 9, 9, 1, 1, 1, 4, 0, 0),
    (0, 5, 0, 0, 5, 3),
    (0, 0),
    tuple(random.Random(0).randrange(0, 65) for _ in range(40)),
)


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def make(total: int, dtype: torch.dtype = torch.float64, heads: int = HEADS, size: int = SIZE, seed: int = 0) -> list[Tensor]:
    """Query, key, value as views of one projection, each a leaf, and a gradient for the output."""
    packed = torch.randn(total, 4, heads, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    query, key, value, grad = packed.unbind(1)
    return [*(x.detach().requires_grad_() for x in (query, key, value)), grad]


def plain(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float, factors: list[Tensor] | None = None) -> Tensor:
    """The formula, a sequence at a time in float64; ``factors`` [N, L, L] of each sequence multiply the probabilities."""
    parts = []
    for number, (q, k, v) in enumerate(zip(*(x.double().split(lengths) for x in (query, key, value)), strict=True)):
        probabilities = torch.softmax(torch.einsum("qnd,knd->nqk", q, k) * scale, -1)
        if factors is not None:
            probabilities = probabilities * factors[number]
        parts.append(torch.einsum("nqk,knd->qnd", probabilities, v))
    return torch.cat(parts)


def run(function: Callable[..., Tensor], *leaves_and_grad: Tensor) -> list[Tensor]:
    """The output and the gradients of all but the last argument, which is the gradient of the output."""
    *leaves, grad = leaves_and_grad
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 0.012), (torch.float16, 0.0015)]
)
def test_equals_the_formula(lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """Output and the three gradients against float64, without dropout, for lengths of all kinds; nothing is left out or read across sequences."""
    leaves = make(sum(lengths), dtype)
    cu_seqlens, scale = offsets(lengths), SIZE**-0.5
    got = run(lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, 64), *leaves)
    want = run(lambda q, k, v: plain(q, k, v, lengths, scale), *leaves)
    for name, a, b in zip(("output", "query", "key", "value"), got, want, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        # a sequence of one token has no gradient in query and key: what rounding leaves is compared with the size of the inputs
        assert (a.double() - b.double()).norm() <= tolerance * max(b.double().norm().item(), leaves[3].double().norm().item()), name


def test_sharp_attention_in_16_bits() -> None:
    """Scores of up to 16 in bf16: the softmax is of 32-bit scores. Measured 0.002 to 0.004; with scores rounded to bf16, 0.008 to 0.011."""
    lengths = (64,) * 4
    query, key, value, grad = make(256, torch.bfloat16)
    leaves = (query.detach() * 4).requires_grad_(), key, value
    got = run(lambda q, k, v: varlen_attention(q, k, v, offsets(lengths), 64), *leaves, grad)
    want = run(lambda q, k, v: plain(q, k, v, lengths, SIZE**-0.5), *leaves, grad)
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 0.006


@pytest.mark.parametrize("size", [1, 8, 40])
def test_scale_and_head_sizes(size: int) -> None:
    """Another scale, one head, and head sizes that are no power of two."""
    lengths = (5, 5, 2)
    leaves = make(12, heads=1, size=size)
    got = run(lambda q, k, v: varlen_attention(q, k, v, offsets(lengths), 5, scale=0.7), *leaves)
    want = run(lambda q, k, v: plain(q, k, v, lengths, 0.7), *leaves)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, want, strict=True))


def test_equals_torch_on_padded_sequences() -> None:
    """torch's attention with a mask, on the same sequences padded, in float32."""
    lengths, longest = (9, 9, 4, 1), 9
    leaves = make(sum(lengths), torch.float32)
    where = (torch.arange(longest) < torch.tensor(lengths)[:, None]).flatten().nonzero().squeeze(1)

    def padded(*packed: Tensor) -> Tensor:
        q, k, v = (x.new_zeros(len(lengths) * longest, HEADS, SIZE).index_copy(0, where, x) for x in packed)
        q, k, v = (x.unflatten(0, (-1, longest)).transpose(1, 2) for x in (q, k, v))
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)[where]

    got = run(lambda q, k, v: varlen_attention(q, k, v, offsets(lengths), longest), *leaves)
    assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(got, run(padded, *leaves), strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p: float) -> None:
    """Gradients against finite differences, with the same draws each time, through a projection whose parts are strided views."""
    packed = make(11, heads=2, size=4)[0].detach()
    packed = torch.stack([packed, packed.roll(1, 0), packed.roll(2, 1)], 1).requires_grad_()

    def function(packed: Tensor) -> Tensor:
        torch.manual_seed(3)
        return varlen_attention(*packed.unbind(1), offsets((4, 4, 1, 2, 0)), 4, dropout_p)

    assert torch.autograd.gradcheck(function, (packed,))


def test_blocks() -> None:
    """Blocks cover every token once and in order, never mix lengths, keep to the limit unless they are one sequence, and are no more than they must be."""
    assert list(split([0, 4, 8, 12, 13, 13, 14, 18], 32)) == [Block(0, 2, 4), Block(8, 1, 4), Block(12, 2, 1), Block(14, 1, 4)]
    assert list(split([0, 9, 18], 1)) == [Block(0, 1, 9), Block(9, 1, 9)]
    assert list(split([0, 0, 0], 100)) == []
    draw = random.Random(1)
    for _ in range(50):
        ends = [0]
        for _ in range(draw.randrange(1, 20)):
            ends.append(ends[-1] + draw.choice((0, 1, 3, 3, 8)))
        covered = 0
        for start, sequences, length in split(ends, 30):
            assert start == covered and (sequences == 1 or sequences * length**2 <= 30)
            assert set(range(start, start + sequences * length, length)) <= set(ends)
            covered += sequences * length
        assert covered == ends[-1]


def test_the_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence at a time gives what blocks give."""
    leaves = make(64)
    function = lambda q, k, v: varlen_attention(q, k, v, offsets((8,) * 8), 8)  # noqa: E731
    want = run(function, *leaves)
    monkeypatch.setattr(attention, "BLOCK_BYTES", 1)
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(run(function, *leaves), want, strict=True))


def keep_factors(lengths: tuple[int, ...], dropout_p: float, seed: int, query: Tensor, key: Tensor) -> list[Tensor]:
    """[N, L, L] of each sequence: what dropout multiplies the probabilities by, read off with unit vectors as values."""
    longest = max(lengths)
    units = torch.cat([torch.eye(longest)[:length] for length in lengths])[:, None].expand(-1, query.shape[1], -1).to(query.dtype)
    pad = lambda x: F.pad(x.detach(), (0, longest - x.shape[-1]))  # noqa: E731
    arguments = (pad(query), pad(key), units, offsets(lengths), longest)
    scale = query.shape[-1] ** -0.5
    torch.manual_seed(seed)
    dropped = varlen_attention(*arguments, dropout_p, scale)
    ratio = dropped.double() / varlen_attention(*arguments, 0.0, scale).double()
    return [part[:, :, : part.shape[0]].transpose(0, 1) for part in ratio.split(lengths)]


@pytest.mark.parametrize("dropout_p", [0.003, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_keeps_the_right_share(dropout_p: float, dtype: torch.dtype) -> None:
    """262 thousand draws: the kept share within five standard deviations, of what is kept each multiplied by its inverse, and neighbours along each
    dimension independent."""
    lengths = (64,) * 16
    zeros = torch.zeros(1024, 4, 64, dtype=dtype)
    factors = torch.stack(keep_factors(lengths, dropout_p, 0, zeros, zeros))
    share = 1 - round(dropout_p * DRAWS) / DRAWS
    assert abs(share - (1 - dropout_p)) <= 0.5 / DRAWS
    kept = factors > 0
    assert torch.allclose(factors[kept], torch.tensor(1 / share, dtype=torch.float64), rtol=torch.finfo(dtype).eps)
    spread = (share * (1 - share)) ** 0.5
    assert abs(kept.double().mean() - share) < 5 * spread / kept.numel() ** 0.5
    centred = kept.double() - share
    for dim, shift in ((0, 1), (1, 1), (2, 1), (3, 1), (3, 2), (3, 4)):
        assert abs((centred * centred.roll(shift, dim)).mean()) < 5 * spread**2 / kept.numel() ** 0.5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 0.015)])
def test_backward_drops_what_forward_dropped(dtype: torch.dtype, tolerance: float) -> None:
    """With the mask read off, output and gradients are those of the formula with that mask."""
    lengths = (16, 16, 16, 11, 5, 5, 1, 0)
    leaves = make(sum(lengths), dtype)
    factors = keep_factors(lengths[:-1], 0.25, 5, *leaves[:2])
    assert 0 < sum((f == 0).sum().item() for f in factors) < sum(f.numel() for f in factors)
    factors = [(f > 0).double() / (1 - round(0.25 * DRAWS) / DRAWS) for f in factors]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        return varlen_attention(q, k, v, offsets(lengths), 16, 0.25)

    want = run(lambda q, k, v: plain(q, k, v, lengths[:-1], SIZE**-0.5, factors), *leaves)
    for a, b in zip(run(function, *leaves), want, strict=True):
        assert relative(a, b) < tolerance


def test_seeds_decide() -> None:
    """The same seed gives the same bits, the next draws others; without gradients the draws are the same as with; the backward pass draws nothing."""
    leaves = make(40, torch.float32)
    function = lambda q, k, v: varlen_attention(q, k, v, offsets((20, 20)), 20, 0.1)  # noqa: E731
    torch.manual_seed(1)
    first = run(function, *leaves)
    state = torch.get_rng_state()
    other = function(*leaves[:3])
    torch.manual_seed(1)
    again = run(function, *leaves)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other)
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(function(*leaves[:3]), first[0])


def test_backward_twice() -> None:
    """A second backward pass through a kept graph gives the same: what is saved stays as it was."""
    query, key, value, grad = make(24, torch.float32)
    out = varlen_attention(query, key, value, offsets((12, 12)), 12, 0.2)
    first = torch.autograd.grad(out, (query, key, value), grad, retain_graph=True)
    second = torch.autograd.grad(out, (query, key, value), grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_dropout(use_reentrant: bool) -> None:
    """Activations computed again in the backward pass have the mask of the first time."""
    leaves = make(30, torch.float32)
    function = lambda q, k, v: varlen_attention(q, k, v, offsets((10, 10, 10)), 10, 0.3)  # noqa: E731
    torch.manual_seed(2)
    want = run(function, *leaves)
    torch.manual_seed(2)
    for x in leaves[:3]:
        x.grad = None
    out = checkpoint(function, *leaves[:3], use_reentrant=use_reentrant)
    torch.rand(7)
    out.backward(leaves[3])
    got = [out.detach(), *(x.grad for x in leaves[:3])]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_not_a_number_is_not_dropped() -> None:
    """A query that is NaN gives an output that is NaN, in the whole row and only there, although dropout looks at signs."""
    query, key, value, _ = (x.detach() for x in make(20, torch.float32))
    query[3] = float("nan")
    query[4] = -query[3]
    for seed in range(20):
        torch.manual_seed(seed)
        out = varlen_attention(query, key, value, offsets((5,) * 4), 5, 0.1)
        assert out[3:5].isnan().all() and not out[:3].isnan().any() and not out[5:].isnan().any()


def test_autocast() -> None:
    """Under autocast the op takes the 16-bit projections as they are, the backward pass outside of autocast likewise; gradients fit float64."""
    torch.manual_seed(0)
    lengths = (12, 12, 3)
    linear = torch.nn.Linear(32, 96)
    x = torch.randn(27, 32)

    def heads(projected: Tensor) -> tuple[Tensor, ...]:
        return projected.view(-1, 3, 2, 16).unbind(1)

    with torch.autocast("cpu", torch.bfloat16):
        out = varlen_attention(*heads(linear(x)), offsets(lengths), 12)
    assert out.dtype == torch.bfloat16
    got = torch.autograd.grad(out.float().square().sum(), (linear.weight, linear.bias))
    want_out = plain(*heads(linear.double()(x.double())), lengths, 16**-0.5)
    want = torch.autograd.grad(want_out.square().sum(), (linear.weight, linear.bias))
    assert relative(out, want_out) < 0.015
    assert all(a.dtype == torch.float32 and relative(a, b) < 0.03 for a, b in zip(got, want, strict=True))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Projected(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(-1, 3, 2, 16).unbind(1)
        return varlen_attention(query, key, value, cu_seqlens, 16, 0.1).flatten(1).square().sum()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    """torch.compile(fullgraph=True): one graph for six T and lengths, or for six sets of lengths of one T; values and gradients as without, with dropout."""
    torch.manual_seed(0)
    model = Projected()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    draw = random.Random(2)
    for _ in range(6):
        lengths = [draw.randrange(1, 17) for _ in range(4)] if dynamic else draw.sample((16, 9, 4, 2), 4)
        x, cu_seqlens = torch.randn(sum(lengths), 32), offsets((*lengths, 0))
        results = []
        for function in (model, compiled):
            torch.manual_seed(7)
            loss = function(x, cu_seqlens)
            results.append([loss.detach(), *torch.autograd.grad(loss, model.parameters())])
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*results, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_checkpointing_gives_the_same_dropout() -> None:
    """Computed again inside of a compiled backward pass, the mask is the first one: the op is declared as one that draws."""
    assert torch.Tag.nondeterministic_seeded in torch.ops.berth.varlen_attention.default.tags
    torch.manual_seed(0)
    model, x, cu_seqlens = Projected(), torch.randn(20, 32), offsets((11, 9))
    results = []
    for function in (model, torch.compile(lambda *a: checkpoint(model, *a, use_reentrant=False), fullgraph=True, backend="aot_eager")):
        torch.manual_seed(7)
        results.append(torch.autograd.grad(function(x, cu_seqlens), model.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("fresh_dynamo")
def test_opcheck() -> None:
    """torch's own check of both ops: schema, autograd registration, shapes without values, ahead-of-time compilation. Of sequences that fill what is
    saved: what is behind them has no value."""
    query, key, value, grad = make(24, torch.float32)
    cu_seqlens = offsets((8, 8, 8))
    arguments = (query, key, value, cu_seqlens, 8, 0.0, 0.25, True)
    assert set(torch.library.opcheck(torch.ops.berth.varlen_attention.default, arguments).values()) == {"SUCCESS"}
    with torch.no_grad():
        saved = torch.ops.berth.varlen_attention(*arguments)
    arguments = (grad, query.detach(), key.detach(), value.detach(), *saved, cu_seqlens, 8, 0.0, 0.25)
    assert set(torch.library.opcheck(torch.ops.berth.varlen_attention_backward.default, arguments).values()) == {"SUCCESS"}


def test_flash_kernels_are_called_as_torch_declares_them() -> None:
    """On tensors that are CUDA ones by name only: both calls fit the schema of this torch, and shapes and types are what the backward pass takes."""
    with FakeTensorMode(), torch.no_grad():
        packed = torch.empty(40, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
        query, key, value, grad = packed.unbind(1)
        cu_seqlens = torch.empty(6, dtype=torch.int32, device="cuda")
        out, sums, seed, offset = torch.ops.berth.varlen_attention(query, key, value, cu_seqlens, 16, 0.1, 0.125, True)
        grads = torch.ops.berth.varlen_attention_backward(grad, query, key, value, out, sums, seed, offset, cu_seqlens, 16, 0.1, 0.125)
        assert out.shape == query.shape and out.dtype == torch.bfloat16
        assert sums.shape == (2, 40) and sums.dtype == torch.float32
        assert all(x.device.type == "cuda" for x in (out, sums, seed, offset))
        assert all(x.shape == query.shape and x.dtype == torch.bfloat16 for x in grads)
        assert varlen_attention(query, key, value, cu_seqlens, 16, 0.1).shape == query.shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.zeros(4, 32)}, r"\[4, 32\].*same \[T, N, D\]"),
        ({"key": torch.zeros(5, 2, 16)}, r"\[5, 2, 16\].*same \[T, N, D\]"),
        ({"value": torch.zeros(4, 2, 16, dtype=torch.float64)}, "float64: must be one of"),
        ({name: torch.zeros(4, 2, 16, dtype=torch.int64) for name in ("query", "key", "value")}, "int64: must be one of"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens is torch.int64"),
        ({"cu_seqlens": torch.tensor([[0, 4]], dtype=torch.int32)}, r"cu_seqlens is torch.int32 \[1, 2\]"),
        ({"cu_seqlens": torch.tensor([0], dtype=torch.int32)}, r"cu_seqlens is torch.int32 \[1\]"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "from 0 to 3.*number of tokens, 4"),
        ({"cu_seqlens": torch.tensor([1, 4], dtype=torch.int32)}, "from 1 to 4"),
        ({"cu_seqlens": torch.tensor([0, 5, 4], dtype=torch.int32)}, "non-decreasing"),
        ({"max_seqlen": 3}, "max_seqlen 3.*longest sequence, 4"),
        ({"dropout_p": 1.0}, r"dropout_p 1\.0"),
        ({"dropout_p": -0.1}, r"dropout_p -0\.1"),
        ({"cu_seqlens": torch.empty(2, dtype=torch.int32, device="meta")}, "cpu, cpu, cpu, meta: must be one device"),
    ],
)
def test_bad_arguments(change: dict[str, object], words: str) -> None:
    """What does not fit raises ValueError with the name and the value."""
    zeros = torch.zeros(4, 2, 16)
    arguments = {"query": zeros, "key": zeros, "value": zeros, "cu_seqlens": offsets((2, 2)), "max_seqlen": 4, **change}
    if "max_seqlen" in change:
        arguments["cu_seqlens"] = offsets((4,))
    with pytest.raises(ValueError, match=words):
        varlen_attention(**arguments)


def test_unsupported_says_why() -> None:
    """CPU: all floating types; CUDA: what the flash kernels do not take is known without a device; elsewhere: no."""
    assert all(unsupported("cpu", dtype, 7) is None for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16))
    assert "int64" in unsupported("cpu", torch.int64, 64)
    assert "float32" in unsupported("cuda", torch.float32, 64)
    assert "not 12" in unsupported("cuda:0", torch.bfloat16, 12)
    assert "not 264" in unsupported("cuda", torch.float16, 264)
    assert "meta" in unsupported("meta", torch.float32, 64)
    if not torch.cuda.is_available():
        assert unsupported("cuda", torch.bfloat16, 64) == "there is no CUDA device"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probe_on_a_gpu(dtype: torch.dtype) -> None:
    """The flash kernels of this torch and this GPU pass the trial."""
    assert unsupported("cuda", dtype, 64) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probe_passes_and_leaves_no_trace(dtype: torch.dtype) -> None:
    """The trial that decides on a GPU finds nothing to object to in the CPU's kernel, and the generator stays where it was."""
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert probe.__wrapped__(CPU, dtype, 64) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_probe_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fails, is inaccurate, forgets dropout, draws anew in the backward pass or has a wrong gradient is refused, with the reason."""

    def reason() -> str:
        found = probe.__wrapped__(CPU, torch.bfloat16, 64)
        assert found is not None
        return found

    softmax, drop, backward = attention._softmax, attention._drop, attention._cpu_backward

    def raises(*_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image\nsecond line")

    def inaccurate(query: Tensor, key: Tensor, scale: float, out: Tensor) -> None:
        softmax(query, key, scale * (1.1 if query.dtype == torch.bfloat16 else 1), out)

    def draws_anew(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: Tensor, *rest: object) -> tuple[Tensor, ...]:
        saved = saved.abs()
        if rest[1]:
            drop(saved, DRAWS // 10)
        return backward(grad, query, key, value, saved, *rest)

    def wrong_gradient(grad: Tensor, query: Tensor, *rest: object) -> tuple[Tensor, ...]:
        query_grad, key_grad, value_grad = backward(grad, query, *rest)
        return query_grad, key_grad * (1.2 if query.dtype == torch.bfloat16 else 1), value_grad

    with monkeypatch.context() as patch:
        patch.setattr(attention, "_softmax", raises)
        assert reason() == "RuntimeError: CUDA error: no kernel image"
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_softmax", inaccurate)
        assert "the output differs" in reason()
    with monkeypatch.context() as patch:
        patch.setattr(attention, "dropped_draws", lambda _: 0)
        assert "dropout 0.1" in reason()
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_drop", lambda probabilities, dropped: drop(probabilities, DRAWS // 4))
        assert "dropout 0.1" in reason()
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_cpu_backward", draws_anew)
        assert "the backward pass drops other" in reason()
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_cpu_backward", wrong_gradient)
        assert "the key gradient differs" in reason()


def test_autocast_changes_nothing_inside():
    """float32 stays float32: products of what is given, in its type, forward and backward, whatever autocast says around it."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, 7, 12], dtype=torch.int32)
    results = []
    for enabled in (False, True):
        parts = [torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in range(3)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = varlen_attention(*parts, bounds, 7)
            out.square().sum().backward()
        results.append([out.detach(), *(part.grad for part in parts)])
    for plain, inside in zip(*results, strict=True):
        assert inside.dtype is torch.float32 and torch.equal(plain, inside)
