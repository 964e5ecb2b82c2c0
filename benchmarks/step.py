"""Time of one training step as a multiple of sentence-transformers' trainer, in one run.

    python benchmarks/step.py [--rows 64] [--steps 6] [--rounds 3] [--precision float32 bfloat16]

Both sides train the MiniLM package with AdamW on the same rows in the same order: a query, its positive and one hard
negative, in-batch negatives, temperature 0.05, texts of 4 to 120 words, 128 tokens at most. A step is everything from
one batch to the next: reading, tokenising, forward, loss, backward, optimiser. Rounds of the two sides alternate; the
first step of each round is left out; the ratio is that of the medians. Under 1 means that this project is faster.
`uncached` compares with MultipleNegativesRankingLoss, `cached` (default chunks) with CachedMultipleNegativesRankingLoss
(mini-batches of 32, its default).
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tdro_hpc.config.load import load_config
from tdro_hpc.config.schema import Config
from tdro_hpc.data.batches import Batch, Batches
from tdro_hpc.data.mixture import Mixture
from tdro_hpc.data.tasks import Task, open_tasks
from tdro_hpc.encoders.backbone import load_encoder
from tdro_hpc.encoders.sources import model_location
from tdro_hpc.encoders.tokenization import load_tokenizer
from tdro_hpc.parallel.process import start_process
from tdro_hpc.parallel.torch_engine import TorchEngine
from tdro_hpc.training.finite import FiniteWatch
from tdro_hpc.training.step import ContrastiveStep

PEER_CHUNK_ROWS, MAX_TOKENS, TEMPERATURE = 32, 128, 0.05


def write_rows(folder: Path, num_rows: int) -> None:
    """Rows of common words, with lengths spread as in question answering: short queries, longer passages."""
    draw = random.Random(0)
    words = Path(random.__file__).read_text(encoding="utf-8").split()
    with (folder / "words.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            passages = [" ".join(draw.choices(words, k=draw.randint(8, 120))) for _ in range(2)]
            row: dict[str, Any] = {"query": " ".join(draw.choices(words, k=draw.randint(4, 16)))}
            row |= {"positive_passages": [{"text": passages[0]}], "negative_passages": [{"text": passages[1]}]}
            file.write(json.dumps(row) + "\n")


def config_of(folder: Path, arguments: argparse.Namespace, precision: str, *, cached: bool) -> Config:
    """The benchmark's step in this project's words."""
    values = {
        "model": "minilm",
        "model.autocast": precision,
        "model.attention": arguments.attention,
        "data.dir": folder,
        "data.query_max_tokens": MAX_TOKENS,
        "data.passage_max_tokens": MAX_TOKENS,
        "loss.gradient_cache": str(cached).lower(),
        "s0.queries_per_rank": arguments.rows,
        "s0.temperature": TEMPERATURE,
        "s0.negatives": "batch",
    }
    return load_config([f"{key}={value}" for key, value in values.items()]).config


class Ours:
    """This project's s0 step."""

    def __init__(self, config: Config, tasks: dict[str, Task]) -> None:
        process = start_process(config.parallel, rank=0, world=1, local_rank=0, rendezvous="")
        encoder = load_encoder(config.model, device=process.device, seed=1)
        mixture = Mixture(
            [len(task) for task in tasks.values()],
            [1.0],
            rows_per_micro_step=config.s0.queries_per_rank,
            micro_steps=1,
            batching="homogeneous",
            stratified=False,
            seed=1,
        )
        tokenizer = load_tokenizer(config.model)
        self.batches = Batches(tasks, mixture, tokenizer, config.data, config.s0, data_rank=0, data_size=1, seed=1)
        engine = TorchEngine(encoder, process, config.s0)
        self.watch = FiniteWatch(list(tasks), process.device)
        self.step = ContrastiveStep(engine, config.s0, config.loss, self.watch, num_tasks=len(tasks))
        self.steps_done = 0

    def seconds(self, num_steps: int) -> list[float]:
        """Wall time of each step, the first one left out."""
        ends = []
        batches: list[Batch]
        for batches in self.batches.iterate(self.steps_done, num_steps, num_workers=0):
            self.step(self.steps_done, batches)
            self.watch.check(lambda task, row: f"row {row}")
            self.steps_done += 1
            ends.append(time.perf_counter())
        return [after - before for before, after in zip(ends, ends[1:], strict=False)]

    def rows(self, first_step: int, num_steps: int) -> list[int]:
        """Rows of the task in the order in which the steps read them."""
        return [
            int(row) for step in range(first_step, first_step + num_steps) for row in self.batches.batch(step, 0).rows
        ]


class Peer:
    """sentence-transformers' trainer on the same rows."""

    def __init__(self, config: Config, task: Task, folder: Path, precision: str, *, cached: bool) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import losses as peer_losses

        self.model = SentenceTransformer(str(model_location(config.model.name)), device="cpu")
        self.model.max_seq_length = MAX_TOKENS
        if cached:
            self.loss = peer_losses.CachedMultipleNegativesRankingLoss(
                self.model, scale=1 / TEMPERATURE, mini_batch_size=PEER_CHUNK_ROWS
            )
        else:
            self.loss = peer_losses.MultipleNegativesRankingLoss(self.model, scale=1 / TEMPERATURE)
        self.task, self.folder, self.config, self.bf16 = task, folder, config, precision == "bfloat16"

    def seconds(self, rows: list[int]) -> list[float]:
        """Wall time of each step over these rows in order, the first one left out."""
        from datasets import Dataset
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        from torch.utils.data import BatchSampler, SequentialSampler
        from transformers import TrainerCallback

        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

        records = [self.task.record(row) for row in rows]
        columns = {
            "anchor": [record.query for record in records],
            "positive": [record.positives[0].full_text for record in records],
            "negative": [record.negatives[0].full_text for record in records],
        }
        training = self.config.s0
        settings = SentenceTransformerTrainingArguments(
            output_dir=str(self.folder / "peer"),
            per_device_train_batch_size=training.queries_per_rank,
            num_train_epochs=1,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            bf16=self.bf16,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            batch_sampler=lambda dataset, batch_size, **_: BatchSampler(SequentialSampler(dataset), batch_size, True),
        )
        SentenceTransformerTrainer(
            model=self.model,
            args=settings,
            train_dataset=Dataset.from_dict(columns),
            loss=self.loss,
            callbacks=[Clock()],
        ).train()
        return [after - before for before, after in zip(ends, ends[1:], strict=False)]


def compare(arguments: argparse.Namespace, precision: str, *, cached: bool) -> float:
    """Ratio of the median step times, ours over theirs, over alternating rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, arguments.rows * (arguments.steps + 1) * arguments.rounds)
        config = config_of(folder, arguments, precision, cached=cached)
        tasks = open_tasks(config.data)
        ours = Ours(config, tasks)
        peer = Peer(config, tasks["words"], folder, precision, cached=cached)
        our_seconds: list[float] = []
        their_seconds: list[float] = []
        for number in range(arguments.rounds):
            rows = ours.rows(ours.steps_done, arguments.steps + 1)
            sides = [lambda: our_seconds.extend(ours.seconds(arguments.steps + 1))]
            sides.append(lambda rows=rows: their_seconds.extend(peer.seconds(rows)))
            for side in sides if number % 2 == 0 else reversed(sides):
                side()
    return statistics.median(our_seconds) / statistics.median(their_seconds)


def main() -> None:
    """Print one line a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="queries of a step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--attention", default="padding_free")
    arguments = parser.parse_args()
    print(f"{arguments.rows} queries a step, {torch.get_num_threads()} threads, ours / sentence-transformers:")
    for precision in arguments.precision:
        for cached in (False, True):
            ratio = compare(arguments, precision, cached=cached)
            print(f"{precision:9} {'cached' if cached else 'uncached':9} {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
