#!/usr/bin/env bash
# phase1; made by berth.launch, carried out by slurm/run.sub as processes of this machine

BERTH_BACKEND=local
BERTH_STAGE=phase1
BERTH_ROOT=/opt/berth
BERTH_FOLDER=/shared/results/tiny
BERTH_NODE_COUNT=2
BERTH_RANKS_PER_NODE=2
BERTH_MAX_RESTARTS=100
BERTH_CRASH_LIMIT=3
BERTH_IMAGE=''
BERTH_JOB_JSON='{"cluster": {"file": "/opt/berth/slurm/clusters/local.yaml", "name": "local"}, "image": null, "recipe": {"global_batch": 16, "learning_rate": 0.01, "lr_schedule": "poly", "max_predictions_per_seq": 4, "max_seq_length": 16, "max_steps": 12, "num_steps_per_checkpoint": 2, "optimizer": "lamb", "options": {}, "phase": 1, "warmup_proportion": 0.1}, "row": {"accumulation": 2, "global_batch": 16, "job_name": "local_2x2x2x2", "micro_batch": 2, "name": "local_2x2x2x2_fp32_tiny-p1", "nodes": 2, "options": {}, "phase": 1, "platform": "local", "precision": "fp32", "ranks_per_node": 2, "recipe": "tiny", "source": "tests/cluster", "train_batch_size": 4}, "run": {"config_file": "/opt/berth/bert_configs/tiny.json", "evaluate": false, "extra": [], "init_checkpoint": null, "inputs": {"1": "/shared/records"}, "name": "tiny", "preflight": null, "prepare": null, "results": "/shared/results", "seed": 42, "steps_this_run": null, "study": false, "time": null, "vocab_file": null, "workdir": null}}'
export PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1
export SLURM_EXPORT_ENV=ALL
BERTH_MAKES=()
BERTH_EPILOGUE=()
berth_setup() {
  :
}
BERTH_STEPS=(train)
berth_step_train() {
  exec /usr/bin/python3 -m berth.launch.spawn --ranks 4 --label -- python3 -m berth.launch.rank --ranks 4 --bind none --nic none --record "$BERTH_RECORD" --job "$BERTH_JOB" -- python3 -u run_pretraining.py --input_dir /shared/records --config_file /opt/berth/bert_configs/tiny.json --output_dir /shared/results/tiny --max_seq_length 16 --max_predictions_per_seq 4 --train_batch_size 4 --gradient_accumulation_steps 2 --max_steps 12 --optimizer lamb --learning_rate 0.01 --lr_schedule poly --warmup_proportion 0.1 --precision fp32 --device cpu --seed 42 --num_steps_per_checkpoint 2 --resume_from_checkpoint
}

source /opt/berth/slurm/run.sub
