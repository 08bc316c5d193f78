"""The resume rules, one line of the table each."""

from pathlib import Path

import pytest

from berth.errors import CheckpointError, ConfigError
from berth.training.checkpoint import Entry
from berth.training.phases import Kind, decide_start


def entry(step, phase=1, final=False):
    return Entry(f"ckpt_{step}.pt", step, phase, step, step * 8, "", 1, final, final)


PHASE1 = [entry(5), entry(10)]
DONE1 = [entry(10), entry(15, final=True)]
IN2 = [*DONE1, entry(20, 2)]


def decide(entries, phase=1, resume=False, init=None, **extra):
    return decide_start(entries, output_dir=Path("out"), phase=phase, resume=resume, init_checkpoint=init, **extra)


@pytest.mark.parametrize(
    ("entries", "options", "kind", "step"),
    [
        ([], {}, Kind.FRESH, None),
        ([], {"init": "x.pt"}, Kind.INIT_WEIGHTS, None),
        ([], {"init": "x.pt", "phase": 2}, Kind.INIT_WEIGHTS, None),
        ([], {"resume": True}, Kind.FRESH, None),
        ([], {"resume": True, "init": "x.pt"}, Kind.INIT_WEIGHTS, None),
        ([], {"resume": True, "init": "x.pt", "phase": 2}, Kind.INIT_WEIGHTS, None),
        (PHASE1, {"resume": True}, Kind.CONTINUE, 10),
        (PHASE1, {"resume": True, "init": "x.pt"}, Kind.CONTINUE, 10),
        (PHASE1, {"resume": True, "resume_step": 5}, Kind.CONTINUE, 5),
        (DONE1, {"resume": True}, Kind.CONTINUE, 15),
        (DONE1, {"resume": True, "phase": 2}, Kind.ENTER_PHASE2, 15),
        (IN2, {"resume": True, "phase": 2}, Kind.CONTINUE, 20),
        (IN2, {"resume": True, "phase": 2, "must_continue_phase2": True}, Kind.CONTINUE, 20),
        (IN2, {"resume": True, "phase": 2, "resume_step": 15}, Kind.ENTER_PHASE2, 15),
        (IN2, {"resume": True, "phase": 1}, Kind.CONTINUE, 15),  # phase 1 is over; running it again changes nothing
    ],
)
def test_starts(entries, options, kind, step):
    start = decide(entries, **options)
    assert start.kind is kind and (start.entry.step if start.entry else None) == step


@pytest.mark.parametrize(
    ("entries", "options", "error", "words"),
    [
        (PHASE1, {}, ConfigError, "already holds a run.*--resume_from_checkpoint"),
        (PHASE1, {"init": "x.pt"}, ConfigError, "already holds a run"),
        ([], {"phase": 2}, ConfigError, "--phase2 needs weights"),
        ([], {"phase": 2, "resume": True}, CheckpointError, "found no checkpoint in out"),
        (PHASE1, {"phase": 2, "resume": True}, CheckpointError, "phase 1 in out is not finished.*ckpt_10"),
        (DONE1, {"phase": 2, "resume": True, "must_continue_phase2": True}, CheckpointError, "no phase 2 checkpoint"),
        ([entry(20, 2)], {"resume": True}, CheckpointError, "add --phase2"),
        (PHASE1, {"resume": True, "resume_step": 7}, CheckpointError, r"no ckpt_7.pt in out; steps there: 5, 10"),
        (DONE1, {"resume": True, "phase": 2, "init": "x.pt"}, ConfigError, "holds another phase"),
        ([], {"resume": True, "unusable": ["ckpt_9.pt"]}, CheckpointError, "none of it can be resumed"),
        ([], {"unusable": ["ckpt_9.pt"]}, ConfigError, "already holds a run .ckpt_9.pt"),
        ([], {"resume_step": 7}, ConfigError, "need --resume_from_checkpoint"),
    ],
)
def test_refusals(entries, options, error, words):
    with pytest.raises(error, match=words):
        decide(entries, **options)
