"""Documents that cannot rot: links resolve, commands name scripts and options that exist, tables say what the code says."""

import re
import shlex
import subprocess
import sys

import pytest

from berth.launch import clusters, command_line, variables
from berth.launch.matrix import load_matrix, parse_select
from berth.launch.parser import build_parser
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


LAUNCHING = ROOT / "docs" / "launching.md"


def table(head, rows):
    """As Markdown; a `<` would begin a tag of HTML there."""
    lines = [f"| {name} | {meaning} |".replace("<", "\\<") for name, meaning in rows]
    return "\n".join([f"| {head} | what it means |", "|---|---|", *lines]) + "\n\n"


def test_the_table_of_site_keys_is_the_code():
    sections = (("", clusters.KEYS), ("container.", clusters.CONTAINER_KEYS), ("paths.", clusters.PATH_KEYS))
    rows = [(f"`{section}{key}`", meaning) for section, keys in sections for key, (_, meaning) in keys.items()]
    assert table("key", rows) in LAUNCHING.read_text(encoding="utf-8")


def test_the_table_of_variables_is_the_code():
    rows = [(" or ".join(f"`{each}`" for each in (name, *aliases)), meaning) for name, (aliases, meaning) in variables.VARIABLES.items()]
    assert table("variable", rows) in LAUNCHING.read_text(encoding="utf-8")


def launches(path):
    """The words after `python -m slurm.launch` of every such command of a document."""
    for line in blocks(path):
        words = shlex.split(line, comments=True)
        if words[:3] == ["python", "-m", "slurm.launch"]:
            yield words[3:]


@pytest.mark.parametrize("path", [ROOT / "README.md", LAUNCHING], ids=lambda path: path.name)
def test_launch_commands_parse_and_name_rows_that_exist(path):
    matrix, seen = load_matrix(), set()
    for words in launches(path):
        arguments = build_parser().parse_args(words)
        seen.add(arguments.command)
        if getattr(arguments, "row", None):
            matrix.row(arguments.row)
        if getattr(arguments, "select", None):
            assert matrix.select(**parse_select(arguments.select)), words
        if getattr(arguments, "cluster", None) not in (None, "mysite"):  # the file that section 2 copies
            clusters.load_cluster(arguments.cluster)
    assert seen >= {"list", "validate", "submit"}
    if path == LAUNCHING:
        assert seen == {"list", "plan", "validate", "render", "submit", "status", "cancel", "report", "matrix"}


def test_other_commands_of_the_walk_exist():
    """Scripts are there and know their options; `sbatch` lines set variables that run.sub reads."""
    names = {each for name, (aliases, _) in variables.VARIABLES.items() for each in (name, *aliases)}
    checked = 0
    for line in blocks(LAUNCHING):
        words = shlex.split(line, comments=True)
        if "sbatch" in words:
            assert {word.partition("=")[0] for word in words[: words.index("sbatch")]} <= names and words[-1] == "run.sub"
            checked += 1
        for script in [word for word in words if word.startswith(("scripts/", "data/", "tests/"))][:1]:
            done = subprocess.run([*interpreter(script), script, "--help"], cwd=ROOT, capture_output=True, text=True, env=environment())
            assert done.returncode == 0, f"{line}: {done.stderr}"
            for flag in (word for word in words if word.startswith("--")):
                assert flag.removeprefix("--") in done.stdout, f"{script} has no {flag}"
            checked += 1
    assert checked >= 9


def interpreter(script):
    return [sys.executable] if script.endswith(".py") else ["bash"]


def test_files_the_walk_names_exist():
    text = LAUNCHING.read_text(encoding="utf-8")
    for name in {*re.findall(r"\b((?:slurm|scripts|tests|data|berth)/[\w./-]+\.(?:py|sh|sub|ya?ml|md))", text)} - {
        "slurm/clusters/mysite.yaml"
    }:
        assert (ROOT / name).exists(), name


def test_the_first_chain_is_a_plan(tmp_path, monkeypatch, capsys):
    """The files and the command of the walk's own cluster, as printed, give the chain that is printed; its Python does, too."""
    text = LAUNCHING.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    for name, content in re.findall(r"```yaml\n# (first/\w+\.ya?ml)\n(.*?)```", text, re.S):
        (tmp_path / name).write_text(content.replace("input: ", f"input: {tmp_path}/"))  # seen from the project, where jobs run
    (tmp_path / "first" / "text.txt").write_text("Some words.\n")
    (words,) = [words for words in launches(LAUNCHING) if words[0] == "submit" and "first/rows.yml" in words]
    assert command_line.main(["validate", "--offline", *words[1:]]) == 0
    capsys.readouterr()
    assert command_line.main(["plan", *words[1:]]) == 0
    chain = capsys.readouterr().out.splitlines()
    assert len(chain) == 5 and chain[0] == f"run again in {tmp_path}/first/results/again"
    assert "\n".join(chain[1:]) in text


def test_the_python_of_the_walk_makes_the_plan_it_says(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", LAUNCHING.read_text(encoding="utf-8"), re.S)
    exec(program[: program.index("submission = ")], {})
    said = capsys.readouterr().out
    assert said.startswith("run bert-large in /lustre/berth/results/bert-large\n  phase1: dgx-a100-80g_4x8x256x8, 4 x 8 tasks")
    assert "#SBATCH --nodes=4" in said and "  export: " in said


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
