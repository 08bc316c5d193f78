"""Which records a path means, and what they say of themselves, with and without hdf5 at hand."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from berth.errors import BerthError, ConfigError, DataError
from berth.launch.inputs import Records, defaults, describe_records, kind_of, records_folder
from berth.launch.recipes import PhaseRecipe
from berth.records import reader
from tests.support import PREDICTIONS, ROOT, SEQ_LENGTH, write_records

RECIPE = PhaseRecipe(1, SEQ_LENGTH, PREDICTIONS, 10, 16, 1e-2, 0.1, "lamb", "poly", 5)
NAME = "hdf5_lower_case_1_seq_len_{}_max_pred_{}_masked_lm_prob_0.15_random_seed_12345_dupe_factor_5"


def manifest(folder: Path, parts: dict[str, int], **options: Any) -> None:
    """``records.json`` over files that are there, with their rows."""
    values = {"max_seq_length": SEQ_LENGTH, "max_predictions_per_seq": PREDICTIONS, "do_lower_case": True, "vocab_sha256": "ab", **options}
    entries = {name: {"bytes": (folder / name).stat().st_size, "counts": {"instances": rows}} for name, rows in parts.items()}
    (folder / "records.json").write_text(json.dumps({"options": values, "parts": entries}))


def empty(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


# ------------------------------------------------------------------------------------------------------ records_folder


def test_a_folder_of_records_is_itself(tmp_path: Path) -> None:
    folder = empty(tmp_path / "my 'records' $x", "a_training_0.hdf5")
    assert records_folder(folder, 512) == folder
    assert records_folder(folder / "a_training_0.hdf5", 512) == folder / "a_training_0.hdf5"
    assert records_folder(empty(tmp_path / "lddl", "part.0.parquet_64"), 128) == tmp_path / "lddl"
    assert records_folder(tmp_path / "missing", 128) == tmp_path / "missing"  # who opens it says so


def test_a_work_folder_gives_the_records_that_fit(tmp_path: Path) -> None:
    short = empty(tmp_path / "records" / NAME.format(128, 20), "text_training_0.hdf5")
    long = empty(tmp_path / "records" / NAME.format(512, 80), "text_training_0.hdf5")
    empty(tmp_path / "shards", "text_training_0.txt")
    assert records_folder(tmp_path, 128, 20) == short
    assert records_folder(str(tmp_path), 512, 80) == long
    assert records_folder(tmp_path / "records", 512) == long


def test_none_fits(tmp_path: Path) -> None:
    empty(tmp_path / "records" / NAME.format(128, 20), "text_training_0.hdf5")
    with pytest.raises(ConfigError) as caught:
        records_folder(tmp_path, 512, 80)
    assert str(caught.value) == (
        f"none of the records in {tmp_path / 'records'} has sequence length 512 and masked positions 80; make such records (python -m "
        f"data.prepare). There are:\n    {NAME.format(128, 20)}: length 128, 20 masked positions, masking static"
    )


def test_several_fit(tmp_path: Path) -> None:
    names = [NAME.format(128, 20), NAME.format(128, 20) + "_whole_word"]
    for name in names:
        empty(tmp_path / "records" / name, "text_training_0.hdf5")
    with pytest.raises(ConfigError, match=re.escape(f"have sequence length 128 ({', '.join(names)}); name the folder that is meant")):
        records_folder(tmp_path, 128)


def test_an_unfinished_work_folder(tmp_path: Path) -> None:
    (tmp_path / "records" / NAME.format(128, 20)).mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds no records yet; let data.prepare finish"):
        records_folder(tmp_path, 128)


def test_the_manifest_counts_more_than_the_name(tmp_path: Path) -> None:
    folder = empty(tmp_path / "records" / "any", "a_training_0.hdf5")
    manifest(folder, {"a_training_0.hdf5": 4}, max_seq_length=64, max_predictions_per_seq=9)
    assert records_folder(tmp_path, 64, 9) == folder
    manifest(folder, {"a_training_0.hdf5": 4}, max_seq_length=64, max_predictions_per_seq=9, masking="none")
    assert records_folder(tmp_path, 64, 5) == folder  # without masks the number means nothing


def test_files_of_other_programs_are_looked_into(tmp_path: Path) -> None:
    write_records(tmp_path / "records" / "one" / "x.hdf5", rows=3, seed=0)
    write_records(tmp_path / "records" / "two" / "x.hdf5", rows=3, seed=0, length=64)
    assert records_folder(tmp_path, SEQ_LENGTH, PREDICTIONS) == tmp_path / "records" / "one"


def test_defaults(tmp_path: Path) -> None:
    assert defaults(tmp_path) == (None, None)
    vocab = empty(tmp_path / "vocab", "vocab.txt") / "vocab.txt"
    assert defaults(tmp_path) == (None, vocab)
    (tmp_path / "vocab" / "bert_config.json").write_text("{}")
    both = (tmp_path / "vocab" / "bert_config.json", vocab)
    assert defaults(tmp_path) == defaults(tmp_path / "records") == defaults(tmp_path / "records" / "hdf5_x") == both


# ----------------------------------------------------------------------------------------------------------- describe


@pytest.mark.parametrize(
    "name",
    ["text_training_0", "text_test_12", "a_training_3_bin_64", "test_run_training_1", "training", "my-test", "testing_0", "part.0", "wiki"],
)
def test_names_mean_what_the_reader_takes_them_for(name: str) -> None:
    assert kind_of(f"{name}.hdf5") == reader.kind_of(Path(f"{name}.hdf5"))
    with pytest.raises(DataError):
        kind_of("test-training.hdf5")


def test_from_the_files(tmp_path: Path) -> None:
    for name, rows in (("t_training_0", 5), ("t_training_1", 6), ("t_test_0", 2)):
        write_records(tmp_path / f"{name}.hdf5", rows, 1, vocab_size=96, vocab_sha256="c0", do_lower_case="1", layout="padded")
    assert describe_records(tmp_path, RECIPE) == Records(
        tmp_path, SEQ_LENGTH, PREDICTIONS, 2, 11, 1, 2, vocab_sha256="c0", vocab_size=0, lowercase=True
    )


def test_from_the_manifest(tmp_path: Path) -> None:
    for name in ("t_training_0", "t_test_0"):
        write_records(tmp_path / f"{name}.hdf5", 5, 1, vocab_size=96)
    manifest(tmp_path, {"t_training_0.hdf5": 50, "t_test_0.hdf5": 7})
    assert describe_records(tmp_path, RECIPE) == Records(tmp_path, SEQ_LENGTH, PREDICTIONS, 1, 50, 1, 7, "ab", 0, True)


def test_a_manifest_that_does_not_fit_its_files(tmp_path: Path) -> None:
    for number in range(3):
        write_records(tmp_path / f"t_training_{number}.hdf5", 5, number)
    manifest(tmp_path, {f"t_training_{number}.hdf5": 5 for number in range(2)})
    (tmp_path / "t_training_0.hdf5").unlink()
    with open(tmp_path / "t_training_1.hdf5", "ab") as handle:
        handle.write(b"x")
    found = describe_records(tmp_path, RECIPE)
    size = (tmp_path / "t_training_1.hdf5").stat().st_size
    assert found.problems == (
        f"{tmp_path}/t_training_0.hdf5 is in records.json but not there; make the records again",
        f"{tmp_path}/t_training_1.hdf5 has {size} bytes, {size - 1} were written: it is damaged; make the records again",
    )
    assert found.notes == (f"{tmp_path}: 1 files are not in records.json (t_training_2.hdf5 ...); their rows were not counted",)
    assert found.rows is None


def test_different_shapes_and_vocabularies_in_one_folder(tmp_path: Path) -> None:
    write_records(tmp_path / "a.hdf5", 3, 0, vocab_sha256="1")
    write_records(tmp_path / "b.hdf5", 3, 0, length=64, vocab_sha256="2")
    problems = describe_records(tmp_path, RECIPE).problems
    assert len(problems) == 2
    assert problems[0].startswith(f"{tmp_path}/b.hdf5 holds 64 tokens") and "2 different vocabularies" in problems[1]


def test_nothing_to_train_on(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "missing", "does not exist"),
        (empty(tmp_path / "none", "readme.txt"), "holds no records"),
        (empty(tmp_path / "held out", "t_test_0.hdf5"), "holds 1 records files, none of them for training"),
    ):
        with pytest.raises(BerthError, match=message):
            describe_records(path, RECIPE)


@pytest.mark.parametrize("text", ["{", "[]", '{"options": 1, "parts": {}}', '{"parts": {}}'])
def test_a_damaged_manifest(tmp_path: Path, text: str) -> None:
    empty(tmp_path / "r", "t_training_0.hdf5")
    (tmp_path / "r" / "records.json").write_text(text)
    with pytest.raises(DataError, match=r"records\.json is damaged"):
        describe_records(tmp_path / "r", RECIPE)


def test_a_damaged_file_is_a_problem(tmp_path: Path) -> None:
    folder = empty(tmp_path / "r", "t_training_0.hdf5")
    manifest(folder, {"t_training_0.hdf5": 5})
    assert "cannot be read as hdf5" in describe_records(folder, RECIPE).problems[0]


def test_a_login_node_without_numpy_and_h5py(tmp_path: Path) -> None:
    work = tmp_path / "work"
    folder = empty(work / "records" / NAME.format(SEQ_LENGTH, PREDICTIONS), "t_training_0.hdf5", "t_test_0.hdf5")
    manifest(folder, {"t_training_0.hdf5": 50, "t_test_0.hdf5": 7})
    bare = empty(tmp_path / "bare", "t_training_0.hdf5")
    recipe = json.dumps(dataclasses.asdict(RECIPE))
    program = (
        "import sys, json\n"
        "for name in ('numpy', 'h5py', 'torch', 'pyarrow'): sys.modules[name] = None\n"
        "from berth.launch import inputs, recipes\n"
        f"recipe = recipes.PhaseRecipe(**json.loads({recipe!r}))\n"
        "for path in sys.argv[1:]:\n"
        "    found = inputs.describe_records(path, recipe)\n"
        "    print(found.rows, found.test_rows, found.seq_length, found.problems, found.notes)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, work, bare], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines() == [
        f"50 7 {SEQ_LENGTH} () ()",
        f"None None None () ('{bare}: has no records.json, and numpy is not installed here; not checked',)",
    ]
