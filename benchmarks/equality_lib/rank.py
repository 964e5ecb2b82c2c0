"""What one rank computes: STEPS contrastive steps and DRO_STEPS of tDRO of every model, and what came out of them."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from equality_lib.cases import (
    ALONE,
    CHUNK_TOKENS,
    DRO_STEPS,
    LAYOUTS,
    STEPS,
    TASKS,
    TRAINING,
    KnownLosses,
    batch_of,
    model_of,
)
from tdro_hpc.config.schema import LossConfig, ModelConfig, ParallelConfig
from tdro_hpc.dro.weights import TaskWeights
from tdro_hpc.parallel.build import build_engine
from tdro_hpc.parallel.engine import Engine
from tdro_hpc.parallel.gather import gather_values
from tdro_hpc.parallel.process import Process, end_process, start_process, wait_for_all
from tdro_hpc.training.checkpoint import ENGINE, save_checkpoint
from tdro_hpc.training.finite import FiniteWatch
from tdro_hpc.training.step import ContrastiveStep, DroStep

LOSS = LossConfig(gradient_cache=True, chunk_tokens=CHUNK_TOKENS)
TASK_NAMES = [f"task{number}" for number in range(TASKS)]


class _Kept(FiniteWatch):
    """The row losses of every step."""

    def __init__(self, process: Process) -> None:
        super().__init__(TASK_NAMES, process.device)
        self.losses: list[torch.Tensor] = []

    def add(self, step: int, losses: torch.Tensor, *rest: object, **more: object) -> None:
        self.losses.append(gather_values(losses))


def train(model: ModelConfig, parallel: ParallelConfig, process: Process, folder: Path) -> None:
    """Write results.json, vectors.safetensors and the checkpoints after the first and the last contrastive step."""
    engine: Engine = build_engine(model, parallel, process, TRAINING, seed=1)
    watch = _Kept(process)
    vectors = torch.cat([gather_values(side) for side in _first_vectors(engine)])
    step = ContrastiveStep(engine, TRAINING, LOSS, watch, num_tasks=TASKS)
    norms = []
    for number in range(STEPS):
        norms.append(float(step(number, [batch_of(number, process.data_rank, process.data_size)]).grad_norm))
        if number in (0, STEPS - 1):
            save_checkpoint(folder / "checkpoints", number + 1, {ENGINE: engine}, keep=2)
    weights = TaskWeights(TASK_NAMES, eta=0.5, measurement="ratio_of_means", device=process.device)
    dro = DroStep(engine, TRAINING, LOSS, watch, weights=weights, reference=KnownLosses())
    alphas = []
    for number in range(STEPS, STEPS + DRO_STEPS):
        dro(number, [batch_of(number, process.data_rank, process.data_size)])
        alphas.append(weights.alpha.tolist())
    if process.first:
        save_file({"vectors": vectors.contiguous()}, folder / "vectors.safetensors")
        results = {"losses": torch.stack(watch.losses).tolist(), "norms": norms, "alphas": alphas}
        (folder / "results.json").write_text(json.dumps(results))
    wait_for_all()


def _first_vectors(engine: Engine) -> list[torch.Tensor]:
    """Embeddings of the queries and of the passages of the first batch before any step."""
    batch = batch_of(0, engine.process.data_rank, engine.process.data_size)
    return engine.embed_chunks([batch.query_tokens, batch.passage_tokens])


def main(layout: str, precision: str, cases: str, out: str, rank: int, rendezvous: str) -> None:
    """All cases (architecture/variant, comma separated) of one layout in one launch."""
    chosen = LAYOUTS.get(layout, ALONE)
    process = start_process(
        chosen.parallel, rank=rank, world=chosen.world, local_rank=rank, rendezvous=rendezvous, meshed=True
    )
    for case in cases.split(","):
        folder = Path(out, layout, case)
        folder.mkdir(parents=True, exist_ok=True)
        wait_for_all()
        train(model_of(*case.split("/"), precision), chosen.parallel, process, folder)
    Path(out, layout, f"done-{rank}").touch()
    end_process()


if __name__ == "__main__":
    main(*sys.argv[1:5], rank=int(sys.argv[5]), rendezvous=sys.argv[6])
