"""Stage ``download``: named sources, resumed and verified; on a machine without network, what to place where.

In: a list of sources (``data/sources.yaml``). Out: the files, each with ``<file>.json``: url, size, sha256, what it was verified against,
time. A file that has such a record (same size and modification time, or the same sha256) is never fetched again. A file somebody placed by hand
is verified and taken.

While it comes a file is ``<file>.download``, with the server's validator in ``<file>.download.json``; an interrupted transfer goes on where
it stopped if the server still has the same file (``Range`` with ``If-Range``, answered by 206), and begins anew if not. A download
with a wrong checksum is removed (nothing in it can be used, and a resumed run would only verify it again); a placed file with a wrong
checksum is left alone.

Dumps are pinned by a date: ``latest`` means another file every month, and nobody can repeat such a run.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import yaml
from tqdm import tqdm

from berth.errors import ConfigError, DataError, LaunchError
from berth.files import FolderLock, atomic_open, fsync_directory, read_json, write_json

KINDS = ("sha256", "sha1", "md5")  # the strongest that is given is used
SCHEMES = ("http", "https", "file")
PARTIAL = ".download"
RETRIES = 5
TIMEOUT_SECONDS = 60.0
_BLOCK = 1 << 20
_LONGEST_LIST = 16 << 20
_LINE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Remote:
    """One file to fetch.

    Args:
        file: its name here.
        url: where it is.
        kind, checksum: how it is verified (one of :data:`KINDS`, hex); or
        checksums_url: a list of checksums of ``kind`` beside it.
        size: bytes, if known.
    """

    file: str
    url: str
    kind: str
    checksum: str | None = None
    checksums_url: str | None = None
    size: int | None = None

    def instructions(self, folder: Path) -> str:
        """What to do by hand, for a machine without network."""
        path = (folder / self.file).resolve()
        if self.checksum:
            return f"fetch {self.url} elsewhere and place it as {path} ({self.kind} {self.checksum})"
        assert self.checksums_url is not None
        list_path = (folder / _list_name(self.checksums_url)).resolve()
        return f"fetch {self.url} elsewhere and place it as {path}, and its {self.kind} list {self.checksums_url} as {list_path}"


class Unreachable(DataError):
    """The server cannot be reached or does not answer; trying elsewhere or later may help."""


# ------------------------------------------------------------------------------------------------------------- sources


def load_sources(path: str | Path) -> dict[str, dict[str, Any]]:
    """The sources of a YAML file, checked. Raises :class:`ConfigError` naming file, source and rule."""
    try:
        with open(path, encoding="utf-8") as handle:
            found = yaml.safe_load(handle)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--sources {path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"--sources {path}: must be a mapping of names to sources; see data/sources.yaml")
    for name, source in found.items():
        wrong = _wrong_source(source, found)
        if wrong:
            raise ConfigError(f"--sources {path}: source {name!r}: {wrong}")
    return found


def _wrong_source(source: Any, known: Mapping[str, Any]) -> str:
    if not isinstance(source, dict):
        return "must be a mapping"
    unknown = source.keys() - {"description", "licence", "needs", "files", "includes"}
    if unknown:
        return f"unknown key(s) {', '.join(sorted(map(str, unknown)))}"
    includes = source.get("includes")
    if (includes is None) == (source.get("files") is None):
        return "needs either files or includes"
    if includes is not None:
        if not isinstance(includes, list) or any(name not in known or "files" not in (known[name] or {}) for name in includes):
            return "includes must be a list of sources that have files"
        return ""
    if not isinstance(source["files"], list) or not source["files"]:
        return "files must be a list"
    if not set(source.get("needs") or ()) <= {"language", "snapshot"}:
        return "needs may hold language and snapshot only"
    return next((wrong for entry in source["files"] if (wrong := _wrong_file(entry))), "")


def _wrong_file(entry: Any) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str) or not isinstance(entry.get("url"), str):
        return "every file needs file and url"
    name = entry["file"]
    if "/" in name or "\\" in name or name.startswith(".") or name.endswith((PARTIAL, ".json.json")) or not name:
        return f"file {name!r} must be a plain file name"
    unknown = entry.keys() - {"file", "url", "size", "checksums", "checksums_kind", *KINDS}
    if unknown:
        return f"file {name}: unknown key(s) {', '.join(sorted(map(str, unknown)))}"
    for url in (entry["url"], entry.get("checksums") or entry["url"]):
        if urllib.parse.urlsplit(str(url)).scheme not in SCHEMES:
            return f"file {name}: {url} must begin with {', '.join(SCHEMES)}"
    for kind in KINDS:
        digits = hashlib.new(kind, usedforsecurity=False).digest_size * 2
        if kind in entry and not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", str(entry[kind])):
            return f"file {name}: {kind} must be {digits} hexadecimal digits"
    if not any(kind in entry for kind in KINDS) and ("checksums" not in entry or entry.get("checksums_kind") not in KINDS):
        return f"file {name}: needs one of {', '.join(KINDS)}, or checksums and checksums_kind; what is fetched must be verified"
    if "size" in entry and (not isinstance(entry["size"], int) or entry["size"] < 0):
        return f"file {name}: size must be a number of bytes"
    return ""


def check_snapshot(snapshot: str) -> None:
    """Raise :class:`ConfigError` unless ``snapshot`` is a date like 20261101."""
    if snapshot == "latest":
        raise ConfigError(
            "--snapshot latest is not pinned: it is another file every month, and the run could not be repeated; give a date that "
            "the server lists, such as 20261101"
        )
    try:
        if not re.fullmatch(r"\d{8}", snapshot):
            raise ValueError
        datetime.date(int(snapshot[:4]), int(snapshot[4:6]), int(snapshot[6:]))
    except ValueError:
        raise ConfigError(f"--snapshot {snapshot} is no date; write it as 20261101") from None


def remotes(sources: Mapping[str, Mapping[str, Any]], name: str, language: str | None, snapshot: str | None) -> list[Remote]:
    """The files of a source. Raises :class:`ConfigError` for an unknown name and for ``language`` or ``snapshot`` missing or wrong."""
    if name not in sources:
        raise ConfigError(f"--source {name} is not one of {', '.join(sources)}")
    source = sources[name]
    if source.get("includes"):
        return [remote for included in source["includes"] for remote in remotes(sources, included, language, snapshot)]
    needs = source.get("needs") or ()
    missing = [need for need, value in (("language", language), ("snapshot", snapshot)) if need in needs and not value]
    if missing:
        raise ConfigError(
            f"--source {name} needs {' and '.join('--' + need for need in missing)}, for example --language hu --snapshot 20261101"
        )
    if "snapshot" in needs:
        check_snapshot(str(snapshot))
    if "language" in needs and not re.fullmatch(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*", str(language)):
        raise ConfigError(f"--language {language} is no language code such as hu, fi or zh-min-nan")

    def filled(text: str, file: str = "") -> str:
        values = {"language": str(language or "").replace("-", "_"), "snapshot": str(snapshot or ""), "file": file}
        return re.sub(r"\{(language|snapshot|file)\}", lambda found: values[found[1]], text)

    found = []
    for entry in source["files"]:
        file = filled(entry["file"])
        kind = next((kind for kind in KINDS if kind in entry), None)
        checksums = filled(entry["checksums"], file) if kind is None else None
        checksum = str(entry[kind]).lower() if kind else None
        found.append(Remote(file, filled(entry["url"], file), kind or entry["checksums_kind"], checksum, checksums, entry.get("size")))
    return found


def describe(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the sources for ``--list``."""
    lines = []
    for name, source in sources.items():
        members = [sources[included] for included in source.get("includes") or ()] or [source]
        sizes = [entry.get("size") for member in members for entry in member["files"]]
        total = f"{sum(filter(None, sizes)) / 1e6:.1f} MB" if all(sizes) else "size by snapshot"
        options = "".join(f" --{need} ..." for need in source.get("needs") or ())
        lines.append(f"{name}{options}: {source.get('description', '')}; {total}; {source.get('licence', 'licence not known')}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ one file


def _list_name(url: str) -> str:
    return Path(urllib.parse.urlsplit(url).path).name or "checksums.txt"


def file_checksums(path: Path, kinds: Sequence[str]) -> dict[str, str]:
    """Hex checksums of a file, of several kinds in one pass."""
    digests = {kind: hashlib.new(kind, usedforsecurity=False) for kind in kinds}
    with open(path, "rb") as handle:
        while block := handle.read(_BLOCK):
            for digest in digests.values():
                digest.update(block)
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def _open(url: str, headers: Mapping[str, str], timeout: float) -> Any:
    """Open a URL; :class:`Unreachable` for what trying again may cure, :class:`DataError` for what it will not."""
    given = {"User-Agent": "berth-download", "Accept-Encoding": "identity", **headers}
    request = urllib.request.Request(url, headers=given)  # noqa: S310  load_sources allows SCHEMES only
    try:
        return urllib.request.urlopen(request, timeout=timeout)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        kind = Unreachable if error.code in (408, 429) or error.code >= 500 else DataError
        note = "; snapshots are removed after some months, see which ones the server lists" if error.code == 404 else ""
        raise kind(f"{url}: the server answers {error.code} {error.reason}{note}") from None
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise Unreachable(f"{url}: cannot be reached ({reason})") from None


def _checksum_of(remote: Remote, folder: Path, timeout: float) -> str:
    """The checksum to verify with; a published list is kept in the folder, for machines without network."""
    if remote.checksum is not None:
        return remote.checksum
    assert remote.checksums_url is not None
    path = folder / _list_name(remote.checksums_url)
    for fresh in (False, True):
        if fresh:
            try:
                with _open(remote.checksums_url, {}, timeout) as response:
                    data = response.read(_LONGEST_LIST)
            except (OSError, http.client.HTTPException) as error:
                raise Unreachable(f"{remote.checksums_url}: the transfer was cut off ({error})") from None
            with atomic_open(path, "wb") as handle:
                handle.write(data)
        elif not path.is_file():
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            words = line.split()
            if len(words) == 2 and words[1].lstrip("*") == remote.file:
                return words[0].lower()
    raise DataError(f"{remote.checksums_url} does not list {remote.file}: the snapshot is not complete yet; take an older one")


def _record(remote: Remote, path: Path, found: Mapping[str, str], how: str) -> None:
    status = path.stat()
    write_json(
        path.with_name(path.name + ".json"),
        {
            "url": remote.url, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": found["sha256"],
            "verified": {remote.kind: found[remote.kind]}, "how": how,
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        },
    )  # fmt: skip


def _already_there(remote: Remote, path: Path) -> bool:
    """Whether a record says that the file was verified, and it has not changed since."""
    try:
        record = read_json(path.with_name(path.name + ".json"))
        status = path.stat()
        if record["url"] != remote.url or record["size"] != status.st_size:
            return False
        if remote.checksum is not None and record["verified"].get(remote.kind) != remote.checksum:
            return False
        return record["mtime_ns"] == status.st_mtime_ns or record["sha256"] == file_checksums(path, ("sha256",))["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def fetch(remote: Remote, folder: Path, timeout: float = TIMEOUT_SECONDS, retries: int = RETRIES) -> str:
    """Make ``folder/remote.file`` a verified file; returns ``kept``, ``placed`` (by hand, now verified) or ``downloaded``.

    Raises :class:`Unreachable` without network, :class:`DataError` for a wrong checksum or size or a refusing server,
    :class:`LaunchError` when another run fetches the same file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / remote.file
    if path.is_file() and _already_there(remote, path):
        return "kept"
    lock = FolderLock(folder, f".{remote.file}.lock")
    if not lock.acquire(wait_seconds=1):
        raise LaunchError(f"another run is fetching {path}; wait for it")
    try:
        expected = _checksum_of(remote, folder, timeout)
        kinds = tuple(dict.fromkeys((remote.kind, "sha256")))
        if path.is_file():
            found = file_checksums(path, kinds)
            if found[remote.kind] != expected:
                raise DataError(
                    f"{path}: its {remote.kind} is {found[remote.kind]}, not {expected}: it is not the file of {remote.url}, or not all "
                    f"of it ({path.stat().st_size} bytes); remove it to fetch it again"
                )
            _record(remote, path, found, "placed by hand")
            return "placed"
        partial = path.with_name(path.name + PARTIAL)
        _transfer(remote, partial, timeout, retries)
        found = file_checksums(partial, kinds)
        if found[remote.kind] != expected:
            size = partial.stat().st_size
            _forget(partial)
            raise DataError(
                f"{remote.url}: the {remote.kind} of the {size} bytes fetched is {found[remote.kind]}, not {expected}; they were removed; run again, "
                f"and if it happens again, the source has changed or something on the way alters files"
            )
        with open(partial, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
        fsync_directory(folder)
        _record(remote, path, found, "downloaded")
        _forget(partial)
        return "downloaded"
    finally:
        lock.release()
        lock.path.unlink(missing_ok=True)


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    partial.with_name(partial.name + ".json").unlink(missing_ok=True)


def _validator(headers: Any) -> str | None:
    """What identifies a version of a file for ``If-Range``: a strong ETag, else the time of its last change."""
    tag = headers.get("ETag")
    if tag and not tag.startswith("W/"):
        return str(tag)
    changed = headers.get("Last-Modified")
    return str(changed) if changed else None


def _transfer(remote: Remote, partial: Path, timeout: float, retries: int) -> None:
    """Fill ``partial``; an attempt that came further than all before starts the count of ``retries`` anew."""
    failures, furthest = 0, partial.stat().st_size if partial.exists() else 0
    while True:
        try:
            if _attempt(remote, partial, timeout):
                return
            reason = "the connection was cut"
        except Unreachable as error:
            reason = str(error)
        except (TimeoutError, http.client.HTTPException, ConnectionError) as error:
            reason = f"{remote.url}: {error or type(error).__name__}"
        after = partial.stat().st_size if partial.exists() else 0
        failures, furthest = (1, after) if after > furthest else (failures + 1, furthest)
        if failures > retries:
            kept = f"; {after} bytes are in {partial} and the next run goes on from there" if after else ""
            raise Unreachable(reason + kept)
        time.sleep(min(30.0, 0.1 * 4**failures) if failures > 1 else 0.1)


def _attempt(remote: Remote, partial: Path, timeout: float) -> bool:
    """One request; whether the file is complete now. Appends to ``partial`` only what the server says follows it."""
    side = partial.with_name(partial.name + ".json")
    have, state = 0, dict[str, Any]()
    if partial.is_file():
        try:
            state = read_json(side)
            have = partial.stat().st_size if state["url"] == remote.url and state["validator"] else 0
        except (OSError, ValueError, KeyError, TypeError):
            have = 0
    headers = {"Range": f"bytes={have}-", "If-Range": state["validator"]} if have else {}
    with _open(remote.url, headers, timeout) as response:
        status = getattr(response, "status", None) or 200
        total = _total(response, have)
        if have and status == 416 and total == have == state.get("size"):
            return True
        goes_on = have > 0 and status == 206 and _range_start(response) == have and total == state.get("size")
        if status not in (200, 206) or (status == 206 and not goes_on):  # the file changed, or the server answers nonsense
            _forget(partial)
            return False
        if remote.size is not None and total is not None and total != remote.size:
            raise DataError(f"{remote.url}: the server has {total} bytes, the sources file says {remote.size}: the source has changed")
        if not goes_on:
            have = 0
            write_json(side, {"url": remote.url, "validator": _validator(response.headers), "size": total})
        with open(partial, "ab" if goes_on else "wb") as handle:
            return _copy(response, handle, remote.file, have, total)


def _total(response: Any, have: int) -> int | None:
    """Bytes of the whole file, as the answer says."""
    found = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", response.headers.get("Content-Range") or "")
    if found:
        return int(found[1])
    length = response.headers.get("Content-Length")
    return int(length) if length and length.isdigit() and getattr(response, "status", 200) != 416 else None


def _range_start(response: Any) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return int(found[1]) if found else None


def _copy(response: Any, handle: IO[bytes], name: str, have: int, total: int | None) -> bool:
    said = time.monotonic()
    with tqdm(total=total, initial=have, desc=name, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        while True:
            try:
                block = response.read1(_BLOCK) if hasattr(response, "read1") else response.read(_BLOCK)
            except http.client.IncompleteRead as error:
                block = error.partial
                handle.write(block)
                return False
            if not block:
                break
            handle.write(block)
            have += len(block)
            bar.update(len(block))
            if bar.disable and time.monotonic() - said > _LINE_SECONDS:
                said = time.monotonic()
                print(f"{name}: {have / 1e6:.0f} of {'?' if total is None else f'{total / 1e6:.0f}'} MB", flush=True)
    return total is None or have == total


# ------------------------------------------------------------------------------------------------------------ all files


def download(wanted: Sequence[Remote], folder: Path, timeout: float = TIMEOUT_SECONDS, retries: int = RETRIES) -> dict[str, str]:
    """Fetch or verify every file; returns what was done by file name.

    Files that are there are verified even if the network is not. Raises :class:`DataError` naming every file that is missing, where it
    can be fetched and where to place it.
    """
    done: dict[str, str] = {}
    missing: list[Remote] = []
    reason = ""
    for remote in wanted:
        try:
            # after one failure no more waiting: the files that are there are verified, the others are only listed
            done[remote.file] = fetch(remote, folder, timeout, 0 if missing else retries)
        except Unreachable as error:
            missing.append(remote)
            reason = reason or str(error)
    if missing:
        todo = "; ".join(remote.instructions(folder) for remote in missing)
        raise DataError(f"{reason}. Without network: {todo}. Then run this again: it verifies them")
    return done
