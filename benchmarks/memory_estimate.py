"""The memory that a plan prints for a stage, against what training takes: random small backbones, one process.

    python benchmarks/memory_estimate.py [size=small] [architecture=qwen2,llama] [types=bfloat16/float32] [md=table.md]

Each case is two optimiser steps of s0 by the torch engine, AdamW's moments included: full and LoRA, activations kept
and recomputed, two sizes of chunk, three choices of type. Measured is the most that the allocator held at once (on a
GPU torch.cuda.max_memory_allocated), the estimate is tdro_hpc.config.memory's for the same config, less what the
allocator does not see (the CUDA context). A ratio over 1 means that the estimate is more than was taken.
"""

import contextlib
import gc
import io
import itertools
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tdro_hpc.config.fitting import estimate_of
from tdro_hpc.config.layouts import Layout
from tdro_hpc.config.schema import (
    ClusterConfig,
    Config,
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    TrainingConfig,
)
from tdro_hpc.data.tokens import Tokens
from tdro_hpc.encoders.backbone import load_encoder
from tdro_hpc.losses.gradcache import cached_backward
from tdro_hpc.losses.infonce import grouped_infonce
from tdro_hpc.parallel.process import Process
from tdro_hpc.parallel.torch_engine import TorchEngine

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size
SIZES = {
    "tiny": (128, 352, 4, 4, 2, 2048),
    "small": (384, 1024, 8, 6, 2, 8192),
    "medium": (512, 1408, 8, 8, 2, 16000),
    "large": (768, 2048, 12, 12, 4, 32000),
}
TYPES = "float32/float32,bfloat16/float32,bfloat16/bfloat16"  # products/weights
QUERY_TOKENS, PASSAGE_TOKENS, QUERIES, PASSAGES_PER_QUERY = 64, 128, 8, 2
CHUNKS = (512, 2048)  # tokens


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    architecture: str
    size: str
    autocast: str
    weights: str
    lora: bool
    checkpointing: bool
    chunk_tokens: int  # 0 = without gradient caching

    def words(self) -> str:
        """The first cell of the row."""
        kept = "recomputed" if self.checkpointing else "kept"
        chunk = f"chunks of {self.chunk_tokens}" if self.chunk_tokens else "whole batch"
        types = f"{self.weights} weights, {self.autocast} products"
        return f"{self.architecture} {self.size}, {'LoRA' if self.lora else 'full'}, {types}, {kept}, {chunk}"


def all_cases(architectures: list[str], sizes: list[str], types: list[str]) -> Iterator[Case]:
    """Every combination.

    types   bfloat16/float32 = products in bfloat16, weights in float32
    """
    for architecture, size, pair, lora, checkpointing, chunk in itertools.product(
        architectures, sizes, types, (False, True), (False, True), CHUNKS
    ):
        yield Case(architecture, size, *pair.split("/"), lora=lora, checkpointing=checkpointing, chunk_tokens=chunk)


def build_backbone(case: Case, folder: Path) -> None:
    """A random backbone of the case as Hugging Face files in the folder."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = dict(zip((*keys, "vocab_size"), SIZES[case.size], strict=True))
    AutoModel.from_config(AutoConfig.for_model(case.architecture, **sizes)).save_pretrained(folder)


def config_of(case: Case, folder: Path, *, on_gpu: bool) -> Config:
    """The case in the words of this project."""
    return Config(
        model=ModelConfig(
            name=str(folder),
            attention="sdpa",
            autocast=case.autocast,
            weights_dtype=case.weights,
            gradient_checkpointing=case.checkpointing,
            lora=LoraConfig(enabled=case.lora),
        ),
        data=DataConfig(query_max_tokens=QUERY_TOKENS, passage_max_tokens=PASSAGE_TOKENS),
        loss=LossConfig(gradient_cache=case.chunk_tokens > 0, chunk_tokens=max(1, case.chunk_tokens)),
        s0=TrainingConfig(queries_per_rank=QUERIES, passages_per_query=PASSAGES_PER_QUERY),
        cluster=ClusterConfig(gpus_per_node=int(on_gpu)),
    )


def estimated_bytes(config: Config) -> int:
    """The plan's estimate, less what no allocator sees and the tiles of a loss so small that it needs none."""
    estimate = estimate_of(config, "s0", Layout("torch", 1, 1, 1))
    assert estimate is not None, "the model is a folder with its config.json"
    return sum(item.num_bytes for item in estimate.items if item.name not in ("CUDA", "buffers"))


def measured_bytes(config: Config, device: torch.device) -> int:
    """Most memory that two optimiser steps hold at once, the weights included."""
    gc.collect()
    encoder = load_encoder(config.model, device=device, seed=0)
    process = Process(data_rank=0, data_size=1, local_rank=0, device=device)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters())
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _train(TorchEngine(encoder, process, config.s0), config)
        return weights + torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _train(TorchEngine(encoder, process, config.s0), config)
    return weights + _highest(recorded)


def _train(engine: TorchEngine, config: Config) -> None:
    """Two steps: the first makes AdamW's moments."""
    for _ in range(2):
        parts = [_tokens(QUERIES, QUERY_TOKENS), _tokens(QUERIES * PASSAGES_PER_QUERY, PASSAGE_TOKENS)]
        if config.loss.gradient_cache:
            cached_backward(engine, parts, config.loss.chunk_tokens, _loss_of, synchronise=True)
        else:
            engine.backward(_loss_of(engine.embed(parts)), synchronise=True)
        engine.step()


def _loss_of(embeddings: list[Tensor]) -> Tensor:
    queries, passages = embeddings
    positives = torch.arange(0, len(passages), len(passages) // len(queries), device=queries.device)
    return grouped_infonce(queries, passages, positives, temperature=0.05, implementation="torch").mean()


def _tokens(rows: int, length: int) -> Tokens:
    """Random full rows; one is shorter in every four, so that a mask is needed."""
    ids, mask = torch.randint(5, 2000, (rows, length)), torch.ones(rows, length, dtype=torch.int64)
    mask[::4, -1] = 0
    return Tokens(ids, mask)


def _highest(recorded: profile) -> int:
    """Peak of the running sum of what was allocated and freed, from the profiler's own events."""
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None, "the profile is over"
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = [0, *itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))]
    return max(held)


def compare(case: Case, device: torch.device) -> tuple[int, int]:
    """(measured, estimated) bytes of a case."""
    with tempfile.TemporaryDirectory() as name:
        build_backbone(case, Path(name))
        config = config_of(case, Path(name), on_gpu=device.type == "cuda")
        with contextlib.redirect_stdout(io.StringIO()):  # the engine names its optimiser
            measured = measured_bytes(config, device)
        return measured, estimated_bytes(config)


def main(words: list[str]) -> None:
    """Print the table, and write it where md= says."""
    options = {"size": "small", "architecture": "qwen2,llama", "types": TYPES, "md": ""}
    options |= dict(word.split("=", 1) for word in words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = ["| case | measured MB | estimated MB | ratio |", "|---|---|---|---|"]
    print("\n".join(rows), flush=True)
    ratios = []
    for case in all_cases(*(options[name].split(",") for name in ("architecture", "size", "types"))):
        measured, estimated = compare(case, device)
        ratios.append(estimated / measured)
        rows.append(f"| {case.words()} | {measured / 1e6:.1f} | {estimated / 1e6:.1f} | {ratios[-1]:.2f} |")
        print(rows[-1], flush=True)
    rows.append(f"\nratio {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} cases on {device.type}")
    print(rows[-1])
    if options["md"]:
        Path(options["md"]).write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
