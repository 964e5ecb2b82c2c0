"""One parsed JSON row in, one Record out: the formats that are one file with a row a line.

A converter raises ValueError with what is wrong in words; the caller adds file, line and an example.
"""

import math
from typing import Any

from tdro_hpc.data.record import Candidate, Record

TDRO_EXAMPLE = (
    '{"query_id": "7", "query": "who wrote Emma", '
    '"positive_passages": [{"docid": "12", "title": "Emma", "text": "A novel by Jane Austen"}], '
    '"negative_passages": [{"docid": "98", "title": "Emma Stone", "text": "An actress"}]}'
)
LLM_EMBEDDER_EXAMPLE = (
    '{"query": "who wrote Emma", "pos": ["Jane Austen wrote Emma"], "neg": ["Emma Stone is an actress"], '
    '"teacher_scores": [-0.5, -4.0], "answers": ["Jane Austen"]}'
)
PAIRS_EXAMPLE = (
    '{"anchor": "who wrote Emma", "positive": "Jane Austen wrote Emma", "negative": "Emma Stone is an actress"}'
    ' or ["who wrote Emma", "Jane Austen wrote Emma"]'
)
ANCHORS = ("anchor", "query", "question")
POSITIVES = ("positive", "pos", "answer")
NEGATIVES = ("negative", "neg")


def tdro_record(row: Any) -> Record:
    """Record of a row in the layout of the released tDRO data; `ce_score` becomes the teacher score `ce`."""
    fields = _object(row)
    positives = _list(fields, "positive_passages", required=True)
    negatives = _list(fields, "negative_passages")
    candidates = [_passage(value, f"positive_passages[{place}]", 1) for place, value in enumerate(positives)]
    candidates += [_passage(value, f"negative_passages[{place}]", 0) for place, value in enumerate(negatives)]
    return _checked(_text(fields, "query"), candidates, query_id=_id(fields, "query_id"))


def llm_embedder_record(row: Any) -> Record:
    """Record of an LLM-Embedder row; the score of each candidate is its teacher score `teacher`.

    A `history` stands in for pos and neg. Where a row has no positive, its best-scored candidate becomes it.
    """
    fields = _object(row)
    if fields.get("history"):
        positives, negatives, where = [], _list(fields, "history"), ("", "history")
    else:
        positives, negatives, where = _list(fields, "pos"), _list(fields, "neg"), ("pos", "neg")
    scores = _scores(fields, len(positives) + len(negatives))
    places = [(1, f"{where[0]}[{place}]", value) for place, value in enumerate(positives)]
    places += [(0, f"{where[1]}[{place}]", value) for place, value in enumerate(negatives)]
    if not positives and not scores:
        raise ValueError("there is no positive: pos is empty, and there are no teacher_scores to choose one by")
    chosen = scores.index(max(scores)) if scores and not positives else -1
    candidates = [
        Candidate(
            text=_string(value, name),
            label=1 if place == chosen else label,
            scores={"teacher": scores[place]} if scores else {},
        )
        for place, (label, name, value) in enumerate(places)
    ]
    answers = tuple(_string(value, "answers") for value in _list(fields, "answers"))
    return _checked(_text(fields, "query"), candidates, query_id=_id(fields, "query_id"), answers=answers)


def pairs_record(row: Any) -> Record:
    """Record of a sentence-transformers pair, triplet or set.

    [a, b] and [anchor, positive, negative ...]; an object with anchor (or query, question), positive (or pos, answer)
    and any of negative, neg, negative_1 ...; {"set": [...]}: the first text asks, all others match it.
    """
    if isinstance(row, list):
        if len(row) < 2:
            raise ValueError(f"a list needs 2 texts or more, this one has {len(row)}")
        texts = [_string(value, f"[{place}]") for place, value in enumerate(row)]
        return _labelled(texts[0], texts[1:2], texts[2:])
    fields = _object(row)
    if "set" in fields:
        texts = [_string(value, f"set[{place}]") for place, value in enumerate(_list(fields, "set"))]
        if len(texts) < 2:
            raise ValueError(f"set needs 2 texts or more, this one has {len(texts)}")
        return _labelled(texts[0], texts[1:], [])
    anchor, positive = _first_of(fields, ANCHORS), _first_of(fields, POSITIVES)
    numbered = [name for name in fields if name.startswith("negative_")]
    negatives = [text for name in (*NEGATIVES, *numbered) if name in fields for text in _texts(fields, name)]
    record = _labelled(_text(fields, anchor), _texts(fields, positive), negatives)
    return _checked(record.query, list(record.candidates), query_id=_id(fields, "query_id"))


def _labelled(query: str, positives: list[str], negatives: list[str]) -> Record:
    candidates = [Candidate(text, label=1) for text in positives] + [Candidate(text) for text in negatives]
    return _checked(query, candidates)


def _checked(query: str, candidates: list[Candidate], *, query_id: str = "", answers: tuple[str, ...] = ()) -> Record:
    """The record, when it can be trained on: a query, and positives that have words. Empty negatives may stay."""
    if not query.strip():
        raise ValueError("the query is empty")
    record = Record(query, tuple(candidates), query_id, answers)
    if not record.positives:
        raise ValueError("there is no positive")
    if not all(positive.full_text.strip() for positive in record.positives):
        raise ValueError("a positive is empty")
    return record


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"the row is {_kind(row)}, not an object")
    return row


def _text(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        raise ValueError(f"there is no field {name!r}; the row has {', '.join(map(repr, fields)) or 'none'}")
    return _string(fields[name], name)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_kind(value)}, not a text")
    return value


def _texts(fields: dict[str, Any], name: str) -> list[str]:
    """The texts of a field that holds one text or a list of them."""
    if isinstance(fields[name], str):
        return [fields[name]]
    return [_string(value, f"{name}[{place}]") for place, value in enumerate(_list(fields, name))]


def _list(fields: dict[str, Any], name: str, *, required: bool = False) -> list[Any]:
    value = fields.get(name)
    if value is None and not required:
        return []
    if name not in fields:
        raise ValueError(f"there is no field {name!r}; the row has {', '.join(map(repr, fields)) or 'none'}")
    if not isinstance(value, list):
        raise ValueError(f"{name} is {_kind(value)}, not a list")
    return value


def _first_of(fields: dict[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        if name in fields:
            return name
    raise ValueError(f"there is none of the fields {', '.join(names)}; the row has {', '.join(fields) or 'none'}")


def _id(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{name} is {_kind(value)}, not a text or a whole number")
    return str(value)


def _passage(value: Any, name: str, label: int) -> Candidate:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {_kind(value)}, not an object with title and text")
    if "text" not in value:
        raise ValueError(f"{name} has no field 'text'; it has {', '.join(map(repr, value)) or 'none'}")
    title = value.get("title")
    scores = {} if value.get("ce_score") is None else {"ce": _number(value["ce_score"], f"{name}.ce_score")}
    return Candidate(
        text=_string(value["text"], f"{name}.text"),
        title="" if title is None else _string(title, f"{name}.title"),
        id=_id(value, "docid"),
        label=label,
        scores=scores,
    )


def _scores(fields: dict[str, Any], num_candidates: int) -> list[float]:
    values = _list(fields, "teacher_scores")
    if values and len(values) != num_candidates:
        raise ValueError(f"teacher_scores has {len(values)} numbers for {num_candidates} candidates (pos, then neg)")
    return [_number(value, f"teacher_scores[{place}]") for place, value in enumerate(values)]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {_kind(value)}, not a finite number")
    return float(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"{value!r}")
