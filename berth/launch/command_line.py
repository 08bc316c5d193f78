"""``python -m slurm.launch``: the subcommands and their options; what they do is done by the other modules of the package."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from berth.errors import ConfigError
from berth.launch import clusters, plan, render, submit
from berth.launch.matrix import Matrix, Row, load_matrix, parse_range, parse_select

PHASES = {"1": ("phase1",), "2": ("phase2",), "all": ("phase1", "phase2")}
NO_CLUSTER = "--cluster NAME is missing: a profile in slurm/clusters, or the path of one; there are: "


class _Parser(argparse.ArgumentParser):
    """Usage errors leave through :class:`ConfigError` like all others."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser with its complete help."""
    parser = _Parser(
        prog="python -m slurm.launch",
        description="BERT pretraining on a Slurm cluster: from a row of the performance matrix to a chain of jobs and a report.",
        epilog="Exit codes: 0 done, 1 failure, 2 usage. docs/launching.md walks through it.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, **more: Any) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False, **more)

    listing = command("list", "the rows of the matrix, with computed batches and published throughput")
    _add_filters(listing)
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.add_argument("--platforms", action="store_true", help="the platforms and recipes instead of the rows")
    for name, text in (
        ("plan", "what would be submitted, in words"),
        ("validate", "everything that can be checked before submission; all mistakes at once, exit code 2"),
        ("render", "the exact sbatch text and every srun line; nothing is submitted"),
        ("submit", "check, then hand the chain of jobs over"),
    ):
        sub = command(name, text)
        _add_request(sub)
        if name == "submit":
            _add_submission(sub)
        if name == "render":
            sub.add_argument("--srun_only", action="store_true", help="only the srun lines")
        if name == "validate":
            sub.add_argument("--offline", action="store_true", help="do not ask Slurm")
    for name, text in (("status", "the jobs of a run and how far it is"), ("cancel", "cancel what is left of a run's jobs")):
        sub = command(name, text)
        sub.add_argument("folder", metavar="RUN_FOLDER", help="<results>/<name> of a submission")
    report = command("report", "measured throughput beside the published one")
    report.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or folders of runs")
    report.add_argument("--json", action="store_true", help="as JSON")
    report.add_argument("--png", metavar="FILE", help="draw measured and published scaling")
    matrix = command("matrix", "many rows as one submission")
    inner = matrix.add_subparsers(dest="action", required=True, metavar="run")
    run = inner.add_parser("run", help="a scaling study: every selected row for some steps", allow_abbrev=False)
    _add_study(run)
    command(
        "job", "the assignments of a job submitted by hand, from its environment (run.sub calls this)",
        epilog=_variables_help(), formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    return parser


def _variables_help() -> str:
    from berth.launch.variables import help_text

    return "variables run.sub understands:\n" + help_text()


def _add_filters(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--select", default="", metavar="KEY=VALUE,...", help="platform=, nodes=, phase=, precision=, recipe=")
    add("--nodes", metavar="1..32", help="node counts: 4, 1,2,4 or 1..32")
    add("--matrix", action="append", default=[], metavar="FILE", help="a file that adds platforms, recipes or rows; may be repeated")


def _add_place(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cluster", metavar="NAME|FILE", help="site profile (slurm/clusters)")
    add("--results", metavar="DIR", help="parent of runs, on shared storage (default: the profile's paths.results, else ./results)")
    add("--data", metavar="DIR", help="records, or work folder of data.prepare (default: the profile's paths.data)")
    add("--data_phase2", metavar="DIR", help="records of phase 2, where they lie elsewhere")
    add(
        "--config",
        metavar="NAME|FILE",
        help="model: a name in bert_configs or a file (default: the one beside the data's vocabulary, else large)",
    )
    add("--vocab_file", metavar="FILE", help="vocabulary of the records (default: the one of the work folder)")
    add("--seed", type=int, default=42, help="of weights, order and dropout (default: 42)")
    add(
        "--time",
        metavar="[D-]HH:MM:SS",
        help="walltime of a training job (default: estimated from the published throughput, at most the site's)",
    )
    add("--extra", action="append", default=[], metavar="WORD", help="one more word for run_pretraining.py (--extra=--log_freq --extra=10)")
    preflight = parser.add_mutually_exclusive_group()
    preflight.add_argument("--preflight", action="store_true", default=None, help="check nodes before training (default: the profile's)")
    preflight.add_argument("--no_preflight", action="store_false", dest="preflight", help="do not")


def _add_request(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--row", help="row of the matrix for the (first) training phase; see list")
    add("--row_phase2", help="row of phase 2 (default: the matrix's for the same platform, nodes and precision)")
    add("--platform", help="instead of --row: platform, with --nodes")
    add("--nodes", type=int, help="number of nodes (overrides the row's)")
    add("--precision", help="fp16, bf16, tf32 or fp32 (default: the platform's first)")
    add("--micro_batch", type=int, help="sequences of one forward pass a GPU (default: the matrix's)")
    add("--recipe", help="recipe of recipes.yml (default: the profile's, else lamb)")
    add("--phase", choices=tuple(PHASES), default="all", help="which phases (default: all)")
    add("--prepare", metavar="YAML", help="configuration of data.prepare: the chain begins with preparation, into its work folder")
    add("--export", action="store_true", help="the chain ends with the export for Hugging Face (always with --phase all and a vocabulary)")
    add("--name", help="the run's folder below --results (default: bert-<platform>)")
    add("--init_checkpoint", metavar="FILE", help="weights the first phase starts from")
    add("--steps", type=int, help="stop each phase after so many steps of this submission")
    add("--evaluate", action="store_true", help="score the held-out shard")
    add("--matrix", action="append", default=[], metavar="FILE", help="a file that adds platforms, recipes or rows; may be repeated")
    _add_place(parser)


def _add_submission(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=submit.BACKENDS, default="sbatch", help="default: sbatch; local = processes of this machine, now"
    )
    parser.add_argument("--no_validate", action="store_true", help="submit although something was found")


def _add_study(parser: argparse.ArgumentParser) -> None:
    _add_filters(parser)
    _add_place(parser)
    add = parser.add_argument
    add("--steps", type=int, default=50, help="steps of each run (default: 50)")
    add("--name", default="matrix", help="folder of the study below --results (default: matrix)")
    add("--parallel", action="store_true", help="let the runs share the machine (default: one after the other, as a chain)")
    add("--dry_run", action="store_true", help="print the sbatch texts only")
    _add_submission(parser)


def main(argv: Sequence[str]) -> int:
    """Carry one command out; the exit code."""
    if argv[:1] == ["job"] and len(argv) == 1:
        return job_of_environment()
    arguments = build_parser().parse_args(list(argv))
    if arguments.command == "matrix":
        return study(arguments)
    command = {
        "list": list_rows, "plan": show_plan, "validate": validate, "render": show_text, "submit": hand_over, "status": show_status,
        "cancel": cancel, "report": show_report,
    }[arguments.command]  # fmt: skip
    return command(arguments)


def job_of_environment() -> int:
    """``job``: what ``run.sub`` evaluates."""
    from berth.launch.variables import job_plan

    made = job_plan(os.environ, load_matrix())
    sys.stderr.write(plan.describe(made) + "\n")
    sys.stdout.write(render.job_block(made.jobs[0]))
    return 0


# ------------------------------------------------------------------------------------------------------------------ list


def _selected(arguments: argparse.Namespace) -> tuple[Matrix, list[Row]]:
    matrix = load_matrix(extra=[Path(file) for file in arguments.matrix])
    chosen = parse_select(arguments.select)
    if arguments.nodes:
        if "nodes" in chosen:
            raise ConfigError("--nodes and nodes= in --select say the same; give one of them")
        chosen["nodes"] = parse_range(arguments.nodes)
    return matrix, matrix.select(**chosen)


def list_rows(arguments: argparse.Namespace) -> int:
    """``list``."""
    matrix, rows = _selected(arguments)
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


# -------------------------------------------------------------------------------------------------- plan, render, submit


def request(arguments: argparse.Namespace) -> tuple[plan.Plan, dict[int, Row], Matrix]:
    """What the options ask for. Raises :class:`ConfigError`."""
    matrix = load_matrix(extra=[Path(file) for file in arguments.matrix])
    cluster = _cluster(arguments)
    rows = chosen_rows(arguments, matrix, cluster)
    run = make_run(arguments, cluster, next(iter(rows.values())))
    stages = [*(["prepare"] if arguments.prepare else []), *PHASES[arguments.phase]]
    if arguments.export or (arguments.phase == "all" and run.vocab_file is not None):
        stages.append("export")
    return plan.make_plan(run, cluster, rows, stages, hours=_hours(rows, matrix)), rows, matrix


def _hours(rows: Mapping[int, Row], matrix: Matrix) -> dict[int, float]:
    from berth.launch.estimate import walltime_estimate

    estimates = {phase: walltime_estimate(row, matrix) for phase, row in rows.items()}
    return {phase: estimate.hours for phase, estimate in estimates.items() if estimate is not None}


def _cluster(arguments: argparse.Namespace) -> clusters.Cluster:
    if arguments.cluster is None:
        raise ConfigError(NO_CLUSTER + ", ".join(clusters.names()))
    return clusters.load_cluster(arguments.cluster)


def chosen_rows(arguments: argparse.Namespace, matrix: Matrix, cluster: clusters.Cluster) -> dict[int, Row]:
    """``{phase: row}`` of --row, --row_phase2, or --platform and --nodes. Raises :class:`ConfigError`."""
    phases = [int(stage[-1]) for stage in PHASES[arguments.phase]]
    recipe = arguments.recipe or cluster.recipe
    rows: dict[int, Row] = {}
    for phase in phases:
        name = arguments.row if phase == phases[0] else arguments.row_phase2
        if name is not None:
            row = matrix.row(name, phase)
            if any(value is not None for value in (arguments.nodes, arguments.precision, arguments.micro_batch)):
                row = matrix.make_row(
                    row.platform.name, arguments.nodes or row.nodes, phase, arguments.precision or row.precision,
                    arguments.micro_batch or row.micro_batch, arguments.recipe or row.recipe.name, ranks_per_node=row.ranks_per_node,
                    options=row.options,
                )  # fmt: skip
        elif rows:
            first = rows[phases[0]]
            row = matrix.default_row(first.platform.name, first.nodes, phase, first.precision, first.recipe.name)
        else:
            platform = arguments.platform or cluster.platform
            if platform is None or arguments.nodes is None:
                raise ConfigError("say what to run: --row NAME (see list), or --platform and --nodes")
            row = matrix.default_row(platform, arguments.nodes, phase, arguments.precision, recipe)
            if arguments.micro_batch is not None:
                row = matrix.make_row(platform, arguments.nodes, phase, row.precision, arguments.micro_batch, row.recipe.name)
        rows[phase] = row
    return rows


def make_run(arguments: argparse.Namespace, cluster: clusters.Cluster, row: Row) -> plan.Run:
    """Folders and choices of the run. Raises :class:`ConfigError`."""
    from berth.launch.inputs import defaults
    from berth.launch.variables import model_config

    here = Path.cwd()
    prepare = getattr(arguments, "prepare", None)
    workdir = prepared_folder(Path(prepare)) if prepare else None
    data = _absolute(arguments.data) or workdir or cluster.data
    if data is None:
        raise ConfigError(f"where is the data? --data DIR (records, or work folder of data.prepare), or paths.data in {cluster.file}")
    config, vocabulary = defaults(Path(data))
    if workdir is not None:  # not made yet
        config, vocabulary = Path(workdir) / "vocab" / "bert_config.json", Path(workdir) / "vocab" / "vocab.txt"
    return plan.Run(
        name=arguments.name or f"bert-{row.platform.name}",
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
    return None if path is None else str(Path(path).expanduser().absolute())


def prepared_folder(config: Path) -> str:
    """``workdir`` of a configuration of data.prepare, absolute. Raises :class:`ConfigError`."""
    from berth.launch.yamlfile import read_yaml

    value = read_yaml(config)
    if not isinstance(value, dict) or not isinstance(value.get("workdir"), str):
        raise ConfigError(f"--prepare {config} must be a configuration of data.prepare with a workdir")
    return str(Path(value["workdir"]).expanduser().absolute())


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
        if not arguments.srun_only:
            print(f"# ===== {job.stage}{after}\n{render.sbatch_text(job)}")
        print(f"# ----- every srun of {job.stage}\n" + "\n".join(render.srun_lines(job)) + "\n")
    return 0


def validate(arguments: argparse.Namespace) -> int:
    """``validate``."""
    made, rows, matrix = request(arguments)
    _check(made, rows, matrix, ask_slurm=not arguments.offline)
    return 0


def _check(made: plan.Plan, rows: Mapping[int, Row], matrix: Matrix, ask_slurm: bool, tolerate: bool = False) -> None:
    """Print what validation finds. Raises :class:`ConfigError` for errors, unless they are tolerated."""
    from berth.launch.slurm_limits import NoProbe, SlurmProbe
    from berth.launch.validate import validate as check

    report = check(made, rows, matrix, probe=SlurmProbe() if ask_slurm else NoProbe())
    for kind, lines in (("note", report.notes), ("warning", report.warnings)):
        for line in lines:
            print(f"{kind}: {line}", file=sys.stderr)
    if report.errors and not tolerate:
        raise ConfigError(f"{len(report.errors)} found before submission:\n  " + "\n  ".join(report.errors))
    for line in report.errors:
        print(f"warning (--no_validate): {line}", file=sys.stderr)


def hand_over(arguments: argparse.Namespace) -> int:
    """``submit``."""
    made, rows, matrix = request(arguments)
    _check(made, rows, matrix, ask_slurm=arguments.backend != "local", tolerate=arguments.no_validate)
    print(plan.describe(made), flush=True)
    _tell(submit.submit(made, arguments.backend))
    return 0


def _tell(submission: submit.Submission) -> None:
    for stage in submission.skipped:
        print(f"{stage}: complete already, not submitted")
    for job in submission.jobs:
        print(f"{job.stage}: job {job.job_id}" if job.job_id != "local" else f"{job.stage}: done")
    if submission.backend != "local":
        print(f"status: python -m slurm.launch status {render.word(str(submission.folder))}")


# ------------------------------------------------------------------------------------------------- afterwards, and studies


def show_status(arguments: argparse.Namespace) -> int:
    """``status``."""
    folder = Path(arguments.folder)
    found = submit.status(folder)
    columns = ("stage", "job_id", "state", "reason", "elapsed", "nodes")
    print(table([{name: getattr(one, name) for name in columns} for one in found], columns))
    newest, loss = submit.progress(folder)
    print(f"newest checkpoint: {newest or 'none yet'}" + ("" if loss is None else f", last loss {loss:.4f}"))
    return 0


def cancel(arguments: argparse.Namespace) -> int:
    """``cancel``."""
    gone = submit.cancel(Path(arguments.folder))
    print(f"cancelled: {', '.join(gone)}" if gone else "nothing is left in the queue")
    return 0


def show_report(arguments: argparse.Namespace) -> int:
    """``report``."""
    from berth.launch import report

    lines = report.compare(report.measured([Path(folder) for folder in arguments.folders]), load_matrix())
    print(report.as_json(lines) if arguments.json else report.as_table(lines))
    if arguments.png:
        report.draw(lines, Path(arguments.png))
    return 0


def study(arguments: argparse.Namespace) -> int:
    """``matrix run``: every selected row as a run of its own below one folder, without checkpoints."""
    matrix, rows = _selected(arguments)
    if not rows:
        raise ConfigError("no row of the matrix has all of that; see list")
    cluster = _cluster(arguments)
    plans = [(study_plan(arguments, cluster, row, matrix), row) for row in rows]
    after = None
    for made, row in plans:
        if arguments.dry_run:
            print(f"# ===== {row.name}\n{render.sbatch_text(made.jobs[0])}")
            continue
        _check(made, {row.phase: row}, matrix, ask_slurm=arguments.backend != "local", tolerate=arguments.no_validate)
    for made, row in [] if arguments.dry_run else plans:
        submission = submit.submit(made, arguments.backend, after=None if arguments.parallel else after, after_kind="afterany")
        after = submission.jobs[-1].job_id if submission.jobs and arguments.backend != "local" else after
        print(f"{row.name}: {', '.join(job.job_id for job in submission.jobs)}", flush=True)
    if not arguments.dry_run:
        print(f"report: python -m slurm.launch report {render.word(str(Path(plans[0][0].run.results)))}")
    return 0


def study_plan(arguments: argparse.Namespace, cluster: clusters.Cluster, row: Row, matrix: Matrix) -> plan.Plan:
    """One row of a study as a plan."""
    run = make_run(arguments, cluster, row)
    run = dataclasses.replace(run, results=f"{run.results}/{arguments.name}", name=row.name, study=True)
    return plan.make_plan(run, cluster, {row.phase: row}, [f"phase{row.phase}"], hours=_hours({row.phase: row}, matrix))
