"""The arguments of ``scripts/run_pretraining.sh``: their names, positions, defaults and rules; the words of a command line -> values.

The public scripts number their arguments in two ways that part at the sixteenth. What stands there tells which is meant: true or false
(``accumulate_into_fp16``) the documented order, a number (``train_batch_size_phase2``) the later one; anything else is refused.
Rejected: telling them apart by the number of arguments, which leaves one reading of every length silently wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from berth.launch.plan import Run
from berth.launch.yamlfile import suggestion

SAME = 15  # positions that mean the same in both orders
RUN_FOLDER = "checkpoints"  # below the folder of results
NOT_GIVEN = ("", "none", "None")
PREPARED = "records are made beforehand, with their masks: python -m data.prepare"


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError
    return int(text)


def _switch(text: str) -> bool:
    return {"true": True, "false": False}[text]


def _plain(text: str) -> str:
    if any(mark in text for mark in "/\n\r\0"):
        raise ValueError
    return text


# kind -> (how it is read, what is allowed, the rule in words)
KINDS: dict[str, tuple[Callable[[str], Any], Callable[[Any], bool], str]] = {
    "count": (_whole, lambda value: value >= 1, "a whole number, 1 or more"),
    "seed": (_whole, lambda value: value < 2**63, "a whole number, 0 or more and below 2**63"),
    "rate": (float, lambda value: 0 < value < 1, "a number above 0 and below 1"),
    "share": (float, lambda value: 0 <= value < 1, "a share of the steps: 0 or more and below 1, not per cent"),
    "switch": (_switch, lambda value: True, "true or false"),
    "name": (_plain, lambda value: True, "part of a file's name: without slash and line break"),
    "text": (str, lambda value: "\0" not in value, "a text without zero byte"),
}


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument: a kind of :data:`KINDS`, its default in words, its meaning."""

    kind: str
    default: str
    meaning: str


_OF_BOTH = {
    "train_batch_size": Argument("count", "recipe's global batch / num_gpus", "sequences a GPU and optimizer step, before accumulation"),
    "learning_rate": Argument("rate", "recipe's", "peak learning rate"),
    "warmup_proportion": Argument("share", "recipe's", "share of the steps in which the rate rises"),
    "train_steps": Argument("count", "recipe's", "optimizer steps"),
    "gradient_accumulation_steps": Argument("count", "from the row's micro-batch", "forward passes an optimizer step"),
}
ARGUMENTS: dict[str, Argument] = {
    **_OF_BOTH,
    "precision": Argument("text", "platform's first", "fp16, bf16, fp8, tf32 or fp32"),
    "num_gpus": Argument(
        "count", "those there are, else the platform's", "processes, one a GPU; on a platform without GPUs just processes"
    ),
    "save_checkpoint_steps": Argument("count", "recipe's", "optimizer steps between checkpoints"),
    "resume_training": Argument("switch", "false", "go on from the newest checkpoint; false refuses a folder that holds a run"),
    "create_logfile": Argument("switch", "true", "write the output of each phase to a file as well"),
    "accumulate_gradients": Argument("switch", "true", "false: gradient_accumulation_steps is 1 in both phases"),
    "seed": Argument("seed", str(Run.seed), "of weights, order and dropout"),
    "job_name": Argument("name", "bert_lamb_pretraining", "begins the names of log files"),
    "allreduce_post_accumulation": Argument("switch", "true", "has no effect: gradients are always reduced once, after accumulation"),
    "allreduce_post_accumulation_fp16": Argument("switch", "row's", "send gradients as fp16; must be false in tf32 and fp32"),
    "accumulate_into_fp16": Argument("switch", "false", "has no effect: gradients are always accumulated in fp32"),
    **{f"{name}_phase2": Argument(one.kind, one.default, f"{one.meaning}, phase 2") for name, one in _OF_BOTH.items()},
    "data_dir_phase1": Argument("text", "$BERT_PREP_WORKING_DIR", "records, or work folder of data.prepare"),
    "data_dir_phase2": Argument("text", "data_dir_phase1", "the same for phase 2"),
    "codedir": Argument("text", "this project", "must be this project"),
    "init_checkpoint": Argument("text", "random weights", "weights that phase 1 starts from"),
    "bert_config": Argument("text", "beside the data, else large", "model: a name in bert_configs, or a file"),
    "vocab_file": Argument("text", "beside the data", "vocabulary of the records"),
    "results": Argument("text", "results/ of this project", f"folder of the log files; {RUN_FOLDER}/ in it holds the run"),
    "platform": Argument("text", "by the GPUs nvidia-smi lists", "platform of slurm/configurations.yml"),
    "recipe": Argument("text", "the platform's", "recipe of slurm/recipes.yml"),
    "from": Argument("text", "the current folder", "where relative paths begin"),
}
REFUSED = {
    **dict.fromkeys(("wikipedia_source", "num_dask_workers", "num_shards_per_worker"), PREPARED),
    "num_workers": "reading needs no worker processes",
    **dict.fromkeys(("sample_ratio", "phase2_bin_size", "masking"), PREPARED),
}
_FIRST = (
    "train_batch_size", "learning_rate", "precision", "num_gpus", "warmup_proportion", "train_steps", "save_checkpoint_steps",
    "resume_training", "create_logfile", "accumulate_gradients", "gradient_accumulation_steps", "seed", "job_name",
    "allreduce_post_accumulation", "allreduce_post_accumulation_fp16",
)  # fmt: skip
_SECOND = (*(f"{name}_phase2" for name in _OF_BOTH), "data_dir_phase1", "data_dir_phase2", "codedir", "init_checkpoint")
ORDERS = {
    "documented": (*_FIRST, "accumulate_into_fp16", *_SECOND),
    "later": (*_FIRST, *_SECOND, *REFUSED, "bert_config"),
}
assert all(len(order) > SAME and order[:SAME] == _FIRST for order in ORDERS.values())


def read_words(words: Sequence[str], wrong: list[str], notices: list[str]) -> dict[str, Any]:
    """``{argument: value}`` of a command line, positions and names mixed; what is wrong is added to ``wrong``."""
    positional: list[str] = []
    named: list[tuple[str, str]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word[2:].partition("=")
        if not word.startswith("--"):
            positional.append(word)
        elif name not in (*ARGUMENTS, *REFUSED):
            wrong.append(f"unknown option --{name}{suggestion(name, ARGUMENTS)}")
            if not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)  # its value, so that it is not taken for a position
        elif equals or (rest and not rest[0].startswith("--")):
            named.append((name, text if equals else rest.pop(0)))
        else:
            wrong.append(f"--{name} needs a value")
    values: dict[str, Any] = {}
    order = _order(positional, wrong, notices)
    placed = [(f"argument {at}, ", name, text) for at, (name, text) in enumerate(zip(order, positional, strict=False), 1)]
    for where, name, text in [*placed, *(("--", name, text) for name, text in named)]:
        if text in NOT_GIVEN:
            continue
        if name in REFUSED:
            wrong.append(f"{where}{name} {text!r} is not taken here: {REFUSED[name]}; leave it out, or give none")
        elif name in values:
            wrong.append(f"{where}{name} {text!r} was given before; give it once, by position or by name")
        else:
            values[name] = _value(where, name, text, wrong)
    return {name: value for name, value in values.items() if value is not None}


def _order(positional: Sequence[str], wrong: list[str], notices: list[str]) -> tuple[str, ...]:
    """The names of the positions; decided by the sixteenth."""
    if len(positional) <= SAME:
        return _FIRST
    tells = positional[SAME]
    if tells in ("true", "false"):
        order = "documented"
    elif tells.isascii() and tells.isdigit():
        order = "later"
    else:
        wrong.append(
            f"argument 16 is {tells!r}: it must be true or false (accumulate_into_fp16, the documented order) or a number "
            "(train_batch_size_phase2, the later order); from there on the orders differ, so nothing after it was read"
        )
        return _FIRST
    names = ORDERS[order]
    notices.append(f"argument 16 is {tells}: the {order} order of arguments, in which it is {names[SAME]}")
    if len(positional) > len(names):
        wrong.append(
            f"{len(positional)} arguments by position, the {order} order has {len(names)}; the first too many: {positional[len(names)]!r}"
        )
    return names


def _value(where: str, name: str, text: str, wrong: list[str]) -> Any:
    """What ``text`` says; ``None``, and a line in ``wrong``, where it breaks the argument's rule."""
    read, allowed, rule = KINDS[ARGUMENTS[name].kind]
    try:
        value = read(text)
        if allowed(value):
            return value
    except (ValueError, KeyError, OverflowError):
        pass
    wrong.append(f"{where}{name} {text!r} must be {rule}")
    return None


def help_text() -> str:
    """The table of all arguments."""
    places = {name: [str(order.index(name) + 1) if name in order else "-" for order in ORDERS.values()] for name in (*ARGUMENTS, *REFUSED)}
    ranked = sorted(places, key=lambda name: tuple(int(place) if place != "-" else len(places) for place in places[name]))
    lines = [
        ("#", "#", "name", "default", "meaning"),
        *((*places[name], name, ARGUMENTS[name].default, ARGUMENTS[name].meaning) for name in ranked if name in ARGUMENTS),
        *((*places[name], name, "-", f"not taken: {REFUSED[name]}") for name in ranked if name in REFUSED),
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    table = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, (*widths, 0), strict=True)).rstrip() for line in lines)
    return (
        "usage: scripts/run_pretraining.sh [argument ...] [--name value ...] [--dry_run]\n\n"
        "Pretrains BERT on this machine: phase 1, then phase 2. Arguments by position, by name, or the first by position and others by\n"
        'name. An empty argument or "none" stands for the default. The public scripts know two orders: the documented one (first #), whose\n'
        "argument 16 is true or false, and the later one (second #), whose argument 16 is a number. Which was taken is said.\n\n"
        f"{table}\n\n"
        "--dry_run shows the plan and its commands. Exit codes: those of run_pretraining.py; 2 for wrong arguments.\n"
    )
