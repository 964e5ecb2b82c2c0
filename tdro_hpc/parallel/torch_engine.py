"""An encoder, its optimiser and its learning rate on one process, or on several under DistributedDataParallel."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tdro_hpc.config.schema import TrainingConfig
from tdro_hpc.data.tokens import Tokens
from tdro_hpc.encoders.lora import parameter_counts
from tdro_hpc.parallel.engine_state import check_fit, saved_buffers, stored_adam_state, stored_tensors
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

if TYPE_CHECKING:
    from tdro_hpc.encoders.backbone import Encoder


class TorchEngine:
    """Engine of one process or of data-parallel ones (parallel/engine.py says what each method owes).

    encoder   already on process.device; put into training mode here
    training  learning rate, schedule, AdamW and clipping
    """

    def __init__(self, encoder: "Encoder", process: Process, training: TrainingConfig) -> None:
        self.encoder, self.process, self.training = encoder.train(), process, training
        self.steps_done, self.chunked = 0, False
        self.optimizer = build_optimizer(encoder, training)
        # float16 gradients underflow unless the loss is scaled up; in every other type the scaler passes all through.
        scaling = encoder.config.autocast == "float16"
        self._scaler = torch.amp.GradScaler(process.device.type, enabled=scaling)
        self._said_skip = False
        self._embedder = _Embedder(encoder)
        self._parallel = _data_parallel(self._embedder) if process.data_size > 1 else None
        self._embedded: list[Tensor] = []  # of the embed that waits for its backward; under _parallel only
        self._replay = Replay(self, process.device)
        if process.first:
            print(f"optimiser: {describe_optimizer(self.optimizer)}")

    @property
    def learning_rate(self) -> float:
        """Rate of the newest optimiser step; before the first one, that of the first."""
        return learning_rate_at(max(0, self.steps_done - 1), self.training)

    @property
    def parameter_counts(self) -> tuple[int, int]:
        """(total, trained) parameters of the encoder."""
        return parameter_counts(self.encoder)

    def embed(self, parts: list[Tokens]) -> list[Tensor]:
        """Embeddings [rows, width] of each part, with gradient."""
        if self._parallel is None:
            return self._embedder(parts)
        # Whether this pass is the one that synchronises is known at its backward only: see there.
        with self._parallel.no_sync():
            self._embedded = self._parallel(parts)
        return self._embedded

    def embed_frozen(self, tokens: Tokens) -> Tensor:
        """Embeddings [rows, width] without gradient, dropout included."""
        with torch.no_grad():
            return self.encoder(tokens)

    def backward(self, loss: Tensor, *, synchronise: bool) -> None:
        """Add the gradients of `loss` []; with `synchronise` average over ranks what was added since the last step."""
        if self._parallel is not None:
            assert self._embedded, "backward without an embed before it"
            if synchronise:
                # What the wrapper itself does at the end of a forward outside no_sync: the gradient hooks of this
                # backward then reduce. Done here, the caller need not know at embed time which backward is the last.
                self._parallel.reducer.prepare_for_backward(list(self._embedded))
            self._embedded = []
        self._scaler.scale(loss).backward()

    def embed_chunks(self, chunks: list[Tokens]) -> list[Tensor]:
        """Embeddings [rows, width] of each chunk, without gradient."""
        return self._replay.embed_chunks(chunks)

    def backward_chunks(self, chunks: list[Tokens], gradients: list[Tensor], *, synchronise: bool) -> None:
        """Add the gradients of the same chunks. Only the last backward of each rank talks to the others."""
        self._replay.backward_chunks(chunks, gradients, synchronise=synchronise)

    def step(self) -> Tensor:
        """Clip, update, zero the gradients; returns their global L2 norm [] before clipping.

        Under float16 the first losses are often scaled up too far. Such a step leaves parameters and moments as they
        are and halves the scale; its norm is given as 0. The schedule goes on.
        """
        rate = learning_rate_at(self.steps_done, self.training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._scaler.unscale_(self.optimizer)
        parameters = [parameter for _, parameter in trained_parameters(self.encoder)]
        if self.training.max_grad_norm > 0:
            norm = nn.utils.clip_grad_norm_(parameters, self.training.max_grad_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return self._norm_of_skipped() if self._skipped(norm) else norm

    def _skipped(self, norm: Tensor) -> bool:
        """The scaler left out this step, and a smaller scale may mend it: under 1 the gradient itself is broken."""
        # Only float16 waits for the device here.
        return self._scaler.is_enabled() and not bool(norm.isfinite()) and self._scaler.get_scale() >= 1

    def _norm_of_skipped(self) -> Tensor:
        if not self._said_skip and self.process.first:
            print(
                f"step {self.steps_done}: the float16 gradients overflowed, so the step is left out and the loss scale "
                f"is now {self._scaler.get_scale():.0f}; usual in the first steps, and not said again"
            )
        self._said_skip = True
        return torch.zeros((), device=self.process.device)

    def state_dict(self) -> dict[str, Any]:
        """Trained parameters, buffers, Adam's moments and step counters, and the number of steps done.

        All ranks have the same, so the first one writes all tensors.
        """
        values = {"steps_done": self.steps_done, "scaler": self._scaler.state_dict()}
        if not self.process.first:
            return {"tensors": {}, "values": values}
        tensors = {f"parameter.{name}": parameter.detach() for name, parameter in trained_parameters(self.encoder)}
        tensors |= {f"buffer.{name}": buffer for name, buffer in saved_buffers(self.encoder)}
        names = {id(parameter): name for name, parameter in trained_parameters(self.encoder)}
        for parameter, fields in adam_state(self.optimizer).items():
            tensors |= {f"optimizer.{field}.{names[id(parameter)]}": value for field, value in fields.items()}
        return {"tensors": tensors, "values": values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, bit for bit.

        raises ValueError if the parameters are others than those of this encoder, or of other shapes
        """
        stored = stored_tensors(state)
        trained = trained_parameters(self.encoder)
        targets = {f"parameter.{name}": parameter.detach() for name, parameter in trained}
        targets |= {f"buffer.{name}": buffer for name, buffer in saved_buffers(self.encoder)}
        check_fit({name: target.shape for name, target in targets.items()}, stored)
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(stored[name])
        adam = {parameter: stored_adam_state(stored, name) for name, parameter in trained}
        set_adam_state(self.optimizer, {parameter: fields for parameter, fields in adam.items() if fields})
        self.steps_done = state["values"]["steps_done"]
        if state["values"]["scaler"]:  # empty where it was saved without float16
            self._scaler.load_state_dict(state["values"]["scaler"])


class _Embedder(nn.Module):
    """All parts of one backward in one forward: the data-parallel wrapper wants one forward before each backward."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        # torch warns on every rank when it finds no unread parameter although it was told to look for them.
        self.never_read = nn.Parameter(torch.zeros(1))

    def forward(self, parts: list[Tokens]) -> list[Tensor]:
        return [self.encoder(tokens) for tokens in parts]


def _data_parallel(embedder: _Embedder) -> DistributedDataParallel:
    # find_unused_parameters: some backbones carry a pooler that no pooling here reads. And without it the wrapper
    # regroups its buckets after the first step, so that sums over 4 ranks would differ in the last bit after a resume.
    return DistributedDataParallel(embedder, find_unused_parameters=True, gradient_as_bucket_view=True)
