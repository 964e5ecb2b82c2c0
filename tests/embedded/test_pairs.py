from tdro_hpc.embedded.pairs import Pair, cut_code, cut_prose, merged, name_in_words, without_common_queries


def test_equal_queries_are_one_with_all_their_passages():
    pairs = merged([("Cut it.", "one"), ("paste", "two"), ("cut IT", "three"), ("Cut it.", "One!")])
    assert pairs == [Pair("Cut it.", ("one", "three")), Pair("paste", ("two",))]


def test_passage_that_repeats_the_query_and_empty_sides_are_left_out():
    assert merged([("Cut it.", "cut it"), ("", "x"), ("x", " ")]) == []


def test_key_decides_what_counts_as_equal():
    assert len(merged([("a", "small"), ("A", "capital")], key=str)) == 2


def test_names_fall_into_words():
    assert name_in_words("JSONDecoder.raw_decode") == "json decoder raw decode"
    assert name_in_words("__init__") == "init"


def test_prose_is_cut_at_a_space():
    assert cut_prose("cut  the text", 9) == "cut the"
    assert cut_prose("cut the", 7) == "cut the"


def test_code_is_cut_at_a_line_and_long_lines_are_cut():
    assert cut_code("a = 1\nb = 2\nc = 3", 12) == "a = 1\nb = 2"
    assert cut_code("x" * 20 + "\ny", 10) == "x" * 10


def test_queries_that_fit_everything_are_left_out():
    pairs = [("Return it.", str(number)) for number in range(3)] + [("Cut it.", "x")]
    assert without_common_queries(pairs, at_most=2) == [("Cut it.", "x")]
