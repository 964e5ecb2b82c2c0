"""Scores of several models on several test sets in; scores.json, a text table and cells for the report out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tdro_hpc.evaluation.metrics import METRICS
from tdro_hpc.evaluation.significance import PERMUTATIONS, paired_p_value, stars

AVERAGE = "average"


@dataclass(frozen=True)
class SetScores:
    """One model on one test set."""

    per_query: dict[str, dict[str, float]]  # query id -> metric -> value
    means: dict[str, float]  # metric -> mean


@dataclass(frozen=True)
class SetFacts:
    """What the table says about a test set."""

    queries: int
    documents: int
    notes: tuple[str, ...]  # what was left out, in words


def build_scores(
    scores: Mapping[str, Mapping[str, SetScores]], facts: Mapping[str, SetFacts], *, baseline: str, seed: int
) -> dict[str, Any]:
    """Everything the tables show, as JSON: means, their averages over sets, and p-values against the baseline.

    scores    model -> test set -> scores; every model has every set
    baseline  model that the others are compared with; its own p-values are left out
    """
    models, sets = list(scores), list(facts)
    assert baseline in models, f"the baseline {baseline} is not among {models}"
    table: dict[str, Any] = {
        "metrics": list(METRICS),
        "models": models,
        "baseline": baseline,
        "test": f"two-sided paired randomisation test, {PERMUTATIONS} permutations, seed {seed}",
        "sets": {
            name: {
                "queries": facts[name].queries,
                "documents": facts[name].documents,
                "notes": list(facts[name].notes),
                "scores": {model: dict(scores[model][name].means) for model in models},
                "p": _p_values(scores, [name], baseline=baseline, seed=seed),
            }
            for name in sets
        },
    }
    table[AVERAGE] = {
        "scores": {
            model: {metric: sum(scores[model][name].means[metric] for name in sets) / len(sets) for metric in METRICS}
            for model in models
        },
        "p": _p_values(scores, sets, baseline=baseline, seed=seed),
    }
    return table


def _p_values(
    scores: Mapping[str, Mapping[str, SetScores]], sets: Sequence[str], *, baseline: str, seed: int
) -> dict[str, dict[str, float]]:
    return {
        model: {
            metric: paired_p_value(
                [_differences(scores[model][name], scores[baseline][name], metric) for name in sets],
                seed=seed,
                purpose=f"{'+'.join(sets)}/{model}/{baseline}/{metric}",
            )
            for metric in METRICS
        }
        for model in scores
        if model != baseline
    }


def _differences(ours: SetScores, theirs: SetScores, metric: str) -> list[float]:
    assert ours.per_query.keys() == theirs.per_query.keys(), "both models answered the same queries"
    return [values[metric] - theirs.per_query[query][metric] for query, values in ours.per_query.items()]


def table_cells(scores: Mapping[str, Any], metric: str) -> list[list[str]]:
    """Rows of one metric, all text: a heading, a row a test set, the averages where there are several sets."""
    rows = [[metric, "queries", *scores["models"]]]
    for name, section in scores["sets"].items():
        rows.append([name, str(section["queries"]), *_cells(section, scores["models"], metric)])
    if len(scores["sets"]) > 1:
        rows.append([AVERAGE, "", *_cells(scores[AVERAGE], scores["models"], metric)])
    return rows


def _cells(section: Mapping[str, Any], models: Sequence[str], metric: str) -> list[str]:
    return [
        f"{section['scores'][model][metric]:.4f}{stars(section['p'].get(model, {}).get(metric, 1.0))}"
        for model in models
    ]


def legend(scores: Mapping[str, Any]) -> list[str]:
    """Lines that explain the marks and name what was left out of each test set."""
    lines = []
    if len(scores["models"]) > 1:
        lines = [
            f"** p <= 0.01, * p <= 0.05 that the difference to {scores['baseline']} is chance, either way up",
            f"({scores['test']}; not corrected for the number of comparisons)",
        ]
    for name, section in scores["sets"].items():
        lines += [f"{name}: {note}" for note in section["notes"]]
    return lines


def format_table(scores: Mapping[str, Any]) -> str:
    """The tables of all metrics as text, with the legend; columns stand at the same place in all of them."""
    blocks = [table_cells(scores, metric) for metric in scores["metrics"]]
    columns = zip(*(row for block in blocks for row in block), strict=True)
    widths = [max(len(cell) for cell in column) for column in columns]
    tables = ["\n".join(_line(row, widths) for row in block) for block in blocks]
    return "\n\n".join([*tables, "\n".join(legend(scores))]).strip() + "\n"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name, queries, *values = row
    cells = [name.ljust(widths[0]), queries.rjust(widths[1])]
    cells += [value.ljust(width) for value, width in zip(values, widths[2:], strict=True)]
    return "  ".join(cells).rstrip()
