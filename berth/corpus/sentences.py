"""Documents to sentences: one sentence a line, a blank line between documents.

In: text or JSON lines (:mod:`berth.corpus.documents`). Out: one file, or a folder of parts, made by
:func:`berth.corpus.parts.run_stage`. Where sentences end is decided by a segmenter (:mod:`berth.corpus.segmenters`); the default
trains Punkt on the first two million characters of the corpus: no download on a compute node, no English model for a
Hungarian corpus, and the same bytes on every machine, whatever is installed there.

No text is lost: a sentence runs from its start to the start of the next one, so characters in = characters out, which is
checked for every part. Rejected: ``nltk.download`` (needs the network, pulls English); using an installed model without
being told to (the output would depend on the machine).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from berth.corpus.documents import document_rule, document_tasks, documents_of_spans, read_documents
from berth.corpus.parts import PART_BYTES, Span, StageResult, run_stage
from berth.corpus.segmenters import PunktSegmenter, Segmenter, choose_segmenter, sentence_blocks
from berth.errors import ConfigError
from berth.files import read_json, write_json
from berth.text.lines import check_output

STAGE = "sentences"


@dataclasses.dataclass(frozen=True)
class SentenceWorker:
    """Splits the documents of one part.

    Counts: ``documents_in`` = ``documents_out`` + ``rejected_empty``; ``paragraphs``, ``sentences``, ``characters`` (not white
    space), ``one_sentence_documents`` (they cannot give a pair for next sentence prediction).
    """

    segmenter: Segmenter
    rule: str
    join_lines: bool

    def __call__(self, payload: tuple[Span, ...], output: IO[str]) -> Mapping[str, int]:
        starts = self.segmenter.open()
        documents = empty = paragraphs = sentences = single = before = after = 0
        for document in documents_of_spans(payload, self.rule):
            found = document.paragraphs
            if not found:
                empty += 1
                continue
            if self.join_lines:
                found = [" ".join(found)]
            output.write("\n" if documents else "")
            begin = sentences
            for paragraph in found:
                before += len(paragraph) - paragraph.count(" ")
                for lines in sentence_blocks(starts, paragraph):
                    block = "\n".join(lines)
                    output.write(block + "\n")
                    sentences += len(lines)
                    after += len(block) - block.count(" ") - (len(lines) - 1)
            documents += 1
            paragraphs += len(found)
            single += sentences == begin + 1
        assert before == after, f"the segmenter lost text: {before} characters in, {after} out, {payload}"
        return {
            "documents_in": documents + empty,
            "documents_out": documents,
            "rejected_empty": empty,
            "one_sentence_documents": single,
            "paragraphs": paragraphs,
            "sentences": sentences,
            "characters": after,
        }


def model_path(output: Path) -> Path:
    """Where the parameters of Punkt are saved: ``<file>.punkt.json``, or ``punkt.json`` in a folder of parts."""
    return output.with_name(f"{output.name}.punkt.json") if output.suffix else output / "punkt.json"


def _save_model(segmenter: Segmenter, output: Path) -> None:
    if not isinstance(segmenter, PunktSegmenter):
        return
    path, value = model_path(output), segmenter.parameters.to_json()
    try:
        same = read_json(path) == value
    except (OSError, ValueError):
        same = False
    if not same:
        write_json(path, value)


def make_sentences(
    path: str | Path,
    output: str | Path,
    documents: str = "auto",
    *,
    segmenter: str = "nltk",
    model: str | None = None,
    language: str = "en",
    join_lines: bool = False,
    processes: int = 1,
    part_bytes: int = PART_BYTES,
) -> StageResult:
    """Raw text at ``path`` to sentences at ``output`` (a name with a suffix: one file, otherwise a folder of parts).

    Args:
        documents: how documents are recognised, see :mod:`berth.corpus.documents`.
        segmenter, model, language: see :func:`berth.corpus.segmenters.choose_segmenter`.
        join_lines: the paragraphs of a document are one (hard-wrapped text under the rule ``blank_line``).
        processes: of this machine; the output does not depend on it.
        part_bytes: input bytes of a part.

    Raises :class:`ConfigError` and :class:`DataError` for options and text that cannot be used; then nothing is written
    under the name of a single file.
    """
    target = Path(output)
    rule = document_rule(path, documents)
    tasks = document_tasks(path, rule, STAGE, ".txt", part_bytes)
    corpus = read_documents(path, rule)
    next(iter(corpus))  # text at all, and readable
    paragraphs = (text for found in corpus for text in found.paragraphs)
    chosen = choose_segmenter(segmenter, language, model, paragraphs)
    paragraphs.close()  # it holds the document it is in
    options: dict[str, Any] = {**chosen.identity(), "documents": rule, "join_lines": join_lines, "part_bytes": part_bytes}
    worker = SentenceWorker(chosen, rule, join_lines)
    result = run_stage(STAGE, target, tasks, worker, options, processes, total=len(tasks), separator="\n")
    _save_model(chosen, target)
    counts = result.counts
    assert counts["documents_in"] == counts["documents_out"] + counts["rejected_empty"]
    return result


def output_of(output: str | None, output_dir: str | None, inputs: str) -> Path:
    """The one of ``--output FILE`` and ``--output_dir DIR`` that was given, checked.

    Raises :class:`ConfigError`: both or none; a file name without a suffix, a folder name with one (it tells the two apart
    in a manifest); an output that is an input.
    """
    if (output is None) == (output_dir is None):
        raise ConfigError("give --output FILE (one file) or --output_dir DIR (a folder of parts), one of the two")
    if output is not None:
        if not Path(output).suffix:
            raise ConfigError(
                f"--output {output} must be a file name with a suffix, such as {output}.txt; for a folder of parts use --output_dir"
            )
        if Path(output).is_dir():
            raise ConfigError(f"--output {output} is a folder; name a file in it, or use --output_dir")
        check_output("--output", output, [inputs])
        return Path(output)
    assert output_dir is not None
    if Path(output_dir).suffix:
        raise ConfigError(f"--output_dir {output_dir}: the name must have no suffix ({Path(output_dir).suffix}); for one file use --output")
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise ConfigError(f"--output_dir {output_dir} is a file; name a folder")
    folder, source = Path(output_dir).resolve(), Path(inputs).resolve()
    if folder == source or source in folder.parents or folder in source.parents:
        raise ConfigError(
            f"--output_dir {output_dir} and --input {inputs} lie in each other: the next run would read the output as text; put it elsewhere"
        )
    return Path(output_dir)
