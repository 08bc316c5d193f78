#!/usr/bin/env bash
# phase1; made by berth.launch, carried out by slurm/run.sub as processes of this machine

BERTH_BACKEND=local
BERTH_STAGE=phase1
BERTH_ROOT=/opt/berth
BERTH_FOLDER=/shared/results/bert-large
BERTH_NODE_COUNT=1
BERTH_RANKS_PER_NODE=1
BERTH_MAX_RESTARTS=100
BERTH_CRASH_LIMIT=3
BERTH_IMAGE=''
BERTH_JOB_JSON='{"cluster": {"file": "/opt/berth/slurm/clusters/local.yaml", "name": "local"}, "image": null, "recipe": {"global_batch": 64, "learning_rate": 0.01, "lr_schedule": "poly", "max_predictions_per_seq": 20, "max_seq_length": 128, "max_steps": 1200, "num_steps_per_checkpoint": 120, "optimizer": "lamb", "options": {}, "phase": 1, "warmup_proportion": 0.1}, "row": {"accumulation": 1, "global_batch": 64, "job_name": "local_1x1x64x1", "micro_batch": 64, "name": "local_1x1x64x1_fp32_demo-p1", "nodes": 1, "options": {}, "phase": 1, "platform": "local", "precision": "fp32", "ranks_per_node": 1, "recipe": "demo", "source": "not published; docs/decisions/2026-11-21-demonstration.md", "train_batch_size": 64}, "run": {"config_file": "/opt/berth/bert_configs/tiny.json", "evaluate": false, "extra": [], "init_checkpoint": null, "inputs": {"1": "/shared/wikipedia", "2": "/shared/wikipedia"}, "name": "bert-large", "preflight": null, "prepare": null, "results": "/shared/results", "seed": 42, "steps_this_run": null, "study": false, "time": null, "vocab_file": "/shared/wikipedia/vocab/vocab.txt", "workdir": null}}'
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
  exec /usr/bin/python3 -m berth.launch.spawn --ranks 1 -- python3 -m berth.launch.rank --ranks 1 --bind none --nic none --record "$BERTH_RECORD" --job "$BERTH_JOB" -- python3 -u run_pretraining.py --input_dir /shared/wikipedia --config_file /opt/berth/bert_configs/tiny.json --vocab_file /shared/wikipedia/vocab/vocab.txt --output_dir /shared/results/bert-large --max_seq_length 128 --max_predictions_per_seq 20 --train_batch_size 64 --gradient_accumulation_steps 1 --max_steps 1200 --optimizer lamb --learning_rate 0.01 --lr_schedule poly --warmup_proportion 0.1 --precision fp32 --device cpu --seed 42 --num_steps_per_checkpoint 120 --resume_from_checkpoint
}

source /opt/berth/slurm/run.sub
