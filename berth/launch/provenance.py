"""Where a run came from: one ``run.json`` a job, with an entry under ``attempts`` for every start.

In: what the launcher knew when it submitted (``static``: row, recipe, cluster, image, git, seeds), and what only
the node knows: Slurm's ids and nodes, versions, hashes of the data. Out: JSON that is complete or absent. Versions come from package
metadata: importing torch would cost seconds before every start.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import itertools
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from berth.files import read_json, sha256_file, sha256_json, write_json

_SLURM = {
    "job_id": "SLURM_JOB_ID",
    "job_name": "SLURM_JOB_NAME",
    "step_id": "SLURM_STEP_ID",
    "array_job_id": "SLURM_ARRAY_JOB_ID",
    "array_task_id": "SLURM_ARRAY_TASK_ID",
    "restart_count": "SLURM_RESTART_COUNT",
    "cluster": "SLURM_CLUSTER_NAME",
    "partition": "SLURM_JOB_PARTITION",
    "account": "SLURM_JOB_ACCOUNT",
    "user": "SLURM_JOB_USER",
    "node_list": "SLURM_JOB_NODELIST",
}
# by name, so that no key or token of somebody's shell lands in the file
_TUNING = re.compile(
    r"(NCCL|TORCH_NCCL|UCX|OMP)_[A-Z0-9_]+|CUDA_VISIBLE_DEVICES|PYTORCH_(CUDA_)?ALLOC_CONF|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
)
_GIT_SECONDS = 30.0  # a repository on a slow file system must not hold up a submission


def git_state(root: str | os.PathLike[str]) -> dict[str, Any] | None:
    """``revision``, ``dirty`` (anything changed or untracked) and ``diff_sha256`` of the working tree at ``root``.

    The hash is that of ``git diff --no-ext-diff --no-textconv --binary HEAD``, or ``None`` where that is empty. ``None`` instead of all when git
    is missing, or ``root`` is in no repository with a commit.
    """
    revision = _git(root, "rev-parse", "--verify", "HEAD")
    status = _git(root, "status", "--porcelain")
    diff = _git(root, "diff", "--no-ext-diff", "--no-textconv", "--binary", "HEAD")
    if revision is None or status is None or diff is None:
        return None
    digest = hashlib.sha256(diff).hexdigest() if diff else None
    return {"revision": revision.decode().strip(), "dirty": bool(status), "diff_sha256": digest}


def _git(root: str | os.PathLike[str], *arguments: str) -> bytes | None:
    # a hook's GIT_DIR would speak of another repository; no lock: somebody may be working in this one
    clean = {key: value for key, value in os.environ.items() if key not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    try:
        done = subprocess.run(
            ["git", "-C", os.fspath(root), *arguments], capture_output=True, timeout=_GIT_SECONDS, env={**clean, "GIT_OPTIONAL_LOCKS": "0"}
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def expand_nodes(text: str) -> list[str]:
    """Slurm's ``dgx[01-03,7],login`` as ``["dgx01", "dgx02", "dgx03", "dgx7", "login"]`` (``scontrol`` is not in the container).

    A list that is not understood comes back as one name.
    """
    names: list[str] = []
    if not re.fullmatch(r"([^,\[\]]|,|\[\d+(-\d+)?(,\d+(-\d+)?)*\])+", text):
        return [text]
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        pieces = [_expand_range(piece) if inside else [piece] for piece, inside in _pieces(part)]
        names += ["".join(choice) for choice in itertools.product(*pieces)]
    return names


def _pieces(part: str) -> Iterable[tuple[str, bool]]:
    """``r[1-2]n3`` as ``("r", False), ("1-2", True), ("n3", False)``."""
    return ((piece, at % 2 == 1) for at, piece in enumerate(re.split(r"\[([^\]]*)\]", part)))


def _expand_range(text: str) -> list[str]:
    numbers: list[str] = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return numbers


def collect(static: Mapping[str, Any], environment: Mapping[str, str], command: Sequence[str] = ()) -> dict[str, Any]:
    """The facts of this start, for ``attempts``; what is not known here is left out.

    ``input_dir`` and ``vocab_file`` come from ``static``, else from the options in ``command``: their hashes are taken now, since the data may
    have been made after the submission. Nothing here raises for a file that is missing.
    """
    slurm: dict[str, Any] = {key: environment[name] for key, name in _SLURM.items() if environment.get(name)}
    nodes = slurm.get("node_list", "")
    if nodes:
        slurm["nodes"] = expand_nodes(nodes)
    nccl = environment.get("NCCL_VERSION") or next(filter(None, (_version(f"nvidia-nccl-cu{major}") for major in (13, 12, 11))), None)
    versions = {
        "python": sys.version.split()[0],
        "berth": _version("berth"),
        "torch": _version("torch"),
        "nccl": nccl,
        "cuda": environment.get("CUDA_VERSION"),
        "driver": _driver(Path("/proc/driver/nvidia/version")),
    }
    return {
        "start_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hostname": environment.get("SLURMD_NODENAME") or socket.gethostname(),
        "argv": list(command),
        "slurm": slurm,
        "versions": {name: version for name, version in versions.items() if version},
        "environment": {name: value for name, value in sorted(environment.items()) if _TUNING.fullmatch(name)},
        "inputs": _inputs(static, command),
        "image_sha256": environment.get("BERTH_IMAGE_SHA256") or None,
        "job_sha256": sha256_json(static),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", path.read_text(encoding="utf-8", errors="replace"))
        return found[1] if found else None
    return None


def _inputs(static: Mapping[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """SHA-256 of the ``records.json`` of each input (which names every file's), and of the vocabulary; they are what ``command`` reads."""
    found: dict[str, Any] = {"records": {}}
    folder, vocab_file = (static.get(name) or _option(command, f"--{name}") for name in ("input_dir", "vocab_file"))
    if folder:
        # a work folder of data.prepare has its records below
        for manifest in sorted(path for levels in ("", "*/", "*/*/") for path in Path(folder).glob(f"{levels}records.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found["records"][str(manifest)] = {"sha256": sha256_file(manifest)}
                found["records"][str(manifest)]["vocab_sha256"] = read_json(manifest)["options"]["vocab_sha256"]
    if vocab_file:
        with contextlib.suppress(OSError):
            found["vocab_sha256"] = sha256_file(vocab_file)
    return found


def _option(command: Sequence[str], name: str) -> str | None:
    """Value of an option in argv: ``--name value`` or ``--name=value``; the last one counts."""
    values = [following for word, following in itertools.pairwise(command) if word == name]
    values += [word.partition("=")[2] for word in command if word.startswith(f"{name}=")]
    return values[-1] if values else None


def write(path: str | os.PathLike[str], static: Mapping[str, Any], attempt: Mapping[str, Any]) -> None:
    """Make ``run.json`` of ``static`` with this ``attempt``, or append the attempt to the file that is there.

    A file of another submission (its ``static`` differs) keeps its attempts, and what it said goes under ``earlier`` by its hash. One that is
    damaged is kept as ``<name>.damaged``. Raises ``OSError`` when the folder cannot be written.
    """
    target = Path(path)
    attempts, earlier = [], {}
    try:
        before = read_json(target)
        attempts, earlier = list(before.pop("attempts")), dict(before.pop("earlier", {}))
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError):
        os.replace(target, target.with_name(f"{target.name}.damaged"))
    else:
        if before != static:
            earlier[sha256_json(before)] = before
    write_json(target, {**static, **({"earlier": earlier} if earlier else {}), "attempts": [*attempts, dict(attempt)]})


def record(path: str | os.PathLike[str], job: str | os.PathLike[str], command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Write this start to ``path``; ``job`` is the JSON file of what the launcher knew. Raises ``OSError``, ``ValueError``."""
    static = read_json(job)
    if not isinstance(static, dict):
        raise ValueError(f"{job} must hold a JSON object, not {type(static).__name__}")
    write(path, static, collect(static, environment, command))
