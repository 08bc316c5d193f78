"""Documents that cannot rot: links resolve, commands name scripts and options that exist."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.support import ROOT, environment

DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if ".venv" not in path.parts and "node_modules" not in path.parts)


def blocks(path):
    """Lines of the bash blocks of a document, continuation lines joined."""
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
        yield from (line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.strip().startswith("#"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_placeholder_is_left(path):
    assert not re.findall(r"@[A-Z]+@|\bT(?:ODO|BD)\b", path.read_text(encoding="utf-8"))


def test_files_named_in_the_numerics_table_exist():
    for name in re.findall(r"`(tests/[\w/.]+)`", (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


HELP: dict[str, str] = {}


def help_of(script, *words):
    key = " ".join((script, *words))
    if key not in HELP:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *words, "--help"], capture_output=True, text=True, env=environment(), timeout=120
        )
        assert done.returncode == 0, done.stderr
        HELP[key] = done.stdout
    return HELP[key]


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "data" / "README.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_existing_scripts_and_options(path):
    seen = 0
    for line in blocks(path):
        words = shlex.split(line, comments=True)
        scripts = [word for word in words if word.endswith(".py") and (ROOT / word).exists()]
        assert scripts or not any(word.endswith(".py") for word in words), f"no such script: {line}"
        for script in scripts[:1]:
            arguments = words[words.index(script) + 1 :]
            text = help_of(script, *[word for word in arguments[:1] if not word.startswith("-")])
            for flag in (word for word in arguments if word.startswith("--")):
                assert re.search(rf"{flag}\b", text), f"{script} has no {flag}: {line}"
            seen += 1
    assert seen >= 4


def test_make_targets_named_in_documents_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in DOCUMENTS:
        for line in blocks(path):
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                assert words[1] in targets, line


@pytest.mark.slow
def test_the_step_by_step_commands_run_as_written(tmp_path):
    """README's commands, copied, on a small text; only the numbers of steps are cut down."""
    from tests.integration.test_quickstart import write_corpus

    for name in ("data", "bert_configs", "berth"):
        (tmp_path / name).symlink_to(ROOT / name)
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "my_texts").mkdir()
    for number in range(8):
        write_corpus(tmp_path / "my_texts" / f"{number}.txt", documents=1, seed=number)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    chapter = text[text.index("## Step by step") : text.index("The recipe of the published")]
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", chapter, re.S)).replace("source .venv/bin/activate\n", "")
    commands = re.sub(r"--max_steps \d+", "--max_steps 3", commands)
    variables = {**environment(), "PATH": f"{sys.exec_prefix}/bin:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, capture_output=True, text=True, env=variables, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (tmp_path / "work" / "results" / "ckpt_6.pt").exists() and (tmp_path / "work" / "huggingface" / "model.safetensors").exists()
    assert "'score'" in done.stdout
