"""The BERT encoder and its heads: the network of Devlin et al. 2018 (arXiv:1810.04805) on torch alone.

In:  a :class:`BertConfig` (the JSON files in ``bert_configs/``, or any ``config.json`` of Hugging Face) and integer
     tensors named as in Hugging Face ``transformers``.
Out: named tuples with the attributes ``transformers`` returns. State-dict names equal those of the classes of the same
     name in ``transformers``: weights move in both directions with ``load_state_dict(strict=True)``, and numbers agree
     to 1e-5 (tests/integration/test_modeling_transformers.py).

    config = BertConfig.from_json_file("bert_configs/large.json").padded()
    model = BertForPreTraining(config)
    out = model(input_ids, attention_mask, token_type_ids, labels=labels, next_sentence_label=nsp)
    out.loss.backward()

What makes it fast: the vocabulary projection, and with it everything after attention in the last layer, runs only on the
rows a loss reads (15 % of the tokens); and batches may come *packed*, sequences end to end without padding, as [T] tokens
with ``cu_seqlens``. (Packed batches and the fused loss need berth/kernels beside this file, the rest torch alone.) On a CPU
the first is most of the difference to ``transformers`` (benchmarks/cpu_step.py). Two switches for training, both off here:
:meth:`BertBase.set_fused_projections` and ``fused_cross_entropy`` of :class:`BertMaskedLMBase`.

Rejected: one query-key-value parameter (names in the state dict would change); concatenating the three weights in every
step on a CPU (1.3x slower in fp32, no faster in bf16, H 256 and 1024, 2026-11), hence a switch; an additive -10000 mask (a
boolean one costs no more and is exact in every precision); ``position_ids`` buffers (a slice of the embedding table
says the same, and its gradient is a sum and not a scatter).

Suffixes of tensor names: B sequences, S positions, T packed tokens, H hidden, N heads, D = H / N, V vocabulary, R rows
picked out of the B * S or T positions, M rows the masked-language loss reads, C classes. ``labels_BS`` has the shape
[B, S]; names without a suffix are [B, S, ...] or [T, ...].
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100
_LARGE_VOCABULARY = 1024  # from this width on the loss goes through VocabularyCrossEntropy

_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Keys of Hugging Face configs that would change the network; any other value would silently be a different model.
_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "position_embedding_type": ("absolute", None),
    "pruned_heads": ({}, None),
}


# -------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class BertConfig:
    """Sizes and rates of a BERT, with the JSON keys of Hugging Face. Checked when made.

    The five sizes have no default. ``extra`` keeps what else a Hugging Face ``config.json`` says (``architectures``,
    ``transformers_version``, ...) so that ``to_dict`` gives it back.

    Raises:
        ValueError: listing every problem at once, each with the key, its value and the rule it breaks.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    num_labels: int = 2
    problem_type: str | None = None  # None: decided by num_labels and the labels' dtype
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        _raise_if(_config_problems({key: getattr(self, key) for key in _CONFIG_KEYS} | dict(self.extra)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BertConfig:
        """A config from the keys of a Hugging Face (or Google, or NVIDIA) JSON file; see the class for errors."""
        known = {key: value for key, value in values.items() if key in _CONFIG_KEYS}
        extra = {key: value for key, value in values.items() if key not in _CONFIG_KEYS}
        if "num_labels" not in known and isinstance(extra.get("id2label"), Mapping):
            known["num_labels"] = len(extra["id2label"])
        missing = [key for key in _REQUIRED_KEYS if key not in known]
        problems = [f"{key} is missing: every config must set {', '.join(_REQUIRED_KEYS)}" for key in missing]
        _raise_if(problems + _config_problems(known | extra))
        return cls(**known, extra=extra)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> BertConfig:
        """A config from a JSON file. ValueError (naming the file) for bad JSON or values, OSError if unreadable."""
        with open(path, encoding="utf-8") as file:
            try:
                values = json.load(file)
                if not isinstance(values, dict):
                    raise ValueError(f"must be a JSON object with the keys of a BERT config, is {values!r:.40}")
                return cls.from_dict(values)
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, ``extra`` included. Label names that no longer fit ``num_labels`` are left out."""
        extra = dict(self.extra)
        if len(extra.get("id2label") or {}) != self.num_labels:
            extra.pop("id2label", None)
            extra.pop("label2id", None)
        return extra | {key: getattr(self, key) for key in _CONFIG_KEYS}

    def to_json_string(self) -> str:
        """``to_dict`` as JSON with sorted keys, one key a line, newline at the end."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def padded(self, multiple: int = 8) -> BertConfig:
        """A copy whose ``vocab_size`` is rounded up to ``multiple`` (30522 -> 30528), which tensor cores need.

        The added rows are trained like others (they take part in the softmax and never occur); an export trims them.
        """
        if multiple < 1:
            raise ValueError(f"padded(multiple={multiple}): must be at least 1")
        return dataclasses.replace(self, vocab_size=math.ceil(self.vocab_size / multiple) * multiple)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def head_dropout(self) -> float:
        """Dropout before a fine-tuning classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout


_CONFIG_KEYS = tuple(f.name for f in dataclasses.fields(BertConfig) if f.name != "extra")
_REQUIRED_KEYS = _CONFIG_KEYS[:5]
_SIZE_KEYS = (*_REQUIRED_KEYS, "max_position_embeddings", "type_vocab_size", "num_labels")
_RATE_KEYS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_POSITIVE_KEYS = ("initializer_range", "layer_norm_eps")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _config_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keys that are present, one sentence each; pure, so errors can be listed together."""
    problems: list[str] = []

    def check(key: str, ok: Callable[[Any], bool], rule: str) -> bool:
        if key in values and not ok(values[key]):
            problems.append(f"{key}={values[key]!r}: must be {rule}")
            return False
        return key in values

    sizes_ok = {key: check(key, lambda v: _is_int(v) and v >= 1, "an integer of at least 1") for key in _SIZE_KEYS}
    for key in _RATE_KEYS:
        optional = key == "classifier_dropout"
        rule = "a number in [0, 1)" + (" or null" if optional else "")
        check(key, (lambda v: v is None or _is_rate(v)) if optional else _is_rate, rule)
    for key in _POSITIVE_KEYS:
        check(key, lambda v: _is_number(v) and 0 < v < math.inf, "a finite number above 0")
    check("hidden_act", lambda v: isinstance(v, str) and v in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
    check("problem_type", lambda v: v is None or v in PROBLEM_TYPES, f"null or one of {', '.join(PROBLEM_TYPES)}")
    if sizes_ok["hidden_size"] and sizes_ok["num_attention_heads"]:
        heads = values["num_attention_heads"]
        check("hidden_size", lambda v: v % heads == 0, f"divisible by num_attention_heads={heads}")
    if sizes_ok["vocab_size"]:
        size = values["vocab_size"]
        check("pad_token_id", lambda v: v is None or (_is_int(v) and 0 <= v < size), f"null or an id in [0, {size})")
    for key, allowed in _ONLY_SUPPORTED.items():
        check(key, allowed.__contains__, f"{allowed[0]!r}: nothing else is implemented")
    return problems + _misspelt(values)


def _misspelt(values: Mapping[str, Any]) -> list[str]:
    """Unknown keys are tolerated, except one that is nearly one of ours: that value would be lost."""
    problems = []
    for key in values:
        if key not in _CONFIG_KEYS and (close := difflib.get_close_matches(key, _CONFIG_KEYS, n=1, cutoff=0.9)):
            problems.append(f"{key}={values[key]!r}: unknown key, did you mean {close[0]}?")
    return problems


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n  ".join([f"invalid BERT config ({len(problems)} problem(s)):", *problems]))


# -------------------------------------------------------------------------------------------------------------- outputs


class BertModelOutput(NamedTuple):
    """``last_hidden_state`` [B, S, H] or [T, H] (or [R, H], see ``rows``), ``pooler_output`` [B, H] or None."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None


class PreTrainingOutput(NamedTuple):
    """Losses are 0-dim fp32 or None; ``prediction_logits`` [M, V] or [B, S, V], ``seq_relationship_logits`` [B, 2].

    With ``fused_cross_entropy`` there are no ``prediction_logits``, but ``mlm_correct``: how many predictions are right (int64, 0-dim).
    """

    loss: Tensor | None
    prediction_logits: Tensor | None
    seq_relationship_logits: Tensor
    mlm_loss: Tensor | None
    nsp_loss: Tensor | None
    mlm_correct: Tensor | None = None


class MaskedLMOutput(NamedTuple):
    """``loss`` 0-dim fp32 or None; ``logits`` [M, V] or [B, S, V], or None and ``mlm_correct``: see :class:`PreTrainingOutput`."""

    loss: Tensor | None
    logits: Tensor | None
    mlm_correct: Tensor | None = None


class LogitsOutput(NamedTuple):
    """``loss`` 0-dim fp32 or None; ``logits`` in the shape the model's docstring says."""

    loss: Tensor | None
    logits: Tensor


class QuestionAnsweringOutput(NamedTuple):
    """``loss`` 0-dim fp32 or None; ``start_logits`` and ``end_logits`` [B, S]."""

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor


# -------------------------------------------------------------------------------------------------------------- encoder


class Packing(NamedTuple):
    """Where packed sequences lie: ``cu_seqlens`` int32 [B + 1], not falling, from 0 to T; ``max_seqlen``: none is longer."""

    cu_seqlens: Tensor
    max_seqlen: int


class BertEmbeddings(nn.Module):
    """Word + position + token-type embeddings, LayerNorm, dropout.

    Like the paper and unlike ``transformers``, the row of ``pad_token_id`` starts as N(0, initializer_range): nothing
    attends to it. Like ``transformers``, looking that row up gives no gradient (``padding_idx``); as the row of a tied
    decoder it does learn, in both, how improbable ``[PAD]`` is.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """int64 ids [B, S] (``position_ids`` also [1, S]) or [T] -> [B, S, H] or [T, H]. Absent ids mean type 0 and, of [B, S], positions
        0..S-1."""
        places = self.position_embeddings
        placed = places.weight[: input_ids.shape[1]] if position_ids is None else places(position_ids)
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + self._types(token_type_ids) + placed))

    def _types(self, token_type_ids: Tensor | None) -> Tensor:
        table = self.token_type_embeddings
        if token_type_ids is None:
            return table.weight[0]
        if torch.compiler.is_compiling() and table.num_embeddings == 2:  # a gradient of two sums, not of T atomic additions to two rows
            return torch.where(token_type_ids[..., None] == 0, table.weight[0], table.weight[1])
        return table(token_type_ids)


class BertSelfAttention(nn.Module):
    """Multi-head attention of every position over every position the mask allows."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.dropout_prob = config.attention_probs_dropout_prob
        self.fused_projections = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor | Packing | None) -> Tensor:
        """[B, S, H] -> [B, S, H] with ``mask`` bool [B, 1, 1 or S, S], True = may be attended to; [T, H] -> [T, H] with a packing."""
        query, key, value = (projected.unflatten(-1, (-1, self.head_size)) for projected in self._projections(hidden))
        dropout = self.dropout_prob if self.training else 0.0
        if isinstance(mask, Packing):
            from berth.kernels.attention import varlen_attention  # not at the top: padded batches need torch alone

            return varlen_attention(query, key, value, mask.cu_seqlens, mask.max_seqlen, dropout).flatten(1)
        context_BNSD = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, dropout_p=dropout
        )
        return context_BNSD.transpose(1, 2).flatten(2)

    def _projections(self, hidden: Tensor) -> tuple[Tensor, ...]:
        if not self.fused_projections:
            return self.query(hidden), self.key(hidden), self.value(hidden)
        parts = (self.query, self.key, self.value)
        weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        return F.linear(hidden, weight, bias).chunk(3, dim=-1)


class BertResidual(nn.Module):
    """LayerNorm(residual + dropout(dense(x))): how both halves of a layer end."""

    def __init__(self, config: BertConfig, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertResidual(config, config.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor | Packing | None, rows_R: Tensor | None) -> Tensor:
        context = self.self(hidden, mask)
        if rows_R is None:
            return self.output(context, hidden)
        return self.output(_take_rows(context, rows_R), _take_rows(hidden, rows_R))


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class BertLayer(nn.Module):
    """One post-LayerNorm Transformer layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertResidual(config, config.intermediate_size)

    def forward(self, hidden: Tensor, mask: Tensor | Packing | None, rows_R: Tensor | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H] or [T, H] -> [T, H]; [R, H] when only the flat positions ``rows_R`` are wanted of this layer."""
        attended = self.attention(hidden, mask, rows_R)
        return self.output(self.intermediate(attended), attended)


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.activation_checkpointing = False

    def forward(self, hidden: Tensor, mask: Tensor | Packing | None, rows_R: Tensor | None) -> Tensor:
        for layer in self.layer:
            layer_rows = rows_R if layer is self.layer[-1] else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, mask, layer_rows, use_reentrant=False)
            else:
                hidden = layer(hidden, mask, layer_rows)
        return hidden


class BertPooler(nn.Module):
    """tanh(dense(state of [CLS])); part of the next-sentence head in pretraining, so it must be in the optimizer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_BH: Tensor) -> Tensor:
        return torch.tanh(self.dense(first_BH))


# ----------------------------------------------------------------------------------------------------------------- base


class BertBase(nn.Module):
    """What every model here shares: the config, initialisation, activation checkpointing and tied weights."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.register_load_state_dict_pre_hook(_fill_tied_keys)
        self.register_load_state_dict_post_hook(_tie_after_loading)

    def tied_keys(self) -> dict[str, str]:
        """State-dict names of the aliases, each with the name of the tensor it is tied to."""
        return {}

    def tie_weights(self) -> None:
        """Make every alias the same Parameter again; done after loading and after a move to another device."""
        for alias, source in self.tied_keys().items():
            owner, _, name = alias.rpartition(".")
            setattr(self.get_submodule(owner), name, self.get_parameter(source))

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Keep only each layer's input and run the layer again in the backward pass.

        About a third more compute for a fraction of the activation memory. Gradients are the same, dropout included
        (the random state is restored for the second run), under autocast and under DDP too.
        """
        for module in self.modules():
            if isinstance(module, BertEncoder):
                module.activation_checkpointing = enabled

    def set_fused_projections(self, enabled: bool = True) -> None:
        """Compute query, key and value in one matrix product of their concatenated weights: fewer passes over the hidden states.

        The same numbers within rounding. For GPUs: on a CPU it is slower. The parameters stay three; modules that replace the three
        linear layers (fp8), or parameters that are gathered by their module's call (DeepSpeed stage 3), do not go with it.
        """
        for module in self.modules():
            if isinstance(module, BertSelfAttention):
                module.fused_projections = enabled

    def _initialise(self) -> None:
        """Paper: weights of Linear and Embedding N(0, initializer_range), biases 0, LayerNorm (1, 0); tie aliases."""
        self.tie_weights()
        done = {id(m) for child in self.children() if isinstance(child, BertModel) for m in child.modules()}
        for module in self.modules():
            if id(module) in done:
                continue
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BertBase:
        # Leaving the meta device replaces Parameters instead of their data, and an alias gets one of its own.
        super()._apply(fn, recurse)
        self.tie_weights()
        return self


def _fill_tied_keys(module: BertBase, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accept a state dict that names a tied tensor once (safetensors, NVIDIA); refuse one where the two differ."""
    for alias, source in module.tied_keys().items():
        given, tied_to = state_dict.get(prefix + alias), state_dict.get(prefix + source)
        if tied_to is None:
            continue  # reported by load_state_dict
        if given is None:
            state_dict[prefix + alias] = tied_to
        elif given is not tied_to and not torch.equal(given, tied_to):
            raise ValueError(
                f"{prefix}{alias} and {prefix}{source} differ in the state dict, but this model ties them. "
                f"Drop {prefix}{alias} to use the other for both."
            )


def _tie_after_loading(module: BertBase, _incompatible_keys: Any) -> None:
    module.tie_weights()  # load_state_dict(assign=True) gives every name a Parameter of its own


class BertModel(BertBase):
    """Embeddings, encoder and (unless ``add_pooling_layer=False``) the pooler."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self._initialise()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        rows: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> BertModelOutput:
        """Encode a batch, padded or packed.

        Packed: ``input_ids``, ``token_type_ids`` and ``position_ids`` (needed then) are int64 [T], sequences end to end, and there is no
        ``attention_mask``. ``cu_seqlens`` int32 [B + 1] has their bounds, from 0 to T; ``max_seqlen`` is a number none exceeds.
        ``last_hidden_state`` is [T, H]. Sequences may be empty (at the end); the pooler then sees some token.

        Args:
            input_ids: int64 [B, S], S at most ``max_position_embeddings``.
            attention_mask: int or bool, non-zero = a real token. [B, S], or [B, S, S] when each position has its own
                set of positions to attend to (packed sequences). None: no padding, which allows the fastest kernels.
                A position that may attend to nothing attends to everything, so padding rows stay finite.
            token_type_ids: int64 [B, S], 0 = first sentence. None: all 0.
            position_ids: int64 [B, S] or [1, S]. None: 0 to S - 1.
            rows: int64 [R], flat positions in B * S (or in T). Then ``last_hidden_state`` is [R, H], exactly those rows, and what
                the last layer would compute for the others is left out.

        Raises:
            ValueError: for a wrong number of dimensions, sequences longer than the position table, or what does not go with
                ``cu_seqlens``.
        """
        mask: Tensor | Packing | None
        if cu_seqlens is not None:
            mask = _checked_packing(input_ids, attention_mask, position_ids, cu_seqlens, max_seqlen, self.config)
            first_B = cu_seqlens[:-1].long().clamp(max=input_ids.shape[0] - 1)
        else:
            mask = _broadcast_mask(attention_mask)
            sequences, length = _checked_shape(input_ids, self.config)
            first_B = torch.arange(0, sequences * length, length, device=input_ids.device)
        embedded = self.embeddings(input_ids, token_type_ids, position_ids)
        if rows is None:
            hidden = self.encoder(embedded, mask, None)
            return BertModelOutput(hidden, None if self.pooler is None else self.pooler(_take_rows(hidden, first_B)))
        if self.pooler is None:
            return BertModelOutput(self.encoder(embedded, mask, rows), None)
        hidden_RH = self.encoder(embedded, mask, torch.cat([first_B, rows]))
        sequences = first_B.shape[0]
        return BertModelOutput(hidden_RH[sequences:], self.pooler(hidden_RH[:sequences]))


def _checked_packing(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor, max_seqlen: int | None, config: BertConfig
) -> Packing:  # fmt: skip
    if input_ids.ndim != 1:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}: must be [tokens] with cu_seqlens")
    if attention_mask is not None or position_ids is None or max_seqlen is None:
        raise ValueError("cu_seqlens needs position_ids and max_seqlen, and goes without attention_mask")
    if max_seqlen > config.max_position_embeddings:
        raise ValueError(f"max_seqlen={max_seqlen}: max_position_embeddings is {config.max_position_embeddings}")
    return Packing(cu_seqlens, max_seqlen)


def _checked_shape(input_ids: Tensor, config: BertConfig) -> tuple[int, int]:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}: must be [batch, sequence]")
    sequences, length = input_ids.shape
    if length > config.max_position_embeddings:
        raise ValueError(
            f"input_ids are {length} positions long, but max_position_embeddings is {config.max_position_embeddings}: "
            "cut the input, or train a model with more positions"
        )
    return sequences, length


def _broadcast_mask(attention_mask: Tensor | None) -> Tensor | None:
    """[B, S] or [B, S, S], non-zero = attend -> bool [B, 1, 1 or S, S] without a row that is False throughout.

    Softmax over an empty set is NaN in some attention kernels and 0 in others; opening those rows keeps all alike.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim not in (2, 3):
        raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}: must be [batch, sequence] or [batch, sequence, sequence]")
    mask = attention_mask.bool()
    mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None, :, :]
    return mask | ~mask.any(dim=-1, keepdim=True)


def _take_rows(x: Tensor, rows_R: Tensor) -> Tensor:
    """Rows of [B, S, H] laid flat, or of [T, H] -> [R, H]."""
    return x.flatten(0, -2).index_select(0, rows_R)


# --------------------------------------------------------------------------------------------------------------- losses


def _fp32(x: Tensor) -> Tensor:
    """fp16 and bf16 as fp32; fp64 stays, so that a float64 reference is one throughout."""
    return x if x.dtype == torch.float64 else x.float()


class VocabularyCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of [M, V] logits in fp32, without an fp32 copy of them.

    What :func:`torch.nn.functional.cross_entropy` gives for ``logits.float()``, but a few rows at a time, and only one
    number a row is kept for the backward pass (torch keeps M * V log-probabilities). At V = 30528 and 580 rows on a
    two-core CPU (2026-11): 63 -> 39 ms in fp32, 93 -> 22 ms in bf16, because 64 rows stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, labels_M: Tensor) -> Tensor:
        counted_M = labels_M != IGNORED_LABEL
        targets_M = labels_M.masked_fill(~counted_M, 0)
        chunks = logits_MV.split(VocabularyCrossEntropy.rows_at_once(logits_MV))
        log_sum_M = torch.cat([_fp32(chunk).logsumexp(dim=-1) for chunk in chunks])
        target_logits_M = _fp32(logits_MV.gather(1, targets_M[:, None]).squeeze(1))
        ctx.save_for_backward(logits_MV, log_sum_M, targets_M, counted_M)
        return torch.where(counted_M, log_sum_M - target_logits_M, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        logits_MV, log_sum_M, targets_M, counted_M = ctx.saved_tensors
        grad_MV, weight_M = torch.empty_like(logits_MV), grad_loss * counted_M
        parts = (logits_MV, grad_MV, log_sum_M[:, None], targets_M[:, None], weight_M[:, None])
        rows = VocabularyCrossEntropy.rows_at_once(logits_MV)
        for logits, grad, log_sum, target, weight in zip(*(part.split(rows) for part in parts), strict=True):
            probabilities = (_fp32(logits) - log_sum).exp_().mul_(weight)
            grad.copy_(probabilities.scatter_add_(1, target, -weight))
        return grad_MV, None

    @staticmethod
    def rows_at_once(logits_MV: Tensor) -> int:
        """Few enough for the cache of a CPU; on a GPU enough to fill it, yet bounding the temporary memory."""
        return 64 if logits_MV.device.type == "cpu" else 4096


def _summed_over(logits: Tensor, labels: Tensor, denominator: float | Tensor | None = None, ignored: int = IGNORED_LABEL) -> Tensor:
    """Cross-entropy in fp32, summed over the labels that count and divided by ``denominator``.

    ``logits`` [..., C], ``labels`` int64 [...]. ``denominator=None`` divides by the number of labels that count: the
    usual mean, except that no label at all gives 0 with a graph where torch gives NaN.
    """
    logits, labels = logits.flatten(0, -2), labels.reshape(-1)
    if logits.shape[1] < _LARGE_VOCABULARY or ignored != IGNORED_LABEL or torch.compiler.is_compiling():
        total = F.cross_entropy(_fp32(logits), labels, ignore_index=ignored, reduction="sum")
    else:
        total = VocabularyCrossEntropy.apply(logits, labels)
    return _divided(total, labels, denominator, ignored)


def _divided(total: Tensor, labels: Tensor, denominator: float | Tensor | None, ignored: int = IGNORED_LABEL) -> Tensor:
    return total / ((labels != ignored).sum().clamp(min=1) if denominator is None else denominator)


def _classification_loss(logits_BC: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Mean squared error, cross-entropy or binary cross-entropy, chosen as ``transformers`` does."""
    if problem_type is None:
        one_label = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        problem_type = "regression" if logits_BC.shape[-1] == 1 else one_label
    if problem_type == "single_label_classification":
        return _summed_over(logits_BC, labels)
    logits = _fp32(logits_BC).reshape(-1)
    targets = labels.to(logits.dtype).reshape(-1)
    if logits.shape != targets.shape:
        raise ValueError(f"labels have shape {list(labels.shape)}: {problem_type} needs {list(logits_BC.shape)}")
    loss = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, targets)


# ---------------------------------------------------------------------------------------------------- pretraining heads


class BertPredictionTransform(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(x)))


class BertLMPredictionHead(nn.Module):
    """Transform and vocabulary projection: [..., H] -> [..., V]. The owner ties ``decoder`` (see ``tied_keys``)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        # On meta: the owner replaces both tensors, and V * H numbers need not be drawn to be thrown away.
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class BertHeads(nn.Module):
    """``cls``: the masked-language head and, for pretraining, the next-sentence classifier."""

    def __init__(self, config: BertConfig, next_sentence: bool) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        if next_sentence:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertMaskedLMBase(BertBase):
    """What the two models with a masked-language head share.

    Attributes:
        dense_sequence_output: True (default) projects only the positions whose label counts, in row-major order; False
            projects every position.
        fused_cross_entropy: True computes the masked-language loss without ever holding all logits (berth/kernels/cross_entropy.py),
            while training and with labels: the output then has ``mlm_correct`` in place of ``prediction_logits``. Default False.
    """

    def __init__(self, config: BertConfig, next_sentence: bool, dense_sequence_output: bool) -> None:
        super().__init__(config)
        self.dense_sequence_output = dense_sequence_output
        self.fused_cross_entropy = False
        self.bert = BertModel(config, add_pooling_layer=next_sentence)
        self.cls = BertHeads(config, next_sentence)
        self._initialise()

    def tied_keys(self) -> dict[str, str]:
        return {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }

    def _rows_to_project(self, labels: Tensor | None, masked_index: Tensor | None) -> Tensor | None:
        """Flat positions the loss reads, or None for all. ``nonzero`` waits for the device, unlike the argument."""
        if not self.dense_sequence_output or (labels is None and masked_index is None):
            return None
        if masked_index is not None or labels is None:
            return masked_index
        return (labels.reshape(-1) != IGNORED_LABEL).nonzero().squeeze(1)

    def _predict(
        self, hidden: Tensor, labels: Tensor | None, rows: Tensor | None, denominator: float | Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Loss, logits and number of correct predictions; what there is of them."""
        head = self.cls.predictions
        if labels is not None:
            labels = labels.reshape(-1)
            labels = labels if rows is None else labels[rows]
        if labels is not None and self.fused_cross_entropy and self.training:
            from berth.kernels.cross_entropy import linear_cross_entropy

            transformed = head.transform(hidden).flatten(0, -2)
            total, correct = linear_cross_entropy(transformed, head.decoder.weight, head.decoder.bias, labels)
            return _divided(total, labels, denominator), None, correct
        logits = head(hidden)
        return None if labels is None else _summed_over(logits, labels, denominator), logits, None


class BertForPreTraining(BertMaskedLMBase):
    """Masked-language and next-sentence heads on one encoder: the model of the pretraining task."""

    def __init__(self, config: BertConfig, dense_sequence_output: bool = True) -> None:
        super().__init__(config, next_sentence=True, dense_sequence_output=dense_sequence_output)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        masked_index: Tensor | None = None,
        mlm_denominator: float | Tensor | None = None,
        nsp_denominator: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> PreTrainingOutput:
        """Logits, and the losses for which labels are given.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen: as in :meth:`BertModel.forward`.
            labels: int64 [B, S] or [T], the token to predict, -100 where there is none.
            next_sentence_label: int64 [B], 0 = the second sentence follows the first, 1 = random, -100 = not counted.
            masked_index: int64 [M], the flat positions (in B * S or T) whose label counts, as ``nonzero`` would list them.
                Saves a wait for the GPU. It may be longer (a fixed size for CUDA graphs) if the surplus entries point
                at positions labelled -100; their logits are computed and not counted. Without ``labels`` it picks
                the positions to predict.
            mlm_denominator, nsp_denominator: a number or a 0-dim tensor. None: each loss is the mean over this batch's
                counted labels. Otherwise the summed cross-entropy is divided by it: give the count of the *global*
                batch, and the losses (and gradients) summed over micro-batches and ranks are the mean over the global
                batch however it was cut. DDP averages over ranks: multiply the loss by the world size there.

        Returns:
            ``prediction_logits`` are [M, V] if positions were picked (``dense_sequence_output`` and ``labels`` or
            ``masked_index``), else [B, S, V]. ``loss`` is the sum of the losses that exist: unlike ``transformers``,
            which needs both labels, ``labels`` alone give the masked-language loss. Losses are fp32 under autocast too,
            and 0 (not NaN) with a graph if no label counts.
        """
        rows = self._rows_to_project(labels, masked_index)
        hidden, pooled_BH = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, rows, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
        mlm_loss, prediction_logits, mlm_correct = self._predict(hidden, labels, rows, mlm_denominator)
        seq_relationship_logits = self.cls.seq_relationship(pooled_BH)
        nsp_loss = None
        if next_sentence_label is not None:
            nsp_loss = _summed_over(seq_relationship_logits, next_sentence_label, nsp_denominator)
        losses = [loss for loss in (mlm_loss, nsp_loss) if loss is not None]
        total = torch.stack(losses).sum() if losses else None
        return PreTrainingOutput(total, prediction_logits, seq_relationship_logits, mlm_loss, nsp_loss, mlm_correct)


class BertForMaskedLM(BertMaskedLMBase):
    """The masked-language head alone; no pooler."""

    def __init__(self, config: BertConfig, dense_sequence_output: bool = True) -> None:
        super().__init__(config, next_sentence=False, dense_sequence_output=dense_sequence_output)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        masked_index: Tensor | None = None,
        mlm_denominator: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> MaskedLMOutput:
        """Arguments and shapes as in :meth:`BertForPreTraining.forward`; ``logits`` are its ``prediction_logits``."""
        rows = self._rows_to_project(labels, masked_index)
        hidden, _ = self.bert(input_ids, attention_mask, token_type_ids, position_ids, rows, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return MaskedLMOutput(*self._predict(hidden, labels, rows, mlm_denominator))


# ---------------------------------------------------------------------------------------------------- fine-tuning heads


class BertForQuestionAnswering(BertBase):
    """Start and end of an answer span. ``num_labels`` must be 2: one column each."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"num_labels={config.num_labels}: question answering needs 2 (start, end)")
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self._initialise()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> QuestionAnsweringOutput:
        """Positions int64 [B]: negative ones count as 0, from S on they are not counted. Loss: mean of both ends."""
        hidden_BSH = self.bert(input_ids, attention_mask, token_type_ids, position_ids).last_hidden_state
        start_logits_BS, end_logits_BS = self.qa_outputs(hidden_BSH).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            outside = start_logits_BS.shape[1]
            start = _summed_over(start_logits_BS, start_positions.clamp(0, outside), ignored=outside)
            end = _summed_over(end_logits_BS, end_positions.clamp(0, outside), ignored=outside)
            loss = (start + end) / 2
        return QuestionAnsweringOutput(loss, start_logits_BS, end_logits_BS)


class BertForSequenceClassification(BertBase):
    """One label, several labels or a number for a sequence (or pair), from the pooled [CLS] state."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self._initialise()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> LogitsOutput:
        """``logits`` [B, C]. The loss follows ``config.problem_type``; if that is None: one class = regression (mean
        squared error, labels [B]), integer labels [B] = cross-entropy, float labels [B, C] = binary cross-entropy."""
        pooled_BH = self.bert(input_ids, attention_mask, token_type_ids, position_ids).pooler_output
        logits_BC = self.classifier(self.dropout(pooled_BH))
        loss = None if labels is None else _classification_loss(logits_BC, labels, self.config.problem_type)
        return LogitsOutput(loss, logits_BC)


class BertForTokenClassification(BertBase):
    """A label for every token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self._initialise()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> LogitsOutput:
        """``logits`` [B, S, C]; ``labels`` int64 [B, S], -100 where there is none."""
        hidden_BSH = self.bert(input_ids, attention_mask, token_type_ids, position_ids).last_hidden_state
        logits_BSC = self.classifier(self.dropout(hidden_BSH))
        return LogitsOutput(None if labels is None else _summed_over(logits_BSC, labels), logits_BSC)


# ------------------------------------------------------------------------------------------------------------- counting


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers, tied tensors once: 336,232,258 for large and 110,111,042 for base at a vocabulary of 30528."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def flops_per_sequence(config: BertConfig, seq_len: int, predictions: int) -> float:
    """Floating-point operations of one training step for one sequence, for model FLOPs utilisation (MFU).

    Matrix products only, a multiply-add as 2, backward as twice forward, padding as work, vocabulary projection at
    ``predictions`` positions; the pooler and what activation checkpointing repeats are left out. BERT-Large: 240.6e9
    (128 positions, 20 predictions) and 1020.5e9 (512, 80), the count that reproduces DeepSpeed's published TFLOPS.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    per_token = 2 * (4 * hidden * hidden + 2 * hidden * inner)
    attention = 2 * 2 * seq_len * seq_len * hidden
    head = 2 * predictions * hidden * (config.vocab_size + hidden)
    return 3.0 * (config.num_hidden_layers * (seq_len * per_token + attention) + head)
