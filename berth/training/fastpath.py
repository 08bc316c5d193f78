"""Which parts of the fast path a run takes: packing, compilation, CUDA graphs, fused loss and projections, copies ahead, fast dropout.

In: the options, the device, how the state is spread. Out: a :class:`FastPath` whose every part has been checked to work here, and a line a
part for the log. ``auto`` takes what works and says why something does not; what was asked for by name and cannot be had is an error.
docs/performance.md says what each part buys, docs/decisions/2026-11-21-fast-path.md why it is made this way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

import modeling
from berth.errors import ConfigError
from berth.kernels import attention, cross_entropy, dropout, fp8
from berth.training import compiled, graphs
from berth.training.options import Options

COPIES_AHEAD = 1


@dataclasses.dataclass(frozen=True)
class FastPath:
    """What is used. ``compiled``: ``off``, ``layers`` or ``model``. ``copies_ahead``: micro-batches copied to the GPU before their turn.

    ``reasons``: sentences for the log, on what is used and on what is not.
    """

    unpad: bool = False
    compiled: str = "off"
    cuda_graphs: bool = False
    fused_cross_entropy: bool = False
    fused_projections: bool = False
    fp8: bool = False
    copies_ahead: int = 0
    fast_dropout: bool = False
    reasons: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def name(self) -> str:
        """For comparison over ranks: they must compute alike, or their weights drift apart by rounding."""
        values = dataclasses.asdict(self)
        values.pop("reasons")
        return " ".join(f"{key}={value}" for key, value in values.items())

    def prepare(self, model: modeling.BertBase) -> None:
        """Set the model's switches, before it is wrapped or compiled."""
        if isinstance(model, modeling.BertMaskedLMBase):
            model.fused_cross_entropy = self.fused_cross_entropy
        model.set_fused_projections(self.fused_projections)
        if self.fast_dropout:
            dropout.replace(model)
        if self.fp8:
            fp8.convert_linears(model)


def decide(options: Options, config: modeling.BertConfig, device: torch.device, world_size: int, sharding: str) -> FastPath:
    """Choose the fast path of a run. ``sharding``: how the state is really spread (``none`` on one process).

    Raises :class:`ConfigError` for a part that was asked for and cannot be had here, with the reason.
    """
    reasons: list[str] = []
    if options.precision == "fp8":
        reasons += _fp8(config, device, sharding)

    def chosen(flag: str, request: str, what: str, obstacle: Callable[[], str | None]) -> bool:
        if request == "off":
            reasons.append(f"{what} off: {flag} off")
            return False
        why = obstacle()
        if request == "on":
            _require(f"{flag} on", why, f"{flag} auto goes on without")
        reasons.append(what if why is None else f"{what} off: {why}")
        return why is None

    kind = attention_type(options.precision)
    unpad = chosen("--unpad", options.unpad, "packed batches", lambda: attention.unsupported(device, kind, config.head_size))
    deepspeed = "DeepSpeed's engine looks for modules that are called" if sharding == "deepspeed" else None
    fused = chosen("--fused_loss", options.fused_loss, "fused loss", lambda: deepspeed)
    slower = cross_entropy.unsupported(device, kind) if fused else None
    if slower is not None:
        reasons.append(f"fused loss in plain torch: {slower}")
    projections = chosen("--fused_qkv", options.fused_qkv, "fused projections", lambda: deepspeed or _no_projections(options, device))
    how = _compilation(options.compile, device, world_size, sharding, reasons)
    fast_dropout = chosen("--fast_dropout", options.fast_dropout, "fast dropout", lambda: _no_fast_dropout(device, how))
    if options.cuda_graphs:
        why = graphs.obstacle(sharding, device, checkpointing=options.checkpoint_activations)
        _require("--cuda_graphs", why or _few_recordings(options, unpad, world_size))
        reasons.append("CUDA graphs")
    if options.no_copy_ahead:
        reasons.append("copies ahead off: --no_copy_ahead")
    elif device.type == "cuda":
        reasons.append("copies ahead")
    return FastPath(
        unpad=unpad,
        compiled=how,
        cuda_graphs=options.cuda_graphs,
        fused_cross_entropy=fused,
        fused_projections=projections,
        fp8=options.precision == "fp8",
        copies_ahead=COPIES_AHEAD if device.type == "cuda" and not options.no_copy_ahead else 0,
        fast_dropout=fast_dropout,
        reasons=tuple(reasons),
    )


def attention_type(precision: str) -> torch.dtype:
    """Type in which attention gets its operands."""
    return {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def _few_recordings(options: Options, unpad: bool, world_size: int) -> str | None:
    """Why next to nothing would be recorded, None if most micro-batches are."""
    if not unpad:
        return "padded batches have a width of their own each time, so that hardly one is ever replayed; train with packed ones (--unpad)"
    if world_size > 1 and options.gradient_accumulation_steps == 1:
        return (
            "with several processes the last micro-batch of a step communicates and is not recorded, and with --gradient_accumulation_steps 1 "
            "there is no other; raise it (with --train_batch_size, which is of one process)"
        )
    return None


def _no_projections(options: Options, device: torch.device) -> str | None:
    if options.precision == "fp8":
        return "fp8 has its own linear layers"
    if device.type != "cuda" and options.fused_qkv == "auto":
        return "slower than three products on a CPU"
    return None


def _no_fast_dropout(device: torch.device, how: str) -> str | None:
    if device.type != "cpu":
        return f"it is for CPUs, this run is on {device.type}"
    return None if how == "off" else "compiled layers draw their own numbers"


def _compilation(request: str, device: torch.device, world_size: int, sharding: str, reasons: list[str]) -> str:
    """``off``, ``layers`` or ``model``."""
    if request == "off":
        reasons.append("compilation off: --compile off")
        return "off"
    obstacle = "DeepSpeed's engine wraps the modules itself" if sharding == "deepspeed" else compiled.unsupported(device)
    if request != "auto":
        _require(f"--compile {request}", obstacle, "--compile auto goes on without")
        if request == "model" and world_size > 1:
            raise ConfigError("--compile model: with several processes gradients are reduced layer by layer; use --compile layers")
        reasons.append(f"compiled ({request})")
        return request
    if obstacle is None and device.type == "cpu":
        obstacle = "compiling takes longer than it saves on a CPU"
    if obstacle is not None:
        reasons.append(f"compilation off: {obstacle}")
        return "off"
    how = "model" if world_size == 1 else "layers"
    reasons.append(f"compiled ({how})")
    return how


def _fp8(config: modeling.BertConfig, device: torch.device, sharding: str) -> list[str]:
    """What the log says of fp8. Raises :class:`ConfigError` where it cannot be had, also because no layer has the sizes."""
    if sharding == "deepspeed":
        _require(
            "--precision fp8",
            "fp8 rounds whole weights, and DeepSpeed may cut them into pieces",
            "leave --deepspeed out, or use --precision bf16",
        )
    _require("--precision fp8", fp8.obstacle(sharding))
    with torch.device("meta"):
        layer = modeling.BertLayer(config)
    converted, layers = fp8.convert_linears(layer), config.num_hidden_layers
    if not converted:
        sizes = f"hidden_size {config.hidden_size} and intermediate_size {config.intermediate_size}"
        _require(
            "--precision fp8",
            f"sizes must be multiples of {fp8.MULTIPLE}, and with {sizes} no layer has such",
            "change them, or use --precision bf16",
        )
    _require("--precision fp8", fp8.unsupported(device), "use --precision bf16")
    linears = sum(isinstance(module, torch.nn.Linear) for module in layer.modules())
    notice = fp8.notice(device)
    return [f"fp8: {converted * layers} of {linears * layers} linear layers of the encoder", *([] if notice is None else [notice])]


def _require(what: str, obstacle: str | None, way_out: str = "") -> None:
    if obstacle is not None:
        raise ConfigError(f"{what}: {obstacle}{way_out and '; '}{way_out}")
