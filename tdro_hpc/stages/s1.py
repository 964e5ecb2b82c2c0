"""Task weights: a proxy trained against the frozen reference of s0; only the weights are used afterwards."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from tdro_hpc.atomic import write_json, write_text
from tdro_hpc.config.schema import Config
from tdro_hpc.data.batches import Batch
from tdro_hpc.dro.artefacts import documents_of, percents_of, top_of, write_documents
from tdro_hpc.dro.reference import CachedReference, OnlineReference, ReferenceLosses, compute_reference_losses
from tdro_hpc.dro.weights import TaskWeights
from tdro_hpc.encoders.backbone import load_encoder
from tdro_hpc.parallel.process import Process, any_rank, wait_for_all
from tdro_hpc.stages.assembly import Training, assemble
from tdro_hpc.stages.graph import Stage
from tdro_hpc.training.metrics import read_rows
from tdro_hpc.training.step import DroStep, row_losses
from tdro_hpc.training.stop import Stopped, stop_flag


def run(config: Config, stage: Stage, run_dir: Path, process: Process) -> None:
    """Learn alpha over the tasks; makes out/weights/*.json and out/model (the proxy)."""
    training = assemble(config, stage, config.s1, run_dir, process, weights=config.s1.weights)
    names, percents = list(training.tasks), percents_of(config.s1.top_percents)
    weights = TaskWeights(
        names,
        eta=config.s1.eta,
        measurement=config.s1.measurement,
        initial=None,
        ema=config.s1.ema,
        optimizer=config.s1.weight_optimizer,
        device=process.device,
    )
    for percent in percents:
        top_of(weights.current, percent)  # a percent that would keep no task is refused before the training, not after
    reference = _reference(training)
    step = DroStep(training.engine, config.s1, config.loss, training.watch, weights=weights, reference=reference)
    training.run(step, weights=weights)
    if process.data_rank == 0:
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
        if training.process.data_rank == 0:
            write_json(covered, _batch_keys(training))
        wait_for_all()
    return CachedReference(folder)


class _ReferenceModel:
    """The model of s0 in evaluation mode: batch -> row losses."""

    def __init__(self, training: Training) -> None:
        config, process = training.config, training.process
        folder = training.run_dir / "s0" / "out" / "model"
        self.encoder = load_encoder(config.model, folder=folder, device=process.device, seed=config.seed)
        self.encoder.eval().requires_grad_(False)
        self.training, self.loss, self.device = training.training, config.loss, process.device

    def __call__(self, batch: Batch):  # noqa: ANN204
        batch = batch.to(self.device)
        embeddings = [self.encoder(batch.query_tokens), self.encoder(batch.passage_tokens)]
        return row_losses(embeddings, batch, self.training, self.loss)


def _compute(training: Training, folder: Path) -> None:
    steps, stage = training.training.steps, training.stage.name
    workers = training.config.data.loader_workers
    stop = stop_flag()
    done = compute_reference_losses(
        folder,
        training.batches.iterate(0, steps, num_workers=workers),
        _ReferenceModel(training),
        data_rank=training.process.data_rank,
        steps_per_file=training.training.log_every_steps,
        should_stop=lambda: stop.requested,
        progress=lambda number: (
            training.metrics.say(f"{stage} reference losses {number}/{steps} steps")
            if training.metrics.first_rank
            else None
        ),
    )
    if any_rank(not done):
        raise Stopped(stage, 0, steps, stop.reason or "another rank was asked to stop")


def _fingerprint(training: Training) -> str:
    """Name of the folder of reference losses: changes with the reference and with all that its loss depends on."""
    config = training.config
    model = training.run_dir / "s0" / "out" / "model"
    content = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        content.update(path.read_bytes())
    data = config.data
    keys = {
        "reference": content.hexdigest(),
        "model": asdict(config.model),
        "temperature": config.s1.temperature,
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
        proxy, reference = (last[key].get(name) for key in ("task_loss", "task_reference_loss"))
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
