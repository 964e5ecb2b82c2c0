"""A model's config in, the same backbone without memory for its weights out: their names, shapes and config.json."""

from pathlib import Path
from typing import Any

import torch

from tdro_hpc.config.schema import ModelConfig
from tdro_hpc.encoders.sources import downloaded_copy, model_location, tiny_architecture


def build_skeleton(config: ModelConfig) -> Any:
    """The backbone as load_encoder makes it, without adapter, on the device `meta`.

    raises  ValueError  where there is no such model, or one with code of its own
    """
    backbone = _whole(config)
    # As in backbone.py: no pooling here reads the layer over [CLS], so its weights are neither trained nor saved.
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    backbone.config.use_cache = False
    backbone.name_or_path = config.name
    if config.bidirectional:
        backbone.config.is_causal = False
    return backbone.eval()


def has_pooler(config: ModelConfig) -> bool:
    """Whether the architecture has a layer over [CLS], which is in none of our folders."""
    return getattr(_whole(config), "pooler", None) is not None


def write_config(backbone: Any, dtype: torch.dtype, folder: Path) -> None:
    """Write config.json of a skeleton whose weights are saved as `dtype`."""
    backbone.config.dtype = str(dtype).removeprefix("torch.")
    backbone.config.architectures = [type(backbone).__name__]
    backbone.config.save_pretrained(str(folder))


def base_on_this_machine(config: ModelConfig, *, needs: tuple[str, ...] = ("config.json",)) -> Path | None:
    """Folder with the files of config.name; None for a hub id that is not downloaded, and for a tiny backbone.

    needs   files that a download has to have, as patterns
    raises  ValueError  where config.name can only be a folder or a package, and there is none
    """
    if tiny_architecture(config.name):
        return None
    location = model_location(config.name)
    if Path(location).is_dir():
        return Path(location)
    copy = downloaded_copy(location, config.revision, needs=needs)
    return Path(copy) if copy else None


def folder_of_base(config: ModelConfig) -> Path:
    """As base_on_this_machine, for a name that has files; a hub id is downloaded where it is not here yet."""
    assert not tiny_architecture(config.name), "a tiny backbone has no files"
    found = base_on_this_machine(config, needs=("*.safetensors",))
    return found or _download(config.name, config)


def _download(location: str, config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "README.md", "LICENSE*"]
    try:
        return Path(snapshot_download(location, revision=config.revision or None, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f"model.name is {config.name!r}, which is not on this machine, and the hub did not give it: "
            f"{str(error).strip().splitlines()[0]}\nType `hf download {config.name}` where the hub can be reached, "
            "with the same HF_HOME, or export where the model was trained."
        ) from error


def _whole(config: ModelConfig) -> Any:
    from transformers import AutoModel

    hf_config = _hf_config(config)
    with torch.device("meta"):
        return AutoModel.from_config(hf_config, dtype=getattr(torch, config.weights_dtype))


def _hf_config(config: ModelConfig) -> Any:
    """transformers' description of the backbone."""
    architecture = tiny_architecture(config.name)
    if architecture:
        from tdro_hpc.encoders.tiny import tiny_config

        return tiny_config(architecture)
    from transformers import AutoConfig

    folder = base_on_this_machine(config) or _download(config.name, config)
    try:
        found = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} describes no model that this transformers knows: "
            f"{str(error).strip().splitlines()[0]}\nA model with code of its own cannot be exported; copy "
            "out/model of its stage instead."
        ) from error
    return found
