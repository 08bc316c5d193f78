"""Pieces of tensors on ranks: an optimizer over them, and its state as one process would have it.

In: which flat range of each tensor each rank holds (:class:`Layout`), and this rank's pieces. Out: whole tensors in rank 0's CPU memory, in
blocks of bounded size, and the way back: each rank cuts its ranges out of a whole state that it has read (perhaps memory-mapped). Whole state
has the keys, order, shapes and types of :class:`optimization.Lamb` or ``torch.optim.AdamW`` over whole tensors, so it fits any cut.

Rejected: torch's distributed state dicts (they gather on the device, and want their own optimizer keys); scatter from rank 0 when
loading (every rank checks the file anyway, and reads the shared file system once).
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import optimization
from berth.training.distributed import Communicator
from berth.training.metrics import StepClock
from berth.training.parallel import Recipe
from berth.training.sharded_lamb import Segment, ShardedLamb

BLOCK_ELEMENTS = 1 << 24
"""Elements that rank 0 receives at once from all ranks together: 64 MiB of float32."""

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shapes of whole tensors, and ``ranges[rank][tensor]``: the (low, high) flat indices that a rank holds; low = high: nothing."""

    shapes: list[torch.Size]
    ranges: list[list[tuple[int, int]]]

    def only(self, tensors: Sequence[int]) -> Layout:
        """The layout of some of the tensors, in the order given."""
        return Layout([self.shapes[i] for i in tensors], [[held[i] for i in tensors] for held in self.ranges])


def equal_ranges(shapes: Sequence[torch.Size], starts: Sequence[int], size: int, world: int) -> Layout:
    """Tensors one after another in a flat buffer, each from its ``starts``, cut into ``world`` ranges of ``size`` elements."""
    ranges = []
    for rank in range(world):
        cuts = []
        for shape, start in zip(shapes, starts, strict=True):
            low, high = max(rank * size - start, 0), min((rank + 1) * size - start, shape.numel())
            cuts.append((low, high) if low < high else (0, 0))
        ranges.append(cuts)
    return Layout(list(shapes), ranges)


def chunked_rows(shapes: Sequence[torch.Size], world: int) -> Layout:
    """Each tensor cut along its first dimension as ``torch.chunk`` does: ``ceil(rows / world)`` rows a rank, the last ones fewer or none."""
    ranges = []
    for rank in range(world):
        cuts = []
        for shape in shapes:
            chunk, width = -(-shape[0] // world), shape[1:].numel()
            cuts.append((min(rank * chunk, shape[0]) * width, min((rank + 1) * chunk, shape[0]) * width))
        ranges.append(cuts)
    return Layout(list(shapes), ranges)


class Span(NamedTuple):
    """``length`` elements of piece number ``piece``, from its index ``start``, lie at index ``at`` of a window."""

    piece: int
    start: int
    at: int
    length: int


def spans(lengths: Sequence[int], low: int, high: int) -> Iterator[Span]:
    """What of pieces laid end to end lies in the window [low, high)."""
    ends = list(itertools.accumulate(lengths))
    for piece in range(bisect.bisect_right(ends, low), len(ends)):
        begin = ends[piece] - lengths[piece]
        if begin >= high:
            return
        start, stop = max(low, begin), min(high, ends[piece])
        if start < stop:
            yield Span(piece, start - begin, start - low, stop - start)


@torch.no_grad()
def gather(pieces: Sequence[Tensor], layout: Layout, communicator: Communicator) -> list[Tensor] | None:
    """Whole tensors in CPU memory on rank 0, ``None`` elsewhere, by blocks of :data:`BLOCK_ELEMENTS`. Collective.

    ``pieces``: this rank's flat pieces in the layout's order, of one type and on the device of the collectives.
    """
    lengths = [[high - low for low, high in held] for held in layout.ranges]
    longest = max((sum(held) for held in lengths), default=0)
    main, world, mine = communicator.is_main, communicator.world_size, lengths[communicator.rank]
    dtype = pieces[0].dtype if pieces else torch.float32
    wholes = [torch.empty(shape, dtype=dtype) for shape in layout.shapes] if main else None
    width = max(BLOCK_ELEMENTS // world, 1)
    for low in range(0, longest, width):
        high = min(low + width, longest)
        sent = torch.empty(high - low, dtype=dtype, device=communicator.device)
        for piece, start, at, length in spans(mine, low, high):
            sent[at : at + length] = pieces[piece][start : start + length]
        received = sent.new_empty(world, high - low) if main else None
        dist.gather(sent, list(received.unbind()) if received is not None else None, dst=0)
        if received is None or wholes is None:
            continue
        for rank, arrived in enumerate(received.cpu().unbind()):
            for piece, start, at, length in spans(lengths[rank], low, high):
                begin = layout.ranges[rank][piece][0] + start
                wholes[piece].view(-1)[begin : begin + length] = arrived[at : at + length]
    return wholes


class Shards:
    """This rank's pieces of a model's parameters, and what an optimizer over them needs.

    Args:
        named: (name, flat piece) of all parameters in the model's order, in the layout's order too.
    """

    def __init__(self, communicator: Communicator, clock: StepClock, named: Sequence[tuple[str, nn.Parameter]], layout: Layout) -> None:
        self.communicator, self.clock, self.layout = communicator, clock, layout
        self.names, self.pieces = [name for name, _ in named], [piece for _, piece in named]
        self.numbers = {piece: number for number, piece in enumerate(self.pieces)}

    @contextlib.contextmanager
    def communicating(self) -> Iterator[None]:
        """Around a collective inside the update."""
        self.clock.enter("communication")
        yield
        self.clock.enter("optimizer")

    def sum(self, values: Tensor) -> Tensor:
        """``values`` added up over the ranks, in place."""
        with self.communicating():
            dist.all_reduce(values)
        return values

    def make_optimizer(self, recipe: Recipe) -> torch.optim.Optimizer:
        """The recipe's optimizer over the pieces: the two decay groups with all parameters in them, empty pieces too."""
        groups = optimization.parameter_groups(zip(self.names, self.pieces, strict=True), weight_decay=recipe.weight_decay)
        if recipe.optimizer == "adamw":
            return optimization.adamw(groups, lr=recipe.learning_rate)
        lamb = ShardedLamb(groups, reduce=self.sum, tensors=len(self.pieces), lr=recipe.learning_rate, max_grad_norm=recipe.max_grad_norm)
        lamb.set_segments({piece: [Segment(0, piece.numel(), number)] for number, piece in enumerate(self.pieces)})
        return lamb

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """``optimizer.state_dict()`` as over whole tensors, in CPU memory on rank 0; ``None`` elsewhere. Collective."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        marks = torch.full((len(parameters), 2), -1.0, dtype=torch.float64)  # has moments; AdamW's step of this tensor
        for index, parameter in enumerate(parameters):
            entry = optimizer.state.get(parameter)
            if entry:
                marks[index] = torch.tensor([1.0, float(entry.get("step", -1.0))])
        marks = marks.to(self.communicator.device)
        dist.all_reduce(marks, op=dist.ReduceOp.MAX)  # a rank whose piece is empty may have no state of it
        steps = {index: step for index, (present, step) in enumerate(marks.tolist()) if present > 0}
        layout = self.layout.only([self.numbers[parameters[index]] for index in steps])
        state: dict[int, dict[str, Tensor]] = {
            index: {"step": torch.tensor(step, dtype=torch.float32)} if step >= 0 else {} for index, step in steps.items()
        }
        for key in MOMENTS:
            held = [optimizer.state.get(parameters[index], {}).get(key, parameters[index].detach()) for index in steps]
            for index, whole in zip(steps, gather(held, layout, self.communicator) or [], strict=self.communicator.is_main):
                state[index][key] = whole
        if not self.communicator.is_main:
            return None
        return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take this rank's ranges of a whole ``state``. ``ValueError`` for a moment of another shape, or what ``load_state_dict`` raises."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        targets = dict(zip((identity for group in state["param_groups"] for identity in group["params"]), parameters, strict=False))
        cut = {
            identity: {key: self._cut(key, value, targets.get(identity)) for key, value in entry.items()}
            for identity, entry in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": cut})

    def _cut(self, key: str, value: Any, parameter: Tensor | None) -> Any:
        if parameter is None or key not in MOMENTS:
            return value.clone() if isinstance(value, Tensor) else value
        number = self.numbers[parameter]  # type: ignore[index]
        if value.shape != self.layout.shapes[number]:
            raise ValueError(
                f"saved {key} of parameter {self.names[number]!r} has shape {list(value.shape)}, not {list(self.layout.shapes[number])}"
            )
        low, high = self.layout.ranges[self.communicator.rank][number]
        return value.reshape(-1)[low:high].clone()
