import json

import pytest

from tdro_hpc.dro.artefacts import check_percents, document_of, documents_of, percents_of, top_of, write_documents

SIZES = {"a": 100, "b": 300, "c": 600}


def test_document_has_the_released_maps():
    document = document_of({"a": 2.0, "b": 1.0, "c": 1.0}, SIZES)
    assert document["domain_ids"] == {"a": 0, "b": 1, "c": 2}
    assert document["domain_weights"] == {"a": 0.5, "b": 0.25, "c": 0.25}
    assert document["size"] == SIZES
    assert document["epoch"] == {"a": 5.0, "b": pytest.approx(250 / 300), "c": pytest.approx(250 / 600)}


def test_top_keeps_the_floor_of_the_share_in_falling_order():
    weights = {name: weight for name, weight in zip("abcdefghij", [1, 9, 2, 8, 3, 7, 4, 6, 5, 0.5], strict=True)}
    assert list(top_of(weights, 75)) == ["b", "d", "f", "h", "i", "g", "e"]
    assert set(top_of(weights, 75).values()) == {1 / 7}


def test_top_counts_of_the_release():
    weights = {f"task{position}": 1.0 for position in range(25)}
    kept = [len(top_of(weights, percent)) for percent in (20, 30, 40, 50, 60, 70, 80, 90)]
    assert kept == [5, 7, 10, 12, 15, 17, 20, 22]


def test_top_of_too_few_tasks_says_so():
    with pytest.raises(ValueError, match="top20 of 3 tasks keeps 0 tasks.*top_percents=34"):
        top_of({"a": 1.0, "b": 1.0, "c": 1.0}, 20)


def test_refused_percents_come_with_those_that_work():
    check_percents([34, 100], 3)
    with pytest.raises(ValueError, match="top20, top30 of 3 tasks keeps 0 .*s1.top_percents=40,50.$"):
        check_percents([20, 30, 40, 50], 3)


def test_percents_that_are_no_numbers_are_named():
    assert percents_of("20, 70") == [20, 70]
    with pytest.raises(ValueError, match="'top70'"):
        percents_of("20,top70")


def test_files_are_written_whole(tmp_path):
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    write_documents(documents_of(weights, weights, weights, SIZES, [50, 70]), tmp_path / "weights")
    names = sorted(path.name for path in (tmp_path / "weights").iterdir())
    assert names == [
        "curr_weights.json",
        "ema_weights.json",
        "mean_weights.json",
        "top50_weights.json",
        "top70_weights.json",
    ]
    assert json.loads((tmp_path / "weights" / "top70_weights.json").read_text())["domain_ids"] == {"a": 0, "b": 1}
