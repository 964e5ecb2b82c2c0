"""An encoder spread over ranks by layers and by the columns of its matrices, trained by DeepSpeed's pipeline engine.

Losses see what every rank of a replica has: the embeddings of all chunks.
"""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tdro_hpc.config.schema import ModelConfig, ParallelConfig, TrainingConfig
from tdro_hpc.data.tokens import Tokens
from tdro_hpc.parallel.deepspeed_setup import initialised, shared_settings, start_deepspeed
from tdro_hpc.parallel.engine_state import check_fit, stored_tensors
from tdro_hpc.parallel.objects import gather_objects
from tdro_hpc.parallel.optimizer import build_optimizer, describe_optimizer
from tdro_hpc.parallel.pipeline.forward import embed_through
from tdro_hpc.parallel.pipeline.layers import EncoderPart
from tdro_hpc.parallel.pipeline.loading import load_part, require_no_dropout
from tdro_hpc.parallel.pipeline.state import Trained, load_tensors, tensors_to_write
from tdro_hpc.parallel.process import Process, replica_group, tensor_group
from tdro_hpc.parallel.schedule import learning_rate_at

BUCKET_ELEMENTS = 1 << 26  # of one collective over the data ranks: 256 MiB of float32


class PipelineEngine:
    """Engine of a model that is spread over the ranks of a replica. It works in chunks only.

    Parameters trained as bfloat16 have float32 masters and moments that are split over the data ranks, whatever
    parallel.zero says: DeepSpeed has no other form of them for a pipeline.
    """

    chunked = True

    def __init__(
        self,
        config: ModelConfig,
        process: Process,
        training: TrainingConfig,
        parallel: ParallelConfig,
        *,
        seed: int,
        folder: Path | None = None,
    ) -> None:
        """
        parallel  its zero (0 or 1) is looked at; the sizes of the mesh are those of `process`
        seed      of a new LoRA adapter
        folder    saved model to start from; None = config.name
        raises    ValueError when the model is not there, not whole, or cannot be spread so, or DeepSpeed is missing
        """
        assert process.pipeline_size * process.tensor_size > 1, "a model on one rank needs no pipeline"
        _require_settings(config, parallel)
        self.process, self.training = process, training
        self.steps_done = 0
        self.part = load_part(config, process, folder=folder, seed=seed).train()
        require_no_dropout(self.part)
        placements = self.part.placements()
        parameters = list(self.part.named_parameters())
        for name, parameter in parameters:
            parameter.model_parallel = placements[name].dim is not None  # type: ignore[attr-defined]  # read by DeepSpeed
        self._trained: Trained = [(p, placements[name]) for name, p in parameters if p.requires_grad]
        self.parameter_counts = _parameter_counts(self.part, process)
        self._adam = build_optimizer(self.part, training)
        low_precision = any(parameter.dtype == torch.bfloat16 for parameter, _ in self._trained)
        stage = 1 if low_precision else parallel.zero
        self._engine = _deepspeed_engine(
            self.part, self._adam, process, _settings(stage, training, low_precision=low_precision)
        )
        self._masters_split = stage == 1
        if process.first:
            print(
                f"optimiser: {describe_optimizer(self._adam)} under ZeRO-{stage}, the model on {process.pipeline_size} "
                f"(pipeline) x {process.tensor_size} (tensor) ranks"
            )

    @property
    def learning_rate(self) -> float:
        """Rate of the newest optimiser step; before the first one, that of the first."""
        return learning_rate_at(max(0, self.steps_done - 1), self.training)

    def embed(self, parts: list[Tokens]) -> list[Tensor]:
        """Not for a pipeline, whose backward cannot begin outside of its last rank: `chunked` says so."""
        raise AssertionError("a pipeline embeds by embed_chunks")

    def backward(self, loss: Tensor, *, synchronise: bool) -> None:
        """Not for a pipeline: see `embed`."""
        raise AssertionError("a pipeline goes back by backward_chunks")

    def embed_chunks(self, chunks: list[Tokens]) -> list[Tensor]:
        """Embeddings [rows, width] float32 of each chunk, without gradient; bit-equal on all ranks of the replica."""
        return embed_through(self.part, self.process, chunks)

    def backward_chunks(self, chunks: list[Tokens], gradients: list[Tensor], *, synchronise: bool) -> None:
        """Add the gradients of the sum over chunks of (embedding * gradient).sum(); then maybe average them.

        Replicas may have different numbers of chunks: they meet only where they average.
        """
        from tdro_hpc.parallel.pipeline.module import backward_pass

        backward_pass(self._engine, chunks, self._same_gradients(gradients))
        if synchronise:
            self._sum_partial_gradients()
            self._engine._exec_reduce_grads()

    def _same_gradients(self, gradients: list[Tensor]) -> list[Tensor]:
        """Those of the first tensor rank: a loss that rounds apart would let copies of a parameter drift apart."""
        if self.process.tensor_size == 1:
            return gradients
        together = torch.cat(gradients)
        dist.broadcast(together, group=tensor_group(), group_src=0)
        return list(together.split([len(gradient) for gradient in gradients]))

    def step(self) -> Tensor:
        """Clip, update, zero the gradients; returns their global L2 norm [] before clipping."""
        rate = learning_rate_at(self.steps_done, self.training)
        for group in self._adam.param_groups:
            group["lr"] = rate
        norm = None if self._masters_split else self._clipped_norm()
        self._engine._exec_optimizer_step()
        self.steps_done += 1
        if norm is None:
            norm = self._engine.get_global_grad_norm()  # ZeRO has clipped
        return torch.as_tensor(norm, dtype=torch.float32, device=self.process.device)

    def state_dict(self) -> dict[str, Any]:
        """Trained parameters, Adam's moments and step counters: the part that this rank writes. All ranks call it."""
        tensors = tensors_to_write(self._trained, self._engine, self.process, masters_split=self._masters_split)
        return {"tensors": tensors, "values": {"steps_done": self.steps_done, "scaler": {}}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over this rank's part of what any engine's ranks wrote. All ranks call it together.

        raises ValueError if the parameters are others than those of this encoder, or of other shapes
        """
        stored = stored_tensors(state)
        check_fit(self._wanted(), stored)
        load_tensors(self._trained, self._engine, stored, masters_split=self._masters_split)
        self.steps_done = state["values"]["steps_done"]

    def _sum_partial_gradients(self) -> None:
        """Put together, over the tensor ranks, the gradients of which each of them has a share."""
        if self.process.tensor_size == 1:
            return
        shares = [_gradient_of(parameter) for parameter, place in self._trained if place.partial]
        if shares:
            together = torch.cat([share.flatten() for share in shares])
            dist.all_reduce(together, group=tensor_group())
            for share, whole in zip(shares, together.split([share.numel() for share in shares]), strict=True):
                share.copy_(whole.view_as(share))

    def _clipped_norm(self) -> Tensor:
        """Norm [] of the gradient of the whole model, which is afterwards at most training.max_grad_norm long."""
        counted = [p for p, place in self._trained if place.dim is not None or self.process.tensor_rank == 0]
        square = nn.utils.get_total_norm([_gradient_of(parameter) for parameter in counted]).square()
        dist.all_reduce(square, group=replica_group())
        norm = square.sqrt()
        if self.training.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_([p for p, _ in self._trained], self.training.max_grad_norm, norm)
        return norm

    def _wanted(self) -> dict[str, tuple[int, ...]]:
        """Names in a state, and shapes, of what is trained on all ranks. All ranks call it together."""
        own = {f"parameter.{place.name}": place.shape for _, place in self._trained}
        return {name: shape for names in gather_objects(own) for name, shape in names.items()}


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    """Where DeepSpeed adds up the gradient: beside parameters of 16 bit it keeps one of 32 bit."""
    separate = getattr(parameter, "_hp_grad", None)
    gradient = parameter.grad if separate is None else separate
    assert gradient is not None, "every trained parameter of a decoder is read by every pass"
    return gradient


def _deepspeed_engine(
    part: EncoderPart, adam: torch.optim.Optimizer, process: Process, settings: dict[str, Any]
) -> Any:
    deepspeed = start_deepspeed(process)
    from tdro_hpc.parallel.pipeline.module import PartModule

    with contextlib.redirect_stdout(io.StringIO()):  # lists its layers and its topology
        module = PartModule(part, process)
    return initialised(deepspeed, module, adam, settings)


def _settings(stage: int, training: TrainingConfig, *, low_precision: bool) -> dict[str, Any]:
    """Settings of DeepSpeed.

    stage  of ZeRO, 0 or 1. Without ZeRO it knows no norm over all axes unless it clips, so the engine clips itself
    """
    settings = shared_settings() | {
        "gradient_clipping": training.max_grad_norm if stage == 1 else 0.0,
        "communication_data_type": "fp32",  # of gradients; else they are rounded on the way
        "timers": {"throughput": {"enabled": False}},  # would wait for the GPU at every chunk
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": False,  # a second copy of the gradients
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
        # Hidden states travel whole: their partition over tensor ranks cannot change its shape from chunk to chunk.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
    }
    if low_precision:
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings


def _require_settings(config: ModelConfig, parallel: ParallelConfig) -> None:
    if "float16" in (config.weights_dtype, config.autocast):
        raise ValueError(
            f"model.weights_dtype is {config.weights_dtype!r} and model.autocast {config.autocast!r}; parallel.engine="
            "deepspeed has no float16. Set them to bfloat16 or float32."
        )
    if parallel.zero > 1 or parallel.offload:
        raise ValueError(
            f"parallel.zero is {parallel.zero} and parallel.offload {parallel.offload}, but with parallel.pp or "
            "parallel.tp above 1 only zero 0 or 1 without offload works. Set parallel.zero=1 parallel.offload=false."
        )


def _parameter_counts(part: EncoderPart, process: Process) -> tuple[int, int]:
    placements = part.placements()
    own = [p for name, p in part.named_parameters() if placements[name].dim is not None or process.tensor_rank == 0]
    counts = torch.tensor([sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)])
    counts = counts.to(process.device)
    dist.all_reduce(counts, group=replica_group())
    total, trained = counts.tolist()
    return total, trained
