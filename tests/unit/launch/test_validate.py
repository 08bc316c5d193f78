"""Validation: a good plan passes, every mistake is named with its value, and all of them in one go."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from berth.files import sha256_file
from berth.launch import plan as planning
from berth.launch.clusters import Cluster, Container
from berth.launch.matrix import Matrix, Row
from berth.launch.recipes import PhaseRecipe, Platform, Recipe
from berth.launch.slurm_limits import Associations, NoProbe, PartitionInfo
from berth.launch.this_machine import Gpu
from berth.launch.validate import Report, validate
from tests.support import ROOT, TINY, VOCAB_SIZE, write_records

PHASES = {
    1: PhaseRecipe(1, 32, 5, 100, 16, 1e-2, 0.1, "lamb", "poly", 10),
    2: PhaseRecipe(2, 64, 5, 50, 16, 1e-2, 0.1, "lamb", "poly", 10),
}
RECIPE = Recipe("small", "small", "test", PHASES)
PLATFORM = Platform("box", "a box", 2, "cuda", "G1", 16.0, 8, 64.0, ("fp16", "fp32"), ("Box",))
PUBLISHED = """\
columns: [nodes, gpus_per_node, phase, seq_len, precision, micro_batch, accumulation, sequences_per_second, scaling]
tables:
  - {source: test, hardware: Box, rows: [[2, 2, 1, 32, fp16, 4, 1, 0.4, 1], [2, 2, 2, 64, fp16, 2, 2, 0.4, 1]]}
"""


@dataclasses.dataclass
class Slurm:
    """What a Slurm would answer."""

    partitions: list[PartitionInfo] | None = None
    accounts: Associations | None = None

    def sinfo(self) -> list[PartitionInfo] | None:
        return self.partitions

    def associations(self) -> Associations | None:
        return self.accounts


@dataclasses.dataclass
class Site:
    """A project on disk and the values a plan is made of; tests change them before :meth:`check`."""

    folder: Path
    run: dict[str, Any]
    cluster: dict[str, Any]
    rows: dict[int, Row]
    matrix: Matrix
    stages: tuple[str, ...] = ("phase1", "phase2")
    hours: dict[int, float] | None = None

    def plan(self) -> planning.Plan:
        return planning.make_plan(
            planning.Run(**self.run), Cluster("site", "site.yaml", **self.cluster), self.rows, self.stages, hours=self.hours
        )

    def check(self, probe: Any = None) -> Report:
        return validate(self.plan(), self.rows, self.matrix, probe=probe or NoProbe())

    def phase(self, phase: int, **changes: Any) -> None:
        """Change a row, or its recipe's phase."""
        own = {field.name for field in dataclasses.fields(PhaseRecipe)}
        recipe_changes = {key: value for key, value in changes.items() if key in own and key != "phase"}
        row_changes = {key: value for key, value in changes.items() if key not in recipe_changes}
        phases = {**self.rows[phase].recipe.phases, phase: dataclasses.replace(self.rows[phase].phase_recipe, **recipe_changes)}
        recipe = dataclasses.replace(self.rows[phase].recipe, phases=phases)
        self.rows[phase] = dataclasses.replace(self.rows[phase], recipe=recipe, **row_changes)

    def config(self, **changes: Any) -> None:
        Path(self.run["config_file"]).write_text(json.dumps({**TINY, **changes}))

    def checkpoint(self, step: int, phase: int, final: bool, config: dict[str, Any] | None = None) -> Path:
        """A checkpoint in the run's folder, alone in its manifest."""
        path = self.folder / "my results" / "run;1" / f"ckpt_{step}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"x": torch.zeros(2)}, path)
        entry = {"file": path.name, "step": step, "phase": phase, "final": final, "bytes": path.stat().st_size, "sha256": ""}
        (path.parent / "manifest.json").write_text(json.dumps({"checkpoints": [entry], "config": config or TINY}))
        return path


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A work folder of data.prepare with records of both phases, two nodes of two GPUs."""
    work = tmp_path / "work"
    (work / "vocab").mkdir(parents=True)
    (work / "vocab" / "vocab.txt").write_text("".join(f"piece{number}\n" for number in range(VOCAB_SIZE)))
    digest = sha256_file(work / "vocab" / "vocab.txt")
    for length in (32, 64):
        for name in ("training_0", "test_0"):
            write_records(
                work / "records" / f"seq_{length}" / f"text_{name}.hdf5", 20, 0, length=length, vocab_sha256=digest, do_lower_case="1"
            )
    (tmp_path / "matrix").mkdir()
    (tmp_path / "matrix" / "published.yml").write_text(PUBLISHED)
    rows = {phase: Row(PLATFORM, 2, phase, "fp16", micro, RECIPE) for phase, micro in ((1, 4), (2, 2))}
    matrix = Matrix({"box": PLATFORM}, {"small": RECIPE}, tuple(rows.values()), tmp_path / "matrix")
    run = {
        "name": "run;1", "results": str(tmp_path / "my results"), "inputs": {1: str(work), 2: str(work)},
        "config_file": str(work / "vocab" / "bert_config.json"), "vocab_file": str(work / "vocab" / "vocab.txt"),
    }  # fmt: skip
    made = Site(tmp_path, run, {"python": sys.executable, "walltime_limit": "01:00:00"}, rows, matrix)
    made.config()
    return made


def test_a_good_plan_passes(site: Site) -> None:
    site.run["evaluate"] = True
    report = site.check()
    assert (report.errors, report.warnings) == ([], [])
    assert report.notes == [
        "phase1: 20 rows in 1 files, each read 80 times",
        "phase1: about 01:06:40 (published for this row: 0.4 sequences/s on 2 x Box (test)): 2 times 01:00:00, it will requeue itself 1 times",
        "phase2: 20 rows in 1 files, each read 40 times",
        "phase2: about 00:33:20 (published for this row: 0.4 sequences/s on 2 x Box (test))",
        f"phase 1 starts from random weights in {site.folder}/my results/run;1",
        "Slurm was not asked: partition, limits and account are not checked",
    ]


def no_config(site: Site) -> None:
    Path(site.run["config_file"]).unlink()


def broken_config(site: Site) -> None:
    Path(site.run["config_file"]).write_text("{")


def other_vocabulary(site: Site) -> None:
    Path(site.run["vocab_file"]).write_text("".join(f"other{number}\n" for number in range(VOCAB_SIZE)))


def small_vocabulary(site: Site) -> None:
    Path(site.run["vocab_file"]).write_text("[PAD]\n")


def no_held_out(site: Site) -> None:
    site.run["evaluate"] = True
    (site.folder / "work" / "records" / "seq_32" / "text_test_0.hdf5").unlink()


def no_right_to_write(site: Site) -> None:
    (site.folder / "plain file").write_text("")
    site.run["results"] = str(site.folder / "plain file")


def other_model(site: Site) -> None:
    site.checkpoint(10, 1, False, {**TINY, "hidden_size": 99})


def bad_weights(site: Site) -> None:
    (site.folder / "w.pt").write_text("<html>")
    site.run["init_checkpoint"] = str(site.folder / "w.pt")


def unfinished_phase1(site: Site) -> None:
    site.stages = ("phase2",)
    site.checkpoint(10, 1, False)


def phase2_alone(site: Site) -> None:
    site.stages = ("phase2",)


def holds_phase2(site: Site) -> None:
    site.checkpoint(30, 2, False)


def containers(site: Site) -> None:
    site.cluster |= {
        "container": Container("/images/none.sqsh", "shared", "/nowhere/squash"), "mounts": ("/nowhere/a b:/data:ro", "/local/x:/x"), "local": "/local",
    }  # fmt: skip


MISTAKES: list[tuple[Callable[[Site], Any], list[str]]] = [
    (no_config, ["{work}/vocab/bert_config.json: No such file or directory; make it readable, or name another"]),
    (broken_config, ["config_file {work}/vocab/bert_config.json is not JSON (Expecting property name"]),
    (lambda site: site.config(hidden_size=0, vocab_size="many"), ["bert_config.json: vocab_size, hidden_size must be whole numbers, 1 or more"]),
    (lambda site: site.config(num_attention_heads=3), ["hidden_size 16 must be a multiple of num_attention_heads 3"]),
    (lambda site: site.config(max_position_embeddings=48), ["phase2: sequences of 64 tokens, but max_position_embeddings in config_file"]),
    (lambda site: site.config(vocab_size=200), ["vocab_file {work}/vocab/vocab.txt has 96 entries, but vocab_size in config_file"]),
    (other_vocabulary, ["phase1: the records in {work}/records/seq_32 were made with another vocabulary", "phase2: the records"]),
    (small_vocabulary, ["vocab_file {work}/vocab/vocab.txt has 1 entries", "phase1: the records", "phase2: the records"]),
    (lambda site: site.run.update(inputs={1: str(site.folder / "none"), 2: site.run["inputs"][2]}), ["data folder {here}/none does not exist"]),
    (lambda site: site.phase(1, max_seq_length=24), ["none of the records in {work}/records has sequence length 24 and masked positions 5"]),
    (lambda site: site.run.update(inputs={1: str(site.folder / "work/records/seq_64"), 2: site.run["inputs"][2]}),
     ["phase1: {work}/records/seq_64 holds sequences of 64 tokens, recipe small has 32; give records of that length"]),
    (lambda site: site.phase(1, global_batch=32), ["phase1: {work}/records/seq_32 has 20 rows to train on, one step takes 32; prepare more"]),
    (no_held_out, ["phase1: evaluation needs a held-out part, but {work}/records/seq_32 has no rows in <prefix>_test_<i>"]),
    (lambda site: site.run.update(extra=("--train_batch_size=4", "--seed", "1")),
     ["extra option --train_batch_size is decided by the row", "extra option --seed is decided"]),
    (lambda site: site.run.update(extra=("--cuda_graphs", "--unpad", "off")),
     ["phase1: cuda_graphs leave out the last micro-batch", "phase1: cuda_graphs need packed batches", "phase2: cuda_graphs need packed batches"]),
    (lambda site: site.phase(2, options={"shard": "zero2", "fused_loss": "maybe"}), ["phase2: option fused_loss 'maybe' is not known"]),
    (no_right_to_write, ["results folder {here}/plain file/run;1: {here}/plain file is a file; choose another place"]),
    (other_model, ["holds a run of another model (hidden_size 99 there, 16 here); use its config_file, or choose another name"]),
    (bad_weights, ["init_checkpoint {here}/w.pt is of no known format (torch.save, safetensors)"]),
    (unfinished_phase1, ["phase 1 in {here}/my results/run;1 is not finished (newest: ckpt_10.pt)"]),
    (phase2_alone, ["phase 2 alone needs weights, but {here}/my results/run;1 holds no checkpoint of phase 1"]),
    (holds_phase2, ["{here}/my results/run;1 holds phase 2 (ckpt_30.pt) already"]),
    (containers, ["container.image /images/none.sqsh does not exist on this host", "container.squashfs_dir /nowhere/squash", "mount /nowhere/a b does"]),
    (lambda site: site.cluster.update(python="/nowhere/python"), ["python /nowhere/python of site.yaml is not there or not executable"]),
    (lambda site: site.cluster.update(warning_s=4000), ["phase1: warning_s 4000 of site.yaml must be shorter than the walltime 01:00:00", "phase2"]),
    (lambda site: site.cluster.update(max_restarts=0), ["phase1: about 01:06:40 (published for this row: 0.4 sequences/s on 2 x Box (test)), but 0 "
                                                        "requeues of 01:00:00 reach only 00:55:00; take more nodes, more time, or raise max_restarts"]),
    (lambda site: site.run.update(time="02:00:00"), ["phase1: walltime 02:00:00 is above the site's limit 01:00:00 (site.yaml)", "phase2: walltime"]),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "expected"), MISTAKES, ids=[str(number) for number in range(len(MISTAKES))])
def test_each_mistake_is_named_and_nothing_else(site: Site, mistake: Callable[[Site], Any], expected: list[str]) -> None:
    mistake(site)
    errors = site.check().errors
    assert len(errors) == len(expected), errors
    for error, start in zip(errors, expected, strict=True):
        assert start.format(work=site.folder / "work", here=site.folder) in error


def test_all_mistakes_in_one_go(site: Site) -> None:
    site.config(max_position_embeddings=48, vocab_size=200)
    other_vocabulary(site)
    no_held_out(site)
    bad_weights(site)
    no_right_to_write(site)
    containers(site)
    site.phase(1, global_batch=32)
    site.cluster |= {"warning_s": 4000, "partition": "nope"}
    site.run |= {"extra": ("--output_dir", "x"), "time": "01:00:00"}
    partitions = [PartitionInfo("batch", True, "up", 1, "idle", None, None, 8, 64000, 2)]
    report = site.check(Slurm(partitions))
    kinds = [
        "has 96 entries", "--output_dir is decided", "has 20 rows to train on", "phase1: the records in", "needs a held-out part", "warning_s 4000",
        "phase2: sequences of 64", "phase2: the records in", "init_checkpoint", "plain file is a file", "container.image", "squashfs_dir", "mount /nowhere",
        "phase1: partition 'nope'", "phase2: partition 'nope'",
    ]  # fmt: skip
    missing = [kind for kind in kinds if not any(kind in error for error in report.errors)]
    assert missing == [] and len(report.errors) == len(kinds) + 1, report.errors  # warning_s of both phases


def test_memory(site: Site) -> None:
    big = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    site.config(**big)
    site.rows = {1: dataclasses.replace(site.rows[1], platform=dataclasses.replace(PLATFORM, gpu_memory_gb=6.0)), 2: site.rows[2]}
    (error,) = site.check().errors
    assert error.startswith("phase1: micro-batch 4 in fp16 needs about 6.")
    assert error.endswith("a GPU of box has 6 GB; choose a smaller micro-batch, or --checkpoint_activations, or --shard zero1")
    site.run["extra"] = ("--shard", "zero1")
    assert site.check().errors == []
    del site.run["extra"]
    site.rows[1] = dataclasses.replace(site.rows[1], platform=dataclasses.replace(PLATFORM, gpu_memory_gb=7.0))
    report = site.check()
    assert report.errors == [] and report.warnings[0].endswith("has 7 GB; it may just not fit: a smaller micro-batch is safe")
    site.rows[1] = dataclasses.replace(site.rows[1], platform=dataclasses.replace(PLATFORM, device="cpu", gpu_memory_gb=1.0))
    assert site.check().warnings == []


def test_memory_of_a_platform_that_does_not_tell_is_not_checked(site: Site) -> None:
    site.phase(1, platform=dataclasses.replace(PLATFORM, gpu_memory_gb=0.0))
    assert "phase1: platform box has no gpu_memory_gb: memory is not checked" in site.check().notes


def test_masks(site: Site) -> None:
    source = site.folder / "unmasked"
    write_records(source / "a_training_0.hdf5", 20, 0, masking="none")
    site.run["inputs"] = {1: str(source), 2: site.run["inputs"][2]}
    assert site.check().errors == [f"phase1: {source} holds no masks; train with --dynamic_masking, or make records with masks"]
    site.run["extra"] = ("--dynamic_masking",)
    assert site.check().errors == []
    site.run |= {"extra": (), "inputs": {1: str(site.folder / "work/records/seq_32"), 2: site.run["inputs"][2]}}
    site.phase(1, max_predictions_per_seq=7)
    assert "seq_32 has 5 masked positions a row, recipe small has 7; make the records with" in site.check().errors[0]


def test_what_lies_in_the_folder_is_told(site: Site) -> None:
    site.checkpoint(20, 1, True)
    site.stages = ("phase2",)
    assert f"phase 2 goes on from the end of phase 1, ckpt_20.pt in {site.folder}/my results/run;1" in site.check().notes
    site.stages = ("phase1", "phase2")
    assert f"phase 1 goes on from ckpt_20.pt in {site.folder}/my results/run;1" in site.check().notes


def test_a_checkpoint_without_an_entry_is_left_to_the_training(site: Site) -> None:
    """Killed between checkpoint and manifest: that phase 1 may be finished is not known before the file is loaded."""
    site.stages = ("phase2",)
    folder = site.checkpoint(10, 1, False).parent
    (folder / "ckpt_100.pt").write_bytes(b"")
    report = site.check()
    assert report.errors == []
    assert f"{folder}: the manifest does not know ckpt_100.pt; the training will look into them" in report.notes


def test_a_damaged_checkpoint_is_no_start(site: Site) -> None:
    path = site.checkpoint(20, 1, True)
    path.write_bytes(path.read_bytes()[:-10])
    for stages in (("phase2",), ("phase1", "phase2")):
        site.stages = stages
        report = site.check()
        assert report.errors == [f"{path.parent} holds damaged checkpoints only; restore one, or choose another name for the run"]
        (warning,) = report.warnings
        assert warning.startswith(f"{path} has ") and warning.endswith("it is truncated; the training will leave it out")


@pytest.mark.parametrize(("gpus", "errors"), [(None, 0), (4, 0), (3, 2)])
def test_the_gpus_of_this_machine(site: Site, gpus: int | None, errors: int) -> None:
    cards = None if gpus is None else [Gpu("G1", 16.0)] * gpus
    found = validate(site.plan(), site.rows, site.matrix, probe=NoProbe(), gpus=cards).errors
    assert len(found) == errors and all("takes 4 GPUs, this machine has 3; choose a smaller row" in error for error in found)


def test_processes_of_this_machine_have_no_time_limit(site: Site) -> None:
    site.cluster |= {"walltime_limit": "00:30:00", "max_restarts": 0}
    assert len([error for error in site.check().errors if "requeues" in error]) == 2
    assert validate(site.plan(), site.rows, site.matrix, probe=NoProbe(), gpus=[Gpu("G1", 16.0)] * 4).errors == []


def test_warnings(site: Site) -> None:
    site.run["extra"] = ("--max_steps", "5")
    site.cluster |= {"platform": "other"}
    report = site.check()
    assert report.errors == [] and len(report.warnings) == 3
    assert report.warnings[0] == "extra option --max_steps overrides the recipe, and run.json will not know; better write a recipe"
    assert report.warnings[1] == "phase1: the row is of platform box, the nodes of site.yaml are other"


def test_paths_on_the_nodes_disks_are_not_checked(site: Site) -> None:
    containers(site)
    assert "mount /local/x is on the nodes' own disks: not checked" in site.check().notes


def test_a_scaling_run_needs_little_time(site: Site) -> None:
    site.cluster["max_restarts"] = 0
    site.run["steps_this_run"] = 10
    report = site.check()
    assert report.errors == [] and "phase1: about 00:06:40 (published for this row: 0.4 sequences/s on 2 x Box (test))" in report.notes


def prepare(site: Site, text: str) -> None:
    (site.folder / "in put").mkdir(exist_ok=True)
    (site.folder / "prepare.yaml").write_text(text.format(here=site.folder))
    site.run |= {
        "prepare": str(site.folder / "prepare.yaml"), "workdir": f"{site.folder}/new", "config_file": f"{site.folder}/new/vocab/bert_config.json",
        "vocab_file": f"{site.folder}/new/vocab/vocab.txt", "inputs": {1: f"{site.folder}/new", 2: f"{site.folder}/new"},
    }  # fmt: skip
    site.stages = ("prepare", "phase1", "phase2")


BOTH = "records: [{{max_seq_length: 32, max_predictions_per_seq: 5}}, {{max_seq_length: 64, max_predictions_per_seq: 5}}]\n"


def test_what_the_chain_makes_itself_is_not_missed(site: Site) -> None:
    prepare(site, "workdir: {here}/new\ninput: '{here}/in put'\n" + BOTH)
    report = site.check()
    assert (report.errors, report.warnings) == ([], [])
    assert (
        f"config_file {site.folder}/new/vocab/bert_config.json is made by the stage prepare: model and memory are not checked"
        in report.notes
    )


def test_a_preparation_that_makes_something_else(site: Site) -> None:
    prepare(site, "workdir: {here}/other\ninput: ['{here}/in put', gone]\nvocab_file: {here}/v\n")
    file = f"{site.folder}/prepare.yaml"
    errors = site.check().errors
    assert errors[:3] == [
        f"{file}: its workdir is {site.folder}/other, the run's {site.folder}/new; make them the same",
        f"{file}: input gone does not exist seen from {ROOT}, where the job runs: write an absolute path",
        f"{file}: vocab_file {site.folder}/v does not exist",
    ]
    assert [error.partition(" but ")[0] for error in errors[3:]] == [
        f"{file}: phase 1 reads records of max_seq_length 32 and max_predictions_per_seq 5,",
        f"{file}: phase 2 reads records of max_seq_length 64 and max_predictions_per_seq 5,",
    ]
    assert "records makes: 128 and 20; 512 and 80; add them" in errors[3]
    for text in ("[1, 2]", "workdir: {here}/new\n" + BOTH, "a: [", "workdir: {here}/new\ninput: '{here}/in put'\nrecords: false"):
        prepare(site, text)
        assert site.check().errors != [], text


def test_slurm_is_asked_where_it_answers(site: Site) -> None:
    assert "sinfo does not answer here: partition, limits and account are not checked" in site.check(Slurm()).notes
    partitions = [PartitionInfo("batch", True, "up", 1, "idle", None, None, 8, 64000, 2)]
    report = site.check(Slurm(partitions))
    assert [error.partition(";")[0] for error in report.errors] == [
        "phase1: 2 nodes, but partition batch has 1", "phase2: 2 nodes, but partition batch has 1"
    ]  # fmt: skip
    assert "sacctmgr does not answer here: account and qos are not checked" in report.notes


def test_a_bare_login_node_can_validate() -> None:
    program = "import sys\nfor name in ('torch', 'numpy', 'h5py'): sys.modules[name] = None\nimport berth.launch.validate"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
