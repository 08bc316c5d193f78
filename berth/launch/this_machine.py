"""Which GPUs this machine has, and of which platform of the matrix they are.

In: what ``nvidia-smi`` prints. Out: the name of a platform. A login node asks nothing of this: only runs on this very machine do.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Mapping, Sequence

from berth.errors import ConfigError
from berth.launch.recipes import Platform
from berth.launch.yamlfile import suggestion

MEMORY_TOLERANCE = 0.1  # a 16 GB card says 15.8 GiB, a 24 GB one 22.5


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What ``nvidia-smi`` says of a card."""

    name: str
    memory_gib: float


def visible_gpus(environment: Mapping[str, str]) -> list[Gpu]:
    """The GPUs ``nvidia-smi`` lists, as many as CUDA_VISIBLE_DEVICES leaves; none where there is no such command."""
    command = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = [re.fullmatch(r"(.+), (\d+)", line.strip()) for line in answer.splitlines()]
    gpus = [Gpu(match[1], int(match[2]) / 1024) for match in found if match]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return gpus if visible is None else gpus[: len([one for one in visible.split(",") if one.strip()])]


def find_platform(gpus: Sequence[Gpu], platforms: Mapping[str, Platform]) -> str:
    """The platform these GPUs are of; without any, the first without GPUs.

    Family and memory must agree; of several the one with the very name, then with as many GPUs, then the first of the file. Raises
    :class:`ConfigError` when there is none.
    """
    if not gpus:
        return next(name for name, one in platforms.items() if one.device == "cpu")
    plain = re.sub(r"^(NVIDIA|Tesla) ", "", gpus[0].name)

    def fits(one: Platform) -> bool:
        family = re.match(r"[A-Z]+\d+", one.gpu)
        near = abs(gpus[0].memory_gib - one.gpu_memory_gb) <= MEMORY_TOLERANCE * one.gpu_memory_gb
        alike = family is None or re.search(rf"\b{family[0]}\b", plain) is not None
        return one.device == "cuda" and near and alike and len(gpus) <= one.ranks_per_node and gpus.count(gpus[0]) == len(gpus)

    fitting = {name: one for name, one in platforms.items() if fits(one)}
    if not fitting:
        seen = ", ".join(dict.fromkeys(f"{one.name} with {one.memory_gib:.0f} GiB" for one in gpus))
        raise ConfigError(
            f"{len(gpus)} GPUs ({seen}) are of no platform in slurm/configurations.yml; say --platform{suggestion('', platforms)}"
        )
    return min(fitting, key=lambda name: (fitting[name].gpu != plain, fitting[name].ranks_per_node != len(gpus)))
