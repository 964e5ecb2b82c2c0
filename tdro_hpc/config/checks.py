"""A config in, contradictions between its values out: what no single section can see. Opens no file."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from tdro_hpc.config.schema import Config, TrainingConfig

STAGE_KINDS = ("prepare", "s0", "s1", "s2", "eval", "export")  # s2-<weights> is one model of s2
EVALUATED = ("base", "bm25", "s0", "s1", "s2")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_MIXTURES = "uniform, size, temperature:<exponent> or a weights JSON"


def cross_problems(config: Config, broken: set[str]) -> list[str]:
    """Contradictions, each beginning with the key to change.

    broken   top names of sections that are wrong in themselves; nothing is said about those
    """
    found = [
        ((), _tokens(config)),
        (("name",), _run_name(config)),
        (("stages", "data"), _stages(config)),
        (("model",), _model(config)),
        (("cluster", "parallel"), _machines(config)),
        (("model", "parallel"), _types(config)),
        (("s1", "s2"), _weights_of_s2(config)),
        (("eval", "s2"), _evaluated_models(config)),
        (("export", "s2"), _exported_stage(config)),
    ]
    for name in ("s0", "s1", "s2"):
        section: TrainingConfig = getattr(config, name)
        found.append(((name,), _training(name, section)))
        found.append(((name, "data"), _own_negatives(name, section, config)))
    return [problem for sections, problems in found if not broken & set(sections) for problem in problems]


def _run_name(config: Config) -> list[str]:
    if _RUN_NAME.fullmatch(config.name):
        return []
    return [
        f"name is {config.name!r}; it names a folder: a letter or digit, then letters, digits and . _ + = -. "
        "Type name=my-run."
    ]


def _tokens(config: Config) -> list[str]:
    return [
        f"{key} holds a token of the Hugging Face hub, which would be kept in config.yaml and in job scripts. "
        "Take it out, withdraw the token, and type: hf auth login. Jobs find that login in the home directory."
        for key, text in _texts("", dataclasses.asdict(config))
        if _HUB_TOKEN.search(text)
    ]


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in a config; items of a list have its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(f"{key}.{name}" if key else str(name), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(key, inner)


def _stages(config: Config) -> list[str]:
    problems = []
    for stage in config.stages:
        if stage not in STAGE_KINDS and not stage.startswith("s2-"):
            kinds = ", ".join(STAGE_KINDS)
            problems.append(f"stages holds {stage!r}; it may hold {kinds}. Type stages=[s0,s1,s2,eval].")
        elif stage == "prepare" and not config.data.builder:
            problems.append(
                "stages holds 'prepare', but data.builder is empty, so there is nothing to prepare. "
                "Type data.builder=embedded, or stages=[s0,s1,s2,eval]."
            )
    if not config.stages:
        problems.append("stages is empty; it must hold at least one stage. Type stages=[s0,s1,s2,eval].")
    return problems


def _model(config: Config) -> list[str]:
    model, problems = config.model, []
    if model.name.partition(":")[2] == "" and (not model.name or ":" in model.name):
        problems.append(
            f"model.name is {model.name!r}; it must name a model: a hub id, a folder, package:<package> or "
            "tiny:<architecture>. Type model.name=Qwen/Qwen1.5-0.5B."
        )
    if model.attention == "flash_attention_2" and "float32" == model.autocast == model.weights_dtype:
        problems.append(
            "model.attention is 'flash_attention_2', which has no float32 kernels, but model.autocast and "
            "model.weights_dtype are float32. Type model.autocast=bfloat16 or model.attention=sdpa."
        )
    return problems


def _machines(config: Config) -> list[str]:
    cluster, problems = config.cluster, []
    if 0 < cluster.gpus_per_node < cluster.ranks_per_node:
        problems.append(
            f"cluster.ranks_per_node is {cluster.ranks_per_node} with cluster.gpus_per_node={cluster.gpus_per_node}: "
            f"each rank needs a GPU of its own. Type cluster.ranks_per_node={cluster.gpus_per_node}."
        )
    if config.parallel.backend == "nccl" and cluster.gpus_per_node == 0:
        problems.append(
            "parallel.backend is 'nccl', which talks between GPUs, but cluster.gpus_per_node is 0. "
            "Type parallel.backend=auto, or cluster.gpus_per_node=<GPUs of one machine>."
        )
    return problems


def _types(config: Config) -> list[str]:
    """What an engine cannot do with the types of this model."""
    model, parallel, problems = config.model, config.parallel, []
    for key in ("autocast", "weights_dtype"):
        if parallel.engine != "torch" and getattr(model, key) == "float16":
            problems.append(
                f"model.{key} is 'float16' with parallel.engine={parallel.engine}: only the torch engine scales losses "
                f"for it. Type model.{key}=bfloat16, or parallel=ddp."
            )
    if model.weights_dtype == "bfloat16" and parallel.engine == "deepspeed" and parallel.zero == 0:
        problems.append(
            "model.weights_dtype is 'bfloat16' with parallel.engine=deepspeed and parallel.zero=0: the float32 masters "
            "of the weights belong to ZeRO-1. Type parallel.zero=1, or model.weights_dtype=float32."
        )
    return problems


def _training(name: str, section: TrainingConfig) -> list[str]:
    problems = []
    if section.stratified and section.batching != "mixed":
        problems.append(
            f"{name}.stratified is true, which puts every task into each step, but {name}.batching is "
            f"{section.batching!r}. Type {name}.batching=mixed or {name}.stratified=false."
        )
    if section.negatives == "group" and section.passages_per_query == 1:
        problems.append(
            f"{name}.passages_per_query is 1 with {name}.negatives=group: a query has its positive and no negative. "
            f"Type {name}.passages_per_query=8 or {name}.negatives=world."
        )
    if name != "s2" and not _is_mixture(section.weights):
        problems.append(f"{name}.weights is {section.weights!r}; it must be {_MIXTURES}. Type {name}.weights=uniform.")
    return problems


def _is_mixture(weights: str) -> bool:
    kind, colon, exponent = weights.partition(":")
    if kind == "temperature" and colon:
        return re.fullmatch(r"\d+(\.\d*)?|\.\d+", exponent) is not None
    return weights in ("uniform", "size") or weights.endswith(".json")


def _own_negatives(name: str, section: TrainingConfig, config: Config) -> list[str]:
    own = [task for task, task_config in config.data.tasks.items() if task_config.negatives == "group"]
    if section.passages_per_query > 1 or section.negatives == "group" or not own:
        return []
    return [
        f"{name}.passages_per_query is 1, but task {own[0]} has negatives: group, so its queries have no negative. "
        f"Type {name}.passages_per_query=2."
    ]


def labels_of_s2(config: Config) -> list[str]:
    """Short name of each choice of s2.weights: itself, or the stem of a JSON file."""
    choices = [choice.strip() for choice in config.s2.weights.split(",") if choice.strip()]
    return [choice.rpartition("/")[2].removesuffix(".json") for choice in choices]


def _weights_of_s2(config: Config) -> list[str]:
    problems = []
    percents = [part.strip() for part in config.s1.top_percents.split(",") if part.strip()]
    for percent in percents:
        if not percent.isdigit() or not 1 <= int(percent) <= 100:
            problems.append(
                f"s1.top_percents holds {percent!r}; it must hold whole numbers from 1 to 100. "
                "Type s1.top_percents=20,50,70."
            )
    choices = [choice.strip() for choice in config.s2.weights.split(",") if choice.strip()]
    if not choices:
        problems.append("s2.weights is empty; it must name the weights to train with. Type s2.weights=curr.")
    for choice in choices:
        percent = choice.removeprefix("top") if choice.startswith("top") else ""
        if choice in ("curr", "mean", "ema") or choice.endswith(".json"):
            continue
        if not percent.isdigit():
            problems.append(
                f"s2.weights holds {choice!r}; it may hold curr, mean, ema, top<percent> and JSON files. "
                "Type s2.weights=curr."
            )
        elif percent not in percents:
            problems.append(
                f"s2.weights holds {choice!r}, but s1 makes only those of s1.top_percents={config.s1.top_percents}. "
                f"Type s1.top_percents={','.join([*percents, percent])}."
            )
    return problems


def exported_stage(config: Config) -> str:
    """Name of the stage whose model stage export writes."""
    return f"s2-{labels_of_s2(config)[0]}" if config.export.stage == "s2" else config.export.stage


def _exported_stage(config: Config) -> list[str]:
    known = ["s0", "s1", "s2", *(f"s2-{label}" for label in labels_of_s2(config))]
    stage = config.export.stage
    if stage in known:
        return []
    cure = "export.stage=s2"
    if stage.startswith("s2-"):
        cure = f"s2.weights={config.s2.weights},{stage.removeprefix('s2-')} to train that one too"
    return [f"export.stage is {stage!r}; it may be {', '.join(known)}. Type {cure}."]


def _evaluated_models(config: Config) -> list[str]:
    models = [model.strip() for model in config.eval.models.split(",") if model.strip()]
    variants = [f"s2-{label}" for label in labels_of_s2(config)]
    problems = []
    for model in models:
        if model in (*EVALUATED, *variants) or "/" in model:
            continue
        cure = f"eval.models=base,s0,s2, or eval.models=./{model} for a folder"
        if model.startswith("s2-"):
            cure = f"s2.weights={config.s2.weights},{model.removeprefix('s2-')} to train that one too"
        known = ", ".join((*EVALUATED, *variants))
        problems.append(f"eval.models holds {model!r}; it may hold {known} and folders. Type {cure}.")
    if not models:
        problems.append("eval.models is empty; it must name what to evaluate. Type eval.models=base,s0,s2.")
    return problems
