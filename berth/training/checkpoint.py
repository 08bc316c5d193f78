"""Checkpoints that are complete or absent, known by checksum, and found again.

``ckpt_<step>.pt`` in the output folder beside ``manifest.json``. A checkpoint is written to a temporary name, hashed on the way,
fsynced, renamed, and only then entered into the manifest. Killed before the rename: nothing happened. Killed between rename and
manifest: the file is complete, and is accepted if it loads. A file that does not match its checksum, or does not load, is
skipped with a warning and the one before it is used.

The newest ``keep`` checkpoints stay, and pinned ones (phase ends) for ever; the count goes over restarts because it is taken
from the folder, not from this process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from berth.errors import CheckpointError
from berth.files import FolderLock, atomic_open, read_json, remove_leftovers, sha256_file, write_json

FORMAT = "berth-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LOCK_WAIT_SECONDS = 60.0
_NAME = re.compile(r"^ckpt_(\d+)\.pt$")

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


class _HashingWriter:
    """A write-only binary file that hashes what passes through (``torch.save`` writes its archive front to back)."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes) -> int:
        self.digest.update(piece)
        self.size += len(piece)
        return self._handle.write(piece)

    def flush(self) -> None:
        self._handle.flush()


class CheckpointStore:
    """The checkpoints of one output folder. Only rank 0 may call the writing methods.

    Args:
        folder: the ``--output_dir``.
        keep: how many unpinned checkpoints stay.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self._damaged: set[str] = set()
        self._lock = FolderLock(self.folder)

    def lock(self) -> None:
        """Make sure that this process is the only one that writes to the folder, if it exists; the lock ends with the process.

        Raises :class:`CheckpointError` when another run still holds it after ``LOCK_WAIT_SECONDS``.
        """
        if self.folder.is_dir() and os.access(self.folder, os.W_OK) and not self._lock.acquire(LOCK_WAIT_SECONDS):
            raise CheckpointError(f"another run is writing to {self.folder}; wait for it or stop it, or choose another --output_dir")

    @property
    def unusable(self) -> list[str]:
        """Names of checkpoint files that are damaged or not berth's, as far as :meth:`entries` has found them so."""
        return sorted(self._damaged)

    def prepare(self) -> None:
        """Make the folder, lock it, remove what a killed writer left, check that it can be written to.

        Raises :class:`CheckpointError` when it cannot.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock()
            for name in remove_leftovers(self.folder):
                logger.info("removed %s, left by an interrupted run", self.folder / name)
        except OSError as error:
            raise CheckpointError(f"output folder {self.folder} cannot be used: {error.strerror}") from error
        if not os.access(self.folder, os.W_OK):
            raise CheckpointError(f"output folder {self.folder} is not writable; choose another --output_dir")

    def entries(self) -> list[Entry]:
        """All checkpoints of the folder that may be good, oldest first (phase, then step).

        Files without a manifest entry are opened to learn their phase; damaged ones are left out.
        """
        if not self.folder.is_dir():
            return []
        known = {entry.file: entry for entry in self._manifest_entries()}
        found: list[Entry] = []
        for path in sorted(self.folder.iterdir()):
            if not _NAME.match(path.name) or path.name in self._damaged:
                continue
            entry = known.get(path.name) or self._entry_of_unlisted(path)
            if entry is not None:
                found.append(entry)
        return sorted(found, key=lambda entry: (entry.phase, entry.step))

    def save(self, payload: dict[str, Any], *, step: int, phase: int, phase_step: int, samples: int, final: bool) -> Path:
        """Write ``payload`` as ``ckpt_<step>.pt`` and rotate.

        Raises :class:`CheckpointError` when the disk is full or refuses; what was there before is then untouched.
        """
        path = self.folder / f"ckpt_{step}.pt"
        payload = {
            "format": FORMAT, "format_version": FORMAT_VERSION,
            "step": step, "phase": phase, "phase_step": phase_step, "samples": samples, "final": final, **payload,
        }  # fmt: skip
        try:
            self._make_way(phase, step, path.name)
            with atomic_open(path, "wb") as handle:
                writer = _HashingWriter(handle)
                torch.save(payload, writer)  # type: ignore[arg-type]
            entry = Entry(path.name, step, phase, phase_step, samples, writer.digest.hexdigest(), writer.size, pinned=final, final=final)
            self._enter(entry, payload.get("config"))
        except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            kept = self.entries()
            intact = f"; {kept[-1].file} is intact" if kept else ""
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"checkpoint {path} could not be written ({error}){intact}. Free space or choose another --output_dir, then run "
                "again with --resume_from_checkpoint"
            ) from error
        return path

    def pass_over(self, entry: Entry, reason: CheckpointError) -> None:
        """Take a damaged checkpoint out of consideration; :meth:`entries` no longer lists it.

        Raises :class:`CheckpointError` when nothing good is left, so that a damaged folder never becomes a fresh start.
        """
        self._damaged.add(entry.file)
        if not self.entries():
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged (the last: {reason}); restore one from a backup or start in an empty "
                "--output_dir"
            )

    def load(self, entry: Entry) -> dict[str, Any]:
        """Read one checkpoint onto the CPU, checksum first.

        Raises :class:`CheckpointError` when it is damaged or not of berth's format.
        """
        path = self.folder / entry.file
        if entry.sha256 and path.stat().st_size != entry.bytes:
            raise CheckpointError(f"checkpoint {path} has {path.stat().st_size} bytes, {entry.bytes} were written: it is truncated")
        if entry.sha256 and sha256_file(path) != entry.sha256:
            raise CheckpointError(f"checkpoint {path} does not match its checksum in {MANIFEST}: it is damaged")
        return read_checkpoint(path)

    def _manifest_entries(self) -> list[Entry]:
        path = self.folder / MANIFEST
        if not path.exists():
            return []
        try:
            names = {field.name for field in dataclasses.fields(Entry)}
            return [Entry(**{key: value for key, value in item.items() if key in names}) for item in read_json(path)["checkpoints"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is unreadable (%s); going by the checkpoint files alone", path, error)
            return []

    def _entry_of_unlisted(self, path: Path) -> Entry | None:
        try:
            payload = read_checkpoint(path, map_location="meta")
        except CheckpointError as error:
            logger.warning("%s; it is not in %s either and is passed over", error, MANIFEST)
            self._damaged.add(path.name)
            return None
        final = bool(payload.get("final"))
        return Entry(
            path.name, payload["step"], payload["phase"], payload["phase_step"], payload["samples"],
            "", path.stat().st_size, pinned=final, final=final,
        )  # fmt: skip

    def _make_way(self, phase: int, step: int, name: str) -> None:
        """Before a checkpoint is written: whatever must not be resumed from once it exists leaves the folder's view.

        That is checkpoints ahead of it (the run went back), damaged ones, and the manifest's entry for an older file of this name. In this
        order a kill at any point leaves either the old newest checkpoint or the new one. A pinned file of another phase stays.
        """
        entries = self.entries()
        pinned = [old for old in entries if old.file == name and old.phase != phase]
        if pinned:
            raise CheckpointError(
                f"{self.folder / name} is the end of phase {pinned[0].phase} and is not overwritten; choose another --output_dir"
            )
        ahead = [old for old in entries if (old.phase, old.step) > (phase, step)]
        names = [*(old.file for old in ahead), *self._damaged]
        if names or any(old.file == name for old in entries):
            self._set_aside(names)
            self._write_manifest([old for old in entries if old.file != name and old not in ahead])

    def _enter(self, entry: Entry, config: Any) -> None:
        """Add to the manifest, then delete what falls out of the newest ``keep``."""
        entries = [*(old for old in self.entries() if old.file != entry.file), entry]
        unpinned = [item for item in entries if not item.pinned and item.file != entry.file]
        room = self.keep if entry.pinned else self.keep - 1
        dropped = unpinned[: max(0, len(unpinned) - room)]
        kept = [item for item in entries if item not in dropped]
        self._write_manifest(kept, config)
        for item in dropped:
            (self.folder / item.file).unlink(missing_ok=True)

    def _set_aside(self, names: Sequence[str]) -> None:
        """Rename checkpoints that are no longer of this run: it went back before them (``--resume_step``), or they are damaged.

        They stay on disk as ``superseded_<n>_<name>`` for their owner to look at, and are never resumed from.
        """
        for name in names:
            path = self.folder / name
            if path.exists():
                number = 1
                while (aside := path.with_name(f"superseded_{number}_{name}")).exists():
                    number += 1
                path.rename(aside)
                logger.warning("%s is not part of this run any more; it is now %s", path, aside.name)
        self._damaged.difference_update(names)

    def _write_manifest(self, entries: list[Entry], config: Any = None) -> None:
        write_json(
            self.folder / MANIFEST,
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "config": config,
                "checkpoints": [dataclasses.asdict(entry) for entry in entries],
            },
        )


def read_checkpoint(path: str | os.PathLike[str], map_location: str = "cpu") -> dict[str, Any]:
    """Load a file of berth's format with ``weights_only=True``.

    Raises :class:`CheckpointError` when it is missing, truncated, or something else.
    """
    try:
        payload = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist") from error
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({_first_line(error)}): it is truncated or damaged") from error
    except Exception as error:  # the unpickler refuses anything but tensors and plain values
        raise CheckpointError(f"{path} is not a berth checkpoint ({_first_line(error)})") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a berth checkpoint; other weights go through --init_checkpoint")
    if payload.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {payload.get('format_version')}, this berth reads {FORMAT_VERSION}")
    return payload


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
