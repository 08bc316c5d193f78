"""A language that is not English, from a MediaWiki dump to fill-mask, with a cased vocabulary: no accent and no capital is lost."""

import bz2
import random
import subprocess
import sys

import pytest

from berth.text.vocabulary import Vocabulary
from tests.support import ROOT, environment, run_script

SUBJECTS = [
    "Az árvíztűrő tükörfúrógép",
    "A magyar nyelv",
    "Győr városa",
    "Az őszi erdő",
    "A Dunántúl",
    "Petőfi Sándor",
    "Az ürge",
    "Ősz Ödön",
]
VERBS = ["szép", "régi", "nagyon öreg", "híres", "csendes", "hűvös", "különös"]
ENDS = ["és sokan szeretik", "mert időben épült", "ahol a folyók találkoznak", "amelyről könyveket írtak", "s így maradt az időkben"]


def page(number: int, chance: random.Random) -> str:
    sentences = [f"{chance.choice(SUBJECTS)} {chance.choice(VERBS)}, {chance.choice(ENDS)}." for _ in range(12)]
    paragraphs = "\n\n".join(" ".join(sentences[start : start + 4]) for start in range(0, 12, 4))
    text = (
        f"{{{{Infobox|név=Lap {number}}}}}\n'''Lap {number}''' egy [[lap|oldal]].\n\n{paragraphs}\n\n== Jegyzetek ==\n&lt;references /&gt;"
    )
    return (
        f"  <page>\n    <title>Lap {number}</title>\n    <ns>0</ns>\n    <id>{number}</id>\n    <revision>\n      <id>{number}</id>\n"
        f'      <text bytes="9" xml:space="preserve">{text}</text>\n    </revision>\n  </page>\n'
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hu")
    chance = random.Random(7)
    dump = '<mediawiki xml:lang="hu">\n' + "".join(page(number, chance) for number in range(1, 61)) + "</mediawiki>\n"
    (folder / "huwiki.xml.bz2").write_bytes(bz2.compress(dump.encode()))
    command = [
        "-m", "data.prepare", "--workdir", folder / "work", "--input", folder / "huwiki.xml.bz2", "--language", "hu", "--cased",
        "--vocab_size", 260, "--set", "filter.langdetect=none", "filter.digit_ratio=0.2", "shard.n_training_shards=2",
        "shard.fraction_test_set=0.1", "vocab.model_size=tiny", "records.dupe_factor=1",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "work"


def test_accents_and_capitals_are_in_the_vocabulary(work):
    pieces = Vocabulary.load(work / "vocab" / "vocab.txt").ids
    assert {"ő", "ű", "Ő", "á", "Ö"} <= pieces.keys() and {"Győr", "##ő"} & pieces.keys()


def test_from_a_dump_to_fill_mask(work):
    records = next((work / "records").glob("*seq_len_128*"))
    trained = run_script(
        "run_pretraining.py", "--input_dir", records, "--config_file", work / "vocab" / "bert_config.json",
        "--vocab_file", work / "vocab" / "vocab.txt", "--output_dir", work / "results", "--train_batch_size", 16,
        "--gradient_accumulation_steps", 1, "--max_steps", 40, "--learning_rate", 2e-2, "--warmup_proportion", 0.2,
        "--precision", "fp32",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    exported = run_script(
        "convert_checkpoint.py", "to_huggingface", "--checkpoint", work / "results", "--vocab_file", work / "vocab" / "vocab.txt",
        "--cased", "--output_dir", work / "huggingface",
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    code = (
        "import sys; from transformers import AutoTokenizer, pipeline; folder = sys.argv[1]\n"
        "print(AutoTokenizer.from_pretrained(folder).decode(AutoTokenizer.from_pretrained(folder)('Győr őszi árvíz')['input_ids'], "
        "skip_special_tokens=True))\n"
        "found = pipeline('fill-mask', folder, top_k=3)('Petőfi Sándor [MASK], és sokan szeretik.')\n"
        "print(len(found), all(0 < each['score'] < 1 for each in found))\n"
        "print(*(each['token_str'] for each in found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, work / "huggingface"], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    text, count, words = done.stdout.splitlines()[-3:]
    assert text == "Győr őszi árvíz" and count == "3 True" and words.strip()
