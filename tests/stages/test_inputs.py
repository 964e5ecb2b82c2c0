from pathlib import Path

import pytest

from tdro_hpc.config.load import load_config
from tdro_hpc.stages.graph import stage_graph
from tdro_hpc.stages.inputs import input_problems


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    for task in ("news", "mails", "forum"):
        (folder / f"{task}.jsonl").write_text("{}\n")
    return folder


def problems_of(stages: str, *arguments: str) -> list[str]:
    config = load_config(list(arguments)).config
    graph = stage_graph(config)
    return input_problems(config, [graph[name] for name in stages.split(",")])


def test_data_that_is_not_there(rows):
    assert problems_of("s0,s2-curr") == [
        "There is no data. Set data.dir=<folder>, data.hub=<data set id> or data=tdro25."
    ]
    assert "is not a folder" in problems_of("s0", f"data.dir={rows}/gone")[0]
    (only,) = problems_of("s0", f"data.dir={rows}", "data.only=new")
    assert "did you mean news?" in only
    (missing,) = problems_of("s0", f"data.dir={rows}", "data.tasks.a.file=nws.jsonl", "data.tasks.b.file=c.jsonl")
    assert "2 of 2 tasks have no file" in missing and "the nearest name there is news.jsonl" in missing
    assert problems_of("s0", f"data.dir={rows}") == []
    assert problems_of("s0", "data.tasks.a.file=x")[0].startswith("data.tasks names tasks, not where they are")
    assert "did you mean name_summary?" in problems_of("s0", "data=embedded", "data.only=name_sumary")[0]


@pytest.mark.parametrize("arguments", [["data=embedded"], ["data.builder=embedded"], ["data=tdro25"], ["data.hub=a/b"]])
def test_data_that_is_still_to_come_is_not_missed(arguments):
    assert problems_of("s0,s1", *arguments) == []


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        ([], "s1.top_percents=40,50,60,70,80,90"),
        (["data.only=news"], "s1.top_percents=100"),
        (["s2.weights=top20,top70"], "s1.top_percents=40,50,60,70,80,90 s2.weights=top70"),
        (["s2.weights=top20"], "s1.top_percents=40,50,60,70,80,90 s2.weights=curr"),
    ],
)
def test_share_that_holds_no_task_proposes_those_that_do(rows, arguments, cure):
    (problem,) = problems_of("s1", f"data.dir={rows}", *arguments)
    assert problem.startswith("s1.top_percents holds 20, 30") and problem.endswith(f"Type {cure}.")
    kept = [argument for argument in arguments if "s2.weights" not in argument]
    assert problems_of("s1", f"data.dir={rows}", *kept, *cure.split()) == []
    assert problems_of("s0", f"data.dir={rows}", *arguments) == []


def test_weights_file_that_is_not_there_names_the_nearest(rows, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    given = [f"data.dir={rows}", f"s2.weights={tmp_path}/min.json"]
    (problem,) = problems_of("s2-min", *given)
    assert f"s2.weights names {tmp_path}/min.json" in problem and f"Did you mean {tmp_path}/mine.json?" in problem
    assert problems_of("s2-mine", f"data.dir={rows}", f"s2.weights={tmp_path}/mine.json") == []


def test_evaluation_needs_test_sets_and_models(tmp_path):
    assert "eval.dir is empty" in problems_of("eval")[0]
    assert problems_of("eval", "data=embedded") == []
    assert "is no folder" in problems_of("eval", "eval.dir=gone")[0]
    assert "holds no test set" in problems_of("eval", f"eval.dir={tmp_path}")[0]
    (tmp_path / "one" / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (tmp_path / "one" / name).write_text("")
    assert problems_of("eval", f"eval.dir={tmp_path}") == []
    (model,) = problems_of("eval", f"eval.dir={tmp_path}", "eval.models=base,./gone")
    assert model.startswith("eval.models names ./gone, which is no folder")


def test_folder_that_may_not_be_read_is_a_sentence(rows, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert problems_of("s0", f"data.dir={rows}") == [f"{rows}: Permission denied. Set data.dir=<folder you may read>."]
