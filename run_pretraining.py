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
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import modeling
import optimization
from berth.errors import BerthError, CheckpointError, ConfigError, DataError, TrainingError, print_error, run_main
from berth.launch.inputs import records_folder
from berth.records.dynamic import DynamicMasker, Masking
from berth.records.reader import RecordsIndex, SampleStream, open_index
from berth.text.vocabulary import Vocabulary
from berth.training.batches import BatchPlan, StepBatch, step_batches
from berth.training.checkpoint import MANIFEST, CheckpointStore, Entry, read_checkpoint
from berth.training.distributed import Communicator, choose_device, discover_rank
from berth.training.evaluate import HeldOut
from berth.training.options import Options, parse_options
from berth.training.phases import Kind, Start, decide_start
from berth.training.precision import make_precision
from berth.training.report import Reporter, configure_logging
from berth.training.state import RunState, check_identity, identity, step_seed
from berth.training.step import MaskedLmTrainingStep, StepResult, TrainingStep
from berth.training.stop import StopRequest, exit_code

REFUSED, NO_FILE, FILE = range(3)  # what rank 0 tells the others about the start


def main() -> int:
    options = parse_options(sys.argv[1:])
    place = discover_rank(os.environ)
    configure_logging(place.rank == 0, place.rank)
    stop = StopRequest()
    stop.install()
    device = choose_device(options.device, place)
    communicator = Communicator(place, device, datetime.timedelta(minutes=options.timeout_min))
    try:
        code = Pretraining(options, communicator, stop).run()
    except (BerthError, SystemExit) as error:
        if communicator.world_size > 1:
            leave_at_once(error)
        raise
    communicator.close()
    if communicator.world_size > 1:
        leave(code)
    return code


def leave_at_once(error: BerthError | SystemExit) -> None:
    """End one of several processes with its message and exit code."""
    if isinstance(error, BerthError):
        print_error(error)
    leave(error.exit_code if isinstance(error, BerthError) else int(error.code or 0))


def leave(code: int) -> None:
    """End one of several processes without gloo's teardown, which aborts at times when its peers are gone first."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Pretraining:
    """One run of one phase: everything is checked and loaded by the constructor, :meth:`run` is the loop."""

    def __init__(self, options: Options, communicator: Communicator, stop: StopRequest) -> None:
        self.communicator, self.stop = communicator, stop
        self.config = load_config(options.config_file)
        self.padded_config = self.config.padded(8)
        vocabulary = load_vocabulary(options, self.config)
        self.index, vocab_sha256 = open_training_data(options, self.config, vocabulary)
        self.options = options = fit_objective(options, self.index)
        self.masking = choose_masking(options, self.index)
        self.reporter = Reporter(options, communicator.is_main)
        for notice in options.notices:
            self.reporter.say("note: %s", notice)
        self.held_out = open_held_out(options, self.index, self.config.vocab_size, vocab_sha256, vocabulary)
        self.global_batch = options.train_batch_size * communicator.world_size
        data = data_fingerprint(self.index, self.masking)
        self.identity = identity(options, self.config.to_dict(), communicator.world_size, data, vocab_sha256)
        self.precision = make_precision(
            options.precision, communicator.device.type, options.loss_scale, options.init_loss_scale, options.min_loss_scale
        )
        self.model = build_model(options, self.padded_config).to(communicator.device)
        self.optimizer = build_optimizer(options, self.model)
        self.schedule = build_schedule(options)
        self.store = CheckpointStore(options.output_dir, options.keep_checkpoints)
        self.fresh = True
        self.state = self.start()
        self.step = self.build_step()
        masker = None if self.masking is None or vocabulary is None else DynamicMasker(vocabulary, self.masking, options.seed)
        self.stream = SampleStream(self.index, options.seed, self.config.vocab_size, group=self.global_batch, transform=masker)
        self.stream.rows(self.state.samples, 1)  # reads the first window now: damaged records are reported before anything is written

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
            self.model.load_state_dict(payload["model"])
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
            try:
                return start, self.store.load(start.entry)
            except CheckpointError as error:
                self.reporter.say("WARNING: %s; falling back to the checkpoint before it", error)
                self.store.pass_over(start.entry, error)

    def follow_main(self, chosen: list[int]) -> tuple[Start, dict[str, Any] | None]:
        if chosen[0] == NO_FILE:
            return decide_start([], **{**self.resume_request(), "resume_step": None, "must_continue_phase2": False}), None
        entries = [entry for entry in self.store.entries() if (entry.phase, entry.step) == (chosen[1], chosen[2])]
        if not entries:
            raise CheckpointError(
                f"rank {self.communicator.rank} does not see ckpt_{chosen[2]}.pt in {self.options.output_dir}; --output_dir must be on a "
                "file system that all nodes share"
            )
        kind = Kind.CONTINUE if entries[0].phase == self.options.phase else Kind.ENTER_PHASE2
        return Start(kind, entries[0], ""), self.store.load(entries[0])

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
        report = match_weights({name: tensor.shape for name, tensor in self.model.state_dict().items()}, weights)
        self.reporter.say("%s: %s", source, report)
        if report.missing or report.mismatched:
            raise CheckpointError(
                f"{path} does not fill this model: {report}. Use weights of the same architecture and --config_file, or "
                "convert_checkpoint.py"
            )
        self.model.load_state_dict(report.weights)
        if self.options.phase2:
            payload = load_full_checkpoint(path)
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
                optimization.set_step(self.optimizer, 0)

    def checked_phase1_end(self, found: int) -> int:
        given = self.options.phase1_end_step
        if given is not None and given != found:
            raise ConfigError(f"--phase1_end_step {given} was given but phase 1 ended at step {found}; drop the option")
        return found

    def restore(self, payload: dict[str, Any], state: RunState) -> None:
        """Continue exactly where the checkpoint stands."""
        self.model.load_state_dict(payload["model"])
        self.load_moments(payload)
        self.precision.scaler.load_state_dict(payload["scaler"])
        state.phase_step, state.samples = int(payload["phase_step"]), int(payload["samples"])
        state.offset = int(payload["step"]) - state.phase_step
        if self.options.phase2:
            self.checked_phase1_end(state.offset)
        state.skipped, state.consecutive_skips = int(payload["skipped"]), int(payload["consecutive_skips"])
        self.fresh = False

    def load_moments(self, payload: dict[str, Any]) -> None:
        """Moments and step counts from a checkpoint; the hyperparameters stay those of this command line."""
        kept = ("params", "param_names", "step", "lr")
        given = [{key: value for key, value in group.items() if key not in kept} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(payload["optimizer"])
            for group, values in zip(self.optimizer.param_groups, given, strict=True):
                group.update(values)
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"the optimizer state in the checkpoint is not of this --optimizer {self.options.optimizer} ({error}); use the optimizer that "
                "wrote it, or --phase2_moments reset on entering phase 2"
            ) from error

    def build_step(self) -> TrainingStep:
        kind = TrainingStep if self.options.objective == "mlm+nsp" else MaskedLmTrainingStep
        return kind(
            self.model,
            self.optimizer,
            self.schedule,
            self.precision,
            self.communicator,
            global_norm=optimization.global_norm,
            clips_itself=isinstance(self.optimizer, optimization.Lamb),
            clip_norm=self.options.max_grad_norm,
            reduce_fp16=self.options.allreduce_post_accumulation_fp16,
        )

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
        batches = step_batches(self.stream, self.plan(), self.state.samples, self.options.num_workers)
        try:
            while not self.finished(done_here):
                began = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - began
                masked, sequences, signal_number = self.agree(batch)
                if signal_number:
                    break
                torch.manual_seed(step_seed(self.options.seed, self.state.phase, self.communicator.rank, self.state.samples))
                result = self.step(batch, self.state.phase_step + 1, masked, sequences)
                self.state.advance(self.global_batch, result.skipped)
                done_here += 1
                self.reporter.step_done(
                    time.monotonic() - began, waited, batch.sequences, batch.tokens, result.mlm_loss, result.nsp_loss, result.skipped
                )
                self.report(batch, result, last=self.finished(done_here))
                self.guard(result)
                if self.due(self.options.eval_freq, result):
                    self.evaluate("during")
                if self.due(self.options.num_steps_per_checkpoint, result):
                    self.save()
        finally:
            batches.close()
        return self.finish(signal_number, done_here)

    def plan(self) -> BatchPlan:
        options, communicator = self.options, self.communicator
        return BatchPlan(
            self.global_batch, options.micro_batch, options.gradient_accumulation_steps,
            communicator.rank, communicator.world_size, not options.no_group_by_length,
        )  # fmt: skip

    def finished(self, done_here: int) -> bool:
        limit = self.options.steps_this_run
        return self.state.phase_step >= self.options.max_steps or (limit is not None and done_here >= limit)

    def agree(self, batch: StepBatch) -> tuple[int, int, int]:
        """Masked tokens and sequences of the global batch, and the stop signal any rank received: one small all-reduce."""
        masked, sequences, asked = self.communicator.sum([batch.masked, batch.sequences, bool(self.stop.signal_number)])
        return int(masked), int(sequences), self.agreed_signal() if asked else 0

    def agreed_signal(self) -> int:
        """The highest stop signal any rank has received so far, 0 for none; the same on all ranks."""
        return int(self.communicator.max([self.stop.signal_number])[0])

    def due(self, every: int, result: StepResult) -> bool:
        """Whether something that happens every ``every`` updates is due now; the phase's end has its own turn."""
        step = self.state.phase_step
        return bool(every) and not result.skipped and step % every == 0 and step < self.options.max_steps

    def guard(self, result: StepResult) -> None:
        """Give up when every step is skipped: the run has diverged and would burn its allocation."""
        if self.state.consecutive_skips >= self.options.max_consecutive_skips:
            raise TrainingError(
                f"{self.state.consecutive_skips} steps in a row had a non-finite gradient (global step {self.state.step}, loss scale "
                f"{self.precision.scaler.scale:g}); lower --learning_rate or resume an earlier checkpoint with --resume_step"
            )

    # -- what the loop calls ------------------------------------------------------------------------------------------

    def describe(self) -> None:
        """Say what is about to happen, on the console and in the run log."""
        options, world = self.options, self.communicator.world_size
        parameters = modeling.count_parameters(self.model)
        self.reporter.say(
            "phase %d: %d parameters, %s on %s, %d process(es); global batch %d = %d x %d x %d (micro batch x accumulation x processes); "
            "%d instances of %d tokens in %d file(s); steps %d to %d",
            options.phase, parameters, options.precision, self.communicator.device, world, self.global_batch, options.micro_batch,
            options.gradient_accumulation_steps, world, self.index.rows, self.index.seq_length, len(self.index.files),
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
            phase=options.phase,
            phase1_end_step=self.state.offset,
            precision=options.precision,
            model_weights_num=parameters,
            data_fingerprint=self.identity["data"],
            dynamic_masking=None if self.masking is None else dataclasses.asdict(self.masking),
            options=dataclasses.asdict(options),
            torch=torch.__version__,
            device=str(self.communicator.device),
        )
        if self.state.phase_step < options.max_steps:  # a finished phase that is run again starts nothing
            self.reporter.log.parameters(train_start=True, global_step=self.state.step)

    def report(self, batch: StepBatch, result: StepResult, last: bool) -> None:
        """Write a log record when one is due, or this is the ``last`` step of the process. A skipped step is reported at once."""
        if result.skipped:
            self.reporter.log.parameters(
                skipped_step=self.state.step + 1, loss_scale=self.precision.scaler.scale, grad_norm=result.grad_norm
            )
            self.reporter.say(
                "WARNING: step %d skipped, gradient norm %s; loss scale is now %g",
                self.state.step + 1, result.grad_norm, self.precision.scaler.scale,
            )  # fmt: skip
            return
        step = self.state.phase_step
        if step % self.options.log_freq and not last:
            return
        window = self.reporter.window
        sums = self.communicator.sum([float(window.mlm), float(window.nsp), window.sequences, window.tokens])
        facts = {
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "skipped_steps": self.state.skipped,
            "loss_scale": self.precision.scaler.scale,
            "first_sample": batch.first_sample,
            "batch_crc32": batch.checksum,
        }
        epoch = batch.first_sample // self.index.rows
        self.reporter.log_step(sums, epoch=epoch, step=self.state.step, phase_step=step, facts=facts)

    def evaluate(self, when: str) -> None:
        """Score the held-out shard, if there is one."""
        if self.held_out is None:
            return
        size = self.options.eval_batch_size or self.options.micro_batch
        result = self.held_out.evaluate(self.model, self.precision, self.communicator, size)
        self.reporter.log_evaluation(when, self.state.step, result, self.held_out.baselines)

    def save(self) -> None:
        """Write a checkpoint (rank 0)."""
        if self.options.skip_checkpoint or not self.communicator.is_main:
            return
        state = self.state
        payload = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "config": self.config.to_dict(),
            "objective": self.options.objective,
            "do_lower_case": self.index.lowercase,
            "identity": self.identity,
            "skipped": state.skipped,
            "consecutive_skips": state.consecutive_skips,
        }
        path = self.store.save(
            payload, step=state.step, phase=state.phase, phase_step=state.phase_step, samples=state.samples,
            final=state.phase_step >= self.options.max_steps,
        )  # fmt: skip
        self.reporter.log.parameters(checkpoint_step=state.step, checkpoint=path.name)
        self.reporter.say("saved %s", path)

    def finish(self, signal_number: int, done_here: int) -> int:
        """Save, evaluate, sum up."""
        complete = self.state.phase_step >= self.options.max_steps
        already = complete and done_here == 0
        if complete and not already:
            self.evaluate("end")
        if done_here and not self.saved_already():
            self.save()  # last, so that a checkpoint of the phase's end means that everything before it was done
        signal_number = signal_number or self.agreed_signal()  # one that came with the last step or during the evaluation
        outcome = "stopped by a signal" if signal_number else f"phase {self.options.phase} complete" if complete else "stopped"
        if already:
            outcome = f"phase {self.options.phase} was already complete"
        facts = {"outcome": outcome, "global_step": self.state.step, "skipped_steps": self.state.skipped}
        self.reporter.summary(self.communicator.world_size, facts)
        self.reporter.close()
        self.communicator.barrier()
        return exit_code(signal_number) if signal_number else 0

    def saved_already(self) -> bool:
        """Whether the regular checkpoint of this very step was just written."""
        if not self.communicator.is_main or self.state.phase_step >= self.options.max_steps:
            return False
        return any(_is_at(entry, self.state) for entry in self.store.entries())


def _is_at(entry: Entry, state: RunState) -> bool:
    return (entry.phase, entry.step, entry.samples) == (state.phase, state.step, state.samples)


def load_config(path: str) -> modeling.BertConfig:
    """The model configuration; its mistakes become one :class:`ConfigError`."""
    try:
        return modeling.BertConfig.from_json_file(path)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--config_file {path}: {error}") from error


def load_vocabulary(options: Options, config: modeling.BertConfig) -> Vocabulary | None:
    """--vocab_file, checked against the model; ``None`` when it was not given."""
    if options.vocab_file is None:
        return None
    vocabulary = Vocabulary.load(options.vocab_file)
    check_vocabulary_size(vocabulary.size, f"--vocab_file {options.vocab_file} is", options, config)
    return vocabulary


def open_training_data(options: Options, config: modeling.BertConfig, vocabulary: Vocabulary | None) -> tuple[RecordsIndex, str]:
    """Index the records and check them against the flags, the vocabulary and the model; (index, vocabulary sha256 or '')."""
    index = open_index(records_of(options.input_dir, options), "training", options.max_seq_length, vocabulary=vocabulary)
    # where masks are drawn it is this option that decides; Parquet does not say how many a row may have
    free = options.dynamic_masking or not index.masked or index.files[0].layout == "parquet"
    if options.max_predictions_per_seq not in (None, index.max_predictions) and not free:
        raise DataError(
            f"the records in {options.input_dir} have {index.max_predictions} predictions a sequence but --max_predictions_per_seq is "
            f"{options.max_predictions_per_seq}; pass {index.max_predictions} or make the records again"
        )
    if index.seq_length > config.max_position_embeddings:
        raise ConfigError(
            f"the records in {options.input_dir} have {index.seq_length} tokens a sequence, the model has "
            f"{config.max_position_embeddings} positions (max_position_embeddings in {options.config_file})"
        )
    for file in index.files:
        check_vocabulary_size(file.vocab_size, f"the records {file.path} were made with", options, config)
    digests = {file.vocab_sha256: file.path for file in index.files if file.vocab_sha256}
    if len(digests) > 1:
        (_, one), (_, other), *_ = digests.items()
        raise DataError(f"{one} and {other} were made with different vocabularies; make the records again with one")
    digest = next(iter(digests), "")
    if vocabulary is not None:
        if digest and vocabulary.sha256 != digest:
            raise DataError(f"the records in {options.input_dir} were made with another vocabulary than --vocab_file {options.vocab_file}")
        digest = vocabulary.sha256
    return index, digest


def records_of(folder: str, options: Options) -> str:
    """The folder of records that is meant: itself, or the one of a work folder of data.prepare that has the lengths asked for."""
    return str(records_folder(folder, options.max_seq_length, None if options.dynamic_masking else options.max_predictions_per_seq))


def fit_objective(options: Options, index: RecordsIndex) -> Options:
    """``options`` with the objective the records allow: rows that are no sentence pairs have no next sentence to predict."""
    if index.objective == "mlm+nsp" or options.objective == "mlm":
        return options
    notice = "the records are no sentence pairs (objective mlm): training on masked tokens alone, as with --objective mlm"
    return dataclasses.replace(options, objective="mlm", notices=(*options.notices, notice))


def choose_masking(options: Options, index: RecordsIndex) -> Masking | None:
    """How masks are drawn while reading; ``None`` when those of the records are used.

    Raises :class:`DataError` for records without masks and no --dynamic_masking, :class:`ConfigError` for its options without it.
    """
    parquet = index.files[0].layout == "parquet"
    if not options.dynamic_masking and (index.masked or not parquet):
        if not index.masked:
            raise DataError(
                f"the records in {options.input_dir} hold no masks (made with --masking none); train with --dynamic_masking --vocab_file, or "
                "make them again with masks"
            )
        for name in ("masked_lm_prob", "whole_word_mask"):
            if getattr(options, name):
                raise ConfigError(f"--{name} belongs to --dynamic_masking; the records in {options.input_dir} hold their own masks")
        return None
    prob = options.masked_lm_prob or index.masked_lm_prob or 0.15
    most = options.max_predictions_per_seq or index.max_predictions
    return Masking(prob, min(most, index.seq_length), options.whole_word_mask)


def data_fingerprint(index: RecordsIndex, masking: Masking | None) -> str:
    """What a resumed run must read again: the records, and the rules of masks that are drawn while reading."""
    if masking is None:
        return index.fingerprint
    return hashlib.sha256(f"{index.fingerprint} {sorted(dataclasses.asdict(masking).items())}".encode()).hexdigest()


def check_vocabulary_size(size: int, what: str, options: Options, config: modeling.BertConfig) -> None:
    """A vocabulary and the model's ``vocab_size`` must be equal, padding to a multiple of 8 apart. 0 = unknown."""
    if size and -(-size // 8) * 8 != config.padded(8).vocab_size:
        raise ConfigError(
            f"{what} a vocabulary of {size} entries, but vocab_size in {options.config_file} is {config.vocab_size}; use the bert_config.json "
            "that data/vocab.py wrote with the vocabulary"
        )


def open_held_out(
    options: Options, index: RecordsIndex, vocab_size: int, vocab_sha256: str, vocabulary: Vocabulary | None
) -> HeldOut | None:  # fmt: skip
    """The held-out records, or ``None`` without --eval_dir. Their own masks are scored; where they have none, masks that never change."""
    if options.eval_dir is None:
        return None
    held_out = open_index(
        records_of(options.eval_dir, options), "test", index.seq_length, "the training records' length", vocabulary=vocabulary
    )
    for file in held_out.files:
        if vocab_sha256 and file.vocab_sha256 not in ("", vocab_sha256):
            raise DataError(
                f"the held-out records {file.path} were made with another vocabulary than the training records; make them again"
            )
    if held_out.objective == "mlm" and options.objective != "mlm":
        raise DataError(f"the held-out records in {options.eval_dir} are no sentence pairs, those to train on are; make them in one way")
    masker = None
    if not held_out.masked:
        if vocabulary is None:
            raise DataError(f"the held-out records in {options.eval_dir} hold no masks; give --vocab_file, so that they can be drawn")
        prob = options.masked_lm_prob or held_out.masked_lm_prob or 0.15
        masker = DynamicMasker(vocabulary, Masking(prob, held_out.max_predictions), seed=0)
    return HeldOut(held_out, vocab_size, options.eval_samples, masker)


def build_model(options: Options, config: modeling.BertConfig) -> nn.Module:
    """The model with its seeded initial weights."""
    torch.manual_seed(options.seed)
    kind = modeling.BertForPreTraining if options.objective == "mlm+nsp" else modeling.BertForMaskedLM
    model = kind(config)
    model.dense_sequence_output = not options.no_dense_sequence_output
    model.set_activation_checkpointing(options.checkpoint_activations)
    return model


def build_optimizer(options: Options, model: nn.Module) -> torch.optim.Optimizer:
    """LAMB or AdamW over the two decay groups."""
    groups = optimization.parameter_groups(model, weight_decay=options.weight_decay)
    if options.optimizer == "adamw":
        return optimization.adamw(groups, lr=options.learning_rate)
    return optimization.Lamb(groups, lr=options.learning_rate, max_grad_norm=options.max_grad_norm)


def build_schedule(options: Options) -> optimization.Schedule:
    """The learning-rate schedule over this phase's steps."""
    extra: dict[str, float] = {}
    if options.lr_schedule == "exponential":
        extra = {
            "warmup_degree": options.lr_warmup_degree,
            "decay_rate": options.lr_decay_rate,
            "decay_steps": options.lr_decay_steps,
            "lr_offset": options.lr_offset,
        }
    try:
        return optimization.make_schedule(options.lr_schedule, options.learning_rate, options.warmup_proportion, options.max_steps, **extra)
    except ValueError as error:
        raise ConfigError(f"--lr_schedule {options.lr_schedule}: {error}") from error


def load_full_checkpoint(path: str) -> dict[str, Any] | None:
    """The whole payload of a berth training checkpoint (or of an output folder's newest), ``None`` when ``path`` holds weights only."""
    from berth.export.weights import newest_checkpoint

    file = Path(path)
    if file.is_dir() and (file / MANIFEST).is_file():
        file = newest_checkpoint(file)
    if file.suffix != ".pt" or not file.is_file():
        return None
    try:
        payload = read_checkpoint(file)
    except CheckpointError:  # weights of another format; load_weights has read and reported them
        return None
    return payload if "optimizer" in payload else None


if __name__ == "__main__":
    run_main(main)
