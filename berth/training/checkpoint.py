"""Checkpoints that are complete or absent, known by checksum, and found again.

``ckpt_<step>.pt`` in the output folder beside ``manifest.json`` and ``latest``. A checkpoint is written to a temporary name, hashed on
the way, fsynced, renamed, and only then entered into the manifest; then ``latest`` names it. Killed before the rename: nothing
happened. Killed between rename and manifest: the file is complete, and is accepted if it loads. A file that does not match its
checksum, or does not load, is skipped with a warning and the one before it is used; its entry stays until the file is set aside, so that
its checksum convicts it at every start. A file that the disk refuses to give is tried again, then skipped, and left as it is.

The newest ``keep`` checkpoints stay, and pinned ones (phase ends) for ever; the count goes over restarts because it is taken
from the folder, not from this process. :mod:`berth.training.saving` writes beside the training loop.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from berth.errors import CheckpointError
from berth.files import FolderLock, atomic_open, discard_temporary, remove_leftovers
from berth.training.checkpoint_file import (
    HashingWriter,
    UnreadableError,
    check_bytes,
    entry_of_file,
    first_line,
    listed,
    patiently,
    read_checkpoint,
    stored_bytes,
    why_refused,
)
from berth.training.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    Entry,
    checkpoint_files,
    own_name,
    point_latest,
    read_manifest,
    rotated_out,
    set_aside,
    write_manifest,
)

__all__ = ["FORMAT", "FORMAT_VERSION", "MANIFEST", "CheckpointStore", "Entry", "UnlistedError", "read_checkpoint"]

LOCK_WAIT_SECONDS = 300.0  # file servers let a lost node keep its locks for minutes
READ_PAUSES = (1.0, 3.0, 6.0)  # seconds before a read that failed is tried again
SPACE_SHARE = 1.01  # of the tensors' bytes: the archive's directory, the manifest

logger = logging.getLogger(__name__)
T = TypeVar("T")


class UnlistedError(CheckpointError):
    """A checkpoint is complete and counts, but the manifest does not say so yet."""


class CheckpointStore:
    """The checkpoints of one output folder. Only rank 0 may call the writing methods.

    One thread may be in :meth:`save` while another calls the reading methods.

    Args:
        folder: the ``--output_dir``.
        keep: how many unpinned checkpoints stay.
        pauses: seconds before each further try where the file system refuses to read.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3, pauses: Sequence[float] = READ_PAUSES) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.pauses = pauses
        self._damaged: set[str] = set()
        self._unreadable: set[str] = set()  # passed over by this process, but perhaps good: never renamed
        self._unlisted: dict[str, Entry] = {}  # written by this process, but the manifest could not be
        self._lock = FolderLock(self.folder)
        self._changing = threading.RLock()  # held while names, manifest and _damaged change, not while a checkpoint is written

    def lock(self) -> None:
        """Make sure that this process is the only one that writes to the folder, if it exists; the lock ends with the process.

        Raises :class:`CheckpointError` when another run still holds it after ``LOCK_WAIT_SECONDS``.
        """

        def waiting(holder: str) -> None:
            logger.warning("waiting up to %.0f s for the lock of %s, last taken by %s", LOCK_WAIT_SECONDS, self.folder, holder)

        if self.folder.is_dir() and os.access(self.folder, os.W_OK) and not self._lock.acquire(LOCK_WAIT_SECONDS, waiting):
            raise CheckpointError(f"another run is writing to {self.folder}; wait for it or stop it, or choose another --output_dir")

    @property
    def unusable(self) -> list[str]:
        """Names of checkpoint files that are damaged, unreadable or not berth's, as far as :meth:`entries` has found them so."""
        return sorted(self._damaged | self._unreadable)

    def prepare(self) -> None:
        """Make the folder, lock it, remove what a killed writer left, bring manifest and ``latest`` up to date, check that it can be written to.

        Raises :class:`CheckpointError` when it cannot.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock()
            for name in remove_leftovers(self.folder, own_name):
                logger.info("removed %s, left by an interrupted run", self.folder / name)
        except OSError as error:
            raise CheckpointError(f"output folder {self.folder} cannot be used: {error.strerror}") from error
        if not os.access(self.folder, os.W_OK):
            raise CheckpointError(f"output folder {self.folder} is not writable; choose another --output_dir")
        try:
            with self._changing:
                self._reconcile()
        except OSError as error:
            raise CheckpointError(f"output folder {self.folder} cannot be used: {error.strerror}") from error

    def _reconcile(self) -> None:
        """Enter what the manifest lacks: a checkpoint whose writer was killed after the rename, or all of them when the manifest was lost.

        Nothing is deleted here: what falls out of the newest ``keep`` may be what --resume_step goes back to.
        """
        entries = []
        for entry in self.entries():
            try:
                entries.append(entry if entry.sha256 else self._patiently(functools.partial(listed, self.folder / entry.file, entry)))
            except CheckpointError as error:
                logger.warning("%s; it is passed over", error)
                self._reject(entry.file, error)
        manifest, wanted = read_manifest(self.folder), [*entries, *self._passed_over()]
        if set(wanted) != set(manifest.entries):
            config = manifest.config
            if config is None and entries:
                config = self._patiently(lambda: read_checkpoint(self.folder / entries[-1].file, map_location="meta")).get("config")
            try:
                self._write_manifest(wanted, config)
            except OSError as error:
                logger.warning("%s could not be brought up to date (%s); the next start tries again", self.folder / MANIFEST, error)
        self._point(entries)

    def entries(self) -> list[Entry]:
        """All checkpoints of the folder that may be good, oldest first (phase, then step).

        Files without a manifest entry are opened to learn their phase; damaged and unreadable ones are left out. Raises
        :class:`CheckpointError` when the folder itself cannot be read.
        """
        return self._patiently(self._list)

    def _list(self) -> list[Entry]:
        with self._changing:
            try:
                known = {**{entry.file: entry for entry in read_manifest(self.folder).entries}, **self._unlisted}
                paths = [path for path in checkpoint_files(self.folder) if path.name not in self._damaged | self._unreadable]
            except (FileNotFoundError, NotADirectoryError):
                return []
            except OSError as error:
                raise UnreadableError(f"output folder {self.folder} cannot be read ({error.strerror})") from error
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
            reason = why_refused((writer and writer.error) or error, self.folder, payload)
            raise CheckpointError(
                f"checkpoint {path} could not be written ({reason}){self._intact()}. Free space or choose another --output_dir"
            ) from error
        return path

    def _intact(self) -> str:
        """What a failed write has left, for its message; nothing when the folder does not answer."""
        kept: list[Entry] = []
        with contextlib.suppress(OSError, CheckpointError):
            kept = self._list()
        return f"; {kept[-1].file} is intact" if kept else ""

    def pass_over(self, entry: Entry, reason: CheckpointError) -> None:
        """Take a checkpoint that :meth:`load` refused out of consideration; :meth:`entries` no longer lists it, ``latest`` names the one before it.

        One that is damaged is set aside by the next :meth:`save`; one that could not be read stays as it is, for the next start.

        Raises :class:`CheckpointError` when nothing good is left, so that a damaged folder never becomes a fresh start.
        """
        with self._changing:
            self._reject(entry.file, reason)
            left = self.entries()
            self._point(left)
        if not left and self._unreadable:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used now; {', '.join(sorted(self._unreadable))} may be good, but cannot be read (the last: "
                f"{reason}); see to the file system and run again"
            )
        if not left:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged (the last: {reason}); restore one from a backup or start in an empty "
                "--output_dir"
            )

    def load(self, entry: Entry) -> dict[str, Any]:
        """Read one checkpoint onto the CPU, checksum first.

        Raises :class:`CheckpointError` when it is damaged or not of berth's format, :class:`UnreadableError` when the disk refuses at every
        try.
        """
        path = self.folder / entry.file

        def read() -> dict[str, Any]:
            check_bytes(path, entry)
            return read_checkpoint(path)

        return self._patiently(read)

    def _patiently(self, read: Callable[[], T]) -> T:
        return patiently(read, self.pauses)

    def _reject(self, name: str, reason: CheckpointError) -> None:
        (self._unreadable if isinstance(reason, UnreadableError) else self._damaged).add(name)

    def _entry_of_unlisted(self, path: Path) -> Entry | None:
        try:
            return self._patiently(lambda: entry_of_file(path))
        except CheckpointError as error:
            logger.warning("%s; it is not in %s either and is passed over", error, MANIFEST)
            self._reject(path.name, error)
            return None

    def _passed_over(self) -> list[Entry]:
        """Manifest entries of files that are there but not resumed from: without them a file would be taken for one that never had any."""
        there = {path.name for path in checkpoint_files(self.folder)} & (self._damaged | self._unreadable)
        return [entry for entry in read_manifest(self.folder).entries if entry.file in there]

    def _write_manifest(self, entries: Sequence[Entry], config: Any) -> None:
        write_manifest(self.folder, sorted(entries, key=lambda entry: entry.place), config)
        self._unlisted.clear()

    def _make_way(self, phase: int, step: int, name: str) -> list[Entry]:
        """Before a checkpoint is written: whatever must not be resumed from once it exists leaves the folder's view; what stays.

        That is checkpoints ahead of it (the run went back), damaged ones, and the manifest's entry for an older file of this name. In this
        order a kill at any point leaves either the old newest checkpoint or the new one. A pinned file of another phase stays.
        """
        entries = self.entries()
        unreadable = [old for old in self._passed_over() if old.file in self._unreadable]
        pinned = [old for old in [*entries, *unreadable] if old.file == name and old.phase != phase]
        if pinned:
            raise CheckpointError(
                f"{self.folder / name} is the end of phase {pinned[0].phase} and is not overwritten; choose another --output_dir"
            )
        stay = [old for old in entries if old.place <= (phase, step)]
        others = [old for old in stay if old.file != name]
        aside = [*(old.file for old in entries if old not in stay), *self._damaged]
        unreadable_others = [old for old in unreadable if old.file != name]
        if aside or others != stay or unreadable_others != unreadable:
            self._point(stay)
            self._set_aside(aside)
            self._unlisted.pop(name, None)
            self._write_manifest([*others, *unreadable_others], read_manifest(self.folder).config)
        return others

    def _enter(self, entry: Entry, config: Any, others: Sequence[Entry]) -> None:
        """Write the manifest and ``latest``, then delete what falls out of the newest ``keep``.

        Raises :class:`UnlistedError` when the manifest is refused.
        """
        entries = [*others, entry]
        dropped = rotated_out(entries, self.keep)
        self._unreadable.discard(entry.file)
        try:
            self._write_manifest([*(old for old in entries if old not in dropped), *self._passed_over()], config)
        except OSError as error:
            self._unlisted[entry.file] = entry
            raise UnlistedError(
                f"checkpoint {self.folder / entry.file} is complete but not listed, because {MANIFEST} could not be written "
                f"({first_line(error)}); the next save or start lists it. Free space or choose another --output_dir"
            ) from error
        self._point(entries)
        for item in dropped:
            try:
                (self.folder / item.file).unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s could not be deleted (%s)", self.folder / item.file, error.strerror)

    def _point(self, entries: Sequence[Entry]) -> None:
        point_latest(self.folder, entries[-1].file if entries else None)

    def _set_aside(self, names: Sequence[str]) -> None:
        """Rename checkpoints that are no longer of this run: it went back before them (``--resume_step``), or they are damaged.

        They stay on disk as ``superseded_<n>_<name>`` for their owner to look at, and are never resumed from.
        """
        for name in names:
            set_aside(self.folder / name)
            self._unlisted.pop(name, None)
        self._damaged.difference_update(names)
