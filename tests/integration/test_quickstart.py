"""make pretrain's program on a small made-up text: from words to fill-mask, twice, interrupted, and with other inputs."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from berth.runlog import read_steps
from tests.support import ROOT, environment

SUBJECTS = "the captain|a farmer|our teacher|my sister|the old king|every child|a young doctor|the baker".split("|")
VERBS = "sees|builds|loves|sells|paints|remembers|carries|finds".split("|")
OBJECTS = "the ship|a red house|two horses|the long road|fresh bread|an open window|the quiet garden|his letters".split("|")
ENDINGS = "in the morning|before the war|with great care|near the river|for the people|without a word".split("|")


def write_corpus(path, documents=24, seed=0):
    """Blank-line separated documents of grammatical nonsense."""
    rng = random.Random(seed)
    sentence = lambda: " ".join(rng.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, ENDINGS)).capitalize() + "."  # noqa: E731
    path.write_text(
        "\n\n".join("\n".join(sentence() for _ in range(rng.randint(30, 60))) for _ in range(documents)) + "\n", encoding="utf-8"
    )


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 512,
    "vocab_size": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    write_corpus(folder / "text.txt")
    (folder / "tiny.json").write_text(json.dumps(TINY), encoding="utf-8")
    return folder


def command(place, workdir, *extra, corpus="text.txt"):
    return [
        sys.executable, "-m", "berth.quickstart", "--corpus", str(place / corpus), "--workdir", str(workdir), "--config", str(place / "tiny.json"),
        "--vocab_size", "200", "--steps", "12", "4", "--batch", "16", "8", "--precision", "fp32", *extra,
    ]  # fmt: skip


def run(place, workdir, *extra, corpus="text.txt", expect=0):
    done = subprocess.run(
        command(place, workdir, *extra, corpus=corpus), capture_output=True, text=True, timeout=300, env=environment(), cwd=ROOT
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def finished(place):
    return place / "work", run(place, place / "work")


def test_from_words_to_predictions(finished):
    workdir, done = finished
    summary = json.loads((workdir / "summary.json").read_text())
    for path in summary["artefacts"].values():
        assert os.path.exists(path), path
    assert (workdir / "curves.png").read_bytes()[:4] == b"\x89PNG" and (workdir / "curves.png").stat().st_size > 20_000
    first, last = summary["phases"]
    assert first["held_out_end"]["mlm_loss"] < first["held_out_start"]["mlm_loss"]
    assert len(summary["fill_mask"]) == 3 and all("[MASK]" in line and "%" in line for line in summary["fill_mask"])
    for words in ("unigram", "top token", "majority", "sequences/s:", "fill-mask:", "checkpoints, phase 2:", str(workdir / "huggingface")):
        assert words in done.stdout
    assert last["held_out_end"]["baselines"]["unigram_entropy"] > 3
    assert ("has learned" in done.stdout) == summary["learned"]


def test_transformers_loads_the_export_completely(finished):
    import transformers

    workdir, _ = finished
    _, info = transformers.BertForPreTraining.from_pretrained(workdir / "huggingface", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "huggingface")
    config = transformers.AutoConfig.from_pretrained(workdir / "huggingface")
    pieces = (workdir / "vocab" / "vocab.txt").read_text().splitlines()
    assert len(tokenizer) == config.vocab_size == len(pieces)


def test_the_second_run_skips_everything(place, finished):
    workdir, first = finished
    stamps = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.pt")}
    again = run(place, workdir)
    assert again.stdout.count(": up to date") == 8 and "nan" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*.pt")} == stamps
    table = first.stdout[first.stdout.index("held-out records") :]
    assert again.stdout[again.stdout.index("held-out records") :] == table


def test_changed_text_rebuilds_and_nothing_is_mixed_or_lost(place, tmp_path):
    write_corpus(tmp_path / "text.txt", seed=1)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    run(tmp_path, tmp_path / "work")
    old = (tmp_path / "work" / "results" / "phase1" / "ckpt_12.pt").read_bytes()
    write_corpus(tmp_path / "text.txt", seed=2, documents=30)
    done = run(tmp_path, tmp_path / "work")
    assert ": up to date" not in done.stdout
    assert (tmp_path / "work" / "results" / "phase1.previous-1" / "ckpt_12.pt").read_bytes() == old
    # other training options alone leave the data stages as they are
    done = run(tmp_path, tmp_path / "work", "--learning_rate", "2e-2", "4e-3")
    assert done.stdout.count(": up to date") == 5


@pytest.mark.parametrize(("phase", "step"), [(1, 5), (2, 14)])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_it_goes_on(place, finished, tmp_path, phase, step, number):
    """The whole process group dies (kill -9) or is asked to stop (Ctrl-C); the same command finishes with the same losses."""
    workdir = tmp_path / "work"
    process = subprocess.Popen(
        command(place, workdir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), cwd=ROOT, start_new_session=True
    )
    log = workdir / "results" / f"phase{phase}" / "dllogger.json"
    end = time.monotonic() + 120
    while not (log.exists() and step in read_steps(log)):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, number)
    code = process.wait(timeout=60)
    assert code == (130 if number == signal.SIGINT else -signal.SIGKILL)
    done = run(place, workdir)
    assert f"== phase {phase}: up to date" not in done.stdout and "== sentences: up to date" in done.stdout
    expected = {
        n: (d["average_loss"], d["batch_crc32"]) for n, d in read_steps(finished[0] / "results" / f"phase{phase}" / "dllogger.json").items()
    }
    found = {n: (d["average_loss"], d["batch_crc32"]) for n, d in read_steps(log).items()}
    assert found == expected


def test_another_way_of_typing_the_same_is_the_same(place, finished, tmp_path):
    """A moved text with equal content, a relative work folder, another path to Python."""
    workdir, _ = finished
    (tmp_path / "moved.txt").write_bytes((place / "text.txt").read_bytes())
    words = command(place, os.path.relpath(workdir, ROOT), corpus=str(tmp_path / "moved.txt"))
    (tmp_path / "python-again").symlink_to(sys.executable)
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, env=environment(), cwd=ROOT)
    assert done.returncode == 0 and done.stdout.count(": up to date") == 8, done.stdout + done.stderr


def test_only_the_driver_is_killed(place, finished, tmp_path):
    """kill -9 of the driver alone: its stage ends with it, a second run waits for that and goes on, losing nothing."""
    workdir = tmp_path / "work"
    process = subprocess.Popen(
        [*command(place, workdir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        cwd=ROOT,
        start_new_session=True,
    )
    log = workdir / "results" / "phase1" / "dllogger.json"
    end = time.monotonic() + 120
    while not (log.exists() and 3 in read_steps(log)):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.wait()
    run(place, workdir)
    expected = {n: d["batch_crc32"] for n, d in read_steps(finished[0] / "results" / "phase1" / "dllogger.json").items()}
    assert {n: d["batch_crc32"] for n, d in read_steps(log).items()} == expected


def test_text_without_spaces_and_with_special_tokens(tmp_path):
    rng = random.Random(3)
    characters = [chr(0x4E00 + number) for number in range(60)]
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    line = lambda: "".join(rng.choice(characters) for _ in range(12)) + "\u3002"  # noqa: E731
    (tmp_path / "text.txt").write_text("\n\n".join("\n".join(line() for _ in range(12)) for _ in range(6)), encoding="utf-8")
    done = run(tmp_path, tmp_path / "work")
    assert len(json.loads((tmp_path / "work" / "summary.json").read_text())["fill_mask"]) == 3
    write_corpus(tmp_path / "text.txt", documents=5)
    text = (tmp_path / "text.txt").read_text().replace("ship", "[MASK] ship")
    (tmp_path / "text.txt").write_text(text)
    done = run(tmp_path, tmp_path / "work2")
    assert "Traceback" not in done.stderr and "1 training shards" in done.stdout


def test_a_folder_is_one_document_a_file(place, tmp_path):
    for number, document in enumerate((place / "text.txt").read_text().split("\n\n")[:12]):
        (tmp_path / "texts" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / "deep" / f"{number}.txt").write_text(document)
    done = run(place, tmp_path / "work", corpus=str(tmp_path / "texts"))
    assert "in 12 documents from 12 file(s)" in done.stdout


def test_bad_corpora(place, tmp_path):
    cases = {"empty.txt": b" \n\n", "latin.txt": "Árvíz.\n\nTükör.\n".encode("iso8859-2"), "one.txt": b"One document. Of two sentences.\n"}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    assert "offset 0" in run(place, tmp_path / "w", corpus=str(tmp_path / "latin.txt"), expect=1).stderr
    assert "empty.txt" in run(place, tmp_path / "w", corpus=str(tmp_path / "empty.txt"), expect=1).stderr
    assert "document" in run(place, tmp_path / "w", corpus=str(tmp_path / "one.txt"), expect=1).stderr
    done = run(place, tmp_path / "absent", corpus=str(tmp_path / "none"), expect=1)
    assert "CORPUS" in done.stderr and not (tmp_path / "absent").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("Important.")
    assert "holds other files" in run(place, tmp_path / "mine", expect=2).stderr
    assert "inside the corpus folder" in run(place, tmp_path / "mine" / "work", corpus=str(tmp_path / "mine"), expect=2).stderr
    (tmp_path / "short.json").write_text(json.dumps({**TINY, "max_position_embeddings": 128}))
    assert "phase 2 needs 512" in run(place, tmp_path / "absent", "--config", str(tmp_path / "short.json"), expect=2).stderr
    assert "at least 1" in run(place, tmp_path / "absent", "--steps", "0", "1", expect=2).stderr
    for name in cases:
        done = run(place, tmp_path / "w", corpus=str(tmp_path / name), expect=1)
        assert "Traceback" not in done.stderr
