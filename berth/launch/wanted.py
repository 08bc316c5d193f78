"""Batches as people give them (a GPU's batch, its cuts) on the allocation they got -> a row of the matrix.

What is not given follows: the batch from the recipe's global batch, the cuts from the platform's micro-batch. What does not come out even
is an error with the values that do; nothing is rounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from berth.errors import ConfigError
from berth.launch.matrix import SIXTEEN_BIT, Matrix, PhaseRecipe, Recipe, Row
from berth.launch.rows import DEFAULT_RECIPE

BY_HAND = "variables of the job"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is said of a row; ``None`` where the matrix decides.

    ``batch``: sequences a rank and optimizer step; ``cuts``: accumulation; ``global_batch``: only where it is not to be the recipe's;
    ``changes``: other values of fields of the recipe's phase.
    """

    phase: int
    recipe: str | None
    precision: str | None
    batch: int | None
    cuts: int | None
    global_batch: int | None
    changes: Mapping[str, Any]


def wanted_row(wanted: Wanted, matrix: Matrix, platform: str, nodes: int, ranks: int | None) -> Row:
    """The row of the matrix for ``nodes`` nodes of ``ranks`` tasks (all GPUs if not said), with what ``wanted`` changes.

    Raises :class:`ConfigError` for names that are not known and batches that do not come out, with the values that would.
    """
    whole = matrix.platforms[platform].ranks_per_node
    ranks = ranks or whole
    free = wanted.batch is None and wanted.cuts is None and wanted.global_batch is None
    try:
        usual = matrix.default_row(platform, nodes, wanted.phase, wanted.precision, wanted.recipe, ranks_per_node=ranks)
    except ConfigError:  # the matrix knows no batch for this; the variables may
        if free and ranks == whole:
            raise
        row = _computed(wanted, matrix, platform, nodes, ranks, wanted.recipe or DEFAULT_RECIPE)
    else:
        row = usual if free else _computed(wanted, matrix, platform, nodes, ranks, usual.recipe.name)
    recipe = _changed(row.recipe, row.phase, wanted.changes)
    return row if recipe == row.recipe else dataclasses.replace(row, recipe=recipe, source=BY_HAND)


def _computed(wanted: Wanted, matrix: Matrix, platform: str, nodes: int, ranks: int, name: str) -> Row:
    """The row of the batches that are given; those that are not follow from recipe ``name`` and the platform's micro-batch."""
    phase, precision = wanted.phase, wanted.precision or matrix.platforms[platform].precisions[0]
    matrix.select(platform, phase=phase, precision=precision, recipe=name)  # names what is unknown
    recipe = matrix.recipes[name]
    if phase not in recipe.phases:
        raise ConfigError(f"recipe {name} has no phase {phase}")
    usual = recipe.phases[phase].global_batch
    total = wanted.global_batch or usual
    source = f"recipe {name} has {total} in phase {phase}" if wanted.global_batch is None else f"GLOBAL_BATCH={total}"
    batch = _batch(wanted.batch, total, nodes, ranks, source)
    if wanted.cuts is None:
        micro_batch = _micro_batch(matrix, platform, precision, recipe.phases[phase], name, batch)
    elif batch % wanted.cuts:
        raise ConfigError(f"TRAIN_BATCH_SIZE={batch} is not divisible by GRADIENT_ACCUMULATION_STEPS={wanted.cuts}")
    else:
        micro_batch = batch // wanted.cuts
    if total == usual:
        return matrix.make_row(platform, nodes, phase, precision, micro_batch, name, ranks_per_node=ranks, source=BY_HAND)
    changed = _changed(recipe, phase, {"global_batch": total})
    return Row(matrix.platforms[platform], nodes, phase, precision, micro_batch, changed, ranks, BY_HAND)


def _batch(batch: int | None, total: int, nodes: int, ranks: int, source: str) -> int:
    """Sequences a rank and step that make ``total``. Raises :class:`ConfigError` naming the values that would."""
    world, where = nodes * ranks, f"{nodes} nodes x {ranks} ranks"
    even = total % world == 0
    if batch is None:
        if even:
            return total // world
        nearest = " or ".join(f"GLOBAL_BATCH={count * world}" for count in (total // world, total // world + 1) if count)
        raise ConfigError(f"{source}, which {where} cannot share evenly; set {nearest}")
    if batch * world != total:
        fix = f"TRAIN_BATCH_SIZE={total // world}, or " if even else ""
        raise ConfigError(
            f"TRAIN_BATCH_SIZE={batch} on {where} is a global batch of {batch * world}, but {source}; set {fix}GLOBAL_BATCH={batch * world} "
            "to mean it"
        )
    return batch


def _micro_batch(matrix: Matrix, platform: str, precision: str, phase: PhaseRecipe, recipe: str, batch: int) -> int:
    """The micro-batch of the platform's rows for this sequence length and width; it is a GPU's, so it holds for any number of them."""
    fitting = [
        row
        for row in matrix.select(platform)
        if row.phase_recipe.max_seq_length == phase.max_seq_length
        and (row.precision in SIXTEEN_BIT) == (precision in SIXTEEN_BIT)
        and batch % row.micro_batch == 0
    ]
    if not fitting:
        raise ConfigError(
            f"no row of platform {platform} tells a micro-batch for length {phase.max_seq_length} in {precision} that divides "
            f"TRAIN_BATCH_SIZE={batch}; set GRADIENT_ACCUMULATION_STEPS"
        )
    return min(fitting, key=lambda row: (row.recipe.name != recipe, row.precision != precision)).micro_batch


def _changed(recipe: Recipe, phase: int, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values of one phase."""
    return dataclasses.replace(recipe, phases={**recipe.phases, phase: dataclasses.replace(recipe.phases[phase], **values)})
