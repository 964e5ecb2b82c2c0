"""Counters in, random numbers out: no generator, no state, nothing to replay.

A draw is the hash of (seed, purpose, counters). Two draws agree exactly when all of these agree, so who asks, in which
order and in which process does not matter. Everything is vectorised: counters are integers or integer arrays and are
broadcast against each other.

Source: the hash is a tree of splitmix64 streams (Steele, Lea and Flood 2014, with the finaliser of Stafford's mix 13):
every counter picks one output of the stream that the counters before it have seeded.
"""

import hashlib
from functools import cache

import numpy as np

Counter = int | np.ndarray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_WORD = (1 << 64) - 1
# With 16 all orders of up to 6 elements are equally likely as far as 100 draws of each can tell; with 12 they are not.
_SHEARS = 16


def text_hash(text: str) -> int:
    """63-bit hash of a text, the same on every machine and in every run (Python's own hash is not)."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (_WORD >> 1)


def draw_words(seed: int, purpose: str, *counters: Counter) -> np.ndarray:
    """Uniform 64-bit words, uint64 in the broadcast shape of the counters.

    seed      any integer
    purpose   what the draw decides: draws of different purposes are independent
    counters  integers or integer arrays, >= 0
    """
    return hash_words(seed, _purpose_word(purpose), *counters)


def draw_uniforms(seed: int, purpose: str, *counters: Counter) -> np.ndarray:
    """Uniform float64 in [0, 1) with 53 random bits, in the broadcast shape of the counters."""
    return (draw_words(seed, purpose, *counters) >> np.uint64(11)) * 2.0**-53


def draw_integers(bounds: Counter, seed: int, purpose: str, *counters: Counter) -> np.ndarray:
    """Uniform int64 in [0, bounds), in the broadcast shape of bounds and counters; the bias is below bounds / 2**64."""
    return (draw_words(seed, purpose, *counters) % _as_words(bounds)).astype(np.int64)


def hash_words(*words: Counter) -> np.ndarray:
    """uint64 hash of a sequence of integers, in their broadcast shape; the order of the words matters."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        for word in words:
            state = _mixed(state + (_as_words(word) + np.uint64(1)) * _GOLDEN)
    return np.asarray(state)


def permute(positions: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where a keyed pseudo-random permutation of 0 .. size - 1 sends each position, without holding the permutation.

    positions  int64 [n], 0 <= position < size
    sizes      int64 [n], >= 1; may differ from element to element
    keys       uint64 [n]; elements with equal key and size see the same permutation
    returns    int64 [n]

    The numbers below `size` are laid out in a grid a little larger than `size`. A round moves every column by an amount
    hashed from its index, the next one every row: each is a bijection of the grid (a Feistel network on mixed radices).
    An element that lands outside is sent through again until it is inside (cycle walking), which keeps the bijection.
    """
    assert np.all((positions >= 0) & (positions < sizes)), "positions must lie in 0 .. size - 1"
    heights = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    bounds = _as_words(sizes)
    widths = (bounds + heights - np.uint64(1)) // heights
    result = _as_words(positions)
    outside = np.arange(len(result))
    while len(outside):
        result[outside] = _sheared(result[outside], heights[outside], widths[outside], keys[outside])
        outside = outside[result[outside] >= bounds[outside]]
    return result.astype(np.int64)


def _sheared(cells: np.ndarray, heights: np.ndarray, widths: np.ndarray, keys: np.ndarray) -> np.ndarray:
    rows, columns = cells // widths, cells % widths
    for shear in range(0, _SHEARS, 2):
        rows = (rows + hash_words(keys, shear, columns) % heights) % heights
        columns = (columns + hash_words(keys, shear + 1, rows) % widths) % widths
    return rows * widths + columns


@cache
def _purpose_word(purpose: str) -> int:
    return text_hash(purpose)


def _as_words(value: Counter) -> np.ndarray:
    if isinstance(value, int):
        return np.asarray(value & _WORD, dtype=np.uint64)
    return np.array(value).astype(np.uint64)


def _mixed(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> _SHIFT_1)) * _MIX_1
    state = (state ^ (state >> _SHIFT_2)) * _MIX_2
    return state ^ (state >> _SHIFT_3)
