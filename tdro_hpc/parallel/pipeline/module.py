"""A part of an encoder as DeepSpeed's pipeline takes it. Imported only after deepspeed_setup.py has started DeepSpeed.

DeepSpeed moves hidden states and their gradients between the parts, one chunk forward and one backward by turns. The
tokens of a chunk do not travel, so each part is told of the chunks before the pass begins.
"""

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceGrads, ReduceTiedGrads, TrainSchedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from tdro_hpc.data.tokens import Tokens
from tdro_hpc.parallel.pipeline.layers import EncoderPart
from tdro_hpc.parallel.process import Process


class PartModule(PipelineModule):
    """The part of this rank; every rank of the pipeline has one."""

    def __init__(self, part: EncoderPart, process: Process) -> None:
        parts = [LayerSpec(nn.Identity) for _ in range(process.pipeline_size)]  # those of other ranks are never made
        parts[process.pipeline_rank] = part
        super().__init__(
            layers=parts,
            topology=PipeModelDataParallelTopology(
                num_pp=process.pipeline_size, num_mp=process.tensor_size, num_dp=process.data_size
            ),
            loss_fn=surrogate,
            partition_method="uniform",
            dynamic_shape=True,
        )
        self.part = [part]  # in a list: a module has each parameter once
        self._chunks: Iterator[Tokens] = iter(())

    def begin(self, chunks: list[Tokens]) -> None:
        """Say what comes through next. A part sees the chunks in this order, whatever is under way behind them."""
        self._chunks = iter(chunks)

    def forward(self, entering: Tensor) -> Tensor:
        (part,) = self.part
        return part(entering, part.inputs(next(self._chunks)))


class PassSchedule(TrainSchedule):
    """Forward and backward of some chunks, without the reduction and the step that a training schedule ends with."""

    def steps(self) -> Iterator[list[Any]]:
        """Instructions of one time step after the other."""
        for instructions in super().steps():
            yield [
                known for known in instructions if not isinstance(known, ReduceTiedGrads | ReduceGrads | OptimizerStep)
            ]


def surrogate(embeddings: Tensor, gradients: Tensor) -> Tensor:
    """The scalar whose gradient in the embeddings is `gradients`."""
    return (embeddings * gradients).sum()


def backward_pass(engine: Any, chunks: list[Tokens], gradients: list[Tensor]) -> None:
    """Add the parameters' gradients of the sum over chunks of (embedding * gradient).sum(), on this rank only.

    engine     DeepSpeed's pipeline engine of a PartModule
    gradients  [rows, width] of each chunk
    """
    engine.module.begin(chunks)
    engine.total_loss, engine._compute_loss = None, True
    # The first part takes a tensor from here that it does not look at, the last one the gradients.
    engine.set_dataiterator(iter([(torch.empty(0), gradient) for gradient in gradients]))
    engine._exec_schedule(PassSchedule(micro_batches=len(chunks), stages=engine.num_stages, stage_id=engine.stage_id))
