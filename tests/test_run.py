"""One rank by hand, several under Slurm's variables, and what they do before and after their stage."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tdro_hpc.config.load import save_config
from tdro_hpc.config.schema import Config, LoggingConfig, TrainingConfig
from tdro_hpc.launch.look.status import status_text
from tdro_hpc.run import main, read_stage, stage_function
from tdro_hpc.stages.graph import stage_graph
from tests.launch.counting import counting_graph
from tests.launch.front_door import ROOT, job_rows, line, steps_done, wait_for

CONFIG = Config(
    name="demo", s0=TrainingConfig(steps=30, warmup_steps=3, save_every_steps=5), logging=LoggingConfig(plots=False)
)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A run in this process blocks a signal, which the programs of later tests would inherit."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def planned(runs_dir: Path, stage: str, config: Config = CONFIG) -> Path:
    folder = runs_dir / "demo" / stage
    save_config(config, folder / "config.yaml")
    return folder


def by_hand(folder: Path) -> "subprocess.Popen[str]":
    command = [*line(folder, program="run")[:4], str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_by_hand_stops_continues_and_knows_when_it_is_done(tmp_path):
    folder = planned(tmp_path, "s0")
    first = by_hand(folder)
    wait_for(lambda: steps_done(tmp_path, "s0") >= 2)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 3 and "s0 stopped at step" in said
    second = by_hand(folder)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "s0 done after" in said
    assert (folder / "out" / "model" / "total.txt").read_text() == str(sum(range(31)))
    assert [row["exit_codes"] for row in job_rows(tmp_path, "s0", "end")] == [[3], [0]]
    third = by_hand(folder)
    said, _ = third.communicate(timeout=60)
    assert third.returncode == 0 and "s0 is done" in said and len(job_rows(tmp_path, "s0")) == 2


def test_by_hand_failure_is_noted(tmp_path):
    folder = planned(tmp_path, "s0", replace(CONFIG, logging=LoggingConfig(plots=True)))
    orders = {"stage": "s0", "rank": 0, "step": 2, "how": "raise"}
    (tmp_path / "demo" / "orders.json").write_text(json.dumps(orders))
    process = by_hand(folder)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "rank 0 failed: the loss is not finite" in said
    assert json.loads((folder / "FAILED.json").read_text())["step"] == 1
    assert job_rows(tmp_path, "s0", "end")[0]["exit_codes"] == [1]
    assert 'class="failed"' in (tmp_path / "demo" / "report.html").read_text()


def test_a_stage_looks_for_its_inputs_before_it_loads_anything(tmp_path, capsys):
    folder = planned(tmp_path, "s1")
    assert main([str(folder)], graph_of=counting_graph) == 2
    assert "s1 needs s0, but" in capsys.readouterr().err
    assert not (folder / "FAILED.json").exists()


def test_folder_without_config_and_of_no_stage(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "config.yaml is missing" in capsys.readouterr().err
    with pytest.raises(ValueError, match="knows no stage s9; it has s0, s1"):
        read_stage(planned(tmp_path, "s9"), "", stage_graph)


def test_call_without_a_folder_explains_itself(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert "python -m tdro_hpc.run runs/demo/s0" in capsys.readouterr().out


def test_stage_and_keys_make_the_folder_and_continue_it(tmp_path, capsys):
    words = line(tmp_path, "s0.steps=8", "s0.save_every_steps=2", program="run")[4:]
    typed = [*line(tmp_path, program="run")[:4], "stage=s0", *words]

    def run(*more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*typed, *more], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    orders = {"stage": "s0", "rank": 0, "step": 5, "how": "raise"}
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "orders.json").write_text(json.dumps(orders))
    assert run().returncode == 1
    folder = tmp_path / "demo" / "s0"
    assert read_stage(folder, "s0", counting_graph)[0].s0.steps == 8
    told = status_text([folder.parent])
    assert "dead: s0 failed at step 4" in told and f"submit config={folder / 'config.yaml'} stage=s0" in told, told
    other = run("seed=5")
    assert other.returncode == 2
    assert "s0 stopped after step 4; it was begun with seed=" in other.stderr and "force=s0 name=demo" in other.stderr
    again = run()
    assert again.returncode == 0 and "s0 begins after step 4" in again.stdout
    assert (folder / "DONE.json").exists() and run().returncode == 0


def test_mistakes_in_the_keys_end_before_anything_is_written(tmp_path, capsys):
    for words, what in (
        (["stage=s0", "s0.stepz=3"], "s0.stepz"),
        (["stage=s7"], "knows no stage s7"),
        (["stage=s0", "stage=s1"], "One stage at a time"),
        (["name=x", "seed=1"], "One stage at a time"),
    ):
        assert main([*words, f"runs_dir={tmp_path}"], graph_of=counting_graph) == 2
        assert what in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class Ranks:
    """Two ranks with the variables that srun gives its tasks, and a scontrol that answers as it is told."""

    def __init__(self, runs_dir: Path, *words: str, restart: int = 0) -> None:
        self.runs_dir = runs_dir
        self.bin = runs_dir / "bin"
        self.bin.mkdir(exist_ok=True)
        self.answer("echo JobState=RUNNING Reason=None PreemptTime=None Restarts=0", "exit 0")
        (self.bin / "squeue").write_text("#!/bin/sh\nexit 0\n")
        (self.bin / "squeue").chmod(0o755)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            # Its port is 20000 + the rest of the id: one that nobody has.
            self.job = str(810000 + probe.getsockname()[1] % 5000)
        keys = ["cluster=slurm", "cluster.nodes=1", "cluster.ranks_per_node=2", "parallel.backend=gloo"]
        self.words = ["stage=s0", *line(runs_dir, "s0.steps=60", *keys, *words, program="run")[4:]]
        self.ranks = [self.start(rank, restart) for rank in range(2)]

    def answer(self, show: str, requeue: str) -> None:
        script = (
            f'#!/bin/sh\necho "$@" >> {self.runs_dir}/scontrol\nif [ "$1" = show ]; then {show}; else {requeue}; fi\n'
        )
        (self.bin / "scontrol").write_text(script)
        (self.bin / "scontrol").chmod(0o755)

    def start(self, rank: int, restart: int) -> "subprocess.Popen[str]":
        step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
        variables = {"SLURM_JOB_ID": self.job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), **step}
        again = {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return subprocess.Popen(
            [*line(self.runs_dir, program="run")[:4], *self.words],
            cwd=ROOT,
            env={**kept, **variables, **again, "PATH": f"{self.bin}:{kept['PATH']}", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self) -> tuple[list[int], str]:
        """(exit codes, what rank 0 said)."""
        said = [rank.communicate(timeout=90)[0] for rank in self.ranks]
        return [rank.returncode for rank in self.ranks], said[0]


def test_ranks_of_slurm_stop_go_back_into_the_queue_and_end(tmp_path):
    first = Ranks(tmp_path)
    wait_for(lambda: steps_done(tmp_path, "s0") >= 3)
    for rank in first.ranks:
        rank.send_signal(signal.SIGUSR2)
    codes, said = first.end()
    assert codes == [0, 0] and "back into the queue: restart 1 of 20" in said
    assert (tmp_path / "scontrol").read_text().splitlines() == [f"show job {first.job}", f"requeue {first.job}"]
    (stopped,) = job_rows(tmp_path, "s0", "stopped")
    assert stopped["then"] == "back into the queue: restart 1 of 20" and stopped["reason"] == "SIGUSR2"
    # The second one is told to end by somebody, not by Slurm: it is not put back, and no dependent may start.
    second = Ranks(tmp_path, restart=1)
    wait_for(lambda: steps_done(tmp_path, "s0") >= stopped["step"] + 3)
    second.ranks[0].send_signal(signal.SIGTERM)
    codes, said = second.end()
    assert codes == [75, 0] and "SIGTERM came" in said
    assert "requeue" not in (tmp_path / "scontrol").read_text().split("\n", 2)[2]
    assert Ranks(tmp_path, restart=2).end()[0] == [0, 0]
    starts = job_rows(tmp_path, "s0")
    assert [(row["restart"], row["executor"]) for row in starts] == [(0, "slurm"), (1, "slurm"), (2, "slurm")]
    assert (tmp_path / "demo" / "s0" / "out" / "model" / "total.txt").read_text() == str(sum(range(61)))
    # All ranks hear from rank 0 that there is nothing to do, or that they may not.
    codes, said = Ranks(tmp_path).end()
    assert codes == [0, 0] and "s0 is done" in said


def test_ranks_of_slurm_leave_together_when_rank_0_may_not_begin(tmp_path):
    begun = planned(tmp_path, "s0")
    (begun / "STALE.json").write_text("{}")
    codes, said = Ranks(tmp_path).end()
    assert codes == [2, 2] and "s0 has to be made again" in said and not (begun / "FAILED.json").exists()


def test_saved_config_is_the_one_that_is_read(tmp_path):
    config = replace(CONFIG, seed=7)
    assert read_stage(planned(tmp_path, "s0", config), "s0", stage_graph)[0] == config


@pytest.mark.parametrize("kind", ["s0", "s1", "s2", "eval"])
def test_every_kind_has_a_function(kind):
    assert callable(stage_function(kind))
