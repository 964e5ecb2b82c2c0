"""Per-query figures of two models in, the probability of such a difference by chance out.

Fisher's paired randomisation test: under the null hypothesis the two models are exchangeable on every query, so each
difference may change its sign. It assumes no distribution, which suits figures that pile up at 0 and 1.
Source: Smucker, Allan, Carterette, "A comparison of statistical significance tests for IR evaluation", CIKM 2007.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

PERMUTATIONS = 10_000


def paired_p_value(
    differences: Sequence[Sequence[float]], *, seed: int, purpose: str, permutations: int = PERMUTATIONS
) -> float:
    """Two-sided p of a mean difference of 0, between two models that answered the same queries.

    differences   model minus baseline of each query, one sequence a test set; several sets: the mean of their means
    seed, purpose name the random numbers, so a p-value does not depend on which others were computed before
    permutations  sign patterns drawn; all patterns are taken where there are no more than that many
    """
    from scipy.stats import permutation_test

    num_sets = len(differences)
    shares = [np.asarray(values, dtype=np.float64) / (len(values) * num_sets) for values in differences]
    weighted = np.concatenate(shares)
    moved = weighted[weighted != 0]  # a tie keeps its value under both signs
    if len(moved) < 2:
        return 1.0  # both signs of one difference are as far from 0 as what was seen

    def total(values: np.ndarray, axis: int = -1) -> np.ndarray:
        return values.sum(axis=axis)

    key = int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest(), "little")
    result = permutation_test(
        (moved,),
        total,
        permutation_type="samples",
        vectorized=True,
        n_resamples=permutations,
        batch=256,  # sign patterns held at a time
        alternative="two-sided",
        rng=np.random.Generator(np.random.Philox(key=key)),
    )
    return float(result.pvalue)


def stars(p_value: float) -> str:
    """Mark of a p-value: ** for p <= 0.01, * for p <= 0.05, else nothing."""
    if p_value <= 0.01:
        return "**"
    return "*" if p_value <= 0.05 else ""
