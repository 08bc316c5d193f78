"""One optimizer step: forward and backward over all micro-batches, one reduction, one update.

The loss is the sum over the rank's micro-batches divided by counts of the *global* batch, so the gradient is that of the mean
over the global batch however the batch is cut. Reduction averages over ranks, hence the factor ``world_size``.

What changes from step to step (counts, loss scale, sums) lies in tensors that live as long as the step does and are refilled: a compiled
model is not compiled again for them, and a captured CUDA graph reads the new values. Nothing in a step waits for a GPU but the one look at
the gradient norm. Rejected: numbers handed to the model (each new count would be a new graph).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch

from berth.training.batches import MicroBatch, StepBatch
from berth.training.compiled import compiling
from berth.training.graphs import Graphs
from berth.training.metrics import StepClock
from berth.training.parallel import Parallel
from berth.training.precision import Precision
from berth.training.transfer import prefetched


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

    def clear(self) -> None:
        """Nothing again, in the same memory."""
        torch._foreach_zero_([self.mlm, self.nsp, self.correct])


class _Factors:
    """What a loss is divided and multiplied by, float32 0-dim on the device: exact for counts up to 2^24, and for powers of two."""

    def __init__(self, device: torch.device) -> None:
        self.masked, self.sequences, self.scale = (torch.ones((), device=device) for _ in range(3))

    def fill(self, masked: int, sequences: int, scale: float) -> None:
        self.masked.fill_(max(masked, 1))
        self.sequences.fill_(sequences)
        self.scale.fill_(scale)


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
        graphs: captures and replays the passes whose gradients stay on this rank; needs a ``parallel`` made with ``graphs=True``.
        ahead: micro-batches copied to a GPU while the one before them is computed; 0 = none.
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
        graphs: Graphs | None = None,
        ahead: int = 1,
    ) -> None:
        self.parallel, self.schedule, self.precision = parallel, schedule, precision
        self.clock, self.clip_norm, self.progress = clock, clip_norm, progress
        self.graphs, self.ahead = graphs, ahead
        self.device, self.world_size = parallel.communicator.device, parallel.communicator.world_size
        self._losses, self._factors = LossSums.zeros(self.device), _Factors(self.device)
        self._settled = False

    def __call__(self, batch: StepBatch, step: int, masked: int, sequences: int) -> StepResult:
        """Do optimizer step ``step`` (1-based, sets the learning rate) on this rank's share ``batch``. Collective.

        ``masked`` and ``sequences`` count the masked tokens and sequences of the global batch.
        """
        self.parallel.module.train()
        self._factors.fill(masked, sequences, self.precision.scaler.scale * self.world_size)
        self._settle(batch.micro_batches[0])
        losses, count = self._losses, len(batch.micro_batches)
        losses.clear()
        for number, micro in enumerate(prefetched(batch.micro_batches, self.device, self.ahead), 1):
            self.progress(number, count)
            self._micro_batch(micro, last=number == count)
        self.clock.enter("optimizer")
        rate = self.schedule.apply(self.parallel.optimizer, step)
        scaler = self.precision.scaler
        update = self.parallel.update(scaler.scale, self.clip_norm)
        scaler.update(overflow=not update.finite)
        self.clock.enter("other")
        return StepResult(
            losses.mlm.clone(), losses.nsp.clone(), losses.correct.clone(), update.norm, rate, not update.finite, update.nonfinite
        )

    def _settle(self, micro: MicroBatch) -> None:
        if self._settled:
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._aside():
            self.parallel.settle(lambda: self._forward_backward(micro.to(self.device)))
        self._settled = True

    def _micro_batch(self, micro: MicroBatch, last: bool) -> None:
        if self.graphs is not None and (self.world_size == 1 or not last):
            self.clock.enter("forward")  # a graph is forward and backward in one
            with self.parallel.unreduced(), self.clock.silent():
                self.graphs.run(micro, self._forward_backward)
        else:
            with self._aside(), self.parallel.micro_batch(last):
                self._forward_backward(micro)

    def _aside(self) -> contextlib.AbstractContextManager[Any]:
        """Around passes that are not recorded: beside recorded ones, on their stream, where DistributedDataParallel was made."""
        return contextlib.nullcontext() if self.graphs is None else self.graphs.aside()

    def _forward_backward(self, micro: MicroBatch) -> None:
        with compiling(self.parallel.compiled):
            self.clock.enter("forward")
            with self.precision.autocast():
                output = self.parallel.module(**self._arguments(micro))
            self._account(output, micro)
            self.clock.enter("backward")
            self.parallel.backward(output.loss * self._factors.scale)

    def _arguments(self, micro: MicroBatch) -> dict[str, Any]:
        return {**micro.arguments(), "mlm_denominator": self._factors.masked, "nsp_denominator": self._factors.sequences}

    def _account(self, output: Any, micro: MicroBatch) -> None:
        self._losses.mlm += output.mlm_loss.detach()
        self._losses.nsp += output.nsp_loss.detach()
        self._count(output.mlm_correct, output.prediction_logits, micro)

    def _count(self, correct: torch.Tensor | None, logits: torch.Tensor | None, micro: MicroBatch) -> None:
        if correct is None:
            assert logits is not None
            picked = next(
                (part.dense_sequence_output for part in self.parallel.module.modules() if hasattr(part, "dense_sequence_output")), True
            )
            correct = count_correct(logits.detach(), micro, picked=bool(picked))
        self._losses.correct += correct


class MaskedLmTrainingStep(TrainingStep):
    """The step of ``--objective mlm``: the model has no next-sentence head."""

    def _arguments(self, micro: MicroBatch) -> dict[str, Any]:
        given = {name: value for name, value in micro.arguments().items() if name != "next_sentence_label"}
        return {**given, "mlm_denominator": self._factors.masked}

    def _account(self, output: Any, micro: MicroBatch) -> None:
        self._losses.mlm += output.loss.detach()
        self._count(output.mlm_correct, output.logits, micro)


def count_correct(logits: torch.Tensor, micro: MicroBatch, *, picked: bool) -> torch.Tensor:
    """How many masked tokens have the largest logit (0-dim). ``logits`` [M, V] where ``picked``, else [B, S, V] or [T, V] of every position.

    A label below 0 (surplus entries of a packed micro-batch) is never right.
    """
    if not picked:
        logits = logits.flatten(0, -2)[micro.masked_index]
    labels = micro.labels.flatten()[micro.masked_index]
    if logits.device.type == "cpu":  # argmax reads at half the speed of amax there: only where the label may be it
        likely = logits.gather(1, labels[:, None].clamp(min=0)).squeeze(1) >= logits.amax(1)
        logits, labels = logits[likely], labels[likely]
    return (logits.argmax(1) == labels).sum()
