"""What the benchmarks of whole training steps share: records of known lengths, berth's side built as run_pretraining.py builds it, the peer's
side, the ceiling of the machine, and where a step's time goes.

In: command lines of ``run_pretraining.py`` and folders of records. Out: sides that take one optimizer step a call on the same samples, and
numbers in plain SI units. Berth's side *is* a :class:`run_pretraining.Pretraining`: whatever its options switch on is what is timed. Rejected:
building model, optimizer and step here once more (a second way of wiring that drifts from the real one); one batch for all steps (packed batches
differ in shape from step to step, which is what compiled graphs must bear).
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from machine import machine  # noqa: E402

from berth.errors import ConfigError  # noqa: E402 - found beside this folder, installed or not
from berth.records.reader import open_index  # noqa: E402
from berth.records.rows import Rows, flat_places, masked_places  # noqa: E402
from berth.training import setup  # noqa: E402
from berth.training.backends import choose  # noqa: E402
from berth.training.batches import StepBatch  # noqa: E402
from berth.training.distributed import Communicator, choose_device, discover_rank  # noqa: E402
from berth.training.metrics import StepClock  # noqa: E402
from berth.training.options import Options, parse_options  # noqa: E402
from berth.training.parallel import Recipe, Replicated  # noqa: E402
from berth.training.precision import make_precision  # noqa: E402
from berth.training.state import step_seed  # noqa: E402
from berth.training.stop import StopRequest  # noqa: E402
from berth.training.watchdog import Watchdog  # noqa: E402

PREDICTIONS = {128: 20, 512: 80}
MASKED_SHARE = 0.15
CLS, SEP, MASK = 2, 3, 4
FILLS = ("1.0", "real")
MODELS = ("tiny", "small", "base", "large")


# -- data ------------------------------------------------------------------------------------------------------------------------------


def predictions_of(seq_length: int) -> int:
    """Most masked tokens of a sequence: 20 at 128 and 80 at 512 as in the recipes, else 15 %."""
    return PREDICTIONS.get(seq_length, max(1, round(seq_length * MASKED_SHARE)))


def make_rows(rows: int, seq_length: int, fill: str, vocab_size: int, seed: int) -> Rows:
    """Sentence pairs of random ids. ``fill`` ``1.0``: all full; ``real``: half are full, the others 52 to 100 % full, as in cpu_step.py.

    15 % of the tokens are masked, :func:`predictions_of` at most; positions ascend, [CLS] and [SEP] are never masked.
    """
    rng = np.random.default_rng(seed)
    most, low = predictions_of(seq_length), min(1000, vocab_size // 2)
    shares = np.ones(rows) if fill == "1.0" else np.where(rng.random(rows) < 0.5, 1.0, rng.uniform(0.52, 1.0, rows))
    lengths = np.maximum(np.rint(shares * seq_length).astype(np.int64), 5)
    made = Rows.zeros(rows, seq_length, most)
    places = np.arange(seq_length)
    real, middles = places < lengths[:, None], lengths // 2
    made.input_mask[:] = real
    made.segment_ids[:] = real & (places > middles[:, None])
    made.input_ids[:] = np.where(real, rng.integers(low, vocab_size, (rows, seq_length)), 0)
    ends = np.arange(rows)
    made.input_ids[:, 0], made.input_ids[ends, middles], made.input_ids[ends, lengths - 1] = CLS, SEP, SEP
    made.next_sentence_labels[:] = rng.integers(0, 2, rows)
    draws = np.where(made.input_ids >= low, rng.random((rows, seq_length)), 2.0)
    for row, order in enumerate(draws.argsort(axis=1)):
        count = min(most, max(1, round(int(lengths[row]) * MASKED_SHARE)), int(lengths[row]) - 3)
        chosen = np.sort(order[:count])
        made.masked_lm_positions[row, :count] = chosen
        made.masked_lm_ids[row, :count] = made.input_ids[row, chosen]
        made.input_ids[row, chosen] = MASK
    return made


def write_records(folder: Path, rows: Rows) -> None:
    """One records file with these rows in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "benchmark_training_0.hdf5", "w") as handle:
        for name, values in vars(rows).items():
            handle.create_dataset(name, data=values)


def padded_batches(rows: Rows, micro_batch: int, pin: bool) -> list[dict[str, Tensor]]:
    """Micro-batches in the order of ``rows`` as users of ``transformers`` make them: int64, padded to the full length, labels at all places."""
    count, width = rows.input_ids.shape
    labels = np.full(count * width, -100, np.int64)
    valid = masked_places(rows)
    labels[flat_places(rows, valid, width)] = rows.masked_lm_ids[valid]
    arrays = {
        "input_ids": rows.input_ids,
        "attention_mask": rows.input_mask,
        "token_type_ids": rows.segment_ids,
        "labels": labels.reshape(count, width),
        "next_sentence_label": rows.next_sentence_labels,
    }
    tensors = {name: torch.from_numpy(values.astype(np.int64)) for name, values in arrays.items()}
    cuts = [{name: tensor[at : at + micro_batch].contiguous() for name, tensor in tensors.items()} for at in range(0, count, micro_batch)]
    return [{name: tensor.pin_memory() for name, tensor in cut.items()} for cut in cuts] if pin else cuts


# -- the model -------------------------------------------------------------------------------------------------------------------------


def load_sizes(model: str, seq_length: int, *, dropout: float, layers: int | None = None) -> dict[str, Any]:
    """The configuration ``bert_configs/<model>.json`` or of a file, with this dropout everywhere, its vocabulary padded to a multiple of 8.

    Raises :class:`ConfigError` for a file that is none, and for sequences longer than the model's positions.
    """
    path = REPO / "bert_configs" / f"{model}.json" if model in MODELS else Path(model)
    if not path.is_file():
        raise ConfigError(f"--model {model}: neither one of {', '.join(MODELS)} nor a file; give one of them")
    values = setup.load_config(str(path)).padded(8).to_dict()
    if seq_length > values["max_position_embeddings"]:
        raise ConfigError(
            f"--seq {seq_length}: --model {model} has {values['max_position_embeddings']} positions; give a shorter sequence or another model"
        )
    changes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return {**values, **changes, **({} if layers is None else {"num_hidden_layers": min(layers, values["num_hidden_layers"])})}


# -- the sides -------------------------------------------------------------------------------------------------------------------------


class BerthSide:
    """Training steps as ``run_pretraining.py`` takes them, without its log and its checkpoints.

    Args:
        argv: its command line. Raises :class:`berth.errors.ConfigError` for a wrong one.
        pool: this many steps are prepared beforehand and repeated; 0 reads every step from the records while training.
    """

    def __init__(self, name: str, argv: Sequence[str], pool: int) -> None:
        from run_pretraining import Pretraining

        self.name, self.argv, self.pool_size = name, list(argv), pool
        options = parse_options(self.argv)
        place = discover_rank({})
        communicator = Communicator(place, choose_device(options.device, place), torch.distributed.default_pg_timeout)
        self.run = Pretraining(options, communicator, Watchdog(communicator), StopRequest())
        self.number, self.waited = 0, 0.0
        self.batches: Iterator[StepBatch] | None = None
        self.pool: list[StepBatch] = []
        self.follow(options.input_dir)

    @property
    def options(self) -> Options:
        """What the command line says."""
        return self.run.options

    def follow(self, folder: str | Path) -> None:
        """Train on the records of ``folder`` from here on, from their first sample."""
        self.close()
        run, self.folder = self.run, folder
        run.index = open_index(folder, "training", run.options.max_seq_length)
        run.stream = run.open_stream()
        self.batches, self.number = run.batches(), 0
        if self.pool_size:
            self.pool = [next(self.batches) for _ in range(self.pool_size)]
            self.close()

    def close(self) -> None:
        """End the thread that reads."""
        if self.batches is not None:
            self.batches.close()  # type: ignore[attr-defined]
            self.batches = None

    def prepare(self, steps: int) -> None:
        """Nothing: batches are in memory, or reading them is part of the step."""

    def step(self) -> tuple[StepBatch, Any]:
        """One optimizer step; its batch, and a result with ``mlm_loss``, ``nsp_loss``, ``grad_norm`` and ``skipped``."""
        start = time.perf_counter()
        batch = self.pool[self.number % self.pool_size] if self.batches is None else next(self.batches)
        self.waited += time.perf_counter() - start
        self.number += 1
        run = self.run
        agreed = run.agree(batch)
        torch.manual_seed(step_seed(run.options.seed, 1, 0, self.number))
        return batch, run.step(batch, self.number, agreed.masked, agreed.sequences)


class PeerSide:
    """``transformers``' BertForPreTraining in a plain loop: padded micro-batches, autocast, the optimizer, clipping and loss scale of berth.

    Args:
        beside: berth's side whose weights it takes and whose samples it trains on.
        sizes: configuration as of :func:`load_sizes`.
        compiled: through ``torch.compile`` as it is by default.
        micro_batch: sequences of a forward pass; berth's where ``None``.
    """

    def __init__(self, name: str, beside: BerthSide, sizes: dict[str, Any], *, compiled: bool, micro_batch: int | None = None) -> None:
        import transformers

        options, device = beside.options, beside.run.communicator.device
        self.name, self.options, self.device, self.beside, self.waited = name, options, device, beside, 0.0
        self.micro_batch, self.share = micro_batch or options.micro_batch, options.train_batch_size
        if self.share % self.micro_batch:
            raise ConfigError(f"--peer_micro_batch {self.micro_batch}: a step has {self.share} sequences; give a divisor of it")
        model = transformers.BertForPreTraining(transformers.BertConfig(**sizes, attn_implementation="sdpa"))
        model.load_state_dict({name: value.cpu() for name, value in beside.run.parallel.model_state().items()}, strict=True)
        self.model = model.to(device).train()
        backend = choose(
            options.optimizer_backend,
            device=device,
            optimizer=options.optimizer,
            sharding="none",
            precision=options.precision,
            compiled=compiled,
        )
        recipe = Recipe(options.optimizer, options.learning_rate, options.weight_decay, options.max_grad_norm, backend)
        communicator = Communicator(discover_rank({}), device, torch.distributed.default_pg_timeout)
        self.parallel = Replicated(self.model, communicator, StepClock(device, enabled=False), recipe)
        self.forward: Callable[..., Any] = torch.compile(self.model) if compiled else self.model
        self.precision = make_precision(
            "bf16" if options.precision == "fp8" else options.precision, device.type, options.loss_scale, options.init_loss_scale,
            options.min_loss_scale,
        )  # fmt: skip
        self.schedule = setup.build_schedule(options)
        self.follow(options.input_dir)

    def follow(self, folder: str | Path) -> None:
        """See :meth:`BerthSide.follow`."""
        if Path(folder) != Path(self.beside.folder):
            raise ConfigError(
                f"{self.name}: trains on {folder}, {self.beside.name} beside it on {self.beside.folder}; let that one follow first"
            )
        self.folder, self.stream = folder, self.beside.run.open_stream()
        self.number, self.ready = 0, dict[int, list[dict[str, Tensor]]]()

    def prepare(self, steps: int) -> None:
        """Make the batches of the next ``steps`` steps, on the host: reading them is not timed."""
        pool = self.beside.pool_size
        wanted = range(pool) if pool else range(self.number, self.number + steps)
        made = {number: self.ready[number] if number in self.ready else self.padded(number) for number in wanted}
        self.ready = made

    def padded(self, number: int) -> list[dict[str, Tensor]]:
        """Micro-batches of step ``number`` (from 0)."""
        rows = self.stream.rows(number * self.share, self.share).fitted(self.stream.index.seq_length, self.stream.index.max_predictions)
        return padded_batches(rows, self.micro_batch, self.device.type == "cuda")

    def step(self) -> tuple[None, Any]:
        """One optimizer step; nothing, and its result as of :meth:`BerthSide.step` (``loss`` is the mean over micro-batches)."""
        pool = self.beside.pool_size
        batches = self.ready[self.number % pool if pool else self.number]
        self.number += 1
        torch.manual_seed(step_seed(self.options.seed, 1, 0, self.number))
        scaler, total = self.precision.scaler, torch.zeros((), device=self.device)
        for batch in batches:
            there = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            with self.precision.autocast():
                loss = self.forward(**there).loss / len(batches)
            self.parallel.backward(loss * scaler.scale)
            total += loss.detach()
        self.schedule.apply(self.parallel.optimizer, self.number)
        update = self.parallel.update(scaler.scale, self.options.max_grad_norm)
        scaler.update(overflow=not update.finite)
        return None, SimpleNamespace(loss=total, grad_norm=update.norm, skipped=not update.finite)

    def close(self) -> None:
        """Nothing to end."""


Side = BerthSide | PeerSide


def loss_of(result: Any) -> float:
    """Both losses of a step together, mean over its labels."""
    return float(result.loss) if hasattr(result, "loss") else float(result.mlm_loss + result.nsp_loss)


# -- measuring -------------------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_facts(device: torch.device) -> dict[str, Any]:
    """What figures depend on: the machine, versions, and of a GPU its name, memory, capability and CUDA."""
    facts: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device.type}
    for library in ("transformers", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[library] = importlib.metadata.version(library)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    else:
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return machine(**facts)


def short_name(device: torch.device) -> str:
    """The device in a file name: ``h200``, ``a100-sxm4-80gb``, ``cpu``."""
    if device.type != "cuda":
        return device.type
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return name.removeprefix("nvidia-")


def matmul_tflops(device: torch.device, precision: str, size: int | None = None, repeats: int = 10) -> float:
    """TFLOP/s of a square matrix product in the type of ``precision``: what is reached at best here and now, median of ``repeats``.

    ``size`` is 8192 on a GPU and 512 elsewhere. fp32 and tf32 are float32, tf32 with torch's permission to round.
    """
    size = size or (8192 if device.type == "cuda" else 512)
    product = _product(device, precision, size)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        for _ in range(3):
            product()
        seconds = [_seconds_of(product, device) for _ in range(repeats)]
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / statistics.median(seconds) / 1e12


def _product(device: torch.device, precision: str, size: int) -> Callable[[], Tensor]:
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    if precision == "fp8":
        one, fast = torch.ones((), device=device), device.type == "cuda"
        a, b = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
        return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    left, right = left.to(kind), right.to(kind)
    return lambda: left @ right


def copy_gbps(device: torch.device, megabytes: int | None = None, repeats: int = 10) -> float:
    """GB/s of copying memory on the device, reads and writes counted, median of ``repeats``."""
    size = (megabytes or (1024 if device.type == "cuda" else 64)) << 20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return 2 * size / statistics.median(_seconds_of(lambda: target.copy_(source), device) for _ in range(repeats)) / 1e9


def _seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def held_bytes(device: torch.device) -> dict[str, int]:
    """Bytes of tensors on the device, and those the allocator holds for this process (with the pools of CUDA graphs); zeros on a CPU."""
    if device.type != "cuda":
        return {"tensors": 0, "reserved": 0}
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return {"tensors": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}


def peak_gib(side: Side, device: torch.device, own: dict[str, int]) -> dict[str, float] | None:
    """GiB that ``side`` needs in a step: at most in tensors, and what the allocator holds for it (CUDA graphs keep pools that are no tensors).

    ``own``: by how much :func:`held_bytes` grew with this side. ``None`` on a CPU, where the sides of one process cannot be told apart.
    """
    if device.type != "cuda":
        return None
    before = held_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    side.prepare(1)
    side.step()
    torch.cuda.synchronize(device)
    most = {"tensors": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    return {name: (most[name] - before[name] + own[name]) / 2**30 for name in most}


# -- where the time goes ---------------------------------------------------------------------------------------------------------------

GROUPS: tuple[tuple[str, str], ...] = (
    ("copies between host and device", r"memcpy (htod|dtoh)|memcpy h|memcpy d.*host|pin_memory"),
    ("attention", r"flash|fmha|attention|softmax_warp|sdpa|mha_|varlen"),
    ("optimizer", r"lamb|multi_tensor|foreach|adam|l2norm|lpnorm"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|gemv|splitk|wgmma|scaled_mm|aten::(add|b|badd)?mm\b|aten::_?linear|mkldnn"),
    ("loss", r"nll|softmax|cross_entropy|logsumexp|argmax"),
    ("compiled kernels", r"triton_|cpp_fused|inductor"),
    ("layer norm", r"layer_?norm|gammabeta|rowwisemoments"),
    ("random numbers", r"dropout|bernoulli|random|philox|distribution"),
    ("embedding and indexing", r"embedding|index|gather|scatter|sort"),
    ("memory on the device", r"memcpy|memset|copy|fill|zero|aten::(to|_to_copy|contiguous|cat)\b"),
    ("sums", r"reduce|sum|norm"),
    ("element by element", r"elementwise|vectorized|unrolled|aten::(add|mul|div|sub|gelu|gelu_backward|tanh|where|exp)_?\b"),
)
"""Group of a kernel (or, on a CPU, of an operation of torch): the first whose pattern is in its name."""


def group_of(kernel: str) -> str:
    """The name in :data:`GROUPS` for a kernel, else ``other``."""
    name = kernel.lower()
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), "other")


def where_time_goes(side: Side, device: torch.device, steps: int) -> dict[str, Any]:
    """Microseconds of a step by group of kernels (a CPU: of operations), from torch's profiler over ``steps`` steps, and the longest kernels.

    ``wall_us`` is of as many steps without the profiler; what kernels do not fill of it is ``idle_us`` (0 where streams overlap more).
    """
    side.prepare(2 * steps)
    start = time.perf_counter()
    for _ in range(steps):
        side.step()
    synchronize(device)
    wall_us = (time.perf_counter() - start) / steps * 1e6
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            side.step()
        synchronize(device)
    kernels: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        if on_gpu != (event.device_type == torch.autograd.DeviceType.CUDA):
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0 and not event.key.startswith(("ProfilerStep", "##")):
            before = kernels.get(event.key, (0.0, 0))
            kernels[event.key] = (before[0] + spent / steps, before[1] + event.count)
    groups: dict[str, dict[str, float]] = {}
    for name, (spent, calls) in kernels.items():
        entry = groups.setdefault(group_of(name), {"us": 0.0, "calls": 0.0})
        entry["us"], entry["calls"] = entry["us"] + spent, entry["calls"] + calls / steps
    busy = sum(entry["us"] for entry in groups.values())
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:20]
    return {
        "steps": steps,
        "wall_us": wall_us,
        "busy_us": busy,
        "idle_us": max(wall_us - busy, 0.0),
        "groups": {name: {**entry, "share": entry["us"] / busy} for name, entry in sorted(groups.items(), key=lambda item: -item[1]["us"])},
        "kernels": [{"name": name, "us": spent, "calls": calls / steps, "group": group_of(name)} for name, (spent, calls) in longest],
    }
