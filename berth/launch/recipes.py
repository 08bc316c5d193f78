"""What is trained and on what: the recipes of ``slurm/recipes.yml`` and the platforms of ``slurm/configurations.yml``.

A recipe holds everything that decides the result of a training (steps, global batch, rates); a platform describes one node. How the
global batch is cut over nodes is the matrix's business (:mod:`berth.launch.matrix`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from berth.launch.yamlfile import Table, suggestion

PRECISIONS = ("fp16", "bf16", "fp8", "tf32", "fp32")
OPTIMIZERS = ("lamb", "adamw")
SCHEDULES = ("poly", "linear", "cosine", "constant", "exponential")
# options of run_pretraining.py that a recipe or row may set beside its own keys; the launcher sets all others
OPTIONS = (
    "weight_decay", "max_grad_norm", "lr_warmup_degree", "lr_decay_rate", "lr_decay_steps", "lr_offset", "objective",
    "dynamic_masking", "masked_lm_prob", "whole_word_mask", "allreduce_post_accumulation_fp16", "checkpoint_activations",
    "no_dense_sequence_output", "no_group_by_length", "loss_scale", "init_loss_scale", "min_loss_scale", "scale_growth_interval",
    "max_consecutive_skips", "on_divergence", "max_rollbacks", "shard", "deepspeed_zero_stage", "reduce_dtype", "optimizer_backend",
    "unpad", "compile", "cuda_graphs", "fused_loss", "fused_qkv", "fast_dropout", "no_copy_ahead",
    "no_async_checkpoints", "dead_rank_s", "timeout_min", "peak_tflops",
    "phase2_moments", "phase2_step", "keep_checkpoints", "log_freq", "eval_freq", "eval_samples", "eval_batch_size", "num_workers",
)  # fmt: skip

SWITCH = ("auto", "on", "off")
WORDS = {"unpad": SWITCH, "compile": ("auto", "off", "layers", "model"), "fused_loss": SWITCH, "fused_qkv": SWITCH, "fast_dropout": SWITCH}
"""Options whose values are words, with those words; ``off`` is one of each."""
SWITCHES = (
    "dynamic_masking", "whole_word_mask", "allreduce_post_accumulation_fp16", "checkpoint_activations", "no_dense_sequence_output",
    "no_group_by_length", "cuda_graphs", "no_copy_ahead", "no_async_checkpoints",
)  # fmt: skip
"""Those of :data:`OPTIONS` that take no value on the command line, and true or false in a file."""


@dataclass(frozen=True)
class Platform:
    """One kind of node. ``cpus_per_node`` counts cores, memory is in GB; ``device`` is ``cuda`` or ``cpu``.

    ``precisions`` are those its hardware has, the default first; ``published_as`` are its names in ``slurm/published.yml``.
    """

    name: str
    title: str
    ranks_per_node: int
    device: str
    gpu: str
    gpu_memory_gb: float
    cpus_per_node: int
    memory_gb: float
    precisions: tuple[str, ...]
    published_as: tuple[str, ...]


@dataclass(frozen=True)
class PhaseRecipe:
    """One phase of a recipe; the fields are options of ``run_pretraining.py``, ``options`` further ones (flags without ``--``).

    ``global_batch`` counts sequences an optimizer step over all processes; steps are optimizer steps of this phase.
    """

    phase: int
    max_seq_length: int
    max_predictions_per_seq: int
    max_steps: int
    global_batch: int
    learning_rate: float
    warmup_proportion: float
    optimizer: str
    lr_schedule: str
    num_steps_per_checkpoint: int
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def sequences(self) -> int:
        """Sequences the whole phase trains on."""
        return self.max_steps * self.global_batch


@dataclass(frozen=True)
class Recipe:
    """A named recipe with its phases (1, or 1 and 2) and where it comes from."""

    name: str
    title: str
    source: str
    phases: Mapping[int, PhaseRecipe] = field(hash=False)


def read_platforms(value: Any, where: str, problems: list[str]) -> dict[str, Platform]:
    """The ``platforms`` mapping of a matrix file; what is wrong is added to ``problems``."""
    platforms: dict[str, Platform] = {}
    for name, body in _named(value, f"{where}: platforms", problems):
        table = Table(body, f"{where}: platform {name}", problems)
        platforms[name] = Platform(
            name=name,
            title=table.take("title", str),
            ranks_per_node=table.take("ranks_per_node", int, least=1),
            device=table.take("device", str, choices=("cuda", "cpu")),
            gpu=table.take("gpu", str, ""),
            gpu_memory_gb=table.take("gpu_memory_gb", float, 0.0, least=0),
            cpus_per_node=table.take("cpus_per_node", int, least=1),
            memory_gb=table.take("memory_gb", float, least=0),
            precisions=table.take("precisions", tuple, choices=PRECISIONS),
            published_as=table.take("published_as", tuple, ()),
        )
        if not platforms[name].precisions:
            problems.append(f"{where}: platform {name}: precisions must name at least one of {', '.join(PRECISIONS)}")
        table.close()
    return platforms


def read_recipes(value: Any, where: str, problems: list[str], known: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The recipes of one file. ``based_on`` takes an earlier recipe, of this file or ``known``, and changes what it names."""
    recipes: dict[str, Recipe] = {}
    for name, body in _named(value, f"{where}: recipes", problems):
        recipe = _read_recipe(name, body, f"{where}: recipe {name}", problems, {**known, **recipes})
        if recipe is not None:
            recipes[name] = recipe
    return recipes


def _read_recipe(name: str, body: Any, where: str, problems: list[str], known: Mapping[str, Recipe]) -> Recipe | None:
    table = Table(body, where, problems)
    base_name = table.take("based_on", str, "")
    if base_name and base_name not in known:
        problems.append(f"{where}: based_on names {base_name!r}, which is no recipe before it{suggestion(base_name, known)}")
        return None
    base = known.get(base_name)
    source = table.take("source", str)
    title = table.take("title", str)
    bodies = table.take("phases", dict, {} if base else ...)
    table.close()
    phases: dict[int, PhaseRecipe] = dict(base.phases) if base else {}
    for number, phase in bodies.items():
        if number not in (1, 2):
            problems.append(f"{where}: phases are 1 and 2, not {number!r}")
            continue
        phases[number] = _read_phase(number, phase, f"{where}, phase {number}", problems, phases.get(number))
    if 1 not in phases:
        problems.append(f"{where} has no phase 1")
    return Recipe(name, title, source, dict(sorted(phases.items())))


def _read_phase(number: int, body: Any, where: str, problems: list[str], base: PhaseRecipe | None) -> PhaseRecipe:
    table = Table(body, where, problems)

    def take(key: str, kind: type, **limits: Any) -> Any:
        return table.take(key, kind, ... if base is None else getattr(base, key), **limits)

    phase = PhaseRecipe(
        phase=number,
        max_seq_length=take("max_seq_length", int, least=8),
        max_predictions_per_seq=take("max_predictions_per_seq", int, least=1),
        max_steps=take("max_steps", int, least=1),
        global_batch=take("global_batch", int, least=1),
        learning_rate=take("learning_rate", float, least=0),
        warmup_proportion=take("warmup_proportion", float, least=0),
        optimizer=take("optimizer", str, choices=OPTIMIZERS),
        lr_schedule=take("lr_schedule", str, choices=SCHEDULES),
        num_steps_per_checkpoint=take("num_steps_per_checkpoint", int, least=1),
        options=read_options(table.take("options", dict, base.options if base else {}), where, problems),
    )
    if phase.warmup_proportion >= 1:
        problems.append(f"{where}: warmup_proportion is a share of max_steps below 1, not {phase.warmup_proportion}")
    table.close()
    return phase


def read_options(options: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """Further options of ``run_pretraining.py``; the names must be among :data:`OPTIONS`, values numbers, texts or true/false.

    Of :data:`SWITCHES` they must be true or false, of :data:`WORDS` one of their words. YAML reads ``on`` and
    ``off`` without quotes as true and false: of :data:`WORDS` they become words again.
    """
    options = {name: ("on" if value else "off") if name in WORDS and isinstance(value, bool) else value for name, value in options.items()}
    for name, value in options.items():
        if name not in OPTIONS:
            problems.append(f"{where}: unknown option {name!r}{suggestion(name, OPTIONS)}")
        elif not isinstance(value, (str, int, float)):
            problems.append(f"{where}: option {name} must be a number, text or true/false, not {value!r}")
        else:
            problems += [f"{where}: {problem}" for problem in value_problems(name, value)]
    return options


def value_problems(name: str, value: Any) -> list[str]:
    """What is wrong with the value of one of :data:`WORDS` or :data:`SWITCHES`; of other options nothing is known here."""
    if name in WORDS and value not in WORDS[name]:
        return [f"option {name} {value!r} is not known{suggestion(value, WORDS[name])}"]
    if name in SWITCHES and not isinstance(value, bool):
        return [f"option {name} is a switch: it must be true or false, not {value!r}"]
    return []


def _named(value: Any, where: str, problems: list[str]) -> list[tuple[str, Any]]:
    """The entries of a mapping whose keys are names; they become part of job names, so they are short and plain."""
    if not isinstance(value, dict):
        problems.append(f"{where} must be a mapping of names to descriptions")
        return []
    good = []
    for name, body in value.items():
        if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            good.append((name, body))
        else:
            problems.append(f"{where}: the name {name!r} must be made of letters (a-z), digits, - and _")
    return good
