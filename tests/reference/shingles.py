"""Near-duplicate search written out with Python sets: every text against every other."""

from tdro_hpc.embedded.pairs import normalised


def shingle_set(text: str) -> set[str]:
    """All runs of five characters of the normalised text."""
    text = normalised(text)
    return {text[start : start + 5] for start in range(len(text) - 4)}


def jaccard(one: str, other: str) -> float:
    """Shared part of two shingle sets; 0 where both are empty."""
    left, right = shingle_set(one), shingle_set(other)
    return len(left & right) / len(left | right) if left | right else 0.0


def is_leak(text: str, protected: list[str]) -> bool:
    """Equal when normalised, or 0.7 of the shingles shared with one protected text."""
    return any(
        (normalised(text) == normalised(other) and normalised(text) != "") or jaccard(text, other) >= 0.7
        for other in protected
    )
