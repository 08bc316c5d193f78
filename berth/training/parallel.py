"""A model spread over ranks: what a training step and a checkpoint need of it, whatever the way it is spread.

:class:`Parallel` is the interface, :class:`Native` what all ways but DeepSpeed's share, :class:`Replicated` the plain one: every rank holds
everything, DistributedDataParallel reduces gradients. The others are in :mod:`berth.training.sharded` and :mod:`berth.training.ds_engine`.

Gradients are summed over micro-batches in fp32 where they arise, and reduced once, with the last micro-batch. The loss is divided by counts of
the global batch and multiplied by the number of ranks, because reduction averages. State leaves and enters whole: the tensors of one
process, in the names and shapes of the plain model and of :class:`optimization.Lamb`, so that a checkpoint knows no sharding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import optimization
from berth.training.backends import Choice, make_lamb
from berth.training.compiled import compile_model, effective, plain
from berth.training.distributed import Communicator
from berth.training.graphs import aside
from berth.training.metrics import StepClock
from berth.training.nonfinite import nonfinite_names
from berth.training.saving import snapshot
from berth.training.transfer import Arriving

WIRES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Update(NamedTuple):
    """What :meth:`Parallel.update` did: the global gradient norm before clipping (not finite: nothing was changed), and the tensors whose
    gradient is not finite, as (name, 'nan' or 'inf'); both are the same on all ranks."""

    norm: float
    nonfinite: list[tuple[str, str]]

    @property
    def finite(self) -> bool:
        """Whether the update was made."""
        return math.isfinite(self.norm)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the optimizer is made: ``lamb`` or ``adamw``, peak rate, weight decay, clipping (0 = off), and whose LAMB it is."""

    optimizer: str
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    backend: Choice

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of whole tensors."""
        if self.optimizer == "adamw":
            return optimization.adamw(groups, lr=self.learning_rate)
        return make_lamb(self.backend, groups, self.learning_rate, self.max_grad_norm)


class Parallel(ABC):
    """A model, its optimizer, and how both are spread over ranks. Methods that say *collective* must be called by all ranks.

    ``module`` is what a forward pass calls, in training (inside of :meth:`micro_batch`) and evaluation (inside of :meth:`evaluating`); a
    sharded one communicates in it, so that all ranks must make the same number of passes. ``compiled`` says how much of it
    torch.compile has made, of :data:`berth.training.compiled.MODES`.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    compiled: str = "off"

    def __init__(self, communicator: Communicator, clock: StepClock) -> None:
        self.communicator, self.clock = communicator, clock

    @abstractmethod
    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of one micro-batch; gradients are reduced in the ``last`` of a step."""

    def unreduced(self) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward whose gradients stay on this rank: what a CUDA graph may hold."""
        return self.micro_batch(last=False)

    def evaluating(self) -> contextlib.AbstractContextManager[Any]:
        """Around forward passes that are not training: nothing is compiled for them."""
        return plain() if self.compiled == "layers" else contextlib.nullcontext()

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` (0-dim; scaled by the caller)."""

    @abstractmethod
    def update(self, scale: float, clip_norm: float) -> Update:
        """Divide gradients by ``scale``, clip them to the global norm ``clip_norm`` (0 = off), update the parameters unless the norm is not
        finite, drop the gradients. Collective."""

    def settle(self, backward: Callable[[], None]) -> None:  # noqa: B027  most ways need none
        """Whatever must be done once before the first step, with a ``backward`` pass that counts for nothing."""

    @abstractmethod
    def model_state(self) -> dict[str, Tensor] | None:
        """Copies of all model tensors in CPU memory on rank 0, None elsewhere. Collective."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Any] | None:
        """The same of the optimizer's ``state_dict``. Collective."""

    @abstractmethod
    def load_model(self, state: dict[str, Tensor]) -> None:
        """Take whole tensors (the same on all ranks). ``RuntimeError`` for names or shapes that do not fit. Collective."""

    @abstractmethod
    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take a whole ``state_dict``; ``ValueError`` or ``KeyError`` when it is another optimizer's. Collective."""


class Native(Parallel):
    """What every way has in common that reduces through torch itself."""

    def backward(self, loss: Tensor) -> None:
        """See :class:`Parallel`."""
        loss.backward()

    @abstractmethod
    def gradients(self) -> list[tuple[str, Tensor]]:
        """Reduced gradients of this rank by parameter name: whole tensors, or the rank's (possibly empty) pieces of all."""

    @abstractmethod
    def norm(self, gradients: list[Tensor]) -> Tensor:
        """2-norm of the whole gradient, 0-dim float64, the same on all ranks."""

    @abstractmethod
    def add_over_ranks(self, counts: Tensor) -> Tensor:
        """Sum of ``counts`` over ranks that hold different pieces; as it is where all hold everything."""

    def after_update(self) -> None:
        """Make parameters whole again where only pieces were updated. Collective."""

    def drop_gradients(self) -> None:
        """Forget the gradients of the step."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update(self, scale: float, clip_norm: float) -> Update:
        """See :class:`Parallel`."""
        named = self.gradients()
        tensors = [tensor for _, tensor in named]
        if scale != 1.0:
            torch._foreach_mul_(tensors, 1.0 / scale)
        norm = self.norm(tensors)
        arriving, guarded = Arriving(norm), getattr(self.optimizer, "guards_nonfinite", False)
        if guarded:  # changes nothing if the norm is not finite, so it need not wait for the host to know
            self._launch(norm)
            self.after_update()
        value = arriving.value()
        bad: list[tuple[str, str]] = []
        if not math.isfinite(value):
            if guarded:
                self.optimizer.undo_step()  # type: ignore[attr-defined]
            bad = nonfinite_names(named, self.add_over_ranks)
        elif not guarded:
            self._step(tensors, norm, value, clip_norm)
            self.after_update()
        self.drop_gradients()
        return Update(value, bad)

    def _step(self, tensors: list[Tensor], norm: Tensor, value: float, clip_norm: float) -> None:
        if hasattr(self.optimizer, "max_grad_norm"):  # LAMB clips by itself
            self._launch(norm)
            return
        if clip_norm and value > clip_norm:
            torch._foreach_mul_(tensors, clip_norm / value)
        self.optimizer.step()

    def _launch(self, norm: Tensor) -> None:
        self.optimizer.step(grad_norm=norm)  # type: ignore[call-overload]


class Replicated(Native):
    """Every rank holds all parameters, gradients and optimizer state.

    Args:
        model: the bare module on its device, the same weights on every rank.
        recipe: how the optimizer is made.
        wire: name in :data:`WIRES` of the type gradients have between ranks; sums over micro-batches stay fp32.
        compiled: how much of the model training passes run through torch.compile, of :data:`berth.training.compiled.MODES`; with several
            ranks layer by layer at most.
        compile_options: for :func:`berth.training.compiled.compile_model`.
        graphs: whether passes are recorded as CUDA graphs; gradients then keep their memory from step to step.
    """

    def __init__(
        self,
        model: nn.Module,
        communicator: Communicator,
        clock: StepClock,
        recipe: Recipe,
        wire: str = "fp32",
        *,
        compiled: str = "off",
        compile_options: Mapping[str, Any] = MappingProxyType({}),
        graphs: bool = False,
    ) -> None:
        super().__init__(communicator, clock)
        self.plain = self.module = model
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.optimizer = self.make_optimizer(recipe)
        self.compiled = effective(compiled, communicator.world_size)
        self._alone: Any = compile_model(model, self.compiled, **compile_options)
        self._distributed: DistributedDataParallel | None = None
        if communicator.world_size > 1:
            with aside(communicator.device) if graphs else contextlib.nullcontext():
                self._distributed = wrap(model, communicator, clock, WIRES[wire])
        self._keep_gradients = graphs or self._distributed is not None

    def make_optimizer(self, recipe: Recipe) -> torch.optim.Optimizer:
        """Over whole tensors, in the two decay groups."""
        return recipe.build(optimization.parameter_groups(self.plain, weight_decay=recipe.weight_decay))

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """See :class:`Parallel`. Training goes through DistributedDataParallel or the compiled model, evaluation through the bare one."""
        if self._distributed is None:
            with self.unreduced():
                yield
            return
        with self._called(self._distributed), contextlib.nullcontext() if last else self._distributed.no_sync():
            yield

    def unreduced(self) -> contextlib.AbstractContextManager[Any]:
        """See :class:`Parallel`. Past DistributedDataParallel, which takes no notice outside of its own passes."""
        return self._called(self._alone)

    @contextlib.contextmanager
    def _called(self, module: Any) -> Iterator[None]:
        self.module = module
        try:
            yield
        finally:
            self.module = self.plain

    def settle(self, backward: Callable[[], None]) -> None:
        """Let DistributedDataParallel lay out its buckets, so that a resumed run adds gradients up in the order of the run it continues.

        It lays them out anew after the first backward pass. A gradient's place in its bucket decides in which order the ranks' shares are
        added, so that with more than two ranks the first step of a process would differ in the last bits.
        """
        if self._distributed is not None:
            with self.micro_batch(last=True):
                backward()
            self.drop_gradients()

    def gradients(self) -> list[tuple[str, Tensor]]:
        """See :class:`Native`; whole tensors."""
        return [(name, parameter.grad) for parameter, name in self.names.items() if parameter.grad is not None]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See :class:`Native`; every rank has the same gradients."""
        return optimization.global_norm(gradients)

    def add_over_ranks(self, counts: Tensor) -> Tensor:
        """See :class:`Native`."""
        return counts

    def drop_gradients(self) -> None:
        """Zero them in place where they are views of DistributedDataParallel's buckets, or recorded graphs add to them."""
        if not self._keep_gradients:
            self.optimizer.zero_grad(set_to_none=True)
            return
        gradients = [parameter.grad for parameter in self.names if parameter.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

    def model_state(self) -> dict[str, Tensor] | None:
        """See :class:`Parallel`."""
        return snapshot(self.plain.state_dict()) if self.communicator.is_main else None

    def optimizer_state(self) -> dict[str, Any] | None:
        """See :class:`Parallel`."""
        return snapshot(self.optimizer.state_dict()) if self.communicator.is_main else None

    def load_model(self, state: dict[str, Tensor]) -> None:
        """See :class:`Parallel`."""
        self.plain.load_state_dict(state)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """See :class:`Parallel`."""
        self.optimizer.load_state_dict(state)


def wrap(model: nn.Module, communicator: Communicator, clock: StepClock, wire: torch.dtype) -> DistributedDataParallel:
    """``model`` in DistributedDataParallel whose gradients travel as ``wire``; the clock learns when only communication is left."""
    device = communicator.device
    ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, _mean_hook(communicator.world_size, clock, wire))
    return wrapped


def _mean_hook(world: int, clock: StepClock, wire: torch.dtype) -> Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]:
    """Mean over ranks of a bucket, sent as ``wire``. Divided first: a sum of 16-bit numbers could leave their range."""

    def reduce(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        sent = buffer.div_(world) if wire == buffer.dtype else buffer.div(world).to(wire)
        work = dist.all_reduce(sent, async_op=True)
        if bucket.is_last():
            clock.enter("communication")
        future = work.get_future()
        if sent is buffer:
            return future.then(lambda done: done.value()[0])
        return future.then(lambda done: buffer.copy_(done.value()[0]))

    reduce.__annotations__.clear()  # strings in this module, which DistributedDataParallel takes for wrong types
    return reduce
