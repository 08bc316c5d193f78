"""Launching on a cluster: performance matrix -> plan -> validation -> text -> submission -> report. No torch: it runs on a login node.

yamlfile    YAML read strictly, mistakes collected; what the readers below are made of
matrix, recipes, rows, published    configurations.yml, recipes.yml, published.yml: platforms, recipes, rows with computed batches
estimate    memory and time a row will need
clusters    site profiles
plan        rows + site + run -> a chain of jobs, each a list of steps
variables, wanted    the environment of a job submitted by hand -> the same plan
positional, arguments, this_machine    scripts/run_pretraining.sh: its words and the GPUs that are here -> the same plan
validate    everything that can be wrong before submission; by inputs, fitting, preparation, checkpoints, slurm_limits
render      a job -> the text sbatch reads
submission, slurm_commands    sbatch, submitit, or processes on this machine; status, cancel
measure, report    measured beside published
parser, choose, command_line    python -m slurm.launch
rank, binding, preflight, provenance, spawn    what runs inside a task

From Python::

    from berth import launch

    matrix, cluster = launch.load_matrix(), launch.load_cluster("dgx-a100-superpod")
    rows = {phase: matrix.default_row("dgx-a100-80g", nodes=4, phase=phase, precision="fp16") for phase in (1, 2)}
    data = "/lustre/berth/wikipedia"
    run = launch.Run(
        name="bert-large", results="/lustre/berth/results", inputs={1: data, 2: data},
        config_file=f"{data}/vocab/bert_config.json", vocab_file=f"{data}/vocab/vocab.txt",
    )
    plan = launch.make_plan(run, cluster, rows, ["phase1", "phase2", "export"])
    print(launch.sbatch_text(plan.jobs[0]))
    submission = launch.submit(plan, "submitit")
    submission.jobs[-1].handle.result()    # a submitit.Job: state, stdout(), result(), cancel()

``launch.status(folder)`` and ``launch.cancel(folder)`` take the run's folder. The command line validates before it submits; from Python that
is ``berth.launch.validate.validate(plan, rows, matrix, probe=SlurmProbe())``, whose report lists errors, warnings and notes.
"""

from __future__ import annotations

import importlib
from typing import Any

# name -> module; imported when first asked for, since tasks in a container import this package too, and may lack PyYAML
_PUBLIC = {
    "load_matrix": "matrix", "load_cluster": "clusters", "Run": "plan", "Plan": "plan", "make_plan": "plan", "describe": "plan",
    "sbatch_text": "render", "srun_lines": "render", "Submission": "submission", "submit": "submission", "status": "submission",
    "cancel": "submission",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
