"""The config keys that change a stage's results, their hash, and what became of them since. Reads no rows."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tdro_hpc.config.layouts import data_ranks
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.stage import Stage

# Speed, memory and logging only. A new key counts as changing results until it is listed here.
_NO_EFFECT = {
    "data.cache_dir",
    "data.loader_workers",
    "eval.batch_tokens",
    "eval.search",
    "export.private",  # of a repository that is made by the push, not of the files
    "loss.implementation",
    "loss.ring_above_mb",
    "loss.workspace_mb",
    "model.gradient_checkpointing",
    "s2.weights",  # the choice is in the stage's name
}
_NEGATIVES_OF_ANY_RANK = ("group", "world")  # the columns of a row are its own, or those of all ranks
_NO_EFFECT_ENDINGS = (".save_every_steps", ".keep_checkpoints", ".log_every_steps")
_NO_EFFECT_OF_A_TASK = (".rows", ".language", ".category")
_DATA_SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".txt", ".gz", ".yaml", ".parquet")
_DESCRIPTIONS = ("tasks.yaml", "tests.yaml")  # small, and another word in them may leave their size as it is
_MOST_SHOWN = 6


def result_keys(config: Config, stage: Stage, ranks: int) -> dict[str, Any]:
    """Dotted key -> JSON value for everything that changes the results of `stage`, sorted by key.

    Beside the config: the number of ranks that read data, the sizes of the data files, and the content of their
    descriptions and of the stage's own files, as `size of <file>` and `sha256 of <file>`. Where a row's negatives do
    not depend on which rank it is on, the ranks count only as a factor of the global batch: a stage that was stopped
    continues on another number of them.
    """
    readers = data_ranks(config, stage.kind, ranks)
    keys: dict[str, Any] = {"ranks": readers}
    for section in stage.sections:
        keys |= _flattened(section, getattr(config, section))
    keys = {key: value for key, value in keys.items() if _changes_results(key)}
    if stage.trains and keys[f"{stage.kind}.negatives"] in _NEGATIVES_OF_ANY_RANK:
        own = f"{stage.kind}.queries_per_rank"
        keys[f"{own} x ranks"] = keys.pop(own) * keys.pop("ranks")
    for section in ("data", "eval"):
        if section in stage.sections and getattr(config, section).dir:
            keys |= _contents(Path(getattr(config, section).dir))
    for name in stage.files:
        if Path(name).is_file():
            keys[f"sha256 of {name}"] = _sha256(Path(name))
    # Through JSON and back, so that a fresh value compares equal to one that was read from a file.
    return dict(sorted(json.loads(json.dumps(keys)).items()))


def hash_of(keys: Mapping[str, Any]) -> str:
    """sha256 of the keys and their values, whatever their order."""
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()


def changed_keys(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value it was made with, value now) for every difference; None stands for a key that is not there."""
    keys = sorted(set(made) | set(now))
    return [(key, made.get(key), now.get(key)) for key in keys if made.get(key) != now.get(key)]


def change_words(changes: list[tuple[str, Any, Any]]) -> tuple[str, str]:
    """The two halves of a sentence: "s0.steps=10, seed=1" as it was made, and the same as it is now."""
    shown = changes[:_MOST_SHOWN]
    more = f" and {len(changes) - len(shown)} more" if len(changes) > len(shown) else ""
    was = ", ".join(f"{key}={_words(value)}" for key, value, _ in shown) + more
    if len(shown) == 1:
        return was, _words(shown[0][2])
    return was, ", ".join(f"{key}={_words(value)}" for key, _, value in shown) + more


def _words(value: Any) -> str:
    if value is None:
        return "(none)"
    return value if isinstance(value, str) and value else json.dumps(value)


def _flattened(name: str, value: Any) -> dict[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        parts = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, Mapping):
        parts = list(value.items())
    else:
        return {name: value}
    flat: dict[str, Any] = {}
    for part, inner in parts:
        flat |= _flattened(f"{name}.{part}", inner)
    return flat


def _changes_results(key: str) -> bool:
    if key.startswith("data.tasks."):
        return not key.endswith(_NO_EFFECT_OF_A_TASK)
    return key not in _NO_EFFECT and not key.endswith(_NO_EFFECT_ENDINGS)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _contents(folder: Path) -> dict[str, Any]:
    """Bytes of the data files in `folder` and in the folders of BEIR layout below it, and the sha256 of descriptions.

    Row indexes do not count.
    """
    found: dict[str, Any] = {}
    for where, folders, files in os.walk(folder):
        depth = len(Path(where).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < 2 else []
        for file in sorted(files):
            if file.endswith(_DATA_SUFFIXES) and not file.startswith("."):
                path = Path(where, file)
                if depth == 0 and file in _DESCRIPTIONS:
                    found[f"sha256 of {file}"] = _sha256(path)
                else:
                    found[f"size of {path.relative_to(folder)}"] = path.stat().st_size
    return found
