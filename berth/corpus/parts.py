"""Text stages in parts: parallel, resumable, and the same bytes whatever the number of processes or interruptions.

A stage turns numbered tasks into part files. Tasks are cut from the input by its bytes alone (:func:`cut_parts`), so they do
not depend on who works on them. Every finished part is noted in a journal beside the parts, with a digest of what went in;
run again, the stage makes only parts whose input or options changed. At the end the journal becomes the manifest
``<stage>.json``, parts of an earlier, longer run are removed, and a single output file is put together if one is wanted.

Manifest: ``format``, ``format_version``, ``stage``, ``complete``, ``options``, ``inputs`` (digest over all parts), ``parts`` (name ->
``digest`` of its input and options, ``bytes`` and ``sha256`` of the output, ``counts``, ``seconds``), ``counts`` (sums),
``seconds`` (sum over the parts, all processes).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from tqdm import tqdm

from berth.errors import DataError, LaunchError
from berth.files import FolderLock, atomic_open, read_json, remove_dead_leftovers, sha256_file, sha256_json, write_json
from berth.text.lines import read_lines
from berth.workers import map_processes

FORMAT, FORMAT_VERSION = "berth stage", 1
PART_BYTES = 16 << 20  # of input; part of the output's identity, since parts end where it says
_SEARCH_BYTES = 1 << 16


class Span(NamedTuple):
    """The bytes ``start`` to ``stop`` of one input file."""

    file: Path
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Task:
    """One part to make: its file name, what the worker needs (picklable), and a digest of the input.

    ``digest`` None: the payload is a tuple of :class:`Span` and the digest is taken of their bytes, in the worker. ``place``: where
    these bytes are from, for stages that write that down (the identifiers of documents); "" when it does not matter.
    """

    name: str
    payload: Any
    digest: str | None = None
    place: str = ""


class Worker(Protocol):
    """Makes one part; an instance of a top-level frozen dataclass (it travels to other processes)."""

    def __call__(self, payload: Any, output: IO[str]) -> Mapping[str, int]:
        """Write the part's text to ``output`` and return its counts (names -> numbers, summed over the parts)."""


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage left: summed counts, seconds of work by all processes, and how many parts were made or kept."""

    counts: dict[str, int]
    seconds: float
    made: int
    kept: int
    output: Path


# --------------------------------------------------------------------------------------------------- cutting the input


def part_name(stem: str, number: int, suffix: str = ".txt") -> str:
    """``<stem>_<number>`` with five digits at least, so that names sort as numbers do."""
    return f"{stem}_{number:05d}{suffix}"


def _skip_line(handle: IO[bytes]) -> bool:
    """Move behind the next LF (or to the end of the file); whether only white space stood before it."""
    blank = True
    while piece := handle.readline(_SEARCH_BYTES):
        blank = blank and not piece.strip()
        if piece.endswith(b"\n"):
            break
    return blank


def _next_document(file: Path, at: int, size: int, blank_line: bool) -> int:
    """The first offset behind ``at - 1`` where a line (``blank_line``: a line after a blank one) begins, or ``size``."""
    with open(file, "rb") as handle:
        handle.seek(at - 1)
        _skip_line(handle)
        was_blank = not blank_line
        while (offset := handle.tell()) < size:
            blank = _skip_line(handle) if blank_line else False
            if was_blank and not blank:
                return offset
            was_blank = blank
    return size


def cut_file(file: Path, boundary: str, part_bytes: int = PART_BYTES) -> list[Span]:
    """Cut a file where documents begin, about every ``part_bytes``: ``line`` at any line, ``blank_line`` after a blank one.

    Depends on the bytes of the file only; a document longer than ``part_bytes`` stays whole.
    """
    size = file.stat().st_size
    edges = [0]
    while edges[-1] < size:
        wanted = edges[-1] + part_bytes
        edges.append(size if wanted >= size else _next_document(file, wanted, size, boundary == "blank_line"))
    return [Span(file, start, stop) for start, stop in itertools.pairwise(edges)]


def cut_parts(files: Sequence[Path], boundary: str, stem: str, suffix: str = ".txt", part_bytes: int = PART_BYTES) -> list[Task]:
    """Tasks over ``files`` in order; payload: a tuple of :class:`Span`.

    Args:
        boundary: where a file may be cut: ``file`` (nowhere), ``line``, ``blank_line``.
        stem, suffix: names of the part files.
        part_bytes: input bytes of a part; neighbouring small files share one.
    """
    spans: list[Span] = []
    for file in files:
        size = file.stat().st_size
        spans += [Span(file, 0, size)] if boundary == "file" or size <= part_bytes else cut_file(file, boundary, part_bytes)
    groups: list[list[Span]] = []
    filled = part_bytes
    for span in spans:
        if not groups or filled + (span.stop - span.start) > part_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(span)
        filled += span.stop - span.start
    return [Task(part_name(stem, number, suffix), tuple(group)) for number, group in enumerate(groups)]


def span_lines(span: Span) -> Iterator[str]:
    """The lines of a span without their ends: strict UTF-8, any line end; errors name the file and the byte."""
    return read_lines(span.file, span.start, span.stop)


def _spans_digest(spans: Iterable[Span]) -> str:
    digest = hashlib.sha256()
    for span in spans:
        digest.update(f"{span.file.name}\n{span.stop - span.start}\n".encode("utf-8", "surrogateescape"))
        with open(span.file, "rb") as handle:
            handle.seek(span.start)
            left = span.stop - span.start
            while left:
                piece = handle.read(min(left, 1 << 20))
                if not piece:
                    raise DataError(f"{span.file} became shorter while it was being read; run again when nobody writes to it")
                digest.update(piece)
                left -= len(piece)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ running a stage


def _has_bytes(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


@dataclasses.dataclass(frozen=True)
class _Maker:
    """Runs in the worker processes: makes one part unless the journal says that it is there (or inside the joined file)."""

    folder: Path
    options_digest: str
    worker: Worker
    interrupted: bool

    def __call__(self, given: tuple[Task, Sequence[tuple[Mapping[str, Any], bool]]]) -> tuple[str, dict[str, Any], bool]:
        """``given``: the task and what earlier runs made of it: entries, each with whether it lies in the joined file."""
        task, known = given
        start = time.perf_counter()
        content = task.digest if task.digest is not None else _spans_digest(task.payload)
        digest = sha256_json([content, self.options_digest, *([task.place] if task.place else [])])
        path = self.folder / task.name
        for entry, joined in known:
            if entry["digest"] == digest and (joined or self._is_there(path, entry)):
                return task.name, dict(entry), False
        with atomic_open(path) as handle:
            counts = dict(self.worker(task.payload, handle))
        entry = {
            "digest": digest,
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
            "counts": counts,
            "seconds": round(time.perf_counter() - start, 3),
        }
        return task.name, entry, True

    def _is_there(self, path: Path, entry: Mapping[str, Any]) -> bool:
        """Whether the part is that of ``entry``. After an interruption it may be a newer one that was not yet noted."""
        return _has_bytes(path, entry["bytes"]) and (not self.interrupted or sha256_file(path) == entry.get("sha256"))


def manifest_path(output: Path, stage: str) -> Path:
    """Where the manifest of ``stage`` is: in an output folder, or beside a single output file (a name with a suffix)."""
    return output.with_name(f"{output.name}.{stage}.json") if is_single(output) else output / f"{stage}.json"


def is_single(output: Path) -> bool:
    """Whether ``output`` names one file: a name with a suffix that is not an existing folder."""
    return bool(output.suffix) and not output.is_dir()


def _entries(parts: Any) -> dict[str, dict[str, Any]]:
    needed = {"digest", "bytes", "counts"}
    found = parts.items() if isinstance(parts, dict) else []
    return {name: entry for name, entry in found if isinstance(entry, dict) and needed <= entry.keys() and Path(name).name == name}


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an earlier run; {} if there is none or it is damaged (then everything is made again)."""
    try:
        manifest = read_json(path)
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else {}


def _read_journal(path: Path) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Entries of the parts an interrupted run finished, and names of all it began (entry ``null``: not finished).

    What follows the last line end was cut off by a kill.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        return {}, set()
    begun = set[str]()
    known: dict[str, Any] = {}
    for line in lines:
        try:
            name, entry = json.loads(line)
        except (ValueError, TypeError):
            continue
        if isinstance(name, str) and name and Path(name).name == name:
            begun.add(name)
            if entry is not None:
                known[name] = entry
    return _entries(known), begun


def _joined_places(manifest: Mapping[str, Any], output: Path, interrupted: bool) -> dict[str, tuple[int, int]]:
    """Where each part lies in the joined file of a complete run: name -> (offset, bytes); {} if that file is not there.

    After an interruption the file may be newer than the manifest, so its bytes are compared.
    """
    if not manifest.get("complete") or not output.is_file() or output.stat().st_size != manifest.get("bytes"):
        return {}
    if interrupted and sha256_file(output) != manifest.get("sha256"):
        return {}
    places, offset, separator = {}, 0, len(str(manifest.get("separator", "")).encode())
    for name, entry in _entries(manifest.get("parts")).items():
        if offset and entry["bytes"]:
            offset += separator
        places[name] = (offset, int(entry["bytes"]))
        offset += int(entry["bytes"])
    return places if offset == manifest.get("bytes") else {}


def _pieces(source: Path, start: int, size: int) -> Iterator[bytes]:
    with open(source, "rb") as handle:
        handle.seek(start)
        while size:
            piece = handle.read(min(size, 1 << 20))
            if not piece:
                raise DataError(f"{source} became shorter while it was being read; run again when nobody writes to it")
            yield piece
            size -= len(piece)


def _join(output: Path, sources: Iterable[tuple[Path, int, int]], separator: str) -> str:
    """Put pieces of files (path, offset, bytes) together as one file; empty ones leave no separator. Its SHA-256."""
    digest = hashlib.sha256()
    with atomic_open(output, "wb") as target:
        empty = True
        for path, start, size in sources:
            begin = [separator.encode()] if size and not empty else []
            for piece in itertools.chain(begin, _pieces(path, start, size)):
                target.write(piece)
                digest.update(piece)
            empty = empty and not size
    return digest.hexdigest()


def run_stage(
    stage: str,
    output: Path,
    tasks: Iterable[Task],
    worker: Worker,
    options: Mapping[str, Any],
    processes: int = 1,
    *,
    total: int | None = None,
    separator: str = "",
) -> StageResult:
    """Make every part of a stage, or find it made; write the manifest.

    Args:
        stage: name of the stage; the manifest is at :func:`manifest_path`.
        output: a name with a suffix is one file (the parts are put together in order), otherwise a folder of parts.
        tasks: in order, names all different; may be a generator that reads a stream, it is consumed a few tasks ahead.
        worker: makes one part.
        options: everything beside the input that decides the bytes (JSON values): a change makes every part again.
        processes: how many work at the same time.
        total: number of tasks if known, for the progress bar.
        separator: written between the parts of a single file.

    Raises:
        LaunchError: another run works on ``output``. Otherwise what ``worker`` and the file system raise; finished parts stay.
    """
    folder = output.with_name(f".{output.name}.parts") if is_single(output) else output
    lock = FolderLock(folder, f".{stage}.lock")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if not lock.acquire(wait_seconds=2):
            raise LaunchError(f"another run of the stage {stage} is writing to {output}; wait for it, or use another output")
        if lock.path.exists():
            break
        lock.release()  # the run that was waited for has removed the folder of its parts, and the lock with it
    try:
        result = _Run(stage, output, folder, options, separator).run(tasks, worker, processes, total)
        if folder != output:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()
    if folder != output:
        with contextlib.suppress(OSError):  # network file systems keep the name of the lock until it is released
            folder.rmdir()
    return result


class _Run:
    """One locked run of a stage; see :func:`run_stage`."""

    def __init__(self, stage: str, output: Path, folder: Path, options: Mapping[str, Any], separator: str) -> None:
        self.stage, self.output, self.folder, self.options, self.separator = stage, output, folder, dict(options), separator
        self.single = folder != output
        self.options_digest = sha256_json([stage, FORMAT_VERSION, self.options])
        self.manifest, self.journal = manifest_path(output, stage), folder / f".{stage}.journal"
        self.head = {"format": FORMAT, "format_version": FORMAT_VERSION, "stage": stage}

    def run(self, tasks: Iterable[Task], worker: Worker, processes: int, total: int | None) -> StageResult:
        remove_dead_leftovers(self.folder, lambda name: True)
        interrupted = self.journal.is_file()
        before = _read_manifest(self.manifest)
        old = _entries(before.get("parts"))
        places = _joined_places(before, self.output, interrupted) if self.single else {}
        noted, begun = _read_journal(self.journal)
        if before.get("complete") and not self.single:
            write_json(self.manifest, {**before, "complete": False})

        def known(name: str) -> list[tuple[dict[str, Any], bool]]:
            found = [(noted[name], False)] if name in noted else []
            return [*found, (old[name], name in places)] if name in old else found

        order: list[str] = []
        maker = _Maker(self.folder, self.options_digest, worker, interrupted)
        entries, made = self._make(maker, tasks, known, order, processes, total)
        parts = {name: entries[name] for name in order}
        joined = {name for name in places if name in parts and parts[name] == old[name]}
        sha256 = before.get("sha256")
        unchanged = (
            self.single
            and joined == parts.keys()
            and list(places) == order
            and self.output.is_file()
            and before.get("separator") == self.separator
        )
        if self.single and not unchanged:
            sources = [
                (self.output, *places[name]) if name in joined else (self.folder / name, 0, int(parts[name]["bytes"])) for name in order
            ]
            sha256 = _join(self.output, sources, self.separator)
        elif not self.single:
            for name in (old.keys() | begun) - parts.keys():  # of an earlier run with more parts
                (self.folder / name).unlink(missing_ok=True)
        return self._finish(parts, made, sha256)

    def _make(
        self,
        maker: _Maker,
        tasks: Iterable[Task],
        known: Callable[[str], list[tuple[dict[str, Any], bool]]],
        order: list[str],
        processes: int,
        total: int | None,
    ) -> tuple[dict[str, dict[str, Any]], int]:
        entries: dict[str, dict[str, Any]] = {}
        made = 0
        with open(self.journal, "a", encoding="utf-8", newline="\n") as handle:
            if self.journal.stat().st_size:
                handle.write("\n")  # a kill may have left half a line

            def begin() -> Iterator[tuple[Task, list[tuple[dict[str, Any], bool]]]]:
                for task in _named(tasks, order):
                    handle.write(json.dumps([task.name, None]) + "\n")  # so that a part that is never noted is found again
                    handle.flush()
                    yield task, known(task.name)

            with contextlib.closing(map_processes(maker, begin(), processes)) as results:
                for name, entry, fresh in tqdm(results, total=total, desc=self.stage, unit="part", disable=not sys.stderr.isatty()):
                    entries[name] = entry
                    made += fresh
                    if fresh:
                        handle.write(json.dumps([name, entry]) + "\n")
                        handle.flush()
                        os.fsync(handle.fileno())
        return entries, made

    def _finish(self, parts: dict[str, dict[str, Any]], made: int, sha256: Any) -> StageResult:
        counts: dict[str, int] = {}
        for entry in parts.values():
            for name, value in entry["counts"].items():
                counts[name] = counts.get(name, 0) + int(value)
        seconds = round(sum(float(entry.get("seconds", 0.0)) for entry in parts.values()), 3)
        summary = {
            **self.head, "complete": True, "options": self.options,
            "inputs": sha256_json([entry["digest"] for entry in parts.values()]),
            "counts": counts, "seconds": seconds, "parts": parts,
        }  # fmt: skip
        if self.single:
            summary.update(bytes=self.output.stat().st_size, sha256=sha256, separator=self.separator)
        write_json(self.manifest, summary)
        self.journal.unlink(missing_ok=True)
        return StageResult(counts, seconds, made, len(parts) - made, self.output)


def _named(tasks: Iterable[Task], order: list[str]) -> Iterator[Task]:
    """``tasks``, their names noted in ``order`` as they are taken."""
    for task in tasks:
        assert task.name not in order[-1:] and Path(task.name).name == task.name
        order.append(task.name)
        yield task
