"""The options of ``python -m slurm.launch``: every subcommand with its help. Nothing is read or decided here."""

from __future__ import annotations

import argparse
from typing import Any

from berth.errors import ConfigError
from berth.launch import submission
from berth.launch.variables import help_text

PHASES = {"1": ("phase1",), "2": ("phase2",), "all": ("phase1", "phase2")}


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
        _add_backend(sub)
        if name == "submit":
            _add_tolerance(sub)
        if name == "render":
            sub.add_argument("--srun_only", action="store_true", help="only the srun lines")
        if name == "validate":
            sub.add_argument("--offline", action="store_true", help="do not ask Slurm")
    for name, text in (("status", "the jobs of a run and how far it is"), ("cancel", "cancel what is left of a run's jobs")):
        sub = command(name, text)
        sub.add_argument("folder", metavar="RUN_FOLDER", help="<results>/<name> of a submission")
    report = command("report", "measured throughput beside the published one")
    report.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or folders of runs")
    _add_matrix(report)
    report.add_argument("--json", action="store_true", help="as JSON")
    report.add_argument("--png", metavar="FILE", help="draw measured and published scaling")
    matrix = command("matrix", "many rows as one submission")
    inner = matrix.add_subparsers(dest="action", required=True, metavar="run")
    run = inner.add_parser("run", help="a scaling study: every selected row for some steps", allow_abbrev=False)
    _add_study(run)
    command(
        "job", "the assignments of a job submitted by hand, from its environment (run.sub calls this)",
        epilog="variables run.sub understands:\n" + help_text(), formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    return parser


def _add_filters(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--select", default="", metavar="KEY=VALUE,...", help="platform=, nodes=, phase=, precision=, recipe=")
    add("--nodes", metavar="1..32", help="node counts: 4, 1,2,4 or 1..32")
    _add_matrix(parser)


def _add_matrix(parser: argparse.ArgumentParser) -> None:
    text = "a file that adds platforms, recipes or rows; may be repeated"
    parser.add_argument("--matrix", action="append", default=[], metavar="FILE", help=text)


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
    add("--nodes", type=int, help="number of nodes (overrides the rows')")
    add("--precision", help="fp16, bf16, fp8, tf32 or fp32 (default: the row's, or the platform's first)")
    add("--micro_batch", type=int, help="sequences of one forward pass a GPU, in the first phase (default: the matrix's)")
    add("--recipe", help="recipe of recipes.yml (default: the row's, or the profile's, else lamb)")
    add("--phase", choices=tuple(PHASES), default="all", help="which phases (default: all)")
    add("--prepare", metavar="YAML", help="configuration of data.prepare: the chain begins with preparation, into its work folder")
    add("--export", action="store_true", help="the chain ends with the export for Hugging Face (always with --phase all and a vocabulary)")
    add("--name", help="the run's folder below --results (default: bert-<platform>)")
    add("--init_checkpoint", metavar="FILE", help="weights the first phase starts from")
    add("--steps", type=int, help="stop each phase after so many steps of this submission")
    add("--evaluate", action="store_true", help="score the held-out shard")
    _add_matrix(parser)
    _add_place(parser)


def _add_backend(parser: argparse.ArgumentParser) -> None:
    text = "default: sbatch; local = processes of this machine, now"
    parser.add_argument("--backend", choices=submission.BACKENDS, default="sbatch", help=text)


def _add_tolerance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no_validate", action="store_true", help="submit although something was found")


def _add_study(parser: argparse.ArgumentParser) -> None:
    _add_filters(parser)
    _add_place(parser)
    add = parser.add_argument
    add("--steps", type=int, default=50, help="steps of each run (default: 50)")
    add("--name", default="matrix", help="folder of the study below --results (default: matrix)")
    add("--parallel", action="store_true", help="let the runs share the machine (default: one after the other, as a chain)")
    add("--dry_run", action="store_true", help="print the texts of the jobs only")
    _add_backend(parser)
    _add_tolerance(parser)
