"""Keys of a run in, the engine and the frozen model that they ask for out. DeepSpeed is imported where it is used."""

from pathlib import Path

from tdro_hpc.config.schema import ModelConfig, ParallelConfig, TrainingConfig
from tdro_hpc.encoders.backbone import load_encoder
from tdro_hpc.parallel.engine import Engine, FrozenModel
from tdro_hpc.parallel.frozen import freeze
from tdro_hpc.parallel.process import Process
from tdro_hpc.parallel.torch_engine import TorchEngine


def build_engine(
    model: ModelConfig, parallel: ParallelConfig, process: Process, training: TrainingConfig, *, seed: int
) -> Engine:
    """The model of model.name, ready to be trained on the mesh of `process`.

    seed    of a new LoRA adapter
    raises  ValueError when the model is not there, or cannot be trained in this layout
    """
    if process.pipeline_size * process.tensor_size > 1:
        from tdro_hpc.parallel.pipeline.engine import PipelineEngine

        return PipelineEngine(model, process, training, parallel, seed=seed)
    encoder = load_encoder(model, device=process.device, seed=seed)
    if parallel.engine == "torch":
        return TorchEngine(encoder, process, training)
    from tdro_hpc.parallel.zero.engine import ZeroEngine

    return ZeroEngine(encoder, process, training, parallel)


def build_frozen(
    model: ModelConfig, parallel: ParallelConfig, process: Process, *, folder: Path, seed: int
) -> FrozenModel:
    """The saved model of `folder` on the mesh of `process`, to embed with.

    seed    of nothing but the loading: every weight comes from files
    raises  as `build_engine`
    """
    if process.pipeline_size * process.tensor_size > 1:
        from tdro_hpc.parallel.pipeline.forward import FrozenPipeline

        return FrozenPipeline(model, process, folder=folder, seed=seed)
    return freeze(load_encoder(model, folder=folder, device=process.device, seed=seed), process, parallel)
