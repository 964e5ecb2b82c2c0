"""An encoder and its optimiser under DeepSpeed's ZeRO: data-parallel ranks that share out what each would hold.

ZeRO-1 splits masters and moments over the ranks, ZeRO-2 the gradients too, ZeRO-3 the weights too; ZeRO-0 splits
nothing. DeepSpeed runs the passes, the reductions and the optimiser's step, nothing else.

Under ZeRO-3 autograd keeps the weights that the forward put together until the backward has used them, so it saves
memory only where activations are recomputed (model.gradient_checkpointing): then they live for a layer.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tdro_hpc.config.schema import ParallelConfig, TrainingConfig
from tdro_hpc.data.tokens import Tokens
from tdro_hpc.encoders.lora import parameter_counts
from tdro_hpc.parallel.deepspeed_setup import initialised, shared_settings, start_deepspeed
from tdro_hpc.parallel.engine_state import check_fit, saved_buffers, stored_adam_state, stored_tensors
from tdro_hpc.parallel.gather import rows_of_ranks
from tdro_hpc.parallel.optimizer import (
    adam_state,
    build_optimizer,
    describe_optimizer,
    set_adam_state,
    trained_parameters,
)
from tdro_hpc.parallel.process import Process
from tdro_hpc.parallel.replay import Replay
from tdro_hpc.parallel.schedule import learning_rate_at
from tdro_hpc.parallel.zero.state import gathered, take_over

if TYPE_CHECKING:
    from tdro_hpc.encoders.backbone import Encoder

BUCKET_ELEMENTS = 200_000_000  # gradients that are reduced together, at most
PERSISTENT_ELEMENTS = 100_000  # under ZeRO-3 smaller parameters stay whole on every rank between steps


class ZeroEngine:
    """Engine of data-parallel ranks under ZeRO (parallel/engine.py says what each method owes).

    encoder   the same on all ranks; put into training mode here. Under ZeRO-3 its parameters are empty afterwards but
              in a pass
    training  learning rate, schedule, AdamW and clipping
    parallel  zero and offload
    raises    ValueError if DeepSpeed is not installed
    """

    def __init__(
        self, encoder: "Encoder", process: Process, training: TrainingConfig, parallel: ParallelConfig
    ) -> None:
        model = encoder.config
        assert "float16" not in (model.weights_dtype, model.autocast), "refused by the checks of the config"
        assert parallel.zero or model.weights_dtype != "bfloat16", "chunks would be summed in bfloat16: also refused"
        deepspeed = start_deepspeed(process)
        self.encoder, self.process, self.training = encoder.train(), process, training
        self.steps_done, self.chunked = 0, False
        self.parameter_counts: tuple[int, int] = parameter_counts(encoder)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in trained_parameters(encoder)}
        self._stage = parallel.zero
        # apex counts the steps of a group of parameters: ZeRO-3 steps a group in pieces. And it knows no CPU.
        optimizer = build_optimizer(encoder, training, apex=parallel.zero < 3 and not parallel.offload)
        settings = zero_settings(encoder, process, training, parallel)
        self._engine = initialised(deepspeed, _Embedder(encoder), optimizer, settings)
        self._replay = Replay(self, process.device)
        self._chunks_added = 0  # of the embed_chunks before
        if process.first:
            print(f"optimiser: {describe_optimizer(optimizer)} under ZeRO-{parallel.zero}")

    @property
    def learning_rate(self) -> float:
        """Rate of the newest optimiser step; before the first one, that of the first."""
        return learning_rate_at(max(0, self.steps_done - 1), self.training)

    def embed(self, parts: list[Tokens]) -> list[Tensor]:
        """Embeddings [rows, width] of each part, with gradient."""
        return self._engine(parts)

    def embed_frozen(self, tokens: Tokens) -> Tensor:
        """Embeddings [rows, width] without gradient, dropout included."""
        with torch.no_grad():
            return self._engine([tokens])[0]

    def backward(self, loss: Tensor, *, synchronise: bool) -> None:
        """Add the gradients of `loss` []; ZeRO-2 and 3 average them over ranks at once, the others when told so."""
        self._engine.set_gradient_accumulation_boundary(synchronise)
        self._engine.backward(loss)

    def embed_chunks(self, chunks: list[Tokens]) -> list[Tensor]:
        """Embeddings [rows, width] of each chunk, without gradient."""
        # A rank with fewer chunks embeds its first one, the smallest, some times more: under ZeRO-2 and 3 ranks talk to
        # each other in every pass, so all need as many passes.
        self._chunks_added = max(rows_of_ranks(len(chunks))) - len(chunks) if self._stage >= 2 else 0
        return self._replay.embed_chunks([chunks[0]] * self._chunks_added + chunks)[self._chunks_added :]

    def backward_chunks(self, chunks: list[Tokens], gradients: list[Tensor], *, synchronise: bool) -> None:
        """Add the gradients of the same chunks; those that were added get gradient 0."""
        added = [torch.zeros_like(gradients[0])] * self._chunks_added
        self._replay.backward_chunks(
            [chunks[0]] * self._chunks_added + chunks, [*added, *gradients], synchronise=synchronise
        )

    def step(self) -> Tensor:
        """Clip, update, zero the gradients; returns their global L2 norm [] before clipping, inf or NaN as it is."""
        rate = learning_rate_at(self.steps_done, self.training)
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = rate
        norm = self._clip() if self._stage == 0 else None
        self._engine.step()
        if norm is None:
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.process.device)
            # DeepSpeed gives -1 for a norm that is no number, and leaves out some of the steps that have one.
            norm = torch.where(norm < 0, torch.nan, norm)
        self.steps_done += 1
        return norm

    def _clip(self) -> Tensor:
        """The norm [] of gradients that every rank has whole; DeepSpeed would clip them and not tell it."""
        parameters = [parameter for _, parameter in trained_parameters(self.encoder)]
        if self.training.max_grad_norm > 0:
            return nn.utils.clip_grad_norm_(parameters, self.training.max_grad_norm)
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def state_dict(self) -> dict[str, Any]:
        """The trained parameters (float32 masters), buffers and Adam's state that this rank writes, on the host.

        All ranks call it together. Parameter i is written by data rank i % data_size, the buffers by the first.
        """
        tensors: dict[str, Tensor] = {}
        trained = trained_parameters(self.encoder)
        if self.process.data_rank == 0:
            tensors |= {f"buffer.{name}": buffer for name, buffer in saved_buffers(self.encoder)}
        tensors |= dict(self._whole_state(trained) if self._stage == 0 else gathered(self._engine, trained))
        return {"tensors": tensors, "values": {"steps_done": self.steps_done, "scaler": {}}}

    def _whole_state(self, trained: list[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        """This rank's share of a state that every rank has whole."""
        adam = adam_state(self._engine.basic_optimizer)
        for name, parameter in trained[self.process.data_rank :: self.process.data_size]:
            yield f"parameter.{name}", parameter.detach()
            for field, value in adam.get(parameter, {}).items():
                yield f"optimizer.{field}.{name}", value

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what any engine saved on all its ranks; bit for bit in the same layout. All ranks call it.

        raises ValueError if the parameters are others than those of this encoder, or of other shapes
        """
        stored, trained = stored_tensors(state), trained_parameters(self.encoder)
        buffers = {f"buffer.{name}": buffer for name, buffer in saved_buffers(self.encoder)}
        shapes = {f"parameter.{name}": shape for name, shape in self._shapes.items()}
        check_fit(shapes | {name: buffer.shape for name, buffer in buffers.items()}, stored)
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(stored[name])
        if self._stage == 0:
            with torch.no_grad():
                for name, parameter in trained:
                    parameter.copy_(stored[f"parameter.{name}"])
            adam = {parameter: stored_adam_state(stored, name) for name, parameter in trained}
            set_adam_state(self._engine.basic_optimizer, {key: fields for key, fields in adam.items() if fields})
        else:
            take_over(self._engine, trained, stored)
        self.steps_done = state["values"]["steps_done"]


class _Embedder(nn.Module):
    """All parts of one backward in one forward: DeepSpeed wants one forward before each backward."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, parts: list[Tokens]) -> list[Tensor]:
        return [self.encoder(tokens) for tokens in parts]


def zero_settings(
    encoder: "Encoder", process: Process, training: TrainingConfig, parallel: ParallelConfig
) -> dict[str, Any]:
    """What deepspeed.initialize is told."""
    sizes = [parameter.numel() for _, parameter in trained_parameters(encoder)]
    # DeepSpeed keeps a buffer of this size, whatever is put into it; a parameter that does not fit is slower.
    bucket = max(*sizes, min(sum(sizes), BUCKET_ELEMENTS)) if len(sizes) > 1 else sizes[0]
    zero: dict[str, Any] = {"stage": parallel.zero, "reduce_bucket_size": bucket}
    if parallel.zero == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_ELEMENTS
    if parallel.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": process.device.type == "cuda"}
    settings = shared_settings() | {
        # Written out always: DeepSpeed clips at 1.0 where it is not told. ZeRO-0 is clipped by the engine itself.
        "gradient_clipping": float(training.max_grad_norm) if parallel.zero else 0.0,
        "zero_optimization": zero,
    }
    # Adapters are float32 on bfloat16 weights, too: DeepSpeed's mode would cast them for the passes. Under ZeRO-3 their
    # gradients are rounded to the type of the weights all the same.
    if any(parameter.dtype == torch.bfloat16 for _, parameter in trained_parameters(encoder)):
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        if parallel.zero == 1:
            settings["communication_data_type"] = "fp32"  # once a step: the sums over chunks keep their digits
    return settings
