#!/usr/bin/env python3
"""Stage 'download': fetch named sources, resumed and verified. The only script of data/ that uses the network.

Sources, with licence and checksums, are in data/sources.yaml. A file that is there and verified is never fetched again. On a machine
without network it says which files to fetch elsewhere and where to place them; placed files are verified.

    python data/download.py --list
    python data/download.py --source wikipedia --language hu --snapshot 20261101 --output_dir download
    python data/download.py --source squad glue --output_dir download
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from berth.corpus.download import RETRIES, TIMEOUT_SECONDS, describe, download, load_sources, remotes
from berth.errors import ConfigError, run_main

SOURCES = Path(__file__).resolve().parent / "sources.yaml"


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--source", nargs="+", default=[], metavar="NAME", help="what to fetch; see --list")
    add("--output_dir", metavar="DIR", help="folder for the files; made when missing")
    add("--language", metavar="CODE", help="wikipedia: which one, as in its address (hu, fi, zh-min-nan)")
    add("--snapshot", metavar="YYYYMMDD", help="wikipedia: date of the dump; 'latest' is refused, since it changes every month")
    add("--sources", default=str(SOURCES), metavar="FILE", help="list of sources (default: sources.yaml beside this script)")
    add(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="S",
        help=f"seconds without a byte before a retry (default: {TIMEOUT_SECONDS:g})",
    )
    add(
        "--retries",
        type=int,
        default=RETRIES,
        metavar="N",
        help=f"attempts in a row that bring nothing before giving up (default: {RETRIES})",
    )
    add("--list", action="store_true", help="print the sources with size and licence, and end")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, fetch, print what was done."""
    given = build_parser().parse_args(argv)
    sources = load_sources(given.sources)
    if given.list:
        print(describe(sources))
        return
    if not given.source or not given.output_dir:
        raise ConfigError("--source and --output_dir are needed (or --list)")
    if not given.timeout > 0 or given.retries < 0:
        raise ConfigError("--timeout must be above 0, --retries at least 0")
    wanted = {remote.file: remote for name in given.source for remote in remotes(sources, name, given.language, given.snapshot)}
    folder = Path(given.output_dir)
    for file, what in download(list(wanted.values()), folder, given.timeout, given.retries).items():
        print(f"{folder / file}: {(folder / file).stat().st_size} bytes, {what}, verified")


if __name__ == "__main__":
    run_main(main)
