"""The matrix as shipped (golden listing, aliases, published links) and the questions it answers.

``BERTH_UPDATE_GOLDENS=1 pytest tests/unit/launch/test_matrix.py`` writes the listing anew; look at the difference before committing it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from berth.errors import ConfigError
from berth.launch.matrix import SLURM, Matrix, load_matrix, parse_range, parse_select

GOLDEN = Path(__file__).parents[2] / "golden" / "matrix" / "rows.txt"
# key of the public configurations.yml: world size, phase, BATCHSIZE, GRADIENT_STEPS, micro-batch, LR
CLASSIC = {
    "bert--DGX1": (8, 1, 8192, 512, 16, 6e-3),
    "bert--DGX1_4x8x16x128": (32, 1, 2048, 128, 16, 6e-3),
    "bert--DGX1_16x8x16x32": (128, 1, 512, 32, 16, 6e-3),
    "bert--DGX2": (16, 1, 4096, 64, 64, 6e-3),
    "bert--DGX2_4x16x64x16": (64, 1, 1024, 16, 64, 6e-3),
    "bert--DGX2_16x16x64x4": (256, 1, 256, 4, 64, 6e-3),
    "bert--DGX2_64x16x64": (1024, 1, 64, 1, 64, 6e-3),
    "bert--DGX1_1x8x4x1024": (8, 2, 4096, 1024, 4, 4e-3),
    "bert--DGX1_4x8x4x256": (32, 2, 1024, 256, 4, 4e-3),
    "bert--DGX1_16x8x4x64": (128, 2, 256, 64, 4, 4e-3),
    "bert--DGX2_1x16x8x256": (16, 2, 2048, 256, 8, 4e-3),
    "bert--DGX2_4x16x8x64": (64, 2, 512, 64, 8, 4e-3),
    "bert--DGX2_16x16x8x16": (256, 2, 128, 16, 8, 4e-3),
    "bert--DGX2_64x16x8x4": (1024, 2, 32, 4, 8, 4e-3),
}
# preset of the public scripts: batch and accumulation of phase 1, of phase 2
PRESETS = {
    "dgxa100-80g_8gpu_fp16": (8192, 32, 4096, 128),
    "dgxa100-80g_8gpu_tf32": (8192, 64, 4096, 256),
    "dgx1-32g_8gpu_fp16": (8192, 64, 4096, 256),
    "dgx1-32g_8gpu_fp32": (8192, 128, 4096, 512),
    "dgxa100_8gpu_fp16": (8192, 128, 4096, 256),
    "dgxa100_8gpu_tf32": (8192, 128, 4096, 512),
    "dgx2_16gpu_fp16": (4096, 64, 2048, 128),
    "dgx2_16gpu_fp32": (4096, 128, 2048, 256),
    "dgx1_8gpu_fp16": (8192, 512, 4096, 512),
    "dgx1_8gpu_fp32": (8192, 1024, 4096, 2048),
    "ngc_default": (8192, 128, 4096, 512),
}
# platform, nodes: phase 1 batch, accumulation, global batch; phase 2 batch, accumulation, global batch
AZURE = {
    ("nd40rs_v2", 1): (8192, 64, 65536, 4096, 256, 32768),
    ("nd40rs_v2", 2): (4096, 32, 65536, 2048, 128, 32768),
    ("nd40rs_v2", 4): (2048, 16, 65536, 1024, 64, 32768),
    ("nd40rs_v2", 8): (1024, 8, 65536, 512, 32, 32768),
    ("nc24rs_v3", 1): (16320, 340, 65280, 8192, 1024, 32768),
    ("nc24rs_v3", 2): (8160, 170, 65280, 4096, 512, 32768),
    ("nc24rs_v3", 4): (4080, 85, 65280, 2048, 256, 32768),
    ("nc24rs_v3", 8): (2016, 42, 64512, 1024, 128, 32768),
    ("nc24rs_v3", 16): (1008, 21, 64512, 512, 64, 32768),
}


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return load_matrix()


def listing(matrix: Matrix) -> str:
    """Every row with what is computed and published, one a line."""
    lines = []
    for row in matrix.rows:
        published = ",".join(f"{one.sequences_per_second:g}" for one in matrix.published_for(row)) or "-"
        options = ",".join(f"{name}={value}" for name, value in row.options.items()) or "-"
        lines.append(
            f"{row.name} p{row.phase} {row.recipe.name} ranks={row.world_size} gbs={row.global_batch} batch={row.train_batch_size} "
            f"lr={row.learning_rate:g} published={published} alias={','.join(row.aliases) or '-'} options={options}"
        )
    return "\n".join(lines) + "\n"


def test_the_whole_matrix(matrix: Matrix) -> None:
    if os.environ.get("BERTH_UPDATE_GOLDENS"):
        GOLDEN.write_text(listing(matrix), encoding="utf-8")
    assert listing(matrix) == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("key", CLASSIC)
def test_the_14_classic_rows_are_found_by_their_keys(matrix: Matrix, key: str) -> None:
    row = matrix.row(key)
    found = (row.world_size, row.phase, row.train_batch_size, row.accumulation, row.micro_batch, row.learning_rate)
    assert (found, row.precision) == (CLASSIC[key], "fp16")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_of_the_public_scripts(matrix: Matrix, preset: str) -> None:
    first, second = matrix.row(preset, 1), matrix.row(preset, 2)
    assert (first.train_batch_size, first.accumulation, second.train_batch_size, second.accumulation) == PRESETS[preset]
    assert [bool(row.options.get("allreduce_post_accumulation_fp16")) for row in (first, second)] == [first.precision == "fp16"] * 2


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize(("precision", "micro"), [("fp16", (256, 32)), ("tf32", (128, 16))])
def test_the_a100_scaling_table(matrix: Matrix, nodes: int, precision: str, micro: tuple[int, int]) -> None:
    for phase, batch in ((1, 65536), (2, 32768)):
        row = matrix.default_row("dgx-a100-80g", nodes, phase, precision)
        assert (row.micro_batch, row.global_batch) == (micro[phase - 1], batch)
        assert {one.accumulation for one in matrix.published_for(row)} == {row.accumulation}


def test_a_derived_row_sends_gradients_like_the_row_it_comes_from(matrix: Matrix) -> None:
    assert matrix.default_row("dgx-a100-80g", 64, 2, "fp16").options == {"allreduce_post_accumulation_fp16": True}
    assert matrix.default_row("dgx-a100-80g", 64, 2, "bf16").options == {}


@pytest.mark.parametrize("place", AZURE)
def test_the_azure_tables(matrix: Matrix, place: tuple[str, int]) -> None:
    rows = [matrix.default_row(*place, phase) for phase in (1, 2)]
    assert tuple(value for row in rows for value in (row.train_batch_size, row.accumulation, row.global_batch)) == AZURE[place]
    assert rows[0].recipe == rows[1].recipe


def test_the_odd_a100_row_makes_its_own_global_batch(matrix: Matrix) -> None:
    row = matrix.row("dgx-a100-40g_1x8x54x151")
    assert (row.train_batch_size, row.global_batch, row.name) == (8154, 65232, "dgx-a100-40g_1x8x54x151_tf32_lamb-65232-p1")
    assert [one.sequences_per_second for one in matrix.published_for(row)] == [1777]


def test_every_file_loads_with_plain_safe_load() -> None:
    rows = yaml.safe_load((SLURM / "configurations.yml").read_text(encoding="utf-8"))["rows"]
    assert sum(len(group["rows"]) for group in rows) == len(load_matrix().rows)
    assert all(group["source"] for group in rows)
    text = "".join(path.read_text(encoding="utf-8") for path in SLURM.glob("*.yml"))
    assert "<<:" not in text and ": *" not in text and ": &" not in text


def test_loading_needs_no_torch_and_reads_published_numbers_only_when_asked(tmp_path: Path) -> None:
    code = (
        "import sys; from berth.launch.matrix import load_matrix; import berth.launch.estimate\n"
        "matrix = load_matrix(); assert 'published' not in vars(matrix)\n"
        "bad = {'torch', 'numpy', 'h5py'} & set(sys.modules); assert not bad, bad; assert len(matrix.published) == 164"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SLURM.parent)


def test_names_are_unique_and_lead_back(matrix: Matrix) -> None:
    assert all(matrix.row(row.name) is row for row in matrix.rows)


def test_an_ambiguous_or_unknown_row_names_the_candidates(matrix: Matrix) -> None:
    with pytest.raises(ConfigError, match=r"ambiguous: it can be dgx1-32g_1x8x64x128_fp32 or dgx1-32g_1x8x64x128_fp16$"):
        matrix.row("dgx1-32g_1x8x64x128")
    with pytest.raises(ConfigError, match=r"'ngc_default' is ambiguous: it can be dgx1-32g_1x8x64x128_fp16 or dgx1-32g_1x8x8x512_fp16$"):
        matrix.row("ngc_default")
    with pytest.raises(ConfigError) as raised:
        matrix.row("bert--DGX1_4x8x16x182")
    assert str(raised.value) == (
        "no row 'bert--DGX1_4x8x16x182' in the matrix; did you mean bert--DGX1_4x8x16x128 or bert--DGX1_16x8x16x32? `list` shows all"
    )
    with pytest.raises(ConfigError, match="no row"):
        matrix.row("bert--DGX1", 2)


def test_select(matrix: Matrix) -> None:
    names = [row.name for row in matrix.select(platform="dgx-a100-80g", nodes=range(8, 33), phase=2, precision="tf32", recipe="lamb")]
    assert names == ["dgx-a100-80g_8x8x16x32_tf32", "dgx-a100-80g_16x8x16x16_tf32", "dgx-a100-80g_32x8x16x8_tf32"]
    assert matrix.select() == list(matrix.rows)
    assert matrix.select(platform="local", nodes=(99,)) == []
    with pytest.raises(ConfigError) as raised:
        matrix.select(platform="dgx-a100-80", phase=3, precision="fp61", recipe="lamp")
    assert [line.partition("; valid")[0].partition("? valid")[0] for line in str(raised.value).split("\n  ")] == [
        "platform 'dgx-a100-80' is not known; did you mean dgx-a100-80g or dgx-a100-40g",
        "phase 3 is not known",
        "precision 'fp61' is not known; did you mean fp16",
        "recipe 'lamp' is not known; did you mean lamb",
    ]


@pytest.mark.parametrize(
    ("question", "name", "source"),
    [
        (("dgx1-16g", 4, 2), "dgx1-16g_4x8x4x256_fp16", None),
        (("dgx-h100", 2, 1), "dgx-h100_2x8x256x16_bf16", None),
        (("dgx-h100", 2, 1, "fp8"), "dgx-h100_2x8x256x16_fp8", "derived from dgx-h100_2x8x256x16_bf16"),
        (("dgx-h200", 1, 2, "fp8"), "dgx-h200_1x8x64x64_fp8", "derived from dgx-h200_1x8x64x64_bf16"),
        (("dgx-a100-80g", 2, 1, "bf16"), "dgx-a100-80g_2x8x256x16_bf16", "derived from dgx-a100-80g_2x8x256x16_fp16"),
        (("dgx-a100-80g", 1, 1, "bf16"), "dgx-a100-80g_1x8x256x32_bf16", "derived from dgx-a100-80g_1x8x256x32_fp16"),
        (("dgx2", 2, 2), "dgx2_2x16x8x128_fp16", "derived from dgx2_1x16x8x256_fp16"),
        (("dgx-h100", 32, 1), "dgx-h100_32x8x256x1_bf16", "derived from dgx-h100_16x8x256x2_bf16"),
        (("dgx2h", 2, 1, "fp32"), "dgx2h_2x16x32x64_fp32", "derived from dgx2h_32x16x32x4_fp32"),
        (
            ("dgx-a100-80g", 2, 1, "fp16", "azureml-adam"),
            "dgx-a100-80g_2x8x32x8_fp16_azureml-adam-p1",
            "derived from dgx-a100-80g_2x8x32x64_fp16",
        ),
        (("local", 1, 2), "local_1x1x16x1_fp32_demo-p2", None),
        (("local", 2, 1, None, "tiny", 2), "local_2x2x2x2_fp32_tiny-p1", None),
        (("workstation", 1, 1, None, None, 1), "workstation_1x1x64x1024_bf16", None),
    ],
)
def test_the_default_of_an_allocation(matrix: Matrix, question: tuple, name: str, source: str | None) -> None:
    row = matrix.default_row(*question)
    assert row.name == name
    assert row in matrix.rows if source is None else row.source == source


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (("dgx-a100-80g", 64, 1), "nearest that do: micro-batch 128; 32 nodes with micro-batch 256"),
        (("local", 1, 1, None, "lamb-64513"), "recipe 'lamb-64513' is not known; did you mean lamb-64512"),
        (("dgx1-16g", 1, 2, None, "azureml-adam"), "recipe azureml-adam has no phase 2; it has 1"),
        (
            ("dgx1-16g", 1, 1, None, "tiny"),
            "no row of platform dgx1-16g tells a micro-batch for sequence length 16 in fp16 (phase 1 of recipe tiny)",
        ),
        (("dgx-9000", 1, 1), "platform 'dgx-9000' is not known"),
        (("dgx1-16g", 1, 1, "bf16"), "dgx1-16g has no precision 'bf16'; valid: fp16, fp32"),
        (("dgx-a100-80g", 1, 1, "fp8"), "dgx-a100-80g has no precision 'fp8'; valid: fp16, bf16, tf32, fp32"),
    ],
)
def test_no_default_is_ever_guessed(matrix: Matrix, question: tuple, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        matrix.default_row(*question)
    assert message in str(raised.value)


def test_a_made_row_is_that_of_the_matrix_where_there_is_one(matrix: Matrix) -> None:
    known = matrix.row("dgx-a100-80g_4x8x256x8_fp16")
    assert matrix.make_row("dgx-a100-80g", 4, 1, "fp16", 256, "lamb") is known
    other = matrix.make_row("dgx-a100-80g", 4, 1, "fp16", 256, "lamb", options={"log_freq": 2})
    assert (other.options, other.source) == ({"log_freq": 2}, "given by the user")


EXTRA = """\
platforms:
  shed: {title: four old cards, ranks_per_node: 4, device: cuda, gpu_memory_gb: 11, cpus_per_node: 8, memory_gb: 64, precisions: [fp16]}
recipes:
  mine: {based_on: lamb, title: 'ours; "quoted" $HOME é', source: us, phases: {1: {global_batch: 4096, max_steps: 9}}}
rows:
  - source: measured here
    recipe: mine
    rows: [{platform: shed, nodes: 2, phase: 1, precision: fp16, micro_batch: 8}]
"""


def test_a_file_of_the_user_adds_to_the_matrix(tmp_path: Path) -> None:
    path = tmp_path / "our rows; $HOME é.yml"
    path.write_text(EXTRA, encoding="utf-8")
    row = load_matrix(extra=[path]).row("shed_2x4x8x64")
    assert (row.global_batch, row.phase_recipe.max_steps, row.recipe.title) == (4096, 9, 'ours; "quoted" $HOME é')


def test_all_mistakes_of_all_files_at_once(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yml", tmp_path / "b.yml"
    first.write_text(EXTRA + EXTRA.partition("rows:\n")[2] + "columns: 3\n", encoding="utf-8")
    second.write_text(EXTRA.replace("micro_batch: 8", "micro_batch: 7"), encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_matrix(extra=[first, second])
    title, *lines = str(raised.value).split("\n  ")
    assert title == "the performance matrix has mistakes:"
    assert [line.partition(", phase")[0].partition("; valid")[0] for line in lines] == [
        f"{first}: unknown key 'columns'",
        f"{second}: shed is there already; choose another name",
        f"{second}: mine is there already; choose another name",
        f"{second}: rows, group 1, row 1: shed, 2 nodes",
        "the row shed_2x4x8x64_fp16_mine-p1 is there 2 times; keep one",
    ]


@pytest.mark.parametrize(("text", "nodes"), [("4", (4,)), ("1,2,4", (1, 2, 4)), ("1..4", (1, 2, 3, 4)), (" 8, 1..2 ,2", (1, 2, 8))])
def test_node_counts(text: str, nodes: tuple[int, ...]) -> None:
    assert parse_range(text) == nodes


@pytest.mark.parametrize("text", ["", "0", "a", "4..1", "1..", "..4", "1...4", "-1", "1;2", "1,,2", "1..1000000000000", "１"])
def test_what_is_no_node_count(text: str) -> None:
    with pytest.raises(ConfigError, match="is no list of node counts; write 4, 1,2,4 or 1..32"):
        parse_range(text)


def test_filters() -> None:
    assert parse_select("platform=dgx-a100-80g, precision=fp16,phase=2,nodes=1..3") == {
        "platform": "dgx-a100-80g", "precision": "fp16", "phase": 2, "nodes": (1, 2, 3),
    }  # fmt: skip
    assert parse_select("") == {}
    with pytest.raises(ConfigError) as raised:
        parse_select("plattform=x,phase=3,fp16,recipe=a,recipe=b")
    assert str(raised.value).split("\n  ") == [
        "the filter 'plattform=x' must be <key>=<value>; did you mean platform? valid: platform, nodes, phase, precision, recipe",
        "the filter phase must be 1 or 2, not '3'",
        "the filter 'fp16' must be <key>=<value>; valid: platform, nodes, phase, precision, recipe",
        "the filter recipe is given twice",
    ]
