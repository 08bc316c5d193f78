"""YAML files of the launcher: mistakes are named with their place, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from berth.errors import ConfigError
from berth.launch.yamlfile import Table, collected, raise_problems, read_yaml, suggestion


def test_reads_what_safe_load_reads(tmp_path: Path) -> None:
    text = 'a: {1: [x, "é $HOME;\\n"], b: null}\nc: 6e-3\n'
    path = tmp_path / "strange 'name'.yml"
    path.write_text(text, encoding="utf-8")
    assert read_yaml(path) == yaml.safe_load(text) == {"a": {1: ["x", "é $HOME;\n"], "b": None}, "c": "6e-3"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: 2\na: 3\n", "{path}, line 3: the key 'a' is given twice"),
        (b"a: [1\n", "{path}, line 2: "),
        (b"a: *BERT\n", "{path}, line 1: found undefined alias"),
        (b"a: \xff\n", "{path} is not UTF-8 text: invalid start byte at byte 3"),
        (b"a: !!python/object/apply:os.system [true]\n", "{path}, line 1: could not determine a constructor"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.yml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read_yaml(path)
    assert str(raised.value).startswith(message.format(path=path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yml: No such file or directory"):
        read_yaml(tmp_path / "none.yml")


def test_a_table_notes_every_mistake() -> None:
    problems: list[str] = []
    table = Table({"name": 3, "nodes": 0, "share": "6e-3", "kind": "cudda", "list": ["a", 1], "flag": 1, "noeds": 2}, "row 7", problems)
    assert table.take("name", str) == ""
    assert table.take("nodes", int, least=1) == 0
    assert table.take("share", float) == 0.006
    assert table.take("kind", str, choices=("cuda", "cpu")) == "cudda"
    assert table.take("list", tuple, ()) == ()
    assert table.take("flag", bool, True) is True
    assert table.take("gone", int) == 0
    assert table.take("absent", float, 2.5) == 2.5
    table.close()
    assert problems == [
        "row 7: name must be text, not 3",
        "row 7: nodes must be at least 1, not 0",
        "row 7: kind 'cudda' is not known; did you mean cuda? valid: cuda, cpu",
        "row 7: list must be a list of texts, not a list",
        "row 7: flag must be true or false, not 1",
        "row 7 lacks the key gone",
        "row 7: unknown key 'noeds'; did you mean nodes? valid: name, nodes, share, kind, list, flag, gone, absent",
    ]


@pytest.mark.parametrize("value", [True, 1.5, "4", None, [4], float("nan")])
def test_only_whole_numbers_are_whole_numbers(value: object) -> None:
    problems: list[str] = []
    Table({"n": value}, "row", problems).take("n", int)
    assert len(problems) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", "1e999", True, "fast", None])
def test_numbers_are_finite(value: object) -> None:
    problems: list[str] = []
    Table({"n": value}, "row", problems).take("n", float)
    assert len(problems) == 1


def test_something_else_than_a_mapping_is_one_mistake() -> None:
    problems: list[str] = []
    table = Table(["a"], "rows, row 1", problems)
    assert table.take("name", str) == ""
    table.close()
    assert problems == ["rows, row 1 must be a mapping of keys to values, not a list"]


def test_problems_are_raised_together() -> None:
    raise_problems([])
    with pytest.raises(ConfigError, match=r"^wrong:\n  one\n  two$"):
        raise_problems(["one", "two"], "wrong:")


def test_suggestions() -> None:
    assert suggestion("lamp", ["lamb", "adamw"]) == "; did you mean lamb? valid: lamb, adamw"
    assert suggestion(7, [1, 2]) == "; valid: 1, 2"


def test_errors_for_the_user_are_collected_and_bugs_are_not() -> None:
    problems = ["first"]
    with collected(problems):
        raise ConfigError("second")
    assert problems == ["first", "second"]
    with pytest.raises(KeyError), collected(problems):
        raise KeyError("bug")


@pytest.mark.parametrize("value", [None, "x", {"a": 1}])
def test_what_should_be_a_list(value: object) -> None:
    problems: list[str] = []
    assert Table({"rows": value}, "f", problems).take("rows", list) == []
    assert [problem.partition(", not ")[0] for problem in problems] == ["f: rows must be a list"]
