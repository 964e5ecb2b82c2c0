"""The estimate of a plan against what torch's allocator gives out in two steps of training."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from memory_estimate import Case, compare  # noqa: E402


@pytest.mark.parametrize(
    "case",
    [
        Case("qwen2", "tiny", "float32", "float32", lora=False, checkpointing=False, chunk_tokens=512),
        Case("qwen2", "tiny", "bfloat16", "float32", lora=True, checkpointing=True, chunk_tokens=2048),
        Case("llama", "tiny", "float32", "float32", lora=True, checkpointing=False, chunk_tokens=0),
        Case("llama", "tiny", "bfloat16", "bfloat16", lora=False, checkpointing=True, chunk_tokens=512),
    ],
    ids=Case.words,
)
def test_estimate_is_within_15_percent_of_what_is_allocated(case):
    if case.lora:
        pytest.importorskip("peft")
    measured, estimated = compare(case, torch.device("cpu"))
    assert measured > 10_000_000 and 0.85 <= estimated / measured <= 1.15, (measured, estimated)
