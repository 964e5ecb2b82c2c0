from dataclasses import replace

import pytest

from tdro_hpc.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ParallelConfig,
    S2Config,
    TaskConfig,
    TrainingConfig,
)
from tdro_hpc.launch.keys import change_words, changed_keys, hash_of, result_keys
from tdro_hpc.launch.stage import Stage
from tdro_hpc.stages.graph import stage_graph

CONFIG = Config()


def keys_of(config: Config, name: str, ranks: int = 1) -> dict:
    return result_keys(config, stage_graph(config)[name], ranks)


def test_keys_are_those_of_the_sections_of_the_stage():
    keys = keys_of(CONFIG, "s0")
    assert keys["s0.steps"] == 1000 and keys["model.lora.rank"] == 8 and keys["seed"] == 42
    assert keys["s0.queries_per_rank x ranks"] == CONFIG.s0.queries_per_rank
    assert not [key for key in keys if key.startswith(("s1.", "s2.", "eval.", "cluster", "logging", "parallel"))]
    assert list(keys) == sorted(keys)


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, data=DataConfig(loader_workers=7, cache_dir="/x")),
        replace(CONFIG, s0=TrainingConfig(save_every_steps=7, keep_checkpoints=9, log_every_steps=3)),
        replace(CONFIG, name="other", runs_dir="elsewhere"),
        replace(CONFIG, loss=LossConfig(implementation="torch", ring_above_mb=0, workspace_mb=64)),
        replace(CONFIG, eval=EvalConfig(batch_tokens=5), s2=S2Config(weights="ema")),
    ],
)
def test_keys_of_speed_and_place_do_not_count(config):
    for name in ("s0", "eval"):
        assert hash_of(keys_of(replace(config, s2=CONFIG.s2), name)) == hash_of(keys_of(CONFIG, name))


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, seed=1),
        replace(CONFIG, s0=TrainingConfig(steps=700)),
        replace(CONFIG, data=DataConfig(query_max_tokens=64)),
        replace(CONFIG, loss=LossConfig(chunk_tokens=64)),
        replace(CONFIG, data=DataConfig(tasks={"a.b": TaskConfig(file="x")})),
    ],
)
def test_keys_that_change_results_count(config):
    assert hash_of(keys_of(config, "s0")) != hash_of(keys_of(CONFIG, "s0"))


def test_number_of_data_ranks_counts_as_a_factor_of_the_global_batch():
    rows = CONFIG.s0.queries_per_rank
    expected = [("s0.queries_per_rank x ranks", rows, 2 * rows)]
    assert changed_keys(keys_of(CONFIG, "s0", 1), keys_of(CONFIG, "s0", 2)) == expected
    assert changed_keys(keys_of(CONFIG, "eval", 1), keys_of(CONFIG, "eval", 2)) == [("ranks", 1, 2)]
    # The same rows a step on four ranks of one replica, on four replicas, and on one rank.
    spread = replace(CONFIG, parallel=ParallelConfig(engine="deepspeed", pp=2, tp=2))
    quarter = replace(CONFIG, s0=replace(CONFIG.s0, queries_per_rank=rows // 4))
    assert keys_of(spread, "s0", 4) == keys_of(quarter, "s0", 4) == keys_of(CONFIG, "s0", 1)


def test_ranks_count_themselves_where_negatives_come_from_the_own_rank():
    here = replace(CONFIG, s0=replace(CONFIG.s0, negatives="batch"))
    assert changed_keys(keys_of(here, "s0", 1), keys_of(here, "s0", 2)) == [("ranks", 1, 2)]


def test_choice_of_weights_is_in_the_name_of_the_stage_not_in_its_keys():
    both = replace(CONFIG, s2=S2Config(weights="curr,top70"))
    assert keys_of(both, "s2-curr") == keys_of(CONFIG, "s2-curr")


def test_published_rows_and_language_of_a_task_do_not_count():
    one = replace(CONFIG, data=DataConfig(tasks={"a": TaskConfig(file="x", rows=5, language="en", category="web")}))
    two = replace(CONFIG, data=DataConfig(tasks={"a": TaskConfig(file="x", rows=6, language="de")}))
    assert keys_of(one, "s0") == keys_of(two, "s0")


def test_sizes_of_data_files_count_but_not_their_indexes(tmp_path):
    (tmp_path / "a.jsonl").write_text("one")
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text("12345")
    config = replace(CONFIG, data=DataConfig(dir=str(tmp_path)))
    before = keys_of(config, "s0")
    assert before["size of a.jsonl"] == 3 and before["size of beir/qrels/test.tsv"] == 5
    (tmp_path / ".tdro_hpc").mkdir()
    (tmp_path / ".tdro_hpc" / "a.jsonl.0123.rows.json").write_text("index")
    assert keys_of(config, "s0") == before
    (tmp_path / "a.jsonl").write_text("three")
    assert changed_keys(before, keys_of(config, "s0")) == [("size of a.jsonl", 3, 5)]


@pytest.mark.parametrize(("section", "stage", "name"), [("data", "s0", "tasks.yaml"), ("eval", "eval", "tests.yaml")])
def test_content_of_a_description_counts(tmp_path, section, stage, name):
    config = replace(CONFIG, **{section: replace(getattr(CONFIG, section), dir=str(tmp_path))})
    (tmp_path / name).write_text("a: {instructions: [One]}")
    before = keys_of(config, stage)
    (tmp_path / name).write_text("a: {instructions: [Two]}")  # the same size
    assert [key for key, _, _ in changed_keys(before, keys_of(config, stage))] == [f"sha256 of {name}"]


def test_content_of_a_weights_file_counts(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("{}")
    config = replace(CONFIG, s2=S2Config(weights=str(path)))
    before = keys_of(config, "s2-mine")
    path.write_text("[]")  # the same size
    assert [key for key, _, _ in changed_keys(before, keys_of(config, "s2-mine"))] == [f"sha256 of {path}"]


def test_every_section_of_every_stage_exists():
    config = replace(CONFIG, data=DataConfig(builder="embedded"))
    for stage in stage_graph(config).values():
        assert len(result_keys(config, stage, 1)) > len(stage.sections)
    with pytest.raises(AttributeError):
        result_keys(config, Stage("x", "x", (), (), ("nosuch",)), 1)


def test_many_changes_are_cut():
    was, now = change_words([(f"k{n}", n, n + 1) for n in range(9)])
    assert was.endswith("k5=5 and 3 more") and now.endswith("k5=6 and 3 more")
