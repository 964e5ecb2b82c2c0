"""Weights in, JSON files in the released tDRO structure out: what s2 and the released tools read.

Four maps by task name: `domain_ids`, `domain_weights`, `size` (rows) and `epoch` (passes over the task if as many rows
were drawn as all tasks hold together; for reading only).
"""

from pathlib import Path

from tdro_hpc.atomic import write_json

Document = dict[str, dict[str, float]]


def document_of(weights: dict[str, float], sizes: dict[str, int]) -> Document:
    """The released structure for these weights, ids in their order.

    weights  name -> weight > 0, normalised here      sizes  name -> rows, at least the names of `weights`
    """
    total_weight = sum(weights.values())
    total_size = sum(sizes[name] for name in weights)
    shares = {name: weight / total_weight for name, weight in weights.items()}
    return {
        "domain_ids": {name: position for position, name in enumerate(weights)},
        "domain_weights": shares,
        "size": {name: sizes[name] for name in weights},
        "epoch": {name: share * total_size / sizes[name] for name, share in shares.items()},
    }


def top_of(weights: dict[str, float], percent: int) -> dict[str, float]:
    """Uniform weights over the best `percent` of the tasks, the greatest first; the others are left out.

    Keeps floor(tasks * percent / 100). Source: released code. Raises ValueError when that is no task at all.
    """
    check_percents([percent], len(weights))
    kept = len(weights) * percent // 100
    ranked = sorted(weights, key=lambda name: -weights[name])[:kept]
    return {name: 1.0 / kept for name in ranked}


def check_percents(percents: list[int], num_tasks: int) -> None:
    """Raise ValueError if a percent would keep no task; its message has the percents that do keep one."""
    refused = [percent for percent in percents if not (0 < percent <= 100 and num_tasks * percent // 100)]
    if refused:
        least = -(-100 // num_tasks)
        working = ",".join(str(percent) for percent in percents if percent not in refused)
        names = ", ".join(f"top{percent}" for percent in refused)
        raise ValueError(
            f"{names} of {num_tasks} tasks keeps 0 tasks; it must keep at least 1, so {least} to 100 percent. "
            f"Use: s1.top_percents={working or least}."
        )


def percents_of(text: str) -> list[int]:
    """The numbers of s1.top_percents; raises ValueError naming what is not a whole number from 1 to 100."""
    percents = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if not part.isdigit() or not 1 <= int(part) <= 100:
            raise ValueError(f"s1.top_percents has {part!r}; it must hold whole numbers from 1 to 100: 20,50,70.")
        percents.append(int(part))
    return percents


def documents_of(
    current: dict[str, float], mean: dict[str, float], ema: dict[str, float], sizes: dict[str, int], percents: list[int]
) -> dict[str, Document]:
    """Every file of a finished s1, by name: curr, mean, ema and one top<p> for each percent."""
    documents = {
        f"{name}_weights.json": document_of(weights, sizes)
        for name, weights in (("curr", current), ("mean", mean), ("ema", ema))
    }
    for percent in percents:
        documents[f"top{percent}_weights.json"] = document_of(top_of(current, percent), sizes)
    return documents


def write_documents(documents: dict[str, Document], folder: Path) -> None:
    """Write each document to `folder`, whole or not at all."""
    for name, document in documents.items():
        write_json(folder / name, document)
