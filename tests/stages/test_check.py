import json
from dataclasses import replace
from pathlib import Path

import pytest

from tdro_hpc.config.load import load_config
from tdro_hpc.config.schema import Config, DataConfig
from tdro_hpc.data.tasks import open_tasks
from tdro_hpc.encoders.tokenization import load_tokenizer
from tdro_hpc.stages.check import check_inputs, cut_share, marked, small_tasks


@pytest.fixture
def config(tmp_path: Path) -> Config:
    folder = tmp_path / "data"
    folder.mkdir()
    for task, rows in (("short", 5), ("long", 40)):
        lines = [
            json.dumps(
                {
                    "query": f"question {row}",
                    "positive_passages": [{"title": "", "text": "word " * (60 if task == "long" and row % 2 else 3)}],
                    "negative_passages": [{"title": "", "text": "no"}],
                }
            )
            for row in range(rows)
        ]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    keys = ["model=tiny_decoder", "data.query_max_tokens=20", "data.passage_max_tokens=64", "s0.queries_per_rank=8"]
    return load_config([f"data.dir={folder}", "cluster.ranks_per_node=2", *keys]).config


def test_check_shows_rows_cuts_small_tasks_and_the_model(config, tmp_path, capsys):
    check_inputs(config, tmp_path / "run", "")
    said = capsys.readouterr().out
    assert "2 tasks, 45 rows" in said
    # One token a byte: 300 of the long passages' bytes do not fit into 64; half of the long task's positives are long.
    assert "task long: 40 rows" in said and "25.0% of passages at 64" in said
    assert "task short: 5 rows" in said and "0.0% of queries at 20 tokens, 0.0% of passages at 64" in said
    assert said.count("    query ") == 6 and said.count("[CUT at 64]") == 1
    assert "task short has 5 rows, fewer than the 16 of one batch of s0" in said
    assert "model tiny:" in said and "loads:" in said
    assert not (tmp_path / "run").exists()


def test_only_tasks_smaller_than_a_global_batch_are_named(config):
    lines = small_tasks(replace(config, stages=["s0"]), open_tasks(config.data))
    assert len(lines) == 1 and "short" in lines[0]
    assert small_tasks(replace(config, stages=["s1"]), open_tasks(config.data)) == []  # mixed batches


def test_a_text_that_just_fits_is_not_cut(config):
    tokenizer = load_tokenizer(config.model)
    assert "[CUT" not in marked("x" * 19, tokenizer, limit=20)
    assert marked("x" * 20, tokenizer, limit=20).endswith("[CUT at 20]")
    assert cut_share(["x" * 19, "x" * 20], tokenizer, limit=20) == 0.5


def test_data_set_that_is_not_built_yet_says_what_to_type_and_the_model_is_tried(config, tmp_path, capsys):
    embedded = replace(config, data=DataConfig(builder="embedded"))
    check_inputs(embedded, tmp_path, "python -m tdro_hpc.submit stage=all data=embedded check=true")
    said = capsys.readouterr().out
    assert "comes with stage prepare" in said and "loads:" in said
    assert "  python -m tdro_hpc.submit data=embedded stage=prepare\n" in said
    assert "  python -m tdro_hpc.submit stage=all data=embedded check=true\n" in said
