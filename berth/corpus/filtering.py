"""The stage ``filter``: cleaning, heuristics, language detection and deduplication of sentence files.

In: sentences, a blank line between documents (``data/sentences.py``). Out: the same, fewer documents. Every document that does
not come out is counted under one reason: ``documents_in`` = ``documents_out`` + all ``rejected_<reason>`` (with ``invert``, which
writes the rejected ones: ``documents_in`` = ``documents_passed`` + rejected).

Without deduplication this is one pass. With it there are two: the first judges every document and notes verdict, digest and
signature (16 to 530 bytes a document) in a hidden file beside the output; then repeats are found among the documents that passed;
the second pass writes. Both are stages of :mod:`berth.corpus.parts`, so either is resumed where it was interrupted. Rejected:
dropping repeats while reading (what is kept would depend on the order in which processes finish).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from berth.corpus import filters
from berth.corpus.cleaning import Cleaner, check_charset
from berth.corpus.dedup import MinHash, digest_of, exact_repeats, near_repeats, signer
from berth.corpus.documents import document_tasks, documents_of_spans, read_documents
from berth.corpus.languages import ANY, LANGUAGES, check_language, letters_of
from berth.corpus.parts import PART_BYTES, Span, StageResult, Task, manifest_path, run_stage
from berth.errors import ConfigError
from berth.files import read_json, sha256_json

STAGE, JUDGE_STAGE = "filter", "judge"
DEDUP = ("none", "exact", "minhash")
REASONS = (*filters.TESTS, "pass", "empty", "duplicate_exact", "duplicate_near")
PASS, EMPTY, DUPLICATE_EXACT, DUPLICATE_NEAR = filters.PASS, filters.PASS + 1, filters.PASS + 2, filters.PASS + 3
REJECTED = tuple(number for number in (EMPTY, *range(filters.PASS), DUPLICATE_EXACT, DUPLICATE_NEAR))  # in the order of the report
_BATCH = 1 << 20  # characters that are judged together
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class FilterOptions:
    """What the stage does; checked by :meth:`resolved`.

    ``language`` may be "" when nothing needs it. ``langdetect``: None (detect ``language``), a code, or ``none``.
    """

    language: str = ""
    word_chars: str = ""
    limits: filters.Limits | None = dataclasses.field(default_factory=filters.Limits)
    langdetect: str | None = None
    detector: str = "langdetect"
    clean: bool = True
    charset: str | None = None
    dedup: str = "none"
    minhash: MinHash = dataclasses.field(default_factory=MinHash)
    invert: bool = False
    limit: int | None = None

    def resolved(self) -> tuple[Rules, list[str]]:
        """The rules that workers follow, and remarks for the user. Raises :class:`ConfigError` for what cannot be."""
        language = self.language or ANY
        check_language(language, "--language")
        if self.word_chars:
            letters_of(self.word_chars)
        alphabet = self.word_chars or LANGUAGES[language].alphabet
        if self.limits is not None and not alphabet:
            raise ConfigError(
                "the heuristics need the alphabet of the text: give --language (for example --language hu) or --word_chars a-záé..., "
                "or leave them out with --no_heuristics"
            )
        if self.charset is not None:
            if not self.clean:
                raise ConfigError("--charset is a part of cleaning; leave out --no_clean")
            check_charset(self.charset, language, self.word_chars)
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit} must be at least 1")
        if self.dedup not in DEDUP:
            raise ConfigError(f"--dedup {self.dedup} is not one of {', '.join(DEDUP)}")
        detect, remarks = self._detection(language)
        cleaner = Cleaner(language, self.charset) if self.clean else None
        return Rules(language, alphabet, self.limits, self.detector if detect else None, detect, cleaner), remarks

    def _detection(self, language: str) -> tuple[str | None, list[str]]:
        wanted = self.langdetect
        if wanted is None:
            wanted = language if self.limits is not None and language != ANY else "none"
        if wanted == "none":
            return None, []
        check_language(wanted, "--langdetect")
        found, reason = filters.detection_language(wanted, self.detector)
        return found, [f"no language detection: {reason}"] if reason else []


@dataclasses.dataclass(frozen=True)
class Rules:
    """Resolved options; decides about documents. Plain data."""

    language: str
    alphabet: str
    limits: filters.Limits | None
    detector: str | None
    detect: str | None
    cleaner: Cleaner | None

    def identity(self) -> dict[str, Any]:
        """JSON values that decide verdicts and text."""
        found: dict[str, Any] = {
            "version": _VERSION,
            "language": self.language,
            "clean": self.cleaner is not None,
            "charset": self.cleaner.charset if self.cleaner else None,
            "unicode": unicodedata.unidata_version,
        }
        if self.limits is not None:
            found |= {"alphabet": self.alphabet, "limits": dataclasses.asdict(self.limits)}
        if self.detect is not None:
            found |= {"langdetect": self.detect, "detector": self.detector}
        return found

    def cleaned(self, lines: Sequence[str]) -> tuple[list[str], int]:
        """The lines that are left of a document, and how many characters were removed."""
        if self.cleaner is None:
            return list(lines), 0
        pairs = [self.cleaner(line) for line in lines]
        return [line for line, _ in pairs if line], sum(removed for _, removed in pairs)

    def verdicts(self, documents: Sequence[Sequence[str]], detect: Callable[[Sequence[str]], bool] | None) -> np.ndarray:
        """uint8 [documents]: :data:`EMPTY`, :data:`PASS`, or the number of a test."""
        verdict = np.array([PASS if lines else EMPTY for lines in documents], np.uint8)
        there = np.flatnonzero(verdict == PASS).tolist()
        if self.limits is not None and there:
            counted = filters.count([documents[number] for number in there], self.alphabet, self.language)
            verdict[there] = filters.judge(counted, self.limits)
        if detect is not None:
            for number in np.flatnonzero(verdict == PASS).tolist():
                if not detect(documents[number]):
                    verdict[number] = filters.TESTS.index("langdetect")
        return verdict

    def open_detector(self) -> Callable[[Sequence[str]], bool] | None:
        """The function that detects languages, or None."""
        if self.detector is None or self.detect is None:
            return None
        return filters.make_detector(self.detector, self.detect)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """``--limit``: of this one part only the first documents are read."""

    payload: tuple[Span, ...]
    documents: int


def _read(spans: tuple[Span, ...], cut: _Cut | None) -> Iterator[list[str]]:
    """The documents of sentence files; a part of an earlier stage that is empty is no document."""
    documents = (document.paragraphs for document in documents_of_spans(spans, "blank_line") if document.paragraphs)
    return itertools.islice(documents, cut.documents) if cut is not None and cut.payload == spans else documents


def _batches(documents: Iterator[list[str]]) -> Iterator[list[list[str]]]:
    batch: list[list[str]] = []
    size = 0
    for lines in documents:
        batch.append(lines)
        size += sum(map(len, lines))
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _record_type(options: MinHash | None) -> np.dtype[Any]:
    fields: list[Any] = [("verdict", "u1"), ("digest", "<u8", (2,))]
    if options is not None:
        fields.append(("signature", "<u4", (options.permutations,)))
    return np.dtype(fields)


@dataclasses.dataclass(frozen=True)
class JudgeWorker:
    """First pass of deduplication: a record (verdict, digest, signature) for every document."""

    rules: Rules
    minhash: MinHash | None
    cut: _Cut | None

    def __call__(self, payload: tuple[Span, ...], output: IO[str]) -> Mapping[str, int]:
        detect = self.rules.open_detector()
        sign = signer(self.minhash) if self.minhash is not None else None
        documents = 0
        for batch in _batches(_read(payload, self.cut)):
            cleaned = [self.rules.cleaned(lines)[0] for lines in batch]
            records = np.zeros(len(cleaned), _record_type(self.minhash))
            records["verdict"] = self.rules.verdicts(cleaned, detect)
            for number in np.flatnonzero(records["verdict"] == PASS):
                records["digest"][number] = np.frombuffer(digest_of(cleaned[number]), "<u8")
                if sign is not None:
                    records["signature"][number] = sign(cleaned[number])
            cast(Any, output).buffer.write(records.tobytes())
            documents += len(batch)
        return {"documents_in": documents}


@dataclasses.dataclass(frozen=True)
class FilterWorker:
    """Writes the documents that pass (or, with ``invert``, the others). The payload of a second pass has the verdicts, too."""

    rules: Rules
    invert: bool
    cut: _Cut | None

    def _judged(self, payload: Any) -> Iterator[tuple[list[str], list[str], int, int]]:
        """(lines read, lines left, characters removed, verdict) for every document."""
        known = bool(payload) and isinstance(payload[1], bytes) if len(payload) == 2 else False
        spans, verdicts = payload if known else (payload, b"")
        detect = None if known else self.rules.open_detector()
        begin = 0
        for batch in _batches(_read(spans, self.cut)):
            cleaned = [self.rules.cleaned(lines) for lines in batch]
            if known:
                found = list(verdicts[begin : begin + len(batch)])
                begin += len(batch)
            else:
                found = self.rules.verdicts([lines for lines, _ in cleaned], detect).tolist()
            for lines, (left, removed), verdict in zip(batch, cleaned, found, strict=True):
                yield lines, left, removed, verdict
        assert begin == len(verdicts), "the input changed between the two passes"

    def __call__(self, payload: Any, output: IO[str]) -> Mapping[str, int]:
        verdicts = [0] * len(REASONS)
        counts = dict.fromkeys(
            ("documents_in", "documents_out", "sentences_in", "sentences_out", "characters_out", "characters_removed"), 0
        )
        for lines, left, removed, verdict in self._judged(payload):
            verdicts[verdict] += 1
            counts["documents_in"] += 1
            counts["sentences_in"] += len(lines)
            counts["characters_removed"] += removed
            if (verdict == PASS) is self.invert:
                continue
            left = left or lines  # an empty document, inverted
            if not left:
                continue
            output.write("\n" if counts["documents_out"] else "")
            output.write("\n".join(left))
            output.write("\n")
            counts["documents_out"] += 1
            counts["sentences_out"] += len(left)
            counts["characters_out"] += sum(len(line) - line.count(" ") for line in left)
        counts["documents_passed"] = verdicts[PASS]
        return counts | {f"rejected_{REASONS[number]}": verdicts[number] for number in REJECTED}


def _limited(tasks: list[Task], limit: int | None) -> tuple[list[Task], _Cut | None]:
    """The tasks that hold the first ``limit`` documents, and how many of the last one's count."""
    if limit is None:
        return tasks, None
    left = limit
    for number, task in enumerate(tasks):
        found = sum(1 for _ in itertools.islice(_read(task.payload, None), left))
        left -= found
        if not left:
            return tasks[: number + 1], _Cut(task.payload, found)
    return tasks, None


def records_path(output: Path) -> Path:
    """The hidden file of the first pass, beside a single output file or in the output folder."""
    return output.with_name(f".{output.name}.judged.bin") if output.suffix else output / ".judged.bin"


def _repeats(path: Path, minhash: MinHash | None) -> np.ndarray:
    """uint8 [documents]: verdicts of the first pass, repeats included."""
    if not path.stat().st_size:
        return np.zeros(0, np.uint8)
    records: Any = np.memmap(path, _record_type(minhash), mode="r")
    verdicts = np.array(records["verdict"])
    passed = np.flatnonzero(verdicts == PASS)
    exact = exact_repeats(np.array(records["digest"][passed]))
    verdicts[passed[exact]] = DUPLICATE_EXACT
    if minhash is not None:
        verdicts[near_repeats(records["signature"], verdicts == PASS, minhash)] = DUPLICATE_NEAR
    return verdicts


def _with_verdicts(tasks: list[Task], path: Path, verdicts: np.ndarray) -> Iterator[Task]:
    """Tasks of the second pass; their digests are those of the first with the verdicts."""
    parts = read_json(manifest_path(path, JUDGE_STAGE))["parts"]
    begin = 0
    for task in tasks:
        entry = parts[task.name]
        end = begin + int(entry["counts"]["documents_in"])
        codes = verdicts[begin:end].tobytes()
        yield Task(task.name, (task.payload, codes), sha256_json([entry["digest"], hashlib.sha256(codes).hexdigest()]))
        begin = end
    assert begin == len(verdicts)


def filter_documents(
    path: str | Path, output: str | Path, options: FilterOptions, processes: int = 1, part_bytes: int = PART_BYTES
) -> tuple[StageResult, list[str]]:
    """Filter the sentence file or folder at ``path`` to ``output`` (a name with a suffix: one file, otherwise a folder of parts).

    Returns the result of the stage and remarks for the user. Raises :class:`ConfigError` for options that cannot be,
    :class:`DataError` for text that cannot be read or is none at all.
    """
    rules, remarks = options.resolved()
    target = Path(output)
    next(iter(read_documents(path, "blank_line")))  # text at all, and readable
    tasks, cut = _limited(document_tasks(path, "blank_line", STAGE, ".txt", part_bytes), options.limit)
    identity: dict[str, Any] = {**rules.identity(), "dedup": options.dedup, "limit": options.limit, "part_bytes": part_bytes}
    minhash = None
    if options.dedup == "minhash":
        minhash = dataclasses.replace(options.minhash, language=rules.language)
        identity |= {"minhash": dataclasses.asdict(minhash)}
    work = tasks
    source: Iterator[Task] | list[Task] = work
    if options.dedup != "none":
        records = records_path(target)
        run_stage(JUDGE_STAGE, records, tasks, JudgeWorker(rules, minhash, cut), identity, processes, total=len(tasks))
        source = _with_verdicts(tasks, records, _repeats(records, minhash))
    worker = FilterWorker(rules, options.invert, cut)
    identity |= {"invert": options.invert}
    result = run_stage(STAGE, target, source, worker, identity, processes, total=len(tasks), separator="\n")
    counts = result.counts
    rejected = sum(counts[f"rejected_{REASONS[number]}"] for number in REJECTED)
    assert counts["documents_in"] == counts["documents_passed"] + rejected
    assert options.invert or counts["documents_out"] == counts["documents_passed"]
    if not counts["documents_out"]:
        remarks.append("warning: no document was written; look at the reasons, and at rejected documents with --invert")
    return result, remarks


def report(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows ``reason``, ``documents``, ``percent`` of the documents read: every reason that occurred, and ``pass-all``."""
    total = max(1, counts["documents_in"])
    rows = [(f"fail-{REASONS[number]}", counts[f"rejected_{REASONS[number]}"]) for number in REJECTED]
    rows = [(name, value) for name, value in rows if value] + [("pass-all", counts["documents_passed"])]
    return [{"reason": name, "documents": value, "percent": round(100 * value / total, 2)} for name, value in rows]
