"""This machine's documentation in, training files and test sets out. Nothing here needs the network or torch."""

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdro_hpc.config.schema import EmbeddedConfig
from tdro_hpc.embedded.leaks import LeakFilter
from tdro_hpc.embedded.pairs import Pair, normalised
from tdro_hpc.embedded.sources import Library, read_library
from tdro_hpc.embedded.split import split_library
from tdro_hpc.embedded.tasks_code import code_summary, comment_code, option_help, parameter_function
from tdro_hpc.embedded.tasks_prose import language_reference, module_of_function, name_summary, summary_body
from tdro_hpc.embedded.tasks_relations import related_functions, same_function
from tdro_hpc.embedded.tasks_tables import character_names, error_descriptions
from tdro_hpc.embedded.testsets import TestSet, build_test_sets, text_id, write_test_set
from tdro_hpc.retrieval.bm25 import mine_hard_negatives

# A mined passage that shares this much of its words with a positive most likely answers the query too.
NEAR_POSITIVE = 0.8
LONG_TEXT = 12  # distinct words; from here on a text that another one contains is part of it, not a hard negative
MIN_ROWS = 20  # a task with fewer on this machine is an error: something that every Python carries is missing


@dataclass(frozen=True)
class TaskSource:
    """How one training task is made."""

    pairs_of: Callable[[Library], list[Pair]]
    share: float = 1.0  # of embedded.max_rows_per_task
    mine_by: str = "query"  # whose words find the negatives: query, or positive where queries are codes or templates


TASKS = {
    "summary_body": TaskSource(summary_body),
    "name_summary": TaskSource(name_summary),
    "code_summary": TaskSource(code_summary),
    "comment_code": TaskSource(comment_code),
    "parameter_function": TaskSource(parameter_function),
    "module_of_function": TaskSource(module_of_function, share=0.6),
    "language_reference": TaskSource(language_reference, mine_by="positive"),
    "same_function": TaskSource(same_function),
    "related_functions": TaskSource(related_functions),
    "option_help": TaskSource(option_help),
    "error_descriptions": TaskSource(error_descriptions, mine_by="positive"),
    "character_names": TaskSource(character_names, share=0.6, mine_by="positive"),
}


def build_embedded(
    folder: Path, config: EmbeddedConfig, *, seed: int, before_task: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Fill `folder` with train/<task>.jsonl, test/<set>/ and facts.json; the facts are returned.

    folder       exists and is empty; the caller gives it its final name when all is written
    seed         decides what is held out, drawn and filled up; one machine and seed always give the same bytes
    before_task  called with the number of tasks that are done, before each task; may raise to end the build
    raises       ValueError where a task finds too little documentation on this machine
    """
    started = time.perf_counter()
    library = read_library()
    train_part, test_part = split_library(library, seed=seed)
    test_sets = build_test_sets(
        test_part, num_queries=config.test_queries, num_documents=config.test_documents, seed=seed
    )
    guard = LeakFilter(text for test_set in test_sets.values() for text in test_set.protected())
    (folder / "train").mkdir()
    tasks: dict[str, dict[str, Any]] = {}
    for name, source in TASKS.items():
        before_task(len(tasks))
        tasks[name] = _build_task(folder / "train" / f"{name}.jsonl", name, source, train_part, guard, config, seed)
    for name, test_set in test_sets.items():
        write_test_set(test_set, folder / "test" / name)
    facts = {
        "seed": seed,
        "files_read": library.files,
        "files_unreadable": library.unreadable,
        "tasks": tasks,
        "test_sets": {name: _facts_of_test_set(test_set) for name, test_set in test_sets.items()},
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    rows = sum(task["rows"] for task in tasks.values())
    print(f"embedded data: {rows} rows of {len(tasks)} tasks in {time.perf_counter() - started:.0f} s")
    return facts


def _build_task(
    path: Path,
    name: str,
    source: TaskSource,
    library: Library,
    guard: LeakFilter,
    config: EmbeddedConfig,
    seed: int,
) -> dict[str, Any]:
    """Write one training file; returns its facts."""
    draws = random.Random(f"{seed}/train/{name}")
    found = source.pairs_of(library)
    found = draws.sample(found, len(found))
    wanted = round(config.max_rows_per_task * source.share)
    pairs: list[Pair] = []
    leaking_queries = leaking_passages = 0
    for pair in found:
        if len(pairs) == wanted:
            break
        positives = tuple(text for text in pair.positives if not guard.leaks(text))
        leaking_passages += len(pair.positives) - len(positives)
        if guard.leaks(pair.query):
            leaking_queries += 1
        elif positives:
            pairs.append(Pair(pair.query, positives))
    if len(pairs) < MIN_ROWS:
        raise ValueError(
            f"The embedded task {name} found {len(pairs)} rows on this machine; it needs {MIN_ROWS}. Install this "
            "package's dependencies with their sources, or bring your own files with data.dir=<folder> data=<name>."
        )
    rows = _rows(name, pairs, source.mine_by, config.hard_negatives, seed)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {
        "rows": len(rows),
        "pairs_found": len(found),
        "passages": len({text for pair in pairs for text in pair.positives}),
        "positives_per_row": round(statistics.fmean(len(pair.positives) for pair in pairs), 2),
        "query_characters": round(statistics.fmean(len(pair.query) for pair in pairs)),
        "passage_characters": round(statistics.fmean(len(text) for pair in pairs for text in pair.positives)),
        "negatives_per_row": round(statistics.fmean(len(row["negative_passages"]) for row in rows), 2),
        "removed_leaking_queries": leaking_queries,
        "removed_leaking_passages": leaking_passages,
    }


def _rows(name: str, pairs: list[Pair], mine_by: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the released tDRO form, with BM25 negatives from the task's own passages."""
    passages = list(dict.fromkeys(text for pair in pairs for text in pair.positives))
    position_of = {text: position for position, text in enumerate(passages)}
    positives = [{position_of[text] for text in pair.positives} for pair in pairs]
    queries = [pair.positives[0] if mine_by == "positive" else pair.query for pair in pairs]
    # Twice as many as needed: those that nearly repeat a positive or each other are left out below.
    mined = mine_hard_negatives(queries, passages, positives, count=2 * count, seed=seed)
    words = [frozenset(normalised(text).split()) for text in passages]
    rows = []
    for pair, own, candidates in zip(pairs, positives, mined, strict=True):
        # In a symmetric task the query is a passage too, and its own best match.
        known = [frozenset(normalised(pair.query).split()), *(words[position] for position in sorted(own))]
        negatives: list[int] = []
        for candidate in candidates:
            if len(negatives) < count and not any(_near(words[candidate], other) for other in known):
                negatives.append(candidate)
                known.append(words[candidate])
        rows.append(
            {
                "query_id": f"{name}-{text_id(pair.query)}",
                "query": pair.query,
                "positive_passages": [_passage(text) for text in pair.positives],
                "negative_passages": [_passage(passages[position]) for position in negatives],
            }
        )
    return rows


def _near(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two texts have nearly the same words, or a longer one nearly all words of the other."""
    common = len(one & other)
    shorter = min(len(one), len(other))
    return common >= NEAR_POSITIVE * len(one | other) or (shorter >= LONG_TEXT and common >= NEAR_POSITIVE * shorter)


def _passage(text: str) -> dict[str, str]:
    return {"docid": text_id(text), "title": "", "text": text}


def _facts_of_test_set(test_set: TestSet) -> dict[str, Any]:
    return {
        "queries": len(test_set.queries),
        "documents": len(test_set.documents),
        "judgements": sum(map(len, test_set.judgements.values())),
        "query_characters": round(statistics.fmean(map(len, test_set.queries.values()))),
        "document_characters": round(statistics.fmean(map(len, test_set.documents.values()))),
    }
