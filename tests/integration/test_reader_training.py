"""run_pretraining.py on every kind of records: dynamic masks, bins, packed rows, MLM-only rows, Parquet; and what does not fit."""

import h5py
import numpy as np
import pytest
import torch

from berth.runlog import read_records, read_steps
from tests.support import PREDICTIONS, SEQ_LENGTH, VOCAB_SIZE, launch, make_project, pretraining_arguments, run_script

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """One folder for all tests, which write to outputs of their own; no dropout, so that every cut gives the same run."""
    tmp_path = tmp_path_factory.mktemp("project")
    make_project(tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    pieces = [*SPECIALS, *(f"w{n}" for n in range(VOCAB_SIZE - 5))]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return tmp_path


def pretrain(project, output="out", expect=0, **changes):
    done = run_script("run_pretraining.py", *pretraining_arguments(project, output, **{"max_steps": 12, **changes}))
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def padded(project):
    """What a run on the padded records does."""
    pretrain(project, "padded", eval_dir=project / "records")
    return curve(project, "padded")


def curve(project, output):
    """What a step read and made of it."""
    keys = ("average_loss", "grad_norm", "first_sample", "batch_crc32")
    return {step: tuple(data[key] for key in keys) for step, data in read_steps(project / output / "dllogger.json").items()}


def arrays(path):
    with h5py.File(path) as handle:
        return {name: handle[name][:] for name in handle}


def unmasked(data):
    ids = data["input_ids"].copy()
    row, column = np.nonzero(data["masked_lm_positions"])
    ids[row, data["masked_lm_positions"][row, column]] = data["masked_lm_ids"][row, column]
    none = np.zeros_like(data["masked_lm_ids"])
    return {**data, "input_ids": ids, "masked_lm_positions": none, "masked_lm_ids": none}


def write(path, data, **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as handle:
        for name, values in data.items():
            handle.create_dataset(name, data=values, compression="gzip", shuffle=True)
        handle.attrs.update(attributes)


def convert(project, folder, change):
    """The records of the project in another form, file by file."""
    for path in sorted((project / "records").iterdir()):
        change(project / folder / path.name, arrays(path))
    return project / folder


def pack(path, data):
    mask, chosen = data["input_mask"] == 1, data["masked_lm_positions"] > 0
    packed = {
        "input_ids": data["input_ids"][mask].astype(np.uint16),
        "row_offsets": np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int64),
        "first_lengths": (mask & (data["segment_ids"] == 0)).sum(1).astype(np.int32),
        "masked_lm_positions": data["masked_lm_positions"][chosen],
        "masked_lm_ids": data["masked_lm_ids"][chosen],
        "masked_offsets": np.concatenate([[0], np.cumsum(chosen.sum(1))]).astype(np.int64),
        "next_sentence_labels": data["next_sentence_labels"],
    }
    write(path, packed, layout="packed", max_seq_length=SEQ_LENGTH, max_predictions_per_seq=PREDICTIONS)


def bins(path, data):
    lengths, low = data["input_mask"].sum(1), 0
    for high in (20, 26, 32):
        chosen = (lengths > low) & (lengths <= high)
        part = {n: v[chosen] if v.ndim == 1 or n.startswith("masked") else v[chosen][:, :high] for n, v in data.items()}
        write(path.with_name(f"{path.stem}_bin_{high}.hdf5"), part, layout="binned", bin_low=low, bin_high=high, max_seq_length=SEQ_LENGTH)
        low = high


def test_packed_records_cut_otherwise_and_sharded(project, padded):
    """Two processes, four micro-batches of two, everything sharded: the steps of one process on padded records within fp32 rounding."""
    packed = convert(project, "packed_two", pack)
    cut = {"max_steps": 12, "train_batch_size": 8, "gradient_accumulation_steps": 4}
    running = launch(project, 2, "packed_two_out", input_dir=packed, shard="zero2", **cut)
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    found = curve(project, "packed_two_out")
    assert {step: row[2:] for step, row in found.items()} == {step: row[2:] for step, row in padded.items()}
    for step, (loss, norm, *_) in padded.items():
        assert found[step][0] == pytest.approx(loss, abs=5e-6) and found[step][1] == pytest.approx(norm, rel=1e-4)
    one, two = (torch.load(project / name / "ckpt_12.pt", weights_only=True)["model"] for name in ("padded", "packed_two_out"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_packed_records_train_as_padded_ones(project, padded):
    packed = convert(project, "packed", pack)
    pretrain(project, "packed_out", input_dir=packed, eval_dir=packed)
    # all rows fit one window and one block a file, so even the order is the same
    assert curve(project, "packed_out") == padded


def test_files_of_the_nvidia_script_train(project, padded):
    """int32 and int8, gzip by h5py's defaults, no attributes; one of them as MLPerf's int16."""

    def like(path, data):
        path.parent.mkdir(exist_ok=True)
        wide = "i2" if path.stem.endswith("1") else "i4"
        with h5py.File(path, "w") as handle:
            for name, values in data.items():
                handle.create_dataset(name, data=values, dtype=wide if values.dtype == np.int32 else "i1", compression="gzip")

    folder = convert(project, "nvidia", like)
    pretrain(project, "nvidia_out", input_dir=folder, eval_dir=folder)
    assert curve(project, "nvidia_out") == padded


def train_in_ranks(project, processes, output, **changes):
    running = launch(project, processes, output, **{"max_steps": 12, **changes})
    errors = [process.communicate(timeout=200)[1] for process in running]
    assert [process.returncode for process in running] == [0] * processes, "\n".join(errors)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def test_dynamic_masks_and_bins_resume_and_scale(project):
    """Interrupted, on two processes, on two accumulations: the same masks in the same order, over three epochs."""
    options = {
        "input_dir": convert(project, "bins", bins), "dynamic_masking": True, "vocab_file": project / "vocab.txt", "train_batch_size": 24,
        "gradient_accumulation_steps": 3, "max_steps": 20,
    }  # fmt: skip
    pretrain(project, "whole", **options)
    pretrain(project, "parts", **options, steps_this_run=8)
    pretrain(project, "parts", **options, resume_from_checkpoint=True)
    assert curve(project, "whole") == curve(project, "parts")
    train_in_ranks(project, 2, "two", **{**options, "train_batch_size": 12, "gradient_accumulation_steps": 2})
    a, b = weights(project / "whole" / "ckpt_20.pt"), weights(project / "two" / "ckpt_20.pt")
    assert all(torch.allclose(a[name], b[name], atol=2e-5) for name in a)
    # another rule of masking or another batch is another run
    changed = {**options, "masked_lm_prob": 0.3, "train_batch_size": 12}
    done = pretrain(project, "parts", expect=2, **changed, resume_from_checkpoint=True)
    assert "the training records changed" in done.stderr and "global_batch was 24, is 12" in done.stderr


def test_records_without_masks(project):
    bare = convert(project, "bare", lambda path, data: write(path, unmasked(data), masking="none", masked_lm_prob=0.15))
    done = pretrain(project, "refused", expect=1, input_dir=bare)
    assert "hold no masks" in done.stderr and "--dynamic_masking" in done.stderr and not (project / "refused").exists()
    options = {"dynamic_masking": True, "vocab_file": project / "vocab.txt"}
    scores = []
    for output, changes in (("bare_out", {"input_dir": bare}), ("masked_out", {"masked_lm_prob": 0.15})):
        pretrain(project, output, eval_dir=bare, **changes, **options)
        records = read_records(project / output / "dllogger.json")
        scores.append([r["data"]["mlm_loss"] for r in records if "evaluation" in r.get("data", {})])
    assert curve(project, "bare_out") == curve(project, "masked_out")
    assert len(scores[0]) == 2 and scores[0] == scores[1], "the masks of the held-out shard are always the same"
    done = pretrain(project, "refused", expect=1, eval_dir=bare)
    assert "hold no masks; give --vocab_file" in done.stderr


def test_mlm_only_records_have_no_next_sentence(project):
    def chunks(path, data):
        segments = np.zeros_like(data["segment_ids"])
        write(path, {**data, "segment_ids": segments, "next_sentence_labels": np.zeros(len(segments), np.int8)}, objective="mlm")

    folder = convert(project, "mlm", chunks)
    done = pretrain(project, "mlm_out", input_dir=folder, eval_dir=folder)
    assert "no sentence pairs" in done.stderr and "nsp" not in done.stderr.lower()
    said = [record.get("data", {}) for record in read_records(project / "mlm_out" / "dllogger.json")]
    assert not {key for data in said for key in data if key.startswith("nsp")} and any("mlm_loss" in data for data in said)
    assert not any("seq_relationship" in name for name in weights(project / "mlm_out" / "ckpt_12.pt"))
    done = pretrain(project, "refused", expect=1, eval_dir=folder)
    assert "no sentence pairs" in done.stderr


def test_parquet_of_lddl(project):
    pyarrow = pytest.importorskip("pyarrow", reason="reading LDDL's files needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading LDDL's files needs pyarrow")
    pieces = np.array((project / "vocab.txt").read_text(encoding="utf-8").split(), object)

    def pairs(path, data):
        data = unmasked(data)
        lengths = data["input_mask"].sum(1)
        first_b = lengths - data["segment_ids"].sum(1)
        path.parent.mkdir(exist_ok=True)
        table = {
            "A": [" ".join(pieces[row[1 : b - 1]]) for row, b in zip(data["input_ids"], first_b, strict=True)],
            "B": [" ".join(pieces[row[b : end - 1]]) for row, b, end in zip(data["input_ids"], first_b, lengths, strict=True)],
            "is_random_next": data["next_sentence_labels"].astype(bool),
            "num_tokens": lengths.astype(np.uint16),
        }
        parquet.write_table(pyarrow.table(table), path.with_suffix(".parquet"))

    folder = convert(project, "lddl", pairs)
    options = {"vocab_file": project / "vocab.txt", "max_seq_length": SEQ_LENGTH, "max_predictions_per_seq": 5}
    pretrain(project, "lddl_out", input_dir=folder, eval_dir=folder, **options)
    pretrain(project, "hdf5_out", dynamic_masking=True, eval_dir=folder, **options)
    assert curve(project, "lddl_out") == curve(project, "hdf5_out")
    done = pretrain(project, "refused", expect=2, input_dir=folder)
    assert "--vocab_file" in done.stderr


def test_options_of_dynamic_masking(project):
    done = pretrain(project, "refused", expect=2, dynamic_masking=True, masked_lm_prob=1.5)
    assert "--dynamic_masking needs --vocab_file" in done.stderr and "--masked_lm_prob is 1.5" in done.stderr
    done = pretrain(project, "refused", expect=2, masked_lm_prob=0.2)
    assert "--masked_lm_prob belongs to --dynamic_masking" in done.stderr
    options = {"whole_word_mask": True, "vocab_file": project / "vocab.txt", "max_predictions_per_seq": 3}
    pretrain(project, "words", dynamic_masking=True, max_steps=2, **options)
    with_options = [r for r in read_records(project / "words" / "dllogger.json") if "dynamic_masking" in r.get("data", {})]
    assert with_options[0]["data"]["dynamic_masking"] == {"masked_lm_prob": 0.15, "max_predictions_per_seq": 3, "whole_word_mask": True}
