import dataclasses

import pytest

from tdro_hpc.config.derived import (
    batch_equation,
    disk_equation,
    negatives_equation,
    negatives_per_query,
    plan_lines,
    ranks_of,
)
from tdro_hpc.config.fitting import memory_equation
from tdro_hpc.config.schema import (
    ClusterConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    S2Config,
    TaskConfig,
    TrainingConfig,
)

PAPER = Config(cluster=ClusterConfig(gpus_per_node=8))


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (ClusterConfig(), 1),
        (ClusterConfig(ranks_per_node=3), 3),
        (ClusterConfig(gpus_per_node=8), 8),
        (ClusterConfig(gpus_per_node=8, ranks_per_node=4), 4),
    ],
)
def test_ranks_are_nodes_times_ranks_of_a_node(cluster, expected):
    config = Config(cluster=cluster)
    assert ranks_of(config) == expected
    assert ranks_of(config, "one") == 1


def test_paper_values_on_eight_ranks():
    assert batch_equation(PAPER, PAPER.s0, 8) == (
        "queries per step 2,048 = 8 ranks x 256 queries_per_rank x 1 accumulation_steps"
    )
    assert batch_equation(PAPER, PAPER.s1, 8) == (
        "queries per step 2,048 = 8 ranks x 64 queries_per_rank x 4 accumulation_steps"
    )
    # 2,048 queries with 2 passages each, less the positive of the query.
    assert negatives_per_query(PAPER.s0, 8) == 2048 * 2 - 1 == 4095
    assert negatives_equation(PAPER, PAPER.s0, 8) == (
        "negatives per query 4,095 = 8 ranks x 256 queries_per_rank x 2 passages_per_query - 1 positive "
        "(own and in-batch, all ranks)"
    )
    assert negatives_equation(PAPER, PAPER.s1, 8) == (
        "negatives per query 7 = 8 passages_per_query - 1 positive (its own hard negatives)"
    )


def test_whole_plan_of_a_stage_gives_each_figure_once():
    assert plan_lines(PAPER, "s0") == [
        "ranks 8 = 1 node x 8 gpus_per_node",
        "queries per step 2,048 = 8 ranks x 256 queries_per_rank x 1 accumulation_steps",
        "negatives per query 4,095 = 8 ranks x 256 queries_per_rank x 2 passages_per_query - 1 positive "
        "(own and in-batch, all ranks)",
        "queries in all 2,048,000 = 1,000 steps x 2,048 queries per step",
        memory_equation(PAPER, "s0"),
        "checkpoints 90.8 MB = 2 keep_checkpoints x 3,784,704 trained parameters x 12 bytes (4 weight + 8 Adam)",
    ]
    assert plan_lines(Config(), "s1")[0] == "ranks 1 = 1 node x 1 rank a node (no GPU)"
    assert plan_lines(PAPER, "prepare") == []


def test_accumulation_does_not_widen_the_negatives_and_the_equation_says_so():
    training = TrainingConfig(queries_per_rank=4, accumulation_steps=3, passages_per_query=5)
    assert negatives_per_query(training, 2) == 2 * 4 * 5 - 1 == 39
    assert negatives_equation(Config(), training, 2).endswith(
        "(own and in-batch, all ranks, of one of the 3 accumulation_steps)"
    )


@pytest.mark.parametrize(
    ("policy", "batching", "expected"),
    [
        ("group", "mixed", "4 = 5 passages_per_query - 1 positive (its own hard negatives)"),
        ("batch", "mixed", "19 = 4 queries_per_rank x 5 passages_per_query - 1 positive (own and in-batch, this rank)"),
        (
            "task",
            "mixed",
            "at most 19 = 4 queries_per_rank x 5 passages_per_query - 1 positive "
            "(own and in-batch of the same task, this rank)",
        ),
        (
            "task",
            "homogeneous",
            "19 = 4 queries_per_rank x 5 passages_per_query - 1 positive "
            "(own and in-batch of the same task, this rank)",
        ),
        (
            "world",
            "mixed",
            "39 = 2 ranks x 4 queries_per_rank x 5 passages_per_query - 1 positive (own and in-batch, all ranks)",
        ),
    ],
)
def test_negatives_of_each_policy(policy, batching, expected):
    training = TrainingConfig(queries_per_rank=4, passages_per_query=5, negatives=policy, batching=batching)
    assert negatives_equation(Config(), training, 2) == f"negatives per query {expected}"


def test_tasks_left_to_their_own_negatives_are_counted_among_the_chosen_ones():
    tasks = {name: TaskConfig(negatives="group") for name in ("a", "b", "c")} | {"d": TaskConfig()}
    config = Config(data=DataConfig(tasks=tasks, only="a,c,d"))
    training = TrainingConfig(passages_per_query=3)
    assert negatives_equation(config, training, 1).endswith("; 2 of its own in 2 tasks with negatives: group")
    alone = dataclasses.replace(training, negatives="group")
    assert "in 2 tasks" not in negatives_equation(config, alone, 1)


def test_gradient_cache_says_how_much_is_embedded_at_a_time():
    config = Config(loss=LossConfig(gradient_cache=True, chunk_tokens=8192))
    assert batch_equation(config, config.s0, 1).endswith("(a rank embeds 8,192 chunk_tokens at a time)")


def test_disk_of_full_and_of_lora_training(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,'
        ' "num_hidden_layers": 3, "vocab_size": 1000}'
    )
    # Embeddings 1000 x 8, last norm 8; a layer: 4 x 8 x 8 of attention, 3 x 8 x 16 of the MLP, 2 norms of 8.
    count = 1000 * 8 + 8 + 3 * (4 * 64 + 3 * 128 + 16)
    full = ModelConfig(name=str(tmp_path), lora=LoraConfig(enabled=False))
    training = TrainingConfig(keep_checkpoints=10)
    assert count == 9976
    assert disk_equation(Config(model=full), training) == (
        "checkpoints 1.20 MB = 10 keep_checkpoints x 9,976 trained parameters x 12 bytes (4 weight + 8 Adam)"
    )
    half = dataclasses.replace(full, weights_dtype="bfloat16")
    assert disk_equation(Config(model=half), training).endswith("x 6 bytes (2 weight + 4 Adam)")
    # Rank 2 on 4 matrices of 8 + 8 and 3 of 8 + 16 in each of 3 layers; float32 whatever the weights below are.
    lora = dataclasses.replace(half, lora=LoraConfig(rank=2))
    assert disk_equation(Config(model=lora), training) == (
        "checkpoints 97.9 kB = 10 keep_checkpoints x 816 trained parameters x 12 bytes (4 weight + 8 Adam)"
    )


def test_disk_of_models_that_are_not_on_this_machine():
    tiny = Config(model=ModelConfig(name="tiny:qwen2", lora=LoraConfig(enabled=False)))
    assert disk_equation(tiny, tiny.s0) == (
        "checkpoints 24.4 MB = 2 keep_checkpoints x 1,018,496 trained parameters x 12 bytes (4 weight + 8 Adam)"
    )
    unknown = Config(model=ModelConfig(name="someone/unheard-of"))
    assert disk_equation(unknown, unknown.s0) == (
        "checkpoints 2 keep_checkpoints x trained parameters x (weights + Adam states); their number is unknown until "
        "the model is downloaded"
    )


def test_models_of_the_table():
    config = Config(s2=S2Config(weights="curr,top70"), eval=EvalConfig(models="base,s0,s2,/my/model"))
    assert plan_lines(config, "eval") == ["models 5 = base + s0 + s2-curr + s2-top70 + /my/model"]
    twice = Config(s2=S2Config(weights="curr,runs/x/own.json"), eval=EvalConfig(models="s2-curr,s2,bm25"))
    assert plan_lines(twice, "eval") == ["models 3 = s2-curr + s2-own + bm25"]
