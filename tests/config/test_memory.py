"""Memory of a rank worked out by hand, what is refused because of it, and the layouts that parallel=auto takes."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from tdro_hpc.config.activations import Pass, layer_bytes
from tdro_hpc.config.figures import ModelFigures, figures_of
from tdro_hpc.config.fitting import estimate_of, fit_notes, fit_problems, memory_equation, memory_text
from tdro_hpc.config.layouts import Layout
from tdro_hpc.config.load import ConfigError, LoadedConfig, load_config
from tdro_hpc.config.memory import PIPELINE_BUCKET, ZERO_BUCKET, bubble_equation, size_words
from tdro_hpc.config.schema import ClusterConfig, Config, LoraConfig, LossConfig, ModelConfig, S1Config, TrainingConfig

CONFIGS = Path(__file__).parents[2] / "configs"
FULL = LoraConfig(enabled=False)
LLAMA = 7_504_924_672  # parameters of Llama 3 8B without its output matrix
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336  # numbers in its matrices


def load(*arguments: str) -> LoadedConfig:
    return load_config(list(arguments), configs_dirs=[CONFIGS])


def llama(layout: Layout, *, kind: str = "s0", **changes: object) -> dict[str, int]:
    """Bytes of every item for Llama 3 8B, fully trained from bfloat16 weights on 8 GPUs."""
    config = Config(
        model=replace(ModelConfig(name="meta-llama/Meta-Llama-3-8B", weights_dtype="bfloat16"), lora=FULL),
        cluster=ClusterConfig(gpus_per_node=8),
        loss=LossConfig(gradient_cache=True),
        **changes,
    )
    estimate = estimate_of(config, kind, layout)
    assert estimate is not None and estimate.total == sum(item.num_bytes for item in estimate.items)
    return {item.name: item.num_bytes for item in estimate.items}


def test_what_is_held_follows_from_the_stage_of_zero():
    ddp, one, two, three = (
        llama(Layout("torch", 1, 8, 1)),
        *(llama(Layout("deepspeed", 1, 8, 1, zero)) for zero in (1, 2, 3)),
    )
    assert [items["weights"] for items in (ddp, one, two, three)] == [2 * LLAMA, 2 * LLAMA, 2 * LLAMA, 2 * LLAMA // 8]
    # Under torch the moments have the type of the weights; DeepSpeed keeps masters and moments in float32.
    assert ddp["optimiser"] == 2 * 2 * LLAMA and one["optimiser"] == two["optimiser"] == 12 * LLAMA // 8
    assert ddp["gradients"] == 2 * 2 * LLAMA  # the sums over chunks, and the buckets
    assert (one["gradients"], two["gradients"], three["gradients"]) == (4 * LLAMA, 4 * LLAMA // 8, 4 * LLAMA // 8)
    offloaded = llama(Layout("deepspeed", 1, 8, 1, 3, True))
    assert "optimiser" not in offloaded and offloaded["weights"] == three["weights"]


def test_tensor_ranks_share_the_matrices_and_hold_the_table_and_the_norms_whole():
    table = 128256 * 4096
    items = llama(Layout("deepspeed", 1, 4, 2, 1))
    assert items["weights"] == 2 * (32 * (LAYER // 2 + 2 * 4096) + table + 4096)


def test_the_fullest_part_of_a_pipeline_is_the_one_with_the_table():
    table = 128256 * 4096
    items = llama(Layout("deepspeed", 2, 4, 1, 1))
    assert items["weights"] == 2 * (16 * (LAYER + 2 * 4096) + table)
    # Two chunks are under way in the first part: twice the inputs of 16 layers are as many as those of 32.
    whole = llama(Layout("deepspeed", 1, 8, 1, 1))
    assert items["activations"] == whole["activations"]


def test_reference_is_counted_where_it_runs_beside_the_proxy():
    layout = Layout("deepspeed", 1, 8, 1, 1)
    assert llama(layout, kind="s1")["reference"] == 2 * LLAMA
    assert "reference" not in llama(layout, kind="s1", s1=S1Config(reference_losses="cached"))
    assert "reference" not in llama(layout)


def test_bubble_is_the_share_of_the_time_that_stages_wait():
    config = load(
        "parallel=pp4", "model=llama3-8b", "model.lora.dropout=0", "cluster.gpus_per_node=4", "s0.queries_per_rank=32"
    ).config
    estimate = estimate_of(config, "s0")
    # 32 queries of 128 tokens are 1 chunk of 4,096, 64 passages of 512 are 8.
    assert estimate.num_chunks == 9 and estimate.bubble == 3 / 12
    assert bubble_equation(Layout("deepspeed", 4, 1, 1), estimate) == (
        "pipeline bubble 25 % = (4 pp - 1) / (9 chunks + 4 pp - 1)"
    )


def test_bytes_of_a_layer_by_hand():
    figures = ModelFigures("llama", layers=1, width=8, inner=16, heads=4, key_value_heads=2, head_width=2, vocabulary=9)
    model = ModelConfig(lora=FULL, autocast="float32", weights_dtype="float32")
    layer = layer_bytes(figures, model, Pass(tokens=10, row_tokens=5, masked=True, on_gpu=False))
    # Queries, repeated keys and values, output: 4 x 8; normaliser 4; mask 5. Norms: inputs and outputs of two, 4 x 8.
    # Inputs of two groups of products 2 x 8 and of down 16; gate, its activation, up: 3 x 16. All of 4 bytes.
    assert layer.saved == 10 * 4 * (4 * 8 + 4 + 5 + 4 * 8 + 2 * 8 + 16 + 3 * 16)
    assert layer.entering == 10 * 4 * 8
    without = layer_bytes(figures, model, Pass(tokens=10, row_tokens=5, masked=False, on_gpu=False))
    assert layer.saved - without.saved == 10 * 4 * (5 + 2 * (8 - 4))  # the mask, and the repeated heads
    halved = layer_bytes(figures, model, Pass(10, 5, masked=True, on_gpu=False, tensor_size=2))
    assert halved.saved == 10 * 4 * (4 * 4 + 2 + 5 + 4 * 8 + 2 * 8 + 8 + 3 * 8)


def test_smaller_chunks_and_checkpointing_take_less():
    big = llama(Layout("deepspeed", 1, 8, 1, 2))["activations"]
    config = load("model=llama3-8b", "loss.gradient_cache=true", "cluster.gpus_per_node=1").config

    def activations(**changes: object) -> int:
        items = estimate_of(replace(config, **changes), "s0").items
        return next(item.num_bytes for item in items if item.name == "activations")

    # Half of all but the matrices of a layer, copied to bfloat16.
    small = activations(loss=LossConfig(gradient_cache=True, chunk_tokens=2048))
    assert 2 * (small - 2 * LAYER) == activations() - 2 * LAYER
    assert activations(model=replace(config.model, gradient_checkpointing=False)) > 5 * activations()
    assert activations(loss=LossConfig()) > 20 * big


def test_plan_says_it_in_one_line_and_the_dry_run_as_a_table():
    config = load("model=llama3-8b", "loss.gradient_cache=true", "cluster.gpus_per_node=1").config
    line = memory_equation(config, "s0")
    assert line.startswith("memory a GPU about ") and "30.1 GB weights" in line and "1.00 GB CUDA" in line
    table = memory_text(config, ["prepare", "s0", "s2", "eval"])
    assert table.count("in all") == 2 and "7,504,924,672 parameters x 4 bytes + 20,971,520 of LoRA x 4" in table
    on_cpu = replace(config, cluster=ClusterConfig())
    assert memory_equation(on_cpu, "s0").startswith("memory a rank about ") and "CUDA" not in memory_equation(
        on_cpu, "s0"
    )
    unknown = replace(config, model=ModelConfig(name="someone/unheard-of"))
    assert memory_equation(unknown, "s0") == memory_text(unknown, ["s0"]) == ""


def test_what_is_held_has_to_fit_and_the_rest_is_warned_of():
    keys = ["model=llama3-8b", "cluster.gpus_per_node=1", "model.lora.enabled=false"]
    too_big = load(*keys, "cluster.gpu_memory_gb=80").config
    (problem,) = fit_problems(too_big, ["s0", "s0", "eval"])
    assert problem.startswith("s0 holds about 90.1 GB") and "Type parallel=auto" in problem
    assert fit_notes(too_big, ["s0"]) == []
    (note,) = fit_notes(load("model=llama3-8b", "cluster.gpus_per_node=1", "cluster.gpu_memory_gb=80").config, ["s0"])
    assert "may run out of memory. Type loss.gradient_cache=true." in note
    fits = ["model=llama3-8b", "cluster.gpus_per_node=1", "loss.gradient_cache=true", "cluster.gpu_memory_gb=80"]
    assert fit_problems(load(*fits).config, ["s0"]) == fit_notes(load(*fits).config, ["s0"]) == []
    # Of a GPU whose memory nobody gave, nothing is known.
    assert fit_problems(load(*keys).config, ["s0"]) == fit_notes(load(*keys).config, ["s0"]) == []


@pytest.mark.parametrize(
    ("model", "more", "gpus", "memory", "name"),
    [
        ("qwen1.5-0.5b", [], 8, 80, "ddp"),
        ("llama3-8b", [], 8, 80, "ddp"),  # LoRA
        ("qwen1.5-4b", ["model.lora.enabled=false"], 8, 80, "zero1"),
        ("llama3-8b", ["model.lora.enabled=false", "model.weights_dtype=bfloat16"], 8, 80, "zero1"),
        ("llama3-8b", ["model.lora.enabled=false"], 8, 80, "zero2"),
        ("llama3-8b", ["model.lora.enabled=false"], 8, 60, "tp4"),
        ("llama3-8b", ["model.lora.enabled=false"], 1, 141, "zero3_offload"),
    ],
)
def test_auto_takes_the_layout_with_least_communication_that_fits(model, more, gpus, memory, name):
    pytest.importorskip("deepspeed")
    keys = [f"model={model}", *more, f"cluster.gpus_per_node={gpus}", f"cluster.gpu_memory_gb={memory}"]
    loaded = load("parallel=auto", "loss.gradient_cache=true", "stages=[s0]", *keys)
    (note,) = loaded.notes
    assert note.startswith(f"parallel=auto takes {name}: ")
    same = load(f"parallel={name}").config.parallel
    assert loaded.config.parallel == same  # what is saved: a layout, not a wish
    assert estimate_of(loaded.config, "s0").total <= 0.9 * memory * 1e9


def test_auto_without_deepspeed_has_only_ddp(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    keys = ["parallel=auto", "model=llama3-8b", "model.lora.enabled=false", "cluster.gpus_per_node=8"]
    with pytest.raises(ConfigError, match="The nearest is ddp"):
        load(*keys, "cluster.gpu_memory_gb=80")


def test_auto_refuses_with_the_nearest_miss():
    pytest.importorskip("deepspeed")
    keys = ["model=llama3-8b", "loss.gradient_cache=true", "cluster.gpus_per_node=2", "cluster.gpu_memory_gb=10"]
    with pytest.raises(ConfigError) as caught:
        load("parallel=auto", *keys)
    (problem,) = caught.value.problems
    assert problem.startswith("parallel.engine is 'auto', but no layout of 2 ranks fits a GPU of 10 GB")
    assert "The nearest is zero3" in problem and "model.lora.dropout=0" in problem


@pytest.mark.parametrize(
    ("keys", "said", "cure"),
    [
        (["cluster.gpus_per_node=8"], "cluster.gpu_memory_gb is 0", "Type cluster.gpu_memory_gb=80"),
        (
            ["cluster.gpus_per_node=8", "cluster.gpu_memory_gb=80", "model.name=someone/unheard-of"],
            "sizes are not known",
            "hf download someone/unheard-of config.json",
        ),
    ],
)
def test_auto_says_what_it_has_to_know(keys, said, cure):
    with pytest.raises(ConfigError) as caught:
        load("parallel=auto", *keys)
    assert said in caught.value.problems[0] and cure in caught.value.problems[0]


def test_auto_refuses_a_model_whose_layers_nobody_knows(tmp_path):
    sizes = '"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3'
    (tmp_path / "config.json").write_text(f'{{"model_type": "strange", "vocab_size": 10, {sizes}}}')
    with pytest.raises(ConfigError, match="sizes are not known here"):
        load("parallel=auto", f"model.name={tmp_path}", "cluster.gpus_per_node=2", "cluster.gpu_memory_gb=80")


def test_auto_says_how_many_ranks_read_data():
    pytest.importorskip("deepspeed")
    keys = ["model=llama3-8b", "model.lora.enabled=false", "loss.gradient_cache=true", "stages=[s0]"]
    loaded = load("parallel=auto", *keys, "cluster.gpus_per_node=8", "cluster.gpu_memory_gb=60")
    assert ", 2 data ranks; with less communication tp2 would need " in loaded.notes[0]


def test_auto_without_gpus_is_ddp():
    assert load("parallel=auto").config.parallel == Config().parallel


def test_auto_and_an_axis_contradict_each_other():
    with pytest.raises(ConfigError, match="parallel.tp on the command line is 2, but parallel.engine is 'auto'"):
        load("parallel=auto", "parallel.tp=2")


@pytest.mark.parametrize("name", ["qwen1.5-0.5b", "qwen3-0.6b", "mistral-7b", "tiny_decoder", "minilm"])
def test_every_model_of_the_configs_has_an_estimate(name):
    config = load(f"model={name}").config
    if figures_of(config.model) is None:
        pytest.skip("the package of this model is not installed")
    for kind in ("s0", "s1", "s2"):
        assert estimate_of(config, kind).total > estimate_of(config, kind).held > 0


def test_what_is_assumed_of_the_engines_is_what_they_do():
    loading = pytest.importorskip("tdro_hpc.parallel.pipeline.loading")
    pipeline = pytest.importorskip("tdro_hpc.parallel.pipeline.engine")
    zero = pytest.importorskip("tdro_hpc.parallel.zero.engine")
    assert (zero.BUCKET_ELEMENTS, pipeline.BUCKET_ELEMENTS) == (ZERO_BUCKET, PIPELINE_BUCKET)
    # 28 layers in 8 parts: the last four have one more.
    assert loading.layers_of_part(28, 8) == [0, 3, 6, 9, 12, 16, 20, 24, 28]
    config = load("model=qwen3-0.6b", "model.lora.enabled=false", "cluster.gpus_per_node=8").config
    estimate = estimate_of(config, "s0", Layout("deepspeed", 8, 1, 1, 1))
    layer = 1024 * (2 * 2048 + 2 * 1024 + 3 * 3072) + 2 * 1024 + 2 * 128
    assert estimate.items[0].num_bytes == 4 * (3 * layer + 151936 * 1024)


def test_sizes_are_written_as_a_person_would():
    assert [size_words(number) for number in (999, 1.5e6, 81.9e9, 1e12)] == ["1.00 kB", "1.50 MB", "81.9 GB", "1.00 TB"]


def test_a_step_of_one_pass_does_not_hold_gradients_and_activations_together():
    config = Config(model=ModelConfig(name="tiny:qwen2", lora=FULL), s0=TrainingConfig(queries_per_rank=1))
    together = replace(config, s0=TrainingConfig(queries_per_rank=1, accumulation_steps=2))
    gradients = 4 * 1_018_496
    assert estimate_of(together, "s0").total - estimate_of(config, "s0").total == gradients
