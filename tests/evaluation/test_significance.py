from itertools import product

import numpy as np
import pytest

from tdro_hpc.evaluation.significance import paired_p_value, stars


def exact_p(values):
    """Share of all sign patterns at least as far from 0 as the observed sum."""
    sums = np.array([np.dot(signs, values) for signs in product((1, -1), repeat=len(values))])
    return np.mean(np.abs(sums) >= abs(np.sum(values)) - 1e-12)


def test_few_queries_give_the_exact_probability():
    values = np.random.default_rng(0).normal(0.3, 0.5, size=10)
    assert paired_p_value([values], seed=1, purpose="x") == pytest.approx(exact_p(values))


def test_many_queries_come_close_to_the_exact_probability():
    values = np.random.default_rng(1).normal(0.25, 0.5, size=18)
    # 2,000 of 262,144 patterns: the standard error of p near 0.05 is 0.005
    assert paired_p_value([values], seed=1, purpose="x", permutations=2000) == pytest.approx(exact_p(values), abs=0.02)


def test_p_is_the_same_for_the_same_seed_and_purpose_and_not_for_another():
    values = np.random.default_rng(2).normal(0.02, 0.2, size=200)
    first = paired_p_value([values], seed=1, purpose="set/model", permutations=500)
    assert paired_p_value([values], seed=1, purpose="set/model", permutations=500) == first
    others = {paired_p_value([values], seed=seed, purpose="set/model", permutations=500) for seed in range(2, 7)}
    assert others != {first}


def test_sign_of_the_difference_does_not_matter():
    values = np.random.default_rng(3).normal(0.3, 0.5, size=9)
    turned = paired_p_value([-values], seed=1, purpose="x")
    assert paired_p_value([values], seed=1, purpose="x") == pytest.approx(turned)


@pytest.mark.parametrize("values", [[0.0] * 30, [0.5] + [0.0] * 30, [0.5]])
def test_differences_that_cannot_tell_models_apart_have_p_one(values):
    assert paired_p_value([values], seed=1, purpose="x") == 1.0


def test_several_sets_weigh_the_same_whatever_their_number_of_queries():
    small, large = [0.5, 0.4, 0.6, 0.5], [-0.01] * 6
    weighted = np.array([value / 4 for value in small] + [value / 6 for value in large])
    assert paired_p_value([small, large], seed=1, purpose="x") == pytest.approx(exact_p(weighted))


def test_chance_differences_are_rarely_called_significant():
    draws = np.random.default_rng(4)
    values = [paired_p_value([draws.normal(size=40)], seed=1, purpose=str(i), permutations=200) for i in range(200)]
    # 200 draws at 5 percent: 10 expected, standard deviation 3.1
    assert 2 <= sum(value <= 0.05 for value in values) <= 20


def test_stars_mark_the_two_levels():
    assert [stars(value) for value in (0.001, 0.01, 0.011, 0.05, 0.051)] == ["**", "**", "*", "*", ""]
