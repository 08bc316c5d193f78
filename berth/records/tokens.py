"""A shard as one flat array of token ids, on disk.

In: text files (one sentence a line, blank lines between documents) and a vocabulary. Out: :class:`TokenText`.

Most words have been seen before, so each distinct word goes through the tokenizer once and the text is then a look-up: many
times faster than tokenising line by line, with equal result (BERT splits at white space before anything else, so words do
not influence each other). New words are tokenised together, one on a line, and cut apart again at the line ends, which saves
the tokenizer's cost per call (looking up words that are whole pieces in Python beforehand saves nothing more). A block of
text becomes one array of word numbers in which line ends are word 0; sentences and documents are then found by array
operations. Ids take 2 bytes for vocabularies up to 65,536 pieces.

Memory does not grow with the text: tokens and sentence edges go to :class:`berth.records.spool.Spool`, and the table of known
words is emptied when it is full, which costs time but changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, normalizers

from berth.errors import DataError
from berth.records.spool import Mapped, Spool
from berth.text.lines import read_pieces
from berth.text.tokenizer import drop_controls, load_tokenizer
from berth.text.vocabulary import Vocabulary

MOST_WORDS, MOST_CHARACTERS = 200_000, 8 << 20  # distinct words known at a time, and their characters together
_ENCODE_BATCH = 4000
_LINE_END = "\0"  # stands for a line end among the words; BERT deletes this character, so no word has it
_SPLITTING_CONTROLS = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"


@dataclasses.dataclass(frozen=True)
class TokenText:
    """Documents as token ids, without sentences and documents that have no token.

    Attributes:
        ids: uint16 or uint32 [T], all tokens in text order.
        sentence_edges: int64 [S + 1], ascending from 0; sentence ``s`` is ``ids[sentence_edges[s]:sentence_edges[s + 1]]``.
        document_edges: int64 [D + 1], ascending from 0, in sentences.
        empty_sentences, empty_documents: how many were left out.
        unknown: tokens that are ``[UNK]``.
        maps: what holds ``ids`` and ``sentence_edges``.
    """

    ids: NDArray[np.unsignedinteger]
    sentence_edges: NDArray[np.int64]
    document_edges: NDArray[np.int64]
    empty_sentences: int
    empty_documents: int
    unknown: int = 0
    maps: tuple[Mapped, ...] = ()

    @property
    def documents(self) -> int:
        return len(self.document_edges) - 1

    @property
    def sentences(self) -> int:
        return len(self.sentence_edges) - 1

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def document_tokens(self) -> NDArray[np.int64]:
        """int64 [D + 1]: edges of the documents in tokens."""
        return self.sentence_edges[self.document_edges]

    def release(self) -> None:
        """Give memory back that reading has made resident."""
        for mapped in self.maps:
            mapped.release()


class _WordNumbers(dict[str, int]):
    """Word -> number in order of first sight, 0 for a line end; new words are also kept in ``new`` until they are tokenised."""

    def __init__(self) -> None:
        super().__init__({_LINE_END: 0})
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        self.new.append(word)
        return number


class _Words:
    """The known words and their pieces: turns text into word numbers and word numbers into token ids."""

    def __init__(self, vocabulary: Vocabulary, lowercase: bool) -> None:
        self.dtype = np.uint16 if vocabulary.size <= 1 << 16 else np.uint32
        self.vocabulary, self.lowercase = vocabulary, lowercase
        # one word a line: the tokenizer sees the line end as a token of its own, before it looks at the text
        self.tokenizer = self._lines_tokenizer()
        self.separator: int = self.tokenizer.token_to_id("\n")  # type: ignore[assignment]
        # printable ASCII needs no cleaning but lower case, which str.lower does in a tenth of the time
        self.plain_tokenizer = self._lines_tokenizer()
        self.plain_tokenizer.normalizer = normalizers.Sequence([])
        self.forget()

    def _lines_tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.vocabulary, self.lowercase, special_tokens=False)
        tokenizer.add_special_tokens([AddedToken("\n", normalized=False)])
        return tokenizer

    def forget(self) -> None:
        self.numbers, self.characters = _WordNumbers(), 0
        self.lengths = np.zeros(1, np.int32)
        self.starts = np.zeros(1, np.int32)
        self.table: NDArray = np.zeros(0, self.dtype)

    def number(self, text: str) -> NDArray[np.int32]:
        """The words of ``text`` as numbers, 0 for every line end; all of them are known afterwards."""
        if len(self.numbers) > MOST_WORDS or self.characters > MOST_CHARACTERS:
            self.forget()
        words = text.replace("\n", f" {_LINE_END} ").split()
        numbers: NDArray[np.int32] = np.fromiter(map(self.numbers.__getitem__, words), np.int32, len(words))
        self._learn(self.numbers.new)
        return numbers

    def _learn(self, words: list[str]) -> None:
        """Note the pieces of ``words``, which follow the known ones, and empty the list."""
        plain = np.fromiter((word.isascii() and word.isprintable() for word in words), bool, len(words))
        lengths, starts = np.zeros(len(words), np.int32), np.zeros(len(words), np.int32)
        tables, filled = [self.table], len(self.table)
        for chosen, tokenizer in ((plain, self.plain_tokenizer), (~plain, self.tokenizer)):
            places = np.flatnonzero(chosen)
            for first in range(0, len(places), _ENCODE_BATCH):
                some = places[first : first + _ENCODE_BATCH]
                joined = "\n".join([words[place] for place in some.tolist()]) + "\n"
                self.characters += len(joined)
                if tokenizer is self.plain_tokenizer and self.lowercase:
                    joined = joined.lower()
                found: NDArray = np.array(tokenizer.encode_batch_fast([joined], add_special_tokens=False)[0].ids, np.int64)
                ends = found == self.separator
                sizes = np.diff(np.flatnonzero(ends), prepend=-1).astype(np.int32) - 1
                lengths[some], starts[some] = sizes, filled + np.cumsum(sizes) - sizes
                tables.append(found[~ends].astype(self.dtype))
                filled += len(tables[-1])
        self.lengths, self.starts = np.concatenate([self.lengths, lengths]), np.concatenate([self.starts, starts])
        self.table = np.concatenate(tables)
        words.clear()

    def expand(self, numbers: NDArray[np.int32]) -> tuple[NDArray, NDArray[np.int64]]:
        """Token ids of the words, and the position among them where each word ends."""
        lengths = self.lengths[numbers]
        ends = np.cumsum(lengths, dtype=np.int64)
        source = np.repeat(self.starts[numbers] - (ends - lengths), lengths)
        source += np.arange(len(source))
        return self.table[source], ends


class _Collector:
    """Takes text piece by piece and writes tokens, sentence edges and document edges to spools."""

    def __init__(self, words: _Words, output: Path, unknown_id: int) -> None:
        self.words, self.unknown_id = words, unknown_id
        self.ids = Spool(output, words.dtype)
        self.sentence_edges, self.document_edges = Spool(output, np.int64), Spool(output, np.int64)
        self.sentence_edges.append(np.zeros(1, np.int64))
        self.document_edges.append(np.zeros(1, np.int64))
        self.tokens = self.closed_sentences = self.unknown = 0
        self.empty_sentences = self.empty_documents = 0
        self.open_words = self.open_tokens = 0  # of the line that has not ended
        self.in_document, self.document_sentences, self.after_blank = False, 0, True

    def add(self, text: str) -> None:
        """Take one piece of text; a line may go on in the next piece."""
        numbers = self.words.number(_clean(text))
        ids, word_ends = self.words.expand(numbers)
        self.unknown += int(np.count_nonzero(ids == self.unknown_id))
        line_ends = np.flatnonzero(numbers == 0)
        tokens_before = word_ends[line_ends]
        line_tokens = np.diff(tokens_before, prepend=0)
        line_words = np.diff(line_ends, prepend=-1) - 1
        if len(line_ends):
            line_tokens[0] += self.open_tokens
            line_words[0] += self.open_words
            self.open_tokens = len(ids) - int(tokens_before[-1])
            self.open_words = len(numbers) - 1 - int(line_ends[-1])
        else:
            self.open_tokens += len(ids)
            self.open_words += len(numbers)
        self.ids.append(ids)
        if len(line_ends):
            self._add_lines(line_words > 0, line_tokens)

    def _add_lines(self, written: NDArray[np.bool_], line_tokens: NDArray[np.int64]) -> None:
        """Note the sentences and documents of finished lines: ``written`` is False for blank ones, which part documents."""
        kept = line_tokens > 0
        sentences = np.cumsum(line_tokens[kept]) + self.tokens
        self.sentence_edges.append(sentences)
        if len(sentences):
            self.tokens = int(sentences[-1])
        self.empty_sentences += int(np.count_nonzero(written & ~kept))
        begins = written & ~np.concatenate([[not self.after_blank], written[:-1]])
        self.after_blank = not written[-1]
        lines = np.flatnonzero(written)
        if not len(lines):
            return
        document = np.cumsum(begins[lines])  # 0: goes on from the piece before
        counts = np.bincount(document, kept[lines], minlength=int(document[-1]) + 1).astype(np.int64)
        counts[0] += self.document_sentences
        self._close(counts[0 if self.in_document else 1 : -1])
        self.document_sentences, self.in_document = int(counts[-1]), True

    def _close(self, sentences: NDArray[np.int64]) -> None:
        full = sentences[sentences > 0]
        self.document_edges.append(np.cumsum(full) + self.closed_sentences)
        self.closed_sentences += int(full.sum())
        self.empty_documents += len(sentences) - len(full)

    def end_file(self) -> None:
        """The end of a file ends its last line and its last document."""
        if self.open_words:
            self.add("\n")
        if self.in_document:
            self._close(np.array([self.document_sentences]))
        self.in_document, self.document_sentences, self.after_blank = False, 0, True

    def finish(self) -> TokenText:
        """Everything that was added, empty sentences and documents counted and left out."""
        ids, edges = self.ids.finish(), self.sentence_edges.finish()
        return TokenText(
            ids=ids.array,
            sentence_edges=edges.array,
            document_edges=self.document_edges.finish().array,
            empty_sentences=self.empty_sentences,
            empty_documents=self.empty_documents,
            unknown=self.unknown,
            maps=(ids, edges),
        )


def _clean(text: str) -> str:
    """``text`` without the characters that BERT deletes and ``str.split`` would split at, or that mean a line end here."""
    if _LINE_END in text:
        text = text.replace(_LINE_END, "")
    return drop_controls(text) if any(control in text for control in _SPLITTING_CONTROLS) else text


def tokenize_files(files: Sequence[Path], vocabulary: Vocabulary, lowercase: bool, output: Path | None = None) -> TokenText:
    """Tokenise ``files`` in order; the end of a file ends its last document.

    The unnamed files of the result lie beside ``output`` (default: in the system's temporary folder). Raises
    :class:`DataError` for missing files, invalid UTF-8 and for text in which no token is left; ``OSError`` on a full disk.
    """
    collector = _Collector(_Words(vocabulary, lowercase), output or Path(tempfile.gettempdir()) / "tokens", vocabulary.unk_id)
    for file in files:
        for piece in read_pieces(file):
            collector.add(piece)
        collector.end_file()
    text = collector.finish()
    if not len(text.ids):
        raise DataError(f"{files[0]}: no text in {len(files)} file(s): every line is blank or has no token")
    return text
