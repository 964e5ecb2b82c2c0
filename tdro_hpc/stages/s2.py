"""Robust retriever: trained as s0, from the base model, with the task weights that s1 learnt."""

from pathlib import Path

import torch

from tdro_hpc.config.schema import Config
from tdro_hpc.data.mixture import weights_of
from tdro_hpc.parallel.process import Process
from tdro_hpc.stages.assembly import assemble, weights_path
from tdro_hpc.stages.graph import Stage, s2_variants, variant_label
from tdro_hpc.training.step import ContrastiveStep


def run(config: Config, stage: Stage, run_dir: Path, process: Process) -> None:
    """Train one model with one weight choice, by sampling (default) or by loss reweighting; makes out/model."""
    choices = {f"s2-{variant_label(choice)}": choice for choice in s2_variants(config)}
    weights = weights_path(run_dir, choices[stage.name])
    by_loss = config.s2.transfer == "loss"
    training = assemble(config, stage, config.s2, run_dir, process, weights="uniform" if by_loss else weights)
    factors = None
    if by_loss:
        sizes = list(training.sizes.values())
        shares = weights_of(weights, list(training.tasks), sizes)
        # k * alpha: uniform weights leave the loss as it is. Source: arXiv 2408.10613, loss reweighting ablation.
        factors = torch.tensor(len(sizes) * shares, dtype=torch.float32, device=process.device)
    step = ContrastiveStep(
        training.engine,
        config.s2,
        config.loss,
        training.watch,
        num_tasks=len(training.tasks),
        task_factors=factors,
    )
    training.run(step)
