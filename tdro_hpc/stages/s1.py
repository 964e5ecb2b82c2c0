"""Task weights: a proxy trained against the frozen reference of s0; only the weights are used afterwards."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from tdro_hpc.atomic import write_json, write_text
from tdro_hpc.config.schema import Config
from tdro_hpc.data.batches import Batch
from tdro_hpc.data.tasks import open_tasks
from tdro_hpc.dro.artefacts import check_percents, documents_of, percents_of, write_documents
from tdro_hpc.dro.reference import CachedReference, OnlineReference, ReferenceLosses, compute_reference_losses
from tdro_hpc.dro.weights import TaskWeights
from tdro_hpc.losses.gradcache import embed_parts
from tdro_hpc.parallel.build import build_frozen
from tdro_hpc.parallel.process import Process, wait_for_all
from tdro_hpc.stages.assembly import Training, assemble, data_of
from tdro_hpc.stages.graph import Stage
from tdro_hpc.training.metrics import read_rows
from tdro_hpc.training.step import DroStep, row_losses
from tdro_hpc.training.stop import Stopped, stop_flag

_HASHED_BYTES = 1 << 20  # read at a time: a model is not taken into memory whole to be hashed


def run(config: Config, stage: Stage, run_dir: Path, process: Process) -> None:
    """Learn alpha over the tasks; makes out/weights/*.json and out/model (the proxy)."""
    tasks, percents = open_tasks(data_of(config, run_dir)), percents_of(config.s1.top_percents)
    check_percents(percents, len(tasks))  # before the model is loaded, not after the training
    training = assemble(config, stage, config.s1, run_dir, process, weights=config.s1.weights, tasks=tasks)
    weights = TaskWeights(
        list(tasks),
        eta=config.s1.eta,
        measurement=config.s1.measurement,
        initial=None,
        ema=config.s1.ema,
        optimizer=config.s1.weight_optimizer,
        device=process.device,
    )
    reference = _reference(training)
    step = DroStep(training.engine, config.s1, config.loss, training.watch, weights=weights, reference=reference)
    training.run(step, weights=weights)
    if process.first:
        documents = documents_of(weights.current, weights.mean, weights.ema, training.sizes, percents)
        write_documents(documents, training.stage_dir / "out" / "weights")
        write_text(training.stage_dir / "out" / "summary.txt", _summary(training, weights))
    wait_for_all()


def _reference(training: Training) -> ReferenceLosses:
    if training.config.s1.reference_losses == "online":
        return OnlineReference(_ReferenceModel(training))
    folder = training.run_dir / "reference_losses" / _fingerprint(training)
    covered = folder / f"covered-{_digest(_batch_keys(training))}.json"
    if not covered.is_file():
        _compute(training, folder)
        if training.process.first:
            write_json(covered, _batch_keys(training))
        wait_for_all()
    return CachedReference(folder)


class _ReferenceModel:
    """The model of s0 in evaluation mode, on the same mesh as the proxy: batch -> row losses."""

    def __init__(self, training: Training) -> None:
        config, self.process = training.config, training.process
        folder = training.run_dir / "s0" / "out" / "model"
        self.model = build_frozen(config.model, config.parallel, self.process, folder=folder, seed=config.seed)
        self.training, self.loss = training.training, config.loss
        # In the chunks of the proxy, so that both losses of a row round alike.
        self.chunk_tokens = config.loss.chunk_tokens if config.loss.gradient_cache or training.engine.chunked else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        batch = batch.to(self.process.device)
        embeddings = embed_parts(self.model, [batch.query_tokens, batch.passage_tokens], self.chunk_tokens)
        return row_losses(embeddings, batch, self.training, self.loss)


def _compute(training: Training, folder: Path) -> None:
    steps, stage = training.training.steps, training.stage.name
    workers = training.config.data.loader_workers
    stop = stop_flag()
    done = compute_reference_losses(
        folder,
        training.batches.iterate(0, steps, num_workers=workers),
        _ReferenceModel(training),
        process=training.process,
        steps_per_file=training.training.log_every_steps,
        should_stop=stop.agreed,  # every rank has as many steps, so all ask at the same file boundary
        progress=lambda number: (
            training.metrics.say(f"{stage} reference losses {number}/{steps} steps")
            if training.metrics.first_rank
            else None
        ),
    )
    if not done:
        raise Stopped(stage, 0, steps, stop.reason or "another rank was asked to stop")


def _fingerprint(training: Training) -> str:
    """Name of the folder of reference losses: changes with the reference and with all that its loss depends on."""
    config = training.config
    model = training.run_dir / "s0" / "out" / "model"
    content = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        with open(path, "rb") as file:
            while block := file.read(_HASHED_BYTES):
                content.update(block)
    data = config.data
    keys = {
        "reference": content.hexdigest(),
        "model": asdict(config.model),
        "temperature": config.s1.temperature,
        "negatives": config.s1.negatives,
        "query_max_tokens": data.query_max_tokens,
        "passage_max_tokens": data.passage_max_tokens,
        "tasks": {name: asdict(task.config) for name, task in training.tasks.items()},
        "masks": [config.loss.mask_duplicates, config.loss.mask_known_positives, config.loss.false_negative_margin],
    }
    return _digest(keys)


def _batch_keys(training: Training) -> dict:
    """What decides which rows and passages s1 draws."""
    s1 = training.config.s1
    return {
        "seed": training.config.seed,
        "steps": s1.steps,
        "rows_per_micro_step": s1.queries_per_rank * training.process.data_size,
        "accumulation_steps": s1.accumulation_steps,
        "passages_per_query": s1.passages_per_query,
        "weights": s1.weights,
        "batching": s1.batching,
        "stratified": s1.stratified,
        "sizes": training.sizes,
    }


def _digest(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _summary(training: Training, weights: TaskWeights) -> str:
    """The learnt weights in words: a line a task, the greatest first, with the losses of the last interval."""
    last = read_rows(training.stage_dir / "metrics.jsonl")[-1]
    current = weights.current
    uniform = 1 / len(current)
    width = max(len(name) for name in current)
    lines = [
        f"Share of each task after {weights.updates} updates ({training.config.s1.measurement}); "
        f"uniform would be {uniform:.3f}.",
        f"{'task':{width}}  share  x uniform  proxy loss  reference loss",
    ]
    for name in sorted(current, key=lambda task: -current[task]):
        # No reference loss is in the rows where all of them were 0.
        proxy, reference = (last.get(key, {}).get(name) for key in ("task_loss", "task_reference_loss"))
        words = [f"{value:.4f}" if value is not None else "-" for value in (proxy, reference)]
        lines.append(
            f"{name:{width}}  {current[name]:.3f}  {current[name] / uniform:9.2f}  {words[0]:>10}  {words[1]:>14}"
        )
    more = [name for name in current if current[name] > 1.1 * uniform]
    less = [name for name in current if current[name] < 0.9 * uniform]
    lines.append(
        f"{len(more)} of {len(current)} tasks gained more than a tenth over uniform and {len(less)} lost as much:\n"
        "the proxy trails the reference most on the first ones, so s2 draws them more often."
    )
    return "\n".join(lines) + "\n"
