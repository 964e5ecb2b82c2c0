"""What the tests of the ZeRO engine train: models, batches, a loss over all ranks, and the figures they compare."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tdro_hpc.config.schema import LoraConfig, ModelConfig, ParallelConfig, TrainingConfig
from tdro_hpc.encoders.backbone import Encoder, load_encoder
from tdro_hpc.losses.gradcache import cached_backward
from tdro_hpc.parallel.gather import gather_rows
from tdro_hpc.parallel.optimizer import trained_parameters
from tdro_hpc.parallel.process import Process
from tests.reference.toy import toy_tokens

ROWS, STEPS, MICRO_STEPS = 8, 3, 2
# Where a gradient is near 0 the step of Adam is the sign of its rounding: a larger epsilon lets gradients be compared.
TRAINING = TrainingConfig(steps=20, warmup_steps=0, learning_rate=1e-3, max_grad_norm=0.5, adam_epsilon=1e-3)


@dataclass
class Trace:
    """What some steps of an engine gave."""

    embeddings: list[Tensor] = field(default_factory=list)  # of each part of each micro-step
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step, before it


def model(*, lora: bool = False, dropout: float = 0.0, **keys: Any) -> ModelConfig:
    adapters = LoraConfig(enabled=lora, dropout=dropout)
    return ModelConfig(
        **{"name": "tiny:qwen2", "autocast": "float32", "gradient_checkpointing": False, "lora": adapters, **keys}
    )


def layout(zero: int, **keys: Any) -> ParallelConfig:
    return ParallelConfig(engine="deepspeed", zero=zero, **keys)


def encoder_of(config: ModelConfig) -> Encoder:
    """The same weights at every call; second factors of adapters are not 0, or the first ones would get no gradient."""
    encoder = load_encoder(config, device="cpu", seed=3)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return encoder


def rows_of(process: Process) -> slice:
    each = ROWS // process.data_size
    return slice(each * process.data_rank, each * (process.data_rank + 1))


def train(engine: Any, *, steps: range, chunk_tokens: int | None, gradients_of: Any = None) -> Trace:
    """Steps of two micro-steps each, in chunks where chunk_tokens is given."""
    rows, trace = rows_of(engine.process), Trace()
    for step in steps:
        for micro_step in range(MICRO_STEPS):
            seed = 10 * step + micro_step
            parts = [toy_tokens(seed, ROWS, width=9).rows(rows), toy_tokens(100 + seed, ROWS, width=17).rows(rows)]

            def loss_of(embeddings: list[Tensor]) -> Tensor:
                trace.embeddings += [part.detach().clone() for part in embeddings]
                queries, documents = embeddings
                if engine.process.data_size > 1:
                    documents = gather_rows(documents)
                targets = torch.arange(rows.start, rows.stop)
                return torch.nn.functional.cross_entropy(queries @ documents.T / 0.1, targets) / MICRO_STEPS

            last = micro_step == MICRO_STEPS - 1
            if chunk_tokens is None:
                loss = loss_of(engine.embed(parts))
                engine.backward(loss, synchronise=last)
            else:
                loss = cached_backward(engine, parts, chunk_tokens, loss_of, synchronise=last)
            trace.losses.append(loss.detach())
        if gradients_of is not None and step == steps.start:
            trace.gradients = gradients_of(engine)
        trace.norms.append(engine.step())
    return trace


def torch_gradients(engine: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in trained_parameters(engine.encoder)}


def zero_gradients(engine: Any) -> dict[str, Tensor]:
    """Averaged gradients, put together by DeepSpeed itself."""
    from deepspeed.utils import safe_get_full_grad

    return {
        name: safe_get_full_grad(parameter).float().clone() for name, parameter in trained_parameters(engine.encoder)
    }


def gap(found: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """Length of the difference over the length of what is wanted, or over `floor` where that is greater."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / max(float(wanted.norm()), floor))


def gaps(found: Trace, wanted: Trace, process: Process) -> dict[str, float]:
    """The greatest relative differences; `wanted` comes from one process that had all rows."""
    rows = rows_of(process)
    # The gradient of a bias of keys is 0 but for rounding: softmax does not see it. Hence the floor.
    floor = 1e-4 * float(wanted.norms[0])
    return {
        "embeddings": max(gap(a, b[rows]) for a, b in zip(found.embeddings, wanted.embeddings, strict=True)),
        "gradients": max(gap(found.gradients[name], g, floor) for name, g in wanted.gradients.items()),
        "norm": max(gap(a, b) for a, b in zip(found.norms, wanted.norms, strict=True)),
    }
