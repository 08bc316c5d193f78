"""``python -m slurm.launch``: what each subcommand prints and asks of the other modules. Options: :mod:`berth.launch.parser`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from berth.errors import ConfigError
from berth.launch import plan, render, submission
from berth.launch.choose import request, selected, studied
from berth.launch.matrix import Matrix, Row, load_matrix
from berth.launch.parser import build_parser


def main(argv: Sequence[str]) -> int:
    """Carry one command out; the exit code."""
    arguments = build_parser().parse_args(list(argv))
    command = {
        "list": list_rows, "plan": show_plan, "validate": validate, "render": show_text, "submit": hand_over, "status": show_status,
        "cancel": cancel, "report": show_report, "matrix": run_study, "job": job_of_environment,
    }[arguments.command]  # fmt: skip
    return command(arguments)


def job_of_environment(arguments: argparse.Namespace) -> int:
    """``job``: what ``run.sub`` evaluates."""
    from berth.launch.variables import job_plan

    made = job_plan(os.environ, load_matrix())
    sys.stderr.write(plan.describe(made) + "\n")
    sys.stdout.write(render.job_block(submission.with_revision(made.jobs[0])))
    return 0


# ------------------------------------------------------------------------------------------------------------------ list


def list_rows(arguments: argparse.Namespace) -> int:
    """``list``."""
    matrix, rows = selected(arguments)
    if arguments.platforms:
        print("\n".join(f"{one.name:<16} {one.title}; {', '.join(one.precisions)}" for one in matrix.platforms.values()))
        print("\n".join(f"{one.name:<16} recipe: {one.title}" for one in matrix.recipes.values()))
        return 0
    facts = [_facts(matrix, row) for row in rows]
    print(json.dumps(facts, indent=1) if arguments.json else table(facts, list(facts[0]) if facts else ["row"]))
    return 0


def _facts(matrix: Matrix, row: Row) -> dict[str, Any]:
    published = matrix.published_for(row)
    return {
        "row": row.name, "phase": row.phase, "seq": row.phase_recipe.max_seq_length, "nodes": row.nodes, "gpus": row.world_size,
        "precision": row.precision, "micro": row.micro_batch, "accum": row.accumulation, "batch/gpu": row.train_batch_size,
        "global": row.global_batch, "lr": f"{row.learning_rate:g}", "recipe": row.recipe.name,
        "published seq/s": published[0].sequences_per_second if published else "",
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Text in columns; numbers to the right."""
    cells = [[str(row[column]) for column in columns] for row in rows]
    widths = [max(len(text) for text in (column, *(line[at] for line in cells))) for at, column in enumerate(columns)]
    right = [all(isinstance(row[column], (int, float)) or row[column] == "" for row in rows) and bool(rows) for column in columns]

    def put(line: Sequence[str]) -> str:
        pairs = zip(line, widths, right, strict=True)
        return "  ".join(text.rjust(width) if to_right else text.ljust(width) for text, width, to_right in pairs).rstrip()

    return "\n".join([put(columns), "  ".join("-" * width for width in widths), *(put(line) for line in cells)])


# ---------------------------------------------------------------------------------------- plan, validate, render, submit


def show_plan(arguments: argparse.Namespace) -> int:
    """``plan``."""
    made, _, _ = request(arguments)
    print(plan.describe(made))
    return 0


def show_text(arguments: argparse.Namespace) -> int:
    """``render``."""
    made, _, _ = request(arguments)
    for job in made.jobs:
        after = f", submitted with --dependency=afterok:<{job.after}> --kill-on-invalid-dep=yes" if job.after else ""
        if arguments.backend == "local":
            print(f"# ===== {job.stage}\n{render.local_text(submission.with_revision(job))}")
            continue
        if not arguments.srun_only:
            print(f"# ===== {job.stage}{after}\n{render.sbatch_text(submission.with_revision(job))}")
        print(f"# ----- every srun of {job.stage}\n" + "\n".join(render.srun_lines(job)) + "\n")
    return 0


def validate(arguments: argparse.Namespace) -> int:
    """``validate``."""
    made, rows, matrix = request(arguments)
    check([(made, rows)], matrix, arguments.backend, ask_slurm=not arguments.offline)
    if not arguments.offline and arguments.backend != "local":
        refused = refusals(made)
        if refused:
            raise ConfigError("refused by sbatch --test-only:\n  " + "\n  ".join(refused))
    return 0


def refusals(made: plan.Plan) -> list[str]:
    """What sbatch itself has against the jobs; nothing where no Slurm answers."""
    from berth.launch.slurm_limits import SlurmProbe, test_only

    if shutil.which("sbatch") is None or SlurmProbe().sinfo() is None:
        return []
    answers = {job.stage: test_only(render.sbatch_text(job)) for job in made.jobs}
    return [f"{stage}: {answer}" for stage, answer in answers.items() if answer is not None]


def check(
    plans: Sequence[tuple[plan.Plan, Mapping[int, Row]]], matrix: Matrix, backend: str, *, ask_slurm: bool = True, tolerate: bool = False
) -> None:
    """Print what validation finds in plans (each with its rows). Raises :class:`ConfigError` with all errors, unless they are tolerated.

    Of several plans each line begins with the run's name.
    """
    from berth.launch.slurm_limits import NoProbe, SlurmProbe
    from berth.launch.this_machine import visible_gpus
    from berth.launch.validate import Report
    from berth.launch.validate import validate as find

    here = backend == "local"
    probe, gpus = SlurmProbe() if ask_slurm and not here else NoProbe(), visible_gpus(os.environ) if here else None
    found = Report()
    for made, rows in plans:
        one = find(made, rows, matrix, probe=probe, gpus=gpus)
        who = f"{made.run.name}: " if len(plans) > 1 else ""
        for field in dataclasses.fields(Report):
            getattr(found, field.name).extend(f"{who}{line}" for line in getattr(one, field.name))
    for kind, lines in (("note", found.notes), ("warning", found.warnings), ("warning (--no_validate)", found.errors if tolerate else [])):
        for line in lines:
            print(f"{kind}: {line}", file=sys.stderr)
    if found.errors and not tolerate:
        raise ConfigError(f"wrong, found before submission ({len(found.errors)}):\n  " + "\n  ".join(found.errors))


def hand_over(arguments: argparse.Namespace) -> int:
    """``submit``."""
    made, rows, matrix = request(arguments)
    check([(made, rows)], matrix, arguments.backend, tolerate=arguments.no_validate)
    print(plan.describe(made), flush=True)
    handed = submission.submit(made, arguments.backend)
    for stage in handed.skipped:
        print(f"{stage}: complete already, not submitted")
    for job in handed.jobs:
        print(f"{job.stage}: job {job.job_id}" if job.job_id != "local" else f"{job.stage}: done")
    if handed.backend != "local":
        print(f"status: python -m slurm.launch status {render.word(str(handed.folder))}")
    return 0


def run_study(arguments: argparse.Namespace) -> int:
    """``matrix run``: every selected row as a run of its own below one folder, without checkpoints."""
    plans, matrix = studied(arguments)
    if arguments.dry_run:
        for made, _ in plans:
            text = (render.local_text if arguments.backend == "local" else render.sbatch_text)(made.jobs[0])
            print(f"# ===== {made.run.name}\n{text}")
        return 0
    check(plans, matrix, arguments.backend, tolerate=arguments.no_validate)
    after = None
    for made, _ in plans:
        handed = submission.submit(made, arguments.backend, after=after, after_kind="afterany")
        if handed.jobs and not arguments.parallel and arguments.backend != "local":
            after = handed.jobs[-1].job_id
        print(f"{made.run.name}: {', '.join(job.job_id for job in handed.jobs)}", flush=True)
    print(f"report: python -m slurm.launch report {render.word(plans[0][0].run.results)}")
    return 0


# ------------------------------------------------------------------------------------------------------------ afterwards


def show_status(arguments: argparse.Namespace) -> int:
    """``status``."""
    folder = Path(arguments.folder)
    found = submission.status(folder)
    columns = ("stage", "job_id", "state", "reason", "elapsed", "nodes")
    print(table([{name: getattr(one, name) for name in columns} for one in found], columns))
    newest, loss = submission.progress(folder)
    print(f"newest checkpoint: {newest or 'none yet'}" + ("" if loss is None else f", last loss {loss:.4f}"))
    return 0


def cancel(arguments: argparse.Namespace) -> int:
    """``cancel``."""
    gone = submission.cancel(Path(arguments.folder))
    print(f"cancelled: {', '.join(gone)}" if gone else "nothing is left in the queue")
    return 0


def show_report(arguments: argparse.Namespace) -> int:
    """``report``."""
    from berth.launch import report

    matrix = load_matrix(extra=[Path(file) for file in arguments.matrix])
    lines = report.compare(report.measured(arguments.folders), matrix)
    print(report.as_json(lines) if arguments.json else report.as_table(lines))
    if arguments.png:
        report.draw(lines, Path(arguments.png), matrix)
    return 0
