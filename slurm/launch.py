#!/usr/bin/env python3
"""Plan, check, render, submit and report BERT pretraining on a Slurm cluster: ``python -m slurm.launch --help``.

Runs on a login node with Python, PyYAML and (for one backend) submitit. docs/launching.md walks through it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also when the file itself is run

from berth.errors import run_main
from berth.launch import command_line


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.main(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    run_main(main)
