"""data/sentences.py as a user runs it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from berth.corpus.sentences import make_sentences
from tests.support import ROOT, environment, run_script

SCRIPT = "data/sentences.py"
TEXT = (
    "The ship left port at dawn. It carried grain and 3.5 tons of salt! Did Mr. Smith see it? He did.\n"
    "Nobody knew why. The harbour was empty. \u201cWait,\u201d he said. Then nothing. Number {number} ends here.\n"
)


def write_corpus(path, documents):
    path.write_text("\n".join(TEXT.format(number=number) for number in range(documents)), encoding="utf-8")
    return path


def succeed(*arguments, cwd=None):
    done = run_script(SCRIPT, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digest(folder):
    files = sorted(folder.glob("*.txt"))
    return [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]


PARTS = 100_000  # bytes of input a part: many parts of a small text
MAKE = "from berth.corpus.sentences import make_sentences as make\nmake({!r}, {!r}, part_bytes={}, processes={})"


def test_the_same_bytes_from_any_number_of_processes(tmp_path):
    source = write_corpus(tmp_path / "raw.txt", 3000)
    results = [make_sentences(source, tmp_path / f"out{n}", part_bytes=PARTS, processes=n) for n in (1, 2)]
    assert digest(tmp_path / "out1") == digest(tmp_path / "out2") and len(digest(tmp_path / "out1")) >= 5
    assert results[0].counts == results[1].counts
    said = succeed("--input", source, "--output", "one.txt", "--processes", 2, cwd=tmp_path)
    assert "documents in 3000 = out 3000 + without text 0" in said
    parts = sorted((tmp_path / "out1").glob("*.txt"))
    assert "\n".join(part.read_text(encoding="utf-8") for part in parts) == (tmp_path / "one.txt").read_text(encoding="utf-8")


def test_the_same_bytes_whatever_the_hash_seed(tmp_path):
    source = write_corpus(tmp_path / "raw.txt", 50)
    found = set()
    for seed in ("0", "1", "2"):
        command = [sys.executable, str(ROOT / SCRIPT), "--input", str(source), "--output", f"{seed}.txt"]
        subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.DEVNULL)
        model = (tmp_path / f"{seed}.txt.punkt.json").read_bytes()
        found.add(((tmp_path / f"{seed}.txt").read_bytes(), model))
    assert len(found) == 1


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    source = write_corpus(tmp_path / "raw.txt", 20_000)
    make_sentences(source, tmp_path / "whole", part_bytes=PARTS)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", MAKE.format(str(source), str(killed), PARTS, 1)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(list(killed.glob("sentences_*.txt"))) < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    result = make_sentences(source, killed, part_bytes=PARTS)
    assert result.kept >= 2 and result.made >= 1
    assert digest(killed) == digest(tmp_path / "whole")
    assert not list(killed.glob(".*.partial"))


def test_chinese(tmp_path):
    (tmp_path / "zh.txt").write_text("\u7b2c\u4e00\u53e5\u3002\u7b2c\u4e8c\u53e5\uff01\n", encoding="utf-8")
    for segmenter in ("nltk", "rules"):
        succeed("--input", "zh.txt", "--output", f"{segmenter}/s.txt", "--segmenter", segmenter, "--language", "zh", cwd=tmp_path)
        assert (tmp_path / segmenter / "s.txt").read_text(encoding="utf-8") == "\u7b2c\u4e00\u53e5\u3002\n\u7b2c\u4e8c\u53e5\uff01\n"


def test_a_single_long_line(tmp_path):
    line = " ".join(f"Sentence {number} of one long line stands here." for number in range(60_000))  # 3 MB
    (tmp_path / "line.txt").write_text(line)
    said = succeed("--input", "line.txt", "--output", "s.txt", "--segmenter", "rules", cwd=tmp_path)
    assert "60000 sentences in 1 documents" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--input", "raw.txt"), 2, "one of the two"),
        (("--input", "raw.txt", "--output", "a", "--output_dir", "b"), 2, "one of the two"),
        (("--input", "raw.txt", "--output", "a"), 2, "suffix"),
        (("--input", "raw.txt", "--output", "raw.txt"), 2, "overwritten"),
        (("--input", "nothing", "--output", "a.txt"), 1, "no such file"),
        (("--input", "latin1.txt", "--output", "a.txt"), 1, "latin1.txt: byte 0xe1 at offset 1 is not UTF-8"),
        (("--input", "blank.txt", "--output", "a.txt"), 1, "no text"),
        (("--input", "raw.txt", "--output", "a.txt", "--language", "klingon"), 2, "xx: any other language"),
        (("--input", "raw.txt", "--output", "a.txt", "--segmenter", "stanza"), 2, "--segmenter_model"),
        (("--input", "raw.txt", "--output", "a.txt", "--processes", "0"), 2, "--processes 0"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, code, message):
    write_corpus(tmp_path / "raw.txt", 3)
    (tmp_path / "latin1.txt").write_bytes("M\u00e1s".encode("latin-1"))
    (tmp_path / "blank.txt").write_text("\n \n")
    done = run_script(SCRIPT, *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "a.txt").exists()


def test_the_script_imports_nothing_heavy(tmp_path):
    probe = (
        f"import runpy, sys\nsys.argv = ['x', '--input', 'raw.txt', '--output', 'o.txt']\n"
        f"try: runpy.run_path({str(ROOT / SCRIPT)!r}, run_name='__main__')\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'nltk', 'spacy', 'stanza', 'transformers', 'langdetect'} & sys.modules.keys()\nassert not heavy, heavy\n"
    )
    write_corpus(tmp_path / "raw.txt", 3)
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert json.loads((tmp_path / "o.txt.sentences.json").read_text())["counts"]["documents_out"] == 3
