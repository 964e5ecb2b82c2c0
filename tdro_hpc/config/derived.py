"""A config in, the figures that follow from it out, as equations in the words of its keys. Worked out nowhere else.

Pure but for parameter counts, which come from the headers of model files on this machine.
"""

from tdro_hpc.config.checks import labels_of_s2
from tdro_hpc.config.fitting import memory_equation
from tdro_hpc.config.layouts import data_ranks, layout_equation, replica_ranks
from tdro_hpc.config.memory import size_words
from tdro_hpc.config.model_size import trained_parameters
from tdro_hpc.config.resources import ranks_of_job, ranks_per_node, resource_lines
from tdro_hpc.config.schema import Config, TrainingConfig

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def ranks_of(config: Config, stage_ranks: str = "all") -> int:
    """Number of processes of a stage.

    stage_ranks   all = every rank of the cluster profile; one = a single process
    """
    assert stage_ranks in ("all", "one"), f"ranks of a stage are all or one, not {stage_ranks}"
    return 1 if stage_ranks == "one" else ranks_of_job(config.cluster)


def ranks_equation(config: Config) -> str:
    """Processes of a stage that runs on all ranks."""
    per_node, key = ranks_per_node(config.cluster)
    return f"ranks {ranks_of(config):,} = {_counted(config.cluster.nodes, 'node')} x {per_node:,} {key}"


def queries_per_step(section: TrainingConfig, ranks: int) -> int:
    """Queries of one optimiser step; `ranks` here and below are those that read different rows."""
    return ranks * section.queries_per_rank * section.accumulation_steps


def batch_equation(config: Config, section: TrainingConfig, ranks: int) -> str:
    """Queries of one optimiser step and what is multiplied; the size of a forward chunk under gradient_cache."""
    text = (
        f"queries per step {queries_per_step(section, ranks):,} = {_ranks_words(config, ranks)} x "
        f"{section.queries_per_rank:,} queries_per_rank x {section.accumulation_steps:,} accumulation_steps"
    )
    if embeds_in_chunks(config):
        text += f" (a rank embeds {config.loss.chunk_tokens:,} chunk_tokens at a time)"
    return text


def samples_equation(section: TrainingConfig, ranks: int) -> str:
    """Queries that the whole stage draws."""
    a_step = queries_per_step(section, ranks)
    return f"queries in all {section.steps * a_step:,} = {section.steps:,} steps x {a_step:,} queries per step"


def negatives_per_query(section: TrainingConfig, ranks: int) -> int:
    """Negatives of one query before masks; under policy `task` in a mixed batch, the most there can be."""
    queries = {"group": 1, "world": ranks * section.queries_per_rank}.get(section.negatives, section.queries_per_rank)
    return queries * section.passages_per_query - 1


def negatives_equation(config: Config, section: TrainingConfig, ranks: int) -> str:
    """Negatives of one query, what is multiplied, and where they come from."""
    a_query = f"{section.passages_per_query:,} passages_per_query"
    a_rank = f"{section.queries_per_rank:,} queries_per_rank"
    product, place = {
        "group": (a_query, "its own hard negatives"),
        "batch": (f"{a_rank} x {a_query}", "own and in-batch, this rank"),
        "task": (f"{a_rank} x {a_query}", "own and in-batch of the same task, this rank"),
        "world": (f"{_ranks_words(config, ranks)} x {a_rank} x {a_query}", "own and in-batch, all ranks"),
    }[section.negatives]
    if section.accumulation_steps > 1 and section.negatives != "group":
        place += f", of one of the {section.accumulation_steps:,} accumulation_steps"
    most = "at most " if section.negatives == "task" and section.batching == "mixed" else ""
    text = f"negatives per query {most}{negatives_per_query(section, ranks):,} = {product} - 1 positive ({place})"
    own = _tasks_with_own_negatives(config)
    if own and section.negatives != "group":
        text += f"; {section.passages_per_query - 1:,} of its own in {_counted(len(own), 'task')} with negatives: group"
    return text


def disk_equation(config: Config, section: TrainingConfig) -> str:
    """Size of the checkpoints that a stage keeps: weights and Adam's two moments of every trained parameter."""
    model, kept = config.model, f"{section.keep_checkpoints:,} keep_checkpoints"
    count = trained_parameters(model)
    if count is None:
        why = "is unknown until the model is downloaded"
        return f"checkpoints {kept} x trained parameters x (weights + Adam states); their number {why}"
    # Adapters are held in float32 whatever the weights below them are; Adam's moments have the type of the parameter.
    a_value = 4 if model.lora.enabled else _BYTES[model.weights_dtype]
    total = section.keep_checkpoints * count * 3 * a_value
    return (
        f"checkpoints {size_words(total)} = {kept} x {count:,} trained parameters x {3 * a_value} bytes "
        f"({a_value} weight + {2 * a_value} Adam)"
    )


def plan_lines(config: Config, kind: str) -> list[str]:
    """Equations of one stage, a line each; for prepare and export only those of a Slurm job.

    kind   prepare, s0, s1, s2, eval, export
    """
    if kind in ("prepare", "export"):
        return resource_lines(config.cluster, "one")
    if kind == "eval":
        return [_models_equation(config), *resource_lines(config.cluster)]
    section: TrainingConfig = getattr(config, kind)
    ranks = data_ranks(config, kind, ranks_of(config))
    return [
        ranks_equation(config),
        *([layout_equation(config)] if config.parallel.engine == "deepspeed" else []),
        batch_equation(config, section, ranks),
        negatives_equation(config, section, ranks),
        samples_equation(section, ranks),
        *filter(None, [memory_equation(config, kind)]),
        disk_equation(config, section),
        *resource_lines(config.cluster),
    ]


def _tasks_with_own_negatives(config: Config) -> list[str]:
    only = [name.strip() for name in config.data.only.split(",") if name.strip()]
    tasks = config.data.tasks
    return [name for name in tasks if tasks[name].negatives == "group" and (not only or name in only)]


def _models_equation(config: Config) -> str:
    models = [model.strip() for model in config.eval.models.split(",") if model.strip()]
    variants = [f"s2-{label}" for label in labels_of_s2(config)]
    # A model that is named twice is one column.
    columns = dict.fromkeys(column for model in models for column in (variants if model == "s2" else [model]))
    return f"models {len(columns):,} = {' + '.join(columns)}"


def embeds_in_chunks(config: Config) -> bool:
    """Whether texts are embedded in chunks of loss.chunk_tokens: under gradient caching, and always in pipelines."""
    return config.loss.gradient_cache or replica_ranks(config.parallel) > 1


def _ranks_words(config: Config, ranks: int) -> str:
    return _counted(ranks, "rank" if replica_ranks(config.parallel) == 1 else "data rank")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
