"""data/vocab.py, data/spmtrain.py, data/sent2wordpiece.py as a user runs them."""

import json
import os
import subprocess
import sys

import pytest

from berth.text.tokenizer import load_tokenizer
from berth.text.vocabulary import SPECIAL_TOKENS, Vocabulary
from tests.support import ROOT, run_script

SYLLABLES = ["ka", "lo", "mi", "ren", "tos", "ű", "vil", "ost", "Én", "qu", "zza", "ph", "ör", "汉", "字,"]
METHODS = ["wordpiece", "sentencepiece", "bytelevel"]


def write_text(path, words=4000, seed=1):
    """Pseudo-random words of syllables: many pairs of equal frequency, which is where determinism breaks."""
    number, made = seed, []
    for _ in range(words):
        number = (number * 1103515245 + 12345) % (1 << 31)
        made.append("".join(SYLLABLES[(number >> (9 + 4 * part)) % len(SYLLABLES)] for part in range(1 + (number >> 8) % 4)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(" ".join(made[at : at + 8]) + "." for at in range(0, words, 8)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_text(folder / "in" / "a.txt")
    write_text(folder / "in" / "deep" / "b.txt", seed=2)
    return folder / "in"


def vocab(*arguments, cwd):
    return run_script("data/vocab.py", *arguments, cwd=cwd)


def succeed(*arguments, cwd):
    done = vocab(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no noise"
    return done.stdout


def name_of(method):
    return "out" if method == "bytelevel" else "out.txt"


def contents(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file.read_bytes() for file in files]


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_whatever_the_process(text, tmp_path, method):
    made = []
    for seed, threads, processes in (("0", "1", 1), ("1", "4", 2), ("random", "2", 1)):
        folder = tmp_path / seed
        command = [sys.executable, ROOT / "data/vocab.py", "--input", text, "--vocab_size", "400", "--method", method, "--cased",
                   "--processes", str(processes), "--output", folder / name_of(method)]  # fmt: skip
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        subprocess.run(list(map(str, command)), check=True, env=environment, stdout=subprocess.DEVNULL)
        made.append(contents(folder / name_of(method)))
    assert made[0] == made[1] == made[2]
    assert json.loads((tmp_path / "0" / f"{name_of(method)}.vocab.json").read_text())["counts"]["size"] == 400


@pytest.mark.parametrize("method", METHODS)
def test_made_once_and_again_when_something_changed(tmp_path, method):
    path, output = write_text(tmp_path / "a.txt"), tmp_path / name_of(method)
    arguments = ["--input", path, "--output", output, "--method", method, "--cased", "--vocab_size", 350, "--report", "r.json"]
    assert "fertility" in succeed(*arguments, cwd=tmp_path)
    first, manifest = contents(output), output.with_name(f"{output.name}.vocab.json")
    times = [file.stat().st_mtime_ns for file in (manifest, tmp_path / "r.json")]
    assert "up to date" in succeed(*arguments, "--processes", 2, cwd=tmp_path)
    assert times == [file.stat().st_mtime_ns for file in (manifest, tmp_path / "r.json")]
    assert "up to date" not in succeed(*arguments, "--vocab_size", 351, cwd=tmp_path)
    assert contents(output) != first
    assert "up to date" not in succeed(*arguments, cwd=tmp_path)
    assert contents(output) == first
    damaged = output / "merges.txt" if method == "bytelevel" else output
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert "up to date" not in succeed(*arguments, cwd=tmp_path)
    assert contents(output) == first, "a damaged output is made again"
    write_text(path, words=4100)
    assert "up to date" not in succeed(*arguments, cwd=tmp_path)
    manifest.write_text("{")
    assert "up to date" not in succeed(*arguments, cwd=tmp_path), "a damaged manifest is no reason to stop"


def test_manifest_report_and_configuration(text, tmp_path):
    evaluated = tmp_path / "held_out.txt"
    evaluated.write_text("kalo lomi Ж 汉字\n", encoding="utf-8")
    said = succeed(
        "--input", text, "--output", "work/v.txt", "--vocab_size", 203, "--cased", "--unused", 3, "--model_size", "tiny",
        "--evaluate", evaluated, "--report", "report.json", cwd=tmp_path,
    )  # fmt: skip
    vocabulary = Vocabulary.load(tmp_path / "work" / "v.txt")
    assert vocabulary.pieces[:8] == ("[PAD]", "[unused0]", "[unused1]", "[unused2]", *SPECIAL_TOKENS[1:])
    config = json.loads((tmp_path / "work" / "bert_config.json").read_text())
    assert (vocabulary.size, config["vocab_size"], config["hidden_size"]) == (203, 208, 192)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (report["report"]["words"], report["report"]["unk_words"], report["report"]["unk_word_share"]) == (5, 1, 0.2)
    assert report["report"]["character_coverage"] == pytest.approx(10 / 11) and "20.0000 %" in said
    manifest = json.loads((tmp_path / "work" / "v.txt.vocab.json").read_text(encoding="utf-8"))
    assert [entry["file"] for entry in manifest["inputs"]] == ["a.txt", "b.txt"]
    assert manifest["counts"] == report["counts"] and manifest["counts"]["words"] > 8000
    assert manifest["outputs"].keys() == {"v.txt", "output_config", "report"} and manifest["seconds"] > 0


def test_sentencepiece_pieces_can_all_be_used(text, tmp_path):
    arguments = ["--input", text, "--method", "sentencepiece", "--vocab_size", 500, "--cased"]
    succeed(*arguments, "--output", "v.txt", cwd=tmp_path)
    vocabulary = Vocabulary.load(tmp_path / "v.txt")
    assert vocabulary.size == 500 and vocabulary.pieces[100] == "[unused99]"
    content = (text / "a.txt").read_text(encoding="utf-8")
    tokens = load_tokenizer(vocabulary, lowercase=False, special_tokens=False).encode(content).tokens
    assert "[UNK]" not in tokens
    assert not [piece for piece in vocabulary.pieces[105:] if "." in piece and piece != "."]
    succeed(*arguments, "--no_pretokenize", "--output", "raw.txt", cwd=tmp_path)
    raw = Vocabulary.load(tmp_path / "raw.txt")
    assert raw.size == 500 and [piece for piece in raw.pieces if piece.endswith(".") and len(piece.removeprefix("##")) > 1]


def test_sample_is_repeatable(text, tmp_path):
    arguments = ["--input", text, "--vocab_size", 300, "--sample_bytes", 20000]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        succeed(*arguments, "--seed", seed, "--output", f"{name}.txt", cwd=tmp_path)
    a, b, c = ((tmp_path / f"{name}.txt").read_bytes() for name in "abc")
    assert a == b != c
    counts = json.loads((tmp_path / "a.txt.vocab.json").read_text())["counts"]
    assert 10_000 < counts["bytes_counted"] < 30_000 < counts["bytes_in"]


def test_roberta_folder(text, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    succeed("--input", text, "--method", "bytelevel", "--vocab_size", 400, "--output", "r", "--model_size", "tiny", cwd=tmp_path)
    tokenizer = transformers.RobertaTokenizerFast.from_pretrained(str(tmp_path / "r"))
    line = (text / "a.txt").read_text(encoding="utf-8").splitlines()[0]
    assert tokenizer.decode(tokenizer(line)["input_ids"], skip_special_tokens=True) == line
    config = transformers.AutoConfig.from_pretrained(str(tmp_path / "r"))
    assert (config.model_type, config.vocab_size, config.pad_token_id, config.type_vocab_size) == ("roberta", 400, 1, 1)
    assert config.max_position_embeddings == 514


def test_classic_two_scripts(text, tmp_path):
    arguments = ["--model_prefix=bert", "--vocab_size=300", "--input_sentence_size=100000000", "--shuffle_input_sentence=true",
                 "--character_coverage=0.9999", "--model_type=bpe"]  # fmt: skip
    done = run_script("data/spmtrain.py", text / "a.txt", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    named = run_script("data/spmtrain.py", f"--input={text / 'a.txt'}", *arguments[1:], "--model_prefix=b", "--num_threads=1", cwd=tmp_path)
    assert named.returncode == 0, named.stderr
    assert (tmp_path / "bert.vocab").read_bytes() == (tmp_path / "b.vocab").read_bytes()
    done = run_script("data/sent2wordpiece.py", "bert.vocab", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 300 - 4 + 105 and lines[0] == "[PAD]" and f"vocab_size of the model must be {len(lines)}" in done.stderr
    done = run_script("data/sent2wordpiece.py", "bert.vocab", "-u", 10, "-c", "--size", 300, "-o", "v.txt", cwd=tmp_path)
    assert done.returncode == 0 and Vocabulary.load(tmp_path / "v.txt").size == 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.model", "b.vocab", "bert.model", "bert.vocab", "v.txt"]


FAILURES = [
    (["--input", "empty.txt"], 1, "empty.txt: no word"),
    (["--input", "none.txt"], 1, "none.txt: no such file or folder"),
    (["--input", "folder"], 1, "folder: no .txt file"),
    (["--input", "latin.txt"], 1, "latin.txt: byte 0xe9 at offset 3 is not UTF-8"),
    (["--input", "latin.txt", "--processes", "2"], 1, "latin.txt: byte 0xe9 at offset 3 is not UTF-8"),
    (["--input", "a.txt", "--vocab_size", "20"], 2, "--vocab_size 20 is too small"),
    (["--input", "a.txt", "--vocab_size", "90", "--method", "sentencepiece"], 2, "--vocab_size 90 is too small"),
    (["--input", "a.txt", "--vocab_size", "99999", "--method", "sentencepiece"], 2, "the largest possible with these options is"),
    (["--input", "a.txt", "--vocab_size", "200", "--method", "bytelevel"], 2, "need 261"),
    (["--input", "a.txt", "--method", "bytelevel", "--do_lower_case"], 2, "leave --do_lower_case out"),
    (["--input", "a.txt", "--no_pretokenize"], 2, "--no_pretokenize goes with --method sentencepiece"),
    (["--input", "a.txt", "--processes", "0"], 2, "--processes 0 must be at least 1"),
    (["--input", "a.txt", "--character_coverage", "1.5"], 2, "--character_coverage 1.5"),
    (["--input", "a.txt", "--unused", "-2"], 2, "--unused -2"),
    (["--input", "a.txt", "--evaluate", "none.txt"], 1, "--evaluate none.txt: no such file"),
    (["--input", "a.txt", "--evaluate", "empty.txt"], 1, "--evaluate empty.txt holds no word"),
    (["--input", "a.txt", "--report", "a.txt"], 2, "--report a.txt is also an input"),
    (["--input", "a.txt", "--report", "x"], 2, "--report x is also an input"),
    (["--input", ".", "--method", "bytelevel"], 2, "lies in the input folder"),
    (["--input", "a.txt", "--output_config", "a.txt", "--model_size", "tiny"], 2, "--output_config a.txt is also an input"),
    (["--input", "a.txt", "--model_size", "huge"], 2, "invalid choice: 'huge'"),
    (["--input", "a.txt", "--output_config", "c.json"], 2, "go together"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), FAILURES)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, arguments, code, message):
    write_text(tmp_path / "a.txt", words=400)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    size = [] if "--vocab_size" in arguments else ["--vocab_size", "300"]
    done = vocab(*arguments, *size, "--output", "x", cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].count("error: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("script", "arguments", "code", "message"),
    [
        ("data/spmtrain.py", ["a.txt", "--vocab_size=50"], 2, "--model_prefix is required"),
        ("data/spmtrain.py", ["--model_prefix=m", "--vocab_size=50"], 2, "name the text once"),
        ("data/spmtrain.py", ["a.txt", "--model_prefix=m", "--vocab_size=50", "--split_digits", "true"], 2, "--name=value"),
        ("data/spmtrain.py", ["empty.txt", "--model_prefix=m", "--vocab_size=50"], 1, "empty.txt: no text"),
        ("data/sent2wordpiece.py", ["a.txt"], 1, "a.txt: line 1 is not"),
        ("data/sent2wordpiece.py", ["none.vocab"], 1, "none.vocab: no such"),
    ],
)
def test_wrong_use_of_the_classic_scripts(tmp_path, script, arguments, code, message):
    write_text(tmp_path / "a.txt", words=400)
    (tmp_path / "empty.txt").write_text("")
    done = run_script(script, *arguments, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("script", ["data/vocab.py", "data/spmtrain.py", "data/sent2wordpiece.py"])
def test_help_needs_no_optional_library(script, tmp_path):
    probe = (
        f"import runpy, sys; sys.modules['sentencepiece'] = None; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", probe], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert "default" in done.stdout and "python data/" in done.stdout
