"""Containers for tests on the local cluster: ``minibox.c``, the stand-in for Pyxis, compiled, and an image to enter.

The image is a folder with a root file system of its own: its own ``/etc``, its own ``/tmp``, a shell and the usual small programs,
and the Python that runs the tests with all its packages (read-only from the host, mounted inside the task only). Nothing of Slurm is
in it, as in a real image: what calls ``scontrol`` or ``srun`` there fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.localslurm import PATH

PACKAGES = "gcc libc6-dev libslurm-dev"
SOURCE = Path(__file__).with_name("minibox.c")
OS_RELEASE = 'NAME="berth test image"\nID=berth-test\nPRETTY_NAME="berth test image"\n'
SHELLS = ("bash", "sh")
SMALL_PROGRAMS = (
    "awk basename cat chmod cp cut date df dirname echo env false find free grep head hostname id kill ln ls mkdir mktemp mv nproc "
    "printenv printf ps pwd readlink realpath rm rmdir sed seq sha256sum sleep sort stat tail taskset tee test timeout touch tr true "
    "uname uniq wc which xargs"
)


def missing() -> str:
    """Why containers cannot be tested here, and what to do; "" when they can."""
    if os.getuid():
        return "only root may mount what a container needs; run the tests as root"
    probe = ["gcc", "-E", "-include", "stdio.h", "-include", "slurm/spank.h", "-x", "c", os.devnull]
    if shutil.which("gcc") is None or subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True).returncode:
        return f"gcc or the header slurm/spank.h not found; install with: apt-get install {PACKAGES}"
    return ""


def build_plugin(folder: Path) -> str:
    """Compile minibox into ``folder``; the line of plugstack.conf that loads it. Raises CalledProcessError when it is no C."""
    plugin = folder / "minibox.so"
    warnings = ("-Wall", "-Wextra", "-Wno-format-truncation")  # a path that is too long is no path, and said so
    command = ["gcc", *warnings, "-O1", "-shared", "-fPIC", "-o", str(plugin), str(SOURCE)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    for name in ("root", "names"):
        (folder / name).mkdir()
    return f"required {plugin} {folder}"


def make_image(folder: Path, environment: Mapping[str, str] | None = None) -> Path:
    """Make an image in ``folder``, with variables beside its PATH; returns it."""
    for name in ("etc", "tmp", "root", "usr/bin", "usr/lib", "usr/lib64", "var/tmp"):
        (folder / name).mkdir(parents=True)
    for name in ("tmp", "var/tmp"):
        (folder / name).chmod(0o1777)
    for name in ("bin", "lib", "lib64"):
        (folder / name).symlink_to(f"usr/{name}")
    for name in (*SHELLS, *SMALL_PROGRAMS.split()):
        if found := shutil.which(name, path=PATH):
            shutil.copy(found, folder / "usr" / "bin" / name)
    variables = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **(environment or {})}
    (folder / "etc" / "os-release").write_text(OS_RELEASE)
    (folder / "etc" / "berth-image-env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    (folder / "etc" / "berth-image-binds").write_text("".join(f"{path}\n" for path in _from_the_host(folder)))
    return folder


def _from_the_host(folder: Path) -> list[Path]:
    """What the image has of the host: libraries and Python. A Python of the system is copied: its folder has Slurm's commands."""
    libraries = [path for path in (Path("/usr/lib"), Path("/usr/lib64")) if path.is_dir()]
    interpreter = Path(sys.executable).resolve()
    if interpreter.parent == Path("/usr/bin"):
        shutil.copy(interpreter, folder / "usr" / "bin" / interpreter.name)
    prefixes = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.base_prefix).resolve()} - {Path("/usr")}
    return [*libraries, *sorted(prefixes)]
