"""Between berth's checkpoints and Hugging Face ``transformers``, both directions.

:func:`to_huggingface` writes a folder that ``AutoTokenizer``, ``BertForPreTraining`` and ``BertForMaskedLM`` load offline
(``BertForMaskedLM`` reports the pooler and the next-sentence classifier as unused: it has none). The vocabulary is cut to
its real size. :func:`from_huggingface` writes a weights file for ``run_pretraining.py --init_checkpoint`` (and for
:func:`to_huggingface`) out of anything :func:`berth.export.load_weights` reads.

The files are written directly, not through ``transformers``, so the export does not depend on its version.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from berth import __version__
from berth.errors import CheckpointError, ConfigError, DataError
from berth.export.folder import check_replaceable, export_folder, written
from berth.export.layout import PADDING_MULTIPLES, checked_sizes, is_padded_size, pretraining_shapes, resize_tied, round_up
from berth.export.match import MatchReport, match_weights
from berth.export.names import DECODER_WEIGHT, TIED, WORD_EMBEDDINGS
from berth.export.weights import (
    CONFIG_NAME,
    FORMAT,
    FORMAT_VERSION,
    Source,
    read_config,
    read_weights,
    with_nvidia_gelu,
)
from berth.files import write_json
from berth.text.tokenizer import load_tokenizer
from berth.text.vocabulary import SPECIAL_TOKENS, Vocabulary

_NEXT_SENTENCE = "cls.seq_relationship.weight"
_SPECIAL_KEYS = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")  # in the order of SPECIAL_TOKENS
_HUGGING_FACE_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
_NOT_IN_CONFIG = (
    "transformers_version", "_name_or_path", "dtype", "torch_dtype", "num_labels", "id2label", "label2id", "problem_type",
)  # fmt: skip
_COMPARED_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "max_position_embeddings", "type_vocab_size", "layer_norm_eps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted; ``str()`` is the summary for people. ``vocab_size`` is the real one, ``rows`` those written."""

    source: str
    written: Path
    architecture: str
    vocab_size: int
    rows: int
    note: str

    def __str__(self) -> str:
        rows = "" if self.rows == self.vocab_size else f", padded to {self.rows} rows"
        return f"{self.source} -> {self.written} ({self.architecture}, vocabulary {self.vocab_size}{rows}; {self.note})"


def to_huggingface(
    checkpoint: str | Path,
    vocab_file: str | Path,
    output_dir: str | Path,
    lowercase: bool | None = None,
    config_file: str | Path | None = None,
    allow_other_vocabulary: bool = False,
) -> Conversion:
    """Write ``model.safetensors``, ``config.json``, ``vocab.txt`` and the tokenizer's files into ``output_dir``.

    Args:
        checkpoint: anything :func:`berth.export.load_weights` reads; of a berth output folder its newest good checkpoint.
        vocab_file: the vocabulary the records were made with.
        lowercase: True for an uncased model, False for a cased one, None to take what the checkpoint says, or else
            what the vocabulary shows (a cased one has pieces with capital letters).
        config_file: needed only for weights that come without a config.
        allow_other_vocabulary: export also when the checkpoint was trained on records of a vocabulary with other bytes.

    Raises :class:`CheckpointError` (unreadable, incomplete or non-finite weights), :class:`DataError` (vocabulary),
    :class:`ConfigError` (no or contradicting config or case, an ``output_dir`` that is not ours to replace). Nothing is written
    then, and an earlier export in ``output_dir`` stays.
    """
    folder = Path(output_dir).resolve()
    check_replaceable(folder)
    vocabulary = Vocabulary.load(vocab_file)
    loaded = read_weights(checkpoint)
    config = _config_of(loaded, config_file)
    rows = _embedding_rows(loaded)
    _check_vocabulary(vocabulary, vocab_file, config["vocab_size"], rows)
    if loaded.vocab_sha256 not in ("", vocabulary.sha256) and not allow_other_vocabulary:
        raise DataError(
            f"--vocab_file {vocab_file} is not the vocabulary that {loaded.source} were trained with (its SHA-256 is "
            f"{vocabulary.sha256[:12]}..., theirs {loaded.vocab_sha256[:12]}...); give that one, or --allow_other_vocabulary"
        )
    uncased, reason = _case(lowercase, loaded, vocabulary, vocab_file)
    config = {**config, "vocab_size": vocabulary.size}
    report = _complete(loaded, config)
    _check_finite(report.weights, loaded.source)
    note = ("uncased" if uncased else "cased") + reason
    architecture = _architecture(report)
    about = {"format": "berth-export", "format_version": 1, "berth_version": __version__, "source": loaded.source}
    with export_folder(folder, about) as temporary:
        _write_model(temporary, report.weights)
        write_json(temporary / CONFIG_NAME, _huggingface_config(config, architecture))
        _write_tokenizer(temporary, vocabulary, uncased, config)
    return Conversion(loaded.source, folder, architecture, vocabulary.size, vocabulary.size, note)


def from_huggingface(
    source: str | Path,
    output: str | Path,
    pad_vocab_to_multiple: int = 8,
    config_file: str | Path | None = None,
) -> Conversion:
    """Write a weights file (``format``, ``format_version``, ``model``, ``config``) with the vocabulary padded.

    The rows added are copies of row 0 (:mod:`berth.export.layout` says why); ``config["vocab_size"]`` stays the real size.
    Both names of tied tensors are in ``model`` and share memory. Raises :class:`CheckpointError` for weights that cannot
    be read or do not fill a ``BertForPreTraining`` or ``BertForMaskedLM``, :class:`ConfigError` without a config.
    """
    if pad_vocab_to_multiple not in (1, *PADDING_MULTIPLES):
        allowed = ", ".join(map(str, (1, *PADDING_MULTIPLES)))
        raise ConfigError(f"--pad_vocab_to_multiple must be one of {allowed}, got {pad_vocab_to_multiple}")
    output = Path(output).absolute()
    if output.suffix.lower() == ".safetensors":
        raise ConfigError(f"--output {output}: a berth weights file is a .pt file, no safetensors; name a .pt file")
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; name the .pt file to write")
    loaded = read_weights(source)
    for file in (*loaded.files, *([] if config_file is None else [Path(config_file)])):
        if file.exists() and output.exists() and file.samefile(output):
            raise ConfigError(f"--output {output} is the input file {file}, which would be overwritten; name another file")
    config = _config_of(loaded, config_file)
    rows = _embedding_rows(loaded)
    real, larger = sorted((config["vocab_size"], rows))
    if not is_padded_size(larger, real):
        raise CheckpointError(f"{loaded.source}: {rows} word embeddings, but vocab_size is {config['vocab_size']} in its configuration")
    report = _complete(loaded, {**config, "vocab_size": rows})
    padded = round_up(real, pad_vocab_to_multiple)
    payload = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": resize_tied(report.weights, padded),
        "config": {**config, "vocab_size": real},
    }
    with written(output) as handle:
        torch.save(payload, handle)
    unused = f"; not used: {', '.join(report.unexpected[:4])}" if report.unexpected else ""
    note = f"{len(report.matched)} tensors{unused}"
    return Conversion(loaded.source, output, _architecture(report), real, padded, note)


def _config_of(loaded: Source, config_file: str | Path | None) -> dict[str, Any]:
    """The config of the weights; ``config_file`` where they have none, and otherwise it must not contradict it."""
    given = None if config_file is None else _given_config(config_file)
    config = loaded.config if loaded.config is not None else given
    if config is None:
        raise ConfigError(f"{loaded.source} come without a configuration; give --config_file (bert_configs/*.json)")
    if loaded.config is None:
        checked_sizes(config, str(config_file))
        return with_nvidia_gelu(config) if loaded.nvidia else config
    checked_sizes(config, f"of {loaded.source}")
    different = [
        f"{key}={given[key]!r} (weights: {config[key]!r})"
        for key in _COMPARED_KEYS
        if given and key in given and key in config and _activation(given[key]) != _activation(config[key])
    ]
    if different:
        raise ConfigError(f"--config_file {config_file} contradicts the weights: {', '.join(different)}; leave it out")
    return config


def _given_config(config_file: str | Path) -> dict[str, Any]:
    try:
        return read_config(config_file)
    except CheckpointError as error:
        raise ConfigError(f"--config_file: {error}") from error


def _activation(value: Any) -> Any:
    return _HUGGING_FACE_ACTIVATIONS.get(value, value) if isinstance(value, str) else value


def _embedding_rows(loaded: Source) -> int:
    for name in (WORD_EMBEDDINGS, DECODER_WEIGHT):
        if name in loaded.weights:
            return loaded.weights[name].shape[0]
    raise CheckpointError(f"{loaded.source} have no word embeddings")


def _check_vocabulary(vocabulary: Vocabulary, vocab_file: str | Path, config_size: int, rows: int) -> None:
    """The vocabulary must be the model's: its size, or the size that was rounded up to the model's."""
    if vocabulary.size > rows:
        raise DataError(
            f"--vocab_file {vocab_file} has {vocabulary.size} pieces, the model only {rows} word embeddings: "
            "it was trained with another vocabulary"
        )
    if vocabulary.size < config_size and not is_padded_size(config_size, vocabulary.size):
        raise DataError(
            f"--vocab_file {vocab_file} has {vocabulary.size} pieces, the model's vocab_size is {config_size}: "
            "it was trained with another vocabulary"
        )
    if not is_padded_size(rows, vocabulary.size):
        raise DataError(
            f"--vocab_file {vocab_file} has {vocabulary.size} pieces, the model {rows} word embeddings: more than padding sets them apart"
        )


def _complete(loaded: Source, config: Mapping[str, Any]) -> MatchReport:
    """The weights fitted to ``config``; every tensor of the architecture must be there."""
    shapes = pretraining_shapes(config, next_sentence=_NEXT_SENTENCE in loaded.weights)
    report = match_weights(shapes, loaded.weights)
    if not report.complete:
        raise CheckpointError(f"{loaded.source} do not fill the model of the configuration: {report}")
    return report


def _check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{source}: {name} holds NaN or infinity; the training diverged, export an earlier checkpoint")


def _architecture(report: MatchReport) -> str:
    return "BertForPreTraining" if _NEXT_SENTENCE in report.weights else "BertForMaskedLM"


def _case(lowercase: bool | None, loaded: Source, vocabulary: Vocabulary, vocab_file: str | Path) -> tuple[bool, str]:
    """Whether the model is uncased, and what tells: the option, else the checkpoint, else the vocabulary."""
    if lowercase is not None:
        if loaded.lowercase is not None and lowercase != loaded.lowercase:
            option, truth = ("--do_lower_case", "cased") if lowercase else ("--cased", "uncased")
            raise ConfigError(f"{option} contradicts {loaded.source}, which were trained on {truth} records; leave it out")
        return lowercase, ""
    if loaded.lowercase is not None:
        return loaded.lowercase, ", as its records were"
    seen = _looks_uncased(vocabulary)
    if seen is None:
        raise ConfigError(
            f"--vocab_file {vocab_file} does not show whether the model is cased; give --cased (accents and vowel signs are kept) "
            "or --do_lower_case (they are stripped), as the records were made"
        )
    return seen, ", judging by its capital letters"


def _looks_uncased(vocabulary: Vocabulary) -> bool | None:
    """False with a capital letter in any script; True with small letters only; None where the pieces do not decide.

    Accents beside small letters only do not decide either: an uncased vocabulary has none, as they are stripped.
    """
    ordinary = (piece for piece, skip in zip(vocabulary.pieces, vocabulary.is_special_or_unused, strict=True) if not skip)
    characters = set().union(*ordinary)
    if any(character.lower() != character for character in characters):
        return False
    accents = any(unicodedata.category(part) == "Mn" for character in characters for part in unicodedata.normalize("NFD", character))
    return True if not accents and any(character.upper() != character for character in characters) else None


def _write_model(folder: Path, weights: Mapping[str, Tensor]) -> None:
    stored = {name: tensor.contiguous() for name, tensor in weights.items() if name not in TIED}
    with written(folder / "model.safetensors") as handle:
        handle.write(safetensors.torch.save(stored, metadata={"format": "pt"}))


def _huggingface_config(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _NOT_IN_CONFIG}
    activation = _activation(config.get("hidden_act", "gelu"))
    fixed = {"architectures": [architecture], "model_type": "bert", "hidden_act": activation, "tie_word_embeddings": True}
    return {"pad_token_id": 0, **kept, **fixed}


def _write_tokenizer(folder: Path, vocabulary: Vocabulary, lowercase: bool, config: Mapping[str, Any]) -> None:
    with written(folder / "vocab.txt") as handle:
        handle.write(("\n".join(vocabulary.pieces) + "\n").encode())
    with written(folder / "tokenizer.json") as handle:
        handle.write(load_tokenizer(vocabulary, lowercase).to_str(pretty=True).encode())
    special = dict(zip(_SPECIAL_KEYS, SPECIAL_TOKENS, strict=True))
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lowercase,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "model_max_length": config.get("max_position_embeddings", 512),
        "clean_up_tokenization_spaces": True,
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
