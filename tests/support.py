"""What several tests need: synthetic records, a tiny configuration, and the scripts run as a user runs them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from berth.launch.plan import option_words
from berth.runlog import read_steps

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 96
SEQ_LENGTH = 32
PREDICTIONS = 5

TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
}


def write_records(path: Path, rows: int, seed: int, *, vocab_size: int = VOCAB_SIZE, length: int = SEQ_LENGTH, **attributes: str) -> None:
    """A records file of random sentences in the NVIDIA schema: ids from 5 on, [CLS] 2, [SEP] 3, [MASK] 4, lengths from half to full."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((rows, length), np.int32)
    mask, segments = np.zeros((rows, length), np.int8), np.zeros((rows, length), np.int8)
    positions, labels = np.zeros((rows, PREDICTIONS), np.int32), np.zeros((rows, PREDICTIONS), np.int32)
    for row in range(rows):
        size = int(rng.integers(length // 2, length + 1))
        ids[row, :size] = 5 + rng.zipf(1.4, size) % (vocab_size - 5)
        ids[row, 0], ids[row, size // 2], ids[row, size - 1] = 2, 3, 3
        mask[row, :size] = 1
        segments[row, size // 2 + 1 : size] = 1
        candidates = [at for at in range(1, size - 1) if at != size // 2]
        chosen = np.sort(rng.choice(candidates, min(PREDICTIONS, max(1, round(size * 0.15))), replace=False))
        positions[row, : len(chosen)] = chosen
        labels[row, : len(chosen)] = ids[row, chosen]
        ids[row, chosen] = 4
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as handle:
        for name, data in {
            "input_ids": ids,
            "input_mask": mask,
            "segment_ids": segments,
            "masked_lm_positions": positions,
            "masked_lm_ids": labels,
            "next_sentence_labels": rng.integers(0, 2, rows).astype(np.int8),
        }.items():
            handle.create_dataset(name, data=data, compression="gzip")
        handle.attrs.update(attributes)


def make_project(folder: Path, **config: object) -> Path:
    """``records/`` (two training files of 90 and 70 rows, one test file of 40) and ``config.json`` in ``folder``; returns it."""
    for name, rows, seed in (("a_training_0", 90, 0), ("a_training_1", 70, 1), ("a_test_0", 40, 2)):
        write_records(folder / "records" / f"{name}.hdf5", rows, seed)
    (folder / "config.json").write_text(json.dumps({**TINY, **config}), encoding="utf-8")
    return folder


def environment() -> dict[str, str]:
    """One thread a process, so that results are bitwise repeatable and processes side by side do not fight."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def run_script(script: str, *arguments: object, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run one of the project's scripts to its end; stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *(str(argument) for argument in arguments)],
        capture_output=True, text=True, timeout=timeout, env=environment(), cwd=cwd,
    )  # fmt: skip


def pretraining_arguments(project: Path, output: str = "out", **changes: object) -> list[str]:
    """A command line for ``run_pretraining.py`` on :func:`make_project`'s folder; ``changes`` replace or add options (True = a switch)."""
    options: dict[str, object] = {
        "input_dir": project / "records",
        "config_file": project / "config.json",
        "output_dir": project / output,
        "train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_steps": 24,
        "learning_rate": 1e-2,
        "warmup_proportion": 0.1,
        "num_steps_per_checkpoint": 5,
        "tensorboard_dir": "none",
        "device": "cpu",
        **changes,
    }
    return option_words(options)


def free_port() -> int:
    """A port nobody listens on at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(project: Path, processes: int, output: str, **changes: object) -> list[subprocess.Popen[str]]:
    """Several processes under torchrun's variables, joined through a free port."""
    port = free_port()
    return [start_rank(project, rank, processes, port, output, **changes) for rank in range(processes)]


def start_rank(
    project: Path, rank: int, processes: int, port: int, output: str, *, root: Path = ROOT, variables: Mapping[str, str] | None = None,
    **changes: object,
) -> subprocess.Popen[str]:  # fmt: skip
    """One of ``processes``, run from the checkout at ``root``, with ``variables`` besides torchrun's."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, str(root / "run_pretraining.py"), *pretraining_arguments(project, output, **changes)],
        stderr=subprocess.PIPE, text=True, env={**environment(), **{key: str(value) for key, value in place.items()}, **(variables or {})},
    )  # fmt: skip


def finish(running: list[subprocess.Popen[str]], expect: int | None = 0, timeout: float = 200) -> list[str]:
    """Wait for all; what each said on standard error. All must end with ``expect``, if given."""
    errors = [process.communicate(timeout=timeout)[1] for process in running]
    codes = [process.returncode for process in running]
    assert expect is None or codes == [expect] * len(running), f"{codes}\n" + "\n".join(errors)
    return errors


def wait_for_step(log: Path, step: int, process: subprocess.Popen[str], timeout: float = 120) -> None:
    """Until the run log of ``process`` holds ``step``."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        if log.exists() and step in read_steps(log):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} did not come: {process.stderr.read() if process.stderr else ''}")
