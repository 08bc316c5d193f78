"""An output folder that appears complete or not at all, and never replaces files that are not its own."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from berth.errors import ConfigError
from berth.files import fsync_directory, read_json, write_json

MARKER = "berth_export.json"
"""In every export: what it was made from and which files it wrote."""


def check_replaceable(folder: Path) -> None:
    """Raise :class:`ConfigError` unless ``folder`` is absent, empty, or an export with nothing else in it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"--output_dir {folder} is a file; name a folder")
    present = {path.name for path in folder.iterdir()}
    if not present:
        return
    try:
        ours = {MARKER, *read_json(folder / MARKER)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"--output_dir {folder} is not empty and not an earlier export; name a new folder") from None
    foreign = sorted(present - ours)
    if foreign:
        raise ConfigError(f"--output_dir {folder} holds {foreign[0]}, which no export wrote; move it or name a new folder")


@contextlib.contextmanager
def export_folder(folder: Path, about: dict[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``; on success it takes its place, on any error it is removed.

    ``about`` goes into :data:`MARKER` together with the names of the files. Everything is synced before the rename. See
    :func:`check_replaceable` for what may be replaced (``ConfigError`` otherwise).
    """
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial-export")
    previous = folder.with_name(f".{folder.name}.{os.getpid()}.previous-export")
    try:
        temporary.mkdir()
        yield temporary
        write_json(temporary / MARKER, {**about, "files": sorted(path.name for path in temporary.iterdir())})
        _sync(temporary)
        if folder.exists():
            folder.rename(previous)
        try:
            temporary.rename(folder)
        except OSError:
            if previous.exists():
                previous.rename(folder)
            raise
        fsync_directory(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    fsync_directory(folder)
