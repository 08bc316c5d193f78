"""Site profiles, ``slurm/clusters/*.yaml``: how one cluster wants to be asked for nodes, containers and paths.

In: a YAML file (plain ``safe_load``). Out: a frozen :class:`Cluster`, checked, every mistake reported together. The profile says what
belongs to the site; what belongs to a run (row, data, name) never stands in it. :data:`KEYS` is the documentation of the format.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import berth
from berth.errors import ConfigError
from berth.launch.yamlfile import read_yaml, suggestion

ROOT = Path(berth.__file__).resolve().parent.parent
FOLDER = ROOT / "slurm" / "clusters"
WALLTIME = re.compile(r"(?:([0-9]+)-)?([0-9]{1,2}):([0-9]{2}):([0-9]{2})")


@dataclasses.dataclass(frozen=True)
class Container:
    """Pyxis options. ``image`` as Pyxis takes it: a registry reference (``nvcr.io#nvidia/pytorch:...``) or a path to a squashfs file.

    ``import_to``: ``none`` (Pyxis pulls at every step), ``shared`` (once into ``squashfs_dir`` on shared storage) or ``node`` (once on each
    node into ``squashfs_dir`` on its own disk).
    """

    image: str
    import_to: str = "none"
    squashfs_dir: str | None = None
    mount_home: bool = False
    writable: bool = False
    remap_root: bool = False


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One site. Names and meaning are those of :data:`KEYS`; ``file`` is where it was read from."""

    name: str
    file: str
    title: str = ""
    platform: str | None = None
    recipe: str | None = None
    slurm_names: tuple[str, ...] = ()
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu_request: str = "none"
    cpus_per_task: int | None = None
    memory: str | None = None
    exclusive: bool = True
    walltime_limit: str | None = None
    warning_s: int = 300
    container: Container | None = None
    mounts: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mpi: str = "none"
    python: str = "python3"
    host_python: str | None = None
    setup: tuple[str, ...] = ()
    data: str | None = None
    results: str | None = None
    local: str | None = None
    bind: str = "numa"
    nic: str = "none"
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    max_restarts: int = 100
    crash_limit: int = 3
    preflight: bool = False
    min_free_gb: float = 50.0

    @property
    def walltime_limit_s(self) -> int | None:
        """The longest a job may run here, seconds."""
        return None if self.walltime_limit is None else seconds(self.walltime_limit)


Check = Callable[[Any], Any]


class _Wrong(Exception):
    """What a value should have been."""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or any(mark in value for mark in "\n\r\0"):
        raise _Wrong("a text of one line")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:+-]*", value):
        raise _Wrong("a name of letters, digits and _ . : + -")
    return value


def _path(value: Any) -> str:
    if not Path(_text(value)).is_absolute():
        raise _Wrong("an absolute path")
    return str(value)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong("true or false")
    return value


def _count(least: int) -> Check:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise _Wrong(f"a whole number, {least} or more")
        return value

    return check


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
        raise _Wrong("a number, 0 or more")
    return float(value)


def _one_of(*valid: str) -> Check:
    def check(value: Any) -> str:
        if value not in valid:
            raise _Wrong("one of " + ", ".join(valid))
        return str(value)

    return check


def _list(check: Check) -> Check:
    def checked(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _Wrong("a list")
        return tuple(check(item) for item in value)

    return checked


def _memory(value: Any) -> str:
    if not re.fullmatch(r"[0-9]+[KMGT]?", str(value)):
        raise _Wrong("what sbatch --mem takes: 0 for all of the node, or a number with K, M, G or T")
    return str(value)


def _walltime(value: Any) -> str:
    if not isinstance(value, str) or not WALLTIME.fullmatch(value) or seconds(value) == 0:
        raise _Wrong('"[days-]hours:minutes:seconds" in quotation marks')
    return value


def _mount(value: Any) -> str:
    parts = _text(value).split(":")
    if "," in value or len(parts) not in (2, 3) or not all(Path(part).is_absolute() for part in parts[:2]):
        raise _Wrong("SOURCE:DESTINATION[:FLAGS] with absolute paths that hold no comma or colon")
    return str(value)


def _option(value: Any) -> str:
    if not re.match(r"^--?[A-Za-z]", _text(value)):
        raise _Wrong("an option that begins with -")
    return str(value)


def _environment(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _Wrong("NAME: value pairs")
    for name, content in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise _Wrong(f"NAME: value pairs; {name!r} is no variable name")
        if not isinstance(content, (str, int, float)) or isinstance(content, bool):
            raise _Wrong(f"NAME: value pairs; the value of {name} must be a text or a number")
    return {name: str(content) for name, content in value.items()}


# key -> (check, what it means); the sections `container` and `paths` have keys of their own
KEYS: dict[str, tuple[Check, str]] = {
    "title": (_text, "one line for people"),
    "platform": (_name, "platform of configurations.yml the nodes are"),
    "recipe": (_name, "recipe of recipes.yml used when none is asked for"),
    "slurm_names": (_list(_name), "ClusterName of its Slurm: jobs submitted by hand find the profile by it"),
    "partition": (_name, "sbatch --partition"),
    "account": (_name, "sbatch --account"),
    "qos": (_name, "sbatch --qos"),
    "constraint": (_text, "sbatch --constraint"),
    "gpu_request": (_one_of("gres", "gpus-per-node", "none"), "how GPUs are asked for; none where whole nodes are handed out"),
    "cpus_per_task": (_count(1), "sbatch --cpus-per-task"),
    "memory": (_memory, "sbatch --mem, of a node; 0 = all"),
    "exclusive": (_bool, "sbatch --exclusive"),
    "walltime_limit": (_walltime, "longest job; longer phases requeue themselves"),
    "warning_s": (_count(20), "seconds before the end at which a job is told to save and requeue"),
    "container": (lambda value: value, "section: Pyxis image; leave out for a site without containers"),
    "mounts": (_list(_mount), "SOURCE:DESTINATION[:FLAGS], beside the job's own folders"),
    "environment": (_environment, "variables of every task (NCCL_..., UCX_...)"),
    "mpi": (_one_of("none", "pmix", "pmi2", "pmix_v3", "pmix_v4", "pmix_v5"), "srun --mpi"),
    "python": (_text, "Python inside the container, or of a shared environment"),
    "host_python": (
        _path,
        "Python with submitit on the nodes, outside the container; for --backend submitit (default: the one that submits)",
    ),
    "setup": (_list(_text), "shell lines before the steps (module load ...)"),
    "paths": (lambda value: value, "section: data (work folder of data.prepare), results (shared), local (disk of each node)"),
    "bind": (_one_of("none", "numa", "exclusive"), "CPUs of a task: all, those of its GPU's NUMA node, an own share of them"),
    "nic": (
        _one_of("none", "nearest"),
        "UCX's network card of a task: its own choice, or the one nearest to the GPU; NCCL always chooses itself",
    ),
    "sbatch": (_list(_option), "further options of sbatch, each one word (--name=value)"),
    "srun": (_list(_option), "further options of srun, each one word"),
    "max_restarts": (_count(0), "requeues of one job before it gives up"),
    "crash_limit": (_count(1), "crashes in a row without a new checkpoint before it gives up"),
    "preflight": (_bool, "check GPUs, network, disk and data before training"),
    "min_free_gb": (_number, "free space the results folder must have at the start"),
}
CONTAINER_KEYS: dict[str, tuple[Check, str]] = {
    "image": (_text, "registry reference as Pyxis writes it, or path of a squashfs file"),
    "import_to": (_one_of("none", "shared", "node"), "pull at every step, or import once to shared storage or to each node"),
    "squashfs_dir": (_path, "where imported images lie"),
    "mount_home": (_bool, "mount the home folder"),
    "writable": (_bool, "let tasks write to the (throw-away) root file system"),
    "remap_root": (_bool, "be root inside"),
}
PATH_KEYS: dict[str, tuple[Check, str]] = {
    "data": (_path, "work folder of data.prepare"),
    "results": (_path, "parent of all runs, on shared storage"),
    "local": (_path, "scratch on each node"),
}


def load_cluster(name: str, folder: Path | None = None) -> Cluster:
    """The profile called ``name`` in slurm/clusters, or of the file ``name``.

    Raises :class:`ConfigError` when there is none, listing those there are, or with everything that is wrong in it.
    """
    folder = FOLDER if folder is None else folder
    path = Path(name) if name.endswith((".yaml", ".yml")) or "/" in name else folder / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(names(folder))
        raise ConfigError(f"there is no site profile {path}; profiles: {there}. Write one, or give the path of a file")
    return parse_cluster(read_yaml(path), path.stem, str(path))


def names(folder: Path | None = None) -> list[str]:
    """The profiles in slurm/clusters."""
    return sorted(path.stem for path in (FOLDER if folder is None else folder).glob("*.yaml"))


def find_cluster(slurm_name: str, folder: Path | None = None) -> Cluster | None:
    """The profile that claims Slurm's own name of a cluster, if one does. Raises :class:`ConfigError` when several do."""
    found = [cluster for cluster in (load_cluster(name, folder) for name in names(folder)) if slurm_name in cluster.slurm_names]
    if len(found) > 1:
        raise ConfigError(f"several site profiles claim the Slurm cluster {slurm_name!r}: {', '.join(one.file for one in found)}")
    return found[0] if found else None


def parse_cluster(raw: Any, name: str, file: str) -> Cluster:
    """A profile from what YAML gave. Raises :class:`ConfigError` with every mistake in it, one a line."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: a site profile is a mapping of keys; keys: {', '.join(KEYS)}")
    wrong: list[str] = []
    values = _checked(raw, KEYS, "", wrong)
    paths = _checked(_section(values.pop("paths", None), "paths", wrong), PATH_KEYS, "paths.", wrong)
    section = values.pop("container", None)
    container = None
    if section is not None:
        inside = _checked(_section(section, "container", wrong), CONTAINER_KEYS, "container.", wrong)
        if "image" not in inside:
            wrong.append("container.image is missing: leave the section out for a site without containers")
        elif inside["image"].startswith("/") and inside.get("import_to", "none") != "none":
            wrong.append(
                f"container.import_to {inside['import_to']} is for images of a registry, {inside['image']} is a file; leave it out"
            )
        elif inside.get("import_to", "none") != "none" and "squashfs_dir" not in inside:
            wrong.append(f"container.import_to {inside['import_to']} needs container.squashfs_dir")
        else:
            container = Container(**inside)
    if values.get("host_python") is None and container is None and Path(values.get("python", "")).is_absolute():
        values["host_python"] = values["python"]
    if wrong:
        raise ConfigError(f"{file}:\n  " + "\n  ".join(wrong))
    return Cluster(name=name, file=file, container=container, **values, **paths)


def _section(value: Any, name: str, wrong: list[str]) -> Mapping[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        wrong.append(f"{name} is a section of keys, not {value!r}")
        return {}
    return value


def _checked(raw: Mapping[Any, Any], keys: Mapping[str, tuple[Check, str]], prefix: str, wrong: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in keys:
            wrong.append(f"unknown key {prefix}{key}{suggestion(key, keys)}")
        elif value is not None:
            try:
                values[key] = keys[key][0](value)
            except _Wrong as rule:
                wrong.append(f"{prefix}{key}: {value!r} is not {rule}")
    return values


def seconds(walltime: str) -> int:
    """Seconds of ``[days-]hours:minutes:seconds``. Raises :class:`ConfigError` for anything else."""
    match = WALLTIME.fullmatch(walltime)
    if match is None:
        raise ConfigError(f"{walltime!r} is not [days-]hours:minutes:seconds")
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def walltime(total_s: float) -> str:
    """``[days-]hh:mm:ss`` of some seconds."""
    minutes, rest = divmod(round(total_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hours:02d}:{minutes:02d}:{rest:02d}"
