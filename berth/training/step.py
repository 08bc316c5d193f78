"""One optimizer step: forward and backward over all micro-batches, one reduction, one update.

The loss is the sum over the rank's micro-batches divided by counts of the *global* batch, so the gradient is that of the mean
over the global batch however the batch is cut. DistributedDataParallel averages over ranks, hence the factor ``world_size``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from berth.training.batches import MicroBatch, StepBatch
from berth.training.distributed import Communicator
from berth.training.precision import Precision


class Schedule(Protocol):
    """What :mod:`optimization` offers: sets the learning rate of optimizer step ``step`` (from 1)."""

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float: ...


@dataclasses.dataclass
class LossSums:
    """Summed shares of the loss on this rank since the last report; tensors, so that a GPU is not waited for."""

    mlm: torch.Tensor
    nsp: torch.Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> LossSums:
        """Nothing yet."""
        return cls(torch.zeros((), device=device), torch.zeros((), device=device))


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step did: this rank's share of the global losses (0-dim tensors), the global gradient norm before clipping, the
    learning rate, and whether the update was skipped because a gradient was not finite."""

    mlm_loss: torch.Tensor
    nsp_loss: torch.Tensor
    grad_norm: float
    learning_rate: float
    skipped: bool


class TrainingStep:
    """Runs optimizer steps. ``model`` is the bare module; it is wrapped for data parallelism here when there are several ranks.

    Args:
        global_norm: 2-norm of all gradients together, as a 0-dim tensor.
        clip_norm: gradients are scaled to this global norm before the update; 0 = off. Used only when the optimizer does not clip
            by itself (``clips_itself``; LAMB does).
        reduce_fp16: send gradients as fp16 between ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        precision: Precision,
        communicator: Communicator,
        *,
        global_norm: Callable[[list[torch.Tensor]], torch.Tensor],
        clips_itself: bool,
        clip_norm: float = 1.0,
        reduce_fp16: bool = False,
    ) -> None:
        self.optimizer, self.schedule, self.precision = optimizer, schedule, precision
        self.communicator, self.device = communicator, communicator.device
        self.global_norm, self.clips_itself, self.clip_norm = global_norm, clips_itself, clip_norm
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model: nn.Module = model
        self._settled = False
        if communicator.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
            if reduce_fp16:
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

                self.model.register_comm_hook(None, fp16_compress_hook)

    def __call__(self, batch: StepBatch, step: int, masked: int, sequences: int) -> StepResult:
        """Do optimizer step ``step`` (1-based, sets the learning rate) on this rank's share ``batch``.

        ``masked`` and ``sequences`` count the masked tokens and sequences of the global batch.
        """
        self.model.train()
        if isinstance(self.model, DistributedDataParallel) and not self._settled:
            self._settle(batch.micro_batches[0], masked, sequences)
        losses = LossSums.zeros(self.device)
        last = len(batch.micro_batches) - 1
        for number, micro in enumerate(batch.micro_batches):
            with self._synchronised(number == last):
                self._forward_backward(micro.to(self.device), losses, masked, sequences)
        return self._update(losses, step)

    def _settle(self, micro: MicroBatch, masked: int, sequences: int) -> None:
        """One backward pass that counts for nothing, so that a resumed run adds gradients up in the order of the run it continues.

        DistributedDataParallel lays its buckets out anew after the first backward pass. A gradient's place in its bucket decides in which
        order the ranks' shares are added, so that with more than two ranks the first step of a process would differ in the last bits.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self._forward_backward(micro.to(self.device), LossSums.zeros(self.device), masked, sequences)
        self.optimizer.zero_grad(set_to_none=False)
        self._settled = True

    def _synchronised(self, boundary: bool) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.model, DistributedDataParallel) and not boundary:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _forward_backward(self, micro: MicroBatch, losses: LossSums, masked: int, sequences: int) -> None:
        with self.precision.autocast():
            output = self.model(
                input_ids=micro.input_ids,
                attention_mask=micro.attention_mask,
                token_type_ids=micro.token_type_ids,
                labels=micro.labels,
                masked_index=micro.masked_index,
                mlm_denominator=max(masked, 1),
                **self._nsp_arguments(micro, sequences),
            )
        (output.loss * (self.precision.scaler.scale * self.communicator.world_size)).backward()
        self._account(output, losses)

    def _account(self, output: Any, losses: LossSums) -> None:
        losses.mlm += output.mlm_loss.detach()
        losses.nsp += output.nsp_loss.detach()

    def _nsp_arguments(self, micro: MicroBatch, sequences: int) -> dict[str, Any]:
        return {"next_sentence_label": micro.next_sentence_label, "nsp_denominator": sequences}

    @torch.no_grad()
    def _update(self, losses: LossSums, step: int) -> StepResult:
        rate = self.schedule.apply(self.optimizer, step)
        scaler = self.precision.scaler
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if scaler.scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scaler.scale)
        norm_tensor = self.global_norm(gradients)
        norm = float(norm_tensor)
        finite = norm == norm and norm != float("inf")
        if finite:
            if self.clips_itself:
                self.optimizer.step(grad_norm=norm_tensor)  # type: ignore[call-overload]
            else:
                if self.clip_norm and norm > self.clip_norm:
                    torch._foreach_mul_(gradients, self.clip_norm / norm)
                self.optimizer.step()
        scaler.update(overflow=not finite)
        self.optimizer.zero_grad(set_to_none=not isinstance(self.model, DistributedDataParallel))
        return StepResult(losses.mlm, losses.nsp, norm, rate, skipped=not finite)


class MaskedLmTrainingStep(TrainingStep):
    """The step of ``--objective mlm``: the model has no next-sentence head."""

    def _nsp_arguments(self, micro: MicroBatch, sequences: int) -> dict[str, Any]:
        return {}

    def _account(self, output: Any, losses: LossSums) -> None:
        losses.mlm += output.loss.detach()
