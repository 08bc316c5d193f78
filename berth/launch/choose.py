"""What the options of ``python -m slurm.launch`` ask for: parsed options in, rows of the matrix, a site and a plan out.

Options that contradict each other, or that nothing would read, are errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from berth.errors import ConfigError
from berth.launch import clusters, plan
from berth.launch.estimate import walltime_estimate
from berth.launch.inputs import defaults
from berth.launch.matrix import Matrix, Row, load_matrix, parse_range, parse_select
from berth.launch.parser import PHASES
from berth.launch.rows import DEFAULT_RECIPE
from berth.launch.variables import model_config
from berth.launch.yamlfile import collected, raise_problems, read_yaml


def request(arguments: argparse.Namespace) -> tuple[plan.Plan, dict[int, Row], Matrix]:
    """What plan, validate, render and submit are about: the plan, its rows ``{phase: row}``, the matrix. Raises :class:`ConfigError`."""
    matrix = load_matrix(extra=[Path(file) for file in arguments.matrix])
    wrong: list[str] = []
    cluster = run = None
    rows: dict[int, Row] = {}
    with collected(wrong):
        cluster = site(arguments)
    if cluster is not None or arguments.row or arguments.platform:
        with collected(wrong):
            rows = chosen_rows(arguments, matrix, cluster)
    if cluster is not None:
        with collected(wrong):
            run = make_run(arguments, cluster, next(iter(rows.values()), None))
    raise_problems(wrong, "" if len(wrong) == 1 else f"{len(wrong)} mistakes:")
    assert cluster is not None and run is not None
    stages = [*(["prepare"] if arguments.prepare else []), *(f"phase{phase}" for phase in rows)]
    if arguments.export or (arguments.phase == "all" and run.vocab_file is not None):
        stages.append("export")
    return plan.make_plan(run, cluster, rows, stages, hours=_hours(rows, matrix, run.steps_this_run)), rows, matrix


def studied(arguments: argparse.Namespace) -> tuple[list[tuple[plan.Plan, dict[int, Row]]], Matrix]:
    """The plans of ``matrix run``, one a row, each with its row, below one folder. Raises :class:`ConfigError`."""
    matrix, rows = selected(arguments)
    if not rows:
        raise ConfigError("no row of the matrix has all of that; see list")
    cluster = site(arguments)
    return [study(arguments, cluster, row, matrix) for row in rows], matrix


def study(arguments: argparse.Namespace, cluster: clusters.Cluster, row: Row, matrix: Matrix) -> tuple[plan.Plan, dict[int, Row]]:
    """One row of a study as a plan: some steps, no checkpoint."""
    run = make_run(arguments, cluster, row)
    run = dataclasses.replace(run, results=f"{run.results}/{arguments.name}", name=row.name, study=True)
    rows = {row.phase: row}
    return plan.make_plan(run, cluster, rows, [f"phase{row.phase}"], hours=_hours(rows, matrix, run.steps_this_run)), rows


def selected(arguments: argparse.Namespace) -> tuple[Matrix, list[Row]]:
    """The matrix, and its rows that pass the filters. Raises :class:`ConfigError`."""
    matrix = load_matrix(extra=[Path(file) for file in arguments.matrix])
    chosen = parse_select(arguments.select)
    if arguments.nodes:
        if "nodes" in chosen:
            raise ConfigError("--nodes and nodes= in --select say the same; give one of them")
        chosen["nodes"] = parse_range(arguments.nodes)
    return matrix, matrix.select(**chosen)


def site(arguments: argparse.Namespace) -> clusters.Cluster:
    """The profile of ``--cluster``. Raises :class:`ConfigError`.

    On this machine (``--backend local``) this very Python runs the programs, outside any container.
    """
    if arguments.cluster is None:
        raise ConfigError(
            f"--cluster NAME is missing: a profile in slurm/clusters, or the path of one; there are: {', '.join(clusters.names())}"
        )
    cluster = clusters.load_cluster(arguments.cluster)
    if getattr(arguments, "backend", None) == "local":
        return dataclasses.replace(cluster, python=sys.executable, container=None)
    return cluster


def _hours(rows: Mapping[int, Row], matrix: Matrix, steps: int | None) -> dict[int, float]:
    """Estimated hours of each phase, or of its first ``steps``, where something was published."""
    shares = {phase: min(1.0, (steps or row.phase_recipe.max_steps) / row.phase_recipe.max_steps) for phase, row in rows.items()}
    estimates = {phase: walltime_estimate(row, matrix) for phase, row in rows.items()}
    return {phase: estimate.hours * shares[phase] for phase, estimate in estimates.items() if estimate is not None}


def chosen_rows(arguments: argparse.Namespace, matrix: Matrix, cluster: clusters.Cluster | None) -> dict[int, Row]:
    """``{phase: row}`` of --row, --row_phase2, or --platform and --nodes. Raises :class:`ConfigError`.

    An alias that rows of both phases have (a preset) means both. Of all phases those that the first row's recipe has.
    """
    phases = [int(stage[-1]) for stage in PHASES[arguments.phase]]
    problems = []
    if arguments.row is not None and arguments.platform is not None:
        problems.append("--row says the platform already; leave out --platform, or --row")
    if arguments.row_phase2 is not None and len(phases) == 1:
        problems.append(f"--row_phase2 is for --phase all; with --phase {arguments.phase} give --row")
    raise_problems(problems)
    first = _first_row(arguments, matrix, cluster, phases[0])
    rows = {phases[0]: first}
    for phase in phases[1:]:
        if arguments.row_phase2 is not None:
            rows[phase] = _changed(arguments, matrix, _named(matrix, arguments.row_phase2, phase, "--row_phase2"), None)
        elif any(arguments.row in row.aliases for row in matrix.rows if row.phase == phase):
            rows[phase] = _changed(arguments, matrix, matrix.row(arguments.row, phase), None)
        elif phase in first.recipe.phases:
            rows[phase] = matrix.default_row(
                first.platform.name, first.nodes, phase, first.precision, first.recipe.name, ranks_per_node=first.ranks_per_node
            )
    return rows


def _first_row(arguments: argparse.Namespace, matrix: Matrix, cluster: clusters.Cluster | None, phase: int) -> Row:
    if arguments.row is not None:
        return _changed(arguments, matrix, _named(matrix, arguments.row, phase, "--row"), arguments.micro_batch)
    platform = arguments.platform or (cluster.platform if cluster else None)
    if platform is None or arguments.nodes is None:
        raise ConfigError("say what to run: --row NAME (see list), or --platform and --nodes")
    recipe = arguments.recipe or (cluster.recipe if cluster else None)
    if arguments.micro_batch is None:
        return matrix.default_row(platform, arguments.nodes, phase, arguments.precision, recipe)
    matrix.select(platform)  # names an unknown one
    precision = arguments.precision or matrix.platforms[platform].precisions[0]
    return matrix.make_row(platform, arguments.nodes, phase, precision, arguments.micro_batch, recipe or DEFAULT_RECIPE)


def _named(matrix: Matrix, name: str, phase: int, option: str) -> Row:
    """The row of a name; one that is of the other phase gets a message of its own."""
    if not any(name in (row.name, row.job_name, *row.aliases) for row in matrix.rows if row.phase == phase):
        other = matrix.row(name)  # raises for a name that is nowhere
        raise ConfigError(f"{option} {name} is a row of phase {other.phase}, here one of phase {phase} is needed; see --phase and list")
    return matrix.row(name, phase)


def _changed(arguments: argparse.Namespace, matrix: Matrix, row: Row, micro_batch: int | None) -> Row:
    """The row with what the options change. Micro-batch and options of a row are those of its precision: another one has its own."""
    if all(value is None for value in (arguments.nodes, arguments.precision, arguments.recipe, micro_batch)):
        return row
    platform, nodes = row.platform.name, row.nodes if arguments.nodes is None else arguments.nodes
    precision, recipe = arguments.precision or row.precision, arguments.recipe or row.recipe.name
    if precision != row.precision and micro_batch is None:
        return matrix.default_row(platform, nodes, row.phase, precision, recipe, ranks_per_node=row.ranks_per_node)
    return matrix.make_row(
        platform, nodes, row.phase, precision, row.micro_batch if micro_batch is None else micro_batch, recipe,
        ranks_per_node=row.ranks_per_node, options=row.options if precision == row.precision else None,
    )  # fmt: skip


def make_run(arguments: argparse.Namespace, cluster: clusters.Cluster, row: Row | None) -> plan.Run:
    """Folders and choices of the run; without a first ``row`` only to find what is wrong. Raises :class:`ConfigError`."""
    wrong: list[str] = []
    if arguments.time is not None:
        with collected(wrong):
            clusters.seconds(arguments.time)
    wrong += [
        f"--{name} {value} must be at least {least}"
        for name, value, least in (("steps", arguments.steps, 1), ("seed", arguments.seed, 0))
        if value is not None and value < least
    ]
    here = Path.cwd()
    prepare = getattr(arguments, "prepare", None)
    workdir = prepared_folder(Path(prepare)) if prepare else None
    data = _absolute(arguments.data) or workdir or cluster.data
    if data is None:
        wrong.append(f"where is the data? --data DIR (records, or work folder of data.prepare), or paths.data in {cluster.file}")
    raise_problems(wrong)
    assert data is not None
    config, vocabulary = defaults(Path(data))
    if workdir is not None:  # not made yet
        config, vocabulary = Path(workdir) / "vocab" / "bert_config.json", Path(workdir) / "vocab" / "vocab.txt"
    return plan.Run(
        name=arguments.name or ("bert" if row is None else f"bert-{row.platform.name}"),
        results=_absolute(arguments.results) or cluster.results or str(here / "results"),
        inputs={1: data, 2: _absolute(arguments.data_phase2) or data},
        config_file=model_config(arguments.config, config, here),
        vocab_file=_absolute(arguments.vocab_file) or (None if vocabulary is None else str(vocabulary)),
        seed=arguments.seed,
        prepare=_absolute(prepare),
        workdir=workdir,
        init_checkpoint=_absolute(getattr(arguments, "init_checkpoint", None)),
        steps_this_run=arguments.steps,
        evaluate=getattr(arguments, "evaluate", False),
        extra=tuple(arguments.extra),
        time=arguments.time,
        preflight=arguments.preflight,
    )


def _absolute(path: str | None) -> str | None:
    """Seen from here, without ``..``."""
    return None if path is None else os.path.abspath(Path(path).expanduser())


def prepared_folder(config: Path) -> str:
    """``workdir`` of a configuration of data.prepare, absolute. Raises :class:`ConfigError`."""
    value = read_yaml(config)
    if not isinstance(value, dict) or not isinstance(value.get("workdir"), str):
        raise ConfigError(f"--prepare {config} must be a configuration of data.prepare with a workdir")
    return os.path.abspath(Path(value["workdir"]).expanduser())
