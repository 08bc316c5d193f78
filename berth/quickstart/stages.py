"""Stages that are run once: a command, what it depends on, what it makes, and a stamp that says it was done.

A stage is fresh when its stamp carries the same key (a digest of its command line and of everything before it) and all its
outputs have the sizes the stamp recorded. A stage that was started under the same key and cut off is run again over what it
left, which is how training resumes; what a stage with *another* key left is moved aside, never mixed in and never deleted.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from berth.errors import ConfigError, LaunchError
from berth.files import FolderLock, read_json, sha256_json, write_json
from berth.processes import raise_for, run_command


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Args:
        name: stamp name and title.
        command: argv.
        outputs: files or folders it makes; all must exist afterwards.
        depends: digests of what goes in (earlier stages' keys, the corpus).
        places: ``(path, name)`` pairs: words of the command that begin with a path count as its name in the key, so that the key does
            not change with the work folder's place or the way it was typed.
        folder: a folder that belongs to this stage alone. What a half-done run of the same command left in it is continued; what
            another command left is moved aside. Without it the command replaces its outputs by itself.
        start: how the command is run, if not as a process of its own; gives its exit code.
    """

    name: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    depends: tuple[str, ...]
    places: tuple[tuple[str, str], ...] = ()
    folder: Path | None = None
    start: Callable[[], int] | None = None

    @property
    def key(self) -> str:
        """Digest of the script with its options and of what it depends on; which Python runs it does not matter."""
        return sha256_json([self.name, [self._named(word) for word in self.command[1:]], list(self.depends)])

    def _named(self, word: str) -> str:
        for path, name in self.places:
            if word == path or word.startswith(path + os.sep):
                return name + word[len(path) :]
        return word


class Runner:
    """Runs stages in a work folder, skipping fresh ones.

    Args:
        workdir: everything lies below it; stamps in ``.stages``.
    """

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.stamps = workdir / ".stages"
        self._lock = FolderLock(workdir)
        self.seconds: dict[str, float] = {}
        self.skipped: list[str] = []

    def prepare(self) -> None:
        """Make the work folder and lock it. Raises :class:`ConfigError` for somebody else's folder, :class:`LaunchError` when it is in use."""
        if self.workdir.exists() and not self.stamps.is_dir() and any(self.workdir.iterdir()):
            raise ConfigError(f"the work folder {self.workdir} holds other files; give WORKDIR a new folder")
        self.stamps.mkdir(parents=True, exist_ok=True)
        if not self._lock.acquire(wait_seconds=5):
            raise LaunchError(f"another make pretrain is working in {self.workdir}; wait for it, or give another WORKDIR")

    def run(self, stage: Stage) -> None:
        """Run a stage unless it is fresh. Raises :class:`LaunchError` when it fails, ``SystemExit`` when it was interrupted."""
        stamp = self._stamp(stage.name)
        if stamp.get("key") == stage.key and stamp.get("done") and sizes(stage.outputs) == stamp["outputs"]:
            print(f"== {stage.name}: up to date", flush=True)
            self.skipped.append(stage.name)
            self.seconds[stage.name] = float(stamp["seconds"])
            return
        if stamp.get("key") != stage.key:
            self._move_aside(stage)
        spent = float(stamp.get("seconds", 0.0)) if stamp.get("key") == stage.key and stage.folder is not None else 0.0
        self._write_stamp(stage, done=False, seconds=spent)
        print(f"== {stage.name}: {shlex.join(stage.command)}", flush=True)
        began = time.monotonic()
        code = run_command(stage.command) if stage.start is None else stage.start()
        self.seconds[stage.name] = spent + time.monotonic() - began
        if code:
            self._write_stamp(stage, done=False, seconds=self.seconds[stage.name])
            raise_for(stage.name, code)
        missing = [str(path) for path in stage.outputs if not path.exists()]
        if missing:
            raise LaunchError(f"stage {stage.name} ended well but did not make {', '.join(missing)}")
        self._write_stamp(stage, done=True, seconds=self.seconds[stage.name])

    def _stamp(self, name: str) -> dict[str, Any]:
        path = self.stamps / f"{name.replace(' ', '_')}.json"
        try:
            return read_json(path)
        except (OSError, ValueError):
            return {}

    def _write_stamp(self, stage: Stage, *, done: bool, seconds: float) -> None:
        write_json(
            self.stamps / f"{stage.name.replace(' ', '_')}.json",
            {
                "stage": stage.name, "key": stage.key, "done": done, "seconds": round(seconds, 3),
                "command": list(stage.command), "outputs": sizes(stage.outputs) if done else {},
            },
        )  # fmt: skip

    def _move_aside(self, stage: Stage) -> None:
        """Results of other options or inputs are kept under another name."""
        folder = stage.folder
        if folder is None or not folder.exists():
            return
        number = 1
        while (aside := folder.with_name(f"{folder.name}.previous-{number}")).exists():
            number += 1
        folder.rename(aside)
        print(f"== {stage.name}: {folder} was made from other inputs or options; it is now {aside}", flush=True)


def sizes(paths: tuple[Path, ...]) -> dict[str, int]:
    """``{path: bytes}`` of files and of all files in folders (hidden ones apart); missing paths are absent."""
    found: dict[str, int] = {}
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found.update({str(file): file.stat().st_size for file in inside if file.is_file() and not file.name.startswith(".")})
    return found
