"""DeepSpeed's configuration for a run: what a user's file says, checked against the command line, and what berth fixes.

In: the JSON file of ``--deepspeed`` (or nothing) and the run's options. Out: the dictionary for ``deepspeed.initialize``, or one
:class:`ConfigError` with everything that is wrong. A key passes when it changes neither the result nor where the state lies; a key that
says again what an option says must agree with it; all others are refused with the reason and what to use instead. Nothing is
ignored in silence. Pure: DeepSpeed is not needed here. Rejected: DeepSpeed's own checks (one error a run, most unknown keys pass).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from berth.errors import ConfigError

STAGES = (0, 1, 2, 3)
DEFAULT_STAGE = 1
REDUCE_BUCKET = 50_000_000
"""Elements reduced at once, 200 MB in fp32: more than BERT-large's embedding. DeepSpeed's default of 2 GB is held by every process."""

_PASS = frozenset((
    "checkpoint", "comet", "comms_logger", "csv_monitor", "dataloader_drop_last", "disable_allgather", "disable_python_gc",
    "dump_state", "flops_profiler", "log_level", "memory_breakdown", "steps_per_print", "tensorboard", "timers", "wall_clock_breakdown",
    "wandb", "zero_allow_untested_optimizer",
))  # fmt: skip  # what is printed and logged, and two that have no effect here: checkpoints and data are berth's
_ZERO_SIZES = frozenset((
    "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "prefetch_bucket_size", "param_persistence_threshold",
    "model_persistence_threshold", "max_live_parameters", "max_reuse_distance", "module_granularity_threshold",
    "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_module_granularity_threshold",
))  # fmt: skip
_ZERO_SWITCHES = frozenset((
    "allgather_partitions", "allgather_sequential", "contiguous_gradients", "elastic_checkpoint", "enable_sanity_checks",
    "gather_16bit_weights_on_model_save", "ignore_unused_parameters", "load_from_fp32_weights", "log_trace_cache_warnings",
    "memory_efficient_linear", "overlap_comm", "parameter_alignment", "pipeline_loading_checkpoint", "reduce_scatter",
    "round_robin_gradients", "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params", "use_all_reduce_for_fetch_params",
    "use_multi_rank_bucket_allreduce",
))  # fmt: skip

_PRECISION = "holds or sums gradients in 16 bits inside DeepSpeed; use --precision {} (autocast over fp32 parameters, fp32 gradients)"
_MOVED = "keeps state where checkpoints and LAMB's per-tensor norms do not reach; leave it out, or take more processes or a higher stage"
_OTHER_MODEL = "splits the model in another way than over data, which berth's models do not support"
_OTHER_TRAINING = "changes what is trained or read, and is not part of berth's recipes"
_REFUSED = {
    "optimizer": "its Lamb clamps trust ratios and its 1-bit kinds compress gradients, which is another recipe; use --optimizer, "
    "--learning_rate, --weight_decay",
    "scheduler": "the rate follows --lr_schedule, --learning_rate and --warmup_proportion",
    "fp16": _PRECISION.format("fp16"),
    "bf16": _PRECISION.format("bf16"),
    "bfloat16": _PRECISION.format("bf16"),
    "amp": _PRECISION.format("fp16"),
    "torch_autocast": "sends gradients and, at stage 3, parameters in 16 bits; use --precision bf16 or fp16, and --reduce_dtype for the wire",
    "data_types": "gradients are summed in fp32; --reduce_dtype chooses the type they travel in",
    "activation_checkpointing": "is not wired to berth's model; use --checkpoint_activations",
    "autotuning": "runs and ends processes by itself; see berth's launch tools",
    "elasticity": "every checkpoint continues on any number of processes without it",
    "aio": _MOVED,
    "nebula": "checkpoints are berth's own files",
    "datastates_ckpt": "checkpoints are berth's own files",
    "compile": "replaces the backward pass that gradients are taken from",
    **dict.fromkeys(("pipeline", "tensor_parallel", "expert_parallel", "sequence_parallel_size", "data_parallel_size"), _OTHER_MODEL),
    **dict.fromkeys(("hybrid_engine", "use_data_before_expert_parallelism"), _OTHER_MODEL),
    **dict.fromkeys(("compression_training", "curriculum_learning", "data_efficiency", "eigenvalue"), _OTHER_TRAINING),
    **dict.fromkeys(("progressive_layer_drop", "quantize_training", "sparse_attention", "weight_quantization"), _OTHER_TRAINING),
}
_ZERO_REFUSED = {
    **dict.fromkeys(("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_params", "cpu_offload_param"), _MOVED),
    **dict.fromkeys(("cpu_offload_use_pin_memory", "zenflow"), _MOVED),
    **dict.fromkeys(("zero_hpz_partition_size", "mics_shard_size", "mics_hierarchical_params_gather"), "gives ranks other pieces than the map "
                    "of LAMB's norms and of checkpoints says (ZeRO++, MiCS)"),
    **dict.fromkeys(("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"), "rounds weights or "
                    "gradients to a few bits (ZeRO++); --reduce_dtype bf16 halves the traffic of gradients"),
    "compute_grad_norm": "the norm is what tells that a gradient is not finite",
    "leaf_module": _OTHER_MODEL,
    "legacy_stage1": "is gone from DeepSpeed",
    "save_muon_momentum_buffer_in_memory": "belongs to an optimizer that berth does not have",
}  # fmt: skip
_NEUTRAL: dict[str, Any] = {  # keys that may be written out at the one value they have here
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "sparse_gradients": False,
    "zero_force_ds_cpu_optimizer": False,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What the command line says. ``stage`` is None when it names none; ``micro_batch`` is in sequences of one process, ``parameters`` are
    those of the whole model; ``wire`` is fp32, fp16 or bf16."""

    stage: int | None
    micro_batch: int
    accumulation: int
    world_size: int
    max_grad_norm: float
    wire: str
    parameters: int


def check_config(source: str | Path | dict[str, Any] | None, run: Run) -> dict[str, Any]:
    """The configuration to give to DeepSpeed. ``source`` is a JSON file, its content, or nothing (None or "").

    Raises :class:`ConfigError` with all that is wrong: unreadable or not JSON, unknown keys (with the nearest known one), what
    contradicts ``run``, what is refused and why.
    """
    name, given = "--deepspeed", source if isinstance(source, dict) else {}
    if source and not isinstance(source, dict):
        name, given = _read(Path(source))
    problems: list[str] = []
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        problems.append(f'zero_optimization is {zero!r}; it must be an object such as {{"stage": 1}}')
        zero = {}
    stage = _stage(zero, run, problems)
    result = {key: value for key, value in given.items() if key in _PASS and value != "auto"}
    for key, value in given.items():
        if key != "zero_optimization" and value != "auto":
            _check_key(key, value, run, problems)
    for key, value in zero.items():
        if key != "stage" and value != "auto":
            _check_zero_key(key, value, problems)
    passed = {key: value for key, value in zero.items() if key in _ZERO_SIZES | _ZERO_SWITCHES and value != "auto"}
    sub_group = passed.get("sub_group_size", run.parameters)
    if stage == 3 and isinstance(sub_group, (int, float)) and sub_group < run.parameters:
        problems.append(
            f"zero_optimization.sub_group_size {sub_group:g} is below the model's {run.parameters} parameters: LAMB would count a step for "
            "each sub-group; leave it out"
        )
    if problems:
        raise ConfigError(
            f"{name}: " + ("; ".join(problems) if len(problems) == 1 else "\n  ".join(["several keys are wrong:", *problems]))
        )
    return result | _fixed(run, stage) | {"zero_optimization": {"reduce_bucket_size": REDUCE_BUCKET} | passed | _fixed_zero(run, stage)}


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    name = f"--deepspeed {path}"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"{name}: {', '.join(twice)} is there twice; keep one")
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{name} holds a {type(content).__name__}, it must be a JSON object")
    return name, content


def _stage(zero: dict[str, Any], run: Run, problems: list[str]) -> int:
    said = zero.get("stage", "auto")
    if said == "auto":
        return DEFAULT_STAGE if run.stage is None else run.stage
    if isinstance(said, bool) or said not in STAGES:
        problems.append(f"zero_optimization.stage is {said!r}; it is one of 0, 1, 2, 3")
        return DEFAULT_STAGE
    if run.stage is not None and run.stage != said:
        problems.append(f"zero_optimization.stage {said} contradicts --deepspeed_zero_stage {run.stage}; make them equal or drop one")
    return int(said)


def _check_key(key: str, value: Any, run: Run, problems: list[str]) -> None:
    processes = f"{run.world_size} process{'es' if run.world_size > 1 else ''}"
    batch = run.micro_batch * run.accumulation
    same: dict[str, tuple[Any, str]] = {
        "train_batch_size": (batch * run.world_size, f"--train_batch_size {batch} a process on {processes}"),
        "train_micro_batch_size_per_gpu": (run.micro_batch, "--train_batch_size / --gradient_accumulation_steps"),
        "gradient_accumulation_steps": (run.accumulation, "--gradient_accumulation_steps"),
        "gradient_clipping": (run.max_grad_norm, "--max_grad_norm"),
        "communication_data_type": (run.wire, "--reduce_dtype"),
    }
    if key in same:
        wanted, option = same[key]
        if isinstance(value, bool) or value != wanted:
            problems.append(f'{key} {value!r} contradicts {wanted!r} ({option}); make them equal, write "auto" or drop the key')
    elif key in _NEUTRAL:
        if value != _NEUTRAL[key]:
            problems.append(f"{key} {value!r}: berth averages gradients itself, only {_NEUTRAL[key]!r} works here; drop the key")
    elif key in _REFUSED:
        if not _switched_off(value):
            problems.append(f"{key}: {_REFUSED[key]}")
    elif key not in _PASS:
        problems.append(_unknown(key, [*same, *_NEUTRAL, *_REFUSED, *_PASS, "zero_optimization"]))


def _check_zero_key(key: str, value: Any, problems: list[str]) -> None:
    where = f"zero_optimization.{key}"
    if key in _ZERO_REFUSED:
        neutral: dict[str, Callable[[Any], bool]] = {
            "zero_hpz_partition_size": lambda value: value == 1,
            "mics_shard_size": lambda value: value == -1,
            "compute_grad_norm": lambda value: value is True,
        }
        if not neutral.get(key, _switched_off)(value):
            problems.append(f"{where}: {_ZERO_REFUSED[key]}")
    elif key in _ZERO_SIZES:
        least = key == "reduce_bucket_size"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 2**63:
            problems.append(f"{where} is {value!r}; it must be a number of elements")
    elif key in _ZERO_SWITCHES:
        if not isinstance(value, bool):
            problems.append(f"{where} is {value!r}; it must be true or false")
    else:
        problems.append(_unknown(key, [*_ZERO_REFUSED, *_ZERO_SIZES, *_ZERO_SWITCHES, "stage"], "zero_optimization."))


def _switched_off(value: Any) -> bool:
    if isinstance(value, dict):
        return not value or value.get("enabled", True) in (False, "auto") or value.get("device") == "none"
    return value is None or value is False


def _unknown(key: str, known: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(key, known, 1)
    hint = f"; did you mean {prefix}{near[0]}?" if near else "; DeepSpeed would ignore it or do something berth does not know: drop it"
    return f"{prefix}{key} is not known{hint}"


def _fixed(run: Run, stage: int) -> dict[str, Any]:
    """What berth decides: clipping is done before DeepSpeed's step, with the norm that is reported."""
    return {
        "train_batch_size": run.micro_batch * run.accumulation * run.world_size,
        "train_micro_batch_size_per_gpu": run.micro_batch,
        "gradient_accumulation_steps": run.accumulation,
        "gradient_clipping": 0.0,
        "communication_data_type": run.wire,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # a sum of 16-bit numbers could leave their range; stage 3 always divides first
        "prescale_gradients": run.wire != "fp32" and stage < 3,
    }


def _fixed_zero(run: Run, stage: int) -> dict[str, Any]:
    # stage 2 refuses to divide first beside reduce_scatter, whose place an all-reduce of the same bucket takes
    return {"stage": stage} | ({"reduce_scatter": False} if stage == 2 and run.wire != "fp32" else {})
