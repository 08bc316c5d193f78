"""Properties of whole records files, on texts in which every word says where it stands: ``d<document>s<sentence>w<word>``.

Everything goes the way of a user's text: shard and vocabulary on disk, tokenizer, pairs, masks, hdf5; the files are read back with h5py and
the masks undone. A word's id is its place in the text, so a row tells which tokens it holds and whether B really follows A.

What can be proved of a row of ``[CLS] A [SEP] B [SEP]`` (``room`` = max_seq_length - 3):

* A and B are runs of the text, each inside one document; A and B have ``room`` tokens at most, and only rows with exactly ``room`` were cut.
* label 0: B is from A's document and follows A; directly, unless the row was cut (at A's end or B's beginning).
* label 1: B is from another document; it begins with a sentence, unless the row was cut.
* one copy, no short rows: the rows of a document, in the order of A, use it from its beginning to its end, no token twice; a token
  that no row holds was cut from a full row that ends or begins beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from berth.records.create import plan_file, run_job
from berth.records.options import RecordOptions
from berth.records.validate import validate_records
from berth.text.vocabulary import SPECIAL_TOKENS, Vocabulary
from tests.support import ROOT, environment

FIRST_WORD = len(SPECIAL_TOKENS)
NO_TOKEN = "\u200d"  # a character that BERT deletes: a sentence without a token


@dataclasses.dataclass(frozen=True)
class Text:
    """A generated text. ``documents``: sentence lengths; 0 is a sentence without a token. ``document``, ``begins``: of every token."""

    documents: Sequence[Sequence[int]]
    document: np.ndarray
    begins: np.ndarray

    @staticmethod
    def of(documents: Sequence[Sequence[int]]) -> Text:
        document = [number for number, sentences in enumerate(documents) for _ in range(sum(sentences))]
        begins = [word == 0 for sentences in documents for length in sentences for word in range(length)]
        return Text(documents, np.array(document, int), np.array(begins, bool))

    @property
    def tokens(self) -> int:
        return len(self.document)

    def write(self, folder: Path, name: str = "text_training_0.txt") -> None:
        words, texts = [], []
        for document, sentences in enumerate(self.documents):
            lines = []
            for sentence, length in enumerate(sentences):
                line = [f"d{document}s{sentence}w{word}" for word in range(length)]
                words += line
                lines.append(" ".join(line) or NO_TOKEN)
            texts.append("\n".join(lines))
        (folder / name).write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *words]) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row without its masks: places in the text of A and B, the label, and how many positions were masked."""

    a: np.ndarray
    b: np.ndarray
    label: int
    masked: int

    @property
    def length(self) -> int:
        return len(self.a) + len(self.b)


def read(path: Path) -> list[Row]:
    """The rows of a padded file of sentence pairs."""
    with h5py.File(path, "r") as file:
        ids, mask, segments, positions, labels, next_labels = (
            file[name][:]
            for name in ("input_ids", "input_mask", "segment_ids", "masked_lm_positions", "masked_lm_ids", "next_sentence_labels")
        )
    rows, places = np.nonzero(positions)
    ids[rows, positions[rows, places]] = labels[rows, places]
    found = []
    for row in range(len(ids)):
        used, second = int(mask[row].sum()), int(segments[row].sum())
        a, b = ids[row, 1 : used - second - 1], ids[row, used - second : used - 1]
        found.append(Row(a - FIRST_WORD, b - FIRST_WORD, int(next_labels[row]), int(np.count_nonzero(positions[row]))))
    return found


def records(text: Text, options: RecordOptions) -> list[Row]:
    """The rows that berth makes of ``text``; the file is also held against every rule of the schema."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text.write(folder)
        result = run_job(plan_file(folder / "text_training_0.txt", folder / "a.hdf5", folder / "vocab.txt", options))
        validate_records(folder / "a.hdf5", Vocabulary.load(folder / "vocab.txt"))
        empty = [sum(length == 0 for length in sentences) for sentences in text.documents]
        assert result.counts.tokens == text.tokens
        assert result.counts.empty_sentences == sum(empty)
        assert result.counts.empty_documents == sum(not any(sentences) for sentences in text.documents)
        return read(folder / "a.hdf5")


sentence_lengths = st.one_of(st.integers(1, 8), st.integers(1, 8), st.integers(0, 60))
texts = st.lists(st.lists(sentence_lengths, min_size=1, max_size=12), min_size=2, max_size=6).map(Text.of)
every_options = st.builds(
    RecordOptions,
    max_seq_length=st.integers(5, 40),
    max_predictions_per_seq=st.integers(1, 5),
    masked_lm_prob=st.sampled_from([0.05, 0.15, 0.5]),
    short_seq_prob=st.sampled_from([0.0, 0.1, 1.0]),
    dupe_factor=st.integers(1, 3),
    random_seed=st.integers(0, 1000),
)
single_copy = st.builds(
    RecordOptions,
    max_seq_length=st.integers(5, 40),
    max_predictions_per_seq=st.just(3),
    short_seq_prob=st.just(0.0),
    dupe_factor=st.just(1),
    random_seed=st.integers(0, 1000),
)
some = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@some
@given(text=texts, options=every_options)
def test_labels_are_true_and_lengths_hold(text, options):
    assume(len(set(text.document)) >= 2)
    room = options.max_seq_length - 3
    for row in records(text, options):
        assert len(row.a) >= 1 and len(row.b) >= 1 and row.length <= room
        for part in (row.a, row.b):
            assert (np.diff(part) == 1).all(), "a run of the text"
            assert part[0] >= 0 and part[-1] < text.tokens
            assert text.document[part[0]] == text.document[part[-1]], "inside one document"
        gap, same = row.b[0] - row.a[-1] - 1, text.document[row.a[0]] == text.document[row.b[0]]
        assert same == (row.label == 0)
        if row.label == 0:
            assert gap >= 0
        if row.length < room:  # not cut
            assert row.label == 1 or gap == 0
            assert row.label == 0 or text.begins[row.b[0]]


@some
@given(text=texts, options=every_options)
def test_the_number_of_masks_is_exact(text, options):
    assume(len(set(text.document)) >= 2)
    for row in records(text, options):
        wanted = max(1, round((row.length + 3) * options.masked_lm_prob))
        assert row.masked == min(options.max_predictions_per_seq, wanted, row.length)


@some
@given(text=texts, options=single_copy)
def test_no_token_is_lost_but_by_the_cut_of_a_full_row(text, options):
    assume(len(set(text.document)) >= 2)
    room = options.max_seq_length - 3
    rows = records(text, options)
    by_document: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: int(row.a[0])):
        by_document.setdefault(int(text.document[row.a[0]]), []).append(row)
    assert by_document.keys() == set(text.document.tolist()), "every document has rows"
    for number, mine in by_document.items():
        places = np.flatnonzero(text.document == number)
        # runs of the document that rows use, and whether the row was (or may have been) cut
        runs = [(part, row.length == room) for row in mine for part in ([row.a, row.b] if row.label == 0 else [row.a])]
        used = np.concatenate([part for part, _ in runs])
        assert len(np.unique(used)) == len(used), "no token twice"
        assert (np.diff(used) > 0).all(), "in the order of the text"
        begin, end = (np.array([places[0] - 1]), False), (np.array([places[-1] + 1]), False)
        for (before, before_full), (after, after_full) in itertools.pairwise([begin, *runs, end]):
            lost = after[0] - before[-1] - 1
            assert lost == 0 or before_full or after_full


@some
@given(text=texts, options=single_copy, copies=st.integers(1, 3))
def test_rows_without_pairs_hold_every_token_once_a_copy(text, options, copies):
    assume(text.tokens > 0)
    options = dataclasses.replace(options, objective="mlm", dupe_factor=copies)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text.write(folder)
        run_job(plan_file(folder / "text_training_0.txt", folder / "a.hdf5", folder / "vocab.txt", options))
        validate_records(folder / "a.hdf5", Vocabulary.load(folder / "vocab.txt"))
        held = np.concatenate([row.a for row in read_chunks(folder / "a.hdf5")])
    assert (np.bincount(held[held >= 0], minlength=text.tokens) == copies).all()


def read_chunks(path: Path) -> list[Row]:
    """The rows of a file of ``[CLS] chunk [SEP]``; a ``[SEP]`` inside is a negative place."""
    with h5py.File(path, "r") as file:
        ids, mask, positions, labels = (file[name][:] for name in ("input_ids", "input_mask", "masked_lm_positions", "masked_lm_ids"))
    rows, places = np.nonzero(positions)
    ids[rows, positions[rows, places]] = labels[rows, places]
    return [Row(ids[row, 1 : int(mask[row].sum()) - 1] - FIRST_WORD, np.zeros(0, int), 0, 0) for row in range(len(ids))]


def test_masks_are_80_10_10_and_pairs_half_and_half(tmp_path):
    """Over 40,000 masks; five standard deviations, as data/verify.py allows."""
    text = Text.of([[5 + (document + sentence) % 7 for sentence in range(60)] for document in range(12)])
    text.write(tmp_path)
    options = RecordOptions(max_seq_length=64, max_predictions_per_seq=10, dupe_factor=50)
    result = run_job(plan_file(tmp_path / "text_training_0.txt", tmp_path / "a.hdf5", tmp_path / "vocab.txt", options))
    found = validate_records(tmp_path / "a.hdf5", Vocabulary.load(tmp_path / "vocab.txt"))
    assert found.masked > 40_000
    for number, share in ((found.seen_mask, 0.8), (found.seen_kept, 0.1), (found.seen_random, 0.1)):
        assert abs(number / found.masked - share) < 5 * np.sqrt(share * (1 - share) / found.masked)
    free = found.rows - result.counts.forced_random
    assert abs(found.random_next - result.counts.forced_random - free / 2) < 5 * np.sqrt(free) / 2
    with h5py.File(tmp_path / "a.hdf5", "r") as file:  # every position is as likely as any other
        positions, used = file["masked_lm_positions"][:], file["input_mask"][:].sum(axis=1)
        segments = file["segment_ids"][:]
    full = used == 64
    inner = (used - segments.sum(axis=1) - 1)[full]
    counts = np.bincount(positions[full][positions[full] > 0], minlength=64)
    candidates = np.array([np.count_nonzero(inner != place) for place in range(64)])
    shares = counts[1:63] / candidates[1:63]
    assert counts[0] == counts[63] == 0
    expected = 10 / 61
    assert np.abs(shares - expected).max() < 5 * np.sqrt(expected * (1 - expected) / candidates[1:63].min())


# ---------------------------------------------------------------------------------- the same bytes, whatever happens


def write_shards(folder: Path, documents: int) -> None:
    (folder / "in").mkdir()
    rng = random.Random(3)
    for shard in range(6):
        text = Text.of([[rng.randint(3, 14) for _ in range(rng.randint(2, 20))] for _ in range(documents * (1 + shard % 3))])
        text.write(folder, f"in/text_training_{shard}.txt")
        if shard == 2:  # the largest
            (folder / "all.txt").write_bytes((folder / "vocab.txt").read_bytes())
    (folder / "all.txt").replace(folder / "vocab.txt")


def command(folder: Path, output: str, processes: int) -> list[str]:
    return [
        sys.executable, str(ROOT / "create_pretraining_data.py"), "--vocab_file", str(folder / "vocab.txt"), "--input_file",
        str(folder / "in"), "--output_dir", str(folder / output), "--processes", str(processes), "--max_seq_length", "48",
        "--max_predictions_per_seq", "7", "--dupe_factor", "20",
    ]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.hdf5"))}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], float]:
    """Shards, what one process makes of them, and how long that takes."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, 60)
    start = time.monotonic()
    subprocess.run(command(folder, "one", 1), check=True, env=environment(), stdout=subprocess.DEVNULL)
    return folder, digests(folder / "one"), time.monotonic() - start


@pytest.mark.parametrize("processes", [2, 3])
def test_same_bytes_for_any_number_of_processes(shards, processes):
    folder, expected, _ = shards
    subprocess.run(command(folder, f"p{processes}", processes), check=True, env=environment(), stdout=subprocess.DEVNULL)
    assert len(expected) == 6 and digests(folder / f"p{processes}") == expected


@pytest.mark.parametrize("processes", [1, 3])
def test_same_bytes_after_kills_at_random_points(shards, processes):
    """Every run is killed a little later than the one before; what stands in the folder is always whole."""
    folder, expected, seconds = shards
    output, rng, killed = f"killed{processes}", random.Random(processes), 0
    for attempt in range(6):
        process = subprocess.Popen(
            command(folder, output, processes), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(seconds * (0.2 + 0.12 * attempt) * rng.uniform(0.7, 1.3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        there = digests(folder / output)
        assert there.items() <= expected.items(), "a file that stands under its name is complete"
    assert killed >= 2
    subprocess.run(command(folder, output, processes), check=True, env=environment(), stdout=subprocess.DEVNULL)
    assert digests(folder / output) == expected
    assert not list((folder / output).glob(".*.partial")), "left-overs are removed"
