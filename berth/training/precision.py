"""Precision: what runs in which type, and the loss scale that fp16 needs.

Parameters, gradients, reduction and optimizer state are fp32 in every mode; ``bf16`` and ``fp16`` only choose the type
matrix products run in (autocast). ``fp8`` is ``bf16`` for a model whose encoder went through
:func:`berth.kernels.fp8.convert_linears`, whose layers choose their scales themselves: it needs no loss scale. The loss scaler is
berth's own because torch's has no floor: without one a diverged run halves its scale for ever and skips every step in silence.

**A skipped step.** When the global gradient norm is not finite, weights, moments, the optimizer's step count and hence the learning
rate stay as they are: the next step uses the same rate. The samples count as consumed, so the next step sees new ones. A dynamic scale
is halved, down to its floor. The norm is taken after gradients were reduced over ranks, where one rank's infinity has become
everybody's: all ranks skip the same steps and hold the same scale without talking about it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8")


@dataclasses.dataclass
class LossScaler:
    """Dynamic or static loss scale.

    Dynamic: after an overflow the scale is multiplied by ``backoff_factor`` (not below ``floor``) and the step skipped; after
    ``growth_interval`` good steps in a row it is multiplied by ``growth_factor`` (not above ``ceiling``), and counting begins
    again. ``dynamic=False`` keeps it, and still skips. ``update`` must be told the same on all ranks.
    """

    scale: float = 2.0**20
    dynamic: bool = True
    floor: float = 1.0
    ceiling: float = 2.0**24
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    good_steps: int = 0

    def update(self, overflow: bool) -> None:
        """Account for one step that overflowed or not."""
        if not self.dynamic:
            return
        if overflow:
            self.scale = max(self.floor, self.scale * self.backoff_factor)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.scale = min(self.ceiling, self.scale * self.growth_factor)
            self.good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's scale, also one that was static when it was written; a static scale given on the command line stays.

        A count of good steps beyond this run's growth interval (another interval, or a checkpoint from before counting began again at
        growth) is taken modulo the interval.
        """
        if self.dynamic:
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"]) % self.growth_interval


@dataclasses.dataclass
class Precision:
    """One precision mode, chosen before the loop: ``autocast()`` around the forward pass, ``scaler`` for the loss."""

    name: str
    device_type: str
    scaler: LossScaler

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context for the forward pass."""
        if self.name in ("fp32", "tf32"):
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=torch.float16 if self.name == "fp16" else torch.bfloat16)


def make_precision(
    name: str, device_type: str, loss_scale: float, init_loss_scale: float, floor: float, growth_interval: int = 2000
) -> Precision:
    """Build a precision mode and set torch's matrix-product mode for fp32 (``tf32`` lets CUDA round to TF32).

    Args:
        loss_scale: 0 = dynamic (fp16), otherwise a static scale. Modes other than fp16 use no scale unless one is given.
        init_loss_scale: the first dynamic scale. floor: it never falls below this.
        growth_interval: good steps in a row (at least 1) after which a dynamic scale doubles.
    """
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    if loss_scale:
        return Precision(name, device_type, LossScaler(scale=loss_scale, dynamic=False))
    if name == "fp16":
        return Precision(
            name,
            device_type,
            LossScaler(
                scale=init_loss_scale, ceiling=max(LossScaler.ceiling, init_loss_scale), floor=floor, growth_interval=growth_interval
            ),
        )
    return Precision(name, device_type, LossScaler(scale=1.0, dynamic=False))
