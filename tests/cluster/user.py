"""A person on the login node of the test cluster: types lines, waits, and looks at what the run directory says."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster
from tests.distributed.training_run import write_tasks

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 240.0  # ranks on two cores take many seconds to import torch


def training_words(steps: int = 4, *, stages: tuple[str, ...] = ("s0", "s1", "s2")) -> list[str]:
    """Keys of a tiny decoder under LoRA with dropout, on two nodes with two ranks each; data are in ./data."""
    words = ["cluster=testcluster", "model.name=tiny:qwen2", "model.autocast=float32", "data.dir=data"]
    words += ["model.gradient_checkpointing=false", "data.loader_workers=1", "parallel.threads_per_rank=1"]
    words += ["data.query_max_tokens=24", "data.passage_max_tokens=40", "s1.top_percents=70", "logging.plots=false"]
    words += ["s1.passages_per_query=4", "s1.eta=0.2", "eval.dir=tests", "eval.models=base,s0,s2"]
    for stage in stages:
        words += [f"{stage}.steps={steps}", f"{stage}.queries_per_rank=2", f"{stage}.warmup_steps=1"]
        words += [f"{stage}.save_every_steps=500", f"{stage}.log_every_steps=1", f"{stage}.temperature=0.05"]
    return words


@dataclass
class User:
    """One person: a cluster, a home, perhaps another user id than that of the tests."""

    cluster: Cluster
    folder: Path
    uid: int | None = None  # None = that of the tests
    python: str = sys.executable
    packages: str = ""  # folder of packages that this Python does not find by itself

    def type(
        self, *words: str, module: str = "tdro_hpc.submit", status: int | None = 0, seconds: float = 120.0
    ) -> subprocess.CompletedProcess:
        """`python -m <module> <words>` in the folder; its exit status must be `status` (None: any)."""
        environment = {**self.cluster.environment, "PYTHONPATH": f"{ROOT}:{self.packages}", "HOME": str(self.folder)}
        options: dict[str, Any] = {"cwd": self.folder, "env": environment}
        if self.uid is not None:
            options |= {"user": self.uid, "group": self.uid, "extra_groups": []}
        command = [self.python, "-m", module, *words]
        return self.cluster.run(*command, status=status, timeout_seconds=seconds, **options)

    def count(
        self, *words: str, name: str = "count", ranks_per_node: int = 1, status: int | None = 0
    ) -> subprocess.CompletedProcess:
        """The front door over the counting stages (tests/launch/counting.py) on two nodes."""
        keys = ["cluster=testcluster", f"name={name}", "s0.warmup_steps=0", "logging.plots=false", "eval.models=base"]
        keys.append(f"cluster.ranks_per_node={ranks_per_node}")
        return self.type("submit", *words, *keys, module="tests.launch.counting", status=status)

    def make_data(self) -> None:
        """Three small tasks in ./data and a test set in ./tests."""
        write_tasks(self.folder / "data")
        write_test_set(self.folder / "tests" / "words")

    def file(self, *parts: str) -> Path:
        """A path below runs/."""
        return self.folder.joinpath("runs", *parts)

    def rows(self, run: str, stage: str, event: str = "") -> list[dict[str, Any]]:
        """Rows of jobs.jsonl, all or those of one kind."""
        path = self.file(run, stage, "jobs.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if event in ("", row["event"])]

    def job(self, run: str, stage: str) -> str:
        """Id of the newest job of a stage."""
        return str(self.rows(run, stage, "submit")[-1]["job"])

    def steps(self, run: str, stage: str) -> int:
        """Newest step that metrics.jsonl tells of."""
        path = self.file(run, stage, "metrics.jsonl")
        lines = path.read_text().splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def wait(self, what: Callable[[], object], *, seconds: float = PATIENCE_SECONDS) -> None:
        """Return when `what` is true; fails with the queue and the end of every log when it takes too long."""
        try:
            self.cluster.wait_until(what, timeout_seconds=seconds)
        except AssertionError as problem:
            raise AssertionError(f"{problem}\n{self.logs()}") from None

    def wait_done(self, run: str, *stages: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Return when every stage has its DONE.json; fails as soon as one has a FAILED.json."""

        def all_done() -> bool:
            for stage in stages:
                failed = self.file(run, stage, "FAILED.json")
                assert not failed.exists(), f"{failed.read_text()}\n{self.logs()}"
            return all(self.file(run, stage, "DONE.json").exists() for stage in stages)

        self.wait(all_done, seconds=seconds)

    def wait_gone(self, *jobs: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Return when none of the jobs is in the queue."""
        self.wait(lambda: not set(jobs) & set(self.cluster.squeue()), seconds=seconds)

    def failed(self, run: str, stage: str) -> dict[str, Any]:
        """FAILED.json of a stage."""
        return json.loads(self.file(run, stage, "FAILED.json").read_text())

    def logs(self) -> str:
        """The end of every log, for the words of a test that fails."""
        files = sorted([*self.folder.glob("runs/*/*/log/*.log"), *self.folder.glob("runs/*/*/log/slurm/*_log.*")])
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in files)

    def cancel_everything(self) -> None:
        """Cancel every job of the cluster and wait until it is gone."""
        self.cluster.run("scancel", "--user=root", status=None)
        self.cluster.run("scancel", "--user=nobody", status=None)
        self.cluster.wait_until(lambda: not self.cluster.squeue())


@contextmanager
def person_on(cluster: Cluster) -> Iterator[User]:
    """A person with an empty folder; what is left of their jobs is cancelled at the end."""
    # Not pytest's tmp_path: jobs of other users and other nodes have to reach it.
    folder = Path(tempfile.mkdtemp(prefix="tdro-user-", dir="/var/tmp"))
    folder.chmod(0o755)
    person = User(cluster, folder)
    try:
        yield person
    finally:
        person.cancel_everything()
        shutil.rmtree(folder, ignore_errors=True)


def write_test_set(folder: Path) -> None:
    """A collection of twelve documents with six queries, in BEIR layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qrels").mkdir(exist_ok=True)
    words = "tree river stone cloud light sound paper glass metal water night storm".split()
    documents = [
        {"_id": f"d{n}", "title": "", "text": f"the {word} and its {words[n - 1]}"} for n, word in enumerate(words)
    ]
    queries = [{"_id": f"q{n}", "text": word} for n, word in enumerate(words[:6])]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(6))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
