"""Small task files, and a home folder of its own for tests that write into the cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "query_id": f"q{number}",
        "query": f"question {number}",
        "positive_passages": [{"docid": f"p{number}", "title": "", "text": f"answer {number}"}],
        "negative_passages": [{"docid": f"n{number}", "title": "Other", "text": f"nothing {number}"}],
    }
    return {**row, **changes}


@pytest.fixture
def tdro_row() -> Callable[..., dict[str, Any]]:
    """Row number n in the released layout, with the given fields changed."""
    return _row


@pytest.fixture
def write_lines() -> Callable[[Path, list[Any]], Path]:
    """Writes values as JSON, and texts as they are, one a line."""

    def write(path: Path, values: list[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def beir_folder(tmp_path: Path, write_lines: Callable[[Path, list[Any]], Path]) -> Path:
    """Three queries, five documents; query b comes in two places of the judgements, query c has no positive."""
    folder = tmp_path / "toy"
    documents = [{"_id": f"d{n}", "title": f"T{n}" if n % 2 else "", "text": f"text {n}"} for n in range(5)]
    write_lines(folder / "corpus.jsonl", documents)
    write_lines(folder / "queries.jsonl", [{"_id": name, "text": f"query {name}"} for name in "abc"])
    lines = ["query-id\tcorpus-id\tscore", "b\td3\t2", "a\td0\t1", "a\td1\t0", "c\td2\t0", "b\td4\t1"]
    write_lines(folder / "qrels" / "train.tsv", lines)
    return folder
