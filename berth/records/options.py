"""What decides the content of a records file, checked once."""

from __future__ import annotations

import dataclasses
import math

from berth.errors import ConfigError
from berth.records.schema import records_folder_name

MIN_SEQ_LENGTH = 5  # [CLS] a [SEP] b [SEP]
MAX_SEQ_LENGTH = 1 << 15
MAX_COPIES = 1 << 16
OBJECTIVES = ("mlm+nsp", "mlm")
MASKINGS = ("static", "none")
LAYOUTS = ("padded", "binned", "packed")


@dataclasses.dataclass(frozen=True)
class RecordOptions:
    """Options of instance generation. Raises :class:`ConfigError` naming every option that is out of range.

    Attributes:
        max_seq_length: positions a row, ``[CLS]`` and two ``[SEP]`` included.
        max_predictions_per_seq: most masked positions a row.
        masked_lm_prob: share of a row's positions that is masked.
        short_seq_prob: probability, per document and copy, of a random shorter target length.
        dupe_factor: copies of the text, each with its own pairs and masks.
        random_seed: not negative.
        lowercase: lower-case the text and strip accents.
        whole_word_mask: mask whole words (a piece and its ``##`` continuations) instead of pieces.
        objective: ``mlm+nsp``, sentence pairs (:mod:`berth.records.pairs`), or ``mlm``, full chunks (:mod:`berth.records.chunks`).
        masking: ``static``, drawn once; ``none``, left to training (``--dynamic_masking``).
        layout: ``padded``, rows of ``max_seq_length``; ``binned``, one file for each range of lengths; ``packed``, no padding.
        bin_size: lengths per bin of the layout ``binned``.
    """

    max_seq_length: int = 128
    max_predictions_per_seq: int = 20
    masked_lm_prob: float = 0.15
    short_seq_prob: float = 0.1
    dupe_factor: int = 5
    random_seed: int = 12345
    lowercase: bool = True
    whole_word_mask: bool = False
    objective: str = "mlm+nsp"
    masking: str = "static"
    layout: str = "padded"
    bin_size: int = 64

    def __post_init__(self) -> None:
        wrong = []
        if not MIN_SEQ_LENGTH <= self.max_seq_length <= MAX_SEQ_LENGTH:
            wrong.append(f"--max_seq_length {self.max_seq_length} must be {MIN_SEQ_LENGTH} to {MAX_SEQ_LENGTH}")
        if not 1 <= self.max_predictions_per_seq <= self.max_seq_length:
            wrong.append(f"--max_predictions_per_seq {self.max_predictions_per_seq} must be 1 to --max_seq_length")
        if not 0 < self.masked_lm_prob < 1:
            wrong.append(f"--masked_lm_prob {self.masked_lm_prob} must be above 0 and below 1")
        if not 0 <= self.short_seq_prob <= 1:
            wrong.append(f"--short_seq_prob {self.short_seq_prob} must be 0 to 1")
        if not 1 <= self.dupe_factor <= MAX_COPIES:
            wrong.append(f"--dupe_factor {self.dupe_factor} must be 1 to {MAX_COPIES}")
        if not 0 <= self.random_seed < 1 << 63:
            wrong.append(f"--random_seed {self.random_seed} must be 0 to 2**63 - 1")
        for name, known in (("objective", OBJECTIVES), ("masking", MASKINGS), ("layout", LAYOUTS)):
            if getattr(self, name) not in known:
                wrong.append(f"--{name} {getattr(self, name)!r} must be one of {', '.join(known)}")
        if self.bin_size < 1:
            wrong.append(f"--bin_size {self.bin_size} must be at least 1")
        if self.masking == "none" and self.whole_word_mask:
            wrong.append("--do_whole_word_mask has nothing to mask with --masking none; give it to the training instead")
        if wrong:
            raise ConfigError("; ".join(wrong))

    @property
    def folder_name(self) -> str:
        """:func:`berth.records.schema.records_folder_name` of these options."""
        return records_folder_name(
            self.lowercase,
            self.max_seq_length,
            self.max_predictions_per_seq,
            self.masked_lm_prob,
            self.random_seed,
            self.dupe_factor,
        )

    @property
    def bin_edges(self) -> list[int]:
        """Upper lengths of the bins: multiples of ``bin_size`` and ``max_seq_length``; only that one without bins."""
        if self.layout != "binned":
            return [self.max_seq_length]
        return [*range(self.bin_size, self.max_seq_length, self.bin_size), self.max_seq_length]

    @property
    def wanted_predictions(self) -> int:
        """Masked positions of a full row before ``max_predictions_per_seq`` caps them (19 at 128, 77 at 512)."""
        return max(1, round(self.max_seq_length * self.masked_lm_prob))

    @property
    def rows_per_block(self) -> int:
        """Rows made at a time: memory is the same at any sequence length."""
        return max(64, min(8192, math.ceil((1 << 18) / self.max_seq_length)))
