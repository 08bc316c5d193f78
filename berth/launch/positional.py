"""``scripts/run_pretraining.sh``: both phases on this one machine, told by position or by name (:mod:`berth.launch.arguments`).

In: the words of the command line, and what GPUs there are. Out: a plan of a job a phase (:mod:`berth.launch.plan`), run here one after the
other, with a log file each. What is not given comes from the row of the matrix for this machine; this script has no numbers of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from berth.errors import ConfigError, run_main
from berth.launch import checkpoints, plan, render, submission
from berth.launch.arguments import ARGUMENTS, RUN_FOLDER, help_text, read_words
from berth.launch.clusters import ROOT, load_cluster
from berth.launch.inputs import defaults
from berth.launch.matrix import DEFAULT_RECIPE, Matrix, Platform, Recipe, Row, load_matrix
from berth.launch.slurm_limits import NoProbe
from berth.launch.this_machine import Gpu, find_platform, visible_gpus
from berth.launch.validate import validate
from berth.launch.variables import model_config
from berth.launch.yamlfile import collected, raise_problems

FP16_REDUCTION = "allreduce_post_accumulation_fp16"
SOURCE = "arguments of scripts/run_pretraining.sh"


@dataclasses.dataclass(frozen=True)
class Chain:
    """What was decided: the plan with its rows, what to say about it, and the beginning of each stage's log file (none without)."""

    plan: plan.Plan
    rows: Mapping[int, Row]
    notices: tuple[str, ...]
    logs: Mapping[str, str]


def decide(words: Sequence[str], matrix: Matrix, gpus: Sequence[Gpu], environment: Mapping[str, str]) -> Chain:
    """The plan a command line asks for. Looks at what lies in its folders; writes nothing.

    Raises :class:`ConfigError` with everything that is wrong.
    """
    wrong: list[str] = []
    notices: list[str] = []
    values = read_words(words, wrong, notices)
    rows: dict[int, Row] = {}
    with collected(wrong):
        rows = choose_rows(values, matrix, gpus, wrong, notices)
    run = None
    with collected(wrong):
        run = make_run(values, environment, wrong)
    raise_problems(wrong, "" if len(wrong) == 1 else "several arguments are wrong:")
    assert run is not None
    cluster = dataclasses.replace(load_cluster("local"), platform=rows[1].platform.name, python=sys.executable)
    made = plan.make_plan(run, cluster, rows, [f"phase{phase}" for phase in rows])
    notices += _idle(values)
    logs = {}
    if values.get("create_logfile", True):
        begin = f"{run.results}/{values.get('job_name', ARGUMENTS['job_name'].default)}.pyt_bert_pretraining_phase"
        logs = {f"phase{phase}": f"{begin}{phase}_{row.precision}_gbs{row.global_batch}" for phase, row in rows.items()}
    return Chain(made, rows, tuple(notices), logs)


def _idle(values: Mapping[str, Any]) -> list[str]:
    """Notices on arguments that change nothing."""
    idle = []
    if values.get("allreduce_post_accumulation") is False:
        idle.append("allreduce_post_accumulation false has no effect: gradients are always reduced once, after accumulation")
    if values.get("accumulate_into_fp16"):
        idle.append("accumulate_into_fp16 true has no effect: gradients are always accumulated in fp32")
    if values.get("accumulate_gradients") is False and any(f"gradient_accumulation_steps{tail}" in values for tail in ("", "_phase2")):
        idle.append("gradient_accumulation_steps is not used: accumulate_gradients is false")
    return idle


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both phases share."""

    matrix: Matrix
    platform: Platform
    recipe: Recipe
    precision: str
    ranks: int


def choose_rows(values: Mapping[str, Any], matrix: Matrix, gpus: Sequence[Gpu], wrong: list[str], notices: list[str]) -> dict[int, Row]:
    """``{phase: row}`` for this machine, with what the arguments change. Raises :class:`ConfigError`, or adds to ``wrong``."""
    name = values.get("platform") or find_platform(gpus, matrix.platforms)
    matrix.select(name, None, None, values.get("precision"), values.get("recipe"))  # names what is unknown
    platform = matrix.platforms[name]
    if "platform" not in values:
        notices.append(f"platform {name} ({platform.title}); --platform chooses another")
    ranks = values.get("num_gpus") or (len(gpus) if gpus and platform.device == "cuda" else platform.ranks_per_node)
    if platform.device == "cuda" and 0 < len(gpus) < ranks:
        wrong.append(f"num_gpus {ranks} is more than the {len(gpus)} GPUs of this machine")
    precision = values.get("precision") or platform.precisions[0]
    if values.get(FP16_REDUCTION) and precision in ("tf32", "fp32"):
        wrong.append(f"{FP16_REDUCTION} must be false in {precision}: fp16 would lose of the gradients what {precision} keeps")
    recipe = matrix.recipes[values.get("recipe") or _usual_recipe(matrix, platform, precision)]
    if 2 not in recipe.phases and any(argument.endswith("_phase2") for argument in values):
        wrong.append(f"recipe {recipe.name} has no phase 2; leave its arguments out")
    setting = Setting(matrix, platform, recipe, precision, ranks)
    rows = {}
    for phase in recipe.phases:
        with collected(wrong):
            rows[phase] = phase_row(values, setting, phase, notices)
    return rows


def _usual_recipe(matrix: Matrix, platform: Platform, precision: str) -> str:
    with contextlib.suppress(ConfigError):
        return matrix.default_row(platform.name, 1, 1, precision).recipe.name
    return DEFAULT_RECIPE


def phase_row(values: Mapping[str, Any], setting: Setting, phase: int, notices: list[str]) -> Row:
    """The row of one phase. Raises :class:`ConfigError` when its batches do not come out even, or nothing tells the micro-batch."""
    tail, recipe = "" if phase == 1 else "_phase2", setting.recipe
    usual = recipe.phases[phase]
    batch = values.get(f"train_batch_size{tail}")
    if batch is None:
        batch, rest = divmod(usual.global_batch, setting.ranks)
        if rest:
            raise ConfigError(
                f"num_gpus {setting.ranks} cannot share the global batch {usual.global_batch} of recipe {recipe.name}; give train_batch_size{tail}"
            )
    total = batch * setting.ranks
    if total != usual.global_batch:
        notices.append(
            f"phase {phase}: the global batch is {total} (train_batch_size{tail} {batch} x num_gpus {setting.ranks}); recipe {recipe.name} has "
            f"{usual.global_batch}"
        )
    changed: dict[str, Any] = {
        "global_batch": total,
        "learning_rate": values.get(f"learning_rate{tail}"),
        "warmup_proportion": values.get(f"warmup_proportion{tail}"),
        "max_steps": values.get(f"train_steps{tail}"),
        "num_steps_per_checkpoint": values.get("save_checkpoint_steps"),
    }
    new = dataclasses.replace(usual, **{key: value for key, value in changed.items() if value is not None})
    micro_batch, options = _cut(values, setting, phase, tail, batch)
    if FP16_REDUCTION in values:
        options[FP16_REDUCTION] = values[FP16_REDUCTION]
    told = dataclasses.replace(recipe, phases={**recipe.phases, phase: new})
    return Row(setting.platform, 1, phase, setting.precision, micro_batch, told, setting.ranks, SOURCE, options=options)


def _cut(values: Mapping[str, Any], setting: Setting, phase: int, tail: str, batch: int) -> tuple[int, dict[str, Any]]:
    """Micro-batch and options: the arguments', else those of the matrix's row; a micro-batch is a GPU's, so it holds for any number."""
    name = f"gradient_accumulation_steps{tail}"
    cuts = values.get(name) if values.get("accumulate_gradients", True) else 1
    try:
        base = setting.matrix.default_row(setting.platform.name, 1, phase, setting.precision, setting.recipe.name)
    except ConfigError as error:
        if cuts is None:
            raise ConfigError(f"{name} must be given: {error}") from error
        base = None
    if cuts is None:
        assert base is not None
        if batch > base.micro_batch and batch % base.micro_batch:
            raise ConfigError(
                f"train_batch_size{tail} {batch} is no multiple of the micro-batch {base.micro_batch} of row {base.name}; give {name} as well"
            )
        cuts = max(1, batch // base.micro_batch)
    if batch % cuts:
        raise ConfigError(f"train_batch_size{tail} {batch} is not divisible by {name} {cuts}; change one of them")
    return batch // cuts, {} if base is None else dict(base.options)


def make_run(values: Mapping[str, Any], environment: Mapping[str, str], wrong: list[str]) -> plan.Run:
    """Folders, model and vocabulary. Raises :class:`ConfigError`, or adds to ``wrong``."""
    here = Path(values.get("from") or Path.cwd())

    def path(name: str) -> str | None:
        return str((here / Path(values[name]).expanduser()).resolve()) if name in values else None

    first = path("data_dir_phase1") or environment.get("BERT_PREP_WORKING_DIR")
    if first is None:
        wrong.append("where are the records? Give data_dir_phase1 (records, or work folder of data.prepare), or set BERT_PREP_WORKING_DIR")
        first = str(ROOT)
    first = str((here / first).resolve())
    second = path("data_dir_phase2") or first
    for name, folder in (("data_dir_phase1", first), ("data_dir_phase2", second), ("init_checkpoint", path("init_checkpoint"))):
        if folder is not None and not Path(folder).exists():
            wrong.append(f"{name} {folder} does not exist")
    if path("codedir") not in (None, str(ROOT.resolve())):
        wrong.append(f"codedir {path('codedir')} must be this project, {ROOT.resolve()}; run the script of the other one")
    results = path("results") or str(ROOT / "results")
    with collected(wrong):
        entries, _ = checkpoints.read_manifest(Path(results, RUN_FOLDER))
        files = [*checkpoints.unlisted(Path(results, RUN_FOLDER), entries), *(entry.file for entry in entries)]
        if files and not values.get("resume_training"):
            wrong.append(
                f"{results}/{RUN_FOLDER} holds a run already ({files[-1]}); give resume_training true to go on with it, or other --results "
                "for a new one"
            )
    config, vocabulary = defaults(first)
    model = model_config(values.get("bert_config"), config, here)
    return plan.Run(
        name=RUN_FOLDER,
        results=results,
        inputs={1: first, 2: second},
        config_file=str(Path(model).resolve()),
        vocab_file=path("vocab_file") or (None if vocabulary is None else str(vocabulary)),
        seed=values.get("seed", plan.Run.seed),
        init_checkpoint=path("init_checkpoint"),
    )


# ------------------------------------------------------------------------------------------------------------------ run


@contextlib.contextmanager
def copied_to(log: Path) -> Iterator[None]:
    """What this process and its children write goes to standard output and to the end of ``log``. Raises ``OSError``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.open("ab").close()  # says now what keeps it from being written
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    # in a session of its own: no signal to the group takes it away before the last word is written
    tee = subprocess.Popen(("tee", "-a", str(log)), stdin=subprocess.PIPE, start_new_session=True)
    assert tee.stdin is not None
    for stream in (1, 2):
        os.dup2(tee.stdin.fileno(), stream)
    tee.stdin.close()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, old in zip((1, 2), kept, strict=True):
            os.dup2(old, stream)
            os.close(old)
        tee.wait()


def run_phases(chain: Chain) -> int:
    """Run what is not complete yet, phase after phase; the exit code of the last that ran."""
    for job in chain.plan.jobs:
        if submission.complete(job):
            print(f"{job.stage} is complete already", flush=True)
            continue
        begin, now = chain.logs.get(job.stage), datetime.datetime.now()
        log = None if begin is None else f"{begin}.{now:%y%m%d%H%M%S}.log"
        if log is not None:
            print(f"Logs written to {log}", flush=True)
        with contextlib.nullcontext() if log is None else copied_to(Path(log)):
            code = submission.run_local(job)
        if code:
            how = f"{job.stage} {'stopped' if code > 128 else 'failed'} with exit code {code}"
            print(f"{how}; the same command with resume_training true goes on", file=sys.stderr, flush=True)
            return code
    return 0


def check(chain: Chain, matrix: Matrix) -> None:
    """What can be checked before hours of training. Raises :class:`ConfigError`."""
    report = validate(chain.plan, chain.rows, matrix, probe=NoProbe())
    for kind, lines in (("note", (*chain.notices, *report.notes)), ("warning", report.warnings)):
        for line in lines:
            print(f"{kind}: {line}", file=sys.stderr)
    raise_problems(report.errors, "" if len(report.errors) == 1 else f"{len(report.errors)} found before training:")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see :func:`help_text`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        print(help_text(), end="")
        return 0
    matrix = load_matrix()
    chain = decide([word for word in words if word != "--dry_run"], matrix, visible_gpus(os.environ), os.environ)
    check(chain, matrix)
    print(plan.describe(chain.plan), flush=True)
    if "--dry_run" in words:
        print("\n".join(render.line(render.spawned(step)) for job in chain.plan.jobs for step in job.steps))
        return 0
    return run_phases(chain)


if __name__ == "__main__":
    run_main(main)
