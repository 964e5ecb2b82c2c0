"""Reference retriever: every task with the weights of the config, homogeneous batches, cross-device negatives."""

from pathlib import Path

from tdro_hpc.config.schema import Config
from tdro_hpc.parallel.process import Process
from tdro_hpc.stages.assembly import assemble
from tdro_hpc.stages.graph import Stage
from tdro_hpc.training.step import ContrastiveStep


def run(config: Config, stage: Stage, run_dir: Path, process: Process) -> None:
    """Train the baseline that s1 measures against and s2 is compared with; makes out/model."""
    training = assemble(config, stage, config.s0, run_dir, process, weights=config.s0.weights)
    step = ContrastiveStep(training.engine, config.s0, config.loss, training.watch, num_tasks=len(training.tasks))
    training.run(step)
