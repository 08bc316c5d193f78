"""Triton, apex or torch, whatever works: the decision, and the same LAMB and layer norm from a stand-in of apex's classes.

The stand-ins follow what apex documents: FusedLAMB keeps numbers and always updates, FusedMixedPrecisionLamb keeps rate and count in
tensors, unscales by itself and stands still on an overflow; both hand lists of tensors to a kernel that overwrites the gradients. They
compute in float64 and refuse arguments that the compiled functions would refuse.
"""

import copy
import io
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modeling
import optimization
from berth.errors import ConfigError
from berth.training.backends import Backends, Choice, choose, fuse_layer_norms, make_lamb, probe
from tests.support import TINY

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FLOAT32_MAX = torch.finfo(torch.float32).max


def lamb_in_float64(lists, rate, beta1, beta2, eps, step, corrected, decay, averaging, decoupled, norm, limit, everywhere, inv_scale):
    clip = norm / limit if norm > limit else 1.0
    for gradient, parameter, first, second in zip(*lists, strict=True):
        g, p, m, v = (tensor.double() for tensor in (gradient, parameter, first, second))
        g = g * inv_scale / clip
        assert decoupled and averaging and corrected
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps) + decay * p
        ratio = p.norm() / update.norm() if (decay or everywhere) and p.norm() != 0 and update.norm() != 0 else 1.0
        for tensor, value in ((parameter, p - rate * ratio * update), (first, m), (second, v), (gradient, update)):
            tensor.copy_(value)


def l2norm(chunk, noop, lists, per_tensor):
    (tensors,) = lists
    return torch.stack([t.double().norm() for t in tensors]).norm().float().reshape(1), None


def kernel(chunk, noop, lists, rate, beta1, beta2, eps, step, corrected, decay, averaging, mode, norm, limit, everywhere):
    assert all(lists) and type(rate) is float and type(step) is int and step >= 1 and type(limit) is float and limit > 0
    lamb_in_float64(
        lists, rate, beta1, beta2, eps, step, corrected, decay, averaging, mode == 1, float(norm), limit, everywhere, inv_scale=1.0
    )


def mixed_kernel(
    chunk, noop, lists, rate, beta1, beta2, eps, step, corrected, decay, averaging, mode, norm, limit, everywhere, found_inf, inv_scale
):
    assert all(lists) and step.dtype == torch.int32 and float(limit) > 0
    assert all(t.dtype == torch.float32 for t in (rate, norm, limit, found_inf, inv_scale))
    if not found_inf.item():
        numbers = (rate.item(), beta1, beta2, eps, step.item(), corrected, decay, averaging, mode == 1, norm.item(), limit.item())
        lamb_in_float64(lists, *numbers, everywhere, inv_scale.item())


class Recorded(torch.optim.Optimizer):
    """What both stand-ins share: how they were constructed, and the lists of a group."""

    made: list = []

    def record(self, kind, adam_w_mode, use_nvlamb, **options):
        Recorded.made.append((kind, {"adam_w_mode": adam_w_mode, "use_nvlamb": use_nvlamb, **options}))
        self.mode, self.everywhere = int(adam_w_mode), use_nvlamb

    def lists(self, group):
        with_gradient = [p for p in group["params"] if p.grad is not None]
        for p in with_gradient:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        moments = ([self.state[p][key] for p in with_gradient] for key in ("exp_avg", "exp_avg_sq"))
        return [[p.grad for p in with_gradient], with_gradient, *moments]

    def run(self, kernel, norm, limit, *more):
        for group in self.param_groups:
            settings = (*group["betas"], group["eps"], group["step"], int(group["bias_correction"]), group["weight_decay"])
            flags = (int(group["grad_averaging"]), self.mode)
            kernel(65536, None, self.lists(group), group["lr"], *settings, *flags, norm, limit, self.everywhere, *more)

    def norm(self):
        import amp_C

        return amp_C.multi_tensor_l2norm(
            65536, None, [[p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]], False
        )[0]


class FusedLAMB(Recorded):
    def __init__(
        self, params, lr, bias_correction, betas, eps, weight_decay, adam_w_mode, grad_averaging, set_grad_none, max_grad_norm, use_nvlamb
    ):
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "grad_averaging": grad_averaging, "max_grad_norm": max_grad_norm,
        }  # fmt: skip
        self.record("FusedLAMB", adam_w_mode, use_nvlamb, set_grad_none=set_grad_none, **defaults)
        super().__init__(params, defaults)

    def step(self, closure=None):
        import amp_C

        norm = self.norm()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        self.run(amp_C.multi_tensor_lamb, norm, self.defaults["max_grad_norm"])


class FusedMixedPrecisionLamb(Recorded):
    def __init__(self, params, lr, bias_correction, betas, eps, weight_decay, adam_w_mode, grad_averaging, max_grad_norm, use_nvlamb):
        defaults = {
            "lr": torch.tensor(lr), "step": torch.tensor([0], dtype=torch.int32), "bias_correction": bias_correction, "betas": betas,
            "eps": eps, "weight_decay": weight_decay, "grad_averaging": grad_averaging, "max_grad_norm": max_grad_norm,
        }  # fmt: skip
        self.record("FusedMixedPrecisionLamb", adam_w_mode, use_nvlamb, **defaults)
        super().__init__(params, defaults)
        for group in self.param_groups:
            group["lr"], group["step"] = group["lr"].clone(), group["step"].clone()

    def step(self, closure=None, grad_scaler=None):
        import amp_C

        device = self.param_groups[0]["params"][0].device
        found_inf = grad_scaler._check_inf_per_device(self)[device] if grad_scaler is not None else torch.zeros(1)
        scale = grad_scaler._get_scale_async() if grad_scaler else torch.ones(1)
        norm, limit = self.norm(), self.defaults["max_grad_norm"] * scale
        for group in self.param_groups:
            group["step"] += (found_inf.int() != 1).int()
        self.run(amp_C.multi_tensor_lamb_mp, norm, limit, found_inf, scale.double().reciprocal().float())


class FusedLayerNorm(nn.Module):
    """As apex's: inside autocast input, weight and bias are cast to 16 bits."""

    def __init__(self, normalized_shape, eps=1e-5):
        super().__init__()
        self.normalized_shape, self.eps = torch.Size(normalized_shape), eps
        self.weight, self.bias = nn.Parameter(torch.ones(normalized_shape)), nn.Parameter(torch.zeros(normalized_shape))

    def forward(self, x):
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        x, weight, bias = (tensor.to(kind) for tensor in (x, self.weight, self.bias))
        return F.layer_norm(x.double(), self.normalized_shape, weight.double(), bias.double(), self.eps).to(kind)


KINDS = {"FusedLAMB": FusedLAMB, "FusedMixedPrecisionLamb": FusedMixedPrecisionLamb}


@pytest.fixture
def apex(monkeypatch):
    """Modules as a build of apex with its kernels has them."""

    def module(name, **contents):
        made = types.ModuleType(name)
        made.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    Recorded.made.clear()
    module("amp_C", multi_tensor_l2norm=l2norm, multi_tensor_l2norm_mp=l2norm, multi_tensor_lamb=kernel, multi_tensor_lamb_mp=mixed_kernel)
    module("fused_layer_norm_cuda", forward_affine=None, backward_affine=None)
    package = module("apex")
    package.optimizers = module("apex.optimizers", **KINDS)
    package.normalization = module("apex.normalization", FusedLayerNorm=FusedLayerNorm)
    return package


# -- what is there, and what is chosen ---------------------------------------------------------------------------------------


def test_probe_without_apex_says_what_is_missing(monkeypatch):
    for name in ("amp_C", "fused_layer_norm_cuda", "triton"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    found = probe(CPU)
    assert (found.fused_lamb, found.mixed_lamb, found.layer_norm, found.triton_lamb) == (None, None, None, None)
    assert [line.split(":")[0] for line in found.problems] == ["FusedLAMB", "FusedMixedPrecisionLamb", "FusedLayerNorm", "TritonLamb"]
    assert all("amp_C" in line for line in found.problems[:2]) and "fused_layer_norm_cuda" in found.problems[2]
    assert "triton" in found.problems[3]


APEX_PARTS = (("fused_lamb",), ("mixed_lamb",), ("layer_norm",))


def test_probe_finds_working_kernels(apex):
    assert probe(CPU, APEX_PARTS) == Backends(FusedLAMB, FusedMixedPrecisionLamb, FusedLayerNorm)


def test_probe_stops_at_the_first_that_works(apex, monkeypatch):
    """Of alternatives; what failed before it is told."""
    assert probe(CPU, (("mixed_lamb", "fused_lamb"), ())) == Backends(mixed_lamb=FusedMixedPrecisionLamb)
    monkeypatch.delattr(sys.modules["amp_C"], "multi_tensor_lamb_mp")
    problem = "FusedMixedPrecisionLamb: amp_C is without multi_tensor_lamb_mp"
    assert probe(CPU, (("mixed_lamb", "fused_lamb"),)) == Backends(FusedLAMB, problems=(problem,))


class PlainTriton(optimization.Lamb):
    """Stands for TritonLamb: berth's update, and the guard."""

    def step(self, closure=None, **options):
        if math.isfinite(float(options.get("grad_norm", 0.0))):
            super().step(closure, **options)


class CrookedTriton(PlainTriton):
    def _update(self, number, rule, pairs, divisor):
        super()._update(number, rule, pairs, divisor * 1.01)


class FailingTriton(PlainTriton):
    def step(self, closure=None, **options):
        raise type("CompilationError", (Exception,), {})("no such architecture\nand more")


@pytest.mark.parametrize(
    "kind,problem",
    [
        (PlainTriton, None),
        (CrookedTriton, "TritonLamb: its result on this device differs from torch's by"),
        (optimization.Lamb, "TritonLamb: it changed tensors on this device though the gradient norm was infinite"),
        (FailingTriton, "TritonLamb: no such architecture"),
    ],
)
def test_triton_kernels_are_tried_too(monkeypatch, kind, problem):
    """Numbers, guard, and errors of any class."""
    for name, contents in (("triton", {"jit": None}), ("berth.kernels.lamb", {"TritonLamb": kind})):
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    found = probe(CPU, (("triton_lamb",),))
    assert found.triton_lamb is (kind if problem is None else None)
    assert found.problems == () if problem is None else found.problems[0].startswith(problem)


def test_probe_does_not_trust_an_import(apex, monkeypatch):
    def no_kernel_image(*arguments):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nand more lines")

    monkeypatch.setattr(sys.modules["amp_C"], "multi_tensor_lamb", no_kernel_image)
    monkeypatch.delattr(sys.modules["amp_C"], "multi_tensor_lamb_mp")

    class Crooked(FusedLayerNorm):
        def forward(self, x):
            return super().forward(x) * 1.001

    monkeypatch.setattr(apex.normalization, "FusedLayerNorm", Crooked)
    found = probe(CPU)
    assert (found.fused_lamb, found.mixed_lamb, found.layer_norm) == (None, None, None)
    assert found.problems[0] == "FusedLAMB: CUDA error: no kernel image is available for execution on the device"
    assert found.problems[1] == "FusedMixedPrecisionLamb: amp_C is without multi_tensor_lamb_mp"
    assert found.problems[2].startswith("FusedLayerNorm: its result on this device differs from torch's by")


def test_probe_of_an_apex_installed_without_kernels(apex, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("apex.optimizers.FusedLAMB requires cuda extensions")

    monkeypatch.setattr(FusedLAMB, "__init__", refuse)
    assert probe(CPU).fused_lamb is None and probe(CPU).mixed_lamb is FusedMixedPrecisionLamb


ALL = Backends(FusedLAMB, FusedMixedPrecisionLamb, FusedLayerNorm)
WITH_TRITON = Backends(FusedLAMB, FusedMixedPrecisionLamb, FusedLayerNorm, PlainTriton)
ONLY_TRITON = Backends(triton_lamb=PlainTriton, problems=("FusedLayerNorm: No module named 'fused_layer_norm_cuda'",))
NONE = Backends(problems=("FusedLAMB: No module named 'amp_C'",))
RUN = {"device": CUDA, "optimizer": "lamb", "sharding": "none", "precision": "bf16"}


@pytest.mark.parametrize(
    ("requested", "found", "changes", "name"),
    [
        ("auto", ALL, {}, "FusedLAMB+FusedLayerNorm"),
        ("apex", ALL, {}, "FusedLAMB+FusedLayerNorm"),
        ("auto", WITH_TRITON, {}, "PlainTriton+FusedLayerNorm"),
        ("auto", WITH_TRITON, {"precision": "fp16"}, "PlainTriton+FusedLayerNorm"),
        ("auto", WITH_TRITON, {"compiled": True}, "PlainTriton"),
        ("auto", ONLY_TRITON, {}, "PlainTriton"),
        ("auto", ALL, {"compiled": True}, "FusedLAMB"),
        ("auto", ALL, {"compiled": True, "optimizer": "adamw"}, "berth"),
        ("auto", WITH_TRITON, {"sharding": "zero2"}, "berth"),
        ("auto", WITH_TRITON, {"device": CPU}, "berth"),
        ("triton", WITH_TRITON, {}, "PlainTriton"),
        ("apex", WITH_TRITON, {}, "FusedLAMB+FusedLayerNorm"),
        ("apex", WITH_TRITON, {"compiled": True, "precision": "fp16"}, "FusedMixedPrecisionLamb"),
        ("berth", WITH_TRITON, {}, "berth"),
        ("auto", ALL, {"precision": "fp16"}, "FusedMixedPrecisionLamb+FusedLayerNorm"),
        ("auto", Backends(FusedLAMB, None, None), {"precision": "fp16"}, "FusedLAMB"),
        ("auto", Backends(None, FusedMixedPrecisionLamb, None), {}, "FusedMixedPrecisionLamb"),
        ("auto", ALL, {"optimizer": "adamw"}, "FusedLayerNorm"),
        ("auto", ALL, {"device": CPU}, "berth"),
        ("auto", ALL, {"sharding": "zero2"}, "berth"),
        ("auto", NONE, {}, "berth"),
        ("berth", ALL, {}, "berth"),
        ("berth", ALL, {"sharding": "zero1"}, "berth"),
    ],
)
def test_choice(requested, found, changes, name):
    choice = choose(requested, found=found, **{**RUN, **changes})
    assert choice.name == name
    assert choice.reason.startswith("kernels: " + name if name != "berth" else ("berth's LAMB (", "torch's optimizer"))


def test_the_reason_tells_what_is_missing():
    assert "No module named 'amp_C'" in choose("auto", found=NONE, **RUN).reason
    assert "zero2" in choose("auto", found=ALL, **{**RUN, "sharding": "zero2"}).reason
    assert "batched kernels" in choose("berth", **RUN).reason
    assert "fused Adam kernel" in choose("auto", **{**RUN, "device": CPU}).reason


def test_the_reason_tells_why_a_cpu_takes_the_loop(monkeypatch):
    monkeypatch.setattr(optimization, "fused_problem", lambda: "needs another torch")
    reason = choose("auto", **{**RUN, "device": CPU}).reason
    assert reason.startswith("berth's LAMB (a loop over tensors: the fast path needs another torch)")


NO_TRITON = Backends(problems=("TritonLamb: 0 active drivers",))


@pytest.mark.parametrize(
    ("requested", "found", "changes", "words"),
    [
        ("apex", NONE, {}, ["No module named 'amp_C'", "NGC", "--optimizer_backend auto"]),
        ("apex", ONLY_TRITON, {}, ["its LAMB does not work here"]),
        ("triton", NO_TRITON, {}, ["0 active drivers", "C compiler", "--optimizer_backend auto"]),
        ("triton", ALL, {}, ["its LAMB does not work here"]),
        *[
            (requested, WITH_TRITON, *case)
            for requested in ("apex", "triton")
            for case in (
                ({"device": CPU}, ["CUDA device", "cpu"]),
                ({"sharding": "zero1"}, ["zero1", "norm of the piece"]),
                ({"optimizer": "adamw"}, ["adamw", "LAMB only"]),
            )
        ],
    ],
)
def test_what_cannot_serve_is_an_error_when_forced(requested, found, changes, words):
    with pytest.raises(ConfigError) as caught:
        choose(requested, found=found, **{**RUN, **changes})
    assert str(caught.value).startswith(f"--optimizer_backend {requested}: ") and all(word in str(caught.value) for word in words)


def test_nothing_is_probed_where_it_cannot_be_used(monkeypatch):
    monkeypatch.setattr("berth.training.backends.probe", lambda *arguments: pytest.fail("probed"))
    for requested, changes in (("berth", {}), ("auto", {"device": CPU}), ("auto", {"sharding": "zero3"})):
        assert choose(requested, **{**RUN, **changes}).lamb is None


@pytest.mark.parametrize(
    ("requested", "changes", "wanted"),
    [
        ("auto", {}, (("triton_lamb", "fused_lamb", "mixed_lamb"), ("layer_norm",))),
        ("auto", {"compiled": True, "precision": "fp16"}, (("triton_lamb", "mixed_lamb", "fused_lamb"), ())),
        ("auto", {"optimizer": "adamw"}, ((), ("layer_norm",))),
        ("apex", {}, (("fused_lamb", "mixed_lamb"), ("layer_norm",))),
        ("triton", {}, (("triton_lamb",), ())),
    ],
)
def test_only_what_can_be_chosen_is_probed(monkeypatch, requested, changes, wanted):
    """A probe compiles and launches kernels: seconds, and words in the log."""
    asked = []
    monkeypatch.setattr("berth.training.backends.probe", lambda device, parts: asked.append(parts) or WITH_TRITON)
    choose(requested, **{**RUN, **changes})
    assert asked == [wanted]


def test_triton_lamb_is_made_as_it_is():
    made = make_lamb(Choice(PlainTriton, None, ""), make_groups(), lr=0.5, max_grad_norm=2.0)
    assert type(made) is PlainTriton and made.max_grad_norm == 2.0 and made.param_groups[0]["lr"] == 0.5


# -- LAMB --------------------------------------------------------------------------------------------------------------------


def make_groups(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (9, 7), "b.weight": (40,), "zero.weight": (3, 3), "a.bias": (7,), "LayerNorm.weight": (5,)}
    tensors = {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}
    tensors["zero.weight"].data.zero_()  # no trust ratio at first
    return optimization.parameter_groups(tensors.items(), weight_decay=0.01)


def tensors_of(groups):
    return [parameter for group in groups for parameter in group["params"]]


def set_gradients(parameters, step):
    """Gradients of step ``step``; their global norm is below and above 1 in turn. One tensor has none at step 3."""
    generator = torch.Generator().manual_seed(100 + step)
    for index, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator) * (0.03 if step % 3 else 1.0)
        parameter.grad = None if (step, index) == (3, 1) else gradient.to(parameter.dtype)


def assert_same(ours, reference, tolerance=1e-6):
    assert [group["step"] for group in ours.param_groups] == [group["step"] for group in reference.param_groups]
    for left, right in zip(tensors_of(ours.param_groups), tensors_of(reference.param_groups), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance, check_dtype=False)
        assert set(ours.state[left]) == set(reference.state[right])
        for key in ours.state[left]:
            torch.testing.assert_close(
                ours.state[left][key], reference.state[right][key], rtol=tolerance, atol=tolerance, check_dtype=False
            )


SKIPPED = 8


def call(optimizer, step, mixed=False):
    """One step; FusedMixedPrecisionLamb gets scaled gradients, the scale and the flag as tensors."""
    parameters = tensors_of(optimizer.param_groups)
    set_gradients(parameters, step)
    for group in optimizer.param_groups:
        group["lr"] = 0.02 * (1 - step / 40)
    if mixed:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= 1024.0
                if step == SKIPPED:
                    parameter.grad.fill_(math.inf)
        optimizer.step(grad_scale=torch.tensor(1024.0), found_inf=torch.tensor(2.0 if step == SKIPPED else 0.0))
    else:
        optimizer.step(found_inf=step == SKIPPED)


@pytest.mark.parametrize("limit", [1.0, 0.0])
@pytest.mark.parametrize("kind", list(KINDS))
def test_twenty_steps_equal_berths_lamb(apex, kind, limit):
    mixed = kind == "FusedMixedPrecisionLamb"
    ours = make_lamb(Choice(KINDS[kind], None, ""), make_groups(), lr=0.02, max_grad_norm=limit)
    berths = make_lamb(Choice(None, None, ""), make_groups(), lr=0.02, max_grad_norm=limit)
    exact = optimization.Lamb(make_groups(dtype=torch.float64), lr=0.02, max_grad_norm=limit)
    assert type(berths) is optimization.Lamb
    norms = []
    for step in range(1, 21):
        call(ours, step, mixed)
        call(berths, step)
        call(exact, step)
        assert_same(ours, berths)
        assert_same(ours, exact)
        if step != SKIPPED:
            assert float(ours.grad_norm) == pytest.approx(float(exact.grad_norm), rel=1e-6)
            norms.append(float(exact.grad_norm))
    assert min(norms) < 1 < max(norms) and int(ours.param_groups[0]["step"]) == 19
    ((name, options),) = Recorded.made
    expected = {
        "betas": (0.9, 0.999), "eps": 1e-6, "adam_w_mode": True, "grad_averaging": True, "bias_correction": True, "use_nvlamb": False,
        "max_grad_norm": limit or FLOAT32_MAX,
    }  # fmt: skip
    assert name == kind and expected.items() <= options.items()
    assert mixed or options["set_grad_none"] is False
    assert ours.clips_itself and ours.overwrites_gradients


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_as_training_makes_it(apex, kind):
    """Unscaled gradients and their norm known: apex updates, and the gradients hold the update afterwards."""
    ours = make_lamb(Choice(KINDS[kind], None, ""), make_groups(), lr=0.02, max_grad_norm=1.0)
    reference = optimization.Lamb(make_groups(), lr=0.02, max_grad_norm=1.0)
    for optimizer in (ours, reference):
        set_gradients(tensors_of(optimizer.param_groups), 6)
        norm = optimization.global_norm([p.grad for p in tensors_of(optimizer.param_groups)])
        assert optimizer.step(lambda: 3.5, grad_norm=norm) == 3.5
        assert optimizer.grad_norm == norm
    assert_same(ours, reference)
    bias, kept = ours.param_groups[1]["params"][0], reference.param_groups[1]["params"][0]
    assert not torch.equal(bias.grad, kept.grad)
    torch.testing.assert_close(make_groups()[1]["params"][0] - 0.02 * bias.grad, bias.detach())


def test_nothing_happens_without_gradients_or_after_an_overflow_known_here(apex):
    for kind in KINDS.values():
        ours = make_lamb(Choice(kind, None, ""), make_groups(), lr=0.02, max_grad_norm=1.0)
        before = [p.clone() for p in tensors_of(ours.param_groups)]
        ours.step()
        set_gradients(tensors_of(ours.param_groups), 1)
        ours.step(found_inf=True)
        assert all(torch.equal(p, q) for p, q in zip(tensors_of(ours.param_groups), before, strict=True))
        assert [group["step"] for group in ours.param_groups] == [0, 0] and not ours.state


def test_fused_lamb_unscales_before_it_updates(apex):
    ours = make_lamb(Choice(FusedLAMB, None, ""), make_groups(), lr=0.02, max_grad_norm=0.0)
    reference = optimization.Lamb(make_groups(), lr=0.02, max_grad_norm=0.0)
    for step, scale in ((4, 0.25), (5, 64.0), (6, 1.0)):
        for optimizer in (ours, reference):
            set_gradients(tensors_of(optimizer.param_groups), step)
            optimizer.step(grad_scale=scale, found_inf=torch.tensor(0.0))
        assert_same(ours, reference)


@pytest.mark.parametrize("kind", list(KINDS))
def test_loaded_group_values_reach_apex(apex, kind):
    """Whatever a checkpoint or the caller puts into the groups is what the kernels get."""
    ours = make_lamb(Choice(KINDS[kind], None, ""), make_groups(), lr=0.02, max_grad_norm=1.0)
    reference = optimization.Lamb(make_groups(), lr=0.02, max_grad_norm=1.0)
    for optimizer in (ours, reference):
        state = optimizer.state_dict()
        for group, changes in zip(
            state["param_groups"], ({"betas": (0.8, 0.95), "weight_decay": 0.2}, {"eps": 0.1, "step": 40}), strict=True
        ):
            group.update(changes)
        optimizer.load_state_dict(state)
        for step in (1, 2):
            set_gradients(tensors_of(optimizer.param_groups), step)
            optimizer.step()
    assert_same(ours, reference)


def test_a_group_without_parameters_launches_no_kernel(apex):
    for kind in KINDS.values():
        groups = [{"params": [], "weight_decay": 0.01}, {"params": [nn.Parameter(torch.ones(4))], "weight_decay": 0.0}]
        ours = make_lamb(Choice(kind, None, ""), groups, lr=0.1, max_grad_norm=1.0)
        set_gradients(tensors_of(ours.param_groups), 1)
        ours.step()
        assert [group["step"] for group in ours.state_dict()["param_groups"]] == [1, 1]
        assert not torch.equal(ours.param_groups[1]["params"][0].detach(), torch.ones(4))


@pytest.mark.parametrize("kind", list(KINDS))
def test_checkpoints_move_between_backends(apex, kind):
    """6 steps with apex, 6 with berth, 8 with apex, through saved files, against 20 with berth; phase 2 resets the count."""
    mixed = kind == "FusedMixedPrecisionLamb"
    backends = {1: Choice(KINDS[kind], None, ""), 7: Choice(None, None, ""), 13: Choice(KINDS[kind], None, "")}
    reference = optimization.Lamb(make_groups(), lr=0.02, max_grad_norm=1.0)
    ours = None
    for step in range(1, 21):
        if step in backends:
            moved = make_lamb(backends[step], make_groups(seed=step), lr=1.0, max_grad_norm=1.0)
            for target, source in zip(tensors_of(moved.param_groups), tensors_of((ours or reference).param_groups), strict=True):
                target.data.copy_(source.data)
            if ours is not None:
                saved = io.BytesIO()
                torch.save(ours.state_dict(), saved)
                saved.seek(0)
                state = torch.load(saved, weights_only=True)
                assert state.keys() == reference.state_dict().keys()
                for group, expected in zip(state["param_groups"], reference.state_dict()["param_groups"], strict=True):
                    group.pop("differentiable", None)  # torch's, in every optimizer that was loaded once
                    assert {key: type(value) for key, value in group.items()} == {key: type(value) for key, value in expected.items()}
                moved.load_state_dict(state)
            ours = moved
        if step == 16:
            for optimizer in (ours, reference):
                optimization.set_step(optimizer, 0)
        call(ours, step, mixed and step not in range(7, 13))
        call(reference, step)
        assert_same(ours, reference)
    assert ours.state_dict()["param_groups"][0]["step"] == 5


# -- layer norm --------------------------------------------------------------------------------------------------------------


def test_layer_norms_are_replaced_in_place_with_equal_results(apex):
    torch.manual_seed(0)
    plain = modeling.BertForPreTraining(modeling.BertConfig(**{**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "LayerNorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    fused = copy.deepcopy(plain).eval()
    before = dict(fused.named_parameters())
    assert fuse_layer_norms(fused, Choice(None, FusedLayerNorm, "")) == 6  # embeddings, two a layer, MLM head
    assert not any(isinstance(module, nn.LayerNorm) for module in fused.modules())
    assert not any(module.training for module in fused.modules())
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert list(before) == [name for name, _ in fused.named_parameters()]
    assert all(before[name] is parameter for name, parameter in fused.named_parameters())
    assert {module.eps for module in fused.modules() if isinstance(module, FusedLayerNorm)} == {1e-12}
    ids = torch.randint(5, 90, (3, 16))
    labels = torch.where(torch.rand(3, 16) < 0.3, ids, modeling.IGNORED_LABEL)
    for model in (plain.train(), fused.train()):
        model(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, next_sentence_label=torch.tensor([0, 1, 1])
        ).loss.backward()
    for (name, left), (_, right) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert fuse_layer_norms(plain, Choice(FusedLAMB, None, "")) == 0


def test_autocast_does_not_round_layer_norms_weights(apex):
    norm = nn.LayerNorm(64, eps=1e-12)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    model = nn.Sequential(norm)
    fuse_layer_norms(model, Choice(None, FusedLayerNorm, ""))
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, norm(x.float()), rtol=1e-5, atol=1e-5)
