"""Who computes LAMB and layer norm: berth's Triton kernels, NVIDIA apex's CUDA kernels, or torch, whatever really works here.

In: what the user asked for (``--optimizer_backend``), the device, and how the model is spread. Out: a :class:`Choice` with its
reason for the log, an optimizer with the interface and the state of :class:`optimization.Lamb` whoever computes, and layer
norms replaced in place. Checkpoints therefore move between backends.

An import proves nothing: the package index has another project called apex, NVIDIA's own installs without kernels and then fails at
construction, Triton imports without a driver or a C compiler. So compiled modules are imported (``amp_C``, ``fused_layer_norm_cuda``), and each
part takes small steps on the device that must agree with torch's: a build for other GPUs or another torch imports, too.

Rejected: apex's FusedAdam (torch's fused AdamW is as fast and always there); apex.amp (gone from apex); apex's layer norm as it is
(inside autocast it rounds weights and output to 16 bits, torch's does not), or in a compiled model (it breaks the graph; there the compiler
fuses torch's).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import optimization
from berth.errors import ConfigError
from berth.training.apex_lamb import ApexLamb

REQUESTS = ("auto", "triton", "berth", "apex")

_HOW_TO_GET = {
    "triton": "Triton comes with torch's CUDA builds for Linux and needs a C compiler; or use --optimizer_backend auto",
    "apex": (
        "NVIDIA apex with its CUDA kernels comes with the NGC PyTorch container, or is built from its source with APEX_CPP_EXT=1 "
        "APEX_CUDA_EXT=1 ('pip install apex' installs another project); or use --optimizer_backend auto"
    ),
}


@dataclasses.dataclass(frozen=True)
class Backends:
    """The parts that were found to work on a device: their classes, or ``None`` and (of what was tried) a line in ``problems``."""

    fused_lamb: type | None = None
    mixed_lamb: type | None = None
    layer_norm: type | None = None
    triton_lamb: type | None = None
    problems: tuple[str, ...] = ()

    def first(self, parts: Iterable[str]) -> type | None:
        """The first of the fields called ``parts`` that is there."""
        return next((kind for kind in (getattr(self, part) for part in parts) if kind is not None), None)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Classes to use (``None``: optimization.Lamb, torch's layer norm), and why: a sentence for the log.

    All ranks must have chosen the same, or their weights drift apart by rounding: compare :attr:`name` at the start.
    """

    lamb: type | None
    layer_norm: type | None
    reason: str

    @property
    def name(self) -> str:
        """For instance ``TritonLamb``, ``FusedLAMB+FusedLayerNorm``; ``berth`` when nothing but torch computes."""
        return "+".join(kind.__name__ for kind in (self.lamb, self.layer_norm) if kind is not None) or "berth"


def probe(device: torch.device, wanted: Sequence[Sequence[str]] | None = None) -> Backends:
    """Try parts on ``device``; never raises for an absent or broken one.

    ``wanted``: lists of fields of :class:`Backends`; of each list, the first that works is found and the rest not tried. ``None``: all.
    """
    found: dict[str, Any] = {}
    problems = []
    for alternatives in [[part] for part in _PARTS] if wanted is None else wanted:
        for part in alternatives:
            extension, kernels, module, name, trial = _PARTS[part]
            try:
                kind = _load(extension, kernels, module, name)
                trial(kind, device)
            except Exception as error:  # a build for another torch, driver or GPU has no end of ways to fail, and Triton classes of its own
                lines = str(error).strip().splitlines()
                problems.append(f"{name}: {lines[0] if lines else type(error).__name__}")
            else:
                found[part] = kind
                break
    return Backends(**found, problems=tuple(problems))


def choose(
    requested: str,
    *,
    device: torch.device,
    optimizer: str,
    sharding: str,
    precision: str,
    compiled: bool = False,
    found: Backends | None = None,
) -> Choice:
    """Decide what computes LAMB and layer norm.

    Args:
        requested: one of :data:`REQUESTS`. ``auto`` takes, on CUDA, berth's Triton kernels where they work, else apex's, else torch's
            batched ones; and apex's layer norm. ``triton``: its LAMB and torch's layer norm. ``berth``: torch only.
        optimizer: ``lamb`` or ``adamw``. sharding: ``none``, or the way the state is spread.
        compiled: whether ``torch.compile`` will see the model; its layer norms are then torch's.
        found: what :func:`probe` says; it is asked when needed and ``None``.

    Raises :class:`ConfigError` when ``triton`` or ``apex`` is asked for and cannot do it: another optimizer, another device, sharded
    state, kernels missing.
    """
    forced = requested in _HOW_TO_GET
    if requested == "berth":
        return Choice(None, None, f"{_torch_only(device, optimizer)}: --optimizer_backend berth")
    obstacle = _obstacle(device, sharding)
    if forced and obstacle is None and optimizer != "lamb":
        obstacle = f"of optimizers it is used for LAMB only, not for --optimizer {optimizer}; use --optimizer_backend auto"
    if obstacle is not None:
        if forced:
            raise ConfigError(f"--optimizer_backend {requested}: {obstacle}")
        return Choice(None, None, f"{_torch_only(device, optimizer)}: neither Triton nor apex, {obstacle}")
    apex = ("mixed_lamb", "fused_lamb") if precision == "fp16" else ("fused_lamb", "mixed_lamb")
    lambs = {"auto": ("triton_lamb", *apex), "triton": ("triton_lamb",), "apex": apex}[requested] if optimizer == "lamb" else ()
    norms = ("layer_norm",) if requested != "triton" and not compiled else ()
    found = probe(device, (lambs, norms)) if found is None else found
    chosen = Choice(found.first(lambs), found.first(norms), "")
    if forced and chosen.lamb is None:
        raise ConfigError(
            f"--optimizer_backend {requested}: its LAMB does not work here ({'; '.join(found.problems)}); {_HOW_TO_GET[requested]}"
        )
    said = f"kernels: {chosen.name}" if chosen.name != "berth" else _torch_only(device, optimizer)
    return dataclasses.replace(chosen, reason=said + (f" ({'; '.join(found.problems)})" if found.problems else ""))


def _torch_only(device: torch.device, optimizer: str) -> str:
    """How a run computes without Triton and apex."""
    if optimizer != "lamb":
        return "torch's optimizer and layer norm"
    if device.type == "cuda":
        how = "torch's batched kernels"
    elif optimization.fused_problem() is None:
        how = "torch's fused Adam kernel in blocks"
    else:
        how = f"a loop over tensors: the fast path {optimization.fused_problem()}"
    return f"berth's LAMB ({how}) and torch's layer norm"


def _obstacle(device: torch.device, sharding: str) -> str | None:
    """Why no kernels of Triton or apex, installed or not, can serve this run."""
    if device.type != "cuda":
        return f"their kernels need a CUDA device, this run is on {device.type}"
    if sharding != "none":
        return f"their LAMB takes the norm of the piece it sees for that of the tensor, and {sharding} gives it pieces; berth's does not"
    return None


def make_lamb(choice: Choice, groups: list[dict[str, Any]], lr: float, max_grad_norm: float) -> optimization.Lamb:
    """LAMB over the groups of :func:`optimization.parameter_groups`; ``max_grad_norm`` 0 = no clipping."""
    if choice.lamb is None:
        return optimization.Lamb(groups, lr=lr, max_grad_norm=max_grad_norm)
    if issubclass(choice.lamb, optimization.Lamb):
        return choice.lamb(groups, lr=lr, max_grad_norm=max_grad_norm)
    return ApexLamb(choice.lamb, groups, lr=lr, max_grad_norm=max_grad_norm)


def fuse_layer_norms(model: nn.Module, choice: Choice) -> int:
    """Replace every ``nn.LayerNorm`` with weight and bias in ``model`` by apex's, where chosen; returns how many.

    Parameters are the same objects under the same names and in the same order. The results are torch's under every precision: computed
    and returned in float32, also inside autocast. Call it before the model is wrapped.
    """
    if choice.layer_norm is None:
        return 0
    kind = _in_parameter_type(choice.layer_norm)
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.LayerNorm and child.weight is not None and child.bias is not None:
                setattr(parent, name, _fused(child, kind))
                replaced += 1
    return replaced


def _fused(norm: nn.LayerNorm, kind: type) -> nn.Module:
    module: nn.Module = kind(norm.normalized_shape, eps=norm.eps)
    module.weight, module.bias = norm.weight, norm.bias
    return module.train(norm.training)


def _in_parameter_type(kind: Any) -> type:
    """``kind`` without what it does inside autocast: casting weights, too, to 16 bits."""

    class FusedLayerNorm(kind):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x.to(self.weight.dtype))

    return FusedLayerNorm


# -- what the probe does with each part -----------------------------------------------------------------------------------


def _load(extension: str, kernels: tuple[str, ...], module: str, name: str) -> type:
    compiled = importlib.import_module(extension)
    missing = [kernel for kernel in kernels if not hasattr(compiled, kernel)]
    if missing:
        raise ImportError(f"{extension} is without {', '.join(missing)}")
    return getattr(importlib.import_module(module), name)


_SHAPES = ((7, 5), (64, 65), (2,), (5003,))
"""Of the tensors of a trial: sizes that are multiples of 4 and not, of one block and of several."""


def _try_lamb(kind: type, device: torch.device) -> None:
    """Two steps, one clipped, on decayed and plain tensors of :data:`_SHAPES`, against berth's in float64."""
    results: list[list[Tensor]] = []
    for backend, dtype in ((Choice(kind, None, ""), torch.float32), (Choice(None, None, ""), torch.float64)):
        groups = [{"params": [_ramp(shape, device, dtype) for shape in _SHAPES], "weight_decay": decay} for decay in (0.01, 0.0)]
        tensors = [parameter for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
        optimizer = make_lamb(backend, groups, lr=0.1, max_grad_norm=0.5)
        for size in (1.0, 1e-3):
            for number, parameter in enumerate(tensors):
                parameter.grad = (parameter.detach() + number).cos() * size
            optimizer.step()
        results.append(tensors + [optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq") for parameter in tensors])
    _must_agree(*results)


def _try_triton(kind: type, device: torch.device) -> None:
    """As :func:`_try_lamb`; and a norm that is not finite must leave parameters and moments as they are."""
    _try_lamb(kind, device)
    parameter = _ramp((4096,), device)
    optimizer = kind([parameter])
    for norm in (1.0, float("inf")):
        parameter.grad = torch.ones_like(parameter)
        before = [tensor.clone() for tensor in (parameter.detach(), *optimizer.state[parameter].values())]
        optimizer.step(grad_norm=torch.tensor(norm, device=device))
    after = [parameter.detach(), *optimizer.state[parameter].values()]
    if not all(torch.equal(left, right) for left, right in zip(before, after, strict=True)):
        raise RuntimeError("it changed tensors on this device though the gradient norm was infinite")


def _try_layer_norm(kind: type, device: torch.device) -> None:
    """Forward and backward over [6, 64], against torch's."""
    results = []
    for backend in (Choice(None, kind, ""), Choice(None, None, "")):
        model = nn.Sequential(nn.LayerNorm(64, eps=1e-12)).to(device)
        fuse_layer_norms(model, backend)
        x = _ramp((6, 64), device)
        output = model(x)
        results.append([output, *torch.autograd.grad(output.pow(3).sum(), [x, *model.parameters()])])
    _must_agree(*results)


def _ramp(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    count = torch.Size(shape).numel()
    return nn.Parameter((torch.arange(count, dtype=torch.float32, device=device) / 7).sin().reshape(shape).to(dtype))


def _must_agree(theirs: list[Tensor], ours: list[Tensor]) -> None:
    for left, right in zip(theirs, ours, strict=True):
        difference = float((left - right).detach().abs().max())
        if not difference <= 1e-4 * float(right.detach().abs().max()):
            raise RuntimeError(f"its result on this device differs from torch's by {difference:.1e}")


_LAMB, _MIXED = ("multi_tensor_l2norm", "multi_tensor_lamb"), ("multi_tensor_l2norm_mp", "multi_tensor_lamb_mp")
_PARTS: dict[str, tuple[str, tuple[str, ...], str, str, Callable[[type, torch.device], None]]] = {
    "fused_lamb": ("amp_C", _LAMB, "apex.optimizers", "FusedLAMB", _try_lamb),
    "mixed_lamb": ("amp_C", _MIXED, "apex.optimizers", "FusedMixedPrecisionLamb", _try_lamb),
    "layer_norm": (
        "fused_layer_norm_cuda", ("forward_affine", "backward_affine"), "apex.normalization", "FusedLayerNorm", _try_layer_norm,
    ),
    "triton_lamb": ("triton", ("jit",), "berth.kernels.lamb", "TritonLamb", _try_triton),
}  # fmt: skip
"""Field of :class:`Backends`: compiled module, its functions that are needed, Python module, class, trial."""
