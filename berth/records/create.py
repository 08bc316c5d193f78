"""The stage: text shards and a vocabulary to records files.

In: ``.txt`` files (one sentence a line, blank lines between documents), vocab.txt, :class:`RecordOptions`. Out: one hdf5 of
everything (:func:`create_file`), or one a shard made by several processes (:func:`create_folder`).

A file that was made from the same text, vocabulary and options by the same format version is left as it is; its
attributes say so. Text or vocabulary that changed make it again; a file of other options is only replaced with ``overwrite``.
The bytes do not depend on the number of processes or on which shards were left.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType

import h5py
import numpy as np

from berth.corpus.shardset import select_shards
from berth.errors import ConfigError, DataError
from berth.files import discard_temporary, sha256_file, sha256_json
from berth.processes import end_with_parent
from berth.records.masking import RowMaker
from berth.records.options import RecordOptions
from berth.records.pairs import Instances, make_instances
from berth.records.schema import FORMAT, FORMAT_VERSION, ROWS_PER_CHUNK, SUFFIX, RecordCounts
from berth.records.tokens import TokenText, tokenize_files
from berth.records.writer import Attribute, RecordsWriter, open_records
from berth.text.lines import check_output
from berth.text.vocabulary import Vocabulary

EVERYTHING = "all"  # the name of a records file made of a folder, whatever the folder is called
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


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


@dataclasses.dataclass(frozen=True)
class Result:
    """A records file that is there: its counts, the bytes of text behind it, and whether it was there before."""

    output: Path
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
        "input_name": job.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"),
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


def _existing(job: Job, overwrite: bool) -> dict[str, Attribute] | None:
    """The attributes of the output that is there; None if it is to be made without looking.

    Raises :class:`DataError` for a file berth did not make, :class:`ConfigError` for one of other options.
    """
    if overwrite or not job.output.exists():
        return None
    found = read_attributes(job.output)
    if found.get("format") != FORMAT:
        raise DataError(f"{job.output} is an hdf5 file that was not made by berth; move it away, or replace it with --overwrite")
    changed = [
        f"{name} {found[name]} (now {value})"
        for name, value in option_attributes(job.options).items()
        if name in found and found[name] != value
    ]
    if changed:
        raise ConfigError(f"{job.output} was made with {', '.join(changed)}; use another output, or --overwrite to replace what is there")
    return found


def _finished(job: Job, wanted: dict[str, Attribute], overwrite: bool) -> RecordCounts | None:
    """The counts of a finished, matching output; None if it must be made. Errors as :func:`_existing`."""
    found = _existing(job, overwrite)
    if found is None:
        return None
    if any(found.get(name) != value for name, value in wanted.items()):
        return None
    fields = [field.name for field in dataclasses.fields(RecordCounts)]
    try:
        return RecordCounts(*(int(found[f"count_{name}"]) for name in fields))
    except KeyError:
        return None


def _write_rows(writer: RecordsWriter, maker: RowMaker, text: TokenText, instances: Instances) -> tuple[int, int]:
    """Make and write all rows block by block; returns real positions and masked positions."""
    used = masked = 0
    step = max(1, maker.options.rows_per_block // ROWS_PER_CHUNK) * ROWS_PER_CHUNK
    for start in range(0, len(instances), step):
        rows = maker.make(text.ids, instances.take(slice(start, start + step)))
        used += int(rows.input_mask.sum(dtype=np.int64))
        masked += int(np.count_nonzero(rows.masked_lm_positions))
        writer.append(rows)
    return used, masked


def run_job(job: Job, overwrite: bool = False) -> Result:
    """Make one records file, or find it finished.

    Raises :class:`DataError` for a wrong vocabulary or text, ``OSError`` when it cannot be written (no partial file stays).
    """
    start = time.perf_counter()
    vocabulary = Vocabulary.load(job.vocab_file)
    attributes = identity(job, vocabulary)
    size = sum(file.stat().st_size for file in job.files)
    done = _finished(job, attributes, overwrite)
    if done is not None:
        return Result(job.output, done, size, True, time.perf_counter() - start)
    text = tokenize_files(job.files, vocabulary, job.options.lowercase)
    instances = make_instances(text, job.options, job.name)
    maker = RowMaker(vocabulary, job.options)
    options = job.options
    with open_records(job.output, len(instances), options.max_seq_length, options.max_predictions_per_seq) as writer:
        used, masked = _write_rows(writer, maker, text, instances)
        counts = RecordCounts(
            instances=len(instances),
            documents=text.documents,
            sentences=text.sentences,
            tokens=len(text.ids),
            unknown_tokens=int(np.count_nonzero(text.ids == vocabulary.unk_id)),
            empty_sentences=text.empty_sentences,
            empty_documents=text.empty_documents,
            used_tokens=used,
            masked=masked,
            random_next=int(np.count_nonzero(instances.labels)),
            forced_random=int(np.count_nonzero(instances.forced)),
        )
        tallies = {f"count_{name}": value for name, value in dataclasses.asdict(counts).items()}
        writer.set_attributes({**attributes, **tallies})
    return Result(job.output, counts, size, False, time.perf_counter() - start)


def _worker_start() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.platform == "linux":  # a worker whose parent is killed ends, too
        end_with_parent(signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:  # killed before the line above
            os._exit(1)


def stop_on_sigterm(jobs: Sequence[Job]) -> None:
    """Let SIGTERM end this process and its workers at once with code 143, nothing half-written.

    Not by an exception: HDF5 would swallow one that is raised while it writes.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(5)
        for job in jobs:
            for process in (os.getpid(), *(worker.pid for worker in workers)):
                with contextlib.suppress(OSError):
                    discard_temporary(job.output, int(process or 0))
        os.write(2, b"terminated\n")
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def check_jobs(jobs: Sequence[Job], overwrite: bool = False) -> None:
    """Raise what can be known before work begins: outputs that may not be replaced, texts that cannot be opened."""
    for job in jobs:
        _existing(job, overwrite)
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
    if processes == 1 or len(jobs) == 1:
        for job in jobs:
            yield run_job(job, overwrite)
        return
    # spawn: a forked child would inherit the threads of the tokenizer and of HDF5 in an unknown state.
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(jobs)), multiprocessing.get_context("spawn"), initializer=_worker_start
    )
    try:
        futures = [pool.submit(run_job, job, overwrite) for job in jobs]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, probably for lack of memory; use fewer --processes or smaller shards, and run "
            "again: finished files are kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def strangers(output_dir: Path, jobs: Sequence[Job]) -> list[Path]:
    """Records files in ``output_dir`` that none of ``jobs`` makes: left-overs of other shard numbers, or other data."""
    if not output_dir.is_dir():
        return []
    own = {job.output.name for job in jobs}
    return [path for path in sorted(output_dir.glob(f"*{SUFFIX}")) if path.name not in own]


def made_by_berth(path: Path) -> bool:
    """Whether ``path`` is a records file this program wrote (so it may be made again)."""
    try:
        return read_attributes(path).get("format") == FORMAT
    except DataError:
        return False
