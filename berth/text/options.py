"""The two options that decide about case, shared by every program that reads raw text."""

from __future__ import annotations

import argparse

_WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _flag(text: str) -> bool:
    try:
        return _WORDS[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of 0, 1, true, false") from None


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--do_lower_case [0|1]`` and ``--cased``, of which only one can be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--do_lower_case",
        nargs="?",
        const=True,
        default=None,
        type=_flag,
        metavar="0|1",
        help="lower-case the text and strip accents (uncased model); '--do_lower_case 0' is --cased (default: 1)",
    )
    group.add_argument("--cased", action="store_true", help="keep upper case and accents (cased model)")


def wants_lowercase(arguments: argparse.Namespace) -> bool:
    """What the two options say: lower case unless ``--cased`` or ``--do_lower_case 0``."""
    if arguments.cased:
        return False
    return arguments.do_lower_case is None or bool(arguments.do_lower_case)
