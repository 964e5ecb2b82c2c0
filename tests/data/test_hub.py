"""No hub is asked here: the functions of huggingface_hub are replaced by ones that read a folder."""

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from tdro_hpc.config.schema import DataConfig, TaskConfig
from tdro_hpc.data import hub
from tdro_hpc.data.tasks import describe_tasks, open_tasks

DATASET = "someone/rows"


@pytest.fixture
def repository(tmp_path, monkeypatch, home):
    """A folder that stands for the data set, and what was asked of the hub: (file or pattern, revision)."""
    folder = tmp_path / "repository"
    folder.mkdir()
    asked = []

    def download(dataset, name, *, repo_type, revision):
        assert (dataset, repo_type) == (DATASET, "dataset")
        asked.append((name, revision))
        if not (folder / name).is_file():
            raise EntryNotFoundError(name)
        return str(folder / name)

    def snapshot(dataset, *, repo_type, revision, allow_patterns):
        asked.append((allow_patterns[0], revision))
        return str(folder)

    def listed(self, dataset, *, repo_type, revision):
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    return folder, asked


def test_files_are_fetched_with_the_revision_and_indexed_outside_the_hub_cache(repository, write_lines, tdro_row, home):
    folder, asked = repository
    write_lines(folder / "a.jsonl", [tdro_row(1)])
    config = DataConfig(hub=DATASET, hub_revision="abc", tasks={"a": TaskConfig(file="a.jsonl")})
    assert open_tasks(config)["a"].record(0).query == "question 1"
    assert asked == [("a.jsonl", "abc")]
    assert [path.name for path in folder.iterdir()] == ["a.jsonl"]
    assert any((home / ".cache" / "tdro_hpc").iterdir())


def test_file_in_a_folder_of_the_data_set_is_found_by_its_name(repository, write_lines, tdro_row):
    folder, _ = repository
    expected = write_lines(folder / "dedup" / "a.jsonl", [tdro_row(1)])
    assert hub.fetch_file(DATASET, "a.jsonl", revision="") == expected
    write_lines(folder / "raw" / "a.jsonl", [tdro_row(2)])
    with pytest.raises(ValueError, match="no file 'a.jsonl'. Nearest: (dedup|raw)/a.jsonl, (dedup|raw)/a.jsonl"):
        hub.fetch_file(DATASET, "a.jsonl", revision="")


def test_tasks_of_a_data_set_are_its_row_files_or_what_its_task_file_says(repository, write_lines, tdro_row):
    folder, _ = repository
    for name in ("b.jsonl", "deep/a.jsonl", "README.md"):
        write_lines(folder / name, [tdro_row(1)])
    config = DataConfig(hub=DATASET)
    assert {name: task.file for name, task in describe_tasks(config).items()} == {"a": "deep/a.jsonl", "b": "b.jsonl"}
    (folder / "tasks.yaml").write_text("b: {symmetric: true}\n")
    assert describe_tasks(config) == {"b": TaskConfig(symmetric=True)}
    assert open_tasks(config)["b"].record(0).query == "question 1"


def test_beir_folder_of_a_data_set_is_fetched_as_a_whole(repository, beir_folder):
    folder, asked = repository
    beir_folder.rename(folder / "toy")
    tasks = open_tasks(DataConfig(hub=DATASET, tasks={"toy": TaskConfig(format="beir")}))
    assert len(tasks["toy"]) == 2 and asked == [("toy/**", None)]
    with pytest.raises(ValueError, match="task no: The hub data set .* has no folder 'no'"):
        open_tasks(DataConfig(hub=DATASET, tasks={"no": TaskConfig(format="beir")}))


@pytest.mark.parametrize("error", [LocalEntryNotFoundError, ConnectionError, HfHubHTTPError])
def test_hub_that_does_not_answer_is_told_in_words_without_its_own_text(monkeypatch, error):
    secret = "https://host/x?token=hf_secret"

    def refuse(*_, **__):
        raise error.__new__(error, secret)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    tasks = {name: TaskConfig(file=f"{name}.jsonl") for name in "ab"}
    with pytest.raises(ValueError) as caught:
        open_tasks(DataConfig(hub=DATASET, tasks=tasks))
    message = str(caught.value)
    assert "task a: a.jsonl" in message and "task b: b.jsonl" in message and error.__name__ in message
    assert "data.dir=<folder>" in message and "secret" not in message
