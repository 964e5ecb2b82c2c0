"""Test texts and training texts in, the training texts that give test texts away out."""

from collections.abc import Iterable

import numpy as np

from tdro_hpc.embedded.pairs import normalised

SHINGLE = 5  # characters
NEAR_DUPLICATE = 0.7  # Jaccard similarity of the shingle sets at and above which two texts count as one


def shingles(text: str) -> np.ndarray:
    """The distinct runs of 5 characters of the normalised text: sorted hashes, uint64, 0 to len(text) - 4 of them."""
    # Four bytes a character keep every script exact; 5 characters of 21 bits do not fit 64, so they are hashed.
    codes = np.frombuffer(normalised(text).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    if len(codes) < SHINGLE:
        return np.empty(0, dtype=np.uint64)
    hashes = np.zeros(len(codes) - SHINGLE + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        for offset in range(SHINGLE):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[offset : len(codes) - SHINGLE + 1 + offset]
    return np.unique(hashes)


class LeakFilter:
    """Knows the protected texts and finds those that equal or nearly equal one of them."""

    def __init__(self, protected: Iterable[str]):
        texts = sorted(set(protected))
        self._exact = {normalised(text) for text in texts} - {""}
        sets = [shingles(text) for text in texts]
        self._sizes = np.array([len(one) for one in sets], dtype=np.int64)
        owners = np.repeat(np.arange(len(sets)), self._sizes)
        flat = np.concatenate([*sets, np.empty(0, dtype=np.uint64)])
        order = np.argsort(flat, kind="stable")
        self._shingles, starts = np.unique(flat[order], return_index=True)
        self._starts = np.append(starts, len(flat))
        self._owners = owners[order]  # of shingle i: owners[starts[i]:starts[i + 1]]

    def leaks(self, text: str) -> bool:
        """Whether the text, normalised, equals a protected one or has a Jaccard similarity of 0.7 or more to one."""
        if normalised(text) in self._exact:
            return True
        own = shingles(text)
        if not len(own) or not len(self._shingles):
            return False
        places = np.searchsorted(self._shingles, own)
        places[places == len(self._shingles)] = 0
        places = places[self._shingles[places] == own]
        # Jaccard >= t needs t * |own| common shingles at least.
        if len(places) < NEAR_DUPLICATE * len(own):
            return False
        owners = np.concatenate([self._owners[self._starts[place] : self._starts[place + 1]] for place in places])
        common = np.bincount(owners, minlength=len(self._sizes))
        return bool(np.any(common >= NEAR_DUPLICATE * (len(own) + self._sizes - common)))
