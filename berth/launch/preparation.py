"""The configuration of ``data.prepare`` seen from the login node: would it make what the phases of a plan read?

In: its YAML file, the plan's work folder, the recipes of the phases. Out: problems and notes. ``data.prepare`` itself checks every option; its
parsers need numpy and more, so that here only what goes wrong between preparation and training is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from berth.launch.clusters import ROOT
from berth.launch.recipes import PhaseRecipe
from berth.launch.yamlfile import read_yaml


def problems(path: Path, workdir: Path, recipes: Sequence[PhaseRecipe]) -> tuple[list[str], list[str]]:
    """Errors and notes. Raises :class:`~berth.errors.ConfigError` for a file that is missing or no YAML."""
    config = read_yaml(path)
    if not isinstance(config, dict):
        return [f"{path} must hold 'name: value' pairs, the configuration of data.prepare"], []
    errors, notes = _paths(path, config, workdir), []
    shapes = _shapes(config)
    if shapes is None:
        notes.append(
            f"{path}: the lengths of its records are the defaults of data.prepare, whose packages are not installed here; not checked"
        )
        return errors, notes
    for recipe in recipes:
        wanted = (recipe.max_seq_length, recipe.max_predictions_per_seq)
        if wanted not in shapes and not recipe.options.get("dynamic_masking"):
            there = "; ".join(f"{length} and {predictions}" for length, predictions in shapes) or "none"
            errors.append(
                f"{path}: phase {recipe.phase} reads records of max_seq_length {wanted[0]} and max_predictions_per_seq {wanted[1]}, but its section "
                f"records makes: {there}; add them, or choose a recipe with these lengths"
            )
    return errors, notes


def _paths(path: Path, config: dict[str, Any], workdir: Path) -> list[str]:
    """Work folder and inputs. A relative path is seen from the current folder for the first, from the project's in the job."""
    found = []
    if isinstance(config.get("workdir"), str) and Path(config["workdir"]).expanduser().absolute() != workdir:
        found.append(f"{path}: its workdir is {config['workdir']}, the run's {workdir}; make them the same")
    inputs = config.get("input")
    wanted = [("input", one) for one in (inputs if isinstance(inputs, list) else [inputs])] + [("vocab_file", config.get("vocab_file"))]
    for what, value in wanted:
        if isinstance(value, str) and not (ROOT / Path(value).expanduser()).exists():
            relative = "" if Path(value).is_absolute() else f" seen from {ROOT}, where the job runs: write an absolute path"
            found.append(f"{path}: {what} {value} does not exist{relative}")
    if not inputs and not config.get("download"):
        found.append(f"{path}: there is nothing to prepare: give input, or a download section")
    return found


def _shapes(config: dict[str, Any]) -> list[tuple[int, int]] | None:
    """``(max_seq_length, max_predictions_per_seq)`` of the records it makes; ``None`` where they are defaults that cannot be read here."""
    sections = config.get("records")
    if sections is False:
        return []
    sections = sections if isinstance(sections, list) else [sections if isinstance(sections, dict) else {}]
    keys = ("max_seq_length", "max_predictions_per_seq")
    if all(isinstance(section, dict) and all(key in section for key in keys) for section in sections):
        return [(section[keys[0]], section[keys[1]]) for section in sections]
    try:
        from berth.prepare import PHASES
        from berth.records.options import RecordOptions
    except ImportError:
        return None
    if len(sections) == 1 and isinstance(sections[0], dict) and keys[0] not in sections[0]:
        sections = [{**phase, **sections[0]} for phase in PHASES]
    usual = (RecordOptions.max_seq_length, RecordOptions.max_predictions_per_seq)
    return [(section.get(keys[0], usual[0]), section.get(keys[1], usual[1])) for section in sections if isinstance(section, dict)]
