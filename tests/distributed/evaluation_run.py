"""One rank of stage eval on a tiny model: python evaluation_run.py <folder> <rank> <world> <rendezvous> [stop]."""

import json
import signal
import sys
from pathlib import Path

import torch

from tdro_hpc.config.schema import Config, DataConfig, EvalConfig, LoraConfig, ModelConfig, ParallelConfig
from tdro_hpc.parallel.process import end_process, start_process
from tdro_hpc.retrieval import encode
from tdro_hpc.stages.eval import run
from tdro_hpc.stages.graph import stage_graph
from tdro_hpc.training.stop import Stopped, stop_flag

NUM_DOCUMENTS = 600  # three parts


def write_set(folder: Path) -> None:
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{row}", "text": f"number {row} " * (1 + row % 7)} for row in range(NUM_DOCUMENTS)]
    queries = [{"_id": f"q{row}", "text": f"number {row}"} for row in range(0, NUM_DOCUMENTS, 45)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text("".join(f"q{row}\td{row}\t1\n" for row in range(0, NUM_DOCUMENTS, 45)))


def main(folder: Path, rank: int, world: int, rendezvous: str, *, stop: bool) -> None:
    config = Config(
        model=ModelConfig(
            name="tiny:bert", pooling="mean", append_eos=False, autocast="float32", lora=LoraConfig(enabled=False)
        ),
        data=DataConfig(cache_dir=str(folder / "cache")),
        eval=EvalConfig(dir=str(folder / "sets"), models="base,bm25", batch_tokens=2048, top_k=100),
    )
    process = start_process(
        ParallelConfig(backend="gloo"), rank=rank, world=world, local_rank=rank, rendezvous=rendezvous
    )
    if stop and rank == 1:
        stop_flag().request(signal.SIGUSR2)  # the other rank hears of it only when its own parts are done
    encode._BATCHES_A_BLOCK = 2
    torch.set_num_threads(1)
    try:
        run(config, stage_graph(config)["eval"], folder / "run", process)
    except Stopped as stopped:
        print(stopped)
        assert stop, "nobody asked for a stop"
    end_process()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], stop="stop" in sys.argv[5:])
