"""Who computes LAMB and layer norm: berth (torch only) or NVIDIA apex's CUDA kernels, where they are really there.

In: what the user asked for (``--optimizer_backend``), the device, and how the model is spread. Out: a :class:`Choice` with its
reason for the log, an optimizer with the interface and the state of :class:`optimization.Lamb` whoever computes, and layer
norms replaced in place. Checkpoints therefore move between backends.

``import apex`` proves nothing: the package index has another project of that name, and NVIDIA's own installs without kernels and
then fails at construction. So the compiled modules (``amp_C``, ``fused_layer_norm_cuda``) are imported, and each part takes one
small step on the device that must agree with berth's: a build for other GPUs or another torch imports, too.

Rejected: apex's FusedAdam (torch's fused AdamW is as fast and always there); apex.amp (gone from apex); apex's layer norm as it is
(inside autocast it rounds weights and output to 16 bits, torch's does not).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import optimization
from berth.errors import ConfigError
from berth.training.apex_lamb import ApexLamb

REQUESTS = ("auto", "berth", "apex")

_HOW_TO_GET = (
    "NVIDIA apex with its CUDA kernels comes with the NGC PyTorch container, or is built from its source with APEX_CPP_EXT=1 "
    "APEX_CUDA_EXT=1 ('pip install apex' installs another project); or use --optimizer_backend auto"
)
_FAILURES = (ImportError, OSError, AttributeError, TypeError, RuntimeError)
"""What a module built for another torch, CUDA or GPU raises when it is imported, constructed or run."""


@dataclasses.dataclass(frozen=True)
class Backends:
    """The parts of apex that work on a device: their classes, or ``None`` and a line in ``problems``."""

    fused_lamb: type | None = None
    mixed_lamb: type | None = None
    layer_norm: type | None = None
    problems: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Choice:
    """Apex's classes to use (``None``: berth's or torch's), and why: a sentence for the log.

    All ranks must have chosen the same, or their weights drift apart by rounding: compare :attr:`name` at the start.
    """

    lamb: type | None
    layer_norm: type | None
    reason: str

    @property
    def name(self) -> str:
        """For instance ``FusedLAMB+FusedLayerNorm``; ``berth`` when nothing is apex's."""
        return "+".join(kind.__name__ for kind in (self.lamb, self.layer_norm) if kind is not None) or "berth"


def probe(device: torch.device) -> Backends:
    """Import apex's compiled modules and try each part on ``device``; never raises for an absent or broken apex."""
    found: dict[str, Any] = {}
    problems = []
    for field, (extension, kernels, module, name, trial) in _PARTS.items():
        try:
            kind = _load(extension, kernels, module, name)
            trial(kind, device)
        except _FAILURES as error:
            lines = str(error).strip().splitlines()
            problems.append(f"{name}: {lines[0] if lines else type(error).__name__}")
        else:
            found[field] = kind
    return Backends(**found, problems=tuple(problems))


def choose(requested: str, *, device: torch.device, optimizer: str, sharding: str, precision: str, found: Backends | None = None) -> Choice:
    """Decide what computes LAMB and layer norm.

    Args:
        requested: one of :data:`REQUESTS`. ``auto`` takes apex's kernels on CUDA where they work, else berth's.
        optimizer: ``lamb`` or ``adamw``. sharding: ``none``, or the way the state is spread.
        found: what :func:`probe` says; it is asked when needed and ``None``.

    Raises :class:`ConfigError` when ``apex`` is asked for and cannot do it: another optimizer, another device, sharded state,
    kernels missing.
    """
    if requested == "berth":
        return Choice(None, None, "berth's LAMB and torch's layer norm: --optimizer_backend berth")
    forced = requested == "apex"
    obstacle = _obstacle(device, sharding)
    if forced and obstacle is None and optimizer != "lamb":
        obstacle = f"of optimizers it is used for LAMB only, not for --optimizer {optimizer}; use --optimizer_backend auto"
    if obstacle is not None:
        if forced:
            raise ConfigError(f"--optimizer_backend apex: {obstacle}")
        return Choice(None, None, f"apex is not used: {obstacle}")
    found = probe(device) if found is None else found
    lamb = (found.mixed_lamb or found.fused_lamb) if precision == "fp16" else (found.fused_lamb or found.mixed_lamb)
    if optimizer != "lamb":
        lamb = None
    elif forced and lamb is None:
        raise ConfigError(f"--optimizer_backend apex: no LAMB of apex works here ({'; '.join(found.problems)}); {_HOW_TO_GET}")
    chosen = Choice(lamb, found.layer_norm, "")
    said = f"apex: {chosen.name}" if chosen.name != "berth" else "apex is not used"
    return dataclasses.replace(chosen, reason=said + (f" ({'; '.join(found.problems)})" if found.problems else ""))


def _obstacle(device: torch.device, sharding: str) -> str | None:
    """Why no apex, installed or not, can serve this run."""
    if device.type != "cuda":
        return f"its kernels need a CUDA device, this run is on {device.type}"
    if sharding != "none":
        return f"its LAMB takes the norm of the piece it sees for that of the tensor, and {sharding} gives it pieces; berth's does not"
    return None


def make_lamb(choice: Choice, groups: list[dict[str, Any]], lr: float, max_grad_norm: float) -> optimization.Lamb:
    """LAMB over the groups of :func:`optimization.parameter_groups`; ``max_grad_norm`` 0 = no clipping."""
    if choice.lamb is None:
        return optimization.Lamb(groups, lr=lr, max_grad_norm=max_grad_norm)
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


def _try_lamb(kind: type, device: torch.device) -> None:
    """One clipped step on a decayed [7, 5] and a plain [33] tensor, against berth's."""
    updated: list[list[Tensor]] = []
    for backend in (Choice(kind, None, ""), Choice(None, None, "")):
        decayed, plain = _ramp((7, 5), device), _ramp((33,), device)
        decayed.grad, plain.grad = decayed.detach().cos(), plain.detach().sin()
        groups = [{"params": [decayed], "weight_decay": 0.01}, {"params": [plain], "weight_decay": 0.0}]
        make_lamb(backend, groups, lr=0.1, max_grad_norm=0.5).step()
        updated.append([decayed, plain])
    _must_agree(*updated)


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


def _ramp(shape: tuple[int, ...], device: torch.device) -> nn.Parameter:
    count = torch.Size(shape).numel()
    return nn.Parameter((torch.arange(count, dtype=torch.float32, device=device) / 7).sin().reshape(shape))


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
}  # fmt: skip
"""Field of :class:`Backends`: compiled module, its functions that are needed, Python module, class, trial."""
