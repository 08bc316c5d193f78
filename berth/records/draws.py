"""Random numbers as a hash of what they are for.

A draw is ``hash(seed, shard, document, copy, chunk, purpose, counter)``: nothing is consumed in sequence, so the result does
not depend on the number of processes, the block size or the order of the work, and a whole array of draws is a few numpy
operations. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
number generators"), which passes the usual statistical batteries when fed a counter times the golden ratio.

Rejected: ``numpy.random.Generator`` per document (slow for a million short documents), one stream a shard (sequential).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11 = (np.uint64(bits) for bits in (30, 27, 31, 11))

# Purposes: each names one independent stream under a key. Values are part of the file format: never renumber.
SHORT, SHORT_LENGTH, SPLIT, IS_RANDOM, RANDOM_DOCUMENT, RANDOM_START, TRIM_A, TRIM_B = range(1, 9)
MASK_ORDER, MASK_CHOICE, SHUFFLE = 9, 10, 12


def mix(values: Keys) -> Keys:
    """SplitMix64's finaliser, element by element; a bijection of uint64. Works in place on a private copy."""
    mixed = values ^ (values >> _30)
    mixed *= _MIX_1
    mixed ^= mixed >> _27
    mixed *= _MIX_2
    mixed ^= mixed >> _31
    return mixed


def fold(keys: Keys, values: ArrayLike) -> Keys:
    """New keys from ``keys`` and non-negative integers; both broadcast. Different values give unrelated keys."""
    steps = np.atleast_1d(np.asarray(values)).astype(np.uint64)  # arrays wrap silently, numpy scalars warn
    return mix(keys + (steps + np.uint64(1)) * _GOLDEN)


def fold_short(keys: Keys, values: NDArray[np.integer]) -> NDArray[np.uint32]:
    """32-bit draws of ``keys`` (uint64 [N]) for each of ``values`` (integers [M]): uint32 [N, M], at half the cost of :func:`fold`.

    Mixed by the 32-bit finaliser of MurmurHash3 (Appleby, public domain).
    """
    steps = values.astype(np.uint32) * np.uint32(0x9E3779B1)
    mixed: NDArray[np.uint32] = keys.astype(np.uint32)[:, None] + steps
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    return mixed


def shard_key(seed: int, shard: str) -> Keys:
    """The key, uint64 [1], of a shard: from the seed and the shard's file name, not its folder."""
    # A name that is not UTF-8 arrives as surrogates; back to its bytes. The same key in every locale.
    digest = hashlib.sha256(f"{seed}\n{shard}".encode("utf-8", "surrogateescape")).digest()
    return np.frombuffer(digest[:8], "<u8").astype(np.uint64)


def uniform(keys: Keys, purpose: int, counter: ArrayLike = 0) -> NDArray[np.float64]:
    """Numbers in [0, 1) with 53 bits, of the broadcast shape of ``keys`` and ``counter``."""
    return (fold(fold(keys, purpose), counter) >> _11).astype(np.float64) * 2.0**-53


def below(keys: Keys, purpose: int, bound: ArrayLike) -> NDArray[np.int64]:
    """Integers in [0, bound), element by element; ``bound`` at least 1 and below 2**53."""
    return (uniform(keys, purpose) * np.asarray(bound, np.float64)).astype(np.int64)


def heads(keys: Keys, purpose: int, tosses: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of ``tosses`` fair coins show heads (binomial, p = 1/2), exactly: counted bits of the hash."""
    total = np.zeros(tosses.shape, np.int64)
    base = fold(keys, purpose)
    for word in range(-(-int(tosses.max(initial=0)) // 64)):
        left = np.clip(tosses - 64 * word, 0, 64)
        bits = fold(base, word) >> np.minimum(64 - left, 63).astype(np.uint64)
        total += np.where(left > 0, np.bitwise_count(bits), 0)
    return total
