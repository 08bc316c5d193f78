"""Byte-level BPE for RoBERTa-style models, the same bytes every time.

In: counted GPT-2 pre-tokens (rule ``bytes`` of :mod:`berth.text.counting`). Out: a folder with ``vocab.json``, ``merges.txt`` and
``tokenizer.json``, which ``transformers`` loads as a RoBERTa tokenizer.

Ids: ``<s> <pad> </s> <unk> <mask>`` 0-4, the 256 bytes by their GPT-2 character, then merges. The Rust trainer breaks ties by these numbers
and has no ``##`` forms to number in hash-map order, so with the alphabet given sorted nothing is left to chance. Case is kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from berth.errors import ConfigError
from berth.files import atomic_open
from berth.text.training import scale_counts, training_batches

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
FILES = ("vocab.json", "merges.txt", "tokenizer.json")
SMALLEST = len(SPECIALS) + 256


class ByteLevel(NamedTuple):
    """Pieces in id order, and the merges in theirs."""

    pieces: list[str]
    merges: list[tuple[str, str]]

    def model(self) -> models.BPE:
        """The model alone: encodes words whose bytes are written as GPT-2's characters."""
        return models.BPE({piece: number for number, piece in enumerate(self.pieces)}, self.merges)


def learn_bytelevel(words: Sequence[tuple[str, int]], vocab_size: int, min_frequency: int) -> ByteLevel:
    """Learn at most ``vocab_size`` pieces (specials and bytes included) from sorted pre-tokens with counts.

    Raises :class:`ConfigError` when ``vocab_size`` does not hold specials and bytes.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(f"--vocab_size {vocab_size} is too small: {len(SPECIALS)} special tokens and 256 bytes need {SMALLEST}")
    if min_frequency < 1:
        raise ConfigError(f"--min_frequency {min_frequency} must be at least 1")
    fed, least, _ = scale_counts(list(words), min_frequency)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=least,
        special_tokens=[AddedToken(piece, special=True) for piece in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(training_batches(fed), trainer)
    ids = learner.get_vocab()
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return ByteLevel(sorted(ids, key=lambda piece: ids[piece]), [(left, right) for left, right in merges])


def roberta_tokenizer(learnt: ByteLevel) -> Tokenizer:
    """The whole tokenizer: text in, ``<s> ... </s>`` out."""
    tokenizer = Tokenizer(learnt.model())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = {piece: number for number, piece in enumerate(learnt.pieces[: len(SPECIALS)])}
    tokenizer.add_special_tokens([AddedToken(piece, lstrip=piece == "<mask>", normalized=False) for piece in SPECIALS])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=False)
    return tokenizer


def write_bytelevel(folder: Path, learnt: ByteLevel) -> list[Path]:
    """Write the three files (each atomically; ``tokenizer.json`` last) and return their paths."""
    vocab, merges, tokenizer = paths = [folder / name for name in FILES]
    with atomic_open(vocab) as handle:
        json.dump({piece: number for number, piece in enumerate(learnt.pieces)}, handle, ensure_ascii=False)
    with atomic_open(merges) as handle:
        handle.write("#version: 0.2\n")
        handle.writelines(f"{left} {right}\n" for left, right in learnt.merges)
    with atomic_open(tokenizer) as handle:
        handle.write(roberta_tokenizer(learnt).to_str(pretty=True) + "\n")
    return paths
