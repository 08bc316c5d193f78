"""What a folder of checkpoints holds, as far as names and ``manifest.json`` tell: no torch, so login nodes read it at once.

``manifest.json`` is what berth goes by: step, phase, cursor, size and SHA-256 of every checkpoint. ``latest`` repeats the name of the newest
one in a line of text, for people and scripts, as DeepSpeed does; berth never reads it. Rejected: a symbolic link (not every shared
file system has them, and copies of the folder turn it into a second file).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from berth.files import atomic_open, read_json, write_json

FORMAT = "berth-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
_NAME = re.compile(r"^ckpt_(\d+)\.pt$")
_ASIDE = re.compile(r"^superseded_\d+_ckpt_\d+\.pt$")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint as the manifest knows it. ``sha256`` is '' for a file found without an entry.

    ``step`` is the number in the name (phase 2 counts on from the phase-1 end), ``phase_step`` counts from the phase's start, ``samples``
    is the data cursor: how many samples of the stream this phase has consumed. ``final`` marks the end of its phase.
    """

    file: str
    step: int
    phase: int
    phase_step: int
    samples: int
    sha256: str
    bytes: int
    pinned: bool
    final: bool

    @property
    def place(self) -> tuple[int, int]:
        """(phase, step): the order in which a run writes."""
        return self.phase, self.step


@dataclasses.dataclass(frozen=True)
class Manifest:
    """``manifest.json``: its entries in the order written, and the model configuration (``None`` when it has none)."""

    entries: tuple[Entry, ...] = ()
    config: Any = None


def read_manifest(folder: Path) -> Manifest:
    """What ``folder`` has written about itself. A manifest that is missing is empty; so is a damaged one, with a warning. One that the
    disk refuses to give is an ``OSError``: its checksums count."""
    path = folder / MANIFEST
    try:
        content = read_json(path)
        return Manifest(tuple(_entry(item) for item in content["checkpoints"]), content.get("config"))
    except (FileNotFoundError, NotADirectoryError):
        return Manifest()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is unreadable (%r); going by the checkpoint files alone", path, error)
        return Manifest()


def _entry(item: dict[str, Any]) -> Entry:
    """An entry of the manifest; keys of a later berth are passed over. ``TypeError`` when a value is not of its type."""
    fields = dataclasses.fields(Entry)
    entry = Entry(**{field.name: item[field.name] for field in fields})
    wrong = [field.name for field in fields if type(getattr(entry, field.name)).__name__ != field.type]
    if wrong:
        raise TypeError(f"{entry.file}: {', '.join(wrong)} of the wrong type")
    return entry


def write_manifest(folder: Path, entries: Sequence[Entry], config: Any) -> None:
    """Replace ``manifest.json``."""
    checkpoints = [dataclasses.asdict(entry) for entry in entries]
    write_json(
        folder / MANIFEST, {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config, "checkpoints": checkpoints}
    )  # fmt: skip


def read_latest(folder: Path) -> str | None:
    """The name in ``latest``, ``None`` when there is none."""
    try:
        return (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def point_latest(folder: Path, name: str | None) -> None:
    """Make ``latest`` say ``name``; ``None`` removes it.

    A folder that refuses costs a warning, not the checkpoint: the line is for people. It is removed then, if possible, rather than left
    wrong.
    """
    if read_latest(folder) == name:
        return
    try:
        if name is None:
            (folder / LATEST).unlink(missing_ok=True)
            return
        with atomic_open(folder / LATEST) as handle:
            handle.write(f"{name}\n")
    except OSError as error:
        logger.warning("%s could not be brought up to date (%s); the newest checkpoint is %s", folder / LATEST, error, name)
        with contextlib.suppress(OSError):
            (folder / LATEST).unlink(missing_ok=True)


def checkpoint_files(folder: Path) -> list[Path]:
    """Files named ``ckpt_<step>.pt``, by step."""
    found = [(int(match[1]), name) for name in os.listdir(folder) if (match := _NAME.match(name))]
    return [folder / name for _, name in sorted(found)]


def own_name(name: str) -> bool:
    """Whether only the run that holds the folder's lock writes a file of this name."""
    return name in (MANIFEST, LATEST) or _NAME.match(name) is not None


def superseded_files(folder: Path) -> list[Path]:
    """Checkpoints that were set aside because the run went back before them, or because they are damaged."""
    return sorted(folder / name for name in os.listdir(folder) if _ASIDE.match(name))


def set_aside(path: Path) -> None:
    """Rename a checkpoint, if it is there, to ``superseded_<n>_<name>``: nothing resumes from it, its owner can look at it."""
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"superseded_{number}_{path.name}")).exists():
        number += 1
    path.rename(aside)
    logger.warning("%s is not part of this run any more; it is now %s", path, aside.name)


def rotated_out(entries: Sequence[Entry], keep: int) -> list[Entry]:
    """Which of ``entries`` (oldest first) fall out of the newest ``keep``. Pinned ones never do and do not count; the newest stays."""
    unpinned = [entry for entry in entries if not entry.pinned]
    return [entry for entry in unpinned[: max(0, len(unpinned) - keep)] if entry is not entries[-1]]


def size_text(size: float) -> str:
    """Bytes for people, with three digits: ``5.38 GB``."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.3g} {units[0]}"
