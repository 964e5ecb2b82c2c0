"""Ranked documents and judgements in, figures per query and their means out. The figures are pytrec_eval's.

Reads no files and knows no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

METRICS = ("nDCG@10", "Recall@100", "MRR@10")

Ranking = Sequence[tuple[str, float]]  # (document id, score), best first
Judgements = Mapping[str, Mapping[str, int]]  # query id -> document id -> grade; a grade >= 1 is relevant


@dataclass(frozen=True)
class Scores:
    """Figures of one model on one test set."""

    per_query: dict[str, dict[str, float]]  # query id -> metric -> value
    means: dict[str, float]  # metric -> mean over the queries
    left_out: int  # judged queries without a relevant document


def score_run(run: Mapping[str, Ranking], judgements: Judgements) -> Scores:
    """Figures of a run; a judged query that the run lacks counts as 0 in every metric.

    nDCG uses the grades as linear gains and log2 discounts, as trec_eval and BEIR do. Queries without a relevant
    document are left out of the means, because every ranking of them scores 0, and counted.
    raises ValueError if no query has a relevant document
    """
    judged = {query: dict(grades) for query, grades in judgements.items() if max(grades.values(), default=0) >= 1}
    if not judged:
        raise ValueError(
            f"None of the {len(judgements)} judged queries has a relevant document. "
            "Judgements need at least one grade of 1 or more."
        )
    by_place = {query: _by_place(run.get(query, ())) for query in judged}
    first_ten = {query: dict(list(ranking.items())[:10]) for query, ranking in by_place.items()}
    ndcg_recall = _evaluate(by_place, judged, {"ndcg_cut.10", "recall.100"})
    # trec_eval's reciprocal rank looks at the whole ranking; it is cut by handing over ten documents.
    reciprocal = _evaluate(first_ten, judged, {"recip_rank"})
    per_query = {
        query: {
            "nDCG@10": ndcg_recall[query]["ndcg_cut_10"],
            "Recall@100": ndcg_recall[query]["recall_100"],
            "MRR@10": reciprocal[query]["recip_rank"],
        }
        for query in judged
    }
    means = {name: sum(values[name] for values in per_query.values()) / len(per_query) for name in METRICS}
    return Scores(per_query, means, left_out=len(judgements) - len(judged))


def _by_place(ranking: Ranking) -> dict[str, float]:
    """Scores that fall with the place: trec_eval would order equal scores by document id, not as we ranked them."""
    return {document: float(len(ranking) - place) for place, (document, _) in enumerate(ranking)}


def _evaluate(
    run: dict[str, dict[str, float]], judged: dict[str, dict[str, int]], measures: set[str]
) -> dict[str, dict[str, float]]:
    import pytrec_eval

    return pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(run)
