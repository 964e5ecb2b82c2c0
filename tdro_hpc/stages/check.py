"""Looks at the data and the model as training would see them, before anything is queued. Starts and writes no stage."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from tdro_hpc.config.derived import ranks_of
from tdro_hpc.config.layouts import data_ranks
from tdro_hpc.config.schema import Config, DataConfig, TrainingConfig
from tdro_hpc.data.tasks import Task, open_tasks
from tdro_hpc.encoders.backbone import load_encoder, parameter_counts
from tdro_hpc.encoders.tokenization import TextTokenizer, load_tokenizer, with_instruction
from tdro_hpc.stages.assembly import data_of

SAMPLE_ROWS = 1000  # of each task, evenly spread, for the shares of cut texts
_SHOWN_ROWS = 3
_SHOWN_CHARACTERS = 220  # of one decoded text, half from each end


def check_inputs(config: Config, run_dir: Path, line: str) -> None:
    """Print the rows of every task, three of them as tokens, the shares that are cut, and load the model.

    line    what was typed; said again where the data set is still to be built, and only the model can be looked at
    raises  ValueError where the data or the model cannot be used
    """
    tokenizer = load_tokenizer(config.model)
    if config.data.builder and not config.data.dir and not (run_dir / "prepare" / "DONE.json").is_file():
        words = shlex.split(line)
        build = [word for word in words if not word.startswith(("stage=", "check="))] + ["stage=prepare"]
        print(
            f"\ndata  comes with stage prepare, which is not done. To look at it type:\n  {shlex.join(build)}\n  {line}"
        )
    else:
        _show_data(config, run_dir, tokenizer)
    _try_model(config, tokenizer)


def _show_data(config: Config, run_dir: Path, tokenizer: TextTokenizer) -> None:
    data = data_of(config, run_dir)
    tasks = open_tasks(data)
    total = sum(len(task) for task in tasks.values())
    print(f"\ndata  {len(tasks)} tasks, {total:,} rows; shares are of {SAMPLE_ROWS:,} rows a task at most")
    for task in tasks.values():
        _show_task(task, data, tokenizer)
    for line in small_tasks(config, tasks):
        print(line)


def small_tasks(config: Config, tasks: dict[str, Task]) -> list[str]:
    """A sentence for every task and stage whose global batch is larger than the task: its rows repeat in one batch."""
    lines = []
    for kind in ("s0", "s1", "s2"):
        training: TrainingConfig = getattr(config, kind)
        if training.batching != "homogeneous" or kind not in [stage.split("-")[0] for stage in config.stages]:
            continue
        rows = data_ranks(config, kind, ranks_of(config)) * training.queries_per_rank
        lines += [
            f"task {name} has {len(task):,} rows, fewer than the {rows:,} of one batch of {kind}: rows repeat within it"
            for name, task in tasks.items()
            if len(task) < rows
        ]
    return lines


def _show_task(task: Task, data: DataConfig, tokenizer: TextTokenizer) -> None:
    query_limit = task.config.query_max_tokens or data.query_max_tokens
    passage_limit = task.config.passage_max_tokens or data.passage_max_tokens
    step = max(1, len(task) // SAMPLE_ROWS)
    texts = [_texts_of(task, row) for row in range(0, len(task), step)[:SAMPLE_ROWS]]
    cut_queries = cut_share([query for query, _ in texts], tokenizer, limit=query_limit)
    cut_passages = cut_share([passage for _, passages in texts for passage in passages], tokenizer, limit=passage_limit)
    skipped = f", {task.skipped_rows:,} bad rows left out" if task.skipped_rows else ""
    print(
        f"\ntask {task.name}: {len(task):,} rows{skipped}, format {task.config.format}, {task.path}\n"
        f"  cut: {cut_queries:.1%} of queries at {query_limit} tokens, "
        f"{cut_passages:.1%} of passages at {passage_limit}"
    )
    for number, (query, passages) in enumerate(texts[:_SHOWN_ROWS]):
        print(f"  row {number * step}: {len(passages) - 1} negatives")
        print(f"    query    {marked(query, tokenizer, limit=query_limit)}")
        print(f"    positive {marked(passages[0], tokenizer, limit=passage_limit)}")


def _texts_of(task: Task, row: int) -> tuple[str, list[str]]:
    """(query, [a positive, all negatives]) of a row with its first instruction, as an encoder would get them."""
    record = task.record(row)
    instruction = task.config.instructions[0] if task.config.instructions else ""
    candidates = [*record.positives[:1], *record.negatives]
    on_passages = instruction if task.config.symmetric else ""
    passages = [with_instruction(candidate.full_text, on_passages) for candidate in candidates]
    return with_instruction(record.query, instruction), passages


def cut_share(texts: Sequence[str], tokenizer: TextTokenizer, *, limit: int) -> float:
    """Share of the texts that lose tokens at `limit`, from 0 to 1."""
    cut = 0
    for first in range(0, len(texts), 256):
        # One token more than allowed: a text that fills it would be cut.
        tokens = tokenizer.encode(list(texts[first : first + 256]), max_tokens=limit + 1)
        cut += int((tokens.attention_mask.sum(dim=1) > limit).sum())
    return cut / max(1, len(texts))


def marked(text: str, tokenizer: TextTokenizer, *, limit: int) -> str:
    """A text as the encoder sees it: decoded, with its number of tokens, and marked where it was cut."""
    (decoded,) = tokenizer.decode_marked(tokenizer.encode([text], max_tokens=limit))
    cut = cut_share([text], tokenizer, limit=limit) > 0
    words = decoded.replace("\n", "\\n")
    if len(words) > _SHOWN_CHARACTERS:
        half = _SHOWN_CHARACTERS // 2
        words = f"{words[:half]} ... {words[-half:]}"
    return f"{words} [CUT at {limit}]" if cut else words


def _try_model(config: Config, tokenizer: TextTokenizer) -> None:
    encoder = load_encoder(config.model, device=torch.device("cpu"), seed=config.seed)
    total, trainable = parameter_counts(encoder)
    with torch.no_grad():
        vectors = encoder(tokenizer.encode(["a query", "a passage"], max_tokens=config.data.query_max_tokens))
    if not bool(vectors.isfinite().all()):
        raise ValueError(f"{config.model.name} gives vectors that are not finite. Set model.autocast=float32.")
    print(
        f"\nmodel {config.model.name} loads: {total:,} parameters, {trainable:,} trained, "
        f"vectors of {encoder.width} numbers"
    )
