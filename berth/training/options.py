"""Options of ``run_pretraining.py``: parsed once into a frozen dataclass, all mistakes reported together.

The flags are those of the public scripts (FEATURES 1.1). One that no longer means anything is accepted with a notice when leaving it out
changes nothing, and refused when the user would get something else than asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from berth.errors import ConfigError
from berth.training.precision import PRECISIONS

SHARDINGS = ("none", "zero1", "zero2", "zero3")
SWITCH = ("auto", "on", "off")
COMPILE = ("auto", "off", "layers", "model")
OPTIMIZER_BACKENDS = ("auto", "triton", "berth", "apex")
REDUCE_DTYPES = ("fp32", "fp16", "bf16")
SCHEDULE_NAMES = ("poly", "linear", "cosine", "constant", "exponential")

# flags that have no effect here, and why leaving them out changes nothing
OBSOLETE_HARMLESS = {
    "--do_train": "training is what this script does",
    "--bert_model": "the model is what --config_file says",
    "--num_train_epochs": "--max_steps decides the length",
    "--use_env": "ranks are read from the environment anyway",
    "--allreduce_post_accumulation": "gradients are always reduced once, after accumulation",
    "--disable_jit_fusions": "no TorchScript fusion is used",
    "--schedule": "the schedule is --lr_schedule",
    "--profile": "it never had an effect",
    "--profile-start": "it never had an effect",
    "--use_ib": "set NCCL_IB_DISABLE / NCCL_SOCKET_IFNAME in the environment",
    "--gpu_memory_limit_gb": "memory is not limited by the program",
}
# flags that would change the result, and what to do instead
OBSOLETE_REFUSED = {
    "--masking": "records carry their masks, or --dynamic_masking draws them while training",
}
_WITH_VALUE = {"--schedule", "--bert_model", "--num_train_epochs", "--profile-start", "--gpu_memory_limit_gb", "--masking"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a pretraining run was asked to do. See ``--help`` for the meaning of each field; names are the flags'."""

    input_dir: str
    config_file: str
    output_dir: str
    vocab_file: str | None
    eval_dir: str | None
    max_seq_length: int | None
    max_predictions_per_seq: int | None
    dynamic_masking: bool
    masked_lm_prob: float | None
    whole_word_mask: bool
    objective: str
    train_batch_size: int
    gradient_accumulation_steps: int
    max_steps: int
    steps_this_run: int | None
    optimizer: str
    learning_rate: float
    warmup_proportion: float
    lr_schedule: str
    lr_warmup_degree: float
    lr_decay_rate: float
    lr_decay_steps: int
    lr_offset: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    precision: str
    loss_scale: float
    init_loss_scale: float
    min_loss_scale: float
    scale_growth_interval: int
    max_consecutive_skips: int
    on_divergence: str
    max_rollbacks: int
    reduce_dtype: str
    shard: str
    deepspeed: str | None
    deepspeed_zero_stage: int | None
    optimizer_backend: str
    unpad: str
    compile: str
    cuda_graphs: bool
    fused_loss: str
    fused_qkv: str
    fast_dropout: str
    no_copy_ahead: bool
    checkpoint_activations: bool
    no_dense_sequence_output: bool
    no_group_by_length: bool
    init_checkpoint: str | None
    resume_from_checkpoint: bool
    resume_step: int | None
    resume_phase2: bool
    force_resume: bool
    phase2: bool
    phase1_end_step: int | None
    phase2_moments: str
    phase2_step: str
    num_steps_per_checkpoint: int
    keep_checkpoints: int
    skip_checkpoint: bool
    no_async_checkpoints: bool
    log_freq: int
    eval_freq: int
    eval_samples: int
    eval_batch_size: int | None
    json_summary: str
    tensorboard_dir: str | None
    disable_progress_bar: bool
    device: str | None
    num_workers: int
    timeout_min: float
    dead_rank_s: float
    peak_tflops: float | None
    notices: tuple[str, ...] = ()

    @property
    def phase(self) -> int:
        """1 or 2."""
        return 2 if self.phase2 else 1

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward pass: ``train_batch_size // gradient_accumulation_steps``."""
        return self.train_batch_size // self.gradient_accumulation_steps

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed's engine drives the step."""
        return self.deepspeed is not None or self.deepspeed_zero_stage is not None

    @property
    def sharding(self) -> str:
        """How the state is spread: a name of :data:`SHARDINGS`, or ``deepspeed``."""
        return "deepspeed" if self.uses_deepspeed else self.shard


class _Parser(argparse.ArgumentParser):
    """Usage errors leave through :class:`ConfigError` like all others."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; see run_pretraining.py --help")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text that does not say it itself, where there is one: not to switches, nor where nothing is given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = "(default:" in (action.help or "")
        return action.help if said or action.default is None or action.default is False else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The argument parser with its complete help."""
    parser = _Parser(
        prog="run_pretraining.py",
        description="Pretrain BERT from hdf5 records (create_pretraining_data.py) with LAMB: phase 1 at sequence length 128, phase 2 at 512. "
        "Runs as one process, or one process a GPU under torchrun, srun or mpirun.",
        formatter_class=_Help,
        allow_abbrev=False,
        epilog="The global batch is train_batch_size x number of processes; one forward pass takes train_batch_size / "
        "gradient_accumulation_steps sequences. Sharding, reduction and failures: docs/numerics.md, docs/architecture.md. Exit codes: 0 done (or stopped by --steps_this_run), 1 failure, 2 usage, 75 when the ranks did not find each other, 76 when one was lost, 130 after Ctrl-C, 143 "
        "after SIGTERM, 138 after SIGUSR1 and 140 after SIGUSR2, each with a checkpoint saved (torchrun itself exits with 1 then).",
    )
    _add_data(parser.add_argument_group("data and model"))
    _add_batch(parser.add_argument_group("batch, steps and optimizer"))
    _add_precision(parser.add_argument_group("precision and memory"))
    _add_speed(
        parser.add_argument_group(
            "speed (the result is the same within rounding, but for which elements dropout drops; what is used is logged at the start)"
        )
    )
    _add_sharding(parser.add_argument_group("sharding and reduction"))
    _add_resume(parser.add_argument_group("phases, start and resume"))
    _add_output(parser.add_argument_group("checkpoints, logs and evaluation"))
    _add_runtime(parser.add_argument_group("processes and devices"))
    return parser


def _add_data(group: Any) -> None:
    add = group.add_argument
    add(
        "--input_dir",
        required=True,
        help="folder of training records (*.hdf5 of any layout, those with 'training' in their name if any has it; or LDDL's *.parquet), or "
        "one file, or the work folder of data.prepare (its records of --max_seq_length)",
    )
    add("--config_file", required=True, help="BERT configuration, JSON with Hugging Face's keys; vocab_size is padded to a multiple of 8")
    add(
        "--output_dir", required=True, help="folder for checkpoints, manifest.json and logs; must not hold another run unless it is resumed"
    )
    add(
        "--vocab_file",
        help="vocabulary the records were made with; checked against the records and the configuration; needed for --dynamic_masking and "
        "Parquet",
    )
    add(
        "--eval_dir",
        help="folder of held-out records ('test' in their names), evaluated at the start, every --eval_freq steps and at the end",
    )
    add("--max_seq_length", type=int, help="sequence length the records must have (Parquet: at most); what they have if not given")
    add(
        "--max_predictions_per_seq",
        type=int,
        help="predictions a sequence the records must have, with --dynamic_masking the most it draws; what they have if not given",
    )
    add(
        "--dynamic_masking",
        action="store_true",
        help="draw masks while reading, other ones in every epoch, the same on every resume and number of processes; needs --vocab_file. "
        "Implied by Parquet files without masks",
    )
    add("--masked_lm_prob", type=float, help="dynamic masking: share of the tokens of a row; what the records say if not given, else 0.15")
    add("--whole_word_mask", action="store_true", help="dynamic masking: mask whole words instead of word pieces")
    add(
        "--objective",
        choices=("mlm+nsp", "mlm"),
        default="mlm+nsp",
        help="masked tokens and next sentence, or masked tokens alone (always with records that are no sentence pairs)",
    )


def _add_batch(group: Any) -> None:
    add = group.add_argument
    add("--train_batch_size", type=int, default=32, help="sequences a process and optimizer step, before accumulation")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward passes an optimizer step; must divide train_batch_size")
    add("--max_steps", type=whole_number, default=1000, help="optimizer steps of this phase; also the length of the learning-rate schedule")
    add("--steps_this_run", type=int, help="stop (with a checkpoint) after this many steps of this process; the schedule does not change")
    add("--optimizer", choices=("lamb", "adamw"), default="lamb", help="LAMB as in apex FusedLAMB, or AdamW with the same decay groups")
    add("--learning_rate", type=float, default=5e-5, help="peak learning rate")
    add("--warmup_proportion", type=float, default=0.01, help="share of max_steps in which the rate rises from 0")
    add("--lr_schedule", choices=SCHEDULE_NAMES, default="poly", help="poly: linear warm-up then sqrt(1 - t/T), as the LAMB recipe")
    add("--lr_warmup_degree", type=float, default=2.0, help="exponential schedule: power of the warm-up (DeepSpeed 2, AzureML 1)")
    add("--lr_decay_rate", type=float, default=0.9, help="exponential schedule: factor every --lr_decay_steps")
    add("--lr_decay_steps", type=int, default=250, help="exponential schedule: steps in which the rate falls by --lr_decay_rate")
    add("--lr_offset", type=float, default=0.0, help="exponential schedule: added to the rate of every step")
    add("--weight_decay", type=float, default=0.01, help="of all parameters but biases and LayerNorm")
    add("--max_grad_norm", type=float, default=1.0, help="clip the global gradient norm to this; 0 = off")
    add("--seed", type=int, default=42, help="of initial weights, data order and dropout")


def _add_precision(group: Any) -> None:
    add = group.add_argument
    add(
        "--precision",
        choices=PRECISIONS,
        help="type of matrix products; parameters and optimizer state are always fp32. fp8: the encoder's linear layers, the rest bf16; for GPUs from "
        "compute capability 8.9 on (default: fp32)",
    )
    add("--fp16", "--amp", dest="fp16", action="store_true", help="same as --precision fp16")
    add("--loss_scale", type=float, default=0.0, help="0 = dynamic for fp16 and none otherwise; positive = static")
    add("--init_loss_scale", type=float, default=2.0**20, help="first dynamic loss scale")
    add("--min_loss_scale", type=float, default=1.0, help="dynamic loss scale never falls below this")
    add("--scale_growth_interval", type=int, default=2000, help="good steps in a row after which the dynamic loss scale doubles")
    add("--max_consecutive_skips", type=int, default=50, help="this many steps in a row with a non-finite gradient count as divergence")
    add(
        "--on_divergence",
        choices=("stop", "rollback"),
        default="stop",
        help="stop with an error that names the tensors, or go back to the last checkpoint and leave out the samples since then",
    )
    add("--max_rollbacks", type=int, default=3, help="--on_divergence rollback: stop all the same after this many")
    add(
        "--checkpoint_activations",
        action="store_true",
        help="recompute each layer in the backward pass: less memory, about a third more time",
    )


def _add_speed(group: Any) -> None:
    add = group.add_argument
    add(
        "--unpad",
        choices=SWITCH,
        default="auto",
        help="compute no padding: sequences lie end to end, attention knows where they begin. Saves up to the padded share of a step (12 %% at a fill "
        "of 0.88, more with short sequences); with accumulation less, where sorting by length saves most of it already (3 %% with 16 micro-batches). "
        "auto: on a CPU, and on a GPU in 16 bits",
    )
    add(
        "--compile",
        choices=COMPILE,
        default="auto",
        help="compile everything between the matrix products (dropout, GELU, residuals, layer norm) into few kernels, which saves passes over GPU "
        "memory, for about a minute at the start: the whole model, or layer by layer, so that gradients are reduced while the backward pass goes on. "
        "auto: model on one GPU, layers on several, off on a CPU",
    )
    add(
        "--cuda_graphs",
        action="store_true",
        help="replay forward and backward of a micro-batch as one launch: for small micro-batches, whose kernels are shorter than their launches. "
        "Packed micro-batches (bf16, fp16, fp8) whose passes do not communicate",
    )
    add(
        "--fused_loss",
        choices=SWITCH,
        default="auto",
        help="compute the masked-language loss a chunk of rows at a time: the logits (masked tokens x vocabulary) never take memory as a whole",
    )
    add(
        "--fused_qkv",
        choices=SWITCH,
        default="auto",
        help="query, key and value in one matrix product: fewer passes over the hidden states. auto: on a GPU (on a CPU it is slower)",
    )
    add(
        "--fast_dropout",
        choices=SWITCH,
        default="auto",
        help="draw 16 bits a number for dropout on a CPU, where torch's own draws take 8 %% of a step: the rate is rounded to 1/65536. auto: on a CPU",
    )
    add(
        "--no_copy_ahead",
        action="store_true",
        help="copy a micro-batch to the GPU when its turn comes, not while the one before of the same step is computed (the first of a step is never "
        "copied ahead)",
    )
    add(
        "--optimizer_backend",
        choices=OPTIMIZER_BACKENDS,
        default="auto",
        help="whose LAMB: berth's Triton kernels (two passes, 40 instead of about 120 bytes a parameter), NVIDIA apex's, or berth's on torch alone. auto: the "
        "first that works here; with sharding always berth's",
    )
    add(
        "--no_dense_sequence_output",
        action="store_true",
        help="project every position onto the vocabulary, not only the masked ones (slow)",
    )
    add(
        "--no_group_by_length",
        action="store_true",
        help="cut a step's sequences into micro-batches as they come, not by length (packed: the same number of tokens each; padded: less padding)",
    )


def _add_sharding(group: Any) -> None:
    add = group.add_argument
    add(
        "--shard",
        choices=SHARDINGS,
        default="none",
        help="split over the processes: zero1 optimizer state, zero2 gradients as well, zero3 parameters as well (the last two by FSDP2). The "
        "result and the checkpoints are the same",
    )
    add(
        "--deepspeed",
        nargs="?",
        const="",
        metavar="CONFIG",
        help="train through DeepSpeed's engine (pip install berth[deepspeed]), with this JSON configuration or berth's own; see docs/deepspeed.md",
    )
    add(
        "--deepspeed_zero_stage",
        nargs="?",
        const=1,
        type=int,
        choices=(0, 1, 2, 3),
        help="ZeRO stage of --deepspeed (implies it); 1 without a number",
    )
    add(
        "--reduce_dtype",
        choices=REDUCE_DTYPES,
        help="type gradients have between processes; sums over micro-batches are always fp32 (default: fp32)",
    )
    add("--allreduce_post_accumulation_fp16", action="store_true", help="same as --reduce_dtype fp16")


def _add_resume(group: Any) -> None:
    add = group.add_argument
    add("--phase2", action="store_true", help="this is phase 2: checkpoints count on from the phase-1 end")
    add("--phase1_end_step", type=int, help="step at which phase 1 ended; read from its checkpoint if not given, checked if given")
    add(
        "--resume_from_checkpoint",
        action="store_true",
        help="continue from the newest good checkpoint in --output_dir; with --phase2 and only phase 1 there, enter phase 2; with none there, start",
    )
    add("--resume_step", type=int, help="resume from this ckpt_<step>.pt instead of the newest (-1 = newest)")
    add("--resume_phase2", action="store_true", help="demand that a phase 2 checkpoint is there to continue")
    add(
        "--init_checkpoint",
        help="start from these weights: berth checkpoint, Hugging Face folder, safetensors or .bin/.pt; not used where a run is resumed",
    )
    add("--phase2_moments", choices=("keep", "reset"), default="keep", help="optimizer moments on entering phase 2")
    add("--phase2_step", choices=("reset", "continue"), default="reset", help="optimizer step count (bias correction) on entering phase 2")
    add(
        "--force_resume",
        action="store_true",
        help="resume although seed, batch, recipe, data or vocabulary differ; what is overridden is logged",
    )


def _add_output(group: Any) -> None:
    add = group.add_argument
    add("--num_steps_per_checkpoint", type=int, default=100, help="optimizer steps between checkpoints")
    add("--keep_checkpoints", type=int, default=3, help="newest checkpoints kept; phase ends are kept for ever")
    add("--skip_checkpoint", action="store_true", help="write no checkpoint at all (benchmarks)")
    add("--no_async_checkpoints", action="store_true", help="wait until a checkpoint is on disk before the next step")
    add("--log_freq", type=whole_number, default=1, help="optimizer steps between log records")
    add("--eval_freq", type=int, default=0, help="optimizer steps between evaluations on --eval_dir; 0 = start and end only")
    add(
        "--eval_samples",
        type=int,
        default=0,
        help="held-out sequences to evaluate, from the front of the first file; 0 = all",
    )
    add("--eval_batch_size", type=int, help="sequences a forward pass in evaluation; the micro batch if not given")
    add(
        "--json-summary",
        "--json_summary",
        dest="json_summary",
        help="run log, DLLogger JSON lines, appended across restarts (default: <output_dir>/dllogger.json)",
    )
    add("--tensorboard_dir", help="folder for TensorBoard, 'none' for none (default: <output_dir>/tensorboard)")
    add("--disable_progress_bar", action="store_true", help="plain log lines even on a terminal")


def _add_runtime(group: Any) -> None:
    add = group.add_argument
    add("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU, else cpu, if not given")
    add("--num_workers", type=int, default=2, help="optimizer steps of data prepared ahead by a thread; 0 = none")
    add("--timeout_min", type=float, default=30.0, help="minutes a process may hang, or a collective wait, before all fail")
    add("--dead_rank_s", type=float, default=60.0, help="seconds without a sign of life after which a process counts as lost")
    add(
        "--peak_tflops",
        type=float,
        help="peak of one device in TFLOP/s, for the MFU in the log; known for common GPUs",
    )
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    for flag in {**OBSOLETE_HARMLESS, **OBSOLETE_REFUSED}:
        kind: dict[str, Any] = {} if flag in _WITH_VALUE else {"action": "store_true"}
        add(flag, dest="obsolete" + flag.replace("-", "_"), help=argparse.SUPPRESS, **kind)


def whole_number(text: str) -> int:
    """A whole number, also when written as a float (``7038.``, which the public scripts' users type)."""
    try:
        value = float(text)
        if value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")


def parse_options(argv: Sequence[str]) -> Options:
    """Parse and check a command line.

    Raises :class:`ConfigError` that lists every mistake, one a line.
    """
    values = vars(build_parser().parse_args(list(argv)))
    problems: list[str] = []
    notices = _obsolete(values, problems)
    values.pop("local_rank")
    fp16 = values.pop("fp16")
    if fp16 and values["precision"] not in (None, "fp16"):
        problems.append(f"--fp16 contradicts --precision {values['precision']}; give one of them")
    reduce_fp16 = values.pop("allreduce_post_accumulation_fp16")
    if reduce_fp16 and values["reduce_dtype"] not in (None, "fp16"):
        problems.append(f"--allreduce_post_accumulation_fp16 contradicts --reduce_dtype {values['reduce_dtype']}; give one of them")
    values["reduce_dtype"] = "fp16" if reduce_fp16 else values["reduce_dtype"] or "fp32"
    values["precision"] = "fp16" if fp16 else values["precision"] or "fp32"
    values["json_summary"] = values["json_summary"] or str(Path(values["output_dir"]) / "dllogger.json")
    if values["tensorboard_dir"] is None:
        values["tensorboard_dir"] = str(Path(values["output_dir"]) / "tensorboard")
    elif values["tensorboard_dir"] == "none":
        values["tensorboard_dir"] = None
    for name in ("resume_step", "steps_this_run"):  # the public scripts' way of saying "not given"
        if values[name] == -1:
            values[name] = None
    options = Options(**values, notices=tuple(notices))
    problems += _problems(options)
    if problems:
        raise ConfigError("\n  ".join(problems) if len(problems) == 1 else "several options are wrong:\n  " + "\n  ".join(problems))
    return options


def _obsolete(values: dict[str, Any], problems: list[str]) -> list[str]:
    notices = []
    for flag, reason in OBSOLETE_HARMLESS.items():
        if values.pop("obsolete" + flag.replace("-", "_")) and flag not in ("--do_train", "--allreduce_post_accumulation"):
            notices.append(f"{flag} has no effect: {reason}")
    for flag, reason in OBSOLETE_REFUSED.items():
        if values.pop("obsolete" + flag.replace("-", "_")):
            problems.append(f"{flag}: {reason}")
    return notices


def _problems(options: Options) -> list[str]:
    found: list[str] = []

    def rule(good: bool, message: str) -> None:
        if not good:
            found.append(message)

    at_least_one = (
        "train_batch_size", "gradient_accumulation_steps", "max_steps", "num_steps_per_checkpoint", "keep_checkpoints", "log_freq",
        "max_consecutive_skips", "lr_decay_steps", "scale_growth_interval", "steps_this_run", "max_seq_length", "max_predictions_per_seq", "eval_batch_size",
    )  # fmt: skip
    for name in at_least_one:
        value = getattr(options, name)
        rule(value is None or value >= 1, f"--{name} is {value}, it must be at least 1")
    for name in (
        "num_workers",
        "max_rollbacks",
        "eval_freq",
        "eval_samples",
        "max_grad_norm",
        "weight_decay",
        "loss_scale",
        "seed",
        "lr_offset",
    ):
        value = getattr(options, name)
        rule(0 <= value < float("inf"), f"--{name} is {value}, it must be finite and not negative")
    for name in ("learning_rate", "init_loss_scale", "min_loss_scale", "lr_warmup_degree"):
        value = getattr(options, name)
        rule(0 < value < float("inf"), f"--{name} is {value}, it must be positive and finite")
    rule(options.seed < 2**63, f"--seed is {options.seed}, it must be below 2**63")
    rule(0 < options.lr_decay_rate <= 1, f"--lr_decay_rate is {options.lr_decay_rate}, it is a factor above 0 and at most 1")
    rule(0 < options.timeout_min <= 10080, f"--timeout_min is {options.timeout_min}, it must be above 0 and at most 10080 (a week)")
    rule(1 <= options.dead_rank_s <= 86400, f"--dead_rank_s is {options.dead_rank_s}, it must be between 1 and 86400 (a day)")
    rule(options.peak_tflops is None or 0 < options.peak_tflops < 1e9, f"--peak_tflops is {options.peak_tflops}, it must be positive")
    rule(
        not options.uses_deepspeed or options.shard == "none",
        f"--shard {options.shard} and --deepspeed exclude each other; give one of them",
    )
    rule(not options.deepspeed or Path(options.deepspeed).is_file(), f"--deepspeed {options.deepspeed} does not exist")
    rule(0 <= options.warmup_proportion <= 1, f"--warmup_proportion is {options.warmup_proportion}, it is a share between 0 and 1")
    prob = options.masked_lm_prob
    rule(prob is None or 0 < prob < 1, f"--masked_lm_prob is {prob}, it is a share above 0 and below 1")
    rule(
        not options.dynamic_masking or options.vocab_file is not None,
        "--dynamic_masking needs --vocab_file: it must know the special tokens",
    )
    size, cuts = options.train_batch_size, options.gradient_accumulation_steps
    if size >= 1 and cuts >= 1 and size % cuts:
        near = f"{size - size % cuts} or {size - size % cuts + cuts}" if size > cuts else str(cuts)
        rule(False, f"--train_batch_size {size} is not divisible by --gradient_accumulation_steps {cuts}; the nearest that is: {near}")
    rule(options.phase2 or options.phase1_end_step is None, "--phase1_end_step belongs to --phase2; drop it or add --phase2")
    rule(options.phase2 or not options.resume_phase2, "--resume_phase2 belongs to --phase2; drop it or add --phase2")
    rule(not options.eval_freq or options.eval_dir is not None, "--eval_freq needs --eval_dir")
    for name in ("config_file", "vocab_file"):
        path = getattr(options, name)
        rule(path is None or Path(path).is_file(), f"--{name} {path} does not exist")
    return found
