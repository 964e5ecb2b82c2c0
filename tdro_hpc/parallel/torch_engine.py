"""An encoder, its optimiser and its learning rate on one process, or on several under DistributedDataParallel."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tdro_hpc.config.schema import TrainingConfig
from tdro_hpc.data.tokens import Tokens
from tdro_hpc.encoders.lora import parameter_counts
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
        parameters = [parameter for _, parameter in _trained(self.encoder)]
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
        """Trained parameters, buffers, Adam's moments and step counters, and the number of steps done."""
        tensors = {f"parameter.{name}": parameter.detach() for name, parameter in _trained(self.encoder)}
        tensors |= {f"buffer.{name}": buffer for name, buffer in _buffers(self.encoder)}
        names = {id(parameter): name for name, parameter in _trained(self.encoder)}
        for parameter, fields in self.optimizer.state.items():
            tensors |= {f"optimizer.{field}.{names[id(parameter)]}": value for field, value in fields.items()}
        return {"tensors": tensors, "values": {"steps_done": self.steps_done, "scaler": self._scaler.state_dict()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, bit for bit.

        raises ValueError if the parameters are others than those of this encoder, or of other shapes
        """
        tensors: dict[str, Tensor] = state["tensors"]
        targets = {f"parameter.{name}": parameter.detach() for name, parameter in _trained(self.encoder)}
        targets |= {f"buffer.{name}": buffer for name, buffer in _buffers(self.encoder)}
        _check_names(targets, tensors)
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(tensors[name])
        document = self.optimizer.state_dict()
        document["state"] = self._optimizer_fields(tensors)
        self.optimizer.load_state_dict(document)
        self.steps_done = state["values"]["steps_done"]
        self._scaler.load_state_dict(state["values"]["scaler"])

    def _optimizer_fields(self, tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """Optimiser state by the number of the parameter, as torch's optimisers count them."""
        names = {id(parameter): name for name, parameter in _trained(self.encoder)}
        ordered = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        fields: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, field, name = key.split(".", 2)
                fields.setdefault(name, {})[field] = value.clone()
        return {number: fields[name] for number, name in enumerate(ordered) if name in fields}


class _Embedder(nn.Module):
    """All parts of one backward in one forward: the data-parallel wrapper wants one forward before each backward."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        # torch warns on every rank when it finds no unread parameter although it was told to look for them.
        self.never_read = nn.Parameter(torch.zeros(1))

    def forward(self, parts: list[Tokens]) -> list[Tensor]:
        return [self.encoder(tokens) for tokens in parts]


def build_optimizer(encoder: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trained parameters; weight decay on matrices only, not on biases and norm weights.

    raises ValueError if no parameter is trained
    """
    trained = [parameter for _, parameter in _trained(encoder)]
    if not trained:
        raise ValueError("No parameter of the encoder is trained. Set model.lora.enabled=false to train all of them.")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )


def _data_parallel(embedder: _Embedder) -> DistributedDataParallel:
    # find_unused_parameters: some backbones carry a pooler that no pooling here reads. And without it the wrapper
    # regroups its buckets after the first step, so that sums over 4 ranks would differ in the last bit after a resume.
    return DistributedDataParallel(embedder, find_unused_parameters=True, gradient_as_bucket_view=True)


def _trained(encoder: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in encoder.named_parameters() if parameter.requires_grad]


def _buffers(encoder: nn.Module) -> list[tuple[str, Tensor]]:
    saved = encoder.state_dict().keys()  # leaves out the buffers that are rebuilt from the config
    return [(name, buffer) for name, buffer in encoder.named_buffers() if name in saved]


def _check_names(targets: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    found = {name for name in tensors if not name.startswith("optimizer.")}
    wrong = sorted(found ^ targets.keys())
    wrong += [name for name in sorted(found & targets.keys()) if tensors[name].shape != targets[name].shape]
    if wrong:
        raise ValueError(
            f"The checkpoint does not fit this encoder: {len(wrong)} tensors are missing, superfluous or of another "
            f"shape, among them {', '.join(wrong[:3])}. Was it made with other model.* values? Use those again, or "
            "remove the stage's checkpoints to start anew."
        )
