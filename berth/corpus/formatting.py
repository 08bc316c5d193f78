"""Stage ``format``: one article a line, an empty line after each, in one file.

In: a folder (or file) of WikiExtractor output, of the JSON lines that ``data/extract.py`` writes, or of ``.txt`` files (one document a
file). Out: the classic ``<corpus>_one_article_per_line.txt``: UTF-8, LF, the lines of an article joined by single spaces.

The title: WikiExtractor's output repeats it as the first line of an article, which is dropped, as the classic scripts do; JSON lines hold
it apart, and it is not written; the first line of a ``.txt`` file is text. Articles without text are counted and not written.

The stages of berth do not need this file (JSON lines keep the paragraphs); it is for tools that do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from berth.corpus.extract import detect_format
from berth.corpus.parts import Span, StageResult, Task, part_name, run_stage
from berth.corpus.sources import JsonReader, TextReader
from berth.corpus.wikiextractor import WikiExtractorReader
from berth.errors import ConfigError, DataError
from berth.text.lines import check_output

FORMATS = ("auto", "wikiextractor", "jsonl", "txt")
Reader = WikiExtractorReader | JsonReader | TextReader


@dataclasses.dataclass(frozen=True)
class FormatWorker:
    """Writes the articles of one payload, each as a line and an empty line."""

    reader: Reader

    def __call__(self, payload: tuple[Span, ...], output: IO[str]) -> Mapping[str, int]:
        """Counts: ``documents_in`` = ``documents_out`` + ``rejected_empty``."""
        counts = dict.fromkeys(("documents_in", "documents_out", "rejected_empty", "characters"), 0)
        for item in self.reader.items(payload):
            counts["documents_in"] += 1
            if not item.paragraphs:
                counts["rejected_empty"] += 1
                continue
            counts["documents_out"] += 1
            line = " ".join(item.paragraphs)
            counts["characters"] += len(line) - line.count(" ")
            output.write(line + "\n\n")
        return counts


def open_folder(root: Path, kind: str = "auto", text_column: str = "text") -> tuple[str, Reader]:
    """What the folder holds (one of :data:`FORMATS` but ``auto``) and its reader. Raises :class:`ConfigError` and :class:`DataError`."""
    if not root.exists():
        raise DataError(f"--input_folder {root}: no such file or folder")
    if kind == "auto":
        kind = detect_format(root)
    if kind == "wikiextractor":
        return kind, WikiExtractorReader(root)
    if kind == "jsonl":
        return kind, JsonReader(root, text_column)
    if kind == "txt":
        return kind, TextReader(root, "file")
    raise ConfigError(f"--input_folder {root} is of format {kind}; extract it first: data/extract.py --input {root} --output_dir DIR")


def _tasks(reader: Reader) -> Iterator[Task]:
    for number, payload in enumerate(reader.payloads()):
        yield Task(part_name("articles", number), payload)


def format_articles(
    input_folder: str | Path, output_file: str | Path, kind: str = "auto", text_column: str = "text", processes: int = 1
) -> StageResult:
    """Run the stage.

    Raises :class:`ConfigError` for wrong options and :class:`DataError` for damaged input, invalid UTF-8 (file and byte), or no article.
    """
    output = Path(output_file)
    if not output.suffix or output.is_dir():
        raise ConfigError(f"--output_file {output} must name a file with a suffix, such as corpus_one_article_per_line.txt")
    check_output("--output_file", output, [input_folder])
    kind, reader = open_folder(Path(input_folder), kind, text_column)
    options = {"format": kind, "text_column": text_column}
    result = run_stage("format", output, _tasks(reader), FormatWorker(reader), options, processes)
    if not result.counts.get("documents_out"):
        raise DataError(f"{input_folder}: no article with text in it")
    return result
