"""The shards in a folder as one set: their names, and a manifest that tells whether they are complete.

``<prefix>_shards.json`` is marked incomplete before the first shard is touched and complete after the last one has its name,
so that a folder in which ``data/shard.py`` was killed (old and new shards, test text in training) is never used. Folders
without a manifest, made by other programs, are taken as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from berth.errors import DataError
from berth.files import read_json, write_json
from berth.text.lines import text_files

FORMAT, FORMAT_VERSION = "berth shards", 1
MANIFEST_SUFFIX = "_shards.json"
SHARD_NAME = re.compile(r"(?P<prefix>.+)_(?:training|test)_\d+\.txt", re.DOTALL)


def shard_prefix(name: str) -> str | None:
    """The prefix of a shard's file name; None for a name that is not a shard's."""
    found = SHARD_NAME.fullmatch(name)
    return found["prefix"] if found else None


def write_manifest(folder: Path, prefix: str, shards: dict[str, dict[str, int]] | None) -> None:
    """Record ``shards`` (name -> ``bytes``, ``documents``) as complete; None: they are being replaced."""
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "prefix": prefix, "complete": shards is not None}
    write_json(folder / f"{prefix}{MANIFEST_SUFFIX}", {**head, "shards": shards or {}})


def _check_manifest(path: Path) -> None:
    try:
        manifest: Any = read_json(path)
    except ValueError as error:
        raise DataError(f"{path}: damaged shard manifest ({error}); run data/shard.py again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return
    if manifest.get("complete") is not True:
        raise DataError(f"{path.parent}: data/shard.py was interrupted here, old and new shards may be mixed; run it again")
    prefix, wanted = manifest.get("prefix"), manifest.get("shards")
    if not isinstance(wanted, dict) or not all(isinstance(shard, dict) for shard in wanted.values()):
        raise DataError(f"{path}: damaged shard manifest; run data/shard.py again")
    found = {file.name: file.stat().st_size for file in path.parent.iterdir() if shard_prefix(file.name) == prefix}
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    wrong += [f"{name} is not of this set" for name in sorted(found.keys() - wanted.keys())]
    wrong += [
        f"{name} has {found[name]} bytes instead of {wanted[name].get('bytes')}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name] != wanted[name].get("bytes")
    ]
    if wrong:
        raise DataError(
            f"{path.parent}: the shards are not those that data/shard.py wrote: {', '.join(wrong[:3])}"
            f"{' ...' if len(wrong) > 3 else ''}; run data/shard.py again, or delete {path.name} to use them as they are"
        )


def select_shards(path: Path) -> tuple[list[Path], list[Path]]:
    """The text files to make records of, and those left out.

    A file is taken as it is. In a folder that holds shards (``<prefix>_training_<i>.txt``, ``<prefix>_test_<i>.txt``)
    only these are taken, otherwise every ``.txt``. Raises :class:`DataError` for shards of two prefixes, for shards that
    differ from their manifest, and as :func:`text_files` does.
    """
    folders = {path} if path.is_dir() else {path.parent} if shard_prefix(path.name) else set()
    for manifest in (found for folder in folders for found in sorted(folder.glob(f"*{MANIFEST_SUFFIX}"))):
        if path.is_dir() or manifest.name == f"{shard_prefix(path.name)}{MANIFEST_SUFFIX}":
            _check_manifest(manifest)
    files = text_files(path)
    if not path.is_dir():
        return files, []
    prefixes: dict[str, Path] = {}
    for file in files:
        prefix = shard_prefix(file.name)
        if prefix is not None:
            prefixes.setdefault(prefix, file)
    if not prefixes:
        return files, []
    if len(prefixes) > 1:
        raise DataError(
            f"{path} holds shards of {len(prefixes)} prefixes: {', '.join(file.name for file in list(prefixes.values())[:5])}; "
            "training would mix them: move one set to a folder of its own"
        )
    shards = [file for file in files if shard_prefix(file.name) is not None]
    for folder in {file.parent for file in shards} - {path}:
        for manifest in sorted(folder.glob(f"*{MANIFEST_SUFFIX}")):
            _check_manifest(manifest)
    return shards, [file for file in files if shard_prefix(file.name) is None]
