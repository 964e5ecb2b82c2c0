import json
import random
from pathlib import Path

from tdro_hpc.embedded.pairs import Pair
from tdro_hpc.embedded.testsets import TestSet, draw_test_set, write_test_set

PAIRS = [Pair(f"query {number}", (f"document {number}", "shared document")) for number in range(30)]


def test_relevant_documents_come_first_and_distractors_fill_up():
    drawn = draw_test_set(PAIRS[:2], [Pair("x", (f"filler {n}",)) for n in range(9)], 10, 6, random.Random(0))
    assert len(drawn.queries) == 2 and len(drawn.documents) == 6
    texts = set(drawn.documents.values())
    assert {"document 0", "document 1", "shared document"} <= texts
    assert sum(text.startswith("filler") for text in texts) == 3


def test_queries_stop_where_their_documents_no_longer_fit():
    drawn = draw_test_set(PAIRS, [], 30, 5, random.Random(0))
    assert len(drawn.documents) == 5 and len(drawn.queries) == 4


def test_judgements_name_every_positive_and_only_existing_documents():
    drawn = draw_test_set(PAIRS, [], 10, 100, random.Random(0))
    assert set(drawn.judgements) == set(drawn.queries)
    for query, keys in drawn.judgements.items():
        number = drawn.queries[query].split()[1]
        assert {drawn.documents[key] for key in keys} == {f"document {number}", "shared document"}


def test_documents_that_read_the_same_are_one():
    pairs = [Pair("one", ("Cut it.",)), Pair("two", ("cut IT",))]
    drawn = draw_test_set(pairs, [], 10, 100, random.Random(0))
    assert len(drawn.documents) == 1
    assert {key for keys in drawn.judgements.values() for key in keys} == set(drawn.documents)


def test_protected_are_queries_and_relevant_documents_without_distractors():
    made = TestSet({"q": "query"}, {"a": "answer", "d": "distractor"}, {"q": ["a"]})
    assert sorted(made.protected()) == ["answer", "query"]


def test_files_have_the_layout_of_beir(tmp_path: Path):
    made = TestSet({"q": "caf\u00e9?"}, {"a": "answer"}, {"q": ["a"]})
    write_test_set(made, tmp_path / "set")
    assert json.loads((tmp_path / "set/corpus.jsonl").read_text("utf-8")) == {"_id": "a", "title": "", "text": "answer"}
    assert json.loads((tmp_path / "set/queries.jsonl").read_text("utf-8")) == {"_id": "q", "text": "caf\u00e9?"}
    assert (tmp_path / "set/qrels/test.tsv").read_text() == "query-id\tcorpus-id\tscore\nq\ta\t1\n"
