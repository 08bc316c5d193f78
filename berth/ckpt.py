"""berth-ckpt: look at the checkpoints of a run, check them, delete old ones.

    berth-ckpt ls results/run                      what is there, without opening it
    berth-ckpt verify --finite results/run         read every byte back; exit 1 if a checkpoint is damaged
    berth-ckpt prune --keep 1 --dry-run results/run
    berth-ckpt info results/run/ckpt_7038.pt       what run wrote it, and what is in it

The same as ``python -m berth.ckpt``. PATH is the --output_dir of a run, or one of its files. ``ls`` opens only files that are not in
manifest.json, and answers without torch otherwise. docs/checkpoints.md describes the files and how to recover by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from berth.errors import CheckpointError, ConfigError, run_main
from berth.files import TEMPORARY_SUFFIX, FolderLock
from berth.training.inspection import Row, check, describe, sound, survey
from berth.training.manifest import (
    checkpoint_files,
    point_latest,
    read_latest,
    read_manifest,
    rotated_out,
    size_text,
    superseded_files,
    write_manifest,
)

STATES = """\
state: listed (in manifest.json, of the size written; `verify` reads it), unlisted (no checksum: its run was killed before it could
enter it), wrong size, missing (listed but not there), damaged (neither listed nor a checkpoint), unreadable (the disk refuses).
`latest` marks the newest."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    path = Path(arguments.path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; name the --output_dir of a run or a ckpt_<step>.pt in it")
    return int(arguments.run(path, arguments))


def main_console() -> None:
    """The command ``berth-ckpt``."""
    run_main(main)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="berth-ckpt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{ls,verify,prune,info}")

    def add(name: str, run: Any, what: str, example: str, path: str = "PATH") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=example, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.add_argument("path", metavar=path, help="output folder of a run" + (", or one checkpoint file" if path == "PATH" else ""))
        command.set_defaults(run=run)
        return command

    one = add("ls", list_checkpoints, "list checkpoints, oldest first", f"example: berth-ckpt ls results/run\n\n{STATES}")
    one.add_argument("--json", action="store_true", help="the same as JSON: bytes, seconds since 1970, and superseded files")
    one = add("verify", verify, "read checkpoints back: size, SHA-256, and whether they load", "example: berth-ckpt verify results/run")
    one.add_argument("--finite", action="store_true", help="also look for nan and inf in every tensor")
    one = add(
        "prune", prune, "delete old checkpoints; never a phase end, never the newest good one",
        "example: berth-ckpt prune --keep 1 --dry-run results/run", path="FOLDER",
    )  # fmt: skip
    one.add_argument("--keep", type=int, required=True, metavar="N", help="how many of the newest stay, beside the ends of phases; >= 1")
    one.add_argument(
        "--superseded", action="store_true", help="delete superseded_*_ckpt_*.pt, too: what a run left behind when it went back"
    )
    one.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    one = add("info", info, "say which run wrote a checkpoint and what is in it", "example: berth-ckpt info results/run/ckpt_7038.pt")
    one.add_argument("--json", action="store_true", help="the same as JSON")
    return parser


# -- ls ---------------------------------------------------------------------------------------------------------------


def list_checkpoints(path: Path, arguments: argparse.Namespace) -> int:
    rows = survey(path)
    folder = path if path.is_dir() else path.parent
    latest = read_latest(folder)
    aside = superseded_files(folder) if path.is_dir() else []
    unfinished = sorted(folder.glob(f".ckpt_*{TEMPORARY_SUFFIX}")) if path.is_dir() else []
    if arguments.json:
        others = {
            kind: [{"file": file.name, "bytes": file.stat().st_size} for file in files]
            for kind, files in (("superseded", aside), ("unfinished", unfinished))
        }
        print(json.dumps({"folder": str(folder), "latest": latest, "checkpoints": [dataclasses.asdict(row) for row in rows], **others}))
        return 0
    print(table(rows, latest, time.time()) if rows else f"{path} holds no checkpoint")
    for files, what in ((aside, "superseded: `prune --superseded` deletes"), (unfinished, "being written, or left by a killed run")):
        if files:
            print(f"{len(files)} file(s), {size_text(sum(file.stat().st_size for file in files))}, {what}")
    return 0


def table(rows: Sequence[Row], latest: str | None, now: float) -> str:
    """The rows in columns."""
    head = ("file", "step", "phase", "phase step", "samples", "size", "age", "kept", "state")
    lines = [head] + [
        (
            row.file, _number(row.step), _number(row.phase), _number(row.phase_step), _number(row.samples),
            "-" if row.bytes is None else size_text(row.bytes), "-" if row.modified is None else age_text(now - row.modified),
            "phase end" if row.final else "pinned" if row.pinned else "", row.state + (", latest" if row.file == latest else ""),
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    left = {0, 7, 8}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at in left else cell.rjust(width) for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def age_text(seconds: float) -> str:
    """How long ago, in its largest unit: ``5 min``."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


# -- verify -----------------------------------------------------------------------------------------------------------


def verify(path: Path, arguments: argparse.Namespace) -> int:
    folder = path if path.is_dir() else path.parent
    known = {entry.file: entry for entry in read_manifest(folder).entries}
    rows = survey(path)
    if not rows:
        raise CheckpointError(f"{path} holds no checkpoint")
    damaged = []
    for number, row in enumerate(rows, 1):
        if sys.stderr.isatty():
            print(f"{number}/{len(rows)} reading {row.file} ({size_text(row.bytes or 0)})", file=sys.stderr)
        try:
            said = check(folder / row.file, known.get(row.file), arguments.finite)
            print(f"ok       {row.file}  {said}", flush=True)
        except CheckpointError as error:
            if row.state != "missing" and not (folder / row.file).exists():
                print(f"gone     {row.file}  a run deleted it meanwhile", flush=True)
                continue
            damaged.append(row.file)
            print(f"DAMAGED  {row.file}  {error}", flush=True)
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(rows)} checkpoints in {folder} are damaged: {', '.join(damaged)}")
    return 0


# -- prune ------------------------------------------------------------------------------------------------------------


def prune(path: Path, arguments: argparse.Namespace) -> int:
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; prune works on the output folder of a run")
    if arguments.keep < 1:
        raise ConfigError(f"--keep {arguments.keep}: must be at least 1")
    lock = FolderLock(path)
    if not arguments.dry_run:
        _take(lock, path)
        lock.release()  # a run that starts while the newest is read back need not wait
    before = _state(path)
    entries, damaged = sound(path)
    if not arguments.dry_run:
        _take(lock, path)
    try:
        if _state(path) != before:
            raise CheckpointError(f"{path} was changed while its newest checkpoint was read back; nothing was deleted. Run prune again")
        doomed = rotated_out(entries, arguments.keep)
        files = [path / entry.file for entry in doomed] + (superseded_files(path) if arguments.superseded else [])
        freed = sum(file.stat().st_size for file in files)
        if doomed and not arguments.dry_run:
            stay = [entry for entry in read_manifest(path).entries if entry not in doomed]
            write_manifest(path, stay, read_manifest(path).config)
            point_latest(path, entries[-1].file)
        for file in files:
            print(f"{'would delete' if arguments.dry_run else 'deleted'} {file.name} ({size_text(file.stat().st_size)})")
            if not arguments.dry_run:
                file.unlink()
    finally:
        lock.release()
    for name in damaged:
        print(f"left alone: {name}, which is damaged or cannot be read")
    print(f"{size_text(freed)} {'would be' if arguments.dry_run else 'are'} free; {len(entries) - len(doomed)} checkpoint(s) stay")
    return 0


def _take(lock: FolderLock, path: Path) -> None:
    if not lock.acquire(0.0):
        raise CheckpointError(f"a run is writing to {path}; prune when it has ended (it keeps --keep_checkpoints itself)")


def _state(path: Path) -> tuple[Any, ...]:
    """What changes when a run writes to the folder."""
    files = [(file.name, file.stat()) for file in checkpoint_files(path)]
    return read_manifest(path), [(name, status.st_size, status.st_mtime_ns) for name, status in files]


# -- info -------------------------------------------------------------------------------------------------------------


def info(path: Path, arguments: argparse.Namespace) -> int:
    if path.is_dir():
        rows = [row for row in survey(path) if row.state in ("listed", "unlisted")]
        if not rows:
            raise CheckpointError(f"{path} holds no checkpoint that can be read")
        path = path / rows[-1].file
    facts = describe(path)
    print(json.dumps(facts) if arguments.json else "\n".join(_lines(facts)))
    return 0


def _lines(facts: dict[str, Any]) -> list[str]:
    facts = {**facts, "bytes": size_text(facts["bytes"]), "optimizer_step": ", ".join(map(str, facts["optimizer_step"])) or None}
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {name:<24}{json.dumps(each) if isinstance(each, dict | list) else each}" for name, each in value.items()]
        else:
            lines.append(f"{key:<26}{'unknown' if value is None else value}")
    return lines


if __name__ == "__main__":
    main_console()
