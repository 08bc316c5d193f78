"""Launching on a cluster: performance matrix -> plan -> validation -> text -> submission -> report. No torch: it runs on a login node.

matrix      configurations.yml, recipes.yml, published.yml: platforms, recipes, rows, computed batches
estimate    memory and time a row will need
clusters    site profiles
plan        row + recipe + site + run -> a chain of jobs, each a list of steps
variables   the environment of a job submitted by hand -> the same plan
validate    everything that can be wrong before submission
render      a job -> the text sbatch reads
submit      sbatch, submitit, or processes on this machine; status, cancel
report      measured beside published
rank, binding, preflight, provenance, spawn    what runs inside a task

From Python::

    from berth import launch

    plan = launch.make_plan(launch.Request(row="dgx-a100-80g_4x8x256x8", cluster="superpod", phases=("phase1", "phase2"), name="bert-large"))
    submission = launch.submit(plan, backend="submitit")
    submission.jobs[-1].handle.result()        # a submitit.Job: state, stdout(), result(), cancel()
"""
