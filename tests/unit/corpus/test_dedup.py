"""Duplicates: exact ones whatever case and spaces, near ones by the share of shingles, the first stays."""

import itertools
import random

import numpy as np
import pytest

from berth.corpus.dedup import MinHash, digest_of, exact_repeats, near_repeats, signer
from berth.errors import ConfigError


def digests(documents):
    return np.frombuffer(b"".join(map(digest_of, documents)), "<u8").reshape(-1, 2)


def test_exact():
    documents = [["One two.", "Three."], ["Other."], ["one  TWO.", "three."], ["One two. Three."], ["Other!"], ["Other."]]
    assert exact_repeats(digests(documents)).tolist() == [False, False, True, True, False, True]
    assert exact_repeats(np.zeros((0, 2), np.uint64)).tolist() == []


def words(seed, count=400):
    draw = random.Random(seed)
    return [f"word{draw.randrange(5000)}" for _ in range(count)]


def changed(base, share, seed):
    draw = random.Random(seed)
    found = list(base)
    for at in draw.sample(range(len(base)), int(share * len(base))):
        found[at] = f"new{draw.randrange(10**9)}"
    return found


def similarity(one, other, width=5):
    shingles = [{tuple(text[at : at + width]) for at in range(len(text) - width + 1)} for text in (one, other)]
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


def test_signatures_estimate_the_share_of_common_shingles():
    options = MinHash(permutations=512)
    sign = signer(options)
    errors = []
    for seed, share in itertools.product(range(4), (0, 0.02, 0.05, 0.1, 0.3)):
        one = words(seed)
        other = changed(one, share, seed)
        estimate = (sign([" ".join(one)]) == sign([" ".join(other)])).mean()
        errors.append(estimate - similarity(one, other))
    assert max(map(abs, errors)) < 0.1  # 4.5 standard deviations
    assert abs(np.mean(errors)) < 0.02


def test_near_duplicates_are_found_and_others_are_not():
    documents = [words(seed) for seed in range(60)]
    copies = [changed(documents[seed], 0.01, seed) for seed in range(20)]
    distant = [changed(documents[seed], 0.3, seed) for seed in range(20, 40)]
    everything = documents + copies + distant
    options = MinHash()
    sign = signer(options)
    signatures = np.array([sign([" ".join(document)]) for document in everything])
    found = near_repeats(signatures, np.ones(len(everything), bool), options)
    assert found.nonzero()[0].tolist() == list(range(60, 80))
    kept = np.ones(len(everything), bool)
    kept[:20] = False  # what is out already removes nobody
    assert not near_repeats(signatures, kept, options).any()


def test_signatures_are_fixed_for_good():
    options = MinHash(permutations=8)
    assert signer(options)(["The ship left port at dawn and", "carried grain."]).tolist() == SIGNATURE
    assert signer(options)([]).tolist() == [0xFFFFFFFF] * 8
    assert (signer(options)(["Short text"]) == signer(options)(["short   TEXT"])).all()


SIGNATURE = [134876567, 272586294, 891697301, 26579687, 296797186, 466589, 15785686, 244519810]


def test_letters_are_shingled_where_there_are_no_spaces():
    options = MinHash(language="zh", permutations=64)
    one = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u6211\u4eec\u53bb\u516c\u56ed\u6563\u6b65\u5427\u660e\u5929\u4e5f\u8bb8\u4f1a\u4e0b\u96e8"
    sign = signer(options)
    assert (sign([one]) == sign([one[:9], one[9:]])).all()
    assert (sign([one]) == sign([one[::-1]])).mean() < 0.2


def test_bands_suit_the_threshold():
    for threshold in (0.5, 0.7, 0.8, 0.9):
        bands, rows = MinHash(threshold=threshold).bands
        assert bands * rows <= 128
        assert 1 - (1 - threshold**rows) ** bands >= 0.95
        assert 1 - (1 - (threshold - 0.4) ** rows) ** bands < 0.3


@pytest.mark.parametrize("bad", [{"threshold": 0}, {"threshold": 1.1}, {"permutations": 4}, {"shingle": 0}])
def test_options_that_cannot_be(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        MinHash(**bad)
