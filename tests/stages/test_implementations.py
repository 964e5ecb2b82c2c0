"""s0 and s2 with the loss in the compiled library and in torch: the same losses and weights over 50 steps.

s0 has 2048 queries a step, so that the loss is the greater part of it, and s2 few.
"""

import json
import random
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tdro_hpc.config.load import load_config
from tdro_hpc.data.batches import Batches
from tdro_hpc.encoders.tiny import tiny_config, tiny_tokenizer
from tdro_hpc.losses import fused, host, torch_core
from tdro_hpc.parallel.process import start_process
from tdro_hpc.stages import s0, s2
from tdro_hpc.stages.graph import stage_graph
from tdro_hpc.training import step
from tests.reference.loss_cases import needs_library

ROWS = 2048  # of a task
QUERIES = {"s0": ROWS, "s2": 128}
PASSAGES = {"s0": 1, "s2": 2}  # of a query
STEPS = 50
# What computes the losses of a step: each of them is called once a micro-step, or not at all.
CORES = {
    "fused": [(host, "losses"), (host, "forward_backward"), (fused, "forward"), (fused, "forward_backward")],
    "torch": [(torch_core, "forward"), (torch_core, "forward_backward")],
}
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
            for _ in range(ROWS):
                key, other = ("".join(draw.choices(string.printable[:60], k=2)) for _ in range(2))
                row = {"query": key, "positive_passages": [{"text": key[::-1]}]}
                file.write(json.dumps(row | {"negative_passages": [{"text": other}]}) + "\n")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("implementations")
    write_model(folder / "backbone")
    write_tasks(folder / "data")
    weights = {"domain_ids": {"left": 0, "right": 1}, "domain_weights": {"left": 0.7, "right": 0.3}}
    (folder / "given.json").write_text(json.dumps(weights | {"size": {"left": ROWS, "right": ROWS}, "epoch": {}}))
    return folder


@pytest.fixture
def drawn_once(monkeypatch):
    """Runs that differ in their loss only have the same batches, and to read them takes longer than a step."""
    read, draw = {}, Batches.batch

    def batch(self, step, micro_step):
        if (step, micro_step) not in read:
            read[step, micro_step] = draw(self, step, micro_step)
        return read[step, micro_step]

    monkeypatch.setattr(Batches, "batch", batch)


@pytest.fixture
def computed(monkeypatch):
    """Names of the implementations that computed losses, one a call, and `cached` before each that the cache asks for.

    The functions are the real ones.
    """
    names = []

    def noting(function, name):
        def note(*arguments, **options):
            names.append(name)
            return function(*arguments, **options)

        return note

    monkeypatch.setattr(step, "cached_backward", noting(step.cached_backward, "cached"))

    for name, cores in CORES.items():
        for module, function in cores:
            monkeypatch.setattr(module, function, noting(getattr(module, function), name))
    return names


def trained(folder: Path, stage: str, implementation: str, cache: bool):
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
        "loss.gradient_cache": cache,
        "loss.chunk_tokens": 256,
        f"{kind}.steps": STEPS,
        f"{kind}.queries_per_rank": QUERIES[kind],
        f"{kind}.passages_per_query": PASSAGES[kind],
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
    run_dir = folder / f"{implementation}-{cache}"
    (run_dir / stage).mkdir(parents=True)
    {"s0": s0, "s2": s2}[kind].run(config, stage_graph(config)[stage], run_dir, process)
    rows = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
    (model,) = (run_dir / stage / "out" / "model").glob("*.safetensors")
    return [row["loss"] for row in rows], load_file(model)


@needs_library
@pytest.mark.parametrize(
    ("stage", "cache"), [("s0", False), ("s2-given", False), ("s2-given", True)], ids=["s0", "s2", "s2-cached"]
)
def test_compiled_library_and_torch_train_the_same_model(inputs, drawn_once, computed, stage, cache):
    losses, weights = trained(inputs, stage, "fused", cache)
    wanted_losses, wanted_weights = trained(inputs, stage, "torch", cache)
    before = ["cached"] if cache else []
    assert computed == [*before, "fused"] * STEPS + [*before, "torch"] * STEPS
    assert len(wanted_losses) == STEPS and wanted_losses[-1] < 0.9 * wanted_losses[0]
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    assert weights.keys() == wanted_weights.keys() and len(weights) > 10
    for name, value in wanted_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5, msg=name)
