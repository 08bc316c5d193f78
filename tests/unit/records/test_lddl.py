"""Reading LDDL's Parquet: ids, segments and masks as its own loader makes them; what is wrong is named."""

import io
from types import SimpleNamespace

import numpy as np
import pytest

from berth.errors import ConfigError, DataError
from berth.records.dynamic import DynamicMasker, Masking, restored
from berth.records.reader import SampleStream, open_index
from berth.text.vocabulary import SPECIAL_TOKENS, Vocabulary
from berth.training.setup import open_training_data

pyarrow = pytest.importorskip("pyarrow", reason="reading LDDL's files needs pyarrow")
parquet = pytest.importorskip("pyarrow.parquet", reason="reading LDDL's files needs pyarrow")

PIECES = (*SPECIAL_TOKENS, *(f"w{n}" for n in range(60)), *(f"##c{n}" for n in range(31)))
VOCABULARY = Vocabulary(PIECES, "0" * 64)
SIZE = len(PIECES)


def saved(positions):
    """As LDDL stores positions: the bytes of numpy.save."""
    memory = io.BytesIO()
    np.save(memory, np.asarray(positions, np.uint16))
    return memory.getvalue()


def samples(rows, seed, masking=False, low=6, high=40):
    """Samples in the words of LDDL, and what a row must become."""
    rng = np.random.default_rng(seed)
    table = {"A": [], "B": [], "is_random_next": [], "num_tokens": []} | (
        {"masked_lm_positions": [], "masked_lm_labels": []} if masking else {}
    )
    expected = []
    for _ in range(rows):
        total = int(rng.integers(low, high + 1))
        cut = int(rng.integers(1, total - 3))
        tokens = ["[CLS]", *(PIECES[n] for n in rng.integers(5, SIZE, total - 3)), "[SEP]"]
        tokens.insert(cut + 1, "[SEP]")
        original = list(tokens)
        positions = []
        if masking:
            candidates = [at for at, token in enumerate(tokens) if token not in ("[CLS]", "[SEP]")]
            positions = sorted(rng.permutation(candidates)[: max(1, round(total * 0.15))].tolist())
            for at in positions:
                tokens[at] = "[MASK]"
            table["masked_lm_positions"].append(saved(positions))
            table["masked_lm_labels"].append(" ".join(original[at] for at in positions))
        table["A"].append(" ".join(tokens[1 : cut + 1]))
        table["B"].append(" ".join(tokens[cut + 2 : -1]))
        table["is_random_next"].append(bool(rng.integers(2)))
        table["num_tokens"].append(total)
        expected.append((tokens, cut + 2, positions, original, table["is_random_next"][-1]))
    return table, expected


TYPES = {
    "A": "string", "B": "string", "is_random_next": "bool", "num_tokens": "uint16", "masked_lm_positions": "binary", "masked_lm_labels": "string",
}  # fmt: skip


def write(path, table, row_group=150):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: pyarrow.array(values, pyarrow.type_for_alias(TYPES[name])) for name, values in table.items()}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group)


def check(rows, expected):
    for row, (tokens, first_b, positions, original, label) in enumerate(expected):
        ids = [VOCABULARY.ids[token] for token in tokens]
        width = rows.input_ids.shape[1]
        padding = [0] * (width - len(ids))
        assert rows.input_ids[row].tolist() == ids + padding
        assert rows.input_mask[row].tolist() == [1] * len(ids) + padding
        assert rows.segment_ids[row].tolist() == [0] * first_b + [1] * (len(ids) - first_b) + padding
        assert rows.next_sentence_labels[row] == label
        count = len(positions)
        assert rows.masked_lm_positions[row, :count].tolist() == positions and not rows.masked_lm_positions[row, count:].any()
        assert rows.masked_lm_ids[row, :count].tolist() == [VOCABULARY.ids[original[at]] for at in positions]


@pytest.mark.parametrize("masking", [False, True])
def test_rows_are_what_lddl_says(tmp_path, masking):
    expected = []
    for number in range(3):
        table, part = samples(200, number, masking)
        write(tmp_path / f"part.{number}.parquet", table)
        expected += part
    index = open_index(tmp_path, "training", vocabulary=VOCABULARY)
    assert (index.rows, index.seq_length, index.masked, index.objective) == (600, 40, masking, "mlm+nsp")
    check(SampleStream(index, 0, SIZE, shuffle=False).rows(0, 600), expected)
    stream = SampleStream(index, 0, SIZE, window_rows=250)
    epochs = [stream.rows(at, 600) for at in (0, 600)]
    for rows in epochs:
        assert sorted(map(bytes, restored(rows))) == sorted(map(bytes, restored(SampleStream(index, 0, SIZE, shuffle=False).rows(0, 600))))
    assert not np.array_equal(epochs[0].input_ids, epochs[1].input_ids)


def test_masks_are_drawn_for_files_without(tmp_path):
    table, expected = samples(300, 0)
    write(tmp_path / "part.0.parquet", table)
    index = open_index(tmp_path, "training", 64, vocabulary=VOCABULARY)
    rows = SampleStream(index, 0, SIZE, shuffle=False, transform=DynamicMasker(VOCABULARY, Masking(0.15, 10), 1)).rows(0, 300)
    assert rows.input_ids.shape[1] == 64
    lengths = rows.lengths()
    assert np.array_equal((rows.masked_lm_positions > 0).sum(1), [max(1, min(10, round(n * 0.15), n - 3)) for n in lengths.tolist()])
    assert [ids[:size].tolist() for ids, size in zip(restored(rows), lengths, strict=True)] == [
        [VOCABULARY.ids[token] for token in tokens] for tokens, *_ in expected
    ]


def test_bins(tmp_path):
    """part.N.parquet_B as LDDL names bins; a batch comes from one."""
    for number in range(2):
        for at, (low, high) in enumerate(((6, 16), (17, 32), (33, 48))):
            write(tmp_path / f"part.{number}.parquet_{at}", samples(130, 10 * number + at, low=low, high=high)[0])
    index = open_index(tmp_path, "training", 48, vocabulary=VOCABULARY)
    assert index.binned and index.rows == 780 and {file.length for file in index.files} == {16, 32, 48}
    stream = SampleStream(index, 0, SIZE, group=20)
    steps = [stream.rows(at, 20) for at in range(0, 780, 20)]
    kinds = [set(np.digitize(step.lengths(), (16.5, 32.5)).tolist()) for step in steps]
    assert sum(len(kind) > 1 for kind in kinds) <= 3 and set.union(*kinds) == {0, 1, 2}


def test_the_predictions_of_masked_files_are_not_known_beforehand(tmp_path):
    """LDDL's --max-predictions-per-seq is written nowhere: what the recipe says for the length is no contradiction."""
    write(tmp_path / "part.0.parquet", samples(20, 0, masking=True)[0])
    options = SimpleNamespace(
        input_dir=tmp_path, max_seq_length=None, max_predictions_per_seq=20, dynamic_masking=False, config_file="c", vocab_file="v"
    )
    config = SimpleNamespace(max_position_embeddings=64)
    index, _ = open_training_data(options, config, VOCABULARY)  # type: ignore[arg-type]
    assert index.masked and index.max_predictions != 20


def test_what_is_wrong_is_named(tmp_path):
    good, _ = samples(20, 0, masking=True)
    path = tmp_path / "part.0.parquet"

    def read(**changes):
        write(path, {**good, **changes})
        return SampleStream(open_index(tmp_path, "training", vocabulary=VOCABULARY), 0, SIZE).rows(0, 1)

    def replaced(name, row, value):
        return {name: [value if at == row else old for at, old in enumerate(good[name])]}

    read()
    for changes, message in (
        (replaced("A", 7, "w1 strange w2"), r"part.0.parquet, row 7: column A holds 'strange', which is not in the vocabulary"),
        (replaced("B", 4, ""), r"row 4: column B holds '', which"),
        (replaced("B", 9, " ".join(["w1"] * 60)), r"row 9: \d+ tokens, more than"),
        (replaced("is_random_next", 5, None), r"row 5: is_random_next is missing"),
        (replaced("masked_lm_positions", 3, saved([0])), r"row 3: masked_lm_positions is not"),
        (replaced("masked_lm_positions", 2, b"no array"), r"row 2: masked_lm_positions is no saved uint16 array"),
    ):
        with pytest.raises(DataError, match=message):
            read(**changes)
    write(path, {name: good[name] for name in ("A", "B", "num_tokens")})
    with pytest.raises(DataError, match="lacks the columns is_random_next"):
        open_index(tmp_path, "training", vocabulary=VOCABULARY)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_index(tmp_path, "training", vocabulary=VOCABULARY)


def test_folders_that_do_not_fit(tmp_path):
    write(tmp_path / "part.0.parquet", samples(20, 0)[0])
    with pytest.raises(ConfigError, match="--vocab_file"):
        open_index(tmp_path, "training")
    with pytest.raises(DataError, match="--max_seq_length is 8"):
        open_index(tmp_path, "training", 8, vocabulary=VOCABULARY)
    write(tmp_path / "part.1.parquet", samples(20, 0, masking=True)[0])
    with pytest.raises(DataError, match="must be made in one way"):
        open_index(tmp_path, "training", vocabulary=VOCABULARY)
    (tmp_path / "a.hdf5").touch()
    with pytest.raises(DataError, match="hdf5 and Parquet"):
        open_index(tmp_path, "training", vocabulary=VOCABULARY)
