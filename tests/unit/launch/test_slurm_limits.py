"""Partitions, accounts and limits: literal answers of Slurm's commands are parsed, and held against jobs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from berth.errors import LaunchError
from berth.launch import slurm_limits
from berth.launch.clusters import Cluster
from berth.launch.plan import Job
from berth.launch.slurm_limits import Association, Associations, PartitionInfo, SlurmProbe

SINFO = """\
batch*|up|12|idle|4:00:00|1-infinite|256|2051000|gpu:a100:8(S:0,2-3)
batch*|up|3|drained*|4:00:00|1-infinite|256|2051000|gpu:a100:8(S:0,2-3)
batch*|up|1|mixed|4:00:00|1-infinite|64|515000+|(null)
long|up|4|allocated|2-00:00:00|1-2|256|2051000|gpu:a100:8(S:0-1),nic:2
tiny|inact|1|idle~|30:00|1|8|16000|gpu:4
dead|down|4|down|infinite|1-infinite|256|2051000|gpu:8
"""


def job(**changes: object) -> Job:
    """Four nodes with eight GPUs each; ``cluster`` keys go to the profile."""
    own = {field.name for field in dataclasses.fields(Job)}
    cluster = {
        "partition": "batch",
        "gpu_request": "gres",
        "memory": "0",
        **{key: changes.pop(key) for key in list(changes) if key not in own},
    }
    values: dict[str, object] = {
        "stage": "phase1", "name": "job", "folder": "/results/run", "nodes": 4, "ranks_per_node": 8, "gpus_per_node": 8, "cpus_per_task": 16,
        "walltime_s": 4 * 3600, "steps": (), "mounts": (), "image": None, "after": None, "record": {},
    }  # fmt: skip
    return Job(**{**values, "cluster": Cluster("site", "site.yaml", **cluster), **changes})  # type: ignore[arg-type]


def found(**changes: object) -> tuple[list[str], list[str]]:
    return slurm_limits.partition_problems(job(**changes), slurm_limits.parse_sinfo(SINFO))


def test_sinfo_is_parsed_whole() -> None:
    assert slurm_limits.parse_sinfo(SINFO) == [
        PartitionInfo("batch", True, "up", 12, "idle", 14400, None, 256, 2051000, 8),
        PartitionInfo("batch", True, "up", 3, "drained*", 14400, None, 256, 2051000, 8),
        PartitionInfo("batch", True, "up", 1, "mixed", 14400, None, 64, 515000, 0),
        PartitionInfo("long", False, "up", 4, "allocated", 172800, 2, 256, 2051000, 8),
        PartitionInfo("tiny", False, "inact", 1, "idle~", 1800, 1, 8, 16000, 4),
        PartitionInfo("dead", False, "down", 4, "down", None, None, 256, 2051000, 8),
    ]
    assert [info.working for info in slurm_limits.parse_sinfo(SINFO)] == [True, False, True, True, True, False]
    assert not slurm_limits.parse_sinfo("a|up|1|idle*|30:00|1|8|1|gpu:1")[0].working  # does not answer


def test_a_line_of_another_form_is_an_error() -> None:
    with pytest.raises(LaunchError, match=r"sinfo answered 'batch\|up'"):
        slurm_limits.parse_sinfo("batch|up\n")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30:00", 1800), ("4:00:00", 14400), ("1-02:03:04", 93784), ("infinite", None), ("n/a", None), ("", None), ("UNLIMITED", None)],
)
def test_times(text: str, seconds: int | None) -> None:
    assert slurm_limits.slurm_seconds(text) == seconds


@pytest.mark.parametrize(
    ("gres", "count"),
    [("gpu:8", 8), ("gpu:a100:8(S:0-3)", 8), ("gpu:a100:4(S:0,1),gpu:v100:2,nic:9", 6), ("gpu", 1), ("(null)", 0), ("", 0), ("mps:400", 0)],
)
def test_gpus(gres: str, count: int) -> None:
    assert slurm_limits.gpu_count(gres) == count


def test_memory() -> None:
    assert [slurm_limits.memory_mb(text) for text in ("0", "64000", "500G", "1T", "2048K")] == [0, 64000, 512000, 1048576, 2]


def test_a_job_that_fits_has_no_problems() -> None:
    assert found() == ([], [])
    assert found(partition=None, nodes=12) == ([], [])  # the default partition


def test_unknown_partition_lists_the_known() -> None:
    errors = found(partition="bacth")[0]
    assert errors == [
        "phase1: partition 'bacth' of site.yaml is not known to Slurm; did you mean batch? valid: batch, long, tiny, dead",
    ]
    none_default = [dataclasses.replace(info, default=False) for info in slurm_limits.parse_sinfo(SINFO)]
    assert "set partition to one of batch, long, tiny, dead" in slurm_limits.partition_problems(job(partition=None), none_default)[0][0]


def test_too_many_nodes() -> None:
    assert found(nodes=17)[0] == ["phase1: 17 nodes, but partition batch has 16; choose a row with fewer nodes or another partition"]
    assert found(nodes=16)[0] == [
        "phase1: 8 GPUs a node, but nodes of partition batch have at most 8 (15 nodes have enough, 16 are needed); change the row, or "
        "gpu_request in site.yaml",
        "phase1: 128 CPUs a node, but nodes of partition batch have at most 256 (15 nodes have enough, 16 are needed); change the row, or "
        "cpus_per_task in site.yaml",
    ]
    assert found(nodes=16, gpu_request="none", cpus_per_task=None)[0] == []  # a site that hands out whole nodes without counting GPUs
    assert found(partition="long", nodes=3)[0] == [
        "phase1: 3 nodes, but partition long gives a job at most 2; choose a row with fewer nodes"
    ]


def test_nodes_that_do_not_work_are_a_warning() -> None:
    assert found(nodes=14) == ([], ["phase1: 14 nodes, but only 12 of partition batch work now: it will wait"])


def test_more_of_a_node_than_it_has() -> None:
    errors = found(partition="batch", ranks_per_node=16, gpus_per_node=16, cpus_per_task=17, memory="3T")[0]
    assert [error.split(" a node")[0] for error in errors] == ["phase1: 16 GPUs", "phase1: 272 CPUs", "phase1: 3.14573e+06 MB of memory"]


def test_walltime_above_the_partitions() -> None:
    assert found(walltime_s=5 * 3600)[0] == [
        "phase1: walltime 05:00:00 is above the limit 04:00:00 of partition batch; set walltime_limit in site.yaml (a phase that needs longer "
        "requeues itself), or ask for less"
    ]


def test_partitions_that_are_not_up() -> None:
    assert found(partition="tiny", nodes=1, gpus_per_node=4, ranks_per_node=4, cpus_per_task=2, walltime_s=1800)[0] == [
        "phase1: partition tiny takes no jobs (inact); choose another, or ask the site"
    ]
    assert found(partition="dead")[1] == [
        "phase1: partition dead is down: the job will wait until it is up",
        "phase1: 4 nodes, but only 0 of partition dead work now: it will wait",
    ]


ACCOUNTS = "science||normal,high|8|\nscience|long|normal|2|1-00:00:00\nteaching||normal|1|01:00:00\n"


def test_accounts_are_parsed() -> None:
    assert slurm_limits.parse_associations(ACCOUNTS) == (
        Association("science", "", ("normal", "high"), 8, None),
        Association("science", "long", ("normal",), 2, 86400),
        Association("teaching", "", ("normal",), 1, 3600),
    )
    config = "AccountingStorageHost = db\nAccountingStorageEnforce = associations,limits,qos\nEnforcePartLimits = NO\n"
    assert slurm_limits.parse_enforced(config) == ("associations", "limits", "qos")
    assert slurm_limits.parse_enforced("AccountingStorageEnforce = none\n") == ()


def accounts(enforced: tuple[str, ...] = ("associations",), text: str = ACCOUNTS) -> Associations:
    return Associations("ada", enforced, slurm_limits.parse_associations(text))


def test_account_and_qos() -> None:
    assert slurm_limits.account_problems(job(account="science", qos="high"), accounts()) == ([], [])
    assert slurm_limits.account_problems(job(account="scince"), accounts())[0] == [
        "phase1: account 'scince' is none of user ada; did you mean science? valid: science, teaching (site.yaml)"
    ]
    assert slurm_limits.account_problems(job(account="science", qos="hihg"), accounts())[0] == [
        "phase1: qos 'hihg' is not allowed to user ada; did you mean high? valid: normal, high (site.yaml)"
    ]
    assert slurm_limits.account_problems(job(account="teaching"), accounts())[0] == [
        "phase1: 4 nodes, but the account allows a job 1; choose a smaller row (site.yaml)",
        "phase1: walltime 04:00:00, but the account allows a job 01:00:00; set walltime_limit lower (site.yaml)",
    ]
    assert slurm_limits.account_problems(job(), accounts(text=""))[0] == [
        "phase1: user ada has no account in Slurm's accounting; ask the site for one (site.yaml)"
    ]


def test_accounts_that_are_not_enforced_are_warnings() -> None:
    errors, warnings = slurm_limits.account_problems(job(account="scince"), accounts(enforced=()))
    assert errors == [] and warnings[0].endswith("(site.yaml); Slurm does not enforce accounts here")


# ------------------------------------------------------------------------------------------------ commands on the PATH


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the whole PATH, but for the shell; tests put Slurm's commands there."""
    folder = tmp_path / "bin with space"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return folder


def put(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_probe_asks_and_parses(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINFO_PARTITION", "long")
    put(commands, "sinfo", f'printf "%s\\n" "$*" > "{commands}/asked"; [ -z "$SINFO_PARTITION" ] && cat <<"E"\n{SINFO}E')
    put(commands, "sacctmgr", f"cat <<'E'\n{ACCOUNTS}E")
    put(commands, "scontrol", "echo 'AccountingStorageEnforce = limits'")
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    assert SlurmProbe().sinfo() == slurm_limits.parse_sinfo(SINFO)
    assert (commands / "asked").read_text() == "--noheader --all --exact --format %P|%a|%D|%T|%l|%s|%c|%m|%G\n"
    assert SlurmProbe().associations() == accounts(enforced=("limits",))


def test_a_slurm_that_fails_hangs_or_is_missing_is_no_error(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(commands, "sinfo", "echo no controller >&2; exit 1")
    put(commands, "sacctmgr", "exec sleep 30")
    assert SlurmProbe(seconds=0.3).sinfo() is None
    assert SlurmProbe(seconds=0.3).associations() is None
    monkeypatch.setenv("PATH", str(commands / "none"))
    assert SlurmProbe().sinfo() is None


def test_test_only_gives_what_sbatch_says(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "#!/bin/bash\n#SBATCH --comment='a \"b\" $HOME; ü'\n"
    put(commands, "sbatch", f'cat > "{commands}/text"; printf "%s\\n" "$@" > "{commands}/asked"; echo "sbatch: Job 2 to start" >&2')
    assert slurm_limits.test_only(text, ["--nodes=2", "--comment=a b;$x"]) is None
    assert (commands / "text").read_text() == text
    assert (commands / "asked").read_text() == "--test-only\n--nodes=2\n--comment=a b;$x\n"
    put(commands, "sbatch", "cat >/dev/null; printf 'sbatch: error: first\\n\\nallocation failure: no such nodes\\n' >&2; exit 1")
    assert slurm_limits.test_only(text) == "sbatch: error: first; allocation failure: no such nodes"
    monkeypatch.setenv("PATH", str(commands / "none"))
    with pytest.raises(LaunchError, match="sbatch cannot be run"):
        slurm_limits.test_only(text)
