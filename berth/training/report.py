"""What a user sees of a run: log lines or a progress bar, the run log, TensorBoard, throughput.

In: batches and results of steps, the seconds of a :class:`StepClock`. Out: records whose keys docs/metrics.md explains. Only rank 0 writes,
but :meth:`Reporter.exchange` and :meth:`Reporter.summary` are collective. Throughput counts the time of training steps alone, which is what
the clock is given (data wait included; evaluation and checkpoints not); the summary leaves out the first steps of a process, which pay for
warming up.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from berth.flops import Sizes, peak_flops, step_flops
from berth.runlog import RunLog
from berth.training.batches import StepBatch
from berth.training.board import Board
from berth.training.distributed import Communicator
from berth.training.evaluate import Baselines, Evaluation
from berth.training.metrics import PARTS, StepClock, Window, WindowSums, memory_gib, reduce_window
from berth.training.options import Options
from berth.training.step import StepResult

WARM_UP_STEPS = 3
NOT_ON_BOARD = {"steps_averaged", "first_sample", "batch_crc32", "slowest_rank"}  # numbers that make no curve

logger = logging.getLogger(__name__)


def configure_logging(is_main: bool, rank: int) -> None:
    """Plain lines with the time on standard error; other ranks speak only of warnings, with their number."""
    form = "%(asctime)s %(message)s" if is_main else f"%(asctime)s [rank {rank}] %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format=form, datefmt="%H:%M:%S", stream=sys.stderr, force=True)
    for noisy in ("torch", "tensorboard"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _BarHandler(logging.Handler):
    """Prints log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class Reporter:
    """All output of one process. Files are opened by :meth:`open`, so that a run that is refused leaves none.

    Args:
        sizes: of the model, without the rows that pad its vocabulary.
        clock: what times the steps; read and set to zero here alone.
    """

    def __init__(self, options: Options, sizes: Sizes, communicator: Communicator, clock: StepClock) -> None:
        self.options, self.sizes, self.communicator, self.clock = options, sizes, communicator, clock
        self.is_main = communicator.is_main
        self.peak = peak_of(options, communicator.device)
        self.started = time.monotonic()
        self.log = RunLog(None)
        self.board: Board | None = None
        self.bar: Any = None
        self.window, self.total = WindowSums(), WindowSums()
        self._steps = 0
        self.last_loss = float("nan")

    def open(self, done: int, total: int, step: int) -> None:
        """Open the run log and TensorBoard, show the bar on a terminal. ``done`` of ``total`` steps are behind us, globally ``step``."""
        if not self.is_main:
            return
        self.log = RunLog(self.options.json_summary, self.started)
        if self.options.tensorboard_dir:
            self.board = Board(self.options.tensorboard_dir, step)
        if sys.stderr.isatty() and not self.options.disable_progress_bar:
            self.bar = tqdm(total=total, initial=done, unit="step", desc=f"phase {self.options.phase}", dynamic_ncols=True)
            handler = _BarHandler()
            handler.setFormatter(logging.getLogger().handlers[0].formatter)
            logging.getLogger().handlers[:] = [handler]

    def say(self, message: str, *arguments: object) -> None:
        """One line for people."""
        if self.is_main:
            logger.info(message, *arguments)

    def step_done(self, batch: StepBatch, result: StepResult) -> None:
        """Account for one step of this rank."""
        pairs = batch.sequences if self.options.objective == "mlm+nsp" else 0
        flops = step_flops(self.sizes, tokens=batch.tokens, squares=batch.squares, masked=batch.masked, pairs=pairs)
        self.window.add(batch, result, flops)
        self._steps += 1
        if self._steps > WARM_UP_STEPS:
            self.total.add(batch, result, flops)
        elif self._steps == WARM_UP_STEPS:
            self._read_clock()
        if self.bar is not None and not result.skipped:
            self.bar.update(1)

    def _read_clock(self) -> None:
        seconds = self.clock.take()
        self.window.add_parts(seconds)
        if self._steps > WARM_UP_STEPS:
            self.total.add_parts(seconds)

    @property
    def window_steps(self) -> int:
        """Updates since the last :meth:`exchange`, which no record tells of yet; the same number on all ranks."""
        return self.window.steps

    def drop_window(self) -> None:
        """Forget these updates, which a rollback has undone. The means of the summary, which are of work done, keep them."""
        self._read_clock()
        self.window = WindowSums()

    def exchange(self) -> Window:
        """What all ranks did since the last call, or the start. All ranks must call it: one collective."""
        self._read_clock()
        own, self.window = self.window, WindowSums()
        return self._reduced(own)

    def _reduced(self, own: WindowSums) -> Window:
        own.memory_gib = memory_gib(self.communicator.device)
        return reduce_window(self.communicator.gather_floats(own.values()), self.communicator.hosts)

    def log_step(self, window: Window, *, epoch: int, step: int, phase_step: int, facts: dict[str, Any]) -> None:
        """Write one step record: the means of ``window``, and ``facts`` of its last step."""
        self.last_loss = window.mlm_loss + window.nsp_loss
        if not self.is_main:
            return
        losses = (
            {"mlm_loss": window.mlm_loss} if self.options.objective == "mlm" else {"mlm_loss": window.mlm_loss, "nsp_loss": window.nsp_loss}
        )
        data = {
            "average_loss": self.last_loss,
            **losses,
            "mlm_accuracy": window.mlm_accuracy,
            "steps_averaged": window.steps,
            **facts,
            "batch_crc32": window.batch_crc32,
            **measures(window, self.peak),
        }
        self.log.log((epoch, step), data)
        if self.board is not None:
            self.board.add({f"train/{name}": value for name, value in data.items() if name not in NOT_ON_BOARD}, step)
        rate, slow = data["training_sequences_per_second"], window.straggler
        slowest = {"slowest": f"rank {slow.rank} on {slow.host} ({slow.ratio:.1f}x)"} if slow is not None and slow.named else {}
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{self.last_loss:.3f}", lr=f"{facts['learning_rate']:.2e}", seq_s=f"{rate:.0f}", **slowest)
        elif self._print_due(phase_step):
            parts = ", ".join(f"{name.removesuffix('_loss')} {value:.4f}" for name, value in losses.items())
            self.say(
                "step %d (%d of %d)  loss %.4f (%s)  accuracy %.2f %%  lr %.3e  grad norm %.2f  %.1f seq/s%s",
                step, phase_step, self.options.max_steps, self.last_loss, parts, 100 * window.mlm_accuracy, facts["learning_rate"],
                facts["grad_norm"], rate, "".join(f"  {name}: {value}" for name, value in slowest.items()),
            )  # fmt: skip

    def _print_due(self, phase_step: int) -> bool:
        """Without a bar: about fifty lines a phase, whatever --log_freq."""
        every = max(self.options.log_freq, self.options.max_steps // 40, 1)
        return phase_step <= 1 or phase_step % every < self.options.log_freq or phase_step == self.options.max_steps

    def log_evaluation(self, when: str, step: int, result: Evaluation, base: Baselines) -> None:
        """Write and print one evaluation beside its baselines."""
        has_nsp = self.options.objective != "mlm"
        scores = {name: value for name, value in dataclasses.asdict(result).items() if has_nsp or not name.startswith("nsp")}
        self.log.log((0, step), {"evaluation": when, **scores, "baselines": dataclasses.asdict(base)})
        if self.board is not None:
            curves = {"mlm_loss", "mlm_accuracy", "nsp_accuracy"} & scores.keys()
            self.board.add({f"held_out/{name}": scores[name] for name in sorted(curves)}, step)
        nsp = f", NSP accuracy {100 * result.nsp_accuracy:.2f} % (majority {100 * base.most_frequent_nsp_accuracy:.2f} %)"
        self.say(
            "held-out (%s, step %d): MLM loss %.4f nat (unigram entropy %.4f), accuracy %.2f %% (most frequent token %.2f %%)%s, %d sequences",
            when, step, result.mlm_loss, base.unigram_entropy, 100 * result.mlm_accuracy, 100 * base.most_frequent_token_accuracy,
            nsp if has_nsp else "", result.sequences,
        )  # fmt: skip

    def summary(self, facts: dict[str, Any]) -> None:
        """Write and print the closing record: seconds, final loss, and means over the measured steps. All ranks must call it: one collective."""
        self._read_clock()
        measured = self._reduced(self.total)
        data: dict[str, Any] = {"e2e_train_time": time.monotonic() - self.started, **facts}
        words = [f"{facts['outcome']} at step {facts['global_step']}"]
        if math.isfinite(self.last_loss):
            data["final_loss"] = self.last_loss
            words.append(f"final loss {self.last_loss:.4f}")
        if measured.steps:
            values = measures(measured, self.peak)
            data.update(raw_train_time=measured.seconds, **values)
            mfu = f" ({100 * values['mfu']:.1f} % MFU)" if "mfu" in values else ""
            words.append(f"{values['training_sequences_per_second']:.1f} sequences/s{mfu} over {measured.steps} measured steps")
        self.log.log((), data)
        self.say("%s, %.0f s in all", ", ".join(words), data["e2e_train_time"])

    def close(self) -> None:
        """Close the bar, TensorBoard and the run log."""
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()
        self.log.close()


def measures(window: Window, peak: float | None) -> dict[str, Any]:
    """How fast and where the time went, in the keys of the run log. ``peak``: FLOP/s of one device."""
    slow = window.straggler
    return {
        "training_sequences_per_second": window.rate(window.sequences),
        "tokens_per_second": window.rate(window.tokens),
        "tflops_per_device": window.flops_per_device / 1e12,
        **({} if peak is None else {"mfu": window.flops_per_device / peak}),
        "data_wait_share": window.shares["data"],
        **{f"share_{part}": window.shares[part] for part in PARTS},
        "memory_gib": window.memory_gib,
        **({} if slow is None else {"slowest_rank": slow.rank, "slowest_rank_ratio": slow.ratio}),
    }


def peak_of(options: Options, device: torch.device) -> float | None:
    """FLOP/s of one device at most: --peak_tflops, or what is known of the GPU."""
    if options.peak_tflops is not None:
        return options.peak_tflops * 1e12
    return peak_flops(torch.cuda.get_device_name(device), options.precision) if device.type == "cuda" else None
