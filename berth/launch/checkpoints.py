"""Checkpoints seen without torch: what a run's folder holds, where a phase would start from it, whether a file can be what it should be.

In: paths. Out: words for people, or the errors ``run_pretraining.py`` would end with on every node (the table in
:mod:`berth.training.phases`, which decides when the job runs; a test holds the two against each other).
"""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from pathlib import Path

from berth.errors import CheckpointError
from berth.files import read_json, sha256_file

MANIFEST = "manifest.json"
HASHED_BYTES = 1 << 28  # larger files are not read through before a submission
_CHECKPOINT = re.compile(r"ckpt_(\d+)\.pt")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint of a manifest; the names are those of :class:`berth.training.checkpoint.Entry`."""

    file: str
    step: int
    phase: int
    final: bool
    bytes: int
    sha256: str


def read_manifest(folder: Path) -> tuple[tuple[Entry, ...], dict[str, object]]:
    """The checkpoints a folder's manifest lists and that are there, oldest first, and the model configuration they were trained with.

    Raises :class:`CheckpointError` for a manifest that cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return (), {}
    try:
        manifest = read_json(path)
        names = [field.name for field in dataclasses.fields(Entry)]
        entries = [Entry(**{name: item[name] for name in names}) for item in manifest["checkpoints"]]
        config = manifest.get("config")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); restore it, or choose another name for the run") from error
    there = [entry for entry in entries if (folder / entry.file).is_file()]
    return tuple(sorted(there, key=lambda entry: (entry.phase, entry.step))), config if isinstance(config, dict) else {}


def unlisted(folder: Path, entries: tuple[Entry, ...]) -> list[str]:
    """Checkpoint files without an entry: a run was killed before it could enter them. What they are is known when they are loaded."""
    there = {path.name for path in folder.glob("ckpt_*.pt") if _CHECKPOINT.fullmatch(path.name)}
    return sorted(there - {entry.file for entry in entries})


def start(folder: Path, entries: tuple[Entry, ...], phase: int, init_checkpoint: str | None) -> str:
    """Where ``phase`` starts with ``--resume_from_checkpoint``, in words.

    Raises :class:`CheckpointError` when it could not start.
    """
    own = [entry for entry in entries if entry.phase == phase]
    later = [entry for entry in entries if entry.phase > phase]
    ends = [entry for entry in own if entry.final]
    if later and not ends:
        raise CheckpointError(f"{folder} holds phase {later[-1].phase} ({later[-1].file}) already; choose another name for the run")
    if own:
        return f"phase {phase} goes on from {(ends if later else own)[-1].file} in {folder}"
    if entries and init_checkpoint is not None:
        raise CheckpointError(
            f"{folder} holds phase {entries[-1].phase} ({entries[-1].file}), and an initial checkpoint would start phase {phase} anew; leave "
            "it out, or choose another name for the run"
        )
    if init_checkpoint is not None:
        return f"phase {phase} starts from the weights in {init_checkpoint}"
    if phase == 1:
        return f"phase 1 starts from random weights in {folder}"
    if not entries:
        raise CheckpointError(
            f"phase 2 alone needs weights, but {folder} holds no checkpoint of phase 1; submit both phases, give the run's name and results "
            "folder of a finished phase 1, or an initial checkpoint"
        )
    if not entries[-1].final:
        raise CheckpointError(
            f"phase 1 in {folder} is not finished (newest: {entries[-1].file}); submit both phases, or give that file as the initial checkpoint "
            "of a run with another name"
        )
    return f"phase 2 goes on from the end of phase 1, {entries[-1].file} in {folder}"


def damage(path: Path) -> str | None:
    """What keeps ``path`` from being loaded as weights, as far as can be told without loading it; ``None`` when nothing does."""
    if path.is_dir():
        known = any(_CHECKPOINT.fullmatch(file.name) or file.suffix in (".safetensors", ".bin", ".pt") for file in path.iterdir())
        return None if known else "holds no weights (ckpt_<n>.pt, model.safetensors, pytorch_model.bin)"
    if not path.is_file():
        return "does not exist"
    size = path.stat().st_size
    listed = _listed(path)
    if listed is not None and listed.bytes != size:
        return f"has {size} bytes, {listed.bytes} were written: it is truncated"
    if listed is not None and size <= HASHED_BYTES and listed.sha256 and sha256_file(path) != listed.sha256:
        return f"does not match its checksum in {path.parent / MANIFEST}: it is damaged"
    if path.suffix == ".json":  # the index of weights in several files
        return None if _is_json(path) else "is no JSON: it is damaged"
    if path.suffix == ".safetensors":
        return _safetensors_damage(path, size)
    return _torch_damage(path)


def _is_json(path: Path) -> bool:
    try:
        return isinstance(read_json(path), dict)
    except ValueError:
        return False


def _listed(path: Path) -> Entry | None:
    try:
        entries, _ = read_manifest(path.parent)
    except CheckpointError:
        return None
    return next((entry for entry in entries if entry.file == path.name), None)


def _safetensors_damage(path: Path, size: int) -> str | None:
    """8 bytes of length, a JSON header of tensors with their places, then the data (the safetensors format)."""
    try:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length)) if 0 < length <= size - 8 else {}
        if not header:
            return "has no safetensors header: it is damaged"
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "has no safetensors header: it is damaged"
    if 8 + length + max(ends, default=0) != size:
        return f"has {size} bytes, its header describes {8 + length + max(ends, default=0)}: it is truncated"
    return None


def _torch_damage(path: Path) -> str | None:
    """A zip with a ``data.pkl`` (torch 1.6 and later), or an older plain pickle, of which only the first byte is looked at."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError) as error:
            return f"is a damaged zip ({error})"
        return None if any(Path(name).name == "data.pkl" for name in names) else "is a zip, but none of torch.save"
    with open(path, "rb") as handle:
        first = handle.read(2)
    if first == b"PK":
        return "is a zip without its end: it is truncated"
    return None if first[:1] == b"\x80" else "is of no known format (torch.save, safetensors)"
