#!/usr/bin/env bash
# Both phases of BERT pretraining on this machine, one process a GPU.
#
#   scripts/run_pretraining.sh --train_batch_size 8192 --learning_rate 6e-3 --precision fp16 --num_gpus 8
#   scripts/run_pretraining.sh 8192 6e-3 fp16 8 0.2843        the same by position, as the public scripts take them
#   scripts/run_pretraining.sh --help                         every argument: position, name, default, meaning
#
# What is not given comes from the row of slurm/configurations.yml for this machine. BERTH_PYTHON names the Python to use.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
from=$PWD
candidates=("$root/.venv/bin/python" python3)
if [ -n "${BERTH_PYTHON:-}" ]; then candidates=("$BERTH_PYTHON"); fi
for python in "${candidates[@]}"; do
  case $python in /*) ;; */*) python=$from/$python ;; esac
  if "$python" -c 'import sys, yaml; assert sys.version_info >= (3, 10)' >/dev/null 2>&1; then
    cd -- "$root" # -m takes the project of the current folder
    exec "$python" -m berth.launch.positional --from "$from" "$@"
  fi
done
printf 'error: no Python 3.10 or newer with PyYAML (tried: %s); run make setup, or set BERTH_PYTHON\n' "${candidates[*]}" >&2
exit 2
