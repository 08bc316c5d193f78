"""The performance matrix: ``slurm/configurations.yml`` and ``slurm/recipes.yml`` in, rows with computed batches out.

A row holds what is free (platform, nodes, phase, precision, micro-batch) and names its recipe; accumulation, batches, learning rate and
names follow. A row whose batches do not come out even is an error that names the nearest that do: a batch is never guessed or rounded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import berth
from berth.errors import ConfigError
from berth.launch.published import Published, load_published
from berth.launch.recipes import PRECISIONS, PhaseRecipe, Platform, Recipe, read_platforms, read_recipes
from berth.launch.rows import DEFAULT_RECIPE, Row, read_group
from berth.launch.yamlfile import Table, raise_problems, read_yaml, suggestion

__all__ = ["Matrix", "PhaseRecipe", "Platform", "Published", "Recipe", "Row", "load_matrix", "parse_range", "parse_select"]

SLURM = Path(berth.__file__).resolve().parent.parent / "slurm"
MOST_NODES = 100_000  # a slip of the finger, not a cluster
SELECTORS = ("platform", "nodes", "phase", "precision", "recipe")
SIXTEEN_BIT = ("fp16", "bf16", "fp8")  # no activation is wider, and fp8 keeps some in 8 bits; the rest keeps them in 32


@dataclass(frozen=True)
class Matrix:
    """Platforms, recipes and rows by name, and the published throughput beside them."""

    platforms: Mapping[str, Platform]
    recipes: Mapping[str, Recipe]
    rows: tuple[Row, ...]
    folder: Path = SLURM

    @cached_property
    def published(self) -> tuple[Published, ...]:
        """Every row of ``published.yml``; read on first use."""
        return load_published(self.folder / "published.yml")

    def row(self, name: str, phase: int | None = None) -> Row:
        """The row of a name, or of a job name or alias that only one row (of ``phase``) has. Raises :class:`ConfigError`."""
        rows = [row for row in self.rows if phase in (None, row.phase)]
        found = [row for row in rows if row.name == name] or [row for row in rows if name == row.job_name or name in row.aliases]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"the row name {name!r} is ambiguous: it can be {' or '.join(row.name for row in found)}")
        names = [*(row.name for row in rows), *(alias for row in rows for alias in row.aliases)]
        close = suggestion(name, names).partition(" valid:")[0]  # the matrix is too long to print here
        raise ConfigError(f"no row {name!r} in the matrix{close} `list` shows all")

    def select(
        self,
        platform: str | None = None,
        nodes: Collection[int] | None = None,
        phase: int | None = None,
        precision: str | None = None,
        recipe: str | None = None,
    ) -> list[Row]:
        """The rows that have all of what is given, in the order of the file. Raises :class:`ConfigError` for unknown names."""
        problems = [
            f"{kind} {wanted!r} is not known{suggestion(wanted, valid)}"
            for kind, wanted, valid in (
                ("platform", platform, self.platforms),
                ("phase", phase, (1, 2)),
                ("precision", precision, PRECISIONS),
                ("recipe", recipe, self.recipes),
            )
            if wanted is not None and wanted not in valid
        ]
        raise_problems(problems)
        return [
            row
            for row in self.rows
            if platform in (None, row.platform.name)
            and (nodes is None or row.nodes in nodes)
            and phase in (None, row.phase)
            and precision in (None, row.precision)
            and recipe in (None, row.recipe.name)
        ]

    def default_row(
        self,
        platform: str,
        nodes: int,
        phase: int,
        precision: str | None = None,
        recipe: str | None = None,
        ranks_per_node: int | None = None,
    ) -> Row:
        """What ``nodes`` nodes (full ones, unless ``ranks_per_node`` is given) run: the row of the matrix, else one derived.

        Derived: the micro-batch of the rows of this platform, sequence length and width (16 or 32 bits), of the same recipe if there
        are any, from the largest node count not above ``nodes``, else the smallest above; its options too where precision and recipe
        are the same. Without ``recipe`` the default one where the
        platform has rows of it. Raises :class:`ConfigError` when no row tells a micro-batch or the batches do not come out even.
        """
        full = [row for row in self.select(platform) if row.ranks == (ranks_per_node or row.platform.ranks_per_node)]
        wanted = precision or self.platforms[platform].precisions[0]
        recipe = recipe or _usual_recipe([row for row in full if row.phase == phase], nodes, wanted)
        for row in full:
            if (row.nodes, row.phase, row.precision, row.recipe.name) == (nodes, phase, wanted, recipe):
                return row
        length = self._phase(recipe, phase).max_seq_length
        similar = [
            row for row in full if row.phase_recipe.max_seq_length == length and (row.precision in SIXTEEN_BIT) == (wanted in SIXTEEN_BIT)
        ]
        if not similar:
            raise ConfigError(
                f"no row of platform {platform} tells a micro-batch for sequence length {length} in {wanted} (phase {phase} of recipe "
                f"{recipe}); give one (--micro_batch), or add a row to slurm/configurations.yml"
            )
        base = min(similar, key=lambda row: (row.recipe.name != recipe, row.nodes > nodes, abs(row.nodes - nodes), row.precision != wanted))
        alike = (base.precision, base.recipe.name) == (wanted, recipe)  # how gradients are sent depends on the precision
        return self.make_row(
            platform, nodes, phase, wanted, base.micro_batch, recipe, ranks_per_node=ranks_per_node, options=base.options if alike else None,
            source=f"derived from {base.name}",
        )  # fmt: skip

    def make_row(
        self,
        platform: str,
        nodes: int,
        phase: int,
        precision: str,
        micro_batch: int,
        recipe: str,
        *,
        ranks_per_node: int | None = None,
        options: Mapping[str, Any] | None = None,
        source: str = "given by the user",
    ) -> Row:
        """A checked row of these values; the one of the matrix if it holds it. Raises :class:`ConfigError`."""
        self.select(platform, None, phase, precision, recipe)  # names what is unknown
        self._phase(recipe, phase)
        made = Row(
            self.platforms[platform], nodes, phase, precision, micro_batch, self.recipes[recipe], ranks_per_node, source,
            options=options or {},
        )  # fmt: skip
        return next((row for row in self.rows if row.name == made.name and options in (None, row.options)), made)

    def published_for(self, row: Row) -> list[Published]:
        """What was published for exactly this hardware, number of GPUs, phase, length, precision and micro-batch; newest first."""
        return [
            one
            for one in self.published
            if one.hardware in row.platform.published_as
            and (one.nodes, one.gpus_per_node) == (row.nodes, row.ranks)
            and (one.phase, one.seq_len) == (row.phase, row.phase_recipe.max_seq_length)
            and (one.precision, one.micro_batch) == (row.precision, row.micro_batch)
        ]

    def _phase(self, recipe: str, phase: int) -> PhaseRecipe:
        if recipe not in self.recipes:
            raise ConfigError(f"recipe {recipe!r} is not known{suggestion(recipe, self.recipes)}")
        phases = self.recipes[recipe].phases
        if phase not in phases:
            raise ConfigError(f"recipe {recipe} has no phase {phase}; it has {' and '.join(map(str, phases))}")
        return phases[phase]


def _usual_recipe(rows: Collection[Row], nodes: int, precision: str) -> str:
    """The default recipe where a platform's ``rows`` have it; else that of its rows of ``nodes``, else of its first row."""
    names = [row.recipe.name for row in rows]
    if DEFAULT_RECIPE in names or not names:
        return DEFAULT_RECIPE
    return next((row.recipe.name for row in rows if (row.nodes, row.precision) == (nodes, precision)), names[0])


def load_matrix(folder: Path | None = None, extra: Collection[Path] = ()) -> Matrix:
    """The matrix of ``folder`` (the project's ``slurm`` by default) and of ``extra`` files, which may add platforms, recipes and rows.

    Raises :class:`ConfigError` that lists every mistake of every file.
    """
    folder = folder or SLURM
    problems: list[str] = []
    platforms: dict[str, Platform] = {}
    recipes: dict[str, Recipe] = {}
    rows: list[Row] = []
    for path in (folder / "recipes.yml", folder / "configurations.yml", *extra):
        table = Table(read_yaml(path), str(path), problems)
        found_platforms = read_platforms(table.take("platforms", dict, {}), str(path), problems)
        found_recipes = read_recipes(table.take("recipes", dict, {}), str(path), problems, recipes)
        groups = table.take("rows", list, [])
        table.close()
        twice = [*(found_platforms.keys() & platforms.keys()), *(found_recipes.keys() & recipes.keys())]
        problems += [f"{path}: {name} is there already; choose another name" for name in twice]
        platforms.update(found_platforms)
        recipes.update(found_recipes)
        for number, group in enumerate(groups, 1):
            rows += read_group(group, f"{path}: rows, group {number}", platforms, recipes, problems)
    names = [row.name for row in rows]
    problems += [f"the row {name} is there {names.count(name)} times; keep one" for name in dict.fromkeys(names) if names.count(name) > 1]
    raise_problems(problems, "the performance matrix has mistakes:")
    return Matrix(platforms, recipes, tuple(rows), folder)


def parse_range(text: str) -> tuple[int, ...]:
    """``4``, ``1,2,4`` or ``1..32`` (both ends included), also mixed, as ascending node counts. Raises :class:`ConfigError`."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        ends = (first, last if dots else first)
        if not all(end.isascii() and end.isdigit() and 0 < int(end) <= MOST_NODES for end in ends) or int(ends[0]) > int(ends[1]):
            raise ConfigError(f"{text!r} is no list of node counts; write 4, 1,2,4 or 1..32, with counts from 1 to {MOST_NODES}")
        numbers.update(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(sorted(numbers))


def parse_select(text: str) -> dict[str, Any]:
    """``platform=dgx-a100-80g,precision=fp16`` as arguments of :meth:`Matrix.select`. Raises :class:`ConfigError`."""
    chosen: dict[str, Any] = {}
    problems = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in SELECTORS:
            problems.append(f"the filter {part!r} must be <key>=<value>{suggestion(key, SELECTORS)}")
        elif key in chosen:
            problems.append(f"the filter {key} is given twice")
        elif key == "phase" and value not in ("1", "2"):
            problems.append(f"the filter phase must be 1 or 2, not {value!r}")
        else:
            chosen[key] = int(value) if key == "phase" else parse_range(value) if key == "nodes" else value
    raise_problems(problems)
    return chosen
