import math

import numpy as np
import pytest

from tdro_hpc.data.draws import (
    draw_integers,
    draw_uniforms,
    draw_words,
    hash_words,
    permute,
    text_hash,
)
from tests.reference import mixture as reference


def permutation_of(size: int, key: int) -> np.ndarray:
    return permute(np.arange(size), np.full(size, size), np.full(size, key, dtype=np.uint64))


def test_hash_equals_the_one_written_with_python_integers():
    words = hash_words(42, 2**63 + 5, np.arange(100))
    assert words.dtype == np.uint64
    assert words.tolist() == [reference.hashed(42, 2**63 + 5, i) for i in range(100)]


def test_first_words_are_those_of_the_published_splitmix64():
    # Outputs of the splitmix64 generator seeded with 1234567, as listed on Rosetta Code ("Pseudo-random numbers").
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    golden, first = 0x9E3779B97F4A7C15, 1234567
    # The words (golden is odd, so it has an inverse) that put the state where that generator's is at outputs 1 to 4.
    words = [((first + k * golden) * pow(golden, -1, 2**64) - 1) % 2**64 for k in range(1, 5)]
    assert hash_words(np.asarray(words, dtype=np.uint64)).tolist() == published


def test_draws_do_not_depend_on_what_is_asked_together():
    together = draw_words(1, "a", np.arange(4)[:, None], np.arange(5))
    assert all(together[i, j] == draw_words(1, "a", i, j) for i in range(4) for j in range(5))


@pytest.mark.parametrize("other", [(2, "a", 3, 4), (1, "b", 3, 4), (1, "a", 4, 3), (1, "a", 3, 5)])
def test_every_part_of_the_key_changes_the_draw(other: tuple):
    assert draw_words(1, "a", 3, 4) != draw_words(*other)


def test_uniforms_fill_the_unit_interval_evenly_and_steps_are_unrelated():
    uniforms = draw_uniforms(3, "test", np.arange(100)[:, None], np.arange(1000))
    assert uniforms.min() >= 0 and uniforms.max() < 1
    counts = np.histogram(uniforms, bins=100, range=(0, 1))[0]
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert abs(chi_square - 99) < 5 * math.sqrt(2 * 99)  # 5 standard deviations
    correlations = np.corrcoef(uniforms)[np.triu_indices(100, k=1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(1000)


def test_integers_stay_below_bounds_that_differ_by_element():
    bounds = np.asarray([1, 2, 3, 1000])
    drawn = draw_integers(bounds, 1, "test", np.arange(1000)[:, None])
    assert drawn.dtype == np.int64
    assert (drawn >= 0).all() and (drawn < bounds).all()
    assert [len(np.unique(drawn[:, k])) for k in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 101, 1000])
def test_permute_is_a_permutation_and_equals_the_slow_one(size: int):
    order = permutation_of(size, key=99)
    assert sorted(order.tolist()) == list(range(size))
    assert order.tolist() == reference.permutation(size, 99)


def test_permute_handles_elements_of_different_sizes_and_keys_at_once():
    sizes, keys = np.asarray([7, 7, 100, 100]), np.asarray([1, 2, 1, 2], dtype=np.uint64)
    got = permute(np.asarray([6, 6, 50, 50]), sizes, keys)
    assert got.tolist() == [permutation_of(s, k)[p] for s, k, p in [(7, 1, 6), (7, 2, 6), (100, 1, 50), (100, 2, 50)]]


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_all_orders_of_a_small_task_are_equally_likely(size: int):
    orders = math.factorial(size)
    keys = hash_words(np.arange(100 * orders), 7)
    drawn = np.stack([permute(np.full(len(keys), p), np.full(len(keys), size), keys) for p in range(size)], axis=1)
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == orders
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert abs(chi_square - (orders - 1)) < 5 * math.sqrt(2 * (orders - 1))


def test_permute_needs_no_memory_of_the_task():
    rows = permute(np.asarray([0, 10**12 - 1]), np.full(2, 10**12), np.zeros(2, dtype=np.uint64))
    assert ((rows >= 0) & (rows < 10**12)).all() and rows[0] != rows[1]


def test_text_hash_is_63_bit_and_survives_broken_unicode():
    # blake2b is specified byte by byte, so the value may be written down: cached files depend on it.
    assert text_hash("a") == text_hash("a") != text_hash("b")
    assert all(0 <= text_hash(text) < 2**63 for text in ("", "text", "\ud800 lone surrogate"))
