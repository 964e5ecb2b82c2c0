import json

import pytest

from tdro_hpc.config.schema import FORMATS
from tdro_hpc.data.formats import CONVERTERS, JsonRows, formats_that_fit, parsed
from tdro_hpc.data.formats.rows import llm_embedder_record, pairs_record, tdro_record

ONE_FILE = [name for name, form in CONVERTERS.items() if form.open is JsonRows]


def labelled(record):
    return record.query, [(candidate.text, candidate.label) for candidate in record.candidates]


def test_every_format_of_the_schema_has_a_converter():
    assert tuple(CONVERTERS) == FORMATS


@pytest.mark.parametrize("name", ONE_FILE)
def test_example_row_of_a_format_is_a_row_of_it(name):
    others = ["pairs"] if name == "llm_embedder" else []  # query, pos and neg are a triplet as well
    for example in CONVERTERS[name].example.split(" or "):
        assert formats_that_fit(json.loads(example)) == [name, *others]


def test_tdro_row_keeps_ids_titles_order_and_scores(tdro_row):
    positives = [{"docid": 12, "title": "T", "text": "yes", "ce_score": 3}, {"text": "also"}]
    record = tdro_record(tdro_row(7, query_id=7, positive_passages=positives))
    assert (record.query_id, record.query) == ("7", "question 7")
    assert [(c.id, c.title, c.text, c.label, c.scores) for c in record.candidates] == [
        ("12", "T", "yes", 1, {"ce": 3.0}),
        ("", "", "also", 1, {}),
        ("n7", "Other", "nothing 7", 0, {}),
    ]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"query": "  "}, "the query is empty"),
        ({"query": 3}, "query is 3, not a text"),
        ({"positive_passages": []}, "there is no positive"),
        ({"positive_passages": "text"}, "positive_passages is a text, not a list"),
        ({"positive_passages": ["text"]}, r"positive_passages\[0\] is a text, not an object"),
        ({"positive_passages": [{"text": " "}]}, "a positive is empty"),
        ({"negative_passages": [{"title": "x"}]}, r"negative_passages\[0\] has no field 'text'; it has 'title'"),
        ({"negative_passages": [{"text": None}]}, r"negative_passages\[0\].text is null"),
        ({"negative_passages": [{"text": "x", "ce_score": float("nan")}]}, "not a finite number"),
    ],
)
def test_bad_tdro_row_says_what_is_wrong(tdro_row, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        tdro_record(tdro_row(0, **changes))


def test_row_without_a_field_names_the_fields_it_has():
    with pytest.raises(ValueError, match="no field 'positive_passages'; the row has 'query', 'pos'"):
        tdro_record({"query": "q", "pos": ["a"]})


def test_llm_embedder_scores_follow_pos_then_neg():
    row = {"query": "q", "query_id": 5, "pos": ["a"], "neg": ["b", "c"], "teacher_scores": [1, 2, 3], "answers": ["x"]}
    record = llm_embedder_record(row)
    found = [(candidate.text, candidate.label, candidate.scores["teacher"]) for candidate in record.candidates]
    assert found == [("a", 1, 1), ("b", 0, 2), ("c", 0, 3)]
    assert record.answers == ("x",) and record.query_id == "5"


def test_llm_embedder_row_without_positive_takes_the_best_scored_candidate():
    history = {"query": "q", "history": ["a", "b", "c"], "teacher_scores": [-3, -1, -2]}
    assert labelled(llm_embedder_record(history)) == ("q", [("a", 0), ("b", 1), ("c", 0)])
    with pytest.raises(ValueError, match="no positive: pos is empty"):
        llm_embedder_record({"query": "q", "pos": [], "neg": ["a"]})


def test_llm_embedder_score_count_must_match():
    with pytest.raises(ValueError, match="2 numbers for 3 candidates"):
        llm_embedder_record({"query": "q", "pos": ["a"], "neg": ["b", "c"], "teacher_scores": [1, 2]})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (["a", "b"], ("a", [("b", 1)])),
        (["a", "b", "c", "d"], ("a", [("b", 1), ("c", 0), ("d", 0)])),
        ({"anchor": "a", "positive": "b"}, ("a", [("b", 1)])),
        ({"anchor": "a", "positive": "b", "negative": "c"}, ("a", [("b", 1), ("c", 0)])),
        ({"query": "a", "positive": "b", "negative_1": "c", "negative_2": "d"}, ("a", [("b", 1), ("c", 0), ("d", 0)])),
        ({"query": "a", "pos": ["b", "c"], "neg": ["d"]}, ("a", [("b", 1), ("c", 1), ("d", 0)])),
        ({"question": "a", "answer": "b"}, ("a", [("b", 1)])),
        ({"set": ["a", "b", "c"]}, ("a", [("b", 1), ("c", 1)])),
    ],
)
def test_pairs_triplets_and_sets_become_records(row, expected):
    assert labelled(pairs_record(row)) == expected


@pytest.mark.parametrize("row", [["a"], [], {"set": ["a"]}, {"anchor": "a"}, {"positive": "b"}, ["a", 1], "a", 3, None])
def test_bad_pair_raises(row):
    with pytest.raises(ValueError, match="needs 2 texts|none of the fields|not a text|not an object"):
        pairs_record(row)


@pytest.mark.parametrize(("line", "complaint"), [(b'{"a": 1', "not JSON"), (b'{"a": "\xff"}', "not UTF-8")])
def test_unreadable_line_says_why(line, complaint):
    with pytest.raises(ValueError, match=complaint):
        parsed(line)
