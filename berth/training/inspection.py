"""What ``berth-ckpt`` says of checkpoints, as values: a survey without opening files, checks and descriptions of opened ones.

torch is imported where a file is opened, so that a survey answers at once on a login node.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from berth.errors import CheckpointError
from berth.training.manifest import MANIFEST, Entry, checkpoint_files, read_manifest


@dataclasses.dataclass(frozen=True)
class Row:
    """One checkpoint as :func:`survey` finds it; ``None`` stands for what a damaged file does not tell. ``modified``: seconds since 1970."""

    file: str
    state: str
    step: int | None = None
    phase: int | None = None
    phase_step: int | None = None
    samples: int | None = None
    bytes: int | None = None
    modified: float | None = None
    pinned: bool = False
    final: bool = False


def survey(path: Path) -> list[Row]:
    """A folder's checkpoints, or the one in a file, by phase and step; damaged ones last."""
    folder = path if path.is_dir() else path.parent
    known = {entry.file: entry for entry in read_manifest(folder).entries}
    files = {file.name: file for file in (checkpoint_files(folder) if path.is_dir() else [path])}
    rows = []
    for name, file in files.items():
        with contextlib.suppress(FileNotFoundError):  # a run has rotated it out meanwhile
            rows.append(_row(file, known.get(name)))
    if path.is_dir():
        rows += [_listed(entry, "missing") for name, entry in known.items() if name not in files]
    return sorted(rows, key=lambda row: (row.phase is None, row.phase or 0, row.step or 0, row.file))


def _listed(entry: Entry, state: str, **found: Any) -> Row:
    same = {field.name: getattr(entry, field.name) for field in dataclasses.fields(Row) if hasattr(entry, field.name)}
    return Row(**{**same, "state": state, **found})


def _row(file: Path, entry: Entry | None) -> Row:
    status = file.stat()
    found: dict[str, Any] = {"bytes": status.st_size, "modified": status.st_mtime}
    if entry is not None:
        state = "wrong size" if entry.bytes != status.st_size else "listed" if entry.sha256 else "unlisted"
        return _listed(entry, state, **found)
    from berth.training.checkpoint_file import UnreadableError, entry_of_file  # torch: only for files that nobody else knows

    try:
        return _listed(entry_of_file(file), "unlisted", **found)
    except UnreadableError:
        return Row(file.name, "unreadable", **found)
    except CheckpointError:
        return Row(file.name, "damaged", **found)


def check(path: Path, entry: Entry | None, finite: bool) -> str:
    """Read one file back whole; what it holds, in words. Raises :class:`CheckpointError` for one that must not be used."""
    from berth.training.checkpoint_file import check_bytes, read_checkpoint, tensors_of

    check_bytes(path, entry)
    tensors = dict(tensors_of(read_checkpoint(path, mmap=True)))
    how = "SHA-256" if entry is not None and entry.sha256 else f"no checksum in {MANIFEST}, CRCs"
    if not finite:
        return f"{how} and {len(tensors)} tensors"
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        names = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        raise CheckpointError(f"checkpoint {path} holds nan or inf in {names}")
    return f"{how} and {len(tensors)} tensors, all finite"


def sound(folder: Path) -> tuple[list[Entry], list[str]]:
    """Checkpoints of a folder up to its newest good one, oldest first, and the names of the damaged or unreadable ones after it.

    Raises :class:`CheckpointError` when none is good: then every file may be the one that can be mended.
    """
    from berth.training.checkpoint import CheckpointStore

    store = CheckpointStore(folder)
    entries = store.entries()
    damaged = list(store.unusable)
    while entries:
        try:
            check(folder / entries[-1].file, entries[-1], finite=False)
            return entries, damaged
        except CheckpointError:
            damaged.append(entries.pop().file)
    raise CheckpointError(f"no checkpoint in {folder} is good ({', '.join(damaged) or 'there is none'}); nothing was deleted")


def describe(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run, and counts of what it holds; ``None`` for what its berth did not write down."""
    from berth.training.checkpoint_file import read_checkpoint, tensors_of

    payload = read_checkpoint(path, mmap=True)
    model, optimizer = dict(tensors_of(payload.get("model"))), payload.get("optimizer") or {}
    moments = dict(tensors_of(optimizer.get("state")))
    steps = {int(group["step"]) for group in optimizer.get("param_groups", []) if "step" in group}
    steps |= {int(tensor) for name, tensor in moments.items() if name.endswith(".step")}
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        **{key: payload.get(key) for key in ("step", "phase", "phase_step", "final", "samples", "skipped", "consecutive_skips")},
        **{key: payload.get(key) for key in ("world_size", "sharding", "rollbacks", "objective", "do_lower_case")},
        "model_tensors": len(model),
        "parameters": sum({tensor.data_ptr(): tensor.numel() for tensor in model.values()}.values()),  # tied ones once
        "optimizer_tensors": len(moments),
        "optimizer_step": sorted(steps),
        "scaler": payload.get("scaler"),
        "identity": payload.get("identity"),
    }
