"""Files that are either complete or absent: atomic writes, checksums, JSON.

Every writer of berth goes through :func:`atomic_path` or :func:`atomic_open`: data goes to a temporary name in the same
folder, is flushed to the disk and renamed, so a reader (or a run after a crash) never sees half a file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any

TEMPORARY_SUFFIX = ".partial"


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")


def fsync_directory(path: Path) -> None:
    """Make a rename in ``path`` durable. File systems that cannot sync a directory are left alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; on success fsync and rename it there, on any error remove it.

    For writers that open the file themselves (h5py). Parent folders are made. Raises whatever the body or the
    file system raises (``OSError`` on a full disk); ``path`` then still holds what it held before.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(final)
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, final)
        fsync_directory(final.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open ``path`` for writing (text is UTF-8 with ``\\n``); it appears under its name only when complete."""
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_open mode must be 'w' or 'wb', not {mode!r}")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    with atomic_path(path) as temporary, open(temporary, mode, **text) as handle:
        yield handle
        handle.flush()
        os.fsync(handle.fileno())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_open(path) as handle:
        json.dump(value, handle, indent=2, ensure_ascii=False)
        handle.write("\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON; ``json.JSONDecodeError`` and ``OSError`` pass through for the caller to name the option."""
    with open(path, encoding="utf-8") as handle:
        return json.load(handle)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value; the same for equal values whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def remove_leftovers(folder: str | os.PathLike[str]) -> list[str]:
    """Delete the temporary files a killed writer left in ``folder``; their names are returned."""
    removed = []
    for path in sorted(Path(folder).glob(f".*{TEMPORARY_SUFFIX}")):
        path.unlink(missing_ok=True)
        removed.append(path.name)
    return removed


class FolderLock:
    """An exclusive lock on a folder, held until the process ends or :meth:`release`: two runs never write to one folder.

    The operating system drops the lock when its holder dies, however it dies. File systems without locks are left unlocked.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str = ".lock") -> None:
        self.path = Path(folder) / name
        self._descriptor: int | None = None

    def acquire(self, wait_seconds: float) -> bool:
        """Take the lock, trying for ``wait_seconds``; ``False`` when somebody else still holds it then."""
        if self._descriptor is not None:
            return True
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        end = monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # this file system has no locks
                    os.close(descriptor)
                    return True
                if monotonic() >= end:
                    os.close(descriptor)
                    return False
                sleep(0.1)
            else:
                self._descriptor = descriptor
                return True

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
