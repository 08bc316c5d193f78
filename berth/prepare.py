"""All of data preparation from one configuration: which scripts run, with which options, over which folders.

In: a configuration (YAML or flags) with a work folder, inputs and a section of options for each stage. Out: the command line
of every stage in order (:func:`plan`), run one after the other (:func:`run`). Every stage is one of the scripts in ``data/`` or
``create_pretraining_data.py``, decides itself whether its work is done, and can be run by hand with the printed line.

The options of a section are those of the stage's script, checked against its argument parser before anything runs. Inputs
and outputs are wired here; language, case, seed and processes are said once and reach every script that has them.

Rejected: calling the stages as functions in one process (a crash in a native library would take everything along, memory of one
stage would burden the next), a digest of the whole configuration (a changed option of the last stage would redo the first).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from berth.corpus.download import load_sources, remotes
from berth.corpus.extract import detect_format
from berth.errors import BerthError, ConfigError, DataError, LaunchError
from berth.files import FolderLock, read_json, sha256_file, sha256_json, write_json
from berth.processes import raise_for, run_command
from berth.records.options import RecordOptions

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("download", "extract", "format", "sentences", "filter", "shard", "vocab", "records", "verify")
SCRIPTS = {
    "download": "data/download.py", "extract": "data/extract.py", "format": "data/formatting.py", "sentences": "data/sentences.py",
    "filter": "data/filter.py", "shard": "data/shard.py", "vocab": "data/vocab.py", "records": "create_pretraining_data.py",
    "verify": "data/verify.py",
}  # fmt: skip
OPTIONAL = ("download", "format", "filter")  # run only when the configuration has their section
TOP_LEVEL = ("workdir", "input", "language", "cased", "processes", "seed", "prefix", "vocab_file", "vocab_size", "stages")
SHARED = ("language", "processes", "seed")  # said once, for every script that has them
WIRED = {  # set here, so not to be set in a section
    "input", "input_folder", "input_file", "output", "output_dir", "output_file", "output_config", "output_json", "vocab_file", "text",
    "do_lower_case", "cased",
}  # fmt: skip
PHASES: tuple[dict[str, Any], ...] = (
    {"max_seq_length": 128, "max_predictions_per_seq": 20},
    {"max_seq_length": 512, "max_predictions_per_seq": 80},
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "shard": {"n_training_shards": 8, "n_test_shards": 1, "fraction_test_set": 0.05},
    "vocab": {"vocab_size": 30000, "model_size": "base"},
}
Parsers = Mapping[str, argparse.ArgumentParser]


@dataclasses.dataclass(frozen=True)
class Command:
    """One script to run: its stage, a title, its arguments, and where its manifest will be (None: it has none)."""

    stage: str
    title: str
    script: Path
    arguments: tuple[str, ...]
    manifest: Path | None = None

    @property
    def line(self) -> str:
        """What to type to run it by hand."""
        return shlex.join(["python", str(self.script), *self.arguments])


# ------------------------------------------------------------------------------------------------------- configuration


def load_config(path: Path) -> dict[str, Any]:
    """Read a YAML configuration. Raises :class:`ConfigError` naming the file and the line for YAML that cannot be read."""
    try:
        with open(path, encoding="utf-8") as handle:
            config = yaml.safe_load(handle)
    except FileNotFoundError as error:
        raise ConfigError(f"--config {path}: no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--config {path}: must hold 'name: value' pairs, not a {type(config).__name__}")
    return config


def apply_settings(config: dict[str, Any], settings: Sequence[str]) -> None:
    """Put ``stage.option=value`` settings of the command line into ``config``; values are read as YAML."""
    for setting in settings:
        name, equals, text = setting.partition("=")
        stage, dot, option = name.partition(".")
        if not (equals and dot and option and stage in STAGES):
            raise ConfigError(f"--set {setting!r} must be STAGE.OPTION=VALUE, for example filter.min_sents=1; stages: {', '.join(STAGES)}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting!r}: the value is not readable as YAML: {' '.join(str(error).split())}") from error
        if stage == "records" and not config.get(stage):
            config[stage] = [dict(phase) for phase in PHASES]
        elif not isinstance(config.get(stage), (dict, list)):
            config[stage] = {}
        for section in _list(config[stage]):
            if isinstance(section, dict):  # what is wrong with others is said by check_config
                section[option] = value


def _closest(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {found[0]!r}?" if found else f"; known: {', '.join(known)}"


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Long option names of a script, without the dashes, hyphens as underscores."""
    return {
        word[2:].replace("-", "_"): action
        for action in parser._actions
        for word in action.option_strings
        if word.startswith("--") and word != "--help"
    }


def check_config(config: Mapping[str, Any], parsers: Parsers) -> None:
    """Raise :class:`ConfigError` for everything in ``config`` that no stage understands."""
    known = [*TOP_LEVEL, *STAGES]
    for name in config:
        if name not in known:
            raise ConfigError(f"unknown name {name!r} in the configuration{_closest(str(name), known)}")
    for name in ("workdir", "language", "prefix", "vocab_file"):
        if config.get(name) is not None and not isinstance(config[name], str):
            raise ConfigError(f"{name}: {config[name]!r} must be text (in YAML, put it in quotes: no and on are read as false and true)")
    for name in ("processes", "seed", "vocab_size"):
        if config.get(name) is not None and type(config[name]) is not int:
            raise ConfigError(f"{name}: {config[name]!r} must be a whole number")
    if not isinstance(config.get("cased"), (bool, type(None))):
        raise ConfigError(f"cased: {config['cased']!r} must be true or false, without quotes")
    for name in ("input", "stages"):
        if not all(isinstance(value, str) for value in _list(config.get(name))):
            raise ConfigError(f"{name}: {config[name]!r} must be text or a list of texts")
    for stage in STAGES:
        for section in _sections(config, stage):
            options = _options(parsers[stage])
            for name in section:
                if name in WIRED:
                    raise ConfigError(f"{stage}.{name} is set by data.prepare itself; its inputs and outputs lie in the work folder")
                if name not in options:
                    raise ConfigError(f"{stage} has no option {name!r}{_closest(str(name), sorted(set(options) - WIRED))}")


def _sections(config: Mapping[str, Any], stage: str) -> list[dict[str, Any]]:
    """The option sections of a stage: one, or for records a list of them. Empty when the stage is switched off."""
    value = config.get(stage, {})
    if value is False:
        return []
    if value is None or value is True:
        value = {}
    sections = value if stage == "records" and isinstance(value, list) else [value]
    for section in sections:
        if not isinstance(section, dict):
            raise ConfigError(f"{stage}: must hold 'option: value' pairs{' or a list of them' if stage == 'records' else ''}, or false")
    return sections


def _words(name: str, value: Any, action: argparse.Action) -> list[str]:
    """An option as words of a command line. Raises :class:`ConfigError` for a value that cannot be one."""
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{name}: {value!r} must be true or false")
        if not value and action.default is True:
            raise ConfigError(f"{name}: false is not said like this; say no_{name}: true")
        return [f"--{name}"] if value else []
    if isinstance(value, bool):
        raise ConfigError(f"{name}: {value!r} is no value for it (in YAML, no, off, yes and on mean false and true: put them in quotes)")
    values = value if isinstance(value, list) else [value]
    if any(isinstance(each, (dict, list)) for each in values) or (len(values) != 1 and action.nargs not in ("+", "*")):
        raise ConfigError(f"{name}: {value!r} must be one value")
    return [f"--{name}", *map(str, values)]


# ---------------------------------------------------------------------------------------------------------------- plan


class Planner:
    """Builds the commands of one configuration; see :func:`plan`."""

    def __init__(self, config: Mapping[str, Any], parsers: Parsers) -> None:
        self.config, self.parsers = config, parsers
        if not config.get("workdir"):
            raise ConfigError("say where to work: workdir in the configuration, or --workdir DIR")
        self.workdir = Path(config["workdir"])
        self.inputs = [Path(str(path)) for path in _list(config.get("input"))]
        self.commands: list[Command] = []

    def on(self, stage: str) -> bool:
        """Whether a stage runs by its section alone."""
        if stage in OPTIONAL:
            return self.config.get(stage) not in (None, False)
        return self.config.get(stage) is not False

    def add(self, stage: str, wired: Sequence[str | Path], section: Mapping[str, Any], manifest: Path | None, title: str = "") -> None:
        """Plan one run of a stage's script: ``wired`` arguments, then shared ones, then those of ``section``."""
        words = self.words(stage, wired, section)
        self.parse(stage, words)
        self.commands.append(Command(stage, title or stage, ROOT / SCRIPTS[stage], tuple(words), manifest))

    def parse(self, stage: str, words: Sequence[str]) -> argparse.Namespace:
        """What the script's own parser makes of ``words``. Raises :class:`ConfigError` with what it says against them."""

        def refuse(message: str) -> NoReturn:
            raise ConfigError(f"{stage}: {message}")

        parser = self.parsers[stage]
        parser.error = refuse  # type: ignore[method-assign]
        return parser.parse_args(words)

    def words(self, stage: str, wired: Sequence[str | Path], section: Mapping[str, Any]) -> list[str]:
        """The arguments of a stage's script."""
        options = _options(self.parsers[stage])
        said = {"random_seed" if stage == "records" and name == "seed" else name: self.config.get(name) for name in SHARED}
        shared = {name: value for name, value in said.items() if value is not None and name in options}
        settings = {**DEFAULTS.get(stage, {}), **shared, **section}
        if "bert_config" in section:
            settings.pop("model_size", None)
        words = [str(word) for word in wired]
        for name, value in settings.items():
            words += _words(name, value, options[name])
        return words

    def plan(self) -> list[Command]:
        for stage in STAGES:
            if self.on(stage) and (sections := _sections(self.config, stage)):
                getattr(self, stage)(sections if stage == "records" else sections[0])
        return self.commands

    @property
    def case(self) -> str:
        return "--cased" if self.config.get("cased") else "--do_lower_case"

    @property
    def vocabulary(self) -> Path:
        given = self.config.get("vocab_file")
        return Path(given) if given else self.workdir / "vocab" / "vocab.txt"

    @property
    def documents(self) -> list[Path]:
        """What the stage ``sentences`` reads: the extracted documents, or the input itself when it is plain text."""
        return [self.workdir / "documents"] if self.extracts else self.inputs

    @property
    def extracts(self) -> bool:
        """Whether there is something to extract: any input but one that is text already."""
        if self.config.get("extract") is False:
            return False
        if self.config.get("extract") not in (None, True) or len(self.inputs) != 1 or self.on("download"):
            return True
        try:
            return detect_format(self.inputs[0]) != "txt"
        except BerthError:  # missing, or of several kinds: extract says what is wrong
            return True

    @property
    def prefix(self) -> str:
        """Start of the shards' names."""
        sections = _sections(self.config, "shard")
        return str((sections[0].get("prefix") if sections else None) or self.config.get("prefix") or "text")

    def download(self, section: dict[str, Any]) -> None:
        folder = self.workdir / "download"
        wired: list[str | Path] = ["--output_dir", folder]
        parsed = self.parse("download", self.words("download", wired, section))
        sources = load_sources(parsed.sources)
        files = [remote.file for name in parsed.source for remote in remotes(sources, name, parsed.language, parsed.snapshot)]
        self.inputs = [*self.inputs, *(folder / file for file in files if ".xml" in file)]  # dumps are text to train on, SQuAD is not
        self.add("download", wired, section, None)

    def extract(self, section: dict[str, Any]) -> None:
        if not self.inputs:
            raise ConfigError("there is nothing to prepare: give input (files or folders), or a download section")
        if self.extracts:
            folder = self.workdir / "documents"
            self.add("extract", ["--input", *self.inputs, "--output_dir", folder], section, folder / "extract.json")

    def format(self, section: dict[str, Any]) -> None:
        output = self.workdir / "one_article_a_line.txt"
        if len(self.documents) != 1:
            raise ConfigError("format: needs one folder of documents; leave extract on when there are several inputs")
        self.add(
            "format",
            ["--input_folder", self.documents[0], "--output_file", output],
            section,
            output.with_name(f"{output.name}.format.json"),
        )

    def sentences(self, section: dict[str, Any]) -> None:
        if len(self.documents) != 1:
            raise ConfigError("sentences: needs one file or folder; leave extract on when there are several inputs")
        folder = self.workdir / "sentences"
        self.add("sentences", ["--input", self.documents[0], "--output_dir", folder], section, folder / "sentences.json")

    def filter(self, section: dict[str, Any]) -> None:
        folder = self.workdir / "filtered"
        self.add("filter", ["--input", self.workdir / "sentences", "--output_dir", folder], section, folder / "filter.json")

    def shard(self, section: dict[str, Any]) -> None:
        source = self.workdir / ("filtered" if self.on("filter") else "sentences")
        folder = self.workdir / "shards"
        self.add("shard", ["--input", source, "--output_dir", folder], {**section, "prefix": self.prefix}, folder / "shards.json")

    def vocab(self, section: dict[str, Any]) -> None:
        if self.config.get("vocab_size") is not None:
            section = {"vocab_size": self.config["vocab_size"], **section}
        if self.config.get("vocab_file"):
            if section:
                raise ConfigError("vocab_file and a vocab section contradict each other: use the file, or train a vocabulary")
            return
        if section.get("method") == "bytelevel":
            if self.on("records"):
                raise ConfigError(
                    "vocab.method bytelevel makes a vocabulary for RoBERTa-style models, but records are WordPiece: say records: false"
                )
            wired: list[str | Path] = ["--output", self.vocabulary.parent]
        else:
            wired = ["--output", self.vocabulary, "--output_config", self.vocabulary.parent / "bert_config.json", self.case]
        self.add("vocab", ["--input", *self.training, *wired], section, self.vocabulary.with_name(f"{self.vocabulary.name}.vocab.json"))

    @property
    def training(self) -> list[Path]:
        """The training shards."""
        folder = self.workdir / "shards"
        if not self.on("shard"):
            found = sorted(folder.glob("*_training_*.txt"), key=lambda path: (len(path.name), path.name))
            return found or [folder]
        shards = {**DEFAULTS["shard"], **_sections(self.config, "shard")[0]}["n_training_shards"]
        return [folder / f"{self.prefix}_training_{number}.txt" for number in range(int(shards))]

    def records(self, sections: list[dict[str, Any]]) -> None:
        if len(sections) == 1 and "max_seq_length" not in sections[0]:
            sections = [{**phase, **sections[0]} for phase in PHASES]
        for section in sections:
            wired: list[str | Path] = ["--vocab_file", self.vocabulary, "--input_file", self.workdir / "shards", self.case]
            wired += ["--remove_stale", "--output_dir"]  # with fewer shards than before, the others' records go
            parsed = self.parse("records", self.words("records", [*wired, self.workdir], section))
            folder = self.workdir / "records" / self.records_name(parsed)
            if folder / "records.json" in [command.manifest for command in self.commands]:
                raise ConfigError(f"two sections of records would both be written to {folder}; make them differ in an option of that name")
            self.add(
                "records",
                [*wired, folder],
                section,
                folder / "records.json",
                f"records, length {section.get('max_seq_length', RecordOptions.max_seq_length)}",
            )

    def records_name(self, parsed: argparse.Namespace) -> str:
        """The folder of records: the public scripts' name, with what they do not know appended."""
        names = {"whole_word_mask": "do_whole_word_mask"}
        fields = [field.name for field in dataclasses.fields(RecordOptions) if field.name != "lowercase"]
        options = RecordOptions(lowercase=not self.config.get("cased"), **{name: getattr(parsed, names.get(name, name)) for name in fields})
        extra: list[str] = [getattr(options, name) for name in ("objective", "masking", "layout")]
        unusual = [value for value in extra if value not in (RecordOptions.objective, RecordOptions.masking, RecordOptions.layout)]
        unusual += ["whole_word"] if options.whole_word_mask else []
        unusual += [f"bin_{options.bin_size}"] if options.layout == "binned" else []
        unusual += [f"short_{options.short_seq_prob}"] if options.short_seq_prob != RecordOptions.short_seq_prob else []
        return "_".join([options.folder_name, *unusual])

    def verify(self, section: dict[str, Any]) -> None:
        folders = [command.manifest.parent for command in self.commands if command.stage == "records" and command.manifest]
        shards = self.workdir / "shards"
        wired: list[str | Path] = ["--input", *(folders or [shards]), "--output_json", self.workdir / "verify.json"]
        if folders:
            wired += ["--vocab_file", self.vocabulary, "--text", shards]
        self.add("verify", wired, section, None)


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def plan(config: Mapping[str, Any], parsers: Parsers, stages: Sequence[str] = ()) -> list[Command]:
    """The commands of ``config`` in order, of ``stages`` only if any are named. Raises :class:`ConfigError`."""
    check_config(config, parsers)
    wanted = list(stages) or [str(stage) for stage in _list(config.get("stages"))]
    for stage in wanted:
        if stage not in STAGES:
            raise ConfigError(f"unknown stage {stage!r}{_closest(stage, STAGES)}")
    commands = Planner(config, parsers).plan()
    idle = set(wanted) - {command.stage for command in commands} - {"extract"}  # extract is not needed for plain text
    if idle:
        raise ConfigError(f"asked for, but switched off or without a section in the configuration: {', '.join(sorted(idle))}")
    return [command for command in commands if not wanted or command.stage in wanted]


# ----------------------------------------------------------------------------------------------------------------- run


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stage did: seconds it took now, and its manifest ({} if it has none)."""

    command: Command
    seconds: float
    manifest: Mapping[str, Any]


def read_manifest(path: Path | None) -> dict[str, Any]:
    """A stage's manifest; {} where there is none."""
    if path is None or not path.is_file():
        return {}
    try:
        found = read_json(path)
    except ValueError as error:
        raise DataError(f"{path}: damaged manifest ({error}); delete it and run again") from error
    return found if isinstance(found, dict) else {}


def run(commands: Sequence[Command], workdir: Path) -> list[Outcome]:
    """Run the commands one after the other.

    Raises :class:`LaunchError` when one fails (its message stands above), ``SystemExit`` when it was interrupted. Running again
    goes on from there.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(workdir, ".prepare.lock")
    if not lock.acquire(wait_seconds=2):
        raise LaunchError(f"another data.prepare is working in {workdir}; wait for it, or use another work folder")
    outcomes: list[Outcome] = []
    try:
        for command in commands:
            print(f"== {command.title}: {command.line}", flush=True)
            began = time.monotonic()
            if command.stage == "verify" and _verified(command, workdir):
                print(
                    "up to date: no stage has written anything since everything was read back (delete verify.json to read it again)",
                    flush=True,
                )
            else:
                _run(command)
                if command.stage == "verify":
                    write_json(workdir / ".verified.json", {"state": _state(command, workdir)})
            outcomes.append(Outcome(command, time.monotonic() - began, read_manifest(command.manifest)))
    finally:
        lock.release()
    return outcomes


def _run(command: Command) -> None:
    code = run_command((sys.executable, str(command.script), *command.arguments))
    if code:
        raise_for(command.title, code)


def _state(command: Command, workdir: Path) -> str:
    """A digest of what a verification reads, by the manifests: its command line, folders and vocabulary."""
    seen = []
    for path in sorted({Path(word) for word in command.arguments} - {workdir / "verify.json"}):
        files = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.is_file() else []
        seen += [[str(file), sha256_file(file)] for file in files]
    return sha256_json([command.line, seen])


def _verified(command: Command, workdir: Path) -> bool:
    """Whether the last verification saw what is there now."""
    try:
        return (workdir / "verify.json").is_file() and read_json(workdir / ".verified.json")["state"] == _state(command, workdir)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def summarize(outcomes: Sequence[Outcome], workdir: Path) -> str:
    """A table of what each stage read and wrote; also written to ``prepare.json`` in the work folder."""
    lines = [f"{'stage':24} {'documents in':>12} {'out':>10} {'rejected':>9} {'work s':>8} {'now s':>7}"]
    for outcome in outcomes:
        counts = outcome.manifest.get("counts", {})
        came, went = counts.get("documents_in"), counts.get("documents_out", counts.get("documents"))
        rejected = sum(value for name, value in counts.items() if name.startswith("rejected_")) if came is not None else None
        work = outcome.manifest.get("seconds")
        row = ["" if value is None else f"{value:,}" for value in (came, went, rejected)]
        lines.append(
            f"{outcome.command.title:24} {row[0]:>12} {row[1]:>10} {row[2]:>9} {'' if work is None else f'{work:.1f}':>8} {outcome.seconds:>7.1f}"
        )
    write_json(
        workdir / "prepare.json",
        [
            {"stage": each.command.stage, "command": each.command.line, "seconds_now": round(each.seconds, 3),
             "counts": each.manifest.get("counts", {}), "seconds": each.manifest.get("seconds")}
            for each in outcomes
        ],
    )  # fmt: skip
    return "\n".join(lines)
