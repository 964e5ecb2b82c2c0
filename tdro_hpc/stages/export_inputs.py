"""What stage export is to write in, what it lacks on this machine out, in words. Opens no weights, imports no torch."""

from pathlib import Path

from tdro_hpc.config.checks import exported_stage
from tdro_hpc.config.export import ExportConfig
from tdro_hpc.config.load import load_config
from tdro_hpc.config.schema import Config, ModelConfig
from tdro_hpc.encoders.sources import PACKAGE_PREFIX, model_location, tiny_architecture


def export_problems(config: Config) -> list[str]:
    """A sentence or more for everything that would end stage export, as far as it can be seen before it runs."""
    stage_dir = Path(config.runs_dir, config.name, exported_stage(config))
    begun = (stage_dir / "config.yaml").is_file()
    if config.export.checkpoint != 0:
        steps = saved_steps(stage_dir)
        wanted = config.export.checkpoint if config.export.checkpoint > 0 else max(steps, default=0)
        if not begun or wanted not in steps:
            return [no_checkpoint(stage_dir, config.export.checkpoint, steps)]
    model = config_of_stage(stage_dir).model if begun else config.model
    return model_problems(model, config.export)


def config_of_stage(stage_dir: Path) -> Config:
    """The config with which a stage was run last.

    raises  ValueError  where the stage was never begun
    """
    path = stage_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: stage {stage_dir.name} was never begun. Type: python -m tdro_hpc.submit "
            f"stage={stage_dir.name} name={stage_dir.parent.name}"
        )
    return load_config([f"config={path}"]).config


def saved_steps(stage_dir: Path) -> list[int]:
    """Steps of the finished checkpoints of a stage, rising."""
    return sorted(int(path.parent.name[5:]) for path in stage_dir.glob("checkpoints/step-*/state.json"))


def no_checkpoint(stage_dir: Path, wanted: int, steps: list[int]) -> str:
    """What to say where export.checkpoint names none that is there."""
    if not steps:
        return (
            f"export.checkpoint is {wanted}, but {stage_dir} has no checkpoint yet. Type export.checkpoint=0 to export "
            f"the finished model: stage {stage_dir.name} is then run first where it is not done."
        )
    there = ", ".join(map(str, steps))
    return (
        f"export.checkpoint is {wanted}; {stage_dir / 'checkpoints'} has those after step {there}. "
        f"Type export.checkpoint={steps[-1]}, or 0 for the finished model."
    )


def model_problems(model: ModelConfig, export: ExportConfig) -> list[str]:
    """Why this model cannot be written in the form asked for."""
    if export.lora == "adapter":
        return _adapter_problems(model)
    if not model.lora.enabled or tiny_architecture(model.name):
        return []
    try:
        location = Path(model_location(model.name))
    except ValueError as error:
        return [str(error)]
    if location.is_dir() and not any(location.glob("*.safetensors")):
        return [
            f"model.name is {model.name!r}, and {location} has no safetensors file. Its weights are needed to merge "
            "LoRA, and a pickle (.bin) is not opened. Type export.lora=adapter, or give a copy of the model with "
            "model.safetensors."
        ]
    return []


def _adapter_problems(model: ModelConfig) -> list[str]:
    cure = "Type export.lora=merge."
    if not model.lora.enabled:
        return [f"export.lora is 'adapter', but all weights were trained (model.lora.enabled is false). {cure}"]
    if tiny_architecture(model.name) or model.name.startswith(PACKAGE_PREFIX):
        return [f"export.lora is 'adapter', but peft cannot find the model {model.name!r} by that name. {cure}"]
    if model.bidirectional:
        return [
            "export.lora is 'adapter' with model.bidirectional=true: whoever loads the adapter gets the base model "
            f"with its own attention, in which a token sees those before it only. {cure}"
        ]
    return []
