"""The layouts and models of the table, and the batches that all of them train on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tdro_hpc.config.schema import LoraConfig, ModelConfig, ParallelConfig, TrainingConfig
from tdro_hpc.data.batches import Batch
from tdro_hpc.data.tokens import Tokens

ROWS, PASSAGES_PER_QUERY, TASKS = 16, 2, 3
STEPS, DRO_STEPS = 3, 2
CHUNK_TOKENS = 160  # some eight chunks a step
_FIRST_BYTE, _VOCABULARY = 4, 260  # ids of the tiny tokenizer


@dataclass(frozen=True)
class Layout:
    """How the ranks of a run work together."""

    world: int
    parallel: ParallelConfig


def _deepspeed(world: int, **keys: int) -> Layout:
    return Layout(world, ParallelConfig(engine="deepspeed", backend="gloo", threads_per_rank=1, **keys))


ALONE = Layout(1, ParallelConfig(threads_per_rank=1))
LAYOUTS = {
    "ddp2": Layout(2, ParallelConfig(backend="gloo", threads_per_rank=1)),
    "zero1": _deepspeed(2, zero=1),
    "zero2": _deepspeed(2, zero=2),
    "zero3": _deepspeed(2, zero=3),
    "tp2": _deepspeed(2, tp=2),
    "pp2": _deepspeed(2, pp=2),
    "pp2_dp2": _deepspeed(4, pp=2),
    "pp2_tp2": _deepspeed(4, pp=2, tp=2),
    "pp2_tp2_dp2": _deepspeed(8, pp=2, tp=2),
}
MODELS = ("qwen2", "qwen3", "mistral", "llama")
VARIANTS = ("full", "lora", "full_checkpointed", "lora_checkpointed")


def model_of(architecture: str, variant: str, precision: str) -> ModelConfig:
    """A tiny backbone, trained whole or by LoRA, with or without recomputed activations."""
    return ModelConfig(
        name=f"tiny:{architecture}",
        attention="padding_free",
        autocast=precision,
        gradient_checkpointing=variant.endswith("_checkpointed"),
        lora=LoraConfig(enabled=variant.startswith("lora"), rank=4, dropout=0.0),
    )


TRAINING = TrainingConfig(
    steps=STEPS + DRO_STEPS,
    warmup_steps=0,
    learning_rate=1e-3,
    # Gradients that are 0 but for rounding, such as those of key biases, would move a parameter by the whole rate, to
    # one side or the other, under an epsilon that is smaller than they are.
    adam_epsilon=1e-3,
    negatives="world",
    temperature=0.05,
    max_grad_norm=0.5,
)


def batch_of(step: int, data_rank: int, data_size: int) -> Batch:
    """The rows that a data rank has of the global batch of a step, which is the same for all layouts."""
    draw = torch.Generator().manual_seed(step)
    queries, passages = _tokens(draw, ROWS, 12), _tokens(draw, ROWS * PASSAGES_PER_QUERY, 40)
    task_ids = torch.arange(ROWS) % TASKS
    own = slice(ROWS * data_rank // data_size, ROWS * (data_rank + 1) // data_size)
    own_passages = slice(own.start * PASSAGES_PER_QUERY, own.stop * PASSAGES_PER_QUERY)
    return Batch(
        query_tokens=queries.rows(own),
        passage_tokens=passages.rows(own_passages),
        task_ids=task_ids[own],
        rows=torch.arange(ROWS)[own],
        document_ids=torch.arange(ROWS * PASSAGES_PER_QUERY)[own_passages],
        known_positive_ids=torch.full((ROWS, 1), -1)[own],
        own_negatives_only=torch.zeros(ROWS, dtype=torch.bool)[own],
        draw_ids=torch.arange(ROWS)[own],
        global_task_counts=torch.bincount(task_ids, minlength=TASKS),
    )


def _tokens(draw: torch.Generator, rows: int, longest: int) -> Tokens:
    """Random texts of 3 to `longest` tokens."""
    lengths = torch.randint(3, longest + 1, (rows,), generator=draw)
    mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
    ids = torch.randint(_FIRST_BYTE, _VOCABULARY, (rows, longest), generator=draw)
    return Tokens(ids * mask, mask)


class KnownLosses:
    """A reference of s1 whose losses are a function of the row, so that alpha depends on the proxy alone."""

    def losses(self, batch: Batch) -> Tensor:
        return 1 + batch.rows.float() / ROWS
