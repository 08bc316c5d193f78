"""Site profiles: the samples, what a profile may say, and every mistake at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import ConfigError
from berth.launch import clusters
from berth.launch.clusters import Cluster, Container, find_cluster, load_cluster, names, parse_cluster, seconds, walltime
from berth.launch.matrix import load_matrix

SAMPLES = ["azure-cyclecloud", "bare", "dgx-a100-superpod", "dgx-h100", "local"]


def problems(raw: object) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse_cluster(raw, "site", "site.yaml")
    first, *rest = str(raised.value).split("\n  ")
    assert first == "site.yaml:"
    return rest


def test_the_samples_load_and_name_platforms_of_the_matrix() -> None:
    matrix = load_matrix()
    assert names() == SAMPLES
    for name in SAMPLES:
        cluster = load_cluster(name)
        assert cluster.name == name and cluster.file.endswith(f"slurm/clusters/{name}.yaml") and cluster.title
        assert cluster.platform is None or cluster.platform in matrix.platforms
        assert cluster.recipe is None or cluster.recipe in matrix.recipes
    claimed = [one for name in SAMPLES for one in load_cluster(name).slurm_names]
    assert len(claimed) == len(set(claimed))


def test_a_whole_profile_is_read() -> None:
    assert load_cluster("dgx-h100") == Cluster(
        name="dgx-h100",
        file=str(clusters.FOLDER / "dgx-h100.yaml"),
        title="DGX H100 with Pyxis, images on each node",
        platform="dgx-h100",
        slurm_names=("dgx-h100",),
        partition="defq",
        qos="normal",
        gpu_request="gres",
        memory="0",
        walltime_limit="1-00:00:00",
        warning_s=600,
        container=Container("registry.example.org#nlp/berth:0.1.0", "node", "/raid/images"),
        environment={"NCCL_SOCKET_IFNAME": "bond0"},
        mpi="pmix",
        python="python",
        bind="exclusive",
        nic="nearest",
        preflight=True,
        min_free_gb=100.0,
        data="/home/shared/berth/wikipedia",
        results="/home/shared/berth/results",
        local="/raid/scratch",
    )


def test_every_key_is_a_field_and_every_field_a_key() -> None:
    fields = {field.name for field in dataclasses.fields(Cluster)} - {"name", "file"}
    assert fields == (set(clusters.KEYS) - {"paths"}) | set(clusters.PATH_KEYS)
    assert {field.name for field in dataclasses.fields(Container)} == set(clusters.CONTAINER_KEYS)


def test_values_are_converted_and_empty_ones_left_out() -> None:
    raw = {
        "memory": 0,
        "environment": {"A": 1, "B": 0.5, "C": "x y"},
        "min_free_gb": 2,
        "paths": None,
        "container": None,
        "partition": None,
    }
    assert parse_cluster(raw, "site", "f") == Cluster(
        "site", "f", memory="0", environment={"A": "1", "B": "0.5", "C": "x y"}, min_free_gb=2.0
    )
    assert parse_cluster({}, "site", "f") == Cluster("site", "f")


def test_python_of_a_shared_environment_also_runs_on_the_host() -> None:
    shared = {"python": "/shared/bin/python"}
    assert parse_cluster(shared, "s", "f").host_python == "/shared/bin/python"
    assert parse_cluster(shared | {"host_python": "/usr/bin/python3"}, "s", "f").host_python == "/usr/bin/python3"
    assert parse_cluster(shared | {"container": {"image": "i"}}, "s", "f").host_python is None  # that one lies inside the image
    assert parse_cluster({"python": "python3"}, "s", "f").host_python is None


WRONG = [
    ("title", "a\nb", "a text of one line"),
    ("platform", "a b", "a name of letters, digits and _ . : + -"),
    ("partition", "batch;rm", "a name of letters, digits and _ . : + -"),
    ("slurm_names", "one", "a list"),
    ("slurm_names", ["-x"], "a name of letters, digits and _ . : + -"),
    ("gpu_request", "yes", "one of gres, gpus-per-node, none"),
    ("cpus_per_task", 0, "a whole number, 1 or more"),
    ("cpus_per_task", True, "a whole number, 1 or more"),
    ("memory", "12 GB", "what sbatch --mem takes: 0 for all of the node, or a number with K, M, G or T"),
    ("exclusive", "true", "true or false"),
    ("walltime_limit", 28800, '"[days-]hours:minutes:seconds" in quotation marks'),  # what YAML makes of 08:00:00
    ("walltime_limit", "00:00:00", '"[days-]hours:minutes:seconds" in quotation marks'),
    ("walltime_limit", "01:00:00\n", '"[days-]hours:minutes:seconds" in quotation marks'),
    ("warning_s", 5, "a whole number, 20 or more"),
    ("mounts", ["/a"], "SOURCE:DESTINATION[:FLAGS] with absolute paths that hold no comma or colon"),
    ("mounts", ["/a:b"], "SOURCE:DESTINATION[:FLAGS] with absolute paths that hold no comma or colon"),
    ("mounts", ["/a,b:/c"], "SOURCE:DESTINATION[:FLAGS] with absolute paths that hold no comma or colon"),
    ("environment", ["A=1"], "NAME: value pairs"),
    ("environment", {"A B": 1}, "NAME: value pairs; 'A B' is no variable name"),
    ("environment", {"A": True}, "NAME: value pairs; the value of A must be a text or a number"),
    ("mpi", "openmpi", "one of none, pmix, pmi2, pmix_v3, pmix_v4, pmix_v5"),
    ("python", "", "a text of one line"),
    ("host_python", "python3", "an absolute path"),
    ("setup", "module load x", "a list"),
    ("bind", "cores", "one of none, numa, exclusive"),
    ("nic", "all", "one of none, nearest"),
    ("sbatch", ["reservation=x"], "an option that begins with -"),
    ("srun", ["--a\n--b"], "a text of one line"),
    ("crash_limit", 0, "a whole number, 1 or more"),
    ("preflight", 1, "true or false"),
    ("min_free_gb", -1, "a number, 0 or more"),
]


@pytest.mark.parametrize(("key", "value", "rule"), WRONG)
def test_a_wrong_value_is_named_with_its_rule(key: str, value: object, rule: str) -> None:
    assert problems({key: value}) == [f"{key}: {value!r} is not {rule}"]


def test_all_mistakes_at_once() -> None:
    raw = {
        "partitions": "x",
        "memory": "lots",
        "paths": {"data": "here", "scratch": "/x"},
        "container": {"import_to": "shared", "image": "i", "writeable": True},
        7: 8,
    }
    keys = ", ".join(clusters.KEYS)
    assert problems(raw) == [
        f"unknown key partitions; did you mean partition? valid: {keys}",
        "memory: 'lots' is not what sbatch --mem takes: 0 for all of the node, or a number with K, M, G or T",
        f"unknown key 7; valid: {keys}",
        "paths.data: 'here' is not an absolute path",
        "unknown key paths.scratch; valid: data, results, local",
        "unknown key container.writeable; did you mean writable? valid: " + ", ".join(clusters.CONTAINER_KEYS),
        "container.import_to shared needs container.squashfs_dir",
    ]
    assert problems({"container": {"image": "/images/a.sqsh", "import_to": "node", "squashfs_dir": "/raid"}}) == [
        "container.import_to node is for images of a registry, /images/a.sqsh is a file; leave it out"
    ]
    assert problems({"paths": ["/a"], "container": "image"}) == [
        "paths is a section of keys, not ['/a']",
        "container is a section of keys, not 'image'",
        "container.image is missing: leave the section out for a site without containers",
    ]


def test_what_is_no_profile_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^f: a site profile is a mapping of keys; keys: title, platform, "):
        parse_cluster(["title"], "s", "f")
    path = tmp_path / "broken.yaml"
    path.write_text("title: x\ntitle: y\n", encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_cluster(str(path))
    assert str(raised.value) == f"{path}, line 2: the key 'title' is given twice"
    path.write_text("title: [x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"^{path}, line 2: "):
        load_cluster(str(path))


def test_a_profile_by_name_or_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("title: mine\n", encoding="utf-8")
    assert load_cluster("mine", tmp_path) == Cluster("mine", str(tmp_path / "mine.yaml"), title="mine")
    assert load_cluster(str(tmp_path / "mine.yaml")).title == "mine"
    with pytest.raises(ConfigError) as raised:
        load_cluster("yours", tmp_path)
    expected = f"there is no site profile {tmp_path}/yours.yaml; profiles: mine. Write one, or give the path of a file"
    assert str(raised.value) == expected


def test_the_profile_that_claims_a_cluster_of_slurm(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("slurm_names: [one, two]\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("slurm_names: [three]\n", encoding="utf-8")
    found = [find_cluster(name, tmp_path) for name in ("one", "two", "three", "four")]
    assert [None if one is None else one.name for one in found] == ["a", "a", "b", None]
    (tmp_path / "b.yaml").write_text("slurm_names: [two]\n", encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        find_cluster("two", tmp_path)
    assert str(raised.value) == f"several site profiles claim the Slurm cluster 'two': {tmp_path}/a.yaml, {tmp_path}/b.yaml"


@given(st.integers(min_value=0, max_value=10**8))
def test_walltimes_and_seconds_are_each_other_s_inverse(total: int) -> None:
    assert seconds(walltime(total)) == total


def test_walltimes_as_slurm_writes_them() -> None:
    assert [walltime(total) for total in (0, 59.6, 3600, 86399, 86400, 90061)] == [
        "00:00:00", "00:01:00", "01:00:00", "23:59:59", "1-00:00:00", "1-01:01:01",
    ]  # fmt: skip
    assert [seconds(text) for text in ("1:00:00", "2-00:00:00", "00:90:00")] == [3600, 172800, 5400]
    for text in ("60", "1:00", "1-1", "", "a:00:00", "1:00:00 ", "1:00:00\n", "٣:00:00"):
        with pytest.raises(ConfigError):
            seconds(text)
