"""Checkpoints that are complete or absent, known by checksum, and found again.

``ckpt_<step>.pt`` in the output folder beside ``manifest.json`` and ``latest``. A checkpoint is written to a temporary name, hashed on
the way, fsynced, renamed, and only then entered into the manifest; then ``latest`` names it. Killed before the rename: nothing
happened. Killed between rename and manifest: the file is complete, and is accepted if it loads. A file that does not match its
checksum, or does not load, is skipped with a warning and the one before it is used.

The newest ``keep`` checkpoints stay, and pinned ones (phase ends) for ever; the count goes over restarts because it is taken
from the folder, not from this process. :mod:`berth.training.saving` writes beside the training loop.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from berth.errors import CheckpointError
from berth.files import FolderLock, atomic_open, discard_temporary, remove_leftovers
from berth.training.checkpoint_file import HashingWriter, check_bytes, entry_of_file, first_line, listed, read_checkpoint, stored_bytes
from berth.training.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    Entry,
    checkpoint_files,
    point_latest,
    read_manifest,
    rotated_out,
    size_text,
    write_manifest,
)

__all__ = ["FORMAT", "FORMAT_VERSION", "MANIFEST", "CheckpointStore", "Entry", "read_checkpoint"]

LOCK_WAIT_SECONDS = 60.0
SPACE_SHARE = 1.01  # of the tensors' bytes: the archive's directory, the manifest
_FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one output folder. Only rank 0 may call the writing methods.

    One thread may be in :meth:`save` while another calls the reading methods.

    Args:
        folder: the ``--output_dir``.
        keep: how many unpinned checkpoints stay.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self._damaged: set[str] = set()
        self._lock = FolderLock(self.folder)
        self._changing = threading.RLock()  # held while names, manifest and _damaged change, not while a checkpoint is written

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
        """Make the folder, lock it, remove what a killed writer left, bring manifest and ``latest`` up to date, check that it can be written to.

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
        with self._changing:
            self._reconcile()

    def _reconcile(self) -> None:
        """Enter what the manifest lacks: a checkpoint whose writer was killed after the rename, or all of them when the manifest was lost.

        Nothing is deleted here: what falls out of the newest ``keep`` may be what --resume_step goes back to.
        """
        manifest, entries = read_manifest(self.folder), []
        for entry in self.entries():
            try:
                entries.append(entry if entry.sha256 else listed(self.folder / entry.file, entry))
            except CheckpointError as error:
                logger.warning("%s; it is passed over", error)
                self._damaged.add(entry.file)
        if set(entries) != set(manifest.entries):
            config = manifest.config
            if config is None and entries:
                config = read_checkpoint(self.folder / entries[-1].file, map_location="meta").get("config")
            write_manifest(self.folder, entries, config)
        self._point(entries)

    def entries(self) -> list[Entry]:
        """All checkpoints of the folder that may be good, oldest first (phase, then step).

        Files without a manifest entry are opened to learn their phase; damaged ones are left out.
        """
        if not self.folder.is_dir():
            return []
        with self._changing:
            known = {entry.file: entry for entry in read_manifest(self.folder).entries}
            paths = [path for path in checkpoint_files(self.folder) if path.name not in self._damaged]
            found = [known.get(path.name) or self._entry_of_unlisted(path) for path in paths]
            return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.place)

    def save(self, payload: dict[str, Any], *, step: int, phase: int, phase_step: int, samples: int, final: bool) -> Path:
        """Write ``payload`` as ``ckpt_<step>.pt`` and rotate.

        Raises :class:`CheckpointError` when the disk is full or refuses; what was there before is then untouched. Where the tensors
        cannot fit, nothing is begun.
        """
        path = self.folder / f"ckpt_{step}.pt"
        payload = {
            "format": FORMAT, "format_version": FORMAT_VERSION,
            "step": step, "phase": phase, "phase_step": phase_step, "samples": samples, "final": final, **payload,
        }  # fmt: skip
        writer = None
        try:
            if shutil.disk_usage(self.folder).free < SPACE_SHARE * stored_bytes(payload):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with self._changing:
                others = self._make_way(phase, step, path.name)
            with atomic_open(path, "wb") as handle:
                writer = HashingWriter(handle)
                torch.save(payload, writer)  # type: ignore[arg-type]
            entry = Entry(path.name, step, phase, phase_step, samples, writer.digest.hexdigest(), writer.size, pinned=final, final=final)
            with self._changing:
                self._enter(entry, payload.get("config"), others)
        except CheckpointError:
            raise
        except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            with contextlib.suppress(OSError):  # a disk that comes and goes may have refused the writer's own attempt
                discard_temporary(path, os.getpid())
            reason = self._reason((writer and writer.error) or error, payload)
            kept = self.entries()
            intact = f"; {kept[-1].file} is intact" if kept else ""
            raise CheckpointError(
                f"checkpoint {path} could not be written ({reason}){intact}. Free space or choose another --output_dir"
            ) from error
        return path

    def _reason(self, error: BaseException, payload: dict[str, Any]) -> str:
        """Why a write failed; where space is what is missing, how much."""
        if not isinstance(error, OSError) or error.errno not in _FULL:
            return first_line(error)
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.folder).free
            return f"{error.strerror}: {size_text(stored_bytes(payload))} are needed, {size_text(free)} are free"
        return str(error.strerror)

    def pass_over(self, entry: Entry, reason: CheckpointError) -> None:
        """Take a damaged checkpoint out of consideration; :meth:`entries` no longer lists it, ``latest`` names the one before it.

        Raises :class:`CheckpointError` when nothing good is left, so that a damaged folder never becomes a fresh start.
        """
        with self._changing:
            self._damaged.add(entry.file)
            left = self.entries()
            self._point(left)
        if not left:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged (the last: {reason}); restore one from a backup or start in an empty "
                "--output_dir"
            )

    def load(self, entry: Entry) -> dict[str, Any]:
        """Read one checkpoint onto the CPU, checksum first.

        Raises :class:`CheckpointError` when it is damaged or not of berth's format.
        """
        path = self.folder / entry.file
        check_bytes(path, entry)
        return read_checkpoint(path)

    def _entry_of_unlisted(self, path: Path) -> Entry | None:
        try:
            return entry_of_file(path)
        except CheckpointError as error:
            logger.warning("%s; it is not in %s either and is passed over", error, MANIFEST)
            self._damaged.add(path.name)
            return None

    def _make_way(self, phase: int, step: int, name: str) -> list[Entry]:
        """Before a checkpoint is written: whatever must not be resumed from once it exists leaves the folder's view; what stays.

        That is checkpoints ahead of it (the run went back), damaged ones, and the manifest's entry for an older file of this name. In this
        order a kill at any point leaves either the old newest checkpoint or the new one. A pinned file of another phase stays.
        """
        entries = self.entries()
        pinned = [old for old in entries if old.file == name and old.phase != phase]
        if pinned:
            raise CheckpointError(
                f"{self.folder / name} is the end of phase {pinned[0].phase} and is not overwritten; choose another --output_dir"
            )
        stay = [old for old in entries if old.place <= (phase, step)]
        others = [old for old in stay if old.file != name]
        aside = [*(old.file for old in entries if old not in stay), *self._damaged]
        if aside or others != stay:
            self._point(stay)
            self._set_aside(aside)
            write_manifest(self.folder, others, read_manifest(self.folder).config)
        return others

    def _enter(self, entry: Entry, config: Any, others: Sequence[Entry]) -> None:
        """Write the manifest and ``latest``, then delete what falls out of the newest ``keep``."""
        entries = [*others, entry]
        dropped = rotated_out(entries, self.keep)
        write_manifest(self.folder, [old for old in entries if old not in dropped], config)
        self._point(entries)
        for item in dropped:
            (self.folder / item.file).unlink(missing_ok=True)

    def _point(self, entries: Sequence[Entry]) -> None:
        point_latest(self.folder, entries[-1].file if entries else None)

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
