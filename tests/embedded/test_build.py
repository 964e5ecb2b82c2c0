import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tdro_hpc.config.load import load_config
from tdro_hpc.config.schema import EmbeddedConfig
from tdro_hpc.data.record import Record
from tdro_hpc.data.tasks import open_tasks
from tdro_hpc.embedded import build
from tdro_hpc.embedded.pairs import normalised
from tdro_hpc.embedded.sources import Library
from tests.embedded.conftest import SMALL
from tests.reference.shingles import is_leak

Built = tuple[Path, dict[str, Any]]

PROGRAM = """
import sys
from pathlib import Path
from tdro_hpc.embedded import build, sources
from tests.embedded.conftest import SMALL, SMALL_PACKAGES
build.read_library = lambda: sources.read_library(SMALL_PACKAGES)
build.build_embedded(Path(sys.argv[1]), SMALL, seed=7)
"""


def rows_of(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train" / f"{task}.jsonl").read_text("utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_another_process_writes_the_same_bytes(built: Built, tmp_path: Path):
    environment = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    assert digests(tmp_path) == digests(built[0])


def test_every_task_has_rows_of_the_released_form(built: Built):
    folder, facts = built
    assert len(facts["tasks"]) >= 8
    for task, told in facts["tasks"].items():
        rows = rows_of(folder, task)
        assert len(rows) == told["rows"] >= build.MIN_ROWS
        assert len({row["query_id"] for row in rows}) == len(rows)
        for row in rows:
            assert set(row) == {"query_id", "query", "positive_passages", "negative_passages"}
            assert row["query"] and row["positive_passages"]
            for passage in row["positive_passages"] + row["negative_passages"]:
                assert set(passage) == {"docid", "title", "text"} and passage["text"]


@pytest.mark.slow
def test_default_build_has_some_thousand_to_fifty_thousand_rows(tmp_path: Path):
    facts = build.build_embedded(tmp_path, EmbeddedConfig(), seed=0)
    assert json.loads((tmp_path / "facts.json").read_text("utf-8")) == facts
    rows = {name: len((tmp_path / "train" / f"{name}.jsonl").read_text("utf-8").splitlines()) for name in build.TASKS}
    assert rows == {name: told["rows"] for name, told in facts["tasks"].items()}
    assert 5_000 <= sum(rows.values()) <= 50_000


def test_negatives_are_other_texts_than_positives_and_query(built: Built):
    folder, facts = built
    for task in facts["tasks"]:
        for row in rows_of(folder, task):
            negatives = [normalised(passage["text"]) for passage in row["negative_passages"]]
            known = {normalised(passage["text"]) for passage in row["positive_passages"]} | {normalised(row["query"])}
            assert 2 <= len(negatives) <= SMALL.hard_negatives
            assert len(set(negatives)) == len(negatives)
            assert not known & set(negatives)


def test_no_training_text_gives_a_test_text_away(built: Built):
    folder, facts = built
    protected = []
    for name in facts["test_sets"]:
        base = folder / "test" / name
        documents: dict[str, str] = {}
        for line in (base / "corpus.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            documents[row["_id"]] = row["text"]
        relevant = {line.split("\t")[1] for line in (base / "qrels/test.tsv").read_text().splitlines()[1:]}
        protected += [documents[key] for key in sorted(relevant)]
        queries = (base / "queries.jsonl").read_text("utf-8").splitlines()
        protected += [json.loads(line)["text"] for line in queries]
    exact = {normalised(text) for text in protected}
    for task in facts["tasks"]:
        for number, row in enumerate(rows_of(folder, task)):
            passages = [passage["text"] for passage in row["positive_passages"] + row["negative_passages"]]
            assert not exact & {normalised(text) for text in [row["query"], *passages]}
            if number < 8:  # the slow reference, on some
                assert not any(is_leak(text, protected) for text in [row["query"], *passages[:2]])


def test_leaks_would_be_found_if_the_filter_were_off(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "read_library", lambda: library)
    monkeypatch.setattr(build, "split_library", lambda library, seed: (library, library))
    facts = build.build_embedded(tmp_path, SMALL, seed=7)
    removed = {task: told["removed_leaking_queries"] for task, told in facts["tasks"].items()}
    assert removed["summary_body"] > 0 and removed["language_reference"] > 0


def test_test_sets_have_at_least_three_kinds_within_their_sizes(built: Built):
    _, facts = built
    assert len(facts["test_sets"]) >= 3
    for told in facts["test_sets"].values():
        assert 1 <= told["queries"] <= SMALL.test_queries <= told["documents"] <= SMALL.test_documents
        assert told["judgements"] >= told["queries"]


def test_rows_name_no_folder_of_this_machine(built: Built):
    folder, facts = built
    text = (folder / "train" / "module_of_function.jsonl").read_text("utf-8")
    assert sys.prefix not in text and str(Path.home()) not in text


def test_config_describes_exactly_the_tasks_that_are_built(built: Built):
    folder, facts = built
    config = load_config(["data=embedded", f"data.dir={folder / 'train'}"]).config
    assert config.data.builder == "embedded"
    assert list(config.data.tasks) == list(build.TASKS) == list(facts["tasks"])
    for name, task in open_tasks(config.data).items():
        assert len(task) == facts["tasks"][name]["rows"]
        record = task.record(0)
        assert isinstance(record, Record) and record.positives and record.negatives
        assert config.data.tasks[name].instructions, name


def test_too_little_documentation_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Library
):
    monkeypatch.setattr(build, "read_library", lambda: Library(definitions=library.definitions[:300]))
    with pytest.raises(ValueError, match="embedded task .* found .* rows on this machine"):
        build.build_embedded(tmp_path, EmbeddedConfig(), seed=7)
