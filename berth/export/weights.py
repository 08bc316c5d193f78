"""Read the weights of a BERT from whatever file or folder holds them, without running code from it.

======================================================= ==========================================================
berth checkpoint, weights file, or ``--output_dir``      ``format: berth-checkpoint``; of a folder the newest in its manifest
Hugging Face folder, ``*.safetensors``, ``*.bin``        also in several pieces, with an index
NVIDIA, DeepSpeed, AzureML, ONNX Runtime ``*.pt``        the tensors under ``model``, ``module``, ... or the file itself
======================================================= ==========================================================

Pickles are read with ``weights_only=True``; a file that needs more is refused.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from berth.errors import CheckpointError
from berth.export.names import canonical_names, is_nvidia
from berth.files import read_json, sha256_file

FORMAT = "berth-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONFIG_NAME = "config.json"
_HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")
_SHOWN = 3
_LOG = logging.getLogger(__name__)
_WRAPPERS = ("model", "module", "state_dict", "model_state_dict")


class LoadedWeights(NamedTuple):
    """Tensors by Hugging Face's names (float32, on the CPU), the model's config dict if known, and where they are from."""

    weights: dict[str, Tensor]
    config: dict[str, Any] | None
    source: str


@dataclasses.dataclass(frozen=True)
class Source:
    """As :class:`LoadedWeights`; ``nvidia``: the tensors had NVIDIA's names; ``files``: those that were read.

    ``vocab_sha256`` ('' where unknown) and ``lowercase`` (None where unknown) are of the records a berth checkpoint was
    trained on.
    """

    weights: dict[str, Tensor]
    config: dict[str, Any] | None
    source: str
    nvidia: bool
    files: tuple[Path, ...] = ()
    vocab_sha256: str = ""
    lowercase: bool | None = None


@dataclasses.dataclass(frozen=True)
class _Contents:
    """Tensors under their own names, and what else a file says."""

    tensors: dict[str, Tensor]
    kind: str
    files: tuple[Path, ...]
    config: dict[str, Any] | None = None
    vocab_sha256: str = ""
    lowercase: bool | None = None


def load_weights(path: str | Path) -> LoadedWeights:
    """Read the weights in ``path``; see the module for what it may be.

    ``config`` has the keys of Hugging Face's ``config.json``; it is that of a berth file, or of the ``config.json`` beside
    the weights, else ``None``. For NVIDIA's weights its ``hidden_act`` ``"gelu"`` becomes ``"gelu_pytorch_tanh"``, which
    is what their code computes. Raises :class:`CheckpointError` with one line for anything that cannot be read.
    """
    loaded = read_weights(path)
    return LoadedWeights(loaded.weights, loaded.config, loaded.source)


def read_weights(path: str | Path) -> Source:
    """:func:`load_weights`, with what else the conversions need to know."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint, a weights file or the folder that holds one")
    file = _main_file(path) if path.is_dir() else path
    contents = _read(file)
    raw, config, kind, files = contents.tensors, contents.config, contents.kind, contents.files
    floats = {name: tensor.detach() for name, tensor in raw.items() if tensor.is_floating_point()}
    weights = {name: tensor.to(torch.float32) for name, tensor in canonical_names(floats).items()}
    if not any(name.startswith("bert.encoder.layer.") for name in weights):
        shown = ", ".join(list(raw)[:3]) or "no tensor at all"
        raise CheckpointError(f"{file} holds no BERT encoder (it begins with {shown})")
    if config is None and kind != "berth" and (file.parent / CONFIG_NAME).is_file():
        config = read_config(file.parent / CONFIG_NAME)
        files = (*files, file.parent / CONFIG_NAME)
    nvidia = is_nvidia(raw)
    if nvidia:
        kind = "NVIDIA (its gelu is hidden_act gelu_tanh)"
        config = None if config is None else with_nvidia_gelu(config)
    return Source(weights, config, f"{kind} weights {file}", nvidia, files, contents.vocab_sha256, contents.lowercase)


def with_nvidia_gelu(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose ``"gelu"`` says what NVIDIA's code computes under that name: the tanh approximation."""
    return {**config, "hidden_act": "gelu_pytorch_tanh"} if config.get("hidden_act", "gelu") == "gelu" else config


def read_config(path: str | Path) -> dict[str, Any]:
    """A JSON config as a dict. :class:`CheckpointError` when it is missing, no JSON, or no object."""
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"configuration {path} cannot be read: {_reason(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"configuration {path} must be a JSON object with the keys of a BERT config")
    return config


def newest_checkpoint(folder: Path) -> Path:
    """The last good checkpoint in a folder's manifest: its size and checksum are those written, or (unknown) it opens.

    Damaged and missing ones are passed over with a warning in the log. Raises :class:`CheckpointError` when none is good.
    """
    manifest = folder / MANIFEST
    try:
        entries = list(read_json(manifest)["checkpoints"])
        if not entries:
            raise IndexError("the list is empty")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{manifest} lists no checkpoint ({_reason(error)}); give the ckpt_*.pt itself") from error
    problems = []
    for entry in reversed(entries):
        try:
            file = _checked_entry(folder, entry)
        except (CheckpointError, OSError) as error:
            problems.append(_reason(error))
            continue
        for problem in problems:
            _LOG.warning("%s; the older %s is used", problem, file.name)
        return file
    raise CheckpointError(f"no checkpoint in {manifest} can be used ({'; '.join(problems[:_SHOWN])}); give a ckpt_*.pt itself")


def _checked_entry(folder: Path, entry: Any) -> Path:
    """The file of a manifest entry; :class:`CheckpointError` unless it is the one that was written."""
    name = entry.get("file") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"an entry of {folder / MANIFEST} names no file")
    file, size, digest = folder / name, entry.get("bytes"), entry.get("sha256")
    if not file.is_file():
        raise CheckpointError(f"{file} is listed in {MANIFEST} but does not exist")
    if size and digest and file.stat().st_size != size:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes, {size} were written: it is truncated or damaged")
    if not digest:
        _read_torch(file)  # mapped, so this reads little
    elif sha256_file(file) != digest:
        raise CheckpointError(f"{file} does not match its checksum in {MANIFEST}: it is truncated or damaged")
    return file


def _main_file(folder: Path) -> Path:
    if (folder / MANIFEST).is_file():
        return newest_checkpoint(folder)
    for name in _HUGGING_FACE_FILES:
        for candidate in (folder / name, folder / f"{name}.index.json"):
            if candidate.is_file():
                return candidate
    raise CheckpointError(
        f"{folder} holds neither {MANIFEST} (a berth output folder) nor {' or '.join(_HUGGING_FACE_FILES)} (Hugging Face); "
        "give the weights file itself"
    )


def _read(file: Path) -> _Contents:
    if file.name.endswith(".index.json"):
        return _read_pieces(file)
    if file.suffix == ".safetensors":
        return _Contents(_read_safetensors(file), "Hugging Face", (file,))
    payload = _read_torch(file)
    if isinstance(payload, dict) and payload.get("format") == FORMAT:
        return _berth_contents(payload, file)
    found = _tensors_in(payload)
    if not found:
        raise CheckpointError(f"{file} holds no tensors by name, neither itself nor under {', '.join(_WRAPPERS)}")
    return _Contents({name: tensor.clone() for name, tensor in found.items()}, "PyTorch", (file,))


def _berth_contents(payload: dict[str, Any], file: Path) -> _Contents:
    version = payload.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{file} has format version {version!r}, this berth reads {FORMAT_VERSION}")
    model, config = payload.get("model"), payload.get("config")
    if not isinstance(model, dict) or not isinstance(config, dict):
        raise CheckpointError(f"{file} is a berth checkpoint without its model or config; it is damaged")
    identity = payload.get("identity")
    digest = identity.get("vocab_sha256") if isinstance(identity, dict) else None
    case = payload.get("do_lower_case")
    return _Contents(
        {name: tensor.clone() for name, tensor in _tensors(model.items()).items()},
        "berth",
        (file,),
        config,
        vocab_sha256=digest if isinstance(digest, str) else "",
        lowercase=None if case is None else bool(case),
    )


def _read_torch(file: Path) -> Any:
    """The payload of a torch file. Zip files are mapped, so an optimizer in it costs no memory."""
    head = _head(file)
    is_zip = head.startswith(b"PK")
    if not head:
        raise CheckpointError(f"{file} is empty")
    if is_zip and not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} is truncated: the end of the archive is missing")
    if not is_zip and not head.startswith(b"\x80"):  # the first byte of a pickle, which old torch files are
        raise CheckpointError(f"{file} is not a weights file")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and plain values and was not opened (it could run code): {_reason(error)}; "
            "save its weights alone (torch.save(model.state_dict(), ...)) and convert that"
        ) from error
    except OSError:
        raise
    except Exception as error:  # an interpreter of damaged pickle opcodes fails in any way
        raise CheckpointError(f"{file} cannot be read ({_reason(error)}): it is damaged") from error


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    _head(file)
    try:
        return safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({_reason(error)}): it is truncated or damaged") from error


def _read_pieces(index: Path) -> _Contents:
    try:
        files = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of a model in several files ({_reason(error)})") from error
    tensors: dict[str, Tensor] = {}
    read = [index]
    for name in files:
        piece = index.parent / Path(name).name
        if not piece.is_file():
            raise CheckpointError(f"{piece} is missing; {index.name} lists it")
        tensors.update(_read(piece).tensors)
        read.append(piece)
    return _Contents(tensors, "Hugging Face", tuple(read))


def _tensors_in(payload: Any) -> dict[str, Tensor]:
    """The tensors of a plain state dict, or of the first wrapper key that holds one."""
    if not isinstance(payload, dict):
        return {}
    inner = next((payload[key] for key in _WRAPPERS if isinstance(payload.get(key), dict)), None)
    return _tensors((payload if inner is None else inner).items())


def _tensors(items: Iterable[tuple[Any, Any]]) -> dict[str, Tensor]:
    return {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}


def _head(file: Path) -> bytes:
    """The first bytes; :class:`CheckpointError` when they are those of a Git LFS pointer."""
    with open(file, "rb") as handle:
        head = handle.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself; run 'git lfs pull' where it was cloned")
    return head


def _reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno} is no JSON"
    return (str(error) or type(error).__name__).splitlines()[0][:160]
