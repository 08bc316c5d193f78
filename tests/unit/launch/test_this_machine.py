"""Which platform of the matrix the GPUs of this machine are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from berth.errors import ConfigError
from berth.launch.matrix import load_matrix
from berth.launch.this_machine import Gpu, find_platform, visible_gpus

PLATFORMS = load_matrix().platforms


@pytest.mark.parametrize(
    ("name", "mebibytes", "count", "platform"),
    [
        ("Tesla V100-SXM2-16GB", 16160, 8, "dgx1-16g"),
        ("Tesla V100-SXM2-32GB", 32510, 8, "dgx1-32g"),
        ("Tesla V100-SXM3-32GB", 32510, 16, "dgx2"),
        ("Tesla V100-SXM3-32GB-H", 32510, 16, "dgx2h"),
        ("Tesla V100-PCIE-16GB", 16160, 4, "nc24rs_v3"),
        ("NVIDIA A100-SXM4-40GB", 40536, 8, "dgx-a100-40g"),
        ("NVIDIA A100-SXM4-80GB", 81920, 8, "dgx-a100-80g"),
        ("NVIDIA A100 80GB PCIe", 81920, 2, "dgx-a100-80g"),
        ("NVIDIA H100 80GB HBM3", 81559, 8, "dgx-h100"),
        ("NVIDIA H200", 143771, 1, "dgx-h200"),
        ("NVIDIA GeForce RTX 3090", 24576, 2, "workstation"),
        ("NVIDIA A10", 23028, 1, "workstation"),
    ],
)
def test_known_cards(name, mebibytes, count, platform):
    assert find_platform([Gpu(name, mebibytes / 1024)] * count, PLATFORMS) == platform


def test_no_gpu_is_local():
    assert find_platform([], PLATFORMS) == "local"


@pytest.mark.parametrize(
    "gpus",
    [
        [Gpu("NVIDIA L4", 44.9)],
        [Gpu("NVIDIA A100-SXM4-40GB", 80.0)] * 17,
        [Gpu("NVIDIA A100-SXM4-40GB", 39.6), Gpu("NVIDIA H100 80GB HBM3", 79.6)],
        [Gpu("Tesla V100-SXM2-32GB", 31.7)] * 17,
    ],
)
def test_unknown_or_mixed_cards_are_an_error(gpus):
    with pytest.raises(ConfigError, match=rf"^{len(gpus)} GPUs \({gpus[0].name} with .* say --platform; valid: dgx1-16g, .*local$"):
        find_platform(gpus, PLATFORMS)


@pytest.mark.parametrize(("visible", "count"), [(None, 3), ("", 0), ("0", 1), ("1, 2", 2), ("GPU-aa,GPU-bb,GPU-cc,GPU-dd", 3)])
def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch, visible, count):
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        "#!/bin/sh\n[ \"$*\" = '--query-gpu=name,memory.total --format=csv,noheader,nounits' ] || exit 1\n"
        "for _ in 1 2 3; do echo 'NVIDIA A100-SXM4-80GB, 81920'; done\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert visible_gpus(environment) == [Gpu("NVIDIA A100-SXM4-80GB", 80.0)] * count


def test_without_a_driver_there_is_none(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({}) == []
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_gpus({}) == []
