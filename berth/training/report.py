"""What a user sees of a run: log lines or a progress bar, the run log, TensorBoard, throughput.

Only rank 0 writes; on other ranks every method returns at once. Throughput counts the time of training steps alone (data wait
included; evaluation and checkpoints not) and leaves out the first steps of a process, which pay for warming up.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import time
from typing import Any

from tqdm import tqdm

from berth.runlog import RunLog
from berth.training.evaluate import Baselines, Evaluation
from berth.training.options import Options

WARM_UP_STEPS = 3

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Meter:
    """Sums over training steps: seconds, sequences, real tokens and losses, since the last report and since warm-up."""

    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    sequences: int = 0
    tokens: int = 0
    mlm: Any = 0.0
    nsp: Any = 0.0

    def add(self, seconds: float, data_seconds: float, sequences: int, tokens: int, mlm: Any, nsp: Any, skipped: bool) -> None:
        """Account for one step of this rank; a skipped one took time and samples, but its loss (not finite) does not count."""
        self.seconds += seconds
        self.data_seconds += data_seconds
        self.sequences += sequences
        self.tokens += tokens
        if not skipped:
            self.steps += 1
            self.mlm, self.nsp = self.mlm + mlm, self.nsp + nsp


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
    """All output of one process. ``open`` is separate X."""

    def __init__(self, options: Options, is_main: bool) -> None:
        self.options, self.is_main = options, is_main
        self.started = time.monotonic()
        self.log = RunLog(None)
        self.board: Any = None
        self.bar: Any = None
        self.window, self.total = Meter(), Meter()
        self._warm = 0
        self.last_loss = float("nan")

    def open(self, done: int, total: int, step: int) -> None:
        """Open the run log and TensorBoard, show the bar on a terminal. ``done`` of ``total`` steps are behind us, globally ``step``."""
        if not self.is_main:
            return
        self.log = RunLog(self.options.json_summary, self.started)
        if self.options.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.options.tensorboard_dir, purge_step=step + 1)
        if sys.stderr.isatty() and not self.options.disable_progress_bar:
            self.bar = tqdm(total=total, initial=done, unit="step", desc=f"phase {self.options.phase}", dynamic_ncols=True)
            handler = _BarHandler()
            handler.setFormatter(logging.getLogger().handlers[0].formatter)
            logging.getLogger().handlers[:] = [handler]

    def say(self, message: str, *arguments: object) -> None:
        """One line for people."""
        if self.is_main:
            logger.info(message, *arguments)

    def step_done(self, seconds: float, data_seconds: float, sequences: int, tokens: int, mlm: Any, nsp: Any, skipped: bool) -> None:
        """Account for one step of this rank (global losses' shares, in nats)."""
        numbers = (seconds, data_seconds, sequences, tokens, mlm, nsp, skipped)
        self.window.add(*numbers)
        self._warm += 1
        if self._warm > WARM_UP_STEPS:
            self.total.add(*numbers)
        if self.bar is not None and not skipped:
            self.bar.update(1)

    def log_step(self, sums: list[float], *, epoch: int, step: int, phase_step: int, facts: dict[str, Any]) -> None:
        """Write one step record. ``sums`` = MLM loss, NSP loss, sequences and tokens of the window, summed over ranks."""
        window, self.window = self.window, Meter()
        mlm, nsp = sums[0] / window.steps, sums[1] / window.steps
        self.last_loss = mlm + nsp
        rate = sums[2] / window.seconds if window.seconds else 0.0
        losses = {"mlm_loss": mlm} if self.options.objective == "mlm" else {"mlm_loss": mlm, "nsp_loss": nsp}
        data = {
            "average_loss": mlm + nsp,
            **losses,
            "steps_averaged": window.steps,
            **facts,
            "training_sequences_per_second": rate,
            "tokens_per_second": sums[3] / window.seconds if window.seconds else 0.0,
            "data_wait_share": window.data_seconds / window.seconds if window.seconds else 0.0,
        }
        self.log.log((epoch, step), data)
        if self.board is not None:
            for name in ("average_loss", *losses, "learning_rate", "grad_norm", "training_sequences_per_second"):
                self.board.add_scalar(f"train/{name}", data[name], step)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{mlm + nsp:.3f}", lr=f"{facts['learning_rate']:.2e}", seq_s=f"{rate:.0f}")
        elif self._print_due(phase_step):
            parts = ", ".join(f"{name.removesuffix('_loss')} {value:.4f}" for name, value in losses.items())
            self.say(
                "step %d (%d of %d)  loss %.4f (%s)  lr %.3e  grad norm %.2f  %.1f seq/s",
                step, phase_step, self.options.max_steps, mlm + nsp, parts, facts["learning_rate"], facts["grad_norm"], rate,
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
            for name in {"mlm_loss", "mlm_accuracy", "nsp_accuracy"} & scores.keys():
                self.board.add_scalar(f"held_out/{name}", scores[name], step)
        nsp = f", NSP accuracy {100 * result.nsp_accuracy:.2f} % (majority {100 * base.most_frequent_nsp_accuracy:.2f} %)"
        self.say(
            "held-out (%s, step %d): MLM loss %.4f nat (unigram entropy %.4f), accuracy %.2f %% (most frequent token %.2f %%)%s, %d sequences",
            when, step, result.mlm_loss, base.unigram_entropy, 100 * result.mlm_accuracy, 100 * base.most_frequent_token_accuracy,
            nsp if has_nsp else "", result.sequences,
        )  # fmt: skip

    def summary(self, world_size: int, facts: dict[str, Any]) -> None:
        """Write and print the closing record: seconds, sequences/s over the measured steps, final loss."""
        data: dict[str, Any] = {"e2e_train_time": time.monotonic() - self.started, **facts}
        words = [f"{facts['outcome']} at step {facts['global_step']}"]
        if math.isfinite(self.last_loss):
            data["final_loss"] = self.last_loss
            words.append(f"final loss {self.last_loss:.4f}")
        if self.total.steps:
            rate = self.total.sequences * world_size / self.total.seconds
            data.update(raw_train_time=self.total.seconds, training_sequences_per_second=rate)
            words.append(f"{rate:.1f} sequences/s over {self.total.steps} measured steps")
        self.log.log((), data)
        self.say("%s, %.0f s in all", ", ".join(words), data["e2e_train_time"])

    def close(self) -> None:
        """Close the bar, TensorBoard and the run log."""
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()
        self.log.close()
