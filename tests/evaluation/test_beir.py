import gzip
import json

import numpy as np
import pytest

from tdro_hpc.evaluation.beir import SetOptions, find_collections, load_judgements, load_options, open_collection

DOCUMENTS = [
    {"_id": "d1", "title": "Apples", "text": "grow on trees"},
    {"_id": "d2", "text": "pears do too"},
    {"_id": "d3", "title": "", "text": "caf\u00e9 \u6771\u4eac", "metadata": {"url": "x"}},
]
QUERIES = [{"_id": "q2", "text": "what grows"}, {"_id": "q1", "text": "pears"}, {"_id": "q9", "text": "unjudged"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td2\t1\nq2\td1\t2\nq2\td3\t0\n"


def make_set(folder, documents=DOCUMENTS, queries=QUERIES, qrels=QRELS, packed=False, qrels_name="test.tsv"):
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", documents), ("queries", queries)):
        content = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()
        path = folder / f"{name}.jsonl{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
    (folder / "qrels" / qrels_name).write_text(qrels)
    return folder


def open_set(folder, **options):
    return open_collection(folder, options=SetOptions(**options), cache_dir=str(folder.parent / "cache"))


@pytest.mark.parametrize("packed", [False, True])
def test_titles_are_joined_and_only_judged_queries_are_kept(tmp_path, packed):
    collection = open_set(make_set(tmp_path / "fruit", packed=packed))
    texts = [collection.documents.text(row) for row in range(3)]
    assert texts == ["Apples grow on trees", "pears do too", "caf\u00e9 \u6771\u4eac"]
    assert collection.documents.lengths.tolist() == [len(text) for text in texts]
    assert [collection.queries.id(row) for row in range(len(collection.queries))] == ["q2", "q1"]
    assert [collection.queries.text(row) for row in range(2)] == ["what grows", "pears"]
    assert collection.queries.lengths.tolist() == [10, 5]
    assert collection.judgements == {"q1": {"d2": 1}, "q2": {"d1": 2, "d3": 0}}
    assert collection.name == "fruit" and collection.notes == ()


def test_what_is_left_out_is_counted_in_words(tmp_path):
    qrels = "q1\td2\t1\nq1\tgone\t1\nq2\td1\t0\nq7\td1\t1\n"
    collection = open_set(make_set(tmp_path / "fruit", qrels=qrels))
    assert list(collection.judgements) == ["q1"]
    assert [note.split()[0] for note in collection.notes] == ["1", "1", "1"]
    assert "no relevant document" in collection.notes[0] and "not among the queries" in collection.notes[1]
    assert "not in the corpus" in collection.notes[2]


def test_fingerprint_follows_texts_judgements_and_exclusions(tmp_path):
    marks = [open_set(make_set(tmp_path / "a")).fingerprint]
    assert open_set(make_set(tmp_path / "b")).fingerprint == marks[0]
    changed = [DOCUMENTS[0], {"_id": "d2", "text": "pears do so"}, DOCUMENTS[2]]
    marks.append(open_set(make_set(tmp_path / "c", documents=changed)).fingerprint)
    marks.append(open_set(make_set(tmp_path / "d", qrels=QRELS + "q1\td1\t1\n")).fingerprint)
    marks.append(open_set(make_set(tmp_path / "e", queries=[QUERIES[0], {"_id": "q1", "text": "a pear"}])).fingerprint)
    assert len(set(marks)) == 4


def test_a_changed_file_is_read_again(tmp_path):
    folder = make_set(tmp_path / "fruit")
    assert len(open_set(folder).documents) == 3
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d4", "text": "plums"}\n')
    assert open_set(folder).documents.text(3) == "plums"


def test_same_id_is_excluded_only_where_it_is_the_same_text(tmp_path):
    documents = [
        {"_id": "1", "title": "Debate", "text": "we should act now"},
        {"_id": "2", "text": "numbered by accident"},
        {"_id": "3", "text": "dogs bark loudly"},
    ]
    texts = {"1": "we should act now", "2": "else", "3": "dogs bark"}
    queries = [{"_id": name, "text": text} for name, text in texts.items()]
    qrels = "1\t2\t1\n2\t3\t1\n3\t3\t1\n"
    folder = make_set(tmp_path / "s", documents=documents, queries=queries, qrels=qrels)
    assert open_set(folder).own_documents == {"1": "1"}  # 3 holds its text, and is judged relevant
    assert open_set(folder, same_id="exclude").own_documents == {"1": "1", "2": "2", "3": "3"}
    assert open_set(folder, same_id="keep").own_documents == {}


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"_id": "d9"}\n', "no 'text' among the keys _id"),
        ('{"text": "x"}\n', "no '_id' among"),
        ('{"_id": "d9", "text": 5}\n', "text or title is not a string"),
        ('{"_id": "d9", "text": }\n', "not JSON"),
    ],
)
def test_a_bad_row_names_file_line_and_what_is_expected(tmp_path, line, problem):
    folder = make_set(tmp_path / "fruit", documents=[*DOCUMENTS, line])
    with pytest.raises(ValueError, match="corpus.jsonl, line 4: .*expected is a line such as") as raised:
        open_set(folder)
    assert problem in str(raised.value)


def test_an_id_that_comes_twice_is_named_with_its_rows(tmp_path):
    with pytest.raises(ValueError, match="'d1' comes twice, in rows 1 and 4"):
        open_set(make_set(tmp_path / "fruit", documents=[*DOCUMENTS, DOCUMENTS[0]]))


@pytest.mark.parametrize("line", ["q1 d1 1", "q1\td1", "q1\td1\thigh", "q1\td1\t0.5"])
def test_a_bad_judgement_names_file_and_line(tmp_path, line):
    path = tmp_path / "test.tsv"
    path.write_text(f"query-id\tcorpus-id\tscore\nq1\td2\t1\n{line}\n")
    with pytest.raises(ValueError, match=r"test.tsv, line 3: got .*expected is: query id, tab"):
        load_judgements(path)


def test_judgements_that_contradict_are_a_mistake(tmp_path):
    path = tmp_path / "test.tsv"
    path.write_text("q1\td2\t1\nq1\td2\t1\nq1\td2\t2\n")
    with pytest.raises(ValueError, match="line 3: q1 and d2"):
        load_judgements(path)


def test_ids_that_do_not_meet_are_a_mistake_that_shows_one(tmp_path):
    with pytest.raises(ValueError, match="none with a grade of 1 or more is in queries.jsonl .such as 'x1'"):
        open_set(make_set(tmp_path / "a", qrels="x1\td1\t1\n"))
    with pytest.raises(ValueError, match="none of its 1 relevant documents is in the corpus .such as 'x1'"):
        open_set(make_set(tmp_path / "b", qrels="q1\tx1\t1\n"))


def test_the_only_file_of_judgements_is_taken_and_several_are_named(tmp_path):
    folder = make_set(tmp_path / "fruit", qrels_name="dev.tsv")
    assert len(open_set(folder).queries) == 2
    (folder / "qrels" / "train.tsv").write_text(QRELS)
    with pytest.raises(ValueError, match="it has: dev.tsv, train.tsv"):
        open_set(folder)
    (folder / "qrels" / "test.tsv").write_text("q1\td1\t1\n")
    assert open_set(folder).judgements == {"q1": {"d1": 1}}


def test_test_sets_are_found_in_a_folder_or_are_the_folder(tmp_path):
    for name in ("b", "a"):
        make_set(tmp_path / "sets" / name)
    (tmp_path / "sets" / "notes").mkdir()
    assert [path.name for path in find_collections(tmp_path / "sets", "")] == ["a", "b"]
    assert [path.name for path in find_collections(tmp_path / "sets", "b, a")] == ["b", "a"]
    assert find_collections(tmp_path / "sets" / "a", "") == [tmp_path / "sets" / "a"]
    with pytest.raises(ValueError, match="eval.sets names 'aa'.*Did you mean a"):
        find_collections(tmp_path / "sets", "aa")
    with pytest.raises(ValueError, match="holds no test set"):
        find_collections(tmp_path / "sets" / "notes", "")
    with pytest.raises(ValueError, match="is no folder. Set eval.dir="):
        find_collections(tmp_path / "nowhere", "")


def test_options_are_read_by_set_and_a_wrong_key_is_named(tmp_path):
    assert load_options(tmp_path) == {}
    path = tmp_path / "tests.yaml"
    path.write_text("fruit:\n  instruction: ''\n  symmetric: true\n  same_id: keep\nother: {}\n")
    assert load_options(tmp_path) == {"fruit": SetOptions("", True, "keep"), "other": SetOptions()}
    for text, problem in [
        ("fruit:\n  instructions: x\n", "the key 'instructions'; it knows instruction, symmetric, same_id"),
        ("fruit:\n  same_id: never\n", "fruit: same_id is 'never'"),
        ("fruit:\n  symmetric: 'yes'\n", "symmetric true or false"),
        ("- fruit\n", "expected are lines such as"),
        ("fruit: [\n", "is not YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=problem):
            load_options(tmp_path)


def test_rows_of_finds_ids_and_says_which_are_not_there(tmp_path):
    documents = open_set(make_set(tmp_path / "fruit")).documents
    assert documents.rows_of(["d3", "d0", "d1", "zzzzzzzz", ""]).tolist() == [2, -1, 0, -1, -1]
    assert documents.some(np.array([2, 0])).rows_of(["d1"]).tolist() == [1]
