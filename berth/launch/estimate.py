"""What a row will need, before it runs: memory of a GPU, hours of a phase. Model configuration, recipe and row in, estimates out.

Estimates, not promises: memory is an upper bound (attention kernels that never store the score matrix need less), hours are those of
published throughput, which is measured without evaluation and start-up. GB are 10^9 bytes; GPUs have a little more than their name says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from berth.flops import step_flops
from berth.launch.matrix import SIXTEEN_BIT, Matrix, PhaseRecipe, Platform, Published, Row

RESERVE_GB = 1.0  # CUDA context, NCCL buffers, cuBLAS workspaces, fragmentation
VOCABULARY_MULTIPLE = 8  # run_pretraining.py pads the vocabulary to this


@dataclass(frozen=True)
class MemoryEstimate:
    """GB of one GPU in training, by what they are for."""

    parameters_gb: float
    activations_gb: float
    logits_gb: float
    reserve_gb: float

    @property
    def total_gb(self) -> float:
        """All parts."""
        return self.parameters_gb + self.activations_gb + self.logits_gb + self.reserve_gb

    def __str__(self) -> str:
        return (
            f"{self.total_gb:.1f} GB (parameters, gradients and moments {self.parameters_gb:.1f}, activations {self.activations_gb:.1f}, "
            f"logits {self.logits_gb:.1f}, reserve {self.reserve_gb:.1f})"
        )


@dataclass(frozen=True)
class TimeEstimate:
    """Hours a phase takes at ``sequences_per_second`` (all GPUs together), and what that number rests on."""

    hours: float
    sequences_per_second: float
    basis: str


def parameter_count(config: Mapping[str, Any]) -> int:
    """Parameters of BERT with both pretraining heads (the decoder is tied to the word embeddings), for a Hugging Face configuration."""
    hidden, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    vocabulary = _padded_vocabulary(config)
    embeddings = (vocabulary + config.get("max_position_embeddings", 512) + config.get("type_vocab_size", 2)) * hidden + 2 * hidden
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
    heads = 2 * (hidden * hidden + hidden) + 2 * hidden + vocabulary + 2 * hidden + 2  # pooler, transform + LayerNorm, bias, sentences
    return embeddings + layers * layer + heads


def bytes_a_parameter(shard: str, ranks: int, accumulation: int) -> float:
    """Bytes of value, gradient and two moments, all fp32, that a rank holds at most for a parameter (docs/numerics.md, "Sharding").

    ``zero2`` has whole values from forward to backward; with accumulation ``zero2`` and ``zero3`` have whole gradients until the last pass.
    """
    whole, shared = {"zero1": (8.0, 8.0), "zero2": (4.0, 16.0), "zero3": (0.0, 16.0)}.get(shard, (16.0, 0.0))
    gradients = 4.0 if shard in ("zero2", "zero3") and accumulation > 1 else 0.0
    return min(16.0, whole + gradients + shared / ranks)


def memory_gb(
    config: Mapping[str, Any],
    phase: PhaseRecipe,
    micro_batch: int,
    precision: str,
    checkpoint_activations: bool | None = None,
    parameter_bytes: float = 16.0,
) -> MemoryEstimate:
    """Memory of one GPU that trains ``config`` (Hugging Face's keys) with ``micro_batch`` sequences of the phase's length a pass.

    Parameters: :func:`bytes_a_parameter` (16 unsharded), 2 more for the copy of a 16-bit precision (fp8 counts as one: its copies are smaller,
    and so are the inputs that its layers keep; how much was not measured). Activations: Korthikanti et
    al. 2022, equation 1, ``s b h (34 + 5 a s / h)`` bytes a layer in 16 bits, twice that in 32; generalised to any
    inner size. With checkpointed activations (what the recipe says if ``None``) a layer keeps its input, and one layer is whole. Logits:
    those of the masked rows and their gradient.
    """
    hidden, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    length, width = phase.max_seq_length, 2 if precision in SIXTEEN_BIT else 4
    if checkpoint_activations is None:
        checkpoint_activations = bool(phase.options.get("checkpoint_activations", False))
    # 34 h at inner = 4 h: attention 11 h, two LayerNorms 4 h, feed-forward 3 h + 4 inner (2 for GELU's input, 2 for its output)
    a_layer = 18 * hidden + 4 * inner + 5 * config["num_attention_heads"] * length
    kept = layers * 2 * hidden + a_layer if checkpoint_activations else layers * a_layer
    copies = 2 if precision in SIXTEEN_BIT else 0
    return MemoryEstimate(
        parameters_gb=parameter_count(config) * (parameter_bytes + copies) / 1e9,
        activations_gb=micro_batch * length * kept * width / 2 / 1e9,
        logits_gb=micro_batch * phase.max_predictions_per_seq * _padded_vocabulary(config) * 2 * width / 1e9,
        reserve_gb=RESERVE_GB,
    )


def _padded_vocabulary(config: Mapping[str, Any]) -> int:
    return math.ceil(config["vocab_size"] / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def flops_per_sequence(config: Mapping[str, Any], length: int, masked: int) -> float:
    """Floating-point operations of one sequence's forward and backward pass, for model FLOPs utilisation.

    L real tokens and p masked ones, as :func:`berth.flops.step_flops` counts them (pooler and its classifier left out); it
    reproduces the TFLOPS DeepSpeed prints for its throughput (240.6 GFLOP for BERT-Large at length 128, 1020.5 at 512).
    """
    return step_flops(SimpleNamespace(**config), tokens=length, squares=length * length, masked=masked, pairs=0)


def training_hours(phase: PhaseRecipe, sequences_per_second: float) -> float:
    """Hours of all steps of ``phase`` at a throughput of all GPUs together."""
    return phase.sequences / sequences_per_second / 3600.0


def implied_time_to_train(phases: Mapping[int, PhaseRecipe], sequences_per_second: Mapping[int, float]) -> float:
    """Hours of all ``phases`` of a recipe at the throughput of each; what a printed time to train is checked against."""
    return sum(training_hours(phase, sequences_per_second[number]) for number, phase in phases.items())


def walltime_estimate(row: Row, matrix: Matrix) -> TimeEstimate | None:
    """Hours of a row's phase from published throughput: its own, else scaled by the number of GPUs from the nearest published row.

    Nearest: same platform before another with the same GPU, same precision before the other of 16 bits, then micro-batch, then number
    of GPUs, then the newest source. fp8 counts as 16 bits: what it saves was not published. ``None`` where nothing was published for this
    GPU, length and width: an estimate from another GPU would be a guess.
    """
    exact = matrix.published_for(row)
    if exact:
        return _at(row, exact[0].sequences_per_second, f"published for this row: {_cite(exact[0])}")
    similar = [one for one in matrix.published if _comparable(one, row, matrix.platforms)]
    if not similar:
        return None
    base = min(similar, key=lambda one: _distance(one, row))
    speed = base.sequences_per_second / base.gpus * row.world_size
    basis = f"scaled to {row.world_size} GPUs from {_cite(base)}, {base.gpus} GPUs, {base.precision}, micro-batch {base.micro_batch}"
    return _at(row, speed, basis)


def _at(row: Row, speed: float, basis: str) -> TimeEstimate:
    return TimeEstimate(training_hours(row.phase_recipe, speed), speed, basis)


def _cite(one: Published) -> str:
    return f"{one.sequences_per_second:g} sequences/s on {one.nodes} x {one.hardware} ({one.source})"


def _comparable(one: Published, row: Row, platforms: Mapping[str, Platform]) -> bool:
    same_gpu = {name for platform in platforms.values() if platform.gpu == row.platform.gpu for name in platform.published_as}
    known = one.hardware in row.platform.published_as or (row.platform.gpu != "" and one.hardware in same_gpu)
    both_short = one.precision in SIXTEEN_BIT and row.precision in SIXTEEN_BIT
    return known and one.seq_len == row.phase_recipe.max_seq_length and (one.precision == row.precision or both_short)


def _distance(one: Published, row: Row) -> tuple[bool, bool, float, float]:
    return (
        one.hardware not in row.platform.published_as,
        one.precision != row.precision,
        abs(math.log(one.micro_batch / row.micro_batch)),
        abs(math.log(one.gpus / row.world_size)),
    )
