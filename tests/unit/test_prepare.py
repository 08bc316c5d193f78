"""The plan of data preparation: every mistake of a configuration is named before anything runs; lines can be typed by hand."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from berth import prepare
from berth.errors import ConfigError, DataError, LaunchError
from berth.files import FolderLock
from berth.prepare import Command, Outcome, apply_settings, load_config, plan, run, summarize
from data.prepare import PARSERS, build_parser


def parsers():
    return {stage: build() for stage, build in PARSERS.items()}


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    """A folder ``in`` with one text file; the current folder is its parent."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("Egy. Kettő.\n", encoding="utf-8")
    return tmp_path / "in"


def planned(only=(), /, **config):
    return plan({"workdir": "w", "input": "in", **config}, parsers(), only)


def arguments(commands, stage: str) -> list[str]:
    return [" ".join(command.arguments) for command in commands if command.stage == stage]


def stages_of(commands) -> list[str]:
    return [command.stage for command in commands]


# ------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("a: [1", r"c\.yaml: not readable as YAML: .*line \d"),
        ("- a\n- b", "'name: value' pairs, not a list"),
        ("", "not a NoneType"),
        ("word", "not a str"),
        ("a: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_yaml_that_cannot_be_read(tmp_path, yaml, message):
    (tmp_path / "c.yaml").write_text(yaml)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


def test_files_that_are_no_yaml(tmp_path):
    with pytest.raises(ConfigError, match=r"--config .*none\.yaml: no such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "c.yaml").write_bytes(b"prefix: caf\xe9")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"wrokdir": "x"}, "unknown name 'wrokdir'.*did you mean 'workdir'"),
        ({"filtr": {}}, "did you mean 'filter'"),
        ({True: 1}, "unknown name True"),
        ({"filter": {"min_sent": 1}}, "filter has no option 'min_sent'; did you mean 'min_sents'"),
        ({"shard": {"vocab_size": 5}}, "shard has no option 'vocab_size'"),
        ({"filter": {"n_training_shards": 5}}, "filter has no option 'n_training_shards'"),
        ({"records": [{"max_seq_length": 64}, {"dupes": 1}]}, "records has no option 'dupes'"),
        ({"sentences": {"input": "x"}}, r"sentences\.input is set by data\.prepare itself"),
        ({"records": {"output_dir": "x"}}, r"records\.output_dir is set by"),
        ({"vocab": {"cased": True}}, r"vocab\.cased is set by"),
        ({"filter": [1]}, "filter: must hold 'option: value' pairs, or false"),
        ({"records": [3]}, "records: must hold 'option: value' pairs or a list of them, or false"),
        ({"filter": "yes"}, "filter: must hold"),
        ({"filter": {"min_sents": [1, 2]}}, r"min_sents: \[1, 2\] must be one value"),
        ({"filter": {"min_sents": {"a": 1}}}, "min_sents: .* must be one value"),
        ({"filter": {"min_sents": "few"}}, "filter: argument .*--min_sents.*invalid int value: 'few'"),
        ({"filter": {"min_sents": True}}, "min_sents: True is no value.*quotes"),
        ({"filter": {"dedup": "all"}}, "filter: argument --dedup: invalid choice: 'all'"),
        ({"filter": {"langdetect": False}}, "langdetect: False is no value.*quotes"),
        ({"filter": {"no_clean": "yes"}}, "no_clean: 'yes' must be true or false"),
        ({"vocab": {"pretokenize": False}}, "pretokenize: false.*no_pretokenize: true"),
        ({"records": {"dupe_factor": "five"}}, "records: argument --dupe_factor: invalid int"),
        ({"records": {"masked_lm_prob": 2}}, "--masked_lm_prob 2.0 must be above 0"),
        ({"records": {"max_seq_length": 3}}, "--max_seq_length 3 must be"),
        (
            {"records": [{"max_seq_length": 64}, {"max_seq_length": 64, "bin_size": 32}]},
            "two sections of records would both be written",
        ),
        ({"shard": {"n_training_shards": "x"}}, "shard: argument --n_training_shards: invalid int"),
        ({"language": False}, "language: False must be text .*no and on"),
        ({"prefix": 3}, "prefix: 3 must be text"),
        ({"cased": "false"}, "cased: 'false' must be true or false"),
        ({"seed": "x"}, "seed: 'x' must be a whole number"),
        ({"processes": True}, "processes: True must be a whole number"),
        ({"processes": [1, 2]}, r"processes: \[1, 2\] must be a whole number"),
        ({"vocab_size": "30k"}, "vocab_size: '30k' must be a whole number"),
        ({"input": [1]}, r"input: \[1\] must be text"),
        ({"input": {"a": "b"}}, "input: .*must be text"),
        ({"stages": ["shards"]}, "unknown stage 'shards'; did you mean 'shard'"),
        ({"stages": [3]}, "stages: .*must be text"),
        ({"stages": ["filter"]}, "switched off or without a section.*: filter"),
        ({"vocab_file": "v.txt", "vocab": {"vocab_size": 3}}, "contradict each other"),
        ({"vocab_file": "v.txt", "vocab_size": 3}, "contradict each other"),
        ({"vocab": {"method": "bytelevel"}}, "records are WordPiece: say records: false"),
        ({"input": None}, "nothing to prepare"),
        ({"workdir": None}, "say where to work"),
        ({"input": ["in", "other"], "extract": False}, "needs one file or folder"),
    ],
)
def test_mistakes_are_named(text, config, message):
    with pytest.raises(ConfigError, match=message):
        plan({"workdir": "w", "input": "in", **config}, parsers())


def test_settings_of_the_command_line():
    config: dict = {"filter": {"min_sents": 2}, "records": [{"max_seq_length": 64}, {"max_seq_length": 99}]}
    apply_settings(
        config, ["filter.min_sents=1", "filter.no_clean=true", "records.dupe_factor=3", "vocab.character_coverage=0.99", "shard.prefix="]
    )
    assert config == {
        "filter": {"min_sents": 1, "no_clean": True}, "vocab": {"character_coverage": 0.99}, "shard": {"prefix": None},
        "records": [{"max_seq_length": 64, "dupe_factor": 3}, {"max_seq_length": 99, "dupe_factor": 3}],
    }  # fmt: skip
    config = {}
    apply_settings(config, ["records.dupe_factor=3"])
    assert [section["max_seq_length"] for section in config["records"]] == [128, 512]


@pytest.mark.parametrize("setting", ["filter", "filter.x", "filter=1", ".x=1", "input.x=1", "workdir.a=b", "nothing.x=1", "filter.=1"])
def test_settings_that_are_none(setting):
    with pytest.raises(ConfigError, match=r"must be STAGE\.OPTION=VALUE, for example filter\.min_sents=1"):
        apply_settings({"input": ["a"]}, [setting])
    with pytest.raises(ConfigError, match="not readable as YAML"):
        apply_settings({}, ["filter.x=[1"])


# ---------------------------------------------------------------------------------------------------------------- plan


def test_the_plan_of_flags_alone(text):
    commands = planned()
    assert stages_of(commands) == ["sentences", "shard", "vocab", "records", "records", "verify"]
    assert arguments(commands, "sentences") == ["--input in --output_dir w/sentences"]
    assert "--input w/sentences --output_dir w/shards" in arguments(commands, "shard")[0]
    lengths = [line.split("--max_seq_length ")[1] for line in arguments(commands, "records")]
    assert lengths == ["128 --max_predictions_per_seq 20", "512 --max_predictions_per_seq 80"]
    assert all("--do_lower_case" in line for stage in ("vocab", "records") for line in arguments(commands, stage))
    verify = arguments(commands, "verify")[0]
    assert verify.startswith("--input w/records/hdf5_lower_case_1_seq_len_128_max_pred_20_") and "--text w/shards" in verify
    assert [command.manifest and command.manifest.name for command in commands] == [
        "sentences.json", "shards.json", "vocab.txt.vocab.json", "records.json", "records.json", None,
    ]  # fmt: skip


def test_what_is_said_once_reaches_every_stage(text):
    commands = planned(language="hu", cased=True, processes=3, seed=7, prefix="p", filter={}, vocab_size=99)
    for command in commands:
        words = command.arguments
        if command.stage in ("sentences", "filter"):
            assert words[words.index("--language") + 1] == "hu"
        if command.stage in ("vocab", "records"):
            assert "--cased" in words and "--do_lower_case" not in words
        if command.stage in ("sentences", "filter", "shard", "vocab", "records"):
            assert words[words.index("--processes") + 1] == "3"
        seed = {"shard": "--seed", "vocab": "--seed", "records": "--random_seed"}.get(command.stage)
        assert seed is None or words[words.index(seed) + 1] == "7"
    vocab = arguments(commands, "vocab")[0]
    assert "w/shards/p_training_0.txt" in vocab and "--vocab_size 99" in vocab
    assert "w/filtered" in arguments(commands, "shard")[0]
    assert "hdf5_lower_case_0_seq_len_128" in arguments(commands, "records")[0] and "_random_seed_7_" in arguments(commands, "records")[0]
    own = planned(
        language="hu",
        seed=7,
        filter={"language": "fi"},
        shard={"seed": 8},
        records={"random_seed": 9},
        vocab_size=5,
        vocab={"vocab_size": 6},
    )
    assert "--language fi" in arguments(own, "filter")[0] and "--seed 8" in arguments(own, "shard")[0]
    assert "--random_seed 9" in arguments(own, "records")[0] and "--vocab_size 6" in arguments(own, "vocab")[0]


def test_the_vocabulary_is_trained_on_the_shards_that_are_made(text):
    commands = planned(prefix="a", shard={"prefix": "b", "n_training_shards": 2})
    assert "--prefix b" in arguments(commands, "shard")[0]
    assert arguments(commands, "vocab")[0].startswith("--input w/shards/b_training_0.txt w/shards/b_training_1.txt --output")
    assert "--input w/shards --output" in arguments(planned(shard=False), "vocab")[0]
    Path("w/shards").mkdir(parents=True)
    for name in ("x_training_10.txt", "x_training_9.txt", "x_test_0.txt"):
        Path("w/shards", name).touch()
    assert "--input w/shards/x_training_9.txt w/shards/x_training_10.txt --output" in arguments(planned(shard=False), "vocab")[0]


def test_what_is_extracted(text):
    assert "extract" not in stages_of(planned())
    assert "extract" not in stages_of(planned(input="in/a.txt"))
    commands = planned(input=["in", "in/a.txt"])
    assert arguments(commands, "extract") == ["--input in in/a.txt --output_dir w/documents"]
    assert arguments(commands, "sentences") == ["--input w/documents --output_dir w/sentences"]
    for name in ("b.jsonl", "hu.xml.bz2"):
        (text / name).write_text("{}")
        assert "extract" in stages_of(planned()), "text beside something else is not all there is"
        assert "extract" in stages_of(planned(input=f"in/{name}"))
        (text / name).unlink()
    assert "extract" in stages_of(planned(extract={"documents": "line"}))
    assert "extract" in stages_of(planned(input="missing"))
    assert "extract" not in stages_of(planned(input=["in"], extract=False))
    assert arguments(planned(extract={"weight": [2, 0.5]}, input=["in", "in/a.txt"]), "extract")[0].endswith("--weight 2 0.5")


def test_sections_switch_stages(text):
    assert stages_of(planned(vocab=False, records=False, verify=False)) == ["sentences", "shard"]
    assert "vocab" not in stages_of(planned(vocab_file="v.txt"))
    assert "--vocab_file v.txt" in arguments(planned(vocab_file="v.txt"), "records")[0]
    assert stages_of(planned(("records", "shard"))) == ["shard", "records", "records"]
    assert stages_of(planned(stages="vocab")) == stages_of(planned(("vocab",), stages=["shard"])) == ["vocab"]
    assert "filter" in stages_of(planned(filter=True)) and "filter" not in stages_of(planned(filter=False))
    assert "format" in stages_of(planned(format={}, extract=True, input=["in", "in/a.txt"]))
    assert len(arguments(planned(records={"max_seq_length": 64}), "records")) == 1
    assert len(arguments(planned(records={"dupe_factor": 2}), "records")) == 2
    assert "w/shards" in arguments(planned(records=False), "verify")[0]


def test_every_kind_of_records_has_its_folder(text):
    sections = [
        {"max_seq_length": 64}, {"max_seq_length": 64, "layout": "packed"}, {"max_seq_length": 64, "objective": "mlm"},
        {"max_seq_length": "64", "masking": "none"}, {"max_seq_length": 64, "do_whole_word_mask": True}, {"max_seq_length": 64, "dupe_factor": 2},
    ]  # fmt: skip
    folders = [command.manifest.parent.name for command in planned(records=sections) if command.stage == "records"]
    base = "hdf5_lower_case_1_seq_len_64_max_pred_20_masked_lm_prob_0.15_random_seed_12345_dupe_factor_5"
    assert folders == [base, f"{base}_packed", f"{base}_mlm", f"{base}_none", f"{base}_whole_word", base[:-1] + "2"]


def test_lines_are_quoted(text):
    (text / "my text.txt").write_text("a")
    line = planned(input="in/my text.txt", workdir="w o")[0].line
    assert line.startswith("python /") and "--input 'in/my text.txt' --output_dir 'w o/sentences'" in line


def test_help_names_every_stage_and_option():
    text = build_parser().format_help()
    for stage in prepare.STAGES:
        assert stage in text


# ----------------------------------------------------------------------------------------------------------------- run


def command(tmp_path: Path, code: str, stage: str = "shard", manifest: str | None = None, *words: str) -> Command:
    script = tmp_path / f"{stage}.py"
    script.write_text(code)
    return Command(stage, stage, script, words, tmp_path / manifest if manifest else None)


def test_stages_run_in_order_and_the_first_failure_ends(tmp_path, capfd):
    good = command(tmp_path, "print('one')", "shard")
    bad = command(tmp_path, "import sys; sys.exit(2)", "vocab")
    never = command(tmp_path, "print('never')", "records")
    with pytest.raises(LaunchError, match="stage vocab failed with exit code 2; its message stands above"):
        run([good, bad, never], tmp_path / "w")
    out = capfd.readouterr().out
    assert out.index("== shard: python") < out.index("one") < out.index("== vocab") and "never" not in out
    killed = command(tmp_path, "import os; os.kill(os.getpid(), 9)", "vocab")
    with pytest.raises(LaunchError, match="vocab was killed by signal 9"):
        run([killed], tmp_path / "w")
    stopped = command(tmp_path, "import sys; sys.exit(143)", "vocab")
    with pytest.raises(SystemExit) as caught:
        run([stopped], tmp_path / "w")
    assert caught.value.code == 143


def test_two_at_once(tmp_path, monkeypatch):
    real = FolderLock.acquire
    monkeypatch.setattr(FolderLock, "acquire", lambda self, wait_seconds: real(self, 0))
    other = FolderLock(tmp_path, ".prepare.lock")
    assert other.acquire(0)
    with pytest.raises(LaunchError, match="another data.prepare is working in"):
        run([], tmp_path)
    other.release()
    assert run([], tmp_path) == []


def test_a_verification_is_repeated_when_anything_it_reads_changed(tmp_path, capfd):
    work = tmp_path / "w"
    (work / "records").mkdir(parents=True)
    (work / "records" / "records.json").write_text("1")
    (tmp_path / "vocab.txt").write_text("a")
    code = f"import pathlib; pathlib.Path({str(work / 'verify.json')!r}).write_text('{{}}'); print('verifying')"
    words = ("--input", str(work / "records"), "--output_json", str(work / "verify.json"), "--vocab_file", str(tmp_path / "vocab.txt"))
    verify = command(tmp_path, code, "verify", None, *words)
    other = command(tmp_path, "pass", "shard")

    def verified(*commands: Command) -> bool:
        run(commands, work)
        return "verifying" in capfd.readouterr().out

    assert verified(other, verify) and not verified(other, verify) and not verified(verify)
    (work / "records" / "records.json").write_text("2")
    assert verified(verify), "also when verify is the only stage that runs"
    assert not verified(verify)
    (tmp_path / "vocab.txt").write_text("b")
    assert verified(verify)
    (work / "verify.json").unlink()
    assert verified(verify)
    assert verified(dataclasses.replace(verify, arguments=(*words, "--sample", "9")))
    (work / ".verified.json").write_text("{")
    assert verified(verify)
    failing = command(tmp_path, "import sys; sys.exit(1)", "verify", None, *words)
    (work / "records" / "records.json").write_text("3")
    for _ in range(2):
        with pytest.raises(LaunchError):
            run([failing], work)


def test_the_summary(tmp_path):
    one = Command("filter", "filter", Path("f.py"), ("--x", "a b"))
    counts = {"documents_in": 1000, "documents_out": 900, "rejected_a": 60, "rejected_b": 40}
    table = summarize([Outcome(one, 1.5, {"counts": counts, "seconds": 2.25}), Outcome(one, 0.1, {})], tmp_path)
    assert table.splitlines()[1].split() == ["filter", "1,000", "900", "100", "2.2", "1.5"]
    assert json.loads((tmp_path / "prepare.json").read_text())[0] == {
        "stage": "filter", "command": "python f.py --x 'a b'", "seconds_now": 1.5, "counts": counts, "seconds": 2.25,
    }  # fmt: skip


def test_a_damaged_manifest_is_named(tmp_path):
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(DataError, match=r"m\.json: damaged manifest .*delete it and run again"):
        run([command(tmp_path, "pass", "shard", "m.json")], tmp_path)


def test_no_heavy_library_is_loaded_for_the_plan():
    heavy = {"torch", "pyarrow", "datasets", "spacy", "stanza"}
    import subprocess

    code = f"import sys, data.prepare; print(sorted({heavy!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(prepare.__file__).parents[1])
    assert found.stdout.strip() == "[]", found
