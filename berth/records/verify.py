"""Read everything back: manifests, text shards, vocabularies and records, and hold them against each other.

In: folders or files. Out: a :class:`Report` of one line a file, every problem with its file, row or line, and rule; nothing is changed
and nothing raised for damaged data. What is checked:

* stage manifests (:mod:`berth.corpus.parts`): finished, all parts there, bytes and SHA-256 as written (also of a file that was put together
  from parts), counts add up, documents in = documents out + rejected; the manifests of vocabularies and of shard sets;
* text shards: UTF-8, LF, one blank line between documents, no empty document, at least two, and as many as the manifests say;
* records (:mod:`berth.records.validate`): every row; options and vocabulary the same in all files of a folder, no bin missing, counts as
  in the manifest;
* rows (without their masks) that are in training and in test files alike: counted, not a problem, since texts repeat themselves.

Files are independent of each other and dealt to processes; memory does not grow with them. Row hashes beyond four million are sampled.
"""

from __future__ import annotations

import codecs
import collections
import dataclasses
import hashlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from berth.corpus.shardset import MANIFEST_SUFFIX, SHARD_NAME
from berth.errors import ConfigError, DataError
from berth.files import read_json, sha256_file
from berth.records import draws
from berth.records.options import RecordOptions
from berth.records.schema import FORMAT
from berth.records.validate import Problem, RecordsSummary, counts_of, scan_records, thin
from berth.text.vocabulary import Vocabulary
from berth.workers import map_processes

RECORDS_SUFFIXES = (".hdf5", ".h5")
READ_BYTES = 1 << 20
MOST_HASHES = 1 << 22  # of the training rows, and of the test rows
_OPTIONS = ["do_lower_case" if field.name == "lowercase" else field.name for field in dataclasses.fields(RecordOptions)]
_SPLIT = re.compile(r"(?:^|[_.-])(training|train|test)(?=[_.-]|$)")
_BIN = re.compile(r"_bin_\d+$")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One file to read back. ``kind``: records, text, stage, shards (a shard set's manifest) or vocabulary (its manifest)."""

    path: Path
    kind: str


@dataclasses.dataclass
class FileReport:
    """What was found in one file; ``wrong`` counts all problems, ``problems`` holds the first ones.

    ``expected``: what a manifest says of other files, path -> counts. ``counts``: what a file says of itself or was counted in it.
    """

    path: Path
    kind: str
    problems: list[Problem] = dataclasses.field(default_factory=list)
    wrong: int = 0
    notice: str = ""
    summary: RecordsSummary | None = None
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    expected: dict[Path, dict[str, int]] = dataclasses.field(default_factory=dict)
    size: int = 0
    hashes: draws.Keys = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))
    hash_shift: int = 0

    def add(self, rule: str, row: int | None = None) -> None:
        """One more problem."""
        self.problems.append(Problem(rule, row))
        self.wrong += 1


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that was read. ``repeated``: test rows (distinct, estimated from a sample if ``sampled``) that are training rows, too."""

    files: tuple[FileReport, ...]
    seconds: float
    repeated: int | None
    test_rows: int
    sampled: bool

    @property
    def wrong(self) -> int:
        return sum(file.wrong for file in self.files)


# ------------------------------------------------------------------------------------------------------ what to read


def find_units(inputs: Sequence[Path], texts: Sequence[Path]) -> list[Unit]:
    """The files to read: of ``inputs`` records, manifests and shards, of ``texts`` every ``.txt`` as well; folders with all below them.

    Raises :class:`DataError` for a path that is missing, or when there is nothing to verify.
    """
    units: dict[Path, Unit] = {}
    for path, all_text in [*((path, False) for path in inputs), *((path, True) for path in texts)]:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if not _hidden(file, path) and file.is_file()]
        for file in files:
            kind = _kind(file, all_text or (file == path and file.suffix == ".txt"))
            if kind and file not in units:
                units[file] = Unit(file, kind)
            elif not kind and file == path:
                raise DataError(f"{file}: neither records ({', '.join(RECORDS_SUFFIXES)}), nor text (.txt), nor a manifest of berth")
    if not units:
        raise DataError(f"{', '.join(map(str, [*inputs, *texts]))}: nothing to verify: no records, shards or manifests")
    return list(units.values())


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _kind(file: Path, all_text: bool) -> str | None:
    if file.suffix in RECORDS_SUFFIXES:
        return "records"
    if file.suffix == ".txt":
        return "text" if all_text or SHARD_NAME.fullmatch(file.name) else None
    if file.suffix != ".json":
        return None
    if file.name.endswith(MANIFEST_SUFFIX):
        return "shards"
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return "stage"  # damaged; the check says so
    formats = {"berth stage": "stage", "berth vocabulary": "vocabulary"}
    return formats.get(str(found.get("format"))) if isinstance(found, dict) else None


# --------------------------------------------------------------------------------------------------------- one file


@dataclasses.dataclass(frozen=True)
class Checker:
    """Checks one unit; runs in the worker processes."""

    vocabulary: Vocabulary | None
    max_problems: int
    hashes: bool

    def __call__(self, unit: Unit) -> FileReport:
        report = FileReport(unit.path, unit.kind)
        checks = {"records": self._records, "text": _text, "stage": _stage, "shards": _shard_set, "vocabulary": _vocabulary}
        try:
            report.size = unit.path.stat().st_size
            checks[unit.kind](report)
        except OSError as error:
            report.add(f"cannot be read: {error.strerror or error}")
        del report.problems[self.max_problems :]
        return report

    def _records(self, report: FileReport) -> None:
        scan = scan_records(report.path, self.vocabulary, None, self.max_problems, self.hashes and split_of(report.path) != "")
        report.problems, report.wrong, report.summary = scan.problems, scan.wrong, scan.summary
        report.attributes, report.hashes, report.hash_shift = scan.attributes, scan.hashes, scan.hash_shift
        try:
            report.counts = counts_of(scan.attributes)
        except (TypeError, ValueError):
            report.add("an attribute count_... is not a number")


def split_of(path: Path) -> str:
    """``training``, ``test`` or '' by the name of a records file or else of its folder."""
    for name in (path.stem, path.parent.name):
        found = _SPLIT.findall(name.lower())
        if found:
            return "test" if found[-1] == "test" else "training"
    return ""


def _object(report: FileReport) -> dict[str, Any]:
    """The JSON object of a manifest; problems noted, {} if there is none."""
    try:
        found = read_json(report.path)
    except ValueError as error:
        report.add(f"not readable as JSON ({error}); run the stage again")
        return {}
    if not isinstance(found, dict):
        report.add("is not a manifest: not a JSON object")
        return {}
    if found.get("complete") is not True:
        report.add("the stage did not finish: complete is not true; run it again")
    return found


def _check_file(report: FileReport, path: Path, entry: Mapping[str, Any]) -> bool:
    """Bytes and SHA-256 (if told) of a file as a manifest gives them; whether it is there with these bytes."""
    if not path.is_file():
        report.add(f"{path.name} is missing")
        return False
    size = path.stat().st_size
    if size != entry.get("bytes"):
        report.add(f"{path.name} has {size} bytes instead of {entry.get('bytes')}: changed or truncated since it was made")
        return False
    if "sha256" in entry and sha256_file(path) != entry["sha256"]:
        report.add(f"{path.name} has not the SHA-256 it was written with: changed since it was made")
    return True


def _stage(report: FileReport) -> None:
    manifest = _object(report)
    if not manifest:
        return
    parts, stage = manifest.get("parts"), str(manifest.get("stage"))
    if not isinstance(parts, dict) or not all(isinstance(entry, dict) and "bytes" in entry for entry in parts.values()):
        report.add("parts is damaged; run the stage again")
        return
    folder, suffix = report.path.parent, f".{stage}.json"
    if report.path.name == f"{stage}.json":
        for name, entry in parts.items():
            if _check_file(report, folder / name, entry) and isinstance(entry.get("counts"), dict):
                report.expected[folder / name] = entry["counts"]
        if stage == "records":
            known = {folder / name for name in parts}
            for path in sorted(folder.iterdir()):
                if path.suffix in RECORDS_SUFFIXES and path not in known and not path.name.startswith("."):
                    report.add(f"{path.name} is not of this set: {report.path.name} does not name it")
    elif report.path.name.endswith(suffix):
        output = folder / report.path.name.removesuffix(suffix)
        if _check_file(report, output, manifest):
            _check_joined(report, output, parts, str(manifest.get("separator", "")))
            if isinstance(manifest.get("counts"), dict):
                report.expected[output] = manifest["counts"]
    else:
        report.add(f"is the manifest of the stage {stage}, which is called {stage}.json or <output>{suffix}")
    _check_sums(report, manifest.get("counts"), [entry.get("counts", {}) for entry in parts.values()])
    report.notice = f"stage {stage}, {len(parts)} part(s)"


def _check_joined(report: FileReport, output: Path, parts: Mapping[str, Any], separator: str) -> None:
    """The parts inside a file that was put together."""
    glue, offset = len(separator.encode()), 0
    with open(output, "rb") as handle:
        for name, entry in parts.items():
            left = int(entry["bytes"])
            offset += glue if offset and left else 0
            handle.seek(offset)
            offset += left
            digest = hashlib.sha256()
            while left and (piece := handle.read(min(left, READ_BYTES))):
                digest.update(piece)
                left -= len(piece)
            if "sha256" in entry and digest.hexdigest() != entry["sha256"]:
                report.add(f"{output.name}: the part {name} has not the SHA-256 it was written with: changed since it was made")
    size = output.stat().st_size
    if offset != size:
        report.add(f"{output.name}: the parts have {offset} bytes together, the file has {size}")


def _check_sums(report: FileReport, counts: Any, parts: Sequence[Mapping[str, int]]) -> None:
    if not isinstance(counts, dict):
        report.add("counts is missing")
        return
    sums: collections.Counter[str] = collections.Counter()
    for part in parts:
        sums.update(part)
    wrong = [f"{name} {counts.get(name)} instead of {sums[name]}" for name in sums if counts.get(name) != sums[name]]
    if wrong:
        report.add(f"counts are not the sums over the parts: {', '.join(wrong[:3])}")
    if {"documents_in", "documents_out"} <= counts.keys():
        rejected = sum(value for name, value in counts.items() if name.startswith("rejected_"))
        came = counts["documents_in"] + counts.get("copies", 0)
        left = counts.get("documents_passed", counts["documents_out"])
        if came != left + rejected:
            report.add(f"documents are lost: {came} in, {left} out, {rejected} rejected")


def _shard_set(report: FileReport) -> None:
    manifest = _object(report)
    shards = manifest.get("shards") if manifest else None
    if not manifest or manifest.get("complete") is not True:
        return
    if not isinstance(shards, dict) or not all(isinstance(entry, dict) for entry in shards.values()):
        report.add("shards is damaged; run data/shard.py again")
        return
    folder, prefix = report.path.parent, manifest.get("prefix")
    for name, entry in shards.items():
        if _check_file(report, folder / name, entry) and "documents" in entry:
            report.expected[folder / name] = {"documents": int(entry["documents"])}
    for path in sorted(folder.glob("*.txt")):
        found = SHARD_NAME.fullmatch(path.name)
        if found and found["prefix"] == prefix and path.name not in shards:
            report.add(f"{path.name} is not of this set; training would read it: delete it, or run data/shard.py again")
    report.notice = f"shard set, {len(shards)} shard(s)"


def _vocabulary(report: FileReport) -> None:
    manifest = _object(report)
    outputs = manifest.get("outputs") if manifest else None
    if not isinstance(outputs, dict):
        return
    for name, entry in outputs.items():
        if name in ("output_config", "report"):  # options; the manifest does not say where these files are
            continue
        there = isinstance(entry, dict) and _check_file(report, report.path.parent / name, entry)
        if there and name.endswith(".txt") and str(manifest.get("method", "")).startswith("wordpiece"):
            try:
                Vocabulary.load(report.path.parent / name)
            except DataError as error:
                report.add(str(error))
    report.notice = f"vocabulary, {len(outputs)} file(s)"


def _text(report: FileReport) -> None:
    """Rules of text that goes into records; line numbers count from 1."""
    state = _TextState(report)
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = 0
    with open(report.path, "rb") as handle:
        while True:
            block = handle.read(READ_BYTES)
            begin = offset - len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                report.add(f"byte 0x{error.object[error.start]:02x} at offset {begin + error.start} is not UTF-8")
                return
            offset += len(block)
            state.take(text)
            if not block:
                break
    state.end()
    report.counts = {"documents": state.documents, "sentences": state.sentences}
    report.notice = f"{state.documents} documents, {state.sentences} sentences"
    if SHARD_NAME.fullmatch(report.path.name) and state.documents < 2:
        report.add(f"{state.documents} document(s); a shard needs two, for a random next sentence comes from another one")


class _TextState:
    """Counts documents and sentences block by block."""

    def __init__(self, report: FileReport) -> None:
        self.report = report
        self.documents = self.sentences = self.lines = 0
        self.blank = True  # the line before
        self.open, self.open_written = "", False  # a line that goes on; a long one is not kept
        self.told: set[str] = set()

    def take(self, text: str) -> None:
        if self.lines == 0 and not self.open and text.startswith("\ufeff"):
            self._tell("a byte order mark", 1)
        lines = (self.open + text).split("\n")
        self.open = lines.pop()
        for line in lines:
            self._line(line)
        if len(self.open) > READ_BYTES:
            self.open_written = self.open_written or not self.open.isspace()
            self.open = self.open[-1:]

    def _line(self, line: str) -> None:
        self.lines += 1
        written, self.open_written = self.open_written or (bool(line) and not line.isspace()), False
        if line.endswith("\r"):
            self._tell("the line ends with CR LF instead of LF", self.lines)
        elif line and not written:
            self._tell("a line of white space only", self.lines)
        if written:
            self.sentences += 1
            self.documents += self.blank
        elif self.blank:
            self._tell("an empty document: a blank line at the beginning, or two in succession", self.lines)
        self.blank = not written

    def end(self) -> None:
        if self.open or self.open_written:
            self._line(self.open)
            self._tell("the last line has no line end", self.lines)
        elif self.blank and self.lines:
            self._tell("an empty document: a blank line at the end", self.lines)

    def _tell(self, rule: str, line: int) -> None:
        """Every rule once a file, with its first line."""
        if rule in self.told:
            self.report.wrong += 1
            return
        self.told.add(rule)
        self.report.add(f"line {line}: {rule}")


# --------------------------------------------------------------------------------------------------- files together


class _Rows:
    """Hashes of the rows of all training (or test) files, at most :data:`MOST_HASHES` of them, always those with the smallest values."""

    def __init__(self) -> None:
        self.hashes: draws.Keys = np.zeros(0, np.uint64)
        self.shift = 0

    def add(self, report: FileReport) -> None:
        self.raise_shift(report.hash_shift)
        limit = np.uint64(0xFFFFFFFFFFFFFFFF >> self.shift)
        merged = np.union1d(self.hashes, report.hashes[report.hashes <= limit])
        self.hashes, self.shift = thin(merged, self.shift, MOST_HASHES)

    def raise_shift(self, shift: int) -> None:
        self.shift = max(self.shift, shift)
        self.hashes = self.hashes[self.hashes <= np.uint64(0xFFFFFFFFFFFFFFFF >> self.shift)]


def verify(units: Sequence[Unit], vocabulary: Vocabulary | None, processes: int = 1, max_problems: int = 20) -> Report:
    """Read every unit and compare them with each other. Raises :class:`ConfigError` for numbers that make no sense."""
    if max_problems < 1:
        raise ConfigError(f"--max_errors {max_problems} must be at least 1")
    start = time.perf_counter()
    splits = {split_of(unit.path) for unit in units if unit.kind == "records"}
    checker = Checker(vocabulary, max_problems, {"training", "test"} <= splits)
    rows = {"training": _Rows(), "test": _Rows()}
    reports = []
    for report in map_processes(checker, units, max(1, min(processes, len(units))) if processes >= 1 else processes):
        if len(report.hashes):
            rows[split_of(report.path)].add(report)
        report.hashes = report.hashes[:0]
        reports.append(report)
    reports.sort(key=lambda report: report.path.as_posix())
    _compare_records(reports)
    _compare_counts(reports)
    shift = max(each.shift for each in rows.values())
    for each in rows.values():
        each.raise_shift(shift)
    repeated = len(np.intersect1d(rows["training"].hashes, rows["test"].hashes, assume_unique=True)) << shift if checker.hashes else None
    return Report(tuple(reports), time.perf_counter() - start, repeated, len(rows["test"].hashes) << shift, shift > 0)


def _compare_records(reports: Iterable[FileReport]) -> None:
    """Options and vocabulary must be the same in all files of a folder that berth made; all bins of a shard must be there."""
    first: dict[Path, FileReport] = {}
    shards: dict[Path, list[FileReport]] = {}
    for report in reports:
        if report.kind != "records" or report.attributes.get("format") != FORMAT:
            continue
        other = first.setdefault(report.path.parent, report)
        different = [
            f"{name} {report.attributes.get(name)} (there {other.attributes.get(name)})"
            for name in (*_OPTIONS, "vocab_sha256", "vocab_size")
            if report.attributes.get(name) != other.attributes.get(name)
        ]
        if different:
            report.add(f"made with other options than {other.path.name} in the same folder: {', '.join(different)}")
        stem = report.path.stem
        name = _BIN.sub("", stem) if report.attributes.get("layout") == "binned" else stem
        shards.setdefault(report.path.with_name(name), []).append(report)
    for shard, files in shards.items():
        wanted = files[0].attributes.get("files")
        if wanted is not None and str(wanted) != str(len(files)):
            files[0].add(f"the shard {shard.name} was written to {wanted} file(s), but there are {len(files)}")


def _compare_counts(reports: Iterable[FileReport]) -> None:
    """What manifests say of files that were read as well."""
    reports = list(reports)
    found = {report.path: report for report in reports if report.counts}
    for manifest in reports:
        for path, expected in manifest.expected.items():
            if path not in found:
                continue
            counts = found[path].counts
            if found[path].kind == "text":
                expected = {name: expected[key] for name in counts for key in (f"{name}_out", name) if key in expected}
            wrong = [
                f"{name} {counts[name]} instead of {expected[name]}" for name in counts if expected.get(name, counts[name]) != counts[name]
            ]
            if wrong:
                found[path].add(f"{manifest.path.name} says otherwise: {', '.join(wrong[:3])}")


# ------------------------------------------------------------------------------------------------------------ report


def table(report: Report) -> str:
    """One line a file, then the sums."""
    header = ("file", "layout", "rows", "length", "fill %", "masked/row", "mask/kept/other %", "random % (expected)", "")
    lines: list[tuple[str, ...]] = [header]
    others: list[tuple[str, ...]] = []
    for file in report.files:
        verdict = "ok" if not file.wrong else f"{file.wrong} problem(s)"
        if file.kind == "records":
            lines.append((str(file.path), *_columns(file.summary), verdict))
        else:
            others.append((str(file.path), file.notice or file.kind, verdict))
    return "\n".join([*_aligned(others), *(_aligned(lines) if len(lines) > 1 else []), *_totals(report)])


def _columns(found: RecordsSummary | None) -> tuple[str, ...]:
    if found is None:
        return ("-",) * 7
    seen = (found.seen_mask, found.seen_kept, found.seen_random)
    kinds = "/".join(f"{100 * number / found.masked:.1f}" for number in seen) if found.masked else "-"
    layout = found.layout + (" mlm" if found.objective == "mlm" else "") + (" unmasked" if found.masking == "none" else "")
    fill = "100.0" if found.layout == "packed" else f"{100 * found.used_tokens / found.rows / found.max_seq_length:.1f}"
    expected = "" if found.expected_random is None else f" ({100 * found.expected_random / found.rows:.1f})"
    random = f"{100 * found.random_next / found.rows:.1f}{expected}" if found.objective == "mlm+nsp" else "-"
    return layout, str(found.rows), str(found.max_seq_length), fill, f"{found.masked / found.rows:.2f}", kinds, random


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {0, 1, len(widths) - 1}
    return [
        "  ".join(cell.ljust(width) if at in left else cell.rjust(width) for at, (cell, width) in enumerate(zip(line, widths, strict=True)))
        .rstrip() for line in lines
    ]  # fmt: skip


def totals(report: Report) -> dict[str, Any]:
    """Sums over all records files."""
    found = [file.summary for file in report.files if file.summary is not None]
    return {
        "files": len(report.files), "bytes": sum(file.size for file in report.files), "records_files": len(found),
        **{
            name: sum(getattr(summary, name) for summary in found)
            for name in ("rows", "used_tokens", "masked", "seen_mask", "seen_kept", "seen_random", "random_next")
        },
        "pair_rows": sum(summary.rows for summary in found if summary.objective == "mlm+nsp"),
        "test_rows_also_in_training": report.repeated, "test_rows_distinct": report.test_rows, "sampled": report.sampled,
        "problems": report.wrong, "seconds": round(report.seconds, 3),
    }  # fmt: skip


def _totals(report: Report) -> list[str]:
    sums = totals(report)
    lines = []
    if sums["rows"]:
        seen = (
            "/".join(f"{100 * sums[name] / sums['masked']:.2f}" for name in ("seen_mask", "seen_kept", "seen_random"))
            if sums["masked"]
            else "-"
        )
        random = f", random next {100 * sums['random_next'] / sums['pair_rows']:.1f} %" if sums["pair_rows"] else ""
        lines.append(
            f"{sums['rows']} rows in {sums['records_files']} records file(s), {sums['used_tokens']} tokens, {sums['masked']} masked "
            f"({seen} % [MASK]/kept/other){random}"
        )
    if report.repeated is not None:
        share = 100 * report.repeated / max(1, report.test_rows)
        lines.append(
            f"{'about ' if report.sampled else ''}{report.repeated} of {report.test_rows} different test rows ({share:.2f} %) are in the "
            "training files, too"
        )
    rate = f", {sums['rows'] / max(report.seconds, 1e-9):.0f} rows/s" if sums["rows"] else ""
    lines.append(f"{sums['files']} file(s), {sums['bytes'] / 1e6:.1f} MB, {report.seconds:.1f} s{rate}: ")
    lines[-1] += f"{report.wrong} problem(s)" if report.wrong else "everything is in order"
    return lines


def problem_lines(report: Report, most: int) -> list[str]:
    """``<file>: row <n>: <rule>`` for the first ``most`` problems, and how many there are besides."""
    lines = [f"{file.path}: {problem}" for file in report.files for problem in file.problems][:most]
    rest = report.wrong - len(lines)
    return [*lines, *([f"... and {rest} more (--max_errors)"] if rest > 0 else [])]


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON values."""
    return {
        "format": "berth verify", "format_version": 1, "ok": report.wrong == 0, "totals": totals(report),
        "files": [
            {
                "file": str(file.path), "kind": file.kind, "bytes": file.size, "problems": file.wrong,
                "first_problems": [{"rule": problem.rule, "row": problem.row} for problem in file.problems],
                **({"counts": file.counts} if file.counts else {}),
                **({"found": dataclasses.asdict(file.summary)} if file.summary else {}),
            }
            for file in report.files
        ],
    }  # fmt: skip
