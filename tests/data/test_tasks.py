import gzip
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tdro_hpc.config.schema import DataConfig, TaskConfig
from tdro_hpc.data.formats import CONVERTERS
from tdro_hpc.data.tasks import describe_tasks, open_tasks
from tests.reference.real_data import real_data

ROOT = Path(__file__).parents[2]
REAL_DATA = real_data()


@pytest.fixture
def folder(tmp_path, write_lines, tdro_row):
    """Two tasks of three rows."""
    for name in ("b", "a"):
        write_lines(tmp_path / "rows" / f"{name}.jsonl", [tdro_row(number) for number in range(3)])
    return tmp_path / "rows"


def test_every_row_file_of_a_folder_is_a_task_in_the_order_of_names(folder, beir_folder, write_lines, tdro_row):
    (folder / "Z.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    write_lines(folder / "notes.json", ["{}"])
    beir_folder.rename(folder / "toy")
    write_lines(folder / "marco" / "collection.tsv", ["1\tx"])
    tasks = describe_tasks(DataConfig(dir=str(folder)))
    assert {name: task.format for name, task in tasks.items()} == {
        "Z": "tdro", "a": "tdro", "b": "tdro", "marco": "msmarco", "toy": "beir",
    }  # fmt: skip
    assert all(not task.instructions for task in tasks.values())
    opened = open_tasks(DataConfig(dir=str(folder), only="toy, Z"))
    assert {name: len(task) for name, task in opened.items()} == {"Z": 3, "toy": 2}


def test_task_file_decides_names_and_order_and_what_it_leaves_out_is_told(folder, caplog):
    (folder / "tasks.yaml").write_text("second: {file: b.jsonl, instructions: [Find it]}\n")
    with caplog.at_level(logging.WARNING):
        tasks = open_tasks(DataConfig(dir=str(folder)))
    assert tasks["second"].config.instructions == ["Find it"] and list(tasks) == ["second"]
    assert "does not name a.jsonl: not used" in caplog.text


def test_new_task_of_another_format_needs_yaml_only(folder, write_lines):
    write_lines(folder / "mine.jsonl", [["one", "two"]])
    (folder / "tasks.yaml").write_text("mine: {format: pairs, symmetric: true}\na: {}\nb: {}\n")
    tasks = open_tasks(DataConfig(dir=str(folder)))
    assert tasks["mine"].record(0).positives[0].text == "two" and tasks["a"].record(2).query == "question 2"


def test_tasks_of_the_config_win_over_the_folder_and_keep_their_order(folder):
    (folder / "tasks.yaml").write_text("other: {}\n")
    config = DataConfig(dir=str(folder), tasks={"b": TaskConfig(), "x": TaskConfig(file="a")})
    assert {name: task.path.name for name, task in open_tasks(config).items()} == {"b": "b.jsonl", "x": "a.jsonl"}


def test_plain_file_serves_a_task_that_names_the_archive(folder):
    config = DataConfig(dir=str(folder), tasks={"a": TaskConfig(file="a.jsonl.tar.gz")})
    assert open_tasks(config)["a"].path.name == "a.jsonl"


def test_all_missing_files_are_named_together(folder):
    tasks = {"a": TaskConfig(), "c": TaskConfig(), "d": TaskConfig(file="bb.jsonl")}
    with pytest.raises(ValueError) as caught:
        open_tasks(DataConfig(dir=str(folder), tasks=tasks))
    message = str(caught.value)
    assert "2 of 3 tasks have no file" in message and "c.jsonl.tar.gz" in message
    assert "d: bb.jsonl; the nearest name there is b.jsonl" in message and "data.only=a" in message


def test_unknown_name_in_only_names_the_nearest(folder):
    tasks = {"agnews": TaskConfig(), "xsum": TaskConfig()}
    with pytest.raises(ValueError, match=r"'agnew'.*did you mean agnews\?\n.*'q'.*the tasks are agnews, xsum"):
        describe_tasks(DataConfig(dir=str(folder), only="agnew,q", tasks=tasks))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (DataConfig(), "There is no data"),
        (DataConfig(builder="embedded"), "stage=prepare"),
        (DataConfig(dir="/no/such/folder"), "not a folder"),
        (DataConfig(tasks={"a": TaskConfig()}), "not where they are"),
    ],
)
def test_config_without_data_says_what_to_set(config, complaint):
    with pytest.raises(ValueError, match=complaint):
        open_tasks(config)


def test_empty_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \*.jsonl"):
        describe_tasks(DataConfig(dir=str(tmp_path)))


def test_bad_row_names_file_line_fault_and_shows_a_row(folder, write_lines, tdro_row):
    write_lines(folder / "a.jsonl", [tdro_row(0), "", tdro_row(1, positive_passages=[])])
    task = open_tasks(DataConfig(dir=str(folder), only="a"))["a"]
    with pytest.raises(ValueError) as caught:
        task.record(1)
    message = str(caught.value)
    assert f"{folder / 'a.jsonl'}, line 3: there is no positive." in message
    assert CONVERTERS["tdro"].example in message and "data.on_bad_row=skip" in message


def test_wrong_formats_show_when_the_tasks_open_and_name_the_right_one(folder, write_lines):
    for name in ("a", "b"):
        write_lines(folder / f"{name}.jsonl", [{"anchor": "x", "positive": "y"}])
    with pytest.raises(ValueError) as caught:
        open_tasks(DataConfig(dir=str(folder)))
    assert str(caught.value).count("The row fits format pairs: set it for task") == 2


def test_skipped_rows_are_counted_reported_and_leave_the_others_in_order(folder, write_lines, tdro_row, caplog):
    rows = [tdro_row(0), "no json", tdro_row(2, query=""), tdro_row(3), tdro_row(4, positive_passages=[])]
    write_lines(folder / "a.jsonl", rows)
    config = DataConfig(dir=str(folder), only="a", on_bad_row="skip")
    for _ in range(2):  # the second time the index is there already
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            task = open_tasks(config)["a"]
        assert task.skipped_rows == 3 and [task.record(row).query_id for row in range(len(task))] == ["q0", "q3"]
        assert "3 bad rows" in caplog.text
        assert "first lines: 2, 3, 5; the first because: the line is not JSON" in caplog.text


def test_task_with_no_good_row_is_an_error_also_when_skipping(folder, write_lines):
    write_lines(folder / "a.jsonl", ["{}", "{}"])
    with pytest.raises(ValueError, match=r"task a: .*a.jsonl has no rows \(2 skipped\)"):
        open_tasks(DataConfig(dir=str(folder), on_bad_row="skip"))


def test_task_survives_pickling(folder):
    task = open_tasks(DataConfig(dir=str(folder)))["a"]
    assert pickle.loads(pickle.dumps(task)).record(2) == task.record(2)


def test_published_tasks_have_the_published_sizes_and_wordings():
    from tdro_hpc.config.source import read_file
    from tdro_hpc.data.taskfile import read_tasks

    problems: list[str] = []
    entries = read_file(ROOT / "configs" / "data" / "tdro25.yaml", ("data",), problems)
    tasks = read_tasks([entry for entry in entries if entry.path[1] == "tasks"], problems)
    assert not problems and len(tasks) == 25
    assert sum(task.rows for task in tasks.values()) == 11_067_280
    assert sum(task.symmetric for task in tasks.values()) == 5
    assert all(task.language and task.category and task.file == f"{name}.jsonl.tar.gz" for name, task in tasks.items())
    assert sorted(name for name, task in tasks.items() if len(task.instructions) == 2) == sorted(
        "AllNLI altlex amazon_review_2018_1m medmcqa miracl mr_tydi_combined nq quora_duplicates_triplets "
        "searchQA_top5_snippets SimpleWiki squad_pairs trivia".split()
    )


def test_tasks_need_no_torch():
    program = "import sys, tdro_hpc.data.tasks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.skipif(REAL_DATA is None, reason="no real data here; TDRO_TEST_DATA names its folder")
def test_real_tasks_and_test_sets_open_and_every_row_converts(tmp_path):
    train = open_tasks(DataConfig(dir=str(REAL_DATA / "train"), cache_dir=str(tmp_path), only="OCNLI,agnews"))
    assert {name: len(task) for name, task in train.items()} == {"OCNLI": 3000, "agnews": 2500}
    test = open_tasks(DataConfig(dir=str(REAL_DATA / "test"), cache_dir=str(tmp_path), only="scifact,liveqa_med"))
    for task in (*train.values(), *test.values()):
        assert all(task.record(row).positives for row in range(len(task)))


def test_task_file_that_data_tasks_replaces_is_reported(tmp_path, caplog):
    (tmp_path / "tasks.yaml").write_text("old: {}\n")
    assert list(describe_tasks(DataConfig(dir=str(tmp_path), tasks={"new": TaskConfig()}))) == ["new"]
    assert caplog.messages == [f"{tmp_path}/tasks.yaml is not read: data.tasks describes the tasks"]
