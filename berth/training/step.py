"""One optimizer step: forward and backward over all micro-batches, one reduction, one update.

The loss is the sum over the rank's micro-batches divided by counts of the *global* batch, so the gradient is that of the mean
over the global batch however the batch is cut. Reduction averages over ranks, hence the factor ``world_size``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch

from berth.training.batches import MicroBatch, StepBatch
from berth.training.metrics import StepClock
from berth.training.parallel import Parallel
from berth.training.precision import Precision


class Schedule(Protocol):
    """What :mod:`optimization` offers: sets the learning rate of optimizer step ``step`` (from 1)."""

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float: ...


@dataclasses.dataclass
class LossSums:
    """This rank's shares of the step's losses and its correctly predicted tokens; tensors, so that a GPU is not waited for."""

    mlm: torch.Tensor
    nsp: torch.Tensor
    correct: torch.Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> LossSums:
        """Nothing yet."""
        return cls(*(torch.zeros((), device=device) for _ in range(3)))


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step did: this rank's share of the global losses and its correctly predicted masked tokens (0-dim tensors), the global
    gradient norm before clipping, the learning rate, whether the update was skipped because a gradient was not finite, and which were
    not, as (name, 'nan' or 'inf')."""

    mlm_loss: torch.Tensor
    nsp_loss: torch.Tensor
    mlm_correct: torch.Tensor
    grad_norm: float
    learning_rate: float
    skipped: bool
    nonfinite: list[tuple[str, str]]


class TrainingStep:
    """Runs optimizer steps on a spread model.

    Args:
        clip_norm: gradients are scaled to this global norm before the update; 0 = off.
        clock: learns which part of a step time goes to.
        progress: called before every micro-batch with its number (from 1) and how many there are.
    """

    def __init__(
        self,
        parallel: Parallel,
        schedule: Schedule,
        precision: Precision,
        clock: StepClock,
        *,
        clip_norm: float = 1.0,
        progress: Callable[[int, int], None] = lambda number, of: None,
    ) -> None:
        self.parallel, self.schedule, self.precision = parallel, schedule, precision
        self.clock, self.clip_norm, self.progress = clock, clip_norm, progress
        self.device, self.world_size = parallel.communicator.device, parallel.communicator.world_size
        self._settled = False

    def __call__(self, batch: StepBatch, step: int, masked: int, sequences: int) -> StepResult:
        """Do optimizer step ``step`` (1-based, sets the learning rate) on this rank's share ``batch``. Collective.

        ``masked`` and ``sequences`` count the masked tokens and sequences of the global batch.
        """
        self.parallel.module.train()
        self._settle(batch.micro_batches[0], masked, sequences)
        losses = LossSums.zeros(self.device)
        count = len(batch.micro_batches)
        for number, micro in enumerate(batch.micro_batches, 1):
            self.progress(number, count)
            with self.parallel.micro_batch(number == count):
                self._forward_backward(micro.to(self.device), losses, masked, sequences)
        self.clock.enter("optimizer")
        rate = self.schedule.apply(self.parallel.optimizer, step)
        scaler = self.precision.scaler
        update = self.parallel.update(scaler.scale, self.clip_norm)
        scaler.update(overflow=not update.finite)
        self.clock.enter("other")
        return StepResult(losses.mlm, losses.nsp, losses.correct, update.norm, rate, not update.finite, update.nonfinite)

    def _settle(self, micro: MicroBatch, masked: int, sequences: int) -> None:
        if self._settled:
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            there = micro.to(self.device)
            self.parallel.settle(lambda: self._forward_backward(there, LossSums.zeros(self.device), masked, sequences))
        self._settled = True

    def _forward_backward(self, micro: MicroBatch, losses: LossSums, masked: int, sequences: int) -> None:
        self.clock.enter("forward")
        with self.precision.autocast():
            output = self.parallel.module(
                input_ids=micro.input_ids,
                attention_mask=micro.attention_mask,
                token_type_ids=micro.token_type_ids,
                labels=micro.labels,
                masked_index=micro.masked_index,
                mlm_denominator=max(masked, 1),
                **self._nsp_arguments(micro, sequences),
            )
        self._account(output, micro, losses)
        self.clock.enter("backward")
        self.parallel.backward(output.loss * (self.precision.scaler.scale * self.world_size))

    def _account(self, output: Any, micro: MicroBatch, losses: LossSums) -> None:
        losses.mlm += output.mlm_loss.detach()
        losses.nsp += output.nsp_loss.detach()
        losses.correct += count_correct(output.prediction_logits.detach(), micro)

    def _nsp_arguments(self, micro: MicroBatch, sequences: int) -> dict[str, Any]:
        return {"next_sentence_label": micro.next_sentence_label, "nsp_denominator": sequences}


class MaskedLmTrainingStep(TrainingStep):
    """The step of ``--objective mlm``: the model has no next-sentence head."""

    def _nsp_arguments(self, micro: MicroBatch, sequences: int) -> dict[str, Any]:
        return {}

    def _account(self, output: Any, micro: MicroBatch, losses: LossSums) -> None:
        losses.mlm += output.loss.detach()
        losses.correct += count_correct(output.logits.detach(), micro)


def count_correct(logits: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
    """How many masked tokens have the largest logit (0-dim). ``logits`` [M, V], or [B, S, V] of every position."""
    if logits.dim() == 3:
        logits = logits.flatten(0, 1)[micro.masked_index]
    labels = micro.labels.flatten()[micro.masked_index]
    if logits.device.type == "cpu":  # argmax reads at half the speed of amax there: only where the label may be it
        likely = logits.gather(1, labels[:, None]).squeeze(1) >= logits.amax(1)
        logits, labels = logits[likely], labels[likely]
    return (logits.argmax(1) == labels).sum()
