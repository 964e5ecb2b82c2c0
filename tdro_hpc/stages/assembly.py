"""What s0, s1 and s2 are put together from: data, encoder, engine, metrics. A stage file then reads like a recipe."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tdro_hpc.atomic import new_folder
from tdro_hpc.config.schema import Config, DataConfig, TrainingConfig
from tdro_hpc.data.batches import Batch, Batches
from tdro_hpc.data.mixture import Mixture, weights_of
from tdro_hpc.data.tasks import Task, open_tasks
from tdro_hpc.encoders.export import RenamedTensors, write_model
from tdro_hpc.encoders.saving import save_encoder
from tdro_hpc.encoders.tokenization import TextTokenizer, load_tokenizer
from tdro_hpc.parallel.build import build_engine
from tdro_hpc.parallel.engine import Engine
from tdro_hpc.parallel.process import Process, wait_for_all
from tdro_hpc.parallel.torch_engine import TorchEngine
from tdro_hpc.stages.graph import Stage
from tdro_hpc.training.checkpoint import ENGINE, Part, checkpoint_folder, open_checkpoint
from tdro_hpc.training.finite import FiniteWatch
from tdro_hpc.training.loop import Loop, Step, run_loop
from tdro_hpc.training.metrics import Metrics
from tdro_hpc.training.stop import stop_flag


def data_of(config: Config, run_dir: Path) -> DataConfig:
    """The data section, with the folder that stage prepare filled where the data set is built on the spot."""
    if config.data.builder and not config.data.dir:
        return dataclasses.replace(config.data, dir=str(run_dir / "prepare" / "out" / "data" / "train"))
    return config.data


def weights_path(run_dir: Path, choice: str) -> str:
    """The weights JSON of an s2 choice: a file of s1, or the file that the choice names."""
    if choice.endswith(".json"):
        return choice
    return str(run_dir / "s1" / "out" / "weights" / f"{choice}_weights.json")


@dataclass
class Training:
    """The parts of a training stage, made in the order of the data flow."""

    config: Config
    stage: Stage
    training: TrainingConfig
    run_dir: Path
    process: Process
    tasks: dict[str, Task]
    mixture: Mixture
    tokenizer: TextTokenizer
    batches: Batches
    engine: Engine
    metrics: Metrics
    watch: FiniteWatch

    @property
    def stage_dir(self) -> Path:
        return self.run_dir / self.stage.name

    @property
    def _has_time_limit(self) -> bool:
        return self.config.cluster.executor == "slurm"

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of every task, by name."""
        return {name: len(task) for name, task in self.tasks.items()}

    def read(self, first_step: int) -> Iterator[list[Batch]]:
        """Micro-batches of each step from `first_step` to the end, read ahead by loader processes."""
        workers = self.config.data.loader_workers
        return self.batches.iterate(first_step, self.training.steps - first_step, num_workers=workers)

    def run(self, step: Step, **more_state: Part) -> None:
        """Hand the step to the one loop, then save the model."""
        loop = Loop(
            stage=self.stage.name,
            stage_dir=self.stage_dir,
            training=self.training,
            seed=self.config.seed,
            process=self.process,
            parts={"engine": self.engine, "mixture": _MixtureState(self), "metrics": self.metrics, **more_state},
            metrics=self.metrics,
            watch=self.watch,
            stop=stop_flag(),
            describe_row=lambda task, row: f"row {row} of {self.tasks[task].path}",
            stop_lead_seconds=self.config.cluster.stop_lead_seconds if self._has_time_limit else 0.0,
        )
        run_loop(loop, step, self.read)
        if self.process.first:
            with new_folder(self.stage_dir / "out" / "model") as folder:
                self._save_model(folder)
        wait_for_all()

    def _save_model(self, folder: Path) -> None:
        if isinstance(self.engine, TorchEngine):
            save_encoder(self.engine.encoder, self.tokenizer, folder)
            return
        # No rank has the whole model: it is put together from the parts that all ranks have just saved.
        checkpoint = open_checkpoint(checkpoint_folder(self.stage_dir / "checkpoints", self.training.steps))
        tensors = checkpoint.tensors(ENGINE)
        names = {name.removeprefix("parameter."): name for name in tensors.keys() if name.startswith("parameter.")}
        write_model(self.config.model, self.tokenizer, RenamedTensors(tensors, names), folder)


def assemble(
    config: Config,
    stage: Stage,
    training: TrainingConfig,
    run_dir: Path,
    process: Process,
    *,
    weights: str,
    tasks: dict[str, Task] | None = None,
) -> Training:
    """Open the data, load the encoder from config.model and wrap it for training.

    weights  how tasks are drawn: uniform, size, temperature:<exponent>, or a weights JSON
    tasks    those of data_of(config, run_dir), where the stage has opened them already
    """
    data = data_of(config, run_dir)
    tasks = open_tasks(data) if tasks is None else tasks
    mixture = _mixture_of(tasks, weights, training, process, seed=config.seed)
    tokenizer = load_tokenizer(config.model)
    batches = Batches(
        tasks,
        mixture,
        tokenizer,
        data,
        training,
        data_rank=process.data_rank,
        data_size=process.data_size,
        seed=config.seed,
    )
    engine = build_engine(config.model, config.parallel, process, training, seed=config.seed)
    metrics = Metrics(
        run_dir / stage.name,
        stage=stage.name,
        steps=training.steps,
        task_names=list(tasks),
        queries_per_step=training.queries_per_rank * training.accumulation_steps * process.data_size,
        first_rank=process.first,
        tensorboard=config.logging.tensorboard,
    )
    _say_start(stage, tasks, engine, metrics)
    return Training(
        config=config,
        stage=stage,
        training=training,
        run_dir=run_dir,
        process=process,
        tasks=tasks,
        mixture=mixture,
        tokenizer=tokenizer,
        batches=batches,
        engine=engine,
        metrics=metrics,
        watch=FiniteWatch(list(tasks), process.device),
    )


def _mixture_of(
    tasks: dict[str, Task], weights: str, training: TrainingConfig, process: Process, *, seed: int
) -> Mixture:
    sizes = [len(task) for task in tasks.values()]
    return Mixture(
        sizes,
        weights_of(weights, list(tasks), sizes).tolist(),
        rows_per_micro_step=training.queries_per_rank * process.data_size,
        micro_steps=training.accumulation_steps,
        batching=training.batching,
        stratified=training.stratified,
        seed=seed,
    )


@dataclass
class _MixtureState:
    """The position in the mixture after the engine's last step, as a part of the checkpoint."""

    owner: Training

    def state_dict(self) -> dict:
        return {"tensors": {}, "values": self.owner.mixture.state(self.owner.engine.steps_done)}

    def load_state_dict(self, state: dict) -> None:
        self.owner.mixture.load_state(state["values"])


def _say_start(stage: Stage, tasks: dict[str, Task], engine: Engine, metrics: Metrics) -> None:
    if not metrics.first_rank:
        return
    total, trainable = engine.parameter_counts
    rows = sum(len(task) for task in tasks.values())
    metrics.say(f"{stage.name} {len(tasks)} tasks, {rows:,} rows | {trainable:,} of {total:,} parameters are trained")
    for name, task in tasks.items():
        if task.skipped_rows:
            metrics.say(f"{stage.name} task {name}: {task.skipped_rows} bad rows are left out (data.on_bad_row=skip)")
