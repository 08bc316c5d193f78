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
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any

TEMPORARY_SUFFIX = ".partial"


_SAMPLE = 1 << 16  # bytes of a sample of sampled_digest
WORD_SECONDS = 10.0  # of waiting for a lock until somebody is told
LEFTOVER_SECONDS = 24 * 3600.0  # a temporary file of another host untouched for so long has no writer


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32] or "host"


def _temporary_name(path: Path, process: int | None = None) -> Path:
    """``.<name>.<host>.<pid>.partial``: the writer can be looked up by whoever finds the file later."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid() if process is None else process}{TEMPORARY_SUFFIX}")


def discard_temporary(path: str | os.PathLike[str], process: int) -> None:
    """Delete what ``process`` (of this host, and ended) was writing to become ``path``."""
    _temporary_name(Path(path), process).unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's process, or no process number at all
        return True
    try:  # ended, but nobody asked for its exit code: orphans in containers stay like this
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return True


def remove_dead_leftovers(folder: str | os.PathLike[str], wanted: Callable[[str], bool]) -> list[str]:
    """Delete temporary files in ``folder`` whose final name is ``wanted`` and whose writer is dead; returns their names.

    Dead is a process of this host that does not exist; of another host (or of an unknown writer), no write for a day.
    """
    removed = []
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    for name in names:
        writer = _writer_of(name, wanted)
        if writer is None:
            continue
        path, (host, process) = Path(folder) / name, writer
        with contextlib.suppress(OSError):
            dead = not _alive(process) if host == _host() else time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
            if dead:
                path.unlink()
                removed.append(name)
    return removed


def _writer_of(name: str, wanted: Callable[[str], bool]) -> tuple[str | None, int] | None:
    """Host (if known) and process that write the temporary file ``name``; ``None`` when it is none, or is not to become a ``wanted`` name."""
    found = re.fullmatch(r"\.(.+?)(?:\.([A-Za-z0-9-]+))?\.(\d+)" + re.escape(TEMPORARY_SUFFIX), name, re.DOTALL)
    if found is None:
        return None
    final, host, process = found.groups()
    if wanted(final):
        return host, int(process)
    if host is not None and wanted(f"{final}.{host}"):  # ".<name with a dot>.<pid>.partial" of an older version
        return None, int(process)
    return None


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

    For writers that open the file themselves (h5py). Parent folders are made, temporary files that a killed writer of
    ``path`` left are removed. Raises whatever the body or the file system raises (``OSError`` on a full disk, with ``path``
    as its file name); ``path`` then still holds what it held before.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_dead_leftovers(final.parent, lambda name: name == final.name)
    temporary = _temporary_name(final)
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, final)
        fsync_directory(final.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary), temporary):
            error.filename = str(final)
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


def printable_name(name: str) -> str:
    """A file name as text that can be written as UTF-8: bytes that are none become ``\\xe1``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def sampled_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's size and of 64 KiB at its beginning, middle and end: tells files apart where reading all would take too long."""
    found = hashlib.sha256()
    with open(path, "rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        found.update(f"{size} ".encode())
        for at in (0, size // 2, max(0, size - _SAMPLE)):
            handle.seek(at)
            found.update(handle.read(_SAMPLE))
    return found.hexdigest()


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


def remove_leftovers(folder: str | os.PathLike[str], wanted: Callable[[str], bool]) -> list[str]:
    """Delete the temporary files in ``folder`` whose final name is ``wanted``, whoever wrote them: for the holder of the folder's lock, once
    nobody else writes such files. Their names are returned."""
    removed = [name for name in sorted(os.listdir(folder)) if _writer_of(name, wanted) is not None]
    for name in removed:
        (Path(folder) / name).unlink(missing_ok=True)
    return removed


class FolderLock:
    """An exclusive lock on a folder, held until the process ends or :meth:`release`: two runs never write to one folder.

    The operating system drops the lock when its holder dies, however it dies (of a lost node: when the file server notices, which may
    take minutes). File systems without locks are left unlocked. The file says who took the lock last.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str = ".lock") -> None:
        self.path = Path(folder) / name
        self._descriptor: int | None = None

    def acquire(self, wait_seconds: float, waiting: Callable[[str], None] | None = None) -> bool:
        """Take the lock, trying for ``wait_seconds``; ``False`` when somebody else still holds it then.

        ``waiting`` is called once, after ``WORD_SECONDS``, with who holds it in words.
        """
        if self._descriptor is not None:
            return True
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        start = monotonic()
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # this file system has no locks
                    os.close(descriptor)
                    return True
                if monotonic() - start >= wait_seconds:
                    os.close(descriptor)
                    return False
                if waiting is not None and monotonic() - start >= WORD_SECONDS:
                    waiting(self.holder())
                    waiting = None
                sleep(0.1)
            else:
                self._descriptor = descriptor
                with contextlib.suppress(OSError):  # a full disk: only people miss it
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return True

    def holder(self) -> str:
        """Who took the lock last, in words."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace").strip()[:200] or "an unknown process"
        except OSError:
            return "an unknown process"

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
