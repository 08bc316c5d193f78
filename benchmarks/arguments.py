"""What the command lines of several benchmarks share: checks that end with a usage error naming the option, and where results go."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def result_file(name: str) -> Path:
    """A file of ``benchmarks/results`` as seen from the current folder: the help shows the default, and no path of this machine."""
    return Path(os.path.relpath(RESULTS / name))


def at_least(parser: argparse.ArgumentParser, args: argparse.Namespace, least: int, names: Iterable[str]) -> None:
    """Options that are whole numbers, or lists of them, must not be below ``least``; what is not given (None) is no mistake."""
    for name in names:
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one < least:
                parser.error(f"--{name} {one}: must be at least {least}")


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``: a GPU where there is one."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="where")


def check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """A GPU that is asked for must be there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; use --device cpu")
