"""One checkpoint file: hashed on its way out, checked and read on its way in.

Reading is ``torch.load(weights_only=True)``, which refuses anything but tensors and plain values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from berth.errors import CheckpointError
from berth.files import sha256_file
from berth.training.manifest import FORMAT, FORMAT_VERSION, MANIFEST, Entry, size_text

T = TypeVar("T")


_FULL = (errno.ENOSPC, errno.EDQUOT)
_NONSENSE = (None, errno.EINVAL, errno.EOVERFLOW)  # what damaged offsets in a file lead to


logger = logging.getLogger(__name__)


class UnreadableError(CheckpointError):
    """The file system did not give a file's bytes: nothing is known of them, and another time they may be had."""


class HashingWriter:
    """A write-only binary file that hashes what passes through (``torch.save`` writes its archive front to back).

    ``error`` is what the disk said: torch makes a RuntimeError about positions in a zip of it.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, piece: bytes) -> int:
        self.digest.update(piece)
        self.size += len(piece)
        try:
            return self._handle.write(piece)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._handle.flush()


def check_bytes(path: Path, entry: Entry | None) -> None:
    """Raise :class:`CheckpointError` unless the file holds the bytes that were written; :class:`UnreadableError` where that cannot be told.

    Held against size and SHA-256 of its ``entry``; without an entry, or a checksum in it, against the CRCs in the archive itself.
    """
    try:
        if entry is None or not entry.sha256:
            _check_archive(path)
            return
        size = path.stat().st_size
        if size != entry.bytes:
            raise CheckpointError(f"checkpoint {path} has {size} bytes, {entry.bytes} were written: it is truncated or damaged")
        if sha256_file(path) != entry.sha256:
            raise CheckpointError(f"checkpoint {path} does not match its checksum in {MANIFEST}: it is damaged")
    except OSError as error:
        raise refused(path, error) from error


def refused(path: str | os.PathLike[str], error: OSError) -> CheckpointError:
    """What an ``OSError`` of reading ``path`` means."""
    if isinstance(error, FileNotFoundError):
        return UnreadableError(f"checkpoint {path} does not exist")
    if error.errno in _NONSENSE:
        return CheckpointError(f"checkpoint {path} cannot be read ({first_line(error)}): it is truncated or damaged")
    return UnreadableError(f"checkpoint {path} cannot be read ({error.strerror}); that says nothing about what is in it")


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # zipfile has one for every field that may be damaged: of names, versions, flags, sizes
        raise CheckpointError(f"checkpoint {path} cannot be read ({first_line(error)}): it is truncated or damaged") from error
    if bad is not None:
        raise CheckpointError(f"checkpoint {path} is damaged: {bad} in it does not match its CRC")


def read_checkpoint(path: str | os.PathLike[str], map_location: str = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Load a file of berth's format with ``weights_only=True``; with ``mmap`` a tensor is read when it is looked at.

    Raises :class:`CheckpointError` when it is truncated or something else, :class:`UnreadableError` when it is missing or the disk refuses.
    """
    try:
        payload = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except OSError as error:
        raise refused(path, error) from error
    except (RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({first_line(error)}): it is truncated or damaged") from error
    except Exception as error:  # the unpickler refuses anything but tensors and plain values
        raise CheckpointError(f"{path} is not a berth checkpoint ({first_line(error)})") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a berth checkpoint; other weights go through --init_checkpoint")
    if payload.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {payload.get('format_version')}, this berth reads {FORMAT_VERSION}")
    return payload


def entry_of_file(path: Path) -> Entry:
    """What a manifest would say of a file, without a checksum, from the file alone; raises as :func:`read_checkpoint`."""
    payload = read_checkpoint(path, map_location="meta")
    final = bool(payload.get("final"))
    try:
        return Entry(
            path.name, payload["step"], payload["phase"], payload["phase_step"], payload["samples"],
            "", path.stat().st_size, pinned=final, final=final,
        )  # fmt: skip
    except KeyError as error:
        raise CheckpointError(f"{path} is not a berth checkpoint: it has no {error}") from error
    except OSError as error:
        raise refused(path, error) from error


def listed(path: Path, entry: Entry) -> Entry:
    """``entry`` of a file that no manifest knew, with its checksum; raises as :func:`check_bytes`."""
    check_bytes(path, entry)
    try:
        return dataclasses.replace(entry, sha256=sha256_file(path))
    except OSError as error:
        raise refused(path, error) from error


def tensors_of(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in nested dicts, lists and tuples, with their keys joined by dots."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors_of(value, f"{name}.{key}" if name else str(key))


def stored_bytes(payload: dict[str, Any]) -> int:
    """What the tensors take in a file: whole storages, those that tensors share once."""
    storages = (tensor.untyped_storage() for _, tensor in tensors_of(payload))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def patiently(read: Callable[[], T], pauses: Sequence[float]) -> T:
    """``read()``, again after each of the ``pauses`` (seconds) where the file system refuses; what does not exist is not waited for."""
    for pause in pauses:
        try:
            return read()
        except UnreadableError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise
            logger.warning("%s; the next try is in %g s", error, pause)
        time.sleep(pause)
    return read()


def why_refused(error: BaseException, folder: Path, payload: dict[str, Any]) -> str:
    """Why writing ``payload`` failed; where space is what is missing, how much."""
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return first_line(error)
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
        return f"{error.strerror}: {size_text(stored_bytes(payload))} are needed, {size_text(free)} are free"
    return str(error.strerror)


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
