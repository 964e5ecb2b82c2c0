"""One rank of a training run for the tests: python training_run.py <folder> <rank> <world> <rendezvous> <what> ...

what  <stage>:<run>[:<stop after step>:<signal>[:leave]] ...; with a step, the last rank gets the signal after it, and
the stage is run again unless it is left. A word with = is a setting for the stages after it; parallel.* come first.
"""

import json
import math
import os
import random
import signal
import sys
from pathlib import Path

from tdro_hpc.config.load import load_config
from tdro_hpc.config.schema import Config
from tdro_hpc.parallel.process import end_process, start_process
from tdro_hpc.stages import s0, s1, s2
from tdro_hpc.stages.graph import stage_graph
from tdro_hpc.training import loop
from tdro_hpc.training.stop import Stopped, install_stop_handlers

STAGES = {"s0": s0, "s1": s1, "s2-curr": s2, "s2-top70": s2}
WORDS = "tree river stone cloud light sound paper glass metal water night storm field house train bread".split()


def write_tasks(folder: Path) -> None:
    """Three small tasks whose queries share words with their positives."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in (("colours", 30), ("places", 24), ("tools", 17)):
        draw = random.Random(task)
        lines = []
        for _ in range(rows):
            topic = draw.sample(WORDS, 3)
            positive = " ".join([task, *topic, *draw.sample(WORDS, draw.randint(1, 4))])
            negatives = [" ".join(draw.sample(WORDS, draw.randint(2, 6))) for _ in range(4)]
            row = {"query": " ".join(topic), "positive_passages": [{"text": positive}]}
            row["negative_passages"] = [{"text": text} for text in negatives]
            lines.append(json.dumps(row) + "\n")
        (folder / f"{task}.jsonl").write_text("".join(lines))


def config_of(folder: Path, world: int, more: list[str]) -> Config:
    """A tiny decoder under LoRA with dropout; the global batch is the same for any number of ranks in any layout."""
    sizes = dict(word.split("=") for word in more if word.startswith(("parallel.pp=", "parallel.tp=")))
    data_size = world // math.prod(int(size) for size in sizes.values())
    arguments = [
        "model.name=tiny:qwen2",
        "model.autocast=float32",
        "model.gradient_checkpointing=false",
        "model.lora.dropout=0.1",
        f"data.dir={folder / 'data'}",
        "data.query_max_tokens=24",
        "data.passage_max_tokens=40",
        "data.loader_workers=1",
        "s1.top_percents=70",
        f"cluster.ranks_per_node={world}",
        "parallel.threads_per_rank=1",
    ]
    for stage in ("s0", "s1", "s2"):
        arguments += [f"{stage}.steps=7", f"{stage}.queries_per_rank={8 // data_size}", f"{stage}.warmup_steps=2"]
        arguments += [f"{stage}.save_every_steps=2", f"{stage}.log_every_steps=3", f"{stage}.temperature=0.05"]
        arguments += [f"{stage}.learning_rate=0.01"]
    arguments += ["s1.passages_per_query=4", "s1.accumulation_steps=2", "s1.eta=0.2"]
    return load_config([*arguments, *more]).config


def stop_after(step: int, name: str) -> None:
    """Send the signal to this process once, in the middle of the next step after `step`."""
    original = loop.seed_step

    def seed_and_signal(seed: int, number: int, rank: int) -> None:
        original(seed, number, rank)
        if number == step:
            loop.seed_step = original
            os.kill(os.getpid(), signal.Signals[name])

    loop.seed_step = seed_and_signal


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    settings: dict[str, str] = {}
    config = config_of(folder, world, [word for word in sys.argv[5:] if word.startswith("parallel.")])
    flag = install_stop_handlers()
    process = start_process(
        config.parallel, rank=rank, world=world, local_rank=rank, rendezvous=sys.argv[4], meshed=True
    )
    for word in sys.argv[5:]:
        if "=" in word:
            settings[word.split("=")[0]] = word
            continue
        config = config_of(folder, world, list(settings.values()))
        graph = stage_graph(config)
        stage, run, *step = word.split(":")
        run_dir = folder / run
        (run_dir / stage).mkdir(parents=True, exist_ok=True)
        if step and rank == world - 1:
            stop_after(int(step[0]), step[1])
        try:
            STAGES[stage].run(config, graph[stage], run_dir, process)
            assert not step, f"{word} was not stopped"
        except Stopped as stopped:
            assert step and stopped.step == int(step[0]) + 1, str(stopped)
            assert stopped.reason == (step[1] if rank == world - 1 else "another rank was asked to stop"), str(stopped)
            flag.reason = ""
            if len(step) == 2:
                STAGES[stage].run(config, graph[stage], run_dir, process)
    (folder / f"ended-{rank}").touch()
    end_process()


if __name__ == "__main__":
    main()
