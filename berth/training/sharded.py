"""Native sharding: ``zero1`` (optimizer state in pieces), ``zero2`` (gradients too) and ``zero3`` (parameters too).

Bytes a parameter on each of N ranks in float32 (LAMB and AdamW alike; benchmarks/sharding.py counts them). What a step needs besides, in its
backward pass: R stands for the embeddings and heads, L for a layer.

====== ============ =========== ======= =============================================
stage  parameters   gradients   moments besides
====== ============ =========== ======= =============================================
none   4            4           8       nothing
zero1  4            4           8 / N   nothing
zero2  4 / N        4 / N       8 / N   whole parameters; gradients of R and one L
zero3  4 / N        4 / N       8 / N   parameters of R and two L; gradients of R and one L
====== ============ =========== ======= =============================================

Gradients are reduced once a step, so with accumulation zero2 and zero3 hold whole gradients (4) until the last micro-batch. Autocast keeps a
16-bit copy of the layers' weights (2) from the forward to the backward pass at every stage. The update has a scratch as large as the local
pieces of the parameters (LAMB).

zero1: parameters are views of one flat buffer of which each rank updates an equal range; DistributedDataParallel reduces gradients, as it does
unsharded. zero2, zero3: ``torch.distributed.fsdp.fully_shard`` cuts each tensor into rows. Optimizers see plain local tensors only.

Rejected: a reduce-scatter of the flat buffer for zero1 (all-reduce overlaps with the backward pass as it is, and whole gradients give the norm
without another collective); FSDP's own ``reduce_dtype`` (micro-batches would be added up in 16 bits).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

import modeling
import optimization
from berth.training.compiled import compile_model, effective
from berth.training.distributed import Communicator
from berth.training.metrics import StepClock
from berth.training.parallel import WIRES, Native, Recipe, Replicated
from berth.training.pieces import Shards, chunked_rows, equal_ranges, gather

ALIGNMENT = 128
"""Elements to a multiple of which tensors and ranges begin in zero1's flat buffer: matrix kernels want aligned weights."""

# torch 2.13 renamed them
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Zero1(Replicated):
    """Every rank holds all parameters and gradients, and the optimizer state of an equal share of all elements.

    Arguments as :class:`berth.training.parallel.Replicated`; for two ranks or more.
    """

    def make_optimizer(self, recipe: Recipe) -> torch.optim.Optimizer:
        """Over the pieces of this rank's range. Moves the parameters into the flat buffer."""
        whole = [(name, parameter) for name, parameter in self.plain.named_parameters() if parameter.requires_grad]
        world, rank = self.communicator.world_size, self.communicator.rank
        shapes = [parameter.shape for _, parameter in whole]
        starts, total = [], 0
        for shape in shapes:
            starts.append(total)
            total += _aligned(shape.numel())
        self._size = _aligned(-(-total // world))
        self._flat = flatten([parameter for _, parameter in whole], starts, self._size * world)
        layout = equal_ranges(shapes, starts, self._size, world)
        held = layout.ranges[rank]
        pieces = [nn.Parameter(self._flat[start + low : start + high]) for start, (low, high) in zip(starts, held, strict=True)]
        self._whole = [parameter for _, parameter in whole]
        self.shards = Shards(self.communicator, self.clock, [(name, p) for (name, _), p in zip(whole, pieces, strict=True)], layout)
        return self.shards.make_optimizer(recipe)

    def gradients(self) -> list[tuple[str, Tensor]]:
        """See :class:`Native`; whole tensors, of which the pieces get their parts."""
        held = self.shards.layout.ranges[self.communicator.rank]
        for parameter, piece, (low, high) in zip(self._whole, self.shards.pieces, held, strict=True):
            piece.grad = parameter.grad.view(-1)[low:high] if parameter.grad is not None and low < high else None
        return super().gradients()

    @torch.no_grad()
    def after_update(self) -> None:
        """See :class:`Native`. Each rank's range to all, in place."""
        begin = self.communicator.rank * self._size
        with self.shards.communicating():
            _ALL_GATHER(self._flat, self._flat[begin : begin + self._size])

    def drop_gradients(self) -> None:
        """See :class:`Replicated`."""
        super().drop_gradients()
        for piece in self.shards.pieces:
            piece.grad = None

    def model_state(self) -> dict[str, Tensor] | None:
        """See :class:`Parallel`. No tensor shares the flat buffer's memory any more; tied ones share their own."""
        if not self.communicator.is_main:
            return None
        tensors = self.plain.state_dict(keep_vars=True)
        copies = _copies(tensors.values())
        return {name: copies[tensor] for name, tensor in tensors.items()}

    def optimizer_state(self) -> dict[str, Any] | None:
        """See :class:`Parallel`."""
        return self.shards.optimizer_state(self.optimizer)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """See :class:`Parallel`."""
        self.shards.load_optimizer(self.optimizer, state)


class FullySharded(Native):
    """Every rank holds some rows of each parameter, of its gradient and of its optimizer state.

    Arguments as :class:`berth.training.parallel.Replicated` (but no ``graphs``), for two ranks or more, and ``stage``: 2 keeps parameters
    whole from the first forward to the last backward pass of a step, 3 has them whole a layer at a time (embeddings and heads stay whole
    between forward and backward, which would gather them again at once).
    """

    def __init__(
        self,
        model: nn.Module,
        communicator: Communicator,
        clock: StepClock,
        recipe: Recipe,
        wire: str = "fp32",
        *,
        stage: int = 3,
        compiled: str = "off",
        compile_options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__(communicator, clock)
        self.plain = self.module = model
        self.stage = stage
        self.compiled = effective(compiled, communicator.world_size)
        compile_model(model, self.compiled, **compile_options)  # first: what is gathered before a layer runs stays outside of its graph
        self._mesh = init_device_mesh(communicator.device.type, (communicator.world_size,))
        shapes = [parameter.shape for parameter in model.parameters()]
        for layer in [module for module in model.modules() if isinstance(module, modeling.BertLayer)]:
            fully_shard(layer, mesh=self._mesh, reshard_after_forward=stage == 3)
        self._root: FSDPModule = fully_shard(model, mesh=self._mesh, reshard_after_forward=False)
        if WIRES[wire] != torch.float32:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_custom_reduce_scatter(_NarrowMean(WIRES[wire]))  # type: ignore[arg-type]
        self._named = list(model.named_parameters())
        self.shards = Shards(
            communicator, clock, [(name, _local(p)) for name, p in self._named], chunked_rows(shapes, communicator.world_size)
        )
        held = self.shards.layout.ranges[communicator.rank]
        assert [piece.numel() for piece in self.shards.pieces] == [high - low for low, high in held], (
            "fully_shard cuts otherwise than expected"
        )
        self.optimizer = self.shards.make_optimizer(recipe)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """See :class:`Parallel`."""
        self._root.set_requires_gradient_sync(last)
        self._root.set_is_last_backward(last)
        if self.stage == 2:
            self._root.set_reshard_after_backward(last)
        # 16-bit copies kept by an autocast around several micro-batches would lead gradients past fully_shard (the norm is 5 % low then)
        torch.clear_autocast_cache()
        yield

    @torch.no_grad()
    def gradients(self) -> list[tuple[str, Tensor]]:
        """See :class:`Native`; pieces."""
        named = []
        for (name, parameter), piece in zip(self._named, self.shards.pieces, strict=True):
            if isinstance(parameter.grad, DTensor):
                local = parameter.grad.to_local().view(-1)
                piece.grad = local if local.numel() else None
                named.append((name, local))
        return named

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See :class:`Native`."""
        filled = [gradient for gradient in gradients if gradient.numel()]
        return self.shards.sum(optimization.global_norm(filled).to(self.communicator.device).square()).sqrt()

    def add_over_ranks(self, counts: Tensor) -> Tensor:
        """See :class:`Native`."""
        return self.shards.sum(counts)

    def drop_gradients(self) -> None:
        """See :class:`Native`."""
        super().drop_gradients()
        for _, parameter in self._named:
            parameter.grad = None

    def model_state(self) -> dict[str, Tensor] | None:
        """See :class:`Parallel`."""
        tensors = self.plain.state_dict(keep_vars=True)
        wholes = gather([piece.detach() for piece in self.shards.pieces], self.shards.layout, self.communicator)
        if wholes is None:
            return None
        copies: dict[Tensor, Tensor] = {parameter: whole for (_, parameter), whole in zip(self._named, wholes, strict=True)}
        copies |= _copies(tensor for tensor in tensors.values() if tensor not in copies)  # buffers
        return {name: copies[tensor] for name, tensor in tensors.items()}

    def optimizer_state(self) -> dict[str, Any] | None:
        """See :class:`Parallel`."""
        return self.shards.optimizer_state(self.optimizer)

    def load_model(self, state: dict[str, Tensor]) -> None:
        """See :class:`Parallel`. Each rank takes its rows; torch checks names and shapes as of a plain model."""
        cut: dict[Any, DTensor] = {}
        sharded = {name for name, _ in self.plain.named_parameters(remove_duplicate=False)}
        given: dict[str, Tensor] = {}
        for name, tensor in state.items():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())  # tied tensors stay one
            if name in sharded and key not in cut:
                cut[key] = self._rows(tensor)
            given[name] = cut[key] if name in sharded else tensor
        self.plain.load_state_dict(given)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """See :class:`Parallel`."""
        self.shards.load_optimizer(self.optimizer, state)

    def _rows(self, tensor: Tensor) -> DTensor:
        """This rank's rows of a whole tensor, as torch's distributed tensor of the same global shape."""
        (low, high), width = chunked_rows([tensor.shape], self.communicator.world_size).ranges[self.communicator.rank][0], tensor[0].numel()
        local = tensor[low // width : high // width].to(self.communicator.device)
        return DTensor.from_local(local, self._mesh, [Shard(0)], shape=tensor.shape, stride=tensor.contiguous().stride())


class _NarrowMean:
    """What ``fully_shard`` calls to reduce gradients: the mean over ranks, sent as ``wire``, in float32 before and after.

    Divided first, as unsharded: a sum of 16-bit numbers could leave their range.
    """

    def __init__(self, wire: torch.dtype) -> None:
        self.wire = wire

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:  # fmt: skip
        assert op == dist.ReduceOp.AVG and not async_op, "fully_shard reduces otherwise than expected"
        sent = (input_tensor / group.size()).to(self.wire)
        received = torch.empty(output_tensor.shape, dtype=self.wire, device=sent.device)
        _REDUCE_SCATTER(received, sent, group=group)
        output_tensor.copy_(received)


@torch.no_grad()
def flatten(parameters: Sequence[nn.Parameter], starts: Sequence[int], size: int) -> Tensor:
    """A float32 buffer of ``size`` elements on the parameters' device, of which they are views from ``starts`` on; zeros in between."""
    flat = torch.zeros(size, dtype=torch.float32, device=parameters[0].device)
    for parameter, start in zip(parameters, starts, strict=True):
        view = flat[start : start + parameter.numel()].view(parameter.shape)
        view.copy_(parameter)
        parameter.data = view
    return flat


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _local(parameter: nn.Parameter) -> nn.Parameter:
    """This rank's rows of a sharded parameter, flat, in the same memory."""
    assert isinstance(parameter, DTensor)
    with torch.no_grad():
        rows = parameter.to_local()
    return nn.Parameter(rows.view(-1), requires_grad=parameter.requires_grad)


def _copies(tensors: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Copies in CPU memory, each in memory of its own; from CUDA through pinned memory, with one wait at the end."""
    copies = {
        tensor: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        for tensor in dict.fromkeys(tensors)
    }
    for device in {tensor.device for tensor in copies if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return copies
