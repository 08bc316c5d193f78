"""data/filter.py as a user runs it."""

import dataclasses
import json
import random

import pytest

from berth.corpus.filtering import FilterOptions, filter_documents
from tests.support import run_script

SCRIPT = "data/filter.py"
HUNGARIAN = (
    "a haj\u00f3 reggel kifutott kik\u00f6t\u0151b\u0151l \u00e9s d\u00e9lre tartott mert kapit\u00e1ny szerint sz\u00e9l onnan f\u00fajt gyermekek integettek partr\u00f3l am\u00edg l\u00e1tt\u00e1k "
    "feh\u00e9r vitorl\u00e1t id\u0151s hal\u00e1sz azt mondta hogy estig biztosan vihar lesz ez\u00e9rt mindenki hazament vacsor\u00e1zni f\u0171szeres levest \u0151szi gy\u00fcm\u00f6lcs\u00f6t"
).split()


def document(seed: int, sentences: int = 6) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(HUNGARIAN, k=12)).capitalize() + "." for _ in range(sentences)]


def write(path, documents):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join("\n".join(lines) for lines in documents) + "\n", encoding="utf-8")
    return path


def read(path):
    text = path.read_text(encoding="utf-8")
    return [block.split("\n") for block in text.rstrip("\n").split("\n\n")] if text else []


def succeed(*arguments, cwd):
    done = run_script(SCRIPT, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def counts(path):
    return json.loads(path.read_text(encoding="utf-8"))["counts"]


BAD = {
    "avg_len": ["Egy k\u00e9t"] * 30,
    "min_sents": document(1, 2) * 1,
    "digit": [line + " 1234567890" for line in document(2)],
    "foreign": [line + " \u0441\u043b\u043e\u0432\u043e" for line in document(3)],
}
GOOD = [document(seed) for seed in range(10, 22)]
BASE = ("--input", "in.txt", "--language", "hu", "--langdetect", "none")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "in.txt", GOOD[:6] + list(BAD.values()) + GOOD[6:])
    return tmp_path


def test_reasons_add_up(folder):
    said = succeed(*BASE, "--output", "out.txt", "--report", "report.json", cwd=folder)
    assert read(folder / "out.txt") == GOOD
    found = counts(folder / "out.txt.filter.json")
    rejected = {name: value for name, value in found.items() if name.startswith("rejected_") and value}
    assert rejected == {f"rejected_{name}": 1 for name in BAD}
    assert found["documents_in"] == 16 == found["documents_out"] + sum(rejected.values())
    assert "documents in 16 = passed 12 + rejected 4" in said
    rows = {row["reason"]: row for row in json.loads((folder / "report.json").read_text())["reasons"]}
    assert rows["pass-all"] == {"reason": "pass-all", "documents": 12, "percent": 75.0}
    assert rows["fail-foreign"]["documents"] == 1 and "fail-upper" not in rows


def test_the_classic_spellings(folder):
    long = succeed(
        *BASE, "--output", "a.txt", "--avg_len", 3, "--min_sents", 2, "--max_sents", 5, "--min_toks", 1, "--max_toks", 900, "--no_word_ratio", 0.3,
        "--punct_ratio", 0.2, "--upper_ratio", 0.2, "--digit_ratio", 0.3, "--foreign_ratio", 0.5, "--min_words", 3, cwd=folder,
    )  # fmt: skip
    hyphens = succeed(
        "--input", "in.txt", "--language", "hu", "--langdetect", "none", "--output", "b.txt", "--avg-len", 3, "--min-sents", 2, "--max-sents", 5,
        "--min-toks", 1, "--max-toks", 900, "--no-word-ratio", 0.3, "--punct-ratio", 0.2, "--upper-ratio", 0.2, "--digit-ratio", 0.3,
        "--foreign-ratio", 0.5, "--min-words", 3, cwd=folder,
    )  # fmt: skip
    letters = succeed(
        "--input", "in.txt", "--language", "hu", "-l", "none", "--output", "c.txt", "-a", 3, "-s", 2, "-S", 5, "-t", 1, "-T", 900, "-n", 0.3,
        "-p", 0.2, "-u", 0.2, "-d", 0.3, "-F", 0.5, "-w", 3, "-W", "a-z\u00e1\u00e9\u00ed\u00f3\u00f6\u00fa\u00fc\u0151\u0171", cwd=folder,
    )  # fmt: skip
    tables = [said.split(".txt:")[0].rsplit("\n", 1)[0] for said in (long, hyphens, letters)]
    assert tables[0] == tables[1] == tables[2] and "fail-max_sents" in tables[0]
    assert (folder / "a.txt").read_bytes() == (folder / "b.txt").read_bytes() == (folder / "c.txt").read_bytes()


def test_inverted_and_limited(folder):
    succeed(*BASE, "--output", "out.txt", "--invert", cwd=folder)
    assert read(folder / "out.txt") == list(BAD.values())
    found = counts(folder / "out.txt.filter.json")
    assert (found["documents_in"], found["documents_out"], found["documents_passed"]) == (16, 4, 12)
    succeed(*BASE, "-L", 8, "--output", "first.txt", cwd=folder)
    assert counts(folder / "first.txt.filter.json")["documents_in"] == 8
    assert read(folder / "first.txt") == GOOD[:6]


def test_cleaning_and_character_sets(tmp_path):
    lines = ["A\u0301rvi\u0301ztu\u030bro\u030b\u00ad t\u00fck\u00f6r\u00a0f\u00far\u00f3 \ufffd\u2603 v\u00e9ge.", "\u200b"]
    write(tmp_path / "in.txt", [lines, ["\u200b"]])
    base = ("--input", "in.txt", "--no_heuristics")
    succeed(*base, "--output", "a.txt", cwd=tmp_path)
    assert (tmp_path / "a.txt").read_text(
        encoding="utf-8"
    ) == "\u00c1rv\u00edzt\u0171r\u0151 t\u00fck\u00f6r f\u00far\u00f3 \u2603 v\u00e9ge.\n"
    found = counts(tmp_path / "a.txt.filter.json")
    assert (found["characters_removed"], found["rejected_empty"], found["documents_out"]) == (4, 1, 1)
    succeed(*base, "--output", "b.txt", "--charset", "latin2", "--language", "hu", cwd=tmp_path)
    assert (tmp_path / "b.txt").read_text(encoding="utf-8") == "\u00c1rv\u00edzt\u0171r\u0151 t\u00fck\u00f6r f\u00far\u00f3 v\u00e9ge.\n"
    succeed(*base, "--output", "c.txt", "--no_clean", cwd=tmp_path)
    assert "\u00ad" in (tmp_path / "c.txt").read_text(encoding="utf-8")


def test_empty_parts_are_no_documents(tmp_path):
    write(tmp_path / "in" / "a.txt", GOOD[:3])
    (tmp_path / "in" / "b.txt").write_text("")
    write(tmp_path / "in" / "c.txt", GOOD[3:])
    succeed("--input", "in", "--no_heuristics", "--output", "out.txt", cwd=tmp_path)
    assert read(tmp_path / "out.txt") == GOOD and counts(tmp_path / "out.txt.filter.json")["documents_in"] == len(GOOD)


def near(lines):
    return [lines[0].replace("a", "b", 1), *lines[1:]]


@pytest.mark.parametrize("kind", ["exact", "minhash"])
def test_duplicates_across_files_and_processes(tmp_path, kind):
    long = [document(seed, 40) for seed in range(8)]
    write(tmp_path / "in" / "a.txt", long[:5])
    write(tmp_path / "in" / "b.txt", [[line.title() for line in long[1]], near(long[2]), long[5], BAD["digit"], BAD["digit"]])
    write(tmp_path / "in" / "c.txt", [long[0], *long[6:]])
    base = ("--input", "in", "--language", "hu", "--langdetect", "none", "--upper_ratio", 1, "--dedup", kind)
    said = succeed(*base, "--output", "out.txt", cwd=tmp_path)
    kept = [*long[:5], *([] if kind == "minhash" else [near(long[2])]), long[5], *long[6:]]
    assert read(tmp_path / "out.txt") == kept
    found = counts(tmp_path / "out.txt.filter.json")
    assert (found["rejected_duplicate_exact"], found["rejected_duplicate_near"]) == (2, int(kind == "minhash"))
    assert found["rejected_digit"] == 2  # rejected ones are never the original of a duplicate
    assert found["documents_in"] == 13 == found["documents_out"] + 4 + (kind == "minhash")
    assert "fail-duplicate_exact" in said
    succeed(*base, "--output_dir", "parts", "--processes", 2, cwd=tmp_path)
    assert (tmp_path / "parts" / "filter_00000.txt").read_bytes() == (tmp_path / "out.txt").read_bytes()
    assert "0 part(s) made, 1 kept" in succeed(*base, "--output", "out.txt", cwd=tmp_path)
    (tmp_path / "in" / "a.txt").write_text(
        (tmp_path / "in" / "a.txt").read_text(encoding="utf-8") + "\n" + "\n".join(long[7]) + "\n", encoding="utf-8"
    )
    succeed(*base, "--output", "out.txt", cwd=tmp_path)
    assert read(tmp_path / "out.txt") == [*kept[:5], long[7], *kept[5:-1]]


@pytest.mark.parametrize("dedup", ["none", "minhash"])
def test_parts_processes_and_limit_change_nothing(tmp_path, dedup):
    long = [document(seed, 30) for seed in range(40)]
    everything = [lines for seed, lines in enumerate(long) for lines in ([lines, BAD["digit"], long[seed // 2]])]
    write(tmp_path / "in.txt", everything)
    options = FilterOptions(language="hu", langdetect="none", dedup=dedup)

    def run(name, processes, part_bytes, **changes):
        result, _ = filter_documents(tmp_path / "in.txt", tmp_path / name, dataclasses.replace(options, **changes), processes, part_bytes)
        return result

    whole = run("whole.txt", 1, 1 << 24)
    many = run("many.txt", 1, 5000)
    assert many.made > 10 and many.counts == whole.counts
    assert (tmp_path / "many.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()
    run("parts", 2, 5000)
    parts = [part.read_text(encoding="utf-8") for part in sorted((tmp_path / "parts").glob("*.txt"))]
    assert "\n".join(filter(None, parts)) == (tmp_path / "whole.txt").read_text(encoding="utf-8")
    assert read(tmp_path / "whole.txt") == (long if dedup == "minhash" else [lines for lines in everything if lines != BAD["digit"]])
    for limit in (1, 31, 120, 500):
        limited = run(f"limit{limit}.txt", 1, 5000, limit=limit)
        assert limited.counts["documents_in"] == min(limit, 120)
        expected = [lines for lines in everything[:limit] if lines != BAD["digit"]]
        if dedup == "minhash":
            expected = [lines for number, lines in enumerate(expected) if lines not in expected[:number]]
        assert read(tmp_path / f"limit{limit}.txt") == expected


def test_language_detection(tmp_path):
    pytest.importorskip("langdetect", reason="langdetect is not installed")
    hungarian = [
        "A kormany tegnap este \u00faj javaslatot fogadott el a gyermekek oktat\u00e1s\u00e1r\u00f3l, amelyet a parlament j\u00f6v\u0151 h\u00e9ten t\u00e1rgyal majd."
    ] * 4
    english = [
        "The government accepted a new proposal about the education of children last night, which parliament will discuss next week."
    ] * 4
    write(tmp_path / "in.txt", [hungarian, english])
    said = succeed("--input", "in.txt", "--output", "out.txt", "--language", "hu", cwd=tmp_path)
    assert read(tmp_path / "out.txt") == [hungarian] and "fail-langdetect" in said
    said = succeed("--input", "in.txt", "--output", "out.txt", "--language", "eu", cwd=tmp_path)
    assert "no language detection: langdetect is not used for Basque" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--output", "o.txt"), 2, "give --language"),
        (("--output", "o.txt", "--language", "tlh"), 2, "--language tlh is not a language"),
        (("--output", "o.txt", "--language", "hu", "--langdetect", "tlh"), 2, "--langdetect tlh is not a language"),
        (("--output", "o.txt", "--language", "hu", "--charset", "latin1"), 2, "latin2"),
        (("--output", "o.txt", "--no_heuristics", "--no_clean", "--charset", "latin2"), 2, "--no_clean"),
        (("--output", "o.txt", "--language", "hu", "--punct_ratio", "7"), 2, "--punct_ratio 7.0"),
        (("--output", "o.txt", "--language", "hu", "--limit", "0"), 2, "--limit 0"),
        (("--output", "o.txt", "--language", "hu", "--shingle", "0"), 2, "--shingle 0"),
        (("--output", "in.txt", "--no_heuristics"), 2, "overwritten"),
        (("--output", "o.txt", "--no_heuristics", "--report", "in.txt"), 2, "overwritten"),
        (("--no_heuristics",), 2, "one of the two"),
        (("--output", "o.txt", "--no_heuristics", "--input", "nothing"), 1, "no such file"),
        (("--output", "o.txt", "--no_heuristics", "--input", "blank.txt"), 1, "no text"),
        (("--output", "o.txt", "--no_heuristics", "--input", "bad.txt"), 1, "offset 5 is not UTF-8"),
    ],
)
def test_bad_input_is_one_line(folder, arguments, code, message):
    (folder / "blank.txt").write_text("\n \n")
    (folder / "bad.txt").write_bytes(b"fine \xff\n")
    before = (folder / "in.txt").read_bytes()
    done = run_script(SCRIPT, "--input", "in.txt", *arguments, cwd=folder)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (folder / "o.txt").exists() and (folder / "in.txt").read_bytes() == before


def test_nothing_left_is_said(folder):
    said = succeed(*BASE, "--output", "out.txt", "--min_words", 100000, cwd=folder)
    assert "warning: no document was written" in said
    assert (folder / "out.txt").read_text() == ""


def test_help_from_anywhere(tmp_path):
    said = succeed("--help", cwd=tmp_path)
    assert "default" in said and "python data/filter.py" in said and "--avg-len" in said
