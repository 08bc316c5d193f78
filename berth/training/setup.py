"""What a run is made of, before its first step: configuration, vocabulary, records, model, optimizer recipe, schedule.

Every function takes the checked :class:`Options` and raises an error that names the option or the file at fault.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from isal import isal_zlib
from torch import nn

import modeling
import optimization
from berth.errors import CheckpointError, ConfigError, DataError
from berth.launch.inputs import records_folder
from berth.records.dynamic import DynamicMasker, Masking
from berth.records.reader import RecordsIndex, open_index
from berth.text.vocabulary import Vocabulary
from berth.training.agreement import code_digest
from berth.training.backends import Choice, choose, fuse_layer_norms
from berth.training.checkpoint import MANIFEST, read_checkpoint
from berth.training.distributed import Communicator
from berth.training.evaluate import HeldOut
from berth.training.fastpath import FastPath
from berth.training.metrics import StepClock
from berth.training.options import Options
from berth.training.parallel import Parallel, Recipe, Replicated


def load_config(path: str) -> modeling.BertConfig:
    """The model configuration; its mistakes become one :class:`ConfigError`."""
    try:
        return modeling.BertConfig.from_json_file(path)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--config_file {path}: {error}") from error


def load_vocabulary(options: Options, config: modeling.BertConfig) -> Vocabulary | None:
    """--vocab_file, checked against the model; ``None`` when it was not given."""
    if options.vocab_file is None:
        return None
    vocabulary = Vocabulary.load(options.vocab_file)
    check_vocabulary_size(vocabulary.size, f"--vocab_file {options.vocab_file} is", options, config)
    return vocabulary


def open_training_data(options: Options, config: modeling.BertConfig, vocabulary: Vocabulary | None) -> tuple[RecordsIndex, str]:
    """Index the records and check them against the flags, the vocabulary and the model; (index, vocabulary sha256 or '')."""
    index = open_index(records_of(options.input_dir, options), "training", options.max_seq_length, vocabulary=vocabulary)
    # where masks are drawn it is this option that decides; Parquet does not say how many a row may have
    free = options.dynamic_masking or not index.masked or index.files[0].layout == "parquet"
    if options.max_predictions_per_seq not in (None, index.max_predictions) and not free:
        raise DataError(
            f"the records in {options.input_dir} have {index.max_predictions} predictions a sequence but --max_predictions_per_seq is "
            f"{options.max_predictions_per_seq}; pass {index.max_predictions} or make the records again"
        )
    if index.seq_length > config.max_position_embeddings:
        raise ConfigError(
            f"the records in {options.input_dir} have {index.seq_length} tokens a sequence, the model has "
            f"{config.max_position_embeddings} positions (max_position_embeddings in {options.config_file})"
        )
    for file in index.files:
        check_vocabulary_size(file.vocab_size, f"the records {file.path} were made with", options, config)
    digests = {file.vocab_sha256: file.path for file in index.files if file.vocab_sha256}
    if len(digests) > 1:
        (_, one), (_, other), *_ = digests.items()
        raise DataError(f"{one} and {other} were made with different vocabularies; make the records again with one")
    digest = next(iter(digests), "")
    if vocabulary is not None:
        if digest and vocabulary.sha256 != digest:
            raise DataError(f"the records in {options.input_dir} were made with another vocabulary than --vocab_file {options.vocab_file}")
        digest = vocabulary.sha256
    return index, digest


def records_of(folder: str, options: Options) -> str:
    """The folder of records that is meant: itself, or the one of a work folder of data.prepare that has the lengths asked for."""
    return str(records_folder(folder, options.max_seq_length, None if options.dynamic_masking else options.max_predictions_per_seq))


def fit_objective(options: Options, index: RecordsIndex) -> Options:
    """``options`` with the objective the records allow: rows that are no sentence pairs have no next sentence to predict."""
    if index.objective == "mlm+nsp" or options.objective == "mlm":
        return options
    notice = "the records are no sentence pairs (objective mlm): training on masked tokens alone, as with --objective mlm"
    return dataclasses.replace(options, objective="mlm", notices=(*options.notices, notice))


def choose_masking(options: Options, index: RecordsIndex) -> Masking | None:
    """How masks are drawn while reading; ``None`` when those of the records are used.

    Raises :class:`DataError` for records without masks and no --dynamic_masking, :class:`ConfigError` for its options without it.
    """
    parquet = index.files[0].layout == "parquet"
    if not options.dynamic_masking and (index.masked or not parquet):
        if not index.masked:
            raise DataError(
                f"the records in {options.input_dir} hold no masks (made with --masking none); train with --dynamic_masking --vocab_file, or "
                "make them again with masks"
            )
        for name in ("masked_lm_prob", "whole_word_mask"):
            if getattr(options, name):
                raise ConfigError(f"--{name} belongs to --dynamic_masking; the records in {options.input_dir} hold their own masks")
        return None
    prob = options.masked_lm_prob or index.masked_lm_prob or 0.15
    most = options.max_predictions_per_seq or index.max_predictions
    return Masking(prob, min(most, index.seq_length), options.whole_word_mask)


def data_fingerprint(index: RecordsIndex, masking: Masking | None) -> str:
    """What a resumed run must read again: the records, and the rules of masks that are drawn while reading."""
    if masking is None:
        return index.fingerprint
    return hashlib.sha256(f"{index.fingerprint} {sorted(dataclasses.asdict(masking).items())}".encode()).hexdigest()


def check_vocabulary_size(size: int, what: str, options: Options, config: modeling.BertConfig) -> None:
    """A vocabulary and the model's ``vocab_size`` must be equal, padding to a multiple of 8 apart. 0 = unknown."""
    if size and -(-size // 8) * 8 != config.padded(8).vocab_size:
        raise ConfigError(
            f"{what} a vocabulary of {size} entries, but vocab_size in {options.config_file} is {config.vocab_size}; use the bert_config.json "
            "that data/vocab.py wrote with the vocabulary"
        )


def open_held_out(
    options: Options, index: RecordsIndex, vocab_size: int, vocab_sha256: str, vocabulary: Vocabulary | None
) -> HeldOut | None:  # fmt: skip
    """The held-out records, or ``None`` without --eval_dir. Their own masks are scored; where they have none, masks that never change."""
    if options.eval_dir is None:
        return None
    held_out = open_index(
        records_of(options.eval_dir, options), "test", index.seq_length, "the training records' length", vocabulary=vocabulary
    )
    for file in held_out.files:
        if vocab_sha256 and file.vocab_sha256 not in ("", vocab_sha256):
            raise DataError(
                f"the held-out records {file.path} were made with another vocabulary than the training records; make them again"
            )
    if held_out.objective == "mlm" and options.objective != "mlm":
        raise DataError(f"the held-out records in {options.eval_dir} are no sentence pairs, those to train on are; make them in one way")
    masker = None
    if not held_out.masked:
        if vocabulary is None:
            raise DataError(f"the held-out records in {options.eval_dir} hold no masks; give --vocab_file, so that they can be drawn")
        prob = options.masked_lm_prob or held_out.masked_lm_prob or 0.15
        masker = DynamicMasker(vocabulary, Masking(prob, held_out.max_predictions), seed=0)
    return HeldOut(held_out, vocab_size, options.eval_samples, masker)


def build_model(options: Options, config: modeling.BertConfig, fast: FastPath) -> nn.Module:
    """The model with its seeded initial weights and its switches set."""
    torch.manual_seed(options.seed)
    kind = modeling.BertForPreTraining if options.objective == "mlm+nsp" else modeling.BertForMaskedLM
    model = kind(config)
    model.dense_sequence_output = not options.no_dense_sequence_output
    model.set_activation_checkpointing(options.checkpoint_activations)
    fast.prepare(model)
    return model


def effective_sharding(options: Options, world_size: int) -> str:
    """How the state is really spread: on one process ``--shard`` has nothing to split."""
    return options.sharding if world_size > 1 or options.uses_deepspeed else "none"


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 over names and bytes of CPU tensors: whether all ranks have read the same."""
    crc = 0
    for name in sorted(weights):
        crc = isal_zlib.crc32(name.encode(), crc)
        crc = isal_zlib.crc32(weights[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return f"CRC-32 {crc:08x}"


def spread(options: Options, model: nn.Module, communicator: Communicator, clock: StepClock, fast: FastPath) -> tuple[Parallel, Choice]:
    """``model`` (on its device) and its optimizer, spread over the ranks as --shard or --deepspeed says; and whose kernels run."""
    choice = choose(
        options.optimizer_backend,
        device=communicator.device,
        optimizer=options.optimizer,
        sharding=effective_sharding(options, communicator.world_size),
        precision=options.precision,
        compiled=fast.compiled != "off",
    )
    fuse_layer_norms(model, choice)
    recipe = Recipe(options.optimizer, options.learning_rate, options.weight_decay, options.max_grad_norm, choice)
    if options.uses_deepspeed:
        from berth.training.ds_engine import DeepSpeedParallel

        return DeepSpeedParallel(model, communicator, clock, recipe, options), choice
    if options.shard != "none" and communicator.world_size > 1:
        from berth.training.sharded import FullySharded, Zero1

        if options.shard == "zero1":
            return Zero1(model, communicator, clock, recipe, options.reduce_dtype, compiled=fast.compiled, graphs=fast.cuda_graphs), choice
        stage = int(options.shard[-1])
        return FullySharded(model, communicator, clock, recipe, options.reduce_dtype, stage=stage, compiled=fast.compiled), choice
    return Replicated(model, communicator, clock, recipe, options.reduce_dtype, compiled=fast.compiled, graphs=fast.cuda_graphs), choice


def start_facts(options: Options, config: modeling.BertConfig, data: str, vocab_sha256: str) -> dict[str, str]:
    """What must be the same on all ranks of a run, by name, for people and for :func:`berth.training.agreement.check_start`."""
    chosen = {name: value for name, value in dataclasses.asdict(options).items() if name != "notices"}
    return {
        "code of berth": code_digest(),
        "torch": torch.__version__,
        "options": _digest(chosen),
        "model configuration": _digest(config.to_dict()),
        "training records": data,
        "vocabulary": vocab_sha256,
    }


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def build_schedule(options: Options) -> optimization.Schedule:
    """The learning-rate schedule over this phase's steps."""
    extra: dict[str, float] = {}
    if options.lr_schedule == "exponential":
        extra = {
            "warmup_degree": options.lr_warmup_degree,
            "decay_rate": options.lr_decay_rate,
            "decay_steps": options.lr_decay_steps,
            "lr_offset": options.lr_offset,
        }
    try:
        return optimization.make_schedule(options.lr_schedule, options.learning_rate, options.warmup_proportion, options.max_steps, **extra)
    except ValueError as error:
        raise ConfigError(f"--lr_schedule {options.lr_schedule}: {error}") from error


def load_full_checkpoint(path: str) -> dict[str, Any] | None:
    """The whole payload of a berth training checkpoint (or of an output folder's newest), ``None`` when ``path`` holds weights only."""
    from berth.export.weights import newest_checkpoint

    file = Path(path)
    if file.is_dir() and (file / MANIFEST).is_file():
        file = newest_checkpoint(file)
    if file.suffix != ".pt" or not file.is_file():
        return None
    try:
        payload = read_checkpoint(file)
    except CheckpointError:  # weights of another format; load_weights has read and reported them
        return None
    return payload if "optimizer" in payload else None
