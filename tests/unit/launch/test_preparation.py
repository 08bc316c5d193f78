"""The configuration of data.prepare against the recipes; the stage in a plan is tested through validation."""

from __future__ import annotations

from pathlib import Path

import pytest

from berth.errors import ConfigError
from berth.launch import preparation
from berth.launch.recipes import PhaseRecipe
from berth.prepare import PHASES

RECIPES = [
    PhaseRecipe(number, phase["max_seq_length"], phase["max_predictions_per_seq"], 10, 16, 1e-2, 0.1, "lamb", "poly", 5)
    for number, phase in enumerate(PHASES, 1)
]


def check(tmp_path: Path, text: str, recipes: list[PhaseRecipe] = RECIPES) -> tuple[list[str], list[str]]:
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "p.yaml").write_text(f"workdir: {tmp_path}/work\ninput: {tmp_path}/in\n{text}")
    return preparation.problems(tmp_path / "p.yaml", tmp_path / "work", recipes)


@pytest.mark.parametrize(
    "records",
    [
        "",
        "records: {}",
        "records: {dupe_factor: 2}",
        "records: [{max_seq_length: 128, max_predictions_per_seq: 20}, {max_seq_length: 512, max_predictions_per_seq: 80}]",
    ],
)
def test_the_lengths_fit(tmp_path: Path, records: str) -> None:
    assert check(tmp_path, records) == ([], [])


def test_one_length_is_missing(tmp_path: Path) -> None:
    (error,), notes = check(tmp_path, "records: {max_seq_length: 128, max_predictions_per_seq: 20}")
    assert notes == []
    assert error == (
        f"{tmp_path}/p.yaml: phase 2 reads records of max_seq_length 512 and max_predictions_per_seq 80, but its section records makes: 128 and 20; "
        "add them, or choose a recipe with these lengths"
    )


def test_nothing_to_prepare(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("records: {}")
    assert preparation.problems(tmp_path / "p.yaml", tmp_path / "work", [])[0] == [
        f"{tmp_path}/p.yaml: there is nothing to prepare: give input, or a download section"
    ]


def test_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        preparation.problems(tmp_path / "none.yaml", tmp_path, [])
    (tmp_path / "p.yaml").write_text("- 1")
    assert preparation.problems(tmp_path / "p.yaml", tmp_path, [])[0] == [
        f"{tmp_path}/p.yaml must hold 'name: value' pairs, the configuration of data.prepare"
    ]
