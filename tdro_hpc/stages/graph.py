"""What each stage needs and makes, as plain data that the login node can read. Imports nothing heavy."""

from tdro_hpc.config.checks import exported_stage
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.stage import Stage

__all__ = ["Stage", "s2_variants", "stage_graph", "variant_label"]

_TRAINING_KEYS = ("seed", "model", "data", "loss")


def s2_variants(config: Config) -> list[str]:
    """Weight choices of s2.weights, in the order given: one model each."""
    return [choice.strip() for choice in config.s2.weights.split(",") if choice.strip()]


def variant_label(choice: str) -> str:
    """Short name of a weight choice for a folder: curr, top70, or the stem of a JSON file."""
    return choice.rsplit("/", 1)[-1].removesuffix(".json")


def stage_graph(config: Config) -> dict[str, Stage]:
    """Every stage this config can run, by name, in an order that respects the needs.

    raises ValueError when two choices of s2.weights would share a folder
    """
    data = ("prepare",) if config.data.builder else ()
    stages = [
        _training("s0", "s0", data, ("model",), _files(config.s0.weights)),
        _training("s1", "s1", (*data, "s0"), ("model", "weights"), _files(config.s1.weights)),
    ]
    if data:
        stages.insert(0, Stage("prepare", "prepare", (), ("data",), ("seed", "embedded"), ranks="one"))
    for choice in s2_variants(config):
        name, files = f"s2-{variant_label(choice)}", _files(choice)
        if name in [stage.name for stage in stages]:
            raise ValueError(
                f"s2.weights is {config.s2.weights}; two of its choices would both be made in the folder {name}. "
                "Rename one of the JSON files, or leave one out."
            )
        needs = data if files else (*data, "s1")
        stages.append(_training(name, "s2", needs, ("model",), files))
    stages.append(Stage("eval", "eval", data + _evaluated(config), ("scores",), ("seed", "model", "eval")))
    stages.append(_export(config))
    return {stage.name: stage for stage in stages}


def _training(name: str, kind: str, needs: tuple[str, ...], makes: tuple[str, ...], files: tuple[str, ...]) -> Stage:
    return Stage(name, kind, needs, makes, (*_TRAINING_KEYS, kind), files=files, trains=True)


def _export(config: Config) -> Stage:
    trained = exported_stage(config)
    needs = (trained,) if config.export.checkpoint == 0 else ()  # a checkpoint is there before its stage is done
    # The model card has the table of eval where there is one.
    return Stage("export", "export", needs, ("model",), ("export",), ranks="one", follows=(trained, "eval"))


def _files(weights: str) -> tuple[str, ...]:
    return (weights,) if weights.endswith(".json") else ()


def _evaluated(config: Config) -> tuple[str, ...]:
    models = [model.strip() for model in config.eval.models.split(",")]
    names: list[str] = [name for name in ("s0", "s1") if name in models]
    variants = [f"s2-{variant_label(choice)}" for choice in s2_variants(config)]
    return tuple(names + [name for name in variants if "s2" in models or name in models])
