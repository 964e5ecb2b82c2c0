"""The run's files in, what a model card says of the tasks out. What is not on this machine any more stays unknown."""

import logging
from pathlib import Path
from typing import Any

from tdro_hpc.config.schema import Config, TaskConfig
from tdro_hpc.data.mixture import weights_of
from tdro_hpc.data.tasks import describe_tasks, open_tasks
from tdro_hpc.launch.record import DONE, read_json
from tdro_hpc.report.card import TaskFacts
from tdro_hpc.report.licences import NOT_STATED, licence_of
from tdro_hpc.stages.assembly import data_of, weights_path
from tdro_hpc.stages.graph import s2_variants, variant_label

logger = logging.getLogger(__name__)


def describe_data(config: Config, run_dir: Path) -> dict[str, TaskConfig]:
    """Name -> description of the tasks that a stage was trained on; those of the config where the data is gone."""
    try:
        return describe_tasks(data_of(config, run_dir))
    except (OSError, ValueError) as error:
        logger.warning("the model card has only the tasks that the config names: %s", _first_line(error))
        return dict(config.data.tasks)


def longest_text(config: Config, tasks: dict[str, TaskConfig]) -> int:
    """Tokens of the longest text that training could see, end token included."""
    data = config.data
    own = [limit for task in tasks.values() for limit in (task.query_max_tokens, task.passage_max_tokens)]
    return max(data.query_max_tokens, data.passage_max_tokens, *own)


def task_facts(config: Config, stage: str, run_dir: Path, tasks: dict[str, TaskConfig]) -> list[TaskFacts]:
    """One line of the card for every task: rows, its share of what `stage` drew, and the weight that s1 learnt."""
    learnt = _learnt(run_dir) if stage.startswith(("s1", "s2")) else {}
    sizes = learnt.get("size") or _sizes(config, run_dir, tasks)
    shares = _shares(config, stage, run_dir, sizes)
    alpha = learnt.get("domain_weights", {})
    return [
        TaskFacts(
            name=name,
            rows=sizes.get(name, 0),
            share=shares.get(name),
            alpha=alpha.get(name),
            language=task.language,
        )
        for name, task in tasks.items()
    ]


def _learnt(run_dir: Path) -> dict[str, Any]:
    """Content of the weights file of a finished s1; {} where there is none."""
    if not (run_dir / "s1" / DONE).is_file():
        return {}
    return read_json(run_dir / "s1" / "out" / "weights" / "curr_weights.json") or {}


def _sizes(config: Config, run_dir: Path, tasks: dict[str, TaskConfig]) -> dict[str, int]:
    """Rows of every task, by opening them; the published ones where they are not here."""
    try:
        return {name: len(task) for name, task in open_tasks(data_of(config, run_dir)).items()}
    except (OSError, ValueError) as error:
        logger.warning("the model card has only the published numbers of rows: %s", _first_line(error))
        return {name: task.rows for name, task in tasks.items() if task.rows}


def _shares(config: Config, stage: str, run_dir: Path, sizes: dict[str, int]) -> dict[str, float]:
    """Share of each task in what a stage drew; {} where it cannot be told."""
    kind = stage.split("-")[0]
    choice = getattr(config, kind).weights
    if kind == "s2":
        choices = {f"s2-{variant_label(choice)}": choice for choice in s2_variants(config)}
        choice = "uniform" if config.s2.transfer == "loss" else weights_path(run_dir, choices[stage])
    if not sizes:
        return {}
    try:
        return dict(zip(sizes, weights_of(choice, list(sizes), list(sizes.values())).tolist(), strict=True))
    except ValueError as error:
        logger.warning("the model card has no shares: %s", _first_line(error))
        return {}


def licence_of_data(config: Config, run_dir: Path) -> str:
    """What the folder of the tasks states; of a data set on the hub, where to look."""
    data = data_of(config, run_dir)
    if data.dir:
        return licence_of(Path(data.dir).expanduser())
    return f"{NOT_STATED} here; see the data set {data.hub} on the hub" if data.hub else NOT_STATED


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
