"""The launcher runs on a login node: none of its modules pulls in what only compute nodes have."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import berth.launch
from tests.support import ROOT, environment

HEAVY = ["torch", "numpy", "h5py", "transformers", "tokenizers", "submitit", "matplotlib", "berth.training", "berth.records", "modeling"]
MODULES = sorted(module.name for module in pkgutil.iter_modules(berth.launch.__path__, "berth.launch."))


def imported(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"], capture_output=True, text=True, cwd=ROOT,
        env=environment(), check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_no_module_needs_more_than_python_and_yaml() -> None:
    """Every module at once, from Python without site packages but PyYAML's."""
    found = imported("\n".join(f"import {name}" for name in MODULES))
    assert {"berth.launch.plan", "berth.launch.variables", *MODULES} <= set(found)
    assert [name for name in found if any(name == heavy or name.startswith(heavy + ".") for heavy in HEAVY)] == []


def test_what_every_task_imports_is_the_standard_library_alone() -> None:
    found = imported("import berth.launch.rank, berth.launch.spawn")
    assert [name for name in found if name.split(".")[0] == "yaml"] == []


def test_a_command_imports_nothing_heavy_either() -> None:
    code = (
        "from berth.launch.command_line import main\nimport contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()): main(['list'])"
    )
    found = imported(code)
    assert "berth.launch.matrix" in found
    assert [name for name in found if any(name == heavy or name.startswith(heavy + ".") for heavy in HEAVY)] == []
