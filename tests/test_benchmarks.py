"""benchmarks/infonce.py: every table runs, what it measures is what it says, and a wrong loss is not timed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.reference.infonce import slow_infonce
from tests.reference.loss_cases import needs_library

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from infonce_lib import workloads  # noqa: E402
from infonce_lib.cases import VARIANTS, Case, Shape, build_inputs, exact_losses, keywords_of  # noqa: E402
from infonce_lib.implementations import IMPLEMENTATIONS, Implementation  # noqa: E402
from infonce_lib.options import TABLES, parse_options  # noqa: E402
from infonce_lib.peers import Outcome  # noqa: E402
from infonce_lib.report import Report, ratio_cell  # noqa: E402
from infonce_lib.rounds import Figure  # noqa: E402
from infonce_lib.tables import TIME_TABLES  # noqa: E402
from infonce_lib.worker import First, Sample  # noqa: E402

QUICK = ["threads=1", "clock=cpu", "patience=0", "rounds=1", "seconds=0.01", "implementation=torch"]
MEBIBYTE = 2**20


def run(folder, *words):
    """What the benchmark prints and what it writes."""
    command = [sys.executable, str(ROOT / "benchmarks" / "infonce.py"), *QUICK, *words]
    files = [f"json={folder}/figures.json", f"md={folder}/tables.md", f"out={folder}/plots"]
    done = subprocess.run([*command, *files], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((folder / "figures.json").read_text(encoding="utf-8"))["figures"]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All tables, each with a few of its implementations at two tiny shapes."""
    folder = tmp_path_factory.mktemp("infonce")
    only = "naive,naive loop,mean,rows,symmetric,mixed groups,ours plain,ours cached"
    printed, figures = run(folder, "table=all", "B=4,8", "n=1", "d=16", f"only={only}")
    return folder, printed, figures


@pytest.mark.slow
def test_every_table_has_a_row_of_figures_and_nothing_fails(everything):
    folder, printed, figures = everything
    assert [figure for figure in figures if figure["failed"]] == []
    assert {figure["table"] for figure in figures} == {*TABLES}
    text = (folder / "tables.md").read_text(encoding="utf-8")
    assert text.strip() == printed.strip()
    sections = text.split("\n### ")[1:]
    assert len(sections) == len(TABLES) + 1  # the last one says what each implementation is
    for section in sections[:-1]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        assert len(lines) >= 3, section
        assert len({line.count("|") for line in lines}) == 1, section


@pytest.mark.slow
def test_every_timed_figure_has_samples_and_small_errors(everything):
    _, _, figures = everything
    for figure in figures:
        if figure["table"] in TIME_TABLES:
            assert figure["samples"] and all(sample["seconds"] > 0 for sample in figure["samples"]), figure
            limit = 5e-2 if figure["label"].endswith("bf16") else 1e-4
            assert 0 <= max(figure["figures"].values()) < limit, figure


@pytest.mark.slow
def test_a_cached_step_is_compared_with_the_same_step_uncached(everything):
    folder, _, figures = everything
    steps = {f["label"]: f["figures"] for f in figures if f["table"] == "cached_step" and f["row"] == "mixed"}
    assert steps["ours cached"] == pytest.approx(steps["ours plain"], rel=1e-4)
    assert " NO " not in (folder / "tables.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_plots_are_written(everything):
    folder, _, _ = everything
    for name in ("infonce_memory.png", "infonce_time.png"):
        assert (folder / "plots" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_memory_counts_the_score_matrix_of_the_naive_loss(tmp_path):
    _, figures = run(tmp_path, "table=memory", "B=1024", "n=7", "d=16", "only=naive,mean")
    workspace = {figure["label"]: figure["workspace"] / MEBIBYTE for figure in figures}
    scores = 1024 * 8192 * 4 / MEBIBYTE
    assert 2 * scores < workspace["naive"] < 4 * scores
    assert workspace["mean"] < scores


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_is_the_definition(variant):
    case = Case(Shape(rows=12, negatives=2, width=8), "float32", 0.05, "torch")
    inputs, keywords = build_inputs(case), keywords_of(variant, case.shape)
    arguments = inputs.queries.detach().double(), inputs.documents.detach().double()
    exact = slow_infonce(*arguments, inputs.positives, temperature=case.temperature, **keywords)
    torch.testing.assert_close(exact_losses(inputs, keywords, *arguments), exact)


def test_a_wrong_loss_is_not_timed(monkeypatch):
    right = IMPLEMENTATIONS["naive"]

    def doubled(inputs):
        loss, queries, documents = right.build(inputs)()
        return lambda: Outcome(loss, 2 * queries, documents)

    monkeypatch.setitem(IMPLEMENTATIONS, "naive", Implementation("", doubled))
    case = Case(Shape(8, 1, 16), "float32", 0.05, "torch")
    with pytest.raises(ValueError, match=r"wrong: query gradient error is 1\.0e\+00"):
        workloads.LossWorkload("naive", case).check()


def test_disturbed_samples_count_only_where_there_are_no_others():
    quiet = Figure(First(), [Sample(1.0, 1, 0.0), Sample(9.0, 1, 0.5)], foreign_limit=0.1)
    loud = Figure(First(), [Sample(2.0, 1, 0.5), Sample(4.0, 1, 0.5)], foreign_limit=0.1)
    assert quiet.seconds == 1.0 and loud.seconds == 3.0
    assert ratio_cell(quiet, quiet) == "1.00" and ratio_cell(loud, quiet) == "3.00*"


def test_columns_of_a_table_are_as_wide_as_their_widest_cell():
    report = Report("Title", ["a", "long name"], [["wide cell", "b"]], verdicts=[True, False])
    lines = report.text().splitlines()
    assert lines[2] == "| a         | long name |" and lines[4] == "| wide cell | b         |"
    assert "Goals met: 1 of 2." in lines


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rouns=3", "Did you mean rounds=...?"),
        ("table=flot32", "'flot32' is none of all, float32"),
        ("B=64,many", "Numbers are separated by commas"),
        ("rounds=0", "rounds is 0; it must be at least 1."),
    ],
)
def test_a_mistake_names_what_to_type(word, said):
    with pytest.raises(SystemExit, match=re.escape(said)):
        parse_options([word])


@pytest.mark.slow
@needs_library
def test_small_batches_in_one_process_have_a_row_of_ratios_each(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "infonce_small.py")]
    done = subprocess.run([*command, "threads=1", "seconds=0"], cwd=tmp_path, capture_output=True, text=True)
    rows = re.findall(r"\| (\d+), 0, \d+ \| \S+ ms((?: \| [\d.]+, [\d.]+){6}) \| ([\d.]+|-) \|", done.stdout)
    assert done.returncode == 0 and [int(row[0]) for row in rows] == [
        n for n in (16, 64, 128, 256, 512, 1024) for _ in "12"
    ]
    assert all(0 < float(ratio) < 100 for _, cells, _ in rows for ratio in re.findall(r"[\d.]+", cells))
    wrong = subprocess.run([*command, "seconds=0", "thread=1"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and "no option thread; there are threads, seconds" in wrong.stderr


@pytest.mark.slow
def test_the_cores_of_a_machine_are_measured_alone_and_together(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "cores.py")]
    done = subprocess.run([*command, "seconds=0.3"], cwd=tmp_path, capture_output=True, text=True)
    alone, *together, _ = done.stdout.splitlines()
    cores = len(os.sched_getaffinity(0))
    assert done.returncode == 0 and re.fullmatch(rf"One core alone: \d+ GFLOP/s. {cores} cores .*", alone), done.stderr
    assert all(0.2 < float(sum_of_rates) < 2 * cores for sum_of_rates in together[0].split())
    mistakes = {"second=1": "no option second; there is seconds", "seconds=x": "seconds is 'x'; it must be a number"}
    for word, said in mistakes.items():
        wrong = subprocess.run([*command, word], cwd=tmp_path, capture_output=True, text=True)
        assert wrong.returncode == 2 and said in wrong.stderr
