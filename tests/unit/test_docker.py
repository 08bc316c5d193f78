"""The Dockerfile as text, and scripts/docker with stand-ins for docker, podman and enroot that note how they were called."""

import hashlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import berth

ROOT = Path(berth.__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts" / "docker"
HOSTILE = ["two words", "quote's", 'double"quote', "$HOME", "semi;colon", "comma,colon:", "ünï", "back\\slash", "-dash", "star*"]

RECORD = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as handle:
    handle.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
{then}
"""
IMPORTS = """
with open(sys.argv[sys.argv.index("--output") + 1], "x") as handle:
    handle.write("squash " + sys.argv[-1])
"""


class Tools:
    """A PATH with stand-ins in front, and what they were called with."""

    def __init__(self, folder):
        self.bin, self.calls_file = folder / "bin", folder / "calls"
        self.bin.mkdir()

    def add(self, name, then=""):
        (self.bin / name).write_text(RECORD.format(python=sys.executable, then=then))
        (self.bin / name).chmod(0o755)

    def run(self, script, *arguments, **variables):
        environment = {**os.environ, "PATH": f"{self.bin}:/usr/bin:/bin", "CALLS": str(self.calls_file), **variables}
        return subprocess.run(
            ["bash", str(SCRIPTS / script), *map(str, arguments)],
            capture_output=True, text=True, env=environment, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def calls(self):
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()] if self.calls_file.exists() else []


@pytest.fixture
def tools(tmp_path):
    made = Tools(tmp_path)
    for engine in ("docker", "podman", "enroot"):
        made.add(engine, IMPORTS if engine == "enroot" else "")
    return made


# -- the Dockerfile -------------------------------------------------------------------------------------------------------


def instructions():
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def of(kind):
    return [rest for name, rest in instructions() if name == kind]


def test_the_base_is_pinned_by_tag_and_the_user_is_not_root():
    assert instructions()[:2] == [("ARG", "FROM_IMAGE_NAME=nvcr.io/nvidia/pytorch:26.03-py3"), ("FROM", "${FROM_IMAGE_NAME}")]
    assert "latest" not in (ROOT / "Dockerfile").read_text()
    assert of("USER") == ["bert"]
    after = [name for name, _ in instructions()][[name for name, _ in instructions()].index("USER") :]
    assert after == ["USER", "CMD"]
    assert of("WORKDIR") == ["/workspace/bert"]
    variables = dict(word.split("=", 1) for rest in of("ENV") for word in shlex.split(rest))
    assert variables == {
        "HOME": "/home/bert",
        "PIP_CONSTRAINT": "/etc/berth-constraint.txt",
        "BERT_PREP_WORKING_DIR": "/workspace/bert/data",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def test_pip_neither_replaces_nor_adds_what_the_base_is_for():
    installs = [words for run in of("RUN") for words in re.findall(r"pip install ([^&]*)", run)]
    assert [words.split() for words in installs] == [
        "--no-cache-dir --only-binary :all: --constraint /etc/berth-constraint.txt --requirement /etc/berth-requirements.txt".split(),
        "--no-cache-dir --no-deps --no-build-isolation --editable .".split(),
    ]
    names = {line.split("==")[0] for line in (SCRIPTS / "requirements.txt").read_text().splitlines() if not line.startswith("#")}
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = set(re.findall(r"^([A-Za-z0-9-]+)", config["options"]["install_requires"], re.M))
    assert needed - names == {"torch", "numpy", "tensorboard"} and not names - needed


def test_pins_give_way_to_what_the_base_has(tmp_path):
    """The RUN line's own awk and sed, with a base that has two of the packages under other spellings."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/berth-constraint.txt").write_text("PyYAML==6.0.1\nh5py==3.12.1\nhuggingface_hub==0.1\ntorch==2.11.0a0+a6.nv26.03\n")
    run = next(rest for rest in of("RUN") if "awk" in rest)
    shell = re.search(r"sed .*?berth-requirements\.txt;", run)[0].replace("/etc/", f"{tmp_path}/etc/")
    shell = shell.replace("scripts/docker", str(SCRIPTS))
    subprocess.run(["bash", "-euc", shell], check=True)
    pinned = [line for line in (SCRIPTS / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    wanted = [line.split("==")[0] if line.startswith(("pyyaml", "h5py")) else line for line in pinned]
    assert (tmp_path / "etc/berth-requirements.txt").read_text().splitlines() == wanted
    assert wanted[0] == "h5py" and all("==" in line for line in wanted[1:3])


def test_what_is_copied_exists_and_is_all_that_the_context_holds():
    sources = [word for rest in of("COPY") for word in rest.split()[:-1]]
    assert [name for name in sources if not (ROOT / name).exists()] == []
    top = sorted(name for name in sources if "/" not in name)
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*" and sorted(line[1:] for line in lines if line.startswith("!") and "/" not in line) == top
    for entry in ("run_pretraining.py", "convert_checkpoint.py", "berth", "slurm", "bert_configs"):
        assert entry in top


def test_requirements_are_checked():
    problems = runpy.run_path(str(SCRIPTS / "check_requirements.py"))["problems"]
    assert problems(["pyyaml>=6", 'nothing-of-the-kind; extra == "dev"']) == []
    found = problems(["pyyaml>=600", "nothing-of-the-kind>=1"])
    assert re.fullmatch(r"pyyaml>=600 is needed, 6\.[0-9.]+ is installed", found[0])
    assert found[1:] == ["nothing-of-the-kind>=1 is not installed"]


# -- build and launch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["build.sh", "launch.sh", "import.sh"])
def test_help_and_unknown_options(tools, script):
    shown = tools.run(script, "--help")
    assert shown.returncode == 0 and f"scripts/docker/{script}" in shown.stdout and "DRY_RUN=1" in shown.stdout
    assert "set -euo" not in shown.stdout
    refused = tools.run(script, "--nonsense")
    assert refused.returncode == 2 and "'--nonsense'; see --help" in refused.stderr
    assert tools.calls == []


def test_build(tools):
    done = tools.run("build.sh", "--tag", "site/berth:1", "--base", "mirror.site:5000/pytorch:26.03-py3", "--", "--pull", "--label", "a b")
    assert done.returncode == 0, done.stderr
    (call,) = tools.calls
    revision = [word for word in call if word.startswith("GIT_REVISION=")]
    assert all(re.fullmatch(r"GIT_REVISION=[0-9a-f]{40}(-dirty)?", word) for word in revision)
    assert [word for word in call if word not in revision] == [
        "docker", "build", "--file", f"{ROOT}/Dockerfile", "--tag", "site/berth:1", "--build-arg",
        "FROM_IMAGE_NAME=mirror.site:5000/pytorch:26.03-py3", *(["--build-arg"] if revision else []), "--pull", "--label", "a b", str(ROOT),
    ]  # fmt: skip


def test_build_chooses_an_engine_and_a_tag(tools):
    (tools.bin / "docker").unlink()
    assert tools.run("build.sh").returncode == 0
    assert tools.calls[0][:6] == ["podman", "build", "--file", f"{ROOT}/Dockerfile", "--tag", f"berth:{berth.__version__}"]
    dry = tools.run("build.sh", "--tag", "it's:1", "--engine", "podman", DRY_RUN="1")
    assert shlex.split(dry.stdout)[:6] == ["podman", "build", "--file", f"{ROOT}/Dockerfile", "--tag", "it's:1"]
    assert len(tools.calls) == 1
    (tools.bin / "podman").unlink()
    missing = tools.run("build.sh", PATH=f"{tools.bin}:{ROOT}/nowhere:/usr/bin:/bin")
    assert missing.returncode == 1 and missing.stderr == "error: neither docker nor podman is installed here\n"
    assert tools.run("build.sh", "--engine", "podman").stderr == "error: podman is not installed here\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "nvcr.io/nvidia/pytorch:latest"], "the tag latest names another image tomorrow"),
        (["--base", "mirror:5000/pytorch"], "has no tag"),
        (["--tag", "berth:latest"], "--tag 'berth:latest'"),
        (["--tag"], "--tag needs a value"),
        (["--engine", "rkt"], "--engine must be docker or podman, not 'rkt'"),
    ],
)
def test_build_refuses(tools, arguments, message):
    refused = tools.run("build.sh", *arguments)
    assert refused.returncode == 2 and message in refused.stderr
    assert tools.calls == []


def test_launch(tools, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    done = tools.run("launch.sh", "--results", results, "--gpus", "0,1", "--mount", f"{tmp_path}:/in:ro", "--", "python", "a b", "$x")
    assert done.returncode == 0, done.stderr
    user = f"{os.getuid()}:{os.getgid()}"
    assert tools.calls == [
        ["docker", "run", "--rm", "--init", "--shm-size", "8g", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864", "--user", user,
         "--gpus", '"device=0,1"', "--mount", f"type=bind,source={results},target=/workspace/bert/results",
         "--mount", f"type=bind,source={tmp_path},target=/in,readonly", f"berth:{berth.__version__}", "python", "a b", "$x"],
    ]  # fmt: skip


def test_launch_with_podman(tools, tmp_path):
    done = tools.run("launch.sh", "--engine", "podman", "--image", "other:2", "--shm", "1g", "--gpus", "3,4")
    assert done.returncode == 0, done.stderr
    assert tools.run("launch.sh", "--engine", "podman", "--gpus", "none").returncode == 0
    common = ["--ulimit", "memlock=-1", "--ulimit", "stack=67108864", "--userns", "keep-id"]
    assert tools.calls == [
        ["podman", "run", "--rm", "--init", "--shm-size", "1g", *common, "--device", "nvidia.com/gpu=3", "--device", "nvidia.com/gpu=4", "other:2", "bash"],
        ["podman", "run", "--rm", "--init", "--shm-size", "8g", *common, f"berth:{berth.__version__}", "bash"],
    ]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_launch_mounts_any_folder(tools, tmp_path, name):
    """The engine reads --mount as CSV: what a CSV reader makes of it must be the folder."""
    import csv

    folder = tmp_path / name
    folder.mkdir()
    for how in (["--data", folder], ["--mount", f"{folder}:/workspace/bert/data/work"]):
        assert tools.run("launch.sh", *how).returncode == 0
    for call in tools.calls:
        (fields,) = csv.reader([call[call.index("--mount") + 1]])
        assert fields == ["type=bind", f"source={folder}", "target=/workspace/bert/data/work"]
    dry = tools.run("launch.sh", "--data", folder, DRY_RUN="1")
    assert shlex.split(dry.stdout) == tools.calls[0] and len(tools.calls) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0,"], "--gpus must be all, none or a list"),
        (["--gpus", "all;id"], "--gpus must be all, none or a list"),
        (["--data", "/no/such folder"], "--data: there is no folder '/no/such folder'"),
        (["--mount", "nothing"], "must be SOURCE:DESTINATION[:ro]"),
        (["--mount", "/:relative"], "'relative' must be an absolute path in the container"),
        (["--results"], "--results needs a value"),
        (["python"], "the command comes after --"),
    ],
)
def test_launch_refuses(tools, arguments, message):
    refused = tools.run("launch.sh", *arguments)
    assert refused.returncode == 2 and message in refused.stderr
    assert tools.calls == []


# -- import ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "uri"),
    [
        ("nvcr.io/nvidia/pytorch:26.03-py3", "docker://nvcr.io#nvidia/pytorch:26.03-py3"),
        ("nvcr.io#nvidia/pytorch:26.03-py3", "docker://nvcr.io#nvidia/pytorch:26.03-py3"),
        ("localhost/berth:1", "docker://localhost#berth:1"),
        ("mirror:5000/a/b:1", "docker://mirror:5000#a/b:1"),
        ("library/ubuntu:24.04", "docker://library/ubuntu:24.04"),
        ("ubuntu:24.04", "docker://ubuntu:24.04"),
        ("dockerd://berth:0.1.0", "dockerd://berth:0.1.0"),
        ("podman://berth:0.1.0", "podman://berth:0.1.0"),
        ("docker://user@nvcr.io#x/$y;z:1", "docker://user@nvcr.io#x/$y;z:1"),
    ],
)
def test_import_asks_enroot(tools, tmp_path, image, uri):
    done = tools.run("import.sh", image, tmp_path / "new folder" / "berth.sqsh")
    assert done.returncode == 0, done.stderr
    ((program, *words),) = tools.calls
    assert [program, *words[:2], words[3]] == ["enroot", "import", "--output", uri]
    assert re.fullmatch(re.escape(f"{tmp_path}/new folder/.berth.sqsh.") + r".+\.\d+\.partial", words[2])


@pytest.mark.parametrize("name", HOSTILE)
def test_import_makes_file_and_sum(tools, tmp_path, name):
    target = tmp_path / name / f"{name}.sqsh"
    done = tools.run("import.sh", "berth:1", target)
    assert done.returncode == 0, done.stderr
    assert target.read_text() == "squash docker://berth:1"
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    assert Path(f"{target}.sha256").read_text() == f"{digest}  {name}.sqsh\n"
    assert sorted(os.listdir(target.parent)) == sorted([f"{name}.sqsh", f"{name}.sqsh.sha256"])
    assert done.stderr == f"{target}, SHA-256 {digest}\n"


def test_import_never_replaces_unasked(tools, tmp_path):
    target = tmp_path / "a.sqsh"
    target.write_text("mine")
    refused = tools.run("import.sh", "berth:1", target)
    assert refused.returncode == 1 and "--force replaces it, --if-missing takes it as it is" in refused.stderr
    taken = tools.run("import.sh", "--if-missing", "berth:1", target)
    assert taken.returncode == 0 and tools.calls == [] and target.read_text() == "mine"
    assert Path(f"{target}.sha256").read_text().split() == [hashlib.sha256(b"mine").hexdigest(), "a.sqsh"]
    assert tools.run("import.sh", "--force", "berth:1", target).returncode == 0
    assert target.read_text() == "squash docker://berth:1"
    assert Path(f"{target}.sha256").read_text().split()[0] == hashlib.sha256(target.read_bytes()).hexdigest()


def test_import_failing_leaves_nothing(tools, tmp_path):
    tools.add("enroot", IMPORTS + "sys.exit(3)")
    target = tmp_path / "out" / "a.sqsh"
    failed = tools.run("import.sh", "berth:1", target)
    assert failed.returncode == 1 and "enroot could not import berth:1" in failed.stderr
    assert os.listdir(target.parent) == []
    (tools.bin / "enroot").unlink()
    missing = tools.run("import.sh", "berth:1", target)
    assert missing.returncode == 1 and "enroot is not installed here" in missing.stderr


def test_import_force_failing_keeps_the_old_one(tools, tmp_path):
    tools.add("enroot", IMPORTS + "sys.exit(3)")
    (tmp_path / "a.sqsh").write_text("mine")
    assert tools.run("import.sh", "--force", "berth:1", tmp_path / "a.sqsh").returncode == 1
    assert (tmp_path / "a.sqsh").read_text() == "mine"


@pytest.mark.parametrize(("option", "code"), [([], 1), (["--if-missing"], 0), (["--force"], 0)])
def test_import_when_another_was_faster(tools, tmp_path, option, code):
    """While enroot works, somebody else's file appears: it stays, with its own sum, unless --force was given."""
    target = tmp_path / "a.sqsh"
    tools.add("enroot", IMPORTS + f"open({str(target)!r}, 'w').write('theirs'); open({str(target) + '.sha256'!r}, 'w').write('sum')")
    done = tools.run("import.sh", *option, "berth:1", target)
    forced = option == ["--force"]
    assert done.returncode == code
    assert target.read_text() == ("squash docker://berth:1" if forced else "theirs")
    assert (Path(f"{target}.sha256").read_text() == "sum") is not forced
    assert forced or "made by somebody else meanwhile" in done.stderr
    assert sorted(path.name for path in tmp_path.glob("*a.sqsh*")) == ["a.sqsh", "a.sqsh.sha256"]


def test_import_clears_what_a_killed_one_left(tools, tmp_path):
    host = os.uname().nodename
    dead = subprocess.Popen(["true"])
    dead.wait()
    for owner in (dead.pid, os.getpid()):
        (tmp_path / f".a.sqsh.{host}.{owner}.partial").write_text("half")
    assert tools.run("import.sh", "berth:1", tmp_path / "a.sqsh").returncode == 0
    assert [path.name for path in tmp_path.glob(".a.sqsh*")] == [f".a.sqsh.{host}.{os.getpid()}.partial"]


def test_import_dry_run_writes_nothing(tools, tmp_path):
    dry = tools.run("import.sh", "nvcr.io/x/it's:1", tmp_path / "none" / "a b.sqsh", DRY_RUN="1")
    assert dry.returncode == 0 and tools.calls == [] and not (tmp_path / "none").exists()
    words = shlex.split(dry.stdout)
    assert [*words[:3], words[4]] == ["enroot", "import", "--output", "docker://nvcr.io#x/it's:1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["berth:1"], "give an image and a file"),
        (["", "a.sqsh"], "the image has no name"),
        (["berth:1", "a.img"], "must end in .sqsh"),
        (["berth:1", "a\n.sqsh"], "holds a line break"),
        (["--force", "--if-missing", "berth:1", "a.sqsh"], "exclude one another"),
    ],
)
def test_import_refuses(tools, arguments, message):
    refused = tools.run("import.sh", *arguments)
    assert refused.returncode == 2 and message in refused.stderr
    assert tools.calls == []
