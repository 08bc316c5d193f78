"""What a run is (its identity), where it stands (its state), and the seeds that follow from both."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np

from berth.errors import CheckpointError, ConfigError
from berth.training.options import Options

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class RunState:
    """Where a run stands. ``offset`` is the phase-1 end step in phase 2, 0 in phase 1.

    ``phase_step`` counts optimizer updates that were made; ``samples`` is the number of stream samples consumed, including those of skipped
    steps; ``skipped`` counts steps whose gradient was not finite; ``rollbacks`` how often the run went back to a checkpoint because of those.
    """

    phase: int
    offset: int = 0
    phase_step: int = 0
    samples: int = 0
    skipped: int = 0
    consecutive_skips: int = 0
    rollbacks: int = 0

    @property
    def step(self) -> int:
        """The global step: what a checkpoint is named after and the log counts."""
        return self.offset + self.phase_step

    def advance(self, global_batch: int, skipped: bool) -> None:
        """Account for one step: its samples are consumed either way, the step counts only if the update was made."""
        self.samples += global_batch
        if skipped:
            self.skipped += 1
            self.consecutive_skips += 1
        else:
            self.phase_step += 1
            self.consecutive_skips = 0


def step_seed(seed: int, phase: int, rank: int, samples: int) -> int:
    """Seed of torch's generator for one step of one rank: dropout then depends on the place in the run, not on its history."""
    words = np.random.SeedSequence((seed, phase, rank, samples)).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def identity(options: Options, model_config: dict[str, Any], world_size: int, data_fingerprint: str, vocab_sha256: str) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run; plain values, kept in every checkpoint.

    World size and accumulation are free as long as their product, the global batch, is the same.
    """
    return {
        "seed": options.seed,
        "global_batch": options.train_batch_size * world_size,
        "objective": options.objective,
        "optimizer": options.optimizer,
        "learning_rate": options.learning_rate,
        "warmup_proportion": options.warmup_proportion,
        "lr_schedule": options.lr_schedule,
        "lr_exponential": [options.lr_warmup_degree, options.lr_decay_rate, options.lr_decay_steps, options.lr_offset],
        "max_steps": options.max_steps,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "precision": options.precision,
        "loss_scale": options.loss_scale,
        "reduce_dtype": options.reduce_dtype,
        "model_config": model_config,
        "data": data_fingerprint,
        "vocab_sha256": vocab_sha256,
    }


_ACROSS_PHASES = ("optimizer", "vocab_sha256")
_NAMES = {"data": "rules of dynamic masks or the training records", "model_config": "model configuration", "vocab_sha256": "vocabulary"}


def check_identity(saved: dict[str, Any], current: dict[str, Any], *, same_phase: bool, force: bool, file: str) -> None:
    """Compare a checkpoint's identity with this run's.

    Between phases only the model, the objective, the optimizer and the vocabulary must agree. Raises :class:`ConfigError` that lists
    every difference; with ``force`` they are logged instead, except a different model, which cannot be loaded.
    """
    if saved.get("model_config") != current["model_config"]:
        before, now = saved.get("model_config") or {}, current["model_config"]
        keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        detail = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys)
        raise CheckpointError(f"{file} belongs to another model ({detail}); use its --config_file")
    if saved.get("objective") != current["objective"]:
        raise CheckpointError(
            f"{file} was trained with --objective {saved.get('objective')}, not {current['objective']}; its model has other heads"
        )
    keys_compared = current.keys() if same_phase else _ACROSS_PHASES
    different = [key for key in keys_compared if saved.get(key) != current[key] and not _unknown(key, saved, current)]
    if not different:
        return
    lines = [_difference(key, saved.get(key), current[key]) for key in different]
    if force:
        for line in lines:
            logger.warning("--force_resume overrides: %s", line)
        return
    raise ConfigError(
        f"this is not the run that wrote {file}:\n  "
        + "\n  ".join(lines)
        + "\nuse the same values, another --output_dir, or --force_resume"
    )


def _unknown(key: str, saved: dict[str, Any], current: dict[str, Any]) -> bool:
    """A vocabulary that one side does not know cannot be compared, nor what an older berth did not write down."""
    if key in ("loss_scale", "reduce_dtype") and key not in saved:
        return True
    return key == "vocab_sha256" and not (saved.get(key) and current[key])


def _difference(key: str, before: Any, now: Any) -> str:
    if key in _NAMES:
        return f"the {_NAMES[key]} changed"
    return f"{key} was {before}, is {now}"
