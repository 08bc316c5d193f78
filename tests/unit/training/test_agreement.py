"""Ranks that would train something else are named before the first step."""

from __future__ import annotations

import datetime
import shutil

import pytest
import torch

from berth.errors import LaunchError
from berth.training.agreement import check_start, code_digest, differences
from berth.training.distributed import Communicator, Rank
from tests.support import ROOT

HOSTS = ["n01", "n01", "n02", "n02"]
ONE, OTHER = "1" * 64, "2" * 64


class Gathered(Communicator):
    """The last of several ranks, with what the others have said."""

    def __init__(self, others: list[str]) -> None:
        super().__init__(Rank(), torch.device("cpu"), datetime.timedelta(seconds=1))
        self.others, self.hosts = others, HOSTS

    def gather_texts(self, text: str) -> list[str]:
        return [*self.others, text]


def test_ranks_that_agree_say_nothing():
    facts = {"code of berth": ONE, "torch": "2.13.0"}
    assert differences([facts] * 4, HOSTS) == []
    check_start(Communicator(Rank(), torch.device("cpu"), datetime.timedelta(seconds=1)), facts)
    assert differences([{}] * 4, HOSTS) == []


def test_the_odd_rank_is_named_with_host_values_and_fix():
    facts = [{"torch": "2.13.0", "training records": ONE}] * 3 + [{"torch": "2.12.1", "training records": OTHER}]
    assert differences(facts, HOSTS) == [
        "torch: 2.12.1 on rank 3 (n02), but 2.13.0 on ranks 0, 1 and 2 (n01, n02); every node must use the same environment or container image",
        "training records: 222222222222... on rank 3 (n02), but 111111111111... on ranks 0, 1 and 2 (n01, n02); --input_dir must hold the same files "
        "on every node; copy them again, or put them on a file system that all nodes share",
    ]


def test_where_none_prevails_rank_0_is_right():
    facts = [{"x": "a"}, {"x": "a"}, {"x": "b"}, {"x": "b"}]
    assert differences(facts, HOSTS) == ["x: b on ranks 2 and 3 (n02), but a on ranks 0 and 1 (n01); make it the same on every node"]
    assert differences([{"x": "b"}, {"x": "a"}], HOSTS) == ["x: a on rank 1 (n01), but b on rank 0 (n01); make it the same on every node"]
    assert differences([{"x": "b"}, {"x": "a"}, {"x": "a"}], HOSTS)[0].startswith("x: b on rank 0 (n01), but a on ranks 1 and 2")


def test_several_that_differ_and_a_fact_that_is_missing():
    (line,) = differences([{"kernels": "apex"}, {}, {"kernels": "torch"}, {"kernels": "apex"}], HOSTS)
    assert (
        line
        == "kernels: nothing on rank 1 (n01), torch on rank 2 (n02), but apex on ranks 0 and 3 (n01, n02); make it the same on every node"
    )


def test_every_rank_raises_with_all_differences():
    mine = '{"code of berth": "old", "options": "a"}'
    theirs = '{"code of berth": "new", "options": "b"}'
    with pytest.raises(LaunchError) as caught:
        check_start(Gathered([theirs] * 3), {"code of berth": "old", "options": "a"})
    assert str(caught.value).splitlines()[0] == "the ranks do not agree on what to train:"
    assert [line.split(";")[0] for line in str(caught.value).splitlines()[1:]] == [
        "  code of berth: old on rank 3 (n02), but new on ranks 0, 1 and 2 (n01, n02)",
        "  options: a on rank 3 (n02), but b on ranks 0, 1 and 2 (n01, n02)",
    ]
    with pytest.raises(LaunchError, match="old on rank 1 "):
        check_start(Gathered([theirs, mine, theirs]), {"code of berth": "new", "options": "b"})


def test_the_digest_of_the_code(tmp_path):
    """The same wherever the project lies and whatever lies beside it; another for any change to a module, its name, or the script."""
    first, second = tmp_path / "a", tmp_path / "b" / "deep"
    for root in (first, second):
        (root / "berth" / "training").mkdir(parents=True)
        (root / "berth" / "__init__.py").write_text("")
        (root / "berth" / "training" / "step.py").write_text("x = 1\n")
        (root / "run_pretraining.py").write_text("main()\n")
    (second / "berth" / "__pycache__").mkdir()
    (second / "berth" / "__pycache__" / "step.cpython-311.pyc").write_bytes(b"\0")
    (second / "notes.py").write_text("unrelated = True\n")
    digest = code_digest(first)
    assert code_digest(second) == digest and len(digest) == 64
    changes = [
        lambda root: (root / "berth" / "training" / "step.py").write_text("x = 2\n"),
        lambda root: (root / "berth" / "training" / "step.py").rename(root / "berth" / "training" / "steps.py"),
        lambda root: (root / "run_pretraining.py").write_text("main(1)\n"),
        lambda root: (root / "modeling.py").write_text(""),
    ]
    seen = {digest}
    for number, change in enumerate(changes):
        copy = shutil.copytree(first, tmp_path / f"copy{number}")
        change(copy)
        seen.add(code_digest(copy))
    assert len(seen) == 1 + len(changes)


def test_the_digest_covers_this_project(tmp_path):
    shutil.copytree(ROOT / "berth", tmp_path / "berth", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("modeling.py", "optimization.py", "run_pretraining.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    assert code_digest(tmp_path) == code_digest()
    (tmp_path / "optimization.py").write_text("")
    assert code_digest(tmp_path) != code_digest()
