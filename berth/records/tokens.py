"""A shard as one flat array of token ids.

In: text files (one sentence a line, blank lines between documents) and a vocabulary. Out: :class:`TokenText`.

Most words have been seen before, so each distinct word goes through the tokenizer once and the text is then a look-up:
five times faster than tokenising line by line, with equal result (BERT splits at white space before anything else, so
words do not influence each other). Ids take 2 bytes for vocabularies up to 65,536 pieces.
"""

from __future__ import annotations

import dataclasses
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from berth.errors import DataError
from berth.text.lines import read_blocks
from berth.text.tokenizer import drop_controls, load_tokenizer
from berth.text.vocabulary import Vocabulary

_FLUSH_WORDS = 400_000
_ENCODE_BATCH = 2000


@dataclasses.dataclass(frozen=True)
class TokenText:
    """Documents as token ids, without sentences and documents that have no token.

    Attributes:
        ids: uint16 or uint32 [T], all tokens in text order.
        sentence_edges: int64 [S + 1], ascending from 0; sentence ``s`` is ``ids[sentence_edges[s]:sentence_edges[s + 1]]``.
        document_edges: int64 [D + 1], ascending from 0, in sentences.
        empty_sentences, empty_documents: how many were left out.
    """

    ids: NDArray[np.unsignedinteger]
    sentence_edges: NDArray[np.int64]
    document_edges: NDArray[np.int64]
    empty_sentences: int
    empty_documents: int

    @property
    def documents(self) -> int:
        return len(self.document_edges) - 1

    @property
    def sentences(self) -> int:
        return len(self.sentence_edges) - 1

    @functools.cached_property
    def document_tokens(self) -> NDArray[np.int64]:
        """int64 [D + 1]: edges of the documents in tokens."""
        return self.sentence_edges[self.document_edges]


class _WordIds(dict[str, int]):
    """Word -> number in order of first sight; new words are also kept in ``new`` until they are tokenised."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        self.new.append(word)
        return number


class _Expander:
    """Turns word numbers into token ids; ``lengths``/``starts``/``table`` describe the pieces of every word."""

    def __init__(self, tokenizer: Tokenizer, dtype: type) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        self.lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        self.starts: NDArray[np.int64] = np.zeros(0, np.int64)
        self.table: NDArray = np.zeros(0, dtype)

    def learn(self, words: list[str]) -> None:
        found: list[list[int]] = []
        for start in range(0, len(words), _ENCODE_BATCH):
            batch = self.tokenizer.encode_batch_fast(words[start : start + _ENCODE_BATCH], add_special_tokens=False)
            found += [encoding.ids for encoding in batch]
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        pieces: NDArray = np.fromiter((piece for ids in found for piece in ids), self.dtype, int(lengths.sum()))
        self.starts = np.concatenate([self.starts, len(self.table) + np.cumsum(lengths) - lengths])
        self.lengths = np.concatenate([self.lengths, lengths])
        self.table = np.concatenate([self.table, pieces])

    def expand(self, words: NDArray[np.int64], line_words: NDArray[np.int64]) -> tuple[NDArray, NDArray[np.int64]]:
        """Token ids of ``words``, and the tokens of each line of ``line_words`` words."""
        lengths = self.lengths[words]
        ends = np.cumsum(lengths)
        source = np.repeat(self.starts[words] - (ends - lengths), lengths) + np.arange(int(ends[-1]))
        line_ends = np.concatenate([[0], ends])[np.cumsum(line_words)]
        return self.table[source], np.diff(line_ends, prepend=0)


class _Collector:
    """Gathers lines as word numbers and turns them into token ids every few hundred thousand words."""

    def __init__(self, tokenizer: Tokenizer, dtype: type) -> None:
        self.expander = _Expander(tokenizer, dtype)
        self.word_ids = _WordIds()
        self.words, self.line_words, self.document_lines = array("q"), array("q"), array("q")
        self.tokens: list[NDArray] = [np.zeros(0, dtype)]
        self.line_tokens: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        self.open_lines = 0

    def add(self, lines: list[str]) -> None:
        """Take the lines of one block."""
        number, words, line_words = self.word_ids.__getitem__, self.words, self.line_words
        for line in lines:
            found = line.split()
            if found:
                words.extend(map(number, found))
                line_words.append(len(found))
                self.open_lines += 1
            elif self.open_lines:
                self.end_document()
        if len(words) > _FLUSH_WORDS:
            self.flush()

    def end_document(self) -> None:
        if self.open_lines:
            self.document_lines.append(self.open_lines)
            self.open_lines = 0

    def flush(self) -> None:
        if not self.words:
            return
        self.expander.learn(self.word_ids.new)
        self.word_ids.new.clear()
        ids, lengths = self.expander.expand(np.array(self.words), np.array(self.line_words))
        self.tokens.append(ids)
        self.line_tokens.append(lengths)
        del self.words[:], self.line_words[:]

    def finish(self) -> TokenText:
        """Everything collected, empty sentences and documents counted and left out."""
        self.flush()
        line_tokens = np.concatenate(self.line_tokens)
        kept = line_tokens > 0
        kept_before = np.concatenate([[0], np.cumsum(kept)])
        document_ends = kept_before[np.cumsum(np.array(self.document_lines, np.int64))]
        full = np.diff(document_ends, prepend=0) > 0
        return TokenText(
            ids=np.concatenate(self.tokens),
            sentence_edges=np.concatenate([[0], np.cumsum(line_tokens[kept])]),
            document_edges=np.concatenate([[0], document_ends[full]]),
            empty_sentences=int((~kept).sum()),
            empty_documents=int((~full).sum()),
        )


def tokenize_files(files: Sequence[Path], vocabulary: Vocabulary, lowercase: bool) -> TokenText:
    """Tokenise ``files`` in order; the end of a file ends its last document.

    Raises :class:`DataError` for missing files, invalid UTF-8 and for text in which no token is left.
    """
    dtype = np.uint16 if vocabulary.size <= 1 << 16 else np.uint32
    collector = _Collector(load_tokenizer(vocabulary, lowercase, special_tokens=False), dtype)
    for file in files:
        for block in read_blocks(file):
            collector.add(drop_controls(block).removesuffix("\n").split("\n"))
        collector.end_document()
    text = collector.finish()
    if not len(text.ids):
        raise DataError(f"{files[0]}: no text in {len(files)} file(s): every line is blank or has no token")
    return text
