import random

from tdro_hpc.embedded.leaks import LeakFilter, shingles
from tests.reference.shingles import is_leak, jaccard, shingle_set


def test_filter_agrees_with_sets_on_texts_around_the_threshold():
    draws = random.Random(0)
    words = [f"{a}{b}" for a in ("cut", "text", "sp\u00e4ce", "\u6771\u4eac") for b in ("", "s", "ed")]
    protected = [" ".join(draws.choices(words, k=draws.randint(1, 12))) for _ in range(40)]
    guard = LeakFilter(protected)
    verdicts = []
    for _ in range(400):
        characters = list(draws.choice(protected))
        for _ in range(draws.randint(0, 6)):
            characters[draws.randrange(len(characters))] = draws.choice("abc ")
        text = "".join(characters)
        assert guard.leaks(text) == is_leak(text, protected), text
        verdicts.append(guard.leaks(text))
    assert 50 < sum(verdicts) < 350  # both answers were tried


def test_exactly_seven_tenths_is_a_leak():
    one, other = "abcdefghijkl", "abcdefghijk"  # 8 and 7 shingles, 7 shared: 0.875
    assert jaccard(one, other) == 7 / 8
    one, other = "abcdefghijklmn", "abcdefghijk"  # 10 and 7, 7 shared: 0.7
    assert jaccard(one, other) == 0.7
    assert LeakFilter([one]).leaks(other)
    assert not LeakFilter([one + "o"]).leaks(other)


def test_case_spaces_and_marks_do_not_hide_a_leak():
    assert LeakFilter(["Cut the text, twice."]).leaks("cut  the TEXT twice")


def test_short_texts_leak_only_when_equal():
    guard = LeakFilter(["cut", "&lt;"])
    assert guard.leaks("Cut!")
    assert not guard.leaks("cat")
    assert not guard.leaks("\u2264")


def test_nothing_protected_means_no_leaks():
    assert not LeakFilter([]).leaks("a text of some length")


def test_shingles_are_as_many_as_in_the_set():
    for text in ("abcde abcde abcde", "abc", "", "\u6771\u4eac\u90fd\u5e81\u820e"):
        assert len(shingles(text)) == len(shingle_set(text))
