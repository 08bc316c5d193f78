"""Hashed random numbers: uniform, independent of how they are asked for, never renumbered."""

import numpy as np

from berth.records import draws

KEYS = draws.fold(draws.shard_key(1, "a.txt"), np.arange(200_000))


def test_golden_values():
    """These decide every byte of every records file: if they change, FORMAT_VERSION must."""
    key = draws.shard_key(12345, "text_training_0.txt")
    assert key.tolist() == [10419509280473401963]
    assert draws.fold(key, np.arange(3)).tolist() == [8043530188775504581, 17872217094408756625, 10912344554698618291]
    assert draws.mix(np.array([0, 1], np.uint64)).tolist() == [0, 6238072747940578789]


def test_uniform_moments_and_streams_are_unrelated():
    first, second = draws.uniform(KEYS, draws.SPLIT), draws.uniform(KEYS, draws.IS_RANDOM)
    for drawn in (first, second, draws.uniform(KEYS[:1], draws.MASK_ORDER, np.arange(200_000))):
        assert drawn.min() >= 0 and drawn.max() < 1
        assert abs(drawn.mean() - 0.5) < 0.003 and abs(drawn.var() - 1 / 12) < 0.001
        histogram = np.histogram(drawn, 64, (0, 1))[0] / len(drawn) * 64
        assert abs(histogram - 1).max() < 0.1
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01


def test_draws_do_not_depend_on_the_block():
    whole = draws.uniform(KEYS[:100, None], draws.MASK_ORDER, np.arange(50))
    rows = [draws.uniform(KEYS[row : row + 1], draws.MASK_ORDER, np.arange(50)) for row in range(100)]
    assert (whole == np.stack(rows)).all()


def test_below_hits_every_value_equally():
    drawn = draws.below(KEYS, draws.RANDOM_DOCUMENT, 7)
    assert abs(np.bincount(drawn) / len(drawn) * 7 - 1).max() < 0.03


def test_heads_are_binomial():
    for tosses in (1, 5, 64, 65, 200):
        drawn = draws.heads(KEYS, draws.TRIM_A, np.full(len(KEYS), tosses))
        assert drawn.min() >= 0 and drawn.max() <= tosses
        assert abs(drawn.mean() - tosses / 2) < 0.01 * tosses**0.5
        assert abs(drawn.var() / (tosses / 4) - 1) < 0.02
    mixed = draws.heads(KEYS[:4], draws.TRIM_A, np.array([0, 1, 64, 130]))
    single = [draws.heads(KEYS[i : i + 1], draws.TRIM_A, np.array([n]))[0] for i, n in enumerate([0, 1, 64, 130])]
    assert mixed.tolist() == single


def test_shards_have_distinct_streams_and_folders_do_not_matter():
    keys = [draws.shard_key(seed, name)[0] for seed in (0, 1) for name in ("a_0.txt", "a_1.txt")]
    assert len(set(keys)) == 4


def test_names_that_are_not_utf_8_have_a_key():
    names = [b"caf\xe9.txt", b"caf\xe8.txt", "café.txt".encode()]
    keys = [draws.shard_key(1, name.decode("utf-8", "surrogateescape"))[0] for name in names]
    assert len(set(keys)) == 3
