"""Folders of ids in, one Record a query out: BEIR and MS MARCO, where queries, texts and judgements are apart.

Texts stay on disk: each row reads its own lines by id (keyedfile.py). Rows are the queries with a positive judgement,
in the order of the judgements.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdro_hpc.data.derived import derived_folder
from tdro_hpc.data.keyedfile import KeyedFile, fields_of, first_field
from tdro_hpc.data.record import Candidate, Record
from tdro_hpc.data.rowfile import SKIPPED_LINES_KEPT

logger = logging.getLogger(__name__)

MAX_MINED = 100  # documents of a run file that become negatives of a query, best first: each is one read from disk
INDEX_VERSION = "1"
BEIR_EXAMPLE = (
    'corpus.jsonl: {"_id": "12", "title": "Emma", "text": "A novel by Jane Austen"}   '
    'queries.jsonl: {"_id": "7", "text": "who wrote Emma"}   qrels/train.tsv: 7<TAB>12<TAB>1'
)
MSMARCO_EXAMPLE = (
    "collection.tsv: 12<TAB>Emma is a novel by Jane Austen   queries.train.tsv: 7<TAB>who wrote Emma   "
    "qrels.train.tsv: 7<TAB>0<TAB>12<TAB>1   run.train.tsv: 7<TAB>98<TAB>1"
)


@dataclass(frozen=True)
class JoinedFiles:
    """The files of one folder and split."""

    judgements: Path
    queries: Path
    documents: Path
    run: Path | None  # mined negatives
    key: str  # how the id of a query or document line is found: a name in keyedfile.KEYS


def joined_record(row: Any) -> Record:
    """Record of one joined row: judged positives, judged negatives, then mined documents.

    row  {"query_id", "query", "documents": [{"docid", "title", "text", "label", "source", "scores"}]}
    """
    if not row["query"].strip():
        raise ValueError(f"query {row['query_id']} is empty")
    candidates = tuple(
        Candidate(
            document["text"],
            document["title"],
            document["docid"],
            label=document["label"],
            source=document["source"],
            scores=document["scores"],
        )
        for document in row["documents"]
    )
    for candidate in candidates:
        if candidate.label == 1 and not candidate.full_text.strip():
            raise ValueError(f"document {candidate.id}, a positive of query {row['query_id']}, is empty")
    return Record(row["query"], candidates, row["query_id"])


class JoinedRows:
    """Rows of a BEIR or MS MARCO folder. Can be pickled and forked.

    check    None, or as in rowfile.RowFile: called with each raw row once, when the index is built
    variant  word for the check
    """

    def __init__(
        self, files: JoinedFiles, *, cache_dir: str, check: Callable[[Any], object] | None, variant: str
    ) -> None:
        self.files = files
        self._judgements = KeyedFile(files.judgements, cache_dir=cache_dir, key="first_field")
        self._queries = KeyedFile(files.queries, cache_dir=cache_dir, key=files.key)
        self._documents = KeyedFile(files.documents, cache_dir=cache_dir, key=files.key)
        self._run = KeyedFile(files.run, cache_dir=cache_dir, key="first_field") if files.run else None
        self.path = self._judgements.path
        stamps = [self._judgements.stamp]
        if check is not None:  # which rows are good depends on every file
            stamps += [self._queries.stamp, self._documents.stamp, self._run.stamp if self._run else ""]
        self.index = derived_folder(
            self.path,
            f"{variant}-v{INDEX_VERSION}.queries",
            stamp=hashlib.blake2b(" ".join(stamps).encode(), digest_size=8).hexdigest(),
            cache_dir=cache_dir if self.path == files.judgements else "",
            build=lambda folder: self._build(folder, check),
        )
        facts = json.loads((self.index / "facts.json").read_text())
        self.skipped_rows: int = facts["skipped_rows"]
        self.skipped_lines: list[int] = facts["skipped_lines"]
        self.first_problem: str = facts["first_problem"]
        self._places: np.ndarray = np.load(self.index / "places.npy")  # int64 [rows, 2]

    def __len__(self) -> int:
        return len(self._places)

    def raw(self, row: int) -> Any:
        """Texts and judgements of a row, as joined_record takes them; ValueError when an id has no text."""
        if not 0 <= row < len(self._places):
            raise IndexError(f"row {row} of {self.path}, which has {len(self._places)} queries with a positive")
        return self._raw_at(*self._places[row].tolist())

    def place(self, row: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.path}, line {self._judgements.line_at(int(self._places[row, 0]))}"

    def _raw_at(self, start: int, end: int) -> dict[str, Any]:
        query_id = first_field(self._judgements.stretch(start, end)[0])
        judged = dict(judgement_of(line) for line in self._judgements.lines([query_id])[0])
        mined = self._mined(query_id, judged)
        texts = self._texts([*judged, *(docid for docid, _ in mined)], query_id)
        query_lines = self._queries.lines([query_id])[0]
        if not query_lines:
            raise ValueError(f"query {query_id} is judged but is not in {self._queries.path}")
        documents = [
            {**text, "label": 1 if grade > 0 else -1, "source": "", "scores": {}}
            for text, grade in zip(texts, judged.values(), strict=False)
        ]
        documents.sort(key=lambda document: -document["label"])  # stable: positives first
        run = self.files.run.name if self.files.run else ""
        documents += [
            {**text, "label": 0, "source": run, "scores": scores}
            for text, (_, scores) in zip(texts[len(judged) :], mined, strict=True)
        ]
        return {"query_id": query_id, "query": text_of(query_lines[0])["text"], "documents": documents}

    def _mined(self, query_id: str, judged: dict[str, int]) -> list[tuple[str, dict[str, float]]]:
        """(document id, scores) of the run, best first, judged documents left out."""
        if self._run is None:
            return []
        ranked = sorted((ranked_of(line) for line in self._run.lines([query_id])[0]), key=lambda entry: entry[0])
        return [(docid, scores) for _, docid, scores in ranked if docid not in judged][:MAX_MINED]

    def _texts(self, ids: list[str], query_id: str) -> list[dict[str, Any]]:
        found = self._documents.lines(ids)
        missing = [docid for docid, lines in zip(ids, found, strict=True) if not lines]
        if missing:
            raise ValueError(f"document {missing[0]} of query {query_id} is not in {self._documents.path}")
        return [{"docid": docid, **text_of(lines[0])} for docid, lines in zip(ids, found, strict=True)]

    def _build(self, folder: Path, check: Callable[[Any], object] | None) -> None:
        """Write places.npy (the first stretch of each query with a positive) and facts.json."""
        first: dict[str, tuple[int, int]] = {}
        with_positive = set()
        for start, end in self._judgements.places_in_order.tolist():
            lines = self._judgements.stretch(start, end)
            if start == 0 and is_header(lines[0]):
                continue
            query_id = first_field(lines[0])
            first.setdefault(query_id, (start, end))
            if any(self._grade(line, start) > 0 for line in lines):
                with_positive.add(query_id)
        if len(with_positive) < len(first):
            logger.info("%s: %d queries have no positive", self.path, len(first) - len(with_positive))
        places = [place for query_id, place in first.items() if query_id in with_positive]
        problems: dict[int, str] = {}
        for row, (start, end) in enumerate(places if check else []):
            assert check is not None, "rows are only walked for a check"
            try:
                check(self._raw_at(start, end))
            except ValueError as error:
                problems[row] = str(error)
        skipped = [self._judgements.line_at(places[row][0]) for row in list(problems)[:SKIPPED_LINES_KEPT]]
        kept = [place for row, place in enumerate(places) if row not in problems]
        np.save(folder / "places.npy", np.array(kept, np.int64).reshape(-1, 2))
        first_problem = next(iter(problems.values()), "")
        facts = {"skipped_rows": len(problems), "skipped_lines": skipped, "first_problem": first_problem}
        (folder / "facts.json").write_text(json.dumps(facts))

    def _grade(self, line: bytes, offset: int) -> int:
        try:
            return judgement_of(line)[1]
        except ValueError as error:
            raise ValueError(f"{self.path}, near line {self._judgements.line_at(offset)}: {error}") from error


def is_header(line: bytes) -> bool:
    """Whether a first line names its columns: its last field is no number."""
    return not fields_of(line)[-1].strip().lstrip("-").replace(".", "", 1).isdigit()


def judgement_of(line: bytes) -> tuple[str, int]:
    """(document id, grade) of a qrels line: query, document, grade, or with a column between query and document."""
    fields = fields_of(line)
    if len(fields) not in (3, 4):
        raise ValueError(f"a judgement has 3 columns (BEIR) or 4 (TREC), this line has {len(fields)}: {fields[:6]}")
    try:
        return fields[-2], int(float(fields[-1]))
    except ValueError:
        raise ValueError(f"the grade {fields[-1]!r} is not a number") from None


def ranked_of(line: bytes) -> tuple[int, str, dict[str, float]]:
    """(rank, document id, scores) of a run line: query, document, rank, or the 6 columns of TREC."""
    fields = fields_of(line)
    try:
        if len(fields) == 3:
            return int(fields[2]), fields[1], {}
        if len(fields) == 6:
            return int(fields[3]), fields[2], {"run": float(fields[4])}
    except ValueError:
        raise ValueError(f"rank and score of a run are numbers, this line has {fields}") from None
    raise ValueError(f"a run has 3 columns (MS MARCO) or 6 (TREC), this line has {len(fields)}: {fields[:8]}")


def text_of(line: bytes) -> dict[str, str]:
    """Title and text of a line: a BEIR object, id TAB text, or id TAB url TAB title TAB body."""
    if line.startswith(b"{"):
        value = json.loads(line)
        title, text = value.get("title") or "", value.get("text")
        if not isinstance(title, str) or not isinstance(text, str):
            raise ValueError(f"title and text of document {value.get('_id')} are expected to be texts")
        return {"title": title, "text": text}
    fields = line.decode().split("\t")
    if len(fields) == 2:
        return {"title": "", "text": fields[1]}
    if len(fields) == 4:
        return {"title": fields[2], "text": fields[3]}
    raise ValueError(f"{fields[0]!r} has {len(fields)} columns; 2 (id, text) or 4 (id, url, title, body) are expected")
