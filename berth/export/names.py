"""One set of tensor names, Hugging Face's, out of the dialects that BERT weights come in.

Recognised: Google/old PyTorch (LayerNorm ``gamma``/``beta``), NVIDIA (``dense_act``), wrappers' prefixes (DistributedDataParallel
and DeepSpeed ``module.``, ``torch.compile`` ``_orig_mod.``, ONNX Runtime ``wrapper_.`` and ``model_.``), encoder-only files
(no ``bert.``), and what ONNX Runtime keeps beside the weights (moments, fp16 copies), which is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from berth.errors import CheckpointError

T = TypeVar("T")

WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
PREDICTIONS_BIAS = "cls.predictions.bias"
DECODER_WEIGHT = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"

TIED = {DECODER_WEIGHT: WORD_EMBEDDINGS, DECODER_BIAS: PREDICTIONS_BIAS}
"""Alias to the tensor it is. A file may hold either name or both."""

VOCABULARY_ROWS = (WORD_EMBEDDINGS, PREDICTIONS_BIAS, DECODER_WEIGHT, DECODER_BIAS)
"""Tensors whose first dimension is the vocabulary."""

_PREFIXES = ("module.", "_orig_mod.", "wrapper_.", "model_.")
_ENCODER_PARTS = ("embeddings.", "encoder.", "pooler.")
_NOT_WEIGHTS = re.compile(r"^(Moment_\d+_|Update_Count|Step$|Step_)|_fp16$|\.position_ids$")
_NVIDIA_PART = ".dense_act."


def canonical_name(name: str) -> str | None:
    """Hugging Face's name (with ``bert.``) of a tensor, ``None`` for what is no weight of the model."""
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    if _NOT_WEIGHTS.search(name):
        return None
    name = name.replace(_NVIDIA_PART, ".dense.")
    if name.endswith("LayerNorm.gamma"):
        name = name.removesuffix("gamma") + "weight"
    elif name.endswith("LayerNorm.beta"):
        name = name.removesuffix("beta") + "bias"
    return f"bert.{name}" if name.startswith(_ENCODER_PARTS) else name


def canonical_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors under :func:`canonical_name`, in order.

    Raises :class:`CheckpointError` when two of them become one name.
    """
    renamed: dict[str, T] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        new = canonical_name(name)
        if new is None:
            continue
        if new in origin:
            raise CheckpointError(f"tensors {origin[new]!r} and {name!r} are both {new!r}; the file mixes two models")
        origin[new] = name
        renamed[new] = tensor
    return renamed


def is_nvidia(names: Iterable[str]) -> bool:
    """Whether the names are those of NVIDIA's BERT (whose ``"gelu"`` is the tanh approximation)."""
    return any(_NVIDIA_PART in name for name in names)
