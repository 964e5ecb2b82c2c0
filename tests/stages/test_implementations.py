"""s0 and s2 of 2048 queries a step with the loss in the compiled library and in torch: the same losses and weights."""

import json
import random
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tdro_hpc.config.load import load_config
from tdro_hpc.encoders.tiny import tiny_config, tiny_tokenizer
from tdro_hpc.parallel.process import start_process
from tdro_hpc.stages import s0, s2
from tdro_hpc.stages.graph import stage_graph
from tests.reference.loss_cases import needs_library

QUERIES = 2048
STEPS = {"s0": 25, "s2": 5}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_model(folder: Path) -> None:
    """A decoder small enough that the loss is the greater part of a step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config("qwen2")
        config.update({**SHAPE, "num_key_value_heads": 1, "layer_types": ["full_attention"]})
        AutoModel.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer("qwen2").save_pretrained(folder)


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    for task in ("left", "right"):
        draw = random.Random(task)
        with (folder / f"{task}.jsonl").open("w") as file:
            for _ in range(QUERIES):
                key, other = ("".join(draw.choices(string.printable[:60], k=2)) for _ in range(2))
                row = {"query": key, "positive_passages": [{"text": key[::-1]}]}
                file.write(json.dumps(row | {"negative_passages": [{"text": other}]}) + "\n")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("implementations")
    write_model(folder / "backbone")
    write_tasks(folder / "data")
    weights = {"domain_ids": {"left": 0, "right": 1}, "domain_weights": {"left": 0.7, "right": 0.3}}
    (folder / "given.json").write_text(json.dumps(weights | {"size": {"left": QUERIES, "right": QUERIES}, "epoch": {}}))
    return folder


def trained(folder: Path, stage: str, implementation: str):
    """Losses of every step, and the weights of the model afterwards."""
    kind = stage.split("-")[0]
    values = {
        "model.name": folder / "backbone",
        "model.autocast": "float32",
        "model.attention": "sdpa",
        "model.gradient_checkpointing": "false",
        "model.lora.enabled": "false",
        "data.dir": folder / "data",
        "data.loader_workers": 0,
        "parallel.threads_per_rank": 1,  # a second one that has to wait for a core costs many times more
        "loss.implementation": implementation,
        f"{kind}.steps": STEPS[kind],
        f"{kind}.queries_per_rank": QUERIES,
        f"{kind}.warmup_steps": 5,
        f"{kind}.learning_rate": 1e-3,
        f"{kind}.adam_epsilon": 1e-4,  # far above the noise of float32, which Adam would else blow up to whole steps
        f"{kind}.temperature": 0.05,
        f"{kind}.log_every_steps": 1,
        "s2.weights": folder / "given.json",
        "s2.transfer": "loss",
        "eval.models": "base",
    }
    config = load_config([f"{key}={value}" for key, value in values.items()]).config
    process = start_process(config.parallel, rank=0, world=1, local_rank=0, rendezvous="")
    run_dir = folder / implementation
    (run_dir / stage).mkdir(parents=True)
    {"s0": s0, "s2": s2}[kind].run(config, stage_graph(config)[stage], run_dir, process)
    rows = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
    (model,) = (run_dir / stage / "out" / "model").glob("*.safetensors")
    return [row["loss"] for row in rows], load_file(model)


@needs_library
@pytest.mark.parametrize("stage", ["s0", "s2-given"])
def test_compiled_library_and_torch_train_the_same_model(inputs, stage):
    losses, weights = trained(inputs, stage, "fused")
    wanted_losses, wanted_weights = trained(inputs, stage, "torch")
    assert len(wanted_losses) == STEPS[stage[:2]] and wanted_losses[-1] < 0.9 * wanted_losses[0]
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    assert weights.keys() == wanted_weights.keys() and len(weights) > 10
    for name, value in wanted_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5, msg=name)
