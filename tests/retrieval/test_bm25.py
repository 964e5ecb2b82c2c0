import logging
import math
import random
import subprocess
import sys

import numpy as np
import pytest

from tdro_hpc.retrieval.bm25 import mine_hard_negatives, search_bm25, split_words

ANIMALS = ["the red fox jumps", "a red house", "green trees grow", "the fox and the hound", "Green  trees grow"]


def lucene_score(query: str, document: str, corpus: list[str]) -> float:
    """BM25 written out word by word from its formula."""
    lengths = [len(split_words(text)) for text in corpus]
    mean_length = sum(lengths) / len(lengths)
    words = split_words(document)
    total = 0.0
    for word in split_words(query):
        holders = sum(word in split_words(text) for text in corpus)
        frequency = words.count(word)
        weight = math.log(1 + (len(corpus) - holders + 0.5) / (holders + 0.5))
        total += weight * frequency / (frequency + 0.9 * (0.6 + 0.4 * len(words) / mean_length))
    return total


def test_scores_equal_the_written_out_formula():
    draws = random.Random(0)
    vocabulary = [f"w{number}" for number in range(30)]
    corpus = [" ".join(draws.choices(vocabulary, k=draws.randint(1, 12))) for _ in range(40)]
    queries = [" ".join(draws.sample(vocabulary, 3)) for _ in range(5)]
    ids, scores = search_bm25(corpus, queries, top_k=10)
    for row, query in enumerate(queries):
        expected = [lucene_score(query, text, corpus) for text in corpus]
        # float32 sums against float64: about 7 digits.
        assert scores[row] == pytest.approx(sorted(expected, reverse=True)[:10], rel=1e-5, abs=1e-6)
        assert scores[row] == pytest.approx([expected[i] for i in ids[row]], rel=1e-5, abs=1e-6)


def test_equal_scores_keep_the_order_of_the_corpus_also_at_the_cut():
    ids, scores = search_bm25(["same words here"] * 9, ["same words"], top_k=4)
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert len(set(scores[0].tolist())) == 1


def test_query_without_known_words_gets_zero_scores():
    ids, scores = search_bm25(ANIMALS, ["zebra", "", "?!"], top_k=2)
    assert ids.tolist() == [[0, 1]] * 3
    assert not scores.any()


def test_top_k_above_the_corpus_returns_the_whole_corpus():
    ids, _ = search_bm25(ANIMALS, ["red fox"], top_k=100)
    assert sorted(ids[0].tolist()) == [0, 1, 2, 3, 4]


def test_empty_corpus_is_an_error_in_words():
    with pytest.raises(ValueError, match="empty corpus"):
        search_bm25([], ["fox"], top_k=3)


def test_words_split_at_underscores_and_cjk_runs_become_pairs():
    assert split_words("The load_state of x1, and 3.5") == ["load", "state", "x1", "3", "5"]
    assert split_words("\u6771\u4eac\u90fd GPU \u732b") == ["\u6771\u4eac", "\u4eac\u90fd", "gpu", "\u732b"]


def test_chinese_text_is_found_by_a_part_of_it():
    corpus = ["\u6211\u7231\u5317\u4eac\u5929\u5b89\u95e8", "\u4e0a\u6d77\u662f\u57ce\u5e02"]
    ids, scores = search_bm25(corpus, ["\u5317\u4eac"], top_k=1)
    assert ids.tolist() == [[0]] and scores[0, 0] > 0


def test_hard_negatives_leave_out_positives_and_their_twins():
    mined = mine_hard_negatives(["green trees", "red fox"], ANIMALS, [{2}, {0, 3}], count=2, seed=0)
    assert 2 not in mined[0] and 4 not in mined[0]
    assert mined[1][0] == 1
    assert not {0, 3} & set(mined[1])


def test_hard_negatives_come_in_the_order_of_their_scores():
    queries = ["red fox jumps"]
    ids, _ = search_bm25(ANIMALS, queries, top_k=3)
    assert mine_hard_negatives(queries, ANIMALS, [{2}], count=3, seed=0)[0] == ids[0].tolist()


def test_skipped_ranks_do_not_come_back_as_random_fill():
    ids, _ = search_bm25(ANIMALS, ["red fox"], top_k=1)
    mined = mine_hard_negatives(["red fox"], ANIMALS, [{2}], count=4, skip_first=1, seed=0)
    assert ids[0, 0] not in mined[0]


def test_fill_reaches_the_count_without_repeating_a_text():
    passages = [f"text {number % 20}" for number in range(60)]
    mined = mine_hard_negatives(["zebra"] * 5, passages, [{0}] * 5, count=19, seed=3)
    for row in mined:
        assert len(row) == 19
        assert {passages[i] for i in row} == {f"text {number}" for number in range(1, 20)}


def test_fewer_negatives_only_where_passages_run_out():
    assert sorted(mine_hard_negatives(["fox"], ["fox", "dog", "cat"], [{0}], count=8, seed=0)[0]) == [1, 2]


def test_seed_decides_the_fill_and_nothing_else():
    passages = ["red fox"] + [f"filler {number}" for number in range(200)]
    runs = [mine_hard_negatives(["red"], passages, [{1}], count=6, seed=seed)[0] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] == runs[2][0] == 0


def test_wrong_number_of_positive_sets_is_an_error_in_words():
    with pytest.raises(ValueError, match="1 queries came with 2 sets"):
        mine_hard_negatives(["fox"], ANIMALS, [{0}, {1}], count=1, seed=0)


def test_ranks_do_not_depend_on_the_hash_seed_of_the_process():
    program = (
        "from tdro_hpc.retrieval.bm25 import search_bm25\n"
        "corpus = [' '.join(f'w{(i * j) % 17}' for j in range(1, 9)) for i in range(50)]\n"
        "ids, scores = search_bm25(corpus, ['w1 w2 w3 w5 w7 w11'], 20)\n"
        "print(ids.tolist(), scores.tobytes().hex())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_search_prints_and_logs_nothing(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]):
    caplog.set_level(logging.DEBUG)
    search_bm25(ANIMALS, ["fox"], top_k=2)
    assert not [record for record in caplog.records if record.name.startswith("bm25s")]
    assert capfd.readouterr() == ("", "")


def test_ids_and_scores_have_the_promised_types():
    ids, scores = search_bm25(ANIMALS, ["fox", "red"], top_k=3)
    assert ids.dtype == np.int64 and scores.dtype == np.float32
    assert ids.shape == scores.shape == (2, 3)
