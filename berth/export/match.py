"""Which tensors of a file fill which tensors of a model - and an honest account of those that do not.

``load_state_dict(strict=False)`` "loads" a file with the wrong names without a word and trains from random weights. Here
every tensor is accounted for, and only differences with a known meaning are bridged: names (:mod:`berth.export.names`),
tied tensors stored once, and rows that pad the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from berth.errors import CheckpointError
from berth.export.layout import is_padded_size, resize_vocabulary
from berth.export.names import TIED, VOCABULARY_ROWS, canonical_names

_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class MatchReport:
    """What :func:`match_weights` found. ``str(report)`` is one line for people.

    Attributes:
        weights: tensors for the model, by its names, in its order and with its shapes: those in ``matched``.
        matched: names in the model that the file fills.
        missing: names in the model that the file lacks.
        unexpected: names in the file that the model lacks.
        mismatched: ``name: shape in the file, shape in the model`` of tensors that cannot be adapted.
        adapted: what was bridged, in words.
    """

    weights: dict[str, Tensor]
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    adapted: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every tensor of the model is filled (the file may hold more)."""
        return not self.missing and not self.mismatched

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        parts = [f"{len(self.matched)} of {total} tensors matched", *self.adapted]
        for title, listed in [
            ("missing", self.missing),
            ("of another shape", self.mismatched),
            ("not used", self.unexpected),
        ]:
            if listed:
                parts.append(f"{len(listed)} {title}: {_shortened(listed)}")
        return "; ".join(parts)


def match_weights(model_shapes: Mapping[str, Sequence[int]], weights: Mapping[str, Tensor]) -> MatchReport:
    """Fit the tensors of a file to a model.

    Args:
        model_shapes: name to shape of everything in the model's ``state_dict``; with ``bert.`` in front of the encoder's
            names (pretraining and fine-tuning models) or, for a bare encoder, without.
        weights: name to tensor, in any dialect that :mod:`berth.export.names` knows.

    A vocabulary of other size is adapted when the larger size is the smaller rounded up to 8 .. 128; otherwise it counts
    as mismatched: it is another vocabulary. Raises :class:`CheckpointError` when tied tensors in the file differ.
    """
    named = canonical_names(weights)
    _fill_tied(named)
    bare = not any(name.startswith(("bert.", "cls.")) for name in model_shapes)
    matched: dict[str, Tensor] = {}
    missing, mismatched = [], []
    rows: set[tuple[int, int]] = set()
    resized: dict[int, Tensor] = {}  # by id of the tensor: tied tensors stay one
    used = set()
    for name, wanted in model_shapes.items():
        source = f"bert.{name}" if bare else name
        tensor, shape = named.get(source), tuple(wanted)
        if tensor is None:
            missing.append(name)
            continue
        used.add(source)
        if tuple(tensor.shape) != shape and _differs_by_padding(source, tensor, shape):
            rows.add((tensor.shape[0], shape[0]))
            tensor = resized.setdefault(id(tensor), resize_vocabulary(tensor, shape[0]))
        if tuple(tensor.shape) == shape:
            matched[name] = tensor
        else:
            mismatched.append(f"{name}: {list(tensor.shape)} in the file, {list(shape)} in the model")
    unexpected = tuple(name for name in named if name not in used and TIED.get(name) not in used)
    adapted = tuple(f"vocabulary of {old} rows made {new}" for old, new in sorted(rows))
    return MatchReport(matched, tuple(matched), tuple(missing), unexpected, tuple(mismatched), adapted)


def _fill_tied(named: dict[str, Tensor]) -> None:
    """Make the two names of tied tensors the same object, also where a file holds only one of them."""
    for alias, original in TIED.items():
        if alias in named and original in named and not _equal(named[alias], named[original]):
            raise CheckpointError(f"{alias} and {original} differ in this file: it was trained with untied embeddings, BERT ties them")
        if original in named:
            named[alias] = named[original]
        elif alias in named:
            named[original] = named[alias]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Equal in shape and values, NaN in the same places included."""
    return torch.equal(one, other) or torch.equal(one.nan_to_num(), other.nan_to_num())


def _differs_by_padding(name: str, tensor: Tensor, shape: tuple[int, ...]) -> bool:
    if name not in VOCABULARY_ROWS or tensor.dim() != len(shape) or tuple(tensor.shape[1:]) != shape[1:]:
        return False
    small, large = sorted((tensor.shape[0], shape[0]))
    return is_padded_size(large, small)


def _shortened(listed: Sequence[str]) -> str:
    more = f", ... and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
