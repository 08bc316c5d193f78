"""What a run reads: records and what they say of themselves, found from a folder of records or a work folder of ``data.prepare``.

In: a path and the lengths a phase needs. Out: the folder that fits (:func:`records_folder`), and its :class:`Records`. ``records.json`` tells
nearly everything without numpy and h5py, which a login node may lack; what only the hdf5 files tell is then left open and noted.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from berth.errors import ConfigError, DataError
from berth.files import read_json
from berth.launch.recipes import PhaseRecipe

MANIFEST = "records.json"
HDF5 = (".hdf5", ".h5")
_PARQUET = re.compile(r"\.parquet(?:_\d+)?$")
_LENGTHS_IN_NAME = re.compile(r"_seq_len_(\d+)_max_pred_(\d+)(?:_|$)")


@dataclasses.dataclass(frozen=True)
class Records:
    """One folder of records; ``None`` stands for what could not be found out.

    Attributes:
        seq_length, max_predictions: tokens and most masked positions of a row.
        files, rows: to train on.
        test_files, test_rows: held out.
        vocab_sha256, vocab_size: of the vocabulary they were made with; '' and 0 where they do not say.
        lowercase: whether the text was lower-cased.
        masking: ``static``, or ``none`` where training draws the masks.
        problems: what is wrong with the folder.
        notes: what could not be checked, and why.
    """

    folder: Path
    seq_length: int | None
    max_predictions: int | None
    files: int
    rows: int | None
    test_files: int
    test_rows: int | None
    vocab_sha256: str = ""
    vocab_size: int = 0
    lowercase: bool | None = None
    masking: str = "static"
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def records_folder(path: str | os.PathLike[str], seq_length: int | None, max_predictions: int | None = None) -> Path:
    """The folder of records ``path`` means: itself, or the one of a ``data.prepare`` work folder that fits.

    Args:
        path: a folder of records (or one file), or a work folder. What is neither is given back: who opens it says what is wrong.
        seq_length: tokens a row must have; ``None`` for any.
        max_predictions: masked positions a row must have at most; ``None`` for any. Records without masks have no such number.

    Raises :class:`ConfigError` when none or several of the work folder's records fit, listing all.
    """
    root = Path(path)
    if not root.is_dir() or _files(root) or (root / MANIFEST).is_file():
        return root
    parent = root / "records" if (root / "records").is_dir() else root
    shapes = {folder: _shape(folder) for folder in sorted(parent.iterdir()) if folder.is_dir() and _files(folder)}
    if not shapes and parent == root:
        return root
    fitting = [
        folder
        for folder, (length, predictions, masking) in shapes.items()
        if seq_length in (None, length) and (max_predictions in (None, predictions) or masking == "none")
    ]
    if len(fitting) == 1:
        return fitting[0]
    wanted = " and ".join(
        f"{what} {value}" for what, value in (("sequence length", seq_length), ("masked positions", max_predictions)) if value is not None
    )
    there = "".join(
        f"\n    {folder.name}: length {_said(length)}, {_said(predictions)} masked positions, masking {masking}"
        for folder, (length, predictions, masking) in shapes.items()
    )
    if not shapes:
        raise ConfigError(f"{parent} holds no records yet; let data.prepare finish, or give a folder of records")
    if not fitting:
        raise ConfigError(f"none of the records in {parent} has {wanted}; make such records (python -m data.prepare). There are:{there}")
    several = ", ".join(folder.name for folder in fitting)
    raise ConfigError(
        f"several records in {parent} have {wanted or 'any length'} ({several}); name the folder that is meant. There are:{there}"
    )


def defaults(path: str | os.PathLike[str]) -> tuple[Path | None, Path | None]:
    """Model configuration and vocabulary that ``data.prepare`` left in its work folder; ``path`` is that, or one of its records folders."""
    root = Path(path)
    for workdir in (root, root.parent, root.parent.parent):  # <workdir>, <workdir>/records, <workdir>/records/<name>
        folder = workdir / "vocab"
        if (folder / "vocab.txt").is_file():
            config = folder / "bert_config.json"
            return (config if config.is_file() else None), folder / "vocab.txt"
    return None, None


def describe_records(path: str | os.PathLike[str], recipe: PhaseRecipe) -> Records:
    """What the records in ``path`` (see :func:`records_folder`) that ``recipe`` needs say of themselves.

    Raises :class:`ConfigError` or :class:`DataError` when there are none, or the manifest is damaged.
    """
    predictions = None if recipe.options.get("dynamic_masking") else recipe.max_predictions_per_seq
    folder = records_folder(path, recipe.max_seq_length, predictions)
    if not folder.exists():
        raise DataError(
            f"data folder {folder} does not exist; give records of create_pretraining_data.py or the work folder of data.prepare"
        )
    names = [folder.name] if folder.is_file() else _files(folder)
    if not names:
        raise DataError(f"data folder {folder} holds no records (.hdf5); make them with create_pretraining_data.py or data.prepare")
    training, test = _chosen(names, "training"), _chosen(names, "test")
    if not training:
        raise DataError(f"data folder {folder} holds {len(names)} records files, none of them for training")
    manifest = _manifest(folder)
    if manifest is None:
        return _from_files(folder, training, test)
    return _from_manifest(folder, manifest, training, test)


def kind_of(name: str) -> str | None:
    """``training`` or ``test`` by a file's name, ``None`` if it says neither: the rule of :mod:`berth.records.reader`, without numpy.

    Raises :class:`DataError` when it may be both.
    """
    stem = re.sub(r"_bin_\d+$", "", Path(name).stem)
    ending = re.search(r"(?:^|_)(training|test)_\d+$", stem)
    if ending:
        return ending.group(1)
    found = {"training", "test"} & set(re.split(r"[^a-z]+", stem.lower()))
    if len(found) > 1:
        raise DataError(f"{name} may be training or held-out data; name it <prefix>_training_<i>.hdf5 or <prefix>_test_<i>.hdf5")
    return next(iter(found), None)


def _chosen(names: Sequence[str], kind: str) -> list[str]:
    """The files for ``kind``; where none says so, those that say nothing."""
    kinds = {name: kind_of(name) for name in names}
    return [name for name in names if kinds[name] == kind] or [name for name in names if kinds[name] is None]


def _files(folder: Path) -> list[str]:
    """Names of the records files in a folder: hdf5, or Parquet where there is no hdf5."""
    visible = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    return [name for name in visible if name.endswith(HDF5)] or [name for name in visible if _PARQUET.search(name)]


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        if isinstance(found["options"], dict) and isinstance(found["parts"], dict):
            return dict(found)
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{path} is damaged: no manifest of records; make it again with create_pretraining_data.py")


def _shape(folder: Path) -> tuple[int | None, int | None, str]:
    """Length, masked positions and masking of a folder: from its manifest, its name, or its first file."""
    try:
        manifest = _manifest(folder)
    except DataError:
        manifest = None
    if manifest is not None:
        options = manifest["options"]
        return options.get("max_seq_length"), options.get("max_predictions_per_seq"), str(options.get("masking", "static"))
    named = _LENGTHS_IN_NAME.search(folder.name)
    if named:
        return int(named.group(1)), int(named.group(2)), "none" if "_none" in folder.name[named.end() :] else "static"
    try:
        records = _from_files(folder, _files(folder)[:1], ())
    except DataError:
        return None, None, "static"
    return records.seq_length, records.max_predictions, records.masking


def _from_manifest(folder: Path, manifest: Mapping[str, Any], training: Sequence[str], test: Sequence[str]) -> Records:
    options, parts = manifest["options"], manifest["parts"]
    here = {*training, *test}
    problems = [
        f"{folder / name} is in {MANIFEST} but not there; make the records again" for name in parts if not (folder / name).is_file()
    ]
    for name in sorted(here & parts.keys()):
        size, written = (folder / name).stat().st_size, parts[name].get("bytes")
        if written not in (None, size):
            problems.append(f"{folder / name} has {size} bytes, {written} were written: it is damaged; make the records again")
    unlisted = sorted(here - parts.keys())
    notes = [f"{folder}: {len(unlisted)} files are not in {MANIFEST} ({unlisted[0]} ...); their rows were not counted"] if unlisted else []
    vocab_size = 0
    try:
        vocab_size = _from_files(folder, training[:1], ()).vocab_size
    except DataError as error:
        problems.append(str(error))
    return Records(
        folder=folder,
        seq_length=options.get("max_seq_length"),
        max_predictions=options.get("max_predictions_per_seq"),
        files=len(training),
        rows=_rows(parts, training),
        test_files=len(test),
        test_rows=_rows(parts, test),
        vocab_sha256=str(options.get("vocab_sha256", "")),
        vocab_size=vocab_size,
        lowercase=options.get("do_lower_case"),
        masking=str(options.get("masking", "static")),
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(notes),
    )


def _rows(parts: Mapping[str, Any], names: Collection[str]) -> int | None:
    if any(name not in parts for name in names):
        return None
    return sum(int(parts[name]["counts"]["instances"]) for name in names)


def _from_files(folder: Path, training: Sequence[str], test: Sequence[str]) -> Records:
    """From the attributes and shapes of the hdf5 files. Raises :class:`DataError` for one that is damaged."""
    unknown = Records(folder, None, None, len(training), None, len(test), None)
    if any(_PARQUET.search(name) for name in training):
        return dataclasses.replace(unknown, notes=(f"{folder}: Parquet does not say what it was made for; not checked",))
    try:
        from berth.records.layouts import inspect_hdf5
    except ImportError as error:
        note = f"{folder}: has no {MANIFEST}, and {error.name} is not installed here; not checked"
        return dataclasses.replace(unknown, notes=(note,))
    parent = folder.parent if folder.is_file() else folder
    seen = {name: inspect_hdf5(parent / name) for name in (*training, *test)}
    found, held_out = ([seen[name] for name in names] for names in (training, test))
    first = found[0]
    problems = [
        f"{file.path} holds {file.max_seq_length} tokens and {file.predictions} masked positions a row, {first.path} {first.max_seq_length} and "
        f"{first.predictions}; records of one folder must have one shape"
        for file in seen.values()
        if (file.max_seq_length, file.predictions) != (first.max_seq_length, first.predictions)
    ]
    digests = {file.vocab_sha256 for file in found}
    if len(digests) > 1:
        problems.append(f"{folder}: the files were made with {len(digests)} different vocabularies; make the records again with one")
    return dataclasses.replace(
        unknown,
        seq_length=first.max_seq_length,
        max_predictions=first.predictions,
        rows=sum(file.rows for file in found),
        test_rows=sum(file.rows for file in held_out),
        vocab_sha256=first.vocab_sha256,
        vocab_size=first.vocab_size,
        lowercase=first.lowercase,
        masking=first.masking,
        problems=tuple(problems),
    )


def _said(value: int | None) -> str:
    return "unknown" if value is None else str(value)
