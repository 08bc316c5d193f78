"""Where a run starts: the resume rules, as one pure function of the flags and of what lies in the output folder.

| asked for (R = ``--resume_from_checkpoint``, I = ``--init_checkpoint X``) | the folder holds | start |
|---|---|---|
| nothing | no checkpoint | fresh: step 0, random weights |
| nothing, or I | a checkpoint | refused: it would mix two runs |
| I | no checkpoint | step 0 of the phase, weights of X (phase 2: with X's optimizer moments) |
| R, or R and I | a checkpoint of this phase | continue it exactly; X is not looked at |
| R ``--phase2`` | a finished phase 1 only | enter phase 2: weights and moments kept, step from 0 |
| R and I | nothing | as I |
| R and I | another phase only | refused: it would mix two runs |
| R | nothing at all | fresh (phase 1); refused in phase 2, which needs weights |

A requeued job can therefore use the same command line as its first attempt.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from pathlib import Path

from berth.errors import CheckpointError, ConfigError
from berth.training.checkpoint import Entry


class Kind(enum.Enum):
    """How a run starts."""

    FRESH = "fresh"
    CONTINUE = "continue"
    ENTER_PHASE2 = "enter phase 2"
    INIT_WEIGHTS = "initial weights"


@dataclasses.dataclass(frozen=True)
class Start:
    """The decision: ``kind``, the entry to load for CONTINUE and ENTER_PHASE2, and why, in words for the log."""

    kind: Kind
    entry: Entry | None
    reason: str


def decide_start(
    entries: Sequence[Entry],
    *,
    output_dir: Path,
    phase: int,
    resume: bool,
    init_checkpoint: str | None,
    resume_step: int | None = None,
    must_continue_phase2: bool = False,
    unusable: Sequence[str] = (),
) -> Start:
    """Apply the table above to the (good) checkpoints of the output folder, oldest first.

    ``unusable`` names files called ``ckpt_<n>.pt`` that are damaged or not berth's: a folder that holds only such is never started afresh.

    Raises :class:`ConfigError` for flags that cannot be meant together, :class:`CheckpointError` when what they ask for is not there.
    """
    if unusable and not entries and resume:
        raise CheckpointError(
            f"{output_dir} holds {', '.join(unusable)}, but none of it can be resumed from (damaged, unreadable, or not berth's); restore a good "
            "one, or choose another --output_dir. Weights of other programs go through --init_checkpoint"
        )
    if not resume:
        _refuse_foreign([*unusable, *(entry.file for entry in entries)], output_dir)
        if must_continue_phase2 or resume_step is not None:
            raise ConfigError("--resume_phase2 and --resume_step need --resume_from_checkpoint")
        if phase == 2 and init_checkpoint is None:
            raise ConfigError(
                "--phase2 needs weights to start from: --resume_from_checkpoint (phase 1 in the same --output_dir) or --init_checkpoint"
            )
        return _initial(init_checkpoint, phase)
    if resume_step is not None:
        entries = _up_to_step(entries, resume_step, output_dir)
    own = [entry for entry in entries if entry.phase == phase]
    later = [entry for entry in entries if entry.phase > phase]
    if own and not later:
        return Start(Kind.CONTINUE, own[-1], f"continuing phase {phase} from {own[-1].file}")
    if later:
        ends = [entry for entry in own if entry.final]
        if ends:
            return Start(Kind.CONTINUE, ends[-1], f"phase {phase} ended at {ends[-1].file}")
        raise CheckpointError(
            f"{output_dir} holds checkpoints of phase {later[-1].phase} ({later[-1].file}); add --phase2 to continue it, or choose "
            "another --output_dir for a new phase 1"
        )
    if must_continue_phase2:
        raise CheckpointError(f"--resume_phase2 was given but {output_dir} holds no phase 2 checkpoint; drop it to enter phase 2")
    if phase == 2 and entries and init_checkpoint is None:
        return _enter_phase2(entries, output_dir)
    if phase == 2 and init_checkpoint is None:
        raise CheckpointError(f"--phase2 found no checkpoint in {output_dir}; give the folder that phase 1 wrote, or --init_checkpoint")
    if entries and init_checkpoint is not None:
        raise ConfigError(
            f"--init_checkpoint starts phase {phase} anew, but --output_dir {output_dir} holds another phase ({entries[-1].file}); choose another "
            "folder, or drop --init_checkpoint to go on from what lies there"
        )
    return _initial(init_checkpoint, phase)


def _refuse_foreign(names: Sequence[str], output_dir: Path) -> None:
    if names:
        raise ConfigError(
            f"--output_dir {output_dir} already holds a run ({names[-1]}); add --resume_from_checkpoint to continue it, or "
            "choose another folder"
        )


def _initial(init_checkpoint: str | None, phase: int) -> Start:
    if init_checkpoint is None:
        return Start(Kind.FRESH, None, f"starting phase {phase} from random weights")
    return Start(Kind.INIT_WEIGHTS, None, f"starting phase {phase} from the weights in {init_checkpoint}")


def _up_to_step(entries: Sequence[Entry], step: int, output_dir: Path) -> list[Entry]:
    kept = [entry for entry in entries if entry.step <= step]
    if not kept or kept[-1].step != step:
        there = ", ".join(str(entry.step) for entry in entries) or "none"
        raise CheckpointError(f"--resume_step {step}: there is no ckpt_{step}.pt in {output_dir}; steps there: {there}")
    return kept


def _enter_phase2(entries: Sequence[Entry], output_dir: Path) -> Start:
    last = entries[-1]
    if not last.final:
        raise CheckpointError(
            f"phase 1 in {output_dir} is not finished: its newest checkpoint {last.file} is no phase end. Finish it with "
            "--resume_from_checkpoint, or start from it on purpose with --phase2 --init_checkpoint in another --output_dir"
        )
    return Start(Kind.ENTER_PHASE2, last, f"entering phase 2 from the end of phase 1, {last.file}")
