"""Rows of the performance matrix: what is free stands in a row, what follows is computed and checked.

The batch algebra: ``global_batch = micro_batch * accumulation * world_size``. The recipe says the global batch, the row the micro-batch and
the nodes; a row that does not come out even is an error that names the nearest values that do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from berth.errors import ConfigError
from berth.launch.recipes import PRECISIONS, PhaseRecipe, Platform, Recipe, read_options
from berth.launch.yamlfile import Table, raise_problems

DEFAULT_RECIPE = "lamb"


@dataclass(frozen=True)
class Row:
    """One run of the matrix. Batches count sequences: ``micro_batch`` a GPU and forward pass, ``train_batch_size`` a GPU and step.

    Raises :class:`ConfigError` with everything that is wrong, each with the nearest values that would do.
    """

    platform: Platform
    nodes: int
    phase: int
    precision: str
    micro_batch: int
    recipe: Recipe
    ranks_per_node: int | None = None
    source: str = ""
    aliases: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        raise_problems(row_problems(self))

    @property
    def phase_recipe(self) -> PhaseRecipe:
        """The recipe of this row's phase."""
        return self.recipe.phases[self.phase]

    @property
    def ranks(self) -> int:
        """Processes a node: as many as it has GPUs, unless the row says otherwise."""
        return self.ranks_per_node or self.platform.ranks_per_node

    @property
    def world_size(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.ranks

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step over all processes."""
        return self.phase_recipe.global_batch

    @property
    def train_batch_size(self) -> int:
        """Sequences of one optimizer step a process, before accumulation (``--train_batch_size``)."""
        return self.global_batch // self.world_size

    @property
    def accumulation(self) -> int:
        """Forward passes an optimizer step (``--gradient_accumulation_steps``)."""
        return self.train_batch_size // self.micro_batch

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the phase."""
        return self.phase_recipe.learning_rate

    @property
    def job_name(self) -> str:
        """``<platform>_<nodes>x<ranks>x<micro-batch>x<accumulation>``."""
        return f"{self.platform.name}_{self.nodes}x{self.ranks}x{self.micro_batch}x{self.accumulation}"

    @property
    def name(self) -> str:
        """Unique in the matrix: the job name and precision; outside the default recipe, recipe and phase too.

        The default recipe's phases differ in their global batch, so their job names differ already.
        """
        tail = "" if self.recipe.name == DEFAULT_RECIPE else f"_{self.recipe.name}-p{self.phase}"
        return f"{self.job_name}_{self.precision}{tail}"


def row_problems(row: Row) -> list[str]:
    """Everything that keeps ``row`` from running, one sentence each."""
    platform, who = (
        row.platform,
        f"{row.platform.name}, {row.nodes} nodes, phase {row.phase}, {row.precision}, micro-batch {row.micro_batch}",
    )
    problems = []
    if row.phase not in row.recipe.phases:
        problems.append(f"{who}: recipe {row.recipe.name} has no phase {row.phase}, only {', '.join(map(str, row.recipe.phases))}")
    if row.precision not in platform.precisions:
        problems.append(f"{who}: {platform.name} has no precision {row.precision!r}; valid: {', '.join(platform.precisions)}")
    if platform.device == "cuda" and row.ranks > platform.ranks_per_node:
        problems.append(f"{who}: {row.ranks} ranks a node, but {platform.name} has {platform.ranks_per_node} GPUs a node")
    if row.nodes < 1 or row.micro_batch < 1 or row.ranks < 1:
        problems.append(f"{who}: nodes, ranks a node and micro-batch must be at least 1")
    elif row.phase in row.recipe.phases and row.global_batch % (row.world_size * row.micro_batch):
        a_pass = row.world_size * row.micro_batch
        problems.append(
            f"{who}: one forward pass of {row.world_size} ranks takes {a_pass} sequences, which do not divide the global batch "
            f"{row.global_batch} of recipe {row.recipe.name}; nearest that do: {_nearest(row)}"
        )
    return problems


def _nearest(row: Row) -> str:
    """The nearest micro-batches, node counts and global batches that make the batch algebra of ``row`` come out."""
    total, a_pass = row.global_batch, row.world_size * row.micro_batch
    each, rest = divmod(total, row.world_size)
    ways = []
    if not rest:
        ways.append(f"micro-batch {_around(row.micro_batch, _divisors(each))}")
    on_a_node = row.ranks * row.micro_batch
    if total % on_a_node == 0:
        nodes = _divisors(total // on_a_node)
        ways.append(f"{_around(row.nodes, nodes)} nodes with micro-batch {row.micro_batch}")
    batches = [a_pass * count for count in (total // a_pass, total // a_pass + 1) if count]
    ways.append(f"a recipe (based_on: {row.recipe.name}) with global batch {' or '.join(map(str, batches))}")
    return "; ".join(ways)


def _divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})


def _around(wanted: int, numbers: list[int]) -> str:
    """The closest of ``numbers`` (ascending) below and above ``wanted``."""
    below, above = [number for number in numbers if number < wanted], [number for number in numbers if number > wanted]
    return " or ".join(str(number) for number in [*below[-1:], *above[:1]])


def read_group(body: Any, where: str, platforms: Mapping[str, Platform], recipes: Mapping[str, Recipe], problems: list[str]) -> list[Row]:
    """One group of rows of a matrix file: rows that share a source, perhaps a recipe and options. Mistakes go to ``problems``."""
    table = Table(body, where, problems)
    source, lines = table.take("source", str), table.take("rows", list)
    recipe = table.take("recipe", str, DEFAULT_RECIPE, choices=recipes)
    options = read_options(table.take("options", dict, {}), where, problems)
    table.close()
    rows = []
    for number, line in enumerate(lines, 1):
        before = len(problems)
        place = f"{where}, row {number}"
        row = Table(line, place, problems)
        values: dict[str, Any] = {
            "platform": row.take("platform", str, choices=platforms),
            "nodes": row.take("nodes", int, least=1),
            "phase": row.take("phase", int, choices=(1, 2)),
            "precision": row.take("precision", str, choices=PRECISIONS),
            "micro_batch": row.take("micro_batch", int, least=1),
            "ranks_per_node": row.take("ranks_per_node", int, None, least=1),
            "aliases": row.take("alias", tuple, ()),
            "options": {**options, **read_options(row.take("options", dict, {}), place, problems)},
        }
        chosen = row.take("recipe", str, recipe, choices=recipes)
        row.close()
        if len(problems) > before or chosen not in recipes:
            continue
        values["platform"] = platforms[values["platform"]]
        try:
            rows.append(Row(**values, recipe=recipes[chosen], source=source))
        except ConfigError as error:
            problems.append(f"{place}: {error}")
    return rows
