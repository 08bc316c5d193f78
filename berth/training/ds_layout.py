"""Where DeepSpeed's ZeRO puts the elements of each tensor on each rank, for LAMB's norms, the names of bad gradients, and checkpoints.

ZeRO flattens the tensors of an optimizer group and cuts them up: stages 1 and 2 give each rank an equal range of the flat group, stage 3
an equal share of every tensor; stage 0 leaves whole tensors on all ranks. In: its optimizer, of which names are read that are not a public
interface (DeepSpeed 0.19). Out: :class:`Partitions`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from berth.training.distributed import Communicator
from berth.training.pieces import Layout, equal_ranges, gather
from berth.training.saving import snapshot
from berth.training.sharded_lamb import Segment


class Partitions(NamedTuple):
    """What the optimizer of this rank sees.

    Attributes:
        partitions: its parameters: flat ones, which may hold padding too, or at stage 0 (``replicated``) the whole tensors.
        places: by number of the tensor, the partition that its piece is in, and from where.
        layout: which elements of each tensor each rank has.
    """

    communicator: Communicator
    replicated: bool
    partitions: list[Tensor]
    places: list[tuple[int, int]]
    layout: Layout

    @property
    def held(self) -> list[tuple[int, int]]:
        """First and last + 1 element of each tensor that this rank has."""
        return self.layout.ranges[self.communicator.rank]

    def segments(self) -> dict[Tensor, list[Segment]]:
        """The same for :class:`ShardedLamb`."""
        segments: dict[Tensor, list[Segment]] = {partition: [] for partition in self.partitions}
        for number, ((index, start), (low, high)) in enumerate(zip(self.places, self.held, strict=True)):
            segments[self.partitions[index]].append(Segment(start, high - low, number))
        return segments

    def pieces(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The flat pieces by number, views of ``tensors``, which are laid out as the partitions are."""
        flats = [tensor.detach().reshape(-1) for tensor in tensors]
        return [flats[index][start : start + high - low] for (index, start), (low, high) in zip(self.places, self.held, strict=True)]

    def whole(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Whole tensors by number, in CPU memory on rank 0, None elsewhere; of ``tensors`` as in :meth:`pieces`. Collective."""
        if self.replicated:
            return snapshot([tensor.detach() for tensor in tensors]) if self.communicator.is_main else None
        return gather(self.pieces(tensors), self.layout, self.communicator)

    def take(self, whole: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """The reverse: copy this rank's pieces of whole tensors by number to ``tensors``."""
        for piece, tensor, (low, high) in zip(self.pieces(tensors), whole, self.held, strict=True):
            piece.copy_(tensor.detach().reshape(-1)[low:high])


def find_partitions(
    zero: Any, stage: int, parameters: Sequence[nn.Parameter], shapes: Sequence[torch.Size], communicator: Communicator
) -> Partitions:
    """The map of ``parameters`` (number by number) with whole ``shapes``, under ``zero``, the engine's optimizer after it was made."""
    world = communicator.world_size
    if stage == 0:
        whole = [(0, shape.numel()) for shape in shapes]
        places = [(number, 0) for number in range(len(shapes))]
        return Partitions(communicator, True, list(parameters), places, Layout(list(shapes), [whole] * world))
    partitions = list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)
    groups = zero.fp16_groups if stage == 3 else zero.round_robin_bit16_groups
    assert len(partitions) == len(zero.optimizer.param_groups), "a group in several sub-groups would count several steps"
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    places = [(0, 0)] * len(shapes)
    ranges = [[(0, 0)] * len(shapes) for _ in range(world)]
    for index, (partition, group) in enumerate(zip(partitions, groups, strict=True)):
        of_group = [shapes[numbers[parameter]] for parameter in group]
        if stage == 3:
            layout, starts = equal_shares(of_group, [parameter.partition_numel() for parameter in group], world)
        else:
            offsets, size = [int(offset) for offset in zero.round_robin_bit16_offsets[index]], partition.numel()
            layout = equal_ranges(of_group, offsets, size, world)
            starts = [max(offset - communicator.rank * size, 0) for offset in offsets]
        for parameter, start, *cuts in zip(group, starts, *layout.ranges, strict=True):
            low, high = cuts[communicator.rank]
            places[numbers[parameter]] = (index, start if low < high else 0)
            for rank, cut in enumerate(cuts):
                ranges[rank][numbers[parameter]] = cut
    return Partitions(communicator, False, partitions, places, Layout(list(shapes), ranges))


def equal_shares(shapes: Sequence[torch.Size], sizes: Sequence[int], world: int) -> tuple[Layout, list[int]]:
    """Stage 3: each rank has ``sizes`` elements of each tensor, the last ones fewer or none; and where these begin in the partition."""
    both = list(zip([shape.numel() for shape in shapes], sizes, strict=True))
    ranges = [[(min(rank * size, total), min((rank + 1) * size, total)) for total, size in both] for rank in range(world)]
    return Layout(list(shapes), ranges), [0, *itertools.accumulate(sizes)][: len(sizes)]
