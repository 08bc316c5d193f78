"""LAMB by NVIDIA apex's kernels behind the interface and the state of :class:`optimization.Lamb`.

In: apex's class (:mod:`berth.training.backends` finds it), parameter groups. Out: an optimizer that nothing else need tell from
berth's, so that checkpoints move between the two. This module does not import apex.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import optimization

_FLOAT32_MAX = torch.finfo(torch.float32).max
"""The limit that switches apex's clipping off: its kernels divide by the limit, so 0 is not "off" there."""


class ApexLamb(optimization.Lamb):
    """:class:`optimization.Lamb` whose update is done by ``kind``, apex's FusedLAMB or FusedMixedPrecisionLamb.

    Groups, moments and ``state_dict`` are Lamb's; before each update they are lent to apex's optimizer, which works on the same
    tensors. Parameters are float32 in every precision of berth, so both classes compute the same: FusedLAMB is right for gradients
    that were unscaled before, as berth's step does. FusedMixedPrecisionLamb (taken for fp16) also unscales by itself: a loss scale
    and an overflow flag that are tensors on the device are not waited for, and then a group's ``step`` is a 0-dim int tensor, until
    ``state_dict`` reads it.

    **The gradients are overwritten by the update**: do not read them after ``step()``. Clipping uses apex's own float32 norm;
    ``grad_norm`` is the caller's, or taken before the update (also when a flag on the device then stops the update).
    """

    clips_itself = True
    overwrites_gradients = True

    def __init__(self, kind: type, groups: list[dict[str, Any]], lr: float, max_grad_norm: float) -> None:
        super().__init__(groups, lr=lr, max_grad_norm=max_grad_norm)
        limit = min(self.max_grad_norm, _FLOAT32_MAX)
        options: dict[str, Any] = {**self.defaults, "adam_w_mode": True, "use_nvlamb": False, "max_grad_norm": limit}
        self._scales_itself = "grad_scaler" in inspect.signature(kind.step).parameters  # type: ignore[attr-defined]
        if not self._scales_itself:
            options["set_grad_none"] = False
        lent = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in self._filled_groups()]
        self._inner: Any = kind(lent, **options)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float | Tensor | None = None,
        found_inf: bool | Tensor | None = None,
        grad_norm: float | Tensor | None = None,
    ) -> Any:
        """As :meth:`optimization.Lamb.step`; overwrites the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        flag = found_inf if self._scales_itself and isinstance(found_inf, Tensor) else None
        if flag is None and found_inf is not None and bool(found_inf):
            return loss
        pairs = [pair for group in self.param_groups for pair in self._pairs(group)]
        if not pairs:
            return loss
        gradients = [gradient for _, gradient in pairs]
        scale = torch.as_tensor(1.0 if grad_scale is None else grad_scale, dtype=torch.float32, device=gradients[0].device).reshape(1)
        norm = optimization.global_norm(gradients) / scale if grad_norm is None else grad_norm
        self.grad_norm = torch.as_tensor(norm, device=scale.device).double().reshape(())
        self._lend([parameter for parameter, _ in pairs])
        taken: Any = 1
        if self._scales_itself:
            scaler = _DeviceScale(scale, flag)
            self._inner.step(grad_scaler=scaler)
            taken = 1 if flag is None else 1 - scaler.found_inf.reshape(()).int()
        else:
            if grad_scale is not None:
                torch._foreach_div_(gradients, scale.reshape(()))
            self._inner.step()
        for group in self.param_groups:
            group["step"] = group["step"] + taken
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As Lamb's: moments float32, ``step`` an int (read from the device where it is there)."""
        for group in self.param_groups:
            group["step"] = int(group["step"])
        return super().state_dict()

    def _filled_groups(self) -> list[dict[str, Any]]:
        """Groups with parameters: kernels launched with an empty list of tensors fail."""
        return [group for group in self.param_groups if group["params"]]

    def _lend(self, parameters: list[Tensor]) -> None:
        """Give apex's optimizer this one's moments, and its rates and counts in the form it keeps them (numbers or tensors)."""
        for parameter in parameters:
            self._moments(parameter)
        self._inner.state = self.state
        for ours, theirs in zip(self._filled_groups(), self._inner.param_groups, strict=True):
            for key in ("lr", "step", "betas", "eps", "weight_decay", "bias_correction", "grad_averaging"):
                if isinstance(theirs.get(key), Tensor):
                    theirs[key].fill_(ours[key])
                else:
                    theirs[key] = ours[key]


class _DeviceScale:
    """The two questions that FusedMixedPrecisionLamb asks torch's GradScaler, answered with tensors (float32 [1])."""

    def __init__(self, scale: Tensor, found_inf: Tensor | None) -> None:
        self.scale = scale
        flag = torch.zeros_like(scale) if found_inf is None else found_inf.to(scale.device).reshape(1)
        self.found_inf = (flag != 0).float()  # apex compares with 1, and a sum over ranks may be 2

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {optimizer.param_groups[0]["params"][0].device: self.found_inf}

    def _get_scale_async(self) -> Tensor:
        return self.scale
