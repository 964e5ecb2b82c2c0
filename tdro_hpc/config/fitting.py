"""A config in; what its stages need of a GPU, in words, and the layout that fits with least communication out."""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tdro_hpc.config.figures import SPREADABLE, ModelFigures, figures_of
from tdro_hpc.config.layouts import TRAINING_KINDS, Layout, head_divisor, layout_of
from tdro_hpc.config.memory import Estimate, bubble_equation, estimate_memory, size_words
from tdro_hpc.config.model_size import parameter_shapes
from tdro_hpc.config.resources import ranks_of_job, ranks_per_node
from tdro_hpc.config.schema import Config, ParallelConfig

_ROOM = 0.9  # share of a GPU that an estimate may fill: memory falls into pieces, and estimates are off by some percent


def estimate_of(config: Config, kind: str, layout: Layout | None = None) -> Estimate | None:
    """Memory of a training stage in a layout, that of the config if none is given; None for models not known here."""
    figures = figures_of(config.model)
    shapes = parameter_shapes(config.model.name, config.model.revision)
    if figures is None or shapes is None:
        return None
    layout = layout or layout_of(config.parallel, ranks_of_job(config.cluster))
    parameters = sum(map(math.prod, shapes.values()))
    return estimate_memory(config, kind, layout, figures, parameters=parameters)


def memory_equation(config: Config, kind: str) -> str:
    """Memory of the fullest rank of a training stage, in one line; empty for models that are not known here."""
    estimate = estimate_of(config, kind)
    if estimate is None:
        return ""
    parts = " + ".join(f"{size_words(item.num_bytes)} {item.name}" for item in estimate.items)
    return f"memory a {_rank_word(config)} about {size_words(estimate.total)}{_capacity_words(config)} = {parts}"


def memory_text(config: Config, kinds: Sequence[str]) -> str:
    """The table behind `memory_equation` for each of the stages, and the pipeline's bubble."""
    blocks = []
    for kind in dict.fromkeys(kind for kind in kinds if kind in TRAINING_KINDS):
        estimate = estimate_of(config, kind)
        if estimate is None:
            continue
        rows = [(item.name, size_words(item.num_bytes), item.equation) for item in estimate.items]
        rows.append(("in all", size_words(estimate.total), _capacity_words(config).strip()))
        lines = [f"{name:<12}{size:>8}  {words}".rstrip() for name, size, words in rows]
        bubble = bubble_equation(layout_of(config.parallel, ranks_of_job(config.cluster)), estimate)
        title = f"memory of {kind} a {_rank_word(config)}, about: the fullest rank at its fullest moment"
        blocks.append("\n".join([title, *lines, *([bubble] if bubble else [])]))
    return "\n\n".join(blocks)


def fit_problems(config: Config, kinds: Sequence[str]) -> list[str]:
    """Stages of these kinds that cannot fit into the GPU of the profile, whatever their batch."""
    problems = []
    for kind, estimate in _estimates(config, kinds):
        if estimate.held > _capacity(config):
            problems.append(
                f"{kind} holds about {size_words(estimate.held)} of weights and optimiser on a GPU of "
                f"cluster.gpu_memory_gb={config.cluster.gpu_memory_gb:g}, before anything is computed. "
                "Type parallel=auto for a layout that fits, more ranks, or model.weights_dtype=bfloat16."
            )
    return problems


def fit_notes(config: Config, kinds: Sequence[str]) -> list[str]:
    """Stages of these kinds that will probably run out of memory, and what makes them smaller."""
    notes = []
    for kind, estimate in _estimates(config, kinds):
        if estimate.held <= _capacity(config) < estimate.total:
            notes.append(
                f"{kind} needs about {size_words(estimate.total)} of a GPU of "
                f"cluster.gpu_memory_gb={config.cluster.gpu_memory_gb:g}: it may run out of memory. {_smaller(config)}"
            )
    return notes


def _estimates(config: Config, kinds: Sequence[str]) -> Iterator[tuple[str, Estimate]]:
    """Estimates that can be compared with the memory of a GPU."""
    if config.cluster.gpus_per_node == 0 or not config.cluster.gpu_memory_gb:
        return
    for kind in dict.fromkeys(kind for kind in kinds if kind in TRAINING_KINDS):
        estimate = estimate_of(config, kind)
        if estimate is not None:
            yield kind, estimate


def _smaller(config: Config) -> str:
    if not config.loss.gradient_cache and config.parallel.pp * config.parallel.tp == 1:
        return "Type loss.gradient_cache=true."
    if not config.model.gradient_checkpointing:
        return "Type model.gradient_checkpointing=true."
    return f"Type loss.chunk_tokens={max(512, config.loss.chunk_tokens // 2)}, or parallel=auto."


def _capacity(config: Config) -> float:
    return config.cluster.gpu_memory_gb * 1e9


def _capacity_words(config: Config) -> str:
    known = config.cluster.gpu_memory_gb and config.cluster.gpus_per_node
    return f" of {config.cluster.gpu_memory_gb:g} GB" if known else ""


def _rank_word(config: Config) -> str:
    return "GPU" if config.cluster.gpus_per_node else "rank"


def chosen_layout(config: Config) -> tuple[ParallelConfig, str]:
    """parallel.engine=auto in, the first layout that fits the GPUs out, least communication first, and why, in a line.

    raises ValueError, beginning with the key to change, where nothing fits or what has to be known is not
    """
    parallel, cluster = config.parallel, config.cluster
    if not cluster.gpus_per_node:
        return replace(parallel, engine="torch"), "parallel=auto takes ddp: there is no GPU to fit into"
    if not cluster.gpu_memory_gb:
        raise ValueError(
            "cluster.gpu_memory_gb is 0, and parallel=auto has to know what fits. Type cluster.gpu_memory_gb=80 for a "
            "GPU of 80 GB, or parallel=ddp."
        )
    figures, ranks = figures_of(config.model), ranks_of_job(cluster)
    if figures is None or parameter_shapes(config.model.name, config.model.revision) is None:
        raise ValueError(
            f"model.name is {config.model.name!r}, whose sizes are not known here, and parallel=auto has to know what "
            f"fits. Type hf download {config.model.name} config.json, or parallel=zero2."
        )
    kinds = [kind for kind in TRAINING_KINDS if kind in [stage.split("-")[0] for stage in config.stages]]
    missed: list[tuple[int, str]] = []
    for layout in _layouts(config, figures, ranks):
        need = max((_total(config, kind, layout) for kind in kinds), default=0)
        if need <= _ROOM * _capacity(config):
            words = f"parallel=auto takes {layout.name}: {size_words(need)} a GPU of {cluster.gpu_memory_gb:g} GB"
            words += f", {layout.dp} data rank{'s' if layout.dp > 1 else ''}"
            if missed:
                words += f"; with less communication {missed[-1][1]} would need {size_words(missed[-1][0])}"
            return _parallel_of(parallel, layout), words
        missed.append((need, layout.name))
    need, name = min(missed)
    raise ValueError(
        f"parallel.engine is 'auto', but no layout of {ranks} rank{'s' if ranks > 1 else ''} fits a GPU of "
        f"{cluster.gpu_memory_gb:g} GB with a tenth to spare. The nearest is {name} with {size_words(need)}. "
        f"{_help_of_auto(config, figures)}"
    )


def _total(config: Config, kind: str, layout: Layout) -> int:
    estimate = estimate_of(config, kind, layout)
    assert estimate is not None, "the figures of the model are known"
    return estimate.total


def _layouts(config: Config, figures: ModelFigures, ranks: int) -> Iterator[Layout]:
    """Layouts that can work, the least communication first; those that need DeepSpeed only where it may be."""
    yield Layout("torch", 1, ranks, 1)
    on_this_machine = config.cluster.executor == "local"
    half = "float16" in (config.model.autocast, config.model.weights_dtype)
    if half or on_this_machine and importlib.util.find_spec("deepspeed") is None:
        return
    splits = ranks > 1
    if splits:
        yield Layout("deepspeed", 1, ranks, 1, 1)
        yield Layout("deepspeed", 1, ranks, 1, 2)
    spreadable = can_be_spread(config, figures)
    sizes = [size for size in (2, 4, 8) if spreadable and ranks % size == 0]
    per_node = ranks_per_node(config.cluster)[0]
    tensor = [size for size in sizes if head_divisor(figures) % size == 0 and per_node % size == 0]
    for tp in tensor:
        yield Layout("deepspeed", 1, ranks // tp, tp, 1)
    if splits:
        yield Layout("deepspeed", 1, ranks, 1, 3)
    for pp in (size for size in sizes if size <= figures.layers):
        for tp in (1, *tensor):
            if ranks % (pp * tp) == 0:
                yield Layout("deepspeed", pp, ranks // (pp * tp), tp, 1)
    yield Layout("deepspeed", 1, ranks, 1, 3, True)


def can_be_spread(config: Config, figures: ModelFigures) -> bool:
    """Whether pipelines and tensor parallelism are offered for this model as it is configured."""
    model = config.model
    dropout = model.lora.enabled and model.lora.dropout > 0
    return figures.kind in SPREADABLE and not dropout and not model.trust_remote_code


def _parallel_of(parallel: ParallelConfig, layout: Layout) -> ParallelConfig:
    return replace(parallel, engine=layout.engine, zero=layout.zero, offload=layout.offload, pp=layout.pp, tp=layout.tp)


def _help_of_auto(config: Config, figures: ModelFigures) -> str:
    more = ""
    if figures.kind in SPREADABLE and not can_be_spread(config, figures):
        more = " With model.lora.dropout=0 tensor parallelism and pipelines are tried too."
    return f"{_smaller(config).replace(', or parallel=auto', '')} Or start more ranks.{more}"
