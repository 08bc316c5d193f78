"""Recipes and platforms: the published values, inheritance, and what a file with mistakes says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from berth.launch.matrix import SLURM, load_matrix
from berth.launch.recipes import (
    OPTIMIZERS,
    OPTIONS,
    PRECISIONS,
    SCHEDULES,
    SWITCHES,
    WORDS,
    PhaseRecipe,
    read_options,
    read_platforms,
    read_recipes,
)  # fmt: skip

PHASE = {
    "max_seq_length": 128, "max_predictions_per_seq": 20, "max_steps": 10, "global_batch": 64, "learning_rate": 1e-2,
    "warmup_proportion": 0.1, "optimizer": "lamb", "lr_schedule": "poly", "num_steps_per_checkpoint": 5,
}  # fmt: skip


def test_the_public_recipe() -> None:
    lamb = load_matrix().recipes["lamb"]
    assert lamb.phases == {
        1: PhaseRecipe(1, 128, 20, 7038, 65536, 6e-3, 0.2843, "lamb", "poly", 200),
        2: PhaseRecipe(2, 512, 80, 1563, 32768, 4e-3, 0.128, "lamb", "poly", 200),
    }
    assert (lamb.phases[1].sequences, lamb.phases[2].sequences) == (461242368, 51216384)


def test_the_steps_of_the_public_recipe_stand_there_and_nowhere_else() -> None:
    found = [
        (path.relative_to(SLURM).as_posix(), number)
        for path in sorted(SLURM.rglob("*.y*ml"))
        for number in re.findall(r"\b(?:7038|1563)\b", path.read_text(encoding="utf-8"))
    ]
    assert found == [("recipes.yml", "7038"), ("recipes.yml", "1563")]


@pytest.mark.parametrize(("name", "batch"), [("lamb-65280", 65280), ("lamb-64512", 64512), ("lamb-65232", 65232)])
def test_a_based_recipe_changes_only_what_it_names(name: str, batch: int) -> None:
    recipes = load_matrix().recipes
    lamb, own = recipes["lamb"].phases, recipes[name].phases
    assert own[2] == lamb[2]
    assert own[1] == PhaseRecipe(1, 128, 20, lamb[1].max_steps, batch, 6e-3, 0.2843, "lamb", "poly", 200)


def test_a_based_recipe_keeps_the_options_it_does_not_name() -> None:
    problems: list[str] = []
    value = {
        "a": {"title": "t", "source": "s", "phases": {1: {**PHASE, "options": {"weight_decay": 0.1}}}},
        "b": {"title": "t", "source": "s", "based_on": "a", "phases": {1: {"max_steps": 11}}},
        "c": {"title": "t", "source": "s", "based_on": "b", "phases": {1: {"options": {"log_freq": 2}}}},
    }
    recipes = read_recipes(value, "r.yml", problems, {})
    assert problems == []
    assert (recipes["b"].phases[1].options, recipes["b"].phases[1].max_steps) == ({"weight_decay": 0.1}, 11)
    assert (recipes["c"].phases[1].options, recipes["c"].phases[1].max_steps) == ({"log_freq": 2}, 11)


def test_the_other_recipes() -> None:
    recipes = load_matrix().recipes
    assert list(recipes) == ["lamb", "lamb-65280", "lamb-64512", "lamb-65232", "adamw", "deepspeed", "azureml-adam", "demo", "tiny"]
    warm = {"lr_warmup_degree": 2, "lr_decay_rate": 0.9, "lr_decay_steps": 250, "lr_offset": 1e-3}
    assert recipes["deepspeed"].phases[1] == PhaseRecipe(1, 128, 20, 7500, 65536, 1.1e-2, 0.06, "lamb", "exponential", 200, warm)
    assert recipes["azureml-adam"].phases.keys() == {1}
    adamw = recipes["adamw"].phases
    assert adamw[1].max_steps + adamw[2].max_steps == 1_000_000
    assert (adamw[1].global_batch, adamw[1].learning_rate) == (256, 1e-4)
    assert round(adamw[1].warmup_proportion * adamw[1].max_steps, -2) == 10_000


def test_the_demonstration_and_the_toy_recipe() -> None:
    recipes = load_matrix().recipes
    assert recipes["demo"].phases == {
        1: PhaseRecipe(1, 128, 20, 1200, 64, 1e-2, 0.1, "lamb", "poly", 120),
        2: PhaseRecipe(2, 512, 80, 100, 16, 5e-3, 0.1, "lamb", "poly", 10),
    }
    assert recipes["tiny"].phases == {
        1: PhaseRecipe(1, 16, 4, 12, 16, 1e-2, 0.1, "lamb", "poly", 2),
        2: PhaseRecipe(2, 32, 4, 6, 16, 1e-2, 0.1, "lamb", "poly", 2),
    }


def test_names_are_those_of_run_pretraining() -> None:
    from berth.training import options

    flags = options.build_parser()._option_string_actions
    assert [name for name in OPTIONS if f"--{name}" not in flags] == []
    assert set(PRECISIONS) == set(options.PRECISIONS)
    assert set(SCHEDULES) == set(options.SCHEDULE_NAMES)
    assert set(OPTIMIZERS) == set(flags["--optimizer"].choices)


def test_run_pretraining_accepts_every_row(tmp_path: Path) -> None:
    from berth.training.options import parse_options

    for row in load_matrix().rows:
        phase = row.phase_recipe
        argv = [
            "--input_dir",
            str(SLURM),
            "--config_file",
            str(SLURM / "recipes.yml"),
            "--output_dir",
            str(tmp_path),
            "--precision",
            row.precision,
        ]
        argv += ["--train_batch_size", str(row.train_batch_size), "--gradient_accumulation_steps", str(row.accumulation)]
        for name in ("max_seq_length", "max_steps", "learning_rate", "warmup_proportion", "optimizer", "lr_schedule"):
            argv += [f"--{name}", str(getattr(phase, name))]
        for name, value in {**phase.options, **row.options}.items():
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        assert parse_options(argv).micro_batch == row.micro_batch, row.name


def test_every_mistake_of_a_recipe_is_named() -> None:
    problems: list[str] = []
    wrong = {**PHASE, "warmup_proportion": 1.5, "optimizer": "lamp", "max_step": 3, "options": {"weight_decoy": 1, "seed": 3}}
    value = {
        "a": {"title": "t", "source": "s", "phases": {1: wrong, 3: PHASE}},
        "b": {"title": "t", "source": "s", "based_on": "lamp"},
        "c": {"title": "t", "source": "s", "phases": {2: PHASE}},
        "d; rm": {},
        "é\n": {},
    }
    read_recipes(value, "r.yml", problems, {})
    assert [problem.partition(": ")[2].partition("; valid")[0].partition("? valid")[0] for problem in problems] == [
        "recipes: the name 'd; rm' must be made of letters (a-z), digits, - and _",
        "recipes: the name 'é\\n' must be made of letters (a-z), digits, - and _",
        "recipe a, phase 1: optimizer 'lamp' is not known; did you mean lamb",
        "recipe a, phase 1: unknown option 'weight_decoy'; did you mean weight_decay",
        "recipe a, phase 1: unknown option 'seed'",
        "recipe a, phase 1: warmup_proportion is a share of max_steps below 1, not 1.5",
        "recipe a, phase 1: unknown key 'max_step'; did you mean max_steps",
        "recipe a: phases are 1 and 2, not 3",
        "recipe b: based_on names 'lamp', which is no recipe before it",
        "recipe c has no phase 1",
    ]


def test_every_mistake_of_a_platform_is_named() -> None:
    problems: list[str] = []
    body = {"title": "t", "ranks_per_node": 0, "device": "gpu", "cpus_per_node": 1, "memory_gb": 1, "precisions": [], "gpus": 4}
    read_platforms({"x": body}, "c.yml", problems)
    assert problems == [
        "c.yml: platform x: ranks_per_node must be at least 1, not 0",
        "c.yml: platform x: device 'gpu' is not known; did you mean cpu? valid: cuda, cpu",
        "c.yml: platform x: precisions must name at least one of fp16, bf16, fp8, tf32, fp32",
        "c.yml: platform x: unknown key 'gpus'; did you mean gpu? valid: title, ranks_per_node, device, gpu, gpu_memory_gb, cpus_per_node, "
        "memory_gb, precisions, published_as",
    ]


def test_on_and_off_without_quotes_are_words():
    """YAML reads them as true and false; a switch that is off must not become one that is not mentioned."""
    values = yaml.safe_load("{compile: off, unpad: on, fused_loss: 'off', cuda_graphs: true, no_copy_ahead: false}")
    problems: list[str] = []
    assert read_options(values, "row", problems) == {
        "compile": "off", "unpad": "on", "fused_loss": "off", "cuda_graphs": True, "no_copy_ahead": False,
    }  # fmt: skip
    assert not problems


def test_words_and_switches_are_those_of_run_pretraining() -> None:
    """Every switch among the options is known as one, and every option that can be `off` has the words of its flag."""
    from berth.training import options

    flags = {name: options.build_parser()._option_string_actions[f"--{name}"] for name in OPTIONS}
    assert {name for name, flag in flags.items() if flag.nargs == 0} == set(SWITCHES)
    assert {name: tuple(flag.choices) for name, flag in flags.items() if flag.choices and "off" in flag.choices} == WORDS


def test_values_that_are_none_are_named() -> None:
    values = yaml.safe_load(
        "{compile: on, unpad: maybe, fused_loss: 1, cuda_graphs: 'yes', no_copy_ahead: 0, weight_decay: 0.1, whole_word_mask: on}"
    )
    problems: list[str] = []
    read_options(values, "row", problems)
    assert problems == [
        "row: option compile 'on' is not known; valid: auto, off, layers, model",
        "row: option unpad 'maybe' is not known; valid: auto, on, off",
        "row: option fused_loss 1 is not known; valid: auto, on, off",
        "row: option cuda_graphs is a switch: it must be true or false, not 'yes'",
        "row: option no_copy_ahead is a switch: it must be true or false, not 0",
    ]
