"""An output folder that is a finished export or recognisably not one, and never replaces files that are not its own.

The files are written into a temporary folder inside the target (so a mount point or a link to a folder can be the target),
synced, and moved to their names one by one. Meanwhile :data:`UNFINISHED` stands in the place of :data:`MARKER`, so that a run
killed in between leaves a folder that the next one recognises and replaces.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import safetensors

from berth.errors import BerthError, CheckpointError, ConfigError
from berth.files import atomic_open, fsync_directory, read_json, write_json

MARKER = "berth_export.json"
"""In every finished export: what it was made from and which files it wrote."""
UNFINISHED = "berth_export.unfinished.json"
"""Instead of :data:`MARKER` while the files are moved to their names: the files of the earlier export and of the new one."""

_PARTIAL = "*.partial-export"
_NOBODYS = {"lost+found"}  # in every new file system


@contextlib.contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """Open ``path`` for bytes; it appears when complete. A full disk, whatever the writer makes of it, is a CheckpointError."""
    try:
        with atomic_open(path, "wb") as handle:
            yield handle
    except BerthError:
        raise
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: BaseException) -> CheckpointError:
    """One line with the path and the reason."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return CheckpointError(f"{path} cannot be written: {reason.splitlines()[0][:160]}")


def check_replaceable(folder: Path) -> None:
    """Raise :class:`ConfigError` unless ``folder`` is absent, empty, or an export (finished or not) with nothing else in it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"--output_dir {folder} is a file; name a folder")
    present = {path.name for path in folder.iterdir() if not path.match(_PARTIAL)} - _NOBODYS
    if not present:
        return
    ours = _own_files(folder)
    if not ours:
        raise ConfigError(f"--output_dir {folder} is not empty and not an earlier export; name a new folder")
    foreign = sorted(present - ours)
    if foreign:
        raise ConfigError(f"--output_dir {folder} holds {foreign[0]}, which no export wrote; move it or name a new folder")


def _own_files(folder: Path) -> set[str]:
    """What exports wrote into ``folder``, their markers included; empty when there is no marker."""
    ours: set[str] = set()
    for marker in (MARKER, UNFINISHED):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            ours |= {MARKER, UNFINISHED, *(str(name) for name in read_json(folder / marker)["files"])}
    return ours


@contextlib.contextmanager
def export_folder(folder: Path, about: dict[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder; on success its files take their place in ``folder``, on any error it is removed.

    ``about`` goes into :data:`MARKER` together with the names of the files. Everything is synced before the first rename.
    Raises :class:`ConfigError` (see :func:`check_replaceable`) and :class:`CheckpointError` when the disk is full.
    """
    folder = folder.resolve()
    check_replaceable(folder)
    new = not folder.exists()
    temporary = folder / f".{os.getpid()}.partial-export"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(_PARTIAL):
                if not _alive(leftover):
                    shutil.rmtree(leftover)
            temporary.mkdir()
            yield temporary
            names = sorted(path.name for path in temporary.iterdir())
            write_json(temporary / MARKER, {**about, "files": names})
            _sync(temporary)
            _publish(temporary, folder, names)
        except OSError as error:
            raise cannot_write(folder, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # refused when something is in it
        raise


def _publish(temporary: Path, folder: Path, names: list[str]) -> None:
    """Move the files into place. :data:`UNFINISHED` is there before the first moves, :data:`MARKER` after the last."""
    earlier = _own_files(folder) - {MARKER, UNFINISHED}
    write_json(temporary / UNFINISHED, {"files": sorted(earlier.union(names))})
    os.replace(temporary / UNFINISHED, folder / UNFINISHED)
    (folder / MARKER).unlink(missing_ok=True)
    fsync_directory(folder)
    for name in names:
        os.replace(temporary / name, folder / name)
    for name in earlier.difference(names):
        (folder / Path(name).name).unlink(missing_ok=True)
    fsync_directory(folder)
    os.replace(temporary / MARKER, folder / MARKER)
    temporary.rmdir()
    (folder / UNFINISHED).unlink()
    fsync_directory(folder)


def _alive(leftover: Path) -> bool:
    """Whether the process that made a temporary folder still runs; this one's own, from an earlier life, does not count."""
    number = leftover.name.split(".")[1]
    if not number.isdigit() or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    fsync_directory(folder)
