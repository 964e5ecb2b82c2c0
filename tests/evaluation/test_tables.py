import json

import pytest

from tdro_hpc.evaluation.metrics import METRICS
from tdro_hpc.evaluation.tables import SetFacts, SetScores, build_scores, format_table, table_cells


def set_scores(values):
    per_query = {f"q{number}": dict.fromkeys(METRICS, value) for number, value in enumerate(values)}
    return SetScores(per_query, dict.fromkeys(METRICS, sum(values) / len(values)))


def scores_of(sets=("x", "y")):
    better, worse = [0.6 + 0.01 * number for number in range(12)], [0.5] * 12
    scores = {
        "base": {name: set_scores(worse) for name in sets},
        "s0": {name: set_scores(worse) for name in sets},
        "s2-curr": {name: set_scores(better) for name in sets},
    }
    facts = {name: SetFacts(12, 100, ("3 judged queries are odd",) if name == "x" else ()) for name in sets}
    return build_scores(scores, facts, baseline="s0", seed=1)


def test_means_averages_and_p_values_are_in_the_json():
    table = json.loads(json.dumps(scores_of()))
    assert table["models"] == ["base", "s0", "s2-curr"] and table["baseline"] == "s0"
    assert table["sets"]["x"]["scores"]["s0"]["nDCG@10"] == 0.5
    assert table["average"]["scores"]["s2-curr"]["MRR@10"] == pytest.approx(0.655)
    assert table["sets"]["x"]["p"]["base"]["nDCG@10"] == 1.0
    # All 12 differences have one sign: 2 of 2^12 patterns are as far out.
    assert table["sets"]["x"]["p"]["s2-curr"]["nDCG@10"] == pytest.approx(2 / 2**12)
    assert "s0" not in table["average"]["p"] and table["average"]["p"]["s2-curr"]["nDCG@10"] < 0.001


def test_cells_hold_a_row_a_set_and_the_average_with_stars():
    assert table_cells(scores_of(), "nDCG@10") == [
        ["nDCG@10", "queries", "base", "s0", "s2-curr"],
        ["x", "12", "0.5000", "0.5000", "0.6550**"],
        ["y", "12", "0.5000", "0.5000", "0.6550**"],
        ["average", "", "0.5000", "0.5000", "0.6550**"],
    ]
    assert len(table_cells(scores_of(("x",)), "nDCG@10")) == 2  # one set is its own average


def test_text_table_has_all_metrics_the_legend_and_the_notes():
    text = format_table(scores_of())
    for words in (*METRICS, "** p <= 0.01", "s0", "10000 permutations, seed 1", "x: 3 judged queries are odd"):
        assert words in text
    starts = [line.index("0.5000") for line in text.splitlines() if line.startswith(("x  ", "y  ", "average"))]
    assert len(set(starts)) == 1 and len(starts) == 9
