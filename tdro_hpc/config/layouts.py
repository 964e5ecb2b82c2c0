"""How the ranks of a training stage are laid out, and in words what cannot work. Opens the model's config.json at most.

A replica of the model is spread over pp x tp ranks; each replica is one data rank. Stages that do not train take every
rank as a data rank.
"""

import math
from dataclasses import dataclass

from tdro_hpc.config.figures import SPREADABLE, ModelFigures, figures_of
from tdro_hpc.config.resources import ranks_of_job, ranks_per_node
from tdro_hpc.config.schema import Config, ParallelConfig

TRAINING_KINDS = ("s0", "s1", "s2")


@dataclass(frozen=True)
class Layout:
    """The mesh of a training stage and what DeepSpeed splits over its data ranks."""

    engine: str  # torch, deepspeed
    pp: int
    dp: int
    tp: int
    zero: int = 0
    offload: bool = False

    @property
    def spread(self) -> int:
        """Ranks that hold one replica together."""
        return self.pp * self.tp

    @property
    def name(self) -> str:
        """ddp, zero2, pp2_tp2 ...: the file of configs/parallel that it resembles."""
        axes = [f"{axis}{size}" for axis, size in (("pp", self.pp), ("tp", self.tp)) if size > 1]
        if axes:
            return "_".join(axes)
        if self.engine == "torch":
            return "ddp"
        return f"zero{self.zero}{'_offload' if self.offload else ''}"


def replica_ranks(parallel: ParallelConfig) -> int:
    """Ranks over which one replica of the model is spread."""
    return parallel.pp * parallel.tp


def data_ranks(config: Config, kind: str, ranks: int) -> int:
    """Ranks that read different rows.

    kind    s0, s1 and s2 train on the mesh; in the others every rank reads rows
    ranks   all ranks of the stage
    """
    return max(1, ranks // replica_ranks(config.parallel)) if kind in TRAINING_KINDS else ranks


def layout_of(parallel: ParallelConfig, ranks: int) -> Layout:
    """Layout of so many ranks, which pp x tp divides."""
    dp = max(1, ranks // replica_ranks(parallel))
    return Layout(parallel.engine, parallel.pp, dp, parallel.tp, parallel.zero, parallel.offload)


def layout_problems(config: Config) -> list[str]:
    """Why no stage of this config can train with its layout, in words, with the values that would work."""
    figures = figures_of(config.model)
    return _rank_problems(config, figures) + model_problems(config, figures)


def _rank_problems(config: Config, figures: ModelFigures | None) -> list[str]:
    """What is wrong with the number of ranks; the sizes that are offered instead suit the model."""
    parallel, ranks = config.parallel, ranks_of_job(config.cluster)
    per_node, key = ranks_per_node(config.cluster)
    nodes = f"{config.cluster.nodes} node{'s' if config.cluster.nodes > 1 else ''}"
    counted = f"{ranks} rank{'s' if ranks > 1 else ''} ({nodes} x {per_node} {key})"
    spread = replica_ranks(parallel)
    if ranks % spread:
        axes = f"parallel.pp={parallel.pp} x parallel.tp={parallel.tp}"
        sizes = ", ".join(f"pp={pp} tp={tp}" for pp, tp in _fitting(ranks, parallel, figures))
        more = f"start {spread}, {2 * spread} or {4 * spread} ranks: {_ranks_words(config, spread)}"
        return [
            f"{counted} cannot hold whole replicas of {axes} = {spread} ranks each. "
            f"{more[0].upper()}{more[1:]}{f', or set parallel.* to {sizes}' if sizes else ''}."
        ]
    if parallel.dp and parallel.dp * spread != ranks:
        return [
            f"parallel.dp is {parallel.dp}, but {counted} / (pp {parallel.pp} x tp {parallel.tp}) = {ranks // spread} "
            f"data ranks. Type parallel.dp={ranks // spread}, or parallel.dp=0 to take what is left, or "
            f"{_ranks_words(config, parallel.dp * spread)}."
        ]
    return []


def _fitting(ranks: int, parallel: ParallelConfig, figures: ModelFigures | None) -> list[tuple[int, int]]:
    """Sizes near the wished ones that divide the ranks, as (pp, tp)."""
    heads, layers = (head_divisor(figures), figures.layers) if figures else (8, 8)
    sizes = [(pp, tp) for pp in _divisors(ranks) for tp in _divisors(math.gcd(heads, ranks // pp)) if pp <= layers]
    wish = parallel.pp * parallel.tp
    return sorted(sizes, key=lambda size: (abs(size[0] * size[1] - wish), abs(size[1] - parallel.tp)))[:3]


def head_divisor(figures: ModelFigures) -> int:
    """Largest parallel.tp: what divides it shares out whole heads of queries and of keys, and the MLP evenly."""
    return math.gcd(figures.heads, figures.key_value_heads, figures.inner)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _ranks_words(config: Config, ranks: int) -> str:
    """What to type for so many ranks, in the keys that this profile uses."""
    cluster = config.cluster
    key = "gpus_per_node" if cluster.gpus_per_node and not cluster.ranks_per_node else "ranks_per_node"
    if cluster.executor == "local" or ranks <= 8:
        return f"cluster.nodes=1 cluster.{key}={ranks}" if cluster.nodes > 1 else f"cluster.{key}={ranks}"
    per_node = next(size for size in (8, 4, 2, 1) if ranks % size == 0)
    return f"cluster.nodes={ranks // per_node} cluster.{key}={per_node}"


def model_problems(config: Config, figures: ModelFigures | None) -> list[str]:
    """What keeps this model from being spread as parallel.pp and parallel.tp say.

    figures   of config.model; None = not known here: the job looks at them when it starts
    """
    parallel, model = config.parallel, config.model
    if replica_ranks(parallel) == 1:
        return []
    axes = f"parallel.pp={parallel.pp} parallel.tp={parallel.tp}"
    problems = []
    if model.lora.enabled and model.lora.dropout > 0:
        problems.append(
            f"model.lora.dropout is {model.lora.dropout:g} with {axes}: a pipeline embeds its first pass without "
            "dropout, so the gradients of the second would be others. Type model.lora.dropout=0, or parallel=zero2."
        )
    if model.trust_remote_code:
        problems.append(
            f"model.trust_remote_code is true with {axes}: only layers that are known here can be spread over ranks. "
            "Type model.trust_remote_code=false, or parallel=zero2."
        )
    return problems + (_size_problems(config, figures, axes) if figures else [])


def _size_problems(config: Config, figures: ModelFigures, axes: str) -> list[str]:
    parallel, problems = config.parallel, []
    if figures.kind not in SPREADABLE:
        return [
            f"{config.model.name} is a {figures.kind}; {axes} spreads {', '.join(SPREADABLE)} only. "
            "Type parallel=ddp or parallel=zero2: each holds whole layers on every rank."
        ]
    if figures.attention_dropout > 0:
        problems.append(
            f"{config.model.name} has attention_dropout {figures.attention_dropout:g} in its config.json; with {axes} "
            "nothing is drawn at random. Set it to 0 there, or type parallel=zero2."
        )
    heads = head_divisor(figures)
    if heads % parallel.tp:
        fitting = " or ".join(f"parallel.tp={size}" for size in _divisors(heads) if size <= 8)
        problems.append(
            f"parallel.tp is {parallel.tp}, but {config.model.name} has {figures.heads} heads of queries, "
            f"{figures.key_value_heads} of keys and values, and {figures.inner:,} columns in its MLP, which are shared "
            f"evenly. Type {fitting}."
        )
    if figures.layers < parallel.pp:
        fitting = " or ".join(f"parallel.pp={size}" for size in (1, 2, 4, 8) if size <= figures.layers)
        problems.append(
            f"parallel.pp is {parallel.pp}, but {config.model.name} has {figures.layers} layers: a stage of the "
            f"pipeline would have none. Type {fitting}."
        )
    return problems


def unchecked_line(config: Config) -> str:
    """What can only be checked in the job, in words; empty where all is known."""
    if figures_of(config.model) is not None:
        return ""
    name = config.model.name
    return (
        f"{name} is not on this machine: whether it fits, and can be spread, is checked when the job starts. "
        f"To see it here type: hf download {name} config.json"
    )


def layout_equation(config: Config) -> str:
    """Ranks of a training stage as a product of its axes, and what each of them holds."""
    ranks = ranks_of_job(config.cluster)
    layout = layout_of(config.parallel, ranks)
    text = f"layout {layout.name}: {ranks:,} ranks = {layout.pp} pp x {layout.dp} dp x {layout.tp} tp"
    split = {0: "", 1: "optimiser", 2: "optimiser and gradients", 3: "optimiser, gradients and weights"}[layout.zero]
    if split:
        text += f"; ZeRO-{layout.zero} splits {split} over the data ranks"
    if layout.offload:
        text += ", the optimiser in the node's memory"
    per_node = ranks_per_node(config.cluster)[0]
    if layout.tp > per_node or per_node % layout.tp:
        text += f"; tensor ranks on several nodes of {per_node}: slow"
    return text
