"""Model, vocabulary, records and options against each other; the rest of fitting is tested through validation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import modeling
from berth.errors import ConfigError
from berth.launch import fitting
from berth.launch.recipes import PhaseRecipe, Platform, Recipe
from berth.launch.rows import Row
from berth.text.vocabulary import Vocabulary
from tests.support import ROOT, TINY


def test_the_models_of_the_project_can_be_read() -> None:
    for path in sorted((ROOT / "bert_configs").glob("*.json")):
        config = modeling.BertConfig.from_json_file(path)
        read = fitting.read_model(path)
        assert {key: read[key] for key in (*fitting.SIZES, fitting.POSITIONS)} == {
            key: getattr(config, key) for key in (*fitting.SIZES, fitting.POSITIONS)
        }


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"vocab_size": true}'])
def test_what_is_no_model(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config_file .*c\.json"):
        fitting.read_model(tmp_path / "c.json")


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_vocabulary_is_counted_as_training_counts_it(tmp_path: Path, end: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "naïve", "\u2028x"]) + end, encoding="utf-8")
    vocabulary = Vocabulary.load(path)
    assert fitting.read_vocabulary(path) == (vocabulary.sha256, vocabulary.size)


@pytest.mark.parametrize(
    ("entries", "size", "same"), [(0, 96, True), (96, 96, True), (90, 96, True), (96, 90, True), (88, 96, False), (97, 96, False)]
)
def test_sizes_are_padded_first(entries: int, size: int, same: bool) -> None:
    padded = modeling.BertConfig(**{**TINY, "vocab_size": size}).padded(8).vocab_size  # type: ignore[arg-type]
    assert fitting.same_size(entries, size) is same
    assert not entries or ((-(-entries // 8) * 8 == padded) is same)  # the rule of run_pretraining.py


PHASE = PhaseRecipe(1, 128, 20, 10, 64, 1e-2, 0.1, "lamb", "poly", 5)
RECIPE = Recipe("small", "small", "test", {1: PHASE})
GPU = Platform("box", "a box", 4, "cuda", "G1", 80.0, 8, 64.0, ("bf16", "fp16", "fp8", "tf32", "fp32"), ())
CPU = dataclasses.replace(GPU, name="desk", device="cpu")


def row_of(precision: str = "bf16", *, ranks: int = 4, micro: int = 4, platform: Platform = GPU, **options: object) -> Row:
    return Row(platform, 1, 1, precision, micro, RECIPE, ranks, options=options)


GOOD = [
    (row_of(cuda_graphs=True), ()),
    (row_of(cuda_graphs=True, shard="zero1"), ()),
    (row_of(cuda_graphs=True, ranks=1, micro=64), ()),  # nothing to communicate
    (row_of(cuda_graphs=True, ranks=1, shard="zero3"), ()),  # no pieces
    (row_of(cuda_graphs=True, ranks=1, compile="model", unpad="on"), ()),
    (row_of("fp8", shard="zero1", fused_qkv="off", unpad="on"), ()),
    (row_of("fp32", unpad="off", cuda_graphs=False), ("--compile", "layers")),
    (row_of("fp32", platform=CPU, unpad="on"), ("--fused_loss=on", "--no_copy_ahead")),
    (row_of(deepspeed_zero_stage=2, fused_loss="off", compile="off"), ("--num_workers", "0")),
    (row_of("fp8", shard="zero2"), ("--shard", "none")),
]


@pytest.mark.parametrize(("row", "extra"), GOOD, ids=range(len(GOOD)))
def test_options_that_go_together(row: Row, extra: tuple[str, ...]) -> None:
    assert fitting.option_problems(row, fitting.given_options(row, extra)) == []


BAD = [
    (row_of("fp8", shard="zero2"), (), "precision fp8 rounds whole weights, and zero2 cuts them into pieces; use shard none or zero1"),
    (row_of("fp8", ranks=1, deepspeed_zero_stage=0), (), "precision fp8 rounds whole weights, and deepspeed cuts"),
    (row_of("fp8"), ("--deepspeed",), "precision fp8 rounds whole weights, and deepspeed cuts"),
    (row_of("fp8", fused_qkv="on"), (), "fused_qkv on does not go with precision fp8"),
    (row_of("bf16", fast_dropout="on"), (), "fast_dropout on is for CPUs"),
    (row_of("tf32", unpad="on"), (), "unpad on: on a GPU packed batches need 16 bits, not tf32; use bf16 or fp16"),
    (row_of(compile="model"), (), "compile model is for one process, row box_1x4x4x4_bf16_small-p1 has 4; use compile: layers"),
    (row_of(), ("--deepspeed_zero_stage", "1", "--compile", "layers"), "compile layers does not go with DeepSpeed; drop one"),
    (row_of(fused_loss="on", deepspeed_zero_stage=1), (), "fused_loss on does not go with DeepSpeed"),
    (row_of(cuda_graphs=True, checkpoint_activations=True), (), "cuda_graphs do not go with checkpoint_activations"),
    (row_of(shard="zero3"), ("--cuda_graphs",), "cuda_graphs do not go with zero3, which communicates"),
    (row_of(cuda_graphs=True, deepspeed_zero_stage=1), (), "cuda_graphs do not go with deepspeed, which communicates"),
    (row_of(micro=16, cuda_graphs=True), (), "row box_1x4x16x1_bf16_small-p1 has accumulation 1; choose a smaller micro-batch"),
    (row_of(cuda_graphs=True, unpad="off"), (), "cuda_graphs need packed batches; leave out unpad: off"),
    (row_of("fp32", cuda_graphs=True), (), "cuda_graphs need packed batches, and those 16 bits, not fp32; use bf16 or fp16"),
    (row_of(platform=CPU, cuda_graphs=True), (), "cuda_graphs need a GPU, platform desk has none"),
    (row_of(), ("--unpad=maybe",), "option unpad 'maybe' is not known; valid: auto, on, off"),
    (row_of(unpad="on"), ("--compile", "on"), "option compile 'on' is not known"),
]


@pytest.mark.parametrize(("row", "extra", "said"), BAD, ids=range(len(BAD)))
def test_options_that_do_not_go_together_are_named_with_the_way_out(row: Row, extra: tuple[str, ...], said: str) -> None:
    (problem,) = fitting.option_problems(row, fitting.given_options(row, extra))
    assert said in problem
