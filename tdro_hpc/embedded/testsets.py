"""The test part of a library in, held-out test sets with judgements out, in BEIR layout on disk."""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from tdro_hpc.embedded.pairs import Pair, normalised
from tdro_hpc.embedded.sources import Library
from tdro_hpc.embedded.tasks_code import summary_code
from tdro_hpc.embedded.tasks_prose import language_reference, summary_body
from tdro_hpc.embedded.tasks_relations import same_function

# Name -> (its pairs, more documents from the pairs of). Each is the held-out side of what a training task shows.
TEST_SETS = {
    "docstring_search": (summary_body, ()),
    "code_search": (summary_code, ()),
    "language_questions": (language_reference, (summary_body,)),
    "same_function_search": (same_function, (summary_body,)),
}


@dataclass(frozen=True)
class TestSet:
    """Queries, documents and which document answers which query."""

    __test__ = False  # not a test class of pytest, whatever its name
    queries: dict[str, str]  # id -> text
    documents: dict[str, str]  # id -> text
    judgements: dict[str, list[str]]  # query id -> ids of relevant documents

    def protected(self) -> list[str]:
        """What training must not contain: the queries and the documents that answer them."""
        relevant = {document for documents in self.judgements.values() for document in documents}
        return list(self.queries.values()) + [self.documents[document] for document in sorted(relevant)]


def text_id(text: str) -> str:
    """Name of a text that is the same on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def build_test_sets(library: Library, *, num_queries: int, num_documents: int, seed: int) -> dict[str, TestSet]:
    """All test sets of the test part of a library, with at most so many queries and documents each."""
    sets = {}
    for name, (pairs_of, more_documents_of) in TEST_SETS.items():
        distractors = [pair for more in more_documents_of for pair in more(library)]
        draws = random.Random(f"{seed}/test/{name}")
        sets[name] = draw_test_set(pairs_of(library), distractors, num_queries, num_documents, draws)
    return sets


def draw_test_set(
    pairs: list[Pair], distractors: list[Pair], num_queries: int, num_documents: int, draws: random.Random
) -> TestSet:
    """Queries of `pairs` with their documents, and others of `pairs` and `distractors` up to num_documents."""
    pairs, distractors = draws.sample(pairs, len(pairs)), draws.sample(distractors, len(distractors))
    chosen: list[Pair] = []
    texts: dict[str, str] = {}  # normalised -> text: a document is there once
    for pair in pairs:
        wanted = {normalised(positive): positive for positive in pair.positives}
        if len(chosen) < num_queries and len(texts | wanted) <= num_documents:
            chosen.append(pair)
            texts = wanted | texts
    for pair in pairs + distractors:
        for positive in pair.positives:
            if len(texts) < num_documents:
                texts.setdefault(normalised(positive), positive)
    documents = {text_id(text): text for text in sorted(texts.values())}
    return TestSet(
        queries={text_id(pair.query): pair.query for pair in chosen},
        documents=documents,
        judgements={
            text_id(pair.query): sorted({text_id(texts[normalised(positive)]) for positive in pair.positives})
            for pair in chosen
        },
    )


def write_test_set(test_set: TestSet, folder: Path) -> None:
    """corpus.jsonl, queries.jsonl and qrels/test.tsv in `folder`, which is made."""
    (folder / "qrels").mkdir(parents=True)
    corpus = ({"_id": key, "title": "", "text": text} for key, text in test_set.documents.items())
    queries = ({"_id": key, "text": text} for key, text in test_set.queries.items())
    for name, rows in (("corpus.jsonl", corpus), ("queries.jsonl", queries)):
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    lines = ["query-id\tcorpus-id\tscore"]
    lines += [f"{query}\t{key}\t1" for query, keys in test_set.judgements.items() for key in keys]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", "utf-8")
