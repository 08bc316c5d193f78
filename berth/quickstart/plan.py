"""The stages of ``make pretrain`` as data: which script, with which options, in which order."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from pathlib import Path

import berth
from berth.errors import ConfigError, DataError
from berth.files import sha256_file, sha256_json
from berth.launch.clusters import load_cluster
from berth.launch.matrix import load_matrix
from berth.launch.plan import Job, Run, make_plan
from berth.launch.rows import Row
from berth.launch.submission import run_local
from berth.quickstart.stages import Stage
from berth.records import records_folder_name
from berth.text.lines import text_files

ROOT = Path(berth.__file__).resolve().parent.parent
PREFIX = "corpus"
MASKED_LM_PROB = 0.15


@dataclasses.dataclass(frozen=True)
class Phase:
    """One pretraining phase of the demonstration: shape of the records, batch and recipe."""

    number: int
    seq_length: int
    predictions: int
    batch: int
    accumulation: int
    steps: int
    learning_rate: float
    warmup: float
    dupe_factor: int
    eval_samples: int


@dataclasses.dataclass(frozen=True)
class Demo:
    """All choices of one ``make pretrain``. Sizes are for a minutes-long run on two cores, not for a useful model.

    Args:
        corpus: a text file or a folder of .txt.
        workdir: where everything goes.
    """

    corpus: Path
    workdir: Path
    config: Path
    documents: str = "auto"
    cased: bool = False
    vocab_size: int = 8000
    precision: str = "fp32"
    device: str = "cpu"
    seed: int = 42
    training_shards: int = 2
    fraction_test_set: float = 0.05
    phases: tuple[Phase, ...] = ()

    @property
    def places(self) -> tuple[tuple[str, str], ...]:
        """Paths that count by name in a stage's key; the text itself counts by its digest."""
        return ((str(self.workdir), "WORKDIR"), (str(self.corpus), "CORPUS"), (str(self.config), "CONFIG"), (str(ROOT), "ROOT"))

    @property
    def sentences(self) -> Path:
        return self.workdir / "text" / "sentences.txt"

    @property
    def shards(self) -> Path:
        return self.workdir / "text" / "shards"

    @property
    def vocab(self) -> Path:
        return self.workdir / "vocab" / "vocab.txt"

    @property
    def model_config(self) -> Path:
        return self.workdir / "vocab" / "bert_config.json"

    @property
    def huggingface(self) -> Path:
        return self.workdir / "huggingface"

    def records(self, phase: Phase) -> Path:
        """Folder of one phase's records, training and held-out shards together."""
        name = records_folder_name(
            lowercase=not self.cased, max_seq_length=phase.seq_length, max_predictions_per_seq=phase.predictions,
            masked_lm_prob=MASKED_LM_PROB, random_seed=self.seed, dupe_factor=phase.dupe_factor,
        )  # fmt: skip
        return self.workdir / "records" / name

    def results(self, phase: Phase) -> Path:
        """``--output_dir`` of one phase."""
        return self.workdir / "results" / f"phase{phase.number}"

    def checkpoint(self, phase: Phase) -> Path:
        """The checkpoint at the end of a phase; phase 2 counts on from phase 1."""
        steps = sum(other.steps for other in self.phases if other.number <= phase.number)
        return self.results(phase) / f"ckpt_{steps}.pt"


def corpus_digest(corpus: Path) -> str:
    """Digest of the text: names below the corpus folder and contents.

    Raises :class:`DataError` when there is no text.
    """
    if not corpus.exists():
        raise DataError(f"the corpus {corpus} does not exist; CORPUS is a text file or a folder of .txt files")
    return sha256_json([[os.path.relpath(file, corpus), sha256_file(file)] for file in text_files(corpus)])


def script(name: str, *arguments: object) -> tuple[str, ...]:
    """argv of one of the project's scripts.

    Raises :class:`ConfigError` when berth was installed without its scripts.
    """
    path = ROOT / name
    if not path.is_file():
        raise ConfigError(f"{path} is missing: the demonstration runs from a clone of the project (make setup; make pretrain)")
    return (sys.executable, str(path), *(str(argument) for argument in arguments))


def sentences_stage(demo: Demo) -> Stage:
    """Raw text -> sentences."""
    return Stage(
        "sentences",
        script("data/sentences.py", "--input", demo.corpus, "--output", demo.sentences, "--documents", demo.documents),
        (demo.sentences,),
        (corpus_digest(demo.corpus),),
        demo.places,
    )


def fit_to_documents(demo: Demo) -> Demo:
    """Choose shards for the number of documents that were found; each shard needs two.

    Raises :class:`DataError` when there are too few for a training and a held-out shard.
    """
    with open(demo.sentences, encoding="utf-8") as handle:
        documents, inside = 0, False
        for line in handle:
            documents += bool(line.strip()) and not inside
            inside = bool(line.strip())
    if documents < 4:
        raise DataError(
            f"{demo.corpus} holds {documents} document(s); at least 4 are needed, two to train on and two to hold out (a random next sentence comes "
            "from another document). In one file separate documents by blank lines; in a folder each file is one, unless "
            "ARGS='--documents blank_line' says that blank lines separate them there too"
        )
    shards = min(demo.training_shards, max(1, documents // 10))
    return dataclasses.replace(demo, training_shards=shards, fraction_test_set=max(demo.fraction_test_set, 2.01 / documents))


def text_stages(demo: Demo, sentences: Stage) -> list[Stage]:
    """Sentences -> shards -> vocabulary."""
    case = "--cased" if demo.cased else "--do_lower_case"
    shards = Stage(
        "shards",
        script(
            "data/shard.py", "--input", demo.sentences, "--output_dir", demo.shards, "--prefix", PREFIX,
            "--n_training_shards", demo.training_shards, "--n_test_shards", 1, "--fraction_test_set", demo.fraction_test_set,
            "--seed", demo.seed,
        ),
        (demo.shards,),
        (sentences.key,),
        demo.places,
    )  # fmt: skip
    training = [demo.shards / f"{PREFIX}_training_{number}.txt" for number in range(demo.training_shards)]
    vocab = Stage(
        "vocabulary",
        script(
            "data/vocab.py", "--input", *training, "--vocab_size", demo.vocab_size, "--output", demo.vocab, case,
            "--bert_config", demo.config, "--output_config", demo.model_config,
        ),
        (demo.vocab, demo.model_config),
        (shards.key, sha256_json(demo.config.read_text(encoding="utf-8"))),
        demo.places,
    )  # fmt: skip
    return [shards, vocab]


def records_stage(demo: Demo, phase: Phase, depends: tuple[str, ...]) -> Stage:
    """Shards -> hdf5 records of one phase."""
    return Stage(
        f"records of phase {phase.number}",
        script(
            "create_pretraining_data.py", "--vocab_file", demo.vocab, "--input_file", demo.shards,
            "--output_dir", demo.records(phase), "--max_seq_length", phase.seq_length,
            "--max_predictions_per_seq", phase.predictions, "--masked_lm_prob", MASKED_LM_PROB,
            "--random_seed", demo.seed, "--dupe_factor", phase.dupe_factor, "--cased" if demo.cased else "--do_lower_case",
        ),
        (demo.records(phase),),
        depends,
        demo.places,
        folder=demo.records(phase),
    )  # fmt: skip


def training_stage(demo: Demo, phase: Phase, depends: tuple[str, ...]) -> Stage:
    """One phase, as a job of the launcher on this machine. It always resumes, so an interrupted run goes on."""
    job = training_job(demo, phase)
    program = job.steps[-1].program
    words = program[program.index("run_pretraining.py") + 1 :]
    return Stage(
        f"phase {phase.number}",
        script("run_pretraining.py", *words),
        (demo.checkpoint(phase),),
        depends,
        demo.places,
        folder=demo.results(phase),
        start=functools.partial(run_local, job),
    )


def training_job(demo: Demo, phase: Phase) -> Job:
    """The plan of one phase: recipe `demo` with this run's steps, batch and rate, on the platform `local`. Phase 2 starts from the end of phase 1."""
    matrix = load_matrix()
    base = matrix.recipes["demo"]
    recipe = dataclasses.replace(
        base.phases[phase.number], max_seq_length=phase.seq_length, max_predictions_per_seq=phase.predictions, max_steps=phase.steps,
        global_batch=phase.batch, learning_rate=phase.learning_rate, warmup_proportion=phase.warmup,
        num_steps_per_checkpoint=max(5, phase.steps // 10),
        options={"eval_samples": phase.eval_samples, "eval_freq": max(1, phase.steps // 5)},
    )  # fmt: skip
    platform = dataclasses.replace(matrix.platforms["local"], device=demo.device, precisions=(demo.precision,))
    row = Row(
        platform, 1, phase.number, demo.precision, phase.batch // phase.accumulation,
        dataclasses.replace(base, phases={phase.number: recipe}), source="make pretrain",
    )  # fmt: skip
    folder = demo.results(phase)
    run = Run(
        name=folder.name,
        results=str(folder.parent),
        inputs={phase.number: str(demo.records(phase))},
        config_file=str(demo.model_config),
        vocab_file=str(demo.vocab),
        seed=demo.seed,
        init_checkpoint=str(demo.checkpoint(demo.phases[0])) if phase.number == 2 else None,
        evaluate=True,
    )
    cluster = dataclasses.replace(load_cluster("local"), python=sys.executable)
    return make_plan(run, cluster, {phase.number: row}, [f"phase{phase.number}"]).jobs[0]


def export_stage(demo: Demo, depends: tuple[str, ...]) -> Stage:
    """Last checkpoint -> Hugging Face folder."""
    return Stage(
        "export",
        script(
            "convert_checkpoint.py", "to_huggingface", "--checkpoint", demo.checkpoint(demo.phases[-1]), "--vocab_file", demo.vocab,
            "--cased" if demo.cased else "--do_lower_case", "--output_dir", demo.huggingface,
        ),
        (demo.huggingface,),
        depends,
        demo.places,
    )  # fmt: skip
