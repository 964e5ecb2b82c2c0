"""A run directory in, README.md of an exported model out, with pictures. It says what the run's files say."""

import dataclasses
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from tdro_hpc.config.schema import Config
from tdro_hpc.evaluation.tables import legend, table_cells
from tdro_hpc.launch.record import DONE, read_json
from tdro_hpc.report.html import CAPTIONS
from tdro_hpc.report.licences import NOT_STATED

_PACKAGES = ("tdro_hpc", "torch", "transformers", "peft", "tokenizers", "safetensors", "deepspeed")
_SHOWN_SECTIONS = ("model", "data", "loss", "parallel")  # and that of the stage


@dataclass(frozen=True)
class TaskFacts:
    """One line of the table of tasks."""

    name: str
    rows: int = 0  # 0 = not known
    share: float | None = None  # of the rows that training drew
    alpha: float | None = None  # weight that s1 learnt
    language: str = ""  # ISO codes separated by commas


@dataclass(frozen=True)
class ModelFacts:
    """What the card says of the exported model beside its run."""

    title: str
    address: str  # what SentenceTransformer(...) is given
    stage: str
    origin: str  # out/model or checkpoints/step-00000100, under the stage
    config: Config  # of the stage's training
    weights: str  # how they are written, in words
    width: int  # numbers of a vector
    max_tokens: int
    prompts: Mapping[str, str]
    base_licence: str
    data_licence: str
    tasks: Sequence[TaskFacts]


def write_card(facts: ModelFacts, run_dir: Path, folder: Path) -> None:
    """Write README.md into the exported folder, and the plots of the run's stages into its folder plots."""
    parts = [
        _front_matter(facts),
        f"# {facts.title}",
        _opening(facts, run_dir),
        _loading(facts),
        _vectors(facts),
        _tasks(facts),
        _evaluation(run_dir),
        _plots(facts, run_dir, folder),
        _config(facts),
        _versions(run_dir / facts.stage),
        _licences(facts),
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def loading_lines(address: str) -> list[str]:
    """Three lines of Python that load a model and compare a query with a document."""
    return [
        "from sentence_transformers import SentenceTransformer",
        f"model = SentenceTransformer({address!r})",
        'scores = model.similarity(model.encode_query("what is sorted"), model.encode_document(["a list", "a set"]))',
    ]


def _front_matter(facts: ModelFacts) -> str:
    codes = {code.strip() for task in facts.tasks for code in task.language.split(",")} - {""}
    base = facts.config.model.name
    values: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "dense-retrieval", "tdro"],
    }
    if base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).is_dir():
        values["base_model"] = base
    if codes:
        values["language"] = sorted(codes)
    if facts.base_licence != NOT_STATED and " " not in facts.base_licence:
        values["license"] = facts.base_licence
    return f"---\n{yaml.safe_dump(values, sort_keys=False).rstrip()}\n---"


def _opening(facts: ModelFacts, run_dir: Path) -> str:
    kind = facts.stage.split("-")[0]
    how = {
        "s0": "trained on all tasks with the weights of the config, the reference of tDRO",
        "s1": "the proxy with which tDRO learnt the weights of the tasks",
        "s2": "trained with the task weights that tDRO learnt",
    }[kind]
    return (
        f"A dense retriever: `{facts.config.model.name}`, {how} (stage {facts.stage} of run {run_dir.name}, "
        f"{facts.origin}). This page was written from the files of that run."
    )


def _loading(facts: ModelFacts) -> str:
    return "\n".join(["## Load it", "", "```python", *loading_lines(facts.address), "```"])


def _vectors(facts: ModelFacts) -> str:
    model = facts.config.model
    rows = [
        ["base model", f"`{model.name}`" + (f" at `{model.revision}`" if model.revision else "")],
        ["weights", facts.weights],
        ["numbers of a vector", f"{facts.width:,}"],
        ["pooling", f"{model.pooling} token" if model.pooling != "mean" else "mean of the tokens"],
        ["similarity", model.similarity],
        ["longest text", f"{facts.max_tokens:,} tokens, the end token included"],
        ["attention", "every token sees every token" if model.bidirectional else "that of the base model"],
    ]
    prompts = [[f"`{name}`", f"`{text!r}`"] for name, text in facts.prompts.items()]
    return (
        "## Vectors\n\n"
        + _table([["", ""], *rows])
        + "\n\nPrompts, put before a text by `encode(..., prompt_name=...)`; "
        "`encode_query` and `encode_document` take theirs by themselves:\n\n" + _table([["name", "prompt"], *prompts])
    )


def _tasks(facts: ModelFacts) -> str:
    if not facts.tasks:
        return ""
    total = sum(task.rows for task in facts.tasks)
    rows = [["task", "rows", "share of the rows", "share in training", "alpha"]]
    for task in facts.tasks:
        of_rows = f"{task.rows / total:.4f}" if task.rows else "not known"
        figures = ["-" if value is None else f"{value:.4f}" for value in (task.share, task.alpha)]
        rows.append([f"`{task.name}`", f"{task.rows:,}" if task.rows else "not known", of_rows, *figures])
    note = "\n\nalpha is the weight that tDRO learnt for the task in stage s1." if _has_alpha(facts) else ""
    return f"## Tasks\n\n{_table(rows, numbers=True)}{note}"


def _has_alpha(facts: ModelFacts) -> bool:
    return any(task.alpha is not None for task in facts.tasks)


def _evaluation(run_dir: Path) -> str:
    scores = read_json(run_dir / "eval" / "out" / "scores" / "scores.json")
    if scores is None or not (run_dir / "eval" / DONE).is_file():
        return ""
    tables = [_table(table_cells(scores, metric), numbers=True) for metric in scores["metrics"]]
    return "\n\n".join(["## Evaluation", *tables, "<br>\n".join(line.replace("*", r"\*") for line in legend(scores))])


def _plots(facts: ModelFacts, run_dir: Path, folder: Path) -> str:
    """Markdown of the pictures of the stage, and of s1 where its weights were used; copies the files."""
    stages = dict.fromkeys((["s1"] if _has_alpha(facts) else []) + [facts.stage])
    lines = []
    for stage in stages:
        for picture in sorted((run_dir / stage / "plots").glob("*.png")):
            (folder / "plots").mkdir(exist_ok=True)
            name = f"{stage}-{picture.name}"
            shutil.copyfile(picture, folder / "plots" / name)
            caption = CAPTIONS.get(picture.stem, picture.stem)
            lines.append(f"![{stage}: {caption}](plots/{name})\n\n{stage}: {caption}")
    return "\n\n".join(["## Training", *lines]) if lines else ""


def _config(facts: ModelFacts) -> str:
    values = dataclasses.asdict(facts.config)
    kind = facts.stage.split("-")[0]
    shown = {"seed": values["seed"], **{name: values[name] for name in (*_SHOWN_SECTIONS, kind)}}
    text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip()
    summary = f"<details><summary>Every key that stage {facts.stage} was run with</summary>"
    return f"## Config\n\n{summary}\n\n```yaml\n{text}\n```\n\n</details>"


def _versions(stage_dir: Path) -> str:
    done = read_json(stage_dir / DONE) or {}
    code = f"`{done['code']}`" if "code" in done else "not recorded: the stage is not done"
    rows = [["", ""], ["code that trained it", code], ["Python", platform.python_version()]]
    for package in _PACKAGES:
        try:
            rows.append([package, metadata.version(package)])
        except metadata.PackageNotFoundError:
            continue
    return "## Versions\n\nOf the libraries, those that wrote this folder.\n\n" + _table(rows)


def _licences(facts: ModelFacts) -> str:
    base, data = f"`{facts.config.model.name}`", f"data of the {len(facts.tasks)} tasks"
    rows = [["input", "licence"], [base, facts.base_licence], [data, facts.data_licence]]
    return "## Licence of the inputs\n\nAs their own files state it.\n\n" + _table(rows)


def _table(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """A Markdown table; the first row is the head. `numbers` = all columns but the first are set right."""
    marks = ["---:" if numbers and column else "---" for column in range(len(rows[0]))]
    cells = [[cell.replace("|", r"\|").replace("*", r"\*").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], marks, *cells[1:]))
