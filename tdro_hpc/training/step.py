"""Micro-batches in, one optimiser step done. Two steps: contrastive (s0, s2) and tDRO (s1)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tdro_hpc.config.schema import LossConfig, TrainingConfig
from tdro_hpc.data.batches import Batch
from tdro_hpc.dro.measurement import task_sums
from tdro_hpc.dro.reference import ReferenceLosses
from tdro_hpc.dro.weights import TaskWeights
from tdro_hpc.losses.gradcache import cached_backward
from tdro_hpc.losses.score_block import ScoreBlock, build_score_block
from tdro_hpc.parallel.engine import Engine
from tdro_hpc.training.finite import FiniteWatch
from tdro_hpc.training.metrics import StepValues


def row_losses(embeddings: list[Tensor], batch: Batch, training: TrainingConfig, loss: LossConfig) -> Tensor:
    """InfoNCE of every row under the stage's negatives policy.

    embeddings  queries [rows, width] and passages [rows * passages_per_query, width], float32
    returns     [rows] float32, nats
    """
    return _score_block(embeddings, batch, training, loss).row_losses()


def _score_block(embeddings: list[Tensor], batch: Batch, training: TrainingConfig, loss: LossConfig) -> ScoreBlock:
    queries, passages = embeddings
    return build_score_block(
        queries, passages, batch, negatives=training.negatives, temperature=training.temperature, loss=loss
    )


@dataclass
class _MicroStep:
    """Embeds one micro-batch and back-propagates the loss that `summed` makes of its scores."""

    engine: Engine
    training: TrainingConfig
    loss: LossConfig

    def backward(
        self, batch: Batch, summed: Callable[[ScoreBlock], tuple[Tensor, Tensor]], *, synchronise: bool
    ) -> Tensor:
        """Row losses [rows], detached, after the backward pass.

        summed   called once: scores -> the loss [], and the row losses [rows], detached
        """
        rows: list[Tensor] = []

        def loss_of(embeddings: list[Tensor]) -> Tensor:
            total, losses = summed(_score_block(embeddings, batch, self.training, self.loss))
            rows.append(losses)
            return total

        parts = [batch.query_tokens, batch.passage_tokens]
        if self.loss.gradient_cache or self.engine.chunked:
            cached_backward(self.engine, parts, self.loss.chunk_tokens, loss_of, synchronise=synchronise)
        else:
            self.engine.backward(loss_of(self.engine.embed(parts)), synchronise=synchronise)
        assert len(rows) == 1, "the loss runs once a micro-step"
        return rows[0]


class ContrastiveStep:
    """s0 and s2: the mean row loss; under loss reweighting each row counts num_tasks * alpha of its task."""

    def __init__(
        self,
        engine: Engine,
        training: TrainingConfig,
        loss: LossConfig,
        watch: FiniteWatch,
        *,
        num_tasks: int,
        task_factors: Tensor | None = None,
    ) -> None:
        self.engine, self.training, self.watch, self.num_tasks = engine, training, watch, num_tasks
        even = torch.ones(num_tasks, device=engine.process.device)
        self.task_factors = even if task_factors is None else task_factors  # [tasks] factor on the loss of a row
        self.micro_step = _MicroStep(engine, training, loss)

    @property
    def learning_rate(self) -> float:
        return self.engine.learning_rate

    def __call__(self, number: int, batches: list[Batch]) -> StepValues:
        on_device = [batch.to(self.engine.process.device) for batch in batches]
        losses = []
        for position, batch in enumerate(on_device):
            last = position == len(batches) - 1
            row_weights = self.task_factors[batch.task_ids] / (len(batch.task_ids) * len(batches))
            # Known before the losses are, so the gradient is formed together with them.
            summed = partial(ScoreBlock.weighted, row_weights=row_weights)
            losses.append(self.micro_step.backward(batch, summed, synchronise=last))
        grad_norm = self.engine.step()
        all_losses = torch.cat(losses)
        self.watch.add(number + 1, all_losses, batches, grad_norm)
        task_ids = torch.cat([batch.task_ids for batch in on_device])
        sums = task_sums(all_losses, torch.zeros_like(all_losses), task_ids, self.num_tasks)
        return StepValues(task_sums=sums, grad_norm=grad_norm)


class DroStep:
    """s1: measure proxy against reference, move alpha, then step the proxy on the alpha-weighted loss.

    With several micro-steps the weights move at the last one, as in the released code: the micro-steps before it are
    weighted with the former alpha. The loss is sum(alpha * loss) / sum(alpha) over the rows of all ranks.
    """

    def __init__(
        self,
        engine: Engine,
        training: TrainingConfig,
        loss: LossConfig,
        watch: FiniteWatch,
        *,
        weights: TaskWeights,
        reference: ReferenceLosses,
    ) -> None:
        self.engine, self.training, self.watch = engine, training, watch
        self.weights, self.reference = weights, reference
        self.micro_step = _MicroStep(engine, training, loss)

    @property
    def learning_rate(self) -> float:
        return self.engine.learning_rate

    def __call__(self, number: int, batches: list[Batch]) -> StepValues:
        on_device = [batch.to(self.engine.process.device) for batch in batches]
        losses, references = [], []
        for position, batch in enumerate(on_device):
            last = position == len(batches) - 1
            reference_losses = self.reference.losses(batch)

            def summed(
                block: ScoreBlock, batch: Batch = batch, reference: Tensor = reference_losses, last: bool = last
            ) -> tuple[Tensor, Tensor]:
                rows = block.row_losses()
                self.weights.accumulate(rows, reference, batch.task_ids)
                if last:
                    self.weights.update()
                return self._weighted_mean(rows, batch) / len(batches), rows.detach()

            losses.append(self.micro_step.backward(batch, summed, synchronise=last))
            references.append(reference_losses)
        grad_norm = self.engine.step()
        all_losses, task_ids = torch.cat(losses), torch.cat([batch.task_ids for batch in on_device])
        all_references = torch.cat(references)
        self.watch.add(number + 1, all_losses, batches, grad_norm, reference_losses=all_references)
        return StepValues(
            task_sums=task_sums(all_losses, all_references, task_ids, len(self.weights.task_names)),
            grad_norm=grad_norm,
            alpha=self.weights.alpha.clone(),
            gradient=self.weights.gradient,
        )

    def _weighted_mean(self, rows: Tensor, batch: Batch) -> Tensor:
        alpha = self.weights.alpha
        # Gradients are averaged over ranks, so each rank divides by the mean of the ranks' sums of alpha. The counts of
        # the global micro-batch come with the batch: no communication.
        total = (alpha * batch.global_task_counts).sum() / self.engine.process.data_size
        return (alpha[batch.task_ids] * rows).sum() / total
