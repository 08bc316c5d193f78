"""The published throughput: anchors typed from the sources, and what a file with mistakes says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from berth.errors import ConfigError
from berth.launch.matrix import SLURM
from berth.launch.published import COLUMNS, Published, load_published

A100, A40 = "DGX A100 (8x A100 80GB)", "DGX A100 (8x A100 40GB)"
# commit, hardware, nodes, GPUs a node, phase, precision, micro-batch, accumulation, sequences/s, scaling
ANCHORS = [
    ("a07d20a1", A100, 1, 1, 1, "fp16", 256, 32, 580, 1),
    ("a07d20a1", A100, 4, 8, 1, "fp16", 256, 8, 18119, 3.98),
    ("a07d20a1", A100, 32, 8, 1, "fp16", 256, 1, 138294, 30.37),
    ("a07d20a1", A100, 32, 8, 1, "tf32", 128, 2, 75706, 30.45),
    ("a07d20a1", A100, 32, 8, 2, "tf32", 16, 8, 21298, 24.95),
    ("a07d20a1", "DGX-1 32G", 1, 8, 2, "fp32", 4, 512, 149.6, 7.87),
    ("78ec6802", A40, 1, 8, 1, "tf32", 54, 151, 1777, 7.59),
    ("78ec6802", "DGX-2 32G", 1, 16, 2, "fp16", 4, 512, 551, 15.31),
    ("78ec6802", "DGX-1 16G", 1, 8, 1, "fp16", 16, 512, 1236, 7.54),
    ("47336035", "DGX-1 16G", 16, 8, 2, "fp16", 4, None, 2746.368, 14.02),
    ("47336035", "DGX-2 32G", 1, 16, 1, "fp16", 64, None, 2775.04, 15.26),
    ("47336035", "DGX-2H 32G", 64, 16, 1, "fp32", 32, None, 46628.86, None),
    ("47336035", "DGX-2H 32G", 64, 16, 2, "fp16", 8, None, 37478.4, 59.9),
]


@pytest.fixture(scope="module")
def published() -> tuple[Published, ...]:
    return load_published(SLURM / "published.yml")


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda anchor: "-".join(map(str, anchor[:7])))
def test_anchors(published: tuple[Published, ...], anchor: tuple) -> None:
    commit, hardware, nodes, gpus, phase, precision, micro, accumulation, speed, scaling = anchor
    found = [
        (one.accumulation, one.sequences_per_second, one.scaling)
        for one in published
        if commit in one.source
        and (one.hardware, one.nodes, one.gpus_per_node, one.phase, one.precision, one.micro_batch)
        == (hardware, nodes, gpus, phase, precision, micro)
    ]
    assert (accumulation, speed, scaling) in found


def test_every_number_of_the_sources_is_there(published: tuple[Published, ...]) -> None:
    counts = Counter((one.source.split()[1], one.hardware) for one in published)
    assert counts == {
        ("a07d20a1", A100): 32, ("a07d20a1", "DGX-1 32G"): 8,
        ("78ec6802", A40): 12, ("78ec6802", "DGX-2 32G"): 16, ("78ec6802", "DGX-2H 32G"): 10, ("78ec6802", "DGX-1 32G"): 12,
        ("78ec6802", "DGX-1 16G"): 18, ("47336035", "DGX-1 16G"): 18, ("47336035", "DGX-1 32G"): 12, ("47336035", "DGX-2 32G"): 16,
        ("47336035", "DGX-2H 32G"): 10,
    }  # fmt: skip
    assert round(sum(one.sequences_per_second for one in published), 3) == 1388456.436
    assert round(sum(one.scaling or 0 for one in published), 2) == 1164.82


def test_the_typos_are_corrected_and_noted(published: tuple[Published, ...]) -> None:
    noted = [(one.nodes, one.precision, one.micro_batch, one.accumulation) for one in published if "typo" in one.note]
    assert sorted(noted) == [
        (1, "tf32", 128, 64), (2, "tf32", 128, 32), (4, "fp16", 256, 8), (4, "tf32", 128, 16), (8, "tf32", 128, 8), (16, "tf32", 128, 4),
        (32, "tf32", 128, 2),
    ]  # fmt: skip


def test_batches_follow(published: tuple[Published, ...]) -> None:
    assert {one.seq_len for one in published if one.phase == 1} == {128}
    assert {one.seq_len for one in published if one.phase == 2} == {512}
    multi = [one for one in published if one.nodes > 1 and one.hardware == A100]
    assert {(one.phase, one.global_batch) for one in multi} == {(1, 65536), (2, 32768)}
    odd = next(one for one in published if one.micro_batch == 54 and one.gpus == 8)
    assert (odd.accumulated_batch_per_gpu, odd.global_batch) == (8154, 65232)
    assert next(one for one in published if one.accumulation is None).global_batch is None


def test_every_mistake_of_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "published.yml"
    rows = "[[1, 8, 1, 128, fp16, 16, 4, 9.5, 1], [1, 8, 3, 128, fp16, 16, 4, 9.5, 1], [1, 8], [1, 8, 1, 128, fp16, 16, 4, fast, 1]]"
    path.write_text(
        f"columns: [{', '.join(COLUMNS)}]\ntables:\n  - {{source: s, hardware: h, rows: {rows}}}\n  - {{source: s, hardwear: h, rows: []}}\n"
    )
    with pytest.raises(ConfigError) as raised:
        load_published(path)
    lines = str(raised.value).split("\n  ")
    assert [line.partition(": table ")[2][:12] for line in lines] == [
        "1 (h), row 2",
        "1 (h), row 3",
        "1 (h), row 4",
        "2 lacks the ",
        "2: unknown k",
    ]
