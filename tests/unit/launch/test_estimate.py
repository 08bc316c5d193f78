"""Memory and time: the formulas against hand-computed and published numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from berth.launch.estimate import (
    RESERVE_GB,
    bytes_a_parameter,
    flops_per_sequence,
    implied_time_to_train,
    memory_gb,
    parameter_count,
    training_hours,
    walltime_estimate,
)
from berth.launch.matrix import SLURM, Matrix, load_matrix
from berth.launch.published import COLUMNS

MATRIX = load_matrix()
LAMB = MATRIX.recipes["lamb"].phases
CONFIGS = SLURM.parent / "bert_configs"
LARGE = json.loads((CONFIGS / "large.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["tiny", "base", "large"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    import torch

    import modeling

    config = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(modeling.BertConfig)}
    padded = {**config, "vocab_size": -(-config["vocab_size"] // 8) * 8}
    with torch.device("meta"):
        model = modeling.BertForPreTraining(modeling.BertConfig(**{key: value for key, value in padded.items() if key in known}))
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert parameter_count(config) == sum(unique.values())


def test_memory_of_bert_large_by_hand() -> None:
    estimate = memory_gb(LARGE, LAMB[2], 32, "fp16")
    assert estimate.parameters_gb == pytest.approx(336_232_258 * 18 / 1e9)
    # s b h (34 + 5 a s / h) bytes a layer: 512 x 32 x 1024 x (34 + 5 x 16 x 512 / 1024) x 24 layers
    assert estimate.activations_gb == pytest.approx(512 * 32 * 1024 * (34 + 40) * 24 / 1e9)
    assert estimate.logits_gb == pytest.approx(32 * 80 * 30528 * 2 * 2 / 1e9)
    assert estimate.total_gb == pytest.approx(6.0522 + 29.7963 + 0.3126 + RESERVE_GB, abs=1e-3)
    assert str(estimate) == "37.2 GB (parameters, gradients and moments 6.1, activations 29.8, logits 0.3, reserve 1.0)"


@pytest.mark.parametrize(
    ("shard", "ranks", "accumulation", "expected"),
    [
        ("none", 64, 8, 16),
        ("zero1", 8, 8, 9),
        ("zero2", 8, 1, 6),
        ("zero2", 8, 2, 10),
        ("zero3", 8, 1, 2),
        ("zero3", 16, 2, 5),
        ("zero2", 1, 2, 16),
    ],
)
def test_sharding_saves_what_the_table_says(shard: str, ranks: int, accumulation: int, expected: float) -> None:
    assert bytes_a_parameter(shard, ranks, accumulation) == expected
    estimate = memory_gb(LARGE, LAMB[2], 32, "fp16", parameter_bytes=bytes_a_parameter(shard, ranks, accumulation))
    assert estimate.parameters_gb == pytest.approx(336_232_258 * (expected + 2) / 1e9)


def test_32_bits_double_activations_and_checkpointing_saves_most() -> None:
    half, full = memory_gb(LARGE, LAMB[1], 64, "bf16"), memory_gb(LARGE, LAMB[1], 64, "tf32")
    assert full.activations_gb == pytest.approx(2 * half.activations_gb)
    assert full.parameters_gb == pytest.approx(half.parameters_gb * 16 / 18)
    assert memory_gb(LARGE, LAMB[1], 64, "fp8") == half
    saved = memory_gb(LARGE, LAMB[1], 64, "bf16", checkpoint_activations=True)
    # one layer whole, and two bytes a token and hidden unit for the input of each
    assert saved.activations_gb == pytest.approx(half.activations_gb / 24 + 24 * 2 * 64 * 128 * 1024 / 1e9)
    recipe = dataclasses.replace(LAMB[1], options={"checkpoint_activations": True})
    assert memory_gb(LARGE, recipe, 64, "bf16") == saved


def test_every_row_of_the_matrix_fits_its_gpu_and_phase_2_at_256_fits_none() -> None:
    gpus = [row for row in MATRIX.rows if row.platform.device == "cuda"]
    assert len(gpus) > 140
    for row in gpus:
        need = memory_gb(LARGE, row.phase_recipe, row.micro_batch, row.precision).total_gb
        assert need < row.platform.gpu_memory_gb, row.name
    need = memory_gb(LARGE, LAMB[2], 256, "fp16").total_gb
    assert all(need > platform.gpu_memory_gb for platform in MATRIX.platforms.values())


def test_every_published_throughput_fitted_its_gpu() -> None:
    memory = {name: platform.gpu_memory_gb for platform in MATRIX.platforms.values() for name in platform.published_as}
    for one in MATRIX.published:
        assert memory_gb(LARGE, LAMB[one.phase], one.micro_batch, one.precision).total_gb < memory[one.hardware], one


def test_flops_of_bert_large() -> None:
    first, second = flops_per_sequence(LARGE, 128, 20), flops_per_sequence(LARGE, 512, 80)
    assert (round(first / 1e9, 1), round(second / 1e9, 1)) == (240.6, 1020.5)
    # DeepSpeed: 272 and 52 sequences/s on one V100, printed as 64 and 53 TFLOPS
    assert (round(272 * first / 1e12, 1), round(52 * second / 1e12, 1)) == (65.5, 53.1)


@pytest.mark.parametrize(
    ("first", "second", "hours"),
    [
        (874.24, 195.93, (146.55, 72.61, 219.16)),
        (3379.2, 625.66, (37.92, 22.74, 60.65)),
        (188088.32, 37478.4, (0.68, 0.38, 1.06)),
        (138294, 49663, (0.93, 0.29, 1.21)),
        (75706, 21298, (1.69, 0.67, 2.36)),
    ],
)
def test_the_hours_published_throughput_implies(first: float, second: float, hours: tuple[float, float, float]) -> None:
    found = (training_hours(LAMB[1], first), training_hours(LAMB[2], second), implied_time_to_train(LAMB, {1: first, 2: second}))
    assert found == pytest.approx(hours, abs=0.0051)


README21 = "nvidia-readme a07d20a1 (2022-05-25, container 21.11)"


@pytest.mark.parametrize(
    ("row", "hours", "basis"),
    [
        (
            MATRIX.row("dgx-a100-80g_4x8x256x8_fp16"),
            65536 * 7038 / 18119 / 3600,
            f"published for this row: 18119 sequences/s on 4 x DGX A100 (8x A100 80GB) ({README21})",
        ),
        (
            MATRIX.default_row("dgx-a100-80g", 2, 1, "bf16"),
            65536 * 7038 / 9191 / 3600,
            f"scaled to 16 GPUs from 9191 sequences/s on 2 x DGX A100 (8x A100 80GB) ({README21}), 16 GPUs, fp16, micro-batch 256",
        ),
        (
            MATRIX.row("nd40rs_v2_8x8x16x32_fp16"),
            32768 * 1563 / (586 / 8 * 64) / 3600,
            f"scaled to 64 GPUs from 586 sequences/s on 1 x DGX-1 32G ({README21}), 8 GPUs, fp16, micro-batch 8",
        ),
        (
            MATRIX.row("dgx2_4x16x64x16_fp16"),
            65536 * 7038 / (2775.04 * 4) / 3600,
            "scaled to 64 GPUs from 2775.04 sequences/s on 1 x DGX-2 32G (nvidia-readme 47336035 (2020-04-20, container 19.07)), 16 GPUs, fp16, "
            "micro-batch 64",
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_hours_of_a_row_and_what_they_rest_on(row: object, hours: float, basis: str) -> None:
    estimate = walltime_estimate(row, MATRIX)
    assert estimate is not None
    assert estimate.hours == pytest.approx(hours)
    assert estimate.sequences_per_second == pytest.approx(row.phase_recipe.sequences / hours / 3600)
    assert estimate.basis == basis


@pytest.mark.parametrize("name", ["dgx-h100_2x8x256x16_bf16", "nc24rs_v3_1x4x48x340_fp16_lamb-65280-p1", "local_1x1x64x1_fp32_demo-p1"])
def test_no_hours_where_nothing_comparable_was_published(name: str) -> None:
    assert walltime_estimate(MATRIX.row(name), MATRIX) is None
    assert MATRIX.published_for(MATRIX.row(name)) == []


def test_fp32_is_no_guide_to_tf32() -> None:
    assert walltime_estimate(MATRIX.make_row("dgx-a100-80g", 1, 1, "fp32", 64, "lamb"), MATRIX) is None


@pytest.mark.parametrize(
    ("lines", "speed"),
    [
        # another platform's throughput on the same GPU, before and after an own one with another micro-batch
        ([("DGX-1 32G", 1, 8, "fp16", 64, 800), ("ours", 1, 8, "fp16", 16, 400)], 400),
        # bf16 before fp16, whatever else is nearer
        ([("ours", 1, 8, "fp16", 64, 800), ("ours", 1, 8, "bf16", 16, 640)], 640),
        # the nearest micro-batch, then the nearest number of GPUs, then the first
        (
            [
                ("ours", 1, 8, "bf16", 16, 640),
                ("ours", 1, 1, "bf16", 32, 90),
                ("ours", 1, 4, "bf16", 32, 300),
                ("ours", 1, 4, "bf16", 32, 310),
            ],
            600,
        ),
    ],
)
def test_the_nearest_published_throughput_is_taken(tmp_path: Path, lines: list[tuple], speed: float) -> None:
    tables = "".join(
        f"  - {{source: s, hardware: {name}, rows: [[{nodes}, {gpus}, 1, 128, {precision}, {micro}, null, {number}, null]]}}\n"
        for name, nodes, gpus, precision, micro, number in lines
    )
    (tmp_path / "published.yml").write_text(f"columns: [{', '.join(COLUMNS)}]\ntables:\n{tables}", encoding="utf-8")
    own = dataclasses.replace(MATRIX.platforms["dgx1-32g"], name="own", precisions=("bf16",), published_as=("ours",))
    matrix = Matrix({**MATRIX.platforms, "own": own}, MATRIX.recipes, (), tmp_path)
    estimate = walltime_estimate(matrix.make_row("own", 1, 1, "bf16", 64, "lamb"), matrix)
    assert estimate is not None
    assert estimate.sequences_per_second == speed
