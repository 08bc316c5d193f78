"""A job submitted by hand, ``PHASE=1 sbatch -N4 --ntasks-per-node=8 run.sub``: its environment -> a plan of one job.

Both vocabularies of the public ``run.sub`` are understood (FEATURES 1.9), old and new names as aliases of each other. What is not said comes
from the row of the matrix for the allocation and from the site profile. Two names that contradict each other, a name that nobody
reads, and a batch that is not the recipe's stop the job before it starts.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from berth.errors import ConfigError
from berth.launch.clusters import ROOT, Cluster, find_cluster, load_cluster
from berth.launch.inputs import defaults
from berth.launch.matrix import Matrix
from berth.launch.plan import Plan, Run, make_plan
from berth.launch.render import PASSED
from berth.launch.wanted import Wanted, wanted_row
from berth.launch.yamlfile import raise_problems, suggestion

T = TypeVar("T")
BARE = "bare"  # the profile of a site that has none and no containers

# name -> (aliases, what it means)
VARIABLES: dict[str, tuple[tuple[str, ...], str]] = {
    "PHASE": ((), "1 or 2; 1 if not given"),
    "TRAIN_BATCH_SIZE": (("BATCHSIZE",), "sequences a GPU and optimizer step, before accumulation"),
    "GRADIENT_ACCUMULATION_STEPS": (("GRADIENT_STEPS",), "forward passes an optimizer step"),
    "GLOBAL_BATCH": ((), "sequences of a step over all GPUs; only to leave the recipe's on purpose"),
    "LEARNING_RATE": (("LR",), "peak learning rate"),
    "WARMUP_PROPORTION": (("WARMUP_UPDATES",), "share of the steps in which the rate rises"),
    "MAX_STEPS": (("TRAIN_STEPS",), "optimizer steps of the phase"),
    "STEPS_THIS_RUN": ((), "stop, with a checkpoint, after so many steps"),
    "SAVE_CHECKPOINT_STEPS": ((), "optimizer steps between checkpoints"),
    "PRECISION": ((), "fp16, bf16, fp8, tf32 or fp32; the platform's first if not given"),
    "PLATFORM": ((), "platform of configurations.yml; the site profile's if not given"),
    "RECIPE": ((), "recipe of recipes.yml"),
    "SITE_PROFILE": ((), "site profile: name in slurm/clusters, or path; found by Slurm's name of the cluster if not given"),
    "CONFIG": ((), "model: name in bert_configs (large, base, ...) or path; the one beside the data's vocabulary, else large"),
    "DATA_DIR": ((), "records, or work folder of data.prepare; the site profile's if not given"),
    "DATA_DIR_PHASE2": ((), "records of phase 2, where they lie elsewhere"),
    "VOCAB_FILE": ((), "vocabulary of the records"),
    "RESULTS_DIR": ((), "parent of runs; the site profile's, else results/ in the project"),
    "RUN_NAME": ((), "folder of this run below it; bert-<platform> if not given"),
    "INIT_CHECKPOINT": ((), "weights to start from"),
    "SEED": ((), "of weights, order and dropout; 42 if not given"),
    "GPUS": ((), "ranks a node; must agree with --ntasks-per-node"),
    "NUM_WORKERS": ((), "optimizer steps of data prepared ahead"),
    "EVALUATE": ((), "true: score the held-out shard"),
    "PREFLIGHT": ((), "true or false: check nodes before training; the site profile's if not given"),
    "EXTRA_ARGS": ((), "more options of run_pretraining.py, separated by spaces"),
    "IGNORE_VARIABLES": ((), "names that look like these but belong to something else"),
}
# names of the public scripts that mean nothing here, and what to do instead
REFUSED = {
    "DASK_TASKS_PER_NODE": "records are made beforehand: python -m data.prepare",
    "RERUN_DASK": "records are made beforehand: python -m data.prepare",
    "NUM_SHARDS_PER_WORKER": "records are made beforehand: python -m data.prepare",
    "SAMPLE_RATIO": "records are made beforehand: python -m data.prepare",
    "BIN_SIZE": "the layout of records is an option of create_pretraining_data.py",
    "MASKING": "dynamic masks: EXTRA_ARGS=--dynamic_masking",
    "USE_JEMALLOC": "preparation needs no other memory allocator",
    "IMAGE_VERSION": "the image stands in the site profile (container.image)",
    "NNODES": "nodes are asked for with sbatch -N",
}
_ALIASES = {alias: name for name, (aliases, _) in VARIABLES.items() for alias in aliases}
_KNOWN = [*VARIABLES, *_ALIASES, *REFUSED]
_OWN = ("BERTH_ROOT", "BERTH_PYTHON", *PASSED)  # PASSED: of the job this one was submitted from
_ELSEWHERE = ("SLURM_", "SBATCH_", "SRUN_", "NCCL_", "UCX_", "OMPI_", "PMIX_", "CUDA_", "TORCH_", "HF_", "OMP_")
_CLOSE = 0.84  # of difflib's ratio: BATCH_SIZE, GRADIENT_STEP and PRECISON are caught, LS_COLORS and SESSION are not


def given(environment: Mapping[str, str], wrong: list[str]) -> dict[str, str]:
    """``{canonical name: value}`` of the variables that are set; empty values and ``none`` count as not set.

    Contradictions, refused names and names that are probably misspelt go to ``wrong``.
    """
    found: dict[str, tuple[str, str]] = {}
    ignored = environment.get("IGNORE_VARIABLES", "").split()
    for name, value in sorted(environment.items()):
        if name in ignored or value == "" or value.lower() == "none":
            continue
        canonical = _ALIASES.get(name, name)
        if canonical in VARIABLES:
            before = found.setdefault(canonical, (name, value))
            if not _same(before[1], value):
                wrong.append(f"{name}={value} contradicts {before[0]}={before[1]}, which means the same; set one of them")
        elif name in REFUSED:
            wrong.append(f"{name} is not a variable of this run.sub: {REFUSED[name]}")
        elif _looks_meant(name):
            close = difflib.get_close_matches(name, _KNOWN, n=2, cutoff=_CLOSE)
            hint = f"did you mean {' or '.join(close)}?" if close else "see python -m slurm.launch job --help."
            wrong.append(f"{name} is set but nothing reads it; {hint} If it belongs to something else: IGNORE_VARIABLES={name}")
    return {name: value for name, (_, value) in found.items()}


def _same(one: str, other: str) -> bool:
    """Whether two texts say the same, be it as numbers (6e-3 and 0.006)."""
    try:
        return one == other or float(one) == float(other)
    except ValueError:
        return False


def _looks_meant(name: str) -> bool:
    """Whether a name nobody reads was probably meant for this job."""
    if name.startswith(_ELSEWHERE) or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or name in _OWN:
        return False
    return name.startswith("BERTH_") or bool(difflib.get_close_matches(name, _KNOWN, n=1, cutoff=_CLOSE))


class _Reader:
    """Typed access to the given variables; mistakes are collected in ``wrong``."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.wrong: list[str] = []
        self.values = given(environment, self.wrong)
        self.folder = Path(environment.get("SLURM_SUBMIT_DIR", "/"))

    def path(self, name: str) -> str | None:
        """Absolute, without ``..``; seen from the folder of the submission."""
        text = self.values.get(name)
        return None if text is None else os.path.normpath(self.folder / text)

    def text(self, name: str) -> str | None:
        return self.values.get(name)

    def number(self, name: str, kind: type[int] | type[float], least: float = 1, below: float = float("inf")) -> Any:
        text = self.values.get(name)
        if text is None:
            return None
        try:
            value = kind(text)
            if not least <= value < below:
                raise ValueError
        except ValueError:
            end = f"to {below - 1:g}" if kind is int else f"to below {below:g}"
            rule = f"{least:g} or more" if below == float("inf") else f"from {least:g} {end}"
            self.wrong.append(f"{name}={text} must be a {'whole number' if kind is int else 'number'}, {rule}")
            return None
        return value

    def switch(self, name: str) -> bool | None:
        text = self.values.get(name)
        if text is None or text in ("true", "false"):
            return None if text is None else text == "true"
        self.wrong.append(f"{name}={text} must be true or false")
        return None

    def attempt(self, make: Callable[[], T]) -> T | None:
        """What ``make`` returns; ``None`` when it raises :class:`ConfigError`, which is collected."""
        try:
            return make()
        except ConfigError as error:
            self.wrong.append(str(error))
            return None


def job_plan(environment: Mapping[str, str], matrix: Matrix, clusters: Path | None = None) -> Plan:
    """The plan of the one job this environment asks for, in the allocation Slurm's variables describe.

    Raises :class:`ConfigError` with everything that is wrong; a batch is looked at when all numbers can be read.
    """
    read = _Reader(environment)
    cluster = read.attempt(lambda: _cluster(read, environment.get("SLURM_CLUSTER_NAME"), clusters))
    allocation = read.attempt(lambda: _allocation(environment, read))
    phase = read.number("PHASE", int, below=3) or 1
    if cluster is None or allocation is None:
        raise_problems(read.wrong)
    assert cluster is not None and allocation is not None
    platform = read.attempt(lambda: _platform(read, matrix, cluster))
    run = read.attempt(lambda: _run(read, cluster, platform or "", phase))
    wanted = _wanted(read, cluster, phase)
    row = None if read.wrong or platform is None else read.attempt(lambda: wanted_row(wanted, matrix, platform, *allocation))
    raise_problems(read.wrong)
    assert row is not None and run is not None
    return make_plan(run, cluster, {phase: row}, [f"phase{phase}"])


def _cluster(read: _Reader, slurm_name: str | None, folder: Path | None) -> Cluster:
    wanted = read.text("SITE_PROFILE")
    if wanted is not None:
        is_file = "/" in wanted or wanted.endswith((".yaml", ".yml"))
        return load_cluster(str(read.path("SITE_PROFILE")) if is_file else wanted, folder)
    return (find_cluster(slurm_name, folder) if slurm_name else None) or load_cluster(BARE, folder)


def _platform(read: _Reader, matrix: Matrix, cluster: Cluster) -> str:
    platform = read.text("PLATFORM") or cluster.platform
    if platform is None:
        raise ConfigError(f"which platform of the matrix are these nodes? Set PLATFORM, or `platform` in {cluster.file}")
    if platform not in matrix.platforms:
        raise ConfigError(f"platform {platform!r} is not in configurations.yml{suggestion(platform, matrix.platforms)}")
    return platform


def _allocation(environment: Mapping[str, str], read: _Reader) -> tuple[int, int | None]:
    """Nodes of the allocation, and ranks a node if it says them."""
    text = environment.get("SLURM_JOB_NUM_NODES", "")
    if not text.isdigit():
        raise ConfigError("SLURM_JOB_NUM_NODES is not set: this runs inside a job (sbatch run.sub); to look before, use render or plan")
    asked = re.match(r"\d+", environment.get("SLURM_NTASKS_PER_NODE", ""))
    ranks, gpus = int(asked.group()) if asked else None, read.number("GPUS", int)
    if ranks and gpus and ranks != gpus:
        read.wrong.append(f"GPUS={gpus} contradicts --ntasks-per-node={ranks}; there is one task a GPU")
    return int(text), gpus or ranks


def _wanted(read: _Reader, cluster: Cluster, phase: int) -> Wanted:
    """What the variables say of the row."""
    changes = {
        "learning_rate": read.number("LEARNING_RATE", float, least=1e-12),
        "warmup_proportion": read.number("WARMUP_PROPORTION", float, least=0, below=1),
        "max_steps": read.number("MAX_STEPS", int),
        "num_steps_per_checkpoint": read.number("SAVE_CHECKPOINT_STEPS", int),
    }
    return Wanted(
        phase, read.text("RECIPE") or cluster.recipe, read.text("PRECISION"), read.number("TRAIN_BATCH_SIZE", int),
        read.number("GRADIENT_ACCUMULATION_STEPS", int), read.number("GLOBAL_BATCH", int),
        {name: value for name, value in changes.items() if value is not None},
    )  # fmt: skip


def _run(read: _Reader, cluster: Cluster, platform: str, phase: int) -> Run:
    """Folders, model and the rest. Raises :class:`ConfigError`."""
    workers, seed = read.number("NUM_WORKERS", int, least=0), read.number("SEED", int, least=0)
    steps, evaluate, preflight = read.number("STEPS_THIS_RUN", int), read.switch("EVALUATE"), read.switch("PREFLIGHT")
    extra = ([] if workers is None else ["--num_workers", str(workers)]) + (read.text("EXTRA_ARGS") or "").split()
    data = (read.path("DATA_DIR_PHASE2") if phase == 2 else None) or read.path("DATA_DIR") or cluster.data
    if data is None:
        raise ConfigError(f"where is the data? Set DATA_DIR (records, or the work folder of data.prepare), or paths.data in {cluster.file}")
    config, vocabulary = defaults(Path(data))
    return Run(
        name=read.text("RUN_NAME") or f"bert-{platform}",
        results=read.path("RESULTS_DIR") or cluster.results or str(ROOT / "results"),
        inputs={phase: data},
        config_file=model_config(read.text("CONFIG"), config, read.folder),
        vocab_file=read.path("VOCAB_FILE") or (None if vocabulary is None else str(vocabulary)),
        seed=42 if seed is None else seed,
        init_checkpoint=read.path("INIT_CHECKPOINT"),
        steps_this_run=steps,
        evaluate=bool(evaluate),
        extra=tuple(extra),
        preflight=preflight,
    )


def model_config(name: str | None, beside_data: Path | None, here: Path) -> str:
    """Path of the model's configuration: a name in bert_configs, a path (seen from ``here``), what lies beside the data, or large."""
    folder = ROOT / "bert_configs"
    if name is None:
        return str(beside_data or folder / "large.json")
    if "/" in name or name.endswith(".json"):
        return os.path.normpath(here / name)
    if not (folder / f"{name}.json").is_file():
        raise ConfigError(f"{name} is no model in bert_configs{suggestion(name, [path.stem for path in folder.glob('*.json')])}")
    return str(folder / f"{name}.json")


def help_text() -> str:
    """The variables, a line each."""
    width = max(len(" or ".join((name, *aliases))) for name, (aliases, _) in VARIABLES.items())
    return "\n".join(f"  {' or '.join((name, *aliases)):<{width}}  {meaning}" for name, (aliases, meaning) in VARIABLES.items())
