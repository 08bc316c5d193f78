"""Stage ``extract``: whatever the text comes in, to JSON lines of documents.

In: one or more sources: MediaWiki dumps, WikiExtractor output, text, JSON lines, Parquet, Hugging Face datasets. Out: a folder of parts
``<source>_00000.jsonl``, one document a line: ``id`` (``<source>/<name>``, unique), ``text`` (paragraphs separated by ``\\n``, single
spaces between words, no control characters), ``title`` if there is one, ``source``; manifest ``extract.json``.

A weight w makes w copies of each document of a source: floor(w), and one more for a share w - floor(w) of the documents,
chosen by a hash of seed and id. The choice depends on neither order nor processes. Copies have ``#copy2`` and so on behind their id.

Letters stay as they are: Unicode normalisation and character sets are the business of the stage ``filter``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from berth.corpus.documents import DOCUMENT_RULES, document_rule, single_spaces
from berth.corpus.mediawiki import Batch, DumpReader, Site, cut_dump, file_batches, open_stdin, read_site
from berth.corpus.parts import Span, StageResult, Task, part_name, run_stage
from berth.corpus.sources import DatasetReader, Item, JsonReader, ParquetReader, Rows, TextReader, parent_of, saved_dataset
from berth.corpus.wikiextractor import WikiExtractorReader, wikiextractor_files
from berth.corpus.wikitext import Wikitext, hidden_names, parser_installed
from berth.errors import ConfigError, DataError
from berth.files import printable_name, sha256_json

FORMATS = ("auto", "mediawiki", "wikiextractor", "txt", "jsonl", "parquet", "datasets")
STDIN = "-"
MOST_COPIES = 1000
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
_DUMP_NAME = re.compile(r".+\.xml(?:[-.].*)?(?:\.bz2|\.gz)?|.+\.(?:bz2|gz)", re.IGNORECASE)
_DUMP_IN_FOLDER = re.compile(r".+\.xml(?:-p\d+p\d+)?(?:\.bz2|\.gz)?", re.IGNORECASE)

Payload = tuple[Span, ...] | Batch | Rows


class Reader(Protocol):
    """Cuts a source into payloads and reads one of them; see :mod:`berth.corpus.sources`."""

    def payloads(self) -> Iterator[Any]:
        """What workers are given, in order."""

    def items(self, payload: Any) -> Iterator[Item]:
        """The documents of a payload."""


@dataclasses.dataclass(frozen=True)
class MediaWikiReader:
    """The dump files at ``root`` (a file, or a folder of them)."""

    root: Path
    dump: DumpReader

    def payloads(self) -> Iterator[tuple[Span, ...] | Batch]:
        """Byte ranges that workers read themselves; of files that cannot be cut, batches of pages."""
        for file in dump_files(self.root):
            spans = cut_dump(file)
            if spans is None:
                yield from file_batches(file)
            else:
                yield from ((span,) for span in spans)

    def items(self, payload: tuple[Span, ...] | Batch) -> Iterator[Item]:
        """The pages of a payload."""
        for piece in (payload,) if isinstance(payload, Batch) else payload:
            yield from self.dump.items(piece)


@dataclasses.dataclass(frozen=True)
class Source:
    """One ``--input``: its name (start of ids and part names), where it is, how many copies of it are wanted, and its reader."""

    name: str
    root: Path
    weight: float
    reader: Reader

    def describe(self) -> dict[str, Any]:
        """What decides the output beside the bytes of the files; not where they are."""
        values = _plain(self.reader)
        values.pop("root", None)
        return {"name": self.name, "weight": self.weight, "reader": type(self.reader).__name__, **values}


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and sets as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


# --------------------------------------------------------------------------------------------------- finding the sources


def dump_files(root: Path) -> list[Path]:
    """The dump files at ``root``: itself, or those of a folder (not below), sorted.

    Raises :class:`DataError` for none, :class:`ConfigError` for one dump in two forms (its pages would come twice): compressed and
    not, multistream and not, in one piece and in several.
    """
    if root.is_file():
        return [root]
    files = sorted(path for path in root.iterdir() if _DUMP_IN_FOLDER.fullmatch(path.name) and path.is_file())
    if not files:
        raise DataError(f"{root}: no .xml, .xml.bz2 or .xml.gz file in this folder")
    seen: dict[str, Path] = {}
    for file in files:
        stem = re.sub(r"(?i)\.(bz2|gz)$|-multistream(?=\d*\.xml)", "", file.name)
        if stem in seen:
            raise ConfigError(f"--input {root}: {seen[stem].name} and {file.name} are the same dump; name one of them")
        seen[stem] = file
    for stem, file in seen.items():
        whole = re.sub(r"\d*\.xml-p\d+p\d+$", ".xml", stem)
        if whole != stem and whole in seen:
            raise ConfigError(f"--input {root}: {file.name} is a piece of {seen[whole].name}; move the one or the other elsewhere")
    return files


def _one_site(root: Path) -> Site:
    """The head of the dump files at ``root``. Raises :class:`ConfigError` for those of two wikis (page numbers would meet)."""
    files = dump_files(root)
    site = read_site(files[0])
    for file in files[1:]:
        other = read_site(file)
        if other.name != site.name:
            raise ConfigError(
                f"--input {root}: {files[0].name} is of {site.name or 'no named wiki'}, {file.name} of {other.name or 'no named wiki'}; "
                "give the files one by one, or a folder for each wiki"
            )
    return site


def detect_format(root: Path) -> str:
    """What ``auto`` means for a path. Raises :class:`ConfigError` when the names do not say it, :class:`DataError` when it is missing."""
    if str(root) == STDIN:
        return "mediawiki"
    if root.is_file():
        suffix = root.suffix.lower()
        by_suffix = {".txt": "txt", ".jsonl": "jsonl", ".parquet": "parquet"}
        if suffix in by_suffix:
            return by_suffix[suffix]
        if _DUMP_NAME.fullmatch(root.name):
            return "mediawiki"
        if re.fullmatch(r"wiki_\d+", root.name):
            return "wikiextractor"
        raise ConfigError(f"--input {root}: its name does not say what it is; give --format, one of {', '.join(FORMATS[1:])}")
    if not root.is_dir():
        raise DataError(f"--input {root}: no such file or folder")
    if saved_dataset(root):
        return "datasets"
    found = [kind for kind in ("txt", "jsonl", "parquet") if _any_file(root, f".{kind}")]
    if wikiextractor_files(root) and not found:
        found.append("wikiextractor")
    if any(_DUMP_IN_FOLDER.fullmatch(path.name) for path in root.iterdir()):
        found.append("mediawiki")
    if len(found) != 1:
        what = f"holds {' and '.join(found)} files" if found else "holds nothing that can be read"
        raise ConfigError(f"--input {root}: the folder {what}; give --format, one of {', '.join(FORMATS[1:])}, or name the files")
    return found[0]


def _any_file(root: Path, suffix: str) -> bool:
    return any(path.suffix.lower() == suffix and path.is_file() and not path.name.startswith(".") for path in root.rglob("*"))


@dataclasses.dataclass(frozen=True)
class ExtractOptions:
    """What ``data/extract.py`` was asked for; see its ``--help``."""

    inputs: tuple[str, ...]
    output_dir: str
    format: str = "auto"
    text_column: str = "text"
    split: str = "train"
    documents: str = "auto"
    weight: tuple[float, ...] = (1.0,)
    namespaces: tuple[int, ...] = (0,)
    keep_lists: bool = False
    keep_headings: bool = False
    processes: int = 1
    seed: int = 12345

    def __post_init__(self) -> None:
        wrong = []
        if self.format not in FORMATS:
            wrong.append(f"--format {self.format} is not one of {', '.join(FORMATS)}")
        if self.documents not in DOCUMENT_RULES:
            wrong.append(f"--documents {self.documents} is not one of {', '.join(DOCUMENT_RULES)}")
        if len(self.weight) not in (1, len(self.inputs)):
            wrong.append(f"--weight has {len(self.weight)} values for {len(self.inputs)} inputs; give one, or one for each")
        if any(not math.isfinite(weight) or not 0 < weight <= MOST_COPIES for weight in self.weight):
            wrong.append(f"--weight must be above 0 and at most {MOST_COPIES}; leave an input out instead of giving it 0")
        if self.inputs.count(STDIN) > 1:
            wrong.append("--input - can be given once only")
        if self.processes < 1:
            wrong.append(f"--processes {self.processes} must be at least 1")
        if not self.namespaces:
            wrong.append("--namespaces needs at least one number (0: articles)")
        output = Path(self.output_dir)
        if output.suffix or output.is_file():
            wrong.append(f"--output_dir {output} must name a folder, without a dot in its last part")
        for given in self.inputs:
            folder = Path(given)
            if given != STDIN and folder.is_dir() and folder.resolve() in (output.resolve(), *output.resolve().parents):
                wrong.append(
                    f"--output_dir {output} lies in the input folder {given}: the next run would read it as text; put it elsewhere"
                )
        if wrong:
            raise ConfigError("; ".join(wrong))


def _dump_reader(root: Path, site: Site, options: ExtractOptions) -> MediaWikiReader:
    if not parser_installed():
        raise ConfigError(f'--input {root}: MediaWiki dumps need mwparserfromhell; pip install "berth[mediawiki]"')
    wikitext = Wikitext(hidden_names(site.namespaces), options.keep_lists, options.keep_headings)
    return MediaWikiReader(root, DumpReader(site, wikitext, frozenset(options.namespaces)))


def _stem(root: Path) -> str:
    return re.sub(r"[^\w-]+", "_", root.resolve().name.split(".")[0]).strip("_") or "source"


def find_sources(options: ExtractOptions) -> tuple[list[Source], Iterator[Batch]]:
    """The sources of a run, in the order of ``--input``, and the batches of standard input (none if it is not one).

    Raises :class:`ConfigError` and :class:`DataError` for inputs that are missing, overlap, or cannot be recognised.
    """
    sources: list[Source] = []
    piped: Iterator[Batch] = iter(())
    weights = options.weight * len(options.inputs) if len(options.weight) == 1 else options.weight
    for given, weight in zip(options.inputs, weights, strict=True):
        root = Path(given)
        kind = detect_format(root) if options.format == "auto" else options.format
        name = _stem(root)
        reader: Reader
        if given == STDIN:
            if kind != "mediawiki":
                raise ConfigError(f"--input - reads MediaWiki dumps only, not --format {kind}; give a file")
            site, piped = open_stdin()
            name, reader = site.name or "stdin", _dump_reader(root, site, options)
        elif not root.exists():
            raise DataError(f"--input {root}: no such file or folder")
        elif kind == "mediawiki":
            site = _one_site(root)
            name, reader = site.name or name, _dump_reader(root, site, options)
        else:
            reader = _plain_reader(root, kind, options)
        name = re.sub(r"[^\w-]+", "_", name)
        taken = {source.name for source in sources}
        name = next(found for number in range(1, len(sources) + 2) if (found := name if number == 1 else f"{name}_{number}") not in taken)
        sources.append(Source(name, root, float(weight), reader))
    _refuse_overlap([source.root for source in sources if str(source.root) != STDIN])
    return sources, piped


def _plain_reader(root: Path, kind: str, options: ExtractOptions) -> Reader:
    if kind == "wikiextractor":
        return WikiExtractorReader(root)
    if kind == "jsonl":
        return JsonReader(root, options.text_column)
    if kind == "parquet":
        return ParquetReader(root, options.text_column)
    if kind == "datasets":
        return DatasetReader(root, options.text_column, options.split)
    rule = document_rule(root, options.documents)
    if rule == "jsonl":
        raise ConfigError(f"--input {root}: --documents jsonl is --format jsonl")
    return TextReader(root, rule)


def _refuse_overlap(roots: Sequence[Path]) -> None:
    resolved = [root.resolve() for root in roots]
    for number, root in enumerate(resolved):
        for other in resolved[number + 1 :]:
            if root == other or root in other.parents or other in root.parents:
                raise ConfigError(f"--input {root} and {other} overlap: documents would come twice; for copies use --weight")


# -------------------------------------------------------------------------------------------------------------- the work


def copies_of(identifier: str, weight: float, seed: int) -> int:
    """How many times a document of a source with ``weight`` is written; the mean over documents is ``weight``."""
    whole = math.floor(weight)
    share = weight - whole
    if not share:
        return whole
    value = int.from_bytes(hashlib.sha256(f"{seed}\n{identifier}".encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return whole + (value < share * 2.0**64)


@dataclasses.dataclass(frozen=True)
class ExtractWorker:
    """Writes the documents of one payload as JSON lines."""

    sources: tuple[Source, ...]
    seed: int

    def __call__(self, payload: Payload, output: IO[str]) -> Mapping[str, int]:
        """Counts: ``documents_in`` + ``copies`` = ``documents_out`` + every ``rejected_*``."""
        source = self._source(payload.file if isinstance(payload, (Batch, Rows)) else payload[0].file)
        counts = dict.fromkeys(("documents_in", "documents_out", "copies", "paragraphs", "characters", "control_characters_removed"), 0)
        for item in source.reader.items(payload):
            counts["documents_in"] += 1
            paragraphs, removed = _without_control_characters(item.paragraphs)
            counts["control_characters_removed"] += removed
            reason = item.reason or ("" if paragraphs else "empty")
            identifier = f"{source.name}/{printable_name(item.name)}"
            copies = copies_of(identifier, source.weight, self.seed) if not reason else 0
            if not copies:
                reason = f"rejected_{reason or 'weight'}"
                counts[reason] = counts.get(reason, 0) + 1
                continue
            counts["copies"] += copies - 1
            counts["documents_out"] += copies
            counts["paragraphs"] += copies * len(paragraphs)
            counts["characters"] += copies * sum(len(text) - text.count(" ") for text in paragraphs)
            for copy in range(1, copies + 1):
                row = {"id": identifier if copy == 1 else f"{identifier}#copy{copy}", "text": "\n".join(paragraphs)}
                if item.title:
                    row["title"] = item.title
                row["source"] = source.name
                output.write(json.dumps(row, ensure_ascii=False) + "\n")
        return counts

    def _source(self, file: Path) -> Source:
        roots = {source.root: source for source in self.sources}
        return next(roots[path] for path in (file, *file.parents) if path in roots)


def _without_control_characters(paragraphs: list[str]) -> tuple[list[str], int]:
    removed = 0
    found = []
    for text in paragraphs:
        if _CONTROL.search(text) is not None:
            text, number = _CONTROL.subn("", text)
            text = single_spaces(text)
            removed += number
        if text:
            found.append(text)
    return found, removed


def _place(source: Source, payload: Payload) -> str:
    """What identifiers are made of beside the bytes: files and offsets. Pages and rows of a library have numbers of their own."""
    if isinstance(payload, (Batch, Rows)) or isinstance(source.reader, MediaWikiReader):
        return ""
    return sha256_json([[span.file.relative_to(parent_of(source.root)).as_posix(), span.start] for span in payload])


def _tasks(sources: Iterable[Source], piped: Iterator[Batch]) -> Iterator[Task]:
    for source in sources:
        payloads = piped if str(source.root) == STDIN else source.reader.payloads()
        for number, payload in enumerate(payloads):
            digest = payload.digest() if isinstance(payload, (Batch, Rows)) else None
            yield Task(part_name(source.name, number, ".jsonl"), payload, digest, _place(source, payload))


def extract(options: ExtractOptions) -> StageResult:
    """Run the stage. Raises :class:`ConfigError` and :class:`DataError`; finished parts are kept for the next run."""
    sources, piped = find_sources(options)
    worker = ExtractWorker(tuple(sources), options.seed)
    given = {"sources": [source.describe() for source in sources], "seed": options.seed}
    result = run_stage("extract", Path(options.output_dir), _tasks(sources, piped), worker, given, options.processes)
    rejected = sum(value for name, value in result.counts.items() if name.startswith("rejected_"))
    counts = result.counts
    assert not counts or counts["documents_in"] + counts["copies"] == counts["documents_out"] + rejected, counts
    if not counts.get("documents_out"):
        reasons = ", ".join(f"{value} {name.removeprefix('rejected_')}" for name, value in counts.items() if name.startswith("rejected_"))
        raise DataError(f"{', '.join(options.inputs)}: no document with text ({reasons or 'nothing was read'})")
    return result
