"""The stage: text shards and a vocabulary to records files.

In: ``.txt`` files (one sentence a line, blank lines between documents), vocab.txt, :class:`RecordOptions`. Out: one hdf5 of
everything (:func:`create_file`), or one a shard made by several processes (:func:`create_folder`).

A file that was made from the same text, vocabulary and options by the same format version is left as it is; its
attributes say so. Text or vocabulary that changed make it again; a file of other options is only replaced with ``overwrite``.
The bytes do not depend on the number of processes or on which shards were left. Memory does not grow with the shard:
tokens and instances lie in unnamed temporary files beside the output (:mod:`berth.records.spool`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from berth.corpus.shardset import select_shards, shard_prefix
from berth.errors import ConfigError, DataError
from berth.files import read_json, sha256_file, sha256_json, write_json
from berth.records.chunks import chunk_blocks, separators
from berth.records.instances import InstanceSpool, StoredInstances
from berth.records.masking import RowMaker
from berth.records.options import RecordOptions
from berth.records.pairs import instance_blocks
from berth.records.schema import FORMAT, FORMAT_VERSION, ROWS_PER_CHUNK, SUFFIX, RecordCounts
from berth.records.tokens import TokenText, tokenize_files
from berth.records.writer import Attribute, FilePlan, RecordsWriter, open_records
from berth.text.lines import check_output
from berth.text.vocabulary import Vocabulary
from berth.workers import map_processes

EVERYTHING = "all"  # the name of a records file made of a folder, whatever the folder is called
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_BIN_ENDING = re.compile(r"_bin_\d+$")


@dataclasses.dataclass(frozen=True)
class Job:
    """One records file to make.

    ``name`` is the shard's file name ("all" for a folder): with the seed it decides every random draw. ``files`` are read in order as one text.
    """

    name: str
    files: tuple[Path, ...]
    output: Path
    vocab_file: Path
    options: RecordOptions

    def outputs(self) -> list[Path]:
        """The files this job may make: ``output``, or ``<stem>_bin_<upper length>`` for every bin."""
        if self.options.layout != "binned":
            return [self.output]
        return [self.output.with_name(f"{self.output.stem}_bin_{high}{self.output.suffix}") for high in self.options.bin_edges]


@dataclasses.dataclass(frozen=True)
class Result:
    """A job that is done: its files, their counts, the bytes of text behind them, and whether they were there before."""

    output: Path
    files: tuple[Path, ...]
    counts: RecordCounts
    input_bytes: int
    skipped: bool
    seconds: float


def plan_file(input_path: Path, output: Path, vocab_file: Path, options: RecordOptions) -> Job:
    """The job for one records file from a text file, or from the shards (or every ``.txt``) below a folder in sorted order."""
    name = EVERYTHING if input_path.is_dir() else input_path.name
    job = Job(name, tuple(select_shards(input_path)[0]), output, vocab_file, options)
    _check_paths("--output_file", [job])
    return job


def plan_folder(input_path: Path, output_dir: Path, vocab_file: Path, options: RecordOptions) -> list[Job]:
    """One job a text file: ``<stem>.hdf5`` in ``output_dir``. Two files of one stem are a :class:`ConfigError`."""
    jobs: dict[str, Job] = {}
    for file in select_shards(input_path)[0]:
        output = output_dir / f"{file.stem}{SUFFIX}"
        if output.name in jobs:
            raise ConfigError(f"{jobs[output.name].files[0]} and {file} would both become {output}; rename one")
        jobs[output.name] = Job(file.name, (file,), output, vocab_file, options)
    _check_paths("--output_dir", list(jobs.values()))
    return list(jobs.values())


def _check_paths(option: str, jobs: list[Job]) -> None:
    """Refuse outputs that are inputs, and a vocabulary that would be read as text."""
    texts = {file.resolve() for job in jobs for file in job.files}
    for job in jobs:
        if job.output.resolve() in texts:
            check_output(option, job.output, [file for each in jobs for file in each.files])
        check_output(option, job.output, [job.vocab_file, *job.files])
    if jobs and jobs[0].vocab_file.resolve() in texts:
        raise ConfigError(f"--vocab_file {jobs[0].vocab_file} is one of the texts of --input_file; move it to another folder")


def option_attributes(options: RecordOptions) -> dict[str, Attribute]:
    """The options as attributes of a records file."""
    values = dataclasses.asdict(options)
    values["do_lower_case"] = values.pop("lowercase")
    return values


def identity(job: Job, vocabulary: Vocabulary) -> dict[str, Attribute]:
    """The attributes that decide the content of the records file: equal identity, equal bytes."""
    hashes = [sha256_file(file) for file in job.files]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "vocab_sha256": vocabulary.sha256,
        "vocab_size": vocabulary.size,
        "input_name": _input_name(job),
        "input_files": len(hashes),
        "input_sha256": hashes[0] if len(hashes) == 1 else sha256_json(hashes),
        **option_attributes(job.options),
    }


def read_attributes(path: Path) -> dict[str, Attribute]:
    """The attributes of a records file as Python values.

    Raises :class:`DataError`: the file cannot be read (permission), is a damaged hdf5 file, or is none at all.
    """
    try:
        with open(path, "rb") as handle:
            signature = handle.read(len(_HDF5_SIGNATURE))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; correct its permissions or use another place") from error
    if signature and signature != _HDF5_SIGNATURE:
        raise DataError(f"{path} is not an hdf5 file and not made by berth; move it away, or replace it with --overwrite")
    try:
        with h5py.File(path, "r") as file:
            return {name: value.item() if isinstance(value, np.generic) else value for name, value in file.attrs.items()}
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(f"{path} is truncated or damaged; delete this one file and run again: the others are kept") from error


def _existing(path: Path, options: RecordOptions, overwrite: bool) -> dict[str, Attribute] | None:
    """The attributes of an output that is there; None if it is to be made without looking.

    Raises :class:`DataError` for a file berth did not make, :class:`ConfigError` for one of other options.
    """
    if overwrite or not path.exists():
        return None
    found = read_attributes(path)
    if found.get("format") != FORMAT:
        raise DataError(f"{path} is an hdf5 file that was not made by berth; move it away, or replace it with --overwrite")
    changed = [
        f"{name} {found[name]} (now {value})"
        for name, value in option_attributes(options).items()
        if name in found and found[name] != value
    ]
    if changed:
        raise ConfigError(f"{path} was made with {', '.join(changed)}; use another output, or --overwrite to replace what is there")
    return found


def _beside(folder: Path) -> dict[str, list[Path]]:
    """The files of ``folder`` by name, bins also by the name without ``_bin_<length>``: one listing serves any number of jobs."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        for name in {path.name, _BIN_ENDING.sub("", path.stem) + path.suffix}:
            found.setdefault(name, []).append(path)
    return found


def _of_other_layouts(job: Job, beside: Mapping[str, list[Path]]) -> list[Path]:
    """Records of this job's text beside its outputs: what an earlier run with another ``--layout`` or ``--bin_size`` left."""
    outputs = job.outputs()
    found = [path for path in beside.get(job.output.name, []) if path not in outputs]
    return [path for path in found if made_by_berth(path) and read_attributes(path).get("input_name") == _input_name(job)]


def _input_name(job: Job) -> str:
    """The attribute ``input_name``: ``job.name``, readable where it is not UTF-8."""
    return job.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _counts_of(attributes: Mapping[str, Attribute]) -> RecordCounts:
    return RecordCounts(*(int(attributes[f"count_{field.name}"]) for field in dataclasses.fields(RecordCounts)))


def _finished(job: Job, wanted: Mapping[str, Attribute], overwrite: bool) -> tuple[tuple[Path, ...], RecordCounts] | None:
    """The files and counts of a finished, matching job; None if it must be made. Errors as :func:`_existing`."""
    found = {path: _existing(path, job.options, overwrite) for path in job.outputs()}
    there = {path: attributes for path, attributes in found.items() if attributes is not None}
    if not there or any(attributes.get(name) != value for attributes in there.values() for name, value in wanted.items()):
        return None
    try:
        counts = [_counts_of(attributes) for attributes in there.values()]
        if {str(attributes["files"]) for attributes in there.values()} != {str(len(there))}:
            return None
    except KeyError:
        return None
    return tuple(there), functools.reduce(RecordCounts.__add__, counts)


def _plan_files(job: Job, lengths: Sequence[int]) -> list[FilePlan]:
    """The files with rows, given how many rows have each length."""
    edges = [0, *job.options.bin_edges]
    plans = [
        FilePlan(path, int(sum(lengths[low + 1 : high + 1])), low, high)
        for path, low, high in zip(job.outputs(), edges[:-1], edges[1:], strict=True)
    ]
    return [plan for plan in plans if plan.rows]


def _make_instances(job: Job, text: TokenText) -> StoredInstances:
    """All instances of the job, on disk."""
    blocks = chunk_blocks if job.options.objective == "mlm" else instance_blocks
    spool = InstanceSpool(job.output, job.options.max_seq_length)
    for block in blocks(text, job.options, job.name):
        spool.append(block)
        text.release()
    return spool.finish()


def _write_rows(writer: RecordsWriter, maker: RowMaker, text: TokenText, instances: StoredInstances) -> None:
    """Make and write all rows, some at a time."""
    step = max(1, maker.options.rows_per_block // ROWS_PER_CHUNK) * ROWS_PER_CHUNK
    for bucket in instances.buckets():
        for start in range(0, len(bucket), step):
            block = bucket.take(slice(start, start + step))
            writer.append(maker.make(text.ids, block), block.forced)
            text.release()


def _write_attributes(writer: RecordsWriter, text: TokenText, attributes: Mapping[str, Attribute]) -> list[RecordCounts]:
    """The attributes of every file; what is counted in the text is told by the first file only, so that sums are true."""
    counts = []
    for number, (plan, tally) in enumerate(zip(writer.plans, writer.tallies, strict=True)):
        of_text = RecordCounts(
            instances=0, documents=text.documents, sentences=text.sentences, tokens=text.tokens, unknown_tokens=text.unknown,
            empty_sentences=text.empty_sentences, empty_documents=text.empty_documents,
            used_tokens=0, masked=0, random_next=0, forced_random=0,
        )  # fmt: skip
        if number:
            of_text = RecordCounts(*(0 for _ in dataclasses.fields(RecordCounts)))
        counts.append(dataclasses.replace(of_text, **dataclasses.asdict(tally)))
        tallies = {f"count_{name}": value for name, value in dataclasses.asdict(counts[-1]).items()}
        lengths: dict[str, Attribute] = {"bin_low": plan.low, "bin_high": plan.high} if attributes["layout"] == "binned" else {}
        writer.finish(number, {**attributes, **tallies, **lengths, "files": str(len(writer.plans))})
    return counts


def load_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary at ``path``, read again only when the file has changed: a process makes many shards with one."""
    status = path.stat() if path.is_file() else None
    return _vocabulary_of(path, (status.st_size, status.st_mtime_ns, status.st_ino) if status else None)


@functools.lru_cache(maxsize=1)
def _vocabulary_of(path: Path, state: tuple[int, int, int] | None) -> Vocabulary:
    return Vocabulary.load(path)


def run_job(job: Job, overwrite: bool = False) -> Result:
    """Make the records of one job, or find them finished.

    Raises :class:`DataError` for a wrong vocabulary or text, ``OSError`` when it cannot be written (no partial file stays).
    """
    start = time.perf_counter()
    vocabulary, options = load_vocabulary(job.vocab_file), job.options
    attributes = identity(job, vocabulary)
    size = sum(file.stat().st_size for file in job.files)
    done = _finished(job, attributes, overwrite)
    if done is not None:
        return Result(job.output, *done, size, True, time.perf_counter() - start)
    text = tokenize_files(job.files, vocabulary, options.lowercase, job.output)
    instances = _make_instances(job, text)
    maker = RowMaker(vocabulary, options, separators(text) if options.objective == "mlm" else None)
    plans = _plan_files(job, instances.lengths.tolist())
    with open_records(plans, options.layout, options.max_predictions_per_seq, vocabulary.size) as writer:
        _write_rows(writer, maker, text, instances)
        counts = _write_attributes(writer, text, attributes)
    files = tuple(plan.path for plan in plans)
    others = _of_other_layouts(job, _beside(job.output.parent)) if overwrite else []
    for path in {*job.outputs(), *others} - set(files):  # bins of an earlier run without rows now
        path.unlink(missing_ok=True)
    return Result(job.output, files, functools.reduce(RecordCounts.__add__, counts), size, False, time.perf_counter() - start)


def check_jobs(jobs: Sequence[Job], overwrite: bool = False) -> None:
    """Raise what can be known before work begins: outputs that may not be replaced, texts that cannot be opened."""
    beside = {folder: _beside(folder) for folder in {job.output.parent for job in jobs}}
    for job in jobs:
        for path in job.outputs():
            _existing(path, job.options, overwrite)
        for path in () if overwrite else _of_other_layouts(job, beside[job.output.parent]):
            raise ConfigError(
                f"{path} holds the same text in another layout or bin size, and training would read both; use another output, or "
                "--overwrite to replace what is there"
            )
        for file in job.files:
            with open(file, "rb") as handle:
                handle.read(1)


def run_jobs(jobs: Sequence[Job], processes: int, overwrite: bool = False) -> Iterator[Result]:
    """Make the files of ``jobs``; results come as they finish. The first error ends the run and is raised.

    Files finished before an error stay; the others do not exist, so running again continues.
    """
    if processes < 1:
        raise ConfigError(f"--processes {processes} must be at least 1")
    check_jobs(jobs, overwrite)
    yield from map_processes(functools.partial(run_job, overwrite=overwrite), jobs, max(1, min(processes, len(jobs))))


def write_manifest(folder: Path, vocab_file: Path, options: RecordOptions, results: Sequence[Result], others: bool = False) -> Path:
    """Write ``records.json``: options, sums, and bytes and SHA-256 of every file (see :mod:`berth.corpus.parts`).

    ``others``: the run was over one shard of several; what the manifest says of other files that are there is kept.
    """
    path = folder / "records.json"
    try:
        before = read_json(path)["parts"]
        assert isinstance(before, dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        before = {}
    parts: dict[str, dict[str, Any]] = {}
    for result in sorted(results, key=lambda result: result.output.name):
        for file in result.files:
            known, attributes, size = before.get(file.name), read_attributes(file), file.stat().st_size
            digest = sha256_json({name: attributes[name] for name in ("input_sha256", "vocab_sha256", *option_attributes(options))})
            # tasks of an array make files without a manifest: the one that is there may be of an older text
            if result.skipped and isinstance(known, dict) and (known.get("digest"), known.get("bytes")) == (digest, size):
                parts[file.name] = known
                continue
            parts[file.name] = {
                "digest": digest,
                "bytes": size,
                "sha256": sha256_file(file),
                "counts": dataclasses.asdict(_counts_of(attributes)),
                "seconds": None if result.skipped else round(result.seconds / len(result.files), 3),
            }
    if others:
        kept = {name: part for name, part in before.items() if (folder / Path(name).name).is_file() and isinstance(part, dict)}
        parts = dict(sorted({**kept, **parts}.items()))
    counts = functools.reduce(RecordCounts.__add__, (RecordCounts(**part["counts"]) for part in parts.values()))
    write_json(
        path,
        {
            "format": "berth stage", "format_version": 1, "stage": "records", "complete": True,
            "options": {**option_attributes(options), "vocab_sha256": sha256_file(vocab_file)},
            "inputs": sha256_json([part["digest"] for part in parts.values()]), "counts": dataclasses.asdict(counts),
            "seconds": round(sum(part["seconds"] or 0.0 for part in parts.values()), 3), "parts": parts,
        },
    )  # fmt: skip
    return path


def strangers(output_dir: Path, jobs: Sequence[Job]) -> list[Path]:
    """Records files in ``output_dir`` that none of ``jobs`` makes: left-overs of other shard numbers, or other data."""
    if not output_dir.is_dir():
        return []
    own = {path.name for job in jobs for path in job.outputs()}
    return [path for path in sorted(output_dir.glob(f"*{SUFFIX}")) if path.name not in own]


def made_by_berth(path: Path) -> bool:
    """Whether ``path`` is a records file this program wrote (so it may be made again)."""
    try:
        return read_attributes(path).get("format") == FORMAT
    except DataError:
        return False


def made_of_older_shards(path: Path, jobs: Sequence[Job]) -> bool:
    """Whether ``path`` was made by this program of a shard that ``jobs`` no longer have, though they have others of its prefix."""
    try:
        found = read_attributes(path)
    except DataError:
        return False
    name = str(found.get("input_name", ""))
    prefixes = {shard_prefix(job.name) for job in jobs} - {None}
    return found.get("format") == FORMAT and shard_prefix(name) in prefixes and name not in {job.name for job in jobs}
