"""Do model, vocabulary, records, recipe and options fit together? What ``run_pretraining.py`` asks when it starts, without torch and numpy.

In: files, and what is known of the records. Out: what they say, and problems in words. Each names the value, the rule and the fix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from berth.errors import ConfigError
from berth.files import read_json, sha256_file
from berth.launch.inputs import Records
from berth.launch.matrix import SIXTEEN_BIT
from berth.launch.recipes import WORDS, value_problems
from berth.launch.rows import Row

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
POSITIONS = "max_position_embeddings"


def read_model(path: Path) -> dict[str, Any]:
    """A BERT configuration: every key of the file, with the sizes a BERT must have.

    Raises :class:`ConfigError` for a file that is none, ``OSError`` for one that cannot be read.
    """
    try:
        config = read_json(path)
    except ValueError as error:
        raise ConfigError(f"config_file {path} is not JSON ({error}); take one of bert_configs, or vocab/bert_config.json") from error
    if not isinstance(config, dict):
        raise ConfigError(f"config_file {path} must be a JSON object with the keys of a BERT configuration")
    values = {POSITIONS: 512, **config}  # as modeling.BertConfig does
    wrong = [key for key in (*SIZES, POSITIONS) if type(values.get(key)) is not int or values[key] < 1]
    if wrong:
        raise ConfigError(f"config_file {path}: {', '.join(wrong)} must be whole numbers, 1 or more")
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if hidden % heads:
        raise ConfigError(f"config_file {path}: hidden_size {hidden} must be a multiple of num_attention_heads {heads}")
    return values


def read_vocabulary(path: Path) -> tuple[str, int]:
    """SHA-256 of a vocabulary's bytes, and its number of entries (lines). ``OSError`` when it cannot be read."""
    text = path.read_bytes()
    return sha256_file(path), text.count(b"\n") + (bool(text) and not text.endswith(b"\n"))


def same_size(entries: int, vocab_size: int) -> bool:
    """Whether a vocabulary is of the model's size: both are padded to a multiple of 8 first. 0 entries: unknown, so nothing against it."""
    return not entries or math.ceil(entries / 8) == math.ceil(vocab_size / 8)


def record_problems(records: Records, row: Row, dynamic_masking: bool) -> list[str]:
    """What is wrong with training ``row`` on ``records``. What they do not say is not held against them."""
    recipe, folder, found = row.phase_recipe, records.folder, []
    if records.seq_length not in (None, recipe.max_seq_length):
        found.append(
            f"{folder} holds sequences of {records.seq_length} tokens, recipe {row.recipe.name} has {recipe.max_seq_length}; give records of "
            "that length"
        )
    if records.masking == "none" and not dynamic_masking:
        found.append(f"{folder} holds no masks; train with --dynamic_masking, or make records with masks")
    elif records.max_predictions not in (None, recipe.max_predictions_per_seq) and not dynamic_masking:
        found.append(
            f"{folder} has {records.max_predictions} masked positions a row, recipe {row.recipe.name} has {recipe.max_predictions_per_seq}; make "
            f"the records with --max_predictions_per_seq {recipe.max_predictions_per_seq}"
        )
    if records.rows is not None and records.rows < row.global_batch:
        found.append(
            f"{folder} has {records.rows} rows to train on, one step takes {row.global_batch}; prepare more text, or choose a recipe with a "
            "smaller global batch"
        )
    return found


def given_options(row: Row, extra: Sequence[str]) -> dict[str, Any]:
    """Options that ``run_pretraining.py`` gets beside those of the row: of recipe and row, and the words of ``extra`` (``--name value``,
    ``--name=value``, ``--name``), the last one said."""
    given: dict[str, Any] = {**row.phase_recipe.options, **row.options}
    for word, after in itertools.pairwise((*extra, "--")):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            given[name] = value if equals else True if after.startswith("--") else after
    return given


def option_problems(row: Row, options: Mapping[str, Any]) -> list[str]:
    """What ``berth.training.fastpath`` would refuse of ``options`` (:func:`given_options`) on the hardware and in the cut of ``row``."""
    found = [problem for name, value in options.items() for problem in value_problems(name, value)]
    if found:
        return found

    def rule(good: bool, message: str) -> None:
        if not good:
            found.append(message)

    deepspeed = any(options.get(name, False) is not False for name in ("deepspeed", "deepspeed_zero_stage"))  # 0 is a stage
    shard = str(options.get("shard", "none")) if row.world_size > 1 else "none"
    sharding = "deepspeed" if deepspeed else shard
    gpu, packed = row.platform.device == "cuda", row.precision in SIXTEEN_BIT
    switched = {name: options.get(name, "auto") for name in WORDS}

    rule(row.precision != "fp8" or sharding in ("none", "zero1"),
         f"precision fp8 rounds whole weights, and {sharding} cuts them into pieces; use shard none or zero1, or precision bf16")  # fmt: skip
    rule(not gpu or packed or switched["unpad"] != "on",
         f"unpad on: on a GPU packed batches need 16 bits, not {row.precision}; use bf16 or fp16, or leave unpad out")  # fmt: skip
    for name in ("fused_loss", "fused_qkv", "compile"):
        rule(not deepspeed or switched[name] in ("auto", "off"), f"{name} {switched[name]} does not go with DeepSpeed; drop one of them")
    rule(row.precision != "fp8" or switched["fused_qkv"] != "on", "fused_qkv on does not go with precision fp8; leave it out, or use bf16")
    rule(row.world_size == 1 or switched["compile"] != "model",
         f"compile model is for one process, row {row.name} has {row.world_size}; use compile: layers")  # fmt: skip
    rule(not gpu or switched["fast_dropout"] != "on", f"fast_dropout on is for CPUs, platform {row.platform.name} has GPUs; leave it out")
    if options.get("cuda_graphs"):
        rule(gpu, f"cuda_graphs need a GPU, platform {row.platform.name} has none; leave them out")
        rule(not options.get("checkpoint_activations"), "cuda_graphs do not go with checkpoint_activations; leave out one of them")
        rule(sharding in ("none", "zero1"),
             f"cuda_graphs do not go with {sharding}, which communicates within passes; use shard none or zero1, or leave them out")  # fmt: skip
        rule(row.world_size == 1 or row.accumulation > 1,
             f"cuda_graphs leave out the last micro-batch of a step, which communicates, and row {row.name} has accumulation 1; choose a smaller "
             "micro-batch, or leave them out")  # fmt: skip
        rule(switched["unpad"] != "off", "cuda_graphs need packed batches; leave out unpad: off, or them")
        rule(
            not gpu or packed,
            f"cuda_graphs need packed batches, and those 16 bits, not {row.precision}; use bf16 or fp16, or leave them out",
        )
    return found
