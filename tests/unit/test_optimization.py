"""optimization.py against a float64 reference written here, the published rates, and plain formulas."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from optimization import (
    SCHEDULES,
    ConstantWarmUp,
    CosineWarmUp,
    ExponentialWarmUp,
    Lamb,
    LinearWarmUp,
    PolyWarmUp,
    _cpu_norm,
    adamw,
    chunks,
    fused_problem,
    make_schedule,
    parameter_groups,
    place_steps,
    set_step,
)

SHAPES = {"embedding": (40, 16), "dense": (16, 24), "zero": (8, 8), "still": (5, 3), "bias": (24,), "zero_bias": (6,)}
DECAYED = ("embedding", "dense", "zero", "still")
ALWAYS_ZERO_GRADIENT = ("still",)  # a decayed tensor that never receives a signal
PATHS = [
    pytest.param({"fused": False}, id="loop"),
    pytest.param({"foreach": True}, id="foreach"),
    pytest.param({"fused": None}, id="fused"),
]


class ReferenceLamb:
    """The formulas of FEATURES 4.F2, one line each, in NumPy float64."""

    def __init__(self, weights, lr=1e-2, b1=0.9, b2=0.999, eps=1e-6, wd=0.01, limit=1.0, correct=True, average=True,
                 adam_w=True, nvlamb=False):  # fmt: skip
        self.w = {name: value.astype(np.float64).copy() for name, value in weights.items()}
        self.m = {name: np.zeros_like(value) for name, value in self.w.items()}
        self.v = {name: np.zeros_like(value) for name, value in self.w.items()}
        self.lr, self.b1, self.b2, self.eps, self.wd, self.limit = lr, b1, b2, eps, wd, limit
        self.correct, self.average, self.adam_w, self.nvlamb = correct, average, adam_w, nvlamb
        self.t = 0

    def step(self, gradients):
        gradients = {name: g.astype(np.float64) for name, g in gradients.items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        clip = norm / self.limit if norm > self.limit else 1.0
        self.t += 1
        c1, c2 = (1 - self.b1**self.t, 1 - self.b2**self.t) if self.correct else (1.0, 1.0)
        for name, p in self.w.items():
            wd = self.wd if name in DECAYED else 0.0
            s = gradients[name] / clip + (0.0 if self.adam_w else wd * p)
            self.m[name] = self.b1 * self.m[name] + ((1 - self.b1) if self.average else 1.0) * s
            self.v[name] = self.b2 * self.v[name] + (1 - self.b2) * s**2
            u = self.m[name] / c1 / (np.sqrt(self.v[name] / c2) + self.eps) + (wd * p if self.adam_w else 0.0)
            p_norm, u_norm = np.sqrt((p**2).sum()), np.sqrt((u**2).sum())
            ratio = p_norm / u_norm if (wd or self.nvlamb) and p_norm and u_norm else 1.0
            self.w[name] = p - self.lr * ratio * u
        return norm


def initial_weights():
    rng = np.random.default_rng(3)
    weights = {name: (rng.standard_normal(shape) * 0.05).astype(np.float32) for name, shape in SHAPES.items()}
    weights["zero"][:] = 0
    weights["zero_bias"][:] = 0
    return weights


def gradients_of_step(step, size):
    rng = np.random.default_rng(1000 + step)
    gradients = {name: (rng.standard_normal(shape) * size).astype(np.float32) for name, shape in SHAPES.items()}
    for name in ALWAYS_ZERO_GRADIENT:
        gradients[name][:] = 0
    if step == 4:
        gradients["bias"][:] = 0
    return gradients


def torch_lamb(weights, dtype=torch.float32, **options):
    parameters = {name: nn.Parameter(torch.tensor(value, dtype=dtype)) for name, value in weights.items()}
    groups = [
        {"params": [parameters[n] for n in SHAPES if n in DECAYED], "weight_decay": 0.01},
        {"params": [parameters[n] for n in SHAPES if n not in DECAYED], "weight_decay": 0.0},
    ]
    return parameters, Lamb(groups, **{"lr": 1e-2, **options})


def set_gradients(parameters, gradients, scale=1.0):
    for name, parameter in parameters.items():
        parameter.grad = torch.tensor(gradients[name]).to(parameter.dtype) * scale


def largest_error(parameters, reference):
    return max(float(np.abs(p.detach().double().numpy() - reference.w[n]).max()) for n, p in parameters.items())


# --------------------------------------------------------------------------------------------------------------- LAMB


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [pytest.param(1.0, id="clipped"), pytest.param(1e-3, id="unclipped")])
@pytest.mark.parametrize(
    "ours,theirs",
    [
        pytest.param({}, {}, id="defaults"),
        pytest.param({"use_nvlamb": True}, {"nvlamb": True}, id="nvlamb"),
        pytest.param({"adam_w_mode": False}, {"adam_w": False}, id="l2"),
        pytest.param({"adam_w_mode": False, "use_nvlamb": True}, {"adam_w": False, "nvlamb": True}, id="l2-nvlamb"),
        pytest.param({"bias_correction": False}, {"correct": False}, id="no-correction"),
        pytest.param({"grad_averaging": False}, {"average": False}, id="no-averaging"),
        pytest.param({"max_grad_norm": None}, {"limit": math.inf}, id="never-clip"),
        pytest.param({"max_grad_norm": 0.3, "betas": (0.8, 0.95)}, {"limit": 0.3, "b1": 0.8, "b2": 0.95}, id="betas"),
    ],
)
def test_twenty_steps_equal_the_float64_reference(ours, theirs, size, path):
    weights = initial_weights()
    parameters, optimizer = torch_lamb(weights, **path, **ours)
    reference = ReferenceLamb(weights, **theirs)
    for step in range(20):
        gradients = gradients_of_step(step, size)
        set_gradients(parameters, gradients)
        optimizer.step()
        norm = reference.step(gradients)
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-6)
    assert (norm > 1.0) == (size == 1.0)
    assert largest_error(parameters, reference) <= 1e-6
    assert all(group["step"] == 20 and type(group["step"]) is int for group in optimizer.param_groups)


@pytest.mark.parametrize("path", PATHS)
def test_float64_parameters_show_the_formula_exactly(path):
    weights = initial_weights()
    parameters, optimizer = torch_lamb(weights, dtype=torch.float64, **path)
    reference = ReferenceLamb(weights)
    for step in range(20):
        gradients = gradients_of_step(step, 1.0)
        set_gradients(parameters, gradients)
        optimizer.step()
        reference.step(gradients)
    assert largest_error(parameters, reference) <= 1e-14


@pytest.mark.parametrize("path", PATHS)
def test_skipped_steps_change_nothing_and_scaled_gradients_are_unscaled(path):
    weights = initial_weights()
    parameters, optimizer = torch_lamb(weights, **path)
    reference = ReferenceLamb(weights)
    for step in range(20):
        gradients = gradients_of_step(step, 1.0)
        if step in (0, 7, 8):
            before = copy.deepcopy((optimizer.state_dict(), parameters))
            set_gradients(parameters, {name: np.full_like(g, np.inf) for name, g in gradients.items()})
            assert optimizer.step(found_inf=torch.tensor(1.0) if step else True) is None
            after = (optimizer.state_dict(), parameters)
            assert _flat_equal(before, after)
            continue
        set_gradients(parameters, gradients, scale=2.0**16)
        kept = {name: p.grad.clone() for name, p in parameters.items()}
        scale = torch.tensor(2.0**16) if step % 2 else 2.0**16
        optimizer.step(grad_scale=scale, found_inf=torch.tensor(0.0))
        norm = reference.step(gradients)
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-6)
        assert all(torch.equal(p.grad, kept[name]) for name, p in parameters.items())
    assert reference.t == 17 and all(group["step"] == 17 for group in optimizer.param_groups)
    assert largest_error(parameters, reference) <= 1e-6


def _flat_equal(left, right):
    (left_state, left_parameters), (right_state, right_parameters) = left, right
    same_state = left_state["param_groups"] == right_state["param_groups"] and all(
        torch.equal(left_state["state"][k][n], v) for k, s in right_state["state"].items() for n, v in s.items()
    )
    return same_state and all(torch.equal(left_parameters[n], p) for n, p in right_parameters.items())


def test_both_paths_agree_bitwise_on_a_cpu():
    results = []
    for path in ({"fused": False}, {"foreach": True}):
        parameters, optimizer = torch_lamb(initial_weights(), **path)
        for step in range(5):
            set_gradients(parameters, gradients_of_step(step, 1.0))
            optimizer.step()
        results.append(parameters)
    assert all(torch.equal(results[0][name], results[1][name]) for name in SHAPES)


# ------------------------------------------------------------------------------------------------- the fused CPU kernel

ODD_SIZES = (0, 1, 511, 512, 513, 1024, 2047, 2048, 2049, 5003)


def odd_lamb(seed=0, dtype=torch.float32, **options):
    """A decayed and a plain tensor of each of ODD_SIZES, random."""
    generator = torch.Generator().manual_seed(seed)
    groups = [
        {"params": [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in ODD_SIZES], "weight_decay": decay}
        for decay in (0.01, 0.0)
    ]
    return Lamb(groups, **{"lr": 0.02, **options})


def tensors_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def odd_steps(optimizer, steps=range(4)):
    """Gradients whose norm is below the limit of 1 in every second step."""
    for step in steps:
        generator = torch.Generator().manual_seed(50 + step)
        for parameter in tensors_of(optimizer):
            gradient = torch.randn(parameter.shape, generator=generator) * (1.0 if step % 2 else 1e-3)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return optimizer


def worst_difference(left, right):
    pairs = [(p.detach(), q.detach()) for p, q in zip(tensors_of(left), tensors_of(right), strict=True)]
    pairs += [
        (left.state[p][key], right.state[q][key])
        for p, q in zip(tensors_of(left), tensors_of(right), strict=True)
        for key in ("exp_avg", "exp_avg_sq")
    ]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks a tensor, so that the seams between them are tested."""
    monkeypatch.setattr("optimization._BLOCK_ELEMENTS", 1024)
    monkeypatch.setattr("optimization._BLOCK_ELEMENTS_PER_THREAD", 512)


@pytest.mark.parametrize("options", [{}, {"use_nvlamb": True}, {"adam_w_mode": False}, {"bias_correction": False}, {"max_grad_norm": 0}])
def test_fused_blocks_of_odd_sizes_equal_float64(options, small_blocks):
    """Parameters and moments, empty and one-element tensors included; gradients stay bitwise what they were."""
    fused, exact = odd_lamb(fused=True, **options), odd_lamb(dtype=torch.float64, **options)
    for step in range(5):
        odd_steps(fused, [step])
        kept = [p.grad.clone() for p in tensors_of(fused)]
        odd_steps(exact, [step])
        assert all(torch.equal(p.grad, g) for p, g in zip(tensors_of(fused), kept, strict=True))
    assert worst_difference(fused, exact) <= 2e-6


def test_fused_results_do_not_depend_on_blocks_or_threads(monkeypatch):
    """Bitwise: a resumed run may have another number of cores, and a block is only what fits the cache."""
    threads, results = torch.get_num_threads(), []
    try:
        for count, elements in ((1, 512), (2, 512), (2, 4096), (3, 1 << 18)):
            monkeypatch.setattr("optimization._BLOCK_ELEMENTS", elements)
            monkeypatch.setattr("optimization._BLOCK_ELEMENTS_PER_THREAD", 512)
            torch.set_num_threads(count)
            results.append(odd_steps(odd_lamb(fused=True)))
    finally:
        torch.set_num_threads(threads)
    assert all(worst_difference(results[0], other) == 0.0 for other in results[1:])


def test_a_known_tensor_takes_the_fused_kernel_and_others_the_loop(monkeypatch):
    """float32 on a CPU is fused by default; other types, transposed tensors and grad_averaging=False are the loop's, to the bit."""
    calls = []
    kernel = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **options: calls.append(1) or kernel(*args, **options))
    odd_steps(odd_lamb())
    assert calls
    for dtype, options in ((torch.float64, {}), (torch.bfloat16, {}), (torch.float32, {"grad_averaging": False})):
        calls.clear()
        auto, loop = (odd_steps(odd_lamb(dtype=dtype, fused=fused, **options)) for fused in (None, False))
        assert not calls and worst_difference(auto, loop) == 0.0
        with pytest.raises(RuntimeError, match=r"Lamb\(fused=True\) needs .*; fused=None takes the plain loop"):
            odd_steps(odd_lamb(dtype=dtype, fused=True, **options))
    weight = nn.Parameter(torch.randn(6, 4).t())
    weight.grad = torch.ones(4, 6)
    Lamb([weight]).step()
    assert not calls
    with pytest.raises(ValueError, match="at most one of them"):
        Lamb([weight], foreach=True, fused=True)


@pytest.mark.parametrize(
    "broken,words",
    [
        (None, "does not have"),
        (lambda *args, **options: None, "differs from the formula by"),
        (lambda tensors: None, "here it fails: "),
    ],
    ids=["absent", "wrong", "other-arguments"],
)
def test_a_torch_whose_kernel_is_absent_or_wrong_takes_the_loop(monkeypatch, broken, words):
    if broken is None:
        monkeypatch.delattr(torch, "_fused_adamw_")
    else:
        monkeypatch.setattr(torch, "_fused_adamw_", broken)
    fused_problem.cache_clear()
    try:
        assert words in fused_problem()
        assert worst_difference(odd_steps(odd_lamb()), odd_steps(odd_lamb(fused=False))) == 0.0
    finally:
        monkeypatch.undo()
        fused_problem.cache_clear()
    assert fused_problem() is None


def test_a_fused_run_resumes_bitwise():
    """Through a saved state and through a copy of an optimizer that holds scratch memory."""
    straight = odd_steps(odd_lamb(fused=True), range(6))
    first = odd_steps(odd_lamb(fused=True), range(3))
    second = odd_lamb(seed=1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for target, source in zip(tensors_of(second), tensors_of(first), strict=True):
        target.data.copy_(source.data)
    third = copy.deepcopy(first)
    assert third.fused is True and third._scratch is None
    for resumed in (second, third):
        assert worst_difference(odd_steps(resumed, range(3, 6)), straight) == 0.0


# -------------------------------------------------------------------------------------------------- what step() promises


def test_the_clip_is_strict_and_uses_all_groups():
    def update(limit):
        weights = {"embedding": np.ones(1, np.float32), "bias": np.ones(1, np.float32)}
        parameters = {n: nn.Parameter(torch.tensor(v)) for n, v in weights.items()}
        optimizer = Lamb([{"params": [p]} for p in parameters.values()], lr=0.1, max_grad_norm=limit)
        for parameter, gradient in zip(parameters.values(), (3.0, 4.0), strict=True):
            parameter.grad = torch.full((1,), gradient)
        optimizer.step()
        assert float(optimizer.grad_norm) == 5.0
        return [float(optimizer.state[p]["exp_avg"]) for p in parameters.values()]

    assert update(5.0) == update(math.inf) == update(0) == pytest.approx([0.3, 0.4])
    assert update(2.5) == pytest.approx([0.15, 0.2])


def test_a_known_norm_replaces_the_computed_one():
    parameters, optimizer = torch_lamb(initial_weights())
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step(grad_norm=10.0)
    assert float(optimizer.grad_norm) == 10.0
    assert float(optimizer.state[parameters["bias"]]["exp_avg"][0]) == pytest.approx(0.1 * 0.1 / 10)


@pytest.mark.parametrize("path", PATHS)
def test_parameters_without_a_gradient_are_skipped(path):
    parameters, optimizer = torch_lamb(initial_weights(), **path)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer.step()
    assert optimizer.grad_norm is None and optimizer.param_groups[0]["step"] == 0
    parameters["dense"].grad = torch.ones_like(parameters["dense"])
    optimizer.step()
    changed = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
    assert changed == {"dense"} and set(optimizer.state) == {parameters["dense"]}


def test_closure_is_run_with_gradients_enabled_and_its_value_returned():
    weight = nn.Parameter(torch.ones(3))
    optimizer = Lamb([weight], lr=0.1)

    def closure():
        loss = weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert not torch.equal(weight, torch.ones(3))


def test_sparse_gradients_are_refused_by_name():
    layer = nn.Embedding(4, 2, sparse=True)
    optimizer = Lamb(parameter_groups(layer))
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients; parameter 'weight'"):
        optimizer.step()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_computed_in_float32(dtype, path):
    weights = {name: torch.tensor(value).to(dtype).float().numpy() for name, value in initial_weights().items()}
    parameters, optimizer = torch_lamb(weights, dtype=dtype, **path)
    reference = ReferenceLamb(weights)
    gradients = {n: torch.tensor(g).to(dtype).float().numpy() for n, g in gradients_of_step(1, 1.0).items()}
    set_gradients(parameters, gradients)
    optimizer.step()
    reference.step(gradients)
    for name, parameter in parameters.items():
        assert all(value.dtype == torch.float32 for value in optimizer.state[parameter].values())
        rounding = torch.finfo(dtype).eps * max(1e-3, float(np.abs(reference.w[name]).max()))
        assert float(np.abs(parameter.detach().double().numpy() - reference.w[name]).max()) <= rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_resumes_bitwise(tmp_path, dtype):
    def fresh():
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2))
        model.load_state_dict(initial)
        return model.to(dtype), Lamb(parameter_groups(model), lr=0.05)

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(4, 6, generator=generator).to(dtype)).float().pow(2).sum().backward()
            optimizer.step()

    initial = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)).state_dict()
    straight, its_optimizer = fresh()
    train(straight, its_optimizer, range(8))
    first, its_first = fresh()
    train(first, its_first, range(4))
    torch.save({"model": first.state_dict(), "optimizer": its_first.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second, its_second = fresh()
    second.load_state_dict(saved["model"])
    its_second.load_state_dict(saved["optimizer"])
    assert [group["step"] for group in its_second.param_groups] == [4, 4]
    assert [group["param_names"] for group in its_second.param_groups] == [
        ["0.weight", "1.weight", "2.weight"],
        ["0.bias", "1.bias", "2.bias"],
    ]
    assert all(v.dtype == torch.float32 for state in its_second.state.values() for v in state.values())
    train(second, its_second, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))
    train(first, its_first, range(4, 8))  # the loaded optimizer shares nothing with the one that was saved
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), first.parameters(), strict=True))


def test_loading_a_state_shares_no_memory_with_it():
    weight = nn.Parameter(torch.ones(3))
    one, two = Lamb([weight]), Lamb([weight])
    weight.grad = torch.ones(3)
    one.step()
    two.load_state_dict(one.state_dict())
    before = one.state[weight]["exp_avg"].clone()
    two.step()
    assert torch.equal(one.state[weight]["exp_avg"], before)


def test_an_apex_state_loads():
    weight = nn.Parameter(torch.ones(3))
    group = {"params": [0], "lr": 2e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-6,
             "weight_decay": 0.01, "grad_averaging": True, "max_grad_norm": 1.0, "step": 7}  # fmt: skip
    optimizer = Lamb([weight])
    moments = {"exp_avg": torch.full((3,), 2.0), "exp_avg_sq": torch.full((3,), 3.0)}
    optimizer.load_state_dict({"state": {0: moments}, "param_groups": [group]})
    assert optimizer.param_groups[0]["step"] == 7 and optimizer.param_groups[0]["lr"] == 2e-3
    assert torch.equal(optimizer.state[weight]["exp_avg_sq"], torch.full((3,), 3.0))


def test_states_that_do_not_fit_are_refused_and_change_nothing():
    def optimizer_over(*names, kind=Lamb, size=3):
        tensors = [nn.Parameter(torch.ones(size)) for _ in names]
        made = kind([{"params": tensors, "param_names": list(names)}], lr=0.5)
        for tensor in tensors:
            tensor.grad = torch.ones(size)
        made.step()
        return made

    target = optimizer_over("a", "b")
    for other, message in [
        (optimizer_over("a", "c"), r"group 0 differs .* not saved: \['b'\]; saved only: \['c'\]"),
        (optimizer_over("b", "a"), "same names, other order"),
        (optimizer_over("a", "b", size=4), r"saved exp_avg of parameter 'a' has shape \[4\], not \[3\]"),
        (optimizer_over("a", "b", kind=torch.optim.AdamW), "another optimizer wrote it"),
    ]:
        with pytest.raises(ValueError, match=message):
            target.load_state_dict(other.state_dict())
    nameless = optimizer_over("a").state_dict()
    del nameless["param_groups"][0]["param_names"]
    with pytest.raises(ValueError, match=r"groups of \[2\] tensors do not match the saved groups of \[1\]"):
        target.load_state_dict(nameless)
    assert target.param_groups[0]["step"] == 1 and target.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "options,message",
    [
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"lr": math.nan}, "lr must be"),
        ({"betas": (1.0, 0.999)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": -1e-6}, "eps must be"),
        ({"weight_decay": -0.01}, "weight_decay must be"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be > 0, or 0, None or inf"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be"),
    ],
)
def test_hyperparameters_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Lamb([nn.Parameter(torch.ones(1))], **options)


def test_a_group_value_is_checked_too_and_integers_are_refused():
    with pytest.raises(ValueError, match="weight_decay must be a finite number >= 0, got -1"):
        Lamb([{"params": [nn.Parameter(torch.ones(1))], "weight_decay": -1}])
    with pytest.raises(ValueError, match=r"floating-point parameters; parameter number 0 of its group is torch\.int64"):
        Lamb([torch.ones(1, dtype=torch.int64)])


def test_a_copy_keeps_every_setting():
    optimizer = copy.deepcopy(Lamb([nn.Parameter(torch.ones(2))], max_grad_norm=3.0, use_nvlamb=True, foreach=True))
    assert (optimizer.max_grad_norm, optimizer.use_nvlamb, optimizer.adam_w_mode) == (3.0, True, True)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()


def test_norm_of_a_large_tensor_is_accurate():
    tensor = torch.randn(3_000_017, generator=torch.Generator().manual_seed(0))
    exact = float(tensor.double().pow(2).sum().sqrt())
    assert float(_cpu_norm(tensor)) == pytest.approx(exact, rel=1e-7)
    part = tensor[:700]
    assert float(_cpu_norm(part.view(100, 7).t())) == pytest.approx(float(part.double().norm()), rel=1e-6)
    assert float(_cpu_norm(torch.zeros(0))) == 0.0


def test_chunks_respect_kind_and_size(monkeypatch):
    monkeypatch.setattr("optimization._CHUNK_ELEMENTS", 10)
    sizes = [4, 4, 4, 30, 1]
    pairs = [(torch.zeros(n), torch.zeros(n)) for n in sizes] + [(torch.zeros(2).half(), torch.zeros(2).half())]
    assert [[p.numel() for p, _ in chunk] for chunk in chunks(pairs)] == [[4, 4], [4], [30], [1], [2]]
    assert list(chunks([])) == []


# ------------------------------------------------------------------------------------------------------------- groups


def test_bert_large_has_150_decayed_tensors_of_398():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30528, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    with torch.device("meta"):
        model = transformers.BertForPreTraining(config)
        model.tie_weights()
    decayed, plain = parameter_groups(model)
    assert (len(decayed["params"]), len(plain["params"])) == (150, 248)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    assert sum(p.numel() for p in decayed["params"] + plain["params"]) == 336_232_258
    assert "bert.embeddings.word_embeddings.weight" in decayed["param_names"]
    assert all("bias" in name or "LayerNorm" in name for name in plain["param_names"])
    names = [[g["param_names"] for g in make(parameter_groups(model)).param_groups] for make in (Lamb, adamw)]
    assert names[0] == names[1] == [decayed["param_names"], plain["param_names"]]


def test_tied_frozen_and_wrapped_parameters():
    shared = nn.Parameter(torch.ones(2))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    old_names = nn.Parameter(torch.ones(2))
    decayed, plain = parameter_groups(
        [("module.a.weight", shared), ("module.b.weight", shared), ("c", frozen), ("_orig_mod.norm.gamma", old_names)]
    )
    assert decayed["param_names"] == ["a.weight"] and decayed["params"][0] is shared
    assert plain["param_names"] == ["norm.gamma"]
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        parameter_groups([("c", frozen)])
    with pytest.raises(ValueError, match="weight_decay must be"):
        parameter_groups([("a", shared)], weight_decay=-0.1)


def test_adamw_equals_its_formula_and_checks_its_values():
    weight, bias = nn.Parameter(torch.full((3,), 2.0)), nn.Parameter(torch.full((3,), 2.0))
    optimizer = adamw(parameter_groups([("weight", weight), ("bias", bias)]), lr=0.1)
    for parameter in (weight, bias):
        parameter.grad = torch.full((3,), 0.5)
    optimizer.step()
    assert bias[0].item() == pytest.approx(2 - 0.1 * 0.5 / (0.5 + 1e-6))
    assert weight[0].item() == pytest.approx(2 * (1 - 0.1 * 0.01) - 0.1 * 0.5 / (0.5 + 1e-6))
    with pytest.raises(ValueError, match="eps must be"):
        adamw([weight], eps=-1)


def test_phase_two_begins_with_step_zero_on_warm_moments():
    weight = nn.Parameter(torch.ones(3))
    for make in (lambda: Lamb([weight], weight_decay=0.0, lr=1.0), lambda: adamw([weight], lr=1.0, weight_decay=0.0)):
        optimizer = make()
        state = {"exp_avg": torch.full((3,), 0.5), "exp_avg_sq": torch.full((3,), 0.25)}
        optimizer.state[weight] = dict(state) if isinstance(optimizer, Lamb) else {**state, "step": torch.tensor(900.0)}
        optimizer.param_groups[0]["step"] = 900
        set_step(optimizer, 0)
        with torch.no_grad():
            weight.fill_(0.0)
        weight.grad = torch.full((3,), 0.5)
        optimizer.step(**({"grad_norm": 0.5} if isinstance(optimizer, Lamb) else {}))
        assert -weight[0].item() == pytest.approx(10 / math.sqrt(1000), rel=1e-4)  # 0.316: FEATURES 4.F3


# ---------------------------------------------------------------------------------------------------------- schedules

PHASE_1 = {1: 2.99864551e-6, 2000: 5.99729102e-3, 2001: 5.07589459e-3, 7037: 7.15198540e-5}
PHASE_2 = {1: 1.99936020e-5, 200: 3.99872041e-3, 201: 3.73395480e-3, 1562: 1.01176698e-4}


@pytest.mark.parametrize("recipe,golden", [((6e-3, 0.2843, 7038), PHASE_1), ((4e-3, 0.128, 1563), PHASE_2)], ids=["phase1", "phase2"])
def test_poly_has_the_published_rates(recipe, golden):
    schedule = make_schedule("poly", *recipe)
    for step, rate in golden.items():
        assert schedule.lr(step) == pytest.approx(rate, rel=1e-8)
    last = recipe[2]
    assert schedule.lr(last) == 0.0
    for outside in (last + 1, 0, -3):
        with pytest.raises(ValueError, match=rf"step {outside} is outside the schedule's 1\.\.{last} steps"):
            schedule.lr(outside)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.25, 1.0])
def test_the_other_schedules_equal_their_formulas(warmup):
    base, total = 2e-3, 40
    made = {name: make_schedule(name, base, warmup, total) for name in SCHEDULES}
    made["azure"] = make_schedule("exponential", base, warmup, total, warmup_degree=1, decay_rate=0.99, decay_steps=7)
    made["offset"] = ExponentialWarmUp(base, warmup, total, lr_offset=1e-3)
    for step in range(1, total + 1):
        p = step / total
        rising = p < warmup
        left = (1 - p) / (1 - warmup) if warmup < 1 else 0.0
        expected = {
            "poly": base * p / warmup if rising else base * (1 - p) ** 0.5,
            "linear": base * p / warmup if rising else base * max(left, 0),
            "cosine": base * p / warmup if rising else base * (1 + math.cos(math.pi * (1 - left))) / 2,
            "constant": base * p / warmup if rising else base,
            "exponential": base * (p / warmup) ** 2 if rising else base * 0.9 ** ((step - warmup * total) / 250),
            "azure": base * p / warmup if rising else base * 0.99 ** ((step - warmup * total) / 7),
        }
        expected["offset"] = expected["exponential"] + 1e-3
        for name, rate in expected.items():
            assert made[name].lr(step) == pytest.approx(rate, rel=1e-12, abs=1e-18), (name, step)


def test_apply_sets_every_group():
    one, two = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = Lamb([{"params": [one]}, {"params": [two], "lr_scale": 0.5}])
    schedule = LinearWarmUp(1.0, 0.5, 4)
    assert schedule.apply(optimizer, 1) == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]


def test_schedules_are_values():
    assert PolyWarmUp(1e-3, 0.1, 10) == PolyWarmUp(1e-3, 0.1, 10) != PolyWarmUp(1e-3, 0.2, 10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        CosineWarmUp(1e-3, 0.1, 10).warmup = 0.2


@pytest.mark.parametrize(
    "name,arguments,options,message",
    [
        ("polly", (1e-3, 0.1, 10), {}, "schedule 'polly'; choose one of poly, linear, cosine, constant, exp"),
        ("poly", (1e-3, 0.1, 10), {"decay_rate": 1}, "schedule 'poly' has no option decay_rate; it takes degree"),
        ("linear", (1e-3, 0.1, 10), {"degree": 1}, "has no option degree; it takes none"),
        ("poly", (1e-3, 1.1, 10), {}, r"warmup must be a fraction of the steps in \[0, 1\], got 1.1"),
        ("poly", (1e-3, -0.1, 10), {}, "warmup must be"),
        ("poly", (math.inf, 0.1, 10), {}, "base_lr must be"),
        ("poly", (1e-3, 0.1, 0), {}, "total_steps must be a whole number >= 1, got 0"),
        ("poly", (1e-3, 0.1, 10.0), {}, "total_steps must be a whole number"),
        ("poly", (1e-3, 0.1, 10), {"degree": 0}, "degree must be"),
        ("exponential", (1e-3, 0.1, 10), {"decay_rate": 1.5}, "decay_rate must be"),
        ("exponential", (1e-3, 0.1, 10), {"decay_steps": 0}, "decay_steps must be"),
        ("exponential", (1e-3, 0.1, 10), {"warmup_degree": -1}, "warmup_degree must be"),
        ("exponential", (1e-3, 0.1, 10), {"lr_offset": -1}, "lr_offset must be"),
    ],
)
def test_wrong_schedules_are_refused(name, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, *arguments, **options)


def test_registry_covers_every_schedule_at_every_step():
    for name, steps in itertools.product(SCHEDULES, (1, 2, 7)):
        for warmup in (0.0, 0.5, 1.0):
            rates = [make_schedule(name, 1.0, warmup, steps).lr(t) for t in range(1, steps + 1)]
            assert all(0.0 <= rate <= 1.0 for rate in rates)
    assert ConstantWarmUp(1.0, 0.0, 1).lr(1) == 1.0


def test_lamb_state_is_the_same_after_it_was_loaded():
    """Keys and their values: a checkpoint of a resumed run must not differ from that of the run it resumed."""
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    first, second = Lamb([parameter]), Lamb([nn.Parameter(torch.ones(3))])
    first.step()
    second.load_state_dict(first.state_dict())
    second.load_state_dict(second.state_dict())
    assert second.state_dict()["param_groups"] == first.state_dict()["param_groups"]


def test_steps_of_adamw_go_where_its_kernels_want_them():
    """A CPU checkpoint keeps counts on the CPU; a fused group on a GPU needs them there (the device is a stand-in here: meta)."""
    parameters = [torch.nn.Parameter(torch.zeros(3, device=device)) for device in ("cpu", "meta")]
    made = torch.optim.AdamW([{"params": [parameter]} for parameter in parameters], lr=0.1)
    for parameter in parameters:
        made.state[parameter] = {"step": torch.tensor(5.0)}
    made.param_groups[1]["fused"] = True
    place_steps(made)
    assert [made.state[parameter]["step"].device.type for parameter in parameters] == ["cpu", "meta"]
    assert made.state[parameters[0]]["step"] == 5.0
