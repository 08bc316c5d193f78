#!/usr/bin/env python3
"""Pretrain BERT from hdf5 records: phase 1 at sequence length 128, phase 2 at 512, LAMB by default.

    python run_pretraining.py --input_dir records/seq_128 --config_file bert_config.json --output_dir results ...
    torchrun --nproc_per_node 8 run_pretraining.py ...        # one process a GPU

In: records of create_pretraining_data.py, a BERT configuration. Out: ``ckpt_<step>.pt`` and ``manifest.json`` in --output_dir, the run
log ``dllogger.json``, TensorBoard. ``--help`` lists every option; docs/numerics.md says what is guaranteed.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import modeling
import optimization
from berth.errors import (
    BerthError,
    CheckpointError,
    ConfigError,
    DataError,
    JoinError,
    LostRankError,
    TrainingError,
    note_failure,
    print_error,
    run_main,
)
from berth.records.dynamic import DynamicMasker
from berth.records.reader import SampleStream
from berth.training import fastpath, setup
from berth.training.agreement import check_start
from berth.training.batches import BatchPlan, StepBatch, step_batches
from berth.training.checkpoint import CheckpointStore, Entry
from berth.training.distributed import Communicator, choose_device, discover_rank
from berth.training.graphs import Graphs
from berth.training.metrics import StepClock
from berth.training.nonfinite import describe
from berth.training.options import Options, parse_options
from berth.training.phases import Kind, Start, decide_start
from berth.training.precision import make_precision
from berth.training.report import Reporter, configure_logging
from berth.training.saving import AsyncSaver
from berth.training.state import RunState, check_identity, identity, step_seed
from berth.training.step import MaskedLmTrainingStep, StepResult, TrainingStep
from berth.training.stop import StopRequest, exit_code
from berth.training.watchdog import Watchdog

SECONDS_TO_SEE = 60.0  # that a shared file system may take to show a file on another node
SECONDS_TO_FINISH = 120.0  # that a process which must leave gives the checkpoint being written
REFUSED, NO_FILE, FILE = range(3)  # what rank 0 tells the others about the start


def main() -> int:
    options = parse_options(sys.argv[1:])
    place = discover_rank(os.environ)
    configure_logging(place.rank == 0, place.rank)
    stop = StopRequest()
    stop.install()
    device = choose_device(options.device, place)
    communicator = Communicator(place, device, datetime.timedelta(minutes=options.timeout_min), False, lambda: stop.signal_number)
    watchdog = Watchdog(communicator, dead_after=options.dead_rank_s, hung_after=options.timeout_min * 60)
    watchdog.start()
    try:
        communicator.connect()
        code = Pretraining(options, communicator, watchdog, stop).run()
    except JoinError as error:
        cause = error.__cause__
        leave_at_once((watchdog.explain(cause) if cause is not None else None) or error, watchdog)
    except (BerthError, SystemExit) as error:
        if communicator.world_size > 1:
            leave_at_once(error, watchdog)
        raise
    except Exception as error:  # a collective fails as soon as another rank is gone
        lost = failed_device(error, communicator) or watchdog.explain(error)
        if lost is not None:
            leave_at_once(lost, watchdog)
        # a bug, or a file system that fails; the others learn of it before the traceback
        note_failure(1, f"{type(error).__name__}: {error}")
        watchdog.failed(f"{type(error).__name__}: {error}", 1)
        raise
    watchdog.close()
    communicator.close()
    if communicator.world_size > 1:
        leave(code)
    return code


def failed_device(error: Exception, communicator: Communicator) -> LostRankError | None:
    """``error`` as that of a GPU that broke down (ECC, lost from the bus, an illegal access): another try, on another node, may do better."""
    if not isinstance(error, torch.AcceleratorError):
        return None
    where = f"rank {communicator.rank} on host {communicator.hosts[communicator.rank]}"
    return LostRankError(
        f"{where} lost its device: {str(error).splitlines()[0]}; go on from the newest checkpoint with --resume_from_checkpoint"
    )


def leave_at_once(error: BerthError | SystemExit, watchdog: Watchdog) -> None:
    """End one of several processes with its message and exit code; the others learn why."""
    code = error.exit_code if isinstance(error, BerthError) else int(error.code or 0)
    if isinstance(error, BerthError):
        print_error(error)
        watchdog.failed(str(error), code)
    else:
        watchdog.close()  # another rank says why
    if watchdog.before_leaving is not None:
        watchdog.before_leaving()
    leave(code)


def leave(code: int) -> None:
    """End one of several processes without gloo's teardown, which aborts at times when its peers are gone first."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Agreement(NamedTuple):
    """What all ranks know after the small all-reduce a step begins with: masked tokens and sequences of the global batch, the signal to stop
    for (0: none), and the rank whose batch could not be read (-1: none)."""

    masked: int
    sequences: int
    signal_number: int
    failed_rank: int


class Pretraining:
    """One run of one phase: everything is checked and loaded by the constructor, :meth:`run` is the loop."""

    def __init__(self, options: Options, communicator: Communicator, watchdog: Watchdog, stop: StopRequest) -> None:
        self.communicator, self.watchdog, self.stop = communicator, watchdog, stop
        watchdog.progress(0, "starting, reading records")
        self.config = setup.load_config(options.config_file)
        self.padded_config = self.config.padded(8)
        vocabulary = setup.load_vocabulary(options, self.config)
        self.index, vocab_sha256 = setup.open_training_data(options, self.config, vocabulary)
        self.options = options = setup.fit_objective(options, self.index)
        self.masking = setup.choose_masking(options, self.index)
        data = setup.data_fingerprint(self.index, self.masking)
        check_start(communicator, setup.start_facts(options, self.config, data, vocab_sha256))
        self.clock = StepClock(communicator.device)
        self.reporter = Reporter(options, self.config, communicator, self.clock)
        for notice in options.notices:
            self.reporter.say("note: %s", notice)
        self.held_out = setup.open_held_out(options, self.index, self.config.vocab_size, vocab_sha256, vocabulary)
        check_start(communicator, {"held-out records": "" if self.held_out is None else self.held_out.fingerprint})
        watchdog.progress(0, "starting, building the model")
        self.global_batch = options.train_batch_size * communicator.world_size
        self.identity = identity(options, self.config.to_dict(), communicator.world_size, data, vocab_sha256)
        self.precision = make_precision(
            options.precision, communicator.device.type, options.loss_scale, options.init_loss_scale, options.min_loss_scale,
            growth_interval=options.scale_growth_interval,
        )  # fmt: skip
        self.sharding = setup.effective_sharding(options, communicator.world_size)
        self.fast = fastpath.decide(options, self.padded_config, communicator.device, communicator.world_size, self.sharding)
        model = setup.build_model(options, self.padded_config, self.fast).to(communicator.device)
        self.parameters = modeling.count_parameters(model)
        self.parameter_names = [name for name, _ in model.named_parameters()]
        self.model_names = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.parallel, kernels = setup.spread(options, model, communicator, self.clock, self.fast)
        check_start(communicator, {"kernels": f"{kernels.name} {self.fast.name}"})
        self.reporter.say("fast path: %s; optimizer: %s", "; ".join(self.fast.reasons), kernels.reason)
        self.schedule = setup.build_schedule(options)
        self.store = CheckpointStore(options.output_dir, options.keep_checkpoints)
        self.saver = AsyncSaver(self.store)
        watchdog.before_leaving = lambda: self.saver.close(SECONDS_TO_FINISH)  # what is being written, whoever else is lost
        self.saved_at: tuple[int, int, int] | None = None
        self.fresh = True
        self.weights = "random"
        watchdog.progress(0, "starting, loading weights")
        self.state = self.start()
        check_start(communicator, {"weights at the start": self.weights})
        kind = TrainingStep if options.objective == "mlm+nsp" else MaskedLmTrainingStep
        self.step = kind(
            self.parallel, self.schedule, self.precision, self.clock, clip_norm=options.max_grad_norm, ahead=self.fast.copies_ahead,
            graphs=Graphs(list(model.parameters()), communicator.device, say=self.reporter.say) if self.fast.cuda_graphs else None,
            progress=lambda number, of: watchdog.progress(self.state.step + 1, f"micro-batch {number} of {of}"),
        )  # fmt: skip
        self.masker = None if self.masking is None or vocabulary is None else DynamicMasker(vocabulary, self.masking, options.seed)
        self.stream = self.open_stream()
        self.stream.rows(self.state.samples, 1)  # reads the first window now: damaged records are reported before anything is written

    def open_stream(self) -> SampleStream:
        """All samples in their order, from anywhere."""
        return SampleStream(self.index, self.options.seed, self.config.vocab_size, group=self.global_batch, transform=self.masker)

    # -- start --------------------------------------------------------------------------------------------------------

    def start(self) -> RunState:
        """Decide where to start (rank 0; berth/training/phases.py) and load what that needs on every rank."""
        start, payload = self.decide()
        self.reporter.say("%s", start.reason)
        state = RunState(phase=self.options.phase)
        if start.kind is Kind.INIT_WEIGHTS:
            self.load_initial(str(self.options.init_checkpoint), state)
        elif start.kind is Kind.ENTER_PHASE2:
            assert start.entry is not None and payload is not None
            check_identity(payload["identity"], self.identity, same_phase=False, force=self.options.force_resume, file=start.entry.file)
            self.load_weights(payload["model"])
            self.enter_phase2(payload, state)
        elif start.kind is Kind.CONTINUE:
            assert start.entry is not None and payload is not None
            check_identity(payload["identity"], self.identity, same_phase=True, force=self.options.force_resume, file=start.entry.file)
            self.restore(payload, state)
        return state

    def decide(self) -> tuple[Start, dict[str, Any] | None]:
        """Rank 0 decides and tells the others which checkpoint it is; all load the same file."""
        chosen, start, payload, refusal = [REFUSED, 0, 0], None, None, None
        if self.communicator.is_main:
            try:
                start, payload = self.decide_on_main()
                entry = start.entry
                chosen = [NO_FILE, 0, 0] if entry is None else [FILE, entry.phase, entry.step]
            except BerthError as error:
                refusal = error
        chosen = self.communicator.broadcast_ints(chosen)
        if chosen[0] == REFUSED:
            self.communicator.barrier()  # nobody leaves before all know
        if refusal is not None:
            raise refusal
        if chosen[0] == REFUSED:
            raise SystemExit(1)  # rank 0 says why
        if start is None:
            start, payload = self.follow_main(chosen)
        return start, payload

    def decide_on_main(self) -> tuple[Start, dict[str, Any] | None]:
        """Take the newest good checkpoint the rules allow, passing over damaged ones."""
        self.store.lock()
        while True:
            entries = self.store.entries()
            start = decide_start(entries, unusable=self.store.unusable, **self.resume_request())
            if start.entry is None:
                return start, None
            payload = self.load_or_pass_over(start.entry)
            if payload is not None:
                return start, payload

    def load_or_pass_over(self, entry: Entry) -> dict[str, Any] | None:
        """What a checkpoint holds; ``None`` when it is damaged: then it is out of consideration, and the one before it is next."""
        try:
            return self.store.load(entry)
        except CheckpointError as error:
            self.reporter.say("WARNING: %s; falling back to the checkpoint before it", error)
            self.store.pass_over(entry, error)
            return None

    def follow_main(self, chosen: list[int]) -> tuple[Start, dict[str, Any] | None]:
        if chosen[0] == NO_FILE:
            return decide_start([], **{**self.resume_request(), "resume_step": None, "must_continue_phase2": False}), None
        entry = self.entry_of(chosen[1], chosen[2])
        kind = Kind.CONTINUE if entry.phase == self.options.phase else Kind.ENTER_PHASE2
        return Start(kind, entry, ""), self.store.load(entry)

    def entry_of(self, phase: int, step: int) -> Entry:
        """The checkpoint that rank 0 chose, as this rank sees it."""
        give_up_at = time.monotonic() + SECONDS_TO_SEE
        while True:
            for entry in self.store.entries():
                if entry.place == (phase, step):
                    return entry
            if time.monotonic() > give_up_at:
                raise CheckpointError(
                    f"rank {self.communicator.rank} does not see ckpt_{step}.pt in {self.options.output_dir}; --output_dir must be on a "
                    "file system that all nodes share"
                )
            time.sleep(1.0)  # a shared file system may show a new file later on other nodes

    def resume_request(self) -> dict[str, Any]:
        options = self.options
        return {
            "output_dir": Path(options.output_dir),
            "phase": options.phase,
            "resume": options.resume_from_checkpoint,
            "init_checkpoint": options.init_checkpoint,
            "resume_step": options.resume_step,
            "must_continue_phase2": options.resume_phase2,
        }

    def load_initial(self, path: str, state: RunState) -> None:
        """Weights from any supported file; in phase 2, a berth checkpoint's optimizer moments as well."""
        from berth.export import load_weights, match_weights

        weights, _, source = load_weights(path)
        report = match_weights(self.model_names, weights)
        self.reporter.say("%s: %s", source, report)
        if report.missing or report.mismatched:
            raise CheckpointError(
                f"{path} does not fill this model: {report}. Use weights of the same architecture and --config_file, or "
                "convert_checkpoint.py"
            )
        self.load_weights(report.weights)
        if self.options.phase2:
            payload = setup.load_full_checkpoint(path)
            if payload is not None:
                check_identity(payload["identity"], self.identity, same_phase=False, force=self.options.force_resume, file=path)
                self.enter_phase2(payload, state)
            elif self.options.phase1_end_step is not None:
                state.offset = self.options.phase1_end_step

    def enter_phase2(self, payload: dict[str, Any], state: RunState) -> None:
        """Phase 2 begins: names count on from phase 1, moments and step as --phase2_moments / --phase2_step say (F3)."""
        state.offset = self.checked_phase1_end(int(payload["step"]))
        if self.options.phase2_moments == "keep" and payload.get("optimizer") is not None:
            self.load_moments(payload)
            if self.options.phase2_step == "reset":
                optimization.set_step(self.parallel.optimizer, 0)

    def checked_phase1_end(self, found: int) -> int:
        given = self.options.phase1_end_step
        if given is not None and given != found:
            raise ConfigError(f"--phase1_end_step {given} was given but phase 1 ended at step {found}; drop the option")
        return found

    def restore(self, payload: dict[str, Any], state: RunState) -> None:
        """Continue exactly where the checkpoint stands."""
        self.load_weights(payload["model"])
        self.load_moments(payload)
        self.precision.scaler.load_state_dict(payload["scaler"])
        state.phase_step, state.samples = int(payload["phase_step"]), int(payload["samples"])
        state.offset = int(payload["step"]) - state.phase_step
        if self.options.phase2:
            self.checked_phase1_end(state.offset)
        state.skipped, state.consecutive_skips = int(payload["skipped"]), int(payload["consecutive_skips"])
        state.rollbacks = int(payload.get("rollbacks", 0))
        self.fresh = False

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Take ``weights``; all ranks must have read the same, which is checked at the start."""
        self.weights = setup.weights_digest(weights)
        self.parallel.load_model(weights)

    def load_moments(self, payload: dict[str, Any]) -> None:
        """Moments and step counts from a checkpoint; the hyperparameters stay those of this command line."""
        optimizer = self.parallel.optimizer
        kept = ("params", "param_names", "step", "lr")
        given = [{key: value for key, value in group.items() if key not in kept} for group in optimizer.param_groups]
        try:
            self.parallel.load_optimizer(payload["optimizer"])
            for group, values in zip(optimizer.param_groups, given, strict=True):
                group.update(values)
            optimization.place_steps(optimizer)
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"the optimizer state in the checkpoint is not of this --optimizer {self.options.optimizer} ({error}); use the optimizer that "
                "wrote it, or --phase2_moments reset on entering phase 2"
            ) from error

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end of the phase, to --steps_this_run, or to a stop signal; the process's exit code."""
        if self.communicator.is_main:
            self.store.prepare()
        self.communicator.barrier()
        self.reporter.open(self.state.phase_step, self.options.max_steps, self.state.step)
        self.describe()
        signal_number, done_here = 0, 0
        if self.fresh:
            self.evaluate("start")
        batches = self.batches()
        try:
            while not self.finished(done_here):
                batch = self.next_batch(batches)
                agreed = self.agree(batch)
                if agreed.failed_rank >= 0:
                    self.give_up_on_data(batch, agreed.failed_rank)
                assert isinstance(batch, StepBatch)
                signal_number = agreed.signal_number
                if signal_number:
                    break
                torch.manual_seed(step_seed(self.options.seed, self.state.phase, self.communicator.rank, self.state.samples))
                self.watchdog.progress(self.state.step + 1, "step")
                result = self.step(batch, self.state.phase_step + 1, agreed.masked, agreed.sequences)
                self.state.advance(self.global_batch, result.skipped)
                done_here += 1
                self.report(batch, result)
                if self.diverged(result):
                    batches.close()
                    batches = self.batches()
                    continue
                if self.due(self.options.eval_freq, result):
                    self.evaluate("during")
                if self.due(self.options.num_steps_per_checkpoint, result):
                    self.save()
                self.tell_of_saved()
        finally:
            batches.close()
        return self.finish(signal_number, done_here)

    def batches(self) -> Iterator[StepBatch]:
        """This rank's batches from the cursor on, prepared ahead."""
        options, communicator = self.options, self.communicator
        plan = BatchPlan(
            self.global_batch, options.micro_batch, options.gradient_accumulation_steps,
            communicator.rank, communicator.world_size, not options.no_group_by_length, self.fast.unpad, self.fast.cuda_graphs,
        )  # fmt: skip
        return step_batches(self.stream, plan, self.state.samples, options.num_workers)

    def next_batch(self, batches: Iterator[StepBatch]) -> StepBatch | DataError:
        """The next batch, or why there is none: all ranks must learn that before one of them leaves."""
        self.clock.enter("data")
        self.watchdog.progress(self.state.step + 1, "reading data")
        try:
            return next(batches)
        except DataError as error:
            return error
        except OSError as error:
            return DataError(f"the training records cannot be read any more: {error}")

    def finished(self, done_here: int) -> bool:
        limit = self.options.steps_this_run
        return self.state.phase_step >= self.options.max_steps or (limit is not None and done_here >= limit)

    def agree(self, batch: StepBatch | DataError) -> Agreement:
        """One small all-reduce a step, in which every rank also says what it alone knows."""
        self.clock.enter("communication")
        self.watchdog.progress(self.state.step + 1, "waiting for the others")
        failed = isinstance(batch, DataError)
        mine = [0, 0] if isinstance(batch, DataError) else [batch.masked, batch.sequences]
        masked, sequences, asked, failures = self.communicator.sum([*mine, bool(self.stop.signal_number), failed])
        who = int(self.communicator.max([self.communicator.rank if failed else -1])[0]) if failures else -1
        self.clock.enter("other")
        return Agreement(int(masked), int(sequences), self.agreed_signal() if asked else 0, who)

    def agreed_signal(self) -> int:
        """The highest stop signal any rank has received so far, 0 for none; the same on all ranks."""
        return int(self.communicator.max([self.stop.signal_number])[0])

    def give_up_on_data(self, batch: StepBatch | DataError, rank: int) -> None:
        """Save what was trained, then end on all ranks with the error of the one that cannot read."""
        try:
            self.save_unless_saved()
            if self.communicator.is_main:
                self.saver.wait()
        except CheckpointError as error:
            self.reporter.say("WARNING: %s", error)
        self.communicator.barrier()
        if isinstance(batch, DataError):
            raise batch
        raise DataError(f"rank {rank} on {self.communicator.hosts[rank]} cannot read its training records; it says why")

    def due(self, every: int, result: StepResult) -> bool:
        """Whether something that happens every ``every`` updates is due now; the phase's end has its own turn."""
        step = self.state.phase_step
        return bool(every) and not result.skipped and step % every == 0 and step < self.options.max_steps

    def diverged(self, result: StepResult) -> bool:
        """Whether the run went back to a checkpoint because too many steps in a row were skipped; without --on_divergence rollback (or after
        too many of those) it ends here instead of burning its allocation."""
        if self.state.consecutive_skips < self.options.max_consecutive_skips:
            return False
        why = (
            f"{self.state.consecutive_skips} steps in a row had a non-finite gradient (global step {self.state.step}, loss scale "
            f"{self.precision.scaler.scale:g}): {describe(result.nonfinite, self.parameter_names)}"
        )
        if self.options.on_divergence == "rollback" and self.state.rollbacks < self.options.max_rollbacks:
            self.roll_back(why)
            return True
        tried = f" after {self.state.rollbacks} rollback(s)" if self.state.rollbacks else ""
        raise TrainingError(f"{why}{tried}; lower --learning_rate or resume an earlier checkpoint with --resume_step")

    def roll_back(self, why: str) -> None:
        """Weights, moments and step of the newest good checkpoint; the samples consumed since then are left out."""
        self.clock.stop()
        state, samples = self.state, self.state.samples
        entry, payload = self.newest_behind(why)
        skipped, rollbacks = state.skipped, state.rollbacks + 1
        self.restore(payload, state)
        state.samples, state.skipped, state.rollbacks, state.consecutive_skips = samples, skipped, rollbacks, 0
        self.reporter.drop_window()
        self.reporter.say(
            "WARNING: %s; rollback %d of %d to %s, samples %d to %d are left out", why, rollbacks, self.options.max_rollbacks,
            entry.file, entry.samples, samples - 1,
        )  # fmt: skip
        self.reporter.log.parameters(rollback=rollbacks, rollback_reason=why, skipped_samples=[entry.samples, samples])
        self.reporter.log.parameters(train_start=True, global_step=state.step)
        self.stream = self.open_stream()  # the thread that reads ahead may still be at work on the old one
        self.save()  # or a run that is killed before its next checkpoint would count from anew

    def newest_behind(self, why: str) -> tuple[Entry, dict[str, Any]]:
        """The newest good checkpoint of this phase that is not ahead of the run (after --resume_step there may be such), on every rank."""
        chosen, payload = [0, 0], None
        if self.communicator.is_main:
            self.saver.join()
            here = (self.state.phase, self.state.step)
            while payload is None:
                behind = [entry for entry in self.store.entries() if entry.phase == here[0] and entry.place <= here]
                if not behind:
                    break
                payload, chosen = self.load_or_pass_over(behind[-1]), [*behind[-1].place]
            if payload is None:
                chosen = [0, 0]
        chosen = self.communicator.broadcast_ints(chosen)
        if not chosen[0]:
            raise TrainingError(f"{why}; there is no checkpoint of this phase yet to roll back to; lower --learning_rate")
        entry = self.entry_of(*chosen)
        return entry, self.store.load(entry) if payload is None else payload

    # -- what the loop calls ------------------------------------------------------------------------------------------

    def describe(self) -> None:
        """Say what is about to happen, on the console and in the run log."""
        options, world = self.options, self.communicator.world_size
        self.reporter.say(
            "phase %d: %d parameters, %s on %s, %d process(es), sharding %s; global batch %d = %d x %d x %d (micro batch x accumulation x "
            "processes); %d instances of %d tokens in %d file(s); steps %d to %d",
            options.phase, self.parameters, options.precision, self.communicator.device, world, self.sharding, self.global_batch,
            options.micro_batch, options.gradient_accumulation_steps, world, self.index.rows, self.index.seq_length, len(self.index.files),
            self.state.phase_step, options.max_steps,
        )  # fmt: skip
        self.reporter.log.parameters(
            Config=self.config.to_dict(),
            SEED=options.seed,
            batch_size_per_gpu=options.micro_batch,
            learning_rate=options.learning_rate,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            global_batch=self.global_batch,
            world_size=world,
            sharding=self.sharding,
            hosts=self.communicator.hosts,
            phase=options.phase,
            phase1_end_step=self.state.offset,
            precision=options.precision,
            fast_path=self.fast.name,
            model_weights_num=self.parameters,
            data_fingerprint=self.identity["data"],
            dynamic_masking=None if self.masking is None else dataclasses.asdict(self.masking),
            options=dataclasses.asdict(options),
            torch=torch.__version__,
            device=str(self.communicator.device),
        )
        if self.state.phase_step < options.max_steps:  # a finished phase that is run again starts nothing
            self.reporter.log.parameters(train_start=True, global_step=self.state.step)

    def report(self, batch: StepBatch, result: StepResult) -> None:
        """Account for a step, and write a log record when one is due. A skipped step is reported at once."""
        self.reporter.step_done(batch, result)
        if result.skipped:
            names = describe(result.nonfinite, self.parameter_names)
            self.reporter.log.parameters(
                skipped_step=self.state.step + 1, loss_scale=self.precision.scaler.scale, grad_norm=result.grad_norm, nonfinite=names
            )
            self.reporter.say(
                "WARNING: step %d skipped, gradient norm %s (%s); loss scale is now %g",
                self.state.step + 1, result.grad_norm, names, self.precision.scaler.scale,
            )  # fmt: skip
            return
        self.last_update = batch.first_sample, result
        if self.state.phase_step % self.options.log_freq == 0:
            self.log_window()

    def log_window(self) -> None:
        """Write the record of the updates since the last one, if there are any. Collective."""
        if not self.reporter.window_steps:
            return
        first_sample, result = self.last_update
        facts = {
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "skipped_steps": self.state.skipped,
            "loss_scale": self.precision.scaler.scale,
            "first_sample": first_sample,
        }
        epoch = first_sample // self.index.rows
        self.reporter.log_step(self.reporter.exchange(), epoch=epoch, step=self.state.step, phase_step=self.state.phase_step, facts=facts)

    def evaluate(self, when: str) -> None:
        """Score the held-out shard, if there is one."""
        if self.held_out is None:
            return
        self.clock.stop()
        size = self.options.eval_batch_size or self.options.micro_batch
        with self.parallel.evaluating():
            result = self.held_out.evaluate(
                self.parallel.module, self.precision, self.communicator, size, lambda: self.watchdog.progress(self.state.step, "evaluation")
            )
        self.reporter.log_evaluation(when, self.state.step, result, self.held_out.baselines)

    def save(self) -> None:
        """Gather the state (all ranks) and hand it to the writer (rank 0), which goes on beside training."""
        if self.options.skip_checkpoint or not self.state.phase_step:  # before the first update there is nothing to keep
            return
        self.clock.stop()
        self.watchdog.progress(self.state.step, "checkpoint")
        model, optimizer, state = self.parallel.model_state(), self.parallel.optimizer_state(), self.state
        self.saved_at = (state.phase, state.step, state.samples)
        if not self.communicator.is_main:
            return
        payload = {
            "model": model,
            "optimizer": optimizer,
            "scaler": self.precision.scaler.state_dict(),
            "config": self.config.to_dict(),
            "objective": self.options.objective,
            "do_lower_case": self.index.lowercase,
            "identity": self.identity,
            "world_size": self.communicator.world_size,
            "sharding": self.sharding,
            "skipped": state.skipped,
            "consecutive_skips": state.consecutive_skips,
            "rollbacks": state.rollbacks,
        }
        self.saver.save(
            payload, step=state.step, phase=state.phase, phase_step=state.phase_step, samples=state.samples,
            final=state.phase_step >= self.options.max_steps,
        )  # fmt: skip
        if self.options.no_async_checkpoints:
            self.saver.join()
        self.tell_of_saved()

    def save_unless_saved(self) -> None:
        """Save what was trained since the last checkpoint, if anything was."""
        state = self.state
        if self.saved_at != (state.phase, state.step, state.samples):
            self.save()

    def tell_of_saved(self) -> None:
        """Log what the writer has finished."""
        for outcome in self.saver.poll():
            if outcome.path is not None:
                self.reporter.log.parameters(
                    checkpoint_step=outcome.step, checkpoint=outcome.path.name, seconds=outcome.seconds, stalled=outcome.stalled
                )
                self.reporter.say("saved %s", outcome.path)
            else:
                self.reporter.log.parameters(checkpoint_failed=outcome.step, reason=str(outcome.error))

    def finish(self, signal_number: int, done_here: int) -> int:
        """Save, evaluate, sum up."""
        self.log_window()  # of the steps since the last record, where a signal or --steps_this_run ended it early
        self.clock.stop()
        complete = self.state.phase_step >= self.options.max_steps
        already = complete and done_here == 0
        if complete and not already:
            self.evaluate("end")
        if done_here:
            self.save_unless_saved()  # last, so that a checkpoint of the phase's end means that everything before it was done
        self.saver.wait()
        self.tell_of_saved()
        signal_number = signal_number or self.agreed_signal()  # one that came with the last step or during the evaluation
        outcome = "stopped by a signal" if signal_number else f"phase {self.options.phase} complete" if complete else "stopped"
        if already:
            outcome = f"phase {self.options.phase} was already complete"
        facts = {"outcome": outcome, "global_step": self.state.step, "skipped_steps": self.state.skipped}
        self.reporter.summary(facts)
        self.reporter.close()
        self.communicator.barrier()
        return exit_code(signal_number) if signal_number else 0


if __name__ == "__main__":
    run_main(main)
