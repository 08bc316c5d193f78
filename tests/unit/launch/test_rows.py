"""The batch algebra of a row, and the errors that teach it."""

from __future__ import annotations

import pytest

from berth.errors import ConfigError
from berth.launch.matrix import load_matrix
from berth.launch.rows import Row, read_group

MATRIX = load_matrix()


def make(nodes: int, micro: int, phase: int = 1, precision: str = "fp16", **values: object) -> Row:
    return Row(MATRIX.platforms["dgx-a100-80g"], nodes, phase, precision, micro, MATRIX.recipes["lamb"], **values)


def test_what_follows_from_a_row() -> None:
    row = make(4, 256)
    assert (row.ranks, row.world_size, row.global_batch, row.train_batch_size, row.accumulation) == (8, 32, 65536, 2048, 8)
    assert (row.learning_rate, row.job_name, row.name) == (6e-3, "dgx-a100-80g_4x8x256x8", "dgx-a100-80g_4x8x256x8_fp16")
    part = make(1, 32, 2, ranks_per_node=1)
    assert (part.world_size, part.train_batch_size, part.accumulation, part.job_name) == (1, 32768, 1024, "dgx-a100-80g_1x1x32x1024")


def test_rows_compare_and_hash_by_what_they_are() -> None:
    assert make(4, 256) == make(4, 256) != make(4, 128)
    assert len({make(4, 256), make(4, 256), make(4, 128)}) == 2


@pytest.mark.parametrize(
    ("nodes", "micro", "ways"),
    [
        (4, 96, "micro-batch 64 or 128; a recipe (based_on: lamb) with global batch 64512 or 67584"),
        (3, 256, "2 or 4 nodes with micro-batch 256; a recipe (based_on: lamb) with global batch 61440 or 67584"),
        (64, 256, "micro-batch 128; 32 nodes with micro-batch 256; a recipe (based_on: lamb) with global batch 131072"),
        (3, 7, "a recipe (based_on: lamb) with global batch 65520 or 65688"),
        (100000, 1, "8192 nodes with micro-batch 1; a recipe (based_on: lamb) with global batch 800000"),
    ],
)
def test_a_row_that_does_not_come_out_even_names_the_nearest_that_does(nodes: int, micro: int, ways: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make(nodes, micro)
    world = nodes * 8
    assert str(raised.value) == (
        f"dgx-a100-80g, {nodes} nodes, phase 1, fp16, micro-batch {micro}: one forward pass of {world} ranks takes {world * micro} sequences, "
        f"which do not divide the global batch 65536 of recipe lamb; nearest that do: {ways}"
    )


def test_every_problem_of_a_row_is_named() -> None:
    with pytest.raises(ConfigError) as raised:
        Row(MATRIX.platforms["dgx1-16g"], 0, 2, "tf32", 0, MATRIX.recipes["azureml-adam"], ranks_per_node=9)
    who = "dgx1-16g, 0 nodes, phase 2, tf32, micro-batch 0: "
    assert str(raised.value).split("\n  ") == [
        who + "recipe azureml-adam has no phase 2, only 1",
        who + "dgx1-16g has no precision 'tf32'; valid: fp16, fp32",
        who + "9 ranks a node, but dgx1-16g has 8 GPUs a node",
        who + "nodes, ranks a node and micro-batch must be at least 1",
    ]


def test_a_group_shares_source_recipe_and_options() -> None:
    problems: list[str] = []
    body = {
        "source": "a table", "recipe": "tiny", "options": {"log_freq": 5, "eval_freq": 1},
        "rows": [
            {"platform": "local", "nodes": 1, "phase": 1, "precision": "fp32", "micro_batch": 4, "options": {"eval_freq": 2}, "alias": "x y"},
            {"platform": "dgx2", "nodes": 1, "phase": 1, "precision": "fp16", "micro_batch": 64, "recipe": "lamb"},
        ],
    }  # fmt: skip
    first, second = read_group(body, "c.yml: rows, group 1", MATRIX.platforms, MATRIX.recipes, problems)
    assert problems == []
    assert (first.source, first.recipe.name, first.options, first.aliases) == ("a table", "tiny", {"log_freq": 5, "eval_freq": 2}, ("x y",))
    assert (second.recipe.name, second.options, second.aliases) == ("lamb", {"log_freq": 5, "eval_freq": 1}, ())


def test_every_mistake_of_a_group_is_named() -> None:
    problems: list[str] = []
    good = {"platform": "local", "nodes": 1, "phase": 1, "precision": "fp32", "micro_batch": 4}
    lines = [{**good, "platform": "locale"}, {**good, "micro_batch": 3}, {**good, "accumulation": 4}, {**good, "options": {"sed": 1}}, 7]
    rows = read_group({"source": "s", "recipe": "tiny", "rows": [*lines, good]}, "g", MATRIX.platforms, MATRIX.recipes, problems)
    assert [row.micro_batch for row in rows] == [4]
    assert [problem[:48] for problem in problems] == [
        "g, row 1: platform 'locale' is not known; did yo",
        "g, row 2: local, 1 nodes, phase 1, fp32, micro-b",
        "g, row 3: unknown key 'accumulation'; valid: pla",
        "g, row 4: unknown option 'sed'; valid: weight_de",
        "g, row 5 must be a mapping of keys to values, no",
    ]
