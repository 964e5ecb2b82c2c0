"""What each stage needs and makes, as plain data that the login node can read. Imports nothing heavy."""

from dataclasses import dataclass

from tdro_hpc.config.schema import Config


@dataclass(frozen=True)
class Stage:
    """One node of the chain. `name` is also its folder in the run directory."""

    name: str  # s0, s1, s2-curr, eval ...
    kind: str  # prepare, s0, s1, s2, eval: the module of tdro_hpc.stages that runs it
    needs: tuple[str, ...]  # names of stages whose DONE.json must exist
    makes: tuple[str, ...]  # paths under <stage>/out that DONE.json lists with their sizes
    sections: tuple[str, ...]  # config sections that change its results: the keys that DONE.json hashes
    ranks: str = "all"  # all = every rank of the cluster profile; one = a single process


_TRAINING_KEYS = ("seed", "model", "data", "loss")


def s2_variants(config: Config) -> list[str]:
    """Weight choices of s2.weights, in the order given: one model each."""
    return [choice.strip() for choice in config.s2.weights.split(",") if choice.strip()]


def variant_label(choice: str) -> str:
    """Short name of a weight choice for a folder: curr, top70, or the stem of a JSON file."""
    return choice.rsplit("/", 1)[-1].removesuffix(".json")


def stage_graph(config: Config) -> dict[str, Stage]:
    """Every stage this config can run, by name, in an order that respects the needs."""
    data = ("prepare",) if config.data.builder else ()
    stages = [
        Stage("s0", "s0", data, ("model",), (*_TRAINING_KEYS, "s0")),
        Stage("s1", "s1", (*data, "s0"), ("model", "weights"), (*_TRAINING_KEYS, "s1")),
    ]
    if data:
        stages.insert(0, Stage("prepare", "prepare", (), ("data",), ("seed", "embedded"), ranks="one"))
    for choice in s2_variants(config):
        needs = data if choice.endswith(".json") else (*data, "s1")
        stages.append(Stage(f"s2-{variant_label(choice)}", "s2", needs, ("model",), (*_TRAINING_KEYS, "s2")))
    stages.append(Stage("eval", "eval", data + _evaluated(config), ("scores",), ("seed", "model", "eval")))
    return {stage.name: stage for stage in stages}


def _evaluated(config: Config) -> tuple[str, ...]:
    models = [model.strip() for model in config.eval.models.split(",")]
    names = [name for name in ("s0", "s1") if name in models]
    if "s2" in models:
        names += [f"s2-{variant_label(choice)}" for choice in s2_variants(config)]
    return tuple(names)
