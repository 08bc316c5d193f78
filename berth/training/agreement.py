"""All ranks must train the same: they compare digests of code, options and data before the first step, and the odd one is named.

In: a few named facts of this rank (digests or short words). Out: nothing, or the same :class:`LaunchError` on every rank. A rank whose node has last
week's checkout or another copy of the records trains without any error, and nobody can tell afterwards what the model has seen.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from berth.errors import LaunchError
from berth.training.distributed import Communicator, some_ranks

_ROOT = Path(__file__).resolve().parents[2]
_BESIDE = ("modeling.py", "optimization.py", "run_pretraining.py")  # what lies beside the package and decides what is trained
_SHOWN = 60  # characters of a value; of a digest twelve
_FIXES = {
    "code of berth": "every node must run the same revision of the project; copy it again, or put it on a file system that all nodes share",
    "torch": "every node must use the same environment or container image",
    "options": "start every rank with the same command line",
    "training records": "--input_dir must hold the same files on every node; copy them again, or put them on a file system that all nodes share",
    "vocabulary": "--vocab_file must be the same file on every node",
    "model configuration": "--config_file must be the same file on every node",
}
_ANY_FIX = "make it the same on every node"


def check_start(communicator: Communicator, facts: Mapping[str, str]) -> None:
    """Compare ``facts`` (name -> digest or value) with those of all other ranks; every rank must call it.

    Raises :class:`LaunchError` on every rank, with each fact in which some ranks differ from most (where none prevails: from rank 0), the ranks,
    their hosts, the values and the fix.
    """
    texts = communicator.gather_texts(json.dumps(dict(facts)))
    problems = differences([json.loads(text) for text in texts], communicator.hosts)
    if problems:
        raise LaunchError("the ranks do not agree on what to train:\n" + "\n".join(f"  {problem}" for problem in problems))


def differences(facts: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """One line for each fact in which a rank differs; ``facts`` and ``hosts`` are those of every rank, a fact that is missing is a difference."""
    lines = []
    for name in dict.fromkeys(name for of_rank in facts for name in of_rank):
        values = [of_rank.get(name, "nothing") for of_rank in facts]
        if len(set(values)) == 1:
            continue
        counts = collections.Counter(values)
        usual = max(counts, key=lambda value: (counts[value], value == values[0]))
        others = {value: [rank for rank, found in enumerate(values) if found == value] for value in counts if value != usual}
        said = [f"{_shown(value)} on {_place(ranks, hosts)}" for value, ranks in others.items()]
        rest = _place([rank for rank, found in enumerate(values) if found == usual], hosts)
        lines.append(f"{name}: {', '.join(said)}, but {_shown(usual)} on {rest}; {_FIXES.get(name, _ANY_FIX)}")
    return lines


def _place(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    return f"{some_ranks(ranks)} ({', '.join(names[:8])}{' and others' if len(names) > 8 else ''})"


def _shown(value: str) -> str:
    digest = len(value) >= 32 and all(letter in "0123456789abcdef" for letter in value)
    short = value[: 12 if digest else _SHOWN]
    return short if short == value else f"{short}..."


def code_digest(root: Path = _ROOT) -> str:
    """Hex SHA-256 of the code that trains: the names and contents of berth's modules and of the scripts they are used by, wherever they lie."""
    files = [*(root / "berth").rglob("*.py"), *(root / name for name in _BESIDE)]
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files if path.is_file()):
        data = path.read_bytes()
        digest.update(f"{name} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()
