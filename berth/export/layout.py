"""Shapes of a pretraining model, and the vocabulary rows that padding adds or an export removes. Pure functions.

Padding rows. Models are trained with the vocabulary rounded up to a multiple of 8, and the added logits take part in the
softmax. Rows added to existing weights are copies of row 0, ``[PAD]``: no label is ever ``[PAD]``, so a trained model already
finds it improbable, and the padding with it. Rejected: zero rows (logit 0 is more probable than most of a trained
vocabulary); bias -10000 (dominates the norm of the bias, which LAMB with ``use_nvlamb`` divides by); random rows (not
reproducible without a seed, improbable no sooner).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from berth.errors import ConfigError
from berth.export import names

PADDING_MULTIPLES = (8, 16, 32, 64, 128)
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``size``."""
    return -(-size // multiple) * multiple


def is_padded_size(padded: int, size: int) -> bool:
    """Whether ``padded`` is ``size`` itself or ``size`` rounded up to 8, 16, 32, 64 or 128."""
    return padded == size or any(padded == round_up(size, multiple) for multiple in PADDING_MULTIPLES)


def resize_vocabulary(tensor: Tensor, rows: int) -> Tensor:
    """``[V, ...]`` to ``[rows, ...]``: the rows above ``rows`` dropped, or copies of row 0 added. Same type, a copy."""
    if rows <= tensor.shape[0]:
        return tensor[:rows].clone()
    return torch.cat([tensor, tensor[:1].expand(rows - tensor.shape[0], *tensor.shape[1:])])


def resize_tied(weights: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """A state dict with its vocabulary resized; names that were one tensor stay one."""
    resized: dict[int, Tensor] = {}
    result = dict(weights)
    for name in names.VOCABULARY_ROWS:
        if name in weights:
            tensor = weights[name]
            result[name] = resized.setdefault(id(tensor), resize_vocabulary(tensor, rows))
    return result


def checked_sizes(config: Mapping[str, Any], source: str) -> dict[str, int]:
    """The sizes of a config dict, ``max_position_embeddings`` (512) and ``type_vocab_size`` (2) filled in.

    Raises :class:`ConfigError` naming every key that is missing or no positive whole number.
    """
    values = {"max_position_embeddings": 512, "type_vocab_size": 2, **config}
    wanted = (*_SIZES, "max_position_embeddings", "type_vocab_size")
    wrong = [key for key in wanted if type(values.get(key)) is not int or values[key] < 1]
    if wrong:
        found = ", ".join(f"{key}={values.get(key)!r}" for key in wrong)
        raise ConfigError(f"configuration {source}: {found}; each must be a whole number of at least 1")
    return {key: values[key] for key in wanted}


def pretraining_shapes(config: Mapping[str, Any], next_sentence: bool = True) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of Hugging Face's ``BertForPreTraining``, tied aliases included.

    ``next_sentence=False``: of ``BertForMaskedLM`` (no pooler, no next-sentence classifier).
    """
    sizes = checked_sizes(config, "given")
    vocabulary, hidden, inner = sizes["vocab_size"], sizes["hidden_size"], sizes["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def layer_norm(name: str) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (hidden,), (hidden,)

    shapes[names.WORD_EMBEDDINGS] = (vocabulary, hidden)
    shapes["bert.embeddings.position_embeddings.weight"] = (sizes["max_position_embeddings"], hidden)
    shapes["bert.embeddings.token_type_embeddings.weight"] = (sizes["type_vocab_size"], hidden)
    layer_norm("bert.embeddings.LayerNorm")
    for number in range(sizes["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{number}"
        for projection in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{projection}", hidden, hidden)
        linear(f"{layer}.attention.output.dense", hidden, hidden)
        layer_norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", hidden, inner)
        linear(f"{layer}.output.dense", inner, hidden)
        layer_norm(f"{layer}.output.LayerNorm")
    if next_sentence:
        linear("bert.pooler.dense", hidden, hidden)
    shapes[names.PREDICTIONS_BIAS] = (vocabulary,)
    linear("cls.predictions.transform.dense", hidden, hidden)
    layer_norm("cls.predictions.transform.LayerNorm")
    linear("cls.predictions.decoder", hidden, vocabulary)
    if next_sentence:
        linear("cls.seq_relationship", hidden, 2)
    return shapes
